"""Images read once and images read at every step give the same runs, bit for bit."""

import copy

import pytest
import torch
from lightly.loss import NTXentLoss
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from cp_plugin import CraftPoison, PoisonLoop
from cp_plugin.apps.hydra_app import compose, pretrain
from cp_plugin.callbacks import InjectPoison, MirrorViews
from tests.support.small_runs import TWO_CROPS, Pictures, Small, fit

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]
KINDS = [("false", 0), ("true", 0), ("true", 2), ("false", 2)]


@pytest.mark.parametrize("granularity", ["sample", "class"])
def test_a_craft_is_the_same_with_images_read_once(tmp_path, granularity):
    found = []
    for number, (cache, workers) in enumerate(KINDS):
        torch.manual_seed(1)
        loader = DataLoader(
            Pictures(TWO_CROPS, 24), 4, shuffle=True, num_workers=workers, drop_last=True
        )
        module = Small()
        craft = CraftPoison(
            cache=cache, granularity=granularity, rounds=2, model_steps=8, noise_steps=7,
            pgd_steps=2, seed=0, dir=str(tmp_path / str(number)),
        )  # fmt: skip
        fit(module, loader, tmp_path, craft, max_epochs=10)
        assert (craft.crafting.raw.cache is not None) == (cache == "true")
        found.append((load_file(craft.path), module.state_dict()))
    for delta, weights in found[1:]:
        assert delta.keys() == found[0][0].keys()
        assert all(torch.equal(delta[name], found[0][0][name]) for name in delta)
        assert all(torch.equal(weights[name], found[0][1][name]) for name in weights)


def test_a_victim_on_mirrored_views_is_the_same_with_images_read_once(tmp_path):
    loader = DataLoader(Pictures(TWO_CROPS, 24), 4, shuffle=True)
    craft = CraftPoison(
        rounds=1, model_steps=2, noise_steps=2, pgd_steps=1, seed=0, dir=str(tmp_path)
    )
    fit(Small(), loader, tmp_path, craft)
    found = []
    for cache, workers in KINDS:
        torch.manual_seed(1)
        loader = DataLoader(Pictures(TWO_CROPS, 24), 4, shuffle=True, num_workers=workers)
        module = Small()
        fit(module, loader, tmp_path, InjectPoison(craft.path), MirrorViews(cache), max_epochs=3)
        found.append(module.state_dict())
    for weights in found[1:]:
        assert all(torch.equal(weights[name], found[0][name]) for name in weights)


def test_a_loop_is_the_same_with_images_read_once(tmp_path):
    found = []
    for cache, workers in KINDS:
        torch.manual_seed(1)
        loader = DataLoader(Pictures(TWO_CROPS, 24), 4, shuffle=True, num_workers=workers)
        small = Small()
        model = torch.nn.Sequential(copy.deepcopy(small.backbone), copy.deepcopy(small.head))
        criterion = NTXentLoss(0.5)
        poison = PoisonLoop(
            loader, model, criterion, cache=cache, rounds=2, model_steps=3, noise_steps=2,
            pgd_steps=1, seed=0, dir=str(tmp_path),
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for batch in (batch for _ in range(3) for batch in poison):
            x0, x1 = batch[0]
            poison.backward(criterion(model(x0), model(x1)))
            optimizer.step()
            optimizer.zero_grad()
        found.append(poison.poison())
    for other in found[1:]:
        assert torch.equal(other.perturbation.stored, found[0].perturbation.stored)
        assert torch.equal(other.keys, found[0].keys)


def test_the_engine_gives_the_same_poison_with_images_read_once(tmp_path):
    tiny = "backbone.kwargs={layers:[1,1,1,1],channels:[8,8,8,8],stem_type:deep,stem_width:4}"
    deltas = []
    for number, (cache, workers) in enumerate((KINDS[3], KINDS[1])):
        settings = [
            *("data=photos", tiny, "+backbone.kwargs.stem_stride=2", "optimizer.batch_size=512"),
            *(
                "+poison=cp",
                "poison.rounds=3",
                "poison.pgd_steps=1",
                "max_epochs=3",
                "precision=32",
            ),
            *(f"data.cache={cache}", f"data.num_workers={workers}", "accelerator=cpu"),
            *(f"checkpoint.dir={tmp_path / str(number)}", "augmentations=crops", "seed=0"),
        ]
        result = pretrain(compose("simclr", settings))
        deltas.append(load_file(f"{result['folder']}/poison.safetensors")["delta"])
    for delta in deltas[1:]:
        assert torch.equal(delta, deltas[0])
