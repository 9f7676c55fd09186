"""Every attack: what all have in common, then each against a closed form or a plain restatement."""

import functools
import inspect
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

import nnslicer_jax as nns
from nnslicer_jax import attacks, data
from nnslicer_jax.attacks import warping
from nnslicer_jax.attacks.adversarial import Case, Search, linf, run
from nnslicer_jax.attacks.local_search import _SEARCH as LOCAL_SEARCH

# Enough on small networks.
FEWER = {
    "CW L2": {"steps": 60, "searches": 6, "first_constant": 0.1},
    "Boundary": {"steps": 300},
    "LocalSearch": {"rounds": 20},
    "GaussianBlur": {"steps": 60},
    "PointWise": {"draws": 50},
    "JSMA": {"steps": 100},
    "ADef": {"steps": 20},
}
# One row of each attack.
NAMES = [name for name in attacks.ATTACKS if name not in ("FGSM 2", "FGSM 4", "RPGD 2", "RPGD 4")]
DRAWING = ["RPGD 8", "SinglePixel", "LocalSearch", "Boundary", "PointWise"]
KEY = jax.random.key(0)


class Countdown(NamedTuple):
    image: jax.Array
    going: jax.Array
    step: jax.Array


class Unhashable:
    __hash__ = None

    def __call__(self, weights, images):
        return linear(weights, images)


def linear(weights, images):
    return images.reshape(len(images), -1) @ weights


def attack(name, key, apply, params, images, labels, **options):
    return attacks.ATTACKS[name](
        key, apply, params, images, labels, **FEWER.get(name, {}), **options
    )


@functools.cache
def linear_case():
    """A network of one layer, images, and labels that are right but for the first three."""
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(12, 6, 6, 1)).astype(np.float32)
    weights = rng.normal(size=(36, 3)).astype(np.float32)
    labels = linear(weights, images).argmax(1)
    labels[:3] = (labels[:3] + 1) % 3
    return weights, images, labels


@functools.cache
def found(name):
    return jax.tree.map(np.asarray, attack(name, KEY, linear, *linear_case()))


def norms(name, difference):
    flat = np.abs(difference).reshape(len(difference), -1).astype(np.float64)
    if name.startswith(("FGSM", "RPGD")) or name.endswith("Linf"):
        return flat.max(1)
    return np.sqrt((flat**2).sum(1))


def test_the_table_has_the_papers_rows():
    assert len(attacks.ATTACKS) == 17
    assert set(attacks.ATTACKS) == set(attacks.FIXED_BUDGET) | set(attacks.CLOSEST)
    assert not set(attacks.FIXED_BUDGET) & set(attacks.CLOSEST)
    for function in attacks.ATTACKS.values():
        first = list(inspect.signature(function).parameters)[:5]
        assert first == ["key", "apply", "params", "images", "labels"]
        assert {"bounds", "batch_size"} <= set(inspect.signature(function).parameters)


# One test, as every worker that runs a test of an attack compiles it.
@pytest.mark.parametrize("name", NAMES)
def test_images_stay_images_and_success_and_distance_are_theirs(name):
    weights, images, labels = linear_case()
    result = found(name)
    assert result.images.shape == images.shape and result.images.dtype == images.dtype
    assert result.images.min() >= 0 and result.images.max() <= 1
    assert result.success.shape == (12,) and result.success.dtype == bool
    assert result.distance.shape == (12,) and result.distance.dtype == np.float32
    np.testing.assert_array_equal(
        result.success, linear(weights, result.images).argmax(1) != labels
    )
    assert result.success[:3].all()
    np.testing.assert_allclose(result.distance, norms(name, result.images - images), atol=1e-6)
    if name in attacks.CLOSEST:
        # The original where nothing was to do or was found.
        same = ~result.success
        same[:3] = True
        np.testing.assert_array_equal(result.images[same], images[same])
        np.testing.assert_array_equal(result.distance[same], 0)
        assert (result.distance[~same] > 0).all()
        # These are the attacks that a network of one layer may withstand.
        if name not in ("ADef", "GaussianBlur", "LocalSearch", "SinglePixel"):
            assert result.success.all()
    # One key gives one result in batches of any size.
    again = attack(name, KEY, linear, weights, images, labels, batch_size=5)
    np.testing.assert_array_equal(result.success, again.success)
    # Rounding depends on the batch, and a walk along the boundary on rounding.
    rtol, atol = (0.2, 0.02) if name in ("Boundary", "PointWise") else (1e-3, 1e-4)
    np.testing.assert_allclose(result.distance, again.distance, rtol=rtol, atol=atol)


