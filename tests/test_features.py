"""Features on disk: what is streamed is what memory would hold, whole after a kill."""

import hashlib
import json
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse

import nnslicer_jax as nns
from interpret import features
from nnslicer_jax import data
from nnslicer_jax.batches import filled
from nnslicer_jax.checkpoint import digest


@pytest.fixture(scope="module")
def digits():
    trained = nns.zoo.load("digits_cnn")
    images = data.to_float(data.load("digits").test_images[:10])
    graph = nns.trace(trained.model.apply, trained.variables, images[:1])
    return graph, trained.variables, nns.profile(graph, trained.variables, images), images


def dense(values):
    return values.toarray() if sparse.issparse(values) else values


def whole(stored):
    """All rows at once, of parts that lie one after another."""
    spans, parts = zip(*((span, dense(part)) for span, part in stored.parts()), strict=True)
    assert [i for s in spans for i in range(s.start, s.stop)] == list(range(len(stored)))
    return np.concatenate(parts)


def flat(arrays):
    return np.concatenate([np.asarray(a).reshape(len(a), -1) for a in arrays.values()], 1)


def counted(width=6):
    """An extraction that notes which images it was given; an image is its own number."""
    seen = []

    def extract(images, outputs):
        seen.append(images[:, 0].tolist())
        rows = images[:, :1] * 10 + np.arange(width) + outputs[:, None] * 100
        return features.Table(
            sparse.csr_array(rows.astype(np.int16)), {"a": (0, 2), "b": (2, width)}
        )

    return extract, seen


IMAGES = np.arange(11, dtype=np.float32)[:, None].repeat(3, 1)
OUTPUTS = np.arange(11) % 3


def written(folder, extract, **options):
    return features.write(folder, IMAGES, OUTPUTS, extract, {"method": "m"}, **options)


# What a row holds ---------------------------------------------------------------------------


def test_streamed_slices_are_those_in_memory(tmp_path, digits):
    graph, params, profile, images = digits
    outputs = np.arange(10)[::-1].copy()
    extract = features.slices(graph, params, profile, theta=0.2, batch_size=3)
    stored = features.write(tmp_path, images, outputs, extract, {}, rows=4)
    piece = nns.slice_network(graph, params, profile, images, outputs, 0.2, per_sample=True)
    found = whole(stored)
    assert found.dtype == np.int16 and found.any()
    np.testing.assert_array_equal(found, flat(piece.synapses))
    assert list(stored.spans) == list(piece.synapses)
    for name, (first, stop) in stored.spans.items():
        np.testing.assert_array_equal(
            found[:, first:stop], piece.synapses[name].reshape(len(images), -1)
        )


def test_streamed_paths_are_those_in_memory(tmp_path, digits):
    graph, params, _, images = digits
    outputs = np.arange(10)
    stored = features.write(
        tmp_path, images, outputs, features.paths(graph, params, batch_size=4), {}, rows=7
    )
    piece = nns.effective_path(graph, params, images, outputs, per_sample=True)
    np.testing.assert_array_equal(whole(stored), flat(piece.synapses))
    assert set(np.unique(whole(stored))) == {0, 1}


def test_streamed_maps_are_the_activations(tmp_path, digits):
    graph, params, _, images = digits
    names = features.convolutions(graph)
    assert names == [n for n in graph.neurons() if n.endswith("conv_general_dilated")]
    extract = features.maps(graph, params, names, batch_size=4)
    stored = features.write(tmp_path, images, np.zeros(10, int), extract, {}, rows=6)
    recorded = nns.evaluate(graph, params, images)[1]
    found = whole(stored)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, flat({n: recorded[n] for n in names}), rtol=2e-3, atol=1e-4)


def test_contribs_are_held_at_the_limits_of_int16():
    counts = np.array([[-40000, -32768, 0, 5], [32767, 32768, 70000, -1]], np.int32)
    piece = nns.Slice({"w": counts.reshape(2, 2, 2)}, {}, {}, 2, per_sample=True)
    found = features.contribs(piece).values
    assert found.dtype == np.int16
    assert found.toarray().tolist() == [[-32768, -32768, 0, 5], [32767, 32767, 32767, -1]]


def test_activations_are_held_at_the_limits_of_float16():
    found = features.activations({"a": np.array([[1e9, -1e9, 0.5]], np.float32)})
    assert found.values.tolist() == [[65504, -65504, 0.5]] and found.spans == {"a": (0, 3)}


