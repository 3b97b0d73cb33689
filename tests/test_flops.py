"""FLOPs of encoders and text objectives: closed forms against torch's counter, that against a sum over the layers."""

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from selfsup import flops
from selfsup.encoders.timm import TimmConfig
from selfsup.encoders.vit import ViTConfig
from selfsup.objectives.mae import MAEConfig
from text_runs import batch_of, build, masked

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3}
FORMS = [
    {},
    {"frozen_patch_embed": True},
    {"class_token": False, "pool": "mean", "in_chans": 1, "frozen_patch_embed": True},
    {"reg_tokens": 3, "pos_embed": "rope", "mlp_ratio": 2.7, "pre_norm": True, "layer_scale": 0.1},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_vit_closed_form_equals_the_counter(form):
    config = ViTConfig(**SMALL, **form)
    with torch.device("meta"):
        counted = flops.counted(config.build(), 16, config.in_chans)
    assert config.flops_per_image() == counted.forward
    assert config.training_flops() == counted.training


def test_a_frozen_projection_costs_mae_no_gradient_either():
    mae = MAEConfig(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    free, frozen = (mae.build(ViTConfig(**SMALL, frozen_patch_embed=f)) for f in (False, True))
    assert free.flops_per_sample() - frozen.flops_per_sample() == flops.linear(16, 3 * 16, 48)


def by_layer(module: nn.Module, images: torch.Tensor) -> float:
    """Two for each multiply-add, as every convolution and linear layer ran: an account of its own."""
    found = []

    def note(layer, inputs, output):
        if isinstance(layer, nn.Conv2d):
            each = layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
            found.append(2 * output[0].numel() * each)
        elif isinstance(layer, nn.Linear):
            found.append(2 * output[0].numel() * layer.in_features)

    for layer in module.modules():
        layer.register_forward_hook(note)
    with torch.no_grad():
        module.eval()(images)
    return sum(found)


@pytest.mark.parametrize(
    "options",
    [
        {"model": "resnet18", "stem": "cifar"},
        {"model": "resnet18"},
        {"model": "test_resnet", "in_chans": 1},
        {"model": "mobilenetv3_small_100"},  # grouped convolutions
        {"model": "test_convnext"},
    ],
    ids=str,
)
def test_convolutions_equal_a_sum_over_the_layers(options):
    config = TimmConfig(**options, img_size=32)
    images = torch.randn(1, config.in_chans, 32, 32)
    assert config.flops_per_image() == by_layer(config.build(), images)


def test_published_numbers():
    """0.56 billion multiply-adds of the CIFAR ResNet-18, 4.1 of ResNet-50 at 224 px."""
    assert TimmConfig(model="resnet18", img_size=32, stem="cifar").flops_per_image() == pytest.approx(
        1.11e9, rel=0.01
    )
    assert TimmConfig(model="resnet50").flops_per_image() == pytest.approx(2 * 4.09e9, rel=0.01)


def test_a_vit_of_timm_costs_what_ours_does():
    theirs = TimmConfig(model="vit_tiny_patch16_224", img_size=32)
    ours = ViTConfig(img_size=32)
    assert theirs.flops_per_image() == ours.flops_per_image()
    assert theirs.training_flops() == ours.training_flops()


@pytest.mark.parametrize("model", ["test_resnet", "test_vit"])
def test_training_equals_a_real_backward_pass(model):
    config = TimmConfig(model=model, img_size=32)
    module = timm.create_model(model, num_classes=0, **({"img_size": 32} if "vit" in model else {})).eval()
    for layer in module.modules():
        if hasattr(layer, "fused_attn"):
            layer.fused_attn = False
    with FlopCounterMode(display=False) as counter:
        module(torch.randn(1, 3, 32, 32)).sum().backward()
    assert config.training_flops() == counter.get_total_flops()
    assert config.flops_per_image() * 2 < config.training_flops() < config.flops_per_image() * 3


def test_linears_of_a_head():
    head = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3, bias=False))
    with FlopCounterMode(display=False) as counter:
        head(torch.randn(4, 7))
    assert 4 * flops.linears(head) == counter.get_total_flops()


def test_only_the_meta_device_is_counted_on():
    with pytest.raises(AssertionError, match="meta"):
        flops.counted(nn.Conv2d(3, 4, 3), 8, 3)


TEXT_FORMS = [
    {},
    {"post_norm": True, "embed_norm": True, "token_types": 2, "hidden_dim": 40},
    {"positions": "rope", "activation": "swiglu", "num_kv_heads": 1, "norm": "rms", "bias": False},
    {"positions": "rope", "activation": "geglu", "embed_norm": True, "bias": False},
    {"positions": "alibi", "vocab_size": 300},
]


def counted_training(objective, batch) -> float:
    """Forward and backward of one sample by torch's counter, which sees into the chunked head."""
    with FlopCounterMode(display=False) as counter:
        objective(batch, float(batch.targets)).loss.backward()
    return counter.get_total_flops() / len(batch.tokens)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", TEXT_FORMS, ids=str)
def test_text_objectives_equal_a_real_forward_and_backward_pass(form, tied):
    """Rows of 20 tokens, 3 of them masked: a share of 0.15."""
    tokens = torch.randint(5, 70, (2, 20))
    mlm, clm = (build(name, form, tied=tied) for name in ("mlm", "clm"))
    assert mlm.flops_per_sample() == pytest.approx(counted_training(mlm, masked([3, 3])), rel=1e-12)
    assert clm.flops_per_sample() == counted_training(clm, batch_of(tokens, tokens.flatten(), None))


def test_next_sentence_is_counted():
    objective = build("mlm", {"token_types": 2}, next_sentence=True)
    batch = masked([3, 3], token_types=torch.zeros(2, 20).long(), random_next=torch.tensor([0, 1]))
    assert objective.flops_per_sample() == pytest.approx(counted_training(objective, batch), rel=1e-12)
    without = build("mlm", {"token_types": 2}).flops_per_sample()
    assert objective.flops_per_sample() - without == pytest.approx(3 * 2 * (16 * 16 + 16 * 2))
