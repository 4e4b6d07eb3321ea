"""The profile: floors as counted by hand, a report that is whole, and bad input in one line."""

import dataclasses
import functools
import json
import logging
import types as python_types

import jax
import pytest
from absl.testing import flagsaver

import specjax
from experiments import (
    binary,
    floors,
    measure,
    process,
    profile,
    profile_parts,
    profile_table,
)
from specjax import checkpoints, decoding, drafters, models, trees, verification
from specjax.models import transformer

COUNTED = models.TransformerConfig(
    vocab_size=10,
    hidden_size=4,
    intermediate_size=6,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_size=2,
    context_length=64,
)
TINY = models.TransformerConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_size=4,
    context_length=512,
)
SMALL = dataclasses.replace(
    profile_parts.QUICK,
    model="tiny",
    draft="layers:1",
    draft_length=3,
    widths=(1, 4),
    capacities=(40, 64),
    fills=(24, 48),
    repeats=1,
    read_bytes=100_000,
    matmul_side=16,
)


@pytest.fixture(scope="module")
def target():
    params = transformer.init_params(TINY, jax.random.key(0))
    return transformer.language_model(TINY, params)


@pytest.fixture
def call(monkeypatch, target, capsys):
    """Runs the binary in this process, with a tiny random model under the name `tiny`."""
    stub = python_types.SimpleNamespace(eos_ids=())
    tiny = checkpoints.Bundle("tiny", target, stub, TINY)  # pyright: ignore[reportArgumentType]
    load = specjax.load
    monkeypatch.setattr(specjax, "load", lambda name: tiny if name == "tiny" else load(name))
    monkeypatch.setattr(profile_parts, "QUICK", SMALL)
    jax_logger = logging.getLogger("jax")
    before = jax_logger.level

    def run(*arguments):
        with flagsaver.flagsaver():
            code = 0
            try:
                profile.main(binary.parse_flags(["profile", "--model=tiny", "--quick", *arguments]))
            except SystemExit as end:
                code = end.code
        return (code, *capsys.readouterr())

    yield run
    jax_logger.setLevel(before)


# Floors.


def test_parameters_are_counted_once():
    # A layer: 4·4 + 2·(4·2) + 4·4 of attention, 3·(4·6) of feed-forward, two norms of 4.
    assert floors.parameters(COUNTED) == 2 * 128 + 10 * 4 + 4
    untied = dataclasses.replace(COUNTED, tied_embeddings=False)
    assert floors.parameters(untied) == floors.parameters(COUNTED)
    biased = dataclasses.replace(COUNTED, qkv_bias=True)
    assert floors.parameters(biased) == floors.parameters(COUNTED) + 2 * (4 + 2 + 2)


def test_bytes_and_operations():
    assert floors.weight_bytes(COUNTED, 4) == 1200
    assert floors.weight_bytes(COUNTED, 4, laws=0) == 1200 - 4 * 40
    assert floors.weight_bytes(COUNTED, 4, laws=1) == 1200
    assert floors.cache_bytes(COUNTED, 5, 4) == 2 * 2 * 1 * 2 * 5 * 4
    # Three tokens after five see 6 + 7 + 8 = 21 places; 2 layers, 2 heads of 2, 4 operations each.
    attention = 4 * 2 * 2 * 2 * 21
    assert floors.flops(COUNTED, 3, 5) == 2 * 300 * 3 + attention
    assert floors.flops(COUNTED, 3, 5, laws=0) == 2 * 260 * 3 + attention
    assert floors.flops(COUNTED, 3, 5, laws=1) == 2 * (260 * 3 + 40) + attention


def test_the_longer_of_reading_and_computing():
    machine = floors.Machine(bytes_per_second=100.0, flops_per_second=10.0)
    assert floors.seconds(1000, 50, machine) == pytest.approx(10.0)
    assert floors.seconds(1000, 200, machine) == pytest.approx(20.0)


# Measuring.


def test_variants_take_turns_and_prepare_off_the_clock():
    calls = []

    def variant(name):
        def prepare():
            calls.append(f"prepare {name}")
            return (name,)

        return measure.Variant(lambda given: calls.append(f"run {given}"), prepare)

    told = []
    variants = {name: variant(name) for name in "ab"}
    times = measure.interleave(variants, 3, told.append, settling=0.0)
    one_round = ["prepare a", "run a", "prepare b", "run b"]
    assert calls == 5 * one_round
    assert len(told) == 1 and told[0] >= 0
    for seconds in times.values():
        assert 0 <= seconds.min <= seconds.median <= seconds.max


def test_variants_run_before_they_are_timed():
    runs = []
    variant = measure.Variant(lambda: runs.append(0))
    measure.interleave({"one": variant}, 2, settling=0.01)
    assert len(runs) > 2 + 2 * 2


