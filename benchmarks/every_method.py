"""Every registered method once on the same small task: what it reaches, what it trains, stores and costs, beside LoRA.

    python -m benchmarks.every_method                          all of them, some 25 minutes on two cores; a second start goes on
    python -m benchmarks.every_method --methods 'lora*'        those whose names match
    python -m benchmarks.every_method --smoke                  three methods, two steps

The bundled base, `builtin:tkinter/chat`, one seed, 40 steps of 4 windows of 128 tokens, a cosine without warm-up; a method's own
defaults but for what `OWN` says, since schedules of thousands of steps have to fit. The held-out rows are halved: on one half the learning
rate is chosen (of three, from the middle uphill), on the other the loss is taken. A method's runs are one process; in its first, memory is
watched. LoRA takes a few steps in every such process, and times are ratios to it.

    loss before, loss      nats a trained token on the second half, of the base and of the saved adapter as it is opened again
    trained                values that the optimizer has
    kB                     of the adapter's folder
    peak MB                by how much memory rose in the training loop above what it was before
    step / lora            median seconds of a step over the median of LoRA's in the same process

One seed, a small base, a short run: a difference of a few hundredths says nothing (LoRA's own over three seeds stands in its row), and
what a method promises for thousands of steps or for billions of parameters is not seen here.
"""

import datetime
import fnmatch
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import harness
from benchmarks.harness import Row
from lorakit import list_methods
from lorakit.data.builtin import load_name

DATA = "builtin:tkinter/chat"
RATES = (3e-3, 1e-2, 3e-2)
OWN_RATES: dict[str, tuple[float, ...]] = {
    "adalora": (1e-2, 3e-2, 1e-1),
    "bitfit": (1e-2, 3e-2, 1e-1),
    "compacter": (1e-2, 3e-2, 1e-1),
    "delta_lora": (1e-3, 3e-3, 1e-2),
    "dfo_lora": (1e-3,),
    "eva": (1e-3, 3e-3, 1e-2),
    "fourierft": (1e-2, 3e-2, 1e-1),
    "increlora": (1e-2, 3e-2, 1e-1),
    "inflora": (1e-2, 3e-2, 1e-1),
    "krona": (1e-2, 3e-2, 1e-1),
    "l_lora": (1e-2, 3e-2, 1e-1),
    "lora_fa": (1e-2, 3e-2, 1e-1),
    "lora_ga": (1e-3, 3e-3, 1e-2),
    "lora_prefix": (1e-3, 3e-3, 1e-2),
    "lora_xs": (1e-2, 3e-2, 1e-1),
    "loramoe": (1e-3, 3e-3, 1e-2),
    "loraplus": (3e-4, 1e-3, 3e-3),
    "prefix": (1e-4, 3e-4, 1e-3),
    "prompt_tuning": (1e-4, 3e-4, 1e-3),
    "rslora": (1e-3, 3e-3, 1e-2),
    "vera": (1e-2, 3e-2, 1e-1),
}
"""Where rates are on another scale: vectors and choices want large ones, rules that multiply the rate small ones. dfo_lora has none."""
OWN: dict[str, dict[str, Any]] = {
    "delta_lora": {"start": 10},
    "dfo_lora": {"spread": 0.1},
    "dropbp": {"length": 128},
    "eva": {"batches": 8},
    "fourierft": {"init": "zero"},
    "inflora": {"batches": 8},
    "laplace_lora": {"batches": 8},
    "lora_ga": {"batches": 8},
    "lora_xs": {"r": 16, "alpha": 16.0},
    "relora": {"period": 20, "warmup": 4},
    "vb_lora": {"vector_length": 32},
}
"""What differs from the defaults: schedules that fit 40 steps, sizes that divide the base's, fewer batches before the first step;
smaller jumps of dfo_lora's, whose "best so far" is chance where batches differ from step to step."""
TABLES = {
    "Every method on one small task": (
        "method", "loss before", "loss", "trained", "kB", "peak MB", "peak / lora", "step / lora", "rate", "settings",
    ),
    "The same LoRA with other seeds": ("seeds of", "lowest", "highest"),
}  # fmt: skip
FIRST = 2
"""Steps that are not timed: they allocate."""


