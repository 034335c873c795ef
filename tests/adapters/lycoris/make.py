"""Makes the fixtures beside it, with the real lycoris-lora (4.1.3): `PYTHONPATH=<its folder> python -m tests.adapters.lycoris.make`.

    <name>.safetensors         a file as its `save_weights` writes it, random values in every trained tensor
    <name>.delta.safetensors   by module, what its own modules add to weight and bias

The tests read these files and never import lycoris.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lorakit.data.tiny import tiny_model

HERE = Path(__file__).parent
SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
NAMES = ["*self_attn.q_proj", "*self_attn.k_proj", "*mlp.down_proj"]
NEOX = ("full", "norms")
NEOX_SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
NEOX_NAMES = ["*attention.dense", "*mlp.dense_4h_to_h", "*input_layernorm"]
"""A model with biases, and with norms that LyCORIS trains."""
ALGOS: dict[str, dict[str, Any]] = {
    "locon": {"algo": "locon"},
    "locon_rs": {"algo": "locon", "rs_lora": True},
    "dora": {"algo": "locon", "dora_wd": True},
    "dora_columns": {"algo": "locon", "dora_wd": True, "wd_on_output": False},
    "loha": {"algo": "loha"},
    "loha_dora": {"algo": "loha", "dora_wd": True},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr_both": {"algo": "lokr", "factor": -1, "decompose_both": True, "linear_dim": 1},
    "lokr_full": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "glora": {"algo": "glora"},
    "ia3": {"algo": "ia3"},
    "full": {"algo": "full", "train_norm": True},
    "norms": {"algo": "locon", "train_norm": True},
    "tlora": {"algo": "tlora"},
    "oft": {"algo": "diag-oft"},
    "boft": {"algo": "boft"},
}


class Convolutions(nn.Module):
    """What a picture model has and no text model: a 3 × 3 and a 1 × 1 kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(6, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 4, 1)


def made(name: str, model: nn.Module, settings: dict[str, Any], names: list[str] | None) -> None:
    from lycoris import LycorisNetwork, create_lycoris

    LycorisNetwork.apply_preset(
        {"target_module": [] if names else ["Convolutions"], "target_name": names or [], "use_fnmatch": True, "enable_conv": True}
    )
    options = {"linear_dim": 2, "linear_alpha": 3.0, **settings}
    network = create_lycoris(model, 1.0, **options)
    network.apply_to()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn_like(p))
    deltas = {}
    for trained in network.loras:
        for kind, value in zip(("weight", "bias"), change(trained), strict=True):
            if isinstance(value, torch.Tensor):
                deltas[f"{trained.lora_name}.{kind}"] = value.detach().float().contiguous()
    network.save_weights(str(HERE / f"{name}.safetensors"), torch.float32, {"ss_network_module": "lycoris.kohya"})
    save_file(deltas, HERE / f"{name}.delta.safetensors")


@torch.no_grad()
def change(trained: Any) -> tuple[Any, Any]:
    """Of weight and bias. A linear layer's as its forward has it (get_diff_weight has the scale of LoHa and LoKr twice)."""
    module = trained.org_module[0]
    if isinstance(module, nn.Linear) and getattr(trained, "name", "") != "full":
        bias = module(torch.zeros(1, module.in_features))[0]
        weight = (module(torch.eye(module.in_features)) - bias).T
        own = trained.org_forward
        before = own(torch.zeros(1, module.in_features))[0]
        moved = None if module.bias is None else bias - before
        return weight - (own(torch.eye(module.in_features)) - before).T, moved
    if getattr(trained, "name", "") in ("loha", "kron"):
        return trained.get_weight(trained.shape), None
    return trained.get_diff_weight(1.0)  # type: ignore[no-any-return]


def base(name: str) -> nn.Module:
    """The model of a fixture, but for the convolutions."""
    return tiny_model("gpt_neox", **NEOX_SIZE) if name in NEOX else tiny_model("llama", **SIZE)


def main() -> None:
    for name, settings in ALGOS.items():
        made(name, base(name), settings, NEOX_NAMES if name in NEOX else NAMES)
    for name, settings in {"conv": {}, "conv_tucker": {"use_tucker": True}}.items():
        for algo in ("locon", "loha", "lokr"):
            torch.manual_seed(1)
            made(
                f"{name}_{algo}",
                Convolutions(),
                {"algo": algo, "conv_dim": 1 if algo == "lokr" else 2, "conv_alpha": 3.0, "factor": 2, **settings},
                None,
            )
    by_kohya()


def clip() -> nn.Module:
    """A text encoder of Stable Diffusion's kind, tiny."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 64}
    return CLIPTextModel(CLIPTextConfig(**sizes, max_position_embeddings=16, projection_dim=16, bos_token_id=0, eos_token_id=1)).eval()


def by_kohya() -> None:
    """As kohya's sd-scripts drive LyCORIS, with the names that published files have: those of Transformers' CLIPTextModel before 5."""
    from lycoris.kohya import create_network

    text_encoder = clip()
    network = create_network(1.0, 2, 3.0, None, text_encoder, nn.Module(), algo="locon", preset="full")
    network.apply_to([text_encoder], nn.Module(), True, False)
    kept = [trained for trained in network.text_encoder_loras if "layers_1_self_attn" in trained.lora_name]
    torch.manual_seed(0)
    with torch.no_grad():
        for trained in kept:
            for p in trained.parameters():
                p.add_(0.3 * torch.randn_like(p))
    name = {t: t.lora_name.replace("lora_te_", "lora_te_text_model_") for t in kept}
    tensors = {f"{name[t]}.{key}": v.detach().half() for t in kept for key, v in t.state_dict().items()}
    save_file(tensors, HERE / "clip.safetensors", {"ss_network_module": "lycoris.kohya"})
    with torch.no_grad():
        for trained in kept:
            for p in trained.parameters():
                p.copy_(p.half())
    save_file({f"{name[t]}.weight": change(t)[0].contiguous() for t in kept}, HERE / "clip.delta.safetensors")


if __name__ == "__main__":
    main()
