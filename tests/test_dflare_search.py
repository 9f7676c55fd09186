"""The study of the searches, on the digits: its rows, going on, figures, and what it refuses."""

import dataclasses

import numpy as np
import pytest

from experiments import dflare_search as study
from experiments import record
from nnslicer_jax import data
from tests.pairs import linear_pair

TINY = dataclasses.replace(
    study.SCHEDULES["tiny"],
    kinds=("released", "best", "best_label", "uniform", "no_novelty", "diffchaser"),
)
ABOUT = {
    "command": "python -m experiments.dflare_search", "data": "digits", "seeds": (0, 1),
    "hardware": "a machine", "commit": "0123456",
}  # fmt: skip


@pytest.fixture(scope="module")
def case():
    digits = data.load("digits")
    return study.Case(
        "stand_in", "LeNet-4 Prune", linear_pair(apart=0.3, classes=10), "digits",
        digits.test_images[:100], np.asarray(digits.test_labels[:100]),
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(case, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return study.run(case, TINY, folder), folder


def test_every_row_once_beside_the_published_ones(case, done):
    made = [
        record.Row(study="dflare_search", **{**ABOUT, **row}) for row in study.rows(case, done[0])
    ]
    record.Record(title=study.TITLE, text=study.TEXT, rows=made)
    by_name = {(row.row, row.metric): row for row in made}
    assert by_name["LeNet-4 Prune, released", "mean queries"].published == 18.34
    assert by_name["LeNet-4 Prune, DFlare_R", "mean queries"].published == 20.79
    assert by_name["LeNet-4 Prune, DFlare_D", "success rate"].published == 92.12
    assert by_name["LeNet-4 Prune, DiffChaser", "success rate"].published == 99.44
    assert by_name["LeNet-4 Prune, best", "mean queries"].published is None
    assert by_name["LeNet-4 Prune, best, label kept", "labels kept"].ours == 100
    released = by_name["LeNet-4 Prune, released", "mean queries"]
    assert released.ours == pytest.approx(
        np.mean([one.queries[one.success].mean() for one in done[0]["released"]]), abs=0.01
    )
    original, compressed = case.pair.probabilities(case.images)
    unchanged = by_name["LeNet-4 Prune", "images that trigger unchanged"]
    assert unchanged.ours == (original.argmax(1) != compressed.argmax(1)).sum()
    accuracy = by_name["LeNet-4 Prune", "accuracy, original"].ours
    assert accuracy == pytest.approx(100 * (original.argmax(1) == case.labels).mean(), abs=0.01)


def test_a_run_that_was_ended_goes_on(case, done, monkeypatch):
    found, folder = done
    monkeypatch.setattr(study, "diffchase", None)
    again = study.run(case, TINY, folder)
    for kind, results in found.items():
        for one, other in zip(results, again[kind], strict=True):
            assert one.queries.tolist() == other.queries.tolist()
    other = dataclasses.replace(TINY, timeout=1.0)
    with pytest.raises(ValueError, match="another run|other"):
        study.run(case, other, folder)


def test_figures(case, done, tmp_path):
    study.save_histogram(case, done[0], tmp_path / "queries.png")
    study.save_examples(case, TINY, done[0], tmp_path / "triggers.png")
    for name in ("queries.png", "triggers.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_nothing_found_is_a_row_too(case, tmp_path):
    import difftest

    twins = difftest.ModelPair(case.pair.original, case.pair.original)
    lone = dataclasses.replace(case, pair=twins)
    found = study.run(lone, dataclasses.replace(TINY, kinds=("no_novelty",)), tmp_path)
    rates = [row for row in study.rows(lone, found) if row["metric"] == "success rate"]
    assert [row["ours"] for row in rates] == [0]


def test_images_of_a_file_that_holds_none(tmp_path, monkeypatch):
    from types import SimpleNamespace

    find = SimpleNamespace(pair=lambda name: (None, "digits", None))
    monkeypatch.setattr(study, "pairs", find)
    path = tmp_path / "images.npz"
    np.savez(path, something=np.zeros(3))
    with pytest.raises(ValueError, match="images.npz: no test_images and test_labels"):
        study.prepare("lenet1", {}, None, str(path))
