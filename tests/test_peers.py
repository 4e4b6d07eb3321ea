"""Engines side by side: they take turns, what cannot run is skipped, and a stopped run goes on."""

import dataclasses
import json

import pytest

import specjax
from experiments import (
    peer_llama,
    peer_protocol,
    peer_report,
    peer_weights,
    peer_workers,
    peers,
    prompt_files,
    targets,
)

# Answers count the decodes of a method; what was asked goes to a file, in the order of asking.
FAKE = """
import os, pathlib, sys
from experiments import peer_protocol

class Fake:
    def __init__(self, settings):
        if sys.argv[1] == "broken":
            raise ImportError("no library\\nto speak of")
        print("this library greets everybody")
        self.settings, self.decodes = settings, {}

    def decode(self, request):
        if request.method == "refused":
            raise ValueError("cannot do that")
        if request.method == "fatal":
            print("out of luck", file=sys.stderr, flush=True)
            os._exit(3)
        count = self.decodes[request.method] = self.decodes.get(request.method, 0) + 1
        with pathlib.Path(sys.argv[2]).open("a") as log:
            log.write(f"{sys.argv[1]}:{request.method} {len(request.tokens)}\\n")
        return peer_protocol.Answer(
            [count, self.settings["threads"], len(self.settings["cores"])], 1.0, 1, 2.0, 2
        )

def load(settings):
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [0]
    return Fake({**settings, "cores": list(cores)})

peer_protocol.serve(load)
"""


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    """Two engines, `one` and `two`, one that is not installed and one that does not start."""
    script, log = tmp_path / "fake.py", tmp_path / "log"
    script.write_text(FAKE)
    log.touch()
    takes: dict[str, str | None] = dict.fromkeys(("plain", "quick", "refused", "fatal"))

    def engine(name: str, needs: dict[str, str]) -> peer_workers.Engine:
        command = (str(script), name, str(log))
        return peer_workers.Engine(command, needs, takes, ("plain", "quick"))

    monkeypatch.setattr(
        peer_workers,
        "ENGINES",
        {
            "one": engine("one", {"numpy": "numpy"}),
            "two": engine("two", {}),
            "absent": engine("absent", {"no_such_module": "no-such-package"}),
            "broken": engine("broken", {}),
        },
    )
    monkeypatch.setattr(peer_workers, "_SETTLING_SECONDS", 0.0)

    def decodes() -> list[str]:
        """What was decoded since the last call."""
        told = log.read_text().splitlines()
        log.write_text("")
        return told

    return decodes


