"""Acceptance without generating: a drafter held against text that the target has already written.

Target and drafter go through the text together, teacher-forced: at every place the drafter proposes
what it would propose there, and is then told what the text says. `counts` makes of it what decoding
the text would have taken.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from specjax import decoding, sampling, trees, types, verification
from specjax.analysis import counts, forcing
from specjax.verification import kernel

__all__ = ["Scores", "score"]


@dataclasses.dataclass(frozen=True)
class Scores:
    """A drafter beside the target at every place of texts; lists of one array [T] a text.

    Place t is where the answer's token t comes next; q is the law of the draft's first node there,
    one-hot where that is deterministic, and p the target's, both as the text's sampling warps them.
    Exact for every drafter whose state follows from the text, and not from what it drafted before;
    NaN where nothing was drafted.

    Attributes:
      overlap: float32, Σ min(p, q): the probability that `token` accepts the first draft, as every
        rule does a deterministic one; at temperature 0, whether both models agree.
      entropy_p, entropy_q: float32, in nats; where the temperature is 0, of the laws at
        temperature 1, since one-hot laws have none. 0 for a deterministic draft.
      log_p, log_q: float32, natural-log probability of the text's token.
      accepted: int32, levels of the draft that agree with the text, through its end; of one draw
        where drafts are drawn at random.
      refused: bool, whether a draft behind these was tried and did not agree.
      form: of the drafts: shapes, and what is static.
      temperature: of the texts.
    """

    overlap: list[np.ndarray]
    entropy_p: list[np.ndarray]
    entropy_q: list[np.ndarray]
    log_p: list[np.ndarray]
    log_q: list[np.ndarray]
    accepted: list[np.ndarray]
    refused: list[np.ndarray]
    form: types.Draft
    temperature: float

    def counts(self, length: int | None = None, rule: str | None = None) -> counts.Counts:
        """What decoding these texts takes with drafts of `length`.

        Deterministic drafts, and all drafts at temperature 0, are counted by their agreement with
        the text: what `generate` counts where it writes this text, under `match` or at temperature
        0. That tells lengths up to the drafts' depth.

        Otherwise drafts are counted from their laws, in the mean over all that could be drawn: what
        `generate` counts in the mean over decodes that write this text. That tells any length, so
        that drafts of one token are enough to score with; but it takes a chain whose law and
        presence follow from the text before each place alone, as a draft model's do.

        Either is exact given the texts; what is left is the spread between them, of which the
        intervals tell.

        Args:
          length: K; by default the depth of the drafts.
          rule: for drafts drawn at random `token`, `block` or `match`; by default what `generate`
            takes. At temperature 0 all accept the same.

        Raises:
          RefusedDraftError: the rule cannot take the drafts.
          ValueError: these drafts do not tell; the message says why.
        """
        depth = self.form.tree.max_depth
        length = types.whole("length", depth if length is None else length, 1)
        chosen = verification.default_rule(self.form) if rule is None else verification.get(rule)
        if rule is not None:
            verification.check(chosen, self.form)
        is_fixed = self.form.is_deterministic or self.temperature == 0
        if is_fixed and length <= depth:
            rows = [
                counts.by_agreement(accepted, refused, length)
                for accepted, refused in zip(self.accepted, self.refused, strict=True)
            ]
        elif self.form.is_deterministic:
            raise ValueError(
                f"length={length} cannot be told from drafts of {depth}; score with longer ones"
            )
        elif not self.form.tree.is_chain or self.form.siblings == "coupled":
            raise ValueError(
                f"length={length}: drafts in a tree, or coupled to the target, are counted at "
                f"temperature 0 and to their depth of {depth}; the overlap holds for all"
            )
        else:
            name = "match" if self.temperature == 0 else chosen.name
            rows = [
                counts.by_laws(name, log_p, log_q, length)
                for log_p, log_q in zip(self.log_p, self.log_q, strict=True)
            ]
        tokens = np.asarray([len(log_p) for log_p in self.log_p])
        return counts.Counts(tokens, *map(np.asarray, zip(*rows, strict=True)))


def score(
    target: types.LanguageModel,
    drafter: types.Drafter,
    texts: Sequence[forcing.Text],
    asked: types.Sampling | None = None,
    *,
    chunk: int = forcing.CHUNK,
) -> Scores:
    """Leads target and drafter through texts that the target wrote.

    The target takes `chunk` tokens a pass; the drafter drafts afresh at every place.

    Args:
      target: the model.
      drafter: what proposes.
      texts: pairs of prompt and answer, token ids.
      asked: by which the answers were drawn, scalars; default greedy.
      chunk: tokens a pass, which changes nothing but time and memory.

    Raises:
      ValueError: a drafter that drafts nothing, no texts, an empty prompt or answer, or a text
        beyond the target's context.
    """
    form = jax.eval_shape(decoding.first_draft, target, drafter)
    if not form.tree.size:
        raise ValueError(f"drafter {drafter.name!r} drafts nothing that could be scored")
    if not texts:
        raise ValueError("there are no texts to score")
    asked = types.Sampling() if asked is None else asked
    found = [
        forcing.forced(_measure, (), target, drafter, text, asked, chunk=chunk) for text in texts
    ]
    columns = {name: [row[name] for row in found] for name in found[0]}
    return Scores(**columns, form=form, temperature=float(asked.temperature))


def _measure(given, drafter, state, place) -> dict[str, jax.Array]:
    """The arrays of `Scores` at one place."""
    del given
    context = place.context

    def target_law(asked):
        return sampling.warp(asked, place.logits, place.past)[0, 0]

    def propose(asked):
        asking = dataclasses.replace(context, sampling=asked)
        draft, _ = drafter.propose(drafter.params, state, asking, context.keys)
        return draft, kernel.draft_law(draft, jnp.ones((1,), jnp.int32))[0]

    log_p, (draft, log_q) = target_law(context.sampling), propose(context.sampling)
    temperature = context.sampling.temperature
    softer = dataclasses.replace(
        context.sampling, temperature=jnp.where(temperature > 0, temperature, 1.0)
    )
    is_greedy = jnp.all(temperature == 0)

    def entropy(law, of_softer):
        return jax.lax.cond(is_greedy, lambda: _entropy(of_softer()), lambda: _entropy(law))

    entropy_p = entropy(log_p, lambda: target_law(softer))
    entropy_q = jnp.zeros_like(entropy_p)
    if not draft.is_deterministic:
        entropy_q = entropy(log_q, lambda: propose(softer)[1])

    position = context.length[0] + trees.depths(draft.tree)[:, 1:] - 1
    text = context.tokens[0, jnp.minimum(position, context.tokens.shape[1] - 1)]
    agrees = (draft.tokens == text) & (position < place.end)
    _, accepted, stop = verification.resolve(draft, agrees)
    # What is drafted beyond the text was never tried.
    is_last = context.length + accepted == place.end
    refused = jnp.any(verification.children(draft, stop), axis=1) & ~is_last

    def if_drafted(value):
        return jnp.where(draft.present[0, 0], value, jnp.nan).astype(jnp.float32)

    return {
        "overlap": if_drafted(jnp.sum(jnp.exp(jnp.minimum(log_p, log_q)))),
        "entropy_p": entropy_p.astype(jnp.float32),
        "entropy_q": if_drafted(entropy_q),
        "log_p": log_p[place.token].astype(jnp.float32),
        "log_q": if_drafted(log_q[place.token]),
        "accepted": accepted[0],
        "refused": refused[0],
    }


def _entropy(log_law: jax.Array) -> jax.Array:
    """Of a law [V], natural logs; in nats."""
    law = jnp.exp(log_law)
    return -jnp.sum(jnp.where(law > 0, law * log_law, 0.0))
