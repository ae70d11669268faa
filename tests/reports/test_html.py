"""The page of an audit: what it says, its figures, that it needs nothing else, and that it fits every screen."""

import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from fairness_dft.metrics.bias import summarize_bias
from fairness_dft.metrics.image_readings import Readings
from fairness_dft.prompts.files import Prompt
from fairness_dft.reports.build import Measured, build_results
from fairness_dft.reports.csv_tables import image_table
from fairness_dft.reports.html import SHOWN, ReportImages, html_report, write_html
from fairness_dft.reports.results import Results, RunFacts
from fairness_dft.reports.view import colors, headline, shown_classifier

PROMPTS = ["a chef", "a <script>alert(1)</script> & co", "nobody", "a judge", "a pilot", "a nurse", "a baker", "a poet"]
BEFORE = [[9, 1], [2, 8], [0, 0], [6, 4], [10, 0], [1, 9], [7, 3], [8, 2]]
AFTER = [[6, 4], [5, 5], [0, 0], [4, 6], [8, 2], [3, 7], [5, 5], [10, 0]]
PAIRS = torch.tensor([[[5, 4, 0], [1, 0, 0], [0, 0, 0]]] * 8)
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
RUN = RunFacts(date="2026-02-03", model="data/<mine>", images_per_prompt=10)


def content(
    after: list[list[int]] | None = AFTER,
    wanted: float = 0.25,
    naming: tuple[int, ...] = (),
    independent: tuple[str, ...] = ("woman", "man"),
    run: RunFacts = RUN,
    before: list[list[int]] = BEFORE,
) -> Results:
    """Return results of a training classifier and an independent one, whose classes are in another order.

    Some prompts name gender.
    """
    names = [(("gender", "man"), ("age", "young")) if index in naming else () for index in range(8)]
    names[0] = names[0] or ((("age", "young"),) if after else ())
    concepts = ["person"] * 4 + ["work"] * 4
    prompts = [Prompt(*given) for given in zip(PROMPTS, PROMPTS, concepts, names, strict=True)]
    no_face = torch.tensor([0, 0, 10, 0, 0, 0, 0, 0])
    summaries = {}
    for classifier, classes in (("training", ("man", "woman")), ("independent", independent)):
        for model, counts in (("original", before), ("ema", after)):
            if counts is not None:
                table = torch.tensor(counts)
                table = table if classifier == "training" else table.flip(1)
                summaries[classifier, "gender", model] = summarize_bias(table, no_face, classes)
                if classifier == "training":
                    product = ("man, young", "woman, old")
                    summaries[classifier, "gender×age", model] = summarize_bias(table, no_face, product)
                    summaries[classifier, "age", model] = summarize_bias(table, no_face, ("young", "old"))
    kept = {("clip_t", "original"): 0.31, ("clip_t", "ema"): 0.3} if after else {("clip_t", "original"): 0.31}
    models = ("original", "ema") if after else ("original",)
    agreement = {("training", "independent", "gender", model): 0.9 for model in models}
    pairs = {("independent", "gender"): PAIRS} if after else {}
    measured = Measured(summaries, kept, agreement, pairs)
    return build_results(["gender"], {"gender": {"man": wanted, "woman": 1 - wanted}}, prompts, measured, run)


def images(results: Results, kept: bool = True, drawn: list[int] | None = None) -> ReportImages:
    """Return two plain images of each prompt and model; the second shows no face."""
    models = ("original", "ema") if results.compared else ("original",)
    index = torch.arange(8).repeat_interleave(2)
    readings = {}
    for number, model in enumerate(models):
        probabilities = torch.eye(2)[[(prompt + number) % 2 for prompt in index.tolist()]]
        face = torch.tensor([True, False] * 8)
        readings[model] = Readings(index, torch.arange(16), face, torch.zeros(16, 4), {"gender": probabilities})
    prompts = [Prompt(text, text, "") for text in PROMPTS]
    classes = {"independent": {"gender": results.bias["independent"]["gender"].classes}}
    by_classifier = {("independent", model): found for model, found in readings.items()}
    table = image_table(
        prompts, by_classifier, classes, (lambda *key: "a b/{}_{}_{}.png".format(*key)) if kept else None
    )

    def draw(prompt: int) -> dict[str, torch.Tensor]:
        if drawn is not None:
            drawn.append(prompt)
        return {model: torch.rand(2, 3, 8, 8) for model in models}

    return ReportImages(draw, readings, table)


