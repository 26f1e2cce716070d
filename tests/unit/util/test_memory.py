"""How much memory is left, on the machine and in a container."""

import platform
import subprocess
import sys

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="parameters of glibc's allocator")
def test_freed_memory_is_kept_for_the_next_tensors() -> None:
    program = (
        "import resource, numpy\n"
        "from cp_plugin.util.memory import freed_memory_kept\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(10):\n"
        "        numpy.ones(40 << 20, numpy.uint8).sum(dtype=numpy.int64)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "def resident():\n"
        "    return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "with freed_memory_kept():\n"
        "    faults()\n"
        "    print(faults(), resident())\n"
        "print(faults(), resident())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    kept, outside = (map(int, line.split()) for line in done.stdout.splitlines())
    (faults, resident), (faults_outside, resident_outside) = kept, outside
    assert faults < faults_outside / 2
    assert resident_outside < resident - (30 << 20)
