"""What reports say: the same numbers in every file, and a page that needs nothing but itself."""

import csv
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from jq.compare.decision import Budget, decide
from jq.compare.report import csv_text, summary_table, write_reports
from jq.compare.report.heatmap import colour, heatmaps, legends
from jq.compare.report.svg import Line, Point, lines, log_ticks, scatter, ticks
from jq.compare.report.tables import length_table, position_table, speed_table, task_table
from tests.jq.compare.made_up import EDGES, base_nll, comparison, done, failed

BUDGET = Budget.parse("1%")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def found():
    return comparison(
        done(ms=20.0, megabytes=400.0, made=None),
        rtn=done(rise=0.05, noise=0.01, kl=0.1, ms=5.0),
        awq=done(rise=0.001, noise=0.001, kl=0.01, ms=8.0, megabytes=101.0),
        gptq_no_act=done(rise=0.004, noise=0.001, kl=0.02, ms=8.1, megabytes=101.0),
        fp8=failed("RuntimeError: <no> fp8 & no luck"),
    )


@pytest.fixture(scope="module")
def folder(found, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    names = [p.name for p in write_reports(out, found, decide(found, BUDGET), BUDGET)]
    assert sorted(names) == sorted(p.name for p in out.iterdir())
    return out


def test_rows_have_one_set_of_keys_and_the_numbers_of_the_arms(found):
    rows = {row["arm"]: row for row in found.rows()}
    assert len({tuple(row) for row in rows.values()}) == 1
    awq, original = rows["awq"], rows["original"]
    widths = [b - a for a, b in pairwise(EDGES)]
    nll = (base_nll() @ widths).mean() / sum(widths)
    assert original["perplexity"] == pytest.approx(math.exp(nll), rel=1e-12)
    assert original["word_perplexity"] == pytest.approx(math.exp(2 * nll), rel=1e-12)
    assert original["perplexity_increase"] is None
    windows = base_nll() @ widths / sum(widths)
    stderr = windows.std(ddof=1) / math.sqrt(len(windows))
    assert original["perplexity_stderr"] == pytest.approx(math.exp(nll) * stderr, rel=1e-9)
    word = original["word_perplexity"] * 2 * stderr
    assert original["word_perplexity_stderr"] == pytest.approx(word, rel=1e-9)
    rise = awq["perplexity"] - original["perplexity"]
    assert awq["perplexity_increase"] == pytest.approx(rise, rel=1e-9)
    assert awq["kl_nats"] == pytest.approx(0.01)
    assert awq["decode_p99_ms_batch1"] == pytest.approx(24.0)
    assert awq["decode_tokens_per_second_batch4"] == pytest.approx(250.0)
    assert (rows["fp8"]["status"], rows["fp8"]["perplexity"]) == ("failed", None)


def test_tasks_are_told_with_their_differences():
    right, wrong = [1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]
    tasked = comparison(done(tasks={"quiz": right}), rtn=done(tasks={"quiz": wrong}))
    original, rtn = tasked.rows()
    assert (original["task_quiz"], original["task_quiz_difference"]) == (0.75, None)
    assert (rtn["task_quiz"], rtn["task_quiz_difference"]) == (0.5, -0.25)
    assert rtn["task_quiz_difference_stderr"] == pytest.approx(0.25)  # of 0, -1, 0, 0
    table = task_table(tasked)
    assert table is not None
    assert table.headers == ("method", "quiz %", "change")
    assert table.rows[1] == ("rtn", "50.00 ±28.87", "-25.00 ±25.00")
    assert "4 of quiz" in table.note
    assert task_table(comparison(done(), rtn=done())) is None


def test_the_summary_marks_failed_arms(found):
    table = summary_table(found)
    cells = {row[0]: row for row in table.rows}
    assert cells["fp8"][1] == "FAILED"
    assert set(cells["fp8"][2:]) == {""}
    assert all(len(row) == len(table.headers) == len(table.align) for row in table.rows)
    assert "125" in cells["awq"]


def test_csv_has_a_line_per_arm(found, folder):
    text = (folder / "results.csv").read_text()
    read = list(csv.DictReader(io.StringIO(text)))
    assert [row["arm"] for row in read] == [r.name for r in found.results]
    assert float(read[2]["perplexity"]) == found.rows()[2]["perplexity"]
    assert read[0]["perplexity_increase"] == ""
    assert csv_text(found.rows()) == text


def test_json_holds_everything(found, folder):
    value = json.loads((folder / "results.json").read_text())
    assert value["decision"]["chosen"] == "awq"
    assert value["spec"] == found.spec
    assert value["rows"] == found.rows()
    assert len(value["arms"]["awq"]["quality"]["scores"]["nll"]) == 24


def test_markdown_says_it_all(folder):
    text = (folder / "report.md").read_text()
    assert "**Take awq: a decode step takes 8.00 ms, original 20.00 ms (0.40 times).**" in text
    assert "What bound: perplexity; rtn (5.00 ms) is over that budget." in text
    assert "fp8 FAILED: RuntimeError: <no> fp8 & no luck" in text
    assert "Unfair pair: gptq-no-act against awq." in text
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.M)
    assert len(tables) == 7
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_speed_is_told_for_every_batch_size_against_the_original(found):
    table = speed_table(found)
    assert table is not None
    assert [row[:2] for row in table.rows[:4]] == [
        ("original", "1"), ("original", "4"), ("rtn", "1"), ("rtn", "4"),
    ]  # fmt: skip
    assert [row[-1] for row in table.rows[:3]] == ["1.00", "1.00", "4.00"]


