"""The report's page on runs whose patches were scored outside the trainer. Nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.report.render import write_report
from pipelines.report.scorers import scorers_of
from pipelines.results import Store
from pipelines.run_record import RunRecord


def write_run(root: str, run_id: str, *, mode: str, ages: list[dict[int, int]]) -> None:
    record = RunRecord(root, run_id)
    config = {"scoring": {"mode": mode}}
    record.start(method="aclip", kind="single", seed=0, params={}, config=config)
    for step, counts in enumerate(ages, 1):
        diagnostics: dict[str, Any] = {"feed/wait_share": 0.25}
        if counts:
            diagnostics |= {
                "scoring/staleness_mean": float(step),
                "scoring/staleness_max": float(max(counts)),
                "scoring/fallback_share": 0.5,
            }
        if step == 2:
            diagnostics["scoring/iou_with_sync"] = 0.9
        line = {"step": step, "loss": 1.0, "diagnostics": diagnostics}
        record.log({**line, "score_ages": counts} if counts else line)
    record.finish("complete", seconds=1.0, steps=len(ages), samples_seen=len(ages))


@pytest.fixture
def root(tmp_path: Path) -> str:
    place = str(tmp_path / "root")
    write_run(place, "streamed", mode="stream", ages=[{}, {1: 8}, {1: 4, 3: 4}])
    write_run(place, "plain", mode="sync", ages=[{}])
    return place


def test_numbers_are_summed_over_a_runs_log(root: str):
    store = Store(root)
    (found,) = scorers_of(store, store.runs())
    assert found["run_id"] == "streamed"
    assert found["ages"] == [(1, 12), (3, 4)]
    assert (found["staleness"], found["oldest"], found["fallback"]) == (2.5, 3, 0.5)
    assert (found["iou"], found["waiting"], found["utilisation"]) == (0.9, 0.25, None)


def test_the_page_shows_scorers_only_where_there_were_some(root: str, tmp_path: Path):
    index = Path(write_report(root, str(tmp_path / "report")))
    html = index.read_text()
    assert 'data-testid="scorers-aclip"' in html
    assert "streamed</td>" in html
    drawn = json.loads(html.split('id="figures">')[1].split("</script>")[0])["scorers-aclip"]
    assert drawn["data"][0]["type"] == "bar"
    plain = str(tmp_path / "plain")
    write_run(plain, "run", mode="sync", ages=[{}])
    assert "Token scoring" not in Path(write_report(plain)).read_text()
