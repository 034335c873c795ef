"""What `lorakit new-method` writes: a method and its test, from the two templates in templates/.

In a checkout they are `src/lorakit/methods/<heading>/<name>.py` and its mirror in tests/. Elsewhere they are `lorakit_<name>.py` and its
test, a plugin that an entry point of the group `lorakit.methods` makes known.
"""

import keyword
import re
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import jinja2

from lorakit.core.errors import BadParameter, did_you_mean


class Heading(NamedTuple):
    """One of the survey's headings: its section and its title."""

    section: str
    title: str


HEADINGS = {
    "lora": Heading("2.1", "LoRA itself"),
    "pretraining": Heading("2.4", "beyond fine-tuning: pre-training"),
    "continual": Heading("2.4", "beyond fine-tuning: continual learning"),
    "long_context": Heading("2.4", "beyond fine-tuning: long context"),
    "bottleneck": Heading("3.1", "breaking the low-rank bottleneck"),
    "rank_allocation": Heading("3.2", "rank allocation"),
    "learning": Heading("3.3", "learning procedure"),
    "paradigms": Heading("3.4", "other learning paradigms"),
    "mixing": Heading("4.2", "mixture with learned weights"),
    "experts": Heading("4.3", "mixture of LoRA experts"),
    "reduction": Heading("5.1", "parameter reduction"),
    "sharing": Heading("5.1.3", "parameter sharing"),
    "baselines": Heading("1", "the LoRA paper's baselines"),
    "quantized": Heading("5.2", "parameter quantization"),
}
PLUGIN = """register it in your pyproject.toml, then reinstall your package:
    [project.entry-points."lorakit.methods"]
    {name} = "lorakit_{name}\""""


def write(name: str, heading: str, root: Path) -> list[str]:
    """Write the files of a new method and return what to tell the user. Raises BadParameter before anything is written."""
    _check_name(name)
    if heading not in HEADINGS:
        raise BadParameter(f"no heading is called {heading!r}. {did_you_mean(heading, HEADINGS)}")
    if not root.is_dir():
        raise BadParameter(f"--root {root} is not a folder")
    checkout = (root / "src/lorakit/methods").is_dir()
    _check_new(name, root if checkout else None)
    pages = _in_checkout(name, heading) if checkout else _as_plugin(name, heading)
    for path in pages:
        if (root / path).exists():
            raise BadParameter(f"{root / path} exists already; choose another name or remove it first")
    if checkout:
        _open_heading(root / "src/lorakit/methods" / heading, HEADINGS[heading])
    for path, text in pages.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    hint = f"now: write its equations, run `lorakit show {name}`, add a line to CHANGELOG.md" if checkout else PLUGIN.format(name=name)
    return [*(f"wrote {root / path}" for path in pages), hint]


def _check_name(name: str) -> None:
    if re.fullmatch(r"[a-z][a-z0-9_]*", name) and not keyword.iskeyword(name):
        return
    better = re.sub(r"\W+", "_", name.lower()).strip("_")
    hint = f" Did you mean {better!r}?" if re.fullmatch(r"[a-z][a-z0-9_]*", better) and not keyword.iskeyword(better) else ""
    raise BadParameter(f"method name {name!r}: use lower-case letters, digits and '_', beginning with a letter, and no keyword.{hint}")


def _check_new(name: str, checkout: Path | None) -> None:
    """Names are unique over all headings, in the registry and in the checkout."""
    from lorakit.core.method import list_methods

    found = list((checkout / "src/lorakit/methods").glob(f"*/{name}.py")) if checkout else []
    if name in list_methods() or found:
        where = found[0] if found else f"`lorakit show {name}`"
        raise BadParameter(f"a method called {name!r} exists already: {where}")


def _in_checkout(name: str, heading: str) -> dict[Path, str]:
    module = f"lorakit.methods.{heading}.{name}"
    return {
        Path(f"src/lorakit/methods/{heading}/{name}.py"): _render("method.py.jinja", name, heading, module),
        Path(f"tests/methods/{heading}/test_{name}.py"): _render("test_method.py.jinja", name, heading, module),
    }


def _as_plugin(name: str, heading: str) -> dict[Path, str]:
    module = f"lorakit_{name}"
    return {
        Path(f"{module}.py"): _render("method.py.jinja", name, heading, module),
        Path(f"test_{module}.py"): _render("test_method.py.jinja", name, heading, module),
    }


def _open_heading(folder: Path, heading: Heading) -> None:
    """A heading's package exists as soon as it has a method."""
    folder.mkdir(exist_ok=True)
    init = folder / "__init__.py"
    if not init.exists():
        init.write_text(f'"""Survey {heading.section}: {heading.title}."""\n', encoding="utf-8")


def _render(template: str, name: str, heading: str, module: str) -> str:
    text = (files("lorakit.cli") / "templates" / template).read_text(encoding="utf-8")
    title = name.replace("_", " ").capitalize()
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(text).render(name=name, title=title, module=module, section=HEADINGS[heading].section)
