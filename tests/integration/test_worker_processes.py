"""A data set taken apart is carried to worker processes, forked and spawned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightly.data import LightlyDataset
from lightly.transforms import SimCLRTransform
from torch.utils.data import DataLoader

from cp_plugin.data import RawDataset


@pytest.mark.parametrize(("method", "workers"), [("fork", 2), ("spawn", 1)])
def test_images_before_the_transform_come_from_worker_processes(
    method: str, workers: int, image_folder: Callable[..., Path]
) -> None:
    dataset = LightlyDataset(str(image_folder()), transform=SimCLRTransform(input_size=24))
    raw = RawDataset(dataset, image_size=32)
    loader = DataLoader(
        raw,
        batch_size=5,
        num_workers=workers,
        collate_fn=raw.collate,
        multiprocessing_context=method,
    )
    batches = list(loader)
    assert torch.cat([batch.rows for batch in batches]).tolist() == list(range(12))
    expected = [raw[row].key for row in range(12)]
    assert torch.cat([batch.keys for batch in batches]).tolist() == expected
    views, target, names = raw.with_views(batches[0].sample, [torch.zeros(5, 3, 24, 24)] * 2)
    assert len(views) == 2
    assert target.tolist() == [0, 0, 0, 0, 1]
    assert names[4].endswith("brick_000.png")