def test_a_summed_slice_has_no_rows():
    with pytest.raises(ValueError, match="^piece must be a slice made with per_sample=True"):
        features.contribs(nns.Slice({"w": np.ones((2, 2), int)}, {}, {}, 2))


# Streaming ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4, 11, 100])
def test_parts_hold_every_row_once(tmp_path, rows):
    extract, seen = counted()
    stored = written(tmp_path, extract, rows=rows)
    expected = dense(extract(IMAGES, OUTPUTS).values)
    np.testing.assert_array_equal(whole(stored), expected)
    assert sum(seen[:-1], []) == list(range(11))
    assert max(map(len, seen[:-1])) <= rows
    assert (len(stored), stored.width) == expected.shape
    columns = np.array([5, 0, 3])
    taken = stored.take(columns)
    assert taken.dtype == np.float32
    np.testing.assert_array_equal(taken, expected[:, columns])


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_killed_run_goes_on_where_it_was(tmp_path, after):
    extract, seen = counted()

    def killed(images, outputs):
        if len(seen) == after:
            raise KeyboardInterrupt
        return extract(images, outputs)

    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "cut", killed, rows=4)
    if after:
        with pytest.raises(ValueError, match=f"lacks part_0000{after}.npz"):
            features.open_features(tmp_path / "cut")
    resumed = written(tmp_path / "cut", extract, rows=4)
    assert sum(seen, []) == list(range(11))
    straight = written(tmp_path / "whole", counted()[0], rows=4)
    np.testing.assert_array_equal(whole(resumed), whole(straight))
    names = [sorted(p.name for p in (tmp_path / f).iterdir()) for f in ("cut", "whole")]
    assert names[0] == names[1]
    written(tmp_path / "cut", killed, rows=4)
    assert sum(seen, []) == list(range(11))


