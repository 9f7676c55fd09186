"""EffectivePath against the naive oracle, on a small network of every layer kind."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

import nnslicer_jax as nns
from tests import nets
from tests.naive import slicing as naive
from tests.test_contribution import MARGIN, assert_same, exact, recorded, top

THETAS = (0.25, 0.5, 1.0)


def answer(prepared, index, theta, outputs=None) -> naive.Answer:
    outputs = top(prepared, index) if outputs is None else outputs
    return naive.effective_path(prepared.case.network, prepared.values[index], outputs, theta)


def path(prepared, theta, **options) -> nns.Slice:
    return nns.effective_path(
        prepared.graph, prepared.case.params, prepared.images, theta=theta, **options
    )


def one_sum(terms: list[float], theta: float, select: str) -> list[int]:
    """Which of the weights are on the path of `sum(weights)`."""
    params = {"weights": jnp.asarray(terms, jnp.float32)[:, None]}
    images = jnp.ones((1, len(terms)))
    graph = nns.trace(lambda p, x: x @ p["weights"], params, images)
    piece = nns.effective_path(graph, params, images, theta=theta, select=select)
    return np.asarray(piece.synapses["weights"])[:, 0].tolist()


@pytest.mark.parametrize(
    ("terms", "theta", "kept"),
    [
        ([5, 3, 1, 1], 0.5, [1, 0, 0, 0]),  # 5 reaches 5
        ([4, 3, 2, 1], 0.5, [1, 1, 0, 0]),  # 4 does not reach 5, 7 does
        ([2, 2, 2, 2], 0.5, [1, 1, 1, 1]),  # equal terms stay together
        ([4, 3, 3, -2], 0.75, [1, 1, 1, 0]),
        ([9, -8, 1, 1], 1.0, [1, 0, 0, 0]),  # 9 reaches 3
        ([1, 1, -2, 0], 0.5, [1, 1, 0, 0]),  # the sum is 0: the largest, with its ties
        ([-1, -2, -3], 0.5, [1, 0, 0]),  # the sum is negative: the largest
        ([0, -1, -2], 0.5, [0, 1, 0]),  # 0 is no term
        ([0, 0, 0], 0.5, [0, 0, 0]),
        ([4, 0, 0], 1.0, [1, 0, 0]),  # what adds nothing is not needed
    ],
)
def test_terms_of_one_sum(terms, theta, kept):
    for select in ("host", "device"):
        assert one_sum(terms, theta, select) == kept, select
    assert [int(k) for k in naive.effective([float(t) for t in terms], theta)[0]] == kept


@pytest.mark.parametrize("name", nets.EXACT)
def test_paths_equal_the_oracle(name):
    prepared = exact(name, "channel")
    for theta in THETAS:
        paths = path(prepared, theta, per_sample=True)
        for row in range(len(prepared.images)):
            assert_same(paths, answer(prepared, row, theta), row)


@pytest.mark.parametrize("name", nets.INEXACT)
def test_recorded_paths_equal_the_oracle(name):
    prepared = recorded(name)
    compared = skipped = 0
    for theta in (0.3, 0.5, 0.9):
        paths = path(prepared, theta, per_sample=True)
        for row in range(len(prepared.images)):
            expected = answer(prepared, row, theta)
            if expected.margin < MARGIN:
                skipped += 1
                continue
            compared += 1
            assert_same(paths, expected, row)
    assert compared > 9 * skipped


@pytest.mark.parametrize("name", ["residual", "avg_pool"])
def test_path_of_a_set_counts_its_images(name):
    prepared = exact(name, "channel")
    # Counts add up, so that what is not 0 is on the path of some image.
    expected = naive.merged(answer(prepared, i, 0.5) for i in range(3))
    assert max(int(a.max()) for a in expected.neurons.values()) > 1
    assert_same(path(prepared, 0.5), expected)
    assert_same(path(prepared, 0.5, batch_size=2), expected)


def test_chosen_outputs():
    prepared = exact("avg_pool", "channel")
    for outputs in ([2, 0, 1], [[0, 1], [2, 1], [0, 2]]):
        paths = path(prepared, 0.5, outputs=outputs, per_sample=True)
        for row, chosen in enumerate(outputs):
            expected = answer(prepared, row, 0.5, np.atleast_1d(chosen).tolist())
            assert_same(paths, expected, row)


def test_a_silent_output_has_no_path():
    params = {"weights": jnp.array([[1.0, -1.0], [2.0, -2.0]])}
    images = jnp.ones((2, 2))
    graph = nns.trace(lambda p, x: nn.relu(x @ p["weights"]), params, images)
    paths = nns.effective_path(graph, params, images, outputs=[0, 1], per_sample=True)
    assert paths.neurons["relu"].tolist() == [[1, 0], [0, 1]]
    assert paths.neurons["dot_general"].tolist() == [[1, 0], [0, 0]]
    assert paths.synapses["weights"].tolist() == [[[0, 0], [1, 0]], [[0, 0], [0, 0]]]
