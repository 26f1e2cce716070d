"""Mutated inputs, each read in a process of its own: crashes, hangs and memory are seen."""

from __future__ import annotations

import json
import os
import random
import resource
import select
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cp_plugin.config.settings import UserError
from tests.fuzz.mutations import BINARY, Mutation
from tests.fuzz.targets import CASES, Case

KINDS = tuple(CASES)
SECONDS = 60
"""After so long an input hangs."""
SPARE = 64 << 20
"""Bytes that reading may take beside twice the file and what the intact file takes."""
ROOM = 3 << 30
"""Bytes of address space that a process gets beside what it has."""
REFUSED, DONE = "refused", "read"


class Outcome(NamedTuple):
    """What became of an input."""

    kind: str
    number: int
    mutation: str
    end: str
    """`refused`, `read`, or what went wrong."""
    told: str

    @property
    def wrong(self) -> bool:
        """Whether it is neither a clear error nor a correct result."""
        return self.end not in (REFUSED, DONE)


def run(
    count: int, seed: int, kinds: Sequence[str] = KINDS, keep: Path | None = None
) -> list[Outcome]:
    """Read so many mutated inputs, as many of each kind; return what became of them.

    Args:
        count: inputs in all.
        seed: of the mutations; with count and kinds it fixes the inputs.
        kinds: of `KINDS`.
        keep: a folder that gets the inputs that went wrong.
    """
    found = []
    with tempfile.TemporaryDirectory() as place:
        cases = {kind: CASES[kind](Path(place) / "seeds" / kind) for kind in kinds}
        usual = {kind: _usual(case, Path(place)) for kind, case in cases.items()}
        for number in range(count):
            kind = kinds[number % len(kinds)]
            case = cases[kind]
            draw = random.Random(f"{seed} {kind} {number}")
            name = draw.choice(sorted(case.seeds))
            mutation = _chosen(case.mutations, draw)
            content = mutation(case.seeds[name], draw)
            outcome = _outcome(case, name, content, Path(place) / "work", usual[kind])
            one = Outcome(kind, number, f"{mutation.__name__} of {name}", *outcome)
            found.append(one)
            if one.wrong and keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{kind}-{number}-{name}").write_bytes(content)
    return found


def _chosen(own: tuple[Mutation, ...], draw: random.Random) -> Mutation:
    """Return a mutation; those that know a format get past its first checks."""
    return draw.choice(own) if own and draw.random() < 0.75 else draw.choice(BINARY)


def _usual(case: Case, place: Path) -> int:
    """Return the memory that reading the intact files takes; they must be readable.

    Raises:
        RuntimeError: one is not.
    """
    most = 0
    for name, content in case.seeds.items():
        end, told, taken = _measured(case, name, content, place / "work")
        if end != DONE:
            raise RuntimeError(f"the intact {name} is not read: {end}: {told}")
        most = max(most, taken)
    return most


def _outcome(case: Case, name: str, content: bytes, work: Path, usual: int) -> tuple[str, str]:
    end, told, taken = _measured(case, name, content, work)
    if taken > usual + 2 * len(content) + SPARE:
        return "memory", f"{taken >> 20} MB for a file of {len(content):,} bytes; {end}: {told}"
    return end, told


def _measured(case: Case, name: str, content: bytes, work: Path) -> tuple[str, str, int]:
    shutil.rmtree(work, ignore_errors=True)
    inner = work / "inner"
    inner.mkdir(parents=True)
    end, told, taken = _in_a_process(lambda: case.read(name, content, inner))
    left = sorted(path.name for path in work.iterdir() if path.name != "inner")
    if left:
        return "escaped", f"wrote {left} outside of its folder", taken
    return end, told, taken


def _in_a_process(read: Callable[[], None]) -> tuple[str, str, int]:
    """Return how it ended, what was told, and the bytes that were taken."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(read, writer)
    os.close(writer)
    told = _received(reader, time.monotonic() + SECONDS)
    os.close(reader)
    if told is None:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if told is None:
        return "hangs", f"after {SECONDS} seconds", 0
    if os.WIFSIGNALED(status):
        return "crash", signal.Signals(os.WTERMSIG(status)).name, 0
    end, text, taken = json.loads(told)
    return end, text, taken


def _received(reader: int, deadline: float) -> str | None:
    parts: list[bytes] = []
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        part = os.read(reader, 65536)
        if not part:
            return b"".join(parts).decode()
        parts.append(part)


def _child(read: Callable[[], None], writer: int) -> None:
    result: Any = ("raised", "nothing", 0)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf8").split()[0])
        most = pages * resource.getpagesize() + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        warnings.simplefilter("ignore")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        end, told = _read(read)
        taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        result = (end, told, taken)
    finally:
        os.write(writer, json.dumps(result).encode())
        os._exit(0)


def _read(read: Callable[[], None]) -> tuple[str, str]:
    try:
        read()
    except UserError as error:
        return (REFUSED, str(error)[:300]) if str(error).strip() else ("mute", "an empty error")
    except BaseException as error:
        import traceback

        frames = traceback.extract_tb(error.__traceback__)[-3:]
        where = " < ".join(f"{Path(one.filename).name}:{one.lineno}" for one in reversed(frames))
        return f"raised {type(error).__name__}", f"{str(error)[:200]!r} at {where}"
    return DONE, ""


def told(found: Iterable[Outcome]) -> str:
    """Return what went wrong, a line an input."""
    wrong = [one for one in found if one.wrong]
    return "\n".join(
        f"{one.kind} {one.number} ({one.mutation}): {one.end}: {one.told}" for one in wrong
    )
