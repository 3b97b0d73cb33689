"""The root configuration: everything about a run, in six sections."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from selfsup.config import Section, merge, parse_overrides, read_yaml, validate
from selfsup.data.images import ImageData
from selfsup.data.text import TextData
from selfsup.data.views import view_kinds
from selfsup.encoders import AnyEncoderConfig
from selfsup.encoders.text import TextConfig
from selfsup.encoders.vit import ViTConfig
from selfsup.mup import check_mup
from selfsup.objectives import CLMConfig, MAEConfig, MLMConfig, ObjectiveConfig
from selfsup.optim import AdamWConfig, AnyOptimConfig
from selfsup.profiling import parse_range


class PrecisionConfig(Section):
    """Number formats."""

    mixed: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of matrix products; weights and optimizer stay in fp32. fp16 needs CUDA."""
    float32_matmul: Literal["highest", "high", "medium"] = "highest"
    """torch.set_float32_matmul_precision; medium is ~2.4x faster in fp32 on a CPU with AMX."""


class RunConfig(Section):
    """Where and how to run: nothing here changes the result beyond rounding (with dropout or drop path on, the
    micro-batches and torch.compile, there with activation_checkpointing, decide which random numbers
    they draw; with batch norm, as in byol's heads, its statistics are those of a micro-batch over all
    processes)."""

    dir: str
    """The run folder: config, metrics, checkpoints, exports."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one."""
    micro_batch: Annotated[int, Field(ge=1)] | None = None
    """Samples per forward pass and process; none: the whole share of a process at once."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Loader processes per training process; 0 loads in the training process."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """Torch threads per process; none: torch's own choice. A busy machine wants 1."""
    compile: bool = False
    """torch.compile the objective."""
    augment: Literal["auto", "workers", "device"] = "auto"
    """Where the colours of data.views are changed, by the same random numbers: auto is device on CUDA and
    workers on a CPU. Workers round them to 8 bits. Crops are always the workers'."""
    activation_checkpointing: bool = False
    """Keep only the input of each transformer block and compute it again in the backward pass: less
    memory, more time, the same gradients."""
    log_every: Annotated[int, Field(ge=1)] = 10
    """Steps between lines in metrics.jsonl and TensorBoard."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 1000
    """Steps between checkpoints; the last step always makes one."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints kept."""
    picture_every: Annotated[int, Field(ge=0)] = 1000
    """Steps between pictures in TensorBoard; 0: none."""
    histogram_every: Annotated[int, Field(ge=0)] = 0
    """Steps between histograms of weights and gradients in TensorBoard; 0: none."""
    monitor_every: Annotated[int, Field(ge=0)] = 1000
    """Steps between measurements on at most 1,500 training images: spread, rank, two views, knn, collapse. On
    CIFAR-10 one costs as much as 8 to 17 steps of MAE; on several processes the others wait for the first. 0: none."""
    profile: str | None = None
    """FIRST:LAST: profile the steps after step FIRST up to step LAST, into RUN/profile; none: no profile."""
    expect_processes: Annotated[int, Field(ge=1)] | None = None
    """Refuse to train on another number of processes."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """How several processes share a model: ddp, each holds all of it; fsdp2, each holds a part of every weight,
    gradient and moment, and gathers a block's weights while it computes it (torch's fully_shard)."""
    background_checkpoints: bool = False
    """Write checkpoints while training goes on, from a copy in host memory. A kill before one is whole goes back
    to the one before it."""
    max_hours: Annotated[float, Field(gt=0)] | None = None
    """Save and leave after so many hours, as if asked by a signal; none: no limit."""
    stall_minutes: Annotated[float, Field(ge=0)] = 30.0
    """Without a step for so long every rank prints its stacks and leaves; longer than a step with its measurement,
    pictures and checkpoint must take. 0: never."""
    skip_budget: Annotated[int, Field(ge=0)] = 10
    """Steps of the whole run that may be skipped because loss or gradient is NaN or infinite; one more ends it."""

    @field_validator("dir")
    @classmethod
    def _home(cls, value: str) -> str:
        return str(Path(value).expanduser())

    @field_validator("profile", mode="before")
    @classmethod
    def _range(cls, value: Any) -> Any:
        if value is not None:
            parse_range(str(value))
        return value


AnyData = Annotated[ImageData | TextData, Field(discriminator="name")]

_TEXT = {config.model_fields["name"].default for config in (MLMConfig, CLMConfig)}
"""Objectives that read text: they decide which encoder and data a recipe means that names none."""


class Recipe(Section):
    """A pretraining run. Only `run` may differ between two runs with the same result."""

    objective: ObjectiveConfig = Field(default_factory=MAEConfig)
    encoder: AnyEncoderConfig = Field(default_factory=ViTConfig)
    data: AnyData
    optim: AnyOptimConfig = Field(default_factory=AdamWConfig)
    precision: PrecisionConfig = Field(default_factory=PrecisionConfig)
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Keys the order of the data, every random number on it, and the initial weights."""
    run: RunConfig

    @model_validator(mode="before")
    @classmethod
    def _names(cls, content: Any) -> Any:
        """What a section without a name is: mae, adamw, and what its objective reads."""
        if not isinstance(content, dict):
            return content
        objective = content.get("objective", {})
        text = isinstance(objective, dict) and objective.get("name") in _TEXT
        kinds = ("text", "text") if text else ("vit", "images")
        names = dict(zip(("objective", "encoder", "data", "optim"), ("mae", *kinds, "adamw")))
        named = {k: {"name": name, **content[k]} for k, name in names.items() if isinstance(content.get(k), dict)}
        if text and "encoder" not in content:
            named["encoder"] = {"name": "text"}
        return {**content, **named}

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        reads = self.objective.reads
        for key, section, got in (("encoder", self.encoder, self.encoder.reads), ("data", self.data, self.data.name)):
            if got != reads:
                raise ValueError(
                    f"{key}.name: expected one for {reads}, which {self.objective.name} reads, got {section.name}"
                )
        self.objective.check(self.encoder)
        if isinstance(self.data, TextData):
            self._check_text(self.data)
        else:
            self._check_images(self.data)
        if isinstance(self.optim, AdamWConfig) and self.optim.mup_base_width is not None:
            mae = self.objective if isinstance(self.objective, MAEConfig) else None
            decoder = None if mae is None else (mae.decoder_embed_dim, mae.decoder_num_heads)
            check_mup(self.objective.name, self.encoder, self.optim.mup_base_width, decoder)
        if self.run.parallel == "fsdp2":
            self._check_split()
        last = 0 if self.run.profile is None else parse_range(self.run.profile).stop
        if last > self.optim.steps:
            raise ValueError(
                f"run.profile: expected steps up to optim.steps {self.optim.steps}, got {self.run.profile}"
            )
        return self

    def _check_split(self) -> None:
        """What weights in parts do not have."""
        if self.precision.mixed == "fp16":
            raise ValueError("precision.mixed: fp16 goes with run.parallel ddp only; use bf16")
        if self.run.histogram_every:
            raise ValueError("run.histogram_every: goes with run.parallel ddp only; set it to 0")

    def _check_text(self, data: TextData) -> None:
        """Rows are built as the objective predicts them."""
        if isinstance(self.objective, MLMConfig):
            pairs, wanted = data.packing == "pairs", self.objective.next_sentence
            if pairs != wanted:
                raise ValueError(
                    f"data.packing: pairs and objective.next_sentence: true go together, got {data.packing} and "
                    f"{str(wanted).lower()}"
                )
        elif data.packing == "pairs":
            raise ValueError(f"data.packing: pairs are for mlm, got objective.name {self.objective.name}")
        if self.run.augment != "auto":
            raise ValueError(f"run.augment: changes the colours of images, text has none; remove {self.run.augment}")

    def _check_images(self, data: ImageData) -> None:
        """As many views of an image as the objective compares, of the size and channels that the encoder takes."""
        assert not isinstance(self.encoder, TextConfig)
        for name, values in (("mean", data.mean), ("std", data.std)):
            if len(values) != self.encoder.in_chans:
                raise ValueError(
                    f"data.{name}: expected {self.encoder.in_chans} values, one per encoder.in_chans, "
                    f"got {len(values)}"
                )
        name, wanted = self.objective.name, self.objective.views
        if wanted == 1 and data.views != "none":
            raise ValueError(f"data.views: expected none, {name} takes one view of an image; remove it")
        if wanted == 1:
            return
        kinds, size = view_kinds(data.views), self.encoder.img_size
        sizes = [view.size or size for view in kinds]
        if sizes != [size] * wanted:
            got = f"{len(sizes)} of {sorted(set(sizes))} px" if sizes else "none"
            raise ValueError(
                f"data.views: expected {wanted} views of {size} px, which {name} compares, got {got}; set data.views "
                f"to simclr, byol, or simclr-32 for images of 32 px"
            )


    @property
    def throughput(self) -> tuple[str, int]:
        """What speed is counted in, and how many of them a sample is: of a row all places, padding too."""
        return ("tokens", self.encoder.max_length) if isinstance(self.encoder, TextConfig) else ("images", 1)


