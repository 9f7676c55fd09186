"""Objectives to train and to prune under, one file each, with one interface.

`init(network, plan, **options)` gives the first state, and `loss(state, variables, batch, key)` the
loss, differentiable in the variables, with the next state, the batch statistics and figures. Both
are pure. A state is a pytree; options are static in it.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from prune.objectives import crown_ibp, free, mixtrain, natural, pgd, smoothing, trades
from prune.objectives.network import Aux, Batch, Network, Plan

__all__ = [
    "OBJECTIVES",
    "Aux",
    "Batch",
    "Network",
    "Objective",
    "Plan",
    "crown_ibp",
    "free",
    "mixtrain",
    "natural",
    "pgd",
    "smoothing",
    "trades",
]


class Objective(NamedTuple):
    """An objective.

    Attributes:
      init: `init(network, plan, **options) -> state`.
      loss: `loss(state, variables, batch, key) -> loss, (state, batch statistics, figures)`.
    """

    init: Callable[..., Any]
    loss: Callable[[Any, Any, Batch, jax.Array], tuple[jax.Array, Aux]]


OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        "crown_ibp": Objective(crown_ibp.init, crown_ibp.loss),
        "free": Objective(free.init, free.loss),
        "mixtrain": Objective(mixtrain.init, mixtrain.loss),
        "natural": Objective(natural.init, natural.loss),
        "pgd": Objective(pgd.init, pgd.loss),
        "smoothing": Objective(smoothing.init, smoothing.loss),
        "trades": Objective(trades.init, trades.loss),
    }
)
