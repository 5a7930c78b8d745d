"""Random forwards in which tensors are written, viewed, compared, kept and passed by.

A program is a list of statements on feature maps [2, C, 6, 6]. Torch executes it as it stands, with
all its aliasing: a statement may change a tensor that another one reads later.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

SIDE = 6


@dataclass(frozen=True)
class Statement:
    """``values.append(OPERATIONS[kind](program, values[reads[0]], …, *arguments))``."""

    kind: str
    reads: tuple[int, ...]
    arguments: tuple[Any, ...] = ()


class Part(nn.Module):
    """A convolution and an activation, which also leaves as an attribute."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(into, out, 3, padding=1), nn.Conv2d(out, out, 1)
        self.seen: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = F.relu(self.first(x))
        return F.relu(self.second(self.seen))


class Program(nn.Module):
    """Executes statements; value 0 is the input, the last value is the result.

    Args:
        statements: in order.
        layers: the modules and tensors that they name.
        decides: whether a decision on numbers takes the network apart.
    """

    def __init__(
        self, statements: list[Statement], layers: dict[str, Any], *, decides: bool
    ) -> None:
        super().__init__()
        self.statements, self.decides = statements, decides
        for name, layer in layers.items():
            if isinstance(layer, nn.Module):
                setattr(self, name, layer)
            else:
                self.register_buffer(name, layer, persistent=name.startswith("kernel"))

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for one in self.statements:
            made = OPERATIONS[one.kind](self, *(values[i] for i in one.reads), *one.arguments)
            values.append(made)
            if self.decides and made.mean() < -1e30:
                values.append(made * 0)
        return values[-1]


def write(y: Tensor, index: Any, x: Any) -> Tensor:
    y[index] = x
    return y


def channels(start: int, stop: int) -> tuple[slice, slice]:
    return slice(None), slice(start, stop)


def escaped(part: Part, x: Tensor) -> Tensor:
    """What the part made, beside its result."""
    return torch.cat([part(x), part.seen], 1)


def padded(x: Tensor, width: int) -> Tensor:
    """Zero padding by tensors, cropped again."""
    before = torch.tensor([2 * width]) // 2
    return F.pad(x, [before, 0, 0, before - 0])[..., :SIDE, :SIDE]


def in_slice(x: Tensor, change: str, start: int, stop: int) -> Tensor:
    """Change some channels in place."""
    match change:
        case "*=":
            x[:, start:stop] *= 2
        case "+=":
            x[:, start:stop] += x[:, start:stop].flip(2)
        case "view":
            view = x[:, start:stop]
            view.mul_(3)
        case "rectify":
            F.relu(x[:, start:stop], inplace=True)
        case "zero":
            x[:, start:stop] = 0
        case "one":
            x[..., 0] = 1
    return x


def gated(x: Tensor, kind: str) -> Tensor:
    """Rectify by a comparison with 0; each is continuous, so rounding cannot decide it."""
    match kind:
        case "mask":
            return x * (x > 0)
        case "where":
            return torch.where(x > 0, x, 0.1 * x)
        case "fill":
            return x.masked_fill(x <= 0, 0)
        case "maximum":
            return torch.maximum(x, torch.tensor(0.0).to(x))
        case "sign":
            return x * x.sign().clamp(min=0)
    return x.where(x.ge(0), -x)


def reduced(x: Tensor, kind: str, dim: int) -> Tensor:
    """An operation along a dimension."""
    match kind:
        case "cumsum":
            return x.cumsum(dim)
        case "sort":
            return x.sort(dim)[0]
        case "amax":
            return x - x.amax(dim, keepdim=True)
        case "norm":
            return x - x.norm(dim=dim, keepdim=True)
    return x + x.mean(axis=dim, keepdims=True)


def constant_filter(x: Tensor, kernel: Tensor) -> Tensor:
    return F.conv2d(x, kernel, padding=1, groups=x.shape[1])


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "layer": lambda p, x, name: getattr(p, name)(x),
    "part": lambda p, x, name: escaped(getattr(p, name), x),
    "relu": lambda _, x: F.relu(x),
    "relu_": lambda _, x: x.relu_(),
    "gate": lambda _, x, kind: gated(x, kind),
    "beyond": lambda _, x, y: (x - y) * (x > y),
    "add": lambda _, x, y: x + y,
    "add_": lambda _, x, y: x.add_(y),
    "mul": lambda _, x, y: x * y,
    "divide": lambda _, x, y: torch.divide(y, x.abs() + 1),
    "cat": lambda _, x, y: torch.cat([x, y], 1),
    "filter": lambda p, x, name, flips: constant_filter(
        x, getattr(p, name).flip(2) if flips else getattr(p, name)
    ),
    "into": lambda _, x, maker, into, start, stop: write(
        getattr(torch, maker)(x), channels(into, into + stop - start), x[:, start:stop]
    ),
    "over": lambda _, x, y, into, start, stop: write(
        x, channels(into, into + stop - start), y[:, start:stop]
    ),
    "listed": lambda _, x, order: write(torch.zeros_like(x), (slice(None), list(order)), x),
    "change": lambda _, x, change, start, stop: in_slice(x, change, start, stop),
    "index": lambda _, x, order: x[:, torch.tensor(order, device=x.device)],
    "select": lambda _, x, mask: x[:, torch.tensor(mask)],
    "pad": lambda _, x, width: padded(x, width),
    "reduce": lambda _, x, kind, dim: reduced(x, kind, dim),
    "view": lambda _, x: x[:, :],
    "subtract": lambda _, x: x.sub_(0.45),
}

GATES = ("mask", "where", "fill", "maximum", "sign", "method")
CHANGES = ("*=", "+=", "view", "rectify", "zero", "one")
MAKERS = ("zeros_like", "ones_like", "clone")


