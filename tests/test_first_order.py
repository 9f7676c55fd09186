"""Quick gradients are the gradients of the operations themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import nnslicer_jax as nns
from nnslicer_jax.evaluation import evaluated, logits

LAYOUT = ("NHWC", "HWIO", "NHWC")


def whole(*shape: int, seed: int = 0) -> jax.Array:
    """Small whole numbers, so that sums are exact in any order."""
    return jnp.asarray(np.random.default_rng(seed).integers(-3, 4, shape), jnp.float32)


def same_as_the_operation(apply, params, x, name):
    """Runs behind `name` again under an edit: equal values, and equal gradients for the edit."""
    graph = nns.trace(apply, params, x[:1])

    def plain(factor):
        return nns.evaluate(graph, params, x, {name: lambda a: a * factor})[0]

    def again(factor):
        return evaluated(graph, params, x).again({name: lambda a: a * factor[None]})

    factor = whole(*graph.neurons()[name].shape, seed=1)
    out, pull = jax.vjp(jax.jit(plain), factor)
    found, push = jax.vjp(jax.jit(again), factor)
    np.testing.assert_array_equal(found, out)
    back = whole(*out.shape, seed=2)
    np.testing.assert_array_equal(push(back)[0], pull(back)[0])
    assert np.abs(pull(back)[0]).max() > 0
    out, pull = jax.vjp(jax.jit(lambda p: nns.evaluate(graph, p, x)[0]), params)
    found, push = jax.vjp(jax.jit(lambda p: logits(graph, p, x)), params)
    np.testing.assert_array_equal(found, out)
    jax.tree.map(np.testing.assert_array_equal, push(back), pull(back))


@pytest.mark.parametrize("channels", [3, 40])
@pytest.mark.parametrize(
    ("size", "window", "strides", "padding", "dilation"),
    [
        ((6, 5), (3, 3), (1, 1), "SAME", (1, 1)),
        ((6, 5), (3, 2), (1, 1), "VALID", (1, 1)),
        ((6, 7), (5, 5), (2, 2), "SAME", (1, 1)),
        ((7, 6), (3, 3), (2, 3), "VALID", (1, 1)),
        ((6, 6), (1, 1), (2, 2), "VALID", (1, 1)),
        ((6, 6), (1, 1), (1, 1), "SAME", (1, 1)),
        ((7, 7), (3, 3), (1, 1), "SAME", (2, 1)),
        ((7, 8), (2, 3), (2, 2), ((1, 0), (2, 3)), (1, 2)),
        ((5, 5), (2, 2), (1, 1), ((3, 2), (0, 3)), (1, 1)),  # wider padding than the window
        ((6, 6), (3, 3), (1, 1), ((-1, 0), (0, -2)), (1, 1)),  # cropped
        ((2, 2), (3, 3), (1, 1), "SAME", (1, 1)),
        ((8, 6), (4, 4), (2, 2), ((1, 1), (1, 1)), (1, 1)),
        ((8, 8), (2, 2), (3, 3), "VALID", (1, 1)),  # the window is smaller than a step
    ],
)
def test_convolutions(size, window, strides, padding, dilation, channels):
    def apply(p, x):
        x = jnp.maximum(x, 0) * p["scale"][None, None, None]
        x = lax.conv_general_dilated(
            x, p["kernel"], strides, padding, rhs_dilation=dilation, dimension_numbers=LAYOUT
        )
        return x.reshape(len(x), -1)

    params = {"scale": jnp.ones(channels), "kernel": whole(*window, channels, 6)}
    same_as_the_operation(apply, params, whole(3, *size, channels, seed=3), "mul")


@pytest.mark.parametrize(
    ("size", "window", "strides", "padding"),
    [
        ((6, 4), (2, 2), (2, 2), "VALID"),
        ((7, 5), (2, 2), (2, 2), "VALID"),  # a row and a column are left over
        ((6, 6), (3, 2), (3, 2), "VALID"),
        ((6, 6), (3, 3), (2, 2), "SAME"),  # windows overlap
        ((5, 5), (2, 2), (2, 2), "SAME"),
    ],
)
def test_max_pooling_with_ties(size, window, strides, padding):
    def apply(p, x):
        x = x * p["scale"][None, None, None]
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, *window, 1), (1, *strides, 1), padding)
        return x.reshape(len(x), -1)

    # Of seven numbers many are equal within a window.
    same_as_the_operation(apply, {"scale": jnp.ones(3)}, whole(4, *size, 3, seed=3), "mul")


def test_other_layouts_and_groups_run_as_they_are():
    def apply(p, x):
        x = x * p["scale"][None, :, None, None]
        x = lax.conv_general_dilated(x, p["first"], (1, 1), "SAME")
        x = lax.conv_general_dilated(
            x.transpose(0, 2, 3, 1), p["second"], (1, 1), "SAME", dimension_numbers=LAYOUT,
            feature_group_count=2,
        )  # fmt: skip
        return x.reshape(len(x), -1)

    params = {"scale": jnp.ones(2), "first": whole(4, 2, 3, 3), "second": whole(3, 3, 2, 4)}
    same_as_the_operation(apply, params, whole(2, 2, 4, 4, seed=3), "mul")


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_half_precision_with_sums_in_single(strides):
    def apply(p, x):
        x = lax.conv_general_dilated(
            x.astype(jnp.bfloat16), p["kernel"], strides, "SAME", dimension_numbers=LAYOUT,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        return x.reshape(len(x), -1)

    params, x = {"kernel": whole(3, 3, 6, 4).astype(jnp.bfloat16)}, whole(2, 6, 6, 6, seed=3)
    graph = nns.trace(apply, params, x[:1])
    out, pull = jax.vjp(jax.jit(lambda x: nns.evaluate(graph, params, x)[0]), x)
    found, push = jax.vjp(jax.jit(lambda x: logits(graph, params, x)), x)
    np.testing.assert_array_equal(found, out)
    back = whole(*out.shape, seed=2)
    np.testing.assert_array_equal(push(back)[0], pull(back)[0])


def test_a_window_larger_than_the_image_sees_nothing():
    def apply(p, x):
        seen = lax.conv_general_dilated(x, p["kernel"], (1, 1), "VALID", dimension_numbers=LAYOUT)
        return x.sum((1, 2)) + seen.sum((1, 2))

    params, x = {"kernel": whole(5, 5, 3, 3)}, whole(2, 3, 3, 3, seed=3)
    graph = nns.trace(apply, params, x[:1])
    found = jax.grad(lambda x: logits(graph, params, x).sum())(x)
    np.testing.assert_array_equal(found, np.ones_like(x))
