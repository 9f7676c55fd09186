"""The attack benchmark: every attack has its pace, and what it measures fits the schema."""

import inspect

import jax
import numpy as np
import pytest

from experiments import bench_attacks as bench
from experiments import record
from experiments.attack_steps import FEWER_STEPS
from nnslicer_jax import attacks


def linear(weights, images):
    return images.reshape(len(images), -1) @ weights


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    images = rng.random((4, 6, 6, 1), np.float32)
    weights = rng.normal(size=(36, 3)).astype(np.float32)
    return bench.Case("linear", linear, weights, images, linear(weights, images).argmax(1), "noise")


def test_every_attack_has_a_pace():
    for name, options in FEWER_STEPS.items():
        assert set(options) <= set(inspect.signature(attacks.ATTACKS[name]).parameters)
    same = {"searches": "binary_search_steps", "first_constant": "initial_const"}
    for name, pace in bench.PACES.items():
        assert pace.ours == FEWER_STEPS.get(name, {})
        if pace.name is not None:
            assert pace.theirs == {same.get(key, key): value for key, value in pace.ours.items()}
    assert set(bench.PACES) == set(attacks.ATTACKS)
    compared = [name for name, pace in bench.PACES.items() if pace.name]
    assert len(compared) == 11


@pytest.mark.parametrize("name", ["FGSM 8", "DeepFool L2", "SinglePixel"])
def test_rows_fit_the_schema_without_foolbox(case, name):
    rows = bench.measure(case, name, 2, 0, None)
    about = {"command": "x", "data": case.data, "seeds": (0,), "commit": "unknown", "hardware": "x"}
    made = [record.Row(study="bench_attacks", **row, **about) for row in rows]
    found = {row.metric: row for row in made}
    assert found["images a second"].ours > 0
    result = attacks.ATTACKS[name](
        jax.random.key(0), linear, case.params, case.images, case.labels,
        **bench.PACES[name].ours,
    )  # fmt: skip
    assert found["images fooled"].ours == pytest.approx(np.mean(result.success))
    if result.success.any():
        expected = np.mean(np.asarray(result.distance)[np.asarray(result.success)])
        assert found["mean distance of these"].ours == pytest.approx(expected)
    else:
        assert found["mean distance of these"].note == "none was fooled"
