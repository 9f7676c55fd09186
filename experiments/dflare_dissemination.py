"""What the cost of a trigger says of a compressed model: figures 5, 6 and 7.

Tian et al., TOSEM 2023, section 5.4. 5.4.1: of the weights of an original model a share p is made
larger or smaller by 10 %; the more there are, the fewer queries a trigger should need. 5.4.2: of a
network one convolution at a time is pruned; accuracies are alike, the queries differ. The paper
takes VGG-16 for it and does not say how much is pruned; here it is 10 % of ResNet-10 by default.
The published ResNet-20 wants exact pixels of CIFAR-10, which ``--images`` names.

``python -m experiments.dflare_dissemination --pairs_dir ... --data_dir ...`` takes two cores about
an hour with ``--schedule cpu``: 60 seeds of DFlare and 50 of DiffChaser for each convolution.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from matplotlib.figure import Figure

import difftest
import nnslicer_jax as nns
from difftest.diffchaser import diffchase
from experiments import page, pairs
from experiments.provenance import ROOT, origin
from experiments.robust_pruning import write
from nnslicer_jax import data, training, zoo
from nnslicer_jax.atomic import replacing
from nnslicer_jax.checkpoint import claim, digest
from prune import masks

TITLE = "Dissemination: what the cost of a trigger says of a compressed model"
TEXT = (
    "Tian et al., TOSEM 2023, section 5.4. Above, weights of the original model changed by 10 %, "
    "up or down at random: queries and seconds of the released search, and their Pearson "
    "correlation with the share of weights that was changed. Below, networks in which one "
    "convolution was pruned by magnitude, without fine-tuning: accuracy, and the cost of a "
    "trigger; that network is ResNet-10 of which 10 % of a convolution are pruned, where the row "
    "names no other, the paper's is VGG-16. Seconds are a seed's share of its batches. Means are "
    "over the seeds alone whose trigger still triggers when asked anew, so that seeds that spent "
    "their queries enter the success rate only; n counts those triggers, of success rates the "
    "seeds searched. L2 is the distance of a trigger from its seed on the 0-1 scale; labels are "
    "kept where the original model gives the trigger the label of its seed. DFlare's seconds do "
    "not contain compiling, nor do DiffChaser's."
)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
CHANGE = 0.1


class Published(NamedTuple):
    """Pearson correlation of the share with seconds and with queries."""

    seconds: float
    queries: float


PUBLISHED = {"lenet5": Published(-0.989, -0.972), "resnet20": Published(-0.968, -0.967)}
TITLES = {"lenet5": "LeNet-5", "resnet20": "ResNet-20"}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How much is run.

    Attributes:
      changed: Seeds and random seeds of 5.4.1, by network.
      pruned: Seeds and random seeds of 5.4.2.
      chased: Seeds of DiffChaser there.
      accuracy: Test images that accuracies are of; None: all.
      max_queries: Of one seed.
      chased_queries: Of one seed of DiffChaser.
      share: Of a convolution's weights that is pruned.
    """

    changed: dict[str, tuple[int, int]]
    pruned: tuple[int, int]
    chased: int
    accuracy: int | None
    max_queries: int = 10_000
    chased_queries: int = 10_000
    share: float = 0.1


SCHEDULES = {
    "cpu": Schedule({"lenet5": (300, 3), "resnet20": (60, 2)}, (60, 1), 50, None, 2_000, 20_000),
    "published": Schedule(
        {"lenet5": (500, 5), "resnet20": (500, 5)}, (500, 5), 500, None, 1_000_000, 1_000_000
    ),
    "tiny": Schedule({"lenet5": (6, 1)}, (5, 1), 2, 40, 100, 100),
}


class Cost(NamedTuple):
    """What triggers cost, one value a random seed.

    Attributes:
      queries: Means over the seeds with a trigger; None without any.
      seconds: The same.
      found: Seeds whose trigger still triggers, asked anew.
      searched: Seeds on which the pair did not disagree before.
      l2: Median distances of the triggers from their seeds, on the 0-1 scale.
      kept: Shares in per cent of the triggers to which the original model gives the seed's label.
    """

    queries: list[float | None]
    seconds: list[float | None]
    found: list[int]
    searched: list[int]
    l2: list[float | None]
    kept: list[float | None]


