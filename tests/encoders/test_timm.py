"""timm backbones by name, and the stem of a ResNet for small images."""

import math

import pytest
import timm
import torch
import torchvision
from scipy.stats import kstest
from torch import nn

from selfsup.config import merge, validate
from selfsup.encoders import has_batch_norm
from selfsup.encoders import timm as encoders_timm
from selfsup.encoders.timm import TimmConfig, replace_stem
from selfsup.encoders.vit import ViTConfig
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


def shaken(config: TimmConfig) -> nn.Module:
    """An encoder none of whose tensors is at a special value: timm begins with a last norm of zero in every
    residual branch (zero_init_last), which would hide the branch, and with running statistics of 0 and 1."""
    torch.manual_seed(0)
    encoder = config.build().eval()
    with torch.no_grad():
        for tensor in (*encoder.parameters(), *encoder.buffers()):
            if tensor.is_floating_point():
                tensor += 0.05 * torch.rand_like(tensor)
    return encoder


@pytest.mark.parametrize("library", ["timm", "torchvision"])
@torch.no_grad()
def test_cifar_stem_is_the_library_s_resnet_with_another_beginning(library):
    ours = shaken(TimmConfig(model="resnet18", img_size=32, stem="cifar"))
    if library == "timm":
        theirs = timm.create_model("resnet18", num_classes=0).eval()
    else:
        theirs = torchvision.models.resnet18().eval()
        theirs.fc = nn.Identity()
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    theirs.load_state_dict(ours.model.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32)
    limit = 1e-5 * float(theirs(images).abs().max())
    assert (ours(images) - theirs(images)).abs().max() <= limit
    assert ours.forward_features(images).shape == (2, 512, 4, 4)  # 32 / 8: the default stem leaves 1 x 1
    theirs.maxpool = nn.MaxPool2d(3, 2, 1)
    assert (ours(images) - theirs(images)).abs().max() > limit


def looks_drawn_by_timm(weight: torch.Tensor) -> bool:
    """Kaiming normal over the fan-out, 64 channels of 3 x 3."""
    return kstest(weight.detach().flatten().numpy(), "norm", (0, math.sqrt(2 / (64 * 9)))).pvalue > 1e-3


def test_the_new_stem_is_initialised_as_timm_s():
    torch.manual_seed(0)
    model = TimmConfig(model="resnet18", img_size=32, stem="cifar").build().model
    assert looks_drawn_by_timm(model.conv1.weight) and looks_drawn_by_timm(model.layer1[0].conv1.weight)
    assert not looks_drawn_by_timm(nn.Conv2d(3, 64, 3).weight)  # torch's own
    assert not looks_drawn_by_timm(nn.init.kaiming_normal_(torch.empty(64, 3, 3, 3)))  # over the fan-in
    blocks = [block for layer in (model.layer1, model.layer2, model.layer3, model.layer4) for block in layer]
    assert len(blocks) == 8 and all((block.bn2.weight == 0).all() for block in blocks)
    assert all((block.bn1.weight == 1).all() for block in blocks)


def test_a_new_stem_leaves_the_rest_alone():
    model = timm.create_model("resnet18", num_classes=0, zero_init_last=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    replace_stem(model, "resnet18")
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["conv1.weight"]


@pytest.mark.parametrize("model", ["resnet10t", "test_resnet", "resnetv2_50", "vit_tiny_patch16_224"])
def test_another_stem_is_refused_by_name(model):
    with pytest.raises(ValueError, match=f"^stem: cifar .* expected such a model, got {model}; use resnet18"):
        validate(TimmConfig, {"model": model, "stem": "cifar"})


@pytest.mark.parametrize("model", ["levit_128s", "xcit_nano_12_p8_224"])
def test_a_size_that_does_not_fit_is_one_line(model):
    with pytest.raises(ValueError, match=rf"^img_size: timm's {model} does not take images of 36 px: .") as fault:
        validate(TimmConfig, {"model": model, "img_size": 36})
    assert "\n" not in str(fault.value)
    assert validate(TimmConfig, {"model": model, "img_size": 64}).build()(torch.zeros(2, 3, 64, 64)).ndim == 2


def test_a_recipe_names_the_whole_key():
    encoder = {"name": "timm", "model": "test_resnet", "img_size": 32, "stem": "cifar"}
    content = {"objective": {"name": "simclr"}, "data": {"views": "simclr-32"}, "encoder": encoder}
    with pytest.raises(ValueError, match=r"^encoder: stem: cifar"):
        validate(Recipe, merge(RECIPE, content))


@pytest.mark.parametrize(
    "model,expected",
    [
        ("test_resnet", True),
        ("mobilenetv3_small_100", True),
        ("resnet50_gn", False),
        ("test_convnext", False),
    ],
)
def test_batch_norm_is_found(model, expected):
    config = TimmConfig(model=model, img_size=32)
    assert has_batch_norm(config.build()) == config.has_batch_norm == expected


def test_batch_norm_in_any_form():
    assert not ViTConfig().has_batch_norm and not has_batch_norm(ViTConfig(depth=1).build())
    assert has_batch_norm(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2))))
    assert has_batch_norm(nn.SyncBatchNorm(2)) and has_batch_norm(timm.layers.BatchNormAct2d(2))
    assert not has_batch_norm(nn.Sequential(nn.InstanceNorm2d(2), nn.GroupNorm(1, 2), nn.LayerNorm(2)))


@pytest.mark.parametrize("model", ["test_resnet", "mobilenetv3_small_100", "test_vit"])
def test_what_a_config_says_draws_nothing(model):
    """Initial weights must not depend on who asked for a width or a count before."""
    encoders_timm._skeleton.cache_clear()
    encoders_timm._counted.cache_clear()
    config, state = TimmConfig(model=model, img_size=32), torch.get_rng_state()
    assert config.flops_per_image() > 0 and config.has_batch_norm in (True, False)
    assert torch.equal(torch.get_rng_state(), state)
    assert config.embed_dim == config.build().embed_dim
