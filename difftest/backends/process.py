"""Any model in a process of its own, which may crash or hang without ending the search.

What passes between the processes is JSON and the bytes of arrays: nothing is unpickled. POSIX only.
"""

import contextlib
import importlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from difftest.backends.pixels import Normalise, check_outputs, one_line
from difftest.pair import ModelError

# Length of the header and of the array's bytes.
_LENGTHS = struct.Struct("<IQ")
# A header is some names; an answer of more bytes than this is no answer.
_LONGEST_HEADER, _LONGEST_ARRAY = 1 << 20, 1 << 34


class ProcessModel:
    """A model in a child process: uint8 ``[B, H, W, C]`` -> float32 ``[B, K]``.

    A child that crashes, hangs or ends is a ``ModelError`` for that call; the next call starts
    another. Use it as a context, or ``close`` it, to end the child before the model is collected.
    """

    def __init__(
        self,
        source: str | os.PathLike,
        preprocess: Normalise | str | None = None,
        *,
        outputs: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        timeout: float = 60.0,
        start_timeout: float = 300.0,
        environment: Mapping[str, str] | None = None,
    ):
        """Starts the child, which loads the model.

        Args:
            source: "module:function", a function that makes the model, a callable as
                ``ModelPair`` takes it; or a path for ``load_model``.
            preprocess: of a path: None, a ``Normalise``, or "module:function", the name of a
                function as ``load_model`` takes it.
            outputs: of a path, as ``load_model`` takes it.
            arguments: keywords of the function, or further ones of ``load_model``; JSON values.
            timeout: seconds a call may take, above 0.
            start_timeout: seconds the child may take to start and load the model, above 0.
            environment: variables to set in the child, such as JAX_PLATFORMS.

        Raises:
            ValueError: bad options.
            ModelError: the model does not load.
        """
        if not (timeout > 0 and start_timeout > 0):
            raise ValueError(
                f"timeout is {timeout}, start_timeout {start_timeout}; accepted are seconds above 0"
            )
        named = isinstance(source, str) and _is_name(source)
        if named and (preprocess is not None or outputs is not None):
            raise ValueError(
                f"{source}: preprocess and outputs are for files; pass them as arguments"
            )
        if isinstance(preprocess, str) and not _is_name(preprocess):
            raise ValueError(f'preprocess is {preprocess!r}; accepted is "module:function"')
        if preprocess is not None and not isinstance(preprocess, str | Normalise):
            raise ValueError(
                f"preprocess is {type(preprocess).__name__}; a process takes None, Normalise or "
                '"module:function"'
            )
        if outputs is not None:
            check_outputs(outputs)
        self.source = os.fspath(source)
        self.timeout = timeout
        self.start_timeout = start_timeout
        self._environment = {str(k): str(v) for k, v in (environment or {}).items()}
        try:
            self._task = json.dumps(
                {
                    "source": self.source,
                    "named": named,
                    "preprocess": _described(preprocess),
                    "outputs": outputs,
                    "arguments": dict(arguments or {}),
                }
            )
        except TypeError as error:
            raise ValueError(f"arguments: accepted are JSON values ({error})") from None
        self._child: _Child | None = None
        self._started()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Probabilities float32 ``[B, K]`` of uint8 images ``[B, H, W, C]``."""
        images = np.ascontiguousarray(images)
        if images.dtype != np.uint8:
            raise ModelError(f"images are {images.dtype}; accepted is uint8 [B, H, W, C]")
        child = self._started()
        doing = f"{self.source}: on {len(images)} images"
        return self._asked(child, json.dumps({"shape": images.shape}), images, self.timeout, doing)

    def close(self) -> None:
        """Ends the child; a later call starts another."""
        if self._child is not None:
            self._child.end()
            self._child = None

    def __enter__(self) -> "ProcessModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _started(self) -> "_Child":
        if self._child is None:
            self._child = _Child(self._environment)
            self._asked(
                self._child, self._task, None, self.start_timeout, f"{self.source}: loading"
            )
        return self._child

    def _asked(
        self, child: "_Child", header: str, array: np.ndarray | None, seconds: float, doing: str
    ) -> np.ndarray:
        try:
            child.channel.deadline = time.monotonic() + seconds
            child.channel.send(header, array)
            answer, content = child.channel.receive()
            if "error" not in answer:
                shape = tuple(int(n) for n in answer["shape"])
                return np.frombuffer(content, np.float32).reshape(shape).copy()
        except TimeoutError:
            self.close()
            raise ModelError(f"{doing}, the process hung: no answer in {seconds:g} s") from None
        except (OSError, EOFError):
            how = child.ended()
            self.close()
            raise ModelError(f"{doing}, the process {how}") from None
        except (ValueError, KeyError, TypeError):
            self.close()
            raise ModelError(f"{doing}, the process gave no answer that can be read") from None
        except BaseException:  # An interrupt: the answer still to come is to these images.
            self.close()
            raise
        if array is None:  # A child that loaded no model is of no use.
            self.close()
        raise ModelError(f"{self.source}: {str(answer['error'])[:300]}")


class _Child:
    """A running child, its end of the socket, and what it writes to its standard error."""

    def __init__(self, environment: Mapping[str, str]):
        ours, theirs = socket.socketpair()
        self._errors: BinaryIO = tempfile.TemporaryFile()
        with theirs:
            # Whatever a model prints goes beside the answers, not among them.
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {_RUN}"],
                stdin=theirs.fileno(),
                stdout=self._errors,
                stderr=self._errors,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        self.channel = _Channel(ours)
        self.end = weakref.finalize(self, _end, self.process, ours, self._errors)

    def ended(self) -> str:
        """How the child ended, once its end of the socket is closed."""
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"crashed ({signal.Signals(-code).name}){self._last_words()}"
            return f"crashed (signal {-code}){self._last_words()}"
        return f"ended with status {code}{self._last_words()}"

    def _last_words(self) -> str:
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - 4096))
        lines = self._errors.read().decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        return f": {' '.join(last.split())[:200]}" if last else ""


def _end(process: subprocess.Popen, connection: socket.socket, errors: BinaryIO) -> None:
    # The child leads a group of its own: what it started ends with it.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    connection.close()
    errors.close()


class _Channel:
    """Headers and arrays over a socket, before a deadline."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.deadline: float | None = None

    def send(self, header: str, array: np.ndarray | None = None) -> None:
        """Sends a header in JSON and an array's bytes."""
        head = header.encode()
        content = memoryview(b"") if array is None else memoryview(array.tobytes())
        self._send(memoryview(_LENGTHS.pack(len(head), len(content)) + head))
        self._send(content)

    def receive(self) -> tuple[dict[str, Any], bytearray]:
        """Receives a header and an array's bytes.

        Raises:
            EOFError: the other end is closed.
            TimeoutError: the deadline has passed.
            ValueError: no such message.
        """
        head, content = _LENGTHS.unpack(self._receive(_LENGTHS.size))
        if head > _LONGEST_HEADER or content > _LONGEST_ARRAY:
            raise ValueError("a message of that length is none")
        header = json.loads(self._receive(head))
        if not isinstance(header, dict):
            raise ValueError("a header is an object")
        return header, self._receive(content)

    def _wait(self) -> None:
        left = None if self.deadline is None else self.deadline - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)

    def _send(self, content: memoryview) -> None:
        while content:
            self._wait()
            content = content[self.connection.send(content) :]

    def _receive(self, size: int) -> bytearray:
        content = bytearray(size)
        rest = memoryview(content)
        while rest:
            self._wait()
            number = self.connection.recv_into(rest)
            if not number:
                raise EOFError
            rest = rest[number:]
        return content


