"""The generated pages of the documentation, as a MkDocs hook: a page a method, their tables, the reference, the benchmarks.

They exist only in the build. A method's page is what `lorakit show` prints (equations, code, parts), and what can be counted or was
measured. In a written page a comment `<!-- generated: NAME -->` is replaced by what `GENERATED` makes. `mkdocs.yml` names this file under
`hooks`.
"""

import functools
import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.adapters.peft_types import FOLDER_OF, TYPES
from lorakit.cli import measured, moving, page, reference, results
from lorakit.cli.measured import Measured
from lorakit.core.errors import LorakitError
from lorakit.core.method import COMMON, Entry, describe, get_method, list_methods
from lorakit.core.site import Where, select

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

LABELS = ("Trained", "Defaults", "Reference", "References", "Checkpoint", "With")  # each begins a paragraph on the page
SHAPES: dict[str, dict[str, Any]] = {
    "the bundled base (8 M)": {
        "hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 6,
        "vocab_size": 6144, "tie_word_embeddings": True,
    },
    "Llama 3.1 8B's shape": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Models whose adapters are counted."""
ABOUT = """# Measured

Every method once on `builtin:tkinter/chat` with the bundled base: 40 steps of 4 windows of 128 tokens, one seed, its defaults where they
fit so short a run, the best of up to three learning rates by one half of the held-out rows, its loss on the other half. It shows that a
method trains and what it costs beside LoRA. It does not rank methods: the run is short, the base a toy, and what a method promises for long
runs, many tasks, long texts or large models is not seen. Made by `python -m benchmarks.every_method`."""
Models = dict[str, Any]


def on_config(config: "MkDocsConfig") -> None:
    """Put the methods into the navigation, by the survey's headings, behind the written guides."""
    entries = [describe(name) for name in list_methods()]
    titles = {e.heading: _title(e) for e in entries}
    groups = [
        {title: [{e.name: f"methods/{e.name}.md"} for e in entries if e.heading == heading]}
        for heading, title in sorted(titles.items(), key=lambda item: item[1])
    ]
    assert config.nav is not None
    for section in config.nav:
        if isinstance(section, dict) and "Methods" in section:
            section["Methods"] = ["methods/index.md", {"Measured": "methods/measured.md"}, *groups]


def on_files(files: "Files", config: "MkDocsConfig") -> None:
    """Add the pages to the build."""
    from mkdocs.structure.files import File

    folder = Path(config.config_file_path).parent / "benchmarks" / "results"
    found = measured.read(folder)
    made = pages(found) | reference.pages() | {"methods/measured.md": measured_page(found), "benchmarks.md": results.page(folder)}
    for uri, text in made.items():
        files.append(File.generated(config, uri, content=text))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in what a written page asks for."""
    return filled(markdown)


def filled(text: str) -> str:
    """A written page with its `<!-- generated: NAME -->` replaced. Raises KeyError for a name that nobody makes."""
    return re.sub(r"<!-- generated: ([\w-]+) -->", lambda m: GENERATED[m[1]](), text)


# ------------------------------------------------------------------------------------------------------------------ the methods
def pages(found: Measured | None = None) -> dict[str, str]:
    """Markdown by path."""
    entries, models = [describe(name) for name in list_methods()], shapes()
    joined = joinable()
    found = found or Measured({})
    return {"methods/index.md": table(entries)} | {f"methods/{e.name}.md": method_page(e, found, models, joined) for e in entries}


def table(entries: list[Entry]) -> str:
    """The index: one row a method."""
    rows = [[f"[`{e.name}`]({e.name}.md)", link(e.paper), e.survey, e.kind, e.summary] for e in entries]
    head = ["# Methods", "", "Generated from the registry; `lorakit list` prints the same. Which one to take: "
            "[choose a method](../guides/choose-a-method.md). What each did on one small task: [measured](measured.md).", ""]  # fmt: skip
    return "\n".join([*head, results.grid(["id", "paper", "survey", "kind", "what"], rows), ""])


def measured_page(found: Measured) -> str:
    """All measured rows."""
    return "\n\n".join([ABOUT, measured.table(found)]) + "\n"


def method_page(entry: Entry, found: Measured, models: Models, joined: dict[str, dict[str, str]]) -> str:
    """One method: when to use it, its equations, cost, parameters, what it goes with, its code, its parts at the defaults."""
    parameters = [
        [f"`{n}`", f"`{_annotation(p)}`", f"`{page.spelled(p.default)}`", page.meaning(entry, n)] for n, p in entry.parameters.items()
    ]
    resolved = [f"{name} = {page.spelled(value)}" for name, value in page.parts(get_method(entry.name)).items()]
    title, body = page.equations(entry)
    example = f"```bash\n{command(entry)}\n```\n\n```python\n{call(entry)}\n```"
    return "\n".join(
        [
            *(f"# {title.rstrip('.')}", "", f"`{entry.name}` · {link(entry.paper)} · survey {entry.survey} · {entry.kind}"),
            *("", "## When to use it", "", page.use(entry) or "Its module does not say."),
            *("", "## What it is", "", markdown(body)),
            *("", "## Train with it", "", example),
            *("", "## Parameters", "", results.grid(["name", "type", "default", "meaning"], parameters)),
            *("", "## Trained values", "", counted(entry, models)),
            *("", "## Measured", "", measured.row(found, entry.name)),
            *("", "## Goes with", "", goes_with(entry, joined)),
            *("", "## Outside", "", outside(entry)),
            *("", "## Code", "", f"`src/{page.source_line(entry.make)}`", "", "```python", page.code(entry), "```"),
            *("", "## Parts at the defaults", "", "```python", *resolved, "```", ""),
        ]
    )


def command(entry: Entry) -> str:
    """How to train with it from the shell, its size and one of its own parameters said."""
    own = [name for name in entry.parameters if name not in COMMON and _sayable(entry.parameters[name].default)]
    chosen = [name for name in ("r", *own[:1]) if name in entry.parameters and _sayable(entry.parameters[name].default)]
    flags = [f"--{name.replace('_', '-')} {_word(entry.parameters[name].default)}" for name in chosen]
    rest = ["--model path/to/model", "--train-data chats.jsonl", f"--output-dir out/{entry.name}"]
    return " ".join([f"lorakit train --method {entry.name}", *flags, *rest])


def call(entry: Entry) -> str:
    """The same from Python."""
    size = f", r={entry.parameters['r'].default}" if "r" in entry.parameters else ""
    return f'from lorakit import attach, get_method\n\nadapted = attach(model, get_method("{entry.name}"{size}))'


def _sayable(default: Any) -> bool:
    return isinstance(default, bool | int | float | str) and default != ""


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# --------------------------------------------------------------------------------------------------------- what can be counted
@functools.cache
def shapes() -> Models:
    """Llama models on the meta device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    found: Models = {}
    for name, sizes in SHAPES.items():
        config = LlamaConfig(**sizes, head_dim=sizes["hidden_size"] // sizes["num_attention_heads"])
        with torch.device("meta"):
            found[name] = LlamaForCausalLM(config)
    return found


def counted(entry: Entry, models: Models) -> str:
    """How many values it trains, by its closed form, or why not there."""
    method = get_method(entry.name)
    rows = []
    for name, model in models.items():
        whole = sum(p.numel() for p in model.parameters())
        try:
            sites = [] if method.delta is None else select(model, method.sites)
            method.check(sites)
            number = method.count(sites) + sum(patch.count(model) for patch in method.patches)
        except LorakitError as error:
            rows.append([name, "", f"not at the defaults: {error}"])
            continue
        share = f"{100 * number / whole:.3g} % of {whole:,}" if number else ""
        rows.append([name, f"{number:,}" if number else "", share or "only what is trained whole"])
    text = "By the closed form, at the defaults:\n\n" + results.grid(["model", "values", "share"], rows)
    return text + ("\n\nBeside them, what is trained whole (`unfreeze`, norms, embeddings, biases)." if method.unfreeze else "")


@functools.cache
def joinable() -> dict[str, dict[str, str]]:
    """{first: {second: "" or why it is refused}} of all pairs `first+second`."""
    names = list_methods()
    found: dict[str, dict[str, str]] = {name: {} for name in names}
    for first in names:
        for second in names:
            if first != second:
                try:
                    get_method(f"{first}+{second}")
                    found[first][second] = ""
                except LorakitError as error:
                    found[first][second] = str(error)
    return found


def goes_with(entry: Entry, joined: dict[str, dict[str, str]]) -> str:
    """Which names may stand behind its own, or before it."""
    after = [other for other, why in joined[entry.name].items() if not why]
    before = [other for other in joined if other != entry.name and not joined[other][entry.name] and other not in after]
    lines = [f"`--method {entry.name}+OTHER` is accepted for {_links(after)}."] if after else []
    lines += [f"`--method OTHER+{entry.name}` also for {_links(before)}."] if before else []
    return "\n\n".join([*lines, "Any other pair is refused when it is built, with the reason. Any method trains on a base in four bits "
                        "(`--quantize nf4`) or is refused when it is attached."])  # fmt: skip


def _links(names: list[str]) -> str:
    return ", ".join(f"[`{name}`]({name}.md)" for name in names)


def outside(entry: Entry) -> str:
    """What other tools can read of it."""
    own = (name for name, kind in TYPES.items() if entry.name == name.lower() or entry.name in kind.table.native)
    native = FOLDER_OF.get(entry.name) or next(own, None)
    method = get_method(entry.name)
    merged = f"It is not merged: {method.beyond}." if method.beyond else "`lorakit merge` moves it into the weights, with proof."
    if native is not None:
        return f"PEFT's type `{native}`: `lorakit convert` writes it and `lorakit` reads it, exactly where PEFT can hold it. {merged}"
    return f"PEFT has no type of its own for it; `lorakit convert` writes a plain `LORA` where that is exact, or says why not. {merged}"


# ------------------------------------------------------------------------------------------------------------------------ words
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


GENERATED: dict[str, Callable[[], str]] = {"data-shapes": reference.data_shapes} | {
    f"{what}-{name.replace('_', '-')}": functools.partial(make, name)
    for name in moving.BY_NAME
    for what, make in (("keys", moving.keys), ("defaults", moving.defaults))
}
"""What a written page may ask for, by name."""
