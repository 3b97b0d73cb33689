"""What happens before the first step: devices, data, a resumed state, and what is said about them."""

import contextlib
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

from selfsup import checkpoint, dist, parallel
from selfsup.batch import ImageBatch, TextBatch
from selfsup.checkpoint import TrainState
from selfsup.config import merge, read_yaml, validate
from selfsup.data.images import train_batches
from selfsup.data.index import ShardIndex, check_shards, open_shards
from selfsup.data.order import ORDER_VERSION, BatchPlan
from selfsup.data.rows import Rows, open_rows
from selfsup.data.sequential import BROKEN_PROMISES, sequential_batches
from selfsup.data.text import TextData, train_text
from selfsup.data.tokenizer import TOKENIZER_NAME
from selfsup.data.tokens import TokenIndex, check_tokens
from selfsup.data.views import ViewBatch
from selfsup.durable import write_atomically
from selfsup.encoders import has_batch_norm
from selfsup.layers.batch_norm import synchronise
from selfsup.layers.block import Block
from selfsup.look.pictures import grid
from selfsup.memory import keep_freed_memory
from selfsup.metrics import MetricsLog
from selfsup.mup import scale_init
from selfsup.objectives.base import Objective
from selfsup.optim import AdamWConfig
from selfsup.profiling import StepProfiler, parse_range
from selfsup.recipe import Recipe, RunConfig
from selfsup.run_folder import git_revision


def say(*lines: str) -> None:
    """Prints on the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        for line in lines:
            print(line, flush=True)


def accelerator(recipe: Recipe) -> Accelerator:
    """Devices, processes and number formats. Raises ValueError where the machine does not offer them."""
    run, precision = recipe.run, recipe.precision
    if run.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device: expected a CUDA device, found none; use --run.device cpu")
    on_cpu = runs_on_cpu(run)
    if on_cpu and precision.mixed == "fp16":
        raise ValueError("precision.mixed: fp16 needs a CUDA device; use bf16 or fp32 on a CPU")
    if on_cpu:
        keep_freed_memory()
    torch.set_float32_matmul_precision(precision.float32_matmul)
    # DDP reorders its buckets after the first backward pass, which on three or more ranks changes
    # the order of its sums: a resumed run would differ in the last bit. With this switch it keeps
    # the first order, at the price of one walk over the autograd graph per step.
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    ddp = DistributedDataParallelKwargs(find_unused_parameters=launched > 2)
    handlers = [ddp]
    if run.stall_minutes:  # the watchdog first, which says where every process stands; then torch's own limit
        handlers.append(InitProcessGroupKwargs(timeout=dist.allow(run.stall_minutes + 5)))
    mixed = "no" if precision.mixed == "fp32" else precision.mixed
    result = Accelerator(cpu=on_cpu, mixed_precision=mixed, kwargs_handlers=handlers)
    if run.threads is not None:  # after Accelerator, which sets its own number on several CPU processes
        torch.set_num_threads(run.threads)
    # The one convolution is deterministic for this; cuDNN would choose its kernels by timing.
    torch.backends.cudnn.deterministic = True
    check_accelerator(result, on_cpu)
    expected = run.expect_processes or launched
    if not dist.world_size() == result.num_processes == expected:
        raise ValueError(
            f"run.expect_processes: expected {expected}, got {dist.world_size()} processes; start with "
            f"torchrun --nproc_per_node N or accelerate launch --config_file (see launch/README.md), or "
            f"change --run.expect-processes"
        )
    return result


def runs_on_cpu(run: RunConfig) -> bool:
    """Where the run computes, as far as recipe and machine say."""
    return run.device == "cpu" or not torch.cuda.is_available()


def check_accelerator(result: Accelerator, on_cpu: bool) -> None:
    """Raises ValueError where Accelerate's own files or variables ask for what the recipe decides."""
    if (result.device.type == "cpu") != on_cpu:
        raise ValueError(
            f"run.device: expected {'cpu' if on_cpu else 'cuda'}, Accelerate chose {result.device.type}; "
            f"use_cpu in its config file must agree with --run.device"
        )
    if result.gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps: expected 1, Accelerate's environment or config file says "
            f"{result.gradient_accumulation_steps}; remove it and set --run.micro-batch"
        )
    kind = result.distributed_type.value
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":  # which on a CPU it ignores in silence
        kind = "FSDP"
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise ValueError(
            f"distributed_type: expected NO, MULTI_CPU or MULTI_GPU, Accelerate's config file says {kind}; use one of "
            f"launch/, and for FSDP --run.parallel fsdp2"
        )


