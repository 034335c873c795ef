"""report.html: there for every run, whole in itself, safe whatever a run holds, and without a trace in what was trained."""

import json
import os
import re
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit.train.answers as answers
import lorakit.train.ending as ending
from lorakit.adapters.io import load_adapter
from lorakit.train.answers import Sample
from lorakit.train.attention import NAME as SEGMENTS
from lorakit.train.config import make_config
from lorakit.train.facts import Facts, _measured, command_of, homeless
from lorakit.train.report import SITES, Outcome, Report, charts, page_of, usage
from lorakit.train.train import train
from tests.train.runs import class_file, config, stopped, text_file

EVIL = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;{{7*7}}\x00\u202e"
FACTS = Facts(
    name="run", method="lora", model="bundled", data="rows.jsonl", shape="chat", total=10, trainable=100, of=1000, given=[], defaults=[],
    sites=[("q", "8 × 8", "2", 32)], sources=["rows.jsonl"], accounts=[("training", "10 samples")], details=[],
    provenance=[("output folder", "out")], command="lorakit train", ends=[10], started="today",
)  # fmt: skip
OUTCOME = Outcome({"loss": 1.0}, 10, 2.0, {"loss": 3.0})


class Reader(HTMLParser):
    """The elements and attributes of a page, and its text outside of style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "i", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag or tag == "i"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


KNOWN = {
    "html", "head", "meta", "title", "style", "body", "main", "header", "h1", "h2", "h3", "p", "b", "i", "span", "dl", "div", "dt", "dd",
    "small", "figure", "figcaption", "svg", "path", "table", "thead", "tbody", "tr", "th", "td", "section", "details", "summary", "pre",
    "code", "footer", "br",
}  # fmt: skip


def checked(page: str) -> Reader:
    """A page that holds nothing but what a template wrote, and asks for nothing."""
    read = Reader(page)
    assert not read.open, "every element is closed"
    assert {tag for tag, _ in read.tags} <= KNOWN
    attributes = {(tag, name) for tag, attrs in read.tags for name in attrs}
    assert not [pair for pair in attributes if pair[1].startswith("on") or pair[1] in ("src", "href", "xlink:href", "srcdoc")]
    assert not re.search(r"url\(|@import|https?:", page)
    policy = [a for tag, a in read.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policy[0]["content"] == "default-src 'none'; style-src 'unsafe-inline'"
    return read


# ------------------------------------------------------------------------------------------------------------------- of a run
@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = config(tmp_path_factory.mktemp("run"), report_samples=2, eval_steps=2, run_name="first")
    train(settings, quiet=True, notes=["lora_r became r"])
    return Path(settings.output_dir)


def test_a_run_leaves_a_page_that_needs_nothing_else(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    words = " ".join(checked(page).words)
    said = ("first", "finished after 6 steps", "Held-out figures", "Before and after", "lora_r became r", "Provenance", "Gradient norm")
    for expected in (*said, "lorakit merge", "layers.0.self_attn.q_proj", "sha256", "optimizer's state"):
        assert expected in words, expected
    assert len(page) < 200_000
    assert not list(finished.glob("*.partial"))


def test_the_page_names_no_home_no_host_and_no_user(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import getpass
    import platform

    page = (finished / "report.html").read_text(encoding="utf-8")
    secrets = {platform.node(), getpass.getuser(), str(Path.home())} - {"", "/root", "root", "localhost", "vm"}
    assert not [secret for secret in secrets if re.search(rf"\b{re.escape(secret)}\b", page)]
    monkeypatch.setenv("HOME", "/home/somebody")
    assert homeless({"a": ["/home/somebody/data.jsonl", 3]}) == {"a": ["~/data.jsonl", 3]}


def test_the_base_is_the_model_before_training(finished: Path) -> None:
    settings = make_config(json.loads((finished / "run.json").read_text())["config"] | {"output_dir": "x"})
    untouched = settings.model_copy(update={"output_dir": str(finished.parent / "still"), "learning_rate": 1e-30, "max_steps": 1})
    saved = json.loads((finished / "result.json").read_text())
    assert saved["base"]["loss"] == pytest.approx(train(untouched, quiet=True).final["loss"], rel=1e-6)
    assert saved["base"]["loss"] > saved["final"]["loss"]


def test_samples_change_no_bit_of_what_is_trained(finished: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    settings = make_config(json.loads((finished / "run.json").read_text())["config"])
    other = settings.model_copy(update={"output_dir": str(tmp_path / "out"), "report_samples": 0})
    train(other, quiet=True)
    one, two = (load_adapter(folder / "adapter").tensors for folder in (finished, tmp_path / "out"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    torch.set_rng_state(before)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Before and after" not in page


def test_answering_draws_nothing_and_leaves_the_model_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    real = ending.samples

    def watched(adapted: Any, *args: Any, **kwargs: Any) -> list[Sample]:
        adapted.model.train()
        before = torch.get_rng_state(), {k: v.clone() for k, v in adapted.model.state_dict().items()}
        found = real(adapted, *args, **kwargs)
        after = adapted.model.state_dict()
        seen.append(torch.equal(before[0], torch.get_rng_state()) and all(torch.equal(v, after[k]) for k, v in before[1].items()))
        assert adapted.model.training and adapted.active == ("default",)
        return found

    monkeypatch.setattr(ending, "samples", watched)
    monkeypatch.setattr(answers, "TOKENS", 4)
    train(config(tmp_path, report_samples=1, dropout=0.1), quiet=True)
    assert seen == [True]


def cards(page: str) -> list[str]:
    return re.findall(r'<section class="sample">.*?</section>', page, flags=re.S)


def test_a_resumed_run_has_the_same_samples_and_figures(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make_config(json.loads((finished / "run.json").read_text())["config"] | {"output_dir": str(tmp_path / "out")})
    settings = settings.model_copy(update={"report_samples": 2, "resume": "auto"})
    stopped(settings, 5, monkeypatch)
    page = (tmp_path / "out" / "report.html").read_text()
    words = " ".join(checked(page).words)
    assert re.search(r"at step \d of 6 when this page was written", words)
    assert not cards(page)
    train(settings, quiet=True)
    one, two = ((folder / "report.html").read_text() for folder in (finished, tmp_path / "out"))
    assert cards(one) == cards(two) and len(cards(one)) == 2
    assert "continued after step 4" in two
    saved = [json.loads((folder / "result.json").read_text()) for folder in (finished, tmp_path / "out")]
    assert saved[0]["base"] == saved[1]["base"]


def test_a_page_that_cannot_be_answered_costs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ending, "samples", fails)
    monkeypatch.setattr(ending, "means", fails)
    result = train(config(tmp_path, report_samples=1), quiet=True)
    assert len([note for note in result.notes if "out of memory" in note]) == 2
    assert "no row was answered" in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out" / "adapter").is_dir() and (tmp_path / "out" / "result.json").exists()


def test_a_page_that_cannot_be_refreshed_costs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, tried = Report.write, []

    def full(self: Report, outcome: Outcome | None = None) -> Path:
        tried.append(outcome)
        if outcome is None:
            raise OSError(28, "No space left on device")
        return write(self, outcome)

    monkeypatch.setattr(Report, "write", full)
    result = train(config(tmp_path), quiet=True)
    assert len(tried) == 2, "not again before the end"
    assert [note for note in result.notes if "report.html was not refreshed: [Errno 28] No space left" in note]
    assert "No space left" in (tmp_path / "out" / "report.html").read_text(), "the last page says so"


def test_classes_and_sequences_have_their_pages(tmp_path: Path) -> None:
    train(config(tmp_path, train_data=class_file(tmp_path / "c.jsonl"), report_samples=2), quiet=True)
    page = (tmp_path / "out" / "report.html").read_text()
    words = " ".join(checked(page).words)
    assert len(cards(page)) == 2 and "accuracy" in words and "head is untrained" in words
    two = [text_file(tmp_path / f"{name}.jsonl") for name in ("one", "other")]
    train(config(tmp_path, train_data=two, output_dir=str(tmp_path / "seq")), quiet=True)
    words = " ".join(checked((tmp_path / "seq" / "report.html").read_text()).words)
    assert "Tasks in sequence" in words and "forgetting" in words


def test_more_than_enough_held_out_items_are_measured_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "ITEMS", 1)
    result = train(config(tmp_path), quiet=True)
    words = " ".join(checked((tmp_path / "out" / "report.html").read_text()).words)
    assert result.base == {}
    assert "Both on the first 1 of" in words


# -------------------------------------------------------------------------------------------------------------------- the page
def test_nothing_that_a_run_holds_becomes_markup() -> None:
    evil = [(EVIL, EVIL)]
    facts = Facts(
        EVIL, EVIL, EVIL, EVIL, "chat", 10, 1, 2, [(EVIL, EVIL, EVIL)], [(EVIL, EVIL)], [(EVIL, EVIL, EVIL, 1)], [EVIL], evil, [EVIL],
        [*evil, ("output folder", EVIL)], EVIL, [10], EVIL, 0, [EVIL],
    )  # fmt: skip
    sample = Sample(EVIL, EVIL, EVIL, EVIL, [[EVIL, EVIL], [EVIL, EVIL]])
    outcome = Outcome({EVIL: 1.0, "loss": 2.0}, 10, 2.0, {EVIL: 1.0}, {}, EVIL, [sample], EVIL, [(EVIL, 5)], [EVIL], [[{"loss": 1.0}]])
    rows: list[dict[str, Any]] = [{"step": i, "loss": 1.0, EVIL: float(i), f"eval_{EVIL}": float(i)} for i in range(3)]
    read = checked(page_of(facts, rows, outcome))
    assert sum("<img src=x" in word for word in read.words) > 20, "it is shown"


@pytest.mark.parametrize("rows", [[], [{"step": 1}], [{"step": 1, "loss": None, "grad_norm": None}], [{"step": "x", "loss": []}, {}]])
def test_rows_with_nothing_in_them(rows: list[dict[str, Any]]) -> None:
    checked(page_of(FACTS, rows, None))
    checked(page_of(FACTS, rows, OUTCOME))


def test_the_figures_at_the_head_are_those_of_the_task() -> None:
    for figures, said in (
        ({"loss": 1.0, "perplexity": 2.7, "bits_per_byte": 0.5}, ("held-out loss", "bits per byte")),
        ({"loss": 0.6, "accuracy": 0.9, "margin": 0.25, "reward_chosen": 1.0}, ("held-out loss", "accuracy", "margin")),
        ({"loss": 0.6, "accuracy": 0.9, "entity_f1": 0.8}, ("held-out loss", "accuracy", "entity F1")),
        ({"loss": 0.6, "accuracy": 0.9, "macro_f1": 0.8, "forgetting": 0.1}, ("held-out loss", "accuracy", "forgetting")),
    ):
        page = page_of(FACTS, [], Outcome(figures, 10, 2.0))
        heads = re.findall(r"<dt>(.*?)</dt>", page)
        assert tuple(heads[: heads.index("trained parameters")]) == said
        assert "reward chosen" in page or "reward_chosen" not in figures


def figures_of(page: str) -> dict[str, list[str]]:
    """The rows of a page's tables whose head is a figure or a part of memory."""
    rows = re.findall(r"<tr><th>(.*?)</th>(.*?)</tr>", page, flags=re.S)
    return {name: re.findall(r"<td[^>]*>(.*?)</td>", cells) for name, cells in rows}


