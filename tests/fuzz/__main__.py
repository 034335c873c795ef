"""Many hostile inputs: `python -m tests.fuzz --cases 40000 [--bytes 5000] [--only configurations] [--out counts.json]`.

`--cases`: variants of good files made by tests/fuzz/mutate.py, for each target. `--bytes`: runs of atheris beside them, which makes files
byte by byte and keeps those that reach new code; each target has a process of its own, as atheris does not return. A case that fails
leaves its input in --failures and the run goes on; at the end the counts are printed and the exit code says whether anything failed.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from random import Random
from typing import Any

SECONDS = 10
"""A case that takes longer hangs."""
ROOM = 6 * 2**30
"""Bytes of address space that a case may add: an input that claims to be huge must be refused before it is believed."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--bytes", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--failures", type=Path, default=Path(tempfile.gettempdir()) / "lorakit-fuzz-failures")
    parser.add_argument("--atheris", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.atheris:
        by_atheris(args)
    counts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as made:
        from tests.fuzz.targets import targets

        found = targets(Path(made))
        names = [target.name for target in found if args.only in (None, target.name)]
        limit_memory()
        for target in found:
            if target.name in names:
                counts[target.name] = structured(target, args)
                print(target.name, counts[target.name], flush=True)
    for name in names if args.bytes else ():
        command = [
            sys.executable,
            "-m",
            "tests.fuzz",
            "--atheris",
            "--only",
            name,
            "--bytes",
            str(args.bytes),
            "--failures",
            str(args.failures),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        runs = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Done ")]
        counts[f"{name}, by atheris"] = {"cases": int(runs[-1].split()[1]) if runs else 0, "failed": int(done.returncode != 0)}
        print(name, "by atheris:", counts[f"{name}, by atheris"], *([] if done.returncode == 0 else [done.stderr[-3000:]]), flush=True)
    total = sum(c["cases"] for c in counts.values())
    print(f"{total:,} cases, {sum(c['failed'] for c in counts.values())} failed")
    if args.out:
        args.out.write_text(json.dumps({"date": time.strftime("%Y-%m-%d"), "total": total, "targets": counts}, indent=1) + "\n")
    return int(any(c["failed"] for c in counts.values()))


def structured(target: Any, args: argparse.Namespace) -> dict[str, Any]:
    """How many cases were taken, how many refused, how many failed, and the slowest one's time."""
    refused = failed = 0
    slowest, seen = 0.0, set[str]()
    for case in range(args.cases):
        with tempfile.TemporaryDirectory() as folder:
            inside = Path(folder) / "in"
            inside.mkdir()
            rng = Random(f"{args.seed}:{target.name}:{case}")
            target.write(rng, inside)
            began = time.perf_counter()
            try:
                refused += one(target, inside)
            except Exception as error:
                failed += 1
                where = "".join(traceback.format_exception(error)[-6:])
                kind = where[-200:]
                if kind not in seen and len(seen) < 40:
                    seen.add(kind)
                    kept = args.failures / f"{target.name.replace(' ', '-')}-{case}"
                    shutil.rmtree(kept, ignore_errors=True)
                    shutil.copytree(inside, kept, symlinks=True)
                    print(f"FAILED {target.name} {case}: {kept}\n{where}", flush=True)
            slowest = max(slowest, time.perf_counter() - began)
    return {"cases": args.cases, "refused": refused, "failed": failed, "slowest_seconds": round(slowest, 2)}


def one(target: Any, folder: Path) -> bool:
    """One case, under a clock. Warnings are errors, as in tests: whatever is worth saying is said in our words."""
    from tests.fuzz.targets import refused

    signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return refused(target, folder)
    finally:
        signal.alarm(0)


def _hangs(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} seconds")


def limit_memory() -> None:
    """From here on at most ROOM more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        limit = pages * os.sysconf("SC_PAGE_SIZE") + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def by_atheris(args: argparse.Namespace) -> None:
    """atheris' own loop on one target; does not return."""
    import atheris

    with atheris.instrument_imports(include=["lorakit"]):
        from tests.fuzz.targets import targets
    made = Path(tempfile.mkdtemp())
    (target,) = (t for t in targets(made) if t.name == args.only)
    corpus, scratch = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
    for i, name in enumerate(sorted(target.seeds)):
        (corpus / str(i)).write_bytes(bytes([i]) + target.seeds[name][:60_000])
    args.failures.mkdir(parents=True, exist_ok=True)

    def test(data: bytes) -> None:
        inside = scratch / "in"
        shutil.rmtree(inside, ignore_errors=True)
        inside.mkdir()
        target.put(data, inside)
        one(target, inside)

    options = [
        f"-runs={args.bytes}",
        "-max_len=65536",
        "-timeout=20",
        "-rss_limit_mb=8000",
        f"-artifact_prefix={args.failures}/",
        "-seed=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], test)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
