"""Tuning: the target as its own draft is known to be worth its cost; bad input ends in one line."""

import json

import pytest

from experiments import step_costs, tune
from specjax import decoding

FLAGS = ["--model=tiny", "--max_new_tokens=12", "--json", "--compilation_cache="]
WHOLE = "model draft=layers:4"


def test_the_best_length_is_predicted_and_then_measured(call, tmp_path, monkeypatch):
    """Every greedy draft of the whole target is right: at free drafts the longest is best."""
    path = tmp_path / "questions.jsonl"
    turns = ("What is a river?", "Name three rivers.", "Hello there.", "Sing.")
    path.write_text("".join(json.dumps({"group": "g", "turns": [turn]}) + "\n" for turn in turns))
    cost = decoding.Cost(0.01, ((1, 1.0), (9, 1.4)))
    monkeypatch.setattr(
        step_costs, "of_all", lambda target, drafts, **_: (dict.fromkeys(drafts, cost), 0.01)
    )
    plots = tmp_path / "plots"
    flags = [f"--methods={WHOLE}", "--methods=prompt_lookup", f"--prompts={path}"]
    code, output, _ = call(tune, *FLAGS, *flags, "--count=4", f"--plots={plots}")
    assert code == 0
    assert {picture.stem for picture in plots.iterdir()} == {
        "promised_by_draft_length",
        "predicted_against_measured",
    }
    report = json.loads(output.splitlines()[-1])
    assert (report["profiled"], report["held"]) == (2, 2)
    options = {one["length"]: one for one in report["weighed"][WHOLE]}
    assert options.keys() == set(step_costs.LENGTHS)
    assert all(one["acceptance_rate"] == 1 for one in options.values())
    # Two texts of twelve tokens in steps of four.
    assert options[3]["tau"] == 4
    assert options[3]["speedup"] == pytest.approx(24 / (6 * (3 * 0.01 + cost.of_pass(4))))
    best = max(options.values(), key=lambda one: one["speedup"])
    rows = {row["method"]: row for row in report["chosen"]}
    own = rows[f"model draft_length={best['length']} draft=layers:4 stop=never"]
    assert own["promised"] == best and own["measured_tau"][0] > 2
    # What was measured decides, not what was promised.
    fastest = max(report["chosen"], key=lambda row: row["measured"][0])
    assert report["best"] == (fastest["method"] if fastest["measured"][0] > 1 else "plain")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--count=1", "among --count=1: half is profiled"),
        ("--methods=draft draft_length=3", "without draft_length, which is what is found"),
        ("--methods=plain", "name drafting methods"),
        ("--methods=draft stop=maximum:0.3", "without stop, which experiments.stopping finds"),
        ("--methods=none", "unknown method 'none'"),
        ("--longest_prompt=2", "no group has two prompts"),
        ("--temperature=-1", "temperature"),
        ("--methods=prompt_lookup rule=token", "token"),
    ],
)
def test_bad_input_ends_in_one_line(call, flag, message):
    code, _, error = call(tune, *FLAGS, flag)
    assert code == 2 and message in error.splitlines()[-1]
    # Before anything is decoded.
    assert "writing" not in error
