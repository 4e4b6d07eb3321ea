"""The contracts of specjax and the pytrees that cross them.

Dimension names, used everywhere: B batch, T tokens in a call, N drafted nodes, D tree depth, R
proposal laws, V vocabulary, H features, S cache capacity. The *target* is the model whose
distribution is kept; the *draft* is what proposes. Every log-probability is a natural logarithm.

Functions held by these records are static: module-level functions or frozen-dataclass callables. A
closure, a `partial` or a bound method made per call is a new object, hence a new compilation.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from specjax import trees

__all__ = [
    "Context",
    "Draft",
    "Drafter",
    "History",
    "LanguageModel",
    "ModelOutput",
    "Sampling",
    "Verdict",
    "VerificationRule",
    "draft",
    "whole",
]


def whole(name: str, value: Any, least: int) -> int:
    """A static whole number as a Python int; raises ValueError, naming it, if below `least`."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} must be whole and at least {least}")
    return int(value)


def _static(default: Any = dataclasses.MISSING) -> Any:
    return struct.field(pytree_node=False, default=default)


@struct.dataclass
class Sampling:
    """How logits become the law to sample from; every field a scalar or one value a row.

    The order and the definitions are Hugging Face's: logit bias, repetition penalty, constraint,
    temperature, top-k, top-p, min-p. A field left None is not part of the program; changing a given
    field's value never recompiles. Fields given as Python or numpy numbers are cast (float32,
    `top_k` int32) and checked here.

    Attributes:
      temperature: float32[] or [B], 0 or 1e-6…1e6; 0 is greedy, the argmax with ties to the lowest
        token.
      top_k: int32[] or [B]; keeps the k largest logits and their ties; 0 keeps all.
      top_p: float32[] or [B] in [1e-6, 1]; keeps the smallest set of most probable tokens whose
        mass reaches it.
      min_p: float32[] or [B] in [0, 1]; keeps tokens at least this probable relative to the most
        probable one.
      repetition_penalty: float32[] or [B] in [1e-6, 1e6]; logits of tokens already in the text are
        divided by it when positive and multiplied by it when negative (Keskar et al. 2019, arXiv
        1909.05858, section 4.1).
      logit_bias: float32[V] or [B, V], added to the logits; −inf forbids a token.
      constraint: a pytree whose `__call__(history) -> bool[B, T, V]` tells which tokens may follow
        each node of a `History`; a grammar lives here. A text after which it allows none ends, with
        the finish reason `dead_end`.

    Raises:
      ValueError: a value is out of range or NaN; the message holds it.
    """

    temperature: Any = 0.0
    top_k: Any = None
    top_p: Any = None
    min_p: Any = None
    repetition_penalty: Any = None
    logit_bias: Any = None
    constraint: Any = None

    def __post_init__(self):
        for name, (dtype, lawful, wish) in _SAMPLING_FIELDS.items():
            value = getattr(self, name)
            # Tracers, device arrays and the placeholders of tree transformations (a flag, a name)
            # pass untouched; `generate` looks at what it is given once more.
            numbers = (int, float, list, tuple, np.ndarray, np.generic)
            if isinstance(value, bool) or not isinstance(value, numbers):
                continue
            given = np.asarray(value)
            if given.dtype.kind not in "iuf":
                raise ValueError(f"sampling {name}={given.tolist()!r} must be {wish}")
            if dtype == np.int32 and not np.all(given == np.floor(given)):
                raise ValueError(f"sampling {name}={given.tolist()!r} must be whole")
            if not np.all(lawful(given)):
                raise ValueError(f"sampling {name}={given.tolist()!r} must be {wish}")
            object.__setattr__(self, name, np.asarray(given, dtype))


