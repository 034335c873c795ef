"""Attach, switch, merge, save and load 1 to 256 adapters beside PEFT, and loading beside the limit: safetensors reading the same bytes.

    python -m benchmarks.adapter_io                      writes benchmarks/results/MACHINE-adapter-io.json
    python -m benchmarks.adapter_io --counts 1,16 --rounds 10 --json FILE

One lap of a contender does all of it for so many LoRAs (r 16, all seven linears) of one bf16 base, and takes them off again; the laps of
the contenders are interleaved, and ratios are paired by round. `limit` is `safetensors.torch.load_file` of every file and a sum of every
tensor. `growth` is the exponent of a fit of time against number: 1 is linear, 2 quadratic. `peak` is what loading adds to a fresh process
that holds the base, at its highest.

`attach` initializes each adapter, `switch` makes each the active one in turn, `merge` merges the last while all are attached, `save` writes
each to a folder: lorakit's also flushes the files to the disk and replaces a folder as a whole, PEFT's does neither. PEFT's time grows
with the square of the number, so that beyond --peer-limit adapted linears it is left out. PEFT's low_cpu_mem_usage concerns loading only.
"""

import argparse
import statistics
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import harness
from benchmarks.harness import Paired, Row, Target
from lorakit import attach, get_method
from lorakit.core.attach import Adapted, load

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPERATIONS = ("attach", "switch", "merge", "save", "load")
FEW = 448  # adapted linears, up to which every round is run; of more a tenth of them


@dataclass(frozen=True)
class Shape:
    """A Llama's."""

    hidden: int
    layers: int
    ffn: int
    vocab: int
    heads: int = 8


SHAPES = {"d 1024, 4 layers": Shape(1024, 4, 2816, 8192), "d 128, 32 layers": Shape(128, 32, 352, 512)}
SMOKE = {"d 32, 1 layer": Shape(32, 1, 64, 64, heads=4)}


