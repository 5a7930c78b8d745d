"""BatchNorm over all processes.

On GPUs it is torch's SyncBatchNorm; on the CPU, where torch has none, an equal layer.
"""

from __future__ import annotations

import warnings

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class CpuSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm for tensors on the CPU with statistics over the batches of all processes."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` [N, C, ...]; in training mode also update the running statistics."""
        if not self.training or not self.track_running_stats:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        dims = [d for d in range(input.dim()) if d != 1]
        shape = [1, -1, *[1] * (input.dim() - 2)]
        count = input.numel() // input.shape[1]
        total = _sum_over_processes(torch.cat([input.sum(dims), input.new_tensor([count])]))
        mean = total[: input.shape[1]] / total[-1]
        # deviations from the common mean are squared: E[x²] − E[x]² would lose digits
        squares = _sum_over_processes((input - mean.view(shape)).square().sum(dims))
        var = squares / total[-1]
        with torch.no_grad():
            self.num_batches_tracked += 1
            momentum = (
                self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            )
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(squares / (total[-1] - 1), momentum)
        result = (input - mean.view(shape)) / (var.view(shape) + self.eps).sqrt()
        if self.affine:
            result = result * self.weight.view(shape) + self.bias.view(shape)
        return result


def _sum_over_processes(x: Tensor) -> Tensor:
    """The sum of ``x`` over all processes; differentiable."""
    with warnings.catch_warnings():
        # torch recommends a private function in its place
        warnings.simplefilter("ignore", FutureWarning)
        total: Tensor = all_reduce(x)
    return total


def synchronise_batch_norms(model: nn.Module, device: torch.device) -> nn.Module:
    """Make all BatchNorms of ``model`` compute statistics over all processes.

    Those in Path-BN layers are included.

    Args:
        model: changed in place.
        device: where it will run.

    Returns:
        The model to use from now on.
    """
    if device.type != "cpu":
        converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return converted
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = CpuSyncBatchNorm
    return model
