"""HYDRA: first scores, the gradient of the scores, and what the three stages leave."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prune import hydra, stages
from prune.masks import counts, kept, topk
from prune.stages import Run, Stage
from tests.tiny import NATURAL, RUN, SEARCH, Killed, Tiny, data, dies_at


@functools.cache
def network():
    return stages.network_of(Tiny(), data())


@functools.cache
def dense():
    return network().initialize(jax.random.key(1))


KERNELS = ("Conv_0", "Conv_1", "Dense_0")


def leaves(tree):
    return jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None)


def test_scaled_scores_are_the_papers():
    params = dense()["params"]
    found = hydra.init_scores(params)
    for module, parts in found.items():
        for name, score in parts.items():
            if name != "kernel":
                assert score is None
                continue
            w = np.asarray(params[module][name], float)
            fan_in = {"Conv_0": 1 * 2 * 2, "Conv_1": 6 * 2 * 2, "Dense_0": 5 * 2 * 2}[module]
            np.testing.assert_allclose(
                score, math.sqrt(6 / fan_in) * w / np.abs(w).max(), rtol=1e-5
            )
    assert not np.asarray(hydra.init_scores({"w": jnp.zeros((3, 2))})["w"]).any()


@pytest.mark.parametrize(
    ("init", "within"),
    [("random", 1 / 20), ("kaiming", math.sqrt(6 / 400)), ("xavier", math.sqrt(6 / 900))],
)
def test_drawn_scores_keep_to_their_range(init, within):
    params = {"kernel": jnp.zeros((2, 2, 100, 125)), "bias": jnp.zeros(125)}
    found = hydra.init_scores(params, init=init, key=jax.random.key(0))
    assert found["bias"] is None
    score = np.asarray(found["kernel"], float)
    # 50,000 even draws: the ends are nearly met, the moments those of an even distribution.
    assert within * 0.999 < np.abs(score).max() <= within * (1 + 1e-6)
    np.testing.assert_allclose(score.mean(), 0, atol=6 * within / math.sqrt(3 * score.size))
    np.testing.assert_allclose(score.std(), within / math.sqrt(3), rtol=0.02)


def test_scores_of_filters_go_by_their_mean_weight():
    params = dense()["params"]
    found = hydra.init_scores(params, unit="filter")
    assert found["Dense_0"]["kernel"] is None
    w = np.abs(np.asarray(params["Conv_1"]["kernel"])).mean((0, 1, 2))
    assert found["Conv_1"]["kernel"].shape == (1, 1, 1, 5)
    np.testing.assert_allclose(
        found["Conv_1"]["kernel"][0, 0, 0], math.sqrt(6 / 24) * w / w.max(), rtol=1e-5
    )


def test_the_gradient_of_scores_is_that_of_the_paper():
    params = dense()["params"]
    rng = np.random.default_rng(0)
    scores = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s.shape), "float32"), hydra.init_scores(params)
    )
    scores["Dense_0"]["kernel"] = scores["Dense_0"]["kernel"].at[3].set(0)
    fixed = {"params": params, "counts": counts(scores, 0.3)}
    upstream = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), "float32"), params)

    def loss(trained):
        found = hydra.Scored().effective(trained, fixed)
        return sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), found, upstream)))

    along = hydra.norms(params, dense()["batch_stats"])
    gradient = jax.grad(loss)({"scores": scores, "norms": along})
    effective = hydra.Scored().effective({"scores": scores, "norms": along}, fixed)
    for module in KERNELS:
        s, w, g = (np.asarray(t[module]["kernel"]) for t in (scores, params, upstream))
        np.testing.assert_allclose(
            gradient["scores"][module]["kernel"], np.sign(s) * w * g, rtol=1e-5, atol=1e-7
        )
        order = np.argsort(-np.abs(s).ravel(), kind="stable")[: math.ceil(0.3 * s.size)]
        mask = np.isin(np.arange(s.size), order).reshape(s.shape)
        np.testing.assert_array_equal(effective[module]["kernel"], np.where(mask, w, 0))
        np.testing.assert_array_equal(effective[module]["bias"], params[module]["bias"])
    for name in ("scale", "bias"):
        np.testing.assert_array_equal(
            gradient["norms"]["BatchNorm_0"][name], upstream["BatchNorm_0"][name]
        )


def test_norms_are_those_with_statistics():
    found = hydra.norms(dense()["params"], dense()["batch_stats"])
    there = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(found)
    }
    assert there == {"BatchNorm_0/scale", "BatchNorm_0/bias"}
    assert jax.tree.leaves(hydra.norms(dense()["params"], {})) == []


# Three stages ---------------------------------------------------------------------------------

TRADES = Stage("trades", {"eps": 0.05, "step_size": 0.02, "steps": 2}, epochs=2, batch_size=8)


def _whole(folder=None, dataset=None):
    return hydra.prune(
        Tiny(), dataset or data(), 0.3, pretrain=NATURAL, search=TRADES, finetune=NATURAL,
        run=Run(seed=3, folder=folder, save_every=4, log_every=4),
    )  # fmt: skip


@functools.cache
def pruned():
    return _whole()


def test_three_stages_leave_exactly_the_share():
    variables, masks = pruned()
    for module in KERNELS:
        w, mask = variables["params"][module]["kernel"], np.asarray(masks[module]["kernel"])
        assert mask.sum() == math.ceil(0.3 * mask.size)
        # Exactly 0, whatever fine-tuning did.
        assert not np.asarray(w)[~mask].any() and np.asarray(w)[mask].all()
        assert masks[module]["bias"] is None
    assert kept(masks)[0] == sum(math.ceil(0.3 * n) for n in (24, 120, 60))


def test_a_killed_run_goes_on_in_every_stage(tmp_path):
    # Ten steps a stage.
    for reads in (7, 6, 12):
        with pytest.raises(Killed):
            _whole(tmp_path, dies_at(data(), reads))
    found = _whole(tmp_path)
    for ours, theirs in zip(leaves(found), leaves(pruned()), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_array_equal(ours, theirs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["finetune", "pretrain", "search"]


@pytest.mark.parametrize("train_norms", [True, False])
def test_the_search_leaves_weights_alone(train_norms):
    scores = hydra.init_scores(dense()["params"])
    found = hydra.learn(
        network(), data(), SEARCH, dense(), scores, counts(scores, 0.5), train_norms=train_norms,
        run=RUN,
    )  # fmt: skip
    for module in KERNELS:
        mask, w = found.masks[module]["kernel"], dense()["params"][module]["kernel"]
        np.testing.assert_array_equal(
            found.variables["params"][module]["kernel"], np.where(mask, w, 0)
        )
        np.testing.assert_array_equal(
            found.variables["params"][module]["bias"], dense()["params"][module]["bias"]
        )
    scale = found.variables["params"]["BatchNorm_0"]["scale"]
    assert (scale == dense()["params"]["BatchNorm_0"]["scale"]).all() == (not train_norms)
    mean = found.variables["batch_stats"]["BatchNorm_0"]["mean"]
    assert (mean != dense()["batch_stats"]["BatchNorm_0"]["mean"]).all()
    # The search chose something else than it started from.
    start = topk(jax.tree.map(jnp.abs, scores), 0.5)
    assert any(
        (np.asarray(start[m]["kernel"]) != np.asarray(found.masks[m]["kernel"])).any()
        for m in KERNELS
    )


def test_layers_keep_what_they_are_told():
    shapes = hydra.init_scores(dense()["params"])
    numbers = jax.tree.map(lambda s: s.size // 3, shapes)
    found = hydra.prune(
        Tiny(), data(), numbers, variables=dense(), search=SEARCH, finetune=NATURAL, run=RUN
    )
    for module, n in zip(KERNELS, (24, 120, 60), strict=True):
        assert found.masks[module]["kernel"].sum() == n // 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": 0}, "keep must be above 0 and at most 1, not 0"),
        ({"keep": 1.5}, "keep must be above 0 and at most 1, not 1.5"),
        ({"init": "ones"}, "init must be one of scaled, random, kaiming, xavier, not 'ones'"),
        ({"unit": "row"}, "unit must be weight or filter, not 'row'"),
        ({"scope": "all"}, "scope must be layer or global, not 'all'"),
        ({"pretrain": None}, "one of pretrain and variables must be given, not both"),
    ],
)
def test_bad_input_is_told_before_anything_is_trained(options, said):
    given = {"keep": 0.5, "pretrain": NATURAL, **options}
    with pytest.raises(ValueError) as caught:
        hydra.prune(Tiny(), dies_at(data(), 0), search=SEARCH, finetune=NATURAL, **given)
    assert str(caught.value) == said


def test_drawn_scores_need_a_key_and_something_to_prune():
    with pytest.raises(ValueError, match="key is needed to draw scores of init='random'"):
        hydra.init_scores({"w": jnp.zeros((2, 2))}, init="random")
    with pytest.raises(ValueError, match="params must hold an array of 4 or more axes to prune"):
        hydra.init_scores({"w": jnp.zeros((2, 2))}, unit="filter")
