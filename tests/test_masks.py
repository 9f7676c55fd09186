"""Masks: exactly as many entries as asked, the largest, ties by position."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prune import masks


def naive(scores: list[np.ndarray], keep: Fraction) -> list[np.ndarray]:
    """Takes the best entry, the earliest of equal ones: of each array, then until enough."""
    flat = [float(v) for array in scores for v in array.ravel()]
    left = list(range(len(flat)))
    chosen = [False] * len(flat)
    start = 0
    for array in scores:
        first = start + int(array.argmax())
        left.remove(first)
        chosen[first] = True
        start += array.size
    while sum(chosen) < max(1, math.ceil(keep * len(flat))):
        best = max(flat[i] for i in left)
        first = next(i for i in left if flat[i] == best)
        left.remove(first)
        chosen[first] = True
    found, start = [], 0
    for array in scores:
        found.append(np.reshape(chosen[start : start + array.size], array.shape))
        start += array.size
    return found


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    percent=st.integers(1, 100),
    seed=st.integers(0, 1000),
    whole=st.booleans(),
    scope=st.sampled_from(masks.SCOPES),
)
def test_the_largest_are_kept(sizes, percent, seed, whole, scope):
    rng = np.random.default_rng(seed)
    draw = (lambda n: rng.integers(-2, 3, n)) if whole else (lambda n: rng.normal(size=n))
    scores = [draw(n).astype(np.int32 if whole else np.float32) for n in sizes]
    keep = percent / 100
    found = masks.topk({"a": None, "b": scores}, keep, scope)
    assert found["a"] is None
    groups = [[s] for s in scores] if scope == "layer" else [scores]
    expected = [m for group in groups for m in naive(group, Fraction(percent, 100))]
    for one, other in zip(found["b"], expected, strict=True):
        assert one.dtype == bool
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("keep", "size", "expected"),
    [(0.1, 30, 3), (0.55, 100, 55), (0.07, 100, 7), (0.29, 100, 29), (0.1, 31, 4), (1e-9, 30, 1),
     (1, 30, 30), (Fraction(1, 3), 30, 10), (1 - Fraction("0.9"), 30, 3), (np.float64(0.1), 30, 3)],
)  # fmt: skip
def test_decimal_shares_are_exact(keep, size, expected):
    found = masks.topk(jnp.zeros(size), keep)
    np.testing.assert_array_equal(found, np.arange(size) < expected)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    values=st.lists(
        st.floats(-4, 4, width=16) | st.sampled_from([0.0, -0.0, 1.0, np.inf, -np.inf]),
        min_size=1, max_size=24,
    ),
    share=st.floats(0, 1),
    dtype=st.sampled_from(["float32", "float16", "bfloat16", "int8"]),
)  # fmt: skip
def test_any_count_of_any_numbers(values, share, dtype):
    # Padded, so that one shape is compiled; what pads is never among the largest.
    if dtype == "int8":
        values = [int(np.clip(v, -4, 4)) for v in values]
    count = round(share * len(values))
    least = -128 if dtype == "int8" else -np.inf
    scores = jnp.asarray(values + [least] * (24 - len(values)), dtype)
    found = _largest(scores, count)
    order = sorted(range(24), key=lambda i: (-float(scores[i]), i))
    np.testing.assert_array_equal(np.flatnonzero(found), sorted(order[:count]))


_largest = jax.jit(masks.largest)


def test_counts_of_every_layer_are_met():
    scores = {"a": jnp.asarray([3.0, 1.0, 2.0]), "b": None, "c": jnp.asarray([[5.0], [7.0]])}
    found = _largest(scores, {"a": 2, "b": None, "c": 0})
    assert found["b"] is None
    np.testing.assert_array_equal(found["a"], [True, False, True])
    np.testing.assert_array_equal(found["c"], [[False], [False]])
    together = _largest(scores, 3)
    np.testing.assert_array_equal(together["a"], [True, False, False])
    np.testing.assert_array_equal(together["c"], [[True], [True]])


def test_a_layer_smaller_than_one_kept_weight_keeps_one():
    scores = {"small": jnp.asarray([1.0, 2.0]), "large": jnp.arange(300.0)}
    assert masks.counts(scores, 0.01) == {"small": 1, "large": 3}
    assert masks.counts(scores, 0.01, "global") == 4
    assert masks.kept(masks.topk(scores, 0.01)) == (4, 302)


def test_a_global_share_empties_no_layer():
    scores = {"a": jnp.asarray([1.0, 2.0]), "b": jnp.asarray([9.0, 7.0, 8.0]), "c": jnp.zeros(2)}
    found = masks.topk(scores, 0.5, "global")
    np.testing.assert_array_equal(found["a"], [False, True])
    np.testing.assert_array_equal(found["b"], [True, False, True])
    np.testing.assert_array_equal(found["c"], [True, False])
    # One of each is the least, also where the share is less.
    assert masks.counts(scores, 0.01, "global") == 3
    few = masks.topk(scores, 0.01, "global")
    assert [int(mask.sum()) for mask in few.values()] == [1, 1, 1]
    # The best of a layer is above the best that a whole number can be.
    most = {"a": np.full(3, 2**31 - 1, np.int32), "b": np.zeros(2, np.int32)}
    assert [int(mask.sum()) for mask in masks.topk(most, 0.4, "global").values()] == [1, 1]


def test_gradients_go_straight_through():
    scores = {"w": jnp.asarray([[0.5, -2.0], [1.0, 0.25]]), "b": None}
    weights = jnp.asarray([[3.0, 4.0], [-5.0, 6.0]])

    def run(scores):
        size = jax.tree.map(jnp.abs, scores)
        soft = masks.straight_through(size, masks.topk(size, 0.5))
        return (jnp.asarray([[1.0, 10.0], [100.0, 1000.0]]) * weights * soft["w"]).sum()

    value, gradient = jax.value_and_grad(run)(scores)
    assert value == 10 * 4 + 100 * -5
    # sign(S) W dL/dW_eff, of what is masked too.
    np.testing.assert_array_equal(gradient["w"], [[3.0, -40.0], [-500.0, 6000.0]])
    assert gradient["b"] is None


def test_it_is_traceable():
    scores = {"w": jnp.asarray([[3.0, 1.0], [2.0, 3.0]])}
    topk = jax.jit(masks.topk, static_argnums=(1, 2))
    np.testing.assert_array_equal(topk(scores, 0.25, "layer")["w"], [[True, False], [False, False]])
    np.testing.assert_array_equal(topk(scores, 0.75, "global")["w"], [[True, False], [True, True]])


def test_plain_numbers_are_scores_too():
    found = masks.topk({"a": 3, "b": [1.5, 2.5], "c": None}, 0.5, "global")
    assert found["c"] is None
    # Each is a layer of one.
    assert [bool(found["a"]), *map(bool, found["b"])] == [True, True, True]


def test_masks_are_applied_and_counted():
    params = {"w": jnp.arange(1.0, 5.0), "b": jnp.ones(2)}
    kept = {"w": jnp.asarray([True, False, True, False]), "b": None}
    found = masks.apply_masks(params, kept)
    np.testing.assert_array_equal(found["w"], [1, 0, 3, 0])
    np.testing.assert_array_equal(found["b"], [1, 1])
    assert masks.kept(kept) == (2, 4)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (functools.partial(masks.topk, jnp.ones(3), 0),
         "keep must be above 0 and at most 1, not 0"),
        (functools.partial(masks.topk, jnp.ones(3), 1.5),
         "keep must be above 0 and at most 1, not 1.5"),
        (functools.partial(masks.topk, jnp.ones(3), "1/0"),
         "keep must be above 0 and at most 1, not 1/0"),
        (functools.partial(masks.topk, jnp.ones(3), None),
         "keep must be above 0 and at most 1, not None"),
        (functools.partial(masks.topk, ["a", "b"], 0.5),
         "scores must be integers or floats, not <U1"),
        (functools.partial(masks.topk, [1.0, float("nan")], 0.5),
         "scores must be numbers; some are NaN"),
        (functools.partial(masks.apply_masks, jnp.ones(3), jnp.asarray([0, 2, 1])),
         "masks must be bool, not int32"),
        (functools.partial(masks.apply_masks, {"w": jnp.ones(3)}, {"w": jnp.ones(3)}),
         "masks must be bool, not float32 at ['w']"),
        (functools.partial(masks.topk, jnp.ones(3), float("nan")),
         "keep must be above 0 and at most 1, not nan"),
        (functools.partial(masks.topk, jnp.ones(3), 0.5, "all"),
         "scope must be layer or global, not 'all'"),
        (functools.partial(masks.topk, {"w": None}, 0.5),
         "scores must hold at least one array, and no empty ones"),
        (functools.partial(masks.topk, jnp.ones(0), 0.5),
         "scores must hold at least one array, and no empty ones"),
        (functools.partial(masks.topk, jnp.asarray([1.0, np.nan]), 0.5),
         "scores must be numbers; some are NaN"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(call, said):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == said


@pytest.mark.parametrize("share", [np.array(0.1), jnp.float32(0.1), np.float64(0.1)])
def test_a_share_may_be_an_array_of_no_axes(share):
    scores = {"a": np.arange(30.0)}
    np.testing.assert_array_equal(masks.topk(scores, share)["a"], np.arange(30) >= 27)


@pytest.mark.parametrize(
    ("keep", "match"),
    [
        ({"a": 0}, "1 to 30 here, not 0"),
        ({"a": 31}, "1 to 30 here, not 31"),
        ({"a": 0.5}, "whole numbers"),
        ({"b": 3}, "structured as the scores"),
        ([3, 4], "structured as the scores"),
    ],
)
def test_numbers_that_do_not_fit(keep, match):
    with pytest.raises(ValueError, match=match):
        masks.counts({"a": np.arange(30.0)}, keep)
    assert masks.counts({"a": np.arange(30.0)}, {"a": 3}) == {"a": 3}
