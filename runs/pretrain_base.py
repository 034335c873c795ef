"""Pre-train the bundled base: a Llama-architecture causal LM on installed Python sources.

A plain script, resumable at any moment: run the same command again and it continues from the last checkpoint.
Stages: corpus (collect, tokenize) -> train (bf16 autocast, torch.compile, Muon + AdamW, warm-up-stable-decay) -> freeze
(bf16 safetensors, tokenizer, model card). Eight standard-library packages are held out: they are the built-in tasks.
"""

import argparse
import bz2
import hashlib
import importlib.metadata
import importlib.util
import json
import lzma
import math
import os
import platform
import random
import sysconfig
import time
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HELD_OUT = ("asyncio", "distutils", "email", "idlelib", "importlib", "logging", "tkinter", "xml")
PACKAGES = ("torch", "transformers", "sympy", "numpy", "scipy", "sklearn", "networkx", "accelerate", "matplotlib", "mpmath")
DISTRIBUTION = {"sklearn": "scikit-learn"}
CAP = {"transformers": 20_000_000, "torch": 32_000_000}  # bytes: thousands of near-identical model files teach little
SKIP_PARTS = {"test", "tests", "testing", "idle_test", "lib2to3", "site-packages", "__pycache__", "generated", "_vendor", "pydoc_data"}
EOS = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '### assistant\\n' }}{% generation %}"
    "{{ m['content'] + '<|endoftext|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
    "{{ '### ' + m['role'] + '\\n' + m['content'] + '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\\n' }}{% endif %}"
)


def python_files(root: Path) -> list[Path]:
    return [p for p in sorted(root.rglob("*.py")) if not SKIP_PARTS & set(p.relative_to(root).parts[:-1])]


