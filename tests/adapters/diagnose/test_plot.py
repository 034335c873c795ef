"""Every picture shows its figures, also where one is missing, and no label lies on another; without matplotlib the extra is named."""

import builtins
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

import lorakit
from lorakit.adapters import inspect
from lorakit.adapters.diagnose import plot
from lorakit.adapters.diagnose.amplification import amplifications
from lorakit.adapters.diagnose.distance import distance
from lorakit.adapters.diagnose.plot import LEGIBLE, amplification_plot, distance_map, drawable, overlap_map, spectra_plot
from lorakit.adapters.diagnose.spectrum import SHARE, spectra
from lorakit.adapters.diagnose.subspace import overlaps
from lorakit.adapters.inspect import inspect_adapter, spectrum_plot
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


# ---------------------------------------------------------------------------------------------------------------- what is to be seen
@pytest.fixture
def look(tmp_path, monkeypatch):
    """Draws, and gives the figure that was saved."""
    seen, real_saved = [], plot.saved
    for module in (plot, inspect):
        monkeypatch.setattr(module, "saved", lambda figure, png: seen.append(figure) or real_saved(figure, png))

    def drawn(draw):
        draw(tmp_path / "x.png")
        return seen.pop()

    return drawn


def written(axes):
    """What is written into the cells, row by row."""
    return [[t.get_text() for t in axes.texts if t.get_position()[1] == i] for i in range(len(axes.get_yticks()))]


def labels(figure):
    """Everything written that is not slanted, with the rectangle that it takes, in pixels."""
    figure.draw_without_rendering()
    texts = [*figure.texts, *(t for legend in figure.legends for t in legend.get_texts())]
    for axes in figure.axes:
        texts += [axes.title, *axes.texts, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()) if low <= tick.get_loc() <= high]
            texts += [label for tick in ticks for label in (tick.label1, tick.label2)]
    shown = [t for t in texts if t.get_visible() and t.get_text()]
    return [(t, t.get_window_extent()) for t in shown]


def test_the_heat_maps_show_the_matrices(look):
    found = distance({"a": real(1), "b": real(2), "c": zeros(real(3))})
    figure = look(lambda png: distance_map(found, png))
    cosine, overlap, conflict = figure.axes[:3]
    rows, columns = found.matrix("row_overlap"), found.matrix("column_overlap")
    expected = [found.matrix("cosine"), [[(rows if i <= j else columns)[i][j] for j in range(3)] for i in range(3)]]
    expected.append(found.matrix("sign_conflict"))
    assert rows[0][1] != columns[0][1]
    for axes, matrix in zip((cosine, overlap, conflict), expected, strict=True):
        numbers = np.array([[np.nan if v is None else v for v in row] for row in matrix])
        np.testing.assert_allclose(axes.images[0].get_array().filled(np.nan), numbers)
        assert written(axes) == [["-" if v is None else f"{v:.2f}" for v in row] for row in matrix]
        assert [t.get_text() for t in axes.get_xticklabels()] == [t.get_text() for t in axes.get_yticklabels()] == ["a", "b", "c"]
    assert [axes.images[0].get_clim() for axes in (cosine, overlap, conflict)] == [(-1, 1), (0, 1), (0, 1)]


def test_the_overlap_map_shows_the_mean_over_a_role_from_one_on(look):
    a, b = real(1, sites=["q_proj", "v_proj"]), real(2, sites=["q_proj", "v_proj"], rank_pattern={"layers.0.self_attn.q_proj": 3})
    found = overlaps({"a": a, "b": b})
    figure = look(lambda png: overlap_map(found, png))
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == [
        "q: 2 weights, by chance 0.078",  # the mean of 3/32 and 2/32
        "v: 2 weights, by chance 0.062",
    ]
    one, other = (np.array(s.grid) for s in found.sites if s.role == "q")
    image = figure.axes[0].images[0]
    np.testing.assert_allclose(image.get_array()[:, :2], (one[:, :2] + other) / 2)
    np.testing.assert_allclose(image.get_array()[:, 2], one[:, 2])
    assert (image.get_clim(), tuple(image.get_extent())) == ((0, 1), (0.5, 3.5, 2.5, 0.5))
    assert (figure.axes[0].get_xlim(), figure.axes[0].get_ylim()) == ((0.5, 3.5), (2.5, 0.5))
    assert figure._suptitle.get_text() == "φ(i, j), rows\ni: a\nj: b"
    nothing = look(lambda png: overlap_map(overlaps({"a": zeros(a), "b": b}), png))
    assert "no weight of which both" in nothing.axes[0].texts[0].get_text()


def test_the_amplification_plot_shows_every_factor_that_is_finite(look):
    found = amplifications(real(sites=["q_proj", "up_proj"]), tiny_model("llama"))
    sites = [replace(found.sites[0], along_update=0.0), replace(found.sites[1], rank=0), *found.sites[2:]]
    figure = look(lambda png: amplification_plot(replace(found, sites=sites), png))
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    for label, key in (("update's directions", "factor"), ("random directions", "factor_random"), ("W's strongest", "factor_weight")):
        points = [(i, s.factors[key]) for i, s in enumerate(sites) if i >= 2 or (i == 0 and key != "factor")]
        np.testing.assert_allclose(np.stack([lines[label].get_xdata(), lines[label].get_ydata()], 1), points)
    title = figure._suptitle.get_text().splitlines()
    assert title[1:] == ["no update: 1 of 4 weights", "an infinite factor (W does nothing along the update): 1 of 4 weights"]
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()][1] == "layers.0.mlp.up_proj"
    assert figure.axes[0].get_yscale() == "log"
    ticks = {t.get_text() for minor in (False, True) for t in figure.axes[0].get_yticklabels(minor=minor)}
    assert {"1", "2", "5", "10", "20"} <= ticks


