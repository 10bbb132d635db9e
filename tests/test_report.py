"""The report: right numbers, no outbound reference, and it works in a browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipelines import storage
from pipelines.evaluation.statistics import Bootstrap
from pipelines.report import aggregate, figures, views
from pipelines.report.console import format_estimate
from pipelines.report.kept_tokens import sample_views
from pipelines.report.palette import BACKGROUNDS, COLOURS, looks
from pipelines.report.render import write_report
from pipelines.results import Store
from tests.report_fixture import METHODS, STEPS, sample_table, write_root

BOOTSTRAP = Bootstrap(resamples=200)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on PATH; install chromium to lift it"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_root(str(tmp_path_factory.mktemp("sweep")))


@pytest.fixture(scope="module")
def report(root: str) -> dict[str, Any]:
    return aggregate.aggregate(Store(root), bootstrap=BOOTSTRAP)


@pytest.fixture(scope="module")
def page(root: str) -> Path:
    return Path(write_report(root, bootstrap=BOOTSTRAP))


# Aggregation


def test_curves_hold_every_run_of_a_method(report: dict[str, Any]) -> None:
    curves = report["curves"]["cloob"]
    assert sorted(curve["kind"] for curve in curves) == ["best"] * 3 + ["default"] * 3 + ["trial"] * 4
    whole = next(curve for curve in curves if curve["run_id"] == "cloob-best-s101")
    assert [step for step, _ in whole["loss"]] == list(range(1, STEPS + 1))
    assert [step for step, _ in whole["selection"]] == [10, 20, 30]
    assert whole["metric"] == "acc1"


def test_thinning_keeps_both_ends_and_order() -> None:
    points = [(step, float(step)) for step in range(10_000)]
    thin = aggregate.thinned(points)
    assert len(thin) == aggregate.MAX_CURVE_POINTS
    assert (thin[0], thin[-1]) == (points[0], points[-1])
    assert thin == sorted(set(thin))
    assert aggregate.thinned(points[:300]) == points[:300]


def trial_run(number: int, value: float, **params: Any) -> dict[str, Any]:
    return {
        "run_id": f"t{number}",
        "method": "clip",
        "kind": "trial",
        "number": number,
        "state": "complete",
        "selection": {"metric": "acc1", "value": value, "step": 1},
        "params": params,
    }


def test_responses_choose_their_axis_by_the_span_of_the_values() -> None:
    runs = [
        trial_run(0, 0.1, lr=1e-4, weight=0.0, layers="two", ratio=0.3),
        trial_run(1, 0.2, lr=2e-3, weight=0.9, layers="four", ratio=0.8),
    ]
    found = {r["param"]: r for r in aggregate.responses_of(runs, [], "clip")}
    assert {name: (r["is_numeric"], r["is_log"]) for name, r in found.items()} == {
        "lr": (True, True),
        "weight": (True, False),  # a zero has no place on a log axis
        "layers": (False, False),
        "ratio": (True, False),
    }
    assert [(p["x"], p["y"]) for p in found["lr"]["points"]] == [(1e-4, 0.1), (2e-3, 0.2)]


def test_failed_and_pruned_trials_stay_in_the_responses(report: dict[str, Any]) -> None:
    beta = next(r for r in report["responses"]["cloob"] if r["param"] == "method.transform.beta")
    states = [(point["state"], point["y"] is None) for point in beta["points"]]
    assert states == [("complete", False), ("pruned", False), ("failed", True), ("complete", False)]
    figure = figures.response_chart(beta, looks(METHODS)["cloob"], y_range=(0.2, 0.8), chance=0.1)
    assert [trace.name for trace in figure.data] == ["complete", "pruned", "failed"]
    assert len({trace.marker.symbol for trace in figure.data}) == 3
    assert list(figure.data[2].y) == [0.2]


def test_label_values_are_means_over_seeds(report: dict[str, Any], root: str) -> None:
    table = next(t for t in report["labels"] if t["metric"] == "recall")
    for label in table["labels"]:
        recalls = []
        for file in Path(root).glob("results/*tier-best-s*zeroshot_classification.json"):
            entries = json.loads(file.read_text())["clipfleet"]["labels"]
            recalls += [entry["recall"] for entry in entries if entry["name"] == label["name"]]
        cell = label["methods"]["tier"]
        assert len(recalls) == 3
        assert cell["value"] == pytest.approx(sum(recalls) / 3, abs=1e-12)
        assert (cell["low"], cell["high"]) == (min(recalls), max(recalls))
    assert [label["n"] for label in table["labels"]] == [12] * 10


def test_progress_counts_what_is_missing(tmp_path: Path) -> None:
    root = write_root(str(tmp_path), methods=("clip", "tier"), num_trials=3, is_finished=False)
    unfinished = aggregate.aggregate(Store(root), bootstrap=BOOTSTRAP)
    rows = {(row["method"], row["kind"]): row for row in unfinished["progress"]}
    keys = ("expected", "finished", "running", "missing")
    assert [rows["tier", "trial"][key] for key in keys] == [3, 2, 1, 0]
    assert [rows["tier", "best"][key] for key in keys] == [3, 0, 0, 3]
    text = views.missing_runs(unfinished)
    assert text == "Unfinished sweep: 11 of 18 runs have finished, 1 is running, 6 are missing."


def test_a_finished_sweep_misses_nothing(report: dict[str, Any]) -> None:
    assert views.missing_runs(report) is None


def test_the_headline_names_who_is_not_told_apart(report: dict[str, Any]) -> None:
    text = views.headline(report)
    board = report["boards"][0]
    assert text.startswith(
        f"tier leads on scenes-quick with acc1 {format_estimate(board.rows[0].estimate)}; not told apart"
    )
    assert "local_mi" not in text


def test_the_headline_of_an_unfinished_sweep_names_who_is_absent(tmp_path: Path) -> None:
    root = write_root(str(tmp_path), methods=("clip", "aclip"), is_finished=False)
    text = views.headline(aggregate.aggregate(Store(root), bootstrap=BOOTSTRAP))
    assert text.endswith("; without a result: aclip.")


# Kept tokens


def test_samples_become_patches_in_grid_units() -> None:
    table = sample_table(0, keeps_all=False, num_images=1)
    (row,) = table.to_pylist()
    (view,) = sample_views(table)
    assert view["uri"].startswith("data:image/png;base64,iVBOR")
    assert [(p["x"], p["y"]) for p in view["patches"]] == [(x, y) for y in range(4) for x in range(4)]
    assert [p["is_kept"] for p in view["patches"]] == row["is_kept"]
    heat = [p["heat"] for p in view["patches"]]
    assert (min(heat), max(heat)) == (0.0, 1.0)
    assert heat.index(1.0) == row["token_scores"].index(max(row["token_scores"]))
    (box,) = view["boxes"]
    assert (box["x"], box["w"]) == (row["boxes"][0]["x"] * 4, 1.0)
    assert view["drops"]
    assert not sample_views(sample_table(0, keeps_all=True, num_images=1))[0]["drops"]


def test_equal_scores_give_no_heat_and_a_wrong_grid_is_refused() -> None:
    table = sample_table(0, keeps_all=True, num_images=1)
    row = table.to_pylist()[0]
    flat = table.from_pylist([{**row, "token_scores": [0.5] * 16}], schema=table.schema)
    assert {patch["heat"] for patch in sample_views(flat)[0]["patches"]} == {0.0}
    wrong = table.from_pylist([{**row, "token_scores": [0.5] * 9}], schema=table.schema)
    with pytest.raises(ValueError, match=r"'test-00000' needs 16 scores .* got 9 and 16"):
        sample_views(wrong)


# Looks and charts


def contrast(first: str, second: str) -> float:
    """WCAG contrast ratio of two #rrggbb colours."""

    def luminance(colour: str) -> float:
        total = 0.0
        for weight, at in ((0.2126, 1), (0.7152, 3), (0.0722, 5)):
            part = int(colour[at : at + 2], 16) / 255
            total += weight * (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4)
        return total

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def test_colours_are_distinct_and_readable_on_both_pages() -> None:
    for colour in COLOURS:
        assert all(contrast(colour, page) >= 3 for page in BACKGROUNDS)
    assert contrast("#F0E442", BACKGROUNDS[0]) < 3  # control: yellow is not
    css = (Path(aggregate.__file__).parent / "templates/report.css").read_text()
    assert all(f"--card: {page}" in css for page in BACKGROUNDS)
    all_looks = [(x.colour, x.dash, x.symbol) for x in looks([f"m{i}" for i in range(20)]).values()]
    assert len(set(all_looks)) == 20


