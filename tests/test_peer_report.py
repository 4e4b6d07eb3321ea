"""Paces, ratios and tables of engines side by side, on records made by hand."""

import pytest

from experiments import peer_report

NOTES = {
    **{"model": "m", "threads": 1, "prompts": 1, "left_out": 0, "max_new_tokens": 1},
    **{"repeats": 1, "machine": "", "versions": {}, "skipped": {}},
}


def record(program, prompt, repeat, tokens, prefill, seconds, steps=1, at_once=0):
    engine, _, method = program.partition(":")
    return {
        **{"engine": engine, "method": method, "prompt": prompt, "repeat": repeat},
        "group": {"a": "first", "b": "second"}[prompt],
        **{"new_tokens": tokens, "prefill_seconds": prefill, "prefill_tokens": at_once},
        **{"seconds": seconds, "target_steps": steps},
    }


def test_paces_ratios_and_tau():
    four = [1, 2, 3, 4]
    made = [
        # Prompt a, twice as slow at its second repeat: for both.
        record("specjax:plain", "a", 0, four, 1.0, 1.0, 4),
        record("peer:plain", "a", 0, four, 2.0, 6.0, 3, 1),
        record("specjax:plain", "a", 1, four, 2.0, 2.0, 4),
        record("peer:plain", "a", 1, four, 4.0, 12.0, 3, 1),
        # Prompt b.
        record("specjax:plain", "b", 0, four, 0.0, 1.0, 4),
        record("peer:plain", "b", 0, [1, 2, 9, 9, 9], 0.0, 2.5, 1, 1),
        record("specjax:quick", "b", 0, four, 0.0, 0.5, 2),
        record("peer:slow", "b", 0, four, 0.0, 8.0, 4),
    ]
    asked = []

    def gap_of(prompt, text, other):
        asked.append((prompt, text, other))
        return 2e-5

    found = peer_report.summary(made, gap_of)
    rows = {f"{row['engine']}:{row['method']}": row for row in found["rows"]}
    plain, peer = rows["specjax:plain"], rows["peer:plain"]
    # Of a: 2 and 1 tokens a second, and 4 and 2; of b: 4.
    assert plain["tokens_per_second"]["with_prefill"] | {"low": 0, "high": 0} == {
        **{"median": 2.75, "min": 1.5, "max": 4.0, "low": 0, "high": 0}
    }
    assert plain["tokens_per_second"]["after_prefill"]["median"] == 3.5
    assert peer["tokens_per_second"]["with_prefill"]["max"] == 2.0
    # Without the token that came with the prompt: 3 in 6 seconds, 3 in 12; 4 in 2.5.
    assert peer["tokens_per_second"]["after_prefill"]["min"] == 0.375
    assert peer["tokens_per_second"]["after_prefill"]["max"] == 1.6
    assert peer["to_plain"]["with_prefill"]["min"] == 0.25
    assert peer["to_plain"]["with_prefill"]["max"] == 0.5
    assert peer["tau"] == pytest.approx((3 + 3 + 4) / (3 + 3 + 1))
    assert plain["tau"] == 1.0
    assert plain["agree"] == [2, 2] and plain["first_divergence"] is None
    assert peer["agree"] == [1, 2]
    assert peer["first_divergence"] == {"prompt": "b", "position": 2, "logit_gap": 2e-5}
    assert asked == [("b", four, [1, 2, 9, 9, 9])]
    ratios = {(row["what"], row["clock"]): row for row in found["comparisons"]}
    assert len(ratios) == 4
    assert ratios["plain", "with_prefill"]["ratio"]["min"] == 2.0
    assert ratios["plain", "with_prefill"]["ratio"]["max"] == 4.0
    # In each repeat: 4 tokens a second over 3 in 6 seconds.
    assert ratios["plain", "after_prefill"]["ratio"]["max"] == 8.0
    assert ratios["plain", "with_prefill"]["by_group"]["second"]["median"] == 2.0
    assert ratios["plain", "with_prefill"]["by_group"]["first"]["median"] == 4.0
    best = ratios["best", "with_prefill"]
    assert best["by_group"]["first"] is None
    assert (best["ours"], best["theirs"]) == ("specjax:quick", "peer:plain")
    # They meet on b only: 8 over 2.
    assert best["ratio"] == {"median": 4.0, "min": 4.0, "max": 4.0, "low": None, "high": None}
    heading, *_, last = peer_report.text({**found, **NOTES}).split("\n\n")[2].splitlines()
    assert heading.split() == ["ours", "theirs", "clock", "first", "second"]
    # After prefill: 8 over 1.6 on b, where alone they meet.
    told = ["specjax:quick", "peer:plain", "after", "prefill", "–", "5.00"]
    assert last.split() == told


def test_a_ratio_is_of_runs_side_by_side():
    seconds = {0: 1.0, 1: 10.0, 2: 2.0}
    made = []
    for repeat, taken in seconds.items():
        made.append(record("specjax:plain", "a", repeat, [1], 0.0, taken))
        made.append(record("peer:plain", "a", repeat, [1], 0.0, 3 * taken))
    # The middle one's neighbour is missing: of the medians, the ratio would be another.
    del made[3]
    found = peer_report.summary(made, lambda *_: None)
    assert {row["ratio"]["median"] for row in found["comparisons"]} == {3.0}


def test_an_answer_that_ends_at_once_has_no_pace():
    made = [
        record("specjax:plain", "a", 0, [1], 1.0, 1.0),
        record("peer:plain", "a", 0, [1], 1.0, 0.0, 0, 1),
    ]
    report = peer_report.summary(made, lambda *_: None)
    assert report["rows"][1]["tokens_per_second"]["after_prefill"] is None
    assert report["rows"][1]["tau"] is None
    line = next(
        line for line in peer_report.text({**report, **NOTES}).splitlines() if "peer" in line
    )
    assert line.split() == ["peer", "plain", *"1.0 [1.0, 1.0] – 2.00 [2.00, 2.00] – – 1/1".split()]
