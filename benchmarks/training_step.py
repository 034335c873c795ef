"""One training step beside PEFT's and beside the limit: the frozen model's own forward and backward to its input.

    python benchmarks/training_step.py --out benchmarks/results/NAME.json

Every contender runs on the same weights and batch; rounds are interleaved, and the ratios are of medians from this one run. `limit` is
forward plus backward through the frozen base to its embeddings, which no adapter on every layer can undercut. `saved` is what the forward
keeps for backward.
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
from transformers import LlamaConfig, LlamaForCausalLM

from lorakit import attach, get_method
from lorakit.train.memory import saved_bytes

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({"r": 16, "alpha": 32.0}, {}),
    "lora, dropout 0.05": ({"r": 16, "alpha": 32.0, "dropout": 0.05}, {"lora_dropout": 0.05}),
    "dora": ({"r": 16, "alpha": 32.0}, {"use_dora": True}),
    "lora_fa": ({"r": 16, "alpha": 32.0}, {}),
}


def model(dtype: torch.dtype, args: argparse.Namespace) -> LlamaForCausalLM:
    """The same weights every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=args.hidden, num_hidden_layers=args.layers, num_attention_heads=8,
        intermediate_size=args.hidden * 8 // 3 // 32 * 32
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).train()


def ours(name: str, kwargs: dict[str, Any], dtype: torch.dtype, args: argparse.Namespace) -> torch.nn.Module:
    """lorakit's."""
    base = model(dtype, args)
    return attach(base, get_method(name.split(",")[0], **kwargs)).model


def theirs(name: str, extra: dict[str, Any], dtype: torch.dtype, args: argparse.Namespace) -> torch.nn.Module:
    """PEFT's; LoRA-FA by freezing A, as its optimizer does."""
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR, **extra)
    adapted = peft.get_peft_model(model(dtype, args), config)  # type: ignore[arg-type]
    if name == "lora_fa":
        for key, p in adapted.named_parameters():
            p.requires_grad_("lora_B" in key)
    return adapted


def frozen(dtype: torch.dtype, args: argparse.Namespace) -> torch.nn.Module:
    """Forward and backward through the base to its embeddings."""
    base = model(dtype, args).requires_grad_(False)
    base.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    return base


def stepper(module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Forward and backward."""

    def step() -> None:
        module(**batch).loss.backward()
        for p in module.parameters():
            p.grad = None

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for flag, default in {"hidden": 512, "layers": 6, "batch": 4, "length": 256, "rounds": 7}.items():
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(1)
    ids = torch.randint(0, 8192, (args.batch, args.length))
    batch = {"input_ids": ids, "labels": ids}
    rows = []
    for dtype in (getattr(torch, name) for name in args.dtypes.split(",")):
        modules = {"limit": frozen(dtype, args)}
        for name, (kwargs, extra) in PAIRS.items():
            modules |= {f"lorakit {name}": ours(name, kwargs, dtype, args), f"peft {name}": theirs(name, extra, dtype, args)}
        steps = {name: stepper(m, batch) for name, m in modules.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(args.rounds + 1):
            for name, step in steps.items():
                began = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - began)
        median = {name: statistics.median(t[1:]) for name, t in times.items()}
        kept = {name: saved_bytes(m, batch, loss=lambda m, b: m(**b).loss) for name, m in modules.items() if name != "limit"}
        for name in PAIRS:
            a, b = median[f"lorakit {name}"], median[f"peft {name}"]
            row = {
                "dtype": str(dtype).removeprefix("torch."), "method": name,
                "lorakit_s": round(a, 4), "peft_s": round(b, 4), "limit_s": round(median["limit"], 4),
                "speedup_over_peft": round(b / a, 3), "times_the_limit": round(a / median["limit"], 3),
                "saved_bytes_ratio": round(kept[f"lorakit {name}"] / kept[f"peft {name}"], 3),
            }  # fmt: skip
            rows.append(row)
            print(json.dumps(row), flush=True)
    if args.out:
        facts = {
            "machine": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "peft": peft.__version__,
        }
        args.out.write_text(
            json.dumps({"args": {k: str(v) for k, v in vars(args).items()}, **facts, "rows": rows}, indent=1), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
