"""What a text model gives for fixed random tokens, and the same of transformers' model."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from selfsup.batch import TextBatch
from selfsup.export.verify import Check, Outputs, Reloaded, check_outputs
from selfsup.objectives.clm import CLM
from selfsup.objectives.mlm import MLM

SHORT = 16
"""Tokens of the rows whose logits are compared; states are compared over the whole length."""


class Example(NamedTuple):
    """Two fixed random rows, in two lengths; of masked models the second ends in padding."""

    rows: TextBatch
    """As long as the model reads."""
    short: TextBatch
    """At most SHORT tokens, with targets."""


def example(model: MLM | CLM) -> Example:
    """Tokens of the whole vocabulary, segments where the model tells them apart; the same for the same model."""
    config, generator = model.encoder.config, torch.Generator().manual_seed(0)

    def rows(n: int) -> TextBatch:
        def random(high: int) -> Tensor:
            return torch.randint(high, (2, n), generator=generator)

        tokens, labels, documents, types = random(config.vocab_size), random(config.vocab_size), None, None
        chosen = torch.arange(n).expand(2, n) < n - 1  # of the last token nobody knows the next
        if isinstance(model, MLM):
            documents = torch.zeros(2, n, dtype=torch.int64)
            documents[1, n - n // 4 :] = -1
            types = random(config.token_types) if config.token_types > 1 else None
            chosen = documents >= 0
        else:
            labels = tokens.roll(-1, dims=1)
        return TextBatch(
            tokens=tokens,
            labels=labels[chosen],
            where=chosen.flatten().nonzero().flatten(),
            document_ids=documents,
            positions=None,
            token_types=types,
            random_next=torch.tensor([0, 1]) if getattr(model, "next_sentence", None) is not None else None,
            global_batch=2,
            seed=0,
            epoch=torch.zeros(2, dtype=torch.int64),
            position=torch.arange(2),
            index=torch.arange(2),
        )

    return Example(rows(config.max_length), rows(min(config.max_length, SHORT)))


class AsWide(TorchFunctionMode):
    """Casts to float32 inside widen to float64: transformers' Llama has them in its norms, and losses do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        if func is Tensor.to and torch.float32 in args[1:]:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        return func(*args, **(kwargs or {}))


def own_width(module: nn.Module) -> AbstractContextManager:
    """What a module is called in, so that one in float64 computes in float64 throughout."""
    return AsWide() if next(module.parameters()).dtype == torch.float64 else nullcontext()


def real_places(rows: TextBatch) -> Bool[Tensor, "b n"]:
    """Where there is no padding."""
    return (
        torch.ones_like(rows.tokens, dtype=torch.bool)
        if rows.document_ids is None
        else rows.document_ids >= 0
    )


def our_outputs(model: MLM | CLM, given: Example) -> Outputs:
    """(last states (t, d), logits (s, v), loss ()), with next sentence also its scores (2, 2); padding left out."""
    rows, short = given
    with own_width(model):
        states = model.encoder.encode(rows)[real_places(rows)]
        output = model(short, float(short.targets))
        loss = output.metrics.get("nll", output.loss)  # without z_loss, which transformers has not
        ends = model.encoder.encode(short)
        if isinstance(model, CLM):
            return states, model.logits(ends[real_places(short)]), loss
        logits = model.logits(short)  # at its targets: every place that is no padding
        scores = () if model.next_sentence is None else (model.next_sentence(ends[:, 0]),)
        return states, logits, loss, *scores


def their_outputs(module: Any, given: Example) -> Outputs:
    """The same of a model of transformers'."""
    rows, short = given

    def inputs(batch: TextBatch) -> dict[str, Tensor]:
        found = {"input_ids": batch.tokens}
        if batch.document_ids is not None:
            found["attention_mask"] = (batch.document_ids >= 0).long()
        if batch.token_types is not None:
            found["token_type_ids"] = batch.token_types
        return found

    assert short.where is not None
    labels = torch.full_like(short.tokens, -100)
    if short.document_ids is None:
        labels = short.tokens  # a causal model of transformers' shifts them itself
    else:
        labels.view(-1)[short.where] = short.labels
    pairs = {} if short.random_next is None else {"next_sentence_label": short.random_next}
    with own_width(module):
        states = module.base_model(**inputs(rows)).last_hidden_state[real_places(rows)]
        output = module(**inputs(short), labels=labels, **pairs)
        logits = output.logits if short.random_next is None else output.prediction_logits
        scores = () if short.random_next is None else (output.seq_relationship_logits,)
        return states, logits[real_places(short)], output.loss, *scores


def rotary_modules(module: nn.Module) -> list[nn.Module]:
    """What works out the angles: one for all layers, or one a layer, as in version 4's ModernBERT."""
    return [part for name, part in module.named_modules() if name.endswith("rotary_emb")]


def check_angles(folder: Path, reloaded: Reloaded, model: MLM | CLM) -> Check:
    """Rotary positions: transformers works its angles out in float32, we in float64, so that they part by what
    float32 rounds of the largest position. Raises ValueError where it is more."""
    ours = model.encoder.rotation  # (2, n, c)
    places = torch.arange(ours.shape[1])[None]
    with torch.inference_mode():
        theirs = tuple(
            torch.cat(part(ours, places, *layer_type))
            for part in rotary_modules(reloaded.module)
            # Version 5's ModernBERT has angles for each type of layer that there is.
            for layer_type in ([(name,) for name in getattr(part, "layer_types", ())] or [()])
        )
    rounding = model.encoder.config.max_length * 2.0**-22
    return check_outputs(folder, f"{reloaded.library} rotary angles", (ours,) * len(theirs), theirs, rounding)


def with_our_angles(reloaded: Reloaded, model: MLM | CLM) -> Reloaded:
    """The same with our rotary angles, which `check_angles` has compared: all else can then be held to more."""

    def ours(module: Any, given: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        cos, sin = model.encoder.rotation[:, : output[0].shape[-2]].to(output[0].dtype)
        return cos.expand_as(output[0]), sin.expand_as(output[1])

    for part in rotary_modules(reloaded.module):
        part.register_forward_hook(ours)
    return reloaded
