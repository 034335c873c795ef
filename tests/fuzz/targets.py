"""What is fuzzed: a target makes a hostile input in a folder and uses it as a user would. Only a LorakitError in one line may come back."""

import json
import shutil
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import torch
import yaml
from torch import nn

import lorakit
from lorakit.adapters.convert import convert
from lorakit.adapters.inspect import inspect_adapter
from lorakit.adapters.io import load_adapter
from lorakit.core.attach import Adapted
from lorakit.core.errors import LorakitError
from lorakit.data.row import shape_of
from lorakit.data.source import load_rows
from lorakit.data.tiny import tiny_model, tiny_tokenizer
from lorakit.data.tokenize import tokenize_rows
from lorakit.train.config import read_config
from tests.fuzz import mutate


class Broken(AssertionError):
    """An answer that a user must not get."""


class Target(ABC):
    """One kind of input. `seeds` are good ones by the file's name; `use` reads what lies in the folder."""

    name: str
    seeds: Mapping[str, bytes]

    @abstractmethod
    def write(self, rng: Random, folder: Path) -> None:
        """A hostile input."""

    def put(self, data: bytes, folder: Path) -> None:
        """These bytes as the input, for a fuzzer that makes bytes: the first says which file they are."""
        names = sorted(self.seeds)
        name = names[data[0] % len(names)] if data else names[0]
        (folder / name).write_bytes(data[1:])

    @abstractmethod
    def use(self, folder: Path) -> None:
        """Everything a user would do with it."""


def refused(target: Target, folder: Path) -> bool:
    """Use the input: whether it was refused, in one line and without leaving anything. Raises Broken, or whatever escaped."""
    before = listing(folder)
    try:
        target.use(folder)
    except LorakitError as error:
        text = str(error)
        if not text or len(text) > 2000 or "\n" in text:  # the command would print it as one line, which long ones are not
            raise Broken(f"an error of {len(text)} characters and {text.count(chr(10)) + 1} lines: {text[:300]!r}") from error
        if (after := listing(folder)) != before:
            raise Broken(f"left behind: {sorted(set(after) - set(before))}") from error
        return True
    return False


