"""The transformer over tokens: BERT's form and the modern one, causal or not, of the blocks that images use.

BERT (Devlin et al. 2019): post_norm, embed_norm, learned positions, token_types 2. GPT-2: pre-norm, learned
positions, causal. Llama: norm rms, positions rope, activation swiglu, num_kv_heads, no bias, causal. ModernBERT
(Warner et al. 2024) with every layer global: pre-norm, embed_norm, positions rope, activation geglu, no bias.
"""

from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from selfsup import flops
from selfsup.attention.dispatch import AttentionName
from selfsup.batch import TextBatch
from selfsup.config import Section
from selfsup.layers.attention import LayerCache, Scope
from selfsup.layers.block import GATED, ActivationName, Block, BlockOptions, NormName, norm_module
from selfsup.layers.rope import Rotation, alibi_slopes, rotation_1d

VOCAB_MULTIPLE = 64
"""The rows of the token embedding are rounded up to this; those beyond the vocabulary are never predicted."""


class TextConfig(Section):
    """A transformer over tokens. embed_dim/depth/num_heads: tiny 128/2/2, mini 256/4/4, small 512/4/8,
    medium 512/8/8, base 768/12/12, large 1024/24/16."""

    reads: ClassVar[str] = "text"
    has_batch_norm: ClassVar[bool] = False

    name: Literal["text"] = "text"
    vocab_size: Annotated[int, Field(ge=1)] = 8192
    """Tokens of the tokenizer."""
    max_length: Annotated[int, Field(ge=2)] = 128
    """Tokens of a row."""
    embed_dim: Annotated[int, Field(ge=2)] = 256
    """Width of a token."""
    depth: Annotated[int, Field(ge=1)] = 4
    """Number of blocks."""
    num_heads: Annotated[int, Field(ge=1)] = 4
    """Attention heads; divides embed_dim."""
    num_kv_heads: Annotated[int, Field(ge=1)] | None = None
    """Heads of keys and values, each for a group of heads (grouped-query attention); none: num_heads."""
    hidden_dim: Annotated[int, Field(ge=1)] | None = None
    """Hidden width of the MLP; none: 4 * embed_dim, with swiglu and geglu 2/3 of that rounded up to a multiple of
    64."""
    causal: bool = False
    """A token sees only itself and those before it."""
    post_norm: bool = False
    """Norms behind the residual sums (BERT), not before the branches."""
    embed_norm: bool = False
    """A norm over the embeddings (BERT, ModernBERT). Without post_norm the first block then has no norm before its
    attention, as in ModernBERT: what it reads is normed already."""
    norm: NormName = "layer"
    """LayerNorm, or RMSNorm."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Epsilon of every norm; BERT's is 1e-12."""
    positions: Literal["learned", "rope", "alibi", "none"] = "learned"
    """Learned vectors; rotary (Su et al. 2021); a penalty on distance (Press et al. 2022); or none."""
    rope_base: Annotated[float, Field(gt=1)] = 10000.0
    """Base of the rotary frequencies."""
    token_types: Annotated[int, Field(ge=0)] = 0
    """Learned vectors that tell segments apart: 2 in BERT, 0 for none."""
    activation: ActivationName = "gelu"
    """Of the MLP: gelu (erf), gelu_tanh (BERT's and GPT-2's own code), quick_gelu; gated: swiglu, geglu (erf)."""
    bias: bool = True
    """Biases in linear layers and norms."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of embeddings, attention weights and branches; 0.1 in BERT and GPT-2."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the initial weights."""
    init: Literal["gpt2", "bert"] = "gpt2"
    """gpt2: normal, the residual branches' last layers smaller by sqrt(2 * depth); bert: normal, cut at 2 sigma."""
    pool: Literal["mean", "cls", "last"] = "mean"
    """What a feature is: the mean over the text's tokens, its first, or its last; after the last norm."""
    attention: AttentionName = "reference"
    """Attention kernel: our own (reference; tiled: O(l) memory), torch's (torch, flex), or by shape (auto)."""

    @model_validator(mode="after")
    def _check(self) -> "TextConfig":
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of embed_dim {self.embed_dim}, got {self.num_heads}"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads {self.num_heads}, got {self.kv_heads}"
            )
        if self.positions == "rope" and self.embed_dim // self.num_heads % 2:
            raise ValueError(
                f"positions: rope needs an even number of channels a head, got {self.embed_dim // self.num_heads}"
            )
        if self.positions != "rope" and self.rope_base != TextConfig.model_fields["rope_base"].default:
            raise ValueError(f"rope_base: positions {self.positions} have none; set positions: rope, or leave it")
        return self

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the MLP."""
        if self.hidden_dim is not None:
            return self.hidden_dim
        wide = 4 * self.embed_dim
        return wide if self.activation not in GATED else -(-2 * wide // (3 * 64)) * 64

    @property
    def padded_vocab(self) -> int:
        """Rows of the token embedding."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def flops_per_row(self) -> float:
        """FLOPs of one full row, forward, the head not counted; causal attention counts in full."""
        n, dim, kv = self.max_length, self.embed_dim, self.embed_dim // self.num_heads * self.kv_heads
        projections = flops.linear(n, dim, dim + 2 * kv) + flops.linear(n, dim, dim)
        mlp = flops.linear(n, dim, self.mlp_dim) * (3 if self.activation in GATED else 2)
        return self.depth * (projections + mlp + flops.attention(n, dim))

    def build(self) -> "TextEncoder":
        """The module, freshly initialised from torch's global generator."""
        return TextEncoder(self)


