"""Compressed twins, and the pairs they make."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import difftest
from experiments import compress, dflare_search, pairs
from nnslicer_jax import data, zoo

OPTIONS = compress.Options(keep=0.5, epochs=1, calibration=100)


@pytest.fixture(scope="module")
def digits():
    whole = data.load("digits")
    return whole._replace(train_images=whole.train_images[:256],
                          train_labels=whole.train_labels[:256])  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compressed")


@pytest.mark.parametrize("how", compress.HOW)
def test_a_twin_is_made_and_read_again(how, digits, folder):
    if how == "onnx":
        pytest.importorskip("jax2onnx")
    options = dataclasses.replace(OPTIONS, student="mlp") if how == "distilled" else OPTIONS
    card = compress.compress("digits_cnn", how, digits, options, folder, "python -m x")
    twin = compress.load("digits_cnn", how, [folder])
    found = twin(digits.test_images)
    assert card["test_accuracy"] == pytest.approx((found.argmax(1) == digits.test_labels).mean())
    assert card["original_accuracy"] == zoo.load("digits_cnn").card["test_accuracy"]
    original = zoo.load("digits_cnn")
    whole = jax.nn.softmax(original.model.apply(original.variables, data.to_float(
        digits.test_images)))  # fmt: skip
    assert np.abs(found - whole).max() > 1e-4
    if how in ("pruned", "hydra"):
        assert card["left"] == pytest.approx(0.5, abs=0.01)
    elif how == "structured":
        assert 0 < card["left"] < 0.6
    elif how == "sliced":
        assert 0.1 < card["left"] < 1
    if how not in ("distilled", "hydra"):
        assert card["test_accuracy"] > 0.7


def test_a_pair_of_the_original_and_its_twin_is_searched(digits, folder):
    compress.compress("digits_cnn", "quantized", digits, OPTIONS, folder, "python -m x")
    apply = zoo.load("digits_cnn")
    pair = difftest.ModelPair(
        difftest.jax_model(apply.model.apply, apply.variables),
        compress.load("digits_cnn", "quantized", [folder]),
    )
    found = difftest.search(pair, digits.test_images[:8], jax.random.key(0), variant="best",
                            max_queries=60)  # fmt: skip
    assert pair.on_device and found.success.sum() >= 4


def test_what_is_missing_is_named_with_its_command(digits, folder, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="compress --network lenet4_mnist --how hydra"):
        compress.load("lenet4_mnist", "hydra", [folder])
    with pytest.raises(ValueError, match="how: 'squeezed' is unknown; known are pruned"):
        compress.compress("digits_cnn", "squeezed", digits, OPTIONS, folder, "x")
    with pytest.raises(FileNotFoundError, match="train --model vgg16 --data cifar10"):
        pairs.pair("vgg16_cifar10_pruned")
    with pytest.raises(ValueError, match="'lenet6' is unknown; known are lenet1"):
        pairs.pair("lenet6")


def test_a_damaged_card_or_one_of_other_weights_is_one_line(digits, tmp_path):
    card = compress.compress("digits_cnn", "quantized", digits, OPTIONS, tmp_path, "python -m x")
    assert card["weights_sha256"] == zoo.load("digits_cnn").card["weights_sha256"]
    path = tmp_path / "digits_cnn_quantized.json"
    name = next(iter(card["ranges"]))
    for text in ("{", "[]", "{}", json.dumps({"ranges": {name: [1]}}), json.dumps({"ranges": [1]})):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"_quantized\.json: not the card of a twin") as error:
            compress.load("digits_cnn", "quantized", [tmp_path])
        assert "\n" not in str(error.value)
    path.write_text(json.dumps({**card, "weights_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="of other weights .*make it anew with: python -m x"):
        compress.load("digits_cnn", "quantized", [tmp_path])
    card.pop("weights_sha256")
    path.write_text(json.dumps(card))
    assert compress.load("digits_cnn", "quantized", [tmp_path])(digits.test_images).ndim == 2


def test_the_pairs_are_rows_of_the_papers_table():
    titles = {" ".join(made.row) for made in pairs.MADE.values()}
    assert len(pairs.MADE) == len(titles) == 15
    assert titles >= {title for title in dflare_search.TABLE_4 if "8-bit" not in title}


@pytest.mark.parametrize("name", [name for name in pairs.MADE if "mnist" in name])
def test_shipped_pairs_agree_on_most_noise_and_answer(name):
    pair, dataset, row = pairs.pair(name)
    assert dataset == "mnist" and row.compression in ("Prune", "Quantization")
    images = np.random.default_rng(0).integers(0, 256, (8, 28, 28, 1)).astype(np.uint8)
    original, compressed = pair.probabilities(images)
    assert original.shape == (8, 10) and np.abs(original - compressed).max() > 0
