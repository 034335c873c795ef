"""The generated pages of the documentation, as a MkDocs hook: a page a method, their table, the benchmarks. They exist only in the build.

A method's page is what `lorakit show` prints: equations, code, parts. `mkdocs.yml` names this file under `hooks`.
"""

import importlib
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.cli import page, results
from lorakit.core.method import Entry, describe, get_method, list_methods
from lorakit.core.site import Where

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

LABELS = ("Trained", "Defaults", "Reference", "References", "Checkpoint", "With")  # each begins a paragraph on the page


def on_config(config: "MkDocsConfig") -> None:
    """Put the methods into the navigation, by heading."""
    entries = [describe(name) for name in list_methods()]
    titles = {e.heading: _title(e) for e in entries}
    groups = [
        {title: [{e.name: f"methods/{e.name}.md"} for e in entries if e.heading == heading]}
        for heading, title in sorted(titles.items(), key=lambda item: item[1])
    ]
    assert config.nav is not None
    config.nav.append({"Methods": [{"All methods": "methods/index.md"}, *groups]})


def on_files(files: "Files", config: "MkDocsConfig") -> None:
    """Add the pages to the build."""
    from mkdocs.structure.files import File

    benchmarks = Path(config.config_file_path).parent / "benchmarks" / "results"
    for uri, text in (pages() | {"benchmarks.md": results.page(benchmarks)}).items():
        files.append(File.generated(config, uri, content=text))


def pages() -> dict[str, str]:
    """Markdown by path."""
    entries = [describe(name) for name in list_methods()]
    return {"methods/index.md": table(entries)} | {f"methods/{e.name}.md": method_page(e) for e in entries}


def table(entries: list[Entry]) -> str:
    """The index: one row a method."""
    rows = [f"| [`{e.name}`]({e.name}.md) | {link(e.paper)} | {e.survey} | {e.kind} | {e.summary} |" for e in entries]
    head = ["# Methods", "", "Generated from the registry; `lorakit list` prints the same.", ""]
    return "\n".join([*head, "| id | paper | survey | kind | what |", "|---|---|---|---|---|", *rows, ""])


def method_page(entry: Entry) -> str:
    """One method: its module's docstring, its parameters, its code, its parts at the defaults."""
    parameters = [f"| `{n}` | `{_annotation(p)}` | `{page.spelled(p.default)}` |" for n, p in entry.parameters.items()]
    resolved = [f"{name} = {page.spelled(value)}" for name, value in page.parts(get_method(entry.name)).items()]
    title, _, body = page.paper(entry).partition("\n")
    return "\n".join(
        [
            *(f"# {title}", "", f"`{entry.name}` · {link(entry.paper)} · survey {entry.survey} · {entry.kind}"),
            *(markdown(body), "", "## Parameters", "", "| name | type | default |", "|---|---|---|", *parameters),
            *("", "## Code", "", f"`{page.source_line(entry.make)}`", "", "```python", page.code(entry), "```"),
            *("", "## Parts at the defaults", "", "```python", *resolved, "```", ""),
        ]
    )


def markdown(text: str) -> str:
    """A docstring as Markdown: equations are indented and so stay as they are; a labeled line begins a paragraph."""
    return re.sub(rf"^({'|'.join(LABELS)})\b", r"\n\1", text, flags=re.MULTILINE)


def link(paper: str) -> str:
    """An arXiv id as a link; anything else as it is."""
    return f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})" if paper.startswith("arXiv:") else paper


def _annotation(parameter: inspect.Parameter) -> str:
    text = "Where" if parameter.annotation == Where else inspect.formatannotation(parameter.annotation)
    return text.removeprefix("typing.")


def _title(entry: Entry) -> str:
    """A heading's title is its package's docstring; a plugin's heading has none."""
    package = importlib.import_module(entry.make.__module__.rpartition(".")[0] or "lorakit.methods")
    return (inspect.getdoc(package) or entry.heading).split("\n")[0].rstrip(".")