class TextEncoder(nn.Module):
    """Transformer over tokens without a head; `forward` gives every token's last hidden state."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        dim = config.embed_dim
        self.token_embed = nn.Embedding(config.padded_vocab, dim)
        self.pos_embed = nn.Embedding(config.max_length, dim) if config.positions == "learned" else None
        self.type_embed = nn.Embedding(config.token_types, dim) if config.token_types else None
        norm = (config.norm, dim, config.norm_eps, config.bias)
        self.embed_norm = norm_module(*norm) if config.embed_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        options = BlockOptions(
            dim,
            config.num_heads,
            config.mlp_dim,
            num_kv_heads=config.kv_heads,
            qkv_bias=config.bias,
            bias=config.bias,
            norm=config.norm,
            eps=config.norm_eps,
            post_norm=config.post_norm,
            activation=config.activation,
            dropout=config.dropout,
            causal=config.causal,
            attention=config.attention,
        )
        self.blocks = nn.ModuleList(Block(options) for _ in range(config.depth))
        if config.embed_norm and not config.post_norm:
            self.blocks[0].norm1 = nn.Identity()
        self.norm = nn.Identity() if config.post_norm else norm_module(*norm)
        if config.positions == "rope":
            rotation = rotation_1d(dim // config.num_heads, config.max_length, config.rope_base)
            self.register_buffer("rotation", torch.stack(rotation), persistent=False)  # (2, length, c)
        slopes = alibi_slopes(config.num_heads) if config.positions == "alibi" else None
        self.register_buffer("slopes", slopes, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's (Radford et al. 2019, sec. 2.3), or BERT's (google-research/bert: truncated normal). Biases 0."""
        std, bert = self.config.init_std, self.config.init == "bert"
        for name, layer in self.named_modules():
            if not isinstance(layer, (nn.Linear, nn.Embedding)):
                continue
            branch_end = name.endswith((".attn.proj", ".mlp.fc2"))
            scaled = std / (2 * self.config.depth) ** 0.5 if branch_end and not bert else std
            init_normal(layer.weight, scaled, truncated=bert)
            if isinstance(layer, nn.Linear) and layer.bias is not None:
                nn.init.zeros_(layer.bias)

    @property
    def embed_dim(self) -> int:
        """Width of a feature."""
        return self.config.embed_dim

    @property
    def last_norm(self) -> nn.Module:
        """The norm that gives the states."""
        return self.blocks[-1].norm2 if self.config.post_norm else self.norm

    @property
    def word_weights(self) -> Float[Tensor, "v d"]:
        """The embeddings of the vocabulary's tokens, without the padded rows: what a tied head multiplies by."""
        return self.token_embed.weight[: self.config.vocab_size]

    def embed(
        self,
        tokens: Int[Tensor, "b n"],
        positions: Int[Tensor, "b n"] | None = None,
        token_types: Int[Tensor, "b n"] | None = None,
        start: int = 0,
    ) -> Float[Tensor, "b n d"]:
        """Token, position and type vectors summed, normed where the config says so.

        positions: none: start .. start + n - 1. token_types: none: all 0.
        """
        x = self.token_embed(tokens)
        if self.pos_embed is not None:
            own = self.pos_embed.weight[start : start + tokens.shape[1]]  # (n, d)
            x = x + (own if positions is None else self.pos_embed(positions))
        if self.type_embed is not None:
            x = x + (self.type_embed.weight[0] if token_types is None else self.type_embed(token_types))
        return self.dropout(self.embed_norm(x))

    def forward(
        self,
        tokens: Int[Tensor, "b n"],
        document_ids: Int[Tensor, "b n"] | None = None,
        positions: Int[Tensor, "b n"] | None = None,
        token_types: Int[Tensor, "b n"] | None = None,
        caches: list[LayerCache] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Every token's state after all blocks and the last norm.

        tokens: int64, at most max_length with those cached; document_ids, positions, token_types: as in
        TextBatch. caches: one a block, of a causal encoder: the tokens follow those that they hold.
        Raises ValueError for longer rows, and for caches of an encoder that is not causal.
        """
        start = 0 if caches is None else len(caches[0])
        if start + tokens.shape[1] > self.config.max_length:
            raise ValueError(
                f"tokens: expected at most encoder.max_length {self.config.max_length}, got {start + tokens.shape[1]}"
            )
        if caches is not None and not self.config.causal:
            raise ValueError("caches: an encoder that is not causal sees later tokens; it has no cache")
        x = self.embed(tokens, positions, token_types, start)
        rotation = self.rotation_of(tokens.shape[1], positions, start)
        scope = Scope(document_ids, self.slopes)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block(x, rotation, scope, cache)
        return self.norm(x)

    def rotation_of(self, n: int, positions: Int[Tensor, "b n"] | None, start: int) -> Rotation | None:
        """The rotation of n tokens: none without rotary positions."""
        if self.config.positions != "rope":
            return None
        return Rotation(*(self.rotation[:, start : start + n] if positions is None else self.rotation[:, positions]))

    def encode(self, batch: TextBatch) -> Float[Tensor, "b n d"]:
        """`forward` over a batch."""
        return self(batch.tokens, batch.document_ids, batch.positions, batch.token_types)

    def features(self, batch: TextBatch) -> Float[Tensor, "b d"]:
        """One feature a row, as `config.pool` says, padding left out."""
        states = self.encode(batch)
        real = torch.ones_like(batch.tokens) if batch.document_ids is None else (batch.document_ids >= 0).long()
        match self.config.pool:
            case "cls":
                return states[:, 0]
            case "last":
                return states[torch.arange(len(states), device=states.device), real.sum(dim=1) - 1]
            case "mean":
                weights = real.to(states.dtype)[..., None]  # (b, n, 1)
                return (states * weights).sum(dim=1) / weights.sum(dim=1)


def init_normal(weight: Tensor, std: float, truncated: bool) -> None:
    """N(0, std), on request cut at two standard deviations: torch's own bounds are absolute."""
    if truncated:
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    else:
        nn.init.normal_(weight, std=std)