def _between(least: float, most: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: (x >= least) & (x <= most)


# Bounds that leave float32 arithmetic room: what would round to 0 or to infinity is refused.
_SAMPLING_FIELDS = {
    "temperature": (
        np.float32,
        lambda x: (x == 0) | _between(1e-6, 1e6)(x),
        "0 (greedy) or between 1e-6 and 1e6",
    ),
    "top_k": (np.int32, _between(0, 2**31 - 1), "0 (all tokens) or more, below 2**31"),
    "top_p": (np.float32, _between(1e-6, 1), "at least 1e-6 and at most 1"),
    "min_p": (np.float32, _between(0, 1), "between 0 and 1"),
    "repetition_penalty": (np.float32, _between(1e-6, 1e6), "between 1e-6 and 1e6"),
    "logit_bias": (np.float32, lambda x: ~np.isnan(x) & (x < 3e38), "below 3e38 and not NaN"),
}


@struct.dataclass
class History:
    """What stands before each of T next-token laws: committed text, then the node's path.

    Attributes:
      tokens: int32[B, S], committed text; only the first `length` count.
      length: int32[B].
      path: int32[B, T, D], drafted tokens from the root's child down to the node; only the first
        `depth` count.
      depth: int32[B, T].
    """

    tokens: jax.Array
    length: jax.Array
    path: jax.Array
    depth: jax.Array


@struct.dataclass
class ModelOutput:
    """What a model says of T tokens.

    Attributes:
      logits: [B, T, V], of the token that follows each.
      features: [B, T, taps, H], hidden states at the layers asked for (tap l < L: the input of
        layer l; L: the output of the final norm).
    """

    logits: jax.Array
    features: jax.Array


@struct.dataclass
class LanguageModel:
    """A model as parameters and pure functions; nothing here assumes attention.

    A cache holds, per row, committed entries and then uncommitted ones, which `commit` keeps or
    drops. `apply` only reads it and returns the new tokens' entries beside the output, so that a
    branch of `lax.cond` need not return a cache (it would be copied, every layer, every step);
    `append` writes them.

    Attributes:
      params: pytree of weights, traced.
      apply: `(params, tokens[B,T], cache, tree, taps) -> (ModelOutput, entries)`. `tree` relates
        the uncommitted entries and the T new tokens, in that order, node 0 first; None is a chain.
        `taps` is a tuple of layers. Leaves of `entries` have axes [B, T, …].
      append: `(cache, entries) -> cache` with T more uncommitted entries.
      commit: `(cache, nodes[B,P] or None, count[B]) -> cache` keeps the first `count` of the listed
        uncommitted entries, the root (entry 0) listed like any other, and drops the rest. None
        lists them in order: a chain, for which no data moves.
      init_cache: `(batch, capacity) -> cache`, empty.
      truncate: optional `(cache, length[B]) -> cache` forgets committed entries beyond `length`,
        and uncommitted ones.
      resume: optional `(params, hidden[B,T,H], layer, cache, tree, taps) -> (ModelOutput, entries)`
        starts at a later layer from given hidden states (early exit), for tokens whose entries of
        the earlier layers the cache already holds as its last T uncommitted ones; `append` then
        completes those.
      vocab_size: V.
      context_length: longest text in tokens, or None where there is no limit.
      num_layers: L.
      hidden_size: H of the features.
      eos_ids: tokens that end a text unless the caller names others.
    """

    params: Any
    apply: Callable[..., Any] = _static()
    append: Callable[..., Any] = _static()
    commit: Callable[..., Any] = _static()
    init_cache: Callable[..., Any] = _static()
    vocab_size: int = _static()
    truncate: Callable[..., Any] | None = _static(None)
    resume: Callable[..., Any] | None = _static(None)
    context_length: int | None = _static(None)
    num_layers: int = _static(0)
    hidden_size: int = _static(0)
    eos_ids: tuple[int, ...] = _static(())


@struct.dataclass
class Draft:
    """A proposal: a tree of tokens and the laws from which they were drawn; build one with `draft`.

    Attributes:
      tokens: int32[B, N], of nodes 1…N.
      present: bool[B, N]; an absent node is neither verified nor counted. A node may be absent
        because of the prefix and of tokens drawn before it, never of its own (that would be lossy)
        and, unless they are `distinct`, never of its siblings'.
      tree: the topology.
      log_probs: [B, R, V], the proposal's laws; R is 0 when every node is deterministic.
      law: int32[B, N], the row of `log_probs` each node was drawn from; −1 for a deterministic node
        (a one-hot law).
      siblings: how siblings were drawn, `independent`, `distinct` (without replacement, from one
        law, none of them deterministic) or `coupled`.
      sibling_laws: how many laws the children of one parent may be drawn from, every one-hot one
        included; more than 1 in a union of drafters.
      passengers: whether some nodes ride in the target's pass for the drafter's `update` alone;
        they are absent, yet the pass is never narrowed to one token.
    """

    tokens: jax.Array
    present: jax.Array
    tree: trees.Tree
    log_probs: jax.Array
    law: jax.Array
    siblings: str = _static("independent")
    sibling_laws: int = _static(1)
    passengers: bool = _static(False)

    @property
    def is_deterministic(self) -> bool:
        """Whether no node was drawn at random, known at trace time."""
        return self.log_probs.shape[1] == 0


def draft(
    tokens: jax.Array,
    tree: trees.Tree,
    *,
    log_probs: jax.Array | None = None,
    law: jax.Array | None = None,
    present: jax.Array | None = None,
    vocab_size: int | None = None,
    siblings: str = "independent",
    sibling_laws: int | None = None,
    passengers: bool = False,
) -> Draft:
    """A `Draft` whose nodes, by default, are all present and drawn from their parents' laws.

    Args:
      tokens: int32[B, N].
      tree: topology of N nodes.
      log_probs: [B, R, V]; None for a deterministic draft, which then needs `vocab_size`.
      law: int32[B, N]; by default the parent's index, or −1 everywhere for a deterministic draft.
      present: bool[B, N]; descendants of an absent node become absent too.
      siblings, sibling_laws, passengers: as in `Draft`; by default siblings share one law where no
        `law` says otherwise, and have one each where it might, as deterministic ones do.

    Raises:
      ValueError: shapes that do not agree, laws of less than single precision, or an unknown
        `siblings`.
    """
    batch, size = tokens.shape
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens[B, N] are of dtype {tokens.dtype}; token ids are integers")
    if tree.size != size:
        raise ValueError(f"tokens[B, N] has N={size} but the tree has {tree.size} nodes")
    for name, array in (("law", law), ("present", present)):
        if array is not None and array.shape != tokens.shape:
            raise ValueError(
                f"{name}[B, N] has shape {array.shape}, but tokens[B, N] have shape {tokens.shape}"
            )
    if log_probs is not None and (log_probs.ndim != 3 or log_probs.shape[0] != batch):
        raise ValueError(
            f"log_probs[B, R, V] has shape {log_probs.shape}, but tokens[B, N] have B={batch}"
        )
    if log_probs is not None and jnp.finfo(log_probs.dtype).bits < 32:
        raise ValueError(
            f"log_probs[B, R, V] are {log_probs.dtype}, in which no law sums to 1: cast them to "
            "float32 and normalise them before tokens are drawn"
        )
    rows = 0 if log_probs is None else log_probs.shape[1]
    needed = size if tree.static_parents is None else max(tree.static_parents, default=-1) + 1
    if law is None and 0 < rows < needed:
        raise ValueError(
            f"log_probs[B, R, V] has R={rows}, but nodes draw from their parents' laws, of which "
            f"there are {needed}; give law[B, N]"
        )
    if sibling_laws is None:
        is_shared = siblings == "distinct" or (log_probs is not None and law is None)
        sibling_laws = 1 if is_shared else trees.most_siblings(tree)
    if siblings == "distinct" and sibling_laws > 1:
        raise ValueError(f"sibling_laws={sibling_laws}: distinct siblings share one law")
    if siblings not in ("independent", "distinct", "coupled"):
        raise ValueError(f"siblings={siblings!r}; known: 'independent', 'distinct', 'coupled'")
    if log_probs is None:
        if vocab_size is None:
            raise ValueError("a deterministic draft (log_probs=None) needs vocab_size")
        log_probs = jnp.zeros((batch, 0, vocab_size), jnp.float32)
    if law is None:
        parent = trees.parents(tree) if log_probs.shape[1] else jnp.full((1, size), -1, jnp.int32)
        law = jnp.broadcast_to(parent, (batch, size))
    if present is None:
        present = jnp.ones((batch, size), bool)
    else:
        missing = jnp.pad(~present, ((0, 0), (1, 0)))
        present = ~jnp.any(trees.ancestors(tree)[:, 1:] & missing[:, None, :], axis=-1)
    return Draft(tokens, present, tree, log_probs, law, siblings, sibling_laws, passengers)


@struct.dataclass
class Verdict:
    """What verification decided; each row emits `count` + 1 tokens, or `count` at a dead end.

    Attributes:
      path: int32[B, D], the accepted nodes from the root's child down; only the first `count`
        count.
      count: int32[B], accepted drafts.
      next_token: int32[B], the token after the last accepted node (the bonus token where the whole
        path was accepted); −1 where the law there has no token.
      draws: int32[B, N+1], the target's own token after every node that is present or a passenger,
        under rules that draw them, −1 where the law has none; otherwise None.
    """

    path: jax.Array
    count: jax.Array
    next_token: jax.Array
    draws: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class VerificationRule:
    """A verification rule: conditional acceptance, residual, and perhaps the target's draws.

    Attributes:
      name: as in reports.
      check: `(draft) -> None`, raises ValueError for a draft that the rule cannot take.
      accept: `(draft, target_log_probs[B,N+1,V]) -> [B,N]`, the probability that a node is accepted
        given that its parent was and its earlier siblings were not; 0 for an absent node, and for
        one below a dead end. `target_log_probs[:, i]` is the warped law after node i, −inf
        everywhere at a dead end. In the dtype of the laws.
      residual: `(draft, target_log_probs, node[B]) -> [B,V]`, log-law of the next token when the
        walk stops at `node`; −inf everywhere at a dead end.
      prepare: None, or `(draft, target_log_probs) -> pytree` of what both need, made once;
        `accept` and `residual` then take it as their last argument.
      draw: None, or `(keys[B], length[B], draft, target_log_probs) -> int32[B,N+1]`, the target's
        token after each node; a node is then accepted when it equals the draw at its parent, and
        the next token is the draw where the walk stops. `accept` and `residual` still give the law,
        for the certificate.
      draw_law: the law of those draws given the draft, `(draft, target_log_probs) -> [B,N+1,V]`,
        natural logs; None where they do not depend on it, and have the target's own.
      lossless: whether the target's law is kept exactly.
    """

    name: str
    check: Callable[[Draft], None]
    accept: Callable[..., jax.Array]
    residual: Callable[..., jax.Array]
    prepare: Callable[[Draft, jax.Array], Any] | None = None
    draw: Callable[[jax.Array, jax.Array, Draft, jax.Array], jax.Array] | None = None
    draw_law: Callable[[Draft, jax.Array], jax.Array] | None = None
    lossless: bool = True


@struct.dataclass
class Context:
    """What a drafter may read of the decoding state.

    Attributes:
      tokens: int32[B, S], committed text; only the first `length` count.
      length: int32[B], committed tokens, the last one (the root) included.
      active: bool[B], rows that take part in this step; a drafter's state must not change for the
        others (slots beyond what it holds of the text may).
      sampling: the request's sampling.
      target: the target model.
      cache: the target's cache, which holds every committed token but the last.
      keys: request keys[B], for noise that must be the target's; never consumed.
    """

    tokens: jax.Array
    length: jax.Array
    active: jax.Array
    sampling: Sampling
    target: LanguageModel
    cache: Any
    keys: jax.Array


@struct.dataclass
class Drafter:
    """A way to propose, as parameters and pure functions.

    Attributes:
      params: pytree, traced: weights and any number that a user would sweep.
      init: `(params, batch, capacity) -> state`.
      prefill: `(params, state, text[B,S], start[B], count[B], output) -> state`, called for each
        chunk of committed tokens, text[start:start + T], with the target's output at them; only
        the first `count` of a row are real.
      propose: `(params, state, context, keys[B]) -> (Draft, state)`. `keys` are the request keys,
        or what a combinator made of them for this drafter alone: derive from them with
        `sampling.derive`, never consume them.
      update: `(params, state, context, draft, verdict, output) -> state`, after the step: `context`
        holds the new text and `active` the rows that took part; a row emitted `verdict.count` + 1
        tokens, and ended early (end of sequence, limit) where that is fewer than were accepted. A
        row at a dead end that emitted nothing is not active here.
      nodes: N, the number of nodes of every draft.
      taps: layers of the target whose features `prefill` and `update` read.
      name: as in reports.
    """

    params: Any
    init: Callable[..., Any] = _static()
    prefill: Callable[..., Any] = _static()
    propose: Callable[..., Any] = _static()
    update: Callable[..., Any] = _static()
    nodes: int = _static()
    taps: tuple[int, ...] = _static(())
    name: str = _static("drafter")
