"""Fixtures: the real model, and writers of tiny checkpoints that tests then damage."""

import json
import pathlib

import numpy as np
import pytest

from specjax import models

TINY = models.TransformerConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    context_length=64,
)


@pytest.fixture
def tiny():
    """A configuration whose head size is not hidden size / heads, so that mixing them up shows."""
    return TINY


@pytest.fixture
def write_gguf(tmp_path):
    """Returns `write(params, **changes) -> path`, a GGUF file of TINY."""
    gguf = pytest.importorskip("gguf")

    def write(
        tensors: dict, name: str = "tiny.gguf", arch: str = "llama", metadata=None
    ) -> pathlib.Path:
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, arch)
        numbers = {
            f"{arch}.block_count": TINY.num_layers,
            f"{arch}.context_length": TINY.context_length,
            f"{arch}.embedding_length": TINY.hidden_size,
            f"{arch}.feed_forward_length": TINY.intermediate_size,
            f"{arch}.attention.head_count": TINY.num_heads,
            f"{arch}.attention.head_count_kv": TINY.num_kv_heads,
            f"{arch}.attention.key_length": TINY.head_size,
            f"{arch}.attention.value_length": TINY.head_size,
            f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        }
        for key, value in {**numbers, **(metadata or {})}.items():
            if isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif value is not None:
                writer.add_array(key, value)
        for tensor, values in tensors.items():
            if isinstance(values, tuple):
                packed, kind = values
                writer.add_tensor(tensor, packed, raw_dtype=kind)
            else:
                writer.add_tensor(tensor, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture
def write_folder(tmp_path):
    """Returns `write(config, tensors, parts=1) -> folder`, a Hugging Face folder."""
    safetensors = pytest.importorskip("safetensors.numpy")

    def write(config: dict, tensors: dict, parts: int = 1) -> pathlib.Path:
        folder = tmp_path / "folder"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        if parts == 1:
            safetensors.save_file(tensors, folder / "model.safetensors")
            return folder
        placed = {name: f"part-{index % parts}.safetensors" for index, name in enumerate(tensors)}
        for part in set(placed.values()):
            held = {name: tensors[name] for name in tensors if placed[name] == part}
            safetensors.save_file(held, folder / part)
        index = {"metadata": {}, "weight_map": placed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return write


@pytest.fixture
def random_tensors():
    """Returns `draw(shapes) -> tensors`, float32 with standard deviation 0.1."""

    def draw(shapes: dict) -> dict:
        generator = np.random.default_rng(0)
        return {
            name: (0.1 * generator.standard_normal(shape)).astype(np.float32)
            for name, shape in shapes.items()
        }

    return draw
