"""Two gloo processes, started by Accelerate's launcher: DDP's role and FSDP2 end where one process ends."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from lorakit.adapters.io import load_adapter
from tests.train.runs import command, config, finish, start

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
FLAGS = {
    "replicated": ["--multi_gpu"],
    "sharded": ["--use_fsdp", "--fsdp_version", "2"],
}  # the names say GPU; ACCELERATE_USE_CPU makes it gloo


def launched(words: list[str], port: int, kind: str) -> list[str]:
    return [*LAUNCH, *FLAGS[kind], "--main_process_port", str(port), "--dynamo_backend", "no", "-m", *words[2:]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(FLAGS))
@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "eva", "lora_ga", "bilora", "dfo_lora"])
def test_two_processes_end_where_one_ends(tmp_path: Path, kind: str, method: str) -> None:
    odd = tmp_path / "three.jsonl"  # three windows for two processes: one has more batches than the other
    odd.write_text("".join(json.dumps({"text": f"held out {i} " + "abc de " * 6}) + "\n" for i in range(3)))
    keys = {
        "method": method,
        "eval_data": str(odd),
        "per_device_eval_batch_size": 1,
        "max_steps": 4,
        "eval_steps": 2,
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-3,
    }
    finish(start(command(config(tmp_path, output_dir=str(tmp_path / "one"), per_device_train_batch_size=4, **keys))))
    two = command(config(tmp_path, output_dir=str(tmp_path / "two"), **keys))
    port = 20000 + os.getpid() % 20000
    finish(start(launched(two, port, kind), ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES=""))
    one, both = (load_adapter(tmp_path / name / "adapter") for name in ("one", "two"))
    worst = max(float((one.tensors[k] - both.tensors[k]).abs().max()) for k in one.tensors)
    assert worst < 2e-5
    assert one.meta["metrics"]["loss"] == pytest.approx(both.meta["metrics"]["loss"], abs=1e-4)
    assert any(t.abs().max() > 0 for k, t in both.tensors.items() if k.endswith(".B"))
    assert torch.tensor(worst).isfinite()


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(FLAGS))
def test_tasks_in_sequence_end_where_one_process_ends(tmp_path: Path, kind: str) -> None:
    """Each process sees its share of a task's batches, and both remember the same directions."""
    tasks = []
    for name, words in (("one", "abc de "), ("two", "XYZ 12 ")):
        tasks.append(tmp_path / f"{name}.jsonl")
        tasks[-1].write_text("".join(json.dumps({"text": f"{name} {i} " + words * (1 + 7 * i % 23)}) + "\n" for i in range(30)))
    keys = {"method": "inflora", "sites": "attention", "max_steps": 6, "lr_scheduler_type": "constant", "learning_rate": 1e-3}
    keys |= {"train_data": "TASKS", "save_steps": 0, "seed": 3}

    def words(settings: object) -> list[str]:
        flags = command(settings)  # type: ignore[arg-type]
        at = flags.index("--train-data")
        return [*flags[:at], "--train-data", str(tasks[0]), "--train-data", str(tasks[1]), *flags[at + 2 :]]

    finish(start(words(config(tmp_path, output_dir=str(tmp_path / "one"), per_device_train_batch_size=4, **keys))))
    port = 20000 + (os.getpid() + 7) % 20000
    both = words(config(tmp_path, output_dir=str(tmp_path / "two"), **keys))
    finish(start(launched(both, port, kind), ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES=""))
    alone, together = (json.loads((tmp_path / name / "result.json").read_text())["tasks"] for name in ("one", "two"))
    for before, after in zip(alone, together, strict=True):
        assert [f["loss"] for f in before] == pytest.approx([f["loss"] for f in after], abs=2e-4)
    assert abs(alone[1][0]["loss"] - alone[0][0]["loss"]) > 1e-5, "the second task changed nothing: the test shows nothing"


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(FLAGS))
def test_preferences_in_two_processes_end_where_one_ends(tmp_path: Path, kind: str) -> None:
    rows = [{"prompt": f"ask {i} ", "chosen": "yes" * (1 + i % 3), "rejected": "no " * (1 + i % 5)} for i in range(30)]
    (tmp_path / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"train_data": str(tmp_path / "prefs.jsonl"), "max_steps": 4, "learning_rate": 1e-3, "save_steps": 0, "logging_steps": 1}
    finish(start(command(config(tmp_path, output_dir=str(tmp_path / "one"), per_device_train_batch_size=4, **keys))))
    port = 20000 + (os.getpid() + 13) % 20000
    both = command(config(tmp_path, output_dir=str(tmp_path / "two"), **keys))
    finish(start(launched(both, port, kind), ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES=""))
    alone, together = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("one", "two")
    )
    assert alone[0]["loss"] == together[0]["loss"] == torch.tensor(2.0).log().item()
    for before, after in zip(alone, together, strict=True):
        for key in ("loss", "margin", "reward_chosen", "eval_loss", "eval_margin"):
            assert after.get(key) == pytest.approx(before.get(key), abs=2e-4)
