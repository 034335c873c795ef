"""What an init that needs data sees: at every site the second moment of its inputs, or the gradient of the loss for its whole weight.

Collected by hooks on the host modules, so any storage of the weight will do, and kept on the CPU in at least fp32: d_in² numbers a site for
moments, d_out · d_in for gradients. Where inputs are ids, the moment is diagonal and its diagonal, the counts, is all that is kept.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorakit.core.errors import BadParameter, Incompatible
from lorakit.core.site import Site

IGNORED = -100
"""The label of a token without a loss."""
INPUTS, TARGET_INPUTS, GRADIENTS = "inputs", "target_inputs", "gradients"


class Seen(NamedTuple):
    """One site's statistics; None for what was not asked for."""

    moment: Tensor | None
    """Σ x xᵀ over the counted tokens, d_in × d_in; [d_in], its diagonal, where inputs are ids."""
    tokens: int
    gradient: Tensor | None
    """∂L/∂W of the mean loss a target over all batches, d_out × d_in."""
    total: Tensor | None = None
    """Σ x over the counted tokens, d_in."""


def own_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, int]:
    """(summed loss, targets) from the model's own mean loss; the batch holds labels."""
    loss = model(**batch).loss
    if loss is None:
        raise BadParameter("a calibration batch without labels gives no loss; add labels, or pass a Calibration with a loss function")
    n = int((batch["labels"] != IGNORED).sum())
    return loss * n, n


@dataclass(frozen=True)
class Calibration:
    """Batches and the loss on them: (model, batch) -> (summed loss, number of targets). `total_` sums a tensor over processes, in place,
    where each has batches of its own; then all see the same statistics, bit for bit."""

    batches: Sequence[Mapping[str, Any]]
    loss: Callable[[nn.Module, Mapping[str, Any]], tuple[Tensor, int]] = own_loss
    total_: Callable[[Tensor], object] = lambda tensor: None


@torch.no_grad()
def observe(model: nn.Module, sites: Sequence[Site], needs: frozenset[str], data: Calibration) -> dict[str, Seen]:
    """Run the batches through the model in eval mode and return what each site saw. The model is left as it was.

    `needs`: "inputs" counts every token that is no padding, "target_inputs" only those with a label (Calibrated, core/events.py).
    Raises Incompatible for a site that no batch reached.
    """
    watchers = [_Watcher(site, needs) for site in sites]
    targets = torch.zeros((), dtype=torch.int64)
    with _watching(model, watchers):
        for batch in data.batches:
            masks = _masks(model, batch, labeled=TARGET_INPUTS in needs)
            for watcher in watchers:
                watcher.masks = masks
            with torch.set_grad_enabled(GRADIENTS in needs):
                loss, n = data.loss(model, batch)
                targets += n
                if GRADIENTS in needs:
                    loss.backward()
    data.total_(targets)
    return {watcher.site.name: watcher.seen(data, max(1, int(targets))) for watcher in watchers}


class _Masks(NamedTuple):
    """Which tokens count, bool [b, t]; None: all. An encoder-decoder's two sides have one each."""

    encoder: Tensor | None
    decoder: Tensor | None


def _masks(model: nn.Module, batch: Mapping[str, Any], *, labeled: bool) -> _Masks:
    labels, real = batch.get("labels"), _real(batch)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return _Masks(real, None if labels is None else labels != IGNORED)
    if labeled and labels is not None and real is not None and labels.shape == real.shape:
        real = real & (labels != IGNORED)
    return _Masks(real, real)


def _real(batch: Mapping[str, Any]) -> Tensor | None:
    """Which tokens are no padding. Packed windows have no mask: there a padding token is a document of its own, without a label."""
    found: list[Tensor | None] = [batch.get(name) for name in ("attention_mask", "position_ids", "labels", "input_ids")]
    attention, positions, labels, ids = found
    if attention is not None and attention.dim() == 2:
        return attention.bool()
    if positions is not None and labels is not None and labels.shape == positions.shape:
        ends = torch.nn.functional.pad(positions[:, 1:], (0, 1)) == 0
        return ~((positions == 0) & ends & (labels == IGNORED))
    return None if ids is None else torch.ones_like(ids, dtype=torch.bool)


