"""Watching modules run leaves no trace on them, whatever happens in between."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from pathconvert.conversion.calls import leaves, observe, running_modules, tensor_uses, watched


class Borrower(nn.Module):
    """Uses its layer's weight itself, beside calling the layer, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.lent = nn.Linear(3, 3), nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.get_buffer("calls").add_(1)
        return scale * (self.own(x) + self.lent(x) @ self.lent.weight)


def hooks_of(model: nn.Module) -> int:
    own = [(m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    return sum(map(len, (*sum(own, ()), module_hooks._global_forward_pre_hooks)))


def test_watched_sees_arguments_and_results_and_may_replace_a_result() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    seen = []
    x = torch.ones(1, 2)
    with watched(
        leaves(model),
        before=lambda name, call: seen.append((name, tuple(call[0][0].shape))),
        after=lambda name, result: torch.full_like(result, 7) if name == "1" else None,
    ):
        assert model(x).tolist() == [[7, 7]]
    assert seen == [("0", (1, 2)), ("1", (1, 2))]
    assert model(x).tolist() != [[7, 7]]


def test_no_hook_is_left_behind_by_a_failing_forward() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    stack: list[nn.Module] = []
    with (
        pytest.raises(RuntimeError, match="cannot be multiplied"),
        watched(dict(model.named_modules()), before=lambda *_: None, after=lambda *_: None),
        running_modules(stack),
    ):
        model(torch.ones(1, 5))
    assert hooks_of(model) == 0
    assert stack == []


def test_tensor_uses_tells_own_from_foreign_uses() -> None:
    model = Borrower()
    with tensor_uses(model) as uses:
        model(torch.ones(1, 3))
    assert uses["own.weight"] == {("", "own")}
    assert uses["lent.weight"] == {("", "lent"), ("",)}
    assert uses["calls"] == {("",)}


def test_observe_notes_every_call_and_restores_buffers() -> None:
    model = Borrower().double()
    observed = observe(model, (torch.ones(4, 3), 2.0), torch.float64)
    assert observed.calls["own"][0].arguments[0][0].shape == (4, 3)
    assert observed.calls[""][0].arguments[0][1] == 2.0
    calls = [call for made in observed.calls.values() for call in made]
    assert all(call.arguments[0][0].is_meta for call in calls)
    assert [one.rpartition(".")[2] for one in observed.calls["own"][0].functions] == ["linear"]
    assert all(call.escapes == frozenset() for call in calls)
    assert model.get_buffer("calls") == 0


def test_observe_fills_an_empty_batch() -> None:
    observed = observe(nn.Sequential(nn.Linear(3, 2)), (torch.ones(0, 3),), torch.float32)
    assert observed.calls["0"][0].arguments[0][0].shape == (1, 3)


class KeepsInside(nn.Module):
    """Keeps an inner tensor, which is read after the call."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.own(x).relu()
        return self.kept * 2


def test_observe_names_what_leaves_a_call_otherwise_than_as_its_result() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = KeepsInside()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.inner.kept

    observed = observe(Reads(), (torch.ones(2, 3),), torch.float32)
    (call,) = observed.calls["inner"]
    names = [call.functions[number] for number, _ in call.escapes]
    assert [name.rpartition(".")[2] for name in names] == ["relu"]
    assert observed.calls["inner.own"][0].escapes == frozenset()
