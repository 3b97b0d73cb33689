"""The suite over one kernel: a process for each group of cases, a verdict, a report."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

from selfsup.conformance.cases import ALL, Level
from selfsup.conformance.claims import FEATURES, Target
from selfsup.conformance.run import BAD, Result

GROUPS = (
    ("tail", "tiles", "logits", "absolute", "width", "scale", "large"),
    ("causal", "mask", "masked", "window", "softcap", "alibi", "documents", "empty", "pairs"),
    ("gqa", "lse", "double", "strides", "dropout"),
    ("calls", "property"),
)
"""Cases that share a process."""

CASE_SECONDS = 120.0
CRASHES_IN_A_ROW = 4
START_SECONDS = 300.0
"""For the imports, and a kernel's own first compilation."""


class Report(NamedTuple):
    """Everything there is to say of a kernel."""

    target: str
    level: Level
    verdict: Literal["pass", "fail", "error"]
    results: list[Result]
    claims: list[str] | None
    """None: nothing declared; what the kernel accepts is what it claims."""
    dtype: str
    causal_align: str
    left_out: int
    errors: list[str]
    seconds: float

    @property
    def exit_code(self) -> int:
        """0 pass, 1 fail, 2 could not be run."""
        return {"pass": 0, "fail": 1, "error": 2}[self.verdict]

    def accepted(self) -> list[str]:
        """The features with a case that was not refused."""
        used = {f for r in self.results if r.verdict != "REFUSED" for f in r.requires}
        return [f for f in FEATURES if f in used]

    def to_json(self) -> dict[str, Any]:
        """`verdict`, `claims`, `cases` and what else a machine may want."""
        claims = self.accepted() if self.claims is None else self.claims
        return {
            "target": self.target,
            "level": self.level,
            "verdict": self.verdict,
            "claims": claims,
            "claims_declared": self.claims is not None,
            "dtype": self.dtype,
            "causal_align": self.causal_align,
            "counts": dict(Counter(r.verdict for r in self.results)),
            "left_out_too_large": self.left_out,
            "errors": self.errors,
            "seconds": round(self.seconds, 1),
            "cases": [r._asdict() for r in self.results],
        }


def check(
    target: Target, level: Level, device: str = "cpu", seed: int = 0, interpret: bool = False, jobs: int = 1
) -> Report:
    """Runs the suite in processes of its own, `jobs` of them side by side."""
    began = time.perf_counter()
    request = {
        "target": target.name,
        "layout": target.layout,
        "features": target.features,
        "level": level,
        "seed": seed,
        "device": device,
        "interpret": interpret,
    }
    with ThreadPoolExecutor(jobs) as pool:
        groups = list(pool.map(lambda names: _Group(request, names).run(), GROUPS))
    results = [r for group in groups for r in group.results]
    errors = list(dict.fromkeys(e for group in groups for e in group.errors))
    facts = next((g.facts for g in groups if g.facts), {})
    failed = any(r.verdict in BAD for r in results)
    if results and not errors and not any(r.verdict in ("PASS", *BAD) for r in results):
        errors = ["every case was refused: nothing can be said of it"]
    verdict = "fail" if failed else "error" if errors or not results else "pass"
    return Report(
        target.name,
        level,
        verdict,
        results,
        facts.get("claims"),
        facts.get("dtype", "fp32"),
        facts.get("causal_align", "top_left"),
        facts.get("left_out", 0),
        errors,
        time.perf_counter() - began,
    )


class _Group:
    """The cases of one process, begun again after each crash behind the case that crashed."""

    def __init__(self, request: dict[str, Any], names: tuple[str, ...]):
        self.request = {**request, "groups": names}
        self.results: list[Result] = []
        self.errors: list[str] = []
        self.facts: dict[str, Any] = {}

    def run(self) -> "_Group":
        while self._process():
            pass
        return self

    def _process(self) -> bool:
        """One process to its end. True where cases are left, because it ended before its time."""
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if self.request["interpret"]:
            env["TRITON_INTERPRET"] = "1"
        with tempfile.TemporaryFile("w+") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", "selfsup.conformance.worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=env,
            )  # fmt: skip
            worker.stdin.write(json.dumps({**self.request, "done": [r.id for r in self.results]}).encode())
            worker.stdin.close()
            try:
                return self._listen(worker, log)
            finally:
                worker.kill()
                worker.wait()
                worker.stdout.close()

    def _listen(self, worker: subprocess.Popen, log: Any) -> bool:
        """Reads events to the end. True where a new process must go on."""
        started, limit, buffer = None, START_SECONDS, b""
        while True:
            if not select.select([worker.stdout], [], [], limit)[0]:
                return self._ended("TIMEOUT", started, f"no answer within {limit:g} s")
            chunk = os.read(worker.stdout.fileno(), 1 << 16)
            if not chunk:  # before it said that it was done, whatever its exit code
                code = worker.wait()
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                log.seek(0)
                return self._ended("CRASH", started, f"{how}: {log.read()[-600:].strip()}")
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                event = json.loads(line)
                limit = CASE_SECONDS
                if "error" in event:
                    self.errors.append(event["error"])
                    return False
                if "done" in event:
                    return False
                if "again" in event:
                    return self._goes_on()
                if "ready" in event:
                    self.facts = event
                elif "start" in event:
                    started = event
                else:
                    self.results.append(Result(**event["result"]))
                    started = None

    def _ended(self, verdict: Literal["CRASH", "TIMEOUT"], started: dict[str, Any] | None, how: str) -> bool:
        """Books the case that was under way; without one nothing can be run."""
        if started is None:
            self.errors.append(f"{self.request['target']}: the process ended outside of any case: {how}")
            return False
        case = next((c for c in ALL if c.id == started["start"]), None)
        facts = {"cites": case.cites, "requires": sorted(case.requires)} if case else {}
        self.results.append(Result(started["start"], verdict, how, reproducer=started["reproducer"], **facts))
        return self._goes_on()

    def _goes_on(self) -> bool:
        """Not after some crashes in a row: the rest would take its time limit for each case."""
        last = [r.verdict for r in self.results[-CRASHES_IN_A_ROW:]]
        if len(last) == CRASHES_IN_A_ROW and set(last) <= {"CRASH", "TIMEOUT"}:
            left = len(set(self.facts["ready"]) - {r.id for r in self.results})
            names = ", ".join(self.request["groups"])
            self.errors.append(f"{names}: given up after {CRASHES_IN_A_ROW} crashes in a row, {left} cases not run")
            return False
        return True
