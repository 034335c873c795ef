"""PEFT's X-LoRA folders, both ways, against the real PEFT; and 50 steps of the gate in fp64 beside it."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorakit
from lorakit import attach, get_method
from lorakit.adapters.io import load_adapter
from lorakit.adapters.peft import from_peft, to_peft
from lorakit.core.attach import attach_adapter
from lorakit.core.errors import AdapterMismatch, BadParameter, CheckpointError, NotExportable
from tests.adapters.subject import quiet, tiny_model
from tests.laws.subject import awaken, batch, far, logits

STEPS = 50
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep": {"xlora_depth": 3, "xlora_size": 8},
    "no dropout": {"xlora_depth": 2, "xlora_size": 8, "xlora_dropout_p": 0.0},
    "layerwise": {"layerwise_scalings": True, "softmax_temperature": 0.5, "global_scaling_weight": 1.5},
    "top": {"top_k_lora": 1},
    "top with a softmax": {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
    "raw": {"enable_softmax": False},
    "first pass with adapters": {"scaling_pass_value": 0.5},
    "trained": {"use_trainable_adapters": True},
}


def base(arch: str = "llama") -> nn.Module:
    model = tiny_model(arch)
    model.config.use_cache = False  # PEFT's X-LoRA demands it
    return model


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def loras(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, str]]:
    """An architecture, and two of PEFT's LoRAs of different ranks, scales and modules."""
    root, arch = tmp_path_factory.mktemp(request.param), request.param
    for i, (r, modules) in enumerate(((4, ["q_proj", "v_proj"]), (2, ["q_proj", "up_proj", "embed_tokens"]))):
        with quiet():
            model = peft.get_peft_model(tiny_model(arch), peft.LoraConfig(r=r, lora_alpha=7, target_modules=modules))
        torch.manual_seed(i)
        for name, p in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(p, std=0.2)
        with quiet():
            model.save_pretrained(root / f"a{i}")
    return arch, {str(i): str(root / f"a{i}") for i in range(2)}


def theirs(arch: str, adapters: dict[str, str], *, scale: float = 0.3, **options: Any) -> Any:
    """PEFT's X-LoRA with a gate away from its start."""
    with quiet():
        model = peft.get_peft_model(base(arch), peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=adapters, **options))
    torch.manual_seed(5)
    for name, p in model.named_parameters():
        if "classifier" in name:
            nn.init.normal_(p, std=scale)
    return model.eval()


