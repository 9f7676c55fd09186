"""FGSM: the step, its limits, and what it makes of bad arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnslicer_jax as nns
from nnslicer_jax import attacks, data


def linear(weights, images):
    return images.reshape(len(images), -1) @ weights


@pytest.fixture(scope="module")
def linear_case():
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(20, 3, 4, 1)).astype(np.float32)
    return rng.normal(size=(12, 5)).astype(np.float32), images, rng.integers(5, size=20)


@pytest.fixture(scope="module")
def digits():
    found = data.load("digits")
    model, variables, _ = nns.zoo.load("digits_cnn")
    return model.apply, variables, data.to_float(found.test_images), found.test_labels


def losses(apply, params, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, images), labels)


def test_step_of_a_linear_network_is_the_formula(linear_case):
    weights, images, labels = linear_case
    flat = images.reshape(20, -1).astype(np.float64)
    scores = np.exp(flat @ weights)
    # Goodfellow et al., section 4: x + eps * sign(grad of the cross-entropy).
    gradient = (scores / scores.sum(1, keepdims=True) - np.eye(5)[labels]) @ weights.T
    expected = np.clip(flat + 0.25 * np.sign(gradient), 0, 1).reshape(images.shape)
    found = attacks.fgsm(None, linear, weights, images, labels, eps=0.25)
    np.testing.assert_allclose(found.images, expected, atol=1e-6)
    np.testing.assert_allclose(found.distance, np.abs(expected - images).max((1, 2, 3)), atol=1e-6)


def test_loss_of_a_linear_network_grows_on_every_image(linear_case):
    weights, images, labels = linear_case
    found = attacks.fgsm(None, linear, weights, images, labels, eps=0.1)
    before = losses(linear, weights, images, labels)
    assert (losses(linear, weights, found.images, labels) > before).all()


def test_direction_is_that_of_the_cross_entropy(digits):
    apply, params, images, labels = digits
    gradient = jax.grad(lambda x: losses(apply, params, x, labels).sum())(jnp.asarray(images))
    inner = (images > 0.1) & (images < 0.9) & (np.abs(gradient) > 1e-5)
    assert inner.sum() > 1000
    found = attacks.fgsm(None, apply, params, images, labels, eps=0.1)
    assert (np.sign(found.images - images)[inner] == np.sign(gradient)[inner]).all()


@pytest.mark.parametrize("eps", [0.02, 0.1, 1.0])
def test_images_stay_within_eps_and_bounds(digits, eps):
    apply, params, images, labels = digits
    found = attacks.fgsm(None, apply, params, images, labels, eps=eps)
    assert found.images.shape == images.shape and found.images.dtype == images.dtype
    assert found.images.min() >= 0 and found.images.max() <= 1
    moved = np.abs(np.asarray(found.images) - images).max((1, 2, 3))
    assert moved.max() <= eps + 1e-6 and moved.min() > 0
    np.testing.assert_array_equal(found.distance, moved)


def test_success_is_what_the_network_says_of_the_images_returned(digits):
    apply, params, images, labels = digits
    found = attacks.fgsm(None, apply, params, images, labels, eps=0.1)
    wrong = np.asarray(apply(params, found.images).argmax(1) != labels)
    np.testing.assert_array_equal(found.success, wrong)
    before = np.asarray(apply(params, images).argmax(1) != labels)
    assert before.sum() < wrong.sum() < len(labels)
    assert losses(apply, params, found.images, labels).mean() > (
        losses(apply, params, images, labels).mean()
    )


def test_eps_of_0_moves_nothing(digits):
    apply, params, images, labels = digits
    found = attacks.fgsm(None, apply, params, images, labels, eps=0)
    np.testing.assert_array_equal(found.images, images)
    np.testing.assert_array_equal(found.distance, 0)
    np.testing.assert_array_equal(found.success, apply(params, images).argmax(1) != labels)


def test_a_network_sure_of_itself_is_attacked_all_the_same(linear_case):
    weights, images, _ = linear_case
    labels = linear(weights, images).argmax(1)
    sure = weights * 1e4
    # The cross-entropy itself is flat here: it rounds to 0.
    flat = jax.grad(lambda x: losses(linear, sure, x, labels).sum())(jnp.asarray(images))
    assert (np.asarray(flat) == 0).all((1, 2, 3)).any()
    found = attacks.fgsm(None, linear, sure, images, labels, eps=0.1)
    assert (np.asarray(found.distance) > 0).all()
    true = np.take_along_axis(linear(weights, images), labels[:, None], 1)
    lower = np.take_along_axis(linear(weights, np.asarray(found.images)), labels[:, None], 1)
    assert (lower < true).mean() > 0.5


def test_other_bounds(linear_case):
    weights, images, labels = linear_case
    found = attacks.fgsm(None, linear, weights, images * 4 - 2, labels, eps=3, bounds=(-2, 2))
    assert found.images.min() == -2 and found.images.max() == 2
    assert found.distance.max() > 1


IMAGES, LABELS = np.full((2, 3, 4, 1), 0.5, np.float32), np.array([0, 1])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"images": IMAGES * 255}, "images must lie in 0..1, given 127.5..127.5"),
        ({"images": IMAGES - 1}, "images must lie in 0..1, given -0.5..-0.5"),
        ({"images": (IMAGES * 255).astype(np.uint8)}, "images must be floats in 0..1, not uint8"),
        ({"images": IMAGES * np.nan}, "images must be finite; some are NaN or infinite"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "N of at least 1, not (0, 3, 4, 1)"),
        ({"labels": np.array([0, 5])}, "labels must be below 5, the model's number of classes"),
        ({"labels": np.array([-1, 0])}, "given -1..0"),
        ({"labels": LABELS[:1]}, "labels must be integers [2], one an image"),
        ({"labels": LABELS * 0.5}, "labels must be integers [2], one an image, not float64"),
        ({"eps": -0.1}, "eps must be in 0..1, the width of bounds, not -0.1"),
        ({"eps": 8}, "eps must be in 0..1, the width of bounds, not 8"),
        ({"eps": float("nan")}, "eps must be in 0..1, the width of bounds, not nan"),
        ({"bounds": (1, 0)}, "bounds must be (low, high) with low < high, not (1, 0)"),
        ({"apply": lambda p, x: x}, "logits [N, K] of 2 classes or more, not (2, 3, 4, 1)"),
        ({"apply": lambda p, x: x[:, 0, 0]}, "of 2 classes or more, not (2, 1)"),
        (
            {"apply": lambda p, x: {"y": x}},
            "apply must return logits [N, K] of 2 classes or more, not dict",
        ),
    ],
)
def test_bad_arguments_are_one_line(changed, said):
    arguments = {
        "apply": linear,
        "params": np.ones((12, 5), np.float32),
        "images": IMAGES,
        "labels": LABELS,
        "eps": 0.1,
    }
    with pytest.raises(ValueError) as caught:
        attacks.fgsm(None, **(arguments | changed))
    assert said in str(caught.value) and "\n" not in str(caught.value)
