"""`data.dataset` by name: the embedded photographs, torchvision's sets, folders of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100, STL10, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from cp_plugin.config.settings import UserError
from cp_plugin.data.labels import UNLABELLED
from cp_plugin.data.photos import Photos
from cp_plugin.data.picture_cache import PictureCache
from cp_plugin.data.picture_files import beside, listing, open_picture, tell_left_out

FOLDERS = ("custom", "imagenet", "imagenet100")
CACHED = "pictures"
"""What `cp-plugin protect` has prepared."""
SIDES = {"cifar10": 32, "cifar100": 32, "stl10": 96}
"""Side in pixels of the images of torchvision's data sets."""
ARCHIVES = tuple(SIDES)
NAMES = ("photos", *ARCHIVES, *FOLDERS, CACHED)
DEFAULT_ROOT = "./datasets"
_downloads = ContextVar("downloads", default=True)
"""Whether torchvision's data sets may be downloaded to where they are not."""


class FlatFolder(Dataset[tuple[Any, int]]):
    """The images of a folder and its subfolders, without labels.

    Attributes:
        root: the folder.
        samples: (path, -1) of each image, sorted by path.
        transform: applied to each PIL image; it can be set.
    """

    def __init__(self, root: str | Path, transform: Callable[[Any], Any] | None = None) -> None:
        """List the images.

        Raises:
            UserError: there is no such folder, or no image in it.
        """
        self.root = str(root)
        self.transform = transform
        folder = _existing(root, "data.train_path")
        found = listing(folder)
        tell_left_out(folder, found.left_out)
        self.samples = [(str(path), UNLABELLED) for path in found.pictures]
        if not self.samples:
            raise _no_images(folder)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        """Return an image, as PIL image or as its transform makes it, and -1."""
        path, label = self.samples[row]
        image: Any = open_picture(path)
        return (image if self.transform is None else self.transform(image)), label


class ClassFolder(ImageFolder):  # type: ignore[misc]
    """The images of a folder that has a subfolder a class; links are followed.

    Files that are left out, such as those beside the class folders, are named in the log.
    """

    def __init__(self, root: Path) -> None:
        """List the images.

        Raises:
            FileNotFoundError: there is no class folder, or one without an image.
        """
        self._listing = listing(root)
        super().__init__(root, loader=open_picture)
        loose = beside(self._listing.pictures, root)
        tell_left_out(root, {**self._listing.left_out, **loose})

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Return the names of the class folders, hidden ones left out."""
        names = sorted(folder.name for folder in _class_folders(Path(directory)))
        if not names:
            raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
        return names, {name: number for number, name in enumerate(names)}

    def make_dataset(self, directory: Any, class_to_idx: Any, *_: Any, **__: Any) -> Any:
        """Return path and label of each image, class by class."""
        root = Path(directory)
        samples = []
        for path in self._listing.pictures:
            place = path.relative_to(root).parts
            if len(place) > 1:
                samples.append((str(path), class_to_idx[place[0]]))
        empty = sorted(class_to_idx.keys() - {self._class_of(path, root) for path, _ in samples})
        if empty:
            raise FileNotFoundError(f"Found no valid file for the classes {', '.join(empty)}")
        return samples

    def _class_of(self, path: str, root: Path) -> str:
        return Path(path).relative_to(root).parts[0]


@contextmanager
def no_downloads() -> Iterator[None]:
    """Load only what is there, for configurations that are not the user's own."""
    before = _downloads.set(False)
    try:
        yield
    finally:
        _downloads.reset(before)


