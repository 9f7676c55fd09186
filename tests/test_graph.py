"""A traced model is the model: values, gradients and neurons, however it is run."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import nnslicer_jax as nns
from tests import zoo

NAMES = sorted(zoo.MAKERS)
INTEGER = {name for name in ("embedding", "bytes")}


@functools.cache
def traced(name: str) -> tuple[zoo.Model, nns.Graph]:
    model = zoo.model(name)
    return model, nns.trace(model.apply, model.params, model.images(1))


def run(graph: nns.Graph):
    """The graph as a function of parameters and a batch."""
    return lambda params, x: nns.evaluate(graph, params, x)[0]


def weighed(outs) -> jax.Array:
    """A sum over all outputs that weighs each number differently."""
    return sum(
        jnp.sum(jnp.sin(jnp.arange(a.size, dtype=jnp.float32) + 1.0).reshape(a.shape) * a)
        for a in jax.tree.leaves(outs)
    )


def with_gradients(apply, wanted: tuple[int, ...]):
    """(outputs, gradients) of a model, compiled."""

    def loss(params, x):
        outs = apply(params, x)
        return weighed(outs), outs

    @jax.jit
    def run(params, x):
        (_, outs), gradients = jax.value_and_grad(loss, wanted, has_aux=True)(params, x)
        return outs, gradients

    return run


def assert_close(found, expected, name: str = "") -> None:
    """Equal to float32 rounding, or bfloat16's where the model computes in it."""
    tolerance = 2e-2 if name == "half_precision" else 2e-5
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        scale = max(1.0, float(jnp.abs(theirs).max()))
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_equal_the_models(name):
    model, graph = traced(name)
    x = model.images(4)
    wanted = (0,) if name in INTEGER else (0, 1)
    ours = with_gradients(run(graph), wanted)(model.params, x)
    theirs = with_gradients(model.apply, wanted)(model.params, x)
    assert_close(ours, theirs, name)
    assert any(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(ours[1]))


@pytest.mark.parametrize("name", NAMES)
def test_vmap_and_sharding_change_nothing(name):
    model, graph = traced(name)
    x = model.images(8, seed=1).reshape(2, 4, *model.shape)
    expected = jax.vmap(model.apply, (None, 0))
    several = jax.jit(jax.vmap(run(graph), (None, 0)))
    assert_close(several(model.params, x), jax.jit(expected)(model.params, x), name)

    if jax.device_count() < 4:
        pytest.skip("sharding needs four devices")
    mesh = Mesh(np.array(jax.devices()[:4]), ("batch",))
    spread = jax.device_put(x[0], NamedSharding(mesh, PartitionSpec("batch")))
    params = jax.device_put(model.params, NamedSharding(mesh, PartitionSpec()))
    outs = jax.jit(run(graph))(params, spread)
    assert all(len(leaf.sharding.device_set) == 4 for leaf in jax.tree.leaves(outs))
    alone = jax.tree.map(lambda a: a[0], several(model.params, x))
    assert_close(jax.device_get(outs), jax.device_get(alone), name)


@pytest.mark.parametrize("name", ["mlp", "lenet", "lstm", "embedding"])
def test_any_batch_size_without_jit(name):
    model, graph = traced(name)
    for count in (1, 3):
        x = model.images(count, seed=count)
        assert_close(run(graph)(model.params, x), model.apply(model.params, x))


def test_forward_mode_and_second_derivatives():
    model, graph = traced("plain_function")
    x = model.images(2)

    def curved(apply):
        return jax.jit(jax.hessian(lambda p: weighed(jnp.tanh(apply(p, x)))))

    assert_close(curved(run(graph))(model.params), curved(model.apply)(model.params))
    tangent = jax.tree.map(jnp.ones_like, model.params)
    one = jax.jvp(lambda p: run(graph)(p, x), (model.params,), (tangent,))
    other = jax.jvp(lambda p: model.apply(p, x), (model.params,), (tangent,))
    assert_close(one, other)


def test_a_graph_is_a_static_argument():
    model, graph = traced("mlp")
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def logits(graph, params, x):
        traces.append(graph)
        return nns.evaluate(graph, params, x)[0]

    x = model.images(2)
    first, again = logits(graph, model.params, x), logits(graph, model.params, x)
    assert_close(first, again)
    assert traces == [graph]


