"""Experts and routers between lorakit and the real PEFT: both directions, both layouts of stacked pairs, and 50 steps side by side."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen3_moe import modeling_qwen3_moe

import lorakit
from lorakit.adapters.io import load_adapter, save_adapter
from lorakit.adapters.peft import from_peft, to_peft
from lorakit.adapters.peft_experts import TAKEN, pack, unpack
from lorakit.adapters.peft_fields import VERSION
from lorakit.core.errors import AdapterMismatch, CheckpointError, NotExportable
from tests.adapters.subject import in_peft, logits, made_by_peft, quiet, shaken, tiny_model

LoRA = peft.LoraConfig
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
ARCHS = ("mixtral", "qwen3_moe", "gpt_oss")
PATTERNS = {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"layers.1.mlp.experts.*": 3.0}}

OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "experts": ("lora", {"sites": "experts"}),
    "with attention": ("lora", {"sites": "all-linear"}),
    "one of the two": ("lora", {"sites": ["down_proj", "q_proj"]}),
    "the other, in one layer": ("lora", {"sites": "layers.1.mlp.experts.gate_up_proj"}),
    "parts": ("lora", {"sites": ["gate_up_proj[up]", "down_proj"]}),
    "patterns": ("lora", {"sites": "experts", **PATTERNS}),
    "rslora": ("rslora", {"sites": "experts"}),
    "router": ("lora", {"sites": ["router", "experts", "v_proj"]}),
    "frozen A": ("lora_fa", {"sites": "experts"}),
    "dropout": ("lora", {"sites": "experts", "dropout": 0.1}),
}


def config_of(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "adapter_config.json").read_text())
    return {name: sorted(value) if isinstance(value, list) else value for name, value in found.items()}


def weights_of(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# -------------------------------------------------------------------------------------------------------------- both directions
ELSEWHERE = [(label, arch) for arch in ("qwen3_moe", "gpt_oss") for label in ("with attention", "parts", "router")]


@pytest.mark.parametrize(("label", "arch"), [*((label, "mixtral") for label in OURS), *ELSEWHERE])
def test_what_we_write_peft_loads_with_the_same_logits(label: str, arch: str, tmp_path: Path) -> None:
    method, kwargs = OURS[label]
    adapted = shaken(tiny_model(arch), method, r=4, **kwargs)
    adapter, want = adapted.state(), logits(adapted.model)
    assert to_peft(adapter, tmp_path, model=adapted.model).lines() == ["LORA, exact"]
    torch.testing.assert_close(logits(in_peft(tiny_model(arch), tmp_path)), want, atol=1e-5, rtol=1e-5)
    again = from_peft(tmp_path, model=tiny_model(arch))
    assert again.recipe == adapter.recipe
    assert same(dict(again.tensors), dict(adapter.tensors))
    if label != "parts":  # of which only the model knows the whole
        assert same(dict(from_peft(tmp_path).tensors), dict(adapter.tensors))


THEIRS: dict[str, Callable[[], Any]] = {
    "experts": lambda: LoRA(r=4, target_modules=[], target_parameters=BOTH),
    "with attention": lambda: LoRA(r=4, target_modules=["q_proj", "o_proj"], target_parameters=BOTH),
    "one": lambda: LoRA(r=4, lora_alpha=3, use_rslora=True, target_modules=[], target_parameters=["mlp.experts.down_proj"]),
    "patterns": lambda: LoRA(r=4, target_modules=["q_proj"], target_parameters=BOTH, **copy.deepcopy(PATTERNS)),
    "more ranks than rows": lambda: LoRA(r=40, target_modules=[], target_parameters=BOTH),
}
ALL_LINEAR = ("mixtral", "qwen3_moe")


def check_theirs(arch: str, config: Any, folder: Path, *, exact: bool = True) -> lorakit.Adapted:
    model = tiny_model(arch)
    with quiet():
        reference = logits(made_by_peft(model, config, folder / "theirs"))
    adapted = lorakit.load(model, folder / "theirs")
    torch.testing.assert_close(logits(adapted.model), reference, atol=1e-5, rtol=1e-5)
    adapter = adapted.state()
    to_peft(adapter, folder / "again", model=adapted.model)
    if exact:
        assert config_of(folder / "again") == config_of(folder / "theirs")
        assert same(weights_of(folder / "again"), weights_of(folder / "theirs"))
    save_adapter(adapter, folder / "ours")
    assert same(dict(load_adapter(folder / "ours").tensors), dict(adapter.tensors))
    return adapted


@pytest.mark.parametrize(
    ("label", "arch"), [*((label, "mixtral") for label in THEIRS), *((label, "gpt_oss") for label in ("experts", "one"))]
)
def test_what_peft_writes_we_load_with_the_same_logits_and_write_again(label: str, arch: str, tmp_path: Path) -> None:
    check_theirs(arch, THEIRS[label](), tmp_path, exact=label != "more ranks than rows")


@pytest.mark.parametrize("arch", ALL_LINEAR)
def test_all_linear_of_peft_means_experts_and_router_too(arch: str, tmp_path: Path) -> None:
    adapted = check_theirs(arch, LoRA(r=4, target_modules="all-linear"), tmp_path)
    found = {b.site.name.split(".", 3)[3]: b.delta.r for b in adapted.branches() if b.site.layer == 0}
    attention = dict.fromkeys((f"self_attn.{x}_proj" for x in "qkvo"), 4)
    assert found == attention | {"mlp.experts.gate_up_proj": 8, "mlp.experts.down_proj": 4, "mlp.gate.weight": 4}


# -------------------------------------------------------------------------------------------------------------------- the two layouts
def theirs_before(first: Tensor, second: Tensor, experts: int) -> Tensor:
    """What peft 0.18.1 (ParamWrapper.get_delta_weight) adds to a stacked parameter, whatever its dimensions mean, but for the scale."""
    A, B = first.reshape(experts, -1, first.shape[-1]), second.reshape(second.shape[0], -1, experts)
    return torch.einsum("o r e, e r i -> e i o", B, A)


def test_pack_and_unpack_are_inverse_and_mean_what_peft_means() -> None:
    gen = torch.Generator().manual_seed(0)
    A, B = torch.randn(3, 2, 5, generator=gen), torch.randn(3, 7, 2, generator=gen)
    for turned in (False, True):
        assert all(torch.equal(x, y) for x, y in zip(unpack(*pack(A, B, turned=turned), 3, turned=turned), (A, B), strict=True))
    torch.testing.assert_close(theirs_before(*pack(A, B, turned=True), 3), B @ A)  # stored [E, d_out, d_in]
    torch.testing.assert_close(theirs_before(*pack(A, B, turned=False), 3), (B @ A).mT)  # stored [E, d_in, d_out]


@pytest.mark.parametrize("arch", ARCHS)
def test_the_layout_before_0_19(arch: str, tmp_path: Path) -> None:
    adapted = shaken(tiny_model(arch), "lora", r=4, sites=["experts", "q_proj"])
    want = logits(adapted.model)
    to_peft(adapted.state(), tmp_path / "old", model=adapted.model, before_0_19=True)
    assert config_of(tmp_path / "old")["peft_version"] == "0.18.1"
    files = weights_of(tmp_path / "old")
    for branch in adapted.branches():
        if branch.site.experts is None:
            continue
        inner = ".base_layer" if branch.site.attribute == "gate_up_proj" else ""
        pair = (files[f"base_model.model.{branch.site.module}{inner}.lora_{x}.weight"] for x in "AB")
        stored = branch.weight().mT if arch == "gpt_oss" else branch.weight()
        torch.testing.assert_close(branch.delta.s * theirs_before(*pair, 4), stored.detach())
    again = lorakit.load(tiny_model(arch), tmp_path / "old")
    torch.testing.assert_close(logits(again.model), want, atol=1e-5, rtol=1e-5)
    (tmp_path / "old" / "lorakit.json").unlink()  # as PEFT would have written it
    found = from_peft(tmp_path / "old", model=tiny_model(arch))
    assert same(dict(found.tensors), dict(adapted.state().tensors))
    to_peft(found, tmp_path / "new", model=tiny_model(arch))  # the layout of today, and it says so
    assert config_of(tmp_path / "new")["peft_version"] == VERSION
    torch.testing.assert_close(logits(in_peft(tiny_model(arch), tmp_path / "new")), want, atol=1e-5, rtol=1e-5)
    with pytest.raises(NotExportable, match="give the model"):
        to_peft(found, tmp_path / "blind", before_0_19=True)


def edited(folder: Path, **fields: Any) -> Path:
    """Other fields, and no word of lorakit's."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    (folder / "lorakit.json").unlink(missing_ok=True)
    return folder


