"""Tasks in sequence: borders, schedules, what is forgotten, and exact resuming in any of them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lorakit.cli.flags import parse_flags
from lorakit.cli.main import app
from lorakit.core.errors import BadParameter, DataError
from lorakit.core.events import Controller, Step, Task
from lorakit.core.events import Run as Asked
from lorakit.data.tiny import tiny_tokenizer
from lorakit.train import sequence
from lorakit.train.config import TrainConfig, make_config
from lorakit.train.distributed import world
from lorakit.train.run import Run
from lorakit.train.schedule import rate_of
from lorakit.train.sequence import ends_of, forgetting, means, rates_of, summary
from lorakit.train.train import build, read_result, train
from tests.train.runs import class_file, command, config, stopped
from tests.train.test_resume import adapter_bytes, steps_and_losses

(X,) = tiny_tokenizer()("X", add_special_tokens=False)["input_ids"]
KEYS = {
    "lora": {"dropout": 0.1},
    "inflora": {"sites": "attention", "lamb": 0.9},
    "eva": {"rho": 4.0, "dropout": 0.1},
    "lora_ga": {},
    "adalora": {"r": 4, "target_r": 2},
}


def sources(tmp: Path, tasks: int = 2) -> list[str]:
    """Tasks of other letters and other lengths."""
    for name, words, n in (("one", "abc de ", 40), ("two", "XYZ 12 ", 22), ("three", "(-) + ", 30)):
        rows = [{"text": f"{name} {i} " + words * (1 + 7 * i % 23)} for i in range(n)]
        (tmp / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [str(tmp / f"{name}.jsonl") for name in ("one", "two", "three")[:tasks]]


def two(tmp: Path, **keys: Any) -> TrainConfig:
    return config(tmp, **({"train_data": sources(tmp), "max_steps": 8, "save_steps": 3, "eval_steps": 2} | keys))


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# --- steps, rates, figures ------------------------------------------------------------------------------------------------------------


def test_steps_are_divided_equally_or_follow_the_epochs() -> None:
    assert ends_of(make_config({"max_steps": 8}), [100, 3], 4) == [4, 8]
    assert ends_of(make_config({"max_steps": 8}), [1, 1, 1], 4) == [3, 5, 8]
    assert ends_of(make_config({"max_steps": 7}), [9], 4) == [7]
    assert ends_of(make_config({"num_train_epochs": 2.0}), [100, 3], 4) == [50, 52]
    with pytest.raises(BadParameter, match="2 tasks"):
        ends_of(make_config({"max_steps": 1}), [5, 5], 4)


def test_every_task_runs_the_whole_schedule() -> None:
    check_rates()


def check_rates() -> None:
    settings = make_config({"warmup_steps": 2, "lr_scheduler_type": "linear"})
    rate, alone = rates_of(settings, [6, 10]), [rate_of(settings, n) for n in (6, 4)]
    assert [rate(i) for i in range(10)] == [alone[0](i) for i in range(6)] + [alone[1](i) for i in range(4)]
    assert rate(0) == rate(6) == 0
    assert rate(2) == rate(8) == 1


def test_what_is_forgotten() -> None:
    check_forgetting()


def check_forgetting() -> None:
    borders = [[{"loss": 1.0}], [{"loss": 1.5}, {"loss": 2.0}], [{"loss": 1.25}, {"loss": 3.0}, {"loss": 9.0}]]
    assert forgetting(borders[:1]) == 0
    assert forgetting(borders[:2]) == 0.5
    assert forgetting(borders) == (0.25 + 1.0) / 2
    assert means([{"a": 1.0, "b": 3.0}, {"a": 2.0, "b": 5.0}]) == {"a": 1.5, "b": 4.0}
    assert "forgetting" not in summary(borders[:1])
    assert summary(borders[:2]) == {"loss": 1.75, "forgetting": 0.5}


# --- what the user types --------------------------------------------------------------------------------------------------------------


def test_a_flag_given_again_makes_a_list() -> None:
    several = frozenset({"train_data"})
    words = ["--train-data", "a.jsonl", "--r", "4", "--train-data=[b].txt", "--train-data", "c"]
    found = parse_flags(words, strings=several, several=several)
    assert found == {"train_data": ["a.jsonl", "[b].txt", "c"], "r": 4}
    assert make_config(found).train_data == ("a.jsonl", "[b].txt", "c")
    assert parse_flags(words[:2], strings=several, several=several) == {"train_data": "a.jsonl"}


def test_sources_are_paired() -> None:
    assert make_config({"train_data": "a"}).sources == [("a", None)]
    assert make_config({"train_data": ["a", "b"]}).sources == [("a", None), ("b", None)]
    assert make_config({"train_data": ["a", "b"], "eval_data": ["c", "d"]}).sources == [("a", "c"), ("b", "d")]
    assert make_config({"train_data": ["a"], "eval_data": "c"}).sources == [("a", "c")]
    with pytest.raises(BadParameter, match="2 sources in train_data and 1 in eval_data"):
        make_config({"train_data": ["a", "b"], "eval_data": "c"})
    for key in ({"load_best_model_at_end": True}, {"early_stopping_patience": 2}):
        with pytest.raises(BadParameter, match="judge one task"):
            make_config({"train_data": ["a", "b"], **key})


def test_tasks_of_different_kinds_are_refused(tmp_path: Path) -> None:
    mixed = [sources(tmp_path)[0], class_file(tmp_path / "classes.jsonl")]
    with pytest.raises(DataError, match="one kind"):
        build(config(tmp_path, train_data=mixed), world())


def test_classes_of_all_tasks_share_one_head(tmp_path: Path) -> None:
    files = []
    for name, labels in (("p", "ab"), ("q", "cd")):
        lines = [json.dumps({"text": f"{labels[i % 2]} " * (2 + i % 4), "label": labels[i % 2]}) for i in range(30)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        files.append(str(tmp_path / f"{name}.jsonl"))
    result = train(config(tmp_path, train_data=files, max_steps=4), quiet=True)
    assert result.final.keys() == {"loss", "accuracy", "macro_f1", "forgetting"}
    meta = json.loads((tmp_path / "out/adapter/adapter.json").read_text())["meta"]
    assert meta["labels"] == ["a", "b", "c", "d"]
    assert meta["train_data"] == files
    assert len(meta["data_hash"]) == 2


# --- a run ----------------------------------------------------------------------------------------------------------------------------


def test_a_sequence_says_what_became_of_every_task(tmp_path: Path) -> None:
    result = train(two(tmp_path, method="lora"), quiet=True)
    out = tmp_path / "out"
    assert [len(seen) for seen in result.tasks] == [1, 2]
    loss = [[figures["loss"] for figures in seen] for seen in result.tasks]
    assert result.final["loss"] == pytest.approx((loss[1][0] + loss[1][1]) / 2)
    assert result.final["forgetting"] == pytest.approx(loss[1][0] - loss[0][0])
    assert read_result(out) == result
    border = [row for row in rows(out) if row.get("task") == 0 and row["step"] == 4]
    assert [row["eval_loss"] for row in border] == [loss[0][0]]
    assert [(row["step"], row["task"]) for row in rows(out) if "task" in row] == [(2, 0), (4, 0), (6, 1)]
    assert rows(out)[-1]["final"]
    assert rows(out)[-1]["eval_forgetting"] == result.final["forgetting"]


def test_the_first_task_is_trained_as_if_it_were_alone(tmp_path: Path) -> None:
    """Same schedule, same order, same bits; and the second begins with a fresh optimizer at its own first item."""
    first = sources(tmp_path)[0]
    both = train(two(tmp_path, method="lora", output_dir=str(tmp_path / "both")), quiet=True)
    alone = train(two(tmp_path, method="lora", output_dir=str(tmp_path / "alone"), train_data=first, max_steps=4), quiet=True)
    assert both.tasks[0][0] == alone.final
    found = {(row["step"], row.get("loss")) for row in rows(tmp_path / "both") if row["step"] <= 4 and "loss" in row}
    assert found == {(row["step"], row.get("loss")) for row in rows(tmp_path / "alone") if "loss" in row}


@dataclass(frozen=True)
class Listening:
    """Builds a controller that writes down what it hears."""

    heard: list[Any] = field(default_factory=list)
    requires: frozenset[str] = frozenset()

    def build(self, run: Asked) -> Controller:
        return Ear(self.heard, run)


class Ear(Controller):
    def __init__(self, heard: list[Any], run: Asked) -> None:
        self.heard, self.run = heard, run

    def start(self) -> None:
        self.heard.append("start")

    def before_task(self, task: Task) -> None:
        self.heard.append(("before", task.index, task.count, self._shown(), len(self.run.optimizer.state)))

    def after_task(self, task: Task) -> None:
        self.heard.append(("after", task.index, task.count, self._shown(), len(self.run.optimizer.state) > 0))

    def before_forward(self, step: Step) -> None:
        self.heard.append(step.index)

    def finish(self) -> None:
        self.heard.append("finish")

    def _shown(self) -> int:
        """Of which task the data are: the letters differ."""
        return int((self.run.calibration(1).batches[0]["input_ids"] == X).any())


def test_controllers_hear_the_borders_in_order(tmp_path: Path) -> None:
    assert heard(tmp_path) == [
        "start", ("before", 0, 2, 0, 0), 0, 1, ("after", 0, 2, 0, True),
        ("before", 1, 2, 1, 0), 2, 3, ("after", 1, 2, 1, True), "finish",
    ]  # fmt: skip


def heard(tmp: Path, **keys: Any) -> list[Any]:
    spec, settings = Listening(), two(tmp, method="lora", max_steps=4, save_steps=0, **keys)
    parts = build(settings, world())
    name = parts.adapted.active[0]
    parts.adapted.methods[name] = parts.adapted.methods[name].but(controllers=(spec,))
    Run(parts.adapted, parts.data, settings, world(), out=None, quiet=True).train()
    return spec.heard


def test_one_task_is_a_sequence_of_one(tmp_path: Path) -> None:
    assert heard(tmp_path, train_data=sources(tmp_path)[0]) == [
        "start", ("before", 0, 1, 0, 0), 0, 1, 2, 3, ("after", 0, 1, 0, True), "finish",
    ]  # fmt: skip


CUTS = [("inflora", 3), ("inflora", 4), ("inflora", 7), ("lora", 7), ("eva", 7)]
OTHERS = [(method, at) for method in sorted(KEYS) for at in (3, 4, 7) if (method, at) not in CUTS]


@pytest.mark.parametrize(("method", "at"), [*CUTS, *(pytest.param(*cut, marks=pytest.mark.slow) for cut in OTHERS)])
def test_a_sequence_cut_in_two_ends_with_the_same_bytes(tmp_path: Path, method: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_cut(tmp_path, method, at, monkeypatch)


def check_cut(tmp: Path, method: str, at: int, monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
    """In the first task, at the border, in the second: metrics and adapter are those of the run that was never cut."""
    keys = {"method": method, "save_steps": 2, "eval_steps": 0, "warmup_steps": 1, **KEYS[method], **more}
    train(two(tmp, output_dir=str(tmp / "whole"), **keys), quiet=True)
    stopped(two(tmp, output_dir=str(tmp / "cut"), **keys), at, monkeypatch)
    result = train(two(tmp, output_dir=str(tmp / "cut"), resume="auto", **keys), quiet=True)
    assert adapter_bytes(tmp / "whole") == adapter_bytes(tmp / "cut")
    assert steps_and_losses(tmp / "whole") == steps_and_losses(tmp / "cut")
    whole = read_result(tmp / "whole")
    assert whole is not None
    assert result.tasks == whole.tasks


def test_the_command_line_takes_tasks(tmp_path: Path) -> None:
    settings = config(tmp_path, method="inflora", max_steps=2, save_steps=0)
    words = command(settings)[3:]  # after the interpreter and the module
    at = words.index("--train-data")
    first, second = sources(tmp_path)
    result = CliRunner().invoke(app, [*words[:at], "--train-data", first, "--train-data", second, *words[at + 2 :]])
    assert result.exit_code == 0, result.output
    assert "tasks in sequence" in result.output
    assert "forgetting" in result.output
    assert "two.jsonl" in result.output.replace("\n", "")


# --- the tasks that come with lorakit ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_inflora_forgets_less_than_lora_on_built_in_tasks(tmp_path: Path) -> None:
    """Two tasks of the bundled base, equal steps, rates and rank: the first task's loss rises less, and the second is still learned."""
    keys = {
        "train_data": ["builtin:tkinter/chat", "builtin:email/code"], "max_steps": 40, "max_length": 192, "per_device_train_batch_size": 4,
        "learning_rate": 2e-3, "max_eval_samples": 16, "max_train_samples": 100, "save_steps": 0, "sites": "all-linear", "r": 8,
    }  # fmt: skip
    found = {}
    for method in ("lora", "inflora"):
        found[method] = train(make_config({**keys, "method": method, "output_dir": str(tmp_path / method)}), quiet=True)
    lora, ours = (found[name].final["forgetting"] for name in ("lora", "inflora"))
    learned = {name: result.tasks[1][1]["loss"] for name, result in found.items()}
    assert lora > 0.1
    assert ours < 0.5 * lora
    assert learned["inflora"] < learned["lora"] + 0.25


