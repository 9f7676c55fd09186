"""Linear bounds: equal to the formulas, never left by any point, tight where theory says so."""

import functools
import sys
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnslicer_jax as nns
from nnslicer_jax import evaluation, interval, relaxation
from nnslicer_jax.interval import Interval
from tests import boxes, nets
from tests.naive import bounds as naive

# The package exports the function by the name of its module.
module = sys.modules["nnslicer_jax.linear_bounds"]

METHODS = ["ibp", "crown-ibp", "crown", "fast-lin"]
SLOPES = {"crown": lambda steep: float(steep > 0.5), "fast-lin": lambda steep: steep}


def all_methods(graph, names=tuple(METHODS)):
    """Every method's bounds, compiled together so that they share what they can."""

    @jax.jit
    def run(params, lower, upper, rows):
        return {
            name: nns.linear_bounds(graph, params, lower, upper, rows, method=name)
            for name in names
        }

    return run


@pytest.mark.parametrize("seed", range(3))
def test_dense_networks_equal_the_formulas(seed):
    graph, params, layers = boxes.dense((4, 7, 6, 5, 3), seed)
    rng = np.random.default_rng(seed)
    lower = rng.normal(size=(2, 4)).astype(np.float32)
    upper = (lower + rng.uniform(0, 0.8, lower.shape)).astype(np.float32)
    rows = rng.normal(size=(5, 3)).astype(np.float32)
    found = all_methods(graph)(params, lower, upper, rows)
    for i in range(2):
        box = lower[i].astype(float), upper[i].astype(float)
        plain = naive.interval(layers, *box)
        tight = {
            "crown": naive.inner(layers, box, SLOPES["crown"], intersect=True),
            "fast-lin": naive.inner(layers, box, SLOPES["fast-lin"], intersect=False),
            "crown-ibp": plain,
        }
        expected = {"ibp": naive.merged(layers, *box, rows.astype(float))}
        for name, inner in tight.items():
            slope = SLOPES["fast-lin" if name == "fast-lin" else "crown"]
            expected[name] = naive.backward(layers, inner, box, rows.astype(float), slope)
        for name in METHODS:
            np.testing.assert_allclose(
                found[name][i], expected[name], rtol=1e-5, atol=1e-5, err_msg=name
            )


def test_small_network_by_hand():
    """`x = relu(x) - relu(-x)` for x in -1..3, where a steeper line below is no gain."""

    def apply(w, x):
        return nn.relu(x @ w["first"]) @ w["second"]

    params = {"first": jnp.array([[1.0, -1.0]]), "second": jnp.array([[1.0], [-1.0]])}
    ends = jnp.array([[-1.0]]), jnp.array([[3.0]])
    graph = nns.trace(apply, params, ends[0])
    found = all_methods(graph)(params, *ends, jnp.array([[1.0], [-1.0]]))
    # relu(x) lies in 0.75 x .. 0.75 (x + 1), below x from CROWN's side; relu(-x) under
    # 0.25 (3 - x), above 0 or, parallel, above -0.25 x.
    np.testing.assert_array_equal(found["ibp"], [[-1, -3]])
    np.testing.assert_array_equal(found["crown"], [[1.25 * -1 - 0.75, -0.75 * 3 - 0.75]])
    np.testing.assert_array_equal(found["crown-ibp"], found["crown"])
    np.testing.assert_array_equal(found["fast-lin"], [[-1 - 0.75, -3 - 0.75]])


