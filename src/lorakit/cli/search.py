"""`lorakit mix-search`: weights for a mixture of adapters, searched or learned on a few examples."""

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from lorakit.cli.mix import parsed
from lorakit.cli.use import Force, Model
from lorakit.core.errors import BadParameter

SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}


def mix_search(
    ctx: typer.Context,
    data: Annotated[str | None, typer.Option("--data", help="the examples: a file as a whole, a divided source's training side")] = None,
    out: Annotated[str | None, typer.Option("--out", help="new folder")] = None,
    how: Annotated[str, typer.Option("--how", help="lorahub, learned, grid or nnls; --list shows their options")] = "lorahub",
    model: Model = None,
    shots: Annotated[int | None, typer.Option("--shots", min=1, help="only the first rows of the data")] = None,
    eval_data: Annotated[str | None, typer.Option("--eval-data", help="other examples, on which base and mixture are compared")] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="cut the result to this rank by its singular values")] = None,
    max_length: Annotated[int | None, typer.Option("--max-length", min=2, help="default: that of the first adapter's training")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="weights and every evaluation, for programs")] = False,
    force: Force = False,
    listed: Annotated[bool, typer.Option("--list", help="list the ways and their options")] = False,
) -> None:
    """Find weights for a mixture: lorakit mix-search a/ b/ c/ --data few.jsonl --how lorahub --budget 40 --out new/

    The options of a way are flags, too.
    """
    if listed:
        return print_ways()
    from lorakit.adapters.io import load_adapter, save_adapter
    from lorakit.adapters.mix import mix
    from lorakit.serve.open import base_of, recorded
    from lorakit.train.source_model import load_tokenizer
    from lorakit.train.weights.finder import get_finder
    from lorakit.train.weights.objective import few_shots, mean_loss
    from lorakit.train.weights.start import loss_of

    folders, options = parsed(ctx.args)
    missing = [what for what, given in (("adapter folders", folders), ("--data", data), ("--out FOLDER", out)) if not given]
    if missing or data is None or out is None:
        raise BadParameter(f"missing: {', '.join(missing)}; as in lorakit mix-search a/ b/ --data few.jsonl --out new/")
    finder, facts = get_finder(how), recorded(folders[0])
    name, base = model or facts.get("model"), base_of(folders[0], model, needed=True)
    if base is None or name is None:
        raise BadParameter(f"the adapter {folders[0]} does not name its base; give it with --model")
    tokenizer = load_tokenizer(name, chat_template=facts.get("chat_template"))
    shape: dict[str, Any] = {
        "max_length": max_length or facts.get("max_length", 512),
        "batch_size": batch_size,
        "labels": facts.get("labels") or (),
    }
    objective = few_shots(base, tokenizer, _rows(data, "train")[:shots], **shape)
    judge = None if eval_data is None else few_shots(base, tokenizer, _rows(eval_data, "valid"), **shape)
    adapters = [load_adapter(folder, model=base, lazily=True) for folder in folders]
    found = finder.find(base, adapters, objective, force=force, **options)
    adapter = found.adapter if rank is None else mix([found.adapter], "svd", weights=[1.0], rank=rank, force=force)
    cut = None if rank is None else loss_of(adapter, objective, base, force=force)
    judged = None if judge is None else {"base": mean_loss(judge, base), "mixture": loss_of(adapter, judge, base, force=force)}
    save_adapter(adapter, out)
    if as_json:
        return print_json(found, cut, judged)
    print_found(folders, found, cut, judged)
    print("adapter:", out)


def _rows(source: str, split: Any) -> Any:
    """All rows of a source, or that side of one that is divided."""
    from lorakit.data.source import load_rows

    return load_rows(source, split, valid=source)


def print_json(found: Any, cut: float | None, judged: dict[str, float] | None) -> None:
    """Everything that was tried."""
    tried = [{"weights": one.weights, "loss": one.loss, "score": one.score} for one in found.tried]
    facts = {"weights": found.weights, "loss": found.loss, "cut": cut, "base": found.base, "eval": judged, "tried": tried}
    print(json.dumps(facts, indent=1))


def print_found(folders: Sequence[str], found: Any, cut: float | None, judged: dict[str, float] | None) -> None:
    """The weights, and what they are worth."""
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(Column("adapter", overflow="fold"), "weight", box=None)
    for folder, weight in zip(folders, found.weights, strict=True):
        values = sorted(weight.values()) if isinstance(weight, dict) else [weight]
        spread = "" if len(values) == 1 else f" ({values[0]:.3f} to {values[-1]:.3f})"
        table.add_row(folder, f"{sum(values) / len(values):.4f}{spread}")
    Console().print(table)
    base = "" if found.base is None else f" (base {found.base:.4f})"
    print(f"loss on the examples: {found.loss:.4f}{base}, {len(found.tried)} evaluations")
    if cut is not None:
        print(f"loss on the examples after the cut: {cut:.4f}")
    if judged is not None:
        verdict = "" if judged["mixture"] < judged["base"] else ": the mixture does not help"
        print(f"loss on the other examples: {judged['mixture']:.4f} (base {judged['base']:.4f}){verdict}")


def print_ways() -> None:
    """All of them, with their options."""
    from rich.console import Console
    from rich.table import Table

    from lorakit.train.weights import FINDERS

    table = Table("way", "options", "what it does", "source", box=None)
    for name, finder in FINDERS.items():
        options = ", ".join(f"{key}={value}" for key, value in finder.options.items() if key != "force")
        table.add_row(name, options, finder.summary, finder.paper)
    Console(width=150).print(table)
