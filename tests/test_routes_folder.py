"""The studies of routes on a folder of images: classes without images, no training images."""

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from experiments import import_weights, routes_ablation, routes_adversarial, routes_case
from interpret import routes
from nnslicer_jax import models, zoo
from nnslicer_jax.attacks.adversarial import BATCH_SIZE

# Folders in label order, and how many images each holds.
COUNTS = {f"n{i:02}": 0 if i in (0, 5) else 3 for i in range(12)}


def write(root, counts):
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        folder = root / "imagenet" / "val" / name
        folder.mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (30, 34, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of data and weights: a network of 28x28 images and twelve classes, named mine."""
    root = tmp_path_factory.mktemp("folder")
    write(root, COUNTS)
    network = models.create("lenet1", len(COUNTS))
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 28, 28, 3)))
    rng = np.random.default_rng(0)
    arrays = {
        path: rng.normal(size=leaf.shape).astype("f4") / 4
        for path, leaf in flax.traverse_util.flatten_dict(shapes, sep="/").items()
    }
    safetensors.numpy.save_file(arrays, root / "given.safetensors")
    return root


@pytest.fixture
def weights(folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    if "mine" not in zoo.names():
        import_weights.run(
            "lenet1", folder / "given.safetensors", "mine", "imagenet_folder", (28, 28, 3),
            zoo.weights_folder(),
        )  # fmt: skip
    return folder


@pytest.fixture
def case(weights):
    return routes_case.prepare("mine", str(weights), weights / "work", 0)


def test_classes_without_images_are_left_out(case):
    assert case.dataset.classes == tuple(COUNTS) and case.dataset.test_images.shape[1] == 28
    some = routes_case.drawn(case, 2)
    there = [label for label, count in enumerate(COUNTS.values()) if count]
    assert some.labels.tolist() == np.repeat(there, 2).tolist()
    assert len(routes_case.drawn(case, None).labels) == 3 * len(there)
    with pytest.raises(ValueError, match="per_class is 4, but class n01 has only 3 test images"):
        routes_case.drawn(case, 4)
    with pytest.raises(ValueError, match="imagenet_folder has no train images"):
        routes_case.drawn(case, 1, split="train")


def test_images_are_the_same_however_many_are_run_at_once(case):
    some = routes_case.drawn(case, 2)
    case.__dict__["batch"] = 7
    again = routes_case.drawn(case, 2)
    np.testing.assert_array_equal(again.images, some.images)
    np.testing.assert_allclose(again.probabilities, some.probabilities, rtol=1e-4, atol=1e-6)


def test_the_classes_must_be_those_of_the_network(weights, tmp_path):
    write(tmp_path, {"n01": 1})
    with pytest.raises(ValueError, match="has 1 classes and mine has 12; in a folder of images"):
        routes_case.prepare("mine", str(tmp_path), weights / "work", 0)


def test_ablation_of_a_folder(case, weights):
    schedule = routes_ablation.Schedule(per_class=1, shares=(0, 0.01, 1))
    rows = {
        (row["row"], row["metric"]): row
        for row in routes_ablation.run(case, schedule, weights / "figures")
    }
    some = routes_case.drawn(case, 1)
    for k, metric in ((1, "top-1 accuracy"), (5, "top-5 accuracy")):
        row = rows["mine, whole network", metric]
        best = np.argsort(-some.probabilities, 1)[:, :k]
        assert row["ours"] == pytest.approx(100 * (best == some.labels[:, None]).any(1).mean())
        assert row["n"] == 10
    assert (weights / "figures" / "mine.png").is_file()


def test_samples_of_some_classes_only(case, monkeypatch):
    """Correlations with training images are those with the class's own, NaN where it has none."""
    test, known = routes_case.drawn(case, 1), routes_case.drawn(case, 2)
    two = known.take(np.isin(known.labels, (1, 6)))
    fooled = np.resize([6, 3, 1], len(test.labels))
    assert (fooled != test.labels).all()
    moved = test._replace(probabilities=np.eye(12)[fooled])
    monkeypatch.setattr(
        routes_case, "drawn", lambda _, n, *, split="test", right: test if split == "test" else two
    )
    monkeypatch.setattr(routes_case, "attacked", lambda *_: moved)
    schedule = routes_adversarial.Schedule(per_class=1, samples=2)
    found = routes_adversarial.drift(case, schedule, "FGSM 8")
    mine, theirs = (routes_case.routed(case, part.images) for part in (test, two))
    for layer, values in routes.cross_correlation(mine, theirs).items():
        for i, taken in enumerate(fooled):
            due = values[i][two.labels == taken] if taken != 3 else [np.nan] * 2
            np.testing.assert_array_equal(found.target[layer][i], due)


def test_large_images_are_run_few_at_once(case):
    sizes = case._sizes
    assert case.batch == case.batch_differentiated == 256 > BATCH_SIZE
    case.__dict__.pop("batch"), case.__dict__.pop("batch_differentiated")
    case.__dict__["_sizes"] = [size * 2**12 for size in sizes]
    assert 1 <= case.batch_differentiated < case.batch < 256
