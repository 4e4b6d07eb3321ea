"""What steps cost: that costs are what was timed, in plain steps, of what they say."""

import jax
import pytest

from experiments import measure, methods, step_costs, targets
from specjax import decoding


@pytest.fixture
def seconds(monkeypatch):
    """What timing says, by what is timed; of one drafter, whose longest draft has three tokens."""
    told: dict = {1: 1.5, 2: 2.75, 4: 2.25, 5: 3.0, 7: 4.0, 9: 5.0}
    told |= {"plain": 2.0, ("draft", ""): 1.5, ("step", ""): 6.5}

    def interleave(variants, repeats):
        assert variants.keys() == told.keys() and repeats > 1
        return {name: measure.Seconds(took, took, took) for name, took in told.items()}

    monkeypatch.setattr(measure, "interleave", interleave)
    return told


def test_costs_are_in_plain_steps(seconds):
    bundle = targets.tiny()
    drafter = methods.build("model", bundle, methods.Settings(3, "layers:2"))
    costs, plain = step_costs.of_all(bundle.target, {"": drafter})
    passes = ((1, 0.75), (2, 1.25), (4, 1.25), (5, 1.5), (7, 2.0), (9, 2.5))
    cost = decoding.Cost(0.25, passes, overhead=(3.25 - 3 * 0.25 - 1.25) / 3)
    assert plain == 2.0 and costs[""].passes == passes and costs[""].draft == cost.draft
    assert costs[""].overhead == pytest.approx(cost.overhead)
    seconds["step", ""] = 1.0
    assert step_costs.measured(bundle.target, drafter).overhead == 0


def test_overhead_is_of_the_steps_that_drafted(seconds):
    """A lookup finds something at first, and nothing in what the target goes on with."""
    bundle = targets.tiny()
    lookup = methods.build("prompt_lookup", bundle, methods.Settings(3))
    begun = measure.begin(
        bundle.target, lookup, measure.copying_prompt(bundle.config.vocab_size, 160)
    )
    timed = measure.steps(bundle.target, lookup, *begun, 4)
    _, counts = timed.run(*timed.prepare())
    narrow, *_, wide = counts.drafted[0].tolist()
    assert narrow + wide == 4 and 0 < wide < 4
    cost = step_costs.measured(bundle.target, lookup)
    looked = 4 * 3 * 0.25
    beside = 4 * 3.25 - looked - narrow * 1.0 - wide * 1.25
    assert cost.overhead == pytest.approx(beside / (3 * wide))


def test_timed_steps_are_as_many_as_timed_passes():
    bundle = targets.tiny()
    drafter = methods.build("model", bundle, methods.Settings(3, "layers:2"))
    prompt = measure.copying_prompt(bundle.config.vocab_size, 20)
    request, _ = measure.begin(bundle.target, drafter, prompt, batch=2, temperature=0.8)
    first, second = jax.random.key_data(request.keys)
    assert (first == second).all(), "rows that are timed together are to be one"
    begun = measure.begin(bundle.target, drafter, prompt, passes=5)
    variant = measure.steps(bundle.target, drafter, *begun, 5)
    assert variant.times == 5
    for _ in range(2):
        length, counts = variant.run(*variant.prepare())
        assert int(counts.target_steps[0]) == variant.times
        assert int(counts.nodes_drafted[0]) == 3 * variant.times
        assert int(length[0]) == 20 + int(counts.emitted[0])