class Draft:
    """Draws statements one after another, so that shapes fit."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.widths = [3]
        self.statements: list[Statement] = []
        self.layers: dict[str, Any] = {}

    def pick(self, values: Any) -> Any:
        return self.draw(st.sampled_from(list(values)))

    def number(self, low: int, high: int) -> int:
        return int(self.draw(st.integers(low, high)))

    def add(self, kind: str, reads: tuple[int, ...], width: int, *arguments: Any) -> None:
        self.statements.append(Statement(kind, reads, arguments))
        self.widths.append(width)

    def layer(self, kind: str, layer: Any) -> str:
        name = f"{kind}{len(self.layers)}"
        self.layers[name] = layer
        return name

    def span(self, width: int) -> tuple[int, int]:
        start = self.number(0, width - 1)
        return start, self.number(start + 1, width)

    def step(self) -> None:
        """Draw one statement that reads one of the latest values."""
        x = self.number(max(0, len(self.widths) - 4), len(self.widths) - 1)
        width = self.widths[x]
        kind = self.pick([
            "conv", "conv", "conv", "conv", "norm", "part", "relu", "relu_", "gate", "gate", "pair",
            "pair", "filter", "filter", "into", "into", "over", "listed", "change", "change",
            "index", "select", "pad", "reduce", "view",
        ])  # fmt: skip
        if kind in ("conv", "norm", "part"):
            self._module(kind, x, width)
        elif kind in ("relu", "relu_", "view"):
            self.add(kind, (x,), width)
        elif kind == "gate":
            self.add(kind, (x,), width, self.pick(GATES))
        elif kind == "pair":
            self._pair(x, width)
        elif kind == "filter":
            known = [n for n, k in self.layers.items() if isinstance(k, Tensor) and len(k) == width]
            name = self.pick([*known, ""]) or self._kernel(width)
            self.add(kind, (x,), width, name, self.pick([False, False, True]))
        elif kind == "into":
            start, stop = self.span(width)
            into = self.number(0, width - (stop - start))
            self.add(kind, (x,), width, self.pick(MAKERS), into, start, stop)
        elif kind == "over":
            y = self.pick(i for i, w in enumerate(self.widths) if w == width)
            start, stop = self.span(width)
            self.add(kind, (x, y), width, self.number(0, width - (stop - start)), start, stop)
        elif kind == "change":
            self.add(kind, (x,), width, self.pick(CHANGES), *self.span(width))
        elif kind in ("listed", "index"):
            self.add(kind, (x,), width, tuple(self.draw(st.permutations(range(width)))))
        elif kind == "select":
            mask = tuple(self.pick([True, True, False]) for _ in range(width - 1))
            self.add(kind, (x,), sum(mask) + 1, (True, *mask))
        elif kind == "pad":
            self.add(kind, (x,), width, self.number(0, 2))
        elif kind == "reduce":
            how = self.pick(["cumsum", "sort", "amax", "norm", "mean"])
            self.add(kind, (x,), width, how, self.pick([1, 2, 3, -1]))

    def _module(self, kind: str, x: int, width: int) -> None:
        if kind == "norm":
            norm = nn.BatchNorm2d(width, affine=self.pick([True, True, False]))
            self.add("layer", (x,), width, self.layer(kind, norm))
        elif kind == "part":
            out = self.number(1, 3)
            self.add(kind, (x,), 2 * out, self.layer(kind, Part(width, out)))
        else:
            groups = self.pick([1, 1, width])
            out = groups * self.number(1, 4 if groups == 1 else 1)
            size, bias = self.pick([1, 3]), self.pick([True, False])
            conv = nn.Conv2d(width, out, size, padding=size // 2, groups=groups, bias=bias)
            self.add("layer", (x,), out, self.layer(kind, conv))

    def _pair(self, x: int, width: int) -> None:
        kind = self.pick(["add", "add", "add_", "mul", "cat", "cat", "beyond", "divide"])
        y = self.pick(i for i, w in enumerate(self.widths) if w == width)
        self.add(kind, (x, y), 2 * width if kind == "cat" else width)

    def _kernel(self, width: int) -> str:
        """A filter; its name says whether it is in the state dict."""
        kernel = torch.rand(width, 1, 3, 3, generator=torch.Generator().manual_seed(width)) + 0.1
        return self.layer(self.pick(["kernel", "fixed"]), kernel)


@st.composite
def programs(draw: Any) -> Program:
    """A program in evaluation mode and float64, with random weights."""
    draft = Draft(draw)
    if draft.pick([False, False, True]):
        draft.add("subtract", (0,), 3)
    draft._module("conv", 0, 3)
    for _ in range(draft.number(2, 8)):
        draft.step()
    draft.add("relu", (len(draft.widths) - 1,), draft.widths[-1])
    end = nn.Conv2d(draft.widths[-1], 2, 1)
    draft.add("layer", (len(draft.widths) - 1,), 2, draft.layer("end", end))
    decides = draft.pick([False, False, True])
    return Program(draft.statements, draft.layers, decides=decides)


def described(program: Program) -> str:
    """The program, one statement a line."""
    lines = [f"{i}: {s.kind} {s.reads} {s.arguments}" for i, s in enumerate(program.statements, 1)]
    layers = [f"{name} = {layer}" for name, layer in program.named_children()]
    return "\n".join([*lines, *layers, f"decides {program.decides}"])


def fresh(program: Program) -> Program:
    """A copy as a new process would make it, without what earlier runs left in its parts."""
    made = copy.deepcopy(program)
    for module in made.modules():
        if isinstance(module, Part):
            module.seen = None
    return made
