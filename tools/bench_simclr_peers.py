"""The two sides of bench_simclr.py: one backbone, heads of one size, data from one set of shards.

lightly's side is joined from its parts as its documentation joins them: its losses, heads, transform
and momentum update around a timm backbone, views forwarded one after the other, a DataLoader over PIL
images. It begins with the backbone weights that our encoder of the same seed begins with.
"""

import copy
import io
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from selfsup.data.images import ImageData, train_batches
from selfsup.data.index import ShardIndex
from selfsup.data.order import BatchPlan
from selfsup.data.reader import ShardReader
from selfsup.data.views import ViewBatch
from selfsup.encoders import EncoderConfig
from selfsup.encoders.vit import ViTConfig
from selfsup.export.timm import ARCHITECTURE, timm_config
from selfsup.objectives.byol import BYOLConfig
from selfsup.objectives.simclr import SimCLRConfig

Side = Literal["lightly", "selfsup"]
INSTALL = (
    "pip install --no-deps --target peers lightly lightning-utilities, which leaves this environment's torch "
    "alone, then PYTHONPATH=peers python tools/bench_simclr.py"
)
TRANSFORMS = {"simclr": {}, "simclr-32": {"cj_strength": 0.5, "gaussian_blur": 0.0}}
"""data.views -> what lightly's SimCLRTransform is told besides its size; the rest are its defaults."""


def require_lightly() -> None:
    """Raises ValueError saying how to install lightly where it cannot be imported."""
    try:
        import lightly.loss
        import lightly.models.modules
        import lightly.transforms  # noqa: F401
    except ImportError as error:
        raise ValueError(f"lightly cannot be imported ({error}); {INSTALL}") from None


def build(side: Side, objective: SimCLRConfig | BYOLConfig, encoder: EncoderConfig) -> "Ours | LightlySimCLR":
    """A module from a batch of its own side to the loss. Raises ValueError where lightly is missing."""
    if side == "selfsup":
        return Ours(objective, encoder)
    require_lightly()
    match objective:
        case SimCLRConfig():
            return LightlySimCLR(objective, encoder)
        case BYOLConfig():
            return LightlyBYOL(objective, encoder)


class Ours(nn.Module):
    """selfsup's objective."""

    def __init__(self, objective: SimCLRConfig | BYOLConfig, encoder: EncoderConfig):
        super().__init__()
        self.objective = objective.build(encoder)

    @property
    def encoder(self) -> nn.Module:
        """What is scored."""
        return self.objective.encoder

    def forward(self, batch: ViewBatch) -> Tensor:
        return self.objective(batch, float(batch.targets)).loss

    def after_step(self, done: int, steps: int) -> None:
        """Follows every optimizer step: `done` of `steps`."""
        self.objective.after_step((done - 1) / steps)  # as the loop: the share done before the step


class LightlySimCLR(nn.Module):
    """docs.lightly.ai, examples/simclr."""

    def __init__(self, objective: SimCLRConfig, encoder: EncoderConfig):
        super().__init__()
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead

        self.encoder = timm_backbone(encoder)
        self.projection_head = SimCLRProjectionHead(
            self.encoder.num_features, objective.hidden_dim, objective.out_dim, objective.num_layers
        )
        self.criterion = NTXentLoss(temperature=objective.temperature)

    def forward(self, views: list[Tensor]) -> Tensor:
        z0, z1 = (self.projection_head(self.encoder(x).flatten(start_dim=1)) for x in views)
        return self.criterion(z0, z1)

    def after_step(self, done: int, steps: int) -> None:
        """Nothing to do."""


class LightlyBYOL(nn.Module):
    """docs.lightly.ai, examples/byol. Its loss l is (ours - 4) / 4: half the sum of two negative cosines."""

    def __init__(self, objective: BYOLConfig, encoder: EncoderConfig):
        super().__init__()
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models import utils
        from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead

        self.momentum, self.update_momentum = objective.momentum, utils.update_momentum
        hidden, out = objective.hidden_dim, objective.out_dim
        self.encoder = timm_backbone(encoder)
        self.projection_head = BYOLProjectionHead(self.encoder.num_features, hidden, out)
        self.prediction_head = BYOLPredictionHead(out, hidden, out)
        self.momentum_encoder = copy.deepcopy(self.encoder)
        self.momentum_projection_head = copy.deepcopy(self.projection_head)
        utils.deactivate_requires_grad(self.momentum_encoder)
        utils.deactivate_requires_grad(self.momentum_projection_head)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, views: list[Tensor]) -> Tensor:
        (p0, z0), (p1, z1) = ((self.predict(x), self.target(x)) for x in views)
        return 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))

    def predict(self, x: Tensor) -> Tensor:
        return self.prediction_head(self.projection_head(self.encoder(x).flatten(start_dim=1)))

    def target(self, x: Tensor) -> Tensor:
        return self.momentum_projection_head(self.momentum_encoder(x).flatten(start_dim=1)).detach()

    def after_step(self, done: int, steps: int) -> None:
        """The documentation updates before the forward pass: the same but for the first update, of equal
        networks, and the last. Its momentum rises once an epoch, here every step."""
        from lightly.utils.scheduler import cosine_schedule

        m = cosine_schedule(done, steps, self.momentum, 1.0)
        self.update_momentum(self.encoder, self.momentum_encoder, m=m)
        self.update_momentum(self.projection_head, self.momentum_projection_head, m=m)


