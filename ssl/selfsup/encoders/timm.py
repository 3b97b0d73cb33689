"""Any timm backbone as an encoder, by name. Its state dict is timm's own, under `model.`."""

from functools import lru_cache
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from selfsup import flops
from selfsup.config import Section


class TimmConfig(Section):
    """A backbone of timm, freshly initialised: `encoder: {name: timm, model: resnet18}`."""

    reads: ClassVar[str] = "images"

    name: Literal["timm"] = "timm"
    model: str
    """timm's name of the architecture, such as resnet18 or convnext_tiny; no weights are loaded."""
    img_size: Annotated[int, Field(ge=1)] = 224
    """Side of the square input in pixels."""
    in_chans: Literal[1, 3] = 3
    """1: images are read as grey; 3: as RGB."""
    stem: Literal["default", "cifar"] = "default"
    """cifar: a ResNet for images of 32 px, which begins with a 3x3 convolution of stride 1 and has no max-pool
    (Chen et al. 2020, sec. B.9); default: timm's own."""

    @field_validator("model")
    @classmethod
    def _known(cls, value: str) -> str:
        import timm  # seconds to import: only where it is asked for

        if value not in timm.list_models():
            near = timm.list_models(f"*{value.split('.')[0]}*")[:3]
            hint = f"; perhaps {', '.join(near)}" if near else "; see timm.list_models()"
            raise ValueError(
                f"expected the name of an architecture in timm {timm.__version__}, got {value!r}{hint}"
            )
        return value

    @model_validator(mode="after")
    def _check(self) -> "TimmConfig":
        if self.stem == "cifar":
            _skeleton(self)  # refuses what has another stem
        try:
            _counted(self)
        except Exception as error:  # timm and torch raise anything for a size that does not fit
            message = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"img_size: timm's {self.model} does not take images of {self.img_size} px: {message}"
            ) from error
        return self

    @property
    def embed_dim(self) -> int:
        """Width of a feature."""
        return _skeleton(self).embed_dim

    @property
    def has_batch_norm(self) -> bool:
        """Whether a feature depends, in training, on the other images of the batch."""
        return has_batch_norm(_skeleton(self))

    def flops_per_image(self) -> float:
        """FLOPs of one image, forward: counted, not derived."""
        return _counted(self).forward

    def training_flops(self) -> float:
        """FLOPs of one image, forward and backward."""
        return _counted(self).training

    def build(self) -> "TimmEncoder":
        """The module, freshly initialised from torch's global generator."""
        return TimmEncoder(self)


class TimmEncoder(nn.Module):
    """timm's model without its classifier; `forward` gives one feature per image."""

    def __init__(self, config: TimmConfig):
        import timm

        super().__init__()
        self.config = config
        # Vision transformers are built for an image size; convolutions take any and know no such argument.
        sized = {"img_size": config.img_size} if wants_size(config.model) else {}
        self.model = timm.create_model(
            config.model, pretrained=False, num_classes=0, in_chans=config.in_chans, **sized
        )
        if config.stem == "cifar":
            replace_stem(self.model, config.model)

    @property
    def embed_dim(self) -> int:
        """Width of a feature."""
        return (
            self.model.head_hidden_size
            if hasattr(self.model, "head_hidden_size")
            else self.model.num_features
        )

    def forward_features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b ..."]:
        """Tokens (b, n, d) or a map (b, d, h, w), whatever the architecture has before its pooling."""
        return self.model.forward_features(images)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        # Channels last in memory: the same numbers, 1.1 to 1.5 times as fast for a ResNet in bf16 on a CPU.
        return self.model(images.contiguous(memory_format=torch.channels_last))


def replace_stem(model: nn.Module, name: str) -> None:
    """Puts a 3x3 convolution of stride 1 for `conv1` and nothing for `maxpool`, in place.

    The new weights are drawn as timm draws those of all its convolutions (kaiming normal over the
    fan-out, resnet.py, init_weights); nothing else is drawn again, so that a last norm of a residual
    branch stays at timm's zero. Raises ValueError for a model without that stem; name: what it is
    called in the message.
    """
    from timm.models import ResNet

    if not isinstance(model, ResNet) or not isinstance(model.conv1, nn.Conv2d):
        raise ValueError(
            f"stem: cifar replaces the one convolution and the max-pool that timm's plain ResNets begin with; "
            f"expected such a model, got {name}; use resnet18 or resnet50, or stem: default"
        )
    old = model.conv1
    model.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()


def has_batch_norm(encoder: nn.Module) -> bool:
    """Whether any layer is a BatchNorm: then a feature depends, in training, on the rest of the batch."""
    return any(isinstance(layer, _BatchNorm) for layer in encoder.modules())


def wants_size(model: str) -> bool:
    """Whether timm marks the architecture as one of a fixed input size."""
    import timm

    config = timm.get_pretrained_cfg(model)
    return config is not None and config.fixed_input_size


@lru_cache(maxsize=16)
def _skeleton(config: TimmConfig) -> TimmEncoder:
    """The module without its numbers, for what only it knows. Draws nothing."""
    with torch.device("meta"):
        return TimmEncoder(config)


@lru_cache(maxsize=16)
def _counted(config: TimmConfig) -> flops.Counted:
    return flops.counted(_skeleton(config), config.img_size, config.in_chans)
