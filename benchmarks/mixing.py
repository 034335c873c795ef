"""Every mixer on adapters of real tasks: how much of each adapter's own gain is left, beside PEFT's mixers on the same adapters.

    python -m benchmarks.mixing --adapters FOLDER      adapters are trained where FOLDER has none, a LoRA (r 16) for every task and seed

Tasks are the eight built-in ones (code of a package that the bundled base never saw), and two that are opposed: the same questions,
answered in capitals and in small letters. A group is some tasks whose adapters are mixed; which two and four differs from seed to seed.

    loss / own     the held-out loss of a mixed task, over that of its own adapter; the mean over the group's tasks
    kept           Σ (base − mixed) / Σ (base − own) of these losses: 1 is as good as the own adapters, 0 no better than the base
    unseen         the same of those of the eight tasks that are not in the group
    at λ           the mixed update times λ, the best of LAMBDAS by the loss on other held-out data of the group's tasks

Every mixer has its own defaults, and its own weights: 1/N, or 1 where it takes a mean or has a scale. PEFT's get the weights and the
density of ours, and so do those of mergekit, which takes part where it is installed. What peers make is read out and judged by the same
function. Adapters have starts of their own, as adapters of different makers have. Figures are medians over the seeds, with their range.
`CPU s` is mixing alone, all threads together (mergekit's with reading and writing whole models); `MB` are fp32.
"""

import argparse
import importlib.util
import json
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import ROOT, Row, Target
from lorakit.adapters.io import load_adapter
from lorakit.adapters.mix import MIXERS, mix
from lorakit.adapters.peft_write import to_peft
from lorakit.adapters.plain import plain_lora
from lorakit.core.adapter import Adapter
from lorakit.core.attach import attach_adapter
from lorakit.core.delta import Factors
from lorakit.data.builtin import TASKS, load
from lorakit.data.row import Row as Example
from lorakit.data.split import Split
from lorakit.serve.open import open_adapter
from lorakit.serve.statistics import collect, load_statistics, save_statistics
from lorakit.train.config import BUNDLED, make_config
from lorakit.train.dataset import Side, prepare
from lorakit.train.evaluate import evaluate
from lorakit.train.rows import Rows
from lorakit.train.source_model import bundled_base, load_model, load_tokenizer
from lorakit.train.train import train

OPPOSED: Mapping[str, Callable[[str], str]] = {"capitals": str.upper, "small letters": str.lower}
LAMBDAS = (0.5, 1.0, 2.0)
Stats = Mapping[str, Tensor]


# -------------------------------------------------------------------------------------------------------------------- the tasks
def rows_of(task: str, split: Split) -> list[Example]:
    """One side of a task."""
    if task not in OPPOSED:
        return load(task, "code", split)
    asked = [row["messages"] for row in load("all", "chat", split) if row["messages"][0]["content"].startswith("What does")]
    return [{"messages": [question, {**answer, "content": OPPOSED[task](answer["content"])}]} for question, answer in asked]


@dataclass(frozen=True)
class Made:
    """A trained adapter, and what mixers that need statistics ask of its task."""

    folder: Path

    @property
    def adapter(self) -> Adapter:
        """As it was saved."""
        return load_adapter(self.folder / "run" / "adapter")

    def stats(self, kind: str) -> Stats:
        """The Gram matrices or the Fisher information."""
        return load_statistics(self.folder / f"{kind}.safetensors")


def made(task: str, seed: int, args: argparse.Namespace) -> Made:
    """The adapter of a task, trained if the folder lacks it. Its start and its order are its own."""
    folder = Path(args.adapters) / f"{task.replace(' ', '-')}-{seed}-r{args.rank}-{args.steps}-steps"
    found = Made(folder)
    if (folder / "done").exists():
        return found
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid"):
        text = "".join(json.dumps(row) + "\n" for row in rows_of(task, split))  # type: ignore[arg-type]
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    number = [*TASKS, *OPPOSED].index(task)
    data = {"train_data": str(folder / "train.jsonl"), "eval_data": str(folder / "valid.jsonl"), "max_eval_samples": 4}
    settings = {"r": args.rank, "alpha": 2.0 * args.rank, "seed": 100 * seed + number, "max_steps": args.steps, "learning_rate": 1e-3}
    train(
        make_config({**data, **settings, "dtype": "bfloat16", "torch_compile": False, "save_steps": 0, "output_dir": str(folder / "run")}),
        quiet=True,
    )
    opened = open_adapter(folder / "run" / "adapter")
    for kind, files in (("gram", 6), ("fisher", 3)):
        limit = files if task in TASKS else 16 * files
        save_statistics(collect(opened, str(folder / "train.jsonl"), kind, whole=True, limit=limit), folder / f"{kind}.safetensors")
    (folder / "done").touch()
    return found


