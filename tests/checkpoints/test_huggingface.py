"""Hugging Face folders: exact contents, agreement with transformers, and refusals."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import models
from specjax.checkpoints import huggingface

CONFIG = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
LAYER = {
    "input_layernorm.weight": (16,),
    "self_attn.q_proj.weight": (32, 16),
    "self_attn.k_proj.weight": (16, 16),
    "self_attn.v_proj.weight": (16, 16),
    "self_attn.o_proj.weight": (16, 32),
    "post_attention_layernorm.weight": (16,),
    "mlp.gate_proj.weight": (24, 16),
    "mlp.up_proj.weight": (24, 16),
    "mlp.down_proj.weight": (16, 24),
}
SHAPES = {"model.embed_tokens.weight": (40, 16), "model.norm.weight": (16,)}
SHAPES |= {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in LAYER.items()}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.fixture
def tensors(random_tensors):
    return random_tensors(SHAPES)


@pytest.mark.parametrize("parts", [1, 3])
def test_contents(write_folder, tensors, tiny, parts):
    config, params = huggingface.read(write_folder(CONFIG, tensors, parts))
    assert config == tiny
    layer = params["layers"][1]
    for module, name in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
        stored = tensors[f"model.layers.1.self_attn.{name}_proj.weight"]
        np.testing.assert_array_equal(layer["attention"][module]["kernel"], stored)
    for module in ("gate", "up", "down"):
        stored = tensors[f"model.layers.1.mlp.{module}_proj.weight"]
        np.testing.assert_array_equal(layer["ffn"][module]["kernel"], stored)
    norms = (layer["attention_norm"], layer["ffn_norm"], params["norm"])
    names = ("layers.1.input_layernorm", "layers.1.post_attention_layernorm", "norm")
    for norm, name in zip(norms, names, strict=True):
        np.testing.assert_array_equal(norm["scale"], tensors[f"model.{name}.weight"])
    shapes = jax.tree.map(lambda leaf: leaf.shape, params)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, models.parameter_shapes(config))


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes(write_folder, tensors, stored, dtype):
    cast = {name: values.astype(jnp.dtype(stored)) for name, values in tensors.items()}
    _, params = huggingface.read(write_folder(CONFIG, cast), dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    embedding = cast["model.embed_tokens.weight"].astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(np.asarray(params["embed"]["embedding"]), embedding)


def test_head(write_folder, tensors):
    embedding = tensors["model.embed_tokens.weight"]
    copied = {**tensors, "lm_head.weight": embedding.copy()}
    config, params = huggingface.read(write_folder(CONFIG, copied))
    assert config.tied_embeddings and "head" not in params
    with pytest.raises(ValueError, match=r"lm_head\.weight' is not the embedding"):
        huggingface.read(write_folder(CONFIG, {**tensors, "lm_head.weight": embedding + 1}))
    untied = {**CONFIG, "tie_word_embeddings": False}
    config, params = huggingface.read(
        write_folder(untied, {**tensors, "lm_head.weight": embedding + 1})
    )
    np.testing.assert_array_equal(params["head"]["kernel"], embedding + 1)
    with pytest.raises(ValueError, match=r"lacks 1 .*lm_head\.weight"):
        huggingface.read(write_folder(untied, tensors))


def test_missing_extra_and_misshapen_tensors_are_named(write_folder, tensors):
    missing = {k: v for k, v in tensors.items() if k != "model.layers.0.mlp.up_proj.weight"}
    with pytest.raises(ValueError, match=r"lacks 1 .*layers\.0\.mlp\.up_proj"):
        huggingface.read(write_folder(CONFIG, missing))
    extra = {**tensors, "model.layers.2.input_layernorm.weight": np.ones(16, np.float32)}
    with pytest.raises(ValueError, match=r"does not know.*layers\.2\.input_layernorm"):
        huggingface.read(write_folder(CONFIG, extra))
    with pytest.raises(ValueError, match=r"norm\.weight' has shape \(15,\)"):
        huggingface.read(
            write_folder(CONFIG, {**tensors, "model.norm.weight": np.ones(15, np.float32)})
        )
    old = {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    huggingface.read(write_folder(CONFIG, old))
    packed = {**tensors, "model.norm.weight": np.ones(16, np.int8)}
    with pytest.raises(ValueError, match=r"norm\.weight' has type I8"):
        huggingface.read(write_folder(CONFIG, packed))


def test_damaged_files_are_told(write_folder, tensors):
    folder = write_folder(CONFIG, tensors)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for size in (0, 5, 100, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors: truncated or corrupt"):
            huggingface.read(folder)
    path.unlink()
    with pytest.raises(ValueError, match="holds 0 safetensors"):
        huggingface.read(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*save_pretrained"):
        huggingface.read(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        huggingface.read(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        huggingface.read(folder)


def test_index_and_parts_must_agree(write_folder, tensors):
    folder = write_folder(CONFIG, tensors, 2)
    index = folder / "model.safetensors.index.json"
    placed = json.loads(index.read_text())["weight_map"]

    def refuse(weight_map, told):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=told):
            huggingface.read(folder)

    refuse({k: v for k, v in placed.items() if k != "model.norm.weight"}, r"model\.norm\.weight")
    refuse({**placed, "more": "part-0.safetensors"}, "'more'")
    refuse({**placed, "more": "part-9.safetensors"}, "part-9")
    (folder.parent / "part-0.safetensors").write_bytes((folder / "part-0.safetensors").read_bytes())
    refuse({**placed, "more": "../part-0.safetensors"}, "not there")
    refuse({}, "weight_map")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "gemma3"}, "'gemma3'"),
        ({"model_type": None}, "model_type=None"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"vocab_size": None}, "lacks 'vocab_size'"),
        ({"hidden_size": "16"}, "hidden_size='16'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "mistral", "sliding_window": 32}, "sliding_window=32"),
        ({"model_type": "mistral", "max_position_embeddings": 8192}, "sliding_window=4096"),
        ({"model_type": "mistral", "num_key_value_heads": None}, "num_key_value_heads"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8},
            "sliding_window=8",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_theta": "x"}, "rope_theta='x'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ by layer"),
        ({"rope_scaling": {"type": "linear"}}, "factor=None"),
        ({"rope_scaling": {**YARN, "truncate": False}}, "truncate"),
    ],
)
def test_configurations_beyond_the_transformer_are_refused(write_folder, change, told):
    with pytest.raises(ValueError, match=told):
        huggingface.read_config(write_folder({**CONFIG, **change}, {"x": np.ones(1)}))


def test_spellings_of_rotary_entries_agree(write_folder):
    old = {**CONFIG, "rope_theta": 5e5, "rope_scaling": LLAMA3}
    new = {**CONFIG, "rope_parameters": {**LLAMA3, "rope_theta": 5e5}}
    first, second = (
        huggingface.read_config(write_folder(given, {"x": np.ones(1)})) for given in (old, new)
    )
    assert first == second
    assert first.rotary_base == 5e5
    assert first.rotary_scaling == models.RotaryScaling(
        kind="llama3",
        factor=8.0,
        original_context=32,
        low_frequency_factor=1.0,
        high_frequency_factor=4.0,
    )
    without = {key: value for key, value in YARN.items() if key != "factor"}
    config = huggingface.read_config(
        write_folder({**CONFIG, "rope_scaling": without}, {"x": np.ones(1)})
    )
    assert config.rotary_scaling == models.RotaryScaling(
        kind="yarn", factor=4.0, original_context=16
    )


VARIANTS = {
    "tied": {},
    "untied with biases": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "llama3": {"rope_parameters": {**LLAMA3, "rope_theta": 1e4}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}},
    "yarn": {"rope_parameters": {**YARN, "rope_type": "yarn", "rope_theta": 1e4}},
    "yarn with scales": {
        "rope_parameters": {
            **YARN,
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "beta_fast": 16.0,
        }
    },
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "head_dim": None, "hidden_size": 32},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(tmp_path, variant):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    given = {
        key: value for key, value in {**CONFIG, **VARIANTS[variant]}.items() if value is not None
    }
    if variant == "mistral":
        given["sliding_window"] = None
    torch.manual_seed(0)
    peer = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**given), dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            # Initial biases are zero and scales one, which would hide their absence.
            parameter.add_(0.2 * torch.randn_like(parameter))
    peer.save_pretrained(tmp_path)
    config, params = huggingface.read(tmp_path)
    model = models.language_model(config, params)
    tokens = np.random.default_rng(0).integers(0, 40, size=(1, 50))
    with torch.no_grad():
        expected = peer(torch.tensor(tokens)).logits.numpy()
    output, _ = model.apply(
        model.params, jnp.asarray(tokens, jnp.int32), model.init_cache(1, 8), None, ()
    )
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(np.asarray(output.logits), expected, atol=2e-4)


def byte_tokenizer(folder):
    """Writes a tokenizer.json of single bytes with <s>, </s> and <end>."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>", "<end>"])
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    inner.enable_truncation(3)
    inner.enable_padding(length=9)
    inner.save(str(folder / "tokenizer.json"))


