"""Knowledge distillation: a small network learns what a larger one answers.

Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015, section 2.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import optax

from nnslicer_jax import training
from nnslicer_jax.checkpoint import digest
from nnslicer_jax.data import Dataset


@dataclasses.dataclass(frozen=True, eq=False)
class Distillation:
    """The loss: alpha T^2 KL(teacher, student) of softened answers, and the rest cross-entropy.

    Attributes:
      apply: The teacher, from variables and images `[B, H, W, C]` in 0..1 to logits `[B, K]`.
      variables: The teacher's.
      temperature: T, above 0, that both networks' logits are divided by.
      alpha: Share of the teacher's answers, 0..1.
    """

    apply: Callable[[Any, jax.Array], jax.Array]
    variables: Any
    temperature: float = 4.0
    alpha: float = 0.9

    def __post_init__(self) -> None:
        """Checks the two numbers."""
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature: expected a number above 0, got {self.temperature!r}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: expected a number from 0 to 1, got {self.alpha!r}")

    def __call__(self, logits: jax.Array, targets: jax.Array, images: jax.Array) -> jax.Array:
        """Of the student's logits `[B, K]`, targets `[B, K]` and images: a scalar."""
        taught = jax.lax.stop_gradient(self.apply(self.variables, images))
        soft = optax.kl_divergence(
            jax.nn.log_softmax(logits / self.temperature), jax.nn.softmax(taught / self.temperature)
        )
        hard = optax.softmax_cross_entropy(logits, targets)
        # T^2: gradients of the soft part shrink by as much.
        return (self.alpha * self.temperature**2 * soft + (1 - self.alpha) * hard).mean()

    def __str__(self) -> str:
        """What tells one run from another."""
        return (
            f"distillation, temperature {self.temperature}, alpha {self.alpha}, teacher "
            f"{digest(self.variables)}"
        )


def distill(
    student: nn.Module,
    dataset: Dataset,
    teacher: nn.Module,
    variables: Any,
    options: training.TrainingOptions,
    *,
    temperature: float = 4.0,
    alpha: float = 0.9,
    **running: Any,
) -> Any:
    """Trains the student from its first weights.

    Args:
      student: As `training.train` takes a model.
      dataset: Its training images and labels are used.
      teacher: As the student, with as many classes.
      variables: The teacher's.
      options: See `training.TrainingOptions`.
      temperature: As for `Distillation`.
      alpha: As for `Distillation`.
      **running: What else `training.train` takes, as checkpoint_dir.

    Returns:
      The student's variables.

    Raises:
      ValueError: For an argument that is not accepted, or a folder of another run.
      FloatingPointError: Loss or weights stopped being finite.
    """
    loss = Distillation(teacher.apply, variables, temperature, alpha)  # type: ignore[arg-type]
    return training.train(student, dataset, options, loss=loss, **running)
