"""The quickstart's section on protection: what an attacker makes of a network with hidden parts."""

from typing import Any, NamedTuple

import numpy as np

from experiments import model_protection as study
from experiments import page, target_classes
from experiments.quickstart_case import Case
from prune import protect

_SCHEDULE = study.SCHEDULES["tiny"]
_SHARE = 0.5
_BUDGET = 300


class Protection(NamedTuple):
    """What an attacker of one network reaches against one choice of what to hide.

    Attributes:
      before: Accuracy before any attack on the test images of the target classes and on all,
        0..1; None for the attacker who is given nothing.
      after: The same after it.
      rate: The learning rate that the attacker took.
    """

    before: tuple[float, float] | None
    after: tuple[float, float]
    rate: float


def protection(case: Case) -> page.Section:
    """What an attacker makes of a network whose most valuable synapses are hidden."""
    targets, found = attacked(case, _BUDGET)
    names = ", ".join(map(str, targets))
    html = page.paragraph(
        f"The {_SHARE:.0%} of each layer's synapses that matter most for the digits {names} (drawn "
        "by the seed) are hidden: they restart from the initialiser. An attacker who knows "
        f"everything else trains the whole network again, for {_SCHEDULE.epochs} epochs of "
        f"{_BUDGET} training images. The lower its accuracy, the better the choice of what to hide."
    )
    html += page.paragraph(
        "NNSlicer and EffectivePath choose by slices of "
        f"{_SCHEDULE.images} training images of each of these digits, Weight by magnitude. From "
        "scratch is the attacker who is given nothing: below it, what is exposed is of no use. "
        "Each attacker takes, of two learning rates, the one that does better on one half of the "
        "test images; the table is of the other half."
    )
    html += page.table(
        f"Attacker's accuracy on test images of the digits {names}, and on all",
        ["hidden by", "before, targets", "before, all", "after, targets", "after, all",
         "learning rate"],
        [
            [
                method,
                *(("", "") if p.before is None else _percent(p.before)),
                *_percent(p.after),
                f"{p.rate:g}",
            ]
            for method, p in found.items()
        ],
    )  # fmt: skip
    html += _figure(found)
    return page.Section(
        "What hiding the most valuable synapses protects",
        html,
        (
            (
                "attack on hidden half",
                f"{_BUDGET} samples, accuracy on the digits {names} when hidden by: "
                + ", ".join(f"{method} {p.after[0]:.1%}" for method, p in found.items()),
            ),
        ),
    )


def attacked(case: Case, budget: int) -> tuple[tuple[int, ...], dict[str, Protection]]:
    """Hides synapses by each method and lets an attacker train everything.

    Args:
      case: The network.
      budget: The attacker's samples.

    Returns:
      The target classes, and what was reached by method.
    """
    victim = study.prepare("digits_cnn", None, seed=case.seed, share=_SHARE, theta=case.theta)
    dataset = victim.dataset
    (targets,) = target_classes.target_sets(len(dataset.classes), _SCHEDULE.classes, 1, case.seed)
    samples = protect.samples(victim.samples, dataset, budget)

    def accuracy(variables: Any) -> tuple[float, float]:
        right = study.right_answers(victim.graph, variables, dataset)
        return float(right[np.isin(dataset.test_labels, targets)].mean()), float(right.mean())

    found = {}
    for method in (*study.METHODS, study.SCRATCH):
        scratch = method == study.SCRATCH
        chosen = study.crucial(victim, _SCHEDULE, "Random" if scratch else method, targets)
        made = {}
        for rate in _SCHEDULE.rates:
            how = study.options(victim, _SCHEDULE.epochs, rate)
            made[rate] = study.attack(victim, chosen, samples, how, scratch=scratch)
        right = {r: study.right_answers(victim.graph, made[r], victim.choice).sum() for r in made}
        best = max(made, key=lambda rate: right[rate])
        before = None if scratch else accuracy(study.attack(victim, chosen, samples, None))
        found[method] = Protection(before, accuracy(made[best]), best)
    return targets, found


def _percent(shares: tuple[float, float]) -> list[str]:
    return [f"{share:.1%}" for share in shares]


def _figure(found: dict[str, Protection]) -> str:
    drawn = page.drawing(3.4)
    ax = drawn.subplots()
    values = 100 * np.array([p.after for p in found.values()]).T
    page.grouped_bars(ax, values, ["target digits", "all digits"])
    ax.set_xticklabels(found)
    ax.set(ylabel="attacker's accuracy, %", ylim=(0, 102))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False)
    return page.figure(
        drawn,
        "Bars of the attacker's accuracy on the target digits and on all, by method of hiding.",
        f"Attacker's accuracy with {_BUDGET} samples; lower is better protection.",
    )