class Page(HTMLParser):
    """Tags with their attributes, the text of cells, all text, and whether every tag is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.cells: list[list[str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in ("meta", "link", "img", "line", "circle", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data
        if not {"style", "title"} & set(self.open):
            self.text += data


METHOD = ["Drawn by hand.", "The classifier “training” is <mine>."]


def page(results: Results | None = None, kept: bool = True) -> str:
    results = results or content()
    return html_report("mine", results, "seed: 0\nname: </pre>", METHOD, images(results, kept))


ALONE, EVEN = content(None), content(wanted=0.5)


@pytest.mark.parametrize("results", [content(), ALONE], ids=["two models", "one model"])
def test_page_is_whole_and_needs_nothing_else(results: Results) -> None:
    parsed = Page(page(results))
    assert parsed.open == []
    assert not [tag for tag, _ in parsed.tags if tag == "script"]
    sources = [attributes["src"] for _, attributes in parsed.tags if "src" in attributes]
    assert sources and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    links = {attributes["href"].split("#")[0] for _, attributes in parsed.tags if "href" in attributes}
    beside = {"results.json", "per_prompt.csv", "per_image.csv", "data:,"}
    assert {link for link in links if not link.startswith("a%20b/")} == beside
    assert "url(" not in page(results) and "@import" not in page(results)


def test_the_headline_is_the_verdict_with_its_uncertainty() -> None:
    """By the measure that the target asks for, of the independent classifier."""
    gender = content(None, 0.5).bias["independent"]["gender"].original
    found = headline(content(None, 0.5))
    figures = f"bias {gender.bias:.2f} (95 % interval {gender.low:.2f} to {gender.high:.2f})"
    assert found.verdict.replace("\u00a0", " ") == f"Perceived gender is not balanced: {figures}."
    assert f"largest possible bias is 1.00. A perfectly fair model would score about {gender.floor:.2f}" in found.detail
    even = content(None, 0.5, before=[[5, 5]] * 8)
    assert headline(even).verdict.startswith("Perceived gender shows no clear imbalance: bias 0.00")
    assert headline(content(None)).verdict.startswith("Perceived gender misses its target: distance from the target")
    met = content(None, 0.25, before=[[1, 3]] * 8)
    assert headline(met).verdict.startswith("Perceived gender shows no clear distance from its target")


@pytest.mark.parametrize(
    ("before", "after", "wanted", "verdict"),
    [
        ([10, 0], [5, 5], 0.5, "The finetuned model shows perceived gender more evenly: bias 1.00 → 0.00"),
        ([5, 5], [10, 0], 0.5, "The finetuned model shows perceived gender less evenly: bias 0.00 → 1.00"),
        ([10, 0], [2, 8], 0.2, "The finetuned model is closer to its target for perceived gender: distance"),
        ([2, 8], [10, 0], 0.2, "The finetuned model is farther from its target for perceived gender: distance"),
        ([6, 4], [6, 4], 0.5, "No clear change of perceived gender: bias 0.20 → 0.20"),
    ],
)
def test_the_headline_of_a_comparison(before: list[int], after: list[int], wanted: float, verdict: str) -> None:
    results = content([after] * 8, wanted, before=[before] * 8)
    results.bias["independent"]["gender"].__dict__["p_value"] = 0.0004 if before != after else 1.0
    found = headline(results)
    assert found.verdict.startswith(verdict) and "95 % interval" in found.verdict.replace("\u00a0", " ")
    assert found.verdict.endswith("may be chance.") == (before == after)
    assert ("with p < 0.001." in found.detail) == (before != after)


def test_the_headline_where_nothing_can_be_measured() -> None:
    assert "Every prompt names the perceived gender" in headline(content(naming=tuple(range(8)))).verdict
    assert "No face was detected" in headline(content(None, before=[[0, 0]] * 8)).verdict


def test_above_the_fold_stand_model_date_prompts_and_images() -> None:
    text = Page(page()).text.split("Bias and class frequencies")[0]
    for fact in ("Base model", "data/<mine>", "2026-02-03", "Images of each model", "80", "12.5", "independent"):
        assert fact in text, fact
    assert "perceived" in text and "Few prompts." in text
    adapter = RunFacts(model="base", adapter="fair.safetensors")
    assert "fair.safetensors" in Page(page(content(run=adapter))).text.split("Bias and class")[0]


def test_an_audit_of_one_model_has_no_words_of_finetuning() -> None:
    text = Page(page(ALONE)).text.split("Settings and versions")[0]
    for word in ("before", "after", "finetun", "base model", "training", "aligned", "noise"):
        assert word not in text.replace("“training” is <mine>", ""), word
    assert "first" in text and "independent" in text
    others = Page(page(content(None, run=RunFacts(images="some/folder")))).text
    assert "Images of" in others and "some/folder" in others and "these images" in others


def test_every_class_of_every_attribute_has_its_share_beside_bias_and_maximum() -> None:
    results, shown = content(), page()
    lines = shown.split('<div class="line">')[1:]
    assert len(lines) == 4  # gender by two classifiers, age and their product by one
    seen = [("independent", "gender"), ("training", "gender"), ("training", "gender×age"), ("training", "age")]
    for (classifier, name), line in zip(seen, lines, strict=True):
        result = results.bias[classifier][name]
        for index, label in enumerate(result.classes):
            before, after = (side.frequencies[index] for side in (result.original, result.ema))
            assert f"{label} {100 * before:.0f}\u00a0% → {100 * after:.0f}\u00a0%" in line
        assert "of 1.00" in line
    last = results.bias["training"]["age"].ema
    assert f"<strong>{last.bias:.2f}</strong> of 1.00" in lines[3]
    assert f"{last.low:.2f} – {last.high:.2f}; floor {last.floor:.2f}" in lines[3]


def test_the_figure_is_drawn_to_scale() -> None:
    line = page(EVEN).split('<div class="line">')[1]
    result = EVEN.bias["independent"]["gender"]
    dots = [float(x) for x in re.findall(r'<circle class="\w+ dot" cx="([\d.]+)%"', line)]
    assert dots == pytest.approx([100 * result.original.bias, 100 * result.ema.bias], abs=0.01)
    ranges = [tuple(map(float, found)) for found in re.findall(r'range" x1="([\d.]+)%" x2="([\d.]+)%"', line)]
    sides = (result.original, result.ema)
    expected = [(100 * side.low, 100 * side.high) for side in sides]
    assert [pytest.approx(found, abs=0.01) for found in ranges] == expected
    (floor,) = re.findall(r'class="fair" x="0" y="4" width="([\d.]+)%"', line)
    assert float(floor) == pytest.approx(100 * result.ema.floor, abs=0.01)


def test_tables_hold_the_figures() -> None:
    results, rows = content(), Page(page()).cells
    for classifier in ("training", "independent"):
        result = results.bias[classifier]["gender"]
        before, after = result.original, result.ema
        sides = [
            f"{side.bias:.2f} ± {side.spread:.2f}{side.low:.2f} – {side.high:.2f}; floor {side.floor:.2f}"
            for side in (before, after)
        ]
        assert after.unbiased_rms_gap_low is None  # of eight prompts
        gap = f"{before.unbiased_rms_gap:.2f} → {after.unbiased_rms_gap:.2f}"
        expected = ["gender", classifier, *sides, "1.00", f"{before.above_floor:.2f} → {after.above_floor:.2f}"]
        expected += [f"{gap}fair < {after.unbiased_rms_gap_by_chance:.2f}", f"{result.p_value:.3f}"]
        assert [*expected, f"{result.drift:.2f}", "12.5\u00a0% → 12.5\u00a0%"] in rows
        keys = ("total_variation_by_prompt", "total_variation", "kullback_leibler")
        far = [(getattr(before.distance, key), getattr(after.distance, key)) for key in keys]
        each, whole, divergence = (f"{first:.2f} → {second:.2f}" for first, second in far)
        ends = (getattr(after.distance, f"total_variation_by_prompt_{key}") for key in ("low", "high", "floor"))
        each += "{:.2f} – {:.2f}; floor {:.2f}".format(*ends)
        assert ["gender", classifier, "man 0.25; woman 0.75", each, whole, divergence] in rows
        for concept in ("person", "work"):
            assert [row for row in rows if row[:3] == [concept, "gender", classifier] and row[-1] == "1.00"]
    assert ["clip_t", "0.310", "0.300"] in rows and ["clip_t", "0.310"] in Page(page(ALONE)).cells
    share = results.classifier_overfit["independent"]["gender"]
    assert ["training, independent", "gender", "0.900", "0.900", "–" if share is None else f"{share:.2f}"] in rows
    (row,) = [row for row in rows if row[:2] == ["age", "training"] and "images" in row[-1]]
    assert row[2] == "0.9000.596 – 0.982; 10 images" and row[3] == "0.6000.313 – 0.832; 10 images"
    assert "Do images show what their prompts name?" not in page(ALONE)
    assert "is &lt;mine&gt;." in page() and "Drawn by hand." in page()


def test_pairs_are_counted() -> None:
    text = " ".join(Page(page()).text.split())
    assert "gender: 40 of 80 pairs keep their class; 32 change woman → man, 8 change man → woman." in text
    assert "pairs keep" not in page(ALONE)


def test_images_stand_in_pairs_and_link_to_their_file_and_line() -> None:
    results, drawn = content(), []
    shown = html_report("mine", results, "", METHOD, images(results, drawn=drawn))
    far = [abs(man / max(man + woman, 1) - 0.25) for man, woman in AFTER]
    order = sorted((index for index in range(8) if index != 2), key=lambda index: -far[index])
    assert drawn == [*order[:SHOWN], *order[-SHOWN:]]
    figures = shown.split("<figure>")[1:]
    assert len(figures) == 2 * SHOWN
    for index, figure in zip(drawn, figures, strict=True):
        assert "Of 2 pairs, 1 change class: 1 " in figure and figure.count('class="pair changed"') == 1
        pairs = re.split(r'<div class="pair(?=[" ])', figure)[1:]
        assert len(pairs) == 2 and all(pair.count("<img") == 2 for pair in pairs)
        changed = next(pair for pair in pairs if pair.startswith(" changed"))
        assert re.findall(r"<b>(.*?)</b>", changed) == ["woman", "man"][:: 1 if index % 2 == 0 else -1]
        number = 2 * index
        files = re.findall(r'href="(a%20b/.*?)"', changed)
        assert files == [f"a%20b/{model}_{index}_{number}.png" for model in ("original", "ema")]
        lines = [int(line) for line in re.findall(r'href="per_image.csv#row=(\d+)"', changed)]
        assert lines == [number + 2, 16 + number + 2]
        assert re.findall(r"<b>(.*?)</b>", next(pair for pair in pairs if pair is not changed)) == ["no face"] * 2
    assert "a%20b" not in page(kept=False) and "per_image.csv#row=" in page(kept=False)


def test_prompts_are_ordered_by_what_their_target_asks_for() -> None:
    assert "the distance from the target of the finetuned model, largest first" in page()
    assert "the bias of the finetuned model, largest first" in page(EVEN)


def test_prompts_that_name_what_is_aligned_have_bars_and_no_figure() -> None:
    shown = page(content(naming=(0, 1)))
    assert "2 of 8 prompts name the attribute" in shown
    last = shown.split('<div class="prompt')[-3:]  # nobody, and two without a figure
    assert all('<span class="figure">–</span>' in row for row in last)
    assert "base model: woman 10 %, man 90 %" in "".join(last)
    every = page(content(naming=tuple(range(8))))
    assert "named by every prompt: no bias to measure" in every and "<h2>Images</h2>" in every


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
            spoken = re.findall(r'aria-label="(.+?): woman (\d+) %, man (\d+) %"', bars)
            sides = [("base model", BEFORE[index]), ("finetuned model", AFTER[index])]
            assert spoken == [(side, str(10 * women), str(10 * men)) for side, (men, women) in sides]
    assert "<script>alert" not in page() and "&lt;/pre&gt;" in page()


def test_other_classes_have_no_target_lines() -> None:
    shown = page(content(independent=("Female", "Male")))
    assert "<u style" not in shown.split("Every prompt: perceived")[1]


def test_the_independent_classifier_is_shown_where_it_reads_what_is_aligned() -> None:
    results = content()
    results.bias["another"] = results.bias["training"]
    assert shown_classifier(results) == "independent"
    results.bias["independent"] = {"age": results.bias["independent"]["gender"]}
    assert shown_classifier(results) == "training"


def test_classes_have_colors_of_their_own() -> None:
    for count in (2, 7, 8, 16):
        assert len(set(colors(count))) == count


LOOKS = {"wide": (1280, []), "phone": (390, []), "dark": (1280, ["--blink-settings=preferredColorScheme=0"])}


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("look", LOOKS)
def test_browser_shows_all_of_it_without_complaint(look: str, tmp_path: Path) -> None:
    width, more = LOOKS[look]
    write_html(tmp_path / "report.html", page())
    browse(tmp_path, *more, f"--window-size={width},9000", f"--screenshot={tmp_path / 'page.png'}")
    with Image.open(tmp_path / "page.png") as opened:
        picture = opened.convert("RGB")
    assert picture.width == width
    edge = picture.crop((width - 8, 0, width, picture.height))
    assert len(edge.getcolors(1 << 24)) == 1  # nothing reaches beyond the page's margin
    assert (sum(picture.getpixel((0, 0))) < 150) == (look == "dark")
    end = picture.crop((0, 8900, width, 9000))
    assert len(end.getcolors(1 << 24)) == 1  # the page ended before, and all of it was seen


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_scrolls_sideways_and_no_cell_is_hidden(width: int, tmp_path: Path) -> None:
    """In a frame, since a window of the browser has a minimum width."""
    script = """<script>document.querySelector('iframe').onload = event => {
    const page = event.target.contentDocument, inner = event.target.contentWindow.innerWidth;
    page.querySelectorAll('details').forEach(details => details.open = true);
    const hidden = [...page.querySelectorAll('td > span')].filter(cell => !cell.getClientRects().length);
    const wide = [...page.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > inner + 1);
    document.title = [page.documentElement.scrollWidth, hidden.length, wide.length, inner].join()
    }</script>"""
    frame = f'<iframe style="border: 0; width: {width}px; height: 2000px" srcdoc="{escape(page())}"></iframe>'
    write_html(tmp_path / "report.html", f"<!DOCTYPE html><title></title>{frame}{script}")
    shown = browse(tmp_path, "--window-size=1400,2000", "--dump-dom")
    scrolled, hidden, wide, inner = map(int, re.search("<title>(.*?)</title>", shown)[1].split(","))
    assert (inner, hidden, wide) == (width, 0, 0) and scrolled <= width


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_browser_prints_what_is_folded_too(tmp_path: Path) -> None:
    pages = {}
    for name, settings in (("short", "seed: 0"), ("long", "seed: 0\n" * 500)):
        shown = html_report("mine", content(), settings, METHOD, images(content()))
        write_html(tmp_path / "report.html", shown)
        browse(tmp_path, f"--print-to-pdf={tmp_path / f'{name}.pdf'}")
        pages[name] = len(re.findall(rb"/Type /Page\b", (tmp_path / f"{name}.pdf").read_bytes()))
    assert pages["short"] >= 2 and pages["long"] > pages["short"] + 5


def browse(folder: Path, *arguments: str) -> str:
    """Return what the browser prints."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    command += ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command += ["--disable-sync", f"--user-data-dir={folder}", *arguments, f"file://{folder / 'report.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    return done.stdout
