"""What fits a cluster, and what is refused before anything waits."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.prepared import Prepared
from pipelines.resources import refuse_local_root, runs_at_once
from tests.pipeline_fixture import small_config

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(
    ("overrides", "fits"),
    [
        ((), 2),
        (("train.num_workers=2",), 1),
        (("train.cpus_per_worker=0.5",), 4),
        (("sweep.max_concurrent=1",), 1),
        # Two CPUs, each run takes one and a quarter.
        (("train.feed=stream",), 1),
    ],
)
def test_runs_at_once_on_two_cpus(tmp_path: Path, small_prepared: str, overrides, fits):
    config = small_config(tmp_path, *overrides)
    assert runs_at_once(config, Prepared.open(small_prepared)) == fits


@pytest.mark.parametrize(
    "overrides",
    [("train.num_workers=4",), ("train.num_workers=2", "train.feed=stream")],
)
def test_a_run_that_can_never_start_is_refused(tmp_path: Path, small_prepared: str, overrides):
    config = small_config(tmp_path, *overrides)
    with pytest.raises(ValueError, match=r"one run needs .* CPUs .* the cluster has 2 CPUs.*lower train"):
        runs_at_once(config, Prepared.open(small_prepared))


def test_a_local_output_is_refused_on_several_nodes(monkeypatch, small_prepared: str):
    refuse_local_root("/tmp/here")
    monkeypatch.setattr("pipelines.resources.ray.nodes", lambda: [{"Alive": True}] * 2 + [{"Alive": False}])
    with pytest.raises(ValueError, match="local path, but the cluster has 2 nodes"):
        refuse_local_root("/tmp/here")
    refuse_local_root("s3://bucket/here")
    refuse_local_root("file:///mnt/share")
