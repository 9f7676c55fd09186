"""Protection: what is hidden, what the attacker is given, and which weights it trains."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnslicer_jax as nns
from nnslicer_jax import training
from nnslicer_jax.data import Dataset
from prune import criteria, masks, protect


class Small(nn.Module):
    """A convolution with batch norm, and a dense layer."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Conv(3, (2, 2), padding="VALID")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.5)(x))
        return nn.Dense(3)(x.reshape((x.shape[0], -1)))


OPTIONS = training.TrainingOptions(epochs=2, batch_size=8, learning_rate=0.05, seed=1)


@functools.cache
def small_data(count=40):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, count).astype(np.int32)
    images = rng.integers(0, 256, (count, 4, 4, 1)).astype(np.uint8)
    return Dataset("small", images, labels, images[:9], labels[:9], ("a", "b", "c"))


@functools.cache
def networks():
    """The victim's variables and freshly drawn ones; no entry of a kernel is the same in both."""
    found = []
    for seed in (1, 2):
        variables = training.initialize(Small(), training.TrainingOptions(seed=seed), (4, 4, 1))
        rng = np.random.default_rng(seed)
        found.append(
            jax.tree.map(lambda a, rng=rng: a + rng.random(a.shape, np.float32), variables)
        )
    return tuple(found)


@functools.cache
def chosen(share=0.5):
    victim, _ = networks()
    graph = nns.trace(Small().apply, victim, np.zeros((1, 4, 4, 1), np.float32))
    return masks.topk(criteria.random(jax.random.key(3), graph, victim), share)


def paired(*trees):
    """Path and leaves of several trees, None being a leaf."""
    flat = [
        dict(jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: leaf is None))
        for tree in trees
    ]
    assert all(found.keys() == flat[0].keys() for found in flat)
    return [(path, *(found[path] for found in flat)) for path in flat[0]]


def bits(leaf):
    return np.asarray(leaf).tobytes()


# ---------------------------------------------------------------- hiding


def test_hidden_where_the_masks_say_and_nowhere_else():
    victim, initial = networks()
    hidden = protect.hide(victim, initial, chosen())
    assert jax.tree.structure(hidden) == jax.tree.structure(victim)
    kernels = 0
    for path, mask, old, first, new in paired(chosen(), victim, initial, hidden):
        if mask is None:
            assert bits(new) == bits(old), path
            continue
        kernels += 1
        assert new.shape == old.shape and new.dtype == old.dtype
        for at in np.ndindex(mask.shape):
            assert new[at] == (first[at] if mask[at] else old[at]) and old[at] != first[at]
    assert kernels == 2


@pytest.mark.parametrize(("share", "counts"), [(0.5, (6, 41)), (0.3, (4, 25)), (1.0, (12, 81))])
def test_as_many_are_hidden_in_each_layer_as_asked(share, counts):
    victim, initial = networks()
    hidden = protect.hide(victim, initial, chosen(share))
    changed = [
        int((np.asarray(new) != np.asarray(old)).sum())
        for path, mask, old, new in paired(chosen(share), victim, hidden)
        if mask is not None
    ]
    assert tuple(changed) == counts


def test_hiding_nothing_and_everything():
    victim, initial = networks()
    nothing = jax.tree.map(lambda a: np.zeros(a.shape, bool), victim)
    everything = jax.tree.map(lambda a: np.ones(a.shape, bool), victim)
    for tree, expected in ((nothing, victim), (everything, initial)):
        for path, new, old in paired(protect.hide(victim, initial, tree), expected):
            assert bits(new) == bits(old), path


def test_any_pytree_of_parameters_and_under_jit():
    params, initial = [jnp.arange(4.0), jnp.ones(2)], [-jnp.arange(4.0), jnp.zeros(2)]
    tree = [np.array([True, False, True, False]), None]
    for hide in (protect.hide, jax.jit(protect.hide)):
        hidden = hide(params, initial, tree)
        np.testing.assert_array_equal(hidden[0], [0, 1, -2, 3])
        np.testing.assert_array_equal(hidden[1], [1, 1])


def test_trees_that_do_not_fit():
    victim, initial = networks()
    with pytest.raises(ValueError, match="^params, initial and masks must be pytrees of the same"):
        protect.hide(victim, initial["params"], chosen())
    with pytest.raises(ValueError, match="same structure$"):
        protect.hide(victim, initial, {"params": chosen()["params"]})
    with pytest.raises(ValueError, match=r"same shapes, not \(4,\), \(4,\), \(3,\) at \[0\]$"):
        protect.hide([jnp.ones(4)], [jnp.ones(4)], [np.ones(3, bool)])
    with pytest.raises(ValueError, match=r"same shapes, not \(4,\), \(1,\) at \[0\]$"):
        protect.hide([jnp.ones(4)], [jnp.ones(1)], [None])


