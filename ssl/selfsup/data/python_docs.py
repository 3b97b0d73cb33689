"""A text everyone has: the documentation strings of the standard library of the Python at hand."""

import ast
import hashlib
import inspect
import sysconfig
import warnings
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from selfsup.data.pack import PackReport, Sample, pack_samples
from selfsup.data.tokenize import keep_tokens, train_on_shards
from selfsup.data.tokenizer import TOKENIZER_NAME, load_tokenizer
from selfsup.data.tokens import TokenIndex
from selfsup.durable import write_atomically

VOCAB_SIZE = 8192

_NOT_LIBRARY = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo",
    "__phello__", "__pycache__", "_bundled",
}  # fmt: skip
_LEAST = 200


class PythonDocs(NamedTuple):
    """What `make_python_docs` made. `str(made)` is the text for the user."""

    packed: dict[str, PackReport]
    tokens: dict[str, TokenIndex]
    left_out: int
    """Modules with less than 200 characters of documentation."""
    unreadable: int
    """Modules that are no valid Python."""

    def __str__(self) -> str:
        folder = self.tokens["train"].folder.parent
        lines = [f"{part}: {report}" for part, report in self.packed.items()]
        lines += [f"{part}: {index.tokens} tokens: {index.folder}" for part, index in self.tokens.items()]
        lines.append(f"{self.left_out} modules with less than {_LEAST} characters of documentation left out")
        if self.unreadable:
            lines.append(f"{self.unreadable} modules that this Python cannot parse left out")
        lines.append(f"tokenizer: wordpiece, {self.tokens['train'].vocab_size} tokens: {folder / TOKENIZER_NAME}")
        return "\n".join([*lines, "next: selfsup train configs/mlm/quickstart.yaml"])


def docstrings(source: str) -> list[str]:
    """Every documentation string of a module's source, cleaned of its indentation, in the order it stands there.

    Raises SyntaxError for what is no Python.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes
        tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    found = (ast.get_docstring(node, clean=False) for node in nodes)
    return [inspect.cleandoc(text) for text in found if text is not None and text.strip()]


def library_modules(folder: Path) -> dict[str, Path]:
    """Name -> file of the modules in a library's folder, sorted; no tests and no other people's packages."""
    modules = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if not _NOT_LIBRARY & {*parts} and not parts[0].startswith("config-"):
            modules[".".join(parts)] = path
    return modules


def is_test(module: str) -> bool:
    """Whether a module belongs to the tenth that is kept for testing: a rule of its name alone."""
    return int.from_bytes(hashlib.sha256(module.encode()).digest()[:4]) % 10 == 0


def make_python_docs(dest: Path, processes: int = 1, library: Path | None = None) -> PythonDocs:
    """Makes `dest/train` and `dest/test` (text shards), `dest/tokenizer.json`, and both again as token shards.

    A document is a module: its documentation strings with blank lines between. Called again it keeps what is
    there. library: the folder of the modules; None: the standard library's. Raises ValueError where there is
    no source code, and where `dest` holds something else.
    """
    folder = library or Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, list[Sample]] = {"train": [], "test": []}
    left_out = unreadable = 0
    for name, path in tqdm(library_modules(folder).items(), desc="read", unit="module", disable=None):
        try:
            text = "\n\n".join(docstrings(path.read_text(encoding="utf-8")))
        except (SyntaxError, ValueError):  # files that show what Python refuses
            unreadable += 1
            continue
        if len(text) < _LEAST:
            left_out += 1
            continue
        sample = Sample(name.replace(".", "/"), "txt", -1, text.encode(errors="replace"))
        parts["test" if is_test(name) else "train"].append(sample)
    if not all(parts.values()):
        raise ValueError(f"{folder}: no source code of the standard library; install it, or pack your own texts")
    packed = {part: pack_samples(samples, [], dest / part) for part, samples in parts.items()}
    tokenizer = dest / TOKENIZER_NAME
    trained = train_on_shards(packed["train"].index, "wordpiece", VOCAB_SIZE)
    if not tokenizer.exists():
        write_atomically(tokenizer, trained.json.encode())
    elif load_tokenizer(tokenizer).sha256 != trained.sha256:
        raise ValueError(f"{tokenizer}: not the tokenizer that these texts make; remove {dest}, or name another")
    tokens = {part: _tokens(report, tokenizer, processes) for part, report in packed.items()}
    return PythonDocs(packed, tokens, left_out, unreadable)


def _tokens(report: PackReport, tokenizer: Path, processes: int) -> TokenIndex:
    """Token shards beside the text shards."""
    texts = report.index
    return keep_tokens(texts, texts.folder.with_name(f"{texts.folder.name}-tokens"), tokenizer, processes)
