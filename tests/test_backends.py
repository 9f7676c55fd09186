"""Models from files: what each runtime gives, and what a bad file is called."""

import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import difftest
import nnslicer_jax as nns
from difftest import load
from difftest.backends import pixels
from difftest.backends.process import ProcessModel

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
PAIRS = SHARED / "dflare_pairs"
RESNET = load.Normalise((125.307, 122.95, 113.865), (62.9932, 62.0887, 66.7048))
KERNEL = np.random.default_rng(0).normal(size=(3, 12)).astype(np.float32)
BIAS = np.array([0.1, -0.2, 0.3], np.float32)


def pictures(number, shape=(2, 2, 3), seed=1):
    return np.random.default_rng(seed).integers(0, 256, (number, *shape), dtype=np.uint8)


def logits(images, divisor=255):
    return (images.reshape(len(images), -1) / np.float32(divisor)) @ KERNEL.T + BIAS


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def mnist(number):
    """Test images and labels."""
    folder = SHARED / "mnist"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/mnist")
    images = gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    return (
        np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28, 1)[:number],
        np.frombuffer(labels, np.uint8, offset=8)[:number],
    )


def cifar10():
    """The test images whose exact pixels are known, and their labels."""
    path = SHARED / "cifar10" / "cifar10_exact_subset.npz"
    if not path.is_file():
        pytest.skip("needs ../shared/data/cifar10")
    with np.load(path) as arrays:
        return arrays["test_images"], arrays["test_labels"]


def published(name):
    path = PAIRS / name
    if not path.is_file():
        pytest.skip("needs ../shared/data/dflare_pairs")
    return path


