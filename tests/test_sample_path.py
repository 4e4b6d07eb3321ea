"""The binaries that show sample paths and the cost of verification."""

import json

import pytest
from absl.testing import flagsaver

import specjax
from experiments import binary, sample_path, verification_cost
from specjax import drafters


@pytest.fixture
def call(capsys):
    def run(main, *arguments):
        with flagsaver.flagsaver():
            code = 0
            try:
                main(binary.parse_flags(["binary", "--compilation_cache=", *arguments]))
            except SystemExit as end:
                code = end.code
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "questions.jsonl"
    lines = [{"turns": [f"Repeat: {word} {word} {word}"]} for word in ("red", "green", "blue")]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return file


@pytest.mark.parametrize("rule, code, verdict", [("match", 0, "3 of 3"), ("token", 1, "NOT ALL")])
def test_texts_are_held_against_plain_decoding(
    call, questions, smollm2, monkeypatch, rule, code, verdict
):
    """Under `token` they are equal in law alone, and the binary must see it."""
    monkeypatch.setattr(specjax, "load", lambda name, dtype: smollm2)
    strange = drafters.model(sample_path.random_draft(smollm2.target), 2)
    monkeypatch.setattr(sample_path, "contenders", lambda bundle: {"strange": (strange, rule)})
    arguments = [f"--prompts={questions}", "--max_new_tokens=6", "--batch=2", "--temperature=1.5"]
    found, output, errors = call(sample_path.main, *arguments)
    assert found == code, errors
    assert "3 prompts, 18 tokens" in output and verdict in output


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--batch=0"], "--batch=0"),
        (["--count=0"], "--count=0"),
        (["--count=99"], "--count=99"),
        (["--prompts=/nowhere"], "/nowhere"),
        (["--prompts=pyproject.toml"], "line 1"),
        (["--longest_prompt=1"], "--longest_prompt=1"),
        (["--temperature=-1"], "temperature=-1.0"),
    ],
)
def test_bad_input_ends_in_one_line(call, smollm2, monkeypatch, arguments, named):
    monkeypatch.setattr(specjax, "load", lambda name, dtype: smollm2)
    code, output, errors = call(sample_path.main, *arguments)
    assert code == 2 and output == ""
    assert named in errors.splitlines()[-1]


def test_the_cost_of_verification(call):
    small = ["--batch=2", "--length=2", "--vocabulary=64", "--expansion=2,1", "--repeats=1"]
    code, output, errors = call(verification_cost.main, "--json", *small)
    assert code == 0, errors
    rows = json.loads(output.splitlines()[-1])["rows"]
    assert {row["what"] for row in rows} >= {"read", "token", "block", "k_seq", "traversal"}
    assert all(row["seconds"]["median"] > 0 and row["reads"] > 0 for row in rows)


@pytest.mark.parametrize(
    "arguments, named", [(["--vocabulary=0"], "--vocabulary=0"), (["--expansion=2,x"], "2,x")]
)
def test_bad_sizes_end_in_one_line(call, arguments, named):
    code, output, errors = call(verification_cost.main, *arguments)
    assert code == 2 and output == ""
    assert named in errors.splitlines()[-1]
