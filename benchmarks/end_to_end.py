"""Ragged chats from a file to a finished adapter: `lorakit train`, PEFT + transformers.Trainer, and TRL's SFTTrainer, in one run.

    python -m benchmarks.end_to_end                              the bundled base, whole epochs, with final losses
    python -m benchmarks.end_to_end --hidden 1024 --layers 4     random weights of a larger shape, tokens a second only
    python -m benchmarks.end_to_end --smoke                      every contender for a few steps

Everybody trains on the same chats with r 16, alpha 32, all linear layers, dropout 0, AdamW without decay, a cosine from the same rate, the
same number of steps and about the same useful tokens in each; trained is what the assistant says. Everything else is each one's own
default, or, under the other names, what makes it faster. A contender's every run is a process of its own, and a round is one run of each
with the round's number as seed.

    useful tokens      those that are no padding, of the batches as the model gets them
    tokens/s           useful tokens over the seconds of the training loop
    with set-up        the same over everything from the files to the saved adapter, imports aside
    peak               by how much memory rises in the training loop above what it was before, the median of the runs
    loss               of the saved adapter in fp32 on held-out chats, by one function for all

A row counts where its loss is not above that of PEFT + Trainer's defaults by more than noise, and it was trained on the same tokens.
"""

import argparse
import fnmatch
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import harness
from benchmarks.harness import ROOT, Paired, Row, Target
from lorakit.data.builtin import load_name
from lorakit.data.encoded import IGNORED
from lorakit.data.pack import pack
from lorakit.data.pad import pad
from lorakit.data.source import load_rows
from lorakit.data.tokenize import tokenize_rows, trained_bytes
from lorakit.train.config import BUNDLED
from lorakit.train.dataset import Side
from lorakit.train.evaluate import evaluate
from lorakit.train.source_model import bundled_base, load_tokenizer

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# --------------------------------------------------------------------------------------------------------------- the contenders
@dataclass(frozen=True)
class Contender:
    """A stack, the items of its micro-batch (windows of 512 tokens, or samples), and settings that are not its own defaults."""

    stack: str
    items: int
    windows: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def batch(self, plan: "Plan") -> tuple[int, int]:
        """(items of a micro-batch, about as many as wished; micro-batches of a step): nearest to the plan's useful tokens a step."""
        wanted = plan.windows_a_step * (1.0 if self.windows else plan.samples / plan.windows)
        wished = min(self.items, max(1, round(wanted)))
        near = range(max(1, round(0.85 * wished)), round(1.15 * wished) + 1)
        pairs = [(items, max(1, round(wanted / items))) for items in near]
        return min(pairs, key=lambda pair: (abs(pair[0] * pair[1] - wanted), abs(pair[0] - wished)))


BF16 = {"dtype": "bfloat16"}
EAGER = {**BF16, "torch_compile": False}
NEAR = {"train_sampling_strategy": "group_by_length"}
KEEP = {"gradient_checkpointing": False}
CONTENDERS: dict[str, Contender] = {
    "lorakit": Contender("lorakit", 8, windows=True),
    "lorakit bf16": Contender("lorakit", 8, windows=True, settings=BF16),
    "lorakit bf16, compiled": Contender("lorakit", 8, windows=True, settings={**BF16, "torch_compile": True}),
    "lorakit bf16, eager": Contender("lorakit", 8, windows=True, settings=EAGER),
    "lorakit bf16, eager, 2 windows": Contender("lorakit", 2, windows=True, settings=EAGER),
    "lorakit bf16, eager, 19 samples by length": Contender("lorakit", 19, settings={**EAGER, "packing": False}),
    "lorakit bf16, eager, 19 samples blindly": Contender("lorakit", 19, settings={**EAGER, "packing": False, "group_by_length": False}),
    "Trainer": Contender("trainer", 8),
    "Trainer by length": Contender("trainer", 8, settings=NEAR),
    "Trainer by length, 19 samples": Contender("trainer", 19, settings=NEAR),
    "Trainer by length, 19 samples, compiled": Contender("trainer", 19, settings={**NEAR, "torch_compile": True}),
    "Trainer by length, 19 samples, bf16": Contender("trainer", 19, settings={**NEAR, "bf16": True}),
    "TRL": Contender("trl", 8),
    "TRL by length": Contender("trl", 8, settings={**KEEP, **NEAR}),
    "TRL by length, 19 samples": Contender("trl", 19, settings={**KEEP, **NEAR}),
    "TRL packed": Contender("trl", 1, windows=True, settings={**KEEP, "packing": True, "max_length": 512}),
    "TRL without padding": Contender("trl", 8, settings={**KEEP, "padding_free": True, "max_length": None}),
}
REFERENCE = "Trainer"


