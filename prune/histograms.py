"""Histograms of weights: which of them a method keeps (Sehwag, Wang, Mittal, Jana, "HYDRA")."""

from typing import Any

import jax
import numpy as np


def histogram(
    params: Any, masks: Any, edges: np.ndarray, *, layer: str | None = None
) -> np.ndarray:
    """Counts the weights that masks leave, by size.

    Args:
      params: The network's parameters.
      masks: Bool, like them, None where nothing is pruned: such parameters are left out.
      edges: `[N + 1]` rising ends of the bins; the last bin holds its upper end, as in NumPy.
      layer: Path of one array, joined by "/"; None: all of them.

    Returns:
      `[N]` int64; weights outside the edges are not counted.

    Raises:
      ValueError: For edges that do not rise, or an unknown layer.
    """
    edges = np.asarray(edges, float)
    if edges.ndim != 1 or len(edges) < 2 or not (np.diff(edges) > 0).all():
        raise ValueError("edges must be at least two numbers that rise")
    structure: Any
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    pruned = {
        name: np.asarray(leaf)[np.asarray(mask)]
        for name, (_, leaf), mask in zip(names, paths, structure.flatten_up_to(masks), strict=True)
        if mask is not None
    }
    if layer is not None and layer not in pruned:
        raise ValueError(f"layer must be one of {', '.join(pruned)}, not {layer!r}")
    chosen = pruned.values() if layer is None else [pruned[layer]]
    return sum((np.histogram(left, edges)[0] for left in chosen), np.zeros(len(edges) - 1, int))
