"""One device or four: the same numbers."""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import nnslicer_jax as nns
from nnslicer_jax import batches, slicing
from tests import nets


@functools.cache
def traced():
    """A network in whole numbers, so that every order of summing gives the same."""
    case = nets.EXACT["conv_same_strided"]()
    return case, nns.trace(case.apply, case.params, case.images(1)), case.images(8)


@pytest.fixture(autouse=True)
def four_devices():
    if jax.local_device_count() != 4:
        pytest.skip("needs four local devices")


@pytest.fixture
def on_four(monkeypatch):
    """Runs something as on a machine whose four devices are no CPU's."""

    def run(call):
        with monkeypatch.context() as patch:
            for module in (batches, slicing):
                patch.setattr(module, "devices", jax.local_devices)
            return call()

    return run


def assert_equal(one: nns.Slice, other: nns.Slice) -> None:
    assert one.count == other.count
    for ours, theirs in ((one.synapses, other.synapses), (one.neurons, other.neurons)):
        assert set(ours) == set(theirs)
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


# Sums over virtual CPU devices can wait for each other for ever on a loaded machine.
@pytest.mark.parametrize(
    "per_sample", [pytest.param(False, marks=pytest.mark.slow), pytest.param(True)]
)
def test_slices_are_the_same(on_four, per_sample):
    case, graph, images = traced()
    profile = nns.profile(graph, case.params, images)

    def run(size: int) -> nns.Slice:
        return nns.slice_network(
            graph, case.params, profile, images[:7], theta=0.25, select="device",
            batch_size=size, per_sample=per_sample,
        )  # fmt: skip

    alone = run(8)
    assert alone.size()[0] > 0
    assert_equal(on_four(lambda: run(4)), alone)  # the last batch is filled up
    assert_equal(on_four(lambda: run(3)), alone)  # not divisible among four


@pytest.mark.slow
def test_effective_paths_are_the_same(on_four):
    case, graph, images = traced()

    def run() -> nns.Slice:
        return nns.effective_path(graph, case.params, images, batch_size=4, select="device")

    alone = run()
    assert alone.size()[0] > 0
    assert_equal(on_four(run), alone)


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["channel", "position"])
def test_profiles_are_the_same(on_four, baseline):
    case, graph, images = traced()

    def run(images) -> nns.Profile:
        return nns.profile(graph, case.params, images, baseline, batch_size=4)

    alone, shared = run(images), on_four(lambda: run(images))
    mesh = Mesh(np.array(jax.devices()[:4]), ("batch",))
    spread = run(jax.device_put(images, NamedSharding(mesh, PartitionSpec("batch"))))
    for found in (shared, spread):
        assert found.count == alone.count == 8
        for name, mean in alone.means.items():
            np.testing.assert_array_equal(found.means[name], mean, err_msg=name)


def test_evaluation_is_the_same():
    case, graph, images = traced()
    mesh = Mesh(np.array(jax.devices()[:4]), ("batch",))
    spread = jax.device_put(images, NamedSharding(mesh, PartitionSpec("batch")))
    run = jax.jit(lambda p, x: nns.evaluate(graph, p, x))
    outs, activations = run(case.params, spread)
    alone, expected = run(case.params, images)
    assert len(outs.sharding.device_set) == 4
    np.testing.assert_array_equal(outs, alone)
    for name, activation in expected.items():
        np.testing.assert_array_equal(activations[name], activation)


_MANY = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
import nnslicer_jax as nns
rng = np.random.default_rng(0)
params = {"a": rng.normal(size=(600, 300)), "b": rng.normal(size=(300, 10))}
params = {name: value.astype("f") for name, value in params.items()}
images = rng.normal(size=(64, 600)).astype("f")
graph = nns.trace(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], params, images[:1])
profile = nns.profile(graph, params, images)
for _ in range(3):
    piece = nns.slice_network(graph, params, profile, images, batch_size=16, select="host")
print(piece.count)
"""


def test_host_selection_from_four_devices_does_not_lock_up():
    # Callbacks of several devices wait for each other where one of them waits for a device.
    found = subprocess.run(
        [sys.executable, "-c", _MANY],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert found.stdout.strip() == "64", found.stderr[-500:]
