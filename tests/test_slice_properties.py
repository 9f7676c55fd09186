"""What must hold of any slice, whatever the weights, images and thetas.

Weights and images are whole numbers where two ways of computing must agree to the last digit.
"""

import functools

import flax.linen as nn
import hypothesis as hp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnslicer_jax as nns
from tests import nets
from tests.kept import WAYS
from tests.naive import slicing as naive

SETTINGS = hp.settings(max_examples=25, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**31 - 1)
THETAS = st.sampled_from([0.125, 0.25, 0.5, 0.75, 1.0])


@functools.cache
def traced(name: str) -> tuple[nets.Case, nns.Graph]:
    case = nets.EXACT[name]()
    return case, nns.trace(case.apply, case.params, case.images(1))


def piece(graph: nns.Graph, params, images, profile=None, **options) -> nns.Slice:
    profile = profile or nns.profile(graph, params, images)
    return nns.slice_network(graph, params, profile, images, **options)


def assert_equal(one: nns.Slice, other: nns.Slice) -> None:
    for ours, theirs in ((one.neurons, other.neurons), (one.synapses, other.synapses)):
        assert set(ours) == set(theirs)
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def equal(one: nns.Slice, other: nns.Slice) -> bool:
    """Whether two slices hold the same numbers."""
    try:
        assert_equal(one, other)
    except AssertionError:
        return False
    return True


# The terms of one sum ---------------------------------------------------------------------


def whole_terms(count: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(-9, 9), min_size=count, max_size=count)


# Few terms are compared pair by pair, many are sorted.
@pytest.mark.parametrize("count", [1, 5, 16, 17, 40])
@pytest.mark.parametrize("rule, where", WAYS)
def test_kept_terms_equal_the_oracle(rule, where, count):
    @hp.given(st.lists(whole_terms(count), min_size=3, max_size=3),
              st.sampled_from([0.125, 0.25, 0.5, 0.75, 1.0]))  # fmt: skip
    @SETTINGS
    def check(rows, theta):
        found = np.asarray(where(np.array(rows, np.float32), rule, theta))
        for row, stay in zip(rows, found, strict=True):
            terms = [float(t) for t in row]
            if rule == "largest":
                expected, _ = naive.effective(terms, theta)
            else:
                expected, _ = naive.significant(terms, theta, rule)
            assert stay.tolist() == expected, terms

    check()


