"""Session-wide fixtures: one local Ray for every test, one thread per process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
# A fresh local Ray writes a token file and then asks for it; on loopback in tests there is no need.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S", "120")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Of tests/s3_server.py. Ray's processes must be started with them; without the last one a client on no cloud
# machine asks the network for its role.
os.environ |= {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "secret"}
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"

import pytest
import torch

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    # Two busy cores and OpenMP barriers: more threads make every test slower.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """The one local Ray of the test session."""
    from pipelines.cluster import connect, disconnect

    connect(num_cpus=2)
    yield
    disconnect()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the shared data packs; the test skips when it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the shared data packs in {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def small_prepared(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Location of a few prepared scenes."""
    from pipelines.prepare_once import ensure_prepared
    from tests.pipeline_fixture import small_config

    return ensure_prepared(small_config(tmp_path_factory.mktemp("prepared")))
