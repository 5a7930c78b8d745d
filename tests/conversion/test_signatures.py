"""Arguments by name: bound as torch itself binds them, for every function that a rule claims."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_networks import factors_keep, images, two_convolutions
from torch import Tensor
from torch.overrides import get_testing_overrides, resolve_name

from pathconvert.conversion.tracing import (
    contractions,
    elementwise,
    function_call,
    layer_rules,
    pinning,
    reindexing,
)
from pathconvert.conversion.tracing.pinning import pin
from pathconvert.conversion.tracing.rules import rule_of
from pathconvert.conversion.tracing.signatures import ALIASES, bound_arguments, signatures_of

#: What torch's table of overrides says wrongly. Name of the function → the arguments that it has in
#: another place, and why.
WRONG_IN_THE_TABLE = {
    # aten::instance_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? running_mean, …), and
    # F.instance_norm calls it in this order. Only F.instance_norm itself has the statistics first.
    "torch.instance_norm": {"running_mean", "running_var", "weight", "bias"},
    # x.where(condition, y): the table has the order of torch.where(condition, x, y).
    "torch.Tensor.where": {"input"},
    # The table leaves the number of repeats out.
    "torch.repeat_interleave": {"dim"},
    "torch.Tensor.repeat_interleave": {"dim"},
}

RULE_MODULES = (contractions, elementwise, layer_rules, pinning, reindexing, function_call)


def names_read(module: ModuleType) -> Iterator[str]:
    """The names in ``call.argument("…")``; those of a loop stand in a tuple of its function."""
    for function in ast.walk(ast.parse(inspect.getsource(module))):
        if not isinstance(function, ast.FunctionDef):
            continue
        calls = [
            node.args[0]
            for node in ast.walk(function)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "argument"
        ]
        found: list[ast.AST] = [one for one in calls if isinstance(one, ast.Constant)]
        if any(isinstance(one, ast.Name) for one in calls):
            tuples = [node for node in ast.walk(function) if isinstance(node, ast.Tuple)]
            found += [element for one in tuples for element in one.elts]
        for one in found:
            if isinstance(one, ast.Constant) and isinstance(one.value, str):
                yield one.value


READ = {name for module in RULE_MODULES for name in names_read(module)} | {"input"}


def claimed() -> dict[str, tuple[Callable[..., Any], str, list[str]]]:
    """Title → every function that a rule other than ``pin`` claims, its plain name, and the names
    of its parameters in torch's table.
    """
    functions = {}
    for function, stand_in in get_testing_overrides().items():
        name, rule = rule_of(function)
        if rule is not pin:
            parameters = [
                "input" if one in ("self", "tensor", "inputs") else ALIASES.get(one, one)
                for one in inspect.signature(stand_in).parameters
            ]
            functions[str(resolve_name(function))] = (function, name, parameters)
    return functions


def places(function: Callable[..., Any], name: str, parameter: str) -> set[int]:
    """The places of a parameter in the signatures that a function's calls are bound by."""
    orders = [list(one.parameters.parameters) for one in signatures_of(function, name)]
    return {order.index(parameter) for order in orders if parameter in order}


def test_rules_read_what_the_signatures_call_so() -> None:
    assert {"input", "other", "dim", "weight", "running_mean", "groups", "grid", "value"} <= READ
    known = {
        parameter
        for function, name, _ in claimed().values()
        for one in signatures_of(function, name)
        for parameter in one.parameters.parameters
    }
    assert known >= READ


def test_places_are_those_of_torchs_table() -> None:
    functions = claimed()
    assert len(functions) > 300
    differ: dict[str, set[str]] = {}
    for title, (function, name, table) in functions.items():
        for place, parameter in enumerate(table):
            bound = places(function, name, parameter)
            if parameter in READ and bound and place not in bound:
                differ.setdefault(title, set()).add(parameter)
    assert differ == WRONG_IN_THE_TABLE


# ---- calls ---------------------------------------------------------------------------------------

