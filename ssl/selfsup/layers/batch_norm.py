"""Batch norm whose statistics are those of the global batch, on CPU too, where PyTorch has none."""

import itertools
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from selfsup import dist


def synchronise(module: nn.Module) -> None:
    """Replaces every batch norm inside `module` by one over all ranks; does nothing in a single process.

    In training mode they then normalise with the mean and variance of all ranks' samples of that
    forward pass (with accumulation: of a micro-batch), and gradients and running statistics follow;
    in eval mode nothing changes. Parameters and buffers stay the same tensors under the same names.
    Ranks may hold unequal numbers of samples. A forward in training mode is a collective, its backward
    too: all ranks must make it, or none.

    On CUDA with PyTorch's fused kernels (timm's conversion of them, which keeps the activation in its
    BatchNormAct2d), elsewhere with `BatchNormOverRanks`.

    Raises ValueError for a subclass of batch norm that is none of nn.BatchNorm1d/2d/3d and BatchNormAct2d.
    """
    if dist.world_size() == 1:
        return
    assert not isinstance(module, _BatchNorm), "a batch norm cannot be replaced inside itself"
    tensors = itertools.chain(module.parameters(), module.buffers())
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    found = [(name, m) for name, m in module.named_modules() if isinstance(m, _BatchNorm)]
    instead: dict[nn.Module | None, nn.Module] = {m: _over_ranks(name, m, device) for name, m in found}
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):  # named_children would pass over a second name
            if child in instead:
                parent.add_module(name, instead[child])


def _over_ranks(name: str, module: _BatchNorm, device: torch.device) -> nn.Module:
    """What takes a batch norm's place on this device."""
    done = nn.SyncBatchNorm if device.type == "cuda" else BatchNormOverRanks
    if isinstance(module, done):
        return module
    if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        from timm.layers import BatchNormAct2d  # seconds to import: only where it may have been used

        if type(module) is not BatchNormAct2d:
            raise ValueError(
                f"{name}: {type(module).__name__} cannot take its statistics over several processes; use a model "
                f"with nn.BatchNorm1d, nn.BatchNorm2d or timm's BatchNormAct2d, or train in one process"
            )
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(module)
    return BatchNormOverRanks(module)


