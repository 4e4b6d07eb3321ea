"""Writes golden/rotary.json, without any code of specjax: rotary frequencies by transformers.

Run it where torch and transformers are installed:

    python tests/models/make_rotary_golden.py
"""

import importlib
import json
import pathlib

GOLDEN = pathlib.Path(__file__).parent / "golden" / "rotary.json"

# `rope` is written as in a Hugging Face config.json.
CASES = {
    "default": {"head_size": 64, "base": 100000.0, "context": 8192, "rope": {}},
    "linear": {
        "head_size": 32,
        "base": 10000.0,
        "context": 8192,
        "rope": {"rope_type": "linear", "factor": 4.0},
    },
    "llama3": {
        "head_size": 128,
        "base": 500000.0,
        "context": 131072,
        "rope": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "yarn": {
        "head_size": 128,
        "base": 1000000.0,
        "context": 131072,
        "rope": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
    },
    "yarn with a band of its own": {
        "head_size": 64,
        "base": 10000.0,
        "context": 65536,
        "rope": {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 20.0,
            "beta_slow": 2.0,
            "attention_factor": 0.75,
        },
    },
}


def frequencies(case: dict) -> tuple[list[float], float]:
    """Angular frequencies and the factor on cosines and sines, by transformers."""
    transformers = importlib.import_module("transformers")
    llama = importlib.import_module("transformers.models.llama.modeling_llama")
    config = transformers.LlamaConfig(
        hidden_size=4 * case["head_size"],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=case["head_size"],
        num_hidden_layers=1,
        intermediate_size=8,
        vocab_size=8,
        max_position_embeddings=case["context"],
        rope_parameters={"rope_type": "default", "rope_theta": case["base"], **case["rope"]},
    )
    rotary = llama.LlamaRotaryEmbedding(config)
    return rotary.inv_freq.double().tolist(), float(rotary.attention_scaling)


def main():
    records = []
    for name, case in CASES.items():
        values, factor = frequencies(case)
        records.append({"name": name, **case, "frequencies": values, "factor": factor})
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(records) + "\n")


if __name__ == "__main__":
    main()
