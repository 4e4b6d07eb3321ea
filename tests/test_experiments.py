"""The binaries: what they report holds together, and bad input ends in one line and code 2."""

import dataclasses
import json
import logging
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest
from absl.testing import flagsaver

import specjax
from experiments import binary, generate, methods, targets
from specjax import analysis, checkpoints, verification

ROOT = pathlib.Path(__file__).parents[1]
COPY = "Repeat exactly: red green blue red green blue red green"
HELLO = "--prompt=Hello"
KEYS = {
    "text",
    "tokens",
    "new_tokens",
    "prefill_seconds",
    "time_to_first_token",
    "start_to_first_token",
    "seconds",
    "tokens_per_second",
    "tau",
    "acceptance_rate",
    "target_steps",
    "accept_histogram",
    "finish_reason",
    "rule",
}
COMPARED = {
    "plain_seconds",
    "plain_tokens_per_second",
    "speedup",
    "identical",
    "first_divergence",
    "certified",
}


@pytest.fixture
def call(monkeypatch, smollm2, capsys):
    """Runs the binary in this process, with a model that is already loaded."""
    load = specjax.load
    known = {"smollm2-135m": smollm2}
    monkeypatch.setattr(specjax, "load", lambda name, *dtype: known.get(name) or load(name, *dtype))
    jax_logger = logging.getLogger("jax")
    before = jax_logger.level

    def run(*arguments):
        with flagsaver.flagsaver():
            code = 0
            try:
                generate.main(binary.parse_flags(["generate", *arguments]))
            except SystemExit as end:
                code = end.code
        return (code, *capsys.readouterr())

    yield run
    jax_logger.setLevel(before)


def refuse(constant):
    raise ValueError(f"{constant} is not JSON")


def last_line(output):
    return json.loads(output.splitlines()[-1], parse_constant=refuse)


def check_report(report, tokenizer, compared=True):
    assert report.keys() >= (KEYS | COMPARED if compared else KEYS)
    assert report["new_tokens"] == len(report["tokens"])
    assert report["tau"] == pytest.approx(report["new_tokens"] / report["target_steps"], rel=1e-6)
    histogram = report["accept_histogram"]
    assert sum(histogram) == report["target_steps"]
    accepted = sum(count * steps for count, steps in enumerate(histogram))
    assert report["target_steps"] <= report["new_tokens"] <= accepted + report["target_steps"]
    assert accepted <= report["drafted"]
    assert report["text"] == tokenizer.decode(report["tokens"])
    assert report["finish_reason"] in {"eos", "length"}
    for name in ("prefill_seconds", "seconds"):
        assert report[name] > 0
    assert report["tokens_per_second"] == pytest.approx(report["new_tokens"] / report["seconds"])
    if compared:
        assert report["speedup"] == pytest.approx(
            report["tokens_per_second"] / report["plain_tokens_per_second"]
        )


# Bad input.


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--model=smollm3", HELLO], "smollm3"),
        (["--model=./no/such.gguf", HELLO], "no/such.gguf"),
        (["--method=guess", HELLO], "guess"),
        (["--rule=luck", HELLO], "luck"),
        (["--prompt="], "''"),
        (["--prompt= \n"], "the prompt is empty"),
        ([HELLO, "--prompt_file=hello.txt"], "--prompt_file"),
        (["--prompt_file=no/such.txt"], "no/such.txt"),
        ([f"--prompt_file={ROOT}"], str(ROOT)),
        ([HELLO, "--temperature=-1"], "-1.0"),
        ([HELLO, "--temperature=nan"], "nan"),
        ([HELLO, "--temperature=inf"], "inf"),
        ([HELLO, "--temperature=warm"], "warm"),
        ([HELLO, "--top_p=0"], "0.0"),
        ([HELLO, "--top_p=1.5"], "1.5"),
        ([HELLO, "--top_k=-1"], "-1"),
        ([HELLO, f"--top_k={2**40}"], str(2**40)),
        ([HELLO, "--max_new_tokens=0"], "0"),
        ([HELLO, "--max_new_tokens=8192"], "8192"),
        ([HELLO, f"--max_new_tokens={10**12}"], str(10**12)),
        ([HELLO, "--draft_length=0"], "draft_length=0"),
        ([HELLO, "--repeats=0"], "--repeats=0"),
        ([HELLO, f"--seed={2**70}"], str(2**70)),
        ([HELLO, "--tempreature=1"], "tempreature"),
        ([HELLO, "hello"], "'hello'"),
        ([HELLO, "--method=model", "--draft=layers:99"], "99"),
        ([HELLO, "--method=model", "--draft=layers:x"], "layers:x"),
        ([HELLO, "--method=model", "--draft=layers:0"], "layers=0"),
        ([HELLO, "--method=model", "--draft=other"], "other"),
        ([HELLO, "--draft=layers:4"], "layers:4"),
        ([HELLO, "--method=model", "--stop=often"], "maximum:0.3"),
        ([HELLO, "--method=model", "--stop=maximum:2"], "maximum:2"),
        ([HELLO, "--stop=never"], "stop=never"),
        ([HELLO, "--method=plain", "--draft_length=3"], "draft_length=3"),
        ([HELLO, "--rule=token"], "'token'"),
        ([HELLO, "--rule=block"], "'block'"),
    ],
    ids=lambda value: (
        " ".join(value).replace(str(ROOT), "folder")[-40:] if isinstance(value, list) else ""
    ),
)
def test_bad_input_ends_in_one_line(call, arguments, named):
    check_error(call(*arguments), named)


