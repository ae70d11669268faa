"""What the documentation names exists: files, links, dotted names, commands, experiments; its examples are valid."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name

import pytest
import yaml

from fairness_dft.fit import main as fit

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("data/*/README.md")),
]
PATH = re.compile(r"(?<![\w/.-])(?:\w+/)*[\w-]+\.(?:py|md|yaml)(?!\w)")
MADE_BY_THE_READER = {"tone.yaml", "config.yaml"}


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)


def inline_code(page: Path) -> list[str]:
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text_of(page))


def commands(page: Path) -> list[str]:
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines() + inline_code(page)
    return [found[0] for line in lines if (found := re.search(r"\b(?:fairness-dft|python -m|make) [^#|]+", line))]


def slug(heading: str) -> str:
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def page(request) -> Path:
    return request.param


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 7 * 1024


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"^ +- (?:[\w ]+: )?([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {file.name for file in ROOT.glob("docs/*.md")}


def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text_of(page)):
        file = page.parent / target if target else page
        if file.parent.name == "reference":
            room = ROOT / "fairness_dft" / file.stem
            assert file.stem in ("index", "commands") or room.is_dir() or room.with_suffix(".py").is_file(), target
            continue
        assert file.exists(), f"{page.name}: there is no {target}"
        headings = re.findall(r"^#+ (.+)$", text_of(file), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [slug(heading) for heading in headings], f"{page.name}: {target}#{anchor}"


def test_files_that_are_named_exist(page):
    roots = [ROOT, ROOT / "fairness_dft", ROOT / "experiments/classifiers", page.parent]
    named = {name for code in inline_code(page) for name in PATH.findall(code)}
    named -= MADE_BY_THE_READER
    assert [name for name in sorted(named) if not any((root / name).exists() for root in roots)] == []


def test_dotted_names_can_be_imported(page):
    for name in sorted(set(re.findall(r"\bfairness_dft(?:\.\w+)+", text_of(page)))):
        if "VERB" not in name and not name.startswith("fairness_dft.egg"):
            resolve_name(name)


def test_commands_and_their_experiments_exist(page):
    targets = re.findall(r"^(\w+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in commands(page):
        words = command.split()
        if words[0] == "make":
            assert words[1] in targets, command
        elif words[0] == "fairness-dft" and words[1] not in ("VERB", "COMMAND", "quickstart") and words[1][0] != "-":
            assert (ROOT / "fairness_dft" / f"{words[1].replace('-', '_')}.py").is_file(), command
        for name in re.findall(r"--config[ =]([\w/.]+)", command):
            folders = ROOT / "experiments", ROOT / "experiments/parts", ROOT / "experiments/classifiers"
            files = [ROOT / name, *(folder / f"{name}.yaml" for folder in folders)]
            assert name in MADE_BY_THE_READER or any(file.is_file() for file in files), command


def test_yaml_is_valid(page):
    for block in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(block), dict)


def test_python_compiles_and_imports_what_exists(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    resolve_name(f"{node.module}:{alias.name}")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, which stands in for the quickstart's."""
    output = tmp_path_factory.mktemp("runs")
    short = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.limit_test_batches=0"]
    short += ["--trainer.val_check_interval=1", "--data.init_args.images_per_prompt=2"]
    fit(["--config=quickstart", f"--output={output}", "--trainer.enable_progress_bar=false", *short])
    return output / "quickstart" / "version_0"


@pytest.mark.slow
def test_python_examples_run(run, tmp_path):
    examples = "\n\n".join(block for page in PAGES for block in blocks(page, "python"))
    assert "Evaluation.from_run" in examples and "load_lora_weights" in examples and "draw_portraits" in examples
    examples = re.sub("step_[0-9]{6}", "step_000001", examples.replace("6000", "60").replace("count=24", "count=2"))
    (tmp_path / "data").symlink_to(ROOT / "data")
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "version_0").symlink_to(run)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", examples], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    assert re.search("^ema: bias ", result.stdout, re.MULTILINE)
