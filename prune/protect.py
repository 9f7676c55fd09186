"""Model protection: the most valuable synapses are hidden, and an attacker trains them back.

Zhang et al., ESEC/FSE 2020, the application "model protection". Which synapses are hidden is a
mask, such as `masks.topk` of a criterion's scores gives. The paper leaves open what stands in the
hidden places when the attack begins and what the attacker trains. Here the hidden synapses restart
from the initialiser; everything else (the other synapses, biases, scales, batch statistics) is in
the attacker's hands as it was, and is either trained on or kept.
"""

import numbers
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nnslicer_jax import training
from nnslicer_jax.data import Dataset
from prune.masks import check_mask, is_none

TRAINS = ("all", "hidden")


def hide(params: Any, initial: Any, masks: Any) -> Any:
    """What the attacker is given: the hidden synapses as first drawn, the others as they are.

    Args:
      params: The network's parameters.
      initial: Parameters of the same network, freshly drawn from its initialiser.
      masks: Pytree like `params`, bool, True where a synapse is hidden; None: nothing is.

    Returns:
      A pytree like `params`.

    Raises:
      ValueError: If the three do not have the same shapes, or masks are not bool.
    """
    kinds = [jax.tree.structure(tree, is_leaf=is_none) for tree in (params, initial, masks)]
    if kinds.count(kinds[0]) < 3:
        raise ValueError("params, initial and masks must be pytrees of the same structure")

    def one(path: Any, mask: Any, leaf: Any, first: Any) -> Any:
        shapes = [jnp.shape(tree) for tree in (leaf, first, mask) if tree is not None]
        if shapes.count(shapes[0]) < len(shapes):
            raise ValueError(
                "params, initial and masks must have the same shapes, not "
                f"{', '.join(map(str, shapes))} at {jax.tree_util.keystr(path)}"
            )
        if mask is None:
            return leaf
        check_mask(path, mask)
        return jnp.where(mask, first, leaf)

    return jax.tree_util.tree_map_with_path(one, masks, params, initial, is_leaf=is_none)


def samples(key: jax.Array, dataset: Dataset, budget: int) -> Dataset:
    """The data set with only as many training images as the attacker's budget.

    Args:
      key: Decides the order in which images are drawn; of two budgets under one key the smaller
        one's images are the first of the larger one's.
      dataset: Its training images are drawn from, of all classes.
      budget: 1 up to the number of training images.

    Raises:
      ValueError: For another budget.
    """
    count = len(dataset.train_labels)
    whole = isinstance(budget, numbers.Integral) and not isinstance(budget, bool)
    if not whole or not 1 <= budget <= count:
        raise ValueError(
            f"budget must be 1..{count}, the number of training images, not {budget!r}"
        )
    rows = np.asarray(jax.random.permutation(key, count))[:budget]
    return dataset._replace(
        train_images=dataset.train_images[rows], train_labels=dataset.train_labels[rows]
    )


def retrain(
    model: nn.Module,
    exposed: Any,
    masks: Any,
    dataset: Dataset,
    options: training.TrainingOptions,
    *,
    trains: str = "all",
    **how: Any,
) -> Any:
    """The attack: trains the hidden synapses anew.

    Args:
      model: The network, whose architecture the attacker knows.
      exposed: Its variables as `hide` left them.
      masks: As for `hide`, of the variables.
      dataset: The attacker's, from `samples`.
      options: How the attacker trains.
      trains: "all": what is exposed is trained along, the stronger attack; "hidden": the hidden
        synapses alone, all other parameters stay as they are to the bit. Batch statistics follow
        the attacker's images in both.
      how: Further arguments of `training.train`.

    Returns:
      The attacker's variables.

    Raises:
      ValueError: For another `trains`, variables or masks without params, or what `training.train`
        does not accept.
    """
    if trains not in TRAINS:
        raise ValueError(f"trains must be one of {', '.join(TRAINS)}, not {trains!r}")
    for name, tree in (("exposed", exposed), ("masks", masks)):
        if not isinstance(tree, Mapping) or "params" not in tree:
            raise ValueError(
                f"{name} must hold params, as the variables of {type(model).__name__} do"
            )
    every = trains == "all"

    def trained(mask: Any, leaf: Any) -> np.ndarray:
        if every or mask is None:
            return np.full(jnp.shape(leaf), every)
        return np.asarray(mask)

    trainable = jax.tree.map(trained, masks["params"], exposed["params"], is_leaf=is_none)
    return training.train(model, dataset, options, variables=exposed, trainable=trainable, **how)
