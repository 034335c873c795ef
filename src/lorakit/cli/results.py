"""The benchmarks' result files as a page of the documentation, and how their figures are written.

A file is {benchmark, machine, versions, args, rows, targets, tables} (benchmarks/harness.py). Rows are flat; `tables` says which columns
of them are printed under which title. An older file has lists of rows under names of its own, and a machine in words.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
VERDICTS = {True: "reached", False: "missed", None: "-"}
INTRODUCTION = """# Benchmarks

Generated from `benchmarks/results/`; `make bench` makes those files anew. Contenders of one table ran in one process, interleaved round by
round; figures are medians. A ratio is the median of the rounds' own ratios, behind it the interval of that median by order statistics
(at least 95 % from six rounds on). Peers are timed as their users run them."""


def page(folder: Path) -> str:
    """Markdown of every result file in `folder`: all targets first, then a section a file."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    targets = [{"benchmark": result["benchmark"], **target} for result in found.values() for target in result.get("targets", [])]
    parts = [INTRODUCTION]
    if targets:
        parts += ["## Targets", grid(["target", "wanted", "found", "reached", "why", "benchmark"], map(target_row, targets))]
    return "\n\n".join([*parts, *(section(name, result) for name, result in found.items())]) + "\n"


def section(name: str, result: Mapping[str, Any]) -> str:
    """One file: where it ran, and its tables."""
    parts = [f"## {name}", machine(result)]
    for title, rows, columns in tables(result):
        shown, kept = visible(rows, columns)
        if kept:
            parts += [f"### {title}", grid(shown, ([figure(row.get(column)) for column in shown] for row in kept))]
    return "\n\n".join(parts)


def tables(result: Mapping[str, Any]) -> list[tuple[str, Sequence[Row], Sequence[str]]]:
    """(title, rows, columns) of a file, as it says or, of an older one, every list of rows."""
    if "tables" in result:
        return [(title, result["rows"], columns) for title, columns in result["tables"].items()]
    lists = {key: value for key, value in result.items() if isinstance(value, list)}
    return [(key, rows, columns_of(rows)) for key, rows in lists.items()]


def machine(result: Mapping[str, Any]) -> str:
    """The machine, the versions and the arguments, in words."""
    args = result["args"]
    where = result.get("machine") or args["machine"]
    given = ", ".join(f"{key} {value}" for key, value in args.items() if value not in (None, False, "None", "False") and key not in HIDDEN)
    if isinstance(where, str):
        return f"{where}. Arguments: {given}."
    memory = f"{where['memory'] / 2**30:.0f} GiB"
    cpu = f"{where['cpu']} ({', '.join(where['flags'])}), {where['cores']} cores, {where['threads']} threads used, {memory}"
    gpu = f"{where['gpu']} ({where['gpu_memory'] / 2**30:.0f} GiB, CUDA {where['cuda']}); " if "gpu" in where else ""
    versions = ", ".join(f"{key} {value}" for key, value in result["versions"].items() if value is not None)
    return f"{gpu}{cpu}. Versions: {versions}. Arguments: {given}."


HIDDEN = {"json", "out", "machine"}
"""Arguments that say nothing about the figures."""


def target_row(target: Mapping[str, Any]) -> list[str]:
    """A target as a row of the table."""
    found = target["found"] if target["interval"] is None else [target["found"], *target["interval"]]
    return [target["name"], target["wanted"], figure(found), VERDICTS[target["reached"]], target["why"], f"`{target['benchmark']}`"]


def visible(rows: Sequence[Row], columns: Sequence[str]) -> tuple[list[str], list[Row]]:
    """(columns that some row has, rows that have more than the first of them)."""
    kept = [row for row in rows if any(row.get(column) not in (None, "") for column in columns[1:])]
    return [column for column in columns if any(row.get(column) not in (None, "") for row in kept)], kept


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Every key, in the order of appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def figure(value: Any) -> str:
    """A value as tables print it: three digits; [median, low, high] as 1.23 [1.20, 1.31]."""
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, list | tuple):
        shown = [figure(v) for v in value]
        return f"{shown[0]} [{shown[1]}, {shown[2]}]" if len(shown) == 3 else f"[{', '.join(shown)}]"
    return "-" if value is None else str(value)


def _number(value: float) -> str:
    if value == 0 or abs(value) >= 999.5:
        return f"{value:.0f}"
    return f"{value:#.3g}".rstrip(".") if abs(value) >= 1e-3 else f"{value:.3g}"


def grid(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table. Columns of sentences keep a width at which they can be read on a phone."""
    heads = [f"{column} {{ .sentences }}" if column in SENTENCES else cell(column) for column in columns]
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(columns), *(map(cell, row) for row in rows)])


SENTENCES = ("meaning", "what", "what it does", "why", "also", "also called", "raised for")


def cell(text: str) -> str:
    """As a table's cell shows it, outside of code: bars are no borders, <words> no elements, and braces at the end no attributes."""
    parts = re.split(r"(`[^`]*`|</?a\b[^>]*>)", text)
    said = "".join(part if i % 2 else part.replace("|", "\\|").replace("<", "&lt;") for i, part in enumerate(parts))
    return re.sub(r"\{(?=[^`]*\}\s*$)", r"\\{", said)
