"""Prompt tuning: trained embeddings in front of the input, and nothing else.

    h₀ = [P; E(x)]        P: tokens × d

Trained: P, tokens · d. It is prefix tuning's embedding form; in an encoder-decoder the prompt stands in front of the encoder's input.
Defaults: `tokens` 20, beyond which the paper finds little gain (its own default is 100); `ratio` 100 times the run's learning rate (ours;
the paper's rate is 0.3, with Adafactor); `start` "words", the embeddings of random words of the vocabulary (the paper draws from the 5000
most frequent); "normal" is N(0, `std`²).
References: arXiv:2104.08691; survey 1.

Use it when an adapter of a few kilobytes is the point and the model is large; its paper finds it level with fine-tuning from billions of
parameters on, and behind below. On small models any method that changes weights learns more.
"""

from lorakit.core.method import Method, get_method, method
from lorakit.parts.patches.prompt import Start


@method("prompt_tuning", paper="arXiv:2104.08691", survey="1", kind="patch")
def prompt_tuning(
    tokens: int = 20, start: Start = "words", std: float = 0.02, ratio: float = 100.0, unfreeze: tuple[str, ...] = ()
) -> Method:
    """A trained soft prompt in front of every input."""
    return get_method("prefix", tokens=tokens, form="embedding", start=start, std=std, ratio=ratio, unfreeze=unfreeze)