class BatchNormOverRanks(_BatchNorm):
    """Takes over a batch norm's tensors and settings, and timm's dropping and activation after it."""

    def __init__(self, module: _BatchNorm):
        super().__init__(module.num_features, module.eps, module.momentum, False, False)
        self.affine, self.track_running_stats = module.affine, module.track_running_stats
        self.weight, self.bias = module.weight, module.bias
        self.running_mean, self.running_var = module.running_mean, module.running_var
        self.num_batches_tracked = module.num_batches_tracked
        self.drop, self.act = getattr(module, "drop", None), getattr(module, "act", None)
        self.train(module.training)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected (b, c, ...), got {input.ndim}D input")

    def forward(self, x: Float[Tensor, "b c *d"]) -> Float[Tensor, "b c *d"]:
        self._check_input_dim(x)
        if self.training:
            mean, var, count = moments_over_ranks(x)
            self._track(mean, var, count)
            y = normalise_over_ranks(x, self.weight, self.bias, mean, var, count, self.eps)
        else:
            y = super().forward(x)
        for after in (self.drop, self.act):
            y = y if after is None else after(y)
        return y

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Running statistics as nn.BatchNorm2d keeps them: the variance unbiased, momentum None an average
        over all batches."""
        if not self.track_running_stats:
            return
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.mul_(1 - share).add_(mean.to(self.running_mean.dtype), alpha=share)
        unbiased = var * (count / (count - 1))
        self.running_var.mul_(1 - share).add_(unbiased.to(self.running_var.dtype), alpha=share)


@torch.compiler.disable
@torch.no_grad()
def moments_over_ranks(x: Float[Tensor, "b c *d"]) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"], int]:
    """Mean and biased variance of each channel over all ranks, float64, and the number of values in them.

    Local moments in float32 or wider, combined as Chan et al. 1979: of means mean_i and variances var_i
    of n_i values, mean = sum n_i mean_i / n, var = sum n_i (var_i + (mean_i - mean)^2) / n. Sums of
    squares, a pass less, would lose all digits where the mean is large.

    Raises ValueError where the global batch has a single value in a channel, as F.batch_norm does.
    """
    c, local = x.shape[1], x.numel() // x.shape[1]
    ours = x.new_zeros(1, 2 * c + 1, dtype=torch.float64)
    if local:
        wide, dims = x.to(_wide(x)), _all_but_channels(x)
        mean = wide.mean(dims)  # on a CPU these two take a fifth to a twelfth of torch.var_mean's time
        var = (wide - _per_channel(mean, wide)).square_().mean(dims)
        ours[0] = torch.cat([mean.double(), var.double(), ours.new_tensor([local])])
    theirs = dist.all_gather(ours)  # (world, 2 c + 1)
    means, variances, counts = theirs[:, :c], theirs[:, c : 2 * c], theirs[:, 2 * c :]
    count = int(counts.sum().item())
    if count < 2:
        raise ValueError(f"batch norm: expected more than 1 value per channel in training, got {count}")
    mean = (counts * means).sum(0) / count
    var = (counts * (variances + (means - mean).square())).sum(0) / count
    return mean, var, count


@torch.compiler.disable  # a compiled model breaks its graph here
def normalise_over_ranks(
    x: Float[Tensor, "b c *d"],
    weight: Float[Tensor, " c"] | None,
    bias: Float[Tensor, " c"] | None,
    mean: Float[Tensor, " c"],
    var: Float[Tensor, " c"],
    count: int,
    eps: float,
) -> Float[Tensor, "b c *d"]:
    """(x - mean) / sqrt(var + eps) * weight + bias in x's dtype, computed in float32 or wider.

    mean, var, count: `moments_over_ranks(x)`. The gradient of x knows that they depend on every
    rank's x; those of weight and bias are local sums, for DDP to average as all others.
    """
    return cast(Tensor, _Normalise.apply(x, weight, bias, mean, (var + eps).rsqrt(), count))


class _Normalise(torch.autograd.Function):
    """With xhat = (x - mean) / std and n values in all ranks together, the gradient of the sum of all
    ranks' losses is dx = weight / std * (dy - sum(dy) / n - xhat * sum(dy * xhat) / n), the sums over
    all ranks (Ioffe & Szegedy 2015, sec. 3)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        inv_std: Tensor,
        count: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, inv_std)
        ctx.count = count
        y = _standardised(x, mean, inv_std)
        if weight is not None:
            y = y * _per_channel(weight, y)
        if bias is not None:
            y = y + _per_channel(bias, y)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inv_std = ctx.saved_tensors
        xhat = _standardised(x, mean, inv_std)
        dy = grads[0].to(xhat.dtype)
        sums = torch.stack([dy.sum(_all_but_channels(x)), (dy * xhat).sum(_all_but_channels(x))])  # (2, c)
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            of_dy, of_dy_xhat = dist.all_reduce(sums) / ctx.count
            scale = inv_std if weight is None else inv_std * weight
            dx = dy - _per_channel(of_dy, dy) - xhat * _per_channel(of_dy_xhat, dy)
            dx = (dx * _per_channel(scale, dy)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dweight = sums[1]
        if ctx.needs_input_grad[2]:
            dbias = sums[0]
        return dx, dweight, dbias, None, None, None


def _standardised(x: Tensor, mean: Tensor, inv_std: Tensor) -> Tensor:
    wide = x.to(_wide(x))
    return (wide - _per_channel(mean, wide)) * _per_channel(inv_std, wide)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _all_but_channels(x: Tensor) -> list[int]:
    return [dim for dim in range(x.ndim) if dim != 1]


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    """(c) in x's dtype, to lie along x's second dimension."""
    return v.to(x.dtype).view(-1, *[1] * (x.ndim - 2))  # (c) -> (c, 1, ...)
