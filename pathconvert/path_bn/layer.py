"""Path-BN: BatchNorm over the trained weights only, not over the fixed pivots (PBN eq. 8-10).

A layer with weights w reads z. Its BatchNorm has a = γ / √(var + eps) and b = β − a·mean (without a
BatchNorm, a = 1 and b is the layer's bias), so that y_j = a_j Σ_k w_jk z_k + b_j. In Path-BN form
the layer computes

    y_j = BN(o)_j + λ Σ_{k with pivot in row j} m_k z_k,    o_j = Σ_{k, l not a pivot} u_jk z_k

==  ===============================================================================================
u   :attr:`PathBN.weight`: w with zeros in place of the pivots
λ   :attr:`PathBN.skip_scale`
m   ``pivot_value``: λ m_k = a_j w_jk at the pivot, so m_k = ±1 with gauge ``unit``
BN  :attr:`PathBN.bn`: mean μ' and variance var' of o, γ' = a √(var' + eps), β' = b + a μ'
==  ===============================================================================================

In evaluation mode this equals y for any μ' and var'. In training mode it equals y if μ' and var'
are the statistics of the batch, and the running statistics of the original network were those of
its batch. ``candidates.py`` chooses the layers and ``entering.py`` converts them; this file has the
module and the way back.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathconvert.conversion.arithmetic import affine_map

#: Layers that Path-BN replaces, and the type of BatchNorm for each.
BATCH_NORM_OF: dict[type[nn.Module], type[nn.modules.batchnorm._BatchNorm]] = {
    nn.Linear: nn.BatchNorm1d,
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """The layer type in :data:`BATCH_NORM_OF` whose forward ``module`` uses.

    None if it uses another.
    """
    return next((kind for kind in BATCH_NORM_OF if type(module).forward is kind.forward), None)


class PathBN(nn.Module):
    """A convolution or linear layer in Path-BN form (see the module's docstring).

    Args:
        layer: the layer to replace; its settings and weight are copied.
        bn: the BatchNorm of the off-pivot sum; becomes a submodule, without a copy.
        rows, columns: the pivots' places in the weight, int64 [pivots]; columns are counted over
            all input channels.
        values: m, [pivots].
        skip_scale: λ.

    Attributes:
        weight: u, [out, in / groups, *kernel]. The entries of pivots stay zero and receive no
            gradient.
        bn: BatchNorm over the output channels.
        skip_scale: λ.
    """

    pivot_row: Tensor
    pivot_column: Tensor
    pivot_value: Tensor
    _place: Tensor
    _gather: Tensor
    _gain: Tensor

    def __init__(
        self,
        layer: nn.Module,
        bn: nn.Module,
        rows: Tensor,
        columns: Tensor,
        values: Tensor,
        skip_scale: float,
    ) -> None:
        super().__init__()
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        without_tensors: dict[int, Any] = {
            id(tensor): None for tensor in layer.parameters(recurse=False)
        }
        # the tuple keeps it from becoming a submodule
        self._settings = (copy.deepcopy(layer, without_tensors),)
        self.has_bias = layer.bias is not None
        # kernel_size, out_channels, …: some forwards read these
        for name in getattr(layer, "__constants__", ()):
            setattr(self, name, getattr(layer, name))
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        self.bn = bn
        self._skip_scale = skip_scale
        self.register_buffer("pivot_row", rows)
        self.register_buffer("pivot_column", columns)
        self.register_buffer("pivot_value", values.to(weight.dtype))
        self._plan()
        with torch.no_grad():
            self.weight.copy_(self._off_pivot())
        self.training = layer.training  # bn keeps its own mode

    @property
    def skip_scale(self) -> float:
        """λ; only ``to_path_bn`` sets it, as the size of the pivots depends on it."""
        return self._skip_scale

    def extra_repr(self) -> str:
        return (
            f"{type(self._settings[0]).__name__}, {len(self.pivot_row)} pivots,"
            f" skip_scale={self.skip_scale:g}"
        )

    def forward(self, input: Tensor) -> Tensor:
        """[N, in, *spatial] → [N, out, *spatial].

        The argument has the same name as in torch's layers.
        """
        off_pivot_sum = self._layer(input, self._off_pivot())
        normalised: Tensor = self.bn(off_pivot_sum)
        return self._add_skip(normalised, input)

    # ---- the trained part ------------------------------------------------------------------------

    def _off_pivot(self) -> Tensor:
        """u: the weight with zeros at the pivots, which therefore receive no gradient."""
        return self.weight.index_put(tuple(self._place.unbind()), self.weight.new_zeros(()))

    def _layer(self, x: Tensor, weight: Tensor) -> Tensor:
        settings = self._settings[0]
        if isinstance(settings, nn.Linear):
            return F.linear(x, weight)
        result: Tensor = settings._conv_forward(x, weight, None)  # type: ignore[operator]
        return result

    # ---- the fixed part --------------------------------------------------------------------------

    def _plan(self) -> None:
        """Choose how the skip reads its input.

        It reads it as it is, by an index, or with a scatter if pivots share a row.
        """
        rows, columns, gains = self.pivot_row, self.pivot_column, self.pivot_value * self.skip_scale
        out, into, *kernel = self.weight.shape
        places = [rows, columns % into, *(torch.full_like(rows, size // 2) for size in kernel)]
        self.register_buffer("_place", torch.stack(places), persistent=False)
        several = len(torch.unique(rows)) < len(rows)
        gather, gain = columns.clone(), gains
        if not several:  # a row without a pivot reads any channel, times 0
            gather = columns.new_zeros(out).index_put((rows,), columns)
            gain = gains.new_zeros(out).index_put((rows,), gains)
        straight = not several and torch.equal(gather, torch.arange(out, device=gather.device))
        into *= getattr(self._settings[0], "groups", 1)
        self._skip_kind = (
            "scatter" if several else "straight" if straight and out == into else "gather"
        )
        self._unit_gain = bool((gain == 1).all())
        self.register_buffer("_gather", gather, persistent=False)
        self.register_buffer("_gain", gain, persistent=False)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._plan()

    def _add_skip(self, normalised: Tensor, x: Tensor) -> Tensor:
        """``normalised`` + λ Σ m_k z_k, in few passes.

        Each pass costs about as much as the BatchNorm.
        """
        is_linear = isinstance(self._settings[0], nn.Linear)
        z = x if is_linear else self._centre_taps(x, normalised)
        dim = -1 if is_linear else 1
        if self._skip_kind != "straight":
            z = z.index_select(dim, self._gather)
        if normalised.dtype != z.dtype:  # under autocast
            dtype = torch.promote_types(normalised.dtype, z.dtype)
            normalised, z = normalised.to(dtype), z.to(dtype)
        if self._skip_kind != "scatter" and self._unit_gain:
            return normalised + z
        gain = self._gain.to(z.dtype).view([-1] + [1] * (0 if is_linear else x.dim() - 2))
        if self._skip_kind == "scatter":
            return normalised.index_add(dim, self.pivot_row, z if self._unit_gain else z * gain)
        return torch.addcmul(normalised, z, gain)

    def _centre_taps(self, x: Tensor, like: Tensor) -> Tensor:
        """The inputs of the kernel's centre tap, [N, in, *spatial dimensions of ``like``]."""
        conv: Any = self._settings[0]
        count = x.dim() - 2
        # [left, right] for each dimension, the last one first
        padding = conv._reversed_padding_repeated_twice
        widths, slices = [], []
        for d in range(count):
            size, dilation, stride = conv.kernel_size[d], conv.dilation[d], conv.stride[d]
            left, right = padding[2 * (count - 1 - d) : 2 * (count - d)]
            start = dilation * (size // 2) - left
            after = right - dilation * (size - 1 - size // 2)
            widths.append((max(0, -start), max(0, after)))
            first = max(0, start)
            slices.append(slice(first, first + (like.shape[2 + d] - 1) * stride + 1, stride))
        if any(width for pair in widths for width in pair):
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            x = F.pad(x, [width for pair in reversed(widths) for width in pair], mode=mode)
        return x[(slice(None), slice(None), *slices)]

    # ---- the way back ----------------------------------------------------------------------------

    @torch.no_grad()
    def to_layer(self, *, keep_batch_norm: bool) -> tuple[nn.Module, nn.Module | None, Tensor]:
        """The original kind of layer, with its pivots in the weight.

        The same function in evaluation mode.

        Args:
            keep_batch_norm: keep the BatchNorm, to follow the layer; otherwise it is folded into
                the layer.

        Returns:
            The layer; the BatchNorm, or None if it was folded; and what has to be added to the
            layer's result, float64 [out], which is zero unless the BatchNorm was folded into a
            layer without a bias.
        """
        gain, shift, deviation = affine_map(self.bn)
        u = self._off_pivot().double()
        pivot = self.skip_scale * self.pivot_value.double()
        bn = copy.deepcopy(self.bn) if keep_batch_norm else None
        per_row = gain
        if bn is not None:
            # w = u and a = γ' / √(var' + eps) stay as they are, unless a is so small that pivot / a
            # would overflow: then the row is multiplied by a, and a becomes 1
            in_weight = pivot / gain[self.pivot_row]
            # the root leaves room for sums
            lost = ~(in_weight.abs() < torch.finfo(self.weight.dtype).max ** 0.5)
            unit = torch.zeros_like(gain, dtype=torch.bool)
            unit[self.pivot_row[lost]] = True
            per_row = torch.where(unit, gain, 1.0)
            pivot = torch.where(unit[self.pivot_row], pivot, in_weight)
            for name, value in (
                ("weight", deviation),
                ("bias", shift),
                ("running_mean", torch.zeros_like(shift)),
            ):
                tensor = getattr(bn, name)
                tensor.copy_(torch.where(unit, value, tensor.double()))
        weight = u * per_row.view(-1, *[1] * (u.dim() - 1))
        weight = weight.index_put(tuple(self._place.unbind()), pivot, accumulate=True)
        bias = torch.zeros_like(shift) if keep_batch_norm else shift
        layer = copy.deepcopy(self._settings[0])
        trained = self.weight.requires_grad
        layer.weight = nn.Parameter(weight.to(self.weight), requires_grad=trained)
        if self.has_bias:
            layer.bias = nn.Parameter(bias.to(self.weight), requires_grad=trained)
            bias = torch.zeros_like(bias)
        layer.training = self.training
        return layer, bn, bias
