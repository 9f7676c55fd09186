"""The data sets: their layouts on disk, downloads, and files that are damaged or hostile."""

import gzip
import hashlib
import http.server
import io
import os
import pickle
import struct
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image
from sklearn.datasets import load_digits

from nnslicer_jax import data
from nnslicer_jax.data import files, idx, imagenet_folder, restricted_pickle

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def nothing_elsewhere(monkeypatch, tmp_path):
    """No test sees the data folders of the user who runs it."""
    monkeypatch.delenv("NNSLICER_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def idx_bytes(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(root, folder, train=6, test=3, pack=lambda content: content, suffix=""):
    folder = root / folder
    folder.mkdir(parents=True)
    images = {"train": random_images(train, 28, 28), "t10k": random_images(test, 28, 28, seed=1)}
    labels = {"train": np.arange(train, dtype=np.uint8), "t10k": np.arange(test, dtype=np.uint8)}
    for split in images:
        path = folder / f"{split}-images-idx3-ubyte{suffix}"
        path.write_bytes(pack(idx_bytes(images[split])))
        path = folder / f"{split}-labels-idx1-ubyte{suffix}"
        path.write_bytes(pack(idx_bytes(labels[split])))
    return images, labels


def cifar_batch(images, labels):
    # Protocol 2, byte strings as keys: how the published files are written.
    pixels = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return pickle.dumps({b"batch_label": b"tiny", b"labels": labels, b"data": pixels}, protocol=2)


def write_cifar(root, each=4):
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    images = random_images(6, each, 32, 32, 3)
    for name, batch in zip(names, images, strict=True):
        (folder / name).write_bytes(cifar_batch(batch, list(range(each))))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": []}, protocol=2))
    return folder, images


# ---------------------------------------------------------------- each set in its layout


def test_digits_are_embedded_and_split_once():
    digits = data.load("digits")
    assert digits.train_images.shape == (1437, 8, 8, 1)
    assert digits.test_images.shape == (360, 8, 8, 1)
    assert digits.train_images.dtype == np.uint8 and digits.train_labels.dtype == np.int32
    assert (digits.train_images.min(), digits.train_images.max()) == (0, 255)
    assert digits.classes == tuple("0123456789")
    again = data.load("digits")
    np.testing.assert_array_equal(digits.test_images, again.test_images)
    # Every digit of scikit-learn's set is in one of the parts, with its own label.
    images = np.concatenate([digits.train_images, digits.test_images]).reshape(-1, 64)
    labels = np.concatenate([digits.train_labels, digits.test_labels])
    ours = np.column_stack([np.round(images / 255 * 16), labels])
    original = load_digits()
    theirs = np.column_stack([original.data, original.target])
    assert sorted(map(tuple, ours)) == sorted(map(tuple, theirs))


def test_pixels_become_floats_between_0_and_1():
    floats = data.to_float(np.array([[0, 51, 255]], np.uint8))
    assert floats.dtype == np.float32
    np.testing.assert_array_equal(floats, np.array([[0, 0.2, 1]], np.float32))
    with pytest.raises(TypeError, match="expected uint8 pixels 0..255, got float64"):
        data.to_float(np.zeros(3))


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST/raw"), ("fashion_mnist", "FashionMNIST/raw")]
)
@pytest.mark.parametrize(("pack", "suffix"), [(bytes, ""), (gzip.compress, ".gz")])
def test_idx_layout(tmp_path, name, folder, pack, suffix):
    images, labels = write_idx(tmp_path, folder, pack=pack, suffix=suffix)
    loaded = data.load(name, str(tmp_path))
    np.testing.assert_array_equal(loaded.train_images[..., 0], images["train"])
    np.testing.assert_array_equal(loaded.test_images[..., 0], images["t10k"])
    np.testing.assert_array_equal(loaded.train_labels, labels["train"])
    np.testing.assert_array_equal(loaded.test_labels, labels["t10k"])
    assert loaded.train_labels.dtype == np.int32
    assert len(loaded.classes) == 10