def test_images_that_take_long_go_on_in_smaller_batches():
    # Every image takes as many steps as its label says.
    def start(key, case):
        return Countdown(case.image, case.label > 0, jnp.int32(0))

    def step(case, state):
        return Countdown(state.image + 0.001, state.step + 1 < case.label, state.step + 1)

    def apply(params, images):
        return jnp.zeros((len(images), 500)) + images[:, :1]

    rng = np.random.default_rng(0)
    labels = np.where(rng.random(40) < 0.2, rng.integers(400, 480, 40), rng.integers(0, 30, 40))
    images = rng.uniform(0, 0.25, (40, 2)).astype(np.float32)
    result = run(
        Search(start, step), None, apply, None, images, labels,
        draws=False, bounds=(0, 1), batch_size=16, norm=linf, closest=False,
    )  # fmt: skip
    np.testing.assert_allclose(result.distance, 0.001 * labels, atol=1e-4)


@pytest.mark.parametrize("name", DRAWING)
def test_a_key_is_all_that_a_result_depends_on(name):
    weights, images, labels = linear_case()
    again = attack(name, KEY, linear, weights, images, labels)
    np.testing.assert_array_equal(found(name).images, again.images)
    if name != "SinglePixel":  # It tries them all here.
        other = attack(name, jax.random.key(1), linear, weights, images, labels)
        assert (np.asarray(other.images) != again.images).any()


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_fooled_is_counted_as_such(name):
    _, images, _ = linear_case()
    labels = np.zeros(len(images), int)

    def firm(params, images):
        return params + 0 * images.reshape(len(images), -1)[:, :3]

    result = attack(name, KEY, firm, jnp.array([[1.0, 0.0, -1.0]]), images, labels)
    assert not result.success.any()
    assert np.isfinite(result.images).all() and np.isfinite(result.distance).all()
    if name in attacks.CLOSEST:
        np.testing.assert_array_equal(result.images, images)
        np.testing.assert_array_equal(result.distance, 0)


@pytest.mark.parametrize("name", ["FGSM 8", "DeepFool L2", "Spatial", "JSMA", "Boundary"])
def test_half_precision_and_other_bounds(name):
    weights, images, labels = linear_case()
    wide = (images * 4 - 2).astype(np.float16)
    labels = linear(weights, wide).argmax(1)
    result = attack(name, KEY, linear, weights, wide, labels, bounds=(-2, 2))
    assert result.images.dtype == np.float16
    assert result.images.min() >= -2 and result.images.max() <= 2
    wrong = linear(weights, np.asarray(result.images)).argmax(1) != labels
    np.testing.assert_array_equal(result.success, wrong)
    assert wrong.any() or name in ("FGSM 8", "Spatial")


BAD = [
    ({"images": np.full((2, 6, 6, 1), 127, np.float32)}, "images must lie in 0..1, given 127..127"),
    ({"images": np.zeros((2, 6, 6, 1), np.uint8)}, "images must be floats in 0..1, not uint8"),
    ({"labels": np.array([0, 3])}, "labels must be below 3, the model's number of classes"),
    ({"labels": np.array([0])}, "labels must be integers [2], one an image"),
    ({"batch_size": 0}, "batch_size must be an integer of at least 1, not 0"),
    ({"bounds": (1, 0)}, "bounds must be (low, high) with low < high, not (1, 0)"),
    ({"bounds": (0, np.inf)}, "bounds must be (low, high) with low < high, not (0, inf)"),
    ({"bounds": (1,)}, "bounds must be (low, high), two numbers, not (1,)"),
    ({"bounds": 1}, "bounds must be (low, high), two numbers, not 1"),
    ({"bounds": ("0", 1)}, "bounds must be (low, high) with low < high, not ('0', 1)"),
    ({"images": np.zeros((2, 5, 6, 1), np.float32)}, "apply must take images (2, 5, 6, 1) float32"),
    ({"apply": Unhashable()}, "apply must be hashable, as compiled programs are kept by it"),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("changed", "said"), BAD)
