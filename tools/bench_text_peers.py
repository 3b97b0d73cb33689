"""The sides of bench_text.py: one architecture, as selfsup, transformers and nanoGPT build it, and one batch."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor, nn

from selfsup.attention.dispatch import AttentionName
from selfsup.batch import TextBatch
from selfsup.encoders.text import TextConfig
from selfsup.objectives.clm import CLMConfig
from selfsup.objectives.mlm import MLMConfig

Model = Literal["mlm-256", "mlm-512", "clm-128", "clm-384"]
Side = Literal["transformers-sdpa", "transformers-eager", "nanogpt", "selfsup"]
SIDES: dict[Side, str] = {
    "transformers-sdpa": "transformers, attention sdpa",
    "transformers-eager": "transformers, attention eager",
    "nanogpt": "nanoGPT",
    "selfsup": "selfsup",
}
IGNORED = -100
"""The label that transformers does not count."""
MASK_RATIO = 0.15


@dataclass(frozen=True)
class Shape:
    """The sizes of a contest. `str` is its name in the output."""

    task: Literal["mlm", "clm"]
    embed_dim: int
    depth: int
    num_heads: int
    length: int
    batch_size: int
    vocab_size: int

    def __str__(self) -> str:
        return (
            f"{self.embed_dim}/{self.depth}/{self.num_heads}, {self.batch_size} rows of {self.length} tokens, "
            f"vocabulary {self.vocab_size}"
        )

    @property
    def objective(self) -> MLMConfig | CLMConfig:
        """What selfsup trains."""
        return MLMConfig(mask_ratio=MASK_RATIO) if self.task == "mlm" else CLMConfig()

    def encoder(self, attention: AttentionName) -> TextConfig:
        """selfsup's encoder: BERT as published (with the erf form of GELU, transformers' default), or GPT-2."""
        sizes = {
            "vocab_size": self.vocab_size,
            "max_length": self.length,
            "embed_dim": self.embed_dim,
            "depth": self.depth,
            "num_heads": self.num_heads,
            "attention": attention,
        }
        if self.task == "clm":
            return TextConfig(**sizes, causal=True)
        return TextConfig(**sizes, post_norm=True, embed_norm=True, norm_eps=1e-12, token_types=2)


def shape_of(model: Model, vocab_size: int | None, batch_size: int | None) -> Shape:
    """The sizes of a model, of which two can be changed."""
    task, width = model.split("-")
    sizes = {"256": (4, 4, 128, 32), "512": (8, 8, 128, 32), "128": (4, 4, 64, 12), "384": (6, 6, 256, 64)}
    depth, heads, length, rows = sizes[width]
    vocabulary = 8192 if task == "mlm" else 65
    return Shape(task, int(width), depth, heads, length, batch_size or rows, vocab_size or vocabulary)


def takes_part(side: Side, model: Model, nanogpt: Path | None) -> bool:
    """nanoGPT has no masked language model, and is not there without a checkout."""
    return side != "nanogpt" or (nanogpt is not None and model.startswith("clm"))


def batches_of(shape: Shape, device: torch.device) -> tuple[tuple[Tensor, Tensor], TextBatch]:
    """One batch twice: (tokens, labels) as transformers and nanoGPT take them, and as selfsup does.

    Full rows of random tokens. mlm: BERT's count of random places in every row reads as the last token of
    the vocabulary. tokens, labels: int64 (b, l), labels not yet shifted for clm.
    """
    generator = torch.Generator().manual_seed(0)
    rows, length, zeros = shape.batch_size, shape.length, torch.zeros(shape.batch_size, dtype=torch.int64)
    tokens = torch.randint(5, shape.vocab_size, (rows, length + 1), generator=generator)
    if shape.task == "clm":
        read, where, labels = tokens[:, :-1].contiguous(), None, tokens[:, 1:].flatten()
        theirs = (read, tokens[:, 1:].contiguous())
    else:
        truth = tokens[:, :-1]
        targets = max(1, round(MASK_RATIO * length))
        chosen = torch.rand(rows, length, generator=generator).argsort(dim=1) < targets  # (b, l)
        read = torch.where(chosen, shape.vocab_size - 1, truth)
        where, labels = chosen.flatten().nonzero().flatten(), truth[chosen]
        theirs = (read, torch.where(chosen, truth, IGNORED))
    ours = TextBatch(read, labels, where, None, None, None, None, rows, 0, zeros, torch.arange(rows), zeros)
    return (theirs[0].to(device), theirs[1].to(device)), ours.to(device)


def build(side: Side, shape: Shape, attention: AttentionName, nanogpt: Path | None) -> nn.Module:
    """A module from a batch of its own side to the loss."""
    if side == "selfsup":
        return Ours(shape, attention)
    if side == "nanogpt":
        assert nanogpt is not None and shape.task == "clm"
        return NanoGPT(shape, nanogpt_model(nanogpt))
    kernel = side.removeprefix("transformers-")
    return BertMLM(shape, kernel) if shape.task == "mlm" else GPT2(shape, kernel)


class Ours(nn.Module):
    """selfsup's objective."""

    def __init__(self, shape: Shape, attention: AttentionName):
        super().__init__()
        self.objective = shape.objective.build(shape.encoder(attention))

    def forward(self, batch: TextBatch) -> Tensor:
        return self.objective(batch, float(batch.targets)).loss


class BertMLM(nn.Module):
    """transformers' BertForMaskedLM, which computes all scores and is told which to ignore."""

    def __init__(self, shape: Shape, kernel: str):
        super().__init__()
        from transformers import BertConfig, BertForMaskedLM

        config = BertConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.embed_dim,
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.num_heads,
            intermediate_size=4 * shape.embed_dim,
            max_position_embeddings=shape.length,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation=kernel,
        )
        self.model = BertForMaskedLM(config)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[1]).loss


class GPT2(nn.Module):
    """transformers' GPT2LMHeadModel, given labels that are shifted already, so that all have as many targets."""

    def __init__(self, shape: Shape, kernel: str):
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            vocab_size=shape.vocab_size,
            n_positions=shape.length,
            n_embd=shape.embed_dim,
            n_layer=shape.depth,
            n_head=shape.num_heads,
            activation_function="gelu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
            attn_implementation=kernel,
        )
        self.model = GPT2LMHeadModel(config)
        self.model.loss_type = "ForCausalLM"  # what it takes anyway, with a warning

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[1], shift_labels=batch[1]).loss


class NanoGPT(nn.Module):
    """nanoGPT's GPT, with biases as GPT-2 has them."""

    def __init__(self, shape: Shape, module: ModuleType):
        super().__init__()
        sizes = {"n_layer": shape.depth, "n_head": shape.num_heads, "n_embd": shape.embed_dim}
        config = module.GPTConfig(
            block_size=shape.length, vocab_size=shape.vocab_size, dropout=0.0, bias=True, **sizes
        )
        self.model = module.GPT(config)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.model(*batch)[1]


def nanogpt_model(checkout: Path) -> ModuleType:
    """nanoGPT's model.py, imported from a checkout."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks itself up
    spec.loader.exec_module(module)
    return module