def changed(params: Any, share: float, key: jax.Array) -> Any:
    """The parameters, of which a share of the weights is 10 % larger or smaller, at random.

    Args:
      params: Any pytree; leaves of at least two axes are weights.
      share: 0..1; each array's number of changed weights is the nearest whole one.
      key: Of the draw.
    """
    leaves, structure = jax.tree.flatten(params)
    made = []
    for leaf, one in zip(leaves, jax.random.split(key, len(leaves)), strict=True):
        if jnp.ndim(leaf) < 2:
            made.append(leaf)
            continue
        which, signs = jax.random.split(one)
        order = jax.random.permutation(which, leaf.size).reshape(leaf.shape)
        sign = jax.random.rademacher(signs, leaf.shape, leaf.dtype)
        made.append(jnp.where(order < round(share * leaf.size), leaf * (1 + CHANGE * sign), leaf))
    return jax.tree.unflatten(structure, made)


def one_pruned(variables: Any, layer: tuple[str, ...], share: float) -> Any:
    """The variables, 0 at the least weights of one layer's kernel."""
    flat = dict(flax.traverse_util.flatten_dict(variables))
    kernel = flat[layer]
    kept = masks.topk({"kernel": jnp.abs(kernel)}, 1 - share)["kernel"]
    flat[layer] = jnp.where(kept, kernel, 0)
    return flax.traverse_util.unflatten_dict(flat)


def convolutions(model: Any, variables: Any, shape: Sequence[int]) -> list[tuple[str, ...]]:
    """Paths of the kernels of four axes, in the order in which an image meets them."""
    graph = nns.trace(model.apply, variables, np.zeros((1, *shape), np.float32))
    names = {value: name for name, value in graph.params.items()}
    used = [
        names[node.inputs[1]]
        for node in graph.nodes
        if node.primitive.name == "conv_general_dilated" and node.inputs[1] in names
    ]
    return [tuple(name.split("/")) for name in used]


def cost(
    pair: difftest.ModelPair, images: np.ndarray, count: int, searches: int, most: int,
    chased: bool = False, path: Path | None = None,
) -> Cost:  # fmt: skip
    """What triggers cost, from the same seeds for every pair.

    Args:
      pair: The models.
      images: uint8 `[N, H, W, C]`, of which seeds are drawn.
      count: Seeds of a random seed.
      searches: Random seeds.
      most: Queries of a seed.
      chased: By DiffChaser.
      path: Beside it, what was found of each random seed is kept; None: nowhere.
    """
    told = Cost([], [], [], [], [], [])
    for search in range(searches):
        seeds = images[np.random.default_rng(search).permutation(len(images))[:count]]
        key = jax.random.key(search)
        checkpoint = None if path is None else path.with_name(f"{path.stem}_{search}.npz")
        run = diffchase if chased else difftest.search
        result = run(pair, seeds, key, max_queries=most, checkpoint=checkpoint)
        good = result.success & difftest.confirm(pair, result)
        some = bool(good.any())
        told.queries.append(float(result.queries[good].mean()) if some else None)
        told.seconds.append(float(result.seconds[good].mean()) if some else None)
        told.l2.append(float(np.median(result.l2[good])) if some else None)
        told.kept.append(100 * float(result.keeps_label[good].mean()) if some else None)
        told.found.append(int(good.sum()))
        told.searched.append(int(result.searched.sum()))
    return told


