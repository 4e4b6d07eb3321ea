"""Weights as other engines read them: the very numbers of the target, to the last bit."""

import dataclasses

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import specjax
from experiments import (
    methods,
    peer_llama,
    peer_protocol,
    peer_transformers,
    peer_weights,
    targets,
)
from specjax import checkpoints

SIZES = {"hidden": 64, "keys": 32, "inner": 96, "layers": 2}


@pytest.fixture
def quantized(tmp_path):
    """A GGUF file of four kinds of tensors, with a tokenizer of bytes."""
    path = tmp_path / "small.gguf"
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, "ab", "<|end|>"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_block_count(SIZES["layers"])
    writer.add_context_length(128)
    writer.add_embedding_length(SIZES["hidden"])
    writer.add_feed_forward_length(SIZES["inner"])
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_chat_template("{{ messages[0].content }}")
    writer.add_languages(["en"])
    hidden, keys, inner = (SIZES[name] for name in ("hidden", "keys", "inner"))
    shapes = {"token_embd": (len(tokens), hidden), "output_norm": (hidden,)}
    for layer in range(SIZES["layers"]):
        of_layer = {
            **{"attn_norm": (hidden,), "attn_q": (hidden, hidden), "attn_k": (keys, hidden)},
            **{"attn_v": (keys, hidden), "attn_output": (hidden, hidden), "ffn_norm": (hidden,)},
            **{"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)},
        }
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in of_layer.items()}
    kinds = {"attn_v": "F16", "ffn_up": "Q4_1", "attn_output": "F32"}
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = (0.3 * generator.standard_normal(shape)).astype(np.float32)
        kind = kinds.get(name.rpartition(".")[2], "Q8_0") if len(shape) > 1 else "F32"
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same(bundle, other):
    jax.tree.map(np.testing.assert_array_equal, bundle.target.params, other.target.params)
    assert jax.tree.structure(bundle.target.params) == jax.tree.structure(other.target.params)
    assert other.config == bundle.config
    assert other.tokenizer.fingerprint == bundle.tokenizer.fingerprint
    assert other.target.eos_ids == bundle.target.eos_ids
    assert other.chat("hi there") == bundle.chat("hi there")


def test_weights_in_float32_are_the_very_ones(quantized, tmp_path):
    bundle = specjax.load(str(quantized))
    path = peer_weights.target_gguf(bundle, tmp_path / "weights")
    assert_same(bundle, specjax.load(str(path)))
    source, made = gguf.GGUFReader(quantized), gguf.GGUFReader(path)
    assert {tensor.tensor_type.name for tensor in made.tensors} == {"F32"}
    assert len({tensor.tensor_type.name for tensor in source.tensors}) == 4
    # All else stands there as it did.
    changed = {
        name
        for name in {*source.fields, *made.fields}
        if name not in source.fields
        or name not in made.fields
        or source.fields[name].contents() != made.fields[name].contents()
    }
    assert changed == {"general.file_type"}
    folder = peer_weights.target_folder(bundle, tmp_path / "weights")
    assert_same(bundle, specjax.load(str(folder)))
    # Each is written once, and a change of the weights has a folder of its own.
    before = path.stat().st_mtime_ns
    assert peer_weights.target_gguf(bundle, tmp_path / "weights") == path
    assert path.stat().st_mtime_ns == before
    params = jax.tree.map(lambda leaf: leaf + 1, bundle.target.params)
    other = checkpoints.assemble(bundle.name, bundle.config, params, bundle.tokenizer)
    assert peer_weights.target_folder(other, tmp_path / "weights") != folder
    assert sorted(part.name for part in path.parent.iterdir()) == ["target", "target.gguf"]


def test_a_draft_keeps_the_targets_embedding_to_the_bit(tmp_path):
    bundle = targets.tiny()
    tokens = np.arange(bundle.config.vocab_size)
    config = dataclasses.replace(
        bundle.config, num_layers=1, tied_embeddings=False, head_rows=len(tokens)
    )
    own = {name: bundle.target.params[name] for name in ("norm",)}
    own["layers"] = {0: bundle.target.params["layers"][0]}
    draft = tmp_path / "draft.safetensors"
    checkpoints.drafts.write(draft, bundle, config, own, tokens)
    folder = peer_weights.draft_folder(bundle, draft, tmp_path / "weights")
    loaded = specjax.load(str(folder))
    embeddings = (some.target.params["embed"]["embedding"] for some in (bundle, loaded))
    np.testing.assert_array_equal(*embeddings)
    rounded = own["layers"][0]["ffn"]["up"]["kernel"].astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(loaded.target.params["layers"][0]["ffn"]["up"]["kernel"], rounded)
    with pytest.raises(ValueError, match="is a draft for another tokenizer"):
        peer_weights.draft_folder(bundle, methods.SHIPPED, tmp_path / "weights")


# Other engines, where they are installed.


def assert_same_texts(engine, bundle, asked, assistant_is_target=()):
    prompt = bundle.chat("abcabcabcab")
    wanted = specjax.autoregressive(bundle.target, [prompt], max_new_tokens=12).new_tokens[0]
    for method in asked:
        request = peer_protocol.Request(prompt, method, 12)
        engine.program(request)
        answer = engine.decode(request)
        assert answer.new_tokens == wanted, method
        assert answer.prefill_seconds > 0 < answer.seconds
        later = len(wanted) - answer.prefill_tokens
        if method == "plain":
            assert answer.target_steps == later == len(wanted) - 1
        elif method in assistant_is_target:
            # Every guess is right.
            assert answer.target_steps < later
        else:
            assert 0 < answer.target_steps <= later


def test_transformers_writes_the_same_texts(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    bundle = targets.tiny()
    folder = str(peer_weights.target_folder(bundle, tmp_path))
    settings = {"threads": 1, "ends": [*bundle.target.eos_ids], "assistant": folder}
    engine = peer_transformers.Transformers({"target": folder, **settings})
    asked = [
        "plain",
        "prompt_lookup",
        "assisted draft_length=3",
        "early_exit",
        "early_exit layers=3",
    ]
    assert_same_texts(engine, bundle, [*asked, "plain"], ["assisted draft_length=3"])
    with pytest.raises(ValueError, match="layers=4 must be fewer than all 4"):
        engine.decode(peer_protocol.Request([1], "early_exit layers=4", 4))
    with pytest.raises(ValueError, match="takes layers=N"):
        engine.decode(peer_protocol.Request([1], "early_exit draft_length=2", 4))


def test_llama_writes_the_same_texts(quantized, tmp_path):
    pytest.importorskip("llama_cpp")
    bundle = specjax.load(str(quantized))
    path = str(peer_weights.target_gguf(bundle, tmp_path / "weights"))
    settings = {"threads": 1, "ends": [*bundle.target.eos_ids], "capacity": 96}
    engine = peer_llama.LlamaCpp({"target": path, **settings})
    assert_same_texts(engine, bundle, ["plain", "prompt_lookup", "prompt_lookup draft_length=2"])
