"""Models that were not written in Flax linen: traced, run and sliced all the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nnslicer_jax as nns

# Two dense layers and their biases, in whole numbers: every framework must slice them alike.
RNG = np.random.default_rng(0)
FIRST = RNG.integers(-2, 3, (6, 8)).astype(np.float32)
SECOND = RNG.integers(-2, 3, (8, 4)).astype(np.float32)
OFFSETS = [RNG.integers(-2, 3, n).astype(np.float32) for n in (8, 4)]
IMAGES = RNG.integers(-3, 4, (4, 6)).astype(np.float32)
PICTURES = RNG.normal(size=(3, 6, 6, 2)).astype(np.float32)


def sliced(apply, params, images=IMAGES, theta=0.0) -> nns.Slice:
    graph = nns.trace(apply, params, images[:1])
    profile = nns.profile(graph, params, images)
    return nns.slice_network(graph, params, profile, images, theta=theta)


def assert_runs(apply, params, images) -> nns.Graph:
    """The graph computes the model, values and gradients, and slices."""
    graph = nns.trace(apply, params, images[:1])
    x = jnp.asarray(images)
    expected = apply(params, x)
    outs, _ = nns.evaluate(graph, params, x)
    np.testing.assert_allclose(outs, expected, rtol=1e-4, atol=1e-5)

    def loss(logits):
        return jnp.sum(jnp.sin(jnp.arange(logits.size) + 1.0).reshape(logits.shape) * logits)

    ours = jax.jit(jax.grad(lambda p: loss(nns.evaluate(graph, p, x)[0])))(params)
    theirs = jax.jit(jax.grad(lambda p: loss(apply(p, x))))(params)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    piece = sliced(apply, params, images, theta=0.2)
    kept, total = piece.size()
    assert 0 < kept < total
    assert any(np.any(contrib) for contrib in piece.channels().values())
    return graph


def reference() -> nns.Slice:
    """The slice of the two dense layers written as a plain function."""

    def apply(p, x):
        x = jax.nn.relu(x @ p["first"] + OFFSETS[0][None])
        return x @ p["second"] + OFFSETS[1][None]

    return sliced(apply, {"first": jnp.asarray(FIRST), "second": jnp.asarray(SECOND)})


def assert_sliced_alike(piece: nns.Slice, first: str, second: str, transposed=False) -> None:
    expected = reference()
    assert expected.size()[0] > 20
    for name, key in ((first, "first"), (second, "second")):
        found = piece.synapses[name]
        np.testing.assert_array_equal(found.T if transposed else found, expected.synapses[key])
    np.testing.assert_array_equal(piece.neurons["input"], expected.neurons["input"])


def test_linen():
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(8)(x))
            return nn.Dense(4)(x)

    params = {
        "params": {
            f"Dense_{i}": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(OFFSETS[i])}
            for i, kernel in enumerate((FIRST, SECOND))
        }
    }
    piece = sliced(Net().apply, params)
    assert_sliced_alike(piece, "params/Dense_0/kernel", "params/Dense_1/kernel")


# Flax NNX ---------------------------------------------------------------------------------


class NnxPictures(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.dense = nnx.Linear(36, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), (2, 2))
        return self.dense(x.reshape(x.shape[0], -1))


class NnxDense(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.second = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def of_nnx(module):
    definition, state = nnx.split(module)
    return (lambda state, x: nnx.merge(definition, state)(x)), state


def test_nnx():
    apply, state = of_nnx(NnxPictures(nnx.Rngs(0)))
    graph = assert_runs(apply, state, PICTURES)
    assert graph.neurons()["input"].channel == 2

    module = NnxDense(nnx.Rngs(0))
    layers = (module.first, module.second)
    for layer, kernel, offset in zip(layers, (FIRST, SECOND), OFFSETS, strict=True):
        layer.kernel[...] = jnp.asarray(kernel)
        layer.bias[...] = jnp.asarray(offset)
    piece = sliced(*of_nnx(module))
    first, second = (
        next(name for name in piece.synapses if part in name and "kernel" in name)
        for part in ("first", "second")
    )
    assert_sliced_alike(piece, first, second)


# Equinox ----------------------------------------------------------------------------------


def test_equinox():
    eqx = pytest.importorskip("equinox")

    def of_equinox(module):
        arrays, static = eqx.partition(module, eqx.is_array)
        return (lambda arrays, x: jax.vmap(eqx.combine(arrays, static))(x)), arrays

    keys = jax.random.split(jax.random.key(0), 2)
    pictures = eqx.nn.Sequential([
        eqx.nn.Conv2d(2, 4, 3, padding=1, key=keys[0]),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.MaxPool2d(2, 2),
        eqx.nn.Lambda(jnp.ravel),
        eqx.nn.Linear(36, 3, key=keys[1]),
    ])  # fmt: skip
    graph = assert_runs(*of_equinox(pictures), PICTURES.transpose(0, 3, 1, 2))
    for name, neuron in graph.neurons().items():
        if len(neuron.shape) == 3:
            assert neuron.channel == 0, name
    assert graph.neurons()["input"].shape == (2, 6, 6)

    dense = eqx.nn.MLP(6, 4, 8, 1, key=keys[0])
    dense = eqx.tree_at(
        lambda m: [m.layers[0].weight, m.layers[0].bias, m.layers[1].weight, m.layers[1].bias],
        dense,
        [jnp.asarray(a) for a in (FIRST.T, OFFSETS[0], SECOND.T, OFFSETS[1])],
    )
    piece = sliced(*of_equinox(dense))
    first, second = (name for name in piece.synapses if name.endswith("weight"))
    assert_sliced_alike(piece, first, second, transposed=True)


# Haiku ------------------------------------------------------------------------------------


def test_haiku():
    hk = pytest.importorskip("haiku")

    def pictures(x):
        x = jax.nn.relu(hk.Conv2D(4, 3)(x))
        x = hk.MaxPool((1, 2, 2, 1), (1, 2, 2, 1), "VALID")(x)
        return hk.Linear(3)(hk.Flatten()(x))

    def of_haiku(f, images):
        model = hk.without_apply_rng(hk.transform(f))
        return model.apply, model.init(jax.random.key(0), images)

    # Haiku adds its biases by broadcasting over ranks.
    with jax.numpy_rank_promotion("allow"):
        assert_runs(*of_haiku(pictures, PICTURES), PICTURES)
        dense = hk.Linear
        apply, params = of_haiku(lambda x: dense(4)(jax.nn.relu(dense(8)(x))), IMAGES)
        shapes = {key: layer["w"].shape for key, layer in params.items()}
        first, second = (
            next(key for key, shape in shapes.items() if shape == kernel.shape)
            for kernel in (FIRST, SECOND)
        )
        params = {
            key: {"w": jnp.asarray(kernel), "b": jnp.asarray(offset)}
            for key, kernel, offset in zip((first, second), (FIRST, SECOND), OFFSETS, strict=True)
        }
        piece = sliced(apply, params)
    assert_sliced_alike(piece, f"{first}/w", f"{second}/w")


# Keras 3 ----------------------------------------------------------------------------------


@pytest.fixture
def keras(monkeypatch, tmp_path):
    """Keras on JAX, with its settings in a folder of its own."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    module = pytest.importorskip("keras")
    if module.backend.backend() != "jax":
        pytest.skip(f"Keras runs on {module.backend.backend()} here")
    return module


