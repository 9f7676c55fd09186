"""The study of targeted pruning, on the digits: its stages, its judging, and going on."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

import nnslicer_jax as nns
from experiments import record
from experiments import targeted_pruning as study
from experiments.target_classes import Accuracy, packed, target_sets, unpacked
from experiments.targeted_pruning import Answers, Schedule
from nnslicer_jax import data
from prune import criteria, masks
from tests import nets

TINY = Schedule(
    sets=2, ratios=(0.3, 0.55), images=4, profiled=100, tests=10, readings=1, tuned_sets=1,
    tuned_ratios=(0.7,), samples=128, compacted=(0.5,),
)  # fmt: skip
ABOUT = {
    "command": "python -m experiments.targeted_pruning", "data": "digits", "seeds": (0,),
    "commit": "unknown", "hardware": "a machine",
}  # fmt: skip


@pytest.fixture(scope="module")
def case():
    return study.prepare("digits_cnn", None, TINY, 0)


@pytest.fixture(scope="module")
def done(case, tmp_path_factory):
    """The rows of a whole run, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    return study.run(case, folder / "work", folder / "figures", "abc"), folder


def test_a_run_gives_every_row_once(done):
    rows, folder = done
    made = record.Record(
        title=study.TITLE, text=study.TEXT,
        rows=tuple(record.Row(study="targeted_pruning", **row, **ABOUT) for row in rows),
    )  # fmt: skip
    names = [row.row for row in made.rows]
    for method in study.METHODS:
        for ratio in TINY.ratios:
            assert f"{method}, {ratio:.0%} pruned, 4 target classes" in names
        assert f"{method}, 70% pruned, fine-tuned, 4 target classes" in names
    assert "whole network, fine-tuned, 4 target classes" in names
    for name in study.READINGS:
        assert f"{name}, 30% pruned, sets of the other readings, 4 target classes" in names
    for row in made.rows:
        if row.unit == "%":
            assert 0 <= row.ours <= 100
            if row.spread is not None:
                assert row.spread[0] <= row.ours + 0.01 and row.ours <= row.spread[1] + 0.01
    apart = [row.ours for row in made.rows if row.metric == "largest difference of a logit"]
    assert len(apart) == 3 and max(apart) < 1e-5
    published = {(r.row, r.metric): r.published for r in made.rows if r.published is not None}
    assert published == {}
    pictures = sorted(p.name for p in (folder / "figures").iterdir())
    assert pictures == ["accuracy_4_classes.png", "accuracy_4_classes_tuned.png"]


def test_a_run_goes_on_where_it_stopped(case, done, monkeypatch):
    rows, folder = done

    def again(*_args, **_options):
        raise AssertionError("this was done before")

    for name in ("sliced", "path", "own_path", "fixed_scores", "fine_tune"):
        monkeypatch.setattr(study, name, again)
    assert study.run(case, folder / "work", folder / "figures", "abc") == rows


def test_another_run_does_not_go_on(case, done):
    _, folder = done
    other = dataclasses.replace(case, schedule=dataclasses.replace(TINY, images=5))
    with pytest.raises(ValueError, match="holds checkpoints of another run, schedule was"):
        study.run(other, folder / "work", folder / "figures", "abc")


def test_judging_is_counting():
    logits = np.array([[3, 2, 1, 0], [0, 1, 2, 3], [1, 0, 2, 0], [0, 0, 5, 1], [9, 0, 1, 8]])
    labels = np.array([0, 1, 2, 3, 3])
    order = np.argsort(-logits, axis=1, stable=True)

    def judged(targets):
        found = study.judge(order, labels, targets)
        return [unpacked(text, 5).astype(int).tolist() for text in found]

    # Targets 0 and 1: of all outputs image 0 is right, 1 is not; among 0 and 1 both are.
    assert judged((0, 1)) == [[1, 0, 1, 0, 0], [1, 1, 0, 0, 0]]
    assert judged((3,)) == [[1, 0, 1, 0, 0], [0, 0, 0, 1, 1]]


def test_accuracies_are_of_the_target_classes_and_of_the_others(case):
    count = len(case.labels)
    right, within = (np.random.default_rng(s).random((2, count)) < 0.5 for s in (0, 1))
    sets = [(0, 1), (1, 5, 7)]
    answers = [Answers(packed(a), packed(b)) for a, b in zip(right, within, strict=True)]
    of = [np.isin(case.labels, targets) for targets in sets]
    expected = {
        "target": np.mean([a[o].mean() for a, o in zip(right, of, strict=True)]),
        "within": np.mean([a[o].mean() for a, o in zip(within, of, strict=True)]),
        "others": np.mean([a[~o].mean() for a, o in zip(right, of, strict=True)]),
    }
    for metric, mean in expected.items():
        assert study.measured(case, sets, answers, metric).mean == pytest.approx(mean)


