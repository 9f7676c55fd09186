"""NNSlicer's slices against the naive oracle, on a small network of every layer kind."""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnslicer_jax as nns
from tests import nets
from tests.naive import slicing as naive

# Products with these are exact in float32, so that even a tie is decided alike.
BINARY = (0.0, 0.125, 0.25, 0.5, 1.0)
# Rounded to float32 these products are exact wherever the true ones are. Those with 0.3 are not:
# 0.3 * 6.25 comes out above 1.875.
DECIMAL = (0.1, 0.2)
# Closer than this to the other outcome, float32 may decide otherwise than float64.
MARGIN = 1e-6


class Prepared(NamedTuple):
    """A case traced and profiled, and what the oracle needs of it.

    Attributes:
      case: the network.
      graph: its trace.
      profile: its profile over four images.
      images: three other images.
      values: for each image, the value of every cell.
      means: the mean of every cell.
    """

    case: nets.Case
    graph: nns.Graph
    profile: nns.Profile
    images: np.ndarray
    values: list[np.ndarray]
    means: np.ndarray


@functools.cache
def exact(name: str, baseline: str) -> Prepared:
    """A case in whole numbers: the oracle computes every value itself."""
    case = nets.EXACT[name]()
    normal, images = case.images(4, seed=1), case.images(3, seed=2)
    graph = nns.trace(case.apply, case.params, images[:1])
    profile = nns.profile(graph, case.params, normal, baseline=baseline)
    values = [case.network.run(image) for image in images]
    return Prepared(case, graph, profile, images, values, case.network.means(normal, baseline))


@functools.cache
def recorded(name: str) -> Prepared:
    """A case in floating point: the oracle takes the recorded activations and means."""
    case = nets.INEXACT[name]()
    normal, images = case.images(5, seed=1), case.images(6, seed=2)
    graph = nns.trace(case.apply, case.params, images[:1])
    profile = nns.profile(graph, case.params, normal)
    activations = activations_of(graph, case.params, images)
    rows = [{k: v[i] for k, v in activations.items()} for i in range(len(images))]
    values = [case.network.gather(row) for row in rows]
    means = case.network.gather(spread(case, profile))
    return Prepared(case, graph, profile, images, values, means)


def activations_of(graph: nns.Graph, params, images) -> dict[str, np.ndarray]:
    """Every activation of every image."""
    record = jax.jit(lambda p, x: nns.evaluate(graph, p, x)[1])
    return {name: np.asarray(a) for name, a in record(params, images).items()}


def spread(case: nets.Case, profile: nns.Profile) -> dict[str, np.ndarray]:
    """The profile's means in the shapes of the activations."""
    means = {}
    for name, (layer, channel) in case.network.layers.items():
        mean = np.asarray(profile.means[name], np.float64)
        if mean.ndim == 1 and layer.ndim > 1:
            mean = mean.reshape([-1 if a == channel % layer.ndim else 1 for a in range(layer.ndim)])
        means[name] = np.broadcast_to(mean, layer.shape)
    return means


def top(prepared: Prepared, index: int) -> list[int]:
    """The class that the network predicts for one image."""
    return [int(np.argmax(prepared.values[index][prepared.case.network.output]))]


def answer(prepared: Prepared, index: int, theta: float, rule: str, outputs=None) -> naive.Answer:
    return naive.contributions(
        prepared.case.network,
        prepared.values[index],
        prepared.means,
        top(prepared, index) if outputs is None else outputs,
        theta,
        rule,
    )


def assert_same(piece: nns.Slice, expected: naive.Answer, row: int | None = None) -> None:
    """Every neuron and every synapse, to the last number; `row` picks one of several samples."""
    for ours, theirs in ((piece.neurons, expected.neurons), (piece.synapses, expected.synapses)):
        assert set(ours) == set(theirs)
        for name, array in theirs.items():
            got = np.asarray(ours[name] if row is None else ours[name][row])
            assert np.issubdtype(got.dtype, np.integer), name
            np.testing.assert_array_equal(got, array, err_msg=name)


def sliced(prepared: Prepared, theta: float, rule: str, **options) -> nns.Slice:
    return nns.slice_network(
        prepared.graph, prepared.case.params, prepared.profile, prepared.images,
        theta=theta, rule=rule, **options,
    )  # fmt: skip


# Figure 1 of the paper --------------------------------------------------------------------


