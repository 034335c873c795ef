"""Columns of known formats -> rows in our seven shapes (see `row`), with the reason in a sentence.

A candidate is a format whose columns the first row has. One whose columns are among another's gives way to it ({prompt, completion} to
{prompt, completion, label}), an alias of a shape to the shape's own names. One must be left; two are an error that says what to type.
Rows that are in one of our shapes already go through unchanged; of others only what the shape needs is kept, and `kind`.

alpaca      {instruction, input?, output, system?, history?}, Dolly's {instruction, context, response}             -> chat
sharegpt    {conversations} with {from, value} or {role, content}; also under conversation and messages            -> chat
messages    OpenAI's, contents as parts joined; TRL's prompt and completion of messages                            -> chat
            ShareGPT's function_call and OpenAI's tool_calls become calls as templates expect them, with arguments that are objects;
            a row's `tools`, described as OpenAI does or by name, description and parameters alone, go to the template with it
preference  {prompt, chosen, rejected} of texts or messages, without a prompt, LLaMA-Factory's ranking, Anthropic's whole dialogs
feedback    {prompt, completion, label}, LLaMA-Factory's kto_tag
pair, classify, tag, text under their everyday names (PAIRS, TEXTS, LABELS, TAGS)
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from lorakit.core.errors import DataError, did_you_mean
from lorakit.data.records import Place, Records, parse_json
from lorakit.data.row import EXPECTED, KEYS, BadRow, Row, Shape, check_row, kind, names

PAIRS = (
    ("prompt", "response"), ("question", "answer"), ("question", "response"), ("query", "response"), ("query", "answer"),
    ("input", "output"), ("instruction", "response"), ("prompt", "output"), ("prompt", "answer"), ("input", "target"),
    ("source", "target"), ("text", "summary"), ("document", "summary"), ("article", "highlights"), ("problem", "solution"),
)  # fmt: skip
TEXTS = ("text", "content", "body")
SENTENCES = ("text", "sentence", "review", "content")
LABELS = ("label", "class", "category", "target")
TOKENS = ("tokens", "words")
TAGS = ("tags", "ner_tags", "labels")
TALKS = ("conversations", "conversation", "messages")
PROMPTS = ("prompt", "question", "query", "instruction", "input")
SYSTEMS = ("system", "system_prompt")
EXTRAS = ("input", "context")
ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant",
    "chatgpt": "assistant", "system": "system", "developer": "system", "tool": "tool", "observation": "tool", "function": "tool",
    "function_call": "assistant",
}  # fmt: skip
SPOKEN = frozenset(ROLES.values())
OURS = {key for keys in KEYS.values() for key in keys} | {
    "kind", "instruction", "input", "output", "system", "history", "conversations", "tools", "kto_tag", "role", "content",
}  # fmt: skip
"""What `columns` may map."""
FORMATS = ("text", "chat", "pair", "classify", "tag", "preference", "feedback", "alpaca", "sharegpt")
"""What `data_format` may ask for, beside auto."""

BESIDE = (*EXTRAS, *SYSTEMS, "history", "kto_tag", "tools")
"""What a format may have beside the columns that it is known by."""

Make = Callable[[Row, object], Row]


@dataclass(frozen=True)
class Format:
    """One way to read rows. `uses`: the columns that it reads; `how`: what becomes of them, as the reason says it."""

    name: str
    shape: Shape
    uses: tuple[str, ...]
    make: Make
    how: str = ""
    native: bool = False
    weak: bool = False
    """An alias that a shape's own names do not give way to: {text, category} may be text, or a text with its class."""
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def asked(self) -> str:
        """The data_format that asks for it."""
        return self.name if self.name in FORMATS else self.shape

    def row(self, records: Records, i: int) -> Row:
        """The i-th record as a row, checked. BadRow where it cannot be one."""
        where = Place(records, i)
        raw = records.read(i)
        if not isinstance(raw, dict):
            raise BadRow(f"{where} is {kind(raw)}, not an object", where, reason="not an object")
        row = self.make(renamed(raw, self.columns) if self.columns else raw, where)
        check_row(row, self.shape, where)
        return row

    def reason(self, found: Row) -> str:
        """What was recognized by what, and what is not used."""
        mapped = renamed(found, self.columns) if self.columns else found
        back = dict(self.columns)
        talks = self.shape == "chat" or (self.shape in ("preference", "feedback") and not isinstance(mapped.get("prompt"), str))
        shown = ("tools",) if talks and mapped.get("tools") else ()
        rest = [back.get(key, key) for key in mapped if key not in (*self.uses, "kind", *shown)]
        used = ", ".join(f"{back[key]} as {key}" if key in back else key for key in self.uses)
        what = f"{self.name}: column{'s' * (len(self.uses) > 1)} {used}"
        what += "; tools go to the chat template" if shown else ""
        return what + (f"; {self.how}" if self.how else "") + (f"; not used: {names(rest)[1:-1]}" if rest else "")


