"""HARP: how much to keep of each layer, learned along with what.

Zhao, Wressnegger, "Holistic adversarially robust pruning", ICLR 2023. Besides HYDRA's scores every
layer has a number r, and keeps the share `k_min + (1 - k_min) sigmoid(r)` of its weights. r gets
the sum of the mask's gradient straight through. `gamma max(0, share kept in all / target - 1)` is
added to the loss, gamma growing by one step an epoch. What the search ends at is scaled by one
factor for all layers, so that exactly the target's number of weights stays, as of every other
method.
"""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nnslicer_jax.data import Dataset
from prune import filters, stages
from prune.hydra import chosen, init_scores, norms, sizes, weighted
from prune.masks import counts, largest, straight_through
from prune.objectives.network import Network, require, statistics
from prune.stages import DEFAULT, Pruned, Run, Stage, Whole

# Every layer starts at this share, or at the target where that is more.
_START = 0.1
# The least share of a layer, of the target.
_LEAST = 0.1
# By how much gamma grows an epoch.
GAMMA = 0.01


@dataclasses.dataclass(frozen=True)
class Holistic(Whole):
    """Trains scores, one number a layer, and batch norm along with them.

    `trained` has "scores" and "rates" (`[]` each), like the parameters with None elsewhere, and
    "norms"; `fixed` has "params", the frozen parameters, and "target", `[]` float32.

    Attributes:
      gamma: By how much the penalty's weight grows an epoch.
    """

    gamma: float

    def effective(self, trained: Any, fixed: Any) -> Any:
        """`W mask(|S|)`, with as many in the mask as the rate says."""
        size = sizes(trained["scores"])
        kept = shares(trained["rates"], fixed["target"])
        masks = largest(jax.lax.stop_gradient(size), rounded(kept, size))
        # The gradient of a sum reaches each score as it is, and the share as its sum.
        soft = straight_through(jax.tree.map(jnp.add, size, kept), masks)
        return weighted(soft, chosen(trained["norms"], fixed["params"]))

    def penalty(self, trained: Any, fixed: Any, epoch: jax.Array) -> jax.Array:
        """`gamma (epoch + 1) max(0, share / target - 1)`."""
        kept = shares(trained["rates"], fixed["target"])
        return (
            self.gamma * (epoch + 1)
            * jnp.maximum(0, overall(kept, trained["scores"]) / fixed["target"] - 1)
        )  # fmt: skip


def shares(rates: Any, target: jax.Array) -> Any:
    """`k_min + (1 - k_min) sigmoid(r)` of every layer, k_min a tenth of the target."""
    least = _LEAST * target
    return jax.tree.map(lambda r: least + (1 - least) * jax.nn.sigmoid(r), rates)


def first_rates(scores: Any, target: float) -> Any:
    """The r of every layer to begin with: a tenth is kept, or the target where that is more."""
    least = _LEAST * target
    share = (max(_START, target) - least) / (1 - least)
    # At a target of 1 there is nothing to choose; r stays finite.
    share = min(share, 1 - 1e-6)
    return jax.tree.map(lambda _: jnp.float32(math.log(share / (1 - share))), scores)


def rounded(kept: Any, scores: Any) -> Any:
    """How many entries of every layer a share is: the nearest number, at least one."""

    def one(share: jax.Array, score: jax.Array) -> jax.Array:
        number = jnp.round(jax.lax.stop_gradient(share) * score.size)
        return jnp.maximum(number, 1).astype(jnp.int32)

    return jax.tree.map(one, kept, scores)


def overall(kept: Any, scores: Any) -> jax.Array:
    """The share kept of all layers together, [] float32."""
    sizes = [leaf.size for leaf in jax.tree.leaves(scores)]
    parts = [k * n for k, n in zip(jax.tree.leaves(kept), sizes, strict=True)]
    return sum(parts[1:], parts[0]) / sum(sizes)


