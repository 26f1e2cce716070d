"""stable-pretraining's own transforms against what they make of an image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import InterpolationMode as Mode
from torchvision.transforms import functional as F
from torchvision.transforms import v2

from cp_plugin.config.settings import UserError
from cp_plugin.mirror import mirror
from tests.bench import pillow as oracle

pytestmark = pytest.mark.filterwarnings("ignore")  # of what the package imports
T: Any = pytest.importorskip("stable_pretraining.data.transforms")

STATISTICS = {"mean": [0.4] * 3, "std": [0.25] * 3}
SERVED = {
    "RandomAffine": lambda: [T.RandomAffine(40, (0.2, 0.1), (0.7, 1.3), 10)],
    "RandomRotation": lambda: [T.RandomRotation(60, Mode.BILINEAR)],
    "RandomPerspective": lambda: [T.RandomPerspective(p=0.8)],
    "RandomChannelPermutation": lambda: [T.RandomChannelPermutation()],
    "RandomErasing": lambda: [T.ToImage(**STATISTICS), T.RandomErasing(p=0.7)],
    "GaussianNoise": lambda: [T.ToImage(), T.GaussianNoise(0.0, 0.3, p=0.6)],
    "AdditiveGaussian": lambda: [T.ToImage(**STATISTICS), T.AdditiveGaussian(0.5, p=0.7)],
    "WrapTorchTransform": lambda: [T.WrapTorchTransform(v2.RandAugment())],
}


@pytest.mark.parametrize("name", SERVED)
def test_views_are_spread_as_the_hosts_are(name: str) -> None:
    steps = SERVED[name]()
    steps += [] if any(isinstance(step, T.ToImage) for step in steps) else [T.ToImage()]
    host = T.Compose(*steps)
    (picture,) = oracle.photographs(16, 1)
    torch.manual_seed(0)
    theirs = torch.stack([host({"image": picture})["image"] for _ in range(300)])
    given = F.to_tensor(picture).expand(300, -1, -1, -1)
    (mine,) = mirror(host)(given, torch.Generator().manual_seed(0))
    noise = 0.01 * torch.randn(2, 300)
    for measure in (
        lambda x: x.mean((1, 2, 3)),
        lambda x: x.std((1, 2, 3)),
        lambda x: (x[:, 0] - x[:, 2]).mean((1, 2)),
    ):
        pair = (measure(mine) + noise[0], measure(theirs) + noise[1])
        assert ks_2samp(*(values.numpy() for values in pair)).pvalue > 1e-3


@pytest.mark.parametrize("name", ["PatchMasking", "RandomMask"])
def test_what_is_refused_is_named(name: str) -> None:
    with pytest.raises(UserError, match=rf"got stable_pretraining.*{name}"):
        mirror(T.Compose(T.ToImage(), getattr(T, name)()))


def test_another_part_of_a_sample_is_refused() -> None:
    with pytest.raises(UserError, match="follows the image of a sample alone"):
        mirror(T.RandomAffine(10, target="other"))