def test_bad_arguments_are_one_line(name, changed, said):
    given = {"images": np.zeros((2, 6, 6, 1), np.float32), "labels": np.array([0, 1])}
    given |= {"apply": linear} | changed
    with pytest.raises(ValueError) as caught:
        attacks.ATTACKS[name](KEY, params=np.ones((36, 3), np.float32), **given)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("RPGD 8", {"eps": 2}, "eps must be in 0..1, the width of bounds, not 2"),
        ("RPGD 8", {"steps": 0}, "steps must be an integer of at least 1, not 0"),
        ("RPGD 8", {"relative_step": 0.0}, "relative_step must be above 0, not 0.0"),
        ("RPGD 8", {"key": None}, "key must be one of jax.random.key, not NoneType"),
        ("RPGD 8", {"key": 3}, "key must be one of jax.random.key, not int"),
        ("DeepFool L2", {"norm": "l1"}, "norm must be 'l2' or 'linf', not 'l1'"),
        ("DeepFool L2", {"candidates": 1}, "candidates must be at least 2"),
        ("DeepFool L2", {"overshoot": -1}, "overshoot must be at least 0, not -1"),
        ("CW L2", {"confidence": -1.0}, "confidence must be at least 0, not -1.0"),
        ("CW L2", {"steps": 1.5}, "steps must be an integer of at least 1, not 1.5"),
        ("JSMA", {"theta": 2}, "theta must be above 0 and at most 1, not 2"),
        ("LocalSearch", {"factor": 3}, "factor must be in 0..2, not 3"),
        ("Boundary", {"adaptation": 1}, "adaptation must be above 1, not 1"),
        ("Spatial", {"max_rotation": -1}, "max_rotation must be at least 0, not -1"),
        ("GaussianBlur", {"max_sigma": 7}, "max_sigma must be at most 6, the images' side, not 7"),
        ("GaussianBlur", {"images": np.zeros((2, 36), np.float32)}, "[N, H, W, C], not (2, 36)"),
        ("ADef", {"smooth": 0}, "smooth must be above 0 and at most 6, not 0"),
        ("ADef", {"smooth": "1"}, "smooth must be a finite number, not '1'"),
        ("RPGD 8", {"eps": "8"}, "eps must be in 0..1, the width of bounds, not '8'"),
        ("RPGD 8", {"eps": None}, "eps must be in 0..1, the width of bounds, not None"),
        ("FGSM 8", {"eps": [0.1, 0.2]}, "eps must be in 0..1, the width of bounds, not [0.1, 0.2]"),
        ("RPGD 8", {"relative_step": np.inf}, "relative_step must be a finite number, not inf"),
        ("LocalSearch", {"probe": np.nan}, "probe must be a finite number, not nan"),
        ("LocalSearch", {"factor": None}, "factor must be a finite number, not None"),
        ("JSMA", {"theta": "1"}, "theta must be a finite number, not '1'"),
        ("DeepFool L2", {"overshoot": None}, "overshoot must be a finite number, not None"),
        ("DeepFool L2", {"norm": ["l2"]}, "norm must be 'l2' or 'linf', not ['l2']"),
        ("CW L2", {"confidence": np.inf}, "confidence must be a finite number, not inf"),
        ("Boundary", {"adaptation": np.nan}, "adaptation must be a finite number, not nan"),
        ("Boundary", {"converged": "0"}, "converged must be a finite number, not '0'"),
        ("Spatial", {"max_rotation": np.inf}, "max_rotation must be a finite number, not inf"),
        ("GaussianBlur", {"max_sigma": "3"}, "max_sigma must be a finite number, not '3'"),
        ("GaussianBlur", {"images": [[1.0], [1.0, 2.0]]}, "[N, H, W, C], all of one shape"),
        ("FGSM 8", {"images": [[1.0], [1.0, 2.0]]}, "images must be [N, ...], all of one shape"),
    ],
)
def test_bad_options_are_one_line(name, options, said):
    given = {"key": KEY, "images": np.zeros((2, 6, 6, 1), np.float32)} | options
    with pytest.raises(ValueError) as caught:
        attacks.ATTACKS[name](
            apply=linear, params=np.ones((36, 3), np.float32), labels=np.array([0, 1]), **given
        )
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["ADef", "GaussianBlur"])
def test_images_may_be_lists(name):
    weights, images, labels = linear_case()
    result = attack(name, KEY, linear, weights, images.tolist(), labels.tolist())
    np.testing.assert_array_equal(result.images, found(name).images)


