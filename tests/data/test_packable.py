import pytest
import torch

from lorakit.core.errors import DataError
from lorakit.data.packable import check_packing, why_not_packable
from lorakit.data.tiny import tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox"])
def test_decoders_that_follow_position_ids_are_packable(arch, attention, dtype):
    check_packing(tiny_model(arch, attn_implementation=attention, **({"sliding_window": 3} if arch == "mistral" else {})).to(dtype))


@pytest.mark.parametrize(
    ("arch", "task", "reason"),
    [
        ("t5", "causal-lm", "encoder-decoder"),
        ("bert", "causal-lm", "does not follow restarting position_ids"),
        ("bert", "masked-lm", "does not follow restarting position_ids"),
        ("roberta", "causal-lm", "does not follow restarting position_ids"),
        ("llama", "sequence-classification", "one answer per sequence"),
    ],
)
def test_others_are_refused_with_the_reason(arch, task, reason):
    with pytest.raises(DataError, match=rf"cannot be trained on packed windows: .*{reason}.*; turn packing off to pad instead"):
        check_packing(tiny_model(arch, task=task))


def test_a_forward_without_position_ids_is_refused():
    model = tiny_model("llama")
    forward = model.forward
    model.forward = lambda input_ids, attention_mask=None: forward(input_ids, attention_mask)
    assert "takes no position_ids" in why_not_packable(model)


def test_a_model_whose_mask_ignores_position_ids_is_found_by_running_it():
    model = tiny_model("llama")
    forward = model.forward

    def leaky(input_ids, position_ids=None, use_cache=None):
        return forward(input_ids, position_ids=position_ids, use_cache=True)

    model.forward = leaky
    assert "neighbor" in why_not_packable(model)


def test_the_model_is_left_as_it_was():
    model = tiny_model("gpt2", resid_pdrop=0.5).train()
    model.transformer.h[0].eval()
    modes = [m.training for m in model.modules()]
    check_packing(model)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
