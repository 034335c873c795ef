"""Flora's acceptance properties (arXiv:2402.03293)."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorakit
from lorakit import Adapted, BadParameter, Method, NotExportable, attach, get_method
from lorakit.adapters.peft import to_peft
from lorakit.core.events import Step
from lorakit.data.tiny import tiny_model
from lorakit.methods.bottleneck.flora_gc import Accumulation
from lorakit.parts.optimizers.projection import Projections, down, up
from lorakit.parts.optimizers.sgd import SGD
from tests.laws.steps import Run
from tests.laws.subject import base, batch, far, logits, loss_of, same_bits, subject

PROJECTIONS = ("*_proj",)
WIDE = {"hidden_size": 64, "intermediate_size": 128}


def tiny(**kwargs: Any) -> Adapted:
    """Flora in its theory's form: the plain rule without momentum, gradients compressed in every step."""
    method = get_method("flora_gc", r=4, rule="sgd", beta1=0.0, accumulate=True, unfreeze=PROJECTIONS, **kwargs)
    return attach(base(), method)


class Halves:
    """A run whose steps have two micro-batches of different token counts."""

    def __init__(self, adapted: Adapted, lr: float = 0.1, sizes: tuple[int, ...] = (7, 4)) -> None:
        self.adapted, self.total, self.sizes = adapted, 8, sizes
        self.optimizer = adapted.methods["default"].optim.build(adapted.params(), lr=lr)
        self.loop = adapted.methods["default"].loop.build(self)
        self.seen: list[dict[str, Tensor]] = []

    def batches(self, i: int) -> list[Tensor]:
        return [batch(10 * i + k, length=n) for k, n in enumerate(self.sizes)]

    def stream(self, lo: float = 0.0, hi: float = 1.0) -> Any:
        i = 0
        while True:
            yield self.batches(i)
            i += 1

    def gradients(self, batches: list[Tensor], info: Step) -> tuple[float, int]:
        n = sum(ids[:, 1:].numel() for ids in batches)
        loss = sum(loss_of(self.adapted.model, ids) * ids[:, 1:].numel() for ids in batches)
        (loss / n).backward()
        return loss.item(), n

    def update(self, info: Step) -> None:
        self.seen.append({p.name: p.tensor.grad.clone() for p in self.adapted.params()})
        self.optimizer.step()
        self.optimizer.zero_grad()

    def steps(self, n: int) -> "Halves":
        for i in range(n):
            self.loop.step(Step(i, self.total))
        return self


def exact(adapted: Adapted, batches: list[Tensor]) -> dict[str, Tensor]:
    """The mean gradient over all tokens, uncompressed."""
    n = sum(ids[:, 1:].numel() for ids in batches)
    adapted.model.zero_grad()
    (sum(loss_of(adapted.model, ids) * ids[:, 1:].numel() for ids in batches) / n).backward()
    found = {p.name: p.tensor.grad.clone() for p in adapted.params()}
    adapted.model.zero_grad()
    return found


# --- (a) gradient accumulation ----------------------------------------------------------------------------------------------------


def test_accumulated_gradients_are_the_projection_of_the_whole_steps_gradient() -> None:
    run = Halves(tiny())
    want = exact(run.adapted, run.batches(0))
    run.steps(1)
    made = Projections(4, 0, "accumulation")
    for name, g in want.items():
        P = made.of(0, g)
        assert far(run.seen[0][name], up(down(g, P), P, g.shape)) < 1e-4
        assert far(run.seen[0][name], g) > 0.1


def test_every_step_has_a_projection_of_its_own_and_one_micro_batch_none() -> None:
    run = Halves(tiny(), lr=0.0).steps(2)
    assert isinstance(run.loop, Accumulation)
    for name, second in run.seen[1].items():
        P = Projections(4, 0, "accumulation").of(1, second)
        small = exact(run.adapted, run.batches(1))[name]
        assert far(second, up(down(small, P), P, small.shape)) < 1e-4
    alone = Halves(tiny(), lr=0.0, sizes=(7,))
    want = exact(alone.adapted, alone.batches(0))
    assert all(far(g, want[name]) < 1e-5 for name, g in alone.steps(1).seen[0].items())


def test_what_is_held_between_micro_batches_is_compressed() -> None:
    run = Halves(tiny())
    held: list[dict[str, torch.Size]] = []
    gradients = run.gradients

    def watched(batches: list[Tensor], info: Step) -> tuple[float, int]:
        assert all(p.tensor.grad is None for p in run.adapted.params()), "no whole gradient lives through a forward"
        return gradients(batches, info)

    run.gradients = watched  # type: ignore[method-assign]
    inner = run.loop._down
    run.loop._down = lambda G, info: held.append({"whole": G.shape, "held": (C := inner(G, info)).shape}) or C  # type: ignore[func-returns-value]
    run.steps(1)
    assert held
    assert all(h["held"].numel() == 4 * max(h["whole"]) for h in held)


def changes(steps: int) -> dict[str, Tensor]:
    run = Halves(tiny())
    before = {p.name: p.tensor.detach().clone() for p in run.adapted.params()}
    run.steps(steps)
    return {p.name: p.tensor.detach() - before[p.name] for p in run.adapted.params()}


