"""What routes tell: critical nodes, ablation, meaning within and across layers, comparisons.

Wang, Su, Zhang, Hu, "Interpret Neural Networks by Identifying Critical Data Routing Paths", CVPR
2018. A node is one channel of a gated layer; nodes of a row of gates are as `Routes.layers` says.
"""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from scipy.cluster import hierarchy
from scipy.spatial import distance
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_samples

from interpret import cdrp
from interpret.cdrp import Routes
from interpret.gates import Layers
from nnslicer_jax.graph import Graph

MODES = ("top", "bottom", "random")

_FEW_ROWS = 200


def critical(gates: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """Which nodes are critical: those whose gate is above the threshold, bool of gates' shape."""
    if not math.isfinite(threshold) or threshold < 0:
        raise ValueError(f"threshold must be a number of 0 or more, not {threshold}")
    return np.asarray(gates) > threshold


# Ablation ------------------------------------------------------------------------------------


class Ablation(NamedTuple):
    """The network with a share of each image's critical nodes switched off.

    Attributes:
      shares: `[S]`, 0..1.
      top1: `[S, N]` bool, whether the label is the first class.
      top5: `[S, N]` bool, whether the label is among the first five.
      nodes: `[S, N]`, how many nodes were switched off.
    """

    shares: np.ndarray
    top1: np.ndarray
    top5: np.ndarray
    nodes: np.ndarray


def ablate(
    key: int,
    graph: Graph,
    params: Any,
    images: np.ndarray,
    labels: np.ndarray,
    routes: Routes,
    shares: Sequence[float],
    mode: str = "top",
    *,
    layers: Sequence[str] | None = None,
    threshold: float = 0.5,
    batch_size: int = 256,
) -> Ablation:
    """Switches off a share of the critical nodes of each layer; other channels stay as they are.

    Args:
      key: Seed of what "random" draws.
      graph: The traced model.
      params: Its parameters.
      images: `[N, ...]`, those routed.
      labels: `[N]` integers.
      routes: The images' routes.
      shares: Of each layer's critical nodes, 0..1: the ceil(share * n).
      mode: "top": the largest gates first; "bottom": the smallest of the critical ones first;
        "random": as many nodes of the layer, critical or not, drawn for each image.
      layers: Layers to switch nodes off in; None for all.
      threshold: What makes a node critical.
      batch_size: Images run at once.

    Raises:
      ValueError: For an unknown mode or layer, or lengths that differ.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    labels, classes = np.asarray(labels), graph.values[graph.logits].shape[-1]
    if len(images) != len(routes) or labels.shape != (len(routes),):
        raise ValueError(
            f"images, labels and routes must be equally many, not {len(images)}, {len(labels)} "
            f"and {len(routes)}"
        )
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= classes:
        raise ValueError(f"labels must be in 0..{classes - 1}, not {labels.min()}..{labels.max()}")
    chosen = tuple(routes.layers) if layers is None else tuple(layers)
    for name in chosen:
        routes.layer(name)
    rng = np.random.default_rng(key)
    order, count = _order(rng, routes, mode, chosen, threshold)
    first, five, nodes = [], [], []
    for share in shares:
        off = switched_off(order, count, share, routes.layers)
        found = cdrp.logits(
            graph, params, images, routes.layers, (~off).astype(np.float32), batch_size
        )
        rank = (found > np.take_along_axis(found, labels[:, None], 1)).sum(1)
        first.append(found.argmax(1) == labels)
        five.append(rank < 5)
        nodes.append(off.sum(1))
    return Ablation(np.asarray(shares, float), np.array(first), np.array(five), np.array(nodes))


def _order(
    rng: np.random.Generator, routes: Routes, mode: str, chosen: Sequence[str], threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """For each node its place in its layer's order of switching off, and how many may go."""
    place = np.zeros(routes.gates.shape, int)
    count = np.zeros((len(routes), len(routes.layers)), int)
    on = critical(routes.gates, threshold)
    for number, (name, part) in enumerate(routes.layers.items()):
        if name in chosen:
            count[:, number] = on[:, part].sum(1)
        gates = routes.gates[:, part].astype(float)
        if mode == "random":
            score = rng.random(gates.shape)
        else:
            score = -gates if mode == "top" else gates
            score = np.where(on[:, part], score, np.inf)
        # Equal gates in an order of chance, not of their channels.
        chance = rng.random(gates.shape)
        place[:, part] = np.argsort(np.lexsort((chance, score), axis=-1), axis=-1)
    return place, count


def switched_off(place: np.ndarray, count: np.ndarray, share: float, layers: Layers) -> np.ndarray:
    """Which nodes `[N, G]` are among the first ceil(share * count) of their layer.

    Args:
      place: `[N, G]`, each node's place in its layer's order, from 0.
      count: `[N, L]`, nodes that a share of 1 takes from each layer.
      share: 0..1.
      layers: Where each layer's nodes stand.

    Raises:
      ValueError: For a share out of range.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in 0..1, not {share}")
    exact = Fraction(str(float(share)))
    # Of 55 % of 100, which floats put above 55.
    up = np.array([math.ceil(exact * n) for n in range(int(count.max(initial=0)) + 1)])
    off = np.zeros(place.shape, bool)
    for number, part in enumerate(layers.values()):
        off[:, part] = place[:, part] < up[count[:, number], None]
    return off


# Within layers -------------------------------------------------------------------------------


def correlation(first: Routes, second: Routes) -> dict[str, np.ndarray]:
    """For each layer the correlation of row i of one with row i of the other, `[N]`.

    NaN where a row's gates of the layer are all equal.

    Raises:
      ValueError: For routes of different layers or lengths.
    """
    _paired(first, second)
    return {
        name: np.diagonal(_correlations(first.layer(name), second.layer(name))).copy()
        for name in first.layers
    }


def cross_correlation(first: Routes, second: Routes) -> dict[str, np.ndarray]:
    """For each layer the correlation of each row of one with each of the other, `[N, M]`.

    NaN where a row's gates of the layer are all equal.

    Raises:
      ValueError: For routes of different layers.
    """
    _same_layers(first, second)
    return {name: _correlations(first.layer(name), second.layer(name)) for name in first.layers}


def _correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Pearson correlation of the rows of two matrices, `[N, M]`, NaN for constant rows."""
    unit = []
    for rows in (first, second):
        centred = rows.astype(float) - rows.mean(1, keepdims=True, dtype=float)
        centred[np.ptp(rows, 1) == 0] = 0
        length = np.sqrt((centred**2).sum(1, keepdims=True))
        unit.append(np.divide(centred, length, out=np.full_like(centred, np.nan), where=length > 0))
    return np.clip(unit[0] @ unit[1].T, -1, 1)


class Separability(NamedTuple):
    """How far the classes lie apart.

    Attributes:
      neighbours: Share of rows, 0..1, that most of their nearest other rows share the label
        with (leave-one-out).
      silhouette: -1..1; 0 where classes overlap.
      chance: Share of the most frequent label.
    """

    neighbours: float
    silhouette: float
    chance: float


def separability(rows: np.ndarray, labels: np.ndarray, neighbours: int = 5) -> Separability:
    """Numbers for the picture of an embedding, on any rows `[N, D]`.

    Args:
      rows: Such as one layer's gates, or their embedding.
      labels: `[N]` integers, of at least two classes and not all different.
      neighbours: Of each row, whose labels vote; among equal votes the nearest decides.

    Raises:
      ValueError: For too few rows or classes.
    """
    found, silhouettes = separable(rows, labels, neighbours)
    most = np.unique(labels, return_counts=True)[1].max()
    return Separability(
        float(found.mean()), float(silhouettes.mean()), float(most / len(silhouettes))
    )


def separable(
    rows: np.ndarray, labels: np.ndarray, neighbours: int = 5
) -> tuple[np.ndarray, np.ndarray]:
    """What `separability` is the mean of, for each row.

    Args:
      rows: As for `separability`.
      labels: As for `separability`.
      neighbours: As for `separability`.

    Returns:
      Whether its neighbours' vote is its label, `[N]` bool, and its silhouette, `[N]` float64.

    Raises:
      ValueError: For too few rows or classes.
    """
    rows, labels = np.asarray(rows, float), np.asarray(labels)
    if not 1 <= neighbours < len(rows):
        raise ValueError(f"neighbours must be in 1..{len(rows) - 1}, not {neighbours}")
    present, index = np.unique(labels, return_inverse=True)
    if not 2 <= len(present) < len(rows):
        raise ValueError(
            f"labels must be of 2 classes or more and fewer than rows, given {len(present)} "
            f"classes in {len(rows)} rows"
        )
    apart = distance.squareform(distance.pdist(rows))
    np.fill_diagonal(apart, np.inf)
    near = index[np.argsort(apart, axis=1, kind="stable")[:, :neighbours]]
    votes = (near[:, :, None] == np.arange(len(present))).sum(1)
    # The nearest row whose label has the most votes.
    most = np.take_along_axis(votes, near, 1) == votes.max(1, keepdims=True)
    found = near[np.arange(len(rows)), most.argmax(1)]
    return found == index, silhouette_samples(rows, labels)


def embedding(key: int, rows: np.ndarray, perplexity: float = 30.0) -> np.ndarray:
    """t-SNE of rows `[N, D]` in the plane, `[N, 2]` float32.

    Args:
      key: Seed.
      rows: Such as one layer's gates.
      perplexity: About how many rows each counts as near; less than N, and cut to a third of it.

    Raises:
      ValueError: For fewer than four rows.
    """
    rows = np.asarray(rows, np.float32)
    if len(rows) < 4:
        raise ValueError(f"rows must be at least 4, not {len(rows)}")
    start = "pca" if min(rows.shape) >= 2 and np.ptp(rows, 0).any() else "random"
    near = min(perplexity, (len(rows) - 1) / 3)
    # Of few rows the gradient is not approximated, which costs less than to share it out.
    method = "exact" if len(rows) <= _FEW_ROWS else "barnes_hut"
    tsne = TSNE(2, perplexity=near, init=start, random_state=key, method=method)
    return tsne.fit_transform(rows)


# Across layers -------------------------------------------------------------------------------


def prototypes(gates: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean route of each class: its labels `[K]` and gates `[K, G]` float32."""
    labels = _labels(gates, labels)
    present = np.unique(labels)
    means = [gates[labels == label].mean(0, dtype=float) for label in present]
    return present, np.array(means, np.float32)


class Clustering(NamedTuple):
    """Routes merged pair by pair, the closest first.

    Attributes:
      merges: `[N - 1, 4]`, as `scipy.cluster.hierarchy.linkage` returns: the two that merge,
        their distance, how many routes they hold.
      order: `[N]`, the routes from left to right in a dendrogram.
    """

    merges: np.ndarray
    order: np.ndarray

    def heights(self) -> np.ndarray:
        """`[N, N]`, the distance at which two routes come to lie in one cluster (cophenetic)."""
        return distance.squareform(hierarchy.cophenet(self.merges))

    def parts(self, count: int) -> np.ndarray:
        """Number of each route's cluster, `[N]` from 0, when cut into at most `count`."""
        if not 1 <= count <= len(self.order):
            raise ValueError(f"count must be in 1..{len(self.order)}, not {count}")
        return hierarchy.fcluster(self.merges, count, "maxclust") - 1


def cluster(gates: np.ndarray, method: str = "average") -> Clustering:
    """Agglomerative clustering of whole routes `[N, G]` by Euclidean distance.

    Args:
      gates: At least two rows.
      method: "average", "complete", "single" or "ward".

    Raises:
      ValueError: For an unknown method or fewer than two routes.
    """
    methods = ("average", "complete", "single", "ward")
    if method not in methods:
        raise ValueError(f"method must be one of {', '.join(methods)}, not {method!r}")
    gates = np.asarray(gates, float)
    if len(gates) < 2:
        raise ValueError(f"gates must have at least 2 rows to merge, not {len(gates)}")
    merges = hierarchy.linkage(gates, method)
    return Clustering(merges, hierarchy.leaves_list(merges))


def outliers(gates: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How odd each route of `[N, G]` is in its class, `[N]` float: the largest first to look at.

    The distance to the mean of the class's other routes, over the median of such distances in the
    class; 0 for a class of one, or of routes that are all equal.
    """
    labels = _labels(gates, labels)
    found = np.zeros(len(gates))
    for label in np.unique(labels):
        here = np.flatnonzero(labels == label)
        if len(here) < 2:
            continue
        rows = gates[here].astype(float)
        others = (rows.sum(0) - rows) / (len(here) - 1)
        apart = np.sqrt(((rows - others) ** 2).sum(1))
        middle = np.median(apart)
        found[here] = apart / middle if middle > 0 else np.where(apart > 0, np.inf, 0)
    return found


# Beside slices and effective paths -----------------------------------------------------------


class Similarity(NamedTuple):
    """How alike two explanations of the same images are, in each layer.

    Attributes:
      ranks: Layer to `[N]`, Spearman's correlation of the scores of its nodes; NaN where one
        side's are all equal.
      overlap: Layer to `[N]`, Jaccard similarity 0..1 of the nodes kept on the second side
        and as many of the highest on the first; NaN where there are none or all.
      chance: Layer to `[N]`, what `overlap` is on average for nodes drawn at random.
    """

    ranks: Mapping[str, np.ndarray]
    overlap: Mapping[str, np.ndarray]
    chance: Mapping[str, np.ndarray]


def similarity(
    key: int,
    first: np.ndarray,
    second: np.ndarray,
    layers: Layers,
    kept: np.ndarray | None = None,
) -> Similarity:
    """Compares scores of the nodes, `[N, G]`, such as gates and |CONTRIB| of their channels.

    Args:
      key: Seed of the order among equal scores.
      first: Scores, the higher the more important.
      second: Scores of the same images.
      layers: Where each layer's nodes stand.
      kept: `[N, G]` bool, the nodes that the second explanation keeps; None for those scored
        above 0.

    Raises:
      ValueError: For scores of different shapes.
    """
    first, second = np.asarray(first, float), np.asarray(second, float)
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(f"scores must have one shape [N, G], not {first.shape} and {second.shape}")
    kept = second > 0 if kept is None else kept
    chances = np.random.default_rng(key).random(first.shape)
    ranks, overlap, chance = {}, {}, {}
    for name, part in layers.items():
        a, b = first[:, part], second[:, part]
        ranks[name] = np.diagonal(_correlations(_ranked(a), _ranked(b))).copy()
        width, size = a.shape[1], kept[:, part].sum(1)
        place = np.argsort(np.lexsort((chances[:, part], -a), axis=-1), axis=-1)
        both = ((place < size[:, None]) & kept[:, part]).sum(1)
        told = (size > 0) & (size < width)
        overlap[name] = np.where(told, both / np.maximum(2 * size - both, 1), np.nan)
        by_chance = np.array([_overlap_by_chance(width, n) for n in range(width + 1)])
        chance[name] = np.where(told, by_chance[size], np.nan)
    return Similarity(ranks, overlap, chance)


def _overlap_by_chance(width: int, size: int) -> float:
    """Mean Jaccard similarity of two sets of `size` nodes drawn out of `width`."""
    both = np.arange(max(1, 2 * size - width), size + 1)
    chances = stats.hypergeom(width, size, size).pmf(both)
    return float((chances * both / (2 * size - both)).sum())


def _ranked(rows: np.ndarray) -> np.ndarray:
    return stats.rankdata(rows, axis=1)


def _labels(gates: np.ndarray, labels: np.ndarray) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != (len(gates),):
        raise ValueError(f"labels must be one for each of {len(gates)} routes, not {labels.shape}")
    return labels


def _same_layers(first: Routes, second: Routes) -> None:
    if dict(first.layers) != dict(second.layers):
        raise ValueError("the routes are of different layers")


def _paired(first: Routes, second: Routes) -> None:
    _same_layers(first, second)
    if len(first) != len(second):
        raise ValueError(f"the routes are of {len(first)} and {len(second)} images")