def check_error(ended, named):
    code, output, errors = ended
    assert code == 2
    assert output == ""
    lines = errors.splitlines()
    assert [line.startswith("error: ") for line in lines] == [False] * (len(lines) - 1) + [True]
    assert named in lines[-1]
    assert "Traceback" not in errors


def test_a_file_that_is_no_text(call, tmp_path):
    path = tmp_path / "picture"
    path.write_bytes(b"\xff\xfe\x00\x80")
    check_error(call(f"--prompt_file={path}"), str(path))


def test_a_prompt_beyond_the_context(call, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("word " * 9000)
    check_error(call(f"--prompt_file={path}"), "8192")


def test_a_fetch_that_fails_is_one_line(call, monkeypatch):
    def fail(name, dtype):
        raise checkpoints.FetchError(f"could not fetch {name}:\nno network\nInstall it by hand")

    monkeypatch.setattr(specjax, "load", fail)
    check_error(call(HELLO), "smollm2-135m: no network Install it by hand")


# Reports.


@pytest.mark.parametrize("compiler", ["as it is", "missing"])
def test_the_binary_itself(smollm2, compiler):
    missing = compiler == "missing"
    command = [sys.executable, "-m", "experiments.generate", "--method=prompt_lookup"]
    command += ["--compare", "--json", "--repeats=1", "--max_new_tokens=24", f"--prompt={COPY}"]
    ended = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"} | ({"CXX": "/none"} if missing else {}),
    )
    assert ended.returncode == 0, ended.stderr
    assert "backend" not in ended.stderr
    if missing:
        assert ended.stderr.count("warning: specjax's native kernels") == 1
    assert ended.stderr.count("compiled programs are kept in") == 1
    report = last_line(ended.stdout)
    check_report(report, smollm2.tokenizer)
    assert report["rule"] == "match"
    assert report["identical"] is True and report["first_divergence"] is None
    assert report["certified"] is True
    assert report["text"] in ended.stdout.splitlines()[0]


def test_sampling_keeps_the_text(call, smollm2):
    flags = ["--temperature=0.8", "--seed=3", "--max_new_tokens=20", f"--prompt={COPY}"]
    code, output, _ = call("--compare", "--json", "--repeats=1", *flags)
    assert code == 0
    report = last_line(output)
    check_report(report, smollm2.tokenizer)
    assert (report["temperature"], report["seed"]) == (pytest.approx(0.8), 3)
    assert report["identical"] is True and report["certified"] is True

    again = last_line(call("--json", *flags)[1])
    check_report(again, smollm2.tokenizer, compared=False)
    assert again["tokens"] == report["tokens"]
    assert not COMPARED & again.keys()


def test_a_ratio_rule_claims_no_identity(call, smollm2):
    code, output, _ = call(
        *("--method=model", "--draft=layers:3", "--draft_length=2", "--rule=block"),
        *("--temperature=0.8", "--compare", "--json", "--repeats=1", "--max_new_tokens=12"),
        f"--prompt={COPY}",
    )
    assert code == 0
    report = last_line(output)
    check_report(report, smollm2.tokenizer)
    assert report["identical"] is None and report["first_divergence"] is None
    assert report["certified"] is True


