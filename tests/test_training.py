"""Training: the data order, augmentation, exact resumption, and runs that go wrong."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nnslicer_jax import checkpoint, training
from nnslicer_jax.data import Dataset
from nnslicer_jax.training import TrainingOptions


class Tiny(nn.Module):
    """Batch norm and dropout, so that all kinds of state are carried."""

    num_classes: int = 3

    @nn.compact
    def __call__(self, x, *, train=False):
        x = x.reshape((x.shape[0], -1))
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x)))
        x = nn.Dropout(0.25, deterministic=not train)(x)
        return nn.Dense(self.num_classes)(x)


class Linear(nn.Module):
    """Two dense layers, without state."""

    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x.reshape((x.shape[0], -1)))))


@functools.cache
def tiny_data(count=50):
    """Three classes that differ by the row that is bright."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, count).astype(np.int32)
    images = rng.integers(0, 100, (count, 4, 4, 1)).astype(np.uint8)
    images[np.arange(count), labels] += 100
    return Dataset("tiny", images, labels, images[:20], labels[:20], ("a", "b", "c"))


OPTIONS = TrainingOptions(epochs=3, batch_size=8, learning_rate=0.05, crop=1, flip=True, seed=3)


@functools.cache
def uninterrupted():
    return training.train(Tiny(), tiny_data(), OPTIONS)


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


# ---------------------------------------------------------------- data order and augmentation


def test_each_epoch_is_a_permutation_that_seed_and_epoch_decide():
    orders = {(s, e): training.batch_order(s, e, 100) for s in (0, 1) for e in (0, 1)}
    for (seed, epoch), order in orders.items():
        np.testing.assert_array_equal(np.sort(order), np.arange(100))
        np.testing.assert_array_equal(order, training.batch_order(seed, epoch, 100))
    assert len({tuple(order) for order in orders.values()}) == 4


def test_augmentation_moves_and_mirrors():
    image = np.arange(1, 13, dtype=np.uint8).reshape(3, 4, 1)
    images = np.broadcast_to(image, (200, 3, 4, 1))
    out = np.asarray(training.augment(jax.random.key(0), jnp.asarray(images), crop=1, flip=True))
    assert out.dtype == np.uint8
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    windows = [padded[i : i + 3, j : j + 4] for i in range(3) for j in range(3)]
    possible = {w.tobytes() for w in windows} | {w[:, ::-1].tobytes() for w in windows}
    assert {row.tobytes() for row in out} == possible


def test_no_augmentation_changes_nothing():
    images = tiny_data().train_images[:4]
    out = training.augment(jax.random.key(0), jnp.asarray(images), crop=0, flip=False)
    np.testing.assert_array_equal(out, images)


# ---------------------------------------------------------------- one step, restated


