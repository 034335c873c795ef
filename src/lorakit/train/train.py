"""`train(config)`: from a configuration to an adapter on disk. The same function behind `lorakit train` and Python."""

import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lorakit.core.adapter import Adapter
from lorakit.core.attach import Adapted, attach
from lorakit.core.errors import BadParameter, CheckpointError, Incompatible
from lorakit.core.events import Calibrated
from lorakit.core.method import Method, describe, get_method
from lorakit.core.site import select
from lorakit.data.packable import check_packing, why_not_packable
from lorakit.parts.bases.nf4_base import NF4Spec
from lorakit.parts.bases.quantize import quantize
from lorakit.train.allocator import keep_freed_memory
from lorakit.train.answers import Held, held_out
from lorakit.train.attention import segment_attention
from lorakit.train.beginning import Beginning, beginning
from lorakit.train.checkpoint import checkpoints
from lorakit.train.compile import CompiledLayers, compile_layers, inductor_rounding
from lorakit.train.compile_choice import choose
from lorakit.train.config import TrainConfig
from lorakit.train.curve import draw_curve
from lorakit.train.dataset import TrainData, check_vocabulary, prepare
from lorakit.train.distributed import World, shard, world
from lorakit.train.ending import conclude
from lorakit.train.facts import facts_of, started
from lorakit.train.log import read_log
from lorakit.train.preference import REFERENCE, Aim
from lorakit.train.report import Report
from lorakit.train.rows import Rows, read_tasks, remembered
from lorakit.train.run import Result, Run
from lorakit.train.source_model import CLASSIFY, HEADED, head_of, load_model, load_tokenizer
from lorakit.train.state import read_state
from lorakit.train.stream import calibration
from lorakit.train.trackers import Trackers, start, wanted


@dataclass(frozen=True)
class Parts:
    """Everything a run is made of, loaded and attached."""

    adapted: Adapted
    tokenizer: PreTrainedTokenizerBase
    data: TrainData
    config: TrainConfig
    compiled: CompiledLayers | None
    choice: str
    """Why its layers are compiled, or not; nothing where the configuration says it."""
    undo: Callable[[], None]
    """Gives the model its own attention back."""
    held: Held
    """What a report says of the held-out rows."""
    begun: Beginning | None = None
    """The saved adapter that it goes on from."""


def train(config: TrainConfig, *, quiet: bool = False, notes: Sequence[str] = ()) -> Result:
    """Train an adapter as configured and save it under `output_dir`/adapter.

    With resume="auto" a killed run goes on from its newest checkpoint and ends with the same bits, on CPU, as if it had never been
    killed; a finished one returns at once. Raises BadParameter when `output_dir` holds another run. `notes`: what the configuration was
    read as, for the report.
    """
    keep_freed_memory()
    out = Path(config.output_dir)
    began = time.perf_counter()
    here = world()
    wanted(config.report_to)  # or it is refused, before anything is loaded
    found = earlier(out, config, here)
    if found is not None:
        return found
    state = read_state(checkpoints(out)[-1]) if config.resume and checkpoints(out) else None
    parts = build(config, here, state, quiet=quiet)
    for note in parts.held.notes if here.main and not quiet else ():
        print(f"data: {note}", file=sys.stderr, flush=True)
    if parts.choice and here.main and not quiet:
        print(f"torch_compile: {parts.choice}", file=sys.stderr, flush=True)
    same_start(out, parts)
    trackers = Trackers()
    try:
        if here.main:
            trackers = start(config, config.identity() | config.method_args, step=0 if state is None else state["position"]["step"])
        run = Run(parts.adapted, parts.data, config, here, out=out, quiet=quiet, compiled=parts.compiled)
        claim(out, config, here, parts)
        if state is not None:
            run.load_state(state)
        report = watch(config, parts, run, out, notes)
        run.listeners.append(trackers)
        final = run.train()
    finally:
        parts.undo()
        trackers.close()
    return _finish(parts, run, out, final, time.perf_counter() - began, report, trackers)


def watch(config: TrainConfig, parts: Parts, run: Run, out: Path, notes: Sequence[str]) -> Report | None:
    """The page of the run, which is told of every row; the main process writes it."""
    if not run.world.main:
        return None
    facts = facts_of(
        config,
        parts.config,
        parts.adapted,
        parts.data,
        held=parts.held,
        ends=run.ends,
        processes=run.world.size,
        resumed=run.at.step,
        notes=notes,
    )
    report = Report(out, facts, parts.adapted.notes)
    run.listeners.append(report)
    return report


