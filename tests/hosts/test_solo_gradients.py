"""solo-learn's own methods, through their own training_step, against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cp_plugin.hosts.gradients import check_momentum_gradients, momentum_gradients, preserve_state

pytestmark = [
    pytest.mark.usefixtures("double_precision"),
    # DINO's head in solo-learn uses it.
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
]

BATCH, SIDE, STEP = 4, 12, 1e-5
HEADS = {"proj_output_dim": 8, "proj_hidden_dim": 16, "pred_hidden_dim": 16}
METHODS = {
    "byol": HEADS,
    "mocov2plus": {**HEADS, "temperature": 0.2, "queue_size": 16},
    "mocov3": {**HEADS, "temperature": 0.2},
    "dino": {
        "proj_output_dim": 8,
        "proj_hidden_dim": 16,
        "num_prototypes": 12,
        "clip_grad": 0,
        "freeze_last_layer": True,
        "use_bn_in_head": True,
        "norm_last_layer": True,
        "student_temperature": 0.5,
        "teacher_temperature": 0.4,
        "warmup_teacher_temperature": 0.4,
        "warmup_teacher_temperature_epochs": 2,
    },
    "ressl": {**HEADS, "temperature_q": 0.5, "temperature_k": 0.4, "queue_size": 16},
    "simclr": {**HEADS, "temperature": 0.2},
}


def configuration(name: str) -> Any:
    from omegaconf import OmegaConf

    cfg = OmegaConf.create(
        {
            "name": "test",
            "method": name,
            "backbone": {"name": "resnet18"},
            "data": {
                "dataset": "cifar10",
                "num_large_crops": 2,
                "num_small_crops": 0,
                "num_classes": 10,
            },
            "optimizer": {
                "name": "sgd",
                "batch_size": BATCH,
                "lr": 0.1,
                "classifier_lr": 0.1,
                "weight_decay": 0.0,
                "kwargs": {},
            },
            "scheduler": {"name": "none", "interval": "epoch"},
            "max_epochs": 5,
            "momentum": {"base_tau": 0.99, "final_tau": 1.0, "classifier": True},
            "method_kwargs": METHODS[name],
        }
    )
    OmegaConf.set_struct(cfg, False)
    return cfg


def make_smooth(module: nn.Module) -> None:
    """Kinks make finite differences inexact: replace the activations, leave all else."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.GELU())


@pytest.fixture(params=METHODS)
def host(request: pytest.FixtureRequest, methods: Any) -> Any:
    torch.manual_seed(0)
    host = methods[request.param](configuration(request.param))
    make_smooth(host)
    for _, momentum in getattr(host, "momentum_pairs", []):
        for parameter in momentum.parameters():
            parameter.data += 0.1 * parameter.std().nan_to_num(0) * torch.randn_like(parameter)
    return host.eval()


def branch(host: Any) -> list[nn.Module]:
    return [momentum for _, momentum in getattr(host, "momentum_pairs", [])]


def loss(host: Any, images: Tensor, delta: Tensor, label: int = 0) -> Tensor:
    poisoned = images + delta
    views = [poisoned * 2 - 1, poisoned.flip(-1) * 1.5]
    labels = torch.full((BATCH,), label)
    return host.training_step([torch.arange(BATCH), views, labels], 0)


def gradient(host: Any, images: Tensor, momentum: list[nn.Module], label: int = 0) -> Tensor:
    delta = torch.zeros_like(images, requires_grad=True)
    gradients = momentum_gradients(host, momentum)
    with preserve_state(host):
        with gradients:
            value = loss(host, images, delta, label)
        check_momentum_gradients(gradients, value, delta)
        return torch.autograd.grad(value, delta)[0]


def test_gradient_is_the_true_one(host: Any) -> None:
    for name, parameter in host.named_parameters():
        if "classifier" in name:  # their stop-gradient stays, but finite differences would see them
            parameter.data.zero_()
    images = torch.rand(BATCH, 3, SIDE, SIDE)
    direction = torch.randn_like(images)
    before = [tensor.clone() for tensor in host.state_dict().values()]
    slopes = {
        name: float((gradient(host, images, momentum) * direction).sum())
        for name, momentum in (("gradients", branch(host)), ("stock", []))
    }
    ends = []
    for step in (STEP, -STEP):
        with preserve_state(host), torch.no_grad():
            ends.append(float(loss(host, images, step * direction)))
    true = (ends[0] - ends[1]) / (2 * STEP)
    assert slopes["gradients"] == pytest.approx(true, rel=1e-5)
    if branch(host):
        assert abs(slopes["stock"] - true) > 0.01 * abs(true)
    after = list(host.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_labels_do_not_leak(host: Any) -> None:
    """Not through the online classifier, nor through the one on the momentum features."""
    images = torch.rand(BATCH, 3, SIDE, SIDE)
    first, second = (gradient(host, images, branch(host), label) for label in (0, 7))
    assert first.abs().sum() > 0
    assert torch.equal(first, second)
