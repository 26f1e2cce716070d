"""SimSiam, Barlow Twins, VICReg and DINO as surrogates and as victims of the embedded engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cp_plugin import Poison
from cp_plugin.apps.hydra_app import compose
from cp_plugin.callbacks.batches import with_views
from cp_plugin.data.batch import Batch
from cp_plugin.engine.methods import build_method
from cp_plugin.engine.settings import complete
from cp_plugin.hosts import adapt
from cp_plugin.hosts.gradients import check_momentum_gradients, momentum_gradients, preserve_state

NEW = ("simsiam", "barlow_twins", "vicreg", "dino")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.mark.parametrize("method", NEW)
def test_a_method_crafts_a_poison_and_is_the_victim_of_one(
    method: str, call: Any, image_folder: Any, tmp_path: Path
) -> None:
    folder = image_folder()
    small = [
        *("backbone.kwargs.channels=[8,8,8,8]", "max_epochs=1", "optimizer.batch_size=6"),
        *("data.num_workers=0", "data.dataset=custom", "precision=32"),
        *(f"data.train_path={folder}", f"data.val_path={folder}"),
    ]
    short = ["poison.rounds=1", "poison.model_steps=1", "poison.noise_steps=1"]
    craft = [*small, "+poison=cp_class", *short]
    code, _, error = call("pretrain", "--config-name", method, *craft)
    assert code == 0, error
    (file,) = tmp_path.rglob("poison.safetensors")
    poison = Poison.load(file)
    assert poison.info["poison"] == "cp"
    rows = poison.perturbation.gather(torch.arange(3))
    assert 0 < rows.abs().max() <= poison.eps * (1 + 1e-6)
    assert json.loads(poison.info["schedule"])["noise_steps_done"] == 1
    used = ["+poison=inject", f"poison.path={file}", "+monitor=knn", "monitor.k=3"]
    code, _, error = call("pretrain", "--config-name", method, *small, *used)
    assert code == 0, error
    results = [json.loads(path.read_text()) for path in tmp_path.rglob("result.json")]
    (victim,) = [result for result in results if result["poison"] == "inject"]
    assert victim["method"] == method
    assert {"knn_clean_bank", "knn_poisoned_bank"} <= victim.keys()


def smooth(module: nn.Module) -> nn.Module:
    """Without kinks, so that two ways to the same gradient agree in every digit."""
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, nn.Tanh())
        elif isinstance(child, nn.MaxPool2d):
            setattr(module, name, nn.AvgPool2d(2))
        else:
            smooth(child)
    return module


def dino(*overrides: str) -> Any:
    tiny = ["backbone.kwargs.channels=[8,8,8,8]", "method_kwargs.num_prototypes=16"]
    torch.manual_seed(0)
    cfg = complete(compose("dino", [*tiny, "+performance.disable_channel_last=True", *overrides]))
    module = smooth(build_method(cfg, 16).double())
    with torch.no_grad():  # as after some steps: the branch lags behind, the centre has moved
        for weight in module.backbone_momentum.parameters():
            weight += 0.01 * torch.randn_like(weight)
        module.criterion.center += 0.1 * torch.randn_like(module.criterion.center)
    return module.eval()


def slow_dino(module: Any, views: list[Tensor], centre: Tensor, dual: bool) -> Tensor:
    """The loss an image at a time, gradients through the momentum branch or not."""
    total = torch.zeros((), dtype=torch.float64)
    count = len(views[0])
    for here, there in ((0, 1), (1, 0)):
        for image in range(count):
            shown = views[here][image : image + 1]
            scores = module.projection_head_momentum(module.backbone_momentum(shown))[0]
            if not dual:
                scores = scores.detach()
            target = functional.softmax((scores - centre) / torch.tensor(0.04), 0)
            other = module.forward(views[there][image : image + 1])[0]
            logs = other / 0.1 - torch.logsumexp(other / 0.1, 0)
            total = total - (target * logs).sum() / (2 * count)
    return total


@pytest.mark.parametrize("dual", [True, False])
def test_gradients_pass_dinos_momentum_branch(dual: bool) -> None:
    module = dino()
    centre = module.criterion.center.flatten().clone()
    draws = torch.Generator().manual_seed(1)
    views = [
        torch.randn(4, 3, 16, 16, generator=draws, dtype=torch.float64).requires_grad_()
        for _ in range(2)
    ]
    expected = torch.autograd.grad(slow_dino(module, views, centre, dual), views)
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    numbers = torch.arange(4)
    batch = Batch(numbers, numbers, images, (views, numbers))
    host = adapt(module, with_views)
    assert host.detect_momentum([view.detach() for view in views], batch)
    assert set(host.momentum_names) == {"backbone_momentum", "projection_head_momentum"}
    momentum = host.momentum_modules() if dual else ()
    gradients = momentum_gradients(module, momentum)
    with preserve_state(module) as guard:
        with gradients:
            loss = host.loss(views, batch)
        assert loss is not None
        if dual:
            check_momentum_gradients(gradients, loss, views[0])
        found = torch.autograd.grad(loss, views)
        guard.restore()
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-9)
        assert one.abs().max() > 1e-6
    assert torch.equal(module.criterion.center.flatten(), centre)
    assert not module.criterion.center.requires_grad
    other_way = torch.autograd.grad(slow_dino(module, views, centre, not dual), views)
    assert not torch.allclose(found[0], other_way[0], rtol=1e-2)