# Files of every kind ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content, kind, message",
    [
        ("gone.tflite", None, FileNotFoundError, r"gone\.tflite: no such file"),
        ("model.pt", b"x", ValueError, r"the suffix is '\.pt'; accepted are \.tflite, \.lite"),
        ("model", b"x", ValueError, r"the suffix is ''; accepted .* a name of the zoo \(digits"),
        ("empty.lite", b"", ValueError, r"empty\.lite: an empty file"),
        ("alone.safetensors", b"x", FileNotFoundError, r"alone\.json: .* need their card beside"),
    ],
)
def test_bad_files_have_one_line(tmp_path, name, content, kind, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(kind, match=message) as error:
        load.load_model(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named():
    with pytest.raises(ModuleNotFoundError, match="reading it needs the package some-package, wh"):
        pixels.optional("no_such_module.inner", "some-package", "reading it")


def test_normalise_by_channel():
    x = np.array([[[[1.0, 2.0]]]], np.float32)
    np.testing.assert_array_equal(load.Normalise((1, 0), (2, 4))(x), [[[[0, 0.5]]]])
    with pytest.raises(ValueError, match="std is 0; accepted are finite numbers, std above 0"):
        load.Normalise(0, 0)


@pytest.mark.parametrize(
    "images, message",
    [
        (
            np.zeros((2, 2, 3), np.uint8),
            r"images are uint8 of shape \(2, 2, 3\); accepted is uint8",
        ),
        (np.zeros((1, 2, 2, 3)), "images are float64 of shape"),
    ],
)
def test_other_images_are_refused(images, message):
    with pytest.raises(difftest.ModelError, match=message):
        pixels.prepared(images, None)


# This project's weights -------------------------------------------------------------------


def test_a_network_of_the_zoo_by_name_and_by_file():
    from nnslicer_jax import zoo

    trained = zoo.load("digits_cnn")
    images = pictures(5, (8, 8, 1))
    expected = softmax(np.asarray(trained.model.apply(trained.variables, images / np.float32(255))))
    for path in ("digits_cnn", zoo.SHIPPED / "digits_cnn.safetensors"):
        model = load.load_model(path)
        assert isinstance(model, difftest.JaxModel)
        np.testing.assert_allclose(model(images), expected, atol=1e-5)


# TensorFlow Lite --------------------------------------------------------------------------

# Of the file format: a tensor's type by the numpy type's name.
_TYPES = {"float32": 0, "uint8": 3, "int32": 2, "int8": 9}


def write_tflite(path, into, out_of, weights, bias=None, layer="FullyConnected"):
    """A file of one layer, a dense one unless told otherwise.

    Tensors are (values or shape, type, scale, zero point), scale 0: not quantised.
    """
    flatbuffers = pytest.importorskip("flatbuffers")
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version = 3
    model.buffers = [schema.BufferT()]
    graph.tensors = []
    tensors = [into, weights, *([] if bias is None else [bias]), out_of]
    for number, (values, kind, scale, zero_point) in enumerate(tensors):
        tensor = schema.TensorT()
        tensor.name, tensor.type = f"tensor_{number}", _TYPES[kind]
        if isinstance(values, tuple):
            tensor.shape, tensor.buffer = list(values), 0
        else:
            tensor.shape, tensor.buffer = list(values.shape), len(model.buffers)
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(values.astype(kind).tobytes(), np.uint8)
            model.buffers.append(buffer)
        if scale:
            tensor.quantization = schema.QuantizationParametersT()
            tensor.quantization.scale = [scale]
            tensor.quantization.zeroPoint = [zero_point]
        graph.tensors.append(tensor)
    code = schema.OperatorCodeT()
    opcodes = {"FullyConnected": schema.BuiltinOperator.FULLY_CONNECTED}
    opcodes["Reshape"] = schema.BuiltinOperator.RESHAPE
    code.builtinCode = code.deprecatedBuiltinCode = opcodes[layer]
    code.version = 4 if into[1] == "int8" and layer == "FullyConnected" else 1
    last = len(tensors) - 1
    operator = schema.OperatorT()
    operator.inputs, operator.outputs, operator.opcodeIndex = [*range(last)], [last], 0
    operator.builtinOptionsType = getattr(schema.BuiltinOptions, f"{layer}Options")
    operator.builtinOptions = getattr(schema, f"{layer}OptionsT")()
    graph.operators, graph.inputs, graph.outputs = [operator], [0], [last]
    model.operatorCodes, model.subgraphs = [code], [graph]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(builder.Output())
    return path


def float_tflite(path):
    return write_tflite(
        path,
        ((1, 2, 2, 3), "float32", 0, 0),
        ((1, 3), "float32", 0, 0),
        (KERNEL, "float32", 0, 0),
        (BIAS, "float32", 0, 0),
    )


@pytest.mark.parametrize("number", [0, 1, 7])
def test_tflite(tmp_path, number):
    path = float_tflite(tmp_path / "dense.tflite")
    images = pictures(number)
    for workers in (1, 3):
        model = load.load_model(path, outputs="logits", workers=workers)
        out = model(images)
        assert out.dtype == np.float32
        np.testing.assert_allclose(out, softmax(logits(images)) if number else np.zeros((0, 3)),
                                   atol=1e-5)  # fmt: skip


def test_tflite_preprocesses(tmp_path):
    model = load.load_model(float_tflite(tmp_path / "dense.lite"), lambda x: x / 100)
    images = pictures(3)
    np.testing.assert_allclose(model(images), logits(images, 100), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_tflite_of_whole_numbers(tmp_path, kind):
    # Scales that are powers of two: the arithmetic of the file is exact.
    low = -128 if kind == "int8" else 0
    whole = np.random.default_rng(3).integers(-3, 4, (3, 12))
    weight_zero = 0 if kind == "int8" else 8
    path = write_tflite(
        tmp_path / "dense.tflite",
        ((1, 2, 2, 3), kind, 1 / 8, low),
        ((1, 3), kind, 1 / 2, low + 128),
        (whole + weight_zero, kind, 1 / 4, weight_zero),
        (np.array([8, -16, 0]), "int32", 1 / 32, 0),
    )
    images = pictures(6)
    x = np.clip(np.round(images / np.float32(32)), 0, 255) / 8
    exact = x.reshape(6, 12) @ (whole.T / 4) + np.array([8, -16, 0]) / 32
    model = load.load_model(path, lambda x: np.round(x / 32) / 8)
    # An output is off by at most half a step, and one step where the runtime rounds otherwise.
    assert np.abs(model(images) - np.clip(exact, -64, 63.5)).max() <= 0.5
    assert np.unique(model(images) * 2 % 1) == [0]


def test_tflite_takes_pixels_as_they_are_without_a_scale(tmp_path):
    path = write_tflite(
        tmp_path / "reshape.tflite",
        ((1, 2, 2, 3), "uint8", 0, 0),
        ((1, 12), "uint8", 0, 0),
        (np.array([1, 12]), "int32", 0, 0),
        layer="Reshape",
    )
    images = pictures(5)
    np.testing.assert_array_equal(load.load_model(path)(images), images.reshape(5, 12))
    halved = load.load_model(path, lambda x: x / 2)(images)
    np.testing.assert_array_equal(halved, np.round(images.reshape(5, 12) / 2))


def test_tflite_of_int8_without_a_scale_needs_a_preprocessing(tmp_path):
    path = write_tflite(
        tmp_path / "reshape.tflite",
        ((1, 2, 2, 3), "int8", 0, 0),
        ((1, 12), "int8", 0, 0),
        (np.array([1, 12]), "int32", 0, 0),
        layer="Reshape",
    )
    with pytest.raises(ValueError, match=r"reshape\.tflite: takes int8 without a scale, which hol"):
        load.load_model(path)
    images = pictures(5)
    centred = load.load_model(path, lambda x: x - 128)(images)
    np.testing.assert_array_equal(centred, images.reshape(5, 12) - 128.0)


def test_tflite_of_another_size_is_one_line(tmp_path):
    model = load.load_model(float_tflite(tmp_path / "dense.tflite"))
    with pytest.raises(difftest.ModelError, match=r"takes \[1, 2, 2, 3\], the .* are \[1, 4, 2"):
        model(pictures(1, (4, 2, 3)))
    assert model(pictures(1)).shape == (1, 3)


@pytest.mark.parametrize("spoil", [lambda b: b[: len(b) // 2], lambda b: b"garbage" * 99])
def test_damaged_tflite_is_one_line(tmp_path, spoil):
    path = float_tflite(tmp_path / "dense.tflite")
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=r"dense\.tflite: not a TensorFlow Lite model") as error:
        load.load_model(path)
    assert "\n" not in str(error.value)


def test_options_of_tflite_are_checked(tmp_path):
    path = float_tflite(tmp_path / "dense.tflite")
    with pytest.raises(ValueError, match="outputs is 'softmax'; accepted are logits, prob"):
        load.load_model(path, outputs="softmax")
    with pytest.raises(ValueError, match="workers is 0; accepted is 1 or more"):
        load.load_model(path, workers=0)


@pytest.mark.parametrize("name, expected", [("lenet1", 97.84), ("lenet5", 98.79)])
def test_published_lenets_of_8_bits(name, expected):
    pytest.importorskip("ai_edge_litert")
    images, labels = mnist(10_000)
    model = load.load_model(published(f"{name}-quan.lite"))
    accuracy = 100 * (model(images).argmax(1) == labels).mean()
    assert round(accuracy, 2) == expected


# Keras ------------------------------------------------------------------------------------


# Keras copies its variables in a way that numpy is giving up.
KERAS_SAVES = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def keras(monkeypatch, tmp_path):
    """Keras on JAX, with its settings in a folder of its own."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    module = pytest.importorskip("keras")
    if module.backend.backend() != "jax":
        pytest.skip(f"Keras runs on {module.backend.backend()} here")
    return module


def dense_in_keras(keras, *layers):
    model = keras.Sequential([keras.layers.Input((2, 2, 3)), *layers, keras.layers.Flatten(),
                              keras.layers.Dense(3, name="last")])  # fmt: skip
    model.get_layer("last").set_weights([KERNEL.T, BIAS])
    return model


@pytest.mark.parametrize("suffix", ["h5", "keras"])
@KERAS_SAVES
def test_keras(keras, tmp_path, suffix):
    path = tmp_path / f"model.{suffix}"
    # A layer of averages and one of random numbers: neither changes anything at inference.
    with jax.numpy_rank_promotion("allow"):
        model = dense_in_keras(
            keras, keras.layers.BatchNormalization(epsilon=1e-9), keras.layers.Dropout(0.5)
        )
        model.save(path)
    loaded = load.load_model(path, outputs="logits")
    assert isinstance(loaded, difftest.JaxModel)
    images = pictures(5)
    np.testing.assert_allclose(loaded(images), softmax(logits(images)), atol=1e-5)
    np.testing.assert_allclose(
        loaded.apply(loaded.params, images / np.float32(255)), logits(images), atol=1e-5
    )
    assert {name.split("/")[-1] for name in loaded.params["state"]} == {
        "moving_mean", "moving_variance"
    }  # fmt: skip
    doubled = {**loaded.params, "params": jax.tree.map(lambda p: 2 * p, loaded.params["params"])}
    assert not np.allclose(loaded.apply(doubled, images / np.float32(255)), logits(images))


def test_keras_is_traced_and_searched_on_the_device(keras):
    from difftest.backends import keras as backend

    model = backend.of_model(dense_in_keras(keras), outputs="logits")
    pair = difftest.ModelPair(model, model)
    assert pair.on_device
    images = pictures(2)
    graph = nns.trace(model.apply, model.params, images / np.float32(255))
    np.testing.assert_allclose(
        nns.evaluate(graph, model.params, images / np.float32(255))[0], logits(images), atol=1e-5
    )


def test_keras_variables_of_one_name_stay_apart(keras):
    from difftest.backends.keras import _names

    class Variable:
        path = "dense/kernel"

    assert _names([Variable(), Variable()]) == ["dense/kernel", "dense/kernel_1"]


@pytest.mark.parametrize("suffix", ["h5", "keras"])
def test_damaged_keras_is_one_line(keras, tmp_path, suffix):
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(b"garbage" * 99)
    with pytest.raises(ValueError, match=rf"model\.{suffix}: not a Keras model that lo") as error:
        load.load_model(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["h5", "keras"])
@KERAS_SAVES
def test_code_in_a_keras_file_is_not_run(keras, tmp_path, suffix):
    path = tmp_path / f"model.{suffix}"
    dense_in_keras(keras, keras.layers.Lambda(lambda x: x * 2)).save(path)
    with pytest.raises(ValueError, match="not a Keras model that loads .*ambda"):
        load.load_model(path)


def test_keras_on_another_backend_is_one_line(monkeypatch, tmp_path):
    from difftest.backends import keras as backend

    class Other:
        class backend:
            @staticmethod
            def backend():
                return "torch"

    monkeypatch.setitem(sys.modules, "keras", Other)
    (tmp_path / "model.h5").write_bytes(b"x")
    with pytest.raises(RuntimeError, match="runs on torch here; accepted is jax: set KERAS_BACK"):
        backend.load(tmp_path / "model.h5")


@pytest.mark.parametrize("name, expected", [("lenet1", 97.88), ("lenet5", 98.81)])
def test_published_lenets(keras, name, expected):
    images, labels = mnist(10_000)
    model = load.load_model(published(f"{name}.h5"))
    found = np.concatenate([model(part).argmax(1) for part in np.split(images, 10)])
    assert round(100 * (found == labels).mean(), 2) == expected


def test_published_resnets(keras):
    pytest.importorskip("ai_edge_litert")
    images, labels = (part[:200] for part in cifar10())
    original = load.load_model(published("resnet.h5"), RESNET)
    compressed = load.load_model(published("resnet-quan.lite"), RESNET)
    pair = difftest.ModelPair(original, compressed)
    right = [(out.argmax(1) == labels).mean() for out in pair.probabilities(images)]
    assert min(right) > 0.88 and not pair.on_device


# ONNX -------------------------------------------------------------------------------------


def write_onnx(path, kind="FLOAT", batch="B", shape=(2, 2, 3)):
    """A file of one dense layer; whole numbers are first divided by 255."""
    onnx = pytest.importorskip("onnx")
    make, types = onnx.helper, onnx.TensorProto
    divisor = np.float32(1 if kind == "FLOAT" else 255)
    nodes = [
        make.make_node("Cast", ["x"], ["float"], to=types.FLOAT),
        make.make_node("Div", ["float", "divisor"], ["scaled"]),
        make.make_node("Flatten", ["scaled"], ["flat"]),
        make.make_node("Gemm", ["flat", "kernel", "bias"], ["y"], transB=1),
    ]
    values = {"divisor": divisor, "kernel": KERNEL, "bias": BIAS}
    graph = make.make_graph(
        nodes,
        "dense",
        [make.make_tensor_value_info("x", getattr(types, kind), [batch, *shape])],
        [make.make_tensor_value_info("y", types.FLOAT, [batch, 3])],
        [onnx.numpy_helper.from_array(np.asarray(v), name) for name, v in values.items()],
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


@pytest.fixture
def onnxruntime():
    return pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("kind", ["FLOAT", "UINT8"])
@pytest.mark.parametrize("batch", ["B", 1, 4])
@pytest.mark.parametrize("number", [0, 1, 7])
def test_onnx(onnxruntime, tmp_path, kind, batch, number):
    path = write_onnx(tmp_path / "dense.onnx", kind, batch)
    images = pictures(number)
    model = load.load_model(path, outputs="logits", workers=1)
    out = model(images)
    assert out.dtype == np.float32 and out.shape == (number, 3)
    if number:
        np.testing.assert_allclose(out, softmax(logits(images)), atol=1e-5)


def test_onnx_with_channels_first(onnxruntime, tmp_path):
    path = write_onnx(tmp_path / "dense.onnx", shape=(3, 2, 2))
    model = load.load_model(path, lambda x: x.transpose(0, 3, 1, 2) / 255, outputs="logits")
    images = pictures(3)
    expected = softmax(logits(images.transpose(0, 3, 1, 2)))
    np.testing.assert_allclose(model(images), expected, atol=1e-5)


def test_onnx_of_int8_needs_a_preprocessing(onnxruntime, tmp_path):
    path = write_onnx(tmp_path / "dense.onnx", "INT8")
    with pytest.raises(ValueError, match=r"dense\.onnx: takes int8, which holds no pixel above 12"):
        load.load_model(path)
    images = pictures(3)
    model = load.load_model(path, lambda x: x - 128, outputs="logits")
    expected = softmax(logits(images.astype(np.float32) - 128))
    np.testing.assert_allclose(model(images), expected, atol=1e-5)


def test_onnx_of_another_size_is_one_line(onnxruntime, tmp_path):
    model = load.load_model(write_onnx(tmp_path / "dense.onnx"))
    with pytest.raises(difftest.ModelError, match=r"takes \[any, 2, 2, 3\], the .* are \[1, 4, 2"):
        model(pictures(1, (4, 2, 3)))


@pytest.mark.parametrize("spoil", [lambda b: b[: len(b) // 2], lambda b: b"garbage" * 99])
def test_damaged_onnx_is_one_line(onnxruntime, tmp_path, spoil):
    path = write_onnx(tmp_path / "dense.onnx")
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=r"dense\.onnx: not an ONNX model that runs") as error:
        load.load_model(path)
    assert "\n" not in str(error.value)


# Processes --------------------------------------------------------------------------------


def fragile(kind="even", scale=1):
    """What a child process runs: a model that does as the first pixel of the first image says."""

    def model(images):
        first = images[0, 0, 0, 0] if len(images) else 0
        print("a model may print")
        if first == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        if first == 2:
            time.sleep(60)
        if first == 3:
            raise OSError("no\nluck")
        if first == 4:
            os._exit(7)
        return np.full((len(images), 2), scale * 0.5)

    return model


def no_model():
    raise ValueError("not\nhere")


def first_pixel(value, number=2):
    images = np.zeros((number, 4, 4, 1), np.uint8)
    images[0, 0, 0, 0] = value
    return images


def test_a_model_in_a_process_breaks_alone():
    breaks = {
        3: "fragile: no luck",
        1: "fragile: on 2 images, the process crashed (SIGSEGV)",
        4: "fragile: on 2 images, the process ended with status 7",
        2: "fragile: on 2 images, the process hung: no answer in 0.2 s",
    }
    with ProcessModel("tests.test_backends:fragile") as model:
        for pixel, message in breaks.items():
            model.timeout = 60
            # More bytes than a socket holds.
            out = model(first_pixel(0, 300_000))
            assert out.dtype == np.float32 and out.shape == (300_000, 2) and (out == 0.5).all()
            model.timeout = 0.2 if pixel == 2 else 60
            with pytest.raises(difftest.ModelError) as error:
                model(first_pixel(pixel))
            assert message in str(error.value) and "\n" not in str(error.value)


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_model_that_hangs_ends_with_its_parent():
    code = """
import numpy as np
from difftest.backends.process import ProcessModel
model = ProcessModel("tests.test_backends:fragile")
print(model._child.process.pid, flush=True)
model(np.full((1, 4, 4, 1), 2, np.uint8))
"""
    root = Path(__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE) as parent:
        child = int(parent.stdout.readline())
        time.sleep(1)
        assert is_running(child)
        parent.kill()
    end = time.monotonic() + 20
    while is_running(child) and time.monotonic() < end:
        time.sleep(0.2)
    assert not is_running(child)


def told(images):
    """A model that says what the first pixel is."""
    return np.array([[1 - image[0, 0, 0] / 100, image[0, 0, 0] / 100] for image in images])


def teller():
    return told


@pytest.mark.parametrize("when", ["asking", "loading"])
def test_an_interrupted_call_leaves_no_answer_behind(monkeypatch, when):
    with ProcessModel("tests.test_backends:teller") as model:
        assert model(first_pixel(10, 1))[0, 1] == pytest.approx(0.1)
        if when == "loading":
            model.close()

        def interrupted(channel):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr("difftest.backends.process._Channel.receive", interrupted)
            with pytest.raises(KeyboardInterrupt):
                model(first_pixel(90, 1))
        assert model._child is None
        assert model(first_pixel(10, 1))[0, 1] == pytest.approx(0.1)


def test_a_model_in_a_process_takes_arguments():
    with ProcessModel("tests.test_backends:fragile", arguments={"scale": 2}) as model:
        np.testing.assert_array_equal(model(first_pixel(0, 1)), [[1, 1]])
        process = model._child.process
    assert process.poll() is not None


def test_a_file_in_a_process(tmp_path):
    path = float_tflite(tmp_path / "dense.tflite")
    images = pictures(3)
    scaled = load.Normalise((0, 0, 0), 100)
    with ProcessModel(path, scaled, outputs="logits", arguments={"workers": 1}) as model:
        np.testing.assert_allclose(model(images), softmax(logits(images, 100)), atol=1e-5)


@pytest.mark.parametrize(
    "source, options, kind, message",
    [
        ("tests.test_backends:no_model", {}, difftest.ModelError, "no_model: not here"),
        ("gone.tflite", {}, difftest.ModelError, r"gone\.tflite: no such file"),
        ("a:b", {"outputs": "logits"}, ValueError, "preprocess and outputs are for files"),
        ("a.onnx", {"outputs": "softmax"}, ValueError, "outputs is 'softmax'"),
        ("a.onnx", {"preprocess": abs}, ValueError, "a process takes None, Normalise or"),
        ("a.onnx", {"preprocess": "abs"}, ValueError, 'accepted is "module:function"'),
        ("a.onnx", {"timeout": 0}, ValueError, "timeout is 0, start_timeout 300"),
        ("a:b", {"arguments": {"x": {1}}}, ValueError, "arguments: accepted are JSON values"),
    ],
)
def test_bad_processes_have_one_line(source, options, kind, message):
    with pytest.raises(kind, match=message) as error:
        ProcessModel(source, **options)
    assert "\n" not in str(error.value)
