"""What steps cost: that costs are what was timed, in plain steps, of what they say."""

from experiments import measure, methods, step_costs, targets
from specjax import decoding


def test_costs_are_in_plain_steps(monkeypatch):
    seconds: dict = {1: 1.5, 2: 2.75, 4: 2.25, 6: 4.0, 9: 5.0}
    seconds |= {"plain": 2.0, ("draft", ""): 1.5, ("step", ""): 6.5}

    def interleave(variants, repeats):
        assert variants.keys() == seconds.keys() and repeats > 1
        return {name: measure.Seconds(took, took, took) for name, took in seconds.items()}

    monkeypatch.setattr(measure, "interleave", interleave)
    bundle = targets.tiny()
    drafter = methods.build("model", bundle, methods.Settings(3, "layers:2"))
    costs, plain = step_costs.of_all(bundle.target, {"": drafter})
    passes = ((1, 0.75), (2, 1.25), (4, 1.25), (6, 2.0), (9, 2.5))
    cost = decoding.Cost(0.25, passes, overhead=3.25 - 3 * 0.25 - 1.25)
    assert plain == 2.0 and costs[""] == cost
    seconds["step", ""] = 1.0
    assert step_costs.measured(bundle.target, drafter).overhead == 0


def test_timed_steps_are_as_many_as_timed_passes():
    bundle = targets.tiny()
    drafter = methods.build("model", bundle, methods.Settings(3, "layers:2"))
    prompt = measure.copying_prompt(bundle.config.vocab_size, 20)
    begun = measure.begin(bundle.target, drafter, prompt, passes=5)
    variant = measure.steps(bundle.target, drafter, *begun, 5)
    assert variant.times == 5
    for _ in range(2):
        length, counts = variant.run(*variant.prepare())
        assert int(counts.target_steps[0]) == variant.times
        assert int(counts.nodes_drafted[0]) == 3 * variant.times
        assert int(length[0]) == 20 + int(counts.emitted[0])