@pytest.mark.parametrize("label", KINDS)
def test_peft_reads_what_we_write_and_we_read_what_it_holds(label: str, loras: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    arch, adapters = loras
    model = theirs(arch, adapters, **KINDS[label])
    with torch.no_grad():
        want = model(input_ids=batch()).logits
    with quiet():
        model.save_pretrained(tmp_path / "theirs")
    read = from_peft(tmp_path / "theirs", model=tiny_model(arch))
    mine = attach_adapter(tiny_model(arch), read, force=False)
    assert far(logits(mine.model, batch()), want) < 1e-5
    assert to_peft(read, tmp_path / "ours", model=tiny_model(arch)).peft_type == "XLORA"
    with quiet():
        again = peft.PeftModel.from_pretrained(base(arch), str(tmp_path / "ours")).eval()
        with torch.no_grad():
            assert far(again(input_ids=batch()).logits, want) < 1e-5
    assert far(logits(tiny_model(arch), batch()), want) > 1e-2
    once_more = from_peft(tmp_path / "ours", model=tiny_model(arch))
    assert {k: (v.shape, v.dtype) for k, v in once_more.tensors.items()} == {k: (v.shape, v.dtype) for k, v in read.tensors.items()}
    assert all(torch.equal(v, read.tensors[k]) for k, v in once_more.tensors.items())


def test_layer_0_that_peft_leaves_out_is_found_where_peft_puts_it(loras: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    arch, adapters = loras
    with quiet():
        theirs(arch, adapters).save_pretrained(tmp_path)
    assert not load_file(tmp_path / "adapter_model.safetensors"), (
        "PEFT saves the gate whole now: the note in peft_types/xlora.py is out of date"
    )
    assert "lora_shared.gate.W1" in from_peft(tmp_path, model=tiny_model(arch)).tensors
    shutil.rmtree(tmp_path / "0")
    with pytest.raises(AdapterMismatch, match="PEFT leaves it out when it saves"):
        from_peft(tmp_path, model=tiny_model(arch))


def test_the_adapters_are_looked_for_beside_a_folder_that_was_moved(loras: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    arch, adapters = loras
    mixture = awaken(attach(tiny_model(arch), get_method("xlora", adapters=tuple(adapters.values()))))
    want = logits(mixture.model, batch())
    to_peft(mixture.state(), tmp_path / "first", model=tiny_model(arch))
    (tmp_path / "first").rename(tmp_path / "moved")
    moved = lorakit.load(tiny_model(arch), tmp_path / "moved")
    assert far(logits(moved.model, batch()), want) < 1e-6
    assert load_adapter(tmp_path / "moved" / "1", model=tiny_model(arch)).recipe.name == "lora"
    shutil.rmtree(tmp_path / "moved" / "1")
    with pytest.raises(CheckpointError, match="needs the adapter '1'"):
        from_peft(tmp_path / "moved", model=tiny_model(arch))


def test_fresh_experts_are_written_as_trainable_ones(tmp_path: Path) -> None:
    mixture = awaken(attach(tiny_model("llama"), get_method("xlora", experts=3, r=2, layerwise=True, sites=["q_proj", "mlp"])))
    to_peft(mixture.state(), tmp_path, model=tiny_model("llama"))
    with quiet():
        again = peft.PeftModel.from_pretrained(base(), str(tmp_path)).eval()
        with torch.no_grad():
            assert far(again(input_ids=batch()).logits, logits(mixture.model, batch())) < 1e-5
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_trainable_adapters"]


def test_what_cannot_be_followed_is_refused(loras: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    arch, adapters = loras
    mixture = attach(tiny_model(arch), get_method("xlora", adapters=tuple(adapters.values())))
    to_peft(mixture.state(), tmp_path, model=tiny_model(arch))
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())

    def with_(**changes: Any) -> None:
        path.write_text(json.dumps(config | changes))

    with_(adapters={"a": adapters["0"], "b": adapters["1"]})
    with pytest.raises(NotExportable, match="activates none but '0', '1'"):
        from_peft(tmp_path, model=tiny_model(arch))
    with_(enable_softmax_topk=True, top_k_lora=1)
    with pytest.raises(BadParameter, match="softmax of a softmax"):
        from_peft(tmp_path, model=tiny_model(arch))
    with_(xlora_depth="1")
    with pytest.raises(CheckpointError, match="not a value that PEFT writes"):
        from_peft(tmp_path, model=tiny_model(arch))
    with_()
    with pytest.raises(CheckpointError, match="give the model"):
        from_peft(tmp_path)
    save_file(
        {"base_model.model.x": torch.zeros(1), **load_file(tmp_path / "adapter_model.safetensors")}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(AdapterMismatch, match="not the gate's"):
        from_peft(tmp_path, model=tiny_model(arch))


def test_models_whose_adapters_pefts_mixture_cannot_load_are_refused(tmp_path: Path) -> None:
    one = awaken(attach(tiny_model("gpt2"), get_method("lora", sites="all-linear")))
    to_peft(one.state(), tmp_path / "one", model=tiny_model("gpt2"))
    mixture = attach(tiny_model("gpt2"), get_method("xlora", adapters=(str(tmp_path / "one"),)))
    with pytest.raises(NotExportable, match="under 'model'"):
        to_peft(mixture.state(), tmp_path / "mixture", model=tiny_model("gpt2"))
    with quiet(), pytest.raises(ValueError, match="unexpected keys"):  # PEFT itself
        peft.get_peft_model(base("gpt2"), peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters={"0": str(tmp_path / "one")}))


def test_the_table_of_fields_is_pefts() -> None:
    from lorakit.adapters.peft_types.xlora import OWN, XLora

    with quiet():
        real = peft.XLoraConfig(hidden_size=4096, adapters={}).to_dict()
    assert set(real) - set(XLora.table.config) <= {"auto_mapping", "peft_version"}
    assert all(real[name] == value for name, value in OWN.items())


# ------------------------------------------------------------------------------------------------------------------------ 50 steps
def fp64(model: nn.Module) -> nn.Module:
    """Without rounding to fp32, in the loss or in Llama's norms."""
    model = model.double()
    for norm in [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]:
        norm.forward = lambda x, norm=norm: norm.weight * x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    model.loss_function = loss
    return model


def trajectory(model: nn.Module, params: list[nn.Parameter]) -> list[float]:
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.01)
    losses = []
    for i in range(STEPS):
        loss = model(input_ids=batch(i % 5), labels=batch(i % 5)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def apart(tmp_path: Path, **changes: Any) -> float:
    folders = []
    for i in range(2):
        one = awaken(attach(tiny_model("llama"), get_method("lora", r=2 + i, alpha=4.0, sites="all-linear")), seed=i, size=0.2)
        to_peft(one.state(), tmp_path / f"{i}", model=tiny_model("llama"))
        folders.append(str(tmp_path / f"{i}"))
    options = {"xlora_depth": 2, "xlora_size": 8, "xlora_dropout_p": 0.0, "layerwise_scalings": True}
    with quiet():
        config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=dict(zip("01", folders, strict=True)), **options)
        their = peft.get_peft_model(fp64(base()), config, autocast_adapter_dtype=False)
    mine = attach(
        fp64(tiny_model("llama")),
        get_method("xlora", adapters=tuple(folders), **{"depth": 2, "size": 8, "gate_dropout": 0.0, "layerwise": True, **changes}),
    )
    classifier = [p for n, p in their.named_parameters() if "classifier" in n]
    gate = [mine.shared("default")["gate"].get_parameter(name) for name in ("W1", "c1", "W2", "c2")]
    with torch.no_grad():
        for a, b in zip(gate, classifier, strict=True):
            b.copy_(a)
        for p in their.parameters():  # the adapters' own bits are fp32's
            p.data = p.data.double()
    assert [p.requires_grad for p in their.parameters()].count(True) == 4
    one, two = trajectory(mine.model.train(), gate), trajectory(their.train(), classifier)
    assert abs(one[0] - one[-1]) > 1e-3
    return max(
        [abs(a - b) for a, b in zip(one, two, strict=True)] + [far(a.detach(), b.detach()) for a, b in zip(gate, classifier, strict=True)]
    )


def test_50_steps_of_the_gate_follow_pefts(tmp_path: Path) -> None:
    assert apart(tmp_path) < 1e-9
    assert apart(tmp_path, temperature=1.01) > 1e-4
