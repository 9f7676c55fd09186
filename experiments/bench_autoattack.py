"""AutoAttack's four attacks beside those of the torchattacks package: what each leaves.

Both attack the same images on the same network, whose weights are copied to PyTorch; what either
finds is judged by this project's network, within eps and the bounds. Reproduced is the standard
version of the ensemble of Croce and Hein, "Reliable evaluation of adversarial robustness with an
ensemble of diverse parameter-free attacks", ICML 2020. By default 1,000 images and the published
budget: 100 steps, 9 targets, 5,000 queries; on two cores, tens of minutes for a network of MNIST's
size.
"""

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags

import nnslicer_jax as nns
from experiments import record
from experiments.provenance import ROOT, origin
from nnslicer_jax import attacks, data
from prune import evaluate

TITLE = "AutoAttack beside torchattacks"
TEXT = (
    "Accuracy in per cent that each attack of the ensemble leaves when it alone attacks all the "
    "images, ours and that of torchattacks on the same weights in PyTorch, both judged by our "
    "network; torchattacks stands for the reference package, which no index of packages "
    "holds. The spread is the 95 % interval over images (Clopper and Pearson). The difference "
    "is of the same images; the target is half a point."
)
# In points of accuracy.
TARGET = 0.5
# Images that torchattacks is given at once.
BATCH_SIZE = 250


class Budget(NamedTuple):
    """How long the attacks search.

    Attributes:
      steps: Of APGD and FAB.
      targets: Classes that the targeted attacks go for, below the number of classes.
      queries: Of Square.
    """

    steps: int
    targets: int
    queries: int


class Twin(NamedTuple):
    """How a network of this project is laid out, for PyTorch.

    Attributes:
      stride: Of its convolutions.
      padding: Of its convolutions.
      pool: Whether a maximum over 2x2 follows each.
    """

    stride: int
    padding: int
    pool: bool


TWINS: Mapping[str, Twin] = {
    "cnn_small": Twin(2, 1, False),
    "digits_cnn": Twin(1, 1, True),
    "mnist_cnn": Twin(1, 0, True),
}


class Case(NamedTuple):
    """A network and images.

    Attributes:
      name: Of the network.
      apply: `apply(params, images) -> logits`.
      params: Its parameters.
      images: `[N, H, W, C]` float32, 0..1.
      labels: `[N]` int32.
      data: Data set and split, in words.
      twin: Makes the same network in PyTorch, for images `[N, C, H, W]`; None: there is none.
    """

    name: str
    apply: Callable
    params: Any
    images: np.ndarray
    labels: np.ndarray
    data: str
    twin: Callable[[], Any] | None


def prepare(name: str, count: int, data_dir: str | None) -> Case:
    """Loads a network of the zoo and the first `count` test images of its data.

    Raises:
      ValueError: For a network that has no twin, or fewer images than that.
    """
    trained = nns.zoo.load(name)
    layout = trained.card["model"]
    if layout not in TWINS:
        raise ValueError(f"model must be one of {', '.join(TWINS)}, not {name}, a {layout}")
    found = data.load(trained.card["data"], data_dir)
    images = data.to_float(np.asarray(found.test_images[:count]))
    if len(images) < count:
        raise ValueError(f"images is {count}, but {found.name} has only {len(images)} to test on")
    note = f" ({found.note})" if found.note else ""
    return Case(
        name,
        trained.model.apply,
        trained.variables,
        images,
        np.asarray(found.test_labels[:count]).astype(np.int32),
        f"{trained.card['data']}, first {count} test images{note}",
        functools.partial(twin, TWINS[layout], trained.model, trained.variables),
    )


