"""Writes peftc/survey/families.json, the family table:

    python tests/survey.py                  # families not measured in full yet
    python tests/survey.py llama bert       # these anew; the rest stays
    python tests/survey.py --missed         # anew what had a miss, the oldest first
    python tests/survey.py --all            # all anew: about an hour on one core
    python tests/survey.py --into=FILE ...  # any of these, but records go to FILE, one JSON object a line
    python tests/survey.py --from FILE...   # such records into the table

The file is written after each family, so the run may be ended at any time and taken up again.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

from peftc.survey.record import Record
from peftc.survey.sweep import every_family, sweep
from peftc.survey.table import FILE, FamilyTable
from peftc.survey.totals import lines, sums, totals

TARGET = Path(__file__).parents[1] / "peftc" / "survey" / FILE
README = Path(__file__).parents[1] / "README.md"
SECONDS = 400
"""On a machine that does other things besides."""
_PLACE = re.compile(r"(?<![\w.])/(?:[\w.+-]+/)*(?:site-packages/|tmp\w+/)")
"""Where on this machine a file lies: no one else's concern."""


def write(records: dict[str, Record]) -> None:
    """The table in the order of the names; seconds are left out, for they differ from run to run."""
    ordered = {name: records[name] for name in sorted(records)}
    versions = {name: version(name) for name in ("torch", "transformers")}
    document = FamilyTable(versions, ordered).to_json()
    for entry in document["families"]:
        entry.pop("seconds")
        entry["reasons"] = [_PLACE.sub("", reason) for reason in entry["reasons"]]
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in document["families"])
    head = json.dumps(document["versions"])
    state_in_readme(records)
    TARGET.write_text(f'{{"versions": {head},\n"families": [\n{lines}\n]}}\n', encoding="utf-8")


def state_in_readme(records: dict[str, Record]) -> None:
    """The sums where the README shows them: what the command prints up to the causes of misses."""
    shown = "".join(f"{line}\n" for line in sums(totals(records.values())))
    page = README.read_text(encoding="utf-8")
    README.write_text(
        re.sub(r"(?s)(It ends in:\n\n```text\n).*?(?=```)", lambda m: m[1] + shown, page), encoding="utf-8"
    )


def main(arguments: list[str]) -> None:
    records = FamilyTable.from_json(json.loads(TARGET.read_text(encoding="utf-8"))).records if TARGET.exists() else {}
    if arguments[:1] == ["--from"]:
        for path in map(Path, arguments[1:]):
            records.update(kept_in(path))
        write(records)
    else:
        into = next((Path(a.partition("=")[2]) for a in arguments if a.startswith("--into=")), None)
        if into is not None and into.exists():
            records.update(kept_in(into))
        for record in sweep(chosen(arguments, records), seconds=SECONDS, onnx=True):
            records[record.family] = record
            keep(record, records, into)
            print(record.family, round(record.seconds, 1), "; ".join(record.reasons) or "right", flush=True)
    print(*lines(totals(records.values())), sep="\n")


def chosen(arguments: list[str], records: dict[str, Record]) -> list[str]:
    """The families to measure: those not known at all, then those known by their sites alone."""
    named = [name for name in arguments if not name.startswith("--")]
    if named or "--all" in arguments:
        return named or every_family()
    if "--missed" in arguments:
        return sorted((n for n, r in records.items() if r.reasons), key=lambda name: records[name].measured)
    left = [name for name in every_family() if name not in records or not records[name].full]
    return sorted(left, key=lambda name: name in records)


def keep(record: Record, records: dict[str, Record], into: Path | None) -> None:
    if into is None:
        write(records)
    else:
        with into.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record.to_json(), ensure_ascii=False) + "\n")


def kept_in(path: Path) -> dict[str, Record]:
    """The last record of each family in a file with one JSON object a line."""
    read = (Record.from_json(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines())
    return {record.family: record for record in read}


if __name__ == "__main__":
    main(sys.argv[1:])
