"""Where the files of a data set are looked for, and how a missing set is downloaded."""

import hashlib
import http.client
import os
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from nnslicer_jax.atomic import replacing


class Source(NamedTuple):
    """A file to download.

    Attributes:
        url: its address.
        sha256: the SHA-256 sum it must have, 64 hexadecimal digits.
        members: for a tar archive, the paths inside that are kept; empty for a plain file.
    """

    url: str
    sha256: str
    members: tuple[str, ...] = ()


_MNIST = "https://storage.googleapis.com/cvdf-datasets/mnist/"
_FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_CIFAR = "https://www.cs.toronto.edu/~kriz/"
_SVHN = "http://ufldl.stanford.edu/housenumbers/"
_CIFAR_MEMBERS = tuple(
    f"cifar-10-batches-py/{name}"
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
)

# Path below a data folder -> what is downloaded there.
SOURCES: dict[str, dict[str, Source]] = {
    "mnist": {
        "MNIST/raw/train-images-idx3-ubyte.gz": Source(
            _MNIST + "train-images-idx3-ubyte.gz",
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        "MNIST/raw/train-labels-idx1-ubyte.gz": Source(
            _MNIST + "train-labels-idx1-ubyte.gz",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
        "MNIST/raw/t10k-images-idx3-ubyte.gz": Source(
            _MNIST + "t10k-images-idx3-ubyte.gz",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        ),
        "MNIST/raw/t10k-labels-idx1-ubyte.gz": Source(
            _MNIST + "t10k-labels-idx1-ubyte.gz",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    },
    "fashion_mnist": {
        "FashionMNIST/raw/train-images-idx3-ubyte.gz": Source(
            _FASHION + "train-images-idx3-ubyte.gz",
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        ),
        "FashionMNIST/raw/train-labels-idx1-ubyte.gz": Source(
            _FASHION + "train-labels-idx1-ubyte.gz",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        ),
        "FashionMNIST/raw/t10k-images-idx3-ubyte.gz": Source(
            _FASHION + "t10k-images-idx3-ubyte.gz",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        ),
        "FashionMNIST/raw/t10k-labels-idx1-ubyte.gz": Source(
            _FASHION + "t10k-labels-idx1-ubyte.gz",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    },
    "cifar10": {
        "cifar-10-python.tar.gz": Source(
            _CIFAR + "cifar-10-python.tar.gz",
            "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
            _CIFAR_MEMBERS,
        ),
    },
    "svhn": {
        "svhn/train_32x32.mat": Source(
            _SVHN + "train_32x32.mat",
            "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
        ),
        "svhn/test_32x32.mat": Source(
            _SVHN + "test_32x32.mat",
            "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
        ),
    },
}


def cache_folder() -> Path:
    """The folder that downloads and locally trained weights go to."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "nnslicer_jax"


def search_folders(data_dir: str | os.PathLike | None = None) -> list[Path]:
    """Lists where data is looked for: data_dir, then $NNSLICER_DATA, then the user's cache."""
    named = [data_dir, os.environ.get("NNSLICER_DATA")]
    return [Path(folder).expanduser() for folder in named if folder] + [cache_folder()]


def locate(
    name: str,
    files: Sequence[Sequence[str]],
    data_dir: str | os.PathLike | None = None,
    *,
    download: bool = True,
    sources: Mapping[str, Source] | None = None,
) -> list[Path]:
    """Finds the files of a data set in one folder, downloading the set if none holds it.

    Args:
        name: the data set, for messages and for ``SOURCES``.
        files: for each file the paths it may have below a data folder, the usual one first.
        data_dir: searched first, and where a download goes; without it the user's cache.
        download: False searches only.
        sources: in place of ``SOURCES[name]``.

    Returns:
        One existing path for each of ``files``.

    Raises:
        FileNotFoundError: the set is not there and cannot be downloaded.
        ValueError: what was downloaded has another SHA-256 sum than it must have.
    """
    folders = search_folders(data_dir)
    for folder in folders:
        found = _complete(folder, files)
        if found:
            return found
    target = folders[0] if data_dir else folders[-1]
    wanted = ", ".join(options[0] for options in files)
    searched = ", ".join(str(folder) for folder in folders)
    missing = f"{name}: not found in {searched}; put {wanted} into one of them"
    sources = SOURCES.get(name, {}) if sources is None else sources
    if not download or not sources:
        raise FileNotFoundError(missing)
    for path, source in sources.items():
        # A folder may hold a part of the set already: what is there is not fetched again.
        if source.members or not (target / path).exists():
            try:
                _fetch(source, target / path, target)
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, urllib.error.HTTPError):
                    error.close()
                reason = getattr(error, "reason", None) or error
                raise FileNotFoundError(
                    f"{missing} ({source.url} cannot be downloaded: {reason})"
                ) from None
    found = _complete(target, files)
    if not found:
        raise FileNotFoundError(f"{missing} (the download did not bring them)")
    return found


def _complete(folder: Path, files: Sequence[Sequence[str]]) -> list[Path]:
    found = []
    for options in files:
        present = [folder / option for option in options if (folder / option).is_file()]
        if not present:
            return []
        found.append(present[0])
    return found


def _fetch(source: Source, path: Path, root: Path) -> None:
    if not source.members:
        with replacing(path) as partial:
            _download(source, partial)
        return
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=f".{path.name}.") as folder:
        archive = Path(folder) / path.name
        _download(source, archive)
        _extract(archive, source, root)


def _download(source: Source, path: Path) -> None:
    digest = hashlib.sha256()
    request = urllib.request.Request(source.url, headers={"User-Agent": "nnslicer-jax"})
    with urllib.request.urlopen(request, timeout=60) as response, open(path, "wb") as out:
        while block := response.read(1 << 20):
            digest.update(block)
            out.write(block)
    if digest.hexdigest() != source.sha256:
        raise ValueError(
            f"{source.url}: expected SHA-256 {source.sha256}, got {digest.hexdigest()}; "
            "nothing was kept"
        )


def _extract(archive: Path, source: Source, root: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in source.members:
            try:
                stream = tar.extractfile(member)
            except KeyError:
                stream = None
            if stream is None:
                raise ValueError(f"{source.url}: the archive has no file {member}")
            with replacing(root / member) as partial, open(partial, "wb") as out:
                shutil.copyfileobj(stream, out)
