"""Batch norm that is as accurate with channels innermost in memory as with channels outermost.

On CPUs convolutions are up to twice as fast with channels innermost (channels last), but torch 2.14.1 then sums the
statistics of millions of voxels one after the other in single precision: in crops of 112 x 112 x 80 their relative
error is 6e-4 (benchmarks/README.md), and gradients of a V-Net are ten times less accurate. Here they are sums of sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

#: values that are added side by side, one sum each: wide enough that torch adds them in vectors, and pairwise
LANES = 256

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


class BatchNorm3d(nn.BatchNorm3d):
    """torch's batch norm, with its own statistics where a batch in single precision lies channels last on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W, D)`` normalised by channel; in evaluation mode by the running statistics, as in torch."""
        measures = self.training or self.running_mean is None
        if not (measures and self.affine and _needs_own_statistics(x)):
            return super().forward(x)
        y, mean, var = _Normalised.apply(x, self.weight, self.bias, self.eps)
        if self.training and self.track_running_stats and self.running_mean is not None:
            self._remember(mean, var, x.numel() // x.shape[1])
        normalised: Tensor = y
        return normalised

    @torch.no_grad()
    def _remember(self, mean: Tensor, var: Tensor, count: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.mul_(1 - share).add_(mean, alpha=share)
        self.running_var.mul_(1 - share).add_(var, alpha=share * count / (count - 1))


def is_exact_channels_last(network: nn.Module) -> bool:
    """Whether ``network`` loses no accuracy channels last: batch norms of this module and no other norm, or none."""
    norms = [module for module in network.modules() if isinstance(module, _NORMS)]
    return all(isinstance(norm, BatchNorm3d) and norm.affine for norm in norms)


def _needs_own_statistics(x: Tensor) -> bool:
    """Under autocast batch norm has half-precision inputs but for a few small maps, which torch may keep."""
    return (x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
            and x.numel() > x.shape[1] and not x.is_contiguous()
            and x.is_contiguous(memory_format=torch.channels_last_3d))  # fmt: skip


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance by channel of a channels-last ``(B, C, H, W, D)``, in two passes."""
    channels = x.shape[1]
    values = x.permute(0, 2, 3, 4, 1).reshape(-1)  # a view: channels are innermost
    voxels = values.numel() // channels
    together = max(1, LANES // channels)
    while voxels % together:
        together //= 2
    lanes = values.view(-1, together * channels)
    mean = lanes.sum(0).view(-1, channels).sum(0) / voxels
    centred = lanes - mean.repeat(together)
    return mean, centred.square_().sum(0).view(-1, channels).sum(0) / voxels


class _Normalised(torch.autograd.Function):
    """The normalisation with `_statistics`; torch's own kernels apply and differentiate it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = _statistics(x)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0], mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, mean, deviation = ctx.saved_tensors
        found = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, None, None, mean, deviation, True, ctx.eps, ctx.needs_input_grad[:3]
        )
        return (*found, None)
