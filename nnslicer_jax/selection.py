"""Which terms of a sum stay in the slice: the paper's theta, and what else selects terms.

A rule orders the terms and keeps those at or above a threshold tau, the largest one that
satisfies its condition. With `total` the sum over all terms and `below` that over the terms
ordered before tau:

- "signed" (NNSlicer; Zhang et al., ESEC/FSE 2020, backward analysis): by |t|,
  |below| < theta |total|;
- "mass": the same with |t| summed too, so that nothing cancels;
- "largest" (EffectivePath; Qiu et al., CVPR 2019): by t, total - below >= theta total; where
  the total is not positive, the largest term alone.

Where no tau does, every term stays. Equal terms stay or go together, and a term of 0 never
stays. `kept` states this for any terms. For the many of a product, `host_selection` is the same
on NumPy's vectorised sort, and `passes` does without sorting under "mass" and "largest".
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Up to here comparing every pair of terms is cheaper than sorting them.
_FEW = 16


class Selection(NamedTuple):
    """How terms are selected.

    Attributes:
      rule: "signed", "mass" or "largest".
      theta: Scalar, 0..1, or None to keep every non-zero term.
      host: Whether products are selected on the host.
    """

    rule: str
    theta: Any
    host: bool = False


RULES = ("signed", "mass", "largest")


def kept(terms: jax.Array, selection: Selection) -> jax.Array:
    """Which terms stay.

    Args:
      terms: `[..., K]` float32, the terms of one sum along the last axis.
      selection: The rule and its theta.

    Returns:
      `[..., K]` bool.
    """
    if selection.theta is None:
        return terms != 0
    order = terms if selection.rule == "largest" else jnp.abs(terms)
    if terms.shape[-1] <= _FEW:
        tau = _tau_by_pairs(terms, order, selection)
    else:
        tau = _tau_by_sorting(terms, order, selection)
    return (order >= tau) & (terms != 0)


def _summands(terms: jax.Array, rule: str) -> jax.Array:
    return jnp.abs(terms) if rule == "mass" else terms


def _satisfied(below: jax.Array, total: jax.Array, selection: Selection) -> jax.Array:
    if selection.rule == "largest":
        return (total > 0) & (total - below >= selection.theta * total)
    return jnp.abs(below) < selection.theta * jnp.abs(total)


def _largest(order: jax.Array, fits: jax.Array, total: jax.Array, rule: str) -> jax.Array:
    tau = jnp.where(fits, order, -jnp.inf).max(-1, keepdims=True)
    if rule == "largest":
        alone = jnp.where(order == 0, -jnp.inf, order).max(-1, keepdims=True)
        return jnp.where(total > 0, tau, alone)
    return tau


def _tau_by_pairs(terms: jax.Array, order: jax.Array, selection: Selection) -> jax.Array:
    summands = _summands(terms, selection.rule)
    total = summands.sum(-1, keepdims=True)
    before = order[..., None, :] < order[..., :, None]
    below = jnp.where(before, summands[..., None, :], 0).sum(-1)
    return _largest(order, _satisfied(below, total, selection), total, selection.rule)


def _tau_by_sorting(terms: jax.Array, order: jax.Array, selection: Selection) -> jax.Array:
    if selection.rule == "signed":
        # Magnitude above, sign in the lowest bit: one key sorts by |t| and gives t back.
        bits = jax.lax.bitcast_convert_type(terms, jnp.uint32)
        keys = jnp.sort((bits << 1) | (bits >> 31), axis=-1)
        terms = jax.lax.bitcast_convert_type((keys >> 1) | (keys << 31), jnp.float32)
        order = jnp.abs(terms)
    else:
        order = jnp.sort(order, axis=-1)
        terms = order
    summands = _summands(terms, selection.rule)
    through = jnp.cumsum(summands, axis=-1)
    total = through[..., -1:]
    first = jnp.concatenate(
        [jnp.ones_like(order[..., :1], bool), order[..., 1:] != order[..., :-1]], axis=-1
    )
    fits = first & _satisfied(through - summands, total, selection)
    return _largest(order, fits, total, selection.rule)
