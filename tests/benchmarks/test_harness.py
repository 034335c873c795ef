"""The benchmarks' common ground: what is counted is counted right. Nothing here depends on how fast anything is."""

import json
import math
import re

import pytest
import torch
from torch import nn

from benchmarks import harness
from benchmarks.harness import Paired, Target
from lorakit.cli import results
from lorakit.train.allocator import keep_freed_memory


# ------------------------------------------------------------------------------------------------------------------ intervals
@pytest.mark.parametrize("n", [6, 7, 10, 29, 30, 31, 100])
def test_the_interval_covers_and_no_narrower_one_does(n):
    """Below the k-th of n sorted values (from 0) the median lies with probability Σ_{i ≤ k} C(n, i) / 2ⁿ."""

    def coverage(k):
        return 1 - 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n

    k = harness.rank(n)
    assert coverage(k) >= 0.95 > coverage(k + 1)


def test_thirty_rounds_give_the_tenth_and_the_twenty_first():
    found = Paired.of([float(i) for i in range(1, 31)], [1.0] * 30)
    assert found == Paired(15.5, 10.0, 21.0, 30)


def test_few_rounds_give_their_range():
    assert Paired.of([3.0, 1.0, 2.0], [1.0, 1.0, 1.0]) == Paired(2.0, 1.0, 3.0, 3)


def test_ratios_are_paired_by_round():
    """A machine that is twice as slow in some rounds changes no ratio."""
    assert Paired.of([2.0, 4.0, 2.0], [1.0, 2.0, 1.0]).as_list() == [2.0, 2.0, 2.0]


def test_rounds_rotate_and_everybody_runs_in_each():
    calls = []
    seconds = harness.interleave({name: lambda name=name: calls.append(name) for name in "abcd"}, 8, warmup=1)
    rounds = [calls[i : i + 4] for i in range(0, len(calls), 4)]
    assert len(rounds) == 9
    assert all(sorted(order) == list("abcd") for order in rounds)
    assert all(len(values) == 8 for values in seconds.values())
    assert {order[0] for order in rounds[1:]} == {order[-1] for order in rounds[1:]} == set("abcd"), (
        "everybody comes first in some round, and last in another"
    )
    followers = {name: {order[i + 1] for order in rounds for i in range(3) if order[i] == name} for name in "abcd"}
    assert all(len(found) > 1 for found in followers.values()), "nobody always follows the same neighbor"


# --------------------------------------------------------------------------------------------------------------------- memory
class Stash(torch.autograd.Function):
    """Saves nothing the usual way, and keeps x on its ctx."""

    @staticmethod
    def forward(ctx, x):
        ctx.mine = {"x": (x * 2,)}
        return x.sum()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.ones_like(ctx.mine["x"][0])


def test_saved_by_autograd_is_counted_once_and_parameters_are_not():
    layer, x = nn.Linear(8, 8, bias=False), torch.randn(16, 8)
    y = x.clone()
    assert harness.saved_bytes(layer, lambda: layer(y).sum()) == 16 * 8 * 4
    assert harness.saved_bytes(layer, lambda: (layer(y) + layer(y[:, :8])).sum()) == 16 * 8 * 4
    assert harness.saved_bytes(layer, lambda: layer(y).sum(), besides=[y]) == 0
    assert harness.saved_bytes(layer, lambda: (layer.weight[:4] * y[:4]).sum(), besides=[y]) == 0, "a view is its parameter's storage"


def test_what_a_function_keeps_on_its_ctx_is_counted():
    x = torch.randn(32, 4, requires_grad=True)
    assert harness.saved_bytes(nn.Identity(), lambda: Stash.apply(x)) == 32 * 4 * 4


@pytest.mark.parametrize("work", ["sixty_four_megabytes", "sixty_four_megabytes_again"])
def test_a_peak_is_measured_in_a_fresh_process(work):
    rise = harness.fresh("tests.benchmarks.test_harness", work)
    assert 60e6 < rise < 90e6


def sixty_four_megabytes():
    """Runs in the child."""
    return harness.peak_rise(lambda: torch.ones(2**24).sum())


