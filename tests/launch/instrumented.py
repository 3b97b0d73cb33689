"""`python instrumented.py -m MODULE ARGUMENT ...`: a module of selfsup with a test's instruments (see launcher.py).

SELFSUP_TEST is their JSON. One more is known here, `slow`: a path; while that file exists every micro-batch
takes `seconds`, so that a test can hold a run back and let it go.
"""

import json
import os
import runpy
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from launcher import instrument  # noqa: E402
from selfsup import start  # noqa: E402


def hold_back(file: Path, seconds: float) -> None:
    original = start.open_batches

    def open_batches(*arguments):
        inner = original(*arguments)
        try:
            for batch in inner:
                if file.exists():
                    time.sleep(seconds)
                yield batch
        finally:
            inner.close()

    start.open_batches = open_batches


if __name__ == "__main__":
    options = json.loads(os.environ.get("SELFSUP_TEST", "{}"))
    instrument(options)
    if "slow" in options:
        hold_back(Path(options["slow"]), options["seconds"])
    del sys.argv[: sys.argv.index("-m") + 1]  # torchrun puts -u before it
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
