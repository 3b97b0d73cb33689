"""Causal language modelling (Radford et al. 2019, GPT-2): predict each token from those before it."""

from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from selfsup import flops
from selfsup.batch import TextBatch
from selfsup.config import Section
from selfsup.data.tokenizer import TextTokenizer
from selfsup.encoders import AnyEncoderConfig
from selfsup.encoders.text import TextConfig, init_normal
from selfsup.layers.cross_entropy import linear_cross_entropy
from selfsup.objectives.base import Objective, Output, global_mean
from selfsup.objectives.blanks import blanks_table, pick_targets


class CLMConfig(Section):
    """Causal language modelling of text."""

    reads: ClassVar[str] = "text"
    views: ClassVar[int] = 1
    accumulates: ClassVar[bool] = True
    next_token: ClassVar[bool] = True
    wrap: ClassVar[Literal["bert", "gpt"]] = "gpt"

    name: Literal["clm"] = "clm"
    tied: bool = True
    """Predict with the token embeddings (GPT-2); false: with weights of their own (Llama)."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared log-denominator (PaLM: 1e-4), which keeps scores from drifting; 0: none."""
    chunk: Annotated[int, Field(ge=1)] | None = None
    """Predictions whose logits are held at a time; none: as many as take 16 MiB."""

    def masking(self, steps: int) -> None:
        """Nothing is masked."""

    def check(self, encoder: AnyEncoderConfig) -> None:
        """Raises ValueError where the encoder does not fit."""
        assert isinstance(encoder, TextConfig)
        if not encoder.causal:
            raise ValueError("encoder.causal: expected true, clm may not see the token it predicts, got false")
        if encoder.pool == "cls":
            raise ValueError(
                "encoder.pool: expected mean or last, the first token of a causal encoder sees no other, got cls"
            )

    def build(self, encoder: TextConfig) -> "CLM":
        """The objective around a fresh encoder."""
        return CLM(self, encoder)


class CLM(Objective):
    """Causal encoder, scores of the vocabulary at every place."""

    projector = None

    def __init__(self, config: CLMConfig, encoder: TextConfig):
        super().__init__()
        self.config = config
        self.encoder = encoder.build()
        self.decoder = None if config.tied else nn.Linear(encoder.embed_dim, encoder.vocab_size, bias=False)
        if self.decoder is not None:
            init_normal(self.decoder.weight, encoder.init_std, truncated=encoder.init == "bert")

    def forward(self, batch: TextBatch, total: float) -> Output:
        states = self.encoder.encode(batch).flatten(0, 1)  # (b * l, d)
        states = states if batch.where is None else states[batch.where]  # (t, d)
        config = self.config
        loss, nll = linear_cross_entropy(
            states, self.word_weights, None, batch.labels, config.chunk, config.z_loss
        )
        metrics = {"nll": global_mean(nll, total)} if config.z_loss else {}
        return Output(global_mean(loss, total), metrics)

    @property
    def readouts(self) -> tuple[nn.Module, ...]:
        return (self.encoder.last_norm if self.decoder is None else self.decoder,)

    @property
    def word_weights(self) -> Float[Tensor, "v d"]:
        """The vocabulary's weights: the encoder's embeddings, or the head's own."""
        return self.encoder.word_weights if self.decoder is None else self.decoder.weight

    def logits(self, states: Float[Tensor, "*b d"]) -> Float[Tensor, "*b v"]:
        """Scores of the whole vocabulary for the token after each state."""
        return F.linear(states, self.word_weights)

    @torch.no_grad()
    def shown(self, batch: TextBatch, tokenizer: TextTokenizer) -> str:
        """The next token at places of the first four rows: truth and guesses."""
        where = batch.where
        if where is None:
            where = torch.arange(batch.tokens.numel(), device=batch.tokens.device)
        picked = pick_targets(where, batch.tokens.shape[1], 4, 4)
        training = self.training
        states = self.eval().encoder.encode(batch).flatten(0, 1)[where[picked]]
        logits = self.logits(states)
        self.train(training)
        # A row of one more column: the blank stands behind the token that was read last.
        tokens = torch.cat([batch.tokens, batch.tokens[:, :1]], dim=1)  # (b, l + 1)
        places = where[picked] + torch.div(where[picked], batch.tokens.shape[1], rounding_mode="floor") + 1
        return blanks_table(tokens, places, batch.labels[picked], logits, tokenizer, after=False)

    def flops_per_sample(self) -> float:
        """Of a full row."""
        encoder = self.encoder.config
        head = flops.linear(encoder.max_length, encoder.embed_dim, encoder.vocab_size)
        return 3 * (encoder.flops_per_row() + head)
