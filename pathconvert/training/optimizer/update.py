"""One step of SGD on path-values, written as an update of the weights.

It follows PBN-A eq. 20-21; docs/design.md, "G-SGD", derives it.

A chain k has the coordinate d_k, and a weight w that leaves one of its units the coordinate v::

    v   = w · D              with D = d_k · S_r / S_c  (d_k = 1 for a weight that leaves no chain)
    w_s = d_k / (d_p · S)    for the start weight of chain k, which leaves chain p

With g = ∂loss/∂w, and the sum over all trained weights that leave units of chain k, it follows
that::

    ∂loss/∂v   = g / D
    ∂loss/∂d_k = (w_s · g_s − Σ w · g) / d_k

The coordinates of every chain may be divided by a constant ρ_k, its anchor: then d_k stands for
d_k / ρ_k, and nothing else changes. S_r and S_c are 1 in the gauge ``unit`` (``chains.py``). A
momentum buffer holds the momentum of the coordinate, divided by S_r: so S_r is needed only in the
*step gradient* g / S_r², and weights that leave no chain take plain steps along it. Values of
chains are float64; weights keep their own dtype.

The chain is the same along most dimensions of a weight. The *columns* of a weight are the elements
that remain if those dimensions have size 1. The columns of all weights are joined into one vector,
so that one operation handles them all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: A step divides a chain's value by at most this: the weights of a chain explode as its value comes
#: near zero.
LARGEST_SHRINK = 10.0


@dataclass(frozen=True)
class WeightPlace:
    """Where the columns and the pivots of a weight are; the same for all steps.

    Attributes:
        name: the parameter's name.
        columns: the shape of its columns, broadcastable to the weight.
        summed: the dimensions of the weight along which ``columns`` has size 1.
        skeleton: index of the pivots, which do not move; None where the weight holds none.
    """

    name: str
    columns: tuple[int, ...]
    summed: tuple[int, ...]
    skeleton: tuple[Tensor, ...] | None


@dataclass(frozen=True)
class PathWeight:
    """A weight that leaves chains, and its gradient.

    Attributes:
        place: its columns and pivots.
        value: changed in place by :func:`step_weights`.
        grad: ∂loss/∂value; not changed.
        step_grad: ∂loss/∂value / S_r², the step gradient; not changed.
        momentum: the momentum buffer, changed in place; None without momentum.
    """

    place: WeightPlace
    value: Tensor
    grad: Tensor
    step_grad: Tensor
    momentum: Tensor | None = None


def chain_values(starts: Tensor, ancestors: Sequence[Tensor]) -> Tensor:
    """The product of the starts of every chain and of all its ancestors, float64 [chains].

    Args:
        starts: the start of every chain, float64 [chains].
        ancestors: the 1st, 2nd, 4th, … ancestor of every chain, [chains + 1] each.
    """
    product = with_one(starts)
    for above in ancestors:  # pointer doubling: the product over 1, 2, 4, … generations
        product = product * product[above]
    return product[:-1]


def with_one(per_chain: Tensor) -> Tensor:
    """[chains] → [chains + 1]: a 1 is appended, for weights that leave no chain."""
    return torch.cat([per_chain, per_chain.new_ones(1)])


def flow(weights: Sequence[PathWeight], chain: Tensor, count: int, *, foreach: bool) -> Tensor:
    """Σ w · g over the trained weights that leave units of each chain.

    The sums are float64 [chains + 1], the last for no chain.

    Args:
        weights: all trained weights that leave chains.
        chain: the chain that every column leaves, int64 [columns of all weights]; ``count`` for
            none.
        count: the number of chains.
        foreach: multiply all weights with one call.
    """
    total = torch.zeros(count + 1, dtype=torch.float64, device=chain.device)
    if not weights:
        return total
    products = (
        torch._foreach_mul([w.value for w in weights], [w.grad for w in weights])
        if foreach
        else (w.value * w.grad for w in weights)
    )
    sums = [_sum_by_column(product, w.place) for product, w in zip(products, weights, strict=True)]
    return total.index_add_(0, chain, torch.cat(sums).double())


def _sum_by_column(product: Tensor, place: WeightPlace) -> Tensor:
    """Sums of ``product`` over each column, without the pivots, flat.

    Sets the pivots of ``product`` to 0.
    """
    if place.skeleton is not None:
        product[place.skeleton] = 0
    if not place.summed:
        return product.flatten()
    dtype = torch.float32 if product.dtype.itemsize < 4 else product.dtype
    return product.sum(place.summed, dtype=dtype).flatten()


def step_chains(d: Tensor, gradient: Tensor, lr: float | Tensor) -> tuple[Tensor, Tensor]:
    """One step of SGD on the chains' values.

    Args:
        d: the values before the step, float64 [chains].
        gradient: the direction of the step, float64 [chains].
        lr: the learning rate.

    Returns:
        d after the step divided by d before, at least 1 / ``LARGEST_SHRINK``, float64 [chains]; and
        which chains' steps were shortened to this, bool [chains].
    """
    ratio = 1 - lr * gradient / d
    shortened = ratio < 1 / LARGEST_SHRINK
    return ratio.masked_fill(shortened, 1 / LARGEST_SHRINK), shortened


def step_weights(
    weights: Sequence[PathWeight],
    d: Tensor,
    ratio: Tensor,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    *,
    foreach: bool,
) -> None:
    """One step of SGD on the coordinates v of ``weights``.

    With momentum μ and decay λ, as ``torch.optim.SGD`` has them: buffer ← μ · buffer + ∂loss/∂v + λ
    v.

    Args:
        weights: their values and momentum buffers are changed in place.
        d: d / S_c of every column before the step, float64 [columns of all weights].
        ratio: d after the step divided by d before, float64 [columns of all weights].
        lr, momentum, weight_decay, foreach: the optimizer's.
    """
    if not weights:
        return
    values = [w.value for w in weights]
    pivots = [None if w.place.skeleton is None else w.value[w.place.skeleton] for w in weights]
    gradients = [w.step_grad for w in weights]
    if momentum == 0:  # v − lr (g / D + λ v), divided by the new D
        steps, keep, take = gradients, (1 - lr * weight_decay) / ratio, lr / (d * d * ratio)
    else:
        steps, keep, take = (
            [w.momentum for w in weights if w.momentum is not None],
            1 / ratio,
            lr / (d * ratio),
        )
        _multiply_and_add(steps, momentum, gradients, _split(1 / d, weights), 1.0, foreach)
        if weight_decay:
            _multiply_and_add(steps, None, values, _split(weight_decay * d, weights), 1.0, foreach)
    _multiply_and_add(values, _split(keep, weights), steps, _split(take, weights), -1.0, foreach)
    for w, pivot in zip(weights, pivots, strict=True):
        if pivot is not None and w.place.skeleton is not None:
            w.value[w.place.skeleton] = pivot


def _split(columns: Tensor, weights: Sequence[PathWeight]) -> list[Tensor]:
    """Split a vector over the columns of all weights into one tensor per weight.

    Each is broadcastable to its weight, in the weight's dtype.
    """
    dtypes = {w.value.dtype for w in weights}
    if len(dtypes) == 1:
        columns = columns.to(dtypes.pop())
    parts = columns.split([math.prod(w.place.columns) for w in weights])
    return [
        part.view(w.place.columns).to(w.value.dtype) for part, w in zip(parts, weights, strict=True)
    ]


def _multiply_and_add(
    targets: list[Tensor],
    keep: list[Tensor] | float | None,
    steps: list[Tensor],
    take: list[Tensor],
    sign: float,
    foreach: bool,
) -> None:
    """targets ← keep · targets + sign · take · steps. ``keep`` and ``take`` are broadcast.

    ``keep`` None means 1.
    """
    if foreach:
        if keep is not None:
            torch._foreach_mul_(targets, keep)
        torch._foreach_addcmul_(targets, steps, take, value=sign)
        return
    for i, (target, step, t) in enumerate(zip(targets, steps, take, strict=True)):
        if keep is not None:
            target.mul_(keep[i] if isinstance(keep, list) else keep)
        target.addcmul_(step, t, value=sign)
