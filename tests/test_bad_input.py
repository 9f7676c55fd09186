"""What people get wrong: one line that names the argument, what was given and what is accepted."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnslicer_jax as nns
from tests import zoo


@functools.cache
def setting():
    model = zoo.model("lenet")  # [8, 8, 1] to 4 classes
    graph = nns.trace(model.apply, model.params, model.images(1))
    images = model.images(4)
    return graph, model.params, images, nns.profile(graph, model.params, images)


def assert_refused(call, *words: str, error=ValueError) -> None:
    """The call raises `error` in one line that holds every word (regular expressions)."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert message and "\n" not in message, message
    for word in words:
        assert re.search(word, message), f"{word!r} is not in {message!r}"


# Images -----------------------------------------------------------------------------------


def calls(images):
    """Every entry point that takes images, on these."""
    graph, params, _, profile = setting()
    piece = nns.slice_network(graph, params, profile, setting()[2], theta=0.0)
    masked = nns.mask_network(graph, params, piece, "zero")
    return {
        "profile": lambda: nns.profile(graph, params, images),
        "slice_network": lambda: nns.slice_network(graph, params, profile, images, theta=0.0),
        "effective_path": lambda: nns.effective_path(graph, params, images),
        "agreement": lambda: nns.agreement(graph, params, masked, images),
    }


ENTRIES = ["profile", "slice_network", "effective_path", "agreement"]


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    "images, words",
    [
        (np.zeros((2, 8, 8), np.float32), [r"\[B, 8, 8, 1\]", r"\(2, 8, 8\)"]),
        (np.zeros((8, 8, 1), np.float32), [r"\[B, 8, 8, 1\]", r"\(8, 8, 1\)"]),
        (np.zeros((2, 9, 8, 1), np.float32), [r"\[B, 8, 8, 1\]", r"\(2, 9, 8, 1\)"]),
        (np.float32(3.0), [r"\[B, 8, 8, 1\]"]),
        (np.zeros((0, 8, 8, 1), np.float32), ["empty", "at least one"]),
        ([], ["images", "empty", "at least one"]),
        ([np.zeros((2, 8, 8, 1), np.float32), np.zeros((2, 8, 1), np.float32)], [r"\(2, 8, 1\)"]),
        ([[0.0] * 8], [r"\[B, 8, 8, 1\]", "list"]),
        (None, ["images", "None"]),
        (3, ["images", "int"]),
        (np.zeros((2, 8, 8, 1), np.uint8), ["images", "float32", "uint8"]),
        (np.zeros((2, 8, 8, 1), bool), ["images", "float32", "bool"]),
        (np.full((2, 8, 8, 1), np.nan, np.float32), ["images", "finite", "NaN"]),
        (np.full((2, 8, 8, 1), np.inf, np.float32), ["images", "finite", "infinite"]),
    ],
    ids=[
        "no_channels", "one_sample", "other_size", "scalar", "empty_array", "empty_list",
        "second_batch", "numbers", "none", "integer", "bytes", "bools", "nan", "infinite",
    ],
)  # fmt: skip
def test_images(entry, images, words):
    assert_refused(calls(images)[entry], *words, error=(ValueError, TypeError))


def test_images_of_another_scale():
    graph, params, images, _ = setting()
    unit = 0.5 + 0.1 * images.clip(-5, 5)
    profile = nns.profile(graph, params, unit)
    wrong = (255 * unit).astype(np.float32)
    assert_refused(
        lambda: nns.slice_network(graph, params, profile, wrong),
        "images range over", r"\d+\.\.1\d\d", "profiled over", "scale",
    )  # fmt: skip


@pytest.mark.parametrize("entry", ["profile", "slice_network", "effective_path"])
@pytest.mark.parametrize("size", [0, -3])
def test_batch_sizes(entry, size):
    graph, params, images, profile = setting()
    entries = {
        "profile": lambda: nns.profile(graph, params, images, batch_size=size),
        "slice_network": lambda: nns.slice_network(graph, params, profile, images, batch_size=size),
        "effective_path": lambda: nns.effective_path(graph, params, images, batch_size=size),
    }
    assert_refused(entries[entry], "batch_size", "at least 1", str(size))


