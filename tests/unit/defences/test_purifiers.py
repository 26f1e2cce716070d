"""The denoiser and the diffusion purifier, each against a computation of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import transforms

from cp_plugin.config.defences import PurifyConfig, defence_settings
from cp_plugin.config.settings import UserError
from cp_plugin.data import Photos, image_key
from cp_plugin.defences import Denoiser, DiffusionPurifier, Purified, defended
from cp_plugin.defences.denoiser import train

EPS = 8


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Twelve photographs, a few patches each, uint8 (N, 3, 32, 32)."""
    return torch.from_numpy(Photos(train=True, patches=8).data).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def denoiser(images: Tensor) -> Denoiser:
    config = PurifyConfig(images="-", steps=250, batch_size=32, depth=4, width=24, lr=3e-3)
    return train(list(images), config, "cpu", 0)


def error(images: Tensor, clean: Tensor) -> float:
    return float((images.float() - clean.float()).square().mean())


def test_a_trained_denoiser_takes_noise_off_images_it_has_not_seen(denoiser: Denoiser) -> None:
    """Noise of 16/255, and noise in [-8/255, 8/255] as poisons are, on the test patches."""
    clean = torch.from_numpy(Photos(train=False, patches=4).data).permute(0, 3, 1, 2)
    draws = torch.Generator().manual_seed(0)
    gaussian = 16 * torch.randn(clean.shape, generator=draws)
    signs = EPS * torch.randn(clean.shape, generator=draws).sign()
    for noise, most in ((gaussian, 0.5), (signs, 0.8)):
        noisy = (clean + noise).round().clamp(0, 255).to(torch.uint8)
        assert error(denoiser(noisy), clean) < most * error(noisy, clean)
    assert error(denoiser(clean), clean) < 16


def test_a_denoiser_subtracts_what_its_convolutions_find(denoiser: Denoiser) -> None:
    """Against loops over layers and pixels in numpy."""
    image = np.random.default_rng(0).integers(0, 256, (3, 6, 7), dtype=np.uint8)
    values = image / 255.0
    for layer in denoiser.noise:
        if isinstance(layer, nn.Conv2d):
            weight = layer.weight.detach().double().numpy()
            padded = np.pad(values, ((0, 0), (1, 1), (1, 1)))
            made = np.zeros((len(weight), 6, 7))
            for y in range(6):
                for x in range(7):
                    window = padded[:, y : y + 3, x : x + 3]
                    made[:, y, x] = (weight * window).sum((1, 2, 3))
            if layer.bias is not None:
                made += layer.bias.detach().double().numpy()[:, None, None]
            values = made
        elif isinstance(layer, nn.BatchNorm2d):
            mean, variance, scale, shift = (
                t.detach().double().numpy()[:, None, None]
                for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
            )
            values = (values - mean) / np.sqrt(variance + layer.eps) * scale + shift
        else:
            values = np.maximum(values, 0)
    expected = np.clip(np.round(255 * (image / 255.0 - values / 16)), 0, 255)
    found = denoiser(torch.from_numpy(image)).numpy()
    assert np.abs(found - expected).max() <= 1  # halves
    assert (found != image).any()


def test_a_denoiser_is_trained_the_same_again_and_kept_in_a_file(
    images: Tensor, tmp_path: Path
) -> None:
    config = PurifyConfig(images="-", steps=3, batch_size=4, depth=3, width=8)
    made, again = (train(list(images[:9]), config, "cpu", 5) for _ in range(2))
    read = Denoiser.read(made.save(tmp_path / "denoiser.safetensors"))
    for one in (again, read):
        assert torch.equal(one(images[:4]), made(images[:4]))
    assert (read.depth, read.width, read.training) == (3, 8, False)
    other = train(list(images[:9]), config, "cpu", 6)
    assert not torch.equal(other(images[:4]), made(images[:4]))


def test_a_data_set_is_purified_before_its_transform(
    images: Tensor, denoiser: Denoiser, tmp_path: Path
) -> None:
    path = denoiser.save(tmp_path / "denoiser.safetensors")
    data = Photos(train=True, patches=8, transform=transforms.PILToTensor())
    dataset = defended(data, "purify", path=str(path))
    expected = denoiser(images)
    for row in (0, 5, 40):
        assert torch.equal(dataset[row][0], expected[row])
        assert not torch.equal(dataset[row][0], data[row][0])


def test_a_denoiser_is_trained_on_a_folder_of_clean_images(images: Tensor, tmp_path: Path) -> None:
    """Of any size, smaller ones too."""
    folder = tmp_path / "clean"
    folder.mkdir()
    for number, image in enumerate(images[:6]):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        picture.resize((20, 40) if number == 2 else (32, 32)).save(folder / f"{number}.png")
    kept = tmp_path / "kept.safetensors"
    settings: dict[str, Any] = {"steps": 2, "batch_size": 8, "depth": 2, "width": 4, "seed": 1}
    data = Photos(train=True, patches=1, transform=transforms.PILToTensor())
    dataset = defended(data, "purify", images=str(folder), save=str(kept), **settings)
    again = defended(data, "purify", path=str(kept))
    assert torch.equal(dataset[3][0], again[3][0])
    other = defended(data, "purify", **settings)  # of the embedded photographs
    assert not torch.equal(other[3][0], again[3][0])


