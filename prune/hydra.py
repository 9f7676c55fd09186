"""HYDRA: masks learned under the robust objective itself.

Sehwag, Wang, Mittal, Jana, "HYDRA: pruning adversarially robust neural networks", NeurIPS 2020.
Every weight of a dense or convolutional layer gets a score. The weights are frozen and the scores
trained under an objective: the network runs on the weights of the largest |score| of each layer,
and the gradient passes straight through the choice, `dL/dS = sign(S) W dL/dW_eff`. Then the
weights kept are fine-tuned. The masks are computed once for each update; the released code sorts
anew in every pass of an attack.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nnslicer_jax.data import Dataset
from prune import filters, stages
from prune.masks import counts, is_none, largest, straight_through
from prune.objectives.network import Network, require, statistics
from prune.stages import DEFAULT, Pruned, Run, Stage, Whole

INITIAL = ("scaled", "random", "kaiming", "xavier")
UNITS = ("weight", "filter")


def init_scores(
    params: Any, *, init: str = "scaled", unit: str = "weight", key: jax.Array | None = None
) -> Any:
    """First scores of every weight to be pruned.

    These are the kernels: arrays of two or more axes, of which the last counts outputs; no biases
    and no batch norm. fan_in is the product of all axes but the last, fan_out that of all but the
    last but one.

    Args:
      params: The network's parameters (without batch statistics).
      init: "scaled", the paper's: `sqrt(6 / fan_in) W / max|W|`, signed, by layer; drawn evenly
        instead: "random" within 1 / sqrt(fan_in), "kaiming" within sqrt(6 / fan_in), "xavier"
        within sqrt(6 / (fan_in + fan_out)).
      unit: "weight"; "filter": one score for each output of a convolution (arrays of four axes),
        which stands for all of its weights; "scaled" goes by their mean |W|.
      key: For what is drawn.

    Returns:
      A pytree like the parameters, None where nothing is pruned. Scores of filters are
      `[1, 1, 1, outputs]`.

    Raises:
      ValueError: For an unknown `init` or `unit`, no key where one is needed, or nothing to prune.
    """
    require("init", init in INITIAL, f"one of {', '.join(INITIAL)}", init)
    require("unit", unit in UNITS, " or ".join(UNITS), unit)
    if init != "scaled" and key is None:
        raise ValueError(f"key is needed to draw scores of init={init!r}")
    least = 2 if unit == "weight" else 4
    leaves, structure = jax.tree.flatten(params)
    if not any(jnp.ndim(leaf) >= least for leaf in leaves):
        raise ValueError(f"params must hold an array of {least} or more axes to prune")
    found: list[Any] = []
    for i, leaf in enumerate(leaves):
        if jnp.ndim(leaf) < least:
            found.append(None)
            continue
        fan_in = math.prod(leaf.shape[:-1])
        fan_out = math.prod(leaf.shape[:-2]) * leaf.shape[-1]
        if init == "scaled" or key is None:
            weights = leaf if unit == "weight" else filters.magnitudes(leaf)
            most = jnp.abs(weights).max()
            # A layer of zeros has nothing to choose by.
            found.append(math.sqrt(6 / fan_in) * weights / jnp.where(most > 0, most, 1))
            continue
        within = {
            "random": 1 / math.sqrt(fan_in),
            "kaiming": math.sqrt(6 / fan_in),
            "xavier": math.sqrt(6 / (fan_in + fan_out)),
        }[init]
        shape = leaf.shape if unit == "weight" else filters.magnitudes(leaf).shape
        drawn = jax.random.uniform(jax.random.fold_in(key, i), shape, minval=-within, maxval=within)
        found.append(drawn)
    return jax.tree.unflatten(structure, found)


def norms(params: Any, batch_statistics: Any) -> Any:
    """The parameters of batch norm: those of modules that have batch statistics.

    Args:
      params: The network's parameters.
      batch_statistics: The collection "batch_stats", nested as they are.

    Returns:
      A pytree like the parameters, None elsewhere.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        at = batch_statistics
        for step in path[:-1]:
            at = at.get(step.key) if isinstance(at, Mapping) else None
        return leaf if at and not any(isinstance(v, Mapping) for v in at.values()) else None

    return jax.tree_util.tree_map_with_path(one, params)


def sizes(scores: Any) -> Any:
    """|S|, whose gradient is sign(S), 0 at 0."""
    return jax.tree.map(lambda s: jnp.sign(jax.lax.stop_gradient(s)) * s, scores)


