"""Answers a prompt with a decoding method, streams the text, and reports what it cost.

  python -m experiments.generate --method=prompt_lookup --compare --prompt="Repeat exactly: …"

With --compare the same prompt is also decoded plainly in this process, warm and in alternation, and
the two texts are held against each other. With --json the last line is one JSON object.
"""

import dataclasses
import pathlib
import statistics as medians
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags

from experiments import binary, exactness, methods, process, targets
from specjax import decoding, types, verification

_TAKES = binary.takes(
    binary.COMPARE,
    binary.DRAFT,
    binary.DRAFT_LENGTH,
    binary.MAX_NEW_TOKENS,
    binary.METHOD,
    binary.REPEATS,
    binary.RULE,
    binary.STOP,
    binary.TEMPERATURE,
)
_PROMPT = flags.DEFINE_string("prompt", None, "What the user says.")
_PROMPT_FILE = flags.DEFINE_string(
    "prompt_file", None, "A text file with what the user says; without either, a built-in one."
)
_BUILT_IN = str(pathlib.Path(__file__).parent / "prompts" / "ordinary_code.txt")
_RAW = flags.DEFINE_bool("raw", False, "Continue the prompt as it is, without the chat template.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Keep the k most probable tokens.")
_TOP_P = flags.DEFINE_float("top_p", None, "Keep the most probable tokens of this mass.")
_GREEDY_DRAFT = flags.DEFINE_bool(
    "greedy_draft", False, "Draft the most probable tokens (--method=model)."
)


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, as the flags give it."""

    model: str
    method: str
    prompt: str
    raw: bool
    max_new_tokens: int
    sampling: types.Sampling
    seed: int
    settings: methods.Settings
    rule: str | None
    compare: bool
    repeats: int

    def __post_init__(self):
        methods.check(self.method, self.settings)
        if self.rule is not None:
            verification.get(self.rule)
        if not self.prompt.strip():
            raise ValueError(
                f"the prompt is empty ({self.prompt!r}); give --prompt or --prompt_file"
            )
        # A prompt's length still comes on top, within int32.
        if not 1 <= self.max_new_tokens <= 2**30:
            raise ValueError(
                f"--max_new_tokens={self.max_new_tokens} must lie between 1 and {2**30}"
            )
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"--seed={self.seed} does not fit in 64 bits")
        if self.repeats < 1:
            raise ValueError(f"--repeats={self.repeats} must be at least 1")


def config_from_flags() -> Config:
    """Reads the flags; ValueError names the one that is wrong."""
    prompt, file = _PROMPT.value, _PROMPT_FILE.value
    if prompt is not None and file is not None:
        raise ValueError("give one of --prompt and --prompt_file")
    if prompt is None and file is None:
        file = _BUILT_IN
    if prompt is None:
        assert file is not None
        try:
            prompt = pathlib.Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompt_file={file} cannot be read: {error}") from error
    return Config(
        model=binary.MODEL.value,
        method=binary.given(binary.METHOD, "prompt_lookup"),
        prompt=prompt,
        raw=_RAW.value,
        max_new_tokens=binary.given(binary.MAX_NEW_TOKENS, 128),
        sampling=types.Sampling(binary.given(binary.TEMPERATURE, 0.0), _TOP_K.value, _TOP_P.value),
        seed=binary.SEED.value,
        settings=methods.Settings(
            binary.draft_length(auto=True),
            binary.DRAFT.value,
            _GREEDY_DRAFT.value,
            binary.STOP.value,
        ),
        rule=binary.RULE.value,
        compare=binary.COMPARE.value,
        repeats=binary.given(binary.REPEATS, 3),
    )


@dataclasses.dataclass(frozen=True)
class _Run:
    """A decoder with everything that a run needs; plain decoding is one of them."""

    decoder: methods.Decoder
    prompt: list[int]
    options: dict[str, Any]

    def start(self) -> tuple[decoding.Request, decoding.DecodeState, float]:
        """The prompt run through the models, and the seconds it took."""
        began = time.perf_counter()
        request, state = decoding.init(
            self.decoder.target, self.decoder.drafter, [self.prompt], **self.options
        )
        jax.block_until_ready(state)
        return request, state, time.perf_counter() - began

    def stream(self) -> tuple[decoding.TokenStream, float]:
        """The answer as it is accepted, after a prefill of so many seconds."""
        request, state, seconds = self.start()
        return self.decoder.stream(request, state), seconds

    def time(self) -> tuple[decoding.DecodeResult, float, float]:
        """One whole decode: the result, prefill seconds and decoding seconds."""
        request, state, prefill_seconds = self.start()
        began = time.perf_counter()
        result = self.decoder.decode(request, state)
        jax.block_until_ready(result.tokens)
        return result, prefill_seconds, time.perf_counter() - began


def run(config: Config) -> dict[str, Any]:
    """Decodes, streaming the text to standard output; returns the report."""
    binary.start()
    bundle = targets.load(config.model)
    decoder = methods.decoder(config.method, bundle, config.settings, config.rule)
    prompt = bundle.tokenizer.encode(config.prompt) if config.raw else bundle.chat(config.prompt)
    options = {
        "key": jax.random.key(config.seed),
        "max_new_tokens": config.max_new_tokens,
        "sampling": config.sampling,
    }
    asked = _Run(decoder, prompt, options)

    with binary.Progress(
        f"compiling {config.method} (prompt of {len(prompt)} tokens)"
    ) as compiling:
        next(asked.stream()[0])
        decoder.warm([prompt], options)

    stream, prefill_seconds = asked.stream()
    text = bundle.tokenizer.stream()
    began = time.perf_counter()
    first_token_seconds = age = None
    for (tokens,) in stream:
        if first_token_seconds is None:
            first_token_seconds = prefill_seconds + time.perf_counter() - began
            age = process.seconds_since_start()
        print(text.push(tokens), end="", flush=True)
    seconds = time.perf_counter() - began
    print(text.flush(), flush=True)
    report = _report(config, bundle, decoder.rule, stream.result, len(prompt))
    report |= {
        "prefill_seconds": prefill_seconds,
        "time_to_first_token": first_token_seconds,
        "start_to_first_token": age,
        "seconds": seconds,
        # The first call compiles, prefills and takes a step; the other two are known by now.
        "compile_seconds": max(compiling.seconds - (first_token_seconds or 0.0), 0.0),
    }
    if config.compare:
        report |= _compare(config, asked, report["tokens"])
    report["tokens_per_second"] = report["new_tokens"] / report["seconds"]
    return report


def _report(config, bundle, rule, result, prompt_tokens: int) -> dict[str, Any]:
    (tokens,) = result.new_tokens
    counts = result.statistics
    tested, accepted = np.asarray(counts.tested[0]), np.asarray(counts.accepted[0])
    return {
        "model": config.model,
        "method": config.method,
        "settings": dataclasses.asdict(methods.resolved(config.method, config.settings)),
        "rule": rule.name,
        "temperature": float(config.sampling.temperature),
        "seed": config.seed,
        "prompt_tokens": prompt_tokens,
        "text": bundle.tokenizer.decode(tokens),
        "tokens": tokens,
        "new_tokens": len(tokens),
        "finish_reason": result.finish_reasons[0],
        "tau": counts.tau,
        "acceptance_rate": _number(counts.acceptance_rate),
        "acceptance_by_position": [
            round(float(a / t), 4) if t else None for a, t in zip(accepted, tested, strict=True)
        ],
        "target_steps": int(counts.target_steps[0]),
        "drafted": int(counts.nodes_drafted[0]),
        "accept_histogram": np.asarray(counts.histogram[0]).tolist(),
        "device": jax.devices()[0].device_kind,
        "versions": binary.versions(),
    }


def _number(value: float) -> float | None:
    """NaN, which JSON does not know, as null."""
    return None if np.isnan(value) else value


def _compare(config: Config, asked: _Run, tokens: list[int]) -> dict[str, Any]:
    """Both methods in alternation; whether every text is `tokens`, and the rule certified."""
    target, rule = asked.decoder.target, asked.decoder.rule
    plain = dataclasses.replace(
        asked, decoder=methods.Decoder(target, decoding.NOTHING, verification.get("match"))
    )
    with binary.Progress("compiling plain decoding"):
        next(plain.stream()[0])
    own, baseline = [], []
    with binary.Progress(f"comparing, {config.repeats} runs of each in alternation"):
        for _ in range(config.repeats):
            own.append(asked.time())
            baseline.append(plain.time())
    (plain_tokens,) = baseline[-1][0].new_tokens
    seconds = medians.median(run[2] for run in own)
    plain_seconds = medians.median(run[2] for run in baseline)
    prefill, plain_prefill = (medians.median(run[1] for run in runs) for runs in (own, baseline))
    same_path = exactness.is_pathwise(rule, float(config.sampling.temperature))
    divergence = None
    if same_path:
        texts = [run[0].new_tokens[0] for run in (*baseline, *own)]
        divergence = exactness.parting(target, asked.prompt, tokens, texts)
    return {
        "seconds": seconds,
        "prefill_seconds": prefill,
        "plain_seconds": plain_seconds,
        "plain_prefill_seconds": plain_prefill,
        "plain_new_tokens": len(plain_tokens),
        "plain_tokens_per_second": len(plain_tokens) / plain_seconds,
        "speedup": (len(tokens) / seconds) / (len(plain_tokens) / plain_seconds),
        "speedup_with_prefill": (len(tokens) / (seconds + prefill))
        / (len(plain_tokens) / (plain_seconds + plain_prefill)),
        "seconds_spread": [min(run[2] for run in own), max(run[2] for run in own)],
        "plain_seconds_spread": [min(run[2] for run in baseline), max(run[2] for run in baseline)],
        "identical": divergence is None if same_path else None,
        "first_divergence": divergence,
        "certified": exactness.certified(rule, min(asked.decoder.drafter.nodes, 3)),
    }


def _table(report: dict[str, Any]) -> str:
    def show(value, form="{:.2f}"):
        return "–" if value is None else form.format(value)

    positions = " ".join(show(rate) for rate in report["acceptance_by_position"])
    rows = [
        ("method, rule", f"{report['method']}, {report['rule']}"),
        (
            "prompt, new tokens",
            f"{report['prompt_tokens']}, {report['new_tokens']} ({report['finish_reason']})",
        ),
        ("compile", f"{report['compile_seconds']:.2f} s"),
        ("prefill", f"{report['prefill_seconds']:.3f} s"),
        ("first token of the streamed run", show(report["time_to_first_token"], "{:.3f} s")),
        ("  since the process began", show(report["start_to_first_token"], "{:.1f} s")),
        ("decoding", f"{report['seconds']:.2f} s, {report['tokens_per_second']:.1f} tokens/s"),
        ("tokens a target step (τ)", f"{report['tau']:.2f} in {report['target_steps']} steps"),
        ("acceptance rate", show(report["acceptance_rate"])),
        ("  by position", positions or "–"),
    ]
    if "speedup" in report:
        identical = {True: "yes", False: "NO", None: "not claimed: equal in law"}[
            report["identical"]
        ]
        rows += [
            (
                "plain decoding",
                f"{report['plain_seconds']:.2f} s, "
                f"{report['plain_tokens_per_second']:.1f} tokens/s",
            ),
            (
                "speedup",
                f"{report['speedup']:.2f}× ({report['speedup_with_prefill']:.2f}× with prefill)",
            ),
            ("identical to plain", identical),
            ("rule certified exact", "yes" if report["certified"] else "NO"),
        ]
        if report["first_divergence"]:
            gap = report["first_divergence"]
            rows.append(
                (
                    "first divergence",
                    f"token {gap['position']}, logit gap {show(gap['logit_gap'], '{:.2g}')}",
                )
            )
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def main(argv: list[str]) -> None:
    """Runs what the flags ask for; bad input ends in one line and exit code 2."""
    binary.report(argv, lambda: run(config_from_flags()), _table, _TAKES)


if __name__ == "__main__":
    app.run(main, flags_parser=binary.parse_flags)