class _Watcher:
    """The hooks of one site."""

    def __init__(self, site: Site, needs: frozenset[str]) -> None:
        self.site, self.needs = site, needs
        self.index = None if site.rows is None else torch.cat([torch.arange(r.start, r.stop) for r in site.rows])
        self.sums: dict[str, Tensor] = {}
        self.dtype = torch.float32
        self.masks = _Masks(None, None)

    def forward(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        x = args[0].detach()
        self.dtype = torch.promote_types(output.dtype, torch.float32)
        if self.needs & {INPUTS, TARGET_INPUTS}:
            self._count(x)
        if GRADIENTS not in self.needs:
            return None
        fresh = not output.requires_grad  # with everything frozen, the graph begins at the first site
        output = output.detach().requires_grad_(True) if fresh else output
        output.register_hook(lambda dy: self._gradient(x, dy))
        return output.clone() if fresh else output  # what follows may change it in place, which a leaf forbids

    def _count(self, x: Tensor) -> None:
        rows = _flat(x)
        mask = self._mask(x.shape if _ids(x) else x.shape[:-1])
        rows = rows if mask is None else rows[mask.to(rows.device)]
        if _ids(x):
            self._add("moment", rows.bincount(minlength=self.site.d_in).to(self.dtype))
        else:
            wide = rows.to(self.dtype)
            self._add("moment", wide.T @ wide)
            self._add("total", wide.sum(0))
        self._add("tokens", torch.tensor(len(rows)))

    def _mask(self, shape: torch.Size) -> Tensor | None:
        """The mask of this site's tokens, flat; None where none has their number (a head that runs at the targets only)."""
        both = (self.masks.encoder, self.masks.decoder) if _reads_encoder(self.site) else (self.masks.decoder, self.masks.encoder)
        exact = [m for m in both if m is not None and m.shape == shape]
        flat = [m for m in both if m is not None and m.numel() == shape.numel()]  # some modules see [b · t, d]
        return next((m.reshape(-1) for m in exact + flat), None)

    def _gradient(self, x: Tensor, dy: Tensor) -> None:
        rows, grads = _flat(x), dy.detach().flatten(0, -2).to(self.dtype)
        if self.index is not None:
            grads = grads.index_select(-1, self.index.to(grads.device))
        if _ids(x):
            self._add("gradient", grads.new_zeros(self.site.d_out, self.site.d_in).index_add_(1, rows, grads.T))
        else:
            self._add("gradient", grads.T @ rows.to(self.dtype))

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = value.cpu() if name not in self.sums else self.sums[name].add_(value.cpu())

    def seen(self, data: Calibration, targets: int) -> Seen:
        """The sums over all processes, of which some may have had no batch."""
        d_out, d_in = self.site.d_out, self.site.d_in
        shapes: dict[str, list[int]] = {"gradient": [d_out, d_in]} if GRADIENTS in self.needs else {}
        if self.needs & {INPUTS, TARGET_INPUTS}:
            shapes |= {"moment": [d_in] if self.site.kind == "embedding" else [d_in, d_in], "total": [d_in]}
        reached = torch.tensor(len(self.sums))
        data.total_(reached)
        if not reached:
            raise Incompatible(
                f"the calibration batches never reached site {self.site.name!r}; leave it out of sites, or give batches that do"
            )
        found = {name: self.sums.get(name, torch.zeros(shape, dtype=self.dtype)) for name, shape in shapes.items()}
        tokens = self.sums.get("tokens", torch.tensor(0))
        for tensor in (*found.values(), tokens):
            data.total_(tensor)
        gradient = found.get("gradient")
        total = None if self.site.kind == "embedding" else found.get("total")
        return Seen(found.get("moment"), int(tokens), None if gradient is None else gradient / targets, total)


def _ids(x: Tensor) -> bool:
    return not x.is_floating_point()


def _flat(x: Tensor) -> Tensor:
    """[tokens, d_in], or ids [tokens]."""
    return x.reshape(-1) if _ids(x) else x.flatten(0, -2)


def _reads_encoder(site: Site) -> bool:
    """Whether an encoder-decoder's site sees the encoder's tokens: all outside the decoder, and the keys and values it attends across."""
    across = site.role in ("k", "v") and any(word in site.name for word in ("EncDecAttention", "encoder_attn", "crossattention"))
    return "decoder" not in site.name or across


@contextmanager
def _watching(model: nn.Module, watchers: Iterable[_Watcher]) -> Iterator[None]:
    modes, required = [(m, m.training) for m in model.modules()], [(p, p.requires_grad) for p in model.parameters()]
    compiled = model.__dict__.pop("_compiled_call_impl", None)  # which would never call the hooks
    handles: list[RemovableHandle] = [model.get_submodule(w.site.module).register_forward_hook(w.forward) for w in watchers]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for handle in handles:
            handle.remove()
        if compiled is not None:
            model._compiled_call_impl = compiled
        for module, mode in modes:
            module.training = mode
        for p, before in required:
            p.requires_grad_(before)
