"""Every model against the contract, and the contract's checker against models that break it."""

import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import models, testing, trees, types
from specjax.models import recurrent

PLAIN = models.TransformerConfig(
    vocab_size=19,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=6,
    context_length=64,
)
BIASED = dataclasses.replace(
    PLAIN,
    num_layers=2,
    num_kv_heads=1,
    tied_embeddings=False,
    qkv_bias=True,
    output_bias=True,
    ffn_bias=True,
    rotary_scaling=models.RotaryScaling("linear", 2.0),
)


def transformer(config, seed=0):
    """A model none of whose weights, biases and norms included, is at its neutral value."""
    params = models.init_params(config, jax.random.key(seed), scale=1.5)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    moved = [
        leaf + 0.2 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return models.language_model(config, jax.tree.unflatten(structure, moved))


def tabular(order):
    return models.tabular_model(models.random_table(jax.random.key(order), 7, order))


MODELS = {
    "tabular, order 1": lambda: tabular(1),
    "tabular, order 2": lambda: tabular(2),
    "tabular, order 3": lambda: tabular(3),
    "recurrent": lambda: models.recurrent_model(recurrent.init_params(jax.random.key(4), 7, 6)),
    "transformer": lambda: transformer(PLAIN),
    "transformer, untied, biased, stretched": lambda: transformer(BIASED),
}


@pytest.mark.parametrize("name", MODELS)
def test_model_keeps_the_contract(name):
    testing.check_language_model(MODELS[name](), jax.random.key(11))


@pytest.mark.parametrize("config", [PLAIN, BIASED], ids=["plain", "biased"])
def test_half_precision_is_computed_in_and_gives_whole_logits(config):
    """Every product's factors are bfloat16, and sums are not rounded on their way to a law."""
    whole = transformer(config)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), whole.params)
    half = models.language_model(config, params)
    # Logits of this model spread over some 12, and bfloat16 keeps eight bits.
    testing.check_language_model(half, jax.random.key(11), tolerance=0.3)
    cache = half.init_cache(2, 32)
    tokens = jnp.asarray([[1, 2, 3], [4, 5, 6]], jnp.int32)
    for count in (1, 3):
        program = jax.make_jaxpr(lambda *args: half.apply(*args, None, (0, 2)))(
            params, tokens[:, :count], cache
        )
        factors = [var.aval.dtype for equation in products(program) for var in equation.invars]
        assert len(factors) >= 2 * (2 * 9 + 1) and set(factors) == {jnp.dtype(jnp.bfloat16)}
    output, entries = half.apply(params, tokens, cache, None, (0, 2))
    assert output.logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in (output.features, *jax.tree.leaves(entries))} == {
        jnp.dtype(jnp.bfloat16)
    }
    exact, _ = whole.apply(whole.params, tokens, whole.init_cache(2, 32), None, (0, 2))
    np.testing.assert_allclose(output.logits, exact.logits, atol=0.3)
    # Two tokens in bfloat16 would often have the same logit.
    assert np.any(output.logits != output.logits.astype(jnp.bfloat16).astype(jnp.float32))


def products(program):
    """Matrix products of a program, those of the programs within it too."""
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from products(inner)


@dataclasses.dataclass(frozen=True)
class Broken:
    """A function of a sound model, damaged."""

    whole: types.LanguageModel
    damage: str

    def __hash__(self):
        return hash(self.damage)

    def apply(self, params, tokens, cache, tree=None, taps=()):
        return self.whole.apply(params, tokens, cache, tree, taps)


class NoTree(Broken):
    def __call__(self, params, tokens, cache, tree=None, taps=()):
        return self.apply(params, tokens, cache, None, taps)


class RowZero(Broken):
    def __call__(self, params, tokens, cache, tree=None, taps=()):
        same = jnp.broadcast_to(cache.length[:1], cache.length.shape)
        return self.apply(params, tokens, dataclasses.replace(cache, length=same), tree, taps)


class OneTooMany(Broken):
    def __call__(self, cache, nodes, count):
        return self.whole.commit(cache, nodes, jnp.where(count > 0, count + 1, 0))


