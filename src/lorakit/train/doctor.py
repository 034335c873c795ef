"""What a run would find here: versions, processors, memory, what is installed, which path it would take and why, and what is in its way.

Nothing is fetched. What decides in a run is asked, not described again: the device (`distributed.world`), the kernels (`ops.triton`), the
allocator. Transformers is not imported, so that the answer comes at once.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from lorakit.core.errors import LorakitError
from lorakit.data.cache_folder import cache_folder
from lorakit.ops import triton
from lorakit.train.allocator import keep_freed_memory

NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "accelerate", "numpy", "pyyaml", "pydantic", "typer", "rich", "jinja2")
EXTRAS: dict[str, tuple[str, str]] = {
    "matplotlib": ("plot", "curve.png, pictures of diagnose"),
    "datasets": ("data", "hf: data sets"),
    "pyarrow": ("data", "Parquet and Arrow files"),
    "sklearn": ("metrics", "F1 and correlations of classification"),
    "cma": ("search", "searches without gradients"),
    "scipy": ("search", "searches without gradients"),
    "tensorboard": ("track", "report_to tensorboard"),
    "wandb": ("track", "report_to wandb"),
    "gguf": ("gguf", "lorakit export --to gguf"),
    "triton": ("", "compiled layers and kernels on a GPU"),
}
"""Package: (the extra that brings it, what it is for)."""
ENVIRONMENT = (
    "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "LORAKIT_TRITON", "LORAKIT_DEBUG", "LORAKIT_CACHE",
    "LORAKIT_CACHE_GB",
    "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP", "WORLD_SIZE", "PYTORCH_CUDA_ALLOC_CONF", "CXX",
)  # fmt: skip
ROOM = 2 * 2**30
"""Bytes free below which a folder is too full for checkpoints of a small model."""


@dataclass(frozen=True)
class Problem:
    """What is wrong and what to do; `needed`: nothing trains before it is put right."""

    what: str
    do: str
    needed: bool = False


@dataclass(frozen=True)
class Findings:
    """Facts by title, and problems."""

    facts: dict[str, dict[str, str]]
    problems: list[Problem]


def examine(model: str | None = None) -> Findings:
    """Look at this machine, this installation and, if named, a model's folder."""
    problems: list[Problem] = []
    facts = {
        "versions": _versions(problems),
        "processor": _processor(problems),
        "accelerator": _accelerator(problems),
        "extras": _extras(),
        "what a run uses": _paths(problems),
        "folders": _folders(problems),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ} or {"(nothing that matters)": "is set"},
    }
    if model is not None:
        facts["model"] = _model(model, problems)
    return Findings(facts, problems)


def _versions(problems: list[Problem]) -> dict[str, str]:
    import lorakit

    found = {
        "lorakit": f"{lorakit.__version__} ({Path(lorakit.__file__).parent})",
        "Python": platform.python_version(),
        "system": platform.platform(),
    }
    for name in NEEDED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
            problems.append(Problem(f"{name} is not installed", f"pip install {name}", needed=True))
    for name, least in (("torch", (2, 13)), ("transformers", (5,))):
        if found[name] != "missing" and _release(found[name]) < least:
            wanted = ".".join(map(str, least))
            problems.append(Problem(f"{name} {found[name]} is older than {wanted}", f"pip install -U '{name}>={wanted}'", needed=True))
    return found


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def _processor(problems: list[Problem]) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    if threads < cores and "OMP_NUM_THREADS" in os.environ:
        problems.append(
            Problem(
                f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} leaves {cores - threads} of {cores} cores idle", "unset OMP_NUM_THREADS"
            )
        )
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    bf16 = [name for name in ("amx_bf16", "avx512_bf16", "bf16") if has.get(name)]
    facts = {
        "cores": f"{cores}, {threads} threads",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": ", ".join(bf16) if bf16 else "no instructions seen: float32 may be as fast",
    }
    total, free = memory()
    if total:
        facts["memory"] = f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} free"
        if free < 2**30:
            problems.append(
                Problem(
                    f"only {free / 2**20:.0f} MiB of memory are free", "close other programs, or train a smaller model with quantize: nf4"
                )
            )
    return facts


