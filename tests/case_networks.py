"""Small networks on which a converter goes wrong, as public reports have them, and our variations.

Every entry of ``CASES`` says which report it follows. ``VARIATIONS`` has at least three networks of
every kind that nobody reported. A network's ``rescaled`` is the number of its hidden channels that
have factors in scope network, where every stream has them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from layer_networks import Net
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A network, the shape of one input, and what a conversion of it has to rescale.

    Attributes:
        make: builds the network.
        rescaled: number of channels that get factors.
        shape: of one input, without the batch.
        source: the public report that it follows; empty for our own.
    """

    make: Callable[[], nn.Module]
    rescaled: int
    shape: tuple[int, ...] = (3, 17, 17)
    source: str = ""


class Backbone(nn.Module):
    """Two convolutions; the first one's activation leaves as ``leave`` says."""

    def __init__(self, leave: Callable[[Backbone, Tensor, Any], None]) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.skip: Any = None
        self._leave = leave

    def forward(self, x: Tensor, store: Any = None) -> Tensor:
        y = F.relu(self.c1(x))
        self._leave(self, y, store)
        return F.relu(self.c2(y))


def keep_result(module: nn.Module, _: Any, made: Tensor) -> None:
    """A forward hook."""
    module.skip = made


class Escape(nn.Module):
    """A decision on numbers takes the network apart; ``leave`` and ``read`` pass a part by."""

    def __init__(
        self,
        leave: Callable[[Backbone, Tensor, Any], None],
        read: Callable[[Escape, Any], Tensor],
        hook: bool = False,
    ) -> None:
        super().__init__()
        self.backbone, self.head = Backbone(leave), nn.Conv2d(16, 3, 1)
        self._read = read
        if hook:
            self.backbone.c1.register_forward_hook(keep_result)

    def forward(self, x: Tensor) -> Tensor:
        store: dict[str, Tensor] = {}
        y = self.backbone(x, store)
        if y.mean() < -1e9:
            y = y * 0
        return self.head(torch.cat([y, self._read(self, store)], 1))


class Remembers(nn.Module):
    """Adds what its part saw in the call before."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone(keep)
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        old = self.backbone.skip
        y = self.backbone(x)
        if y.mean() < -1e9:
            y = y * 0
        return self.head(torch.cat([y, y if old is None else old], 1))


def keep(part: Backbone, y: Tensor, _: Any) -> None:
    part.skip = y


def nothing(part: Backbone, y: Tensor, store: Any) -> None:
    """Leave only as the result."""


class TiedStorage(nn.Module):
    """Two layers that share memory in the way that ``tie`` says."""

    def __init__(self, tie: Callable[[nn.Conv2d, nn.Conv2d], None]) -> None:
        super().__init__()
        self.first, self.out = nn.Conv2d(3, 8, 1), nn.Linear(8, 3)
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self._tie = tie
        tie(self.a, self.b)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """``double()`` and ``to()`` copy each weight, so share the memory again."""
        super()._apply(fn, recurse)
        self._tie(self.a, self.b)
        return self

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.a, self.b):
            x = F.relu(layer(x))
        return self.out(x.mean((2, 3)))


def same_weight(a: nn.Conv2d, b: nn.Conv2d) -> None:
    b.weight.data = a.weight.data


def transposed_weight(a: nn.Conv2d, b: nn.Conv2d) -> None:
    b.weight.data = a.weight.data.transpose(0, 1)


def same_bias(a: nn.Conv2d, b: nn.Conv2d) -> None:
    b.bias.data = a.bias.data


def row_as_bias(a: nn.Conv2d, b: nn.Conv2d) -> None:
    b.bias.data = a.weight.data[0, :, 0, 0]


def classifier(
    middle: Callable[[Net, Tensor], Tensor], into: int = 8, **layers: Any
) -> Callable[[], nn.Module]:
    """conv c1 (3 → 8) → ``middle`` → mean → linear."""

    def make() -> nn.Module:
        made = {name: layer() if callable(layer) else layer for name, layer in layers.items()}
        return Net(
            lambda s, x: s.out(middle(s, s.c1(x)).mean((2, 3))),
            c1=nn.Conv2d(3, 8, 3), out=nn.Linear(into, 3), **made,
        )  # fmt: skip

    return make


def of_input(change: Callable[[Tensor], Any]) -> Callable[[], nn.Module]:
    """A network that first changes its input in place."""

    def forward(s: Net, x: Tensor) -> Tensor:
        change(x)
        return s.fc(s.body(x).mean((2, 3)))

    def make() -> nn.Module:
        body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 1), nn.ReLU()
        )
        return Net(forward, body=body, fc=nn.Linear(12, 3))

    return make


def in_a_row(*layers: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(layer() for layer in layers))


def u_net(widths: Callable[[int, int], list[Any]]) -> Callable[[], nn.Module]:
    """A small U-Net that pads what it has scaled up to the size of its skip connection."""

    def block(i: int, o: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())

    def forward(s: Net, x: Tensor) -> Tensor:
        a = s.a(x)
        u = s.up(s.b(F.max_pool2d(a, 2)))
        u = F.pad(u, [w for d in (3, 2) for w in widths(a.size(d), u.size(d))])
        return s.out(s.c(torch.cat([a, u], 1)))

    return lambda: Net(
        forward, a=block(3, 8), b=block(8, 16), up=nn.ConvTranspose2d(16, 8, 2, stride=2),
        c=block(16, 8), out=nn.Conv2d(8, 2, 1),
    )  # fmt: skip


def by_tensors(wide: int, narrow: int) -> list[Any]:
    d = torch.tensor([wide - narrow])
    return [d // 2, d - d // 2]


def by_numbers_of_tensors(wide: int, narrow: int) -> list[Any]:
    d = torch.tensor(wide - narrow)
    return [int(d) // 2, (d - torch.div(d, 2, rounding_mode="floor")).item()]


def by_a_list(wide: int, narrow: int) -> list[Any]:
    return (torch.tensor([0, 1]) * (wide - narrow)).tolist()


def by_arrays(wide: int, narrow: int) -> list[Any]:
    d = torch.tensor([wide, narrow]).numpy()
    return [d[0] - d[1], 0]


def written(write: Callable[[Tensor, Tensor], Any]) -> Callable[[], nn.Module]:
    """Writes an activation into another tensor."""

    def middle(s: Net, x: Tensor) -> Tensor:
        x = F.relu(x)
        y = torch.zeros_like(x)
        return F.relu(s.c2(write(x, y)))

    return classifier(middle, c2=lambda: nn.Conv2d(8, 8, 3))


def gated(gate: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    """Rectifies by a mask."""
    return classifier(lambda s, x: gate(s.c2(gate(x))), c2=lambda: nn.Conv2d(8, 8, 3))
