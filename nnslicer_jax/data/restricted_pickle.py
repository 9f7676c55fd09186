"""An unpickler for files that hold nothing but numpy arrays and plain containers."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

_NDARRAY = object()


def _empty_array(kind: Any, shape: Any, code: Any) -> np.ndarray:
    if kind is not _NDARRAY:
        raise pickle.UnpicklingError("it holds an array of a foreign type")
    return np.ndarray((0,), np.int8)


def _array(content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    return np.frombuffer(content, dtype).reshape(shape, order=order)


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the codec {encoding!r}")
    return text.encode("latin1")


# What numpy arrays need, in the names of numpy 1 and 2. Nothing here runs code of the file:
# ndarray itself is no callable but a mark that _empty_array recognises.
_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    ("numpy.core.numeric", "_frombuffer"): _array,
    ("numpy._core.numeric", "_frombuffer"): _array,
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def load(path: Path) -> Any:
    """Reads a pickle of containers, numbers, strings and numpy arrays; strings come as bytes.

    Raises:
        ValueError: the file is damaged, or asks for anything else; no code of it is run.
    """
    with open(path, "rb") as stream:
        try:
            return _Unpickler(stream, encoding="bytes").load()
        except Exception as error:  # A damaged pickle raises almost any type of error.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{path}: not a pickle of plain containers and numpy arrays ({reason})"
            ) from None