def test_targeted_criteria_are_those_of_the_paper(case):
    targets = (1, 4, 7)
    images = study._images_of(case, targets)
    assert len(images) == 3 * TINY.images
    piece = study.sliced(case, targets)
    expected = nns.slice_network(
        case.graph, case.params, case.profile, images, np.tile(targets, (len(images), 1)),
        theta=0.2, batch_size=len(images),
    )  # fmt: skip
    for name in criteria.kernels(case.graph):
        np.testing.assert_array_equal(piece.synapses[name], expected.synapses[name])


def test_the_same_images_stand_for_a_class_in_every_set(case):
    one, other = study._images_of(case, (2,)), study._images_of(case, (2, 5))
    found = {image.tobytes() for image in other}
    assert all(image.tobytes() in found for image in one)


def test_pruned_shares_are_exact(case):
    scores = criteria.magnitudes(case.graph, case.params)
    for ratio in (0, 0.3, 0.55, 0.9):
        kept = study.prune(scores, ratio)
        for name in criteria.kernels(case.graph):
            size = case.graph.values[case.graph.params[name]].shape
            leaf = dict(zip(case.graph.params, _leaves(kept), strict=True))[name]
            assert leaf.sum() == np.prod(size) - int(np.prod(size) * round(100 * ratio) // 100)


def _leaves(tree):
    return jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None)


def test_fine_tuning_holds_the_masks(case):
    kept = study.prune(criteria.magnitudes(case.graph, case.params), 0.7)
    params = study.fine_tune(case, kept, (0, 1, 2, 3))
    for name, mask, before, after in zip(
        case.graph.params, _leaves(kept), _leaves(case.params), _leaves(params), strict=True
    ):
        if mask is not None:
            assert not np.any(np.asarray(after)[~np.asarray(mask)])
            assert np.any(np.asarray(after) != np.asarray(before)), name


def test_a_method_holds_as_long_as_it_never_fell():
    curve = {r: Accuracy(mean, 0, 1, 9, ()) for r, mean in ((0.3, 0.9), (0.5, 0.7), (0.6, 0.9))}
    assert study.held_to(curve, 0.9) == 0.3
    assert study.held_to(curve, 0.95) == 0.0
    assert study.held_to(curve, 0.7) == 0.6


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda case: study.prune(criteria.magnitudes(case.graph, case.params), 1.0),
         "ratio must be 0 or more and below 1, not 1.0"),
        (lambda case: study.targeted_scores(case, ()),
         "targets must name at least one class"),
        (lambda case: study.targeted_scores(case, (3, 10)),
         "targets must be different classes in 0..9, not 3, 10"),
        (lambda case: study.targeted_scores(case, tuple(range(10))),
         "targets must leave some of the 10 classes out"),
        (lambda case: Schedule(ratios=(0.5, 1.0)),
         "ratios must be 0 or more and below 1, not 1.0"),
        (lambda case: Schedule(images=0), "images must be at least 1, not 0"),
        (lambda case: study.prepare("digits_cnn", None, Schedule(sizes=(10,)), 0),
         "sizes must be 1 to 9, below the 10 classes of digits, not 10"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(case, call, said):
    with pytest.raises(ValueError) as caught:
        call(case)
    assert str(caught.value) == said


def test_methods_score_the_same_synapses(case):
    scores = study.fixed_scores(case) | study.targeted_scores(case, (0, 1))
    assert set(scores) == set(study.METHODS)
    kept = {method: masks.kept(study.prune(score, 0.5)) for method, score in scores.items()}
    assert len(set(kept.values())) == 1


def test_published_figures_stand_beside_the_network_of_the_paper_only(case):
    card = {**case.trained.card, "name": "resnet10_cifar10"}
    of_paper = dataclasses.replace(case, trained=case.trained._replace(card=card))
    every = packed(np.ones(len(case.labels), bool))
    answers = [Answers(every, every)]
    curves = {method: {0.45: answers, 0.55: answers} for method in study.METHODS}
    for given, expected in ((of_paper, {("NNSlicer (targeted)", "about 80")}), (case, set())):
        rows = study.curve_rows(given, [(0, 1, 2, 3)], curves, "")
        found = {(r["row"], r["published"]) for r in rows if r.get("published") is not None}
        assert found == {(f"{m}, 55% pruned, 4 target classes", said) for m, said in expected}
    # Nor beside sets of another size, or another table.
    for sets, what in (([(0, 1)], ""), ([(0, 1, 2, 3)], ", fine-tuned")):
        rows = study.curve_rows(of_paper, sets, curves, what)
        assert all(row.get("published") is None for row in rows)


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"weights_sha256": "0"}, "network"), ({"commit": "def"}, "commit"), ({"seed": 1}, "seed")],
)
def test_a_folder_belongs_to_one_run(case, done, changed, named):
    _, folder = done
    commit, card = changed.get("commit", "abc"), {**case.trained.card}
    card["weights_sha256"] = changed.get("weights_sha256", card["weights_sha256"])
    other = dataclasses.replace(
        case, trained=case.trained._replace(card=card), seed=changed.get("seed", 0)
    )
    with pytest.raises(ValueError, match=f"another run, {named} was .* delete the folder or name"):
        study.run(other, folder / "work", folder / "figures", commit)