def test_the_spectra_plot_shows_shares_and_intruders(look):
    found = spectra(real(alpha=64, sites=["q_proj"], rank_pattern={"layers.0.self_attn.q_proj": 1}), tiny_model("llama"))
    figure = look(lambda png: spectra_plot(found, png))
    left, right = figure.axes
    for line, s in zip(left.lines, found.sites, strict=False):
        squares = np.square(s.singular_values)
        np.testing.assert_allclose(line.get_ydata(), np.cumsum(squares) / squares.sum())
        assert line.get_marker() == "."  # a line of one point is none
    assert [len(line.get_xdata()) for line in left.lines[:2]] == [1, 2]
    assert [bar.get_height() for bar in right.patches] == [s.figures["intruders"] for s in found.sites]
    assert sum(bar.get_height() for bar in right.patches) > 0
    assert right.get_ylim() == (0, 10)
    assert right.get_title() == f"{sum(bar.get_height() for bar in right.patches):.0f} in all, among the 10 strongest directions of each"
    assert left.lines[-1].get_ydata() == [SHARE, SHARE]
    spectrum = look(lambda png: spectrum_plot(inspect_adapter(real(r=1, sites=["q_proj"])), png))
    assert [line.get_marker() for line in spectrum.axes[0].lines] == [".", "."]
    assert [k for k in spectrum.axes[0].get_xticks() if 0.5 <= k <= 1.5] == [1]
    assert spectrum.axes[0].get_xlim() == (0.5, 1.5)


LONG = "/a/folder-of/somebody/who/likes/long/names/" * 5


def scarce(where=("q_proj",), **kwargs):
    return real(sites=list(where), **kwargs)


CROWDED = {
    "names": lambda png: distance_map(distance({f"runs/task_{i}/adapter": scarce(seed=i) for i in range(12)}), png),
    "phi": lambda png: overlap_map(overlaps({LONG[:90]: scarce(seed=1), LONG[1:90]: scarce(seed=2)}), png),
    "panels": lambda png: overlap_map(overlaps({"a": real(1), "b": real(2)}), png),
    "factors": lambda png: amplification_plot(amplifications(real(), tiny_model("llama"), name=LONG), png),
    "shares": lambda png: spectra_plot(spectra(real(), tiny_model("llama"), name=LONG), png),
}


@pytest.mark.parametrize("name", CROWDED)
def test_no_label_lies_on_another_or_beyond_the_picture(name, look):
    figure = look(CROWDED[name])
    found = labels(figure)
    assert len(found) > 10
    outside = [t.get_text() for t, box in found if box.x0 < -2 or box.y0 < -2 or box.x1 > figure.bbox.x1 + 2 or box.y1 > figure.bbox.y1 + 2]
    assert outside == []
    level = [(t, box) for t, box in found if t.get_rotation() % 90 == 0]
    pairs = [(one.get_text(), other.get_text()) for (one, a), (other, b) in combinations(level, 2) if _overlap(a, b)]
    assert pairs == []


def _overlap(a, b):
    """By more than a pixel each way."""
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1


@pytest.mark.parametrize("more", [0, 1])
def test_as_many_weights_are_named_as_fit(more, look):
    found = amplifications(scarce(), tiny_model("llama"))
    many = replace(found, sites=[replace(found.sites[0], name=f"model.layers.{i}.self_attn.q_proj") for i in range(LEGIBLE + more)])
    figure = look(lambda png: amplification_plot(many, png))
    assert (figure.axes[0].get_xlabel() != "") == bool(more)
    boxes = [box for t, box in labels(figure) if "q_proj" in t.get_text()]
    assert len(boxes) == (0 if more else LEGIBLE)
    assert not any(_overlap(a, b) for a, b in pairwise(boxes))


@pytest.mark.parametrize("draw", [drawable, *(DRAWN[name] for name in ("two", "spectra", "amplification", "roles"))])
def test_without_matplotlib(draw, tmp_path, monkeypatch):
    real_import = builtins.__import__

    def refuse(module, *args, **kwargs):
        if module.startswith("matplotlib"):
            raise ImportError(module)
        return real_import(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(lorakit.MissingExtra, match=r"lorakit\[plot\]"):
        draw(tmp_path / "x.png")


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(lorakit.CheckpointError, match=r"cannot write the picture .*nowhere.*No such file"):
        DRAWN["spectra"](tmp_path / "nowhere" / "x.png")
    with pytest.raises(lorakit.CheckpointError, match=r"cannot write the picture .*x.png: there is no folder .*nowhere$"):
        drawable(tmp_path / "nowhere" / "x.png")
    with pytest.raises(lorakit.CheckpointError, match="it is a folder"):
        drawable(tmp_path)
    drawable(tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