def test_tokenizer_and_what_ends_an_answer(tmp_path):
    byte_tokenizer(tmp_path)
    template = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 257]}))
    tokenizer = huggingface.read_tokenizer(tmp_path)
    assert tokenizer.eos_ids == (257, 258)
    assert tokenizer.bos_id == 256
    assert len(tokenizer.encode("longer than three")) == 17
    assert tokenizer.decode(tokenizer.encode("né ")) == "né "
    chat = tokenizer.chat([{"role": "user", "content": "ab"}])
    assert tokenizer.decode(chat, keep_special=True) == "<s>ab</s>"
    (tmp_path / "chat_template.jinja").write_text("{{ 'file' }}")
    assert huggingface.read_tokenizer(tmp_path).chat(
        [{"role": "user", "content": "ab"}]
    ) == tokenizer.encode("file")
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "{{ 'd' }}"}]
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**settings, "chat_template": named})
    )
    named_chat = huggingface.read_tokenizer(tmp_path).chat([{"role": "user", "content": "ab"}])
    assert named_chat == tokenizer.encode("d")


def test_absent_tokenizer_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json: no such file.*AutoTokenizer"):
        huggingface.read_tokenizer(tmp_path)


def test_failed_download_is_told(monkeypatch):
    library = pytest.importorskip("huggingface_hub")

    def fail(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(library, "snapshot_download", fail)
    with pytest.raises(RuntimeError, match="owner/name.*no route.*local folder"):
        huggingface.download("owner/name")