def memory() -> tuple[int, int]:
    """Bytes of memory in all and available, within the limits of a container; (0, 0) where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return 0, 0
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return total, free
    return min(total, limit), max(0, min(free, limit - used))


def _accelerator(problems: list[Problem]) -> dict[str, str]:
    if not torch.accelerator.is_available():
        asked = os.environ.get("CUDA_VISIBLE_DEVICES")
        built = torch.version.cuda or torch.version.hip
        if shutil.which("nvidia-smi") and not built:
            problems.append(
                Problem("there is a GPU, and this torch is built for processors alone", "install torch from pytorch.org with CUDA")
            )
        elif built and asked is not None and asked.strip() in ("", "-1"):
            problems.append(Problem(f"CUDA_VISIBLE_DEVICES={asked!r} hides every GPU", "unset CUDA_VISIBLE_DEVICES"))
        return {
            "device": "none: the processor is used"
            + (f" (torch is built for {'CUDA ' + torch.version.cuda if torch.version.cuda else built})" if built else "")
        }
    kind = torch.accelerator.current_accelerator()
    facts = {"device": f"{torch.accelerator.device_count()} × {kind}"}
    if kind is not None and kind.type == "cuda":
        for i in range(torch.cuda.device_count()):
            name, (free, total) = torch.cuda.get_device_name(i), torch.cuda.mem_get_info(i)
            facts[f"cuda:{i}"] = (
                f"{name}, {total / 2**30:.1f} GiB, {free / 2**30:.1f} free, bfloat16: {'yes' if torch.cuda.is_bf16_supported() else 'no'}"
            )
            if free < total / 10:
                problems.append(
                    Problem(
                        f"cuda:{i} has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free", "end what else uses it (nvidia-smi shows it)"
                    )
                )
    return facts


def _extras() -> dict[str, str]:
    found = {}
    for package, (extra, what) in EXTRAS.items():
        here = importlib.util.find_spec(package) is not None
        how = f": pip install 'lorakit[{extra}]'" if extra and not here else ""
        found[package] = f"{'installed' if here else 'missing' + how} ({what})"
    return found


def _paths(problems: list[Problem]) -> dict[str, str]:
    """Device, kernels, attention, compiling, allocator: asked of the functions that decide."""
    from lorakit.train.distributed import world

    if os.environ.get("WORLD_SIZE", "1") != "1":
        device = (
            torch.device("cpu") if not torch.accelerator.is_available() else torch.accelerator.current_accelerator() or torch.device("cpu")
        )
    else:
        device = world().device
    kernels = "Triton's" if triton.available(device, torch.bfloat16) else "torch's own operations"
    if device.type == "cuda" and not triton.available(device, torch.bfloat16):
        kernels += " (Triton is not installed)" if not triton.INSTALLED else " (LORAKIT_TRITON=1 switches Triton's on)"
    compiler = next((path for name in (os.environ.get("CXX"), "g++", "clang++") if name and (path := shutil.which(name))), None)
    if compiler is None:
        compiled = "never, since there is no C++ compiler"
        problems.append(Problem("there is no C++ compiler, so no layer is compiled", "install g++ or clang++ if runs are long"))
    elif device.type != "cpu" and not triton.INSTALLED:
        compiled = "never, since Triton is missing"
    else:
        compiled = f"where an estimate says that it pays; each run prints its own ({compiler})"
    return {
        "device": str(device),
        "low-rank products": kernels,
        "attention": "by segments, where a model has shown that nothing changes; else its own",
        "compiling": compiled,
        "freed memory": "kept by glibc's allocator" if keep_freed_memory() else "as the C library does it",
    }


def _folders(problems: list[Problem]) -> dict[str, str]:
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface").expanduser()
    places = {
        "here": Path.cwd(),
        "models": Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser(),
        "temporary": Path(tempfile.gettempdir()),
    }
    if (tokens := cache_folder()) is not None:
        places["tokens"] = tokens
    facts = {}
    for name, path in places.items():
        there = next(p for p in (path, *path.parents) if p.exists())
        free = shutil.disk_usage(there).free
        writable = os.access(there, os.W_OK)
        facts[name] = f"{path}, {free / 2**30:.1f} GiB free{'' if writable else ', not writable'}"
        if not writable:
            what = {"here": "runs cannot be written here", "models": "no model can be cached", "tokens": "tokens are not cached"}.get(
                name, "nothing can be spooled"
            )
            do = {"here": "give output_dir elsewhere", "models": "set HF_HOME", "tokens": "set LORAKIT_CACHE to a folder, or to off"}.get(
                name, "set TMPDIR"
            )
            problems.append(Problem(f"{path} is not writable: {what}", do, needed=name == "temporary"))
        elif free < ROOM:
            problems.append(Problem(f"{path} has {free / 2**30:.1f} GiB free", "remove old runs and models, or use another disk"))
    return facts


def _model(name: str, problems: list[Problem]) -> dict[str, str]:
    """A model's folder: its type, size, template and preset; a Hub name is only looked for in the cache."""
    from lorakit.train.config import BUNDLED

    folder = Path(__file__).parents[1] / "data" / "base" if name == BUNDLED else Path(os.path.expanduser(name))
    if not folder.is_dir():
        offline = os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True")
        cached = _cached(name)
        if cached is None:
            do = "unset HF_HUB_OFFLINE to fetch it, or give a folder" if offline else "it is fetched by the first run if it is a Hub name"
            problems.append(Problem(f"{name!r} is no folder and not in the cache of models", do, needed=offline))
            return {"folder": "none"}
        folder = cached
    facts = {"folder": str(folder)}
    try:
        from lorakit.train.model_facts import read_facts

        known = read_facts(folder)
    except LorakitError as error:
        problems.append(Problem(str(error).partition(";")[0], "give a folder that Transformers saved", needed=True))
        return facts
    weights = [file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin")]
    size = sum(file.stat().st_size for file in weights)
    facts |= {
        "type": known.model_type,
        "weights": f"{size / 2**30:.2f} GiB in {len(weights)} files",
        "chat template": "yes" if known.chat_template else "none: --preset auto brings one",
    }
    if not any(file.suffix == ".safetensors" for file in weights):
        kind = "only pickled weights" if weights else "no weights"
        problems.append(Problem(f"{folder} holds {kind}", "save the model as safetensors", needed=True))
    if not (folder / "tokenizer.json").exists() and not (folder / "tokenizer_config.json").exists():
        problems.append(Problem(f"{folder} holds no tokenizer", "save the tokenizer beside the model", needed=True))
    free = memory()[1]
    if free and size > free and not torch.accelerator.is_available():
        problems.append(
            Problem(f"its weights take {size / 2**30:.1f} GiB, and {free / 2**30:.1f} are free", "train a smaller model, or quantize: nf4")
        )
    return facts


def _cached(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name of the Hub's
        return None
    return Path(found).parent if isinstance(found, str) else None
