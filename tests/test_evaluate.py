"""Evaluation: nothing an attack says is believed, and no attack contradicts a certificate."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import nnslicer_jax as nns
from nnslicer_jax import attacks, data
from nnslicer_jax.attacks import Adversarial
from prune import evaluate

KEY = jax.random.key(0)
METHODS = ["ibp", "crown-ibp", "crown", "fast-lin"]
SHAPE = (5, 4, 1)


def linear(weights, images):
    return images.reshape(len(images), -1) @ weights


def small(params, images):
    """A convolution and two dense layers, for 4 classes."""
    x = nn.relu(nn.Conv(3, (2, 2), 2).apply({"params": params["first"]}, images))
    x = nn.relu(x.reshape(len(x), -1) @ params["second"])
    return x @ params["third"]


@functools.cache
def case():
    """The small network, traced, and images with labels of which it gets the first 3 wrong."""
    rng = np.random.default_rng(0)
    params = {
        "first": {"kernel": rng.normal(size=(2, 2, 1, 3)), "bias": rng.normal(size=3) * 0.1},
        "second": rng.normal(size=(18, 8)) / 4,
        "third": rng.normal(size=(8, 4)) / 2,
    }
    params = jax.tree.map(jnp.float32, params)
    images = rng.uniform(size=(24, *SHAPE)).astype(np.float32)
    logits = jax.jit(small)(params, images)
    labels = np.asarray(logits).argmax(1).astype(np.int32)
    labels[:3] = (labels[:3] + 1) % 4
    return params, images, labels, nns.trace(small, params, images[:1])


# So small that it takes seconds, if weaker than published.
QUICK = {
    "apgd-ce": functools.partial(attacks.apgd, steps=15),
    "apgd-t": functools.partial(attacks.apgd, steps=8, loss="dlr-targeted"),
    "fab-t": functools.partial(attacks.fab, steps=8),
    "square": functools.partial(attacks.square, queries=30),
}
EPS = 0.05


@functools.cache
def attacked(eps=EPS):
    params, images, labels, _ = case()
    return evaluate.autoattack(KEY, small, params, images, labels, eps=eps, attacks=QUICK)


def test_benign_is_what_the_network_says():
    params, images, labels, _ = case()
    found = evaluate.benign(small, params, images, labels, batch_size=7)
    np.testing.assert_array_equal(found.right, np.arange(24) >= 3)
    assert found.accuracy == 21 / 24
    low, high = found.interval()
    # Clopper and Pearson's ends are where 21 or more, and 21 or fewer, are as unlikely as 2.5 %.
    assert scipy.stats.binom.sf(20, 24, low) == pytest.approx(0.025, rel=1e-6)
    assert scipy.stats.binom.cdf(21, 24, high) == pytest.approx(0.025, rel=1e-6)


# Under attack --------------------------------------------------------------------------------


def check_attacked(found, eps):
    params, images, labels, _ = case()
    said = np.asarray(jax.jit(small)(params, found.images)).argmax(1)
    np.testing.assert_array_equal(found.benign, np.arange(24) >= 3)
    np.testing.assert_array_equal(found.right, found.benign & (said == labels))
    kept = found.right | ~found.benign
    np.testing.assert_array_equal(found.images[kept], images[kept])
    assert (np.abs(found.images - images) <= eps + 1e-6).all()
    assert found.images.min() >= 0 and found.images.max() <= 1
    accuracies = [found.benign.mean(), *found.after.values()]
    assert accuracies == sorted(accuracies, reverse=True)
    assert found.accuracy == accuracies[-1]


def test_attacks_only_ever_lower_accuracy():
    found = attacked()
    check_attacked(found, EPS)
    assert list(found.after) == list(QUICK)
    assert 0 < found.accuracy < found.benign.mean()


def test_every_restart_attacks_what_survived_those_before():
    params, images, labels, _ = case()
    run = functools.partial(evaluate.era, KEY, small, params, images, labels, eps=EPS, steps=3)
    found = run(restarts=4, relative_step=0.7)
    check_attacked(found, EPS)
    assert list(found.after) == ["restart 1", "restart 2", "restart 3", "restart 4"]
    first = run(restarts=1, relative_step=0.7)
    assert first.accuracy == found.after["restart 1"]
    # One key gives one result in batches of any size.
    again = run(restarts=1, relative_step=0.7, batch_size=16)
    np.testing.assert_array_equal(first.right, again.right)
    assert not (found.right & ~first.right).any()
    assert 0 < found.accuracy < found.benign.mean()


def test_more_eps_leaves_less():
    found = attacked(eps=1.0)
    check_attacked(found, 1.0)
    assert found.accuracy < attacked().accuracy


def test_no_attack_is_believed():
    params, images, labels, _ = case()
    calls = []

    def lies(key, apply, params, images, labels, *, eps, bounds, batch_size):
        calls.append(len(images))
        success = jnp.ones(len(images), bool)
        return Adversarial(jnp.asarray(images), success, jnp.zeros(len(images)))

    def strays(key, apply, params, images, labels, *, eps, bounds, batch_size):
        # Far outside of eps and of the bounds.
        calls.append(len(images))
        success = jnp.zeros(len(images), bool)
        return Adversarial(jnp.asarray(7 - 9 * images), success, jnp.zeros(len(images)))

    found = evaluate.autoattack(
        KEY, small, params, images, labels, eps=0.3, attacks={"lies": lies, "strays": strays}
    )
    check_attacked(found, 0.3)
    assert found.after["lies"] == 21 / 24
    # Clipped to eps and the bounds, what strays may still fool the network.
    moved = np.clip(np.clip(7 - 9 * images, images - 0.3, images + 0.3), 0, 1)
    right = np.asarray(jax.jit(small)(params, moved.astype(np.float32))).argmax(1) == labels
    np.testing.assert_array_equal(found.right, found.benign & right)
    assert found.after["strays"] == right[3:].sum() / 24 < 21 / 24
    # All that are right fit into one batch, and only they are attacked.
    assert calls == [24, 24]


@pytest.mark.parametrize(
    ("count", "size", "batch"),
    [(128, 128, 128), (33, 128, 128), (32, 128, 32), (9, 128, 32), (1, 128, 8), (1, 24, 24)],
)
def test_few_images_are_attacked_in_small_batches(count, size, batch):
    assert evaluate._batch(count, size) == batch


def test_autoattack_is_no_weaker_than_pgd():
    """On the digits, where both leave some."""
    model, variables, _ = nns.zoo.load("digits_cnn")
    digits = data.load("digits")
    images, labels = data.to_float(digits.test_images[:32]), digits.test_labels[:32].astype(int)
    given = (KEY, model.apply, variables, images, labels)
    strong = evaluate.autoattack(*given, eps=0.12, attacks={
        "apgd-ce": functools.partial(attacks.apgd, steps=30),
        "apgd-t": functools.partial(attacks.apgd, steps=20, loss="dlr-targeted", targets=3),
        "fab-t": functools.partial(attacks.fab, steps=10, targets=3),
        "square": functools.partial(attacks.square, queries=100),
    })  # fmt: skip
    plain = evaluate.era(*given, eps=0.12, steps=30, restarts=2)
    assert 0 < strong.accuracy <= plain.accuracy < plain.benign.mean()


# By certificate ------------------------------------------------------------------------------


@functools.cache
def certified(method, eps):
    params, images, labels, graph = case()
    given = (graph, params, images, labels)
    if method == "symbolic":
        return evaluate.vra_m(*given, eps=eps, batch_size=10)
    return evaluate.vra_t(*given, eps=eps, method=method, batch_size=10)


@pytest.mark.parametrize("method", [*METHODS, "symbolic"])
def test_no_attack_contradicts_a_certificate(method):
    for eps in (0.01, EPS):
        found = certified(method, eps)
        np.testing.assert_array_equal(found.benign, np.arange(24) >= 3)
        np.testing.assert_array_equal(found.right, found.benign & (found.margin > found.slack))
        assert not (found.right & ~attacked(eps).right).any()
        # The margin is one of the attacked images too.
        params, _, labels, _ = case()
        logits = np.asarray(jax.jit(small)(params, attacked(eps).images))
        own = logits[np.arange(24), labels]
        others = np.where(np.arange(4) == labels[:, None], -np.inf, logits).max(1)
        assert (found.margin <= own - others + found.slack).all()
    assert certified(method, 0.01).right.any()
    assert (certified(method, 0.01).margin > certified(method, EPS).margin).all()


def test_tighter_bounds_certify_more():
    by = {method: certified(method, 0.01) for method in [*METHODS, "symbolic"]}
    np.testing.assert_allclose(by["symbolic"].margin, by["fast-lin"].margin, atol=1e-4)
    assert by["crown"].margin.mean() > by["crown-ibp"].margin.mean() > by["ibp"].margin.mean()
    # Fewer than attacks leave.
    for found in by.values():
        assert found.accuracy <= attacked(0.01).accuracy


def test_linear_networks_are_certified_up_to_their_boundary():
    rng = np.random.default_rng(1)
    weights = rng.integers(-4, 5, (6, 3)).astype(np.float32)
    images = rng.integers(24, 41, (20, 6)).astype(np.float32) / 64
    labels = linear(weights, images).argmax(1)
    graph = nns.trace(linear, jnp.asarray(weights), images[:1])
    logits = linear(weights.astype(float), images.astype(float))
    own = logits[np.arange(20), labels][:, None]
    slope = np.abs(weights[:, labels, None] - weights[:, None]).sum(0)
    apart = np.where(np.arange(3) == labels[:, None], np.inf, own - logits)
    # Half of the images lie nearer to their boundary, half farther; still well inside 0..1.
    eps = np.round(64 * np.median((apart / np.maximum(slope, 1)).min(1))) / 64
    assert 0 < eps < 24 / 64
    worst = (apart - slope * eps).min(1)
    assert (worst > 0).any() and (worst < 0).any()
    for method in METHODS:
        found = evaluate.vra_t(graph, weights, images, labels, eps=eps, method=method)
        np.testing.assert_allclose(found.margin, worst, atol=1e-4)
        np.testing.assert_array_equal(found.right, worst > 0)
        assert (found.slack < 1e-3).all() and (found.slack > 0).all()


def test_values_that_cancel_inside_certify_nothing_wrongly():
    """Numbers of 10,000 inside cancel in the logits: rounding there outweighs the margins."""
    rng = np.random.default_rng(3)
    first = rng.normal(size=(20, 64)).astype(np.float32)
    second = rng.integers(-64, 65, (32, 4)).astype(np.float32) / 64
    second = np.concatenate([second, -second])

    def network(params, images):
        return nn.relu(images.reshape(len(images), -1) @ params["a"] + 1e4) @ params["b"]

    params = {"a": first, "b": second}
    images = rng.uniform(size=(400, *SHAPE)).astype(np.float32)
    exact = images.reshape(400, -1).astype(float) @ first.astype(float) + 1e4
    logits = exact @ second.astype(float)
    said = np.asarray(jax.jit(network)(params, images))
    labels = said.argmax(1)
    own = np.take_along_axis(logits, labels[:, None], 1)
    others = np.where(np.arange(4) == labels[:, None], -np.inf, logits)
    true = (own - others).min(1)
    graph = nns.trace(network, params, images[:1])
    found = evaluate.vra_t(graph, params, images, labels, eps=0.0)
    assert (found.margin - found.slack <= true).all()
    assert not (found.right & (true <= 0)).any()
    # Some units in the last place of the logits alone would not do.
    few = 64 * np.finfo(np.float32).eps * np.abs(logits).max(1)
    assert (found.margin - few > true).any()


def test_a_tie_is_not_certified():
    """Both logits meet at the very end of the box: rounding decides nothing here."""
    weights = np.array([[1.0, 0.0]], np.float32)
    graph = nns.trace(
        lambda w, x: x @ w + jnp.array([[0.0, 0.25]]), weights, np.ones((1, 1), np.float32)
    )
    run = functools.partial(
        evaluate.vra_t, graph, weights, np.array([[0.5]], np.float32), np.array([0])
    )
    assert not run(eps=0.25).right.any()
    assert run(eps=0.249).right.all()


def test_the_box_ends_at_the_bounds():
    """Within eps the network errs, but only for what is no image."""
    weights = np.array([[1.0, 0.0]], np.float32)
    graph = nns.trace(
        lambda w, x: x @ w - jnp.array([[0.0, 0.1]]), weights, np.ones((1, 1), np.float32)
    )
    images, labels = np.array([[0.3]], np.float32), np.array([0])
    found = evaluate.vra_t(graph, weights, images, labels, eps=0.5)
    assert found.right.all()
    wide = evaluate.vra_t(graph, weights, images, labels, eps=0.5, bounds=(-1, 1))
    assert not wide.right.any()
    np.testing.assert_allclose([found.margin[0], wide.margin[0]], [0.1, -0.1], atol=1e-6)


# Smoothing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("hits", "count"), [(1, 10), (7, 10), (10, 10), (9_990, 10_000)])
def test_shares_are_bounded_as_clopper_and_pearson_do(hits, count):
    found = evaluate.lower_share(hits, count, 0.001)
    # The share at which so many or more hits are as unlikely as alpha.
    assert scipy.stats.binom.sf(hits - 1, count, found) == pytest.approx(0.001, rel=1e-4)
    if hits == count:
        assert found == pytest.approx(0.001 ** (1 / count))


def test_no_hits_bound_nothing():
    assert evaluate.lower_share(0, 10, 0.001) == 0


@functools.cache
def smoothed():
    rng = np.random.default_rng(2)
    weights = rng.normal(size=(20, 2)).astype(np.float32)
    images = rng.uniform(size=(8, *SHAPE)).astype(np.float32)
    far = (linear(weights, images) @ [1, -1]) / np.linalg.norm(weights @ [1, -1])
    # As far from the boundary as 0.05, 0.1, ...
    normal = (weights @ [1, -1]).reshape(SHAPE) / np.linalg.norm(weights @ [1, -1])
    shift = 0.05 * np.arange(1, 9) - far
    images = (images + shift[:, None, None, None] * normal).astype(np.float32)
    labels = np.zeros(8, np.int32)
    found = evaluate.vra_s(
        KEY, linear, weights, images, labels, sigma=0.25, radius=0.2, samples=4000,
        bounds=(-9, 9), batch_size=1500,
    )  # fmt: skip
    return found, weights, images


def test_smoothing_certifies_up_to_the_boundary_of_a_linear_network():
    """Whose smoothed form is itself: the radius is known."""
    found, _, _ = smoothed()
    exact = 0.05 * np.arange(1, 9)
    assert (found.radius <= exact).all()
    # Of the nearest, 100 votes may guess the wrong class.
    assert (found.radius[1:] > exact[1:] - 0.05).all()
    np.testing.assert_array_equal(found.predicted[1:], 0)
    np.testing.assert_array_equal(found.right, found.radius >= 0.2)
    np.testing.assert_array_equal(found.certified(0.1).right, found.radius >= 0.1)
    assert found.certified(0.1).accuracy > found.accuracy > found.certified(0.4).accuracy


def test_the_wrong_class_is_not_certified():
    found, weights, images = smoothed()
    other = evaluate.vra_s(
        KEY, linear, weights, images, np.ones(8, int), sigma=0.25, radius=0.1, samples=4000,
        bounds=(-9, 9), batch_size=1500,
    )  # fmt: skip
    np.testing.assert_array_equal(other.predicted, found.predicted)
    np.testing.assert_array_equal(other.radius, found.radius)
    assert not other.right.any() and not other.certified(0.01).right.any()


def test_smoothing_abstains_at_the_boundary():
    _, weights, images = smoothed()
    image = images[:1] - 0.05 * (weights @ [1, -1]).reshape(1, *SHAPE) / np.linalg.norm(
        weights @ [1, -1]
    )
    found = evaluate.vra_s(
        KEY, linear, weights, np.float32(image), np.zeros(1, int), sigma=0.25, radius=0.01,
        samples=500, bounds=(-9, 9),
    )  # fmt: skip
    assert (found.predicted == -1).all() and (found.radius == 0).all()
    assert not found.right.any()


def test_noise_is_drawn_afresh_for_each_image_and_vote():
    """Votes of one image at the boundary, in batches that do not divide their number."""
    weights = np.array([[1.0, -1.0]], np.float32)
    image = jnp.zeros(1)
    counts = []
    for i in range(40):
        votes = evaluate._votes(jax.random.fold_in(KEY, i), linear, weights, image, 1.0, 101, 30)
        assert int(votes.sum()) == 101
        counts.append(int(votes[0]))
    # Of a binomial distribution: mean 50, standard deviation 5; were batches alike it would be 10.
    assert len(set(counts)) > 5
    assert abs(np.mean(counts) - 50) < 4
    assert 3 < np.std(counts) < 8


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("benign", {"batch_size": 0}, "^batch_size must be an integer of at least 1"),
        ("era", {"eps": 0.1, "restarts": 0}, "^restarts must be an integer of at least 1"),
        ("era", {"eps": -1}, "^eps must be"),
        ("autoattack", {"eps": 0.1, "attacks": {}}, "^attacks must name at least one attack"),
        ("autoattack", {"eps": 2}, "^eps must be"),
        ("vra_s", {"sigma": 0, "radius": 1}, "^sigma must be above 0"),
        ("vra_s", {"sigma": 1, "radius": np.nan}, "^radius must be above 0"),
        ("vra_s", {"sigma": 1, "radius": 1, "alpha": 1}, "^alpha must be above 0 and below 1"),
        ("vra_s", {"sigma": 1, "radius": 1, "samples": 0}, "^samples must be an integer"),
        ("vra_t", {"eps": 0.1, "method": "zonotope"}, "^method must be one of ibp, crown-ibp"),
        ("vra_m", {"eps": 5}, "^eps must be"),
    ],
)
def test_bad_options(function, options, message):
    params, images, labels, graph = case()
    network = (graph,) if function in ("vra_t", "vra_m") else (small,)
    key = () if function in ("benign", "vra_t", "vra_m") else (KEY,)
    with pytest.raises(ValueError, match=message):
        getattr(evaluate, function)(*key, *network, params, images, labels, **options)


def test_bad_images_labels_and_params():
    params, images, labels, graph = case()
    with pytest.raises(ValueError, match="^images must lie in 0..1"):
        evaluate.vra_t(graph, params, 255 * images, labels, eps=0.1)
    with pytest.raises(ValueError, match="^labels must be"):
        evaluate.benign(small, params, images, labels[:3])
    broken = {**params, "third": params["third"] * np.nan}
    with pytest.raises(ValueError, match="^key must be one of jax.random.key, not NoneType"):
        evaluate.vra_s(None, small, params, images, labels, sigma=0.1, radius=0.1)
    with pytest.raises(ValueError, match="^params must be finite; third"):
        evaluate.era(KEY, small, broken, images, labels, eps=0.1)
