"""AutoAttack's parts straight from the papers, one image and one number at a time."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import scipy.optimize


def checkpoints(steps: int) -> list[int]:
    """W of APGD's section 3.1: ceil(p_j N), p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)."""
    shares = [Fraction(0), Fraction(22, 100)]
    while shares[-1] <= 1:
        step = max(shares[-1] - shares[-2] - Fraction(3, 100), Fraction(6, 100))
        shares.append(shares[-1] + step)
    found = [int(np.ceil(share * steps)) for share in shares[1:] if share <= 1]
    return sorted(set(found))


def apgd(
    start: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    eps: float,
    steps: int,
    f: Callable[[np.ndarray], tuple[float, np.ndarray]],
) -> tuple[list[np.ndarray], list[float]]:
    """Algorithm 1: every iterate after its checkpoint, and the step size by then.

    Args:
      start: x(0).
      low: least pixel within eps and the bounds.
      high: greatest.
      eps: radius.
      steps: N.
      f: value and gradient.
    """

    def project(x: np.ndarray) -> np.ndarray:
        return np.minimum(np.maximum(x, low), high)

    checks = [0, *checkpoints(steps)]
    eta = np.float32(2 * eps)
    value, gradient = f(start)
    x, before = start, start
    top, top_x, top_gradient = value, start, gradient
    values = [value]  # f(x(k)), of the best point where the search went back to it
    etas, tops = {0: eta}, {0: top}
    gained = []
    xs, lengths = [start], [eta]
    for k in range(steps):
        z = project(x + eta * np.sign(gradient))
        new = z if k == 0 else project(
            x + np.float32(0.75) * (z - x) + np.float32(0.25) * (x - before)
        )  # fmt: skip
        value, gradient = f(new)
        gained.append(value > values[-1])
        values.append(value)
        if value > top:
            top, top_x, top_gradient = value, new, gradient
        before, x = x, new
        if k + 1 in checks:
            last = max(w for w in checks if w < k + 1)
            one = sum(gained[last : k + 1]) < 0.75 * (k + 1 - last)
            # The first step size has not been halved.
            earlier = max((w for w in checks if w < last), default=0)
            two = etas[last] == etas[earlier] and tops[last] == top
            etas[k + 1], tops[k + 1] = eta, top
            if one or two:
                eta = eta / 2
                etas[k + 1] = eta
                x, gradient, values[-1] = top_x, top_gradient, top
        xs.append(x)
        lengths.append(eta)
    return xs, lengths


def dlr(logits: np.ndarray, label: int) -> float:
    """DLR loss, section 4."""
    ordered = sorted(logits, reverse=True)
    other = max(z for i, z in enumerate(logits) if i != label)
    return -(logits[label] - other) / (ordered[0] - ordered[2])


def dlr_targeted(logits: np.ndarray, label: int, target: int) -> float:
    """Targeted DLR loss, section 4."""
    ordered = sorted(logits, reverse=True)
    return -(logits[label] - logits[target]) / (ordered[0] - (ordered[2] + ordered[3]) / 2)


def projection(
    point: np.ndarray, gap: float, gradient: np.ndarray, low: float, high: float
) -> float | None:
    """FAB's program: least t of max|d| <= t, gap + <gradient, d> = 0, low <= point + d <= high."""
    count = len(point)
    cost = np.r_[np.zeros(count), 1.0]
    eye, ones = np.eye(count), -np.ones((count, 1))
    rows = np.block([[eye, ones], [-eye, ones]])
    found = scipy.optimize.linprog(
        cost,
        A_ub=rows,
        b_ub=np.zeros(2 * count),
        A_eq=np.r_[gradient, 0.0][None],
        b_eq=[-gap],
        bounds=[(low - x, high - x) for x in point] + [(0, None)],
    )
    return found.fun if found.success else None


def side(query: int, share: float, height: int, width: int) -> int:
    """Side of Square's square: p is halved after 10, 50, ... of 10,000 queries; section 3."""
    p = share
    for limit in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000):
        if query > limit:
            p = p / 2
    return min(max(round((p * height * width) ** 0.5), 1), height, width)


def fab(logits, lead, onto, images, labels, steps, targets):
    """FAB's least distances towards each image's `targets` likeliest classes, in L-infinity.

    A point counts as adversarial as soon as another class leads. `lead(points, classes)` gives the
    gap from the label to a class and its gradient; `onto` projects, image by image.
    """

    def length(moves):
        return np.maximum(np.abs(moves).reshape(len(moves), -1).max(1), 1e-8)

    rows = np.arange(len(images))
    first = np.array(logits(images))
    first[rows, labels] = -np.inf
    best = np.full(len(images), np.inf)
    for classes in np.argsort(-first, axis=1)[:, :targets].T:
        points = images.copy()
        for _ in range(steps):
            gap, gradient = lead(points, classes)
            step = onto(points, gap, gradient)
            there = gap + (gradient * (images - points)).reshape(len(images), -1).sum(1)
            origin = onto(images, there, gradient)
            bias = length(step) / (length(step) + length(origin))
            bias = np.minimum(bias, 0.1)[:, None, None, None]
            moved = (1 - bias) * (points + 1.05 * step) + bias * (images + 1.05 * origin)
            points = np.clip(moved, 0, 1).astype(np.float32)
            across = np.asarray(logits(points)).argmax(1) != labels
            best = np.where(across, np.minimum(best, length(points - images)), best)
            back = (images + 0.9 * (points - images)).astype(np.float32)
            points = np.where(across[:, None, None, None], back, points)
    return best
