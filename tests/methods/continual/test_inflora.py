"""InfLoRA's acceptance properties (arXiv:2404.00228)."""

import tempfile
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lorakit
from lorakit import BadParameter, attach, get_method
from lorakit.adapters.peft import to_peft
from lorakit.core.calibrate import Calibration
from lorakit.core.events import Task
from lorakit.methods.continual import inflora
from lorakit.methods.continual.inflora import Borders, BordersSpec, designed
from lorakit.parts.controllers.dual_gpm import Memory
from tests.laws.steps import Run
from tests.laws.subject import base, batch, everything, far, logits, same_bits
from tests.methods.tools import normal
from tests.parts.controllers.test_dual_gpm import covariance

# --- two regressions in sequence on one linear layer: inputs and targets of task t are made of rows of `tasks[t]` --------------------


def subspaces(*columns: range, d: int = 12) -> list[Tensor]:
    """Inputs [40, d] that lie in these columns of one orthonormal basis."""
    Q = torch.linalg.qr(normal(d, d, seed=9)).Q
    return [normal(40, len(c), seed=i) @ Q[:, list(c)].T for i, c in enumerate(columns)]


class Regressions:
    """W is learned on one task after another; everything is exact and in fp64."""

    def __init__(self, name: str, inputs: list[Tensor], *, steps: int = 150, lr: float = 0.3, d_out: int = 6, **kwargs: Any) -> None:
        self.inputs, d = inputs, inputs[0].shape[1]
        self.targets = [X @ normal(d_out, d, seed=70 + i).T for i, X in enumerate(inputs)]
        host = nn.Linear(d, d_out, bias=False).double()
        with torch.no_grad():
            host.weight.copy_(normal(d_out, d, seed=99))
        self.adapted = attach(nn.ModuleDict({"w": host}), get_method(name, sites="w", **kwargs), calibration=self.shown(0))
        self.run = Run(self.adapted, total=steps * len(inputs), lr=lr, clip=1e9, loss=self._loss, tasks=len(inputs), shown=self.shown)
        self.learned: list[list[float]] = []
        for task in range(len(inputs)):
            if task:
                self.run.border()
            self.run.steps(steps)
            self.learned.append([self.loss(i) for i in range(len(inputs))])
        self.run.finish()

    def shown(self, task: int) -> Calibration:
        return Calibration([{"x": self.inputs[task]}], lambda model, b: (model.w(b["x"]).sum(), 1))

    def _loss(self, model: nn.Module, _: Tensor) -> Tensor:
        return self._error(self.run.task.index, model)

    def _error(self, task: int, model: nn.Module) -> Tensor:
        return (model.w(self.inputs[task]) - self.targets[task]).square().sum(1).mean()

    def loss(self, task: int) -> float:
        with torch.no_grad():
            return self._error(task, self.adapted.model).item()

    @property
    def forgotten(self) -> float:
        return self.learned[-1][0] - self.learned[0][0]

    @property
    def memory(self) -> Memory:
        (controller,) = self.run.controllers
        assert isinstance(controller, Borders)
        return controller.memory["w"]


def test_orthogonal_tasks_do_not_touch_each_other() -> None:
    check_orthogonal()


def check_orthogonal() -> None:
    """The old task's loss changes by at most 1e-8; the new one is learned. Plain LoRA changes the old one."""
    inputs = subspaces(range(4), range(4, 8))
    ours = Regressions("inflora", inputs, r=4, alpha=4.0)
    assert abs(ours.forgotten) <= 1e-8
    assert ours.learned[1][1] < 1e-3 * ours.learned[0][1], "the second task was learned"
    assert ours.learned[0][0] < 1e-3 * ours.learned[0][1], "and so was the first"
    assert Regressions("lora", inputs, r=4, alpha=4.0).forgotten > 1e-2


def test_overlapping_tasks_forget_what_the_memory_leaves() -> None:
    """Only what lies outside M, a share 1 − ε of ‖H‖², can change: |ΔW X₁| ≤ ‖ΔW‖ · ‖(I − M Mᵀ) X₁‖; less with a larger ε, and less than
    LoRA at any."""
    inputs, forgotten = subspaces(range(6), range(3, 9)), {}
    for lamb in (0.5, 0.9, 1.0):
        ours = Regressions("inflora", inputs, r=5, alpha=5.0, lamb=lamb, lame=1.0)
        d, X = ours.adapted.branches()[0].delta, inputs[0]
        Q = ours.memory.used()
        outside = X - X @ Q @ Q.T
        change = d.s * (X @ d.A.T @ d.B.T).detach()
        assert change.norm() <= d.s * torch.linalg.matrix_norm(d.B @ d.A, 2) * outside.norm() + 1e-12
        H = X.T @ X
        assert (H - Q @ Q.T @ H).square().sum() <= (1 - lamb + 1e-12) * H.square().sum()
        forgotten[lamb] = change.square().sum().item()
    assert forgotten[0.5] > forgotten[0.9] > forgotten[1.0]
    assert forgotten[1.0] < 1e-16
    lora = Regressions("lora", inputs, r=5, alpha=5.0)
    assert all(Regressions("inflora", inputs, r=5, alpha=5.0, lamb=lamb).forgotten < lora.forgotten for lamb in (0.9, 1.0))


