"""`--help` of every command, read from the source without importing it, so that it answers at once and is always true.

A command's help says what it does, lists its own settings first, then the settings of `fairness_dft.fit` that users
change most, and every class that may be chosen, by its short name. `--help=all` is the parser's own, complete help.
"""

import ast
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from textwrap import fill, wrap

from fairness_dft.cli.configuration import shipped_names
from fairness_dft.files import shipped

PACKAGE = Path(__file__).resolve().parents[1]
WIDTH = 100
# The settings that users change most: the class that has the argument, and the argument's name there.
COMMON = {
    "model.attribute.name": ("Attribute", "name"),
    "model.attribute.target": ("Attribute", "target"),
    "model.semantics_weight": ("FairFinetuning", "semantics_weight"),
    "model.learning_rate": ("FairFinetuning", "learning_rate"),
    "data.init_args.file": ("OccupationPrompts", "file"),
    "data.init_args.images_per_prompt": ("PromptModule", "images_per_prompt"),
    "data.init_args.test_images_per_prompt": ("PromptModule", "test_images_per_prompt"),
}
TRAINER = {
    "trainer.max_steps": "Number of training steps.",
    "trainer.accelerator": "cpu, gpu, mps or auto.",
    "trainer.devices": "Number of devices, or auto.",
    "seed_everything": "Seed of every random number.",
}
# Where a class may be chosen, and the base class of what fits there.
CHOICES = {
    "model.generator": "TextToImage",
    "model.adapter": "Adapter",
    "model.judge.classifier": "AttributeClassifier",
    "model.judge.faces": "FaceFinder",
    "model.judge.faces.init_args.detectors": "FaceDetector",
    "model.features": "FeatureNet",
    "data": "PromptModule",
}
CLASSIFIER_CHOICES = {"data": "LabelledFaces"}


def answer_help(command: str, arguments: Sequence[str] | None = None) -> list[str]:
    """Print the help of a command and exit, if the arguments ask for it.

    Args:
        command: Name of its module.
        arguments: Arguments of the command line; those of the process by default.

    Returns:
        The arguments, in which `--help=all` is the parser's `--help`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(words):
        print(command_help(command), end="")
        raise SystemExit(0)
    return ["--help" if word == "--help=all" else word for word in words]


def program(command: str) -> str:
    """Return how the user calls a command."""
    called = Path(sys.argv[0])
    console = called.stem == "fairness-dft" or called == PACKAGE / "__main__.py"
    return f"fairness-dft {command.replace('_', '-')}" if console else f"python -m fairness_dft.{command}"


def commands() -> dict[str, str]:
    """Return the commands and what each does, in a line."""
    files = [
        file for file in sorted(PACKAGE.glob("[a-z]*.py")) if "\n    run_main(" in file.read_text(encoding="utf-8")
    ]
    return {file.stem: _summary(ast.get_docstring(_tree(file)) or "") for file in files}


def command_help(command: str) -> str:
    """Return the help of a command as text.

    Args:
        command: Name of its module.
    """
    source = PACKAGE / f"{command}.py"
    tree, name = _tree(source), program(command)
    settings = dict(_flags(tree)) | dict(_fields(tree))
    blocks = [ast.get_docstring(tree) or ""]
    configured = any(isinstance(node, ast.ClassDef) and node.name.endswith("CLI") for node in tree.body)
    fits = "FairnessCLI" in source.read_text(encoding="utf-8")
    if not (configured or fits):
        return "\n\n".join([f"usage: {name} --SETTING VALUE …", *blocks, _section("Settings", settings)]) + "\n"
    if fits:
        settings = dict(_flags(_classes()["FairnessCLI"])) | settings
    blocks.append(_section("Settings of this command", {"config": _config_text(fits), **settings}))
    if fits:
        common = {key: _argument(*where) for key, where in COMMON.items()}
        blocks.append(_section("Settings that are changed most", common | TRAINER))
    blocks.append(_choices(CHOICES if fits else CLASSIFIER_CHOICES))
    blocks.append("--help=all describes all settings; --config … --print_config prints all settings with their values.")
    return "\n\n".join([f"usage: {name} --config NAME_OR_FILE … --SETTING VALUE …", *blocks]) + "\n"


def _config_text(fits: bool) -> str:
    """Describe `--config` of a command that has it."""
    names = shipped_names() if fits else [f"classifiers/{f.stem}" for f in shipped("experiments/classifiers").glob("*")]
    return f"YAML file, or a shipped experiment by its name: {', '.join(sorted(names))}. Several: later ones win."


@lru_cache
def _tree(file: Path) -> ast.Module:
    """Parse a source file."""
    return ast.parse(file.read_text(encoding="utf-8"))


@lru_cache
def _classes() -> dict[str, ast.ClassDef]:
    """Return every class of the package by its name."""
    files = [file for file in PACKAGE.rglob("*.py") if "portraits" not in file.parts]
    nodes = (node for file in files for node in _tree(file).body)
    return {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}


def _public() -> set[str]:
    """Return the names in the `__all__` of every room, and the classes of modules that are rooms by themselves."""
    names = {node.name for file in PACKAGE.glob("*.py") for node in _tree(file).body if isinstance(node, ast.ClassDef)}
    for file in PACKAGE.glob("*/__init__.py"):
        for node in _tree(file).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                names |= set(ast.literal_eval(node.value))
    return names


def choosable(base: str) -> list[str]:
    """Return the public classes that may be chosen where a base class is expected.

    Args:
        base: Name of the base class.
    """
    classes = _classes()

    def inherits(name: str) -> bool:
        parents = [ast.unparse(parent) for parent in classes[name].bases] if name in classes else []
        return any(parent == base or inherits(parent) for parent in parents)

    return sorted(name for name in classes.keys() & _public() if inherits(name))


def _choices(choices: dict[str, str]) -> str:
    """List the classes that may be chosen, setting by setting."""
    lines = ["Classes that may be chosen, by these names or by an import path of your own:"]
    for setting, base in choices.items():
        lines.append(f"  --{setting}")
        summaries = {name: _summary(ast.get_docstring(_classes()[name]) or "") for name in choosable(base)}
        lines += _rows(summaries, "    ")
    return "\n".join(lines)


def _flags(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield every `add_argument("--name", …, help="…")` in a tree; a help may also be a constant of the module."""
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    constants = {ast.unparse(node.targets[0]): node.value for node in assigned}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".add_argument") and node.args:
            words = {word.arg: word.value for word in node.keywords}
            if isinstance(node.args[0], ast.Constant) and "help" in words:
                text = constants.get(ast.unparse(words["help"]), words["help"])
                yield str(node.args[0].value).removeprefix("--"), str(ast.literal_eval(text))


