"""Ways in which a file is damaged or made hostile; each depends on a generator alone."""

from __future__ import annotations

import itertools
import json
import random
import struct
from collections.abc import Callable
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]
HOSTILE: tuple[Any, ...] = (
    *(None, True, -1, 0, 1 << 40, 1e308, float("nan"), float("-inf"), "", "x" * 5000),
    *("../../outside", "/etc/passwd", "<script>alert(1)</script>", "{{ 7*7 }}", "\u0000\uffff"),
    *("${oc.env:HOME}", [], {}, [[]], [None], {"a": None}, [1, "a"], "nan", "1e400"),
)
"""Values put in the place of others in JSON."""


def flipped(content: bytes, draw: random.Random) -> bytes:
    """Change some bits, most of them near the beginning, where headers are."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        end = draw.choice((min(len(changed), 256), len(changed)))
        changed[draw.randrange(end)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def truncated(content: bytes, draw: random.Random) -> bytes:
    """Cut the end off, or all."""
    return content[: draw.choice((0, 1, 7, 8, draw.randrange(len(content)), len(content) - 1))]


def extended(content: bytes, draw: random.Random) -> bytes:
    """Add bytes at the end, or double a part."""
    if draw.random() < 0.5:
        return content + draw.randbytes(draw.choice((1, 100, 10_000)))
    start = draw.randrange(len(content))
    part = content[start : start + draw.randrange(1, 2000)]
    return content[:start] + part + content[start:]


def overwritten(content: bytes, draw: random.Random) -> bytes:
    """Write other bytes over a part: random ones, zeros, or numbers at their limits."""
    changed = bytearray(content)
    end = draw.choice((min(len(changed), 64), len(changed)))
    start = draw.randrange(end)
    limits = [0, 1, 0x7FFFFFFF, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1]
    extreme = struct.pack(draw.choice("<>") + "Q", draw.choice(limits))
    patch = draw.choice((draw.randbytes(draw.randrange(1, 64)), bytes(16), extreme, extreme[4:]))
    changed[start : start + len(patch)] = patch
    return bytes(changed)


BINARY: tuple[Mutation, ...] = (flipped, truncated, extended, overwritten)


def in_json(content: bytes, draw: random.Random) -> bytes:
    """Change one value of a JSON text, take one away, or add one."""
    tree = json.loads(content)
    places: list[tuple[Any, Any]] = []

    def note(node: Any) -> None:
        pairs = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
        for key, value in pairs:
            places.append((node, key))
            if isinstance(value, (dict, list)):
                note(value)

    note(tree)
    for _ in range(draw.choice((1, 1, 3))):
        node, key = draw.choice(places)
        action = draw.random()
        try:
            if action < 0.2:
                del node[key]
            elif action < 0.3 and isinstance(node, dict):
                node[draw.choice(("__class__", "name", "x\ny", "../a"))] = draw.choice(HOSTILE)
            else:
                node[key] = draw.choice(HOSTILE)
        except (KeyError, IndexError):
            continue  # taken away before
    return json.dumps(tree).encode()


def in_header(content: bytes, draw: random.Random) -> bytes:
    """Change the header of a safetensors file: its length, its tensors or its metadata."""
    (length,) = struct.unpack("<Q", content[:8])
    header = in_json(content[8 : 8 + length], draw)
    if draw.random() < 0.1:
        return struct.pack("<Q", draw.choice((0, 1 << 20, 1 << 40, 1 << 63))) + content[8:]
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def in_metadata(content: bytes, draw: random.Random) -> bytes:
    """Change the metadata of a safetensors file, all of which stays text."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    texts = header["__metadata__"]
    intact = dict(texts)
    for _ in range(draw.choice((1, 1, 3))):
        name = draw.choice(sorted(texts))
        action = draw.random()
        if action < 0.2 and len(texts) > 1:
            del texts[name]
        elif action < 0.5 and texts[name] == intact[name] and texts[name][:1] in "[{":
            texts[name] = in_json(texts[name].encode(), draw).decode()
        else:
            value = draw.choice(HOSTILE)
            texts[name] = value if isinstance(value, str) else json.dumps(value)
    for tensor in header.values():
        if "dtype" in tensor and draw.random() < 0.1:
            tensor["dtype"] = draw.choice(TYPES)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


TYPES = ("I8", "U8", "F16", "F32", "F64", "I64", "BOOL", "F8_E5M2")
LINES = (
    *("a: &a [x, x]\nb: &b [*a, *a, *a, *a]\n", "[" * 3000, "x: " + "{a: " * 3000),
    *("!!python/object/apply:os.system ['touch outside']\n", "? [a, b]\n: c\n", "\t- a\n"),
    *("name: ../../outside\n", "<<: {a: b}\n", "a: 2001-01-01\n", "x: !!binary aGk=\n"),
)


def in_lines(content: bytes, draw: random.Random) -> bytes:
    """Take lines of a text away, double or swap them, or add hostile ones."""
    lines = content.decode().splitlines(keepends=True)
    for _ in range(draw.choice((1, 2, 5))):
        at = draw.randrange(len(lines))
        action = draw.random()
        if action < 0.25:
            lines[at] = ""
        elif action < 0.5:
            lines.insert(at, draw.choice(LINES))
        elif action < 0.75 and ":" in lines[at]:
            key = lines[at].partition(":")[0]
            lines[at] = f"{key}: {json.dumps(draw.choice(HOSTILE))}\n"
        else:
            lines[at] = lines[draw.randrange(len(lines))]
    return "".join(lines).encode()


def bomb(content: bytes, draw: random.Random) -> bytes:
    """Return a YAML text whose aliases stand for a billion values."""
    names = "abcdefghi"
    lines = [f"{names[0]}: &{names[0]} [x, x, x, x, x, x, x, x, x, x]\n"]
    for before, name in itertools.pairwise(names):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n")
    return content + "".join(lines).encode()
