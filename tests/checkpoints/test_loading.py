"""From a name to a bundle, what is told about names that are none, and truncated models."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import checkpoints, models
from specjax.checkpoints import fetch, loading
from specjax.checkpoints import tokenizer as tokenizers


@pytest.fixture
def bundle(tiny):
    params = models.init_params(tiny, jax.random.key(0))
    library = pytest.importorskip("tokenizers")
    inner = library.Tokenizer(library.models.BPE(vocab={"a": 0}, merges=[]))
    target = models.language_model(tiny, params)
    return checkpoints.Bundle("tiny", target, tokenizers.Tokenizer(inner), tiny)


def test_known_model(smollm2):
    assert smollm2.name == "smollm2-135m"
    assert smollm2.config.num_layers == 30
    assert smollm2.target.eos_ids == smollm2.tokenizer.eos_ids == (2,)
    assert checkpoints.layer_truncated(smollm2, 3).eos_ids == (2,)
    assert smollm2.target.vocab_size == smollm2.tokenizer.vocab_size == 49152


@pytest.mark.parametrize("name", ["smollm", "", "SmolLM2-135M", "a b"])
def test_unknown_names_list_what_is_known(name):
    with pytest.raises(ValueError, match="unknown checkpoint.*'smollm2-135m'.*GGUF.*Hugging Face"):
        checkpoints.load(name)


@pytest.mark.parametrize(
    "name", ["/no/such/model", "./model", "~/none", "model.gguf", "a/b/c", "a/b.gguf"]
)
def test_paths_that_do_not_exist_are_told_as_such(name):
    with pytest.raises(ValueError, match="does not exist"):
        checkpoints.load(name)


def test_other_files(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="give the folder"):
        checkpoints.load(str(path))
    path = tmp_path / "notes.txt"
    path.write_text("some text")
    with pytest.raises(ValueError, match="not a GGUF file"):
        checkpoints.load(str(path))
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        checkpoints.load(str(tmp_path))


def test_hugging_face_ids_go_to_hugging_face(monkeypatch):
    asked = []

    def download(name):
        asked.append(name)
        raise RuntimeError("no network")

    monkeypatch.setattr(loading.huggingface, "download", download)
    with pytest.raises(RuntimeError, match="no network"):
        checkpoints.load("owner/some-model_1.5")
    assert asked == ["owner/some-model_1.5"]


def test_gguf_file_by_path(tmp_path, smollm2):
    copy = tmp_path / "copy.gguf"
    copy.symlink_to(fetch.smollm2())
    loaded = checkpoints.load(str(copy), dtype=jnp.bfloat16)
    assert loaded.config == smollm2.config
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.target.params)} == {jnp.dtype("bfloat16")}
    assert loaded.tokenizer.encode("Hello") == smollm2.tokenizer.encode("Hello")


def test_tokenizer_larger_than_the_embedding_is_refused(bundle, tiny):
    library = pytest.importorskip("tokenizers")
    vocabulary = {chr(0x4E00 + index): index for index in range(41)}
    inner = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=[]))
    with pytest.raises(ValueError, match="41 tokens.*40 rows"):
        loading.assemble("x", tiny, bundle.target.params, tokenizers.Tokenizer(inner))


def test_truncated_model_shares_arrays_and_ends_early(bundle):
    full, short = bundle.target, checkpoints.layer_truncated(bundle, 1)
    assert short.num_layers == 1 and list(short.params["layers"]) == [0]
    for leaf, other in zip(
        jax.tree.leaves(short.params["layers"][0]),
        jax.tree.leaves(full.params["layers"][0]),
        strict=True,
    ):
        assert leaf is other
    assert short.params["embed"]["embedding"] is full.params["embed"]["embedding"]
    tokens = jnp.asarray([[1, 2, 3, 4]], jnp.int32)
    inside, _ = full.apply(full.params, tokens, full.init_cache(1, 8), None, (1,))
    output, _ = short.apply(short.params, tokens, short.init_cache(1, 8), None, (1,))
    # The full model's stream after layer 0, through the final norm, is the short model's last
    # feature.
    stream = np.asarray(inside.features[0, :, 0])
    scale = np.asarray(full.params["norm"]["scale"])
    normed = (
        stream / np.sqrt((stream**2).mean(-1, keepdims=True) + bundle.config.norm_epsilon) * scale
    )
    np.testing.assert_allclose(np.asarray(output.features[0, :, 0]), normed, atol=1e-5)
    whole = checkpoints.layer_truncated(bundle, 2)
    same, _ = whole.apply(whole.params, tokens, whole.init_cache(1, 8), None, ())
    expected, _ = full.apply(full.params, tokens, full.init_cache(1, 8), None, ())
    np.testing.assert_array_equal(np.asarray(same.logits), np.asarray(expected.logits))


@pytest.mark.parametrize("layers", [-1, 0, 3])
def test_truncation_outside_the_model_is_refused(bundle, layers):
    with pytest.raises(ValueError, match=f"layers={layers} must lie between 1 and the model's 2"):
        checkpoints.layer_truncated(bundle, layers)


def test_core_runs_without_the_optional_libraries(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    script = (
        "import sys\n"
        "for name in ('gguf', 'tokenizers', 'jinja2', 'safetensors', 'huggingface_hub'):\n"
        "    sys.modules[name] = None\n"
        "from specjax import checkpoints\n"
        "try:\n"
        f"    checkpoints.load({str(path)!r})\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert "'gguf'" in run.stdout and "pip install 'specjax[models]'" in run.stdout
