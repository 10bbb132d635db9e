"""The report: a static folder that opens from `file://` and asks the network for nothing."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import plotly
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipelines import storage
from pipelines.evaluation.statistics import Bootstrap
from pipelines.report import views
from pipelines.report.aggregate import aggregate, boards_as_json
from pipelines.report.console import leaderboard_csv
from pipelines.report.palette import looks
from pipelines.report.scorers import scorer_views
from pipelines.results import Json, Store

_TEMPLATES: Final = Path(__file__).parent / "templates"
_COPIED: Final = ("report.css", "report.js")


def write_report(root_uri: str, output_uri: str | None = None, *, bootstrap: Bootstrap | None = None) -> str:
    """Write the pages of a finished or unfinished run root; returns the URI of `index.html`.

    An earlier report at the same place is replaced: it is a view, everything in it is derived.

    Args:
        root_uri: a run root, local or S3.
        output_uri: where to write; `<root>/report` by default.

    Raises:
        ValueError: `root_uri` is no run root.
        AlreadyExistsError: the output holds files that are not a report.
    """
    store = Store(root_uri)
    output = output_uri or storage.join(root_uri, "report")
    _refuse_foreign(output)
    report = aggregate(store, bootstrap=bootstrap)
    page, figures = page_context(report)
    html = _environment().get_template("index.html").render(**page, figures=figures)
    files = {name: (_TEMPLATES / name).read_bytes() for name in _COPIED}
    files["plotly.min.js"] = (Path(plotly.__file__).parent / "package_data" / "plotly.min.js").read_bytes()
    files["leaderboard.csv"] = leaderboard_csv(report["boards"]).encode()
    files["data.json"] = json.dumps(machine_readable(report), indent=1, allow_nan=False).encode()
    for name, content in files.items():
        storage.write_bytes(storage.join(output, name), content)
    index = storage.join(output, "index.html")
    storage.write_bytes(index, html.encode())
    return index


def page_context(report: Json) -> tuple[Json, dict[str, Json]]:
    """What the templates read, and the figures by the id of their element."""
    look = looks(report["methods"])
    figures: dict[str, Json] = {}
    page: Json = {
        "header": report["header"],
        "headline": views.headline(report),
        "missing": views.missing_runs(report),
        "facts": views.facts(report["header"]),
        "looks": look,
        "boards": views.board_views(report["boards"], look, figures),
        "curves": views.curve_views(report, look, figures),
        "responses": views.response_views(report, look, figures),
        "labels": views.label_views(report),
        "samples": [{"method": m, **view} for m, view in report["samples"].items() if view],
        "scorers": scorer_views(report, look, figures),
        "configurations": views.configuration_views(report["configurations"]),
        "failures": views.run_views(report["failures"]),
        "quarantine": report["quarantine"],
        "progress": report["progress"],
        "runs": views.run_views(report["runs"]),
        "generated": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    page["sections"] = [(key, title) for key, title, is_shown in _sections(page) if is_shown]
    return page, figures


def machine_readable(report: Json) -> Json:
    """The report's numbers without pictures and resolved configs, which stand in the run records."""
    runs = [{key: value for key, value in run.items() if key != "config"} for run in report["runs"]]
    left_out = ("samples", "configurations", "failures")
    kept = {key: value for key, value in report.items() if key not in left_out}
    return {**kept, "boards": boards_as_json(report["boards"]), "runs": runs}


def _sections(page: Json) -> list[tuple[str, str, bool]]:
    return [
        ("leaderboard", "Leaderboard", True),
        ("curves", "Learning curves", bool(page["curves"])),
        ("responses", "Response curves", bool(page["responses"])),
        ("labels", "Classes", bool(page["labels"])),
        ("tokens", "Kept tokens", bool(page["samples"])),
        ("scorers", "Token scoring", bool(page["scorers"])),
        ("configurations", "Best configurations", bool(page["configurations"])),
        ("runs", "Runs", True),
    ]


def _environment() -> Environment:
    loader: Any = FileSystemLoader(_TEMPLATES)
    return Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )


def _refuse_foreign(output: str) -> None:
    files = storage.list_files(output, recursive=False)
    if files and "report.js" not in files:
        raise storage.AlreadyExistsError(
            f"'{output}' holds files that are not a report ({files[0]}, ...); name another output"
        )
