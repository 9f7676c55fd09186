"""Stages: one step restated, exact resumption, and runs that go wrong."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnslicer_jax import checkpoint
from prune import stages
from prune.objectives import OBJECTIVES, Plan
from prune.objectives.network import statistics
from prune.stages import Run, Stage
from tests.tiny import NATURAL, RUN, Killed, Tiny, data, dies_at


@functools.cache
def network():
    return stages.network_of(Tiny(), data())


@functools.cache
def first():
    return network().initialize(jax.random.key(1))


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


@dataclasses.dataclass(frozen=True)
class Doubled(stages.Whole):
    """Parameters twice what is trained, a penalty, and something renewed."""

    def effective(self, trained, fixed):
        return jax.tree.map(lambda p: 2 * p, trained)

    def penalty(self, trained, fixed, epoch):
        return (epoch + 1) * fixed["weight"] * sum(p.sum() for p in jax.tree.leaves(trained))

    def renewed(self, trained, fixed, epoch):
        return trained, {"weight": fixed["weight"] + 10 ** epoch.astype("float32")}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_step_is_the_optimisers_on_what_is_trained(optimizer):
    stage = dataclasses.replace(NATURAL, optimizer=optimizer, weight_decay=0.01)
    plan = Plan(8, epoch_steps=5, epochs=2)
    params = first()["params"]
    images, labels = data().train_images[:8], data().train_labels[:8]

    def loss(p):
        variables = {"params": jax.tree.map(lambda x: 2 * x, p), **statistics(first())}
        logits, _ = Tiny().apply(
            variables, images / np.float32(255), train=True, mutable=["batch_stats"]
        )
        picked = jax.nn.log_softmax(logits)[np.arange(8), labels]
        return -picked.mean() + 3.0 * sum(x.sum() for x in jax.tree.leaves(p))

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)

    def moved(p, g):
        g = g + 0.01 * p
        # Momentum starts at 0; Adam's first step is the sign, softened.
        return p - 0.05 * (g if optimizer == "sgd" else g / (jnp.abs(g) + 1e-8))

    state = stages.StageState(
        jnp.zeros((), jnp.int32), jax.tree.map(jnp.array, params), {"weight": jnp.float32(3)},
        jax.tree.map(jnp.array, statistics(first())), stages.optimizer(stage, 10).init(params),
        OBJECTIVES["natural"].init(network(), plan),
    )  # fmt: skip
    step = stages.make_step(network(), stage, plan, Doubled())
    state, info = step(state, jax.random.key(0), images, labels)
    np.testing.assert_allclose(info.loss, value, rtol=1e-5)
    assert bool(info.finite) and int(state.step) == 1
    expected = jax.tree.map(moved, params, gradient)
    for ours, theirs in zip(jax.tree.leaves(state.trained), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def _free(name, folder=None, dataset=None):
    """A run whose objective carries state, whose batches are replayed, and that is renewed."""
    stage = Stage("free", {"eps": 0.1, "replays": 2}, epochs=2, batch_size=16, learning_rate=0.05,
                  crop=1, flip=True)  # fmt: skip
    return stages.fit(
        network(), dataset or data(), stage, first()["params"], statistics(first()), name=name,
        method=Doubled(), fixed={"weight": jnp.float32(0.01)},
        run=Run(seed=3, folder=folder, save_every=3, log_every=2),
    )  # fmt: skip


@functools.cache
def uninterrupted():
    return _free("free")


def test_a_killed_run_ends_in_the_same_weights(tmp_path):
    # Two batches an epoch, each twice: eight steps.
    for reads in (1, 4, 2):
        with pytest.raises(Killed):
            _free("free", tmp_path, dies_at(data(), reads))
    assert_same(_free("free", tmp_path), uninterrupted())
    # A finished run is only read again.
    assert_same(_free("free", tmp_path, dies_at(data(), 0)), uninterrupted())
    assert checkpoint.steps(tmp_path / "free")[-1] == 8


def test_the_method_is_renewed_after_every_epoch():
    _, fixed, _ = uninterrupted()
    np.testing.assert_allclose(fixed["weight"], 0.01 + 1 + 10, rtol=1e-6)


def test_draws_are_of_the_seed_and_the_stage():
    other, _, _ = _free("other")
    same, _, _ = uninterrupted()
    assert any(
        (a != b).any() for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(same), strict=True)
    )


def test_a_folder_belongs_to_one_run(tmp_path):
    run = Run(seed=3, folder=tmp_path)
    stages.pretrain(network(), data(), dataclasses.replace(NATURAL, epochs=1), run=run)
    with pytest.raises(ValueError, match="another run, stage was"):
        stages.pretrain(network(), data(), NATURAL, run=run)


class Fragile(nn.Module):
    """NaN for images that are white somewhere."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = x.reshape((x.shape[0], -1))
        return nn.Dense(3)(jnp.where(x > 0.999, jnp.nan, x))


