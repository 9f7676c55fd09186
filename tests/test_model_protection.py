"""The study of protection: what is hidden, what resumes, what the rows say, and bad input."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import nnslicer_jax as nns
from experiments import model_protection as study
from experiments import quickstart_protection, record
from experiments.model_protection import Block, Outcome, Schedule
from experiments.target_classes import accuracy, packed, target_sets, unpacked
from nnslicer_jax import data, training

ROOT = Path(__file__).resolve().parents[1]
TINY = Schedule(
    classes=3, images=4, profiled=60, rates=(0.01, 0.1), tuning=64, epochs=2,
    blocks=(
        Block("all", 64, ("NNSlicer", "Random", study.SCRATCH), 2),
        Block("hidden", 64, ("EffectivePath", "Random"), 1),
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def case():
    found = study.prepare("digits_cnn", None, seed=0, share=0.5)
    # A few images are enough, and faster.
    few = found.dataset._replace(
        test_images=found.dataset.test_images[:90], test_labels=found.dataset.test_labels[:90]
    )
    return dataclasses.replace(found, dataset=few)


@pytest.fixture(scope="module")
def finished(case, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    runs = study.Study(case, TINY, folder)
    return folder, runs.sets, *runs.run()


# ---------------------------------------------------------------- what is hidden


def outcome(right):
    return Outcome("Random", (), "all", 5, 0.1, packed(right))


def hidden_counts(chosen):
    return [(int(mask.sum()), mask.size) for mask in jax.tree.leaves(chosen)]


@pytest.mark.parametrize("method", study.METHODS)
def test_half_of_each_kernel_is_hidden(case, method):
    counts = hidden_counts(study.crucial(case, TINY, method, (1, 2, 3)))
    assert [size for _, size in counts] == [144, 4608, 4096, 320]
    assert all(2 * kept == size for kept, size in counts)


def test_nnslicer_hides_the_largest_contributions_to_the_target_outputs(case):
    targets = (2, 7)
    chosen = study.crucial(case, TINY, "NNSlicer", targets)
    images, labels = study.class_images(case, targets, TINY.images)
    assert sorted(labels.tolist()) == [2] * 4 + [7] * 4
    rows = np.sort(np.random.default_rng(0).permutation(1437)[: TINY.profiled])
    variables = case.trained.variables
    profile = nns.profile(case.graph, variables, case.dataset.train_images[rows] / np.float32(255))
    piece = nns.slice_network(
        case.graph, variables, profile, images, [[2, 7]] * 8, theta=0.2, batch_size=3
    )
    for layer, leaves in variables["params"].items():
        contrib = np.abs(piece.synapses[f"params/{layer}/kernel"])
        mask = np.asarray(chosen["params"][layer]["kernel"])
        assert contrib[mask].min() >= contrib[~mask].max() and contrib.max() > 0
        # Equal ones go by the weight.
        edge = contrib == contrib[mask].min()
        weight = np.abs(np.asarray(leaves["kernel"]))
        assert weight[edge & mask].min() >= weight[edge & ~mask].max(initial=0)


def test_effective_path_looks_at_right_answers_only(case):
    # The network gets every training image right; here some labels are others.
    swapped = case.dataset.train_labels.copy()
    swapped[::3] = np.where(swapped[::3] == 3, 8, swapped[::3])
    case = dataclasses.replace(case, dataset=case.dataset._replace(train_labels=swapped))
    images, labels = study.class_images(case, (3, 8), 200)
    logits, _ = nns.evaluate(case.graph, case.trained.variables, images)
    right = np.asarray(logits).argmax(1) == labels
    assert 0 < right.sum() < len(right)
    few = dataclasses.replace(TINY, images=200)
    chosen = study.crucial(case, few, "EffectivePath", (3, 8))
    piece = nns.effective_path(case.graph, case.trained.variables, images[right], labels[right])
    for layer in case.trained.variables["params"]:
        mask = np.asarray(chosen["params"][layer]["kernel"])
        counts = piece.synapses[f"params/{layer}/kernel"]
        assert counts[mask].min() >= counts[~mask].max()


def test_weight_hides_the_largest_weights_whatever_the_targets(case):
    chosen = study.crucial(case, TINY, "Weight", ())
    for layer, leaves in case.trained.variables["params"].items():
        mask = np.asarray(chosen["params"][layer]["kernel"])
        weight = np.abs(np.asarray(leaves["kernel"]))
        assert weight[mask].min() >= weight[~mask].max()
        assert chosen["params"][layer]["bias"] is None


def test_the_fresh_start_is_not_that_of_the_training(case):
    card = case.trained.card["training"]
    first = training.initialize(
        case.trained.model, training.TrainingOptions(seed=card["seed"]), (8, 8, 1)
    )
    kernels = [tree["params"]["Dense_0"]["kernel"] for tree in (first, case.initial)]
    assert not (kernels[0] == kernels[1]).any()


# ---------------------------------------------------------------- the attack


def test_right_answers_are_those_of_the_network(case, monkeypatch):
    monkeypatch.setattr(study, "_BATCH", 40)
    found = study.right_answers(case.graph, case.trained.variables, case.dataset)
    logits = case.trained.model.apply(
        case.trained.variables, data.to_float(case.dataset.test_images)
    )
    np.testing.assert_array_equal(found, np.asarray(logits).argmax(1) == case.dataset.test_labels)
    assert outcome(found).correct == found.sum()


def test_rates_are_chosen_on_other_test_images_than_are_reported_on():
    found, whole = study.prepare("digits_cnn", None, seed=0, share=0.5), data.load("digits")
    halves = [{i.tobytes() for i in d.test_images} for d in (found.choice, found.dataset)]
    assert not halves[0] & halves[1]
    assert halves[0] | halves[1] == {i.tobytes() for i in whole.test_images}
    counts = [np.bincount(d.test_labels) for d in (found.choice, found.dataset)]
    assert np.abs(counts[0] - counts[1]).max() <= 1 and sum(map(sum, counts)) == 360
    known = {i.tobytes(): label for i, label in zip(*whole[3:5], strict=True)}
    for d in (found.choice, found.dataset):
        assert [known[i.tobytes()] for i in d.test_images] == d.test_labels.tolist()
    other = study.prepare("digits_cnn", None, seed=1, share=0.5)
    assert {i.tobytes() for i in other.choice.test_images} != halves[0]


def test_an_attack_from_scratch_has_nothing_of_the_network(case):
    chosen = study.crucial(case, TINY, "Random", ())
    nothing = study.attack(case, chosen, case.dataset, None, scratch=True)
    for given, first in zip(jax.tree.leaves(nothing), jax.tree.leaves(case.initial), strict=True):
        np.testing.assert_array_equal(given, first)
    exposed = study.attack(case, chosen, case.dataset, None)
    mask = np.asarray(chosen["params"]["Dense_0"]["kernel"])
    kernels = [v["params"]["Dense_0"]["kernel"] for v in (case.trained.variables, case.initial)]
    expected = np.where(mask, kernels[1], kernels[0])
    np.testing.assert_array_equal(exposed["params"]["Dense_0"]["kernel"], expected)


# ---------------------------------------------------------------- the runs


def test_every_attack_of_the_schedule_is_run_once(case, finished):
    folder, sets, tuned, outcomes = finished
    assert sets == target_sets(10, 3, 2, 0)
    found = [(o.trains, o.budget, o.method, o.targets) for o in outcomes]
    assert len(set(found)) == len(found)
    before = [("all", 0, m, s) for m in study.TARGETED for s in sets]
    before += [("all", 0, m, ()) for m in ("Weight", "Random")]
    attacks = [
        *(("all", 64, "NNSlicer", s) for s in sets),
        ("all", 64, "Random", ()),
        ("all", 64, study.SCRATCH, ()),
        ("hidden", 64, "EffectivePath", sets[0]),
        ("hidden", 64, "Random", ()),
    ]
    assert sorted(found) == sorted(before + attacks)
    pairs = {("all", "NNSlicer"), ("all", "Random"), ("all", study.SCRATCH),
             ("hidden", "EffectivePath"), ("hidden", "Random")}  # fmt: skip
    assert {(o.trains, o.method, o.rate) for o in tuned} == {
        (*pair, rate) for pair in pairs for rate in TINY.rates
    }
    for o in outcomes:
        rate = study.best_rate(tuned, o.trains, o.method) if o.budget else 0
        assert o.rate == rate and len(unpacked(o.right, 90)) == 90
    assert all(len(unpacked(o.right, 180)) == 180 for o in tuned)
    kept = {path.name for path in folder.glob("*.json")} - {"run.json"}
    assert len(kept) == len(found) + len(tuned)
    assert not list((folder / "training").iterdir())


def test_a_study_that_is_killed_goes_on_with_what_is_missing(case, finished, tmp_path, monkeypatch):
    folder, _, tuned, outcomes = finished
    for path in folder.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    lost = [tmp_path / "all_64_Random_any.json", tmp_path / "rate_0.1_all_64_Random_any.json"]
    for path in lost:
        path.unlink()
    made = []
    attack = study.attack

    def counted(*arguments, **options):
        made.append(options["trains"])
        return attack(*arguments, **options)

    monkeypatch.setattr(study, "attack", counted)
    again = study.Study(case, TINY, tmp_path).run()
    assert again == (tuned, outcomes)
    assert made == ["all", "all"]
    assert all(path.is_file() for path in lost)

    def dies(*arguments, **options):
        raise KeyboardInterrupt

    lost[0].unlink()
    monkeypatch.setattr(study, "attack", dies)
    with pytest.raises(KeyboardInterrupt):
        study.Study(case, TINY, tmp_path).run()
    assert not lost[0].exists()


def test_an_attack_that_is_killed_goes_on(case, finished, tmp_path, monkeypatch):
    _, _, tuned, outcomes = finished
    block = Schedule(**{**dataclasses.asdict(TINY), "blocks": (Block("all", 64, ("Random",), 1),)})
    save = training.checkpoint.save
    saved = []

    def dies(folder, step, state, **options):
        save(folder, step, state, **options)
        saved.append(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(training.checkpoint, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        study.Study(case, block, tmp_path).run()
    monkeypatch.setattr(training.checkpoint, "save", save)
    assert [folder.name for folder in saved] == ["rate_0.01_all_64_Random_any"]
    _, again = study.Study(case, block, tmp_path).run()
    assert again[-1] == next(o for o in outcomes if (o.budget, o.method) == (64, "Random"))


def test_a_rate_at_which_training_diverges_is_not_taken(case, tmp_path, monkeypatch):
    block = Schedule(**{**dataclasses.asdict(TINY), "blocks": (Block("all", 64, ("Random",), 1),)})
    attack = study.attack

    def diverges(case, chosen, dataset, how, **others):
        if how is not None and how.learning_rate == 0.1:
            raise FloatingPointError("training: loss nan or a weight is not finite at step 1")
        return attack(case, chosen, dataset, how, **others)

    monkeypatch.setattr(study, "attack", diverges)
    tuned, outcomes = study.Study(case, block, tmp_path).run()
    assert [o.correct for o in tuned if o.rate == 0.1] == [0]
    assert [o.rate for o in outcomes if o.budget] == [0.01]
    # An attack itself is not made up.
    monkeypatch.setattr(study, "best_rate", lambda *_: 0.1)
    (tmp_path / "all_64_Random_any.json").unlink()
    with pytest.raises(FloatingPointError):
        study.Study(case, block, tmp_path).run()


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"seed": 1}, "seed"), ({"share": 0.25}, "share"), ({"theta": 0.3}, "thetas")],
)
def test_a_folder_belongs_to_one_study(case, finished, changed, named):
    with pytest.raises(ValueError, match=f"another run, {named} was"):
        study.Study(dataclasses.replace(case, **changed), TINY, finished[0])


def test_damaged_outcomes_are_named(case, finished, tmp_path):
    study.Study(case, TINY, tmp_path)
    name = f"rate_0.01_all_64_NNSlicer_{'-'.join(map(str, target_sets(10, 3, 1, 0)[0]))}.json"
    odd, few = (
        json.dumps(Outcome("Random", (), "all", 64, 0.01, right)._asdict())
        for right in ("no", "00")
    )
    for text in ("{", "[]", '{"method": "Random"}', odd, few):
        (tmp_path / name).write_text(text)
        with pytest.raises(
            ValueError, match=f"^{name} is not the outcome of an attack; remove it$"
        ):
            study.Study(case, TINY, tmp_path).run()
    none = packed(np.zeros(len(case.choice.test_labels), bool))
    (tmp_path / name).write_text(
        json.dumps(Outcome("NNSlicer", (4, 5, 7), "all", 64, 0.3, none)._asdict())
    )
    with pytest.raises(ValueError, match="is of the learning rate 0.3, not 0.01"):
        study.Study(case, TINY, tmp_path).run()


def test_a_folder_belongs_to_one_commit_and_one_network(case, tmp_path):
    study.Study(case, TINY, tmp_path, commit="abc")
    study.Study(case, TINY, tmp_path, commit="abc")
    with pytest.raises(ValueError, match="another run, commit was .abc.*; delete the folder or"):
        study.Study(case, TINY, tmp_path, commit="def")
    card = {**case.trained.card, "weights_sha256": "0"}
    other = dataclasses.replace(case, trained=case.trained._replace(card=card))
    with pytest.raises(ValueError, match="another run, network was"):
        study.Study(other, TINY, tmp_path, commit="abc")
    few = case.dataset._replace(test_images=case.dataset.test_images[:80],
                                test_labels=case.dataset.test_labels[:80])  # fmt: skip
    with pytest.raises(ValueError, match="another run, data was"):
        study.Study(dataclasses.replace(case, dataset=few), TINY, tmp_path, commit="abc")


# ---------------------------------------------------------------- what is reported


def test_the_rate_taken_is_the_best_and_of_equal_ones_the_lowest():
    def tried(rate, right, trains="all", method="Weight"):
        return Outcome(method, (), trains, 5, rate, right)

    # In binary 7, 7, 6, 18 and 18 ones.
    tuned = [
        tried(0.3, "7f00"),
        tried(0.1, "00fe"),
        tried(0.2, "0fc0"),
        tried(0.9, "ffffc0", trains="hidden"),
        tried(0.8, "ffffc0", method="Random"),
    ]
    assert study.best_rate(tuned, "all", "Weight") == 0.1
    assert study.best_rate(tuned, "hidden", "Weight") == 0.9


def test_accuracies_are_those_of_the_sets_and_of_their_images():
    labels = np.array([0, 0, 1, 1, 1, 2])
    sets = [(0,), (1, 2)]
    right = np.array([[1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 1, 0]], bool)
    first, second = (
        Outcome("NNSlicer", s, "all", 5, 0.1, packed(r)) for s, r in zip(sets, right, strict=True)
    )
    of = np.array([[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]], bool)
    target, every = study.pooled([first, second], sets, labels)
    assert target == accuracy(right, of, labels) and target.by_set == (1.0, 0.75)
    assert target.mean == pytest.approx(0.875) and target.images == 6
    assert every == accuracy(right, np.ones_like(of), labels) and every.by_set == (0.5, 0.5)
    assert every.images == 6
    # One run that stands for both sets.
    target, every = study.pooled([second], sets, labels)
    assert target == accuracy(right[[1, 1]], of, labels) and target.by_set == (0.0, 0.75)
    assert every == accuracy(right[1:], np.ones((1, 6), bool), labels)
    with pytest.raises(ValueError, match="outcomes must be 1 or 2, as many as sets, not 3"):
        study.pooled([first] * 3, sets, labels)


def test_methods_without_targets_are_about_the_sets_of_those_with():
    sets = [(0, 1), (2, 3)]
    outcomes = [
        Outcome("NNSlicer", sets[0], "all", 9, 0.1, "80"),
        Outcome("Random", (), "all", 9, 0.1, "40"),
        Outcome("Random", (), "all", 5, 0.1, "20"),
    ]
    found = study.grouped(outcomes, sets)
    assert found["all", 9, "Random"] == ([outcomes[1]], [(0, 1)])
    assert found["all", 9, "NNSlicer"] == ([outcomes[0]], [(0, 1)])
    assert found["all", 5, "Random"] == ([outcomes[2]], sets)


def test_rows_are_those_of_the_runs_and_fit_the_schema(case, finished):
    _, sets, tuned, outcomes = finished
    fields = study.rows(case, sets, tuned, outcomes)
    about = {"command": "x", "data": "x", "seeds": (0,), "commit": "unknown", "hardware": "x"}
    made = tuple(record.Row(study="model_protection", **row, **about) for row in fields)
    record.Record(title=study.TITLE, text=study.TEXT, rows=made)
    found = {(row.row, row.metric): row for row in made}
    labels = case.dataset.test_labels
    of = [o for o in outcomes if (o.budget, o.method) == (64, "NNSlicer")]
    right = [unpacked(o.right, 90) for o in of]
    members = [np.isin(labels, targets) for targets in sets]
    mean = np.mean([r[m].mean() for r, m in zip(right, members, strict=True)])
    count = np.logical_or(*members).sum()
    row = found["NNSlicer, all trained, 64 samples", "on the target classes"]
    assert (row.ours, row.n) == (pytest.approx(100 * mean), count)
    assert row.published is None and f"learning rate {of[0].rate:g}" in row.note
    assert row.spread[0] <= row.ours <= row.spread[1]
    whole = study.right_answers(case.graph, case.trained.variables, case.dataset)
    row = found["the network as it was", "on all classes"]
    assert row.ours == pytest.approx(100 * whole.mean())
    assert "Random, hidden, before any attack" in {row for row, _ in found}
    taken = [row for row in made if row.note == "taken against this method"]
    assert len(taken) == 5 and all(row.n == 180 for row in taken)


def test_published_figures_stand_beside_the_headline_at_their_budget(case):
    sets, some = [(0, 1)], packed(np.arange(90) % 2 == 0)
    card = {**case.trained.card, "name": "resnet10_cifar10"}
    of_paper = dataclasses.replace(case, trained=case.trained._replace(card=card))
    outcomes = [
        Outcome(method, sets[0] if method in study.TARGETED else (), trains, budget, 0.1, some)
        for trains in study.ATTACKERS
        for budget in (5_000, 50_000)
        for method in study.METHODS
    ]

    def published(given):
        fields = study.rows(given, sets, [], outcomes)
        return {row["row"]: row["published"] for row in fields if row["published"] is not None}

    assert published(of_paper) == {
        "NNSlicer, all trained, 50,000 samples": "below 10",
        "EffectivePath, all trained, 50,000 samples": 90,
        "Weight, all trained, 50,000 samples": "above 30",
        "Random, all trained, 50,000 samples": "above 30",
    }
    assert published(case) == {}
    assert published(dataclasses.replace(of_paper, share=0.25)) == {}


def test_a_curve_is_of_the_same_sets_throughout():
    sets = [(0, 1), (2, 3), (4, 5)]

    def of(method, budget, targets):
        return Outcome(method, targets, "all", budget, 0.1, "80")

    outcomes = [
        *(of("NNSlicer", 5, s) for s in sets),
        *(of("EffectivePath", 5, s) for s in sets[:2]),
        of("NNSlicer", 9, sets[1]),
        of("Random", 9, ()),
    ]
    assert study.common_sets(outcomes, sets) == [(2, 3)]
    assert study.common_sets(outcomes[:5], sets) == sets[:2]
    assert study.common_sets(outcomes[-1:], sets) == sets


def test_figures_show_the_accuracies(case, finished, tmp_path):
    _, sets, _, outcomes = finished
    drawn = study.figure(case, sets, outcomes, "all")
    for panel, ax in enumerate(drawn.axes):
        heights = {c.get_label(): c.lines[0].get_ydata(orig=False) for c in ax.containers}
        assert list(heights) == ["NNSlicer", "Random", study.SCRATCH]
        random = [o for o in outcomes if (o.trains, o.budget, o.method) == ("all", 64, "Random")]
        expected = study.pooled(random, sets, case.dataset.test_labels)[panel].percent
        np.testing.assert_allclose(heights["Random"], [expected])
        assert ax.get_xlabel() == "attacker's samples" and ax.get_title()
    paths = study.save_figures(case, sets, outcomes, tmp_path)
    assert [path.name for path in paths] == [
        "model_protection_all.png", "model_protection_hidden.png",
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


@pytest.mark.parametrize("name", list(study.SCHEDULES))
def test_schedules_hold_together(name):
    schedule = study.SCHEDULES[name]
    count = 1437 if name == "tiny" else 50_000
    assert schedule.tuning <= count and schedule.epochs == 5
    assert len(set(schedule.blocks)) == len(schedule.blocks)
    for block in schedule.blocks:
        assert block.budget <= count and block.trains in study.ATTACKERS
        assert set(block.methods) <= {*study.METHODS, study.SCRATCH}


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, float("nan")])
def test_shares_out_of_range(share):
    with pytest.raises(ValueError) as caught:
        study.prepare("digits_cnn", None, seed=0, share=share)
    assert str(caught.value) == f"share must be above 0 and at most 1, not {share}"


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ((), "targets must name at least one class"),
        ((10,), "targets must be different classes in 0..9, not 10"),
        ((-1, 2), "targets must be different classes in 0..9, not -1, 2"),
        ((3, 3), "targets must be different classes in 0..9, not 3, 3"),
    ],
)
def test_targets_out_of_range(case, tmp_path, targets, said):
    for call in (
        lambda: study.crucial(case, TINY, "NNSlicer", targets),
        lambda: study.Study(case, TINY, tmp_path, targets),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == said
    assert list(tmp_path.iterdir()) == []


def test_schedules_the_data_do_not_allow(case, tmp_path):
    def refused(**changed):
        with pytest.raises(ValueError) as caught:
            study.Study(case, dataclasses.replace(TINY, **changed), tmp_path)
        return str(caught.value)

    for budget in (0, 1438):
        said = refused(blocks=(Block("all", budget, ("Random",), 1),))
        assert said == f"budget must be 1..1437, the number of training images, not {budget}"
    for tuning in (0, 1438):
        said = refused(tuning=tuning)
        assert said == f"tuning must be 1..1437, the number of training images, not {tuning}"
    assert refused(classes=11) == "a set must hold 1..10 target classes, not 11"
    assert refused(blocks=()) == "max_budget leaves no attack of the schedule"
    assert list(tmp_path.iterdir()) == []


def test_unknown_methods_seeds_and_classes(case):
    assert study._classes(["3", "5"]) == [3, 5]
    with pytest.raises(ValueError, match="^targets must be class numbers, not 3, one$"):
        study._classes(["3", "one"])
    with pytest.raises(ValueError, match="^method must be one of NNSlicer, .*, not 'Magic'$"):
        study.crucial(case, TINY, "Magic", (1,))
    with pytest.raises(ValueError, match=r"^seed must be 0 to 2\*\*32 - 1, not -1$"):
        study.prepare("digits_cnn", None, seed=-1, share=0.5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--share=1.5"], "share must be above 0 and at most 1, not 1.5"),
        (["--schedule=cpu"], "budget must be 1..1437, the number of training images, not 5000"),
    ],
)
def test_the_command_line_says_one_line(tmp_path, arguments, said):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.model_protection", "--model=digits_cnn",
         f"--folder={tmp_path}/runs", f"--out={tmp_path}/rows.json", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {said}\n"
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the quickstart's section


def test_the_section_attacks_every_method(case, monkeypatch):
    monkeypatch.setattr(quickstart_protection, "_SCHEDULE", TINY)
    targets, found = quickstart_protection.attacked(case, 64)
    assert targets == target_sets(10, 3, 1, 0)[0]
    assert list(found) == [*study.METHODS, study.SCRATCH]
    chosen = study.crucial(case, TINY, "Weight", ())
    whole = study.prepare("digits_cnn", None, seed=0, share=0.5).dataset
    hidden = study.attack(case, chosen, whole, None)
    right = study.right_answers(case.graph, hidden, whole)
    assert found["Weight"].before[1] == pytest.approx(right.mean())
    of_targets = np.isin(whole.test_labels, targets)
    assert found["Weight"].before[0] == pytest.approx(right[of_targets].mean())
    assert found[study.SCRATCH].before is None
    assert all(p.rate in TINY.rates and 0 <= p.after[1] <= 1 for p in found.values())
