"""The tables are the installed PEFT's."""

from importlib.metadata import version

import peft
import pytest

from lorakit.adapters.peft_config import ADALORA, DEFAULTS, FOLLOWED, LORA, VERSION

CLASSES = {"LORA": peft.LoraConfig(), "ADALORA": peft.AdaLoraConfig(total_step=1)}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_every_field_and_its_default(kind):
    theirs = {k: v.value if isinstance(v, peft.PeftType) else v for k, v in CLASSES[kind].to_dict().items()}
    stored = {"inference_mode": True, "peft_version": VERSION} | ({"total_step": None} if kind == "ADALORA" else {})
    assert DEFAULTS[kind] == theirs | stored


def test_the_version_is_the_one_that_is_tested_against():
    assert version("peft") == VERSION


def test_every_field_is_followed_or_refused():
    """A field that is followed is known; one that is neither is refused when it says anything."""
    assert set(LORA) | set(ADALORA) | {"runtime_config"} >= FOLLOWED


def test_heads_and_vocabulary_are_pefts():
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    from lorakit.adapters.peft_names import HEADS, VOCABULARY

    assert set(VOCABULARY) == set(EMBEDDING_LAYER_NAMES)
    assert set(HEADS) < {t.value for t in peft.TaskType}
