"""Stages of robust pruning: training under an objective, of whatever a method trains.

Sehwag, Wang, Mittal, Jana, "HYDRA: pruning adversarially robust neural networks", NeurIPS 2020:
pre-train the weights, prune, fine-tune what is left, each under an objective of its own. What a
stage trains need not be the weights: a method (`Whole` and those derived from it) says how the
network's parameters come of it, once for each update, however often the objective runs the network.

A run that is killed and started again ends in the weights of one that was not.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nnslicer_jax import checkpoint, training
from nnslicer_jax.data import Dataset
from nnslicer_jax.progress import Progress
from prune.masks import apply_masks
from prune.objectives import OBJECTIVES, Network, Plan
from prune.objectives.network import require, require_count, statistics

OPTIMIZERS = ("adam", "sgd")


@dataclasses.dataclass(frozen=True)
class Stage:
    """How a stage trains.

    Attributes:
      objective: One of `objectives.OBJECTIVES`.
      options: Of the objective; a mapping, kept as sorted pairs.
      epochs: Passes over the training images; a last incomplete batch is left out.
      batch_size: Images a step; all images if there are fewer.
      learning_rate: Where its cosine starts.
      optimizer: "sgd" or "adam".
      momentum: Of sgd, 0 to below 1.
      weight_decay: L2 on all that is trained, added to the gradient.
      crop: Pixels of black border within which an image-sized window is drawn; 0 for none.
      flip: Mirror half of the images.
    """

    objective: str = "natural"
    options: Any = ()
    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 0.1
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    crop: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        known = sorted(OBJECTIVES)
        require("objective", self.objective in OBJECTIVES, f"one of {', '.join(known)}",
                self.objective)  # fmt: skip
        require_count("epochs", self.epochs)
        require_count("batch_size", self.batch_size)
        require("learning_rate", 0 < self.learning_rate < np.inf, "above 0", self.learning_rate)
        require("optimizer", self.optimizer in OPTIMIZERS, " or ".join(OPTIMIZERS), self.optimizer)
        require("momentum", 0 <= self.momentum < 1, "0 to below 1", self.momentum)
        require("weight_decay", 0 <= self.weight_decay < np.inf, "0 or more", self.weight_decay)
        require("crop", self.crop >= 0, "0 or more", self.crop)
        # Numbers of arrays' kinds are neither hashable nor JSON.
        pairs = {
            name: value.item() if np.ndim(value) == 0 and hasattr(value, "item") else value
            for name, value in dict(self.options).items()
        }
        object.__setattr__(self, "options", tuple(sorted(pairs.items())))


@dataclasses.dataclass(frozen=True)
class Whole:
    """The method that trains all parameters as they are; others derive from it.

    A method is static: what it needs of arrays stands in `trained`, which the optimiser moves, and
    `fixed`, which it does not.
    """

    def effective(self, trained: Any, fixed: Any) -> Any:
        """The network's parameters."""
        return trained

    def penalty(self, trained: Any, fixed: Any, epoch: jax.Array) -> jax.Array | float:
        """What is added to the loss in an epoch, counted from 0."""
        return 0.0

    def renewed(self, trained: Any, fixed: Any, epoch: jax.Array) -> tuple[Any, Any]:
        """What is trained and what is fixed after an epoch, counted from 0."""
        return trained, fixed


@dataclasses.dataclass(frozen=True)
class Masked(Whole):
    """Trains what masks leave; the rest is 0 and stays it. `fixed` is the masks."""

    def effective(self, trained: Any, fixed: Any) -> Any:
        """The parameters with 0 where the mask is False."""
        return apply_masks(trained, fixed)


@dataclasses.dataclass(frozen=True)
class Run:
    """How a run goes about it.

    Attributes:
      seed: Of everything drawn.
      folder: Where checkpoints go, each stage's in a folder of its own; None writes none.
      save_every: Steps between checkpoints; the last step of a stage gets one too.
      log_every: Steps between checks for a loss that is not finite, and between progress lines.
      show: Write progress lines to standard error.
    """

    seed: int = 0
    folder: str | Path | None = None
    save_every: int = 200
    log_every: int = 50
    show: bool = False

    def __post_init__(self) -> None:
        require("seed", 0 <= self.seed < 2**32, "0 to 2**32 - 1", self.seed)
        require_count("save_every", self.save_every)
        require_count("log_every", self.log_every)


