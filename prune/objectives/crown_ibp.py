"""CROWN-IBP: cross-entropy of the worst case in a box, tight bounds giving way to interval bounds.

Zhang, Chen, Xiao, Gowal, Stanforth, Li, Boning, Hsieh, "Towards stable and efficient training of
verifiably robust neural networks", ICLR 2020, in the form of Sehwag, Wang, Mittal, Jana, "HYDRA",
2020: without the cross-entropy of the images themselves, boxes clipped to valid pixels.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from nnslicer_jax.linear_bounds import linear_bounds, margin_rows
from prune.objectives import losses
from prune.objectives.network import Aux, Batch, Network, Plan, require


class CrownIbpState(flax.struct.PyTreeNode):
    """Steps done, [] int32, and options."""

    step: jax.Array
    network: Network = flax.struct.field(pytree_node=False)
    eps: float = flax.struct.field(pytree_node=False)
    ramp_steps: int = flax.struct.field(pytree_node=False)


def init(network: Network, plan: Plan, *, eps: float = 2 / 255, ramp: float = 0.0) -> CrownIbpState:
    """The objective's first state.

    Args:
      network: What is trained.
      plan: Of the run.
      eps: Half the width of the box in the end, above 0 up to 1.
      ramp: Share of the run's steps over which it grows from 0, linearly; 0.6 to train from
        scratch, 0 to go on from a trained network, which then takes interval bounds alone.

    Raises:
      ValueError: For an option out of range, or a network with a single logit.
    """
    require("eps", 0 < eps <= 1, "above 0 and at most 1", eps)
    require("ramp", 0 <= ramp <= 1, "0 to 1", ramp)
    losses.check_classes(network)
    steps = round(ramp * plan.steps)
    return CrownIbpState(jnp.zeros((), jnp.int32), network, float(eps), steps)


def grown(state: CrownIbpState) -> jax.Array:
    """The share of its final width that the box has at this step, [] float32."""
    return jnp.minimum(1.0, state.step / state.ramp_steps if state.ramp_steps else 1.0)


def loss(
    state: CrownIbpState, variables: Any, batch: Batch, key: jax.Array
) -> tuple[jax.Array, Aux]:
    """`CE(-lower margins, y)` with `lower = b CROWN + (1 - b) IBP`, `b = 1 - eps now / eps`.

    Bounds are those of the network as it is used, with the statistics before this batch; the
    network in training sees the images for the statistics alone. "robust" is the share of the
    batch that these bounds certify.
    """
    images, labels = batch
    network, share = state.network, grown(state)
    logits, statistics = network.train(jax.lax.stop_gradient(variables), images, key)
    lower, upper = losses.box(images, state.eps * share)
    rows = margin_rows(labels, network.classes)

    def bounds(variables: Any, method: str) -> jax.Array:
        return linear_bounds(network.graph, variables, lower, upper, rows, method=method)

    margins = bounds(variables, "ibp")
    if state.ramp_steps:
        # Compiled as a branch, so that steps after the ramp cost no more than interval bounds.
        margins = jax.lax.cond(
            share < 1,
            lambda v, ibp: (1 - share) * bounds(v, "crown-ibp") + share * ibp,
            lambda v, ibp: ibp,
            variables,
            margins,
        )
    figures = {"benign": losses.accuracy(logits, labels), "robust": losses.certified(margins)}
    state = state.replace(step=state.step + 1)
    return losses.margin_cross_entropy(margins), (state, statistics, figures)