class Judge:
    """The base, and some held-out windows of every task: for the figures, and others for the choice of λ."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.model, tokenizer = load_model(BUNDLED, dtype="bfloat16"), load_tokenizer(BUNDLED)
        self.sides: dict[tuple[str, bool], Side] = {}
        for task in (*args.tasks, *OPPOSED):
            rows = rows_of(task, "valid")
            side = prepare(Rows(rows, rows), make_config({}), tokenizer, packing=True).valid
            for tuning, n in ((False, args.windows), (True, args.tuning_windows)):
                windows = side.items[tuning::2]
                self.sides[task, tuning] = replace(side, items=windows[:: max(1, len(windows) // n)][:n])

    def losses(self, adapter: Adapter | None, tasks: Sequence[str], *, tuning: bool = False) -> dict[str, float]:
        """By task, in nats a token."""
        if adapter is None:
            return {task: self._loss(task, tuning) for task in tasks}
        adapted = attach_adapter(self.model, adapter)
        try:
            return {task: self._loss(task, tuning) for task in tasks}
        finally:
            adapted.detach()

    def _loss(self, task: str, tuning: bool) -> float:
        return evaluate(self.model, self.sides[task, tuning], batch_size=4)["loss"]


def scaled(adapter: Adapter, factor: float) -> Adapter:
    """Its update times a factor."""
    factors = {name: f._replace(B=f.B * factor) for name, f in adapter.factors().items()}
    return plain_lora(adapter.sites, factors, adapter.meta)


# ---------------------------------------------------------------------------------------------------------------- the contenders
@dataclass(frozen=True)
class Group:
    """Adapters that are mixed."""

    name: str
    seed: int
    tasks: tuple[str, ...]
    adapters: Sequence[Adapter]
    made: Sequence[Made]


@dataclass(frozen=True)
class Way:
    """One way of mixing: by whom, and a function of the group."""

    by: str
    how: str
    space: str
    mix: Callable[[Group], Adapter]


ELEMENTWISE = [name for name, m in MIXERS.items() if not m.rule().linear and m.rule().needs is None]
IN_FACTORS = {"factor": ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"), "factor:both": ("linear",)}


def our_ways(group: Group) -> Iterator[Way]:
    """Every mixer in delta space; those that work entry by entry in the aligned ones; PEFT's and LoRAHub's forms in factor space."""
    for name in MIXERS:
        if name != "slerp" or len(group.tasks) == 2:
            yield _ours(name, "delta")
    for space in ("core", "knots"):
        yield from (_ours(name, space) for name in ELEMENTWISE)
    for space, names in IN_FACTORS.items():
        yield from (_ours(name, space) for name in names)


def _ours(name: str, space: str) -> Way:
    kind = MIXERS[name].rule().needs

    def run(group: Group) -> Adapter:
        stats = None if kind is None else [one.stats(kind) for one in group.made]
        return mix(group.adapters, name, space=space, seed=group.seed, stats=stats)

    return Way("lorakit", name, space, run)


PEFTS = (
    "cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd", "magnitude_prune",
    "magnitude_prune_svd",
)  # fmt: skip
DENSITY = 0.2


class Peft:
    """The group's adapters in PEFT's hands: loaded once, mixed in every way of its own."""

    def __init__(self, group: Group, folder: Path) -> None:
        import peft

        self.names = [f"a{i}" for i in range(len(group.tasks))]
        for name, adapter in zip(self.names, group.adapters, strict=True):
            to_peft(adapter, folder / name)
        base = load_model(BUNDLED)
        self.model: Any = peft.PeftModel.from_pretrained(base, folder / self.names[0], adapter_name=self.names[0])  # type: ignore[arg-type]
        for name in self.names[1:]:
            self.model.load_adapter(folder / name, adapter_name=name)

    def ways(self) -> Iterator[Way]:
        """All of them."""
        for how in PEFTS:
            space = "ΔW" if how == "cat" or how.endswith("svd") else "A and B"
            yield Way("PEFT", how, space, partial(self._mixed, how))

    def _mixed(self, how: str, group: Group) -> Adapter:
        torch.manual_seed(group.seed)
        n = len(self.names)
        weights = [1.0 if "ties" in how else 1 / n] * n
        density = {} if how in ("cat", "linear", "svd") else {"density": DENSITY}
        self.model.add_weighted_adapter(self.names, weights, "mixed", combination_type=how, **density)
        factors = {name: Factors(*pair) for name, pair in self._read("mixed")}
        self.model.delete_adapter("mixed")
        return plain_lora(group.adapters[0].sites, factors, group.adapters[0].meta)

    def _read(self, name: str) -> Iterator[tuple[str, tuple[Tensor, Tensor, float]]]:
        for path, module in self.model.named_modules():
            if name in getattr(module, "lora_A", {}):
                A, B = (side[name].weight.detach().float().clone() for side in (module.lora_A, module.lora_B))
                yield path.removeprefix("base_model.model."), (A, B, float(module.scaling[name]))


MERGEKITS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear", "slerp")


class Mergekit:
    """The group's adapters in mergekit's hands, where it is installed: each merged into the base, and whole models mixed."""

    def __init__(self, group: Group, folder: Path) -> None:
        self.base, self.folder = str(bundled_base()), folder
        self.places = [self._merged(adapter, folder / f"m{i}") for i, adapter in enumerate(group.adapters)]

    def ways(self) -> Iterator[Way]:
        """All of them; slerp knows two models."""
        for how in MERGEKITS:
            if how != "slerp" or len(self.places) == 2:
                yield Way("mergekit", how, "W", partial(self._mixed, how))

    def _merged(self, adapter: Adapter, folder: Path) -> str:
        attach_adapter(load_model(BUNDLED), adapter).merge_and_unload().save_pretrained(folder)  # type: ignore[operator]
        return str(folder)

    def _mixed(self, how: str, group: Group) -> Adapter:
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        ours = "svd" if how == "slerp" else how
        weight = 1.0 if MIXERS[ours].unit else 1 / len(self.places)
        parameters: dict[str, Any] = {"weight": weight} | ({"density": DENSITY} if "density" in MIXERS[ours].options else {})
        config: dict[str, Any] = {"merge_method": how, "dtype": "float32", "base_model": self.base}
        if how == "linear":
            del config["base_model"]
        if how == "slerp":
            config |= {"base_model": self.places[0], "models": [{"model": place} for place in self.places], "parameters": {"t": 0.5}}
        else:
            config["models"] = [{"model": place, "parameters": parameters} for place in self.places]
        if how == "task_arithmetic":
            config["parameters"] = {"lambda": MIXERS[how].options["scale"]}
        out = self.folder / how
        options = MergeOptions(random_seed=group.seed, copy_tokenizer=False, write_model_card=False, quiet=True)
        run_merge(MergeConfiguration.model_validate(config), str(out), options)
        before, after = (read_weights(Path(place)) for place in (self.base, str(out)))
        sites = group.adapters[0].sites
        changes = {site.name: after[f"{site.name}.weight"].float() - before[f"{site.name}.weight"].float() for site in sites}
        return plain_lora(sites, {name: as_factors(change) for name, change in changes.items()}, group.adapters[0].meta)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model's folder."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def as_factors(W: Tensor) -> Factors:
    """A change of no low rank, exactly."""
    wide = W.shape[1] >= W.shape[0]
    return Factors(W, torch.eye(len(W)), 1.0) if wide else Factors(torch.eye(W.shape[1]), W, 1.0)


# -------------------------------------------------------------------------------------------------------------------- one mixture
@dataclass(frozen=True)
class Known:
    """What a seed's mixtures are compared with, by task."""

    base: Mapping[str, float]
    own: Mapping[str, float]

    def kept(self, losses: Mapping[str, float], tasks: Sequence[str]) -> float | None:
        """The share of the own adapters' gain."""
        gains, own = (sum(self.base[task] - found[task] for task in tasks) for found in (losses, self.own))
        return gains / own if tasks else None


