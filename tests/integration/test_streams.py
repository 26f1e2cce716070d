"""Poisons injected into streams: PyTorch's, Hugging Face's, webdataset's, and of one's own."""

from __future__ import annotations

import gc
import itertools
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision import transforms

from cp_plugin import InjectPoison, Poison
from cp_plugin.attack.inject import inject
from cp_plugin.attack.noise import sample_noise
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.callbacks import MirrorViews
from cp_plugin.callbacks.inject import NoisePoison
from cp_plugin.config.baselines import RandomConfig, SyntheticConfig
from cp_plugin.config.settings import UserError
from cp_plugin.data import image_key

SIDE, CLASSES = 8, 3
TO_TENSOR = transforms.PILToTensor()


def pixels(number: int) -> np.ndarray[Any, Any]:
    """Image of a number, made anew whenever it is asked for."""
    drawn = np.random.default_rng(number).integers(40, 200, (SIDE, SIDE, 3), dtype=np.uint8)
    return np.asarray(drawn)


def sample_poison(count: int = 12, fraction: float = 1.0) -> Poison:
    keys = [image_key(torch.from_numpy(pixels(n)).permute(2, 0, 1)) for n in range(count)]
    rows = torch.stack([torch.full((3, SIDE, SIDE), (n % 7 + 1) / 255) for n in range(count)])
    info = {"fraction": str(fraction)} if fraction < 1 else {}
    return Poison(Perturbation(rows, 8 / 255), "sample", torch.tensor(keys), None, info)


def class_poison() -> Poison:
    rows = torch.stack([torch.full((3, SIDE, SIDE), (n + 1) / 255) for n in range(CLASSES)])
    return Poison(Perturbation(rows, 8 / 255), "class", None, ("0", "1", "2"))


class Stream(IterableDataset[Any]):
    """Makes images on the fly, and their views, as users' streams do."""

    def __init__(self, transform: Any, count: int = 12, form: str = "tuple") -> None:
        self.transform, self.count, self.form = transform, count, form

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.count):
            view = self.transform(Image.fromarray(pixels(number)))
            yield (
                (view, number % CLASSES)
                if self.form == "tuple"
                else {"image": view, "label": number % CLASSES, "name": f"{number}.png"}
            )


class Untransformed(IterableDataset[Any]):
    """Gives raw images; whoever reads it augments them."""

    def __iter__(self) -> Iterator[Any]:
        for number in range(12):
            yield {"jpg": Image.fromarray(pixels(number)), "cls": number % CLASSES}


class Generator:
    """No class of any library, only an iterable."""

    def __iter__(self) -> Iterator[Any]:
        for number in range(12):
            yield Image.fromarray(pixels(number)), number % CLASSES


def hugging_face() -> Any:
    datasets = pytest.importorskip("datasets")

    def examples() -> Iterator[Any]:
        for number in range(12):
            yield {"image": Image.fromarray(pixels(number)), "label": number % CLASSES}

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["0", "1", "2"])}
    )
    return datasets.IterableDataset.from_generator(examples, features=features)


def tar_files(tmp_path: Any) -> Any:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "images.tar")) as tar:
        for number in range(12):
            tar.write({"__key__": str(number), "png": pixels(number), "cls": number % CLASSES})
    path = str(tmp_path / "images.tar")
    return webdataset.WebDataset(path, shardshuffle=False).decode("pil").to_tuple("png", "cls")


def first_image(sample: Any) -> Tensor:
    values = list(sample.values()) if isinstance(sample, dict) else list(sample)
    (image,) = [value for value in values if isinstance(value, (Image.Image, Tensor))]
    return TO_TENSOR(image) if isinstance(image, Image.Image) else image


STREAMS: dict[str, Callable[[Any], Any]] = {
    "with a transform": lambda _: Stream(TO_TENSOR),
    "dictionaries": lambda _: Stream(TO_TENSOR, form="dictionary"),
    "raw images": lambda _: Untransformed(),
    "any iterable": lambda _: Generator(),
    "Hugging Face": lambda _: hugging_face(),
    "webdataset": tar_files,
}


