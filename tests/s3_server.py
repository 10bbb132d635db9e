"""A small object store that speaks S3's protocol on loopback, for tests.

`python -m tests.s3_server --database FILE --port PORT --key KEY --log FILE` serves until it is killed; the
objects are in the SQLite file, so a server started again on the same file and port goes on where the last one
died. Every request it answers is a line of the log.
It knows what pyarrow asks for: objects with ranges, listings, copies, multipart uploads, batch deletes. The
access key must be the given one; signatures are not verified.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import re
import socket
import sqlite3
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape

_SCHEMA = """
CREATE TABLE IF NOT EXISTS objects
  (bucket TEXT, key TEXT, data BLOB, changed REAL, PRIMARY KEY (bucket, key));
CREATE TABLE IF NOT EXISTS buckets (name TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS parts (upload TEXT, number INTEGER, data BLOB, PRIMARY KEY (upload, number));
"""
_PAGE = 1000


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    database: str
    access_key: str
    log: str

    def handle_request(self) -> None:
        body = self._body()
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        if f"Credential={self.access_key}/" not in self.headers.get("Authorization", ""):
            self._error(403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist")
            return
        # Each statement is committed at once: the answer must not be sooner than the change.
        connection = sqlite3.connect(self.database, timeout=30, isolation_level=None)
        with contextlib.closing(connection) as store:
            if key:
                self._object(store, bucket, key, query, body)
            else:
                self._bucket(store, bucket, query, body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_request  # noqa: N815 (the base class's names)

    def _bucket(self, store: sqlite3.Connection, bucket: str, query: dict[str, str], body: bytes) -> None:
        known = store.execute("SELECT 1 FROM buckets WHERE name = ?", (bucket,)).fetchone()
        if self.command == "PUT":
            store.execute("INSERT OR IGNORE INTO buckets VALUES (?)", (bucket,))
            self._answer(200)
        elif not known:
            self._error(404, "NoSuchBucket", "The specified bucket does not exist")
        elif self.command == "POST" and "delete" in query:
            keys = [
                node.text or "" for node in ElementTree.fromstring(body).iter() if node.tag.endswith("Key")
            ]
            store.executemany("DELETE FROM objects WHERE bucket = ? AND key = ?", [(bucket, k) for k in keys])
            self._xml("DeleteResult", "".join(f"<Deleted><Key>{escape(k)}</Key></Deleted>" for k in keys))
        elif self.command == "GET":
            self._listing(store, bucket, query)
        else:
            self._answer(200)

    def _listing(self, store: sqlite3.Connection, bucket: str, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("continuation-token", query.get("start-after", ""))
        limit = int(query.get("max-keys", _PAGE))
        entries: dict[str, str] = {}
        truncated = False
        rows = store.execute(
            "SELECT key, length(data), changed FROM objects WHERE bucket = ? AND key > ? ORDER BY key",
            (bucket, after),
        )
        for key, size, changed in rows:
            if not key.startswith(prefix):
                continue
            rest = key[len(prefix) :]
            shared = prefix + rest[: rest.index(delimiter) + 1] if delimiter and delimiter in rest else None
            if (shared or key) not in entries and len(entries) == limit:
                truncated = True
                break
            after = key
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(changed))
            entries[shared or key] = (
                f"<CommonPrefixes><Prefix>{escape(shared)}</Prefix></CommonPrefixes>"
                if shared
                else f"<Contents><Key>{escape(key)}</Key><LastModified>{stamp}</LastModified>"
                f"<ETag>&quot;e&quot;</ETag><Size>{size}</Size></Contents>"
            )
        token = f"<NextContinuationToken>{escape(after)}</NextContinuationToken>" if truncated else ""
        head = f"<KeyCount>{len(entries)}</KeyCount><IsTruncated>{str(truncated).lower()}</IsTruncated>"
        self._xml("ListBucketResult", head + token + "".join(entries.values()))

    def _object(
        self, store: sqlite3.Connection, bucket: str, key: str, query: dict[str, str], body: bytes
    ) -> None:
        if "uploads" in query or "uploadId" in query:
            self._multipart(store, bucket, key, query, body)
        elif self.command == "PUT":
            source = self.headers.get("x-amz-copy-source")
            if source:
                from_bucket, _, from_key = unquote(source).lstrip("/").partition("/")
                body = self._read(store, from_bucket, from_key) or b""
            self._write(store, bucket, key, body)
            etag = hashlib.md5(body).hexdigest()
            if source:
                self._xml("CopyObjectResult", f"<ETag>&quot;{etag}&quot;</ETag>")
            else:
                self._answer(200, ETag=f'"{etag}"')
        elif self.command == "DELETE":
            store.execute("DELETE FROM objects WHERE bucket = ? AND key = ?", (bucket, key))
            self._answer(204)
        else:
            self._send_object(store, bucket, key)

    def _send_object(self, store: sqlite3.Connection, bucket: str, key: str) -> None:
        where = (bucket, key)
        row = store.execute("SELECT length(data) FROM objects WHERE bucket = ? AND key = ?", where).fetchone()
        if row is None:
            self._error(404, "NoSuchKey", "The specified key does not exist.")
            return
        size = int(row[0])
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(asked[1]), min(int(asked[2] or size), size - 1)) if asked else (0, size - 1)
        (data,) = store.execute(
            "SELECT substr(data, ?, ?) FROM objects WHERE bucket = ? AND key = ?",
            (first + 1, last - first + 1, *where),
        ).fetchone()
        span = {"Content-Range": f"bytes {first}-{last}/{size}"} if asked else {}
        if self.command == "HEAD":
            self._answer(200, b"", size=size, ETag='"e"')
        else:
            self._answer(206 if asked else 200, bytes(data), ETag='"e"', **span)

    def _multipart(
        self, store: sqlite3.Connection, bucket: str, key: str, query: dict[str, str], body: bytes
    ) -> None:
        upload = query.get("uploadId", "")
        if "uploads" in query:
            upload = hashlib.sha256(f"{bucket}/{key}/{time.time_ns()}".encode()).hexdigest()
            self._xml("InitiateMultipartUploadResult", f"<UploadId>{upload}</UploadId>")
        elif self.command == "PUT":
            number = int(query["partNumber"])
            store.execute("INSERT OR REPLACE INTO parts VALUES (?, ?, ?)", (upload, number, body))
            self._answer(200, ETag=f'"{hashlib.md5(body).hexdigest()}"')
        elif self.command == "POST":
            rows = store.execute("SELECT data FROM parts WHERE upload = ? ORDER BY number", (upload,))
            self._write(store, bucket, key, b"".join(data for (data,) in rows))
            store.execute("DELETE FROM parts WHERE upload = ?", (upload,))
            self._xml("CompleteMultipartUploadResult", "<ETag>&quot;whole&quot;</ETag>")
        else:
            store.execute("DELETE FROM parts WHERE upload = ?", (upload,))
            self._answer(204)

    def _read(self, store: sqlite3.Connection, bucket: str, key: str) -> bytes | None:
        row = store.execute("SELECT data FROM objects WHERE bucket = ? AND key = ?", (bucket, key)).fetchone()
        return None if row is None else bytes(row[0])

    def _write(self, store: sqlite3.Connection, bucket: str, key: str, data: bytes) -> None:
        store.execute("INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?)", (bucket, key, data, time.time()))

    def _body(self) -> bytes:
        """The request's body, without the chunk headers and trailers that clients sign."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b"".join(iter(self._http_chunk, b""))
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return data
        found = b""
        while data:
            head, _, data = data.partition(b"\r\n")
            size = int(head.partition(b";")[0], 16)
            if size == 0:
                break
            found, data = found + data[:size], data[size + 2 :]
        return found

    def _http_chunk(self) -> bytes:
        size = int(self.rfile.readline().partition(b";")[0], 16)
        chunk = self.rfile.read(size)
        self.rfile.readline()
        return chunk

    def _xml(self, tag: str, inside: str) -> None:
        self._answer(200, f'<?xml version="1.0"?><{tag}>{inside}</{tag}>'.encode())

    def _error(self, status: int, code: str, message: str) -> None:
        self._answer(status, f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode())

    def _answer(self, status: int, data: bytes = b"", *, size: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) if size is None else size))
        self.send_header("Last-Modified", formatdate(usegmt=True))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        with open(self.log, "a") as log:
            log.write(f"{self.command} {self.path} {self.headers.get('Range', '')}\n")

    def log_message(self, format: str, *args: object) -> None:
        return


