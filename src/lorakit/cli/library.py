"""`lorakit library`: a folder of adapters that is searched by prompts, and what they make together."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.use import Folder, Force, Model, Seed, Temperature, Tokens
from lorakit.core.errors import BadParameter

Where = Annotated[str, typer.Argument(help="the library's folder")]
Sentences = Annotated[
    str | None,
    typer.Option("--encoder", help="folder of a trained encoder, or of a sentence encoder (INSTRUCTOR, …); default: the base's own states"),
]
K = Annotated[int, typer.Option("--k", min=1, help="adapters that are found, or that a token chooses (arrow)")]


def add(
    library: Where,
    adapter: Folder,
    data: Annotated[str, typer.Option("--data", help="as train_data: inputs of its training side are what the adapter is found by")],
    name: Annotated[str | None, typer.Option("--name", help="in the library; default: the folder's own")] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="how many inputs, spread over the data")] = 32,
    model: Model = None,
    encoder: Sentences = None,
    force: Force = False,
) -> None:
    """Copy an adapter into a library (made if need be), with the mean vector of some inputs of its task."""
    from lorakit.adapters.io import load_adapter
    from lorakit.core.fingerprint import check_base, fingerprint
    from lorakit.serve.library import add as run
    from lorakit.serve.library import sample_inputs
    from lorakit.serve.open import open_base, recorded
    from lorakit.serve.shelf import encoder_for

    base = model or recorded(adapter).get("model")
    if not base:
        raise BadParameter(f"the adapter {adapter} does not name its base; give it with --model")
    opened = open_base(base)
    found, texts = load_adapter(adapter, model=opened.model), sample_inputs(data, samples)
    check_base(found, fingerprint(opened.model), force=force)
    known = run(library, name or _name(adapter), found, texts, encoder_for(opened, encoder), model=base, force=force)
    n = len(known.names)
    print(f"{known.names[-1]}: {known.entries[-1].samples} samples; the library {library} holds {n} adapter{'s' if n > 1 else ''}")


def train_encoder(
    data: Annotated[list[str], typer.Option("--data", help="a task's data, as train_data; one flag for each task, two or more")],
    out: Annotated[str, typer.Option("--out", help="new folder, for --encoder")],
    model: Annotated[str, typer.Option("--model", help="the base of the library's adapters")] = "bundled",
    samples: Annotated[int, typer.Option("--samples", min=2, help="inputs of each task, spread over the data")] = 32,
    r: Annotated[int, typer.Option("--r", min=1, help="rank of the adapter that the encoder is")] = 8,
    steps: Annotated[int, typer.Option("--steps", min=1)] = 100,
    seed: Seed = 0,
) -> None:
    """Train an encoder that brings inputs of one task together (LoraRetriever): a LoRA on the base."""
    from lorakit.adapters.io import save_adapter
    from lorakit.serve.library import sample_inputs
    from lorakit.serve.open import open_base
    from lorakit.train.retriever import META
    from lorakit.train.retriever import train_encoder as run

    if len(set(data)) < len(data):
        raise BadParameter("a source is given twice; expected one --data for each task")
    opened = open_base(model)
    adapter = run(opened.model, opened.tokenizer, {name: sample_inputs(name, samples) for name in data}, r=r, steps=steps, seed=seed)
    save_adapter(adapter, out)
    print(f"loss {adapter.meta[META]['loss']:.3f} after {steps} steps on {len(data)} tasks")
    print("encoder:", out)


def search(
    library: Where,
    prompt: Annotated[str, typer.Option("--prompt")],
    k: K = 3,
    model: Model = None,
    encoder: Sentences = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """The adapters whose tasks are nearest to a prompt, with the cosine of the vectors."""
    from rich.console import Console
    from rich.table import Table

    from lorakit.serve.shelf import open_shelf

    shelf = open_shelf(library, model=model, encoder=encoder)
    hits = shelf.library.search(shelf.query(prompt), k)
    if as_json:
        return print(json.dumps([hit._asdict() for hit in hits], indent=1))
    table = Table("adapter", "similarity", box=None)
    for hit in hits:
        table.add_row(hit.name, f"{hit.similarity:.4f}")
    Console(width=140).print(table)


def export(
    library: Where,
    prompt: Annotated[str, typer.Option("--prompt")],
    out: Annotated[str, typer.Option("--out", help="new folder")],
    how: Annotated[str, typer.Option("--how", help="selection, mixture (exact) or fusion (inexact)")] = "mixture",
    k: K = 3,
    model: Model = None,
    encoder: Sentences = None,
    force: Force = False,
) -> None:
    """What a prompt finds, as one plain LoRA."""
    from lorakit.adapters.io import save_adapter
    from lorakit.serve.shelf import open_shelf

    shelf = open_shelf(library, model=model, encoder=encoder)
    names = [hit.name for hit in shelf.library.search(shelf.query(prompt), k)]
    adapter = shelf.library.export(names, how, force=force)
    save_adapter(adapter, out)
    print(f"{how} of {', '.join(names[: len(adapter.meta['mix']['sources'])])}")
    print("adapter:", out)


def generate(
    library: Where,
    prompt: Annotated[str, typer.Option("--prompt")],
    how: Annotated[
        str, typer.Option("--how", help="selection, mixture, fusion: found once; token: weighted anew as it goes; arrow")
    ] = "mixture",
    k: K = 3,
    refresh: Annotated[int, typer.Option("--refresh", min=1, help="token: tokens between new weights")] = 2,
    tau: Annotated[float | None, typer.Option("--tau", help="temperature of the weights: of token 0.1, of arrow 1")] = None,
    model: Model = None,
    encoder: Sentences = None,
    max_new_tokens: Tokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Continue a prompt with the adapters that suit it."""
    from lorakit.serve.shelf import Choice, continued, open_shelf

    shelf = open_shelf(library, model=model, encoder=encoder)
    choice = Choice(how, k, refresh, tau, force)
    for piece in continued(shelf, prompt, choice, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed):
        print(piece, end="", flush=True)
    print()


def _name(adapter: str) -> str:
    """The folder's own name; of a run, whose adapter is in `<run>/adapter`, the run's."""
    path = Path(adapter).resolve()
    return re.sub(r"[^A-Za-z0-9_-]", "-", path.parent.name if path.name == "adapter" else path.name)
