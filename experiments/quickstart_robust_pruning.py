"""The quickstart's section on robust pruning: HYDRA beside LWM, on digits under TRADES."""

from collections.abc import Mapping

import jax
import numpy as np

from experiments import page
from experiments.quickstart_case import Case
from nnslicer_jax import data
from prune import evaluate, hydra, lwm, masks, stages
from prune.stages import Pruned, Run, Stage

# Of training, of pruning, and of fine-tuning.
EPOCHS = (15, 5, 15)
KEEP = 0.05
# Of the attack that networks are trained against and judged by, and of the certificate.
EPS, CERTIFIED = 0.1, 0.02
_STEPS, _RESTARTS = 20, 3


def robust_pruning(case: Case) -> page.Section:
    """What is left of a robust network when one weight in twenty stays."""
    found = pruned(case)
    measured = {name: _measured(case, one) for name, one in found.items()}
    html = page.paragraph(
        "A network that withstands small changes of its input loses that when it is pruned by the "
        "size of its weights. HYDRA learns which weights to keep under the robust objective itself "
        f"(here TRADES at eps {EPS:g}, the pixel range being 1). The network is trained for "
        f"{EPOCHS[0]} epochs; {1 - KEEP:.0%} of the weights of every layer go, by least weight "
        f"magnitude (LWM) or by HYDRA, which learns for {EPOCHS[1]} epochs; what stays is "
        f"fine-tuned for {EPOCHS[2]}."
    )
    html += page.table(
        f"Accuracy on the {len(case.test_labels)} test images: as they are; under PGD of {_STEPS} "
        f"steps and {_RESTARTS} restarts at eps {EPS:g}; certified by linear bounds (CROWN-IBP) at "
        f"eps {CERTIFIED:g}",
        ["network", "weights", "benign", "under attack", "certified"],
        [
            [name, f"{masks.kept(found[name].masks)[0]:,}", *[f"{share:.1%}" for share in row]]
            for name, row in measured.items()
        ],
    )
    html += _figure(measured)
    said = "; ".join(f"{name} {row[1]:.1%}" for name, row in measured.items())
    return page.Section(
        "Pruning a robust network",
        html,
        (("robust pruning", f"accuracy under PGD, {1 - KEEP:.0%} of weights pruned: {said}"),),
    )


def pruned(case: Case) -> dict[str, Pruned]:
    """The dense network, and what LWM and HYDRA leave of it, fine-tuned."""
    digits, model = data.load("digits"), case.trained.model
    options = {"eps": EPS, "step_size": EPS / 2, "steps": 5}
    train, search, finetune = (
        Stage("trades", options, epochs=epochs, learning_rate=rate)
        for epochs, rate in zip(EPOCHS, (0.05, 0.1, 0.01), strict=True)
    )
    run = Run(seed=case.seed)
    network = stages.network_of(model, digits)
    variables = stages.pretrain(network, digits, train, run=run)
    every = masks.topk(lwm.scores(variables["params"]), 1)
    return {
        "dense": Pruned(variables, every),
        "LWM": lwm.prune(model, digits, KEEP, variables=variables, finetune=finetune, run=run),
        "HYDRA": hydra.prune(
            model, digits, KEEP, variables=variables, search=search, finetune=finetune, run=run
        ),
    }


def _measured(case: Case, found: Pruned) -> tuple[float, float, float]:
    """Benign, empirical robust and certified accuracy, 0..1."""
    given = (case.trained.model.apply, found.variables, case.test_images, case.test_labels)
    attacked = evaluate.era(
        jax.random.key(case.seed), *given, eps=EPS, steps=_STEPS, restarts=_RESTARTS
    )
    certified = evaluate.vra_t(case.graph, *given[1:], eps=CERTIFIED, method="crown-ibp")
    return float(attacked.benign.mean()), attacked.accuracy, certified.accuracy


def _figure(measured: Mapping[str, tuple[float, float, float]]) -> str:
    drawn = page.drawing(3.2)
    ax = drawn.subplots()
    kinds = ["benign", f"PGD, eps {EPS:g}", f"certified, eps {CERTIFIED:g}"]
    page.grouped_bars(ax, 100 * np.array(list(measured.values())).T, kinds)
    ax.set_xticklabels(measured)
    ax.set(ylabel="accuracy, %", ylim=(0, 102))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, frameon=False)
    return page.figure(
        drawn,
        "Bars of accuracy, as it is, under attack and certified, of the dense network and of what "
        "LWM and HYDRA leave of it.",
        f"A robust network, and what is left of it with {KEEP:.0%} of its weights.",
    )
