"""Keras models on JAX: ``.h5`` and ``.keras`` files, and models at hand, as a ``JaxModel``.

A model is called without state, so that it traces: it runs under jit, is searched on the device,
and is sliced and routed like any other function.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from difftest.backends.pixels import Preprocess, check_outputs, one_line, optional
from difftest.pair import JaxModel, jax_model


def load(
    path: str | os.PathLike,
    preprocess: Preprocess | None = None,
    *,
    outputs: str = "probabilities",
) -> JaxModel:
    """Reads a ``.h5`` or ``.keras`` file.

    Code inside a file, such as a lambda's, is never run: such a file is refused.

    Args:
        path: of the file, architecture and weights.
        preprocess: from float32 ``[B, H, W, C]``, 0..255, to what the model takes; None: x / 255.
        outputs: "probabilities", or "logits" where the model ends in them.

    Raises:
        ValueError: not such a file, or not one input and one output.
        ModuleNotFoundError: Keras is not installed.
        RuntimeError: Keras runs on another backend than JAX.
    """
    check_outputs(outputs)
    path = Path(path)
    keras = _keras(str(path))
    try:
        with _compiling_fast(), jax.numpy_rank_promotion("allow"):
            model = keras.saving.load_model(str(path), compile=False, safe_mode=True)
    except Exception as error:  # Keras and h5py raise many types for a damaged file.
        raise ValueError(f"{path}: not a Keras model that loads ({one_line(error)})") from None
    if len(model.inputs or ()) != 1 or len(model.outputs or ()) != 1:
        raise ValueError(
            f"{path}: {len(model.inputs or ())} inputs and {len(model.outputs or ())} outputs; "
            "accepted is one of each"
        )
    return of_model(model, preprocess, outputs=outputs)


def of_model(
    model: Any, preprocess: Preprocess | None = None, *, outputs: str = "probabilities"
) -> JaxModel:
    """Makes a ``JaxModel`` of a built Keras model, whose weights are copied as they are now.

    Args:
        model: a built ``keras.Model`` with one input and one output.
        preprocess: from float32 ``[B, H, W, C]``, 0..255, to what the model takes; None: x / 255.
        outputs: "probabilities", or "logits" where the model ends in them.

    Returns:
        A model with parameters {"params": {name: array}, "state": {name: array}}: what is
        trained, and what is not, such as the averages of batch normalisation.

    Raises:
        RuntimeError: Keras runs on another backend than JAX.
    """
    _keras("the Keras model")
    apply, params = stateless(model)
    return jax_model(apply, params, preprocess, outputs=outputs)


def stateless(
    model: Any,
) -> tuple[Callable[[Any, jax.Array], jax.Array], dict[str, dict[str, jax.Array]]]:
    """A Keras model at inference as ``apply(params, x)``, and its parameters."""
    trained, untrained = model.trainable_variables, model.non_trainable_variables
    trained_names, untrained_names = _names(trained), _names(untrained)
    # Seeds of random layers are whole numbers; at inference they are not used.
    seeds = {
        name: jnp.asarray(variable.value)
        for name, variable in zip(untrained_names, untrained, strict=True)
        if not jnp.issubdtype(variable.value.dtype, jnp.floating)
    }
    params = {
        "params": {
            name: jnp.asarray(variable.value)
            for name, variable in zip(trained_names, trained, strict=True)
        },
        "state": {
            name: jnp.asarray(variable.value)
            for name, variable in zip(untrained_names, untrained, strict=True)
            if name not in seeds
        },
    }

    def apply(params: Any, x: jax.Array) -> jax.Array:
        state = {**seeds, **params["state"]}
        # Keras broadcasts over ranks.
        with jax.numpy_rank_promotion("allow"):
            out, _ = model.stateless_call(
                [params["params"][name] for name in trained_names],
                [state[name] for name in untrained_names],
                x,
                training=False,
            )
        return out

    return apply, params


def _names(variables: list[Any]) -> list[str]:
    """Each variable's path; repeated ones are numbered."""
    counts: dict[str, int] = {}
    names = []
    for variable in variables:
        seen = counts.get(variable.path, 0)
        counts[variable.path] = seen + 1
        names.append(f"{variable.path}_{seen}" if seen else variable.path)
    return names


def _keras(what: str) -> ModuleType:
    """Keras on JAX; imports it with that backend where nothing says another."""
    unset = "KERAS_BACKEND" not in os.environ and "keras" not in sys.modules
    if unset:
        os.environ["KERAS_BACKEND"] = "jax"
    try:
        keras = optional("keras", "keras", f"{what}: reading it")
    finally:
        if unset:
            del os.environ["KERAS_BACKEND"]
    if keras.backend.backend() != "jax":
        raise RuntimeError(
            f"{what}: Keras runs on {keras.backend.backend()} here; accepted is jax: set "
            "KERAS_BACKEND=jax before keras is imported"
        )
    return keras


@contextmanager
def _compiling_fast() -> Iterator[None]:
    """Less optimisation while Keras draws the first weights, which the file's then replace.

    Each shape of weights compiles its own draw: 7 s of ResNet-20's loading, 2 s in here.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
