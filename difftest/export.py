"""JAX functions as ONNX files, of float32 or of 8 bits.

There is no converter to TensorFlow Lite that installs without TensorFlow: make such files with
TensorFlow's own, and load them with ``load_model``.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from difftest.backends.pixels import Preprocess, one_line, optional, prepared
from difftest.rewrite import rewritten
from nnslicer_jax.atomic import replacing

_OUTPUTS = ("logits", "probabilities")
# Images that calibration takes at a time.
_BATCH = 32


def to_onnx(
    path: str | os.PathLike,
    apply: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    input_shape: Sequence[int],
    *,
    outputs: str = "logits",
    batch: int = 32,
) -> Path:
    """Writes ``apply(params, x)`` as an ONNX file, by jax2onnx.

    The preprocessing is no part of the file: it takes what ``apply`` takes, and is loaded with the
    same preprocessing as the function. It gives probabilities, as ``load_model`` expects.

    Args:
        path: of the file, ending in ``.onnx``.
        apply: x is float32 ``[B, H, W, C]``; gives ``[B, K]``.
        params: any pytree; becomes constants of the file.
        input_shape: ``[H, W, C]``.
        outputs: "logits", to which a softmax is added, or "probabilities".
        batch: images a call, which the file fixes; ``load_model`` fills up the last ones.

    Returns:
        The path.

    Raises:
        ValueError: an option is not accepted, or the function does not take that shape, or has an
            operation that ONNX or the converter lacks.
        ModuleNotFoundError: jax2onnx is not installed.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"{path}: the suffix is {path.suffix!r}; accepted is .onnx")
    if outputs not in _OUTPUTS:
        raise ValueError(f"outputs is {outputs!r}; accepted are {', '.join(_OUTPUTS)}")
    if len(input_shape) != 3 or any(int(size) < 1 for size in input_shape):
        raise ValueError(f"input_shape is {tuple(input_shape)}; accepted is (H, W, C)")
    if batch < 1:
        raise ValueError(f"batch is {batch}; accepted is 1 or more")
    converter = optional("jax2onnx", "jax2onnx", f"{path}: writing it")
    onnx = optional("onnx", "onnx", f"{path}: writing it")

    def function(x: jax.Array) -> jax.Array:
        found = apply(params, x)
        return jax.nn.softmax(found) if outputs == "logits" else found

    shape = (batch, *map(int, input_shape))
    # The converter replaces functions of Flax while it traces, by ones of fewer arguments.
    plain = rewritten(function, {"reduce_window_max": _pooled})
    try:
        traced = jax.make_jaxpr(plain)(jax.ShapeDtypeStruct(shape, np.float32))
        # Its own rules broadcast over ranks.
        with jax.numpy_rank_promotion("allow"), _left_as_it_is(jnp):
            model = converter.to_onnx(core.jaxpr_as_fun(traced), inputs=[shape])
    except Exception as error:  # Of any type, for a wrong shape or an operation it lacks.
        raise ValueError(f"{path}: the function cannot be converted ({one_line(error)})") from None
    zeros = {
        each.name
        for each in model.graph.initializer
        if not each.dims and not onnx.numpy_helper.to_array(each).any()
    }
    for node in model.graph.node:
        # onnxruntime does not quantize a product with a bias of no axes.
        if node.op_type == "Gemm" and len(node.input) == 3 and node.input[2] in zeros:
            del node.input[2]
    with replacing(path) as part:
        onnx.save(model, str(part))
    return path


@contextlib.contextmanager
def _left_as_it_is(module: ModuleType) -> Iterator[None]:
    """Puts back what is replaced in a module meanwhile: the converter leaves its own cumsum."""
    before = dict(vars(module))
    try:
        yield
    finally:
        vars(module).update(before)


