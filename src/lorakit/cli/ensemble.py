"""`lorakit ensemble`: several adapters on one base whose predictions are averaged."""

import json
from collections.abc import Iterator
from typing import Annotated

import typer

from lorakit.cli.use import Force, Model, Seed, Temperature, Tokens


def ensemble(
    adapters: Annotated[list[str], typer.Argument(help="adapter folders, lorakit's or PEFT's, of one base")],
    data: Annotated[str | None, typer.Option("--data", help="score on its validation side; a file with --whole whole")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="continue it")] = None,
    model: Model = None,
    whole: Annotated[bool, typer.Option("--whole", help="score on all rows of the source")] = False,
    max_samples: Annotated[int | None, typer.Option("--max-samples", min=1)] = None,
    max_length: Annotated[int | None, typer.Option("--max-length", min=2, help="default: that of the training")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 8,
    max_new_tokens: Tokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="figures as JSON")] = False,
    force: Force = False,
) -> None:
    """Average the predictions of several adapters: lorakit ensemble a/ b/ c/ --data valid.jsonl, or --prompt "Once".

    Prints the loss beside the members', and how much of the uncertainty is disagreement.
    """
    from lorakit.core.errors import BadParameter
    from lorakit.serve.ensemble import open_ensemble, score, tokens

    if (data is None) == (prompt is None):
        raise BadParameter("give one of --data (to score) and --prompt (to generate)")
    opened = open_ensemble(adapters, model=model, force=force)
    if data is not None:
        figures = score(opened, data, whole=whole, limit=max_samples, max_length=max_length, batch_size=batch_size)
        return print_figures(figures, as_json)
    said = list[tuple[float, float]]()

    def made() -> Iterator[int]:
        for one in tokens(opened, prompt or "", max_new_tokens=max_new_tokens, temperature=temperature, seed=seed):
            said.append((one.entropy, one.mutual_information))
            yield one.token

    from lorakit.serve.decode import pieces

    for piece in pieces(opened.opened.tokenizer, made()):
        print(piece, end="", flush=True)
    print()
    if said:
        entropy, information = (sum(column) / len(said) for column in zip(*said, strict=True))
        print(f"{len(said)} tokens: mean entropy {entropy:.3f} nats, of which {information:.3f} is disagreement of the members")


def print_figures(figures: dict[str, float], as_json: bool) -> None:
    """A table of one row, or JSON."""
    from rich.console import Console
    from rich.table import Column, Table

    if as_json:
        return print(json.dumps(figures, indent=1))
    table = Table(*(Column(name, overflow="fold") for name in figures), box=None)
    table.add_row(*(f"{v:.4f}" for v in figures.values()))
    Console(width=150).print(table)
