"""Filters: whole outputs of a convolution pruned, so that `compact` makes the network smaller.

A filter is one index of the last axis of a convolution's kernel. Its mask is `[1, 1, 1, outputs]`.
A neuron that has lost its filter goes with its bias, its batch norm and the weights that read it
(`removal`), so that the network trained on under the masks is the one that can be made smaller.
"""

from typing import Any

import jax
import jax.numpy as jnp

from prune.masks import apply_masks, is_none, over
from prune.objectives.network import Network
from prune.removal import remove
from prune.stages import Pruned


def magnitudes(kernel: jax.Array) -> jax.Array:
    """Mean |w| of every filter of a kernel `[..., outputs]`, as `[1, ..., 1, outputs]`."""
    return jnp.abs(kernel).mean(tuple(range(kernel.ndim - 1)), keepdims=True)


def whole(network: Network, variables: Any, masks: Any) -> Pruned:
    """A network under masks of weights or of filters.

    Args:
      network: What is pruned.
      variables: Its variables.
      masks: Bool, like the parameters or, of filters, `[1, 1, 1, outputs]`; None where nothing is
        pruned.

    Returns:
      The variables, 0 where pruned, and masks as large as the parameters. Where filters are
      pruned, biases and batch norm have masks too.
    """
    params = variables["params"]
    filtered = any(
        mask.shape != leaf.shape
        for mask, leaf in zip(_aligned(masks, params), jax.tree.leaves(params), strict=True)
        if mask is not None
    )
    full = over(lambda mask, leaf: jnp.broadcast_to(mask, leaf.shape), masks, params)
    if filtered:
        every = {name: jax.tree.map(lambda _: None, part) for name, part in variables.items()}
        left = remove(network.graph, variables, {**every, "params": full}).masks["params"]
        full = jax.tree.map(_both, full, left, is_leaf=is_none)
    return Pruned({**variables, "params": apply_masks(params, full)}, full)


def masks_of_variables(pruned: Pruned) -> dict[str, Any]:
    """Masks like the variables, as `compact.compact` takes them."""
    others = {
        name: jax.tree.map(lambda _: None, part)
        for name, part in pruned.variables.items()
        if name != "params"
    }
    return {**others, "params": pruned.masks}


def _aligned(masks: Any, params: Any) -> list[Any]:
    """The masks leaf by leaf of the parameters."""
    structure: Any = jax.tree.structure(params)
    return structure.flatten_up_to(masks)


def _both(mask: Any, left: Any) -> Any:
    if mask is None or left is None:
        return left if mask is None else mask
    return mask & left
