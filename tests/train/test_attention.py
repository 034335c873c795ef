"""A model switched to attention by segments computes what it computed, from the same configuration, or is left alone with the reason."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import masking_utils

from lorakit.core.attach import attach
from lorakit.core.method import get_method
from lorakit.data.encoded import IGNORED, Encoded
from lorakit.data.pack import collate, pack
from lorakit.data.pad import pad
from lorakit.data.tiny import tiny_model
from lorakit.train import attention as segments
from lorakit.train import train as runs
from lorakit.train.attention import NAME, segment_attention, why_not_segmented
from tests.train.runs import config

TINY = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
DECODERS: dict[str, Callable[..., Any]] = {
    "llama": lambda **kw: tiny_model("llama", **kw),
    "qwen2": lambda **kw: tiny_model("qwen2", **kw),
    "mixtral": lambda **kw: tiny_model("mixtral", **kw),
    "gpt2": lambda **kw: tiny_model("gpt2", **kw),
    "gpt_neox": lambda **kw: tiny_model("gpt_neox", **kw),
    "mistral": lambda **kw: tiny_model("mistral", sliding_window=5, **kw),
    "gemma3": lambda **kw: transformers.Gemma3ForCausalLM(  # windows in some layers only
        transformers.Gemma3TextConfig(**TINY, intermediate_size=64, sliding_window=5, layer_types=WINDOWS, **kw)
    ).eval(),
}
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]


def documents(*sizes: int) -> list[Encoded]:
    ids = [[(7 * i + 13 * n + 3) % 120 + 5 for i in range(size)] for n, size in enumerate(sizes)]
    return [Encoded(row, row) for row in ids]


BATCHES: dict[str, Callable[[], dict[str, Any]]] = {
    "packed": lambda: collate(pack(documents(9, 1, 6, 4, 12, 3), 22), length=25),
    "padded": lambda: pad(documents(14, 9, 1), 0) | {"use_cache": False},
    "whole": lambda: pad(documents(14, 14), 0) | {"use_cache": False},
}


@pytest.fixture(autouse=True)
def _same_weights() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def run(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    """The loss, the logits that count, and the gradient of every parameter."""
    out = model(**batch)
    real = batch["attention_mask"].bool() if "attention_mask" in batch else batch["labels"] != IGNORED
    grads = torch.autograd.grad(out.loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return [out.loss.detach(), out.logits[real].detach(), *(g for g in grads if g is not None)]


def assert_same(found: list[Tensor], want: list[Tensor], tolerance: float = 2e-5) -> None:
    assert len(found) == len(want)
    for x, y in zip(found, want, strict=True):
        assert float((x - y).abs().max()) <= tolerance * max(1e-2, float(y.abs().max()))


def deltas(monkeypatch: pytest.MonkeyPatch, name: str, of: Any = segments) -> list[Any]:
    """The calls that a function gets from here on."""
    calls, plain = list[Any](), getattr(of, name)

    def counted(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        return plain(*args, **options)

    monkeypatch.setattr(of, name, counted)
    return calls


@pytest.mark.parametrize("kind", list(BATCHES))
@pytest.mark.parametrize("arch", list(DECODERS))
def test_loss_logits_and_gradients_are_those_of_eager_attention(arch: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = DECODERS[arch]()
    model.config._attn_implementation = "eager"
    want = run(model, BATCHES[kind]())
    model.config._attn_implementation = "sdpa"
    undo = segment_attention(model)
    dense, ours = deltas(monkeypatch, "sdpa_mask"), deltas(monkeypatch, "attention")
    found = run(model, BATCHES[kind]())
    assert not dense  # no mask of t × t numbers was made
    assert len(ours) == model.config.num_hidden_layers
    undo()
    assert_same(found, want)
    assert_same(run(model, BATCHES[kind]()), want)
    assert len(ours) == model.config.num_hidden_layers


def test_bf16() -> None:
    model = tiny_model("llama").bfloat16()
    want = run(model, BATCHES["packed"]())
    segment_attention(model)
    assert_same(run(model, BATCHES["packed"]()), want, 0.05)


def others() -> dict[str, tuple[Callable[[], Any], str]]:
    gemma2 = transformers.Gemma2Config(**TINY, intermediate_size=64, sliding_window=5, layer_types=WINDOWS)
    return {
        "softcap": (lambda: transformers.Gemma2ForCausalLM(gemma2).eval(), "computed by eager"),
        "sinks": (lambda: tiny_model("gpt_oss"), "computed by eager"),
        "eager": (lambda: tiny_model("llama", attn_implementation="eager"), "computed by eager"),
        "encoder-decoder": (lambda: tiny_model("t5"), "an encoder-decoder's"),
        "encoder": (lambda: tiny_model("bert", task="masked-lm"), "it is not causal"),
        "dropout": (lambda: tiny_model("llama", attention_dropout=0.1), "it has dropout of 0.1"),
        "dropout of gpt2": (lambda: tiny_model("gpt2", attn_pdrop=0.1), "it has dropout of 0.1"),
        "dropout of bert": (lambda: tiny_model("bert", attention_probs_dropout_prob=0.1), "it has dropout of 0.1"),
    }


@pytest.mark.parametrize("name", list(others()))
def test_others_keep_their_attention_and_say_why(name: str, caplog: pytest.LogCaptureFixture) -> None:
    build, reason = others()[name]
    model = build()
    before = model.config._attn_implementation
    with caplog.at_level("INFO", logger=segments.__name__):
        undo = segment_attention(model)
    assert reason in str(why_not_segmented(model)) and reason in caplog.text
    assert model.config._attn_implementation == before
    undo()
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("method", ["longlora", "prefix"])
def test_a_method_that_changes_attention_is_left_alone(method: str) -> None:
    model = tiny_model("llama")
    attach(model, get_method(method))
    assert "computed by lorakit" in str(why_not_segmented(model))


def test_a_model_that_reads_the_mask_itself_is_left_alone() -> None:
    model = tiny_model("llama")
    layer = model.model.layers[0].self_attn
    plain = layer.forward
    layer.forward = lambda hidden_states, attention_mask=None, **kw: plain(
        hidden_states=hidden_states, attention_mask=None if attention_mask is None else attention_mask[:, :, :, :99], **kw
    )
    assert "a probe of packed windows failed with IndexError" in str(why_not_segmented(model))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("what", ["forward", "backward"])
def test_wrong_attention_is_found_by_the_probe(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, *, scale: float) -> Tensor:
        q = q if what == "forward" else q.detach()
        return segments_attention(q, k, v, None if what == "forward" else first, scale=scale)

    segments_attention = segments.attention
    monkeypatch.setattr(segments, "attention", wrong)
    reason = why_not_segmented(tiny_model("llama"))
    assert ("outputs of packed windows" if what == "forward" else "gradients of whole rows") in str(reason)


def mask_of(function: Any, **options: Any) -> Tensor | None:
    return segments.segment_mask(2, 6, 6, mask_function=function, **options)


def test_masks_that_segments_cannot_say_stay_dense() -> None:
    causal, and_masks, or_masks = masking_utils.causal_mask_function, masking_utils.and_masks, masking_utils.or_masks
    places = torch.arange(6).expand(2, -1)
    holes = torch.tensor([[1, 1, 0, 1, 1, 1], [1] * 6]).bool()
    images = masking_utils.blockwise_overlay(torch.tensor([[-1, 0, 0, -1, -1, -1]] * 2))
    for function, options in (
        (masking_utils.bidirectional_mask_function, {}),
        (masking_utils.sliding_window_bidirectional_mask_function(3), {}),
        (masking_utils.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.int)), {}),
        (or_masks(causal, images), {}),
        (and_masks(causal, lambda b, h, q, k: q >= k), {}),
        (masking_utils.packed_sequence_compatibility_function(masking_utils.bidirectional_mask_function, places, places // 3), {}),
        (causal, {"attention_mask": holes}),
        (causal, {"allow_is_causal_skip": False}),  # whoever asks so wants to work on the mask
    ):
        dense = masking_utils.sdpa_mask(2, 6, 6, mask_function=function, local_size=3, **options)
        found = mask_of(function, local_size=3, **options)
        assert found is not None and torch.equal(found, dense)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("what", ["whole", "packed", "right", "left"])
def test_segments_are_the_dense_mask(what: str, window: int | None) -> None:
    function = masking_utils.sliding_window_causal_mask_function(window) if window else masking_utils.causal_mask_function
    real = None
    if what == "packed":
        positions = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 0, 0, 5, 6]])
        numbers = masking_utils.find_packed_sequence_indices(positions)
        function = masking_utils.packed_sequence_compatibility_function(function, positions, numbers)
    elif what != "whole":
        real = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]]).bool()
        real = real if what == "right" else real.flip(-1)
    first = mask_of(function, attention_mask=real, allow_is_causal_skip=what != "packed", local_size=window)
    assert first is None or first.shape == (2, 6)
    dense = masking_utils.sdpa_mask(2, 6, 6, mask_function=function, attention_mask=real, allow_is_causal_skip=False)
    ours = segments._dense(torch.zeros(2, 6) if first is None else first)
    seen = torch.ones(2, 6, dtype=torch.bool) if real is None else real
    assert torch.equal(ours[seen[:, None]], dense[seen[:, None]])  # the rows of real tokens


def test_calls_that_ask_for_more_are_sdpas(monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny_model("llama").model.layers[0].self_attn
    q, k, v = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    first = torch.tensor([[0, 0, 0, 3, 3, 5]], dtype=torch.int32)
    ours = deltas(monkeypatch, "attention")
    want, _ = segments.segment_attend(module, q, k, v, first)
    assert len(ours) == 1
    bias = torch.zeros(1, 4, 6, 6)
    for options in ({"position_bias": bias}, {"dropout": 1e-9}):
        torch.testing.assert_close(segments.segment_attend(module, q, k, v, first, **options)[0], want)  # under the same mask
    last, _ = segments.segment_attend(module, q[:, :, -1:], k, v, None)  # a decoding step
    torch.testing.assert_close(last, torch.nn.functional.scaled_dot_product_attention(q[:, :, -1:], *both(k, v)).transpose(1, 2))
    half = [x.half() for x in (q, k, v)]
    torch.testing.assert_close(segments.segment_attend(module, *half, first)[0].float(), want, atol=0.01, rtol=0.01)
    assert len(ours) == 1


def both(*xs: Tensor) -> list[Tensor]:
    return [x.repeat_interleave(2, 1) for x in xs]


def test_generation_with_a_cache_goes_on_working() -> None:
    model = tiny_model("llama")
    prompt = torch.arange(12).view(2, 6) + 5
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    ask = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask, "pad_token_id": 0}
    want = model.generate(prompt, **ask)
    undo = segment_attention(model)
    assert torch.equal(model.generate(prompt, **ask), want)
    undo()


def test_no_file_names_our_function(tmp_path: Path) -> None:
    model = tiny_model("llama")
    undo = segment_attention(model)
    assert model.config._attn_implementation == NAME
    model.save_pretrained(tmp_path)
    assert all(NAME.encode() not in file.read_bytes() for file in tmp_path.iterdir())
    undo()
    assert model.config._attn_implementation == "sdpa"


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    assert why_not_segmented(model) is None
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters()) and not model.get_input_embeddings()._forward_hooks


def test_a_classifier_is_judged_by_its_answers() -> None:
    assert why_not_segmented(tiny_model("llama", task="sequence-classification")) is None


def test_activation_checkpointing() -> None:
    model = tiny_model("llama").train()
    want = run(model, BATCHES["packed"]())
    segment_attention(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert_same(run(model, BATCHES["packed"]()), want)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks a layer's input
def test_a_layer_compiles_whole_and_once_for_all_segments() -> None:
    model = tiny_model("llama")
    segment_attention(model)
    kinds = [collate(pack(documents(*sizes), 25), length=25) for sizes in ((9, 6), (20, 3), (2, 2, 17))]
    want = [run(model, batch) for batch in kinds]
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for batch, expected in zip(kinds, want, strict=True):
        assert_same(run(model, batch), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # two layers, however many layouts


def test_a_model_compiled_whole_has_sdpas_mask() -> None:
    model = tiny_model("llama")
    want = run(model, BATCHES["packed"]())
    segment_attention(model)
    torch._dynamo.reset()
    model.compile(backend="aot_eager")
    assert_same(run(model, BATCHES["packed"]()), want)


@pytest.mark.parametrize("packing", [True, False])
def test_a_run_has_it_by_default_and_ends_as_without(packing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, plain = list[Any](), runs.build
    monkeypatch.setattr(runs, "build", lambda *args, **kwargs: built.append(plain(*args, **kwargs)) or built[-1])
    ours, results = deltas(monkeypatch, "attention"), []
    for name in ("with", "without"):
        settings = config(tmp_path, output_dir=str(tmp_path / name), packing=packing, torch_compile=False, learning_rate=1e-3)
        results.append(runs.train(settings, quiet=True))
        assert built[-1].adapted.model.config._attn_implementation == "sdpa"  # given back
        assert bool(ours) == (name == "with")
        ours.clear()
        monkeypatch.setattr(runs, "segment_attention", lambda model: lambda: None)
    assert results[0].final["loss"] == pytest.approx(results[1].final["loss"], rel=1e-4)


def test_a_run_that_fails_gives_it_back_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, plain = list[Any](), runs.build
    monkeypatch.setattr(runs, "build", lambda *args, **kwargs: built.append(plain(*args, **kwargs)) or built[-1])

    def fails(self: Any) -> None:
        assert self.adapted.model.config._attn_implementation == NAME
        self.log.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.Run, "train", fails)
    with pytest.raises(KeyboardInterrupt):
        runs.train(config(tmp_path), quiet=True)
    assert built[0].adapted.model.config._attn_implementation == "sdpa"
