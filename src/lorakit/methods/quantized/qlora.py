"""QLoRA: LoRA on a base stored in four bits.

    y = W̃ x + (alpha / r) · B A dropout(x) + bias        W̃ = NF4(W): one of 16 levels times the scale of its block of 64

W is kept as codes and scales, 4.127 bits a parameter under double quantization (`double_quant`; 4.5 without), in blocks of `blocksize`.
It is decoded a few rows at a time in forward and again in backward, whose gradient goes through W̃ to x only; nothing dense is kept between.
The start is W̃'s output, not W's. Embeddings, heads and norms are not quantized; all other linear weights are, adapted or not.
Trained: A and B, r (d_in + d_out) a site; checkpoint: a plain LoRA pair. Merging decodes W̃ and adds s·B·A in the base's dtype, exactly;
packing the result again is lossy (`lorakit merge --requantize` says by how much). Attaching keeps the original weights for detaching;
`lorakit.quantize(model)` before, or `lorakit train`, drops them.
Defaults: r 64, alpha 16, no dropout, NF4 with double quantization at every linear layer (official qlora.py). Its run has learning rate
2e-4 constant, warmup 0.03, gradient norm 0.3, gradient checkpointing and a paged 32-bit AdamW; pages are CUDA's and not offered here.
References: arXiv:2305.14314; survey 5.2.1.

Use it when the base does not fit in 16 bits and the adapter is to be plain LoRA. Where the base fits it is only slower (1.53 times LoRA's
step on our CPU, as weights are decoded in every step) and starts from a slightly worse model; `--quantize nf4` does the same for any other
method.
"""

from lorakit.core.method import Method, method
from lorakit.core.site import Where
from lorakit.methods.lora.lora import lora
from lorakit.parts.bases.nf4_base import NF4Spec


@method("qlora", paper="arXiv:2305.14314", survey="5.2.1", kind="base")
def qlora(
    r: int = 64,
    alpha: float = 16.0,
    dropout: float = 0.0,
    sites: Where = "all-linear",
    double_quant: bool = True,
    blocksize: int = 64,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """LoRA on a base in NF4: 4.127 bits a parameter, the adapter in full precision."""
    method = lora(r, alpha, dropout, sites, rank_pattern, alpha_pattern, unfreeze)
    return method.but(base=NF4Spec(double_quant, blocksize))
