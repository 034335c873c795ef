"""Held-out rows answered twice, by the base (the adapter disabled) and by the adapter: what a report shows beside the figures.

text        the first half is continued             classify, tag  the true label, and the model's before and after
chat, pair  the prompt is answered                  preference     log p(chosen) − log p(rejected), and the answer
                                                    feedback       log p(completion), and the answer
Answers are greedy, at most TOKENS long and SECONDS in all: nothing is drawn, so that a report changes no bit of a run, and is made again
with the same words.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import eq
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lorakit.core.attach import Adapted
from lorakit.data.chat import Chats, encode_chat
from lorakit.data.encoded import IGNORED, Encoded, encode_pair
from lorakit.data.packable import eval_mode
from lorakit.data.row import Row, data_hash, shape_of
from lorakit.data.tag import encode_words
from lorakit.train.metrics import forward_loss
from lorakit.train.rows import Rows
from lorakit.train.state import random_state, restore_random

TOKENS = 64
SECONDS = 30.0
WORDS = 40
"""Tagged words of a row that are shown."""
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Sample:
    """One row: what was asked, what the data say, what base and adapter said, and a table of figures with a header, if any."""

    prompt: str
    reference: str
    before: str
    after: str
    table: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Held:
    """What is told of a run's held-out rows: their shape, their hash (over all tasks), and some of them."""

    shape: str
    hash: str
    rows: list[Row]
    notes: tuple[str, ...] = ()
    """What was recognized when the data were read, and why."""
    talks: bool = False
    """Whether the rows are conversations."""