def test_a_base_that_is_its_own_reference_prefers_nothing() -> None:
    """Rewards of 0 on both sides are no accuracy of 0, and no gain of what the adapter has."""
    final, base = {"loss": 0.7, "accuracy": 0.5, "margin": -0.02, "reward_chosen": 0.1, "reward_rejected": 0.12}, {"loss": 0.6931}
    tied = base | {"accuracy": 0.0, "margin": 0.0, "reward_chosen": 0.0, "reward_rejected": 0.0}
    page = page_of(FACTS, [], Outcome(final, 10, 2.0, tied))
    assert figures_of(page)["accuracy"] == ["–", "0.5000", "–"] and figures_of(page)["margin"] == ["0", "−0.0200", "−0.0200"]
    assert "its own reference" in page and "base 0<" in page and page.count("base 0<") == 1, "the margin's, not the accuracy's"
    page = page_of(FACTS, [], Outcome(final, 10, 2.0, tied | {"reward_chosen": 0.1}))
    assert figures_of(page)["accuracy"] == ["0", "0.5000", "+0.5000"] and "its own reference" not in page
    page = page_of(FACTS, [], Outcome({"accuracy": 0.5}, 10, 2.0, {"accuracy": 0.0}))
    assert figures_of(page)["accuracy"] == ["0", "0.5000", "+0.5000"], "a classifier's may be 0"