def recognize(first: Row, where: object, *, data_format: str = "auto", columns: Mapping[str, str] | None = None) -> Format:
    """The one format that the first row fits. `columns`: our names -> the file's. Raises BadRow."""
    columns = dict(columns or {})
    row = renamed(first, columns) if columns else first
    mapped = {key: row[key] for key in columns if key in row}
    if mapped:  # what is mapped decides; what a format may have beside it counts under its own name
        mapped = {key: row[key] for key in BESIDE if row.get(key) is not None} | mapped
    for part in (mapped, {key: value for key, value in row.items() if value is not None}, row):
        found = [one for one in _candidates(part) if data_format in ("auto", one.name, one.shape)]
        if found := _strongest(found):
            break
    if not found:
        what = f"no columns of {data_format} data" if data_format != "auto" else "no known set of keys"
        near = next((f" {hint}" for key in row if (hint := _hint(str(key), row))), "")
        yours = next((key for key in sorted(map(str, first)) if key.isidentifier() and len(key) < 40), "your_column")
        message = f"{where} has {what}: {names(row)}; expected {EXPECTED}, or map them: --columns '{{text: {yours}}}', ours: yours.{near}"
        raise BadRow(message, where, reason=what)
    if len(found) > 1:
        raise BadRow(f"{where} has {_choice(found, row)}", where, reason="keys of two kinds of data")
    form = found[0]
    form = _own(form, row) if form.native else form
    return replace(form, columns=columns)


def _hint(key: str, row: Row) -> str:
    near = did_you_mean(key, (o for o in OURS if o not in row), n=1) if key not in OURS and len(key) > 2 else ""
    return f"{near} (found {key!r})" if near.startswith("Did") else ""


def _choice(found: list[Format], row: Row) -> str:
    one, two = found[0], found[1]
    fits = f"keys of two kinds of data: {names(row)} fit {one.name} ({', '.join(one.uses)}) and {two.name} ({', '.join(two.uses)})"
    if one.asked != two.asked:
        return f"{fits}; give data_format={one.asked} or data_format={two.asked}"
    return f"{fits}; say which with columns={{{', '.join(f'{a}: {b}' for a, b in zip(KEYS[one.shape], one.uses, strict=False))}}}"


def _strongest(found: list[Format]) -> list[Format]:
    """Without aliases of a shape that is there by its own names, and without those whose columns are among another's."""
    own = {one.shape for one in found if one.native}
    found = [one for one in found if one.native or one.shape not in own or one.name != one.shape]
    return [one for one in found if not any(_covers(other, one) for other in found)]


def _covers(larger: Format, smaller: Format) -> bool:
    return set(smaller.uses) < set(larger.uses) and not (smaller.native and larger.weak)


