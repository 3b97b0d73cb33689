"""An export proves itself: reloaded in the target library, its outputs are those of what was trained."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from selfsup.encoders import Encoder, EncoderConfig
from selfsup.encoders.vit import ViT, ViTConfig
from selfsup.objectives.mae import MAE, mae_loss, patchify
from selfsup.recipe import Recipe

# Relative to max(1, largest output). float32 leaves room for another order of sums; float64 is there
# because a LayerNorm epsilon of 1e-5 for 1e-6 moves outputs by 6e-6, which float32 must allow.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}

Outputs = tuple[Tensor, ...]


class Check(NamedTuple):
    """One comparison of the reloaded model with the trained one."""

    library: str
    """Name and version."""
    dtype: str
    """float32 or float64."""
    difference: float
    """Largest absolute difference over all outputs compared."""
    limit: float
    """What was allowed: a tolerance times max(1, largest output)."""

    @property
    def sentence(self) -> str:
        found = f"largest difference {self.difference:.1e} (limit {self.limit:.1e})"
        return f"{self.library}, {self.dtype}: {found}"


class Reloaded(NamedTuple):
    """An export as a target library loads it."""

    library: str
    """Name and version."""
    module: nn.Module
    """In eval mode, on the CPU, float32."""
    outputs: Callable[[Any, Tensor], Outputs]
    """(module, images or tokens) -> what is compared, in the order of our own."""


def compare(
    folder: Path,
    model: nn.Module,
    outputs: Callable[[Any, Tensor], Outputs],
    reloaded: list[Reloaded],
    inputs: Float[Tensor, "b c h w"] | Int[Tensor, "b n"],
) -> tuple[Check, ...]:
    """Compares the trained `model` (eval mode, CPU) with every reloaded one, in float32 and float64.

    outputs: (model, inputs) -> what is compared; inputs: images, or tokens. Matrix products at precision
    `highest`. `model` and the reloaded modules are left in float32. Raises ValueError where shapes differ or
    a difference exceeds TOLERANCE x max(1, largest output).
    """
    checks = []
    with _highest_precision(), torch.inference_mode():
        for dtype, tolerance in TOLERANCE.items():
            typed = inputs.to(dtype) if inputs.is_floating_point() else inputs
            ours = outputs(model.to(dtype), typed)
            model.float()  # before the next model is widened: a ViT-huge in float64 is 5 GB
            for library, module, their_outputs in reloaded:
                theirs = their_outputs(module.to(dtype), typed)
                module.float()
                checks.append(check_outputs(folder, library, ours, theirs, tolerance))
    return tuple(checks)


def check_outputs(folder: Path, library: str, ours: Outputs, theirs: Outputs, tolerance: float) -> Check:
    """The largest difference. Raises ValueError above tolerance x max(1, largest output), for NaN, and
    for other shapes."""
    largest = max(1.0, *(float(output.abs().max()) for output in ours))
    shapes = [[tuple(output.shape) for output in outputs] for outputs in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{folder}: {library} gives shapes {shapes[1]}, expected {shapes[0]}; NOT exported")
    differences = [float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)]
    difference = float(torch.tensor(differences, dtype=torch.float64).max())  # Python's max loses a NaN
    dtype = str(ours[0].dtype).removeprefix("torch.")
    check = Check(library, dtype, difference, tolerance * largest)
    if not difference <= check.limit:  # so that NaN fails too
        raise ValueError(f"{folder}: {check.sentence}: the reloaded model is another one; NOT exported")
    return check


def example_images(encoder: EncoderConfig) -> Float[Tensor, "2 c h w"]:
    """Two fixed random images, as if normalised: float32 from N(0, 1)."""
    shape = (2, encoder.in_chans, encoder.img_size, encoder.img_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def example_pixels(recipe: Recipe) -> tuple[UInt8[np.ndarray, "h w c"], Float[Tensor, "1 c h w"]]:
    """A fixed random image of the native size, and the input that our formula makes of it: float32."""
    encoder, data = recipe.encoder, recipe.data
    shape = (encoder.img_size, encoder.img_size, encoder.in_chans)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    scaled = (pixels / 255 - np.array(data.mean)) / np.array(data.std)
    return pixels, torch.from_numpy(rearrange(scaled, "h w c -> 1 c h w")).float()


def example_noise(encoder: ViTConfig) -> Float[Tensor, "2 n"]:
    """Fixed masking noise for two images: a permutation each, so that no sort can break ties otherwise."""
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(encoder.num_patches, generator=generator).float() for _ in range(2)])


def encoder_outputs(encoder: Encoder, images: Float[Tensor, "b c h w"]) -> Outputs:
    """(what the encoder has before its pooling: all tokens (b, m, d) or a map; pooled features (b, d))."""
    tokens = encoder.forward_features(images)
    return tokens, encoder.pool(tokens) if isinstance(encoder, ViT) else encoder(images)


def mae_outputs(model: MAE, images: Float[Tensor, "b c h w"], noise: Float[Tensor, "b n"]) -> Outputs:
    """(predicted patches (b, n, p), mask (b, n) with 1 = removed, mean loss over the images ())."""
    pred, mask = model.predict(images, noise)
    target = patchify(images, model.encoder.config.patch_size)
    return pred, mask, mae_loss(pred, target, mask, model.config.norm_pix_loss).mean()


def expect_mae(to: str, objective: nn.Module, recipe: Recipe) -> None:
    """Raises ValueError where the objective is another than masked autoencoding."""
    if not isinstance(objective, MAE):
        others = {"vit": "--to timm or --to hf", "text": "--to hf"}.get(recipe.encoder.name, "--to timm")
        raise ValueError(
            f"--to {to}: expected objective.name mae, got {recipe.objective.name}; NOT exported, export its "
            f"encoder with {others}"
        )


def reload_in(folder: Path, library: str, load: Callable[[], Any]) -> Any:
    """`load()`, with whatever the library raises as one ValueError."""
    try:
        return load()
    except Exception as error:  # libraries raise anything for a folder that does not fit
        message = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{folder}: {library} does not load it: {message}; NOT exported") from error


def expect_same_names(folder: Path, library: str, saved: dict[str, Tensor], module: nn.Module) -> None:
    """Raises ValueError where the saved tensors are not those of the library's module, name and shape.

    For libraries that resize what does not fit, or only log what is missing.
    """
    has = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    wants = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    expect_no_keys(folder, library, "missing", [name for name in wants if name not in has])
    expect_no_keys(folder, library, "unexpected", [name for name in has if name not in wants])
    expect_no_keys(folder, library, "wrongly shaped", [name for name in wants if has[name] != wants[name]])


def load_strictly(folder: Path, library: str, saved: dict[str, Tensor], module: nn.Module) -> nn.Module:
    """The library's module with the saved tensors, in eval mode. Raises ValueError for names or shapes
    that differ."""
    expect_same_names(folder, library, saved, module)
    module.load_state_dict(saved)
    return module.eval()


def expect_no_keys(folder: Path, library: str, kind: str, names: list[str]) -> None:
    """Raises ValueError naming the first of `names`, weights that are missing, unexpected or the like."""
    if names:
        raise ValueError(
            f"{folder}: {library} finds {len(names)} {kind} weights, first {names[0]}; NOT exported"
        )


@contextmanager
def _highest_precision() -> Iterator[None]:
    """Full float32 matrix products inside; the setting before is put back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bar or advice from transformers inside; its settings are put back."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