def test_linear_networks_are_bounded_exactly():
    """Of several linear layers the walk back makes one; interval bounds do not."""

    def apply(w, x):
        x = x @ w["first"] - jnp.flip(x, 1) @ w["first"]
        return (x + 1.0) @ w["second"]

    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.integers(-3, 4, (4, 4)), jnp.float32) for n in ("first", "second")}
    lower = rng.integers(-3, 4, (3, 4)).astype(np.float32)
    graph = nns.trace(apply, params, lower)
    rows = boxes.either_side(4)
    found = all_methods(graph)(params, lower, lower + 1, rows)
    corners = np.stack(np.meshgrid(*[[0, 1]] * 4), -1).reshape(-1, 1, 4).astype(np.float32)
    values = apply(params, (lower[None] + corners).reshape(-1, 4)) @ rows.T
    least = np.asarray(values).reshape(16, 3, -1).min(0)
    for name in METHODS:
        np.testing.assert_array_equal(found[name], least, err_msg=name)
    loose = nns.interval_bounds(graph, params, lower, lower + 1)
    assert (loose.lower < least[:, :4]).any()


# Norms multiply what depends on the sample: walks to each of their factors take long to compile.
FEWER = {"pools_and_norms": ("ibp", "crown-ibp")}


@functools.cache
def bounded(name: str):
    """Both sides of every logit by every method, for two boxes around samples."""
    model, graph = boxes.traced(name)
    count = int(np.prod(graph.values[graph.logits].shape))
    rows = boxes.either_side(count)
    run = all_methods(graph, FEWER.get(name, tuple(METHODS)))
    return run(model.params, *boxes.box(name), rows), rows


SOUND = [
    "activations", "channels_first", "convolutions", "lenet", "masked_attention", "mlp", "moves",
    "plain_function", "pools_and_norms", "remat", "resnet", "softmax",
]  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_no_point_leaves_the_bounds(name):
    """Nor any that gradient descent finds."""
    model, graph = boxes.traced(name)
    found, rows = bounded(name)
    lower, upper = boxes.box(name)
    points = boxes.points(lower, upper, 60).reshape(-1, *model.shape)
    values = jax.jit(lambda p, x: evaluation.logits(graph, p, x) @ rows.T)(model.params, points)
    least = np.asarray(values).reshape(60, 2, -1).min(0)
    worst = jax.jit(functools.partial(boxes.worst, graph))(model.params, lower, upper, rows)
    # The walk ends at the same numbers as descent does, so that at most rounding is between them.
    slack = 2e-5 * (1 + np.abs(values).max())
    for method, bound in found.items():
        assert np.isfinite(bound).all()
        assert (bound <= least + slack).all(), method
        assert (bound <= worst + slack).all(), method


@pytest.mark.parametrize("name", ["lenet", "resnet"])
def test_crown_is_far_tighter_than_intervals(name):
    found, _ = bounded(name)
    assert (found["crown"] > found["ibp"]).all()
    # Half the rows are the others negated.
    width = {method: -np.asarray(bound).sum() for method, bound in found.items()}
    assert width["crown"] < width["crown-ibp"] < width["ibp"] / 4


@pytest.mark.parametrize("seed", range(3))
def test_lines_from_0_are_never_looser_than_intervals(seed):
    """Where theory says so: with 0 below every unstable ReLU, at every layer."""
    graph, params, _ = boxes.dense((4, 8, 7, 6, 3), seed)
    lower = np.random.default_rng(seed).normal(size=(3, 4)).astype(np.float32)

    def slope(upper):
        return jnp.where(upper < 1, 0.0, upper)

    flat = module.Method(slope, parallel=False, inner=True, intersect=False)

    @jax.jit
    def run(params, lower, upper):
        plain = interval.propagate(graph, params, Interval(lower, upper))
        tight = module._tightened(module.Walk(graph, flat), plain)
        return [
            (plain[i], tight[i]) for node in graph.nodes for i in node.outputs if any(node.data)
        ]

    with mock.patch.dict(module._METHODS, {"flat": flat}):
        both = all_methods(graph, ("flat", "ibp"))
        found = both(params, lower, lower + 0.7, boxes.either_side(3))
    assert (found["flat"] >= found["ibp"] - 1e-5).all()
    tighter = 0
    for plain, tight in run(params, lower, lower + 0.7):
        assert (tight.lower >= plain.lower - 1e-5).all()
        assert (tight.upper <= plain.upper + 1e-5).all()
        tighter += np.sum(np.asarray(tight.lower) > np.asarray(plain.lower) + 1e-3)
    assert tighter > 0


