"""Makes the compressed twin of a trained network and writes it with its card.

``python -m experiments.compress --network lenet4_mnist --how pruned``

Ways: "pruned", the least weights of every layer, then fine-tuned; "structured", whole filters
likewise; "hydra", weights by learned scores; "sliced", the synapses in no slice of the training
images' classes; "quantized", weights and activations to 8 bits; "distilled", a smaller network
that learns the original's answers; "onnx", a file of 8 bits that onnxruntime made and runs. A
twin of 8 bits in JAX is the original's weights rounded anew: its card alone is written, with the
ranges of its activations.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

import difftest
import nnslicer_jax as nns
from difftest import export
from difftest.load import load_model
from experiments import provenance
from nnslicer_jax import data, models, training, zoo
from nnslicer_jax.atomic import replacing
from prune import distill, hydra, lwm, quantize
from prune.stages import Run, Stage

HOW = ("pruned", "quantized", "distilled", "structured", "hydra", "sliced", "onnx")
# Made here, and shipped.
FOLDERS = (
    provenance.ROOT / "out" / "compressed",
    provenance.ROOT / "experiments" / "compressed",
)
# Of the slices: images, and theta.
_SLICED, _THETA = 500, 0.1


@dataclasses.dataclass(frozen=True)
class Options:
    """How to compress; what a way does not read has no effect.

    Attributes:
      keep: Share of the weights or filters that stay, above 0 and at most 1.
      epochs: Of the fine-tuning, of HYDRA's search, and of the student's training.
      learning_rate: Of the fine-tuning, and the student's.
      calibration: Training images that the ranges of activations are taken from.
      student: The smaller network, of `models.MODELS`; None: VGG-11 of VGG-16, else CNN-small.
      temperature: Of the distillation.
      alpha: Of the distillation.
      seed: Of everything drawn.
    """

    keep: float = 0.2
    epochs: int = 2
    learning_rate: float = 0.01
    calibration: int = 1000
    student: str | None = None
    temperature: float = 4.0
    alpha: float = 0.9
    seed: int = 0


def twin_name(network: str, how: str) -> str:
    """What the files of a twin are called."""
    return f"{network}_{how}"


def compress(
    network: str, how: str, dataset: data.Dataset, options: Options, out: Path, command: str
) -> dict[str, Any]:
    """Makes a twin, writes it into the folder, and returns its card.

    Args:
      network: A name of the zoo.
      how: Of `HOW`.
      dataset: What the network was trained on.
      options: How.
      out: Where twins go; checkpoints go into a folder of it, and a killed run goes on from them.
      command: What the card says makes it.

    Raises:
      ValueError: For an argument that is not accepted, or a folder of another run.
      FileNotFoundError: The network's weights are not there.
    """
    if how not in HOW:
        raise ValueError(f"how: {how!r} is unknown; known are {', '.join(HOW)}")
    trained = zoo.load(network)
    card = {
        "network": network, "how": how, "command": command, "data": dataset.name,
        "data_note": dataset.note, "compression": dataclasses.asdict(options),
        "num_classes": len(dataset.classes), "commit": provenance.commit(),
        "input_shape": [int(n) for n in dataset.train_images.shape[1:]],
        "original_accuracy": trained.card["test_accuracy"],
    }  # fmt: skip
    name = twin_name(network, how)
    if how in ("quantized", "onnx"):
        return _eight_bits_of(name, trained, dataset, options, out, card)
    model_name, variables = _made(how, trained, dataset, options, out / "runs" / name)
    flat = flax.traverse_util.flatten_dict(variables["params"])
    kernels = [np.asarray(value) for value in flat.values() if np.ndim(value) > 1]
    card["left"] = float(sum(map(np.count_nonzero, kernels)) / sum(k.size for k in kernels))

    def measure(module: nn.Module, stored: dict[str, Any]) -> Mapping[str, Any]:
        right = training.count_correct(module, stored, dataset.test_images, dataset.test_labels)
        return {"test_accuracy": right / len(dataset.test_labels)}

    return zoo.save(name, model_name, variables, card, out, measure=measure)


def _made(
    how: str, trained: zoo.Trained, dataset: data.Dataset, options: Options, folder: Path
) -> tuple[str, Any]:
    """The name of the twin's model, and its variables."""
    model, variables, name = trained.model, trained.variables, trained.card["model"]
    run = Run(seed=options.seed, folder=folder, show=True)
    rate = options.learning_rate
    stage = Stage("natural", epochs=options.epochs, learning_rate=rate)
    if how in ("pruned", "structured"):
        unit = "weight" if how == "pruned" else "filter"
        found = lwm.prune(
            model, dataset, options.keep, variables=variables, finetune=stage, unit=unit, run=run
        )
        return name, found.variables
    if how == "hydra":
        search = dataclasses.replace(stage, learning_rate=0.1)
        found = hydra.prune(
            model, dataset, options.keep, variables=variables, search=search, finetune=stage,
            run=run,
        )  # fmt: skip
        return name, found.variables
    if how == "sliced":
        return name, _sliced(trained, dataset)
    student_name = options.student or ("vgg11" if name == "vgg16" else "cnn_small")
    student = models.create(student_name, len(dataset.classes))
    coloured = dataset.name == "cifar10"
    how_trained = training.TrainingOptions(
        epochs=options.epochs, learning_rate=rate, seed=options.seed, crop=4 * coloured,
        flip=coloured,
    )  # fmt: skip
    learned = distill.distill(
        student, dataset, model, variables, how_trained, temperature=options.temperature,
        alpha=options.alpha, checkpoint_dir=folder, show=True,
    )  # fmt: skip
    return student_name, learned