def square(**kwargs: Any) -> nn.Module:
    """gate_up_proj is 32 × 32, down_proj is 32 × 16."""
    return tiny_model("mixtral", intermediate_size=16, **kwargs)


@pytest.mark.parametrize("old", [False, True])
def test_square_weights_are_read_by_another_weight_or_by_the_version(old: bool, tmp_path: Path) -> None:
    for sites, told in (("experts", True), ("gate_up_proj", False)):
        adapted = shaken(square(), "lora", r=4, sites=sites)
        folder = tmp_path / sites
        to_peft(adapted.state(), folder, model=adapted.model, before_0_19=old)
        want = dict(adapted.state().tensors)
        assert same(dict(from_peft(edited(folder), model=square()).tensors), want)
        wrong = "0.19.0" if old else "0.18.3"
        found = dict(from_peft(edited(folder, peft_version=wrong), model=square()).tensors)
        assert same(found, want) == told  # where the shapes tell, the version does not matter
        edited(folder, peft_version=None)
        if told:
            assert same(dict(from_peft(folder, model=square()).tensors), want)
        else:
            with pytest.raises(CheckpointError, match=r"do not say whether PEFT wrote them before version 0.19.*add \"peft_version\""):
                from_peft(folder, model=square())


# ----------------------------------------------------------------------------------------------------------------------- refusals
def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    adapted = shaken(tiny_model("mixtral"), "lora", r=4, sites="experts")
    to_peft(adapted.state(), tmp_path, model=adapted.model)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    edited(tmp_path)
    with pytest.raises(CheckpointError, match="give the model"):
        from_peft(tmp_path)
    for fields, error, why in (
        ({"target_parameters": ["down_proj"]}, AdapterMismatch, r"experts.base_layer.* does not name among its target_parameters"),
        ({"target_parameters": ["up_proj"]}, AdapterMismatch, "does not name among its target_parameters"),
        ({"target_parameters": "down_proj"}, CheckpointError, "not a value that PEFT writes"),
        ({"r": 3}, AdapterMismatch, "4 ranks, and .* gives it r=3"),
    ):
        with pytest.raises(error, match=why):
            from_peft(edited(tmp_path, **{**config, **fields}), model=tiny_model("mixtral"))
    edited(tmp_path, **config)
    with pytest.raises(AdapterMismatch, match=r"are \(16, 32\) and \(128, 16\); its 4 experts of 96 × 32 need"):
        from_peft(tmp_path, model=tiny_model("mixtral", intermediate_size=48))
    files = weights_of(tmp_path)
    files.pop("base_model.model.model.layers.1.mlp.experts.lora_A.weight")
    safetensors.torch.save_file(files, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterMismatch, match=r"adapts 'model.layers.1.mlp.experts.down_proj', and the tensor"):
        from_peft(tmp_path, model=tiny_model("mixtral"))


