"""Prompt distillation (ControlPE, arXiv:2311.09773): data from which an adapter learns what a prompt does.

    D = {(x, y = LM(P ⊕ x))}        trained without P; with `controls`, (x, LM(x)) of other inputs beside it

The base writes y greedily under the prompt P; the file holds x and y, and P nowhere. With `chat`, P is the system message of the base's
own template and x a user's message, and the rows are conversations without the system message: in use, the same template minus P.
Otherwise the texts P + x and x are prompts. An answer that was cut at `max_new_tokens` is kept, and training sees it end there:
`unfinished` says how many were. An empty answer is left out.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lorakit.core.errors import BadParameter, DataError
from lorakit.data.chat import Chats
from lorakit.data.packable import eval_mode
from lorakit.data.row import Row


@dataclass(frozen=True)
class Distilled:
    """What was written."""

    file: Path
    rows: int
    empty: int
    """Inputs that the base answered with nothing."""
    unfinished: int
    """Answers that were cut at the limit."""


def distill_prompt(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    inputs: Sequence[str],
    out: str | Path,
    *,
    controls: Sequence[str] = (),
    chat: bool = False,
    max_new_tokens: int = 128,
) -> Distilled:
    """Write rows for `lorakit train`, {prompt, completion} or {messages}. The model answers as it is, without an adapter.

    Raises BadParameter where it cannot generate or an input leaves no room, DataError where no row is left.
    """
    if not model.can_generate():  # type: ignore[operator]
        raise BadParameter(f"{type(model).__name__} generates no text; distilling a prompt needs a language model")
    if chat and tokenizer.chat_template is None:
        raise BadParameter("this model's tokenizer has no chat template; leave chat out, or load the tokenizer with one")
    rows, empty, unfinished = list[Row](), 0, 0
    with eval_mode(model), torch.no_grad():
        for before, text in _asked(prompt, inputs, controls):
            answer, ended = _answer(model, tokenizer, _encoded(tokenizer, before, text, chat), max_new_tokens)
            empty, unfinished = empty + (not answer), unfinished + (bool(answer) and not ended)
            if answer:
                rows.append(_row(text, answer, chat))
    if not rows:
        raise DataError(f"the model answered all of {empty} inputs with nothing; nothing can be learned from that")
    path = Path(out)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)
    return Distilled(path, len(rows), empty, unfinished)


def _asked(prompt: str, inputs: Sequence[str], controls: Sequence[str]) -> Iterator[tuple[str, str]]:
    yield from ((prompt, text) for text in inputs)
    yield from (("", text) for text in controls)


def _encoded(tokenizer: Any, before: str, text: str, chat: bool) -> list[int]:
    """The ids that the model continues: what training will see, and the prompt before it."""
    if chat:
        messages = [{"role": "system", "content": before}] if before else []
        said = [*messages, {"role": "user", "content": text}]
        return Chats(tokenizer).prompt(said)
    ids = list(tokenizer(before + text, add_special_tokens=True)["input_ids"])
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids  # as data/encoded.py starts a prompt


def _answer(model: Any, tokenizer: Any, ids: list[int], limit: int) -> tuple[str, bool]:
    """(the greedy continuation, whether it came to an end)."""
    room = getattr(model.config, "max_position_embeddings", None)
    if room and len(ids) + limit > room:
        raise BadParameter(
            f"a prompt and its input are {len(ids)} tokens, and with max_new_tokens={limit} more than the model's {room} positions"
        )
    start = torch.tensor([ids or [tokenizer.bos_token_id or tokenizer.eos_token_id]], device=model.device)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": limit, "pad_token_id": tokenizer.pad_token_id}
    found: Tensor = model.generate(start, attention_mask=torch.ones_like(start), **options)[0]
    written = found if model.config.is_encoder_decoder else found[start.shape[1] :]
    text: str = tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text, tokenizer.eos_token_id in written.tolist()


def _row(text: str, answer: str, chat: bool) -> Row:
    if chat:
        return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]}
    return {"prompt": text, "completion": answer}
