"""The model's norms, whatever they are called: every architecture names them differently, and some have none of what is asked for."""

from dataclasses import dataclass

from torch import nn

from lorakit.core.generated import plain_type


@dataclass(frozen=True)
class Norms:
    """Parameters of modules whose class is a norm (LayerNorm, LlamaRMSNorm, …); of those only the biases, if asked."""

    only_biases: bool = False

    def __call__(self, module: nn.Module, parameter: str) -> bool:
        return "norm" in plain_type(module).__name__.lower() and (parameter == "bias" or not self.only_biases)
