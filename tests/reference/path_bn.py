"""Path-BN by the letter (PBN eq. 8-10), one number at a time."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def path_bn(x: Tensor, module: Any, conv: Any, training: bool) -> Tensor:
    """z_j before the ReLU, for a convolution ``conv`` (its settings) in Path-BN form ``module``;
    [N, out, *spatial].

    Args:
        x: [N, in, *spatial], float64.
        module: its weight, bn, pivots and λ.
        conv: stride, dilation, padding, padding_mode, groups.
        training: statistics of the batch, else the running ones.
    """
    dims = x.dim() - 2
    widths = [side for d in reversed(range(dims)) for side in (conv.padding[d], conv.padding[d])]
    padded = F.pad(
        x, widths, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode
    )
    u = module.weight.detach().clone()
    centre = [size // 2 for size in u.shape[2:]]
    for row, column in zip(module.pivot_row.tolist(), module.pivot_column.tolist(), strict=True):
        u[(row, column % u.shape[1], *centre)] = 0.0
    count = [
        (padded.shape[2 + d] - conv.dilation[d] * (u.shape[2 + d] - 1) - 1) // conv.stride[d] + 1
        for d in range(dims)
    ]
    total = torch.zeros(len(x), len(u), *count, dtype=x.dtype)
    skip = torch.zeros_like(total)
    per_group = len(u) // conv.groups
    for place in itertools.product(*map(range, count)):
        for tap in itertools.product(*map(range, u.shape[2:])):
            where = [
                p * s + t * d
                for p, s, t, d in zip(place, conv.stride, tap, conv.dilation, strict=True)
            ]
            read = padded[(slice(None), slice(None), *where)]
            for j in range(len(u)):
                first = j // per_group * u.shape[1]
                total[(slice(None), j, *place)] += (
                    read[:, first : first + u.shape[1]] @ u[(j, slice(None), *tap)]
                )
            if list(tap) == centre:
                for j, k, m in zip(
                    module.pivot_row, module.pivot_column, module.pivot_value, strict=True
                ):
                    skip[(slice(None), int(j), *place)] += module.skip_scale * m * read[:, int(k)]
    bn = module.bn
    result = torch.empty_like(total)
    for j in range(len(u)):
        sums = total[:, j]
        mean, var = (
            (sums.mean(), sums.var(correction=0))
            if training
            else (bn.running_mean[j], bn.running_var[j])
        )
        result[:, j] = (
            (sums - mean) / (var + bn.eps).sqrt() * bn.weight[j] + bn.bias[j] + skip[:, j]
        )
    return result.detach()
