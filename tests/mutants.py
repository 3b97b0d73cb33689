"""Bugs that distributed training codes really had, each planted by name; every one must be caught."""

import functools
import inspect
import os
import textwrap

import torch
from torch.distributed.fsdp import FSDPModule

from selfsup import checkpoint, dist, guard, lars, opening, saving, sharding, start, train
from selfsup.data import text, views
from selfsup.ema import Ema
from selfsup.encoders.vit import ViT
from selfsup.objectives import base, byol, clm, mae, mlm, simclr
from selfsup.probe.online import OnlineMonitor


def rank_in_the_key() -> None:
    """Masks drawn from (seed + rank)."""
    original = mae.random_bits

    def random_bits(seed, *rest):
        return original(seed + dist.rank(), *rest)

    mae.random_bits = random_bits


def mean_of_means() -> None:
    """Each micro-batch divides by its own number of targets."""

    def forward(self, batch, total):
        pred, mask = self.predict(batch.images, self.noise(batch))
        target = mae.patchify(batch.images, self.encoder.config.patch_size)
        return base.Output(mae.mae_loss(pred, target, mask, self.config.norm_pix_loss).mean(), {})

    mae.MAE.forward = forward


def no_world_factor() -> None:
    """The local sum over the global total, averaged once more by DDP."""
    mae.global_mean = lambda local_sum, total: local_sum / total


def prepared_loader() -> None:
    """The rank's own batches sharded once more, as accelerator.prepare(loader) does."""
    original = start.open_batches

    def open_batches(*arguments):
        for number, batch in enumerate(original(*arguments)):
            if number % dist.world_size() == dist.rank():
                yield batch

    start.open_batches = open_batches


def schedule_per_process() -> None:
    """The scheduler stepped once per process, as a prepared scheduler is."""
    from selfsup.optim import OptimConfig

    original = OptimConfig.lr
    OptimConfig.lr = lambda self, step: original(self, min(step * dist.world_size(), self.steps - 1))


def counting_in_workers() -> None:
    """The cursor saved is how far the loader has read ahead, not what the optimizer has seen."""
    original = saving.snapshot

    def snapshot(state, copy):
        return original(state._replace(samples=state.samples + 2 * state.recipe.optim.batch_size), copy)

    saving.snapshot = snapshot


def random_augmentation() -> None:
    """Crops from a generator instead of from the key."""
    original = views.crop_boxes

    def crop_boxes(seed, epoch, position, *rest):
        return original(int(torch.randint(2**31, ()).item()), epoch, position, *rest)

    views.crop_boxes = crop_boxes


def unseeded_model() -> None:
    """Dropout and drop path from wherever torch's generator happens to stand."""
    train.seed_model = lambda seed, step, micro: None


def forgotten_optimizer() -> None:
    """A resume with fresh moments."""
    checkpoint.optimizer_from_names = lambda optimizer, tensors, groups: None


def reordered_buckets() -> None:
    """DDP as it comes: after the first backward pass it sums in another order."""
    original = start.DistributedDataParallelKwargs
    start.DistributedDataParallelKwargs = lambda find_unused_parameters: original()


def parts_ignored() -> None:
    """What Accelerate does with its FSDP plugin on a CPU: nothing, and DDP instead."""
    sharding.shard = lambda module, device: None


def parts_summed() -> None:
    """Gradients of split weights summed over processes, not averaged."""
    original = sharding.shard

    def shard(module, device):
        original(module, device)
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.set_gradient_divide_factor(1.0)

    sharding.shard = shard


def norms_of_parts() -> None:
    """LARS takes the norm of this process's part for that of the whole tensor."""
    original = lars.trust_ratios
    lars.trust_ratios = lambda weights, updates, trust_coefficient, split: original(weights, updates, trust_coefficient)


def orphans() -> None:
    """Ranks that do not learn of their launcher's death."""
    train.follow_launcher = lambda: False