def test_lengths_and_positions_end_alike(found):
    by_length, by_position = length_table(found), position_table(found)
    assert by_length is not None
    assert by_position is not None
    assert by_length.headers[1:] == ("8", "16", "32")
    assert by_position.headers[1:] == ("1-7", "8-15", "16-31")
    # The first stretch is the shortest length.
    assert [r[1] for r in by_length.rows] == [r[1] for r in by_position.rows]
    whole = {row["arm"]: row["perplexity"] for row in found.rows()}
    assert by_length.rows[0][-1] == f"{whole['original']:.2f}"
    percent = 100 * (whole["awq"] / whole["original"] - 1)
    assert by_length.rows[2][-1].startswith(f"{whole['awq']:.2f} ({percent:+.2f} ±0.0")


class Page(HTMLParser):
    """Tags that are open, and what a browser would load."""

    VOID = ("meta",)

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.loads = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "poster")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_but_itself(folder):
    text = (folder / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert (page.open, page.loads) == ([], [])
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert text.count("http") == text.count('xmlns="http://www.w3.org/2000/svg"')
    assert "RuntimeError: &lt;no&gt; fp8 &amp; no luck" in text


def svgs(text):
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.S)]


def test_plots_are_whole_and_show_every_arm(folder):
    text = (folder / "report.html").read_text()
    found = svgs(text)
    # Size, divergence, speed at two batch sizes, length, position; a scale and three maps.
    assert len(found) == 6 + 1 + 3
    for plot in found[:6]:
        labels = {t.text for t in plot.iter("{http://www.w3.org/2000/svg}text")}
        assert {"rtn", "awq", "gptq-no-act"} <= labels
    for cells in found[7:]:
        titles = [t.text for t in cells.iter("{http://www.w3.org/2000/svg}title")]
        assert titles == [
            "layers_0/attention/q_proj: 0.01", "layers_0/mlp/up_proj: 0.02",
            "layers_1/attention/q_proj: 0.03", "layers_1/mlp/up_proj: 0.04",
        ]  # fmt: skip


def numbers(svg):
    return [float(x) for x in re.findall(r'(?:x|y|cx|cy)="(-?[\d.]+)"', svg)]


def test_labels_stay_apart_and_inside():
    points = [Point(f"arm-{i}", 1.0, 5.0, 0.0, i, i, "") for i in range(9)]
    svg = scatter(points, xlabel="x", ylabel="y", line=(5.0, "a line"), title="t")
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)"[^>]*>arm-\d<', svg)
    assert len(found) == 9
    width, boxes = 5 * 6.4, []
    for x, y, anchor in found:
        left = float(x) - (width if anchor == "end" else 0)
        boxes.append((left, float(y) - 11, left + width, float(y) + 3))
    for i, a in enumerate(boxes):
        assert a[0] >= 66
        assert a[2] <= 640
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-9, 7e12])
def test_plots_of_one_value_are_finite(value):
    point = Point("only", value, value, 0.0, 0, 0, "")
    assert all(map(math.isfinite, numbers(scatter([point], xlabel="", ylabel="", title=""))))
    if value > 0:
        svg = scatter([point], xlabel="", ylabel="", title="", log=True)
        assert all(map(math.isfinite, numbers(svg)))
    line = Line("only", [8.0], [value], [0.0], 0)
    assert all(map(math.isfinite, numbers(lines([line], xlabel="", ylabel="", title=""))))


