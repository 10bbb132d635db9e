"""The doctor on broken machines: each illness is named with the command that mends it."""

from __future__ import annotations

import http.server
import importlib.metadata
import io
import json
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from rich.console import Console

from pipelines import doctor
from pipelines.doctor import Check, as_table, run_doctor
from pipelines.health import check, machine, output, packages

Usage = namedtuple("Usage", "total used free")
GIB = check.GIB


def only(found: list[Check]) -> Check:
    assert len(found) == 1
    return found[0]


def require(monkeypatch, *texts: str) -> None:
    """Let our metadata ask for these; other packages keep theirs."""
    real = importlib.metadata.requires
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: list(texts) if name == packages.PACKAGE else real(name)
    )


def uninstall(monkeypatch, *names: str) -> None:
    """Let these look as if they were not installed."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def fake_module(monkeypatch, folder: Path, name: str, code: str) -> None:
    """A package that runs `code` when imported, here and in child processes."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(code)
    # Another test may have imported the real one, which would be found first.
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(folder))


def test_a_machine_that_runs_this_is_fit(tmp_path):
    found = {check.name: check for check in doctor.checks(str(tmp_path / "runs"))}
    # What does not depend on how full this machine is.
    for name in ("Python", "torch", "torchvision", "digits", "loopback", "output"):
        assert found[name].status == "ok", found[name]
    assert list(tmp_path.iterdir()) == []


def test_old_python(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 4, "final", 0))
    found = only(packages.check_python())
    assert (found.status, found.found) == ("fail", "3.10.4, needs 3.11 or newer")


def test_versions_are_held_against_our_metadata(monkeypatch):
    require(monkeypatch, "numpy>=2", "optuna<2", "no-such-package>=1", 'ruff>=99; extra == "test"')
    good, optuna, absent = packages.check_packages()
    assert (good.status, good.found) == ("ok", "1 packages within our ranges")
    assert optuna.status == absent.status == "fail"
    assert optuna.found == f"{importlib.metadata.version('optuna')}, needs <2"
    assert optuna.fix == "pip install 'optuna<2'"
    assert (absent.found, absent.fix) == ("not installed", "pip install 'no-such-package>=1'")


def test_our_own_ranges_hold_here(monkeypatch):
    """What pyproject.toml asks for is what these tests run with."""
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    require(monkeypatch, *project["dependencies"])
    assert [found for found in packages.check_packages() if found.status != "ok"] == []


