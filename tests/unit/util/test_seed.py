"""Seeds that are derived from the run's: streams of their own, the same on every machine."""

import ast
import hashlib

import torch

from cp_plugin.util.seed import derived_seed
from tests import architecture

SEEDING = {
    *("manual_seed", "manual_seed_all", "seed", "seed_everything", "default_rng"),
    *("RandomState", "Random", "SeedSequence", "PCG64"),
}


def stream(seed):
    return tuple(torch.rand(4, generator=torch.Generator().manual_seed(seed)).tolist())


def test_every_seed_purpose_and_place_has_a_stream_of_its_own():
    asked = [
        (seed, purpose, *place)
        for seed in (0, 1, 2, 1 << 32, (1 << 32) + 1)
        for purpose in ("victim", "noise")
        for place in ((0,), (1,), (1 << 32,), (0, 1), (1, 0))
    ]
    assert len({stream(derived_seed(*one)) for one in asked}) == len(asked)


def test_a_seed_fits_into_what_generators_use_of_it():
    seeds = [derived_seed(0, "noise", number) for number in range(2000)]
    assert 0 <= min(seeds) < 1 << 24
    assert 0xFF << 24 < max(seeds) < 1 << 32


def test_crafts_draw_what_they_drew():
    """Their augmentations were seeded with 63 bits, of which generators used the low 32."""
    parts = (3, "noise", 40, 2, 1)
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    assert stream(derived_seed(*parts)) == stream(int.from_bytes(digest, "big") >> 1)


def computed(node):
    """Tell whether an expression computes with numbers."""
    return any(isinstance(part, ast.BinOp) for part in ast.walk(node))


def test_no_seed_is_computed_elsewhere():
    found = []
    for name, path in architecture.modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "attr", getattr(node.func, "id", ""))
                given = [*node.args, *(keyword.value for keyword in node.keywords)]
                seeds = [k.value for k in node.keywords if (k.arg or "").endswith("seed")]
                if any(map(computed, given if called in SEEDING else seeds)):
                    found.append(f"{name}:{node.lineno}")
            if isinstance(node, ast.JoinedStr):  # an override, `seed=…`
                for before, value in zip(node.values, node.values[1:], strict=False):
                    text = before.value if isinstance(before, ast.Constant) else ""
                    if text.endswith("seed=") and computed(value):
                        found.append(f"{name}:{node.lineno}")
    assert found == []
