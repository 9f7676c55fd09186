"""The study of robust pruning, on the digits: its cells, its rows, and going on."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from experiments import record
from experiments import robust_pruning as study
from experiments.robust_pruning import Outcome, Part
from prune import evaluate, masks, stages

TINY = dataclasses.replace(study.SCHEDULES["tiny"], images=64, tests=16)
PART = Part(objectives=("trades",), methods=("lwm", "hydra"), ratios=(0.9,), seeds=(0, 1))
ABOUT = {
    "command": "python -m experiments.robust_pruning", "data": "digits", "seeds": (0, 1),
    "commit": "unknown", "hardware": "a machine",
}  # fmt: skip


@pytest.fixture(scope="module")
def case():
    return study.prepare("digits_cnn", "digits", None, TINY)


@pytest.fixture(scope="module")
def done(case, tmp_path_factory):
    """The outcomes of a run, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    return study.run(case, PART, folder), folder


def test_a_run_gives_every_row_once(case, done):
    found, folder = done
    made = record.Record(
        title=study.TITLE, text=study.TEXT,
        rows=tuple(
            record.Row(study="robust_pruning", **{**ABOUT, **row})
            for row in study.rows(case, found)
        ),
    )  # fmt: skip
    assert [(row.row, row.metric) for row in made.rows] == [
        (name, metric)
        for name in (
            "trades: dense", "trades: LWM, 90% pruned", "trades: HYDRA, 90% pruned",
            "trades: HYDRA - LWM, 90% pruned",
        )
        for metric in ("benign accuracy", "era")
    ]  # fmt: skip
    assert all(row.n == 2 and row.published is None for row in made.rows)
    for outcomes in found.values():
        for outcome in outcomes:
            assert 0 <= outcome.measured["era"] <= outcome.measured["benign"] <= 1
    # Weights are counted where masks leave them.
    total = sum(math.ceil(0.1 * n) for n in (144, 4608, 4096, 320))
    assert all(sum(o.weights) <= total for o in found["trades", "hydra", 0.9])
    assert sum(found["trades", "hydra", 0.9][0].weights) > total / 2
    paths = study.save_figures(found, PART, folder / "figures")
    assert [path.name for path in paths] == [
        "trades_benign.png", "trades_era.png", "trades_weights.png"
    ]  # fmt: skip
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths)


def test_a_run_goes_on_where_it_stopped_and_takes_further_parts(case, done, monkeypatch):
    found, folder = done

    def again(*_args, **_options):
        raise AssertionError("this was done before")

    with monkeypatch.context() as patched:
        patched.setattr(study, "judge", again)
        assert study.run(case, PART, folder) == found
        more = dataclasses.replace(PART, methods=("random",))
        with pytest.raises(AssertionError, match="this was done before"):
            study.run(case, more, folder)
    # Checkpoints go with a cell that is done; those of the trained network stay.
    left = sorted(p.name for p in (folder / "trades" / "seed_0").rglob("*") if p.is_dir())
    assert "pretrain" in left and "search" not in left


def test_another_run_does_not_go_on(case, done):
    _, folder = done
    other = dataclasses.replace(case, schedule=dataclasses.replace(TINY, steps=4))
    with pytest.raises(ValueError, match="holds checkpoints of another run, schedule was"):
        study.run(other, PART, folder)


def test_shares_are_exact():
    assert [study.share(r) for r in (0.9, 0.95, 0.99)] == [
        1 - masks._share(r) for r in (0.9, 0.95, 0.99)
    ]
    assert math.ceil(study.share(0.9) * 30) == 3


def test_published_figures_stand_beside_their_own_network_alone():
    args = ("cifar10", "trades", "era")
    assert study.published("vgg16", *args, "dense", 1.0) == 51.9
    assert study.published("vgg16", *args, "lwm", float(study.share(0.9))) == 48.8
    assert study.published("vgg16", *args, "hydra", float(study.share(0.99))) == 41.7
    assert study.published("wrn28_4", *args, "hydra", float(study.share(0.95))) == 54.2
    assert study.published("wrn28_10", *args, "hydra", float(study.share(0.9))) == 62.24
    for method, pruned in (("hydra", 0.99), ("lwm", 0.9), ("dense", 0)):
        assert study.published("wrn28_10", *args, method, float(study.share(pruned))) is None
    for other in [
        ("cnn_small", *args, "lwm", 0.1), ("vgg16", *args, "harp", 0.1),
        ("vgg16", *args, "lwm", 0.2), ("vgg16", "cifar10", "trades", "benign", "lwm", 0.1),
    ]:  # fmt: skip
        assert study.published(*other) is None


def test_intervals_are_students():
    assert study.interval([0.5]) == (50.0, None)
    values = np.array([0.4, 0.5, 0.9])
    # 4.303: the 97.5 % quantile of two degrees of freedom.
    half = 100 * 4.302653 * values.std(ddof=1) / math.sqrt(3)
    assert study.interval(values) == (60.0, round(half, 2))