# webdataset leaves a file open that was not read to its end.
@pytest.mark.filterwarnings("ignore:Exception ignored in.*images.tar")
@pytest.mark.parametrize("kind", ["sample", "class"])
@pytest.mark.parametrize("name", STREAMS)
def test_each_image_carries_its_own_perturbation(name: str, kind: str, tmp_path: Any) -> None:
    stream = STREAMS[name](tmp_path)
    victim = inject(stream, sample_poison() if kind == "sample" else class_poison())
    samples = list(victim)
    assert len(samples) == 12
    for number, sample in enumerate(samples):
        level = (number if kind == "sample" else number % CLASSES) % 7 + 1
        change = first_image(sample).int() - torch.from_numpy(pixels(number)).permute(2, 0, 1)
        assert change.unique().tolist() == [level]
    clean = next(iter(stream))
    assert torch.equal(first_image(clean), torch.from_numpy(pixels(0)).permute(2, 0, 1))


def test_the_transform_sees_the_poisoned_image() -> None:
    augment = transforms.Compose([transforms.RandomHorizontalFlip(p=1), transforms.ToTensor()])
    for poison in (sample_poison(), class_poison()):
        view, _ = next(iter(inject(Stream(augment), poison)))
        expected = torch.from_numpy(pixels(0) + 1).permute(2, 0, 1).flip(-1) / 255
        torch.testing.assert_close(view, expected)


def test_a_loader_with_workers() -> None:
    loader = DataLoader(inject(Stream(TO_TENSOR), class_poison()), batch_size=4, num_workers=1)
    images, labels = next(iter(loader))
    clean = torch.stack([torch.from_numpy(pixels(n)).permute(2, 0, 1) for n in range(4)])
    assert ((images.int() - clean).flatten(1)[:, 0] - labels).tolist() == [1] * 4


def test_memory_does_not_grow_with_the_stream() -> None:
    victim = iter(inject(Stream(TO_TENSOR, count=1_000_000), class_poison()))

    def held_after(count: int) -> int:
        for _ in itertools.islice(victim, count):
            pass
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        held = [held_after(count) for count in (500, 1000, 1000, 1000)]
    finally:
        tracemalloc.stop()
    # Other parts of the process allocate once in a while; what the stream keeps grows every time.
    grown = min(later - before for before, later in itertools.pairwise(held))
    assert grown < 50_000, held  # 1,000 images are 192,000 bytes


def test_images_of_others_are_refused_as_they_come() -> None:
    with pytest.raises(UserError, match="no row for this image"):
        list(inject(Stream(TO_TENSOR, count=13), sample_poison()))
    poison = sample_poison(fraction=0.5)

    class Others(Generator):
        def __iter__(self) -> Iterator[Any]:
            for number in range(1000, 1300):
                yield Image.fromarray(pixels(number)), 0

    with pytest.raises(UserError, match="other images"):
        list(inject(Others(), poison))


def test_what_a_stream_cannot_do_is_said() -> None:
    with pytest.raises(UserError, match=r"fraction=0\.5 picks images among all"):
        inject(Stream(TO_TENSOR), sample_poison(), 0.5)
    victim = inject(Stream(TO_TENSOR), sample_poison())
    with pytest.raises(UserError, match="carry a sample poison already"):
        inject(victim, sample_poison())
    with pytest.raises(AttributeError, match="has no 'map'"):
        _ = inject(hugging_face(), sample_poison()).map
    named = Poison(class_poison().perturbation, "class", None, ("cat", "dog", "owl"))
    with pytest.raises(UserError, match="has no labels"):
        inject(Stream(TO_TENSOR), named)
    twice = transforms.Lambda(lambda image: [TO_TENSOR(image)] * 2)
    with pytest.raises(UserError, match="2 images a sample and has no `transform`"):
        list(inject((([s[0], s[0]], s[1]) for s in Generator()), sample_poison()))
    views, _ = next(iter(inject(Stream(twice), class_poison())))
    assert len(views) == 2