def judged(way: Way, group: Group, judge: Judge, known: Known) -> dict[str, Any]:
    """One mixture's figures."""
    began = time.process_time()
    mixed = way.mix(group)
    seconds = time.process_time() - began
    unseen = [task for task in known.own if task not in (*group.tasks, *OPPOSED)] if group.tasks != tuple(OPPOSED) else []
    plain = judge.losses(mixed, (*group.tasks, *unseen))
    tried = {factor: _mean(judge.losses(scaled(mixed, factor), group.tasks, tuning=True)) for factor in LAMBDAS}
    best = min(tried, key=tried.__getitem__)
    tuned = plain if best == 1 else judge.losses(scaled(mixed, best), group.tasks)
    return {
        "loss / own": statistics.mean(plain[task] / known.own[task] for task in group.tasks),
        "kept": known.kept(plain, group.tasks),
        "unseen": known.kept(plain, unseen),
        "λ": best,
        "kept at λ": known.kept(tuned, group.tasks),
        "CPU s": seconds,
        "rank": max(len(f.A) for f in mixed.factors().values()),
        "MB": sum(t.nbytes for t in mixed.tensors.values()) / 1e6,
        "cut off": mixed.meta.get("mix", {}).get("lost", {}).get("total"),
        **{task: known.kept(tuned, [task]) for task in group.tasks},
    }


