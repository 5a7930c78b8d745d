"""Groups, pivots, scales, rescale, record: the pure parts, on units made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from pathconvert.conversion.groups import FIXED, find_units
from pathconvert.conversion.pivots import _match, choose_pivots
from pathconvert.conversion.record import Record
from pathconvert.conversion.rescale import factors, rescale
from pathconvert.conversion.runs import decode_runs, encode_runs
from pathconvert.conversion.scales import choose_scales
from pathconvert.conversion.tracing.parts import trace_network
from pathconvert.conversion.tracing.trace import PINNED, ZERO, Slot, Trace
from pathconvert.errors import RecordError


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@settings(derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 6), st.integers(1, 4)), max_size=20))
def test_runs_round_trip(pieces: list[tuple[int, int]]) -> None:
    units = ids(*[unit for unit, repeat in pieces for _ in range(repeat)])
    assert decode_runs(encode_runs(units)).tolist() == units.tolist()


@pytest.mark.parametrize(
    ("units", "runs"),
    [
        ([], []),
        ([5, 6, 7], [[5, 3, 1]]),
        ([0, 0, 1, 1, 2, 2], [[0, 3, 2]]),
        ([-1, -1, 0, 1], [[-1, 1, 2], [0, 2, 1]]),
        ([-1, 0], [[-1, 1, 1], [0, 1, 1]]),  # FIXED is not the unit before unit 0
        ([2, 1, 0], [[2, 1, 1], [1, 1, 1], [0, 1, 1]]),
    ],
)
def test_runs(units: list[int], runs: list[list[int]]) -> None:
    assert encode_runs(ids(*units)) == runs


def test_a_damaged_run_is_a_record_error() -> None:
    record = {"format_version": 1, "scales": [1.0], "tensors": {"w": {"rows": [[0, 1]]}}}
    with pytest.raises(RecordError) as error:
        Record.from_json(record)
    assert (
        str(error.value)
        == "the conversion record is damaged: ValueError: not enough values to unpack (expected 3,"
        " got 2)"
    )


@pytest.mark.parametrize("length", [1, 3, 8])
@pytest.mark.parametrize(
    ("groups", "transposed"), [(1, False), (2, False), (4, False), (1, True), (2, True), (4, True)]
)
def test_factor_of_every_element(groups: int, transposed: bool, length: int) -> None:
    """factor[j, k] = s[row j] / s[column k], element by element."""
    out, into = 8, 4
    layer = (nn.ConvTranspose2d if transposed else nn.Conv2d)(into, out, 3, groups=groups)
    slot = Slot("w", np.arange(out), out + np.arange(into), groups, transposed)
    scales = torch.linspace(0.5, 3, out + into + 1, dtype=torch.float64)
    factor = torch.cat(list(factors(slot, scales, layer.weight.shape, length)))
    for j in range(out):
        for k in range(into):
            if j // (out // groups) != k // (into // groups):
                continue
            at = (k, j % (out // groups)) if transposed else (j, k % (into // groups))
            assert float(factor[at]) == float(scales[j] / scales[out + k]), (j, k)


def chain(*weights: float) -> tuple[nn.Sequential, Trace]:
    """A chain of one-channel linear layers, and its trace by hand."""
    model = nn.Sequential(*[nn.Linear(1, 1, bias=False, dtype=torch.float64) for _ in weights])
    trace = Trace()
    column = ids(PINNED)
    for i, weight in enumerate(weights):
        model[i].weight.data.fill_(weight)
        rows = trace.fresh(1)
        trace.slots.append(Slot(f"{i}.weight", rows, column))
        column = rows
    trace.pin(column, "is a network output")
    return model, trace


def test_factors_multiply_from_the_output_to_the_input() -> None:
    model, trace = chain(7.0, -3.0, 5.0)
    units = find_units(trace)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    pivots = choose_pivots(units, tensors, np.array([True, True, False]), "max")
    scales, held, circular = choose_scales(units, pivots, tensors, "unit")
    assert scales.tolist() == [15.0, 5.0, 1.0]
    assert pivots.value.tolist() == [-3.0, 5.0, 0.0]
    assert not held.any()
    assert not circular.any()
    rescaled = rescale(model, units.slots, scales)
    assert [float(p.detach()) for p in rescaled.parameters()] == [105.0, -1.0, 1.0]
    powers = choose_scales(units, pivots, tensors, "pow2")[0]
    assert powers.tolist() == [
        16.0,
        4.0,
        1.0,
    ], "|a| · s_next is rounded: 5 → 4, then 3 · 4 = 12 → 16"


def test_a_circle_of_pivots_keeps_its_factors() -> None:
    """A layer that reads its own output: unit → itself."""
    trace = Trace()
    unit = trace.fresh(1)
    trace.slots += [Slot("0.weight", unit, ids(PINNED)), Slot("1.weight", unit, unit)]
    units = find_units(trace)
    tensors = {
        name: torch.full((1, 1), 2.0, dtype=torch.float64) for name in ("0.weight", "1.weight")
    }
    pivots = choose_pivots(units, tensors, np.array([True]), "max")
    scales, _, circular = choose_scales(units, pivots, tensors, "unit")
    assert (scales.tolist(), circular.tolist()) == ([1.0], [True])


def test_ties_and_pins() -> None:
    trace = Trace()
    a, b = trace.fresh(3), trace.fresh(3)
    trace.slots += [Slot("a.weight", a, ids(PINNED)), Slot("b.weight", b, ids(PINNED, ZERO, ZERO))]
    trace.tie(a, np.array([b[0], PINNED, ZERO]), "the add")
    units = find_units(trace)
    a_units, b_units = (slot.rows.tolist() for slot in units.slots)
    assert a_units[0] == b_units[0]
    assert len({*a_units, *b_units}) == 5
    reasons = dict(
        zip(range(units.count), [units.groups[g].pinned_by for g in units.group_of()], strict=True)
    )
    assert reasons[a_units[1]] == "meets a tensor that is not rescaled in the add"
    assert [reasons[u] for u in (a_units[0], a_units[2], *b_units)] == [None] * 5
    assert units.slots[1].columns is not None
    assert units.slots[1].columns.tolist() == [FIXED] * 3


def test_one_parameter_in_two_kinds_of_use_is_pinned() -> None:
    trace = Trace()
    rows, again = trace.fresh(2), trace.fresh(4)
    trace.slots += [Slot("a.weight", rows, ids(PINNED, PINNED)), Slot("a.weight", again)]
    (group,) = find_units(trace).groups
    assert group.pinned_by == "meets a second use of a.weight in another role"


def test_followers_are_neighbours_that_nothing_else_reads() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))
            self.bn_a, self.bn_b, self.bn_c = (nn.BatchNorm2d(3) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            alone = self.bn_a(self.a(x))
            b = self.b(alone)
            # one BatchNorm after two convolutions
            shared = self.bn_c(self.c(x)) + self.bn_c(self.d(x))
            return self.bn_b(b) + b.mul(2) + shared  # b has a second reader

    followers = trace_network(Net(), torch.randn(2, 3, 4, 4)).trace.followers()
    assert followers == {"a.weight": "bn_a", "bn_a": "b.weight"}


@pytest.mark.parametrize("shape", [(5, 5), (5, 8), (7, 3), (9, 4)])
def test_rounds_of_matching_are_each_optimal(shape: tuple[int, int]) -> None:
    """Columns × rows: every round takes the best assignment of the columns that are left."""
    magnitude = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = _match(magnitude.clone(), np.zeros(shape[0], dtype=np.int64))
    left = list(range(shape[0]))
    while left:
        cost = -magnitude[left].log().numpy()
        columns, rows = linear_sum_assignment(cost)
        assert chosen[[left[c] for c in columns]].tolist() == rows.tolist()
        left = [unit for place, unit in enumerate(left) if place not in columns]