def kept(path: Path, made: Any) -> Any:
    """What an earlier run wrote there, or what is made now, written."""
    if path.exists():
        return json.loads(path.read_text())
    started = time.monotonic()
    found = made()
    with replacing(path) as part:
        part.write_text(json.dumps(found))
    print(f"{path.stem}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return found


def correlation(
    name: str, model: difftest.JaxModel, images: np.ndarray, schedule: Schedule, folder: Path
) -> dict[float, Cost]:
    """5.4.1 for one network: what a trigger costs at each share.

    Raises:
      ValueError: For a folder of another run.
    """
    count, searches = schedule.changed[name]
    claim(folder, {
        "measures": list(Cost._fields),
        "images": digest(images), "count": [count, searches], "max_queries": schedule.max_queries,
        "answers": pairs.probe([model(images[:16])]),
    })  # fmt: skip
    found = {}
    for place, share in enumerate(SHARES):
        params = changed(model.params, share, jax.random.key(place))
        twin = dataclasses.replace(model, params=params)
        # A warm start, here and below: seconds are those of searching, not of compiling.
        pair = difftest.ModelPair(model, twin)
        path = folder / f"{name}_{share}.json"

        def run(pair: difftest.ModelPair = pair, path: Path = path) -> Cost:
            cost(pair, images, min(count, 8), 1, schedule.max_queries)
            return cost(pair, images, count, searches, schedule.max_queries, path=path)

        found[share] = Cost(*kept(path, run))
    return found


class Layer(NamedTuple):
    """One convolution pruned: accuracy in per cent, and what triggers cost."""

    name: str
    accuracy: float
    dflare: Cost
    chased: Cost


def layers(
    network: str, dataset: data.Dataset, schedule: Schedule, folder: Path
) -> tuple[float, list[Layer]]:
    """5.4.2: the original's accuracy, and each network with one convolution pruned.

    Raises:
      ValueError: For a folder of another run.
    """
    trained = zoo.load(network)
    model, variables = trained.model, trained.variables
    images, labels = (
        part[: schedule.accuracy] for part in (dataset.test_images, dataset.test_labels)
    )

    def accuracy(of: Any) -> float:
        return 100 * training.count_correct(model, of, images, labels) / len(labels)

    apply: Any = model.apply
    original = difftest.jax_model(apply, variables)
    count, searches = schedule.pruned
    most = schedule.max_queries
    seeds = np.asarray(dataset.test_images)
    claim(folder, {
        "measures": list(Cost._fields),
        "images": digest(seeds), "pruned": [count, searches], "share": schedule.share,
        "accuracy": schedule.accuracy, "max_queries": most,
        "answers": pairs.probe([original(seeds[:16])]),
    })  # fmt: skip
    # Beside that claim, not in it: DiffChaser's seeds may change, DFlare's results stay good.
    limits: dict[str, Any] = {
        "chased": schedule.chased, "chased_queries": schedule.chased_queries
    }  # fmt: skip
    limits |= {"measures": list(Cost._fields)}
    claim(folder / "chased", {"images": digest(seeds), **limits})
    whole = kept(folder / "whole.json", lambda: accuracy(variables))
    found = []
    for place, path in enumerate(convolutions(model, variables, images.shape[1:])):
        smaller = one_pruned(variables, path, schedule.share)
        pair = difftest.ModelPair(original, difftest.jax_model(apply, smaller))

        searched_at = folder / f"layer_{place}.json"
        chased_at = folder / "chased" / f"layer_{place}.json"

        def searched(
            pair: difftest.ModelPair = pair, smaller: Any = smaller, path: Path = searched_at
        ) -> Any:
            cost(pair, seeds, min(count, 8), 1, most)
            return [accuracy(smaller), cost(pair, seeds, count, searches, most, path=path)]

        def chased(pair: difftest.ModelPair = pair, path: Path = chased_at) -> Cost:
            limits = (schedule.chased, searches, schedule.chased_queries)
            return cost(pair, seeds, *limits, chased=True, path=path)

        right, dflare = kept(searched_at, searched)
        diffchaser = kept(chased_at, chased)
        name = "/".join(path[1:-1])
        found.append(Layer(name, right, Cost(*dflare), Cost(*diffchaser)))
    return whole, found


# Results --------------------------------------------------------------------------------------


def mean(values: Sequence[float | None]) -> float | None:
    """Over those that are there; None where none is."""
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def _drawn(values: Sequence[float | None]) -> float:
    found = mean(values)
    return np.nan if found is None else found


def _cost_rows(row: str, one: Cost) -> list[dict[str, Any]]:
    found, searched = sum(one.found), sum(one.searched)
    shares = [100 * part / all_ for part, all_ in zip(one.found, one.searched, strict=True) if all_]
    made = []
    for metric, unit, values, n, none in (
        ("success rate", "%", shares, searched, "the pair disagreed on every seed"),
        ("mean queries", "", one.queries, found, "no trigger was found"),
        ("mean seconds", "s", one.seconds, found, "no trigger was found"),
        ("median L2", "", one.l2, found, "no trigger was found"),
        ("labels kept", "%", one.kept, found, "no trigger was found"),
    ):
        there = [value for value in values if value is not None]
        made.append({
            "row": row, "metric": metric, "unit": unit, "n": n, "ours": mean(there),
            "spread": float(np.std(there, ddof=1)) if len(there) > 1 else None,
            "note": "" if there else none, "seeds": tuple(range(len(one.found))),
        })  # fmt: skip
    return made


def _pearson(one: Sequence[float], other: Sequence[float | None]) -> tuple[float, int] | None:
    """Correlation of those that are there, and how many they are."""
    both = [(x, y) for x, y in zip(one, other, strict=True) if y is not None]
    xs, ys = zip(*both, strict=True) if both else ((), ())
    if len(set(xs)) < 2 or len(set(ys)) < 2:
        return None
    return round(float(np.corrcoef(xs, ys)[0, 1]), 3), len(both)


def correlation_rows(name: str, found: dict[float, Cost]) -> list[dict[str, Any]]:
    """Fields of the rows of 5.4.1 for one network."""
    made = []
    for share, one in found.items():
        made += _cost_rows(f"{TITLES[name]}, {share:.0%} of the weights", one)
    for metric in ("queries", "seconds"):
        told = _pearson(list(found), [mean(getattr(one, metric)) for one in found.values()])
        if told:
            made.append({
                "row": TITLES[name], "metric": f"correlation of the share with mean {metric}",
                "ours": told[0], "n": told[1], "published": getattr(PUBLISHED[name], metric),
                "seeds": _searches(found.values()),
            })  # fmt: skip
    return made


def layer_rows(
    network: str, whole: float, found: list[Layer], schedule: Schedule
) -> list[dict[str, Any]]:
    """Fields of the rows of 5.4.2."""
    made: list[dict[str, Any]] = [
        {"row": network, "metric": "accuracy", "unit": "%", "ours": round(whole, 2), "seeds": ()}
    ]
    for place, layer in enumerate(found, 1):
        row = f"{network}, convolution {place} of {len(found)} pruned"
        note = f"{schedule.share:.0%} of {layer.name}"
        made.append({"row": row, "metric": "accuracy", "unit": "%", "note": note,
                     "ours": round(layer.accuracy, 2), "seeds": ()})  # fmt: skip
        for words, one in (("DFlare", layer.dflare), ("DiffChaser", layer.chased)):
            made += _cost_rows(f"{row}, {words}", one)
    told = _pearson(
        [layer.accuracy for layer in found], [mean(layer.dflare.queries) for layer in found]
    )
    if told:
        made.append({
            "row": network, "metric": "correlation of accuracy with mean queries",
            "ours": told[0], "n": told[1], "seeds": _searches(layer.dflare for layer in found),
        })  # fmt: skip
    return made


def _searches(costs: Iterable[Cost]) -> tuple[int, ...]:
    """The random seeds of searches."""
    return tuple(range(max(len(one.found) for one in costs)))


def save_correlation(found: dict[str, dict[float, Cost]], path: Path) -> None:
    """Figure 5."""
    drawn: Figure = page.drawing(2.6 * len(found))
    panels = drawn.subplots(len(found), 2, squeeze=False)
    for line, (name, costs) in zip(panels, found.items(), strict=True):
        for ax, metric, colour in zip(line, ("queries", "seconds"), page.COLOURS, strict=False):
            shares = [100 * share for share in costs]
            values = [_drawn(getattr(one, metric)) for one in costs.values()]
            ax.plot(shares, values, "o-", color=colour)
            ax.set(xlabel="% of weights changed", ylabel=f"mean {metric} a trigger",
                   title=TITLES[name])  # fmt: skip
            ax.margins(y=0.15)
            ax.set_ylim(bottom=0)
    _save(drawn, path)


def save_layers(network: str, whole: float, found: list[Layer], folder: Path) -> None:
    """Figures 6 and 7."""
    places = np.arange(1, len(found) + 1)
    drawn: Figure = page.drawing(2.8)
    ax = drawn.subplots()
    ax.bar(places, [layer.accuracy for layer in found], color=page.COLOURS[0])
    ax.axhline(whole, color="black", linestyle="--", label=f"nothing pruned: {whole:.2f} %")
    shown = [whole, *(layer.accuracy for layer in found)]
    ax.set(xlabel="convolution that is pruned", ylabel="accuracy, %", title=network,
           ylim=(min(shown) - 1, max(shown) + 1), xticks=places)  # fmt: skip
    ax.legend(frameon=False, fontsize="small")
    _save(drawn, folder / "layers_accuracy.png")
    kinds = (
        ("DFlare", [layer.dflare for layer in found]),
        ("DiffChaser", [layer.chased for layer in found]),
    )
    drawn = page.drawing(2.6 * len(kinds))
    panels = drawn.subplots(len(kinds), 2, squeeze=False)
    for line, (words, costs) in zip(panels, kinds, strict=True):
        for ax, metric, colour in zip(line, ("queries", "seconds"), page.COLOURS, strict=False):
            ax.bar(places, [_drawn(getattr(one, metric)) for one in costs], color=colour)
            ax.set(xlabel="convolution that is pruned", ylabel=f"mean {metric} a trigger",
                   title=words)  # fmt: skip
    _save(drawn, folder / "layers_cost.png")


def _save(drawn: Figure, path: Path) -> None:
    with replacing(path) as part, part.open("wb") as file:
        drawn.savefig(file, format="png")


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS
    schedule = SCHEDULES[given.schedule]
    about = origin(data="", seeds=range(max(n for _, n in schedule.changed.values())))
    folder = Path(given.work or f"out/dflare_dissemination/{given.schedule}")
    figures = Path(given.figures)
    made: list[dict[str, Any]] = []
    curves: dict[str, dict[float, Cost]] = {}
    try:
        if given.pairs_dir:
            for name in schedule.changed:
                pair, called, _ = pairs.pair(name, given.data_dir, given.pairs_dir)
                original: Any = pair.original
                images, _, words, _ = pairs.images_of(called, given.data_dir, given.images)
                curves[name] = correlation(name, original, images, schedule, folder / name)
                made += [{**row, "data": words} for row in correlation_rows(name, curves[name])]
            save_correlation(curves, figures / "correlation.png")
        dataset = data.load(zoo.load(given.network).card["data"], given.data_dir)
        own = folder / given.network
        found = layers(given.network, dataset, schedule, own)
        made += [{**row, "data": _said(dataset)}
                 for row in layer_rows(given.network, *found, schedule)]  # fmt: skip
        save_layers(given.network, *found, figures)
    except (OSError, ValueError, difftest.ModelError) as error:
        sys.exit(f"error: {error}")
    write(Path(given.out), "dflare_dissemination", TITLE, TEXT, about, made)


def _said(dataset: data.Dataset) -> str:
    jpeg = " (JPEG re-encodings)" if "JPEG" in dataset.note else ""
    return f"{dataset.name}{jpeg}, test set"


def _define_flags() -> None:
    # Flags are global, and every study has an --out: defined here, modules import side by side.
    flags.DEFINE_string("pairs_dir", None, "folder of the published pairs; None leaves 5.4.1 out")
    flags.DEFINE_string("network", "resnet10_cifar10", "of the zoo, whose convolutions are pruned")
    flags.DEFINE_string("data_dir", None, "folder searched first for the data sets")
    flags.DEFINE_string("images", None, ".npz file whose test images stand for CIFAR-10's in 5.4.1")
    flags.DEFINE_enum("schedule", "cpu", sorted(SCHEDULES), "how much is run")
    results = ROOT / "experiments" / "results" / "dflare_dissemination.json"
    flags.DEFINE_string("out", str(results), "results file")
    flags.DEFINE_string("work", None, "folder for what is done so far")
    flags.DEFINE_string("figures", "out/dflare_dissemination", "folder of the figures")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
