"""Drafts as files, and as folders for other libraries."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import checkpoints, models
from specjax.checkpoints import huggingface
from specjax.training import shapes
from tests.training import tasks


@pytest.mark.parametrize("name", tasks.SHAPES)
def test_drafts_survive_their_file(tokens, tmp_path, name):
    bundle = tasks.bundle()
    objective, params, frozen = tasks.begun(tokens, tasks.SHAPES[name])
    path = tmp_path / "draft.safetensors"
    checkpoints.drafts.write(path, bundle, objective.config, params, tokens)
    model = checkpoints.drafts.read(path, bundle)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params)
    own = shapes.draft_model(objective.config, rounded, frozen)
    text = jnp.asarray([bundle.chat("abc")])
    logits = [
        m.apply(m.params, text, m.init_cache(1, text.shape[1]), None, ())[0].logits
        for m in (model, own)
    ]
    np.testing.assert_array_equal(*logits)
    assert model.eos_ids == bundle.target.eos_ids
    # Whoever may read the card may read the draft.
    path.with_suffix(".json").write_text("{}")
    assert path.stat().st_mode == path.with_suffix(".json").stat().st_mode
    # The embedding is the target's own array, not another copy, where it is the target's.
    shared = model.params.params["embed"]["embedding"] is bundle.target.params["embed"]["embedding"]
    assert shared == (name == "layers")
    # What is learnt comes back as it was, to be gone on with.
    _, weights, _ = checkpoints.drafts.weights(path, bundle)
    chex.assert_trees_all_equal({name: weights[name] for name in rounded}, rounded)
    if not shared:
        assert path.stat().st_size < 100_000
        with pytest.raises(ValueError, match="of another width than its target"):
            checkpoints.drafts.export(path, bundle, tmp_path / "folder")
        other = {**params, "inward": params["inward"][:, :-16]}
        checkpoints.drafts.write(path, bundle, objective.config, other, tokens)
        with pytest.raises(ValueError, match="leads between widths by"):
            checkpoints.drafts.read(path, bundle)


def test_scaled_positions_survive_too(tokens, tmp_path):
    bundle = tasks.bundle()
    scaling = models.RotaryScaling("linear", 2.0)
    config = dataclasses.replace(bundle.config, rotary_scaling=scaling)
    scaled = checkpoints.assemble("scaled", config, bundle.target.params, bundle.tokenizer)
    params, _ = shapes.begin(scaled, tasks.SHAPE, tokens, jax.random.key(1))
    wanted = shapes.configure(config, tasks.SHAPE)
    checkpoints.drafts.write(tmp_path / "draft", scaled, wanted, params, tokens)
    assert checkpoints.drafts.weights(tmp_path / "draft", scaled)[0] == wanted
    hash(checkpoints.drafts.read(tmp_path / "draft", scaled).apply)


def test_a_file_that_cannot_be_written_is_named(tokens, tmp_path):
    objective, params, _ = tasks.begun(tokens)
    (tmp_path / "draft").mkdir()
    with pytest.raises(ValueError, match="draft could not be written"):
        checkpoints.drafts.write(
            tmp_path / "draft", tasks.bundle(), objective.config, params, tokens
        )


def test_exported_folder_is_the_draft_with_the_whole_vocabulary(tokens, tmp_path):
    bundle = tasks.bundle()
    objective, params, _ = tasks.begun(tokens)
    path = tmp_path / "draft.safetensors"
    checkpoints.drafts.write(path, bundle, objective.config, params, tokens)
    checkpoints.drafts.export(path, bundle, tmp_path / "folder")
    loaded = checkpoints.load(str(tmp_path / "folder"))
    draft = checkpoints.drafts.read(path, bundle)
    text = jnp.asarray([bundle.chat("abc")])
    whole, cut = (
        m.apply(m.params, text, m.init_cache(1, text.shape[1]), None, ())[0].logits
        for m in (loaded.target, draft)
    )
    # The folder's embedding is rounded to bfloat16 too.
    np.testing.assert_allclose(whole[:, :, tokens], cut[:, :, tokens], rtol=0.1, atol=0.1)
    assert loaded.tokenizer.fingerprint == bundle.tokenizer.fingerprint
    assert loaded.chat("abc") == bundle.chat("abc")
    with pytest.raises(ValueError, match="head_rows=120"):
        huggingface.write(tmp_path, objective.config, params, bundle.tokenizer)


def test_transformers_takes_the_folder_for_an_assistant(tokens, tmp_path):
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    bundle = tasks.bundle()
    # As large as the target, and as good.
    config = bundle.config
    everything = np.arange(config.vocab_size)
    shape = shapes.Shape(
        tuple(range(config.num_layers)), config.intermediate_size, config.vocab_size
    )
    objective, params, _ = tasks.begun(everything, shape)
    path = tmp_path / "draft.safetensors"
    checkpoints.drafts.write(path, bundle, objective.config, params, everything)
    checkpoints.drafts.export(path, bundle, tmp_path / "draft")
    huggingface.write(tmp_path / "target", bundle.config, bundle.target.params, bundle.tokenizer)
    target, draft = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("target", "draft")
    )
    prompt = torch.tensor([bundle.chat("abc")])
    options = {"max_new_tokens": 20, "do_sample": False}
    plain = target.generate(prompt, **options)
    # However unsure a model of random weights is, it is to draft.
    draft.generation_config.update(
        assistant_confidence_threshold=0.0,
        num_assistant_tokens=5,
        num_assistant_tokens_schedule="constant",
    )
    passes = []
    target.register_forward_hook(lambda *_: passes.append(1))
    assert torch.equal(target.generate(prompt, assistant_model=draft, **options), plain)
    assert 1 < len(passes) < 8, "its drafts are not taken"


@pytest.fixture
def draft_file(tokens, tmp_path):
    objective, params, _ = tasks.begun(tokens)
    path = tmp_path / "draft.safetensors"
    checkpoints.drafts.write(path, tasks.bundle(), objective.config, params, tokens)
    return path


def test_bad_draft_files_are_named(draft_file, tokens, tmp_path):
    bundle = tasks.bundle()
    with pytest.raises(ValueError, match="nowhere.*no draft that can be read"):
        checkpoints.drafts.read(tmp_path / "nowhere", bundle)
    content = draft_file.read_bytes()
    (tmp_path / "short").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="short.*no draft that can be read"):
        checkpoints.drafts.read(tmp_path / "short", bundle)
    objective, params, _ = tasks.begun(tokens)
    strange, twice = tokens.copy(), tokens.copy()
    strange[-1], twice[-1] = 4000, twice[0]
    for table, message in (
        (strange, "table: .*token 4000, outside the vocabulary 0…258"),
        (twice, "table: .*lists a token twice"),
        (tokens[:-1], "table: .*has shape .*head .* rows"),
    ):
        checkpoints.drafts.write(tmp_path / "table", bundle, objective.config, params, table)
        with pytest.raises(ValueError, match=message):
            checkpoints.drafts.weights(tmp_path / "table", bundle)
    assert not list(tmp_path.glob("*.part"))
    fewer = {**params, "layers": {0: params["layers"][0]}}
    checkpoints.drafts.write(tmp_path / "fewer", bundle, objective.config, fewer, tokens)
    with pytest.raises(ValueError, match="lacks.*model.layers.1"):
        checkpoints.drafts.read(tmp_path / "fewer", bundle)


def test_a_draft_for_another_target_is_refused(draft_file, smollm2):
    with pytest.raises(ValueError, match="another tokenizer than that of 'smollm2-135m'"):
        checkpoints.drafts.read(draft_file, smollm2)
    bundle = tasks.bundle()
    wide = dataclasses.replace(bundle.config, hidden_size=128)
    params = models.init_params(wide, jax.random.key(0))
    other = checkpoints.assemble("wide", wide, params, bundle.tokenizer)
    with pytest.raises(ValueError, match="hidden_size=64, and 'wide' has 128"):
        checkpoints.drafts.read(draft_file, other)
