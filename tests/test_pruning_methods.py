"""The other methods: LWM, ADMM, HARP, SNIP, rounds, chance, filters, training from scratch."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nnslicer_jax as nns
from prune import (
    admm,
    compact,
    filters,
    harp,
    hydra,
    lwm,
    masks,
    random_masks,
    rounds,
    scratch,
    snip,
    stages,
)
from tests.test_hydra import KERNELS, dense, network
from tests.tiny import NATURAL, RUN, SEARCH, Tiny, data

SIZES = {"Conv_0": 24, "Conv_1": 120, "Dense_0": 60}


def kernels(tree):
    return [np.asarray(tree[module]["kernel"]) for module in KERNELS]


def smallest_gone(w, number):
    """A mask without the entries nearest to 0, the later of equal ones first."""
    order = sorted(range(w.size), key=lambda i: (-abs(float(w.ravel()[i])), i))
    return np.isin(np.arange(w.size), order[:number]).reshape(w.shape)


# LWM ------------------------------------------------------------------------------------------


def test_lwm_keeps_the_largest_weights_of_each_layer():
    found = lwm.prune(Tiny(), data(), 0.2, variables=dense(), finetune=NATURAL, run=RUN)
    for w, mask, left in zip(
        kernels(dense()["params"]), kernels(found.masks), kernels(found.variables["params"]),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(mask, smallest_gone(w, math.ceil(0.2 * w.size)))
        assert not left[~mask].any() and (left[mask] != w[mask]).all()


def test_the_share_falls_by_one_factor_an_epoch():
    first = {"w": jnp.zeros(1000), "b": None}
    left = lwm.schedule(first, 0.01, 4)["w"]
    np.testing.assert_array_equal(left, [math.ceil(1000 * 0.01 ** (e / 4)) for e in (1, 2, 3, 4)])


def test_gradual_pruning_takes_the_least_of_what_is_left():
    w = jnp.asarray([0.5, -3.0, 0.1, 2.0, -0.2])
    fixed = {
        "masks": {"w": jnp.asarray([True, True, False, True, True]), "b": None},
        "counts": {"w": jnp.asarray([3, 2]), "b": None},
    }
    trained = {"w": w.at[2].set(9.0), "b": jnp.ones(1)}
    renew = jax.jit(lwm.Gradual().renewed)
    trained, fixed = renew(trained, fixed, 0)
    np.testing.assert_array_equal(trained["w"], [0.5, -3.0, 0, 2.0, 0])
    trained, fixed = renew(trained, fixed, 1)
    np.testing.assert_array_equal(fixed["masks"]["w"], [False, True, False, True, False])
    np.testing.assert_array_equal(trained["b"], [1])


def test_many_steps_end_at_the_share():
    found = lwm.prune(
        Tiny(), data(), 0.25, variables=dense(), search=SEARCH, finetune=NATURAL, run=RUN
    )
    for mask, left in zip(kernels(found.masks), kernels(found.variables["params"]), strict=True):
        assert mask.sum() == math.ceil(0.25 * mask.size)
        assert not left[~mask].any()


# ADMM -----------------------------------------------------------------------------------------


def test_the_steps_of_admm_are_its_formulas():
    w = {"w": jnp.asarray([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.ones(2)}
    u = {"w": jnp.asarray([[0.5, 1.5], [0.25, -1.0]]), "b": None}
    fixed = admm.projected(w, u, {"w": 2, "b": None})
    # W + U = [[1.5, -0.5], [0.75, 2.0]]: the two largest stay.
    np.testing.assert_array_equal(fixed["z"]["w"], [[1.5, 0], [0, 2.0]])
    np.testing.assert_array_equal(fixed["u"]["w"], [[0, -0.5], [0.75, 0]])
    method = admm.Alternating(0.1)
    value, gradient = jax.value_and_grad(method.penalty)(w, fixed, 0)
    apart = np.asarray(w["w"]) - fixed["z"]["w"] + fixed["u"]["w"]
    np.testing.assert_allclose(value, 0.05 * (np.asarray(apart) ** 2).sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient["w"], 0.1 * apart, rtol=1e-6)
    np.testing.assert_array_equal(gradient["b"], [0, 0])
    _, renewed = method.renewed(w, fixed, 0)
    # W + U is now [[1, -2.5], [1.25, 3]].
    np.testing.assert_array_equal(renewed["z"]["w"], [[0, -2.5], [0, 3.0]])
    np.testing.assert_array_equal(renewed["u"]["w"], [[1.0, 0], [1.25, 0]])


def test_admm_draws_weights_to_their_sparse_copy():
    def left_out(rho):
        params = dense()["params"]
        zeros = jax.tree.map(jnp.zeros_like, lwm.scores(params))
        numbers = masks.counts(zeros, 0.2)
        fixed = {**admm.projected(params, zeros, numbers), "u": zeros}
        trained, fixed, _ = stages.fit(
            network(), data(), SEARCH, params, {"batch_stats": dense()["batch_stats"]},
            name="search", method=admm.Alternating(rho), fixed=fixed, run=RUN,
        )  # fmt: skip
        found = masks.largest(lwm.scores(trained), numbers)
        return sum(
            (w[~mask] ** 2).sum() for w, mask in zip(kernels(trained), kernels(found), strict=True)
        )

    assert left_out(1.0) < 0.5 * left_out(1e-6)


def test_admm_keeps_the_share():
    found = admm.prune(
        Tiny(), data(), 0.2, variables=dense(), search=SEARCH, finetune=NATURAL, run=RUN
    )
    assert [mask.sum() for mask in kernels(found.masks)] == [5, 24, 12]
    with pytest.raises(ValueError, match="rho must be above 0, not 0"):
        admm.prune(Tiny(), data(), 0.2, variables=dense(), search=SEARCH, finetune=NATURAL, rho=0)


# HARP -----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    layers=st.lists(
        st.tuples(st.floats(0.001, 1), st.integers(1, 500)), min_size=1, max_size=6
    ),
    share=st.floats(0, 1),
)  # fmt: skip
def test_fitted_numbers_meet_the_total(layers, share):
    kept, sizes = zip(*layers, strict=True)
    total = len(sizes) + round(share * (sum(sizes) - len(sizes)))
    found = harp.fitted(kept, sizes, total)
    assert sum(found) == total
    assert all(1 <= n <= size for n, size in zip(found, sizes, strict=True))
    # Of layers that are neither full nor at one weight, the shares are one multiple but for 1.
    free = [i for i, (n, size) in enumerate(zip(found, sizes, strict=True)) if 2 < n < size - 1]
    for i in free:
        for j in free:
            ratio = kept[i] * sizes[i] / (kept[j] * sizes[j])
            assert found[i] - 1 <= (found[j] + 1) * ratio + 1e-6


def test_rates_start_at_a_tenth_or_the_target():
    scores = {"w": jnp.zeros(10), "b": None}
    for target, start in [(0.01, 0.1), (0.1, 0.1), (0.5, 0.5)]:
        rates = harp.first_rates(scores, target)
        assert rates["b"] is None
        np.testing.assert_allclose(harp.shares(rates, jnp.float32(target))["w"], start, rtol=1e-5)
    # However low r falls, a tenth of the target stays; however high it rises, no more than all.
    ends = harp.shares({"a": jnp.float32(-99), "b": jnp.float32(99)}, jnp.float32(0.05))
    np.testing.assert_allclose([ends["a"], ends["b"]], [0.005, 1], rtol=1e-6)


def test_the_gradient_of_rates_is_the_sum_of_the_masks():
    params = dense()["params"]
    scores = hydra.init_scores(params)
    rates = harp.first_rates(scores, 0.05)
    rng = np.random.default_rng(0)
    upstream = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), "float32"), params)
    fixed = {"params": params, "target": jnp.float32(0.05)}
    norms = hydra.norms(params, {})
    method = harp.Holistic(0.01)

    def loss(trained):
        found = method.effective(trained, fixed)
        return sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), found, upstream)))

    trained = {"scores": scores, "rates": rates, "norms": norms}
    gradient = jax.grad(loss)(trained)
    effective = method.effective(trained, fixed)
    for module in KERNELS:
        s, w, g = (np.asarray(t[module]["kernel"]) for t in (scores, params, upstream))
        np.testing.assert_allclose(
            gradient["scores"][module]["kernel"], np.sign(s) * w * g, rtol=1e-5, atol=1e-7
        )
        sigmoid = 1 / (1 + math.exp(-float(rates[module]["kernel"])))
        slope = (1 - 0.005) * sigmoid * (1 - sigmoid)
        np.testing.assert_allclose(
            gradient["rates"][module]["kernel"], (w * g).sum() * slope, rtol=1e-4, atol=1e-6
        )
        kept = np.asarray(effective[module]["kernel"]) != 0
        np.testing.assert_array_equal(kept, smallest_gone(s, round(0.1 * s.size)))


def test_the_penalty_counts_what_is_above_the_target():
    scores = {"a": jnp.zeros(30), "b": jnp.zeros((7, 10))}
    method = harp.Holistic(0.01)
    for rates in ({"a": 0.3, "b": -1.0}, {"a": -9.0, "b": -9.0}):
        trained = {"scores": scores, "rates": jax.tree.map(jnp.float32, rates)}
        k = {n: 0.02 + 0.98 / (1 + math.exp(-r)) for n, r in rates.items()}
        share = (30 * k["a"] + 70 * k["b"]) / 100
        for epoch in (0, 4):
            np.testing.assert_allclose(
                method.penalty(trained, {"target": jnp.float32(0.2)}, epoch),
                0.01 * (epoch + 1) * max(0, share / 0.2 - 1), rtol=1e-5,
            )  # fmt: skip


def test_harp_keeps_as_many_as_the_others():
    found = harp.prune(
        Tiny(), data(), 0.1, variables=dense(), search=SEARCH, finetune=NATURAL, run=RUN
    )
    assert masks.kept(found.masks)[0] == sum(math.ceil(0.1 * n) for n in SIZES.values())
    for mask, left in zip(kernels(found.masks), kernels(found.variables["params"]), strict=True):
        assert mask.any() and not left[~mask].any()


# SNIP and rounds ------------------------------------------------------------------------------


def test_snip_scores_are_weights_times_gradient():
    """Of two batches: the mean gradient of the images drawn, natural loss written out."""
    stage = dataclasses.replace(NATURAL, batch_size=16)
    key, params = jax.random.key(5), dense()["params"]
    found = snip.scores(key, network(), data(), stage, dense(), batches=2)
    rows = np.asarray(jax.random.permutation(jax.random.split(key)[0], 40)).reshape(-1)

    def loss(params, x, y):
        variables = {**dense(), "params": params}
        logits, _ = Tiny().apply(variables, x / 255, train=True, mutable=["batch_stats"])
        return -jax.nn.log_softmax(logits)[np.arange(16), y].mean()

    slope = jax.jit(jax.grad(loss))
    images, labels = data().train_images.astype(np.float32)[rows], data().train_labels[rows]
    slopes = [slope(params, images[i : i + 16], labels[i : i + 16]) for i in (0, 16)]
    for module in KERNELS:
        w, first, second = (np.asarray(t[module]["kernel"]) for t in (params, *slopes))
        np.testing.assert_allclose(
            found[module]["kernel"], np.abs(w * (first + second) / 2), rtol=1e-3, atol=1e-6
        )
        assert found[module]["bias"] is None


def test_snip_keeps_the_share_of_all_or_of_each():
    run = functools.partial(
        snip.prune, Tiny(), data(), 0.2, variables=dense(), search=SEARCH, finetune=NATURAL, run=RUN
    )
    assert [mask.sum() for mask in kernels(run().masks)] == [5, 24, 12]
    found = run(scope="global")
    assert masks.kept(found.masks)[0] == math.ceil(0.2 * sum(SIZES.values()))
    for mask, left in zip(kernels(found.masks), kernels(found.variables["params"]), strict=True):
        assert not left[~mask].any()
    with pytest.raises(ValueError, match="batches must be at least 1, not 0"):
        run(batches=0)


@pytest.mark.parametrize("init", ["scaled", "random"])
def test_rounds_prune_more_of_what_is_left(init, tmp_path, monkeypatch):
    after, tuned = [], stages.fine_tune

    def noted(*args, **options):
        after.append(tuned(*args, **options))
        return after[-1]

    monkeypatch.setattr(stages, "fine_tune", noted)
    found = rounds.prune(
        Tiny(), data(), 0.16, rounds=2, variables=dense(), search=SEARCH, finetune=NATURAL,
        init=init, run=dataclasses.replace(RUN, folder=tmp_path),
    )  # fmt: skip
    assert len(after) == 2 and found is after[-1]
    first, second = (kernels(one.masks) for one in after)
    for before, mask, w in zip(first, second, kernels(found.variables["params"]), strict=True):
        assert before.sum() == math.ceil(0.4 * mask.size)
        assert mask.sum() == math.ceil(0.16 * mask.size)
        assert (before | ~mask).all() and not w[~mask].any() and w[mask].all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round_1", "round_2"]


def test_one_round_is_hydra():
    given = {"variables": dense(), "search": SEARCH, "finetune": NATURAL, "run": RUN}
    found = rounds.prune(Tiny(), data(), 0.3, rounds=1, **given)
    for ours, theirs in zip(
        jax.tree.leaves(found), jax.tree.leaves(hydra.prune(Tiny(), data(), 0.3, **given)),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match="rounds must be at least 1, not 0"):
        rounds.prune(Tiny(), data(), 0.3, rounds=0, **given)


# Chance, filters, from scratch ----------------------------------------------------------------


def test_random_masks_are_of_their_key():
    params = dense()["params"]
    draws = [random_masks.draw(jax.random.key(i), params, 0.3) for i in (0, 0, 1)]
    assert [mask.sum() for mask in kernels(draws[0])] == [8, 36, 18]
    same = [
        [np.array_equal(a, b) for a, b in zip(kernels(draws[0]), kernels(other), strict=True)]
        for other in draws[1:]
    ]
    assert all(same[0]) and not any(same[1])


@functools.cache
def filtered():
    return hydra.prune(
        Tiny(), data(), 0.5, unit="filter", variables=dense(), search=SEARCH, finetune=NATURAL,
        run=RUN,
    )  # fmt: skip


def test_pruned_filters_make_a_smaller_network_of_the_same_outputs():
    found = filtered()
    there = [(np.asarray(found.masks[m]["kernel"])).any((0, 1, 2)).sum() for m in KERNELS[:2]]
    assert there == [3, 3]
    graph = network().graph
    small = compact.compact(graph, found.variables, filters.masks_of_variables(found))
    images = data().test_images.astype(np.float32) / 255
    logits, _ = nns.evaluate(small.graph, small.params, images)
    np.testing.assert_allclose(
        logits, network().predict(found.variables, images), rtol=1e-4, atol=1e-5
    )
    # Convolutions of 3 and 3 filters, dense from 2 * 2 * 3; batch norm has four arrays.
    expected = (4 * 3 + 3) + 4 * 3 + (4 * 3 * 3 + 3) + (12 * 3 + 3)
    assert compact.size(small.graph, small.params).parameters == expected


def test_least_filters_go_first():
    params = dense()["params"]
    scores = lwm.scores(params, unit="filter")
    w = np.abs(np.asarray(params["Conv_0"]["kernel"])).mean((0, 1, 2))
    np.testing.assert_allclose(scores["Conv_0"]["kernel"].ravel(), w, rtol=1e-6)
    assert scores["Dense_0"]["kernel"] is None


def test_from_scratch_trains_the_structure_alone():
    found = scratch.train(Tiny(), data(), filtered().masks, NATURAL, run=RUN)
    fresh = network().initialize(jax.random.key(RUN.seed))
    for w, mask, other in zip(
        kernels(found.variables["params"]), kernels(filtered().masks),
        kernels(fresh["params"]), strict=True,
    ):  # fmt: skip
        assert not w[~mask].any()
        # Trained, but from the fresh weights: within what ten small steps can do.
        assert (w[mask] != other[mask]).any()
    with pytest.raises(ValueError, match="masks must be like the parameters of the model"):
        scratch.train(Tiny(), data(), {"w": jnp.ones((2, 2), bool)}, NATURAL, run=RUN)
