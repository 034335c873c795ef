import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.core.errors import DataError
from lorakit.data.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer

TASKS = ("causal-lm", "sequence-classification")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_runs_and_the_seed_decides(arch, task):
    model, same, other = tiny_model(arch, task=task), tiny_model(arch, task=task), tiny_model(arch, task=task, seed=1)
    assert not model.training
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), same.parameters(), strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    ids = torch.tensor([[5, 9, 30, 1]])
    out = model(input_ids=ids, labels=ids if task == "causal-lm" else torch.tensor([0]))
    assert out.loss.isfinite()
    assert out.logits.shape == ((1, 4, 128) if task == "causal-lm" else (1, 3))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tied_shares_the_embedding(arch):
    for tied in (False, True):
        model = tiny_model(arch, tied=tied)
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (tied or arch == "t5")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_parameter_is_trivial_and_training_mode_has_no_dropout(arch):
    model = tiny_model(arch, task="sequence-classification")
    assert all(p.unique().numel() > 1 for p in model.parameters())
    ids = torch.tensor([[5, 9, 30, 1]])
    assert torch.equal(model(ids).logits, model.train()(ids).logits)


def test_overrides_reach_the_configuration_and_the_random_state_is_kept():
    state = torch.get_rng_state()
    assert tiny_model("gpt2", hidden_size=64).config.n_embd == 64
    assert tiny_model("llama", num_hidden_layers=1, attn_implementation="eager").config.num_hidden_layers == 1
    assert torch.equal(state, torch.get_rng_state())


def test_unknown_names_are_refused():
    with pytest.raises(DataError, match="'lama'; choose one of llama, "):
        tiny_model("lama")
    with pytest.raises(DataError, match="no head for task 'masked-lm'"):
        tiny_model("llama", task="masked-lm")
    assert tiny_model("bert", task="masked-lm")(torch.tensor([[5, 6]])).logits.shape == (1, 2, 128)


@given(st.text())
def test_the_tokenizer_is_lossless_and_ascii_fits_the_models(text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    if text.isascii() and text.isprintable():
        assert all(i < 128 for i in ids)


def test_the_tokenizer_has_every_special_token_and_a_template():
    tokenizer = tiny_tokenizer()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.mask_token_id) == (0, 1, 2, 4)
    assert tokenizer.decode(tokenizer("<eos>").input_ids, skip_special_tokens=True) == ""
    assert tokenizer.chat_template
    assert tiny_tokenizer(chat_template=None).chat_template is None
    assert tiny_model("gpt2", vocab_size=len(tokenizer))(torch.tensor([tokenizer("é").input_ids])).logits.shape[-1] == 286