# Parameters -------------------------------------------------------------------------------


def changed(change):
    """The parameters with `change` made to a copy of their layers."""
    params = jax.tree.map(lambda a: a, setting()[1])
    change(params["params"])
    return params


@pytest.mark.parametrize("entry", ["profile", "slice_network", "effective_path"])
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda layers: layers.pop("Dense_1"), ["params", "structure", "Dense_1"]),
        (
            lambda layers: layers["Conv_0"].update(bias=jnp.zeros(5)),
            ["params", "Conv_0/bias", r"\(5,\)", r"\(4,\)"],
        ),
        (
            lambda layers: layers["Conv_0"].update(bias=jnp.full(4, jnp.nan)),
            ["params", "finite", "Conv_0/bias"],
        ),
    ],
)
def test_params(entry, change, words):
    graph, _, images, profile = setting()
    params = changed(change)
    entries = {
        "profile": lambda: nns.profile(graph, params, images),
        "slice_network": lambda: nns.slice_network(graph, params, profile, images),
        "effective_path": lambda: nns.effective_path(graph, params, images),
    }
    assert_refused(entries[entry], *words)


def test_activations_that_overflow():
    params = {"w": jnp.full((3, 2), 1e38)}
    graph = nns.trace(lambda p, x: jnp.sinh(x @ p["w"]), params, np.ones((1, 3), np.float32))
    assert_refused(
        lambda: nns.profile(graph, params, np.ones((2, 3), np.float32)), "sinh", "finite"
    )


# Options ----------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [-0.1, 1.01, 20, float("nan"), float("inf")])
def test_theta(theta):
    graph, params, images, profile = setting()
    said = re.escape(str(theta))
    assert_refused(
        lambda: nns.slice_network(graph, params, profile, images, theta=theta),
        "theta", r"0\.\.1", said,
    )  # fmt: skip
    assert_refused(
        lambda: nns.effective_path(graph, params, images, theta=theta), "theta", r"0\.\.1", said
    )


def test_names_of_options():
    graph, params, images, profile = setting()
    assert_refused(
        lambda: nns.profile(graph, params, images, baseline="layer"),
        "baseline", "channel", "position", "'layer'",
    )  # fmt: skip
    assert_refused(
        lambda: nns.slice_network(graph, params, profile, images, rule="largest"),
        "rule", "signed", "mass", "'largest'",
    )  # fmt: skip
    for call in (
        lambda: nns.slice_network(graph, params, profile, images, select="gpu"),
        lambda: nns.effective_path(graph, params, images, select="gpu"),
    ):
        assert_refused(call, "select", "auto", "host", "device", "'gpu'")


@pytest.mark.parametrize(
    "outputs, words",
    [
        ([0, 1, 2, 4], ["class", "below 4", r"0\.\.4"]),
        ([0, -1, 2, 3], ["class", "below 4", r"-1\.\.3"]),
        ([[0, 1], [1, 2], [2, 3], [3, 7]], ["class", "below 4", r"0\.\.7"]),
        ([0.0, 1.0, 2.0, 3.0], ["class indices", "float64"]),
        ([True, False, True, True], ["class indices", "bool"]),
        ([0, 1], ["outputs", "4 images", "not 2"]),
        (1, ["outputs", "class indices", r"\[N\]"]),
        (np.zeros((4, 1, 1), int), ["outputs", r"\(4, 1, 1\)"]),
        (["a", "b", "c", "d"], ["outputs", "class indices"]),
        (np.eye(4, k=-1, dtype=bool), ["outputs", "at least one", "all False"]),
    ],
    ids=[
        "too_large", "negative", "one_of_several", "floats", "bools", "too_few", "scalar",
        "three_axes", "texts", "all_false",
    ],
)  # fmt: skip
def test_criteria(outputs, words):
    graph, params, images, profile = setting()
    for call in (
        lambda: nns.slice_network(graph, params, profile, images, outputs),
        lambda: nns.effective_path(graph, params, images, outputs),
    ):
        assert_refused(call, "outputs", *words)