def load(
    name: str,
    train_path: str | Path | None = None,
    val_path: str | Path | None = None,
    no_labels: bool = False,
) -> tuple[Any, Any | None]:
    """Return the training set and the test set of `data.dataset`.

    Args:
        name: `photos`, `cifar10`, `cifar100`, `stl10`, `imagenet`, `imagenet100` or `custom`.
        train_path: a folder of images (a subfolder a class, unless `no_labels`), or the folder
            where torchvision keeps its files; these are downloaded if they are missing.
        val_path: the same for the test set. None: no test set for folders.
        no_labels: every image of the folder, without labels.

    Returns:
        Two map-style data sets of (image, label) with a `transform` that can be set; the second
        is None where there is no test set.

    Raises:
        UserError: an unknown name, a missing or empty folder, a folder without classes, or a
            download that failed.
    """
    if name == "photos":
        return Photos(train=True), Photos(train=False)
    if name == CACHED and train_path is not None:
        return PictureCache(train_path), None
    if name in ARCHIVES:
        root = Path(train_path or DEFAULT_ROOT)
        return _archive(name, True, root), _archive(name, False, root, val_path)
    if name not in (*FOLDERS, CACHED):
        raise UserError(f"data.dataset must be one of {', '.join(NAMES)}; got {name!r}.")
    if train_path is None:
        raise UserError(f"data.dataset={name} needs data.train_path=FOLDER.")
    train = _folder(train_path, "data.train_path", no_labels)
    if val_path is None:
        return train, None
    unlabelled = no_labels and not _class_folders(_existing(val_path, "data.val_path"))
    return train, _folder(val_path, "data.val_path", unlabelled)


def _archive(name: str, train: bool, root: Path, other_root: str | Path | None = None) -> Any:
    """One of torchvision's data sets, from either folder, downloaded to the first if in neither."""
    for place in (other_root, root):
        if place is not None and Path(place).is_dir():
            try:
                return _torchvision(name, train, Path(place), download=False)
            except RuntimeError:
                continue
    if not _downloads.get():
        raise UserError(
            f"{name} is not in {root}, and a study downloads nothing to where its file says; put "
            "torchvision's files there, as `cp-plugin pretrain` with the same data does by itself, "
            "or have data.train_path say the folder that has them."
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        return _torchvision(name, train, root, download=True)
    except (RuntimeError, OSError, EOFError) as error:
        raise UserError(
            f"{name} is not in {root}, and it could not be downloaded ({_first_line(error)}); "
            "put torchvision's files there, set data.train_path to the folder that has them, or "
            "use data.dataset=photos, which needs no download."
        ) from error


def _torchvision(name: str, train: bool, root: Path, download: bool) -> Any:
    if name == "stl10":
        return STL10(root, split="train+unlabeled" if train else "test", download=download)
    return (CIFAR10 if name == "cifar10" else CIFAR100)(root, train=train, download=download)


def class_folder(path: str | Path, option: str) -> Any:
    """Return a folder of labelled images, a subfolder a class.

    Args:
        path: the folder.
        option: what it was given as, for errors.

    Raises:
        UserError: it is missing or empty, or has no class subfolders.
    """
    folder = _existing(path, option)
    if not _class_folders(folder) and listing(folder).pictures:
        raise UserError(
            f"{option}={folder} has images but no class subfolders, and kNN and probes need "
            "labels; make one subfolder a class."
        )
    return _folder(folder, option, False)


def _folder(path: str | Path, setting: str, no_labels: bool) -> Any:
    folder = _existing(path, setting)
    if no_labels:
        return FlatFolder(folder)
    if not _class_folders(folder):
        if not listing(folder).pictures:
            raise _no_images(folder)
        raise UserError(
            f"{setting}={folder} has images but no class subfolders; make one subfolder a class, "
            "or set data.no_labels=True to use the images without labels."
        )
    try:
        return ClassFolder(folder)
    except FileNotFoundError as error:
        raise UserError(
            f"{setting}={folder}: {_first_line(error)}; every class subfolder needs an image."
        ) from error


def _existing(path: str | Path, setting: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{setting}={path} is not a folder; give the folder of the images.")
    return folder


def _class_folders(folder: Path) -> list[Path]:
    return [
        entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    ]


def _no_images(folder: Path) -> UserError:
    return UserError(f"{folder} has no images ({', '.join(IMG_EXTENSIONS)}).")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