def test_texts_that_part_are_reported(call, monkeypatch):
    """As if rounding had flipped a token; then with a gap that is not a number."""
    parted = analysis.Divergence(position=3, tokens=(5, 7), logit_gap=2.5e-5)
    monkeypatch.setattr(analysis, "first_divergence", lambda *_: parted)
    flags = ["--compare", "--repeats=1", "--max_new_tokens=6", f"--prompt={COPY}"]
    code, output, _ = call(*flags)
    assert code == 0
    rows = [line.split("  ")[0] for line in output.splitlines()]
    assert "first divergence" in rows
    assert "token 3, logit gap 2.5e-05" in output
    assert "identical to plain" in rows and "NO" in output

    report = last_line(call(*flags, "--json")[1])
    assert report["identical"] is False
    assert report["first_divergence"] == {"position": 3, "tokens": [5, 7], "logit_gap": 2.5e-5}

    parted = dataclasses.replace(parted, logit_gap=float("nan"))
    report = last_line(call(*flags, "--json")[1])
    assert report["first_divergence"]["logit_gap"] is None


def test_a_text_that_varies_from_run_to_run_is_not_identical(call, monkeypatch):
    """Every timed text counts, of either method, not the last alone."""
    flags = ["--compare", "--repeats=2", "--json", "--max_new_tokens=6", f"--prompt={COPY}"]
    time, runs = generate._Run.time, []

    def other(decoder):
        runs.append(decoder)
        result, *seconds = time(decoder)
        if len(runs) == 1:
            result = dataclasses.replace(result, tokens=result.tokens.at[:, result.start[0]].set(0))
        return result, *seconds

    monkeypatch.setattr(generate._Run, "time", other)
    report = last_line(call(*flags)[1])
    assert len(runs) == 4
    assert report["identical"] is False and report["first_divergence"]["position"] == 0


def test_a_rule_that_is_wrong_is_not_certified(call, monkeypatch):
    def residual(draft, target_log_probs, node):
        del draft
        return jnp.take_along_axis(target_log_probs, node[:, None, None], axis=1)[:, 0]

    wrong = dataclasses.replace(verification.token.rule, residual=residual)
    monkeypatch.setitem(verification.RULES, "token", wrong)
    flags = ["--method=model", "--draft=layers:1", "--draft_length=2", "--rule=token"]
    flags += ["--temperature=0.8", "--compare", "--repeats=1", "--max_new_tokens=3"]
    output = call(*flags, "--json", f"--prompt={COPY}")[1]
    assert last_line(output)["certified"] is False
    table = call(*flags, f"--prompt={COPY}")[1]
    assert "NO" in next(row for row in table.splitlines() if row.startswith("rule certified"))


def test_plain_decoding_has_no_acceptance_rate(call, smollm2):
    code, output, _ = call("--method=plain", "--json", "--max_new_tokens=5", f"--prompt={COPY}")
    assert code == 0
    report = last_line(output)
    check_report(report, smollm2.tokenizer, compared=False)
    assert report["acceptance_rate"] is None
    assert report["tau"] == 1


def test_a_raw_prompt_from_a_file(call, smollm2, tmp_path):
    path = tmp_path / "prompt.txt"
    text = "one two three " * 15
    path.write_text(text, encoding="utf-8")
    code, output, _ = call("--raw", "--json", "--max_new_tokens=5", f"--prompt_file={path}")
    assert code == 0
    report = last_line(output)
    assert report["prompt_tokens"] == len(smollm2.tokenizer.encode(text))


# Methods.


def test_a_draft_may_be_a_checkpoint(call, smollm2):
    settings = methods.Settings(draft="smollm2-135m", draft_length=2, greedy_draft=True)
    drafter = methods.build("model", smollm2, settings)
    assert drafter.nodes == 2
    assert drafter.params.model is smollm2.target


def test_a_draft_with_another_tokenizer_is_refused():
    with pytest.raises(ValueError, match="smollm2-135m' has another tokenizer than tiny"):
        methods.build("model", targets.tiny(), methods.Settings(draft="smollm2-135m"))


@pytest.mark.parametrize(
    "name", [name for name in methods.METHODS if name != "draft" or methods.SHIPPED.exists()]
)
def test_every_method_builds_with_its_own_settings(smollm2, name):
    drafter = methods.build(name, smollm2, methods.Settings())
    assert drafter.name == name
    assert methods.find(name).description


def test_progress_is_told_past_every_tenth_whatever_the_stride(capsys):
    for stride, said in ((1, 9), (8, 5), (100, 0)):
        with binary.Progress("deeds") as progress:
            for done in range(stride, 42, stride):
                progress.at(done, 42)
            progress.at(42, 42)
        assert capsys.readouterr().err.count("%") == said
