"""`--key value` flags for commands whose keys are a configuration's: the same names as in its YAML file."""

from typing import Any

from lorakit.core.errors import BadParameter


def parse_flags(args: list[str], *, strings: frozenset[str] = frozenset(), several: frozenset[str] = frozenset()) -> dict[str, Any]:
    """{key: value} from `--key value`, `--key=value`, `--flag`, `--no-flag` and `key=value`; dashes and underscores are one.

    Values are read as YAML, so that lists and mappings can be given ('[q_proj, v_proj]'); those of `strings` are taken as they are. A flag
    of `several` that is given again makes a list.
    """
    values: dict[str, Any] = {}
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") and "=" not in word:
            raise BadParameter(f"unexpected argument {word!r}; settings are given as --key value, several values as --key '[a, b]'")
        key, given, text = word.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if not given:
            if rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            else:
                text = "false" if key.startswith("no_") else "true"
                key = key.removeprefix("no_")
        written = key in several and (text.startswith("{") or (text.startswith("[") and text.endswith("]")))
        value = text if key in strings and not written else _value(key, text)
        again = key in several and key in values
        values[key] = [*(values[key] if isinstance(values[key], list) else [values[key]]), value] if again else value
    return values


def _value(key: str, text: str) -> Any:
    from lorakit.train.config_file import parse_value

    try:
        return parse_value(text)
    except ValueError as error:
        raise BadParameter(f"--{key} {text!r} cannot be read: {str(error).splitlines()[0]}") from None
