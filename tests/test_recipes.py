"""The published recipes on the published networks: 200 steps a stage learn, and survive kills."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from experiments import robust_pruning
from nnslicer_jax import data, models
from prune import hydra, masks, stages
from prune.objectives import losses
from prune.stages import Run
from tests.test_stages import assert_same
from tests.tiny import Killed, dies_at

STEPS = 200
# Network, objective, images a batch, and of the objective's options those that are less than
# published, as a step then shows as much.
CASES = (
    ("vgg16", "trades", 8, {"steps": 1}),
    ("wrn28_4", "trades", 8, {"steps": 1}),
    ("wrn28_10", "trades", 4, {"steps": 1}),
    ("vgg16", "smoothing", 8, {}),
    ("cnn_large", "crown_ibp", 8, {}),
    ("cnn_small", "crown_ibp", 8, {}),
    ("cnn_small", "mixtrain", 8, {"samples": 1, "probability": 0.2}),
)


@functools.cache
def digits(batch):
    """Digits as images of CIFAR-10's shape, half of the steps' worth of them."""
    whole = data.load("digits")
    images = whole.train_images[: batch * STEPS // 2]
    shown = images.repeat(4, 1).repeat(4, 2).repeat(3, 3)
    return whole._replace(train_images=shown, train_labels=whole.train_labels[: len(images)])


def stages_of(name, objective, batch, options):
    """The published recipe in two epochs a stage, at the rates that are due to so few steps."""
    schedule = dataclasses.replace(
        robust_pruning.SCHEDULES["published"], images=batch * STEPS // 2, epochs=(2, 2, 2)
    )
    for stage in robust_pruning.recipe(objective, schedule, name):
        # Adam's rates are the recipe's; of gradient descent so small a batch wants one as much
        # smaller.
        share = batch / stage.batch_size if stage.optimizer == "sgd" else 1
        yield dataclasses.replace(
            stage, batch_size=batch, options={**dict(stage.options), **options},
            learning_rate=stage.learning_rate * share,
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "objective", "batch", "options"), CASES)
def test_two_hundred_steps_of_each_stage_of_the_published_recipe(
    name, objective, batch, options, tmp_path
):
    model, shown = models.create(name, 10), digits(batch)
    pretrain, search, finetune = stages_of(name, objective, batch, options)

    def pruned(folder, images):
        run = Run(seed=1, folder=folder, save_every=50, log_every=50)
        return hydra.prune(
            model, images, 0.1, pretrain=pretrain, search=search, finetune=finetune, run=run
        )

    # Each kill is at step 120 of a stage; the next run goes on from its step 100.
    for reads in (120, STEPS - 100 + 120, STEPS - 100 + 120):
        with pytest.raises(Killed):
            pruned(tmp_path / "killed", dies_at(shown, reads))
    resumed = pruned(tmp_path / "killed", shown)
    assert_same(resumed, pruned(tmp_path / "whole", shown))
    left, weights = masks.kept(resumed.masks)
    assert weights / 10 <= left < weights / 9.9

    network = stages.network_of(model, shown)

    def loss(variables):
        x = shown.train_images[:100].astype(np.float32) / 255
        logits = jax.jit(network.predict)(variables, x)
        return float(losses.cross_entropy(logits, shown.train_labels[:100]))

    dense = stages.pretrain(
        network, shown, pretrain, run=Run(seed=1, folder=tmp_path / "whole", save_every=50)
    )
    first = loss(network.initialize(jax.random.key(1)))
    assert loss(dense) < 0.8 * first
    assert loss(resumed.variables) < 0.8 * first
