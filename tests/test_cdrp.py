"""Routing against a naive restatement of distillation guided routing, and its properties."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnslicer_jax as nns
from interpret import cdrp, gates
from tests import zoo

LENET = ["Net/relu_0", "Net/relu_1"]


def _lenet() -> zoo.Model:
    """Two convolutions, pooled by averages, so that every gate has a derivative."""

    def body(x):
        x = nn.avg_pool(nn.relu(nn.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.avg_pool(nn.relu(nn.Conv(6, (3, 3))(x)), (2, 2), (2, 2))
        return nn.Dense(4)(zoo.rows(x))

    return zoo.of_flax(body, (8, 8, 1))


@functools.cache
def small() -> tuple[zoo.Model, nns.Graph, np.ndarray]:
    model = _lenet()
    images = model.images(6, seed=1)
    return model, nns.trace(model.apply, model.params, images[:1]), images


@functools.cache
def routed() -> cdrp.Routes:
    model, graph, images = small()
    return cdrp.route(graph, model.params, images)


def gated(params, x, gate):
    """The network of `_lenet` written out with its ten gates, for one image."""
    layers = params["params"]
    for name, part in (("Conv_0", slice(0, 4)), ("Conv_1", slice(4, 10))):
        x = jax.lax.conv_general_dilated(
            x, layers[name]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + layers[name]["bias"][None, None, None]) * gate[part][None, None, None]
        x = nn.avg_pool(x, (2, 2), (2, 2))
    return (x.reshape(-1) @ layers["Dense_0"]["kernel"]) + layers["Dense_0"]["bias"]


@jax.jit
def naive_loss(params, image, gate, gamma):
    """The loss of the paper, and beside it the gated logits."""
    out = gated(params, image, gate)
    p = jax.nn.softmax(gated(params, image, jnp.ones(10)))
    return -(p * jax.nn.log_softmax(out)).sum() + gamma * jnp.abs(gate).sum(), out


naive_slope = jax.jit(jax.grad(naive_loss, argnums=2, has_aux=True))


def naive(params, image, gamma, steps, rate, momentum, bound):
    """Distillation guided routing of one image, step by step: gates, loss, step, kept."""
    gate, velocity = np.ones(10, np.float32), np.zeros(10, np.float32)
    least, out = naive_loss(params, image[None], gate, gamma)
    wanted, best, at, kept = int(np.argmax(out)), gate, 0, 0
    for i in range(1, steps + 1):
        slope, _ = naive_slope(params, image[None], gate, gamma)
        velocity = momentum * velocity + np.asarray(slope)
        gate = gate - rate * velocity
        gate = np.maximum(gate, 0) if bound is None else np.clip(gate, 0, bound)
        loss, out = naive_loss(params, image[None], gate, gamma)
        if int(np.argmax(out)) == wanted:
            kept += 1
            if loss < least:
                best, least, at = gate, loss, i
    return best, least, at, kept


@pytest.mark.parametrize(
    ("gamma", "steps", "rate", "momentum", "bound"),
    [(0.05, 30, 0.1, 0.9, 10.0), (0.1, 3, 4.0, 0.0, 1.5), (0.3, 12, 0.05, 0.5, None)],
)
def test_routes_equal_the_naive_descent(gamma, steps, rate, momentum, bound):
    model, graph, images = small()
    found = cdrp.route(
        graph, model.params, images, gamma=gamma, iterations=steps, learning_rate=rate,
        momentum=momentum, bound=bound,
    )  # fmt: skip
    assert list(found.layers) == LENET
    for i, image in enumerate(images):
        best, least, at, kept = naive(model.params, image, gamma, steps, rate, momentum, bound)
        np.testing.assert_allclose(found.gates[i], best, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found.loss[i], least, rtol=1e-4, atol=1e-5)
        assert (found.step[i], found.kept[i]) == (at, kept)


def test_what_is_returned_keeps_the_class_and_is_no_worse_than_the_start():
    model, graph, images = small()
    found = routed()
    plain = np.asarray(model.apply(model.params, images))
    np.testing.assert_array_equal(found.predicted, plain.argmax(1))
    under = cdrp.logits(graph, model.params, images, found.layers, found.gates, batch_size=4)
    np.testing.assert_array_equal(under.argmax(1), found.predicted)

    def loss(out, gate):
        return -(jax.nn.softmax(plain) * jax.nn.log_softmax(out)).sum(1) + 0.05 * gate.sum(1)

    np.testing.assert_allclose(found.loss, loss(under, found.gates), rtol=1e-4, atol=1e-5)
    assert (found.loss < loss(plain, np.ones_like(found.gates))).all()
    assert found.gates.dtype == np.float32 and found.gates.min() >= 0 and found.gates.max() <= 10
    assert (found.gates == 0).any() and (found.step > 0).all()


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("lenet", "auto"),
        ("resnet", "auto"),
        ("resnet", "convolutions"),
        ("channels_first", "auto"),
        ("convolutions", "auto"),
    ],
)
def test_gates_of_one_leave_the_logits(name, at):
    model = zoo.model(name)
    images = model.images(5)
    graph = nns.trace(model.apply, model.params, images[:1])
    layers = gates.places(graph, at)
    ones = np.ones((5, max(part.stop for part in layers.values())))
    found = cdrp.logits(graph, model.params, images, layers, ones, batch_size=3)
    np.testing.assert_allclose(found, model.apply(model.params, images), rtol=1e-5, atol=1e-5)


def test_a_gate_multiplies_its_channel_and_no_other():
    for name in ("lenet", "resnet", "channels_first"):
        model = zoo.model(name)
        images = model.images(2)
        graph = nns.trace(model.apply, model.params, images[:1])
        layers = gates.places(graph, "convolutions")
        width = max(part.stop for part in layers.values())
        row = np.random.default_rng(0).uniform(0, 2, (2, width)).astype(np.float32)
        row[:, ::3] = 0
        found = cdrp.logits(graph, model.params, images, layers, row)
        neurons = graph.neurons()
        for i, image in enumerate(images):
            edits = {}
            for layer, part in layers.items():
                n = neurons[layer]
                shape = [-1 if a == n.channel else 1 for a in range(len(n.shape))]
                factor = jnp.asarray(row[i, part].reshape(shape))
                edits[layer] = lambda a, factor=factor: a * factor
            expected = nns.evaluate(graph, model.params, image[None], edits)[0][0]
            np.testing.assert_allclose(found[i], expected, rtol=1e-4, atol=1e-5)


def test_batches_give_what_single_images_give():
    model, graph, images = small()
    for source, size in ((images, 4), (iter([images[:4], images[4:]]), 2), (images, 1)):
        found = cdrp.route(graph, model.params, source, batch_size=size)
        np.testing.assert_allclose(found.gates, routed().gates, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(found.step, routed().step)


def test_more_weight_on_the_sum_leaves_less_of_it():
    model, graph, images = small()
    sums = [
        cdrp.route(graph, model.params, images, gamma=gamma).gates.sum(1).mean()
        for gamma in (0.001, 0.01, 0.05)
    ]
    assert sums[0] > sums[1] > sums[2]


def test_an_image_whose_class_is_lost_at_once_keeps_its_untouched_gates():
    # The second class has a constant logit and wins once the gate falls to 0.5, at the first step.
    def apply(p, x):
        x = jax.lax.conv_general_dilated(
            x, p["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x)[:, 0, 0]
        return x @ p["out"] + p["bias"][None]

    params = {
        "kernel": jnp.ones((1, 1, 1, 1)),
        "out": jnp.array([[1.0, 0.0]]),
        "bias": jnp.array([0.0, 0.99]),
    }
    images = np.array([1.0, 1.5, 0.0], np.float32).reshape(3, 1, 1, 1)
    graph = nns.trace(apply, params, images[:1])
    found = cdrp.route(graph, params, images, gamma=5.0, iterations=3)
    assert found.lost.tolist() == [True, True, False]
    assert found.gates[:2].tolist() == [[1.0], [1.0]] and found.step[:2].tolist() == [0, 0]
    # What is not switched on needs no gate.
    assert found.gates[2] == 0
    assert "2 untouched" in repr(found)


def test_gates_move_behind_max_pooling():
    model = zoo.model("lenet")
    images = model.images(3)
    graph = nns.trace(model.apply, model.params, images[:1])
    layers = gates.places(graph)
    row = np.random.default_rng(0).uniform(0.1, 2, (3, 10)).astype(np.float32)
    moved = gates.edits(graph, layers, jnp.asarray(row))
    assert "Net/reduce_window_max" in moved and "Net/relu_0" not in moved

    def by_hand(row):
        edits = {
            "Net/relu_0": lambda a: a * row[:4][None, None],
            "Net/relu_1": lambda a: a * row[4:][None, None],
        }
        return nns.evaluate(graph, model.params, images[:1], edits)[0].sum()

    def here(row):
        edits = gates.edits(graph, layers, row[None])
        return nns.evaluation.evaluated(graph, model.params, images[:1]).again(edits).sum()

    for one in row:
        out, slope = jax.value_and_grad(by_hand)(jnp.asarray(one))
        found, found_slope = jax.value_and_grad(here)(jnp.asarray(one))
        np.testing.assert_allclose(found, out, rtol=1e-5)
        np.testing.assert_allclose(found_slope, slope, rtol=1e-4, atol=1e-5)


def places(body, shape=(8, 8, 3), at="auto"):
    model = zoo.of_flax(body, shape)
    return list(gates.places(nns.trace(model.apply, model.params, model.images(1)), at))


def test_gates_stand_after_activations():
    def body(x):
        x = nn.gelu(nn.Conv(4, (3, 3))(x))
        x = nn.max_pool(nn.GroupNorm(2)(nn.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.silu(x)
        x = nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x))
        return nn.Dense(3)(x.mean((1, 2)))

    found = places(body)
    # Gelu is several operations of which the last counts; the last convolution has no activation.
    assert found == ["Net/mul_3", "Net/silu", "Net/BatchNorm_0/add"]


def test_gates_stand_at_the_outputs_of_residual_blocks():
    def before(x):
        # The activation comes first in each block, so that the sum is its output.
        for _ in range(2):
            y = nn.Conv(4, (3, 3))(nn.relu(x))
            x = x + nn.Conv(4, (3, 3))(nn.relu(y))
        return nn.Dense(3)(nn.relu(x).mean((1, 2)))

    assert places(lambda x: before(nn.Conv(4, (3, 3))(x))) == ["Net/add_0", "Net/relu_4"]
    resnet = zoo.model("resnet")
    graph = nns.trace(resnet.apply, resnet.params, resnet.images(1))
    # A stem, then two blocks of two activations each.
    assert list(gates.places(graph)) == ["Net/relu_2", "Net/relu_4"]
    assert list(gates.places(graph, "convolutions")) == [f"Net/relu_{i}" for i in range(5)]
    assert gates.places(graph)["Net/relu_4"] == slice(4, 10)


def test_gates_of_a_convolution_do_not_reach_what_goes_around_it():
    def before(x):
        # Activations come first in each block; the sums are read twice, or normalised.
        x = nn.Conv(4, (3, 3))(x)
        for _ in range(2):
            x = x + nn.Conv(4, (3, 3))(nn.relu(nn.Conv(4, (3, 3))(nn.relu(x))))
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        return nn.Dense(3)(x.mean((1, 2)))

    def bottleneck(x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = x + nn.BatchNorm(use_running_average=True)(nn.Conv(4, (1, 1))(nn.relu6(x * 2)))
        return nn.Dense(3)(nn.Conv(5, (1, 1))(x).mean((1, 2)))

    assert places(before, at="convolutions") == [
        "Net/Conv_0/add", "Net/relu_1", "Net/Conv_1/add", "Net/relu_3", "Net/Conv_3/add",
    ]  # fmt: skip
    assert places(before) == ["Net/add_0", "Net/add_1"]
    found = places(bottleneck, at="convolutions")
    assert found == ["Net/relu", "Net/BatchNorm_0/add", "Net/Conv_2/add"]
    assert places(bottleneck) == ["Net/add"]


def test_a_sum_of_two_branches_is_no_residual_block():
    def body(x):
        x = nn.relu(nn.Conv(4, (3, 3))(x) + nn.Conv(4, (5, 5))(x))
        return nn.Dense(3)(nn.relu(nn.Conv(6, (3, 3))(x)).mean((1, 2)))

    # The first activation is that of both branches.
    assert places(body) == ["Net/relu_0", "Net/relu_1"]
    with pytest.raises(ValueError, match="no residual blocks"):
        places(body, at="blocks")

    def projected(x):
        y = nn.Conv(4, (3, 3))(nn.relu(nn.Conv(4, (3, 3))(x)))
        x = nn.relu(y + nn.Conv(4, (1, 1))(x))
        return nn.Dense(3)(x.mean((1, 2)))

    assert places(projected) == ["Net/relu_1"]


def test_gates_stand_where_they_are_named():
    model = zoo.model("mlp")
    images = model.images(4)
    graph = nns.trace(model.apply, model.params, images[:1])
    found = cdrp.route(graph, model.params, images, at=["Net/relu_1", "Net/relu_0"], gamma=0.01)
    assert found.layers == {"Net/relu_1": slice(0, 6), "Net/relu_0": slice(6, 14)}
    np.testing.assert_array_equal(found.layer("Net/relu_0"), found.gates[:, 6:])
    dead = np.asarray(nns.evaluate(graph, model.params, images)[1]["Net/relu_0"]) == 0
    # A unit that is off costs its gate and gives nothing.
    assert (found.layer("Net/relu_0")[dead] < 1).all()


def test_routes_are_saved_and_taken(tmp_path):
    path = tmp_path / "routes.safetensors"
    routed().save(path)
    loaded = cdrp.load_routes(path)
    assert loaded.layers == routed().layers and loaded.options == routed().options
    for name in ("gates", "predicted", "loss", "step", "kept"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(routed(), name))
    assert len(loaded) == 6
    some = loaded.take([4, 1])
    np.testing.assert_array_equal(some.gates, routed().gates[[4, 1]])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="safetensors"):
        cdrp.load_routes(path)


def test_a_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    model, graph, images = small()
    path = tmp_path / "routes.safetensors"
    batches = []
    descend = cdrp.descend

    def killed(*args):
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(len(args[3]))
        return descend(*args)

    monkeypatch.setattr(cdrp, "_SAVE_EVERY", -1)
    monkeypatch.setattr(cdrp, "descend", killed)
    options = {"batch_size": 2, "checkpoint": path}
    with pytest.raises(KeyboardInterrupt):
        cdrp.route(graph, model.params, images, **options)
    assert len(cdrp.load_routes(path)) == 4
    batches.clear()
    found = cdrp.route(graph, model.params, images, **options)
    assert len(batches) == 1 and found.options == routed().options
    np.testing.assert_allclose(found.gates, routed().gates, rtol=1e-3, atol=1e-4)
    # What is done is read back; another call is not.
    again = cdrp.route(graph, model.params, images, **options)
    assert len(batches) == 1
    np.testing.assert_array_equal(again.gates, found.gates)
    for more in ({"gamma": 0.1}, {"images": images[::-1]}, {"images": images[:4]}):
        with pytest.raises(ValueError, match="holds the progress of another call"):
            cdrp.route(graph, model.params, **{"images": images, **options, **more})


def test_routes_of_parts_are_joined():
    parts = [routed().take([0, 1, 2]), routed().take([3]), routed().take([4, 5])]
    whole = cdrp.joined(parts)
    assert whole.layers == routed().layers and whole.options == routed().options
    for name in ("gates", "predicted", "loss", "step", "kept"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(routed(), name))
    other = dataclasses.replace(parts[1], options={**parts[1].options, "gamma": 1.0})
    for wrong in ([parts[0], other], []):
        with pytest.raises(ValueError, match="^parts "):
            cdrp.joined(wrong)


def test_files_of_something_else_are_refused(tmp_path):
    from nnslicer_jax.tensors import write_tensors

    path = tmp_path / "x.safetensors"
    write_tensors(path, {"gates": np.zeros((2, 3))}, {"routes": '{"layers": {}, "options": {}}'})
    with pytest.raises(ValueError, match="holds no routes"):
        cdrp.load_routes(path)
    arrays = {k: getattr(routed(), k) for k in ("gates", "predicted", "loss", "step", "kept")}
    for layers in ('{"a": [0, 4]}', '{"a": [0, 4], "b": [3, 10]}', '{"a": [0, 4], "b": 6}'):
        write_tensors(path, arrays, {"routes": f'{{"layers": {layers}, "options": {{}}}}'})
        with pytest.raises(ValueError, match="holds no routes"):
            cdrp.load_routes(path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gamma": -0.1}, "gamma must be a number of 0 or more, not -0.1"),
        ({"gamma": float("nan")}, "gamma"),
        ({"iterations": 0}, "iterations must be an integer in 1..2147483647, not 0"),
        ({"iterations": 2.5}, "iterations"),
        ({"iterations": True}, "iterations"),
        ({"iterations": 2**40}, "iterations"),
        ({"batch_size": 2.5}, "batch_size must be an integer"),
        ({"at": 3}, "at must be one of auto, convolutions, blocks or neuron names, not 3"),
        ({"learning_rate": 0}, "learning_rate must be a number above 0, not 0"),
        ({"momentum": 1.0}, "momentum"),
        ({"bound": 0.5}, "bound must be None or a number of at least 1, not 0.5"),
        ({"batch_size": 0}, "batch_size"),
        ({"at": "layers"}, "at must be one of auto, convolutions, blocks or neuron names"),
        ({"at": "blocks"}, "no residual blocks"),
        ({"at": ["Net/relu_9"]}, "no neuron 'Net/relu_9'"),
        ({"at": []}, "at least one neuron"),
        ({"at": ["Net/relu_0", "Net/relu_0"]}, "none twice"),
    ],
)
def test_what_cannot_be_routed_is_refused(options, words):
    model, graph, images = small()
    with pytest.raises(ValueError, match=words) as caught:
        cdrp.route(graph, model.params, images, **options)
    assert "\n" not in str(caught.value)


def test_a_network_without_convolutions_says_so():
    model = zoo.model("mlp")
    graph = nns.trace(model.apply, model.params, model.images(1))
    with pytest.raises(ValueError, match="no convolution.*at=") as caught:
        cdrp.route(graph, model.params, model.images(2))
    assert "\n" not in str(caught.value)


def test_gates_of_another_shape_are_refused():
    model, graph, images = small()
    layers = gates.places(graph)
    for wrong, words in (
        (np.ones((6, 9)), "shape"),
        (-np.ones((6, 10)), "at least 0"),
        (np.full((6, 10), np.nan), "finite"),
    ):
        with pytest.raises(ValueError, match=words):
            cdrp.logits(graph, model.params, images, layers, wrong)
    narrow = {LENET[0]: slice(0, 1), LENET[1]: slice(1, 7)}
    with pytest.raises(ValueError, match="Net/relu_0 has 4 channels, but 1 gates"):
        cdrp.logits(graph, model.params, images, narrow, np.ones((6, 7)))
    broken = jax.tree.map(lambda leaf: leaf * np.nan, model.params)
    with pytest.raises(ValueError, match="finite"):
        cdrp.logits(graph, broken, images, layers, np.ones((6, 10)))
    with pytest.raises(ValueError, match="no gates at 'x'"):
        routed().layer("x")


def test_many_gates_weigh_no_more_than_a_few_hundred():
    for count in (1, 22, 240):
        assert cdrp.balanced(count) == {"gamma": 0.05, "learning_rate": 0.1}
    many = cdrp.balanced(4224)
    assert many["gamma"] * 4224 == pytest.approx(12)
    # A gate that the probabilities do not depend on takes the published steps.
    assert many["gamma"] * many["learning_rate"] == pytest.approx(0.005)
    with pytest.raises(ValueError, match="count must be at least 1, not 0"):
        cdrp.balanced(0)