def build_objective(recipe: Recipe, device: torch.device) -> Objective:
    """The objective with the weights that the seed gives it, its batch norms over all processes.

    Raises ValueError where activation checkpointing is asked of a model without a `Block`, and on
    several processes for a kind of batch norm that cannot be so.
    """
    torch.manual_seed(recipe.seed)
    objective = recipe.objective.build(recipe.encoder)
    if isinstance(recipe.optim, AdamWConfig) and recipe.optim.mup_base_width is not None:
        scale_init(objective, recipe.optim.mup_base_width)
    if not parallel.split(recipe):  # what is split moves block by block
        objective = objective.to(device)
    synchronise(objective)
    blocks = [module for module in objective.modules() if isinstance(module, Block)]
    if recipe.run.activation_checkpointing and not blocks:
        raise ValueError(
            "run.activation_checkpointing: expected a model with transformer blocks of our own (encoder.name "
            "vit), this one has none; set it to false"
        )
    for block in blocks:
        block.checkpoint = recipe.run.activation_checkpointing
    return objective


def monitored(recipe: Recipe) -> bool:
    """Whether the online monitor has a step to measure at; text it never measures."""
    return 0 < recipe.run.monitor_every <= recipe.optim.steps


def batch_plan(recipe: Recipe, world: int | None = None) -> BatchPlan:
    """How the global batch is sliced over processes and micro-batches; world: other processes than these.

    Raises ValueError where it does not divide, or where the objective cannot be cut so.
    """
    size, rank = recipe.optim.batch_size, dist.rank() if world is None else 0
    world = world or dist.world_size()
    micro = recipe.run.micro_batch or max(1, size // world)
    plan = BatchPlan(global_batch=size, micro_batch=micro, rank=rank, world=world)
    if plan.accumulation > 1 and not recipe.objective.accumulates:
        raise ValueError(
            f"run.micro_batch: {recipe.objective.name} contrasts all images of a batch, and each of "
            f"{plan.accumulation} micro-batches would see only {micro * world} of {size}; leave it out. Where memory "
            f"is short set objective.chunk (not with BatchNorm), or use more processes: both leave the gradient as it is"
        )
    if recipe.objective.views > 1 and micro * world == 1:
        key = "optim.batch_size" if size == 1 else "run.micro_batch"
        raise ValueError(
            f"{key}: {recipe.objective.name} learns from how the images of a forward pass differ (negatives, batch "
            f"norm), expected at least 2 over all processes, got 1"
        )
    return plan


def open_data(recipe: Recipe) -> ShardIndex | Rows | None:
    """The verified index of images, or None for `data.index: none`; of text, its rows.

    Shards newer than their index are hashed again. Raises ValueError for a tokenizer of another size
    than the encoder's vocabulary.
    """
    if isinstance(recipe.data, TextData):
        objective, encoder = recipe.objective, recipe.encoder
        rows = dist.together(
            open_rows, recipe.data, encoder.max_length, objective.wrap, objective.next_token
        )
        if isinstance(rows.source, TokenIndex):
            dist.on_first_rank(check_tokens, rows.source, all=False)
        if rows.vocab_size != encoder.vocab_size:
            raise ValueError(
                f"encoder.vocab_size: expected {rows.vocab_size}, the tokenizer's of {recipe.data.shards}, got "
                f"{encoder.vocab_size}"
            )
        return rows
    if recipe.data.index == "none":
        return None
    index = dist.together(open_shards, recipe.data.shards)
    dist.on_first_rank(check_shards, index, all=False)
    return index


def data_facts(data: ShardIndex | Rows | None) -> dict[str, Any]:
    """What a checkpoint must agree with the data on, and where its code came from."""
    tokenizer = {"tokenizer_sha256": data.tokenizer.sha256} if isinstance(data, Rows) else {}
    return {
        "index_fingerprint": None if data is None else data.fingerprint,
        **tokenizer,
        "order_version": ORDER_VERSION,
        "git_revision": git_revision(),
    }


def resume(source: Path, state: TrainState) -> TrainState:
    """The state as the checkpoint left it. Raises ValueError where the data or their order changed."""
    restored = dist.together(checkpoint.restore, source, state)
    keys = {"tokenizer_sha256": "tokenizer", "index_fingerprint": "data.shards", "order_version": "selfsup version"}
    for fact, key in keys.items():
        if restored.facts.get(fact) != state.facts.get(fact):  # images have no tokenizer
            raise ValueError(
                f"{key}: this run was started with another {fact}: expected {restored.facts.get(fact)}, got "
                f"{state.facts.get(fact)}; put the original shards back, or start anew with --init-from"
            )
    steps = dist.sum_over_ranks(float(restored.step))[0]
    if steps != dist.world_size() * restored.step:  # a network file system may show each another newest one
        raise ValueError(
            f"--resume: the processes do not see the same checkpoint, this one {source} (step {restored.step}); name one "
            f"of RUN/checkpoints, or wait until all machines see the newest"
        )
    say(f"resuming {source} at step {restored.step}")
    return restored._replace(facts=state.facts)


def keep_tokenizer(run_dir: Path, data: ShardIndex | Rows | None) -> None:
    """A text run keeps its tokenizer: generation, probes and exports need no more than the run folder."""
    if isinstance(data, Rows):
        write_atomically(run_dir / TOKENIZER_NAME, data.tokenizer.json.encode())


def open_batches(
    recipe: Recipe, index: ShardIndex | Rows | None, plan: BatchPlan, state: TrainState
) -> Generator[ImageBatch | ViewBatch | TextBatch, None, None]:
    """This rank's endless micro-batches from the state's cursor on."""
    vit, data, workers = recipe.encoder, recipe.data, recipe.run.workers
    if isinstance(index, Rows):
        masking = recipe.objective.masking(recipe.optim.steps)
        return train_text(data, index, recipe.seed, plan, state.samples, workers, masking)
    route = recipe.run.augment
    on_device = route == "device" or (route == "auto" and not runs_on_cpu(recipe.run))
    if index is None:
        say(BROKEN_PROMISES)
        # The stream cannot be entered in the middle; another seed at least gives another order.
        seed = (recipe.seed + state.step) % 2**32
        return sequential_batches(data, seed, vit.img_size, vit.in_chans, plan, workers, on_device)
    cursor = state.samples
    return train_batches(
        data, index, recipe.seed, vit.img_size, vit.in_chans, plan, cursor, workers, on_device
    )


def show(
    log: MetricsLog,
    step: int,
    recipe: Recipe,
    objective: Objective,
    batch: ImageBatch | ViewBatch | TextBatch,
    data: ShardIndex | Rows | None,
) -> None:
    """What the model was given and makes of it, into TensorBoard; at the last step a text run also prints it."""
    if isinstance(batch, TextBatch):
        assert isinstance(data, Rows)
        text = objective.shown(batch, data.tokenizer)
        log.texts(step, {"predictions": "\n".join(f"    {line}" for line in text.splitlines())})
        if step == recipe.optim.steps:
            say(text)
        return
    mean, std = recipe.data.mean, recipe.data.std
    views = {"training views": grid(batch.shown(mean, std), 8)}
    log.pictures(step, {**views, **objective.pictures(batch, mean, std)})


def profiler(recipe: Recipe, step: int) -> StepProfiler | None:
    """What `run.profile` asks for; says so where all its steps were done before `step`."""
    if recipe.run.profile is None:
        return None
    steps = parse_range(recipe.run.profile)
    if steps.stop <= step:
        say(f"run.profile: steps {recipe.run.profile} are done, this run goes on from {step}: no profile")
        return None
    return StepProfiler(Path(recipe.run.dir) / "profile", steps)


def summarise(
    recipe: Recipe, plan: BatchPlan, data: ShardIndex | Rows | None, state: TrainState, device: torch.device
) -> None:
    """A few lines about the run that begins."""
    parameters = sum(p.numel() for p in state.objective.parameters() if p.requires_grad)
    samples = recipe.optim.steps * recipe.optim.batch_size
    kind = "rows" if isinstance(data, Rows) else "images"
    extent = "" if data is None else f", {samples / len(data):.1f} epochs of {len(data)} {kind}"
    say(
        f"run        {recipe.run.dir}",
        f"objective  {recipe.objective.name}, {parameters / 1e6:.2f} M trainable parameters",
        f"processes  {plan.world} on {device.type}, "
        f"{torch.get_num_threads()} threads each, {recipe.precision.mixed}",
        f"batch      {plan.global_batch} = {plan.world} processes x {plan.accumulation} micro-batches "
        f"x {plan.micro_batch}",
        f"steps      {state.step} to {recipe.optim.steps}{extent}",
    )
    if isinstance(data, Rows):
        say(f"rows       {data.describe()}")
    if plan.accumulation > 1 and has_batch_norm(state.objective):
        say(
            f"batch norm its statistics are of {plan.micro_batch * plan.world} images, those of one micro-batch over "
            f"all processes: another run.micro_batch gives another gradient"
        )


def print_help(config: Path | None, usage: str) -> None:
    """`usage`, then every key of a recipe with its default and meaning."""
    required = {"data": {"shards": "DIR"}, "run": {"dir": "DIR"}}
    recipe = validate(Recipe, merge(required, read_yaml(config)) if config is not None else required)
    marked = tyro.conf.AvoidSubcommands[tyro.conf.FlagConversionOff[Recipe]]
    print(usage)  # as it stands: as a parser's description its lines would be run together
    with contextlib.suppress(SystemExit):  # tyro's way to end after its help
        tyro.cli(marked, prog="selfsup train", default=recipe, args=["--help"])
