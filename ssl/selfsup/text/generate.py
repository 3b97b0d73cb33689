"""Text from a causal model, token by token, with cached keys and values."""

from collections.abc import Callable
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from jaxtyping import Float, Int64
from torch import Tensor

from selfsup.keyed import Purpose, TextView, uniform
from selfsup.layers.attention import LayerCache
from selfsup.objectives.clm import CLM
from selfsup.text.load import TextRun, load_text_run, print_notes


def main_generate(
    run: Annotated[str, tyro.conf.arg(metavar="RUN")],
    /,
    *,
    prompt: Annotated[str, tyro.conf.arg(metavar="TEXT")] = "",
    tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    samples: int = 1,
    until: Literal["tokens", "document"] | None = None,
    seed: int = 0,
    weights: Literal["trained", "ema"] = "trained",
) -> None:
    """Write text with a causal model (objective clm).

    The same seed gives the same text, and sample 3 of 8 is sample 3 of 4. When the model's max_length is full,
    it goes on from the last half of it: what came before is forgotten.

    Args:
        run: run or checkpoint folder.
        prompt: what the text begins with; a special token spelt out, such as [SEP], is that token. None: the
            beginning of a document.
        tokens: how many are written.
        temperature: below 1 the likely become likelier; 0: always the likeliest.
        top_k: draw among the k likeliest tokens.
        top_p: draw among the likeliest tokens that together have this probability.
        samples: texts written.
        until: tokens: all of them, whatever documents they begin; document: stop where the model ends it. None:
            document for a run that has read documents one by one (it cannot begin another), else tokens.
        seed: of the draws.
        weights: those of the last step, or their average over steps (optim.ema).
    """
    for holds, option, expected, got in (
        (tokens >= 1, "--tokens", ">= 1", tokens),
        (samples >= 1, "--samples", ">= 1", samples),
        (0 <= seed < 2**32, "--seed", "0 <= seed < 2**32", seed),
        (temperature >= 0, "--temperature", ">= 0", temperature),
        (top_k is None or top_k >= 1, "--top-k", ">= 1", top_k),
        (top_p is None or 0 < top_p <= 1, "--top-p", "0 < p <= 1", top_p),
    ):
        if not holds:
            raise ValueError(f"{option}: expected {expected}, got {got}")
    loaded = load_text_run(run, weights)
    print_notes(loaded)
    if until == "tokens" and loaded.separate:
        raise ValueError(f"--until tokens: {_one_by_one(loaded)}; expected document")
    start = prompt_ids(loaded, prompt)
    loaded.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    assert isinstance(loaded.objective, CLM)  # see prompt_ids

    def choose(logits: Float[Tensor, "b v"], step: int) -> Int64[Tensor, " b"]:
        return draw(filter_logits(logits, temperature, top_k, top_p), seed, step)

    written = generate(loaded.objective, start, tokens, samples, choose)
    for number, ids in enumerate(written.tolist()):
        if samples > 1:
            print(f"--- {number + 1}")
        print(as_text(loaded, prompt, ids, until or ("document" if loaded.separate else "tokens")))


def prompt_ids(run: TextRun, prompt: str) -> Int64[np.ndarray, " n"]:
    """The tokens that generation begins with.

    Raises ValueError for a model that is not causal, and for no prompt where documents were seen one by one:
    their first tokens were never predicted.
    """
    if not isinstance(run.objective, CLM):
        raise ValueError(
            f"{run.name}: expected a causal model (objective clm), got {run.recipe.objective.name}; let it fill "
            f"blanks: selfsup fill {run.name} 'text with a [MASK]'"
        )
    if prompt:
        ids = run.tokenizer.encode_prompt(prompt).astype(np.int64)
        if run.separate and len(ids) and ids[-1] == run.tokenizer.sep:
            raise ValueError(f"--prompt: {_one_by_one(run)}; give some text after the end of the other")
        if len(ids):
            return ids
        raise ValueError(f"--prompt {prompt!r}: the run's tokenizer makes no token of it; give another")
    if run.separate:
        raise ValueError(f"--prompt: {_one_by_one(run)}; give some text to go on from")
    return np.array([run.tokenizer.sep], dtype=np.int64)


