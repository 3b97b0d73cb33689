"""timm backbones by name."""

import pytest
import timm
import torch

from selfsup.config import merge, validate
from selfsup.encoders.timm import TimmConfig
from selfsup.recipe import Recipe

RECIPE = {"data": {"shards": "somewhere"}, "run": {"dir": "r"}}


@pytest.mark.parametrize(
    "model,size,width",
    [("resnet18", 40, 512), ("vit_tiny_patch16_224", 32, 192), ("mobilenetv3_small_100", 32, 1024)],
)
@torch.no_grad()
def test_equals_timm(model, size, width):
    torch.manual_seed(0)
    ours = TimmConfig(model=model, img_size=size, in_chans=1).build().eval()
    sized = {"img_size": size} if model.startswith("vit") else {}
    theirs = timm.create_model(model, num_classes=0, in_chans=1, **sized).eval()
    theirs.load_state_dict({k.removeprefix("model."): v for k, v in ours.state_dict().items()}, strict=True)
    images = torch.randn(2, 1, size, size)
    assert torch.equal(ours(images), theirs(images)) and ours(images).shape == (2, width)
    assert torch.equal(ours.forward_features(images), theirs.forward_features(images))
    assert ours.embed_dim == width


def test_a_typo_is_one_line_with_a_hint():
    with pytest.raises(ValueError, match=r"^encoder\.model: expected the name .* got 'resnet81'; see timm"):
        validate(Recipe, merge(RECIPE, {"encoder": {"name": "timm", "model": "resnet81"}}))
    with pytest.raises(ValueError, match=r"^encoder\.model: .*; perhaps resnet18d"):
        validate(Recipe, merge(RECIPE, {"encoder": {"name": "timm", "model": "resnet18d.a1"}}))
    with pytest.raises(ValueError, match=r"^encoder\.model: expected a value"):
        validate(Recipe, merge(RECIPE, {"encoder": {"name": "timm"}}))
    with pytest.raises(ValueError, match=r"^encoder: expected name to be one of 'vit', 'timm'"):
        validate(Recipe, merge(RECIPE, {"encoder": {"name": "vti"}}))


def test_mae_says_why_it_cannot():
    with pytest.raises(ValueError, match="encoder.name: mae removes patches .* only vit can do; got timm"):
        validate(Recipe, merge(RECIPE, {"encoder": {"name": "timm", "model": "resnet18"}}))
