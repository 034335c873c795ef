"""What a checked value should have been, as errors say it: found, then expected."""

import difflib
from typing import Any

_EXPECTED = {
    "int": "an integer", "float": "a number", "bool": "true or false", "string": "text", "dict": "a mapping {{key: value}}",
    "tuple": "a list", "is": "a {class}", "callable": "a function",
    "finite": "a finite number", "literal_error": "{expected}", "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}", "less_than": "less than {lt}", "less_than_equal": "at most {le}",
}  # fmt: skip


def expected(error: Any) -> str:
    """What one of pydantic's errors says was expected, in our words: "an integer", "at most 10"."""
    kind, context = error["type"], {k: f"{v:g}" if isinstance(v, float) else v for k, v in error.get("ctx", {}).items()}
    form = _EXPECTED.get(kind) or _EXPECTED.get(kind.split("_")[0])
    said: str = error["msg"] if form is None else form.format_map(context)
    if kind == "literal_error" and isinstance(error["input"], str):
        known = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        near = difflib.get_close_matches(error["input"], known, n=1, cutoff=0.5)
        said += f". Did you mean {near[0]!r}?" if near else ""
    return said