def test_cifar_layout(tmp_path):
    folder, images = write_cifar(tmp_path)
    loaded = data.load("cifar10", str(tmp_path))
    np.testing.assert_array_equal(loaded.train_images, images[:5].reshape(20, 32, 32, 3))
    np.testing.assert_array_equal(loaded.test_images, images[5])
    np.testing.assert_array_equal(loaded.train_labels, np.tile(np.arange(4), 5))
    assert loaded.classes[3] == "cat" and loaded.note == ""
    (folder / "NOTE.txt").write_text("Not the\nofficial pixels.\n")
    assert data.load("cifar10", str(tmp_path)).note == "Not the official pixels."


@pytest.mark.parametrize("folder", ["", "svhn"])
def test_svhn_layout(tmp_path, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    images = random_images(2, 5, 32, 32, 3)
    labels = np.array([1, 2, 9, 10, 3], np.uint8)
    for name, part in zip(("train", "test"), images, strict=True):
        content = {"X": part.transpose(1, 2, 3, 0), "y": labels[:, np.newaxis]}
        scipy.io.savemat(tmp_path / folder / f"{name}_32x32.mat", content)
    loaded = data.load("svhn", str(tmp_path))
    np.testing.assert_array_equal(loaded.train_images, images[0])
    np.testing.assert_array_equal(loaded.test_images, images[1])
    np.testing.assert_array_equal(loaded.test_labels, [1, 2, 9, 0, 3])


def write_image_folder(root):
    shapes = {
        "train": [("n01", 40, 60), ("n01", 50, 50), ("n03", 30, 90)],
        "val": [("n02", 64, 48)],
    }
    for split, entries in shapes.items():
        for number, (name, height, width) in enumerate(entries):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.full((height, width, 3), 40 * (number + 1), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    (root / "val" / "n02" / "notes.txt").write_text("not an image")


@pytest.mark.parametrize("below", ["", "imagenet"])
def test_image_folders(tmp_path, below):
    write_image_folder(tmp_path / below)
    loaded = data.load("imagenet_folder", str(tmp_path), size=24)
    assert loaded.classes == ("n01", "n02", "n03")
    assert loaded.train_images.shape == (3, 24, 24, 3) and len(loaded.test_images) == 1
    np.testing.assert_array_equal(loaded.train_labels, [0, 0, 2])
    np.testing.assert_array_equal(loaded.test_labels, [1])
    decoded = loaded.train_images[np.array([2, 0])]
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded[:, 0, 0, 0], [120, 40])
    np.testing.assert_array_equal(
        loaded.train_images[1:], decoded[[0, 0]] * 0 + [[[[80]]], [[[120]]]]
    )
    np.testing.assert_array_equal(loaded.train_images[1], np.full((24, 24, 3), 80))


def test_image_folders_take_the_order_of_all_classes(tmp_path):
    write_image_folder(tmp_path)
    every = ("n00", "n01", "n02", "n03")
    loaded = data.load("imagenet_folder", str(tmp_path), size=24, classes=every)
    np.testing.assert_array_equal(loaded.train_labels, [1, 1, 3])
    with pytest.raises(ValueError, match="the folder n03 is not among the 3 classes"):
        data.load("imagenet_folder", str(tmp_path), size=24, classes=every[:3])


def test_image_is_resized_then_cropped(tmp_path):
    # A ramp from left to right: the centre crop keeps its middle half.
    ramp = np.broadcast_to(
        np.arange(0, 256, 2, dtype=np.uint8)[np.newaxis, :, np.newaxis], (64, 128, 3)
    )
    (tmp_path / "val" / "ramp").mkdir(parents=True)
    Image.fromarray(ramp.copy()).save(tmp_path / "val" / "ramp" / "0.png")
    loaded = data.load("imagenet_folder", str(tmp_path), size=32, resize=32)
    row = loaded.test_images[0][0, :, 0].astype(int)
    np.testing.assert_allclose(row, np.linspace(65, 189, 32), atol=3)


def test_imagenet_samples_of_the_shared_folder(tmp_path):
    folder = SHARED / "imagenet_samples"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/imagenet_samples")
    (tmp_path / "val" / "n00").mkdir(parents=True)
    for path in sorted(folder.glob("*.JPEG"))[:3]:
        (tmp_path / "val" / "n00" / path.name).write_bytes(path.read_bytes())
    loaded = data.load("imagenet_folder", str(tmp_path))
    assert loaded.test_images[:].shape == (3, 224, 224, 3)
    assert loaded.test_images[:].std() > 10


def test_mnist_of_the_shared_folder(tmp_path):
    folder = SHARED / "mnist"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/mnist")
    (tmp_path / "MNIST").mkdir()
    (tmp_path / "MNIST" / "raw").symlink_to(folder)
    loaded = data.load("mnist", str(tmp_path))
    assert loaded.train_images.shape == (60_000, 28, 28, 1)
    np.testing.assert_array_equal(loaded.train_labels[:10], [5, 0, 4, 1, 9, 2, 1, 3, 1, 4])
    np.testing.assert_array_equal(loaded.test_labels[:10], [7, 2, 1, 0, 4, 1, 4, 9, 5, 9])
    # The sums of the download table are those of the official files.
    for path, source in files.SOURCES["mnist"].items():
        content = (tmp_path / path).read_bytes()
        assert hashlib.sha256(content).hexdigest() == source.sha256


# ---------------------------------------------------------------- where files are looked for


def test_folders_are_searched_in_order(tmp_path, monkeypatch):
    for place, count in (("given", 2), ("variable", 3), ("cache/nnslicer_jax", 4)):
        write_idx(tmp_path / place, "MNIST/raw", train=count)
    monkeypatch.setenv("NNSLICER_DATA", str(tmp_path / "variable"))
    assert len(data.load("mnist", str(tmp_path / "given")).train_labels) == 2
    assert len(data.load("mnist", str(tmp_path / "empty")).train_labels) == 3
    monkeypatch.delenv("NNSLICER_DATA")
    assert len(data.load("mnist").train_labels) == 4


def test_unknown_set():
    with pytest.raises(ValueError, match="data: 'emnist' is unknown; known are cifar10, digits"):
        data.load("emnist")


@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn", "imagenet_folder"])
def test_missing_set_names_files_and_folder(tmp_path, name):
    with pytest.raises(FileNotFoundError) as error:
        data.load(name, str(tmp_path / "here"), download=False)
    message = str(error.value)
    assert "\n" not in message
    assert str(tmp_path / "here") in message and str(tmp_path / "cache") in message
    expected = {
        "mnist": "MNIST/raw/train-images-idx3-ubyte",
        "cifar10": "cifar-10-batches-py/data_batch_1",
        "svhn": "svhn/train_32x32.mat",
        "imagenet_folder": "imagenet/train/<class>/*.JPEG",
    }
    assert expected[name] in message


# ---------------------------------------------------------------- downloads


@pytest.fixture
def server(tmp_path):
    """A web server on this machine; gives the folder that it serves and its address."""
    root = tmp_path / "served"
    root.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(root))

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield root, f"http://127.0.0.1:{httpd.server_port}/"
        httpd.shutdown()
        thread.join()