def test_any_module_that_purifies_will_do() -> None:
    class Inverted(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return 255 - images

    data = Photos(train=True, patches=1)
    purified = Purified(data, Inverted())
    image = torch.from_numpy(data.data[2]).permute(2, 0, 1)
    assert torch.equal(purified(image, image_key(image), 0), 255 - image)


@pytest.mark.parametrize(
    ("name", "values", "text"),
    [
        ("purify", {"path": "a", "images": "b"}, r"defence\.images is for one that is trained"),
        ("purify", {"path": "a", "save": "b"}, r"defence\.save is for one that is trained"),
        ("purify", {"images": "a", "depth": 1}, r"defence\.depth must lie in \[2, 100\]; got 1"),
        ("diffusion", {}, r"defence\.path is missing"),
        ("diffusion", {"path": "a", "steps": 0}, r"defence\.steps must lie in \[1, 100000\]"),
    ],
)
def test_mistakes_in_settings(name: str, values: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        defence_settings(name, values)


def test_files_that_are_no_denoisers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no denoiser at"):
        Denoiser.read(tmp_path / "absent.safetensors")
    other = tmp_path / "other.safetensors"
    save_file({"delta": torch.zeros(3)}, other)
    with pytest.raises(UserError, match=r"no denoiser of cp-plugin, or it is damaged \(its format"):
        Denoiser.read(other)
    promised = {"format": "cp-plugin denoiser 1", "depth": "1024", "width": "1024"}
    save_file(Denoiser(3, 4).state_dict(), other, promised)
    with pytest.raises(UserError, match="has not the weights of 1024 layers, 1024 channels"):
        Denoiser.read(other)
    whole = Denoiser(3, 4).save(tmp_path / "whole.safetensors").read_bytes()
    other.write_bytes(whole[:-20])
    with pytest.raises(UserError, match="or it is damaged"):
        Denoiser.read(other)


@pytest.fixture
def pipeline() -> Any:
    """A tiny diffusion model of random weights."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=50, clip_sample=False)
    return diffusers.DDPMPipeline(unet=network, scheduler=scheduler)


@pytest.mark.filterwarnings("ignore")  # those of diffusers itself
def test_a_diffusion_purifier_is_the_formulas_of_ddpm(pipeline: Any, tmp_path: Path) -> None:
    """Ho et al., NeurIPS 2020: q(x_t | x_0), then algorithm 2 from t on, step by step."""
    pipeline.save_pretrained(tmp_path / "ddpm")
    data = Photos(train=True, patches=1, transform=transforms.PILToTensor())
    dataset = defended(data, "diffusion", path=str(tmp_path / "ddpm"), steps=4, seed=3)
    clean = torch.from_numpy(data.data).permute(0, 3, 1, 2)
    draws = torch.Generator().manual_seed(3)
    beta = torch.linspace(1e-4, 0.02, 50)
    kept = (1 - beta).cumprod(0)
    x = clean.float() / 127.5 - 1
    noise = torch.randn(x.shape, generator=draws)
    x = kept[3].sqrt() * x + (1 - kept[3]).sqrt() * noise
    with torch.no_grad():
        for t in (3, 2, 1, 0):
            predicted = pipeline.unet(x, t).sample
            before = kept[t - 1] if t else torch.ones(())
            mean = (x - beta[t] / (1 - kept[t]).sqrt() * predicted) / (1 - beta[t]).sqrt()
            spread = (beta[t] * (1 - before) / (1 - kept[t])).sqrt()
            x = mean + spread * torch.randn(x.shape, generator=draws) if t else mean
    expected = ((x + 1) * 127.5).round().clamp(0, 255)
    found = torch.stack([dataset[row][0] for row in range(len(data))]).float()
    assert (found - expected).abs().max() <= 1  # halves
    assert (found != clean).float().mean() > 0.5


@pytest.mark.filterwarnings("ignore")
def test_mistakes_with_diffusion_models(pipeline: Any, tmp_path: Path) -> None:
    data = Photos(train=True, patches=1, transform=transforms.PILToTensor())
    with pytest.raises(UserError, match="there is no folder"):
        defended(data, "diffusion", path=str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is no DDPM pipeline of diffusers"):
        defended(data, "diffusion", path=str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"defence\.steps is 100, and .* trained with 50"):
        DiffusionPurifier(pipeline.unet, pipeline.scheduler, 100, 0)


def test_diffusion_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    data = Photos(train=True, patches=1)
    with pytest.raises(UserError, match=r"needs diffusers, .*pip install 'cp-plugin\[diffusion\]'"):
        defended(data, "diffusion", path="anywhere")