def test_the_interval_chart_shows_the_numbers_of_the_board(report: dict[str, Any]) -> None:
    board = report["boards"][0]
    figure = figures.interval_chart(board, looks(METHODS))
    drawn = {trace.x[0]: trace.error_x for trace in figure.data if trace.error_x.array is not None}
    assert set(drawn) == {row.estimate.value for row in board.rows}
    for row in board.rows:
        bar = drawn[row.estimate.value]
        assert row.estimate.value + bar.array[0] == pytest.approx(row.estimate.high)
        assert row.estimate.value - bar.arrayminus[0] == pytest.approx(row.estimate.low)


def test_seed_runs_are_stronger_than_trials(report: dict[str, Any]) -> None:
    figure = figures.learning_curves(report["curves"]["cloob"], looks(METHODS)["cloob"], chance=0.1)
    by_name = {trace.name: trace for trace in figure.data}
    assert by_name["best, seeds"].line.width > by_name["trials"].line.width
    assert by_name["best, seeds"].opacity > by_name["trials"].opacity
    assert by_name["untuned"].line.dash == "dash"
    assert {"pruned", "failed"} <= set(by_name)
    assert None in by_name["best, seeds"].y  # runs are not joined to each other


def test_log_ticks_cover_the_range() -> None:
    assert figures.log_ticks(0.02, 0.9) == [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0]
    assert figures.log_ticks(1e-5, 1.0) == [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]


