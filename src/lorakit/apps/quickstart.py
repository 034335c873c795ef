"""Quickstart: LoRA on the bundled base and a task held out of its pre-training, against full fine-tuning and two controls.

Every arm sees the same batches and gets the better of three learning rates. The adapters sit below the head: LoRA adapts the linear
layers of the blocks, so that what the head alone or the norms alone can do is a fair control.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lorakit.adapters.io import save_adapter
from lorakit.core.adapter import Adapter
from lorakit.core.attach import attach
from lorakit.core.errors import MissingExtra
from lorakit.core.method import Method, get_method
from lorakit.data.row import Row, shape_of
from lorakit.data.tokenize import trained_bytes
from lorakit.serve.generate import complete, stream_chat
from lorakit.serve.merge import Verdict, merge
from lorakit.serve.open import Opened, open_adapter
from lorakit.train.config import BUNDLED, TrainConfig, make_config
from lorakit.train.curve import draw_curve
from lorakit.train.dataset import TrainData, prepare
from lorakit.train.distributed import World, world
from lorakit.train.evaluate import evaluate, to
from lorakit.train.memory import estimate
from lorakit.train.metrics import forward_loss
from lorakit.train.rows import read_rows
from lorakit.train.run import Run
from lorakit.train.source_model import load_model, load_tokenizer
from lorakit.train.train import describe_run, seed_everything

TASK = "builtin:tkinter/chat"


@dataclass(frozen=True)
class Arm:
    """One way to train, and its learning rates."""

    name: str
    method: Callable[[], Method]
    rates: tuple[float, ...]


@dataclass
class Outcome:
    """An arm's trials {rate: loss}, and the best one's figures."""

    arm: Arm
    trials: dict[float, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    params: int = 0
    memory: int = 0
    seconds: float = 0.0
    adapter: Adapter | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """The best trial's held-out loss."""
        return min(self.trials.values())


def arms(rank: int) -> list[Arm]:
    """LoRA, full fine-tuning, head only, norms only."""
    return [
        Arm(f"LoRA r={rank}", lambda: get_method("lora", r=rank, alpha=4.0 * rank), (5e-3, 1e-2, 2e-2)),
        Arm("full fine-tuning", lambda: Method(None, unfreeze=("*",)), (7e-4, 1.5e-3, 3e-3)),
        Arm("head only", lambda: Method(None, unfreeze=("lm_head",)), (1e-3, 2e-3, 4e-3)),
        Arm("norms only", lambda: Method(None, unfreeze=("*norm*",)), (1e-2, 3e-2, 6e-2)),
    ]


