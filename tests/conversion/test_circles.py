"""Pivots that would run in a circle, and streams without a host outside: both find other hosts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from layer_networks import Net, assert_same, images, randomise, run
from torch import Tensor, nn

import pathconvert
from pathconvert.conversion.reparameterize import Conversion
from pathconvert.path_bn.restoring import restore


def convolution(into: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(into, out, 3, padding=1)


def half(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def octave() -> Net:
    """Two resolutions with a residual add each; only the high one leaves the network."""

    def forward(s: Net, x: Tensor) -> Tensor:
        high, low = F.relu(s.into_high(x)), F.relu(s.into_low(half(x)))
        new_high = F.relu(high + s.high_high(high) + double(s.low_high(low)))
        low = F.relu(low + s.low_low(low) + s.high_low(half(high)))
        return s.out(F.relu(new_high + s.high_high_2(new_high) + double(s.low_high_2(low))))

    return Net(
        forward, into_high=convolution(3, 6), into_low=convolution(3, 4),
        high_high=convolution(6, 6), high_low=convolution(6, 4), low_high=convolution(4, 6),
        low_low=convolution(4, 4), high_high_2=convolution(6, 6), low_high_2=convolution(4, 6),
        out=nn.Conv2d(6, 3, 1),
    )  # fmt: skip


def recursive() -> Net:
    """A block of two convolutions, applied twice to its own result."""

    def forward(s: Net, x: Tensor) -> Tensor:
        x = F.relu(s.first(x))
        for _ in range(2):
            x = F.relu(s.b(F.relu(s.a(x))))
        return s.out(x)

    return Net(
        forward, first=convolution(3, 6), a=convolution(6, 8), b=convolution(8, 6),
        out=nn.Conv2d(6, 3, 1),
    )  # fmt: skip


def linknet() -> Net:
    """An encoder of three stages; the decoder adds each of the encoder's results to its own."""

    def forward(s: Net, x: Tensor) -> Tensor:
        one = F.relu(s.e1(x))
        two = F.relu(s.e2(half(one)))
        three = F.relu(s.e3(half(two)))
        two_again = two + double(F.relu(s.d3b(F.relu(s.d3a(three)))))
        one_again = one + double(F.relu(s.d2b(F.relu(s.d2a(two_again)))))
        return s.out(one_again)

    return Net(
        forward, e1=convolution(3, 4), e2=convolution(4, 8), e3=convolution(8, 12),
        d3a=nn.Conv2d(12, 3, 1), d3b=convolution(3, 8), d2a=nn.Conv2d(8, 2, 1),
        d2b=convolution(2, 4), out=nn.Conv2d(4, 3, 1),
    )  # fmt: skip


#: name → network, and its number of free channels in scope network
NETWORKS: dict[str, tuple[Callable[[], Net], int]] = {
    "octave": (octave, 6 + 4),
    "recursive": (recursive, 6 + 8),
    "linknet": (linknet, 4 + 8 + 12 + 3 + 2),
}


def ends_at_a_fixed_factor(conversion: Conversion) -> bool:
    """Whether the pivots of every unit lead to a factor that is 1."""
    pivots = conversion.pivots
    for start in range(conversion.units.count):
        seen, at = set(), start
        while at >= 0 and pivots.layer[at] >= 0:
            if at in seen:
                return False
            seen.add(at)
            at = int(pivots.next_unit[at])
    return True


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("pivot", ["matching", "max", "diagonal"])
@pytest.mark.parametrize("gauge", ["unit", "pow2"])
def test_every_live_channel_finds_a_host(name: str, pivot: str, gauge: str) -> None:
    build, free = NETWORKS[name]
    net, x = randomise(build()), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    conversion = pathconvert.reparameterize(net, x, "network", pivot, gauge)
    counts = conversion.counts()
    assert counts["channels_rescaled"] == free
    assert counts["channels_circular"] == counts["channels_dead"] == 0
    assert ends_at_a_fixed_factor(conversion)
    assert_same(net, conversion.model, x)
    if gauge == "pow2":
        assert all(map(torch.equal, run(net, x), run(conversion.model, x)))
        state = restore(conversion.model, conversion.record).state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())
    else:
        size = conversion.magnitudes()[conversion.rescaled()]
        torch.testing.assert_close(torch.from_numpy(size), torch.ones(free, dtype=torch.float64))


def test_only_what_lies_on_a_circle_moves() -> None:
    """Units of the recursive block's result change their host; what leads to them does not."""
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    conversion = pathconvert.reparameterize(randomise(recursive()), x, "network", "max")
    hosts = {
        group.name: [pivot.parameter for pivot in group.pivots if pivot]
        for group in conversion.groups
        if group.pinned_by is None
    }
    assert set(hosts["first"]) == {"a.weight", "out.weight"}
    assert set(hosts["a"]) == {"b.weight"}


def test_units_that_lead_to_a_stream_without_a_host_open_the_way() -> None:
    """Only the inner channels leave the network; their first choice is the way back."""

    def forward(s: Net, x: Tensor) -> Tensor:
        x = F.relu(s.first(x))
        for _ in range(2):
            inner = F.relu(s.a(x))
            x = F.relu(x + s.b(inner))
        return s.out(inner)

    net = randomise(
        Net(
            forward, first=convolution(3, 6), a=convolution(6, 5), b=convolution(5, 6),
            out=nn.Conv2d(5, 3, 1),
        )
    )  # fmt: skip
    x = images()
    conversion = pathconvert.reparameterize(net, x, "network", "max")
    counts = conversion.counts()
    assert (counts["channels_rescaled"], counts["channels_circular"]) == (6 + 5, 0)
    assert {pivot.parameter for pivot in conversion.groups[0].pivots if pivot} == {"a.weight"}
    assert_same(net, conversion.model, x)


def test_a_stream_that_no_layer_leaves_alone_is_circular_not_dead() -> None:
    """The one layer that reads the stream makes outputs and leads back."""

    def forward(s: Net, x: Tensor) -> Tensor:
        x = F.relu(s.first(x))
        for _ in range(2):
            both = s.both(x)
            x = F.relu(x + both[:, :4])
        return both[:, 4:]

    net, x = randomise(Net(forward, first=convolution(3, 4), both=convolution(4, 6))), images()
    conversion = pathconvert.reparameterize(net, x, "network", "max")
    counts = conversion.counts()
    assert (counts["channels_circular"], counts["channels_dead"]) == (4, 0)
    assert conversion.groups[0].pivots == (None,) * 4
    assert_same(net, conversion.model, x)