@pytest.fixture
def configure(tmp_path):
    """A run of fakes on `tiny`."""
    prompts = tmp_path / "prompts.jsonl"
    said = [{"role": "system", "content": "Sing."}, {"role": "user", "content": "abcd"}]
    lines = [{"turns": ["ab"], "group": "g"}, {"messages": said, "group": "g"}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def made(engines: str, **others) -> peers.Config:
        asked = {
            **{"model": "tiny", "draft": None, "prompts": (str(prompts),), "count": None},
            **{"longest_prompt": 100, "max_new_tokens": 8, "repeats": 2, "threads": 1},
            **{"folder": str(tmp_path / "weights")},
            **others,
        }
        return peers.Config(programs=peer_workers.programs_of(engines.split(",")), **asked)

    return made


# Taking turns.


def test_engines_take_turns():
    order = [str(program) for program in peer_workers.programs_of(list(peer_workers.ENGINES))]
    assert order == [
        "specjax:plain",
        "transformers:plain",
        "llama.cpp:plain",
        "specjax:prompt_lookup",
        "transformers:prompt_lookup",
        "llama.cpp:prompt_lookup",
        "specjax:draft",
        "transformers:assisted",
        "transformers:early_exit",
    ]


def test_every_program_is_warm_and_asked_in_turn(fakes, configure):
    config = configure("one,two:plain", threads=1)
    report = peers.run(config)
    turn = ["one:plain", "two:plain", "one:quick"]
    asked = [prompt.asked() for prompt in prompt_files.read(*config.prompts)]
    lengths = [len(targets.tiny().chat(messages)) for messages in asked]
    assert lengths[1] > len(targets.tiny().chat("abcd"))
    wanted = []
    for length in lengths:
        # The first run of each is off the clock.
        wanted += [f"{name} {length}" for name in turn for _ in range(2)]
        wanted += [f"{name} {length}" for name in turn]
    assert fakes() == wanted
    assert [(row["engine"], row["method"]) for row in report["rows"]] == [
        ("one", "plain"),
        ("one", "quick"),
        ("two", "plain"),
    ]
    assert not report["skipped"]
    for row in report["rows"]:
        assert row["prompts"] == 2
        # Three tokens in three seconds, two of them in the last two; two steps.
        assert row["tokens_per_second"]["with_prefill"]["median"] == 1.0
        assert row["tokens_per_second"]["after_prefill"]["median"] == 1.0
        assert row["tau"] == 1.0
    # Each decode's first token is another, so that only the first prompt's first is the reference.
    assert report["rows"][1]["first_divergence"]["position"] == 0


def test_workers_are_told_their_threads_and_have_as_many_cores(fakes, configure):
    del fakes
    config = configure("one:plain")
    with peer_workers.Workers({"one": {"ends": []}}, 1, {}) as workers:
        answer = workers.ask(config.programs[0], [1, 2], 8)
    assert answer == peer_protocol.Answer([2, 1, 1], 1.0, 1, 2.0, 2)


def test_tokens_behind_an_end_are_not_counted(fakes, configure, tmp_path):
    del fakes
    bundle = targets.tiny()
    ended = dataclasses.replace(bundle.target, eos_ids=(1,))
    out = tmp_path / "out.jsonl"
    config = configure("one:plain", repeats=1, out=str(out))
    peers.run(config, dataclasses.replace(bundle, target=ended))
    _, first, second = map(json.loads, out.read_text().splitlines())
    assert first["new_tokens"] == [2, 1]
    assert second["new_tokens"] == [4, 1]


# What does not run.


def test_what_cannot_run_is_skipped_with_its_reason(fakes, configure):
    asked = "one,two:plain,two:fatal,one:refused,absent,broken"
    report = peers.run(configure(asked, repeats=1))
    assert report["skipped"] == {
        "absent": "not installed: no-such-package (python -m pip install 'specjax[peers]')",
        "broken": "ImportError: no library to speak of",
        "one:refused": "ValueError: cannot do that",
        "two": "its process ended with code 3 (out of luck)",
    }
    assert {(row["engine"], row["method"]) for row in report["rows"]} == {
        ("one", "plain"),
        ("one", "quick"),
    }
    # An engine that has ended is not asked again; what it had done, one run and one off the clock,
    # is not held against what others did.
    assert [line.split()[0] for line in fakes() if "two" in line] == ["two:plain"] * 2
    told = peer_report.markdown(report)
    for name, reason in report["skipped"].items():
        assert f"Skipped: {name}: {reason}" in told
    assert "two" not in report["versions"] and "numpy" in report["versions"]["one"]


def test_a_report_of_nothing_still_tells_why(fakes, configure):
    del fakes
    report = peers.run(configure("absent"))
    assert report["rows"] == []
    assert "no-such-package" in peer_report.text(report)
    json.dumps(report, allow_nan=False)


def test_a_target_of_another_form_is_not_for_every_engine(tmp_path):
    with pytest.raises(ValueError, match="'tiny' does not come from a GGUF file"):
        peer_weights.written("llama.cpp", targets.tiny(), tmp_path)


# Going on.


def test_a_run_that_was_killed_goes_on(fakes, configure, tmp_path):
    out = tmp_path / "out.jsonl"
    config = configure("one:plain,two:plain", out=str(out))
    whole = peers.run(config)
    fakes()
    assert peers.run(config)["rows"] == whole["rows"]
    assert fakes() == []
    lines = out.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * 2 * 2
    *_, last = prompt_files.read(*config.prompts)
    length = len(targets.tiny().chat(last.asked()))
    # Cut in the last round's first line, and in its second: both are asked again, side by side.
    for cut in ("".join(lines[:-2]) + lines[-2][:30], "".join(lines[:-1]) + lines[-1][:30]):
        out.write_text(cut)
        again = peers.run(config)
        # One off the clock.
        assert fakes() == [f"{name}:plain {length}" for name in ("one", "one", "two", "two")]
        assert len(out.read_text().splitlines()) == len(lines)
        assert [row["prompts"] for row in again["rows"]] == [2, 2]
    # More of the same stands in the same file; of something else, nothing.
    peers.run(dataclasses.replace(config, repeats=3))
    assert len(fakes()) == 2 * 2 * 2
    with pytest.raises(ValueError, match="its max_new_tokens is 8, and 9 is asked for"):
        peers.run(dataclasses.replace(config, max_new_tokens=9))


def test_what_is_compared_was_measured_together(fakes, configure, tmp_path, monkeypatch):
    out = str(tmp_path / "out.jsonl")
    peers.run(configure("one:plain", repeats=1, out=out))
    with pytest.raises(ValueError, match="its programs is"):
        peers.run(configure("one:plain,two:plain", repeats=1, out=out))
    monkeypatch.setattr(peer_workers.Engine, "version", "numpy 0")
    with pytest.raises(ValueError, match="its versions is"):
        peers.run(configure("one:plain", repeats=1, out=out))
    assert len(fakes()) == 4


# Input.


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--engines=vllm"], "unknown engine 'vllm'"),
        (["--engines=llama.cpp:assisted"], "unknown method 'assisted'"),
        (["--engines=specjax:guess"], "unknown method 'guess'"),
        (["--engines=transformers:prompt_lookup draft_length=0"], "draft_length=N, at least 1"),
        (["--engines=transformers:prompt_lookup layers=2"], "draft_length=N"),
        (["--engines=transformers:plain draft_length=2"], "takes no setting"),
        (["--engines=specjax,specjax:plain"], "each method once"),
        (["--engines="], "give some"),
        (["--threads=0"], "--threads=0"),
        (["--threads=100000"], "--threads=100000"),
        (["--repeats=0"], "--repeats=0"),
        (["--max_new_tokens=0"], "--max_new_tokens=0"),
        (["--prompts=no/such.jsonl"], "no/such.jsonl"),
        (["--temperature=1"], "--temperature means nothing"),
        (["--model=tiny", "--draft=no/such.safetensors"], "no/such.safetensors"),
        (["--model=tiny", "--longest_prompt=1"], "more than 1 tokens"),
    ],
)
def test_bad_input_ends_in_one_line(call, arguments, named):
    code, _, told = call(peers, *arguments)
    assert code == 2
    assert named in told.splitlines()[-1] and told.splitlines()[-1].startswith("error: ")