# ---------------------------------------------------------------- the attacker's samples


def test_a_budget_draws_that_many_pairs_and_larger_ones_hold_smaller_ones():
    dataset = small_data()
    known = {bits(i): int(label) for i, label in zip(*dataset[1:3], strict=True)}
    assert len(known) == 40
    before = []
    for budget in (1, 7, 40):
        found = protect.samples(jax.random.key(0), dataset, budget)
        drawn = [bits(image) for image in found.train_images]
        assert len(drawn) == len(set(drawn)) == len(found.train_labels) == budget
        assert [known[image] for image in drawn] == found.train_labels.tolist()
        assert drawn[: len(before)] == before
        assert bits(found.test_images) == bits(dataset.test_images)
        before = drawn
    other = protect.samples(jax.random.key(1), dataset, 40)
    assert [bits(image) for image in other.train_images] != before


@pytest.mark.parametrize("budget", [0, -1, 41, 7.0, 2.5, "7", None, True])
def test_budgets_out_of_range(budget):
    with pytest.raises(ValueError) as caught:
        protect.samples(jax.random.key(0), small_data(), budget)
    said = f"budget must be 1..40, the number of training images, not {budget!r}"
    assert str(caught.value) == said


# ---------------------------------------------------------------- the attack


def exposed():
    return protect.hide(*networks(), chosen())


def test_only_the_hidden_are_trained_and_the_exposed_stay_to_the_bit():
    start = exposed()
    found = protect.retrain(Small(), start, chosen(), small_data(), OPTIONS, trains="hidden")
    for path, mask, old, new in paired(chosen()["params"], start["params"], found["params"]):
        old, new = np.asarray(old), np.asarray(new)
        if mask is None:
            assert bits(new) == bits(old), path
        else:
            mask = np.asarray(mask)
            assert bits(new[~mask]) == bits(old[~mask]), path
            assert (new[mask] != old[mask]).all(), path
    # Of the victim, not only of what it started from.
    victim, _ = networks()
    kernel, mask = (t["params"]["Dense_0"]["kernel"] for t in (victim, chosen()))
    np.testing.assert_array_equal(found["params"]["Dense_0"]["kernel"][~mask], kernel[~mask])
    for _, old, new in paired(start["batch_stats"], found["batch_stats"]):
        assert (np.asarray(new) != np.asarray(old)).all()


def test_everything_is_trained_by_the_stronger_attacker():
    start = exposed()
    found = protect.retrain(Small(), start, chosen(), small_data(), OPTIONS)
    plain = training.train(Small(), small_data(), OPTIONS, variables=start)
    for path, old, new, alike in paired(start, found, plain):
        # The bias before a batch norm has no gradient to speak of.
        if "bias" not in str(path):
            assert (np.asarray(new) != np.asarray(old)).all(), path
        np.testing.assert_allclose(new, alike, rtol=1e-4, atol=1e-5)


def test_what_is_given_is_not_used_up():
    start = exposed()
    before = jax.tree.map(bits, start)
    protect.retrain(Small(), start, chosen(), small_data(), OPTIONS, trains="hidden")
    assert jax.tree.map(bits, start) == before


def test_unknown_attackers():
    with pytest.raises(ValueError, match="^trains must be one of all, hidden, not 'exposed'$"):
        protect.retrain(Small(), exposed(), chosen(), small_data(), OPTIONS, trains="exposed")


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_masks_of_numbers_are_refused(dtype):
    numbers = jax.tree.map(lambda mask: np.asarray(mask, dtype), chosen())
    with pytest.raises(ValueError, match=rf"^masks must be bool, not {np.dtype(dtype)} at \["):
        protect.hide(*networks(), numbers)


def test_variables_without_parameters_are_refused():
    for given, name in (
        ((exposed()["params"], chosen()), "exposed"),
        ((exposed(), chosen()["params"]), "masks"),
        ((exposed(), [True]), "masks"),
    ):
        with pytest.raises(
            ValueError, match=f"^{name} must hold params, as the variables of Small"
        ):
            protect.retrain(Small(), *given, small_data(), OPTIONS)


def test_a_training_option_goes_through(tmp_path):
    protect.retrain(
        Small(), exposed(), chosen(), small_data(), OPTIONS, checkpoint_dir=tmp_path / "kept"
    )
    assert (tmp_path / "kept" / "run.json").is_file()
