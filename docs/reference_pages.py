"""Adds to the site a reference page for each room of the package, so that no module is left out of it.

It also keeps the figures of tables on one line: "0.30 ± 0.22" does not wrap.
"""

import ast
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PACKAGE = Path(__file__).parents[1] / "fairness_dft"
COMMANDS = "commands"  # the page of the modules that lie in no room
FIGURES = re.compile(r"(?<=\d) ([±–→]) (?=\d)")
NOT_COMMANDS = ("attributes", "features", "files", "randomness")  # nouns that need only one file


def rooms() -> dict[str, list[str]]:
    """Return the dotted names of the modules of each page, by the page's name."""
    top = [file.stem for file in sorted(PACKAGE.glob("*.py")) if not file.stem.startswith("_")]
    pages = {name: [f"fairness_dft.{name}"] for name in top if name in NOT_COMMANDS}
    pages[COMMANDS] = [f"fairness_dft.{name}" for name in top if name not in NOT_COMMANDS]
    for folder in PACKAGE.iterdir():
        if (folder / "__init__.py").is_file():
            files = [file.stem for file in sorted(folder.glob("*.py")) if not file.stem.startswith("_")]
            pages[folder.name] = [f"fairness_dft.{folder.name}.{name}" for name in files]
    return dict(sorted(pages.items()))


def summary(file: Path) -> str:
    """Return the first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def page(name: str, modules: list[str]) -> str:
    """Return the Markdown of one page."""
    folder = PACKAGE / name / "__init__.py"
    head = summary(folder) if folder.is_file() else ""
    return "\n\n".join([f"# {name}", head, *(f"::: {module}" for module in modules)])


def index(pages: dict[str, list[str]]) -> str:
    """Return the Markdown of the list of pages: every module with its summary."""
    lines = ["# Reference", "Each room of the package, and the modules in it. YAML names a class by its room:"]
    lines[-1] += " `fairness_dft.sampling.Sampler`, `fairness_dft.adapters.TextEncoderLoRA`."
    for name, modules in pages.items():
        rows = [
            f"| [`{module.removeprefix('fairness_dft.')}`]({name}.md#{module}) | "
            f"{summary(PACKAGE.parent / (module.replace('.', '/') + '.py'))} |"
            for module in modules
        ]
        lines += [f"## [{name}]({name}.md)", "\n".join(["| module | what it holds |", "|---|---|", *rows])]
    return "\n\n".join(lines)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the pages to the navigation, after the reference's own index."""
    section = next(entry["Reference"] for entry in config.nav or [] if "Reference" in entry)
    section[1:] = [f"reference/{name}.md" for name in rooms()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages to the site."""
    pages = rooms()
    files.append(File.generated(config, "reference/index.md", content=index(pages)))
    for name, modules in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=page(name, modules)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put no-break spaces into the figures of tables."""
    lines = markdown.split("\n")
    return "\n".join(
        FIGURES.sub("\N{NO-BREAK SPACE}\\1\N{WORD JOINER}\N{NO-BREAK SPACE}", x) if x.startswith("|") else x
        for x in lines
    )
