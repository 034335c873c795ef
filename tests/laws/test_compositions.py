"""The laws hold for the combinations that users make: several methods at once are a method."""

from collections.abc import Callable

import pytest

from tests.laws import (
    test_l0_detach,
    test_l1_start,
    test_l2_l3_weight,
    test_l4_merge,
    test_l5_files,
    test_l6_l7_l8_trained,
    test_l9_oracle,
    test_l12_l13_replay,
    test_l14_checkpointing,
    test_l18_l19_l20_isolation,
)

NAMES = ("qlora+dora", "pissa+loraplus", "dora+rslora", "adalora+qlora", "relora+qlora")
CHECKS: dict[str, Callable[[str], None]] = {
    "L0": test_l0_detach.check_L0,
    "L1": test_l1_start.check_L1,
    "L2": test_l2_l3_weight.check_L2,
    "L3": test_l2_l3_weight.check_L3,
    "L4": test_l4_merge.check_L4,
    "L5": test_l5_files.check_L5,
    "L5 peft": test_l5_files.check_L5_peft,
    "L6": test_l6_l7_l8_trained.check_L6,
    "L7": test_l6_l7_l8_trained.check_L7,
    "L8": test_l6_l7_l8_trained.check_L8,
    "L9": test_l9_oracle.check_L9,
    "L12": test_l12_l13_replay.check_L12,
    "L13": test_l12_l13_replay.check_L13,
    "L14": test_l14_checkpointing.check_L14,
    "L18": test_l18_l19_l20_isolation.check_L18,
    "L19": test_l18_l19_l20_isolation.check_L19,
    "L20": test_l18_l19_l20_isolation.check_L20,
}


@pytest.mark.parametrize("law", CHECKS)
@pytest.mark.parametrize("name", NAMES)
def test_law_holds_for_the_composition(name: str, law: str) -> None:
    CHECKS[law](name)