def _many_terms(seed: int, count: int) -> np.ndarray:
    """Rows of whole numbers: many ties, few ties, mostly 0, nearly cancelling, all negative."""
    rng = np.random.default_rng(seed)
    few, most = rng.integers(-5, 6, count), rng.integers(-5000, 5001, count)
    sparse = np.where(rng.random(count) < 0.9, 0, few)
    half = rng.integers(-99, 100, count // 2)
    cancelling = rng.permutation(np.concatenate([half, -half, [1] * (count % 2)]))
    return np.array([few, most, sparse, cancelling, -np.abs(few)], np.float32)


@pytest.mark.parametrize("count", [255, 256, 777])
@pytest.mark.parametrize("rule, where", WAYS)
def test_many_kept_terms_equal_the_oracle(rule, where, count):
    for seed in range(4):
        rows = _many_terms(seed, count)
        for theta in (0.125, 0.5, 0.875, 1.0):
            found = np.asarray(where(rows, rule, theta))
            for row, stay in zip(rows, found, strict=True):
                terms = row.tolist()
                if rule == "largest":
                    expected, _ = naive.effective(terms, theta)
                else:
                    expected, _ = naive.significant(terms, theta, rule)
                assert stay.tolist() == expected, (seed, theta)


@pytest.mark.parametrize("rule, where", [way for way in WAYS if way[0] != "largest"])
def test_kept_terms_are_nested_in_theta(rule, where):
    numbers = st.floats(-100, 100, width=32, allow_subnormal=False)

    @hp.given(st.lists(numbers, min_size=20, max_size=20), st.lists(
        st.floats(0.0009765625, 1, width=32), min_size=4, max_size=4))  # fmt: skip
    @SETTINGS
    def check(terms, thetas):
        terms = np.array([terms], np.float32)
        before = terms != 0  # what theta = 0 keeps
        for theta in sorted(thetas):
            now = np.asarray(where(terms, rule, theta))
            assert not (now & ~before).any()
            before = now

    check()


@functools.cache
def one_sum(rule: str):
    """The graph of a sum of twelve products, and a profile whose means are 0."""
    params = {"weights": jnp.zeros((12, 1))}
    ones = np.ones((1, 12), np.float32)
    graph = nns.trace(lambda p, x: x @ p["weights"], params, ones)
    return graph, nns.profile(graph, params, np.concatenate([ones, -ones]))


@hp.given(whole_terms(12), st.sampled_from(["signed", "mass"]))
@SETTINGS
def test_synapses_of_one_activation_are_nested_in_theta(terms, rule):
    graph, profile = one_sum(rule)
    params = {"weights": jnp.array(terms, jnp.float32)[:, None]}
    ones = np.ones((1, 12), np.float32)
    before = np.array(terms) != 0 if sum(terms) else np.zeros(12, bool)
    for theta in (0.0, 0.25, 0.5, 1.0):
        found = nns.slice_network(graph, params, profile, ones, theta=theta, rule=rule)
        now = found.synapses["weights"][:, 0] != 0
        assert not (now & ~before).any()
        if theta == 0:
            assert (now == before).all()
        before = now


@hp.given(SEEDS)
@SETTINGS
def test_theta_0_keeps_every_edge(seed):
    # With one layer every edge shows: CONTRIB of a weight is the sign of its local contribution.
    rng = np.random.default_rng(seed)
    graph = linear_graph()
    weights = rng.integers(-2, 3, (6, 4)).astype(np.float32)
    images = rng.integers(-3, 4, (4, 6)).astype(np.float32)
    params = {"weights": jnp.asarray(weights)}
    found = piece(graph, params, images, outputs=[0, 1, 2, 3], theta=0.0, per_sample=True)
    delta = images - images.mean(0)
    for row in range(4):
        out = delta[row] @ weights[:, row]
        expected = np.zeros((6, 4))
        expected[:, row] = np.sign(out) * np.sign(weights[:, row]) * np.sign(delta[row])
        np.testing.assert_array_equal(found.synapses["weights"][row], expected)
        np.testing.assert_array_equal(found.neurons["input"][row], expected.sum(1))


@functools.cache
def linear_graph() -> nns.Graph:
    params = {"weights": jnp.zeros((6, 4))}
    return nns.trace(lambda p, x: x @ p["weights"], params, np.zeros((1, 6), np.float32))


# Symmetries of the network ----------------------------------------------------------------


@hp.given(SEEDS, st.permutations(range(8)), THETAS)
@SETTINGS
def test_permuting_hidden_units_permutes_contrib(seed, order, theta):
    case, graph = traced("plain_mlp")
    params = nets.fill(case.params, whole=True, seed=seed)
    order = np.array(order)
    shuffled = {
        "first": params["first"][:, order],
        "offset": params["offset"][order],
        "second": params["second"][order],
    }
    images = case.images(4, seed)
    one = piece(graph, params, images, theta=theta)
    other = piece(graph, shuffled, images, theta=theta)
    for name in ("dot_general_0", "add", "max"):
        np.testing.assert_array_equal(one.neurons[name][order], other.neurons[name])
    for name in ("input", "dot_general_1"):
        np.testing.assert_array_equal(one.neurons[name], other.neurons[name])
    np.testing.assert_array_equal(one.synapses["first"][:, order], other.synapses["first"])
    np.testing.assert_array_equal(one.synapses["second"][order], other.synapses["second"])


@hp.given(SEEDS, st.permutations(range(3)), THETAS)
@SETTINGS
def test_permuting_channels_permutes_contrib(seed, order, theta):
    case, graph = traced("residual")
    params = nets.fill(case.params, whole=True, seed=seed)
    order = np.array(order)
    layers = dict(params["params"])
    layers["Conv_0"] = {k: v[..., order] for k, v in layers["Conv_0"].items()}
    layers["Conv_1"] = {**layers["Conv_1"], "kernel": layers["Conv_1"]["kernel"][:, :, order]}
    images = case.images(4, seed)
    one = piece(graph, params, images, theta=theta)
    other = piece(graph, {"params": layers}, images, theta=theta)
    kernel = one.synapses["params/Conv_0/kernel"]
    np.testing.assert_array_equal(kernel[..., order], other.synapses["params/Conv_0/kernel"])
    kernel = one.synapses["params/Conv_1/kernel"]
    np.testing.assert_array_equal(kernel[:, :, order], other.synapses["params/Conv_1/kernel"])
    ours, theirs = one.channels(), other.channels()
    for name in ours:
        first = name.startswith("Net/Conv_0") or name == "Net/relu_0"
        np.testing.assert_array_equal(ours[name][order] if first else ours[name], theirs[name])


def _two_views(one, other, shape):
    """Two models of one function, traced."""
    images = jnp.zeros((1, *shape))
    graphs = []
    for body in (one, other):
        module = nets.Net(body)
        params = jax.eval_shape(module.init, jax.random.key(0), images)
        params = jax.tree.map(lambda a: jnp.zeros(a.shape), params)
        graphs.append((nns.trace(module.apply, params, images), params))
    return graphs


@functools.cache
def dense_and_convolution():
    def dense(x):
        x = nn.relu(nn.Dense(4)(x))
        return nn.Dense(3)(x).sum(axis=(1, 2))

    def convolution(x):
        x = nn.relu(nn.Conv(4, (1, 1))(x))
        return nn.Conv(3, (1, 1))(x).sum(axis=(1, 2))

    return _two_views(dense, convolution, (2, 2, 3))


@hp.given(SEEDS, THETAS)
@SETTINGS
def test_dense_equals_1x1_convolution(seed, theta):
    (dense, shapes), (convolution, _) = dense_and_convolution()
    params = nets.fill(shapes, whole=True, seed=seed)
    images = np.random.default_rng(seed).integers(-3, 4, (4, 2, 2, 3)).astype(np.float32)
    same = {
        f"Conv_{i}": {
            "kernel": params["params"][f"Dense_{i}"]["kernel"][None, None],
            "bias": params["params"][f"Dense_{i}"]["bias"],
        }
        for i in range(2)
    }
    one = piece(dense, params, images, theta=theta)
    other = piece(convolution, {"params": same}, images, theta=theta)
    for i in range(2):
        kernel = other.synapses[f"params/Conv_{i}/kernel"]
        np.testing.assert_array_equal(one.synapses[f"params/Dense_{i}/kernel"], kernel[0, 0])
    for ours, theirs in zip(one.neurons.values(), other.neurons.values(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@functools.cache
def grouped_and_apart(groups: int):
    """Four channels in groups (four groups: depthwise), and each group by itself."""
    size = 4 // groups

    def grouped(x):
        x = nn.relu(nn.Conv(8, (2, 2), feature_group_count=groups, use_bias=False)(x))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))

    def apart(x):
        parts = [
            nn.Conv(8 // groups, (2, 2), use_bias=False)(x[..., i * size : (i + 1) * size])
            for i in range(groups)
        ]
        x = nn.relu(jnp.concatenate(parts, axis=-1))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))

    return _two_views(grouped, apart, (4, 2, 4))


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_convolution_equals_its_groups(groups):
    (grouped, shapes), (apart, _) = grouped_and_apart(groups)

    @hp.given(SEEDS, THETAS)
    @SETTINGS
    def check(seed, theta):
        params = nets.fill(shapes, whole=True, seed=seed)
        images = np.random.default_rng(seed).integers(-3, 4, (4, 4, 2, 4)).astype(np.float32)
        kernels = np.split(params["params"]["Conv_0"]["kernel"], groups, axis=-1)
        split = {f"Conv_{i}": {"kernel": jnp.asarray(k)} for i, k in enumerate(kernels)}
        split["Dense_0"] = params["params"]["Dense_0"]
        one = piece(grouped, params, images, theta=theta)
        other = piece(apart, {"params": split}, images, theta=theta)
        parts = [other.synapses[f"params/Conv_{i}/kernel"] for i in range(groups)]
        np.testing.assert_array_equal(
            one.synapses["params/Conv_0/kernel"], np.concatenate(parts, axis=-1)
        )
        for name in ("input", "Net/relu", "Net/Dense_0/add"):
            np.testing.assert_array_equal(one.neurons[name], other.neurons[name])

    check()


