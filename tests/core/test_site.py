"""Sites: which there are, how they are chosen, and that the rows of fused weights are the model's own q, k, v, gate and up."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, CodeGenConfig, CodeGenForCausalLM

from lorakit import NoSuchSite, Site, attach, get_method, select
from lorakit.core.site import Beyond, sites_of, weight_shape
from lorakit.data.tiny import tiny_model
from tests.laws.subject import batch, logits


def names(model: nn.Module, where: Any) -> list[str]:
    return [s.name for s in select(model, where)]


def test_sites_have_the_shape_of_w_whatever_the_storage() -> None:
    llama, gpt2 = tiny_model("llama"), tiny_model("gpt2")
    (up,) = select(llama, "layers.1.mlp.up_proj")
    assert up == Site("model.layers.1.mlp.up_proj", "linear", 32, 64, 1, "up")
    (embed,) = select(llama, "embed_tokens")
    assert (embed.kind, embed.d_in, embed.d_out, embed.layer, embed.role) == ("embedding", 128, 32, None, "embed")
    (fc,) = select(gpt2, "h.0.mlp.c_fc")  # Conv1D stores d_in × d_out
    assert (fc.d_in, fc.d_out, fc.layer, fc.role) == (32, 128, 0, "up")
    assert weight_shape(gpt2.transformer.h[0].mlp.c_fc) == (128, 32)


ROLES = {
    "llama": {
        "q_proj": "q",
        "k_proj": "k",
        "v_proj": "v",
        "o_proj": "o",
        "gate_proj": "gate",
        "up_proj": "up",
        "down_proj": "down",
        "lm_head": "head",
    },
    "gpt2": {"attn.c_attn": "qkv", "attn.c_proj": "o", "mlp.c_fc": "up", "mlp.c_proj": "down", "lm_head": "head"},
    "gpt_neox": {"query_key_value": "qkv", "attention.dense": "o", "dense_h_to_4h": "up", "dense_4h_to_h": "down"},
    "bert": {"query": "q", "attention.output.dense": "o", "intermediate.dense": "up", "1.output.dense": "down", "decoder": "head"},
    "t5": {"SelfAttention.q": "q", "SelfAttention.o": "o", "DenseReluDense.wi": "up", "DenseReluDense.wo": "down", "lm_head": "head"},
}


@pytest.mark.parametrize("arch", ROLES)
def test_roles(arch: str) -> None:
    model = tiny_model(arch)
    for suffix, role in ROLES[arch].items():
        found = {s.role for s in sites_of(model) if s.name.endswith(suffix)}
        assert found == {role}, suffix


def test_presets() -> None:
    llama = tiny_model("llama")
    assert len(names(llama, "all-linear")) == 2 * 7
    assert "lm_head" not in names(llama, "all-linear")
    assert {n.rsplit(".", 1)[1] for n in names(llama, "attention")} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {n.rsplit(".", 1)[1] for n in names(llama, "mlp")} == {"gate_proj", "up_proj", "down_proj"}
    assert {n.rsplit(".", 1)[1] for n in names(llama, "qv")} == {"q_proj", "v_proj"}
    assert names(llama, "embedding") == ["model.embed_tokens"]
    assert names(llama, "attention-output") == [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
    assert names(llama, "mlp-output") == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    gpt2 = tiny_model("gpt2")
    assert names(gpt2, "qv") == [f"transformer.h.{i}.attn.c_attn[{r}]" for i in range(2) for r in "qv"]
    assert {n.split(".", 3)[3] for n in names(gpt2, "all-linear")} == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "bert", "roberta", "t5", "qwen2", "qwen3", "mistral"])
def test_all_linear_leaves_every_head_alone(arch: str, task: Any) -> None:
    chosen = names(tiny_model(arch, task=task), "all-linear")
    assert chosen
    assert not [n for n in chosen if n.split(".")[0] in ("lm_head", "embed_out", "score", "classifier", "classification_head", "cls")]


def runs(model: nn.Module, name: str) -> bool:
    """Whether a forward calls the module."""
    calls: list[int] = []
    handle = model.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
    logits(model, batch())
    handle.remove()
    return bool(calls)


def test_the_embedding_preset_is_of_tokens() -> None:
    for arch, want in (
        ("gpt2", ["transformer.wte"]),
        ("bert", ["bert.embeddings.word_embeddings"]),
        ("gpt_neox", ["gpt_neox.embed_in"]),
        ("t5", ["encoder.embed_tokens", "decoder.embed_tokens"]),  # `shared` is tied to both and is never called
    ):
        model = tiny_model(arch)
        assert names(model, "embedding") == want
        assert all(runs(model, name) for name in want)
    assert not runs(tiny_model("t5"), "shared")
    assert names(tiny_model("bert"), "position_embeddings")


def test_names_suffixes_globs_regexes_lists_and_predicates() -> None:
    model = tiny_model("llama")
    q = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert names(model, "q_proj") == q
    assert names(model, "self_attn.q_proj") == q
    assert names(model, q[1]) == q[1:]
    assert names(model, "*.0.*.q_proj") == q[:1]
    assert names(model, "model.layers.?.self_attn.q_proj") == q
    assert names(model, r"re:.*\.[qv]_proj") == names(model, "qv")
    assert names(model, ["v_proj", "q_proj"]) == names(model, "qv"), "model order, whatever the list's"
    assert names(model, ("qv", "q_proj")) == names(model, "qv"), "chosen once"
    assert names(model, lambda s: s.role == "q") == q


def message(model: nn.Module, where: Any) -> str:
    with pytest.raises(NoSuchSite) as caught:
        select(model, where)
    return str(caught.value)


def test_what_matches_nothing_is_an_error_that_names_the_nearest() -> None:
    model = tiny_model("llama")
    assert "Did you mean 'q_proj'" in message(model, "q_porj")
    assert "'q_porj'" in message(model, ["v_proj", "q_porj"]), "a list that half matches"
    assert "all-linear" in message(model, "all_linear")
    assert "none of the model's" in message(model, lambda s: False)
    assert "empty" in message(model, [])
    assert "'re:layers'" in message(model, "re:layers"), "a regex matches the full name"
    assert "'c_attn[z]'" in message(tiny_model("gpt2"), "c_attn[z]")


def test_a_preset_that_means_nothing_here_is_told_from_a_name() -> None:
    said = message(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ["all-linear", "mlp-output"])
    assert "the preset 'mlp-output'" in said
    assert "There are: 0, 1." in said


def test_the_first_layers_can_be_left_out() -> None:
    model = tiny_model("llama")
    assert names(model, Beyond("qv", 1)) == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    assert names(model, Beyond(("q_proj", "lm_head"), 1)) == ["model.layers.1.self_attn.q_proj", "lm_head"], "the head is in no layer"
    assert names(model, Beyond("qv", 0)) == names(model, "qv")
    for layers in (-1, 2):
        said = message(model, Beyond("qv", layers))
        assert f"leaving out {layers} layers is not possible with sites in 2 layers; expected 0 to 1" in said


def test_a_whole_and_its_part_cannot_both_be_chosen() -> None:
    assert "both" in message(tiny_model("gpt2"), ["c_attn", "c_attn[q]"])
    assert len(names(tiny_model("gpt2"), ["c_attn[q]", "c_attn[k]", "c_attn[v]"])) == 6


def test_modules_with_a_forward_of_their_own_are_left_alone() -> None:
    class Twice(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Renamed(nn.Linear):
        pass

    model = nn.Sequential(Twice(4, 4), Renamed(4, 4), nn.Linear(4, 4))
    assert [s.name for s in sites_of(model)] == ["1", "2"]


def test_an_adapted_model_has_the_same_sites() -> None:
    model = tiny_model("gpt2")
    before = sites_of(model)
    attach(model, get_method("lora", sites=["all-linear", "embedding"], unfreeze=("*.bias",)))
    assert sites_of(model) == before


# --- the rows of fused weights ------------------------------------------------------------------------------------------------

SEEN: list[tuple[Tensor, Tensor, Tensor]] = []


def spy(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, None]:
    """An attention function that only looks: [batch, heads, 1, d] of q, k and v."""
    SEEN.append((query, key, value))
    return torch.zeros(query.shape[0], query.shape[2], query.shape[1], query.shape[3]), None


AttentionInterface.register("spy", spy)


def _config(kind: str, **more: Any) -> Any:
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 64,
        "pad_token_id": 0,
    }
    return getattr(transformers, f"{kind}Config")(**{**shape, "pad_token_id": 0, **more})


FUSED = {
    "gpt2": lambda: tiny_model("gpt2"),
    "gpt_neox": lambda: tiny_model("gpt_neox"),
    "phi3, grouped": lambda: transformers.Phi3ForCausalLM(_config("Phi3", num_key_value_heads=2)),
}


@torch.no_grad()
@pytest.mark.parametrize("label", FUSED)
def test_parts_are_the_models_own_q_k_v(label: str) -> None:
    model = FUSED[label]().eval()
    model.set_attn_implementation("spy")
    sites = {s.role: s for s in sites_of(model) if s.layer == 0 and s.rows is not None and s.role in "qkv"}
    assert set(sites) == {"q", "k", "v"}
    fused: list[Tensor] = []
    hook = model.get_submodule(sites["q"].module).register_forward_hook(lambda m, args, y: fused.append(y))
    SEEN.clear()
    model(input_ids=torch.tensor([[5], [9]]))  # one token at position 0, where rotations are the identity
    hook.remove()
    for role, own in zip("qkv", SEEN[0], strict=True):
        rows = torch.cat([torch.arange(r.start, r.stop) for r in sites[role].rows or ()])
        part = fused[0][:, 0, rows]  # [batch, heads · d]
        heads = own[:, :, 0]  # [batch, heads, d]; grouped keys may come repeated
        repeats = heads.numel() // part.numel()
        assert sites[role].d_out == len(rows) == part.shape[1]
        torch.testing.assert_close(heads[:, ::repeats].reshape(part.shape), part)
    assert sorted(i for s in sites.values() for r in s.rows or () for i in r) == list(range(fused[0].shape[-1]))


@torch.no_grad()
def test_parts_are_the_models_own_gate_and_up() -> None:
    mlp = transformers.Phi3ForCausalLM(_config("Phi3")).model.layers[0].mlp
    x = torch.randn(3, 32)
    y = mlp.gate_up_proj(x)
    model = nn.ModuleDict({"mlp": mlp})
    part = {s.role: y[:, list(s.rows[0])] for s in sites_of(model) if s.rows}
    torch.testing.assert_close(mlp(x), mlp.down_proj(part["up"] * mlp.activation_fn(part["gate"])))


@torch.no_grad()
def test_adapting_a_part_moves_that_part_of_the_output_only() -> None:
    for arch, site in (("gpt2", "h.0.attn.c_attn[k]"), ("gpt_neox", "layers.0.attention.query_key_value[k]")):
        model = tiny_model(arch)
        adapted = attach(model, get_method("lora", sites=site))
        (branch,) = adapted.branches()
        branch.delta.B.normal_()
        x = torch.randn(5, 32)
        with adapted.disabled():
            before = branch.host.module(x)
        moved = (branch.host.module(x) != before).any(0).nonzero().flatten().tolist()
        assert moved == [i for r in branch.site.rows for i in r]


def bare(name: str, rows: int, **config: Any) -> nn.Module:
    """A model of one fused weight over 4 heads of 8."""
    model = nn.ModuleDict({name: nn.Linear(32, rows)})
    model.config = SimpleNamespace(num_attention_heads=4, hidden_size=32, **config)
    return model


@pytest.mark.parametrize(
    ("label", "model"),
    [
        ("grouped, Falcon", lambda: bare("query_key_value", (4 + 2) * 8)),  # 48 rows, divisible by 3 · 4
        ("one key head, GPT-BigCode", lambda: bare("c_attn", (4 + 2) * 8)),
        ("per head, GPT-BigCode", lambda: bare("c_attn", 3 * 32, model_type="gpt_bigcode")),
        ("no heads known", lambda: nn.ModuleDict({"c_attn": nn.Linear(32, 96)})),
        ("CodeGen", lambda: CodeGenForCausalLM(CodeGenConfig(n_embd=32, n_layer=1, n_head=4, rotary_dim=4, vocab_size=64))),
    ],
)
def test_a_fused_weight_in_another_order_is_adapted_whole_only(label: str, model: Any) -> None:
    fused = [s for s in sites_of(model()) if s.role in ("q", "k", "v", "qkv")]
    assert [(s.role, s.rows) for s in fused] == [("qkv", None)]


def test_cross_attention_keys_and_values_are_not_taken_for_three_parts() -> None:
    config = transformers.GPT2Config(n_embd=24, n_layer=1, n_head=4, add_cross_attention=True, vocab_size=64)  # 48 rows, divisible by 12
    model = transformers.GPT2LMHeadModel(config)
    assert {s.module for s in sites_of(model) if s.rows} == {"transformer.h.0.attn.c_attn"}
