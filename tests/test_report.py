"""The results schema, where a result says it comes from, and the pages rendered from results."""

import dataclasses
import json
import os
import platform
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import provenance, record, report

ORIGIN = {
    "command": "python -m experiments.bench_slicing --schedule cpu",
    "data": "synthetic images, 32 x 32 x 3",
    "seeds": (0, 1),
    "commit": "0123456789ab",
    "hardware": "a processor, 2 cores",
}


def row(**changes):
    fields = {"study": "bench_slicing", "row": "LeNet-5", "metric": "backward", "ours": 0.004}
    return record.Row(**{**fields, **ORIGIN, **changes})


def one(*rows, **changes):
    return record.Record(title="Speed of slicing", rows=rows or (row(),), **changes)


def test_written_record_reads_back_equal(tmp_path):
    made = one(
        row(published=0.3, spread=0.001, unit="s", n=32, note="a | b"),
        row(metric="forward", ours=3, published="below 3", spread=(2.5, 3.5)),
        row(metric="precision", ours=None, note="no attack succeeded", n=0),
        text="Spread: standard deviation over five runs.",
    )
    path = tmp_path / "new" / "bench_slicing.json"
    record.write(path, made)
    assert record.read(path) == made
    assert [entry.name for entry in path.parent.iterdir()] == ["bench_slicing.json"]


def test_numpy_and_jax_numbers_are_stored_as_plain_ones():
    made = row(ours=np.float32(0.25), n=np.int64(7), seeds=[np.int32(3)], spread=np.float64(1))
    again = record.Record.from_json(one(made).to_json()).rows[0]
    assert (again.ours, again.n, again.seeds, again.spread) == (0.25, 7, (3,), 1.0)
    assert type(again.ours) is float and type(again.n) is int


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"study": "Bench Slicing"}, "study is 'Bench Slicing'"),
        ({"row": " "}, "row is empty"),
        ({"metric": 3}, "metric is a int; text is due"),
        ({"ours": float("nan")}, "ours is nan"),
        ({"ours": True}, "ours is True"),
        ({"ours": "0.1"}, "ours is '0.1'"),
        ({"ours": None}, "a note must say why"),
        ({"published": float("inf")}, "published is inf"),
        ({"published": ""}, "published is empty"),
        ({"spread": -1}, "spread is -1"),
        ({"spread": (2, 1)}, "an interval is (low, high)"),
        ({"spread": (1, 2, 3)}, "an interval is (low, high)"),
        ({"n": -1}, "n holds -1"),
        ({"n": 1.5}, "n holds 1.5"),
        ({"seeds": 0}, "a list of integers is due"),
        ({"seeds": ["0"]}, "seeds holds '0'"),
        ({"commit": "main"}, "commit is 'main'"),
        ({"note": "two\nlines"}, "note has a line break"),
        ({"data": "MNIST in " + "/data/mnist/raw"}, "names a path of one machine"),
        ({"command": "python x.py --out=" + "/srv/out/x.json"}, "names a path of one machine"),
        ({"command": "python x.py --out ~/x.json"}, "names a path of one machine"),
    ],
)
def test_faulty_row_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError) as error:
        row(**changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["images/s at 8/255", "TP / FP", "~3/4 of it", "https://x.org/a/b"]
)
def test_slashes_that_are_no_paths_are_accepted(text):
    assert row(note=text).note == text


def test_record_refuses_rows_that_do_not_belong_together():
    with pytest.raises(ValueError, match="at least one row"):
        record.Record(title="t", rows=())
    with pytest.raises(ValueError, match="bench_slicing, other; a file holds one"):
        one(row(), row(study="other"))
    with pytest.raises(ValueError, match="LeNet-5 / backward twice"):
        one(row(), row(ours=1.0))
    # The same metric measured on other hardware is another number.
    assert len(one(row(), row(hardware="an accelerator")).rows) == 2


def changed(**changes):
    return json.dumps({**json.loads(one().to_json()), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        (one().to_json()[:-20], "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "the file is a list"),
        (changed(schema=2), "schema is 2; this code reads 1"),
        (changed(rows={}), "rows is a dict"),
        (changed(rows=[3]), "row 0 is a int"),
        (changed(rows=[{}]), "row 0 lacks command"),
        (changed(extra=1), "the file holds extra; accepted: rows"),
        (one().to_json().replace("0.004", "NaN"), "NaN is no number"),
        (one().to_json().replace("0.004", '"fast"'), "row 0: ours is 'fast'"),
    ],
)
def test_faulty_file_is_refused_in_one_line_that_names_it(tmp_path, text, message):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        record.read(path)
    assert str(error.value).startswith("broken.json: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_binary_file_is_refused(tmp_path):
    path = tmp_path / "broken.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="broken.json"):
        record.read(path)


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    record.write_text(path, "old")

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        record.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# Provenance


def test_command_is_what_a_reader_types_in_a_clone():
    inside = provenance.ROOT / "experiments"
    argv = [
        str(inside / "bench_slicing.py"),
        f"--out={inside / 'results' / 'bench_slicing.json'}",
        "--data_dir",
        "/srv/data/mnist",
        "--cache=~/cache/nns",
        "--theta=0.1,0.2",
        "--note=two words",
    ]
    assert provenance.command(argv) == (
        "python -m experiments.bench_slicing --out=experiments/results/bench_slicing.json "
        "--data_dir mnist --cache=nns --theta=0.1,0.2 '--note=two words'"
    )
    assert provenance.command(["/usr/bin/pytest", "-x"]) == "pytest -x"


def test_hardware_names_cores_and_jax_and_no_host():
    text = provenance.hardware()
    assert re.search(r", [1-9]\d* cores, ", text)
    assert f"jax {jax.__version__} on cpu" in text
    assert platform.node() not in text
    assert row(hardware=text).hardware == text


def git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_commit_says_whether_code_changed(tmp_path, monkeypatch):
    root = tmp_path.resolve()
    monkeypatch.setattr(provenance, "ROOT", root)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(root.parent))
    assert provenance.commit() == "unknown"
    git(root, "init", "-q")
    assert provenance.commit() == "uncommitted"
    (root / "code.py").write_text("a = 1\n")
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "one")
    clean = git(root, "rev-parse", "HEAD")[:12]
    assert provenance.commit() == clean
    (root / "experiments" / "results").mkdir(parents=True)
    (root / "experiments" / "results" / "a.json").write_text("{}")
    (root / "RESULTS.md").write_text("")
    assert provenance.commit() == clean
    (root / "code.py").write_text("a = 2\n")
    assert provenance.commit() == f"{clean}-dirty"
    monkeypatch.setattr(provenance, "ROOT", root / "experiments")
    assert provenance.commit() == "unknown"


