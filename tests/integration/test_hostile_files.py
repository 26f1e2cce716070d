"""What is known of hostile files, case by case."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cp_plugin.apps.engine_runs import EngineRun
from cp_plugin.apps.export import export
from cp_plugin.apps.study import run_here, study
from cp_plugin.apps.study.overrides import check_launcher, check_overrides
from cp_plugin.apps.study.settings import read as read_study
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.settings import UserError
from cp_plugin.data import image_key
from cp_plugin.engine.checkpoints import check_checkpoint
from cp_plugin.util.whole_files import sha256
from tests.support.hostile import WritesWhenUnpickled

EPS = 8 / 255


def written(folder: Path, **changed: object) -> Path:
    """A poison file with other metadata than it should have."""
    metadata = {"format": "1", "granularity": "sample", "eps": repr(EPS), **changed}
    tensors = {"delta": torch.zeros(2, 3, 8, 8), "keys": torch.tensor([1, 2])}
    file = folder / "poison.safetensors"
    save_file(tensors, file, {key: str(value) for key, value in metadata.items() if value})
    return file


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"eps": "much"}, "'much' for eps"),
        ({"eps": None}, "'nothing' for eps"),
        ({"granularity": "image"}, "'image' for granularity"),
        ({"fraction": "nan"}, "'nan' for fraction"),
        ({"images": "-3"}, "'-3' for images"),
        ({"schedule": "[]"}, "for schedule"),
        ({"parts": "[1]"}, "for parts"),
        ({"granularity": "class", "classes": "[1, 2]"}, "for classes"),
    ],
)
def test_metadata_that_cannot_be_is_refused(tmp_path: Path, changed: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Poison.load(written(tmp_path, **changed))


def test_a_header_that_promises_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "poison.safetensors"
    size = 1 << 40
    delta = {"dtype": "I8", "shape": [size // 3072, 3, 32, 32], "data_offsets": [0, size]}
    text = json.dumps({"delta": delta}).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(100))
    with pytest.raises(UserError, match="damaged or truncated"):
        Poison.load(file)


def test_a_few_lines_of_yaml_that_stand_for_billions_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    (tmp_path / "config.yaml").write_text("\n".join(lines), encoding="utf8")
    with pytest.raises(UserError, match="more values than a configuration"):
        EngineRun(tmp_path).configuration()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"base": ["poison.dir=/tmp/elsewhere"]}, "where runs write is the study's"),
        ({"base": ["defence.save=/tmp/elsewhere"]}, "where runs write is the study's"),
        ({"base": ["+defence.path=/tmp/weights"]}, "no files of weights"),
        ({"base": ["+poison={dir: /tmp/elsewhere}"]}, "where runs write is the study's"),
        ({"victim": ["checkpoint.dir=../.."]}, "where runs write is the study's"),
        ({"victim": ["++name=../../elsewhere"]}, "where runs write is the study's"),
        ({"base": ["hydra.run.dir=/tmp"]}, "for Hydra itself"),
        ({"base": ["+hydra.callbacks.a._target_=os.system"]}, "for Hydra itself"),
        ({"base": ["+monitor@hydra.callbacks=knn"]}, "for Hydra itself"),
        ({"base": ["+optimizer._target_=os.system"]}, "names no classes"),
        ({"base": ["+backbone.kwargs={a: {_target_: os.system}}"]}, "names no classes"),
        ({"base": ["+backbone.kwargs.checkpoint_path=/tmp/a.pth"]}, "no files of weights"),
        ({"base": ["+backbone.kwargs.pretrained=true"]}, "no files of weights"),
        ({"base": ["+poison=../../../tmp/evil"]}, "no configurations from elsewhere"),
        ({"base": ["data=/tmp/evil"]}, "no configurations from elsewhere"),
        ({"base": ["optimizer.name=${oc.env:SECRET}"]}, "environment variables in"),
        ({"base": ["data.dataset=${oc.decode:a}"]}, "environment variables in"),
        ({"base": ["data.train_path=${oc.env:SECRET}"]}, "SECRET holds no folder"),
        ({"base": ["data.train_path=${oc.env:UNSET,a}"]}, "environment variables in"),
        ({"launcher": ["hydra.launcher.setup=[touch /tmp/elsewhere]"]}, "on the command line"),
        ({"launcher": ["+hydra.callbacks.a._target_=os.system"]}, "on the command line"),
        ({"launcher": ["hydra.launcher.partition='a\\ntouch b'"]}, "on the command line"),
        ({"launcher": ["hydra.sweep.dir=/tmp"]}, "on the command line"),
    ],
)
def test_a_study_of_a_strangers_says_what_is_trained_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict, said: str
) -> None:
    monkeypatch.setenv("SECRET", "a word that nobody should read")
    grid = [{"poisons": ["none"], "victims": ["simclr"], "seeds": [0]}]
    node = {"poisons": {}, "backbones": {"tiny": []}, "grid": grid, **changed}
    (tmp_path / "study.yaml").write_text(json.dumps(node), encoding="utf8")
    with pytest.raises(UserError, match=said) as refused:
        study(str(tmp_path / "study.yaml"), tmp_path / "out")
    assert "nobody should read" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["study.yaml"]


@pytest.mark.parametrize("place", ["there", "elsewhere"])
def test_a_study_downloads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def fetch(*_: object, **__: object) -> None:
        raise AssertionError("something was downloaded")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", fetch)
    (tmp_path / "there").mkdir()
    grid = [{"poisons": ["none"], "victims": ["simclr"], "seeds": [0]}]
    base = ["data=cifar10", f"data.train_path={tmp_path / place}", "data.val_path=null"]
    node = {"base": base, "poisons": {}, "backbones": {"tiny": []}, "grid": grid}
    (tmp_path / "study.yaml").write_text(json.dumps(node), encoding="utf8")
    run_here(read_study(str(tmp_path / "study.yaml")), tmp_path / "out")
    (state,) = (json.loads(one.read_text()) for one in (tmp_path / "out/cells").glob("*.json"))
    assert state["status"] == "failed"
    assert "a study downloads nothing to where its file says" in state["reason"]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["out", "study.yaml", "there"]
    assert list((tmp_path / "there").iterdir()) == []


def test_what_a_study_needs_of_the_environment_and_of_a_launcher_it_may_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGES", str(tmp_path))
    check_overrides("base", ["data.train_path=${oc.env:IMAGES}/train", "name_of=${data.dataset}"])
    check_overrides("base", ["+paper=simclr", "~backbone.kwargs", "backbone.kwargs={a: [1, 2]}"])
    check_launcher(["hydra/launcher=joblib", "hydra.launcher.n_jobs=6", "hydra.launcher.qos=a-b"])
    for name in ("cifar10", "photos", "protect", "cifar10_gpu", "cifar10_supervised", "demo"):
        assert read_study(name).grid


def test_a_checkpoint_with_code_is_refused_before_it_runs(tmp_path: Path) -> None:
    torch.save(
        {"state_dict": {}, "code": WritesWhenUnpickled(str(tmp_path / "written"))},
        tmp_path / "a.ckpt",
    )
    with pytest.raises(UserError, match="no checkpoint of tensors and plain values"):
        check_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "written").exists()


def test_a_link_in_the_folder_of_an_export_leads_nowhere(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    images = []
    for name in ("a/0", "b/1"):
        pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        (tmp_path / "clean" / name).parent.mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "clean" / f"{name}.png")
        images.append(torch.from_numpy(pixels).permute(2, 0, 1))
    keys = torch.tensor([image_key(image) for image in images])
    poison = Poison(Perturbation.zeros(2, (3, 8, 8), EPS), "sample", keys)
    file = poison.save(tmp_path / "poison.safetensors")
    (tmp_path / "elsewhere").mkdir()
    export(file, tmp_path / "out", tmp_path / "clean")
    # What an export that was interrupted would have left, and in it a link.
    mark = tmp_path / "out" / ".cp-plugin-export"
    mark.write_text(sha256(file), encoding="utf8")
    (tmp_path / "out" / "b" / "1.png").unlink()
    (tmp_path / "out" / "b").rmdir()
    (tmp_path / "out" / "b").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with pytest.raises(UserError, match="by its name or by a link"):
        export(file, tmp_path / "out", tmp_path / "clean")
    assert not list((tmp_path / "elsewhere").iterdir())
