"""Losses of logits, means over a batch, and the share of right answers."""

import jax
import jax.numpy as jnp

from prune.objectives.network import Network


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of logits `[B, K]` at labels `[B]`."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()


def divergence(logits: jax.Array, others: jax.Array) -> jax.Array:
    """Mean KL(softmax of logits || softmax of others), both `[B, K]`."""
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(others)
    return (jnp.exp(log_p) * (log_p - log_q)).sum(1).mean()


def margin_cross_entropy(margins: jax.Array) -> jax.Array:
    """Mean cross-entropy of the logits of which each is as far below the label's as can be.

    Args:
      margins: `[B, K - 1]`, how far the label's logit is at least above each other one.
    """
    worst = jnp.concatenate([jnp.zeros((len(margins), 1), margins.dtype), -margins], 1)
    return jax.nn.logsumexp(worst, 1).mean()


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of rows whose largest logit is the label's, [] float32."""
    return (logits.argmax(1) == labels).mean(dtype=jnp.float32)


def certified(margins: jax.Array) -> jax.Array:
    """Share of rows whose margins are all above 0, [] float32."""
    return (margins > 0).all(1).mean(dtype=jnp.float32)


def box(images: jax.Array, eps: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """Lower and upper ends of what is within eps of images and a valid image, in 0..1."""
    return jnp.maximum(images - eps, 0.0), jnp.minimum(images + eps, 1.0)


def check_classes(network: Network) -> None:
    """Raises ValueError for a network with a single logit, which has no margins."""
    if network.classes < 2:
        raise ValueError(f"the network must have 2 classes or more, not {network.classes}")
