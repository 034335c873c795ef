"""One training step of LoRA on a mixture's experts: lorakit's, PEFT's, and the limit, forward and backward of the frozen model.

    python benchmarks/experts_step.py --out benchmarks/results/NAME.json

PEFT adds s·B·A to every expert's weight in each forward; here the rows of each expert go through its pair. `op` compares the grouped
product with its definition (ops/reference.py). Rounds are interleaved; figures are medians of one run. `saved` is what the forward keeps
for backward, measured by hooks.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from lorakit import attach, get_method
from lorakit.ops import reference
from lorakit.ops.grouped import grouped

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


def model(dtype: torch.dtype, args: argparse.Namespace) -> MixtralForCausalLM:
    """The same weights every time."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=8192, hidden_size=args.hidden, num_hidden_layers=args.layers, num_attention_heads=8, num_key_value_heads=8,
        intermediate_size=2 * args.hidden, num_local_experts=args.experts, num_experts_per_tok=2,
    )  # fmt: skip
    return MixtralForCausalLM(config).to(dtype).train()


def contenders(dtype: torch.dtype, args: argparse.Namespace) -> dict[str, nn.Module]:
    """By name; all with the same base."""
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=[], target_parameters=PARAMETERS)
    ours = attach(model(dtype, args), get_method("lora", r=16, alpha=32.0, sites="experts")).model
    return {"limit": model(dtype, args).requires_grad_(False), "lorakit": ours, "peft": peft.get_peft_model(model(dtype, args), config)}  # type: ignore[dict-item, arg-type]


def step(contender: nn.Module, ids: Tensor) -> None:
    """Forward and backward, to the embeddings at least."""
    x = contender.get_input_embeddings()(ids).detach().requires_grad_()  # type: ignore[operator]
    contender(inputs_embeds=x, labels=ids).loss.backward()


def saved(contender: nn.Module, ids: Tensor) -> int:
    """Bytes of distinct storages that the forward keeps, parameters left out."""
    there = {p.untyped_storage().data_ptr() for p in contender.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        graph = contender(input_ids=ids, labels=ids)
    total = sum(size for key, size in kept.items() if key not in there)
    del graph
    return total


def timed(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds, one warm-up round aside."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def steps(dtype: torch.dtype, args: argparse.Namespace) -> dict[str, Any]:
    ids = torch.randint(8192, (args.batch, args.length), generator=torch.Generator().manual_seed(0))
    made = contenders(dtype, args)
    times = timed({name: lambda c=c: step(c, ids) for name, c in made.items()}, args.rounds)  # type: ignore[misc]
    memory = {f"{name}_saved_mb": round(saved(c, ids) / 1e6, 1) for name, c in made.items() if name != "limit"}
    return {"dtype": str(dtype).split(".")[1], **{f"{name}_s": round(s, 4) for name, s in times.items()}, **memory}


def op(dtype: torch.dtype, args: argparse.Namespace) -> dict[str, Any]:
    """The product alone, frozen W, forward and backward."""
    rows = 2 * args.batch * args.length
    x, W = (
        torch.randn(rows, args.hidden, dtype=dtype, requires_grad=True),
        torch.randn(args.experts, 2 * args.hidden, args.hidden, dtype=dtype),
    )
    ends = (torch.arange(1, args.experts + 1) * rows // args.experts).int()
    calls = {"grouped": grouped, "reference": reference.grouped}
    times = timed({name: lambda f=f: f(x, W, ends).sum().backward() for name, f in calls.items()}, args.rounds)  # type: ignore[misc]
    return {"dtype": str(dtype).split(".")[1], **{f"{name}_s": round(s, 4) for name, s in times.items()}}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("hidden", 512), ("layers", 2), ("experts", 8), ("batch", 2), ("length", 256), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--machine", default=platform.processor() or platform.machine())
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    dtypes = (torch.float32, torch.bfloat16)
    versions = {"torch": torch.__version__, "peft": peft.__version__, "threads": torch.get_num_threads()}
    found = {
        "args": {k: str(v) for k, v in vars(args).items()},
        **versions,
        "steps": [steps(d, args) for d in dtypes],
        "op": [op(d, args) for d in dtypes],
    }
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
