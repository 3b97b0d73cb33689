"""Projectors and predictors: small MLPs behind an encoder, kept for pretraining and then thrown away."""

from torch import nn


def simclr_projector(in_dim: int, hidden_dim: int, out_dim: int, num_layers: int) -> nn.Sequential:
    """(b, in_dim) -> (b, out_dim): `num_layers` of Linear-BatchNorm, ReLU between them.

    As google-research/simclr (`model_util.py`, projection_head): no linear layer has a bias, and the
    last batch norm scales but does not shift.
    """
    widths = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
    layers: list[nn.Module] = []
    for i in range(num_layers):
        norm = nn.BatchNorm1d(widths[i + 1])
        layers += [nn.Linear(widths[i], widths[i + 1], bias=False), norm, nn.ReLU(inplace=True)]
    layers.pop()
    norm.bias.requires_grad_(False)  # stays 0
    return nn.Sequential(*layers)


def byol_mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """(b, in_dim) -> (b, out_dim): BYOL's projector, and its predictor (deepmind-research/byol,
    `networks.py`): Linear, BatchNorm, ReLU, Linear without bias."""
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, out_dim, bias=False),
    )