class S3Server:
    """The server as a process of its own, which can die and come back."""

    def __init__(self, folder: Path, *, access_key: str = "tester") -> None:
        self.database, self.log = folder / "s3.sqlite", folder / "requests.log"
        self.access_key = access_key
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.s3_server", "--database", str(self.database)]
        command += ["--port", str(self.port), "--key", self.access_key, "--log", str(self.log)]
        self._process = subprocess.Popen(command, cwd=Path(__file__).parents[1])
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.05)
        raise RuntimeError(f"the S3 server did not start on port {self.port}")

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def requests(self) -> list[str]:
        """Method, path with query, and range of every request answered since this was last asked."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.write_text("")
        return lines

    def make_bucket(self, name: str) -> None:
        with contextlib.closing(sqlite3.connect(self.database)) as store, store:
            store.executescript(_SCHEMA)
            store.execute("INSERT OR IGNORE INTO buckets VALUES (?)", (name,))

    def uri(self, *parts: str) -> str:
        """`s3://` location of a bucket and key on this server."""
        place = "/".join(quote(part) for part in parts)
        return f"s3://{place}?endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1"


@contextlib.contextmanager
def running(folder: Path, *, bucket: str) -> Iterator[S3Server]:
    """A server with one bucket."""
    server = S3Server(folder)
    server.make_bucket(bucket)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--log", required=True)
    options = parser.parse_args()
    with contextlib.closing(sqlite3.connect(options.database)) as store, store:
        store.executescript(_SCHEMA)
        store.execute("PRAGMA journal_mode=WAL")
    _Handler.database, _Handler.access_key, _Handler.log = options.database, options.key, options.log
    ThreadingHTTPServer(("127.0.0.1", options.port), _Handler).serve_forever()


if __name__ == "__main__":
    main()
