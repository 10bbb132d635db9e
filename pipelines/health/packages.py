"""Python and installed packages: our own ranges, Ray's extras, torch, and what breaks beside it."""

from __future__ import annotations

import gzip
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.health.check import Check, run_python

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PACKAGE = "clipfleet"
OLDEST_PYTHON = (3, 11)
NUM_DIGITS = 1797


def check_python() -> list[Check]:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info >= OLDEST_PYTHON:
        return [Check("Python", "ok", found)]
    oldest = ".".join(map(str, OLDEST_PYTHON))
    return [Check("Python", "fail", f"{found}, needs {oldest} or newer", f"python{oldest} -m venv .venv")]


def check_packages() -> list[Check]:
    """Installed versions against the ranges of our own metadata, extras such as ray[default] included."""
    try:
        required = requirements(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        found = f"{PACKAGE} is not installed, so its version ranges are unknown"
        return [Check("packages", "fail", found, "pip install -e . (in the checkout)")]
    bad = [check for requirement in required if (check := _check_requirement(requirement))]
    good = Check("packages", "ok", f"{len(required) - len(bad)} packages within our ranges")
    return [good, *bad, *_check_ray_extras(required)]


def requirements(package: str, *, extra: str = "") -> list[Requirement]:
    """What an installed package asks for on this machine; with an extra, what that alone adds."""
    from packaging.requirements import Requirement

    parsed = [Requirement(text) for text in importlib.metadata.requires(package) or []]
    if extra:
        conditional = [r for r in parsed if r.marker and not r.marker.evaluate({"extra": ""})]
        return [r for r in conditional if r.marker and r.marker.evaluate({"extra": extra})]
    return [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]


def _check_requirement(requirement: Requirement) -> Check | None:
    """None when the installed version is within the range."""
    version = _installed(requirement.name)
    fix = f"pip install '{_without_marker(requirement)}'"
    if version is None:
        return Check(requirement.name, "fail", "not installed", fix)
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(requirement.name, "fail", f"{version}, needs {requirement.specifier}", fix)
    return None


def _check_ray_extras(required: Sequence[Requirement]) -> list[Check]:
    """The parts of `ray[default,...]`; a plain `ray` imports without them and stops much later."""
    wanted = next((r for r in required if r.name == "ray"), None)
    version = _installed("ray")
    if wanted is None or version is None:
        return []
    extras = sorted(wanted.extras)
    parts = {part.name for extra in extras for part in requirements("ray", extra=extra)}
    missing = sorted(name for name in parts if _installed(name) is None)
    if missing:
        found = (
            f"missing {', '.join(missing)}: without its dashboard Ray never frees what stopped trials held"
        )
        return [Check("Ray extras", "fail", found, f"pip install '{_without_marker(wanted)}'")]
    return [Check("Ray extras", "ok", f"Ray {version} with {', '.join(extras)}")]


def _without_marker(requirement: Requirement) -> str:
    return str(requirement).partition(";")[0].strip()


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_torch() -> list[Check]:
    """Torch imports, and its build fits the GPUs of this machine."""
    code = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())"
    status, text = run_python(code)
    if status:
        return [Check("torch", "fail", f"import fails: {text}", "pip install --force-reinstall torch")]
    version, cuda, available = text.split()
    gpus = num_gpus()
    if available == "True":
        return [Check("torch", "ok", f"{version}, CUDA {cuda}, {gpus or 'some'} GPU(s)")]
    if gpus and cuda == "None":
        found = f"{gpus} GPU(s), but torch {version} is a build without CUDA"
        return [
            Check("torch", "fail", found, "install the CUDA build of that release, or set train.device=cpu")
        ]
    if gpus:
        found = f"{gpus} GPU(s), but torch {version} (CUDA {cuda}) cannot use them"
        return [Check("torch", "fail", found, "update the NVIDIA driver, or unset CUDA_VISIBLE_DEVICES")]
    return [Check("torch", "ok", f"{version}, on CPU: no GPU here")]


def num_gpus() -> int:
    """GPUs the driver lists, whatever torch thinks of them."""
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())


def check_torchvision() -> list[Check]:
    """A torchvision of another build than torch's breaks transformers, which imports it when it can."""
    if importlib.util.find_spec("torchvision") is None:
        return [Check("torchvision", "ok", "absent, and not needed")]
    status, text = run_python("import torchvision; print(torchvision.__version__)")
    if status:
        found = f"its import fails, and transformers fails with it: {text}"
        return [Check("torchvision", "fail", found, "pip uninstall torchvision")]
    return [Check("torchvision", "ok", f"{text} imports; not needed")]


def check_digits() -> list[Check]:
    """The handwritten digits of the embedded data, in scikit-learn's folder."""
    fix = "pip install --force-reinstall --no-deps scikit-learn"
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        return [Check("digits", "fail", "scikit-learn, which holds them, is not installed", fix)]
    file = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    try:
        with gzip.open(file) as lines:
            count = sum(1 for _ in lines)
    except (OSError, EOFError) as error:
        return [Check("digits", "fail", f"'{file}' cannot be read: {error}", fix)]
    if count != NUM_DIGITS:
        return [Check("digits", "fail", f"'{file}' holds {count} digits, not {NUM_DIGITS}", fix)]
    return [Check("digits", "ok", f"{count} handwritten digits")]
