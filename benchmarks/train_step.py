"""One training step (forward and backward) beside PEFT's, beside full fine-tuning and beside two limits, all in one run.

    python -m benchmarks.train_step                          everything; the result file goes to benchmarks/results/
    python -m benchmarks.train_step --cells 'lora*'          some cells
    python -m benchmarks.train_step --smoke                  all of them in a tiny size

A star around (lora, r 16, all linear layers of a Llama, 4 × 512 tokens, bfloat16, no dropout): other methods, ranks, lengths, dtypes.
Everybody has the same weights and batch and the user's own path: `lorakit` is a step as `lorakit train` takes it, `peft` and `full` are
`model(**batch).loss.backward()` without a cache, as Transformers' Trainer sets it. Two limits:

    frozen     forward and backward through the bare model down to its embeddings: what an adapter on every layer cannot avoid, eager
    products   the time of all matrix products of the step, at the rate at which the model's own products run in the same rounds

Every ratio is paired, round by round (harness.py). `saved` is what a forward keeps for backward beyond parameters, `peak` what a fresh
process rises by in a step. `bytes` is what a Llama's backward cannot do without if everything that is no product is computed again.
"""

import argparse
import dataclasses
import fnmatch
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import harness
from benchmarks.harness import Paired, Row, Target
from lorakit import attach, get_method, quantize
from lorakit.cli.results import figure
from lorakit.core.method import describe
from lorakit.train.allocator import keep_freed_memory
from lorakit.train.attention import segment_attention
from lorakit.train.compile import compile_layers
from lorakit.train.metrics import forward_loss

Batch = dict[str, Tensor]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# --------------------------------------------------------------------------------------------------------------------- the star
@dataclass(frozen=True)
class Cell:
    """One setting, and who takes part in it beside `lorakit`, `frozen` and `products`."""

    name: str
    method: str = "lora"
    r: int = 16
    dropout: float = 0.0
    dtype: str = "bfloat16"
    length: int = 512
    batch: int = 4
    besides: tuple[str, ...] = ("peft",)
    note: str = ""

    @property
    def tokens(self) -> int:
        """In one step."""
        return self.batch * self.length


ALL = (
    "peft", "peft autocast", "peft bfloat16", "lorakit compiled", "peft compiled by layer", "peft compiled whole", "frozen compiled", "full"
)  # fmt: skip
STAR = (
    Cell("lora", besides=ALL),
    Cell("lora, dropout 0.05", dropout=0.05, besides=("peft", "peft autocast", "peft bfloat16", "lorakit compiled")),
    Cell("dora", method="dora", besides=("peft", "our lora", "lorakit compiled", "our lora compiled")),
    Cell("lora_fa", method="lora_fa", note="peer: PEFT's LoRA with A frozen, which is all that its LoRA-FA optimizer does to a step"),
    Cell("vera", method="vera"),
    Cell(
        "qlora",
        method="qlora",
        besides=("our lora", "lorakit compiled", "our lora compiled"),
        note="no peer: bitsandbytes' CPU kernels are silently wrong at some shapes",
    ),
    Cell("lora, float32", dtype="float32"),
    *(Cell(f"lora, r {r}", r=r) for r in (4, 64, 256)),
    Cell("lora, 16 × 128", length=128, batch=16),
    Cell("lora, 1 × 2048", length=2048, batch=1),
    Cell("dora, 1 × 128", method="dora", length=128, batch=1, besides=("peft", "our lora", "lorakit compiled", "our lora compiled")),
)


@dataclass(frozen=True)
class Sizes:
    """The model's."""

    hidden: int = 1024
    layers: int = 4
    heads: int = 8
    ffn: int = 2816
    vocab: int = 8192
    device: str = "cpu"
    backend: str = "inductor"


SMOKE = Sizes(hidden=64, layers=1, heads=4, ffn=160, vocab=256, backend="aot_eager")