def timm_backbone(encoder: EncoderConfig) -> nn.Module:
    """timm's module of the encoder's architecture with the weights that the encoder is born with.

    Names and shapes of all weights must be equal; what ours does not train (fixed positions) is not trained.
    Raises ValueError for a ViT that timm cannot say.
    """
    ours = encoder.build()
    if not isinstance(encoder, ViTConfig):
        return ours.model  # timm's own
    if encoder.pos_embed == "rope" or encoder.patch_bias == encoder.pre_norm or encoder.drop_path:
        raise ValueError("encoder: rope, drop_path and CLIP's halves are not in timm's VisionTransformer")
    arguments = timm_config(encoder, (), ())["model_args"]
    theirs = timm.create_model(ARCHITECTURE, num_classes=0, **arguments)
    theirs.load_state_dict(ours.state_dict())
    trained = {name: p.requires_grad for name, p in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(trained[name])
    return theirs


class EncodedImages(Dataset):
    """The images of shards, encoded, in memory; an item is (views, label), as of torchvision's data sets."""

    def __init__(self, index: ShardIndex, transform: Any):
        self.blobs, self.labels = ShardReader(index).read(np.arange(len(index))), index.label
        self.transform = transform

    def __len__(self) -> int:
        return len(self.blobs)

    def __getitem__(self, row: int) -> tuple[list[Tensor], int]:
        image = Image.open(io.BytesIO(self.blobs[row])).convert("RGB")
        return self.transform(image), int(self.labels[row])


def open_batches(
    side: Side,
    data: ImageData,
    index: ShardIndex,
    encoder: EncoderConfig,
    batch_size: int,
    workers: int,
    device: torch.device,
    seed: int = 0,
) -> "Batches":
    """Batches of two views on the device, for `build`'s module of the same side.

    seed: of our order and views; lightly's come from torch's global generator.
    Raises ValueError for data.views that lightly's SimCLRTransform has no words for.
    """
    if side == "selfsup":
        plan = BatchPlan(batch_size, batch_size, rank=0, world=1)
        start = partial(
            train_batches, data, index, seed, encoder.img_size, encoder.in_chans, plan, workers=workers
        )
        return Batches(start, batch_size, lambda batch: batch.to(device, data.mean, data.std))
    require_lightly()
    from lightly.transforms import SimCLRTransform

    if data.views not in TRANSFORMS:
        raise ValueError(f"data.views: expected {' or '.join(TRANSFORMS)} for lightly, got {data.views}")
    normalize = {"mean": list(data.mean), "std": list(data.std)}
    transform = SimCLRTransform(encoder.img_size, normalize=normalize, **TRANSFORMS[data.views])
    if batch_size > len(index):
        raise ValueError(f"batch size: expected at most the {len(index)} images, got {batch_size}")
    images = EncodedImages(index, transform)
    loader = DataLoader(images, batch_size, shuffle=True, drop_last=True, num_workers=workers)
    return Batches(lambda _: epochs(loader), batch_size, lambda batch: [view.to(device) for view in batch[0]])


def epochs(loader: DataLoader) -> Iterator[Any]:
    """The loader's batches without end."""
    while True:
        yield from loader


class Batches:
    """A loader that can be stopped, its processes ended, and started again where it was."""

    def __init__(self, start: Any, batch_size: int, prepare: Any):
        """start: samples taken so far -> an iterator; prepare: what happens to a batch in this process."""
        self._start, self._batch_size, self._prepare = start, batch_size, prepare
        self._running, self._taken = None, 0

    def __next__(self) -> Any:
        if self._running is None:
            self._running = self._start(self._taken)
        self._taken += self._batch_size
        return self._prepare(next(self._running))

    def close(self) -> None:
        """Ends the processes."""
        if self._running is not None:
            self._running.close()
        self._running = None
