"""Error messages of the parser, reduced to one line that says what to do."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from inspect import signature
from pydoc import locate

from jsonargparse import Namespace

# Parts of the parser's messages: those about its own search, and the types that it tried.
SEARCH = re.compile(
    r"Does not validate|Subtypes: |Errors:$|Given value|Expected a <class 'NoneType'>|Expected a path but "
)
CLASS = re.compile(r"Problem with given class_path '(.+?)':")
LEVEL = re.compile(rf"(?:- )?(?:Parser key \".+?\":|{CLASS.pattern})")
TYPE = r"<class '(?:\w+\.)*(\w+)'>|typing\.Literal\[(.+)\]|dot import path string"
EXPECTED = re.compile(rf"Expected a (?:{TYPE})(?:(?:\. Got value)?: (.*))?$")


def innermost(message: str, config: Namespace | None = None) -> str:
    """Return the reason for which the parser refused a value, with the key, without the alternatives that it tried.

    Args:
        message: Message of the parser, with lines for every level of nesting.
        config: The parsed configuration, to look up the key if the message has none.
    """
    keys = re.findall(r'Parser key "(.+?)":', message)
    given = re.search(r"Given value: (.*)", message)  # the first is the innermost
    if config and given:
        keys = [key for key, value in config.items(branches=True) if str(value) == given[1]][:1]
    where = f"--{'.'.join(keys)}: " if keys else ""
    lines = [line.strip().removeprefix("- ") for line in LEVEL.sub("", message).splitlines()]
    lines = [line for line in lines if line and not SEARCH.match(line)]
    types = [match for line in lines if (match := EXPECTED.match(line))]
    reasons = [line for line in lines if not EXPECTED.match(line)]
    if reasons or not types:
        return where + " ".join(reasons[:1] if given else reasons)
    types = [match for match in types if match[3]] or types
    other = "values in braces or a class by its import path"
    allowed = sorted(match[1] or (f"one of {match[2]}" if match[2] else other) for match in types)
    return f"{where}must be {' or '.join(allowed)}, but got {types[0][3] or (given[1] if given else None)}"


def way_out(message: str, options: Iterable[str], example: str) -> str:
    """Return what to do about a mistake that the parser only names; empty if the message says it.

    Args:
        message: Message of the parser.
        options: All options of the command line, without dashes.
        example: Arguments of a call.
    """
    if "arguments are required" in message:
        return f"; give them, for example {example}"
    unknown = re.search(r"unrecognized arguments: -*([^ =]+)|(?:Group '(.+)' .+ o|O)ption '(.+?)'", message)
    if not unknown:
        return ""
    name, dashes, options = ".".join(filter(None, unknown.groups())), "--", set(options)
    more = "--print_config" if "config" in options else "--help"
    if name.endswith((".yaml", ".yml")):
        return f"; write --config {name}"
    if classes := CLASS.findall(message):
        parents = getattr(locate(classes[-1]), "__mro__", ())
        options, dashes = {option for parent in parents for option in signature(parent.__init__).parameters}, ""
    close = get_close_matches(name, options - {name}, n=1)
    if close:
        return f"; did you mean {dashes}{close[0]}?"
    return f"; {more} shows all settings"
