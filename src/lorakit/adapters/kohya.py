"""What a kohya or LyCORIS file holds: of every module the change of its weight, as factors where it has some.

    algorithm   tensors of a module                                     ΔW, always times alpha / r
    lora        lora_up [o, r], lora_down [r, i], lora_mid [r, r, k]    up · down; with mid Σ up[o, p] mid[p, q, k] down[q, i]
    loha        hada_w1_a, _w1_b, _w2_a, _w2_b, hada_t1, _t2            (w1a w1b) ∘ (w2a w2b), of rank r² at most
    lokr        lokr_w1 or _w1_a, _w1_b; lokr_w2 or _w2_a, _w2_b, _t2   w1 ⊗ w2, of rank r₁ r₂ at most; unscaled where both are whole
    glora       a1, a2, b1, b2 (.weight)                                b1 b2 + W a1 a2, of rank 2r: the base is needed
    ia3         weight, on_input                                        W times the weight, by rows, or by columns: the base is needed
    full        diff, diff_b                                            diff itself; diff_b is added to the bias
    norm        w_norm, b_norm                                          added to a norm's weight and bias

`alpha` is one number; 0, or none, means r, as its writers have it. `dora_scale` [o, 1] is DoRA's m. A kernel's k × k follows the input
channels, so that a convolution is d_out × (d_in k k). OFT, BOFT and T-LoRA are refused: they rotate W, or subtract a start that is not in
the file.

The file is read as hostile (weights.py): no pickle, a bounded header; here every tensor's name, shape and values are checked before it is
used, and no name in it ever becomes a path.

References: github.com/KohakuBlueleaf/LyCORIS 4.1, github.com/kohya-ss/sd-scripts; LoHa arXiv:2108.06098, LoKr arXiv:2309.14859, GLoRA
arXiv:2306.07967, IA3 arXiv:2205.05638.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.adapters.cut import Change
from lorakit.adapters.update import norm
from lorakit.adapters.weights import DTYPES, PICKLES, read, refusal
from lorakit.core.delta import Factors
from lorakit.core.errors import AdapterMismatch, CheckpointError, NotExportable

FLOATS = {**DTYPES, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
"""Kinds of number in such files; what is read becomes fp32."""
VALUES_LIMIT = 2**30
"""Of the factors of one module, or of its ΔW."""
NAME = re.compile(r"[A-Za-z0-9_\-]{1,512}")


@dataclass(frozen=True)
class Trained:
    """One module of a file. `name`: its own, with underscores for dots and the prefix of the file; `tensors` by their short names, fp32."""

    name: str
    algo: str
    tensors: Mapping[str, Tensor]

    def change(self, W: Tensor | None = None) -> Change | None:
        """ΔW [d_out, d_in]; None for a norm. Raises AdapterMismatch for tensors that do not fit each other or W, NotExportable where W
        [d_out, d_in] is needed and not given."""
        try:
            return ALGOS[self.algo].change(self, W)
        except (ValueError, IndexError, RuntimeError) as error:
            if isinstance(error, AdapterMismatch | NotExportable):
                raise
            shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in self.tensors.items())
            raise AdapterMismatch(f"the tensors of {self.name} do not fit each other ({error}): {shapes}") from None

    @property
    def vectors(self) -> dict[str, Tensor]:
        """What is added to whole parameters of the module, by their name in it: weight (of a norm), bias."""
        names = {"diff_b": "bias", "w_norm": "weight", "b_norm": "bias"}
        return {names[key]: t for key, t in self.tensors.items() if key in names}

    def scale(self, r: int) -> float:
        """alpha / r."""
        alpha = self.tensors.get("alpha")
        return (alpha.item() or r) / r if alpha is not None else 1.0


def read_modules(path: str | Path, *, only: str | None = None) -> list[Trained]:
    """The modules in a file, by name; `only`: those whose names begin so. Raises CheckpointError, AdapterMismatch, NotExportable."""
    path = Path(path)
    if path.suffix in PICKLES:
        raise CheckpointError(refusal(path))
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read(path, dtypes=FLOATS).items():
        name, _, short = key.partition(".")
        if short in REFUSED:
            raise NotExportable(f"{path}: {name[:80]!r} is {REFUSED[short]}")
        if not NAME.fullmatch(name) or short not in KNOWN:
            raise CheckpointError(
                f"{path} is no file of kohya's or LyCORIS's: {key[:80]!r} is not MODULE.TENSOR with lora_down.weight, hada_w1_a, lokr_w1, "
                "… for TENSOR; a file of PEFT's or lorakit's is read by giving its folder"
            )
        groups.setdefault(name, {})[short] = _checked(key, tensor, path)
    found = [_trained(name, tensors, path) for name, tensors in sorted(groups.items()) if name.startswith(only or "")]
    if not found:
        starts = ", ".join(sorted({"_".join(name.split("_")[:2]) for name in groups}))
        raise CheckpointError(f"{path} holds no module" + (f" whose name begins with {only!r}; they begin with {starts}" if only else ""))
    return found


def _trained(name: str, tensors: dict[str, Tensor], path: Path) -> Trained:
    """With its algorithm, all of whose tensors must be there, and none of another's."""
    algo = next((algo for algo, kind in ALGOS.items() if any(set(need) & set(tensors) for need in kind.tells)), None)
    if algo is None:
        raise AdapterMismatch(f"{path}: of {name} there is only {', '.join(tensors)}: the tensors that it belongs to are missing")
    kind = ALGOS[algo]
    missing = [group for group in kind.needs if not any(set(way) <= set(tensors) for way in group)]
    if missing:
        raise AdapterMismatch(
            f"{path}: {name} ({algo}) has no {' or '.join(' and '.join(way) for way in missing[0])}: it was not copied whole"
        )
    odd = set(tensors) - {t for group in kind.needs for way in group for t in way} - set(kind.may)
    if odd:
        raise AdapterMismatch(f"{path}: {name} ({algo}) has a tensor {min(odd)!r} that does not belong to it")
    return Trained(name, algo, tensors)


