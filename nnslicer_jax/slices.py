"""A slice as data: which neurons and synapses are in it, and by how much.

Slices of one network combine, compare, shrink to a wanted size, and are kept as safetensors.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from nnslicer_jax.tensors import read_tensors, write_tensors


@dataclasses.dataclass(frozen=True)
class Slice:
    """CONTRIB of neurons and synapses; not zero means "in the slice".

    Attributes:
      synapses: Parameter path joined with "/" to integers of the parameter's shape; with
        `per_sample`, one more axis leads.
      neurons: Neuron name to integers of its activation's shape; likewise.
      axes: Neuron name to the channel axis of one sample's activation.
      count: Number of samples summed, or along the leading axis.
      per_sample: Whether a sample axis leads.
      criterion: How the slice was made: method, rule, theta, baseline.
    """

    synapses: Mapping[str, np.ndarray]
    neurons: Mapping[str, np.ndarray]
    axes: Mapping[str, int]
    count: int
    per_sample: bool = False
    criterion: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        kept, total = self.size()
        how = ", ".join(f"{k}={v}" for k, v in self.criterion.items())
        samples = f"{self.count} samples" + (", per sample" if self.per_sample else "")
        return f"Slice({kept:,} of {total:,} synapses, {samples}, {how})"

    def channels(self) -> dict[str, np.ndarray]:
        """CONTRIB of each neuron: the sum over its positions, `[C]` int64 (`[N, C]`)."""
        lead = int(self.per_sample)
        found = {}
        for name, contrib in self.neurons.items():
            keep = self.axes[name] + lead
            axes = tuple(a for a in range(lead, contrib.ndim) if a != keep)
            found[name] = contrib.sum(axes, dtype=np.int64)
        return found

    def size(self, layer: str | None = None) -> tuple[int, int]:
        """Synapses in the slice and in the network, or in one layer (a key of `synapses`)."""
        layers = self.synapses if layer is None else {layer: self.synapses[layer]}
        kept = sum(int(np.count_nonzero(v)) for v in layers.values())
        return kept, sum(v.size for v in layers.values())

    def sample(self, index: int) -> "Slice":
        """The slice of one sample out of a `per_sample` slice."""
        if not self.per_sample:
            raise ValueError("sample() needs a slice made with per_sample=True")
        if not -self.count <= index < self.count:
            raise ValueError(f"sample index must be below {self.count}, not {index}")
        return self._map(lambda v: v[index], count=1, per_sample=False)

    def total(self) -> "Slice":
        """The slice of all samples together: the signed sum of a `per_sample` slice."""
        if not self.per_sample:
            return self
        return self._map(lambda v: v.sum(0, dtype=np.int64), per_sample=False)

    def __add__(self, other: "Slice") -> "Slice":
        """The slice of both sets of samples together: CONTRIB adds up.

        Raises:
          ValueError: If the slices are of different networks, or were made in different ways.
        """
        self._same(other)
        if self.criterion != other.criterion:
            keys = {**self.criterion, **other.criterion}
            odd = [k for k in keys if self.criterion.get(k) != other.criterion.get(k)]
            raise ValueError(
                f"slices made in different ways do not add up: {', '.join(odd)} differ"
            )
        if self.per_sample:
            return self._zip(
                other, lambda a, b: np.concatenate([a, b]), count=self.count + other.count
            )
        return self._zip(
            other, lambda a, b: np.add(a, b, dtype=np.int64), count=self.count + other.count
        )

    def union(self, other: "Slice") -> "Slice":
        """What is in either slice; where in both, the contribution larger in magnitude.

        Slices of single classes thus compose into a model of several, run by `mask_network`.
        """
        self._paired(other)

        def larger(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            # At equal magnitudes the positive one, so that the order does not matter.
            first = (np.abs(a) > np.abs(b)) | ((np.abs(a) == np.abs(b)) & (a >= b))
            return np.where(first, a, b)

        return self._zip(other, larger, count=self.count + other.count)

    def intersection(self, other: "Slice") -> "Slice":
        """What is in both slices, with this slice's contributions."""
        self._paired(other)
        return self._zip(other, lambda a, b: np.where(b != 0, a, 0), count=self.count)

    def difference(self, other: "Slice") -> "Slice":
        """What is in this slice and not in the other."""
        self._paired(other)
        return self._zip(other, lambda a, b: np.where(b == 0, a, 0), count=self.count)

    def similarity(self, other: "Slice", by: str = "synapses") -> float:
        """Jaccard similarity, 0..1: how much of what is in either slice is in both.

        Args:
          other: A slice of the same network.
          by: "synapses" or "neurons" (activations).
        """
        self._paired(other)
        if by not in ("synapses", "neurons"):
            raise ValueError(f"by must be synapses or neurons, not {by!r}")
        mine, theirs = getattr(self, by), getattr(other, by)
        both = sum(int(np.count_nonzero((mine[k] != 0) & (theirs[k] != 0))) for k in mine)
        either = sum(int(np.count_nonzero((mine[k] != 0) | (theirs[k] != 0))) for k in mine)
        return both / either if either else 1.0

    def threshold(self, ratio: float) -> "Slice":
        """The same slice with, in each layer, only its most contributing synapses.

        Args:
          ratio: Share of each layer's synapses to keep, 0..1: the ceil(ratio * n) with the
            largest |CONTRIB| that is not 0, equal ones by position. Neurons stay.
        """
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio must be in 0..1, not {ratio}")
        if self.per_sample:
            raise ValueError("threshold() needs one slice; take sample(i) or total() first")

        def most(contrib: np.ndarray) -> np.ndarray:
            # Of 55 % of 100, which floats put above 55.
            keep = math.ceil(Fraction(str(ratio)) * contrib.size)
            order = np.argsort(-np.abs(contrib), axis=None, kind="stable")[:keep]
            chosen = np.zeros(contrib.size, bool)
            chosen[order] = True
            return np.where(chosen.reshape(contrib.shape), contrib, 0)

        return dataclasses.replace(self, synapses={k: most(v) for k, v in self.synapses.items()})

    def save(self, path: str | Path) -> None:
        """Writes the slice to a safetensors file, whole or not at all."""
        arrays = {f"synapses:{k}": np.asarray(v, order="C") for k, v in self.synapses.items()}
        arrays |= {f"neurons:{k}": np.asarray(v, order="C") for k, v in self.neurons.items()}
        about = {
            "count": self.count,
            "per_sample": self.per_sample,
            "axes": dict(self.axes),
            "criterion": dict(self.criterion),
        }
        write_tensors(path, arrays, {"slice": json.dumps(about)})

    def _same(self, other: "Slice") -> None:
        mine = {k: v.shape[int(self.per_sample) :] for k, v in self.synapses.items()}
        theirs = {k: v.shape[int(other.per_sample) :] for k, v in other.synapses.items()}
        mine |= {k: v.shape[int(self.per_sample) :] for k, v in self.neurons.items()}
        theirs |= {k: v.shape[int(other.per_sample) :] for k, v in other.neurons.items()}
        if mine != theirs:
            raise ValueError("the slices are of different networks")
        if self.per_sample != other.per_sample:
            raise ValueError("one slice is per sample, the other is not; take total() first")

    def _paired(self, other: "Slice") -> None:
        self._same(other)
        if self.per_sample and self.count != other.count:
            raise ValueError(f"the slices hold {self.count} and {other.count} samples")

    def _map(self, fn: Callable, **changes: Any) -> "Slice":
        return dataclasses.replace(
            self,
            synapses={k: fn(v) for k, v in self.synapses.items()},
            neurons={k: fn(v) for k, v in self.neurons.items()},
            **changes,
        )

    def _zip(self, other: "Slice", fn: Callable, **changes: Any) -> "Slice":
        return dataclasses.replace(
            self,
            synapses={k: fn(v, other.synapses[k]) for k, v in self.synapses.items()},
            neurons={k: fn(v, other.neurons[k]) for k, v in self.neurons.items()},
            **changes,
        )


def load_slice(path: str | Path) -> Slice:
    """Reads what `Slice.save` wrote.

    Raises:
      ValueError: If the file is missing, truncated, or no slice.
    """
    arrays, about = read_tensors(
        path, "slice", {"count": int, "per_sample": bool, "axes": dict, "criterion": dict}
    )
    parts: dict[str, dict[str, np.ndarray]] = {"synapses": {}, "neurons": {}}
    for key, array in arrays.items():
        kind, _, name = key.partition(":")
        if kind not in parts or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{path} is not a slice: it holds {key!r}")
        if about["per_sample"] and array.shape[:1] != (about["count"],):
            raise ValueError(f"{path} is not a slice of {about['count']} samples: {key!r} is not")
        parts[kind][name] = array
    lead = int(about["per_sample"])
    axes = about["axes"]
    if set(axes) != set(parts["neurons"]) or not all(
        axes[name] in range(max(array.ndim - lead, 1)) for name, array in parts["neurons"].items()
    ):
        raise ValueError(f"{path} is not a slice: its axes are not those of its neurons")
    return Slice(parts["synapses"], parts["neurons"], **about)