def _mean(losses: Mapping[str, float]) -> float:
    return statistics.mean(losses.values())


# ------------------------------------------------------------------------------------------------------------------- all of them
def peers() -> list[type[Peft] | type[Mergekit]]:
    """Those that are installed."""
    return [Peft, *([Mergekit] if importlib.util.find_spec("mergekit") else [])]


def groups(seed: int, args: argparse.Namespace) -> Iterator[Group]:
    """Two, four and eight of the tasks, and the two that are opposed."""
    shuffled = random.Random(seed).sample(args.tasks, len(args.tasks))
    chosen = {str(n): tuple(shuffled[:n]) for n in args.counts} | {"2 opposed": tuple(OPPOSED)}
    for name, tasks in chosen.items():
        some = [made(task, seed, args) for task in tasks]
        yield Group(name, seed, tasks, [one.adapter for one in some], some)


Key = tuple[str, str, str, str]
"""(group, by, how, space)."""


def of_seed(seed: int, judge: Judge, args: argparse.Namespace) -> Iterator[tuple[Key, dict[str, Any]]]:
    """All mixtures of a seed, with their figures; those that the folder has from an earlier run are taken from it."""
    every = (*args.tasks, *OPPOSED)
    known = Known(judge.losses(None, every), {task: judge.losses(made(task, seed, args).adapter, [task])[task] for task in every})
    print(f"seed {seed}: base {dict(known.base)}, own {dict(known.own)}", flush=True)
    kept = Path(args.adapters) / f"found-{seed}-r{args.rank}-{args.steps}-steps-{args.windows}-{args.tuning_windows}.jsonl"
    earlier = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()] if kept.exists() else []
    before: dict[Key, dict[str, Any]] = {tuple(key): found for key, found in earlier}
    for group in groups(seed, args):
        with tempfile.TemporaryDirectory() as folder:
            for way in [*our_ways(group), *(way for who in peers() for way in who(group, Path(folder)).ways())][:: args.every]:
                key = (group.name, way.by, way.how, way.space)
                if key not in before:
                    before[key] = judged(way, group, judge, known)
                    print(f"seed {seed}, {group.name}, {way.by} {way.how} in {way.space}: {_brief(before[key])}", flush=True)
                    with kept.open("a", encoding="utf-8") as file:
                        file.write(json.dumps([key, before[key]]) + "\n")
                yield key, before[key]


def _brief(found: Mapping[str, Any]) -> str:
    shown = ("kept", "kept at λ", "unseen", "CPU s")
    return ", ".join(f"{key} {found[key]:.3f}" for key in shown if found[key] is not None)


RATIOS = ("loss / own", "kept", "unseen", "kept at λ")
MEDIANS = ("λ", "CPU s", "rank", "MB", "cut off")


def summarized(key: Key, runs: Sequence[Mapping[str, Any]]) -> Row:
    """One row over the seeds."""
    row: dict[str, Any] = dict(zip(("tasks", "by", "mixer", "space"), key, strict=True))
    for name in RATIOS:
        values = sorted(run[name] for run in runs if run[name] is not None)
        row[name] = [round(v, 4) for v in (statistics.median(values), values[0], values[-1])] if values else None
    for name in MEDIANS:
        values = [run[name] for run in runs if run[name] is not None]
        row[name] = statistics.median(values) if values else None
    for task in (*TASKS, *OPPOSED):
        values = [run[task] for run in runs if task in run]
        row[task] = round(statistics.mean(values), 3) if values and key[0] in ("8", "2 opposed") else None
    return row


