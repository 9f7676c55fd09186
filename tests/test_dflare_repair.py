"""The study of DRepair, on the digits: its rows, going on, and what it refuses."""

import dataclasses
import json

import numpy as np
import pytest

import difftest
from experiments import dflare_repair as study
from experiments import pairs, record
from experiments.dflare_repair import Cell, Ratios, Summary
from tests.pairs import linear_pair

TINY = dataclasses.replace(study.SCHEDULES["tiny"], searches=1)
ABOUT = {
    "command": "python -m experiments.dflare_repair", "data": "digits", "seeds": (0, 1),
    "hardware": "a machine",
}  # fmt: skip


def find(name, data_dir=None):
    assert data_dir is None
    return linear_pair(apart=0.3, classes=10), "digits", ("LeNet-4", "Prune", 100.0)


@pytest.fixture(scope="module")
def case():
    return study.prepare("stand_in", find, TINY)


@pytest.fixture(scope="module")
def done(case, tmp_path_factory):
    """The cells of a run, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    return study.run(case, TINY, folder, "0123456"), folder


def _record(rows):
    made = tuple(record.Row(study="dflare_repair", **{**ABOUT, **row}) for row in rows)
    return record.Record(title=study.TITLE, text=study.TEXT, rows=made)


def test_a_case_has_seeds_and_others_that_are_unseen(case):
    assert case.title == "LeNet-4 Prune"
    assert case.seeds.shape == case.unseen.shape == (24, 8, 8, 1)
    assert not any((one == other).all() for one in case.seeds for other in case.unseen)


def test_a_run_gives_every_row_once(case, done):
    cells, _ = done
    made = _record(study.rows(case, cells)).rows
    by_metric = {row.metric: row for row in made}
    assert by_metric["repair ratio"].published == 48.48
    assert by_metric["mean queries, before the repair"].published == 18.34
    assert by_metric["mean queries, after the repair"].published == 55.67
    assert by_metric["queries after the repair to before it"].published == 3.04
    assert by_metric["median queries, after the repair, unseen seeds"].published is None
    assert len(made) == 3 + 4 * 7 + 2
    assert all(row.ours is not None and row.commit == "0123456" for row in made)
    assert by_metric["repair ratio"].n == 2
    assert {row.row for row in made} == {"LeNet-4 Prune"}


def test_cells_hold_what_was_searched(case, done):
    cells, folder = done
    (cell,) = cells
    result = difftest.SearchResult.load(folder / "stand_in" / "search_0" / "before.npz")
    assert cell.before.found == result.success.sum() >= 5
    assert cell.before.queries == result.queries[result.success].mean()
    assert cell.before.l2 == np.median(result.l2[result.success])
    assert cell.before.kept == result.keeps_label[result.success].mean()
    assert cell.before.searched + cell.before.deviating == cell.before.seeds == 24
    assert len(cell.ratios) == 2
    for ratios in cell.ratios:
        assert 0 <= ratios.repair <= 1 and 0 <= ratios.inducing <= 1
        assert ratios.improvement <= ratios.repair


def test_a_run_goes_on_where_it_stopped(case, done, monkeypatch):
    cells, folder = done

    def again(*_args, **_options):
        raise AssertionError("this was done before")

    with monkeypatch.context() as patched:
        patched.setattr(study, "run_cell", again)
        assert study.run(case, TINY, folder) == cells
    (folder / "stand_in" / "done.json").unlink()
    # The searches themselves are kept too.
    (other,) = study.run(case, TINY, folder, "89abcde")
    assert other._replace(commit="0123456") == cells[0]


def test_every_search_has_its_own_seed_and_rows_tell_the_code(case, done, tmp_path, monkeypatch):
    asked = []

    def run_cell(_case, _schedule, seed, folder, commit):
        asked.append((seed, folder.name))
        return done[0][0]._replace(commit=commit)

    monkeypatch.setattr(study, "run_cell", run_cell)
    one = study.run(case, dataclasses.replace(TINY, searches=3), tmp_path, "0123456")
    assert asked == [(0, "search_0"), (1, "search_1"), (2, "search_2")] and len(one) == 3
    file = tmp_path / "stand_in" / "done.json"
    kept = json.loads(file.read_text())
    del kept["1"]
    file.write_text(json.dumps(kept))
    two = study.run(case, dataclasses.replace(TINY, searches=3), tmp_path, "89abcde")
    assert len(asked) == 4
    rows = study.rows(case, two)
    assert all("made at 0123456, 89abcde" in row["note"] for row in rows)
    _record(rows)


def test_another_run_does_not_mix_in(case, done):
    _, folder = done
    changed = dataclasses.replace(TINY, max_queries=7)
    with pytest.raises(ValueError, match="holds checkpoints of another run, schedule"):
        study.run(case, changed, folder)


def test_a_damaged_ledger_is_told(case, tmp_path):
    (tmp_path / "stand_in").mkdir()
    (tmp_path / "stand_in" / "done.json").write_text("{")
    with pytest.raises(ValueError, match="done.json is damaged"):
        study.run(case, TINY, tmp_path)


def test_too_few_triggers_are_told(case, tmp_path):
    same = difftest.ModelPair(case.pair.original, case.pair.original)
    alike = dataclasses.replace(case, pair=same)
    few = dataclasses.replace(TINY, max_queries=3)
    with pytest.raises(ValueError, match="stand_in: 0 triggers from 24 seeds; at least 5 are due"):
        study.run(alike, few, tmp_path)


def test_rows_by_hand(case):
    found = Summary(10, 1, 9, 9, 20.0, 15.0, 0.5, 8.0, 0.25)
    none = Summary(10, 9, 1, 0, None, None, None, None, None)
    cell = Cell([Ratios(0.5, 0.1, 0.4), Ratios(0.3, 0.3, 0.0)], found, none, none, found, "1" * 7)
    rows = {row.metric: row for row in _record(study.rows(case, [cell])).rows}
    assert rows["repair ratio"].ours == 40 and rows["improvement ratio"].ours == 20
    np.testing.assert_allclose(rows["repair ratio"].spread, 14.142, atol=1e-3)
    assert rows["seeds that deviate, after the repair"].ours == 90
    assert rows["success rate, after the repair"].ours == 0
    assert rows["success rate, before the repair"].ours == 100
    assert rows["mean queries, after the repair"].ours is None
    assert rows["labels kept, before the repair"].ours == 25
    assert rows["median L2, before the repair"].ours == 8
    assert rows["median L2, after the repair"].ours is None
    assert rows["mean queries, after the repair"].note.startswith("no trigger was found")
    assert not any("to before it" in metric for metric in rows)


def test_the_figure_is_written(case, done, tmp_path):
    study.save_figure({"LeNet-4 Prune": done[0], "other": done[0]}, tmp_path / "a" / "ratios.png")
    assert (tmp_path / "a" / "ratios.png").read_bytes()[:4] == b"\x89PNG"


def test_a_pair_without_a_row_of_table_4_has_its_name():
    assert pairs.titled("mine", None) == "mine"
    assert pairs.titled("x", "CNN Prune") == "CNN Prune"


def test_seeds_come_from_the_file_for_cifar10(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3)).astype(np.uint8)
    path = tmp_path / "exact.npz"
    np.savez(path, test_images=pixels, test_labels=np.zeros(60, int))

    def cifar(name, data_dir=None):
        return linear_pair(), "cifar10", ("ResNet-20", "Quantization-8-bit")

    case = study.prepare("resnet20", cifar, TINY, None, str(path))
    assert case.data == ("cifar10, 60 test images of exact.npz: 24 seeds and 24 unseen ones")
    assert all((pixels == seed[None]).all(axis=(1, 2, 3)).any() for seed in case.seeds)
