"""The benchmark of routing: its rows, and that both sides do the same work."""

import jax
import numpy as np
import pytest

from experiments import bench_cdrp as bench
from experiments import bench_graph, record
from nnslicer_jax import models


def test_rows_fit_the_schema(monkeypatch):
    monkeypatch.setattr(bench_graph, "_SECONDS", 0.0)
    monkeypatch.setattr(bench, "SUBJECTS", {"digits_cnn": bench.Subject((8, 8, 1), 1e9)})
    about = {"command": "x", "data": "x", "seeds": (0,), "commit": "unknown", "hardware": "x"}
    rows = [
        record.Row(study="bench_cdrp", **row, **about)
        for row in bench.measure("digits_cnn", [1, 4], 2, 0, iterations=2)
    ]
    found = {(row.row, row.metric): row for row in rows}
    for size in (1, 4):
        name = f"digits_cnn, batch {size}"
        assert found[name, "images routed a second"].ours > 0
        assert found[name, "time against 2 passes of the network"].ours > 0
        assert found[name, "time against 2 passes of the network as traced"].ours > 0
        assert found[name, "temporary memory an image"].ours > 0
    best = found["digits_cnn, best batch", "images routed a second"]
    assert best.ours == max(r.ours for r in rows if r.metric == best.metric)
    assert best.note.endswith("target 1e+09, missed")


def test_passes_are_gradients_by_the_images():
    module = models.create("digits_cnn")
    images = jax.random.uniform(jax.random.key(0), (3, 8, 8, 1))
    params = module.init(jax.random.key(1), images)
    found = bench.passes(module.apply, params, images, 2)()
    assert found.shape == images.shape
    step = 1e-3 * np.sign(np.asarray(found))
    low, high = (module.apply(params, images + s * step).max(-1).sum() for s in (-1, 1))
    slope = float(high - low) / 2e-3
    assert slope == pytest.approx(float(np.abs(found).sum()), rel=0.1)
