"""The poison file: what is written is read back, and what cannot be right is refused."""

import pytest
import torch

from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.settings import UserError

SHAPE = (3, 8, 8)


def perturbation(rows=4, eps=8 / 255, dtype="float32"):
    return Perturbation.uniform(rows, SHAPE, eps, dtype, torch.Generator().manual_seed(1))


def sample_poison(**kwargs):
    return Poison(perturbation(**kwargs), "sample", keys=torch.tensor([11, -22, 33, 44]))


def class_poison():
    return Poison(perturbation(3), "class", classes=("cat", "dog", "ship"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_sample_poison_is_read_as_it_was_written(tmp_path, dtype):
    poison = Poison(
        perturbation(dtype=dtype), "sample", torch.tensor([1, 2, 3, 4]), info={"a": "b"}
    )
    loaded = Poison.load(poison.save(tmp_path / "p.safetensors"))
    assert torch.equal(loaded.perturbation.stored, poison.perturbation.stored)
    assert torch.equal(loaded.keys, poison.keys)
    assert (loaded.eps, loaded.granularity, loaded.info) == (poison.eps, "sample", {"a": "b"})


def test_a_class_poison_is_read_as_it_was_written(tmp_path):
    loaded = Poison.load(class_poison().save(tmp_path / "p.safetensors"))
    assert loaded.classes == ("cat", "dog", "ship")
    assert loaded.keys is None


def test_rows_are_found_by_key_and_by_class_name():
    assert sample_poison().rows(keys=[44, 7, -22]).tolist() == [3, -1, 1]
    assert class_poison().rows(classes=["ship", None, "cat"]).tolist() == [2, -1, 0]


@pytest.mark.parametrize(("eps", "levels"), [(8 / 255, 8), (0.03, 7), (2 / 255, 2)])
def test_no_pixel_is_off_by_more_than_the_budget_in_levels(eps, levels):
    poison = sample_poison(eps=eps)
    clean = torch.randint(0, 256, (4, *SHAPE), dtype=torch.uint8)
    off = poison.apply(clean, torch.arange(4)).short() - clean.short()
    assert off.abs().max() == levels


def test_apply_adds_rounded_delta_and_stays_8_bit():
    poison = sample_poison()
    clean = torch.tensor([0, 3, 128, 255], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, *SHAPE)
    changed = poison.apply(clean, torch.tensor([0, 1, -1, 2]))
    delta = poison.perturbation.stored[torch.tensor([0, 1, 0, 2])]
    expected = (clean.double() + (255 * delta.double()).round()).clamp(0, 255).byte()
    expected[2] = 128
    assert torch.equal(changed, expected)


def test_a_truncated_file_is_refused(tmp_path):
    path = sample_poison().save(tmp_path / "p.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged or truncated"):
        Poison.load(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no poison file at"):
        Poison.load(tmp_path / "absent.safetensors")


def test_an_existing_poison_is_never_overwritten(tmp_path):
    sample_poison().save(tmp_path / "p.safetensors")
    with pytest.raises(UserError, match="never overwritten"):
        sample_poison().save(tmp_path / "p.safetensors")


def test_another_kind_of_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no poison of format 1"):
        Poison.load(tmp_path / "model.safetensors")


def test_a_file_beyond_its_own_budget_is_refused(tmp_path):
    from safetensors.torch import save_file

    metadata = {"format": "1", "granularity": "class", "eps": "0.01", "classes": '["a"]'}
    save_file({"delta": torch.full((1, *SHAPE), 0.02)}, tmp_path / "p.safetensors", metadata)
    with pytest.raises(UserError, match=r"at most 0\.01000 a pixel, got 0\.02000"):
        Poison.load(tmp_path / "p.safetensors")


def test_other_classes_are_refused():
    poison = class_poison()
    poison.check_classes(["cat", "dog", "ship"])
    poison.check_classes(["ship", "cat"])  # by name, in any order
    refused = r"made for 3 classes \(cat, dog, ship\).* has 2 \(cat, bird\).* no delta for bird"
    with pytest.raises(UserError, match=refused):
        poison.check_classes(["cat", "bird"])
    with pytest.raises(UserError, match="needs labelled images"):
        poison.check_classes(None)


def test_images_of_another_size_are_refused():
    with pytest.raises(UserError, match=r"expected uint8 images of shape \(3, 8, 8\)"):
        sample_poison().apply(torch.zeros(1, 3, 9, 9, dtype=torch.uint8), torch.tensor([0]))


def test_keys_must_be_as_many_as_rows():
    with pytest.raises(UserError, match="expected 4 keys"):
        Poison(perturbation(), "sample", keys=torch.tensor([1]))


def test_largest_change():
    assert sample_poison().perturbation.largest() == pytest.approx(8 / 255, rel=0.01)
