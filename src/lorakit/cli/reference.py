"""The reference pages of the documentation, from what they describe: the commands' signatures, the configuration, the package's names."""

import inspect
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import typer

import lorakit
from lorakit.cli import results
from lorakit.core.method import COMMON, list_methods
from lorakit.data import recognize
from lorakit.data.row import KEYS
from lorakit.train.config import FIELDS, PRESET, TrainConfig
from lorakit.train.dialects.translate import aliases_of

COMMANDS, CONFIGURATION, PYTHON = "reference/commands.md", "reference/configuration.md", "reference/python.md"
TYPES = {"StoragePath": "Path", "NoneType": "None"}
COMMANDS_SAY = """Generated from the commands' signatures; `lorakit COMMAND --help` prints the same. An error of ours is one line on the
error stream and exit code 2; under `LORAKIT_DEBUG=1` it is a traceback."""
CONFIGURATION_SAYS = """# Configuration

Generated from `lorakit.train.config.TrainConfig`; `lorakit train --keys` prints the same. A key of the YAML file is a flag and the other
way round: `learning_rate: 1e-4` is `--learning-rate 1e-4`. Names are those of Transformers' `TrainingArguments` where they exist; the
last column has other tools' names for a key, which are read as well. An unknown key is an error that names the nearest."""


def pages() -> dict[str, str]:
    """Markdown by path."""
    return {COMMANDS: commands(), CONFIGURATION: configuration(), PYTHON: python()}


# ------------------------------------------------------------------------------------------------------------------- commands
def commands() -> str:
    """Every command with its flags."""
    from lorakit.cli.main import app

    parts = [
        "# Commands",
        COMMANDS_SAY,
    ]
    found = list(walk(typer.main.get_command(app), "lorakit"))
    parts.append(results.grid(["command", "what it does"], [[f"[`{path}`](#{anchor(path)})", summary(one)] for path, one in found]))
    return "\n\n".join([*parts, *(section(path, one) for path, one in found)]) + "\n"


