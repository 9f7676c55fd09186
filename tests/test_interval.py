"""Interval bounds: exact where they can be checked by hand, and never left by any point."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import nnslicer_jax as nns
from nnslicer_jax import evaluation
from tests import boxes, nets, zoo
from tests.naive import bounds as naive

# Of an integer sample a box means nothing; a rounded sum of bytes is covered by "custom_vjp".
NAMES = sorted(set(zoo.MAKERS) - {"embedding", "bytes"})
# Flax starts their state in float32 whatever the parameters.
SINGLE = {"bidirectional", "gru", "lstm"}


@functools.cache
def bounded(name: str, outward: bool = False):
    """Bounds on every neuron and on the logits of two boxes around samples."""
    model, graph = boxes.traced(name)

    @jax.jit
    def run(params, lower, upper):
        every = nns.neuron_bounds(graph, params, lower, upper, outward=outward)
        return nns.interval_bounds(graph, params, lower, upper, outward=outward), every

    return run(model.params, *boxes.box(name))


@pytest.mark.parametrize("name", NAMES)
def test_no_point_leaves_bounds_rounded_outward(name):
    """Neither in float64, nor as float32 computes the model."""
    model, graph = boxes.traced(name)
    found, every = bounded(name, outward=True)
    assert np.isfinite(found.lower).all() and np.isfinite(found.upper).all()
    points = boxes.points(*boxes.box(name), 60)
    flat = points.reshape(-1, *model.shape)
    single = jax.jit(lambda p, x: (evaluation.logits(graph, p, x), nns.evaluate(graph, p, x)[1]))
    ours, activations = single(model.params, flat)
    computed = [np.asarray(ours)]
    if name not in SINGLE:
        with jax.enable_x64(True):
            double = jax.tree.map(lambda a: np.asarray(a, np.float64), model.params)
            wide = nns.trace(model.apply, double, flat[:1].astype(np.float64))
            exact = jax.jit(lambda p, x: evaluation.logits(wide, p, x))(
                double, flat.astype(np.float64)
            )
            computed.append(np.asarray(exact))
            assert computed[-1].dtype == np.float64 or name == "half_precision"
    for logits in computed:
        logits = logits.reshape(60, *found.lower.shape)
        assert (logits >= np.asarray(found.lower)).all()
        assert (logits <= np.asarray(found.upper)).all()
    assert every.keys() == graph.neurons().keys()
    for neuron, (lower, upper) in every.items():
        values = np.asarray(activations[neuron]).reshape(60, *lower.shape)
        assert (values >= np.asarray(lower)).all() and (values <= np.asarray(upper)).all(), neuron


@pytest.mark.parametrize("name", ["mlp", "lenet", "resnet", "attention"])
def test_rounding_outward_costs_little(name):
    (plain, _), (wide, _) = bounded(name), bounded(name, outward=True)
    assert (wide.lower < plain.lower).all() and (wide.upper > plain.upper).all()
    widths = [np.asarray(b.upper - b.lower) for b in (plain, wide)]
    assert (widths[1] < 1.01 * widths[0] + 1e-4).all()


def test_small_network_by_hand():
    """`relu(x - y) + 2 relu(x + y - 1) - y` for x in 0..2 and y in -1..1."""

    def apply(w, x):
        hidden = nn.relu(x @ w["first"] + w["offset"][None])
        return hidden @ w["second"] - x[:, 1:]

    params = {
        "first": jnp.array([[1.0, 1.0], [-1.0, 1.0]]),
        "offset": jnp.array([0.0, -1.0]),
        "second": jnp.array([[1.0], [2.0]]),
    }
    lower, upper = jnp.array([[0.0, -1.0]]), jnp.array([[2.0, 1.0]])
    graph = nns.trace(apply, params, lower)
    every = nns.neuron_bounds(graph, params, lower, upper)
    # x - y in -1..3, x + y - 1 in -2..2; then 0..3 and 0..2.
    np.testing.assert_array_equal(every["add"].lower, [[-1, -2]])
    np.testing.assert_array_equal(every["add"].upper, [[3, 2]])
    np.testing.assert_array_equal(every["relu"].lower, [[0, 0]])
    np.testing.assert_array_equal(every["relu"].upper, [[3, 2]])
    found = nns.interval_bounds(graph, params, lower, upper)
    np.testing.assert_array_equal(found.lower, [[-1]])
    np.testing.assert_array_equal(found.upper, [[8]])


@pytest.mark.parametrize("seed", range(3))
def test_dense_networks_equal_the_formulas(seed):
    graph, params, layers = boxes.dense((5, 7, 6, 3), seed, whole=True)
    lower = np.random.default_rng(seed).integers(-4, 4, (4, 5)).astype(np.float32)
    upper = lower + 2
    found = jax.jit(functools.partial(nns.interval_bounds, graph))(params, lower, upper)
    for row in range(4):
        low, high = naive.interval(layers, lower[row].astype(float), upper[row].astype(float))[-1]
        np.testing.assert_array_equal(found.lower[row], low)
        np.testing.assert_array_equal(found.upper[row], high)


@pytest.mark.parametrize(
    "name", ["conv_valid", "conv_grouped", "conv_dilated", "conv_1d", "conv_channels_first"]
)
def test_one_convolution_is_bounded_exactly(name):
    """Each output of one linear operation reaches its bounds, at a corner of its own."""
    case = nets.EXACT[name]()
    graph = nns.trace(case.apply, case.params, case.images(1))
    key = next(n for n in graph.neurons() if n.endswith("conv_general_dilated"))
    images = case.images(1)
    every = nns.neuron_bounds(graph, case.params, images - 1, images + 1)[key]

    def one(x, i):
        return nns.evaluate(graph, case.params, x)[1][key].reshape(-1)[i]

    size = every.lower.size
    slopes = jax.jit(jax.vmap(jax.grad(one), (None, 0)))(images, jnp.arange(size))
    ends = jnp.sign(slopes)
    best = jax.jit(jax.vmap(one))(images[None] + ends, jnp.arange(size))
    least = jax.jit(jax.vmap(one))(images[None] - ends, jnp.arange(size))
    np.testing.assert_array_equal(every.upper.reshape(-1), best)
    np.testing.assert_array_equal(every.lower.reshape(-1), least)


FUNCTIONS = {
    "abs": jnp.abs, "neg": lambda x: -x, "square": jnp.square, "cube": lambda x: x**3,
    "fourth": lambda x: lax.integer_pow(x, 4), "inverse": lambda x: lax.integer_pow(x + 4.0, -1),
    "inverse square": lambda x: lax.integer_pow(x + 4.0, -2), "own product": lambda x: x * x,
    "exp": jnp.exp, "log": lambda x: jnp.log(x + 4.0), "sqrt": lambda x: jnp.sqrt(x + 4.0),
    "rsqrt": lambda x: lax.rsqrt(x + 4.0), "tanh": jnp.tanh, "sin": jnp.sin, "cos": jnp.cos,
    "silu": nn.silu, "softplus": nn.softplus, "leaky": nn.leaky_relu, "elu": nn.elu,
    "steep leaky": functools.partial(nn.leaky_relu, negative_slope=-0.5), "selu": nn.selu,
    "relu6": nn.relu6, "hard silu": nn.hard_silu, "mish": jax.nn.mish, "erf": lax.erf,
    "erfc": lax.erfc, "soft sign": nn.soft_sign, "log sigmoid": nn.log_sigmoid,
    "clip": lambda x: jnp.clip(x, -0.5, 1.0), "sign": jnp.sign, "round": jnp.round,
    "max": lambda x: jnp.maximum(x, 0.25), "min": lambda x: jnp.minimum(0.25, x),
    "rest": lambda x: 1.0 - x / -3.0, "where": lambda x: jnp.where(x > 0, 2.0 + x, x),
}  # fmt: skip


def test_functions_of_one_number_are_bounded_tightly():
    """Against every function's values on a grid: never inside them, and hardly outside."""

    def apply(params, x):
        return jnp.concatenate([f(x) for f in FUNCTIONS.values()], axis=1)

    rng = np.random.default_rng(0)
    lower = np.linspace(-3.5, 3.0, 40, dtype=np.float32)[:, None]
    upper = np.minimum(lower + rng.uniform(0, 4, lower.shape), 3.5).astype(np.float32)
    graph = nns.trace(apply, {}, lower)
    found = jax.jit(functools.partial(nns.interval_bounds, graph, {}))(lower, upper)
    grid = lower + np.linspace(0, 1, 2001, dtype=np.float32)[None] * (upper - lower)
    values = np.asarray(jax.jit(apply, static_argnums=0)(None, grid.reshape(-1, 1)))
    values = values.reshape(40, 2001, -1)
    slack = 1e-5 * (1 + np.abs(values).max(1))
    for i, name in enumerate(FUNCTIONS):
        low, high = values[..., i].min(1), values[..., i].max(1)
        assert (found.lower[:, i] <= low + slack[:, i]).all(), name
        assert (found.upper[:, i] >= high - slack[:, i]).all(), name
        # A step of the grid, at the steepest; "where" takes the hull of both its cases.
        if name != "where":
            fine = 0.02 * (1 + np.abs(values[..., i]).max(1))
            np.testing.assert_allclose(found.lower[:, i], low, atol=fine.max(), err_msg=name)
            np.testing.assert_allclose(found.upper[:, i], high, atol=fine.max(), err_msg=name)