@dataclass(frozen=True)
class Plan:
    """What all runs of one benchmark share."""

    folder: str
    model: str
    samples: int
    windows: int
    windows_a_step: int
    steps: int
    rate: float
    device: str
    judged: bool


class Watch:
    """Counts what the model gets, and clocks the training loop."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds, self.rise = device, 0.0, 0
        self.useful = self.places = self.trained = self.supervised = 0

    def counting(self, collate: Callable[[Any], Any], pad_id: int) -> Callable[[Any], Any]:
        """The same function, its batches counted."""

        def counted(items: Any) -> Any:
            batch = collate(items)
            ids = batch["input_ids"]
            self.places, self.useful = self.places + ids.numel(), self.useful + int((ids != pad_id).sum())
            self.supervised += int((batch["labels"][:, 1:] != IGNORED).sum())
            return batch

        return counted

    def knows(self, labels: Sequence[Sequence[int]]) -> None:
        """The labels of an epoch."""
        self.trained = sum(label != IGNORED for row in labels for label in row)

    def over(self, loop: Callable[[], Any]) -> Any:
        """Run the training loop."""
        result = []

        def clocked() -> None:
            began = time.perf_counter()
            result.append(loop())
            harness.synchronize(self.device)
            self.seconds = time.perf_counter() - began

        self.rise = harness.peak_rise(clocked, self.device)
        return result[0]


@dataclass(frozen=True)
class Job:
    """One run of one contender."""

    plan: Plan
    contender: Contender
    seed: int
    out: str

    @property
    def shared(self) -> dict[str, Any]:
        """What is everybody's, under the names that all three stacks have in common."""
        plan = self.plan
        items, accumulation = self.contender.batch(plan)
        return {
            "output_dir": self.out, "seed": self.seed, "learning_rate": plan.rate, "lr_scheduler_type": "cosine", "weight_decay": 0.0,
            "max_grad_norm": 1.0, "max_steps": plan.steps,
            "per_device_train_batch_size": items, "gradient_accumulation_steps": accumulation,
        }  # fmt: skip

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The training chats."""
        return whole(Path(self.plan.folder) / "train.jsonl")


def whole(path: Path) -> list[dict[str, Any]]:
    """Every row of a file."""
    return list(load_rows(path, "train", valid=path))


def lorakit(job: Job, watch: Watch) -> str:
    """`lorakit train`, by its function."""
    from lorakit.train.config import make_config
    from lorakit.train.run import Run
    from lorakit.train.train import train

    folder = Path(job.plan.folder)
    data = {"train_data": str(folder / "train.jsonl"), "eval_data": str(folder / "valid.jsonl"), "max_eval_samples": 1, "save_steps": 0}
    config = make_config({"model": job.plan.model, **data, "r": 16, "alpha": 32.0, **job.shared, **job.contender.settings})
    loop = Run.train

    def watched(run: Run) -> Any:
        stream, model_config = run.streams[0], cast(Any, run.adapted.model.config)
        stream.side = replace(stream.side, collate=watch.counting(stream.side.collate, model_config.pad_token_id))
        watch.knows([item.labels for item in run.data.train.items])
        final = watch.over(lambda: loop(run))
        if run.at.tokens != watch.supervised:
            raise RuntimeError(f"the run trained on {run.at.tokens} tokens and {watch.supervised} were counted")
        return final

    with mock.patch.object(Run, "train", watched):
        train(config, quiet=True)
    return f"{job.out}/adapter"


def hugging_face(job: Job) -> dict[str, Any]:
    """Arguments of Trainer and of SFTTrainer: nothing is saved or reported on the way."""
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": job.plan.device == "cpu"}
    return {**job.shared, **quiet, **job.contender.settings}


def trainer(job: Job, watch: Watch) -> str:
    """PEFT and transformers.Trainer. Rows are tokenized by our function, which is no part of the comparison."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(job.plan.model)
    samples = tokenize_rows(tokenizer, job.rows, max_length=512).samples
    torch.manual_seed(job.seed)
    base = AutoModelForCausalLM.from_pretrained(job.plan.model)
    made = Trainer(
        model=get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR, task_type="CAUSAL_LM")),
        args=TrainingArguments(**hugging_face(job)),
        train_dataset=[{"input_ids": s.input_ids, "attention_mask": [1] * len(s.input_ids), "labels": s.labels} for s in samples],
        data_collator=watch.counting(DataCollatorForSeq2Seq(tokenizer), tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    watch.knows([s.labels for s in samples])
    watch.over(made.train)
    made.save_model(job.out)
    return job.out


def trl(job: Job, watch: Watch) -> str:
    """TRL's SFTTrainer, which loads, tokenizes and masks by itself."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    torch.manual_seed(job.seed)
    made = SFTTrainer(
        model=job.plan.model,
        args=SFTConfig(assistant_only_loss=True, **hugging_face(job)),
        train_dataset=Dataset.from_list(job.rows),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR, task_type="CAUSAL_LM"),
    )
    tokenizer, dataset = cast(Any, made.processing_class), cast(Any, made.train_dataset)
    made.data_collator = watch.counting(made.data_collator, tokenizer.pad_token_id)
    watch.knows(dataset["labels"])
    watch.over(made.train)
    made.save_model(job.out)
    return job.out


STACKS: dict[str, Callable[[Job, Watch], str]] = {"lorakit": lorakit, "trainer": trainer, "trl": trl}


# --------------------------------------------------------------------------------------------------------------------- one run
def one(plan: dict[str, Any], name: str, seed: int) -> dict[str, Any]:
    """Called in a fresh process: train once, and judge what came out."""
    with tempfile.TemporaryDirectory(dir=plan["folder"]) as out:
        job, watch = Job(Plan(**plan), CONTENDERS[name], seed, f"{out}/run"), Watch(plan["device"])
        imported(job.contender.stack)
        os.environ["ACCELERATE_USE_CPU"] = str(plan["device"] == "cpu").lower()  # what Trainer's use_cpu is
        began = time.perf_counter()
        adapter = STACKS[job.contender.stack](job, watch)
        whole = time.perf_counter() - began
        loss = final_loss(job.plan, adapter) if job.plan.judged else None
    return {"useful": watch.useful, "places": watch.places, "trained": watch.trained, "seconds": watch.seconds, "whole": whole,
            "rise": watch.rise, "loss": loss}  # fmt: skip


def imported(stack: str) -> None:
    """Import what the stack imports when it is used, before the clock starts."""
    for module in {
        "lorakit": ["lorakit.train.train", "matplotlib.figure"],
        "trainer": ["peft"],
        "trl": ["peft", "datasets", "trl.trainer.sft_trainer"],
    }[stack]:
        importlib.import_module(module)


def final_loss(plan: Plan, adapter: str | None) -> float:
    """Nats a trained token on the held-out chats, of the base in fp32 with or without an adapter of anybody's."""
    from lorakit.serve.open import open_adapter, open_base

    opened = open_base(plan.model) if adapter is None else open_adapter(adapter, model=plan.model, dtype="float32")
    tokenizer = opened.tokenizer
    samples = tokenize_rows(tokenizer, whole(Path(plan.folder) / "valid.jsonl"), max_length=512).samples
    pad_id, n_bytes = int(tokenizer.pad_token_id or 0), trained_bytes(tokenizer, samples, shifted=True)
    side = Side(list(samples), lambda items: pad(items, pad_id), n_bytes, "")
    return evaluate(opened.model.to(plan.device), side, batch_size=16)["loss"]


def alone(plan: Plan, name: str, seed: int) -> dict[str, Any]:
    """`one` in a process of its own, as a user would start it."""
    arguments = json.dumps({"plan": asdict(plan), "name": name, "seed": seed})
    command = [sys.executable, "-m", "benchmarks.end_to_end", "--one", arguments]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **threads}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.rstrip().rsplit("\n", 1)[-1])
    return found


