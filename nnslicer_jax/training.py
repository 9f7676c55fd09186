"""Training of a Flax classifier: one jitted optax step, data order as a function of the seed.

A run that is killed and started again ends in the weights of one that was not.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nnslicer_jax import checkpoint
from nnslicer_jax.data import Dataset
from nnslicer_jax.evaluation import evaluate
from nnslicer_jax.graph import trace
from nnslicer_jax.progress import Progress

_SCHEDULES = ("one_cycle", "cosine")


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Attributes:
        epochs: passes over the training images; a last incomplete batch is left out.
        batch_size: images a step; all images if there are fewer.
        learning_rate: highest of the schedule.
        schedule: "one_cycle" rises for 30 % of the steps and falls for the rest, both as a
            cosine; "cosine" only falls.
        momentum: of Nesterov's method.
        weight_decay: L2, on parameters with more than one axis.
        label_smoothing: share of the target spread over all classes, 0 to below 1.
        crop: pixels of black border within which an image-sized window is drawn; 0 for none.
        flip: mirror half of the images.
        seed: of the initial weights, the data order, the augmentation and the dropout.
    """

    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 0.1
    schedule: str = "one_cycle"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    crop: int = 0
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, accepted, good in (
            ("epochs", "at least 1", self.epochs >= 1),
            ("batch_size", "at least 1", self.batch_size >= 1),
            ("learning_rate", "a positive number", 0 < self.learning_rate < np.inf),
            ("schedule", " or ".join(_SCHEDULES), self.schedule in _SCHEDULES),
            ("momentum", "0 to below 1", 0 <= self.momentum < 1),
            ("weight_decay", "0 or more", 0 <= self.weight_decay < np.inf),
            ("label_smoothing", "0 to below 1", 0 <= self.label_smoothing < 1),
            ("crop", "0 or more", self.crop >= 0),
            ("seed", "0 to 2**32 - 1", 0 <= self.seed < 2**32),
        ):
            if not good:
                raise ValueError(f"{name}: expected {accepted}, got {getattr(self, name)!r}")


Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class TrainState(NamedTuple):
    """What a step carries: [] int32 steps done, the model's variables, the optimiser's state."""

    step: jax.Array
    variables: Any
    optimizer: Any


class TrainInfo(NamedTuple):
    """What a step reports: [] float32 mean loss, [] int32 right answers, [] bool all finite."""

    loss: jax.Array
    correct: jax.Array
    finite: jax.Array


def batch_order(seed: int, epoch: int, images: int) -> np.ndarray:
    """The order [images] int64 in which an epoch visits the images, from seed and epoch alone."""
    return np.random.default_rng((seed, epoch)).permutation(images)