def sixty_four_megabytes_again():
    """Runs in the child: the allocator still has what is needed."""
    keep_freed_memory()
    pieces = [torch.ones(2**18) for _ in range(64)]
    del pieces
    return harness.peak_rise(lambda: [torch.ones(2**18) for _ in range(64)])


def test_a_failing_child_says_why():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        harness.fresh("tests.benchmarks.test_harness", "fail")


def fail():
    """Runs in the child."""
    return 1 / 0


# ---------------------------------------------------------------------------------------------------------------------- files
def test_targets_are_judged_by_their_figure():
    assert Target.at_most("a", 2.0, Paired(1.9, 1.0, 3.0, 30)).reached is True
    assert Target.at_most("a", 2.0, 2.1).reached is False
    assert Target.at_least("a", 2.0, 2.1).reached is True
    assert Target.at_least("a", 2.0, Paired(1.9, 1.0, 3.0, 30)).interval == (1.0, 3.0)
    missing = Target.at_least("a", 2.0, None)
    assert missing.reached is None
    assert missing.why


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    found = harness.result("some_thing", {"rounds": 3, "json": tmp_path}, [{"cell": "x", "s": 1.5}], [Target.at_most("a", 2.0, 1.0)])
    path = harness.write(found, tmp_path / "r.json")
    assert json.loads(path.read_text())["rows"] == [{"cell": "x", "s": 1.5}]
    with pytest.raises(TypeError):
        harness.write(found | {"rows": [object()]}, path)
    assert json.loads(path.read_text())["rows"] == [{"cell": "x", "s": 1.5}]
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({"cpu": "Intel(R) Xeon(R) Processor", "flags": ["avx2", "avx512f", "amx_bf16"], "threads": 2}, "intel-xeon-amx-2-threads"),
        ({"cpu": "AMD EPYC 7B13 64-Core Processor", "flags": ["avx2"], "threads": 1}, "amd-epyc-7b13-64-core-avx2-1-thread"),
        ({"cpu": "x", "flags": [], "threads": 4, "gpu": "NVIDIA H200"}, "nvidia-h200"),
    ],
)
def test_a_machine_names_its_files(facts, name):
    assert harness.slug(facts) == name


def test_this_machine_is_described():
    facts = harness.machine()
    assert facts["threads"] == torch.get_num_threads()
    assert facts["memory"] > 2**28
    assert re.fullmatch(r"[a-z0-9-]+", harness.slug(facts))
    assert harness.versions()["torch"] == torch.__version__


# ------------------------------------------------------------------------------------------------------------------- the page
def test_the_page_has_every_target_and_table(tmp_path):
    targets = [Target.at_most("is small", 2.0, Paired(1.234, 1.0, 1.5, 30), "because"), Target.at_most("is unknown", 1.0, None)]
    rows = [{"cell": "x|y", "s": 0.12345, "ratio": [1.0, 0.9, 1.1]}, {"cell": "bare"}]
    harness.write(harness.result("first", {}, rows, targets, tables={"All of it": ["cell", "ratio", "nowhere"]}), tmp_path / "m-first.json")
    old = {"args": {"machine": "an old one"}, "steps": [{"dtype": "float32", "s": 2.0}]}
    (tmp_path / "old.json").write_text(json.dumps(old))
    text = results.page(tmp_path)
    assert "| is small | ≤ 2 | 1.23 [1.00, 1.50] | reached | because | `first` |" in text
    assert "| is unknown | ≤ 1 | - | - | not measured in this run | `first` |" in text
    assert "### All of it\n\n| cell | ratio |\n| --- | --- |\n| x\\|y | 1.00 [0.900, 1.10] |\n" in text
    assert "bare" not in text
    assert "nowhere" not in text
    assert "## old\n\nan old one." in text
    assert "| float32 | 2.00 |" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "1.00"),
        (123.4, "123"),
        (12345.6, "12346"),
        (0.00012345, "0.000123"),
        (0.0, "0"),
        (None, "-"),
        (7, "7"),
        ([1.5, 1.0, 2.0], "1.50 [1.00, 2.00]"),
    ],
)
def test_figures(value, text):
    assert results.figure(value) == text