def test_only_the_first_samples_shape_and_type_matter():
    model, graph = traced("lenet")
    other = nns.trace(model.apply, model.params, np.zeros((7, *model.shape), np.float32))
    assert [str(n) for n in other.nodes] == [str(n) for n in graph.nodes]
    abstract = nns.trace(
        model.apply, model.params, jax.ShapeDtypeStruct((1, *model.shape), jnp.float32)
    )
    assert [str(n) for n in abstract.nodes] == [str(n) for n in graph.nodes]


@pytest.mark.parametrize(
    "branch, taken",
    [
        (lambda x: jax.lax.switch(np.int32(1), [jnp.sin, jnp.cos, jnp.tanh], x), "cos"),
        (lambda x: jax.lax.switch(jnp.argmax(jnp.array([0, 5])), [jnp.sin, jnp.tanh], x), "tanh"),
        (lambda x: jax.lax.switch(jnp.int32(7), [jnp.sin, jnp.cos], x), "cos"),
        (lambda x: jax.lax.cond(jnp.array(True), jnp.sin, jnp.cos, x), "sin"),
        (lambda x: jax.lax.cond(jnp.sum(jnp.zeros(3)) > 0, jnp.sin, jnp.cos, x), "cos"),
    ],
)  # fmt: skip
def test_a_constant_takes_its_branch(branch, taken):
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)), jnp.float32)}
    x = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)

    def apply(p, x):
        return branch(x @ p["w"])

    graph = nns.trace(apply, params, x)
    assert [name.split("/")[-1] for name in graph.neurons()] == ["input", "dot_general", taken]
    np.testing.assert_allclose(run(graph)(params, x), apply(params, x), rtol=1e-6)
    piece = nns.slice_network(graph, params, nns.profile(graph, params, x), x, theta=0.0)
    assert np.any(piece.synapses["w"])


# Derivatives ------------------------------------------------------------------------------


def test_a_pruned_channel_has_no_gradient():
    def apply(p, x):
        return jax.nn.relu(x @ p["first"]) @ p["second"]

    params = {"first": jnp.ones((3, 2)).at[:, 1].set(0.0), "second": jnp.ones((2, 2))}
    graph = nns.trace(apply, params, np.ones((1, 3), np.float32))
    x = np.ones((2, 3), np.float32)
    gradient = jax.grad(lambda p: run(graph)(p, x).sum())(params)
    np.testing.assert_array_equal(gradient["first"][:, 1], 0.0)
    np.testing.assert_array_equal(gradient["first"][:, 0], 4.0)


def test_a_pruned_convolution_channel_has_no_gradient():
    model, graph = traced("lenet")
    params = jax.tree.map(lambda a: a, model.params)
    layer = params["params"]["Conv_0"]
    params["params"]["Conv_0"] = {
        "kernel": layer["kernel"].at[..., 2].set(0.0),
        "bias": layer["bias"].at[2].set(0.0),
    }
    x = model.images(2)
    found = jax.grad(lambda p: weighed(run(graph)(p, x)))(params)["params"]["Conv_0"]
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(found[name][..., 2], 0.0)
        assert np.abs(found[name][..., :2]).max() > 0


@pytest.mark.parametrize(
    "function, value, derivative",
    [
        (zoo._slow_step, np.sin(0.7), 7.0),
        (zoo._through, 1.0, 1.0),
        (jax.nn.relu, 0.7, 1.0),
        (jax.nn.softplus, np.log1p(np.exp(0.7)), 1 / (1 + np.exp(-0.7))),
    ],
)
def test_custom_derivatives_are_respected(function, value, derivative):
    params = {"w": jnp.ones((1, 1))}
    graph = nns.trace(lambda p, x: function(x @ p["w"]), params, np.ones((1, 1), np.float32))
    x = jnp.full((1, 1), 0.7)
    np.testing.assert_allclose(run(graph)(params, x), [[value]], rtol=1e-6)
    gradient = jax.grad(lambda x: run(graph)(params, x).sum())(x)
    np.testing.assert_allclose(gradient, [[derivative]], rtol=1e-6)


def test_custom_derivatives_of_weights_are_respected():
    model, graph = traced("custom_vjp")
    x = model.images(3)
    zero = {**model.params, "second": jnp.zeros((4, 3))}
    gradient = jax.grad(lambda p: run(graph)(p, x).sum())(zero)
    # `_matrix` says 3 for every weight; the other term passes straight through the rounding.
    hidden = np.round(3.0 * (x @ np.asarray(model.params["first"])))
    expected = 3.0 + 2.0 * 0.5 * hidden.sum(0)[:, None]
    np.testing.assert_allclose(gradient["second"], np.broadcast_to(expected, (4, 3)), rtol=1e-6)