@dataclass(frozen=True)
class Plan:
    """What all runs share."""

    folder: str
    steps: int = 40
    lora_steps: int = 10
    length: int = 128
    samples: int = 120
    seeds: int = 3

    def settings(self, method: str, rate: float, seed: int = 0) -> dict[str, Any]:
        """What is typed: the keys of `lorakit train`."""
        common = {
            "method": method, "train_data": DATA, "max_length": self.length, "max_steps": self.steps,
            "per_device_train_batch_size": 4, "learning_rate": rate, "save_steps": 0, "torch_compile": False,
        }  # fmt: skip
        return common | ({"seed": seed} if seed else {}) | OWN.get(method, {})


def command(settings: Mapping[str, Any]) -> str:
    """The same as one types it. It trains the same adapter; the loss that it prints is over all held-out rows."""
    words = [f"--{key.replace('_', '-')} {str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()]
    return " ".join(["lorakit train", *words, f"--output-dir out/{settings['method']}"])


def halves(plan: Plan) -> tuple[Path, Path]:
    """Files of the held-out rows: those that choose the rate, and those that are reported."""
    rows = load_name(DATA, "valid")[: plan.samples]
    paths = Path(plan.folder) / "choose.jsonl", Path(plan.folder) / "report.jsonl"
    for i, path in enumerate(paths):
        half = [row for k, row in enumerate(rows) if k // 2 % 2 == i]  # a function's two rows, its signature and its text, stay together
        path.write_text("".join(json.dumps(row) + "\n" for row in half), encoding="utf-8")
    return paths


# ------------------------------------------------------------------------------------------------------------------ one method
def measured(plan: dict[str, Any], method: str, rates: list[float]) -> dict[str, Any]:
    """Called in a fresh process: train at the rates, LoRA for a few steps between, and judge the best."""
    here = Plan(**plan)
    made: dict[float, Made] = {}

    def loss_at(rate: float) -> float:
        watch = not made
        made[rate] = trained(here, method, rate, watch=watch)
        if watch:
            made[0.0] = trained(here, "lora", 1e-2, steps=here.lora_steps)
        return made[rate].choice

    best = uphill(rates, loss_at)
    lora, runs = made.pop(0.0), list(made.values())
    loss = reported(here, made[best].out)
    step = statistics.median(second for run in runs for second in run.steps)
    return {
        "rate": best, "rates": sorted(made), "loss": loss, "trained": made[best].trained, "kB": folder_bytes(made[best].out) / 1e3,
        "peak MB": runs[0].rise / 1e6, "s a step": step, "step / lora": step / statistics.median(lora.steps),
    }  # fmt: skip


def uphill(rates: list[float], loss_at: Callable[[float], float]) -> float:
    """The best of ascending rates, from the middle on: the next larger, and the smaller ones only where that is worse."""
    start = len(rates) // 2
    found = {rates[start]: loss_at(rates[start])}
    for side in (rates[start + 1 :], rates[:start][::-1]):
        for rate in side:
            found[rate] = loss_at(rate)
            if found[rate] > min(found.values()):
                break
        if min(found, key=lambda rate: found[rate]) > rates[start]:
            break
    return min(found, key=lambda rate: found[rate])


@dataclass(frozen=True)
class Made:
    """One run: its adapter's folder, its loss on the rows that choose, seconds of its steps, and how memory rose."""

    out: Path
    choice: float
    trained: int
    steps: list[float]
    rise: int


def trained(plan: Plan, method: str, rate: float, *, steps: int | None = None, seed: int = 0, watch: bool = False) -> Made:
    """Train once."""
    from lorakit.core.errors import LorakitError
    from lorakit.train.config import make_config
    from lorakit.train.run import Run
    from lorakit.train.train import train

    out = Path(tempfile.mkdtemp(prefix=f"{method}-", dir=plan.folder))
    settings = plan.settings(method, rate, seed) | ({"max_steps": steps} if steps else {})
    config = make_config({**settings, "eval_data": str(Path(plan.folder) / "choose.jsonl"), "report_samples": 0, "output_dir": str(out)})
    seconds: list[float] = []
    rise = [0]
    loop, step = Run.train, Run._step

    def timed(run: Run, *args: Any) -> dict[str, Any]:
        began = time.perf_counter()
        row = step(run, *args)
        seconds.append(time.perf_counter() - began)
        return row

    def watched(run: Run) -> dict[str, float]:
        final: list[dict[str, float]] = []
        rise[0] = harness.peak_rise(lambda: final.append(loop(run)))
        return final[0]

    with mock.patch.object(Run, "_step", timed), mock.patch.object(Run, "train", watched if watch else loop):
        try:
            result = train(config, quiet=True)
        except LorakitError as error:
            if "lower learning_rate" not in str(error):  # a rate that diverges is the worst, no failure
                raise
            return Made(out, float("inf"), 0, seconds[FIRST:] or [float("nan")], rise[0])
    return Made(out, result.final["loss"], result.trainable, seconds[FIRST:] or seconds, rise[0])


def reported(plan: Plan, out: Path | None) -> float:
    """Nats a trained token on the rows that are reported, of an adapter, or of the base."""
    from lorakit.serve.open import open_adapter, open_base
    from lorakit.serve.score import score

    opened = open_base("bundled") if out is None else open_adapter(out / "adapter")
    return score(opened, str(Path(plan.folder) / "report.jsonl"), whole=True, max_length=plan.length)["loss"]


def before(plan: dict[str, Any]) -> float:
    """Called in a fresh process: the base's loss."""
    return reported(Plan(**plan), None)


def by_seed(plan: dict[str, Any], rate: float) -> list[float]:
    """Called in a fresh process: LoRA's losses under other seeds, at one rate."""
    here = Plan(**plan)
    return [reported(here, trained(here, "lora", rate, seed=seed).out) for seed in range(1, here.seeds)]


def folder_bytes(out: Path) -> int:
    """Of a finished run's adapter."""
    return sum(path.stat().st_size for path in (out / "adapter").rglob("*") if path.is_file())


# ---------------------------------------------------------------------------------------------------------------- all of them
class Kept:
    """Rows that an interrupted run left, beside the result file: one JSON object a line. Those of another plan or version are not used."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path = path
        self.mine = {"plan": {**vars(plan), "folder": ""}, "versions": harness.versions(), "own": OWN, "rates": OWN_RATES}
        self.mine = json.loads(json.dumps(self.mine))
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        found = [json.loads(line) for line in lines]
        self.rows: dict[str, dict[str, Any]] = {one["row"]["method"]: one["row"] for one in found if one["of"] == self.mine}

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Keep a row."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"of": self.mine, "row": row}) + "\n")
        self.rows[row["method"]] = row
        return row


def rows(plan: Plan, names: list[str], kept: Kept) -> Iterator[Row]:
    """A row a method, LoRA first."""
    base = harness.alone("benchmarks.every_method", "before", plan=vars(plan))
    for i, name in enumerate(sorted(names, key=lambda name: name != "lora")):
        began = time.perf_counter()
        if name not in kept.rows:
            rates = list(OWN_RATES.get(name, RATES))
            found = harness.alone("benchmarks.every_method", "measured", plan=vars(plan), method=name, rates=rates)
            facts = {"method": name, "loss before": base, **found, "settings": ", ".join(f"{k} {v}" for k, v in OWN.get(name, {}).items())}
            facts |= {"command": command(plan.settings(name, found["rate"])), "date": datetime.date.today().isoformat()}
            kept.add(facts)
        row = kept.rows[name]
        lora = kept.rows.get("lora")
        print(
            f"{i + 1}/{len(names)} {name}: {base:.3f} -> {row['loss']:.3f} at {row['rate']:g}, {time.perf_counter() - began:.0f} s",
            flush=True,
        )
        yield row | {"peak / lora": row["peak MB"] / lora["peak MB"] if lora and lora["peak MB"] else None}
    if "lora" in names and plan.seeds > 1:
        lora = kept.rows["lora"]
        others = harness.alone("benchmarks.every_method", "by_seed", plan=vars(plan), rate=lora["rate"])
        yield {"seeds of": f"lora, {plan.seeds} seeds", "lowest": min([lora["loss"], *others]), "highest": max([lora["loss"], *others])}


def main(argv: list[str] | None = None) -> None:
    """Measure and publish."""
    parser = harness.arguments(__doc__, rounds=1)
    parser.add_argument("--methods", default="*", help="names, with wildcards, by commas")
    parser.add_argument("--steps", type=int, default=Plan.steps)
    args = parser.parse_args(argv)
    patterns = ["lora", "dora", "bitfit"] if args.smoke and args.methods == "*" else args.methods.split(",")
    names = [name for name in list_methods() if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(folder, 2, 2, 64, 8, 2) if args.smoke else Plan(folder, args.steps)
        halves(plan)
        partial = args.json.with_suffix(".rows.jsonl") if args.json else harness.RESULTS / "every-method.rows.jsonl"
        if args.smoke and not args.json:
            partial = Path(folder) / "rows.jsonl"
        kept = Kept(partial, plan)
        found = list(rows(plan, names, kept))
    harness.publish("every_method", args, found, [], tables=TABLES, whole=harness.is_default(parser, args))
    if args.json or harness.is_default(parser, args):
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