# ---------------------------------------------------------------------------------------------------------------- all of them
def prepared(folder: Path, args: argparse.Namespace) -> Plan:
    """Write data and model once, for everybody."""
    for split in ("train", "valid"):
        rows = load_name(args.data, split)[: args.rows or None]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    model = str(bundled_base()) if args.hidden is None else larger(folder / "model", args.hidden, args.layers)
    samples = tokenize_rows(load_tokenizer(model), whole(folder / "train.jsonl"), max_length=512).samples
    windows = len(pack(samples, 512))
    steps = args.max_steps or math.ceil(args.epochs * windows / args.windows)
    judged = args.hidden is None
    return Plan(str(folder), model, len(samples), windows, args.windows, steps, args.rate, args.device, judged)


def larger(folder: Path, hidden: int, layers: int) -> str:
    """A Llama of random bf16 weights with the bundled tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        intermediate_size=-(-hidden * 8 // 3 // 256) * 256, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(folder)
    load_tokenizer(BUNDLED).save_pretrained(folder)
    return str(folder)


def rounds(plan: Plan, names: Sequence[str], args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Every contender once a round, in an order that rotates and turns around."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    run = (lambda plan, name, seed: one(asdict(plan), name, seed)) if args.smoke else alone
    for i in range(args.rounds):
        turn = i % len(names)
        order = [*names[turn:], *names[:turn]]
        for name in order if i % 2 else reversed(order):
            found[name].append(run(plan, name, i))
            print(f"round {i}, {name}: {found[name][-1]}", flush=True)
    return found


def row_of(name: str, runs: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]], plan: Plan) -> Row:
    """A contender's figures, and whether they count."""
    contender, speed = CONTENDERS[name], [run["useful"] / run["seconds"] for run in runs]
    theirs = [run["useful"] / run["seconds"] for run in reference]
    losses = [run["loss"] for run in runs if run["loss"] is not None]
    items, accumulation = contender.batch(plan)
    return {
        "contender": name,
        "batch": f"{accumulation} × {items} {'windows' if contender.windows else 'samples'}",
        "tokens/s": statistics.median(speed),
        "× Trainer": Paired.of(speed, theirs).as_list(),
        "tokens/s with set-up": statistics.median(run["useful"] / run["whole"] for run in runs),
        "padding": 1 - runs[0]["useful"] / runs[0]["places"],
        "peak MB": statistics.median(run["rise"] for run in runs) / 1e6,
        "trained tokens": runs[0]["trained"],
        "loss": statistics.mean(losses) if losses else None,
        "± of seeds": statistics.stdev(losses) if len(losses) > 1 else None,
        "counts": verdict(runs, reference),
        "speeds": speed,
    }