def test_stopped_gradients_stay_stopped():
    def apply(p, x):
        return jax.lax.stop_gradient(x @ p["w"]) * (x @ p["w"])

    params = {"w": jnp.full((2, 1), 3.0)}
    x = jnp.array([[1.0, 2.0]])
    graph = nns.trace(apply, params, x)
    gradient = jax.grad(lambda p: run(graph)(p, x).sum())(params)
    np.testing.assert_array_equal(gradient["w"], [[9.0], [18.0]])


# Neurons ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_neurons_are_named_once_and_alike(name):
    model, graph = traced(name)
    neurons = graph.neurons()
    assert list(neurons)[0] == "input"
    assert neurons["input"].shape == model.shape and neurons["input"].value == graph.input
    assert all(key == neuron.name for key, neuron in neurons.items())
    assert len({neuron.value for neuron in neurons.values()}) == len(neurons)
    again = nns.trace(model.apply, model.params, model.images(1)).neurons()
    assert again == neurons
    x = model.images(2)
    _, activations = jax.eval_shape(lambda p, x: nns.evaluate(graph, p, x), model.params, x)
    assert set(activations) == set(neurons)
    for key, neuron in neurons.items():
        assert activations[key].shape == (2, *neuron.shape), key
        assert activations[key].dtype == neuron.dtype, key
        assert neuron.channel in range(max(len(neuron.shape), 1)), key


