"""What the repository's settings name is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_folders_named_by_the_tools_exist():
    named = re.findall(r'^"(.+)/\*\*" =', (ROOT / "ruff.toml").read_text(), re.MULTILINE)
    named += re.search(r"find (.+) -name __pycache__", (ROOT / "Makefile").read_text())[1].split()
    assert named and [name for name in named if not (ROOT / name).is_dir()] == []
