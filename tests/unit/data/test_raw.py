from __future__ import annotations

import pickle
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightly.data import LightlyDataset
from lightly.transforms import SimCLRTransform
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset
from torch.utils.data import TensorDataset as Tensors
from torchvision import transforms
from torchvision.datasets import CIFAR10, STL10, FakeData, ImageFolder

from cp_plugin.config.settings import UserError
from cp_plugin.data import (
    Canonical,
    FlatFolder,
    Photos,
    PreTransformDataset,
    RawDataset,
    SampleError,
    class_names,
    image_key,
    labels,
    load,
)

PIPELINE = transforms.Compose([transforms.RandomCrop(24), transforms.ToTensor()])
MakeFolder = Callable[..., Path]


def pixels(path: str | Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def views_of(count: int) -> list[Tensor]:
    return [torch.full((count, 3, 24, 24), float(number)) for number in range(2)]


class TwoViews:
    def __call__(self, image: Any) -> list[Tensor]:
        return [PIPELINE(image), PIPELINE(image)]


# RawDataset


class Holding(Dataset[Any]):
    """A user's wrapper: another form of sample around a data set with a transform."""

    def __init__(self, dataset: Any, form: Callable[[int, Any, int], Any]) -> None:
        self.dataset = dataset
        self.form = form

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Any:
        views, target = self.dataset[row]
        return self.form(row, views, target)


class Own(Dataset[Any]):
    """A user's own data set that does with its transform what `use` says."""

    def __init__(self, files: list[Path], use: Callable[[Any, Any], Any]) -> None:
        self.files = files
        self.transform = TwoViews()
        self.use = use

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> Any:
        with Image.open(self.files[row]) as picture:
            return self.use(self.transform, picture.convert("RGB"))


Sample = namedtuple("Sample", ["views", "target"])

FORMS: dict[str, Callable[[int, Any, int], Any]] = {
    "views, target": lambda row, views, target: (views, target),
    "views, target, name": lambda row, views, target: (views, target, f"{row}.png"),
    "index, views, target": lambda row, views, target: (row, views, target),
    "only views": lambda row, views, target: views,
    "dictionary": lambda row, views, target: {"target": target, "in": {"views": views}},
    "named tuple": lambda row, views, target: Sample(views, target),
    "list": lambda row, views, target: [target, views],
}


@pytest.mark.parametrize("form", FORMS)
def test_opened_serves_every_form_of_sample(form: str, image_folder: MakeFolder) -> None:
    """The host's batch with views put back equals the one that its own loader would have made."""
    inner = ImageFolder(image_folder(), transform=TwoViews())
    dataset = Holding(inner, FORMS[form])
    raw = RawDataset(dataset, image_size=32)
    batch = raw.collate([raw[row] for row in (3, 0, 7)])
    put_back = raw.with_views(batch.sample, views_of(3))
    stock = next(iter(DataLoader(Subset(dataset, [3, 0, 7]), batch_size=3)))
    assert batch.rows.tolist() == [3, 0, 7]
    expected = torch.stack([pixels(inner.samples[row][0]) for row in (3, 0, 7)])
    assert torch.equal(batch.images, expected)
    assert batch.keys.tolist() == [image_key(image) for image in expected]
    assert_same_form(put_back, stock)


def assert_same_form(found: Any, stock: Any) -> None:
    """Same containers and values, but for the views, which are those of `views_of`."""
    if isinstance(stock, Tensor):
        if stock.is_floating_point():
            assert found.shape == stock.shape
            assert int(found.min()) == int(found.max())
        else:
            assert torch.equal(found, stock)
    elif isinstance(stock, dict):
        assert found.keys() == stock.keys()
        for key in stock:
            assert_same_form(found[key], stock[key])
    elif isinstance(stock, (list, tuple)):
        assert type(found) is type(stock)
        assert len(found) == len(stock)
        for one, other in zip(found, stock, strict=True):
            assert_same_form(one, other)
    else:
        assert found == stock


USES: dict[str, Callable[[Any, Any], Any]] = {
    "called twice": lambda transform, image: (transform(image), transform(image), 4),
    "unpacked": lambda transform, image: (4, *transform(image)),
    "indexed": lambda transform, image: {"q": transform(image)[0], "k": transform(image)[1]},
}


@pytest.mark.parametrize("use", USES)
def test_opened_finds_views_that_stand_apart(use: str, image_folder: MakeFolder) -> None:
    files = sorted(image_folder(flat=True).glob("*.png"))
    raw = RawDataset(Own(files, USES[use]), image_size=32)
    assert raw.places == 2
    batch = raw.collate([raw[1], raw[2]])
    assert torch.equal(batch.images[1], pixels(files[2]))
    put_back = raw.with_views(batch.sample, views_of(2))
    found = list(put_back.values()) if isinstance(put_back, dict) else put_back
    views = [part for part in found if part.ndim == 4]
    assert [int(view.unique()) for view in views] == [0, 1]
    with pytest.raises(UserError, match="returns 2 views an image"):
        raw.with_views(batch.sample, views_of(2)[:1] * 3)


def test_opened_leaves_the_data_set_and_its_siblings_alone(image_folder: MakeFolder) -> None:
    dataset = ImageFolder(image_folder(), transform=TwoViews())
    transform, both = dataset.transform, dataset.transforms
    train, val = Subset(dataset, [0, 1, 2]), Subset(dataset, [3, 4])
    raw = RawDataset(train, image_size=32)
    assert raw.transform is transform
    assert raw[0].image.shape == (3, 32, 32)
    assert isinstance(val[0][0], list)
    assert dataset.transform is transform
    assert dataset.transforms is both


def test_opened_follows_subsets_and_joins(image_folder: MakeFolder) -> None:
    first = ImageFolder(image_folder("first"), transform=PIPELINE)
    second = ImageFolder(image_folder("second", classes=2), transform=PIPELINE)
    joined = ConcatDataset([Subset(first, [5, 1]), second])
    raw = RawDataset(joined, image_size=None)
    assert raw.transform is PIPELINE
    files = [first.samples[5][0], first.samples[1][0], *(path for path, _ in second.samples)]
    assert len(raw) == len(files) == 10
    for row, file in enumerate(files):
        assert torch.equal(raw[row].image, pixels(file))
    assert raw[-1].row == 9


def test_opened_refuses_joined_data_sets_with_different_transforms(
    image_folder: MakeFolder,
) -> None:
    folder = image_folder()
    twice = [ImageFolder(folder, transform=TwoViews()), ImageFolder(folder, transform=TwoViews())]
    assert isinstance(RawDataset(ConcatDataset(twice), 32).transform, TwoViews)
    twice[1].transform = PIPELINE
    with pytest.raises(UserError, match="different transforms"):
        RawDataset(ConcatDataset(twice), 32)


def test_opened_takes_the_outermost_transform(image_folder: MakeFolder) -> None:
    class Outer(Holding):
        def __init__(self, dataset: Any) -> None:
            super().__init__(dataset, FORMS["views, target"])
            self.transform = TwoViews()

        def __getitem__(self, row: int) -> Any:
            image, target = super().__getitem__(row)
            return self.transform(image), target

    inner = ImageFolder(image_folder(), transform=transforms.CenterCrop(28))
    raw = RawDataset(Outer(inner), image_size=None)
    assert isinstance(raw.transform, TwoViews)
    assert raw[0].image.shape == (3, 28, 28)


def test_opened_serves_a_transform_of_none(photos: Photos) -> None:
    raw = RawDataset(photos, image_size=32)
    assert raw.transform is None
    assert torch.equal(raw[4].image, torch.from_numpy(photos.data[4]).permute(2, 0, 1))


def test_opened_resizes(image_folder: MakeFolder) -> None:
    dataset = ImageFolder(image_folder(size=(60, 40)), transform=PIPELINE)
    expected = Canonical(16)(Image.open(dataset.samples[2][0]))
    assert torch.equal(RawDataset(dataset, 16)[2].image, expected)


def test_opened_names_the_setting_when_sizes_differ(image_folder: MakeFolder) -> None:
    image_folder("mixed", classes=1, size=40)
    folder = image_folder("mixed", classes=2)
    (folder / "astronaut" / "astronaut_000.png").unlink()
    for file in (folder / "brick").iterdir():
        Image.open(file).resize((30, 30)).save(file)
    raw = RawDataset(ImageFolder(folder, transform=PIPELINE), image_size=None)
    with pytest.raises(UserError, match=r"poison\.image_size"):
        raw.collate([raw[0], raw[-1]])


def test_opened_serves_lightly_data_sets(image_folder: MakeFolder, photos: Photos) -> None:
    flat = LightlyDataset(str(image_folder(flat=True)), transform=SimCLRTransform(24))
    raw = RawDataset(flat, image_size=32)
    assert isinstance(raw.transform, SimCLRTransform)
    assert labels(flat) is None
    assert raw[1].sample[2].endswith("astronaut_001.png")
    assert isinstance(flat[0][0], list)
    wrapped = LightlyDataset.from_torch_dataset(photos, transform=TwoViews())
    try:
        assert RawDataset(wrapped, 32)[9].key == RawDataset(photos, 32)[9].key
        assert labels(wrapped).tolist() == photos.targets
        assert class_names(wrapped) == tuple(photos.classes)
    finally:
        photos.transform = None


def test_opened_serves_a_collate_that_walks_over_the_views(image_folder: MakeFolder) -> None:
    from lightly.data.multi_view_collate import MultiViewCollate

    dataset = LightlyDataset(str(image_folder()), transform=TwoViews())
    raw = RawDataset(dataset, image_size=32)
    batch = raw.collate([raw[0], raw[5]], MultiViewCollate())
    views, target, names = raw.with_views(batch.sample, views_of(2))
    assert [int(view.unique()) for view in views] == [0, 1]
    assert target.tolist() == [0, 1]
    assert len(names) == 2


def test_opened_serves_torchvision_data_sets_in_memory(
    tmp_path: Path, small_stl10: Path, photos: Photos
) -> None:
    write_cifar10(tmp_path, photos)
    dataset = load_cifar10(tmp_path, TwoViews())
    raw = RawDataset(dataset, image_size=32)
    assert torch.equal(raw[7].image, torch.from_numpy(dataset.data[7]).permute(2, 0, 1))
    assert labels(dataset).tolist() == dataset.targets
    assert class_names(dataset) == tuple(dataset.classes)
    fake = FakeData(4, (3, 40, 40), transform=PIPELINE)
    assert RawDataset(fake, 32)[2].image.shape == (3, 32, 32)
    stl = STL10(str(small_stl10), split="train+unlabeled", transform=PIPELINE)
    assert torch.equal(RawDataset(stl, 96)[3].image, torch.from_numpy(stl.data[3]))
    assert labels(stl).tolist() == [0, 1, 2, -1, -1]


def write_cifar10(folder: Path, photos: Photos) -> None:
    place = folder / "cifar-10-batches-py"
    place.mkdir()
    flat = photos.data[:10].transpose(0, 3, 1, 2).reshape(10, -1)
    for name in ("data_batch_1", "test_batch"):
        (place / name).write_bytes(pickle.dumps({"data": flat, "labels": list(range(10))}))
    (place / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


def load_cifar10(folder: Path, transform: Any = None) -> CIFAR10:
    """CIFAR-10 with one file of ten images; checksums are attributes of torchvision's class."""

    class SmallCIFAR10(CIFAR10):
        train_list = (("data_batch_1", None),)
        test_list = (("test_batch", None),)
        meta = {"filename": "batches.meta", "key": "label_names", "md5": None}  # noqa: RUF012

    return SmallCIFAR10(str(folder), transform=transform)


def write_stl10(folder: Path) -> None:
    place = folder / "stl10_binary"
    place.mkdir()
    generator = np.random.default_rng(0)
    for name, count in (("train_X", 3), ("unlabeled_X", 2), ("test_X", 2)):
        images = generator.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
        (place / f"{name}.bin").write_bytes(images.tobytes())
    for name, count in (("train_y", 3), ("test_y", 2)):
        (place / f"{name}.bin").write_bytes(np.arange(1, count + 1, dtype=np.uint8).tobytes())
    (place / "class_names.txt").write_text("\n".join("abcdefghij"))
    (place / "fold_indices.txt").write_text("0 1 2\n")


@pytest.fixture
def small_stl10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A few images in STL-10's files, with torchvision's checksums off."""
    write_stl10(tmp_path)
    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)
    return tmp_path


def test_opened_serves_solo_learn(
    solo_learn: Path, image_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(solo_learn))
    loading = pytest.importorskip("solo.data.pretrain_dataloader", exc_type=ImportError)
    two = loading.prepare_n_crop_transform([PIPELINE], [2])
    labelled = loading.prepare_datasets("custom", two, image_folder())
    raw = RawDataset(labelled, image_size=32)
    assert raw.transform is two
    batch = raw.collate([raw[4], raw[9]])
    assert torch.equal(batch.images[1], pixels(labelled.samples[9][0]))
    index, views, target = raw.with_views(batch.sample, views_of(2))
    assert (index.tolist(), len(views), target.tolist()) == ([4, 9], 2, [1, 2])

    flat = image_folder("flat", flat=True)
    unlabelled = loading.prepare_datasets("custom", two, flat, no_labels=True)
    assert labels(unlabelled) is None
    item = RawDataset(unlabelled, image_size=32)[5]
    assert torch.equal(item.image, pixels(flat / unlabelled.images[5]))
    assert item.sample[0] == 5
    (flat / unlabelled.images[5]).write_bytes(b"no picture")
    with pytest.raises(UserError, match=unlabelled.images[5]):
        RawDataset(unlabelled, image_size=32)[5]


def test_labels_follow_samples_when_targets_are_stale(image_folder: MakeFolder) -> None:
    """solo-learn's `data.fraction` replaces `samples` and leaves `targets`."""
    dataset = ImageFolder(image_folder())
    dataset.samples = [dataset.samples[row] for row in (11, 0, 5)]
    assert labels(dataset).tolist() == [2, 0, 1]
    dataset.samples = dataset.samples * 4
    assert len(dataset.targets) == len(dataset)
    assert labels(dataset).tolist() == [2, 0, 1] * 4


class Streaming(IterableDataset[Any]):
    transform = PIPELINE

    def __iter__(self) -> Any:
        return iter(())


class Bare(Dataset[Any]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, row: int) -> Any:
        return torch.rand(3, 8, 8), row


class Deaf(Bare):
    transform = PIPELINE

    def __init__(self) -> None:
        self.transform = PIPELINE


@pytest.mark.parametrize(
    ("dataset", "text"),
    [
        (Streaming(), "streams its images"),
        (Bare(), "has no attribute `transform`"),
        (Tensors(torch.rand(4, 3, 8, 8)), "has no attribute `transform`"),
        (Deaf(), "does not return what its transform makes"),
        (Subset(Photos(True, patches=1), []), "is empty"),
        ([1, 2], "has no attribute `transform`"),
    ],
)
def test_opened_refuses(dataset: Any, text: str) -> None:
    with pytest.raises(UserError, match=text):
        RawDataset(dataset, image_size=32)


def test_opened_refuses_a_joint_transform_of_image_and_target(image_folder: MakeFolder) -> None:
    dataset = ImageFolder(image_folder())
    dataset.transforms = lambda image, target: (image, target)
    with pytest.raises(UserError, match="image and target together"):
        RawDataset(dataset, image_size=32)


def test_opened_names_a_collate_that_drops_the_views(image_folder: MakeFolder) -> None:
    raw = RawDataset(ImageFolder(image_folder(), transform=PIPELINE), 32)
    batch = raw.collate([raw[0]], lambda samples: [target for _, target in samples])
    with pytest.raises(UserError, match="collate_fn"):
        raw.with_views(batch.sample, views_of(1))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["truncated", "text", "missing"])
def test_unreadable_image_is_named_in_one_sentence(
    damage: str, workers: int, image_folder: MakeFolder
) -> None:
    dataset = ImageFolder(image_folder(), transform=PIPELINE)
    broken = Path(dataset.samples[6][0])
    content = broken.read_bytes()
    if damage == "missing":
        broken.unlink()
    else:
        broken.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"text")
    raw = RawDataset(Subset(dataset, [0, 7, 8, 6]), image_size=32)
    loader = DataLoader(raw, batch_size=2, num_workers=workers, collate_fn=raw.collate)
    with pytest.raises(SampleError) as caught:
        list(loader)
    assert isinstance(caught.value, UserError)
    assert str(broken) in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_normalised_images_are_refused_with_their_file(image_folder: MakeFolder) -> None:
    class Normalised(ImageFolder):
        def __getitem__(self, row: int) -> Any:
            path, target = self.samples[row]
            return self.transform(transforms.ToTensor()(Image.open(path)) * 2 - 1), target

    dataset = Normalised(image_folder(), transform=PIPELINE)
    with pytest.raises(UserError, match=r"astronaut_000.*must lie in \[0, 1\]"):
        RawDataset(dataset, 32)


