"""Notebooks are stored without outputs, and their code runs."""

import json
from pathlib import Path

import numpy as np
import pytest

import difftest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "experiments" / "notebooks").glob("*.ipynb"))


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def test_there_are_notebooks():
    assert "routes" in [path.stem for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4
    assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


def test_the_notebook_of_routes_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names = {"__name__": "__main__"}
    for cell in cells(ROOT / "experiments" / "notebooks" / "routes.ipynb"):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    found, ablations = names["routes"], names["ablations"]
    assert len(found) == 397 and list(found.layers) == [f"Network/relu_{i}" for i in range(3)]
    assert names["right"].mean() > 0.8
    np.testing.assert_array_equal(ablations["top"].top1[0], names["right"])
    assert ablations["top"].top1.mean() < ablations["bottom"].top1.mean()
    assert (tmp_path / "routes.safetensors").is_file()
    assert "told rightly" in capsys.readouterr().out


def test_the_notebook_of_files_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names = {"__name__": "__main__"}
    for cell in cells(ROOT / "experiments" / "notebooks" / "difftest.ipynb"):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    # Own images take the place of these in one cell.
    later = cells(ROOT / "experiments" / "notebooks" / "difftest.ipynb")[5:]
    assert not any("images[" in "".join(c["source"]) for c in later if c["cell_type"] == "code")
    pair, found = names["pair"], names["found"]
    assert names["agree"].mean() > 0.95
    for result in found.values():
        assert result.success.mean() > 0.5
        original, compressed = pair.probabilities(result.triggers[result.success])
        assert (original.argmax(1) != compressed.argmax(1)).all()
    assert np.median(found["best"].queries) < np.median(found["released"].queries)
    kept = difftest.SearchResult.load(tmp_path / "triggers.npz")
    np.testing.assert_array_equal(kept.triggers, found["best"].triggers)
    assert "confirmed: 1.0" in capsys.readouterr().out