def fitted(kept: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """Whole numbers near one multiple of the layers' shares that add up to a total.

    Args:
      kept: Share of every layer, above 0.
      sizes: Entries of every layer.
      total: What is to be kept, from the number of layers to all entries.

    Returns:
      For every layer 1 up to its size.

    Raises:
      ValueError: For a total that cannot be met.
    """
    if not len(sizes) <= total <= sum(sizes):
        raise ValueError(f"total must be {len(sizes)} to {sum(sizes)}, not {total}")
    wanted, most = np.asarray(kept) * np.asarray(sizes), np.asarray(sizes, float)
    low, high = 0.0, float(np.max(most / wanted))
    for _ in range(200):
        middle = (low + high) / 2
        if np.clip(middle * wanted, 1, most).sum() < total:
            low = middle
        else:
            high = middle
    ideal = np.clip(low * wanted, 1, most)
    found = np.floor(ideal).astype(int)
    # What rounding down leaves goes where most was cut off, and there is room.
    for i in np.argsort(found - ideal, kind="stable"):
        if found.sum() < total and found[i] < sizes[i]:
            found[i] += 1
    for i in range(len(found)):
        found[i] += min(total - found.sum(), sizes[i] - found[i])
    return [int(n) for n in found]


def learn(
    network: Network,
    dataset: Dataset,
    stage: Stage,
    variables: Any,
    scores: Any,
    keep: float | Fraction,
    *,
    gamma: float = GAMMA,
    train_norms: bool = True,
    run: Run = DEFAULT,
) -> tuple[Pruned, Any]:
    """The second stage: trains scores and shares with the weights frozen.

    Args:
      network: What is pruned.
      dataset: Its training images and labels are used.
      stage: How they are trained.
      variables: The pre-trained network's.
      scores: The first scores, as `hydra.init_scores` makes them.
      keep: Share of all weights to keep, above 0 and at most 1.
      gamma: By how much the penalty's weight grows an epoch, 0 or more.
      train_norms: Whether the parameters of batch norm are trained along.
      run: How to go about it.

    Returns:
      The network, 0 where pruned, with its masks; and how many are kept of every layer, a pytree
      like the scores, which `hydra.prune` takes as `keep`.

    Raises:
      ValueError: As `stages.fit`.
      FloatingPointError: As `stages.fit`.
    """
    require("gamma", 0 <= gamma < float("inf"), "0 or more", gamma)
    total = sum(jax.tree.leaves(counts(scores, keep)))
    params = variables["params"]
    along = norms(params, variables.get("batch_stats", {}) if train_norms else {})
    started = {"scores": scores, "rates": first_rates(scores, float(keep)), "norms": along}
    trained, fixed, rest = stages.fit(
        network, dataset, stage, started, statistics(variables),
        name="search", method=Holistic(float(gamma)),
        fixed={"params": params, "target": jnp.float32(float(keep))}, run=run,
    )  # fmt: skip
    leaves, structure = jax.tree.flatten(shares(trained["rates"], fixed["target"]))
    sizes = [leaf.size for leaf in jax.tree.leaves(scores)]
    numbers = jax.tree.unflatten(structure, fitted([float(k) for k in leaves], sizes, total))
    masks = largest(jax.tree.map(jnp.abs, trained["scores"]), numbers)
    found = {"params": chosen(trained["norms"], params), **rest}
    return filters.whole(network, found, masks), numbers


def prune(
    model: nn.Module,
    dataset: Dataset,
    keep: float | Fraction,
    *,
    pretrain: Stage | None = None,
    search: Stage,
    finetune: Stage,
    variables: Any = None,
    init: str = "scaled",
    gamma: float = GAMMA,
    train_norms: bool = True,
    run: Run = DEFAULT,
) -> Pruned:
    """Pre-trains, prunes and fine-tunes, each under its own objective.

    Args:
      model: As for `hydra.prune`.
      dataset: As for `hydra.prune`.
      keep: As for `learn`.
      pretrain: How the dense network is trained; None where `variables` are given.
      search: How scores and shares are trained.
      finetune: How what is kept is trained.
      variables: A trained network's; None where `pretrain` is given.
      init: Of the scores, as for `hydra.init_scores`.
      gamma: As for `learn`.
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
        return init_scores(params, init=init, key=key)

    # What is not accepted is told before anything is trained.
    counts(jax.eval_shape(first, stages.network_of(model, dataset).shapes()["params"]), keep)
    network, variables = stages.opening(model, dataset, pretrain, variables, run)
    found, _ = learn(
        network, dataset, search, variables, first(variables["params"]), keep,
        gamma=gamma, train_norms=train_norms, run=run,
    )  # fmt: skip
    return stages.fine_tune(network, dataset, finetune, found, run=run)
