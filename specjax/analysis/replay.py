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

from specjax import sampling, trees, types, verification

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
        emitted = steps = 0
        for accepted in self.accepted:
            place = 0
            while place < len(accepted):
                place += 1 + min(int(accepted[place]), length, len(accepted) - place - 1)
                steps += 1
            emitted += len(accepted)
        return emitted / steps


def record(
    target: types.LanguageModel,
    draft_model: types.LanguageModel,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
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
    for prompt, answer in texts:
        if not len(prompt) or not len(answer):
            raise ValueError("a text needs a prompt and an answer of at least one token each")
        tokens = _padded([*prompt, *answer])
        for name, (model, temperatures) in wanted.items():
            laws = _of_own_tokens(model, tokens, asked, jnp.asarray(temperatures, jnp.float32))
            for temperature, row in zip(temperatures, np.asarray(laws), strict=True):
                last = len(prompt) + len(answer) - 1
                found[name][temperature].append(row[len(prompt) - 1 : last])
    return Record(own, found["target"], found["draft"])


def _padded(tokens: Sequence[int]) -> jax.Array:
    """A row of tokens, filled up so that texts share few programs: int32[1, T]."""
    row = np.zeros((1, -(-len(tokens) // 128) * 128), np.int32)
    row[0, : len(tokens)] = tokens
    return jnp.asarray(row)


@jax.jit
def _of_own_tokens(model, tokens, asked, temperatures):
    """log-probability of every token's successor, at each temperature: [temperatures, T]."""
    output, _ = model.apply(model.params, tokens, model.init_cache(*tokens.shape), None, ())
    size = tokens.shape[1]
    # The text before each place, as the path of a chain after nothing.
    past = types.History(
        tokens,
        jnp.zeros((1,), jnp.int32),
        jnp.broadcast_to(tokens[:, None], (1, size, size)),
        jnp.arange(1, size + 1, dtype=jnp.int32)[None],
    )
    following = jnp.roll(tokens, -1, axis=1)

    def at(temperature):
        law = sampling.warp(
            dataclasses.replace(asked, temperature=temperature), output.logits, past
        )
        return jnp.take_along_axis(law, following[:, :, None], axis=2)[0, :, 0]

    return jax.lax.map(at, temperatures)


def record_agreement(
    target: types.LanguageModel,
    drafter: types.Drafter,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
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
    asked = types.Sampling() if asked is None else asked
    accepted, length = [], 0
    for prompt, answer in texts:
        tokens = _padded([*prompt, *answer])
        counts, depth = _agreements(target, drafter, tokens, asked)
        length = int(depth)
        first, last = len(prompt), len(prompt) + len(answer)
        # Guesses beyond the text's end were never tried.
        left = last - np.arange(first, last)
        accepted.append(np.minimum(np.asarray(counts)[first:last], left))
    return Agreement(length, accepted)


@jax.jit
def _agreements(target, drafter, tokens, asked) -> tuple[Any, Any]:
    """How many drafts agree with the text from every place on: int32[T], and D."""
    size = tokens.shape[1]
    output, _ = target.apply(
        target.params, tokens, target.init_cache(*tokens.shape), None, drafter.taps
    )
    keys = jax.random.split(jax.random.key(0), 1)
    depths = []

    def at(state, place):
        """The draft of tokens place, place + 1, …; the one before is the root."""
        one = jax.tree.map(
            lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, place - 1, 1, axis=1), output
        )
        length = jnp.reshape(place, (1,))
        context = types.Context(tokens, length, length > 0, asked, target, None, keys)
        draft, _ = drafter.propose(drafter.params, state, context, keys)
        if not draft.is_deterministic:
            raise ValueError(
                f"drafter {drafter.name!r} draws its drafts; analysis.record estimates those"
            )
        depths.append(draft.tree.max_depth)
        position = place + trees.depths(draft.tree)[:, 1:] - 1
        text = jnp.take_along_axis(tokens, jnp.minimum(position, size - 1), axis=1)
        count = verification.resolve(draft, (draft.tokens == text) & (position < size))[1]
        # The root joins what the drafter has seen.
        fed = drafter.prefill(
            drafter.params, state, tokens, length - 1, jnp.ones((1,), jnp.int32), one
        )
        return fed, count[0]

    state = drafter.init(drafter.params, 1, size + drafter.nodes + 1)
    places = jnp.arange(1, size, dtype=jnp.int32)
    _, counts = jax.lax.scan(at, state, places)
    return jnp.pad(counts, (1, 0)), depths[-1]
