"""What the repository's settings name is there."""

import re
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parents[1]
USED_BY_OTHERS = {
    "accelerate",  # diffusers and transformers, to load weights
    "omegaconf",  # jsonargparse, to resolve ${...}
    "tensorboard",  # lightning, to write curves
}


def test_folders_named_by_the_tools_exist():
    named = re.findall(r'^"(.+)/\*\*" =', (ROOT / "ruff.toml").read_text(), re.MULTILINE)
    named += re.search(r"find (.+) -name __pycache__", (ROOT / "Makefile").read_text())[1].split()
    assert named and [name for name in named if not (ROOT / name).is_dir()] == []


def test_every_requirement_is_used():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].split()
    modules = {"pillow": "PIL", "opencv": "cv2", "pyyaml": "yaml"}
    required = {modules.get(name, name) for name in (re.match(r"\w+", line)[0] for line in lines)}
    code = "\n".join(file.read_text() for file in (ROOT / "fairness_dft").rglob("*.py"))
    imported = set(re.findall(r"^ *(?:from (?=[\w.]+ import )|import )(\w+)", code, re.MULTILINE))
    assert required - imported - USED_BY_OTHERS == set()
    assert imported - required - set(sys.stdlib_module_names) - {"fairness_dft"} == set()
