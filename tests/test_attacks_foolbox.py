"""Attacks beside Foolbox's on the same network and images: how many are fooled, and how closely.

Foolbox 3.3.4 has no JSMA, ADef, SinglePixel and LocalSearch, its Spatial does not know JAX, and its
PointWise stops on a function that JAX dropped; the others are the eleven compared here.
"""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnslicer_jax as nns
from nnslicer_jax import attacks, data

with warnings.catch_warnings():
    # It imports names that SciPy is about to drop.
    warnings.simplefilter("ignore")
    foolbox = pytest.importorskip("foolbox", reason="needs foolbox: pip install -e .[test]")

pytestmark = pytest.mark.filterwarnings("ignore")


class Pair(NamedTuple):
    """A row, the options both take, and how far apart they may be.

    Attributes:
      row: Ours.
      ours: Its options.
      name: Foolbox's class.
      theirs: Its options.
      success: Most difference of the success rates.
      distance: Most relative difference of the mean distances.
    """

    row: str
    ours: dict[str, Any]
    name: str
    theirs: dict[str, Any]
    success: float
    distance: float


FGSM, RPGD = "LinfFastGradientAttack", "LinfProjectedGradientDescentAttack"
PAIRS = [
    Pair("FGSM 2", {}, FGSM, {}, 0, 1e-4),
    Pair("FGSM 4", {}, FGSM, {}, 0, 1e-4),
    Pair("FGSM 8", {}, FGSM, {}, 0, 1e-4),
    Pair("FGSM 8", {"eps": 0.1}, FGSM, {}, 0, 1e-4),
    Pair("RPGD 2", {}, RPGD, {}, 0.04, 1e-4),
    Pair("RPGD 4", {}, RPGD, {}, 0.04, 1e-4),
    Pair("RPGD 8", {}, RPGD, {}, 0.04, 1e-4),
    Pair("RPGD 8", {"eps": 0.1}, RPGD, {}, 0.04, 1e-4),
    Pair("DeepFool L2", {}, "L2DeepFoolAttack", {}, 0, 0.005),
    Pair("DeepFool Linf", {}, "LinfDeepFoolAttack", {}, 0, 0.005),
    Pair(
        "CW L2",
        {"steps": 100, "searches": 6, "first_constant": 0.1},
        "L2CarliniWagnerAttack",
        {"steps": 100, "binary_search_steps": 6, "initial_const": 0.1},
        0.04,
        0.02,
    ),
    Pair("GaussianBlur", {"steps": 100}, "GaussianBlurAttack", {"steps": 100}, 0, 1e-3),
    # One walk is not another: ours may come closer by any amount.
    Pair("Boundary", {"steps": 500}, "BoundaryAttack", {"steps": 500}, 0, 0.1),
]


@pytest.fixture(scope="module")
def case():
    digits = data.load("digits")
    model, variables, _ = nns.zoo.load("digits_cnn")
    images, labels = data.to_float(digits.test_images), digits.test_labels.astype(np.int32)
    run = jax.jit(model.apply)
    right = np.asarray(run(variables, images)).argmax(1) == labels
    network = foolbox.JAXModel(lambda x: run(variables, x), bounds=(0, 1))
    return model.apply, variables, images[right][:32], labels[right][:32], network


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: " ".join([p.row, *map(str, p.ours.items())]))
def test_as_many_are_fooled_as_closely(case, pair):
    apply, params, images, labels, network = case
    function = attacks.ATTACKS[pair.row]
    ours = function(jax.random.key(0), apply, params, images, labels, **pair.ours)
    eps = pair.ours.get("eps", getattr(function, "keywords", {}).get("eps"))
    np.random.seed(0)
    with jax.numpy_rank_promotion("allow"):
        attack = getattr(foolbox.attacks, pair.name)(**pair.theirs)
        _, theirs, fooled = attack(network, jnp.asarray(images), jnp.asarray(labels), epsilons=eps)
    # Where Foolbox's Carlini-Wagner finds nothing it returns black, which may be another class.
    black = (np.asarray(theirs) == 0).all((1, 2, 3))
    success, fooled = np.asarray(ours.success), np.asarray(fooled) & ~black
    assert abs(success.mean() - fooled.mean()) <= pair.success
    both = success & fooled if pair.row in attacks.CLOSEST else np.ones(32, bool)
    assert both.any()
    flat = (np.asarray(theirs) - images).reshape(32, -1)[both]
    norm = np.inf if eps is not None or pair.row.endswith("Linf") else 2
    expected = np.linalg.norm(flat, ord=norm, axis=1).mean()
    found = ours.distance[both].mean()
    assert found <= expected * (1 + pair.distance)
    assert pair.row == "Boundary" or found >= expected * (1 - pair.distance)
