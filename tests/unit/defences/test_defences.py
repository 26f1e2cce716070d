"""The defences as functions, transforms and wrappers, against numpy, scipy and Opacus."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn
from torch.nn import functional
from torchvision import transforms

from cp_plugin.config.defences import (
    DEFENCES,
    AdversarialConfig,
    CutmixConfig,
    DpSgdConfig,
    MatrixCompletionConfig,
    MixupConfig,
    check_defence,
    defence_settings,
)
from cp_plugin.config.selection import Selection
from cp_plugin.config.settings import UserError
from cp_plugin.data import Photos
from cp_plugin.defences import (
    Cutout,
    GaussianNoise,
    Mixing,
    Pixels,
    Private,
    Smoothing,
    adversarial_views,
    complete,
    complete_images,
    defended,
    soft_threshold,
    with_group_norm,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def thresholded(matrix, threshold):
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return (left * np.maximum(values - threshold, 0)) @ right


# Matrix completion


@pytest.mark.parametrize("share", [0.06, 0.2, 0.7])
def test_thresholding_by_the_gram_matrix_is_that_of_numpys_svd(photos, share):
    images = torch.from_numpy(photos.data[:16]).float() / 255
    matrices = images.permute(0, 1, 3, 2).reshape(16, 32, 96)
    threshold = share * torch.linalg.matrix_norm(matrices)[:, None, None]
    found = soft_threshold(matrices, threshold)
    for matrix, cut, result in zip(matrices.double(), threshold, found, strict=True):
        assert np.abs(thresholded(matrix.numpy(), cut.item()) - result.numpy()).max() < 2e-4


def test_thresholding_at_a_singular_value_and_of_low_rank():
    orthogonal = torch.linalg.qr(torch.randn(12, 12, generator=generator(), dtype=torch.float64))[0]
    values = torch.tensor([4, 2, 1.001, 1, 0.999, 0.5, 0.1, 0, 0, 0, 0, 0], dtype=torch.float64)
    found = soft_threshold((orthogonal * values)[None], torch.ones(1, 1, 1).double())[0]
    expected = orthogonal * (values - 1).clamp(min=0)
    assert (found - expected).abs().max() < 1e-4
    assert not soft_threshold(torch.zeros(2, 4, 6), torch.ones(2, 1, 1)).any()


def test_a_rank_3_image_comes_back_from_half_its_pixels():
    """Eight of eight; a few in a hundred such images are not what minimises the nuclear norm."""
    draws = generator()
    left, right = (torch.rand(8, *shape, generator=draws) for shape in ((32, 3), (3, 96)))
    images = (left @ right / 3).view(8, 32, 3, 32).transpose(1, 2)
    kept = torch.rand(images.shape, generator=draws) < 0.5
    assert 0.48 < kept.float().mean() < 0.52
    hidden = torch.where(kept, images, torch.nan)  # what is dropped must not be read
    found = complete_images(hidden, kept, shrinkage=1e-4, iterations=200)
    assert (images[~kept] - images[kept].mean()).abs().mean() > 0.05
    assert (found - images).abs().max() < 1e-3


def test_completions_minimise_the_nuclear_norm_problem(photos):
    """Optimality: R = kept (M - X) / shrinkage is U V^T plus a part of norm at most 1."""
    images = torch.from_numpy(photos.data[::12][:6]).double() / 255
    matrices = images.permute(0, 1, 3, 2).reshape(6, 32, 96)
    kept = torch.rand(matrices.shape, generator=generator()) < 0.5
    shrinkage = 0.3
    for matrix, mask, found in zip(
        matrices, kept, complete(matrices, kept, shrinkage, 400), strict=True
    ):
        left, values, right = np.linalg.svd(found.numpy(), full_matrices=False)
        rank = int((values > 1e-3).sum())
        assert 0 < rank < 20
        residual = np.where(mask, matrix - found, 0) / shrinkage
        inner = left[:, :rank].T @ residual @ right[:rank].T
        assert np.abs(inner - np.eye(rank)).max() < 0.02
        assert np.linalg.norm(residual, 2) < 1.02


def test_completions_agree_with_a_numpy_loop_of_another_algorithm(photos):
    """Accelerated proximal gradient (FISTA), an image at a time, by singular values."""
    images = torch.from_numpy(photos.data[::24][:3]).float() / 255
    matrices = images.permute(0, 1, 3, 2).reshape(3, 32, 96)
    kept = torch.rand(matrices.shape, generator=generator(3)) < 0.6
    found = complete(matrices, kept, 1.0, 100)
    for matrix, mask, result in zip(matrices.numpy(), kept.numpy(), found.numpy(), strict=True):
        estimate = ahead = np.where(mask, matrix, 0)
        pace = 1.0
        for _ in range(400):
            step = thresholded(np.where(mask, matrix, ahead), 1.0)
            faster = (1 + np.sqrt(1 + 4 * pace**2)) / 2
            ahead = step + (pace - 1) / faster * (step - estimate)
            estimate, pace = step, faster
        assert np.abs(estimate - result).max() < 1e-3


def test_complete_refuses_what_does_not_match():
    with pytest.raises(UserError, match=r"expected matrices \(N, R, K\)"):
        complete(torch.zeros(2, 4, 4), torch.ones(2, 4, 5, dtype=torch.bool), 0.1)


def test_a_data_set_brings_one_of_its_completions():
    data = Photos(train=True, patches=2, transform=transforms.PILToTensor())
    settings = {"completions": 3, "iterations": 10}
    dataset = defended(data, "matrix_completion", **settings)
    torch.manual_seed(1)  # of which completion is drawn: whatever ran before, all three are
    clean = torch.stack([data[row][0] for row in range(4)]).float()
    drawn = [torch.stack([dataset[row][0] for row in range(4)]) for _ in range(12)]
    assert len({image.numpy().tobytes() for images in drawn for image in images[:1]}) == 3
    error = torch.stack(drawn).float().mean(0) - clean
    assert 0 < error.abs().mean() < 25  # of 255: changed, and still the image
    assert [dataset[row][1] for row in range(4)] == [data[row][1] for row in range(4)]
    again = defended(data, "matrix_completion", **settings)
    assert any(torch.equal(again[0][0], images[0]) for images in drawn)


# Noise, smoothing, cutout


def test_noise_has_its_deviation_in_pixels_also_in_normalised_views():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    normalize = transforms.Normalize(mean, std)
    views = normalize(torch.full((64, 3, 32, 32), 0.5))
    torch.manual_seed(0)
    noisy = GaussianNoise(8 / 255, Pixels.normalized(mean, std))(views)
    change = (noisy - views) * torch.tensor(std)[:, None, None]
    assert change.std().item() == pytest.approx(8 / 255, rel=0.01)
    assert abs(change.mean().item()) < 1e-3
    assert (change[:, 0].std() / change[:, 2].std()).item() == pytest.approx(1, rel=0.02)


def test_noise_stays_within_pixels():
    torch.manual_seed(0)
    noisy = GaussianNoise(0.5)(torch.rand(4, 3, 16, 16))
    assert (noisy.min(), noisy.max()) == (0, 1)


def test_cutout_cuts_a_square_of_each_image():
    torch.manual_seed(0)
    cut = Cutout(0.5)(torch.ones(2000, 3, 32, 32)) == 0
    assert (cut.all(1) == cut.any(1)).all()
    height, width = cut[:, 0].any(2).sum(1), cut[:, 0].any(1).sum(1)
    assert (cut[:, 0].sum((1, 2)) == height * width).all()
    assert (height.max(), width.max(), height.min()) == (16, 16, 8)
    # Centres are uniform over 32 places and up to half of a side falls outside.
    expected = np.mean([min(32, c + 8) - max(0, c - 8) for c in range(32)]) ** 2
    assert cut[:, 0].sum((1, 2)).float().mean().item() == pytest.approx(expected, rel=0.02)
    assert Cutout(0.25, fill=0.5)(torch.ones(3, 32, 32)).unique().tolist() == [0.5, 1.0]


def test_the_median_is_scipys(photos):
    images = torch.from_numpy(photos.data[:3]).permute(0, 3, 1, 2)
    found = Smoothing("median", 5)(images)
    for image, result in zip(images.numpy(), found.numpy(), strict=True):
        for channel, smoothed in zip(image, result, strict=True):
            assert (ndimage.median_filter(channel, 5, mode="mirror") == smoothed).all()


def test_the_gaussian_is_scipys(photos):
    images = torch.from_numpy(photos.data[:2]).permute(0, 3, 1, 2).double() / 255
    found = Smoothing("gaussian", 7, 1.5)(images)
    for image, result in zip(images.numpy(), found.numpy(), strict=True):
        for channel, smoothed in zip(image, result, strict=True):
            expected = ndimage.gaussian_filter(channel, 1.5, mode="mirror", radius=3)
            assert np.abs(expected - smoothed).max() < 1e-6


def test_a_smoothed_data_set_is_smoothed_before_its_transform():
    data = Photos(train=True, patches=1, transform=transforms.PILToTensor())
    dataset = defended(data, "smoothing", kind="median")
    for row in range(3):
        assert torch.equal(dataset[row][0], Smoothing("median")(data[row][0]))


def test_defended_names_what_it_serves():
    with pytest.raises(UserError, match="serves matrix_completion, smoothing, jpeg"):
        defended(Photos(train=True, patches=1), "noise")


# Adversarial views


def test_an_adversary_finds_the_worst_views_of_a_linear_loss():
    weights = torch.randn(2, 3, 8, 8, generator=generator())
    views = [torch.rand(4, 3, 8, 8, generator=generator(i)) * 0.8 + 0.1 for i in (1, 2)]

    def loss(moved):
        return sum((w * view).sum() for w, view in zip(weights, moved, strict=True))

    moved = adversarial_views(loss, views, AdversarialConfig(eps=0.05, steps=10))
    for w, view, result in zip(weights, views, moved, strict=True):
        assert torch.allclose(result, view + 0.05 * w.sign(), atol=1e-6)


def test_an_adversary_raises_the_loss_within_eps_of_normalised_pixels(photos):
    torch.manual_seed(0)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    pixels = torch.from_numpy(photos.data[:16]).permute(0, 3, 1, 2).float() / 255
    view = transforms.Normalize(mean, std)(pixels)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    labels = torch.arange(16) % 4

    def loss(moved):
        return functional.cross_entropy(model(moved[0]), labels)

    before = loss([view]).item()
    (moved,) = adversarial_views(loss, [view], None, Pixels.normalized(mean, std))
    assert loss([moved]).item() > 1.5 * before
    scale = torch.tensor(std)[:, None, None]
    assert ((moved - view) * scale).abs().max() <= 8 / 255 + 1e-6
    back = moved * scale + torch.tensor(mean)[:, None, None]
    assert back.min() > -1e-6
    assert back.max() < 1 + 1e-6
    assert not moved.requires_grad


# Mixing


@pytest.mark.parametrize("config", [MixupConfig(), CutmixConfig()])
def test_mixed_labels_sum_to_one_and_say_what_is_in_the_image(config):
    """Images whose channels are the one-hot labels: their mean is what the labels must be."""
    torch.manual_seed(0)
    labels = torch.randint(5, (16,))
    hot = functional.one_hot(labels, 5).float()
    views = [hot[:, :, None, None].expand(-1, -1, 16, 16).clone()] * 2
    changed = 0
    for _ in range(10):
        mixed, targets = Mixing(config, 5)(views, labels)
        assert torch.allclose(targets.sum(1), torch.ones(16))
        for view in mixed:
            assert torch.allclose(view.mean((2, 3)), targets, atol=1e-6)
            assert type(view) is torch.Tensor
        changed += not torch.equal(targets, hot)
    assert changed > 5


def test_mixing_needs_labels():
    with pytest.raises(UserError, match="images without one"):
        Mixing(MixupConfig(), 3)([torch.zeros(2, 3, 4, 4)], torch.tensor([1, -1]))


# Private training


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(4)
    )


def test_group_norm_lets_no_image_see_another():
    network = small_network()
    images = torch.rand(6, 3, 8, 8, generator=generator())
    network(images)
    with torch.no_grad():
        network[1].weight.copy_(torch.rand(8))
    weight = network[1].weight
    private = with_group_norm(network)
    assert torch.allclose(private(images)[:1], private(images[:1]), atol=1e-6)
    assert any(parameter is weight for parameter in private.parameters())
    assert with_group_norm(private) is private
    with pytest.raises(UserError, match="cannot exchange"):
        with_group_norm(nn.SyncBatchNorm(4))


@pytest.mark.parametrize(("images", "batch"), [(400, 8), (40, 40)])
def test_private_batches_are_drawn_by_chance(images, batch):
    pytest.importorskip("opacus")
    network = nn.Linear(2, 2)
    sgd = torch.optim.SGD(network.parameters(), lr=1.0)
    with pytest.raises(UserError, match="draws each image by chance"):
        Private(network, sgd, DpSgdConfig(), images, batch, 10)


# Settings


@pytest.mark.parametrize(
    ("name", "values", "text"),
    [
        ("mixupp", {}, "did you mean mixup"),
        ("none", {"eps": 1}, "not a setting of defence=none"),
        ("noise", {"sdt": 0.1}, r"did you mean defence.std\?"),
        ("noise", {"std": 2}, r"defence.std must lie in \[1e-06, 1\]; got 2"),
        ("adversarial", {"eps": "300/255"}, "defence.eps must lie in"),
        ("smoothing", {"size": 4}, "must be odd"),
        ("smoothing", {"kind": "box"}, "gaussian or median"),
        ("matrix_completion", {"keep_min": 0.7}, "keep_min <= defence.keep_max"),
        ("matrix_completion", {"completions": 0}, "defence.completions must lie in"),
        ("cutout", {"size": 16}, "defence.size must lie in"),
        ("mixup", {"alpha": 0}, "defence.alpha must be positive"),
        ("dp_sgd", {"delta": 1}, r"defence.delta must be in \(0, 1\)"),
    ],
)
def test_a_mistake_is_one_sentence(name, values, text):
    with pytest.raises(UserError, match=text) as error:
        defence_settings(name, values)
    assert "\n" not in str(error.value)


def test_every_settings_class_names_its_defaults_as_the_group_does():
    from omegaconf import OmegaConf

    from cp_plugin.util.paths import shipped

    for name, kind in DEFENCES.items():
        group = OmegaConf.load(shipped("configs") / "defence" / f"{name}.yaml").defence
        values = OmegaConf.to_container(group)
        assert values.pop("name") == name
        if kind is None:
            assert not values
        else:
            assert set(values) == {field.name for field in dataclasses.fields(kind)}
            given = {key: "folder" for key, value in values.items() if value == "???"}
            assert defence_settings(name, values | given) == kind(**given)


@pytest.mark.parametrize("name", ["mixup", "cutmix", "dp_sgd"])
@pytest.mark.parametrize("method", ["simclr", "byol", "supcon"])
def test_what_needs_a_supervised_loss_is_refused_with_the_reason(name, method):
    with pytest.raises(UserError, match=f"the loss of {method} (has no|compares)"):
        check_defence(name, method)
    check_defence(name, "supervised")
    check_defence("noise", method)


def test_a_run_is_named_after_its_defence_and_a_surrogate_has_none():
    inject = {"name": "inject", "path": "a"}
    plain = Selection.of(inject, None)
    chosen = Selection.of(inject, None, {"name": "noise"})
    assert plain.tag({}).startswith("inject-")
    assert chosen.tag({}).startswith("inject-noise-")
    assert Selection.of(inject, None, {"name": "none"}).tag({}) == plain.tag({})
    with pytest.raises(UserError, match="belongs to a victim, and poison=cp crafts"):
        Selection.of({"name": "cp"}, None, {"name": "noise"})
    assert MatrixCompletionConfig().completions == 4
