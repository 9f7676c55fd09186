"""Training for randomized smoothing: the network is to say the same of an image and of noisy ones.

Stability training (Li, Chen, Wang, Carin, "Certified adversarial robustness with additive noise",
NeurIPS 2019, after Carmon, Raghunathan, Schmidt, Duchi, Liang, "Unlabeled data improves adversarial
robustness", NeurIPS 2019), or the cross-entropy of noisy images (Cohen, Rosenfeld, Kolter,
"Certified adversarial robustness via randomized smoothing", ICML 2019).
"""

from typing import Any

import flax.struct
import jax

from prune.objectives import losses
from prune.objectives.network import Aux, Batch, Network, Plan, require

FORMS = ("stability", "noisy")


class SmoothingState(flax.struct.PyTreeNode):
    """Nothing but options."""

    network: Network = flax.struct.field(pytree_node=False)
    sigma: float = flax.struct.field(pytree_node=False)
    weight: float = flax.struct.field(pytree_node=False)
    stability: bool = flax.struct.field(pytree_node=False)


def init(
    network: Network,
    plan: Plan,
    *,
    sigma: float = 0.25,
    weight: float = 6.0,
    form: str = "stability",
) -> SmoothingState:
    """The objective's first state.

    Args:
      network: What is trained.
      plan: Of the run.
      sigma: Standard deviation of the noise, in units of the pixels' range; above 0.
      weight: Of the divergence of the stability form, 0 or more.
      form: "stability" or "noisy".

    Raises:
      ValueError: For an option out of range.
    """
    del plan
    require("sigma", 0 < sigma < float("inf"), "above 0", sigma)
    require("weight", 0 <= weight < float("inf"), "0 or more", weight)
    require("form", form in FORMS, " or ".join(FORMS), form)
    return SmoothingState(network, float(sigma), float(weight), form == "stability")


def loss(
    state: SmoothingState, variables: Any, batch: Batch, key: jax.Array
) -> tuple[jax.Array, Aux]:
    """`CE(f(x), y) + weight * KL(softmax f(x) || softmax f(x + noise))`, or `CE(f(x + noise), y)`.

    Noisy images are not clipped to 0..1, as those that certify are not. The network in training
    sees the images, then the noisy ones, each as a batch of its own whose statistics count.
    """
    images, labels = batch
    noise_key, clean_key, noisy_key = jax.random.split(key, 3)
    noisy = images + state.sigma * jax.random.normal(noise_key, images.shape)
    if not state.stability:
        logits, statistics = state.network.train(variables, noisy, noisy_key)
        figures = {"robust": losses.accuracy(logits, labels)}
        return losses.cross_entropy(logits, labels), (state, statistics, figures)
    logits, statistics = state.network.train(variables, images, clean_key)
    others, statistics = state.network.train({**variables, **statistics}, noisy, noisy_key)
    value = losses.cross_entropy(logits, labels) + state.weight * losses.divergence(logits, others)
    figures = {
        "benign": losses.accuracy(logits, labels),
        "robust": losses.accuracy(others, labels),
    }
    return value, (state, statistics, figures)
