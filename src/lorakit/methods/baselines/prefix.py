"""Prefix tuning: trained positions in front of the text, at every layer or at the input.

    form="layer"        attention(q, [K_l; k], [V_l; v])     K_l: tokens × d_k, V_l: tokens × d_v, in every attention module l
    form="embedding"    h₀ = [P; E(x)]                       P: tokens × d; the LoRA paper's PreEmbed

The layer form trains keys and values as such (2101.00190's P_θ without its reparametrizing MLP). The LoRA paper's PreLayer trains the
activations instead, from which W_k and W_v make them: half as many numbers where d_k = d, the same reach. The `tokens` are prefix tokens;
the LoRA paper's infix tokens are not here. Positions of the text stay as they are in the layer form and begin at `tokens` in the embedding
form.
Trained: layer, Σ_l tokens (d_k + d_v); embedding, tokens · d. Never merged: the trained positions stay beside the weights. The trained
positions learn `ratio` times faster than the run's rate says: they have the size of activations, not of weights.
Defaults: `tokens` 20, between the paper's 10 (table to text) and 200 (summarization); `start` "words", from the keys and values (or
embeddings) of random words of the vocabulary, the paper's advice for little data; "normal" is N(0, `std`²), std 0.02 our choice. `ratio`
100 is ours, too: measured on the bundled base, where rates of 0.02 to 0.1 serve best.
References: arXiv:2101.00190; the LoRA paper (arXiv:2106.09685) section 5.1; survey 1.

Use it when weights may not be touched at all, or prompts of many users are to be batched over one base: trained keys and values in front of
every layer. It takes context length at inference, cannot be merged, and with little data starts best from `words`.
"""

from typing import Literal

from lorakit.core.errors import BadParameter
from lorakit.core.method import Method, method
from lorakit.parts.optimizers.adamw import AdamW
from lorakit.parts.patches.prefix import PrefixSpec
from lorakit.parts.patches.prompt import PromptSpec, Start

FORMS: dict[str, type[PrefixSpec] | type[PromptSpec]] = {"layer": PrefixSpec, "embedding": PromptSpec}


@method("prefix", paper="arXiv:2101.00190", survey="1", kind="patch")
def prefix(
    tokens: int = 20,
    form: Literal["layer", "embedding"] = "layer",
    start: Start = "words",
    std: float = 0.02,
    ratio: float = 100.0,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """Trained keys and values in front of every layer's, or trained embeddings in front of the input."""
    if ratio <= 0:
        raise BadParameter(f"ratio={ratio} is not possible; the trained positions' rate is ratio times the run's: give a positive number")
    faster = AdamW(ratios=tuple((role, ratio) for role in "KVP"))
    return Method(None, patches=(FORMS[form](tokens, start, std),), unfreeze=unfreeze, optim=faster, identity=False)