# Sets of samples and outputs --------------------------------------------------------------


@hp.given(SEEDS, THETAS)
@SETTINGS
def test_batch_equals_one_by_one(seed, theta):
    case, graph = traced("padded_convolution")
    params = nets.fill(case.params, whole=True, seed=seed)
    images = case.images(5, seed)
    profile = nns.profile(graph, params, images[:4])

    def of(some, **options):
        return piece(graph, params, some, profile, theta=theta, **options)

    together = of(images, per_sample=True)
    apart = [of(images[i : i + 1], batch_size=1) for i in range(5)]
    for i, single in enumerate(apart):
        assert_equal(together.sample(i), single)
    total = functools.reduce(lambda a, b: a + b, apart)
    assert_equal(total, together.total())
    assert_equal(total, of(images))
    assert_equal(total, of(images, batch_size=1))
    # The last batch is not full, and four devices share the first.
    assert_equal(total, of(images, batch_size=4))


@hp.given(SEEDS, st.permutations(range(4)))
@SETTINGS
def test_order_of_merging_does_not_matter(seed, order):
    case, graph = traced("mlp")
    params = nets.fill(case.params, whole=True, seed=seed)
    images = case.images(4, seed)
    profile = nns.profile(graph, params, images)
    slices = [piece(graph, params, images[i : i + 1], profile, theta=0.25) for i in range(4)]
    shuffled = [slices[i] for i in order]
    left = functools.reduce(lambda a, b: a + b, slices)
    assert_equal(left, functools.reduce(lambda a, b: b + a, shuffled))
    assert_equal(left, (shuffled[0] + shuffled[1]) + (shuffled[2] + shuffled[3]))
    assert_equal(left, piece(graph, params, images[np.array(order)], profile, theta=0.25))
    union = functools.reduce(lambda a, b: a.union(b), slices)
    assert_equal(union, functools.reduce(lambda a, b: b.union(a), shuffled))
    assert_equal(union, shuffled[0].union(shuffled[1]).union(shuffled[2].union(shuffled[3])))
    for name, array in union.synapses.items():
        anywhere = np.any([s.synapses[name] != 0 for s in slices], axis=0)
        np.testing.assert_array_equal(array != 0, anywhere)


