"""Boxes around samples, points in them, and dense networks to bound."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import nnslicer_jax as nns
from nnslicer_jax import evaluation
from tests import zoo

# Radius of the boxes; attention needs a smaller one, where softmax and norms are still bounded.
RADIUS = {"attention": 0.003, "masked_attention": 0.02}


@functools.cache
def traced(name: str) -> tuple[zoo.Model, nns.Graph]:
    """A model of the zoo and its graph."""
    model = zoo.model(name)
    return model, nns.trace(model.apply, model.params, model.images(1))


def box(name: str, count: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends around samples of a model, float32."""
    images, radius = zoo.model(name).images(count), np.float32(RADIUS.get(name, 0.05))
    return images - radius, images + radius


def points(lower: np.ndarray, upper: np.ndarray, count: int) -> np.ndarray:
    """Points of a box, `[count, B, ...]`: some inside, most on faces and corners."""
    rng = np.random.default_rng(0)
    share = np.clip(rng.uniform(-1, 2, (count, *lower.shape)), 0, 1).astype(np.float32)
    return np.clip(lower + share * (upper - lower), lower, upper)


def worst(graph: nns.Graph, params, lower, upper, rows: jax.Array) -> jax.Array:
    """The least of `rows @ logits` `[B, M]` that projected gradient descent finds in a box."""
    lower, upper = jnp.asarray(lower), jnp.asarray(upper)

    def values(x: jax.Array) -> jax.Array:
        return evaluation.logits(graph, params, x) @ rows.T

    def descend(one: jax.Array) -> jax.Array:
        slope = jax.grad(lambda x: (values(x) * one[None]).sum())

        def step(i, x):
            x = x - (upper - lower) * 0.5 ** (i // 3) * 0.5 * jnp.sign(slope(x))
            return jnp.clip(x, lower, upper)

        return values(jax.lax.fori_loop(0, 15, step, (lower + upper) / 2)) @ one

    return jax.lax.map(descend, jnp.eye(len(rows))).T


def either_side(count: int) -> jax.Array:
    """Rows that take every logit, and every logit negated."""
    return jnp.concatenate([jnp.eye(count), -jnp.eye(count)])


class Dense(nn.Module):
    """ReLU between dense layers."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.widths[:-1]:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


def dense(widths: tuple[int, ...], seed: int, whole: bool = False):
    """A dense network as (graph, parameters, float64 layers); the first width is the input's."""
    rng = np.random.default_rng(seed)
    layers = []
    for n, m in zip(widths[:-1], widths[1:], strict=True):
        if whole:
            layers.append((rng.integers(-3, 4, (n, m)), rng.integers(-3, 4, m)))
        else:
            layers.append((rng.normal(size=(n, m)) / np.sqrt(n), rng.normal(size=m) * 0.3))
    # Both sides start from the same float32 numbers.
    layers = [tuple(np.float32(a) for a in pair) for pair in layers]
    params = {"params": {f"Dense_{i}": {"kernel": w, "bias": b} for i, (w, b) in enumerate(layers)}}
    graph = nns.trace(Dense(widths[1:]).apply, params, np.zeros((1, widths[0]), np.float32))
    return graph, params, [(w.astype(float), b.astype(float)) for w, b in layers]