class Seen(LightningModule):
    """Keeps what it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.images = nn.Linear(3 * SIDE * SIDE, 2), []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.images += list(batch[0])
        return self.net(batch[0].float().flatten(1)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*logging interval.*")
@pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*")
def test_a_victim_is_trained_on_a_stream(tmp_path: Any) -> None:
    module, loader = Seen(), DataLoader(Stream(TO_TENSOR), batch_size=4)
    trainer = Trainer(
        **{"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_progress_bar": False},
        **{"enable_checkpointing": False, "enable_model_summary": False},
        callbacks=[InjectPoison(sample_poison())],
    )
    trainer.fit(module, loader)
    levels = [
        int((image.int() - torch.from_numpy(pixels(number)).permute(2, 0, 1)).unique())
        for number, image in enumerate(module.images)
    ]
    assert levels == [number % 7 + 1 for number in range(12)]
    assert isinstance(loader.dataset, Stream)


def trained(callbacks: list[Any], stream: Any, workers: int = 0) -> Seen:
    module = Seen()
    loader = DataLoader(stream, batch_size=4, num_workers=workers)
    trainer = Trainer(
        **{"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_progress_bar": False},
        **{"enable_checkpointing": False, "enable_model_summary": False},
        callbacks=callbacks,
    )
    trainer.fit(module, loader)
    assert loader.dataset is stream
    return module


class Rows(Dataset[Any]):
    """The images of a stream as a map-style data set."""

    def __init__(self, stream: Stream) -> None:
        self.transform, self.classes = stream.transform, ["0", "1", "2"]
        self.targets = [number % CLASSES for number in range(stream.count)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> Any:
        return self.transform(Image.fromarray(pixels(row))), self.targets[row]


TRAINING = [
    "ignore:.*does not have many workers.*",
    "ignore:.*logging interval.*",
    "ignore:.*`isinstance.treespec, LeafSpec.*",
]
NOISES = {
    "random": RandomConfig(granularity="sample", seed=1),
    "random, Gaussian": RandomConfig(granularity="sample", distribution="gaussian", seed=1),
    "random, a class": RandomConfig(granularity="class", seed=1),
    "random, half of it": RandomConfig(granularity="class", fraction=0.5, seed=1),
    "synthetic": SyntheticConfig(granularity="class", patch=2, seed=1),
    "synthetic, a sample": SyntheticConfig(granularity="sample", patch=2, seed=1),
}


@pytest.mark.filterwarnings(*TRAINING)
@pytest.mark.parametrize("name", NOISES)
def test_noise_on_a_stream_is_that_of_the_same_images_in_rows(name: str, tmp_path: Any) -> None:
    stream = Stream(TO_TENSOR)
    stream.classes = ["0", "1", "2"]
    of_stream = trained([NoisePoison(NOISES[name], tmp_path / "stream")], stream)
    of_rows = trained([NoisePoison(NOISES[name], tmp_path / "rows")], Rows(stream))
    assert torch.equal(torch.stack(of_stream.images), torch.stack(of_rows.images))
    first, second = (
        Poison.load(tmp_path / kind / "poison.safetensors") for kind in ("stream", "rows")
    )
    every = torch.arange(len(first.perturbation))
    assert torch.equal(first.perturbation.gather(every), second.perturbation.gather(every))
    assert (first.classes, first.info) == (second.classes, second.info)


def test_classes_of_a_stream_must_be_named_for_noise() -> None:
    with pytest.raises(UserError, match="does not name its classes"):
        sample_noise(Stream(TO_TENSOR), None, RandomConfig(granularity="class"), 0)


def test_classwise_noise_reads_only_the_beginning_of_a_stream() -> None:
    stream = Stream(TO_TENSOR, count=10**9)
    stream.classes = ["0", "1", "2"]
    poison = sample_noise(stream, None, RandomConfig(granularity="class"), 0)
    assert len(poison.perturbation) == 3


AUGMENT = transforms.Compose(
    [transforms.RandomResizedCrop(SIDE), transforms.RandomHorizontalFlip(), TO_TENSOR]
)


@pytest.mark.filterwarnings(*TRAINING)
@pytest.mark.parametrize("poisoned", [False, True])
def test_views_of_a_stream_are_mirrored_like_those_of_rows(poisoned: bool) -> None:
    def callbacks() -> list[Any]:
        return [*([InjectPoison(class_poison())] if poisoned else []), MirrorViews()]

    seed_everything(3)
    of_stream = trained(callbacks(), Stream(AUGMENT))
    seed_everything(3)
    of_rows = trained(callbacks(), Rows(Stream(AUGMENT)))
    assert torch.equal(torch.stack(of_stream.images), torch.stack(of_rows.images))
