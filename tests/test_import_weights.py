"""Weights under torchvision's names: what they are called, how they lie, and the command."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from experiments import import_weights
from nnslicer_jax import models, torch_names, zoo

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@functools.cache
def shapes(name, classes=1000, input_shape=(224, 224, 3)):
    example = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    found = jax.eval_shape(models.create(name, classes).init, jax.random.key(0), example)
    flat = flax.traverse_util.flatten_dict(found, sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


# ---------------------------------------------------------------- names and shapes


def of_resnet50():
    """Shape of every tensor, block by block as the paper's table has them."""
    found = {}

    def add(conv, norm, inputs, outputs, size):
        found[f"{conv}.weight"] = (outputs, inputs, size, size)
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            found[f"{norm}.{leaf}"] = (outputs,)

    add("conv1", "bn1", 3, 64, 7)
    inputs = 64
    for stage, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)], 1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            add(f"{at}.conv1", f"{at}.bn1", inputs, width, 1)
            add(f"{at}.conv2", f"{at}.bn2", width, width, 3)
            add(f"{at}.conv3", f"{at}.bn3", width, 4 * width, 1)
            if block == 0:
                add(f"{at}.downsample.0", f"{at}.downsample.1", inputs, 4 * width, 1)
            inputs = 4 * width
    return {**found, "fc.weight": (1000, 2048), "fc.bias": (1000,)}


def of_layers(layers):
    """Shape of every tensor of layers given as name to the weight's shape."""
    return {
        name: shape
        for layer, weight in layers.items()
        for name, shape in ((f"{layer}.weight", weight), (f"{layer}.bias", weight[:1]))
    }


def of_alexnet():
    widths = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3)}
    features = {**widths, 10: (256, 256, 3, 3)}
    classifier = {1: (4096, 256 * 36), 4: (4096, 4096), 6: (1000, 4096)}
    return of_layers(
        {f"features.{k}": v for k, v in features.items()}
        | {f"classifier.{k}": v for k, v in classifier.items()}
    )


def of_vgg16():
    places = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    widths = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    features = {
        f"features.{place}": (widths[i + 1], widths[i], 3, 3) for i, place in enumerate(places)
    }
    dense = {0: (4096, 512 * 49), 3: (4096, 4096), 6: (1000, 4096)}
    return of_layers(features | {f"classifier.{k}": v for k, v in dense.items()})


NETWORKS = {"alexnet": of_alexnet, "resnet50": of_resnet50, "vgg16_imagenet": of_vgg16}


@pytest.mark.parametrize("name", NETWORKS)
def test_names_and_shapes(name):
    wanted = NETWORKS[name]()
    found = torch_names.names(name, shapes(name))
    assert sorted(found.values()) == sorted(wanted)
    for path, tensor in found.items():
        shape = shapes(name)[path]
        # Kernels are [..., in, out] here and [out, in, ...] there.
        assert wanted[tensor] == (shape[-1:] + shape[-2:-1] + shape[:-2] if shape[1:] else shape)


