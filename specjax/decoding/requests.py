"""From what a caller writes (lists, numbers, a key) to the arrays of a request.

Every bad value that can be seen outside a trace is refused here.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core as jax_core

from specjax import types
from specjax.decoding import state as states

__all__ = ["Prompts", "build", "check", "is_traced", "pad", "request_keys"]

# Added to a prompt, more would overflow int32.
_MOST_NEW_TOKENS = 2**30
_KEY_KIND = "threefry2x32"

Prompts = Sequence[Sequence[int]] | np.ndarray | jax.Array


def is_traced(*values: Any) -> bool:
    """Whether any of the values is abstract, so that it cannot be checked here."""
    return any(isinstance(leaf, jax_core.Tracer) for leaf in jax.tree.leaves(values))


def check(target: Any, drafter: Any, state: states.DecodeState | None = None) -> None:
    """Raises ValueError for what is no model, no drafter, or a state that has been consumed."""
    if not isinstance(target, types.LanguageModel):
        raise ValueError(
            f"target is of type {type(target).__name__}, no LanguageModel; of a loaded bundle, "
            "give bundle.target"
        )
    if not isinstance(drafter, types.Drafter):
        raise ValueError(
            f"drafter is of type {type(drafter).__name__}, no Drafter; specjax.drafters makes "
            "them, and specjax.autoregressive needs none"
        )
    if target.context_length is not None and drafter.nodes >= target.context_length:
        raise ValueError(
            f"a draft of {drafter.nodes} nodes does not fit the model's context of "
            f"{target.context_length} tokens; draft less"
        )
    if state is not None and not is_traced(state.tokens) and state.tokens.is_deleted():
        raise ValueError(
            "this state has been consumed, since a state goes on once; take the newest result's"
        )


def pad(
    prompts: Prompts, lengths: Any, vocab_size: int, may_be_empty: bool = False
) -> tuple[Any, Any]:
    """Prompts as int32[B, P] and int32[B] lengths.

    Args:
      prompts: one list of token ids a row, or int[B, P] with `lengths`.
      lengths: int[B] for an array of prompts; None counts all P.
      vocab_size: V.
      may_be_empty: whether a row may have no tokens, as when going on.

    Raises:
      ValueError: no prompt, an empty one, or a token that is not in the vocabulary.
    """
    if not isinstance(prompts, (np.ndarray, jax.Array)):
        if isinstance(prompts, (str, bytes)) or any(isinstance(row, str) for row in prompts):
            raise ValueError(
                "prompts are lists of token ids; encode text first (bundle.tokenizer.encode)"
            )
        if lengths is not None:
            raise ValueError("lengths belong to an array of prompts; lists know their own")
        rows = [np.asarray(row) if np.size(row) else np.zeros(0, np.int64) for row in prompts]
        for row in rows:
            if row.ndim != 1:
                raise ValueError(
                    f"a prompt is a list of token ids, got {row.tolist()}; wrap a single prompt as "
                    "[prompt]"
                )
            if row.dtype.kind not in "iu":
                raise ValueError(f"token ids are integers, got {row.tolist()}")
        lengths = np.asarray([len(row) for row in rows], np.int32)
        prompts = np.zeros((len(rows), max(map(len, rows), default=0)), np.int64)
        for index, row in enumerate(rows):
            prompts[index, : len(row)] = row
    if not np.issubdtype(prompts.dtype, np.integer):
        raise ValueError(f"token ids are integers, got prompts of dtype {prompts.dtype}")
    if prompts.ndim != 2 or prompts.shape[0] == 0:
        raise ValueError(f"prompts must be [B, P] with at least one row, got shape {prompts.shape}")
    if lengths is not None and np.shape(lengths) != (prompts.shape[0],):
        raise ValueError(
            f"lengths has shape {np.shape(lengths)}; {prompts.shape[0]} prompts need "
            f"({prompts.shape[0]},)"
        )
    if lengths is None:
        lengths = np.full((prompts.shape[0],), prompts.shape[1], np.int32)
    if not is_traced(prompts, lengths):
        _check_prompts(np.asarray(prompts), np.asarray(lengths), vocab_size, may_be_empty)
    return prompts, lengths


def _check_prompts(
    prompts: np.ndarray, lengths: np.ndarray, vocab_size: int, may_be_empty: bool
) -> None:
    for row, length in enumerate(lengths):
        if length < (0 if may_be_empty else 1):
            raise ValueError(f"prompt {row} is empty; a prompt needs at least one token")
        if length > prompts.shape[1]:
            raise ValueError(
                f"prompt {row} has lengths[{row}]={length} but only {prompts.shape[1]} columns"
            )
        tokens = prompts[row, :length]
        strange = tokens[(tokens < 0) | (tokens >= vocab_size)]
        if strange.size:
            raise ValueError(
                f"prompt {row} holds token {strange[0]}, outside the vocabulary 0…{vocab_size - 1}"
            )


def request_keys(key: jax.Array | None, keys: jax.Array | None, batch: int) -> jax.Array:
    """The rows' keys[B]: `key` folded with each row's index, or `keys`; neither is consumed.

    Raises:
      ValueError: both are given, an untyped key, a key of another kind than threefry2x32, or a
        wrong number of keys.
    """
    if key is not None and keys is not None:
        raise ValueError("give key or keys, not both")
    given = keys if keys is not None else key
    dtype = getattr(given, "dtype", type(given).__name__)
    if given is not None and not (
        isinstance(given, jax.Array) and jnp.issubdtype(given.dtype, jax.dtypes.prng_key)
    ):
        raise ValueError(f"got a key of type {dtype}; make typed keys with jax.random.key(seed)")
    # What other generators draw depends on the shape and the program around it, so one key would
    # no longer mean one text.
    if given is not None and jax.random.key_impl(given) != _KEY_KIND:
        raise ValueError(
            f"got a key of kind {jax.random.key_impl(given)!r}, whose draws depend on the batch; "
            f"make it with jax.random.key(seed, impl={_KEY_KIND!r})"
        )
    if keys is None:
        key = jax.random.key(0, impl=_KEY_KIND) if key is None else key
        if key.ndim:
            raise ValueError(f"key has shape {key.shape}; one key a prompt goes in keys=")
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch, dtype=jnp.int32))
    if keys.shape != (batch,):
        raise ValueError(f"keys has shape {keys.shape}; {batch} prompts need ({batch},)")
    return keys


def build(
    keys: jax.Array,
    lengths: Any,
    max_new_tokens: Any,
    sampling: types.Sampling | None,
    eos: Any,
    stop: Any,
    vocab_size: int,
    least: int = 1,
) -> states.Request:
    """The request of a batch.

    Args:
      keys: one a row.
      lengths: int[B], text length before the first new token.
      max_new_tokens: an int, or one a row.
      sampling: None is greedy.
      eos: token ids, or one list of them a row.
      stop: lists of token ids, or one list of such lists a row.
      vocab_size: V.
      least: smallest lawful `max_new_tokens`.

    Raises:
      ValueError: a value out of range; the message holds it.
    """
    batch = keys.shape[0]
    most = max_new_tokens
    if not is_traced(most):
        most = np.asarray(most)
        if most.dtype.kind not in "iu" or np.any(most < least) or np.any(most > _MOST_NEW_TOKENS):
            raise ValueError(
                f"max_new_tokens={max_new_tokens} must be whole, at least {least} and at most "
                f"{_MOST_NEW_TOKENS}"
            )
        if most.shape not in ((), (batch,)):
            raise ValueError(f"max_new_tokens has shape {most.shape}; give one value or {batch}")
    sampling = types.Sampling() if sampling is None else sampling
    if not isinstance(sampling, types.Sampling) or sampling.temperature is None:
        raise ValueError(f"sampling={sampling!r} is no specjax.Sampling with a temperature")
    for leaf in jax.tree.leaves(sampling.constraint):
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, int, float)):
            raise ValueError(
                f"sampling constraint={leaf!r} is no pytree of arrays; make it a flax.struct "
                "dataclass with a __call__(history)"
            )
    eos_rows = _per_row(eos, batch, depth=1, name="eos")
    stop_rows = _per_row(stop, batch, depth=2, name="stop")
    ends = np.full((batch, _columns(max(map(len, eos_rows)))), -1, np.int32)
    for row, ids in enumerate(eos_rows):
        ends[row, : len(ids)] = ids
    _check_ids("eos", eos, [token for ids in eos_rows for token in ids], vocab_size)
    _check_ids("stop", stop, [t for row in stop_rows for ids in row for t in ids], vocab_size)
    # A request without stop sequences looks for none.
    most_stops = max(map(len, stop_rows))
    most_stops = _columns(most_stops) if most_stops else 0
    longest = _columns(max((len(ids) for row in stop_rows for ids in row), default=1))
    sequences = np.zeros((batch, most_stops, longest), np.int32)
    stop_length = np.zeros((batch, most_stops), np.int32)
    for row, lists in enumerate(stop_rows):
        for index, ids in enumerate(lists):
            if not ids:
                raise ValueError("a stop sequence is empty; it would end every text at once")
            sequences[row, index, longest - len(ids) :] = ids
            stop_length[row, index] = len(ids)
    return states.Request(
        keys=keys,
        sampling=_sampling_rows(sampling, batch, vocab_size),
        limit=jnp.asarray(lengths, jnp.int32)
        + jnp.broadcast_to(jnp.asarray(most, jnp.int32), (batch,)),
        eos=jnp.asarray(ends),
        stop=jnp.asarray(sequences),
        stop_length=jnp.asarray(stop_length),
    )


def _columns(count: int) -> int:
    """A power of two, at least 4, so that requests of like size share a program."""
    return max(4, 1 << max(count - 1, 0).bit_length())


def _check_ids(name: str, value: Any, ids: list, vocab_size: int) -> None:
    for token in ids:
        if not isinstance(token, (int, np.integer)) or not 0 <= token < vocab_size:
            raise ValueError(
                f"{name}={value} holds {token}, which is no token of the vocabulary "
                f"0…{vocab_size - 1}"
            )


def _per_row(value: Any, batch: int, depth: int, name: str) -> list[list]:
    """One list a row from nested lists; `depth` is how deep a value shared by all rows nests."""
    if is_traced(value):
        raise ValueError(f"{name} is traced, and its sizes are static; give lists of token ids")

    def plain(x):
        if isinstance(x, (np.ndarray, jax.Array)):
            return x.tolist()
        return [plain(item) for item in x] if isinstance(x, (list, tuple)) else x

    def nesting(x):
        return (
            1 + max((nesting(item) for item in x), default=0) if isinstance(x, (list, tuple)) else 0
        )

    if isinstance(value, (int, np.integer)):
        raise ValueError(f"{name}={value} must be a list, as in {name}=({value},)")
    value = plain(value)
    value = sorted(value) if isinstance(value, (set, frozenset)) else value
    if (
        value is None
        or len(value) == 0
        or (
            len(value) == batch and all(isinstance(row, (list, tuple)) and not row for row in value)
        )
    ):
        return [[] for _ in range(batch)]
    if nesting(value) == depth:
        return [list(value)] * batch
    if nesting(value) != depth + 1 or len(value) != batch:
        raise ValueError(
            f"{name}={value} is neither one list for all {batch} prompts nor one a prompt"
        )
    return [list(row) for row in value]


def _sampling_rows(sampling: types.Sampling, batch: int, vocab_size: int) -> types.Sampling:
    """Every scalar field as one value a row, so that rows can differ without another program."""
    rows = {}
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        field = getattr(sampling, name)
        if field is None:
            continue
        if not isinstance(field, (jax.Array, np.ndarray)):
            raise ValueError(f"sampling {name}={field!r} is no number")
        if not is_traced(field) and isinstance(field, jax.Array):
            # Arrays from elsewhere pass the constructor unseen; as numpy they are checked.
            sampling = dataclasses.replace(sampling, **{name: np.asarray(field)})
            field = getattr(sampling, name)
        if jnp.shape(field) not in ((), (1,), (batch,)):
            raise ValueError(
                f"sampling {name} has shape {jnp.shape(field)}; give one value or {batch}"
            )
        dtype = jnp.int32 if name == "top_k" else jnp.float32
        rows[name] = jnp.broadcast_to(jnp.asarray(field, dtype), (batch,))
    bias = sampling.logit_bias
    if bias is not None and not is_traced(bias):
        known = np.asarray(bias)
        if np.any(np.isnan(known) | (known == np.inf)) or np.any(np.all(known == -np.inf, axis=-1)):
            raise ValueError(
                "sampling logit_bias must be below infinity, not NaN, and leave a token to each row"
            )
    if bias is not None:
        if jnp.shape(bias) not in ((vocab_size,), (batch, vocab_size)):
            raise ValueError(
                f"sampling logit_bias has shape {jnp.shape(bias)}; give ({vocab_size},) "
                f"or ({batch}, {vocab_size})"
            )
        rows["logit_bias"] = jnp.asarray(bias, jnp.float32)
    return dataclasses.replace(sampling, **rows)
