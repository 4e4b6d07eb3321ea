"""SmolLM2's logits against PyTorch's: recorded, and live where it is installed."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from specjax.checkpoints import fetch

GOLDEN = pathlib.Path(__file__).parent / "golden" / "logits.json"
CASES = {case["name"]: case for case in json.loads(GOLDEN.read_text())}
TOLERANCE = 2e-3


def forward(model, tokens):
    """Logits [T, V] of one text in one pass."""
    output, _ = model.apply(
        model.params, jnp.asarray([tokens], jnp.int32), model.init_cache(1, 8), None, ()
    )
    return np.asarray(output.logits[0])


@pytest.mark.parametrize("name", CASES)
def test_recorded_logits(smollm2, name):
    case = CASES[name]
    logits = forward(smollm2.target, case["tokens"])
    recorded = np.asarray(case["logits"], np.float32)
    assert np.abs(logits[case["positions"]][:, case["ids"]] - recorded).max() <= TOLERANCE
    differing = np.flatnonzero(logits.argmax(-1) != np.asarray(case["argmax"]))
    gaps = [case["gap"][position] for position in differing]
    assert not gaps, f"argmax differs at {differing}, where the two best lie {gaps} apart"


def test_recorded_texts_are_long_and_not_near_ties():
    lengths = [len(case["tokens"]) for case in CASES.values()]
    assert lengths == [20, 100, 300, 600, 1000]
    # The tolerance of the comparison must not be able to flip an argmax more than once in a while.
    gaps = np.concatenate([case["gap"] for case in CASES.values()])
    assert np.mean(gaps < 2 * TOLERANCE) < 0.001


def test_live_logits(smollm2):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    path = fetch.smollm2()
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    for tokens in (CASES["code"]["tokens"], CASES["talk"]["tokens"][300:500]):
        with torch.no_grad():
            expected = peer(torch.tensor([tokens])).logits[0].numpy()
        logits = forward(smollm2.target, tokens)
        assert np.abs(logits - expected).max() <= TOLERANCE
        np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))
