"""A whole fuzz run: `python -m tests.fuzz --count 2000 [--seed 0] [--json FILE]`.

Prints what went wrong, an input a line, and ends with code 1 if there was any; `--keep DIR` keeps
these inputs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from tests.fuzz.harness import KINDS, run


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--keep", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    found = run(arguments.count, arguments.seed, arguments.kinds, arguments.keep)
    ends = Counter(f"{one.kind}: {one.end}" for one in found)
    wrong = [one for one in found if one.wrong]
    for one in wrong:
        print(f"{one.kind} {one.number} ({one.mutation}): {one.end}: {one.told}")
    for end, count in sorted(ends.items()):
        print(f"{count:5d} {end}")
    if arguments.json is not None:
        result = {"count": len(found), "seed": arguments.seed, "ends": dict(ends)}
        result["wrong"] = [one._asdict() for one in wrong]
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
