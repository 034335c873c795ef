"""A PEFT folder read as an adapter: as the very one that lorakit wrote, or else by the recipe that is closest to its configuration.

The tensors say which modules are adapted; the configuration must agree. PiSSA's A₀, B₀ are not in the file: they are computed again from the base.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor, nn

from lorakit.adapters.folder import locate
from lorakit.adapters.io import check, read_weights
from lorakit.adapters.pair import Pair, rows_of, seen
from lorakit.adapters.peft_config import CONFIG, read_config
from lorakit.adapters.peft_names import PREFIX, VOCABULARY, matches, parsed, saved_module, targets
from lorakit.adapters.peft_rank import expressed, rank_in
from lorakit.adapters.peft_write import SIDE, WEIGHTS
from lorakit.adapters.record import Record, read_bounded, recipe_in
from lorakit.adapters.weights import unpack
from lorakit.core import random
from lorakit.core.adapter import UNFROZEN, Adapter
from lorakit.core.errors import AdapterMismatch, CheckpointError, did_you_mean
from lorakit.core.method import Method, Recipe, get_method
from lorakit.core.scale import RULES
from lorakit.core.site import Site, Where, select, sites_of