def test_a_step_is_nesterov_with_weight_decay_on_kernels():
    model = Linear()
    options = TrainingOptions(learning_rate=0.1, label_smoothing=0.3, weight_decay=0.01)
    images = np.random.default_rng(0).integers(0, 256, (4, 4, 4, 1)).astype(np.uint8)
    labels = np.array([0, 2, 1, 1], np.int32)
    params = training.initialize(model, options, (4, 4, 1))["params"]

    def loss(params):
        logits = model.apply({"params": params}, images / np.float32(255))
        targets = jnp.full((4, 3), 0.1).at[np.arange(4), labels].add(0.7)
        return -(targets * jax.nn.log_softmax(logits)).sum(1).mean()

    value, gradient = jax.value_and_grad(loss)(params)
    rate = float(optax.cosine_onecycle_schedule(10, 0.1)(0))

    def change(p, g):
        g = g + 0.01 * p if p.ndim > 1 else g
        return p - rate * (g + 0.9 * g)

    expected = jax.tree.map(change, params, gradient)
    state = training.TrainState(
        jnp.zeros((), jnp.int32),
        {"params": jax.tree.map(jnp.copy, params)},
        training.optimizer(options, 10).init(params),
    )
    state, info = training.make_step(model, options, 10)(state, images, labels)
    np.testing.assert_allclose(info.loss, value, rtol=1e-5)
    assert int(state.step) == 1 and bool(info.finite)
    for ours, theirs in zip(
        jax.tree.leaves(state.variables["params"]), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
def test_training_learns(schedule):
    options = dataclasses.replace(OPTIONS, crop=0, flip=False, epochs=20, schedule=schedule)
    model, dataset = Tiny(), tiny_data()
    variables = training.train(model, dataset, options)
    images, labels = dataset.test_images, dataset.test_labels
    assert training.count_correct(model, variables, images, labels) >= 19
    first = training.initialize(model, options, (4, 4, 1))
    assert training.count_correct(model, first, images, labels) < 15


@pytest.mark.slow  # A deadlock of XLA's CPU collectives would end the whole run of the tests.
def test_the_batch_is_shared_among_devices():
    if jax.device_count() == 1:
        pytest.skip("needs several devices")
    devices = jax.devices()[:2]
    shared = training.train(Tiny(), tiny_data(), OPTIONS, devices=devices, log_every=1)
    assert {frozenset(a.devices()) for a in jax.tree.leaves(shared)} == {frozenset(devices)}
    single = training.train(Tiny(), tiny_data(), OPTIONS, devices=devices[:1])
    assert {frozenset(a.devices()) for a in jax.tree.leaves(single)} == {frozenset(devices[:1])}
    for ours, theirs in zip(jax.tree.leaves(shared), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- from given weights, of some


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def some_trainable(params):
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda p: rng.random(p.shape) < 0.5, params)


class Sized(Linear):
    """Linear, with an attribute that cannot be hashed."""

    sizes: dict | None = None


def test_a_model_that_cannot_be_hashed_is_trained_all_the_same():
    model = Sized(sizes={"hidden": [8]})
    with pytest.raises(TypeError):
        hash(model)
    options = dataclasses.replace(OPTIONS, epochs=1)
    assert_same(
        training.train(model, tiny_data(), options), training.train(Linear(), tiny_data(), options)
    )


def test_runs_of_one_model_share_a_step():
    step = training.make_step(Linear(), OPTIONS, 10)
    assert training.make_step(Linear(), dataclasses.replace(OPTIONS), 10) is step
    assert training.make_step(Linear(), OPTIONS, 11) is not step


def test_training_goes_on_from_given_variables():
    first = training.initialize(Tiny(), OPTIONS, (4, 4, 1))
    before = bits(first)
    assert_same(training.train(Tiny(), tiny_data(), OPTIONS, variables=first), uninterrupted())
    # They are not used up.
    assert bits(first) == before
    again = training.train(Tiny(), tiny_data(), OPTIONS, variables=uninterrupted())
    assert bits(again) != bits(uninterrupted())


def test_what_is_not_trainable_stays_to_the_bit():
    start = training.initialize(Tiny(), OPTIONS, (4, 4, 1))
    # A zero's sign is a bit too.
    start["params"]["Dense_0"]["bias"] = -start["params"]["Dense_0"]["bias"]
    trainable = some_trainable(start["params"])
    found = training.train(Tiny(), tiny_data(), OPTIONS, variables=start, trainable=trainable)
    for name, mask, old, new in zip(
        *zip(*jax.tree_util.tree_leaves_with_path(trainable), strict=True),
        jax.tree.leaves(start["params"]),
        jax.tree.leaves(found["params"]),
        strict=True,
    ):
        old, new = np.asarray(old), np.asarray(new)
        assert new[~mask].tobytes() == old[~mask].tobytes(), name
        assert (new[mask] != old[mask]).mean() > 0.5, name
    assert bits(found["batch_stats"]) != bits(start["batch_stats"])


def test_the_first_step_moves_the_trainable_as_if_all_were():
    options = dataclasses.replace(OPTIONS, epochs=1, batch_size=50)
    start = training.initialize(Tiny(), options, (4, 4, 1))
    trainable = some_trainable(start["params"])
    run = functools.partial(training.train, Tiny(), tiny_data(), options, variables=start)
    every, some = run(), run(trainable=trainable)
    expected = jax.tree.map(np.where, trainable, every["params"], start["params"])
    for ours, theirs in zip(
        jax.tree.leaves(some["params"]), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_killed_run_of_some_weights_goes_on(tmp_path):
    start = training.initialize(Tiny(), OPTIONS, (4, 4, 1))
    trainable = some_trainable(start["params"])
    run = functools.partial(
        training.train, Tiny(), options=OPTIONS, variables=start, checkpoint_every=2
    )
    whole = run(tiny_data(), trainable=trainable)
    with pytest.raises(Killed):
        run(dies_at(tiny_data(), 7), trainable=trainable, checkpoint_dir=tmp_path)
    assert_same(run(tiny_data(), trainable=trainable, checkpoint_dir=tmp_path), whole)
    with pytest.raises(ValueError, match="another run, trainable was"):
        run(tiny_data(), checkpoint_dir=tmp_path)
    other = jax.tree.map(lambda leaf: leaf + 1, start)
    with pytest.raises(ValueError, match="another run, variables was"):
        training.train(
            Tiny(), tiny_data(), OPTIONS, variables=other, trainable=trainable,
            checkpoint_dir=tmp_path,
        )  # fmt: skip


def test_variables_and_masks_of_another_model():
    start = training.initialize(Tiny(), OPTIONS, (4, 4, 1))
    run = functools.partial(training.train, Tiny(), tiny_data(), OPTIONS)
    with pytest.raises(ValueError, match="variables: expected the shapes of what Tiny takes, got"):
        run(variables=training.initialize(Linear(), OPTIONS, (4, 4, 1)))
    with pytest.raises(ValueError, match=r"trainable: .* \(3,\) instead of \(8, 3\)"):
        params = some_trainable(start["params"])
        params["Dense_1"]["kernel"] = np.ones(3, bool)
        run(variables=start, trainable=params)
    with pytest.raises(ValueError, match="trainable: expected bool arrays, got float32"):
        run(trainable=start["params"])
    with pytest.raises(ValueError, match="trainable: .* nothing instead of"):
        run(trainable={})


def test_correct_answers_are_counted_whatever_the_batch():
    model, dataset = Tiny(), tiny_data()
    variables = training.initialize(model, OPTIONS, (4, 4, 1))
    logits = model.apply(variables, dataset.train_images / np.float32(255))
    expected = int((logits.argmax(1) == dataset.train_labels).sum())
    for batch_size in (1, 7, 50, 64):
        counted = training.count_correct(
            model, variables, dataset.train_images, dataset.train_labels, batch_size=batch_size
        )
        assert counted == expected


# ---------------------------------------------------------------- kill and resume


class Killed(Exception):
    pass


def dies_at(dataset, reads):
    """The data set, whose images can be read that many times only."""

    class Images:
        shape, left = dataset.train_images.shape, reads

        def __len__(self):
            return len(dataset.train_images)

        def __getitem__(self, rows):
            if not self.left:
                raise Killed
            self.left -= 1
            return dataset.train_images[rows]

    return dataset._replace(train_images=Images())


@pytest.mark.parametrize("deaths", [(1,), (7, 4)])
def test_a_killed_run_ends_in_the_same_weights(tmp_path, deaths):
    model, dataset = Tiny(), tiny_data()
    whole = uninterrupted()
    run = functools.partial(
        training.train, model, checkpoint_dir=tmp_path, checkpoint_every=2, options=OPTIONS
    )
    for reads in deaths:
        with pytest.raises(Killed):
            run(dies_at(dataset, reads))
    assert_same(run(dataset), whole)
    # A finished run is only read again.
    assert_same(run(dies_at(dataset, 0)), whole)
    assert checkpoint.steps(tmp_path)[-1] == 3 * (50 // 8)


def test_a_folder_belongs_to_one_run(tmp_path):
    model, dataset = Tiny(), tiny_data()
    training.train(model, dataset, OPTIONS, checkpoint_dir=tmp_path)
    other = dataclasses.replace(OPTIONS, seed=4)
    with pytest.raises(ValueError, match="another run, seed was 3 and is now 4; delete"):
        training.train(model, dataset, other, checkpoint_dir=tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json: not the JSON file of a run"):
        training.train(model, dataset, OPTIONS, checkpoint_dir=tmp_path)


# ---------------------------------------------------------------- runs that go wrong


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    dataset = tiny_data()
    # Images of the third batch make the loss NaN.
    bad = training.batch_order(OPTIONS.seed, 0, 50)[16:24]

    class Fragile(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            x = x.reshape((x.shape[0], -1))
            return nn.Dense(3)(jnp.where(x > 0.999, jnp.nan, x))

    images = dataset.train_images.copy()
    images[bad] = 255
    with pytest.raises(
        FloatingPointError, match="not finite at step 2 .epoch 0.; the checkpoint of step 2"
    ):
        training.train(
            Fragile(),
            dataset._replace(train_images=images),
            OPTIONS,
            checkpoint_dir=tmp_path,
            checkpoint_every=2,
        )
    assert checkpoint.steps(tmp_path) == [2]
    state = training.TrainState(
        jnp.zeros((), jnp.int32),
        (variables := training.initialize(Fragile(), OPTIONS, (4, 4, 1))),
        training.optimizer(OPTIONS, 18).init(variables["params"]),
    )
    step, restored = checkpoint.restore_latest(tmp_path, state)
    assert step == int(restored.step) == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored))


def test_without_checkpoints_the_step_is_named_too():
    dataset = tiny_data()
    options = TrainingOptions(epochs=3, batch_size=8, learning_rate=1e30)
    with pytest.raises(FloatingPointError, match="not finite at step .* no checkpoint is kept"):
        training.train(Tiny(), dataset, options, log_every=3)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("schedule", "linear"),
        ("momentum", 1.0),
        ("weight_decay", -1.0),
        ("label_smoothing", 1.0),
        ("crop", -1),
        ("seed", -1),
    ],
)
def test_options_out_of_range(option, value):
    with pytest.raises(ValueError, match=f"{option}: expected .*, got"):
        TrainingOptions(**{option: value})


def test_empty_sets():
    empty = tiny_data()._replace(
        train_images=np.zeros((0, 4, 4, 1), "u1"), train_labels=np.zeros(0, "i4")
    )
    with pytest.raises(ValueError, match="tiny: has no training images"):
        training.train(Tiny(), empty, OPTIONS)
    with pytest.raises(ValueError, match="got 0 images and 0 labels"):
        training.count_correct(Tiny(), {}, empty.train_images, empty.train_labels)


# ---------------------------------------------------------------- checkpoints


def test_the_newest_checkpoints_are_kept(tmp_path):
    like = {"a": jnp.zeros(3), "b": jnp.zeros((), jnp.int32)}
    assert checkpoint.restore_latest(tmp_path / "none", like) is None
    for step in (3, 10, 200):
        checkpoint.save(tmp_path, step, {"a": jnp.full(3, step / 2), "b": jnp.int32(step)})
    assert checkpoint.steps(tmp_path) == [10, 200]
    step, state = checkpoint.restore_latest(tmp_path, like)
    assert step == 200
    assert_same(state, {"a": np.full(3, 100, np.float32), "b": np.int32(200)})


def test_unfinished_checkpoints_do_not_count(tmp_path):
    checkpoint.save(tmp_path, 4, {"a": jnp.ones(2)})
    (tmp_path / "step_000000008.orbax-checkpoint-tmp").mkdir()
    assert checkpoint.steps(tmp_path) == [4]


def test_damaged_checkpoints(tmp_path):
    checkpoint.save(tmp_path, 4, {"a": jnp.ones(2)})
    for path in (tmp_path / "step_000000004").rglob("*"):
        if path.is_file():
            path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="step_000000004: not a readable checkpoint") as error:
        checkpoint.restore_latest(tmp_path, {"a": jnp.zeros(2)})
    assert "\n" not in str(error.value)


def test_checkpoints_of_other_shapes(tmp_path):
    checkpoint.save(tmp_path, 4, {"a": jnp.ones(2)})
    with pytest.raises(ValueError, match="not a readable checkpoint of this run"):
        checkpoint.restore_latest(tmp_path, {"a": jnp.zeros(3)})
