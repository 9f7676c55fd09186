"""Objectives: one interface, and each against its formula written out with plain operations."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnslicer_jax.linear_bounds import linear_bounds, margin_rows
from nnslicer_jax.symbolic import symbolic_bounds
from prune.objectives import OBJECTIVES, Network, Plan, crown_ibp, mixtrain

SHAPE, CLASSES, SIZE = (2, 2, 1), 3, 6
PLAN = Plan(SIZE, epoch_steps=2, epochs=5)


class Tiny(nn.Module):
    """Dense, batch norm, ReLU, dense."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Dense(5)(x.reshape((x.shape[0], -1)))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(CLASSES)(x)


@functools.cache
def network():
    return Network.of(Tiny(), SHAPE)


@functools.cache
def variables():
    """Large weights, so that attacks matter, and statistics unlike those of a batch."""
    rng = np.random.default_rng(0)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(
            rng.uniform(0.5, 2, leaf.shape)
            if "var" in jax.tree_util.keystr(path)
            else rng.normal(size=leaf.shape),
            jnp.float32,
        ),
        network().shapes(),
    )


@functools.cache
def batch(seed=1):
    rng = np.random.default_rng(seed)
    images = rng.random((SIZE, *SHAPE), np.float32)
    return jnp.asarray(images), jnp.asarray(rng.integers(0, CLASSES, SIZE), jnp.int32)


# The network and its losses, written out -----------------------------------------------------


def forward(variables, x, statistics=None):
    """Logits in use; given the statistics, logits in training and the statistics after them."""
    p = variables["params"]
    h = x.reshape((len(x), -1)) @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"][None]
    running = variables["batch_stats"]["BatchNorm_0"]
    mean, var = running["mean"], running["var"]
    if statistics is not None:
        mean, var = h.mean(0), (h**2).mean(0) - h.mean(0) ** 2
        before = statistics["batch_stats"]["BatchNorm_0"]
        after = {"mean": 0.9 * before["mean"] + 0.1 * mean, "var": 0.9 * before["var"] + 0.1 * var}
        statistics = {"batch_stats": {"BatchNorm_0": after}}
    norm = p["BatchNorm_0"]
    h = (h - mean[None]) / jnp.sqrt(var + 1e-5)[None] * norm["scale"][None] + norm["bias"][None]
    h = jnp.where(h > 0, h, 0)
    logits = h @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"][None]
    return logits if statistics is None else (logits, statistics)


def running():
    return {"batch_stats": variables()["batch_stats"]}


def softmax(logits):
    e = jnp.exp(logits)
    return e / e.sum(1, keepdims=True)


def cross_entropy(logits, labels):
    return sum(-jnp.log(softmax(logits)[i, labels[i]]) for i in range(len(labels))) / len(labels)


def kl(logits, others):
    p, q = softmax(logits), softmax(others)
    return (p * jnp.log(p / q)).sum() / len(p)


def climbed(loss, start, images, eps, step, steps):
    x = start
    for _ in range(steps):
        x = x + step * jnp.sign(jax.grad(loss)(x))
        x = jnp.maximum(jnp.minimum(x, images + eps), images - eps)
        x = jnp.maximum(jnp.minimum(x, 1.0), 0.0)
    return x


def worst_case(margins):
    """Cross-entropy where the label's logit is 0 and each other one less its margin."""
    return jnp.log(1 + jnp.exp(-margins).sum(1)).mean()


def box(images, eps):
    return jnp.maximum(images - eps, 0.0), jnp.minimum(images + eps, 1.0)


