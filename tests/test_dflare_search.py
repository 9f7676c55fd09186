"""The study of the searches, on the digits: its rows, going on, figures, and what it refuses."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy.stats import wilcoxon

from difftest import diffchaser
from experiments import compress, pairs, record
from experiments import dflare_search as study
from nnslicer_jax import data
from tests.pairs import assert_same_search, linear_pair

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
        record.Row(study="dflare_search", **{**ABOUT, **row})
        for row in study.rows(case, done[0], TINY)
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


def test_diffchaser_goes_on_within_its_seeds(case, done, tmp_path, monkeypatch):
    found = done[0]["diffchaser"][0]
    chase, calls = diffchaser._chase, []

    def ends(*given):
        calls.append(given[-1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        chase(*given)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(diffchaser, "_chase", ends)
        study.run_cell(case, TINY, "diffchaser", 0, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(
            diffchaser, "_chase", lambda *given: (calls.append(given[-1]), chase(*given))
        )
        again = study.run_cell(case, TINY, "diffchaser", 0, tmp_path)
    assert calls[1] == calls[2] and len(calls) == len(set(calls)) + 1
    assert_same_search(again, found)
    # A result that was saved whole by earlier code, which did not name its seeds.
    again.settings.pop("seeds")
    again.save(tmp_path / "diffchaser_0.npz")
    assert_same_search(study.run_cell(case, TINY, "diffchaser", 0, tmp_path), found)


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
    rates = [row for row in study.rows(lone, found, TINY) if row["metric"] == "success rate"]
    assert [row["ours"] for row in rates] == [0]


def test_rows_say_their_budget_their_seeds_and_what_they_count(case, done):
    found = done[0]
    rows = {(row["row"], row["metric"]): row for row in study.rows(case, found, TINY)}
    for kind, most, searches in (("released", 300, 2), ("best_label", 60, 1),
                                 ("diffchaser", 500, 1)):  # fmt: skip
        name = f"{case.title}, {study.KINDS[kind].words}"
        rate, queries = rows[name, "success rate"], rows[name, "mean queries"]
        assert rate["note"].startswith(f"at most {most} queries a seed")
        assert rate["seeds"] == queries["seeds"] == tuple(range(searches))
        assert rate["n"] == sum(int(one.searched.sum()) for one in found[kind])
        assert queries["n"] == sum(int(one.success.sum()) for one in found[kind])
    assert rows[case.title, "accuracy, original"]["seeds"] == ()


def test_ranked_and_uniform_operators_are_compared_on_seeds_that_both_found(case):
    rng = np.random.default_rng(0)

    def search(more):
        queries = rng.integers(5, 60, 12) + more
        return SimpleNamespace(
            success=np.arange(12) != more % 12, queries=queries, seconds=queries / 64
        )

    found = {"released": [search(0), search(1)], "uniform": [search(14), search(15)]}
    rows = {row["metric"]: row for row in study._comparisons(case, found)}
    apart = np.concatenate(
        [
            (one.queries - other.queries)[one.success & other.success]
            for one, other in zip(found["released"], found["uniform"], strict=True)
        ]
    )
    assert len(apart) == 20 and apart.mean() < 0
    assert rows["Wilcoxon p of the queries"]["n"] == rows["Wilcoxon p of the seconds"]["n"] == 20
    p = wilcoxon(apart).pvalue
    np.testing.assert_allclose(rows["Wilcoxon p of the queries"]["ours"], p, rtol=0.01)
    np.testing.assert_allclose(rows["Wilcoxon p of the seconds"]["ours"], p, rtol=0.01)
    said = rows["Wilcoxon p of the queries"]["note"]
    assert said == f"mean difference {apart.mean():.3g} queries"
    assert study._comparisons(case, {"released": found["released"]}) == []
    assert study._comparisons(case, {**found, "uniform": found["released"]}) == []


def test_success_within_a_time_is_of_triggers_that_still_trigger(case, done):
    released = done[0]["released"]
    undone = [dataclasses.replace(one, triggers=np.zeros_like(one.triggers)) for one in released]
    rows = study._timeouts(case, {"released": undone}, TINY)
    assert [row["ours"] for row in rows] == [0, 0, 0]
    rows = study._timeouts(case, {"released": released}, TINY)
    found = sum(int(one.success.sum()) for one in released)
    assert rows[0]["ours"] == round(100 * found / rows[0]["n"], 2) > 0


def test_the_released_code_as_measured_stands_in_notes(case, done):
    published = dataclasses.replace(case, title="LeNet-1 Quantization-8-bit")
    notes = {
        row["metric"]: row.get("note", "")
        for row in study.rows(published, {"released": done[0]["released"]}, TINY)
    }
    assert notes["median queries"] == "the released code, measured: 52.5 (100 seeds)"
    assert notes["labels kept"] == "the released code, measured: 23 (100 seeds)"


def test_the_whole_test_set_has_rows_of_its_own(case, done):
    whole = dataclasses.replace(TINY, images=None)
    rows = study.rows(case, {"released": done[0]["released"]}, whole)
    by_metric = {
        row["metric"]: row
        for row in rows
        if row["row"] == f"{case.title}, released, all test images"
    }
    assert by_metric["success rate"]["published"] == 100
    assert by_metric["mean queries"]["published"] is None
    assert by_metric["mean seconds"]["published"] is None
    assert "success within 5 s" in by_metric


def test_other_models_do_not_mix_in_but_old_folders_go_on(case, tmp_path):
    short = dataclasses.replace(TINY, kinds=("best_label",))
    study.run(case, short, tmp_path)
    other = dataclasses.replace(case, pair=linear_pair(apart=0.3, classes=10, seed=1))
    with pytest.raises(ValueError, match="another run, answers"):
        study.run(other, short, tmp_path)
    told = tmp_path / case.name / "models"
    for file in told.iterdir():
        file.unlink()
    told.rmdir()
    study.run(case, short, tmp_path)


def test_rows_of_other_pairs_stay_in_the_file(tmp_path):
    out = tmp_path / "dflare_search.json"

    def write(rows, commit, title="A title"):
        about = {**ABOUT, "commit": commit}
        made = [{"row": row, "metric": "success rate", "ours": ours} for row, ours in rows]
        study.merge(out, "dflare_search", title, "Text.", about, made)
        return {row.row: (row.ours, row.commit) for row in record.read(out).rows}

    write([("CNN Prune, best", 1), ("LeNet-1, best", 2)], "0" * 7)
    assert write([("LeNet-1, best", 3), ("LeNet-1, paper", 4)], "1" * 7) == {
        "CNN Prune, best": (1, "0" * 7),
        "LeNet-1, best": (3, "1" * 7),
        "LeNet-1, paper": (4, "1" * 7),
    }
    assert write([("LeNet-5", 5)], "2" * 7, "Another title") == {"LeNet-5": (5, "2" * 7)}
    out.write_text("{")
    with pytest.raises(SystemExit, match="dflare_search.json: not JSON"):
        write([("LeNet-5", 5)], "2" * 7)


def test_published_tables_have_every_pair():
    titles = {" ".join(made.row) for made in (*pairs.PUBLISHED.values(), *pairs.MADE.values())}
    assert titles == set(study.TABLE_2) == set(study.TABLE_4) == set(study.TABLE_6)
    # Section 5.3.1: the ablations' seconds are at least 0.95 times the whole search's.
    for title, (without, uniform) in study.TABLE_6.items():
        whole = study.TABLE_4[title][0]
        assert without.queries / whole.queries > 1.15
        assert 0.94 < uniform.queries / whole.queries < 1.2


def test_networks_compressed_in_every_way_have_a_name():
    for network in ("lenet4_mnist", "vgg16_cifar10"):
        assert {f"{network}_{how}" for how in compress.HOW} <= set(pairs.NAMES)
    rows = [pairs.OTHERS[name].row for name in pairs.OTHERS]
    assert len(set(rows)) == len(rows) and not set(rows) & {m.row for m in pairs.MADE.values()}
    with pytest.raises(FileNotFoundError, match="--network lenet4_mnist --how hydra"):
        pairs.pair("lenet4_mnist_hydra")


def test_images_of_a_file_stand_for_cifar10_alone(tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, something=np.zeros(3))
    with pytest.raises(ValueError, match="images.npz: no test_images and test_labels"):
        pairs.images_of("cifar10", None, str(path))
    digits = data.load("digits")
    found = pairs.images_of("digits", None, str(path))
    np.testing.assert_array_equal(found.pixels, digits.test_images)
    assert found.words == "digits, test set"
    np.savez(path, test_images=np.zeros((3, 32, 32, 3), np.uint8), test_labels=np.arange(3))
    found = pairs.images_of("cifar10", None, str(path))
    assert found.labels.tolist() == [0, 1, 2]
    assert found.words == "cifar10, 3 test images of images.npz"
    found = pairs.images_of("cifar10", None, str(path), most=2)
    assert (len(found.pixels), len(found.labels)) == (2, 2) and found.training is None
    assert found.words == "cifar10, 3 test images of images.npz, 2 of 3 images"


def test_training_images_that_trigger_unchanged_stand_beside_table_1(case):
    shown = np.asarray(data.load("digits").train_images[:300])
    whole = dataclasses.replace(case, training=shown, title="LeNet-1 Quantization-8-bit")
    rows = {row["metric"]: row for row in study.rows(whole, {}, TINY)}
    row = rows["training images that trigger unchanged"]
    original, compressed = case.pair.probabilities(shown)
    assert row["ours"] == (original.argmax(1) != compressed.argmax(1)).sum() > 0
    assert (row["n"], row["published"]) == (300, "83 of 60,000")
    assert "training images that trigger unchanged" not in {
        row["metric"] for row in study.rows(case, {}, TINY)
    }


def write_onnx(path, kernel):
    """A file as PyTorch makes them: [B, 3, 224, 224], the mean of each channel, a dense layer."""
    onnx = pytest.importorskip("onnx")
    make, real = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        make.make_node("GlobalAveragePool", ["x"], ["means"]),
        make.make_node("Flatten", ["means"], ["flat"]),
        make.make_node("MatMul", ["flat", "kernel"], ["logits"]),
        make.make_node("Softmax", ["logits"], ["y"]),
    ]
    graph = make.make_graph(
        nodes, "means",
        [make.make_tensor_value_info("x", real, ["B", 3, 224, 224])],
        [make.make_tensor_value_info("y", real, ["B", 4])],
        [onnx.numpy_helper.from_array(kernel.astype(np.float32), "kernel")],
    )  # fmt: skip
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8), path)
    return str(path)


def test_a_pair_of_files_on_a_folder_of_images(tmp_path):
    pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(0)
    for number in range(6):
        folder = tmp_path / "imagenet" / "val" / f"n0{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((260, 300)).save(folder / f"{number}.png")
    kernel = 20 * rng.normal(size=(3, 4))
    given = SimpleNamespace(
        files=[write_onnx(tmp_path / "net.onnx", kernel),
               write_onnx(tmp_path / "net8.onnx", kernel + 2 * rng.normal(size=(3, 4)))],
        data="imagenet_folder", data_dir=str(tmp_path), images=None, test_images=4,
        mean=["124", "116", "104"], std=["58", "57", "57"], channels_first=True,
    )  # fmt: skip
    case = study.prepare_files(given)
    assert (case.title, case.images.shape) == ("net and net8", (4, 224, 224, 3))
    assert case.data == "imagenet_folder, test set, 4 of 6 images"
    x = (case.images.mean(axis=(1, 2)) - [124, 116, 104]) / [58, 57, 57]
    assert case.pair.original(case.images).argmax(1).tolist() == (x @ kernel).argmax(1).tolist()
    short = dataclasses.replace(TINY, images=4, searches=(1, 1), kinds=("best",))
    found = study.run(case, short, tmp_path / "work")
    by_name = {(row["row"], row["metric"]): row for row in study.rows(case, found, short)}
    assert by_name["net and net8, best", "success rate"]["ours"] > 0
    assert by_name["net and net8, best", "success rate"]["published"] is None
    with pytest.raises(ValueError, match="give both, or neither"):
        pairs.of_files(*given.files, mean=[1.0])
    given.data = None
    with pytest.raises(ValueError, match="--data is None; give the original"):
        study.prepare_files(given)
