"""The study of questions, on a tiny network: its variants, its rows, and going on."""

import dataclasses
import functools
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import provenance, record, robust_pruning
from experiments import pruning_questions as study
from experiments.pruning_questions import Key, Part
from experiments.robust_pruning import Outcome
from prune import hydra, masks, stages
from tests.tiny import Tiny, data

SCHEDULE = robust_pruning.Schedule(
    images=None, epochs=(1, 2, 1), batch_size=8, tests=None, restarts=1, steps=2, attacked=0,
    noisy=20, smoothed=2, strong=(3, 2, 2), options=(("trades", (("steps", 1),)),),
)  # fmt: skip
ABOUT = {
    "command": "python -m experiments.pruning_questions", "data": "tiny", "seeds": (0,),
    "commit": "unknown", "hardware": "a machine",
}  # fmt: skip
PART = Part(
    questions=("data", "scores", "filters", "steps"), objectives=("natural",), ratios=(0.75,),
    seeds=(0,),
)  # fmt: skip


@pytest.fixture(scope="module")
def case():
    tests = data().test_images.astype(np.float32) / 255
    network = stages.network_of(Tiny(), data())
    return robust_pruning.Case("tiny", network, data(), tests, data().test_labels, SCHEDULE)


@pytest.fixture(scope="module")
def done(case, tmp_path_factory):
    """The outcomes of a run, the networks that it measured, and its folder."""
    folder, networks = tmp_path_factory.mktemp("run"), []
    judge = robust_pruning.judge

    def noted(case, objective, found, seed):
        networks.append(found)
        return judge(case, objective, found, seed)

    noted_questions = {
        name: question._replace(judge=noted) if question.judge is judge else question
        for name, question in study.QUESTIONS.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "QUESTIONS", noted_questions)
        patch.setattr(robust_pruning, "judge", noted)
        return study.run(case, PART, folder), networks, folder


def test_every_variant_is_measured_once(done):
    found, networks, _ = done
    assert list(found) == PART.keys
    # HYDRA stands in three of these questions, LWM in two.
    assert len(networks) == len(PART.keys) - 3
    keys = [key for key in PART.keys if key.question != "filters"]
    assert {key.ratio for key in keys} == {0.75}
    assert {key.ratio for key in PART.keys if key.question == "filters"} == {0.5}
    same = [
        found[Key(q, "natural", v, 0.75)]
        for q, v in (("data", "all"), ("scores", "HYDRA"), ("steps", "HYDRA"))
    ]
    assert same[0] == same[1] == same[2]


def test_all_variants_keep_as_many(done):
    _, networks, _ = done
    whole = [n for n in networks if n.masks["Conv_0"]["bias"] is None]
    assert len(whole) == len(networks) - 4
    assert {masks.kept(one.masks)[0] for one in whole} == {6 + 30 + 15}


def test_rows_fit_the_schema(case, done):
    found, _, folder = done
    made = [
        record.Row(study="pruning_questions", **{**ABOUT, **row}) for row in study.rows(case, found)
    ]
    plain = [row for row in made if row.unit == "%"]
    assert [row.row for row in plain] == [study._row(key) for key in PART.keys]
    assert len(made) == 2 * len(plain) - len(PART.questions)
    assert "natural, filters, 50% pruned: HYDRA - LWM" in {row.row for row in made}
    names = [path.name for path in study.save_figures(found, folder / "figures")]
    assert names == [
        "data_natural_75.png", "scores_natural_75.png", "filters_natural_50.png",
        "steps_natural_75.png",
    ]  # fmt: skip
    assert all((folder / "figures" / n).read_bytes()[:4] == b"\x89PNG" for n in names)


def test_a_run_goes_on_and_knows_the_cells_of_the_other_study(case, done, monkeypatch):
    found, _, folder = done

    def again(*_args, **_options):
        raise AssertionError("this was done before")

    monkeypatch.setattr(hydra, "learn", again)
    monkeypatch.setattr(stages, "fine_tune", again)
    assert study.run(case, PART, folder) == found
    other = robust_pruning.Part(
        objectives=("natural",), methods=("lwm", "hydra"), ratios=(0.75,), seeds=(0,)
    )
    beside = robust_pruning.run(case, other, folder)
    key = Key("scores", "natural", "HYDRA", 0.75)
    assert beside["natural", "hydra", 0.75] == found[key]


