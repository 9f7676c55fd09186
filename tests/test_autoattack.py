"""AutoAttack's attacks: each against a plain restatement, and what all attacks have in common."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nnslicer_jax as nns
from nnslicer_jax import attacks, data
from nnslicer_jax.attacks.adversarial import Case
from nnslicer_jax.attacks.apgd import _SEARCH as APGD
from nnslicer_jax.attacks.apgd import checkpoints, dlr, dlr_targeted, log_odds
from nnslicer_jax.attacks.fab import onto
from nnslicer_jax.attacks.square import _SEARCH as SQUARE
from nnslicer_jax.attacks.square import sides
from tests.naive import autoattack as naive

KEY = jax.random.key(0)
EPS = 0.06
ATTACKS = {
    "apgd ce": functools.partial(attacks.apgd, eps=EPS, steps=20),
    "apgd dlr": functools.partial(attacks.apgd, eps=EPS, steps=20, loss="dlr"),
    "apgd targeted": functools.partial(
        attacks.apgd, eps=EPS, steps=10, loss="dlr-targeted", restarts=2
    ),
    "fab": functools.partial(attacks.fab, steps=10, restarts=2),
    "square": functools.partial(attacks.square, eps=EPS, queries=60),
}


def linear(weights, images):
    return images.reshape(len(images), -1) @ weights


@functools.cache
def linear_case():
    """A network of one layer, images, and labels that are right but for the first two."""
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(10, 6, 5, 2)).astype(np.float32)
    weights = rng.normal(size=(60, 5)).astype(np.float32)
    labels = linear(weights, images).argmax(1)
    labels[:2] = (labels[:2] + 1) % 5
    return weights, images, labels


@functools.cache
def found(name):
    return jax.tree.map(np.asarray, ATTACKS[name](KEY, linear, *linear_case()))


@functools.cache
def boundary():
    """How far the nearest other class of the linear case is, in L-infinity, bounds apart."""
    weights, images, labels = linear_case()
    logits = linear(weights.astype(float), images.astype(float))
    far = np.full((len(images), 5), np.inf)
    for i, label in enumerate(labels):
        for k in set(range(5)) - {label}:
            gap = logits[i, label] - logits[i, k]
            far[i, k] = gap / np.abs(weights[:, label] - weights[:, k]).sum()
    return far.min(1)


@pytest.mark.parametrize("name", ATTACKS)
def test_images_stay_images_and_success_and_distance_are_theirs(name):
    weights, images, labels = linear_case()
    result = found(name)
    assert result.images.shape == images.shape and result.images.dtype == images.dtype
    assert result.images.min() >= 0 and result.images.max() <= 1
    np.testing.assert_array_equal(
        result.success, linear(weights, result.images).argmax(1) != labels
    )
    moved = np.abs(result.images - images).max((1, 2, 3))
    np.testing.assert_allclose(result.distance, moved, atol=1e-6)
    # Where the network was wrong to begin with there is nothing to do.
    assert result.success[:2].all()
    np.testing.assert_array_equal(result.images[:2], images[:2])
    if name == "fab":
        assert result.success.all()
    else:
        assert (result.distance <= EPS + 1e-6).all()
        # Some are out of reach, and some, but for the search without gradients, within it.
        assert not result.success[boundary() > EPS].any()
        assert result.success[2:].any() and (boundary() > EPS).any()
        if name != "square":
            assert result.success[boundary() < 0.7 * EPS].all()
    again = ATTACKS[name](KEY, linear, weights, images, labels, batch_size=4)
    np.testing.assert_array_equal(result.success, again.success)
    np.testing.assert_allclose(result.distance, again.distance, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["apgd ce", "square"])
def test_another_key_is_another_walk(name):
    other = ATTACKS[name](jax.random.key(1), linear, *linear_case())
    assert (np.asarray(other.images) != found(name).images).any()


# APGD ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 20, 37, 50, 100, 1000])
def test_checkpoints_are_the_papers(steps):
    assert checkpoints(steps) == naive.checkpoints(steps)
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


@functools.cache
def curved():
    """A network that is not linear, and one image, as an attack sees them."""
    rng = np.random.default_rng(3)
    first, second = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 12), (12, 5)))

    def logits(image):
        return jnp.tanh((2 * image - 1) @ first) @ second

    image = rng.uniform(0.05, 0.95, 8).astype(np.float32)
    label = int(np.asarray(logits(jnp.asarray(image))).argmax())
    return Case(logits, jnp.asarray(image), jnp.int32(label), jnp.float32(0), jnp.float32(1))


LOSSES = {"ce": log_odds, "dlr": dlr, "dlr-targeted": dlr_targeted}


@pytest.mark.parametrize("loss", LOSSES)
def test_apgd_walks_as_the_algorithm_says(loss):
    case, steps, eps = curved(), 40, jnp.float32(0.3)
    options = {"eps": eps, "loss": LOSSES[loss], "steps": steps, "restarts": 1, "targets": 2}
    state = APGD.start(KEY, case, **options)
    target = state.classes[0]
    step = jax.jit(lambda s: APGD.step(case, s, **options))
    states = []
    for _ in range(steps + 1):
        state = step(state)
        states.append(state)

    @jax.jit
    def f(x):
        return jax.value_and_grad(lambda v: LOSSES[loss](case.logits(v), case.label, target))(x)

    start = np.asarray(states[0].point)
    reach = np.abs(start - case.image).max()
    assert reach <= eps + 1e-6
    low, high = (np.asarray(case.clip(case.image + e)) for e in (-eps, eps))
    points, lengths = naive.apgd(
        start, low, high, float(eps), steps, lambda x: tuple(map(np.asarray, f(x)))
    )
    np.testing.assert_array_equal([s.length for s in states], lengths)
    assert len(set(lengths)) > 2
    for ours, theirs in zip(states, points, strict=True):
        np.testing.assert_allclose(ours.point, theirs, atol=1e-5)


def test_apgd_goes_from_run_to_run():
    case = curved()
    options = {
        "eps": jnp.float32(0.2), "loss": dlr_targeted, "steps": 3, "restarts": 2, "targets": 9,
    }  # fmt: skip
    state = APGD.start(KEY, case, **options)
    # At most the other classes, the likeliest first.
    logits = np.asarray(case.logits(case.image))
    assert list(state.classes) == list(np.argsort(-logits)[1:])
    step = jax.jit(lambda s: APGD.step(case, s, **options))
    starts, leads = [], []
    for i in range(4 * 2 * 4):
        assert int(state.run) == i // 4 and int(state.step) == i % 4
        state = step(state)
        leads.append(float(state.lead))
        if i % 4 == 0:
            starts.append(np.asarray(state.point))
    assert not state.going
    assert leads == sorted(leads)
    assert len({start.tobytes() for start in starts}) == 8


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(-50, 50), min_size=4, max_size=7, unique=True), st.data())
def test_dlr_losses_are_the_papers(logits, data):
    label = data.draw(st.integers(0, len(logits) - 1))
    target = data.draw(st.sampled_from([k for k in range(len(logits)) if k != label]))
    given_ = jnp.asarray(logits, jnp.float32)
    for scale, shift in ((1, 0), (4, 8)):
        scaled = scale * given_ + shift
        np.testing.assert_allclose(
            dlr(scaled, label, target), naive.dlr(np.array(logits), label), rtol=1e-5
        )
        np.testing.assert_allclose(
            dlr_targeted(scaled, label, target),
            naive.dlr_targeted(np.array(logits), label, target),
            rtol=1e-5,
        )
    others = [z for i, z in enumerate(logits) if i != label]
    expected = np.logaddexp.reduce(np.float64(others)) - logits[label]
    np.testing.assert_allclose(log_odds(given_, label, target), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("loss", "least"), [("dlr", 3), ("dlr-targeted", 4)])
def test_dlr_needs_classes(loss, least):
    weights, images, labels = linear_case()
    few = weights[:, : least - 1]
    message = f"loss '{loss}' needs {least} classes or more, not {least - 1}"
    with pytest.raises(ValueError, match=message):
        right = linear(few, images).argmax(1)
        attacks.apgd(KEY, linear, few, images, right, eps=EPS, loss=loss, steps=2)


# FAB -----------------------------------------------------------------------------------------


PROJECTED = jax.jit(onto)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.sampled_from([1, 3, 8]), st.floats(-3, 3))
def test_fab_projects_as_linear_programming_does(seed, size, gap):
    rng = np.random.default_rng(seed)
    point = rng.uniform(size=size).astype(np.float32)
    # Some pixels at their bounds, some without influence.
    point[rng.random(size) < 0.2] = 0
    point[rng.random(size) < 0.2] = 1
    gradient = rng.normal(size=size).astype(np.float32) * (rng.random(size) < 0.8)
    gradient = gradient.astype(np.float32)
    move = np.asarray(PROJECTED(point, np.float32(gap), gradient, 0.0, 1.0))
    assert (point + move >= -1e-6).all() and (point + move <= 1 + 1e-6).all()
    left = gap + (gradient * move).sum()
    # What the pixels can do together.
    most = np.where(gradient * -np.sign(gap) > 0, 1 - point, point) @ np.abs(gradient)
    if most < abs(gap) + 1e-5:
        np.testing.assert_allclose(abs(left), max(abs(gap) - most, 0), atol=1e-4)
        return
    np.testing.assert_allclose(left, 0, atol=1e-4)
    least = naive.projection(*(a.astype(float) for a in (point, np.float32(gap), gradient)), 0, 1)
    if least is not None:
        # Near what is possible at all, a little more need takes a lot more length.
        slack = 1e-4 * (1 + 1 / max(np.abs(gradient)[np.abs(gradient) > 0].min(), 1e-3))
        np.testing.assert_allclose(np.abs(move).max(), least, atol=slack)


def test_fab_finds_the_boundary_of_a_linear_network():
    """Whose nearest image beyond each face is a linear program's."""
    weights, images, labels = (a.astype(float) for a in linear_case())
    distance = found("fab").distance
    for i in range(2, len(images)):
        pixels, label = images[i].reshape(-1), int(labels[i])
        logits = pixels @ weights
        faces = [
            naive.projection(
                pixels, logits[k] - logits[label], weights[:, k] - weights[:, label], 0, 1
            )
            for k in range(5)
            if k != label
        ]
        exact = min(face for face in faces if face is not None)
        assert exact * (1 - 1e-4) <= distance[i] <= exact * 1.02


