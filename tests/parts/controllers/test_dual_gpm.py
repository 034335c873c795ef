"""DualGPM's memory against its definition."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorakit.parts.controllers.dual_gpm import Memory
from tests.methods.tools import normal

D = 12


def covariance(rank: int, *, seed: int, d: int = D) -> Tensor:
    """Σ x xᵀ / n of inputs that lie in a subspace of this rank: [d, d]."""
    X = normal(60, rank, seed=seed) @ normal(rank, d, seed=seed + 50)
    return X.T @ X / 60


def by_definition(old: Tensor, H: Tensor, threshold: float) -> Tensor:
    """The projector on the used directions after a task, by the paper's words: singular vectors of (I − P) H are added one by one until
    the used ones hold `threshold` of ‖H‖²."""
    P = old
    U, _, _ = torch.linalg.svd(H - P @ H)
    for i in range(len(H)):
        if ((P @ H).square().sum() / H.square().sum()) >= threshold - 1e-9:
            break
        P = P + torch.outer(U[:, i], U[:, i])
    return P


def projector(memory: Memory) -> Tensor:
    Q = memory.used()
    return Q @ Q.T


@pytest.mark.parametrize("threshold", [0.9, 0.98, 1.0])
def test_memory_grows_as_dual_gpm_says(threshold: float) -> None:
    check_memory(threshold)


def check_memories() -> None:
    for threshold in (0.9, 0.98, 1.0):
        check_memory(threshold)


def check_memory(threshold: float) -> None:
    """Over four tasks, across the flip to the complement: always the fewest directions, nested, idempotent, never more than d/2 stored."""
    memory, old, kinds = Memory.empty(D), torch.zeros(D, D, dtype=torch.float64), set()
    for task, rank in enumerate((2, 3, 5, 8)):
        H = covariance(rank, seed=task)
        memory, want = memory.grown(H, threshold), by_definition(old, H, threshold)
        P = projector(memory)
        torch.testing.assert_close(P, want, atol=1e-8, rtol=0)
        torch.testing.assert_close(P @ P, P, atol=1e-12, rtol=0)
        torch.testing.assert_close(P @ old, old, atol=1e-8, rtol=0)
        torch.testing.assert_close(memory.basis.T @ memory.basis, torch.eye(memory.basis.shape[1], dtype=P.dtype), atol=1e-12, rtol=0)
        assert memory.basis.shape[1] <= D / 2
        old = P
        kinds.add(memory.free)
    assert kinds == {False, True} or threshold < 1


def test_both_bases_stand_for_the_same_directions() -> None:
    """What is kept by the complement grows as if it were kept itself."""
    first, second = Memory.empty(D).grown(covariance(5, seed=1), 1.0), covariance(4, seed=2)
    other = Memory(first.left(), free=True)
    torch.testing.assert_close(projector(other), projector(first), atol=1e-12, rtol=0)
    for threshold in (0.9, 1.0):
        torch.testing.assert_close(projector(other.grown(second, threshold)), projector(first.grown(second, threshold)), atol=1e-8, rtol=0)


def test_free_directions_are_ranked_by_what_is_new() -> None:
    H = covariance(7, seed=2)
    for memory in (Memory.empty(D), Memory.empty(D).grown(covariance(4, seed=1), 1.0), Memory.empty(D).grown(covariance(9, seed=3), 1.0)):
        U, energy = memory.ranked(H)
        P = projector(memory)
        S = torch.linalg.svdvals(H - P @ H)
        torch.testing.assert_close(energy, S[: len(energy)].square(), atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(U.T @ U, torch.eye(U.shape[1], dtype=U.dtype), atol=1e-12, rtol=0)
        assert (P @ U).abs().max() < 1e-12


def _one_short(m: pytest.MonkeyPatch) -> None:
    """Official code after the first task: the directions whose running share is still below the threshold."""
    real = Memory.grown

    def grown(self: Memory, H: Tensor, threshold: float) -> Memory:
        more = real(self, H, threshold)
        return Memory.of(more.used()[:, :-1], torch.cat([more.used()[:, -1:], more.left()], 1))

    m.setattr(Memory, "grown", grown)


def _forgets_to_project(m: pytest.MonkeyPatch) -> None:
    m.setattr(Memory, "left", lambda self: torch.eye(len(self.basis), dtype=self.basis.dtype)[:, self.basis.shape[1] :])


def _never_flips(m: pytest.MonkeyPatch) -> None:
    m.setattr(Memory, "of", classmethod(lambda cls, used, left: cls(used, free=False)))


def _flips_without_saying_so(m: pytest.MonkeyPatch) -> None:
    real = Memory.of
    m.setattr(Memory, "of", classmethod(lambda cls, used, left: cls(real(used, left).basis, free=False)))


def _counts_sigma_not_its_square(m: pytest.MonkeyPatch) -> None:
    real = Memory.ranked
    m.setattr(Memory, "ranked", lambda self, H: (lambda U, e: (U, e.sqrt()))(*real(self, H)))


@pytest.mark.parametrize("change", [_one_short, _forgets_to_project, _never_flips, _flips_without_saying_so, _counts_sigma_not_its_square])
def test_mutants_are_seen(change: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch)
    with pytest.raises(AssertionError):
        check_memories()