def chosen(first: Any, second: Any) -> Any:
    """The first tree's leaves, the second's where the first has None."""
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=is_none)


def weighted(factors: Any, params: Any) -> Any:
    """The parameters times factors; as they are where these are None."""
    return jax.tree.map(lambda f, p: p if f is None else p * f, factors, params, is_leaf=is_none)


@dataclasses.dataclass(frozen=True)
class Scored(Whole):
    """Trains scores, and batch norm along with them.

    `trained` has "scores" and "norms", like the parameters with None elsewhere; `fixed` has
    "params", the frozen parameters, and "counts" as `masks.largest` takes them.
    """

    def effective(self, trained: Any, fixed: Any) -> Any:
        """`W mask(|S|)`."""
        size = sizes(trained["scores"])
        masks = largest(jax.lax.stop_gradient(size), fixed["counts"])
        return weighted(straight_through(size, masks), chosen(trained["norms"], fixed["params"]))


def learn(
    network: Network,
    dataset: Dataset,
    stage: Stage,
    variables: Any,
    scores: Any,
    numbers: Any,
    *,
    train_norms: bool = True,
    run: Run = DEFAULT,
) -> Pruned:
    """The second stage: trains scores with the weights frozen.

    Args:
      network: What is pruned.
      dataset: Its training images and labels are used.
      stage: How scores are trained.
      variables: The pre-trained network's.
      scores: The first scores, as `init_scores` makes them.
      numbers: How many to keep, as `masks.largest` takes it.
      train_norms: Whether the parameters of batch norm are trained along; its running statistics
        follow the data in any case.
      run: How to go about it.

    Returns:
      The weights as they were, 0 where not chosen, and the masks, as large as the weights.

    Raises:
      ValueError: As `stages.fit`.
      FloatingPointError: As `stages.fit`.
    """
    params = variables["params"]
    along = norms(params, variables.get("batch_stats", {}) if train_norms else {})
    trained, fixed, rest = stages.fit(
        network, dataset, stage, {"scores": scores, "norms": along}, statistics(variables),
        name="search", method=Scored(), fixed={"params": params, "counts": numbers}, run=run,
    )  # fmt: skip
    masks = largest(jax.tree.map(jnp.abs, trained["scores"]), fixed["counts"])
    found = {"params": chosen(trained["norms"], params), **rest}
    return filters.whole(network, found, masks)


def prune(
    model: nn.Module,
    dataset: Dataset,
    keep: Any,
    *,
    pretrain: Stage | None = None,
    search: Stage,
    finetune: Stage,
    variables: Any = None,
    init: str = "scaled",
    unit: str = "weight",
    scope: str = "layer",
    train_norms: bool = True,
    run: Run = DEFAULT,
) -> Pruned:
    """Pre-trains, prunes and fine-tunes, each under its own objective.

    Args:
      model: Takes images [B, H, W, C] float32 in [0, 1] and `train`; gives logits.
      dataset: Its training images and labels are used.
      keep: Share of the weights (or filters) to keep, above 0 and at most 1; or how many of every
        layer, a pytree of whole numbers like the scores.
      pretrain: How the dense network is trained; None where `variables` are given.
      search: How scores are trained.
      finetune: How what is kept is trained.
      variables: A trained network's; None where `pretrain` is given.
      init: Of the scores, as for `init_scores`.
      unit: As for `init_scores`.
      scope: "layer": a share of every layer; "global": of all together.
      train_norms: As for `learn`.
      run: How to go about it.

    Returns:
      The network, 0 where pruned, and its masks.

    Raises:
      ValueError: For an argument that is not accepted, or a folder of another run.
      FloatingPointError: Loss or weights stopped being finite.
    """
    key = jax.random.fold_in(jax.random.key(run.seed), 1)

    def first(params: Any) -> Any:
        return init_scores(params, init=init, unit=unit, key=key)

    # What is not accepted is told before anything is trained.
    shapes = stages.network_of(model, dataset).shapes()["params"]
    numbers = counts(jax.eval_shape(first, shapes), keep, scope)
    network, variables = stages.opening(model, dataset, pretrain, variables, run)
    found = learn(
        network, dataset, search, variables, first(variables["params"]), numbers,
        train_norms=train_norms, run=run,
    )  # fmt: skip
    return stages.fine_tune(network, dataset, finetune, found, run=run)
