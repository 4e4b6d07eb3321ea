"""Muon: near-orthogonal updates, by hand; Adam for what is no matrix."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.training import core, muon


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def last(optimizer: Any, params, *gradients) -> Any:
    """The update that the last of some gradients makes."""
    state, update = optimizer.init(params), None
    for gradient in gradients:
        with jax.numpy_dtype_promotion("standard"):
            update, state = optimizer.update(gradient, state, params)
    return update


@pytest.mark.parametrize("shape", [(3, 3), (48, 16), (16, 48), (1, 7)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_matrix_is_turned_into_the_nearest_orthogonal_one(shape, scale):
    matrix = normal(0, *shape)
    left, values, right = np.linalg.svd(np.asarray(matrix), full_matrices=False)
    made = np.asarray(muon.orthogonal(scale * matrix))
    # In the matrix's own directions: none of them is turned, and each is about as long.
    sizes = left.T @ made @ right.T
    assert values.min() / values.max() > 0.01
    np.testing.assert_allclose(sizes, np.diag(np.diag(sizes)), atol=0.05)
    assert np.all((np.diag(sizes) > 0.6) & (np.diag(sizes) < 1.3))


def test_nothing_moves_where_there_is_no_gradient():
    assert not np.any(muon.orthogonal(jnp.zeros((4, 6))))


def test_updates_by_hand():
    params = {"matrix": normal(0, 8, 4), "scale": jnp.ones(4)}
    first, second = ({"matrix": normal(n, 8, 4), "scale": normal(n, 4)} for n in (1, 2))
    update = last(core.MUON, params, first, second)
    wanted = last(core.ADAM, params["scale"], first["scale"], second["scale"])
    momentum = 0.95 * first["matrix"] + second["matrix"]
    ahead = muon.orthogonal(0.95 * momentum + second["matrix"])
    np.testing.assert_allclose(update["matrix"], 0.2 * 8**0.5 * ahead, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(update["scale"], 0.3 * wanted, rtol=1e-6)
    # About the size of Adam's: one rate suits both.
    assert 0.1 < np.sqrt(np.mean(np.square(update["matrix"]))) < 0.3
