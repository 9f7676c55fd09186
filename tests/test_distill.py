"""Knowledge distillation: its loss, and a student that follows its teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnslicer_jax import data, models, training, zoo
from prune import distill


def linear(variables, images):
    return images.reshape(len(images), -1) @ variables


def test_the_loss_is_the_papers():
    rng = np.random.default_rng(0)
    images, kernel = rng.uniform(size=(5, 2, 2, 1)), rng.normal(size=(4, 3))
    logits, targets = rng.normal(size=(5, 3)), np.eye(3)[[0, 2, 1, 1, 0]]

    def softmax(x):
        return np.exp(x) / np.exp(x).sum(1, keepdims=True)

    taught = images.reshape(5, -1) @ kernel
    for temperature, alpha in ((4.0, 0.9), (1.0, 1.0), (2.0, 0.0)):
        loss = distill.Distillation(linear, jnp.asarray(kernel, jnp.float32), temperature, alpha)
        p, q = softmax(taught / temperature), softmax(logits / temperature)
        soft = (p * np.log(p / q)).sum(1).mean()
        hard = -(targets * np.log(softmax(logits))).sum(1).mean()
        wanted = alpha * temperature**2 * soft + (1 - alpha) * hard
        found = loss(*(jnp.asarray(x, jnp.float32) for x in (logits, targets, images)))
        assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_the_teacher_gets_no_gradient_and_bad_numbers_are_named():
    kernel, images = jnp.ones((4, 3)), jnp.ones((1, 2, 2, 1))

    def of(kernel):
        return distill.Distillation(linear, kernel)(jnp.ones((1, 3)), jnp.eye(3)[:1], images)

    assert not jax.grad(of)(kernel).any()
    with pytest.raises(ValueError, match="temperature: expected a number above 0, got 0"):
        distill.Distillation(linear, kernel, 0)
    with pytest.raises(ValueError, match="alpha: expected a number from 0 to 1, got 2"):
        distill.Distillation(linear, kernel, 4.0, 2)


def test_a_student_follows_its_teacher_against_the_labels(tmp_path):
    digits, teacher = data.load("digits"), zoo.load("digits_cnn")
    few = digits.train_images[:512]
    wrong = (digits.train_labels[:512] + 1) % 10
    small = digits._replace(train_images=few, train_labels=wrong)
    student = models.create("mlp")
    options = training.TrainingOptions(epochs=15, batch_size=32, learning_rate=0.02, seed=1)
    variables = distill.distill(
        student, small, teacher.model, teacher.variables, options, alpha=1.0,
        checkpoint_dir=tmp_path,
    )  # fmt: skip
    # Only the teacher knows the right labels.
    right = training.count_correct(student, variables, digits.test_images, digits.test_labels)
    assert right / len(digits.test_labels) > 0.8
    with pytest.raises(ValueError, match="loss was .distillation, temperature 4.0, alpha 1.0"):
        distill.distill(
            student, small, teacher.model, teacher.variables, options, alpha=0.5,
            checkpoint_dir=tmp_path,
        )  # fmt: skip
