"""What muP (`selfsup.mup`) asks of a ladder: that all widens in one proportion, with heads of one size."""

from collections.abc import Sequence

from selfsup.encoders.text import TextConfig
from selfsup.objectives import MAEConfig
from selfsup.recipe import Recipe
from selfsup.scaling.finding import Finding
from selfsup.scaling.ladder import LadderConfig, Size, resized
from selfsup.scaling.sweep_config import AnyRule

APART = 1.1
"""Proportions may differ by so much, the largest over the smallest: sizes are whole numbers."""


def uses_mup(base: Recipe, rule: AnyRule) -> bool:
    """By the sweep's rule, or by the base recipe's own key."""
    return rule.name == "mup" or (base.optim.name == "adamw" and base.optim.mup_base_width is not None)


def require_proportions(base: Recipe, ladder: Sequence[Size]) -> None:
    """Raises ValueError, naming the fix, where heads differ in size or parts do not widen with the encoder."""
    recipes = [resized(base, size.changes) for size in ladder]
    heads: dict[str, list[int]] = {"ladder.head_dim": [r.encoder.embed_dim // r.encoder.num_heads for r in recipes]}
    shares: dict[str, list[float]] = {}
    if isinstance(base.encoder, TextConfig):
        shares["encoder.hidden_dim"] = [r.encoder.mlp_dim / r.encoder.embed_dim for r in recipes]
        shares["encoder.num_kv_heads"] = [r.encoder.kv_heads / r.encoder.num_heads for r in recipes]
    if isinstance(base.objective, MAEConfig):
        decoders = [(r.objective.decoder_embed_dim, r.objective.decoder_num_heads) for r in recipes]
        heads["objective.decoder_num_heads"] = [width // count for width, count in decoders]
        shares["objective.decoder_embed_dim"] = [w / r.encoder.embed_dim for (w, _), r in zip(decoders, recipes)]
    for key, channels in heads.items():
        if len(set(channels)) > 1:
            raise ValueError(
                f"{key}: muP needs the same number of channels a head at every width, got {channels}; choose widths "
                f"that are multiples of one head"
            )
    for key, found in shares.items():
        if max(found) > APART * min(found):
            got = ", ".join(f"{share:.3g}" for share in found)
            raise ValueError(
                f"{key}: muP needs it in one proportion to the encoder's at every width, got {got}; set it in the "
                f"recipe so that it is a whole number at every width"
            )


def depths_of(ladder: LadderConfig) -> list[Finding]:
    """A warning where depth changes along the ladder."""
    depths = [depth for _, depth, _ in ladder.shapes()]
    if len(set(depths)) == 1:
        return []
    text = (
        f"muP keeps the learning rate over widths; depths {min(depths)} to {max(depths)} move it as they do without: "
        f"give all widths one depth (ladder.depths), or probe_lr"
    )
    return [Finding("depth under muP", max(depths) / min(depths), 1.0, text)]
