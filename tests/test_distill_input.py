"""Bad input to the binaries about drafts: one line that names the value and the remedy."""

import pytest

from experiments import (
    acceptance,
    distill,
    domains,
    objectives,
    staleness,
    stopping,
)


@pytest.mark.parametrize(
    "module, flags, message",
    [
        (distill, [], "give --folder"),
        (distill, ["--folder=x", "--loss=no"], "--loss=no"),
        (distill, ["--folder=x", "--on_policy=2"], "--on_policy=2"),
        (distill, ["--folder=x", "--on_policy=0.01"], "--on_policy=0.01"),
        (distill, ["--folder=x", "--layers=a"], "--layers=a"),
        (distill, ["--folder=x", "--layers=4xb"], "as in 4x256"),
        (distill, ["--folder=x", "--layers=4x256", "--features=2"], "--features=2.0 compares"),
        (distill, ["--folder=x", "--candidates=2y3/4/5"], "4x256/704/8192"),
        (distill, ["--folder=x", "--candidates=1/2"], "write LAYERS/FEED_FORWARD/VOCABULARY"),
        (distill, ["--folder=x", "--devices=99"], "--devices=99"),
        (distill, ["--folder=x", "--domains=cooking"], "'cooking'"),
        (distill, ["--folder=x", "--steps=0"], "--steps=0"),
        (distill, ["--folder=x", "--accepted=1", "--on_policy=1"], "leave one of them out"),
        (distill, ["--model=tiny", "--folder=x", "--layers=0,45"], "the target has 4"),
        (distill, ["--model=tiny", "--folder=x", "--start_from=/nowhere"], "/nowhere"),
        (acceptance, ["--model=tiny", "--method=plain", "--longest_prompt=1"], "all 72 prompts"),
        (acceptance, ["--prompts=/nowhere"], "/nowhere"),
        (acceptance, ["--compare"], "--compare means nothing"),
        (acceptance, ["--draft_length=x"], "a whole number or `auto`"),
        (domains, ["--folder=x", "--domains=cooking"], "'cooking'"),
        (staleness, ["--folder=x", "--strengths=a"], "--strengths=a"),
        (objectives, ["--model=tiny", "--folder=x", "--draft=/nowhere"], "/nowhere"),
        (distill, ["--model=tiny", "--folder=x", "--prompts=/nowhere"], "/nowhere"),
        (distill, ["--folder=x", "--draft=y"], "--draft means nothing"),
        (staleness, ["--folder=x", "--max_new_tokens=7"], "--max_new_tokens means nothing"),
        (objectives, ["--folder=x", "--out=y"], "--out means nothing"),
        (stopping, ["--folder=x", "--steps=3"], "--steps means nothing"),
        (stopping, ["--model=tiny", "--folder=x", "--draft=/nowhere"], "/nowhere has no card"),
        (acceptance, ["--repeats=3"], "--repeats means nothing"),
        (distill, ["--folder=x", "--draft_length=0"], "--draft_length=0"),
        (distill, ["--model=tiny", "--folder=x", "--feed_forward=0"], "intermediate_size=0"),
        (distill, ["--model=tiny", "--folder=x", "--draft_vocabulary=999"], "vocabulary=999"),
        (distill, ["--model=tiny", "--folder=x", "--files=/nowhere"], "/nowhere"),
        (domains, ["--model=tiny", "--folder=x", "--prompts=/nowhere"], "/nowhere"),
        (staleness, ["--model=tiny", "--folder=x", "--files=/nowhere"], "/nowhere"),
        (distill, ["--folder=x", "--optimizer=sgd"], "--optimizer=sgd"),
        (
            distill,
            ["--model=tiny", "--folder=x", "--copying=1", "--layers=0"],
            "--copying=1.0 needs a draft of two layers",
        ),
    ],
)
def test_bad_input_is_one_line(call, module, flags, message):
    code, _, errors = call(module, *flags)
    assert code == 2 and message in errors.splitlines()[-1]
    assert errors.splitlines()[-1].startswith("error:")


def test_a_budget_too_small_says_how_long_it_would_take(call, tmp_path):
    flags = ["--model=tiny", f"--folder={tmp_path}", "--tokens=100000000", "--data_minutes=1"]
    code, _, errors = call(distill, *flags, "--batch=8", "--max_new_tokens=16")
    assert code == 2 and "do not fit the budget" in errors.splitlines()[-1]