@pytest.mark.parametrize("count", [3, 5])
def test_criteria_of_a_stream(count):
    graph, params, images, profile = setting()
    parts = [images[:2], images[2:]]
    assert_refused(
        lambda: nns.slice_network(graph, params, profile, iter(parts), np.zeros(count, int)),
        "outputs", "images", f"not {count}",
    )  # fmt: skip


def test_profiles_of_other_models():
    graph, params, images, profile = setting()
    other = zoo.model("mlp")
    other_graph = nns.trace(other.apply, other.params, other.images(1))
    strange = nns.profile(other_graph, other.params, other.images(2))
    assert_refused(
        lambda: nns.slice_network(graph, params, strange, images), "profile", "another model"
    )
    means = {**profile.means, "Net/relu_0": np.zeros(3, np.float32)}
    odd = nns.Profile(means, "channel", 4, -1.0, 1.0)
    assert_refused(
        lambda: nns.slice_network(graph, params, odd, images), "profile", "Net/relu_0", r"\(3,\)"
    )


def test_checkpoints_of_samples_apart(tmp_path):
    graph, params, images, profile = setting()
    assert_refused(
        lambda: nns.slice_network(
            graph, params, profile, images, per_sample=True, checkpoint=tmp_path / "progress"
        ),
        "checkpoint", "per_sample",
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_models_without_logits():
    params = {"w": jnp.ones((3, 2))}
    images = np.ones((2, 4, 3), np.float32)
    graph = nns.trace(lambda p, x: x @ p["w"], params, images[:1])
    profile = nns.profile(graph, params, images)
    assert_refused(
        lambda: nns.slice_network(graph, params, profile, images),
        r"logits \[B, K\]", r"\('B', 4, 2\)|\[B, 4, 2\]",
    )  # fmt: skip


# Tracing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x, words",
    [
        (np.zeros((0, 3), np.float32), ["x", r"\(0, 3\)", "at least one"]),
        (np.float32(1.0), ["x", "batch"]),
        ([[1.0, 2.0, 3.0]], ["x", "list"]),
        (None, ["x", "None"]),
        (np.array([["a"]]), [r"\bx\b", "numbers", "<U1"]),
        (np.array([[None]]), [r"\bx\b", "numbers", "object"]),
    ],
    ids=["empty", "scalar", "list", "none", "texts", "objects"],
)
def test_samples_to_trace(x, words):
    params = {"w": jnp.ones((3, 2))}
    assert_refused(
        lambda: nns.trace(lambda p, x: x @ p["w"], params, x), *words, error=(ValueError, TypeError)
    )


class Waits(nn.Module):
    """Doubles until large: how often depends on the sample."""

    @nn.compact
    def __call__(self, x):
        return jax.lax.while_loop(lambda v: v.sum() < 10, lambda v: 2 * v, x)


class Branches(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x)


@pytest.mark.parametrize("module, name", [(Waits, "while"), (Branches, "cond")])
def test_control_flow_on_the_sample(module, name):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(module()(nn.Dense(3)(x)))

    images = jnp.ones((1, 3))
    params = jax.eval_shape(Net().init, jax.random.key(0), images)
    assert_refused(
        lambda: nns.trace(Net().apply, params, images),
        name, f"Net/{module.__name__}_0", "depends on the sample",
        error=nns.UnsupportedError,
    )  # fmt: skip


@pytest.mark.parametrize(
    "decide",
    [
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x * int(x.sum()),
        lambda x: x * float(x.sum()),
        lambda x: x + np.asarray(x),
    ],
)
def test_python_that_reads_the_samples_values(decide):
    params = {"w": jnp.ones((3, 2))}
    assert_refused(
        lambda: nns.trace(lambda p, x: decide(x @ p["w"]), params, np.ones((1, 3), np.float32)),
        "apply", "sample", error=nns.UnsupportedError,
    )  # fmt: skip