def listing(folder: Path) -> list[str]:
    """Every name below the folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# -- configurations ---------------------------------------------------------------------------------------------------------

CONFIGS: dict[str, dict[str, Any]] = {
    "ours.yaml": {
        "model": "bundled", "method": "adalora", "r": 4, "alpha": 8, "sites": ["q_proj", "v_proj"], "train_data": ["a.jsonl", "b.jsonl"],
        "eval_data": ["c.jsonl", "d.jsonl"], "learning_rate": 1e-4, "max_steps": 10, "packing": True, "chat_template": "{{ messages }}",
        "columns": {"prompt": "question"}, "lr_scheduler_type": "linear", "output_dir": "out", "seed": 3,
    },
    "mixture.yaml": {"train_data": {"a.jsonl": 2, "b.csv": 0.5}, "mix_strategy": "over", "method": "pissa+loraplus", "quantize": "nf4"},
    "llama_factory.yaml": {
        "model_name_or_path": "m", "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 8, "lora_target": "all",
        "dataset": "alpaca_en_demo,identity", "template": "llama3", "cutoff_len": 512, "max_samples": 100, "overwrite_cache": True,
        "preprocessing_num_workers": 2, "output_dir": "o", "per_device_train_batch_size": 1, "learning_rate": "1.0e-4", "bf16": True,
        "num_train_epochs": 3.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "val_size": 0.1, "eval_strategy": "steps",
    },
    "axolotl.yaml": {
        "base_model": "m", "adapter": "qlora", "load_in_4bit": True, "lora_r": 32, "lora_alpha": 16, "lora_target_linear": True,
        "datasets": [{"path": "d.jsonl", "type": "alpaca"}], "val_set_size": 0.05, "sequence_len": 512, "sample_packing": True,
        "micro_batch_size": 2, "num_epochs": 1, "optimizer": "adamw_torch", "lr_scheduler": "cosine", "learning_rate": 0.0002,
        "bf16": "auto",
    },
    "trl.yaml": {
        "model_name_or_path": "m", "dataset_name": "d", "use_peft": True, "lora_r": 16, "lora_alpha": 16, "max_length": 512,
        "packing": True,
        "learning_rate": 2.0e-4, "num_train_epochs": 1, "gradient_checkpointing": True, "output_dir": "o", "report_to": "none",
    },
}  # fmt: skip


class Configs(Target):
    """The YAML or JSON that `lorakit train` is given."""

    name = "configurations"
    seeds: ClassVar = {name: yaml.safe_dump(values).encode() for name, values in CONFIGS.items()}

    def write(self, rng: Random, folder: Path) -> None:
        name = rng.choice(sorted(CONFIGS))
        if rng.random() < 0.4:
            data = mutate.raw(rng, self.seeds[name])
        else:
            values = mutate.tree(rng, CONFIGS[name])
            data = mutate.dumps(values) if rng.random() < 0.5 else yaml.safe_dump(values).encode("utf-8", "surrogatepass")
        (folder / name).write_bytes(data)

    def use(self, folder: Path) -> None:
        (path,) = folder.iterdir()
        read_config(path, {}).identity()


# -- data -------------------------------------------------------------------------------------------------------------------

ROWS: tuple[list[dict[str, Any]], ...] = (
    [{"text": f"the {i}th text\nof two lines"} for i in range(6)],
    [{"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "yes"}]} for i in range(6)],
    [{"prompt": f"{i} + 1", "completion": str(i + 1)} for i in range(6)],
    [{"text": f"word {i}", "label": "ab"[i % 2]} for i in range(6)],
    [{"instruction": "Add.", "input": f"{i}, 1", "output": str(i + 1)} for i in range(6)],
    [{"conversations": [{"from": "human", "value": f"hi {i}"}, {"from": "gpt", "value": "yes"}]} for i in range(6)],
    [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(6)],
    [{"prompt": f"{i}?", "completion": "yes", "label": i % 2 == 0} for i in range(6)],
    [{"tokens": ["a", f"b{i}"], "tags": ["O", "B-X"]} for i in range(6)],
    [
        {
            "messages": [
                {"role": "user", "content": f"{i} + 1?"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "1", "function": {"name": "add", "arguments": f'{{"a": {i}}}'}}],
                },
                {"role": "tool", "content": str(i + 1)},
            ],
            "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "x": None}}}],
        }
        for i in range(6)
    ],
    [
        {
            "conversations": [{"from": "human", "value": f"hi {i}"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}],
            "tools": '[{"name": "f"}]',
        }
        for i in range(6)
    ],
)
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md")


class Data(Target):
    """A data file of any format."""

    name = "data files"

    def __init__(self) -> None:
        self.tokenizer = tiny_tokenizer()
        self.seeds = {f"data{suffix}": serialized(ROWS[i % len(ROWS)], suffix) for i, suffix in enumerate(SUFFIXES)}
        self.good = {(i, suffix): serialized(rows, suffix) for i, rows in enumerate(ROWS) for suffix in SUFFIXES}

    def write(self, rng: Random, folder: Path) -> None:
        i, suffix = rng.randrange(len(ROWS)), rng.choice(SUFFIXES[:4] if rng.random() < 0.6 else SUFFIXES)
        if rng.random() < 0.5 or suffix in (".parquet", ".arrow"):
            data = mutate.raw(rng, self.good[i, suffix])
        else:
            data = serialized(mutate.tree(rng, ROWS[i]), suffix)
        (folder / f"data{suffix}").write_bytes(data)

    def use(self, folder: Path) -> None:
        (path,) = folder.iterdir()
        for side in ("train", "valid"):
            rows = load_rows(path, side, valid_fraction=0.3)
            shape = shape_of(rows[0])
            if shape in ("text", "chat", "pair"):
                tokenize_rows(self.tokenizer, rows, max_length=32)


def serialized(rows: Any, suffix: str) -> bytes:
    """Rows, or what became of them, as a file of this kind, as far as it can hold them."""
    if suffix == ".json":
        return mutate.dumps(rows)
    each = rows if isinstance(rows, list) else [rows]
    if suffix in (".parquet", ".arrow"):
        return _columnar(each, suffix)
    if suffix in (".csv", ".tsv"):
        return _separated([row if isinstance(row, dict) else {"value": row} for row in each], "," if suffix == ".csv" else "\t")
    if suffix in (".txt", ".md"):
        return "\n".join(map(str, each)).encode("utf-8", "surrogatepass")
    return b"\n".join(map(mutate.dumps, each))


def _separated(rows: list[dict[str, Any]], separator: str) -> bytes:
    names = sorted({key for row in rows for key in row})
    quoted = [['"' + str(row.get(name, "")).replace('"', '""') + '"' for name in names] for row in rows]
    return "\n".join(separator.join(line) for line in [names, *quoted]).encode("utf-8", "surrogatepass")


def _columnar(rows: list[Any], suffix: str) -> bytes:
    import io

    import pyarrow
    import pyarrow.parquet

    table, sink = pyarrow.Table.from_pylist(rows), io.BytesIO()
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, sink)
    else:
        with pyarrow.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


# -- adapters ---------------------------------------------------------------------------------------------------------------

MADE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("lora", {"r": 2}), ("dora", {"r": 2}), ("pissa", {"r": 2}), ("adalora", {"r": 4, "target_r": 2}), ("vera", {"r": 4}),
    ("fourierft", {"n_frequency": 20}),
    ("prefix", {}), ("lora_xs", {"r": 2}), ("adapter_houlsby", {"r": 4}), ("melora", {}),
)  # fmt: skip


class Adapters(Target):
    """An adapter folder of our format or PEFT's: inspected, converted, put on a model."""

    name = "adapter folders"

    def __init__(self, made: Path) -> None:
        self.model = tiny_model("llama")
        self.folders = made_folders(self.model, made)
        self.seeds = {f"{folder.name}/{path.name}": path.read_bytes() for folder in self.folders for path in sorted(folder.iterdir())}

    def write(self, rng: Random, folder: Path) -> None:
        for path in sorted(rng.choice(self.folders).iterdir()):
            shutil.copyfile(path, folder / path.name)
        files = sorted(folder.iterdir())
        for path in rng.sample(files, min(len(files), rng.choice((1, 1, 1, 2)))):
            self._change(rng, path)

    def put(self, data: bytes, folder: Path) -> None:
        chosen = self.folders[data[0] % len(self.folders)] if data else self.folders[0]
        for path in sorted(chosen.iterdir()):
            shutil.copyfile(path, folder / path.name)
        changed = sorted(folder.iterdir())[data[1] % 2 if len(data) > 1 else 0]
        changed.write_bytes(data[2:])

    def use(self, folder: Path) -> None:
        adapter = load_adapter(folder, model=self.model)
        inspect_adapter(adapter, folder=folder)
        out = folder.parent / "out"
        shutil.rmtree(out, ignore_errors=True)
        try:
            convert(folder, out, model=self.model)
        except LorakitError:
            if out.exists():
                raise Broken("convert failed and left its output") from None
        adapted = Adapted(self.model)
        try:
            adapted.add("fuzzed", adapter)
        finally:
            adapted.detach()

    def _change(self, rng: Random, path: Path) -> None:
        data, kind = path.read_bytes(), rng.random()
        if kind < 0.1:
            path.unlink()
            if rng.random() < 0.5:
                path.mkdir()
        elif kind < 0.35:
            path.write_bytes(mutate.raw(rng, data))
        elif path.suffix == ".json":
            path.write_bytes(mutate.dumps(mutate.tree(rng, json.loads(data))))
        elif path.suffix == ".safetensors":
            path.write_bytes(_header_changed(rng, data))


def _header_changed(rng: Random, data: bytes) -> bytes:
    """A safetensors file whose header says something else, or whose numbers are not finite."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if rng.random() < 0.2:
        return data[: 8 + length] + mutate.raw(rng, body)
    changed = mutate.dumps(mutate.tree(rng, header))
    claimed = len(changed) if rng.random() < 0.9 else rng.choice((0, 2**63, len(changed) * 2, 2**32))
    return struct.pack("<Q", claimed) + changed + body


def made_folders(model: nn.Module, made: Path) -> list[Path]:
    """Good adapters of several methods, each in our format and, where there is one, in PEFT's."""
    folders = []
    for name, parameters in MADE:
        adapted = lorakit.attach(model, lorakit.get_method(name, **parameters), seed=0)
        with torch.no_grad():
            for row in adapted.params():
                row.tensor.add_(0.01)
        adapted.save(made / name)
        adapted.detach()
        folders.append(made / name)
        try:
            convert(made / name, made / f"{name}-peft", model=model)
            folders.append(made / f"{name}-peft")
        except LorakitError:
            continue
    return folders


def targets(made: Path) -> list[Target]:
    """All of them; `made` is an empty folder for good adapters."""
    return [Configs(), Data(), Adapters(made)]