def test_one_projection_changes_r_directions_and_two_change_more() -> None:
    assert {int(torch.linalg.matrix_rank(d, rtol=1e-5)) for d in changes(1).values()} == {4}
    assert {int(torch.linalg.matrix_rank(d, rtol=1e-5)) for d in changes(2).values()} == {8}
    lora = Run(attach(base(), get_method("lora", r=4).but(optim=SGD())), total=8).steps(4).adapted
    assert max(int(torch.linalg.matrix_rank(b.delta.weight().detach(), rtol=1e-5)) for b in lora.branches()) == 4


# --- nearer to SGD's path than LoRA's ---------------------------------------------------------------------------------------------


def path(method: Method, steps: int, lr: float, *, r: int | None = None) -> tuple[Tensor, list[float]]:
    """The change of all projections' weights in one vector, and the losses. With r every step's gradient is compressed."""
    model = tiny_model("llama", **WIDE)  # type: ignore[arg-type]
    names = [n for n, _ in model.named_parameters() if n.endswith("proj.weight")]
    before = {n: model.get_parameter(n).detach().clone() for n in names}
    adapted = attach(model, method)
    made = Projections(r or 1, 0, "accumulation")

    def reduce(grads: list[Tensor]) -> None:
        for g in grads if r else ():
            P = made.of(run.index, g)
            g.copy_(up(down(g, P), P, g.shape))

    run = Run(adapted, total=steps, lr=lr, clip=1e9, data=lambda i: batch(i % 4, rows=8, length=16), reduce=reduce)
    losses = [run.step().item() for _ in range(steps)]
    merged = adapted.merge()
    return torch.cat([(merged.get_parameter(n).detach() - before[n]).flatten() for n in names]), losses


def apart(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Distance over the other's length, and cosine."""
    return float((one - other).norm() / other.norm()), float(torch.cosine_similarity(one, other, dim=0))


WHOLE = Method(None, unfreeze=PROJECTIONS, optim=SGD())


def lora(r: int) -> Method:
    return get_method("lora", r=r, alpha=float(r)).but(optim=SGD())


@pytest.mark.slow
def test_floras_path_is_nearer_to_sgds_than_loras() -> None:
    """400 small steps: the errors of 400 projections average out, that of LoRA's one does not, whatever its rate."""
    want, losses = path(WHOLE, 400, 0.01)
    assert losses[-1] < 0.5 * losses[0]
    found, own = path(WHOLE, 400, 0.01, r=8)
    distance, cosine = apart(found, want)
    for factor in (1, 3):
        theirs, their_losses = path(lora(8), 400, 0.01 * factor)
        assert distance < 0.5 * apart(theirs, want)[0]
        assert cosine > 2 * apart(theirs, want)[1]
        assert abs(own[-1] - losses[-1]) < 0.05 * abs(their_losses[-1] - losses[-1])


def test_it_is_nearer_in_direction_and_loss_after_few_steps_too() -> None:
    want, losses = path(WHOLE, 30, 0.1)
    found, own = path(WHOLE, 30, 0.1, r=16)
    theirs, their_losses = path(lora(16), 30, 0.1)
    assert apart(found, want)[1] > 1.5 * apart(theirs, want)[1]
    assert abs(own[-1] - losses[-1]) < 0.2 * abs(their_losses[-1] - losses[-1])


def test_a_single_step_is_farther_than_loras() -> None:
    """Where it must lose: one draw's error is √(d / r), four times the gradient here; LoRA's first step is merely too small."""
    want, _ = path(WHOLE, 1, 0.01)
    found, theirs = apart(path(WHOLE, 1, 0.01, r=4)[0], want), apart(path(lora(4), 1, 0.01)[0], want)
    assert 2.5 < found[0] < 6
    assert theirs[0] < 1


# --- the method -------------------------------------------------------------------------------------------------------------------


def test_no_adapter_and_every_parameter_by_default() -> None:
    adapted = subject("flora_gc", awake=False)
    assert not adapted.branches()
    assert adapted.params().numel() == sum(p.numel() for p in base().parameters())
    only = subject("flora_gc", unfreeze=("q_proj",))
    assert {p.name.split(".")[-2] for p in only.params()} == {"q_proj"}


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(BadParameter, match="unfreeze is empty"):
        get_method("flora_gc", unfreeze=())


def test_full_rank_and_its_export_is_refused_while_its_folder_and_merge_are_exact() -> None:
    run = Run(subject("flora_gc", awake=False, beta1=0.5, kappa=3), total=8, lr=1e-1).steps(6)
    adapted = run.finish()
    live = logits(adapted.model, batch())
    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(NotExportable, match="no site"):
            to_peft(adapted.state(), Path(folder) / "peft", model=base())
        adapted.save(Path(folder) / "own")
        assert same_bits(logits(lorakit.load(base(), Path(folder) / "own").model, batch()), live)
    weight = adapted.unfrozen["default"][1]
    assert weight.trained.ndim == 2
    assert torch.linalg.matrix_rank(weight.trained.detach() - weight.original.detach()) > 4
    assert same_bits(logits(adapted.merge_and_unload(), batch()), live)
