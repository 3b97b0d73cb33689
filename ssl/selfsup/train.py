"""The training loop: the only one. `main` reads the command line, `train` trains.

selfsup train CONFIG [--section.key value ...]      a new run
selfsup train --resume DIR                          an interrupted run goes on (only --run.* and
                                                    the paths of its data may change)
selfsup train CONFIG --init-from DIR                a new run from the trained weights of another
selfsup train CONFIG --dry-run                      print what would run, take one batch through

Every key of a recipe can be set in the YAML, or after it on the command line.
"""

if __name__ == "__main__":  # before torch is imported, which takes seconds: its launcher may die in them
    from selfsup.stop import follow_launcher

    follow_launcher()

import argparse
import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import torch

from selfsup import checkpoint, cost, dist, parallel, run_folder, start
from selfsup.checkpoint import TrainState
from selfsup.config import parse_overrides
from selfsup.dry_run import dry_run
from selfsup.guard import Guard, clip, gradient_norm
from selfsup.keyed import Purpose, random_bits
from selfsup.metrics import StepClock
from selfsup.opening import Opened, open_run
from selfsup.optim import set_lr
from selfsup.pace import Pace
from selfsup.recipe import Recipe, load_recipe, resumed
from selfsup.stop import INTERRUPTED, StopRequest, follow_launcher
from selfsup.watchdog import Watchdog


def train(recipe: Recipe, resume: Path | None = None, weights: Path | None = None) -> str:
    """Runs the recipe to its last step, or until something asks it to stop.

    resume: the checkpoint to go on from; weights: a run or checkpoint to take weights from.
    Returns "finished" or "interrupted". Raises ValueError for whatever the user can mend.
    """
    stop = StopRequest(recipe.run.max_hours)  # before all that takes time: no signal is lost
    opened, run_dir = open_run(recipe, resume, weights), Path(recipe.run.dir)
    lock, log, saver = opened.lock, opened.log, opened.saver
    watchdog = Watchdog(run_dir, recipe.run.stall_minutes, opened.state.step)
    try:
        state = steps(recipe, opened, stop, watchdog)
        if saver.step != state.step:  # interrupted between two checkpoints
            saver.save(state)
        saver.close()
        opened.meter.record(state.step, state.samples)
    except (ValueError, OSError) as error:
        if log is not None:
            log.close()
        if lock is not None:
            run_folder.write_outcome(run_dir, "failed", saver.written or 0, reason=str(error))
        raise
    finally:
        watchdog.close()
    opened.batches.close()
    outcome = "finished" if state.step == recipe.optim.steps else "interrupted"
    collapsed_at = None
    if log is not None:
        log.close()
        collapsed_at = log.collapsed_at
    ending = (outcome, state.step, collapsed_at, stop.reason, state.skipped, opened.meter.summary())
    dist.on_first_rank(run_folder.write_outcome, run_dir, *ending)
    collapsed = "" if collapsed_at is None else f", COLLAPSED since step {collapsed_at}"
    skipped = f", {state.skipped} steps skipped" if state.skipped else ""
    start.say(
        cost.line(opened.meter.summary()),
        f"{outcome} at step {state.step} of {recipe.optim.steps}{skipped}{collapsed}: {run_dir}",
    )
    if lock is not None:
        lock.close()
    return outcome