def _candidates(row: Row) -> Iterator[Format]:
    """Every format whose columns the row has."""
    yield from _natives(row)
    yield from _talks(row)
    yield from _instructions(row)
    yield from _preferences(row)
    system = next((key for key in SYSTEMS if isinstance(row.get(key), str) and row[key]), None)
    for prompt, answer in PAIRS:
        if prompt in row and answer in row:
            weak = prompt in TEXTS
            if _flag(row.get("label")) is not None and not weak:
                make: Make = partial(_said, {"prompt": prompt, "completion": answer, "label": "label"})
                how = f"{prompt} is the prompt, {answer} the completion that label judges"
                yield Format("feedback", "feedback", (prompt, answer, "label"), make, how)
            if system is None:
                make = partial(_renaming, {"prompt": prompt, "completion": answer})
                yield Format("pair", "pair", (prompt, answer), make, f"{prompt} is the prompt, {answer} the completion", weak=weak)
            else:
                make = partial(_alpaca, (system, prompt, "", answer))
                how = f"{prompt} is the user's message, {answer} the assistant's"
                yield Format("chat", "chat", (system, prompt, answer), make, how, weak=weak)
    for text in (key for key in SENTENCES if key in row):
        for label in (key for key in LABELS if key in row and (text, key) != ("text", "label")):
            make = partial(_renaming, {"text": text, "label": label})
            yield Format("classify", "classify", (text, label), make, f"{text} is the text, {label} its class", weak=True)
    for tokens in (key for key in TOKENS if key in row):
        for tags in (key for key in TAGS if key in row and (tokens, key) != ("tokens", "tags")):
            make = partial(_tagged, tokens, tags)
            yield Format("tag", "tag", (tokens, tags), make, f"{tags} has a tag for each of {tokens}")
    for text in TEXTS[1:]:
        if text in row:
            yield Format("text", "text", (text,), partial(_renaming, {"text": text}), f"{text} is the text")


def _natives(row: Row) -> Iterator[Format]:
    """Rows in our shapes, by their own names; messages and lists in them may still be of a kind that has to be put right."""
    for shape in _own_shapes(row):
        keys = KEYS[shape]
        if shape == "chat":
            named = _is_shared(row["messages"])
            yield Format("sharegpt" if named else "chat", "chat", keys, partial(_chat, named), native=True)
        elif shape == "pair" and (_is_talk(row["prompt"]) or _is_talk(row["completion"])):
            how = "messages of the prompt are not trained on"
            yield Format("chat", "chat", keys, _prompted, how, native=True)
        else:
            yield Format(shape, shape, keys, partial(_native, shape), native=True)


def _own_shapes(row: Row) -> list[Shape]:
    """Shapes whose keys the row has; a pair may have another label beside it than feedback's."""
    found = [shape for shape, keys in KEYS.items() if all(key in row for key in keys)]
    return [shape for shape in found if shape != "feedback" or _flag(row["label"]) is not None]


def _own(form: Format, row: Row) -> Format:
    """The same for rows that have keys of other shapes too, which must not stay in them."""
    others = {key for shape in _own_shapes(row) for key in KEYS[shape]} - set(form.uses)
    return replace(form, make=partial(_without, form.make, frozenset(others))) if others else form


def _without(make: Make, others: frozenset[str], row: Row, where: object) -> Row:
    return make({key: value for key, value in row.items() if key not in others}, where)


def _talks(row: Row) -> Iterator[Format]:
    for key in TALKS:
        if key not in row or not _is_talk(row[key]):
            continue
        name = "sharegpt" if _is_shared(row[key]) or key != "messages" else "chat"
        uses = ("system", key) if row.get("system") else (key,)
        if "kto_tag" in row:
            yield Format(name, "feedback", (*uses, "kto_tag"), partial(_judged_talk, key), "kto_tag judges the last answer")
        elif _is_message(row.get("chosen")) and _is_message(row.get("rejected")):
            yield Format(name, "preference", (*uses, "chosen", "rejected"), partial(_ranked_talk, key), f"{key} is the prompt")
        elif key != "messages":
            yield Format("sharegpt", "chat", uses, partial(_shared, key), f"the turns of {key} are the messages")


