"""A small Hugging Face hub: one host redirects to a second one, which serves ranges and can simulate faults."""

import contextlib
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq


def write_shard(path, groups):
    """A parquet file like ClimbMix's, with a row group for each list of documents."""
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for texts in groups:
            writer.write_table(pa.table({"text": texts}, schema=schema))


class Hub:
    """`with Hub(folder) as hub:` serves the files of `folder` as those of any dataset at hub.endpoint.

    hub.log holds (host, path, headers) of every request for a file; host is 'hub' or 'cdn'. hub.faults is a queue with
    one entry for each of the next answers of the CDN: 'busy' (503), 'limited' (429, retry after a second), 'cut' (half
    the body, then a closed connection), 'unsized' (the same without a Content-Length), 'stalled' (half the body, then
    5 s of silence), 'wrong' (other bytes of the same length), 'page' (HTML) or None. The two hosts have different
    names, as on the real hub.
    """

    def __init__(self, folder):
        self.folder, self.log, self.faults = folder, [], []

    def __enter__(self):
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler(self, answer)) for answer in (redirect, serve)]
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self.endpoint, self.cdn = (f"http://{host}:{server.server_port}" for host, server in
                                   zip(("127.0.0.1", "localhost"), self.servers, strict=True))
        return self

    def __exit__(self, *_):
        for server in self.servers:
            server.shutdown()
            server.server_close()


def handler(hub, answer):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            answer(hub, self)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    return Handler


def reply(request, status, body=b"", **headers):
    request.send_response(status)
    for name, value in {"Content_Length": len(body), **headers}.items():
        request.send_header(name.replace("_", "-"), str(value))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)


def redirect(hub, request):
    """/datasets/<owner>/<dataset>/resolve/main/<name>: a 302 to the CDN, with size and sha256."""
    empty, datasets, _, _, resolve, main, name = (request.path.split("/") + [""] * 7)[:7]
    path = hub.folder / name
    if datasets == "datasets":  # not /api/agent-harnesses, which the client also reads
        hub.log.append(("hub", request.path, dict(request.headers)))
    if (empty, datasets, resolve, main) != ("", "datasets", "resolve", "main") or not path.is_file():
        return reply(request, 404, X_Error_Code="EntryNotFound")
    data = path.read_bytes()
    reply(request, 302, Location=f"{hub.cdn}/{name}?signed", X_Linked_Size=len(data),
          X_Linked_ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit="0" * 40)


def serve(hub, request):
    hub.log.append(("cdn", request.path, dict(request.headers)))
    fault = hub.faults.pop(0) if hub.faults else None
    data = (hub.folder / request.path.strip("/").removesuffix("?signed")).read_bytes()
    begin = int(request.headers.get("Range", "bytes=0-")[len("bytes="):].partition("-")[0])
    if fault == "busy":
        reply(request, 503, b"try again")
    elif fault == "limited":
        reply(request, 429, b"too many requests", Retry_After=1)
    elif fault == "page":
        reply(request, 200, b"<html>log in first</html>", Content_Type="text/html; charset=utf-8")
    elif fault in ("cut", "unsized", "stalled"):
        request.send_response(206 if begin else 200)
        if fault != "unsized":
            request.send_header("Content-Length", str(len(data) - begin))
        request.end_headers()
        request.wfile.write(data[begin : (begin + len(data)) // 2])
        request.close_connection = True
        if fault == "stalled":
            request.connection.settimeout(5)
            with contextlib.suppress(OSError):
                request.rfile.read(1)
    elif fault == "wrong":
        reply(request, 200, bytes(255 - byte for byte in data))
    elif begin:
        reply(request, 206, data[begin:], Content_Range=f"bytes {begin}-{len(data) - 1}/{len(data)}")
    else:
        reply(request, 200, data)