@functools.cache
def figure_1() -> tuple[nns.Graph, dict, nns.Profile]:
    params = {
        "first": jnp.array([[3.0, -2.0, 0.0], [1.0, 2.0, 1.0]]),
        "second": jnp.array([[1.0, -1.0], [0.0, 3.0], [2.0, -2.0]]),
        "third": jnp.array([[2.0, 1.0], [1.0, 3.0]]),
    }

    def apply(p, x):
        return x @ p["first"] @ p["second"] @ p["third"]

    # A linear network has mean 0 everywhere over images that cancel.
    images = jnp.array([[1.0, 2.0], [-1.0, -2.0]])
    graph = nns.trace(apply, params, images[:1])
    return graph, params, nns.profile(graph, params, images)


FIGURE_1 = {
    0.3: {
        "input": [1, 2],
        "dot_general_0": [1, 0, 1],
        "dot_general_1": [1, 0],
        "dot_general_2": [1, 0],
        "first": [[1, 0, 0], [1, 0, 1]],
        "second": [[1, 0], [0, 0], [1, 0]],
        "third": [[1, 0], [0, 0]],
    },
    0.0: {
        "input": [-1, 1],
        "dot_general_0": [0, 1, 0],
        "dot_general_1": [1, -1],
        "dot_general_2": [1, 0],
        "first": [[0, -1, 0], [0, 1, 0]],
        "second": [[1, -1], [0, 1], [1, -1]],
        "third": [[1, 0], [-1, 0]],
    },
}


@pytest.mark.parametrize("theta", FIGURE_1)
def test_figure_1_of_the_paper(theta):
    graph, params, profile = figure_1()
    image = jnp.array([[1.0, 2.0]])
    logits, activations = nns.evaluate(graph, params, image)
    assert activations["dot_general_0"][0].tolist() == [5, 2, 2]
    assert activations["dot_general_1"][0].tolist() == [9, -3]
    assert logits[0].tolist() == [15, 0]
    assert not any(np.any(mean) for mean in profile.means.values())
    piece = nns.slice_network(graph, params, profile, image, outputs=[0], theta=theta)
    found = {**piece.neurons, **piece.synapses}
    assert {name: np.asarray(array).tolist() for name, array in found.items()} == FIGURE_1[theta]


def test_oracle_reproduces_figure_1():
    _, params, _ = figure_1()
    network = naive.Network((2,), nets.flat(params))
    x = network.contract(network.input, "first")
    network.contract(network.contract(x, "second"), "third")
    values = network.run(np.array([1.0, 2.0]))
    for theta, expected in FIGURE_1.items():
        found = naive.contributions(network, values, np.zeros_like(values), [0], theta)
        found = {**found.neurons, **found.synapses}
        assert {name: array.tolist() for name, array in found.items()} == expected


# Integer networks of every layer kind -----------------------------------------------------


@pytest.mark.parametrize("name", nets.EXACT)
def test_values_and_means_equal_the_oracle(name):
    for baseline in ("channel", "position"):
        prepared = exact(name, baseline)
        network = prepared.case.network
        neurons = prepared.graph.neurons()
        assert set(neurons) == set(network.layers)
        activations = activations_of(prepared.graph, prepared.case.params, prepared.images)
        means = spread(prepared.case, prepared.profile)
        for key, (layer, channel) in network.layers.items():
            assert neurons[key].shape == layer.shape, key
            assert layer.ndim == 0 or neurons[key].channel == channel % layer.ndim, key
            expected = np.stack([values[layer] for values in prepared.values])
            np.testing.assert_array_equal(activations[key], expected, err_msg=key)
            np.testing.assert_array_equal(means[key], prepared.means[layer], err_msg=key)


def compare(prepared: Prepared, rule: str, thetas: tuple[float, ...], select: str) -> None:
    """Compares every image at every theta."""
    for theta in thetas:
        pieces = sliced(prepared, theta, rule, per_sample=True, select=select)
        for row in range(len(prepared.images)):
            expected = answer(prepared, row, theta, rule)
            assert_same(pieces, expected, row)


@pytest.mark.parametrize("name", nets.EXACT)
def test_signed_slices_equal_the_oracle(name):
    prepared = exact(name, "channel")
    compare(prepared, "signed", BINARY + DECIMAL, "host")