def test_it_loses_where_tasks_need_the_same_directions() -> None:
    """Other answers to the same inputs: nothing is forgotten and nothing is learned, where LoRA learns the new at the cost of the old."""
    inputs = subspaces(range(4), range(4))
    ours, lora = (Regressions(name, inputs, r=4, alpha=4.0, **more) for name, more in (("inflora", {"lamb": 1.0}), ("lora", {})))
    assert abs(ours.forgotten) <= 1e-8
    assert ours.learned[1][1] == pytest.approx(ours.learned[0][1], rel=1e-6)
    assert lora.learned[1][1] < 1e-2 * lora.learned[0][1]
    assert lora.forgotten > 1


def test_three_tasks_keep_every_pair() -> None:
    inputs = subspaces(range(3), range(3, 6), range(6, 9))
    run = Regressions("inflora", inputs, r=3, alpha=3.0, d_out=10)
    (branch,) = run.adapted.branches()
    d = branch.delta
    assert d.A0.shape == (6, 12)
    assert max(run.learned[-1]) < 1e-2
    for A in (d.A, d.A0[:3], d.A0[3:]):
        torch.testing.assert_close((A @ A.T).detach(), torch.eye(3, dtype=A.dtype) / 3, atol=1e-9, rtol=0)
    for i, X in enumerate(inputs):
        for j, A in enumerate((d.A0[:3], d.A0[3:], d.A)):
            assert ((X @ A.T).abs().max() < 1e-8) == (i != j)
    assert branch.factors().A.shape == (9, 12)
    assert torch.linalg.matrix_rank(branch.weight(), rtol=1e-9) == 9


def test_a_border_changes_no_output_and_trains_b_alone() -> None:
    method = get_method("inflora", r=3, alpha=3.0, sites="all-linear")
    adapted = attach(base(), method, calibration=tokens(0))
    run = Run(adapted, total=8, tasks=2, shown=tokens).steps(3)
    before = logits(adapted.model.eval(), batch(50))
    run.border()
    assert far(logits(adapted.model.eval(), batch(50)), before) < 1e-5
    assert {p.attribute for p in adapted.params()} == {"B"}
    assert adapted.params().numel() == sum(3 * b.site.d_out for b in adapted.branches())
    assert not run.optimizer.state
    frozen, moving = everything(adapted.model), {n for n, p in adapted.model.named_parameters() if p.requires_grad}
    run.steps(2)
    for key, tensor in everything(adapted.model).items():
        assert same_bits(tensor, frozen[key]) != (key in moving), key


def tokens(task: int) -> Calibration:
    """Two tasks of different ids."""
    ids = [batch(i, rows=4, length=12) % 40 + 3 + 60 * task for i in range(3)]
    return Calibration([{"input_ids": x, "labels": x} for x in ids])


def test_the_new_pair_looks_where_the_old_task_has_no_inputs() -> None:
    check_interference()


def check_interference() -> None:
    """On a model, after training: ‖B A M‖ <= 1e-6 for all directions kept, and the old inputs hardly reach A."""
    adapted = attach(base(), get_method("inflora", r=4, sites="all-linear", lamb=0.98), calibration=tokens(0))
    run = Run(adapted, total=8, tasks=2, data=lambda i: tokens(int(i >= 3)).batches[i % 3]["input_ids"], shown=tokens).steps(3)
    run.border().steps(3)
    (controller,) = run.controllers
    for branch in adapted.branches():
        M, d = controller.memory[branch.site.name], branch.delta
        Q = M.used().float()
        assert M.basis.shape[1] <= branch.site.d_in / 2
        assert Q.shape[1] > 0
        assert d.B.any()
        assert ((d.B @ d.A).detach() @ Q).norm() <= 1e-6
        k = min(4, branch.site.d_in - Q.shape[1])
        torch.testing.assert_close((d.A @ d.A.T).detach()[:k, :k], torch.eye(k) / 3, atol=1e-6, rtol=0)


def test_where_little_is_left_the_rest_of_a_is_zero() -> None:
    memory = Memory.empty(12).grown(covariance(10, seed=1), 1.0)
    A = designed(memory, covariance(12, seed=2), 4)
    assert A.shape == (4, 12)
    assert not A[2:].any()
    torch.testing.assert_close(A[:2] @ A[:2].T, torch.eye(2, dtype=A.dtype) / 3)


def test_the_threshold_rises_with_the_tasks() -> None:
    spec = BordersSpec(0.9, 1.0, 4)
    assert [round(spec.threshold(Task(t, 4)), 12) for t in range(4)] == [0.9, 0.925, 0.95, 0.975]


