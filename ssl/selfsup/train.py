"""The training loop: the only one. `main` reads the command line, `train` trains.

selfsup train CONFIG [--section.key value ...]      a new run
selfsup train --resume DIR                          an interrupted run goes on (only --run.* and
                                                    the paths of its data may change)
selfsup train CONFIG --init-from DIR                a new run from the trained weights of another
selfsup train CONFIG --dry-run                      print what would run, take one batch through

Every key of a recipe can be set in the YAML, or after it on the command line.
"""

import argparse
import contextlib
import math
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import torch

from selfsup import checkpoint, dist, flops, run_folder, start
from selfsup.checkpoint import TrainState
from selfsup.config import parse_overrides
from selfsup.data.rows import Rows
from selfsup.dry_run import dry_run
from selfsup.ema import Ema
from selfsup.keyed import Purpose, random_bits
from selfsup.metrics import MetricsLog, StepClock
from selfsup.optim import build_optimizer, require_finite
from selfsup.probe.online import open_monitor
from selfsup.recipe import Recipe, load_recipe, resumed


def train(recipe: Recipe, resume: Path | None = None, weights: Path | None = None) -> str:
    """Runs the recipe to its last step, or until a signal asks it to stop.

    resume: the checkpoint to go on from; weights: a run or checkpoint to take weights from.
    Returns "finished" or "interrupted". Raises ValueError for whatever the user can mend.
    """
    accelerator = start.accelerator(recipe)
    plan, data = start.batch_plan(recipe), start.open_data(recipe)
    objective, facts = start.build_objective(recipe, accelerator.device), start.data_facts(data)
    if weights is not None:
        start.say(dist.together(checkpoint.init_from, weights, objective, recipe, facts))
    optimizer = build_optimizer(recipe.optim, objective)
    ema = None if recipe.optim.ema is None else Ema(objective, recipe.optim.ema)
    state = TrainState(objective, optimizer, accelerator.scaler, recipe, 0, 0, facts, ema)
    if resume is not None:
        state = start.resume(resume, state)
    run_dir, optim, run = Path(recipe.run.dir), recipe.optim, recipe.run
    batches = start.open_batches(recipe, data, plan, state)
    lock = dist.on_first_rank(run_folder.claim, run_dir, resume is not None)
    dist.on_first_rank(checkpoint.set_aside_later, run_dir, state.step)
    if weights is not None:
        # Before `describe`: a folder that is described but has no checkpoint is resumed from the seed.
        dist.on_first_rank(checkpoint.save_checkpoint, run_dir, state)
    dist.on_first_rank(run_folder.describe, run_dir, recipe, plan.world, accelerator.device)
    dist.on_first_rank(start.keep_tokenizer, run_dir, data)
    log = dist.on_first_rank(MetricsLog, run_dir, state.step, optim.steps)
    start.summarise(recipe, plan, data, state, accelerator.device)
    monitor, monitored = None, 0 < run.monitor_every <= optim.steps
    if monitored or (run.monitor_every and isinstance(data, Rows)):  # text it never measures, and says so
        monitor = dist.on_first_rank(open_monitor, recipe, data, accelerator.device)
    elif run.monitor_every:
        start.say(f"monitor    off: run.monitor_every {run.monitor_every} is beyond the last step {optim.steps}")
    profiler = start.profiler(recipe, state.step)

    stop = StopSignal()
    if run.compile:
        objective.compile()
    model, stepper = accelerator.prepare(objective, optimizer)
    clock, peak = StepClock(), flops.peak(accelerator.device, recipe.precision.mixed)
    saved = None if resume is None and weights is None else state.step
    outcome = "finished"

    for step in range(state.step, optim.steps):
        if profiler is not None:
            profiler.before(step)
        began = time.perf_counter()
        micro_batches, fault = [], None
        try:
            micro_batches = [next(batches) for _ in range(plan.accumulation)]
        except ValueError as error:  # a damaged sample
            fault = error
        clock.waited(time.perf_counter() - began)

        # One sum over ranks per step: the number of loss terms, whether to stop, whether a rank failed.
        targets = sum(b.targets for b in micro_batches)
        total, stopping, faults = dist.sum_over_ranks(targets, stop.requested, fault is not None)
        dist.raise_together(fault, faults)
        if not total:
            raise ValueError(
                f"step {step}: nothing to predict in the whole batch, its documents are empty; raise optim.batch_size"
            )
        if stopping:
            outcome = "interrupted"
            break

        for group in optimizer.param_groups:
            group["lr"] = optim.lr(step)
        sums = {"loss": torch.zeros((), device=accelerator.device)}
        for i, batch in enumerate(micro_batches):
            seed_model(recipe.seed, step, i)
            batch = recipe.data.to(batch, accelerator.device)
            last = i == len(micro_batches) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                output = model(batch, total)
                accelerator.backward(output.loss)
            for name, value in {"loss": output.loss.detach(), **output.metrics}.items():
                sums[name] = sums.get(name, 0) + value

        done = step + 1
        measure_now = monitored and done % run.monitor_every == 0
        log_now = measure_now or done % run.log_every == 0 or done == optim.steps
        save_now = done % run.checkpoint_every == 0 or done == optim.steps
        if optim.clip_grad_norm is not None or log_now:
            most = optim.clip_grad_norm or math.inf
            grad_norm = accelerator.clip_grad_norm_(objective.parameters(), most)
        stepper.step()
        if log is not None and run.histogram_every and done % run.histogram_every == 0:
            log.histograms(done, objective)
        stepper.zero_grad()
        objective.after_step(step / optim.steps)
        if ema is not None:
            ema.update(objective, done)
        state = state._replace(step=done, samples=state.samples + optim.batch_size)
        clock.step()

        if log_now or save_now:
            over_ranks = dist.sum_over_ranks(*(value.item() for value in sums.values()))
            means = {name: value / plan.world for name, value in zip(sums, over_ranks)}
            require_finite(means["loss"], done)
        if log_now and log is not None:
            values = {**means, "lr": optimizer.param_groups[0]["lr"], "samples": state.samples}
            if math.isfinite(grad_norm):  # fp16 skips a step that overflows
                values["grad_norm"] = float(grad_norm)
            if data is not None:
                values["epoch"] = state.samples / len(data)
            values |= clock.read(
                optim.batch_size, recipe.throughput, objective.flops_per_sample(), peak and peak * plan.world
            )
            if monitor is not None and measure_now:
                values |= monitor.measure(objective.encoder, objective.projector)
                log.distributions(done, monitor.similarities)
            log.write(done, values)
        if log is not None and run.picture_every and (done % run.picture_every == 0 or done == optim.steps):
            start.show(log, done, recipe, objective, batch, data)
        if save_now:
            dist.on_first_rank(checkpoint.save_checkpoint, run_dir, state)
            saved = done
        if log is not None:
            log.advance()

    if saved != state.step:  # interrupted between two checkpoints
        dist.on_first_rank(checkpoint.save_checkpoint, run_dir, state)
    if profiler is not None:
        profiler.close(state.step)
    if log is not None:
        log.close()
    batches.close()
    collapsed_at = None if log is None else log.collapsed_at
    dist.on_first_rank(run_folder.write_outcome, run_dir, outcome, state.step, collapsed_at)
    collapsed = "" if collapsed_at is None else f", COLLAPSED since step {collapsed_at}"
    start.say(f"{outcome} at step {state.step} of {optim.steps}{collapsed}: {run_dir}")
    if lock is not None:
        lock.close()
    return outcome