def test_activations_are_the_layers_outputs():
    model, graph = traced("lenet")
    x = model.images(3)
    _, activations = nns.evaluate(graph, model.params, x)
    p = model.params["params"]
    hidden = nn.relu(nn.Conv(4, (3, 3)).apply({"params": p["Conv_0"]}, x))
    np.testing.assert_allclose(activations["Net/relu_0"], hidden, rtol=1e-5, atol=1e-5)
    logits = model.apply(model.params, x)
    np.testing.assert_allclose(activations["Net/Dense_1/add"], logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(activations["input"], x)


def test_names_say_module_and_operation():
    _, graph = traced("lenet")
    assert list(graph.neurons()) == [
        "input",
        "Net/Conv_0/conv_general_dilated", "Net/Conv_0/add", "Net/relu_0",
        "Net/reduce_window_max",
        "Net/Conv_1/conv_general_dilated", "Net/Conv_1/add", "Net/relu_1",
        "Net/reduce_window_sum", "Net/div",
        "Net/Dense_0/dot_general", "Net/Dense_0/add", "Net/relu_2",
        "Net/Dense_1/dot_general", "Net/Dense_1/add",
    ]  # fmt: skip
    _, graph = traced("lstm")
    steps = [name for name in graph.neurons() if "LSTMCell" in name]
    assert all(any(f"[{t}]" in name for t in range(5)) for name in steps)


def test_neurons_of_a_function_are_numbered_where_names_repeat():
    params = {"w": jnp.ones((2, 2))}
    graph = nns.trace(lambda p, x: (x @ p["w"]) @ p["w"], params, np.ones((1, 2), np.float32))
    assert list(graph.neurons()) == ["input", "dot_general_0", "dot_general_1"]


def axes(graph: nns.Graph) -> dict[str, int]:
    return {name: neuron.channel for name, neuron in graph.neurons().items()}


def test_channel_axes_of_images_with_channels_last():
    for name in ("lenet", "resnet", "vgg", "convolutions"):
        _, graph = traced(name)
        for key, neuron in graph.neurons().items():
            assert neuron.channel == max(len(neuron.shape) - 1, 0), (name, key)


def test_channel_axes_of_images_with_channels_first():
    _, graph = traced("channels_first")
    found = graph.neurons()
    for key in ("input", "conv_general_dilated", "add", "relu", "reduce_window_max"):
        assert len(found[key].shape) == 3 and found[key].channel == 0, key
    assert found["dot_general"].shape == (3,) and found["dot_general"].channel == 0


def test_channel_axes_follow_moved_data():
    def apply(p, x):
        x = jnp.exp(jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME"))
        last = jnp.sin(x.transpose(0, 2, 3, 1))
        positions_joined = jnp.tanh(x.reshape(x.shape[0], 4, 9))
        kept = jnp.cos(x.sum(axis=2))
        gone = jnp.sinh(x.sum(axis=1))
        flat = jnp.cosh(last.reshape(x.shape[0], -1))
        total = positions_joined.sum((1, 2)) + kept.sum((1, 2)) + gone.sum((1, 2)) + flat.sum(1)
        return jnp.stack([total, total], axis=1)

    params = {"kernel": jnp.ones((4, 2, 3, 3))}
    found = axes(nns.trace(apply, params, np.ones((1, 2, 3, 3), np.float32)))
    assert found["input"] == 0 and found["exp"] == 0
    assert found["sin"] == 2 and found["tanh"] == 0 and found["cos"] == 0
    assert found["sinh"] == 1  # without channels the last axis stands for them
    assert found["cosh"] == 0  # flat: each number is a unit


def test_the_batch_axis_is_left_out_wherever_it_stands():
    def alone(p, x):
        return p["second"] @ jax.nn.relu(p["first"] @ x + p["offset"])

    params = {"first": jnp.ones((5, 4)), "offset": jnp.ones(5), "second": jnp.ones((3, 5))}
    images = np.ones((2, 4), np.float32)
    graph = nns.trace(lambda p, x: jax.vmap(lambda s: alone(p, s))(x), params, images)
    assert [n.shape for n in graph.neurons().values()] == [(4,), (5,), (5,), (5,), (3,)]
    time_first = nns.trace(
        lambda p, x: jax.nn.relu(x.swapaxes(0, 1) @ p["first"])[-1], params, np.ones((2, 7, 5))
    )
    for name in ("dot_general", "relu"):
        assert time_first.neurons()[name].shape == (7, 4), name
        assert time_first.neurons()[name].channel == 1, name
    outs, activations = nns.evaluate(time_first, params, jnp.ones((3, 7, 5)))
    assert outs.shape == (3, 4) and activations["relu"].shape == (3, 7, 4)


def test_channel_axes_of_attention():
    _, graph = traced("attention")
    found = graph.neurons()
    scope = "Net/MultiHeadDotProductAttention_0"
    assert found["input"].channel == 1
    query = found[f"{scope}/query/dot_general"]
    assert query.shape == (5, 2, 2) and query.channel == 2
    out = found[f"{scope}/out/dot_general"]
    assert out.shape == (5, 4) and out.channel == 1


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "mlp", "lenet", "several_outputs"])
def test_a_final_softmax_is_cut_off(name):
    model, graph = traced(name)
    x = model.images(2)
    outs, activations = nns.evaluate(graph, model.params, x)
    (cut,) = [key for key, neuron in graph.neurons().items() if neuron.value == graph.logits]
    if name == "softmax":
        assert cut == "Net/Dense_0/add"
        np.testing.assert_allclose(outs, jax.nn.softmax(activations[cut]), rtol=1e-6)
    else:
        first = outs["logits"] if name == "several_outputs" else outs
        np.testing.assert_array_equal(first, activations[cut])


# Edits ------------------------------------------------------------------------------------


def test_edits_see_one_sample_and_replace_it():
    model, graph = traced("lenet")
    x = model.images(3)
    seen = []

    def first_channel_only(activation):
        seen.append(activation.shape)
        return activation.at[..., 1:].set(0.0)

    outs, activations = nns.evaluate(
        graph, model.params, x, edits={"Net/relu_0": first_channel_only}
    )
    assert seen == [(8, 8, 4)]
    _, before = nns.evaluate(graph, model.params, x)
    np.testing.assert_array_equal(activations["Net/relu_0"][..., 1:], 0.0)
    np.testing.assert_array_equal(activations["Net/relu_0"][..., 0], before["Net/relu_0"][..., 0])
    p = jax.tree.map(lambda a: a, model.params)
    p["params"]["Conv_1"]["kernel"] = p["params"]["Conv_1"]["kernel"].at[:, :, 1:].set(0.0)
    np.testing.assert_allclose(outs, model.apply(p, x), rtol=1e-5, atol=1e-5)


def test_an_edit_of_the_input_is_another_input():
    model, graph = traced("resnet")
    x = model.images(2)
    outs, _ = nns.evaluate(graph, model.params, x, edits={"input": lambda a: 2.0 * a[::-1]})
    np.testing.assert_allclose(outs, model.apply(model.params, 2.0 * x[:, ::-1]), rtol=1e-4,
                               atol=1e-4)  # fmt: skip


