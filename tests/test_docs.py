"""The documentation is executed and checked: its commands run, its links lead somewhere, nothing is fetched, every method is described.

Blocks are marked as in README (tests/test_readme.py); those of a page run in one temporary folder, in the page's order. docs/mixing.md has
its own test (tests/cli/test_mix.py).
"""

import html
import html.parser
import inspect
import itertools
import json
import re
import shlex
import subprocess
import sys
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import lorakit
from lorakit.cli import docs, measured, page, reference, results
from lorakit.cli.flags import parse_flags
from lorakit.cli.main import app
from lorakit.core.method import Entry, describe, get_method, list_methods
from lorakit.train.config import FIELDS, TrainConfig, read_config
from tests.test_readme import blocks, execute

ROOT = Path(__file__).parents[1]
WRITTEN = sorted((ROOT / "docs").rglob("*.md"))
RUN = [path for path in WRITTEN if path.name not in ("mixing.md", "house.md", "log.md")]
OURS = [describe(name) for name in list_methods() if describe(name).make.__module__.startswith("lorakit.")]


def of(path: Path) -> str:
    return path.relative_to(ROOT / "docs").as_posix()


# ------------------------------------------------------------------------------------------------------------------- examples
def cases() -> list[Any]:
    found = [(path, blocks(path.read_text(encoding="utf-8"))) for path in RUN]
    return [pytest.param(path, id=of(path), marks=[pytest.mark.slow] if any(b.slow for b in made) else []) for path, made in found if made]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", cases())
def test_the_examples_of_a_page_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands in one process, as each one's own would load torch again; what is more than commands of ours goes to a shell."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for block in blocks(path.read_text(encoding="utf-8")):
        if block.language == "python":
            execute(sys.executable, "-c", block.code, cwd=tmp_path)
            continue
        plain = all(line.startswith(("lorakit ", "#")) for line in block.code.splitlines() if line.strip())
        if not plain or re.search(r"[|>&]", block.code):
            execute("bash", "-euo", "pipefail", "-c", block.code, cwd=tmp_path)
            continue
        for words in filter(None, (shlex.split(line, comments=True) for line in block.code.splitlines())):
            result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 0, (words, result.output[-2000:], result.exception)


@pytest.mark.parametrize("path", RUN, ids=of)
def test_every_block_of_a_page_is_marked(path: Path) -> None:
    """A block without a mark would rot; what must not run is fenced without a language, or as text, yaml or json."""
    text = path.read_text(encoding="utf-8")
    assert len(re.findall(r"^ *```(?:bash|python|sh|py|console)\b", text, flags=re.MULTILINE)) == len(blocks(text))


# -------------------------------------------------------------------------------------------------------------------- methods
@pytest.mark.parametrize("entry", OURS, ids=lambda e: e.name)
def test_every_method_says_when_to_use_it(entry: Entry) -> None:
    text = page.use(entry)
    assert 80 < len(text) < 600
    assert text.startswith(page.USE)
    assert len(re.findall(rf"^{page.USE}", page.paper(entry), flags=re.MULTILINE)) == 1
    assert page.USE not in "".join(page.equations(entry))


def test_no_two_methods_say_the_same() -> None:
    """Under half of the words of the shorter text, and no sentence, are another's."""
    words = {entry.name: set(re.findall(r"[\w.]{4,}", page.use(entry).lower())) for entry in OURS}
    for a, b in itertools.combinations(words, 2):
        assert len(words[a] & words[b]) < 0.5 * min(len(words[a]), len(words[b])), (a, b)
    sentences = [part for entry in OURS for part in re.split(r"[.;:]\s+", page.use(entry))]
    assert len(sentences) == len(set(sentences))


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return docs.pages() | reference.pages()


@pytest.mark.parametrize("entry", OURS, ids=lambda e: e.name)
def test_a_methods_page_has_all_there_is_to_say(entry: Entry, pages: dict[str, str]) -> None:
    text = pages[f"methods/{entry.name}.md"]
    assert page.use(entry) in text
    for section in (
        "When to use it",
        "What it is",
        "Train with it",
        "Parameters",
        "Trained values",
        "Measured",
        "Goes with",
        "Outside",
        "Code",
    ):
        assert f"\n## {section}\n" in text
    for name in entry.parameters:
        assert re.search(rf"^\| `{name}` \|[^|]*\|.*\| \S.* \|$", text, flags=re.MULTILINE), f"{name} has no meaning"


@pytest.mark.parametrize("entry", OURS, ids=lambda e: e.name)
def test_a_methods_command_and_call_are_right(entry: Entry) -> None:
    program, command, *words = shlex.split(docs.command(entry))
    assert (program, command) == ("lorakit", "train")
    config = read_config(None, parse_flags(words))
    assert config.method == entry.name
    assert config.build_method() == get_method(entry.name), "what is typed is the default"
    made = []
    scope: dict[str, Any] = {"model": None}
    exec(docs.call(entry).replace("attach, ", "").replace("attach(", "made("), scope | {"made": lambda _, method: made.append(method)})
    assert made[0].recipe.name == entry.name