def test_with_one_task_it_is_lora_with_a_frozen_at_the_inputs() -> None:
    method = get_method("inflora", r=3, sites="q_proj")
    adapted = attach(base(dtype=torch.float64), method, calibration=tokens(0))
    kept: list[Tensor] = []
    host = adapted.branches()[0].host.module
    host.register_forward_hook(lambda m, args, out: kept.append(args[0].flatten(0, 1)))
    for b in tokens(0).batches:
        logits(adapted.model, b["input_ids"])
    V = torch.linalg.svd(torch.cat(kept)).Vh[:3]
    A = adapted.branches()[0].delta.A.detach()
    torch.testing.assert_close((A @ V.T).abs() * 3**0.5, torch.eye(3, dtype=A.dtype), atol=1e-6, rtol=0)


# --- files and checkpoints ------------------------------------------------------------------------------------------------------------


def two_tasks() -> Run:
    adapted = attach(base(), get_method("inflora", r=3, sites="all-linear"), calibration=tokens(0))
    return Run(adapted, total=10, tasks=2, shown=tokens, data=lambda i: tokens(int(i >= 3)).batches[i % 3]["input_ids"])


def test_a_run_is_resumed_in_any_task() -> None:
    """Cut in the first task, right at the border, and in the second: the same bits, memory included."""
    whole = two_tasks().steps(3).border().steps(3)
    want, state = whole.finish().tensors("default"), whole.state()
    for cut in (1, 3, 5):
        first = two_tasks().steps(min(cut, 3))
        if cut >= 3:
            first.border().steps(cut - 3)
        again = two_tasks().restore(first.state())
        again.steps(max(0, 3 - cut))
        if cut < 3:
            again.border()
        again.steps(6 - max(3, cut))
        assert all(same_bits(again.finish().tensors("default")[k], want[k]) for k in want), cut
    assert b"memory" not in state  # a state holds tensors and plain values


def test_it_is_saved_loaded_merged_and_exported_with_every_pair() -> None:
    adapted = two_tasks().steps(3).border().steps(3).finish()
    want = logits(adapted.model, batch(5))
    with tempfile.TemporaryDirectory() as folder:
        adapted.save(f"{folder}/own")
        again = lorakit.load(base(), f"{folder}/own")
        to_peft(adapted.state(), f"{folder}/peft", model=base())
        with warnings.catch_warnings(action="ignore"):
            theirs = peft.PeftModel.from_pretrained(base(), f"{folder}/peft").eval()
    assert same_bits(logits(again.model, batch(5)), want)
    assert far(logits(theirs, batch(5)), want) < 1e-5
    assert {len(b.delta.A0) for b in again.branches()} == {3}
    assert far(logits(adapted.merge(), batch(5)), want) < 1e-5
    adapted.unmerge()
    assert same_bits(logits(adapted.model, batch(5)), want)


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ({"lamb": 0.0}, {"lamb": 0.9, "lame": 0.8}, {"lame": 1.1}, {"batches": -1}):
        with pytest.raises(BadParameter, match="lamb"):
            get_method("inflora", **wrong)
    monkeypatch.setattr(inflora, "LARGEST", 100)
    with pytest.raises(BadParameter, match="128 ids"):
        attach(base(), get_method("inflora", r=4, sites="embedding"), calibration=tokens(0))


def test_keys_and_values_are_the_default() -> None:
    for arch, names in (("llama", {"k_proj", "v_proj"}), ("gpt2", {"c_attn[k]", "c_attn[v]"})):
        adapted = attach(base(arch), get_method("inflora", r=4), calibration=tokens(0))
        assert {b.site.name.rsplit(".", 1)[-1] for b in adapted.branches()} == names
        pairs: Mapping[str, Tensor] = {b.site.name: b.delta.A for b in adapted.branches()}
        for name, A in pairs.items():  # which see the same inputs
            twin = name.replace("k_proj", "v_proj").replace("[k]", "[v]")
            assert same_bits(A.detach(), pairs[twin].detach())


def _no_projection(m: pytest.MonkeyPatch) -> None:
    real = inflora.designed
    m.setattr(inflora, "designed", lambda memory, H, r: real(Memory.empty(len(H)), H, r))


def _a_is_trained(m: pytest.MonkeyPatch) -> None:
    real = inflora.LowRankSpec
    m.setattr(inflora, "LowRankSpec", lambda rank, train, legs: real(rank, train=("A", "B"), legs=legs))


def _the_old_pair_is_dropped(m: pytest.MonkeyPatch) -> None:
    m.setattr(lorakit.core.lowrank.LowRank, "retire", lambda self: None)


def _statistics_of_the_first_task_again(m: pytest.MonkeyPatch) -> None:
    m.setattr(Regressions, "shown", lambda self, task: Calibration([{"x": self.inputs[0]}], lambda model, b: (model.w(b["x"]).sum(), 1)))


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (_no_projection, check_interference),
        (_a_is_trained, check_orthogonal),
        (_the_old_pair_is_dropped, check_orthogonal),
        (_statistics_of_the_first_task_again, check_orthogonal),
    ],
)
def test_mutants_are_seen(change: Callable[[pytest.MonkeyPatch], None], check: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch)
    with pytest.raises(AssertionError):
        check()