def test_uninstalled_checkout(monkeypatch):
    def requires(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    found = only(packages.check_packages())
    assert found.status == "fail"
    assert "pip install -e ." in found.fix


def test_ray_without_its_dashboard(monkeypatch):
    require(monkeypatch, "ray[data,default]>=2")
    *_, healthy = packages.check_packages()
    assert healthy.status == "ok"
    assert healthy.found.endswith("with data, default")
    uninstall(monkeypatch, "aiohttp", "opencensus")
    *_, broken = packages.check_packages()
    assert broken.status == "fail"
    assert broken.found.startswith("missing aiohttp, opencensus:")
    assert broken.fix == "pip install 'ray[data,default]>=2'"


def test_extras_add_only_what_they_name(monkeypatch):
    require(monkeypatch, "a", 'b; extra == "x"', 'c; extra == "y"', 'd; python_version < "3"')
    assert packages.requirements(packages.PACKAGE) == [Requirement("a")]
    assert [r.name for r in packages.requirements(packages.PACKAGE, extra="x")] == ["b"]


def test_broken_torchvision_beside_a_working_torch(monkeypatch, tmp_path):
    code = "raise RuntimeError('operator torchvision::nms does not exist')"
    fake_module(monkeypatch, tmp_path, "torchvision", code)
    found = only(packages.check_torchvision())
    assert found.status == "fail"
    assert found.found.endswith("RuntimeError: operator torchvision::nms does not exist")
    assert found.fix == "pip uninstall torchvision"


def test_working_torchvision(monkeypatch, tmp_path):
    fake_module(monkeypatch, tmp_path, "torchvision", "__version__ = '0.28.0'")
    found = only(packages.check_torchvision())
    assert (found.status, found.found) == ("ok", "0.28.0 imports; not needed")


def test_torch_that_does_not_import(monkeypatch, tmp_path):
    fake_module(monkeypatch, tmp_path, "torch", "raise ImportError('libtorch.so: no such file')")
    found = only(packages.check_torch())
    assert found.status == "fail"
    assert "libtorch.so: no such file" in found.found


@pytest.mark.parametrize(
    ("torch_says", "gpus", "status", "part"),
    [
        ("2.13.0+cpu None False", 0, "ok", "no GPU here"),
        ("2.13.0 13.0 False", 0, "ok", "no GPU here"),
        ("2.13.0 13.0 True", 2, "ok", "CUDA 13.0, 2 GPU(s)"),
        ("2.13.0+cpu None False", 1, "fail", "is a build without CUDA"),
        ("2.13.0 13.0 False", 1, "fail", "cannot use them"),
    ],
)
def test_torch_build_and_gpus(monkeypatch, torch_says, gpus, status, part):
    monkeypatch.setattr(packages, "run_python", lambda code: (0, torch_says))
    monkeypatch.setattr(packages, "num_gpus", lambda: gpus)
    found = only(packages.check_torch())
    assert found.status == status
    assert part in found.found
    assert bool(found.fix) == (status == "fail")


def test_gpus_are_counted_from_the_drivers_list(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert packages.num_gpus() == 0
    listed = "GPU 0: NVIDIA H200 (UUID: a)\n  MIG 1g: b\nGPU 1: NVIDIA H200 (UUID: c)\n"
    done = subprocess.CompletedProcess([], 0, stdout=listed)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: done)
    assert packages.num_gpus() == 2


def test_lost_and_damaged_digits(monkeypatch, tmp_path):
    fake_module(monkeypatch, tmp_path, "sklearn", "")
    assert "cannot be read" in only(packages.check_digits()).found
    folder = tmp_path / "sklearn" / "datasets" / "data"
    folder.mkdir(parents=True)
    (folder / "digits.csv.gz").write_bytes(b"no gzip file")
    found = only(packages.check_digits())
    assert found.status == "fail"
    assert "scikit-learn" in found.fix


@pytest.mark.parametrize(("free", "status"), [(0.5, "fail"), (2, "warn"), (50, "ok")])
def test_space_of_the_output(monkeypatch, tmp_path, free, status):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(100 * GIB, 0, int(free * GIB)))
    found = only(machine.check_disk(str(tmp_path / "not" / "yet")))
    assert found.status == status
    assert ("free some space" in found.fix) == (status != "ok")
    assert machine.check_disk("s3://bucket/prefix") == []


def test_disk_too_full_for_ray(monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(1000 * GIB, 0, 40 * GIB))
    found = only(machine.check_ray_temp())
    assert found.status == "fail"
    assert "96.0% full" in found.found
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(1000 * GIB, 0, 60 * GIB))
    assert only(machine.check_ray_temp()).status == "ok"


def test_temp_folder_too_deep_for_sockets(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("deep" * 20)))
    found = only(machine.check_ray_temp())
    assert found.status == "fail"
    assert found.fix == "export RAY_TMPDIR=/tmp"


@pytest.mark.parametrize(("free", "status"), [(1, "fail"), (3, "warn"), (16, "ok")])
def test_memory(monkeypatch, free, status):
    monkeypatch.setattr(machine, "available_memory", lambda: free * GIB)
    assert only(machine.check_memory()).status == status


def test_small_shared_memory(monkeypatch):
    monkeypatch.setattr(machine.os.path, "isdir", lambda folder: True)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(64 << 20, 0, 64 << 20))
    found = only(machine.check_shared_memory())
    assert found.status == "warn"
    assert "--shm-size" in found.fix


def test_forbidden_loopback(monkeypatch):
    def refuse(address):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(machine.socket, "create_server", refuse)
    found = only(machine.check_loopback())
    assert found.status == "fail"
    assert "Operation not permitted" in found.found


def test_variables(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    threads, address = machine.check_environment()
    assert (threads.status, threads.fix) == ("warn", "export OMP_NUM_THREADS=1")
    assert address.status == "warn"
    assert "ray_address=10.0.0.1:6379" in address.fix
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("RAY_ADDRESS")
    assert only(machine.check_environment()).status == "ok"


def test_output_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "runs"):
        found = only(output.check_output(str(place)))
        assert found.status == "fail"
        assert found.found == f"'{tmp_path / 'file'}' is a file, not a folder"