def test_the_closed_form_is_that_of_a_known_model() -> None:
    """LoRA of rank 8 on every linear layer of an 8B Llama: a figure that everybody's tools print."""
    assert "20,971,520" in docs.counted(describe("lora"), docs.shapes())


def test_what_goes_with_a_method_is_what_is_accepted() -> None:
    joined = docs.joinable()
    assert joined["qlora"]["dora"] == joined["pissa"]["loraplus"] == ""
    assert "only one can act" in joined["adalora"]["sora"]
    assert "[`dora`](dora.md)" in docs.goes_with(describe("qlora"), joined)
    assert "`sora`" not in docs.goes_with(describe("adalora"), joined)


def test_a_cell_shows_what_it_is_given() -> None:
    """Markdown's extensions read bars, <words> and braces in it, and what they take nobody sees."""
    markdown = pytest.importorskip("markdown")
    cells = ["r at {regex: r}", "`str | None`", "a | b", "builtin:<task>/<kind>", '<a id="x"></a>`x`', "`<name>`", "{a, b}, {c, d}"]
    shown = markdown.markdown(results.grid(["key", "meaning"], [[cell, "m"] for cell in cells]), extensions=["tables", "attr_list"])
    rows = re.findall(r"<tr>\s*<td>(.*?)</td>\s*<td>m</td>\s*</tr>", shown, flags=re.DOTALL)
    found = [html.unescape(re.sub(r"</?code>", "`", row)) for row in rows]
    assert found == cells and set(re.findall(r"<(\w+)", "".join(rows))) == {"code", "a"}
    assert '<th class="sentences">meaning</th>' in shown


def test_types_are_written_as_one_would() -> None:
    assert reference.annotation(TrainConfig.model_fields["train_data"].annotation) == "str | tuple[str, ...] | dict[str, float]"
    assert not [name for name in FIELDS if "FieldInfo" in reference.annotation(TrainConfig.model_fields[name].annotation)]


def test_lora_itself_is_known_to_peft() -> None:
    assert docs.outside(describe("lora")).startswith("PEFT's type `LORA`")
    assert docs.outside(describe("dora")).startswith("PEFT's type `LORA`") and docs.outside(describe("vera")).startswith(
        "PEFT's type `VERA`"
    )
    assert docs.outside(describe("sora")).startswith("PEFT has no type of its own")


def test_the_templates_of_a_new_method_say_when_to_use_it() -> None:
    assert page.USE in (ROOT / "src/lorakit/cli/templates/method.py.jinja").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------------- measured
def result(*rows: dict[str, Any], smoke: bool = False) -> dict[str, Any]:
    return {
        "benchmark": measured.BENCHMARK,
        "machine": "a machine",
        "versions": {},
        "args": {"smoke": smoke},
        "rows": list(rows),
        "targets": [],
        "tables": {},
    }


def a_row(name: str, loss: float) -> dict[str, Any]:
    costs = {"trained": 1234, "kB": 56.7, "peak / lora": 1.5, "step / lora": 2.25}
    how = {"rate": 0.01, "rates": [0.001, 0.01, 0.1], "settings": "", "command": f"lorakit train --method {name}", "date": "2026-11-22"}
    return {"method": name, "loss before": 5.0, "loss": loss, **costs, **how}


def test_nothing_is_said_to_be_measured_that_is_not(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(result(a_row("lora", 3.0), smoke=True)))
    found = measured.read(tmp_path)
    assert not found.rows
    assert measured.NOT_YET in measured.row(found, "lora")
    assert measured.NOT_YET in measured.table(found)


def test_a_measured_row_is_on_the_page_with_its_command(tmp_path: Path) -> None:
    noise = {"seeds of": "lora, 3 seeds", "lowest": 2.9, "highest": 3.1}
    (tmp_path / "a.json").write_text(json.dumps(result(a_row("lora", 3.0), a_row("dora", 2.8), noise)))
    found = measured.read(tmp_path)
    text = measured.row(found, "dora")
    assert all(
        part in text for part in ("5.000 → **2.800**", "`lora` reaches 3.000", "2.900 to 3.100", "1,234", "57 kB", "1.50", "2.25", "0.01")
    )
    assert "lorakit train --method dora" in text
    assert "edge" not in text
    assert measured.NOT_YET in measured.row(found, "vera")
    table = measured.table(found)
    assert table.index("`dora`") < table.index("`lora`"), "the lowest loss first"
    made = docs.pages(found)["methods/dora.md"]
    assert text in made