NEGLIGIBLE = 0.005
"""A difference of losses, relative, that is taken for none even where seeds agree better than that."""


def verdict(runs: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]) -> str:
    """Whether a row counts, or why not."""
    if {run["trained"] for run in runs} != {run["trained"] for run in reference}:
        return "does not count: other tokens are trained"
    if runs[0]["loss"] is None:
        return "not judged"
    mine, theirs = ([run["loss"] for run in some] for some in (runs, reference))
    return "yes" if statistics.mean(mine) - statistics.mean(theirs) <= noise(mine, theirs) else "does not count: its loss is higher"


def noise(mine: Sequence[float], theirs: Sequence[float]) -> float:
    """How much two means of losses over seeds may differ by chance: Student's 95 % for equal variances, never less than NEGLIGIBLE."""
    n = len(mine)
    if n < 2:
        return math.inf
    spread = math.sqrt((statistics.variance(mine) + statistics.variance(theirs)) / n)
    return max(STUDENT.get(2 * n - 2, 2.0) * spread, NEGLIGIBLE * statistics.mean(theirs))


STUDENT = {2: 4.30, 4: 2.78, 6: 2.45, 8: 2.31, 10: 2.23, 18: 2.10}
"""The 97.5 % point of Student's t by degrees of freedom."""


