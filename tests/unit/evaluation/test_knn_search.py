"""Exact search by bounds finds what comparing everything finds, whatever the features are like."""

from __future__ import annotations

import faiss
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from cp_plugin.evaluation import knn_search
from cp_plugin.evaluation.knn_search import Bounds

WIDTH, K = 160, 20


@pytest.fixture(autouse=True)
def _narrow_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn_search, "WIDTH", 24)


def drawn(count: int, spectrum: Tensor, seed: int) -> Tensor:
    """Features whose components have these deviations, in another basis."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)))[0]
    return 1 + (torch.randn(count, WIDTH, generator=generator) * spectrum) @ turn


def falling(length: float) -> Tensor:
    return torch.exp(-torch.arange(WIDTH) / length)


def all_compared(self: Bounds, queries: object) -> object:
    raise AssertionError("every row was compared")


@pytest.mark.parametrize(
    ("spectrum", "sure"),
    [
        pytest.param(falling(6), True, id="falling"),
        pytest.param(falling(40), False, id="slowly falling"),
        pytest.param(torch.ones(WIDTH), False, id="flat"),
        pytest.param((torch.arange(WIDTH) < 8).float(), True, id="few components"),
    ],
)
def test_it_finds_the_nearest(
    spectrum: Tensor, sure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = functional.normalize(drawn(4000, spectrum, 0)).numpy()
    queries = functional.normalize(drawn(300, spectrum, 1)).numpy()
    expected, rows = faiss.knn(queries, bank, K, faiss.METRIC_INNER_PRODUCT)
    search = Bounds(faiss, bank, K)
    if sure:
        monkeypatch.setattr(Bounds, "_among_all", all_compared)
    for part in (slice(0, 200), slice(200, 300)):
        cosines, found = search(queries[part])
        assert_close(torch.from_numpy(cosines), torch.from_numpy(expected[part]), atol=2e-6, rtol=0)
        assert (found == rows[part]).mean() > 0.99  # neighbours at one distance may change places


def test_rows_off_the_components_are_found() -> None:
    """Bounds of rows that components tell wholly, and of some that they hardly tell, agree."""
    bank = drawn(4000, (torch.arange(WIDTH) < 8).float(), 0)
    bank[::97] += 0.5 * torch.randn(
        len(bank[::97]), WIDTH, generator=torch.Generator().manual_seed(2)
    )
    bank = functional.normalize(bank)
    expected = (bank[:500] @ bank.T).topk(K).values
    cosines, _ = Bounds(faiss, bank.numpy(), K)(bank[:500].numpy())
    assert_close(torch.from_numpy(cosines), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("rows", "k", "bounded"), [(4000, 20, True), (4000, 900, False), (900, 9, False)]
)
def test_only_a_large_bank_is_searched_so(
    rows: int, k: int, bounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knn_search, "MANY", 1000)
    used = []
    call = Bounds.__call__
    monkeypatch.setattr(
        Bounds, "__call__", lambda self, queries: used.append(1) or call(self, queries)
    )
    bank, queries = drawn(rows, falling(6), 0), drawn(50, falling(6), 1)
    ((cosines, _),) = knn_search.search(bank, queries, k, "flat")
    assert bool(used) is bounded
    expected = functional.normalize(queries) @ functional.normalize(bank).T
    assert_close(cosines, expected.topk(k).values, atol=2e-6, rtol=0)
