"""Slices as data: kept in files, combined, compared, cut to a size; and slicing resumed."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import nnslicer_jax as nns
from nnslicer_jax import slicing, tensors
from tests import zoo


def made(seed: int = 0, samples: int = 0, dtype=np.int64) -> nns.Slice:
    """A slice of an imaginary network; with `samples`, per sample."""
    rng = np.random.default_rng(seed)
    lead = (samples,) if samples else ()

    def some(*shape: int) -> np.ndarray:
        return rng.integers(-2, 3, lead + shape).astype(dtype)

    return nns.Slice(
        synapses={"params/Conv_0/kernel": some(3, 3, 1, 4), "params/Dense_0/kernel": some(16, 5)},
        neurons={"input": some(4, 4, 1), "Net/Conv_0/add": some(2, 2, 4), "Net/add": some(5)},
        axes={"input": 2, "Net/Conv_0/add": 2, "Net/add": 0},
        count=samples or 3,
        per_sample=bool(samples),
        criterion={"method": "nnslicer", "theta": 0.2},
    )


def assert_equal(one: nns.Slice, other: nns.Slice) -> None:
    for ours, theirs in ((one.synapses, other.synapses), (one.neurons, other.neurons)):
        assert set(ours) == set(theirs)
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert one.count == other.count and one.per_sample == other.per_sample


# Files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_what_is_saved_is_loaded(tmp_path, samples, dtype):
    piece = made(samples=samples, dtype=dtype)
    path = tmp_path / "folder" / "piece.safetensors"
    piece.save(path)
    again = nns.load_slice(str(path))
    assert_equal(piece, again)
    assert all(array.dtype == dtype for array in again.synapses.values())
    assert dict(again.axes) == dict(piece.axes)
    assert dict(again.criterion) == dict(piece.criterion)
    assert [p.name for p in path.parent.iterdir()] == ["piece.safetensors"]


def assert_refused(path) -> None:
    with pytest.raises(ValueError) as caught:
        nns.load_slice(path)
    message = str(caught.value)
    assert "\n" not in message and path.name in message


def test_truncated_files_are_refused(tmp_path):
    path = tmp_path / "piece.safetensors"
    made().save(path)
    whole = path.read_bytes()
    for size in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert_refused(path)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    assert_refused(path)  # missing
    assert_refused(tmp_path)  # a folder
    path.write_text("a text")
    assert_refused(path)
    numbers = np.zeros(3, np.float32)
    save_file({"weights": numbers}, path)
    assert_refused(path)
    for header in ("{}", "[]", "no JSON", "null", '{"count": 1}'):
        save_file({"synapses:a": numbers.astype(np.int32)}, path, {"slice": header})
        assert_refused(path)
    whole = {"count": 1, "per_sample": False, "axes": {}, "criterion": {}}
    save_file({"synapses:a": numbers.astype(np.int32)}, path, {"slice": json.dumps(whole)})
    assert nns.load_slice(path).size() == (0, 3)
    for wrong in (
        {"count": "1"}, {"count": True}, {"per_sample": 1}, {"axes": []}, {"axes": {"b": 0}},
        {"criterion": None}, {"per_sample": True, "count": 2},
    ):  # fmt: skip
        header = json.dumps({**whole, **wrong})
        save_file({"synapses:a": numbers.astype(np.int32)}, path, {"slice": header})
        assert_refused(path)
    save_file({"synapses:a": numbers}, path, {"slice": "{}"})  # not of integers
    assert_refused(path)
    save_file({"else:a": numbers.astype(np.int32)}, path, {"slice": "{}"})
    assert_refused(path)


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "piece.safetensors"

    def fails(arrays, file, about):
        file = str(file)
        with open(file, "wb") as half:
            half.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(tensors, "save_file", fails)
    with pytest.raises(OSError, match="no space"):
        made().save(path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    made().save(path)
    monkeypatch.setattr(tensors, "save_file", fails)
    with pytest.raises(OSError, match="no space"):
        made(1).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["piece.safetensors"]
    assert_equal(nns.load_slice(path), made())


# Sets -------------------------------------------------------------------------------------


def test_slices_made_in_different_ways_do_not_add_up():
    other = dataclasses.replace(made(1), criterion={"method": "nnslicer", "theta": 0.1})
    with pytest.raises(ValueError, match="theta") as caught:
        made() + other
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="theta differ"):
        dataclasses.replace(made(), criterion={"method": "nnslicer"}) + made(1)


def test_union_keeps_the_larger_contribution():
    one, other = made(0), made(1)
    union = one.union(other)
    assert union.count == 6
    for name, array in union.synapses.items():
        a, b = one.synapses[name], other.synapses[name]
        np.testing.assert_array_equal(abs(array), np.maximum(abs(a), abs(b)))
        assert np.all((array == a) | (array == b))
        # Equally large and opposite: the positive one, so the order does not matter.
        assert np.all(array[a == -b] >= 0)
    assert_equal(union, other.union(one))
    assert_equal(one.union(one), dataclasses.replace(one, count=6))


def test_intersection_and_difference_part_a_slice():
    one, other = made(0), made(1)
    both, rest = one.intersection(other), one.difference(other)
    assert both.count == rest.count == one.count
    for name, array in one.neurons.items():
        inside = other.neurons[name] != 0
        np.testing.assert_array_equal(both.neurons[name], np.where(inside, array, 0))
        np.testing.assert_array_equal(rest.neurons[name], np.where(inside, 0, array))
    for name, array in one.synapses.items():
        np.testing.assert_array_equal(both.synapses[name] + rest.synapses[name], array)
        assert not np.any((both.synapses[name] != 0) & (rest.synapses[name] != 0))


def test_similarity_is_jaccards():
    one, other = made(0), made(1)
    for by in ("synapses", "neurons"):
        a, b = (
            np.concatenate([v.ravel() for v in getattr(piece, by).values()]) != 0
            for piece in (one, other)
        )
        assert one.similarity(other, by) == np.sum(a & b) / np.sum(a | b)
        assert one.similarity(other, by) == other.similarity(one, by)
        assert one.similarity(one, by) == 1
    assert one.difference(other).similarity(other) == 0
    nothing = one.difference(one)
    assert nothing.similarity(nothing) == 1 and nothing.similarity(one) == 0


def test_size_counts_synapses_in_the_slice():
    piece = made()
    sizes = {name: piece.size(name) for name in piece.synapses}
    for name, (kept, total) in sizes.items():
        assert kept == np.count_nonzero(piece.synapses[name])
        assert total == piece.synapses[name].size
    assert piece.size() == tuple(map(sum, zip(*sizes.values(), strict=True)))
    assert f"{piece.size()[0]:,} of {piece.size()[1]:,} synapses" in repr(piece)


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1.0])
def test_threshold_keeps_the_largest_share(ratio):
    piece = made()
    cut = piece.threshold(ratio)
    for name, array in cut.synapses.items():
        before = piece.synapses[name]
        most = int(np.ceil(ratio * before.size))
        assert np.count_nonzero(array) == min(most, np.count_nonzero(before))
        stays = array != 0
        np.testing.assert_array_equal(array[stays], before[stays])
        if stays.any() and not stays.all():
            assert abs(before[stays]).min() >= abs(before[~stays]).max()
        # Equal magnitudes: earlier positions first.
        tied = np.flatnonzero(abs(before) == abs(before[stays]).min()) if stays.any() else []
        kept = [i for i in tied if stays.ravel()[i]]
        assert kept == list(tied)[: len(kept)]
    for name, array in cut.neurons.items():
        np.testing.assert_array_equal(array, piece.neurons[name])


def test_threshold_settles_ties_by_position():
    kernel = np.array([[1, -2, 2], [0, 2, -1]])
    piece = nns.Slice({"w": kernel}, {}, {}, 1)
    np.testing.assert_array_equal(piece.threshold(0.3).synapses["w"], [[0, -2, 2], [0, 0, 0]])
    np.testing.assert_array_equal(piece.threshold(0.5).synapses["w"], [[0, -2, 2], [0, 2, 0]])
    np.testing.assert_array_equal(piece.threshold(0.6).synapses["w"], [[1, -2, 2], [0, 2, 0]])
    np.testing.assert_array_equal(piece.threshold(1.0).synapses["w"], kernel)


# Samples ----------------------------------------------------------------------------------


def test_samples_of_a_slice():
    piece = made(samples=3)
    parts = [piece.sample(i) for i in range(3)]
    for i, part in enumerate(parts):
        assert part.count == 1 and not part.per_sample
        for name, array in part.synapses.items():
            np.testing.assert_array_equal(array, piece.synapses[name][i])
    assert_equal(piece.sample(-1), parts[2])
    assert_equal(piece.total(), parts[0] + parts[1] + parts[2])
    assert_equal(piece.total().total(), piece.total())
    joined = piece + made(1, samples=2)
    assert joined.count == 5 and joined.per_sample
    assert_equal(joined.sample(3), made(1, samples=2).sample(0))
    assert_equal(joined.sample(2), parts[2])


def test_sums_do_not_overflow():
    most = np.iinfo(np.int32).max
    piece = nns.Slice({"w": np.full((2,), most, np.int32)}, {}, {}, 1)
    np.testing.assert_array_equal((piece + piece).synapses["w"], 2 * most)
    each = nns.Slice({"w": np.full((3, 2), most, np.int32)}, {}, {}, 3, per_sample=True)
    np.testing.assert_array_equal(each.total().synapses["w"], 3 * most)


def test_channels_sum_positions():
    for samples in (0, 2):
        piece = made(samples=samples)
        found = piece.channels()
        expected = piece.neurons["Net/Conv_0/add"].sum((-3, -2))
        np.testing.assert_array_equal(found["Net/Conv_0/add"], expected)
        np.testing.assert_array_equal(found["Net/add"], piece.neurons["Net/add"])


def test_slices_of_different_networks_do_not_mix():
    one = made()
    other = nns.Slice({"w": np.ones(3, int)}, {}, {}, 1)
    for operation in (one.union, one.intersection, one.difference, one.similarity, one.__add__):
        with pytest.raises(ValueError, match="different networks"):
            operation(other)
        with pytest.raises(ValueError, match="per sample"):
            operation(made(samples=3))


# Progress ---------------------------------------------------------------------------------


class Stopped(Exception):
    pass


@pytest.fixture
def setting(monkeypatch):
    """Something to slice, and a count of the images walked; progress is saved at every batch."""
    model = zoo.model("mlp")
    graph = nns.trace(model.apply, model.params, model.images(1))
    images = model.images(10)
    profile = nns.profile(graph, model.params, images)
    walked: list[int] = []
    walk = slicing._walk_some

    def counted(job, images, count, outputs):
        walked.append(count)
        return walk(job, images, count, outputs)

    monkeypatch.setattr(slicing, "_walk_some", counted)
    monkeypatch.setattr(slicing, "_SAVE_EVERY", -1.0)

    def run(images=images, **options) -> nns.Slice:
        return nns.slice_network(graph, model.params, profile, images, **options)

    return run, images, walked


def parts(images, stop: int | None = None, size: int = 2):
    for start in range(0, len(images), size):
        if start == stop:
            raise Stopped
        yield images[start : start + size]


@pytest.mark.parametrize("stop", [0, 2, 4, 8])
def test_an_interrupted_run_goes_on(setting, tmp_path, stop):
    run, images, walked = setting
    outputs = np.arange(10) % 3
    options = {"outputs": outputs, "theta": 0.25, "batch_size": 2}
    whole = run(**options)
    del walked[:]
    path = tmp_path / "progress.safetensors"
    with pytest.raises(Stopped):
        run(parts(images, stop), checkpoint=path, **options)
    assert sum(walked) == stop
    resumed = run(parts(images), checkpoint=path, **options)
    assert sum(walked) == len(images)
    assert_equal(resumed, whole)
    assert dict(resumed.criterion) == dict(whole.criterion)
    again = run(parts(images), checkpoint=path, **options)
    assert sum(walked) == len(images)
    assert_equal(again, whole)


def test_another_batch_size_counts_nothing_twice(setting, tmp_path):
    run, images, walked = setting
    path = tmp_path / "progress.safetensors"
    whole = run(theta=0.25, batch_size=10)
    with pytest.raises(Stopped):
        run(parts(images, 4), checkpoint=path, theta=0.25, batch_size=2)
    try:
        resumed = run(parts(images, size=5), checkpoint=path, theta=0.25, batch_size=3)
    except ValueError as refused:
        assert "\n" not in str(refused) and "progress" in str(refused)
    else:
        assert_equal(resumed, whole)


def test_progress_of_another_call_is_refused(setting, tmp_path):
    run, images, _ = setting
    path = tmp_path / "progress.safetensors"
    run(checkpoint=path, theta=0.25)
    for changed in (
        {"theta": 0.5},
        {"rule": "mass"},
        {"outputs": np.zeros(10, int)},
        {"images": images[:8]},
    ):
        with pytest.raises(ValueError, match="another call") as caught:
            run(checkpoint=path, **{"theta": 0.25, **changed})
        assert "\n" not in str(caught.value)


def test_progress_of_other_images_is_refused_wherever_they_differ(setting, tmp_path):
    run, images, walked = setting
    many = np.resize(images, (1030, *images.shape[1:]))
    path = tmp_path / "progress.safetensors"
    run(many, checkpoint=path, theta=0.25)
    del walked[:]
    for row in (1, 1022, 1026):
        other = many.copy()
        other[row, -1] += 1
        with pytest.raises(ValueError, match="another call"):
            run(other, checkpoint=path, theta=0.25)
    run(many, checkpoint=path, theta=0.25)
    assert not walked


def test_damaged_progress_is_refused(setting, tmp_path):
    run, *_ = setting
    path = tmp_path / "progress.safetensors"
    path.write_bytes(b"half a file")
    with pytest.raises(ValueError, match=path.name) as caught:
        run(checkpoint=path)
    assert "\n" not in str(caught.value)