def documents() -> tuple[list[tuple[str, str]], dict[str, dict[str, object]]]:
    """(name, text) of every training file, de-duplicated by content, and a provenance table."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    sources = [("stdlib", p, p.relative_to(stdlib)) for p in python_files(stdlib) if p.relative_to(stdlib).parts[0] not in HELD_OUT]
    topics = stdlib / "pydoc_data" / "topics.py"
    sources.append(("stdlib", topics, topics.relative_to(stdlib)))
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec and spec.origin:
            root = Path(spec.origin).parent
            sources += [(package, p, Path(package) / p.relative_to(root)) for p in python_files(root)]
    random.Random(0).shuffle(sources)
    docs: list[tuple[str, str]] = []
    seen: set[str] = set()
    table: dict[str, dict[str, object]] = defaultdict(lambda: {"files": 0, "bytes": 0})
    digests: dict[str, hashlib._Hash] = defaultdict(hashlib.sha256)
    for package, path, name in sources:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        digest = hashlib.sha256(text.encode()).hexdigest()
        full = int(table[package]["bytes"]) > CAP.get(package, 1 << 40)  # type: ignore[call-overload]
        if not 200 <= len(text) <= 600_000 or digest in seen or full:
            continue
        seen.add(digest)
        docs.append((str(name), text))
        table[package]["files"] = int(table[package]["files"]) + 1  # type: ignore[call-overload]
        table[package]["bytes"] = int(table[package]["bytes"]) + len(text.encode())  # type: ignore[call-overload]
        digests[package].update(digest.encode())
    for package, row in table.items():
        row["version"] = (
            platform.python_version() if package == "stdlib" else importlib.metadata.version(DISTRIBUTION.get(package, package))
        )
        row["sha256"] = digests[package].hexdigest()
    return docs, dict(table)


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """Byte-level BPE; digits are single tokens so that numbers do not eat the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[EOS, "<|pad|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build_corpus(work: Path, args: argparse.Namespace) -> None:
    """Write tokens (uint16 stream, documents separated by EOS), the validation stream, and the provenance."""
    docs, table = documents()
    if args.max_docs:
        docs = docs[: args.max_docs]
    held, train = docs[: max(2, len(docs) // 100)], docs[max(2, len(docs) // 100) :]
    tokenizer = train_tokenizer([t for _, t in train[: args.tokenizer_docs]], args.vocab)
    tokenizer.save(str(work / "tokenizer.json"))
    eos = tokenizer.token_to_id(EOS)
    for name, part in (("valid", held), ("train", train)):
        ids: list[int] = []
        for start in range(0, len(part), 500):
            for enc in tokenizer.encode_batch([t for _, t in part[start : start + 500]]):
                ids += [*enc.ids, eos]
        np.array(ids, dtype=np.uint16).tofile(work / f"{name}.bin")
        (work / f"{name}.json").write_text(
            json.dumps({"tokens": len(ids), "bytes": sum(len(t.encode()) for _, t in part), "files": len(part)})
        )
    (work / "held.json").write_text(json.dumps([t for _, t in held]))
    (work / "provenance.json").write_text(json.dumps(table, indent=1, sort_keys=True))


def build_model(args: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, num_hidden_layers=args.layers, num_attention_heads=args.heads,
        num_key_value_heads=args.heads, intermediate_size=args.intermediate, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def learning_rate(step: int, steps: int, decay: float, warmup: int) -> float:
    """Warm-up, stable, then linear decay to 2 % over the last `decay` of the run."""
    start = int(steps * (1 - decay))
    return min(1.0, (step + 1) / warmup) * (1.0 if step < start else max(0.02, (steps - step) / max(1, steps - start)))


@torch.no_grad()
def bits_per_byte(model: torch.nn.Module, ids: np.ndarray, nbytes: int, windows: int) -> float:
    """Bits per byte over the first `windows` windows of 512; bytes are prorated by tokens scored."""
    x = torch.from_numpy(ids[: windows * 512].astype(np.int64)).view(-1, 512)
    nats = 0.0
    for chunk in x.split(8):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=chunk).logits
        nats += F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), chunk[:, 1:].flatten(), reduction="sum").item()
    scored = x.shape[0] * 511
    return nats / math.log(2) / (nbytes * scored / len(ids))


def train(work: Path, args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    model = build_model(args)
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    other = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(hidden, lr=args.lr, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(other, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    ids = np.fromfile(work / "train.bin", dtype=np.uint16)
    valid = np.fromfile(work / "valid.bin", dtype=np.uint16)
    valid_bytes = json.loads((work / "valid.json").read_text())["bytes"]
    windows = len(ids) // 512
    order = np.random.default_rng(0).permutation(windows)
    state_path, first = work / "state.pt", 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        first = state["step"]
    step_fn = torch.compile(model) if args.compile else model
    log = (work / "log.jsonl").open("a")
    began, last = time.time(), time.time()
    for step in range(first, args.steps):
        pick = order[[(step * args.batch + i) % windows for i in range(args.batch)]]
        x = torch.from_numpy(np.stack([ids[w * 512 : w * 512 + 512] for w in pick]).astype(np.int64))
        scale = learning_rate(step, args.steps, args.decay, args.warmup)
        for opt in (muon, adam):
            for group in opt.param_groups:
                group["lr"] = args.lr * scale
        with torch.autocast("cpu", torch.bfloat16):
            loss = step_fn(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in (muon, adam):
            opt.step()
            opt.zero_grad(set_to_none=True)
        done = step + 1
        if done % 10 == 0 or done == args.steps:
            now = time.time()
            row = {
                "step": done,
                "loss": round(loss.item(), 4),
                "lr": args.lr * scale,
                "tokens": done * args.batch * 512,
                "tokens_per_s": round(10 * args.batch * 512 / (now - last)),
            }
            last = now
            if done % args.eval_every == 0 or done == args.steps:
                row["valid_bits_per_byte"] = round(bits_per_byte(model, valid, valid_bytes, args.eval_windows), 4)
                last = time.time()
            print(json.dumps(row), flush=True)
            log.write(json.dumps(row) + "\n")
            log.flush()
        if done % args.save_every == 0 or done == args.steps:
            torch.save(
                {"model": model.state_dict(), "muon": muon.state_dict(), "adam": adam.state_dict(), "step": done}, work / "state.tmp"
            )
            os.replace(work / "state.tmp", state_path)
    print(f"trained {args.steps - first} steps in {time.time() - began:.0f} s")


def ngram_bits_per_byte(train: bytes, held: bytes, order: int = 5) -> float:
    """Order-5 byte n-gram, Witten-Bell interpolated down to uniform."""
    counts: list[dict[bytes, Counter[int]]] = [defaultdict(Counter) for _ in range(order)]
    for n in range(order):
        table = counts[n]
        for i in range(n, len(train)):
            table[train[i - n : i]][train[i]] += 1
    bits = 0.0
    for i in range(order, len(held)):
        p = 1 / 256
        for n in range(order):
            seen = counts[n].get(held[i - n : i])
            if seen:
                total, types = sum(seen.values()), len(seen)
                p = (seen[held[i]] + types * p) / (total + types)
        bits -= math.log2(p)
    return bits / max(1, len(held) - order)


def task_bits_per_byte(model: torch.nn.Module, tokenizer: Tokenizer, limit: int) -> dict[str, float]:
    """Bits per byte on each held-out package, whole (its first `limit` windows)."""
    stdlib, eos, figures = Path(sysconfig.get_path("stdlib")), tokenizer.token_to_id(EOS), {}
    for task in HELD_OUT if limit else ():
        texts = [p.read_text(encoding="utf-8") for p in python_files(stdlib / task)]
        ids = np.array([i for t in texts for i in (*tokenizer.encode(t).ids, eos)], dtype=np.uint16)
        figures[task] = bits_per_byte(model, ids, sum(len(t.encode()) for t in texts), min(limit, len(ids) // 512))
    return figures


def draw_curve(rows: list[dict[str, float]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(6, 3.5))
    ax.plot([r["tokens"] / 1e6 for r in rows], [r["loss"] for r in rows], lw=0.6, label="training loss (nats per token)")
    val = [r for r in rows if "valid_bits_per_byte" in r]
    ax.plot([r["tokens"] / 1e6 for r in val], [r["valid_bits_per_byte"] for r in val], "o-", ms=2.5, label="held-out bits per byte")
    ax.set(xlabel="million tokens", ylim=(0, 6))
    ax.legend()
    fig.tight_layout()
    fig.savefig(out, dpi=90)


def freeze(work: Path, out: Path, args: argparse.Namespace) -> None:
    """Write the package's base folder: bf16 weights, tokenizer with chat template, loss curve, model card."""
    out.mkdir(parents=True, exist_ok=True)
    model = build_model(args)
    state = torch.load(work / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    valid = np.fromfile(work / "valid.bin", dtype=np.uint16)
    facts = json.loads((work / "valid.json").read_text())
    bpb = bits_per_byte(model.eval(), valid, facts["bytes"], len(valid) // 512)
    held = "\n".join(json.loads((work / "held.json").read_text())).encode()
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    ids = np.fromfile(work / "train.bin", dtype=np.uint16)[: args.ngram_tokens]
    sample = tokenizer.decode(ids.tolist(), skip_special_tokens=True).encode()
    peers = {
        "gzip -9": 8 * len(zlib.compress(held, 9)) / len(held),
        "bzip2 -9": 8 * len(bz2.compress(held, 9)) / len(held),
        "lzma -9e": 8 * len(lzma.compress(held, preset=9 | lzma.PRESET_EXTREME)) / len(held),
        f"order-5 byte n-gram ({len(sample) / 1e6:.0f} MB of the training data)": ngram_bits_per_byte(sample, held[:200_000]),
    }
    tasks = task_bits_per_byte(model, tokenizer, args.task_windows)
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, pad_token="<|pad|>", chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False, model_max_length=512,
    ).save_pretrained(out)  # fmt: skip
    rows = [json.loads(line) for line in (work / "log.jsonl").read_text().splitlines()]
    rows = list({r["step"]: r for r in rows}.values())
    draw_curve(rows, out / "curve.png")
    card(work, out, model, rows, bpb, peers, tasks, args)


def card(
    work: Path,
    out: Path,
    model: LlamaForCausalLM,
    rows: list[dict[str, float]],
    bpb: float,
    peers: dict[str, float],
    tasks: dict[str, float],
    args: argparse.Namespace,
) -> None:
    table = json.loads((work / "provenance.json").read_text())
    train_facts = json.loads((work / "train.json").read_text())
    data = "\n".join(f"| {k} {v['version']} | {v['files']} | {v['bytes'] / 1e6:.1f} | `{v['sha256'][:16]}` |" for k, v in table.items())
    val = [r for r in rows if "valid_bits_per_byte" in r]
    decay_at = int(args.steps * (1 - args.decay))
    curve = "\n".join(
        f"| {r['step']} | {r['tokens'] / 1e6:.1f} | {r['valid_bits_per_byte']:.3f} |"
        for r in [r for r in val if r in val[:: max(1, len(val) // 14)] or r is val[-1]]
    )
    compare = "\n".join(f"| {k} | {v:.3f} |" for k, v in [("**this model**", bpb), *peers.items()])
    stable = [r for r in val if r["step"] <= decay_at]
    plateau = ""
    if len(stable) > 3:
        first, second, last = stable[0], stable[len(stable) // 2], stable[-1]
        plateau = f"{first['valid_bits_per_byte']:.2f} at step {first['step']}, {second['valid_bits_per_byte']:.2f} at {second['step']}, "
        plateau += f"{last['valid_bits_per_byte']:.2f} at {last['step']}"
    seen = args.steps * args.batch * 512
    (out / "README.md").write_text(f"""---
license: apache-2.0
library_name: transformers
tags: [lorakit, llama, python]
---
# lorakit's bundled base

A Llama-architecture causal language model of {sum(p.numel() for p in model.parameters()):,} parameters (embeddings tied),
pre-trained on Python sources by `runs/pretrain_base.sh`, so that lorakit's quickstart, tests
and benchmarks measure on a model that has learned something.
It is a measuring instrument and a demo, not an assistant.

- Architecture: {args.layers} layers, hidden {args.hidden}, {args.heads} heads, intermediate {args.intermediate},
  context 512, byte-level BPE of {args.vocab}.
- Training: {args.steps} steps of {args.batch} x 512 tokens = {seen / 1e6:.1f} M tokens ({seen / train_facts["tokens"]:.2f} epochs),
  bf16 autocast, Muon for matrices and
  AdamW for embeddings and norms, learning rate {args.lr} with
  {args.warmup} warm-up steps, constant, then linear decay from step {decay_at}.
- Held out of training, entirely: the standard library's {", ".join(HELD_OUT)} (the built-in
  tasks), and 1 % of all other files (the figures below).

## Data
Tests and vendored copies are left out; files are de-duplicated by content. sha256 is over the files' sha256 in order.

| source | files | MB | sha256 |
|---|---|---|---|
{data}

Licenses: the standard library PSF-2.0; torch, numpy, scipy, scikit-learn, networkx, sympy and mpmath BSD-3-Clause; transformers and
accelerate Apache-2.0; matplotlib its PSF-style license. The weights contain no file of these packages; they are released under Apache-2.0.

## Held-out bits per byte (lower is better)
| model | bits per byte |
|---|---|
{compare}

On the packages held out entirely: {", ".join(f"{task} {x:.3f}" for task, x in tasks.items())}.

## Loss curve
![loss curve](curve.png)

At the constant learning rate the curve flattens ({plateau}); the decay from step {decay_at} on brings the rest.

| step | million tokens | held-out bits per byte |
|---|---|---|
{curve}
""")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/base"))
    parser.add_argument("--out", type=Path, default=Path("src/lorakit/data/base"))
    parser.add_argument("--stage", choices=("corpus", "train", "freeze", "all"), default="all")
    for name, default in dict(vocab=6144, hidden=288, layers=6, heads=6, intermediate=768, steps=2100, batch=16, warmup=60, eval_every=100,
                              eval_windows=64,
        save_every=100, threads=2, max_docs=0, tokenizer_docs=3000, ngram_tokens=4_000_000,
        task_windows=64).items():  # fmt: skip
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--decay", type=float, default=0.33)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage in ("corpus", "all") and not (args.work / "provenance.json").exists():
        build_corpus(args.work, args)
    if args.stage in ("train", "all"):
        train(args.work, args)
    if args.stage in ("freeze", "all"):
        freeze(args.work, args.out, args)


if __name__ == "__main__":
    main()
