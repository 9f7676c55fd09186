"""Adversarial training by projected gradient descent (Madry et al., ICLR 2018).

The attack meets the network as it is used, the loss as it is trained, as in TRADES.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from prune.objectives import losses
from prune.objectives.ascent import ascend
from prune.objectives.network import Aux, Batch, Network, Plan, require, require_count


class PgdState(flax.struct.PyTreeNode):
    """Nothing but options."""

    network: Network = flax.struct.field(pytree_node=False)
    eps: float = flax.struct.field(pytree_node=False)
    step_size: float = flax.struct.field(pytree_node=False)
    steps: int = flax.struct.field(pytree_node=False)


def init(
    network: Network,
    plan: Plan,
    *,
    eps: float = 8 / 255,
    step_size: float = 2 / 255,
    steps: int = 10,
) -> PgdState:
    """The objective's first state.

    Args:
      network: What is trained.
      plan: Of the run.
      eps: Largest change of a pixel, 0 to 1.
      step_size: Of the attack, above 0 up to 1.
      steps: Of the attack, at least 1.

    Raises:
      ValueError: For an option out of range.
    """
    del plan
    require("eps", 0 <= eps <= 1, "0 to 1", eps)
    require("step_size", 0 < step_size <= 1, "above 0 and at most 1", step_size)
    require_count("steps", steps)
    return PgdState(network, float(eps), float(step_size), int(steps))


def loss(state: PgdState, variables: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Aux]:
    """`CE(f(x_adv), y)` with x_adv from a start drawn evenly from the ball."""
    images, labels = batch
    start_key, dropout_key = jax.random.split(key)
    still = jax.lax.stop_gradient(variables)

    def climbed(x: jax.Array) -> jax.Array:
        return losses.cross_entropy(state.network.predict(still, x), labels)

    shift = jax.random.uniform(start_key, images.shape, minval=-state.eps, maxval=state.eps)
    moved = ascend(
        climbed, jnp.clip(images + shift, 0.0, 1.0), images,
        eps=state.eps, step_size=state.step_size, steps=state.steps,
    )  # fmt: skip
    logits, statistics = state.network.train(variables, moved, dropout_key)
    figures = {"robust": losses.accuracy(logits, labels)}
    return losses.cross_entropy(logits, labels), (state, statistics, figures)
