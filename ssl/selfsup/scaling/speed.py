"""How many FLOPs a machine does in a second, for plans in hours."""

import time

import numpy as np


def measured_flop_per_second(size: int = 1024, seconds: float = 1.0) -> float:
    """Float32 products of square matrices with NumPy, the best of those that fit into a second.

    A ceiling for float32 training on this CPU with these threads: training reaches a part of it.
    """
    a = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    a @ a
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        before = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - before)
    return 2.0 * size**3 / best
