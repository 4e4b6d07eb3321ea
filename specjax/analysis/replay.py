"""Counterfactual replay: what acceptance would have been, from a record of the target's text.

A record holds what both models gave to the tokens of text that the target wrote (sampled drafts),
or how far a drafter's guesses agreed with it from every place (deterministic drafts). From it other
draft lengths, rules and temperatures of the draft are answered without the models. For another
temperature of the target the text is the wrong one; importance weights mend that, at the price of
variance. What a record cannot answer is refused, with the reason.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import decoding, sampling, types, verification
from specjax.analysis import counts, forcing, scoring

__all__ = ["Agreement", "Estimate", "Record", "record", "record_agreement"]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """An estimated mean.

    Attributes:
      mean: of the texts' means.
      standard_error: from the spread between texts, which are independent; NaN for a single one.
      effective_texts: how many texts the importance weights leave; all of them without weights.
    """

    mean: float
    standard_error: float
    effective_texts: float


@dataclasses.dataclass(frozen=True)
class Record:
    """What two models gave to the tokens of the target's text; natural logs.

    Attributes:
      temperature: at which the text was drawn.
      target: by temperature of the target, one array [T] a text.
      draft: by temperature of the draft, the same.
    """

    temperature: float
    target: dict[float, list[np.ndarray]]
    draft: dict[float, list[np.ndarray]]

    def expected_accepted(
        self,
        rule: str,
        length: int,
        *,
        draft_temperature: float | None = None,
        target_temperature: float | None = None,
    ) -> Estimate:
        """The mean number of accepted drafts of `length`, from every place of the texts.

        Every place that has `length` tokens after it counts. Texts of a length fixed beforehand
        are estimated without bias; those that ended by themselves lose their last places, which
        may be unlike the others.

        Args:
          rule: `token` or `block`.
          length: K.
          draft_temperature: one of those recorded; by default that of the target.
          target_temperature: by default that of the text; another one by importance weights over
            the whole text up to the draft's end.

        Raises:
          ValueError: the record cannot answer this; the message says why.
        """
        if target_temperature is None:
            target_temperature = self.temperature
        if draft_temperature is None:
            draft_temperature = target_temperature
        target_temperature, draft_temperature = map(
            _in_single_precision, (target_temperature, draft_temperature)
        )
        for name, asked, held in (
            ("target", target_temperature, self.target),
            ("draft", draft_temperature, self.draft),
        ):
            if asked not in held:
                raise ValueError(
                    f"{name}_temperature={asked} was not recorded; recorded are "
                    f"{sorted(held)}: a text's tokens do not tell the rest of the law"
                )
        if length < 1:
            raise ValueError(f"length={length} must be at least 1")
        weighted = target_temperature != self.temperature
        sums, weights = [], []
        for own, log_p, log_q in zip(
            self.target[self.temperature],
            self.target[target_temperature],
            self.draft[draft_temperature],
            strict=True,
        ):
            if len(log_p) < length:
                continue
            shares = np.asarray(
                verification.survival(
                    rule, jnp.asarray(log_p[None]), jnp.asarray(log_q[None]), length
                )
            )[0]
            log_weight = np.cumsum(log_p - own) if weighted else np.zeros(len(log_p))
            # Acceptance of i drafts hangs on the text up to the i-th.
            place = np.arange(len(shares))[:, None] + np.arange(length)[None]
            weight = np.exp(log_weight[place])
            sums.append(np.mean(np.sum(shares * weight, axis=1)))
            weights.append(np.mean(weight))
        if not sums:
            raise ValueError(f"no text is as long as length={length}")
        return _estimate(np.asarray(sums), np.asarray(weights) if weighted else None)


def _in_single_precision(temperature: Any) -> float:
    """The shortest decimal number that float32 takes for the same: `Sampling` holds no other."""
    return float(str(np.float32(temperature)))


def _estimate(values: np.ndarray, weights: np.ndarray | None) -> Estimate:
    count = len(values)
    error = float(np.std(values, ddof=1) / np.sqrt(count)) if count > 1 else float("nan")
    effective = count if weights is None else float(weights.sum() ** 2 / np.sum(weights**2))
    return Estimate(float(np.mean(values)), error, effective)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How many of a deterministic drafter's guesses were right from every place of the text.

    Attributes:
      length: the depth D that was recorded.
      accepted: one array [T] a text; place t is the draft of tokens t, t + 1, ….
    """

    length: int
    accepted: list[np.ndarray]

    def tau(self, length: int | None = None) -> float:
        """Tokens a target step of decoding these texts with drafts of `length`: exact.

        Raises:
          ValueError: more than was recorded.
        """
        length = self.length if length is None else length
        if not 0 <= length <= self.length:
            raise ValueError(
                f"length={length} cannot be told from drafts of {self.length}; record longer ones"
            )
        steps = sum(
            counts.begins(accepted[:, None] > np.arange(length)[None]).sum()
            for accepted in self.accepted
        )
        return sum(map(len, self.accepted)) / float(steps)