def test_modules_that_peft_takes_for_experts_are_refused(tmp_path: Path) -> None:
    """PEFT 0.21 would adapt the stacks in their place, or refuse: the logits differ by 3."""
    model = tiny_model("qwen3_moe", mlp_only_layers=[0])
    adapted = shaken(model, "lora", r=4, sites="all-linear")
    with pytest.raises(NotExportable, match="PEFT takes 'gate_proj' in a model of type 'qwen3_moe' for its experts.* 3 modules"):
        to_peft(adapted.state(), tmp_path, model=model)


def test_the_names_that_peft_takes_are_the_real_ones() -> None:
    from peft.utils import transformers_weight_conversion as conversion

    names, kinds = conversion._MOE_TARGET_MODULE_MAPPING, conversion._MODEL_TO_CONVERSION_PATTERN
    real = {
        kind: set(names[family])
        for kind, family in kinds.items()
        if family in names and get_checkpoint_conversion_mapping(kind) is not None
    }
    assert {kind: set(taken) for kind, taken in TAKEN.items()} == real


# --------------------------------------------------------------------------------------------------------------------- side by side
STEPS = 50


class Wide(nn.Module):
    """RMSNorm in its input's precision; Transformers' own rounds to fp32 inside."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def routing(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mixtral's and Qwen3's router, in fp64."""
    scores = F.linear(x.reshape(-1, self.hidden_dim), self.weight)
    top, index = torch.topk(scores.softmax(-1), self.top_k, dim=-1)
    return scores, top / top.sum(-1, keepdim=True), index


