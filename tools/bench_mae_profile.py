"""Where a training step spends its time: torch's profiler, operators grouped by what they do."""

import os
import re
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

# The first pattern that matches the whole operator name takes it (in-place marks are stripped).
GROUPS = {
    "optimizer": r"_fused_adamw|Optimizer\..*",
    "matrix products": r"mm|addmm|_addmm_activation|linear|.*mkldnn_linear.*|.*convolution.*|mv|dot",
    "attention": r"bmm|baddbmm|.*softmax.*|.*attention.*",
    "norms": r".*(layer|batch)_norm.*",
    "GELU": r".*gelu.*",
    "gather, scatter, sort": r"gather|gather_backward|scatter|scatter_add|index.*|_index.*|argsort|sort|take.*",
    "copies, casts, fills": r"copy|_to_copy|clone|contiguous|cat|stack|constant_pad_nd|repeat|fill|zero|zeros.*|"
    r"ones.*|new_zeros|full.*|rand|randn|arange|empty.*|resize",
    "element-wise, sums": r"add|sub|rsub|mul|div|neg|pow|square|sqrt|rsqrt|exp|log|abs|where|masked_fill|addcmul|"
    r"lerp|sum|mean|var|var_mean|std|any|all|eq|ne|lt|le|gt|ge|bitwise.*|__.*__|remainder|floor.*|sgn|"
    r"threshold.*|relu|clamp.*|linalg_vector_norm|uniform|normal",
}
REST = "views, autograd, Python"


def group_of(operator: str) -> str:
    """The group of an operator as the profiler names it: `aten::add_` is element-wise."""
    name = operator.removeprefix("aten::")
    name = name if name.startswith("__") else name.rstrip("_")
    return next((group for group, pattern in GROUPS.items() if re.fullmatch(pattern, name)), REST)


def profile_steps(step: Callable[[], None], steps: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Seconds of each operator in one step, by group: its own time without the operators inside it.

    The time between operators (Python, the autograd engine) counts to the last group, so on a CPU the
    sum is the whole step. On CUDA the times are those of the kernels that an operator started.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    if not torch.cuda.is_available():  # a CUDA build of torch would report the missing driver as an error
        os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    step()
    step()
    with profile(activities=activities) as recorded:
        for _ in range(steps):
            with record_function("between operators"):
                step()
        if cuda:
            torch.cuda.synchronize()
    groups: dict[str, dict[str, float]] = {name: {} for name in (*GROUPS, REST)}
    for event in recorded.key_averages():
        if event.device_type != DeviceType.CPU:
            continue  # a kernel: counted with the operator that started it
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        groups[group_of(event.key)][event.key] = microseconds / 1e6 / steps
    return groups


def show_profile(title: str, groups: dict[str, dict[str, float]]) -> None:
    """One line a group, largest first, with its three largest operators."""
    total = sum(sum(operators.values()) for operators in groups.values())
    print(f"{title}: {1000 * total:.1f} ms a step")
    for group, operators in sorted(groups.items(), key=lambda item: -sum(item[1].values())):
        largest = sorted(operators.items(), key=lambda item: -item[1])[:3]
        words = ", ".join(f"{name.removeprefix('aten::')} {seconds / total:.1%}" for name, seconds in largest)
        print(f"{group:24s} {sum(operators.values()) / total:6.1%}   {words}")
