"""What adapter_io.py states beside its times: the growth, the targets, and that its contenders do what their rows say."""

import pytest
import torch

from benchmarks import adapter_io as bench
from benchmarks.adapter_io import SMOKE

(SHAPE,) = SMOKE.values()
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT's, of every second adapter
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT's own call of an old name
]


def test_the_growth_is_the_exponent():
    assert bench.growth([1, 2, 4], [3.0, 6.0, 12.0]) == pytest.approx(1)
    assert bench.growth([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)
    assert bench.growth([16], [1.0]) is None


@pytest.mark.parametrize("name", bench.NAMES)
def test_a_contender_has_the_adapters_and_takes_them_off(name, tmp_path):
    who = bench.contender(name, SHAPE, 2)
    before = {key: tensor.clone() for key, tensor in who.model.state_dict().items()}
    assert [operation for operation, _ in bench.lap(who, 3, tmp_path)] == list(bench.OPERATIONS)
    after = who.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.allclose(after[key], tensor, atol=1e-3) for key, tensor in before.items())  # PEFT's unmerging is not exact
    who.load(3, tmp_path)
    A = [p for key, p in who.model.named_parameters() if "q_proj" in key and p.shape == (2, 32) and not p.is_meta]
    assert len(A) == 3
    assert len({p.data_ptr() for p in A}) == 3


def test_the_targets_are_of_the_first_model_and_of_loading():
    def row(model, n, limit, mine, theirs):
        given = {"model": model, "operation": "load", "adapters": n, "rounds": 7, "times the limit": [limit, limit, limit]}
        return given | {"lorakit peak MB": mine, "peft peak MB": theirs, "peft, low_cpu_mem_usage peak MB": theirs + 1}

    rows = [row("a", 1, 1.5, 2.0, 4.0), row("a", 16, 3.0, 8.0, 4.0), {"growth of": "load", "on": "a", "lorakit exponent": 1.05}]
    rows += [row("b", 1, 9.0, 9.0, 1.0), {"growth of": "load", "on": "b", "lorakit exponent": 2.0}]
    found = bench.targets_of(rows)
    assert [(target.found, target.reached) for target in found] == [(1.5, True), (0.5, True), (3.0, False), (2.0, False), (1.05, True)]
