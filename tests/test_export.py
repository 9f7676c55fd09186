"""JAX functions as ONNX files: the same function, and a real 8-bit twin of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import difftest
from difftest import export
from difftest.load import Normalise, load_model
from nnslicer_jax import data, zoo

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("jax2onnx")


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    trained = zoo.load("digits_cnn")
    folder = tmp_path_factory.mktemp("onnx")
    export.to_onnx(folder / "float.onnx", trained.model.apply, trained.variables, (8, 8, 1))
    return folder


def test_the_file_is_the_function(folder, digits):
    trained = zoo.load("digits_cnn")
    function = difftest.jax_model(trained.model.apply, trained.variables)
    images = digits.test_images[:37]
    np.testing.assert_allclose(
        load_model(folder / "float.onnx")(images), function(images), atol=1e-5
    )


def test_the_converter_leaves_jax_as_it_was(folder):
    assert (folder / "float.onnx").is_file()
    assert jnp.cumsum.__module__.startswith("jax.")
    np.testing.assert_array_equal(jnp.cumsum(jnp.arange(4), 0), [0, 1, 3, 6])


def test_a_fixed_batch_probabilities_and_a_preprocessing(tmp_path, digits):
    def apply(params, x):
        return jax.nn.softmax(x.reshape(x.shape[0], -1) @ params["kernel"])

    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(64, 3)), jnp.float32)
    path = export.to_onnx(
        tmp_path / "fixed.onnx", apply, {"kernel": kernel}, (8, 8, 1), outputs="probabilities",
        batch=4,
    )  # fmt: skip
    by = Normalise((100.0,), (50.0,))
    function = difftest.jax_model(apply, {"kernel": kernel}, by, outputs="probabilities")
    images = digits.test_images[:6]
    np.testing.assert_allclose(load_model(path, by)(images), function(images), atol=1e-5)
    small = export.quantize_onnx(path, tmp_path / "small.onnx", images, preprocess=by)
    assert np.abs(load_model(small, by)(images) - function(images)).max() < 0.1


def test_eight_bits_are_near_do_not_depend_on_the_batch_and_have_triggers(folder, digits):
    small = export.quantize_onnx(
        folder / "float.onnx", folder / "small.onnx", digits.train_images[:200]
    )
    pair = difftest.ModelPair(load_model(folder / "float.onnx"), load_model(small))
    images = digits.test_images
    original, compressed = pair.probabilities(images)
    assert (original.argmax(1) == compressed.argmax(1)).mean() > 0.95
    assert 1e-4 < np.abs(original - compressed).max()
    alone = np.concatenate([pair.compressed(image[None]) for image in images[:5]])
    np.testing.assert_allclose(alone, compressed[:5], atol=1e-6)
    found = difftest.search(pair, images[:20], jax.random.key(0), variant="best", max_queries=200)
    assert found.success.mean() > 0.8
    assert difftest.confirm(pair, found)[found.success].all()


def test_pools_past_the_edges(tmp_path, digits):
    def apply(params, x):
        x = nn.max_pool(x - 120, (3, 3), (2, 2), "SAME")
        return x.reshape(x.shape[0], -1) @ params

    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32) / 100
    path = export.to_onnx(tmp_path / "pool.onnx", apply, kernel, (8, 8, 1))
    function, images = difftest.jax_model(apply, kernel), digits.test_images[:9]
    np.testing.assert_allclose(load_model(path)(images), function(images), atol=1e-5)


def test_what_cannot_be_written_is_one_line(tmp_path, digits):
    def apply(params, x):
        return x.reshape(x.shape[0], -1) @ params

    kernel, shape = jnp.ones((64, 3)), (8, 8, 1)
    cases = (
        ({"path": "a.pb"}, "the suffix is '.pb'; accepted is .onnx"),
        ({"outputs": "labels"}, "outputs is 'labels'"),
        ({"input_shape": (8, 8)}, r"input_shape is \(8, 8\); accepted is \(H, W, C\)"),
        ({"batch": 0}, "batch is 0; accepted is 1 or more"),
    )
    for change, text in cases:
        given = {"path": "a.onnx", "input_shape": shape, **change}
        with pytest.raises(ValueError, match=text):
            export.to_onnx(
                tmp_path / given.pop("path"), apply, kernel, given.pop("input_shape"), **given
            )

    def strange(params, x):
        return jnp.linalg.eigvals(x[:, :, :, 0]).real @ params

    with pytest.raises(ValueError, match="the function cannot be converted") as caught:
        export.to_onnx(tmp_path / "a.onnx", strange, jnp.ones((8, 3)), shape)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"a\.onnx: the function cannot be converted") as caught:
        export.to_onnx(tmp_path / "a.onnx", apply, kernel, (9, 9, 1))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    images = digits.test_images
    with pytest.raises(FileNotFoundError, match="no such file"):
        export.quantize_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx", images)
    (tmp_path / "a.onnx").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not an ONNX model"):
        export.quantize_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx", images)
    with pytest.raises(ValueError, match="at least one, got none"):
        export.quantize_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx", images[:0])


def test_weights_listed_as_inputs_are_no_inputs(folder, tmp_path, digits):
    import onnx

    model = onnx.load(folder / "float.onnx")
    model.graph.input.extend(
        onnx.helper.make_tensor_value_info(each.name, each.data_type, each.dims)
        for each in model.graph.initializer
    )
    onnx.save(model, tmp_path / "listed.onnx")
    images = digits.train_images[:64]
    small = export.quantize_onnx(tmp_path / "listed.onnx", tmp_path / "small.onnx", images)
    plain = export.quantize_onnx(folder / "float.onnx", tmp_path / "plain.onnx", images)
    np.testing.assert_allclose(load_model(small)(images), load_model(plain)(images), atol=1e-6)


def test_what_the_runtime_refuses_names_the_file(folder, tmp_path, digits):
    # Images of another size than the file's: the runtime's own ValueError or another type.
    images = np.zeros((2, 9, 9, 1), np.uint8)
    with pytest.raises(ValueError, match=r"float\.onnx: cannot be quantized") as caught:
        export.quantize_onnx(folder / "float.onnx", tmp_path / "b.onnx", images)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())

    def refused(*_, **__):
        raise ValueError("not\nthat")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("onnxruntime.quantization.quantize_static", refused)
        with pytest.raises(ValueError, match=r"float\.onnx: cannot be quantized \(not that\)"):
            export.quantize_onnx(folder / "float.onnx", tmp_path / "b.onnx", digits.test_images[:2])
