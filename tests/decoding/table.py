"""The decoder table, `table.json` beside this file: what `python tests/decoders.py` measured, a line for each row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from decoding.record import Record, totals

TABLE = Path(__file__).with_name("table.json")


def read(path: Path = TABLE) -> dict[str, Record]:
    """Records by name; none where there is no table yet."""
    if not path.exists():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))["decoders"]
    return {record.name: record for record in map(Record.from_json, rows)}


def write(records: Mapping[str, Record], path: Path = TABLE) -> None:
    """In the order of the names, so that a row measured anew changes its own line; seconds differ from run to run."""
    head = json.dumps({name: version(name) for name in ("torch", "transformers")})
    rows = [{**records[name].to_json(), "seconds": {}} for name in sorted(records)]
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(f'{{"versions": {head},\n"decoders": [\n{lines}\n]}}\n', encoding="utf-8")


def shown(records: Mapping[str, Record]) -> str:
    """Each row that is not right in every property, then the totals of each property."""
    lines = []
    for name in sorted(records):
        record = records[name]
        lines += [f"{name}: {what}: {why}" for what, why in record.stopped.items() if what in ("build", "trace")]
        lines += [f"{name}: {what}: refused: {why}" for what, why in record.refused.items()]
        lines += [f"{name}: {failure}" for failure in record.failures]
    lines += [
        f"{what}: " + ", ".join(f"{n} {k}" for k, n in sums.items()) for what, sums in totals(records.values()).items()
    ]
    return "\n".join(lines)
