"""The page of an audit: its figures, its bars, and that it needs nothing else."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from fairness_dft.html_report import SHOWN, colours, html_report, shown_judge, write_html
from fairness_dft.metrics import summarize_bias
from fairness_dft.results import results

PROMPTS = ["a chef", "a <script>alert(1)</script> & co", "nobody", "a judge", "a pilot", "a nurse", "a baker", "a poet"]
BEFORE = [[9, 1], [2, 8], [0, 0], [6, 4], [10, 0], [1, 9], [7, 3], [8, 2]]
AFTER = [[6, 4], [5, 5], [0, 0], [4, 6], [8, 2], [3, 7], [5, 5], [10, 0]]
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def content(after: list[list[int]] | None = AFTER) -> dict:
    """By a training judge and an independent one, whose classes are in another order."""
    faceless = torch.tensor([0, 0, 10, 0, 0, 0, 0, 0])
    summaries = {}
    for judge, classes in (("training", ("man", "woman")), ("independent", ("woman", "man"))):
        for model, counts in (("original", BEFORE), ("ema", after)):
            if counts is not None:
                table = torch.tensor(counts)
                table = table if judge == "training" else table.flip(1)
                summaries[judge, "gender", model] = summarize_bias(table, faceless, classes)
    kept = {("clip_t", "original"): 0.31, ("clip_t", "ema"): 0.3} if after else {("clip_t", "original"): 0.31}
    target = {"gender": {"man": 0.25, "woman": 0.75}}
    agreement = {("training", "independent", "gender", model): 0.9 for model in ("original", "ema")}
    return results(["gender"], target, summaries, kept, {"test_prompts": PROMPTS}, {}, agreement)


class Page(HTMLParser):
    """Tags with their attributes, the text of cells, and whether every tag is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.cells: list[list[str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1][-1] += data


def page(after: list[list[int]] | None = AFTER) -> str:
    drawn = []

    def grid(index: int) -> Image.Image:
        drawn.append(index)
        return Image.new("RGB", (40, 20))

    found = html_report("mine", content(after), "seed: 0\nname: </pre>", grid)
    bias = [abs(a - b) / max(a + b, 1) for a, b in after or BEFORE]
    order = sorted((i for i in range(8) if i != 2), key=lambda i: -bias[i])
    assert drawn == [*order[:SHOWN], *order[-SHOWN:]]
    return found


@pytest.mark.parametrize("after", [AFTER, None])
def test_page_is_whole_and_needs_nothing_else(after: list[list[int]] | None) -> None:
    parsed = Page(page(after))
    assert parsed.open == []
    assert not [tag for tag, _ in parsed.tags if tag == "script"]
    links = [value for _, attributes in parsed.tags for key, value in attributes.items() if key in ("src", "href")]
    assert links and all(link.startswith("data:") for link in links)
    assert "url(" not in page(after) and "@import" not in page(after)


def test_tables_hold_the_figures() -> None:
    found, rows = content(), Page(page()).cells
    for judge in ("training", "independent"):
        models = found["bias"][judge]["gender"]
        before, after = models["original"], models["ema"]
        sides = [f"{side['bias']:.2f} ± {side['spread']:.2f}" for side in (before, after)]
        gap = f"{before['gap']:.2f} → {after['gap']:.2f} ({after['gap_low']:.2f} – {after['gap_high']:.2f})"
        assert [
            "gender", judge, *sides, f"{after['low']:.2f} – {after['high']:.2f}", f"{after['floor']:.2f}",
            gap, f"< {after['gap_by_chance']:.2f}", f"{models['p_value']:.3f}",
            f"{models['drift']:.2f}", "12.5 % → 12.5 %",
        ] in rows  # fmt: skip
    assert ["clip_t", "0.310", "0.300"] in rows
    assert ["training, independent", "gender", "0.900", "0.900", "0.00"] in rows
    assert ["clip_t", "0.310"] in Page(page(None)).cells


def test_obedience_is_told_where_prompts_name_attributes() -> None:
    assert "obeyed" not in page()
    found = content() | {"obedience": {"training": {"age": {"original": 0.9, "ema": 0.8}}}}
    assert ["age", "training", "0.900", "0.800"] in Page(
        html_report("mine", found, "", lambda index: Image.new("RGB", (4, 4)))
    ).cells


def test_bars_are_the_frequencies_and_lines_the_target() -> None:
    row = re.compile(
        r'<div class="prompt"><span class="name">(.*?)</span>(.*?)(?=<div class="prompt">|<h2>)', re.DOTALL
    )
    shown = row.findall(page())
    assert len(shown) == 8 and shown[-1][0] == "nobody" and "no face" in shown[-1][1]
    for name, bars in shown:
        index = PROMPTS.index(name.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
        widths = [float(width) for width in re.findall(r"width: ([\d.]+)%", bars)]
        expected = [10 * count for counts in (BEFORE, AFTER) for count in reversed(counts[index]) if name != "nobody"]
        assert widths == pytest.approx(expected)  # of the independent classifier, women first
        assert re.findall(r"left: ([\d.]+)%", bars) == ["75.0", "75.0"]
        if name != "nobody":
            told = re.findall(r'aria-label="(\w+): woman (\d+) %, man (\d+) %"', bars)
            sides = [("before", BEFORE[index]), ("after", AFTER[index])]
            assert told == [(side, str(10 * women), str(10 * men)) for side, (men, women) in sides]
    assert "<script>alert" not in page() and "</pre>" in page() and "&lt;/pre&gt;" in page()


def test_a_judge_with_other_classes_has_no_target_lines() -> None:
    found = content()
    for model in ("original", "ema"):
        found["bias"]["independent"]["gender"][model]["classes"] = ["Female", "Male"]
    assert "<u style" not in html_report("mine", found, "", lambda index: Image.new("RGB", (4, 4)))


def test_the_verdict_shown_is_the_independent_one_where_it_reads_what_is_aligned() -> None:
    found = content()
    found["bias"]["another"] = found["bias"]["training"]
    assert shown_judge(found) == "independent"
    found["bias"]["independent"] = {"age": found["bias"]["independent"]["gender"]}
    assert shown_judge(found) == "training"


def test_classes_have_colours_of_their_own() -> None:
    for count in (2, 7, 8, 16):
        assert len(set(colours(count))) == count


def test_one_prompt_is_neither_the_most_nor_the_least_biased() -> None:
    summary = summarize_bias(torch.tensor([[4, 0]]), torch.tensor([0]), ("man", "woman"))
    one = results(["gender"], {}, {("training", "gender", "original"): summary}, {}, {"test_prompts": ["a chef"]})
    shown = html_report("mine", one, "", lambda index: Image.new("RGB", (4, 4)))
    assert (
        "among the" not in shown
        and "1 prompt." in shown
        and "before" not in shown.split("<main>")[1].split("<h2>Limits")[0]
    )


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_browser_shows_it_without_complaint(width: int, tmp_path: Path) -> None:
    write_html(tmp_path / "report.html", page())
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}",
    ]
    command += [
        f"--window-size={width},1500",
        f"--screenshot={tmp_path / 'page.png'}",
        f"file://{tmp_path / 'report.html'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.width == width
        edge = picture.convert("RGB").crop((width - 8, 0, width, picture.height))
        assert len(edge.getcolors(1 << 24)) == 1  # nothing reaches beyond the page's margin