# The child --------------------------------------------------------------------------------

_RUN = "from difftest.backends.process import serve; serve()"


def serve() -> None:
    """The child's life: loads the model its parent names, then answers until the parent is gone."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    channel = _Channel(socket.socket(fileno=os.dup(0)))
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    with contextlib.suppress(EOFError, OSError):
        model = None
        while True:
            header, content = channel.receive()
            out = np.zeros(0, np.float32)
            try:
                if model is None:
                    model = _loaded(header)
                else:
                    images = np.frombuffer(content, np.uint8).reshape(header["shape"])
                    out = np.ascontiguousarray(model(images), np.float32)
                answer: dict[str, Any] = {"shape": out.shape}
            except Exception as error:  # A black box may raise anything.
                out = np.zeros(0, np.float32)
                answer = {"error": one_line(error)}
            channel.send(json.dumps(answer), out)


def _end_with(parent: int) -> None:
    """Ends this process and what it started soon after its parent, also where its model hangs."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def _loaded(task: Mapping[str, Any]) -> Any:
    if task["named"]:
        return _named(task["source"])(**task["arguments"])
    from difftest.load import load_model

    preprocess = task["preprocess"]
    if isinstance(preprocess, str):
        preprocess = _named(preprocess)
    elif preprocess is not None:
        preprocess = Normalise(**preprocess)
    return load_model(task["source"], preprocess, outputs=task["outputs"], **task["arguments"])


def _named(name: str) -> Any:
    module, _, attributes = name.partition(":")
    found = importlib.import_module(module)
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    return found


def _is_name(text: str) -> bool:
    """Whether it is "module:function" and no file."""
    module, colon, attributes = text.partition(":")
    parts = [*module.split("."), *attributes.split(".")]
    return bool(colon) and all(part.isidentifier() for part in parts) and not Path(text).exists()


def _described(preprocess: Normalise | str | None) -> Any:
    if not isinstance(preprocess, Normalise):
        return preprocess
    return {
        name: np.asarray(value, np.float64).tolist()
        for name, value in (("mean", preprocess.mean), ("std", preprocess.std))
    }