def test_a_part_cut_off_while_written_is_not_there(tmp_path, monkeypatch):
    extract, seen = counted()

    def half(file, **arrays):
        file.write(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", half)
        with pytest.raises(OSError, match="no space"):
            written(tmp_path, extract)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.json", "spans.json"]
    stored = written(tmp_path, extract)
    np.testing.assert_array_equal(whole(stored), dense(extract(IMAGES, OUTPUTS).values))
    assert len(seen) == 3


def test_one_part_is_in_memory_at_a_time(tmp_path, monkeypatch):
    class Tracked(np.ndarray):
        pass

    alive, most, made = weakref.WeakSet(), [], []

    def tracked(values):
        # NumPy keeps the class for what it computes; only parts are counted.
        array = np.asarray(values).view(Tracked)
        alive.add(array)
        most.append(len(alive))
        made.append(1)
        return array

    # A NumPy array has no hash, so a set of them goes by a wrapper's identity.
    monkeypatch.setattr(Tracked, "__hash__", object.__hash__)

    def extract(images, outputs):
        return features.Table(tracked(np.repeat(images[:, :1], 5, 1)), {"a": (0, 5)})

    stored = features.write(tmp_path, IMAGES, OUTPUTS, extract, {}, rows=1)
    # The part before is let go once the next one has come.
    assert len(made) == 11 and max(most) <= 2
    most.clear()
    read = features._read
    monkeypatch.setattr(features, "_read", lambda *args: tracked(read(*args)))
    np.testing.assert_array_equal(stored.take(np.arange(5)), IMAGES[:, :1].repeat(5, 1))
    assert len(most) == 11 and max(most) <= 2


# Bad input ----------------------------------------------------------------------------------


def test_a_folder_of_something_else_is_refused(tmp_path):
    extract, seen = counted()
    written(tmp_path, extract)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for images, outputs, about, rows in (
        (IMAGES + 1, OUTPUTS, {"method": "m"}, 256),
        (IMAGES, OUTPUTS[::-1].copy(), {"method": "m"}, 256),
        (IMAGES, OUTPUTS, {"method": "n"}, 256),
        (IMAGES, OUTPUTS, {"method": "m"}, 2),
    ):
        with pytest.raises(ValueError, match="holds checkpoints of another run") as caught:
            features.write(tmp_path, images, outputs, extract, about, rows=rows)
        assert "\n" not in str(caught.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before and len(seen) == 1


def test_other_columns_than_before_are_refused(tmp_path):
    written(tmp_path, counted(6)[0], rows=4)
    (tmp_path / "part_00002.npz").unlink()
    with pytest.raises(ValueError, match="other columns than for the parts before$"):
        written(tmp_path, counted(7)[0], rows=4)


@pytest.mark.parametrize("kept", [0, 1, 30, 200])
def test_damaged_parts_are_named(tmp_path, kept):
    stored = written(tmp_path, counted()[0])
    path = tmp_path / "part_00000.npz"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError) as caught:
        stored.take(np.array([0]))
    assert "part_00000.npz: not a part of features, delete it" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_features_is_named(tmp_path):
    for content in (None, "[]", "no JSON", json.dumps({"count": 3})):
        if content is not None:
            (tmp_path / "run.json").write_text(content)
        with pytest.raises(ValueError, match="holds no features; write makes them$"):
            features.open_features(tmp_path)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"images": IMAGES[:0], "outputs": OUTPUTS[:0]}, "images is empty"),
        ({"outputs": OUTPUTS[:5]}, r"one class for each of 11 images, not of shape \(5,\)"),
        ({"rows": 0}, "rows must be at least 1, not 0"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(tmp_path, changed, said):
    options = {"images": IMAGES, "outputs": OUTPUTS, "rows": 4} | changed
    with pytest.raises(ValueError, match=said) as caught:
        features.write(
            tmp_path / "new", options["images"], options["outputs"], counted()[0], {},
            rows=options["rows"],
        )  # fmt: skip
    assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()


def test_columns_and_neurons_have_to_be_there(tmp_path, digits):
    stored = written(tmp_path, counted()[0])
    for wrong in ([6], [-1, 2]):
        with pytest.raises(ValueError, match=r"^columns must be in 0\.\.5, given"):
            stored.take(np.array(wrong))
    graph, params, _, _ = digits
    with pytest.raises(ValueError, match="given 'nowhere'$"):
        features.maps(graph, params, ["nowhere"])
    with pytest.raises(ValueError, match="given none$"):
        features.maps(graph, params, [])
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        features.paths(graph, params, batch_size=0)


# Depth --------------------------------------------------------------------------------------


def test_depth_follows_the_sample():
    params = {
        "z": jnp.ones((3, 4)), "scale": jnp.ones(4), "variance": jnp.ones(4),
        "a": jnp.ones((4, 2)), "unused": jnp.ones(2),
    }  # fmt: skip

    def apply(params, x):
        factor = params["scale"] * jax.lax.rsqrt(params["variance"])
        return ((x @ params["z"]) * factor[None]) @ params["a"]

    graph = nns.trace(apply, params, jnp.ones((1, 3)))
    deep = features.depths(graph)
    assert deep["z"] < deep["scale"] == deep["variance"] < deep["a"]
    assert "unused" not in deep
    assert deep["input"] < deep["z"] and max(deep.values()) == deep["a"]
    assert features.halfway(graph) == deep["a"]


def test_the_first_half_of_the_digits_network(digits):
    graph = digits[0]
    deep, half = features.depths(graph), features.halfway(graph)
    kernels = [name for name in deep if name.endswith("kernel")]
    assert sorted(kernels, key=deep.__getitem__) == [
        f"params/{layer}/kernel" for layer in ("Conv_0", "Conv_1", "Dense_0", "Dense_1")
    ]
    assert half == deep["params/Dense_0/kernel"]


def test_one_layer_has_no_half():
    graph = nns.trace(lambda w, x: x @ w, jnp.ones((3, 2)), jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="2 layers with weights or more"):
        features.halfway(graph)


def test_parts_that_are_made_are_told_of(tmp_path):
    counts = []
    written(tmp_path, counted()[0], rows=4, made=counts.append)
    assert counts == [4, 4, 3]
    written(tmp_path, counted()[0], rows=4, made=counts.append)
    assert counts == [4, 4, 3]


def test_features_are_of_the_bytes_of_images_and_classes(tmp_path):
    written(tmp_path, counted()[0])
    mark = hashlib.sha256(IMAGES.tobytes() + OUTPUTS.astype("<i8").tobytes()).hexdigest()
    assert json.loads((tmp_path / "run.json").read_text())["images"] == mark
    assert digest((IMAGES, OUTPUTS)) == mark != digest((OUTPUTS, IMAGES))


@pytest.mark.parametrize("size", [1, 4, 11, 12])
def test_batches_are_filled_up_with_the_last_image(size):
    found = list(filled(11, size))
    assert {len(which) for which in found} == {size}
    assert np.concatenate(found).tolist() == [min(i, 10) for i in range(len(found) * size)]
    assert len(found) == -(-11 // size)