def _checked(key: str, tensor: Tensor, path: Path) -> Tensor:
    tensor = tensor.float()
    number = key.endswith((".alpha", ".on_input"))
    if tensor.numel() == 0 or tensor.ndim > 5 or (tensor.ndim == 0 and not number):
        raise AdapterMismatch(f"{path}: tensor {key} has shape {list(tensor.shape)}, which no module's has")
    if not torch.isfinite(tensor).all():
        raise AdapterMismatch(f"{path}: tensor {key} holds NaN or infinite values; the file is damaged or its training diverged")
    if number and tensor.numel() != 1:
        raise AdapterMismatch(f"{path}: {key} has shape {list(tensor.shape)}; expected a single number")
    return tensor.reshape(()) if number else tensor


# ----------------------------------------------------------------------------------------------------------------- the algorithms
def _lora(m: Trained, W: Tensor | None) -> Change:
    B, A = _low(m.tensors["lora_up.weight"], m.tensors["lora_down.weight"], m.tensors.get("lora_mid.weight"), turned=False)
    return _sized(Factors(A.float(), B.float(), m.scale(len(A))))


def _loha(m: Trained, W: Tensor | None) -> Change:
    t = m.tensors
    (B1, A1), (B2, A2) = (_low(t[f"hada_w{i}_a"], t[f"hada_w{i}_b"], t.get(f"hada_t{i}"), turned=f"hada_t{i}" in t) for i in (1, 2))
    sizes = _bound((B1, "or"), (A1, "ri"), (B2, "os"), (A2, "si"))
    s = m.scale(len(A1))
    if sizes["r"] * sizes["s"] >= min(sizes["o"], sizes["i"]):  # wider than the matrix itself
        _within(sizes["o"] * sizes["i"])
        return (s * (B1 @ A1) * (B2 @ A2)).float()
    _within(sizes["r"] * sizes["s"] * (sizes["o"] + sizes["i"]))
    B, A = torch.einsum("or,os->ors", B1, B2).flatten(1), torch.einsum("ri,si->rsi", A1, A2).flatten(0, 1)
    return Factors(A.float(), B.float(), s)


def _lokr(m: Trained, W: Tensor | None) -> Change:
    """(B₁ A₁) ⊗ (B₂ A₂) = (B₁ ⊗ B₂)(A₁ ⊗ A₂)."""
    (B1, A1), (B2, A2) = _halves(m)
    rank = len(A1) * len(A2)
    d_out, d_in = len(B1) * len(B2), A1.shape[1] * A2.shape[1]
    s = kron_scale(m)
    if rank >= min(d_out, d_in):
        _within(d_out * d_in)
        return (s * _kron(B1 @ A1, B2 @ A2)).float()
    _within(rank * (d_out + d_in))
    return Factors(_kron(A1, A2).float(), _kron(B1, B2).float(), s)


