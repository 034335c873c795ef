"""DPO and KTO in whole runs: compiled, quantized, in sequence, in two processes, from an adapter; with penalties, patches and resuming."""

from pathlib import Path
from typing import Any

import pytest
from torch._dynamo.backends.registry import lookup_backend

from lorakit import Adapted, get_method
from lorakit.core.attach import attach
from lorakit.train import compile as compile_module
from lorakit.train.compile import CompiledLayers, compile_layers
from lorakit.train.train import train
from tests.laws.subject import awaken, base
from tests.train.test_preference import LN2, TOKENIZER, rows, settings

EAGERLY = lookup_backend("aot_eager")
FIRST = {"dpo": LN2, "kto": 0.5}
both = pytest.mark.parametrize("kind", sorted(FIRST))


def made(tmp: Path, kind: str, **keys: Any) -> Any:
    return settings(tmp, kto=kind == "kto", **({"save_steps": 0} | keys))


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in rows(out) if "loss" in row]


def awake(**keys: Any) -> Adapted:
    return awaken(attach(base(vocab_size=len(TOKENIZER)), get_method("lora", r=4, **keys)), size=0.2)


# --- compiled ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> list[CompiledLayers]:
    """What runs compile."""
    found: list[CompiledLayers] = []

    def keep(*args: Any, **keys: Any) -> CompiledLayers:
        found.append(compile_layers(*args, **keys))
        return found[-1]

    monkeypatch.setattr("lorakit.train.train.compile_layers", keep)
    return found


def check_compiled(tmp: Path, kind: str, layers: list[CompiledLayers], **keys: Any) -> None:
    """It starts at the same bits, and trains as eager layers do; nothing is compiled later than in the first steps."""
    keys = {"max_steps": 6, "learning_rate": 2e-2} | keys
    for on in (False, True):
        train(made(tmp, kind, output_dir=str(tmp / str(on)), torch_compile=on, **keys), quiet=True)
    eager, compiled = (losses(tmp / str(on)) for on in (False, True))
    assert compiled[0] == FIRST[kind]
    assert compiled == pytest.approx(eager, abs=2e-2 if "dtype" in keys else 2e-4)
    assert abs(compiled[-1] - compiled[0]) > 1e-3, "nothing was learned: the test shows nothing"
    assert layers[-1].notes == []


@both
def test_compiled_runs_start_at_the_same_bits_and_train_as_eager(
    tmp_path: Path, kind: str, layers: list[CompiledLayers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_module, "inductor", EAGERLY)
    check_compiled(tmp_path, kind, layers)
    assert layers[-1].graphs == 3, "the reference's; the first layer's, and the others' with an adapter"