def record(
    target: types.LanguageModel,
    draft_model: types.LanguageModel,
    texts: Sequence[forcing.Text],
    asked: types.Sampling,
    *,
    target_temperatures: Sequence[float] = (),
    draft_temperatures: Sequence[float] = (),
) -> Record:
    """Runs both models over texts that the target wrote, once.

    Args:
      target, draft_model: share a vocabulary.
      texts: pairs of prompt and answer, token ids; the answers were drawn by `asked`.
      asked: scalars; its other options hold for every temperature.
      target_temperatures, draft_temperatures: to be answered besides the text's own; above 0.

    Raises:
      ValueError: a text at temperature 0, from which no ratio can be estimated.
    """
    own = _in_single_precision(asked.temperature)
    for name, given in (
        ("temperature", [own]),
        ("target_temperatures", target_temperatures),
        ("draft_temperatures", draft_temperatures),
    ):
        if min(given, default=1.0) <= 0:
            raise ValueError(
                f"{name}={list(given)}: at temperature 0 laws are one-hot; record_agreement tells "
                "how far guesses agree"
            )
    wanted = {
        "target": (target, sorted({own, *map(_in_single_precision, target_temperatures)})),
        "draft": (draft_model, sorted({own, *map(_in_single_precision, draft_temperatures)})),
    }
    found: dict[str, dict[float, list[np.ndarray]]] = {
        name: {temperature: [] for temperature in temperatures}
        for name, (_, temperatures) in wanted.items()
    }
    for text in texts:
        for name, (model, temperatures) in wanted.items():
            wished = jnp.asarray(temperatures, jnp.float32)
            rows = forcing.forced(_of_own_token, wished, model, decoding.NOTHING, text, asked)
            for temperature, row in zip(temperatures, rows.T, strict=True):
                found[name][temperature].append(row)
    return Record(own, found["target"], found["draft"])


def _of_own_token(temperatures, drafter, state, place) -> jax.Array:
    """log-probability of the text's token at each temperature."""
    del drafter, state

    def at(temperature):
        asked = dataclasses.replace(place.context.sampling, temperature=temperature)
        return sampling.warp(asked, place.logits, place.past)[0, 0, place.token]

    return jax.lax.map(at, temperatures)


def record_agreement(
    target: types.LanguageModel,
    drafter: types.Drafter,
    texts: Sequence[forcing.Text],
    asked: types.Sampling | None = None,
) -> Agreement:
    """Lets a deterministic drafter guess from every place of texts that the target wrote.

    Args:
      target: whose outputs the drafter reads.
      drafter: drafts nothing at random.
      texts: pairs of prompt and answer, token ids.
      asked: the sampling that a drafter may read; default greedy.

    Raises:
      ValueError: a drafter that draws, whose guesses another key would change.
    """
    form = jax.eval_shape(decoding.first_draft, target, drafter)
    if not form.is_deterministic:
        raise ValueError(
            f"drafter {drafter.name!r} draws its drafts; analysis.record estimates those"
        )
    return Agreement(form.tree.max_depth, scoring.score(target, drafter, texts, asked).accepted)
