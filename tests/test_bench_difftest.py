"""The benchmark of differential testing: its rows, and a pair that fits its graph."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import bench_difftest as bench
from experiments import record
from nnslicer_jax import data, zoo
from tests.pairs import as_black_box, linear_pair
from tests.pairs import seeds as draw

ABOUT = {"command": "x", "data": "x", "seeds": (0,), "commit": "unknown", "hardware": "x"}


@pytest.mark.parametrize("black_box", [False, True])
def test_rows_fit_the_schema(black_box):
    pair = linear_pair(apart=0.3)
    pair = as_black_box(pair) if black_box else pair
    seeds = draw(6)
    made = bench.searched("a pair", pair, seeds, 2, 2) + bench.parts("a pair", pair, seeds, 1)
    rows = [record.Row(study="bench_difftest", **row, **ABOUT) for row in made]
    found = {(row.row, row.metric): row.ours for row in rows}
    assert found["a pair", "seconds a seed"] * found["a pair", "seeds a second"] == pytest.approx(1)
    assert 0 < found["a pair", "queries a seed"] < bench._MAX_QUERIES
    timed = [name for name, metric in found if metric == "time of a query"]
    assert timed == ["a pair"] + [
        f"a pair, {part}"
        for part in ("original model", "compressed model", "mutation", "novelty", "selection")
    ]
    assert all(found[name, "time of a query"] > 0 for name in timed)


def test_the_twin_of_eight_bits_is_near_its_original():
    digits, trained = data.load("digits"), zoo.load("digits_cnn")
    images = data.to_float(digits.train_images[:200])
    pair = bench.eight_bits(trained.model.apply, trained.variables, images)
    original, compressed = pair.probabilities(digits.test_images)
    np.testing.assert_allclose(
        original, jax.nn.softmax(trained.model.apply(trained.variables, data.to_float(
            digits.test_images))), atol=1e-5)  # fmt: skip
    apart = np.abs(original - compressed).max(axis=1)
    assert 0 < np.median(apart) < 0.05
    assert (original.argmax(1) == compressed.argmax(1)).mean() > 0.97


def test_resnet20_is_seeded_from_the_file(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3)).astype(np.uint8)
    path = tmp_path / "exact.npz"
    np.savez(path, test_images=pixels, test_labels=np.zeros(9, int))
    given = SimpleNamespace(
        data_dir=None, pairs_dir="x", images=str(path), seeds=4, runs=1
    )  # fmt: skip
    asked = []

    def searched(name, pair, seeds, alone, runs):
        asked.append(seeds)
        return [{"row": name, "metric": "seconds a seed", "ours": 0.05, "note": ""}]

    monkeypatch.setattr(bench.pairs, "pair", lambda *_, **__: (None, "cifar10", ("ResNet-20", "Q")))
    monkeypatch.setattr(bench, "searched", searched)
    monkeypatch.setattr(bench, "parts", lambda *_: [])
    (row,) = bench.measured("resnet20", given)
    assert row["data"] == "cifar10, 9 test images of exact.npz"
    assert asked[0].shape == (4, 32, 32, 3)
    assert all((pixels == seed[None]).all(axis=(1, 2, 3)).any() for seed in asked[0])
