"""What memory there is, whether a step fits, and what would make it fit: each answer is estimated again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from selfsup.config import merge, validate
from selfsup.estimate import Memory, estimate
from selfsup.layers.block import Block
from selfsup.objectives import SimCLRConfig
from selfsup.recipe import Recipe

GIB = 2**30
ROOM = 1.2
"""An allocator holds more than it has handed out: on a CPU up to a fifth more (tools/memory.py)."""
LIBRARIES = GIB // 2
"""What a process takes beside its tensors once it trains: code that is loaded late, kernels, a CUDA context."""
MOST_PROCESSES = 1024


class Limit(NamedTuple):
    """What a process may take."""

    bytes: int | None
    """None where the system does not say."""
    what: str

    def fits(self, memory: Memory) -> bool:
        """With room to spare; true where the limit is not known."""
        return self.bytes is None or ROOM * memory.peak + LIBRARIES <= self.bytes


def limit_of(device: torch.device, processes_here: int) -> Limit:
    """Of one of `processes_here` on this machine: the CUDA device's memory, or its share of main memory."""
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        return Limit(about.total_memory, f"{about.total_memory / GIB:.1f} GiB of {about.name}")
    free, room = psutil.virtual_memory().available, cgroup_room()
    share = min(free, free if room is None else room) // processes_here
    among = "" if processes_here == 1 else f", for each of {processes_here} processes on this machine"
    of = "the container's limit" if room is not None and room < free else "main memory"
    return Limit(share, f"{share / GIB:.1f} GiB available of {of}{among}")


def cgroup_room(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes that the control groups of this process still allow, file caches counted as free; None: no limit.

    Both versions; every group above counts. Inside a container the process's group may be mounted as the root.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return None
    rooms = []
    for _, controllers, path in lines:
        old = "memory" in controllers.split(",")
        if controllers and not old:
            continue
        top = root / "memory" if old else root
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if old else ("memory.max", "memory.current")
        )
        below = Path(path.lstrip("/"))
        for group in (top / below, *(top / parent for parent in below.parents), top):
            rooms.append(_room(group, *names))
    return min((room for room in rooms if room is not None), default=None)