@hp.given(SEEDS)
@SETTINGS
def test_one_output_each_or_several(seed):
    case, graph = traced("mlp")
    params = nets.fill(case.params, whole=True, seed=seed)
    images = case.images(3, seed)
    profile = nns.profile(graph, params, images)
    rng = np.random.default_rng(seed)
    single = rng.integers(0, 3, 3)
    double = np.stack([rng.permutation(3)[:2] for _ in range(3)])

    def of(outputs):
        return piece(graph, params, images, profile, outputs=outputs, theta=0.25, per_sample=True)

    assert_equal(of(single), of(single[:, None]))
    assert_equal(of(single), of(single.tolist()))
    assert_equal(of(double), of(double[:, ::-1]))
    logits = np.asarray(case.apply(params, images))
    assert_equal(of(None), of(logits.argmax(1)))
    # CONTRIB 1 on each: at the last layer the outputs do not mix.
    both = of(double).synapses["params/Dense_2/kernel"]
    apart = sum(of(double[:, i]).synapses["params/Dense_2/kernel"] for i in range(2))
    np.testing.assert_array_equal(both, apart)


@hp.given(SEEDS)
@SETTINGS
def test_a_softmax_at_the_end_is_left_out(seed):
    case, graph = traced("plain_mlp")
    params = nets.fill(case.params, whole=True, seed=seed)
    images = case.images(4, seed)
    one = piece(graph, params, images, theta=0.25)
    other = piece(graph_with_softmax(), params, images, theta=0.25)
    for name, array in one.synapses.items():
        np.testing.assert_array_equal(array, other.synapses[name], err_msg=name)
    for name, array in one.neurons.items():
        other_name = {"max": "max_0"}.get(name, name)
        np.testing.assert_array_equal(array, other.neurons[other_name], err_msg=name)


