"""``python -m peftkern.bench.aot``: compile every shipped kernel for every architecture and compare with the table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from peftkern.bench.aot.resources import (
    Key,
    Row,
    Table,
    broken_rules,
    compile_everything,
    problems,
    read_table,
    triton_version,
    write_table,
)
from peftkern.bench.errors import BenchError

TABLE = Path("tests/gpu_offline/resources.json")


def main() -> int:
    """Run the command; 0 if nothing is wrong."""
    parser = argparse.ArgumentParser(prog="python -m peftkern.bench.aot", description=__doc__)
    parser.add_argument("--table", type=Path, default=TABLE, help="the table (default: %(default)s)")
    parser.add_argument(
        "--update", action="store_true", help="write the table instead, compiling what is not as it was for it"
    )
    options = parser.parse_args()
    report = compile_everything(_show, _known(options.table) if options.update else None)
    try:
        found = _update(options.table, report.rows) if options.update else _compare(options.table, report.rows)
    except BenchError as error:
        found = [str(error)]
    found = [*report.errors, *found]
    print("\n".join(found) or f"{len(report.rows)} kernels, nothing wrong")
    return 1 if found else 0


def _known(path: Path) -> Table | None:
    return read_table(path) if path.exists() else None


def _show(key: Key, row: Row) -> None:
    print(f"sm_{key[0]} {key[1]}: {row}", file=sys.stderr)


def _update(path: Path, rows: Mapping[Key, Row]) -> list[str]:
    """Write the table, broken rules included: whoever reads the change sees them too."""
    write_table(path, Table(triton_version(), rows))
    return [problem for key, row in rows.items() for problem in broken_rules(key, row)]


def _compare(path: Path, rows: Mapping[Key, Row]) -> list[str]:
    table = read_table(path)
    if table.triton != triton_version():
        print(f"the table is of Triton {table.triton}, this is {triton_version()}: only the hard rules are checked")
        return [problem for key, row in rows.items() for problem in broken_rules(key, row)]
    return problems(rows, table.rows)


if __name__ == "__main__":
    sys.exit(main())