def cast(x, kind):
    """As `lax.convert_element_type`, also of what JAX itself would round or clip first."""
    return lax.convert_element_type(x, kind)


# Of numbers from -400 to 400; whole numbers wrap in many of them.
CASTS = {
    "bool": lambda x: cast(x, jnp.bool_),
    "bool of whole numbers": lambda x: cast(cast(x, jnp.int32), jnp.bool_),
    "not": lambda x: ~cast(x, jnp.bool_),
    "and, or": lambda x: cast(x, jnp.bool_) & (x > 1) | (x < -300),
    "any": lambda x: jnp.broadcast_to(cast(x, jnp.bool_).any(1, keepdims=True), x.shape),
    "int8": lambda x: cast(x, jnp.int8), "uint8": lambda x: cast(x, jnp.uint8),
    "int16": lambda x: cast(x * 300, jnp.int16), "int32": lambda x: cast(x, jnp.int32),
    "int32, far out": lambda x: cast(x * 1e8, jnp.int32), "uint32": lambda x: cast(x, jnp.uint32),
    "int32 to uint8": lambda x: cast(cast(x, jnp.int32), jnp.uint8),
    "int32 to int8": lambda x: cast(cast(x, jnp.int32), jnp.int8),
    "int32 to uint32": lambda x: cast(cast(x, jnp.int32), jnp.uint32),
    "bfloat16": lambda x: cast(x, jnp.bfloat16), "float16": lambda x: cast(x * 100, jnp.float16),
    "not of whole numbers": lambda x: ~cast(x, jnp.int32),
    "sum of int8": lambda x: cast(x, jnp.int8) + jnp.int8(100),
    "difference of uint8": lambda x: cast(x, jnp.uint8) - jnp.uint8(30),
    "product of int8": lambda x: cast(x, jnp.int8) * jnp.int8(3),
    "square of int8": lambda x: cast(x, jnp.int8) * cast(x, jnp.int8),
    "cube of int8": lambda x: cast(x, jnp.int8) ** 3,
    "abs of int8": lambda x: abs(cast(x, jnp.int8)),
    "negative of uint8": lambda x: -cast(x, jnp.uint8),
    "quotient of int8": lambda x: lax.div(cast(x, jnp.int8), jnp.full_like(x, -1, jnp.int8)),
    "running sum of int8": lambda x: jnp.cumsum(cast(x, jnp.int8), 1, dtype=jnp.int8),
    "whole sum of int16": lambda x: jnp.broadcast_to(
        lax.reduce_sum_p.bind(cast(x * 60, jnp.int16), axes=(1,), out_sharding=None)[:, None],
        x.shape,
    ),
    "max of int32": lambda x: jnp.maximum(cast(x, jnp.int32), 7),
    "relu of int32": lambda x: nn.relu(cast(x, jnp.int32)),
    "leaky relu of int32": lambda x: nn.leaky_relu(cast(x, jnp.int32)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASTS)
def test_no_point_leaves_the_bounds_of_casts(name):
    """Of ends on either side of 0, of a type's limits, and on them, by every kind of bounds."""
    ends = np.float32([-400, -129, -128, -100, -1.5, -0.5, 0, 0.5, 1, 3, 100, 127, 128, 256, 400])
    pairs = [(a, b) for i, a in enumerate(ends) for b in ends[i:]]
    lower, upper = (np.tile(np.float32(end)[:, None], (1, 2)) for end in zip(*pairs, strict=True))

    def apply(params, x):
        return CASTS[name](x).astype(jnp.float32) * params["w"][None]

    params = {"w": jnp.array([1.0, -2.0])}
    graph = nns.trace(apply, params, lower[:1])
    share = np.linspace(0, 1, 161, dtype=np.float32)[:, None, None]
    points = np.clip(lower + share * (upper - lower), lower, upper)
    # All whole numbers up to 200 are there too, so that wrapping is met.
    points = np.concatenate([points, np.clip(np.round(points), lower, upper)])
    values = jax.jit(lambda x: evaluation.logits(graph, params, x))(points.reshape(-1, 2))
    values = np.asarray(values).reshape(points.shape)
    for outward in (False, True):
        bound = functools.partial(nns.interval_bounds, graph, params, outward=outward)
        found = jax.device_get(jax.jit(bound)(lower, upper))
        assert (values >= found.lower).all() and (values <= found.upper).all()
    # These round otherwise, by what is largest in a sum of lines; to lines a cast moves nothing.
    slack = (0.02 if "float" in name else 1e-5) * np.nan_to_num(
        np.maximum(*map(np.abs, found)), posinf=0
    )
    for method in ("ibp", "crown-ibp", "crown", "fast-lin", "symbolic"):
        bound = (
            nns.symbolic_bounds if method == "symbolic"
            else functools.partial(nns.linear_bounds, method=method)
        )  # fmt: skip
        run = jax.jit(functools.partial(bound, graph, params))
        least = np.asarray(run(lower, upper, boxes.either_side(2)))
        assert (values >= least[:, :2] - slack).all(), method
        assert (-values >= least[:, 2:] - slack).all(), method


def test_casts_are_bounded_exactly_where_they_cannot_wrap():
    """A cast to bool is open only about 0, whole numbers that fit their type are known."""
    lower = np.float32([[-1.0], [0.5], [0.0], [-3.0], [0.0]])
    upper = np.float32([[1.0], [2.0], [2.0], [-1.0], [0.0]])
    bounds = functools.partial(nns.interval_bounds, params={}, lower=lower, upper=upper)

    def found(function):
        graph = nns.trace(lambda _, x: function(x).astype(jnp.float32), {}, lower[:1])
        return tuple(end[:, 0].tolist() for end in bounds(graph))

    assert found(CASTS["bool"]) == ([0, 1, 0, 1, 0], [1, 1, 1, 1, 0])
    assert found(CASTS["int8"]) == ([-1, 0, 0, -3, 0], [1, 2, 2, -1, 0])
    assert found(CASTS["uint8"]) == ([0, 0, 0, 0, 0], [255, 2, 2, 255, 0])
    assert found(lambda x: 50 * CASTS["int8"](x)) == ([-50, 0, 0, -128, 0], [50, 100, 100, 127, 0])


@pytest.mark.parametrize(
    "function",
    [
        lambda k: k & 1, lambda k: k | 1, lambda k: lax.reduce_and(k, (1,))[:, None],
        lambda k: lax.reduce_or(k, (1,))[:, None], lambda k: k ^ 1, lambda k: (k > 0) ^ (k > 1),
    ],
)  # fmt: skip
def test_bits_of_whole_numbers_have_no_bounds(function):
    def apply(params, x):
        return function(cast(x, jnp.int32)).astype(jnp.float32)

    graph = nns.trace(apply, {}, jnp.ones((1, 2)))
    for method in ("ibp", "crown"):
        with pytest.raises(nns.UnsupportedError, match=r"^interval bounds: no rule for .*(and|or)"):
            nns.linear_bounds(
                graph, {}, jnp.zeros((1, 2)), jnp.ones((1, 2)),
                jnp.ones((1, graph.values[graph.logits].shape[1])), method=method,
            )  # fmt: skip


def test_reciprocal_of_a_number_that_may_be_0_is_unknown():
    graph = nns.trace(lambda p, x: 1.0 / x * p["w"][None], {"w": jnp.ones(1)}, jnp.ones((1, 1)))
    ends = jnp.array([[-1.0], [1.0]]), jnp.array([[1.0], [2.0]])
    found = nns.interval_bounds(graph, {"w": jnp.array([2.0])}, *ends)
    np.testing.assert_array_equal(found.lower, [[-np.inf], [1.0]])
    np.testing.assert_array_equal(found.upper, [[np.inf], [2.0]])


@pytest.mark.parametrize("name", ["mlp", "lenet", "resnet", "convolutions"])
def test_a_point_is_bounded_by_its_value(name):
    model, graph = boxes.traced(name)
    x = jnp.asarray(model.images(2))
    found, value = jax.jit(
        lambda p, x: (nns.interval_bounds(graph, p, x, x), evaluation.logits(graph, p, x))
    )(model.params, x)
    for end in found:
        np.testing.assert_allclose(end, value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["lenet", "scans", "masked_attention"])
def test_a_batch_is_its_samples_one_by_one(name):
    model, graph = boxes.traced(name)
    lower, upper = boxes.box(name)
    run = jax.jit(functools.partial(nns.interval_bounds, graph))
    found, _ = bounded(name)
    for row in range(2):
        alone = run(model.params, lower[row : row + 1], upper[row : row + 1])
        for end, one in zip(found, alone, strict=True):
            np.testing.assert_allclose(end[row], one[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["lenet", "resnet", "activations"])
def test_gradients_are_finite_also_of_a_point(name):
    model, graph = boxes.traced(name)

    def width(params, lower, upper):
        low, high = nns.interval_bounds(graph, params, lower, upper)
        return (high - 2 * low).sum()

    slope = jax.jit(jax.grad(width))
    middle = model.images(2)
    for ends in (boxes.box(name), (middle, middle)):
        found = jax.tree.leaves(slope(model.params, *ends))
        assert all(np.isfinite(leaf).all() for leaf in found)
        assert any(np.abs(leaf).max() > 0 for leaf in found)


def test_missing_rule_says_what_and_where():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.cumprod(nn.Dense(3)(x), axis=1)

    variables = {"params": {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}}
    graph = nns.trace(Net().apply, variables, jnp.ones((1, 2)))
    with pytest.raises(nns.UnsupportedError, match="^interval bounds: no rule for cumprod at Net"):
        nns.interval_bounds(graph, variables, jnp.zeros((1, 2)), jnp.ones((1, 2)))


def test_lookups_by_the_sample_have_no_bounds():
    model, graph = boxes.traced("embedding")
    tokens = model.images(1)
    with pytest.raises(nns.UnsupportedError, match="no rule for gather at .*Embed_0"):
        nns.interval_bounds(graph, model.params, tokens, tokens)


@pytest.mark.parametrize(
    ("lower", "upper", "message"),
    [
        (
            np.zeros((2, 4)),
            np.ones((2, 5)),
            r"^lower: x must have shape \[B, 5\], not shape \(2, 4",
        ),
        (np.zeros((2, 5)), np.ones(5), r"^upper: x must have shape"),
        (np.zeros((2, 5)), np.ones((3, 5)), "must have one shape, not"),
        (np.zeros((0, 5)), np.ones((0, 5)), "empty batch"),
        (np.ones((2, 5)), np.zeros((2, 5)), "lower must be at most upper"),
        (np.full((2, 5), np.nan), np.ones((2, 5)), "neither may hold NaN"),
    ],
)
def test_bad_boxes(lower, upper, message):
    model, graph = boxes.traced("mlp")
    with pytest.raises(ValueError, match=message):
        nns.interval_bounds(graph, model.params, np.float32(lower), np.float32(upper))
