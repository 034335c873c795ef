"""The tables are the installed PEFT's."""

from importlib.metadata import version

import peft
import pytest

import lorakit
from lorakit.adapters.peft_fields import VERSION
from lorakit.adapters.peft_types import NATIVE, TYPES

CLASSES = {
    "LORA": peft.LoraConfig,
    "ADALORA": lambda: peft.AdaLoraConfig(total_step=1),
    "VERA": peft.VeraConfig,
    "VBLORA": peft.VBLoRAConfig,
    "FOURIERFT": peft.FourierFTConfig,
    "LOKR": peft.LoKrConfig,
}


@pytest.mark.parametrize("kind", TYPES)
def test_every_field_and_its_default(kind):
    theirs = {k: v.value if isinstance(v, peft.PeftType) else v for k, v in CLASSES[kind]().to_dict().items()}
    stored = {"inference_mode": True, "peft_version": VERSION} | ({"total_step": None} if kind == "ADALORA" else {})
    assert TYPES[kind].table.config == theirs | stored


def test_the_version_is_the_one_that_is_tested_against():
    assert version("peft") == VERSION


@pytest.mark.parametrize("kind", TYPES)
def test_every_field_is_followed_or_refused(kind):
    """A field that is followed is known to some type; one that is not followed is refused when it says anything."""
    known = set().union(*(other.table.config for other in TYPES.values()))
    assert known | {"runtime_config"} >= TYPES[kind].table.followed
    assert set(TYPES[kind].table.fits) <= set(TYPES[kind].table.config)


def test_a_method_is_of_one_type():
    assert len(NATIVE) == sum(len(kind.table.native) for kind in TYPES.values())
    assert set(NATIVE) <= set(lorakit.list_methods())


def test_heads_and_vocabulary_are_pefts():
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    from lorakit.adapters.peft_names import HEADS, VOCABULARY

    assert set(VOCABULARY) == set(EMBEDDING_LAYER_NAMES)
    assert set(HEADS) < {t.value for t in peft.TaskType}
