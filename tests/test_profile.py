"""Mean activations, against NumPy in float64."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import nnslicer_jax as nns
from tests import nets, zoo

COUNT = 11


@functools.cache
def traced(name: str):
    """A model of the zoo with its graph, some images and every activation on them."""
    model = zoo.model(name)
    graph = nns.trace(model.apply, model.params, model.images(1))
    images = model.images(COUNT)
    _, activations = jax.jit(lambda p, x: nns.evaluate(graph, p, x))(model.params, images)
    return model, graph, images, jax.device_get(activations)


def means(graph: nns.Graph, activations, baseline: str) -> dict[str, np.ndarray]:
    found = {}
    for name, neuron in graph.neurons().items():
        axes: tuple[int, ...] = (0,)
        if baseline == "channel":
            axes = tuple(a for a in range(len(neuron.shape) + 1) if a != neuron.channel + 1)
        found[name] = activations[name].astype(np.float64).mean(axes)
    return found


def assert_means(found: nns.Profile, expected: dict[str, np.ndarray]) -> None:
    assert set(found.means) == set(expected)
    for name, mean in expected.items():
        assert found.means[name].shape == mean.shape, name
        assert found.means[name].dtype == np.float32
        scale = max(1.0, float(np.abs(mean).max(initial=0)))
        np.testing.assert_allclose(found.means[name], mean, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("baseline", ["channel", "position"])
@pytest.mark.parametrize("name", ["lenet", "channels_first", "attention", "gru", "bytes"])
def test_means_equal_numpys(name, baseline):
    model, graph, images, activations = traced(name)
    found = nns.profile(graph, model.params, images, baseline=baseline)
    assert_means(found, means(graph, activations, baseline))
    assert found.count == COUNT and found.baseline == baseline
    assert found.low == float(images.min()) and found.high == float(images.max())


@pytest.mark.parametrize("baseline", ["channel", "position"])
def test_batches_do_not_change_the_means(baseline):
    model, graph, images, activations = traced("lenet")
    expected = means(graph, activations, baseline)
    for size in (1, 4, COUNT, 256):  # 4 leaves an uneven last batch
        found = nns.profile(graph, model.params, images, baseline, batch_size=size)
        assert found.count == COUNT
        assert_means(found, expected)
    parts = [images[:4], images[4:5], images[5:]]
    for source in (parts, iter(parts), (jnp.asarray(part) for part in parts)):
        found = nns.profile(graph, model.params, source, baseline, batch_size=4)
        assert found.count == COUNT
        assert found.low == float(images.min()) and found.high == float(images.max())
        assert_means(found, expected)


def test_whole_numbers_are_exact():
    case = nets.EXACT["lenet"]()
    graph = nns.trace(case.apply, case.params, case.images(1))
    images = case.images(8)
    _, activations = nns.evaluate(graph, case.params, images)
    for baseline in ("channel", "position"):
        expected = means(graph, jax.device_get(activations), baseline)
        for size in (1, 2, 4, 8):
            found = nns.profile(graph, case.params, images, baseline, batch_size=size)
            for name, mean in expected.items():
                if baseline == "position" or 2 ** int(np.log2(mean.size)) == mean.size:
                    np.testing.assert_allclose(found.means[name], mean, rtol=2e-7, err_msg=name)


def shift(p, x):
    return x + p["shift"]


@pytest.mark.parametrize("size", [256, 100_000])
def test_a_large_offset_costs_no_precision(size):
    # Near 1e4 neighbouring float32 lie 1e-3 apart; a plain running sum of 100,000 is off by 100s.
    rng = np.random.default_rng(0)
    images = (1e4 + rng.normal(size=(100_000, 3))).astype(np.float32)
    params = {"shift": jnp.zeros((1, 3))}
    graph = nns.trace(shift, params, images[:1])
    for baseline in ("channel", "position"):
        found = nns.profile(graph, params, images, baseline, batch_size=size)
        exact = images.astype(np.float64).mean(0)
        for mean in found.means.values():
            np.testing.assert_allclose(mean, exact, rtol=0, atol=1.5e-3)


def test_many_positions_cost_no_precision():
    rng = np.random.default_rng(0)
    images = (100 + rng.normal(size=(2, 256, 256, 1))).astype(np.float32)
    params = {"shift": jnp.zeros((1, 1, 1, 1))}
    graph = nns.trace(shift, params, images[:1])
    found = nns.profile(graph, params, images)
    exact = images.astype(np.float64).mean((0, 1, 2))
    for mean in found.means.values():
        np.testing.assert_allclose(mean, exact, rtol=2e-7)


@pytest.mark.parametrize("baseline", ["channel", "position"])
@pytest.mark.parametrize("size", [1, 7, 64, 100])
def test_what_never_changes_has_its_value_as_mean(baseline, size):
    # Else its delta would be rounding error, whose sign means nothing.
    rng = np.random.default_rng(0)
    images = np.broadcast_to(rng.normal(size=(1, 1, 1, 5)), (100, 3, 3, 5)).astype(np.float32)
    params = {"shift": jnp.full((1, 1, 1, 1), 0.1)}
    graph = nns.trace(shift, params, images[:1])
    found = nns.profile(graph, params, images, baseline, batch_size=size)
    _, activations = nns.evaluate(graph, params, images[:1])
    for name, mean in found.means.items():
        value = np.asarray(activations[name])[0]
        np.testing.assert_array_equal(mean, value if baseline == "position" else value[0, 0])


def test_a_profile_is_reproducible():
    model, graph, images, _ = traced("lenet")
    one, other = (nns.profile(graph, model.params, images, batch_size=4) for _ in range(2))
    for name, mean in one.means.items():
        np.testing.assert_array_equal(mean, other.means[name])


def test_a_profile_is_saved_and_loaded(tmp_path):
    model, graph, images, _ = traced("lenet")
    found = nns.profile(graph, model.params, images)
    found.save(tmp_path / "means.safetensors")
    again = nns.load_profile(tmp_path / "means.safetensors")
    assert (again.baseline, again.count, again.low, again.high) == (
        found.baseline,
        found.count,
        found.low,
        found.high,
    )
    for name, mean in found.means.items():
        np.testing.assert_array_equal(again.means[name], mean)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "means.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match="cut.safetensors"):
        nns.load_profile(tmp_path / "cut.safetensors")


def test_a_profile_with_a_false_header_is_refused(tmp_path):
    path = tmp_path / "false.safetensors"
    whole = {"baseline": "channel", "count": 1, "low": 0.0, "high": 1.0}
    arrays = {"input": np.zeros(3, np.float32)}
    save_file(arrays, path, {"profile": json.dumps(whole)})
    assert nns.load_profile(path).count == 1
    for wrong in ({"count": 0}, {"count": "1"}, {"low": None}, {"baseline": "layer"}, {"more": 1}):
        save_file(arrays, path, {"profile": json.dumps({**whole, **wrong})})
        with pytest.raises(ValueError, match="false.safetensors") as caught:
            nns.load_profile(path)
        assert "\n" not in str(caught.value)


def test_profiles_of_two_shares_add_up():
    model, graph, images, activations = traced("lenet")
    shares = [nns.profile(graph, model.params, part) for part in (images[:3], images[3:])]
    for whole in (shares[0] + shares[1], shares[1] + shares[0]):
        assert whole.count == COUNT
        assert (whole.low, whole.high) == (float(images.min()), float(images.max()))
        assert_means(whole, means(graph, activations, "channel"))
    with pytest.raises(ValueError, match="baselines"):
        shares[0] + nns.profile(graph, model.params, images, "position")


@pytest.mark.parametrize("baseline", ["channel", "position"])
def test_a_shift_that_cancels_keeps_the_mean(baseline):
    # What shifts and scales another neuron takes its deviations, not its rounded mean.
    rng = np.random.default_rng(0)
    images = (1e4 + rng.integers(0, 4, (64, 3, 3, 2)) / 1024).astype(np.float32)
    params = {"shift": jnp.float32(1e4), "scale": jnp.array([1e3, -2.0]).reshape(1, 1, 1, 2)}

    def apply(p, x):
        return (-(5 - (x - p["shift"]) * p["scale"] / 3.0)).reshape(x.shape[0], -1)

    graph = nns.trace(apply, params, images)
    found = nns.profile(graph, params, images, baseline, batch_size=24)
    _, activations = nns.evaluate(graph, params, images)
    for name, activation in activations.items():
        activation = np.asarray(activation, np.float64)
        axes = 0 if baseline == "position" else tuple(range(activation.ndim - 1))
        mean = activation.mean(axes)
        np.testing.assert_allclose(found.means[name], mean, atol=1e-6 * np.abs(mean).max())