@pytest.mark.parametrize("name", [n for n in nets.EXACT if n not in ("lenet", "resnet")])
def test_mass_slices_equal_the_oracle(name):
    prepared = exact(name, "position")
    compare(prepared, "mass", BINARY[1:] + DECIMAL, "device")


@pytest.mark.parametrize("name", ["conv_grouped", "difference", "matrix_products"])
def test_the_other_selectors_equal_the_oracle(name):
    compare(exact(name, "position"), "signed", BINARY[1:], "device")
    compare(exact(name, "channel"), "mass", BINARY[1:], "host")


@pytest.mark.parametrize("name", ["residual", "matrix_products", "moves"])
def test_set_of_images_is_the_signed_sum(name):
    prepared = exact(name, "channel")
    expected = naive.merged(answer(prepared, i, 0.25, "signed") for i in range(3))
    assert_same(sliced(prepared, 0.25, "signed"), expected)
    assert_same(sliced(prepared, 0.25, "signed", batch_size=2), expected)


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_chosen_outputs(name):
    prepared = exact(name, "channel")
    for outputs in ([2, 0, 0], [[0, 1], [2, 1], [0, 2]], np.array([[1], [1], [0]])):
        pieces = sliced(prepared, 0.25, "signed", outputs=outputs, per_sample=True)
        for row, chosen in enumerate(outputs):
            expected = answer(prepared, row, 0.25, "signed", np.atleast_1d(chosen).tolist())
            assert_same(pieces, expected, row)


def test_more_seeds():
    # One compiled slice serves many weights: all else stays, only numbers change.
    prepared = exact("lenet", "channel")
    shapes = prepared.case.params
    seen = set()
    for seed in range(1, 6):
        params = nets.fill(shapes, whole=True, seed=seed)
        case = nets.Case(prepared.case.apply, params, prepared.case.shape,
                         prepared.case.describe, whole=True)  # fmt: skip
        images = case.images(4, seed)
        profile = nns.profile(prepared.graph, params, images)
        means = case.network.means(images, "channel")
        pieces = nns.slice_network(
            prepared.graph, params, profile, images[:3], theta=0.25, per_sample=True
        )
        for row, image in enumerate(images[:3]):
            values = case.network.run(image)
            chosen = [int(np.argmax(values[case.network.output]))]
            expected = naive.contributions(case.network, values, means, chosen, 0.25)
            assert_same(pieces, expected, row)
            seen.add(sum(np.count_nonzero(a) for a in expected.synapses.values()))
    assert len(seen) > 5 and min(seen) > 0


# Embeddings -------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [0.0, 0.25])
def test_an_embedding_counts_for_the_rows_looked_up(theta):
    def tail(p, x):
        return nn.relu(x @ p["first"]).reshape(-1, 16) @ p["second"]

    def describe(n):
        n.contract(n.relu(n.contract(n.input, "first")).ravel(), "second")

    shapes = {"first": (3, 4), "second": (16, 3)}
    case = nets.plain_case(tail, shapes, describe, (4, 3))
    rng = np.random.default_rng(0)
    table = rng.integers(-2, 3, (7, 3)).astype(np.float32)
    tokens = rng.integers(0, 7, (8, 4)).astype(np.int32)
    params = {**case.params, "table": jnp.asarray(table)}
    graph = nns.trace(lambda p, x: tail(p, jnp.take(p["table"], x, axis=0)), params, tokens[:1])
    profile = nns.profile(graph, params, tokens)
    found = nns.slice_network(graph, params, profile, tokens[:3], theta=theta, per_sample=True)
    # To the oracle the rows that were looked up are the sample.
    network, means = case.network, case.network.means(table[tokens], "channel")
    for row, sample in enumerate(tokens[:3]):
        values = network.run(table[sample])
        chosen = [int(np.argmax(values[network.output]))]
        expected = naive.contributions(network, values, means, chosen, theta)
        rows = np.zeros((7, 3), int)
        np.add.at(rows, sample, expected.neurons["input"])
        assert np.any(rows)
        np.testing.assert_array_equal(found.synapses["table"][row], rows)
        np.testing.assert_array_equal(found.neurons["gather"][row], expected.neurons["input"])
        for name in shapes:
            np.testing.assert_array_equal(found.synapses[name][row], expected.synapses[name])


# Masks ------------------------------------------------------------------------------------


