"""Weights under torchvision's names and in its layout, as variables of the networks here.

A tensor's name follows from the kind and number of the Flax module that it belongs to.
Convolutions are stored [out, in, H, W] there and [H, W, in, out] here, dense layers [out, in] and
[in, out]; maps are flattened with the channels first there and last here.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from nnslicer_jax.models import alexnet, resnet50, vgg16_imagenet

Shapes = Mapping[str, Sequence[int]]  # path such as "params/Conv_0/kernel" -> shape
Module = tuple[str, int]  # kind and number, ("Conv", 0)

# Variable -> what a module's tensor is called.
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# Of how many batches statistics were taken, which inference does not ask for.
_UNUSED = "num_batches_tracked"


class _Layout(NamedTuple):
    """How torchvision lays a network out.

    Attributes:
        module: function of the Flax modules from the outermost in to torchvision's name.
        last: torchvision's name of the last layer.
        flattened: whether maps are flattened in front of the first dense layer.
    """

    module: Callable[[Sequence[Module]], str]
    last: str
    flattened: bool


def names(model: str, shapes: Shapes) -> dict[str, str]:
    """Path of each variable of a model to its tensor's name in torchvision.

    Raises:
        ValueError: for a model without such names.
    """
    layout = _layout(model)
    found = {}
    for path in shapes:
        _, *modules, leaf = path.split("/")
        found[path] = f"{layout.module([_numbered(part) for part in modules])}.{_LEAVES[leaf]}"
    return found


def classes(model: str, tensors: Mapping[str, np.ndarray]) -> int:
    """How many classes a network given by torchvision's names tells apart.

    Raises:
        ValueError: for a model without such names, or no tensor of its last layer.
    """
    name = f"{_layout(model).last}.bias"
    if name not in tensors or tensors[name].ndim != 1:
        raise ValueError(f"{name} is missing or no vector ({model} under torchvision's names)")
    return len(tensors[name])


def variables(
    model: str, tensors: Mapping[str, np.ndarray], shapes: Shapes
) -> dict[str, np.ndarray]:
    """Tensors under torchvision's names as float32 variables by path.

    Args:
        model: one of ``models.MODELS``.
        tensors: all that the network has; "num_batches_tracked" may be among them.
        shapes: of the variables, by path.

    Raises:
        ValueError: for a model without such names, or a tensor that is missing, is not part of it,
            has another shape or holds no floating-point numbers; names the first one.
    """
    wanted = names(model, shapes)
    unknown = {name for name in tensors if name.rpartition(".")[2] != _UNUSED}
    for state, some in (
        ("is missing", set(wanted.values()) - set(tensors)),
        ("is not part of the network", unknown - set(wanted.values())),
    ):
        if some:
            first = min(some, key=_natural)
            raise ValueError(f"{first} {state} ({model} under torchvision's names)")
    found = {}
    for path in sorted(shapes, key=_natural):
        name, shape = wanted[path], tuple(shapes[path])
        tensor = tensors[name]
        # Kernels have their outputs last here, first there.
        due = (shape[-1], shape[-2], *shape[:-2]) if len(shape) > 1 else shape
        if tensor.shape != due:
            raise ValueError(f"{name} has shape {tensor.shape}, {model} takes {due}")
        if tensor.dtype.kind != "f" and tensor.dtype.name != "bfloat16":
            raise ValueError(f"{name} holds {tensor.dtype}; floating-point numbers are due")
        tensor = tensor.astype(np.float32)
        if len(shape) > 1:
            tensor = np.moveaxis(tensor, (1, 0), (-2, -1))
        found[path] = tensor
    if _layout(model).flattened:
        last = max((path for path in shapes if "/Conv_" in path), key=_natural)
        first = min((path for path in shapes if re.search("/Dense_.*/kernel", path)), key=_natural)
        found[first] = channels_last(found[first], shapes[last][-1])
    return {path: np.ascontiguousarray(array) for path, array in found.items()}


def channels_last(kernel: np.ndarray, channels: int) -> np.ndarray:
    """A dense kernel [C * S * S, out] behind flattened maps [C, S, S], as behind maps [S, S, C].

    Raises:
        ValueError: the inputs are no square maps of so many channels.
    """
    inputs, outputs = kernel.shape
    side = math.isqrt(inputs // channels)
    if side * side * channels != inputs:
        raise ValueError(f"{inputs} inputs of a dense layer are no square maps of {channels}")
    maps = kernel.reshape(channels, side, side, outputs)
    return maps.transpose(1, 2, 0, 3).reshape(inputs, outputs)


def _layout(model: str) -> _Layout:
    if model not in _LAYOUTS:
        raise ValueError(
            f"model: torchvision's names are known for {', '.join(sorted(_LAYOUTS))}, not {model!r}"
        )
    return _LAYOUTS[model]


def _numbered(part: str) -> Module:
    kind, _, number = part.rpartition("_")
    return kind, int(number)


def _natural(name: str) -> list[tuple[str, int]]:
    """A key that sorts numbers in names by their value."""
    return [(text, int(digits or -1)) for text, digits in re.findall(r"(\D*)(\d*)", name)]


def _sequential(features: str, classifier: str, modules: Sequence[Module]) -> str:
    """Names of layers that are numbered with those that have no weights.

    Args:
        features: a letter a layer, C a convolution.
        classifier: a letter a layer, D a dense one.
        modules: of the variable.
    """
    [(kind, number)] = modules
    part, layers = {"Conv": ("features", features), "Dense": ("classifier", classifier)}[kind]
    places = [place for place, layer in enumerate(layers) if layer == kind[0]]
    return f"{part}.{places[number]}"


def _residual(stages: Sequence[int], convolutions: int, modules: Sequence[Module]) -> str:
    """Names of the layers of a residual network.

    Args:
        stages: blocks of each stage.
        convolutions: of a block; one more is that of its shortcut.
        modules: of the variable.
    """
    *block, (kind, number) = modules
    before = ""
    if block:
        ends = list(itertools.accumulate(stages))
        stage = next(s for s, end in enumerate(ends) if block[0][1] < end)
        before = f"layer{stage + 1}.{block[0][1] - ends[stage] + stages[stage]}."
    if kind == "Dense":
        return "fc"
    if block and number == convolutions:
        return f"{before}downsample.{('Conv', 'BatchNorm').index(kind)}"
    return before + {"Conv": "conv", "BatchNorm": "bn"}[kind] + str(number + 1)


# Letters: convolution, ReLU, pooling, dense, and - for dropout.
_LAYOUTS = {
    "alexnet": _Layout(
        functools.partial(
            _sequential,
            "".join("CRP" if pooled else "CR" for *_, pooled in alexnet.CONVOLUTIONS),
            "-DR-DRD",
        ),
        "classifier.6",
        True,
    ),
    "resnet50": _Layout(functools.partial(_residual, resnet50.STAGES, 3), "fc", False),
    "vgg16_imagenet": _Layout(
        functools.partial(
            _sequential,
            "".join("CR" * len(widths) + "P" for widths in vgg16_imagenet.STAGES),
            "DR-DR-D",
        ),
        "classifier.6",
        True,
    ),
}