def _pooled(equation: Any, x: jax.Array) -> jax.Array | None:
    """Largest of each window, by slices: the converter's pools have axes the runtime lacks."""
    params = equation.params
    if any(step > 1 for step in (*params["base_dilation"], *params["window_dilation"])):
        return None
    # A window past an edge holds the edge too; an infinity would be the end of 8-bit ranges.
    for axis, (before, after) in enumerate(params["padding"]):
        if before or after:
            size = x.shape[axis]
            first = lax.slice_in_dim(x, 0, 1, axis=axis)
            last = lax.slice_in_dim(x, size - 1, size, axis=axis)
            x = lax.concatenate([first] * before + [x] + [last] * after, axis)
    shape = equation.outvars[0].aval.shape
    found = None
    for place in np.ndindex(*params["window_dimensions"]):
        stop = [
            low + (size - 1) * stride + 1
            for low, size, stride in zip(place, shape, params["window_strides"], strict=True)
        ]
        piece = lax.slice(x, place, stop, params["window_strides"])
        found = piece if found is None else jnp.maximum(found, piece)
    assert found is not None
    return found


def quantize_onnx(
    path: str | os.PathLike,
    out: str | os.PathLike,
    images: np.ndarray,
    *,
    preprocess: Preprocess | None = None,
) -> Path:
    """Writes an ONNX file with weights and activations of 8 bits, by onnxruntime.

    Ranges of activations are fixed by the images, so that an answer does not depend on the images
    beside it. Weights have a scale for each output channel.

    Args:
        path: of a float32 file.
        out: of the file to write, ending in ``.onnx``.
        images: uint8 ``[N, H, W, C]``, at least one, that the ranges are taken from.
        preprocess: as the file is loaded with; None: x / 255.

    Returns:
        ``out``.

    Raises:
        ValueError: no images, another suffix, or a file that cannot be quantized.
        FileNotFoundError: no such file.
        ModuleNotFoundError: onnxruntime or onnx is not installed.
    """
    path, out = Path(path), Path(out)
    if out.suffix != ".onnx":
        raise ValueError(f"{out}: the suffix is {out.suffix!r}; accepted is .onnx")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if not len(images):
        raise ValueError("images: expected at least one, got none")
    quantization: Any = optional(
        "onnxruntime.quantization", "onnxruntime", f"{path}: quantizing it"
    )
    onnx: Any = optional("onnx", "onnx", f"{path}: quantizing it")
    try:
        model = onnx.load(str(path))
    except Exception as error:  # The parser's own types.
        raise ValueError(f"{path}: not an ONNX model ({one_line(error)})") from None
    # Some writers list the weights among the inputs.
    weights = {each.name for each in model.graph.initializer}
    inputs = [each for each in model.graph.input if each.name not in weights]
    if len(inputs) != 1 or not inputs[0].type.tensor_type.shape.dim:
        raise ValueError(f"{path}: {len(inputs)} inputs; accepted is one, of images")
    name, size = inputs[0].name, inputs[0].type.tensor_type.shape.dim[0].dim_value
    x = prepared(np.asarray(images), preprocess)
    size = size or min(_BATCH, len(x))
    # A fixed batch takes whole batches only: the last images are repeated.
    x = np.concatenate([x, np.repeat(x[-1:], -len(x) % size, axis=0)])

    class Reader(quantization.CalibrationDataReader):
        """Hands the images out, batch by batch."""

        def __init__(self) -> None:
            self.left: Iterator[np.ndarray] = iter(np.split(x, len(x) // size))

        def get_next(self) -> dict[str, np.ndarray] | None:
            """The next batch, None after the last."""
            batch = next(self.left, None)
            return None if batch is None else {name: batch}

    try:
        with replacing(out) as part:
            quantization.quantize_static(
                str(path),
                str(part),
                Reader(),
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
    except Exception as error:  # The runtime's own types, and ValueErrors without the path.
        raise ValueError(f"{path}: cannot be quantized ({one_line(error)})") from None
    return out
