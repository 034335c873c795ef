"""An opened library: with its base and its encoder, ready to continue prompts.

selection, mixture, fusion     found by the prompt once, 1/k each (serve/library.py)
token                          all adapters, weighted anew as the text goes (serve/token_level.py)
arrow                          all adapters, k of them for each token and site (serve/arrow.py)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lorakit.adapters.folder import locate
from lorakit.adapters.io import RECORD, load_adapter
from lorakit.core.errors import BadParameter, did_you_mean
from lorakit.serve.arrow import attach_arrow
from lorakit.serve.encoder import Encoder, HiddenMean, Sentences, Tuned
from lorakit.serve.generate import stream
from lorakit.serve.library import WAYS, Library, open_library
from lorakit.serve.mixture import attach_mixture
from lorakit.serve.open import Opened, open_base
from lorakit.serve.token_level import Nearness
from lorakit.serve.token_level import stream as stream_by_token
from lorakit.train.source_model import load_model


@dataclass(frozen=True)
class Shelf:
    """A library, a base that no adapter is on, and the encoder of its vectors."""

    library: Library
    opened: Opened
    encoder: Encoder

    def query(self, prompt: str) -> Tensor:
        """The prompt's vector [d]. Raises AdapterMismatch where the library's are another encoder's."""
        return self.library.encode(self.encoder, [prompt])[0]


def open_shelf(folder: str | Path, *, model: str | None = None, encoder: str | None = None) -> Shelf:
    """A library on the base that its adapters name, or on `model`; `encoder`: the folder of a sentence encoder."""
    library = open_library(folder)
    base = model or library.model
    if not base:
        raise BadParameter(f"the library {folder} does not name its base; give it with --model")
    opened = open_base(base)
    return Shelf(library, opened, encoder_for(opened, encoder))


def encoder_for(opened: Opened, folder: str | None) -> Encoder:
    """The encoder in a folder: an adapter that was trained as one, on another copy of the base, or a sentence encoder; without a folder,
    the base's own hidden states."""
    if folder is None:
        return HiddenMean(opened.model, opened.tokenizer)
    if locate(folder, RECORD) is not None:
        return Tuned(load_model(opened.meta["model"]), opened.tokenizer, load_adapter(folder))
    return Sentences(folder)


@dataclass(frozen=True)
class Choice:
    """Which adapters count, and how much."""

    how: str = "mixture"
    k: int = 3
    refresh: int = 2
    """token: for how many tokens weights hold."""
    tau: float | None = None
    """token, arrow: the weights' temperature; None: their default."""
    force: bool = False

    @property
    def temperature(self) -> dict[str, float]:
        """`tau` where there is one."""
        return {} if self.tau is None else {"temperature": self.tau}


def continued(shelf: Shelf, prompt: str, choice: Choice, **options: Any) -> Iterator[str]:
    """Pieces of the continuation of a prompt, with the adapters that suit it; the base is plain again afterwards. Raises BadParameter."""
    if choice.how not in HOW:
        raise BadParameter(f"how={choice.how!r} is none of the ways to put adapters together. {did_you_mean(choice.how, HOW)}")
    yield from HOW[choice.how](shelf, prompt, choice, options)


Made = Callable[[Shelf, str, Choice, dict[str, Any]], Iterator[str]]


def _once(shelf: Shelf, prompt: str, choice: Choice, options: dict[str, Any]) -> Iterator[str]:
    query = shelf.query(prompt)[None]
    mixture, g = shelf.library.attach(shelf.opened.model, query, choice.k, how=choice.how, force=choice.force)
    try:
        with mixture.weighted(g):
            yield from stream(shelf.opened, prompt, **options)
    finally:
        mixture.adapted.detach()


def _by_token(shelf: Shelf, prompt: str, choice: Choice, options: dict[str, Any]) -> Iterator[str]:
    shelf.query(prompt)  # another encoder than the library's is refused
    nearness = Nearness(shelf.encoder, shelf.library.embeddings, **choice.temperature)
    mixture = attach_mixture(shelf.opened.model, shelf.library.adapters(), force=choice.force)
    try:
        yield from stream_by_token(mixture, shelf.opened.tokenizer, nearness, prompt, refresh=choice.refresh, **options)
    finally:
        mixture.adapted.detach()


def _arrow(shelf: Shelf, prompt: str, choice: Choice, options: dict[str, Any]) -> Iterator[str]:
    adapters = shelf.library.adapters()
    adapted = attach_arrow(shelf.opened.model, adapters, k=min(choice.k, len(adapters)), force=choice.force, **choice.temperature)
    try:
        yield from stream(shelf.opened, prompt, **options)
    finally:
        adapted.detach()


HOW: dict[str, Made] = {**dict.fromkeys(WAYS, _once), "token": _by_token, "arrow": _arrow}
