"""Files from elsewhere, mutated: each ends in a clear error or a correct result.

A few of each kind with a fixed seed; `python -m tests.fuzz --count 2000` reads many.
"""

from __future__ import annotations

import pytest

from tests.fuzz.harness import KINDS, run, told


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_end_in_a_clear_error_or_a_correct_result(kind: str) -> None:
    found = run(50, seed=7, kinds=[kind])
    assert not told(found), told(found)
    assert {one.end for one in found} == {"refused", "read"}
