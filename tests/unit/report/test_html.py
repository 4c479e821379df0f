import dataclasses
import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from browser import PATH, Browser
from records import NASTY, kept, replaced, report, spectra

import compress_bilinear as cb
from compress_bilinear.report import LayerReport, Note, _html, _plots, printable

VOID = {"meta", "input", "br", "wbr", "link", "img"}
SVG_VOID = {"path", "circle"}


class Page(HTMLParser):
    """A page's elements with their attributes, their text, and whether all are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == tag]


@pytest.fixture(scope="module")
def one() -> Page:
    return Page(report(replaced(), kept(), metric_before=0.9778, metric_after=0.9759).to_html())


class TestSummary:
    def test_it_has_what_a_manager_asks(self, one):
        for what in (
            "Bilinear layers 1 of 2 replaced",
            "Model size 2 MB → 1.01 MB 1.98x smaller",
            "Slowest layer 2.5 → 2.5 ms kept",
            "Worst output error 0.2000 rel Worst weight error 0.6000 rel",
            "Task metric 0.9778 → 0.9759 change -0.0019",
        ):
            assert what in one.text

    def test_what_is_not_known_is_left_out(self):
        bare = replaced(output_error=None, latency_before_ms=None, latency_after_ms=None, spectra=(), front=())
        text = Page(report(bare, config={}).to_html()).text
        assert "Worst output error" not in text
        assert "Slowest layer" not in text
        assert "Task metric not measured" in text
        assert "The configuration is not known" in text

    def test_what_loses_is_warned_of(self):
        slow = replaced("slow", speedup=0.5, speedup_vs_dense=0.4)
        beaten = replaced("beaten", speedup=2.0, speedup_vs_dense=0.4)
        text = Page(
            report(
                slow, beaten, replaced("by", notes=(Note("forced", "forced, although it is not smaller"),))
            ).to_html()
        ).text
        assert "Slower here than nn.Bilinear: slow " in text
        assert "slower here than the best exact dense evaluation: beaten " in text
        assert "Replaced by force, against the verdict: by " in text

    def test_no_layer_replaced_is_no_error(self):
        text = Page(report(kept(spectra=(), latency_before_ms=None), kept("b")).to_html()).text
        assert "0 of 2 replaced" in text

    def test_a_report_without_layers_renders(self):
        assert "0 of 0 replaced" in Page(report().to_html()).text


class TestPage:
    def test_it_is_well_formed_and_fetches_nothing(self, one):
        assert one.open == []
        ids = Counter(attributes["id"] for _, attributes in one.elements if "id" in attributes)
        assert set(ids.values()) == {1}
        for _, attributes in one.elements:
            assert not {"src", "srcset", "data"} & set(attributes)
            assert attributes.get("href", "#").startswith("#")
        policies = [meta["content"] for meta in one.of("meta") if "http-equiv" in meta]
        assert re.fullmatch(r"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-\S+'", policies[0])

    def test_links_and_labels_lead_somewhere(self, one):
        ids = {attributes.get("id") for _, attributes in one.elements}
        for _, attributes in one.elements:
            for name in ("href", "aria-labelledby"):
                assert attributes.get(name, "#main").removeprefix("#") in ids

    def test_every_plot_has_a_label(self, one):
        pictures = [div for div in one.of("div") if div.get("role") == "img"]
        assert len(pictures) == len(one.of("svg")) == 5  # a kept layer without a front has two
        assert all(picture["aria-label"] for picture in pictures)
        assert {svg["aria-hidden"] for svg in one.of("svg")} == {"true"}

    def test_headings_do_not_skip_a_level(self, one):
        levels = [int(tag[1]) for tag, _ in one.elements if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))

    def test_the_config_and_the_environment_are_there(self, one):
        for what in ('"method": "cp"', "a <fast> one"):
            assert what in one.text

    def test_every_figure_of_a_layer_is_there(self, one):
        shown = {field.name for field in dataclasses.fields(LayerReport)} - {
            "name",
            "aliases",
            "notes",
            "front",
            "spectra",
        }
        for name in shown - {"shape"}:  # which stands below the name
            assert name.replace("_", " ").replace(" ms", " (ms)") in one.text
        assert "50×100×100" in one.text

    def test_names_are_text_and_nothing_else(self):
        few = {"front": (), "spectra": ()}  # the bars of latencies have all the names
        plain = Page(report(*(replaced(f"rel{k}", **few) for k in range(len(NASTY)))).to_html())
        layers = [replaced(n, aliases=(n,), dense_order=n, notes=(Note("text", n),), **few) for n in NASTY]
        page = Page(report(*layers).to_html())
        tags = [tag for tag, _ in page.elements if tag != "wbr"]
        assert tags == [tag for tag, _ in plain.elements if tag != "wbr"]
        handlers = [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
        assert handlers == []
        for name in NASTY:
            assert name in "".join(page.words) or not (name.isascii() and name.isprintable())

    def test_it_is_written_whole_or_not_at_all(self, tmp_path, monkeypatch):
        made = report(replaced())
        path = tmp_path / "report.html"
        assert path.write_text("old")
        assert made.to_html(path) == path.read_text(encoding="utf-8")
        monkeypatch.setattr("compress_bilinear.report._html._page", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            made.to_html(path)
        assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
        assert list(tmp_path.iterdir()) == [path]
        with pytest.raises(cb.CompressionError, match="Found no folder"):
            made.to_html(tmp_path / "none" / "report.html")


class TestSize:
    def test_100_layers_with_plots_stay_below_2_mb(self, monkeypatch):
        # every layer's plots are as long as one's, which is drawn once
        plots = _html._plots(replaced("encoder.layers.100.relation.scorer"))
        monkeypatch.setattr(_html, "_plots", lambda layer: plots)
        layers = [replaced(f"encoder.layers.{k}.relation.scorer") for k in range(100)]
        text = report(*layers).to_html()
        assert len(text.encode()) < 2_000_000
        assert text.count("<svg") == 300

    def test_where_there_is_no_room_the_smallest_lose_their_plots(self, monkeypatch):
        plots = _html._plots(replaced())
        monkeypatch.setattr(_html, "_plots", lambda layer: plots)
        layers = [replaced(f"rel.{k}", bytes_before=1_000_000 + k) for k in range(12)]
        page = Page(_html.render_html(report(*layers), most_bytes=120_000))
        shown = len(page.of("svg")) // 3
        assert 0 < shown < 12
        assert "the smallest layers have no plots" in page.text
        assert len(page.of("details")) == 12

    def test_1000_layers_stay_below_2_mb_and_all_are_in_the_table(self, monkeypatch):
        plots = _html._plots(replaced())
        monkeypatch.setattr(_html, "_plots", lambda layer: plots)
        text = report(*(replaced(f"encoder.layers.{k}.relation") for k in range(1000))).to_html()
        assert len(text.encode()) < 2_000_000
        assert text.count('<th scope="row">') == 1000
        assert "or only their row in the table" in text


class TestPlots:
    def test_colours_are_the_pages_and_text_is_text(self):
        for plot in (_plots.latency_plot, _plots.front_plot, _plots.spectra_plot):
            svg = plot(replaced()).svg
            assert not re.search(r"#[0-9a-f]{6}\b|font-family|url\(", svg)
            assert "var(--ink)" in svg
            assert "<text" in svg

    def test_they_are_the_same_each_time_and_leave_the_callers_style_alone(self):
        import matplotlib

        with matplotlib.rc_context({"font.size": 40, "axes.grid": True, "svg.fonttype": "path"}):
            one = _plots.front_plot(replaced()).svg
            assert matplotlib.rcParams["font.size"] == 40
        assert _plots.front_plot(replaced()).svg == one

    @pytest.mark.parametrize(
        "changes",
        [
            {"front": (), "spectra": (), "latency_before_ms": None, "latency_after_ms": None, "latency_dense_ms": None},
            {"front": tuple(dataclasses.replace(p, output_error=None) for p in replaced().front)},
            {"spectra": spectra(50, 100, 100)[:2]},
        ],
        ids=["nothing known", "no error known", "two spectra"],
    )
    def test_what_is_not_known_is_not_drawn(self, changes):
        layer = replaced(**changes)
        drawn = [plot(layer) for plot in (_plots.latency_plot, _plots.front_plot, _plots.spectra_plot)]
        assert sum(plot is None for plot in drawn) == (3 if len(changes) > 1 else 1)

    @pytest.mark.parametrize(
        "changes",
        [
            {"latency_before_quartiles_ms": None, "latency_after_quartiles_ms": (None, 1.0)},
            {"latency_before_ms": 0.0, "latency_dense_ms": 0.0, "latency_after_ms": 0.0},
            {"rank": (1, 2, 500)},
            {"rank": None, "spectra": spectra(1, 1, 2)},
            {"front": tuple(dataclasses.replace(p, bytes=7, output_error=0.3) for p in replaced().front)},
            {"front": tuple(dataclasses.replace(p, weight_error=0.3, output_error=None) for p in replaced().front)},
        ],
        ids=str,
    )
    def test_odd_figures_are_drawn(self, changes):
        layer = replaced(**changes)
        for plot in (_plots.latency_plot, _plots.front_plot, _plots.spectra_plot):
            assert "nan" not in plot(layer).svg

    def test_a_sole_point_is_no_plot(self):
        for points in (replaced().front[1:2], ()):
            assert _plots.front_plot(replaced(front=points)) is None
            page = Page(report(replaced(front=points)).to_html())
            assert len(page.of("svg")) == 2

    def test_the_error_is_the_one_that_most_points_have(self):
        points = [dataclasses.replace(p, output_error=None, weight_error=0.1) for p in replaced().front]
        both = dataclasses.replace(replaced().front[1], weight_error=0.2)
        assert ">weight error<" in _plots.front_plot(replaced(front=(*points, both))).svg
        assert ">output error<" in _plots.front_plot(replaced(front=(both, both))).svg

    @pytest.mark.parametrize(
        ("rank", "marks"),
        [(8, 3), (70, 2), (341, 0), ((8, 9, 10), 3), ((50, 100, 100), 3), (None, 0)],
        ids=str,
    )
    def test_spectra_have_marks_at_the_ranks_that_they_reach(self, rank, marks):
        assert _plots.spectra_plot(replaced(rank=rank)).svg.count("<use ") == marks

    def test_between_the_kept_values_a_rank_is_in_proportion(self):
        spectrum = spectra(100)[0]
        assert _plots.at(spectrum, 1) == 0.5
        assert spectrum.values[1] < _plots.at(spectrum, 2) < 0.5
        assert _plots.at(spectrum, 1000) == spectrum.values[-1]


def test_control_characters_are_spelled_out_in_the_terminal():
    text = str(report(replaced("a\x1b[31mb", notes=(Note("text", "c\x07d"),))))
    assert "\\x1b[31m" in text
    assert "\x1b" not in text + printable("\x1b\x07")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if PATH is None:
        pytest.skip("no Chromium is installed")
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    layers = [
        replaced("b.2", bytes_after=5000, output_error=None),
        replaced("b.10", bytes_after=70, output_error=0.1),
        kept("<i>a</i>"),
        replaced("c", bytes_after=600, output_error=0.3, speedup=0.5),
    ]
    path = tmp_path_factory.mktemp("page") / "report.html"
    report(*layers, metric_before=1.0, metric_after=0.5).to_html(path)
    return path


NAMES = "[...document.querySelectorAll('tbody tr')].filter(r => !r.hidden).map(r => r.dataset.name)"
CONTRAST = """
(() => {
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => [r, g, b].map(v => linear(v / 255))
    .reduce((sum, v, k) => sum + v * [.2126, .7152, .0722][k], 0);
  const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
  const behind = element => {
    for (; element; element = element.parentElement) {
      const found = numbers(getComputedStyle(element).backgroundColor);
      if (found.length < 4 || found[3] > 0) return found;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const style = getComputedStyle(element), svg = element instanceof SVGElement;
    const text = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    const drawn = svg && !text ? [style.fill, style.stroke].filter(c => c.startsWith("rgb")) : [];
    const colours = text && !svg ? [style.color] : text ? [style.fill] : drawn;
    if (["SCRIPT", "STYLE", "svg", "defs"].includes(element.tagName) || !colours.length) continue;
    const ratio = Math.max(...colours.map(colour => {
      const pair = [light(numbers(colour)), light(behind(element))].sort((a, b) => b - a);
      return (pair[0] + .05) / (pair[1] + .05);
    }));
    if (!(svg && element.getAttribute("style")?.includes("--grid"))) found.push([text ? "text" : "drawn", ratio]);
  }
  return found;
})()
"""


class TestBrowser:
    @pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
    def test_it_opens_in_silence_with_contrast(self, browser, page, dark):
        browser.open(page, dark=dark)
        browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert browser.complaints() == []
        ratios = browser.value(CONTRAST)
        assert {kind for kind, _ in ratios} == {"text", "drawn"}
        assert min(ratio for kind, ratio in ratios if kind == "text") >= 4.5  # WCAG 2.2, 1.4.3
        assert min(ratio for kind, ratio in ratios if kind == "drawn") >= 3  # 1.4.11
        back = browser.value("getComputedStyle(document.body).backgroundColor")
        assert back == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")

    def test_the_keyboard_sorts(self, browser, page):
        browser.open(page)
        heads = browser.value("[...document.querySelectorAll('thead button')].map(b => b.textContent)")
        for _ in range(30):
            browser.press("Tab", 9)
            if browser.value("document.activeElement.textContent") == "Bytes after":
                break
        state = f"document.querySelectorAll('thead th')[{heads.index('Bytes after')}].getAttribute('aria-sort')"
        assert browser.value(state) == "none"
        browser.press("Enter", 13, "\r")
        assert browser.value(state) == "ascending"
        assert browser.value(NAMES) == ["b.10", "c", "b.2", "<i>a</i>"]
        assert browser.value("document.getElementById('said').textContent") == "Sorted by Bytes after, ascending"
        browser.press(" ", 32, " ")
        assert browser.value(state) == "descending"
        assert browser.value(NAMES) == ["<i>a</i>", "b.2", "c", "b.10"]
        assert browser.complaints() == []

    def test_names_sort_by_their_numbers_and_unknown_figures_stay_below(self, browser, page):
        browser.open(page)
        browser.value("document.querySelectorAll('thead button')[0].click()")
        assert browser.value(NAMES) == ["<i>a</i>", "b.2", "b.10", "c"]
        for _ in range(2):
            browser.value("document.querySelectorAll('thead button')[3].click()")
            assert browser.value(NAMES)[-1] == "b.2"

    def test_a_layer_is_found_and_opened(self, browser, page):
        browser.open(page)
        browser.value("const box = document.querySelector('[data-find]')")
        browser.value("box.value = 'B.'; box.dispatchEvent(new Event('input'))")
        assert browser.value(NAMES) == ["b.2", "b.10"]
        assert browser.value("document.querySelectorAll('details:not([hidden])').length") == 2
        browser.value("document.querySelector('tbody a').click()")
        assert browser.value("location.hash + document.querySelectorAll('details[open]').length") == "#layer-01"

    @pytest.mark.parametrize("width", [320, 700, 1200])
    def test_nothing_but_a_scrolling_table_is_wider_than_the_screen(self, browser, page, width):
        browser.open(page, width=width)
        browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert browser.value("document.documentElement.scrollWidth") <= width

    def test_printed_layers_are_open_and_dark_on_white(self, browser, page):
        browser.open(page, dark=True, media="print")
        assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert browser.value("[...document.querySelectorAll('details')].every(d => d.offsetHeight > 300)")
        assert browser.value("getComputedStyle(document.querySelector('.tools')).display") == "none"
