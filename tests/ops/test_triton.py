"""The Triton kernels: under Triton's interpreter on the CPU (one process for all cases, fp32), and compiled for Hopper without one."""

import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.ops import cpu, lora_linear
from lorakit.ops.mask import Mask, hashed, mixed
from lorakit.ops.triton import DTYPES, available
from lorakit.parts.bases import nf4
from lorakit.parts.bases.packed import Layout, Packed
from lorakit.parts.bases.scales import dynamic_map
from tests.ops.test_lora_linear import D_IN, both, layer

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from lorakit.ops.triton import products, tuning  # noqa: E402  (these import Triton)
from lorakit.ops.triton.keep import keep, limits, numbers  # noqa: E402
from lorakit.ops.triton.linear import _linear, linear  # noqa: E402
from lorakit.ops.triton.nf4 import _decode, decode  # noqa: E402
from lorakit.ops.triton.products import _down, _finish, _outer, down, finish_, gained, outer  # noqa: E402

tl = triton.language

CPU = torch.device("cpu")
MASK = Mask(torch.tensor([3, 5]), torch.tensor(17), 0.3)
MASKS = {"none": None, "0.3": MASK}
SHAPES = (
    (1, 16, 1),
    (5, 24, 1),
    (33, 70, 4),
    (37, 136, 16),
    (17, 41, 64),
    (9, 40, 200),
)  # (n, k, r): tails, odd widths, several tiles of r
CLOSE = 1e-6  # of fp32 sums in another order


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, wanted: Tensor) -> None:
    """Equal to fp32 rounding, and all of it written."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    assert torch.isfinite(found).all()
    assert (found - wanted).norm() <= CLOSE * max(1.0, wanted.norm().item())


# ------------------------------------------------------------------------------------------- cases, run in the interpreter's process
def case_down(n: int, k: int, r: int, mask: Mask | None) -> None:
    x, A = normal(n, k, seed=1), normal(r, k, seed=2)
    close(down(x, A, mask), cpu.down(x, A, mask))


def case_finish(n: int, m: int, r: int, mask: Mask | None) -> None:
    y, u, B = normal(n, m, seed=1), normal(n, r, seed=2), normal(m, r, seed=3)
    rows: tuple[dict[str, Tensor], ...] = ({}, {"gain": normal(m, seed=4)}, {"bias": normal(m, seed=5)})
    for row in (*rows, rows[1] | rows[2]):
        out = y.clone()
        assert finish_(out, u, B, mask=mask, **row) is out, "in place"
        close(out, cpu.finish_(y.clone(), u, B, mask=mask, **row))


def case_gained(n: int, m: int) -> None:
    y, gain, bias = normal(n, m, seed=1), normal(m, seed=2), normal(m, seed=3)
    for given, row in ((y, None), (y, bias), (normal(m, n, seed=4).T, bias)):
        before = given.clone()
        close(gained(given, gain, row), cpu.gained(given, gain, row))
        assert torch.equal(given, before)


def case_outer(n: int, k: int, r: int, mask: Mask | None) -> None:
    dz, x = normal(n, r, seed=1), normal(n, k, seed=2)
    close(outer(dz, x, mask), cpu.outer(dz, x, mask))


def case_linear(n: int, k: int, r: int, m: int) -> None:
    x, W, u, B, gain, bias = (normal(*s, seed=i) for i, s in enumerate([(n, k), (m, k), (n, r), (m, r), (m,), (m,)]))
    close(linear(x, W, u, B), x @ W.T + u @ B.T)
    close(linear(x, W, u, B, gain=gain), gain * (x @ W.T + u @ B.T))
    close(linear(x, W, u, B, gain=gain, bias=bias), gain * (x @ W.T + u @ B.T) + bias)


def case_backward() -> None:
    """dx = dy W + keep ∘ (dz A), with W.T and A.T as views."""
    n, k, m, r = 20, 72, 50, 3
    dy, W, dz, A = normal(n, m, seed=1), normal(m, k, seed=2), normal(n, r, seed=3), normal(r, k, seed=4)
    close(linear(dy, W.T, dz, A.T), dy @ W + dz @ A)
    for mask in MASKS.values():
        kept = torch.ones(n, k) if mask is None else mask.keep(torch.ones(n, k))
        close(finish_(dy @ W, dz, A.T, mask=mask), dy @ W + kept * (dz @ A))


def case_strides() -> None:
    """Every argument may be a view with gaps; the mask's positions are those of the view, and gaps of y stay as they were."""
    n, k, r, mask = 21, 40, 5, MASK
    x, A = normal(k, 2 * n, seed=1).T[::2], normal(k, r, seed=2).T
    close(down(x, A, mask), cpu.down(x.contiguous(), A, mask))
    dz = normal(r, n, seed=3).T
    close(outer(dz, x, mask), cpu.outer(dz, x.contiguous(), mask))
    W = normal(k, 60, seed=6).T[::2]
    close(linear(x, W, dz, W[:, :r]), x @ W.T + dz @ W[:, :r].T)
    whole, gain = normal(n, 2 * k, seed=4), normal(2 * k, seed=5)[::2]
    wanted = whole.clone()
    wanted[:, ::2] = cpu.finish_(whole[:, ::2].clone(), dz, A.T, gain=gain, bias=gain, mask=mask)
    finish_(whole[:, ::2], dz, A.T, gain=gain, bias=gain, mask=mask)
    close(whole, wanted)


