"""One doorway to frozen encoders: our runs, timm's and Hugging Face's models, by folder or name.

Weights are read from safetensors only, and code from a model repository is never run.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selfsup.checkpoint import Weights, load_encoder
from selfsup.export.frozen import FrozenEncoder, as_tokens, freeze, from_encoder, timm_patches, timm_pooling
from selfsup.export.timm import CIFAR_STEM, cifar_model
from selfsup.export.verify import quiet_transformers

ACCEPTED = (
    "a run folder or checkpoint of selfsup, a timm-format folder (config.json with architecture), a Hugging "
    "Face folder (config.json with model_type), timm:NAME or a timm model name, hf:NAME"
)


_LOOKS = {"mlm": "fill", "clm": "generate"}


class _Input(NamedTuple):
    img_size: int
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_frozen(source: str, weights: Weights = "trained") -> FrozenEncoder:
    """The encoder that `source` names.

    source: see ACCEPTED. A folder wins over a name. Names without a folder are fetched by timm or
    transformers from the Hugging Face Hub, or taken from their cache. weights: of a run; averaged ones and
    a target network's are had only of a run that keeps them.
    Raises ValueError for anything else, for weights that are not safetensors, for missing weights,
    and with the library's message where it cannot load (no network, no such name).
    """
    folder = Path(source)
    if (folder / "manifest.json").exists() or (folder / "checkpoints").is_dir():
        return _from_run(source, folder, weights)
    if weights != "trained":
        raise ValueError(
            f"--weights {weights}: {source!r} is no run of selfsup, which alone keeps such weights; leave it out"
        )
    if folder.is_dir():
        return _from_folder(source, folder)
    kind, colon, name = source.partition(":")
    if colon and kind == "timm" and name:
        return _from_timm_hub(source, name)
    if colon and kind == "hf" and name:
        return _from_transformers(source, name)
    if not colon and source and not set(source) & set("/\\") and _is_timm_name(source):
        return _from_timm_hub(source, source)
    raise ValueError(f"{source!r}: no such folder, and no known model name; expected {ACCEPTED}")


def _from_folder(source: str, folder: Path) -> FrozenEncoder:
    try:
        config = json.loads((folder / "config.json").read_text())
    except OSError:
        raise ValueError(
            f"{source}: neither a checkpoint nor a config.json in this folder; expected {ACCEPTED}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{source}: config.json is not JSON: {error}") from None
    if not isinstance(config, dict) or not {"model_type", "architecture"} & set(config):
        raise ValueError(
            f"{source}: config.json has neither model_type nor architecture; expected {ACCEPTED}"
        )
    names = ("model.safetensors", "model.safetensors.index.json")
    if not any((folder / name).exists() for name in names):
        raise ValueError(f"{source}: no model.safetensors in this folder; selfsup reads no pickled weights")
    if "model_type" in config:
        return _from_transformers(source, str(folder))
    if CIFAR_STEM.items() <= config.items():
        return _frozen_timm(source, _or_one_line(source, lambda: cifar_model(folder)))
    return _from_timm(source, f"local-dir:{folder}", None)


def _from_run(source: str, folder: Path, weights: Weights) -> FrozenEncoder:
    encoder, recipe, checkpoint, notes = load_encoder(folder, weights)
    if recipe.encoder.reads == "text":
        raise ValueError(
            f"{source}: a run of text (objective {recipe.objective.name}), expected images; for text: selfsup probe "
            f"text, probe text-finetune, probe perplexity, {_LOOKS[recipe.objective.name]}"
        )
    frozen = from_encoder(encoder, recipe, source)
    return replace(frozen, checkpoint=checkpoint, notes=tuple(notes), weights=weights)


def _is_timm_name(name: str) -> bool:
    import timm

    return timm.is_model(name)  # with or without a tag


def _from_timm_hub(source: str, name: str) -> FrozenEncoder:
    import timm

    if not timm.is_model(name):
        raise ValueError(f"{source}: timm {timm.__version__} has no model {name!r}; see timm.list_models()")
    config = timm.get_pretrained_cfg(name)
    filename = (config and config.hf_hub_filename) or "model.safetensors"
    if config is None or not config.hf_hub_id or not filename.endswith(".safetensors"):
        raise ValueError(f"{source}: timm knows no safetensors weights for it; selfsup reads no pickled ones")
    # A file name pins the format: without one timm falls back to a pickle in silence.
    return _from_timm(source, name, {"hf_hub_filename": filename})


def _from_timm(source: str, name: str, overlay: dict[str, Any] | None) -> FrozenEncoder:
    """name: as timm.create_model takes it."""
    import timm

    # Created with the head it was saved with, because timm loads strictly only then: asked for
    # num_classes=0 it would drop a norm that does not fit, and only warn. The head goes after.
    module = _or_one_line(
        source, lambda: timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    )
    module.reset_classifier(0)
    return _frozen_timm(source, module)


def _frozen_timm(source: str, module: Any) -> FrozenEncoder:
    """timm's model without a head, fed as its pretrained_cfg says."""
    import timm

    data = timm.data.resolve_model_data_config(module)
    in_chans, height, width = data["input_size"]
    if height != width:
        raise ValueError(f"{source}: expected a square input, got {height}x{width}")
    return FrozenEncoder(
        name=source,
        module=freeze(module),
        img_size=height,
        in_chans=in_chans,
        mean=tuple(map(float, data["mean"])),
        std=tuple(map(float, data["std"])),
        describe=f"timm {module.pretrained_cfg.get('architecture') or source}, {timm_pooling(module)}",
        pooled=module,
        patches=lambda images: timm_patches(module, images),
    )


