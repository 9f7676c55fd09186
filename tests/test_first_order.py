"""Quick gradients are the gradients of the operations themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import nnslicer_jax as nns
from nnslicer_jax.evaluation import evaluated, logits, quickest

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


def convolved(params, x):
    """A small network with what is quick: convolution and pooling."""
    kernel, dense = params
    y = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT)
    y = lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return {"logits": jax.nn.softmax(y.reshape(len(x), -1) @ dense)}


def test_the_quickest_form_of_a_model_is_the_model():
    params, x = (whole(3, 3, 2, 4), whole(36, 3) / 8), whole(5, 6, 6, 2, seed=3)
    quick = quickest(convolved, params, x)
    assert (quick is not convolved) == (jax.default_backend() == "cpu")
    # The same function again, whatever the number of images and the values of the parameters.
    assert quickest(convolved, jax.tree.map(jnp.zeros_like, params), x[:2]) is quick

    def loss(apply, x):
        return (apply(params, x)["logits"] * whole(5, 3, seed=4)).sum()

    assert jax.tree.structure(quick(params, x)) == jax.tree.structure(convolved(params, x))
    for one, other in zip(*(jax.value_and_grad(lambda x, f=f: loss(f, x))(x)
                            for f in (quick, convolved)), strict=True):  # fmt: skip
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
        assert np.abs(other).max() > 0


def test_what_cannot_be_traced_stays_as_it_is():
    def decides(params, x):
        return lax.cond(x.sum() > 0, lambda: x @ params, lambda: -x @ params)

    @jax.custom_vjp
    def doubled(x):
        return 2 * x

    doubled.defvjp(lambda x: (2 * x, None), lambda _, back: (3 * back,))

    def own_rule(params, x):
        return doubled(x @ params)

    for apply in (decides, own_rule):
        assert quickest(apply, whole(4, 3), whole(2, 4)) is apply
