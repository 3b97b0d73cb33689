#!/usr/bin/env bash
# From nothing to a probed, exported encoder: installs, packs scikit-learn's handwritten digits into
# shards, pretrains a small ViT with MAE, probes it, exports it for timm. Run again, it reuses all of it.
set -euo pipefail
cd "$(dirname "$0")/.."
run=runs/mae-quickstart
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # on a busy machine two threads are slower than one

./launch/setup.sh
started=$SECONDS
.venv/bin/python tools/digits.py data/digits
if [ -f "$run/config.yaml" ]; then
    .venv/bin/selfsup train --resume "$run"
else
    .venv/bin/selfsup train configs/mae/quickstart.yaml
fi
.venv/bin/selfsup probe "$run"
if [ ! -d "$run/export/timm" ]; then
    .venv/bin/selfsup export "$run" --out "$run/export/timm"
fi

cat <<END

Done in $((SECONDS - started)) s after installation. This was a smoke test: 8x8 digits are so easy that raw
pixels score well. For a result that means something see the CIFAR-10 lines of README.md.

The run folder   $run   (config.yaml, metrics.jsonl, checkpoints/, probe/, export/)
Watch it         .venv/bin/tensorboard --logdir runs
Use it           timm.create_model("local-dir:$run/export/timm", pretrained=True)
Your images      .venv/bin/selfsup data pack YOUR_FOLDER data/mine
                 .venv/bin/selfsup train configs/mae/cifar10.yaml --data.shards data/mine --run.dir runs/mine
Every option     .venv/bin/selfsup train --help
END
