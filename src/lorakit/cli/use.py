"""`lorakit eval`, `generate`, `chat`, `merge`: what is done with a finished adapter. A PEFT folder is accepted wherever an adapter is."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from lorakit.cli.flags import parse_flags

Adapter = Annotated[str, typer.Argument(help="adapter folder (lorakit's or PEFT's); 'base' for the base alone")]
Folder = Annotated[str, typer.Argument(help="adapter folder (lorakit's or PEFT's)")]
Model = Annotated[str | None, typer.Option("--model", help="base folder or Hub name; default: the one that the adapter names")]
Force = Annotated[bool, typer.Option("--force", help="accept a base with other weights than the adapter was trained on")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", min=1)]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0: greedy")]
Seed = Annotated[int, typer.Option("--seed")]
AS_TRAINED = "default: the training's, if the source is the same"


def eval_(
    adapter: Adapter,
    data: Annotated[str, typer.Option("--data", help="as train_data; its validation side is used, a file of --whole is used whole")],
    model: Model = None,
    whole: Annotated[bool, typer.Option("--whole", help="evaluate on all rows of the source")] = False,
    max_samples: Annotated[int | None, typer.Option("--max-samples", min=1)] = None,
    max_length: Annotated[int | None, typer.Option("--max-length", min=2, help="default: that of the training")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 8,
    exact_match: Annotated[bool, typer.Option("--exact-match", help="generate answers of chat or prompt rows and compare them")] = False,
    posterior: Annotated[bool, typer.Option("--posterior", help="calibration of the mean and of the posterior (laplace_lora)")] = False,
    columns: Annotated[str | None, typer.Option("--columns", help=f"as in train, e.g. '{{prompt: question}}'; {AS_TRAINED}")] = None,
    data_format: Annotated[str | None, typer.Option("--data-format", help=f"as in train; {AS_TRAINED}")] = None,
    eval_fraction: Annotated[float | None, typer.Option("--eval-fraction", help=f"as in train; {AS_TRAINED}")] = None,
    skip_bad: Annotated[bool | None, typer.Option("--skip-bad/--no-skip-bad", help=f"as in train; {AS_TRAINED}")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    force: Force = False,
) -> None:
    """Held-out loss, perplexity and bits per byte; accuracy and F1 for classifiers; exact match and calibration on request."""
    from lorakit.bayes.score import score as calibration
    from lorakit.serve.score import prepared, score

    mapped = None if columns is None else parse_flags(["--columns", columns])["columns"]
    said = {"columns": mapped, "data_format": data_format, "eval_fraction": eval_fraction, "skip_bad": skip_bad}
    reading = {key: value for key, value in said.items() if value is not None}
    opened = _open(adapter, model, force)
    if posterior:
        sides = prepared(opened, data, whole=whole, limit=max_samples, max_length=max_length, reading=reading)
        figures = calibration(opened.adapted, sides.valid, batch_size=batch_size)
    else:
        figures = score(
            opened, data, whole=whole, limit=max_samples, max_length=max_length, batch_size=batch_size, exact=exact_match, reading=reading
        )
    if as_json:
        return print(json.dumps(figures, indent=1))
    table = Table(*(Column(name, overflow="fold") for name in figures), box=None)
    table.add_row(*(f"{v:.4f}" for v in figures.values()))
    Console().print(table)


def generate(
    adapter: Adapter,
    prompt: Annotated[str, typer.Option("--prompt", help="'-' reads standard input")],
    model: Model = None,
    max_new_tokens: Tokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Continue a prompt, streaming."""
    from lorakit.serve.generate import stream

    text = sys.stdin.read() if prompt == "-" else prompt.encode().decode("unicode_escape") if "\\n" in prompt else prompt
    opened = _open(adapter, model, force)
    for piece in stream(opened, text, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed):
        print(piece, end="", flush=True)
    print()


def chat(
    adapter: Adapter,
    model: Model = None,
    system: Annotated[str | None, typer.Option("--system", help="system message")] = None,
    message: Annotated[str | None, typer.Option("--message", help="answer this one message and stop")] = None,
    max_new_tokens: Tokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Talk to an adapter with the chat template it was trained with; an empty line or end of input ends it."""
    from lorakit.serve.generate import stream_chat

    opened = _open(adapter, model, force)
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        said = message if message is not None else _ask()
        if not said:
            return
        messages.append({"role": "user", "content": said})
        answer = ""
        for piece in stream_chat(opened, messages, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed):
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": answer})
        if message is not None:
            return


def merge(
    adapter: Folder,
    out: Annotated[str, typer.Option("--out", help="new folder for the merged model")],
    model: Model = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; default: the training dtype")] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="compare adapter and merged model, refuse over the tolerance")
    ] = True,
    tolerance: Annotated[float, typer.Option("--tolerance", min=0.0, help="largest logit difference in fp32")] = 1e-3,
    requantize: Annotated[
        bool, typer.Option("--requantize", help="pack the merged model again as its base was: smaller and lossy, by as much as is printed")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    force: Force = False,
) -> None:
    """Merge an adapter into a copy of its base, for plain AutoModel classes; the input is never touched."""
    from lorakit.serve.merge import merge as run

    verdict = run(adapter, out, model=model, dtype=dtype, verify=verify, tolerance=tolerance, force=force, requantize=requantize)
    if verdict is not None and as_json:
        return print(json.dumps(verdict.as_dict(), indent=1))
    if verdict is not None:
        for note in verdict.notes:
            print("note:", note)
        print(f"verified on {verdict.prompts} prompts: largest logit difference {verdict.max_abs_diff:.2e} in fp32, ", end="")
        saved = "packed again" if verdict.requantized else f"saved in {verdict.dtype}"
        print(f"{verdict.target_max_abs_diff:.2e} as {saved} (rounding alone: {verdict.rounding:.2e}), ", end="")
        change = verdict.perplexity_change
        print("no perplexity of a classifier" if change is None else f"perplexity change {100 * change:+.4f} %")
    print("merged model:", out)


def _ask() -> str:
    try:
        return input("you: " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _open(adapter: str, model: str | None, force: bool):  # type: ignore[no-untyped-def]
    from lorakit.serve.open import open_adapter, open_base

    if adapter == "base" and not Path("base").exists():
        return open_base(model or "bundled")
    return open_adapter(adapter, model=model, force=force)
