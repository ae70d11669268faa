"""What is printed in the terminal, as text."""

import io

from rich.console import Console

from fairness_dft.reports.tables import print_results


def printed(found: dict) -> str:
    stream = io.StringIO()
    print_results(found, Console(file=stream, width=200))
    return stream.getvalue()