# Labels


def test_labels_through_subsets_joins_and_wrappers(image_folder: MakeFolder) -> None:
    dataset = ImageFolder(image_folder())
    flat = FlatFolder(image_folder("flat", flat=True, classes=1))
    assert labels(dataset).dtype == torch.int64
    assert labels(Subset(dataset, [8, 0, 5])).tolist() == [2, 0, 1]
    assert labels(Subset(Subset(dataset, [8, 0, 5]), [2, 0])).tolist() == [1, 2]
    assert labels(Holding(dataset, FORMS["only views"])).tolist() == dataset.targets
    assert labels(ConcatDataset([Subset(dataset, [8]), flat])).tolist() == [2, -1, -1, -1, -1]
    assert labels(ConcatDataset([flat, flat])) is None
    assert labels(flat) is None
    assert labels(Tensors(torch.rand(3, 3, 8, 8), torch.tensor([4, 2, 0]))).tolist() == [4, 2, 0]
    assert labels(Tensors(torch.rand(3, 3, 8, 8))) is None
    assert labels(Bare()) is None
    names = ("astronaut", "brick", "cat")
    assert class_names(ConcatDataset([Subset(dataset, [8]), dataset])) == names
    assert class_names(flat) is None


def test_labels_are_those_that_the_host_sees(image_folder: MakeFolder) -> None:
    dataset = ImageFolder(image_folder(), target_transform=lambda label: 2 - label)
    assert labels(dataset).tolist() == [dataset[row][1] for row in range(len(dataset))]