def test_a_figure_of_training_and_of_held_out_rows_is_one_picture() -> None:
    names = ("accuracy", "margin", "reward_chosen", "reward_rejected", "kl")
    rows: list[dict[str, Any]] = [{"step": i, **dict.fromkeys(names, i / 9)} for i in range(1, 9)]
    rows += [{"step": i, **{f"eval_{name}": i / 8 for name in names}} for i in (4, 8)]
    found = charts(rows)
    assert [c.title for c in found] == ["Accuracy", "Margin", "Reward chosen", "Reward rejected", "KL"]
    assert [[line.name for line in c.lines] for c in found] == [["training", "held-out"]] * 5
    (alone,) = charts([{"step": i, "eval_macro_f1": i / 8} for i in (4, 8)])
    assert alone.title == "Macro F1" and [line.name for line in alone.lines] == ["held-out"]
    assert charts([{"step": 4, "eval_accuracy": 0.5}]) == [], "a single value is among the figures"


def test_a_speed_names_what_it_counts() -> None:
    rows = [{"step": i, "tokens_per_second": 1.25} for i in (1, 2)]
    page = page_of(replace(FACTS, counted="pairs"), rows, OUTCOME)
    assert "<dt>pairs a second</dt><dd>1.250" in page and "<b>Pairs a second</b>" in page and "okens a second" not in page


