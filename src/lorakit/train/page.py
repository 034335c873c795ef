"""Pages of one file: templates/*.jinja rendered with everything escaped, and nothing fetched from elsewhere."""

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import jinja2

from lorakit.train.chart import brief, minus
from lorakit.train.log import replace_file

TEMPLATES = Path(__file__).parent / "templates"
LONGEST = 3000
"""Characters of one text that a page shows at most."""
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


@functools.cache
def environment() -> jinja2.Environment:
    """Where templates live. Every value is escaped; a name that a template misspells is an error."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    found.filters |= {
        "figure": figure,
        "plain": plain,
        "size": size,
        "duration": duration,
        "signed": signed,
        "minus": minus,
        "spelled": spelled,
    }
    return found


def render(template: str, **values: Any) -> str:
    """The page as text that UTF-8 can hold."""
    return environment().get_template(template).render(values)


def write(path: Path, text: str) -> Path:
    """A page as a file that is there whole or not at all."""
    return replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8", errors="replace", newline="\n"))


def plain(value: Any, limit: int = LONGEST) -> str:
    """Any value as text to be read: lists and mappings as JSON, control and direction characters as visible marks, the end of what is
    longer than `limit` left out."""
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    cut = len(text) - limit
    text = text if cut <= 0 else f"{text[:limit]} … ({cut:,} more characters)"
    return _HIDDEN.sub(_visible, text.replace("\r\n", "\n"))


def _visible(found: re.Match[str]) -> str:
    code = ord(found[0])
    return chr(0x2400 + code) if code < 0x20 else "\ufffd"


def figure(value: Any) -> str:
    """A figure of a run: a number in about four digits, a dash for none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else plain(value, 200)
    return minus(f"{value:,}" if isinstance(value, int) else brief(value) if abs(value) < 1e9 else f"{value:.3g}")


def spelled(key: str) -> str:
    """The key of a figure as people write it."""
    return "KL" if key == "kl" else key.replace("_", " ").replace("f1", "F1")


def signed(value: float | None) -> str:
    """A difference with its sign, a true minus among them."""
    if value is None or not math.isfinite(value):
        return "–"
    return ("+" if value > 0 else "−" if value < 0 else "±") + figure(abs(value))


def size(count: float | None) -> str:
    """Bytes in the unit that suits them (10⁹ bytes are a GB)."""
    if count is None or not math.isfinite(count):
        return "–"
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(count) >= unit:
            return f"{count / unit:.3g} {name}" if abs(count) < 999.5 * unit else f"{count / unit:,.0f} {name}"
    return f"{count:.0f} bytes"


def duration(seconds: float | None) -> str:
    """Seconds as 3.2 s, 4 min 05 s or 2 h 10 min."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 59.5:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {s:02} s"
