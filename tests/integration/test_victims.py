"""Victims that read labels: supervised, SupCon, fine-tuned; and what they refuse."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from cp_plugin import Poison
from cp_plugin.apps.hydra_app import compose
from cp_plugin.config.settings import UserError
from cp_plugin.data import Photos
from cp_plugin.engine.methods import build_method
from cp_plugin.engine.pipeline import build_pipeline
from cp_plugin.engine.settings import complete
from cp_plugin.engine.supcon import supervised_contrastive
from cp_plugin.evaluation.banks import Bank
from cp_plugin.evaluation.finetune import finetune
from cp_plugin.mirror import mirror

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
]
SMALL = [
    "backbone.kwargs.channels=[8,8,8,8]",
    "max_epochs=1",
    "optimizer.batch_size=6",
    "data.num_workers=0",
]


def settings(method, *overrides, classes=3):
    cfg = complete(compose(method, [*SMALL, *overrides]))
    cfg.data.num_classes = classes
    return cfg


def slow_supcon(z, labels, temperature):
    """Equation 2 of the paper, term by term, in float64; -1 is a class of its own."""
    z = z.astype(np.float64)
    views = [
        (image, label, vector / np.linalg.norm(vector))
        for image, (label, vectors) in enumerate(zip(labels, z, strict=True))
        for vector in vectors
    ]
    total = 0.0
    for i, (image, label, anchor) in enumerate(views):
        others = [view for j, view in enumerate(views) if j != i]
        denominator = sum(math.exp(anchor @ other / temperature) for _, _, other in others)
        logs = [
            math.log(math.exp(anchor @ other / temperature) / denominator)
            for its_image, its_label, other in others
            if its_image == image or (label >= 0 and its_label == label)
        ]
        total -= sum(logs) / len(logs)
    return total / len(views)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize("labels", [[0, 1, 0, 2, 2], [3, 3, 3, 3, 3], [0, -1, 1, -1, 0]])
def test_supcon_equals_the_paper(labels, temperature):
    z = torch.randn(5, 2, 7, generator=torch.Generator().manual_seed(4))
    expected = slow_supcon(z.numpy(), labels, temperature)
    found = supervised_contrastive(z, torch.tensor(labels), temperature)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    other = supervised_contrastive(z, torch.tensor([0, 1, 2, 3, 4]), temperature)
    assert other.item() != pytest.approx(expected, rel=1e-3)


def test_supcon_without_labels_in_common_is_simclrs_loss():
    from lightly.loss import NTXentLoss

    z = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(1))
    expected = NTXentLoss(0.3)(z[:, 0], z[:, 1])
    assert supervised_contrastive(z, torch.arange(6), 0.3).item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_supcon_has_a_gradient_that_is_finite():
    z = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss = supervised_contrastive(z, torch.tensor([0, 0, 1, -1]), 0.1)
    (gradient,) = torch.autograd.grad(loss, z)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0


def test_the_supervised_loss_is_the_mean_over_labelled_views():
    module = build_method(settings("supervised"), 32).eval()
    views = [torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)]
    labels = torch.tensor([2, -1, 0, 1])
    with torch.no_grad():
        found = module.training_step((views, labels), 0)
        terms = [
            -functional.log_softmax(module(view)[row], 0)[labels[row]]
            for view in views
            for row in (0, 2, 3)
        ]
        assert found.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)
        assert module.training_step((views, torch.full((4,), -1)), 0) == 0


def test_the_standard_pipeline_crops_the_padded_image_and_flips_it():
    twin = mirror(build_pipeline(settings("supervised")))
    assert (twin.views, twin.crop_size) == (1, 32)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    padded = functional.pad(image, (4, 4, 4, 4))[0]
    windows = [
        window
        for side in (padded, padded.flip(2))
        for window in side.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    ]
    places = set()
    for seed in range(8):
        (view,) = twin(image, generator=torch.Generator().manual_seed(seed))
        distances = [float((view[0] - twin.normalize(w[None])[0]).abs().max()) for w in windows]
        assert min(distances) < 1e-4
        places.add(distances.index(min(distances)))
    assert len(places) > 4


def test_the_contrastive_pipeline_gives_a_supervised_victim_two_views():
    assert mirror(build_pipeline(settings("supervised", "augmentations=cifar_paper"))).views == 2


@pytest.fixture
def pretrain(call, image_folder):
    """`cp-plugin pretrain` on a small folder of images, with overrides."""
    folder = image_folder()

    def run(name, *overrides, data=folder):
        source = ["data.dataset=custom", f"data.train_path={data}", f"data.val_path={data}"]
        return call("pretrain", "--config-name", name, *source, *SMALL, *overrides)

    return run


def only(folder, pattern):
    (found,) = folder.rglob(pattern)
    return found


def test_tap_then_supcon_then_knn_probe_and_fine_tuning(pretrain, call, tmp_path):
    code, _, error = pretrain("supervised", "+poison=tap", "poison.pgd_steps=1")
    assert code == 0, error
    poison = only(tmp_path, "poison.safetensors")
    used = ["+poison=inject", f"poison.path={poison}", "poison.fraction=0.5"]
    code, _, error = pretrain("supcon", *used, "+monitor=knn", "monitor.k=3")
    assert code == 0, error
    victim = only(tmp_path / "trained_models" / "supcon", "result.json").parent
    result = json.loads((victim / "result.json").read_text())
    assert (result["method"], result["fraction"]) == ("supcon", 0.5)
    assert {"knn_clean_bank", "knn_poisoned_bank"} <= result.keys()
    assert len(Poison.load(victim / "poison.safetensors").keys) == 6  # 2 of 4 images of each class
    code, out, error = call("evaluate", victim, "--k", 3, "--finetune", 0.5, "--json")
    assert code == 0, error
    rows = json.loads(out)
    assert [row["bank"] for row in rows] == ["clean", "poisoned"]
    for row in rows:
        assert row["finetune"]["images"] == 6
        assert 0 <= row["finetune"]["last"] <= row["finetune"]["best"] <= 100
        assert row["linear"]["last"] <= row["linear"]["best"]


def test_fine_tuning_learns_from_a_part_of_the_labels_and_leaves_the_encoder_alone():
    train = Bank.clean(Photos(train=True, patches=60), 32)
    test = Bank.clean(Photos(train=False, patches=8), 32)
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
    )
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    part, whole = (finetune(encoder, lambda x: x, train, test, f, epochs=10) for f in (0.1, 1.0))
    assert (part.images, whole.images) == (72, 720)
    assert 100 / 12 + 10 < part.last < whole.last
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize("fraction", [0, 1.5])
def test_a_fraction_for_fine_tuning_out_of_range(fraction, call):
    code, _, error = call("evaluate", "absent", "--finetune", fraction)
    assert code == 2
    assert "--finetune must be a part of the labelled images" in error


@pytest.mark.parametrize(
    ("method", "overrides", "text"),
    [
        ("supcon", ["+poison=cp"], "method=supcon: its loss reads labels by design"),
        ("supervised", ["+poison=cp_class"], "method=supervised: its loss reads labels by design"),
        ("simclr", ["+poison=tap"], "poison=tap is made on a supervised surrogate"),
        ("supcon", ["+poison=error_min"], "poison=error_min is made on a supervised surrogate"),
        ("supervised", ["+poison=tap", "data.no_labels=True"], "needs labelled images"),
        ("simclr", ["+poison=synthetic", "data.no_labels=True"], "poison=synthetic needs labelled"),
        ("supcon", ["+poison=none", "data.no_labels=True"], "method=supcon needs labelled images"),
        ("supcon", ["augmentations=standard"], "supcon needs two views of one size"),
        ("supervised", ["+poison=tap", "poison.fraction=0"], "poison.fraction must be in (0, 1]"),
        ("simclr", ["+poison=random", "poison.fraction=2"], "poison.fraction must be in (0, 1]"),
        ("simclr", ["+poison=inject", "poison.path=x", "poison.fraction=-1"], "poison.fraction"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_is_trained(
    method, overrides, text, pretrain, tmp_path
):
    code, _, error = pretrain(method, *overrides)
    assert code == 2, error
    (sentence,) = [line for line in error.splitlines() if line.startswith("cp-plugin: ")]
    assert text in sentence
    assert "Traceback" not in error
    assert not (tmp_path / "trained_models").exists()


def test_a_labelled_method_on_a_single_class(pretrain, image_folder):
    folder = image_folder("one", classes=1, per_class=6)
    code, _, error = pretrain("supervised", data=folder)
    assert code == 2
    assert "needs images of two classes or more, got 1" in error


def test_fine_tuning_for_no_epoch():
    bank = Bank.clean(Photos(train=True, patches=1), 32)
    with pytest.raises(UserError, match="at least one epoch, got 0"):
        finetune(nn.Flatten(), lambda x: x, bank, bank, 1.0, epochs=0)