def test_fab_stops_where_it_is_close_enough():
    near = attacks.fab(KEY, linear, *linear_case(), eps=2.5 * float(boundary()[2:].max()))
    assert np.asarray(near.success).all()
    assert (near.distance[2:] >= found("fab").distance[2:] - 1e-6).all()
    assert (near.distance[2:] > 1.03 * found("fab").distance[2:]).any()


def test_fab_goes_on_from_points_that_are_hardly_across():
    network, digits = nns.zoo.load("digits_cnn"), data.load("digits")
    images = data.to_float(np.asarray(digits.test_images[:24]))
    labels = np.asarray(digits.test_labels[:24]).astype(np.int32)
    apply, params = network.model.apply, network.variables

    @jax.jit
    def lead(points, classes):
        def gaps(points):
            logits, rows = apply(params, points), jnp.arange(len(points))
            return logits[rows, classes] - logits[rows, labels]

        values, pull = jax.vjp(gaps, points)
        return values, pull(jnp.ones_like(values))[0]

    project = jax.jit(jax.vmap(lambda *given: onto(*given, 0.0, 1.0)))
    logits = jax.jit(functools.partial(apply, params))
    expected = naive.fab(logits, lead, project, images, labels, steps=100, targets=2)
    result = attacks.fab(KEY, apply, params, images, labels, steps=100, targets=2)
    assert (logits(images).argmax(1) == labels).all()
    np.testing.assert_allclose(result.distance, expected, rtol=2e-3)


