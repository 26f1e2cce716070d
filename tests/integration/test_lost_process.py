"""A process of several that is killed ends the others at once, and is named."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KILLED = """
import os, signal, sys, time
import torch
from torch import distributed as dist
torch.set_num_threads(1)
folder, killed, phase = sys.argv[1], int(sys.argv[2]), sys.argv[3]

def die(steps, model_phase):
    if dist.get_rank() == killed and steps > 1 and model_phase == (phase == "model"):
        print("killed at", time.time(), file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""
LOOP = """
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from cp_plugin import PoisonLoop
from tests.support.small_runs import TWO_CROPS, Pictures, Small

dist.init_process_group("gloo")
data = Pictures(TWO_CROPS)
loader = DataLoader(data, 4, sampler=DistributedSampler(data, shuffle=False))
small = Small()
model = torch.nn.Sequential(small.backbone, small.head)
parallel = DistributedDataParallel(model)
poison = PoisonLoop(loader, parallel, rounds=10_000, model_steps=2, noise_steps=2, pgd_steps=1,
                    dir=folder)
optimizer, steps = torch.optim.SGD(model.parameters(), lr=0.1), 0
while not poison.finished:
    for batch in poison:
        x0, x1 = batch[0]
        die(steps, poison.model_phase)
        poison.backward((parallel(x0) - parallel(x1)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
"""
CALLBACK = """
import lightning.pytorch as pl
from torch.utils.data import DataLoader
from cp_plugin.callbacks import CraftPoison
from tests.support.small_runs import TWO_CROPS, Pictures, Small

class Dying(Small):
    def training_step(self, batch, batch_idx):
        die(self.global_step, self.training)
        return super().training_step(batch, batch_idx)

crafting = CraftPoison(rounds=10_000, model_steps=2, noise_steps=2, pgd_steps=1, dir=folder)
trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=-1,
                     callbacks=[crafting], default_root_dir=folder, logger=False,
                     enable_progress_bar=False, enable_model_summary=False,
                     enable_checkpointing=False)
trainer.fit(Dying(), DataLoader(Pictures(TWO_CROPS), 4))
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def killed(folder: Path, application: str, launcher: list[str], rank: int, phase: str) -> str:
    """Run an application one process of which is killed; return what all have told."""
    (folder / "application.py").write_text(KILLED + application, encoding="utf8")
    (folder / "run").mkdir()
    done = subprocess.run(
        [*launcher, str(folder / "application.py"), str(folder / "run"), str(rank), phase],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,  # ends when the last process that holds it does
        text=True,
        timeout=300,
    )
    ended = time.time()
    assert done.returncode != 0
    (at,) = re.findall(r"^killed at (\S+)$", done.stdout, re.MULTILINE)
    assert ended - float(at) < 30
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("application", "phase"),
    [(LOOP, "model"), (LOOP, "noise"), (CALLBACK, "noise")],
    ids=["loop, model phase", "loop, noise phase", "callback"],
)
def test_torchrun_names_the_process(application: str, phase: str, tmp_path: Path) -> None:
    told = killed(tmp_path, application, TORCHRUN, 1, phase)
    assert "Signal 9 (SIGKILL)" in told
    assert "rank      : 1 (local_rank: 1)" in told


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "phase"), [(0, "model"), (1, "noise")])
def test_so_does_a_run_that_lightning_launches(rank: int, phase: str, tmp_path: Path) -> None:
    told = killed(tmp_path, CALLBACK, [sys.executable], rank, phase)
    assert f"process {rank} of 2 has ended" in told