def _room(group: Path, limit_name: str, usage_name: str) -> int | None:
    try:
        limit, usage = (group / limit_name).read_text().strip(), int((group / usage_name).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None  # no such group here, or none of memory
    if limit == "max" or int(limit) >= 1 << 60:  # version 1 says no limit by a number near 2**63
        return None
    return int(limit) - usage + int(stat.get("inactive_file", 0))


class Remedy(NamedTuple):
    """A change of the recipe or of the number of processes under which a step fits."""

    words: str
    memory: Memory


class Way(NamedTuple):
    """A way to run."""

    recipe: Recipe
    world: int
    fsdp: bool
    device: torch.device

    def estimate(self) -> Memory:
        return estimate(*self)

    def changed(self, changes: dict[str, Any]) -> "Way | None":
        """With other keys; None where the recipe does not take them."""
        try:
            recipe = validate(Recipe, merge(self.recipe.model_dump(mode="json"), changes))
            recipe.objective.check(recipe.encoder)
        except ValueError:
            return None
        return self._replace(recipe=recipe)


def remedies(begin: Way, limit: Limit) -> list[Remedy]:
    """Every change that alone makes a step fit; where none on this number of processes does, several together;
    and the number of processes that does. Each was estimated with the change made. Empty where nothing helps."""
    found = []
    for words, way in _switches(begin):
        memory = way.estimate()
        found += [Remedy(words, memory)] * limit.fits(memory)
    found += [*_largest(_micro_batches(begin), limit), *_largest(_chunks(begin), limit)]
    words, all_on = _together(begin)
    if not found:
        found = [*_combined(words, all_on, limit)]
    more = [*_processes(begin, limit, "")]
    if not found and not more:
        words, all_on = ([*_micro_batches(all_on, words)] or [(words, all_on)])[-1]
        more = [*_processes(all_on, limit, f"{words.strip()} ")]
    return found + more


def _together(begin: Way) -> tuple[str, Way]:
    """All switches on."""
    words, now = "", begin
    while following := next(iter(_switches(now)), None):
        words, now = f"{words}{following[0]} ", following[1]
    return words, now


def _combined(words: str, all_on: Way, limit: Limit) -> Iterator[Remedy]:
    """All switches, and where that is not enough the largest micro-batch or chunk under them."""
    memory = all_on.estimate()
    if words and limit.fits(memory):
        yield Remedy(words.strip(), memory)
        return
    for sizes in (_micro_batches(all_on, words), _chunks(all_on, words)):
        yield from _largest(sizes, limit)


def _switches(begin: Way) -> Iterator[tuple[str, Way]]:
    """Keys that are on or off, the cheapest first."""
    recipe = begin.recipe
    if getattr(recipe.encoder, "attention", None) in ("reference", "auto"):
        yield from _change(begin, "--encoder.attention tiled", {"encoder": {"attention": "tiled"}})
    if recipe.precision.mixed == "fp32":
        yield from _change(begin, "--precision.mixed bf16", {"precision": {"mixed": "bf16"}})
    if not recipe.run.activation_checkpointing and _has_blocks(recipe):
        changes = {"run": {"activation_checkpointing": True}}
        yield from _change(begin, "--run.activation-checkpointing true", changes)


def _has_blocks(recipe: Recipe) -> bool:
    with torch.device("meta"):
        return any(isinstance(module, Block) for module in recipe.objective.build(recipe.encoder).modules())


def _micro_batches(begin: Way, words: str = "") -> Iterator[tuple[str, Way]]:
    """The divisors of a process's share below its micro-batch, largest first."""
    recipe, world = begin.recipe, begin.world
    share = recipe.optim.batch_size // world
    most = recipe.run.micro_batch or share
    least = 2 if recipe.objective.views > 1 and world == 1 else 1  # one image has nothing to differ from
    if not recipe.objective.accumulates:
        return
    for size in range(most - 1, least - 1, -1):
        if share % size == 0:
            yield from _change(begin, f"{words}--run.micro-batch {size}", {"run": {"micro_batch": size}})


def _chunks(begin: Way, words: str = "") -> Iterator[tuple[str, Way]]:
    """Powers of two below what objective.chunk is, largest first."""
    objective = begin.recipe.objective
    share = begin.recipe.run.micro_batch or begin.recipe.optim.batch_size // begin.world
    now = getattr(objective, "chunk", None) or (2 * share if isinstance(objective, SimCLRConfig) else 0)
    size = 1 << max(0, now - 1).bit_length()
    while size > 1:
        size //= 2
        if size < now:
            yield from _change(begin, f"{words}--objective.chunk {size}", {"objective": {"chunk": size}})


def _change(begin: Way, words: str, changes: dict[str, Any]) -> Iterator[tuple[str, Way]]:
    changed = begin.changed(changes)
    if changed is not None:
        yield words, changed


def _largest(sizes: Iterator[tuple[str, Way]], limit: Limit) -> Iterator[Remedy]:
    """The first of falling sizes that fits, by bisection: memory grows with the size."""
    found = [*sizes]
    low, high, best = 0, len(found), None
    while low < high:
        middle = (low + high) // 2
        memory = found[middle][1].estimate()
        if limit.fits(memory):
            best, high = Remedy(found[middle][0], memory), middle
        else:
            low = middle + 1
    if best is not None:
        yield best


def _processes(begin: Way, limit: Limit, words: str) -> Iterator[Remedy]:
    """The fewest processes, doubled each time, over which FSDP2's shards fit; and, where a batch is not cut into
    micro-batches, over which a smaller share alone does."""
    recipe = begin.recipe
    for fsdp in (False, True) if not recipe.objective.accumulates else (True,):
        world = 2 * begin.world
        while world <= MOST_PROCESSES and recipe.optim.batch_size % world == 0:
            share = recipe.optim.batch_size // world
            micro = min(recipe.run.micro_batch or share, share)
            while share % micro:
                micro -= 1
            start = begin._replace(world=world, fsdp=fsdp).changed({"run": {"micro_batch": micro}})
            assert start is not None
            memory = start.estimate()
            if limit.fits(memory):
                kind = "--run.parallel fsdp2 on" if fsdp else "on"
                each = f"each with as much memory as this one, {micro} sample{'s' * (micro > 1)} at a time"
                yield Remedy(f"{words}{kind} {world} processes, {each}", memory)
                break
            world *= 2
