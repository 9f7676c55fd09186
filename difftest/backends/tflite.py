"""TensorFlow Lite models, run by ai-edge-litert.

An image is asked alone: an answer never depends on the images beside it, and a batch was no
faster on the published models. Whole interpreters run side by side instead, one a thread; the
threads inside an interpreter cost small models more than they give.
"""

import os
import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from difftest.backends.pixels import (
    Preprocess,
    check_outputs,
    one_line,
    optional,
    prepared,
    probabilities,
)
from difftest.pair import ModelError
from nnslicer_jax.cores import cores


class TFLite:
    """A ``.tflite`` or ``.lite`` file: uint8 ``[B, H, W, C]`` -> float32 ``[B, K]``.

    Inputs and outputs of whole numbers are converted by the file's scale and zero point; where it
    holds none, a model of whole numbers takes the pixels as they are, but for one of int8, which
    holds no pixel above 127 and needs a preprocessing.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        preprocess: Preprocess | None = None,
        *,
        outputs: str = "probabilities",
        workers: int | None = None,
    ):
        """Loads the file.

        Args:
            path: of the file.
            preprocess: from float32 ``[B, H, W, C]``, 0..255, to what the model takes; None: x/255.
            outputs: "probabilities", or "logits" where the model ends in them.
            workers: interpreters that run side by side, at least 1; None: one a core.

        Raises:
            ValueError: not a model, more than one input or output, bad options, or an input of
                int8 that has neither a scale nor a preprocessing.
            ModuleNotFoundError: ai-edge-litert is not installed.
        """
        check_outputs(outputs)
        if workers is not None and workers < 1:
            raise ValueError(f"workers is {workers}; accepted is 1 or more")
        self.path = Path(path)
        self.preprocess = preprocess
        self.outputs = outputs
        self.workers = workers or cores()
        self._content = self.path.read_bytes()
        self._idle: queue.LifoQueue[_Interpreter] = queue.LifoQueue()
        first = _Interpreter(self.path, self._content)
        if preprocess is None and first.takes_pixels and first.input["dtype"] == np.int8:
            raise ValueError(
                f"{path}: takes int8 without a scale, which holds no pixel above 127; give a "
                "preprocess to -128..127"
            )
        self._idle.put(first)
        self._made = 1
        self._threads: ThreadPoolExecutor | None = None

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Probabilities float32 ``[B, K]`` of uint8 images ``[B, H, W, C]``."""
        with self._interpreter() as interpreter:
            as_they_are = self.preprocess is None and interpreter.takes_pixels
        x = prepared(images, (lambda x: x) if as_they_are else self.preprocess)
        parts = np.array_split(x, max(1, min(self.workers, len(x) // 2)))
        if len(parts) == 1:
            return probabilities(self._part(x), self.outputs)
        while self._made < len(parts):
            self._idle.put(_Interpreter(self.path, self._content))
            self._made += 1
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="tflite")
        return probabilities(np.concatenate([*self._threads.map(self._part, parts)]), self.outputs)

    def _part(self, x: np.ndarray) -> np.ndarray:
        with self._interpreter() as interpreter:
            return interpreter.run(x)

    @contextmanager
    def _interpreter(self) -> Iterator["_Interpreter"]:
        interpreter = self._idle.get()
        try:
            yield interpreter
        finally:
            self._idle.put(interpreter)


class _Interpreter:
    """One interpreter with its tensors allocated for one image."""

    def __init__(self, path: Path, content: bytes):
        litert = optional("ai_edge_litert.interpreter", "ai-edge-litert", f"{path}: reading it")
        self.path = path
        try:
            self.interpreter = litert.Interpreter(model_content=content, num_threads=1)
            self.interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path}: not a TensorFlow Lite model that runs here ({one_line(error)})"
            ) from None
        inputs = self.interpreter.get_input_details()
        outs = self.interpreter.get_output_details()
        if len(inputs) != 1 or len(outs) != 1:
            raise ValueError(
                f"{path}: {len(inputs)} inputs and {len(outs)} outputs; accepted is one of each"
            )
        self.input, self.output = inputs[0], outs[0]
        self.shape = tuple(int(n) for n in self.input["shape"])
        # Sizes that the file leaves open are -1 here.
        self.open = [int(n) < 0 for n in self.input.get("shape_signature", self.shape)]

    @property
    def takes_pixels(self) -> bool:
        """Whether the input is whole numbers without a scale."""
        return self.input["dtype"] != np.float32 and not self.input["quantization"][0]

    def run(self, x: np.ndarray) -> np.ndarray:
        """float32 ``[B, ...]`` -> float32 ``[B, K]``, one image at a time."""
        self._fit((1, *x.shape[1:]))
        x = _quantised(x, self.input)
        put, go, get = (
            self.interpreter.set_tensor,
            self.interpreter.invoke,
            self.interpreter.get_tensor,
        )
        into, out_of = self.input["index"], self.output["index"]
        rows = []
        for row in range(len(x)):
            put(into, x[row : row + 1])
            go()
            rows.append(get(out_of).reshape(-1))
        out = np.stack(rows) if rows else np.zeros((0, *self.output["shape"][1:]), np.float32)
        return _dequantised(out, self.output)

    def _fit(self, shape: tuple[int, ...]) -> None:
        if shape == self.shape:
            return
        fits = len(shape) == len(self.shape) and all(
            free or size == wanted
            for size, wanted, free in zip(shape[1:], self.shape[1:], self.open[1:], strict=True)
        )
        wanted = ", ".join(
            "any" if o else str(n) for n, o in zip(self.shape, self.open, strict=True)
        )
        if not fits:
            raise ModelError(
                f"{self.path}: takes [{wanted}], the preprocessed images are "
                f"[{', '.join(map(str, shape))}]"
            )
        try:
            self.interpreter.resize_tensor_input(self.input["index"], shape)
            self.interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ModelError(
                f"{self.path}: takes [{wanted}] and not [{', '.join(map(str, shape))}] "
                f"({one_line(error)})"
            ) from None
        self.shape = shape


def _quantised(x: np.ndarray, tensor: dict[str, Any]) -> np.ndarray:
    """Real numbers as a tensor of the file stores them."""
    dtype = tensor["dtype"]
    if not np.issubdtype(dtype, np.integer):
        return np.ascontiguousarray(x, dtype)
    scale, zero_point = tensor["quantization"]
    if scale:
        x = x / np.float32(scale) + np.float32(zero_point)
    limits = np.iinfo(dtype)
    return np.clip(np.round(x), limits.min, limits.max).astype(dtype)


def _dequantised(out: np.ndarray, tensor: dict[str, Any]) -> np.ndarray:
    """What a tensor of the file stores as real numbers, float32."""
    scale, zero_point = tensor["quantization"]
    if not np.issubdtype(out.dtype, np.integer) or not scale:
        return out.astype(np.float32)
    return (out.astype(np.float32) - np.float32(zero_point)) * np.float32(scale)
