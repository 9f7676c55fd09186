"""Small models, one for each family of operations, to be traced and run.

`tests/nets.py` holds networks whose slices an oracle checks; these are only run, so they may be
anything a user brings.
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

from tests.nets import Net, fill


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model with parameters and the kind of input it takes.

    Attributes:
      apply: `apply(params, x [B, ...]) -> outputs`.
      params: its parameters.
      shape: the shape of one sample.
      dtype: of a sample; integers are drawn from 0..9, bytes from 0..255.
    """

    apply: Callable[[Any, jax.Array], Any]
    params: Any
    shape: tuple[int, ...]
    dtype: Any = np.float32

    def images(self, count: int, seed: int = 0) -> np.ndarray:
        """Random samples, `[count, *shape]`."""
        rng = np.random.default_rng([seed, *self.shape])
        if np.issubdtype(self.dtype, np.integer):
            high = 256 if self.dtype == np.uint8 else 10
            return rng.integers(0, high, (count, *self.shape)).astype(self.dtype)
        return rng.normal(size=(count, *self.shape)).astype(self.dtype)


def of_flax(body: Callable, shape: tuple[int, ...], dtype: Any = np.float32) -> Model:
    """A model built of Flax layers."""
    module = Net(body)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *shape), dtype))
    return Model(module.apply, fill(shapes, whole=False, seed=0), shape, dtype)


def of_function(
    apply: Callable, shapes: dict[str, tuple[int, ...]], shape: tuple[int, ...]
) -> Model:
    """A model that is a plain function of a dictionary of arrays."""
    named = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
    return Model(apply, fill(named, whole=False, seed=0), shape)


def rows(x: jax.Array) -> jax.Array:
    """One row a sample."""
    return x.reshape(x.shape[0], -1)


def _mlp() -> Model:
    def body(x):
        x = nn.relu(nn.Dense(8)(x))
        return nn.Dense(3)(nn.relu(nn.Dense(6)(x)))

    return of_flax(body, (5,))


def _plain_function() -> Model:
    def apply(p, x):
        hidden = jnp.maximum(x @ p["first"] + p["offset"][None], 0.0)
        return (hidden - hidden.mean(-1, keepdims=True)) @ p["second"]

    return of_function(apply, {"first": (5, 8), "offset": (8,), "second": (8, 3)}, (5,))


