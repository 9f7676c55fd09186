"""Pairs of models: what is asked, and what a bad answer is called."""

import jax.numpy as jnp
import numpy as np
import pytest

import difftest

IMAGES = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4, 1)


def _good(images):
    return np.full((len(images), 2), 0.5)


def _linear(params, x):
    return x.reshape(len(x), -1) @ params


def test_jax_model_ends_in_a_softmax():
    weights = jnp.ones((16, 3)) * jnp.array([[0.0, 1.0, 2.0]])
    out = difftest.jax_model(_linear, weights)(IMAGES)
    logits = (IMAGES.reshape(3, 16) / 255).sum(1)[:, None] * np.array([[0, 1, 2]])
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(out, expected, rtol=1e-5)


def test_a_preprocessing_replaces_the_division():
    model = difftest.jax_model(
        _linear, jnp.eye(16)[:, :2], lambda x: x / 100, outputs="probabilities"
    )
    np.testing.assert_allclose(model(IMAGES), IMAGES.reshape(3, 16)[:, :2] / 100, rtol=1e-6)


def test_on_the_device_if_both_are_jax():
    model = difftest.jax_model(_linear, jnp.zeros((16, 2)))
    assert difftest.ModelPair(model, model).on_device
    assert not difftest.ModelPair(model, _good).on_device


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda x: np.full((len(x), 3), 1 / 3), "knows 2 classes, the compressed one 3"),
        (lambda x: np.full(len(x), 0.5), r"gave the shape \(3,\) for 3 images"),
        (lambda x: np.full((len(x), 2), np.nan), "gave NaN"),
        (lambda x: np.full((len(x), 2), 7.0), "no probabilities"),
        (lambda x: 1 / 0, "the compressed model failed: division by zero"),
    ],
)
def test_bad_answers_have_one_line(bad, message):
    with pytest.raises(difftest.ModelError, match=message) as error:
        difftest.ModelPair(_good, bad).probabilities(IMAGES)
    assert "\n" not in str(error.value)


def test_unknown_outputs():
    with pytest.raises(ValueError, match="outputs is 'softmax'; accepted are logits, prob"):
        difftest.jax_model(_linear, None, outputs="softmax")
