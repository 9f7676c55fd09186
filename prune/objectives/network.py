"""What an objective is given: the network, in training and in use, and the plan of the run."""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import nnslicer_jax as nns
from nnslicer_jax import evaluation
from nnslicer_jax.graph import Graph

Batch = tuple[jax.Array, jax.Array]  # images [B, H, W, C] float32 in [0, 1], labels [B] int32
# The state that the next batch meets, the batch statistics, and [] float32 figures by name: the
# shares of the batch that come out right, "benign" as they are, "robust" perturbed or certified.
Aux = tuple[Any, dict[str, Any], dict[str, jax.Array]]


class Plan(NamedTuple):
    """How long a run is; what changes as it goes on needs to know.

    Attributes:
      batch_size: Images a step.
      epoch_steps: Steps an epoch.
      epochs: Passes over the images.
    """

    batch_size: int
    epoch_steps: int = 1
    epochs: int = 1

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.epoch_steps * self.epochs


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A Flax classifier for images of one shape. `Network.of` makes it, once for each.

    Attributes:
      model: Called as `model.apply(variables, x, train=True)` in training.
      image_shape: (H, W, C).
      graph: The model as it is used, traced.
    """

    model: nn.Module
    image_shape: tuple[int, ...]
    graph: Graph

    @staticmethod
    @functools.lru_cache(maxsize=32)
    def of(model: nn.Module, image_shape: tuple[int, ...]) -> "Network":
        """The network of a model for images of a shape (H, W, C)."""
        image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        return Network(
            model, image_shape, nns.trace(model.apply, _shapes(model, image_shape), image)
        )

    @property
    def classes(self) -> int:
        """How many logits there are."""
        return self.graph.values[self.graph.logits].shape[-1]

    def shapes(self) -> dict[str, Any]:
        """Shapes and dtypes of the variables."""
        return _shapes(self.model, self.image_shape)

    def initialize(self, key: jax.Array) -> dict[str, Any]:
        """Fresh variables."""
        return _fresh(self.model, self.image_shape, key)

    def predict(self, variables: Any, x: jax.Array) -> jax.Array:
        """Logits `[B, K]` of the network as it is used: with running statistics, no dropout."""
        return evaluation.logits(self.graph, variables, x)

    def train(self, variables: Any, x: jax.Array, key: jax.Array) -> tuple[jax.Array, Any]:
        """Logits `[B, K]` of the network in training, and all its variables but the parameters."""
        others = statistics(variables)
        logits, updated = self.model.apply(
            variables, x, train=True, rngs={"dropout": key}, mutable=list(others)
        )
        return logits, {**others, **updated}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fresh(model: nn.Module, image_shape: tuple[int, ...], key: jax.Array) -> dict[str, Any]:
    return dict(model.init(key, jnp.zeros((1, *image_shape))))


def _shapes(model: nn.Module, image_shape: tuple[int, ...]) -> dict[str, Any]:
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return dict(jax.eval_shape(model.init, jax.random.key(0), image))


def statistics(variables: Any) -> dict[str, Any]:
    """All of a network's variables but its parameters."""
    return {name: value for name, value in variables.items() if name != "params"}


def require_count(name: str, given: Any) -> None:
    """Raises ValueError unless what is given is a whole number of at least 1."""
    good = isinstance(given, int | np.integer) and int(given) >= 1
    require(name, good, "a whole number, at least 1", given)


def require(name: str, good: bool, accepted: str, given: Any) -> None:
    """Raises ValueError, saying what is accepted, unless what is given is good."""
    if not good:
        raise ValueError(f"{name} must be {accepted}, not {given!r}")