def _instructions(row: Row) -> Iterator[Format]:
    if "instruction" not in row:
        return
    extra = next((key for key in EXTRAS if key in row), "")
    answer = next((key for key in ("output", "response") if key in row), "")
    system = next((key for key in SYSTEMS if key in row), "")
    if not answer or (answer == "response" and not extra):
        return
    uses = tuple(key for key in (system, "history" if "history" in row else "", "instruction", extra, answer) if key)
    make = partial(_alpaca, (system, "instruction", extra, answer))
    users = "instruction and " + extra + " become" if extra else "instruction becomes"
    how = f"{users} the user's message, {answer} the assistant's"
    if "kto_tag" in row:
        yield Format("alpaca", "feedback", (*uses, "kto_tag"), partial(_judged, make), f"{how}, judged by kto_tag")
    else:
        yield Format("alpaca", "chat", uses, make, how)


def _preferences(row: Row) -> Iterator[Format]:
    if "chosen" not in row or "rejected" not in row:
        return
    texts = isinstance(row["chosen"], str) and not _is_talk(row["chosen"])
    prompt = next((key for key in PROMPTS if key in row), "")
    if prompt == "prompt":
        return
    system = next((key for key in SYSTEMS if key in row), "")
    if prompt == "instruction" or (prompt and system):
        extra = "input" if "input" in row and prompt == "instruction" else ""
        uses = tuple(key for key in (system, prompt, extra, "chosen", "rejected") if key)
        how = f"{prompt}{' and ' + extra if extra else ''} the user's message, chosen and rejected the assistant's"
        yield Format("preference", "preference", uses, partial(_ranked, (system, prompt, extra)), how)
    elif prompt and texts:
        make = partial(_renaming, {"prompt": prompt, "chosen": "chosen", "rejected": "rejected"})
        yield Format("preference", "preference", (prompt, "chosen", "rejected"), make, f"{prompt} is the prompt")
    elif texts:
        how = "the prompt is what both dialogs begin with, up to the last 'Assistant:' in it"
        yield Format("preference", "preference", ("chosen", "rejected"), _dialogs, how)
    elif _is_talk(row["chosen"]):
        how = "the prompt is the messages that both begin with"
        yield Format("preference", "preference", ("chosen", "rejected"), _implicit, how)


# -- what formats make of a row ---------------------------------------------------------------------------------------------


def renamed(raw: Row, columns: Mapping[str, str]) -> Row:
    """The record under our names. `role` and `content` are names inside messages."""
    inside = {theirs: ours for ours, theirs in columns.items() if ours in ("role", "content")}
    outside = {ours: theirs for ours, theirs in columns.items() if ours not in ("role", "content")}
    taken = set(outside.values())
    row = {key: value for key, value in raw.items() if key not in taken and key not in outside}
    row |= {ours: raw[theirs] for ours, theirs in outside.items() if theirs in raw}
    for key in (*TALKS, "prompt", "completion", "chosen", "rejected"):
        if inside and isinstance(row.get(key), list):
            row[key] = [{inside.get(k, k): v for k, v in m.items()} if isinstance(m, dict) else m for m in row[key]]
    return row


def check_columns(columns: Mapping[str, str], first: Row, where: object) -> None:
    """DataError unless `columns` maps our names to columns that there are."""
    for ours, theirs in columns.items():
        if ours not in OURS:
            hint = f"Ours stand on the left: {{{theirs}: {ours}}}" if theirs in OURS else did_you_mean(ours, OURS)
            raise DataError(f"columns={{{ours}: {theirs}}}: {ours!r} is no name of ours. {hint}".rstrip())
        inside = [m for value in first.values() if isinstance(value, list) for m in value if isinstance(m, dict)]
        found = {key for m in inside for key in m} if ours in ("role", "content") else set(first)
        if theirs not in found:
            hint = did_you_mean(theirs, map(str, found))
            raise DataError(f"columns={{{ours}: {theirs}}}: {where} has no {theirs!r}, but {names(found)}. {hint}".rstrip())


def _kept(row: Row, made: Row, where: object) -> Row:
    """With what a row of any format may bring along: its kind, and the tools of a chat."""
    if row.get("kind") is not None:
        made["kind"] = int(row["kind"]) if isinstance(row["kind"], str) and row["kind"].isdecimal() else row["kind"]
    if "messages" in made or isinstance(made.get("prompt"), list):
        made |= _tools(row, where)
    return made


def _get(row: Row, key: str, where: object) -> Any:
    if key not in row:
        message = f"{where} has no {key!r}, but {names(row)}; the first row has one"
        raise BadRow(message, where, reason="other keys than the first row's", field=key)
    return row[key]


def _text(row: Row, key: str, where: object, *, optional: bool = False) -> str:
    value = row.get(key) if optional else _get(row, key, where)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"{where}: {key!r} is {kind(value)}; expected a string", where, reason=f"{kind(value)} for a string", field=key)
    if not value and not optional:
        raise BadRow(f"{where}: {key!r} is empty; leave the row out or give it text", where, reason="empty text", field=key)
    return value


def _native(shape: Shape, row: Row, where: object) -> Row:
    """Unchanged, unless something in it is written in another way."""
    change: Row = {}
    if shape == "tag":
        change = {key: parsed for key in KEYS["tag"] if key in row and (parsed := _list(row[key], where, key)) is not row[key]}
    elif shape == "feedback" and not isinstance(row.get("label"), bool) and _flag(row.get("label")) is not None:
        change["label"] = _flag(row["label"])
    if shape == "preference" and all(key in row for key in KEYS["preference"]):
        change |= _answers(row, where)
    elif shape == "feedback":
        change |= _lists(row, ("prompt", "completion"), where)
    if isinstance(row.get("kind"), str) and row["kind"].isdecimal():
        change["kind"] = int(row["kind"])
    if shape in ("preference", "feedback") and isinstance(change.get("prompt", row.get("prompt")), list):
        change |= _tools(row, where)
    return row | change if change else row


def _lists(row: Row, keys: tuple[str, ...], where: object) -> Row:
    """Those of the keys that are lists of messages, as ours; {} where nothing changes."""
    found = {key: _messages(row[key], where, key) for key in keys if _is_talk(row.get(key))}
    return {key: value for key, value in found.items() if value is not row[key]}


def _answers(row: Row, where: object) -> Row:
    """A preference whose parts are messages in different ways: all as lists, the answers without the prompt."""
    given = {key: [row[key]] if _is_message(row[key]) else row[key] for key in KEYS["preference"]}
    talks = [key for key, value in given.items() if _is_talk(value)]
    if not talks:
        return {}
    made = {key: _messages(given[key], where, key) for key in talks}
    if "prompt" not in made and "chosen" in made and "rejected" in made:
        start = _common(made["chosen"], made["rejected"])
        if start or isinstance(row["prompt"], str):
            made["prompt"] = made["chosen"][:start] or [{"role": "user", "content": row["prompt"]}]
            made |= {key: made[key][start:] for key in ("chosen", "rejected")}
    for key in ("chosen", "rejected"):
        if key not in made and isinstance(row[key], str):
            made[key] = [{"role": "assistant", "content": row[key]}]
    return {key: value for key, value in made.items() if value is not row[key]}


def _renaming(columns: dict[str, str], row: Row, where: object) -> Row:
    return _kept(row, {ours: _get(row, theirs, where) for ours, theirs in columns.items()}, where)


def _said(columns: dict[str, str], row: Row, where: object) -> Row:
    return _native("feedback", _renaming(columns, row, where), where)


def _tagged(tokens: str, tags: str, row: Row, where: object) -> Row:
    return _kept(row, {"tokens": _list(_get(row, tokens, where), where, tokens), "tags": _list(_get(row, tags, where), where, tags)}, where)


def _chat(shared: bool, row: Row, where: object) -> Row:
    """Our own chat; a row without messages is left to `check_row`. `shared`: roles go by ShareGPT's names."""
    messages = _messages(row["messages"], where, "messages", shared=shared) if "messages" in row else None
    tools = _tools(row, where)
    return row if messages is row.get("messages") and not tools else row | {"messages": messages} | tools


