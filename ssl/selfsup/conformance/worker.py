"""The process that foreign kernels run in: reads one request, writes an event a line.

An abort, a hang or a device lost here costs one case; the parent goes on with the next in a new process.
"""

import json
import os
import sys
import traceback

import torch

from selfsup.conformance.claims import Target
from selfsup.conformance.run import prepare, reproducer, run_case, select


def main() -> None:
    """{"target", "layout", "features", "level", "groups", "done", "seed", "device", "interpret"} on standard input."""
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a kernel prints is no event

    def say(**event: object) -> None:
        print(json.dumps(event), file=events, flush=True)

    request = json.load(sys.stdin)
    torch.set_num_threads(1)
    if request["interpret"]:
        from selfsup.conformance import interpreter

        interpreter.install()
    try:
        features = request["features"]
        target = Target(request["target"], request["layout"], None if features is None else tuple(features))
        kernel, base = prepare(target, request["device"])
    except ValueError as error:
        say(error=str(error))
        return
    except Exception:  # a fault in the file under test, or in the suite: both need the whole story
        say(error=traceback.format_exc())
        return
    chosen, left_out = select(kernel, request["level"], base, request["interpret"])
    mine = [c for c in chosen if c.group in request["groups"] and c.id not in request["done"]]
    claims = kernel.claims
    say(
        ready=[c.id for c in mine],
        claims=sorted(claims.features) if claims.declared else None,
        causal_align=kernel.causal_align,
        dtype=base.dtype,
        width=base.width,
        left_out=left_out,
    )
    for case in mine:
        paste = reproducer(kernel, case, case.make_inputs.shape, request["seed"], request["device"])
        say(start=case.id, reproducer=paste)
        result = run_case(kernel, case, request["seed"], request["device"])
        say(result=result._asdict())
        if result.verdict == "CRASH":  # the device is lost to this process
            say(again=True)
            return
    say(done=True)


if __name__ == "__main__":
    main()
