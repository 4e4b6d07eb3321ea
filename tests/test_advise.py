"""Advice: a log is read strictly, sizes are weighed, and the rule of thumb is held against them."""

import json

import pytest

from experiments import advise, step_costs, tune
from specjax import decoding

FLAGS = ["--model=tiny", "--max_new_tokens=12", "--json", "--compilation_cache=", "--count=1"]
# The tiny target's four layers: a draft that is always right.
WHOLE = "--methods=model draft=layers:4"


@pytest.fixture
def log(tmp_path):
    def write(*lines):
        path = tmp_path / "requests.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return f"--log={path}"

    return write


@pytest.fixture
def costs(monkeypatch):
    """A width is free in small batches, and costs all that it holds in large ones."""

    def of_all(target, drafts, batch=1, **_):
        dear = decoding.Cost(0.3, ((1, 1.0), (9, 9.0)))
        cost = decoding.Cost(0.05, ((1, 1.0), (9, 1.2))) if batch < 8 else dear
        return dict.fromkeys(drafts, cost), 0.1 * batch**0.5

    monkeypatch.setattr(step_costs, "of_all", of_all)


def test_sizes_are_weighed_and_the_rule_of_thumb_judged(call, log, costs, tmp_path):
    asked = {"prompt_tokens": 8, "new_tokens": 20}
    flag = log(*({"arrival": 0.0, **asked} for _ in range(3)), {"arrival": 5000.0, **asked})
    plots = tmp_path / "plots"
    sizes, pictures = "--batches=1,2,4,8,32", f"--plots={plots}"
    code, output, errors = call(advise, *FLAGS, WHOLE, flag, sizes, pictures)
    assert code == 0, errors
    assert [path.name for path in plots.iterdir()] == ["speedup_by_batch.png"]
    report = json.loads(output.splitlines()[-1])
    rows = {row["batch"]: row for row in report["batches"]}
    assert rows[4]["method"] == "model draft=layers:4" and rows[4]["speedup"] > 2
    assert (rows[32]["method"], rows[32]["speedup"]) == ("plain", 1.0)
    assert rows[4]["bytes"] > rows[2]["bytes"] > rows[1]["bytes"]
    # Three come at once and have the same to do.
    assert report["concurrency_p95"] == 3 and report["advice"]["batch"] == 4
    assert report["latency"]["speculative"] < report["latency"]["plain"]
    # The advice is one method, which is slow in large batches.
    assert report["advised_at"][2] == [4, rows[4]["speedup"]]
    assert report["advised_at"][4][1] < 1
    assert report["fill"] == 18 and rows[4]["bytes"] > rows[4]["plain_bytes"]
    rule = report["rule_of_thumb"]
    assert rule["gain_from_32"] == 1.0 and rule["holds_above_32"] is True
    assert rule["gain_up_to_8"] == rows[8]["speedup"] and rule["holds_below_8"] is False


def test_acceptance_is_of_the_logs_own_texts(call, log, costs, monkeypatch):
    seen = []
    scored = tune.scored

    def spied(bundle, texts, config):
        seen.extend(texts)
        return scored(bundle, texts, config)

    monkeypatch.setattr(tune, "scored", spied)
    line = {"arrival": "2026-01-01T10:00:00+00:00", "prompt": [5, 6, 7], "answer": [8, 9, 8, 9]}
    code, output, errors = call(advise, *FLAGS, WHOLE, log(line), "--batches=1")
    assert code == 0, errors
    report = json.loads(output.splitlines()[-1])
    assert seen == [([5, 6, 7], [8, 9, 8, 9])]
    assert report["own_texts"] and report["concurrency_p95"] == 1


def test_prompts_without_answers_are_answered_here(call, log, costs):
    line = {"arrival": 0, "prompt": "What is a river?", "new_tokens": 90}
    code, output, errors = call(advise, *FLAGS, WHOLE, log(line), "--batches=1")
    assert code == 0, errors
    report = json.loads(output.splitlines()[-1])
    assert report["own_texts"] and report["texts"] == 1 and not report["is_beyond"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"arrival": 1, "prompt_tokens": 3}, "line 2, new_tokens"),
        ({"arrival": 1, "prompt_tokens": 0, "new_tokens": 3}, "line 2, prompt_tokens"),
        ({"arrival": "noon", "prompt_tokens": 3, "new_tokens": 3}, "line 2, arrival"),
        ({"prompt_tokens": 3, "new_tokens": 3}, "line 2, arrival"),
        ({"arrival": 1, "prompt": "a", "answer": 3}, "line 2, answer"),
        ({"arrival": 1, "prompt_tokens": 9000, "new_tokens": 3}, "a request of 9003 tokens"),
    ],
)
def test_a_line_that_is_no_request_is_named(call, log, costs, line, message):
    good = {"arrival": 0, "prompt_tokens": 3, "new_tokens": 3}
    code, _, error = call(advise, *FLAGS, log(good, line))
    assert code == 2 and message in error.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --log"),
        (["--log=/nowhere"], "/nowhere cannot be read"),
        (["--log=/nowhere", "--batches=2,4"], "--batches=2,4 must rise from 1"),
        (["--log=/nowhere", "--batches=1,x"], "--batches=1,x must be whole"),
        (["--log=/nowhere", "--methods=draft draft_length=2"], "without draft_length"),
    ],
)
def test_bad_flags_end_in_one_line(call, flags, message):
    own = [flag for flag in FLAGS if "count" not in flag]
    code, _, error = call(advise, *own, *flags)
    assert code == 2 and message in error.splitlines()[-1]