def test_probabilities_are_warned_of_and_nan_is_an_error():
    weights, images, labels = linear_case()

    def softmax(weights, images):
        return jax.nn.softmax(linear(weights, images))

    with pytest.warns(UserWarning, match="apply seems to return probabilities"):
        attacks.fgsm(None, softmax, weights, images, labels, eps=0.1)
    with pytest.raises(ValueError, match="apply must return logits; it returns NaN"):
        attacks.fgsm(None, linear, weights * np.nan, images, labels, eps=0.1)


def half_space(count=8):
    """Two classes, images far from the bounds, and for each the distance to the other side."""
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(12, 2)).astype(np.float32)
    images = rng.uniform(0.4, 0.6, size=(count, 2, 6, 1)).astype(np.float32)
    scores = linear(weights, images)
    normal = weights[:, 1] - weights[:, 0]
    gap = np.abs(scores[:, 1] - scores[:, 0])
    return weights, images, scores.argmax(1), normal, gap


def test_deepfool_on_a_half_space_is_the_projection():
    weights, images, labels, normal, gap = half_space()
    for norm, distance in (("l2", gap / np.linalg.norm(normal)), ("linf", gap / abs(normal).sum())):
        result = attacks.deepfool(None, linear, weights, images, labels, norm=norm, overshoot=0.02)
        assert result.success.all()
        np.testing.assert_allclose(result.distance, 1.02 * (distance + 1e-4), rtol=1e-3)
    moved = (np.asarray(result.images) - images).reshape(8, -1)
    sign = np.where(labels == 0, 1, -1)[:, None] * np.sign(normal)
    np.testing.assert_allclose(moved, result.distance[:, None] * sign, atol=1e-6)


def test_carlini_wagner_on_a_half_space_comes_close_to_the_projection():
    weights, images, labels, normal, gap = half_space()
    result = attacks.carlini_wagner(
        None, linear, weights, images, labels, steps=300, searches=9, first_constant=0.1
    )
    distance = gap / np.linalg.norm(normal)
    assert result.success.all() and (result.distance >= 0.9999 * distance).all()
    np.testing.assert_allclose(result.distance, distance, rtol=0.02)
    sure = attacks.carlini_wagner(
        None, linear, weights, images, labels, steps=300, searches=9, first_constant=0.1,
        confidence=1.0,
    )  # fmt: skip
    scores = linear(weights, np.asarray(sure.images))
    lead = np.where(labels == 0, 1, -1) * (scores[:, 1] - scores[:, 0])
    assert (lead >= 1).all() and lead.max() < 1.1


def test_boundary_on_a_half_space_comes_close_to_the_projection():
    weights, images, labels, normal, gap = half_space()
    result = attacks.boundary(KEY, linear, weights, images, labels, steps=3000)
    distance = gap / np.linalg.norm(normal)
    assert result.success.all() and (result.distance >= 0.9999 * distance).all()
    np.testing.assert_allclose(result.distance, distance, rtol=0.1)


def test_rpgd_on_a_half_space_ends_in_the_corner():
    weights, images, labels, _, _ = half_space()
    once = attacks.fgsm(None, linear, weights, images, labels, eps=0.05)
    result = attacks.rpgd(KEY, linear, weights, images, labels, eps=0.05, steps=60)
    np.testing.assert_allclose(result.images, once.images, atol=1e-6)
    start = attacks.rpgd(KEY, linear, weights, images, labels, eps=0.05, steps=1, relative_step=0.1)
    assert 0.03 < np.abs(np.asarray(start.images) - images).mean() * 2 < 0.07


