"""Takes weights from a safetensors file into the user's cache, where the studies find them.

Tensors are named as torchvision names them (AlexNet, ResNet-50 and VGG-16 of ImageNet), or by
their paths in the Flax variables, such as ``params/Conv_0/kernel`` (any model). How many classes
there are is read off the last layer. Nothing is rounded, and no accuracy is measured.

``python -m experiments.import_weights --model resnet50 --file weights.safetensors --name
resnet50_imagenet --data imagenet_folder``
"""

import hashlib
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl import app, flags, logging

from nnslicer_jax import data, models, torch_names, zoo

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_SHAPE = (224, 224, 3)
_FOLDER = "imagenet_folder"
_OURS = "params/"


def read(path: Path) -> dict[str, np.ndarray]:
    """Reads every tensor of a safetensors file.

    Raises:
        ValueError: there is no such file, or it is another kind of file.
    """
    if not path.is_file():
        raise ValueError(f"file: {path} is not there")
    try:
        return safetensors.numpy.load_file(path)
    except Exception as error:  # The reader's own error type is not public.
        reason = " ".join(str(error).split())
        raise ValueError(f"file: {path} is not a safetensors file ({reason})") from None


def variables(
    model: str, tensors: Mapping[str, np.ndarray], input_shape: Sequence[int]
) -> tuple[dict[str, Any], int]:
    """A network's variables of tensors, in float32, and how many classes it tells apart.

    Args:
        model: one of ``models.MODELS``.
        tensors: by torchvision's names, or by paths of the variables.
        input_shape: [H, W, C], of an image.

    Raises:
        ValueError: a tensor is missing, is not part of the network or has another shape; names
            the first one.
    """
    ours = any(name.startswith(_OURS) for name in tensors)
    count = _classes(model, tensors) if ours else torch_names.classes(model, tensors)
    example = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    network = models.create(model, count)
    wanted = flax.traverse_util.flatten_dict(
        jax.eval_shape(network.init, jax.random.key(0), example), sep="/"
    )
    shapes = {path: leaf.shape for path, leaf in wanted.items()}
    if ours:
        _check(model, tensors, shapes)
        found = {path: tensors[path].astype(np.float32) for path in shapes}
    else:
        found = torch_names.variables(model, tensors, shapes)
    return flax.traverse_util.unflatten_dict(found, sep="/"), count


def _classes(model: str, tensors: Mapping[str, np.ndarray]) -> int:
    """The width of the last dense layer, by the paths of variables."""
    pattern = re.compile(rf"{_OURS}Dense_(\d+)/bias")
    found = {int(m[1]): t for name, t in tensors.items() if (m := pattern.fullmatch(name))}
    if not found or found[max(found)].ndim != 1:
        raise ValueError(f"{_OURS}Dense_.../bias is missing or no vector ({model})")
    return len(found[max(found)])


def _check(model: str, tensors: Mapping[str, np.ndarray], shapes: torch_names.Shapes) -> None:
    for path in sorted(set(shapes) ^ set(tensors)):
        state = "is missing" if path in shapes else "is not part of the network"
        raise ValueError(f"{path} {state} ({model})")
    for path, shape in shapes.items():
        if tensors[path].shape != shape:
            raise ValueError(f"{path} has shape {tensors[path].shape}, {model} takes {shape}")


def run(
    model: str, file: Path, name: str, dataset: str, input_shape: Sequence[int], out: Path
) -> dict[str, Any]:
    """Reads, checks and writes weights with their card into ``out``; returns the card.

    Raises:
        ValueError: a name that is taken or no name of a file, or weights of another network.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"name: expected letters, digits, '_' and '-', got {name!r}")
    if (zoo.SHIPPED / f"{name}.json").exists():
        raise ValueError(f"name: {name} is a network of the package, which would hide this one")
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ValueError(f"input_shape: expected height, width and channels, got {input_shape}")
    if dataset == _FOLDER and (input_shape[0] != input_shape[1] or input_shape[2] != 3):
        raise ValueError(
            f"input_shape: images of {_FOLDER} are square with 3 channels, got {input_shape}"
        )
    tensors = read(file)
    try:
        found, count = variables(model, tensors, input_shape)
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from None
    shape = ",".join(map(str, input_shape))
    words = ["--model", model, "--file", file.name, "--name", name, "--data", dataset]
    words += ["--input_shape", shape] if tuple(input_shape) != _SHAPE else []
    with file.open("rb") as stream:
        source = hashlib.file_digest(stream, "sha256").hexdigest()
    card = {
        "num_classes": count,
        "input_shape": [int(n) for n in input_shape],
        "data": dataset,
        **({"data_options": {"size": int(input_shape[0])}} if dataset == _FOLDER else {}),
        "command": shlex.join(["python", "-m", "experiments.import_weights", *words]),
        "source_sha256": source,
        "jax": jax.__version__,
    }
    return zoo.save(name, model, found, card, out, rounded=False)


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS
    try:
        shape = [int(n) for n in given.input_shape]
    except ValueError:
        sys.exit(f"input_shape: expected whole numbers, got {','.join(given.input_shape)}")
    try:
        card = run(
            given.model,
            Path(given.file),
            given.name,
            given.data,
            shape,
            Path(given.out or zoo.weights_folder()),
        )
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    print(f"{card['name']}: {card['parameters']} parameters, {card['num_classes']} classes")


def _define_flags() -> None:
    flags.DEFINE_enum("model", None, sorted(models.MODELS), "Network.", required=True)
    flags.DEFINE_string("file", None, "Weights, as safetensors.", required=True)
    flags.DEFINE_string("name", None, "Of the network in the zoo.", required=True)
    flags.DEFINE_enum("data", None, sorted(data.DATASETS), "It was trained on.", required=True)
    flags.DEFINE_list("input_shape", [str(n) for n in _SHAPE], "Of an image: height,width,3.")
    flags.DEFINE_string("out", None, "Folder for weights and card; the user's cache if unset.")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