def base(shape: Shape) -> LlamaForCausalLM:
    """The same weights every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        intermediate_size=shape.ffn,
    )  # fmt: skip
    model: LlamaForCausalLM = LlamaForCausalLM(config).to(torch.bfloat16).eval()  # type: ignore[arg-type]
    return model


# ------------------------------------------------------------------------------------------------------------------ contenders
class Contender(Protocol):
    """What one library does with `n` adapters a0, a1, … of its base."""

    def attach(self, n: int) -> None: ...
    def switch(self, n: int) -> None: ...
    def merge(self) -> None: ...
    def unmerge(self) -> None: ...
    def save(self, n: int, folder: Path) -> None: ...
    def load(self, n: int, folder: Path) -> None: ...
    def drop(self) -> None:
        """Take all adapters off the base."""


class Ours:
    """lorakit."""

    adapted: Adapted

    def __init__(self, model: LlamaForCausalLM, rank: int) -> None:
        self.model, self.method = model, get_method("lora", r=rank, alpha=2.0 * rank)

    def attach(self, n: int) -> None:
        self.adapted = attach(self.model, self.method, name="a0")
        for i in range(1, n):
            self.adapted.add(f"a{i}", self.method, seed=i)

    def switch(self, n: int) -> None:
        for i in range(n):
            self.adapted.switch(f"a{i}")

    def merge(self) -> None:
        self.adapted.merge()

    def unmerge(self) -> None:
        self.adapted.unmerge()

    def save(self, n: int, folder: Path) -> None:
        for i in range(n):
            self.adapted.save(folder / f"a{i}", f"a{i}")

    def load(self, n: int, folder: Path) -> None:
        self.adapted = load(self.model, folder / "a0", name="a0")
        for i in range(1, n):
            self.adapted.load(folder / f"a{i}", f"a{i}")

    def drop(self) -> None:
        self.adapted.detach()


class Theirs:
    """PEFT."""

    adapted: PeftModel

    def __init__(self, model: LlamaForCausalLM, rank: int, *, low: bool = False) -> None:
        self.model, self.low = model, low
        self.config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR)

    def attach(self, n: int) -> None:
        self.adapted = get_peft_model(self.model, self.config, adapter_name="a0")
        for i in range(1, n):
            self.adapted.add_adapter(f"a{i}", self.config)

    def switch(self, n: int) -> None:
        for i in range(n):
            self.adapted.set_adapter(f"a{i}")

    def merge(self) -> None:
        self.adapted.merge_adapter()

    def unmerge(self) -> None:
        self.adapted.unmerge_adapter()

    def save(self, n: int, folder: Path) -> None:
        for i in range(n):
            self.adapted.save_pretrained(str(folder), selected_adapters=[f"a{i}"], save_embedding_layers=False)

    def load(self, n: int, folder: Path) -> None:
        first = str(folder / "a0")
        self.adapted = PeftModel.from_pretrained(self.model, first, adapter_name="a0", low_cpu_mem_usage=self.low)
        for i in range(1, n):
            self.adapted.load_adapter(str(folder / f"a{i}"), adapter_name=f"a{i}", low_cpu_mem_usage=self.low)

    def drop(self) -> None:
        self.model = self.adapted.unload()
        self.model.__dict__.pop("peft_config", None)  # else PEFT warns of a second adapter


NAMES = ("lorakit", "peft", "peft, low_cpu_mem_usage")


def contender(name: str, shape: Shape, rank: int) -> Contender:
    """By its name, on a base of its own."""
    return Ours(base(shape), rank) if name == "lorakit" else Theirs(base(shape), rank, low=name != "peft")


# ------------------------------------------------------------------------------------------------------------------------ laps
def lap(who: Contender, n: int, folder: Path) -> Iterator[tuple[str, float]]:
    """(operation, seconds) of everything, once."""
    yield "attach", harness.clock(lambda: who.attach(n))
    yield "switch", harness.clock(lambda: who.switch(n))
    yield "merge", harness.clock(who.merge)
    who.unmerge()
    yield "save", harness.clock(lambda: who.save(n, folder))
    who.drop()
    yield "load", harness.clock(lambda: who.load(n, folder))
    who.drop()


def read(n: int, folder: Path) -> None:
    """Read the same bytes, and touch them, with safetensors alone."""
    for i in range(n):
        for tensor in safetensors.torch.load_file(folder / f"a{i}" / "adapter.safetensors").values():
            tensor.sum()


def laps(shape: Shape, names: Sequence[str], n: int, rounds: int, rank: int) -> dict[tuple[str, str], list[float]]:
    """Seconds by (contender, operation), a round each, after one that is not counted; turns are taken in alternating order."""
    who = {name: contender(name, shape, rank) for name in names}
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as place:
        for i in range(rounds + 1):
            for name in names if i % 2 else reversed(names):
                found = dict(lap(who[name], n, Path(place) / name))
                if name == "lorakit":
                    found["limit"] = harness.clock(lambda: read(n, Path(place) / "lorakit"))
                for operation, taken in found.items() if i else ():
                    seconds[name, operation].append(taken)
    return seconds


def peak(name: str, shape: dict[str, int], n: int, rank: int, folder: str) -> int:
    """Called in a fresh process: by how many bytes loading raises it. One adapter was loaded and dropped before, so that nobody pays for
    code that is read for the first time."""
    warnings.simplefilter("ignore")
    who = contender(name, Shape(**shape), rank)
    who.load(1, Path(folder))
    who.drop()
    return harness.peak_rise(lambda: who.load(n, Path(folder)))


def peaks(shape: Shape, names: Sequence[str], n: int, rank: int) -> dict[str, int]:
    """Of every contender."""
    found = {}
    for name in names:
        with tempfile.TemporaryDirectory() as place:
            who = contender(name, shape, rank)
            who.attach(n)
            who.save(n, Path(place))
            given = {"name": name, "shape": vars(shape), "n": n, "rank": rank, "folder": place}
            found[name] = harness.fresh("benchmarks.adapter_io", "peak", **given)
    return found


# ------------------------------------------------------------------------------------------------------------------------ rows
def growth(counts: Sequence[int], seconds: Sequence[float]) -> float | None:
    """The exponent p of seconds ~ countᵖ by least squares; None of a single count."""
    return harness.exponent(counts, seconds) if len(counts) > 1 else None


def rows_of(model: str, shape: Shape, args: argparse.Namespace) -> list[Row]:
    """A row for each count and operation."""
    rows: list[dict[str, Any]] = []
    for n in args.counts:
        linears = n * shape.layers * len(LINEAR)
        names = NAMES if linears <= args.peer_limit else NAMES[:1]
        rounds = args.rounds if linears <= FEW else max(2, args.rounds // 10)
        seconds, memory = laps(shape, names, n, rounds, args.rank), peaks(shape, names, n, args.rank)
        for operation in OPERATIONS:
            mine = seconds["lorakit", operation]
            row: dict[str, Any] = {
                "model": model,
                "operation": operation,
                "adapters": n,
                "rounds": rounds,
                "lorakit s": statistics.median(mine),
            }
            peers = {name: seconds[name, operation] for name in names[1:]} if operation == "load" else {}
            peers |= {"peft": seconds["peft", operation]} if len(names) > 1 else {}
            for name, theirs in peers.items():
                row |= {f"{name} s": statistics.median(theirs), f"speedup over {name}": Paired.of(theirs, mine).as_list()}
            if operation == "load":
                limit = seconds["lorakit", "limit"]
                row |= {"limit s": statistics.median(limit), "times the limit": Paired.of(mine, limit).as_list()}
                row |= {f"{name} peak MB": bytes_ / 1e6 for name, bytes_ in memory.items()}
            if len(names) == 1:
                row["note"] = f"PEFT left out: its time grows with the square, and more than {args.peer_limit} linears would take minutes"
            rows.append(row)
            print(f"{model}, {operation} {n}: " + ", ".join(f"{k} {v}" for k, v in row.items() if isinstance(v, float | list)), flush=True)
    return [*rows, *_growths(model, rows)]


def _growths(model: str, rows: Sequence[Row]) -> list[Row]:
    found: list[Row] = []
    for operation in OPERATIONS:
        of = [row for row in rows if row["operation"] == operation]
        measured = {name: [row for row in of if f"{name} s" in row] for name in NAMES}
        exponents = {name: growth([r["adapters"] for r in some], [r[f"{name} s"] for r in some]) for name, some in measured.items()}
        found.append({"growth of": operation, "on": model} | {f"{name} exponent": e for name, e in exponents.items() if e is not None})
    return found


def targets_of(rows: Sequence[Row]) -> list[Target]:
    """The issue's, on its own model: the first."""
    model = rows[0]["model"]
    load = [row for row in rows if row.get("model") == model and row.get("operation") == "load"]
    grown = next(row for row in rows if row.get("on") == model and row.get("growth of") == "load")
    found = []
    for row in load:
        median, low, high = row["times the limit"]
        limit = Paired(median, low, high, row["rounds"])
        name = f"load {row['adapters']} adapters / safetensors reads their bytes"
        found.append(Target.at_most(name, 2.0, limit, missed="reading is a sixth; the rest makes modules and parameters, 0.2 ms a linear"))
        lowest = min((v for k, v in row.items() if k.endswith("peak MB") and not k.startswith("lorakit")), default=None)
        ratio = None if lowest is None else row["lorakit peak MB"] / lowest
        found.append(Target.at_most(f"load {row['adapters']} adapters, peak / the lower of PEFT's", 1.0, ratio))
    return [*found, Target.at_most("growth of loading with the number of adapters", 1.1, grown.get("lorakit exponent"))]


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, run, publish."""
    parser = harness.arguments(__doc__)
    parser.add_argument("--counts", type=lambda text: [int(n) for n in text.split(",")], default=[1, 16, 64, 256])
    parser.add_argument("--peer-limit", type=int, default=3600, help="PEFT takes part up to so many adapted linears")
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args(argv)
    whole = harness.is_default(parser, args)
    warnings.simplefilter("ignore")  # PEFT's, of every save and every second adapter
    if args.smoke:
        args.counts, args.rounds, args.rank = [1, 2], 2, 2
    rows = [row for model, shape in (SMOKE if args.smoke else SHAPES).items() for row in rows_of(model, shape, args)]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    growths = ["growth of", "on", *(key for key in columns if key.endswith("exponent"))]
    tables = {
        "attach, switch, merge, save, load": ["operation", *(key for key in columns if key not in ("operation", *growths))],
        "growth with the number of adapters": growths,
    }
    harness.publish("adapter_io", args, rows, targets_of(rows), tables=tables, whole=whole)


if __name__ == "__main__":
    main()