def _one_schedule_for_all(m: pytest.MonkeyPatch) -> None:
    real = sequence.rate_of
    m.setattr(sequence, "rate_of", lambda settings, total: real(settings, 10))


def _since_the_border_before(m: pytest.MonkeyPatch) -> None:
    change = lambda b: sum(b[-1][i]["loss"] - b[-2][i]["loss"] for i in range(len(b[-2]))) / len(b[-2]) if b[1:] else 0.0  # noqa: E731
    m.setitem(globals(), "forgetting", change)


@pytest.mark.parametrize(("change", "check"), [(_one_schedule_for_all, check_rates), (_since_the_border_before, check_forgetting)])
def test_mutants_are_seen(change: Callable[[pytest.MonkeyPatch], None], check: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch)
    with pytest.raises(AssertionError):
        check()


def _the_task_is_forgotten(m: pytest.MonkeyPatch) -> None:
    real = Run.load_state

    def load_state(self: Run, state: dict[str, Any]) -> None:
        real(self, state)
        self.at.task = 0

    m.setattr(Run, "load_state", load_state)


def _memory_is_not_saved(m: pytest.MonkeyPatch) -> None:
    from lorakit.methods.continual.inflora import Borders

    m.setattr(Borders, "load_state_dict", lambda self, state: None)


def test_memory_outlives_a_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tasks, cut in the second: the third border needs what was remembered of the first task."""
    check_cut(tmp_path, "inflora", 5, monkeypatch, train_data=sources(tmp_path, 3), max_steps=9)


@pytest.mark.parametrize(("change", "method", "at"), [(_the_task_is_forgotten, "lora", 7), (_memory_is_not_saved, "inflora", 5)])
def test_mutants_of_resuming_are_seen(
    tmp_path: Path, change: Callable[[pytest.MonkeyPatch], None], method: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch)
    with pytest.raises(AssertionError):
        check_cut(tmp_path, method, at, monkeypatch, train_data=sources(tmp_path, 3), max_steps=9)
