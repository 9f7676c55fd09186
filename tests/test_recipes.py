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
def test_two_hundred_steps_of_each_stage_of_the_published_recipe(name, tmp_path):
    model = models.create(name, 10)
    published = robust_pruning.SCHEDULES["published"]
    # So small a batch wants a rate as much smaller, and one step of the attack shows as much.
    pretrain, search, finetune = (
        dataclasses.replace(
            stage, epochs=2, batch_size=BATCH, options={**dict(stage.options), "steps": 1},
            learning_rate=stage.learning_rate * BATCH / stage.batch_size,
        )
        for stage in robust_pruning.recipe("trades", published)
    )  # fmt: skip

    def pruned(folder, images):
        run = Run(seed=1, folder=folder, save_every=50, log_every=50)
        return hydra.prune(
            model, images, 0.1, pretrain=pretrain, search=search, finetune=finetune, run=run
        )

    # Each kill is at step 120 of a stage; the next run goes on from its step 100.
    for reads in (120, STEPS - 100 + 120, STEPS - 100 + 120):
        with pytest.raises(Killed):
            pruned(tmp_path / "killed", dies_at(digits(), reads))
    resumed = pruned(tmp_path / "killed", digits())
    assert_same(resumed, pruned(tmp_path / "whole", digits()))
    left, weights = masks.kept(resumed.masks)
    assert weights / 10 <= left < weights / 9.9

    network = stages.network_of(model, digits())

    def loss(variables):
        x = digits().train_images[:100].astype(np.float32) / 255
        logits = jax.jit(network.predict)(variables, x)
        return float(losses.cross_entropy(logits, digits().train_labels[:100]))

    dense = stages.pretrain(
        network, digits(), pretrain, run=Run(seed=1, folder=tmp_path / "whole", save_every=50)
    )
    first = loss(network.initialize(jax.random.key(1)))
    assert loss(dense) < 0.8 * first
    assert loss(resumed.variables) < 0.8 * first
