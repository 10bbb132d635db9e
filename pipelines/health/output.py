"""Can runs be written where they should go? A small object is written there and deleted again."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import urllib.parse
import uuid
from pathlib import Path
from typing import Final

from pipelines.health.check import Check, existing_folder, local_path, run_python

# The S3 client itself retries for longer.
_STORE_TIMEOUT_S = 4.5
_CONNECT_TIMEOUT_S = 2.0

_ENDPOINT_FIX = "check the network and the URI: s3://bucket/prefix?endpoint_override=host:port&scheme=http"
_CREDENTIALS_FIX = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or the instance's role) for this bucket"
# What the error text of a store holds, and what helps; the first that matches.
_STORE_FIXES: Final = {
    "unrecognized filesystem": "use a local path or s3://bucket/prefix",
    "names no bucket": "use a local path or s3://bucket/prefix",
    "no_such_bucket": "create the bucket first, or correct its name",
    "access_denied": _CREDENTIALS_FIX,
    "invalid_access_key": _CREDENTIALS_FIX,
    "signature": _CREDENTIALS_FIX,
    "credentials": _CREDENTIALS_FIX,
    "": _ENDPOINT_FIX,
}


def check_output(output: str) -> list[Check]:
    """A local path or a URI can be written."""
    path = local_path(output)
    return [_check_store(output) if path is None else _check_folder(path)]


def _check_folder(output: str) -> Check:
    fix = "set output= to a folder you may write to"
    folder = existing_folder(output)
    # Below a file nothing can be made, though the folder that holds the file may be writable.
    path = Path(output).expanduser().absolute()
    blocking = next((p for p in (path, *path.parents) if p.exists() and not p.is_dir()), None)
    if blocking is not None:
        return Check("output", "fail", f"'{blocking}' is a file, not a folder", fix)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-"):
            pass
    except OSError as error:
        return Check("output", "fail", f"cannot write in '{folder}': {error.strerror}", fix)
    return Check("output", "ok", f"'{output}' can be written")


def _check_store(output: str) -> Check:
    code = f"from pipelines.health.output import probe_store; probe_store({output!r})"
    status, text = run_python(code, timeout_s=_STORE_TIMEOUT_S)
    shown = output.partition("?")[0]
    if status == 0:
        return Check("output", "ok", f"'{shown}' can be written")
    fix = next(fix for mark, fix in _STORE_FIXES.items() if mark in text.lower())
    return Check("output", "fail", f"cannot write '{shown}': {text}", fix)


def probe_store(output: str) -> None:
    """Write and delete an object beside `output`, or exit with one line on what went wrong.

    Runs in a child process, since a client that waits for a network cannot be interrupted. The object
    stands beside and not below: deleting the last object of a folder leaves a marker, and a run would
    then find its output taken.
    """
    from pipelines import storage

    base, mark, query = output.partition("?")
    scheme, _, place = base.partition("://")
    bucket, _, folder = place.strip("/").partition("/")
    name = f".doctor-{uuid.uuid4().hex[:8]}"
    beside = f"{scheme}://{bucket}/{folder}{name}{mark}{query}"
    try:
        if not bucket:
            raise ValueError(f"'{base}' names no bucket")
        _connect(base, query)
        filesystem, path = storage.filesystem(beside)
        with filesystem.open_output_stream(path) as stream:
            stream.write(b"probe")
        filesystem.delete_file(path)
    except (OSError, ValueError) as error:
        sys.exit(" ".join(str(error).split()))


def _connect(base: str, query: str) -> None:
    """Fail at once when nothing listens at a named endpoint; the S3 client takes 6 s to say so."""
    options = urllib.parse.parse_qs(query)
    named = options.get("endpoint_override", [os.environ.get("AWS_ENDPOINT_URL", "")])[0]
    if not base.startswith("s3://") or not named:
        return
    scheme = options.get("scheme", ["https"])[0]
    url = urllib.parse.urlsplit(named if "://" in named else f"{scheme}://{named}")
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname or "", port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise OSError(f"nothing answers at {url.hostname}:{port} ({error})") from error
