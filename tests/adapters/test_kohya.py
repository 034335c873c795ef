"""Files of kohya's and LyCORIS's, module by module.

The fixtures in lycoris/ were written by the real lycoris-lora 4.1.3, which also computed what its own modules add to each weight;
lycoris/make.py says how. lycoris need not be installed.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lorakit
from lorakit.adapters import kohya
from lorakit.adapters.kohya import read_modules
from lorakit.adapters.kohya_names import Places
from tests.adapters.lycoris.make import HERE, base, clip

NAMES = sorted(path.name.split(".")[0] for path in HERE.glob("*.delta.safetensors"))
DORA = ("dora", "dora_columns", "loha_dora")


def dense(change: kohya.Change | None) -> Tensor:
    assert change is not None
    return change.double() if isinstance(change, Tensor) else change.s * change.B.double() @ change.A.double()


def own_weight(name: str, module: str) -> Tensor | None:
    """W of a fixture's module."""
    if name.startswith("conv"):
        return None
    model = clip() if name == "clip" else base(name)
    return model.get_submodule(Places(model).path(module)).weight.detach()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DORA])
def test_every_change_is_the_one_that_lycoris_computes(name: str) -> None:
    wanted = load_file(HERE / f"{name}.delta.safetensors")
    seen = 0
    for module in read_modules(HERE / f"{name}.safetensors"):
        if module.algo != "norm":
            delta = wanted[f"{module.name}.weight"].flatten(1).double()
            found = dense(module.change(own_weight(name, module.name)))
            assert (found - delta).norm() <= 1e-6 * delta.norm() + 1e-6, module.name
            seen += 1
        for key, vector in module.vectors.items():
            torch.testing.assert_close(vector, wanted[f"{module.name}.{key}"])
    assert seen >= 2


def test_low_rank_changes_stay_low_rank() -> None:
    ranks = {
        name: {kohya.rank_of(change) for m in read_modules(HERE / f"{name}.safetensors") if (change := m.change()) is not None}
        for name in ("locon", "loha", "lokr_both", "conv_tucker_locon")
    }  # fmt: skip
    assert ranks == {"locon": {2}, "loha": {4}, "lokr_both": {1}, "conv_tucker_locon": {2}}