def test_a_damaged_part_is_named(case, tmp_path):
    ledger = study.Ledger(tmp_path)
    assert ledger.part("4/NNSlicer (all classes)/0.3", lambda: [1, "a"]) == [1, "a"]
    (path,) = tmp_path.iterdir()
    assert ledger.part("4/NNSlicer (all classes)/0.3", lambda: 1 / 0) == [1, "a"]
    for text in ("{", "[]", "{}", ""):
        path.write_text(text)
        with pytest.raises(ValueError) as caught:
            ledger.part("4/NNSlicer (all classes)/0.3", lambda: 1 / 0)
        assert str(caught.value) == (
            "4_NNSlicer_all_classes_0.3.json is not a part of a run; remove it"
        )


def test_parts_of_a_schedule_have_files_of_their_own(case, done):
    _, folder = done
    files = list((folder / "work" / "parts").iterdir())
    # Methods by ratio, sets, readings, the fine-tuned with the whole network, slices, made smaller.
    assert len(files) == 4 * 2 + 2 + 1 + 7 + 1 + 3


def test_effective_path_of_own_classes_looks_at_right_answers_only(case):
    # The network gets every training image right; here some labels are others.
    swapped = case.dataset.train_labels.copy()
    swapped[::3] = np.where(swapped[::3] == 3, 8, swapped[::3])
    dataset = case.dataset._replace(train_labels=swapped)
    schedule = dataclasses.replace(TINY, images=200)
    case = dataclasses.replace(case, dataset=dataset, schedule=schedule)
    found = study.own_path(case, (3, 8))
    images, labels = [], []
    for label in (3, 8):
        of_class = study._images_of(case, (label,))
        logits = study.logits(case.graph, nns.Masked(case.params, {}, {}), of_class)
        images.append(of_class[logits.argmax(1) == label])
        labels += [label] * len(images[-1])
    assert 0 < len(labels) < np.isin(swapped, (3, 8)).sum()
    expected = nns.effective_path(case.graph, case.params, np.concatenate(images), labels)
    for name in criteria.kernels(case.graph):
        np.testing.assert_array_equal(found.synapses[name], expected.synapses[name])


def test_paths_are_those_of_every_image_and_all_outputs(case):
    targets = (1, 4)
    images = study._images_of(case, targets)
    expected = nns.effective_path(
        case.graph, case.params, images, np.tile(targets, (len(images), 1)), batch_size=3
    )
    found = study.path(case, targets)
    for name in criteria.kernels(case.graph):
        np.testing.assert_array_equal(found.synapses[name], expected.synapses[name])


def test_unsigned_contribs_are_those_of_each_image_added_up(case):
    images = study._images_of(case, (0, 2))
    found = study.unsigned(case, (0, 2))
    added = {name: 0 for name in found.synapses}
    for image in images:
        one = nns.slice_network(
            case.graph, case.params, case.profile, image[None], np.array([[0, 2]]), theta=0.2
        )
        for name, contrib in one.synapses.items():
            added[name] = added[name] + np.abs(contrib)
    for name, contrib in found.synapses.items():
        np.testing.assert_array_equal(contrib, added[name])
    signed = study.sliced(case, (0, 2)).synapses
    assert any((found.synapses[name] > np.abs(signed[name])).any() for name in signed)


def test_fixed_scores_do_not_look_at_sets(case):
    scores = study.fixed_scores(case)
    everything = study.sliced(case, range(10))
    expected = (
        criteria.contributions(case.graph, case.params, everything),
        criteria.magnitudes(case.graph, case.params),
        criteria.channels(case.graph, case.params),
        criteria.random(jax.random.key(0), case.graph, case.params),
    )
    assert tuple(scores) == study.FIXED
    for found, due in zip(scores.values(), expected, strict=True):
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(due), strict=True):
            np.testing.assert_array_equal(one, other)


