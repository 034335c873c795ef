"""Encoded samples: token ids and the labels that the loss reads, IGNORED where it must not look.

Labels are unshifted, as Transformers expects: labels[i] is input_ids[i], predicted from what stands before it.
A tokenizer is given many texts in one call; each one's tokens are those that it has alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorakit.core.errors import DataError

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sequence; `labels` is as long as `input_ids`, except for encoder-decoder samples, where it is the target."""

    input_ids: list[int]
    labels: list[int]
    kind: int | None = None
    """Which kind of sample it is, where the rows say so."""
    mark: int | None = None
    """Of feedback: whether the answer is wanted, and which answers share a prompt (`preference.mark_of`)."""

    @property
    def trained(self) -> int:
        """How many labels the loss reads."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True, slots=True)
class Labeled:
    """One sequence to classify, and the number of its class."""

    input_ids: list[int]
    label: int
    kind: int | None = None


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoded:
    """The whole text as the tokenizer starts it (a BOS where it has one), then EOS; every token is trained on.

    A special token that the text spells out is read as that token, so texts that hold a finished template work.
    """
    return encode_texts(tokenizer, [text])[0]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, closing: "Closing | None" = None) -> list[Encoded]:
    """`encode_text` of each."""
    eos, closed = eos_id(tokenizer), closing or Closing()
    whole = [closed(ids, eos) for ids in token_ids(tokenizer, texts, special=True)]
    return [Encoded(ids, list(ids)) for ids in whole]


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, *, learn_prompt: bool = False) -> Encoded:
    """Prompt, completion, EOS (unless the completion spells it out); the loss is on completion and EOS alone, or on the prompt too.

    The two are tokenized apart, as they are in use: the model never sees a token that spans both.
    """
    return encode_pairs(tokenizer, [(prompt, completion)], learn_prompt=learn_prompt)[0]


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], *, learn_prompt: bool = False, closing: "Closing | None" = None
) -> list[Encoded]:
    """`encode_pair` of each."""
    eos, closed = eos_id(tokenizer), closing or Closing()
    starts = token_ids(tokenizer, [prompt for prompt, _ in pairs], special=True)
    answers = token_ids(tokenizer, [completion for _, completion in pairs], special=False)
    samples = []
    for start, answer in zip(starts, answers, strict=True):
        start = start[:-1] if start[-1:] == [eos] else start
        answer = closed(answer, eos)
        samples.append(Encoded(start + answer, (start if learn_prompt else [IGNORED] * len(start)) + answer))
    return samples


def encode_translations(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], *, closing: "Closing | None" = None
) -> list[Encoded]:
    """For encoder-decoder models: the prompt is what the encoder reads, the completion and EOS are the decoder's labels."""
    eos, closed = eos_id(tokenizer), closing or Closing()
    starts = token_ids(tokenizer, [prompt for prompt, _ in pairs], special=True)
    answers = token_ids(tokenizer, [completion for _, completion in pairs], special=False)
    return [Encoded(start or [eos], closed(answer, eos)) for start, answer in zip(starts, answers, strict=True)]


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the end-of-sequence token; DataError when the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no EOS token, so a text's end cannot be learned; set tokenizer.eos_token")
    return int(tokenizer.eos_token_id)


class Closing:
    """Ends sequences in EOS, and counts those that had one."""

    def __init__(self) -> None:
        self.appended = self.spelled = 0

    def __call__(self, ids: list[int], eos: int) -> list[int]:
        """The ids with an EOS at their end, unless there is one."""
        if ids[-1:] == [eos]:
            self.spelled += 1
            return ids
        self.appended += 1
        return [*ids, eos]


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool, **options: Any) -> list[list[int]]:
    """Each text's tokens, with the special ones that the tokenizer adds or without."""
    # verbose=False: a text longer than the model is chunked later, so the tokenizer's warning would mislead
    return [list(ids) for ids in tokenize_all(tokenizer, texts, add_special_tokens=special, **options)["input_ids"]]


def tokenize_all(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], **options: Any) -> Any:
    """What the tokenizer says of each text, in one call; no text is made longer by its neighbors."""
    if not texts:  # which tokenizers do not take
        return {"input_ids": [], "offset_mapping": []}
    return tokenizer(list(texts), padding=False, verbose=False, return_attention_mask=False, return_token_type_ids=False, **options)