def quickstart(
    out: str | Path, *, task: str = TASK, steps: int = 50, rank: int = 4, eval_windows: int = 48, console: Console | None = None
) -> dict[str, Any]:
    """Run all arms, print the table, save the best LoRA adapter, merge it with verification, and write report.json and curve.png to
    `out`."""
    console = console or Console(width=None if sys.stdout.isatty() else 140)
    began = time.perf_counter()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    config = make_config({
        "train_data": task, "max_length": 256, "per_device_train_batch_size": 4, "max_steps": steps,
        "save_steps": 0, "lr_scheduler_type": "linear",
        "warmup_steps": min(5, steps), "weight_decay": 0.0,
    })  # fmt: skip
    seed_everything(config.seed)
    tokenizer, model, here = load_tokenizer(BUNDLED), load_model(BUNDLED), world()
    rows = read_rows(config)
    data = shortened(prepare(rows, config, tokenizer, packing=True), tokenizer, eval_windows)
    console.print(
        f"base: {sum(p.numel() for p in model.parameters()):,} parameters; task {task}: {data.train.account}; "
        f"{steps} steps of 4 windows a trial"
    )
    base = evaluate(model, data.valid, batch_size=16)
    outcomes = []
    for arm in arms(rank):
        outcomes.append(run_arm(arm, model, data, config, here, describe_run(config, data, tokenizer)))
        tried = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in outcomes[-1].trials.items())
        console.print(f"  {arm.name}: held-out loss by learning rate {{{tried}}}, {outcomes[-1].seconds:.0f} s", highlight=False)
    lora = outcomes[0]
    assert lora.adapter is not None
    folder = save_adapter(lora.adapter, out / "adapter")
    opened = open_adapter(folder)
    completions = [compare(opened, row) for row in rows.valid[:: max(1, len(rows.valid) // 3)][:3]]
    verdict = merge(folder, _fresh(out / "merged"))
    assert verdict is not None
    report = summary(base, outcomes, verdict, folder, completions, time.perf_counter() - began)
    (out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    show(console, base, outcomes, report, out)
    try:
        draw_curve(lora.history, out / "curve.png")
    except MissingExtra as error:
        console.print(f"no curve drawn: {error}")
    return report


def run_arm(arm: Arm, model: Any, data: TrainData, config: TrainConfig, here: World, meta: dict[str, Any]) -> Outcome:
    """Train once per rate on the very same model object: detaching puts every bit back."""
    outcome, began = Outcome(arm), time.perf_counter()
    for rate in arm.rates:
        seed_everything(config.seed)
        adapted = attach(model, arm.method(), seed=config.seed)
        adapted.meta = dict(meta)
        run = Run(adapted, data, config.model_copy(update={"learning_rate": rate}), here, out=None, quiet=True)
        if not outcome.params:
            outcome.params = run.table.numel()
            batch = to(data.train.collate(data.train.items[: config.per_device_train_batch_size]), here.device)
            outcome.memory = estimate(model.train(), batch, optimizer="adamw", loss=lambda m, b: forward_loss(m, b)[0]).total
        figures = run.train()
        outcome.trials[rate] = figures["loss"]
        if figures["loss"] <= outcome.loss:
            outcome.figures, outcome.history = figures, run.history
            adapted.meta |= {"metrics": figures, "steps": run.at.step, "learning_rate": rate}
            outcome.adapter = adapted.state() if adapted.methods["default"].recipe else None
        adapted.detach()
    outcome.seconds = time.perf_counter() - began
    return outcome


def shortened(data: TrainData, tokenizer: Any, windows: int) -> TrainData:
    """The data with a held-out side of at most `windows` windows, its bytes counted anew."""
    items = data.valid.items[:windows]
    return replace(data, valid=replace(data.valid, items=items, n_bytes=trained_bytes(tokenizer, items, shifted=True)))


def summary(
    base: dict[str, float], outcomes: list[Outcome], verdict: Verdict, folder: Path, completions: list[dict[str, str]], seconds: float
) -> dict[str, Any]:
    """What report.json holds."""
    lora, full = outcomes[0], outcomes[1]
    gap = base["loss"] - full.loss
    rows = {
        o.arm.name: {
            "loss": o.loss, "bits_per_byte": o.figures["bits_per_byte"], "trainable_params": o.params,
            "seconds": o.seconds, "memory": o.memory,
            "trials": {f"{r:g}": x for r, x in o.trials.items()}, "gap_closed": (base["loss"] - o.loss) / gap,
            "gain_per_million_params": (base["loss"] - o.loss) / o.params * 1e6,
        } for o in outcomes
    }  # fmt: skip
    return {
        "base_loss": base["loss"], "base_bits_per_byte": base["bits_per_byte"], "adapter_loss": lora.loss, "full_loss": full.loss,
        "gap_closed": (base["loss"] - lora.loss) / gap, "merge_max_abs_diff": verdict.max_abs_diff, "merge": verdict.as_dict(),
        "trainable_params": lora.params, "adapter_bytes": sum(f.stat().st_size for f in folder.iterdir()), "seconds": seconds,
        "arms": rows, "completions": completions,
    }  # fmt: skip


def show(console: Console, base: dict[str, float], outcomes: list[Outcome], report: dict[str, Any], out: Path) -> None:
    """Print the table, the completions, the verdict, and where everything lies."""
    table = Table("", "loss", "bits per byte", "gap closed", "trainable", "gain per 1 M params", "peak memory", "seconds", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("base", f"{base['loss']:.4f}", f"{base['bits_per_byte']:.4f}", "", "", "", "", "")
    for o in outcomes:
        row = report["arms"][o.arm.name]
        table.add_row(
            o.arm.name, f"{o.loss:.4f}", f"{row['bits_per_byte']:.4f}", f"{100 * row['gap_closed']:.0f} %", f"{o.params:,}",
            f"{row['gain_per_million_params']:.3f}", f"{o.memory / 1e6:.0f} MB", f"{o.seconds:.0f}",
        )  # fmt: skip
    console.print(table)
    for c in report["completions"]:
        console.print(f"[prompt] {c['prompt']!r}\n  base:    {c['before']!r}\n  adapter: {c['after']!r}", highlight=False, markup=False)
    m = report["merge"]
    verdict = "equal within tolerance" if m["ok"] else "NOT equal"
    console.print(
        f"merge --verify: {verdict}, largest logit difference {m['max_abs_diff']:.2e}, "
        f"perplexity change {100 * m['perplexity_change']:+.4f} %"
    )
    console.print(
        f"adapter: {out / 'adapter'} ({report['adapter_bytes']:,} bytes)  curve: {out / 'curve.png'}  report: {out / 'report.json'}",
        soft_wrap=True,
    )
    console.print(f"{report['seconds']:.0f} seconds")


def compare(opened: Opened, row: Row) -> dict[str, str]:
    """A held-out prompt and what base and adapter make of it."""
    chat = shape_of(row) == "chat"
    prompt = row["messages"][0]["content"] if chat else "\n".join(row["text"].splitlines()[:4])

    def answer() -> str:
        pieces = stream_chat(opened, row["messages"][:1], max_new_tokens=32) if chat else [complete(opened, prompt, max_new_tokens=32)]
        return "".join(pieces)

    assert opened.adapted is not None
    with opened.adapted.disabled():
        before = answer()
    return {"prompt": prompt, "before": before, "after": answer()}


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder
