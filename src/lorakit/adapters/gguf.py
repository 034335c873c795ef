"""An adapter as a GGUF file that llama.cpp loads beside the base (`llama-cli -m base.gguf --lora adapter.gguf`).

    general.type adapter · adapter.type lora · adapter.lora.alpha · general.architecture
    blk.<i>.<weight>.lora_a   A [r, d_in]        blk.<i>.<weight>.lora_b   B [d_out, r]        ΔW = (alpha / r) · B · A

llama.cpp multiplies by alpha / r with the one alpha of the file and each weight's own r (no alpha: by 1). Where a site's s is another, the
rest goes into its B. A GGUF base is no copy of the Transformers model: its converter renames every weight and turns the rows of some, so
B's rows are turned likewise:

    llama, mistral, mixtral, granite, smollm3   q, k: the two halves of a head's rows by turns (the rotary embedding there takes neighbors)
    bloom, gpt_neox                             query_key_value: from head by head to all q, all k, all v
    gpt2                                        its weights are stored turned over, which A and B never are here
    the others below                            as they are

An architecture is here where llama.cpp itself loaded such a file and computed the merged model's logits (docs/formats.md); others are
refused. So are experts and routers, embeddings and heads (often tied in a GGUF, where an adapter on them is ignored), whole parameters,
and all that is not s·B·A.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorakit.adapters.pair import Pair
from lorakit.adapters.peft_form import plain
from lorakit.adapters.update import norm
from lorakit.core.adapter import Adapter
from lorakit.core.delta import Factors
from lorakit.core.errors import AdapterMismatch, BadParameter, CheckpointError, MissingExtra, NotExportable

Turn = Callable[[Tensor, Mapping[str, Any]], Tensor]
"""B [d_out, r] and the base's configuration, to B with its rows in the order of the GGUF base."""


@dataclass(frozen=True)
class Architecture:
    """`name`: gguf's MODEL_ARCH; `turns`: by the end of a module's path."""

    name: str
    turns: Mapping[str, Turn]


@dataclass(frozen=True)
class Written:
    """`error`: ‖ΔW − ΔW as written‖ / ‖ΔW‖ over all sites, from rounding to `dtype` alone."""

    path: Path
    architecture: str
    alpha: float
    tensors: int
    dtype: str
    error: float

    def lines(self) -> list[str]:
        """For people."""
        exact = "exact in fp32" if self.dtype == "float32" else f"in {self.dtype}, relative error {self.error:.2e} from rounding"
        return [f"GGUF LoRA for {self.architecture}, {self.tensors} tensors, alpha {self.alpha:g}, {exact}"]


def to_gguf(
    adapter: Adapter,
    path: str | Path,
    *,
    config: Mapping[str, Any],
    model: nn.Module | None = None,
    dtype: str = "float32",
    name: str | None = None,
) -> Written:
    """Write a new file, whole or not at all.

    Args:
        config: the base's configuration (config.json): model_type, numbers of layers and heads.
        model: the base, where the adapter has parts of fused weights (c_attn[q]).
        dtype: float32 or float16.
        name: general.name.

    Raises NotExportable for what the format cannot hold and for unknown architectures, AdapterMismatch for sites that the architecture
    lacks, CheckpointError where the file is there or cannot be written, MissingExtra without the package gguf.
    """
    path = Path(path)
    if dtype not in DTYPES:
        raise BadParameter(f"dtype {dtype!r} cannot hold a GGUF LoRA here; expected {' or '.join(DTYPES)}")
    if path.exists():
        raise CheckpointError(f"{path} exists; give another --out")
    kind = architecture(config)
    _check(adapter)
    pairs = {module: pair for module, pair in _pairs(adapter, model).items() if pair.s != 0 and pair.B.any()}
    if not pairs:
        raise NotExportable("the adapter changes nothing: all its updates are zero, and there is nothing to write")
    names = tensor_names(kind, config, list(pairs))
    alpha = _alpha(pairs)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    lost, whole = 0.0, 0.0
    for module, pair in pairs.items():
        A, B = (t.to(DTYPES[dtype]) for t in _scaled(pair, alpha))
        if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
            raise NotExportable(f"{module} has values too large for {dtype}; write float32")
        written = Factors(A.double(), B.double(), alpha / pair.r)
        lost, whole = lost + _difference(pair, written) ** 2, whole + norm(Factors(pair.A, pair.B, pair.s)) ** 2
        turned = next((turn for end, turn in kind.turns.items() if module.endswith(end)), lambda B, config: B)(B, config)
        tensors |= {f"{names[module]}.lora_a": A.contiguous().numpy(), f"{names[module]}.lora_b": turned.contiguous().numpy()}
    _write(path, kind, alpha, tensors, name)
    return Written(path, _llama_cpp(kind), alpha, len(tensors), dtype, (lost / whole) ** 0.5)


def architecture(config: Mapping[str, Any]) -> Architecture:
    """That of a configuration. Raises NotExportable."""
    found = ARCHITECTURES.get(str(config.get("model_type")))
    if found is None:
        raise NotExportable(
            f"how llama.cpp stores {config.get('model_type')!r} is not known here, so its rows could be in another order; known are "
            f"{', '.join(ARCHITECTURES)}; --to merged writes a model that llama.cpp's own converter reads"
        )
    return found


def tensor_names(kind: Architecture, config: Mapping[str, Any], modules: list[str]) -> dict[str, str]:
    """`blk.0.attn_q.weight` of every module's path. Raises AdapterMismatch for one that the architecture lacks."""
    try:
        import gguf
    except ImportError:
        raise MissingExtra("gguf", "gguf") from None
    layers = _number(config, "num_hidden_layers", "n_layer")
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.name], layers)
    names = {module: known.get_name(f"{module}.weight", try_suffixes=(".weight",)) for module in modules}
    unknown = [module for module, found in names.items() if found is None]
    if unknown:
        raise AdapterMismatch(f"llama.cpp's {_llama_cpp(kind)} with {layers} layers has no weight {unknown[0]}; is it the adapter's base?")
    return {module: f"{str(found).removesuffix('.weight')}.weight" for module, found in names.items()}


# ---------------------------------------------------------------------------------------------------------------------- the steps
def _check(adapter: Adapter) -> None:
    whole = adapter.unfrozen()
    if whole:
        raise NotExportable(
            f"the adapter trained {len(whole)} whole parameters ({next(iter(whole))}, …), which a GGUF LoRA cannot hold; --to merged can"
        )
    odd = [site for site in adapter.sites if site.kind != "linear" or site.role == "head"]
    if odd:
        what = "the head" if odd[0].role == "head" else {"embedding": "an embedding", "router": "a router"}.get(odd[0].kind, "experts")
        raise NotExportable(f"{odd[0].name} is {what}, which a GGUF LoRA does not adapt reliably; --to merged can, or leave the site out")


def _pairs(adapter: Adapter, model: nn.Module | None) -> Mapping[str, Pair]:
    try:
        return plain(adapter, model).modules
    except NotExportable as error:
        raise NotExportable(f"{error}; for GGUF --to merged keeps all of it, and --rank R what plain LoRA can") from None


def _alpha(pairs: Mapping[str, Pair]) -> float:
    """The s·r of most sites, as fp32 has it, which is what the file holds. Never 0: that would mean a scale of 1."""
    return float(np.float32(Counter(pair.s * pair.r for pair in pairs.values()).most_common(1)[0][0]))


def _scaled(pair: Pair, alpha: float) -> tuple[Tensor, Tensor]:
    """A and B for a scale of alpha / r."""
    rest = pair.s * pair.r / alpha
    A, B = pair.A.detach().cpu(), pair.B.detach().cpu()
    return A, B if abs(rest - 1) < 1e-7 else (B.double() * rest).float()


def _difference(pair: Pair, written: Factors) -> float:
    A, B = torch.cat([pair.A.double(), written.A]), torch.cat([pair.s * pair.B.double(), -written.s * written.B], 1)
    return norm(Factors(A, B, 1.0))


def _write(path: Path, kind: Architecture, alpha: float, tensors: Mapping[str, np.ndarray[Any, Any]], name: str | None) -> None:
    import gguf

    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(partial, _llama_cpp(kind))
        try:
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
            if name:
                writer.add_name(name)
            for key, values in sorted(tensors.items()):
                writer.add_tensor(key, values)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        os.replace(partial, path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _llama_cpp(kind: Architecture) -> str:
    """general.architecture: llama.cpp refuses an adapter with another one than its base's."""
    import gguf

    return str(gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[kind.name]])


def _number(config: Mapping[str, Any], *names: str) -> int:
    """The first of these that the configuration has."""
    found = next((config[name] for name in names if config.get(name) is not None), None)
    if not isinstance(found, int) or found < 1:
        raise AdapterMismatch(f"the base's configuration has no {names[0]}: is it that of a language model?")
    return found


def _rotary(heads: str) -> Turn:
    """[n, 2, half] -> [n, half, 2]: halves by turns, in each of as many heads as the configuration's `heads` says."""

    def turn(B: Tensor, config: Mapping[str, Any]) -> Tensor:
        n = _number(config, heads, "num_attention_heads")
        if len(B) % (2 * n):
            raise AdapterMismatch(f"{len(B)} rows are not {n} heads of an even size; is it the adapter's base?")
        return B.reshape(n, 2, -1, B.shape[1]).transpose(1, 2).reshape(B.shape)

    return turn


def _apart(B: Tensor, config: Mapping[str, Any]) -> Tensor:
    """[n, 3, d] -> [3, n, d]."""
    n = _number(config, "num_attention_heads", "n_head")
    if len(B) % (3 * n):
        raise AdapterMismatch(f"{len(B)} rows are not q, k and v of {n} heads; is it the adapter's base?")
    return B.reshape(n, 3, -1, B.shape[1]).transpose(0, 1).reshape(B.shape)


DTYPES = {"float32": torch.float32, "float16": torch.float16}
HALVES: Mapping[str, Turn] = {".q_proj": _rotary("num_attention_heads"), ".k_proj": _rotary("num_key_value_heads")}
LLAMA = Architecture("LLAMA", HALVES)
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "qwen2": Architecture("QWEN2", {}),
    "qwen3": Architecture("QWEN3", {}),
    "qwen3_moe": Architecture("QWEN3MOE", {}),
    "gemma": Architecture("GEMMA", {}),
    "gemma2": Architecture("GEMMA2", {}),
    "gemma3_text": Architecture("GEMMA3", {}),
    "phi": Architecture("PHI2", {}),
    "phi3": Architecture("PHI3", {}),
    "gpt2": Architecture("GPT2", {}),
    "gpt_neox": Architecture("GPTNEOX", {".query_key_value": _apart}),
    "gpt_oss": Architecture("GPT_OSS", {}),
    "bloom": Architecture("BLOOM", {".query_key_value": _apart}),
    "granite": Architecture("GRANITE", HALVES),
    "olmo2": Architecture("OLMO2", {}),
    "smollm3": Architecture("SMOLLM3", HALVES),
    "starcoder2": Architecture("STARCODER2", {}),
}
"""By `model_type`."""
