"""What is known of a run before its first step, for report.html and run.json: nothing in it says whose machine it was."""

import json
import platform
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

import lorakit
from lorakit.core.attach import Adapted
from lorakit.core.base import numel
from lorakit.core.delta import Delta
from lorakit.core.errors import LorakitError
from lorakit.core.method import describe
from lorakit.train.answers import Held
from lorakit.train.config import FIELDS, TrainConfig
from lorakit.train.dataset import TrainData
from lorakit.train.memory import gradient_bytes, storage_bytes, weight_bytes
from lorakit.train.progress import COUNTED

Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Facts:
    """What is known of a run before its first step. Everything is shown as it is here."""

    name: str
    method: str
    model: str
    data: str
    shape: str
    """Of its rows."""
    total: int
    trainable: int
    of: int
    given: list[tuple[str, Any, Any]]
    """(key, value, default) of what the configuration says."""
    defaults: list[tuple[str, Any]]
    sites: list[tuple[str, str, str, int]]
    """(name, shape, rank, trainable values)."""
    sources: list[str]
    """A task's training data each."""
    accounts: Pairs
    details: list[str]
    """The rules of tokenizing and what they did to the training rows, a line each."""
    provenance: Pairs
    command: str
    ends: list[int] = field(default_factory=list)
    """The last step of each task."""
    started: str = ""
    resumed: int = 0
    """The step that the run was continued after."""
    settings_notes: list[str] = field(default_factory=list)
    measured: list[str] = field(default_factory=list)
    """What `lorakit eval` is told of each held-out source."""
    talks: bool = False
    """Whether its rows are conversations."""
    counted: str = "tokens"
    """What a loss is the mean over, and the speed counts."""


def facts_of(
    given: TrainConfig,
    settled: TrainConfig,
    adapted: Adapted,
    data: TrainData,
    *,
    held: Held,
    ends: Sequence[int],
    processes: int = 1,
    resumed: int = 0,
    notes: Sequence[str] = (),
) -> Facts:
    """What a run is. `given`: the configuration as the user wrote it; `settled`: with what a saved adapter brought; `notes`: what it was
    read as."""
    table = adapted.params()
    whole = settled.model_dump(mode="json")
    defaults = {name: TrainConfig.model_fields[name].get_default(call_default_factory=True) for name in FIELDS}
    own = {name: parameter.default for name, parameter in describe(settled.method).parameters.items()}
    said = [(k, whole[k], _default(defaults[k])) for k in FIELDS if k in given.model_fields_set or whole[k] != _json(defaults[k])]
    said += [(k, v, _default(own.get(k))) for k, v in settled.method_args.items()]
    named = {key for key, _, _ in said}
    out = Path(settled.output_dir)
    return Facts(
        name=settled.run_name or out.resolve().name,
        method=settled.method,
        model=homeless(settled.model),
        data=homeless(_sources_said(settled)),
        shape=held.shape,
        total=ends[-1],
        trainable=table.numel(),
        of=numel(adapted.model),
        given=[(k, homeless(v), d) for k, v, d in said],
        defaults=[(k, v) for k, v in [*((k, whole[k]) for k in FIELDS), *own.items()] if k not in named],
        sites=_sites(adapted),
        sources=[homeless(s if isinstance(s, str) else yaml.safe_dump(s, default_flow_style=True).strip()) for s, _ in settled.sources],
        accounts=[*(("read as", note) for note in held.notes), *_accounts(data)],
        details=[line for task in data.tasks if task.train.details for line in task.train.details.lines()],
        provenance=_provenance(settled, adapted, data, processes),
        command=command_of(given),
        ends=list(ends),
        started=_started(out),
        resumed=resumed,
        settings_notes=list(notes),
        measured=[said for source in settled.sources for said in _measured(*source)],
        talks=held.talks,
        counted=COUNTED.get(data.task, "tokens"),
    )


def _measured(train_data: str | dict[str, float], eval_data: str | None) -> list[str]:
    """The flags of `lorakit eval` for the rows that one task held out: a source that was named for that is all of it."""
    if eval_data is not None:
        return [f"--data {word(eval_data)} --whole"]
    return [f"--data {word(source)}" for source in ([train_data] if isinstance(train_data, str) else train_data)]


def _json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _default(value: Any) -> Any:
    return "none" if value is None or value == "" else _json(value)


def _sources_said(config: TrainConfig) -> str:
    data = config.train_data
    return (
        data
        if isinstance(data, str)
        else ", ".join(f"{k} × {w:g}" for k, w in data.items())
        if isinstance(data, dict)
        else " → ".join(data)
    )


def homeless(value: Any) -> Any:
    """A value in which the user's home is ~: a page is sent around, and whose machine it was is nobody's business."""
    home = str(Path.home())
    if isinstance(value, str):
        return value.replace(home + "/", "~/") if len(home) > 1 else value
    if isinstance(value, list | tuple):
        return [homeless(v) for v in value]
    if isinstance(value, Mapping):
        return {homeless(k): homeless(v) for k, v in value.items()}
    return value


