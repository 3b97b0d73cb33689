"""Learning rates as pure functions of the step: nothing to save, nothing to step per process."""

import math


def warmup_cosine(step: int, steps: int, peak: float, warmup_fraction: float, minimum: float) -> float:
    """Linear warm-up to `peak`, then half a cosine down to `minimum` (He et al. 2022, table 8).

    step: 0 .. steps - 1. The first step already learns (peak / warm-up steps).
    """
    warmup = round(steps * warmup_fraction)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))
