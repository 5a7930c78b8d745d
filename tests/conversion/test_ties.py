"""Tensors that share memory: equal ones are one tensor, overlapping ones are left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pathconvert
from pathconvert.conversion.tracing.ties import first_names, overlaps
from pathconvert.errors import ArchitectureError

BUILDER = """
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.a, self.b = (nn.Conv2d(i, 8, 1) for i in (3, 8, 8))
        self.out = nn.Linear(8, 3)
        self.b.weight.data = self.a.weight.data

    def forward(self, x):
        for layer in (self.first, self.a, self.b):
            x = layer(x).relu()
        return self.out(x.mean((2, 3)))
"""


class Tied(nn.Module):
    """Two convolutions whose weights share memory in a way of one's own."""

    def __init__(self, tie: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.a, self.b = (nn.Conv2d(i, 8, 1) for i in (3, 8, 8))
        self.out = nn.Linear(8, 3)
        self.double()
        tie(self.a.weight, self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.a, self.b):
            x = F.relu(layer(x))
        return self.out(x.mean((2, 3)))


def by_data(a: Tensor, b: Tensor) -> None:
    b.data = a.data


def by_set(a: Tensor, b: Tensor) -> None:
    with torch.no_grad():
        b.set_(a)


def by_view(a: Tensor, b: Tensor) -> None:
    b.data = a.data.view(64).view(8, 8, 1, 1)


def transposed(a: Tensor, b: Tensor) -> None:
    b.data = a.data.transpose(0, 1)


def shifted(a: Tensor, b: Tensor) -> None:
    flat = torch.randn(100, dtype=torch.float64)
    a.data, b.data = flat[:64].view(8, 8, 1, 1), flat[36:].view(8, 8, 1, 1)


def apart(a: Tensor, b: Tensor) -> None:
    flat = torch.randn(128, dtype=torch.float64)
    a.data, b.data = flat[:64].view(8, 8, 1, 1), flat[64:].view(8, 8, 1, 1)


def images(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("tie", [by_data, by_set, by_view])
def test_tensors_with_one_memory_are_one_tensor(tie: Any) -> None:
    model = Tied(tie)
    assert first_names(model)["b.weight"] == "a.weight"
    conversion = pathconvert.reparameterize(model, images(), gauge="unit")
    free = [group for group in conversion.groups if group.pinned_by is None]
    assert [(group.size, group.producers) for group in free] == [(8, ("first", "a", "b"))]
    assert conversion.left_alone == {}
    torch.testing.assert_close(conversion.model(images(1)), model(images(1)), rtol=1e-12, atol=0)
    state = conversion.model.state_dict()
    assert torch.equal(state["a.weight"], state["b.weight"])
    again = Tied(tie)
    again.load_state_dict(state)
    torch.testing.assert_close(again(images(1)), model(images(1)), rtol=1e-12, atol=0)
    restored = pathconvert.restore(conversion.model, conversion.record)
    torch.testing.assert_close(restored(images(1)), model(images(1)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("tie", [transposed, shifted])
def test_tensors_that_overlap_are_left_alone(tie: Any) -> None:
    model = Tied(tie)
    assert overlaps(model) == {"a.weight": "b.weight", "b.weight": "a.weight"}
    conversion = pathconvert.reparameterize(model, images())
    reasons = {group.pinned_by for group in conversion.groups if "a" in group.producers}
    assert reasons == {"a.weight shares a part of its memory with b.weight"}
    again = Tied(tie)
    again.load_state_dict(conversion.model.state_dict())
    torch.testing.assert_close(again(images(1)), model(images(1)), rtol=1e-12, atol=0)


def test_slices_of_one_buffer_that_do_not_overlap_are_independent() -> None:
    model = Tied(apart)
    assert overlaps(model) == {}
    conversion = pathconvert.reparameterize(model, images())
    assert conversion.counts()["channels_rescaled"] == 24


def test_a_written_file_loaded_into_a_class_that_ties_is_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tied_test_net.py").write_text(BUILDER)
    monkeypatch.syspath_prepend(tmp_path)
    from tied_test_net import Tied as Own

    torch.manual_seed(0)
    model = Own().eval()
    torch.save(model.state_dict(), tmp_path / "net.pt")
    options = {"arch": "tied_test_net:Tied", "input_size": (3, 5, 5)}
    loaded, _ = pathconvert.load(tmp_path / "net.pt", **options)
    conversion = pathconvert.reparameterize(loaded, images().float())
    pathconvert.save(conversion, tmp_path / "net.path.pt")
    again = Own().eval()
    again.load_state_dict(torch.load(tmp_path / "net.path.pt"))
    torch.testing.assert_close(again(images(1).float()), model(images(1).float()))

    state = model.state_dict()
    state["b.weight"] = state["b.weight"] + 1
    torch.save(state, tmp_path / "differs.pt")
    with pytest.raises(ArchitectureError) as refused:
        pathconvert.load(tmp_path / "differs.pt", **options)
    assert str(refused.value) == (
        "a.weight and b.weight are one tensor in tied_test_net:Tied, but differ in the file"
    )
