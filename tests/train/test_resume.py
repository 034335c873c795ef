"""Resume is exact: kill -9 at any moment, run the same command with --resume auto, and the adapter's bytes are those of the
uninterrupted run."""

import random
import signal
import time
from pathlib import Path

import pytest

from lorakit.core.errors import BadParameter
from lorakit.train.checkpoint import checkpoints
from lorakit.train.train import train
from tests.train.runs import command, config, finish, start, stopped

KEYS = {
    "lora": {"dropout": 0.1},
    "adalora": {"r": 4, "target_r": 2, "tfinal": 5, "delta_t": 2},
    "dora": {"dropout": 0.1},
    "loraplus": {"ratio": 4.0},
    "riemannian": {"dropout": 0.1},
    "sora": {"xi": 0.05, "stages": 3},
    "dylora": {"r": 4, "dropout": 0.1},
    "relora": {"period": 3, "warmup": 1},
    "increlora": {"target_r": 4, "add": 2, "ramp": 2},
    "bilora": {},
    "dfo_lora": {"population": 4, "d": 8},
    "flora_gc": {"r": 4, "kappa": 3, "beta1": 0.5, "accumulate": True, "gradient_accumulation_steps": 2},
}


def adapter_bytes(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((out / "adapter").iterdir())}


@pytest.mark.parametrize("method", sorted(KEYS))
def test_a_run_cut_in_two_ends_with_the_same_bytes(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process: stop by an exception between two steps, then resume. Model dropout, evaluation and best checkpoint included."""
    from lorakit.train.run import Run

    keys = {
        "method": method,
        "max_steps": 11,
        "save_steps": 3,
        "eval_steps": 4,
        "load_best_model_at_end": True,
        "warmup_steps": 2,
        **KEYS[method],
    }
    whole = config(tmp_path, output_dir=str(tmp_path / "whole"), **keys)
    train(whole, quiet=True)
    real = Run._step

    def dies(self: Run, progress: object) -> dict:
        if self.at.step == 8:
            raise KeyboardInterrupt
        return real(self, progress)  # type: ignore[arg-type]

    monkeypatch.setattr(Run, "_step", dies)
    cut = config(tmp_path, output_dir=str(tmp_path / "cut"), **keys)
    with pytest.raises(KeyboardInterrupt):
        train(cut, quiet=True)
    monkeypatch.setattr(Run, "_step", real)
    train(config(tmp_path, output_dir=str(tmp_path / "cut"), resume="auto", **keys), quiet=True)
    assert adapter_bytes(tmp_path / "whole") == adapter_bytes(tmp_path / "cut")
    assert steps_and_losses(tmp_path / "whole") == steps_and_losses(tmp_path / "cut")


@pytest.mark.parametrize("method", ["relora", "increlora"])
def test_the_best_step_is_taken_back_when_the_adapter_has_grown_since(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its legs, or its ranks, were fewer then; the base gives back the legs that it holds."""
    from lorakit.adapters.io import load_adapter
    from lorakit.train.run import Run

    keys = {"method": method, "max_steps": 11, "save_steps": 0, "eval_steps": 4, "load_best_model_at_end": True, **KEYS[method]}
    real, seen = Run.evaluate, list[tuple[int, float]]()

    def worse_and_worse(self: Run, task: object = None) -> dict[str, float]:
        found = real(self)
        seen.append((self.at.step, found["loss"]))
        return found | {"loss": float(self.at.step)}

    monkeypatch.setattr(Run, "evaluate", worse_and_worse)
    train(config(tmp_path, output_dir=str(tmp_path / "out"), **keys), quiet=True)
    kept, best = (load_adapter(tmp_path / "out" / name).tensors for name in ("adapter", "best"))
    name = next(k for k in kept if k.endswith(".A0" if method == "relora" else ".A"))
    assert len(kept[name]) == len(best[name]) - (2 if method == "increlora" else 0), "without its reserves"
    if method == "relora":
        assert all((kept[k] == best[k]).all() for k in kept)
    (first, at_best), *_, (last, at_end), _ = seen  # the last one is the base alone, for the report
    assert (first, last) == (4, 11)
    assert abs(at_end - at_best) < 1e-3


def steps_and_losses(out: Path) -> list[tuple]:
    import json

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r.get("loss"), r.get("eval_loss"), r.get("grad_norm")) for r in rows]


def test_a_forgotten_generator_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: a resume that restores everything but the data position ends elsewhere."""
    from lorakit.data.sampler import Batches
    from lorakit.train.run import Run

    keys = {"max_steps": 8, "save_steps": 3}
    train(config(tmp_path, output_dir=str(tmp_path / "whole"), **keys), quiet=True)
    real = Run._step
    monkeypatch.setattr(Run, "_step", lambda self, p: real(self, p) if self.at.step < 4 else (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path, output_dir=str(tmp_path / "cut"), **keys), quiet=True)
    monkeypatch.setattr(Run, "_step", real)
    monkeypatch.setattr(Batches, "load_state_dict", lambda self, state: None)
    train(config(tmp_path, output_dir=str(tmp_path / "cut"), resume="auto", **keys), quiet=True)
    assert adapter_bytes(tmp_path / "whole") != adapter_bytes(tmp_path / "cut")


def kill_and_resume(tmp: Path, kills: int, seed: int) -> int:
    """Kill -9 `kills` times at random moments of the run's life, then finish. Returns how many kills hit a living run."""
    draw, hit = random.Random(seed), 0
    keys = {"max_steps": 150, "save_steps": 7, "dropout": 0.1, "eval_steps": 20, "method": "lora", "save_total_limit": 1}
    whole = config(tmp, output_dir=str(tmp / "whole"), **keys)
    finish(start(command(whole)))
    cut = config(tmp, output_dir=str(tmp / "cut"), resume="auto", **keys)
    out = tmp / "cut"
    for _ in range(kills):
        before = [p.name for p in checkpoints(out)]
        process = start(command(cut))
        deadline = time.time() + 120
        while process.poll() is None and time.time() < deadline and [p.name for p in checkpoints(out)] == before:
            time.sleep(0.005)  # until it has made progress, so that the chain of kills ends
        time.sleep(draw.uniform(0, 0.25))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            hit += 1
        process.communicate()
    finish(start(command(cut)))
    assert adapter_bytes(tmp / "whole") == adapter_bytes(out)
    assert not list(out.glob("*.partial"))
    return hit


@pytest.mark.slow
def test_ten_random_kills(tmp_path: Path) -> None:
    assert kill_and_resume(tmp_path, kills=10, seed=0) >= 5


def test_one_random_kill(tmp_path: Path) -> None:
    assert kill_and_resume(tmp_path, kills=1, seed=1) == 1


def test_other_rows_under_the_same_name_are_no_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [f'{{"text": "some words {i}"}}\n' for i in range(30)]
    data.write_text("".join(rows))
    settings = config(tmp_path, train_data=str(data), max_steps=3, save_steps=1)
    stopped(settings, 2, monkeypatch)
    again = settings.model_copy(update={"resume": "auto"})
    data.write_text("".join(rows).replace("some", "many"))
    with pytest.raises(BadParameter, match="does not hold the rows any more that the run began with"):
        train(again, quiet=True)
    data.write_text("".join(rows))
    assert train(again, quiet=True).steps == 3