def tiny(cell: Cell) -> Cell:
    """For a smoke run, under the same name."""
    return dataclasses.replace(cell, r=max(1, cell.r // 4), length=cell.length // 16)


def base(cell: Cell, sizes: Sizes) -> LlamaForCausalLM:
    """The same weights every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.vocab, hidden_size=sizes.hidden, num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads,
        intermediate_size=sizes.ffn, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.train()
    nn.Module.to(model, sizes.device, getattr(torch, cell.dtype))
    return model


def batch_of(cell: Cell, sizes: Sizes) -> Batch:
    """Random tokens, all of them supervised."""
    shape = (cell.batch, cell.length)
    ids = torch.randint(sizes.vocab, shape, generator=torch.Generator().manual_seed(1)).to(sizes.device)
    return {"input_ids": ids, "labels": ids}


# --------------------------------------------------------------------------------------------------------------- the contenders
@dataclass(frozen=True)
class Contender:
    """A model and the loss of its step."""

    model: nn.Module
    loss: Callable[[], Tensor]

    def step(self) -> None:
        """Forward and backward; the gradients are dropped, as an optimizer would."""
        torch.autograd.backward(self.loss())
        for p in self.model.parameters():
            p.grad = None


def ours(cell: Cell, sizes: Sizes, batch: Batch, *, compiled: bool = False) -> Contender:
    """A model as `lorakit train` prepares it (train/train.py, build) and a step's loss as it takes it (train/run.py)."""
    wanted = {"r": cell.r, "alpha": 2.0 * cell.r, "dropout": cell.dropout}
    method = get_method(cell.method, **{k: v for k, v in wanted.items() if k in describe(cell.method).parameters})
    model = base(cell, sizes)
    if method.base is not None:
        quantize(model, method.base)
    segment_attention(model)
    adapted = attach(model, method)
    if compiled:
        compile_layers(model, backend=None if sizes.backend == "inductor" else lookup_backend(sizes.backend))  # type: ignore[arg-type]
    steps = iter(range(2**30))

    def loss() -> Tensor:
        with adapted.given(step=next(steps), seed=0):
            total, n = forward_loss(model, batch)
        return total / n

    return Contender(model, loss)


def theirs(cell: Cell, sizes: Sizes, batch: Batch, *, wide: bool = True) -> Contender:
    """PEFT's, its adapters in fp32, as its default is (so that their branch is computed in fp32), or else in the base's dtype."""
    adapted = peft.get_peft_model(base(cell, sizes), PEERS[cell.method](cell), autocast_adapter_dtype=wide)
    if cell.method == "lora_fa":
        for name, p in adapted.named_parameters():
            p.requires_grad_("lora_B" in name)
    return plain(adapted, batch)


def _lora(cell: Cell, **extra: Any) -> peft.PeftConfig:
    return peft.LoraConfig(r=cell.r, lora_alpha=2 * cell.r, lora_dropout=cell.dropout, target_modules=LINEAR, **extra)


PEERS: dict[str, Callable[[Cell], peft.PeftConfig]] = {
    "lora": _lora,
    "lora_fa": _lora,
    "dora": lambda cell: _lora(cell, use_dora=True),
    "vera": lambda cell: peft.VeraConfig(r=cell.r, vera_dropout=cell.dropout, target_modules=LINEAR),
}


def autocast(contender: Contender, sizes: Sizes) -> Contender:
    """Under autocast, as Trainer runs it with bf16=True: fp32 adapters, bf16 products."""

    def loss() -> Tensor:
        with torch.autocast(sizes.device, torch.bfloat16):
            return contender.loss()

    return Contender(contender.model, loss)


def plain(model: nn.Module, batch: Batch) -> Contender:
    """A model's own loss."""
    return Contender(model, lambda: model(**batch).loss)


def frozen(cell: Cell, sizes: Sizes, batch: Batch) -> Contender:
    """Forward and backward through the base to its embeddings."""
    model = base(cell, sizes).requires_grad_(False)
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    return plain(model, batch)


def by_layer(contender: Contender, sizes: Sizes) -> Contender:
    """Every decoder layer compiled; one compilation serves all of them where nothing in them differs."""
    for layer in [m for m in contender.model.modules() if type(m).__name__ == "LlamaDecoderLayer"]:
        layer.compile(backend=sizes.backend)
    return contender


def whole(contender: Contender, sizes: Sizes) -> Contender:
    """The model compiled as one."""
    contender.model.compile(backend=sizes.backend)
    return contender


CONTENDERS: dict[str, Callable[[Cell, Sizes, Batch], Contender]] = {
    "lorakit": ours,
    "lorakit compiled": lambda cell, sizes, batch: ours(cell, sizes, batch, compiled=True),
    "our lora": lambda cell, sizes, batch: ours(dataclasses.replace(cell, method="lora"), sizes, batch),
    "our lora compiled": lambda cell, sizes, batch: ours(dataclasses.replace(cell, method="lora"), sizes, batch, compiled=True),
    "peft": theirs,
    "peft autocast": lambda cell, sizes, batch: autocast(theirs(cell, sizes, batch), sizes),
    "peft bfloat16": lambda cell, sizes, batch: theirs(cell, sizes, batch, wide=False),
    "peft compiled by layer": lambda cell, sizes, batch: by_layer(theirs(cell, sizes, batch), sizes),
    "peft compiled whole": lambda cell, sizes, batch: whole(theirs(cell, sizes, batch), sizes),
    "frozen": frozen,
    "frozen compiled": lambda cell, sizes, batch: whole(frozen(cell, sizes, batch), sizes),
    "full": lambda cell, sizes, batch: plain(base(cell, sizes), batch),
}


# ------------------------------------------------------------------------------------------------------------------- the limits
def weights(model: nn.Module) -> list[Tensor]:
    """Every linear weight of the bare model, the head's last."""
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear)]