def build(config: TrainConfig, here: World, state: Mapping[str, Any] | None = None, *, quiet: bool = False) -> Parts:
    """Load data, model and tokenizer, and attach the method. `state`: of the run to be resumed. `quiet`: show no progress."""
    seed_everything(config.seed)
    tasks = read_tasks(config)
    rows = tasks[0]
    model = load_model(config.model, task=rows.task, dtype=config.dtype, labels=rows.labels)
    begun = beginning(config, model, rows.labels)
    if begun is not None:
        config = begun.settled(config)
    tokenizer = load_tokenizer(config.model, chat_template=config.chat_template)
    if tokenizer.pad_token_id is not None:
        model.config.pad_token_id = tokenizer.pad_token_id  # type: ignore[union-attr]
    method = with_head(config, model, rows.task, begun)
    if (spec := NF4Spec() if config.quantize == "nf4" else method.base) is not None:
        quantize(model, spec)  # before attach, which would keep the original weights, and before they need room on the device
    model = model.to(here.device)
    data = make_data(tasks, config, tokenizer, model, method, quiet=quiet or not here.main)
    if (aim := data.train.aim) is not None:
        aim.check(method)
    adapted = begin(model, method, data, config, here, None if state is None else state["adapter"], begun)
    adapted.notes += data.notes
    if config.packing and "packing" in config.model_fields_set and rows.task not in ("causal-lm", CLASSIFY):
        adapted.notes.append(f"packing is for texts to continue or to answer: the samples of task={rows.task} are padded")
    adapted.notes += idle_keys(config, aim, rows.task)
    if aim is not None:
        adapted.notes += dict.fromkeys(note for task in data.tasks for note in aim.notes(task.train.items))
        if begun is not None:  # what it began as is the reference, beside what it becomes
            adapted.add(REFERENCE, adapted.state()).switch("default")
    adapted.meta = describe_run(config, data, tokenizer) | ({} if begun is None else {"init_adapter": begun.provenance()})
    with adapted.given(step=0):  # whose memo of the probe is forgotten with it
        undo = segment_attention(model)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    choice = choose(config, adapted, data, here, None if state is None else state["compiled"])
    backend = None if aim is None else inductor_rounding
    compiled = compile_layers(model, required=choice.required, dynamic=choice.dynamic, backend=backend) if choice.on else None
    if here.sharded:
        shard(model, adapted.params())
    held = held_out(tasks, config.report_samples)
    return Parts(adapted, tokenizer, data.filled() if choice.on else data, config, compiled, choice.why, undo, held, begun)


def begin(
    model: nn.Module,
    method: Method,
    data: TrainData,
    config: TrainConfig,
    here: World,
    trained: Mapping[str, Tensor] | None,
    begun: Beginning | None,
) -> Adapted:
    """Attach the method. What started from data is not started again when it is resumed: its sites and shapes are in its tensors."""
    if begun is not None:
        return begun.attached(model, method, seed=config.seed)
    if not isinstance(method.init, Calibrated):
        return attach(model, method, seed=config.seed)
    if trained is None:
        return attach(model, method, seed=config.seed, calibration=calibration(data.train, config, here, method.init.batches))
    assert method.recipe is not None
    owners = {key.rpartition(".")[0] for key in trained}
    sites = tuple(site for site in select(model, method.sites) if site.name in owners)
    return Adapted(model, seed=config.seed).add("default", Adapter(method.recipe, sites, trained))


def with_head(config: TrainConfig, model: nn.Module, task: str, begun: Beginning | None = None) -> Method:
    """The method; for classification the new head is trained whole, unless the user said what to unfreeze, or the adapter brings one."""
    head = head_of(model) if begun is None else begun.lacks(model)
    if task not in HEADED or not head or (begun is None and "unfreeze" in config.method_args):
        return config.build_method()
    known = describe(config.method).parameters
    if "unfreeze" not in known:
        raise Incompatible(
            f"{config.method} trains no module whole, and the head of a classifier is new: it would stay random; "
            "give the classes as text to answer with (chat or completion rows), or choose another method"
        )
    others = config.method_args.get("unfreeze", known["unfreeze"].default)
    return get_method(config.method, **(config.method_args | {"unfreeze": (*others, *head)}))


def make_data(
    tasks: Sequence[Rows],
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    model: nn.Module,
    method: Method,
    *,
    quiet: bool = False,
) -> TrainData:
    """Tokenized items. Packing that the user asked for must be exact; where it cannot be and was not asked for, samples are padded."""
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    packing = config.packing and tasks[0].task == "causal-lm"
    patched = attach(model, Method(None, patches=method.patches)) if method.patches else None  # a patch may stand in front of one document
    if packing and "packing" in config.model_fields_set:
        check_packing(model)
    elif packing:
        packing = why_not_packable(model) is None
    if patched is not None:
        patched.detach()
    first, *later = (prepare(rows, config, tokenizer, packing=packing, encoder_decoder=encoder_decoder, quiet=quiet) for rows in tasks)
    data = replace(first, later=tuple(later))
    check_vocabulary(data, len(model.get_input_embeddings().weight), config.model)  # type: ignore[operator]
    return data


