"""Flattened names and the modules they mean."""

import pytest
from torch import nn

import lorakit
from lorakit.adapters.kohya_names import Places, guessed, stripped
from lorakit.core.site import sites_of
from lorakit.data.tiny import ARCHITECTURES, tiny_model


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_site_of_every_architecture_is_found_again(arch: str) -> None:
    model = tiny_model(arch)
    places = Places(model)
    linear = [site for site in sites_of(model) if site.kind == "linear" and site.rows is None]
    for site in linear:
        assert places.site("lycoris_" + site.name.replace(".", "_")) == site
    assert len(linear) > 4


def test_a_path_that_lacks_its_beginning_or_has_more_of_it() -> None:
    places = Places(tiny_model("llama"))
    for name in ("lora_te1_layers_0_mlp_up_proj", "lora_te_language_model_model_layers_0_mlp_up_proj"):
        assert places.site(name).name == "model.layers.0.mlp.up_proj"
    with pytest.raises(lorakit.AdapterMismatch, match=r"can be model\.layers\.0\.mlp\.up_proj or model\.layers\.1\.mlp\.up_proj"):
        places.site("lora_te_up_proj")


def test_two_modules_of_one_flattened_name() -> None:
    model = nn.ModuleDict({"a_b": nn.ModuleDict({"c": nn.Linear(2, 2)}), "a": nn.ModuleDict({"b_c": nn.Linear(2, 2)})})
    with pytest.raises(lorakit.AdapterMismatch, match=r"can be a_b\.c or a\.b_c of this model"):
        Places(model).path("lycoris_a_b_c")


def test_none_and_no_linear_layer() -> None:
    places = Places(tiny_model("llama"))
    with pytest.raises(lorakit.AdapterMismatch, match=r"none of this model's.*--only PREFIX.*Did you mean 'model_layers_0_mlp_down_proj'"):
        places.site("lora_te_model_layers_0_mlp_down_prjo")
    with pytest.raises(lorakit.AdapterMismatch, match="which is no linear layer"):
        places.site("lycoris_model_layers_0_input_layernorm")
    with pytest.raises(lorakit.AdapterMismatch, match="which is an embedding"):
        places.site("lycoris_model_embed_tokens")


@pytest.mark.parametrize(
    ("name", "path", "layer", "role"),
    [
        ("lora_te_text_model_encoder_layers_11_self_attn_q_proj", "text_model.encoder.layers.11.self_attn.q_proj", 11, "q"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", "text_model.encoder.layers.0.mlp.fc1", 0, "up"),
        ("lycoris_model_layers_3_mlp_down_proj", "model.layers.3.mlp.down_proj", 3, "down"),
        ("lycoris_transformer_h_2_attn_c_attn", "transformer.h.2.attn.c_attn", 2, "qkv"),
        ("lora_te3_encoder_block_1_layer_0_SelfAttention_v", "encoder.block.1.layer.0.SelfAttention.v", 1, "v"),
        ("lora_unet_mid_block_attentions_0_proj_in", "mid_block_attentions_0_proj_in", None, "other"),
    ],
)  # fmt: skip
def test_without_a_model_the_usual_words_tell(name: str, path: str, layer: int | None, role: str) -> None:
    site = guessed(name, 4, 6)
    assert (site.name, site.layer, site.role, site.d_out, site.d_in) == (path, layer, role, 4, 6)


def test_the_prefix_alone_is_a_name() -> None:
    assert stripped("lora_unet_x") == "x"
    assert stripped("lora_unet_") == "lora_unet_"
    assert stripped("other_x") == "other_x"