def _kron(X: Tensor, Y: Tensor) -> Tensor:
    """X ⊗ Y; torch's own fails on some strides."""
    return torch.einsum("ab,cd->acbd", X, Y).reshape(len(X) * len(Y), -1)


def kron(m: Trained) -> tuple[Tensor, Tensor]:
    """w1 and w2 of a LoKr module, the scale in w1; a kernel is part of w2's columns."""
    (B1, A1), (B2, A2) = _halves(m)
    for B, A in ((B1, A1), (B2, A2)):
        _within(len(B) * A.shape[1])
    return (kron_scale(m) * (B1 @ A1)).float(), (B2 @ A2).float()


def kron_scale(m: Trained) -> float:
    """alpha / r, with the r of whichever of the two is a product."""
    t = m.tensors
    ranks = [t[key].shape[-1] for key in ("lokr_w1_a", "lokr_w2_a") if key in t]
    if "lokr_t2" in t:
        ranks[-1] = len(t["lokr_t2"])
    return m.scale(ranks[0]) if ranks else 1.0


def _halves(m: Trained) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(B, A) of w1 and of w2; of one that is no product with an identity on its smaller side."""
    return _half(m.tensors, 1), _half(m.tensors, 2)


def _half(t: Mapping[str, Tensor], i: int) -> tuple[Tensor, Tensor]:
    if f"lokr_w{i}" not in t:
        return _low(t[f"lokr_w{i}_a"], t[f"lokr_w{i}_b"], t.get(f"lokr_t{i}"), turned=f"lokr_t{i}" in t)
    parts = [key for key in t if key.startswith((f"lokr_w{i}_", f"lokr_t{i}"))]
    if parts:
        raise ValueError(f"lokr_w{i} is there whole, and as a product with {parts[0]}")
    w = t[f"lokr_w{i}"].double().flatten(1)
    one = torch.eye(min(w.shape), dtype=torch.float64)
    return (one, w) if w.shape[0] <= w.shape[1] else (w, one)


def _glora(m: Trained, W: Tensor | None) -> Change:
    a1, a2, b1, b2 = (m.tensors[f"{name}.weight"].double().flatten(1) for name in ("a1", "a2", "b1", "b2"))
    _bound((a1, "ir"), (a2, "ri"), (b1, "or"), (b2, "ri"))
    _fits(m, W, len(b1), b2.shape[1])
    assert W is not None
    left = torch.cat([b1, W.double() @ a1], 1)
    return _sized(Factors(torch.cat([b2, a2]).float(), left.float(), m.scale(len(b2))))


def _ia3(m: Trained, W: Tensor | None) -> Change:
    w, columns = m.tensors["weight"].double().flatten(), bool(m.tensors["on_input"].item())
    _fits(m, W, *((None, len(w)) if columns else (len(w), None)))
    assert W is not None
    return (W.double() * (w if columns else w[:, None])).float()


def _full(m: Trained, W: Tensor | None) -> Change:
    return m.tensors["diff"].flatten(1)


def _norm(m: Trained, W: Tensor | None) -> None:
    return None


def _low(a: Tensor, b: Tensor, mid: Tensor | None, *, turned: bool) -> tuple[Tensor, Tensor]:
    """B [o, r], A [r, i k] in fp64 of a pair, or of Tucker's triple; `turned`: that one's first factor is [r, o]."""
    B, A = a.double().flatten(1), b.double().flatten(1)
    if mid is None:
        _bound((B, "or"), (A, "ri"))
        return B, A
    B, core = B.T.contiguous() if turned else B, mid.double().flatten(2)
    sizes = _bound((B, "op"), (core, "pqk"), (A, "qi"))
    _within(sizes["p"] * sizes["i"] * sizes["k"])
    return B, torch.einsum("pqk,qi->pik", core, A).flatten(1).contiguous()


def _bound(*named: tuple[Tensor, str]) -> dict[str, int]:
    """The sizes of letters. Raises ValueError where one stands for two of them: torch would stretch a size of 1 in silence."""
    sizes: dict[str, int] = {}
    for tensor, letters in named:
        if tensor.ndim != len(letters):
            raise ValueError(f"{tensor.ndim} dimensions, expected {len(letters)}")
        for letter, size in zip(letters, tensor.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(f"{sizes[letter]} against {size}")
    return sizes


def _sized(f: Factors) -> Factors:
    _within(f.A.numel() + f.B.numel())
    return f


def _within(values: int) -> None:
    if values > VALUES_LIMIT:
        raise ValueError(f"its change would have {values} values; no module's has more than {VALUES_LIMIT}")


def _fits(m: Trained, W: Tensor | None, d_out: int | None, d_in: int | None) -> None:
    if W is None:
        raise NotExportable(f"{m.name} ({m.algo}) is a change that depends on W: give the model it is for (--model)")
    for found, wanted in zip(W.shape, (d_out, d_in), strict=True):
        if wanted is not None and found != wanted:
            raise AdapterMismatch(f"{m.name} was trained beside a weight of {wanted} rows or columns; the model's is {tuple(W.shape)}")


Ways = tuple[tuple[str, ...], ...]


class Algo(NamedTuple):
    """`tells`: tensors that no other has. `needs`: of each group one way must be there whole. `may`: what can be beside them."""

    tells: Ways
    needs: tuple[Ways, ...]
    may: tuple[str, ...]
    change: Callable[[Trained, Tensor | None], Change | None]


BESIDE = ("alpha", "dora_scale")
ALGOS: Mapping[str, Algo] = {
    "lora": Algo(
        (("lora_up.weight", "lora_down.weight", "lora_mid.weight"),),
        ((("lora_up.weight",),), (("lora_down.weight",),)),
        ("lora_mid.weight", "diff_b", *BESIDE),
        _lora,
    ),
    "loha": Algo(
        (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),),
        tuple(((name,),) for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
        ("hada_t1", "hada_t2", *BESIDE),
        _loha,
    ),
    "lokr": Algo(
        (("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),),
        ((("lokr_w1",), ("lokr_w1_a", "lokr_w1_b")), (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))),
        ("lokr_t2", *BESIDE),
        _lokr,
    ),
    "glora": Algo(
        (("a1.weight", "a2.weight", "b1.weight", "b2.weight"),),
        tuple(((f"{name}.weight",),) for name in ("a1", "a2", "b1", "b2")),
        ("alpha",),
        _glora,
    ),
    "ia3": Algo((("on_input",),), ((("weight",),), (("on_input",),)), (), _ia3),
    "full": Algo((("diff",),), ((("diff",),),), ("diff_b", "alpha"), _full),
    "norm": Algo((("w_norm", "b_norm", "diff_b"),), (), ("w_norm", "b_norm", "diff_b", "alpha"), _norm),
}  # fmt: skip
"""In the order in which they are recognized."""
NEEDED = {t for kind in ALGOS.values() for group in kind.needs for way in group for t in way}
KNOWN = NEEDED | {t for kind in ALGOS.values() for t in kind.may}
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        ("oft_blocks", "oft_diag", "rescale"),
        "of OFT or BOFT: it turns W, which is no low-rank change; merge it with the tool that trained it",
    ),
    **dict.fromkeys(
        ("lambda_layer", "p_layer.weight", "q_layer.weight"),
        "of T-LoRA, whose change is against a random start that the file does not hold",
    ),
    "bm.weight": "of GLoRA with a Tucker core, which no linear layer has",
}


def sides(one: Change) -> tuple[int, int]:
    """(d_out, d_in)."""
    return (one.shape[0], one.shape[1]) if isinstance(one, Tensor) else (len(one.B), one.A.shape[1])


def rank_of(one: Change) -> int:
    """A bound of its rank."""
    return min(one.shape) if isinstance(one, Tensor) else len(one.A)


def full(one: Change) -> bool:
    """Whether its factors have at least as many values as itself."""
    d_out, d_in = sides(one)
    return isinstance(one, Tensor) or rank_of(one) * (d_out + d_in) > d_out * d_in


def size_of(one: Change) -> float:
    """‖ΔW‖, Frobenius."""
    return one.double().norm().item() if isinstance(one, Tensor) else norm(one)
