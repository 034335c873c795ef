"""Texts as vectors, by which a library of adapters is searched.

Any object with `name` and `encode` serves. Three are here:

    HiddenMean    the mean of a base's last hidden states over a text's tokens: needs nothing but the base, and finds coarsely
    Tuned         the same of a base under an adapter that was trained for it (train/retriever.py)
    Sentences     a sentence encoder in a local folder (INSTRUCTOR, GTR, …), given an instruction: what LoraRetriever was published with

Each text is encoded by itself, so that its vector does not depend on the others.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lorakit.adapters.digest import digest
from lorakit.adapters.record import read_bounded
from lorakit.adapters.weights import read
from lorakit.core.adapter import Adapter
from lorakit.core.attach import attach_adapter
from lorakit.core.errors import CheckpointError, Incompatible
from lorakit.core.fingerprint import fingerprint
from lorakit.core.layer import Slot
from lorakit.train.retriever import META, pooled

LENGTH = 512
"""Tokens of a text that are read at most: the last ones."""


class Encoder(Protocol):
    """Text -> vector."""

    @property
    def name(self) -> str:
        """What tells it from others: vectors of different encoders are never compared."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """[n, d] in fp32 on the CPU."""


class HiddenMean:
    """Mean over tokens of the last hidden state of a base.

    Made of the base alone; where adapters are attached to it later, whoever asks switches them off (`adapted.disabled()`).
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        if any(isinstance(module, Slot) for module in model.modules()):
            raise Incompatible("this model is adapted already: make the encoder of the base alone, before anything is attached")
        net: Any = model
        found = fingerprint(model)
        self.name = f"hidden-mean of base {found.rows or found.checkpoint}"
        self.model = model
        self.tokenizer = tokenizer
        self.length = min(LENGTH, getattr(net.config, "max_position_embeddings", None) or LENGTH)
        self.start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def encode(self, texts: Sequence[str]) -> Tensor:
        """[n, d]."""
        return torch.stack([self._one(text) for text in texts])

    @torch.no_grad()
    def _one(self, text: str) -> Tensor:
        ids = self.tokenizer(text, verbose=False)["input_ids"][-self.length :] or [self.start]
        return pooled(self.model, [ids])[0].cpu()


class Tuned(HiddenMean):
    """`HiddenMean` of a base that is its own: the adapter is merged into it. Vectors have unit length."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, adapter: Adapter) -> None:
        if META not in adapter.meta:
            raise Incompatible("this adapter was not trained to encode inputs; `lorakit library train-encoder` trains one")
        super().__init__(model, tokenizer)
        attach_adapter(model, adapter).merge_and_unload()
        self.name = f"{self.name} with {digest(adapter.tensors)[:12]}"

    def encode(self, texts: Sequence[str]) -> Tensor:
        """[n, d]."""
        return F.normalize(super().encode(texts), dim=1)


class Sentences:
    """A sentence encoder from a local folder: the mean of its last hidden states over a text's tokens, the instruction's left out, then its
    dense layer (`2_Dense`) where it has one, then unit length. Of a folder that sentence-transformers saved, other pooling is refused."""

    def __init__(self, folder: str | Path, instruction: str = "Represent the sentence for similar task retrieval: ") -> None:
        from transformers import AutoModelForTextEncoding, AutoTokenizer

        self.folder, self.instruction = Path(folder), instruction
        if not (self.folder / "config.json").is_file():
            raise CheckpointError(f"{folder} is no folder of a sentence encoder: it has no config.json; nothing is downloaded here")
        _check_pooling(self.folder)
        self.model: Any = AutoModelForTextEncoding.from_pretrained(self.folder, local_files_only=True).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        self.dense, self.left = _dense(self.folder), self._instructed()
        found, said = fingerprint(self.model), hashlib.sha256(instruction.encode()).hexdigest()[:8]
        self.name = f"sentences of {found.checkpoint or found.rows}, instruction {said}"

    def encode(self, texts: Sequence[str]) -> Tensor:
        """[n, d]."""
        return torch.stack([self._one(text) for text in texts])

    def _instructed(self) -> int:
        """How many tokens stand before the text: the instruction's, and what the tokenizer puts in front."""
        whole, plain = (self.tokenizer(self.instruction, add_special_tokens=special)["input_ids"] for special in (True, False))
        lead = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        return lead + len(plain)

    @torch.no_grad()
    def _one(self, text: str) -> Tensor:
        whole = self.tokenizer(self.instruction + text, truncation=True, max_length=LENGTH, return_tensors="pt")
        hidden = self.model(**whole).last_hidden_state[0].float()  # [t, d]
        kept = hidden[min(self.left, len(hidden) - 1) :].mean(0)
        return F.normalize(kept if self.dense is None else self.dense @ kept, dim=0)


def _check_pooling(folder: Path) -> None:
    path = folder / "1_Pooling" / "config.json"
    if path.is_file() and not _json(path).get("pooling_mode_mean_tokens"):
        raise Incompatible(f"{path} asks for another pooling than the mean over tokens, which is the only one here")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_bounded(path))
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from None
    return found if isinstance(found, dict) else {}


def _dense(folder: Path) -> Tensor | None:
    """The matrix [d, d_hidden] of the layer behind the pooling; None without one."""
    path = folder / "2_Dense"
    if not path.is_dir():
        return None
    file, config = path / "model.safetensors", path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path} holds no model.safetensors; a pickle is never opened: convert it with the tool that wrote it")
    tensors = read(file)
    activation = _json(config).get("activation_function", "Identity") if config.is_file() else "Identity"
    if set(tensors) != {"linear.weight"} or not str(activation).endswith("Identity"):
        raise Incompatible(f"{path} holds {sorted(tensors)} with activation {activation}; expected linear.weight alone, without activation")
    return tensors["linear.weight"].float()