def test_the_same_network_stands_for_all_sets_where_the_method_is_fixed(case, done):
    rows, _ = done
    sets = target_sets(10, 4, 2, 0)
    order = study.pruned_to(case, study.fixed_scores(case)["Weight"], 0.55)
    right = order[:, 0] == case.labels
    expected = np.mean([right[np.isin(case.labels, targets)].mean() for targets in sets])
    (row,) = (
        r for r in rows
        if (r["row"], r["metric"])
        == ("Weight, 55% pruned, 4 target classes", study.METRICS["target"])
    )  # fmt: skip
    assert row["ours"] == pytest.approx(100 * expected, abs=0.01)


def test_fine_tuning_with_nothing_pruned_trains_every_kernel(case):
    kept = study.prune(criteria.magnitudes(case.graph, case.params), 0)
    params = study.fine_tune(case, kept, (0, 1, 2, 3))
    for name, mask, before, after in zip(
        case.graph.params, _leaves(kept), _leaves(case.params), _leaves(params), strict=True
    ):
        if mask is not None:
            assert np.mean(np.asarray(after) != np.asarray(before)) > 0.9, name


class Block(nn.Module):
    """A residual block with batch norm."""

    @nn.compact
    def __call__(self, x, *, train=False):
        def norm(x):
            return nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)

        x = nn.relu(norm(nn.Conv(6, (3, 3), use_bias=False)(x)))
        y = nn.relu(norm(nn.Conv(6, (3, 3))(x)))
        x = nn.relu(x + norm(nn.Conv(6, (3, 3), use_bias=False)(y)))
        return nn.Dense(4)(x.mean((1, 2)))


def residual_case(case):
    """A residual network on few drawn images, its batch statistics drawn too."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (80, 6, 6, 1)).astype(np.uint8)
    labels = np.tile(np.arange(4), 20).astype(np.int32)
    model = Block()
    variables = model.init(jax.random.key(0), np.zeros((1, 6, 6, 1), np.float32))
    variables = jax.tree.map(
        lambda a: a + rng.random(a.shape, np.float32) if a.ndim == 1 else a, dict(variables)
    )
    tests = images / np.float32(255)
    graph = nns.trace(model.apply, variables, tests[:1])
    return dataclasses.replace(
        case, trained=nns.zoo.Trained(model, variables, {"name": "block"}), graph=graph,
        dataset=data.Dataset("drawn", images, labels, images, labels, tuple("abcd")),
        tests=tests, labels=labels, schedule=dataclasses.replace(TINY, samples=64),
    )  # fmt: skip


def test_neurons_that_go_stay_gone_in_a_residual_network_with_batch_norm(case):
    small = residual_case(case)
    kernels = [f"params/Conv_{i}/kernel" for i in range(3)]
    whole = {n: np.ones(small.graph.values[small.graph.params[n]].shape, bool) for n in kernels}
    whole["params/Conv_1/kernel"][..., :4] = False  # neurons without synapses
    whole["params/Conv_2/kernel"][:, :, 5] = False  # one without use
    whole["params/Conv_0/kernel"][..., 2] = False  # of the sum, of which one term stays
    kept = jax.tree.unflatten(
        jax.tree.structure(small.params), [whole.get(n) for n in small.graph.params]
    )
    held = nets.flat(study._held(small.graph, small.params, kept))
    for name in ("params/Conv_1/bias", "params/BatchNorm_1/scale", "params/BatchNorm_1/bias",
                 "batch_stats/BatchNorm_1/mean"):  # fmt: skip
        np.testing.assert_array_equal(held[name], np.arange(6) == 4)
    assert not held["params/Conv_1/kernel"][..., 5].any()
    assert not held["params/Conv_2/kernel"][:, :, [0, 1, 2, 3, 5]].any()
    # What is left of the sum's third channel is the block's own.
    assert not held["params/BatchNorm_0/scale"][2] and held["params/BatchNorm_2/scale"].all()
    params = study.fine_tune(small, kept, (0, 1))
    before, after = nets.flat(small.params), nets.flat(params)
    for name, there in held.items():
        assert not np.any(np.asarray(after[name])[~np.asarray(there)]), name
        changed = np.asarray(after[name] != before[name])
        assert changed[np.asarray(there)].mean() > 0.5 or name == "params/Conv_1/bias", name
    # Nothing of what is gone comes back into the outputs.
    again = study.reduced(small.graph, params, kept)
    np.testing.assert_allclose(
        study.logits(small.graph, again, small.tests),
        study.logits(small.graph, nns.Masked(params, {}, {}), small.tests),
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip
