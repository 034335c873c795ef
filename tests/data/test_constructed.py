import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.core.errors import DataError
from lorakit.data.constructed import bits_per_parameter, capacity_bits, contradictory_domains, key_value_facts, planted_teacher
from lorakit.data.row import check_rows


def best_of_rank(teacher, r):
    change = teacher.targets - teacher.inputs @ teacher.weight.T
    u, s, vh = torch.linalg.svd(change.T @ teacher.inputs / len(teacher.inputs), full_matrices=False)
    return (u[:, :r] * s[:r]) @ vh[:r]


@settings(max_examples=30)
@given(st.integers(2, 9), st.integers(2, 9), st.data())
def test_the_floors_are_reached_by_the_truncated_svd_and_by_nothing_better(d_in, d_out, data):
    rank = data.draw(st.integers(1, min(d_in, d_out)))
    noise = data.draw(st.sampled_from([0.0, 0.3]))
    teacher = planted_teacher(d_in, d_out, rank, d_in + data.draw(st.integers(0, 9)), seed=data.draw(st.integers(0, 99)), noise=noise)
    assert torch.linalg.matrix_rank(teacher.delta) == rank
    n = len(teacher.inputs)
    torch.testing.assert_close(teacher.inputs.T @ teacher.inputs / n, torch.eye(d_in, dtype=torch.float64), atol=1e-12, rtol=0)
    for r, floor in enumerate(teacher.floors):
        best = best_of_rank(teacher, r)
        torch.testing.assert_close(teacher.loss(best), floor, atol=1e-10, rtol=1e-10)
        nudge = 0.01 * torch.randn(d_out, r, dtype=torch.float64) @ torch.randn(r, d_in, dtype=torch.float64) if r else best
        u, s, vh = torch.linalg.svd(best + nudge, full_matrices=False)
        assert teacher.loss((u[:, :r] * s[:r]) @ vh[:r]) >= floor - 1e-10
    if not noise:
        assert teacher.floors[rank] < 1e-20
        assert teacher.floors[rank - 1] > 1e-3 / rank**2
        torch.testing.assert_close(teacher.loss(teacher.delta), torch.zeros((), dtype=torch.float64), atol=1e-20, rtol=0)


def test_the_teacher_is_a_function_of_its_seed_and_takes_a_dtype():
    a, b, c = (planted_teacher(6, 5, 2, 20, seed=s, dtype=torch.float32) for s in (0, 0, 1))
    assert torch.equal(a.targets, b.targets)
    assert not torch.equal(a.targets, c.targets)
    assert a.inputs.dtype == a.floors.dtype == torch.float32
    assert a.floors.shape == (6,)


def test_impossible_teachers_are_refused():
    with pytest.raises(DataError, match="update of 3x4 cannot have rank 4; choose 1 to 3"):
        planted_teacher(4, 3, 4, 9, seed=0)
    with pytest.raises(DataError, match="choose n >= 4"):
        planted_teacher(4, 3, 2, 3, seed=0)


@given(st.integers(1, 144), st.integers(0, 5))
def test_domains_share_prompts_and_contradict_each_other(n, seed):
    a, b = contradictory_domains(n, seed=seed)
    assert [row["prompt"] for row in a] == [row["prompt"] for row in b]
    assert len({row["prompt"] for row in a}) == n
    assert all({x["completion"], y["completion"]} == {" yes", " no"} for x, y in zip(a, b, strict=True))
    assert check_rows((str(i), row) for i, row in enumerate(a)) == a
    assert contradictory_domains(n, seed=seed) == (a, b)


def test_too_many_prompts_are_refused():
    with pytest.raises(DataError, match="144 distinct prompts; 145"):
        contradictory_domains(145)


def test_facts_have_distinct_keys_and_known_entropy():
    rows = key_value_facts(26, 1, 3, seed=0)
    assert sorted(row["prompt"] for row in rows) == [f"{c}=" for c in "abcdefghijklmnopqrstuvwxyz"]
    assert all(len(row["completion"]) == 3 for row in rows)
    assert rows == key_value_facts(26, 1, 3, seed=0) != key_value_facts(26, 1, 3, seed=1)
    assert capacity_bits(rows, [True] * 26) == pytest.approx(26 * 3 * math.log2(26))
    assert bits_per_parameter(rows, [True] + [False] * 25, 100) == pytest.approx(3 * math.log2(26) / 100)
    for wrong in ((27, 1, 3), (0, 1, 3), (5, 1, 0)):
        with pytest.raises(DataError):
            key_value_facts(*wrong, seed=0)
    with pytest.raises(DataError, match="one verdict per fact"):
        capacity_bits(rows, [True])
