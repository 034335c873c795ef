"""`lorakit train`: one YAML whose keys are also flags."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from lorakit.cli.flags import parse_flags

if TYPE_CHECKING:
    from lorakit.train.config import Resolved

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}
STRINGS = frozenset(
    {"model", "method", "init_adapter",
     "train_data", "eval_data", "output_dir", "chat_template", "resume", "dtype", "task", "quantize",
     "preset", "run_name", "model_name_or_path", "base_model", "dataset", "dataset_name", "dataset_dir", "eval_dataset", "template",
     "config"}
)  # fmt: skip
SEVERAL = frozenset({"train_data", "eval_data"})


def resolved_from(extra: list[str], config: str | None) -> "Resolved":
    """The configuration that a command line gives: a file's keys, and flags over them."""
    from lorakit.train.config import load_config

    if config is not None and config.startswith("--"):
        extra, config = [config, *extra], None
    flags = parse_flags(extra, strings=STRINGS, several=SEVERAL)
    if config is None and "config" in flags:
        config = flags.pop("config")
    return load_config(config, flags)


def train(
    ctx: typer.Context,
    config: Annotated[str | None, typer.Argument(help="YAML or JSON file: lorakit's keys, LLaMA-Factory's, axolotl's or TRL's")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print configuration, sites, parameters and memory; train nothing")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
    keys: Annotated[bool, typer.Option("--keys", help="list every key with its default")] = False,
) -> None:
    """Train an adapter: lorakit train --method lora --r 16 --model FOLDER --train-data FILE --output-dir OUT, or lorakit train run.yaml.

    Every key of the YAML is a flag, the method's own parameters too; --keys lists them all with defaults and meanings.

    A file of LLaMA-Factory, axolotl or TRL runs as it is, and what each of its keys became is printed; single keys of theirs are aliases.

    --preset auto takes what suits the model's family (lorakit presets) where you say nothing.

    --train-data given several times trains on one task after another, and says what was forgotten.

    A run that was killed goes on with the same command and --resume auto.
    """
    if keys:
        return print_keys()
    resolved = resolved_from(list(ctx.args), config)
    settings = resolved.config
    if dry_run:
        from lorakit.train.dry_run import dry_run as preview

        said = preview(settings)
        show_notes(resolved.notes, Console())
        return said.show(Console())
    if not quiet and os.environ.get("RANK", "0") == "0":
        show_notes(resolved.notes, Console(stderr=True))
    from lorakit.train.train import train as run

    try:
        result = run(settings, quiet=quiet, notes=resolved.notes)
    except KeyboardInterrupt:
        print(f"interrupted: {_kept(Path(settings.output_dir))}", file=sys.stderr)
        raise typer.Exit(130) from None
    name = result.method or settings.method
    print(f"{name} on {settings.model}: {result.steps} steps, {result.trainable:,} parameters, {result.seconds:.0f} s")
    report = Table(box=None)
    for name in result.final:
        report.add_column(f"eval {name}", overflow="fold")
    report.add_row(*(f"{v:.4f}" for v in result.final.values()))
    console = Console(width=None if sys.stdout.isatty() else 140, markup=False)  # [q_proj] is no markup
    console.print(report)
    if result.tasks:
        console.print(sequence_table(result.tasks, [str(train_data) for train_data, _ in settings.sources]))
    for note in result.notes:
        console.print(f"note: {note}", soft_wrap=True)
    console.print(f"adapter: {Path(settings.output_dir) / 'adapter'}", soft_wrap=True)
    if (page := Path(settings.output_dir) / "report.html").exists():
        console.print(f"report: {page}", soft_wrap=True)


def _kept(out: Path) -> str:
    """What an interrupted run left, and how it goes on."""
    if any(out.glob("checkpoint-*")):
        return f"the same command with --resume auto goes on from the newest checkpoint in {out}"
    return f"there is no checkpoint in {out} yet (save_steps); the same command with --resume auto begins again"


def show_notes(notes: Sequence[str], console: Console) -> None:
    """What the configuration was read as, a line each."""
    for note in notes:
        console.print(f"config: {note}", soft_wrap=True, markup=False, highlight=False)


def sequence_table(borders: list[list[dict[str, float]]], sources: list[str]) -> Table:
    """Each task's held-out loss when it was learned and after the last one."""
    table = Table(Column("task", overflow="fold"), "loss when learned", "loss now", title="tasks in sequence", box=None)
    for i, source in enumerate(sources):
        table.add_row(source, f"{borders[i][i]['loss']:.4f}", f"{borders[-1][i]['loss']:.4f}")
    return table


def print_keys() -> None:
    """Every key of the configuration, then every method's own."""
    from lorakit.core.method import COMMON, describe, list_methods
    from lorakit.train.config import FIELDS, PRESET, TrainConfig

    table = Table("key", "default", "meaning", box=None)
    for name in FIELDS:
        info = TrainConfig.model_fields[name]
        table.add_row(name, str(info.get_default(call_default_factory=True)), info.description or "")
    table.add_row("preset", "None", PRESET)
    for method in list_methods():
        table.add_section()
        for name, parameter in describe(method).parameters.items():
            table.add_row(name, str(parameter.default), f"{method}: {COMMON.get(name, 'see lorakit show ' + method)}")
    Console(width=140).print(table)
