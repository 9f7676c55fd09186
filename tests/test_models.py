"""The networks: sizes, outputs, and the convolution they are built on."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import nnslicer_jax as nns
from interpret import gates
from nnslicer_jax import models
from nnslicer_jax.convolution import convolve, patches
from nnslicer_jax.models.normalisation import IMAGENET_MEAN, IMAGENET_STD, normalised
from nnslicer_jax.models.residual import BottleneckBlock

# Input shape and number of parameters. The residual and plain networks have the published layouts
# (He et al. count 0.27 M and 11.2 M), VGG-16 (15.3 M), CNN-small and CNN-large those of HYDRA,
# WRN-28-4 and WRN-28-10 the published 5.85 M and 36.5 M, LeNet-1 and LeNet-5 those of the published
# DFlare pairs. AlexNet, ResNet-50 and VGG-16 of ImageNet have 61,100,840, 25,557,032 and
# 138,357,544 with 1000 classes, here less 990 of them; the others are counted by hand below.
MODELS = {
    "alexnet": ((224, 224, 3), 61_100_840 - 990 * 4097),
    "cnn_large": ((32, 32, 3), 2_466_858),
    "cnn_small": ((32, 32, 3), 214_918),
    "digits_cnn": ((8, 8, 1), 160 + 4640 + 128 * 32 + 32 + 330),
    "lenet1": ((28, 28, 1), 7_206),
    "lenet4": ((28, 28, 1), 156 + 2416 + 784 * 84 + 84 + 850),
    "lenet5": ((28, 28, 1), 107_786),
    "mlp": ((28, 28, 1), 785 * 256 + 257 * 256 + 257 * 10),
    "mnist_cnn": ((28, 28, 1), 320 + 18_496 + 16_010),
    "plainnet20": ((32, 32, 3), 269_722),
    "resnet10": ((32, 32, 3), 308_826),
    "resnet18": ((32, 32, 3), 11_173_962),
    "resnet20": ((32, 32, 3), 269_722),
    "resnet50": ((224, 224, 3), 25_557_032 - 990 * 2049),
    "vgg11": ((32, 32, 3), 9_225_984 + 2049 * 256 + 257 * 256 + 2570),
    "vgg16": ((32, 32, 3), 15_316_042),
    "vgg16_imagenet": ((224, 224, 3), 138_357_544 - 990 * 4097),
    "wrn28_10": ((32, 32, 3), 36_479_194),
    "wrn28_4": ((32, 32, 3), 5_849_050),
}
IMAGENET = ("alexnet", "resnet50", "vgg16_imagenet")
SMALL = sorted(set(MODELS) - {"resnet18", "vgg11", "vgg16", "wrn28_10", "wrn28_4", *IMAGENET})


def abstract_variables(name, **options):
    model = models.create(name, **options)
    example = jax.ShapeDtypeStruct((1, *MODELS[name][0]), jnp.float32)
    return model, jax.eval_shape(model.init, jax.random.key(0), example)


@functools.cache
def example(name):
    """A model with random weights and statistics, made without compiling its initialisation."""
    model, shapes = abstract_variables(name)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        values = rng.normal(size=leaf.shape) / np.sqrt(max(1, np.prod(leaf.shape[:-1])))
        return jnp.asarray(np.abs(values) + 0.5 if leaf.ndim == 1 else values, leaf.dtype)

    variables = jax.tree_util.tree_map_with_path(fill, shapes)
    images = np.random.default_rng(1).random((3, *MODELS[name][0]), np.float32)
    return model, variables, images


def test_every_model_is_listed_here():
    assert set(models.MODELS) == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_logits(name):
    shape, parameters = MODELS[name]
    model, variables = abstract_variables(name)
    assert sum(p.size for p in jax.tree.leaves(variables["params"])) == parameters
    images = jax.ShapeDtypeStruct((5, *shape), jnp.float32)
    logits = jax.eval_shape(model.apply, variables, images)
    assert (logits.shape, logits.dtype) == ((5, 10), jnp.float32)


@pytest.mark.parametrize("name", MODELS)
def test_number_of_classes(name):
    model, variables = abstract_variables(name, num_classes=7)
    images = jax.ShapeDtypeStruct((2, *MODELS[name][0]), jnp.float32)
    assert jax.eval_shape(model.apply, variables, images).shape == (2, 7)


@pytest.mark.parametrize("name", SMALL)
def test_evaluation_is_deterministic_and_per_image(name):
    model, variables, images = example(name)
    apply = jax.jit(model.apply)
    logits = apply(variables, images)
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(logits, apply(variables, images))
    # No image sees another one: statistics are the stored ones and nothing is dropped.
    np.testing.assert_allclose(apply(variables, images[::-1])[::-1], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet10", "resnet20", "plainnet20"])
def test_training_updates_the_statistics_only_of_batch_norm(name):
    model, variables, images = example(name)
    run = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    _, updated = run(variables, images)
    before, after = variables["batch_stats"], updated["batch_stats"]
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert all(
        not np.allclose(a, b)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    )


@pytest.mark.parametrize(
    ("name", "auto", "convolutions", "last"),
    [("alexnet", 5, 5, 256), ("vgg16_imagenet", 13, 13, 512), ("resnet50", 16, 49, 2048)],
)
def test_gates_of_the_networks_of_imagenet(name, auto, convolutions, last):
    model, variables = abstract_variables(name)
    image = jax.ShapeDtypeStruct((1, *MODELS[name][0]), jnp.float32)
    graph = nns.trace(model.apply, variables, image)
    # ResNet-50's four projections end where their blocks do: 53 convolutions, 49 places.
    for rule, count in (("auto", auto), ("convolutions", convolutions)):
        found = list(gates.places(graph, rule).values())
        assert len(found) == count
        assert found[0].start == 0 and found[-1].stop - found[-1].start == last


@pytest.mark.parametrize("name", ["alexnet", "vgg16_imagenet"])
def test_small_images_are_refused(name):
    model = models.create(name)
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 63, 63, 3)))
    with pytest.raises(ValueError, match=r"from \d\d, got \(1, 63, 31, 3\)"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 63, 31, 3)))


@pytest.mark.parametrize("name", ["alexnet", "vgg16_imagenet"])
def test_dropout_of_the_networks_of_imagenet_is_for_training(name):
    model = models.create(name)
    image = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    key = jax.eval_shape(lambda: jax.random.key(0))
    program = jax.make_jaxpr(lambda v, x, k: model.apply(v, x, train=True, rngs={"dropout": k}))
    assert "random_bits" in str(program(variables, image, key))
    assert "random_bits" not in str(jax.make_jaxpr(model.apply)(variables, image))


def test_images_are_normalised_by_channel():
    x = np.random.default_rng(0).random((2, 3, 4, 3), np.float32)
    expected = (x - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    found = normalised(jnp.asarray(x), IMAGENET_MEAN, IMAGENET_STD)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(normalised(jnp.asarray(x), 0.5, 2), (x - 0.5) / 2, rtol=1e-6)


def naive_convolution(x, kernel, stride, border):
    """One value at a time."""
    x = np.pad(x, ((border, border), (border, border), (0, 0)))
    size = kernel.shape[0]
    rows, columns = ((n - size) // stride + 1 for n in x.shape[:2])
    return np.array([
        [
            [(x[r * stride :, c * stride :][:size, :size] * kernel[..., o]).sum()
             for o in range(kernel.shape[3])]
            for c in range(columns)
        ]
        for r in range(rows)
    ])  # fmt: skip


@pytest.mark.parametrize("size", [5, 6])
def test_bottleneck_block(size):
    """Small integers, under batch norm that changes nothing."""
    rng = np.random.default_rng(size)
    block = BottleneckBlock(2, 2)
    x = rng.integers(-3, 4, (1, size, size, 3)).astype(np.float32)
    variables = jax.eval_shape(block.init, jax.random.key(0), x)
    params = {
        name: {"kernel": rng.integers(-2, 3, leaf["kernel"].shape).astype(np.float32)}
        for name, leaf in variables["params"].items()
        if name.startswith("Conv")
    }
    kernels = [params[f"Conv_{i}"]["kernel"] for i in range(4)]
    for name, leaf in variables["batch_stats"].items():
        params[name] = {
            k: np.full(leaf["mean"].shape, k == "scale", "f4") for k in ("scale", "bias")
        }
    # Batch norm adds 1e-5 to the variance.
    stats = {
        name: {
            "mean": np.zeros(leaf["mean"].shape, "f4"),
            "var": np.full(leaf["var"].shape, 1 - 1e-5, "f4"),
        }
        for name, leaf in variables["batch_stats"].items()
    }
    y = np.maximum(naive_convolution(x[0], kernels[0], 1, 0), 0)
    y = np.maximum(naive_convolution(y, kernels[1], 2, 1), 0)
    y = naive_convolution(y, kernels[2], 1, 0) + naive_convolution(x[0], kernels[3], 2, 0)
    found = block.apply({"params": params, "batch_stats": stats}, x)
    np.testing.assert_allclose(found[0], np.maximum(y, 0), rtol=1e-5)


def test_normalisation_is_part_of_the_model():
    model, variables, images = example("resnet10")
    plain = models.create("resnet10", mean=0.0, std=1.0)
    np.testing.assert_allclose(
        model.apply(variables, images), plain.apply(variables, images * 2 - 1), rtol=1e-4, atol=1e-5
    )


def test_dropout_is_active_in_training_only():
    model, variables, images = example("mnist_cnn")
    draws = [
        model.apply(variables, images, train=True, rngs={"dropout": jax.random.key(i)})
        for i in range(2)
    ]
    assert not np.allclose(*draws)


def test_plain_network_lacks_only_the_shortcuts():
    shapes = [jax.tree.map(jnp.shape, abstract_variables(n)[1]) for n in ("resnet20", "plainnet20")]
    assert shapes[0] == shapes[1]
    (resnet, variables, images), (plain, _, _) = example("resnet20"), example("plainnet20")
    assert not np.allclose(resnet.apply(variables, images), plain.apply(variables, images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("resnet11",),
            "model: 'resnet11' is unknown; known are alexnet, cnn_large, cnn_small, digits_cnn",
        ),
        (("lenet5", 0), "num_classes: expected at least 1, got 0"),
    ],
)
def test_unknown_models(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.create(*arguments)


def test_unknown_option():
    with pytest.raises(ValueError, match="width: not an option of vgg16, whose options are: mean"):
        models.create("vgg16", width=2)


def test_vgg_refuses_other_sizes():
    with pytest.raises(ValueError, match="divisible by 32"):
        jax.eval_shape(models.create("vgg16").init, jax.random.key(0), jnp.zeros((1, 28, 28, 3)))


GEOMETRIES = [
    # height, width, channels in and out, window, strides, padding, lhs and rhs dilation
    (2, 2, 64, 48, (3, 3), (1, 1), "SAME", (1, 1), (1, 1)),
    (4, 4, 32, 8, (3, 3), (2, 2), "SAME", (1, 1), (1, 1)),
    (3, 4, 32, 8, (2, 3), (1, 1), "VALID", (1, 1), (1, 1)),
    (1, 1, 40, 8, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1)),
    (5, 5, 32, 4, (3, 3), (1, 1), "VALID", (1, 1), (2, 2)),
    (2, 2, 32, 4, (3, 3), (2, 2), ((2, 1), (0, 2)), (2, 2), (1, 1)),
    (2, 2, 16, 4, (3, 3), (1, 1), "SAME", (1, 1), (1, 1)),
    (8, 8, 32, 4, (3, 3), (1, 1), "SAME", (1, 1), (1, 1)),
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolve_is_a_convolution(geometry):
    height, width, inputs, outputs, window, strides, padding, spread, step = geometry
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-4, 5, (2, height, width, inputs)), jnp.float32)
    w = jnp.asarray(rng.integers(-4, 5, (*window, inputs, outputs)), jnp.float32)

    def run(function):
        def apply(x, w):
            return function(
                x,
                w,
                strides,
                padding,
                lhs_dilation=spread,
                rhs_dilation=step,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )

        y, pull = jax.vjp(apply, x, w)
        cotangent = jnp.asarray(rng.integers(-2, 3, y.shape), jnp.float32)
        return y, pull, cotangent

    y, pull, cotangent = run(convolve)
    expected, expected_pull, _ = run(lax.conv_general_dilated)
    # Small integers: every sum is exact in float32, whatever its order.
    np.testing.assert_array_equal(y, expected)
    for ours, theirs in zip(pull(cotangent), expected_pull(cotangent), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("size", "channels", "primitive"),
    [(2, 32, "dot_general"), (2, 16, "conv_general_dilated"), (3, 32, "conv_general_dilated")],
)
def test_small_maps_of_many_channels_are_products(size, channels, primitive):
    def apply(x, w):
        return convolve(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    jaxpr = jax.make_jaxpr(apply)(
        jnp.zeros((1, size, size, channels)), jnp.zeros((3, 3, channels, 4))
    )
    used = {equation.primitive.name for equation in jaxpr.jaxpr.eqns}
    assert used & {"dot_general", "conv_general_dilated"} == {primitive}


def test_convolve_leaves_other_layouts_and_groups_to_xla():
    x, w = jnp.ones((1, 64, 2, 2)), jnp.ones((4, 64, 3, 3))
    np.testing.assert_array_equal(
        convolve(x, w, (1, 1), "SAME"), lax.conv_general_dilated(x, w, (1, 1), "SAME")
    )
    x, w = jnp.ones((1, 2, 2, 64)), jnp.ones((3, 3, 32, 4))
    layout = ("NHWC", "HWIO", "NHWC")
    np.testing.assert_array_equal(
        convolve(x, w, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=2),
        lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=2
        ),
    )


def naive_patches(x, window, strides, padding, spread, step):
    """The values under each window, one by one."""
    batch, height, width, channels = x.shape
    canvas = np.zeros(
        (batch, (height - 1) * spread[0] + 1, (width - 1) * spread[1] + 1, channels), x.dtype
    )
    canvas[:, :: spread[0], :: spread[1]] = x
    canvas = np.pad(canvas, ((0, 0), *padding, (0, 0)))
    reach = [(k - 1) * d + 1 for k, d in zip(window, step, strict=True)]
    rows = range(0, canvas.shape[1] - reach[0] + 1, strides[0])
    columns = range(0, canvas.shape[2] - reach[1] + 1, strides[1])
    out = np.zeros((batch, len(rows), len(columns), window[0] * window[1] * channels), x.dtype)
    for b in range(batch):
        for r, top in enumerate(rows):
            for c, left in enumerate(columns):
                out[b, r, c] = [
                    canvas[b, top + i * step[0], left + j * step[1], k]
                    for i in range(window[0])
                    for j in range(window[1])
                    for k in range(channels)
                ]
    return out


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    window=pairs,
    strides=pairs,
    padding=st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 2))] * 2),
    spread=pairs,
    step=pairs,
)
def test_patches(size, window, strides, padding, spread, step):
    x = np.arange(2 * size[0] * size[1] * 2, dtype=np.float32).reshape(2, *size, 2) + 1
    ours = patches(jnp.asarray(x), window, strides, padding, lhs_dilation=spread, rhs_dilation=step)
    np.testing.assert_array_equal(ours, naive_patches(x, window, strides, padding, spread, step))


def test_patches_crop_where_padding_is_negative():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(
        patches(x, (2, 2), padding=((-1, 0), (0, -2))),
        patches(x[:, 1:, :2], (2, 2), padding="VALID"),
    )


def test_patches_refuse_other_ranks():
    with pytest.raises(ValueError, match=r"expected images \[B, H, W, C\], got .* shape \(4, 4\)"):
        patches(jnp.zeros((4, 4)), (2, 2))