X, Y, MASK = torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)
BOUND: dict[str, tuple[Any, str, tuple[Any, ...], dict[str, Any], dict[str, Any] | None]] = {
    "by position": (torch.cumsum, "cumsum", (X, 1), {}, {"input": X, "dim": 1}),
    "by keyword": (torch.cumsum, "cumsum", (X,), {"dim": 1}, {"input": X, "dim": 1}),
    "all by keyword": (torch.add, "add", (), {"input": X, "other": Y}, {"input": X, "other": Y}),
    "axis": (torch.cumsum, "cumsum", (X,), {"axis": 1}, {"input": X, "dim": 1}),
    "keepdims": (torch.amax, "amax", (X, 1), {"keepdims": True},
        {"input": X, "dim": 1, "keepdim": True}),
    "out is left aside": (torch.neg, "neg", (X,), {"out": Y}, {"input": X}),
    "a method": (Tensor.add, "add", (X, Y), {"alpha": 2}, {"input": X, "other": Y, "alpha": 2}),
    "in place": (Tensor.clamp_, "clamp", (X, 0), {}, {"input": X, "min": 0}),
    "an operator": (Tensor.__iadd__, "add", (X, 1), {}, {"input": X, "other": 1}),
    "torch.where": (torch.where, "where", (MASK, X, Y), {},
        {"condition": MASK, "input": X, "other": Y}),
    "x.where": (Tensor.where, "where", (X, MASK, Y), {},
        {"condition": MASK, "input": X, "other": Y}),
    "max over all": (torch.max, "max", (X,), {}, {"input": X}),
    "max along": (torch.max, "max", (X, 0), {}, {"input": X, "dim": 0}),
    "max of two": (torch.max, "max", (X, Y), {}, {"input": X, "other": Y}),
    "max of two by keyword": (Tensor.max, "max", (X,), {"other": Y}, {"input": X, "other": Y}),
    "std with a flag": (torch.std, "std", (X, False), {}, {"input": X, "unbiased": False}),
    "std along": (torch.std, "std", (X, 1), {}, {"input": X, "dim": 1}),
    "sort, stable": (torch.sort, "sort", (X,), {"stable": True, "dim": 0},
        {"input": X, "stable": True, "dim": 0}),
    "an overload of aten": (torch.ops.aten.add.Tensor, "add", (X, Y), {"alpha": 2},
        {"input": X, "other": Y, "alpha": 2}),
    "a function in Python": (F.leaky_relu, "leaky_relu", (X, 0.2, True), {},
        {"input": X, "negative_slope": 0.2, "inplace": True}),
    "too many": (torch.cumsum, "cumsum", (X, 1, 2, 3), {}, None),
    "an unknown name": (torch.cumsum, "cumsum", (X,), {"along": 1}, None),
    "another type": (torch.maximum, "maximum", (X, "y"), {}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", BOUND)
def test_bound_arguments(name: str) -> None:
    function, plain, args, kwargs, expected = BOUND[name]
    bound = bound_arguments(function, plain, args, kwargs)
    if expected is None:
        assert bound is None
        return
    assert bound is not None
    assert bound.keys() == expected.keys()
    for key, value in expected.items():
        assert bound[key] is value or bound[key] == value, key


def test_batch_norm_in_its_four_orders() -> None:
    mean, var, gamma, beta = (torch.full((3,), float(i)) for i in range(4))
    named = {"running_mean": mean, "running_var": var, "weight": gamma, "bias": beta}
    for function, args in (
        (F.batch_norm, (X, mean, var, gamma, beta)),
        (torch.batch_norm, (X, gamma, beta, mean, var, False, 0.1, 1e-5, False)),
        (torch.ops.aten.batch_norm.default, (X, gamma, beta, mean, var, False, 0.1, 1e-5, False)),
    ):
        bound = bound_arguments(function, "batch_norm", args, {})
        assert bound is not None
        assert all(bound[name] is tensor for name, tensor in named.items()), function
    bound = bound_arguments(
        torch.instance_norm,
        "instance_norm",
        (X, gamma, beta, mean, var, True, 0.1, 1e-5, False),
        {},
    )
    assert bound is not None
    assert all(bound[name] is tensor for name, tensor in named.items())


def test_a_call_that_fits_no_signature_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(function_call, "bound_arguments", lambda *_: None)
    units, _ = factors_keep(two_convolutions(lambda _, x: x.clamp(min=0)), images())
    assert units.count == 0
