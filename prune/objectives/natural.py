"""Natural training: the cross-entropy of the images as they are."""

from typing import Any

import flax.struct
import jax

from prune.objectives import losses
from prune.objectives.network import Aux, Batch, Network, Plan


class NaturalState(flax.struct.PyTreeNode):
    """Nothing is carried."""

    network: Network = flax.struct.field(pytree_node=False)


def init(network: Network, plan: Plan) -> NaturalState:
    """The objective's first state.

    Args:
      network: What is trained.
      plan: Of the run.
    """
    del plan
    return NaturalState(network)


def loss(
    state: NaturalState, variables: Any, batch: Batch, key: jax.Array
) -> tuple[jax.Array, Aux]:
    """`CE(f(x), y)`, the state, the batch statistics and figures."""
    images, labels = batch
    logits, statistics = state.network.train(variables, images, key)
    figures = {"benign": losses.accuracy(logits, labels)}
    return losses.cross_entropy(logits, labels), (state, statistics, figures)
