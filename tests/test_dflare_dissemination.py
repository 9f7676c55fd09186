"""The study of dissemination, and adversarial images as triggers: their pieces by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import difftest
from experiments import dflare_adversarial as adversarial
from experiments import dflare_dissemination as study
from experiments import record
from nnslicer_jax import attacks, data, zoo

ABOUT = {"command": "x", "data": "x", "seeds": (0,), "commit": "unknown", "hardware": "x"}
KEY = jax.random.key(1)
TINY = study.SCHEDULES["tiny"]


def rows_of(name, rows):
    return [record.Row(study=name, **{**ABOUT, **row}) for row in rows]


def test_a_share_of_the_weights_changes_by_a_tenth():
    params = {"kernel": jnp.arange(1.0, 41).reshape(4, 10), "bias": jnp.ones(3)}
    found = study.changed(params, 0.3, jax.random.key(0))
    ratio = np.asarray(found["kernel"] / params["kernel"])
    assert (np.abs(ratio - 1) > 1e-3).sum() == 12
    np.testing.assert_allclose(np.unique(ratio.round(4)), [0.9, 1, 1.1])
    np.testing.assert_array_equal(found["bias"], params["bias"])
    same = study.changed(params, 0.0, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_one_layer_loses_its_least_weights():
    trained = zoo.load("digits_cnn")
    paths = study.convolutions(trained.model, trained.variables, (8, 8, 1))
    assert len(paths) == 2 and paths[0] == ("params", "Conv_0", "kernel")
    found = study.one_pruned(trained.variables, paths[1], 0.25)
    before = trained.variables["params"]["Conv_1"]["kernel"]
    after = np.asarray(found["params"]["Conv_1"]["kernel"])
    gone = after == 0
    assert gone.mean() == pytest.approx(0.25, abs=0.01)
    assert np.abs(before)[gone].max() <= np.abs(before)[~gone].min()
    for name in ("Conv_0", "Dense_0"):
        np.testing.assert_array_equal(
            found["params"][name]["kernel"], trained.variables["params"][name]["kernel"]
        )


def test_both_parts_make_rows_and_pictures_and_go_on(tmp_path, monkeypatch):
    digits, trained = data.load("digits"), zoo.load("digits_cnn")
    schedule = dataclasses.replace(TINY, share=0.6)
    model = difftest.jax_model(trained.model.apply, trained.variables)
    monkeypatch.setattr(study, "SHARES", (0.2, 0.5))
    curve = study.correlation("lenet5", model, digits.test_images, schedule, tmp_path / "lenet5")
    whole, found = study.layers("digits_cnn", digits, schedule, tmp_path / "own")
    rows = study.correlation_rows("lenet5", curve)
    rows += study.layer_rows("digits_cnn", whole, found, schedule)
    made = {(row.row, row.metric): row.ours for row in rows_of("dflare_dissemination", rows)}
    right = model(digits.test_images[:40]).argmax(1) == digits.test_labels[:40]
    assert made["digits_cnn", "accuracy"] == pytest.approx(100 * right.mean(), abs=0.01)
    assert made["LeNet-5, 50% of the weights", "success rate"] > 0
    assert ("digits_cnn, convolution 2 of 2 pruned, DiffChaser", "mean queries") in made
    study.save_correlation({"lenet5": curve}, tmp_path / "correlation.png")
    study.save_layers("digits_cnn", whole, found, tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "correlation.png", "layers_accuracy.png", "layers_cost.png"
    }  # fmt: skip
    monkeypatch.setattr(study, "cost", None)
    again = study.correlation("lenet5", model, digits.test_images, schedule, tmp_path / "lenet5")
    assert again == curve
    again = study.layers("digits_cnn", digits, schedule, tmp_path / "own")
    assert again == (whole, found)
    other = difftest.jax_model(
        trained.model.apply, study.changed(trained.variables, 0.5, jax.random.key(3))
    )
    with pytest.raises(ValueError, match="another run, answers"):
        study.correlation("lenet5", other, digits.test_images, schedule, tmp_path / "lenet5")
    for changed in ({"chased": 1}, {"accuracy": 30}, {"max_queries": 9}):
        less = dataclasses.replace(schedule, **changed)
        with pytest.raises(ValueError, match=f"another run, {next(iter(changed))}"):
            study.layers("digits_cnn", digits, less, tmp_path / "own")


def test_seeds_without_a_trigger_enter_the_success_rate_alone():
    costs = {
        0.1: study.Cost([None, None], [None, None], [0, 0], [5, 5], [None, None], [None, None]),
        0.2: study.Cost([30.0, None], [0.2, None], [1, 0], [5, 5], [6.0, None], [0.0, None]),
        0.3: study.Cost([10.0, 20.0], [0.1, 0.1], [5, 5], [5, 5], [6.0, 8.0], [20.0, 40.0]),
    }
    rows = rows_of("dflare_dissemination", study.correlation_rows("lenet5", costs))
    made = {(row.row, row.metric): row for row in rows}
    none = made["LeNet-5, 10% of the weights", "mean queries"]
    assert (none.ours, none.n, none.note) == (None, 0, "no trigger was found")
    assert made["LeNet-5, 10% of the weights", "success rate"].ours == 0
    assert made["LeNet-5, 20% of the weights", "mean queries"].ours == 30
    assert made["LeNet-5, 20% of the weights", "success rate"].ours == 10
    assert made["LeNet-5, 30% of the weights", "median L2"].ours == 7
    assert made["LeNet-5, 30% of the weights", "labels kept"].ours == 30
    assert made["LeNet-5, 30% of the weights", "labels kept"].seeds == (0, 1)
    correlation = made["LeNet-5", "correlation of the share with mean queries"]
    assert (correlation.ours, correlation.n, correlation.seeds) == (-1, 2, (0, 1))


def test_costs_are_of_seeds_with_a_confirmed_trigger():
    digits, trained = data.load("digits"), zoo.load("digits_cnn")
    model = difftest.jax_model(trained.model.apply, trained.variables)
    twins = difftest.ModelPair(model, model)
    found = study.cost(twins, digits.test_images, 4, 2, 3)
    assert found == study.Cost([None] * 2, [None] * 2, [0, 0], [4, 4], [None] * 2, [None] * 2)


@pytest.mark.parametrize("chased", [False, True])
def test_a_cost_that_was_ended_goes_on(tmp_path, chased, monkeypatch):
    digits, trained = data.load("digits"), zoo.load("digits_cnn")
    model = difftest.jax_model(trained.model.apply, trained.variables)
    twin = difftest.jax_model(trained.model.apply, study.changed(trained.variables, 0.5, KEY))
    given = difftest.ModelPair(model, twin), digits.test_images, 4, 2, 100, chased
    whole = study.cost(*given)
    searched, name = [], "diffchase" if chased else "search"
    module = study if chased else difftest
    run = getattr(module, name)

    def ends(*options, **others):
        searched.append(options)
        if len(searched) == 2:
            raise KeyboardInterrupt
        return run(*options, **others)

    path = tmp_path / "lenet5_0.1.json"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module, name, ends)
        study.cost(*given, path=path)
    kept = tmp_path / "lenet5_0.1_0.npz"
    assert [one.name for one in tmp_path.iterdir()] == [kept.name]
    before = difftest.SearchResult.load(kept)
    again = study.cost(*given, path=path)
    assert (again.queries, again.found) == (whole.queries, whole.found)
    # Seconds of what was finished before are those that it took then.
    assert (difftest.SearchResult.load(kept).seconds == before.seconds).all()


def test_adversarial_images_that_trigger_are_counted():
    digits, trained = data.load("digits"), zoo.load("digits_cnn")
    apply = trained.model.apply
    original = difftest.jax_model(apply, trained.variables)
    twin = study.changed(trained.variables, 0.5, jax.random.key(1))
    pair = difftest.ModelPair(original, difftest.jax_model(apply, twin))
    images, labels = digits.test_images[:60], digits.test_labels[:60]
    rows = adversarial.measure("digits", pair, images, labels, 10, 20)
    made = {row.row: row for row in rows_of("dflare_adversarial", rows)}
    assert list(made) == [f"digits, FGSM {eps}" for eps in (0.1, 0.2, 0.3)] + ["digits, C&W"]
    right = original(images).argmax(1) == labels
    found = attacks.fgsm(None, apply, trained.variables, data.to_float(images[right]),
                         labels[right], eps=0.2)  # fmt: skip
    pixels = np.rint(255 * np.asarray(found.images)).astype(np.uint8)
    one, two = (model(pixels).argmax(1) for model in (pair.original, pair.compressed))
    fooled = one != labels[right]
    row = made["digits, FGSM 0.2"]
    assert row.n == fooled.sum() > 10
    assert row.ours == pytest.approx(1e4 * (fooled & (one != two)).sum() / fooled.sum(), abs=0.1)
    with pytest.raises(ValueError, match="digits: the original is no JAX function"):
        adversarial.measure("digits", difftest.ModelPair(lambda x: x, original), images, labels,
                            1, 1)  # fmt: skip
