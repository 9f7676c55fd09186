"""Features of inputs for classifiers: slices, effective paths and activations, kept on disk.

A slice of every input is far larger than memory (300,000 synapses for each of 10,000 images), so
features are extracted some images at a time, appended to a folder as one file a part, and read
back part by part. Slices are NNSlicer's (Zhang et al., ESEC/FSE 2020) or EffectivePath's (Qiu et
al., CVPR 2019).
"""

import dataclasses
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from scipy import sparse

import nnslicer_jax as nns
from nnslicer_jax.atomic import replacing
from nnslicer_jax.batches import filled
from nnslicer_jax.checkpoint import claim, digest
from nnslicer_jax.progress import Progress

# np.ndarray or scipy.sparse.csr_array, of which SciPy ships no types.
Matrix: TypeAlias = Any


class Table(NamedTuple):
    """Features of some inputs.

    Attributes:
      values: `[B, F]`: int16 CSR of CONTRIBs, or float16 activations.
      spans: Layer (a parameter or a neuron) to its columns, (first, one past the last).
    """

    values: Matrix
    spans: dict[str, tuple[int, int]]


Extract = Callable[[np.ndarray, np.ndarray], Table]


def contribs(piece: nns.Slice) -> Table:
    """Per-sample slices as sparse rows: the CONTRIB of every synapse, in the slice's order.

    A CONTRIB beyond int16 (one synapse used at more than 32,767 positions) is held at its limit.

    Raises:
      ValueError: If the slice's samples were summed.
    """
    if not piece.per_sample:
        raise ValueError("piece must be a slice made with per_sample=True, not a summed one")
    rows, spans = _beside(piece.synapses)
    return Table(sparse.csr_array(_saturated(rows, np.int16)), spans)


def activations(recorded: Mapping[str, Any]) -> Table:
    """Activations `[B, ...]` by neuron name as float16 rows, held at the limits of float16."""
    rows, spans = _beside(recorded)
    return Table(_saturated(rows, np.float16), spans)


def _beside(arrays: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, tuple[int, int]]]:
    flat = {name: np.asarray(array).reshape(len(array), -1) for name, array in arrays.items()}
    spans, at = {}, 0
    for name, array in flat.items():
        spans[name] = (at, at := at + array.shape[1])
    return np.concatenate(list(flat.values()), 1), spans


def _saturated(rows: np.ndarray, dtype: Any) -> np.ndarray:
    limits = np.iinfo(dtype) if np.issubdtype(dtype, np.integer) else np.finfo(dtype)
    return np.clip(rows, limits.min, limits.max).astype(dtype)


def slices(
    graph: nns.Graph, params: Any, profile: nns.Profile, *, theta: float, rule: str = "signed",
    batch_size: int = 64,
) -> Extract:  # fmt: skip
    """Extracts NNSlicer's slices for the criterion (image, class); see `slice_network`."""

    def extract(images: np.ndarray, outputs: np.ndarray) -> Table:
        return contribs(
            nns.slice_network(
                graph, params, profile, images, outputs, theta, rule, per_sample=True,
                batch_size=batch_size,
            )
        )  # fmt: skip

    return _by_batches(extract, batch_size)


def paths(graph: nns.Graph, params: Any, *, theta: float = 0.5, batch_size: int = 64) -> Extract:
    """Extracts effective paths for the criterion (image, class), 0 and 1; see `effective_path`."""
    # One call is of few images, for which "auto" may compile what many calls here share.
    select = "host" if jax.default_backend() == "cpu" else "device"

    def extract(images: np.ndarray, outputs: np.ndarray) -> Table:
        return contribs(
            nns.effective_path(
                graph,
                params,
                images,
                outputs,
                theta,
                per_sample=True,
                batch_size=batch_size,
                select=select,
            )
        )

    return _by_batches(extract, batch_size)


