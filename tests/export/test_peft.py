"""LoRA adapters of peft on our encoder and on its timm export: they train, and merge without a trace."""

import pytest
import timm
import torch
from torch.nn import functional

from selfsup.checkpoint import load_encoder
from selfsup.export.timm import export_timm
from selfsup.layers.attention import Attention

peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def ours(run):
    return load_encoder(run)[0]


def in_timm(run):
    folder = run / "export" / "timm-step-7"
    if not folder.exists():
        export_timm(run)
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def adapted(model):
    """With random adapters on every qkv, instead of the usual that start as zero."""
    torch.manual_seed(0)
    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["qkv"], init_lora_weights=False)
    ).eval()


def without_gradient(model):
    """Names of the adapters that learn nothing."""
    images = IMAGES.clone().requires_grad_()  # so that there is a graph, whatever the model does
    model(images).square().sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 6 and all("lora_" in name for name in trained)  # A and B in each of 3 blocks
    return [name for name, gradient in trained.items() if gradient is None or not gradient.abs().max() > 0]


def same(a, b):
    return float((a - b).detach().abs().max()) <= 1e-5 * max(1.0, float(b.detach().abs().max()))


@pytest.mark.parametrize("load", [ours, in_timm])
def test_adapters_learn(make_run, load):
    run = make_run()
    model = adapted(load(run))
    assert not same(model(IMAGES), load(run)(IMAGES))
    assert without_gradient(model) == []


@pytest.mark.parametrize("load", [ours, in_timm])
def test_merged_layers_keep_the_outputs(make_run, load):
    model = adapted(load(make_run()))
    expected = model(IMAGES).detach()
    layers = [layer for layer in model.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)]
    for layer in layers:
        layer.merge()
    assert len(layers) == 3 and all(layer.merged for layer in layers)
    assert same(model(IMAGES), expected)


@pytest.mark.parametrize("load", [ours, in_timm])
def test_merged_and_unloaded(make_run, load):
    run = make_run()
    model = adapted(load(run))
    expected = model(IMAGES).detach()
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == load(run).state_dict().keys()
    assert same(merged(IMAGES), expected)


def test_adapters_are_saved_and_loaded(make_run, tmp_path):
    run = make_run()
    model = adapted(ours(run))
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    again = peft.PeftModel.from_pretrained(ours(run), tmp_path / "adapter").eval()
    assert torch.equal(model(IMAGES), again(IMAGES))


def test_an_attention_that_bypasses_the_layer_is_caught(make_run, monkeypatch):
    """functional.linear with qkv's weight gives the same numbers, and no adapter is heard."""
    original = Attention.forward

    def bypass(self, *arguments):
        layer = self.qkv
        layer.forward = lambda x: functional.linear(x, layer.weight, layer.bias)
        return original(self, *arguments)

    monkeypatch.setattr(Attention, "forward", bypass)
    assert len(without_gradient(adapted(ours(make_run())))) == 6
