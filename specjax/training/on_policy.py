"""Batches of what the draft writes itself, judged by the target.

A draft that was only ever shown the target's text does not know where its own drafts lead;
on-policy distillation (Agarwal et al. 2024, arXiv 2306.13649; DistillSpec, Zhou et al. 2023, arXiv
2310.08461, section 4) trains it there. The draft answers prompts, one pass of the target gives its
laws of those answers, and what follows is as with recorded text.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import checkpoints, decoding, types
from specjax.models import policy as policies
from specjax.models import products, transformer
from specjax.training import batches, distillation, fitting, shapes

__all__ = ["OnPolicy", "check_share", "judge"]

# Answer places whose whole laws are held at a time, for their normalizers.
_CHUNK = 256
# What the width of a text is a multiple of.
_WIDTH = 128
# Of keys: others of the same seed are the objective's and those of recorded text.
_STREAM = 0x5EED0002
_EVERY = fitting.SAVE_EVERY // 2


def check_share(share: float, every: int = _EVERY) -> None:
    """Raises ValueError for a share outside 0…1, or so small that no step of a block has it."""
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} of the steps must lie between 0 and 1")
    if share and not round(share * every):
        raise ValueError(f"share={share} of {every} steps is none; ask for 1/{every} or more")


class OnPolicy:
    """Batches that are a mixture of recorded text and the draft's own.

    In blocks of `every` steps: at a block's first the draft, as it then is, answers as many prompts
    as the block needs. A run that saves at multiples of `every` resumes to the bit.

    Args:
      bundle: the target.
      objective: knows the draft's configuration.
      frozen: the target's part of the draft.
      recorded: batches of recorded text, which give the other steps, and the prompts.
      share: of the steps, how many are the draft's own text.
      every: steps between one draft and the next that writes.
      temperature: at which it writes.
      seed: of what it writes.

    Raises:
      ValueError: as `check_share`.
    """

    def __init__(
        self,
        bundle: checkpoints.Bundle,
        objective: distillation.Distillation,
        frozen: Any,
        recorded: batches.Batches,
        *,
        share: float = 0.5,
        every: int = _EVERY,
        temperature: float = 1.0,
        seed: int = 0,
    ):
        self._bundle, self._objective, self._frozen = bundle, objective, frozen
        # Many tokens at once, as in training; most of the time goes here.
        self._judging = transformer.language_model(
            bundle.config, bundle.target.params, policies.for_training()
        )
        self._recorded, self._share = recorded, share
        self._every = types.whole("every", every, 1)
        check_share(share, every)
        self._temperature = temperature
        self._key = jax.random.fold_in(jax.random.key(seed), _STREAM)
        self._block: tuple[int, dict[int, batches.Batch]] = (-1, {})

    def __call__(self, step: int, params: Any) -> batches.Batch:
        """The batch of a step."""
        block, place = divmod(step, self._every)
        if self._block[0] != block:
            own = range(int(round(self._share * self._every)))
            self._block = (
                block,
                {index: self._write(block * self._every + index, params) for index in own},
            )
        return self._block[1].get(place) or self._recorded(step)

    def _write(self, step: int, params: Any) -> batches.Batch:
        """The draft's own answers to the prompts of the batch that this step would have had."""
        given = self._recorded(step)
        draft = shapes.draft_model(self._objective.config, params, self._frozen)
        prompts = [
            tokens[:start].tolist() for tokens, start in zip(given.tokens, given.start, strict=True)
        ]
        answers = given.normalizer.shape[1]
        # Of few sizes, since each is a program.
        capacity = -(-(given.tokens.shape[1] + answers) // _WIDTH) * _WIDTH
        result = decoding.autoregressive(
            draft,
            prompts,
            key=jax.random.fold_in(self._key, step),
            max_new_tokens=answers,
            sampling=types.Sampling(self._temperature),
            eos=list(self._bundle.target.eos_ids),
            capacity=capacity,
            chunk=_WIDTH // 2,
        )
        width = max(given.tokens.shape[1], max(map(len, prompts)) + answers)
        width = -(-width // _WIDTH) * _WIDTH
        tokens = np.asarray(result.tokens)[:, :width]
        tokens = np.pad(tokens, ((0, 0), (0, width - tokens.shape[1])))
        start, length = np.asarray(result.start), np.asarray(result.length)
        policy = policies.for_training()
        return judge(self._judging, tokens, start, length - start, answers, policy)


def judge(
    target: types.LanguageModel,
    tokens: np.ndarray,
    start: np.ndarray,
    length: np.ndarray,
    answers: int,
    policy: policies.Policy,
) -> batches.Batch:
    """The target's laws of texts that something else wrote, rounded as its policy rounds.

    Args:
      target: a transformer.
      tokens: int32[B, T].
      start, length: int32[B], where the answers begin, and their lengths.
      answers: A, the longest answer's length.
      policy: the target's.
    """
    features, normalizer = _judge(target, tokens, start, answers, policy)
    return batches.Batch(
        tokens=tokens,
        start=start,
        length=length,
        temperature=np.full(len(start), np.nan, np.float32),
        features=features,
        normalizer=normalizer,
    )


@functools.partial(jax.jit, static_argnames=("answers", "policy"))
def _judge(target, tokens, start, answers: int, policy: policies.Policy):
    rows = tokens.shape[0]
    cache = target.init_cache(rows, 1)
    output, _ = target.apply(target.params, tokens, cache, None, (target.num_layers,))
    hidden = batches.before_answers(output.features[:, :, 0], start, answers)
    head = transformer.head_kernel(target.params)
    flat = hidden.reshape(-1, hidden.shape[-1])
    padded = jnp.pad(flat, ((0, -flat.shape[0] % _CHUNK), (0, 0)))

    def normalize(some):
        (logits,) = products.products(some[None], [head], policy, jnp.float32)
        return jax.nn.logsumexp(logits[0], axis=-1)

    # In parts: all places' logits at once would be the largest array of all.
    found = jax.lax.map(normalize, padded.reshape(-1, _CHUNK, flat.shape[1]))
    normalizer = found.reshape(-1)[: flat.shape[0]].reshape(rows, answers)
    return hidden.astype(jnp.float16), normalizer
