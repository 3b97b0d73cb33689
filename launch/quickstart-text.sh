#!/usr/bin/env bash
# From nothing to a language model that fills in blanks: installs, packs the documentation strings of Python's
# standard library, pretrains a small BERT on them, shows what it guesses. Run again, it reuses all of it.
set -euo pipefail
cd "$(dirname "$0")/.."
run=runs/mlm-quickstart
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # on a busy machine two threads are slower than one

./launch/setup.sh
started=$SECONDS
.venv/bin/selfsup data pack python-docs
if [ -f "$run/config.yaml" ]; then
    .venv/bin/selfsup train --resume "$run"
else
    .venv/bin/selfsup train configs/mlm/quickstart.yaml "$@"  # such as --optim.steps 40
fi
.venv/bin/selfsup fill "$run" --shards data/python-docs/test-tokens
.venv/bin/selfsup fill "$run" "Return the [MASK] of the list." "Raises ValueError if the [MASK] is not found."

cat <<END

Done in $((SECONDS - started)) s after installation. This was a smoke test: some minutes of one core, and a text
that repeats itself. For a result that means something see the IMDB and Shakespeare lines of README.md.

The run folder   $run   (config.yaml, metrics.jsonl, checkpoints/, tokenizer.json)
Watch it         .venv/bin/tensorboard --logdir runs
Your text        .venv/bin/selfsup data pack YOUR_TEXT data/mine/train
                 .venv/bin/selfsup data tokenizer data/mine/train data/mine/tokenizer.json \\
                     --kind wordpiece --vocab-size 8192
                 .venv/bin/selfsup data tokenize data/mine/train data/mine/train-tokens \\
                     --tokenizer data/mine/tokenizer.json
                 .venv/bin/selfsup train configs/mlm/quickstart.yaml \\
                     --data.shards data/mine/train-tokens --run.dir runs/mine
Every option     .venv/bin/selfsup train --help
END