FUNCTIONS = {
    "relu": nn.relu, "relu6": nn.relu6, "clip": lambda x: jnp.clip(x, -0.5, 1.0),
    "clip below": lambda x: jnp.clip(x, min=-0.5), "hard tanh": nn.hard_tanh,
    "leaky": nn.leaky_relu, "steep leaky": functools.partial(nn.leaky_relu, negative_slope=2.0),
    "tanh": jnp.tanh, "sigmoid": nn.sigmoid, "erf": jax.lax.erf, "soft sign": nn.soft_sign,
    "atan": jnp.atan, "abs": jnp.abs, "exp": jnp.exp, "softplus": nn.softplus,
    "square": jnp.square, "fourth": lambda x: jax.lax.integer_pow(x, 4),
    "cube": lambda x: jax.lax.integer_pow(x, 3), "log": jnp.log, "sqrt": jnp.sqrt,
    "rsqrt": jax.lax.rsqrt, "inverse": lambda x: jax.lax.integer_pow(x, -1),
    "log sigmoid": nn.log_sigmoid,
}  # fmt: skip
POSITIVE = {"log", "sqrt", "rsqrt"}


@pytest.mark.parametrize("slope", [relaxation.steepest, relaxation.same])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_stay_between_their_lines(name, slope):
    f = FUNCTIONS[name]
    low = 0.1 if name in POSITIVE else -3.0
    lower = jnp.linspace(low, 2.5, 30)[:, None]
    upper = lower + jnp.asarray(np.random.default_rng(0).uniform(0.01, 3, lower.shape), jnp.float32)
    graph = nns.trace(lambda _, x: f(x), {}, lower)
    node = graph.nodes[-1]
    x = Interval(lower, upper)
    (out,) = interval.bounded(graph, False, node, x, *[graph.consts[i] for i in node.inputs[1:]])
    lines = relaxation.RULES[node](node, f, x, out, slope)
    grid = lower + jnp.linspace(0, 1, 401)[None] * (upper - lower)
    values = f(grid)
    below = lines.lower * grid + lines.offset.lower
    above = lines.upper * grid + lines.offset.upper
    reach = jnp.abs(values).max(1, keepdims=True)
    known = jnp.isfinite(out.lower + out.upper)
    assert (~known | (below <= values + 1e-5 * (1 + reach))).all()
    assert (~known | (above >= values - 1e-5 * (1 + reach))).all()
    # Neither line is idle: together they are no wider than twice the interval.
    width = (above - below).max(1, keepdims=True)
    assert (~known | (width <= 2 * (out.upper - out.lower) + 1e-4)).all()


@pytest.mark.parametrize("name", ["max_pool", "max_pool_overlapping", "global_max"])
def test_a_maximum_whose_winner_is_known_is_that_winner(name):
    """In a small box around a sample, a network of maxima is one linear function."""
    case = nets.EXACT[name]()
    images = case.images(3) + 0.37 * np.random.default_rng(1).normal(size=(3, *case.shape))
    lower, upper = np.float32(images - 1e-4), np.float32(images + 1e-4)
    graph = nns.trace(case.apply, case.params, lower)
    count = int(np.prod(graph.values[graph.logits].shape))
    rows = boxes.either_side(count)
    found = all_methods(graph, ("crown",))(case.params, lower, upper, rows)["crown"]
    worst = boxes.worst(graph, case.params, lower, upper, rows)
    np.testing.assert_allclose(found, worst, rtol=1e-4, atol=1e-4)
    wide = all_methods(graph, ("crown",))(case.params, lower - 0.5, upper + 0.5, rows)["crown"]
    assert (wide <= boxes.worst(graph, case.params, lower - 0.5, upper + 0.5, rows) + 1e-3).all()