def word(text: str) -> str:
    """A word of a command as one types it; a home in front is ~ outside of the quotes, where a shell reads it."""
    text = homeless(text)
    return f"~/{shlex.quote(text[2:])}" if len(text) > 2 and text.startswith("~/") else shlex.quote(text)


def command_of(config: TrainConfig) -> str:
    """The command line that gives this configuration, to be shown: the home is ~."""
    words = ["lorakit train"]
    chosen = config.model_dump(mode="json", include=set(config.model_fields_set) - {"method_args"}) | config.method_args
    for key, value in chosen.items():
        if value is None:
            continue
        as_it_is = isinstance(value, str) and (key in FIELDS or yaml.safe_load(value) == value)
        text = value if as_it_is else yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
        words.append(f"--{key.replace('_', '-')} {word(text)}")
    return " ".join(words)


def _sites(adapted: Adapted) -> list[tuple[str, str, str, int]]:
    counts: Counter[str] = Counter()
    for row in adapted.params():
        counts[row.site.name if row.site else row.name] += row.tensor.numel()
    found = {b.site.name: (f"{b.site.d_out} × {b.site.d_in}", _rank(b.delta)) for b in adapted.branches()}
    return [(name, *found.get(name, ("whole", "")), n) for name, n in counts.items()] + [
        (name, *found[name], 0) for name in found if name not in counts
    ]


def _rank(delta: Delta) -> str:
    try:
        return str(delta.bound())
    except LorakitError:  # it is no change of a weight
        return ""


def _accounts(data: TrainData) -> Pairs:
    pairs: Pairs = []
    for i, task in enumerate(data.tasks):
        of = f" (task {i + 1})" if data.later else ""
        pairs += [(f"training{of}", task.train.account), (f"held out{of}", task.valid.account)]
    if data.labels:
        pairs.append(("classes", ", ".join(map(str, data.labels))))
    return pairs


def _provenance(config: TrainConfig, adapted: Adapted, data: TrainData, processes: int) -> Pairs:
    device = next(adapted.model.parameters()).device
    print_ = adapted.fingerprint
    pairs = [
        ("base", f"{print_.name or 'unnamed'}, checkpoint {print_.checkpoint or 'unknown'}, entries {print_.rows or 'unknown'}"),
        ("training rows", ", ".join(f"sha256 {task.hash}" for task in data.tasks)),
        ("seed", str(config.seed)),
        ("versions", versions()),
        ("machine", machine(device)),
        ("processes", str(processes)),
        ("output folder", homeless(str(config.output_dir))),
    ]
    return pairs


def started(config: TrainConfig, adapted: Adapted, data: TrainData, held: Held) -> dict[str, Any]:
    """What run.json remembers beside the configuration, for `lorakit runs`."""
    return {
        "started": now(),
        "method": config.method,
        "task": data.task,
        "data_hash": [task.hash for task in data.tasks],
        "held_out_hash": held.hash,
        "trainable_params": adapted.params().numel(),
        "base": adapted.fingerprint.as_dict(),
        "versions": versions(),
        "machine": machine(next(adapted.model.parameters()).device),
    }


def _started(out: Path) -> str:
    """When the run was started that `out` belongs to."""
    record = out / "run.json"
    return str(json.loads(record.read_text(encoding="utf-8")).get("started") or now()) if record.exists() else now()


def versions() -> str:
    """lorakit's, Python's and those of the libraries that decide results."""
    found = [f"lorakit {lorakit.__version__}", f"Python {platform.python_version()}"]
    for name in ("torch", "transformers", "tokenizers", "accelerate", "peft"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def machine(device: torch.device) -> str:
    """Kind of processor, threads, accelerator: nothing that says whose it is."""
    threads = torch.get_num_threads()
    words = [f"{_cpu()}, {threads} thread{'s' if threads != 1 else ''}", f"{platform.system()} {platform.machine()}"]
    if device.type == "cuda":
        words.insert(0, f"{torch.cuda.get_device_name(device)} (CUDA {torch.version.cuda})")
    elif device.type != "cpu":
        words.insert(0, device.type)
    return ", ".join(words)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def now() -> str:
    """The time, to the minute, in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def memory_rows(adapted: Adapted, optimizer: torch.optim.Optimizer) -> list[tuple[str, int]]:
    """Bytes that are counted exactly: weights, and what training adds beside the activations."""
    trained = [row.tensor for row in adapted.params()]
    states = [v for state in optimizer.state.values() for v in _tensors(state)]
    ours = storage_bytes(trained)
    return [
        ("weights of the base", max(0, weight_bytes(adapted.model) - ours)),
        ("trained parameters", ours),
        ("their gradients", gradient_bytes(trained)),
        ("optimizer's state", storage_bytes(states)),
    ]


def _tensors(tree: Any) -> Iterable[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
