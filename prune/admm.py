"""ADMM pruning: weights trained near a sparse copy of themselves.

Ye, Xu, Liu, Cheng, Lambrechts, Zhang, Zhou, Ma, Wang, Lin, "Adversarial robustness vs model
compression, or both?", ICCV 2019, after Zhang, Ye, Zhang, Tang, Wen, Fardad, Wang, "A systematic
DNN weight pruning framework using alternating direction method of multipliers", ECCV 2018: minimise
the loss of W with W = Z, Z sparse. In turn, W goes down `L(W) + rho / 2 |W - Z + U|^2` for an
epoch, Z becomes the projection of W + U onto what is sparse enough (its largest entries), and U
grows by W - Z. In the end the least |w| go and the rest is fine-tuned.
"""

import dataclasses
from fractions import Fraction
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nnslicer_jax.data import Dataset
from prune import filters, lwm, stages
from prune.masks import counts, largest, over
from prune.objectives.network import require, statistics
from prune.stages import DEFAULT, Pruned, Run, Stage, Whole


@dataclasses.dataclass(frozen=True)
class Alternating(Whole):
    """Trains weights; `fixed` has "z", "u" and "counts", like the parameters, None elsewhere.

    Attributes:
      rho: How strongly W is held to its sparse copy.
    """

    rho: float

    def penalty(self, trained: Any, fixed: Any, epoch: jax.Array) -> jax.Array | float:
        """`rho / 2 |W - Z + U|^2` over the weights to be pruned."""
        apart = over(lambda z, w, u: ((w - z + u) ** 2).sum(), fixed["z"], trained, fixed["u"])
        return self.rho / 2 * sum(jax.tree.leaves(apart))

    def renewed(self, trained: Any, fixed: Any, epoch: jax.Array) -> tuple[Any, Any]:
        """Z is projected, U follows."""
        return trained, projected(trained, fixed["u"], fixed["counts"])


def projected(params: Any, u: Any, numbers: Any) -> dict[str, Any]:
    """The Z-step and the step of the dual variable.

    Args:
      params: W.
      u: U, like the parameters, None where nothing is pruned.
      numbers: How many entries of every layer may differ from 0.

    Returns:
      "z", "u" and "counts".
    """
    moved = over(lambda u, w: w + u, u, params)
    masks = largest(jax.tree.map(jnp.abs, moved), numbers)
    z = jax.tree.map(lambda mask, m: jnp.where(mask, m, 0), masks, moved)
    return {"z": z, "u": jax.tree.map(jnp.subtract, moved, z), "counts": numbers}


def prune(
    model: nn.Module,
    dataset: Dataset,
    keep: float | Fraction,
    *,
    pretrain: Stage | None = None,
    search: Stage,
    finetune: Stage,
    variables: Any = None,
    rho: float = 0.01,
    run: Run = DEFAULT,
) -> Pruned:
    """Pre-trains, prunes by ADMM and fine-tunes.

    Args:
      model: As for `hydra.prune`.
      dataset: As for `hydra.prune`.
      keep: Share of the weights of every layer to keep, above 0 and at most 1.
      pretrain: How the dense network is trained; None where `variables` are given.
      search: How the W-step trains; every epoch ends in a Z-step and a dual one.
      finetune: How what is kept is trained.
      variables: A trained network's; None where `pretrain` is given.
      rho: Of the augmented Lagrangian, above 0.
      run: How to go about it.

    Returns:
      The network, 0 where pruned, and its masks.

    Raises:
      ValueError: For an argument that is not accepted, or a folder of another run.
      FloatingPointError: Loss or weights stopped being finite.
    """
    require("rho", 0 < rho < float("inf"), "above 0", rho)
    shapes = stages.network_of(model, dataset).shapes()["params"]
    numbers = counts(jax.eval_shape(lwm.scores, shapes), keep)
    network, variables = stages.opening(model, dataset, pretrain, variables, run)
    params = variables["params"]
    zeros = jax.tree.map(jnp.zeros_like, lwm.scores(params))
    start = projected(params, zeros, numbers)
    # The dual variable starts at 0: only Z is projected before the first epoch.
    params, fixed, rest = stages.fit(
        network, dataset, search, params, statistics(variables),
        name="search", method=Alternating(float(rho)), fixed={**start, "u": zeros}, run=run,
    )  # fmt: skip
    masks = largest(lwm.scores(params), fixed["counts"])
    found = filters.whole(network, {"params": params, **rest}, masks)
    return stages.fine_tune(network, dataset, finetune, found, run=run)
