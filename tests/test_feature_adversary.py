"""The feature adversary: within its budget, towards the guide, the same for any batch."""

import numpy as np
import pytest

import nnslicer_jax as nns
from interpret.feature_adversary import feature_adversary
from nnslicer_jax import data


@pytest.fixture(scope="module")
def digits():
    trained = nns.zoo.load("digits_cnn")
    found = data.load("digits")
    images = data.to_float(found.test_images[:12])
    graph = nns.trace(trained.model.apply, trained.variables, images[:1])
    return graph, trained.variables, images[:5], images[7:12]


def test_pixels_alone_are_matched_pixel_by_pixel(digits):
    # The nearest image to the guide within eps, but for the last step's length.
    graph, params, images, guides = digits
    moved = feature_adversary(graph, params, images, guides, ["input"], eps=0.25, steps=40)
    nearest = np.clip(guides, images - 0.25, images + 0.25)
    assert np.abs(moved - nearest).max() <= 0.25 / 15 + 1e-6
    assert moved.dtype == np.float32
    far = np.abs(guides - images) > 0.26
    np.testing.assert_allclose(moved[far], nearest[far], atol=1e-6)


def test_activations_come_closer_within_the_budget(digits):
    graph, params, images, guides = digits
    names = [name for name in graph.neurons() if "conv" in name]
    wanted = nns.evaluate(graph, params, guides)[1]

    def far(batch):
        found = nns.evaluate(graph, params, batch)[1]
        return sum(
            np.square(found[n] - wanted[n]).reshape(len(batch), -1).sum(1)
            / np.square(start[n] - wanted[n]).reshape(len(batch), -1).sum(1)
            for n in names
        )

    start = nns.evaluate(graph, params, images)[1]
    before = far(images)
    np.testing.assert_allclose(before, len(names), rtol=1e-5)
    for eps in (0.1, 0.4):
        moved = feature_adversary(graph, params, images, guides, names, eps=eps, steps=30)
        assert np.abs(moved - images).max() <= eps + 1e-6
        assert moved.min() >= 0 and moved.max() <= 1
        after = far(moved)
        assert (after < before).all()
        before = after


def test_batches_do_not_matter(digits):
    graph, params, images, guides = digits
    names = list(graph.neurons())
    found = [
        feature_adversary(graph, params, images, guides, names, eps=0.2, steps=1, batch_size=size)
        for size in (2, 5)
    ]
    np.testing.assert_array_equal(*found)
    assert not np.array_equal(found[0], images)


def test_nothing_moves_without_a_budget(digits):
    graph, params, images, guides = digits
    moved = feature_adversary(graph, params, images, guides, ["input"], eps=0, steps=2)
    np.testing.assert_array_equal(moved, images)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"eps": 2}, "eps must be in 0..1, the width of bounds, not 2"),
        ({"steps": 0}, "steps must be an integer of at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, not 0"),
        ({"relative_step": 0}, "relative_step must be above 0, not 0"),
        ({"relative_step": np.inf}, "relative_step must be a finite number, not inf"),
        ({"eps": "8"}, "eps must be in 0..1, the width of bounds, not '8'"),
        ({"bounds": 1}, "bounds must be (low, high), two numbers, not 1"),
        ({"neurons": "input"}, "neurons must be a list of names, not 'input'"),
        ({"neurons": []}, "neurons must name some of graph.neurons(), given none"),
        ({"neurons": ["x"]}, "neurons must name some of graph.neurons(), given 'x'"),
    ],
)
def test_bad_options_are_one_line(digits, changed, said):
    options = {"neurons": ["input"], "eps": 0.1} | changed
    with pytest.raises(ValueError) as caught:
        feature_adversary(*digits, **options)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("which", "change", "said"),
    [
        ("images", lambda x: x * 2, "images must lie in 0..1, given 0..2"),
        ("guides", lambda x: x - 1, "guides must lie in 0..1, given -1..0"),
        ("guides", lambda x: np.where(x > 0.5, np.nan, x), "guides must be finite; some are NaN"),
        ("images", lambda x: (x * 255).astype("u1"), "images must be floats in 0..1, not uint8"),
        ("guides", lambda x: (x * 255).astype("u1"), "guides must be floats in 0..1, not uint8"),
        (
            "images",
            lambda x: x[:0],
            "images must be [N, ...] with N of at least 1, not (0, 8, 8, 1)",
        ),
        ("images", lambda x: x[:, :7], "images must be [N, 8, 8, 1] as the model was traced, not"),
        ("guides", lambda x: x[:2], "guides must be one for each of the images (5, 8, 8, 1), not"),
        ("guides", lambda x: x[:, :7], "guides must be one for each of the images (5, 8, 8, 1)"),
    ],
)
def test_bad_images_are_one_line(digits, which, change, said):
    graph, params, images, guides = digits
    given = {"images": images, "guides": guides}
    given[which] = change(given[which])
    with pytest.raises(ValueError) as caught:
        feature_adversary(graph, params, **given, neurons=["input"], eps=0.1)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