def _from_transformers(source: str, name: str) -> FrozenEncoder:
    """name: folder or Hub name, as transformers takes it."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ValueError(f'{source}: {error}; install it with pip install "selfsup[hf]"') from None
    with quiet_transformers():
        module, info = _or_one_line(
            source,
            lambda: transformers.AutoModel.from_pretrained(
                name, output_loading_info=True, use_safetensors=True, trust_remote_code=False
            ),
        )
        processor = _or_one_line(
            source, lambda: transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        )
    # A checkpoint without a pooler gets a random one, which we do not use.
    missing = sorted(key for key in map(str, info["missing_keys"]) if "pooler" not in key)
    wrong = missing + sorted(map(str, info["mismatched_keys"]))
    if wrong:
        raise ValueError(
            f"{source}: transformers finds {len(wrong)} weights missing or misfit, first {wrong[0]}"
        )
    kind = module.config.model_type
    pooled, patches, pooling = _transformers_outputs(module, kind)
    image = _transformers_input(source, module.config, processor)
    describe = f"transformers {kind}, {pooling}"
    return FrozenEncoder(source, freeze(module), *image, describe=describe, pooled=pooled, patches=patches)


def _transformers_outputs(
    module: Any, kind: str
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], str]:
    """The feature of a transformers model, its patch tokens, and the feature's name.

    timm's models pool themselves. Elsewhere `pooler_output` is often a layer trained for another
    task, or a random one, so tokens after the last norm are pooled here: the class token where
    there is one, else their mean. Convolutional maps (b, d, h, w) are averaged over positions.
    """
    if kind == "timm_wrapper":
        inner, pooled = module.timm_model, lambda images: module(images).pooler_output
        return pooled, lambda images: timm_patches(inner, images), "timm's pooling"

    def last(images: Tensor) -> Tensor:
        if kind == "vit_mae":
            return _unmasked(module, images)
        return as_tokens(module(images).last_hidden_state)

    tokens = ("cls_token", "distillation_token", "register_tokens")  # (1, count, d); before the patches
    extra = {name: p.shape[1] for name, p in module.named_parameters() if name.endswith(tokens)}
    if any(name.endswith("cls_token") for name in extra):
        prefix = sum(extra.values())
        pooling = "class token of last_hidden_state" + (", no mask" if kind == "vit_mae" else "")
        return lambda images: last(images)[:, 0], lambda images: last(images)[:, prefix:], pooling
    return lambda images: last(images).mean(dim=1), last, "mean of last_hidden_state over positions"


def _unmasked(module: Any, images: Tensor) -> Tensor:
    """transformers' ViTMAEModel hides and shuffles patches at random in eval mode too; not here."""
    module.config.mask_ratio = 0.0
    patches = module.embeddings.patch_embeddings.num_patches
    order = torch.arange(patches, dtype=torch.float32, device=images.device).expand(len(images), -1)
    return module(images, noise=order).last_hidden_state


def _transformers_input(source: str, config: Any, processor: Any) -> _Input:
    """Image size, channels and normalisation. Raises ValueError where the model does not say."""
    data = getattr(processor, "data_config", None)  # timm's models
    if data is not None:
        in_chans, height, width = data["input_size"]
        mean, std = data["mean"], data["std"]
    else:
        in_chans = getattr(config, "num_channels", 3)
        size = getattr(config, "image_size", None) or _processor_size(processor)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        factor = getattr(processor, "rescale_factor", 1 / 255)
        if getattr(processor, "do_rescale", True) and abs(factor * 255 - 1) > 1e-3:
            raise ValueError(f"{source}: expected pixels scaled by 1/255, it asks for {factor}")
        normalises = getattr(processor, "do_normalize", False)
        mean = processor.image_mean if normalises else [0.0] * in_chans
        std = processor.image_std if normalises else [1.0] * in_chans
    if height is None or height != width:
        raise ValueError(f"{source}: expected a model with a square input size, got {height} x {width}")
    return _Input(int(height), int(in_chans), tuple(map(float, mean)), tuple(map(float, std)))


def _processor_size(processor: Any) -> tuple[int | None, int | None]:
    """(height, width) of what an image processor puts out: its crop, else its size."""
    crops = getattr(processor, "do_center_crop", False) and getattr(processor, "crop_size", None)
    size = dict(crops or getattr(processor, "size", None) or {})
    edge = size.get("shortest_edge")
    return size.get("height") or edge, size.get("width") or edge


def _or_one_line(source: str, load: Callable[[], Any]) -> Any:
    """`load()`, with whatever the library raises (no network, no such name, misfit) as one line."""
    try:
        return load()
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{source}: cannot load it: {message}") from error