def seed_model(seed: int, step: int, micro: int) -> None:
    """Seeds torch's generators for one forward pass (dropout, drop path) from (seed, step, rank, micro)."""
    position = torch.tensor(dist.rank() << 32 | micro)
    high, low = random_bits(seed, step, position, Purpose.MODEL, 2).tolist()
    torch.manual_seed(high << 32 | low)


class StopSignal:
    """Remembers SIGINT or SIGTERM until the loop can save; a second one, after a second, leaves at once.
    Sooner it is the same: `timeout` signals its child, and then the child's group."""

    def __init__(self) -> None:
        self.requested, self._asked = 0, 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if time.monotonic() - self._asked < 1:
                return
            raise SystemExit(128 + number)
        self.requested, self._asked = 1, time.monotonic()
        start.say(f"{signal.Signals(number).name}: saving at the end of this step, then leaving")


INTERRUPTED = 75  # EX_TEMPFAIL: run it again with --resume


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 finished, 2 a fault the user can mend, 75 interrupted."""
    rest = list(sys.argv[1:] if arguments is None else arguments)
    config = Path(rest.pop(0)) if rest and not rest[0].startswith("-") else None
    parser = argparse.ArgumentParser(prog="selfsup train", add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path, metavar="DIR")
    parser.add_argument("--init-from", type=Path, metavar="DIR")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    options, overrides = parser.parse_known_args(rest)
    try:
        if options.help:
            start.print_help(config, __doc__ or "")
            return 0
        if (config is None) == (options.resume is None):
            raise ValueError("expected a CONFIG for a new run, or --resume DIR; see selfsup train --help")
        if options.resume is not None and (options.init_from is not None or options.dry_run):
            raise ValueError("--resume: goes on with a run; --init-from and --dry-run belong to a new one")
        if options.resume is not None:
            return _leave(go_on(options.resume, overrides))
        recipe = load_recipe(config, overrides)
        if options.dry_run:
            dry_run(recipe, options.init_from)
            return 0
        return _leave(train(recipe, weights=options.init_from))
    except dist.OtherRankFailed:
        return 2
    except KeyboardInterrupt:  # before the loop's own handler was in place
        start.say("interrupted before the first step; nothing to save")
        return 128 + signal.SIGINT
    except (ValueError, OSError) as error:
        rank = os.environ.get("RANK", "0")
        prefix = "error: " if rank == "0" else f"[rank {rank}] error: "
        print("\n".join(prefix + line for line in str(error).splitlines()), file=sys.stderr, flush=True)
        return 2


def go_on(run: Path, overrides: list[str]) -> str:
    """Resumes a run folder, or one of its checkpoints; from step 0 where the run was killed before its first."""
    if (run / "environment.json").exists() and not list(run.glob("checkpoints/step-*")):
        start.say(f"{run}: no checkpoint yet, starting at step 0")
        return train(resumed(load_recipe(run / "config.yaml", []), parse_overrides(overrides), run))
    found, passed_over = checkpoint.find_checkpoint(run)
    start.say(*passed_over)
    run_dir = checkpoint.run_dir_of(found)
    return train(resumed(checkpoint.read_recipe(found), parse_overrides(overrides), run_dir), resume=found)


def _leave(outcome: str) -> int:
    dist.leave()
    return 0 if outcome == "finished" else INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
