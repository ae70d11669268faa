"""The console command: `fairness-dft COMMAND …`, the same as `python -m fairness_dft.COMMAND …`."""

import sys
from difflib import get_close_matches
from importlib import import_module

from fairness_dft import __version__
from fairness_dft.cli.help import answer_help, commands, overview


def main(arguments: list[str] | None = None) -> None:
    """Run the command that the first argument names.

    Args:
        arguments: Arguments of the command line; those of the process by default.
    """
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in ("-h", "--help"):
        print(overview(), end="")
        return
    if verb == "--version":
        print(f"fairness_dft {__version__}")
        return
    name, before = ("fit", ["--config=quickstart"]) if verb == "quickstart" else (verb.replace("-", "_"), [])
    if name not in commands():
        close = get_close_matches(verb, [*(known.replace("_", "-") for known in commands()), "quickstart"], n=1)
        hint = f"did you mean {close[0]}?" if close else "fairness-dft --help lists them"
        print(f"error: there is no command {verb!r}; {hint}", file=sys.stderr)
        raise SystemExit(2)
    rest = [*before, *answer_help(name, rest)]
    from fairness_dft.cli.commands import run_main  # imports torch, which takes seconds

    run_main(lambda: import_module(f"fairness_dft.{name}").main(rest))


if __name__ == "__main__":
    main()
