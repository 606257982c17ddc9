"""Writes tests/decoding/table.json, what holds of every decoder of transformers with and without deltas:

    python tests/decoders.py                     # decoders that are not in it yet
    python tests/decoders.py llama t5            # these anew; the rest stays
    python tests/decoders.py --failed            # those with a failure anew
    python tests/decoders.py --all               # all anew: two hours on two cores
    python tests/decoders.py --show              # the misses and the totals; nothing is measured

The file is written after each decoder, so the run may be ended at any time and taken up again.
"""

from __future__ import annotations

import sys

from decoding.subjects import every_decoder
from decoding.sweep import sweep
from decoding.table import read, shown, write


def main(arguments: list[str]) -> None:
    records, known = read(), every_decoder()
    named = {name for name in arguments if not name.startswith("--")}
    if unknown := named - {family for family, _ in known}:
        sys.exit(f"transformers has no decoder {', '.join(sorted(unknown))}")

    def wanted(name: str, family: str) -> bool:
        if named:
            return family in named
        if "--failed" in arguments:
            return name in records and bool(records[name].failures)
        return "--all" in arguments or name not in records

    asked = [] if "--show" in arguments else [one for one in known if wanted(":".join(one), one[0])]
    for record in sweep(asked):
        records[record.name] = record
        write(records)
        said = record.failures or [f"{what}: {why}" for what, why in record.stopped.items()] or ["right"]
        print(record.name, record.seconds, "; ".join(said), flush=True)
    print(shown(records))


if __name__ == "__main__":
    main(sys.argv[1:])
