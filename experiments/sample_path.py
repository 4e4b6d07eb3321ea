"""Shows that one request key gives one text, whatever drafts it: sample-path losslessness.

    python -m experiments.sample_path --prompts=questions.jsonl

decodes every prompt plainly and alone, then with each drafter, in batches, every prompt under the
key it had alone, and counts the texts that are the same to the last token. The rules are those
whose noise is keyed by position, `match` and `coupled`; at a temperature above 0 nothing but the
noise makes the texts equal. The exit code is 1 if one differs.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import app

import specjax
from experiments import binary, prompt_files, targets
from specjax import analysis, checkpoints, drafters, models, types

_TAKES = binary.takes(
    binary.BATCH,
    binary.COUNT,
    binary.LONGEST,
    binary.MAX_NEW_TOKENS,
    binary.PROMPTS,
    binary.TEMPERATURE,
)

_CHUNK = 64
_MOST = 20


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, as the flags give it."""

    model: str
    prompts: tuple[str, ...]
    count: int | None
    longest_prompt: int
    max_new_tokens: int
    temperature: float
    batch: int
    seed: int

    def __post_init__(self):
        for name in ("count", "longest_prompt", "max_new_tokens", "batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least 1")
        types.Sampling(self.temperature)


def choose(bundle: checkpoints.Bundle, config: Config) -> list[list[int]]:
    """`count` prompts as tokens, evenly spread over those that are short enough."""
    chat = [bundle.chat(prompt.asked()) for prompt in prompt_files.read(*config.prompts)]
    short = [tokens for tokens in chat if len(tokens) <= config.longest_prompt]
    if not short:
        raise ValueError(
            f"none of {len(chat)} prompts has at most --longest_prompt={config.longest_prompt} "
            "tokens"
        )
    if config.count is not None and config.count > len(short):
        raise ValueError(
            f"--count={config.count}: {len(short)} of {len(chat)} prompts have at most "
            f"--longest_prompt={config.longest_prompt} tokens"
        )
    return prompt_files.spread(short, config.count or _MOST)


def random_draft(target: types.LanguageModel) -> types.LanguageModel:
    """A small transformer that has learned nothing, over the target's vocabulary."""
    config = models.TransformerConfig(
        vocab_size=target.vocab_size,
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_size=16,
        intermediate_size=64,
        context_length=target.context_length or 1 << 20,
    )
    return models.language_model(config, models.init_params(config, jax.random.key(7)))


def contenders(bundle: checkpoints.Bundle) -> dict[str, tuple[types.Drafter, str]]:
    """Drafters and rules by what the table calls them."""
    half = checkpoints.layer_truncated(bundle, 12)
    strange = random_draft(bundle.target)
    lookup = drafters.prompt_lookup(8)
    chain, tree = drafters.model(half, 4), drafters.tree(half, (2, 2, 1))
    return {
        "prompt lookup, K=8": (lookup, "match"),
        "prompt lookup, K=3": (drafters.prompt_lookup(3), "match"),
        "first 12 layers, chain of 4": (chain, "match"),
        "first 12 layers, coupled chain of 4": (drafters.model(half, 4, coupled=True), "coupled"),
        "first 12 layers, coupled chain of 2": (drafters.model(half, 2, coupled=True), "coupled"),
        "first 12 layers, tree 2·2·1": (tree, "match"),
        "union of these three": (
            drafters.union(lookup, chain, drafters.tree(half, (2, 1), replacement=True)),
            "match",
        ),
        "random weights, chain of 4": (drafters.model(strange, 4), "match"),
        "random weights, coupled chain of 4": (drafters.model(strange, 4, coupled=True), "coupled"),
        "random weights, tree 3·1": (drafters.tree(strange, (3, 1)), "match"),
    }


