"""Any timm backbone as an encoder, by name. Its state dict is timm's own."""

from typing import Annotated, Literal

from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor, nn

from selfsup.config import Section


class TimmConfig(Section):
    """A backbone of timm, freshly initialised: `encoder: {name: timm, model: resnet18}`."""

    name: Literal["timm"] = "timm"
    model: str
    """timm's name of the architecture, such as resnet18 or convnext_tiny; no weights are loaded."""
    img_size: Annotated[int, Field(ge=1)] = 224
    """Side of the square input in pixels."""
    in_chans: Literal[1, 3] = 3
    """1: images are read as grey; 3: as RGB."""

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
        sized = {"img_size": config.img_size} if _wants_size(config.model) else {}
        self.model = timm.create_model(
            config.model, pretrained=False, num_classes=0, in_chans=config.in_chans, **sized
        )

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
        return self.model(images)


def _wants_size(model: str) -> bool:
    """Whether timm marks the architecture as one of a fixed input size."""
    import timm

    config = timm.get_pretrained_cfg(model)
    return config is not None and config.fixed_input_size
