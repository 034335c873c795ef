"""Vendor the built-in tasks: the non-test sources of eight standard-library packages, one `<package>.jsonl.xz` each.

These packages are held out of the bundled base's pre-training (`runs/pretrain_base.py`). Run it with the Python the data is
pinned to: the same interpreter and liblzma give the same bytes. Each line is {"path": ..., "text": ...}, ordered by path.
"""

import argparse
import hashlib
import json
import lzma
import platform
import sysconfig
from pathlib import Path

PINNED = "3.11.7"
TASKS = ("asyncio", "distutils", "email", "idlelib", "importlib", "logging", "tkinter", "xml")
SKIP = {"test", "tests", "idle_test", "__pycache__"}


def sources(stdlib: Path, package: str) -> list[dict[str, str]]:
    """Rows of one package; files without any text (empty `__init__.py`) are left out."""
    paths = [p for p in (stdlib / package).rglob("*.py") if not SKIP & set(p.relative_to(stdlib).parts[:-1])]
    rows = [{"path": p.relative_to(stdlib).as_posix(), "text": p.read_text(encoding="utf-8")} for p in paths]
    return sorted((row for row in rows if row["text"].strip()), key=lambda row: row["path"])


def pack(rows: list[dict[str, str]]) -> tuple[bytes, bytes]:
    """The JSON lines and their xz form."""
    lines = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows).encode()
    return lines, lzma.compress(lines, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, preset=9 | lzma.PRESET_EXTREME)


def readme(table: list[str]) -> str:
    return "\n".join(
        [
            "# The built-in tasks",
            "",
            f"Sources of eight packages of the CPython {PINNED} standard library, written by `runs/vendor_tasks.py`. Tests (`test`,",
            "`tests`, `idle_test`) and files without text are left out; nothing else is changed. The bundled base never saw them in",
            "pre-training.",
            "Each `<package>.jsonl.xz` holds one JSON object a line, `{path, text}`, ordered by path. Everything that",
            "`lorakit.data.builtin` offers is derived from these files when it is loaded.",
            "",
            "License: PSF-2.0, the full text is in `LICENSE.PSF.txt`. Copyright the Python Software Foundation and the authors it names.",
            "",
            "| package | files | bytes of source | sha256 of the JSON lines | sha256 of the .xz |",
            "|---|---|---|---|---|",
            *table,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("src/lorakit/data/tasks"))
    args = parser.parse_args()
    if platform.python_version() != PINNED:
        raise SystemExit(f"the tasks are pinned to Python {PINNED}; this is {platform.python_version()}")
    stdlib = Path(sysconfig.get_path("stdlib"))
    args.out.mkdir(parents=True, exist_ok=True)
    table = []
    for package in TASKS:
        rows = sources(stdlib, package)
        lines, packed = pack(rows)
        (args.out / f"{package}.jsonl.xz").write_bytes(packed)
        size = sum(len(row["text"].encode()) for row in rows)
        table.append(
            f"| {package} | {len(rows)} | {size:,} | `{hashlib.sha256(lines).hexdigest()}` | `{hashlib.sha256(packed).hexdigest()}` |"
        )
    (args.out / "README.md").write_text(readme(table), encoding="utf-8")
    (args.out / "LICENSE.PSF.txt").write_bytes((stdlib / "LICENSE.txt").read_bytes())


if __name__ == "__main__":
    main()