def everything_below(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_download_of_plain_files(server, tmp_path, monkeypatch):
    root, address = server
    images, _ = write_idx(root, "files", pack=gzip.compress, suffix=".gz")
    sources = {}
    for path in sorted((root / "files").iterdir()):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        sources[f"MNIST/raw/{path.name}"] = files.Source(f"{address}files/{path.name}", digest)
    monkeypatch.setitem(files.SOURCES, "mnist", sources)
    loaded = data.load("mnist")
    np.testing.assert_array_equal(loaded.train_images[..., 0], images["train"])
    assert everything_below(tmp_path / "cache" / "nnslicer_jax") == sorted(sources)
    # From now on the network is not needed.
    monkeypatch.setitem(files.SOURCES, "mnist", {})
    np.testing.assert_array_equal(data.load("mnist").train_images, loaded.train_images)


def test_download_of_an_archive_keeps_the_wanted_members_only(server, tmp_path, monkeypatch):
    root, address = server
    folder, images = write_cifar(root)
    (folder / "surplus").write_bytes(b"not wanted")
    with tarfile.open(root / "cifar.tar.gz", "w:gz") as tar:
        tar.add(folder, "cifar-10-batches-py")
    digest = hashlib.sha256((root / "cifar.tar.gz").read_bytes()).hexdigest()
    original = files.SOURCES["cifar10"]["cifar-10-python.tar.gz"]
    source = original._replace(url=address + "cifar.tar.gz", sha256=digest)
    monkeypatch.setitem(files.SOURCES, "cifar10", {"cifar-10-python.tar.gz": source})
    loaded = data.load("cifar10", str(tmp_path / "here"))
    np.testing.assert_array_equal(loaded.test_images, images[5])
    assert everything_below(tmp_path / "here") == sorted(original.members)


def test_download_with_another_sum_keeps_nothing(server, tmp_path, monkeypatch):
    root, address = server
    write_idx(root, "files")
    names = [path.name for path in (root / "files").iterdir()]
    monkeypatch.setitem(
        files.SOURCES,
        "mnist",
        {f"MNIST/raw/{n}": files.Source(f"{address}files/{n}", "0" * 64) for n in names},
    )
    with pytest.raises(ValueError, match="expected SHA-256 0000.*, got .*nothing was kept"):
        data.load("mnist", str(tmp_path / "here"))
    assert everything_below(tmp_path / "here") == []


def test_failed_download_names_files_and_reason(server, tmp_path, monkeypatch):
    _, address = server
    source = files.Source(address + "nowhere.mat", "0" * 64)
    monkeypatch.setitem(files.SOURCES, "svhn", {"svhn/train_32x32.mat": source})
    with pytest.raises(FileNotFoundError) as error:
        data.load("svhn", str(tmp_path / "here"))
    message = str(error.value)
    assert "svhn/train_32x32.mat" in message and "cannot be downloaded" in message
    assert "nowhere.mat" in message and "\n" not in message
    assert everything_below(tmp_path / "here") == []


def test_sources_have_sums_and_lie_where_the_loaders_look():
    for name, sources in files.SOURCES.items():
        for path, source in sources.items():
            assert len(bytes.fromhex(source.sha256)) == 32
            assert source.url.endswith(Path(path).name)
        wanted = {member for source in sources.values() for member in source.members} or set(
            sources
        )
        with pytest.raises(FileNotFoundError) as error:
            data.load(name, download=False)
        assert all(
            path.removesuffix(".gz") in str(error.value) for path in wanted if "meta" not in path
        )


# ---------------------------------------------------------------- damaged and hostile files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x00\x00\x08\x03\x00\x00", "not an IDX file"),
        (idx_bytes(random_images(2, 3, 3))[:-1], "says 18 values .* holds 17"),
        (idx_bytes(random_images(2, 3, 3)) + b"x", "says 18 values .* holds 19"),
        (idx_bytes(np.zeros(3, np.uint8)), "not an IDX file of unsigned bytes with 3 axes"),
        (struct.pack(">BBBBIII", 0, 0, 8, 3, *[2**32 - 1] * 3), "the file holds 0"),
        (gzip.compress(idx_bytes(random_images(2, 3, 3)))[:-9], "damaged gzip"),
        (b"\x1f\x8bnonsense", "damaged gzip"),
    ],
    ids=["empty", "header", "short", "long", "labels", "huge", "cut gzip", "gzip"],
)
def test_damaged_idx(tmp_path, content, message):
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        idx.read(path, 3)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_counts_that_differ(tmp_path):
    write_idx(tmp_path, "MNIST/raw")
    labels = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    labels.write_bytes(idx_bytes(np.zeros(2, np.uint8)))
    with pytest.raises(ValueError, match="mnist: 3 test images but 2 test labels"):
        data.load("mnist", str(tmp_path))


