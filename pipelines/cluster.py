"""Starting or joining Ray with the settings the pipeline relies on."""

from __future__ import annotations

import logging
import os
from typing import Any

import ray

# A driver of nested Train runs asks for this instead of a CPU, so that drivers never take the place of
# the workers they wait for. In a cluster only the head node offers it.
DRIVER_RESOURCE = "train_driver"
LOCAL_DRIVERS = 64

# Defaults that turn silent waits into errors; a value the user has set wins.
_ENVIRONMENT = {
    # One thread per worker: OpenMP barriers on shared cores cost more than they gain.
    "OMP_NUM_THREADS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "1800",
    "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "600",
    # The V2 Parquet reader packs small inputs into one task and drops repeated paths.
    "RAY_DATA_USE_DATASOURCE_V2": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


def connect(*, address: str | None = None, num_cpus: int | None = None) -> None:
    """Join the cluster at `address`, or start a local Ray with its dashboard process.

    The dashboard is not for looking at: Train releases the placement groups of stopped trials through
    its State API only.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        return
    common: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": True,
    }
    if address:
        ray.init(address=address, runtime_env={"env_vars": dict(_ENVIRONMENT)}, **common)
    else:
        # Loopback only, so no token is needed and no token file is written to the user's home.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        ray.init(
            num_cpus=num_cpus,
            include_dashboard=True,
            resources={DRIVER_RESOURCE: LOCAL_DRIVERS},
            object_store_memory=1 << 30,
            **common,
        )
    _quiet_data()


def _quiet_data() -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 16 << 20
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def disconnect() -> None:
    ray.shutdown()
