"""The benchmark of robust pruning: its steps are those of training, its rows fit the schema."""

import jax
import numpy as np
import pytest

from experiments import bench_hydra as bench
from experiments import record, torch_steps
from prune import stages
from prune.objectives import OBJECTIVES
from tests.test_models import example
from tests.tiny import Tiny, data


@pytest.fixture(scope="module")
def case():
    network = stages.network_of(Tiny(), data())
    variables = network.initialize(jax.random.key(0))
    return bench.Case("tiny", network, variables, data().train_images[:8], data().train_labels[:8])


def test_every_objective_is_timed():
    assert {kind.objective for kind in bench.KINDS.values()} == set(OBJECTIVES)
    assert all(name.split(",")[0] == kind.objective for name, kind in bench.KINDS.items())
    assert set(torch_steps.OBJECTIVES) == {k.objective for k in bench.KINDS.values() if k.reference}


@pytest.mark.parametrize("what", ["plain", "masked", "scores"])
def test_a_step_goes_on_from_where_it_was(case, what, monkeypatch):
    # Less than half leaves nothing of a network so small.
    monkeypatch.setattr(bench, "KEEP", 0.5)
    call = bench.make_step(case, bench.KINDS["natural"], what)
    losses = [float(call()) for _ in range(4)]
    assert len(set(losses)) == 4 and losses == sorted(losses, reverse=True)


def test_rows_fit_the_schema(case, monkeypatch):
    monkeypatch.setattr("experiments.bench_graph._SECONDS", 0.0)
    rows = bench.measure(case, "smoothing", 2, 0, torch=False)
    rows += bench.certification(case, 2, 30, 0)
    about = {"command": "x", "data": "noise", "seeds": (0,), "commit": "unknown", "hardware": "x"}
    made = [record.Row(study="bench_hydra", **row, **about) for row in rows]
    assert [row.metric for row in made] == [
        "step", "step with scores / step", "step under a mask / step", "step / natural step",
        "noisy images, threefry2x32", "noisy images, unsafe_rbg",
    ]  # fmt: skip
    assert all(row.ours > 0 for row in made)
    assert bench._target(1.1, 1.1, "times") == "target at most 1.1 times, met"
    assert bench._target(1.2, 1.1, "times").endswith("missed")


def test_an_unknown_network_is_told():
    with pytest.raises(ValueError, match="model: 'none' is unknown"):
        bench.prepare("none", 2, 0)


# Beside PyTorch -------------------------------------------------------------------------------


def _natural(variables, apply, images, labels):
    logits = apply(variables, images)
    return float(-jax.nn.log_softmax(logits)[np.arange(len(labels)), labels].mean())


def test_steps_in_pytorch_are_of_the_same_network(monkeypatch):
    pytest.importorskip("torch", reason="needs torch: pip install -e .[bench]")
    model, variables, images = example("cnn_small")
    labels = np.arange(len(images)).astype(np.int32) % 10
    network = bench.twin(bench.TWINS["cnn_small"], model, variables)
    run = torch_steps.make_step
    first = run(network, "natural", images, labels)
    expected = _natural(variables, jax.jit(model.apply), images, labels)
    assert first() == pytest.approx(expected, rel=1e-3)
    assert first() < expected
    for objective in torch_steps.OBJECTIVES:
        assert np.isfinite(run(network, objective, images, labels)())
    # At the rate that is timed, one step may leave the same weights chosen.
    monkeypatch.setattr(torch_steps, "_RATE", 0.1)
    scored = run(network, "natural", images, labels, keep=0.5)
    kept = [kernel.detach().numpy().copy() for kernel in network.kernels]
    assert scored() != scored()
    for before, kernel in zip(kept, network.kernels, strict=True):
        np.testing.assert_array_equal(kernel.detach().numpy(), before)
