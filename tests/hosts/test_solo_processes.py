"""Crafting in two processes on stock solo-learn: one poison, and the one that one process makes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cp_plugin.attack.poison_file import Poison
from tests.support.applications import CPU, only

# In order and in one thread, so that two processes see the batches that one sees; each process
# leaves its own delta.
APPLICATION = """
import os, sys
import torch
from torch.utils.data import DataLoader, DistributedSampler
torch.set_num_threads(1)
from cp_plugin.callbacks import CraftPoison

own_end = CraftPoison.on_train_end
def on_train_end(self, trainer, module):
    own_end(self, trainer, module)
    torch.save(self.attack.perturbation.stored, f"delta-{trainer.world_size}-{trainer.global_rank}")
CraftPoison.on_train_end = on_train_end

import solo.data.pretrain_dataloader as loading
def in_order(dataset, batch_size, num_workers):
    processes, rank = int(os.environ["PROCESSES"]), int(os.environ.get("LOCAL_RANK", 0))
    sampler = DistributedSampler(dataset, processes, rank, shuffle=False)
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, drop_last=True)
loading.prepare_dataloader = in_order
from main_pretrain import main
main()
"""
SETTINGS = (
    *("+poison=cp", "poison.rounds=2", "poison.model_steps=2", "poison.noise_steps=2"),
    *("poison.pgd_steps=2", "max_epochs=4", "scheduler.name=none", "poison.dtype=float32"),
    *("method_kwargs.proj_hidden_dim=16", "method_kwargs.proj_output_dim=8"),
    *("backbone.name=timm/convnext_atto", "+backbone.kwargs={depths:[1,1,1,1],dims:[8,8,16,16]}"),
    *("optimizer.name=sgd", "~optimizer.kwargs", "+performance.disable_channel_last=True"),
    "+use_distributed_sampler=False",  # Lightning's own shuffles whatever the loader says
)


@pytest.mark.slow
def test_two_processes_make_the_poison_that_one_makes(
    solo_learn: Path, image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    data = image_folder("train", 2, 8)
    application = tmp_path / "application.py"
    application.write_text(APPLICATION)

    def run(processes: int) -> Poison:
        overrides = [item for item in CPU if "devices" not in item and "strategy" not in item]
        batch, lr = 8 // processes, 0.1 * processes  # solo-learn scales lr by its batch size
        command = [
            *(sys.executable, str(application)),
            *("--config-path", f"{solo_learn}/scripts/pretrain/cifar", "--config-name", "simclr"),
            *(
                *overrides,
                f'devices="{processes}"',
                "strategy=" + ("ddp" if processes > 1 else "auto"),
            ),
            *("data.dataset=custom", f"data.train_path={data}", "data.val_path=null"),
            *(f"optimizer.batch_size={batch}", f"optimizer.lr={lr}", *SETTINGS),
            f"checkpoint.dir=made_by_{processes}",
        ]
        environment = {**os.environ, "PYTHONPATH": str(solo_learn), "PROCESSES": str(processes)}
        found = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert found.returncode == 0, found.stderr[-3000:]
        return Poison.load(only(tmp_path / f"made_by_{processes}", "poison.safetensors"))

    one, two = run(1), run(2)
    assert sorted(one.keys.tolist()) == sorted(two.keys.tolist())
    deltas = [torch.load(tmp_path / f"delta-2-{rank}") for rank in (0, 1)]
    assert torch.equal(*deltas)
    rows = two.rows(one.keys.tolist())
    same = torch.isclose(one.perturbation.stored, two.perturbation.stored[rows], atol=1e-6)
    assert same.float().mean() > 0.99
