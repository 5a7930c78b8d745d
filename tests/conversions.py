"""What the tests of whole networks ask of a conversion."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pathconvert.conversion.reparameterize import Conversion
from pathconvert.path_bn.restoring import restore

#: Largest difference over largest output: float64 rounds by 1e-16; a hundred layers and the
#: division by small batch deviations make at most 1e4 times that of it here. In float32 the same
#: times 2²⁹.
RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-2}
COMBINATIONS = [
    (scope, pivot, gauge)
    for scope in ("block", "network")
    for pivot in ("matching", "max", "diagonal")
    for gauge in ("unit", "pow2")
]


def draw(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(outputs: list[Tensor], expected: list[Tensor]) -> None:
    for output, reference in zip(outputs, expected, strict=True):
        difference = float((output - reference).abs().max() / reference.abs().max())
        assert difference <= RELATIVE[reference.dtype], difference


def assert_restored(conversion: Conversion, original: nn.Module) -> None:
    """Exactly if factors are powers of two, else up to 2 units in the last place: one rounding in
    each direction.
    """
    restored = restore(conversion.model, conversion.record).state_dict()
    for name, tensor in original.state_dict().items():
        if conversion.gauge == "pow2":
            assert torch.equal(restored[name], tensor), name
        elif tensor.is_floating_point():
            whole = torch.int64 if tensor.dtype == torch.float64 else torch.int32
            steps = (restored[name].view(whole) - tensor.view(whole)).abs()
            assert int(steps.max()) <= 2, f"{name}: {int(steps.max())} units in the last place"


def image(side: int = 64) -> list[Tensor]:
    return [torch.rand(3, side, side, generator=torch.Generator().manual_seed(0))]