DEFAULT = Run()
WHOLE = Whole()


class StageState(NamedTuple):
    """What a step carries.

    Attributes:
      step: [] int32, steps done.
      trained: What the optimiser moves.
      fixed: What the method needs besides.
      statistics: The network's variables but its parameters.
      optimizer: The optimiser's state.
      objective: The objective's.
    """

    step: jax.Array
    trained: Any
    fixed: Any
    statistics: Any
    optimizer: Any
    objective: Any


class StageInfo(NamedTuple):
    """What a step reports: [] float32 loss, the objective's figures, [] bool all finite."""

    loss: jax.Array
    figures: dict[str, jax.Array]
    finite: jax.Array


class Pruned(NamedTuple):
    """A pruned network.

    Attributes:
      variables: What `model.apply` takes, 0 where the masks are False.
      masks: Bool, like the parameters; None where nothing is pruned.
    """

    variables: dict[str, Any]
    masks: Any


def optimizer(stage: Stage, steps: int) -> optax.GradientTransformation:
    """The stage's optimiser for a run of that many steps."""
    rate = optax.cosine_decay_schedule(stage.learning_rate, steps)
    moves = (
        optax.adam(rate)
        if stage.optimizer == "adam"
        else optax.sgd(rate, momentum=stage.momentum or None)
    )
    return optax.chain(optax.add_decayed_weights(stage.weight_decay), moves)


def replays(objective: Any) -> int:
    """How often in a row an objective meets each batch."""
    return getattr(objective, "replays", 1)


# Runs that differ in weights, masks and seed alone share one compiled step.
@functools.lru_cache(maxsize=16)
def make_step(
    network: Network, stage: Stage, plan: Plan, method: Whole
) -> Callable[..., tuple[StageState, StageInfo]]:
    """Builds the jitted step.

    Args:
      network: What is run.
      stage: How it is trained.
      plan: Of the run.
      method: What is trained.

    Returns:
      A function of a state, a key, images [B, H, W, C] uint8 and labels [B] int32 to the next
      state and the step's info. The state given is used up.
    """
    objective = OBJECTIVES[stage.objective]

    def step(
        state: StageState, key: jax.Array, images: jax.Array, labels: jax.Array
    ) -> tuple[StageState, StageInfo]:
        times = replays(state.objective)
        # Replays of a batch are replays of its augmentation too.
        augment_key = jax.random.fold_in(jax.random.fold_in(key, 0), state.step // times)
        loss_key = jax.random.fold_in(jax.random.fold_in(key, 1), state.step)
        x = training.augment(augment_key, images, crop=stage.crop, flip=stage.flip)
        x = x.astype(jnp.float32) / 255
        epoch = state.step // (plan.epoch_steps * times)

        def total(trained: Any) -> tuple[jax.Array, Any]:
            variables = {"params": method.effective(trained, state.fixed), **state.statistics}
            value, aux = objective.loss(state.objective, variables, (x, labels), loss_key)
            return value + method.penalty(trained, state.fixed, epoch), aux

        found = jax.value_and_grad(total, has_aux=True)(state.trained)
        (loss, (objective_state, updated, figures)), gradient = found
        steps = plan.steps * times
        change, optimizer_state = optimizer(stage, steps).update(
            gradient, state.optimizer, state.trained
        )
        moved = optax.apply_updates(state.trained, change)
        checked = jax.tree.leaves((loss, moved, updated))
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in checked]).all()
        following = StageState(
            state.step + 1, moved, state.fixed, updated, optimizer_state, objective_state
        )
        return following, StageInfo(loss, figures, finite)

    return jax.jit(step, donate_argnums=0)


@functools.lru_cache(maxsize=16)
def _renewal(method: Whole) -> Callable[[Any, Any, int], tuple[Any, Any]] | None:
    if type(method).renewed is Whole.renewed:
        return None
    return jax.jit(method.renewed)