# ------------------------------------------------------------------------------------------------------------------ reference
def test_every_key_command_flag_and_name_is_in_the_reference(pages: dict[str, str]) -> None:
    import typer

    configuration, commands, python = (pages[name] for name in (reference.CONFIGURATION, reference.COMMANDS, reference.PYTHON))
    assert [key for key in FIELDS if f"`{key}` |" not in configuration] == []
    walked = list(reference.walk(typer.main.get_command(app), "lorakit"))
    assert {path for path, _ in walked} >= {"lorakit train", "lorakit diagnose spectrum", "lorakit library add"}
    for path, command in walked:
        text = commands.split(f"\n## {path} {{")[1].split("\n## ")[0]
        assert [
            o for p in command.params if p.param_type_name != "argument" and p.name != "help" for o in p.opts if f"`{o}`" not in text
        ] == []
    sections = re.findall(r"^## (\w+) ", python, flags=re.MULTILINE)
    listed = re.findall(r"^\| `(\w+)` \|", python, flags=re.MULTILINE)
    assert sorted([*sections, *listed]) == sorted(lorakit.__all__)
    assert "Adapted.merge_and_unload(" in python
    assert inspect.signature(lorakit.attach).parameters.keys() <= set(re.findall(r"\w+", python.split("## attach")[1].split("```")[1]))


def test_every_generated_part_is_made_by_somebody() -> None:
    asked = {name for path in WRITTEN for name in re.findall(r"<!-- generated: ([\w-]+) -->", path.read_text(encoding="utf-8"))}
    assert asked == set(docs.GENERATED)
    for path in WRITTEN:
        assert "<!-- generated:" not in docs.filled(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------------------- the site
class Page(html.parser.HTMLParser):
    """What a page links to, fetches and can be linked at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.ids: set[str] = set()
        self.classes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids |= {found[name] for name in ("id", "name") if name in found}
        self.classes |= set(found.get("class", "").split())
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag == "link" and found.get("rel") not in ("canonical", "next", "prev"):
            self.fetched.append(found["href"])
        else:
            self.fetched += [found[name] for name in ("src", "srcset", "data", "poster") if found.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="pip install 'lorakit[docs]'")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def built(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def away(address: str) -> bool:
    return bool(re.match(r"(?:[a-z]+:)?//", address))


@pytest.mark.slow
def test_nothing_is_fetched_from_elsewhere(site: Path, built: dict[Path, Page]) -> None:
    assert len(built) > len(list_methods())
    assert [(path.name, address) for path, one in built.items() for address in one.fetched if away(address)] == []
    own = {(path.parent / re.split("[?#]", a)[0]).resolve() for path, one in built.items() for a in one.fetched if path.name != "404.html"}
    assert {path.name for path in own} >= {"site.css", "flags.js"} and [path for path in own if not path.exists()] == []
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        assert [u for u in re.findall(r"(?:@import\s+|url\()[\"']?([^\"')\s]+)", text) if away(u)] == [], path
    assert "mermaid" not in set.union(*(one.classes for one in built.values())), "the theme would fetch what draws it"


@pytest.mark.slow
def test_nothing_of_a_table_is_taken_for_markup(site: Path) -> None:
    for path in site.rglob("*.html"):
        for cell in re.findall(r"<td.*?</td>", path.read_text(encoding="utf-8"), flags=re.DOTALL):
            assert re.match(r'<td(?: style="[^"]*"| class="[^"]*")*>', cell), (path, cell)
            assert set(re.findall(r"<([\w-]+)", cell)) <= {"td", "a", "code", "em", "strong", "br"}, (path, cell)
            assert "\\|" not in cell, (path, cell)


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere(site: Path, built: dict[Path, Page]) -> None:
    wrong = []
    for path, one in built.items():
        if path.name == "404.html":
            continue  # its links begin at the root
        for link in one.links:
            if away(link) or link.startswith(("mailto:", "javascript:")):
                continue
            target, _, fragment = urllib.parse.unquote(link).partition("#")
            file = (path.parent / target).resolve() if target else path
            file = file / "index.html" if file.is_dir() else file
            if (file not in built and not file.exists()) or (fragment and file in built and fragment not in built[file].ids):
                wrong.append((path.relative_to(site).as_posix(), link))
    assert wrong == []


@pytest.mark.slow
def test_links_to_elsewhere_are_well_formed(built: dict[Path, Page]) -> None:
    """Nobody is asked whether they are there: tests use no network."""
    for address in {link for one in built.values() for link in one.links if away(link)}:
        parts = urllib.parse.urlsplit(address)
        assert parts.scheme == "https", address
        assert re.fullmatch(r"[\w.-]+\.[a-z]{2,}", parts.netloc), address
        assert not re.search(r"[\s<>\"]|[.,;)]$", address), address


def test_the_navigation_has_every_written_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [of(path) for path in WRITTEN if f": {of(path)}\n" not in text] == []