def test_differences_are_within_a_seed(case):
    found = {
        ("natural", "dense", 0.0): [Outcome({"benign": 0.9}, [])] * 2,
        ("natural", "lwm", 0.99): [Outcome({"benign": b}, []) for b in (0.5, 0.6)],
        ("natural", "hydra", 0.99): [Outcome({"benign": b}, []) for b in (0.6, 0.7)],
    }
    last = study.rows(case, found)[-1]
    assert last["row"] == "natural: HYDRA - LWM, 99% pruned"
    assert (last["ours"], last["spread"], last["unit"]) == (10.0, 0.0, "points")


@pytest.mark.parametrize("objective", study.MEASURES)
def test_every_objective_has_recipes(objective):
    for schedule in study.SCHEDULES.values():
        for stage in study.recipe(objective, schedule):
            assert stage.objective == objective
    published = study.recipe(objective, study.SCHEDULES["published"])
    epochs = {"crown_ibp": (200, 20, 100), "mixtrain": (60, 20, 60), "free": (25, 5, 25)}
    assert tuple(s.epochs for s in published) == epochs.get(objective, (100, 20, 100))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"methods": ("snip",)}, "methods must be among lwm, lwm_steps, admm, hydra, harp, "
                                 "hydra_shares, random, not snip"),
        ({"ratios": (1.0,)}, "ratios must be 0 or more and below 1, not 1.0"),
        ({"objectives": ()}, "objectives must be different, and at least one"),
        ({"seeds": (1, 1)}, "seeds must be different, and at least one"),
    ],
)  # fmt: skip
def test_parts_that_are_not_accepted(options, said):
    with pytest.raises(ValueError) as caught:
        Part(**options)
    assert str(caught.value) == said


def test_verdicts_on_the_same_images_are_compared():
    right = evaluate.Verdict(np.array([True, False, True, False]))
    every = {"era": right, "autoattack": evaluate.Verdict(np.array([True, False]))}
    found = study.compared(every, 2)
    assert list(found.values()) == [0.5, 0.5, 0.5] and list(found)[1] == study.ERA_OF_SAME
    assert study.compared({"era": right, "vra_t": right}, 2)[study.CONTRADICTED] == 0
    wrong = evaluate.Verdict(np.array([True, True, False, False]))
    assert study.compared({"era": right, "vra_m": wrong}, 2)[study.CONTRADICTED] == 0.25


def test_eps_reaches_the_recipe_the_notes_and_the_folder(case, tmp_path):
    wide = dataclasses.replace(case, schedule=dataclasses.replace(TINY, eps=0.1))
    for objective in study.MEASURES:
        given = [dict(stage.options).get("eps") for stage in study.recipe(objective, wide.schedule)]
        assert given == [0.1 if objective in study.EPS else None] * 3
    assert study.note(wide, "trades", "era").endswith("eps 1/10")
    assert study.described(wide).endswith("; eps 0.1")
    study.claim(case, tmp_path)
    with pytest.raises(ValueError, match="holds checkpoints of another run, schedule was"):
        study.claim(wide, tmp_path)
    with pytest.raises(ValueError, match="^eps must be 0 to 1, not 2"):
        dataclasses.replace(TINY, eps=2)


def test_mixtrain_bounds_five_images_of_small_networks_and_one_of_others():
    for model, count in (("cnn_small", 5), ("lenet5", 5), ("vgg16", 1), ("cnn_large", 1)):
        stage = study.recipe("mixtrain", study.SCHEDULES["published"], model)[0]
        assert dict(stage.options)["samples"] == count


def test_steps_of_lwm_are_said(case):
    said = study.note(case, "trades", "benign", "lwm_steps")
    assert said == "16 test images; 1 steps of pruning"


def test_rows_of_other_runs_stay(tmp_path):
    out, about = tmp_path / "rows.json", {k: v for k, v in ABOUT.items()}

    def merge(name, ours, **more):
        row = {"row": name, "metric": "era", "ours": ours}
        study.merge(out, "robust_pruning", "title", "", {**about, **more}, [row])

    merge("trades: dense", 1)
    merge("pgd: dense", 2, commit="1234567")
    merge("trades: dense", 3, data="mnist")
    merge("trades: dense", 4)
    left = [(row.row, row.data, row.ours) for row in record.read(out).rows]
    assert left == [
        ("pgd: dense", "digits", 2), ("trades: dense", "mnist", 3), ("trades: dense", "digits", 4)
    ]  # fmt: skip
    assert record.read(out).rows[0].commit == "1234567"


@pytest.mark.parametrize("method", ["admm", "harp", "hydra_shares", "lwm_steps"])
def test_every_method_prunes(case, method):
    variables = case.network.initialize(jax.random.key(0))
    found = study.pruned(
        case, "natural", method, study.share(0.9), 0, variables, stages.Run()
    )  # fmt: skip
    # The shares of four layers are rounded, each by less than one weight.
    total = sum(math.ceil(0.1 * n) for n in (144, 4608, 4096, 320))
    assert abs(masks.kept(found.masks)[0] - total) <= 4
    kernel = found.variables["params"]["Conv_0"]["kernel"]
    assert (np.asarray(kernel)[~np.asarray(found.masks["Conv_0"]["kernel"])] == 0).all()