def case_wider_factors() -> None:
    """A and B of another dtype are rounded to x's and u's on the way, not before."""
    x, A, y = normal(6, 24, seed=1), normal(4, 24, seed=2).double(), normal(6, 24, seed=3)
    close(down(x, A), cpu.down(x, A.float()))
    close(finish_(y.clone(), x[:, :4], A.T), cpu.finish_(y.clone(), x[:, :4], A.T.float()))


def case_parts() -> None:
    """Few tokens of great width, and many tokens: the sums are cut into parts."""
    assert [tuning.splits(p, most, CPU) for p, most in ((1, 1), (1, 3), (1, 100), (2, 100), (100, 100), (0, 0))] == [1, 2, 8, 4, 1, 1]
    x, A, dz = normal(600, 16, seed=1), normal(2, 1300, seed=2), normal(600, 2, seed=3)
    for mask in MASKS.values():
        close(down(A.repeat(2, 1), A, mask), cpu.down(A.repeat(2, 1), A, mask))
        close(outer(dz, x, mask), cpu.outer(dz, x, mask))


def case_nothing() -> None:
    """No tokens: empty products, and a gradient of zeros."""
    x, A, u = torch.empty(0, 24), normal(2, 24, seed=1), torch.empty(0, 2)
    assert down(x, A).shape == (0, 2) and finish_(x, u, A.T).shape == (0, 24) and linear(x, A, u, normal(2, 2, seed=2)).shape == (0, 2)
    assert torch.equal(outer(u, x), torch.zeros(2, 24))


def case_not_a_number() -> None:
    """What is dropped does not matter, whatever it is; what lies outside a tile never enters."""
    mask = MASK
    x, A, dz = normal(19, 40, seed=1), normal(3, 40, seed=2), normal(19, 3, seed=3)
    poisoned = x.masked_fill(~mask.keep(x), torch.nan)
    close(down(poisoned, A, mask), cpu.down(x, A, mask))
    close(outer(dz, poisoned, mask), cpu.outer(dz, x, mask))


def case_bits(p: float, k: int) -> None:
    """All three kernels drop the very entries that the CPU drops."""
    mask, n = Mask(torch.tensor([2**62 + 11, 12345]), torch.tensor(2**61 + 7), p), 37
    kept = mask.keep(torch.ones(n, k)).float()
    assert torch.equal(down(torch.ones(n, k), torch.eye(k), mask), kept)
    assert torch.equal(outer(torch.eye(n), torch.ones(n, k), mask), kept)
    assert torch.equal(finish_(torch.zeros(n, k), torch.ones(n, 1), torch.ones(k, 1), mask=mask), kept)


