"""Merge an adapter into a copy of its base, and prove that the two say the same.

The merged model is computed in fp32, saved in the target dtype, loaded again with plain Transformers, and compared with the adapter on
sample prompts: in fp32 before saving, and in the target dtype after. The input is never touched.

A quantized base is decoded and the change added: exact up to rounding to the target dtype. Packed again (`requantize`) the model is as
small as its base was, but loses what lies between two levels, often most of the change: the same comparison says what it costs.
"""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lorakit.core.errors import BadParameter, CheckpointError, NotMergeable
from lorakit.parts.bases.quantize import quantize
from lorakit.serve.open import Opened, base_storage, open_adapter
from lorakit.train.source_model import CLASSIFY, HEADED

DTYPES = ("float32", "bfloat16", "float16")
PROMPTS = (
    "def main(argv=None):\n    ",
    "The quick brown fox jumps over the lazy dog, and",
    "class Node:\n    def __init__(self, value, children=()):\n        self.value = value\n",
    "import os\nimport sys\n\nfor name in sorted(os.listdir(path)):\n    if name.endswith('.py'):",
)


@dataclass(frozen=True)
class Verdict:
    """`max_abs_diff`: largest logit difference of adapter and merged model in fp32; `target_max_abs_diff`: the same with the merged
    model as saved, in `dtype`; perplexities of the sample prompts; `rounding`: what the base's own rounding to `dtype` changes (0 in
    fp32); `requantized`: the saved model was packed again, so its difference is reported and not judged."""

    dtype: str
    max_abs_diff: float
    target_max_abs_diff: float
    rounding: float
    adapter_perplexity: float | None
    merged_perplexity: float | None
    prompts: int
    tolerance: float
    notes: tuple[str, ...] = ()
    requantized: bool = False

    @property
    def perplexity_change(self) -> float | None:
        """Relative change, merged against adapter; None for a classifier."""
        if self.adapter_perplexity is None or self.merged_perplexity is None:
            return None
        return self.merged_perplexity / self.adapter_perplexity - 1

    @property
    def ok(self) -> bool:
        """fp32 within tolerance, and the saved model within it too, plus twice what rounding alone does to the base."""
        saved = self.requantized or self.target_max_abs_diff <= self.tolerance + 2 * self.rounding
        return self.max_abs_diff <= self.tolerance and saved

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"perplexity_change": self.perplexity_change, "ok": self.ok}


def merge(
    folder: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    dtype: str | None = None,
    verify: bool = True,
    tolerance: float = 1e-3,
    force: bool = False,
    requantize: bool = False,
) -> Verdict | None:
    """Write the merged model of adapter `folder` to `out`; it loads with plain AutoModel classes (`requantize`: with bitsandbytes).

    Raises NotMergeable, and writes nothing, when verification exceeds `tolerance` (fp32 logits).
    """
    target = Path(out)
    if dtype is not None and dtype not in DTYPES:
        raise BadParameter(f"dtype {dtype!r} cannot hold a merged model; expected {', '.join(DTYPES)}")
    check_new(target)
    spec = base_storage(folder)
    if requantize and spec is None:
        raise BadParameter("the adapter's base is not quantized: there is no storage to pack the merged model into; leave out --requantize")
    opened = open_adapter(folder, model=model, dtype="float32", force=force)
    dtype = dtype or opened.meta.get("dtype", "float32")
    probe = probes(opened)
    with torch.no_grad():
        before = [logits(opened.model, ids) for ids in probe]
    assert opened.adapted is not None
    notes = tuple(opened.adapted.notes)
    plain = opened.adapted.merge_and_unload()
    with torch.no_grad():
        after = [logits(plain, ids) for ids in probe]
    with new_folder(target) as partial:
        rounded = plain if dtype == "float32" else plain.to(getattr(torch, dtype))
        if requantize:
            rounded = quantize(rounded, spec)
        save_model(rounded, opened.tokenizer, partial)
        verdict = _verdict(opened, rounded, partial, probe, before, after, dtype, tolerance, notes, requantize) if verify else None
        if verdict is not None and not verdict.ok:
            raise NotMergeable(
                f"merged and unmerged logits differ by {verdict.max_abs_diff:.2e} in fp32 and "
                f"{verdict.target_max_abs_diff:.2e} in {dtype}; "
                f"tolerance {tolerance:.0e}. Nothing was written; --tolerance accepts more"
            )
    return verdict


def check_new(target: Path) -> None:
    """Raise CheckpointError where something lies already."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not empty; give another --out")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside it to write a model into, which takes its place where all went well. Raises CheckpointError."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        raise CheckpointError(f"cannot write the model to {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def probes(opened: Opened) -> list[Tensor]:
    """Token ids of the sample prompts, [1, t] each."""
    limit = getattr(opened.model.config, "max_position_embeddings", None) or 512
    ids = [opened.tokenizer(p, return_tensors="pt")["input_ids"][:, : min(limit, 128)] for p in PROMPTS]
    vocabulary = opened.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    ids = [i.clamp_max(vocabulary - 1) for i in ids]
    eos = opened.tokenizer.eos_token_id
    if opened.task != CLASSIFY or not opened.model.config.is_encoder_decoder or eos is None:  # type: ignore[union-attr]
        return ids
    return [i if eos in i else torch.cat([i, i.new_tensor([[eos]])], 1) for i in ids]  # it answers at the EOS


def logits(model: Any, ids: Tensor) -> Tensor:
    """fp32 logits of one prompt."""
    options = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    result: Tensor = model(input_ids=ids.to(model.device), **options).logits.float().cpu()
    return result


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """As plain Transformers reads it."""
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)


def _verdict(
    opened: Opened,
    rounded: nn.Module,
    folder: Path,
    probe: list[Tensor],
    before: list[Tensor],
    after: list[Tensor],
    dtype: str,
    tolerance: float,
    notes: Any,
    requantized: bool,
) -> Verdict:
    with torch.no_grad():  # what was packed again would need bitsandbytes to be read
        reloaded = rounded if requantized else type(rounded).from_pretrained(folder, dtype=getattr(torch, dtype)).eval()  # type: ignore[attr-defined]
        saved = [logits(reloaded, ids) for ids in probe]
        # what rounding alone does: the merged fp32 model against itself, weights and activations in the target dtype
        rounding = 0.0 if dtype == "float32" else largest([logits(rounded, ids) for ids in probe], after)
    perplexities = [None, None] if opened.task in HEADED else [perplexity(found, probe) for found in (before, saved)]
    differences = largest(before, after), largest(before, saved), rounding
    return Verdict(dtype, *differences, perplexities[0], perplexities[1], len(probe), tolerance, notes, requantized)


def largest(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest absolute difference over pairs; NaN counts as infinite."""
    worst = max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))
    return math.inf if math.isnan(worst) else worst


def perplexity(found: list[Tensor], probe: list[Tensor]) -> float:
    """exp of the mean next-token loss over the prompts."""
    losses = [nn.functional.cross_entropy(x[0, :-1], ids[0, 1:], reduction="sum") for x, ids in zip(found, probe, strict=True)]
    return float(torch.exp(torch.stack(losses).sum() / sum(ids.shape[1] - 1 for ids in probe)))
