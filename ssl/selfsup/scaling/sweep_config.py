"""What is written to plan a sweep: a base recipe, a ladder of sizes, a grid, rules, and what is believed beforehand."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from selfsup.config import Section, read_yaml, validate
from selfsup.scaling import rules
from selfsup.scaling.ladder import Account, FlopsName, LadderConfig, ParamsName
from selfsup.scaling.rules import Setting

Positive = Annotated[float, Field(gt=0)]
Amounts = tuple[Positive, ...]


class IsoFlop(Section):
    """For each budget the sizes nearest to the expected optimum, each trained for what the budget leaves."""

    name: Literal["isoflop"] = "isoflop"
    budgets: Amounts
    """FLOPs of a run."""
    per_budget: Annotated[int, Field(ge=1)] = 6
    """Sizes of a budget."""
    hold_out: Amounts = ()
    """Further, larger budgets, whose runs test the law's prediction and are not fitted."""
    hold_out_sizes: Annotated[int, Field(ge=1)] = 2
    """Sizes of a held-out budget."""


class Product(Section):
    """Every size with every amount of data."""

    name: Literal["product"] = "product"
    samples: Amounts
    """Amounts of data: tokens, images."""


class Trunk(Section):
    """Every size with every amount of data, all of one size from a single constant rate: the longest run of a
    warmup-stable-decay schedule is the trunk, the shorter ones branch off where their decay begins."""

    name: Literal["trunk"] = "trunk"
    samples: Amounts
    """Amounts of data, the longest the trunk's; whole multiples of the least."""

    @model_validator(mode="after")
    def _check(self) -> "Trunk":
        least = min(self.samples)
        if len(set(self.samples)) < 2 or any(abs(s / least - round(s / least)) > 1e-9 for s in self.samples):
            raise ValueError(f"samples: expected two or more whole multiples of the least, got {list(self.samples)}")
        return self


Grid = Annotated[IsoFlop | Product | Trunk, Field(discriminator="name")]


class FixedRule(Section):
    """One learning rate and batch for all."""

    name: Literal["fixed"] = "fixed"
    lr: Positive
    """Peak learning rate."""
    batch: Positive
    """Tokens or images of a batch."""

    def setting(self, params: float, samples: float) -> Setting:
        return Setting(self.lr, self.batch)


class PowerRule(Section):
    """Products of powers, as `sweeps.fit_rule` finds them: lr = lr_factor N^lr_params D^lr_samples, and alike."""

    name: Literal["power"] = "power"
    lr_factor: Positive
    lr_params: float = 0.0
    lr_samples: float = 0.0
    batch_factor: Positive
    batch_params: float = 0.0
    batch_samples: float = 0.0

    def setting(self, params: float, samples: float) -> Setting:
        return Setting(
            self.lr_factor * params**self.lr_params * samples**self.lr_samples,
            self.batch_factor * params**self.batch_params * samples**self.batch_samples,
        )


class PorianRule(Section):
    """`rules.porian`, for language models: by N."""

    name: Literal["porian"] = "porian"

    def setting(self, params: float, samples: float) -> Setting:
        return rules.porian(params, samples)


class OlmoRule(Section):
    """`rules.olmo`, for language models: Porian's with half the learning rate."""

    name: Literal["olmo"] = "olmo"

    def setting(self, params: float, samples: float) -> Setting:
        return rules.olmo(params, samples)


class StepLawRule(Section):
    """`rules.steplaw`, for language models: by N without embeddings, and D."""

    name: Literal["steplaw"] = "steplaw"

    def setting(self, params: float, samples: float) -> Setting:
        return rules.steplaw(params, samples)


class MupRule(Section):
    """One learning rate and batch for all widths, with muP (`selfsup.mup`) in every cell: for AdamW, and along heads of
    one size."""

    name: Literal["mup"] = "mup"
    lr: Positive
    """Peak learning rate, found at base_width."""
    batch: Positive
    """Tokens or images of a batch."""
    base_width: Annotated[int, Field(ge=1)]
    """encoder.embed_dim at which the model is as its recipe says."""

    def setting(self, params: float, samples: float) -> Setting:
        return Setting(self.lr, self.batch)


AnyRule = FixedRule | PowerRule | PorianRule | OlmoRule | StepLawRule | MupRule
LearningRule = Annotated[AnyRule, Field(discriminator="name")]