def products(model: nn.Module, tokens: int) -> Callable[[], None]:
    """The bare model's products, W x and Wᵀ dy at every linear weight, into buffers that are there already."""
    matrices = weights(model)
    sizes = {d for W in matrices for d in W.shape}
    first = matrices[0]
    rows = {d: torch.randn(tokens, d, dtype=first.dtype, device=first.device) for d in sizes}
    out = {d: torch.empty_like(t) for d, t in rows.items()}

    def run() -> None:
        with torch.no_grad():
            for W in matrices:
                torch.mm(rows[W.shape[1]], W.T, out=out[W.shape[0]])
            for W in reversed(matrices):
                torch.mm(rows[W.shape[0]], W, out=out[W.shape[1]])

    return run


def flops(cell: Cell, sizes: Sizes) -> tuple[float, float]:
    """(of `products`, of all products of the adapter's step).

    A step's are W x and Wᵀ dy; six causal products of attention (two forward, four backward); and the adapter's own, 2 tokens r d each.
    Below the first layer's q, k and v nothing is trained: there no gradient of x is needed.
    """
    tokens, d, f = cell.tokens, sizes.hidden, sizes.ffn
    shapes = [(d, d)] * 4 + [(d, f)] * 2 + [(f, d)]
    of_model = 4.0 * tokens * (sizes.layers * sum(a * b for a, b in shapes) + d * sizes.vocab)
    attention = 6.0 * sizes.layers * tokens * cell.length * d  # half of 2 · tokens · length · d: causal
    sides = sum(a * OWN[cell.method][0] + b * OWN[cell.method][1] for a, b in shapes)
    adapter = 2.0 * tokens * cell.r * sizes.layers * sides
    if cell.method == "dora":
        adapter += 2.0 * cell.r * sizes.layers * sum(a * b for a, b in shapes)  # W Aᵀ for the norm
    return of_model, of_model - 6.0 * tokens * d * (d + cell.r) + attention + adapter


OWN = {"lora": (3, 3), "qlora": (3, 3), "dora": (3, 3), "lora_fa": (2, 3), "vera": (2, 2)}
"""Products of a method on the input's side (A x, Aᵀ du, dA) and on the output's side (B u, Bᵀ dy, dB)."""


def kept_limit(cell: Cell, sizes: Sizes) -> int:
    """What backward needs of a Llama's forward, if norms, activations, rotations and softmax are computed again.

    A layer: its input, q, k and v, attention's output, the input of the second norm, gate and up; then the last norm's input.
    """
    values = sizes.layers * (6 * sizes.hidden + 2 * sizes.ffn) + sizes.hidden
    itemsize: int = getattr(torch, cell.dtype).itemsize
    return values * cell.tokens * itemsize


# ------------------------------------------------------------------------------------------------------------------- one cell
def peak(cell: dict[str, Any], sizes: dict[str, Any], contender: str) -> int:
    """Called in a fresh process: by how many bytes two steps raise it above what it holds after loading.

    A step of two tokens belongs to loading, so that nobody pays for code that is read for the first time; of a compiled contender a whole
    step does, in which it is compiled.
    """
    shape, size = Cell(**cell), Sizes(**sizes)
    batch = batch_of(shape, size)
    made = CONTENDERS[contender](shape, size, batch)
    full = dict(batch)
    if "compiled" not in contender:
        batch |= {key: value[:1, :2] for key, value in batch.items()}
    made.step()
    batch |= full

    def steps() -> None:
        made.step()
        made.step()

    return harness.peak_rise(steps, size.device)