def steps(recipe: Recipe, opened: Opened, stop: StopRequest, watchdog: Watchdog) -> TrainState:
    """The loop: from the opened state to the last step, or to the one before which somebody asked to stop."""
    accelerator, plan, data, objective, model, stepper, state, batches, saver, log, monitor, _, meter, peak = opened
    run_dir, run, optim, optimizer = Path(recipe.run.dir), recipe.run, recipe.optim, state.optimizer
    clock, pace = StepClock(), Pace(accelerator.device)
    guard = Guard(objective, run_dir, run.skip_budget, state.skipped, accelerator.scaler)
    profiler = start.profiler(recipe, state.step)

    for step in range(state.step, optim.steps):
        watchdog.beat(step)
        if profiler is not None:
            profiler.before(step)
        began = time.perf_counter()
        micro_batches, fault = [], None
        try:
            micro_batches = [next(batches) for _ in range(plan.accumulation)]
        except ValueError as error:  # a damaged sample
            fault = error
        waited = time.perf_counter() - began
        clock.waited(waited)
        pace.waited(waited)

        # One sum over ranks per step: the number of loss terms, whether to stop, whether a rank failed.
        targets = sum(b.targets for b in micro_batches)
        total, stopping, faults = dist.sum_over_ranks(
            float(targets), float(stop.requested), float(fault is not None)
        )
        dist.raise_together(fault, faults)
        if not total:
            raise ValueError(
                f"step {step}: nothing to predict in the whole batch, its documents are empty; raise optim.batch_size"
            )
        if stopping:
            stop.reason = stop.reason or "another process was asked to stop"
            break

        set_lr(optimizer, optim.lr(step))
        guard.remember()
        sums = {"loss": torch.zeros((), device=accelerator.device)}
        for i, batch in enumerate(micro_batches):
            seed_model(recipe.seed, step, i)
            batch = recipe.data.to(batch, accelerator.device)
            last = i == len(micro_batches) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                with pace.own():
                    output = model(batch, total)
                accelerator.backward(output.loss)
            for name, value in {"loss": output.loss.detach(), **output.metrics}.items():
                sums[name] = sums.get(name, 0) + value

        done = step + 1
        grad_norm = gradient_norm(accelerator, objective)
        if guard.refuses(sums["loss"], grad_norm):
            said = guard.skip(step, micro_batches, sums["loss"].item(), grad_norm.item())
            if guard.spent:
                if saver.step != state.step:
                    saver.save(state, prune=False)
                saver.wait()
                fault = ValueError(f"{said}; {guard.verdict(saver.path(state.step))}")
                dist.raise_together(fault if dist.rank() == 0 else None, 1)
            start.say(f"{said}: skipped, {guard.skipped} of run.skip_budget {run.skip_budget}")
            refused = True
        else:
            clip(objective, optim.clip_grad_norm, grad_norm)
            stepper.step()
            objective.after_step(step / optim.steps)
            if state.ema is not None:
                state.ema.update(objective, done - guard.skipped)
            refused = False
        if log is not None and run.histogram_every and done % run.histogram_every == 0:
            log.histograms(done, objective)
        stepper.zero_grad()
        state = state._replace(step=done, samples=state.samples + optim.batch_size, skipped=guard.skipped)
        clock.step()

        measure_now = start.monitored(recipe) and done % run.monitor_every == 0
        log_now = measure_now or done % run.log_every == 0 or done == optim.steps
        picture_now = run.picture_every and (done % run.picture_every == 0 or done == optim.steps)
        whole = parallel.gathered(recipe, objective, accelerator.device) if measure_now or picture_now else objective
        if log_now and not refused:
            over_ranks = dist.sum_over_ranks(*(value.item() for value in sums.values()))
            values = {name: value / plan.world for name, value in zip(sums, over_ranks)}
            values |= {"lr": optim.lr(step), "samples": state.samples, **pace.read()}
            if grad_norm.isfinite():  # fp16 skips a step that overflows
                values["grad_norm"] = grad_norm.item()
            if data is not None:
                values["epoch"] = state.samples / len(data)
            if guard.skipped:
                values["skipped"] = guard.skipped
            values |= clock.read(
                optim.batch_size, recipe.throughput, objective.flops_per_sample(), peak and peak * plan.world
            )
            if monitor is not None and log is not None and measure_now:
                values |= monitor.measure(whole.encoder, whole.projector)
                log.distributions(done, monitor.similarities)
            if log is not None:
                log.write(done, values)
        if log is not None and picture_now:
            start.show(log, done, recipe, whole, batch, data)
        del whole  # of split weights a copy of all
        # Not after a skipped step: a run that diverges would fill its last checkpoints with what it diverged to.
        if (done % run.checkpoint_every == 0 and not refused) or done == optim.steps:
            watchdog.beat(done)
            saver.save(state)
            meter.record(done, state.samples)
        if log is not None:
            log.advance()

    watchdog.beat(state.step)
    if profiler is not None:
        profiler.close(state.step)
    return state


def seed_model(seed: int, step: int, micro: int) -> None:
    """Seeds torch's generators for one forward pass (dropout, drop path) from (seed, step, rank, micro)."""
    position = torch.tensor(dist.rank() << 32 | micro)
    high, low = random_bits(seed, step, position, Purpose.MODEL, 2).tolist()
    torch.manual_seed(high << 32 | low)


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
    follow_launcher()
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
    sys.exit(dist.finish(main()))
