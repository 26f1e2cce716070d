"""What depends on the device, on CUDA where there is one and else on the processor.

These are the tests that a machine with an accelerator runs first (`tests/bench/gpu.sh`).
"""

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed as dist

from cp_plugin.apps.hydra_app import compose, pretrain
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.data import Photos
from cp_plugin.engine.methods import build_method
from cp_plugin.engine.pipeline import build_pipeline
from cp_plugin.engine.settings import complete
from cp_plugin.evaluation.banks import Bank
from cp_plugin.evaluation.metrics import knn
from cp_plugin.hosts.gradients import check_momentum_gradients, momentum_gradients
from cp_plugin.mirror import mirror
from cp_plugin.util.processes import gathered, summed

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
TINY = "backbone.kwargs={layers:[1,1,1,1],channels:[8,8,8,8],stem_type:deep,stem_width:4}"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


@pytest.mark.parametrize("augmentations", ["cifar_paper", "symmetric", "asymmetric", "crops"])
def test_the_mirror_makes_the_same_views_and_gradients(augmentations):
    pipeline = build_pipeline(complete(compose("simclr", [f"augmentations={augmentations}"])))
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", DEVICE):
        x = images.to(device).requires_grad_()
        views = mirror(pipeline).to(device)(x, generator=torch.Generator().manual_seed(1))
        (gradient,) = torch.autograd.grad(sum(view.square().sum() for view in views), x)
        found.append((*(view.detach().cpu() for view in views), gradient.cpu()))
    for one, other in zip(*found, strict=True):
        # A pixel at an edge of a clamp or of a hue may fall on its other side.
        assert (one - other).abs().flatten().quantile(0.995) < 1e-3 * max(1, one.abs().max())


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_rows_of_delta_move_as_on_the_processor(dtype):
    found = []
    for device in (torch.device("cpu"), DEVICE):
        generator = torch.Generator().manual_seed(0)
        rows = Perturbation.uniform(9, (3, 4, 4), 8 / 255, dtype, generator)
        rows.move(device)
        gradient = torch.randn(4, 3, 4, 4, generator=generator).to(device)
        rows.descend(torch.tensor([5, -1, 0, 7]), gradient, 0.003)
        found.append((rows.stored.cpu(), rows.moved.cpu()))
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][0].float(), found[1][0].float(), atol=1e-3, rtol=0)


def test_features_and_neighbours_are_those_of_the_processor():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 16)).double()
    photos = Photos(train=True, patches=5)
    photos.transform = build_pipeline(complete(compose("simclr", [])))
    bank = Bank.clean(photos, 32)
    found = []
    for device in ("cpu", DEVICE):
        own = net.to(device)
        features = bank.features(lambda x, own=own: own(x.double()).float(), lambda x: x, device)
        found.append((features.cpu(), knn(features, bank.labels, features, bank.labels, 5, 0.07)))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-4, rtol=1e-4)
    assert found[0][1].accuracy == pytest.approx(found[1][1].accuracy, abs=2.0)


def test_gradients_pass_the_momentum_branch():
    module = build_method(complete(compose("byol", [TINY])), 32).to(DEVICE)
    branch = [module.backbone_momentum, module.projection_head_momentum]
    delta = torch.zeros(8, 3, 32, 32, device=DEVICE, requires_grad=True)
    views = [torch.rand_like(delta) + delta for _ in range(2)]
    gradients = momentum_gradients(module.eval(), branch)
    with gradients:
        loss = module.training_step([views, torch.zeros(8, dtype=torch.int64, device=DEVICE)], 0)
        loss = loss["loss"] if isinstance(loss, dict) else loss
        assert check_momentum_gradients(gradients, loss, delta)


@pytest.mark.parametrize("cache", ["true", "false"])
def test_a_craft_in_16_bit(tmp_path, cache):
    precision = "16-mixed" if CUDA else "bf16-mixed"
    settings = [
        *(TINY, "data=photos", "optimizer.batch_size=256", f"data.cache={cache}", "seed=0"),
        *("+poison=cp_class", "poison.rounds=2", "poison.model_steps=1", "poison.noise_steps=1"),
        *(f"precision={precision}", f"checkpoint.dir={tmp_path}", "data.num_workers=0"),
    ]
    result = pretrain(compose("simclr", settings))
    assert result["precision"] == precision
    delta = load_file(f"{result['folder']}/poison.safetensors")["delta"]
    assert torch.isfinite(delta).all()
    assert delta.abs().max() <= 8 / 255 * (1 + 1e-6)


def test_one_process_of_a_group_keeps_its_own_rows(tmp_path):
    backend = "nccl" if CUDA else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path / 'g'}", rank=0, world_size=1)
    try:
        rows = torch.arange(5)
        assert torch.equal(gathered(rows), rows)
        values = torch.ones(3, device=DEVICE)
        dist.all_reduce(values)
        assert torch.equal(summed(values), torch.ones(3, device=DEVICE))
    finally:
        dist.destroy_process_group()
