"""The trained networks: files and cards, what they claim, and damaged ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from experiments import train as command
from nnslicer_jax import data, models, training, zoo

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted(path.stem for path in zoo.SHIPPED.glob("*.safetensors"))
CARD = {"num_classes": 10, "input_shape": [8, 8, 1], "command": "python -m somewhere"}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


WHOLE = {"name": "mine", "model": "digits_cnn", **CARD}


def digits_variables():
    model = models.create("digits_cnn")
    example = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), example)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def save_digits(folder, **changes):
    arguments = {"name": "mine", "model_name": "digits_cnn", "variables": digits_variables()}
    return zoo.save(**{**arguments, "card": CARD, "folder": folder, **changes})


# ---------------------------------------------------------------- what is shipped


def test_the_digits_are_shipped_and_the_whole_is_small():
    assert "digits_cnn" in SHIPPED
    assert sum(path.stat().st_size for path in zoo.SHIPPED.iterdir()) < 8e6


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_networks_load(name):
    trained = zoo.load(name)
    card = trained.card
    count = sum(p.size for p in jax.tree.leaves(trained.variables["params"]))
    assert card["name"] == name and card["parameters"] == count
    assert card["command"].startswith("python -m experiments.train --model ")
    weights = zoo.SHIPPED / f"{name}.safetensors"
    assert weights.stat().st_size == card["weights_bytes"]
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(trained.variables))
    logits = trained.model.apply(trained.variables, jnp.zeros((2, *card["input_shape"])))
    assert logits.shape == (2, card["num_classes"]) and np.isfinite(logits).all()


def test_the_digits_card_is_true():
    trained, digits = zoo.load("digits_cnn"), data.load("digits")
    correct = training.count_correct(
        trained.model, trained.variables, digits.test_images, digits.test_labels
    )
    assert correct == trained.card["test_correct"] > 0.97 * 360
    assert trained.card["test_accuracy"] == correct / 360
    assert trained.card["data_sha256"] == command.fingerprint(digits)


# ---------------------------------------------------------------- saving and loading


def test_saved_networks_are_found_in_the_cache(tmp_path):
    seen = []
    card = save_digits(
        tmp_path / "cache" / "nnslicer_jax" / "weights",
        measure=lambda model, variables: seen.append((model, variables)) or {"test_accuracy": 0.5},
    )
    trained = zoo.load("mine")
    assert "mine" in zoo.names()
    assert trained.card == card and card["test_accuracy"] == 0.5
    # What was measured is what a reader gets: kernels rounded to half precision, biases not.
    [(model, measured)] = seen
    assert model == trained.model
    original = digits_variables()
    for path, leaf in jax.tree_util.tree_leaves_with_path(original):
        wanted = leaf.astype(np.float16).astype(np.float32) if leaf.ndim > 1 else leaf
        for variables in (measured, trained.variables):
            found = variables
            for key in path:
                found = found[key.key]
            np.testing.assert_array_equal(found, wanted)


def test_options_of_the_model_are_kept(tmp_path):
    variables = jax.eval_shape(
        models.create("lenet1").init, jax.random.key(0), jnp.zeros((1, 28, 28, 1))
    )
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), variables)
    folder = tmp_path / "cache" / "nnslicer_jax" / "weights"
    card = {**CARD, "input_shape": [28, 28, 1]}
    zoo.save("mine", "lenet1", variables, card, folder, options={"mean": 0.25})
    assert zoo.load("mine").model.mean == 0.25


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match="zoo: 'lenet6' is unknown; known are .*digits_cnn"):
        zoo.load("lenet6")


def test_a_card_without_weights_says_the_command(tmp_path):
    folder = tmp_path / "cache" / "nnslicer_jax" / "weights"
    save_digits(folder)
    (folder / "mine.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="make them with: python -m somewhere"):
        zoo.load("mine")


def test_numbers_that_do_not_fit_are_not_written(tmp_path):
    for value in (np.nan, 1e6):
        variables = jax.tree.map(np.copy, digits_variables())
        variables["params"]["Dense_0"]["kernel"][0, 0] = value
        with pytest.raises(ValueError, match="Dense_0/kernel holds NaN, infinity or a number"):
            save_digits(tmp_path, variables=variables)
    assert not list(tmp_path.iterdir())


def test_cards_need_a_command(tmp_path):
    card = {key: value for key, value in CARD.items() if key != "command"}
    with pytest.raises(ValueError, match="mine: the card needs 'command' of type str"):
        save_digits(tmp_path, card=card)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- damaged files


def damaged(change):
    def write(path):
        arrays = safetensors.numpy.load_file(path)
        change(arrays)
        path.write_bytes(safetensors.numpy.save(arrays))

    return write


KERNEL = "params/Dense_0/kernel"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b""), "not a safetensors file"),
        (lambda path: path.write_bytes(b"\x80\x04nonsense"), "not a safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "not a safetensors file"),
        (damaged(lambda a: a.pop(KERNEL)), f"{KERNEL} is missing .digits_cnn"),
        (damaged(lambda a: a.update(extra=np.zeros(1))), "extra is not part of the model"),
        (damaged(lambda a: a.update({KERNEL: a[KERNEL].T.copy()})), "has shape .* takes"),
        (damaged(lambda a: a.update({KERNEL: a[KERNEL] * np.nan})), "must hold finite"),
        (damaged(lambda a: a.update({KERNEL: a[KERNEL].astype(np.int8)})), "must hold finite"),
    ],
    ids=["empty", "pickle", "cut", "missing", "extra", "shape", "nan", "dtype"],
)
def test_damaged_weights(tmp_path, damage, message):
    folder = tmp_path / "cache" / "nnslicer_jax" / "weights"
    save_digits(folder)
    damage(folder / "mine.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        zoo.load("mine")
    assert str(folder / "mine.safetensors") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a JSON file"),
        ("[]", "expected a JSON object, got list"),
        ('{"name": "mine", "model": "digits_cnn"}', "the card needs 'num_classes' of type int"),
        (json.dumps({**WHOLE, "input_shape": [8, "8", 1]}), "positive whole numbers"),
        (json.dumps({**WHOLE, "options": [1]}), "'options' must be an object"),
        (json.dumps({**WHOLE, "data_options": 8}), "'data_options' must be an object"),
        (json.dumps({**WHOLE, "model": "lenet6"}), "model: 'lenet6' is unknown"),
    ],
)
def test_damaged_cards(tmp_path, content, message):
    folder = tmp_path / "cache" / "nnslicer_jax" / "weights"
    save_digits(folder)
    (folder / "mine.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        zoo.load("mine")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- the training command


def test_names_and_commands():
    assert command.weights_name("resnet10", "cifar10") == "resnet10_cifar10"
    assert command.weights_name("digits_cnn", "digits") == "digits_cnn"
    options = training.TrainingOptions(epochs=3, crop=4, flip=True, seed=1)
    assert command.command_line("vgg16", "cifar10", options) == (
        "python -m experiments.train --model vgg16 --data cifar10 "
        "--epochs 3 --crop 4 --flip --seed 1"
    )


def test_the_command_trains_and_writes_a_true_card(tmp_path):
    arguments = "--model digits_cnn --data digits --epochs 2 --learning_rate 0.05".split()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "experiments.train", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "nnslicer_jax" / "weights"
    card = zoo.read_card(folder / "digits_cnn.json")
    model = models.create("digits_cnn")
    variables = zoo.read_weights(folder / "digits_cnn.safetensors", card)
    digits = data.load("digits")
    correct = training.count_correct(model, variables, digits.test_images, digits.test_labels)
    assert card["test_correct"] == correct > 36
    assert f"{card['test_accuracy']:.4f}" in done.stdout
    assert card["command"] == f"python -m experiments.train {' '.join(arguments)} --seed 0"


def test_the_command_reports_errors_in_one_line(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "experiments.train",
            "--model=lenet1",
            "--data=digits",
            "--epochs=0",
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == ["epochs: expected at least 1, got 0"]