def case_fused() -> None:
    """The fused function of adapted layers, on these kernels: the reference's values and gradients."""
    forms: tuple[tuple[tuple[str, ...], float], ...] = (
        ((), 0.0),
        (("bias",), 0.3),
        (("g", "b"), 0.3),
        (("gain", "bias", "b"), 0.0),
        (("gain",), 0.3),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_linear, "_kernels", lambda like: products)
        for seed, (has, p) in enumerate(forms):
            layers = [
                layer(2 * (3 * seed + i), d_out=d, r=r, has=has, p=p, dtype=torch.float32) for i, (d, r) in enumerate([(7, 3), (16, 1)])
            ]
            for wanted, found in zip(*both(layers, normal(2, 5, D_IN, seed=seed).requires_grad_()), strict=True):
                close(found, wanted)


@triton.jit
def _keep_from(out, row, first, width, key, whole, part, WHOLE_WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """keep of 4 rows from `row` and 16 columns from `first`: one program."""
    rows = row + tl.arange(0, 4)
    kept = keep(rows, first, limits(rows, key, whole, part), key, width, 16, WHOLE_WORDS)
    tl.store(out + tl.arange(0, 4)[:, None] * 16 + tl.arange(0, 16)[None, :], kept.to(tl.int32))


def case_far(width: int) -> None:
    """Positions beyond 2³² count on: the words wrap at 2⁶⁴ alone."""
    row, first, out = 2**31 - 5, 64, torch.empty(4, 16, dtype=torch.int32)
    key, whole, part = numbers(MASK)
    _keep_from[(1,)](out, row, first, width, key, whole, part, WHOLE_WORDS=width % 8 == 0)
    at = [[r * width + c for c in range(first, first + 16)] for r in range(row, row + 4)]
    limit = [whole + (word(key ^ 0x5851F42D4C957F2D, r) % 256 < part) for r in range(row, row + 4)]
    assert out.tolist() == [[(word(key, i // 8) >> 8 * (i % 8)) % 256 >= t for i in line] for line, t in zip(at, limit, strict=True)]


def word(key: int, j: int) -> int:
    """Word j of a key: splitmix64, in Python's own integers."""
    z = (key + (j + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def case_nf4(d_out: int, d_in: int, blocksize: int, double_quant: bool) -> None:
    """From every row that begins a block, the bits of `Packed.rows`."""
    layout = Layout(d_out, d_in, torch.float32, blocksize, double_quant)
    packed = Packed.of(normal(d_out, d_in, seed=1), layout)
    tables = torch.tensor(nf4.LEVELS), dynamic_map(CPU)
    starts = [a for a in range(d_out) if a * d_in % blocksize == 0]
    for a, b in [(a, d_out) for a in starts[:1] + starts[-1:]] + [(starts[0], starts[-1])] * (len(starts) > 1):
        n = (b - a) * d_in
        found = decode(*packed, *tables, start=a * d_in, n=n, blocksize=blocksize, dtype=torch.float32)
        assert torch.equal(found.view(-1, d_in), packed.rows(layout, a, b))


def case_rows() -> None:
    """What a packed weight asks of the kernel."""
    layout = Layout(48, 96, torch.float16)
    packed = Packed.of(normal(48, 96, seed=1), layout)
    with pytest.MonkeyPatch.context() as patch:
        plain = packed.rows(layout, 2, 40)
        patch.setattr("lorakit.ops.triton.available", lambda device, dtype: True)
        patch.setattr(nf4, "rescaled", None)  # torch's own way
        assert torch.equal(packed.rows(layout, 2, 40), plain)


CASES: dict[str, Callable[[], None]] = {
    **{f"{case.__name__[5:]}-{n}x{k}-r{r}-{name}": partial(case, n, k, r, mask)  # type: ignore[misc]
       for case in (case_down, case_finish, case_outer) for n, k, r in SHAPES for name, mask in MASKS.items()},
    **{f"gained-{n}x{m}": partial(case_gained, n, m) for n, m in ((1, 1), (33, 70))},
    **{f"linear-{n}x{k}-r{r}": partial(case_linear, n, k, r, m) for (n, k, r), m in zip(SHAPES, (1, 40, 66, 64, 70, 24), strict=True)},
    **{case.__name__[5:]: case for case in (case_backward, case_strides, case_wider_factors, case_fused)},
    **{case.__name__[5:]: case for case in (case_parts, case_nothing, case_not_a_number, case_rows)},
    **{f"bits-{p}-{k}": partial(case_bits, p, k) for p in (0.0, 0.05, 0.5, 0.9, 0.997, 0.9999) for k in (8, 41, 72)},
    **{f"far-{width}": partial(case_far, width) for width in (28672, 28671)},
    **{f"nf4-{d_out}x{d_in}-{size}-{double}": partial(case_nf4, d_out, d_in, size, double)
       for d_out, d_in, size in ((64, 96, 64), (7, 13, 64), (33, 65, 64), (272, 96, 32), (3, 4096, 4096), (1, 1, 32))
       for double in (True, False)},
}  # fmt: skip


def run() -> None:
    """Every case; on the last line what went wrong, as JSON."""
    assert tuning.INTERPRETED
    wrong = {}
    for name, case in CASES.items():
        try:
            case()
        except Exception:
            wrong[name] = traceback.format_exc(limit=-3)
    print(json.dumps(wrong))


# -------------------------------------------------------------------------------------------------------------------------- tests
@pytest.fixture(scope="module")
def wrong() -> dict[str, str]:
    """Case -> how it failed, from a process whose kernels are interpreted."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "from tests.ops.test_triton import run; run()"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", CASES)
def test_under_the_interpreter_a_kernel_does_what_torch_does(case: str, wrong: dict[str, str]) -> None:
    assert case not in wrong, wrong[case]


def test_the_oracle_of_words_is_the_one_of_the_masks() -> None:
    key = mixed(1, 2, 3)
    assert hashed(key, 5, CPU).tolist() == [w - (w >> 63 << 64) for w in (word(key, j) for j in range(5))]


def test_decoding_is_launched_without_fused_multiply_and_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler would join M[code] · n + o, and round once where the CPU rounds twice."""
    launches: list[dict[str, Any]] = []

    class Recorder:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **options: launches.append(options)

    monkeypatch.setattr("lorakit.ops.triton.nf4._decode", Recorder())
    packed = Packed.of(normal(2, 32, seed=1), Layout(2, 32, torch.float32))
    decode(*packed, torch.tensor(nf4.LEVELS), dynamic_map(CPU), start=0, n=64, blocksize=64, dtype=torch.float32)
    assert [options["enable_fp_fusion"] for options in launches] == [False]


def test_the_kernels_are_for_cuda_alone() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LORAKIT_TRITON", raising=False)
        assert not available(torch.device("cuda"), torch.float32)
        patch.setenv("LORAKIT_TRITON", "1")
        check_where()


def check_where() -> None:
    assert not available(CPU, torch.float32)
    assert not any(available(torch.device("cuda"), dtype) for dtype in (torch.float64, torch.int64))
    assert all(available(torch.device("cuda"), dtype) for dtype in DTYPES)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_results_are_right_in_bf16_and_no_configuration_changes_a_bit() -> None:
    from benchmarks.gpu_kernels import SMALL, cells, error

    assert {cell.kernel for cell in cells(256, SMALL, "cuda") if error(cell) < 1} >= {"down", "finish", "outer", "linear", "nf4"}


# ------------------------------------------------------------------------------------------------------------ compiled, not run
HOPPER = GPUTarget("cuda", 90, 32)
SHARED = 227 * 1024  # bytes of shared memory that a block can have there
NUMBERS = {"key": "i64", **dict.fromkeys(("n", "m", "k", "r", "whole", "part", "bucket", "first", "size", "bytes", "last"), "i32")}
RAGGED = ("key", "n", "r", "whole", "part", "bucket", "first", "last")
FP32 = ("A", "B", "gain", "bias", "nested", "levels", "table")
BYTES = ("codes", "scales")
LONG = ("x_row", "y_row", "out_row", "z_row", "u_row", "dz_row", "A_row", "B_row")  # strides of what is row-major; the others are 1
KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "down": (_down, {"BLOCK_R": 16, "BLOCK_K": 128, "PARTS": 2, "MASKED": True, "WHOLE_WORDS": True}),
    "finish": (_finish, {"BLOCK_R": 16, "GAIN": True, "BIAS": True, "MASKED": True, "WHOLE_WORDS": True}),
    "finish, odd width": (_finish, {"BLOCK_R": 64, "GAIN": False, "BIAS": False, "MASKED": True, "WHOLE_WORDS": False}),
    "down, one column": (_down, {"BLOCK_R": 16, "BLOCK_K": 128, "PARTS": 1, "MASKED": True, "WHOLE_WORDS": False, "k": 1, "r": 1}),
    "outer": (_outer, {"BLOCK_R": 16, "BLOCK_N": 64, "PARTS": 2, "MASKED": True, "WHOLE_WORDS": True}),
    "linear": (_linear, {"BLOCK_R": 16, "BLOCK_K": 64, "GAIN": True, "BIAS": True, "W_col": 1}),
    "linear, Wᵀ": (_linear, {"BLOCK_R": 16, "BLOCK_K": 64, "GAIN": False, "BIAS": False, "W_row": 1}),
    "nf4": (_decode, {"HALF": 32, "NESTED": True}),
    "nf4, second block": (_decode, {"HALF": 16, "NESTED": False, "first": 1, "last": 0}),
}


def compiled(kernel: Any, constants: dict[str, Any], config: Any) -> Any:
    """A kernel as for contiguous bf16 tensors with fp32 factors, whose addresses, widths and strides are multiples of 16."""
    jitted = kernel.fn
    given = constants | config.kwargs
    given |= {name: 1 for name in jitted.arg_names if name.endswith(("_row", "_col")) and name not in LONG + ("W_row", "W_col")}
    kinds = {name: _kind(name) if name not in given else "constexpr" for name in jitted.arg_names}
    even = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(jitted.arg_names) if name not in given and name not in RAGGED}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": kernel is not _decode}
    at = {(jitted.arg_names.index(name),): value for name, value in given.items()}
    return triton.compile(ASTSource(jitted, kinds, at, even), target=HOPPER, options=options)


def _kind(name: str) -> str:
    """The type of an argument."""
    if name in NUMBERS or name.endswith(("_row", "_col")):
        return NUMBERS.get(name, "i32")
    return "*u8" if name in BYTES else "*fp32" if name in FP32 else "*bf16"


def stack(binary: bytes, folder: Path) -> int:
    """Bytes of local memory of a thread: what did not fit its registers."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    (folder / "kernel.cubin").write_bytes(binary)
    usage = subprocess.run([tool, "--dump-resource-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"STACK:(\d+)", usage)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_every_configuration_compiles_for_hopper_and_fits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the interpreter does not see: types and layouts, shared memory, registers, no atomic addition, and where bits matter no FMA."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    kernel, constants = KERNELS[name]
    assert len(kernel.configs) > 1
    for config in kernel.configs:
        found = compiled(kernel, constants, config)
        assert found.metadata.shared <= SHARED
        assert stack(found.asm["cubin"], tmp_path) == 0 or not constants.get("WHOLE_WORDS", True), config
        assert not re.search(r"\b(atom|red)\.", found.asm["ptx"])
        assert kernel is not _decode or "fma.rn.f32" not in found.asm["ptx"]
        if kernel is _linear and config.kwargs["BLOCK_N"] >= 64:
            assert "wgmma.mma_async" in found.asm["ptx"], "Hopper's own product"