def load_recipe(path: Path, overrides: list[str]) -> Recipe:
    """The recipe in a YAML file, adjusted by command-line overrides. Raises ValueError, a line a fault."""
    return validate(Recipe, merge(read_yaml(path), parse_overrides(overrides)))


def resumed(recipe: Recipe, changes: dict[str, Any], run_dir: Path) -> Recipe:
    """The recipe with what a resumed run may change: its `run` section, and where its shards and tokenizer lie now.

    Raises ValueError for any other key, and for another run.dir. That they are the same is for their
    fingerprints to say.
    """
    allowed = {"run": None, "data": {"shards", "tokenizer"}}
    others = {key for key in changes if key not in allowed or not isinstance(changes[key], dict)}
    for section in changes.keys() - others:
        others |= {f"{section}.{key}" for key in changes[section] if key not in (allowed[section] or {key})}
    if others:
        raise ValueError(
            f"{', '.join(sorted(others))}: a resumed run keeps its recipe; only --run.*, --data.shards and "
            f"--data.tokenizer may change. For a new run from these weights use --init-from"
        )
    asked = str(changes.get("run", {}).get("dir", run_dir))
    if Path(asked).expanduser().absolute() != run_dir.absolute():
        raise ValueError(
            f"run.dir: a resumed run stays in its folder {run_dir}, got {asked}; copy the folder first"
        )
    changes = merge(changes, {"run": {"dir": str(run_dir)}})
    return validate(Recipe, merge(recipe.model_dump(mode="json"), changes))
