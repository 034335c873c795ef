"""Every picture is written, also where a figure is missing; without matplotlib the extra is named."""

import builtins
from dataclasses import replace

import pytest
import torch

import lorakit
from lorakit.adapters.diagnose.amplification import amplifications
from lorakit.adapters.diagnose.distance import distance
from lorakit.adapters.diagnose.plot import amplification_plot, distance_map, overlap_map, spectra_plot
from lorakit.adapters.diagnose.spectrum import spectra
from lorakit.adapters.diagnose.subspace import overlaps
from tests.adapters.diagnose.subject import random_adapter
from tests.adapters.subject import shaken, tiny_model


def zeros(adapter):
    return replace(adapter, tensors={k: torch.zeros_like(t) for k, t in adapter.tensors.items()})


def real(seed=0, **kwargs):
    return shaken(tiny_model("llama"), "lora", seed=seed, **{"r": 2, **kwargs}).state()


DRAWN = {
    "two": lambda png: distance_map(distance({"a": real(1), "b_$x$": real(2)}), png),
    "zero": lambda png: distance_map(distance({"a": real(1), "zero": zeros(real(2))}), png),
    "twenty": lambda png: distance_map(distance({str(i): random_adapter({"x": (6, 5)}, seed=i) for i in range(20)}), png),
    "roles": lambda png: overlap_map(overlaps({"a": real(1), "b": real(2, rank_pattern={"q_proj": 3, "layers.0.mlp.up_proj": 4})}), png),
    "no roles": lambda png: overlap_map(overlaps({"a": zeros(real(1)), "b": real(2)}), png),
    "amplification": lambda png: amplification_plot(amplifications(real(), tiny_model("llama")), png),
    "no amplification": lambda png: amplification_plot(amplifications(zeros(real()), tiny_model("llama")), png),
    "spectra": lambda png: spectra_plot(spectra(real(), intruders=False), png),
    "intruders": lambda png: spectra_plot(spectra(real(alpha=64), tiny_model("llama")), png),
    "no spectra": lambda png: spectra_plot(spectra(zeros(real()), intruders=False), png),
}


@pytest.mark.parametrize("name", DRAWN)
def test_the_picture_is_written(name, tmp_path):
    png = DRAWN[name](tmp_path / "x.png")
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) > 5000


def test_more_weights_than_can_be_named(tmp_path):
    adapter = random_adapter({f"x.{i}.q": (6, 5) for i in range(40)})
    assert spectra_plot(spectra(adapter, intruders=False), tmp_path / "x.png").stat().st_size > 5000


@pytest.mark.parametrize("name", ["two", "spectra", "amplification", "roles"])
def test_without_matplotlib(name, tmp_path, monkeypatch):
    real_import = builtins.__import__

    def refuse(module, *args, **kwargs):
        if module.startswith("matplotlib"):
            raise ImportError(module)
        return real_import(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(lorakit.MissingExtra, match=r"lorakit\[plot\]"):
        DRAWN[name](tmp_path / "x.png")


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(lorakit.CheckpointError, match=r"cannot write the picture .*nowhere.*No such file"):
        DRAWN["spectra"](tmp_path / "nowhere" / "x.png")
