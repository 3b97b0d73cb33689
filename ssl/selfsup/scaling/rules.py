"""Learning rate and batch by published rules, each a named function of N and D.

For transformer language models under AdamW. The rules conflict (some go by N, some by D): print several, and probe three
learning rates at the smallest and the largest size before you trust one.
"""

from collections.abc import Callable
from typing import NamedTuple

Rule = Callable[[float, float], "Setting"]


class Setting(NamedTuple):
    """Peak learning rate, and tokens of one batch."""

    lr: float
    batch: float


def porian(params: float, samples: float) -> Setting:
    """Porian et al. 2024 (2406.19146), as OLMo-core states it: by N alone, 327,680 tokens and 0.0047 at 108 M."""
    scale = params / 108e6
    return Setting(0.0047 * scale ** (-1 / 3), 327_680 * scale ** (2 / 3))


def olmo(params: float, samples: float) -> Setting:
    """OLMo-core's: Porian's with half the learning rate."""
    setting = porian(params, samples)
    return Setting(setting.lr / 2, setting.batch)


def steplaw(params: float, samples: float) -> Setting:
    """Li et al. 2025 (2503.04715): lr = 1.79 N^-0.713 D^0.307 (N without embeddings), batch = 0.58 D^0.571."""
    return Setting(1.79 * params**-0.713 * samples**0.307, 0.58 * samples**0.571)


PUBLISHED: dict[str, Rule] = {"porian": porian, "olmo": olmo, "steplaw": steplaw}
"""By the names that `predict --rule` takes."""
