"""What benchmarks/every_method.py found, for the pages of the methods: a row each, one table of all. Nothing where it never ran."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.cli import results

BENCHMARK = "every_method"
NOT_YET = "Not measured yet."
COLUMNS = ("method", "loss", "trained", "file", "memory / LoRA", "step / LoRA")


@dataclass(frozen=True)
class Measured:
    """The newest whole run. `rows`: by method, as the benchmark wrote them; `noise`: the lowest and highest loss of LoRA over seeds."""

    rows: Mapping[str, Mapping[str, Any]]
    machine: str = ""
    noise: tuple[float, float] | None = None


def read(folder: Path) -> Measured:
    """From the folder of result files; without any, no rows."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    runs = [run for run in found if run.get("benchmark") == BENCHMARK and not run["args"].get("smoke")]
    if not runs:
        return Measured({})
    last = max(runs, key=lambda run: max(row.get("date", "") for row in run["rows"]))
    noise = next(((row["lowest"], row["highest"]) for row in last["rows"] if "seeds of" in row), None)
    return Measured({row["method"]: row for row in last["rows"] if "method" in row}, results.machine(last), noise)


def row(measured: Measured, name: str) -> str:
    """One method's section."""
    found = measured.rows.get(name)
    if found is None:
        return NOT_YET + " `python -m benchmarks.every_method` measures every method."
    lora = measured.rows.get("lora")
    beside = f"; `lora` reaches {lora['loss']:.3f}" if lora and name != "lora" else ""
    noise = f" LoRA over three seeds: {measured.noise[0]:.3f} to {measured.noise[1]:.3f}." if measured.noise else ""
    edge = " The rate is at the edge of those tried." if found["rate"] in (found["rates"][0], found["rates"][-1]) else ""
    settings = f" Other than the defaults: {found['settings']}." if found["settings"] else ""
    return "\n\n".join(
        [
            f"Held-out loss {found['loss before']:.3f} → **{found['loss']:.3f}** nats a token{beside}.{noise}",
            results.grid(COLUMNS[2:], [_cells(found)[2:]]),
            f"One seed, one small task, at the best of {len(found['rates'])} learning rates ({found['rate']:g}).{edge}{settings}",
            f"{found['date']}, {measured.machine}",
            f"```text\n{found['command']}\n```",
        ]
    )


def table(measured: Measured) -> str:
    """All of them, the lowest loss first."""
    if not measured.rows:
        return NOT_YET + " `python -m benchmarks.every_method` measures every method and this page is made from what it writes."
    rows = sorted(measured.rows.values(), key=lambda row: row["loss"])
    noise = f"LoRA over three seeds: {measured.noise[0]:.3f} to {measured.noise[1]:.3f}." if measured.noise else ""
    shown = [[f"[`{cells[0]}`]({cells[0]}.md)", *cells[1:]] for cells in map(_cells, rows)]
    before = f"The base alone: {rows[0]['loss before']:.3f}. {noise}".strip()
    return "\n\n".join([before, results.grid(COLUMNS, shown), measured.machine])


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["method"], f"{row['loss']:.3f}", f"{row['trained']:,}", f"{row['kB']:,.0f} kB", results.figure(row.get("peak / lora")),
        results.figure(row["step / lora"]),
    ]  # fmt: skip