def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(tmp_path):
    images = data().train_images.copy()
    images[11] = 255
    made = stages.network_of(Fragile(), data())
    dataset = data()._replace(train_images=images)
    run = Run(seed=0, folder=tmp_path, save_every=1)
    with pytest.raises(FloatingPointError) as caught:
        stages.pretrain(made, dataset, NATURAL, run=run)
    kept = checkpoint.steps(tmp_path / "pretrain")
    said = str(caught.value)
    # The one white image comes once an epoch; the first time ends the run.
    step = int(said.split("at step ")[1].split()[0])
    assert step < 5 and (kept[-1] if kept else 0) == step
    where = f"the checkpoint of step {step}" if kept else "no checkpoint"
    assert said == (
        f"pretrain: loss nan or a weight is not finite at step {step} (epoch 0) under the "
        f"objective natural; {where} is kept"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"objective": "fgsm"}, "objective must be one of crown_ibp, free, mixtrain, natural, pgd, "
                                "smoothing, trades, not 'fgsm'"),
        ({"epochs": 0}, "epochs must be a whole number, at least 1, not 0"),
        ({"learning_rate": 0}, "learning_rate must be above 0, not 0"),
        ({"optimizer": "lion"}, "optimizer must be adam or sgd, not 'lion'"),
        ({"momentum": 1}, "momentum must be 0 to below 1, not 1"),
    ],
)  # fmt: skip
def test_stages_out_of_range(options, said):
    with pytest.raises(ValueError) as caught:
        Stage(**options)
    assert str(caught.value) == said


def test_an_option_that_the_objective_lacks_is_named():
    stage = dataclasses.replace(NATURAL, objective="pgd", options={"sigma": 1})
    with pytest.raises(ValueError, match="^options of pgd: .*'sigma'$"):
        stages.pretrain(network(), data(), stage, run=RUN)


def test_empty_sets():
    none = data()._replace(train_images=data().train_images[:0], train_labels=np.zeros(0, "i4"))
    with pytest.raises(ValueError, match="tiny: has no training images"):
        stages.pretrain(network(), none, NATURAL, run=RUN)


@pytest.mark.parametrize("name", ["epochs", "batch_size"])
def test_counts_of_a_stage_are_whole(name):
    with pytest.raises(ValueError, match=f"{name} must be a whole number, at least 1, not 1.5"):
        Stage(**{name: 1.5})
    assert getattr(Stage(**{name: np.int64(2)}), name) == 2


def test_options_may_be_numbers_of_arrays(tmp_path):
    stage = Stage("pgd", {"eps": np.float32(0.5), "steps": jnp.int32(2)}, epochs=1, batch_size=20)
    assert dict(stage.options) == {"eps": 0.5, "steps": 2}
    stages.pretrain(network(), data(), stage, run=Run(folder=tmp_path))
    wrong = dataclasses.replace(stage, options={"steps": 2.7})
    with pytest.raises(ValueError, match="steps must be a whole number"):
        stages.pretrain(network(), data(), wrong)