def test_labels_out_of_range(tmp_path):
    write_idx(tmp_path, "MNIST/raw")
    labels = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    labels.write_bytes(idx_bytes(np.array([0, 10, 3], np.uint8)))
    with pytest.raises(ValueError, match="mnist: test labels run from 0 to 10, expected 0 to 9"):
        data.load("mnist", str(tmp_path))


class Hostile:
    """Unpickled without care, it runs a command."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {b"data": [x]}], ids=["bare", "inside"])
def test_unpickler_runs_no_command(tmp_path, protocol, wrap):
    mark = tmp_path / "mark"
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps(wrap(Hostile(os.system, f"touch {mark}")), protocol=protocol))
    with pytest.raises(ValueError, match=r"it asks for posix.system|it asks for nt.system"):
        restricted_pickle.load(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Hostile(eval, "1")),
        pickle.dumps(Hostile(getattr, "a", "upper")),
        pickle.dumps(Hostile(np.load, "batch")),
        b"cnumpy\nndarray\n(I9\ntR.",  # Calls numpy.ndarray(9).
        b"c_codecs\nencode\n(Va\nVzlib\ntR.",
        b"",
        b"not a pickle",
        pickle.dumps({b"data": np.zeros(9)})[:-20],
        b"\x80\x02" + b"(" * 50,
    ],
    ids=["eval", "getattr", "load", "ndarray", "codec", "empty", "text", "cut", "marks"],
)
def test_unpickler_refuses(tmp_path, content):
    path = tmp_path / "batch"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a pickle of plain containers and numpy") as error:
        restricted_pickle.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_unpickler_reads_arrays_and_containers(tmp_path, protocol):
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    content = {b"a": [1, (2.5, None), b"x"], b"b": array, b"c": np.asfortranarray(array)}
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    loaded = restricted_pickle.load(path)
    np.testing.assert_array_equal(loaded.pop(b"b"), array)
    np.testing.assert_array_equal(loaded.pop(b"c"), array)
    assert loaded == {b"a": content[b"a"]}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([1], "expected 'data'"),
        ({b"data": np.zeros((2, 3072)), b"labels": [0, 1]}, "expected 'data'"),
        ({b"data": np.zeros((2, 3071), "u1"), b"labels": [0, 1]}, "3072 bytes an image, got 3071"),
        ({b"data": np.zeros((2, 3072), "u1"), b"labels": [0]}, "a list of 2 class numbers"),
        ({b"data": np.zeros((2, 3072), "u1"), b"labels": [0, b"x"]}, "other than whole numbers"),
        ({b"data": np.zeros((2, 3072), "u1"), b"labels": [0, 10]}, "expected 0 to 9"),
    ],
)
def test_wrong_cifar_batches(tmp_path, batch, message):
    folder, _ = write_cifar(tmp_path)
    (folder / "data_batch_3").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(ValueError, match=message) as error:
        data.load("cifar10", str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"nonsense", "not a MATLAB file with X and y"),
        ({"X": np.zeros((32, 32, 3, 2), "u1")}, "not a MATLAB file with X and y"),
        ({"X": np.zeros((32, 32, 3, 2)), "y": np.ones((2, 1), "u1")}, "in unsigned bytes"),
        ({"X": np.zeros((28, 32, 3, 2), "u1"), "y": np.ones((2, 1), "u1")}, r"\(32, 32, 3, N\)"),
        ({"X": np.zeros((32, 32, 3, 2), "u1"), "y": np.ones((3, 1), "u1")}, "y of 2 whole numbers"),
    ],
)
def test_damaged_svhn(tmp_path, content, message):
    for name in ("train", "test"):
        path = tmp_path / f"{name}_32x32.mat"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            scipy.io.savemat(path, content)
    with pytest.raises(ValueError, match=message) as error:
        data.load("svhn", str(tmp_path))
    assert "\n" not in str(error.value)


def test_damaged_image(tmp_path):
    (tmp_path / "train" / "n01").mkdir(parents=True)
    stream = io.BytesIO()
    Image.fromarray(random_images(64, 64, 3)).save(stream, "JPEG")
    (tmp_path / "train" / "n01" / "0.JPEG").write_bytes(stream.getvalue()[:400])
    (tmp_path / "train" / "n01" / "1.JPEG").write_bytes(b"nonsense")
    loaded = data.load("imagenet_folder", str(tmp_path), size=32)
    for index in (0, 1):
        with pytest.raises(ValueError, match=rf"{index}.JPEG: not a readable image") as error:
            loaded.train_images[index]
        assert "\n" not in str(error.value)


def test_image_sizes_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"size: expected 1 to resize \(8\), got 9"):
        imagenet_folder.load(str(tmp_path), size=9, resize=8)


def test_folders_without_images(tmp_path):
    (tmp_path / "train" / "n01").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="hold no images"):
        data.load("imagenet_folder", str(tmp_path))
