"""Random forwards that write, view, compare, keep and pass by: correct, or left as they are.

200 programs in CI; ``tests/random_examples.py`` says how to try more by hand.
"""

from __future__ import annotations

import hypothesis
import torch
from hypothesis import strategies as st
from layer_networks import carries, randomise, run
from random_examples import examples
from reference.programs import SIDE, Program, described, fresh, programs
from test_timm import scaled_at_random
from torch import Tensor, nn

import pathconvert
from pathconvert.conversion.groups import find_units
from pathconvert.conversion.tracing.parts import trace_network

#: Relative. BatchNorm over 72 values whose deviation may be small multiplies the rounding of a few
#: layers, 1e-15, by up to 1 / √eps = 316 per layer.
TOLERANCE = 1e-8


def image(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)


def results(program: nn.Module, training: bool) -> Tensor:
    (result,) = run(fresh(program), image(2), training)
    return result


def assert_same(program: Program, other: nn.Module) -> None:
    carrying = carries(find_units(trace_network(program, image(1)).trace))
    for training in (False,) if carrying else (False, True):
        expected = results(program, training)
        size = float(expected.abs().max())
        if not 1e-6 < size < 1e12:  # 0, or so large that rounding decides
            continue
        error = float((results(other, training) - expected).abs().max()) / size
        assert error < TOLERANCE, f"training={training}: {error:.1e}"


@examples(200)
@hypothesis.given(programs(), st.sampled_from(["block", "network"]))
def test_random_factors_and_conversions_keep_the_results(program: Program, scope: str) -> None:
    randomise(program)
    hypothesis.note(described(program))
    try:
        scaled = scaled_at_random(program, image(1))
        converted = pathconvert.reparameterize(program, image(1), scope=scope).model
    except pathconvert.PathconvertError:
        return  # refused
    assert_same(program, scaled)
    assert_same(program, converted)
    loaded = fresh(program)
    loaded.load_state_dict(converted.state_dict())
    assert_same(program, loaded)
