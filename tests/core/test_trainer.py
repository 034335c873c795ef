"""transformers.Trainer trains an adapted model as it trains any other."""

from pathlib import Path

import pytest
import torch
import transformers

from tests.laws.subject import base, batch, everything, logits, same_bits, subject


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(checkpointing: bool, tmp_path: Path) -> None:
    adapted = subject("lora", dropout=0.1)
    rows = [{"input_ids": ids, "labels": ids} for ids in batch(rows=8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False, **(
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}} if checkpointing else {}
        ),
    )  # fmt: skip
    before, plain = everything(adapted.model), logits(base(), batch())
    transformers.Trainer(adapted.model, arguments, train_dataset=rows).train()
    adapted.model.eval()
    after, trained = everything(adapted.model), {n for n, p in adapted.model.named_parameters() if p.requires_grad}
    assert trained
    assert {n for n in before if not same_bits(before[n], after[n])} == trained
    assert torch.isfinite(logits(adapted.model, batch())).all()
    assert same_bits(logits(adapted.detach(), batch()), plain)
