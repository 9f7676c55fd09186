"""The benchmark of AutoAttack: rows that fit the schema, and the network's twin in PyTorch."""

import jax
import numpy as np
import pytest

from experiments import bench_autoattack as bench
from experiments import record
from nnslicer_jax import models
from prune import evaluate
from tests.test_models import MODELS, example


def linear(weights, images):
    return images.reshape(len(images), -1) @ weights


def test_rows_fit_the_schema_without_torchattacks():
    rng = np.random.default_rng(0)
    images = rng.random((6, 4, 4, 1), np.float32)
    weights = rng.normal(size=(16, 4)).astype(np.float32)
    labels = linear(weights, images).argmax(1)
    labels[0] = (labels[0] + 1) % 4
    case = bench.Case("linear", linear, weights, images, labels, "noise", None)
    rows = bench.measure(case, 0.1, bench.Budget(4, 2, 6), 0, None)
    about = {"command": "x", "data": case.data, "seeds": (0,), "commit": "unknown", "hardware": "x"}
    made = [record.Row(study="bench_autoattack", **row, **about) for row in rows]
    left = {row.row: row.ours for row in made if row.metric.startswith("accuracy")}
    assert left["linear"] == pytest.approx(500 / 6)
    each = [left[f"linear, {name}, eps 0.1"] for name in evaluate.ENSEMBLE]
    assert left["linear, all, eps 0.1"] <= min(each) and max(each) <= left["linear"]


def test_a_difference_beyond_the_target_is_said():
    said = []

    def say(*args, **more):
        said.append((*args, more["note"]))

    ours = np.arange(1000) < 500
    bench._compare(say, "a", ours, np.arange(1000) < 505)
    bench._compare(say, "b", ours, np.arange(1000) >= 494)
    assert said[0][2] == pytest.approx(-0.5) and "met; 5 images differ" in said[0][-1]
    assert said[1][2] == pytest.approx(-0.6) and "missed; 994 images differ" in said[1][-1]


def test_budget_of_the_ensemble_is_the_published_one_unless_asked():
    assert list(bench.ensemble(bench.Budget(1, 2, 3))) == list(evaluate.ENSEMBLE)


@pytest.mark.parametrize("name", bench.TWINS)
def test_the_twin_is_the_same_network(name):
    torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[bench]")
    model, variables, images = example(name)
    network = bench.twin(bench.TWINS[name], model, variables)
    with torch.no_grad():
        found = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    expected = np.asarray(jax.jit(model.apply)(variables, images))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert set(bench.TWINS) <= set(models.MODELS) == set(MODELS)


def test_networks_without_a_twin_are_refused():
    with pytest.raises(ValueError, match="^model must be one of cnn_small, digits_cnn, mnist_cnn"):
        bench.prepare("lenet5_mnist", 10, None)