def _talk(key: str, row: Row, where: object) -> list[Row]:
    """The messages under some name, after the system's, which may have a column of its own."""
    messages: list[Row] = _messages(_get(row, key, where), where, key, shared=True)
    system = _text(row, "system", where, optional=True)
    if system and isinstance(messages[0], dict) and messages[0].get("role") != "system":
        return [{"role": "system", "content": system}, *messages]
    return messages


def _shared(key: str, row: Row, where: object) -> Row:
    return _kept(row, {"messages": _talk(key, row, where)}, where)


def _prompted(row: Row, where: object) -> Row:
    prompt = [{**m, "train": False} for m in _messages(_get(row, "prompt", where), where, "prompt")]
    return _kept(row, {"messages": [*prompt, *_messages(_get(row, "completion", where), where, "completion")]}, where)


def _users(columns: tuple[str, str, str], row: Row, where: object) -> list[Row]:
    """The messages before the answer: system, what was said before, and the user's. What the first row did not have a later one may."""
    system, prompt, extra = columns
    system = system or next((key for key in SYSTEMS if row.get(key)), "")
    extra = extra or (next((key for key in EXTRAS if row.get(key)), "") if prompt == "instruction" else "")
    made = [{"role": "system", "content": text}] if (text := _text(row, system, where, optional=True)) else []
    for i, turn in enumerate(_list(row.get("history") or [], where, "history"), 1):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(part, str) for part in turn):
            message = f"{where}: turn {i} of 'history' is {kind(turn)}; expected [what the user said, the answer]"
            raise BadRow(message, where, reason="a history that is no list of pairs", field="history")
        made += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    said = [part for part in (_text(row, prompt, where, optional=bool(extra)), _text(row, extra, where, optional=True)) if part]
    if not said:
        raise BadRow(f"{where}: {prompt!r} is empty; leave the row out or give it text", where, reason="empty text", field=prompt)
    return [*made, {"role": "user", "content": "\n".join(said)}]


def _alpaca(columns: tuple[str, str, str, str], row: Row, where: object) -> Row:
    answer = {"role": "assistant", "content": _text(row, columns[3], where)}
    _get(row, columns[1], where)
    return _kept(row, {"messages": [*_users(columns[:3], row, where), answer]}, where)


def _judgment(row: Row, where: object) -> bool:
    flag = _flag(_get(row, "kto_tag", where))
    if flag is None:
        message = f"{where}: 'kto_tag' is {kind(row['kto_tag'])}; expected true or false"
        raise BadRow(message, where, reason="no true or false for a label", field="kto_tag")
    return flag


def _judged(make: Make, row: Row, where: object) -> Row:
    *prompt, answer = make(row, where)["messages"]
    return _kept(row, {"prompt": prompt, "completion": [answer], "label": _judgment(row, where)}, where)


def _judged_talk(key: str, row: Row, where: object) -> Row:
    *prompt, answer = _talk(key, row, where)
    if not prompt or not isinstance(answer, dict) or answer.get("role") != "assistant":
        message = f"{where}: {key!r} does not end with an answer of the assistant's after what it answers"
        raise BadRow(message, where, reason="no answer to judge", field=key)
    return _kept(row, {"prompt": prompt, "completion": [answer], "label": _judgment(row, where)}, where)


def _ranked(columns: tuple[str, str, str], row: Row, where: object) -> Row:
    made: Row = {"prompt": _users(columns, row, where)}
    for key in ("chosen", "rejected"):
        value = _get(row, key, where)
        if isinstance(value, str):
            value = [{"role": "assistant", "content": _text(row, key, where)}]
        made[key] = _messages([value] if _is_message(value) else value, where, key, shared=True)
    return _kept(row, made, where)


