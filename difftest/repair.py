"""DRepair: a small classifier behind a compressed model that brings the original's labels back.

Tian et al., TOSEM 2023, section 5.5. A perceptron with one hidden layer of 50 takes the compressed
model's probability vector and is trained, on seeds and on the triggers found from them, to give the
original model's label. It is judged by cross-validation; what the paper leaves open is ours: a
fold takes a trigger together with its seed, and means are over folds and random seeds.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import KFold
from sklearn.neural_network import MLPClassifier

from difftest.pair import JaxModel, Model, ModelPair, jax_model
from difftest.result import SearchResult

_HIDDEN = 50
_MOST_EPOCHS = 5000
_AT_A_TIME = 128


class Examples(NamedTuple):
    """Seeds and their triggers as DRepair sees them; row n of all belongs to one seed.

    Attributes:
        seeds: the compressed model's probabilities of the seeds, float32 ``[N, K]``.
        triggers: those of the triggers, float32 ``[N, K]``.
        seed_labels: the original model's labels of the seeds, int ``[N]``, 0..K-1.
        trigger_labels: those of the triggers, int ``[N]``.
    """

    seeds: np.ndarray
    triggers: np.ndarray
    seed_labels: np.ndarray
    trigger_labels: np.ndarray

    def rows(self, which: np.ndarray) -> "Examples":
        """Those of some seeds."""
        return Examples(*(part[which] for part in self))


class Perceptron(NamedTuple):
    """One hidden layer of ReLU and a softmax; a class never trained on has a bias of -infinity.

    Attributes:
        weights: float32 ``[K, 50]``.
        biases: float32 ``[50]``.
        out_weights: float32 ``[50, K]``.
        out_biases: float32 ``[K]``.
    """

    weights: Any
    biases: Any
    out_weights: Any
    out_biases: Any


class Judgement(NamedTuple):
    """What a repair did, counted on inputs it was not trained on; one row a random seed.

    Attributes:
        repaired: triggers on which the models agree after the repair, int ``[S, F]``, F folds.
        induced: seeds on which they no longer do, int ``[S, F]``.
        triggers: how many triggers were tested, int ``[S, F]``.
        seeds: how many seeds were, int ``[S, F]``.
    """

    repaired: np.ndarray
    induced: np.ndarray
    triggers: np.ndarray
    seeds: np.ndarray

    @property
    def improved(self) -> np.ndarray:
        """Deviations before the repair less those after it, int ``[S, F]``; may be negative."""
        after = self.triggers - self.repaired + self.induced
        return self.triggers - after

    @property
    def repair_ratio(self) -> np.ndarray:
        """Float ``[S, F]``, 0..1: repaired of the triggers."""
        return self.repaired / self.triggers

    @property
    def inducing_ratio(self) -> np.ndarray:
        """Float ``[S, F]``, 0..1: deviating of the seeds."""
        return self.induced / self.seeds

    @property
    def improvement_ratio(self) -> np.ndarray:
        """Float ``[S, F]``, at most 1: the improvement of the deviations before the repair."""
        return self.improved / self.triggers


@dataclass(frozen=True, eq=False)
class RepairedModel:
    """A compressed model with the perceptron behind it: uint8 ``[B, H, W, C]`` -> ``[B, K]``.

    Attributes:
        model: the compressed model.
        perceptron: with NumPy arrays.
    """

    model: Model
    perceptron: Perceptron

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Probabilities float32 ``[B, K]``: the perceptron's of the compressed model's."""
        vectors = np.asarray(self.model(images), np.float32)
        return probabilities(self.perceptron, vectors)

    def as_jax(self, model: JaxModel) -> JaxModel:
        """The same on the device.

        Args:
            model: the compressed model as a pure JAX function.
        """

        def apply(params: Any, x: jax.Array) -> jax.Array:
            own, perceptron = params
            out = model.apply(own, x).astype(jnp.float32)
            vectors = jax.nn.softmax(out) if model.outputs == "logits" else out
            return jax.nn.softmax(_logits(perceptron, vectors))

        arrays = jax.tree.map(jnp.asarray, self.perceptron)
        params = (model.params, arrays)
        return jax_model(apply, params, model.preprocess, outputs="probabilities")


def examples(pair: ModelPair, seeds: np.ndarray, result: SearchResult) -> Examples:
    """What a search found, as DRepair's training set; the pair is asked about the seeds once more.

    Args:
        pair: the models.
        seeds: uint8 ``[N, H, W, C]``, those of the search.
        result: of it; seeds without a trigger are left out.

    Raises:
        ValueError: other seeds than the search's by number or shape.
        ModelError: a model fails on a seed.
    """
    if seeds.shape != result.triggers.shape:
        raise ValueError(f"seeds have shape {seeds.shape}, the search's {result.triggers.shape}")
    found = np.flatnonzero(result.success)
    vectors = [np.zeros((0, result.outputs_compressed.shape[1]), np.float32)]
    for start in range(0, len(found), _AT_A_TIME):
        vectors.append(pair.probabilities(seeds[found[start : start + _AT_A_TIME]])[1])
    return Examples(
        np.concatenate(vectors),
        result.outputs_compressed[found],
        result.seed_labels[found].astype(np.int32),
        result.outputs_original[found].argmax(axis=1).astype(np.int32),
    )


