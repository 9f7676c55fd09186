"""Small networks, each written twice: as a JAX function, and cell by cell for the oracle.

`EXACT` holds one network for every kind of layer. Weights and images are small integers (or
binary fractions where a layer divides), so that float32 and float64 agree to the last digit.
`INEXACT` holds those that take roots and exponentials: attention, recurrent cells, softmax.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.naive.layers import (
    attention,
    batch_norm,
    conv,
    dense,
    gru,
    layer_norm,
    lstm,
    sigmoid,
    softmax,
)  # fmt: skip
from tests.naive.slicing import Network

Apply = Callable[[Any, jax.Array], jax.Array]
Describe = Callable[[Network], object]


class Net(nn.Module):
    """A Flax module with the given body."""

    body: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.body(x)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A network as JAX runs it and as the oracle sees it.

    Attributes:
      apply: `apply(params, x [B, ...]) -> logits [B, K]`.
      params: its parameters.
      shape: the shape of one sample.
      describe: adds the operations to an empty oracle network.
      whole: whether all numbers are integers or binary fractions.
      channel: the axis of a sample along which its channels lie.
    """

    apply: Apply
    params: Any
    shape: tuple[int, ...]
    describe: Describe
    whole: bool
    channel: int = -1

    def images(self, count: int, seed: int = 0) -> np.ndarray:
        """Random samples, `[count, *shape]` float32: -3..3 if whole, else standard normal."""
        rng = np.random.default_rng([seed, *self.shape])
        if self.whole:
            return rng.integers(-3, 4, (count, *self.shape)).astype(np.float32)
        return rng.normal(size=(count, *self.shape)).astype(np.float32)

    @functools.cached_property
    def network(self) -> Network:
        """The oracle's description."""
        network = Network(self.shape, flat(self.params), self.channel)
        self.describe(network)
        return network


def flat(params: Any) -> dict[str, np.ndarray]:
    """Parameters by their path joined with "/"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in leaves
    }


def fill(shapes: Any, whole: bool, seed: int) -> Any:
    """Random parameters: -2..2 if whole, else normal by fan-in; variances positive."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        if path[-1].key == "var":
            return jnp.asarray(rng.choice([0.25, 1.0, 4.0], leaf.shape), jnp.float32)
        if whole:
            return jnp.asarray(rng.integers(-2, 3, leaf.shape), jnp.float32)
        fan_in = max(1, int(np.prod(leaf.shape[:-1])))
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(fan_in), jnp.float32)

    return jax.tree_util.tree_map_with_path(one, shapes)


def flax_case(
    body: Callable[[jax.Array], jax.Array],
    describe: Describe,
    shape: tuple[int, ...],
    whole: bool = True,
    seed: int = 0,
) -> Case:
    """A case whose body is built of Flax layers."""
    module = Net(body)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *shape)))

    def inside(network: Network) -> None:
        with network.scope("Net"):
            describe(network)

    return Case(module.apply, fill(shapes, whole, seed), shape, inside, whole)


def plain_case(
    apply: Apply,
    shapes: dict[str, tuple[int, ...]],
    describe: Describe,
    shape: tuple[int, ...],
    whole: bool = True,
    seed: int = 0,
    channel: int = -1,
) -> Case:
    """A case that is a plain function of a dictionary of arrays."""
    named = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
    return Case(apply, fill(named, whole, seed), shape, describe, whole, channel)


# Networks ------------------------------------------------------------------------------------


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1)


def _mlp() -> Case:
    def body(x):
        x = nn.relu(nn.Dense(6)(x))
        x = nn.relu(nn.Dense(5)(x))
        return nn.Dense(3)(x)

    def describe(n):
        x = n.relu(dense(n, n.input, "Dense_0"))
        dense(n, n.relu(dense(n, x, "Dense_1")), "Dense_2")

    return flax_case(body, describe, (7,))


