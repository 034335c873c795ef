"""What is found out when a run has ended: what the base alone reaches on the same held-out data, and what both say to some of its rows."""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from lorakit.core.errors import one_line
from lorakit.data.tokenize import trained_bytes
from lorakit.train.answers import SECONDS, TOKENS, Held, Sample, samples
from lorakit.train.attention import segment_attention
from lorakit.train.dataset import Side, TrainData
from lorakit.train.expected import expected
from lorakit.train.facts import memory_rows
from lorakit.train.report import Outcome
from lorakit.train.sequence import means

if TYPE_CHECKING:
    from lorakit.train.run import Result, Run

ITEMS = 512
"""Held-out windows or samples of a task that the base is measured on at most; of more, both are measured on the first ones."""
Figures = dict[str, float]

logger = logging.getLogger(__name__)


def beside_base(run: "Run", tokenizer: PreTrainedTokenizerBase, final: Figures) -> tuple[Figures, Figures, str]:
    """(the base's figures, the adapter's on the same items, what they were measured on). Every process takes part."""
    tasks = run.data.tasks[: run.at.task + 1]
    n = sum(len(task.valid.items) for task in tasks)
    shown = [_first(task, tokenizer, shifted=not run.adapted.model.config.is_encoder_decoder) for task in tasks]  # type: ignore[union-attr]
    with run.adapted.disabled():
        base = means([run.evaluate(task) for task in shown])
    few = sum(len(task.valid.items) for task in shown)
    if few == n:
        return base, final, f"Both on all {n:,} held-out windows or samples; the base is the model with the adapter switched off."
    return (
        base,
        means([run.evaluate(task) for task in shown]),
        f"Both on the first {few:,} of {n:,} held-out windows or samples, at most {ITEMS} of a task, to save time; "
        "the base is the model with the adapter switched off. The head of this page has the adapter's figures on all of them.",
    )


def _first(task: TrainData, tokenizer: PreTrainedTokenizerBase, *, shifted: bool) -> TrainData:
    side: Side = task.valid
    if len(side.items) <= ITEMS:
        return task
    items: list[Any] = list(side.items[:ITEMS])
    n_bytes = trained_bytes(tokenizer, items, shifted=shifted) if side.n_bytes else 0
    return replace(task, valid=replace(side, items=items, n_bytes=n_bytes))


def conclude(run: "Run", tokenizer: PreTrainedTokenizerBase, held: Held, result: "Result") -> "tuple[Result, Outcome]":
    """The result with the base's figures, and all that the page says of the end. Every process takes part in the figures; the main one
    alone answers. What goes wrong here is a note: a run that is finished is not lost for its page."""
    notes: list[str] = []
    base: Figures = {}
    compared, base_note = dict(result.final), ""
    try:
        base, compared, base_note = beside_base(run, tokenizer, result.final)
    except Exception as error:
        notes.append(f"the base was not measured: {type(error).__name__}: {one_line(error)}")
    found, how = list[Sample](), ""
    if run.world.main:
        try:
            found, how = answered(run, tokenizer, held)
        except Exception as error:
            notes.append(f"no row was answered: {type(error).__name__}: {one_line(error)}")
    whole = compared == result.final
    result = replace(result, base=base if whole else {}, notes=[*result.notes, *notes])
    outcome = Outcome(
        result.final,
        result.steps,
        result.seconds,
        base,
        {} if whole else compared,
        base_note,
        found,
        how,
        memory_rows(run.adapted, run.optimizer),
        result.notes,
        result.tasks,
        sum(path.stat().st_size for path in (result.out / "adapter").glob("*")),
        foreseen(run) if found else [],
    )
    return result, outcome


def foreseen(run: "Run") -> list[tuple[str, int]]:
    """What one step should have needed in memory; nothing where that cannot be traced. It is asked for when the run is over: tracing makes
    the process itself larger, and what is measured should be the run's."""
    try:
        with run.adapted.given(step=0):  # whose memo of the probe is forgotten with it
            undo = segment_attention(run.adapted.model)
        try:
            rows = expected(run.adapted, run.data, run.config, run.world.device)
        finally:
            undo()
    except Exception as error:  # a model whose shapes depend on values, say: the page does without
        logger.info("no estimate of memory: %s", one_line(error))
        return []
    return [("expected of one step, its tensors alone", rows.total), ("of that, activations at their highest", rows.activations)]


def answered(run: "Run", tokenizer: PreTrainedTokenizerBase, held: Held) -> tuple[list[Sample], str]:
    """(samples, how they were made); none with the reason where they cannot be. For the main process alone."""
    if not held.rows:
        return [], ""
    if run.world.sharded:
        return [], "No samples: the base is sharded over several processes, and one of them cannot run it alone."
    found = samples(run.adapted, tokenizer, held.rows, labels=run.data.labels, max_length=run.config.max_length)
    judged = held.shape in ("classify", "tag")
    how = "" if judged else f", answered greedily with at most {TOKENS} new tokens each, and {SECONDS:.0f} seconds for all of them"
    head = " The base's head is untrained, so its answers are chance." if judged else ""
    return found, f"Held-out rows{how}.{head}"
