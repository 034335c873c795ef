"""PEFT's format, both ways: `to_peft` and `from_peft`.

    peft_types/  PEFT's types, one file each                peft_write   an adapter as a folder
    peft_type    what a type is                             peft_read    a folder as an adapter
    peft_names   keys of tensors, lists of modules          peft_recipe  the closest recipe
    peft_fields  fields that several types have             peft_files   the files, and where each tensor belongs
    peft_config  a configuration, checked                   peft_form    a type for an adapter, or plain LoRA
    peft_rank    ranks, scales, patterns                    peft_saved   what is trained whole

PEFT itself need not be installed, and nothing here touches the network.
"""

from lorakit.adapters.peft_read import from_peft
from lorakit.adapters.peft_write import Exported, to_peft

__all__ = ["Exported", "from_peft", "to_peft"]
