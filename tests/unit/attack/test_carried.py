"""Images that carry a poison of classes already are known by their pixels."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from torchvision.transforms import Compose, PILToTensor, RandomHorizontalFlip

from cp_plugin.attack.carried import Known
from cp_plugin.attack.inject import inject
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.settings import UserError
from cp_plugin.data import Canonical, Photos
from cp_plugin.data.fit import at_size, keeping_grey

EPS = 8 / 255


def photos(transform=None):
    return Photos(train=True, patches=8, transform=transform or PILToTensor())


def class_noise(names, side=32):
    generator = torch.Generator().manual_seed(5)
    delta = EPS * torch.empty(len(names), 3, side, side).uniform_(-1, 1, generator=generator).sign()
    return Poison(Perturbation(delta, EPS), "class", None, tuple(names))


def exported(data, poison, change=lambda image: image):
    """The same data set, its images as an export of a poison has them."""
    poisoned = inject(data, poison)
    same = photos(data.transform)
    same.data = np.stack(
        [
            np.asarray(change(Image.fromarray(poisoned[row][0].permute(1, 2, 0).numpy())))
            for row in range(len(data))
        ]
    )
    return same


def through_jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, subsampling=0)
    return Image.open(file).convert("RGB")


@pytest.mark.parametrize("change", [lambda image: image, through_jpeg], ids=["png", "jpeg"])
def test_a_class_poison_is_not_added_to_its_own_export(change):
    data = photos()
    poison = class_noise(data.classes)
    twice = exported(data, poison, change)
    for dataset in (twice, Subset(twice, range(0, len(twice), 3)), ConcatDataset([twice])):
        with pytest.raises(UserError, match="carry this poison already"):
            inject(dataset, poison)


def test_so_it_is_with_a_data_set_without_a_transform_and_with_one_class():
    data = photos()
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2)
    zeros = torch.zeros(len(images), dtype=torch.int64)
    poison = class_noise(["0"])
    levels = (255 * poison.perturbation.gather(torch.tensor([0]))).round()
    poisoned = (images + levels).clamp(0, 255).to(torch.uint8)
    assert len(inject(TensorDataset(images, zeros), poison)) == len(images)
    with pytest.raises(UserError, match="carry this poison already"):
        inject(TensorDataset(poisoned, zeros), poison)


def test_clean_images_and_other_poisons_are_taken():
    data = photos(Compose([RandomHorizontalFlip(), PILToTensor()]))
    poison = class_noise(data.classes)
    inject(data, poison)
    other = Poison(Perturbation(-poison.perturbation.stored, EPS), "class", None, data.classes)
    inject(exported(photos(), other), poison)


@pytest.mark.parametrize("grey", [False, True], ids=["colour", "grey"])
@pytest.mark.parametrize("size", [(120, 200), (480, 640)])
def test_a_picture_of_any_size_shows_that_it_was_protected(size, grey):
    grid = class_noise(["0", "1", "2"], 64).perturbation.stored
    image = Image.fromarray(photos().data[7]).resize(size[::-1])
    whole = torch.from_numpy(np.array(image.convert("L").convert("RGB") if grey else image))
    whole = whole.permute(2, 0, 1)[None]
    delta = at_size(keeping_grey(grid[1:2], whole), size)
    protected = (whole + (255 * delta).round()).clamp(0, 255).to(torch.uint8)
    squeezed = Canonical(64, "cover")
    known = Known(grid)
    assert not known.carried_by(squeezed(whole[0]))
    assert known.carried_by(squeezed(protected[0]))