def test_settings_are_read():
    asked = "specjax:draft  draft_length=3,llama.cpp:prompt_lookup draft_length=2".split(",")
    programs = peer_workers.programs_of(asked)
    assert [str(p) for p in programs] == ["specjax:draft draft_length=3", asked[1]]
    assert peer_protocol.parse(programs[1].method, peer_llama.METHODS) == ("prompt_lookup", 2)


def test_specjax_runs_beside_what_is_there(call, configure, tmp_path, monkeypatch):
    """In earnest, on random weights: the worker's texts are those of this process."""
    config = configure("specjax:plain")
    monkeypatch.setitem(
        peer_workers.ENGINES,
        "llama.cpp",
        dataclasses.replace(peer_workers.ENGINES["llama.cpp"], needs={}),
    )
    out, report = tmp_path / "out.jsonl", tmp_path / "report.md"
    code, _, told = call(
        peers,
        "--model=tiny",
        "--engines=specjax:plain,specjax:prompt_lookup,llama.cpp",
        f"--prompts={config.prompts[0]}",
        f"--folder={config.folder}",
        f"--out={out}",
        f"--report={report}",
        "--max_new_tokens=8",
        "--threads=1",
        "--repeats=1",
        "--json",
    )
    assert code == 0, told
    assert "'tiny' does not come from a GGUF file" in report.read_text()
    _, *made = map(json.loads, out.read_text().splitlines())
    assert {one["method"] for one in made} == {"plain", "prompt_lookup"} and len(made) == 4
    bundle = targets.tiny()
    wanted = specjax.autoregressive(bundle.target, [bundle.chat("ab")], max_new_tokens=8)
    for one in made[:2]:
        assert one["new_tokens"] == wanted.new_tokens[0]
        assert one["prefill_tokens"] == 0 and one["prefill_seconds"] > 0 < one["seconds"]
        assert 1 <= one["target_steps"] <= len(one["new_tokens"])
    assert "| specjax | prompt_lookup |" in report.read_text()