def test_long_variants_need_no_settling(monkeypatch):
    clock, runs = [0.0], {0.05: 0, 0.5: 0}
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def run(seconds):
        clock[0] += seconds
        runs[seconds] += 1

    told = []
    variants = {seconds: measure.Variant(functools.partial(run, seconds)) for seconds in runs}
    measure.interleave(variants, 3, told.append, settling=0.04)
    assert runs == {0.05: 2 + 3 * 2, 0.5: 2 + 3}
    assert told[0] == pytest.approx(3 * (2 * 0.05 + 0.5))


def test_seconds_are_those_of_one_time(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def run():
        clock[0] += 6.0

    times = measure.interleave({"one": measure.Variant(run, times=3)}, 2, settling=0.0)
    assert times["one"] == measure.Seconds(2.0, 2.0, 2.0)


def test_a_variant_runs_as_many_passes_as_it_says(target):
    passes = []

    def counted(params, tokens, *rest):
        jax.debug.callback(lambda: passes.append(tokens.shape))
        return target.apply(params, tokens, *rest)

    counting = dataclasses.replace(target, apply=counted)
    variant = measure.forward(counting, 3, 5, target.init_cache(1, 32))
    jax.block_until_ready(variant.run())
    jax.effects_barrier()
    assert passes == variant.times * [(1, 3)] and variant.times > 1


def test_bandwidth_reads_what_it_says():
    assert measure.read_size(540_000_000) <= 540_000_000
    variant = next(iter(measure.bandwidth_forms(100_000).values()))
    assert float(variant.run()) == measure.read_size(100_000) / 4


def test_a_pass_sees_the_fill(target):
    """Other fills, other positions: the length is the one asked for, whatever the cache says."""
    cache = target.init_cache(1, 32)
    tokens, (keys, _) = measure.forward(target, 3, 5, cache).run()
    assert tokens.shape == (1, 3) and keys[0].shape[1] == 3
    moved = measure.forward(target, 3, 6, cache).run()[1][0]
    assert not (keys[0] == moved[0]).all()
    tree = trees.branching((2,))
    assert measure.forward(target, 3, 5, cache, tree).run()[0].shape == (1, 3)


def test_the_loop_counts_its_passes(target):
    prompt = measure.copying_prompt(TINY.vocab_size, 40)
    assert prompt[:16] == prompt[16:32]
    plain = measure.loop(target, decoding.NOTHING, prompt, 6, 1)
    assert (plain["iterations"], plain["wide_iterations"], plain["tau"]) == (6, 0, 1.0)
    assert plain["fills"] == [39, 41, 44]
    found = measure.loop(target, drafters.prompt_lookup(3), prompt, 6, 1)
    assert 1 <= found["wide_iterations"] <= found["iterations"] <= 6
    for part in (plain, found):
        whole = part["seconds"]["median"] / part["iterations"]
        assert part["seconds_per_iteration"] == pytest.approx(whole)
        rest = whole - part["pass_seconds_per_iteration"]
        assert part["overhead_seconds"] == pytest.approx(rest)
        assert part["overhead"] == pytest.approx(rest / whole)


def test_a_process_knows_its_age_and_memory():
    age, memory = process.seconds_since_start(), process.peak_memory()
    assert age is None or 0 < age < 1e6
    assert memory is None or memory > 10_000_000


# The report.


def check_seconds(value):
    """Every triple of seconds or rates in a report is in order, and positive."""
    if isinstance(value, dict):
        if value.keys() >= {"median", "min", "max"}:
            assert 0 < value["min"] <= value["median"] <= value["max"]
        for item in value.values():
            check_seconds(item)
    elif isinstance(value, list):
        for item in value:
            check_seconds(item)


def test_the_report_is_whole(call):
    code, output, errors = call("--json")
    assert code == 0, errors
    report = json.loads(output.splitlines()[-1])
    check_seconds(report)
    assert report["backend"] == jax.default_backend()
    assert report["dtype"] == "float32" and report["cores"] >= 1
    assert report["versions"].keys() == {"specjax", "python", "jax", "jaxlib"}
    assert report["config"]["widths"] == [1, 4]

    machine = report["machine"]
    assert machine["best_form"] in machine["forms"]
    passes = report["width"]["passes"]
    assert [row["tokens"] for row in passes] == [1, 4]
    assert min(row["plain_steps"] for row in passes) == 1
    limits = floors.Machine(machine["bytes_per_second"]["max"], machine["flops_per_second"]["max"])
    for row in passes:
        read = floors.weight_bytes(TINY, 4) + floors.cache_bytes(TINY, report["width"]["fill"], 4)
        operations = floors.flops(TINY, row["tokens"], report["width"]["fill"])
        assert (row["bytes"], row["flops"]) == (read, operations)
        assert row["floor_seconds"] == floors.seconds(read, operations, limits)

    places = {(row["capacity"], row["fill"]) for row in report["capacity"]}
    assert places == {(40, 24), (64, 24), (64, 48)}
    assert len(report["capacity"]) == 3 * len(places)
    first = report["capacity"][:3]
    assert [row["ratio_to_first"] for row in first] == [1, 1, 1]

    drafting = report["drafting"]
    assert drafting["draft_step_in_target_steps"] == pytest.approx(
        drafting["draft_step_seconds"]["median"] / drafting["target_step_seconds"]["median"]
    )
    assert drafting["proposals"].keys() == {"prompt_lookup", "model"}
    rules = {(row["law"], row["rule"]) for row in report["verification"]["rules"]}
    assert len(rules) == 2 * len(verification.RULES)
    assert {rule for _, rule in rules} == set(verification.RULES)
    assert report["loop"].keys() == {"plain", "prompt_lookup"}
    assert [row["tokens"] for row in report["prefill"]] == [24]
    assert report["start"]["kernels_seconds"] >= 0
    assert report["start"]["programs"] > 0 and report["start"]["first_token_phases"]["trace"] > 0
    assert min(report["program"][f"{name}_seconds"] for name in ("trace", "lower", "compile")) > 0
    # With --json the table goes where it does not disturb, behind the progress of every part.
    assert "[1/8] machine" in errors and errors.rstrip().endswith("MB")

    table = profile_table.table(report)
    for title in ("a pass by width", "a pass by capacity", "drafts of 3", "the compiled loop"):
        assert title in table
    assert table in errors


class Counted(profile_parts.Job):
    """A job whose clock counts: the nth thing of an alternation takes n seconds."""

    def time(self, variants):
        self.names = list(variants)
        return {name: measure.Seconds(n, n, n) for n, name in enumerate(variants, start=1)}


def test_figures_are_made_of_the_right_seconds(target):
    stub = python_types.SimpleNamespace(eos_ids=())
    tiny = checkpoints.Bundle("tiny", target, stub, TINY)  # pyright: ignore[reportArgumentType]
    job = Counted(SMALL, tiny, drafters.prompt_lookup(3), drafters.model(target, 3))
    job.machine()
    # The third way of reading took 3 seconds, the product 4; the first is the quickest.
    assert job.limits.bytes_per_second == measure.read_size(SMALL.read_bytes)
    assert job.limits.flops_per_second == 2 * SMALL.matmul_side**3 / 4
    job.limits = limits = floors.Machine(1000.0, 2000.0)

    width = job.width()
    assert [row["plain_steps"] for row in width["passes"]] == [1, 2]
    capacity = job.capacity()
    assert [row["ratio_to_first"] for row in capacity] == [1, 1, 1, 4, 5 / 2, 2, 7, 4, 3]
    drafting = job.drafting()
    assert job.names == ["target step", "draft step", "prompt_lookup", "model"]
    assert drafting["draft_step_in_target_steps"] == 2
    steps = {name: part["target_steps"] for name, part in drafting["proposals"].items()}
    assert steps == {"prompt_lookup": 3, "model": 4}
    verification = job.verification()
    assert verification["nodes"] == 4 and verification["pass_seconds"]["median"] == 1
    assert [row["passes"] for row in verification["rules"]] == [
        row["seconds"]["median"] for row in verification["rules"]
    ]
    assert [(row["law"], row["rule"]) for row in verification["rules"]] == job.names[1:]
    (prefill,) = job.prefill()
    assert prefill["seconds_per_token"] == 1 / 24
    assert prefill["first_token_seconds"]["median"] == 2
    # The last token is left to the first step, and no logits are asked for.
    assert prefill["bytes"] == floors.weight_bytes(TINY, 4, laws=0)
    assert prefill["flops"] == floors.flops(TINY, 23, 0, laws=0)
    assert prefill["floor_seconds"] == floors.seconds(prefill["bytes"], prefill["flops"], limits)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--widths=1,x"], "--widths=1,x"),
        (["--widths=0"], "--widths=(0,)"),
        (["--capacities="], "--capacities"),
        (["--capacities=32", "--fills=32"], "--fills=(32,)"),
        (["--repeats=0"], "--repeats=0"),
        (["--draft_length=0"], "--draft_length=0"),
        (["--prompt_length=3"], "--prompt_length=3"),
        (["--model=smollm3"], "smollm3"),
        (["hello"], "'hello'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_ends_in_one_line(call, arguments, named):
    code, output, errors = call(*arguments)
    assert code == 2 and output == ""
    assert errors.splitlines()[-1].startswith("error: ") and named in errors.splitlines()[-1]
    assert "Traceback" not in errors
