"""Rows in a file are read as they were written, and a state of them that is kept stays whole."""

import pickle
import resource

import pytest
import torch

from cp_plugin.attack import tensor_file
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.poison_file import Poison
from cp_plugin.attack.row_file import NOWHERE, RowFile
from cp_plugin.config.settings import UserError

EPS = 8 / 255
SHAPE = (3, 4, 4)
ROW = 48


def drawn(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, (count, *SHAPE), dtype=torch.int8, generator=generator)


@pytest.fixture
def rows(tmp_path):
    return RowFile.create(tmp_path / "some.rows", (10, *SHAPE), torch.int8)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.float32])
def test_rows_are_read_as_they_were_written(tmp_path, dtype):
    rows = RowFile.create(tmp_path / "some.rows", (10, *SHAPE), dtype)
    held = torch.zeros(10, *SHAPE, dtype=dtype)
    for number, own in enumerate(([7, 2, 3], [0], [3, 9, 8, 1])):
        values = drawn(len(own), number).to(dtype)
        rows[torch.tensor(own)] = values
        held[own] = values
    assert torch.equal(rows[:], held)
    order = torch.tensor([9, 3, 3, 5])
    assert torch.equal(rows[order], held[order])
    assert torch.equal(rows.selected(order)[1:], held[order][1:])
    assert torch.equal(pickle.loads(pickle.dumps(rows))[:], held)
    assert torch.equal(rows.copied(tmp_path / "other.rows")[:], held)


def test_rows_that_were_never_written_take_no_room(tmp_path):
    count = 1_281_167
    rows = RowFile.create(tmp_path / "some.rows", (count, 3, 224, 224), torch.int8)
    last = torch.tensor([count - 1, 0])
    rows[last] = torch.ones(2, 3, 224, 224, dtype=torch.int8)
    assert rows[torch.tensor([5, count - 1])].flatten(1).float().mean(1).tolist() == [0, 1]
    assert rows.path.stat().st_size == 2 * 3 * 224 * 224
    assert rows.nbytes > 190e9


def test_a_state_that_is_kept_stays_and_only_what_changes_is_written(rows):
    rows[:] = drawn(10)
    rows.keep()
    table, state = rows.places.clone(), rows[:]
    changed = torch.tensor([4, 1])
    for seed in (1, 2):
        rows[changed] = drawn(2, seed)
    assert torch.equal(rows[changed], drawn(2, 2))
    assert torch.equal(rows.selected(torch.arange(10))[:], rows[:])
    assert rows.path.stat().st_size == 12 * ROW
    assert torch.equal(RowFile(rows.path, rows.shape, rows.dtype, table)[:], state)


def test_places_of_states_that_are_not_kept_any_more_are_used_again(rows):
    rows[:] = drawn(10)
    tables = []
    for seed in range(20):
        tables = [*tables[-1:], rows.places.clone()]
        rows.keep(tables)
        rows[:] = drawn(10, seed)
    assert rows.path.stat().st_size <= 3 * 10 * ROW
    older, newer = (RowFile(rows.path, rows.shape, rows.dtype, table)[:] for table in tables)
    assert torch.equal(older, drawn(10, 17))
    assert torch.equal(newer, drawn(10, 18))
    again = RowFile(rows.path, rows.shape, rows.dtype, tables[1].clone())
    again.keep(tables)
    writable = again.to_write()
    writable[:] = drawn(10, 30)
    assert torch.equal(RowFile(rows.path, rows.shape, rows.dtype, tables[0])[:], older)
    assert torch.equal(writable[:], drawn(10, 30))


def test_a_file_that_was_cut_is_refused(rows):
    rows[:] = drawn(10)
    with rows.path.open("rb+") as file:
        file.truncate(10 * ROW - 1)
    with pytest.raises(OSError, match="shorter than its rows"):
        RowFile(rows.path, rows.shape, rows.dtype, rows.places)
    assert int(rows.places.min()) > NOWHERE


def test_a_poison_passes_from_file_to_file_and_is_read_by_rows(tmp_path, monkeypatch):
    """A copy of it would be more than the process may have."""
    monkeypatch.setattr(tensor_file, "BY_ROWS", 0)
    count, shape = 40_000, (3, 64, 64)
    rows = RowFile.create(tmp_path / "some.rows", (count, *shape), torch.int8)
    some = torch.tensor([count - 1, 17])
    rows[some] = torch.full((2, *shape), 100, dtype=torch.int8)
    keys = torch.arange(count) * 3
    kept = torch.arange(count) != 5
    selected = Perturbation(rows, EPS).selected(kept.nonzero().flatten())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    file = Poison(selected, "sample", keys[kept], info={"name": "größe"}).save(tmp_path / "p.st")
    assert 512 * file.stat().st_blocks < rows.nbytes / 2 < file.stat().st_size
    poison = Poison.load(file)
    found = poison.perturbation.gather(poison.rows([3 * (count - 1), 3 * 17, 15, 12]).clamp(min=0))
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < rows.nbytes / 2
    assert found.flatten(1).mean(1).tolist() == pytest.approx([EPS * 100 / 127] * 2 + [0, 0])
    assert poison.rows([15]).tolist() == [-1]
    assert poison.info["name"] == "größe"
    tensors, _ = tensor_file.read(file)  # as safetensors reads it
    assert torch.equal(tensors["keys"], keys[kept])
    assert torch.equal(tensors["delta"][16], torch.full(shape, 100, dtype=torch.int8))


def test_rows_of_a_file_that_leave_the_budget_are_refused_when_they_are_read(rows):
    rows[:] = drawn(10)
    rows[torch.tensor([3])] = torch.full((1, *SHAPE), -128, dtype=torch.int8)
    perturbation = Perturbation(rows, EPS)
    perturbation.gather(torch.tensor([2, 4]))
    with pytest.raises(UserError, match="damaged or was made with a larger eps"):
        perturbation.gather(torch.tensor([2, 3]))
