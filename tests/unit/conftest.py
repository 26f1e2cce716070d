"""What the imports have made is not searched for garbage again after every few tests."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def imports_frozen() -> Iterator[None]:
    """Set aside the objects that are there when tests begin: most of them are of libraries."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