def masked_attention(lowest: float, added: bool):
    """Causal attention in which each position reads those before it."""
    causal = np.tril(np.ones((4, 4), bool))[None]

    def apply(p, x):
        query, key, value = (x @ p[name] for name in ("query", "key", "value"))
        scores = query @ key.swapaxes(1, 2)
        if added:
            scores = scores + np.where(causal, 0, np.float32(lowest))
        else:
            scores = jnp.where(causal, scores, lowest)
        return (nn.softmax(scores) @ value).reshape(-1, 8) @ p["out"]

    return apply


@pytest.mark.parametrize("baseline", ["channel", "position"])
@pytest.mark.parametrize("added", [False, True])
def test_a_mask_of_minus_infinity_is_the_lowest_number(added, baseline):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, 4, 3)).astype(np.float32)
    shapes = {"query": (3, 2), "key": (3, 2), "value": (3, 2), "out": (8, 3)}
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    pieces = []
    for lowest in (-np.inf, np.finfo(np.float32).min):
        graph = nns.trace(masked_attention(lowest, added), params, images[:1])
        logits, _ = nns.evaluate(graph, params, jnp.asarray(images))
        np.testing.assert_allclose(
            logits, masked_attention(lowest, added)(params, jnp.asarray(images)), rtol=1e-5
        )
        profile = nns.profile(graph, params, images, baseline=baseline)
        assert all(np.isfinite(mean).all() for mean in profile.means.values())
        piece = nns.slice_network(graph, params, profile, images, theta=0.1)
        pieces.append((piece, nns.effective_path(graph, params, images)))
    for found, expected in zip(*pieces, strict=True):
        assert all(np.any(contrib) for contrib in expected.synapses.values())
        for ours, theirs in (
            (found.synapses, expected.synapses),
            (found.neurons, expected.neurons),
        ):
            assert set(ours) == set(theirs)
            for key, contrib in theirs.items():
                np.testing.assert_array_equal(ours[key], contrib, err_msg=key)


# Data moved to where the sample says --------------------------------------------------------


def ordered(x):
    yield jnp.sort(x, axis=1)
    yield jnp.sort(x, axis=1, descending=True)
    yield jax.lax.top_k(x, 4)[0]
    yield jnp.take_along_axis(x, jnp.argsort(-x, axis=1), axis=1)
    yield jax.lax.sort((jnp.square(x - 1), x), dimension=1, num_keys=1)[1]


def test_sorted_data_moves_by_the_order_of_the_sample():
    rng = np.random.default_rng(0)
    images = rng.integers(-3, 4, (6, 3)).astype(np.float32)
    shapes = {"first": (3, 6), "second": (28, 3)}
    params = {k: jnp.asarray(rng.integers(-2, 3, s), jnp.float32) for k, s in shapes.items()}
    # The fraction tells equal numbers apart, and says where each came from.
    place = jnp.arange(6.0)[None] / 64

    def hidden(p, x):
        return x @ p["first"] + place

    def sorts(p, x):
        return jnp.concatenate(list(ordered(hidden(p, x))), axis=1) @ p["second"]

    graph = nns.trace(sorts, params, images[:1])
    profile = nns.profile(graph, params, images)
    orders = np.concatenate(list(ordered(hidden(params, images))), axis=1) % 1 * 64
    for image, order in zip(images[:2, None], orders.astype(int), strict=False):

        def moves(p, x, order=order):
            return hidden(p, x)[:, order] @ p["second"]

        moved = nns.trace(moves, params, image)
        means = {key: profile.means[key] for key in moved.neurons()}
        known = dataclasses.replace(profile, means=means)
        for found, expected in (
            (
                nns.slice_network(graph, params, profile, image, theta=0.25),
                nns.slice_network(moved, params, known, image, theta=0.25),
            ),
            (nns.effective_path(graph, params, image), nns.effective_path(moved, params, image)),
        ):
            for key, contrib in expected.synapses.items():
                np.testing.assert_array_equal(found.synapses[key], contrib, err_msg=key)
            for key, contrib in expected.neurons.items():
                np.testing.assert_array_equal(found.neurons[key], contrib, err_msg=key)


# Weights made of parameters ---------------------------------------------------------------


def slice_of(apply, params, images, outputs=None) -> nns.Slice:
    graph = nns.trace(apply, params, images[:1])
    profile = nns.profile(graph, params, images)
    return nns.slice_network(graph, params, profile, images, outputs, theta=0.25)