def test_single_pixel_is_the_best_of_all():
    weights, images, labels = linear_case()
    expected = np.full(12, np.inf)
    for pixel in range(36):
        for value in (0, 1):
            tried = images.reshape(12, 36).copy()
            distance = np.abs(tried[:, pixel] - value)
            tried[:, pixel] = value
            wrong = (tried @ weights).argmax(1) != labels
            expected = np.where(wrong, np.minimum(expected, distance), expected)
    result = found("SinglePixel")
    np.testing.assert_array_equal(result.success, np.isfinite(expected))
    new = np.isfinite(expected) & (np.arange(12) > 2)
    assert new.any()
    np.testing.assert_allclose(result.distance[new], expected[new], rtol=1e-5)
    assert ((result.images != images).sum((1, 2, 3)) <= 1).all()


def test_pointwise_leaves_nothing_to_undo():
    weights, images, labels = linear_case()
    result = found("PointWise")
    flat, clean = result.images.reshape(12, -1), images.reshape(12, -1)
    for index in range(3, 12):
        for place in np.flatnonzero(flat[index] != clean[index]):
            undone = flat[index].copy()
            undone[place] = clean[index, place]
            assert (undone @ weights).argmax() == labels[index]
    assert (flat != clean).sum(1)[3:].mean() < 18


def test_jsma_changes_the_most_salient_value_of_a_linear_network():
    weights, images, labels = linear_case()
    order = np.argsort(-linear(weights, images), axis=1)
    result = attacks.jsma(None, linear, weights, images, order[:, 0], theta=1.0, steps=1, changes=1)
    for index in np.flatnonzero(result.success):
        wanted = weights[:, order[index, 1]]
        others = weights.sum(1) - wanted
        room = np.where(wanted > 0, images[index].ravel() < 1, images[index].ravel() > 0)
        saliency = np.where((wanted * others < 0) & room, np.abs(wanted * others), 0)
        (changed,) = np.flatnonzero((result.images[index] != images[index]).ravel())
        assert changed == saliency.argmax()
    assert result.success.any()
    changed = found("JSMA").images != images
    assert 0 < changed[3:].sum((1, 2, 3)).min() and changed.sum((1, 2, 3)).max() <= 36