def held_out(tasks: Sequence[Rows], n: int) -> Held:
    """The held-out side of all tasks, with `n` rows to be shown."""
    share = -(-n // len(tasks))
    some = [row for task in tasks for row in shown(task.valid, share)]
    notes = dict.fromkeys(note for task in tasks for note in task.notes)
    first = tasks[0].train[0]
    talks = "messages" in first or isinstance(first.get("prompt"), list)
    return Held(shape_of(first), data_hash(row for task in tasks for row in task.valid), some[:n], tuple(notes), talks)


def shown(rows: Sequence[Row], n: int) -> list[Row]:
    """`n` rows (or all), evenly spaced."""
    count = min(n, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def samples(
    adapted: Adapted, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, labels: Sequence[Any] = (), max_length: int = 512
) -> list[Sample]:
    """Every row before and after. Neither the model nor any generator of random numbers is changed. `labels`: the classes in order."""
    if not rows:
        return []
    before = random_state()
    try:
        with eval_mode(adapted.model), torch.no_grad():
            asked = Asked(adapted, tokenizer, list(rows), list(labels), max_length)
            return ASK[shape_of(rows[0])](asked)
    finally:
        restore_random(before)


@dataclass
class Asked:
    """The rows, the model that is asked, and the time that is left."""

    adapted: Adapted
    tokenizer: PreTrainedTokenizerBase
    rows: list[Row]
    labels: list[Any]
    max_length: int
    until: float = field(default_factory=lambda: time.monotonic() + SECONDS)
    left: int = 0

    def twice(self, ask: Callable[[Row], Answer]) -> list[tuple[Answer, Answer]]:
        """(before, after) of every row."""
        self.left = 2 * len(self.rows)
        with self.adapted.disabled():
            before = [ask(row) for row in self.rows]
        return list(zip(before, map(ask, self.rows), strict=True))

    # --- text -------------------------------------------------------------------------------------------------------------------

    def answer(self, ids: Sequence[int]) -> str:
        """The greedy continuation; an ellipsis where it was cut off."""
        model: Any = self.adapted.model
        kept = list(ids)[-self._room() :] or [self._first()]
        inputs = torch.tensor([kept], device=self._device)
        share = max(0.1, (self.until - time.monotonic()) / max(1, self.left))
        self.left -= 1
        out = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            num_beams=1,
            max_new_tokens=TOKENS,
            max_time=share,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        new = out[0] if model.config.is_encoder_decoder else out[0, len(kept) :]
        ended = bool(len(new)) and int(new[-1]) in (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        return self.text(new.tolist()) + ("" if ended else " …")

    def text(self, ids: Sequence[int]) -> str:
        """Tokens as text, without the special ones."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def chat(self, messages: Sequence[dict[str, Any]], row: Row) -> list[int]:
        """A conversation of the row's up to the point where the assistant speaks."""
        return Chats(self.tokenizer).prompt(messages, row.get("tools"))

    def plain(self, text: str) -> list[int]:
        """A text as a prompt, as in training."""
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        closed = ids[-1:] == [self.tokenizer.eos_token_id] and not self.adapted.model.config.is_encoder_decoder  # type: ignore[union-attr]
        return ids[:-1] if closed else ids

    def log_p(self, row: Row, answer: str) -> float:
        """log p(answer | prompt) in nats, of strings or of messages under these keys of the row."""
        prompt, completion = row["prompt"], row[answer]
        sample = (
            encode_pair(self.tokenizer, prompt, completion)
            if isinstance(prompt, str)
            else encode_chat(self.tokenizer, [*prompt, *completion], train_on="last", tools=row.get("tools"))
        )
        cut = Encoded(sample.input_ids[: self.max_length], sample.labels[: self.max_length])
        if all(label == IGNORED for label in cut.labels[1:]):
            return 0.0
        batch = {"input_ids": self._row(cut.input_ids), "labels": self._row(cut.labels)}
        return -float(forward_loss(self.adapted.model, batch | {"attention_mask": torch.ones_like(batch["input_ids"])})[0])

    def logits(self, text_ids: Sequence[int]) -> Tensor:
        """What a classifier says: [classes], or [tokens, classes]."""
        inputs = self._row(text_ids)
        out: Tensor = self.adapted.model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits[0]
        return out.float().cpu()

    def _row(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.adapted.model.parameters()).device

    def _room(self) -> int:
        """Tokens of a prompt that leave room for an answer."""
        limit = getattr(self.adapted.model.config, "max_position_embeddings", None) or self.max_length + TOKENS
        return max(1, min(self.max_length, limit - TOKENS))

    def _first(self) -> int:
        """Where a text starts that has no prompt."""
        bos = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if bos is None else bos)


def _texts(asked: Asked) -> list[Sample]:
    halves = []
    for row in asked.rows:
        ids = asked.plain(row["text"])[: asked.max_length]
        middle = max(1, min(len(ids) // 2, asked._room()))
        halves.append((ids[:middle], ids[middle : middle + TOKENS], len(ids) > middle + TOKENS))
    ids_of = {id(row): half[0] for row, half in zip(asked.rows, halves, strict=True)}
    said = asked.twice(lambda row: asked.answer(ids_of[id(row)]))
    return [
        Sample(asked.text(first), asked.text(rest) + (" …" if cut else ""), *both)
        for (first, rest, cut), both in zip(halves, said, strict=True)
    ]


def _chats(asked: Asked) -> list[Sample]:
    places = {id(row): _last_answer(row["messages"]) for row in asked.rows}
    said = asked.twice(lambda row: asked.answer(asked.chat(row["messages"][: places[id(row)]], row)))
    found = []
    for row, both in zip(asked.rows, said, strict=True):
        messages, at = row["messages"], places[id(row)]
        found.append(Sample(_conversation(messages[:at], row.get("tools")), _words(messages[at]) if at < len(messages) else "", *both))
    return found


def _last_answer(messages: Sequence[dict[str, Any]]) -> int:
    """The place of the last turn that the assistant learns; the end where there is none."""
    learned = [i for i, m in enumerate(messages) if i and m["role"] == "assistant" and m.get("train", True)]
    return learned[-1] if learned else len(messages)


def _conversation(said: Any, tools: Sequence[dict[str, Any]] | None = None) -> str:
    """Messages to be read, the tools that they may call before them; of one alone, its words."""
    if isinstance(said, str):
        return said
    if len(said) == 1 and not tools:
        return _words(said[0])
    known = [f"[tools] {', '.join(_signature(tool['function']) for tool in tools)}"] if tools else []
    return "\n".join([*known, *(f"[{m['role']}] {_words(m)}" for m in said)])


def _words(message: dict[str, Any]) -> str:
    """What a message says, and the calls it makes as JSON, a line each."""
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return "\n".join([*([str(message["content"])] if message["content"] else []), *calls])


def _signature(function: dict[str, Any]) -> str:
    """A tool's name and what it takes."""
    parameters = function.get("parameters")
    takes = parameters.get("properties") if isinstance(parameters, dict) else None
    return f"{function['name']}({', '.join(takes) if isinstance(takes, dict) else ''})"


def _pairs(asked: Asked) -> list[Sample]:
    said = asked.twice(lambda row: asked.answer(asked.plain(row["prompt"])))
    return [Sample(row["prompt"], row["completion"], *both) for row, both in zip(asked.rows, said, strict=True)]


def _classes(asked: Asked) -> list[Sample]:
    def ask(row: Row) -> Tensor:
        ids = asked.tokenizer(row["text"], truncation=True, max_length=asked.max_length, verbose=False)["input_ids"]
        return asked.logits(ids).softmax(-1)

    found = []
    for row, (before, after) in zip(asked.rows, asked.twice(ask), strict=True):
        first = sorted(range(len(after)), key=lambda i: -float(after[i]))
        names = [str(asked.labels[i]) for i in range(len(after))]
        true = str(row["label"])
        picked = [i for i in first if names[i] == true or i in first[:4] or i == int(before.argmax())]
        table = [["class", "before", "after"], *([names[i], _percent(before[i]), _percent(after[i])] for i in picked)]
        found.append(Sample(row["text"], true, names[int(before.argmax())], names[first[0]], table))
    return found


def _percent(p: Tensor) -> str:
    return f"{100 * float(p):.1f} %"


def _tags(asked: Asked) -> list[Sample]:
    def ask(row: Row) -> list[str]:
        ids, firsts = encode_words(asked.tokenizer, row["tokens"][:WORDS])
        numbers = asked.logits(ids[: asked.max_length]).argmax(-1).tolist()
        return ["" if i is None or i >= len(numbers) else str(asked.labels[numbers[i]]) for i in firsts]

    found = []
    for row, (before, after) in zip(asked.rows, asked.twice(ask), strict=True):
        words, true = row["tokens"][:WORDS], [str(tag) for tag in row["tags"][:WORDS]]
        table = [["word", "in the data", "before", "after"], *map(list, zip(words, true, before, after, strict=True))]
        one, two = (f"{sum(map(eq, true, said))} of {len(true)} tags right" for said in (before, after))
        found.append(Sample(" ".join(words), " ".join(true), one, two, table))
    return found


def _preferences(asked: Asked) -> list[Sample]:
    pairs = asked.twice(lambda row: (asked.log_p(row, "chosen"), asked.log_p(row, "rejected")))
    said = asked.twice(lambda row: asked.answer(_prompt(asked, row)))
    found = []
    for row, (before, after), both in zip(asked.rows, pairs, said, strict=True):
        table = [["log p, nats", "before", "after"]]
        table += [[name, f"{before[i]:.2f}", f"{after[i]:.2f}"] for i, name in enumerate(("chosen", "rejected"))]
        table.append(["chosen − rejected", f"{before[0] - before[1]:+.2f}", f"{after[0] - after[1]:+.2f}"])
        wanted = f"chosen: {_conversation(row['chosen'])}\nrejected: {_conversation(row['rejected'])}"
        found.append(Sample(_conversation(row["prompt"], row.get("tools")), wanted, *both, table))
    return found


def _feedback(asked: Asked) -> list[Sample]:
    weights = asked.twice(lambda row: asked.log_p(row, "completion"))
    said = asked.twice(lambda row: asked.answer(_prompt(asked, row)))
    found = []
    for row, (before, after), both in zip(asked.rows, weights, said, strict=True):
        table = [["log p, nats", "before", "after"], ["this completion", f"{before:.2f}", f"{after:.2f}"]]
        wanted = f"{'desirable' if row['label'] else 'undesirable'}: {_conversation(row['completion'])}"
        found.append(Sample(_conversation(row["prompt"], row.get("tools")), wanted, *both, table))
    return found


def _prompt(asked: Asked, row: Row) -> list[int]:
    return asked.plain(row["prompt"]) if isinstance(row["prompt"], str) else asked.chat(row["prompt"], row)


ASK: dict[str, Callable[[Asked], list[Sample]]] = {
    "text": _texts,
    "chat": _chats,
    "pair": _pairs,
    "classify": _classes,
    "tag": _tags,
    "preference": _preferences,
    "feedback": _feedback,
}