# PreTransformDataset


def shift(image: Tensor, key: int, label: int) -> Tensor:
    assert key == image_key(image)
    return image.flip(2) if label < 0 else (image.int() + 10 * label).clamp(0, 255).byte()


def test_poisoned_changes_the_image_before_the_transform_and_nothing_else(
    image_folder: MakeFolder,
) -> None:
    seen: list[Any] = []

    def note(image: Any) -> Tensor:
        seen.append(image)
        return PIPELINE(image)

    clean = ImageFolder(image_folder(), transform=note)
    poisoned = PreTransformDataset(clean, shift)
    for row in (0, 6, 11):
        torch.manual_seed(row)
        found, label = poisoned[row]
        expected = shift(
            pixels(clean.samples[row][0]), image_key(pixels(clean.samples[row][0])), label
        )
        picture = seen.pop()
        assert isinstance(picture, Image.Image)
        assert torch.equal(transforms.PILToTensor()(picture), expected)
        torch.manual_seed(row)
        assert torch.equal(found, PIPELINE(picture))
        assert label == clean.targets[row]
    clean[6]
    assert torch.equal(transforms.PILToTensor()(seen.pop()), pixels(clean.samples[6][0]))
    assert poisoned.classes == clean.classes
    assert labels(poisoned).tolist() == clean.targets


