"""Whether the libraries are there, new enough, fit together and can be imported."""

import importlib
import importlib.metadata
import platform
from collections.abc import Iterator

from selfsup.doctor.finding import Finding, one_line

IMPORTS = {
    "torch": "see pytorch.org for the command that fits this machine",
    "torchvision": "install torch and torchvision from one index, both cpu or both of one CUDA version: "
    "pip install --force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/cpu",
    "timm": "timm imports torchvision: mend that first, then pip install --upgrade timm",
    "accelerate": "pip install --upgrade accelerate",
    "webdataset": "pip install --upgrade webdataset",
    "torch.utils.tensorboard": "pip install --upgrade tensorboard",
    "safetensors.torch": "pip install --upgrade safetensors",
    "sklearn.linear_model": "pip install --upgrade scikit-learn",
}
"""What a run imports, and what to do where that fails."""


def check_versions() -> Iterator[Finding]:
    """Python and the installed libraries against what selfsup's package metadata asks for."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        about = importlib.metadata.metadata("selfsup")
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            "versions", "warning", "selfsup is not installed, its minima are unknown", "pip install -e ."
        )
        return
    python, wanted = platform.python_version(), about["Requires-Python"] or ""
    if SpecifierSet(wanted).contains(python, prereleases=True):
        yield Finding("python", "ok", f"{python}, selfsup {about['Version']}")
    else:
        yield Finding(
            "python", "problem", f"{python}, needed {wanted}", f"make the environment with Python {wanted}"
        )
    found, absent = [], []
    for line in importlib.metadata.requires("selfsup") or []:
        requirement = Requirement(line)
        optional = "extra" in str(requirement.marker or "")
        if requirement.marker is not None and not optional and not requirement.marker.evaluate():
            continue  # for another system
        version, wanted = _version(requirement.name), f"{requirement.name}{requirement.specifier}"
        if version is None and optional:
            absent.append(requirement.name)
        elif version is None or not requirement.specifier.contains(version, prereleases=True):
            text = f"{requirement.name}: needed {wanted}, got {version or 'none'}"
            yield Finding("versions", "warning" if optional else "problem", text, f'pip install "{wanted}"')
        else:
            found.append(f"{requirement.name} {version}")
    if absent:
        names = ", ".join(dict.fromkeys(absent))
        yield Finding("versions", "ok", f"optional and not installed: {names}")
    yield Finding("versions", "ok", ", ".join(dict.fromkeys(found)))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_imports() -> Iterator[Finding]:
    """That everything a run imports can be imported, torch and torchvision as a pair above all."""
    for name, fix in IMPORTS.items():
        try:
            importlib.import_module(name)
        except Exception as error:  # RuntimeError: operator torchvision::nms does not exist, OSError, ...
            yield Finding("imports", "problem", f"import {name} fails: {one_line(error)}", fix)
    yield from _check_torchvision_pair()


def _check_torchvision_pair() -> Iterator[Finding]:
    """torchvision is compiled against one version of torch and says which."""
    from packaging.requirements import Requirement

    torch_version = _version("torch")
    needs = [Requirement(r) for r in importlib.metadata.requires("torchvision") or []]
    for need in needs:
        if (
            need.name == "torch"
            and torch_version
            and not need.specifier.contains(torch_version, prereleases=True)
        ):
            text = f"torchvision {_version('torchvision')} was built for torch{need.specifier}, got {torch_version}"
            yield Finding("imports", "problem", text, IMPORTS["torchvision"])
            return
    yield Finding("imports", "ok", f"torchvision {_version('torchvision')} fits torch {torch_version}")


def check_simplejpeg() -> Iterator[Finding]:
    """That a JPEG written by simplejpeg is read back."""
    import numpy as np
    import simplejpeg

    grey = np.full((16, 16, 3), 128, dtype=np.uint8)
    back = simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(grey, quality=95))
    if back.shape == grey.shape and np.abs(back.astype(int) - 128).max() <= 2:
        yield Finding("simplejpeg", "ok", "writes and reads JPEG")
    else:
        yield Finding(
            "simplejpeg", "problem", "reads back another image", "pip install --force-reinstall simplejpeg"
        )