def test_sub_networks_are_of_networks_trained_otherwise(case, tmp_path, monkeypatch):
    trained = []
    dense = case.network.initialize

    def noted(case, objective, seed, work, show):
        trained.append(objective)
        return dense(jax.random.key(len(trained)))

    monkeypatch.setattr(robust_pruning, "trained", noted)
    few = study.QUESTIONS["hidden"]._replace(objectives=("natural",))
    monkeypatch.setitem(study.QUESTIONS, "hidden", few)
    found = study.run(case, Part(questions=("hidden",), seeds=(0,)), tmp_path)
    assert trained == ["natural", "trades", "smoothing"]
    assert [key.variant for key in found] == [f"of {name} training" for name in trained]


def test_what_is_left_afterwards(case, monkeypatch):
    # Each is a program of its own.
    monkeypatch.setattr(study, "STRENGTHS", (2, 8))
    variables = case.network.initialize(jax.random.key(0))
    found = study.judge_after(case, "trades", robust_pruning.unpruned(variables), 0).measured
    assert list(found) == [
        "benign accuracy", *[f"era at {eps}/255" for eps in study.STRENGTHS],
        "benign accuracy, weights in 8 bits", "era at 8/255, weights in 8 bits",
        "benign accuracy, activations too", "era at 8/255, activations too",
        *[f"{name}, lost to 8 bits of {what}" for what in ("weights", "everything")
          for name in ("benign accuracy", "era at 8/255")],
        "era at 8/255, far longer",
    ]  # fmt: skip
    lost = found["era at 8/255"] - found["era at 8/255, activations too"]
    assert found["era at 8/255, lost to 8 bits of everything"] == lost
    assert all(found[f"era at {eps}/255"] <= found["benign accuracy"] for eps in study.STRENGTHS)
    outcomes = {
        Key("after", "trades", name, 0.99): [Outcome(found, [])] * 2 for name in ("LWM", "HYDRA")
    }
    rows = study.rows(case, outcomes)
    notes = {row["metric"]: row["note"] for row in rows[: len(found)]}
    assert notes["era at 8/255, far longer"] == "3 test images, PGD-2, 2 restarts"
    assert len(rows) == 3 * len(found) and all(row["ours"] == 0 for row in rows[2 * len(found) :])
    made = functools.partial(record.Row, study="pruning_questions")
    assert all(made(**{**ABOUT, **row}) for row in rows)


def test_eps_reaches_the_stages_and_the_notes(case):
    wide = dataclasses.replace(case, schedule=dataclasses.replace(SCHEDULE, eps=0.1))
    cell = study.Cell(wide, "trades", robust_pruning.share(0.9), 0, None, stages.Run())
    assert [dict(stage.options)["eps"] for stage in (cell.search, cell.finetune)] == [0.1, 0.1]
    found = {Key("filters", "trades", "HYDRA", 0.5): [Outcome({"era": 0.4}, [])]}
    assert study.rows(wide, found)[0]["note"].endswith("eps 1/10")


def test_what_is_left_afterwards_has_an_eps_of_its_own(tmp_path):
    words = [
        "--model=digits_cnn",
        "--data=digits",
        "--schedule=tiny",
        "--questions=after",
        "--eps=0.1",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.pruning_questions", *words, f"--work={tmp_path}"],
        cwd=provenance.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "error: eps must be 8/255 for after, not 0.1\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"questions": ("size",)}, "questions must be among init, data, epochs, scores, filters, "
                                   "hidden, after, steps, not size"),
        ({"questions": ()}, "questions must be different, and at least one"),
        ({"ratios": (1.0,)}, "ratios must be 0 or more and below 1, not 1.0"),
        ({"questions": ("after",), "objectives": ("natural",)},
         "objectives must have an eps of 8/255 for after, not natural"),
    ],
)  # fmt: skip
def test_parts_that_are_not_accepted(options, said):
    with pytest.raises(ValueError) as caught:
        Part(**options)
    assert str(caught.value) == said


def test_published_figures_are_of_their_network_alone(case):
    found = {Key("filters", "trades", "HYDRA", 0.5): [Outcome({"era": 0.4}, [])]}
    assert study.rows(case, found)[0]["published"] is None
    vgg = dataclasses.replace(case, name="vgg16", dataset=data()._replace(name="cifar10"))
    assert study.rows(vgg, found)[0]["published"] == 38.0