def _plain_mlp() -> Case:
    def apply(p, x):
        return jnp.maximum(x @ p["first"] + p["offset"][None], 0.0) @ p["second"]

    def describe(n):
        x = n.bias(n.contract(n.input, "first"), "offset")
        n.contract(n.relu(x, "max"), "second")

    shapes = {"first": (6, 8), "offset": (8,), "second": (8, 4)}
    return plain_case(apply, shapes, describe, (6,))


def _convolution(shape, body, describe_convolution) -> Case:
    """A convolution with ReLU under a dense layer."""

    def whole_body(x):
        return nn.Dense(3)(_rows(nn.relu(body(x))))

    def describe(n):
        x = n.relu(describe_convolution(n))
        dense(n, x.ravel(), "Dense_0")

    return flax_case(whole_body, describe, shape)


def _conv_valid() -> Case:
    return _convolution(
        (4, 4, 2),
        lambda x: nn.Conv(3, (3, 3), padding="VALID")(x),
        lambda n: conv(n, n.input, "Conv_0", (1, 1)),
    )


def _conv_same_strided() -> Case:
    return _convolution(
        (4, 4, 2),
        lambda x: nn.Conv(3, (3, 3), strides=(2, 1))(x),
        lambda n: conv(n, n.input, "Conv_0", (2, 1), "SAME"),
    )


def _conv_padded() -> Case:
    return _convolution(
        (4, 4, 1),
        lambda x: nn.Conv(2, (2, 4), padding=((1, 0), (2, 1)))(x),
        lambda n: conv(n, n.input, "Conv_0", (1, 1), [(1, 0), (2, 1)]),
    )


def _conv_dilated() -> Case:
    return _convolution(
        (4, 4, 1),
        lambda x: nn.Conv(2, (2, 2), padding="VALID", kernel_dilation=(2, 3))(x),
        lambda n: conv(n, n.input, "Conv_0", (1, 1), "VALID", (2, 3)),
    )


def _conv_grouped() -> Case:
    return _convolution(
        (4, 4, 4),
        lambda x: nn.Conv(6, (3, 3), padding="VALID", feature_group_count=2)(x),
        lambda n: conv(n, n.input, "Conv_0", (1, 1), "VALID", groups=2),
    )


def _conv_depthwise() -> Case:
    return _convolution(
        (4, 4, 3),
        lambda x: nn.Conv(6, (2, 2), feature_group_count=3)(x),
        lambda n: conv(n, n.input, "Conv_0", (1, 1), "SAME", groups=3),
    )


def _conv_1d() -> Case:
    return _convolution(
        (8, 2),
        lambda x: nn.Conv(3, (3,), strides=(2,))(x),
        lambda n: conv(n, n.input, "Conv_0", (2,), "SAME"),
    )


def _conv_transposed() -> Case:
    return _convolution(
        (2, 2, 2),
        lambda x: nn.ConvTranspose(2, (2, 2), strides=(2, 2), padding="VALID", use_bias=False)(x),
        _describe_transposed,
    )


def _describe_transposed(n):
    with n.scope("ConvTranspose_0"):
        return n.convolution_transposed(
            n.input, "params/ConvTranspose_0/kernel", (2, 2), [(1, 1), (1, 1)]
        )


def _conv_channels_first() -> Case:
    def apply(p, x):
        layout = ("NCHW", "OIHW", "NCHW")
        x = jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=layout)
        x = nn.relu(x + p["bias"][None, :, None, None])
        return x.reshape(x.shape[0], -1) @ p["out"]

    def describe(n):
        x = n.convolution(n.input, "kernel", (1, 1), "SAME", channel_first=True)
        x = n.relu(n.bias(x, "bias", axis=0), axis=0)
        n.contract(x.ravel(), "out")

    shapes = {"kernel": (3, 2, 3, 3), "bias": (3,), "out": (48, 3)}
    return plain_case(apply, shapes, describe, (2, 4, 4), channel=0)


def _max_pool() -> Case:
    def body(x):
        return nn.Dense(3)(_rows(nn.max_pool(nn.relu(nn.Conv(3, (3, 3))(x)), (2, 2), (2, 2))))

    def describe(n):
        x = n.relu(conv(n, n.input, "Conv_0", (1, 1), "SAME"))
        dense(n, n.pool(x, "max", (2, 2), (2, 2)).ravel(), "Dense_0")

    return flax_case(body, describe, (4, 4, 1))