def augment(key: jax.Array, images: jax.Array, *, crop: int, flip: bool) -> jax.Array:
    """Shifts and mirrors each image at random.

    Args:
        key: random key.
        images: [B, H, W, C], any dtype.
        crop: largest shift in pixels along each axis; what comes in from outside is 0.
        flip: mirror half of the images left to right.

    Returns:
        Images of the same shape and dtype.
    """
    shift_key, flip_key = jax.random.split(key)
    if crop:
        height, width = images.shape[1:3]
        corners = jax.random.randint(shift_key, (images.shape[0], 2), 0, 2 * crop + 1)
        padded = jnp.pad(images, ((0, 0), (crop, crop), (crop, crop), (0, 0)))

        def window(image: jax.Array, corner: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(
                image, (corner[0], corner[1], 0), (height, width, image.shape[2])
            )

        images = jax.vmap(window)(padded, corners)
    if flip:
        mirrored = jax.random.bernoulli(flip_key, shape=(images.shape[0], 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    return images


def optimizer(options: TrainingOptions, steps: int) -> optax.GradientTransformation:
    """Nesterov's method with weight decay under the schedule, for a run of ``steps`` steps."""
    if options.schedule == "one_cycle":
        rate = optax.cosine_onecycle_schedule(max(steps, 2), options.learning_rate)
    else:
        rate = optax.cosine_decay_schedule(options.learning_rate, steps)
    return optax.chain(
        optax.add_decayed_weights(
            options.weight_decay, mask=lambda tree: jax.tree.map(lambda p: p.ndim > 1, tree)
        ),
        optax.sgd(rate, momentum=options.momentum or None, nesterov=options.momentum > 0),
    )


def make_step(
    model: nn.Module, options: TrainingOptions, steps: int, loss: Loss | None = None
) -> Callable[..., tuple[TrainState, TrainInfo]]:
    """Builds the jitted step.

    Args:
        model: called as ``model.apply(variables, x, train=True)``.
        options: as for ``train``.
        steps: length of the whole run, which the schedule needs.
        loss: as for ``train``.

    Returns:
        A function of a state, images [B, H, W, C] uint8, labels [B] int32 and optionally
        ``trainable`` as for ``train``, to the next state and the step's TrainInfo. The state
        given is used up.
    """
    try:
        hash(model)
    except TypeError:
        # Of a list or dictionary among its attributes, say.
        return _new_step(model, options, steps, loss)
    return _shared_step(model, options, steps, loss)


@functools.lru_cache(maxsize=4)
def _shared_step(
    model: nn.Module, options: TrainingOptions, steps: int, loss: Loss | None
) -> Callable[..., tuple[TrainState, TrainInfo]]:
    """Runs that differ in weights and masks alone, as those of a study do, share one program."""
    return _new_step(model, options, steps, loss)


def _new_step(
    model: nn.Module, options: TrainingOptions, steps: int, loss: Loss | None
) -> Callable[..., tuple[TrainState, TrainInfo]]:
    method = optimizer(options, steps)

    def step(
        state: TrainState, images: jax.Array, labels: jax.Array, trainable: Any = None
    ) -> tuple[TrainState, TrainInfo]:
        key = jax.random.fold_in(jax.random.key(options.seed), state.step)
        augment_key, dropout_key = jax.random.split(key)
        x = augment(augment_key, images, crop=options.crop, flip=options.flip)
        x = x.astype(jnp.float32) / 255
        collections = {k: v for k, v in state.variables.items() if k != "params"}

        def loss_function(params: Any) -> tuple[jax.Array, tuple[Any, jax.Array]]:
            logits, updated = model.apply(
                {"params": params, **collections},
                x,
                train=True,
                rngs={"dropout": dropout_key},
                mutable=list(collections),
            )
            targets = jax.nn.one_hot(labels, logits.shape[1])
            targets = optax.smooth_labels(targets, options.label_smoothing)
            if loss is None:
                value = optax.softmax_cross_entropy(logits, targets).mean()
            else:
                value = loss(logits, targets, x)
            return value, (updated, (logits.argmax(1) == labels).sum())

        params = state.variables["params"]
        value_and_grad = jax.value_and_grad(loss_function, has_aux=True)
        (value, (updated, correct)), gradient = value_and_grad(params)
        change, optimizer_state = method.update(gradient, state.optimizer, params)
        moved = optax.apply_updates(params, change)
        if trainable is not None:
            moved = jax.tree.map(jnp.where, trainable, moved, params)
        variables = {"params": moved, **updated}
        finite = jnp.stack([jnp.isfinite(a).all() for a in jax.tree.leaves((value, variables))])
        return TrainState(state.step + 1, variables, optimizer_state), TrainInfo(
            value, correct, finite.all()
        )

    return jax.jit(step, donate_argnums=0)


def initialize(model: nn.Module, options: TrainingOptions, image_shape: tuple[int, ...]) -> Any:
    """The model's first variables for images of ``image_shape`` [H, W, C]."""
    key = jax.random.key(options.seed)
    return dict(jax.jit(model.init)(key, jnp.zeros((1, *image_shape), jnp.float32)))


def train(
    model: nn.Module,
    dataset: Dataset,
    options: TrainingOptions,
    *,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 500,
    log_every: int = 50,
    show: bool = False,
    devices: Sequence[jax.Device] | None = None,
    variables: Any = None,
    trainable: Any = None,
    loss: Loss | None = None,
) -> Any:
    """Trains a classifier, going on from the last checkpoint if there is one.

    Args:
        model: takes images [B, H, W, C] float32 in [0, 1] and ``train``; gives logits.
        dataset: its training images and labels are used.
        options: see TrainingOptions.
        checkpoint_dir: where checkpoints go; None writes none.
        checkpoint_every: steps between checkpoints; the last step gets one too.
        log_every: steps between progress lines, and between checks for a loss that is not finite.
        show: write progress lines to standard error.
        devices: share each batch equally; None means all, and on a CPU the first.
        variables: what to start from, as ``model.apply`` takes them; None draws them by the
            options' seed.
        trainable: which weights are trained, bool arrays in the structure and shapes of
            ``variables["params"]``; the others stay as they are to the bit, weight decay
            included. Batch statistics follow the data all the same. None trains every weight.
        loss: what is made small, of logits [B, K], targets [B, K] (the labels, smoothed as the
            options say) and images [B, H, W, C] in [0, 1]: a scalar. Its ``str`` tells the runs of
            a checkpoint folder apart. None: the cross-entropy.

    Returns:
        The trained variables, as ``model.apply`` takes them.

    Raises:
        ValueError: no images, options out of range, variables or trainable of another model, a
            checkpoint folder of another run.
        FloatingPointError: loss or weights stopped being finite; the message names the step. The
            last checkpoint holds a state from before.
    """
    count = len(dataset.train_labels)
    if not count:
        raise ValueError(f"{dataset.name}: has no training images")
    if checkpoint_every < 1 or log_every < 1:
        raise ValueError("checkpoint_every, log_every: expected at least 1 step")
    batch_size = min(options.batch_size, count)
    epoch_steps = count // batch_size
    total = options.epochs * epoch_steps
    run = {"model": repr(model), "data": dataset.name, "images": count, **asdict(options)}
    if variables is None:
        variables = initialize(model, options, dataset.train_images.shape[1:])
    else:
        _check_variables(model, variables, dataset.train_images.shape[1:])
        run["variables"] = checkpoint.digest(variables)
        # The step uses up what it is given.
        variables = jax.tree.map(jnp.array, dict(variables))
    if trainable is not None:
        _check_trainable(trainable, variables["params"])
        run["trainable"] = checkpoint.digest(trainable)
    if loss is not None:
        run["loss"] = str(loss)
    state = TrainState(
        jnp.zeros((), jnp.int32),
        variables,
        optimizer(options, total).init(variables["params"]),
    )
    done = 0
    if checkpoint_dir is not None:
        checkpoint.claim(checkpoint_dir, run)
        restored = checkpoint.restore_latest(checkpoint_dir, state)
        if restored is not None:
            done, state = restored
    if devices is None:
        # XLA's collectives among virtual CPU devices can wait for each other for ever when steps
        # are dispatched ahead, and such devices share the same cores anyway.
        devices = jax.devices()[:1] if jax.default_backend() == "cpu" else jax.devices()
    # Equal shares: a batch that does not divide uses fewer devices.
    devices = devices[: math.gcd(batch_size, len(devices))]
    mesh = jax.sharding.Mesh(devices, ("batch",))
    sharded = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state, trainable = jax.device_put((state, trainable), whole)
    step = make_step(model, options, total, loss)
    pending: list[TrainInfo] = []
    progress = Progress("trained", total, "steps", done) if show else None
    order_epoch, order = -1, np.empty(0, np.int64)
    while done < total:
        epoch, position = divmod(done, epoch_steps)
        if epoch != order_epoch:
            order_epoch, order = epoch, batch_order(options.seed, epoch, count)
        rows = order[position * batch_size : (position + 1) * batch_size]
        batch = (dataset.train_images[rows], dataset.train_labels[rows])
        state, info = step(state, *jax.device_put(batch, sharded), trainable)
        pending.append(info)
        done += 1
        saves = checkpoint_dir is not None and (done % checkpoint_every == 0 or done == total)
        if saves or done % log_every == 0 or done == total:
            infos = jax.device_get(pending)
            for offset, past in enumerate(infos, done - len(infos)):
                if not past.finite:
                    kept = checkpoint.steps(checkpoint_dir) if checkpoint_dir is not None else []
                    where = f"the checkpoint of step {kept[-1]}" if kept else "no checkpoint"
                    raise FloatingPointError(
                        f"training: loss {past.loss} or a weight is not finite at step {offset} "
                        f"(epoch {offset // epoch_steps}); {where} is kept"
                    )
            if progress is not None:
                loss = np.mean([past.loss for past in infos])
                accuracy = np.sum([past.correct for past in infos]) / (len(infos) * batch_size)
                progress.at(
                    done,
                    f"epoch {epoch + 1} of {options.epochs}, loss {loss:.4f}, "
                    f"accuracy {accuracy:.4f}",
                )
            pending = []
            if saves and checkpoint_dir is not None:
                checkpoint.save(checkpoint_dir, done, state)
    return state.variables


def _check_variables(model: nn.Module, variables: Any, image_shape: tuple[int, ...]) -> None:
    example = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    wanted = dict(jax.eval_shape(model.init, jax.random.key(0), example))
    _check_shapes("variables", variables, wanted, f"what {type(model).__name__} takes")


def _check_trainable(trainable: Any, params: Any) -> None:
    _check_shapes("trainable", trainable, params, "the parameters")
    kinds = {str(jnp.asarray(leaf).dtype) for leaf in jax.tree.leaves(trainable)} - {"bool"}
    if kinds:
        raise ValueError(f"trainable: expected bool arrays, got {sorted(kinds)[0]}")


def _check_shapes(name: str, given: Any, wanted: Any, of: str) -> None:
    found = {p: jnp.shape(leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(given)}
    due = {p: jnp.shape(leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(wanted)}
    for path in {**due, **found}:
        if found.get(path) != due.get(path):
            raise ValueError(
                f"{name}: expected the shapes of {of}, got {found.get(path, 'nothing')} instead "
                f"of {due.get(path, 'nothing')} at {jax.tree_util.keystr(path)}"
            )


def count_correct(
    model: nn.Module, variables: Any, images: Any, labels: np.ndarray, *, batch_size: int = 256
) -> int:
    """Counts the images [N, H, W, C] uint8 whose largest logit is at their label [N].

    Raises:
        ValueError: there are no images, or not as many labels.
    """
    if not len(images) or len(images) != len(labels):
        raise ValueError(
            f"images: expected at least one and a label for each, got {len(images)} images and "
            f"{len(labels)} labels"
        )
    batch_size = min(batch_size, len(images))

    graph = trace(model.apply, variables, np.zeros((1, *images.shape[1:]), np.float32))

    @jax.jit
    def predict(variables: Any, batch: jax.Array) -> jax.Array:
        logits, _ = evaluate(graph, variables, batch.astype(jnp.float32) / 255)
        return logits.argmax(1)

    correct = 0
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        rows = len(batch)
        if rows < batch_size:
            # One compiled shape: the last batch is filled up and the filling not counted.
            batch = np.concatenate([batch, np.zeros((batch_size - rows, *batch.shape[1:]), "u1")])
        predicted = np.asarray(predict(variables, batch))[:rows]
        correct += int((predicted == labels[start : start + rows]).sum())
    return correct
