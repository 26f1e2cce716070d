"""Rows are found by key as a dictionary would find them."""

import numpy as np
import pytest
import torch

from cp_plugin.attack import key_index
from cp_plugin.attack.key_index import KeyIndex


@pytest.mark.parametrize(("recent", "hits"), [(7, 1000), (1000, 3), (1000, 1000)])
def test_keys_are_found_as_in_a_dictionary(recent, hits, monkeypatch):
    monkeypatch.setattr(key_index, "RECENT", recent)
    monkeypatch.setattr(key_index, "HITS", hits)
    draw, known = np.random.default_rng(0), {}
    index = KeyIndex()
    for row in range(0, 200, 4):
        keys = torch.from_numpy(draw.integers(-60, 60, 4))
        rows = index.find(keys)
        for place, key in enumerate(keys.tolist()):
            if rows[place] < 0:
                rows[place] = index.claim(key, row + place)
            assert rows[place] == known.setdefault(key, row + place)
    asked = torch.arange(-70, 70)
    assert index.find(asked).tolist() == [known.get(key, -1) for key in asked.tolist()]


def test_keys_that_are_asked_for_again_are_not_looked_up_one_by_one_for_good():
    index, keys = KeyIndex(), torch.arange(2_000) * 7
    for row, key in enumerate(keys.tolist()):
        index.claim(key, row)
    for _ in range(3):
        assert torch.equal(index.find(keys), torch.arange(2_000))
    assert not index._recent


def test_the_first_row_of_a_key_stays():
    index = KeyIndex(torch.tensor([5, -(1 << 60), 5, 7]))
    assert index.find(torch.tensor([7, 5, -(1 << 60), 6])).tolist() == [3, 0, 1, -1]
    assert index.find(torch.empty(0, dtype=torch.int64)).tolist() == []
