"""The benchmark: its counts, its claims, its file of records, and what it says of bad input."""

import dataclasses
import itertools
import json
import pathlib
import types as types_

import numpy as np
import pytest
from absl.testing import flagsaver

from experiments import (
    benchmark,
    benchmark_record,
    benchmark_run,
    benchmark_turn,
    binary,
    methods,
    outputs,
    prompt_files,
    records,
    step_costs,
    targets,
)
from specjax import decoding, types
from specjax.analysis import scoring

# The tiny target has four layers: a draft of as many is the target itself.
WHOLE = "model draft_length=3 draft=layers:4 greedy_draft=True"
FLAGS = ["--model=tiny", f"--methods={WHOLE}", "--lengths=12", "--json", "--compilation_cache="]
LOOKUP = "prompt_lookup draft_length=2"
DRAWN = "model draft_length=2 draft=layers:2 stop=maximum:0.15"
COST = decoding.Cost(0.1, ((1, 0.9), (4, 1.6)), overhead=0.04)
ASKED = {
    "method",
    "settings",
    "rule",
    "group",
    "question_id",
    "prompt_tokens",
    "new_tokens",
    "prefill_seconds",
    "target_steps",
    "draft_steps",
    "tau",
    "acceptance_rate",
    "accept_histogram",
    "acceptance_by_position",
    "overlap",
    "seconds",
    "tokens_per_second",
    "inter_token_p50",
    "inter_token_p95",
    "plain_seconds",
    "speedup",
    "identical",
    "certified",
    "first_divergence",
    "finish_reason",
    "peak_bytes",
    "device",
    "dtype",
    "versions",
    "commit",
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Two groups; the conversations of one have two turns."""
    path = tmp_path_factory.mktemp("prompts") / "questions.jsonl"
    lines = [
        {"question_id": 1, "group": "rivers", "turns": ["What is a river?"]},
        {"question_id": 2, "group": "rivers", "turns": ["Name three rivers."]},
        {"question_id": 3, "category": "talk", "turns": ["Hello there.", "And what else?"]},
        {"question_id": 4, "category": "talk", "turns": ["Good day.", "And how so?"]},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(config):
    """A run on a target that is at hand, as the binary does it, at costs that are known."""
    prices = {str(asked): benchmark_record.Price(COST, asked.stops) for asked in config.methods}
    with flagsaver.flagsaver(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "prices_of", lambda *_: prices)
        binary.parse_flags(["benchmark", "--compilation_cache="])
        return benchmark.run(config, targets.tiny())


@pytest.fixture(scope="module")
def made(prompts, tmp_path_factory):
    """A run: the flags of its input, its file, and its records."""
    out = tmp_path_factory.mktemp("made") / "records.jsonl"
    config = benchmark.Config(
        model="tiny",
        dtype="float32",
        methods=tuple(map(methods.parse, (WHOLE, LOOKUP, DRAWN))),
        prompts=(str(prompts),),
        groups=(),
        count=None,
        longest_prompt=500,
        batches=(1, 2),
        temperatures=(0.0, 0.8),
        lengths=(12,),
        contexts=(0,),
        repeats=1,
        seed=0,
        out=str(out),
    )
    return config, run(config), records.read(out)[1]


def test_records_hold_what_was_asked_for(made):
    config, _, held = made
    # Six turns, four methods, two batch sizes, two temperatures.
    assert len(held) == 6 * 4 * 2 * 2
    for record in held:
        assert record.keys() >= ASKED
        tested, accepted = record["tested"], record["accepted"]
        assert record["new_tokens"] == len(record["tokens"]) <= 12
        assert record["tau"] == record["new_tokens"] / record["target_steps"]
        histogram = record["accept_histogram"]
        assert sum(histogram) == sum(record["drafted"]) == record["target_steps"]
        assert sum(i * steps for i, steps in enumerate(histogram)) == sum(accepted)
        assert all(a <= t for a, t in zip(accepted, tested, strict=True))
        assert record["certified"] is True
        pathwise = record["rule"] == "match" or record["temperature"] == 0
        assert record["identical"] is (True if pathwise else None)
        assert record["first_divergence"] is None
        pace = record["batch_tokens"] / record["seconds"]
        plain = record["plain_batch_tokens"] / record["plain_seconds"]
        assert record["speedup"] == pytest.approx(pace / plain)


def test_the_target_drafting_for_itself_has_a_tau_that_is_known(made):
    """Greedily every draft of three is right: twelve tokens are three steps of four."""
    _, report, held = made
    own = [r for r in held if r["method"] == WHOLE and r["temperature"] == 0]
    assert len(own) == 12
    assert any(record["new_tokens"] == 12 for record in own)
    for record in own:
        assert record["target_steps"] == -(-record["new_tokens"] // 4)
        assert record["acceptance_rate"] == 1
        if record["new_tokens"] == 12:
            assert record["tau"] == 4
            assert record["accept_histogram"] == [0, 0, 0, 3]
            assert (record["drafted"], record["draft_steps"]) == ([0, 0, 0, 3], 9)
            # Three steps of 3·0.1 + 1.6 + 3·0.04 plain ones; in a batch no row tells.
            wanted = pytest.approx(12 / 6.06) if record["batch"] == 1 else None
            assert record["predicted_speedup"] == wanted
    plain = [r for r in held if r["method"] == "plain"]
    assert all(r["tau"] == 1 and r["speedup"] == 1 for r in plain)
    assert all(r["acceptance_rate"] is None for r in plain)
    rows = {(r["temperature"], r["batch"], r["group"], r["method"]): r for r in report["rows"]}
    assert rows[0, 1, "overall", WHOLE]["acceptance_rate"][0] == 1
    assert rows[0, 1, "overall", WHOLE]["prompts"] == 4
    assert rows[0, 1, "rivers", WHOLE]["prompts"] == 2
    # Rows of a batch are of all groups.
    assert (0, 2, "rivers", WHOLE) not in rows
    assert rows[0, 2, "overall", WHOLE]["prompts"] == 4


def test_a_second_turn_goes_on_from_the_first(made):
    """From the state that was left, the answer is that of the whole conversation at once."""
    config, _, held = made
    bundle = targets.tiny()
    for name in ("plain", WHOLE):
        first, second = (
            next(
                r
                for r in held
                if (r["method"], r["question_id"], r["turn"], r["batch"], r["temperature"])
                == (name, 3, turn, 1, 0.8)
            )
            for turn in (0, 1)
        )
        said = bundle.chat("Hello there.")
        follow_up = bundle.tokenizer.follow_up("And what else?", first["tokens"])
        assert second["prompt_tokens"] == len(follow_up)
        task = benchmark_turn.Task(
            (prompt_files.Prompt(3, "talk", ("?",)),),
            ([*said, *first["tokens"], *follow_up],),
            **{"temperature": 0.8, "max_new_tokens": 12, "context": 0},
            new=1,
            capacity=512,
        )
        if name != "plain":
            continue
        # The key is that of the conversation's first words.
        key = benchmark_turn.hash_of(said)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(benchmark_turn, "hash_of", lambda tokens, key=key: key)
            decoders = {"plain": methods.parse("plain").decoder(bundle)}
            (whole,) = benchmark_run.measured(bundle, decoders, task, 1, config.seed, {}, {})
        assert whole["tokens"] == second["tokens"]


def test_batches_change_no_text(made):
    _, _, held = made
    texts = {}
    for r in held:
        if r["rule"] == "match":
            place = (r["prompt"], r["turn"], r["method"], r["temperature"])
            texts.setdefault(place, set()).add(tuple(r["tokens"]))
    assert texts and all(len(some) == 1 for some in texts.values())


def test_overlap_is_what_scoring_says(made):
    """Of drawn drafts, over the places where there is one; others have acceptance alone."""
    _, report, held = made
    bundle = targets.tiny()
    drafter = methods.parse(DRAWN).decoder(bundle).drafter
    (record,) = (
        r
        for r in held
        if (r["method"], r["question_id"], r["batch"], r["temperature"]) == (DRAWN, 1, 1, 0.8)
    )
    text = (bundle.chat("What is a river?"), record["tokens"])
    (shares,) = scoring.score(bundle.target, drafter, [text], types.Sampling(0.8)).overlap
    assert 1 < record["places"] == np.sum(~np.isnan(shares)) < len(shares)
    assert record["overlap"] == pytest.approx(np.nanmean(shares))
    for counts, sums in record["by_entropy"].values():
        assert sum(counts) == record["places"]
        assert sum(sums) == pytest.approx(np.nansum(shares))
    assert all(r["overlap"] is None for r in held if r["method"] in (WHOLE, LOOKUP))
    # A draft that is the target's own most probable token is right.
    whole = next(r for r in held if (r["method"], r["batch"], r["temperature"]) == (WHOLE, 1, 0))
    counts, sums = whole["by_entropy"].pop("target")
    assert sum(counts) == whole["new_tokens"] and counts == sums
    assert not whole["by_entropy"]
    assert all(r["by_entropy"] is None for r in held if r["batch"] == 2)
    row = next(r for r in report["rows"] if (r["method"], r["group"]) == (DRAWN, "rivers"))
    own = [
        r
        for r in held
        if (r["method"], r["group"], r["batch"], r["temperature"]) == (DRAWN, "rivers", 1, 0)
    ]
    places = sum(r["places"] for r in own)
    assert row["overlap"][0] == pytest.approx(sum(r["overlap"] * r["places"] for r in own) / places)


def test_what_is_predicted_of_misses_stops_and_trees():
    """Hand arithmetic; COST is 0.1 a level, v(4) = 1.6 and 0.04 a node; no draft, a plain step."""

    def of(drafted, steps, levels, nodes, stops=False):
        drafter = dataclasses.replace(decoding.NOTHING, nodes=nodes)
        record = {"drafted": drafted, "tested": [0] * levels, "target_steps": steps}
        price = benchmark_record.Price(COST, stops)
        record["new_tokens"] = 12
        return 12 / benchmark_record.predicted(record, price, drafter, 1)["predicted_speedup"]

    # Two misses in four steps of a lookup, which has looked each time.
    assert of([2, 0, 0, 2], 4, 3, 3) == pytest.approx(4 * 0.3 + 2 * 1.0 + 2 * 1.72)
    # A draft that may stop: it looked once, twice, and thrice.
    stopped = 0.1 * (1 + 2 + 3) + (1.0 + 1.72 + 1.72)
    assert of([1, 1, 0, 1], 3, 3, 3, stops=True) == pytest.approx(stopped)
    # A tree of two levels and five nodes: what is drafted of it takes a pass of six.
    assert of([0, 0, 1, 0, 0, 1], 2, 2, 5) == pytest.approx(2 * (0.2 + COST.of_pass(6) + 5 * 0.04))


@pytest.mark.parametrize("line", [2, 9, 10, 17, 40])
def test_a_killed_run_goes_on(made, tmp_path, line, monkeypatch):
    """Cut in any line, or behind it, among one prompt's records and between two turns'."""
    config, report, held = made
    lines = pathlib.Path(config.out).read_text().splitlines()
    out = tmp_path / "records.jsonl"
    out.write_text("\n".join(lines[:line]) + "\n" + lines[line][: 40 * (line % 2)])
    done, measured = [], benchmark_run.measured
    known = {(r["unit"], r["turn"], r["method"]): r for r in held}

    def remembered(bundle, decoders, task, *_):
        done.append(task)
        units = [task.unit(row) for row in range(task.new)]
        return [r for r in held if r["unit"] in units]

    # What decoding gives again is known: the first case decodes, the others look it up.
    monkeypatch.setattr(benchmark_run, "measured", measured if line == 40 else remembered)
    again = dataclasses.replace(config, out=str(out))
    whole = run(again)
    found = records.read(out)[1]
    assert len(found) == len(held)
    assert {(r["unit"], r["turn"], r["method"]) for r in found} == known.keys()
    for record in found:
        assert record["tokens"] == known[record["unit"], record["turn"], record["method"]]["tokens"]
    again_units = [task.unit(row) for task in done for row in range(task.new)]
    assert len(again_units) == len(set(again_units))
    assert [row["tau"] for row in whole["rows"]] == [row["tau"] for row in report["rows"]]


def test_steps_are_timed_where_they_predict_and_once(made, tmp_path, monkeypatch):
    """A row's, by its fill and temperature; what another start measured stands in its records."""
    config, _, held = made
    bundle, out, asked, used = targets.tiny(), tmp_path / "records.jsonl", [], []
    config = dataclasses.replace(config, out=str(out))

    def of_all(target, drafts, fill, temperature, capacity, **_):
        assert set(drafts) == {WHOLE, LOOKUP, DRAWN} and capacity >= 512
        asked.append((fill, temperature))
        return dict.fromkeys(drafts, COST), 0.01

    def remembered(bundle, decoders, task, *rest):
        used.append((task.batch, rest[-1]))
        units = [task.unit(row) for row in range(task.new)]
        return [r for r in held if r["unit"] in units]

    monkeypatch.setattr(step_costs, "of_all", of_all)
    monkeypatch.setattr(benchmark_run, "measured", remembered)

    def start(config):
        asked.clear()
        used.clear()
        benchmark.run(config, bundle)

    start(config)
    # In the middle of a conversation: half of one answer of twelve, or a whole one of two.
    fills: dict[int, list[int]] = {}
    for said, turns in (
        ("What is a river?", 1),
        ("Name three rivers.", 1),
        ("Hello there.", 2),
        ("Good day.", 2),
    ):
        fill = len(bundle.chat(said)) + 6 * turns
        fills.setdefault(round(np.log2(fill)), []).append(fill)
    medians = [int(np.median(some)) for some in fills.values()]
    assert sorted(asked) == sorted((fill, t) for fill in medians for t in (0.0, 0.8))
    assert all((given == {}) == (batch > 1) for batch, given in used)
    prices = {name: benchmark_record.Price(COST, name == DRAWN) for name in (WHOLE, LOOKUP, DRAWN)}
    assert all(given in ({}, prices) for _, given in used)
    # One prompt in each cell is left to do, beside others of its fill.
    lines = out.read_text().splitlines()
    kept = [line for line in lines if json.loads(line).get("question_id") != 2]
    out.write_text("\n".join(kept) + "\n")
    start(config)
    assert not asked and [batch for batch, _ in used] == [1, 1, 2, 2]
    assert all(given == prices for batch, given in used if batch == 1)
    # Longer answers stand behind more: what was measured is not theirs.
    longer = {"lengths": (12, 400), "batches": (1,), "temperatures": (0.0,)}
    start(dataclasses.replace(config, groups=("rivers",), **longer))
    assert len(asked) == 1 and asked[0][0] > 200
    out.unlink()
    start(dataclasses.replace(config, is_predicted=False))
    assert not asked and not any(given for _, given in used)


def test_a_file_of_something_else_is_refused(call, made, prompts, tmp_path):
    config, _, _ = made
    out = tmp_path / "records.jsonl"
    lines = pathlib.Path(config.out).read_text().splitlines()

    def refused(text, *flags):
        out.write_text(text)
        code, _, error = call(
            benchmark, *FLAGS, f"--prompts={prompts}", f"--out={out}", "--repeats=1", *flags
        )
        assert code == 2 and out.read_text() == text
        return error.splitlines()[-1]

    header = json.loads(lines[0])
    assert "its methods is" in refused("\n".join(lines) + "\n")
    header["methods"] = {WHOLE: header["methods"][WHOLE]}
    other = {**header, "versions": {**header["versions"], "jax": "0.0.1"}}
    assert "'jax': '0.0.1'" in refused(json.dumps(other) + "\n")
    assert "its form is 0" in refused(json.dumps({**header, "form": 0}) + "\n")
    assert "its seed is 0, and 3" in refused(json.dumps(header) + "\n", "--seed=3")
    assert "line 2" in refused(json.dumps(header) + "\n{}\n")
    assert "line 1" in refused("no record\n")
    assert "is empty" in refused("")


def test_paces_are_of_rows(monkeypatch):
    """Every step takes a second, which each row spreads over the tokens that it got."""
    ticks = types_.SimpleNamespace(perf_counter=itertools.count().__next__)
    monkeypatch.setattr(benchmark_turn, "time", ticks)
    bundle = targets.tiny()
    decoder = methods.parse(DRAWN).decoder(bundle)
    rows = [bundle.chat(text) for text in ("What is a river?", "Sing.")]
    asked = benchmark_turn.options(rows, 0.8, 12, 0)
    once, _ = benchmark_turn.Conversation(DRAWN, decoder, None, rows, rows).decode(asked)
    assert [len(gaps) for gaps in once.gaps] == [len(answer) for answer in once.answers]
    assert max(len(set(gaps)) for gaps in once.gaps) > 1
    for gaps, steps in zip(once.gaps, once.counts.target_steps, strict=True):
        assert sum(gaps) == pytest.approx(int(steps))


def test_methods_are_read_as_they_are_written():
    for told in ("draft", "draft draft_length=3 stop=maximum:0.3 rule=match", WHOLE):
        assert str(methods.parse(told)) == told
    assert methods.parse("tree expansion=3-1").settings.expansion == "3-1"
    with pytest.raises(ValueError, match="expansion='3-0'"):
        methods.parse("tree expansion=3-0")
    with pytest.raises(ValueError, match="draft_length='?2'? means nothing"):
        methods.parse("tree draft_length=2")


def test_a_report_has_its_pictures(made, tmp_path):
    pytest.importorskip("matplotlib")
    _, report, _ = made
    file = tmp_path / "report.md"
    outputs.check(str(file), str(tmp_path / "plots"))
    benchmark.write(report, str(file), str(tmp_path / "plots"))
    text, drawn = file.read_text(), {path.stem for path in (tmp_path / "plots").glob("*.png")}
    # Two temperatures and two batch sizes.
    cells = {
        f"{name}_{i}" for name in ("acceptance_by_position", "speedup_by_domain") for i in "1234"
    }
    assert drawn >= cells | {"speedup_by_batch", "predicted_against_measured"}
    assert "speedup_by_max_new_tokens" not in drawn
    assert all(f"](plots/{name}.png)" in text for name in drawn)
    assert "## Temperature 0, batch 1, 12 new tokens" in text
    assert "MBPP, XSum" in text
