"""The published recipes on the published networks: 200 steps learn, and survive a kill."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from experiments import robust_pruning
from nnslicer_jax import data, models
from prune import stages
from prune.objectives import losses
from prune.stages import Run
from tests.test_stages import assert_same
from tests.tiny import Killed, dies_at

BATCH, STEPS = 8, 200


@functools.cache
def digits():
    """Digits as images of CIFAR-10's shape, half of the steps' worth of them."""
    whole = data.load("digits")
    images = whole.train_images[: BATCH * STEPS // 2]
    shown = images.repeat(4, 1).repeat(4, 2).repeat(3, 3)
    return whole._replace(train_images=shown, train_labels=whole.train_labels[: len(images)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg16", "wrn28_4"])
def test_two_hundred_steps_of_the_published_recipe(name, tmp_path):
    network = stages.network_of(models.create(name, 10), digits())
    published = robust_pruning.SCHEDULES["published"]
    stage = robust_pruning.recipe("trades", published)[0]
    # So small a batch wants a rate as much smaller, and one step of the attack shows as much.
    stage = dataclasses.replace(
        stage, epochs=2, batch_size=BATCH, options={**dict(stage.options), "steps": 1},
        learning_rate=stage.learning_rate * BATCH / stage.batch_size,
    )  # fmt: skip

    def trained(folder, images):
        run = Run(seed=1, folder=folder, save_every=50, log_every=50)
        return stages.pretrain(network, images, stage, run=run)

    with pytest.raises(Killed):
        trained(tmp_path / "killed", dies_at(digits(), 120))
    resumed = trained(tmp_path / "killed", digits())
    assert_same(resumed, trained(tmp_path / "whole", digits()))

    def loss(variables):
        x = digits().train_images[:100].astype(np.float32) / 255
        logits = jax.jit(network.predict)(variables, x)
        return float(losses.cross_entropy(logits, digits().train_labels[:100]))

    assert loss(resumed) < 0.8 * loss(network.initialize(jax.random.key(0)))
