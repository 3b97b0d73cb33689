"""Whether a run folder can be written and locked, and shards are as indexed."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from selfsup.doctor.finding import Finding

GIB = 2**30
_NEEDED, _WANTED = 1 * GIB, 10 * GIB
"""Free disk below which a run is likely to die, and below which it may."""

_TRY_LOCK = """
import fcntl, sys
with open(sys.argv[1], "w") as file:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        sys.exit(3)
"""
"""Run by a second process: exit code 3 where the lock is held."""


def check_run_folder(run_dir: Path) -> Iterator[Finding]:
    """Writing, renaming and locking where runs go, in a folder that is removed again; free disk."""
    place = existing(run_dir.expanduser().absolute())
    elsewhere = f"choose another --run.dir, or make {place} writable"
    if not place.is_dir():
        yield Finding("run folder", "problem", f"{run_dir}: {place} is a file", "choose another --run.dir")
        return
    try:
        with tempfile.TemporaryDirectory(prefix=".selfsup-doctor-", dir=place) as folder:
            yield try_writing(Path(folder), run_dir)
            yield try_locking(Path(folder) / "lock", run_dir)
    except OSError as error:
        text = f"{run_dir}: cannot be written: {error.strerror or error}"
        yield Finding("run folder", "problem", text, elsewhere)
    yield disk_finding(shutil.disk_usage(place).free, place)


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(p for p in (path, *path.parents) if p.exists())


def try_writing(folder: Path, run_dir: Path) -> Finding:
    """A file written, flushed and renamed, as checkpoints are. Raises OSError where that fails."""
    from selfsup.durable import fsync_path

    (folder / "a").write_bytes(b"doctor")
    fsync_path(folder / "a")
    os.rename(folder / "a", folder / "b")
    fsync_path(folder)
    return Finding("run folder", "ok", f"{run_dir}: can be written")


def try_locking(path: Path, run_dir: Path) -> Finding:
    """Whether a second process sees our lock: it is what keeps two runs out of one folder."""
    import fcntl

    fix = "put runs on a local disk; network file systems need a lock service (NFS: mount without nolock)"
    with path.open("w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return Finding("file lock", "problem", f"{run_dir}: cannot lock files: {error.strerror}", fix)
        done = subprocess.run([sys.executable, "-c", _TRY_LOCK, str(path)], capture_output=True, text=True)
    if done.returncode == 3:
        return Finding("file lock", "ok", f"{run_dir}: a second run would be kept out")
    why = " ".join(done.stderr.split()) or "a second process did not see the lock"
    return Finding("file lock", "problem", f"{run_dir}: file locks do not work: {why}", fix)


def disk_finding(free: int, place: Path) -> Finding:
    """free: bytes on the file system of `place`."""
    text = f"{free / GIB:.1f} GiB free at {place}"
    if free >= _WANTED:
        return Finding("disk", "ok", text)
    state = "problem" if free < _NEEDED else "warning"
    return Finding(
        "disk", state, text, "make room, choose another --run.dir, or a smaller --run.keep-checkpoints"
    )


def check_shards_folder(shards: str) -> Iterator[Finding]:
    """The index is there and says what the shards are; those changed since are hashed again."""
    from selfsup.data.index import check_shards, local_folder, open_shards
    from selfsup.data.tokens import check_tokens, is_token_folder, open_tokens

    try:
        if is_token_folder(local_folder(shards)):
            tokens = open_tokens(shards)
            hashed = check_tokens(tokens, all=False)
            again = f", {len(hashed)} newer than the index and hashed again" if hashed else ""
            text = f"{tokens.folder}: {len(tokens)} documents, {tokens.tokens} tokens as indexed{again}"
            yield Finding("shards", "ok", text)
            return
        index = open_shards(shards, None)
        hashed = check_shards(index, all=False)
    except ValueError as error:
        text, _, fix = str(error).partition("; ")
        yield Finding("shards", "problem", text, fix or "name a folder of WebDataset shards")
        return
    again = f", {len(hashed)} newer than the index and hashed again" if hashed else ""
    text = f"{index.folder}: {len(index)} {index.what} in {len(index.shards)} shards as indexed{again}"
    yield Finding("shards", "ok", text)
    for reason, count in index.skipped.items():
        fix = f"see what is missing with: selfsup data index {index.folder}"
        yield Finding("shards", "warning", f"{index.folder}: {count} {reason} left out of the index", fix)