def probabilities(perceptron: Perceptron, vectors: np.ndarray) -> np.ndarray:
    """The perceptron's probabilities, float32 ``[B, K]``, of vectors ``[B, K]``.

    Raises:
        ValueError: vectors of another width.
    """
    if vectors.ndim != 2 or vectors.shape[1] != len(perceptron.weights):
        raise ValueError(
            f"vectors have shape {vectors.shape}; accepted are [B, {len(perceptron.weights)}], "
            "the classes that the repair was trained on"
        )
    hidden = np.maximum(vectors @ perceptron.weights + perceptron.biases[None], 0)
    logits = hidden @ perceptron.out_weights + perceptron.out_biases[None]
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def train(data: Examples, seed: int = 0) -> Perceptron:
    """Trains the perceptron on seeds and triggers alike.

    Args:
        data: at least one pair.
        seed: of its first weights and of the order of examples.

    Raises:
        ValueError: shapes or labels do not fit each other, or there is nothing to learn from.
    """
    _check(data)
    vectors = np.concatenate([data.seeds, data.triggers])
    labels = np.concatenate([data.seed_labels, data.trigger_labels])
    width, present = vectors.shape[1], np.unique(labels)
    weights, out = np.zeros((width, _HIDDEN)), np.zeros((_HIDDEN, len(present)))
    biases, out_biases = np.zeros(_HIDDEN), np.zeros(len(present))
    # Of one class there is nothing to tell apart.
    if len(present) > 1:
        made = MLPClassifier((_HIDDEN,), max_iter=_MOST_EPOCHS, random_state=seed)
        with warnings.catch_warnings():
            # So many epochs are the paper's end, converged or not.
            warnings.simplefilter("ignore", ConvergenceWarning)
            made.fit(vectors, labels)
        (weights, out), (biases, out_biases) = made.coefs_, made.intercepts_
    if len(present) == 2:
        # Of two classes scikit-learn learns one logit; that of the first is 0.
        out = np.concatenate([np.zeros_like(out), out], axis=1)
        out_biases = np.concatenate([np.zeros_like(out_biases), out_biases])
    all_out, all_biases = np.zeros((_HIDDEN, width)), np.full(width, -np.inf)
    all_out[:, present], all_biases[present] = out, out_biases
    return Perceptron(*(part.astype(np.float32) for part in (weights, biases, all_out, all_biases)))


def fit(model: Model, data: Examples, seed: int = 0) -> RepairedModel:
    """Repairs a compressed model with all examples.

    Args:
        model: the compressed one.
        data: at least one pair.
        seed: of the training.

    Raises:
        ValueError: as ``train``.
    """
    return RepairedModel(model, train(data, seed))


def repaired_pair(pair: ModelPair, repaired: RepairedModel) -> ModelPair:
    """The original with the repaired model, on the device where the pair is."""
    if isinstance(pair.compressed, JaxModel):
        return ModelPair(pair.original, repaired.as_jax(pair.compressed))
    return ModelPair(pair.original, repaired)


def cross_validate(
    data: Examples, *, folds: int = 5, seeds: Sequence[int] = (0, 1, 2, 3, 4)
) -> Judgement:
    """Judges the repair by what it does to inputs it was not trained on.

    Args:
        data: at least one pair a fold.
        folds: a seed and its trigger are always in the same one.
        seeds: of the folds and of the training; one cross-validation each.

    Raises:
        ValueError: shapes or labels do not fit each other, or there are fewer pairs than folds.
    """
    _check(data)
    if isinstance(folds, bool) or not isinstance(folds, int) or not 2 <= folds <= len(data.seeds):
        raise ValueError(f"folds is {folds!r}; accepted are 2 to {len(data.seeds)}, the pairs")
    if not len(seeds):
        raise ValueError("seeds is empty; at least one is due")
    rows = []
    for seed in seeds:
        split = KFold(folds, shuffle=True, random_state=seed).split(data.seeds)
        rows.append([count(train(data.rows(a), seed), data.rows(b)) for a, b in split])
    return Judgement(*np.moveaxis(np.array(rows), -1, 0))


def count(perceptron: Perceptron, held_out: Examples) -> tuple[int, int, int, int]:
    """One cell of a ``Judgement``: repaired, induced, and how many triggers and seeds there are."""
    seeds, triggers = (
        probabilities(perceptron, vectors).argmax(axis=1)
        for vectors in (held_out.seeds, held_out.triggers)
    )
    repaired = int((triggers == held_out.trigger_labels).sum())
    induced = int((seeds != held_out.seed_labels).sum())
    return repaired, induced, len(triggers), len(seeds)


def _logits(perceptron: Perceptron, vectors: jax.Array) -> jax.Array:
    # A label must not hang on the rounding of an accelerator's shorter floats.
    exact = jax.lax.Precision.HIGHEST
    hidden = jnp.dot(vectors, perceptron.weights, precision=exact) + perceptron.biases[None]
    out = jnp.dot(jnp.maximum(hidden, 0), perceptron.out_weights, precision=exact)
    return out + perceptron.out_biases[None]


def _check(data: Examples) -> None:
    number, width = data.seeds.shape if data.seeds.ndim == 2 else (0, 0)
    if not number or width < 2:
        raise ValueError(f"seeds have shape {data.seeds.shape}; accepted are [N, K] of 1 or more")
    if data.triggers.shape != data.seeds.shape:
        raise ValueError(f"triggers have shape {data.triggers.shape}, the seeds {data.seeds.shape}")
    for name in ("seeds", "triggers"):
        if not np.isfinite(getattr(data, name)).all():
            raise ValueError(f"{name} hold NaN or infinity; accepted are probabilities")
    for name in ("seed_labels", "trigger_labels"):
        labels = getattr(data, name)
        if labels.shape != (number,) or labels.min() < 0 or labels.max() >= width:
            raise ValueError(
                f"{name} are {labels.shape} from {labels.min(initial=0)} to "
                f"{labels.max(initial=0)}; accepted are ({number},) from 0 to {width - 1}"
            )