def test_origin_fills_a_row():
    origin = provenance.origin(data="digits", seeds=[0])
    assert set(origin) == set(ORIGIN)
    made = record.Row(study="s", row="r", metric="m", ours=1, **origin)
    assert made.seeds == (0,)


# Pages


def test_page_shows_published_beside_ours_and_how_to_repeat_it():
    text = report.pages(
        [
            one(
                row(published=0.3, ours=0.0041234, spread=0.0001, unit="s", n=32),
                row(metric="forward", ours=3, published="below 3", spread=(2.5, 3.5), unit="s"),
                row(metric="none", ours=None, note="a | b"),
                row(ours=0.5, unit="s", hardware="an accelerator", seeds=()),
                text="Spread: standard deviation.",
            )
        ]
    )["BENCHMARKS.md"]
    assert text.split("\n\n", 2)[2] == "\n".join(
        [
            "## Speed of slicing",
            "",
            "Spread: standard deviation.",
            "",
            "| row | metric | published | ours | unit | n | note |",
            "| --- | --- | ---: | ---: | --- | ---: | --- |",
            "| LeNet-5 | backward | 0.3 | 0.004123 ± 0.0001 | s | 32 |  |",
            "| LeNet-5 | forward | below 3 | 3 (2.5 to 3.5) | s |  |  |",
            "| LeNet-5 | none |  | undefined |  |  | a \\| b |",
            "",
            "- command: `python -m experiments.bench_slicing --schedule cpu`",
            "- data: synthetic images, 32 x 32 x 3",
            "- seeds: 0, 1",
            "- commit: 0123456789ab",
            "- hardware: a processor, 2 cores",
            "",
            "| row | metric | ours | unit |",
            "| --- | --- | ---: | --- |",
            "| LeNet-5 | backward | 0.5 | s |",
            "",
            "- command: `python -m experiments.bench_slicing --schedule cpu`",
            "- data: synthetic images, 32 x 32 x 3",
            "- seeds: none drawn",
            "- commit: 0123456789ab",
            "- hardware: an accelerator",
            "",
        ]
    )


def test_benchmarks_and_studies_go_to_their_pages():
    study = record.Record(title="Pruning", rows=(row(study="targeted_pruning"),))
    texts = report.pages([one(), study])
    assert "## Speed of slicing" in texts["BENCHMARKS.md"]
    assert "## Pruning" in texts["RESULTS.md"]
    assert "## Pruning" not in texts["BENCHMARKS.md"]
    assert "Nothing has been recorded yet." in report.pages([study])["BENCHMARKS.md"]


def test_two_files_of_one_study_share_a_section_and_must_agree(tmp_path):
    record.write(tmp_path / "bench_slicing.json", one())
    record.write(tmp_path / "bench_slicing_gpu.json", one(row(hardware="an accelerator")))
    text = report.pages(report.load(tmp_path))["BENCHMARKS.md"]
    assert text.count("## Speed of slicing") == 1
    assert text.index("a processor") < text.index("an accelerator")
    other = dataclasses.replace(one(row(hardware="x")), title="Another title")
    record.write(tmp_path / "bench_slicing_x.json", other)
    with pytest.raises(ValueError, match="two files of bench_slicing differ"):
        report.load(tmp_path)


def test_check_passes_only_on_what_render_writes(tmp_path):
    results, out = tmp_path / "results", tmp_path / "out"
    record.write(results / "bench_slicing.json", one())
    with pytest.raises(ValueError, match=r"RESULTS.md and BENCHMARKS.md out of date"):
        report.render(results, out, check=True)
    assert not out.exists()
    report.render(results, out)
    assert report.render(results, out, check=True).startswith("up to date")
    record.write(results / "bench_slicing.json", one(row(ours=0.005)))
    with pytest.raises(ValueError, match=r"^BENCHMARKS.md out of date"):
        report.render(results, out, check=True)


def test_command_line_ends_in_one_line_on_a_faulty_file(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-m", "experiments.report", f"--results={tmp_path}", f"--out={tmp_path}"],
        cwd=provenance.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: a.json: the file lacks rows, schema, text, title\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_the_repositorys_pages_say_what_its_results_say():
    results = provenance.ROOT / "experiments" / "results"
    assert report.render(results, provenance.ROOT, check=True).startswith("up to date")
