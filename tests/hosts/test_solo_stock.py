"""`+poison=…` and `+monitor=knn` on solo-learn's own main_pretrain.py and its own YAML."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from cp_plugin.attack import poison_file
from cp_plugin.attack.poison_file import Poison
from cp_plugin.data import RawDataset, load
from tests.support.applications import CPU, CRAFT, NATIVE, only

pytestmark = [
    # Stock solo-learn, timm and Lightning warn of their own uses of what is deprecated.
    pytest.mark.filterwarnings("ignore"),
]


def rows_found(poison: Poison, folder: Path) -> torch.Tensor:
    dataset, _ = load("custom", folder)
    raw = RawDataset(dataset, poison.size)
    return poison.rows([raw[row].key for row in range(len(raw))])


def curve(folder: Path) -> list[dict[str, str]]:
    with only(folder, "knn.csv").open() as file:
        return list(csv.DictReader(file))


def test_craft_then_victim_on_stock_simclr(stock, solo_data, tmp_path, monkeypatch):
    parse = stock.module("main_pretrain").parse_cfg
    made = stock.pretrain(
        *("cifar/simclr", *solo_data, "+poison=cp", "poison.rounds=1", "poison.pgd_steps=1"),
        *("+monitor=knn", "checkpoint.dir=surrogate"),
    )
    assert made.code == 0, made.err
    assert "crafting: 1 rounds of 3 + 3 steps, 96 image passes in all" in made.err
    file = only(tmp_path, "poison.safetensors")
    # Stock YAML says hydra.run.dir: `.`, so the run's folder is that of its checkpoints.
    assert file.parent == only(tmp_path, "*.ckpt").parent
    assert file.parent.parent == tmp_path / "surrogate" / "simclr"
    poison = Poison.load(file)
    assert poison.info["host"] == "solo-learn"
    assert poison.info["method"] == "simclr"
    assert poison.info["backbone"] == "timm/resnet18"
    assert sorted(rows_found(poison, tmp_path / "train").tolist()) == list(range(24))
    assert stock.module("main_pretrain").parse_cfg is parse

    loaded = []
    own = poison_file.read_by_rows

    def counted(path, name):
        loaded.append(str(path))
        return own(path, name)

    monkeypatch.setattr(poison_file, "read_by_rows", counted)
    victim = stock.pretrain(
        *(
            "cifar/simclr",
            *solo_data,
            "+poison=inject",
            f"poison.path={file}",
            "checkpoint.dir=victim",
        ),
        *("+monitor=knn", "monitor.every_n_epochs=1", "max_epochs=2"),
    )
    assert victim.code == 0, victim.err
    assert loaded == [str(file)]
    found = curve(tmp_path / "victim")
    assert [row["epoch"] for row in found] == ["0", "1"]
    assert all(0 <= float(row["knn_poisoned_bank"]) <= 100 for row in found)
    assert "kNN (k=20) clean bank" in victim.err
    saved = json.loads(only(tmp_path / "victim", "args.json").read_text())
    assert saved["name"].startswith("simclr-cifar10-inject-")


def test_byol_asked_for_dali_is_read_from_folders(stock, solo_data, tmp_path):
    made = stock.pretrain(
        *("custom/byol", *solo_data, "+poison=cp_class", *CRAFT, "precision=bf16-mixed"),
        *("+accumulate_grad_batches=2", "max_epochs=9", "method_kwargs.pred_hidden_dim=16"),
        *("augmentations.0.crop_size=32", "augmentations.1.crop_size=32"),
    )
    assert made.code == 0, made.err
    assert made.err.count("data.format=dali is read as image_folder") == 1
    assert "momentum branch of byol: momentum_backbone, momentum_projector" in made.err
    poison = Poison.load(only(tmp_path, "poison.safetensors"))
    assert poison.granularity == "class"
    assert len(poison.perturbation) == 3
    assert json.loads(poison.info["schedule"])["surrogate_steps_done"] == 4


def test_mocov2plus_on_imagenet100s_yaml(stock, solo_data, tmp_path):
    made = stock.pretrain(
        *("imagenet-100/mocov2plus", *solo_data, "data.dataset=imagenet100", "+poison=cp"),
        *("method_kwargs.queue_size=16", *CRAFT, "poison.rounds=1", "augmentations.0.crop_size=48"),
    )
    assert made.code == 0, made.err
    poison = Poison.load(only(tmp_path, "poison.safetensors"))
    assert poison.image_size == 32  # images of one size keep it, whatever is cropped from them


def test_the_clean_baseline_and_noise(stock, solo_data, tmp_path):
    clean = stock.pretrain("cifar/simclr", *solo_data, "+poison=none", "checkpoint.dir=clean")
    assert (clean.code, list(tmp_path.rglob("poison.safetensors"))) == (0, []), clean.err
    noise = stock.pretrain("cifar/simclr", *solo_data, "+poison=random", "checkpoint.dir=noise")
    assert noise.code == 0, noise.err
    poison = Poison.load(only(tmp_path / "noise", "poison.safetensors"))
    assert len(poison.perturbation) == 24


def test_a_monitor_needs_no_poison(stock, solo_data, tmp_path):
    made = stock.pretrain("cifar/simclr", *solo_data, "+monitor=knn", *NATIVE)
    assert made.code == 0, made.err
    (row,) = curve(tmp_path)
    assert "knn_poisoned_bank" not in row


def names(folder: Path) -> list[str]:
    return [json.loads(path.read_text())["name"] for path in sorted(folder.rglob("args.json"))]


def test_no_run_resumes_another_and_the_same_command_resumes_itself(stock, solo_data, tmp_path):
    """Auto-resume is on in stock YAML and compares method, data and optimiser, never a poison."""
    clean = ("cifar/simclr", *solo_data, *NATIVE, "optimizer.batch_size=12")
    craft = (*clean, "+poison=cp_class", *CRAFT)
    ran = [stock.pretrain(*clean), stock.pretrain(*craft)]
    file = only(tmp_path, "poison.safetensors")
    ran.append(stock.pretrain(*clean, "+poison=inject", f"poison.path={file}"))
    assert [run.code for run in ran] == [0] * 3, ran[-1].err
    assert ["Resuming from" in run.out for run in ran] == [False] * 3
    assert len(set(names(tmp_path))) == 3
    again = [stock.pretrain(*clean), stock.pretrain(*craft)]
    assert [run.code for run in again] == [0, 0], again[1].err
    resumed = [run.out.replace("\n", "").partition("Resuming from")[2][:400] for run in again]
    assert "cp_class" not in resumed[0]
    assert "/simclr-cifar10-" in resumed[0]
    assert "/simclr-cifar10-cp_class-" in resumed[1]


def test_a_sweep_over_the_group_is_refused(stock, solo_data, tmp_path):
    swept = stock.pretrain(
        *("cifar/simclr", *solo_data, *NATIVE, "+poison=none,random", "hydra.sweep.dir=swept"),
        flags=("-m",),
    )
    assert swept.code == 2, swept.err
    assert "cp-plugin: poison=none is chosen, but Hydra has not activated it" in swept.err
    assert list(tmp_path.rglob("*.ckpt")) == []


def test_a_sweep_under_a_poison_has_it_in_every_run(stock, solo_data, tmp_path):
    swept = stock.pretrain(
        *("cifar/simclr", *solo_data, "+poison=random", "poison.eps=4/255,8/255"),
        "hydra.sweep.dir=swept",
        flags=("-m",),
    )
    assert swept.code == 0, swept.err
    found = sorted(Poison.load(path).eps for path in tmp_path.rglob("poison.safetensors"))
    assert found == [4 / 255, 8 / 255]
    assert len(set(names(tmp_path))) == 2


BAD = {
    "an unknown key": (("+poison=cp", "+poison.epsilon=1"), "did you mean poison.eps?"),
    "a value out of range": (("+poison=cp", "poison.eps=8"), "must lie in"),
    "a method that is not served": (("+poison=cp", "method=supcon"), "compares labels"),
    "no labels": (("+poison=cp_class", "+data.no_labels=True"), "leaves no labels"),
    "no poison file": (("+poison=inject", "poison.path=none"), "no poison file at none"),
    "no test images": (("+monitor=knn", "data.val_path=null"), "set data.val_path"),
    "a backbone that timm lacks": (("+poison=none", "backbone.name=timm/resnet81"), "did you mean"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_sentence_and_nothing_is_written(stock, solo_data, tmp_path, case):
    overrides, text = BAD[case]
    ran = stock.pretrain("cifar/simclr", *solo_data, *overrides)
    before = {tmp_path / "train", tmp_path / "val"}
    sentences = [line for line in ran.err.splitlines() if line.startswith("cp-plugin: ")]
    assert len(sentences) == 1
    assert text in sentences[0]
    assert "Traceback" not in ran.err
    assert ran.code == 2
    assert set(tmp_path.iterdir()) == before


def test_a_poison_of_other_images_is_refused_before_anything_is_written(
    stock, solo_data, image_folder, tmp_path
):
    crafted = stock.pretrain("cifar/simclr", *solo_data, "+poison=random", "+data.fraction=0.5")
    assert crafted.code == 0, crafted.err
    file = only(tmp_path, "poison.safetensors")
    assert len(Poison.load(file).perturbation) == 12
    before = set(tmp_path.rglob("*.json"))
    inject = ("+poison=inject", f"poison.path={file}", "checkpoint.dir=victim")
    for other in (("+data.fraction=0.7",), (f"data.train_path={image_folder('other', 3, 8, 40)}",)):
        ran = stock.pretrain("cifar/simclr", *solo_data, *inject, *other)
        assert ran.code == 2
        assert "cp-plugin: the poison has no row for" in ran.err
        assert ".png" in ran.err
    assert set(tmp_path.rglob("*.json")) == before
    same = stock.pretrain("cifar/simclr", *solo_data, *inject, "+data.fraction=0.5")
    assert same.code == 0, same.err


def test_a_poison_is_never_overwritten(stock, solo_data, tmp_path):
    chosen = ("cifar/simclr", *solo_data, "+poison=cp_class", *CRAFT, "checkpoint.enabled=False")
    assert stock.pretrain(*chosen).code == 0
    # Without checkpoints the run's folder has the run's name.
    file = only(tmp_path, "poison.safetensors")
    assert file.parent.parent == tmp_path / "trained_models" / "simclr"
    assert file.parent.name.startswith("simclr-cifar10-cp_class-")
    again = stock.pretrain(*chosen)
    assert again.code == 2
    assert "exists and a poison is never overwritten" in again.err


def test_the_schedule_ends_with_crafting(stock, solo_data, tmp_path, monkeypatch):
    """solo-learn scales its warm-up by max_epochs, which crafting may cut short."""
    from cp_plugin.callbacks import CraftPoison

    seen = []
    own = CraftPoison.on_train_start

    def on_train_start(self, trainer, module):
        seen.append((trainer.estimated_stepping_batches, module.max_epochs))
        own(self, trainer, module)

    monkeypatch.setattr(CraftPoison, "on_train_start", on_train_start)
    ran = stock.pretrain("cifar/simclr", *solo_data, "+poison=cp_class", *CRAFT, "max_epochs=50")
    assert ran.code == 0, ran.err
    ran = stock.pretrain(
        *("cifar/simclr", *solo_data, "+poison=cp", "poison.rounds=1", "max_epochs=50"),
        "poison.pgd_steps=1",
    )
    assert ran.code == 0, ran.err
    assert seen == [(4, 2), (3, 1)]  # steps, and the epochs of 3 steps that they are


def test_stock_mae_is_crafted_with_and_trained_on_it(stock, solo_data, tmp_path):
    def pretrain(*overrides):
        where = ("--config-path", f"{stock.root}/scripts/pretrain/cifar", "--config-name", "mae")
        small = (
            *("backbone.name=vit_tiny", "backbone.kwargs.patch_size=8"),
            *("method_kwargs.decoder_embed_dim=16", "method_kwargs.decoder_depth=1"),
            *("method_kwargs.decoder_num_heads=2", "max_epochs=1", "optimizer.batch_size=8"),
            "data.val_path=null",  # its validation images would have 224 pixels
        )
        return stock.call("main_pretrain", *where, *CPU, *solo_data, *small, *overrides)

    made = pretrain("+poison=cp_class", "poison.rounds=1", *CRAFT[1:])
    assert made.code == 0, made.err
    assert "mae compares no two views" in made.err
    file = only(tmp_path, "poison.safetensors")
    assert Poison.load(file).info["method"] == "mae"
    victim = pretrain("+poison=inject", f"poison.path={file}", "checkpoint.dir=victim")
    assert victim.code == 0, victim.err