def interval_margins(variables, images, labels, eps):
    """Interval bounds written out, the last layer merged with the margins."""
    p = variables["params"]
    norm, run = p["BatchNorm_0"], variables["batch_stats"]["BatchNorm_0"]
    low, high = (end.reshape((len(images), -1)) for end in box(images, eps))
    scale = (norm["scale"] / jnp.sqrt(run["var"] + 1e-5))[None]
    w = p["Dense_0"]["kernel"] * scale
    b = (p["Dense_0"]["bias"] - run["mean"])[None] * scale + norm["bias"][None]
    centre, radius = (high + low) / 2 @ w + b, (high - low) / 2 @ jnp.abs(w)
    low, high = jnp.maximum(centre - radius, 0), jnp.maximum(centre + radius, 0)
    last = p["Dense_1"]
    found = []
    for i, label in enumerate(np.asarray(labels)):
        for other in [k for k in range(CLASSES) if k != label]:
            v = last["kernel"][:, label] - last["kernel"][:, other]
            c = last["bias"][label] - last["bias"][other]
            found.append((jnp.where(v > 0, low[i], high[i]) * v).sum() + c)
    return jnp.stack(found).reshape(len(images), CLASSES - 1)


# Each objective: options, and what loss and statistics are ------------------------------------


def natural(params, state, batch, key):
    logits, after = forward({**variables(), "params": params}, batch[0], running())
    return cross_entropy(logits, batch[1]), after


def pgd(params, state, batch, key):
    images, labels = batch
    v = {**variables(), "params": params}
    shift = jax.random.uniform(jax.random.split(key)[0], images.shape, minval=-0.1, maxval=0.1)
    start = jnp.clip(images + shift, 0, 1)
    still = jax.lax.stop_gradient(v)
    moved = climbed(lambda x: cross_entropy(forward(still, x), labels), start, images, 0.1, 0.04, 3)
    logits, after = forward(v, jax.lax.stop_gradient(moved), running())
    return cross_entropy(logits, labels), after


def trades(params, state, batch, key):
    images, labels = batch
    v = {**variables(), "params": params}
    still = jax.lax.stop_gradient(v)
    start = images + 0.05 * jax.random.normal(jax.random.split(key, 3)[0], images.shape)
    moved = climbed(
        lambda x: kl(forward(still, images), forward(still, x)), start, images, 0.1, 0.04, 3
    )
    logits, after = forward(v, images, running())
    others, after = forward(v, jax.lax.stop_gradient(moved), after)
    return cross_entropy(logits, labels) + 6 * kl(logits, others), after


def free(params, state, batch, key):
    v = {**variables(), "params": params}
    logits, after = forward(v, jnp.clip(batch[0] + state.perturbation, 0, 1), running())
    return cross_entropy(logits, batch[1]), after


def smoothing(params, state, batch, key):
    images, labels = batch
    v = {**variables(), "params": params}
    noisy = images + 0.25 * jax.random.normal(jax.random.split(key, 3)[0], images.shape)
    logits, after = forward(v, images, running())
    others, after = forward(v, noisy, after)
    return cross_entropy(logits, labels) + 6 * kl(logits, others), after


def noisy(params, state, batch, key):
    images, labels = batch
    v = {**variables(), "params": params}
    x = images + 0.5 * jax.random.normal(jax.random.split(key, 3)[0], images.shape)
    logits, after = forward(v, x, running())
    return cross_entropy(logits, labels), after


def mixed(params, state, batch, key):
    images, labels = batch
    v = {**variables(), "params": params}
    which = jax.random.randint(jax.random.split(key, 3)[2], (4,), 0, SIZE)
    logits, after = forward(v, images, running())
    rows = margin_rows(labels[which], CLASSES)
    margins = symbolic_bounds(network().graph, v, *box(images[which], 0.1), rows)
    return cross_entropy(logits, labels) + 0.1 * worst_case(margins), after


def interval(params, state, batch, key):
    v = {**variables(), "params": params}
    _, after = forward(v, batch[0], running())
    return worst_case(interval_margins(v, *batch, 0.1)), after


