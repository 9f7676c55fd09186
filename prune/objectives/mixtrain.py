"""MixTrain: cross-entropy of the images, and on most batches of the worst in a box about a few.

Wang, Chen, Abdou, Jana, "MixTrain: scalable training of verifiably robust neural networks", 2018,
with the settings of Sehwag, Wang, Mittal, Jana, "HYDRA", 2020. The worst case is that of symbolic
intervals, with the margins taken before any error is bounded. Parallel lines walked back from the
margins (``fast-lin``) give the same numbers on networks of ReLU, in less time: errors are not
carried through the wide first layers.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from nnslicer_jax.linear_bounds import linear_bounds, margin_rows
from prune.objectives import losses
from prune.objectives.network import Aux, Batch, Network, Plan, require, require_count

# The weight grows by a factor every few epochs once the ramp is over, up to a limit.
_FIRST, _FACTOR, _MOST = 0.1, 2.5, 50.0


class MixTrainState(flax.struct.PyTreeNode):
    """Steps done, [] int32, and options."""

    step: jax.Array
    network: Network = flax.struct.field(pytree_node=False)
    plan: Plan = flax.struct.field(pytree_node=False)
    eps: float = flax.struct.field(pytree_node=False)
    ramp_epochs: int = flax.struct.field(pytree_node=False)
    samples: int = flax.struct.field(pytree_node=False)
    probability: float = flax.struct.field(pytree_node=False)
    weight: float | None = flax.struct.field(pytree_node=False)
    every: float = flax.struct.field(pytree_node=False)


def init(
    network: Network,
    plan: Plan,
    *,
    eps: float = 2 / 255,
    ramp_epochs: int = 0,
    samples: int = 5,
    probability: float = 0.8,
    weight: float | None = None,
    every: float = 5,
) -> MixTrainState:
    """The objective's first state.

    Args:
      network: What is trained.
      plan: Of the run.
      eps: Half the width of the box in the end, 0 to 1.
      ramp_epochs: Epochs over which it grows from 0, linearly by the step.
      samples: Images of a batch that are bounded, drawn with replacement.
      probability: Of a batch to be bounded at all, 0 to 1.
      weight: Of the worst case; None: 0.1 until the ramp is over, then 2.5 times as much every
        few epochs, up to 50.
      every: How many epochs these are, above 0.

    Raises:
      ValueError: For an option out of range, or a network with a single logit.
    """
    require("eps", 0 <= eps <= 1, "0 to 1", eps)
    require("ramp_epochs", ramp_epochs >= 0, "0 or more", ramp_epochs)
    require_count("samples", samples)
    require("probability", 0 <= probability <= 1, "0 to 1", probability)
    require("weight", weight is None or 0 <= weight < float("inf"), "0 or more, or None", weight)
    require("every", 0 < every < float("inf"), "above 0", every)
    losses.check_classes(network)
    return MixTrainState(
        jnp.zeros((), jnp.int32), network, plan, float(eps), int(ramp_epochs), int(samples),
        float(probability), weight, float(every),
    )  # fmt: skip


def radius(state: MixTrainState) -> jax.Array:
    """Half the width of the box at this step, [] float32."""
    steps = state.ramp_epochs * state.plan.epoch_steps
    return state.eps * jnp.minimum(1.0, state.step / steps if steps else 1.0)


def weight(state: MixTrainState) -> jax.Array:
    """What the worst case counts at this step, [] float32."""
    if state.weight is not None:
        return jnp.float32(state.weight)
    after = jnp.maximum(state.step // state.plan.epoch_steps - state.ramp_epochs, 0)
    return jnp.minimum(_MOST, _FIRST * _FACTOR ** jnp.floor(after / state.every))


def loss(
    state: MixTrainState, variables: Any, batch: Batch, key: jax.Array
) -> tuple[jax.Array, Aux]:
    """`CE(f(x), y)`, and with the probability + `weight * CE(worst case, y)` of the samples.

    Bounds are those of the network as it is used, with the statistics before this batch. "robust"
    is the share of the samples that the bounds certify, NaN where there are none.
    """
    images, labels = batch
    dropout_key, whether_key, which_key = jax.random.split(key, 3)
    network = state.network
    logits, statistics = network.train(variables, images, dropout_key)
    which = jax.random.randint(which_key, (state.samples,), 0, len(images))
    rows = margin_rows(labels[which], network.classes)

    def bounded(variables: Any) -> tuple[jax.Array, jax.Array]:
        ends = losses.box(images[which], radius(state))
        margins = linear_bounds(network.graph, variables, *ends, rows, method="fast-lin")
        return losses.margin_cross_entropy(margins), losses.certified(margins)

    def alone(variables: Any) -> tuple[jax.Array, jax.Array]:
        return jnp.float32(0), jnp.float32(jnp.nan)

    chosen = jax.random.bernoulli(whether_key, state.probability)
    worst, certified = jax.lax.cond(chosen, bounded, alone, variables)
    value = losses.cross_entropy(logits, labels) + weight(state) * worst
    figures = {"benign": losses.accuracy(logits, labels), "robust": certified}
    return value, (state.replace(step=state.step + 1), statistics, figures)
