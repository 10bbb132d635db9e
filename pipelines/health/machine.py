"""Memory, disk, sockets and variables: what a local Ray needs of the machine."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

from pipelines.health.check import GIB, Check, existing_folder, level, local_path

# The embedded sweep takes about 4 GiB: object store 1 GiB, dashboard, driver, two workers.
MEMORY_NEEDED, MEMORY_WANTED = 2 * GIB, 4 * GIB
DISK_NEEDED, DISK_WANTED = 1 * GIB, 5 * GIB
SHM_WANTED = 1 * GIB  # the object store of a local Ray
# Above this share of used space Ray writes no objects to disk (its local_fs_capacity_threshold).
RAY_FULL_SHARE = 0.95
# `/session_<date>_<time>_<microseconds>_<pid>/sockets/plasma_store`, and what a socket's path may hold.
_RAY_SOCKET_CHARS, _SOCKET_PATH_CHARS = 66, 107


def check_disk(output: str) -> list[Check]:
    """Free space where runs are written; an object store has no such limit."""
    path = local_path(output)
    if path is None:
        return []
    free = shutil.disk_usage(existing_folder(path)).free
    fix = "free some space, or set output= and prepared= to another disk"
    return [level("disk", free, needed=DISK_NEEDED, wanted=DISK_WANTED, what=f"free for '{output}'", fix=fix)]


def check_ray_temp() -> list[Check]:
    """Ray's sessions and spilled objects: room, and a path short enough for its sockets."""
    name = "Ray temp folder"
    # The order in which Ray looks.
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    if len(os.path.join(folder, "ray")) + _RAY_SOCKET_CHARS > _SOCKET_PATH_CHARS:
        found = f"'{folder}' is too long a path for the names of Ray's sockets"
        return [Check(name, "fail", found, "export RAY_TMPDIR=/tmp")]
    usage = shutil.disk_usage(existing_folder(folder))
    fix = "free some space, or export RAY_TMPDIR=/short/path/with/space"
    used = 1 - usage.free / usage.total
    if used > RAY_FULL_SHARE:
        found = f"'{folder}' is {used:.1%} full; above {RAY_FULL_SHARE:.0%} Ray writes no objects to disk"
        return [Check(name, "fail", found, fix)]
    what = f"free in '{folder}'"
    return [level(name, usage.free, needed=DISK_NEEDED, wanted=DISK_WANTED, what=what, fix=fix)]


def check_memory() -> list[Check]:
    """Memory that can be taken now, within the container's limit."""
    available = available_memory()
    if available is None:
        return [Check("memory", "ok", "unknown on this system")]
    fix = "close other programs, take a larger machine, or set sweep.max_concurrent=1"
    return [level("memory", available, needed=MEMORY_NEEDED, wanted=MEMORY_WANTED, what="available", fix=fix)]


def available_memory() -> int | None:
    """Bytes; None on systems other than Linux."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return available if text == "max" else min(available, int(text))


def check_shared_memory() -> list[Check]:
    """Ray keeps objects in /dev/shm; a container gets 64 MiB of it unless asked for more."""
    if not os.path.isdir("/dev/shm"):
        return [Check("/dev/shm", "ok", "none on this system, and not needed")]
    free = shutil.disk_usage("/dev/shm").free
    fix = "docker run --shm-size=2g ...; until then Ray keeps objects on disk, which is slow"
    return [level("/dev/shm", free, needed=0, wanted=SHM_WANTED, what="free for Ray's objects", fix=fix)]


def check_loopback() -> list[Check]:
    """Ray's processes talk over loopback ports."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port), timeout=2):
                pass
    except OSError as error:
        fix = "allow sockets on 127.0.0.1 (sandbox, firewall, network mode of the container)"
        return [Check("loopback", "fail", f"no port can be opened and reached: {error}", fix)]
    return [Check("loopback", "ok", f"opened and reached port {port}")]


def check_environment() -> list[Check]:
    """Variables that change behind our back what Ray and torch do."""
    found = []
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads in (None, "", "1"):
        found.append(Check("OMP_NUM_THREADS", "ok", "1" if threads else "unset: workers get 1"))
    else:
        text = f"{threads}: threads of several workers wait for each other's cores"
        found.append(Check("OMP_NUM_THREADS", "warn", text, "export OMP_NUM_THREADS=1"))
    if address := os.environ.get("RAY_ADDRESS"):
        text = f"'{address}': while this is set, no local Ray can be started"
        found.append(
            Check("RAY_ADDRESS", "warn", text, f"unset RAY_ADDRESS; say ray_address={address} instead")
        )
    return found