def _max_pool_overlapping() -> Case:
    def body(x):
        return nn.Dense(3)(_rows(nn.max_pool(x, (3, 2), (2, 1), padding="SAME")))

    def describe(n):
        dense(n, n.pool(n.input, "max", (3, 2), (2, 1), "SAME").ravel(), "Dense_0")

    return flax_case(body, describe, (4, 4, 2))


def _avg_pool() -> Case:
    def body(x):
        x = nn.avg_pool(nn.relu(nn.Conv(3, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(3)(_rows(x))

    def describe(n):
        x = n.relu(conv(n, n.input, "Conv_0", (1, 1), "SAME"))
        x = n.scale(n.pool(x, "sum", (2, 2), (2, 2)), 1 / 4, label="div")
        dense(n, x.ravel(), "Dense_0")

    return flax_case(body, describe, (4, 4, 1))


def _avg_pool_uneven() -> Case:
    def body(x):
        x = nn.avg_pool(x, (2, 2), (1, 1), padding="SAME", count_include_pad=False)
        return nn.Dense(3)(_rows(x))

    def describe(n):
        x = n.pool(n.input, "sum", (2, 2), (1, 1), "SAME")
        counts = np.array([[4.0, 2.0], [2.0, 1.0]])[:, :, None]
        dense(n, n.scale(x, 1 / counts, label="div").ravel(), "Dense_0")

    return flax_case(body, describe, (2, 2, 2))


def _batch_norm() -> Case:
    def body(x):
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, epsilon=0.0)(x))
        return nn.Dense(3)(_rows(x))

    def describe(n):
        with n.scope("Conv_0"):
            x = n.convolution(n.input, "params/Conv_0/kernel", (1, 1), "SAME")
        dense(n, n.relu(batch_norm(n, x, "BatchNorm_0")).ravel(), "Dense_0")

    return flax_case(body, describe, (2, 4, 2))


def _residual() -> Case:
    def body(x):
        y = nn.relu(nn.Conv(3, (3, 3))(x))
        y = nn.Conv(2, (3, 3))(y)
        return nn.Dense(3)(_rows(nn.relu(x + y)))

    def describe(n):
        y = n.relu(conv(n, n.input, "Conv_0", (1, 1), "SAME"))
        y = conv(n, y, "Conv_1", (1, 1), "SAME")
        dense(n, n.relu(n.total([(n.input, 1.0), (y, 1.0)])).ravel(), "Dense_0")

    return flax_case(body, describe, (2, 4, 2))


def _moves() -> Case:
    """Reshape, transpose, pad, slice, reverse, concatenate, squeeze, broadcast; two readers."""

    def apply(p, x):
        x = jnp.maximum(x.reshape(-1, 8) @ p["first"], 0.0).reshape(-1, 2, 4)
        turned = jnp.swapaxes(x, 1, 2)
        padded = jnp.pad(turned, ((0, 0), (1, 0), (0, 1)))
        strided = padded[:, ::2, :2][:, ::-1]
        both = jnp.concatenate([x.reshape(-1, 4, 2), strided], axis=1)
        row = both[:, 3]
        wide = jnp.broadcast_to(row[:, None], (row.shape[0], 3, 2))
        together = jnp.concatenate([both, wide], axis=1)
        return together.reshape(-1, 20) @ p["second"]

    def describe(n):
        x = n.relu(n.contract(n.input.reshape(8), "first"), "max").reshape(2, 4)
        strided = n.pad(x.T, [(1, 0), (0, 1)])[::2, :2][::-1]
        both = np.concatenate([x.reshape(4, 2), strided])
        together = np.concatenate([both, np.broadcast_to(both[3], (3, 2))])
        n.contract(together.ravel(), "second")

    return plain_case(apply, {"first": (8, 8), "second": (20, 3)}, describe, (2, 4))


def _padded_convolution() -> Case:
    """Padding as an operation of its own, before a convolution without any."""

    def body(x):
        x = jnp.pad(x, ((0, 0), (1, 1), (0, 1), (0, 0)))
        return nn.Dense(3)(_rows(nn.relu(nn.Conv(2, (3, 2), padding="VALID")(x))))

    def describe(n):
        x = n.pad(n.input, [(1, 1), (0, 1), (0, 0)])
        dense(n, n.relu(conv(n, x, "Conv_0", (1, 1))).ravel(), "Dense_0")

    return flax_case(body, describe, (4, 4, 1))


def _global_mean() -> Case:
    def body(x):
        return nn.Dense(3)(nn.relu(nn.Conv(4, (2, 2))(x)).mean(axis=(1, 2)))

    def describe(n):
        x = n.relu(conv(n, n.input, "Conv_0", (1, 1), "SAME"))
        dense(n, n.scale(n.reduce_sum(x, [0, 1]), 1 / 8, label="div"), "Dense_0")

    return flax_case(body, describe, (2, 4, 1))


def _global_sum() -> Case:
    def apply(p, x):
        return jnp.sum(x, axis=2) @ p["out"]

    def describe(n):
        n.contract(n.reduce_sum(n.input, [1]), "out")

    return plain_case(apply, {"out": (4, 3)}, describe, (4, 2))


def _global_max() -> Case:
    def body(x):
        return nn.Dense(3)(nn.Conv(4, (2, 2))(x).max(axis=(1, 2)))

    def describe(n):
        x = conv(n, n.input, "Conv_0", (1, 1), "SAME")
        dense(n, n.reduce_max(x, [0, 1]), "Dense_0")

    return flax_case(body, describe, (2, 4, 1))


def _maximum() -> Case:
    def apply(p, x):
        return jnp.maximum(x @ p["left"], x @ p["right"]) @ p["out"]

    def describe(n):
        left, right = n.contract(n.input, "left"), n.contract(n.input, "right")
        n.contract(n.maximum(left, right), "out")

    shapes = {"left": (2, 16), "right": (2, 16), "out": (16, 3)}
    return plain_case(apply, shapes, describe, (2,))


def _constants() -> Case:
    """Arithmetic with numbers that are no parameters."""

    def apply(p, x):
        x = jnp.maximum(x @ p["first"], 1.0)
        x = 2.0 - x / 4.0
        x = 3.0 * (x - 1.0)
        return jnp.abs(-x) @ p["second"]

    def describe(n):
        x = n.relu(n.contract(n.input, "first"), "max", floor=1.0)
        x = n.scale(n.scale(x, 1 / 4, label="div"), -1.0, label="sub", constant=2.0)
        x = n.scale(n.bias(x, 1.0, "sub", negative=True), 3.0)
        n.contract(n.function(n.scale(x, -1.0, label="neg"), abs, "abs"), "second")

    return plain_case(apply, {"first": (4, 8), "second": (8, 3)}, describe, (4,))


def _negatives() -> Case:
    """A value negated, or taken from a number, is a sum of one term: one of 0 ends a path."""

    def apply(p, x):
        x = nn.relu(x @ p["first"])
        return jnp.concatenate([-x, 2.0 - x], axis=1) @ p["second"]

    def describe(n):
        x = n.relu(n.contract(n.input, "first"))
        parts = [n.scale(x, -1.0, label="neg"), n.scale(x, -1.0, label="sub", constant=2.0)]
        n.contract(np.concatenate(parts), "second")

    return plain_case(apply, {"first": (3, 6), "second": (12, 3)}, describe, (3,))


def _difference() -> Case:
    def apply(p, x):
        x = x @ p["left"] - x @ p["right"]
        return (x - x[:, ::-1]) @ p["out"]

    def describe(n):
        left, right = n.contract(n.input, "left"), n.contract(n.input, "right")
        x = n.total([(left, 1.0), (right, -1.0)], "sub")
        n.contract(n.total([(x, 1.0), (x[::-1], -1.0)], "sub"), "out")

    shapes = {"left": (3, 6), "right": (3, 6), "out": (6, 3)}
    return plain_case(apply, shapes, describe, (3,))


def _gating() -> Case:
    """A channel gate: `x` times a function of its mean."""

    def body(x):
        gate = nn.relu(nn.Dense(3)(x.mean(axis=(1, 2))))
        x = x * gate[:, None, None, :]
        return nn.Dense(3)(_rows(x))

    def describe(n):
        mean = n.scale(n.reduce_sum(n.input, [0, 1]), 1 / 4, label="div")
        gate = n.relu(dense(n, mean, "Dense_0"))
        dense(n, n.product(n.input, gate).ravel(), "Dense_1")

    return flax_case(body, describe, (2, 2, 3))


def _powers() -> Case:
    def apply(p, x):
        x = x @ p["first"]
        return jnp.concatenate([x * x, jnp.square(x), x**3], axis=1) @ p["second"]

    def describe(n):
        x = n.contract(n.input, "first")
        product = n.product(x, x)
        square = n.function(x, lambda v: v**2, "square")
        cube = n.function(x, lambda v: v**3, "integer_pow")
        n.contract(np.concatenate([product, square, cube]), "second")

    return plain_case(apply, {"first": (3, 4), "second": (12, 3)}, describe, (3,))


def _cumulative() -> Case:
    """Sums, maxima and products of what came so far, and products of a whole row."""

    def apply(p, x):
        x = x @ p["first"]
        sums = jnp.cumsum(x, axis=-1)
        backward = lax.cumsum(x, axis=1, reverse=True)
        parts = [sums, backward, lax.cummax(x, axis=1), jnp.cumprod(x, axis=1)]
        rows = jnp.prod(x.reshape(-1, 2, 3), axis=1)
        return jnp.concatenate([*parts, rows], axis=1) @ p["second"]

    def describe(n):
        x = n.contract(n.input, "first")
        sums, backward = n.cumulative(x, "cumsum"), n.cumulative(x, "cumsum", reverse=True)
        parts = [sums, backward, n.cumulative(x, "cummax"), n.cumulative(x, "cumprod")]
        rows = n.reduce_prod(x.reshape(2, 3), [0])
        n.contract(np.concatenate([*parts, rows]), "second")

    return plain_case(apply, {"first": (3, 6), "second": (27, 3)}, describe, (3,))


def _cumulative_over_positions() -> Case:
    """Along an axis that is not the last."""

    def apply(p, x):
        return jnp.cumsum(x @ p["first"], axis=1).reshape(-1, 12) @ p["second"]

    def describe(n):
        x = n.contract(n.input, "first")
        n.contract(n.cumulative(x, "cumsum", axis=0).ravel(), "second")

    return plain_case(apply, {"first": (2, 3), "second": (12, 3)}, describe, (4, 2))


def _graph_convolution() -> Case:
    """Messages along edges, added up from nothing and to what nodes hold; one leads nowhere."""
    sources, places = np.array([0, 1, 2, 3, 3, 1]), np.array([1, 0, 1, 2, 9, 1])

    def apply(p, x):
        x = x @ p["first"]
        x = nn.relu(jnp.zeros_like(x).at[:, places].add(x[:, sources]))
        x = x.at[:, places].add(x[:, sources])
        return x.reshape(-1, 12) @ p["second"]

    def describe(n):
        x = n.contract(n.input, "first")
        x = n.relu(n.bias(n.landing(x[sources], places, 4), 0.0))
        n.contract(n.landing(x[sources], places, 4, before=x).ravel(), "second")

    return plain_case(apply, {"first": (2, 3), "second": (12, 3)}, describe, (4, 2))


def _graph_by_adjacency() -> Case:
    """Neighbours added up by a product with a constant."""
    adjacency = np.array([[1, 1, 0, 0], [-1, 1, 2, 0], [0, 0, 0, 0], [0, 1, 1, 1]], np.float32)

    def apply(p, x):
        x = nn.relu(jnp.einsum("pq,bqc->bpc", jnp.asarray(adjacency), x @ p["first"]))
        return jnp.einsum("bqc,pq->bpc", x, adjacency).reshape(-1, 12) @ p["second"]

    def describe(n):
        x = n.contract(n.input, "first")
        with n.scope("pq,bqc->bpc"):
            x = n.mix(x, adjacency, channel_first=True).T
        x = n.relu(x)
        with n.scope("bqc,pq->bpc"):
            x = n.mix(x, adjacency)
        n.contract(x.ravel(), "second")

    return plain_case(apply, {"first": (2, 3), "second": (12, 3)}, describe, (4, 2))


def _graph_of_the_input() -> Case:
    """The adjacency is part of the sample."""

    def apply(p, x):
        adjacency, x = x[..., :4], x[..., 4:] @ p["first"]
        return nn.relu(adjacency @ x).reshape(-1, 12) @ p["second"]

    def describe(n):
        adjacency, x = n.input[:, :4], n.contract(n.input[:, 4:], "first")
        n.contract(n.relu(n.matrix_product(adjacency, x)).ravel(), "second")

    return plain_case(apply, {"first": (2, 3), "second": (12, 3)}, describe, (4, 6))


def _matrix_products() -> Case:
    """Attention without a softmax: products of two values that both depend on the image."""

    def apply(p, x):
        query, key, value = (x @ p[name] for name in ("query", "key", "value"))
        mixed = jnp.matmul(jnp.matmul(query, jnp.swapaxes(key, 1, 2)), value)
        return mixed.reshape(-1, 8) @ p["out"]

    def describe(n):
        query, key, value = (n.contract(n.input, name) for name in ("query", "key", "value"))
        n.contract(n.matrix_product(n.matrix_product(query, key.T), value).ravel(), "out")

    shapes = {"query": (3, 2), "key": (3, 2), "value": (3, 2), "out": (8, 3)}
    return plain_case(apply, shapes, describe, (4, 3))


def _tied_weights() -> Case:
    def apply(p, x):
        return nn.relu(x @ p["weights"]) @ p["weights"].T

    def describe(n):
        n.contract_transposed(n.relu(n.contract(n.input, "weights")), "weights")

    return plain_case(apply, {"weights": (5, 6)}, describe, (5,))


def _weights_first() -> Case:
    """Products written for one sample, the weights on the left."""

    def apply(p, x):
        return jax.vmap(lambda s: p["second"] @ nn.relu(p["first"] @ s))(x)

    def describe(n):
        with n.scope("vmap()"):
            x = n.contract_transposed(n.input, "first")
            n.contract_transposed(n.relu(x), "second")

    return plain_case(apply, {"first": (6, 5), "second": (3, 6)}, describe, (5,))


def _layer_used_twice() -> Case:
    def body(x):
        layer = nn.Dense(4)
        x = nn.relu(layer(nn.relu(layer(x))))
        return nn.Dense(3)(x)

    def describe(n):
        x = n.relu(dense(n, n.input, "Dense_0"))
        dense(n, n.relu(dense(n, x, "Dense_0")), "Dense_1")

    return flax_case(body, describe, (4,))


def _dense_over_positions() -> Case:
    def body(x):
        x = nn.relu(nn.Dense(4)(x))
        return nn.Dense(3)(_rows(x))

    def describe(n):
        dense(n, n.relu(dense(n, n.input, "Dense_0")).ravel(), "Dense_1")

    return flax_case(body, describe, (2, 4, 3))


def _dense_general() -> Case:
    def body(x):
        return nn.Dense(3)(_rows(nn.DenseGeneral((2, 3), axis=(-2, -1))(x)))

    def describe(n):
        dense(n, dense(n, n.input, "DenseGeneral_0", axes=2).ravel(), "Dense_0")

    return flax_case(body, describe, (4, 2))


def _scaled_by_parameter() -> Case:
    def apply(p, x):
        return (p["scale"][None] * (x @ p["first"]) * -2.0 / -4.0) @ p["second"]

    def describe(n):
        x = n.contract(n.input, "first")
        x = n.scale(x, n.parameters["scale"], "scale")
        n.contract(n.scale(n.scale(x, -2.0), -1 / 4, label="div"), "second")

    return plain_case(apply, {"scale": (6,), "first": (4, 6), "second": (6, 3)}, describe, (4,))


def _divided_by_parameter() -> Case:
    def apply(p, x):
        x = x @ p["first"] / p["divisor"][None]
        return (x * (1 / p["second"])[None] * (p["third"] ** -1)[None]) @ p["out"]

    def describe(n):
        x = n.contract(n.input, "first")
        x = n.scale(x, 1 / n.parameters["divisor"], "divisor", label="div")
        for name in ("second", "third"):
            x = n.scale(x, 1 / n.parameters[name], name)
        n.contract(x, "out")

    sizes = {"first": (4, 6), "divisor": (6,), "second": (6,), "third": (6,), "out": (6, 3)}
    case = plain_case(apply, sizes, describe, (4,))
    divisors = jnp.array([[1.0, -2.0, 4.0, -1.0, 0.5, 2.0]])
    params = {k: v if v.ndim > 1 else divisors[0] for k, v in case.params.items()}
    return dataclasses.replace(case, params=params)


def _lenet() -> Case:
    def body(x):
        x = nn.max_pool(nn.relu(nn.Conv(3, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.avg_pool(nn.relu(nn.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(5)(_rows(x)))
        return nn.Dense(4)(x)

    def describe(n):
        x = n.relu(conv(n, n.input, "Conv_0", (1, 1), "SAME"))
        x = n.pool(x, "max", (2, 2), (2, 2))
        x = n.relu(conv(n, x, "Conv_1", (1, 1), "SAME"))
        x = n.scale(n.pool(x, "sum", (2, 2), (2, 2)), 1 / 4, label="div")
        dense(n, n.relu(dense(n, x.ravel(), "Dense_0")), "Dense_1")

    return flax_case(body, describe, (8, 8, 1))


def _resnet() -> Case:
    def norm(x):
        return nn.BatchNorm(use_running_average=True, epsilon=0.0)(x)

    def body(x):
        y = nn.relu(norm(nn.Conv(2, (3, 3), (2, 2), use_bias=False)(x)))
        y = norm(nn.Conv(2, (3, 3), use_bias=False)(y))
        x = norm(nn.Conv(2, (1, 1), (2, 2), use_bias=False)(x))
        return nn.Dense(3)(nn.relu(y + x).mean(axis=(1, 2)))

    def plain(n, x, name, strides):
        with n.scope(name):
            return n.convolution(x, f"params/{name}/kernel", strides, "SAME")

    def describe(n):
        y = n.relu(batch_norm(n, plain(n, n.input, "Conv_0", (2, 2)), "BatchNorm_0"))
        y = batch_norm(n, plain(n, y, "Conv_1", (1, 1)), "BatchNorm_1")
        x = batch_norm(n, plain(n, n.input, "Conv_2", (2, 2)), "BatchNorm_2")
        x = n.relu(n.total([(y, 1.0), (x, 1.0)]))
        dense(n, n.scale(n.reduce_sum(x, [0, 1]), 1 / 4, label="div"), "Dense_0")

    return flax_case(body, describe, (4, 4, 2))


def _attention_block() -> Case:
    """A transformer's block: normalised attention and a normalised MLP, both residual."""

    def body(x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        y = nn.silu(nn.Dense(6)(nn.LayerNorm()(x)))
        x = x + nn.Dense(4)(y)
        return nn.Dense(3)(x.mean(axis=1))

    def describe(n):
        y = layer_norm(n, n.input, "LayerNorm_0", 1e-6)
        y = attention(n, y, "MultiHeadDotProductAttention_0")
        x = n.total([(n.input, 1.0), (y, 1.0)])
        y = dense(n, layer_norm(n, x, "LayerNorm_1", 1e-6), "Dense_0")
        y = n.function(y, lambda v: v * sigmoid(v), "silu")
        x = n.total([(x, 1.0), (dense(n, y, "Dense_1"), 1.0)])
        dense(n, n.scale(n.reduce_sum(x, [0]), 1 / 3, label="div"), "Dense_2")

    return flax_case(body, describe, (3, 4), whole=False)


def _causal_attention() -> Case:
    """Attention in which each position reads those before it."""

    def body(x):
        mask = nn.make_causal_mask(x[..., 0])
        return nn.Dense(3)(nn.MultiHeadDotProductAttention(num_heads=2)(x, mask=mask).mean(axis=1))

    def describe(n):
        mask = np.tril(np.ones((3, 3), bool))
        x = attention(n, n.input, "MultiHeadDotProductAttention_0", mask)
        dense(n, n.scale(n.reduce_sum(x, [0]), 1 / 3, label="div"), "Dense_0")

    return flax_case(body, describe, (3, 4), whole=False)


def _softmax_inside() -> Case:
    def body(x):
        x = nn.softmax(nn.Dense(5)(x))
        return nn.Dense(3)(x)

    def describe(n):
        dense(n, softmax(n, dense(n, n.input, "Dense_0")), "Dense_1")

    return flax_case(body, describe, (4,), whole=False)


def _quotient() -> Case:
    def apply(p, x):
        return ((x @ p["top"]) / (1.0 + jnp.exp(x @ p["bottom"]))) @ p["out"]

    def describe(n):
        top = n.contract(n.input, "top")
        bottom = n.bias(n.function(n.contract(n.input, "bottom"), np.exp, "exp"), 1.0)
        n.contract(n.divide(top, bottom, "integer_pow", "mul"), "out")

    shapes = {"top": (4, 6), "bottom": (4, 6), "out": (6, 3)}
    return plain_case(apply, shapes, describe, (4,), whole=False)


def _elementwise() -> Case:
    def body(x):
        x = jnp.tanh(nn.Dense(6)(x))
        x = nn.sigmoid(nn.Dense(6)(x))
        x = jnp.exp(nn.Dense(4)(x))
        return nn.Dense(3)(x)

    def describe(n):
        x = n.function(dense(n, n.input, "Dense_0"), np.tanh, "tanh")
        x = n.function(dense(n, x, "Dense_1"), sigmoid, "logistic")
        dense(n, n.function(dense(n, x, "Dense_2"), np.exp, "exp"), "Dense_3")

    return flax_case(body, describe, (5,), whole=False)


def _recurrent(cell: type[nn.Module], unrolled: Callable) -> Case:
    def body(x):
        return nn.Dense(3)(nn.RNN(cell(3))(x)[:, -1])

    name = f"{cell.__name__}_0"

    def describe(n):
        states = unrolled(
            n, n.input, f"params/{name}", lambda t: f"RNN_0[{t}]/{name}.scan_fn/{name}"
        )
        dense(n, states[-1], "Dense_0")

    return flax_case(body, describe, (3, 3), whole=False)


def _lstm() -> Case:
    return _recurrent(nn.LSTMCell, lstm)


def _gru() -> Case:
    return _recurrent(nn.GRUCell, gru)


def _table(*makers: Callable[[], Case]) -> dict[str, Callable[[], Case]]:
    return {maker.__name__.lstrip("_"): functools.cache(maker) for maker in makers}


EXACT = _table(
    _mlp, _plain_mlp, _conv_valid, _conv_same_strided, _conv_padded, _conv_dilated, _conv_grouped,
    _conv_depthwise, _conv_1d, _conv_transposed, _conv_channels_first, _max_pool,
    _max_pool_overlapping, _avg_pool, _avg_pool_uneven, _batch_norm, _residual, _moves,
    _padded_convolution, _global_mean, _global_sum, _global_max, _maximum, _constants, _negatives,
    _difference, _gating, _powers, _cumulative, _cumulative_over_positions, _graph_convolution,
    _graph_by_adjacency, _graph_of_the_input,
    _matrix_products,
    _tied_weights, _weights_first, _layer_used_twice, _dense_over_positions, _dense_general,
    _scaled_by_parameter, _divided_by_parameter, _lenet, _resnet,
)  # fmt: skip
INEXACT = _table(
    _attention_block, _causal_attention, _softmax_inside, _quotient, _elementwise, _lstm, _gru
)  # fmt: skip
