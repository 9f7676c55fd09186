"""The ways a product's terms are selected, each as a function of terms [R, K], rule and theta."""

import functools
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from nnslicer_jax import host_selection, passes, selection
from nnslicer_jax.selection import Selection


@functools.cache
def _compiled(rule: str, few: int):
    return jax.jit(lambda terms, theta: selection.kept(terms, Selection(rule, theta)))


def stated(terms: np.ndarray, rule: str, theta: float) -> np.ndarray:
    """`selection.kept`, which handles any terms."""
    return np.asarray(_compiled(rule, selection._FEW)(terms, np.float32(theta)))


@functools.cache
def _passed(rule: str, loops: bool):
    """Terms as the rows of weights 1, and as the columns of activations 1."""

    @jax.jit
    def stay(terms, theta):
        how = Selection(rule, theta)
        r, k = terms.shape
        as_rows, _ = passes.edges(terms[None], jnp.ones((1, k, 1)), jnp.ones((1, r, 1)), how)
        _, as_columns = passes.edges(jnp.ones((1, 1, k)), terms.T[None], jnp.ones((1, 1, r)), how)
        return as_rows[0], as_columns[0].T

    def run(terms, theta):
        with mock.patch.object(passes, "_loops", lambda: loops):
            return stay(terms, theta)

    return run


def _by_passes(terms: np.ndarray, rule: str, theta: float, loops: bool) -> np.ndarray:
    as_rows, as_columns = map(np.asarray, _passed(rule, loops)(terms, np.float32(theta)))
    np.testing.assert_array_equal(as_rows, as_columns)
    expected = np.sign(terms) if rule == "mass" else np.abs(np.sign(terms))
    np.testing.assert_array_equal(as_rows, np.where(as_rows != 0, expected, 0))
    return as_rows != 0


def on_host(terms: np.ndarray, rule: str, theta: float) -> np.ndarray:
    """As products select on the host."""
    return host_selection.kept(np.ascontiguousarray(terms), rule, theta)


def in_loops(terms: np.ndarray, rule: str, theta: float) -> np.ndarray:
    """As products select on a CPU for many images."""
    return _by_passes(terms, rule, theta, loops=True)


def in_reductions(terms: np.ndarray, rule: str, theta: float) -> np.ndarray:
    """As products select on other devices."""
    return _by_passes(terms, rule, theta, loops=False)


def ways(rule: str) -> list[Callable[[np.ndarray, str, float], np.ndarray]]:
    """Every way in which a rule selects."""
    return [stated, on_host] + ([in_loops, in_reductions] if rule != "signed" else [])


RULES = ["signed", "mass", "largest"]
WAYS = [(rule, where) for rule in RULES for where in ways(rule)]
