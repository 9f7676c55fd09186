"""Trains a network and writes its weights with their card; started again, it goes on.

``python -m experiments.train --model lenet5 --data mnist --epochs 10 --seed 0``
"""

import dataclasses
import hashlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import app, flags, logging

from nnslicer_jax import data, models, training, zoo
from nnslicer_jax.data import files

_DEFAULTS = training.TrainingOptions()


def weights_name(model: str, dataset: str) -> str:
    """The name in the zoo: model_data, or model alone where it is named after the data."""
    return model if model.startswith(dataset) else f"{model}_{dataset}"


def command_line(model: str, dataset: str, options: training.TrainingOptions) -> str:
    """The shortest command that trains the same network."""
    words = ["python", "-m", "experiments.train", "--model", model, "--data", dataset]
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if isinstance(value, bool) and value != field.default:
            words.append(f"--{'' if value else 'no'}{field.name}")
        elif value != field.default or field.name in ("epochs", "seed"):
            words += [f"--{field.name}", str(value)]
    return shlex.join(words)


def fingerprint(dataset: data.Dataset) -> dict[str, str]:
    """SHA-256 sums of the pixels and labels, for sets that are in memory."""
    sums = {}
    for split in ("train", "test"):
        images = getattr(dataset, f"{split}_images")
        if isinstance(images, np.ndarray):
            digest = hashlib.sha256(images.tobytes())
            digest.update(getattr(dataset, f"{split}_labels").astype("<i4").tobytes())
            sums[split] = digest.hexdigest()
    return sums


def describe(
    model_name: str, options: training.TrainingOptions, dataset: data.Dataset
) -> dict[str, Any]:
    """What a card says before the training: data, command and options."""
    return {
        "num_classes": len(dataset.classes),
        "input_shape": [int(n) for n in dataset.train_images.shape[1:]],
        "data": dataset.name,
        "data_note": dataset.note,
        "data_sha256": fingerprint(dataset),
        "train_images": len(dataset.train_labels),
        "test_images": len(dataset.test_labels),
        "seed": options.seed,
        "command": command_line(model_name, dataset.name, options),
        "training": dataclasses.asdict(options),
        "jax": jax.__version__,
    }


def run(
    model_name: str,
    options: training.TrainingOptions,
    dataset: data.Dataset,
    *,
    out: str | Path,
    checkpoint_dir: str | Path,
    checkpoint_every: int,
    log_every: int,
) -> dict[str, Any]:
    """Trains, writes weights and card into ``out``, and returns the card."""
    model = models.create(model_name, len(dataset.classes))
    variables = training.train(
        model,
        dataset,
        options,
        checkpoint_dir=checkpoint_dir,
        checkpoint_every=checkpoint_every,
        log_every=log_every,
        show=True,
    )

    def measure(stored_model: nn.Module, stored: dict[str, Any]) -> dict[str, Any]:
        images, labels = dataset.test_images, dataset.test_labels
        before = training.count_correct(model, variables, images, labels)
        after = training.count_correct(stored_model, stored, images, labels)
        return {
            "test_correct": after,
            "test_accuracy": after / len(labels),
            "test_accuracy_before_rounding": before / len(labels),
        }

    name = weights_name(model_name, dataset.name)
    card = describe(model_name, options, dataset)
    return zoo.save(name, model_name, variables, card, out, measure=measure)


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    # The checkpoint library reports every file that it writes.
    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS
    name = weights_name(given.model, given.data)
    fields = dataclasses.fields(_DEFAULTS)
    try:
        card = run(
            given.model,
            training.TrainingOptions(
                **{field.name: getattr(given, field.name) for field in fields}
            ),
            data.load(given.data, given.data_dir),
            out=given.out or zoo.weights_folder(),
            checkpoint_dir=given.checkpoint_dir or files.cache_folder() / "training" / name,
            checkpoint_every=given.checkpoint_every,
            log_every=given.log_every,
        )
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(str(error))
    print(f"{card['name']}: test accuracy {card['test_accuracy']:.4f}")


def _define_flags() -> None:
    # Flags are global, and every command has an --out: defined here, modules import side by side.
    flags.DEFINE_enum("model", None, sorted(models.MODELS), "Network to train.", required=True)
    flags.DEFINE_enum("data", None, sorted(data.DATASETS), "To train on.", required=True)
    flags.DEFINE_string("data_dir", None, "Folder searched first for the data set.")
    flags.DEFINE_string("out", None, "Folder for weights and card; the user's cache if unset.")
    flags.DEFINE_string("checkpoint_dir", None, "For checkpoints; the user's cache if unset.")
    flags.DEFINE_integer("checkpoint_every", 200, "Steps between checkpoints.", lower_bound=1)
    flags.DEFINE_integer("log_every", 50, "Steps between progress lines.", lower_bound=1)
    flags.DEFINE_integer("epochs", _DEFAULTS.epochs, "Passes over the training images.")
    flags.DEFINE_integer("batch_size", _DEFAULTS.batch_size, "Images a step.")
    flags.DEFINE_float("learning_rate", _DEFAULTS.learning_rate, "Highest of the schedule.")
    flags.DEFINE_enum("schedule", _DEFAULTS.schedule, ["one_cycle", "cosine"], "Of the rate.")
    flags.DEFINE_float("momentum", _DEFAULTS.momentum, "Of Nesterov's method.")
    flags.DEFINE_float("weight_decay", _DEFAULTS.weight_decay, "L2, on kernels.")
    flags.DEFINE_float("label_smoothing", _DEFAULTS.label_smoothing, "Spread over all classes.")
    flags.DEFINE_integer("crop", _DEFAULTS.crop, "Pixels of border for random crops.")
    flags.DEFINE_bool("flip", _DEFAULTS.flip, "Mirror half of the images.")
    flags.DEFINE_integer("seed", _DEFAULTS.seed, "Of weights, order, augmentation, dropout.")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
