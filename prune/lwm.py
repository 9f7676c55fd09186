"""LWM, least weight magnitude: the weights nearest to 0 of each layer are pruned, then fine-tuned.

Han, Pool, Tran, Dally, "Learning both weights and connections for efficient neural networks",
NeurIPS 2015; the baseline of Sehwag, Wang, Mittal, Jana, "HYDRA", 2020, in one step or in many.
"""

import dataclasses
from fractions import Fraction
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nnslicer_jax.data import Dataset
from prune import filters, stages
from prune.hydra import init_scores
from prune.masks import apply_masks, counts, largest, over
from prune.objectives.network import statistics
from prune.stages import DEFAULT, Pruned, Run, Stage, Whole


def scores(params: Any, *, unit: str = "weight") -> Any:
    """|w| of every weight to be pruned, or the mean |w| of every filter.

    Args:
      params: The network's parameters.
      unit: "weight" or "filter".

    Returns:
      A pytree like the parameters, None where nothing is pruned.

    Raises:
      ValueError: As `hydra.init_scores`.
    """
    return over(
        lambda score, leaf: (
            jnp.abs(leaf) if score.shape == leaf.shape else filters.magnitudes(leaf)
        ),
        jax.eval_shape(lambda p: init_scores(p, unit=unit), params),
        params,
    )


@dataclasses.dataclass(frozen=True)
class Gradual(Whole):
    """Trains weights and after every epoch prunes some more of them.

    `fixed` has "masks" and "counts": for every layer `[epochs]`, how many are left after each.
    """

    def effective(self, trained: Any, fixed: Any) -> Any:
        """The parameters under the masks of this epoch."""
        return apply_masks(trained, fixed["masks"])

    def renewed(self, trained: Any, fixed: Any, epoch: jax.Array) -> tuple[Any, Any]:
        """The least of what is left goes."""
        trained = apply_masks(trained, fixed["masks"])
        numbers = jax.tree.map(lambda left: left[epoch], fixed["counts"])
        masks = over(_still, fixed["masks"], trained)
        masks = largest(masks, numbers)
        return apply_masks(trained, masks), {**fixed, "masks": masks}


def schedule(first: Any, keep: float | Fraction, epochs: int) -> Any:
    """How many weights are left of every layer after each epoch: shares fall by one factor.

    Args:
      first: Scores of the weights; only their shapes matter.
      keep: The last epoch's share.
      epochs: How many, at least 1.

    Returns:
      A pytree like the scores of `[epochs]` int32.

    Raises:
      ValueError: As `masks.counts`.
    """
    last = counts(first, keep)
    each = [counts(first, float(keep) ** (e / epochs)) for e in range(1, epochs)]
    return jax.tree.map(lambda *left: jnp.asarray(left, jnp.int32), *each, last)


def prune(
    model: nn.Module,
    dataset: Dataset,
    keep: float | Fraction,
    *,
    pretrain: Stage | None = None,
    search: Stage | None = None,
    finetune: Stage,
    variables: Any = None,
    unit: str = "weight",
    scope: str = "layer",
    run: Run = DEFAULT,
) -> Pruned:
    """Pre-trains, prunes by magnitude and fine-tunes.

    Args:
      model: As for `hydra.prune`.
      dataset: As for `hydra.prune`.
      keep: Share of the weights (or filters) to keep, above 0 and at most 1.
      pretrain: How the dense network is trained; None where `variables` are given.
      search: None: one step. Given, the multi-step form: the weights are trained so, and after
        each of its epochs some more of every layer go; of weights alone.
      finetune: How what is kept is trained.
      variables: A trained network's; None where `pretrain` is given.
      unit: "weight" or "filter".
      scope: "layer": the share of every layer; "global": of all together.
      run: How to go about it.

    Returns:
      The network, 0 where pruned, and its masks.

    Raises:
      ValueError: For an argument that is not accepted, or a folder of another run.
      FloatingPointError: Loss or weights stopped being finite.
    """
    shapes = stages.network_of(model, dataset).shapes()["params"]
    first = jax.eval_shape(lambda params: scores(params, unit=unit), shapes)
    numbers = counts(first, keep, scope)
    if search is not None and (unit, scope) != ("weight", "layer"):
        raise ValueError("search must be None for filters and for a global share")
    network, variables = stages.opening(model, dataset, pretrain, variables, run)
    if search is None:
        masks = largest(scores(variables["params"], unit=unit), numbers)
        found = filters.whole(network, variables, masks)
    else:
        left = schedule(first, keep, search.epochs)
        every = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), first)
        params, fixed, rest = stages.fit(
            network, dataset, search, variables["params"], statistics(variables),
            name="search", method=Gradual(), fixed={"masks": every, "counts": left}, run=run,
        )  # fmt: skip
        found = filters.whole(network, {"params": params, **rest}, fixed["masks"])
    return stages.fine_tune(network, dataset, finetune, found, run=run)


def _still(mask: jax.Array, leaf: jax.Array) -> jax.Array:
    """|w| of what is left, less than any of them elsewhere."""
    return jnp.where(mask, jnp.abs(leaf), -1)