def of_keras(model):
    fixed = [v.value for v in model.non_trainable_variables]
    trainable = {v.path: v.value for v in model.trainable_variables}

    def apply(params, x):
        return model.stateless_call(list(params.values()), fixed, x, training=False)[0]

    # A pytree's dictionary is in order of its keys, Keras's list in that of its layers.
    order = list(trainable)

    def ordered(params, x):
        return apply({key: params[key] for key in order}, x)

    return ordered, trainable


def test_keras(keras):
    # Keras broadcasts over ranks.
    with jax.numpy_rank_promotion("allow"):
        pictures = keras.Sequential([
            keras.layers.Input((6, 6, 2)),
            keras.layers.Conv2D(4, 3, padding="same", activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.MaxPooling2D(2),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ])  # fmt: skip
        assert_runs(*of_keras(pictures), PICTURES)
        ends_in_softmax = keras.Sequential([
            keras.layers.Input((6,)),
            keras.layers.Dense(8, activation="relu", name="first"),
            keras.layers.Dense(4, activation="softmax", name="second"),
        ])  # fmt: skip
        ends_in_softmax.set_weights([FIRST, OFFSETS[0], SECOND, OFFSETS[1]])
        apply, params = of_keras(ends_in_softmax)
        piece = sliced(apply, params)
        first, second = (
            next(key for key in params if part in key and "kernel" in key)
            for part in ("first", "second")
        )
    # The softmax is left out, so the slice is that of the logits.
    assert_sliced_alike(piece, first, second)