def setting_of(rule: AnyRule, account: Account, samples: float) -> Setting:
    """Learning rate and batch (tokens, images) of a size trained on so much data. N counts the matrices, for steplaw
    what is no embedding."""
    params = account.no_embedding if rule.name == "steplaw" else account.matrices
    return rule.setting(float(params), samples)


class Prior(Section):
    """The law believed before anything is run: E + A / N^alpha + B / D^beta. Defaults: the 240 runs of Hoffmann et
    al. as Besiroglu et al. 2024 recovered them, which are of large models: expect to recentre after a pilot."""

    E: Annotated[float, Field(ge=0)] = 1.8172
    A: Positive = 477.8
    B: Positive = 2143.0
    alpha: Positive = 0.3473
    beta: Positive = 0.3672


class Floors(Section):
    """Cells below are left out, and counted."""

    steps: Annotated[int, Field(ge=1)] = 600
    """Optimizer steps: the loss of shorter runs is of the schedule."""
    ratio: Annotated[float, Field(ge=0)] = 0.0
    """Data per parameter, D / N."""


class HeldOut(Section):
    """What y is: the loss on data that is never trained on, the same rows with the same masks for every cell; of byol
    the error of a nearest-neighbour probe."""

    shards: str
    """Shards of the kind that data.shards is, made with the same tokenizer."""
    samples: Annotated[int, Field(ge=1)] = 512
    """Rows or images, the first ones."""
    batch: Annotated[int, Field(ge=1)] = 64
    """Of a forward pass. SimCLR contrasts the images of one: the same for all cells, and a divisor of samples."""
    temperature: Positive = 0.1
    """SimCLR's, of y: the same for all cells, whatever they train with."""
    neighbours: str | None = None
    """BYOL: shards whose labels the probe's neighbours vote with; none: data.shards. `shards` must have labels too."""
    neighbour_samples: Annotated[int, Field(ge=20)] = 2000
    """BYOL: images of them, the first ones."""

    def of(self, objective: str) -> dict[str, Any]:
        """The keys that y of an objective depends on: a cell's name does not change by those of another."""
        only = {"temperature": "simclr", "neighbours": "byol", "neighbour_samples": "byol"}
        return self.model_dump(mode="json", exclude={key for key, name in only.items() if name != objective})

    def check(self, objective: str) -> None:
        """Raises ValueError for what would be ignored, and for a last batch of SimCLR's of another size."""
        unused = self.model_fields_set - self.of(objective).keys()
        if unused:
            raise ValueError(f"held_out.{min(unused)}: is not used by {objective}; leave it out")
        if objective == "simclr" and self.samples % self.batch:
            raise ValueError(
                f"held_out.batch: simclr's loss depends on it: expected a divisor of held_out.samples {self.samples}, "
                f"got {self.batch}"
            )


class SweepConfig(Section):
    """A sweep: everything that `selfsup scaling plan` needs."""

    recipe: str
    """The base recipe, beside this file."""
    held_out: HeldOut
    ladder: LadderConfig
    grid: Grid
    rule: LearningRule
    params: ParamsName = "matrices"
    """Which parameters N are; all three are kept in the table."""
    flops: FlopsName = "counted"
    """Which FLOPs C are; both are kept in the table."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of every cell."""
    repeat_seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = ()
    """Further seeds of the cell at the middle of the grid's compute that is expected to be best: they measure noise."""
    probe_lr: tuple[Positive, ...] = ()
    """Factors on the learning rate, tried at the smallest and the largest size of the least budget, as [0.5, 2]."""
    floors: Floors = Floors()
    prior: Prior = Prior()
    noise: Positive = 0.01
    """Standard deviation of log loss between runs that differ by seed alone."""
    target: Positive | None = None
    """FLOPs at which the law is to predict; none: the largest held-out budget, else ten times the largest run's."""

    @model_validator(mode="after")
    def _check(self) -> "SweepConfig":
        if self.seed in self.repeat_seeds or len(set(self.repeat_seeds)) < len(self.repeat_seeds):
            raise ValueError(f"repeat_seeds: expected different ones, other than seed {self.seed}")
        if 1.0 in self.probe_lr:
            raise ValueError("probe_lr: factor 1 is the grid's own cell; leave it out")
        return self


def load_sweep(path: Path) -> SweepConfig:
    """The sweep in a YAML file. Raises ValueError, a line a fault."""
    return validate(SweepConfig, read_yaml(path))
