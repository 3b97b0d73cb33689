"""What a case is: one thing that must hold of a kernel, as data."""

from dataclasses import dataclass
from typing import Literal

from selfsup.conformance.expectations import Expectation
from selfsup.conformance.inputs import InputRecipe

Level = Literal["core", "train", "full"]
LEVELS: tuple[Level, ...] = ("core", "train", "full")


@dataclass(frozen=True)
class Case:
    """One thing that must hold of a kernel."""

    id: str
    level: Level
    requires: frozenset[str]
    make_inputs: InputRecipe
    expected: Expectation
    cites: str

    @property
    def group(self) -> str:
        """Cases of a group share a process."""
        return self.id.split("/")[0]

    @property
    def cost(self) -> int:
        """Scores to compute."""
        shape = self.make_inputs.shape
        return shape.b * shape.h * shape.l * shape.s


def needs(recipe: InputRecipe, gradients: bool) -> set[str]:
    """The features that a call with these inputs uses."""
    shape, options = recipe.shape, recipe.options
    needs = {recipe.dtype}
    band = bool(options.get("is_causal")) or "window" in options
    needs |= {"backward"} if gradients else set()
    needs |= {"cross"} if shape.l != shape.s else set()
    needs |= {"value_dim"} if shape.d != shape.dv else set()
    needs |= {"gqa"} if shape.h != shape.hk else set()
    needs |= {"causal"} if options.get("is_causal") else set()
    if band and shape.l != shape.s:
        needs |= {str(options.get("causal_align", "top_left"))}
    needs |= {n for n in ("scale", "window", "softcap") if n in options}
    needs |= {"alibi"} if "alibi_slopes" in options else set()
    needs |= {"documents"} if "document_ids" in options else set()
    if options.get("return_lse"):
        needs |= {"lse", "lse_grad"} if gradients else {"lse"}
    return needs
