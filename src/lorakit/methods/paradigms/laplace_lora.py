"""Laplace-LoRA: a Gaussian posterior over a trained LoRA.

    p(θ | D) ≈ N(θ_MAP, (H + I / σ²)⁻¹)        θ: all A and B, H block-diagonal, for each matrix a Kronecker product (K-FAC)
    f(x) ~ N(f_MAP(x), J Σ Jᵀ)                 J: the Jacobian of the class logits for θ; the model linearized at θ_MAP

Training is `lora`'s, and so is the adapter; at its end one pass over the training data finds H. Of a matrix's long side `n_kfac` directions
are kept, by an incremental SVD; the short side, r × r, is exact. σ² maximizes the evidence, unless `prior_variance` says it. Predictions
average the softmax over draws of f (lorakit.bayes, `lorakit eval --posterior`), so that confidence falls where the data said little; the
class of the mean logits stays that of LoRA. Gradients are of all tokens (K-FAC "expand"), with labels from the model itself; the
reference code takes the last token only. `batches` of the training data are used, 0 for all.
Trained: A and B, r (d_in + d_out) a site; stored besides: n_kfac (d_in + d_out) + 2 r² a site. Merging and plain
export keep the mean and drop the posterior.
Defaults: r 8, alpha 16, n_kfac 10 (reference code).
References: arXiv:2308.13111; survey 3.4.

Use it when confidence matters: classification, abstaining, small data. The mean prediction stays LoRA's; the price is one more pass over
the data and sampled predictions (`lorakit eval --posterior`), and the posterior is lost in merging and export.
"""

from lorakit.core.method import Method, method
from lorakit.core.scale import Rank
from lorakit.core.site import Where
from lorakit.methods.lora.lora import lora
from lorakit.parts.posterior.factors import PosteriorSpec
from lorakit.parts.posterior.fit import Laplace


@method("laplace_lora", paper="arXiv:2308.13111", survey="3.4", kind="controller")
def laplace_lora(
    r: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    sites: Where = "all-linear",
    n_kfac: int = 10,
    prior_variance: float = 0.0,
    batches: int = 0,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    unfreeze: tuple[str, ...] = (),
) -> Method:
    """LoRA with a Gaussian posterior, for calibrated predictions."""
    rank = Rank.of(r, alpha, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    trained = lora(r, alpha, dropout, sites, rank_pattern, alpha_pattern, unfreeze)
    return trained.but(patches=(PosteriorSpec(rank, n_kfac),), controllers=(Laplace(prior_variance, batches),))
