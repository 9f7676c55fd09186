"""The choice of mutation operators, against the paper's loop of candidates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difftest import select


def _state(last, tried, succeeded):
    return select.SelectState(
        jnp.int32(last), jnp.asarray(tried, jnp.int32), jnp.asarray(succeeded, jnp.int32)
    )


def test_ranks_follow_the_success_rate():
    state = _state(-1, [10, 10, 10, 0], [1, 5, 3, 0])
    assert select.ranks(jax.random.key(0), state).tolist() == [2, 0, 1, 3]


def test_ties_are_shuffled():
    keys = jax.random.split(jax.random.key(0), 200)
    ranks = jax.vmap(select.ranks, (0, None))(keys, select.init(7))
    assert (np.sort(ranks, axis=1) == np.arange(7)).all()
    assert len({tuple(row) for row in np.asarray(ranks).tolist()}) > 150


@pytest.mark.parametrize("rule", ["metropolis", "ranked"])
def test_drawn_as_often_as_by_the_loop_of_candidates(rule):
    tried, succeeded, last = [9, 9, 9, 9], [1, 8, 4, 6], 2
    rank = np.array([3, 0, 2, 1])
    before = rank[last] if rule == "metropolis" else -1
    rng = np.random.default_rng(0)
    counts = np.zeros(4)
    for _ in range(4000):
        while True:
            candidate = rng.integers(4)
            if rng.random() < (1 - 1 / 4) ** (rank[candidate] - before):
                break
        counts[candidate] += 1
    keys = jax.random.split(jax.random.key(1), 4000)
    drawn = jax.vmap(select.draw, (0, None, None))(keys, _state(last, tried, succeeded), rule)
    ours = np.bincount(drawn, minlength=4)
    # Six standard deviations of the difference of two counts of 4,000.
    assert np.abs(ours - counts).max() < 6 * np.sqrt(2 * 4000 / 4)
    law = select.weights(jnp.asarray(rank), jnp.int32(last), rule)
    np.testing.assert_allclose(ours / 4000, law / law.sum(), atol=0.05)


def test_uniform_until_there_is_a_last_operator():
    rank = jnp.arange(7)
    assert select.weights(rank, jnp.int32(-1), "ranked").tolist() == [1.0] * 7
    assert select.weights(rank, jnp.int32(3), "uniform").tolist() == [1.0] * 7


def test_update_counts():
    state = select.update(select.init(3), jnp.int32(1), jnp.bool_(True), jnp.int32(1))
    state = select.update(state, jnp.int32(2), jnp.bool_(False), state.last)
    assert state.tried.tolist() == [0, 1, 1]
    assert state.succeeded.tolist() == [0, 1, 0]
    assert int(state.last) == 1


def test_unknown_rule():
    with pytest.raises(ValueError, match="rule is 'greedy'; accepted are metropolis, ranked"):
        select.draw(jax.random.key(0), select.init(7), "greedy")
