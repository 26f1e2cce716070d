"""Around crafting on stock solo-learn: probes, patches, h5, doctor, runs without the plugin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cp_plugin.attack.poison_file import Poison
from cp_plugin.util.patching import patches
from tests.support.applications import CPU, CRAFT, SMALL, Ran, Stock, custom, only

# Stock solo-learn, timm and Lightning warn of their own uses of what is deprecated.
pytestmark = [pytest.mark.filterwarnings("ignore")]


def test_main_linear_reads_a_checkpoint_with_a_timm_backbone(
    stock: Stock,
    image_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    # Its own top-5 accuracy needs five classes.
    data = custom(image_folder("train", 5, 4), image_folder("val", 5, 2))
    made = stock.pretrain("cifar/simclr", *data, "+poison=none")
    assert made.code == 0, made.err
    probe = [
        *("--config-path", f"{stock.root}/scripts/linear/imagenet-100", "--config-name", "simclr"),
        *(*CPU, *data, *SMALL[:3], "data.format=image_folder", "optimizer.batch_size=8"),
        *(f"pretrained_feature_extractor='{only(tmp_path, '*.ckpt')}'", "+data.crop_size=32"),
    ]
    ran = stock.call("main_linear", *probe, "+poison=none", "checkpoint.dir=probe")
    assert ran.code == 0, ran.err
    saved = torch.load(only(tmp_path / "probe", "*.ckpt"), weights_only=False)["state_dict"]
    before = torch.load(next((tmp_path / "trained_models").rglob("*.ckpt")), weights_only=False)
    # The stem is the one for the 32 pixels that the backbone was pretrained on.
    assert saved["backbone.conv1.weight"].shape[-1] == 3
    same = torch.equal(
        saved["backbone.conv1.weight"], before["state_dict"]["backbone.conv1.weight"]
    )
    assert same
    refused = stock.call("main_linear", *probe, "+poison=random")
    assert refused.code == 2
    assert "only +poison=none is of use" in refused.err


def test_the_patch_makes_solo_learns_own_knn_work_and_is_taken_back(
    stock: Stock,
    solo_data: tuple[str, ...],
    tmp_path: Path,
) -> None:
    (patch,) = [patch for patch in patches() if patch.name == "compute_on_step"]
    stock.module("main_pretrain")
    assert patch.is_needed(), "upstream has healed: delete patches/compute_on_step.py"
    knn = ("+knn_eval.enabled=True", "+knn_eval.k=3", "max_epochs=1")
    broken = stock.pretrain(
        "cifar/simclr", *solo_data, *knn, "backbone.name=resnet18", "~backbone.kwargs"
    )
    assert broken.code != 0
    assert "compute_on_step" in broken.err
    healed = stock.pretrain("cifar/simclr", *solo_data, *knn, "+poison=cp_class", *CRAFT)
    assert healed.code == 0, healed.err
    assert patch.is_needed()


def test_unlearnable_clusters_on_a_method_with_a_momentum_branch(
    stock: Stock, solo_data: tuple[str, ...], tmp_path: Path
) -> None:
    """Groups and deltas are of the features of the online backbone; 24 images, batches of 8."""
    few = ("poison.clusters=3", "poison.epochs=2", "max_epochs=1", "optimizer.batch_size=8")
    made = stock.pretrain("cifar/byol", *solo_data, "+poison=unlearnable_clusters", *few)
    assert made.code == 0, made.err
    poison = Poison.load(only(tmp_path, "poison.safetensors"))
    assert poison.classes == ("cluster 0", "cluster 1", "cluster 2")
    assert poison.owned_keys is not None
    assert len(poison.owned_keys) == 24
    schedule = json.loads(poison.info["schedule"])
    assert (schedule["surrogate_steps_done"], schedule["noise_steps_done"]) == (3, 6)
    assert poison.info["host"] == "solo-learn"


def test_h5_files_are_read_by_workers(
    stock: Stock,
    image_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    h5py = pytest.importorskip("h5py")
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = image_folder("train", 3, 8)
    with h5py.File(tmp_path / "train.h5", "w") as file:
        for path in sorted(folder.rglob("*.png")):
            content = np.frombuffer(path.read_bytes(), np.uint8)
            file.create_dataset(f"{path.parent.name}/{path.name}", data=content)
    source = ("data.dataset=imagenet100", "data.format=h5", "data.num_workers=2")
    paths = (f"data.train_path={tmp_path}/train.h5", "data.val_path=null")
    small = "augmentations.0.crop_size=32"
    made = stock.pretrain(
        "imagenet-100/simclr",
        *source,
        *paths,
        small,
        "+poison=cp",
        *CRAFT,
        "poison.rounds=1",
        "poison.noise_steps=epoch",
    )
    assert made.code == 0, made.err
    file = only(tmp_path, "poison.safetensors")
    assert len(Poison.load(file).perturbation) == 24
    victim = stock.pretrain(
        *("imagenet-100/simclr", *source, *paths, small, "+poison=inject", f"poison.path={file}"),
        "checkpoint.dir=victim",
    )
    assert victim.code == 0, victim.err


def test_the_doctor_names_hosts_patches_groups_and_hooks(
    solo_learn: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Ran]
) -> None:
    monkeypatch.syspath_prepend(solo_learn)
    monkeypatch.setenv("COLUMNS", "250")
    code, shown, _ = call("doctor")
    assert code == 0
    for text in ("torch", str(solo_learn), "compute_on_step", "cp_class", "knn", "Hydra plugin"):
        assert text in shown


WITHOUT = """
import importlib.metadata, pkgutil, runpy, sys
if {without}:
    own, walk = importlib.metadata.entry_points, pkgutil.walk_packages
    def entry_points(**wanted):
        found = own(**wanted)
        if "callbacks_factory" in str(wanted.get("group")):
            return [point for point in found if point.name != "cp-plugin"]
        return found
    def walk_packages(path=None, prefix="", onerror=None):
        return (m for m in walk(path, prefix, onerror) if m.name != "hydra_plugins.cp_plugin")
    importlib.metadata.entry_points, pkgutil.walk_packages = entry_points, walk_packages
