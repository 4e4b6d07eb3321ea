"""GGUF files: exact contents, and a clear refusal of every kind of damage."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import models
from specjax.checkpoints import gguf

LAYER = {
    "attn_norm.weight": (16,),
    "attn_q.weight": (32, 16),
    "attn_k.weight": (16, 16),
    "attn_v.weight": (16, 16),
    "attn_output.weight": (16, 32),
    "ffn_norm.weight": (16,),
    "ffn_gate.weight": (24, 16),
    "ffn_up.weight": (24, 16),
    "ffn_down.weight": (16, 24),
}
SHAPES = {"token_embd.weight": (40, 16), "output_norm.weight": (16,)}
SHAPES |= {f"blk.{i}.{name}": shape for i in range(2) for name, shape in LAYER.items()}


@pytest.fixture
def tensors(random_tensors):
    return random_tensors(SHAPES)


def interleaved(rows, heads):
    """Rows in the order of interleaved rotary positions, as a converter to GGUF writes them."""
    half = rows.shape[0] // heads // 2
    order = [h * 2 * half + r * half + i for h in range(heads) for i in range(half) for r in (0, 1)]
    return rows[np.asarray(order)]


def test_contents(write_gguf, tensors, tiny):
    sizes = {"q": 32, "k": 16, "v": 16}
    biases = {f"blk.{i}.attn_{n}.bias": sizes[n] for i in range(2) for n in sizes}
    extra = {name: np.arange(size, dtype=np.float32) for name, size in biases.items()}
    extra["output.weight"] = tensors["token_embd.weight"] + 1
    stored = {**tensors, **extra}
    for name, heads in (("attn_q", 4), ("attn_k", 2)):
        for index in range(2):
            for leaf in ("weight", "bias"):
                full = f"blk.{index}.{name}.{leaf}"
                stored[full] = interleaved(stored[full], heads)
    config, params, metadata = gguf.read(
        write_gguf(stored, metadata={"tokenizer.ggml.pre": "gpt-2"})
    )
    assert config == dataclasses.replace(tiny, tied_embeddings=False, qkv_bias=True)
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    attention = params["layers"][1]["attention"]
    np.testing.assert_array_equal(attention["query"]["kernel"], tensors["blk.1.attn_q.weight"])
    np.testing.assert_array_equal(attention["key"]["kernel"], tensors["blk.1.attn_k.weight"])
    np.testing.assert_array_equal(attention["value"]["kernel"], tensors["blk.1.attn_v.weight"])
    np.testing.assert_array_equal(attention["key"]["bias"], np.arange(16))
    np.testing.assert_array_equal(params["embed"]["embedding"], tensors["token_embd.weight"])
    np.testing.assert_array_equal(params["head"]["kernel"], tensors["token_embd.weight"] + 1)
    down = params["layers"][0]["ffn"]["down"]["kernel"]
    np.testing.assert_array_equal(down, tensors["blk.0.ffn_down.weight"])
    shapes = jax.tree.map(lambda leaf: leaf.shape, params)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, models.parameter_shapes(config))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, "float16"])
def test_dtype(write_gguf, tensors, dtype):
    _, params, _ = gguf.read(write_gguf(tensors), dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}


def test_quantized_blocks_are_expanded(write_gguf, tensors):
    library = pytest.importorskip("gguf")
    name = "blk.0.attn_output.weight"
    kind = library.GGMLQuantizationType.Q8_0
    packed = library.quants.quantize(tensors[name], kind)
    _, params, _ = gguf.read(write_gguf({**tensors, name: (packed, kind)}))
    found = np.asarray(params["layers"][0]["attention"]["output"]["kernel"])
    assert 0 < np.abs(found - tensors[name]).max() < 0.005


def test_missing_extra_and_misshapen_tensors_are_named(write_gguf, tensors):
    missing = {k: v for k, v in tensors.items() if k != "blk.1.ffn_up.weight"}
    with pytest.raises(ValueError, match=r"lacks 1 .*blk\.1\.ffn_up\.weight"):
        gguf.read(write_gguf(missing))
    with pytest.raises(ValueError, match=r"does not know.*blk\.0\.attn_q_norm\.weight"):
        gguf.read(write_gguf({**tensors, "blk.0.attn_q_norm.weight": np.ones(8, np.float32)}))
    # A bias of one projection in one layer only.
    with pytest.raises(ValueError, match=r"lacks 5 .*blk\.1\.attn_q\.bias"):
        gguf.read(write_gguf({**tensors, "blk.0.attn_q.bias": np.ones(32, np.float32)}))
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_norm\.weight' has shape \(8,\).*\(16,\)"):
        gguf.read(write_gguf({**tensors, "blk.0.ffn_norm.weight": np.ones(8, np.float32)}))
    swapped = np.ascontiguousarray(tensors["blk.0.ffn_down.weight"].T)
    with pytest.raises(ValueError, match=r"ffn_down\.weight' has shape \(24, 16\).*\(16, 24\)"):
        gguf.read(write_gguf({**tensors, "blk.0.ffn_down.weight": swapped}))
    with pytest.raises(ValueError, match="token_embd"):
        gguf.read(write_gguf({k: v for k, v in tensors.items() if k != "token_embd.weight"}))


def test_numbers_that_are_not_finite_are_named(write_gguf, tensors):
    tensors["blk.1.attn_v.weight"][3, 4] = np.nan
    with pytest.raises(ValueError, match=r"blk\.1\.attn_v\.weight"):
        gguf.read(write_gguf(tensors))
    tensors["blk.1.attn_v.weight"][3, 4] = 1e6
    gguf.read(write_gguf(tensors))
    with pytest.raises(ValueError, match="float16"):
        gguf.read(write_gguf(tensors), "float16")


def test_truncation_anywhere_is_told(write_gguf, tensors):
    path = write_gguf(tensors)
    content = path.read_bytes()
    for size in [0, 3, 4, 10, 23, 24, 60, 200, 400, 900, 1500, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="truncated or corrupt|not a GGUF file") as caught:
            gguf.read(path)
        assert str(path) in str(caught.value)


def test_corrupt_headers_are_told(write_gguf, tensors):
    path = write_gguf(tensors)
    content = path.read_bytes()
    header = content.index(b"token_embd.weight")
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for place in generator.integers(4, header, size=3):
            damaged[place] = generator.integers(256)
        path.write_bytes(damaged)
        # Damage to a number or a name can leave a file that is valid; whatever is wrong is a
        # ValueError.
        try:
            gguf.read(path)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 200


@pytest.mark.parametrize(
    ("start", "told"),
    [(b"PK\x03\x04", "PK"), (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull")],
)
def test_other_files_are_refused(tmp_path, start, told):
    path = tmp_path / "model.gguf"
    path.write_bytes(start + bytes(100))
    with pytest.raises(ValueError, match=told):
        gguf.read(path)
    with pytest.raises(ValueError, match="no such file"):
        gguf.read(tmp_path / "absent.gguf")


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({"llama.attention.head_count": None}, "head_count' is missing"),
        ({"llama.attention.head_count_kv": [2, 1]}, "not a single number"),
        ({"llama.attention.head_count_kv": 3}, "num_kv_heads=3"),
        ({"llama.rope.dimension_count": 4}, "dimension_count=4"),
        ({"llama.expert_count": 8}, "expert_count=8"),
        ({"llama.attention.sliding_window": 32}, "sliding_window=32"),
        ({"llama.vocab_size": 41}, "vocab_size=41"),
        ({"split.count": 2}, "merge"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
        ({"llama.rope.scaling.mystery": 1.0}, "mystery"),
    ],
)
def test_metadata_beyond_the_transformer_is_refused(write_gguf, tensors, metadata, told):
    with pytest.raises(ValueError, match=told):
        gguf.read(write_gguf(tensors, metadata=metadata))


def test_other_architectures_are_refused(write_gguf, tensors):
    with pytest.raises(ValueError, match="'gemma3' is not supported.*'llama'"):
        gguf.read(write_gguf(tensors, arch="gemma3"))


@pytest.mark.parametrize("dtype", ["int8", "int32", bool])
def test_dtypes_that_are_not_floating_are_refused(write_gguf, tensors, dtype):
    with pytest.raises(ValueError, match="floating"):
        gguf.read(write_gguf(tensors), dtype)


def test_rotary_scaling(write_gguf, tensors):
    prefix = "llama.rope.scaling."
    linear = {prefix + "type": "linear", prefix + "factor": 4.0, "llama.rope.freq_base": 5e5}
    config, _, _ = gguf.read(write_gguf(tensors, metadata=linear))
    assert config.rotary_base == 5e5
    assert config.rotary_scaling == models.RotaryScaling(kind="linear", factor=4.0)
    yarn = {**linear, prefix + "type": "yarn", prefix + "original_context_length": 16}
    config, _, _ = gguf.read(write_gguf(tensors, metadata=yarn))
    assert config.rotary_scaling is not None
    assert config.rotary_scaling.original_context == 16
    assert config.rotary_scaling.attention_factor == pytest.approx(0.1 * np.log(4.0) + 1.0)


def test_llama3_scaling_is_recovered_from_its_tensor(write_gguf, tensors, tiny):
    # Wavelengths for base 500000 and head size 8, worked out by hand from the definition.
    divisors = []
    for index in range(4):
        wavelength = 2 * np.pi * 500000.0 ** (2 * index / 8)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(32.0)
        else:
            smooth = (8192 / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / 32.0 + smooth))
    stored = {**tensors, "rope_freqs.weight": np.asarray(divisors, np.float32)}
    metadata = {"llama.rope.freq_base": 500000.0}
    config, _, _ = gguf.read(write_gguf(stored, metadata=metadata))
    wanted = models.RotaryScaling(
        kind="llama3",
        factor=32.0,
        original_context=8192,
        low_frequency_factor=1.0,
        high_frequency_factor=4.0,
    )
    assert config.rotary_scaling == wanted
    stored["rope_freqs.weight"][1] = 2.0
    with pytest.raises(ValueError, match=r"rope_freqs\.weight"):
        gguf.read(write_gguf(stored, metadata=metadata))
