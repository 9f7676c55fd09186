"""Small pairs of models for the tests of the search."""

import jax
import jax.numpy as jnp
import numpy as np

import difftest

SHAPE = (8, 8, 1)


def _linear(params, x):
    return x.reshape(len(x), -1) @ params["kernel"] + params["bias"][None]


def linear_pair(apart=0.4, classes=4, seed=0):
    """Two linear models of smooth 8 x 8 images whose weights differ by a part ``apart``."""
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=(64, classes))
    other = kernel + apart * rng.normal(size=kernel.shape)
    models = [
        difftest.jax_model(
            _linear,
            {
                "kernel": jnp.asarray(weights, jnp.float32),
                "bias": jnp.asarray(-0.5 * weights.sum(0), jnp.float32),
            },
        )
        for weights in (kernel, other)
    ]
    return difftest.ModelPair(*models)


def as_black_box(pair):
    """The same models as plain functions, so that the host searches."""
    return difftest.ModelPair(lambda x: pair.original(x), lambda x: pair.compressed(x))


def seeds(number, seed=0):
    """Smooth images: noise in blocks of 2 x 2."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (number, 4, 4, 1)).astype(np.uint8)
    return small.repeat(2, axis=1).repeat(2, axis=2)


def assert_same_search(one, other):
    """Whatever two searches found is the same."""
    assert one.status.tolist() == other.status.tolist()
    assert one.queries.tolist() == other.queries.tolist()
    assert (one.triggers == other.triggers).all()
    assert one.chains == other.chains
    assert one.errors == other.errors
    np.testing.assert_allclose(one.outputs_original, other.outputs_original, atol=1e-6)


KEY = jax.random.key(7)
