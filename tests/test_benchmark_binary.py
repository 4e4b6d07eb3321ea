"""The benchmark's binary: a sweep in earnest, and what it says of bad input."""

import json

import pytest

from experiments import benchmark, records

LOOKUP = "prompt_lookup draft_length=2"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods=nothing"], "unknown method 'nothing'"),
        (["--methods=draft speed=3"], "'speed=3' is no setting"),
        (["--methods=prompt_lookup draft_length=x"], "'prompt_lookup draft_length=x'"),
        (["--methods=prompt_lookup rule=nothing"], "nothing"),
        (["--methods=plain"], "plain decoding always runs"),
        (["--methods=plain rule=match"], "plain decoding always runs"),
        (["--methods=tree greedy_draft=yes"], "greedy_draft=yes: write True or False"),
        (["--methods=prompt_lookup draft_length=auto", "--batches=1,2"], "goes by the costs of"),
        (["--methods=prompt_lookup", "--methods=prompt_lookup"], "give each once"),
        (["--groups=nowhere"], "unknown group 'nowhere'; the prompts' are code"),
        (["--batches=99"], "--batches=99 needs as many prompts of 1 turns, and there are 6"),
        (["--batches=0"], "--batches=0: give some, each once and at least 1"),
        (["--lengths=8,8"], "--lengths=8,8"),
        (["--temperatures=hot"], "--temperatures=hot must be numbers"),
        (["--temperatures=-1"], "--temperatures=-1"),
        (["--longest_prompt=3"], "no prompt is left to measure"),
        (["--contexts=900000"], "more than the model's context of 2048"),
        (["--stop=never"], "--stop means nothing to this command"),
    ],
)
def test_bad_input_ends_in_one_line(call, flags, message):
    given = ["--model=tiny", "--json", "--compilation_cache="]
    if not any("--methods" in flag for flag in flags):
        given.append(f"--methods={LOOKUP}")
    code, _, error = call(benchmark, *given, "--count=1", *flags)
    assert code == 2 and message in error.splitlines()[-1]


def test_the_binary_sweeps_contexts_and_lengths(call, tmp_path):
    """In earnest: costs are measured, in another dtype, and all is written."""
    pytest.importorskip("matplotlib")
    prompts = tmp_path / "questions.jsonl"
    turns = ("What is a river?", "Name three rivers.")
    lines = [{"question_id": i, "group": "rivers", "turns": [t]} for i, t in enumerate(turns, 1)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    where = [f"--out={tmp_path}/r.jsonl", f"--report={tmp_path}/r.md", f"--plots={tmp_path}"]
    sweep = ["--contexts=0,64", "--lengths=4,8", "--dtype=bfloat16"]
    asked = ["--model=tiny", f"--methods={LOOKUP}", f"--prompts={prompts}"]
    code, output, errors = call(benchmark, *asked, *sweep, *where, "--json", "--compilation_cache=")
    assert code == 0, errors
    header, held = records.read(tmp_path / "r.jsonl")
    assert header["dtype"] == "bfloat16" and header["machine"].endswith(" cores")
    rows = {(r["context"], r["max_new_tokens"]): r for r in held if r["question_id"] == 1}
    assert len(held) == 2 * 2 * 4 and len(rows) == 4
    for (context, length), record in rows.items():
        assert record["new_tokens"] <= length
        longer = record["text_tokens"] - rows[0, 4]["text_tokens"]
        # And what stands around the notes.
        assert longer == 0 if not context else 64 <= longer < 200
    lookups = [record for record in held if record["method"] == LOOKUP]
    assert all(record["cost"]["passes"][-1][0] == 16 for record in lookups)
    assert all(record["predicted_speedup"] > 0 for record in lookups)
    told = (tmp_path / "r.md").read_text()
    assert "8 new tokens, context 64" in told and "Furthest from what was predicted" in told
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    assert pictures >= {"speedup_by_context", "speedup_by_max_new_tokens"}
    assert json.loads(output.splitlines()[-1])["left_out"] == 0