# ------------------------------------------------------------------------------------------------------------------ the targets
def targets(rows: Mapping[str, Row]) -> list[Target]:
    """The promises that this benchmark keeps or breaks, by the rows that count."""
    rows = {name: row for name, row in rows.items() if not row["counts"].startswith("does not")}
    ours, trl_s, theirs = (fastest(rows, prefix) for prefix in ("lorakit", "TRL", "Trainer"))
    packed, blind = rows.get("lorakit bf16, eager, 2 windows"), rows.get("lorakit bf16, eager, 19 samples blindly")
    as_small = rows.get("Trainer by length, 19 samples")
    gain, share = ratio(packed, blind), None if blind is None else blind["padding"]
    return [
        Target.at_least(
            "end to end: gain of packing over padding blindly, of 1/(1 − padding share)",
            0.9,
            None if gain is None or share is None else scaled(gain, 1 - share),
            "" if share is None else f"padding share {share:.3f}",
            missed="so few useful tokens fill the machine better with padding than without; 8 windows do not have that",
        ),
        Target.at_least("end to end: faster than TRL at its best", 1.3, ratio(ours, trl_s), beside(ours, trl_s)),
        Target.at_least("end to end: faster than PEFT + Trainer at its best", 1.0, ratio(ours, theirs), beside(ours, theirs)),
        Target.at_most("end to end: peak memory of PEFT + Trainer's", 1.0, over(packed, as_small, "peak MB"), beside(packed, as_small)),
    ]


def fastest(rows: Mapping[str, Row], prefix: str) -> Row | None:
    """One stack's row with the most tokens a second."""
    return max((row for name, row in rows.items() if name.startswith(prefix)), key=lambda row: row["tokens/s"], default=None)


def ratio(above: Row | None, below: Row | None) -> Paired | None:
    """Round by round."""
    return None if above is None or below is None else Paired.of(above["speeds"], below["speeds"])


def over(above: Row | None, below: Row | None, key: str) -> float | None:
    """The quotient of one figure, where both have it."""
    return above[key] / below[key] if above and below and above.get(key) and below.get(key) else None


def scaled(paired: Paired, factor: float) -> Paired:
    """A ratio times a constant."""
    return Paired(paired.median * factor, paired.low * factor, paired.high * factor, paired.pairs)


def beside(ours: Row | None, theirs: Row | None) -> str:
    """Which two were compared."""
    return f"{ours['contender']} against {theirs['contender']}" if ours and theirs else ""


# ---------------------------------------------------------------------------------------------------------------------- the run
def parsed() -> argparse.Namespace:
    """The command line; a smoke run overrides the sizes."""
    parser = harness.arguments(__doc__, rounds=3)
    parser.add_argument("--data", default="builtin:all/chat")
    parser.add_argument("--rows", type=int, default=0, help="use only the first rows; 0: all")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--max-steps", type=int, default=0, help="0: whole epochs")
    parser.add_argument("--windows", type=int, default=16, help="of 512 tokens, in a step")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--hidden", type=int, help="random weights of this width in place of the bundled base; losses are not judged")
    parser.add_argument("--layers", type=int, default=4, help="with --hidden")
    parser.add_argument("--contenders", default="*", help="a pattern of names, several with |")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        args.data, args.rows, args.rounds, args.windows, args.max_steps = "builtin:tkinter/chat", 48, 1, 1, 2
    return args


def chosen(args: argparse.Namespace) -> list[str]:
    """The contenders that take part; none is compiled in a smoke run."""
    names = [name for name in CONTENDERS if any(fnmatch.fnmatchcase(name, pattern) for pattern in args.contenders.split("|"))]
    return [name for name in names if not (args.smoke and CONTENDERS[name].settings.get("torch_compile"))]


def table(plan: Plan, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All rounds: a row a contender."""
    found = rounds(plan, chosen(args), args)
    return {name: dict(row_of(name, runs, found.get(REFERENCE, runs), plan)) for name, runs in found.items()}


COLUMNS = (
    "contender", "batch", "tokens/s", "× Trainer", "tokens/s with set-up", "padding", "peak MB", "trained tokens", "loss", "± of seeds",
    "counts",
)  # fmt: skip


def main() -> None:
    """Run, print, write."""
    args = parsed()
    if args.one:
        print(json.dumps(one(**json.loads(args.one))))
        return
    with tempfile.TemporaryDirectory() as folder:
        plan = prepared(Path(folder), args)
        rows = table(plan, args)
        start = [{"contender": "untrained", "loss": final_loss(plan, None)}] if plan.judged else []
    shape = f"{args.hidden}x{args.layers}" if args.hidden else ""
    title = f"Ragged chats, {f'random Llama {shape}' if shape else 'the bundled base'}"
    benchmark = f"end_to_end_{shape}" if shape else "end_to_end"
    whole = args.contenders == "*"
    harness.publish(benchmark, args, [*rows.values(), *start], targets(rows), tables={title: COLUMNS}, whole=whole)


if __name__ == "__main__":
    main()
