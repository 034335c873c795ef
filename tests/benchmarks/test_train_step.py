"""What train_step.py states beside its times: the products of a step, counted by torch, and targets from the right figures."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import train_step as bench
from benchmarks.train_step import SMOKE, Cell

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own call of an old name
TINY = Cell("lora", r=4, length=32)


def counted(work):
    """Flops of matrix products by torch's own counter, attention left out."""
    counter = FlopCounterMode(display=False)
    with counter:
        work()
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))


def test_the_flops_of_a_peers_lora_step_are_those_stated():
    """PEFT's step has just the products of the definition; ours are fewer or others where shapes allow."""
    step = bench.theirs(TINY, SMOKE, bench.batch_of(TINY, SMOKE)).step
    attention = 6 * SMOKE.layers * TINY.tokens * TINY.length * SMOKE.hidden
    assert counted(step) == bench.flops(TINY, SMOKE)[1] - attention


def test_the_flops_of_the_timed_products_are_those_stated():
    run = bench.products(bench.base(TINY, SMOKE), TINY.tokens)
    assert counted(run) == bench.flops(TINY, SMOKE)[0]


def test_the_frozen_step_reaches_the_embeddings_and_trains_nothing():
    made = bench.frozen(TINY, SMOKE, bench.batch_of(TINY, SMOKE))
    made.step()
    assert not any(p.requires_grad for p in made.model.parameters())
    first = bench.flops(TINY, SMOKE)[0]
    assert counted(made.step) == first


def test_contenders_agree_on_the_loss_or_the_run_ends():
    batch = bench.batch_of(TINY, SMOKE)
    made = {name: bench.CONTENDERS[name](TINY, SMOKE, batch) for name in ("lorakit", "peft", "full")}
    bench.check(made)
    other = bench.base(TINY, SMOKE)
    with torch.no_grad():
        other.lm_head.weight.mul_(3)
    with pytest.raises(RuntimeError, match="same loss"):
        bench.check(made | {"full": bench.plain(other, batch)})


def test_every_cell_has_contenders_and_a_peer_or_a_reason():
    names = [cell.name for cell in bench.STAR]
    assert len(names) == len(set(names)) == 13
    for cell in bench.STAR:
        assert set(cell.besides) <= set(bench.CONTENDERS)
        assert "peft" in cell.besides or cell.note
    assert sum(2 + len(cell.besides) for cell in bench.STAR) >= 40


def test_targets_take_the_fastest_of_ours_and_of_the_peers():
    row = {
        "lorakit s": 1.0, "lorakit compiled s": 0.8, "lorakit compiled compiles s": 0.1, "peft s": 2.0,
        "peft compiled by layer s": 1.9, "peft compiled whole s": 1.6,
        "peft / lorakit": [2.0, 1.9, 2.1], "peft / lorakit compiled": [2.5, 2.4, 2.6],
        "peft compiled by layer / lorakit compiled": [2.4, 2.3, 2.5], "peft compiled whole / lorakit compiled": [2.0, 1.9, 2.2],
        "lorakit saved MB": 60.0, "lorakit compiled saved MB": 50.0, "peft saved MB": 100.0, "lorakit peak MB": 90.0, "peft peak MB": 100.0,
    }  # fmt: skip
    slow = {"peft / lorakit": [0.9, 0.8, 0.95], "lorakit peak MB": 110.0, "peft peak MB": 100.0}
    found = {target.name: target for target in bench.targets({"lora": row, "lora, r 64": slow})}
    assert found["bf16, r 16: faster than PEFT eager"].found == 2.5
    assert found["bf16, r 16: faster than PEFT compiled"].found == 2.0
    assert found["bf16: saved bytes of PEFT's"].found == 0.5
    worst = next(target for name, target in found.items() if name.startswith("no cell slower"))
    assert (worst.found, worst.reached, worst.why) == (0.95, False, "in lora, r 64")
    heaviest = next(target for name, target in found.items() if name.startswith("peak memory"))
    assert (heaviest.found, heaviest.reached, heaviest.why) == (1.1, False, "in lora, r 64")
    assert found["QLoRA: step / our LoRA's"].reached is None
