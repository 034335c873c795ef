"""Encoded samples: token ids and the labels that the loss reads, IGNORED where it must not look.

Labels are unshifted, as Transformers expects: labels[i] is input_ids[i], predicted from what stands before it.
"""

from dataclasses import dataclass

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
    ids = _ids(tokenizer, text, special=True)
    if ids[-1:] != [eos_id(tokenizer)]:
        ids = [*ids, eos_id(tokenizer)]
    return Encoded(ids, list(ids))


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> Encoded:
    """Prompt, completion, EOS; the loss is on completion and EOS alone.

    The two are tokenized apart, as they are in use: the model never sees a token that spans both.
    """
    start = _ids(tokenizer, prompt, special=True)
    if start[-1:] == [eos_id(tokenizer)]:
        start = start[:-1]
    answer = [*_ids(tokenizer, completion, special=False), eos_id(tokenizer)]
    return Encoded(start + answer, [IGNORED] * len(start) + answer)


def encode_translation(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> Encoded:
    """For encoder-decoder models: the prompt is what the encoder reads, the completion and EOS are the decoder's labels."""
    ids = _ids(tokenizer, prompt, special=True) or [eos_id(tokenizer)]
    return Encoded(ids, [*_ids(tokenizer, completion, special=False), eos_id(tokenizer)])


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the end-of-sequence token; DataError when the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no EOS token, so a text's end cannot be learned; set tokenizer.eos_token")
    return int(tokenizer.eos_token_id)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    # verbose=False: a text longer than the model is chunked later, so the tokenizer's warning would mislead
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