def test_what_to_do_next_is_what_the_rows_are_for() -> None:
    """A template's words around a prompt that was trained without them would ask for something else."""
    said = {
        (shape, talks): dict(usage(replace(FACTS, shape=shape, talks=talks))) for shape in ("preference", "chat") for talks in (True, False)
    }
    assert "talk to it" in said["chat", True] and "talk to it" in said["preference", True]
    assert "talk to it" not in said["preference", False] and "answer a prompt" in said["preference", False]
    assert "continue a text" in dict(usage(replace(FACTS, shape="text")))
    assert not {"talk to it", "continue a text", "answer a prompt"} & dict(usage(replace(FACTS, shape="tag"))).keys()


def test_tags_that_are_wrong_are_marked_and_wide_tables_scroll() -> None:
    table = [["word", "in the data", "before", "after"], ["a", "-", "O", "-"], ["b", "P", "P", "O"]]
    page = page_of(replace(FACTS, shape="tag"), [], replace(OUTCOME, samples=[Sample("a b", "- P", "1", "1", table)]))
    cells = re.findall(r'<td class="( bad)?">(.*?)</td>', page)
    assert cells == [("", "-"), (" bad", "O"), ("", "-"), ("", "P"), ("", "P"), (" bad", "O")]
    assert '<div class="inner"><table>' in page
    numbers = [["log p", "before", "after"], ["-3", "-1.5", "-1.0"]]
    page = page_of(replace(FACTS, shape="preference"), [], replace(OUTCOME, samples=[Sample("a", "b", "c", "d", numbers)]))
    assert '<td>-3</td><td class="n">−1.5</td><td class="n">−1.0</td>' in page, "what the row says stays as it is"


def test_the_page_says_what_memory_was_expected(finished: Path, tmp_path: Path) -> None:
    """What --dry-run says of the same configuration, beside what was measured; not for a run without samples, which is to be quick."""
    from lorakit.train.dry_run import dry_run
    from lorakit.train.page import size

    page = (finished / "report.html").read_text(encoding="utf-8")
    found = figures_of(page)
    settings = make_config(json.loads((finished / "run.json").read_text())["config"] | {"output_dir": str(tmp_path / "x")})
    memory = dry_run(settings).memory
    assert found["expected of one step, its tensors alone"][0] == size(memory.total)
    assert found["of that, activations at their highest"][0] == size(memory.activations)
    assert list(found).index("highest measured") < list(found).index("expected of one step, its tensors alone")
    train(settings.model_copy(update={"report_samples": 0, "max_steps": 1}), quiet=True)
    page = (tmp_path / "x" / "report.html").read_text(encoding="utf-8")
    assert "highest measured" in page and "expected of one step" not in page and "Expected:" not in page