def test_edits_are_differentiable():
    def gated(p, gate, x):
        return (gate[None] * jax.nn.relu(x @ p["first"])) @ p["second"]

    params = {"first": jnp.arange(12.0).reshape(3, 4) - 5.0, "second": jnp.ones((4, 2))}
    graph = nns.trace(lambda p, x: gated(p, jnp.ones(4), x), params, np.ones((1, 3), np.float32))
    x = jnp.array([[1.0, -2.0, 0.5], [0.3, 0.4, 1.0]])
    gate = jnp.array([1.0, 0.5, 0.0, -2.0])

    @jax.jit
    def ours(gate, x):
        return nns.evaluate(graph, params, x, edits={"relu": lambda a: a * gate})[0].sum()

    theirs = jax.jit(lambda gate, x: gated(params, gate, x).sum())
    np.testing.assert_allclose(ours(gate, x), theirs(gate, x), rtol=1e-6)
    for argument in (0, 1):
        np.testing.assert_allclose(
            jax.grad(ours, argument)(gate, x), jax.grad(theirs, argument)(gate, x), rtol=1e-6
        )


def test_derivatives_of_pooling_inside_a_model():
    def pooled(x):
        return nn.max_pool(x, (2, 2), (2, 2))

    def backwards(p, x):
        return jax.grad(lambda x: (pooled(x) ** 2).sum())(x).reshape(len(x), -1) @ p

    def forwards(p, x):
        return jax.jvp(pooled, (x,), (jnp.ones_like(x),))[1].reshape(len(x), -1) @ p[:8]

    x = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
    p = jax.random.normal(jax.random.key(1), (32, 3))
    for apply in (backwards, forwards):
        graph = nns.trace(apply, p, x[:1])
        for size in (1, 3):
            found, _ = nns.evaluate(graph, p, x[:size])
            np.testing.assert_allclose(found, apply(p, x[:size]), rtol=1e-5, atol=1e-6)


def test_a_constant_is_computed_once():
    def apply(p, x):
        index = jnp.int32(0)
        for _ in range(40):
            index = index + index
        return jax.lax.switch(index, [jnp.sin, jnp.cos], x) @ p

    # Each addition read twice would take 2 ** 40 additions.
    graph = nns.trace(apply, jnp.ones((3, 2)), jnp.ones((1, 3)))
    assert any("sin" in name for name in graph.neurons())


def test_edits_inside_a_custom_derivative_show():
    model, graph = traced("custom_vjp")
    x = model.images(2)
    inside = [name for name in graph.neurons() if name.startswith("dot_general")]
    base, _ = nns.evaluate(graph, model.params, x)
    for name in inside:
        outs, activations = nns.evaluate(graph, model.params, x, edits={name: jnp.zeros_like})
        np.testing.assert_array_equal(activations[name], 0.0)
        assert not np.allclose(outs, base), name


@pytest.mark.parametrize("name", ["lenet", "attention", "custom_jvp"])
def test_every_neuron_can_be_edited(name):
    model, graph = traced(name)
    x = model.images(2)
    seen = []

    def same(key):
        def edit(activation):
            seen.append((key, activation.shape))
            return activation

        return edit

    edits = {key: same(key) for key in graph.neurons()}
    outs = jax.jit(lambda p, x: nns.evaluate(graph, p, x, edits=edits)[0])(model.params, x)
    assert_close(outs, model.apply(model.params, x))
    assert seen == [(key, neuron.shape) for key, neuron in graph.neurons().items()]


def test_a_constant_that_weights_each_channel_alone_leaves_it_in_front():
    # Channels are a batch axis of the product, whichever side the constant is on.
    weights = np.ones((3, 5, 2), np.float32)

    def apply(params, x):
        x = x @ params
        one = jnp.einsum("btc,cts->bcs", x, weights)
        other = jnp.einsum("cts,btc->cbs", weights, jnp.cos(x))
        return jnp.sinh(one).sum((1, 2), keepdims=True)[:, 0] + jnp.tanh(other).sum((0, 2))[:, None]

    graph = nns.trace(apply, jnp.ones((4, 3)), jnp.ones((1, 5, 4)))
    for name in ("sinh", "tanh"):
        neuron = graph.neurons()[name]
        assert neuron.shape == (3, 2) and neuron.channel == 0, name
