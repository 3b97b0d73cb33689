"""Masked language modelling (Devlin et al. 2019, "BERT", sec. 3.1 and appendix A).

Some tokens of a row are chosen; most of them are replaced by [MASK], some by a random token, some left; the
model predicts what stood there. The loader chooses (data/mask_tokens.py), the head sees the chosen places only.
"""

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from selfsup import dist, flops
from selfsup.batch import TextBatch
from selfsup.config import Section
from selfsup.data.mask_tokens import Masking
from selfsup.data.tokenizer import TextTokenizer
from selfsup.encoders import AnyEncoderConfig
from selfsup.encoders.text import TextConfig, TextEncoder, init_normal
from selfsup.layers.block import norm_module
from selfsup.layers.cross_entropy import linear_cross_entropy
from selfsup.objectives.base import Objective, Output, global_mean
from selfsup.objectives.blanks import blanks_table, pick_targets

Ratio = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class MLMConfig(Section):
    """Masked language modelling of text."""

    reads: ClassVar[str] = "text"
    views: ClassVar[int] = 1
    accumulates: ClassVar[bool] = True
    next_token: ClassVar[bool] = False
    wrap: ClassVar[Literal["bert", "gpt"]] = "bert"

    name: Literal["mlm"] = "mlm"
    mask_ratio: Ratio = 0.15
    """Share of a row's tokens chosen to be predicted."""
    final_mask_ratio: Ratio | None = None
    """The share at the last step, reached in a straight line; none: the same throughout."""
    mask_share: Share = 0.8
    """Share of the chosen tokens replaced by [MASK]."""
    random_share: Share = 0.1
    """Share of the chosen tokens replaced by a random one of the whole vocabulary; the rest is left as it is."""
    whole_word: bool = False
    """Choose all tokens of a word, or none."""
    next_sentence: bool = False
    """Predict also whether the second segment follows the first (BERT's second task); wants data.packing pairs."""
    tied: bool = True
    """Predict with the token embeddings; false: with weights of their own."""
    chunk: Annotated[int, Field(ge=1)] | None = None
    """Predictions whose logits are held at a time; none: as many as take 16 MiB."""

    @model_validator(mode="after")
    def _shares(self) -> "MLMConfig":
        if self.mask_share + self.random_share > 1 + 1e-9:
            raise ValueError(
                f"random_share: expected at most {1 - self.mask_share:g}, what mask_share leaves, got "
                f"{self.random_share:g}"
            )
        return self

    def masking(self, steps: int) -> Masking:
        """How the loader of a run of so many steps chooses and replaces."""
        last = self.mask_ratio if self.final_mask_ratio is None else self.final_mask_ratio
        return Masking(self.mask_ratio, last, steps, self.whole_word, self.mask_share, self.random_share)

    def check(self, encoder: AnyEncoderConfig) -> None:
        """Raises ValueError where the encoder does not fit."""
        assert isinstance(encoder, TextConfig)
        if encoder.causal:
            raise ValueError("encoder.causal: expected false, mlm predicts a token from both sides, got true")
        if self.next_sentence and encoder.token_types < 2:
            raise ValueError(
                f"encoder.token_types: expected at least 2, which objective.next_sentence tells segments apart by, "
                f"got {encoder.token_types}"
            )

    def build(self, encoder: TextConfig) -> "MLM":
        """The objective around a fresh encoder."""
        return MLM(self, encoder)