def _one_by_one(run: TextRun) -> str:
    return (
        f"{run.name} has read documents one by one (data.packing pad or data.document_mask), and was never asked how "
        f"one begins"
    )


def as_text(run: TextRun, prompt: str, ids: list[int], until: Literal["tokens", "document"]) -> str:
    """Prompt and what follows; a line of dashes between documents."""
    sep, documents = run.tokenizer.sep, [[]]
    for i in ids:
        if i == sep:
            documents.append([])
        else:
            documents[-1].append(i)
    first = prompt + _continued(run, prompt, documents[0])
    if until == "document":
        return first
    return "\n---\n".join([first, *map(run.tokenizer.decode, documents[1:])])


def _continued(run: TextRun, prompt: str, ids: list[int]) -> str:
    """What `ids` add to the prompt: decoded behind it, since a word piece alone loses that it is one."""
    before = run.tokenizer.encode_prompt(prompt).tolist() if prompt else []
    whole, known = run.tokenizer.decode([*before, *ids]), run.tokenizer.decode(before)
    return whole.removeprefix(known) if whole.startswith(known) else " " + run.tokenizer.decode(ids)


@torch.inference_mode()
def generate(
    objective: CLM,
    prompt: Int64[np.ndarray, " n"],
    tokens: int,
    samples: int,
    choose: Callable[[Tensor, int], Tensor],
    cached: bool = True,
) -> Int64[Tensor, "samples tokens"]:
    """`tokens` tokens after the prompt, `samples` times, int64 on the CPU.

    choose: float32 logits (samples, vocab) and the number of the token -> int64 (samples,). What does not fit
    into max_length makes the window slide: it then begins with the last max_length // 2 tokens, the prompt's
    too. cached: keep keys and values; without, every token is computed from its whole window, and is the same.
    """
    encoder, device = objective.encoder, objective.word_weights.device
    longest = encoder.config.max_length
    ids = torch.from_numpy(prompt).to(device).expand(samples, -1)  # (samples, n), grows
    begin, caches = 0, None
    for step in range(tokens):
        if ids.shape[1] - begin > longest:
            begin, caches = ids.shape[1] - longest // 2, None
        if caches is None:
            caches = [LayerCache() for _ in encoder.blocks]
        states = encoder(ids[:, begin + len(caches[0]) :], caches=caches)  # (samples, new, d)
        logits = objective.logits(states[:, -1]).float()
        ids = torch.cat([ids, choose(logits, step)[:, None]], dim=1)
        caches = caches if cached else None
    return ids[:, len(prompt) :].cpu()


def filter_logits(
    logits: Float[Tensor, "*b v"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Float[Tensor, "*b v"]:
    """Logits over the temperature, -inf for what may not be drawn.

    First only the `top_k` largest stay (with those equal to the last of them), then of these the largest whose
    probabilities add up to `top_p` or just beyond: nucleus sampling (Holtzman et al. 2020). temperature 0: the
    largest alone, the first of equals.
    """
    if temperature == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1:
        values, order = logits.sort(dim=-1, descending=True, stable=True)
        chances = values.softmax(dim=-1)
        before = chances.cumsum(dim=-1) - chances  # of all that are likelier; 0 for the first
        late = before >= top_p
        logits = logits.masked_fill(late.scatter(-1, order, late), -torch.inf)
    return logits


def draw(logits: Float[Tensor, "b v"], seed: int, step: int) -> Int64[Tensor, " b"]:
    """One token a row, by its probability: a pure function of logits, seed, step and number of the row."""
    rows = torch.arange(len(logits), device=logits.device)
    u = uniform(seed, step, rows, Purpose.TEXT, 1, TextView.GENERATE)  # (b, 1) float64 in [0, 1)
    chances = logits.double().softmax(dim=-1).cumsum(dim=-1)  # (b, v)
    total = chances[:, -1:]
    # The first token whose sum is above u: never one of probability 0.
    return torch.searchsorted(chances, u * total, right=True)[:, 0]
