"""Rotary frequencies against Hugging Face's: recorded, and live where it is installed."""

import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import models
from specjax.models import rotary

HERE = pathlib.Path(__file__).parent
RECORDS = {case["name"]: case for case in json.loads((HERE / "golden/rotary.json").read_text())}
# Hugging Face's name of a field, and ours.
FIELDS = {
    "rope_type": "kind",
    "factor": "factor",
    "original_max_position_embeddings": "original_context",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "beta_fast": "fast_rotations",
    "beta_slow": "slow_rotations",
    "attention_factor": "attention_factor",
}


def configuration(case):
    scaling = {FIELDS[name]: value for name, value in case["rope"].items()}
    return models.TransformerConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_size=case["head_size"],
        context_length=case["context"],
        rotary_base=case["base"],
        rotary_scaling=models.RotaryScaling(**scaling) if scaling else None,
    )


def assert_agrees(case, frequencies, factor):
    found, found_factor = rotary.frequencies(configuration(case))
    assert found.dtype == np.float32
    # transformers computes in float32 throughout.
    np.testing.assert_allclose(found, frequencies, rtol=2e-5)
    assert abs(found_factor - factor) < 1e-6


@pytest.mark.parametrize("name", RECORDS)
def test_recorded_frequencies(name):
    case = RECORDS[name]
    assert_agrees(case, case["frequencies"], case["factor"])


def test_recorded_cases_differ():
    kinds = {case["rope"].get("rope_type", "default") for case in RECORDS.values()}
    assert kinds == {"default", "linear", "llama3", "yarn"}


@pytest.mark.parametrize("name", RECORDS)
def test_live_frequencies(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("golden", HERE / "make_rotary_golden.py")
    assert spec is not None and spec.loader is not None
    golden = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(golden)
    frequencies, factor = golden.frequencies(RECORDS[name])
    assert_agrees(RECORDS[name], frequencies, factor)


def test_scores_depend_on_distance_alone():
    config = configuration(RECORDS["default"])
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 3, 64))

    def score(at, before):
        where = jnp.asarray([[at]], jnp.int32), jnp.asarray([[before]], jnp.int32)
        turned = rotary.rotate(query, *rotary.tables(config, where[0]))
        return jnp.sum(turned * rotary.rotate(key, *rotary.tables(config, where[1])), axis=-1)

    np.testing.assert_allclose(score(105, 100), score(5, 0), atol=1e-3)
    assert np.abs(np.asarray(score(106, 100) - score(5, 0))).max() > 0.1
    np.testing.assert_allclose(score(7, 7), jnp.sum(query * key, axis=-1), atol=1e-4)
