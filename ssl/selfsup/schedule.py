"""Learning rates as pure functions of the step: nothing to save, nothing to step per process.

step: 0 .. steps - 1. Every schedule begins with a linear warm-up to `peak`, whose first step already
learns (peak / warm-up steps). `minimum` is where the decay would stand at step `steps`: the last step
still learns, also with a minimum of 0.
"""

import math


def warmup_cosine(step: int, steps: int, peak: float, warmup_fraction: float, minimum: float) -> float:
    """Warm-up, then half a cosine down to `minimum` (He et al. 2022, table 8)."""
    warmup = round(steps * warmup_fraction)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_linear(step: int, steps: int, peak: float, warmup_fraction: float, minimum: float) -> float:
    """Warm-up, then a straight line down to `minimum` (Goyal et al. 2017 for the warm-up; Devlin et
    al. 2019, BERT, for both)."""
    warmup = round(steps * warmup_fraction)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return minimum + (peak - minimum) * (1 - progress)


def warmup_stable_decay(
    step: int, steps: int, peak: float, warmup_fraction: float, minimum: float, decay_fraction: float
) -> float:
    """Warm-up, `peak` for most of the run, then a decay over the last `decay_fraction` of the steps (WSD:
    Hu et al. 2024, MiniCPM, sec. 4.2).

    The decay is 1 - sqrt(progress), which Hägele et al. 2024 ("Scaling Laws and Compute-Optimal
    Training Beyond Fixed Training Durations", sec. 3) found better than a straight line. With
    the same warm-up, in steps, runs of different lengths are the same up to the decay of the shorter.
    """
    warmup = round(steps * warmup_fraction)
    if step < warmup:
        return peak * (step + 1) / warmup
    decay = min(round(steps * decay_fraction), steps - warmup)
    progress = max(0, step - (steps - decay)) / max(1, decay)
    return minimum + (peak - minimum) * (1 - math.sqrt(progress))