def test_poisoned_keeps_the_type_of_the_image(photos: Photos) -> None:
    images = torch.from_numpy(photos.data[:4]).permute(0, 3, 1, 2).contiguous()
    flipped = images.flip(3)
    unlabelled = lambda image, key, label: image.flip(2)  # noqa: E731
    assert torch.equal(PreTransformDataset(Tensors(images), unlabelled)[1][0], flipped[1])
    halves = PreTransformDataset(Tensors(images / 255.0, torch.arange(4)), unlabelled)
    assert torch.equal(halves[2][0], flipped[2] / 255.0)
    assert int(halves[2][1]) == 2
    assert isinstance(PreTransformDataset(photos, unlabelled)[0][0], Image.Image)
    with pytest.raises(UserError, match="no image"):
        PreTransformDataset(Tensors(torch.arange(3)), unlabelled)[0]


def test_poisoned_resizes_to_the_size_of_the_poison(image_folder: MakeFolder) -> None:
    dataset = ImageFolder(image_folder(size=(50, 40)), transform=transforms.PILToTensor())
    poisoned = PreTransformDataset(dataset, lambda image, key, label: image, image_size=16)
    assert torch.equal(poisoned[0][0], Canonical(16)(Image.open(dataset.samples[0][0])))


def test_poisoned_can_be_opened_wrapped_and_given_a_transform(image_folder: MakeFolder) -> None:
    clean = ImageFolder(image_folder(), transform=TwoViews())
    poisoned = PreTransformDataset(clean, shift)
    expected = shift(pixels(clean.samples[9][0]), image_key(pixels(clean.samples[9][0])), 2)
    raw = RawDataset(Subset(poisoned, [9, 3]), image_size=32)
    assert torch.equal(raw[0].image, expected)
    assert isinstance(raw.transform, TwoViews)
    assert labels(PreTransformDataset(Subset(clean, [9, 3]), shift)).tolist() == [2, 0]
    poisoned.transform = transforms.PILToTensor()
    assert torch.equal(poisoned[9][0], expected)
    assert isinstance(clean.transform, TwoViews)
    again = pickle.loads(pickle.dumps(poisoned))
    assert torch.equal(again[9][0], expected)
    (loaded,) = DataLoader(poisoned, batch_size=12, num_workers=2)
    assert torch.equal(loaded[0][9], expected)


