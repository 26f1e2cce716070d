"""Crafts and victims with fixed seeds give the digests that were recorded."""

import json

import pytest

from tests.fixed_seeds import RECORDED, environment, measure


@pytest.mark.slow
def test_fixed_seeds_give_the_recorded_poisons_and_victims(tmp_path):
    recorded = json.loads(RECORDED.read_text(encoding="utf8"))
    if recorded["environment"] != environment():
        pytest.skip("recorded with another processor or other versions")
    assert measure(tmp_path) == recorded["digests"]