class FirstPath(Broken):
    def __call__(self, cache, nodes, count):
        return self.whole.commit(cache, None, count)


class KeepsAll(Broken):
    def __call__(self, cache, length):
        return dataclasses.replace(cache, uncommitted=jnp.zeros_like(cache.uncommitted))


class NotANumber(Broken):
    def __call__(self, params, tokens, cache, tree=None, taps=()):
        output, entries = self.apply(params, tokens, cache, tree, taps)
        logits = jnp.where(cache.length[:, None, None] > 0, jnp.nan, output.logits)
        return dataclasses.replace(output, logits=logits), entries


@pytest.mark.parametrize(
    "field, damage, complaint",
    [
        ("apply", NoTree, "tree"),
        ("apply", RowZero, "ragged chunks"),
        ("apply", NotANumber, "unequal lengths: differs .* by inf"),
        ("commit", OneTooMany, "differs"),
        ("commit", FirstPath, "committed path"),
        ("truncate", KeepsAll, "truncating"),
    ],
)
def test_a_broken_model_is_found(field, damage, complaint):
    whole = tabular(3)
    broken = dataclasses.replace(whole, **{field: damage(whole, field)})
    with pytest.raises(AssertionError, match=complaint):
        testing.check_language_model(broken, jax.random.key(12))


def test_a_function_that_cannot_be_static_is_found():
    class Unhashable:
        __hash__ = None  # pyright: ignore[reportAssignmentType]

        def __call__(self, batch, capacity):
            return whole.init_cache(batch, capacity)

    whole = tabular(2)
    broken = dataclasses.replace(whole, init_cache=Unhashable())
    with pytest.raises(AssertionError, match="init_cache is not hashable"):
        testing.check_language_model(broken, jax.random.key(13))


@pytest.mark.parametrize("sizes", [{"batch": 1}, {"length": 2}, {"nodes": 1}])
def test_sizes_that_check_nothing_are_refused(sizes):
    with pytest.raises(ValueError, match=str(next(iter(sizes.values())))):
        testing.check_language_model(tabular(2), jax.random.key(14), **sizes)


def test_slots_that_hold_nothing_are_never_read():
    model = transformer(PLAIN)
    cache = model.init_cache(3, 20)
    tokens = jnp.arange(15, dtype=jnp.int32).reshape(3, 5)
    tree = trees.from_parents((0, 0, 1, 2))

    def logits(cache):
        whole, _ = model.apply(model.params, tokens, cache, tree, ())
        root, entries = model.apply(model.params, tokens[:, :2], cache, _first(tree), ())
        rest, _ = model.apply(model.params, tokens[:, 2:], model.append(cache, entries), tree, ())
        return whole.logits, root.logits, rest.logits

    _, entries = model.apply(model.params, tokens, cache, None, ())
    cache = model.commit(model.append(cache, entries), None, jnp.asarray([4, 0, 2], jnp.int32))
    empty = jnp.arange(20)[None] >= cache.length[:, None]
    poisoned = dataclasses.replace(
        cache,
        keys=tuple(jnp.where(empty[:, None, :, None], 1e4, keys) for keys in cache.keys),
        values=tuple(jnp.where(empty[:, None, :, None], -1e4, values) for values in cache.values),
    )
    for found, wanted in zip(logits(poisoned), logits(cache), strict=True):
        np.testing.assert_array_equal(found, wanted)


def _first(tree):
    return trees.from_parents(tree.static_parents[:1])


def test_taps_are_the_inputs_of_layers_and_the_last_norm():
    model = transformer(PLAIN)
    tokens = jnp.asarray([[3, 1, 4], [1, 5, 9]], jnp.int32)
    output, _ = model.apply(model.params, tokens, model.init_cache(2, 8), None, (2, 0))
    embedding = model.params["embed"]["embedding"]
    np.testing.assert_array_equal(output.features[:, :, 1], embedding[tokens])
    # The head is tied: its logits are products of the last norm's output with the embedding.
    np.testing.assert_allclose(output.logits, output.features[:, :, 0] @ embedding.T, atol=1e-4)


