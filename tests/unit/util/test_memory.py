"""How much memory is left, on the machine and in a container."""

import pytest

from cp_plugin.util import memory


@pytest.fixture
def machine(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    return tmp_path


def group(folder, limit):
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text("3000000\n")
    (folder / "memory.stat").write_text("anon 1000000\ninactive_file 2000000\n")


def test_what_the_machine_has_left(machine):
    assert memory.available_bytes() == 8000 * 1024


def test_a_container_with_a_limit_leaves_less(machine):
    group(machine, 5_000_000)
    assert memory.available_bytes() == 4_000_000


def test_a_container_without_a_limit_leaves_what_the_machine_has(machine):
    group(machine, "max")
    assert memory.available_bytes() == 8000 * 1024


def test_without_linux_a_half_of_all_memory(machine, monkeypatch):
    monkeypatch.setattr(memory, "MEMINFO", machine / "missing")
    assert memory.available_bytes() > 1 << 28