@functools.cache
def graph_with_softmax() -> nns.Graph:
    case, _ = traced("plain_mlp")
    return nns.trace(lambda p, x: nn.softmax(case.apply(p, x)), case.params, case.images(1))


# Slices as data ---------------------------------------------------------------------------


@pytest.mark.parametrize("per_sample", [False, True])
def test_saved_and_loaded_slices_are_equal(per_sample, tmp_path):
    case, graph = traced("residual")
    for seed in range(3):
        params = nets.fill(case.params, whole=True, seed=seed)
        found = piece(graph, params, case.images(4, seed), theta=0.25, per_sample=per_sample)
        found.save(tmp_path / "piece.safetensors")
        again = nns.load_slice(tmp_path / "piece.safetensors")
        assert_equal(found, again)
        assert again.count == found.count == 4 and again.per_sample == per_sample
        assert dict(again.axes) == dict(found.axes)
        assert dict(again.criterion) == dict(found.criterion)
        assert again.similarity(found) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["piece.safetensors"]


@hp.given(SEEDS)
@SETTINGS
def test_sets_of_synapses(seed):
    case, graph = traced("mlp")
    params = nets.fill(case.params, whole=True, seed=seed)
    images = case.images(4, seed)
    profile = nns.profile(graph, params, images)
    one, other = (piece(graph, params, images[i : i + 2], profile, theta=0.25) for i in (0, 2))

    def members(found):
        return {(name, int(i)) for name, a in found.synapses.items() for i in np.flatnonzero(a)}

    mine, theirs = members(one), members(other)
    assert members(one.union(other)) == mine | theirs
    assert members(one.intersection(other)) == mine & theirs
    assert members(one.difference(other)) == mine - theirs
    assert equal(one, other) or one.union(other).size()[0] >= max(len(mine), len(theirs))
    assert one.size() == (len(mine), sum(a.size for a in one.synapses.values()))
    overlap = len(mine & theirs) / len(mine | theirs) if mine | theirs else 1.0
    assert one.similarity(other) == other.similarity(one) == overlap


@hp.given(SEEDS, st.floats(0, 1))
@SETTINGS
def test_threshold_keeps_the_largest_share_of_each_layer(seed, ratio):
    case, graph = traced("mlp")
    params = nets.fill(case.params, whole=True, seed=seed)
    found = piece(graph, params, case.images(4, seed), theta=0.0)
    small = found.threshold(ratio)
    for name, array in small.synapses.items():
        before = found.synapses[name]
        wanted = min(int(np.ceil(ratio * before.size)), np.count_nonzero(before))
        assert np.count_nonzero(array) == wanted
        np.testing.assert_array_equal(array[array != 0], before[array != 0])
        left_out = np.abs(before[array == 0])
        if wanted and left_out.size:
            assert np.abs(array[array != 0]).min() >= left_out.max()


def test_channels_sum_positions():
    case, graph = traced("residual")
    found = piece(graph, case.params, case.images(4), theta=0.0, per_sample=True)
    channels = found.channels()
    for name, neuron in graph.neurons().items():
        axes = tuple(1 + a for a in range(len(neuron.shape)) if a != neuron.channel)
        np.testing.assert_array_equal(channels[name], found.neurons[name].sum(axes))
        assert channels[name].shape == (4, neuron.shape[neuron.channel])