def a_verdict_of_ones_own() -> None:
    """Each rank judges its own loss, and skips alone."""
    guard.Guard.refuses = lambda self, loss, norm: not bool(loss.isfinite() & norm.isfinite())


def statistics_kept() -> None:
    """A skipped step leaves batch norm's running statistics where its forward pass moved them."""
    guard.Guard.remember = lambda self: None
    original = guard.Guard.__init__

    def init(self, *arguments):
        original(self, *arguments)
        self._moving = []

    guard.Guard.__init__ = init


def deaf_to_signals() -> None:
    """A request to stop that comes before the loop is forgotten."""
    original = train.steps

    def steps(recipe, opened, stop, watchdog):
        stop.reason = ""
        return original(recipe, opened, stop, watchdog)

    train.steps = steps


def killed_opening_the_monitor() -> None:
    """The process dies while the online monitor decodes its images."""
    opening.open_monitor = lambda *arguments: os._exit(9)


def average_per_micro_batch() -> None:
    """The average takes the weights in once for every micro-batch of a step."""
    original_update, original_seed, micro_batches = Ema.update, train.seed_model, [0]

    def seed_model(seed, step, micro):
        micro_batches[0] = micro + 1
        original_seed(seed, step, micro)

    def update(self, module, step):
        for _ in range(micro_batches[0]):
            original_update(self, module, step)

    train.seed_model, Ema.update = seed_model, update


def average_before_the_step() -> None:
    """The average takes in the weights that the optimizer is about to change."""
    original, late = Ema.update, {}

    def update(self, module, step):
        before = late or {k: v.clone() for k, v in self.tensors.items()}
        after = {k: v.detach().clone() for k, v in module.state_dict().items()}
        module.load_state_dict(before)
        original(self, module, step)
        module.load_state_dict(after)
        late.update(after)

    Ema.update = update


def forgotten_average() -> None:
    """A resume whose average starts from the weights it finds."""
    Ema.load = lambda self, tensors: None


def schedule_off_by_one() -> None:
    """The rate of the next step."""
    from selfsup.optim import OptimConfig

    original = OptimConfig.lr
    OptimConfig.lr = lambda self, step: original(self, step + 1)


def exec_changed(module, name: str, old: str, new: str):
    """A function (or Class.method) of `module` with one piece of its source replaced; the original stays."""
    function = functools.reduce(getattr, name.split("."), module)
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    assert old in source, f"{name} has no {old!r}"
    names = dict(vars(module))
    exec("from __future__ import annotations\n" + source.replace(old, new), names)
    return names[name.split(".")[-1]]


def no_grad_gather() -> None:
    """NT-Xent's gather without gradient, each rank's own slot put back: lightly's before its #1531."""
    original = dist.all_gather_with_grad

    def gather(x):
        everyone = original(x.detach())
        here = dist.rank() * len(x)
        return torch.cat([everyone[:here], x, everyone[here + len(x) :]])

    dist.all_gather_with_grad = gather


def gradient_over_world() -> None:
    """The gather's backward pass averages over ranks where it must sum."""
    original = dist.all_gather_with_grad

    def gather(x):
        everyone = original(x)
        return everyone.detach() + (everyone - everyone.detach()) / dist.world_size()

    dist.all_gather_with_grad = gather


def wrong_own_slot() -> None:
    """Every rank takes the first slot for its own."""
    simclr.slot = lambda i: i


def masked_diagonal_off_by_one() -> None:
    """The similarity to oneself stays, a negative goes."""
    simclr.nt_xent = exec_changed(simclr, "nt_xent", "own[:, None]", "(own[:, None] + 1) % len(everyone)")


def local_batch_norm() -> None:
    """Batch norm with the statistics of the rank's own samples."""
    start.synchronise = lambda module: module


def no_predictor() -> None:
    """BYOL whose projection is itself compared with the target's: nothing stands against a constant."""
    byol.BYOL.predict = lambda self, images: self.projector(self.encoder(images))