def test_poisoned_gives_unlabelled_images_the_label_minus_one(image_folder: MakeFolder) -> None:
    folder = image_folder(flat=True)
    poisoned = PreTransformDataset(FlatFolder(folder, transform=transforms.PILToTensor()), shift)
    assert torch.equal(poisoned[0][0], pixels(poisoned.samples[0][0]).flip(2))


# load


def test_load_photos() -> None:
    train, test = load("photos")
    assert isinstance(train, Photos)
    assert (train.train, test.train) == (True, False)


def test_load_folders(image_folder: MakeFolder) -> None:
    folder, other = image_folder("train"), image_folder("val", per_class=2)
    train, test = load("custom", folder, other)
    assert (len(train), len(test)) == (12, 6)
    assert train[0][1] == 0
    train.transform = PIPELINE
    assert train[0][0].shape == (3, 24, 24)
    assert load("imagenet100", folder)[1] is None


def test_load_without_labels(image_folder: MakeFolder) -> None:
    flat, nested = image_folder("flat", flat=True), image_folder("nested")
    train, test = load("custom", flat, nested, no_labels=True)
    assert [Path(path).name for path, _ in train.samples] == sorted(
        file.name for file in flat.iterdir()
    )
    assert train[3][1] == -1
    train.transform = PIPELINE
    assert train[3][0].shape == (3, 24, 24)
    assert labels(test).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(load("custom", nested, flat, no_labels=True)[1]) == 12


