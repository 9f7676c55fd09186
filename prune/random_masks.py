"""Random masks: weights chosen by chance, what every other choice has to beat."""

from fractions import Fraction
from typing import Any

import flax.linen as nn
import jax

from nnslicer_jax.data import Dataset
from prune import filters, stages
from prune.hydra import init_scores
from prune.masks import topk
from prune.stages import DEFAULT, Pruned, Run, Stage


def draw(
    key: jax.Array,
    params: Any,
    keep: float | Fraction,
    *,
    unit: str = "weight",
    scope: str = "layer",
) -> Any:
    """Masks that keep a share of the weights, or filters, drawn evenly.

    Args:
      key: For what is drawn.
      params: The network's parameters; only their shapes matter.
      keep: Share to keep, above 0 and at most 1.
      unit: "weight" or "filter".
      scope: "layer": the share of every layer; "global": of all together.

    Raises:
      ValueError: For an argument that is not accepted.
    """
    structure = jax.eval_shape(lambda p: init_scores(p, unit=unit), params)
    leaves, tree = jax.tree.flatten(structure)
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.uniform(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    return topk(jax.tree.unflatten(tree, drawn), keep, scope)


def prune(
    model: nn.Module,
    dataset: Dataset,
    keep: float | Fraction,
    *,
    pretrain: Stage | None = None,
    finetune: Stage,
    variables: Any = None,
    unit: str = "weight",
    scope: str = "layer",
    run: Run = DEFAULT,
) -> Pruned:
    """Pre-trains, prunes by chance and fine-tunes.

    Args:
      model: As for `hydra.prune`.
      dataset: As for `hydra.prune`.
      keep: As for `draw`.
      pretrain: How the dense network is trained; None where `variables` are given.
      finetune: How what is kept is trained.
      variables: A trained network's; None where `pretrain` is given.
      unit: As for `draw`.
      scope: As for `draw`.
      run: How to go about it.

    Returns:
      The network, 0 where pruned, and its masks.

    Raises:
      ValueError: For an argument that is not accepted, or a folder of another run.
      FloatingPointError: Loss or weights stopped being finite.
    """
    shapes = stages.network_of(model, dataset).shapes()["params"]
    key = jax.random.fold_in(jax.random.key(run.seed), 1)
    masks = draw(key, shapes, keep, unit=unit, scope=scope)
    network, variables = stages.opening(model, dataset, pretrain, variables, run)
    found = filters.whole(network, variables, masks)
    return stages.fine_tune(network, dataset, finetune, found, run=run)
