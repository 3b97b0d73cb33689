"""What memory a training step takes, worked out from shapes alone: nothing is allocated, nothing computed.

The recipe's own modules, loss, optimizer and averages run under torch's FakeTensorMode, where a tensor has a
shape and no data, and every storage that an operation makes is followed from birth to death. So kernels,
number formats and activation checkpointing count as they are, without a formula for any of them; of FSDP2 alone
the shards are worked out by arithmetic. Not seen: what a kernel takes inside itself (workspaces, tiles), what
Python and its libraries take, what an allocator holds and does not use, loader workers, the online monitor and
pictures, and the copy that a save makes. A compiled step (run.compile) is estimated as if it were not.
"""

import functools
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selfsup import start
from selfsup.batch import ImageBatch, TextBatch
from selfsup.data.order import BatchPlan
from selfsup.data.text import TextData
from selfsup.data.views import ViewBatch
from selfsup.ema import Ema
from selfsup.encoders.text import TextConfig
from selfsup.layers.attention import Attention
from selfsup.layers.block import Block
from selfsup.objectives import CLMConfig
from selfsup.objectives.base import Objective
from selfsup.optim import build_optimizer
from selfsup.recipe import Recipe

Batch = ImageBatch | ViewBatch | TextBatch
CPU = torch.device("cpu")
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class CannotEstimate(ValueError):
    """The model asks for numbers where there are only shapes."""


class Memory(NamedTuple):
    """Bytes of one process. What stays through the whole run, what a forward pass leaves, and the most at once."""

    weights: int
    """Parameters and buffers, frozen ones and a target network's too."""
    gradients: int
    optimizer: int
    average: int
    """Of optim.ema."""
    parallel: int
    """DDP's buckets; FSDP2's gathered weights, autocast's copies of them, and whole gradients."""
    activations: int
    """Held at the end of a micro-batch's forward pass for the backward pass: inputs and cast weights too."""
    peak: int
    """The most at once, over forward pass, backward pass and optimizer step."""

    @property
    def state(self) -> int:
        """What does not depend on the micro-batch."""
        return self.weights + self.gradients + self.optimizer + self.average


class Storages(TorchDispatchMode):
    """Follows every storage that is made while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []
        """(number of a storage, bytes it takes or, negative, gives back), in order."""
        self.casts: set[int] = set()
        """Storages made by copying a parameter into another type."""
        self._living: dict[int, tuple[Any, int]] = {}  # id -> (a weak reference that reports the end, number)
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                number = self.number(tensor)
                if func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter):
                    self.casts.add(number)
        return result

    def number(self, tensor: Tensor) -> int:
        """Of the tensor's storage, which is noted as born where it was not known."""
        storage = tensor.untyped_storage()
        known = self._living.get(id(storage))
        if known is not None:
            return known[1]
        number, size, key = self._count, storage.nbytes(), id(storage)
        self._count += 1
        self.events.append((number, size))
        self._living[key] = (weakref.ref(storage, functools.partial(self._end, key, number, size)), number)
        return number

    def _end(self, key: int, number: int, size: int, _: Any) -> None:
        del self._living[key]
        self.events.append((number, -size))

    def numbers(self, tensors: Iterable[Any]) -> set[int]:
        return {self.number(tensor) for tensor in tensors if isinstance(tensor, Tensor)}

    def sizes(self, numbers: set[int]) -> int:
        """Bytes of these storages."""
        return sum(size for number, size in self.events if size > 0 and number in numbers)

    def curve(self, without: set[int]) -> list[int]:
        """Bytes held after each event, those of the storages `without` left out."""
        held, values = 0, [0]
        for number, size in self.events:
            held += 0 if number in without else size
            values.append(held)
        return values


