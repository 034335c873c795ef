"""`lorakit preprocess`: what `train` would do with the data, shown before anything is trained; the tokens are then in the cache."""

import os
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorakit.cli.train import SETTINGS, resolved_from, show_notes

if TYPE_CHECKING:
    from lorakit.data.explain import Segment, View
    from lorakit.data.token_cache import TokenCache
    from lorakit.train.dataset import Making, Side, TrainData
    from lorakit.train.rows import Rows

__all__ = ["SETTINGS", "preprocess"]

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
PARTS = 3
"""Samples of one row that --debug shows: a file of text is one row."""
NEAR = 16
"""Rows in which --debug looks for another prompt's answer."""
SPECIAL, TRAINED, IGNORED, ID = "bold magenta", "green", "red dim", "bright_black"


def preprocess(
    ctx: typer.Context,
    config: Annotated[str | None, typer.Argument(help="the file that `lorakit train` would be given")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="show samples token by token: trained ones in green, ignored ones in red")] = False,
    num: Annotated[int, typer.Option("--num", min=1, help="rows shown by --debug")] = 3,
    row: Annotated[int, typer.Option("--row", min=1, help="the first row shown by --debug")] = 1,
    side: Annotated[str, typer.Option("--side", help="rows shown by --debug: train or eval")] = "train",
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
) -> None:
    """Read, recognize, tokenize and pack as `train` would, fill the cache, and say what was done: EOS, padding, truncation, lengths.

    Takes the file and the flags of `lorakit train`. No model is loaded and nothing is trained.

    lorakit preprocess run.yaml --debug --num 2 --row 11 shows rows 11 and 12 as the model will see them.
    """
    from lorakit.core.errors import BadParameter

    if side not in ("train", "eval"):
        raise BadParameter(f"--side {side}: choose train or eval")
    resolved = resolved_from(list(ctx.args), config)
    console = Console()
    show_notes(resolved.notes, console)
    _show(resolved.config, console, (num, row, side) if debug else None, quiet)


def _show(config: Any, console: Console, shown: tuple[int, int, str] | None, quiet: bool) -> None:
    from dataclasses import replace

    from lorakit.data.token_cache import TokenCache
    from lorakit.data.tokenized import LARGE, How
    from lorakit.train.dataset import Making, check_vocabulary, prepare
    from lorakit.train.rows import read_tasks
    from lorakit.train.source_model import load_tokenizer

    tasks = read_tasks(config)
    facts = _facts_of(config.model, tasks[0].task)
    tokenizer = load_tokenizer(config.model, chat_template=config.chat_template)
    packing = config.packing and tasks[0].task == "causal-lm" and facts.why_not is None
    cache = TokenCache.here()
    there, began = _entries(cache), time.perf_counter()
    first, *later = (
        prepare(rows, config, tokenizer, packing=packing, encoder_decoder=facts.encoder_decoder, quiet=quiet) for rows in tasks
    )
    data = replace(first, later=tuple(later))
    seconds = time.perf_counter() - began
    print_ = _printer(console)
    print_(f"model: {config.model} ({facts.name}), tokenizer of {len(tokenizer):,} entries, task {data.task}")
    for source, rows, made in zip(config.sources, tasks, data.tasks, strict=True):
        if len(tasks) > 1:
            print_(f"task: {source[0]}")
        _account(rows, made, print_)
    if config.packing and facts.why_not and data.task == "causal-lm":
        print_(f"note: samples are padded, not packed: {facts.why_not}")
    elif packing:
        print_("packing: `train` asks the model itself, once it is loaded, whether packing is exact; else it pads")
    if facts.positions is not None and config.max_length > facts.positions:
        print_(f"note: max_length={config.max_length} is more than the {facts.positions} positions of {config.model}")
    for note in data.notes:
        print_(f"note: {note}")
    check_vocabulary(data, facts.vocabulary, config.model)
    console.print(lengths_table(data))
    large = any(len(side) >= LARGE for rows in tasks for side in (rows.train, rows.valid))
    if cache is None or not large:
        why = "the cache is off" if cache is None else f"not kept, since they are fewer than {LARGE:,} rows"
        print_(f"tokenized in {seconds:.1f} s; {why}")
    elif _entries(cache) <= there:
        print_(f"found in the cache, {cache.root}, in {seconds:.1f} s")
    else:
        print_(f"tokenized in {seconds:.1f} s, and kept in the cache, {cache.root}")
    if shown is not None:
        num, row, side = shown
        making = Making(config, tokenizer, tasks[0].labels, False, facts.encoder_decoder, How(workers=1, quiet=True, cache=None))
        _debug(tasks, making, range(row - 1, row - 1 + num), side, console)


def _entries(cache: "TokenCache | None") -> set[str]:
    """The names of what the cache holds."""
    return set(os.listdir(cache.root)) if cache is not None and cache.root.is_dir() else set()


def _printer(console: Console) -> Any:
    return lambda line: console.print(line, soft_wrap=True, markup=False, highlight=False)


def _account(rows: "Rows", made: "TrainData", print_: Any) -> None:
    for note in rows.notes:
        print_(f"data: {note}")
    for name, side in (("train", made.train), ("eval", made.valid)):
        print_(f"{name}: {side.account}")
        for line in side.details.lines() if side.details is not None else ():
            print_(f"  {line}")