def test_rows_of_each_samples_own():
    model, graph = boxes.traced("mlp")
    lower, upper = boxes.box("mlp", 3)
    rows = nns.margin_rows(jnp.array([2, 0, 1]), 3)
    np.testing.assert_array_equal(rows[0], [[-1, 0, 1], [0, -1, 1]])
    np.testing.assert_array_equal(rows[1], [[1, -1, 0], [1, 0, -1]])
    np.testing.assert_array_equal(rows[2], [[-1, 1, 0], [0, 1, -1]])
    run = all_methods(graph)
    found = run(model.params, lower, upper, rows)
    every = run(model.params, lower, upper, rows.reshape(-1, 3))
    for name in METHODS:
        assert found[name].shape == (3, 2)
        for i in range(3):
            np.testing.assert_allclose(
                found[name][i], every[name][i, 2 * i : 2 * i + 2], rtol=1e-5, atol=1e-5
            )


def test_a_batch_is_its_samples_one_by_one():
    model, graph = boxes.traced("lenet")
    lower, upper = boxes.box("lenet")
    found, rows = bounded("lenet")
    run = all_methods(graph)
    for i in range(2):
        alone = run(model.params, lower[i : i + 1], upper[i : i + 1], rows)
        for name in METHODS:
            np.testing.assert_allclose(found[name][i], alone[name][0], rtol=1e-4, atol=1e-4)


def test_rows_in_parts_change_nothing():
    model, graph = boxes.traced("lenet")
    found, rows = bounded("lenet")
    with mock.patch.object(module, "_HELD", 7 * 2 * 256):
        parts = all_methods(graph, ("crown", "fast-lin"))(model.params, *boxes.box("lenet"), rows)
    for name, bound in parts.items():
        np.testing.assert_allclose(bound, found[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "lenet"])
def test_gradients_are_finite_also_of_a_point(name):
    model, graph = boxes.traced(name)
    count = int(np.prod(graph.values[graph.logits].shape))
    rows = boxes.either_side(count)

    def total(params, lower, upper):
        found = all_methods(graph)(params, lower, upper, rows)
        return sum(bound.sum() for bound in found.values())

    slope = jax.jit(jax.grad(total))
    middle = model.images(2)
    for ends in (boxes.box(name), (middle, middle)):
        found = jax.tree.leaves(slope(model.params, *ends))
        assert all(np.isfinite(leaf).all() for leaf in found)
    # Of a box: wider weights, wider bounds.
    found = jax.tree.leaves(slope(model.params, *boxes.box(name)))
    assert any(np.abs(leaf).max() > 0.01 for leaf in found)


def test_float32_is_off_by_rounding_only():
    """The slack that the module states, against the same bounds in float64."""
    model, graph = boxes.traced("lenet")
    found, rows = bounded("lenet")
    lower, upper = boxes.box("lenet")
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: np.asarray(a, np.float64), model.params)
        wide = nns.trace(model.apply, params, lower[:1].astype(np.float64))
        ends = lower.astype(np.float64), upper.astype(np.float64)
        exact = all_methods(wide)(params, *ends, np.asarray(rows, np.float64))
        exact = {name: np.asarray(bound) for name, bound in exact.items()}
    for name in METHODS:
        assert exact[name].dtype == np.float64
        np.testing.assert_allclose(found[name], exact[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "method", "message"),
    [
        (np.eye(3), "deeppoly", "^method must be one of crown, crown-ibp, fast-lin, ibp, not 'd"),
        (np.eye(4), "crown", r"^rows must have shape \[M, 3\] or \[2, M, 3\], not \(4, 4\)"),
        (np.ones((5, 1, 3)), "crown", r"^rows must have shape .* not \(5, 1, 3\)"),
        (np.ones(3), "crown", r"^rows must have shape .* not \(3,\)"),
    ],
)
def test_bad_rows_and_methods(rows, method, message):
    model, graph = boxes.traced("mlp")
    with pytest.raises(ValueError, match=message):
        nns.linear_bounds(graph, model.params, *boxes.box("mlp"), rows, method=method)