def twin(layout: Twin, module: Any, variables: Any) -> Any:
    """The network as a `torch.nn.Module` of the same weights."""
    torch = importlib.import_module("torch")
    params = variables["params"]
    convolutions = [params[f"Conv_{i}"] for i in range(sum(n.startswith("Conv") for n in params))]
    dense = [params[f"Dense_{i}"] for i in range(sum(n.startswith("Dense") for n in params))]
    mean, std = (getattr(module, name, value) for name, value in (("mean", 0.0), ("std", 1.0)))

    def tensor(array: Any) -> Any:
        return torch.nn.Parameter(torch.from_numpy(np.array(array, np.float32)))

    base: Any = torch.nn.Module

    class Network(base):
        def __init__(self) -> None:
            super().__init__()
            flat = [tensor(np.transpose(p["kernel"], (3, 2, 0, 1))) for p in convolutions]
            flat += [tensor(np.transpose(p["kernel"])) for p in dense]
            self.kernels = torch.nn.ParameterList(flat)
            self.biases = torch.nn.ParameterList(
                [tensor(p["bias"]) for p in (*convolutions, *dense)]
            )

        def forward(self, x: Any) -> Any:
            f = torch.nn.functional
            x = (x - mean) / std
            last = len(self.kernels) - 1
            for i, (kernel, bias) in enumerate(zip(self.kernels, self.biases, strict=True)):
                if i < len(convolutions):
                    x = f.relu(f.conv2d(x, kernel, bias, layout.stride, layout.padding))
                    x = f.max_pool2d(x, 2) if layout.pool else x
                    continue
                if i == len(convolutions):
                    # Flattened with channels last, as here.
                    x = x.permute(0, 2, 3, 1).flatten(1)
                x = f.linear(x, kernel, bias)
                x = x if i == last else f.relu(x)
            return x

    return Network().eval()


def ensemble(budget: Budget) -> dict[str, Callable]:
    """Our attacks, by name."""
    steps, targets = budget.steps, budget.targets
    return {
        "apgd-ce": functools.partial(attacks.apgd, steps=steps),
        "apgd-t": functools.partial(
            attacks.apgd, loss="dlr-targeted", steps=steps, targets=targets
        ),
        "fab-t": functools.partial(attacks.fab, steps=steps, targets=targets),
        "square": functools.partial(attacks.square, queries=budget.queries),
    }


def measure(
    case: Case, eps: float, budget: Budget, seed: int, reference: Any
) -> list[dict[str, Any]]:
    """The row fields of every attack and of all together.

    Args:
      case: The network and the images.
      eps: Largest change of a pixel.
      budget: Of the attacks.
      seed: Of the attacks.
      reference: The torchattacks package; None: ours alone.

    Raises:
      ValueError: If the twin's logits are not those of the network.
    """
    rows: list[dict[str, Any]] = []
    given = (case.apply, case.params, case.images, case.labels)
    benign = evaluate.benign(*given)
    count = len(case.labels)

    def say(row: str, metric: str, value: float, unit: str, **more: Any) -> None:
        rows.append({"row": row, "metric": metric, "ours": value, "unit": unit, "n": count, **more})
        print(f"{row}: {metric} {value:.4g} {unit} {more.get('note', '')}", flush=True)

    def left(row: str, metric: str, right: np.ndarray) -> None:
        verdict = evaluate.Verdict(right)
        spread = tuple(100 * end for end in verdict.interval())
        say(row, metric, 100 * verdict.accuracy, "%", spread=spread)

    left(case.name, "accuracy", benign.right)
    network = None if reference is None or case.twin is None else case.twin()
    if network is not None:
        _check_twin(case, network)
    ours_all, theirs_all = benign.right.copy(), benign.right.copy()
    for name, attack in ensemble(budget).items():
        row = f"{case.name}, {name}, eps {eps:g}"
        key = jax.random.key(seed)
        found = evaluate.autoattack(key, *given, eps=eps, attacks={name: attack})
        ours_all &= found.right
        left(row, "accuracy left", found.right)
        if network is None:
            continue
        moved = _reference(case, network, reference, name, eps, budget, seed, benign.right)
        right = benign.right & evaluate.benign(*given[:2], moved, case.labels).right
        theirs_all &= right
        left(row, "accuracy left by torchattacks", right)
        _compare(say, row, found.right, right)
    row = f"{case.name}, all, eps {eps:g}"
    left(row, "accuracy left", ours_all)
    if network is not None:
        left(row, "accuracy left by torchattacks", theirs_all)
        _compare(say, row, ours_all, theirs_all)
    return rows


