"""Images read once: the same batches as from a data set that is read at every step."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from cp_plugin.config.settings import UserError, cache_mode
from cp_plugin.data import RawDataset, SampleError, read_once
from cp_plugin.data.loading import raw_loader
from tests.support.small_runs import TWO_CROPS, Pictures


class Counting(Pictures):
    """Counts how often it is read."""

    reads = 0

    def __getitem__(self, row):
        type(self).reads += 1
        return super().__getitem__(row)


def batches(dataset, mode, workers=0, epochs=2):
    raw = RawDataset(dataset, 16)
    torch.manual_seed(3)
    loader = DataLoader(dataset, 4, shuffle=True, num_workers=workers)
    read_once.read_once(raw, mode, loader)
    own = raw_loader(loader, raw)
    return raw, [batch for _ in range(epochs) for batch in own]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_images_that_are_read_each_time(workers):
    dataset = Pictures(TWO_CROPS, 18)
    _, expected = batches(dataset, "false")
    raw, found = batches(dataset, "true", workers)
    assert raw.cache is not None
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.rows, other.rows)
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.sample[1], other.sample[1])


def test_each_image_is_read_once_however_many_epochs_there_are():
    dataset = Counting(TWO_CROPS, 64)
    Counting.reads = 0
    _, found = batches(dataset, "auto", epochs=5)
    assert len(found) == 80
    assert Counting.reads < 2 * len(dataset)  # once, and a few to see whether they change
    Counting.reads = 0
    batches(dataset, "false", epochs=5)
    assert Counting.reads >= 5 * len(dataset)


class Flipping(Pictures):
    """Augments outside its transform."""

    def __getitem__(self, row):
        image = Image.fromarray(self.images[row])
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self.transform(image), self.targets[row]


class OwnGenerator(Pictures):
    """Has a generator, whether it draws from it or not."""

    def __init__(self, transform):
        super().__init__(transform)
        self.rng = np.random.default_rng(0)


class RarelyOther(Pictures):
    """Draws a number that changes the pixels hardly ever, from a global generator."""

    def __getitem__(self, row):
        np.random.rand()
        return super().__getitem__(row)


class Counter(Pictures):
    """Returns how often it was read."""

    count = 0

    def __getitem__(self, row):
        self.count += 1
        return *super().__getitem__(row), self.count


@pytest.mark.parametrize("kind", [Flipping, OwnGenerator, RarelyOther, Counter])
def test_what_changes_from_reading_to_reading_is_read_each_time(kind, caplog):
    caplog.set_level(logging.INFO, "cp_plugin")
    raw = RawDataset(kind(TWO_CROPS), 16)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    read_once.read_once(raw, "true")
    assert raw.cache is None
    assert "read at every step, since" in caplog.text
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


class Broken(Pictures):
    """Has an image that cannot be read, in a place that no one looks at first."""

    def __getitem__(self, row):
        if row == 13:
            raise OSError("truncated")
        return super().__getitem__(row)


def test_an_image_that_cannot_be_read_is_an_error_where_a_batch_brings_it(caplog):
    caplog.set_level(logging.INFO, "cp_plugin")
    raw = RawDataset(Broken(TWO_CROPS, 40), 16)
    read_once.read_once(raw, "auto")
    assert raw.cache is None
    assert "truncated" in caplog.text
    raw.collate([raw[row] for row in range(8)])
    with pytest.raises(SampleError, match="truncated"):
        raw[13]


def test_images_of_several_sizes_are_read_each_time():
    class Sizes(Pictures):
        def __getitem__(self, row):
            side = 16 + row % 2
            return self.transform(Image.new("RGB", (side, side))), 0

    raw = RawDataset(Sizes(TWO_CROPS), None)
    read_once.read_once(raw, "true")
    assert raw.cache is None


class Sparse(Dataset):
    """As many photographs as ImageNet has, made when they are asked for."""

    def __init__(self):
        self.transform = transforms.ToTensor()

    def __len__(self):
        return 1_281_167

    def __getitem__(self, row):
        return self.transform(Image.new("RGB", (224, 224), (row % 256, 0, 0))), row % 1000


def test_a_set_as_large_as_imagenet_is_not_kept_and_the_log_says_so(caplog):
    caplog.set_level(logging.INFO, "cp_plugin")
    raw = RawDataset(Sparse(), 224)
    read_once.read_once(raw, "auto")
    assert raw.cache is None
    assert "1,281,167 of 224 x 224 pixels, 192.9 GB, more than a quarter" in caplog.text
    assert raw[7].image[0, 0, 0] == 7


def test_what_is_kept_is_named_with_its_bytes(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "cp_plugin")
    raw = RawDataset(Pictures(TWO_CROPS, 20), 16)
    read_once.read_once(raw, "auto")
    assert "kept in memory: 20 of 16 x 16 pixels, 0.0 MB (data.cache)" in caplog.text
    assert raw.cache.nbytes == 20 * (3 * 16 * 16 + 8)
    raw = RawDataset(Pictures(TWO_CROPS, 20), 16)
    monkeypatch.setattr(read_once, "available_bytes", lambda: 4 * raw[0].image.nbytes)
    read_once.read_once(raw, "auto")
    assert raw.cache is None
    read_once.read_once(raw, "true")
    assert raw.cache is not None


def test_a_collate_that_changes_its_samples_finds_them_whole_the_next_time():
    class Named(Pictures):
        def __getitem__(self, row):
            views, target = super().__getitem__(row)
            return {"views": views, "target": target}

    def collate(samples):
        return {"views": [s["views"] for s in samples], "t": [s.pop("target") for s in samples]}

    raw = RawDataset(Named(TWO_CROPS), 16)
    read_once.read_once(raw, "true")
    for _ in range(2):
        assert raw.collate(raw.__getitems__([1, 2]), collate).sample["t"] == [1, 0]


@pytest.mark.parametrize(
    ("value", "mode"), [(True, "true"), ("False", "false"), ("auto", "auto"), (False, "false")]
)
def test_the_setting_is_read_as_yaml_and_python_have_it(value, mode):
    assert cache_mode(value) == mode


def test_another_word_is_refused():
    with pytest.raises(UserError, match=r"data\.cache must be auto, true or false; got 'yes'"):
        cache_mode("yes")
