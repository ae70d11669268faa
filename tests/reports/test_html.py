"""The page of an audit: its figures, its bars, and that it needs nothing else."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from fairness_dft.metrics.bias import summarize_bias
from fairness_dft.prompts.files import Prompt
from fairness_dft.reports.build import Measured, build_results
from fairness_dft.reports.html import SHOWN, colours, html_report, shown_classifier, write_html
from fairness_dft.reports.results import Results

PROMPTS = ["a chef", "a <script>alert(1)</script> & co", "nobody", "a judge", "a pilot", "a nurse", "a baker", "a poet"]
BEFORE = [[9, 1], [2, 8], [0, 0], [6, 4], [10, 0], [1, 9], [7, 3], [8, 2]]
AFTER = [[6, 4], [5, 5], [0, 0], [4, 6], [8, 2], [3, 7], [5, 5], [10, 0]]
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def content(
    after: list[list[int]] | None = AFTER,
    wanted: float = 0.25,
    naming: tuple[int, ...] = (),
    independent: tuple[str, ...] = ("woman", "man"),
) -> Results:
    """By a training judge and an independent one, whose classes are in another order; some prompts name gender."""
    names = [(("gender", "man"), ("age", "young")) if index in naming else () for index in range(8)]
    names[0] = names[0] or ((("age", "young"),) if after else ())
    concepts = ["person"] * 4 + ["work"] * 4
    prompts = [Prompt(*of) for of in zip(PROMPTS, PROMPTS, concepts, names, strict=True)]
    no_face = torch.tensor([0, 0, 10, 0, 0, 0, 0, 0])
    summaries = {}
    for judge, classes in (("training", ("man", "woman")), ("independent", independent)):
        for model, counts in (("original", BEFORE), ("ema", after)):
            if counts is not None:
                table = torch.tensor(counts)
                table = table if judge == "training" else table.flip(1)
                summaries[judge, "gender", model] = summarize_bias(table, no_face, classes)
                if judge == "training":
                    summaries[judge, "gender×age", model] = summarize_bias(table, no_face, ("man, young", "woman, old"))
                    summaries[judge, "age", model] = summarize_bias(table, no_face, ("young", "old"))
    kept = {("clip_t", "original"): 0.31, ("clip_t", "ema"): 0.3} if after else {("clip_t", "original"): 0.31}
    agreement = {("training", "independent", "gender", model): 0.9 for model in ("original", "ema")}
    measured = Measured(summaries, kept, agreement)
    return build_results(["gender"], {"gender": {"man": wanted, "woman": 1 - wanted}}, prompts, measured)


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
        if {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data


METHOD = ["Drawn by hand.", "The classifier “training” is <mine>."]


def page(after: list[list[int]] | None = AFTER, wanted: float = 0.25) -> str:
    drawn = []

    def grid(index: int) -> Image.Image:
        drawn.append(index)
        return Image.new("RGB", (40, 20))

    found = html_report("mine", content(after, wanted), "seed: 0\nname: </pre>", METHOD, grid)
    far = [abs(a - b) / max(a + b, 1) if wanted == 0.5 else abs(a / max(a + b, 1) - wanted) for a, b in after or BEFORE]
    order = sorted((i for i in range(8) if i != 2), key=lambda i: -far[i])
    assert drawn == [*order[:SHOWN], *order[-SHOWN:]]
    return found


def blank(index: int) -> Image.Image:
    return Image.new("RGB", (4, 4))


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
        models = found.bias[judge]["gender"]
        before, after = models.original, models.ema
        sides = [
            "{bias:.2f} ± {spread:.2f}{low:.2f} – {high:.2f}; floor {floor:.2f}".format(**vars(side))
            for side in (before, after)
        ]
        above = f"{before.above_floor:.2f} → {after.above_floor:.2f}"
        assert after.unbiased_rms_gap_low is None  # of eight prompts
        gap = (
            f"{before.unbiased_rms_gap:.2f} → {after.unbiased_rms_gap:.2f}fair < {after.unbiased_rms_gap_by_chance:.2f}"
        )
        assert [
            "gender", judge, *sides, above, gap, f"{models.p_value:.3f}",
            f"{models.drift:.2f}", "12.5 % → 12.5 %",
        ] in rows  # fmt: skip
        of = [vars(before.distance), vars(after.distance)]
        keys = ("total_variation_by_prompt", "total_variation", "kullback_leibler")
        each, whole, divergence = (" → ".join(f"{side[key]:.2f}" for side in of) for key in keys)
        low, high, floor = (of[1][f"total_variation_by_prompt_{key}"] for key in ("low", "high", "floor"))
        each += f"{low:.2f} – {high:.2f}; floor {floor:.2f}"
        assert ["gender", judge, "man 0.25; woman 0.75", each, whole, divergence] in rows
        for concept in ("person", "work"):
            assert [row for row in rows if row[:3] == [concept, "gender", judge]]
    assert ["clip_t", "0.310", "0.300"] in rows
    assert ["clip_t", "0.310", "0.300"] in rows
    share = found.classifier_overfit["independent"]["gender"]
    assert ["training, independent", "gender", "0.900", "0.900", "–" if share is None else f"{share:.2f}"] in rows
    assert ["clip_t", "0.310"] in Page(page(None)).cells
    (row,) = [row for row in rows if row[:2] == ["age", "training"] and "images" in row[-1]]
    assert row[2] == "0.9000.596 – 0.982; 10 images" and row[3] == "0.6000.313 – 0.832; 10 images"
    assert "obeyed" not in page(None)
    assert "is &lt;mine&gt;." in page() and "Drawn by hand." in page()


def test_prompts_are_ordered_by_what_their_target_asks_for() -> None:
    assert "the distance from the target after, the largest first" in page(wanted=0.25)
    assert "the bias after, the largest first" in page(wanted=0.5)


def test_prompts_that_name_what_is_aligned_have_bars_and_no_figure() -> None:
    shown = html_report("mine", content(naming=(0, 1)), "", METHOD, blank)
    assert "2 of 8 prompts name an attribute of gender themselves" in shown
    last = shown.split('<div class="prompt')[-3:]  # the nameless one, and two without a figure
    assert all('<span class="figure">–</span>' in row for row in last)
    assert "before: woman 10 %, man 90 %" in "".join(last)
    every = html_report("mine", content(naming=tuple(range(8))), "", METHOD, blank)
    assert "Every prompt names these attributes itself" in every and "above floor" not in every.split("By concept")[0]
    assert "<h2>Pictures</h2>" in every


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
    found = content(independent=("Female", "Male"))
    assert "<u style" not in html_report("mine", found, "", METHOD, blank)


def test_the_verdict_shown_is_the_independent_one_where_it_reads_what_is_aligned() -> None:
    found = content()
    found.bias["another"] = found.bias["training"]
    assert shown_classifier(found) == "independent"
    found.bias["independent"] = {"age": found.bias["independent"]["gender"]}
    assert shown_classifier(found) == "training"


def test_classes_have_colours_of_their_own() -> None:
    for count in (2, 7, 8, 16):
        assert len(set(colours(count))) == count


def test_one_prompt_is_neither_the_most_nor_the_least_biased() -> None:
    summary = summarize_bias(torch.tensor([[4, 0]]), torch.tensor([0]), ("man", "woman"))
    measured = Measured({("training", "gender", "original"): summary})
    one = build_results(["gender"], {}, [Prompt("a chef", "chef", "work")], measured)
    shown = html_report("mine", one, "", [], blank)
    assert (
        "among the" not in shown
        and "1 prompt." in shown
        and "before" not in shown.split("<main>")[1].split("<h2>Limits")[0]
    )


LOOKS = {"wide": (1280, []), "phone": (390, []), "dark": (1280, ["--blink-settings=preferredColorScheme=0"])}


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("look", LOOKS)
def test_browser_shows_all_of_it_without_complaint(look: str, tmp_path: Path) -> None:
    width, more = LOOKS[look]
    write_html(tmp_path / "report.html", page())
    browse(tmp_path, *more, f"--window-size={width},6000", f"--screenshot={tmp_path / 'page.png'}")
    with Image.open(tmp_path / "page.png") as opened:
        picture = opened.convert("RGB")
    assert picture.width == width
    edge = picture.crop((width - 8, 0, width, picture.height))
    assert len(edge.getcolors(1 << 24)) == 1  # nothing reaches beyond the page's margin
    assert (sum(picture.getpixel((0, 0))) < 150) == (look == "dark")
    end = picture.crop((0, 5900, width, 6000))
    assert len(end.getcolors(1 << 24)) == 1  # the page ended before, and all of it was seen


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_tables_fit_a_desktop(tmp_path: Path) -> None:
    width = "[...document.querySelectorAll('.scroll')].map(table => table.scrollWidth - table.clientWidth)"
    write_html(tmp_path / "report.html", page() + f"<script>document.title = {width}</script>")
    shown = browse(tmp_path, "--window-size=1280,2000", "--dump-dom")
    assert set(re.search("<title>(.*)</title>", shown)[1].split(",")) == {"0"}


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_browser_prints_what_is_folded_too(tmp_path: Path) -> None:
    pages = {}
    for name, settings in (("short", "seed: 0"), ("long", "seed: 0\n" * 500)):
        write_html(tmp_path / "report.html", html_report("mine", content(), settings, METHOD, blank))
        browse(tmp_path, f"--print-to-pdf={tmp_path / f'{name}.pdf'}")
        pages[name] = len(re.findall(rb"/Type /Page\b", (tmp_path / f"{name}.pdf").read_bytes()))
    assert pages["short"] >= 2 and pages["long"] > pages["short"] + 5


def browse(folder: Path, *arguments: str) -> str:
    """What the browser prints."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    command += [f"--user-data-dir={folder}", *arguments, f"file://{folder / 'report.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    return done.stdout
