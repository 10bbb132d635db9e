"""Every stored golden file is named by a test, and described."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.golden_files import GOLDEN

TESTS = Path(__file__).parent
STORED = sorted(path.stem for path in GOLDEN.glob("*.npz"))
SOURCES = {path.name: path.read_text() for path in TESTS.glob("*.py") if path.name != Path(__file__).name}


def families(text: str) -> list[str]:
    """Prefixes of files a test takes by pattern: glob("cloob_*.npz"), or f"aclip_random_masking_r{ratio}"."""
    by_number = [prefix for prefix in re.findall(r'f"(\w+_\w+)\{', text) if len(prefix) > 12]
    return re.findall(r'glob\("(\w+)\*\.npz"\)', text) + by_number


def is_used(stem: str) -> bool:
    return any(
        re.search(rf"\b{re.escape(stem)}\b", text) or stem.startswith(tuple(families(text)))
        for text in SOURCES.values()
    )


@pytest.mark.parametrize("stem", STORED)
def test_a_golden_file_is_used(stem):
    assert is_used(stem)


def test_a_file_nobody_reads_is_found():
    assert not is_used("no_such_file")
    assert STORED


def test_the_readme_names_every_file():
    readme = (GOLDEN / "README.md").read_text()
    for stem in STORED:
        # Families are listed by their first and last case.
        prefix = stem.split("_")[0]
        assert stem in readme or re.search(rf"\b{prefix}_", readme), stem
