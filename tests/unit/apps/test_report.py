"""The report: its figures against numpy, its page in a browser."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cp_plugin.apps.report import figures, report
from cp_plugin.apps.report.projection import principal_plane, project
from cp_plugin.apps.report.rows import Row, row_of
from cp_plugin.apps.report.tables import markdown, spread, tables
from cp_plugin.config.settings import UserError
from tests.support.results import bank

VICTIMS, POISONS, SEEDS = ("simclr", "byol"), ("none", "random", "cp_class"), (0, 1)
SMALL = ["backbone.kwargs.channels=[8,8,8,8]", "data.num_workers=0"]


def row(poison, victim, seed, **accuracies):
    surrogate = None if poison in ("none", "random") else "simclr"
    axes = {"poison": poison, "victim": victim, "seed": seed, "surrogate": surrogate}
    return Row(
        **axes,
        backbone="tiny",
        defence="none",
        folder=Path(),
        poison_file=None,
        accuracies=accuracies,
        curve=(),
        facts={},
    )


def test_means_deviations_and_worst_cases_are_numpys():
    drawn = np.random.default_rng(0).uniform(10, 90, (3, 2, 4))  # poison, victim, seed
    rows = [
        row(poison, victim, seed, linear_clean=drawn[i, j, seed])
        for i, poison in enumerate(POISONS)
        for j, victim in enumerate(VICTIMS)
        for seed in range(4)
    ]
    (table,) = tables(rows)
    assert table.victims == VICTIMS
    assert [line.poison for line in table.lines] == ["none", "random", "cp_class (simclr)"]
    for line, values in zip(table.lines, drawn, strict=True):
        assert [cell.mean for cell in line.cells] == pytest.approx(values.mean(1))
        assert [cell.deviation for cell in line.cells] == pytest.approx(values.std(1, ddof=1))
        assert line.worst == pytest.approx(values.mean(1).max())
        assert line.worst_victim == VICTIMS[values.mean(1).argmax()]
        assert line.mean == pytest.approx(values.mean(1).mean())


def test_a_single_seed_has_no_deviation_and_a_gap_is_shown():
    assert str(spread([61.25])) == "61.2"
    assert str(spread([60.0, 62.0])) == "61.0 ± 1.4"
    rows = [row("none", "simclr", 0, knn_clean=50.0), row("none", "byol", 0, knn_clean=40.0)]
    (table,) = tables([*rows, row("random", "byol", 0, knn_clean=30.0)])
    assert markdown(table).splitlines() == [
        "| poison | simclr | byol | mean over victims | worst case over victims |",
        "| --- | --- | --- | --- | --- |",
        "| none | 50.0 | 40.0 | 45.0 | 50.0 (simclr) |",
        "| random | \N{EN DASH} | 30.0 | 30.0 | 30.0 (byol) |",
    ]


def test_the_plane_of_features_is_that_of_the_covariance():
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(1)).double()
    features = features * torch.tensor([5.0, 3.0, 1.0, 1.0, 1.0, 1.0]) + 1
    plane = principal_plane(features)
    unit = features.numpy() / np.linalg.norm(features.numpy(), axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(np.cov(unit.T))
    expected = (unit - unit.mean(0)) @ vectors[:, ::-1][:, :2]
    assert np.abs(plane) == pytest.approx(np.abs(expected), abs=1e-9)
    assert plane.var(0, ddof=1) == pytest.approx(values[::-1][:2])


def test_tsne_keeps_groups_together():
    pytest.importorskip("sklearn")
    labels = torch.arange(90) % 3
    directions = torch.eye(8)[:3] * 4
    draws = torch.randn(90, 8, generator=torch.Generator().manual_seed(0))
    plane, kept = project(directions[labels] + 0.3 * draws, labels, "tsne")
    assert plane.shape == (90, 2)
    apart = np.linalg.norm(plane[:, None] - plane[None], axis=2) + 1e9 * np.eye(90)
    assert (kept[apart.argmin(1)] == kept).all()


def test_an_unknown_projection_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match="--features must be pca or tsne; got 'umap'"):
        report(tmp_path, features="umap")


def test_curves_are_means_where_all_seeds_were_evaluated():
    def run(*points):
        curve = tuple({"step": step, "knn_clean_bank": value} for step, value in points)
        return Row(**{**vars(row("none", "simclr", 0)), "curve": curve})

    rows = [run((1, 10.0), (2, 20.0), (3, 30.0)), run((1, 30.0), (3, 40.0))]
    assert figures.mean_curve(rows, "knn_clean_bank") == ([1, 3], [20.0, 35.0])
    assert figures.mean_curve(rows, "knn_poisoned_bank") == ([], [])


def test_the_controls_curve_stands_beside_the_victims():
    state = {
        **dict.fromkeys(("poison", "victim", "backbone", "defence"), "none"),
        "surrogate": None,
        "seed": 0,
        "banks": [bank("clean", np.random.default_rng(0))],
        "result": {"knn": [{"step": 2, "knn_clean_bank": 50.0}]},
        "control_curve": [{"step": 2, "knn_control": 40.0}, {"step": 4, "knn_control": 30.0}],
    }
    found = row_of(state, {"": Path()}, "")
    assert figures.mean_curve([found], "knn_clean_bank") == ([2], [50.0])
    assert figures.mean_curve([found], "knn_control") == ([2, 4], [40.0, 30.0])


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(UserError, match="no finished run with a kNN"):
        report(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        report(tmp_path / "absent")