def standardised(w):
    return (w - w.mean(0, keepdims=True)) / jnp.sqrt(jnp.var(w, 0, keepdims=True) + 1.0)


MADE = {
    "tanh": jnp.tanh, "exp": jnp.exp, "abs": jnp.abs, "sign": jnp.sign, "square": jnp.square,
    "round": jnp.round, "sin": jnp.sin, "sigmoid": nn.sigmoid, "softplus": nn.softplus,
    "silu": nn.silu, "elu": nn.elu, "leaky_relu": nn.leaky_relu, "gelu": nn.gelu, "relu": nn.relu,
    "cube": lambda w: w**3, "product": lambda w: w * w, "gated": lambda w: w * jnp.tanh(w),
    "reciprocal": lambda w: 1 / (4 * w + 1), "where": lambda w: jnp.where(w > 0, 2 * w, 0.0),
    "maximum": lambda w: jnp.maximum(w, -1.0), "clip": lambda w: jnp.clip(w, -1, 1),
    "arctan2": lambda w: jnp.arctan2(w, 2.0), "remainder": lambda w: jnp.fmod(w, 2.0),
    "normalised": lambda w: w / jnp.linalg.norm(w, axis=0)[None], "standardised": standardised,
    "jitted": jax.jit(jnp.tanh), "rematerialised": jax.checkpoint(jnp.tanh),
    "moved": lambda w: jnp.tanh(w.T).T,
}  # fmt: skip


def test_counts_reach_what_a_weight_was_made_of():
    rng = np.random.default_rng(0)
    images = rng.integers(-3, 4, (4, 5)).astype(np.float32)
    params = {name: jnp.asarray(rng.integers(-2, 3, (5, 3)), jnp.float32) for name in MADE}
    weights = jax.jit(lambda p: {name: MADE[name](w) for name, w in p.items()})(params)
    outputs = np.tile(np.arange(3 * len(MADE)), (4, 1))

    def products(p, x):
        return jnp.concatenate([x @ w for w in p.values()], axis=1)

    def made(p, x):
        return products({name: MADE[name](w) for name, w in p.items()}, x)

    expected = slice_of(products, weights, images, outputs)
    found = slice_of(made, params, images, outputs)
    assert set(found.synapses) == set(MADE)
    for name, contrib in expected.synapses.items():
        assert np.any(contrib), name
        # Some use a parameter several times.
        uses = np.unique(found.synapses[name][contrib != 0] / contrib[contrib != 0])
        assert uses.size == 1 and uses[0] in range(1, 9), name
        np.testing.assert_array_equal(found.synapses[name], uses[0] * contrib, err_msg=name)


def test_uses_of_a_parameter_in_several_places_add_up():
    rng = np.random.default_rng(0)
    images = rng.integers(-3, 4, (4, 4)).astype(np.float32)
    w = jnp.asarray(rng.integers(-2, 3, (4, 4)), jnp.float32)
    column = jnp.asarray(rng.integers(1, 3, (4, 2)), jnp.float32)
    made = {
        "symmetric": (lambda w: jnp.triu(w) + jnp.triu(w, 1).T, w),
        "turned": (lambda w: jnp.triu(w, 1).T + jnp.triu(w), w),
        "rolled": (lambda w: w + jnp.roll(w, 1, 0), w),
        "centred": (lambda w: jnp.broadcast_to(w.mean(0, keepdims=True), w.shape) - w, w),
        "outer": (lambda w: jnp.outer(w.sum(1), jnp.ones(2)) * w, column),
    }
    back = {
        "symmetric": lambda c: np.triu(c) + np.triu(c.T, 1),
        "turned": lambda c: np.triu(c) + np.triu(c.T, 1),
        "rolled": lambda c: c + np.roll(c, -1, 0),
        "centred": lambda c: c,
        "outer": lambda c: c,
    }
    for name, (weight, parameter) in made.items():
        expected = slice_of(lambda p, x: x @ p["w"], {"w": weight(parameter)}, images)
        found = slice_of(lambda p, x, weight=weight: x @ weight(p["w"]), {"w": parameter}, images)
        np.testing.assert_array_equal(
            found.synapses["w"], back[name](expected.synapses["w"]), err_msg=name
        )