CASES = {
    "natural": ("natural", {}, natural),
    "pgd": ("pgd", {"eps": 0.1, "step_size": 0.04, "steps": 3}, pgd),
    # From nearer the image the first step is that of rounding errors.
    "trades": (
        "trades",
        {"eps": 0.1, "step_size": 0.04, "steps": 3, "start": 0.05},
        trades,
    ),
    "free": ("free", {"eps": 0.1}, free),
    "smoothing": ("smoothing", {}, smoothing),
    "smoothing, noisy": ("smoothing", {"form": "noisy", "sigma": 0.5}, noisy),
    "mixtrain": ("mixtrain", {"eps": 0.1, "samples": 4, "probability": 1.0}, mixed),
    "crown_ibp": ("crown_ibp", {"eps": 0.1}, interval),
}
# Dropout aside, these draw nothing.
FIXED = {"natural", "free", "crown_ibp"}


def test_every_objective_has_a_case():
    assert {name for name, _, _ in CASES.values()} == set(OBJECTIVES)


@functools.cache
def compiled(case):
    """A first state, and loss, aux and gradient as one jitted function."""
    name, options, _ = CASES[case]
    state = OBJECTIVES[name].init(network(), PLAN, **options)

    @jax.jit
    def run(state, params, batch, key):
        def loss(params):
            return OBJECTIVES[name].loss(state, {**variables(), "params": params}, batch, key)

        return jax.value_and_grad(loss, has_aux=True)(params)

    return state, run


