"""TRADES: natural accuracy traded against a boundary far from the images.

Zhang, Yu, Jiao, Xing, El Ghaoui, Jordan, "Theoretically principled trade-off between robustness and
accuracy", ICML 2019, equation 5, with the settings of Sehwag, Wang, Mittal, Jana, "HYDRA", 2020.
"""

from typing import Any

import flax.struct
import jax

from prune.objectives import losses
from prune.objectives.ascent import ascend
from prune.objectives.network import Aux, Batch, Network, Plan, require, require_count


class TradesState(flax.struct.PyTreeNode):
    """Nothing but options."""

    network: Network = flax.struct.field(pytree_node=False)
    eps: float = flax.struct.field(pytree_node=False)
    step_size: float = flax.struct.field(pytree_node=False)
    steps: int = flax.struct.field(pytree_node=False)
    weight: float = flax.struct.field(pytree_node=False)
    start: float = flax.struct.field(pytree_node=False)


def init(
    network: Network,
    plan: Plan,
    *,
    eps: float = 8 / 255,
    step_size: float = 2 / 255,
    steps: int = 10,
    weight: float = 6.0,
    start: float = 0.001,
) -> TradesState:
    """The objective's first state.

    Args:
      network: What is trained.
      plan: Of the run.
      eps: Largest change of a pixel, 0 to 1.
      step_size: Of the attack, above 0 up to 1.
      steps: Of the attack, at least 1.
      weight: Of the divergence, 0 or more.
      start: Standard deviation of the noise that the attack starts from, above 0: at the image
        itself the divergence has no slope.

    Raises:
      ValueError: For an option out of range.
    """
    del plan
    require("eps", 0 <= eps <= 1, "0 to 1", eps)
    require("step_size", 0 < step_size <= 1, "above 0 and at most 1", step_size)
    require_count("steps", steps)
    require("weight", 0 <= weight < float("inf"), "0 or more", weight)
    require("start", 0 < start < float("inf"), "above 0", start)
    return TradesState(
        network, float(eps), float(step_size), int(steps), float(weight), float(start)
    )


def loss(state: TradesState, variables: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Aux]:
    """`CE(f(x), y) + weight * KL(softmax f(x) || softmax f(x_adv))`.

    The attack climbs the divergence of the network as it is used (running statistics). The loss is
    of the network in training, which sees the images, then the adversarial ones, each as a batch of
    its own whose statistics count.
    """
    images, labels = batch
    start_key, clean_key, moved_key = jax.random.split(key, 3)
    network, still = state.network, jax.lax.stop_gradient(variables)
    settled = network.predict(still, images)

    def climbed(x: jax.Array) -> jax.Array:
        return losses.divergence(settled, network.predict(still, x))

    start = images + state.start * jax.random.normal(start_key, images.shape)
    moved = ascend(
        climbed, start, images, eps=state.eps, step_size=state.step_size, steps=state.steps
    )
    logits, statistics = network.train(variables, images, clean_key)
    others, statistics = network.train({**variables, **statistics}, moved, moved_key)
    value = losses.cross_entropy(logits, labels) + state.weight * losses.divergence(logits, others)
    figures = {
        "benign": losses.accuracy(logits, labels),
        "robust": losses.accuracy(others, labels),
    }
    return value, (state, statistics, figures)