def test_ia3_by_columns() -> None:
    W, w = torch.randn(4, 6), torch.randn(6)
    module = kohya.Trained("lycoris_x", "ia3", {"weight": w, "on_input": torch.tensor(1.0)})
    torch.testing.assert_close(dense(module.change(W)), (W * w).double(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("name", "said"), [("oft", "OFT or BOFT"), ("boft", "OFT or BOFT"), ("tlora", "T-LoRA")])
def test_what_cannot_be_is_refused_by_name(name: str, said: str) -> None:
    with pytest.raises(lorakit.NotExportable, match=said):
        read_modules(HERE / f"{name}.safetensors")


def written(tmp_path: Path, **changed: Tensor | None) -> Path:
    """A LoRA of one module, with some tensors changed; None leaves one out."""
    whole = {"lora_up.weight": torch.randn(8, 2), "lora_down.weight": torch.randn(2, 6), "alpha": torch.tensor(1.0), **changed}
    save_file({f"lora_te_x.{key}": t for key, t in whole.items() if t is not None}, tmp_path / "f.safetensors")
    return tmp_path / "f.safetensors"


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (0.0, 1.0), (1.0, 0.5), (4.0, 2.0)])
def test_alpha_over_r_and_none_is_r(tmp_path: Path, alpha: float | None, scale: float) -> None:
    [module] = read_modules(written(tmp_path, alpha=None if alpha is None else torch.tensor([alpha])))
    assert module.scale(2) == scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_every_kind_of_number_becomes_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    up = torch.randn(8, 2).to(dtype)
    [module] = read_modules(written(tmp_path, **{"lora_up.weight": up}))
    assert module.tensors["lora_up.weight"].dtype == torch.float32
    assert torch.equal(module.tensors["lora_up.weight"], up.float())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lora_up.weight": None}, "lora_te_x (lora) has no lora_up.weight: it was not copied whole"),
        ({"lora_up.weight": None, "lora_down.weight": None}, "there is only alpha"),
        ({"lora_up.weight": torch.ones(8, 3)}, "do not fit each other (3 against 2): alpha [], lora_down.weight [2, 6], lora_up"),
        ({"lora_up.weight": torch.ones(8, 1)}, "do not fit each other"),
        ({"lora_down.weight": torch.ones(2, 0)}, "which no module's has"),
        ({"lora_up.weight": torch.tensor(1.0)}, "lora_up.weight has shape [], which no module's has"),
        ({"lora_mid.weight": torch.ones(2, 1, 3, 3)}, "do not fit each other"),
        ({"lora_up.weight": torch.full((8, 2), torch.nan)}, "NaN or infinite"),
        ({"alpha": torch.tensor(torch.nan)}, "NaN or infinite"),
        ({"alpha": torch.ones(3)}, "expected a single number"),
        ({"hada_w1_a": torch.ones(8, 2)}, "has a tensor 'hada_w1_a' that does not belong to it"),
        ({"weird": torch.ones(1)}, "no file of kohya's or LyCORIS's"),
        ({"lora_A.weight": torch.ones(2, 6)}, "is read by giving its folder"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, changed: dict[str, Tensor | None], said: str) -> None:
    path = written(tmp_path, **changed)
    with pytest.raises(lorakit.LorakitError, match=re.escape(said)) as caught:
        [module.change() for module in read_modules(path)]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../../x", "a b", "\x1b[31m", "x" * 600, ""])
def test_a_name_that_is_none(tmp_path: Path, name: str) -> None:
    save_file({f"{name}.lora_up.weight": torch.ones(2, 2)}, tmp_path / "f.safetensors")
    with pytest.raises(lorakit.CheckpointError, match="no file of kohya's or LyCORIS's"):
        read_modules(tmp_path / "f.safetensors")


@pytest.mark.parametrize(
    ("shapes", "values"),
    [
        ({"lokr_w1": (40, 1), "lokr_w2": (40, 1)}, 1600),  # as wide as the matrix itself
        ({"lokr_w1": (8, 8), "lokr_w2_a": (40, 1), "lokr_w2_b": (1, 40)}, 8 * 640),
        ({"hada_w1_a": (40, 9), "hada_w1_b": (9, 40), "hada_w2_a": (40, 9), "hada_w2_b": (9, 40)}, 1600),
        ({"hada_w1_a": (40, 4), "hada_w1_b": (4, 40), "hada_w2_a": (40, 4), "hada_w2_b": (4, 40)}, 1280),
        ({"lora_up.weight": (20, 5), "lora_down.weight": (5, 40), "lora_mid.weight": (5, 5, 3, 3)}, 1900),
    ],
)
def test_small_tensors_that_would_make_a_huge_matrix(
    shapes: dict[str, tuple[int, ...]], values: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({f"lora_te_x.{key}": torch.ones(shape) for key, shape in shapes.items()}, tmp_path / "f.safetensors")
    [module] = read_modules(tmp_path / "f.safetensors")
    assert kohya.VALUES_LIMIT == 2**30
    monkeypatch.setattr(kohya, "VALUES_LIMIT", values)
    assert module.change() is not None
    monkeypatch.setattr(kohya, "VALUES_LIMIT", values - 1)
    with pytest.raises(lorakit.AdapterMismatch, match=f"would have {values} values"):
        module.change()


@pytest.mark.parametrize("twice", ["lokr_w2_a", "lokr_w2_b", "lokr_t2"])
def test_a_factor_that_is_there_twice_is_not_chosen_from(tmp_path: Path, twice: str) -> None:
    tensors = {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(3, 3), "alpha": torch.tensor(1.0), twice: torch.ones(3, 3, 1, 1)}
    save_file({f"lora_te_x.{key}": t for key, t in tensors.items()}, tmp_path / "f.safetensors")
    [module] = read_modules(tmp_path / "f.safetensors")
    with pytest.raises(lorakit.AdapterMismatch, match=f"lokr_w2 is there whole, and as a product with {twice}"):
        module.change()


def test_no_pickle_and_no_half_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(lorakit.CheckpointError, match="is a pickle"):
        read_modules(tmp_path / "x.pt")
    data = (HERE / "locon.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(data[:-10])
    with pytest.raises(lorakit.CheckpointError, match="is damaged or cut off"):
        read_modules(tmp_path / "half.safetensors")
    header = json.dumps({"lora_te_x.alpha": {"dtype": "F4", "shape": [], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(lorakit.CheckpointError, match=r"dtype 'F4'; expected one of .*F8_E4M3"):
        read_modules(tmp_path / "odd.safetensors")


def test_only_a_prefix(tmp_path: Path) -> None:
    lora = {"lora_up.weight": torch.ones(2, 1), "lora_down.weight": torch.ones(1, 2)}
    save_file({f"{name}.{key}": t.clone() for name in ("lora_te1_x", "lora_te2_x") for key, t in lora.items()}, tmp_path / "f.safetensors")
    assert [m.name for m in read_modules(tmp_path / "f.safetensors", only="lora_te2")] == ["lora_te2_x"]
    with pytest.raises(lorakit.CheckpointError, match="begins with 'lora_te3'; they begin with lora_te1, lora_te2"):
        read_modules(tmp_path / "f.safetensors", only="lora_te3")