def nothing(wanted):
    """Tensors of zeros that take no memory."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in wanted.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer3.4.bn2.bias": None}, "layer3.4.bn2.bias is missing (resnet50 under torch"),
        # The first of several, numbers by their value.
        ({"layer1.10.x": np.zeros(1), "layer1.9.x": np.zeros(1)}, "layer1.9.x is not part of the"),
        (
            {"layer1.0.conv2.weight": np.zeros((3, 3, 64, 64), "f4")},
            "layer1.0.conv2.weight has shape (3, 3, 64, 64), resnet50 takes (64, 64, 3, 3)",
        ),
        ({"bn1.bias": np.zeros(64, "i8")}, "bn1.bias holds int64; floating-point numbers are due"),
        ({"fc.bias": None}, "fc.bias is missing or no vector"),
    ],
)
def test_other_tensors_are_refused(change, message):
    given = {**nothing(of_resnet50()), **change}
    given = {name: tensor for name, tensor in given.items() if tensor is not None}
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        torch_names.classes("resnet50", given)
        torch_names.variables("resnet50", given, shapes("resnet50"))
    assert "\n" not in str(error.value)


def test_batch_counters_are_left_out():
    tensors = {**nothing(of_resnet50()), "bn1.num_batches_tracked": np.array(3)}
    found = torch_names.variables("resnet50", tensors, shapes("resnet50"))
    assert {path: array.shape for path, array in found.items()} == shapes("resnet50")
    assert all(array.dtype == np.float32 for array in found.values())


def test_other_models_have_no_such_names():
    with pytest.raises(ValueError, match="known for alexnet, resnet50, vgg16_imagenet, not 'x'"):
        torch_names.names("x", {})


# ---------------------------------------------------------------- how they lie


def test_maps_are_flattened_channels_last():
    rng = np.random.default_rng(0)
    maps = rng.integers(-5, 6, (3, 2, 2))
    kernel = rng.integers(-5, 6, (12, 4))
    found = torch_names.channels_last(kernel, 3)
    np.testing.assert_array_equal(maps.transpose(1, 2, 0).ravel() @ found, maps.ravel() @ kernel)
    with pytest.raises(ValueError, match="12 inputs of a dense layer are no square maps of 4"):
        torch_names.channels_last(kernel, 4)


# The digits network as a sequence of layers numbered with ReLU and pooling.
LAYOUT = torch_names._Layout(
    functools.partial(torch_names._sequential, "CRPCRP", "DR-D"), "classifier.3", True
)
DIGITS = {
    "features.0.weight": (16, 1, 3, 3), "features.0.bias": (16,),
    "features.3.weight": (32, 16, 3, 3), "features.3.bias": (32,),
    "classifier.0.weight": (32, 128), "classifier.0.bias": (32,),
    "classifier.3.weight": (7, 32), "classifier.3.bias": (7,),
}  # fmt: skip


def naive_logits(tensors, image):
    """The network of one image [C, H, W], channels first throughout."""
    for place in (0, 3):
        weight, bias = tensors[f"features.{place}.weight"], tensors[f"features.{place}.bias"]
        padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
        height, width = image.shape[1:]
        out = np.empty((len(weight), height, width), np.float32)
        for o, row, column in np.ndindex(out.shape):
            window = padded[:, row : row + 3, column : column + 3]
            out[o, row, column] = (weight[o] * window).sum() + bias[o]
        out = np.maximum(out, 0)
        image = out.reshape(len(out), height // 2, 2, width // 2, 2).max((2, 4))
    x = image.ravel()
    x = np.maximum(tensors["classifier.0.weight"] @ x + tensors["classifier.0.bias"], 0)
    return tensors["classifier.3.weight"] @ x + tensors["classifier.3.bias"]


@pytest.fixture
def digits(monkeypatch):
    monkeypatch.setitem(torch_names._LAYOUTS, "digits_cnn", LAYOUT)
    rng = np.random.default_rng(0)
    return {name: rng.integers(-2, 3, shape).astype("f4") for name, shape in DIGITS.items()}


def take(path, name="mine", model="digits_cnn", data="digits", shape=(8, 8, 1), out=None):
    return import_weights.run(model, path, name, data, shape, out or zoo.weights_folder())


def test_an_imported_network_computes_the_same(digits, tmp_path):
    safetensors.numpy.save_file(digits, tmp_path / "given.safetensors")
    card = take(tmp_path / "given.safetensors")
    trained = zoo.load("mine")
    assert trained.card == card and card["num_classes"] == 7 and "data_options" not in card
    assert card["command"] == (
        "python -m experiments.import_weights --model digits_cnn --file given.safetensors "
        "--name mine --data digits --input_shape 8,8,1"
    )
    images = np.random.default_rng(1).integers(0, 3, (2, 8, 8, 1)).astype("f4")
    # Small integers: every sum is exact.
    expected = [naive_logits(digits, image.transpose(2, 0, 1)) for image in images]
    np.testing.assert_array_equal(trained.model.apply(trained.variables, images), expected)


def test_weights_are_not_rounded(digits, tmp_path):
    digits["features.0.weight"][0, 0, 0, 0] = 1 + 2**-20
    safetensors.numpy.save_file(digits, tmp_path / "given.safetensors")
    take(tmp_path / "given.safetensors")
    kernel = zoo.load("mine").variables["params"]["Conv_0"]["kernel"]
    assert kernel[0, 0, 0, 0] == np.float32(1 + 2**-20)


# ---------------------------------------------------------------- our own names, the command


def test_variables_by_their_paths(tmp_path):
    trained = zoo.load("digits_cnn")
    flat = flax.traverse_util.flatten_dict(trained.variables, sep="/")
    arrays = {path: np.asarray(leaf) for path, leaf in flat.items()}
    path = tmp_path / "given.safetensors"
    safetensors.numpy.save_file(arrays, path)
    assert take(path)["num_classes"] == 10
    jax.tree.map(np.testing.assert_array_equal, zoo.load("mine").variables, trained.variables)
    kernel = arrays.pop("params/Conv_1/kernel")
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(ValueError, match=r"params/Conv_1/kernel is missing \(digits_cnn\)"):
        take(path)
    safetensors.numpy.save_file({**arrays, "params/Conv_1/kernel": kernel[1:].copy()}, path)
    with pytest.raises(ValueError, match=r"kernel has shape \(2, 3, 16, 32\), digits_cnn takes"):
        take(path)
    safetensors.numpy.save_file({**arrays, "params/Conv_1/kernel": kernel, "x": kernel}, path)
    with pytest.raises(ValueError, match="given.safetensors: x is not part of the network"):
        take(path)


def test_nothing_is_written_of_what_is_refused(digits, tmp_path):
    path, out = tmp_path / "given.safetensors", tmp_path / "out"
    safetensors.numpy.save_file(digits, path)
    for changes, message in (
        ({"name": "../mine"}, "name: expected letters, digits"),
        ({"name": "digits_cnn"}, "name: digits_cnn is a network of the package"),
        ({"shape": (8, 8)}, "input_shape: expected height, width and channels"),
        ({"data": "imagenet_folder"}, "input_shape: images of imagenet_folder are square"),
        ({"path": tmp_path / "nowhere"}, "nowhere is not there"),
    ):
        with pytest.raises(ValueError, match=message):
            take(**{"path": path, "out": out, **changes})
    digits["classifier.0.bias"][0] = np.nan
    safetensors.numpy.save_file(digits, path)
    with pytest.raises(ValueError, match="mine: params/Dense_0/bias holds NaN"):
        take(path, out=out)
    path.write_bytes(b"\x80\x04nonsense")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        take(path, out=out)
    assert not out.exists() or not list(out.iterdir())


def test_folders_of_images_say_their_size(tmp_path):
    network = models.create("lenet1", 3)
    found = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 28, 28, 3)))
    flat = flax.traverse_util.flatten_dict(found, sep="/")
    path = tmp_path / "given.safetensors"
    safetensors.numpy.save_file({name: np.asarray(leaf) for name, leaf in flat.items()}, path)
    card = take(path, model="lenet1", data="imagenet_folder", shape=(28, 28, 3))
    assert card["data_options"] == {"size": 28}


def test_the_command_reports_errors_in_one_line(tmp_path):
    file = tmp_path / "weights.pth"
    file.write_bytes(b"nonsense")
    words = ["--model=resnet50", f"--file={file}", "--name=mine", "--data=imagenet_folder"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.import_weights", *words],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    [line] = done.stderr.strip().splitlines()
    assert "weights.pth is not a safetensors file" in line
