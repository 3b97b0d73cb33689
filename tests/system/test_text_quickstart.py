"""The text quickstart of the README in a copy of the repository, cut short, and what follows from its run."""

import json
import re

import pytest
import torch

from cloned import needs_setup, run

pytestmark = needs_setup
RUN = "runs/mlm-quickstart"


@pytest.fixture(scope="module")
def said(clone) -> str:
    return run(clone, "bash", "launch/quickstart-text.sh", "--optim.steps", "30", "--run.checkpoint-every", "30")


def test_it_learns_and_ends_with_tables_that_a_person_can_read(clone, said):
    lines = [json.loads(line) for line in (clone / RUN / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 30 and lines[-1]["loss"] < 7.5  # ln 8192 = 9.0 at the start
    assert lines[-1]["tokens_per_s"] > 0 and "images_per_s" not in lines[-1]
    assert "finished at step 30 of 30" in said and "monitor    off" not in said
    assert said.count("truth") >= 2 and said.count("____") >= 24  # the run's own table, and that of held-out text
    assert re.search(r"\d%.*Return the ____ of the list", said, re.IGNORECASE)


def test_its_model_is_scored_and_loads_in_transformers(clone, said):
    scored = run(
        clone, ".venv/bin/selfsup", "probe", "perplexity", RUN, "--test", "data/python-docs/test-tokens",
        "--documents", "2",
    )  # fmt: skip
    assert "perplexity" in scored
    run(clone, ".venv/bin/selfsup", "export", RUN, "--to", "hf")
    transformers = pytest.importorskip("transformers")
    folder = next((clone / RUN / "export").iterdir())
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Return the [MASK].", return_tensors="pt")
    with torch.no_grad():
        assert model(**ids).logits.shape == (1, len(ids["input_ids"][0]), 8192)
