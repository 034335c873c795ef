"""Tables for those who come from another tool: its keys and ours, from the very tables that a configuration is translated by."""

from lorakit.cli import results
from lorakit.train.config import FIELDS
from lorakit.train.dialects.rule import Dialect, Idle, Joint, Only, To, show
from lorakit.train.dialects.translate import DIALECTS

BY_NAME = {dialect.name: dialect for dialect in DIALECTS}


def keys(name: str) -> str:
    """What every key of a tool becomes: another name, read together with others, one value only, or nothing."""
    dialect = BY_NAME[name]
    parts = []
    for title, kind in (("Keys", (To, Joint)), ("Keys that are accepted at one value", Only), ("Keys without effect", Idle)):
        rows = [[f"`{key}`", becomes(dialect, key)] for key, rule in sorted(dialect.keys.items()) if isinstance(rule, kind)]
        parts += [f"### {title}", results.grid([dialect.title, "here"], rows)]
    return "\n\n".join(parts)


def becomes(dialect: Dialect, key: str) -> str:
    """One key in words."""
    rule = dialect.keys[key]
    if isinstance(rule, To):
        values = "; ".join(f"{show(theirs)} is {show(ours)}" for theirs, ours in rule.named.items() if theirs != ours)
        return _ours(rule.ours) + (f" ({values})" if values else "") if rule.ours != key else "the same"
    if isinstance(rule, Joint):
        named = [word for word in rule.ours.split() if word != key]
        return ", ".join(map(_ours, named)) if named else "the same" if rule.ours else "read with the others"
    if isinstance(rule, Only):
        allowed = " or ".join(f"`{show(value)}`" for value in rule.values if value not in ("", [], {}))
        if len(rule.values) and not allowed:
            allowed = "empty"
        return f"{allowed}; otherwise: {rule.instead}" if allowed else f"refused: {rule.instead}"
    return rule.why


def defaults(name: str) -> str:
    """What a tool's file learns with where it says nothing, since that is what it meant."""
    dialect = BY_NAME[name]
    rows = [[_ours(key), f"`{show(value)}`"] for key, value in dialect.defaults.items()]
    return results.grid(["key", f"{dialect.title}'s default, kept"], rows)


def _ours(key: str) -> str:
    return f"[`{key}`](../reference/configuration.md#{key})" if key in FIELDS else f"`{key}`"