def test_resume_refuses_a_layer_that_does_not_exist_and_a_tap_before_it():
    model = transformer(PLAIN)
    hidden, cache = jnp.zeros((1, 2, 16)), model.init_cache(1, 8)
    assert model.resume is not None
    with pytest.raises(ValueError, match="layer=2: the model has 2"):
        model.resume(model.params, hidden, 2, cache, None, ())
    with pytest.raises(ValueError, match=r"taps=\(0,\): 0 is none of the layers 1…2"):
        model.resume(model.params, hidden, 1, cache, None, (0,))


def test_equal_configurations_share_programs():
    first, second = transformer(PLAIN, 0), transformer(dataclasses.replace(PLAIN), 5)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert hash(first.apply) == hash(second.apply)
    assert jax.tree.structure(first) != jax.tree.structure(transformer(BIASED))


def damaged(damage):
    params = jax.tree.map(lambda leaf: leaf, transformer(PLAIN).params)
    damage(params)
    return params


@pytest.mark.parametrize(
    "damage, names",
    [
        (
            lambda p: p["layers"][1].pop("ffn_norm"),
            ["missing", "['layers'][1]['ffn_norm']['scale']"],
        ),
        (lambda p: p.update(head=jnp.zeros((2, 3))), ["unexpected", "['head']", "(2, 3)"]),
        (
            lambda p: p["layers"][0]["attention"]["query"].update(kernel=jnp.zeros((16, 8))),
            ["['layers'][0]['attention']['query']['kernel']", "(16, 8)", "(24, 16)"],
        ),
        (
            lambda p: p["layers"][0]["ffn"]["up"].update(bias=jnp.zeros(24)),
            ["unexpected", "['layers'][0]['ffn']['up']['bias']"],
        ),
        (lambda p: p.pop("embed"), ["missing", "['embed']['embedding']"]),
    ],
)
def test_wrong_weights_are_named(damage, names):
    with pytest.raises(ValueError) as error:
        models.language_model(PLAIN, damaged(damage))
    for name in names:
        assert name in str(error.value)


@pytest.mark.parametrize(
    "changes, shown",
    [
        ({"num_layers": 0}, "num_layers=0"),
        ({"num_kv_heads": 3}, "num_kv_heads=3"),
        ({"head_size": 5}, "head_size=5"),
    ],
)
def test_bad_configurations_print_the_value(changes, shown):
    with pytest.raises(ValueError, match=shown):
        dataclasses.replace(PLAIN, **changes)


@pytest.mark.parametrize(
    "arguments, shown",
    [
        (("ntk", 2.0), "'ntk'"),
        (("linear", 0.5), "0.5"),
        (("linear", float("nan")), "nan"),
        (("yarn", 2.0), "original_context"),
    ],
)
def test_bad_rotary_scaling_prints_the_value(arguments, shown):
    with pytest.raises(ValueError, match=shown):
        models.RotaryScaling(*arguments)


def test_a_misshapen_table_is_refused():
    with pytest.raises(ValueError, match=r"\(5, 5\): .* V \+ 1 = 6"):
        models.tabular_model(jnp.zeros((5, 5)))


def test_tabular_logits_are_the_table():
    table = models.random_table(jax.random.key(2), 4, 3)
    model = models.tabular_model(table)
    output, _ = model.apply(
        model.params, jnp.asarray([[2, 0, 3]], jnp.int32), model.init_cache(1, 4), None, ()
    )
    # Index V stands for "before the first token".
    rows = [table[4, 2], table[2, 0], table[0, 3]]
    np.testing.assert_array_equal(output.logits[0], jnp.stack(rows))


def test_recurrent_logits_by_hand():
    params = recurrent.init_params(jax.random.key(5), 4, 3)
    model = models.recurrent_model(params)
    output, _ = model.apply(
        model.params, jnp.asarray([[2, 0, 3]], jnp.int32), model.init_cache(1, 4), None, ()
    )
    state = np.zeros(3)
    for at, token in enumerate([2, 0, 3]):
        state = np.tanh(state @ np.asarray(params["recurrence"]) + params["embedding"][token])
        np.testing.assert_allclose(output.logits[0, at], state @ params["head"], atol=1e-5)