# Square --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(8, 8), (28, 28), (32, 32), (6, 5)])
def test_squares_shrink_as_the_paper_says(height, width):
    queries = 10_000
    expected = [naive.side(q, 0.8, height, width) for q in range(0, queries, 7)]
    assert list(sides(queries, 0.8, queries, height, width)[::7]) == expected
    # AutoAttack makes the first half of them; stretched, half as many come to the same end.
    assert (
        sides(5000, 0.8, queries, height, width)
        == sides(queries, 0.8, queries, height, width)[:5000]
    )
    short = sides(1000, 0.8, 1000, height, width)
    assert short[-1] == expected[-1] and short[20] == naive.side(200, 0.8, height, width)


def test_each_query_sets_one_square():
    weights, images, labels = linear_case()
    low, high = jnp.float32(0), jnp.float32(1)
    case = Case(
        lambda x: linear(weights, x[None])[0], jnp.asarray(images[3]), jnp.int32(labels[3]),
        low, high,
    )  # fmt: skip
    lengths = sides(40, 0.8, 400, 6, 5)
    assert len(set(lengths)) > 3
    options = {"eps": jnp.float32(EPS), "lengths": lengths}
    state = SQUARE.start(KEY, case, **options)
    ends = np.stack([np.asarray(case.clip(case.image + e)) for e in (-EPS, EPS)])
    # Stripes: one sign for each column and channel.
    up = np.asarray(state.image) == ends[1]
    assert (up | (np.asarray(state.image) == ends[0])).all()
    assert (up == up[:1]).all() and up.any() and not up.all()
    step = jax.jit(lambda s: SQUARE.step(case, s, **options))
    changed = 0
    for query, side in enumerate(lengths):
        new = step(state)
        assert int(new.query) == query + 1 and new.lead >= state.lead
        np.testing.assert_allclose(new.lead, case.lead(case.logits(new.image)), rtol=1e-5)
        moved = np.asarray(new.image) != np.asarray(state.image)
        if moved.any():
            changed += 1
            rows, columns = (np.flatnonzero(moved.any(axes)) for axes in ((1, 2), (0, 2)))
            assert rows[-1] - rows[0] < side and columns[-1] - columns[0] < side
            for channel in range(2):
                at = moved[..., channel]
                values = np.asarray(new.image)[..., channel][at]
                assert any((values == end[..., channel][at]).all() for end in ends)
            assert new.lead > state.lead
        state = new
    assert changed > 3


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (attacks.apgd, {"eps": EPS, "loss": "hinge"}, "^loss must be one of ce, dlr, dlr-targ"),
        (attacks.apgd, {"eps": 2}, "^eps must be in 0..1"),
        (attacks.apgd, {"eps": EPS, "restarts": 0}, "^restarts must be an integer of at least 1"),
        (attacks.fab, {"targets": 0}, "^targets must be an integer of at least 1"),
        (attacks.fab, {"steps": 1.5}, "^steps must be an integer of at least 1"),
        (attacks.square, {"eps": EPS, "share": 0}, "^share must be above 0 and at most 1, not 0"),
        (attacks.square, {"eps": EPS, "queries": 0}, "^queries must be an integer of at least 1"),
    ],
)
def test_bad_options(function, options, message):
    with pytest.raises(ValueError, match=message):
        function(KEY, linear, *linear_case(), **options)


def test_squares_need_pictures():
    weights, images, labels = linear_case()
    with pytest.raises(ValueError, match="images must be"):
        attacks.square(KEY, linear, weights, images.reshape(10, -1), labels, eps=EPS)
