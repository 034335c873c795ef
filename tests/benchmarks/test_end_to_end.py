"""What end_to_end.py states beside its times: the same batches for all, padding counted, and rows that do not count left out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import end_to_end as bench
from benchmarks.end_to_end import CONTENDERS, REFERENCE, Contender, Plan, Watch

PLAN = Plan("", "", samples=4506, windows=482, windows_a_step=16, steps=4, rate=1e-3, device="cpu", judged=True)


def run(loss=2.0, speed=100.0, trained=5, useful=90, places=100):
    return {"useful": useful, "places": places, "trained": trained, "seconds": useful / speed, "whole": 2.0, "rise": 0, "loss": loss}


def rows_of(**runs):
    reference = runs["Trainer"]
    return {name: dict(bench.row_of(name, some, reference, PLAN)) for name, some in runs.items()}


@pytest.mark.parametrize("name", CONTENDERS)
def test_a_step_holds_about_the_same_tokens_for_everybody(name):
    contender = CONTENDERS[name]
    items, accumulation = contender.batch(PLAN)
    a_window = 1.0 if contender.windows else 482 / 4506
    assert items * accumulation * a_window == pytest.approx(16, rel=0.03)
    assert items == pytest.approx(contender.items, rel=0.15)


def test_the_micro_batch_gives_way_to_the_step():
    assert CONTENDERS["Trainer"].batch(replace(PLAN, windows_a_step=2)) == (9, 2), "18 of 18.7 samples, where 2 × 8 would be 16"


def test_a_batch_smaller_than_the_wished_micro_batch():
    assert CONTENDERS["lorakit"].batch(replace(PLAN, windows_a_step=2)) == (2, 1)
    assert Contender("trainer", 24).batch(replace(PLAN, windows_a_step=1, samples=50, windows=5))[0] <= 12


def test_what_the_model_gets_is_counted():
    watch = Watch("cpu")
    batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 1, 1]]), "labels": torch.tensor([[-100, 6, 7], [8, -100, -100]])}
    collate = watch.counting(lambda items: batch, pad_id=1)
    assert collate([]) is batch
    collate([])
    assert (watch.places, watch.useful, watch.supervised) == (12, 8, 4)  # the first label of a row is never predicted
    watch.knows([[-100, 6, 7], [8]])
    assert watch.trained == 3


def test_a_row_counts_unless_its_loss_is_higher_by_more_than_seeds_differ():
    reference = [run(2.0), run(2.02), run(1.98)]
    assert bench.verdict(reference, reference) == "yes"
    assert bench.verdict([run(1.5)] * 3, reference) == "yes"
    assert bench.verdict([run(2.05), run(2.03), run(2.01)], reference) == "yes", "within the noise of three seeds"
    assert bench.verdict([run(2.2), run(2.22), run(2.18)], reference) == "does not count: its loss is higher"
    exact = [run(2.0)] * 3
    assert bench.verdict([run(2.009)] * 3, exact) == "yes", "seeds that agree to the last digit are no measure"
    assert bench.verdict([run(2.02)] * 3, exact).startswith("does not count")
    assert bench.verdict([run(1.0, trained=6)] * 3, reference) == "does not count: other tokens are trained"
    assert bench.verdict([run(None)], [run(None)]) == "not judged"


def test_targets_take_the_fastest_row_that_counts():
    """TRL's fastest has a higher loss; blindly 0.4 of the places are padding, and packing gains 1.6 of the 1.67 that are to be had."""
    rows = rows_of(
        **{
            "Trainer": [run(speed=100)] * 3,
            "lorakit bf16, eager, 2 windows": [run(speed=240)] * 3,
            "lorakit bf16, eager, 19 samples blindly": [run(speed=150, useful=60)] * 3,
            "TRL": [run(speed=120)] * 3,
            "TRL packed": [run(loss=3.0, speed=500)] * 3,
        }
    )
    found = {target.name.split(":")[1].strip(): target for target in bench.targets(rows)}
    assert found["faster than TRL at its best"].found == pytest.approx(2.0)
    assert found["faster than TRL at its best"].why == "lorakit bf16, eager, 2 windows against TRL"
    assert found["gain of packing over padding blindly, of 1/(1 − padding share)"].found == pytest.approx(1.6 * 0.6)
    assert found["faster than PEFT + Trainer at its best"].found == pytest.approx(2.4)
    alone = bench.targets(rows_of(Trainer=[run()] * 3))
    assert all(target.reached is None for target in alone), "nothing is claimed that was not run"


def test_every_stack_has_its_defaults_and_the_reference_is_one():
    plain = {contender.stack for contender in CONTENDERS.values() if not contender.settings}
    assert plain == set(bench.STACKS)
    assert CONTENDERS[REFERENCE] == Contender("trainer", 8)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the peers' own
def test_all_stacks_train_on_the_same_tokens_and_end_near_each_other(tmp_path: Path):
    """A few steps of ours, packed and padded, of PEFT + Trainer, and of TRL, which masks by itself; the untrained base is far off."""
    from lorakit.data.builtin import load_name
    from lorakit.data.tokenize import tokenize_rows
    from lorakit.train.source_model import bundled_base, load_tokenizer

    for split in ("train", "valid"):
        rows = load_name("builtin:tkinter/chat", split)[:48]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    samples = tokenize_rows(
        load_tokenizer("bundled"), [json.loads(line) for line in (tmp_path / "train.jsonl").read_text("utf-8").splitlines()], max_length=512
    ).samples
    plan = replace(
        PLAN,
        folder=str(tmp_path),
        model=str(bundled_base()),
        samples=48,
        windows=len(bench.pack(samples, 512)),
        windows_a_step=1,
    )
    names = ("lorakit bf16, eager", "lorakit bf16, eager, 19 samples by length", "Trainer", "TRL", "TRL packed")
    found = {name: bench.one(bench.asdict(plan), name, 0) for name in names}
    trained = {run["trained"] for run in found.values()}
    assert trained == {sum(s.trained for s in samples)}
    losses = [run["loss"] for run in found.values()]
    assert max(losses) - min(losses) < 0.1 * (bench.final_loss(plan, None) - max(losses)) + 0.03
    assert found["Trainer"]["useful"] < found["Trainer"]["places"]
    assert found["TRL packed"]["useful"] == found["TRL packed"]["places"]
