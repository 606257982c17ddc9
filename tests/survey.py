"""Writes peftc/survey/families.json, the family table:

    python tests/survey.py                  # families not in it yet, everything measured
    python tests/survey.py llama bert       # these anew; the rest stays
    python tests/survey.py --all            # all anew: hours on two cores
    python tests/survey.py --from FILE...   # records that were measured elsewhere, one JSON object a line

The file is written after each family, so the run may be ended at any time and taken up again.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

from peftc.survey.record import Record
from peftc.survey.sweep import every_family, sweep
from peftc.survey.table import FILE, FamilyTable, sums

TARGET = Path(__file__).parents[1] / "peftc" / "survey" / FILE
SECONDS = 180


def write(records: dict[str, Record]) -> None:
    """The table in the order of the names; seconds are left out, for they differ from run to run."""
    ordered = {name: records[name] for name in sorted(records)}
    versions = {name: version(name) for name in ("torch", "transformers")}
    document = FamilyTable(versions, ordered).to_json()
    for entry in document["families"]:
        entry.pop("seconds")
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in document["families"])
    head = json.dumps(document["versions"])
    TARGET.write_text(f'{{"versions": {head},\n"families": [\n{lines}\n]}}\n', encoding="utf-8")


def main(arguments: list[str]) -> None:
    records = FamilyTable.from_json(json.loads(TARGET.read_text(encoding="utf-8"))).records if TARGET.exists() else {}
    if arguments[:1] == ["--from"]:
        for path in arguments[1:]:
            for line in Path(path).read_text(encoding="utf-8").splitlines():
                record = Record.from_json(json.loads(line))
                records[record.family] = record
        write(records)
    else:
        named = [name for name in arguments if not name.startswith("--")]
        missing = [name for name in every_family() if name not in records or "--all" in arguments]
        for record in sweep(named or missing, seconds=SECONDS, onnx=True):
            records[record.family] = record
            write(records)
            print(record.family, "; ".join(record.reasons) or "right", flush=True)
    print(sums(records.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
