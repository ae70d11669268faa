"""Print results as in the terminal, and return the text."""

import io

from rich.console import Console

from fairness_dft.reports.results import Results
from fairness_dft.reports.tables import print_results


def printed(results: Results, width: int = 200) -> str:
    stream = io.StringIO()
    print_results(results, Console(file=stream, width=width))
    return stream.getvalue()