def measure(cell: Cell, sizes: Sizes, args: argparse.Namespace) -> Row:
    """All figures of a cell, as one flat row of the result file."""
    facts = {"cell": cell.name} | {key: getattr(cell, key) for key in ("method", "r", "dropout", "dtype", "batch", "length", "note")}
    given = {"cell": dataclasses.asdict(cell), "sizes": dataclasses.asdict(sizes), "rounds": args.rounds}
    row = facts | (compared(**given) if args.smoke else harness.alone("benchmarks.train_step", "compared", **given))
    return row | {f"{name} peak MB": value / 1e6 for name, value in peaks(cell, sizes, args)}


def compared(cell: dict[str, Any], sizes: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Called in a fresh process: times, their ratios, and what is saved for backward, of all contenders side by side."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # contenders share code, and each counts as a recompilation of it
    keep_freed_memory()  # as `lorakit train` does; here it serves every contender alike
    return _compared(Cell(**cell), Sizes(**sizes), rounds)


def _compared(cell: Cell, sizes: Sizes, rounds: int) -> dict[str, Any]:
    batch = batch_of(cell, sizes)
    made = {name: CONTENDERS[name](cell, sizes, batch) for name in ("lorakit", *cell.besides, "frozen")}
    check(made)
    saved = kept(made, batch)
    compiling = {name: harness.clock(c.step, sizes.device) for name, c in made.items() if "compiled" in name}
    steps: dict[str, Callable[[], Any]] = {name: c.step for name, c in made.items()}
    steps["products"] = products(made["frozen"].model, cell.tokens)
    seconds = harness.interleave(steps, rounds, device=sizes.device)
    run, needed = flops(cell, sizes)
    rate = run / statistics.median(seconds["products"])
    seconds["limit"] = [s * needed / run for s in seconds.pop("products")]
    row: dict[str, Any] = {f"{name} s": statistics.median(values) for name, values in seconds.items()}
    row |= {f"{name} compiles s": taken for name, taken in compiling.items()}
    row |= {f"{a} / {b}": Paired.of(seconds[a], seconds[b]).as_list() for a, b in ratios(list(seconds))}
    row |= {"GFLOP": needed / 1e9, "GFLOP/s": rate / 1e9, "kept limit MB": kept_limit(cell, sizes) / 1e6}
    return row | {f"{name} saved MB": value / 1e6 for name, value in saved.items()}


def check(made: dict[str, Contender]) -> None:
    """The same mathematics: at the start, where no adapter changes anything, all uncompiled losses but a quantized base's agree."""
    losses = {name: float(made[name].loss().detach()) for name in ("lorakit", "peft", "full") if name in made}
    if max(losses.values()) - min(losses.values()) > 0.005 * min(losses.values()):
        raise RuntimeError(f"the contenders do not compute the same loss: {losses}")


def kept(made: dict[str, Contender], batch: Batch) -> dict[str, int]:
    """Bytes that each uncompiled forward, and our compiled one, keeps for backward; the frozen model's with our loss, too."""
    shown = {n: c for n, c in made.items() if "compiled" not in n or n.startswith("lorakit")}
    saved = {n: harness.saved_bytes(c.model, c.loss, besides=batch.values()) for n, c in shown.items()}
    bare = made["frozen"].model
    saved["frozen, our loss"] = harness.saved_bytes(bare, lambda: forward_loss(bare, batch)[0], besides=batch.values())
    return saved


def ratios(names: list[str]) -> Iterator[tuple[str, str]]:
    """Which pairs are reported: peers over each of ours, and each of ours over the limits and our own LoRA."""
    mine = [name for name in names if name.startswith("lorakit")]
    for own in mine:
        yield from ((name, own) for name in names if name.startswith(("peft", "full")))
        beside = own.replace("lorakit", "our lora")
        yield from ((own, name) for name in ("frozen", "frozen compiled", "limit", beside) if name in names)


def peaks(cell: Cell, sizes: Sizes, args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Peak memory in a process of its own: of ours and the peers, in the first cell of all; in a smoke run of ours there only."""
    first = cell.name == STAR[0].name
    names = ["lorakit", *cell.besides, "frozen"] if first else ["lorakit", *(name for name in cell.besides if name != "our lora")]
    for name in names[: int(first)] if args.smoke else names:
        given = {"cell": dataclasses.asdict(cell), "sizes": dataclasses.asdict(sizes), "contender": name}
        yield name, harness.fresh("benchmarks.train_step", "peak", **given)


# ------------------------------------------------------------------------------------------------------------------ the targets
MEMORY = "what is no product of the model's is bound by memory: r-wide products, attention's backward, elementwise passes"
ITSELF = "the frozen step takes more than that when it is compiled itself"
GAIN = "γ ∘ y and γ's gradient go over every output, which no product hides"
NORM = "‖W + s·BA‖ reads every W once a step, however few the tokens"
MASKS = "every mask is hashed anew in forward and in backward, which takes a third of the compiled step"
DECODING = "every weight is decoded twice a step, 3 ns each"
"""Why targets are missed, where they are: docs/log.md has the profiles."""


def targets(rows: dict[str, Row]) -> list[Target]:
    """The promises that this benchmark keeps or breaks; None where the cell was not run."""
    fast = fastest(rows.get("lora", {}), "lorakit")
    dropped = fastest(rows.get("lora, dropout 0.05", {}), "lorakit")
    peer = fastest(rows.get("lora", {}), "peft compiled")
    slowest = extreme(min, {name: row["peft / lorakit"][-1] for name, row in rows.items() if "peft / lorakit" in row})
    heaviest = extreme(max, {name: row["lorakit peak MB"] / row["peft peak MB"] for name, row in rows.items() if "peft peak MB" in row})

    def at(cell: str, key: str) -> Paired | None:
        value = rows.get(cell, {}).get(key)
        return None if value is None else Paired(value[0], value[1], value[2], 0)

    def share(cell: str, above: str, below: str) -> float | None:
        row = rows.get(cell, {})
        return row[above] / row[below] if above in row and below in row else None

    return [
        Target.at_most("bf16, r 16: step / product-rate limit", 2.0, at("lora", f"{fast} / limit"), fast, missed=MEMORY),
        Target.at_most("bf16, r 16: step / eager frozen step", 0.75, at("lora", f"{fast} / frozen"), fast, missed=ITSELF),
        Target.at_most("bf16, r 16: uncompiled step / eager frozen step", 1.07, at("lora", "lorakit / frozen")),
        Target.at_least("bf16, r 16: faster than PEFT eager", 1.7, at("lora", f"peft / {fast}"), fast),
        Target.at_least(
            "bf16, r 16, dropout 0.05: faster than PEFT eager", 2.3, at("lora, dropout 0.05", f"peft / {dropped}"), dropped, missed=MASKS
        ),
        Target.at_least("bf16, r 16: faster than PEFT compiled", 1.0, at("lora", f"{peer} / {fast}"), f"{fast} against {peer}"),
        Target.at_least("no cell slower than PEFT: the interval's upper end where it is worst", 1.0, *slowest),
        Target.at_most("bf16: saved bytes of PEFT's", 0.45, share("lora", f"{fast} saved MB", "peft saved MB"), fast),
        Target.at_most(
            "bf16, dropout 0.05: saved bytes of PEFT's", 0.35, share("lora, dropout 0.05", f"{dropped} saved MB", "peft saved MB"), dropped
        ),
        Target.at_most(
            "LoRA-FA: saved bytes of the frozen model's, same loss", 1.02, share("lora_fa", "lorakit saved MB", "frozen, our loss saved MB")
        ),
        Target.at_most("DoRA: step / our LoRA's", 1.08, at("dora", "lorakit compiled / our lora compiled"), "both compiled", missed=GAIN),
        Target.at_most("DoRA: uncompiled step / our LoRA's", 1.08, at("dora", "lorakit / our lora"), missed=GAIN),
        Target.at_most(
            "DoRA at 128 tokens: step / our LoRA's",
            1.25,
            at("dora, 1 × 128", "lorakit compiled / our lora compiled"),
            "both compiled",
            missed=NORM,
        ),
        Target.at_most("DoRA at 128 tokens: uncompiled step / our LoRA's", 1.25, at("dora, 1 × 128", "lorakit / our lora"), missed=NORM),
        Target.at_least("DoRA: faster than PEFT's", 2.0, at("dora", f"peft / {fastest(rows.get('dora', {}), 'lorakit')}")),
        Target.at_most("QLoRA: step / our LoRA's", 1.5, at("qlora", "lorakit / our lora"), missed=DECODING),
        Target.at_most("peak memory of PEFT's, where it is worst", 1.0, *heaviest),
    ]


def fastest(row: Row, prefix: str) -> str:
    """Of a cell's contenders whose name begins so, the one with the least median."""
    medians = {key.removesuffix(" s"): row[key] for key in row if key.startswith(prefix) and key.endswith(" s") and "compiles" not in key}
    return min(medians, key=medians.__getitem__, default=prefix)


def extreme(choose: Callable[..., Any], values: dict[str, float]) -> tuple[float | None, str]:
    """(the value that `choose` takes, its cell)."""
    name = choose(values, key=values.__getitem__, default=None)
    return (None, "") if name is None else (values[name], f"in {name}")


# ---------------------------------------------------------------------------------------------------------------------- the run
TABLES = {
    "Uncompiled steps": ["cell", "lorakit s", "peft s", "frozen s", "limit s", "peft / lorakit", "lorakit / frozen", "lorakit / limit"],
    "PEFT in bfloat16: under autocast, and with adapters in bfloat16": [
        "cell", "peft autocast s", "peft bfloat16 s", "peft autocast / lorakit", "peft bfloat16 / lorakit",
        "peft autocast / lorakit compiled",
        "peft bfloat16 / lorakit compiled", "peft autocast saved MB", "peft bfloat16 saved MB",
    ],
    "Compiled, and full fine-tuning, seconds": [
        "cell", "lorakit compiled s", "peft compiled by layer s", "peft compiled whole s", "frozen compiled s", "full s",
    ],
    "Compiled, peers' steps over ours": [
        "cell", "peft / lorakit compiled", "peft compiled by layer / lorakit compiled", "peft compiled whole / lorakit compiled",
        "full / lorakit compiled",
    ],
    "Compiled, our steps over the limits": [
        "cell", "lorakit compiled / frozen", "lorakit compiled / frozen compiled", "lorakit compiled / limit",
    ],
    "Beside our own LoRA": [
        "cell", "our lora s", "lorakit / our lora", "our lora compiled s", "lorakit compiled / our lora compiled",
    ],
    "Seconds of the first, compiling step": [
        "cell", "lorakit compiled compiles s", "peft compiled by layer compiles s", "peft compiled whole compiles s",
        "frozen compiled compiles s",
    ],
    "Memory: kept for backward (saved), and rise of a fresh process (peak)": [
        "cell", "lorakit saved MB", "lorakit compiled saved MB", "peft saved MB",
        "frozen saved MB", "frozen, our loss saved MB", "kept limit MB",
        "lorakit peak MB", "lorakit compiled peak MB", "peft peak MB", "frozen peak MB", "full peak MB",
    ],
    "What the machine does at best": ["cell", "bfloat16 GFLOP/s", "float32 GFLOP/s", "copy GB/s"],
    "The limit": ["cell", "GFLOP", "GFLOP/s", "limit s", "kept limit MB", "note"],
}  # fmt: skip


def machine_rates(sizes: Sizes) -> Row:
    """What this machine does at best in this run: products at the step's shapes, and copies."""
    d, f, tokens = sizes.hidden, sizes.ffn, 4 * 512
    shapes = [(tokens, d, d), (tokens, d, f), (tokens, f, d), (tokens, d, sizes.vocab)]
    rates = {name: harness.product_rate(shapes, getattr(torch, name), device=sizes.device) / 1e9 for name in ("bfloat16", "float32")}
    return (
        {"cell": "this machine"}
        | {f"{name} GFLOP/s": rate for name, rate in rates.items()}
        | {"copy GB/s": harness.bandwidth(device=sizes.device) / 1e9}
    )


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--cells", default="*", help="a glob over the cells' names")
    for field in dataclasses.fields(Sizes):
        if field.type is int:
            parser.add_argument(f"--{field.name}", type=int, help=f"default {field.default}")
    args = parser.parse_args()
    given = {name: value for name, value in vars(args).items() if value is not None and name in Sizes.__dataclass_fields__}
    sizes = dataclasses.replace(SMOKE if args.smoke else Sizes(), **given)
    if args.smoke:
        args.rounds = min(args.rounds, 2)
    rates, rows = machine_rates(sizes), dict[str, Row]()
    for cell in [cell for cell in STAR if fnmatch.fnmatch(cell.name, args.cells)]:
        rows[cell.name] = measure(tiny(cell) if args.smoke else cell, sizes, args)
        print({key: figure(value) for key, value in rows[cell.name].items()}, flush=True)
    harness.publish("train_step", args, [rates, *rows.values()], targets(rows), tables=TABLES, whole=harness.is_default(parser, args))


if __name__ == "__main__":
    main()