class MLMHead(nn.Module):
    """dense, GELU, norm; then one score a token of the vocabulary (google-research/bert, get_masked_lm_output).

    dense and norm have biases where the encoder's layers have; the scores always."""

    def __init__(self, config: MLMConfig, encoder: TextConfig):
        super().__init__()
        dim = encoder.embed_dim
        self.dense = nn.Linear(dim, dim, bias=encoder.bias)
        self.act = nn.GELU(approximate="tanh" if encoder.activation == "gelu_tanh" else "none")
        self.norm = norm_module(encoder.norm, dim, encoder.norm_eps, encoder.bias)
        self.decoder = None if config.tied else nn.Linear(dim, encoder.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(encoder.vocab_size))
        for layer in (self.dense, self.decoder):
            if layer is not None:
                init_normal(layer.weight, encoder.init_std, truncated=encoder.init == "bert")
        if self.dense.bias is not None:
            nn.init.zeros_(self.dense.bias)

    def forward(self, states: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """What is multiplied by the vocabulary's weights."""
        # Under autocast the GELU's output is narrow; torch's RMSNorm wants its input in the weights' type.
        return self.norm(self.act(self.dense(states)).to(self.bias.dtype))


class MLM(Objective):
    """Encoder, head over the chosen places, and BERT's next-sentence head where asked for."""

    projector = None

    def __init__(self, config: MLMConfig, encoder: TextConfig):
        super().__init__()
        self.config = config
        self.encoder = encoder.build()
        self.head = MLMHead(config, encoder)
        self.next_sentence = NextSentence(self.encoder) if config.next_sentence else None

    def forward(self, batch: TextBatch, total: float) -> Output:
        states = self.encoder.encode(batch)  # (b, l, d)
        assert batch.where is not None, "masked rows say where their targets are"
        chosen = states.flatten(0, 1)[batch.where]  # (t, d)
        nll, _ = linear_cross_entropy(
            self.head(chosen), self.word_weights, self.head.bias, batch.labels, self.config.chunk
        )
        loss = global_mean(nll, total)
        if self.next_sentence is None:
            return Output(loss, {})
        assert batch.random_next is not None, "recipe: next_sentence has packing pairs"
        scores = self.next_sentence(states[:, 0])  # (b, 2)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        pairs = F.cross_entropy(scores, batch.random_next, reduction="sum")
        pairs = pairs * (dist.world_size() / batch.global_batch)
        metrics = {"mlm_loss": loss.detach(), "next_sentence_loss": pairs.detach()}
        return Output(loss + pairs, metrics)

    @property
    def readouts(self) -> tuple[nn.Module, ...]:
        words = self.head.norm if self.head.decoder is None else self.head.decoder
        return (words,) if self.next_sentence is None else (words, self.next_sentence.score)

    @property
    def word_weights(self) -> Float[Tensor, "v d"]:
        """The vocabulary's weights: the encoder's embeddings, or the head's own."""
        return self.encoder.word_weights if self.head.decoder is None else self.head.decoder.weight

    def logits(self, batch: TextBatch) -> Float[Tensor, "t v"]:
        """Scores of the whole vocabulary at the batch's targets; (b * l, v) where it names no places."""
        states = self.encoder.encode(batch).flatten(0, 1)  # (b * l, d)
        states = states if batch.where is None else states[batch.where]
        return F.linear(self.head(states), self.word_weights, self.head.bias)

    @torch.no_grad()
    def shown(self, batch: TextBatch, tokenizer: TextTokenizer) -> str:
        """Blanks of the first four rows: truth and guesses."""
        assert batch.where is not None
        picked = pick_targets(batch.where, batch.tokens.shape[1], 4, 3)
        training = self.training
        logits = self.eval().logits(batch._replace(where=batch.where[picked]))
        self.train(training)
        return blanks_table(batch.tokens, batch.where[picked], batch.labels[picked], logits, tokenizer)

    def flops_per_sample(self) -> float:
        """Of a full row, at the first mask ratio."""
        encoder, dim = self.encoder.config, self.encoder.embed_dim
        targets = encoder.max_length * self.config.mask_ratio
        head = 2.0 * targets * dim * (dim + encoder.vocab_size)
        pairs = 0.0 if self.next_sentence is None else flops.linears(self.next_sentence)
        return 3 * (encoder.flops_per_row() + head + pairs)


class NextSentence(nn.Module):
    """[CLS] through a dense layer and tanh to two scores: 0 it follows, 1 it is of another document."""

    def __init__(self, encoder: TextEncoder):
        super().__init__()
        self.dense = nn.Linear(encoder.embed_dim, encoder.embed_dim)
        self.score = nn.Linear(encoder.embed_dim, 2)
        for layer in (self.dense, self.score):
            init_normal(layer.weight, encoder.config.init_std, truncated=encoder.config.init == "bert")
            nn.init.zeros_(layer.bias)

    def forward(self, cls: Float[Tensor, "b d"]) -> Float[Tensor, "b 2"]:
        return self.score(torch.tanh(self.dense(cls)))