def _fields(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield the fields of a command's `Settings`."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == "Settings":
            yield from _arguments(node).items()


def _argument(class_name: str, name: str) -> str:
    """Return what the docstring of a class says of an argument, in its first sentence."""
    text = _arguments(_classes()[class_name]).get(name, "") if class_name in _classes() else ""
    return text.split(". ")[0].rstrip(".") + "." if text else ""


def _arguments(node: ast.ClassDef) -> dict[str, str]:
    """Parse the `Args:` of a class docstring in Google style."""
    arguments: dict[str, str] = {}
    lines = (ast.get_docstring(node) or "").partition("Args:\n")[2].splitlines()
    name = ""
    for line in lines:
        if not line.startswith("    "):
            break
        if not line.startswith("     "):
            name, _, text = line.strip().partition(": ")
            arguments[name] = text
        else:
            arguments[name] += f" {line.strip()}"
    return arguments


def _summary(docstring: str) -> str:
    """Return the first line of a docstring, without the command that it names."""
    return docstring.partition("\n")[0].partition(": `")[0].rstrip(".") + "."


def _section(title: str, settings: dict[str, str]) -> str:
    """List settings under a title."""
    return "\n".join([f"{title}:", *_rows({f"--{name}": text for name, text in settings.items()}, "  ")])


def _rows(texts: dict[str, str], indent: str) -> list[str]:
    """Set names and texts in two columns."""
    width = min(max((len(name) for name in texts), default=0), 24)
    rows = []
    for name, text in texts.items():
        hang = indent + " " * (width + 2)
        lines = wrap(text, WIDTH - len(hang))
        if len(name) > width:
            rows += [indent + name, *(hang + line for line in lines)]
        else:
            rows += [
                f"{indent}{name:<{width}}  {lines[0] if lines else ''}".rstrip(),
                *(hang + line for line in lines[1:]),
            ]
    return rows


def overview() -> str:
    """Return what `fairness-dft --help` prints."""
    names = {command.replace("_", "-"): text for command, text in commands().items()}
    names["quickstart"] = "Debias the miniature Stable Diffusion in a few minutes: fit --config quickstart."
    intro = "Finetune text-to-image diffusion models for fairness, and measure how fair they are."
    end = "fairness-dft COMMAND --help describes a command; `python -m fairness_dft.COMMAND` does the same."
    return "\n".join(
        ["usage: fairness-dft COMMAND …", "", intro, "", "Commands:", *_rows(names, "  "), "", fill(end, WIDTH), ""]
    )
