"""Files that a crash cannot leave half-written."""

import hashlib
import os
from pathlib import Path


def fsync_path(path: Path) -> None:
    """Flushes a file, or the renames in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that a crash at any moment leaves the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_bytes(content)
    fsync_path(temporary)
    os.replace(temporary, path)
    fsync_path(path.parent)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