def _compare(say: Callable, row: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    difference = 100 * (int(ours.sum()) - int(theirs.sum())) / len(ours)
    met = "met" if abs(difference) <= TARGET else "missed"
    note = f"target at most {TARGET} either way, {met}; {int((ours != theirs).sum())} images differ"
    say(row, "accuracy left less torchattacks'", difference, "points", note=note)


def _check_twin(case: Case, network: Any) -> None:
    torch = importlib.import_module("torch")
    images = case.images[:BATCH_SIZE]
    with torch.no_grad():
        theirs = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    ours = np.asarray(jax.jit(case.apply)(case.params, images))
    worst = float(np.abs(theirs - ours).max())
    if worst > 1e-3 * max(1.0, float(np.abs(ours).max())):
        raise ValueError(f"{case.name}: the network in PyTorch is another; logits are {worst} off")


def _reference(
    case: Case,
    network: Any,
    package: Any,
    name: str,
    eps: float,
    budget: Budget,
    seed: int,
    right: np.ndarray,
) -> np.ndarray:
    """What torchattacks makes of the images that the network gets right; the others as they are."""
    torch = importlib.import_module("torch")
    common = {"norm": "Linf", "eps": eps, "n_restarts": 1, "seed": seed}
    # It goes for all classes but one of these.
    several = {**common, "steps": budget.steps, "n_classes": budget.targets + 1}
    attack = {
        "apgd-ce": lambda: package.APGD(network, steps=budget.steps, loss="ce", **common),
        "apgd-t": lambda: package.APGDT(network, **several),
        "fab-t": lambda: package.FAB(network, multi_targeted=True, **several),
        "square": lambda: package.Square(
            network, n_queries=budget.queries, resc_schedule=False, **common
        ),
    }[name]()
    moved, where = case.images.copy(), np.flatnonzero(right)
    for start in range(0, len(where), BATCH_SIZE):
        some = where[start : start + BATCH_SIZE]
        images = torch.from_numpy(case.images[some].transpose(0, 3, 1, 2).copy())
        found = attack(images, torch.from_numpy(case.labels[some].astype(np.int64)))
        moved[some] = found.detach().numpy().transpose(0, 2, 3, 1)
    low, high = np.maximum(case.images - eps, 0), np.minimum(case.images + eps, 1)
    return np.clip(moved, low, high).astype(np.float32)


def _torchattacks() -> Any:
    """The package, or None where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module("torchattacks")
        except ImportError:
            return None


def main(_: Any) -> None:
    """Runs every attack of both and writes one results file."""
    options = flags.FLAGS
    if not 0 < options.eps <= 1:
        raise app.UsageError(f"--eps must be above 0 and at most 1, not {options.eps}")
    try:
        case = prepare(options.model, options.images, options.data_dir)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    package = _torchattacks()
    if package is None:
        print("torchattacks is not installed (pip install -e .[bench]): ours are run alone")
    budget = Budget(options.steps, options.targets, options.queries)
    about = origin(data=case.data, seeds=[options.seed])
    rows = [
        record.Row(study="bench_autoattack", **row, **about)
        for row in measure(case, options.eps, budget, options.seed, package)
    ]
    if options.out:
        path = Path(options.out)
        record.write(path, record.Record(title=TITLE, text=TEXT, rows=tuple(rows)))
        print(f"wrote {path.name}; python -m experiments.report renders it")


def _define_flags() -> None:
    # Flags are global, and every study has an --out: defined here, modules import side by side.
    flags.DEFINE_string("model", "mnist_cnn", f"network of the zoo, one of {', '.join(TWINS)}")
    flags.DEFINE_integer("images", 1000, "images attacked", lower_bound=1)
    flags.DEFINE_float("eps", 0.1, "largest change of a pixel, of 1")
    flags.DEFINE_integer("steps", 100, "steps of APGD and FAB", lower_bound=1)
    flags.DEFINE_integer("targets", 9, "classes that targeted attacks go for", lower_bound=1)
    flags.DEFINE_integer("queries", 5000, "queries of Square", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of the attacks")
    flags.DEFINE_string("data_dir", None, "folder searched first for the data sets")
    results = ROOT / "experiments" / "results" / "bench_autoattack.json"
    flags.DEFINE_string("out", str(results), "results file; empty writes none")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
