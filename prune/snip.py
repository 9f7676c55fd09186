"""SNIP: the weights whose going changes the loss most stay, told by one gradient.

Lee, Ajanthan, Torr, "SNIP: single-shot network pruning based on connection sensitivity", ICLR 2019:
the score of a weight is `|w dL/dw|`. There of fresh weights under cross-entropy; here of whatever
weights and objective are given.
"""

from fractions import Fraction
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nnslicer_jax.data import Dataset
from prune import filters, stages
from prune.hydra import init_scores
from prune.masks import counts, largest, over
from prune.objectives import OBJECTIVES
from prune.objectives.network import Network, Plan, require
from prune.stages import DEFAULT, Pruned, Run, Stage


def scores(
    key: jax.Array,
    network: Network,
    dataset: Dataset,
    stage: Stage,
    variables: Any,
    *,
    batches: int = 1,
) -> Any:
    """`|w dL/dw|` of every weight to be pruned, the loss being the mean over some batches.

    Args:
      key: Draws the images, and what the objective draws.
      network: What is pruned.
      dataset: Its training images and labels are used.
      stage: Objective and batch size; the rest of it does not matter.
      variables: The network's.
      batches: How many, at least 1; the whole set if there are not so many.

    Returns:
      A pytree like the parameters, None where nothing is pruned.

    Raises:
      ValueError: For no images, no batches, or an objective's option that is not accepted.
    """
    require("batches", batches >= 1, "at least 1", batches)
    count = len(dataset.train_labels)
    require("dataset", count > 0, "one with training images", dataset.name)
    size = min(stage.batch_size, count)
    objective, state = OBJECTIVES[stage.objective], stages.first_state(stage, network, Plan(size))
    order_key, loss_key = jax.random.split(key)
    order = jax.device_get(jax.random.permutation(order_key, count))

    @jax.jit
    def gradient(variables: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> Any:
        x = images.astype(jnp.float32) / 255

        def loss(params: Any) -> jax.Array:
            return objective.loss(state, {**variables, "params": params}, (x, labels), key)[0]

        return jax.grad(loss)(variables["params"])

    params = variables["params"]
    total = jax.tree.map(jnp.zeros_like, params)
    parts = min(batches, count // size)
    for i in range(parts):
        rows = order[i * size : (i + 1) * size]
        found = gradient(
            variables, dataset.train_images[rows], dataset.train_labels[rows],
            jax.random.fold_in(loss_key, i),
        )  # fmt: skip
        total = jax.tree.map(jnp.add, total, found)
    return over(
        lambda _, w, g: jnp.abs(w * g) / parts, jax.eval_shape(init_scores, params), params, total
    )


def prune(
    model: nn.Module,
    dataset: Dataset,
    keep: float | Fraction,
    *,
    pretrain: Stage | None = None,
    search: Stage,
    finetune: Stage,
    variables: Any = None,
    batches: int = 1,
    scope: str = "layer",
    run: Run = DEFAULT,
) -> Pruned:
    """Pre-trains, prunes by SNIP and fine-tunes.

    Args:
      model: As for `hydra.prune`.
      dataset: As for `hydra.prune`.
      keep: Share of the weights to keep, above 0 and at most 1.
      pretrain: How the dense network is trained; None where `variables` are given.
      search: The objective whose gradient is taken, and its batch size.
      finetune: How what is kept is trained.
      variables: A network's, trained or, as in the paper, fresh; None where `pretrain` is given.
      batches: As for `scores`.
      scope: "layer": the share of every layer; "global", the paper's: of all together.
      run: How to go about it.

    Returns:
      The network, 0 where pruned, and its masks.

    Raises:
      ValueError: For an argument that is not accepted, or a folder of another run.
      FloatingPointError: Loss or weights stopped being finite.
    """
    shapes = stages.network_of(model, dataset).shapes()["params"]
    numbers = counts(jax.eval_shape(init_scores, shapes), keep, scope)
    require("batches", batches >= 1, "at least 1", batches)
    network, variables = stages.opening(model, dataset, pretrain, variables, run)
    key = jax.random.fold_in(jax.random.key(run.seed), 1)
    found = scores(key, network, dataset, search, variables, batches=batches)
    pruned = filters.whole(network, variables, largest(found, numbers))
    return stages.fine_tune(network, dataset, finetune, pruned, run=run)
