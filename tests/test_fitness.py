"""Difference and novelty, on vectors small enough to do by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from difftest import fitness


def test_difference_is_of_the_top_probabilities():
    original = jnp.array([[0.75, 0.25], [0.5, 0.5]])
    compressed = jnp.array([[0.5, 0.5], [0.125, 0.875]])
    assert fitness.difference(original, compressed).tolist() == [0.25, 0.375]


def test_novel_is_farther_than_a_half_in_squared_l2():
    store = fitness.add(fitness.empty(4, 1), jnp.array([0.0, 0.0]))
    assert not fitness.novel(store, jnp.array([0.5, 0.5]))  # exactly 0.5
    assert fitness.novel(store, jnp.array([0.5, 0.75]))


def test_unused_rows_count_for_nothing():
    assert fitness.novel(fitness.empty(4, 1), jnp.array([0.0, 0.0]))


def test_against_a_list():
    rng = np.random.default_rng(0)
    vectors = rng.dirichlet(np.full(3, 0.3), size=(60, 2)).reshape(60, 6).astype(np.float32)
    store, seen = fitness.empty(64, 3), []
    for vector in vectors:
        expected = all(((vector - other) ** 2).sum() > 0.5 for other in seen)
        assert bool(fitness.novel(store, jnp.asarray(vector))) == expected
        if expected:
            seen.append(vector)
            store = fitness.add(store, jnp.asarray(vector))
    assert int(store.filled) == len(seen) > 2


def test_a_full_store_stays_and_grows():
    store = fitness.empty(1, 1)
    for value in (1.0, 2.0):
        store = fitness.add(store, jnp.array([value, value]))
    assert store.vectors.tolist() == [[1.0, 1.0]]
    larger = fitness.grown(jax.tree.map(lambda leaf: leaf[None], store))
    assert larger.vectors.tolist() == [[[1.0, 1.0], [0.0, 0.0]]]
    assert larger.filled.tolist() == [1]
