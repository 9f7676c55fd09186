"""The slicing benchmark: what it measures, on a network of two small layers."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnslicer_jax as nns
from experiments import bench_slicing as bench
from experiments.record import Record, Row, read, write

OPTIONS = bench.Options(images=4, batch_size=2, thetas=(0.2,), seconds=0, least=2, growth=2)
SUBJECT = bench.SUBJECTS["lenet5"]._replace(theta=0.2, targets={"cpu": {"signed": 1e-9}})


def apply(params, x):
    hidden = jax.nn.relu(x.reshape(len(x), -1) @ params["first"])
    return hidden @ params["second"]


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    params = {"first": rng.normal(size=(6, 5)), "second": rng.normal(size=(5, 3))}
    params = jax.tree.map(jnp.float32, params)
    images = rng.random((4, 2, 3, 1), np.float32)
    graph = nns.trace(apply, params, images[:1])
    return bench.Case(SUBJECT, apply, params, graph, images, "noise; two layers")


@pytest.fixture(scope="module")
def rows(case):
    return bench.rows_of(case, OPTIONS)


def metrics(rows):
    return {row.metric: row for row in rows}


def test_everything_is_measured(rows):
    found = metrics(rows)
    assert len(found) == len(rows)
    kinds = ("theta 0", "mass, theta 0.2", "mass in passes, theta 0.2", "signed, theta 0.2")
    labels = [f"backward, {kind}" for kind in kinds]
    for label in [*labels, "EffectivePath, theta 0.5", "forward analysis"]:
        for size, what in ((1, "one image"), (2, "batch of 2")):
            row = found[f"{label}, {what}"]
            assert (row.unit, row.n) == ("s/image", size)
            assert found[f"{label}, {what}: in plain forward passes"].ours > 0
    for label in labels:
        # 6 x 5 and 5 x 3 terms.
        per_million = found[f"{label}: per million terms"]
        seconds = found[f"{label}, batch of 2"].ours
        assert per_million.ours == pytest.approx(1e3 * seconds / 45e-6)
        assert found[f"{label}: estimated beforehand"].ours > 0
        assert found[f"{label}: compiling"].ours >= 0
    assert "backward, theta 0, batch of 4" in found
    assert "backward, signed, theta 0.2, batch of 4" not in found
    assert found["estimated memory of a batch of 4, the largest sliced"].n == 4
    assert found["profiling, one image"].n == 1
    assert found["profiling, 4 images in batches of 4"].n == 4


def test_measurements_are_within_their_spread(rows):
    timed = [row for row in rows if row.spread is not None]
    assert len(timed) > 10
    for row in timed:
        assert 0 < row.spread[0] <= row.ours <= row.spread[1]


def test_published_figures_stand_at_the_authors_theta(rows):
    published = {row.metric: row.published for row in rows if row.published is not None}
    assert published == {
        "forward analysis, one image": 3.0,
        "forward analysis, batch of 2": 0.3,
        "backward, signed, theta 0.2, one image": 0.5,
        "backward, signed, theta 0.2, batch of 2": 0.3,
    }


def test_targets_are_judged(rows):
    found = metrics(rows)
    assert found["backward, signed, theta 0.2, batch of 2"].note.endswith("s, missed")
    assert "target" not in found["backward, signed, theta 0.2, one image"].note
    assert found["peak memory above that, slicing"].note.endswith("8 GiB, met")
    assert "target at most 1.3, " in (
        found["profiling, 4 images in batches of 4: in plain forward passes"].note
    )


def test_memory_only_grows(rows):
    found = metrics(rows)
    slicing, all_ = (found[f"peak memory above that, {w}"].ours for w in ("slicing", "all of it"))
    assert 0 <= slicing <= all_
    assert found["resident before: packages and network"].ours > 1


def test_the_rows_are_a_results_file(rows, tmp_path):
    path = tmp_path / "bench_slicing.json"
    write(path, Record(title=bench.TITLE, text=bench.TEXT, rows=rows))
    assert read(path).rows == tuple(rows)


def test_calls_alternate_and_first_ones_do_not_count():
    calls = []
    costs = {"plain": 2.0, "other": 6.0}
    clock = [0.0]

    def call(name):
        calls.append(name)
        # First calls compile.
        clock[0] += costs[name] + (100 if calls.count(name) == 1 else 0)

    timing = bench.alternate(
        lambda: call("plain"), lambda: call("other"), seconds=20, least=2, clock=lambda: clock[0]
    )
    assert calls == ["plain", "other"] * 4
    assert timing.first == 106 and timing.ratio == 3
    assert timing.plain == [2.0] * 3 and timing.other == [6.0] * 3


def test_a_call_that_takes_long_is_still_repeated():
    clock = itertools.count(0, 1000)
    timing = bench.alternate(
        lambda: None, lambda: None, seconds=1, least=3, clock=lambda: next(clock)
    )
    assert len(timing.other) == len(timing.plain) == 3


def row(title, ours):
    return Row(
        study=bench.STUDY, row=title, metric="backward", ours=ours, command="python", data="noise",
        seeds=(0,), commit="unknown", hardware="a processor",
    )  # fmt: skip


def test_new_rows_replace_those_of_their_network():
    before = [row("ResNet-18", 1), row("LeNet-5", 2), row("another", 3)]
    made = bench.replaced(before, [row("LeNet-5", 4), row("ResNet-10", 5)])
    assert [(r.row, r.ours) for r in made] == [
        ("LeNet-5", 4), ("ResNet-10", 5), ("ResNet-18", 1), ("another", 3),
    ]  # fmt: skip


def test_absent_data_are_replaced_by_noise_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("NNSLICER_DATA", str(tmp_path))
    monkeypatch.setattr("nnslicer_jax.data.files.cache_folder", lambda: tmp_path)
    options = bench.Options(images=3, seed=7)
    images, what = bench.load_images("lenet5", options)
    again, _ = bench.load_images("lenet5", options)
    assert images.shape == (3, 28, 28, 1) and images.dtype == np.float32
    assert 0 <= images.min() and images.max() < 1 and np.array_equal(images, again)
    assert what == "3 images of uniform noise, 28x28x1 (mnist was not at hand)"


def test_a_shipped_network_is_taken_from_the_zoo():
    images = np.zeros((1, 28, 28, 1), np.float32)
    case = bench.prepare("lenet5", bench.Options(images=1), images, "zeros")
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(case.variables["params"]))
    assert case.about == f"zeros; LeNet-5 of {count:,} parameters, trained, from the zoo"
    logits, _ = nns.evaluate(case.graph, case.variables, images)
    np.testing.assert_allclose(logits, case.apply(case.variables, images), rtol=1e-5)


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (["lenet6"], {}, "models must be among lenet5, resnet10, resnet18, not lenet6"),
        ([], {}, "not nothing"),
        (["lenet5"], {"thetas": (0.0,)}, "thetas must be above 0 and at most 1, not 0.0"),
        (["lenet5"], {"images": 0}, "images must be at least 1, not 0"),
        (["lenet5"], {"batch_size": 500}, "batch_size must be 1 to 256"),
    ],
)
def test_options_that_are_not_accepted(names, changes, message, tmp_path):
    out = tmp_path / "results.json"
    with pytest.raises(ValueError, match=message):
        bench.run(names, bench.Options()._replace(**changes), out)
    assert not out.exists()