def estimate(recipe: Recipe, world: int = 1, fsdp: bool = False, device: torch.device = CPU) -> Memory:
    """The memory of a step of the recipe on one of `world` processes.

    fsdp: weights, gradients, optimizer state and averages cut into `world` shards (FSDP2), the blocks gathered
    one by one, one fetched ahead. Batch norm and contrastive losses are taken as those of
    one process. Raises ValueError for what the recipe's objective or a plan of `world` processes refuses,
    CannotEstimate for a model whose course depends on numbers.
    """
    plan = start.batch_plan(recipe, world)
    with torch.device("meta"):
        objective = recipe.objective.build(recipe.encoder)
    try:
        with FakeTensorMode(), Storages() as storages:
            step = _step(recipe, objective, plan, device, storages)
    except (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedFakeTensorException,
        UnsupportedOperatorException,
    ) as error:
        raise CannotEstimate(" ".join(str(error).split())) from error
    sizes = [storages.sizes(part) for part in step.state]
    state = set().union(*step.state, step.first)
    if not fsdp:
        buckets = sizes[1] if world > 1 else 0
        passing, whole = storages.curve(without=state), storages.curve(without=set())
        return Memory(*sizes, buckets, passing[step.forward], max(whole[step.began :]) + buckets)
    shards = [-(-size // world) for size in sizes]
    passing = storages.curve(without=state | storages.casts)
    gathered, gradient = _gathered(objective)
    # gloo's sums lag behind the backward pass, up to all whole gradients; on CUDA each waits for the one before.
    # Autocast's copies of weights live until their block's backward pass, so the two take turns.
    gathered += max(storages.sizes(storages.casts), sizes[1] if device.type == "cpu" else gradient)
    return Memory(
        *shards, gathered, passing[step.forward], max(passing[step.began :]) + sum(shards) + gathered
    )


class _Step(NamedTuple):
    """A simulated step, in numbers of storages and places in their events."""

    state: tuple[set[int], set[int], set[int], set[int]]
    """Weights, gradients, optimizer, average."""
    first: set[int]
    """Gradients of earlier micro-batches, which later ones add to."""
    began: int
    forward: int


def _step(
    recipe: Recipe, objective: Objective, plan: BatchPlan, device: torch.device, storages: Storages
) -> _Step:
    """The last micro-batch of a step and what follows it, as in train(), under FakeTensorMode.

    objective: on the meta device."""
    _materialise(objective, recipe, device)
    weights = storages.numbers([*objective.parameters(), *objective.buffers()])
    ema = None if recipe.optim.ema is None else Ema(objective, recipe.optim.ema)
    average = set() if ema is None else storages.numbers(ema.tensors.values())
    trainable = [p for p in objective.parameters() if p.requires_grad]
    optimizer = build_optimizer(recipe.optim, objective)
    _set_gradients(trainable)
    optimizer.step()  # makes the optimizer's state
    optimizer.zero_grad()
    kept = storages.numbers(v for state in optimizer.state.values() for v in state.values())

    began = len(storages.events)
    first = _set_gradients(trainable) if plan.accumulation > 1 else []
    earlier = storages.numbers(first)
    del first
    loss = _forward(recipe, objective, _batch(recipe, plan.micro_batch, device), device)
    forward = len(storages.events)
    loss.backward()
    del loss
    gradients = storages.numbers(p.grad for p in trainable)
    if recipe.optim.clip_grad_norm is not None:
        nn.utils.clip_grad_norm_(objective.parameters(), recipe.optim.clip_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    objective.after_step(0.0)
    if ema is not None:
        ema.update(objective, 2)
    return _Step((weights, gradients, kept, average), earlier, began, forward)


def _materialise(objective: Objective, recipe: Recipe, device: torch.device) -> None:
    """Gives the objective tensors on the device that have no data, and the recipe's switches. Its batch norms stay
    those of one process."""
    known: dict[int, Tensor] = {}  # a tied tensor stays one
    for module in objective.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in known:
                    new = torch.empty(old.shape, dtype=old.dtype, device=device)
                    known[id(old)] = (
                        nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                    )
                tensors[name] = known[id(old)]
        if isinstance(module, Block):
            module.checkpoint = recipe.run.activation_checkpointing
        if isinstance(module, Attention) and module.attention == "flex":
            module.attention = "tiled"  # is compiled, and keeps the same: its output and a number a query


def _set_gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    for p in parameters:
        p.grad = torch.empty_like(p)
    return [p.grad for p in parameters if p.grad is not None]


def _forward(recipe: Recipe, objective: Objective, batch: Batch, device: torch.device) -> Tensor:
    """The loss, as the loop computes it."""
    dtype = TYPES[recipe.precision.mixed]
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return objective(batch, float(batch.targets)).loss


def _batch(recipe: Recipe, size: int, device: torch.device) -> Batch:
    """A micro-batch as the loader makes it for this recipe, on the device, without data."""

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=device)

    keys: dict[str, Any] = {
        "seed": 0,
        "epoch": integers(size),
        "position": integers(size),
        "index": integers(size),
    }
    encoder, data = recipe.encoder, recipe.data
    if not isinstance(encoder, TextConfig):
        images = [
            torch.empty(size, encoder.in_chans, encoder.img_size, encoder.img_size, device=device)
            for _ in range(recipe.objective.views)
        ]
        if recipe.objective.views == 1:
            return ImageBatch(images[0], **keys)
        return ViewBatch(tuple(images), **keys)
    assert isinstance(data, TextData)
    length, pairs = encoder.max_length, data.packing == "pairs"
    hides = data.packing != "concat" or data.document_mask
    causal = isinstance(recipe.objective, CLMConfig)
    ratio = 1.0 if causal else max(recipe.objective.mask_ratio, recipe.objective.final_mask_ratio or 0.0)
    targets = max(1, round(size * length * ratio))
    return TextBatch(
        tokens=integers(size, length),
        labels=integers(targets),
        where=None if causal and not hides else integers(targets),
        document_ids=integers(size, length) if hides else None,
        positions=integers(size, length) if data.document_mask else None,
        token_types=integers(size, length) if pairs else None,
        random_next=integers(size) if pairs else None,
        global_batch=recipe.optim.batch_size,
        **keys,
    )


def _gathered(objective: Objective) -> tuple[int, int]:
    """FSDP2's whole weights at once, float32: what lies in no block, and two blocks, the second fetched ahead; and
    the largest whole gradient."""
    blocks = [sum(p.numel() for p in m.parameters()) for m in objective.modules() if isinstance(m, Block)]
    rest = sum(p.numel() for p in objective.parameters()) - sum(blocks)
    largest = max(blocks, default=0)
    return 4 * (rest + 2 * largest), 4 * max(largest, rest)
