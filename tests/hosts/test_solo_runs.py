"""`cp-plugin evaluate` and `export` on what stock solo-learn leaves behind."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cp_plugin.apps.evaluate_run import evaluate
from cp_plugin.apps.export import export
from cp_plugin.config.settings import UserError
from tests.support.applications import NATIVE, Stock, only

# Stock solo-learn, timm and Lightning warn of their own uses of what is deprecated.
pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("backbone", [(), NATIVE], ids=["timm", "its own"])
def test_evaluate_finds_what_the_monitor_found(
    stock: Stock,
    solo_data: tuple[str, ...],
    tmp_path: Path,
    backbone: tuple[str, ...],
) -> None:
    poison = ("+poison=random", "poison.eps=64/255", "+data.fraction=0.5")
    made = stock.pretrain(
        "cifar/simclr", *solo_data, *poison, *backbone, "+monitor=knn", "monitor.k=3"
    )
    assert made.code == 0, made.err
    folder = only(tmp_path, "args.json").parent
    with only(folder, "knn.csv").open() as file:
        monitored = list(csv.DictReader(file))[-1]
    for checkpoint in (folder, only(folder, "*.ckpt")):
        clean, poisoned = evaluate(checkpoint, k=3, probe="none")
        assert clean["knn"]["accuracy"] == pytest.approx(float(monitored["knn_clean_bank"]))
        assert poisoned["knn"]["accuracy"] == pytest.approx(float(monitored["knn_poisoned_bank"]))
        assert clean["knn"]["bank_size"] == 12


def test_export_knows_the_images_of_the_run(
    stock: Stock,
    solo_data: tuple[str, ...],
    tmp_path: Path,
) -> None:
    made = stock.pretrain("cifar/simclr", *solo_data, "+poison=random", "+data.fraction=0.5")
    assert made.code == 0, made.err
    out = tmp_path / "out"
    assert export(only(tmp_path, "poison.safetensors"), out) == 12
    written = sorted(path.relative_to(out) for path in out.rglob("*.png"))
    assert len(written) == 12
    for name in written:
        pair = [np.array(Image.open(root / name), int) for root in (out, tmp_path / "train")]
        assert 0 < abs(pair[0] - pair[1]).max() <= 8


def test_without_solo_learn_the_sentence_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "args.json").write_text("{}")
    with pytest.raises(UserError, match=r"no checkpoint \(\.ckpt\) of solo-learn"):
        evaluate(tmp_path)
    (tmp_path / "a-ep=0.ckpt").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "solo", None)
    with pytest.raises(UserError, match=r"cannot be imported here .* on PYTHONPATH"):
        evaluate(tmp_path)