def lengths_table(data: "TrainData") -> Table:
    """Quantiles of the samples' lengths, in tokens."""
    import numpy as np

    names = {0.0: "shortest", 0.5: "median", 1.0: "longest"}
    table = Table("tokens a sample", *(names.get(q, f"{q:.0%}") for q in QUANTILES), "mean", box=None)
    for i, task in enumerate(data.tasks, 1):
        for name, side in (("train", task.train), ("eval", task.valid)):
            lengths = _sample_lengths(side)
            title = f"{name} {i}" if data.later else name
            cut = np.quantile(lengths, QUANTILES, method="inverted_cdf")
            table.add_row(title, *(f"{int(q):,}" for q in cut), f"{lengths.mean():,.1f}")
    return table


def _sample_lengths(side: "Side") -> Any:
    from dataclasses import replace

    from lorakit.data.pack import Windows

    return replace(side, items=side.items.samples).lengths if isinstance(side.items, Windows) else side.lengths


# ------------------------------------------------------------------------------------------------------------------ token by token
def _debug(tasks: Sequence["Rows"], making: "Making", wanted: range, side: str, console: Console) -> None:
    from lorakit.core.errors import DataError
    from lorakit.data.explain import explained
    from lorakit.data.lazy import place_of
    from lorakit.train.dataset import MAKERS

    print_ = _printer(console)
    colored = console.is_terminal and not console.no_color and not os.environ.get("NO_COLOR")
    for line in _legend(colored):
        console.print(line, soft_wrap=True)
    task = tasks[0].task
    for rows in tasks:
        chosen = rows.train if side == "train" else rows.valid
        numbers = [i for i in wanted if i < len(chosen)]
        if not numbers:
            raise DataError(f"there is no row {wanted.start + 1}: {side} has {len(chosen):,}")
        for i in numbers:
            place = place_of(chosen, i)
            print_(f"── {side} row {i + 1}" + ("" if place == f"row {i + 1}" else f" ({place})"))
            try:
                items = MAKERS[task]([chosen[i]], making).items
                if task == "kto":  # what an answer is mismatched with stands in the rows behind it
                    items = MAKERS[task]([chosen[(i + j) % len(chosen)] for j in range(min(NEAR, len(chosen)))], making).items[:1]
            except DataError as error:
                print_(f"   no sample: {error}")
                continue
            for k, item in enumerate(items, 1):
                if k > PARTS:
                    print_(f"   … and {len(items) - PARTS:,} more samples of this row")
                    break
                if len(items) > 1:
                    print_(f"   sample {k} of {len(items)}")
                kind = {"encoder_decoder": making.encoder_decoder, "tags": task == "token-classification"}
                for view in explained(making.tokenizer, item, labels=making.labels, **kind):
                    for line in view_lines(view, colored):
                        console.print(line, soft_wrap=True)


def _legend(colored: bool) -> Iterator[Text]:
    if colored:
        yield Text.assemble("tokens are ", ("trained on", TRAINED), ", ", ("ignored", IGNORED), ", ", ("special", SPECIAL), ("; ids", ID))
    else:
        yield Text("tokens: [trained on](id) ignored(id); * special")


def view_lines(view: "View", colored: bool) -> Iterator[Text]:
    """The tokens, a line for each line of text, and what is learned."""
    if view.title:
        yield Text(f"   {view.title}:" + (f" {view.answer}" if not view.segments else ""))
    line = Text("   ")
    for segment in view.segments:
        line.append_text(_token(segment, colored))
        if "\n" in segment.text:
            yield line
            line = Text("   ")
    if len(line) > 3:
        yield line
    if view.segments:
        trained = sum(segment.trained for segment in view.segments)
        said = f"trained on {trained}" + (f": {view.answer!r}" if view.answer else "")
        yield Text(f"   {len(view.segments)} tokens, {said if trained or not view.answer else f'learned: {view.answer}'}")


def _token(segment: "Segment", colored: bool) -> Text:
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in segment.text)
    tag = f"/{segment.tag}" if segment.tag else ""
    if colored:
        style = TRAINED if segment.trained else IGNORED
        return Text.assemble((shown, f"{style} bold underline" if segment.special else style), (f"{tag}({segment.id})", ID), " ")
    marked = f"{shown}{'*' if segment.special else ''}{tag}"
    return Text(f"[{marked}]({segment.id}) " if segment.trained else f"{marked}({segment.id}) ")


# --------------------------------------------------------------------------------------------------------- the model, from its config
class _Facts:
    """What the model's configuration says, without its weights."""

    def __init__(self, config: Any, task: str) -> None:
        import inspect

        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        text = config.get_text_config()
        self.encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        self.vocabulary = int(text.vocab_size)
        self.positions: int | None = None if self.encoder_decoder else getattr(text, "max_position_embeddings", None)
        known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        kinds = known if isinstance(known, tuple) else (known,)
        self.name = config.model_type
        self.why_not: str | None = None
        if self.encoder_decoder:
            self.why_not = "it is an encoder-decoder, whose inputs and targets are separate sequences"
        elif task == "causal-lm" and kinds[0] is not None and "position_ids" not in inspect.signature(kinds[0].forward).parameters:
            self.why_not = "its forward takes no position_ids, so positions cannot restart at each document"


def _facts_of(name: str, task: str) -> _Facts:
    """The facts of a model folder, a Hub name, or 'bundled'. Raises BadParameter."""
    from transformers import AutoConfig

    from lorakit.core.errors import BadParameter
    from lorakit.train.source_model import resolve

    try:
        return _Facts(AutoConfig.from_pretrained(resolve(name)), task)
    except (OSError, ValueError) as error:
        raise BadParameter(f"cannot read the configuration of {name!r}: {str(error).splitlines()[0]}") from None