def maps(graph: nns.Graph, params: Any, neurons: Sequence[str], *, batch_size: int = 64) -> Extract:
    """Extracts the activations of some neurons; the class is not looked at.

    Raises:
      ValueError: For a neuron that the graph does not have, or none at all.
    """
    unknown = [name for name in neurons if name not in graph.neurons()]
    if unknown or not neurons:
        given = repr(unknown[0]) if unknown else "none"
        raise ValueError(f"neurons must name some of graph.neurons(), given {given}")

    @jax.jit
    def record(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        found = nns.evaluate(graph, params, images)[1]
        return {name: found[name] for name in neurons}

    def extract(images: np.ndarray, outputs: np.ndarray) -> Table:
        found = record(params, images)
        # A jitted function returns dictionaries in the order of their keys.
        return activations({name: found[name] for name in neurons})

    return _by_batches(extract, batch_size)


def _by_batches(extract: Extract, batch_size: int) -> Extract:
    """Extracts some images at a time, always as many, so that one compiled program serves."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")

    def extract_all(images: np.ndarray, outputs: np.ndarray) -> Table:
        made = []
        for which in filled(len(images), batch_size):
            values, spans = extract(images[which], outputs[which])
            made.append(values[: len(images) - which[0]])
        stack = sparse.vstack if sparse.issparse(made[0]) else np.concatenate
        return Table(stack(made), spans)

    return extract_all


def convolutions(graph: nns.Graph) -> list[str]:
    """Names of the neurons that are a convolution's output, in the network's order."""
    made = {node.outputs[0] for node in graph.nodes if node.key == "conv_general_dilated"}
    return [name for name, neuron in graph.neurons().items() if neuron.value in made]


def depths(graph: nns.Graph) -> dict[str, int]:
    """How deep in the network a layer stands: parameter or neuron to the place of its node.

    That of a parameter is the first operation on the sample that it reaches; one that reaches
    none is left out.
    """
    reach: dict[int, set[str]] = {ident: {name} for name, ident in graph.params.items()}
    found: dict[str, int] = {}
    made: dict[int, int] = {}
    for place, node in enumerate(graph.nodes):
        names = set().union(
            *(reach.get(i, set()) for i, data in zip(node.inputs, node.data, strict=True)
              if not data)
        )  # fmt: skip
        if any(node.data):
            for name in names:
                found.setdefault(name, place)
        else:
            reach.update({out: names for out in node.outputs})
        made.update({out: place for out in node.outputs})
    found.update({name: made.get(n.value, -1) for name, n in graph.neurons().items()})
    return found


def halfway(graph: nns.Graph) -> int:
    """The depth at which the second half of the layers with weights begins; see `depths`."""
    deep = depths(graph)
    weighted = sorted(
        {
            deep[name]
            for name in graph.params
            if name in deep
            and graph.nodes[deep[name]].key in ("conv_general_dilated", "dot_general")
        }
    )
    if len(weighted) < 2:
        raise ValueError("graph must have 2 layers with weights or more to have a first half")
    return weighted[len(weighted) // 2]


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """Features of many inputs in a folder, read back one part at a time.

    Attributes:
      folder: Where the parts are.
      count: Number of rows N.
      rows: Rows of a part; the last may have fewer.
      spans: Layer to its columns, (first, one past the last).
    """

    folder: Path
    count: int
    rows: int
    spans: Mapping[str, tuple[int, int]]

    @property
    def width(self) -> int:
        """Number of columns F."""
        return max(stop for _, stop in self.spans.values())

    def __len__(self) -> int:
        return self.count

    def parts(self) -> Iterator[tuple[slice, Matrix]]:
        """Which rows, and their features `[n, F]`; one part is in memory at a time."""
        for number, at in enumerate(range(0, self.count, self.rows)):
            span = slice(at, min(at + self.rows, self.count))
            yield span, _read(_part(self.folder, number), span.stop - at, self.width)

    def take(self, columns: np.ndarray) -> np.ndarray:
        """Some columns of all rows, `[N, k]` float32."""
        columns = np.asarray(columns)
        if len(columns) and not 0 <= columns.min() <= columns.max() < self.width:
            raise ValueError(
                f"columns must be in 0..{self.width - 1}, given {columns.min()}..{columns.max()}"
            )
        found = np.empty((self.count, len(columns)), np.float32)
        for span, part in self.parts():
            chosen = part[:, columns]
            found[span] = chosen.toarray() if sparse.issparse(chosen) else chosen
        return found


def write(
    folder: str | Path, images: np.ndarray, outputs: np.ndarray, extract: Extract,
    about: Mapping[str, Any], *, rows: int = 256, progress: str = "",
    made: Callable[[int], None] | None = None,
) -> Features:  # fmt: skip
    """Extracts the features of all images into a folder, or goes on where a run was cut off.

    Every part is written whole or not at all, and a part that is there is not made again.

    Args:
      folder: Made if it is missing; of one set of images and one way of extraction.
      images: `[N, ...]`.
      outputs: `[N]` integers, the class of each that a slice is made for.
      extract: Function of some images and their classes to a `Table`.
      about: What else must not change between a run and its resumption; JSON values.
      rows: Images of a part, which bounds the memory.
      progress: What to call the features in lines of progress; "" prints none.
      made: Called after each part that is written, with the number of its images.

    Raises:
      ValueError: For images that are empty or do not go with `outputs`, `rows` below 1, or a
        folder that holds the features of something else.
    """
    folder = Path(folder)
    if rows < 1:
        raise ValueError(f"rows must be at least 1, not {rows}")
    if not len(images):
        raise ValueError("images is empty; it must hold at least one image")
    if np.shape(outputs) != (len(images),):
        raise ValueError(
            f"outputs must be one class for each of {len(images)} images, not of shape "
            f"{np.shape(outputs)}"
        )
    mark = digest((images, np.asarray(outputs, "<i8")))
    run = {**about, "rows": rows, "count": len(images), "images": mark}
    claim(folder, run)
    line = None
    for number, at in enumerate(range(0, len(images), rows)):
        path = _part(folder, number)
        if path.exists():
            continue
        if progress and line is None:
            line = Progress(f"{progress}:", len(images), "images", at)
        stop = min(at + rows, len(images))
        values, spans = extract(images[at:stop], outputs[at:stop])
        _claim_spans(folder, spans)
        _write(path, values)
        if made:
            made(stop - at)
        if line:
            line.at(stop)
    return open_features(folder)


def open_features(folder: str | Path) -> Features:
    """The features that `write` left in a folder, without making any.

    Raises:
      ValueError: If the folder holds none, or not all of them.
    """
    folder = Path(folder)
    try:
        run = json.loads((folder / "run.json").read_text())
        spans = json.loads((folder / "spans.json").read_text())
        count, rows = int(run["count"]), int(run["rows"])
        found = {name: (int(first), int(stop)) for name, (first, stop) in spans.items()}
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{folder} holds no features; write makes them") from None
    for number in range(-(-count // rows)):
        if not _part(folder, number).exists():
            raise ValueError(f"{folder} lacks {_part(folder, number).name}; write goes on there")
    return Features(folder, count, rows, found)


def _part(folder: Path, number: int) -> Path:
    return folder / f"part_{number:05d}.npz"


def _claim_spans(folder: Path, spans: Mapping[str, tuple[int, int]]) -> None:
    path = folder / "spans.json"
    given = {name: list(span) for name, span in spans.items()}
    if not path.exists():
        with replacing(path) as partial:
            partial.write_text(json.dumps(given) + "\n")
    elif json.loads(path.read_text()) != given:
        raise ValueError(f"{folder}: extract returned other columns than for the parts before")


def _write(path: Path, values: Matrix) -> None:
    with replacing(path) as partial, partial.open("wb") as file:
        if sparse.issparse(values):
            np.savez(file, data=values.data, indices=values.indices, indptr=values.indptr)
        else:
            np.savez(file, dense=values)


def _read(path: Path, count: int, width: int) -> Matrix:
    try:
        # NumPy leaves a file open that it cannot read.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            if "dense" in file:
                values = file["dense"]
            else:
                parts = file["data"], file["indices"], file["indptr"]
                values = sparse.csr_array(parts, shape=(count, width))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a part of features, delete it ({reason})") from None
    if values.shape != (count, width):
        raise ValueError(f"{path}: expected features {(count, width)}, got {values.shape}")
    return values