def _ranked_talk(key: str, row: Row, where: object) -> Row:
    made: Row = {"prompt": _talk(key, row, where)}
    for answer in ("chosen", "rejected"):
        made[answer] = _messages([_get(row, answer, where)], where, answer, shared=True)
    return _kept(row, made, where)


def _implicit(row: Row, where: object) -> Row:
    chosen, rejected = (_messages(_get(row, key, where), where, key, shared=True) for key in ("chosen", "rejected"))
    start = _common(chosen, rejected)
    if not start:
        message = f"{where}: 'chosen' and 'rejected' begin with different messages, so there is no prompt; give it in a column 'prompt'"
        raise BadRow(message, where, reason="no common prompt", field="prompt")
    return _kept(row, {"prompt": chosen[:start], "chosen": chosen[start:], "rejected": rejected[start:]}, where)


def _common(one: list[Row], two: list[Row]) -> int:
    """How many messages both begin with, leaving each at least one of its own."""
    n = 0
    while n < min(len(one), len(two)) - 1 and one[n] == two[n]:
        n += 1
    return n


def _dialogs(row: Row, where: object) -> Row:
    chosen, rejected = _text(row, "chosen", where), _text(row, "rejected", where)
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
    at = chosen.rfind("Assistant:", 0, same)
    if at < 0:
        message = f"{where}: 'chosen' and 'rejected' have no common beginning with 'Assistant:'; give the prompt in a column 'prompt'"
        raise BadRow(message, where, reason="no common prompt", field="prompt")
    at += len("Assistant:")
    return _kept(row, {"prompt": chosen[:at], "chosen": chosen[at:], "rejected": rejected[at:]}, where)


# -- messages ---------------------------------------------------------------------------------------------------------------


def _flag(value: Any) -> bool | None:
    """True and false, also as tables without types write them."""
    if isinstance(value, bool):
        return value
    return {"true": True, "false": False}.get(value.strip().lower()) if isinstance(value, str) else None


@dataclass(frozen=True)
class _Part:
    """A part of a row as errors call it. Where the row stands costs a pass over the file: it is asked for errors alone."""

    where: object
    part: str

    def __str__(self) -> str:
        return f"{self.where}: {self.part}"


