"""Steps of robust training in PyTorch, written the straightforward way, to be timed beside ours.

TRADES runs the network on the images once, not in every step of the attack as its released code
does. Scores are sorted in every pass, as HYDRA's released code does.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np

# What is timed must not wander off.
_RATE = 1e-4
_EPS, _STEP_SIZE, _STEPS, _WEIGHT, _START, _SIGMA = 8 / 255, 2 / 255, 10, 6.0, 0.001, 0.25

OBJECTIVES = ("natural", "pgd", "smoothing", "trades")


def make_step(
    network: Any, objective: str, images: np.ndarray, labels: np.ndarray, keep: float | None = None
) -> Callable[[], Any]:
    """A training step of a network.

    Args:
      network: A `torch.nn.Module` with a list `kernels`, as `bench_autoattack.twin` makes it.
      objective: One of `OBJECTIVES`.
      images: `[B, H, W, C]` float32, 0..1.
      labels: `[B]` integers.
      keep: None: all parameters are trained. Given: scores of the kernels, of which each pass
        keeps that share.

    Returns:
      A function that does a step and returns the loss.
    """
    torch = importlib.import_module("torch")
    f = torch.nn.functional
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    y = torch.from_numpy(labels.astype(np.int64))
    forward, trained = network, list(network.parameters())
    if keep is not None:
        kernels = [kernel.detach() for kernel in network.kernels]
        trained = [kernel.clone().requires_grad_() for kernel in kernels]
        chosen = _chosen(torch)

        def forward(images: Any) -> Any:
            masked = {
                f"kernels.{i}": kernel * chosen.apply(score.abs(), keep)
                for i, (kernel, score) in enumerate(zip(kernels, trained, strict=True))
            }
            return torch.func.functional_call(network, masked, (images,))

    descent = torch.optim.SGD(trained, lr=_RATE, momentum=0.9, weight_decay=1e-4)

    def divergence(logits: Any, others: Any) -> Any:
        return f.kl_div(f.log_softmax(others, 1), f.softmax(logits, 1), reduction="batchmean")

    def attacked(start: Any, climbed: Callable[[Any], Any]) -> Any:
        moved = start
        for _ in range(_STEPS):
            moved = moved.detach().requires_grad_()
            (slope,) = torch.autograd.grad(climbed(forward(moved)), moved)
            moved = moved.detach() + _STEP_SIZE * slope.sign()
            moved = torch.min(torch.max(moved, x - _EPS), x + _EPS).clamp(0, 1)
        return moved.detach()

    def natural() -> Any:
        return f.cross_entropy(forward(x), y)

    def pgd() -> Any:
        start = (x + _EPS * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
        return f.cross_entropy(forward(attacked(start, lambda z: f.cross_entropy(z, y))), y)

    def smoothing() -> Any:
        logits, others = forward(x), forward(x + _SIGMA * torch.randn_like(x))
        return f.cross_entropy(logits, y) + _WEIGHT * divergence(logits, others)

    def trades() -> Any:
        with torch.no_grad():
            settled = forward(x)
        moved = attacked(x + _START * torch.randn_like(x), lambda z: divergence(settled, z))
        logits, others = forward(x), forward(moved)
        return f.cross_entropy(logits, y) + _WEIGHT * divergence(logits, others)

    loss = {"natural": natural, "pgd": pgd, "smoothing": smoothing, "trades": trades}[objective]

    def step() -> Any:
        descent.zero_grad()
        value = loss()
        value.backward()
        descent.step()
        return float(value.detach())

    return step


def _chosen(torch: Any) -> Any:
    """The largest share of what is given as ones, else zeros; the gradient passes as it is."""
    base: Any = torch.autograd.Function

    class Chosen(base):
        @staticmethod
        def forward(ctx: Any, size: Any, keep: float) -> Any:
            order = size.flatten().argsort(descending=True)
            mask = torch.zeros(size.numel())
            mask[order[: math.ceil(keep * size.numel())]] = 1
            return mask.reshape(size.shape)

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return gradient, None

    return Chosen
