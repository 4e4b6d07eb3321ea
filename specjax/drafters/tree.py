"""A tree of one draft model's guesses (SpecInfer: Miao et al. 2024, arXiv 2305.09781)."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from specjax import sampling, trees, types
from specjax.drafters import memory

__all__ = ["tree"]


def tree(
    draft_model: types.LanguageModel,
    expansion: Sequence[int] = (4, 2, 1),
    *,
    replacement: bool = False,
    greedy: bool = False,
) -> types.Drafter:
    """Drafts a tree: `expansion[d]` guesses after every node at depth d, in one pass a depth.

    Args:
      draft_model: any model that takes a tree; shares the target's vocabulary, and drafts nothing
        beyond its own context length.
      expansion: children of a node by its depth; static.
      replacement: draw siblings independently, duplicates and all, instead of without replacement
        (where the law has fewer tokens than siblings, the last ones are absent).
      greedy: take the most probable tokens instead, at any temperature: a deterministic draft for
        `match`. The only tree that is worth its width where temperature 0 leaves one token to draw.

    Raises:
      ValueError: no `LanguageModel`, no depth, a factor below 1, or both `greedy` and
        `replacement`.
    """
    memory.check(draft_model)
    expansion = tuple(types.whole("expansion factor", factor, 1) for factor in expansion)
    if not expansion:
        raise ValueError("expansion=() drafts nothing; give a factor a depth")
    if greedy and replacement:
        raise ValueError(
            "greedy=True and replacement=True exclude each other: the most probable tokens are not "
            "drawn, and each is taken once"
        )
    return types.Drafter(
        params=draft_model,
        init=memory.init,
        prefill=_prefill,
        propose=_Propose(expansion, replacement, greedy),
        update=_update,
        nodes=trees.branching(expansion).size,
        name="tree",
    )


def _prefill(params, state, text, start, count, output) -> memory.Memory:
    return memory.prefill(params, state, text, start, count, output.logits.shape[1])


def _update(params, state, context, draft, verdict, output) -> memory.Memory:
    del draft, output
    return memory.keep(params, state, context, verdict, is_chain=False)


@dataclasses.dataclass(frozen=True)
class _Propose:
    expansion: tuple[int, ...]
    replacement: bool
    greedy: bool

    def __call__(
        self,
        params: types.LanguageModel,
        state: memory.Memory,
        context: types.Context,
        keys: jax.Array,
    ) -> tuple[types.Draft, memory.Memory]:
        draft_model, target = params, context.target
        memory.check_vocabulary(draft_model, target)
        batch = context.length.shape[0]
        step_keys = sampling.derive(keys, sampling.Stream.DRAFT, context.length)
        logits, state = memory.catch_up(draft_model, state, context)
        cache, logits = state.cache, logits[:, None]
        tokens = jnp.zeros((batch, 0), jnp.int32)
        present = context.active[:, None]
        laws = []
        for depth, factor in enumerate(self.expansion):
            grown = trees.branching(self.expansion[:depth])
            parents = logits.shape[1]
            past = sampling.history(context.tokens, context.length, grown, tokens)
            past = dataclasses.replace(
                past, path=past.path[:, -parents:], depth=past.depth[:, -parents:]
            )
            law = sampling.warp(self._sampling(context.sampling), logits, past)
            drawn = self._draw(step_keys, grown.size, law, factor)
            going = present[:, -parents:]
            if draft_model.context_length is not None:
                room = context.length + depth <= draft_model.context_length
                going = going & room[:, None]
            going = (going[:, :, None] & (drawn >= 0)).reshape(batch, -1)
            drawn = jnp.maximum(drawn, 0).reshape(batch, -1)
            tokens = jnp.concatenate([tokens, drawn], axis=1)
            present = jnp.concatenate([present, going], axis=1)
            laws.append(law)
            if depth + 1 < len(self.expansion):
                grown = trees.branching(self.expansion[: depth + 1])
                output, entries = draft_model.apply(draft_model.params, drawn, cache, grown, ())
                cache, logits = draft_model.append(cache, entries), output.logits
        draft = types.draft(
            tokens,
            trees.branching(self.expansion),
            log_probs=None if self.greedy else jnp.concatenate(laws, axis=1),
            present=present[:, 1:],
            vocab_size=target.vocab_size,
            siblings="independent" if self.replacement or self.greedy else "distinct",
        )
        fed = jnp.full_like(state.fed, len(self.expansion) - 1)
        return draft, dataclasses.replace(state, cache=cache, fed=fed)

    def _sampling(self, asked: types.Sampling) -> types.Sampling:
        """The law to draw from; what is most probable is asked of the whole law."""
        if not self.greedy:
            return asked
        return dataclasses.replace(asked, temperature=1.0, top_k=None, top_p=None, min_p=None)

    def _draw(self, step_keys, first: int, law, factor: int):
        """`factor` tokens from every law[B, P, V], in draw order: int32[B, P, factor], −1 for none.

        Without replacement tokens are drawn one by one from what the earlier ones left, which has
        the same law as a Gumbel top-k.
        """
        batch, parents, vocab_size = law.shape
        # A key for every node that is drawn: `first` + 1 is the first of this depth.
        index = first + 1 + jnp.arange(parents * factor, dtype=jnp.int32)
        keys = jax.vmap(lambda key: jax.vmap(lambda node: jax.random.fold_in(key, node))(index))
        keys = keys(step_keys).reshape(batch * parents, factor)
        left = law.reshape(-1, vocab_size)
        if not self.greedy:
            # What rounds to nothing in the law's own dtype is nothing, as verification sees it; it
            # would be drawn once an earlier sibling has taken all else. One nat of margin, since
            # no two programs round alike.
            left = jnp.where(left > math.log(jnp.finfo(law.dtype).tiny) + 1, left, -jnp.inf)
        drawn = []
        for place in range(factor):
            if self.greedy:
                ends = jnp.max(left, axis=-1) == -jnp.inf
                token = jnp.where(ends, -1, sampling.greedy(left))
            else:
                token = sampling.categorical(keys[:, place], left)
            drawn.append(token)
            if not self.replacement:
                row = jnp.arange(left.shape[0], dtype=jnp.int32)
                left = left.at[row, jnp.maximum(token, 0)].set(-jnp.inf)
        return jnp.stack(drawn, axis=-1).reshape(batch, parents, factor)