def run(config: Config) -> dict[str, Any]:
    """The report, ready for JSON."""
    binary.start()
    bundle = targets.load(config.model)
    prompts = choose(bundle, config)
    keys = jax.random.split(jax.random.key(config.seed), len(prompts))
    options = {
        "max_new_tokens": config.max_new_tokens,
        "sampling": types.Sampling(config.temperature),
        # One capacity and one width of chunks, so that prompts of every length share a program.
        "capacity": max(map(len, prompts)) + config.max_new_tokens,
        "chunk": _CHUNK,
    }
    with binary.Progress(f"plain decoding, {len(prompts)} prompts one by one") as progress:
        plain = []
        for row, prompt in enumerate(prompts):
            result = specjax.autoregressive(
                bundle.target, [prompt], keys=keys[jnp.asarray([row])], **options
            )
            plain += result.new_tokens
            progress.at(row + 1, len(prompts))
    rows = []
    for name, (drafter, rule) in contenders(bundle).items():
        with binary.Progress(f"{name}, by {rule}") as progress:
            texts, tau = _decode(
                bundle, drafter, rule, prompts, keys, config.batch, options, progress
            )
        divergences = [
            analysis.first_divergence(bundle.target, prompt, wanted, found)
            for prompt, wanted, found in zip(prompts, plain, texts, strict=True)
        ]
        first = next((found for found in divergences if found is not None), None)
        rows.append(
            {
                "drafter": name,
                "rule": rule,
                "prompts": len(prompts),
                "identical": sum(found is None for found in divergences),
                "tau": tau,
                "seconds": progress.seconds,
                "first_divergence": first and dataclasses.asdict(first),
            }
        )
    return {
        "model": config.model,
        "temperature": config.temperature,
        "batch": config.batch,
        "prompts": len(prompts),
        "new_tokens": sum(map(len, plain)),
        "versions": binary.versions(),
        "rows": rows,
        "passed": all(row["identical"] == row["prompts"] for row in rows),
    }


def _decode(
    bundle,
    drafter,
    rule,
    prompts: Sequence,
    keys: jax.Array,
    size: int,
    options: dict,
    progress: binary.Progress,
) -> tuple[list[list[int]], float]:
    """The texts and tokens a target step; prompts in the reverse order of plain's."""
    texts, new, steps = [], 0, 0
    order = list(reversed(range(len(prompts))))
    for first in range(0, len(order), size):
        # The last batch starts over with the first prompts, so that all have one size.
        batch = [order[(first + row) % len(order)] for row in range(size)]
        result = specjax.generate(
            bundle.target,
            drafter,
            [prompts[index] for index in batch],
            keys=keys[jnp.asarray(batch)],
            rule=rule,
            **options,
        )
        texts += result.new_tokens[: len(order) - first]
        new += sum(map(len, result.new_tokens))
        steps += int(jnp.sum(result.statistics.target_steps))
        progress.at(min(first + size, len(order)), len(order))
    return texts[::-1], new / max(steps, 1)


def table(report: dict[str, Any]) -> str:
    """A line for every drafter."""
    width = max(len(row["drafter"]) for row in report["rows"])
    lines = [
        f"{report['prompts']} prompts, {report['new_tokens']} tokens, temperature "
        f"{report['temperature']}; drafters in batches of {report['batch']}, plain decoding alone",
        f"{'drafter':<{width}}  {'rule':<8}{'identical':>12}{'τ':>7}",
    ]
    for row in report["rows"]:
        identical = f"{row['identical']} of {row['prompts']}"
        verdict = "" if row["identical"] == row["prompts"] else "  NOT ALL"
        lines.append(
            f"{row['drafter']:<{width}}  {row['rule']:<8}{identical:>12}{row['tau']:>7.2f}{verdict}"
        )
    return "\n".join(lines)


def config_from_flags() -> Config:
    """Reads the flags; ValueError names the one that is wrong."""
    return Config(
        model=binary.MODEL.value,
        prompts=tuple(binary.PROMPTS.value),
        count=binary.COUNT.value,
        longest_prompt=binary.given(binary.LONGEST, 256),
        max_new_tokens=binary.given(binary.MAX_NEW_TOKENS, 64),
        temperature=binary.given(binary.TEMPERATURE, 0.8),
        batch=binary.given(binary.BATCH, 4),
        seed=binary.SEED.value,
    )


def main(argv: list[str]) -> None:
    """Runs what the flags ask for; exit code 1 where a text differs, 2 for bad input."""
    binary.report(argv, lambda: run(config_from_flags()), table, _TAKES)


if __name__ == "__main__":
    app.run(main, flags_parser=binary.parse_flags)