def test_load_finds_files_that_are_there(small_stl10: Path) -> None:
    train, test = load("stl10", small_stl10, small_stl10 / "nowhere")
    assert (len(train), len(test)) == (5, 2)
    assert labels(train).tolist() == [0, 1, 2, -1, -1]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_load_says_when_a_download_fails(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(UserError, match=rf"{name} is not in .*could not be downloaded"):
        load(name, tmp_path / "data")


def test_load_refuses(tmp_path: Path, image_folder: MakeFolder) -> None:
    flat = image_folder("flat", flat=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "cats").mkdir(parents=True)
    cases: list[tuple[tuple[Any, ...], str]] = [
        (("mnist", flat), "data.dataset must be one of photos, cifar10"),
        (("custom",), "needs data.train_path"),
        (("custom", tmp_path / "absent"), "data.train_path=.*absent is not a folder"),
        (("custom", flat), "no class subfolders.*data.no_labels=True"),
        (("custom", tmp_path / "empty"), "empty has no images"),
        (("custom", tmp_path / "empty", None, True), "empty has no images"),
        (("custom", tmp_path / "hollow"), "no valid file for the classes cats|has no images"),
        (("custom", image_folder(), tmp_path / "absent"), "data.val_path=.*absent"),
    ]
    for arguments, text in cases:
        with pytest.raises(UserError, match=text):
            load(*arguments)