def walk(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(`lorakit diagnose spectrum`, command), groups opened."""
    if isinstance(inner := getattr(command, "commands", None), dict):
        for name, one in inner.items():
            yield from walk(one, f"{path} {name}")
    else:
        yield path, command


def anchor(path: str) -> str:
    """Of a command's heading."""
    return path.replace(" ", "-")


def summary(command: Any) -> str:
    """The first sentence of its help."""
    return re.split(r"(?<=\.)\s", " ".join((command.help or "").split()))[0]


def section(path: str, command: Any) -> str:
    """One command: usage, help, arguments and flags."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    flags = [p for p in command.params if p not in arguments and p.name != "help"]
    settings = bool(command.context_settings.get("ignore_unknown_options"))
    words = [path, *map(_usage, arguments), *(["[flags]"] if flags or settings else [])]
    parts = [f"## {path} {{ #{anchor(path)} }}", f"```text\n{' '.join(words)}\n```", *_paragraphs(command.help or "")]
    parts += ["Further flags are the keys of its settings: [configuration](configuration.md), or the mixer's options."] if settings else []
    rows = [[f"`{_usage(a)}`", "", _help(a)] for a in arguments]
    rows += [[", ".join(f"`{o}`" for o in [*f.opts, *f.secondary_opts]), _default(f), _help(f)] for f in flags]
    return "\n\n".join([*parts, results.grid(["flag", "default", "meaning"], rows)] if rows else parts)


def _usage(argument: Any) -> str:
    name = (argument.metavar or argument.name).upper() + ("…" if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", inspect.cleandoc(text)) if part.strip()]


def _help(parameter: Any) -> str:
    return " ".join((getattr(parameter, "help", None) or "").split())


def _default(flag: Any) -> str:
    if flag.required:
        return "required"
    value = flag.default
    if value is None or value == () or repr(value).endswith("UNSET") or callable(value):
        return ""
    if getattr(flag, "is_flag", False):
        return "on" if value else "off"
    return f"`{getattr(value, 'value', value)}`"


# -------------------------------------------------------------------------------------------------------------- configuration
def configuration() -> str:
    """Every key of a run, and the common ones of methods."""
    rows = []
    for name in FIELDS:
        info = TrainConfig.model_fields[name]
        default = info.get_default(call_default_factory=True)
        also = "; ".join(f"{title}: {', '.join(f'`{key}`' for key in keys)}" for title, keys in aliases_of(name).items())
        cells = [f"`{annotation(info.annotation)}`", f"`{default!r}`", info.description or "", also]
        rows.append([f'<a id="{name}"></a>`{name}`', *cells])
    rows.append(['<a id="preset"></a>`preset`', "`str | None`", "`None`", PRESET, ""])
    own = [[f"`{name}`", meaning] for name, meaning in COMMON.items()]
    methods = ", ".join(f"[`{name}`](../methods/{name}.md#parameters)" for name in list_methods())
    return "\n\n".join(
        [
            CONFIGURATION_SAYS,
            results.grid(["key", "type", "default", "meaning", "also called"], rows),
            "## Of methods",
            "A method's parameters stand beside these keys, flat. Many have in common:",
            results.grid(["key", "meaning"], own),
            f"The others, and the defaults, are on the methods' pages: {methods}.",
        ]
    ) + "\n"  # fmt: skip


def annotation(hint: Any) -> str:
    """A type as one would write it."""
    text = inspect.formatannotation(hint) if not isinstance(hint, str) else hint
    text = re.sub(r"\b(?:typing\.)?Annotated\[([\w.]+), FieldInfo\((?:[^()]|\([^()]*\))*\)\]", r"\1", text)
    return re.sub(r"\b(?:typing|collections\.abc|pathlib|torch\.nn\.modules\.module|lorakit(?:\.\w+)+)\.", "", text)


# ----------------------------------------------------------------------------------------------------------------------- data
def data_shapes() -> str:
    """What rows are recognized by: the keys of each shape, and the names that many files have in their place."""
    say = {
        "chat": ["{conversations} with {from, value} (ShareGPT), {instruction, input?, output} (alpaca), {instruction, context, response}"],
        "pair": [_braces(names) for names in recognize.PAIRS],
        "classify": [_braces((_one(recognize.SENTENCES), _one(recognize.LABELS)))],
        "tag": [_braces((_one(recognize.TOKENS), _one(recognize.TAGS)))],
        "preference": ["without a prompt, as whole dialogs, as texts or as messages"],
        "feedback": ["{conversations, kto_tag}, as texts or as messages"],
        "text": [_braces((_one(recognize.TEXTS[1:]),))],
    }
    return results.grid(["shape", "keys", "also"], [[shape, f"`{_braces(keys)}`", ", ".join(say[shape])] for shape, keys in KEYS.items()])


def _braces(names: Sequence[str]) -> str:
    return "{" + ", ".join(names) + "}"


def _one(names: Sequence[str]) -> str:
    return "/".join(names)


# --------------------------------------------------------------------------------------------------------------------- Python
def python() -> str:
    """Every public name of `lorakit`, with signatures and docstrings."""
    names = [name for name in lorakit.__all__ if not _is_error(getattr(lorakit, name))]
    errors = [name for name in lorakit.__all__ if _is_error(getattr(lorakit, name))]
    parts = ["# Python", "Generated from the public names of `lorakit`. Rooms below it (`lorakit.train`, `lorakit.adapters`, …) are "
             "described in [the house](../house.md); their functions have docstrings of the same kind."]  # fmt: skip
    parts += [part for name in sorted(names, key=str.lower) for part in _name(name, getattr(lorakit, name))]
    rows = [[f"`{name}`", (inspect.getdoc(getattr(lorakit, name)) or "").split("\n")[0]] for name in sorted(errors)]
    return "\n\n".join([*parts, "## Errors", "Each is a `LorakitError` with one line.", results.grid(["error", "raised for"], rows)]) + "\n"


def _is_error(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, Exception)


def _name(name: str, thing: Any) -> Iterator[str]:
    yield f"## {name} {{ #{name} }}"
    yield f"```python\n{name}{signature(thing)}\n```"
    yield from _doc(thing)
    if isinstance(thing, type):
        for member, value in public(thing):
            if isinstance(value, property):
                yield f"**`{name}.{member}`**"
            else:
                yield f"```python\n{name}.{member}{signature(value)}\n```"
            yield from _doc(value)


def public(cls: type) -> list[tuple[str, Any]]:
    """Methods and properties that the class itself defines and documents, in the order of its source."""
    found = []
    for member, raw in vars(cls).items():
        value = getattr(cls, member) if isinstance(raw, staticmethod | classmethod) else raw
        if not member.startswith("_") and (isinstance(value, property) or inspect.isroutine(value)) and inspect.getdoc(value):
            found.append((member, value))
    return found


def signature(thing: Any) -> str:
    """`(model: nn.Module, …) -> Adapted`; nothing where there is none, or where a class' parameters are not the user's."""
    if typing.get_origin(thing) or (isinstance(thing, type) and inspect.isabstract(thing)):
        return ""
    try:
        made = inspect.signature(thing)
    except (TypeError, ValueError):
        return ""
    parameters = [p for name, p in made.parameters.items() if name != "self"]
    return annotation(str(made.replace(parameters=parameters))).replace("'", "")


def _doc(thing: Any) -> list[str]:
    """A docstring as Markdown: prose is prose, what is indented stays as it is."""
    text = inspect.getdoc(thing) or ""
    text = re.sub(r"^(Args|Returns|Raises|Yields):\n((?:    .*\n?)+)", _arguments, text, flags=re.MULTILINE)
    return [text] if text else []


def _arguments(match: re.Match[str]) -> str:
    lines = inspect.cleandoc(match[2]).split("\n")
    items: list[str] = []
    for line in lines:
        items = [*items[:-1], f"{items[-1]} {line.strip()}"] if line.startswith(" ") and items else [*items, line]
    listed = [re.sub(r"^([\w, ]+):", r"`\1`:", item) for item in items]
    return f"{match[1]}:\n\n" + "\n".join(f"- {item}" for item in listed) + "\n"
