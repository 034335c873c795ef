"""The training loop: exact accumulation, evaluation, early stopping, errors that lose nothing."""

import json
import resource
import signal
from pathlib import Path

import pytest
import torch

import lorakit
from lorakit.adapters.io import load_adapter
from lorakit.core.errors import BadParameter, CheckpointError, DataError, Incompatible, LorakitError
from lorakit.core.events import Step
from lorakit.train.checkpoint import checkpoints
from lorakit.train.config import make_config
from lorakit.train.distributed import world
from lorakit.train.run import Run
from lorakit.train.train import build, train
from tests.train.runs import class_file, config, model_folder, text_file


def tensors(out: str | Path) -> dict[str, torch.Tensor]:
    return dict(load_adapter(Path(out) / "adapter").tensors)


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert set(a) == set(b)
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def test_a_run_leaves_adapter_curve_metrics_and_result(tmp_path: Path) -> None:
    result = train(config(tmp_path), quiet=True)
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} >= {"adapter", "curve.png", "metrics.jsonl", "result.json", "run.json"}
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == [2, 4, 6]
    assert result.final["bits_per_byte"] > 0
    assert load_adapter(out / "adapter").meta["metrics"] == result.final
    assert len(checkpoints(out)) == 2


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    settings = config(tmp_path, max_steps=30, eval_steps=1, learning_rate=3e-2, save_steps=0)
    train(settings, quiet=True)
    losses = [json.loads(x).get("eval_loss") for x in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    known = [x for x in losses if x is not None]
    assert known[-1] < known[0] - 0.3


@pytest.mark.parametrize("packing", [True, False])
def test_accumulation_is_exact_for_uneven_token_counts(tmp_path: Path, packing: bool) -> None:
    """8 samples at once, or in 4 micro-batches of 2 with different token counts: one update. A mean of means would differ by 1e-2."""
    found = {}
    for size, accumulate in ((8, 1), (2, 4)):
        settings = config(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, packing=packing,
            max_steps=3, lr_scheduler_type="constant",
            output_dir=str(tmp_path / f"out{size}"), save_steps=0,
        )  # fmt: skip
        train(settings, quiet=True)
        found[size] = tensors(settings.output_dir)
    assert difference(found[8], found[2]) < 2e-4  # Adam's first steps amplify fp32 noise in tiny gradients


def test_gradients_of_accumulation_equal_to_rounding(tmp_path: Path) -> None:
    grads = []
    for size, accumulate in ((8, 1), (2, 4)):
        parts = build(config(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, packing=False), world())
        run = Run(parts.adapted, parts.data, parts.config, world(), out=None, quiet=True)
        run.gradients(next(run.stream()), Step(0, run.total))
        grads.append(torch.cat([g.flatten() for g in [row.tensor.grad for row in run.table]]))
    assert torch.allclose(grads[0], grads[1], atol=1e-7, rtol=1e-5)


def test_early_stopping_and_best_checkpoint(tmp_path: Path) -> None:
    """A rate that diverges: training stops after `patience` worse evaluations, and the best adapter is the one saved."""
    settings = config(
        tmp_path, max_steps=60, eval_steps=2, learning_rate=1.0,
        early_stopping_patience=2, load_best_model_at_end=True, lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )  # fmt: skip
    result = train(settings, quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [r["eval_loss"] for r in rows if "eval_loss" in r and not r.get("final")]
    assert result.steps < 60
    assert result.final["loss"] == pytest.approx(min([*losses, result.final["loss"]]))


def test_classification_trains_and_saves_the_head(tmp_path: Path) -> None:
    for arch in ("llama", "bert"):
        data = class_file(tmp_path / "classes.jsonl")
        folder = model_folder(tmp_path / arch, arch)
        settings = config(
            tmp_path,
            model=folder,
            train_data=data,
            output_dir=str(tmp_path / f"out-{arch}"),
            max_steps=40,
            learning_rate=1e-2,
            save_steps=0,
        )
        result = train(settings, quiet=True)
        assert result.final["accuracy"] > 0.9, arch
        assert load_adapter(Path(settings.output_dir) / "adapter").unfrozen(), arch


def test_an_encoder_decoder_trains(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {i}", "completion": str(i)} for i in range(30)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    result = train(config(tmp_path, model=model_folder(tmp_path / "t5", "t5"), train_data=str(data)), quiet=True)
    assert result.final["loss"] > 0


@pytest.mark.parametrize("keys", [{"dtype": "bfloat16"}, {"gradient_checkpointing": True, "dropout": 0.1}], ids=["bf16", "checkpointing"])
def test_variants_of_the_step(tmp_path: Path, keys: dict) -> None:
    plain = train(config(tmp_path, output_dir=str(tmp_path / "plain"), **{k: v for k, v in keys.items() if k == "dropout"}), quiet=True)
    other = train(config(tmp_path, output_dir=str(tmp_path / "other"), **keys), quiet=True)
    assert abs(plain.final["loss"] - other.final["loss"]) < (0.05 if "dtype" in keys else 1e-5)
    assert all(t.dtype == torch.float32 for t in tensors(tmp_path / "other").values())


def test_checkpointing_changes_no_bit(tmp_path: Path) -> None:
    for name, on in (("a", False), ("b", True)):
        train(config(tmp_path, output_dir=str(tmp_path / name), gradient_checkpointing=on, dropout=0.1), quiet=True)
    assert difference(tensors(tmp_path / "a"), tensors(tmp_path / "b")) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # inductor's own
def test_compile_trains_the_same(tmp_path: Path) -> None:
    """Without dropout: compiled batches are as long as the window, and masks follow the place in the batch."""
    for name, on in (("a", False), ("b", True)):
        train(config(tmp_path, output_dir=str(tmp_path / name), torch_compile=on, max_steps=3), quiet=True)
    assert difference(tensors(tmp_path / "a"), tensors(tmp_path / "b")) < 1e-3


# --- errors ---------------------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path) -> None:
    train(config(tmp_path), quiet=True)
    with pytest.raises(BadParameter, match="already holds a run; use --resume auto"):
        train(config(tmp_path), quiet=True)
    with pytest.raises(BadParameter, match="learning_rate was 0.01 and is now 0.5"):
        train(config(tmp_path, resume="auto", learning_rate=0.5), quiet=True)


def test_a_finished_run_resumes_to_its_result(tmp_path: Path) -> None:
    first = train(config(tmp_path), quiet=True)
    again = train(config(tmp_path, resume="auto"), quiet=True)
    assert (again.steps, again.final) == (first.steps, first.final)


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.train import run as module

    real, calls = module.write_state, []

    def full(folder: Path, tree: object) -> None:
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(folder, tree)

    monkeypatch.setattr(module, "write_state", full)
    with pytest.raises(CheckpointError, match="No space left on device; the last good checkpoint is .*checkpoint-00000002"):
        train(config(tmp_path), quiet=True)
    assert [p.name for p in checkpoints(tmp_path / "out")] == ["checkpoint-00000002"]
    assert not list((tmp_path / "out").glob("*.partial"))
    monkeypatch.setattr(module, "write_state", real)
    assert train(config(tmp_path, resume="auto"), quiet=True).steps == 6


def test_a_real_size_limit_is_one_clear_error(tmp_path: Path) -> None:
    """The operating system refuses the write inside the tensor file, not a stand-in of ours."""
    from lorakit.train.checkpoint import write_checkpoint
    from lorakit.train.state import write_state

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot write .*checkpoint-00000001"):
            write_checkpoint(tmp_path, 1, lambda folder: write_state(folder, {"x": torch.zeros(100_000)}), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write to output_dir"):
        train(config(tmp_path, output_dir=str(tmp_path / "file" / "out")), quiet=True)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(LorakitError, match="the (loss|gradient's norm) is (nan|inf) at step .*lower learning_rate"):
        train(config(tmp_path, learning_rate=10, alpha=1e20, max_grad_norm=0.0, max_steps=20), quiet=True)
    with pytest.raises(LorakitError, match="the held-out loss is nan after the last step"):
        train(config(tmp_path, learning_rate=10, alpha=1e18, max_steps=1, save_steps=0, output_dir=str(tmp_path / "last")), quiet=True)
    assert not (tmp_path / "last" / "adapter").exists()


def test_a_gradient_that_is_not_finite_changes_no_parameter(tmp_path: Path) -> None:
    parts = build(config(tmp_path), world())
    run = Run(parts.adapted, parts.data, parts.config, world(), out=None)
    before = [row.tensor.detach().clone() for row in run.table]
    for row in run.table:
        row.tensor.grad = torch.full_like(row.tensor, torch.inf)
    with pytest.raises(LorakitError, match="the gradient's norm is inf at step 0; lower learning_rate"):
        run.update(Step(0, 1))
    assert all(torch.equal(row.tensor, old) for row, old in zip(run.table, before, strict=True))


def test_a_site_that_never_runs_is_an_error(tmp_path: Path) -> None:
    parts = build(config(tmp_path, sites=["q_proj", "k_proj"]), world())
    parts.adapted.model.model.layers[0].self_attn.v_proj.register_parameter("spare", torch.nn.Parameter(torch.ones(1)))
    run = Run(parts.adapted, parts.data, parts.config, world(), out=None, quiet=True)
    attention = parts.adapted.model.model.layers[1].self_attn
    attention.q_proj.lora.active = ()  # stands for a module whose forward is never called
    with pytest.raises(Incompatible, match=r"2 parameters got no gradient in the first step \(model.layers.1.self_attn.q_proj"):
        run.train()


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"lerning_rate": 1}, BadParameter, "unknown key 'lerning_rate'.*Did you mean 'learning_rate'"),
        ({"rr": 1}, BadParameter, "unknown key 'rr'.*'r'"),
        ({"method": "lorra"}, lorakit.NoSuchMethod, "Did you mean 'lora'"),
        ({"learning_rate": "fast"}, BadParameter, "learning_rate='fast'"),
        ({"max_length": 1}, BadParameter, "max_length=1"),
        ({"r": 0}, BadParameter, "r must be at least 1"),
        ({"sites": ["q_proj", "v_prj"]}, lorakit.NoSuchSite, "'v_prj' matches no .*Did you mean 'v_proj'"),
        ({"r": 999}, BadParameter, "r=999 exceeds the matrix"),
        ({"train_data": ""}, DataError, "no training data"),
        ({"model": "./nowhere"}, BadParameter, "no model folder at ./nowhere"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path: Path, keys: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        train(config(tmp_path, **keys), quiet=True)
    assert "\n" not in str(caught.value)


def test_empty_data(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError):
        train(config(tmp_path, train_data=str(tmp_path / "empty.jsonl")), quiet=True)


def test_packing_asked_for_and_impossible(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}] * 20
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r | {"prompt": str(i)}) + "\n" for i, r in enumerate(rows)))
    with pytest.raises(DataError, match="cannot be trained on packed windows"):
        train(config(tmp_path, model=model_folder(tmp_path / "t5", "t5"), train_data=str(tmp_path / "p.jsonl"), packing=True), quiet=True)


def test_yaml_keys_and_flags_agree(tmp_path: Path) -> None:
    from lorakit.cli.flags import parse_flags
    from lorakit.train.config import read_config

    text_file(tmp_path / "d.jsonl")
    (tmp_path / "run.yaml").write_text("method: dora\nr: 4\nlearning_rate: 1e-3\ntrain_data: d.jsonl\n")
    flags = parse_flags(["--r", "2", "--sites", "[q_proj, v_proj]", "--no-packing", "--eval-steps=5"])
    found = read_config(tmp_path / "run.yaml", flags)
    same = make_config(
        {
            "method": "dora",
            "r": 2,
            "learning_rate": 1e-3,
            "train_data": "d.jsonl",
            "sites": ["q_proj", "v_proj"],
            "packing": False,
            "eval_steps": 5,
        }
    )
    assert found == same


def test_a_method_that_trains_no_module_whole_cannot_train_a_new_head(tmp_path: Path) -> None:
    data = class_file(tmp_path / "classes.jsonl")
    with pytest.raises(Incompatible, match="dfo_lora trains no module whole"):
        train(config(tmp_path, method="dfo_lora", train_data=data), quiet=True)