# The written folder


class References(HTMLParser):
    """Every attribute a browser would fetch by itself."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        fetched = ("src", "href", "srcset", "data", "poster", "action", "xlink:href")
        self.found += [value or "" for name, value in attrs if name in fetched]


def outbound(html: str, *sheets_and_scripts: str) -> list[str]:
    """References that leave the folder: remote links in HTML, imports and URLs in styles and scripts."""
    remote = [value for value in References(html).found if re.match(r"\s*(https?:)?//", value, re.IGNORECASE)]
    pattern = re.compile(r"https?://|@import|url\s*\(|\bimport\s*\(|\bfetch\s*\(|XMLHttpRequest")
    return remote + [match for text in sheets_and_scripts for match in pattern.findall(text)]


def test_nothing_is_fetched_from_outside(page: Path) -> None:
    html = page.read_text()
    own = [(page.parent / name).read_text() for name in ("report.css", "report.js")]
    assert outbound(html, *own) == []
    local = {value for value in References(html).found if not value.startswith(("#", "data:"))}
    assert all((page.parent / value).is_file() for value in local), local
    planted = html.replace("</body>", '<img src="https://cdn.example/x.png"></body>')
    assert outbound(planted, "a{background:url(//x)}") == ["https://cdn.example/x.png", "url("]


def test_captions_are_text_not_markup(page: Path) -> None:
    html = page.read_text()
    assert "&#39;cell &lt;" in html
    assert "'cell <" not in html


def test_every_part_of_the_sweep_is_on_the_page(page: Path) -> None:
    html = page.read_text()
    for name in ("facts", "board", "leaderboard", "labels", "failures", "quarantine", "progress", "runs"):
        assert f'data-testid="{name}"' in html, name
    for method in METHODS:
        for name in ("row", "curves", "responses", "tokens", "configuration"):
            assert f'data-testid="{name}-{method}"' in html, (name, method)
    assert "loss is not finite at step 4" in html
    assert "image cannot be decoded" in html
    assert "init: 0.07" in html  # the resolved tree as YAML
    assert html.count('class="dropped"') == 6 * 8  # half of 16 patches in six images of one method
    assert html.count('class="heat"') == len(METHODS) * 6 * 16


def test_machine_readable_copies_agree_with_the_page(page: Path, report: dict[str, Any]) -> None:
    data = json.loads((page.parent / "data.json").read_text())
    assert data["boards"][0]["rows"][0]["estimate"]["value"] == report["boards"][0].rows[0].estimate.value
    assert len((page.parent / "leaderboard.csv").read_text().splitlines()) > 12


def test_the_report_of_an_unfinished_sweep_says_so(tmp_path: Path) -> None:
    root = write_root(str(tmp_path), methods=("clip", "tier"), is_finished=False)
    html = Path(write_report(root, bootstrap=BOOTSTRAP)).read_text()
    assert 'data-testid="unfinished"' in html
    assert "no finished final run" in html
    only = write_root(str(tmp_path / "only"), methods=("clip",), is_finished=False)
    assert "No method has a final result yet." in Path(write_report(only)).read_text()


def test_a_report_replaces_a_report_and_nothing_else(root: str, tmp_path: Path) -> None:
    output = str(tmp_path / "site")
    index = write_report(root, output, bootstrap=BOOTSTRAP)
    assert index == f"{output}/index.html"
    write_report(root, output, bootstrap=BOOTSTRAP)
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.tex").write_text("mine")
    with pytest.raises(storage.AlreadyExistsError, match=r"are not a report \(chapter.tex"):
        write_report(root, str(foreign))
    with pytest.raises(ValueError, match="not a run root"):
        write_report(str(foreign))


# In a browser


def dump_dom(index: Path, profile: Path) -> str:
    """The page after its scripts ran, as headless Chromium sees it from `file://`."""
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=20000", "--dump-dom",
    ]  # fmt: skip
    command = [str(CHROMIUM), *flags, index.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def copy_with(page: Path, folder: Path, script: str) -> Path:
    """The report with one more script at its end."""
    shutil.copytree(page.parent, folder)
    index = folder / "index.html"
    index.write_text(index.read_text().replace("</body>", f"<script>{script}</script></body>"))
    return index


def column(dom: str, testid: str, at: int) -> list[str]:
    """`data-value` of one column of a table, top to bottom."""
    table = re.search(rf'<table[^>]*data-testid="{testid}".*?</table>', dom, re.DOTALL)
    assert table is not None
    rows = re.findall(r"<tr.*?</tr>", table[0].partition("<tbody>")[2], re.DOTALL)
    return [re.findall(r'data-value="([^"]*)"', row)[at] for row in rows]


@needs_chromium
def test_the_page_draws_every_chart_and_shows_the_leaderboard(
    page: Path, report: dict[str, Any], tmp_path: Path
) -> None:
    dom = dump_dom(page, tmp_path / "profile")
    assert 'data-ready="true"' in dom
    assert "data-js-error" not in dom
    num_charts = dom.count('data-testid="chart"')
    assert num_charts == 1 + len(METHODS) + sum(len(r) for r in report["responses"].values())
    assert len(re.findall(r'class="plot-container', dom)) == num_charts
    ranked = [row for row in report["boards"][0].rows if row.rank is not None]
    assert [float(value) for value in column(dom, "leaderboard", 2)] == [row.estimate.value for row in ranked]


@needs_chromium
def test_a_click_on_a_heading_sorts(page: Path, tmp_path: Path) -> None:
    click = "document.querySelectorAll('[data-testid=leaderboard] thead button')[2].click()"
    dom = dump_dom(copy_with(page, tmp_path / "site", click), tmp_path / "profile")
    values = [float(value) for value in column(dom, "leaderboard", 2)]
    assert values == sorted(values)
    assert 'aria-sort="ascending"' in dom
    assert not math.isclose(values[0], values[-1])


@needs_chromium
def test_a_broken_page_is_not_called_ready(page: Path, tmp_path: Path) -> None:
    index = copy_with(page, tmp_path / "site", "")
    (index.parent / "plotly.min.js").write_text("")
    dom = dump_dom(index, tmp_path / "profile")
    assert "data-ready" not in dom
    assert "Plotly is not defined" in dom
