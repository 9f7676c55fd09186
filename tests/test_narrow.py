"""Convolutions of few taps in their quick form: the same function."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from difftest import narrow

CASES = {
    "one channel": ((3, 9, 9, 1), (5, 5, 1, 4), (1, 1), "SAME"),
    "strided": ((2, 10, 11, 3), (3, 3, 3, 5), (2, 1), "VALID"),
    "cropped": ((2, 10, 10, 2), (2, 3, 2, 4), (1, 2), ((-1, 2), (0, 1))),
}


def draw(shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [
        jax.random.randint(key, shape, -9, 10).astype(jnp.float32)
        for key, shape in zip(keys, shapes, strict=True)
    ]


@pytest.mark.parametrize("case", CASES)
def test_the_sum_of_taps_is_the_convolution(case):
    shape, window, strides, padding = CASES[case]
    x, kernel = draw((shape, window))

    def convolve(kernel, x):
        return lax.conv_general_dilated(
            x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    # Whole numbers: sums are exact in any order.
    found = jax.jit(narrow.quick(convolve))(kernel, x)
    np.testing.assert_array_equal(found, convolve(kernel, x))
    lowered = jax.jit(narrow.quick(convolve)).lower(kernel, x).compile().as_text()
    assert "convolution(" not in lowered


def test_other_convolutions_stay():
    wide = ((2, 8, 8, 4), (3, 3, 4, 4))
    for (x, kernel), options in (
        (draw(wide), {}),
        (draw(((2, 8, 8, 4), (3, 3, 1, 4))), {"feature_group_count": 4}),
        (draw(((2, 8, 8, 2), (3, 3, 2, 4))), {"rhs_dilation": (2, 2)}),
        (draw(((2, 8, 8, 2), (1, 1, 2, 4))), {}),
    ):

        def convolve(kernel, x, options=options):
            numbers = ("NHWC", "HWIO", "NHWC")
            return lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=numbers, **options
            )

        traced = str(jax.make_jaxpr(narrow.quick(convolve))(kernel, x))
        assert traced.count("conv_general_dilated") == 1
        np.testing.assert_array_equal(narrow.quick(convolve)(kernel, x), convolve(kernel, x))


def test_a_network_with_calls_and_loops_is_the_same_function():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.gelu(nn.Conv(4, (3, 3))(x))
            x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
            _, x = lax.scan(lambda sum, row: (sum + row, sum), x[:, 0], x.transpose(1, 0, 2, 3))
            return nn.Dense(3)(x.transpose(1, 0, 2, 3).reshape(x.shape[1], -1))

    x = jax.random.uniform(jax.random.key(0), (4, 8, 8, 1))
    params = Network().init(jax.random.key(1), x)
    wanted = Network().apply(params, x)
    np.testing.assert_allclose(narrow.quick(Network().apply)(params, x), wanted, rtol=1e-5)
    gradient = jax.grad(lambda x: narrow.quick(Network().apply)(params, x).sum())(x)
    plain = jax.grad(lambda x: Network().apply(params, x).sum())(x)
    np.testing.assert_allclose(gradient, plain, rtol=1e-4, atol=1e-5)
