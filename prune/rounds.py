"""HYDRA in rounds: some weights are pruned and the rest fine-tuned, several times over.

A study of Sehwag, Wang, Mittal, Jana, "HYDRA: pruning adversarially robust neural networks",
NeurIPS 2020. The share kept falls by one factor a round; what is pruned stays so.
"""

import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nnslicer_jax.data import Dataset
from prune import hydra, stages
from prune.masks import counts, over
from prune.objectives.network import require
from prune.stages import DEFAULT, Pruned, Run, Stage


def shares(keep: float | Fraction, rounds: int) -> list[float | Fraction]:
    """The share of all weights that is kept after each round; the last is `keep` itself."""
    return [*(float(keep) ** (i / rounds) for i in range(1, rounds)), keep]


def prune(
    model: nn.Module,
    dataset: Dataset,
    keep: float | Fraction,
    *,
    rounds: int,
    pretrain: Stage | None = None,
    search: Stage,
    finetune: Stage,
    variables: Any = None,
    init: str = "scaled",
    train_norms: bool = True,
    run: Run = DEFAULT,
) -> Pruned:
    """Pre-trains, then prunes and fine-tunes in rounds.

    Args:
      model: As for `hydra.prune`.
      dataset: As for `hydra.prune`.
      keep: Share of the weights of every layer to keep in the end, above 0 and at most 1.
      rounds: How many, at least 1; one is `hydra.prune`.
      pretrain: How the dense network is trained; None where `variables` are given.
      search: How scores are trained in each round.
      finetune: How what is kept is trained in each round.
      variables: A trained network's; None where `pretrain` is given.
      init: Of each round's scores, as for `hydra.init_scores`.
      train_norms: As for `hydra.learn`.
      run: How to go about it; each round's checkpoints go to a folder of its own.

    Returns:
      The network, 0 where pruned, and its masks.

    Raises:
      ValueError: For an argument that is not accepted, or a folder of another run.
      FloatingPointError: Loss or weights stopped being finite.
    """
    require("rounds", rounds >= 1, "at least 1", rounds)
    key = jax.random.fold_in(jax.random.key(run.seed), 1)
    shapes = stages.network_of(model, dataset).shapes()["params"]
    first = jax.eval_shape(lambda params: hydra.init_scores(params, init=init, key=key), shapes)
    numbers = [counts(first, share) for share in shares(keep, rounds)]
    network, variables = stages.opening(model, dataset, pretrain, variables, run)
    found = Pruned(variables, None)
    for i, number in enumerate(numbers, 1):
        scores = hydra.init_scores(found.variables["params"], init=init, key=key)
        if found.masks is not None:
            # A score of 0 has no slope: what is pruned stays last.
            scores = over(lambda mask, score: jnp.where(mask, score, 0), found.masks, scores)
        one = run
        if run.folder is not None and rounds > 1:
            one = dataclasses.replace(run, folder=Path(run.folder) / f"round_{i}")
        found = hydra.learn(
            network, dataset, search, found.variables, scores, number,
            train_norms=train_norms, run=one,
        )  # fmt: skip
        found = stages.fine_tune(network, dataset, finetune, found, run=one)
    return found