def test_ticks_are_round_and_within():
    assert ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(43.7, 45.4) == pytest.approx([43.75, 44, 44.25, 44.5, 44.75, 45, 45.25])
    assert ticks(-0.0013, 0.0021) == pytest.approx(
        [-0.001, -0.0005, 0, 0.0005, 0.001, 0.0015, 0.002]
    )
    assert all(2.85 <= x <= 12.5 for x in ticks(2.85, 12.5))
    assert log_ticks(0.3, 12.0) == pytest.approx([0.5, 1, 2, 5, 10])


def test_errors_of_weights_and_of_outputs_have_scales_of_their_own():
    arm = {"path": "layers_0/mlp/up_proj", "rtn_output_error": None, "warnings": []}
    seen = [{**arm, "weight_error": 0.5, "output_error": e} for e in (0.01, 0.02)]
    blind = [{**arm, "weight_error": e, "output_error": None} for e in (0.1, 0.4)]
    texts = ["".join(svg.itertext()) for svg in svgs("".join(legends({"a": seen, "b": blind})))]
    assert texts == ["0.010.02, outputs (log scale)", "0.10.4, weights (log scale)"]
    for name, _, svg in heatmaps({"a": seen, "b": blind}):
        assert colour(0.0) in svg, name
        assert colour(1.0) in svg, name
    assert legends({"a": []}) == []
    assert heatmaps({"a": []}) == []


def test_unfair_pairs_stand_beside_the_decision(folder):
    for name, later in (("report.html", "<h2>Failed"), ("report.md", "## Failed")):
        text = (folder / name).read_text()
        assert 0 < text.index("Unfair pair") < text.index(later), name


def test_reports_of_few_numbers_are_written(tmp_path):
    bare = comparison(failed("it broke"), rtn=done(speed=None, made=None))
    write_reports(tmp_path, bare, decide(bare, BUDGET), BUDGET)
    assert "No decision: the original failed" in (tmp_path / "report.html").read_text()
    none = comparison(failed("it broke"), rtn=failed("it too"))
    write_reports(tmp_path, none, decide(none, BUDGET), BUDGET)
    assert "rtn FAILED: it too" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium (Debian's package of that name) is here")
def test_a_browser_draws_the_page(folder, tmp_path):
    assert BROWSER is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'user'}"]
    page = (folder / "report.html").as_uri()
    probe = tmp_path / "probe.html"
    # What the browser measured of itself, written where --dump-dom shows it.
    probe.write_text(
        (folder / "report.html")
        .read_text()
        .replace(
            "</body>",
            "<script>document.title = JSON.stringify({svg: [...document.querySelectorAll('svg')]"
            ".map(s => [s.getBBox().width, s.getBoundingClientRect().width]), wide:"
            " document.documentElement.scrollWidth - innerWidth, errors: performance"
            ".getEntriesByType('resource').length})</script></body>",
        )
    )
    for width in (1300, 500):
        call = [BROWSER, *flags, f"--window-size={width},900"]
        dom = subprocess.run(
            [*call, "--dump-dom", probe.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        title = re.search(r"<title>(.*?)</title>", dom, re.S)
        assert title is not None
        told = json.loads(title.group(1))
        assert len(told["svg"]) == 10
        assert all(inner > 40 and outer > 40 for inner, outer in told["svg"])
        assert told["wide"] <= 0  # nothing sticks out to the side
        assert told["errors"] == 0  # nothing was loaded
    shot = tmp_path / "shot.png"
    subprocess.run(
        [*call, f"--screenshot={shot}", page], capture_output=True, timeout=120, check=True
    )
    assert shot.stat().st_size > 20_000
