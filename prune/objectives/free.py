"""Free adversarial training: every pass back moves the weights and the perturbation.

Shafahi, Najibi, Ghiasi, Xu, Dickerson, Studer, Davis, Taylor, Goldstein, "Adversarial training for
free!", NeurIPS 2019, Algorithm 1. Each batch is met `replays` times in a row, so a run of as many
steps makes so many times fewer passes over the images.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from prune.objectives import losses
from prune.objectives.network import Aux, Batch, Network, Plan, require, require_count


class FreeState(flax.struct.PyTreeNode):
    """The perturbation `[batch size, H, W, C]`, which the next batch starts from."""

    perturbation: jax.Array
    network: Network = flax.struct.field(pytree_node=False)
    eps: float = flax.struct.field(pytree_node=False)
    step_size: float = flax.struct.field(pytree_node=False)
    replays: int = flax.struct.field(pytree_node=False)


def init(
    network: Network,
    plan: Plan,
    *,
    eps: float = 4 / 255,
    step_size: float | None = None,
    replays: int = 4,
) -> FreeState:
    """The objective's first state: no perturbation.

    Args:
      network: What is trained.
      plan: Of the run.
      eps: Largest change of a pixel, above 0 up to 1.
      step_size: Change of the perturbation by a step, above 0 up to 1; None: eps.
      replays: Steps in a row on one batch, at least 1.

    Raises:
      ValueError: For an option out of range.
    """
    require("eps", 0 < eps <= 1, "above 0 and at most 1", eps)
    step_size = eps if step_size is None else step_size
    require("step_size", 0 < step_size <= 1, "above 0 and at most 1", step_size)
    require_count("replays", replays)
    still = jnp.zeros((plan.batch_size, *network.image_shape))
    return FreeState(still, network, float(eps), float(step_size), int(replays))


def loss(state: FreeState, variables: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Aux]:
    """`CE(f(x + perturbation), y)`, and the perturbation one step up its slope."""
    images, labels = batch
    if len(images) > len(state.perturbation):
        raise ValueError(
            f"batch must be of at most {len(state.perturbation)} images, not {len(images)}"
        )

    def trained(variables: Any, shift: jax.Array) -> tuple[jax.Array, Any]:
        return state.network.train(variables, jnp.clip(images + shift, 0.0, 1.0), key)

    still = jax.lax.stop_gradient(variables)
    shift = state.perturbation[: len(images)]
    slope = jax.grad(lambda s: losses.cross_entropy(trained(still, s)[0], labels))(shift)
    logits, statistics = trained(variables, shift)
    moved = jnp.clip(shift + state.step_size * jnp.sign(slope), -state.eps, state.eps)
    state = state.replace(perturbation=state.perturbation.at[: len(images)].set(moved))
    figures = {"robust": losses.accuracy(logits, labels)}
    return losses.cross_entropy(logits, labels), (state, statistics, figures)
