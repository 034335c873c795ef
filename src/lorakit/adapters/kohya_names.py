"""From a module's name in a kohya or LyCORIS file to its path in a Transformers model.

    lora_te1_text_model_encoder_layers_0_self_attn_q_proj  ->  text_model.encoder.layers.0.self_attn.q_proj

Such files flatten paths: dots become underscores, which names of modules have, too. So nothing is guessed where there is a model: the names
of its own modules are flattened in the same way and compared. What was trained as a part of another model may lack the beginning of the
path, or have more of it; then the only module whose name ends so is meant. Two that fit are an error.
"""

import re

from torch import nn

from lorakit.core.errors import AdapterMismatch, did_you_mean
from lorakit.core.site import ROLE_OF, Site, ours, sites_of

PREFIX = re.compile(r"(lora_unet|lora_te\d*|lora_transformer|lora_prior_unet|lora_prior_te|lycoris)_(?=.)")
LAYERS = re.compile(r"(^|_)(layers|layer|h|block|blocks|resblocks)_(\d+)(?=_|$)")
BLOCKS = ("self_attn", "cross_attn", "attn", "attention", "mlp", "SelfAttention", "EncDecAttention", "DenseReluDense")
ROOTS = ("text_model", "language_model", "transformer", "model", "encoder", "decoder")
WORDS = re.compile(rf"^({'|'.join((*ROOTS, *BLOCKS))})_(?=.)")


def stripped(name: str) -> str:
    """A name in a file without its prefix."""
    return PREFIX.sub("", name, count=1) if PREFIX.match(name) else name


class Places:
    """A model's modules with parameters, by their flattened names."""

    def __init__(self, model: nn.Module) -> None:
        self.sites = {site.name: site for site in sites_of(model) if site.rows is None}
        self._paths: dict[str, list[str]] = {}
        for path, module in model.named_modules():
            if path and not ours(path) and next(module.parameters(recurse=False), None) is not None:
                self._paths.setdefault(path.replace(".", "_"), []).append(path)

    def path(self, name: str) -> str:
        """The one module that a name in a file means. Raises AdapterMismatch where there is none, or more than one."""
        flat = stripped(name)
        found = self._paths.get(flat) or [p for key, paths in self._paths.items() if _ends(key, flat) or _ends(flat, key) for p in paths]
        if not found:
            hint = did_you_mean(flat, self._paths)
            raise AdapterMismatch(
                f"the file's module {name} is none of this model's {len(self._paths)}; is it the model that was trained, and not another "
                f"part of it (--only PREFIX takes the modules of one)? {hint}".rstrip()
            )
        if len(found) > 1:
            raise AdapterMismatch(f"the file's module {name} can be {found[0]} or {found[1]} of this model: nothing says which is meant")
        return found[0]

    def site(self, name: str) -> Site:
        """The linear layer that it means."""
        path = self.path(name)
        site = self.sites.get(path)
        if site is None or site.kind != "linear":
            what = "an embedding" if site is not None else "no linear layer"
            raise AdapterMismatch(f"the file's module {name} is {path} in this model, which is {what}: it cannot be adapted so")
        return site


def _ends(longer: str, shorter: str) -> bool:
    return longer.endswith(f"_{shorter}")


def guessed(name: str, d_out: int, d_in: int) -> Site:
    """A site without a model: its path as far as the usual words of Transformers' models tell."""
    path = _dotted(stripped(name))
    numbers = [int(part) for part in path.split(".") if part.isdigit()]
    return Site(path, "linear", d_in, d_out, numbers[0] if numbers else None, ROLE_OF.get(path.rsplit(".", 1)[-1], "other"))


def _dotted(flat: str) -> str:
    """Known words from the left: roots, numbered layers, blocks; what is left is one name."""
    parts: list[str] = []
    while True:
        if (layer := LAYERS.match(flat)) is not None:
            parts += [layer[2], layer[3]]
            flat = flat[layer.end() :].removeprefix("_")
        elif (word := WORDS.match(flat)) is not None:
            parts.append(word[1])
            flat = flat[word.end() :]
        else:
            return ".".join([*parts, flat] if flat else parts)