class Replaces(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x.at[:, 0].set(x[:, 1])


class Sums(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jax.lax.cumlogsumexp(x, axis=1)


@pytest.mark.parametrize("module, name", [(Replaces, "scatter"), (Sums, "cumlogsumexp")])
def test_operations_without_a_rule(module, name):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = module()(nn.Dense(3)(x))
            return nn.Dense(2)(x)

    images = np.array([[1.0, 3.0, 2.0]], np.float32)
    params = Net().init(jax.random.key(0), images)
    graph = nns.trace(Net().apply, params, images)  # it runs all the same
    np.testing.assert_allclose(
        nns.evaluate(graph, params, images)[0], Net().apply(params, images), rtol=1e-6
    )
    profile = nns.profile(graph, params, images)
    where = f"{name} at Net/{module.__name__}_0"
    assert_refused(
        lambda: nns.slice_network(graph, params, profile, images),
        "slicing", where, "named in nnslicer_jax/operations.py", error=nns.UnsupportedError,
    )  # fmt: skip
    assert_refused(
        lambda: nns.effective_path(graph, params, images),
        "effective path", where, "named in nnslicer_jax/operations.py", error=nns.UnsupportedError,
    )  # fmt: skip


def test_a_convolution_in_batch_groups():
    def apply(p, x):
        x = x.reshape(-1, 3, 1)
        layout = ("NWC", "WIO", "NWC")
        x = jax.lax.conv_general_dilated(
            x, p["kernel"], (1,), "VALID", dimension_numbers=layout, batch_group_count=2
        )
        return x.reshape(-1, 6)

    params, images = {"kernel": jnp.ones((1, 1, 2))}, np.ones((1, 6), np.float32)
    graph = nns.trace(apply, params, images)
    profile = nns.profile(graph, params, images)
    assert_refused(
        lambda: nns.slice_network(graph, params, profile, images),
        "conv_general_dilated", "batch_group_count", error=nns.UnsupportedError,
    )  # fmt: skip


# Evaluation -------------------------------------------------------------------------------


def test_evaluation():
    graph, params, images, _ = setting()

    def run(x=images, params=params, edits=None):
        return lambda: nns.evaluate(graph, params, x, edits)

    assert_refused(run(images[0]), "x", r"\[B, 8, 8, 1\]", r"\(8, 8, 1\)")
    assert_refused(run(images[:0]), "x", "empty", "at least one")
    assert_refused(run([1.0]), "x", "list")
    assert_refused(run(params={}), "params", "structure")
    assert_refused(run(edits={"Net/nothing": abs}), "Net/nothing", "neurons")
    assert_refused(
        run(edits={"Net/relu_0": lambda a: a[0]}),
        "Net/relu_0", r"\(8, 4\)", r"\(8, 8, 4\)", error=(ValueError, TypeError),
    )  # fmt: skip


# Slices -----------------------------------------------------------------------------------


def test_parts_of_slices():
    graph, params, images, profile = setting()
    piece = nns.slice_network(graph, params, profile, images, theta=0.0)
    each = nns.slice_network(graph, params, profile, images, theta=0.0, per_sample=True)
    for ratio in (-0.5, 1.5, 40, float("nan")):
        assert_refused(lambda ratio=ratio: piece.threshold(ratio), "ratio", r"0\.\.1", str(ratio))
    assert_refused(lambda: each.threshold(0.5), "per|sample")
    assert_refused(lambda: piece.sample(0), "per_sample")
    assert_refused(lambda: each.sample(4), "sample", "4")
    assert_refused(lambda: piece.similarity(piece, by="weights"), "by", "synapses", "'weights'")
    assert_refused(lambda: piece.size("Dense_9"), "Dense_9", error=(ValueError, KeyError))
    assert_refused(lambda: nns.load_slice("no/such/file"), "no/such/file", "not a file")
