"""What a report says of records: made by hand, and recorded."""

import pathlib

import pytest

from experiments import benchmark_report, records


def test_speedups_are_of_all_tokens_over_all_seconds():
    """Twice as fast on one prompt and as fast on another of thrice the time: 1.25, not 1.5."""

    def record(prompt, method, seconds, plain):
        base = {"tested": [4], "accepted": [2], "new_tokens": 12, "target_steps": 6}
        return {
            **base,
            **{"unit": prompt, "prompt": prompt, "turn": 0, "method": method, "group": "g"},
            **{"batch_of": prompt, "commit": "c", "text_tokens": 30},
            **{"source": "x", "rule": "match", "overlap": 0.5, "places": 10},
            **{"temperature": 0.0, "batch": 1, "max_new_tokens": 12, "context": 0},
            **{"batch_tokens": 12, "seconds": seconds, "prefill_seconds": 1.0},
            **{"plain_batch_tokens": 12, "plain_seconds": plain, "plain_prefill_seconds": 1.0},
            **{"tokens_per_second": 12 / seconds, "speedup": plain / seconds},
            **{"inter_token_p50": 0.1, "inter_token_p95": 0.2, "identical": True},
            **{"first_divergence": None, "certified": True, "by_entropy": None},
            **{
                "cost": None,
                "peak_bytes": 150 if method == "own" else 100,
                "predicted_speedup": 1.5,
            },
        }

    held = [
        record(prompt, method, seconds if method == "own" else plain, plain)
        for prompt, seconds, plain in (("a", 1.0, 2.0), ("b", 3.0, 3.0))
        for method in ("plain", "own")
    ]
    held[-1] |= {
        "identical": False,
        "first_divergence": {"position": 7, "tokens": [1, 2], "logit_gap": 0.5},
    }
    header = {"target": "t", "dtype": "float32", "device": "cpu", "versions": {}, "repeats": 1}
    header["machine"] = "a processor, 2 cores"
    report = benchmark_report.summary({**header, "seed": 0}, held)
    row = report["rows"][1]
    assert row["speedup"][0] == pytest.approx(5 / 4)
    assert row["speedup_with_prefill"][0] == pytest.approx(7 / 6)
    assert row["speedup_median"][0] == pytest.approx(1.5)
    # Two prompts are too few for an interval.
    assert row["tau"] == [2.0, None, None]
    assert row["acceptance_rate"][0] == 0.5
    assert row["identical"] == [1, 2]
    # Twelve tokens agree, and of the other text seven and the one that differs were compared.
    assert row["divergences_per_1000"] == pytest.approx(1000 / 20)
    assert row["memory_overhead"] == pytest.approx(0.5)
    assert row["predicted_speedup"] == pytest.approx(1.5)
    assert "1 of 2 texts part from plain decoding's" in benchmark_report.text(report)
    assert report["commits"] == ["c"]
    # Prompts that were timed together are one measurement.
    many = [record(prompt, method, 1.0, 2.0) for prompt in "abcde" for method in ("plain", "own")]
    row = benchmark_report.summary({**header, "seed": 0}, many)["rows"][1]
    assert row["speedup"] == [2.0, 2.0, 2.0]
    # What has no prediction has no part in it; costs are those of most tokens.
    near, far = ({"draft": 0.1, "passes": [[1, v]], "overhead": 0.0} for v in (1.0, 2.0))
    some = [one | {"cost": near if one["unit"] in "ab" else far} for one in many]
    some[1] |= {"predicted_speedup": None, "cost": None}
    row = benchmark_report.summary({**header, "seed": 0}, some)["rows"][1]
    assert row["predicted_speedup"] == pytest.approx(1.5) and row["cost"] == far
    together = [one | {"batch_of": "a", "batch": 5} for one in many]
    row = benchmark_report.summary({**header, "seed": 0}, together)["rows"][1]
    assert row["speedup"][1:] == [None, None] and row["tau"][1] is not None


def test_a_report_of_recorded_results_stays_as_it_is():
    """Eleven conversations that were measured on the real model; `markdown` wrote the report."""
    folder = pathlib.Path(__file__).parent / "golden"
    header, held = records.read(folder / "benchmark.jsonl")
    made = benchmark_report.markdown(benchmark_report.summary(header, held, left_out=1))
    assert made == (folder / "benchmark.md").read_text(encoding="utf-8")