def local_search_rounds(key, weights, image, label, rounds, changed, reach):
    """Narodytska and Kasiviswanathan's rounds, pixel by pixel; yields each round's image."""
    height, width, _ = image.shape
    now, later = jax.random.split(key)
    pixels = height * width
    places = np.asarray(jax.random.permutation(now, pixels))[: pixels // 10]
    for _ in range(rounds):
        cost = {}
        for place in places:
            row, column = divmod(int(place), width)
            probed = image.copy()
            probed[row, column] = 0.5 + 10 * np.sign(image[row, column] - 0.5)
            logits = probed.reshape(-1) @ weights
            odds = np.exp(logits - logits[label])
            cost[row, column] = -np.log(odds.sum())
        image, worst = image.copy(), sorted(cost, key=cost.__getitem__)[:changed]
        for row, column in worst:
            for channel in range(image.shape[2]):
                value = 1.5 * (image[row, column, channel] - 0.5)
                if value > 0.5:
                    value -= 1
                if value < -0.5:
                    value += 1
                image[row, column, channel] = value + 0.5
        yield image
        draw, later = jax.random.split(later)
        order = np.asarray(jax.random.uniform(draw, (pixels,)))
        near = [
            place
            for place in range(pixels)
            if any(
                max(abs(place // width - row), abs(place % width - column)) <= reach
                for row, column in worst
            )
        ]
        places = sorted(near, key=lambda place: -order[place])


@pytest.mark.parametrize("channels", [1, 3])
def test_local_search_is_its_rounds_pixel_by_pixel(channels):
    # Sixteenths stay exact, and no value is the middle, whose sign is 0.
    rng = np.random.default_rng(0)
    images = (rng.integers(0, 8, (12, 5, 6, channels)) / 8 + 1 / 16).astype(np.float32)
    weights = (rng.integers(-64, 65, (30 * channels, 3)) / 256).astype(np.float32)
    labels = linear(weights, images).argmax(1)
    options = {"reach": 1, "changed": 9}
    for rounds in (1, 2, 3):
        result = attacks.local_search(
            KEY, linear, weights, images, labels, rounds=rounds, **options
        )
        for index in range(12):
            key = jax.random.fold_in(KEY, index)
            expected = images[index]
            made = local_search_rounds(
                key, weights, images[index], labels[index], rounds, **options
            )
            for image in made:
                if (image.reshape(-1) @ weights).argmax() != labels[index]:
                    expected = image
                    break
            np.testing.assert_array_equal(result.images[index], expected)
    assert result.success.any()


def test_local_search_changes_the_pixels_of_a_round_that_fools_nobody():
    # A network that no pixel fools: the state, as the result is the original.
    rng = np.random.default_rng(1)
    image = (rng.integers(0, 8, (5, 6, 1)) / 8 + 1 / 16).astype(np.float32)
    weights = rng.integers(-4, 5, (30, 3)).astype(np.float32)
    weights[:, 0] = 0

    def logits(pixels):
        return pixels.reshape(-1) @ weights + jnp.array([1000.0, 0, 0])

    case = Case(logits, jnp.asarray(image), jnp.int32(0), jnp.float32(0), jnp.float32(1))
    options = {"factor": 1.5, "probe": 10.0, "reach": 1, "changed": 2, "rounds": 9}
    state = LOCAL_SEARCH.start(KEY, case, **options)
    assert int(state.probes) == 3
    for step in range(3):
        state = LOCAL_SEARCH.step(case, state, **options)
        np.testing.assert_array_equal(state.image, image)
        assert int(state.probed) == step + 1 and bool(state.going)
    state = LOCAL_SEARCH.step(case, state, **options)
    (changed,) = np.nonzero((np.asarray(state.image) != image).reshape(-1))
    assert len(changed) == 2 and int(state.round) == 1
    near = {
        row * 6 + column
        for place in changed
        for row in range(max(place // 6 - 1, 0), min(place // 6 + 2, 5))
        for column in range(max(place % 6 - 1, 0), min(place % 6 + 2, 6))
    }
    assert set(np.asarray(state.places)[: int(state.probes)].tolist()) == near


@pytest.mark.parametrize("sigma", [0.05, 0.7, 2.3, 9.0])
def test_blur_is_scipys(sigma):
    image = np.random.default_rng(0).uniform(size=(9, 7))
    rows, columns = (np.asarray(warping.blur_matrix(size, sigma, 9.0)) for size in image.shape)
    expected = scipy.ndimage.gaussian_filter(image, sigma)
    np.testing.assert_allclose(rows @ image @ columns.T, expected, atol=1e-5)


def test_gaussian_blur_is_the_least_that_fools():
    weights, images, labels = linear_case()
    expected = np.zeros(12, int)
    for step in range(60, 0, -1):
        sigma = step / 60 * 6
        blurred = np.stack([scipy.ndimage.gaussian_filter(i, (sigma, sigma, 0)) for i in images])
        expected = np.where(linear(weights, blurred).argmax(1) != labels, step, expected)
    result = found("GaussianBlur")
    np.testing.assert_array_equal(result.success, expected > 0)
    for index in np.flatnonzero(expected[3:]) + 3:
        sigma = expected[index] / 10
        blurred = scipy.ndimage.gaussian_filter(images[index], (sigma, sigma, 0))
        np.testing.assert_allclose(result.images[index], blurred, atol=1e-5)
    assert (expected[3:] > 1).any()


@pytest.mark.parametrize("shape", [(6, 6, 1), (5, 8, 3)])
def test_moves_are_scipys(shape):
    image = np.random.default_rng(0).uniform(size=shape).astype(np.float32)
    angle, down, right = np.deg2rad(25), 1.5, -0.75
    moved = warping.rotated(jnp.asarray(image), angle, down, right, jnp.float32(0))
    middle = (np.array(shape[:2]) - 1) / 2
    back = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    offset = middle - back @ (middle + np.array([down, right]))
    for channel in range(shape[2]):
        expected = scipy.ndimage.affine_transform(
            image[..., channel], back, offset, order=1, mode="grid-constant"
        )
        np.testing.assert_allclose(moved[..., channel], expected, atol=1e-5)


def test_spatial_is_the_worst_of_the_grid():
    weights, images, labels = linear_case()
    still = attacks.spatial(
        None, linear, weights, images, labels, max_rotation=0, max_translation=1, rotations=1,
        translations=3,
    )  # fmt: skip
    worst, which = np.full(12, -np.inf), np.zeros_like(images)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            moved = scipy.ndimage.shift(images, (0, down, right, 0), order=1, cval=0)
            scores = linear(weights, moved)
            true = scores[np.arange(12), labels]
            scores[np.arange(12), labels] = -np.inf
            lead = scores.max(1) - true
            which[lead > worst] = moved[lead > worst]
            worst = np.maximum(worst, lead)
    np.testing.assert_allclose(still.images, which, atol=1e-6)
    np.testing.assert_array_equal(still.success, worst > 0)


@pytest.fixture(scope="module")
def digits():
    digits = data.load("digits")
    model, variables, _ = nns.zoo.load("digits_cnn")
    images, labels = data.to_float(digits.test_images), digits.test_labels
    right = np.asarray(jax.jit(model.apply)(variables, images)).argmax(1) == labels
    return model.apply, variables, images[right][:32], labels[right][:32]


def test_adef_deforms_and_does_not_paint(digits):
    apply, params, images, labels = digits
    result = attacks.adef(None, apply, params, images, labels, steps=50)
    assert result.success.mean() > 0.9
    moved = np.asarray(result.images)
    assert (moved.max((1, 2, 3)) <= images.max((1, 2, 3)) + 1e-6).all()
    assert (moved.min((1, 2, 3)) >= images.min((1, 2, 3)) - 1e-6).all()
    # Small shifts: far less than to move the digits away.
    assert result.distance.max() < 0.8 * np.sqrt(np.square(images).sum((1, 2, 3))).min()


def test_adef_is_its_step_with_scipys_filters():
    rng = np.random.default_rng(2)
    images = rng.uniform(size=(8, 6, 7, 2)).astype(np.float32)
    weights = rng.normal(size=(84, 4)).astype(np.float32)
    labels = linear(weights, images).argmax(1)
    result = attacks.adef(None, linear, weights, images, labels, steps=1, smooth=0.8)
    rows, columns = np.meshgrid(np.arange(6.0), np.arange(7.0), indexing="ij")

    def blurred(fields):
        return np.stack([scipy.ndimage.gaussian_filter(field, 0.8) for field in fields])

    def deformed(image, field):
        places = np.clip(rows + field[0], 0, 5), np.clip(columns + field[1], 0, 6)
        channels = np.moveaxis(image, -1, 0)
        return np.stack([scipy.ndimage.map_coordinates(c, places, order=1) for c in channels], -1)

    farther = 0
    for image, label, moved, success in zip(
        images.astype(np.float64), labels, result.images, result.success, strict=True
    ):
        scores = image.reshape(-1) @ weights
        slope = np.stack(np.gradient(image, axis=(0, 1)))
        fields = []
        for other in set(range(4)) - {label}:
            gradient = (weights[:, other] - weights[:, label]).reshape(image.shape)
            reaction = blurred((gradient * slope).sum(-1))
            gap = scores[label] - scores[other]
            fields.append(gap / (reaction**2).sum() * blurred(reaction))
        field = min(fields, key=lambda field: (field**2).sum())
        expected = deformed(image, field)
        if (expected.reshape(-1) @ weights).argmax() == label:
            expected = deformed(image, 1.2 * field)
            farther += 1
        fooled = (expected.reshape(-1) @ weights).argmax() != label
        assert success == fooled
        np.testing.assert_allclose(moved, expected if fooled else image, atol=1e-4)
    assert result.success.any() and 0 < farther < 8


@pytest.mark.parametrize("name", ["RPGD 8", "CW L2", "LocalSearch", "Boundary", "PointWise"])
def test_a_second_call_compiles_nothing_anew(name):
    weights, images, labels = linear_case()
    traced = []

    def counted(weights, images):
        traced.append(images.shape)
        return linear(weights, images)

    attack(name, KEY, counted, weights, images, labels, batch_size=4)
    once = len(traced)
    # Shapes, logits, the start and a step, which runs the network twice in some attacks.
    assert once <= 5
    attack(name, jax.random.key(1), counted, weights * 2, images, labels, batch_size=4)
    assert len(traced) == once


def test_no_warning_is_given_for_logits():
    weights, images, labels = linear_case()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attacks.fgsm(None, linear, weights, images, labels, eps=0.1)
    assert float(linf(jnp.array([0.5, -2.0]))) == 2
