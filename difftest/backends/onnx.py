"""ONNX models, run by onnxruntime on the CPU."""

import os
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

_TYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}
# Images a call at most where the file leaves the batch open: bounds the activations held.
_BATCH = 256


class ONNX:
    """An ``.onnx`` file: uint8 ``[B, H, W, C]`` -> float32 ``[B, K]``.

    A model of whole numbers takes the pixels as they are unless a preprocessing is given, whose
    result is rounded; one of int8, which holds no pixel above 127, needs it. A file whose batch is
    fixed at n is asked n images at a time, the last ones filled up. Dynamic quantization scales
    activations over a whole batch, so that an answer depends on the images beside it: give such a
    file a batch of 1.
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
            preprocess: from float32 ``[B, H, W, C]``, 0..255, to what the model takes, by a
                transposition too where that is ``[B, C, H, W]``; None: x / 255.
            outputs: "probabilities", or "logits" where the model ends in them.
            workers: threads of the runtime, at least 1; None: one a core.

        Raises:
            ValueError: not a model, more than one input or output, bad options, or an input of
                int8 without a preprocessing.
            ModuleNotFoundError: onnxruntime is not installed.
        """
        check_outputs(outputs)
        if workers is not None and workers < 1:
            raise ValueError(f"workers is {workers}; accepted is 1 or more")
        self.path = Path(path)
        self.preprocess = preprocess
        self.outputs = outputs
        runtime = optional("onnxruntime", "onnxruntime", f"{path}: reading it")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = workers or cores()
        options.log_severity_level = 3  # Errors; the warnings are about the optimiser's choices.
        try:
            self._session = runtime.InferenceSession(
                str(self.path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # The runtime's error types are not public.
            raise ValueError(
                f"{path}: not an ONNX model that runs here ({one_line(error)})"
            ) from None
        inputs, outs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(outs) != 1:
            raise ValueError(
                f"{path}: {len(inputs)} inputs and {len(outs)} outputs; accepted is one of each"
            )
        if inputs[0].type not in _TYPES:
            raise ValueError(
                f"{path}: takes {inputs[0].type}; accepted are {', '.join(sorted(_TYPES))}"
            )
        self._name = inputs[0].name
        self._dtype = np.dtype(_TYPES[inputs[0].type])
        if self._dtype == np.int8 and preprocess is None:
            raise ValueError(
                f"{path}: takes int8, which holds no pixel above 127; give a preprocess to "
                "-128..127"
            )
        # A size is a number, or a name or None where it is left open.
        self._shape = list(inputs[0].shape)
        self._batch = self._shape[0] if self._shape and isinstance(self._shape[0], int) else None

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Probabilities float32 ``[B, K]`` of uint8 images ``[B, H, W, C]``."""
        whole = np.issubdtype(self._dtype, np.integer)
        as_they_are = whole and self.preprocess is None
        x = prepared(images, (lambda x: x) if as_they_are else self.preprocess)
        if whole:
            limits = np.iinfo(self._dtype)
            x = np.clip(np.round(x), limits.min, limits.max)
        x = x.astype(self._dtype)
        if len(x.shape) != len(self._shape) or any(
            isinstance(size, int) and size != given
            for size, given in zip(self._shape[1:], x.shape[1:], strict=True)
        ):
            wanted = ", ".join(str(n) if isinstance(n, int) else "any" for n in self._shape)
            raise ModelError(
                f"{self.path}: takes [{wanted}], the preprocessed images are "
                f"[{', '.join(map(str, x.shape))}]"
            )
        size = self._batch or _BATCH
        parts = [self._run(x[start : start + size]) for start in range(0, max(len(x), 1), size)]
        return probabilities(np.concatenate(parts), self.outputs)

    def _run(self, x: np.ndarray) -> np.ndarray:
        given = len(x)
        missing = (self._batch or max(given, 1)) - given
        if missing:
            x = np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)])
        try:
            (out,) = self._session.run(None, {self._name: x})
        except Exception as error:  # The runtime's error types are not public.
            raise ModelError(f"{self.path}: {one_line(error)}") from None
        return np.asarray(out, np.float32)[:given]