def no_stop_gradient() -> None:
    """BYOL whose target is the online network, gradient and all."""
    byol.BYOL.target = lambda self, images: self.projector(self.encoder(images))
    byol.byol_loss = exec_changed(byol, "byol_loss", "z.detach()", "z")


def constant_encoder() -> None:
    """An encoder that says the same of every image."""
    original = ViT.pool
    ViT.pool = lambda self, tokens: original(self, tokens) * 0 + 0.7


def target_per_micro_batch() -> None:
    """The target takes the online weights in once for every micro-batch of a step."""
    original_after, original_seed, micro_batches = byol.BYOL.after_step, train.seed_model, [0]

    def seed_model(seed, step, micro):
        micro_batches[0] = micro + 1
        original_seed(seed, step, micro)

    def after_step(self, progress):
        for _ in range(micro_batches[0]):
            original_after(self, progress)

    train.seed_model, byol.BYOL.after_step = seed_model, after_step


def target_before_the_step() -> None:
    """The target takes in the weights that the optimizer is about to change."""
    original, late = byol.BYOL.after_step, {}

    def after_step(self, progress):
        after = {k: p.detach().clone() for k, p in self.named_parameters() if not k.startswith("target_")}
        with torch.no_grad():
            for k, p in self.named_parameters():
                if k in late:
                    p.copy_(late[k])
            original(self, progress)
            for k, p in self.named_parameters():
                if k in after:
                    p.copy_(after[k])
        late.update(after)

    byol.BYOL.after_step = after_step


def target_momentum_at_the_end() -> None:
    """The momentum of the next step."""
    original = byol.BYOL.after_step
    byol.BYOL.after_step = lambda self, progress: original(self, progress + 1 / 6)


def monitor_in_training_mode() -> None:
    """Batch norms take the monitor's images into their running statistics."""
    original = OnlineMonitor._run

    def run(self, model, images):
        model.eval = lambda: None
        return original(self, model, images)

    OnlineMonitor._run = run


def forgotten_target() -> None:
    """A resume whose target starts from the seed again."""
    original = checkpoint.load_file

    def load_file(path):
        tensors = original(path)
        for name in [name for name in tensors if name.startswith("target_encoder.")]:
            tensors[name] = torch.zeros_like(tensors[name])
        return tensors

    checkpoint.load_file = load_file


def momentum_from_the_resume() -> None:
    """The momentum's schedule counted from where the run went on."""
    original = byol.BYOL.after_step
    byol.BYOL.after_step = lambda self, progress: original(self, max(0.0, progress - 0.5))


def tokens_mean_of_means() -> None:
    """Each micro-batch of text divides by its own number of targets."""
    for objective in (mlm.MLM, clm.CLM):
        original = objective.forward

        def forward(self, batch, total, original=original):
            return original(self, batch, batch.targets * batch.global_batch / len(batch.tokens))

        objective.forward = forward


def tokens_no_world_factor() -> None:
    """The local sum over the global number of tokens, averaged once more by DDP."""
    mlm.global_mean = clm.global_mean = lambda local_sum, total: local_sum / total


def pairs_no_world_factor() -> None:
    """The same of next-sentence pairs alone."""
    mlm.MLM.forward = exec_changed(mlm, "MLM.forward", "dist.world_size() / batch", "1 / batch")


def pairs_mean_of_means() -> None:
    """Pairs over those of the micro-batch, as a criterion's own mean has it."""
    old, new = "dist.world_size() / batch.global_batch", "1 / len(batch.tokens)"
    mlm.MLM.forward = exec_changed(mlm, "MLM.forward", old, new)


def masks_from_a_generator() -> None:
    """Which tokens are masked depends on what was drawn before."""
    original = text.mask_tokens

    def mask_tokens(*arguments):
        drawn = int(torch.randint(2**31, ()).item())
        return original(*arguments[:4], drawn, *arguments[5:])

    text.mask_tokens = mask_tokens
