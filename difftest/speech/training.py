"""Training of a recogniser on sentences strung together anew for every step.

Sentences of a step follow from the seed and the step alone, so a run that is killed and started
again ends in the weights of one that was not.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from difftest.speech import features, recogniser
from difftest.speech.recordings import Recording, Sentences, strung
from nnslicer_jax import checkpoint
from nnslicer_jax.progress import Progress


@dataclasses.dataclass(frozen=True)
class Options:
    """How to train.

    Attributes:
        steps: of Adam.
        batch_size: sentences a step.
        learning_rate: highest of a one-cycle schedule.
        size: samples of the buffer, a multiple of 320.
        weight_decay: of Adam.
        speed: largest factor of speed and pitch, of sentences and, less, of words.
        noise: largest share of noise in the sound, and
        gain: largest change of volume in dB.
        seed: of weights, sentences, augmentation and dropout.
    """

    steps: int = 1200
    batch_size: int = 32
    learning_rate: float = 3e-3
    size: int = 32_000
    weight_decay: float = 1e-2
    speed: float = 1.3
    noise: float = 0.05
    gain: float = 12.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, good in (
            ("steps", self.steps >= 1),
            ("batch_size", self.batch_size >= 1),
            ("learning_rate", 0 < self.learning_rate < np.inf),
            ("size", self.size > 0 and self.size % 320 == 0),
            ("speed", self.speed >= 1),
            ("noise", self.noise >= 0),
            ("gain", self.gain >= 0),
        ):
            if not good:
                raise ValueError(f"{name}: {getattr(self, name)!r} is out of range")


class State(NamedTuple):
    """What a step carries: variables and the optimiser's state."""

    variables: Any
    optimizer: Any


def sentences_of(options: Options, recordings: Sequence[Recording], step: int) -> Sentences:
    """The sentences of a step, augmented."""
    rng = np.random.default_rng((options.seed, step))
    made = strung(rng, recordings, options.batch_size, options.size, speed=options.speed)
    sound = made.audio.astype(np.float32)
    loud = np.sqrt(np.mean(sound**2, axis=1, keepdims=True)) + 1
    # Noise of any level down to far below hearing, as recordings come with.
    share = options.noise * 10 ** rng.uniform(-3, 0, (len(sound), 1))
    sound += share * loud * rng.standard_normal(sound.shape, np.float32)
    sound *= 10 ** (rng.uniform(-options.gain, options.gain, (len(sound), 1)) / 20)
    past = np.arange(options.size) >= made.lengths[:, None]
    sound = np.where(past, 0, np.clip(np.round(sound), -32768, 32767))
    return made._replace(audio=sound.astype(np.int16))


def masked(key: jax.Array, x: jax.Array) -> jax.Array:
    """Features ``[B, T, F, 1]`` without up to 5 neighbouring bands and one stretch of 20 frames."""
    keys = jax.random.split(key, 3)
    batch, frames, bands = x.shape[:3]
    low = jax.random.randint(keys[0], (batch, 1), 0, bands)
    wide = jax.random.randint(keys[1], (batch, 1), 0, 6)
    start = jax.random.randint(keys[2], (batch, 1), 0, frames)
    band, frame = jnp.arange(bands)[None], jnp.arange(frames)[None]
    gone = ((band >= low) & (band < low + wide))[:, None, :, None]
    gone = gone | ((frame >= start) & (frame < start + 20))[:, :, None, None]
    return jnp.where(gone, 0, x)


def train(
    model: recogniser.Recogniser,
    recordings: Sequence[Recording],
    options: Options,
    *,
    folder: str | Path | None = None,
    every: int = 250,
    show: bool = False,
) -> Any:
    """Trains a recogniser, going on from the last checkpoint if there is one.

    Args:
        model: the network.
        recordings: of the speakers to learn from.
        options: see ``Options``.
        folder: for checkpoints; None: none.
        every: steps between them, and between looks at the loss.
        show: progress on standard error.

    Returns:
        Its variables.

    Raises:
        ValueError: no recordings, or the folder holds another run.
        FloatingPointError: the loss stopped being finite.
    """
    if not recordings:
        raise ValueError("recordings: expected at least one, got none")
    like = jnp.zeros((1, options.size // features.HOP, features.BANDS, 1))
    variables = dict(jax.jit(model.init)(jax.random.key(options.seed), like))
    state, done = State(variables, _method(options).init(variables["params"])), 0
    if folder is not None:
        sums = sum(int(np.abs(r.samples.astype(np.int64)).sum()) for r in recordings)
        about = {**dataclasses.asdict(options), "width": model.width,
                 "recordings": len(recordings), "sums": sums}  # fmt: skip
        checkpoint.claim(folder, about)
        if (restored := checkpoint.restore_latest(folder, state)) is not None:
            done, state = restored
    progress = Progress("trained", options.steps, "steps", done) if show else None
    while done < options.steps:
        key = jax.random.fold_in(jax.random.key(options.seed), done)
        state, value = _step(model, options, state, key, *sentences_of(options, recordings, done))
        done += 1
        if progress is not None and (done % 20 == 0 or done == options.steps):
            progress.at(done, f"loss a word {float(value):.3f}")
        if done % every == 0 or done == options.steps:
            if not np.isfinite(value):
                raise FloatingPointError(f"training: the loss is {value} at step {done}")
            if folder is not None:
                checkpoint.save(folder, done, state)
    return state.variables


def _method(options: Options) -> optax.GradientTransformation:
    rate = optax.cosine_onecycle_schedule(max(options.steps, 4), options.learning_rate)
    return optax.chain(
        optax.clip_by_global_norm(5.0), optax.adamw(rate, weight_decay=options.weight_decay)
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(
    model: recogniser.Recogniser,
    options: Options,
    state: State,
    key: jax.Array,
    audio: jax.Array,
    lengths: jax.Array,
    words: jax.Array,
) -> tuple[State, jax.Array]:
    key_mask, key_dropout = jax.random.split(key)
    x = masked(key_mask, recogniser.inputs(audio, lengths))
    statistics = state.variables["batch_stats"]

    def value_of(params: Any) -> tuple[jax.Array, Any]:
        logits, updated = model.apply(
            {"params": params, "batch_stats": statistics}, x, train=True,
            rngs={"dropout": key_dropout}, mutable=["batch_stats"],
        )  # fmt: skip
        return recogniser.loss(logits, lengths, words), updated

    params = state.variables["params"]
    (value, updated), gradient = jax.value_and_grad(value_of, has_aux=True)(params)
    change, optimizer = _method(options).update(gradient, state.optimizer, params)
    params = optax.apply_updates(params, change)
    return State({"params": params, **updated}, optimizer), value
