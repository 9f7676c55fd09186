"""A slice as a network that runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnslicer_jax as nns
from tests import nets, zoo


@functools.cache
def traced(name: str):
    model = zoo.model(name)
    graph = nns.trace(model.apply, model.params, model.images(1))
    images = model.images(16)
    return model, graph, images, nns.profile(graph, model.params, images)


def everything(graph: nns.Graph, params) -> nns.Slice:
    """A slice that holds the whole network."""
    return nns.Slice(
        {name: np.ones(graph.values[i].shape, int) for name, i in graph.params.items()},
        {name: np.ones(n.shape, int) for name, n in graph.neurons().items()},
        {name: n.channel for name, n in graph.neurons().items()},
        count=1,
    )


def outputs(graph, masked, images):
    return nns.evaluate(graph, masked.params, images, masked.edits)


@pytest.mark.parametrize("fill", ["mean", "zero"])
@pytest.mark.parametrize("name", ["lenet", "attention"])
def test_the_whole_network_is_itself(name, fill):
    model, graph, images, profile = traced(name)
    masked = nns.mask_network(graph, model.params, everything(graph, model.params), fill, profile)
    for one, other in zip(
        jax.tree.leaves(masked.params), jax.tree.leaves(model.params), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    found, _ = outputs(graph, masked, images)
    np.testing.assert_allclose(found, model.apply(model.params, images), rtol=1e-4, atol=1e-5)
    assert nns.agreement(graph, model.params, masked, images, batch_size=5) == 1.0


@pytest.mark.parametrize("fill", ["mean", "zero"])
@pytest.mark.parametrize("name", ["mlp", "lenet"])
def test_weights_outside_are_0_and_neurons_outside_stand_still(name, fill):
    model, graph, images, profile = traced(name)
    piece = nns.slice_network(graph, model.params, profile, images[:2], theta=0.5)
    masked = nns.mask_network(graph, model.params, piece, fill, profile)
    paths = dict(nets.flat(masked.params))
    for key, contrib in piece.synapses.items():
        before = nets.flat(model.params)[key]
        np.testing.assert_array_equal(paths[key], np.where(contrib != 0, before, 0))
    assert any(np.any(c == 0) for c in piece.synapses.values())
    _, activations = outputs(graph, masked, images)
    gone = 0
    for key, contrib in piece.neurons.items():
        if key == "input" or graph.neurons()[key].value >= graph.logits:
            continue
        positions = tuple(a for a in range(contrib.ndim) if a != piece.axes[key])
        inside = np.any(contrib != 0, axis=positions)
        still = np.moveaxis(np.asarray(activations[key]), piece.axes[key] + 1, -1)[..., ~inside]
        mean = profile.means[key][~inside] if fill == "mean" else 0.0
        np.testing.assert_allclose(still, np.broadcast_to(mean, still.shape), rtol=1e-6)
        gone += (~inside).sum()
    assert gone > 0


@pytest.mark.parametrize("fill", ["mean", "zero"])
def test_what_divides_stays(fill):
    case = nets.EXACT["divided_by_parameter"]()
    images = case.images(8)
    graph = nns.trace(case.apply, case.params, images[:1])
    profile = nns.profile(graph, case.params, images)
    piece = nns.slice_network(graph, case.params, profile, images[:1], theta=0.5)
    masked = nns.mask_network(graph, case.params, piece, fill, profile)
    for name, parameter in case.params.items():
        weighs = parameter.ndim > 1
        assert np.any(piece.synapses[name] == 0)
        np.testing.assert_array_equal(
            masked.params[name], np.where((piece.synapses[name] != 0) | (not weighs), parameter, 0)
        )
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(outputs(graph, masked, images)))


@pytest.mark.parametrize("fill", ["mean", "zero"])
def test_what_0_does_not_remove_stays(fill):
    rng = np.random.default_rng(0)

    def apply(p, x):
        x = jax.nn.relu(x @ jnp.exp(p["exponent"])) * (1 + p["scale"])[None]
        x = x @ (p["direction"] / jnp.linalg.norm(p["direction"], axis=0, keepdims=True))
        return x @ jnp.tanh(p["squashed"])

    shapes = {"exponent": (5, 6), "scale": (6,), "direction": (6, 4), "squashed": (4, 3)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    images = rng.normal(size=(9, 5)).astype(np.float32)
    graph = nns.trace(apply, params, images[:1])
    profile = nns.profile(graph, params, images)
    piece = nns.slice_network(graph, params, profile, images[:1], theta=0.5)
    masked = nns.mask_network(graph, params, piece, fill, profile)
    for name in ("exponent", "scale"):
        np.testing.assert_array_equal(masked.params[name], params[name])
    for name in ("direction", "squashed"):
        inside = piece.synapses[name] != 0
        assert not inside.all()
        np.testing.assert_array_equal(masked.params[name], np.where(inside, params[name], 0))


@pytest.mark.parametrize("fill, theta", [("mean", 0.1), ("mean", 0.9), ("zero", 0.1)])
def test_masks_of_minus_infinity_leave_numbers(fill, theta):
    rng = np.random.default_rng(0)

    def apply(p, x):
        scores = jnp.einsum("bqc,bkc->bqk", x @ p["query"], x @ p["key"])
        scores = scores + jnp.where(np.tri(4, dtype=bool), 0, -jnp.inf)[None]
        return (jax.nn.softmax(scores) @ (x @ p["value"])).mean(1)

    params = {k: rng.normal(size=(3, 3)).astype(np.float32) for k in ("query", "key", "value")}
    images = rng.normal(size=(6, 4, 3)).astype(np.float32)
    graph = nns.trace(apply, params, images[:1])
    profile = nns.profile(graph, params, images)
    piece = nns.slice_network(graph, params, profile, images[:1], theta=theta)
    masked = nns.mask_network(graph, params, piece, fill, profile)
    assert np.isfinite(outputs(graph, masked, images)[0]).all()


def test_a_network_reduced_to_no_numbers_agrees_with_none():
    def apply(p, x):
        return x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True))

    params = {"w": np.ones((3, 2), np.float32)}
    images = np.ones((2, 3), np.float32)
    graph = nns.trace(apply, params, images[:1])
    piece = everything(graph, params)
    piece.synapses["w"][:, 0] = 0
    masked = nns.mask_network(graph, params, piece, "zero")
    with pytest.raises(ValueError, match="not finite"):
        nns.agreement(graph, params, masked, images)


def test_removing_nothing_but_a_channel_equals_pruning_it():
    model, graph, images, profile = traced("lenet")
    piece = everything(graph, model.params)
    for key in ("Net/Conv_0/conv_general_dilated", "Net/Conv_0/add", "Net/relu_0"):
        piece.neurons[key][..., 1] = 0
    piece.neurons["Net/reduce_window_max"][..., 1] = 0
    masked = nns.mask_network(graph, model.params, piece, "zero")
    found, _ = outputs(graph, masked, images)
    params = jax.tree.map(lambda a: a, model.params)
    layers = params["params"]
    layers["Conv_1"] = {**layers["Conv_1"], "kernel": layers["Conv_1"]["kernel"].at[:, :, 1].set(0)}
    np.testing.assert_allclose(found, model.apply(params, images), rtol=1e-4, atol=1e-5)


def test_means_in_place_of_lost_terms_keep_the_mean():
    # In a linear network the mean output stays where every lost term is held at its mean.
    def apply(p, x):
        return (x @ p["first"]) @ p["second"]

    case = zoo.of_function(apply, {"first": (6, 8), "second": (8, 4)}, (6,))
    graph = nns.trace(case.apply, case.params, case.images(1))
    images = 3.0 + case.images(64)
    profile = nns.profile(graph, case.params, images)
    piece = nns.slice_network(graph, case.params, profile, images[:1], theta=0.5)
    assert 0 < piece.size()[0] < piece.size()[1]
    means = {}
    for fill in ("mean", "zero"):
        masked = nns.mask_network(graph, case.params, piece, fill, profile)
        means[fill] = np.asarray(outputs(graph, masked, images)[0]).mean(0)
    whole = np.asarray(case.apply(case.params, images)).mean(0)
    np.testing.assert_allclose(means["mean"], whole, rtol=1e-4, atol=1e-4)
    assert np.abs(means["zero"] - whole).max() > 0.1


def test_agreement_is_the_share_of_equal_classes():
    model, graph, images, profile = traced("lenet")
    piece = nns.slice_network(graph, model.params, profile, images[:2], theta=0.5)
    masked = nns.mask_network(graph, model.params, piece, "zero")
    found, _ = outputs(graph, masked, images)
    same = np.argmax(found, -1) == np.argmax(model.apply(model.params, images), -1)
    for source, size in ((images, 256), (images, 5), (iter([images[:3], images[3:]]), 4)):
        share = nns.agreement(graph, model.params, masked, source, batch_size=size)
        assert share == np.mean(same)


def test_a_reduced_network_is_a_pytree():
    model, graph, images, profile = traced("mlp")
    piece = nns.slice_network(graph, model.params, profile, images[:2])
    masked = nns.mask_network(graph, model.params, piece, "mean", profile)
    run = jax.jit(lambda masked, x: outputs(graph, masked, x)[0])
    np.testing.assert_allclose(
        run(masked, images), outputs(graph, masked, images)[0], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "options, words",
    [
        ({"fill": "median"}, "fill must be one of mean, zero, not 'median'"),
        ({"fill": "mean"}, "profile"),
    ],
)
def test_what_cannot_be_masked_is_refused(options, words):
    model, graph, images, profile = traced("mlp")
    piece = nns.slice_network(graph, model.params, profile, images[:2])
    with pytest.raises(ValueError, match=words) as caught:
        nns.mask_network(graph, model.params, piece, **options)
    assert "\n" not in str(caught.value)


def test_slices_of_other_networks_are_refused():
    model, graph, images, profile = traced("mlp")
    each = nns.slice_network(graph, model.params, profile, images[:2], per_sample=True)
    with pytest.raises(ValueError, match="sample"):
        nns.mask_network(graph, model.params, each, "zero")
    other, other_graph, other_images, other_profile = traced("lenet")
    piece = nns.slice_network(other_graph, other.params, other_profile, other_images[:2])
    with pytest.raises(ValueError, match="another network"):
        nns.mask_network(graph, model.params, piece, "zero")