def idle_keys(config: TrainConfig, aim: Aim | None, task: str) -> list[str]:
    """Which keys that the user gave the task does not know."""
    known = {"train_on"} if task == "causal-lm" else set(() if aim is None else aim.keys())
    asked = [key for key in ("beta", "desirable_weight", "train_on", "undesirable_weight") if key not in known]
    given = [key for key in asked if getattr(config, key) != TrainConfig.model_fields[key].default]
    return [f"{', '.join(given)}: without effect on task={task}"] if given else []


def describe_run(config: TrainConfig, data: TrainData, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the adapter remembers: enough to load its base again, to talk to it, and to know its data."""
    facts: dict[str, Any] = {"model": config.model, "task": data.task, "labels": data.labels, "dtype": config.dtype}
    facts["data_hash"] = [task.hash for task in data.tasks] if data.later else data.hash
    facts["max_length"] = config.max_length
    facts |= remembered(config)
    if data.train.aim is not None:
        facts["aim"] = data.train.aim.keys()
    return facts | {"train_data": config.model_dump(mode="json")["train_data"], "chat_template": tokenizer.chat_template}


def seed_everything(seed: int) -> None:
    """The global generators that models' own inits and dropouts use."""
    random.seed(seed)
    torch.manual_seed(seed)


def earlier(out: Path, config: TrainConfig, here: World) -> Result | None:
    """Look at `out` before anything is loaded: a finished run to be resumed is returned, another run's folder is refused."""
    record, mine = out / "run.json", config.identity()
    try:
        there = next(path for path in (out, *out.absolute().parents) if path.exists())
    except OSError as error:  # a name that is too long
        raise CheckpointError(f"cannot write to output_dir {out}: {error.strerror}") from None
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):  # made only when everything that the user typed has proved right
        raise CheckpointError(f"cannot write to output_dir {out}: {there} is {'not writable' if there.is_dir() else 'a file'}")
    known = record.exists()
    here.wait()  # every process has looked before one of them writes
    if not known:
        return None
    saved = json.loads(record.read_text(encoding="utf-8"))
    if not config.resume:
        raise BadParameter(f"{out} already holds a run; use --resume auto to continue it, or another --output-dir")
    differs = [k for k in mine if mine[k] != saved["config"].get(k)]
    if differs:
        k = differs[0]
        raise BadParameter(f"cannot resume {out}: {k} was {saved['config'].get(k)!r} and is now {mine[k]!r}; use the same configuration")
    torch.set_num_threads(saved["threads"])  # the number of threads decides the order of sums, and so the bits
    return read_result(out)


def same_start(out: Path, parts: Parts) -> None:
    """Raise BadParameter where `out` holds a run that began with another adapter or other rows, though they are called the same."""
    record, begun = out / "run.json", parts.begun
    known = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    if known.get("data_hash") not in (None, [task.hash for task in parts.data.tasks]):
        raise BadParameter(
            f"cannot resume {out}: {parts.config.train_data} does not hold the rows any more that the run began with; bring them back, "
            "or use another --output-dir"
        )
    saved = known.get("init_adapter")
    if saved is not None and begun is not None and saved != begun.facts():
        raise BadParameter(
            f"cannot resume {out}: {begun.folder} is not the adapter any more that the run began with; bring that one back, "
            "or use another --output-dir"
        )


def claim(out: Path, config: TrainConfig, here: World, parts: Parts) -> None:
    """Make `out` this run's folder, once everything that the user typed has proved right."""
    record = out / "run.json"
    if here.main and not record.exists():
        facts = {"config": config.identity(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        facts |= {} if parts.begun is None else {"init_adapter": parts.begun.facts()}
        facts |= started(parts.config, parts.adapted, parts.data, parts.held)
        partial = record.with_suffix(".partial")
        partial.write_text(json.dumps(facts, indent=1), encoding="utf-8")
        partial.replace(record)


def read_result(out: Path) -> Result | None:
    """The result of a finished run, or None."""
    file = out / "result.json"
    if not file.exists():
        return None
    saved = json.loads(file.read_text(encoding="utf-8"))
    figures = saved["steps"], saved["final"], saved["trainable_params"], saved["seconds"]
    return Result(out, *figures, saved["notes"], saved.get("tasks", []), saved.get("method", ""), saved.get("base", {}))


def _finish(
    parts: Parts, run: Run, out: Path, final: dict[str, float], seconds: float, report: Report | None, trackers: Trackers
) -> Result:
    adapted = parts.adapted
    adapted.meta |= {"metrics": final, "steps": run.at.step}
    result = Result(out, run.at.step, final, run.table.numel(), round(seconds, 2), adapted.notes, run.at.borders, parts.config.method)
    result = replace(result, notes=[*result.notes, *trackers.notes])
    if run.world.main:
        adapted.save(out / "adapter")
        rows = read_log(out / "metrics.jsonl")
        try:
            draw_curve(rows, out / "curve.png")
        except ImportError as error:
            result = replace(result, notes=[*result.notes, f"no curve drawn: {error}"])
    result, outcome = conclude(run, parts.tokenizer, parts.held, result)
    if report is not None:
        result.write()
        report.write(outcome)
    run.world.wait()
    return result