def _list(value: Any, where: object, key: str) -> Any:
    """A list, also one that a table without types holds as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        return parse_json(value, _Part(where, repr(key)), expected="a list")
    if not isinstance(value, list):
        raise BadRow(f"{where}: {key!r} is {kind(value)}; expected a list", where, reason=f"{kind(value)} for a list", field=key)
    return value


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ({"from", "value"} <= value.keys() or {"role", "content"} <= value.keys())


def _is_talk(value: Any) -> bool:
    """Whether it looks like messages: a list of objects, or the JSON of one."""
    return (isinstance(value, list) and bool(value) and isinstance(value[0], dict)) or (
        isinstance(value, str) and value.lstrip()[:1] == "[" and value.lstrip()[1:].lstrip()[:1] == "{"
    )


def _is_shared(value: Any) -> bool:
    if isinstance(value, str):
        return '"from"' in value[:200]
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "from" in value[0]


def _messages(value: Any, where: object, key: str, *, shared: bool = False) -> Any:
    """A list of messages as ours; the list itself where nothing changes. `shared`: roles go by the names of ROLES and no others."""
    messages = _list(value, where, key)
    if not messages:
        raise BadRow(f"{where}: {key!r} is an empty list; expected messages", where, reason="an empty list for messages", field=key)
    made = [_message(message, where, key, i, shared) for i, message in enumerate(messages, 1)]
    return messages if all(a is b for a, b in zip(made, messages, strict=True)) else made


def _message(message: Any, where: object, key: str, i: int, shared: bool) -> Any:
    if not isinstance(message, dict):
        return message  # what is wrong with it `check_row` says
    role, content = message.get("role"), message.get("content")
    usual = isinstance(content, str) and (role in SPOKEN if shared else isinstance(role, str)) and not message.get("tool_calls")
    if usual and isinstance(message.get("train", True), bool) and None not in message.values() and "weight" not in message:
        return message  # a table gives every message the fields of all, and templates ask whether `tool_calls` is there
    made = {k: v for k, v in message.items() if v is not None or k in ("role", "content")}
    if "from" in message and "role" not in message:
        made |= {"role": made.pop("from", None), "content": made.pop("value", None)}
        shared = True
    if shared and isinstance(made.get("role"), str):
        if made["role"].lower() == "function_call" and (calls := _said_calls(made.get("content"))):
            made |= {"content": "", "tool_calls": calls}
        made["role"] = _role(made["role"], where, key, i)
    if made.get("tool_calls"):
        made |= {
            "content": made.get("content") or "",
            "tool_calls": _calls(made["tool_calls"], _Part(where, f"message {i} of {key!r}"), where),
        }
    if isinstance(made.get("content"), list):
        made["content"] = "".join(_part(part, where, key, i) for part in made["content"])
    if "weight" in made and "train" not in made:  # OpenAI's name for it: 0 or 1
        made["train"] = {0: False, 1: True}.get(made["weight"], made["weight"]) if isinstance(made["weight"], int) else made["weight"]
        del made["weight"]
    return made


def _tools(row: Row, where: object) -> Row:
    """{"tools": functions described as OpenAI does}, of a list or the JSON of one; {} where the row has none. BadRow for anything else."""
    if not row.get("tools"):
        return {}
    tools = []
    for i, tool in enumerate(_list(row["tools"], where, "tools"), 1):
        tool = _filled(tool)
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            what = names(tool) if isinstance(tool, dict) else kind(tool)
            message = f"{where}: tool {i} is {what}; expected {{type: function, function: {{name, description, parameters}}}}"
            raise BadRow(message, where, reason="a tool without a name", field="tools")
        tools.append({"type": "function", "function": inner})
    return {"tools": tools}


def _calls(value: Any, name: object, where: object) -> list[Row]:
    """Calls as templates expect them: arguments are an object, not the JSON of one."""
    made = []
    for call in value if isinstance(value, list) else [value]:
        call = _filled(call)
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            message = f"{name} has a tool call that is {kind(call)} without a name; expected {{function: {{name, arguments}}}}"
            raise BadRow(message, where, reason="a tool call without a name", field="tool_calls")
        arguments = inner.get("arguments", {})
        if isinstance(arguments, str):
            said = _parsed(arguments)
            arguments = said if isinstance(said, dict) else arguments
        outer = {key: value for key, value in call.items() if key in ("id", "type")}
        made.append({"type": "function"} | outer | {"function": {"name": inner["name"], "arguments": arguments}})
    return made


def _said_calls(content: Any) -> list[Row]:
    """What ShareGPT's function_call says: a call, or a list of them, as JSON; none where it is written in another way."""
    said = _parsed(content)
    calls = said if isinstance(said, list) else [said]
    return calls if calls and all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls) else []


def _parsed(text: Any) -> Any:
    """The value of a JSON text; None for anything else."""
    if isinstance(text, str):
        with suppress(BadRow):
            return parse_json(text, "", expected="")
    return None


def _filled(value: Any) -> Any:
    """Without the empty fields that a table gives every object."""
    if isinstance(value, dict):
        return {key: _filled(inner) for key, inner in value.items() if inner is not None}
    return [_filled(inner) for inner in value] if isinstance(value, list) else value


def _role(role: str, where: object, key: str, i: int) -> str:
    if role.lower() not in ROLES:
        known = ", ".join(ROLES)
        message = f"{where}: message {i} of {key!r} is from {role[:40]!r}; known roles: {known}"
        raise BadRow(message, where, reason="unknown role", field=key)
    return ROLES[role.lower()]


def _part(part: Any, where: object, key: str, i: int) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    what = str(part.get("type", "no type"))[:40] if isinstance(part, dict) else kind(part)
    message = f"{where}: message {i} of {key!r} has a part of type {what!r}; only text is read"
    raise BadRow(message, where, reason="a part of a message that is no text", field=key)