def test_a_model_that_cannot_be_traced_has_a_page_without_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[Any] = []

    def fails(adapted: Any, *args: Any) -> Any:
        assert adapted.model.config._attn_implementation == SEGMENTS, "as it trained"
        models.append(adapted.model)
        raise RuntimeError("shapes depend on values")

    monkeypatch.setattr(ending, "expected", fails)
    result = train(config(tmp_path, report_samples=1, max_steps=1), quiet=True)
    assert not result.notes and "expected of one step" not in (tmp_path / "out" / "report.html").read_text()
    assert [model.config._attn_implementation for model in models] == ["sdpa"]


def test_a_long_run_of_a_large_model_has_a_page_of_bounded_size() -> None:
    rows = [
        {"step": i, "loss": i % 97 / 7, "learning_rate": 1e-3, "grad_norm": 1.0, **{f"m{k}": i + 0.5 for k in range(40)}}
        for i in range(20_000)
    ]
    facts = Facts(**{**vars(FACTS), "sites": [(f"model.layers.{i}.q", "8 × 8", "2", 32) for i in range(9000)]})
    outcome = Outcome({"loss": 1.0}, 10, 2.0, samples=[Sample("x" * 10**6, "y" * 10**6, "", "z" * 10**6)] * 3, samples_note="some")
    page = page_of(facts, rows, outcome)
    assert len(page) < 1_500_000
    assert f"and {9000 - SITES} more" in page
    assert len(charts(rows)) <= 12


def test_refreshing_takes_little_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, written = 0.0, []
    monkeypatch.setattr("lorakit.train.report.time.monotonic", lambda: now)

    def write(self: Report, outcome: Outcome | None = None) -> None:
        nonlocal now
        now += 0.5
        written.append(now)

    monkeypatch.setattr(Report, "write", write)
    report = Report(tmp_path, FACTS)
    for step in range(1000):
        now += 0.1
        report({"step": step})
    assert written[0] == pytest.approx(0.6)
    assert len(written) * 0.5 <= 0.03 * now


def test_the_command_gives_the_same_configuration() -> None:
    import shlex

    from lorakit.cli.flags import parse_flags
    from lorakit.cli.train import SEVERAL, STRINGS

    given = make_config({
        "method": "lora", "r": 4, "sites": ["q_proj", "re:.*v_proj"], "train_data": "it's here.jsonl", "learning_rate": 5e-5,
        "run_name": "007", "packing": False, "columns": {"prompt": "my question"}, "max_steps": 3,
    })  # fmt: skip
    for settings in (given, given.model_copy(update={"method_args": {"r": 4, "sites": "on"}})):
        first, second, *words = shlex.split(command_of(settings))
        assert (first, second) == ("lorakit", "train")
        assert make_config(parse_flags(words, strings=STRINGS, several=SEVERAL)) == settings


def test_what_to_do_next_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a shell, where ~ between quotes is no home."""

    def typed(command: str) -> list[str]:
        words = subprocess.run(["sh", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True).stdout
        return words.splitlines()

    monkeypatch.setenv("HOME", str(tmp_path))
    for folder, source in ((tmp_path / "my runs" / "it's", tmp_path / "my rows.jsonl"), (tmp_path / "out", Path("rows.jsonl"))):
        given = config(tmp_path, output_dir=str(folder), train_data=str(source))
        facts = replace(FACTS, provenance=[("output folder", homeless(str(folder)))], measured=_measured(str(source), None))
        commands = dict(usage(facts))
        assert typed(commands["measure it"]) == ["lorakit", "eval", f"{folder}/adapter", "--data", str(source)]
        assert typed(commands["look into it"]) == ["lorakit", "inspect", f"{folder}/adapter"]
        assert {str(folder), str(source)} <= set(typed(command_of(given)))
        assert str(tmp_path) not in f"{commands}{command_of(given)}"
        loaded = commands["use it in Python"].removeprefix("lorakit.load(model, ").removesuffix(")")
        assert eval(loaded, {"os": os}) == f"{folder}/adapter"
