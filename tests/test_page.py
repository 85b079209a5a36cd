"""The page: complete, self-contained, escaped, and alive in a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from conformance.grid import GLYPHS, SUITE, grid
from conformance.markdown import to_markdown
from conformance.page import largest_error, render
from conformance.plots import Axis, plots
from conformance.report import VERDICTS, Bench, Report, Row, one_line
from conformance.terminal import failure_lines, matrix_lines
from tests import browser
from tests.synthetic import report

HOSTILE = (
    "</script><script>document.documentElement.dataset.pwned=1</script>"
    '"\'><img src=x onerror="document.documentElement.dataset.pwned=1"><!--'
)
GOOD, FLAWED = report("reference"), report("transformers", 1, flaws=True)


class Tags(HTMLParser):
    """Every tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def hostile_report(text: str) -> Report:
    row = Row("A01/m/-/single", "failed", text, text, text, 0.1, text, text, {text: 1.0}, text)
    record = Bench(
        text or "k", text or "p", text or "m", text or "x", text, text, 1.0, 1.0, 1.0, 1.0
    )
    return Report(
        text or "i",
        (row, replace(row, case_id="B01/m/-/single", verdict="xfailed")),
        versions={text or "v": text},
        hardware={"device": text or "d", "name": text, "cpu_count": 1, "platform": text},
        selection=text,
        bench=(record,),
        checks={"A01": (text, text)},
    )


def test_every_case_model_and_verdict_is_on_the_page() -> None:
    text = render([GOOD, FLAWED])
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL).group(1))
    assert len(data["rows"]) == len(GOOD.rows) + len(FLAWED.rows)
    assert data["verdicts"] == list(VERDICTS)
    for model in grid(GOOD).models:
        assert f'<th scope="row">{model}</th>' in text
    for verdict in FLAWED.counts:
        assert f'class="chip {verdict}"' in text


def test_the_page_asks_no_network_and_runs_only_its_own_script() -> None:
    tags = Tags(render([GOOD, FLAWED])).found
    for tag, attributes in tags:
        assert "src" not in attributes, tag
        assert not any(name.startswith("on") for name in attributes), tag
        if tag == "link":
            assert attributes["href"] == "data:,"
        if tag == "a":
            assert str(attributes["href"]).startswith(("https://", "#"))
    assert [tag for tag, _ in tags].count("script") == 2
    policy = next(a["content"] for t, a in tags if a.get("http-equiv"))
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_controls_have_names_and_marks_more_than_colour() -> None:
    tags = Tags(render([GOOD, FLAWED])).found
    cells = [a for tag, a in tags if tag == "button" and a.get("class") == "cell"]
    assert cells and all("passed" in a["aria-label"] or "una" in a["aria-label"] for a in cells)
    assert len(set(GLYPHS.values())) == len(VERDICTS)


@given(
    st.text(max_size=60) | st.sampled_from([HOSTILE, "{{ 7*7 }}", "\ud7ff", "javascript:alert(1)"])
)
def test_hostile_strings_never_become_markup(text: str) -> None:
    plain = Tags(render([hostile_report("x" if one_line(text) else text.strip())])).found
    found = Tags(render([hostile_report(text)])).found
    quiet = {"a", "details", "span", "p", "li", "ul"}  # these depend on empty or linked strings
    assert [t for t, _ in found if t not in quiet] == [t for t, _ in plain if t not in quiet]
    assert not any(str(a.get("href", "")).startswith("javascript") for _, a in found)
    markdown = to_markdown([hostile_report(text)])
    assert "<img" not in markdown and "<script" not in markdown
    lines = [*matrix_lines(hostile_report(text)), *failure_lines(hostile_report(text))]
    assert all(line.isprintable() for line in lines)


def test_one_two_and_no_rows_render() -> None:
    for reports in ([GOOD], [GOOD, GOOD], [Report("empty")], [GOOD, FLAWED, GOOD]):
        assert render(reports).rstrip().endswith("</html>")


def test_a_cell_shows_its_worst_case_and_largest_error() -> None:
    rows = (
        Row("A01/m/lora/single", "passed", measured={"e": 9.0}),
        Row("B01/m/lora/single", "failed", measured={"e": 0.5, "tolerance": 0.1, "t_s": 99.0}),
        Row("C01/-/-/-", "passed"),
    )
    table = grid(Report("x", rows))
    cell = table.cell("m", "lora")
    assert cell.verdict == "failed" and cell.summary == "1 passed, 1 failed"
    assert largest_error(cell) == "largest error: e 0.5, tolerance 0.1 (B01)"
    assert table.models == ("m", SUITE) and table.cell(SUITE, "default").verdict == "passed"


def test_the_terminal_matrix_fits_its_width() -> None:
    for width in (60, 80, 120):
        lines = matrix_lines(FLAWED, width)
        assert max(map(len, lines[:-2])) <= width
    assert all(line.isascii() for line in matrix_lines(FLAWED, unicode=False)[:-1])


def test_axes_cover_their_values() -> None:
    for values in ([1.0, 10.0, 1000.0], [3.0], [0.0, 0.0], [-2.0, 5.0], [1e-9, 2e-9]):
        axis = Axis.over(values, 0.0, 100.0)
        assert all(-1e-6 <= axis(value) <= 100.0 + 1e-6 for value in values)
        assert len(axis.ticks()) <= 40
    broken = Bench("k", "p", "m", "x", "", "n", 1.0, float("nan"), 1.0, 1.0)
    assert plots([broken]) == [] and len(plots(GOOD.bench)) == 2


PROBE = """<script>
addEventListener("load", () => {
  const root = document.documentElement;
  root.dataset.overflow = String(root.scrollWidth - root.clientWidth);
  const cell = document.querySelector(".cell[tabindex='0']");
  cell.focus();
  cell.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
  root.dataset.moved = String(document.activeElement !== cell
    && document.activeElement.classList.contains("cell"));
  document.activeElement.click();
  root.dataset.opened = String(document.getElementById("detail").open);
  root.dataset.cases = String(document.querySelectorAll("#detail .check").length);
});
</script>"""


def test_a_browser_shows_moves_and_opens(
    tmp_path: Path, unavailable: Callable[[str], None]
) -> None:
    found = browser.find()
    if found is None:
        unavailable("no browser on this machine")
    text = render([replace(GOOD, implementation=HOSTILE), FLAWED])
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    url = browser.write(tmp_path, "page.html", text.replace("</body>", PROBE + "</body>"))
    root = re.search(r"<html[^>]*>", browser.dom(found, url, width=500)).group(0)
    assert 'data-ready="1"' in root, root
    assert 'data-overflow="0"' in root and 'data-moved="true"' in root, root
    assert 'data-opened="true"' in root and 'data-cases="0"' not in root, root
    assert "pwned" not in root


def test_a_browser_obeys_the_policy_and_opens_a_linked_cell(
    tmp_path: Path, unavailable: Callable[[str], None]
) -> None:
    found = browser.find()
    if found is None:
        unavailable("no browser on this machine")
    text = render([hostile_report(HOSTILE)])
    text = text.replace(
        "</body>", "<script>document.documentElement.dataset.pwned=1</script></body>"
    )
    url = browser.write(tmp_path, "page.html", text)
    shown = browser.dom(found, url + "#cell/m/default")
    root = re.search(r"<html[^>]*>", shown).group(0)
    assert 'data-ready="1"' in root and "pwned" not in root, root
    assert re.search(r"<dialog[^>]*\bopen", shown)