sys.argv[0] = {main!r}
runpy.run_path({main!r}, run_name="__main__")
heavy = [name for name in sys.modules if name.startswith("cp_plugin")]
print("OURS", sorted(heavy))
"""


@pytest.mark.slow
def test_three_stock_steps_are_bit_identical_with_and_without_the_plugin(
    solo_learn: Path, solo_data: tuple[str, ...], tmp_path: Path
) -> None:
    states, ours = [], []
    for without in (False, True):
        program = WITHOUT.format(without=without, main=str(solo_learn / "main_pretrain.py"))
        command = [
            *(sys.executable, "-c", program),
            *("--config-path", f"{solo_learn}/scripts/pretrain/cifar", "--config-name", "byol"),
            *(*CPU, *solo_data, "max_epochs=1", "optimizer.batch_size=8", "backbone.name=resnet18"),
            *("method_kwargs.proj_hidden_dim=16", "method_kwargs.proj_output_dim=8"),
            *("method_kwargs.pred_hidden_dim=16", f"checkpoint.dir=without_{without}"),
        ]
        environment = {**os.environ, "PYTHONPATH": str(solo_learn)}
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr[-2000:]
        ours.append(json.loads(ran.stdout.rpartition("OURS ")[2].replace("'", '"')))
        saved = torch.load(only(tmp_path / f"without_{without}", "*.ckpt"), weights_only=False)
        assert saved["global_step"] == 3
        states.append(saved)
    light = {
        "config": ["baselines", "defences", "selection", "settings"],
        "integrations": ["activation", "hydra_plugin", "job"],
        "util": ["paths", "undo"],
    }
    rooms = [[f"cp_plugin.{r}", *(f"cp_plugin.{r}.{m}" for m in light[r])] for r in light]
    assert ours == [["cp_plugin", *(name for room in rooms for name in room)], []]
    weights = [state["state_dict"] for state in states]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    moments = [state["optimizer_states"][0]["state"] for state in states]
    for number in moments[0]:
        first, second = (moment[number]["momentum_buffer"] for moment in moments)
        assert torch.equal(first, second)