def targets_of(rows: Sequence[Row]) -> list[Target]:
    """Mixed on ΔW is at least as good as what PEFT makes."""
    found = []
    for name in dict.fromkeys(row["tasks"] for row in rows):
        ours, theirs = ([row for row in rows if row["tasks"] == name and row["by"] == by] for by in ("lorakit", "PEFT"))
        best = [max(some, key=lambda row: row["kept at λ"][0], default=None) for some in (ours, theirs)]
        why = " against ".join(f"{row['mixer']} ({row['space']})" for row in best if row)
        gap = None if None in best else best[0]["kept at λ"][0] - best[1]["kept at λ"][0]  # type: ignore[index]
        found.append(Target.at_least(f"{name} tasks: share of the own gain that the best mixer keeps, less PEFT's best", 0.0, gap, why))
        same = [
            next((row for row in some if row["mixer"] == "linear" and row["space"] in ("delta", "A and B")), None)
            for some in (ours, theirs)
        ]
        gap = None if None in same else same[0]["kept"][0] - same[1]["kept"][0]  # type: ignore[index]
        found.append(Target.at_least(f"{name} tasks: share of the own gain that `linear` at 1/N keeps, less that of PEFT's", 0.0, gap))
    return found


def plot(rows: Sequence[Row], png: Path) -> None:
    """A panel a group: the share of the own gain that is kept, at the default scale and at the best."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["tasks"] for row in rows))
    figure = Figure(figsize=(5.2 * len(names), 9), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        some = sorted((row for row in rows if row["tasks"] == name), key=lambda row: row["kept at λ"][0])
        for y, row in enumerate(some):
            color = {"lorakit": "C0", "PEFT": "C1"}.get(row["by"], "C2")
            middle, low, high = row["kept at λ"]
            axes.plot([low, high], [y, y], color=color, linewidth=1)
            axes.plot(middle, y, "o", color=color, markersize=5)
            axes.plot(row["kept"][0], y, "o", color=color, markersize=5, fillstyle="none")
        labels = [f"{row['mixer']}, {row['space']}" if row["by"] == "lorakit" else f"{row['by']} {row['mixer']}" for row in some]
        axes.set_yticks(range(len(some)), labels, fontsize=7)
        axes.axvline(0, color="gray", linewidth=0.8)
        axes.set_xlim(-0.5, 1.1)
        axes.set(xlabel="share of the own adapters' gain", title=f"{name} tasks")
    figure.suptitle("filled: at the best scale, with the range over three seeds; open: at the default scale (left of −0.5: not shown)")
    figure.savefig(png, dpi=110, format="png")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, run, publish."""
    parser = harness.arguments(__doc__, rounds=3)
    parser.add_argument("--adapters", default=str(Path(tempfile.gettempdir()) / "lorakit-mixing"), help="folder of the trained adapters")
    parser.add_argument("--tasks", type=lambda text: tuple(text.split(",")), default=TASKS)
    parser.add_argument("--counts", type=lambda text: [int(n) for n in text.split(",")], default=[2, 4, 8])
    parser.add_argument("--steps", type=int, default=60, help="of training, of 8 windows of 512 tokens")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--windows", type=int, default=4, help="held-out ones of each task")
    parser.add_argument("--tuning-windows", type=int, default=2, help="other held-out ones of each task, for λ")
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in text.split(",")], help="only these; by default 0 to --rounds")
    parser.add_argument("--every", type=int, default=1, help="only each n-th way of mixing")
    args = parser.parse_args(argv)
    whole = harness.is_default(parser, argparse.Namespace(**{**vars(args), "adapters": parser.get_default("adapters")}))
    warnings.simplefilter("ignore")  # PEFT's, of every second adapter
    if args.smoke:
        room = tempfile.TemporaryDirectory()  # its adapters are no adapters
        args.adapters = room.name
        args.tasks, args.counts, args.steps, args.rank, args.windows, args.rounds, args.every = TASKS[:3], [2], 1, 2, 1, 1, 9
    judge, runs = Judge(args), dict[Key, list[dict[str, Any]]]()
    for seed in args.seeds or range(args.rounds):
        for key, found in of_seed(seed, judge, args):
            runs.setdefault(key, []).append(found)
    rows = [summarized(key, some) for key, some in runs.items()]
    columns = ["mixer", "by", "space", *RATIOS, *MEDIANS]
    tables = {"all mixers": ["tasks", *columns], "kept at λ, task by task": ["tasks", "mixer", "by", "space", *TASKS, *OPPOSED]}
    args.adapters = None
    path = harness.publish("mixing", args, rows, targets_of(rows), tables=tables, whole=whole)
    if path is not None and not args.smoke and whole:
        plot(rows, ROOT / "docs" / "mixing.png")


if __name__ == "__main__":
    main()
