"""An exponential moving average of the weights, for evaluation: training never reads it.

After n steps the average of a trainable tensor w is

    sum over i = 1 .. n of (1 - decay) decay^(n - i) w_i / (1 - decay^n),

the usual average, with the share that the initial weights would keep (decay^n) taken out as Adam
does it for its moments (Kingma and Ba 2015, sec. 3): in a short run they would be most of it. Frozen
tensors and buffers are not averaged but copied.
"""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Ema:
    """The averaged state dict of a module, in the module's own dtypes (float32 weights: float32)."""

    def __init__(self, module: nn.Module, decay: float):
        """decay: per step, in [0, 1). Until the first `update` the tensors are the module's own values."""
        self.decay = decay
        self.tensors = {name: value.detach().clone() for name, value in module.state_dict().items()}
        """Names as in the module's state dict."""

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Takes in the weights after optimizer step `step` (1, 2, ...); once a step."""
        now = module.state_dict()
        named = module.named_parameters(remove_duplicate=False)  # both names of a tied tensor
        trained = {name for name, p in named if p.requires_grad}
        share = (1 - self.decay) / (1 - self.decay**step)  # of the newest weights; 1 at the first step
        averages, weights = zip(*((self.tensors[k], now[k]) for k in now if k in trained), strict=True)
        get_ema_multi_avg_fn(1 - share)(averages, weights, step)
        for name in now.keys() - trained:
            self.tensors[name].copy_(now[name])

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes saved tensors over. Raises ValueError where names or shapes are not this module's."""
        names = tensors.keys() | self.tensors.keys()
        fitting = {
            k for k in tensors.keys() & self.tensors.keys() if tensors[k].shape == self.tensors[k].shape
        }
        unlike = sorted(names - fitting)
        if unlike:
            raise ValueError(
                f"averaged weights: {len(unlike)} tensors do not fit this model, first {unlike[0]}"
            )
        for name, value in tensors.items():
            self.tensors[name].copy_(value)
