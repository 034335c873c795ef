"""How near Flora's path and LoRA's come to full fine-tuning's, under plain SGD, on the bundled base and real data.

    python benchmarks/flora_path.py --out benchmarks/results/NAME.json

Every contender trains the same weights (all linear layers) on the same batches in the same order. `distance` is that of the change of the
weights after so many steps from full fine-tuning's change, over the latter's length; `cosine` is between the two; `loss gap` is the mean
absolute difference of the training losses, step by step. Flora compresses the gradients of every step (form (a)); LoRA also gets three
times the rate, since its first steps are shorter.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import Method, attach, get_method
from lorakit.parts.optimizers.sgd import SGD
from lorakit.train.config import TrainConfig, make_config
from lorakit.train.dataset import TrainData
from lorakit.train.distributed import world
from lorakit.train.run import Run
from lorakit.train.train import build

WHERE = ("*_proj",)


def contenders(ranks: list[int]) -> dict[str, tuple[Method, float]]:
    """Name -> (method, factor on the learning rate)."""
    out: dict[str, tuple[Method, float]] = {"full": (Method(None, unfreeze=WHERE, optim=SGD()), 1.0)}
    for r in ranks:
        out[f"flora r={r}"] = get_method("flora_gc", r=r, rule="sgd", beta1=0.0, accumulate=True, unfreeze=WHERE), 1.0
        for factor in (1.0, 3.0):
            out[f"lora r={r}, rate × {factor:g}"] = get_method("lora", r=r, alpha=float(r)).but(optim=SGD()), factor
    return out


def path(model: nn.Module, method: Method, data: TrainData, config: TrainConfig) -> tuple[Tensor, list[float], float]:
    """(change of all weights in one vector, training losses, held-out loss); the model is left as it was."""
    adapted = attach(model, method, seed=config.seed)
    run = Run(adapted, data, config, world(), out=None, quiet=True)
    final = run.train()
    parts = {u.name: u.trained.detach() - u.original.detach() for u in adapted.unfrozen["default"]}
    parts |= {f"{b.site.name}.weight": b.weight().detach() for b in adapted.branches()}
    adapted.detach()
    losses = [row["loss"] for row in run.history if "loss" in row]
    return torch.cat([parts[name].double().flatten() for name in sorted(parts)]), losses, final["loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for flag, default in {"steps": 200, "batch": 4, "length": 128}.items():
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--ranks", default="16,64")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    keys: dict[str, Any] = {
        "train_data": "builtin:tkinter/chat", "max_steps": args.steps, "max_length": args.length, "max_eval_samples": 40,
        "per_device_train_batch_size": args.batch // 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_steps": 0,
    }  # fmt: skip
    loaded = build(make_config(keys), world())
    model, rows = loaded.adapted.detach(), []
    found: dict[str, tuple[Tensor, list[float], float]] = {}
    for name, (method, factor) in contenders([int(r) for r in args.ranks.split(",")]).items():
        found[name] = path(model, method, loaded.data, make_config(keys | {"learning_rate": args.rate * factor}))
        (want, losses, _), (change, own, held_out) = found["full"], found[name]
        row = {
            "contender": name,
            "distance": round(float((change - want).norm() / want.norm()), 4),
            "cosine": round(float(torch.cosine_similarity(change, want, dim=0)), 4),
            "loss gap": round(sum(abs(a - b) for a, b in zip(own, losses, strict=True)) / len(losses), 4),
            "first loss": round(own[0], 4), "last loss": round(own[-1], 4), "held-out loss": round(held_out, 4),
        }  # fmt: skip
        rows.append(row)
        print(json.dumps(row), flush=True)
    if args.out:
        facts = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        text = json.dumps({"args": {k: str(v) for k, v in vars(args).items()}, **facts, "rows": rows}, indent=1, ensure_ascii=False)
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