def fit(
    network: Network,
    dataset: Dataset,
    stage: Stage,
    trained: Any,
    statistics: Any,
    *,
    name: str,
    method: Whole = WHOLE,
    fixed: Any = (),
    run: Run = DEFAULT,
) -> tuple[Any, Any, Any]:
    """Runs a stage, going on from its last checkpoint if there is one.

    Args:
      network: What is run.
      dataset: Its training images and labels are used.
      stage: How it is trained.
      trained: What is trained at first; of `Whole`, the parameters.
      statistics: The network's variables but its parameters.
      name: Of the stage: its errors and its folder bear it, and with the run's seed it decides
        what is drawn.
      method: What `trained` means.
      fixed: What the method needs besides.
      run: How to go about it.

    Returns:
      `trained`, `fixed` and `statistics` after the last step.

    Raises:
      ValueError: No images, an objective's option that is not accepted, a folder of another run.
      FloatingPointError: Loss or weights stopped being finite; the message names stage, step and
        objective. The last checkpoint holds a state from before.
    """
    count = len(dataset.train_labels)
    if not count:
        raise ValueError(f"{dataset.name}: has no training images")
    size = min(stage.batch_size, count)
    plan = Plan(size, count // size, stage.epochs)
    objective = first_state(stage, network, plan)
    times = replays(objective)
    total, epoch_steps = plan.steps * times, plan.epoch_steps * times
    # The step uses up what it is given.
    start = jax.tree.map(jnp.array, (trained, fixed, statistics))
    opened = optimizer(stage, total).init(start[0])
    state = StageState(jnp.zeros((), jnp.int32), start[0], start[1], start[2], opened, objective)
    folder = None if run.folder is None else Path(run.folder) / name
    done = 0
    if folder is not None:
        checkpoint.claim(folder, _claim(network, dataset, stage, method, start, run.seed))
        restored = checkpoint.restore_latest(folder, _named(state))
        if restored is not None:
            done, leaves = restored
            structure = jax.tree.structure(state)
            state = jax.tree.unflatten(structure, [leaves[key] for key in sorted(leaves)])
    draws = int(np.random.SeedSequence((run.seed, zlib.crc32(name.encode()))).generate_state(1)[0])
    key = jax.random.key(draws)
    step, renew = make_step(network, stage, plan, method), _renewal(method)
    progress = Progress(f"{name} ({stage.objective}):", total, "steps", done) if run.show else None
    pending: list[StageInfo] = []
    order_epoch, order = -1, np.empty(0, np.int64)
    while done < total:
        epoch, position = divmod(done // times, plan.epoch_steps)
        if epoch != order_epoch:
            order_epoch, order = epoch, training.batch_order(draws, epoch, count)
        rows = order[position * size : (position + 1) * size]
        state, info = step(state, key, dataset.train_images[rows], dataset.train_labels[rows])
        pending.append(info)
        done += 1
        if renew is not None and done % epoch_steps == 0:
            renewed, kept = renew(state.trained, state.fixed, epoch)
            state = state._replace(trained=renewed, fixed=kept)
        saves = folder is not None and (done % run.save_every == 0 or done == total)
        if saves or done % run.log_every == 0 or done == total:
            infos = jax.device_get(pending)
            _check(infos, done, epoch_steps, stage, name, folder)
            if progress is not None:
                progress.at(done, f"epoch {epoch + 1} of {plan.epochs}{_said(infos)}")
            pending = []
            if saves and folder is not None:
                checkpoint.save(folder, done, _named(state))
    return state.trained, state.fixed, state.statistics


def pretrain(
    network: Network,
    dataset: Dataset,
    stage: Stage,
    *,
    variables: Any = None,
    masks: Any = None,
    name: str = "pretrain",
    run: Run = DEFAULT,
) -> dict[str, Any]:
    """The first stage: trains all weights, or those that masks leave.

    Args:
      network: What is trained.
      dataset: Its training images and labels are used.
      stage: How.
      variables: What to start from; None: fresh ones.
      masks: Bool, like the parameters, False for what is 0 from the start and stays it; None where
        nothing is.
      name: Of the stage.
      run: How to go about it.

    Returns:
      The variables.

    Raises:
      ValueError: As `fit`.
      FloatingPointError: As `fit`.
    """
    if variables is None:
        variables = network.initialize(jax.random.key(run.seed))
    params: Any = variables["params"]
    fixed: Any = ()
    method = Whole()
    if masks is not None:
        params, fixed, method = apply_masks(params, masks), masks, Masked()
    params, _, rest = fit(
        network, dataset, stage, params, statistics(variables),
        name=name, method=method, fixed=fixed, run=run,
    )  # fmt: skip
    return {"params": params, **rest}


def fine_tune(
    network: Network,
    dataset: Dataset,
    stage: Stage,
    pruned: Pruned,
    *,
    run: Run = DEFAULT,
) -> Pruned:
    """The third stage: trains what masks leave; what they take away stays exactly 0.

    Args:
      network: What is trained.
      dataset: Its training images and labels are used.
      stage: How.
      pruned: Its variables and masks.
      run: How to go about it.

    Raises:
      ValueError: As `fit`.
      FloatingPointError: As `fit`.
    """
    variables, masks = pruned
    found = pretrain(
        network, dataset, stage, variables=variables, masks=masks, name="finetune", run=run
    )
    return Pruned(found, masks)


def opening(
    model: nn.Module, dataset: Dataset, pretrain_stage: Stage | None, variables: Any, run: Run
) -> tuple[Network, dict[str, Any]]:
    """The network and its variables, pre-trained unless they are given.

    Raises:
      ValueError: Unless either a stage or variables are given.
      FloatingPointError: As `fit`.
    """
    if (pretrain_stage is None) == (variables is None):
        raise ValueError("one of pretrain and variables must be given, not both")
    network = network_of(model, dataset)
    if pretrain_stage is not None:
        variables = pretrain(network, dataset, pretrain_stage, run=run)
    return network, variables


def network_of(model: nn.Module, dataset: Dataset) -> Network:
    """The network of a model for the images of a data set."""
    return Network.of(model, tuple(int(n) for n in dataset.train_images.shape[1:]))


def first_state(stage: Stage, network: Network, plan: Plan) -> Any:
    """The first state of a stage's objective.

    Raises:
      ValueError: For an option that the objective does not accept.
    """
    options: Mapping[str, Any] = dict(stage.options)
    try:
        return OBJECTIVES[stage.objective].init(network, plan, **options)
    except TypeError as error:
        # An option that the objective does not have.
        raise ValueError(f"options of {stage.objective}: {error}") from None


def _check(
    infos: list[StageInfo], done: int, epoch_steps: int, stage: Stage, name: str, folder: Any
) -> None:
    """Raises FloatingPointError if a step was not finite."""
    for step, info in enumerate(infos, done - len(infos)):
        if not info.finite:
            kept = checkpoint.steps(folder) if folder is not None else []
            where = f"the checkpoint of step {kept[-1]}" if kept else "no checkpoint"
            raise FloatingPointError(
                f"{name}: loss {info.loss} or a weight is not finite at step {step} (epoch "
                f"{step // epoch_steps}) under the objective {stage.objective}; {where} is kept"
            )


def _said(infos: list[StageInfo]) -> str:
    """Means of some steps, for the line of progress."""
    said = f", loss {np.mean([info.loss for info in infos]):.4f}"
    for figure in infos[0].figures:
        values = np.asarray([info.figures[figure] for info in infos])
        if not np.isnan(values).all():
            said += f", {figure} {np.nanmean(values):.4f}"
    return said


def _named(state: StageState) -> dict[str, Any]:
    """The arrays of a state by their place, which any checkpoint can hold."""
    return {f"{i:06d}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}


def _claim(
    network: Network, dataset: Dataset, stage: Stage, method: Whole, start: Any, seed: int
) -> dict[str, Any]:
    """What must not change between a run and its resumption."""
    images = dataset.train_images
    return {
        "model": repr(network.model),
        "data": dataset.name,
        "labels": checkpoint.digest(dataset.train_labels),
        "images": checkpoint.digest(images)
        if isinstance(images, np.ndarray)
        else list(images.shape),
        "stage": {**dataclasses.asdict(stage), "options": [list(pair) for pair in stage.options]},
        "method": repr(method),
        "start": checkpoint.digest(start),
        "seed": seed,
    }
