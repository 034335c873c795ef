"""Equal tensors have one digest; a bit, a name or a tensor more is another."""

import torch

from lorakit.adapters.digest import digest

TENSORS = {"x.A": torch.arange(6.0).view(2, 3), "x.B": torch.ones(2, dtype=torch.bfloat16), "x.g": torch.zeros(0), "x.n": torch.tensor(3)}


def test_order_and_layout_are_nothing():
    assert len(digest(TENSORS)) == 32
    other = dict(reversed(TENSORS.items())) | {"x.A": TENSORS["x.A"].T.contiguous().T}
    assert digest(other) == digest(TENSORS)
    assert digest({"x.A": torch.ones(2, requires_grad=True)}) == digest({"x.A": torch.ones(2)})


def test_everything_else_is_another():
    nearly = TENSORS["x.A"].clone()
    nearly[1, 2] = torch.nextafter(nearly[1, 2], torch.tensor(9.0))
    others = [
        TENSORS | {"x.A": nearly},
        TENSORS | {"x.A": TENSORS["x.A"].flip(0)},
        TENSORS | {"y.A": torch.zeros(1)},
        {name.replace("x.A", "x.AA"): t for name, t in TENSORS.items()},  # in the same order
        {name: t for name, t in TENSORS.items() if name != "x.B"},
    ]
    assert len({digest(t) for t in [TENSORS, *others]}) == 1 + len(others)