def test_an_order_is_a_number_of_its_own():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, 5)).astype(np.float32)
    params = {"w": (5, 6), "b": (6, 3)}
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in params.items()}
    for order in (lambda h: jnp.argsort(h), lambda h: jax.lax.top_k(h, 6)[1]):
        found = slice_of(
            lambda p, x, order=order: order(x @ p["w"]).astype(jnp.float32) @ p["b"], params, images
        )
        # Which place a number takes is a decision: it leads no further back.
        assert np.any(found.synapses["b"]) and not np.any(found.synapses.get("w", 0))


def test_counts_reach_each_parameter_of_the_weights_shape():
    rng = np.random.default_rng(0)
    images = rng.integers(-3, 4, (4, 5)).astype(np.float32)
    mask, bias = np.eye(5, 3, dtype=np.float32), np.float32(1)
    shapes = {"w": (5, 3), "score": (5, 3), "left": (5, 2), "right": (2, 3), "scale": (1, 3)}
    params = {k: jnp.asarray(rng.integers(1, 4, s), jnp.float32) for k, s in shapes.items()}

    def names(weights) -> set[str]:
        expected = slice_of(lambda w, x: x @ w["w"], {"w": weights(params)}, images)
        found = slice_of(lambda p, x: x @ weights(p), params, images)
        for contrib in found.synapses.values():
            np.testing.assert_array_equal(contrib, expected.synapses["w"])
        return set(found.synapses)

    assert names(lambda p: p["w"] * jnp.tanh(p["score"])) == {"w", "score"}
    assert names(lambda p: (p["score"] > 1).astype(jnp.float32) * p["w"]) == {"w"}
    with pytest.warns(UserWarning, match="no synapses of left, right: dot_general at the top"):
        assert names(lambda p: p["w"] + p["left"] @ p["right"]) == {"w"}
    assert names(lambda p: jnp.abs(p["scale"] * p["w"] * mask + bias)) == {"w"}
    with pytest.warns(UserWarning, match="no synapses of left, right: dot_general") as caught:
        assert names(lambda p: p["left"] @ p["right"]) == set()
    # Once, and not for each batch.
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    with pytest.warns(UserWarning, match="no synapses of score: cumsum"):
        assert names(lambda p: p["w"] * jnp.cumsum(p["score"], 0)) == {"w"}
    # A constant is no synapse, whatever was done to it.
    assert names(lambda p: jnp.cumsum(mask @ mask.T, 0)[:, :3]) == set()


def test_statistics_are_no_synapses():
    images = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    shape = {"mean": (5,), "var": (5,), "gain": (5,), "out": (5, 3)}
    params = {name: jnp.ones(s) for name, s in shape.items()}

    def norms(p, x):
        x = x - p["mean"][None]
        yield x * jax.lax.rsqrt(p["var"] + 1e-5)[None] * p["gain"][None]
        yield x / jnp.sqrt(p["var"] + 1e-5)[None] * p["gain"][None]
        yield x * (p["gain"] * (p["var"] + 1e-5) ** -0.5)[None]

    for i in range(3):
        found = slice_of(lambda p, x, i=i: list(norms(p, x))[i] @ p["out"], params, images)
        assert set(found.synapses) == {"gain", "out"}


# Networks of floating point ---------------------------------------------------------------


@pytest.mark.parametrize("name", nets.INEXACT)
def test_oracle_describes_the_network(name):
    prepared = recorded(name)
    network = prepared.case.network
    assert set(prepared.graph.neurons()) == set(network.layers)
    normal = prepared.case.images(5, seed=1)
    for image, values in zip(prepared.images, prepared.values, strict=True):
        np.testing.assert_allclose(network.run(image), values, rtol=1e-4, atol=1e-5)
    means = network.means(normal, prepared.profile.baseline)
    np.testing.assert_allclose(means, prepared.means, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", nets.INEXACT)
def test_recorded_slices_equal_the_oracle(name):
    prepared = recorded(name)
    compared = skipped = 0
    # Recurrent networks take long to compile, and a theta of 0 compiles anew.
    for theta in (0.1, 0.3, 0.5) if name in ("gru", "lstm") else (0.0, 0.1, 0.3, 0.5):
        pieces = sliced(prepared, theta, "signed", per_sample=True)
        for row in range(len(prepared.images)):
            expected = answer(prepared, row, theta, "signed")
            if expected.margin < MARGIN:
                skipped += 1
                continue
            compared += 1
            assert_same(pieces, expected, row)
    assert compared > 9 * skipped