@pytest.mark.parametrize("case", CASES)
def test_an_objective_is_its_formula(case):
    state, run = compiled(case)
    params, key = variables()["params"], jax.random.key(7)
    (value, (after, statistics, figures)), gradient = run(state, params, batch(), key)
    naive = functools.partial(CASES[case][2], state=state, batch=batch(), key=key)
    (expected, after_expected), slope = jax.jit(jax.value_and_grad(naive, has_aux=True))(params)
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(slope), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
        assert np.isfinite(ours).all()
    assert jax.tree.structure(statistics) == jax.tree.structure(after_expected)
    for ours, theirs in zip(
        jax.tree.leaves(statistics), jax.tree.leaves(after_expected), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    # What is carried keeps its structure, so that a loop can carry it.
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert all(0 <= figure <= 1 for figure in figures.values())


@pytest.mark.parametrize("case", CASES)
def test_an_objective_is_pure_and_depends_on_its_key(case):
    state, run = compiled(case)
    params = variables()["params"]
    before = [np.asarray(leaf).copy() for leaf in jax.tree.leaves((state, params, batch()))]
    first, _ = run(state, params, batch(), jax.random.key(0))
    again, _ = run(state, params, batch(), jax.random.key(0))
    other, _ = run(state, params, batch(), jax.random.key(1))
    assert first[0] == again[0]
    assert (first[0] == other[0]) == (case in FIXED)
    for old, new in zip(before, jax.tree.leaves((state, params, batch())), strict=True):
        np.testing.assert_array_equal(old, new)


# Of one objective alone -----------------------------------------------------------------------


def test_free_climbs_and_keeps_to_its_ball():
    state, run = compiled("free")
    params = variables()["params"]
    images, labels = batch()
    shift = jnp.zeros_like(images)
    for _ in range(3):
        slope = jax.grad(
            lambda s: cross_entropy(
                forward(variables(), jnp.clip(images + s, 0, 1), running())[0], labels
            )
        )(shift)
        shift = jnp.clip(shift + 0.1 * jnp.sign(slope), -0.1, 0.1)
        (_, (state, _, _)), _ = run(state, params, batch(), jax.random.key(0))
        np.testing.assert_allclose(state.perturbation, shift, atol=1e-7)
    assert np.abs(state.perturbation).max() == np.float32(0.1)


def test_mixtrain_leaves_the_bounds_out_as_often_as_said():
    state = mixtrain.init(network(), PLAN, eps=0.1, samples=2, probability=0.8)
    loss = jax.jit(lambda key: mixtrain.loss(state, variables(), batch(), key))
    plain, _ = natural(variables()["params"], None, batch(), None)
    found = [loss(jax.random.key(i)) for i in range(60)]
    left_out = [bool(np.isnan(aux[2]["robust"])) for _, aux in found]
    for (value, _), out in zip(found, left_out, strict=True):
        assert (abs(value - plain) < 1e-5) == out
    # 12 expected; 3 to 25 hold with a chance of more than 0.999.
    assert 3 <= sum(left_out) <= 25


def test_mixtrain_ramps_then_raises_the_weight():
    state = mixtrain.init(network(), Plan(6, epoch_steps=10, epochs=60), eps=0.5, ramp_epochs=15)
    for epoch, step in [(0, 0), (7, 75), (15, 150), (19, 199), (20, 200), (44, 440), (59, 599)]:
        now = state.replace(step=jnp.int32(step))
        np.testing.assert_allclose(mixtrain.radius(now), 0.5 * min(1, step / 150), rtol=1e-6)
        expected = min(50, 0.1 * 2.5 ** math.floor(max(epoch - 15, 0) / 5))
        np.testing.assert_allclose(mixtrain.weight(now), expected, rtol=1e-5)
        faster = min(50, 0.1 * 2.5 ** math.floor(max(epoch - 15, 0) / 2.5))
        np.testing.assert_allclose(mixtrain.weight(now.replace(every=2.5)), faster, rtol=1e-5)


def test_crown_gives_way_to_interval_bounds():
    state = crown_ibp.init(network(), PLAN, eps=0.2, ramp=0.6)
    loss = jax.jit(crown_ibp.loss)
    images, labels = batch()
    rows = margin_rows(labels, CLASSES)
    for step in range(8):
        share = min(1.0, step / 6)
        lower, upper = box(images, 0.2 * share)
        crown = linear_bounds(network().graph, variables(), lower, upper, rows, method="crown-ibp")
        plain = interval_margins(variables(), images, labels, 0.2 * share)
        expected = worst_case((1 - share) * crown + share * plain)
        value, (state, _, _) = loss(state, variables(), batch(), jax.random.key(0))
        np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert state.step == 8


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("pgd", {"eps": -0.1}, "eps must be 0 to 1, not -0.1"),
        ("pgd", {"steps": 0}, "steps must be a whole number, at least 1, not 0"),
        ("trades", {"weight": -1}, "weight must be 0 or more, not -1"),
        ("trades", {"step_size": 0}, "step_size must be above 0 and at most 1, not 0"),
        ("free", {"replays": 0}, "replays must be a whole number, at least 1, not 0"),
        ("smoothing", {"form": "both"}, "form must be stability or noisy, not 'both'"),
        ("smoothing", {"sigma": 0}, "sigma must be above 0, not 0"),
        ("mixtrain", {"probability": 2}, "probability must be 0 to 1, not 2"),
        ("mixtrain", {"samples": 0}, "samples must be a whole number, at least 1, not 0"),
        ("mixtrain", {"every": 0}, "every must be above 0, not 0"),
        ("crown_ibp", {"eps": 0}, "eps must be above 0 and at most 1, not 0"),
        ("crown_ibp", {"ramp": 1.5}, "ramp must be 0 to 1, not 1.5"),
    ],
)
def test_options_out_of_range(name, options, said):
    with pytest.raises(ValueError) as caught:
        OBJECTIVES[name].init(network(), PLAN, **options)
    assert str(caught.value) == said


def test_an_operation_without_a_bound_rule_is_named():
    class Sorted(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            x = nn.Dense(4)(x.reshape((x.shape[0], -1)))
            return nn.Dense(2)(jax.lax.sort((x, 2 * x), num_keys=1)[1])

    made = Network.of(Sorted(), SHAPE)
    state = crown_ibp.init(made, PLAN)
    first = made.initialize(jax.random.key(0))
    with pytest.raises(NotImplementedError, match="interval bounds: no rule for sort") as caught:
        crown_ibp.loss(state, first, (batch()[0], batch()[1] % 2), jax.random.key(0))
    assert "\n" not in str(caught.value)
