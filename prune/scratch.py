"""From scratch: a pruned network's structure trained from fresh weights.

Liu, Sun, Zhou, Huang, Darrell, "Rethinking the value of network pruning", ICLR 2019: whether what
pruning finds are weights or a structure. Of masks of filters, `compact` makes a smaller network of
the result.
"""

from typing import Any

import flax.linen as nn
import jax

from nnslicer_jax.data import Dataset
from prune import filters, stages
from prune.stages import DEFAULT, Pruned, Run, Stage

# Sets the first weights apart from those that the whole network of the same seed starts from.
_FRESH = 1


def train(
    model: nn.Module,
    dataset: Dataset,
    masks: Any,
    stage: Stage,
    *,
    run: Run = DEFAULT,
) -> Pruned:
    """Trains, from a fresh start, what masks leave of a network.

    Args:
      model: As for `hydra.prune`.
      dataset: As for `hydra.prune`.
      masks: Of a pruned network.
      stage: How it is trained.
      run: How to go about it.

    Returns:
      The network, 0 where pruned, and its masks.

    Raises:
      ValueError: For masks of another network, or a folder of another run.
      FloatingPointError: Loss or weights stopped being finite.
    """
    network = stages.network_of(model, dataset)
    fresh = network.initialize(jax.random.fold_in(jax.random.key(run.seed), _FRESH))
    try:
        found = filters.whole(network, fresh, masks)
    except (TypeError, ValueError):
        raise ValueError("masks must be like the parameters of the model") from None
    trained = stages.pretrain(
        network, dataset, stage, variables=found.variables, masks=found.masks, name="scratch",
        run=run,
    )  # fmt: skip
    return Pruned(trained, found.masks)
