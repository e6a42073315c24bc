"""The tables of the wire document are the constants of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moe_efa import _C

DOCUMENT = Path(__file__).resolve().parents[1] / "csrc" / "proto" / "README.md"


def tables() -> dict[str, list[list[str]]]:
    """Rows of every Markdown table by the name of its first column."""
    found: dict[str, list[list[str]]] = {}
    rows: list[list[str]] = []
    for line in [*DOCUMENT.read_text().splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif rows:
            found[rows[0][0]] = rows[2:]
            rows = []
    return found


TABLES = tables()
LAYOUT = _C.wire_layout()


def test_protocol_version() -> None:
    match = re.search(r"Protocol version: \*\*(\d+)\*\*", DOCUMENT.read_text())
    assert match is not None
    assert int(match.group(1)) == LAYOUT["protocol_version"] == _C.build_info()["protocol_version"]


def test_immediate_fields() -> None:
    documented = {row[0]: (int(row[1]), int(row[2])) for row in TABLES["field"]}
    assert documented == {name: tuple(place) for name, place in LAYOUT["imm"].items()}


def test_immediate_kinds() -> None:
    assert {row[0]: int(row[1]) for row in TABLES["kind"]} == LAYOUT["kinds"]


def test_dtypes() -> None:
    assert {row[0]: int(row[1]) for row in TABLES["dtype"]} == LAYOUT["dtypes"]


def test_parts_of_a_region() -> None:
    documented = {re.split(r"[ \[]", row[0])[0]: row[1] for row in TABLES["part"]}
    assert documented == LAYOUT["parts"]


def test_flags() -> None:
    assert {row[0]: int(row[1]) for row in TABLES["flag"]} == LAYOUT["flags"]


@pytest.mark.parametrize("name", sorted(LAYOUT["structs"]))
def test_struct(name: str) -> None:
    documented = {row[0]: (int(row[1]), int(row[2])) for row in TABLES[name]}
    assert documented == {field: tuple(place) for field, place in LAYOUT["structs"][name].items()}


def test_every_struct_is_documented_without_gaps() -> None:
    for name, fields in LAYOUT["structs"].items():
        end = 0
        for offset, size in fields.values():
            assert offset == end, f"{name} has a gap at {end}"
            end = offset + size


def test_named_files_exist() -> None:
    root = DOCUMENT.parents[2]
    names = {path.name for path in root.rglob("*") if path.suffix in {".py", ".cc", ".h"}}
    for name in re.findall(r"`([a-z_]+\.(?:py|cc|h))`", DOCUMENT.read_text()):
        assert name in names, f"the wire document names {name}, which does not exist"
