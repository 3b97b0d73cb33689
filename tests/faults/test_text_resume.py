"""An interrupted run on text equals one never stopped, bit for bit; the same rows and masks whoever loads them."""

import json
import shutil
import time

import pytest

from running import Server, final_state, kill, losses, metrics, read_trace, wait_for
from selfsup.data.tokenizer import TextTokenizer
from text_runs import make_token_shards, tokenizer, write_text_config

DELAY = 0.03  # seconds a step of a run that is to be killed
CASES = {
    # A dozen rows: every run goes through several epochs, each cut at another place. Dropout needs torch's
    # generator, so its state is put to the test too.
    "concat": ("{name: mlm, final_mask_ratio: 0.3}", "dropout: 0.1", "packing: concat"),
    "bestfit": ("{name: mlm}", "dropout: 0.1, positions: rope", "packing: bestfit, document_mask: true"),
}


class Bench:
    def __init__(self, folder):
        self.folder, self.server = folder, Server()
        self.shards = make_token_shards(folder / "shards", documents=12)
        self.configs = {
            case: write_text_config(folder / f"{case}.yaml", self.shards, *sections)
            for case, sections in CASES.items()
        }
        self.references = {}

    def arguments(self, case, name, workers=0):
        return [self.configs[case], "--run.dir", self.folder / name, "--run.workers", workers]

    def reference(self, case, ranks=1):
        """An uninterrupted run."""
        key = f"reference-{case}-{ranks}"
        if key not in self.references:
            trace = str(self.folder / f"{key}.trace")
            self.server.run(self.arguments(case, key), self.folder / "log", ranks, trace=trace)
            self.references[key] = self.folder / key
        return self.references[key]

    def killed(self, case, name, ranks=1, workers=0, **options):
        """A run killed somewhere after its second checkpoint."""
        run = self.folder / name
        pids = self.server.start(
            self.arguments(case, name, workers), self.folder / "log", ranks, delay=DELAY, **options
        )
        wait_for(lambda: list(run.glob("checkpoints/step-00000006")))
        time.sleep(0.1)
        kill(pids)
        self.server.wait(pids)
        assert not (run / "outcome.json").exists(), "killed too late: it had finished"
        return run

    def resume(self, run, ranks=1, **options):
        trace = str(self.folder / f"{run.name}.resumed")
        self.server.run(["--resume", run], self.folder / "log", ranks, trace=trace, **options)
        return read_trace(trace, "batch", ranks, 1)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    made = Bench(tmp_path_factory.mktemp("text-resume"))
    yield made
    made.server.close()


def rows(run, ranks=1):
    return read_trace(f"{run}.trace", "batch", ranks, 1)[:20]


def check_tail(tail, whole):
    assert 0 < len(tail) <= 20 and whole[-len(tail) :] == tail


@pytest.mark.slow
@pytest.mark.parametrize("case,ranks,workers", [("concat", 1, 2), ("bestfit", 1, 0), ("concat", 2, 1)])
def test_kill_minus_nine(bench, case, ranks, workers):
    reference = bench.reference(case, ranks)
    run = bench.killed(case, f"killed-{case}-{ranks}", ranks, workers)
    tail = bench.resume(run, ranks)
    assert losses(run) == losses(reference) and final_state(run) == final_state(reference)
    check_tail(tail, rows(reference, ranks))
    assert (run / "tokenizer.json").read_bytes() == (reference / "tokenizer.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_epochs_differ_in_their_masks_and_cover_every_row(bench, case):
    seen = [tuple(row) for batch in rows(bench.reference(case)) for row in batch]
    epochs = {}
    for epoch, _, index, content in seen:
        epochs.setdefault(epoch, {})[index] = tuple(content)
    full = [epochs[e] for e in range(max(epochs))]
    assert len(full) >= 5 and all(sorted(e) == list(range(len(full[0]))) for e in full)
    for one, next_one in zip(full, full[1:]):
        assert sum(one[i] != next_one[i] for i in one) > 0.7 * len(
            one
        )  # a short row can have the same mask twice


@pytest.mark.slow
def test_from_one_process_to_two(bench):
    """Other numbers of processes: the same rows and masks, and within rounding the same losses."""
    run = bench.killed("bestfit", "elastic")
    reference = bench.reference("bestfit")
    check_tail(bench.resume(run, 2), rows(reference))
    assert [step for step, *_ in losses(run)] == list(range(1, 21))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_any_number_of_workers_gives_the_same_rows_masks_and_losses(bench, case):
    reference = bench.reference(case)
    for workers in (1, 2):
        name = f"workers-{case}-{workers}"
        trace = str(bench.folder / f"{name}.trace")
        bench.server.run(bench.arguments(case, name, workers), bench.folder / "log", trace=trace)
        run = bench.folder / name
        assert rows(run) == rows(reference)
        assert losses(run) == losses(reference) and final_state(run) == final_state(reference)


@pytest.mark.slow
def test_masks_that_depend_on_history_are_caught(bench):
    run = bench.killed(
        "concat", "history", mutant="masks_from_a_generator", trace=str(bench.folder / "history.trace")
    )
    tail = bench.resume(run, mutant="masks_from_a_generator")
    with pytest.raises(AssertionError):
        check_tail(tail, rows(bench.reference("concat")))


def swapped(letters: TextTokenizer, one: str, other: str) -> TextTokenizer:
    """A tokenizer in which two letters have changed places."""
    content = json.loads(letters.json)
    vocab = content["model"]["vocab"]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    return TextTokenizer(json.dumps(content))


def refused(bench, run, log) -> str:
    assert bench.server.wait(bench.server.start(["--resume", run], log)) == [2]
    return log.read_text()


@pytest.mark.slow
def test_another_tokenizer_or_other_text_is_refused(bench, tmp_path):
    """Also where the tokens are the same: what they stand for is not."""
    shards, away = bench.shards, tmp_path / "away"
    run = bench.killed("concat", "tokenizer")
    before = metrics(run)
    shutil.move(shards, away)
    try:
        make_token_shards(shards, 12, swapped(tokenizer(), "a", "b"))
        said = refused(bench, run, tmp_path / "log-tokenizer")
        assert "error: tokenizer: this run was started with another tokenizer_sha256" in said
        shutil.rmtree(shards)
        make_token_shards(shards, 12, seed=1)
        said += refused(bench, run, tmp_path / "log-text")
        assert "error: data.shards: this run was started with another index_fingerprint" in said
        assert "Traceback" not in said and metrics(run) == before
    finally:
        shutil.rmtree(shards, ignore_errors=True)
        shutil.move(away, shards)
    bench.resume(run)
    assert final_state(run) == final_state(bench.reference("concat"))