@pytest.fixture
def in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    for norm in (modeling_mixtral.MixtralRMSNorm, modeling_qwen3_moe.Qwen3MoeRMSNorm):
        monkeypatch.setattr(norm, "forward", Wide.forward)
    for router in (modeling_mixtral.MixtralTopKRouter, modeling_qwen3_moe.Qwen3MoeTopKRouter):
        monkeypatch.setattr(router, "forward", routing)


def base(arch: str) -> nn.Module:
    model = tiny_model(arch, num_hidden_layers=1).double()
    model.config._experts_implementation = "eager"

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:  # Transformers' own rounds the logits to fp32
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    model.loss_function = loss
    return model


def train(model: nn.Module, parameters: list[nn.Parameter]) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.01)
    gen = torch.Generator().manual_seed(3)
    data = [torch.randint(0, 128, (2, 16), generator=gen) for _ in range(5)]
    losses = []
    for i in range(STEPS):
        loss = model(input_ids=data[i % 5], labels=data[i % 5]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def apart(arch: str, method: str, config: Any, sites: Any, *, alpha: float = 8.0) -> tuple[float, float]:
    """The largest difference of losses and of trained tensors."""
    model = base(arch)
    with quiet():
        theirs = peft.get_peft_model(copy.deepcopy(model), config).train()
    adapted = lorakit.attach(model.train(), lorakit.get_method(method, r=4, alpha=alpha, sites=sites))
    named = dict(theirs.named_parameters())
    stacks = [b.site.name for b in adapted.branches() if b.site.experts]

    def counterparts() -> list[tuple[tuple[Tensor, Tensor], list[nn.Parameter]]]:
        found = []
        for b in adapted.branches():
            module = b.site.module if b.site.experts is None else (b.site.module + (".base_layer" if "gate_up" in b.site.name else ""))
            pair = [named[f"base_model.model.{module}.lora_{x}.default.weight"] for x in "AB"]
            ours = (b.delta.A, b.delta.B) if b.site.experts is None else pack(b.delta.A, b.delta.B, turned=False)
            found.append((ours, pair))
        return found

    assert len(stacks) == 2
    with torch.no_grad():
        for ours, pair in counterparts():
            for a, b in zip(ours, pair, strict=True):
                b.copy_(a)
    losses = train(model, [p.tensor for p in adapted.params()])
    reference = train(theirs, [p for p in theirs.parameters() if p.requires_grad])
    assert reference[-1] < reference[0] - 0.1
    tensors = max((a - b).abs().max().item() for ours, pair in counterparts() for a, b in zip(ours, pair, strict=True))
    return max(abs(a - b) for a, b in zip(losses, reference, strict=True)), tensors


SIDE = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "target_parameters": BOTH}
SITES = ["q_proj", "v_proj", "experts"]


@pytest.mark.parametrize("method", ["lora", "rslora"])
@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe"])
def test_fifty_steps_side_by_side(arch: str, method: str, in_fp64: None) -> None:
    assert max(apart(arch, method, LoRA(**SIDE, use_rslora=method == "rslora"), SITES)) <= 1e-9


def test_a_scale_wrong_in_the_sixth_digit_is_seen(in_fp64: None) -> None:
    assert min(apart("mixtral", "lora", LoRA(**SIDE), SITES, alpha=8.0 * (1 + 1e-6))) > 1e-9
