"""What the tests of this folder share: adapters with random tensors, and the real PEFT beside them."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import lorakit
from lorakit.core.attach import Adapted
from lorakit.data.tiny import tiny_model

IDS = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(1))


def shaken(model: nn.Module, name: str, *, seed: int = 0, **kwargs: Any) -> Adapted:
    """A method attached, every trained tensor moved away from its start by random amounts."""
    adapted = lorakit.attach(model, lorakit.get_method(name, **kwargs), seed=seed)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for row in adapted.params():
            row.tensor.add_(0.1 * torch.randn(row.tensor.shape, generator=rng, dtype=torch.float64).to(row.tensor))
    return adapted


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    """The model's outputs in eval mode."""
    return model.eval()(input_ids=ids).logits


def in_peft(model: nn.Module, folder: Path, **kwargs: Any) -> Any:
    """The real PEFT's model around a copy of this one, with the folder's adapter."""
    with quiet():
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder, **kwargs).eval()


def made_by_peft(model: nn.Module, config: Any, folder: Path, *, seed: int = 0) -> Any:
    """An adapter that PEFT made, filled at random, and saved; returns PEFT's model around a copy of this one."""
    torch.manual_seed(seed)
    with quiet():
        made = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if p.requires_grad and "ranknum" not in name:
                p.add_(0.1 * torch.randn_like(p))
    save_by_peft(made, folder)
    return made.eval()


def save_by_peft(made: Any, folder: Path) -> None:
    """PEFT's save_pretrained."""
    with quiet():
        made.save_pretrained(folder)


def quiet() -> warnings.catch_warnings:
    """PEFT warns of what these tests do on purpose (adapted embeddings, Conv1D)."""
    return warnings.catch_warnings(action="ignore")


__all__ = ["IDS", "in_peft", "logits", "made_by_peft", "quiet", "save_by_peft", "shaken", "tiny_model"]