def _sliced(trained: zoo.Trained, dataset: data.Dataset) -> Any:
    """The variables, 0 where a synapse is in no slice of training images for their classes."""
    images = data.to_float(np.asarray(dataset.train_images[:_SLICED]))
    graph = nns.trace(trained.model.apply, trained.variables, images[:1])
    profile = nns.profile(graph, trained.variables, images)
    piece = nns.slice_network(
        graph, trained.variables, profile, images, dataset.train_labels[:_SLICED], theta=_THETA
    )
    flat = flax.traverse_util.flatten_dict(trained.variables, sep="/")
    for name, contrib in piece.synapses.items():
        flat[name] = jnp.where(jnp.asarray(contrib) != 0, flat[name], 0)
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def _eight_bits_of(
    name: str, trained: zoo.Trained, dataset: data.Dataset, options: Options, out: Path,
    card: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    pixels = np.asarray(dataset.train_images[: options.calibration])
    out.mkdir(parents=True, exist_ok=True)
    twin: difftest.pair.Model
    if card["how"] == "onnx":
        apply: Any = trained.model.apply
        whole = out / f"{name}_float.onnx"
        export.to_onnx(whole, apply, trained.variables, pixels.shape[1:])
        export.quantize_onnx(whole, out / f"{name}.onnx", pixels)
        twin = load_model(out / f"{name}.onnx")
    else:
        images = data.to_float(pixels)
        graph = nns.trace(trained.model.apply, trained.variables, images[:1])
        ranges = quantize.ranges(graph, trained.variables, images)
        card["ranges"] = {key: [float(low), float(high)] for key, (low, high) in ranges.items()}
        card["weights_sha256"] = trained.card.get("weights_sha256")
        twin = eight_bits(trained, card["ranges"])
    right = 0
    for start in range(0, len(dataset.test_labels), 256):
        some = np.asarray(dataset.test_images[start : start + 256])
        right += int((twin(some).argmax(1) == dataset.test_labels[start : start + 256]).sum())
    card["test_accuracy"] = right / len(dataset.test_labels)
    with replacing(out / f"{name}.json") as part:
        part.write_text(json.dumps({"name": name, **card}, indent=2) + "\n")
    return card


def eight_bits(trained: zoo.Trained, ranges: Mapping[str, Sequence[float]]) -> difftest.JaxModel:
    """The network with weights of 8 bits and activations of 8 bits in these ranges."""
    shape = (1, *trained.card["input_shape"])
    graph = nns.trace(trained.model.apply, trained.variables, np.zeros(shape, np.float32))
    weights = quantize.quantize(graph, trained.variables)
    found = {name: (float(low), float(high)) for name, (low, high) in ranges.items()}
    edits = weights._replace(ranges=found).edits()

    def apply(params: Any, images: jax.Array) -> jax.Array:
        return nns.evaluate(graph, params, images, edits)[0]

    return difftest.jax_model(apply, weights.params())


def card_path(network: str, how: str, folders: Sequence[Path] = FOLDERS) -> Path:
    """Where a twin's card is, in the first of the folders that has it.

    Raises:
      FileNotFoundError: The twin has not been made; says the command.
    """
    name = twin_name(network, how)
    path = next((f / f"{name}.json" for f in folders if (f / f"{name}.json").is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{name} has not been made; make it with: python -m experiments.compress "
            f"--network {network} --how {how}"
        )
    return path


def load(network: str, how: str, folders: Sequence[Path] = FOLDERS) -> difftest.pair.Model:
    """Loads a twin: a `JaxModel`, or of "onnx" a function that onnxruntime runs.

    Args:
      network: A name of the zoo.
      how: Of `HOW`.
      folders: Where twins are looked for, in order.

    Raises:
      FileNotFoundError: The twin, or the network it is of, has not been made; says the command.
      ValueError: For damaged files.
    """
    path = card_path(network, how, folders)
    if how == "quantized":
        trained = zoo.load(network)
        return eight_bits(trained, _ranges(path, trained))
    return load_model(path.with_suffix(".onnx" if how == "onnx" else ".safetensors"))


def _ranges(path: Path, trained: zoo.Trained) -> Mapping[str, Sequence[float]]:
    """Reads the ranges of a card of "quantized"; one of other weights is refused."""
    try:
        card = json.loads(path.read_text())
        ranges = {name: (float(low), float(high)) for name, (low, high) in card["ranges"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: not the card of a twin of 8 bits ({type(error).__name__}: {error})"
        ) from None
    # Cards made before this was noted say nothing.
    made, now = card.get("weights_sha256"), trained.card.get("weights_sha256")
    if made is not None and made != now:
        raise ValueError(
            f"{path}: its ranges are of other weights ({str(made)[:12]}, now {str(now)[:12]}); "
            f"make it anew with: {card.get('command')}"
        )
    return ranges


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS
    fields = [field.name for field in dataclasses.fields(Options)]
    try:
        options = Options(**{name: getattr(given, name) for name in fields})
        dataset = data.load(zoo.load(given.network).card["data"], given.data_dir)
        card = compress(
            given.network, given.how, dataset, options, Path(given.out or FOLDERS[0]),
            provenance.command(sys.argv),
        )  # fmt: skip
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    left = f", {card['left']:.1%} of the weights left" if "left" in card else ""
    print(
        f"{twin_name(given.network, given.how)}: test accuracy {card['test_accuracy']:.4f}, "
        f"the original's {card['original_accuracy']:.4f}{left}"
    )


def _define_flags() -> None:
    # Flags are global, and every command has an --out: defined here, modules import side by side.
    of = Options()
    flags.DEFINE_string("network", None, "name of the zoo", required=True)
    flags.DEFINE_enum("how", None, HOW, "way to compress", required=True)
    flags.DEFINE_string("data_dir", None, "folder searched first for the data set")
    flags.DEFINE_string("out", None, "folder of twins; out/compressed if unset")
    flags.DEFINE_float("keep", of.keep, "share of weights or filters that stay")
    flags.DEFINE_integer("epochs", of.epochs, "of fine-tuning, search or training", lower_bound=1)
    flags.DEFINE_float("learning_rate", of.learning_rate, "of fine-tuning or training")
    flags.DEFINE_integer("calibration", of.calibration, "images of the ranges", lower_bound=1)
    flags.DEFINE_enum("student", None, sorted(models.MODELS), "network that is taught")
    flags.DEFINE_float("temperature", of.temperature, "of the distillation")
    flags.DEFINE_float("alpha", of.alpha, "share of the teacher's answers, 0 to 1")
    flags.DEFINE_integer("seed", of.seed, "of everything drawn")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
