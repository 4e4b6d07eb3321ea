"""A pass is as wide as the longest draft of a row needs, and no wider."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import decoding, drafters, models
from tests.cases import exhaustive

CONFIG = models.TransformerConfig(7, 16, 32, 2, 2, 1, 8, 512)
TARGET = models.language_model(CONFIG, models.init_params(CONFIG, jax.random.key(0), 2.0))
PROMPTS = [[1], [4]]
LENGTH = 5


@dataclasses.dataclass(frozen=True)
class _Cut:
    """Leaves out what a row drafts beyond its count."""

    propose: object
    counts: tuple[int, ...]

    def __call__(self, params, state, context, keys):
        draft, state = self.propose(params, state, context, keys)  # type: ignore
        kept = jnp.arange(LENGTH)[None] < np.asarray(self.counts)[:, None]
        return dataclasses.replace(draft, present=draft.present & kept), state


@dataclasses.dataclass(frozen=True)
class _Wrong:
    """Turns the logits of passes of these widths around."""

    apply: object
    widths: tuple[int, ...]

    def __call__(self, params, tokens, *given):
        output, entries = self.apply(params, tokens, *given)  # type: ignore
        sign = -1.0 if tokens.shape[1] in self.widths else 1.0
        return dataclasses.replace(output, logits=sign * output.logits), entries


def texts(counts, wrong=()):
    """Three steps, after which no row has come to its end, and what was drafted in each."""
    # The target drafts for itself, so that all that is drafted is taken.
    base = drafters.model(TARGET, LENGTH, greedy=True)
    drafter = dataclasses.replace(base, propose=_Cut(base.propose, counts))
    target = dataclasses.replace(TARGET, apply=_Wrong(TARGET.apply, wrong))
    stream = decoding.stream(target, drafter, PROMPTS, max_new_tokens=24, eos=(), steps=3)
    return next(stream), np.asarray(stream.result.statistics.nodes_drafted) / 3


@pytest.mark.parametrize(
    "counts, width",
    [
        ((0, 0), 1),
        ((1, 0), 3),
        exhaustive((2, 2), 3),
        ((0, 3), 6),
        exhaustive((5, 1), 6),
    ],
)
def test_only_the_least_width_is_used(counts, width):
    plain = decoding.autoregressive(TARGET, PROMPTS, max_new_tokens=24, eos=()).new_tokens
    wanted = [text[: 3 * (count + 1)] for text, count in zip(plain, counts, strict=True)]
    assert decoding.pass_widths(LENGTH) == (1, 3, 6)
    made, drafted = texts(counts, wrong=tuple({1, 3, 6} - {width}))
    assert made == wanted and tuple(drafted) == counts
    assert texts(counts, wrong=(width,))[0] != wanted


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5, 8, 64])
def test_widths_rise_to_the_whole_chain(nodes):
    widths = decoding.pass_widths(nodes)
    assert widths[0] == 1 and widths[-1] == nodes + 1 and sorted(set(widths)) == list(widths)
