"""What a configuration asks of a model before it is loaded: its type, and whether its tokenizer has a chat template of its own.

A local folder is read file by file. For a Hub name Transformers is asked, which may fetch its configuration: the model was named.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.core.errors import BadParameter


@dataclass(frozen=True)
class ModelFacts:
    """`model_type` as in config.json; `chat_template`: whether the tokenizer has one."""

    model_type: str
    chat_template: bool


def facts_of(name: str) -> ModelFacts:
    """The facts of a model folder, 'bundled', or a Hub name. Raises BadParameter."""
    from lorakit.train.source_model import resolve

    source = resolve(name)
    if os.path.isdir(source):
        return read_facts(Path(source))
    from transformers import AutoConfig

    from lorakit.train.source_model import load_tokenizer

    try:
        model_type = AutoConfig.from_pretrained(source).model_type
    except (OSError, ValueError) as error:
        raise BadParameter(f"cannot read the configuration of the model {name!r}: {str(error).splitlines()[0]}") from None
    return ModelFacts(str(model_type), load_tokenizer(name).chat_template is not None)


def read_facts(folder: Path) -> ModelFacts:
    """The facts of a local folder. Raises BadParameter."""
    return ModelFacts(_model_type(folder), _has_template(folder))


def _model_type(folder: Path) -> str:
    found = _read(folder / "config.json").get("model_type")
    if not isinstance(found, str):
        raise BadParameter(f"{folder / 'config.json'} names no model_type; give a folder that Transformers saved")
    return found


def _has_template(folder: Path) -> bool:
    files = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
    if any((folder / file).exists() for file in files):
        return True
    return (folder / "tokenizer_config.json").exists() and bool(_read(folder / "tokenizer_config.json").get("chat_template"))


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadParameter(f"cannot read {path}: {str(error).splitlines()[0]}; give a model's folder, a Hub name, or 'bundled'") from None
    return values if isinstance(values, dict) else {}
