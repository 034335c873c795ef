"""PEFT's format, both ways: `to_peft` and `from_peft`.

    peft_names   keys of tensors, lists of modules          peft_write   an adapter as a folder
    peft_config  every field and its default                peft_read    a folder as an adapter
    peft_rank    ranks, scales, patterns                    peft_recipe  the closest recipe
    peft_form    which of PEFT's types holds what           peft_files   the files, and where each tensor belongs

PEFT itself need not be installed, and nothing here touches the network.
"""

from lorakit.adapters.peft_read import from_peft
from lorakit.adapters.peft_write import Exported, to_peft

__all__ = ["Exported", "from_peft", "to_peft"]