def _lenet() -> Model:
    def body(x):
        x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.avg_pool(nn.relu(nn.Conv(6, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(8)(rows(x)))
        return nn.Dense(4)(x)

    return of_flax(body, (8, 8, 1))


def _norm(x: jax.Array) -> jax.Array:
    return nn.BatchNorm(use_running_average=True)(x)


def _resnet() -> Model:
    def block(x, features, strides):
        y = nn.relu(_norm(nn.Conv(features, (3, 3), strides, use_bias=False)(x)))
        y = _norm(nn.Conv(features, (3, 3), use_bias=False)(y))
        if x.shape != y.shape:
            x = _norm(nn.Conv(features, (1, 1), strides, use_bias=False)(x))
        return nn.relu(y + x)

    def body(x):
        x = nn.relu(_norm(nn.Conv(4, (3, 3), use_bias=False)(x)))
        x = block(block(x, 4, 1), 6, 2)
        return nn.Dense(3)(x.mean(axis=(1, 2)))

    return of_flax(body, (6, 6, 3))


def _vgg() -> Model:
    def body(x):
        for width in (4, 6):
            for _ in range(2):
                x = nn.relu(_norm(nn.Conv(width, (3, 3))(x)))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(3)(nn.relu(nn.Dense(8)(rows(x))))

    return of_flax(body, (8, 8, 3))


def _attention() -> Model:
    def body(x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        x = x + nn.Dense(4)(nn.gelu(nn.Dense(8)(nn.LayerNorm()(x))))
        return nn.Dense(3)(x.mean(axis=1))

    return of_flax(body, (5, 4))


def _masked_attention() -> Model:
    def body(x):
        mask = nn.make_causal_mask(x[..., 0])
        return nn.Dense(3)(nn.MultiHeadDotProductAttention(num_heads=2)(x, mask=mask)[:, -1])

    return of_flax(body, (4, 4))


def _lstm() -> Model:
    return of_flax(lambda x: nn.Dense(3)(nn.RNN(nn.LSTMCell(4))(x)[:, -1]), (5, 3))


def _gru() -> Model:
    return of_flax(lambda x: nn.Dense(3)(nn.RNN(nn.GRUCell(4))(x)[:, -1]), (5, 3))


def _bidirectional() -> Model:
    def body(x):
        x = nn.Bidirectional(nn.RNN(nn.SimpleCell(3)), nn.RNN(nn.GRUCell(3)))(x)
        return nn.Dense(3)(x.max(axis=1))

    return of_flax(body, (4, 3))


def _scans() -> Model:
    """A scan run backwards whose outputs are kept, one in another, and one without inputs."""

    def apply(p, x):
        def inner(carry, row):
            return carry + row, carry * row

        def outer(carry, row):
            total, products = lax.scan(inner, carry[:, 0], row.T)
            carry = jnp.tanh(row @ p["inner"] + carry) + total[:, None]
            return carry, products.sum(0)

        carry, ys = lax.scan(outer, jnp.zeros((x.shape[0], 4)), x.swapaxes(0, 1), reverse=True)
        carry, _ = lax.scan(lambda c, _: (jnp.sin(c), None), carry, None, length=3)
        return (carry + ys.T @ p["sums"]) @ p["out"]

    return of_function(apply, {"inner": (4, 4), "sums": (3, 4), "out": (4, 3)}, (3, 4))


def _loops() -> Model:
    """Loops and branches that do not depend on the sample."""

    def apply(p, x):
        x = lax.fori_loop(0, 3, lambda i, v: jnp.tanh(v @ p["square"]) + i, x)
        steps = lax.while_loop(lambda v: v < 3, lambda v: v + 1, 0)
        scale = lax.cond(p["gate"][0] > 0, jnp.sin, jnp.cos, p["gate"][0])
        return x @ p["out"] * scale + steps

    return of_function(apply, {"square": (4, 4), "gate": (2,), "out": (4, 3)}, (4,))


def _remat() -> Model:
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + nn.relu(nn.Dense(4)(x))

    def body(x):
        x = nn.remat(Block)()(nn.remat(Block)()(x))
        return nn.Dense(3)(jax.checkpoint(jnp.sin)(x))

    return of_flax(body, (4,))


def _convolutions() -> Model:
    """Depthwise, grouped, dilated, strided, padded, circular, 1-D and transposed."""

    def body(x):
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=4)(x))
        x = nn.relu(nn.Conv(6, (3, 2), feature_group_count=2, strides=(2, 1))(x))
        x = nn.relu(nn.Conv(4, (3, 3), kernel_dilation=(1, 2), padding="CIRCULAR")(x))
        x = nn.relu(nn.Conv(4, (2, 2), padding=((1, 0), (0, 2)))(x))
        x = nn.relu(nn.ConvTranspose(3, (3, 3), strides=(2, 2))(x))
        x = nn.relu(nn.Conv(4, (3,), strides=(2,))(x.mean(axis=1)))
        return nn.Dense(3)(rows(x))

    return of_flax(body, (6, 6, 4))


def _channels_first() -> Model:
    def apply(p, x):
        x = lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME")
        x = jax.nn.relu(x + p["bias"][None, :, None, None])
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        return rows(x) @ p["out"]

    shapes = {"kernel": (4, 2, 3, 3), "bias": (4,), "out": (16, 3)}
    return of_function(apply, shapes, (2, 4, 4))


def _pools_and_norms() -> Model:
    def body(x):
        x = nn.GroupNorm(num_groups=2)(nn.Conv(4, (3, 3))(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        x = nn.avg_pool(nn.RMSNorm()(x), (2, 2), padding="SAME", count_include_pad=False)
        x = -nn.max_pool(-x, (2, 2))
        return nn.Dense(3)(jnp.concatenate([x.max((1, 2)), x.min((1, 2)), x.std((1, 2))], -1))

    return of_flax(body, (6, 6, 2))


def _embedding() -> Model:
    def body(tokens):
        x = nn.Embed(10, 4)(tokens)
        return nn.Dense(3)(nn.relu(nn.Dense(6)(x)).mean(axis=1))

    return of_flax(body, (5,), np.int32)


def _bytes() -> Model:
    def body(x):
        x = x.astype(jnp.float32) / 255
        return nn.Dense(3)(rows(nn.relu(nn.Conv(2, (3, 3))(x))))

    return of_flax(body, (4, 4, 1), np.uint8)


def _activations() -> Model:
    kinds = (
        nn.gelu, functools.partial(nn.gelu, approximate=False), nn.silu, nn.softplus,
        nn.leaky_relu, functools.partial(jnp.clip, min=-0.5, max=0.5), nn.elu, nn.selu, nn.relu6,
        nn.sigmoid, nn.tanh, nn.hard_swish, nn.hard_tanh, nn.log_sigmoid, nn.celu, nn.glu,
        nn.soft_sign, nn.standardize,
    )  # fmt: skip

    def body(x):
        parts = jnp.split(nn.Dense(2 * len(kinds))(x), len(kinds), axis=-1)
        return nn.Dense(3)(
            jnp.concatenate([f(part) for f, part in zip(kinds, parts, strict=True)], axis=-1)
        )

    return of_flax(body, (5,))


def _moves() -> Model:
    """Data moved about, selected and reduced."""

    def apply(p, x):
        x = jnp.pad(x, ((0, 0), (1, 0), (0, 1)), constant_values=0.5)
        x = jnp.roll(jnp.flip(x.transpose(0, 2, 1), 1), 1, axis=2)
        left, right = jnp.split(x, 2, axis=2)
        x = jnp.stack([left, jnp.where(left > right, left, 2.0 * right)], axis=1)
        x = jnp.tile(x, (1, 1, 1, 2))[:, :, ::2]
        x = jnp.take(x, jnp.array([3, 0, 0]), axis=3)
        top = lax.dynamic_slice_in_dim(x, 1, 1, axis=1)[:, 0]
        top = top.at[:, 0].add(x[:, 0, 1])
        x = jnp.einsum("bij,bkj,jc->bikc", top, x[:, 1], p["mix"])
        return jnp.cumsum(rows(x), axis=1) @ p["out"]

    return of_function(apply, {"mix": (3, 2), "out": (18, 3)}, (3, 4))


@jax.custom_jvp
def _slow_step(x):
    """Sine whose derivative says 7."""
    return jnp.sin(x)


_slow_step.defjvp(lambda primals, tangents: (_slow_step(primals[0]), 7.0 * tangents[0]))


@jax.custom_vjp
def _through(x):
    """Rounds, with the gradient of the identity (straight-through)."""
    return jnp.round(x)


_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


@jax.custom_vjp
def _matrix(x, w):
    """A product whose gradient lies about the weights."""
    return x @ w


_matrix.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, jnp.full_like(kept[1], 3.0))
)


def _custom_jvp() -> Model:
    def apply(p, x):
        return _slow_step(_slow_step(x @ p["first"]) @ p["second"])

    return of_function(apply, {"first": (5, 4), "second": (4, 3)}, (5,))


def _custom_vjp() -> Model:
    def apply(p, x):
        x = _through(3.0 * (x @ p["first"]))
        return _matrix(x, p["second"]) + 0.5 * x @ _through(2.0 * p["second"])

    return of_function(apply, {"first": (5, 4), "second": (4, 3)}, (5,))


def _softmax() -> Model:
    return of_flax(lambda x: nn.softmax(nn.Dense(4)(nn.relu(nn.Dense(6)(x)))), (5,))


def _log_softmax() -> Model:
    return of_flax(lambda x: nn.log_softmax(nn.Dense(4)(nn.relu(nn.Dense(6)(x)))), (5,))


def _several_outputs() -> Model:
    def body(x):
        x = nn.relu(nn.Dense(6)(x))
        return {"logits": nn.Dense(3)(x), "more": (x, nn.Dense(1)(x)[:, 0])}

    return of_flax(body, (5,))


def _half_precision() -> Model:
    def body(x):
        x = nn.relu(nn.Dense(8, dtype=jnp.bfloat16)(x))
        return nn.Dense(3)(x.astype(jnp.float32))

    return of_flax(body, (5,))


MAKERS = {
    maker.__name__.lstrip("_"): maker
    for maker in (
        _mlp, _plain_function, _lenet, _resnet, _vgg, _attention, _masked_attention, _lstm, _gru,
        _bidirectional, _scans, _loops, _remat, _convolutions, _channels_first, _pools_and_norms,
        _embedding, _bytes, _activations, _moves, _custom_jvp, _custom_vjp, _softmax,
        _log_softmax, _several_outputs, _half_precision,
    )
}  # fmt: skip


@functools.cache
def model(name: str) -> Model:
    """The model of that name, made once."""
    return MAKERS[name]()
