"""One step of SGD on path-values, written as an update of weights (PBN-A eq. 20-21; design.md, "G-SGD").

A chain k has the coordinate d_k, and a weight w that leaves one of its units the coordinate v::

    v   = w · D              with D = d_k · S_r / S_c  (d_k = 1 for what leaves no chain)
    w_s = d_k / (d_p · S)    for the start weight of chain k, which leaves chain p

so that, with g = ∂loss/∂w and the sum over all trained weights that leave units of chain k::

    ∂loss/∂v   = g / D
    ∂loss/∂d_k = (w_s · g_s − Σ w · g) / d_k

Coordinates may be divided by a constant ρ_k for every chain: then d_k stands for d_k / ρ_k, and nothing else changes.
S_r / S_c is 1 in the gauge ``unit`` (``chains.py``). Values of chains are float64; weights keep their own dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: A step divides a chain's value by this at most: near zero, and through it, all weights that it carries explode.
LARGEST_SHRINK = 10.0


@dataclass(frozen=True)
class PathWeight:
    """A weight that leaves chains, and its gradient.

    Attributes:
        value: changed in place by :func:`step_weights`.
        grad: ∂loss/∂value; not changed.
        chain: the chain that each element leaves, broadcastable to the weight; the number of chains for none.
        gauge: S_r / S_c, broadcastable to the weight; None where it is 1.
        skeleton: index of the pivots, which do not move.
        rescale: factor on the coordinates' gradients, broadcastable (``weight_norm``); None for 1.
        momentum: buffer of the coordinates' gradients, changed in place; None without momentum.
    """

    value: Tensor
    grad: Tensor
    chain: Tensor
    gauge: Tensor | None
    skeleton: tuple[Tensor, ...]
    rescale: Tensor | None = None
    momentum: Tensor | None = None

    def coordinate_per_weight(self, d: Tensor) -> Tensor:
        """D, for chains' values ``d`` [chains + 1]; broadcastable to the weight."""
        per_column = d[self.chain]
        return (per_column if self.gauge is None else per_column * self.gauge).to(self.value.dtype)


def chain_values(starts: Tensor, scale: Tensor, ancestors: Sequence[Tensor]) -> Tensor:
    """d of every chain, [chains]: the product of the start weights from it up.

    Args:
        starts: the start weights, float64 [chains].
        scale: S of each, [chains].
        ancestors: the 1st, 2nd, 4th, … ancestor of every chain, [chains + 1] each.
    """
    d = with_one(starts * scale)
    for above in ancestors:
        d = d * d[above]
    return d[:-1]


def with_one(per_chain: Tensor) -> Tensor:
    """[chains] → [chains + 1]: 1 for what leaves no chain."""
    return torch.cat([per_chain, per_chain.new_ones(1)])


def flow(weights: Sequence[PathWeight], like: Tensor) -> Tensor:
    """Σ w · g over the trained weights that leave units of each chain, in the shape of ``like``, float64 [chains]."""
    total = like.new_zeros(len(like) + 1)
    for w in weights:
        product = w.value * w.grad
        if w.skeleton[0].numel():
            product[w.skeleton] = 0
        dims = [d for d, size in enumerate(w.chain.shape) if size == 1]
        sums = product.sum(dims, keepdim=True, dtype=torch.float64) if dims else product.double()
        total.index_add_(0, w.chain.flatten(), sums.flatten())
    return total[:-1]


def step_chains(d: Tensor, gradient: Tensor, lr: float | Tensor) -> tuple[Tensor, Tensor]:
    """d after a step, and which chains' steps were shortened so that d keeps its sign, [chains] each."""
    new = d - lr * gradient
    shortened = new * d.sign() < d.abs() / LARGEST_SHRINK
    return torch.where(shortened, d / LARGEST_SHRINK, new), shortened


def step_weights(
    weights: Sequence[PathWeight],
    d: Tensor,
    d_new: Tensor,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    foreach: bool,
) -> None:
    """One step of SGD on the coordinates v of ``weights``, whose chains go from ``d`` to ``d_new``, [chains] each.

    With momentum μ and decay λ, as ``torch.optim.SGD`` has them: buffer ← μ · buffer + ∂loss/∂v + λ v.
    """
    d, d_new = with_one(d), with_one(d_new)
    pivots = [w.value[w.skeleton] for w in weights]
    values, gradients = [w.value for w in weights], [w.grad for w in weights]
    before = [w.coordinate_per_weight(d) for w in weights]
    after = [w.coordinate_per_weight(d_new) for w in weights]
    scales = [1 if w.rescale is None else w.rescale for w in weights]
    if momentum == 0:  # v − lr (g / D + λ v), divided by the new D
        keep = [(b / a) * (1 - lr * weight_decay) for b, a in zip(before, after, strict=True)]
        take = [lr * scale / (b * a) for b, a, scale in zip(before, after, scales, strict=True)]
        _multiply_and_subtract(values, keep, gradients, take, foreach)
    else:
        buffers = [w.momentum for w in weights if w.momentum is not None]
        for buffer, w, b, scale in zip(buffers, weights, before, scales, strict=True):
            buffer.mul_(momentum).addcmul_(w.grad, scale / b)
            if weight_decay:
                buffer.addcmul_(w.value, weight_decay * b)
        keep = [b / a for b, a in zip(before, after, strict=True)]
        take = [lr / a for a in after]
        _multiply_and_subtract(values, keep, buffers, take, foreach)
    for w, pivot in zip(weights, pivots, strict=True):
        w.value[w.skeleton] = pivot


def _multiply_and_subtract(
    values: list[Tensor], keep: list[Tensor], steps: list[Tensor], take: list[Tensor], foreach: bool
) -> None:
    """values ← keep · values − take · steps; ``keep`` and ``take`` are broadcast."""
    if foreach:
        torch._foreach_mul_(values, keep)
        torch._foreach_addcmul_(values, steps, take, value=-1.0)
        return
    for value, k, step, t in zip(values, keep, steps, take, strict=True):
        value.mul_(k).addcmul_(step, t, value=-1.0)