def test_output_without_permission(monkeypatch, tmp_path):
    def refuse(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(output.tempfile, "NamedTemporaryFile", refuse)
    found = only(output.check_output(f"file://{tmp_path}"))
    assert (found.status, found.found) == ("fail", f"cannot write in '{tmp_path}': Permission denied")


class FakeStore(http.server.BaseHTTPRequestHandler):
    """Just enough of S3 for one small object; says no when told to."""

    is_open = True
    seen: list[str]

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.seen.append(f"{self.command} {self.path.partition('?')[0]}")
        status, body = 200, b""
        if self.command == "POST":
            body = b"<CompleteMultipartUploadResult><UploadId>u</UploadId></CompleteMultipartUploadResult>"
        if not self.is_open:
            status, body = 403, b"<Error><Code>AccessDenied</Code><Message>go away</Message></Error>"
        self.send_response(status)
        self.send_header("ETag", '"e"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer  # noqa: N815 (named by the base class)

    def log_message(self, *args) -> None:
        return


@pytest.fixture
def store(monkeypatch) -> Iterator[tuple[str, type[FakeStore]]]:
    """A run root on a local S3, and its handler."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    # Nothing here tests patience, and machines that run tests are busy.
    monkeypatch.setattr(output, "_STORE_TIMEOUT_S", 60)
    handler = type("Store", (FakeStore,), {"seen": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"s3://bucket/team/runs?endpoint_override=127.0.0.1:{server.server_port}&scheme=http", handler
        server.shutdown()
        thread.join()


def test_store_that_takes_objects(store):
    uri, handler = store
    found = only(output.check_output(uri))
    assert found == Check("output", "ok", "'s3://bucket/team/runs' can be written")
    written = {line.split()[1] for line in handler.seen if line.startswith("POST")}
    deleted = {line.split()[1] for line in handler.seen if line.startswith("DELETE")}
    assert len(written) == 1
    assert written == deleted
    # Nothing below the run root: a marker left there would make a run believe its output is taken.
    assert not any("/team/runs/" in line for line in handler.seen)


def test_store_that_refuses_the_credentials(store):
    uri, handler = store
    handler.is_open = False
    found = only(output.check_output(uri))
    assert found.status == "fail"
    assert "ACCESS_DENIED" in found.found
    assert "\n" not in found.found
    assert "AWS_ACCESS_KEY_ID" in found.fix


def test_store_where_nothing_listens():
    with http.server.HTTPServer(("127.0.0.1", 0), FakeStore) as server:
        port = server.server_port
    found = only(output.check_output(f"s3://bucket/runs?endpoint_override=127.0.0.1:{port}&scheme=http"))
    assert found.status == "fail"
    assert f"nothing answers at 127.0.0.1:{port}" in found.found
    assert "endpoint_override" in found.fix


@pytest.mark.parametrize(
    ("uri", "part"), [("gopher://x/y", "Unrecognized filesystem type"), ("s3://", "names no bucket")]
)
def test_output_that_is_no_place(uri, part):
    found = only(output.check_output(uri))
    assert found.status == "fail"
    assert part in found.found
    assert "s3://bucket/prefix" in found.fix


def test_store_that_never_answers(monkeypatch):
    monkeypatch.setattr(
        output, "run_python", lambda code, *, timeout_s: check.run_python(code, timeout_s=0.01)
    )
    found = only(output.check_output("s3://bucket/runs"))
    assert (found.status, found.found) == ("fail", "cannot write 's3://bucket/runs': no answer within 0.01 s")


SICK = [
    Check("a", "ok", "fine"),
    Check("b", "warn", "low [disk]", "free some"),
    Check("c", "fail", "x", "mend x"),
]


@pytest.mark.parametrize(("found", "code"), [(SICK, 1), (SICK[:2], 0)])
def test_exit_code_and_json(monkeypatch, capsys, found, code):
    monkeypatch.setattr(doctor, "checks", lambda run_root: found)
    assert run_doctor("runs", json=True) == code
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] == (code == 0)
    assert printed["checks"][1] == {"name": "b", "status": "warn", "found": "low [disk]", "fix": "free some"}
    assert run_doctor("runs") == code
    assert "→ free some" in capsys.readouterr().out


def test_table_shows_every_fix():
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(as_table(SICK))
    text = console.export_text()
    assert "→ mend x" in text
    assert "low [disk]" in text


def test_starts_where_everything_else_is_broken():
    blocked = "ray, torch, transformers, pyarrow, pydantic, numpy, optuna"
    code = f"import sys; sys.modules.update(dict.fromkeys('{blocked}'.split(', '))); import pipelines.doctor"
    assert check.run_python(code)[0] == 0
    # The block works: what needs torch fails under it.
    assert check.run_python(code.replace("pipelines.doctor", "pipelines.train_step"))[0] == 1
