"""The model's embeddings, whatever they are called."""

from dataclasses import dataclass

from torch import nn

from lorakit.core.generated import plain_type


@dataclass(frozen=True)
class Embeddings:
    """Tables of tokens, positions and segments."""

    def __call__(self, module: nn.Module, parameter: str) -> bool:
        return issubclass(plain_type(module), nn.Embedding)
