"""A bucket of Google Cloud Storage in a thread: as much of its JSON interface as gcsfs, TensorStore and Orbax use.

Objects lie in a dict. Every write gives an object a new generation, and preconditions are heeded, so two writers can be
played against each other. What was read is counted by object, and requests can be made to fail.
"""

import base64
import collections
import contextlib
import datetime
import email.utils
import hashlib
import http.server
import json
import os
import re
import threading
import time
import urllib.parse
from unittest import mock

HOST = "127.0.0.1"


class Bucket:
    """The objects of all buckets, and what has been asked of them."""

    def __init__(self, names=("bucket",)):
        self.names, self.objects, self.lock = set(names), {}, threading.RLock()
        self.generation = int(time.time() * 1e6)
        self.read = collections.Counter()  # bytes of each object: "bucket/name"
        self.requests = []  # (method, path)
        self.writes = collections.defaultdict(list)  # of each object: (generation, content)
        self.uploads = {}  # of several requests: id -> (where, conditions, bytes so far)
        self.refuse = None  # a function of (method, path): (status, message), or None to go on
        self.ahead = 0.0  # seconds by which the server's clock is ahead

    def put(self, where: str, content: bytes, metadata: dict | None = None) -> dict:
        with self.lock:
            self.generation += 1
            self.objects[where] = {"content": bytes(content), "generation": self.generation, "metageneration": 1}
            self.writes[where].append((self.generation, bytes(content)))
            self.objects[where] |= {"updated": self.now(), "metadata": metadata or {}}
            return self.described(where)

    def now(self) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(time.time() + self.ahead, datetime.UTC)

    def put_folder(self, where: str, folder) -> None:
        for file in folder.rglob("*"):
            if file.is_file():
                self.put(f"{where}/{file.relative_to(folder)}", file.read_bytes())

    def files(self, where: str) -> dict[str, bytes]:
        """The content of every object beneath, by the name that follows."""
        found = [name for name in self.objects if name.startswith(where + "/")]
        return {name.removeprefix(where + "/"): self.objects[name]["content"] for name in sorted(found)}

    def described(self, where: str) -> dict:
        entry = self.objects[where]
        bucket, _, name = where.partition("/")
        updated = entry["updated"].isoformat(timespec="milliseconds").replace("+00:00", "Z")
        md5 = base64.b64encode(hashlib.md5(entry["content"]).digest()).decode()
        numbers = {key: str(entry[key]) for key in ("generation", "metageneration")}
        return {
            "kind": "storage#object",
            "id": f"{where}/{entry['generation']}",
            "name": name,
            "bucket": bucket,
            "size": str(len(entry["content"])),
            "updated": updated,
            "timeCreated": updated,
            "md5Hash": md5,
            "metadata": entry["metadata"],
            "contentType": "application/octet-stream",
            **numbers,
        }

    def allows(self, where: str, query: dict) -> bool:
        found = self.objects.get(where, {"generation": 0, "metageneration": 0})
        for condition, key in (("ifGenerationMatch", "generation"), ("ifMetagenerationMatch", "metageneration")):
            if condition in query and int(query[condition]) != found[key]:
                return False
        return "ifGenerationNotMatch" not in query or int(query["ifGenerationNotMatch"]) != found["generation"]

    def listed(self, bucket: str, query: dict) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        names = sorted(where.removeprefix(bucket + "/") for where in self.objects if where.startswith(bucket + "/"))
        names = [name for name in names if name.startswith(prefix) and name >= query.get("startOffset", "")]
        names = [name for name in names if "endOffset" not in query or name < query["endOffset"]]
        items, prefixes = [], set()
        for name in names:
            folder, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            prefixes |= {prefix + folder + cut} if cut else set()
            items += [] if cut else [name]
        start, most = int(query.get("pageToken", 0)), int(query.get("maxResults", 1000))
        page = {"kind": "storage#objects", "prefixes": sorted(prefixes)[:most] if not start else []}
        page["items"] = [self.described(f"{bucket}/{name}") for name in items[start : start + most]]
        return page | ({"nextPageToken": str(start + most)} if len(items) > start + most else {})


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        with contextlib.suppress(ConnectionError):  # a reader that was killed
            super().handle_one_request()

    def answer(self, status: int, content: bytes | dict = b"", **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def date_time_string(self, timestamp=None):
        return email.utils.format_datetime(self.bucket.now(), usegmt=True)

    def fail(self, status: int, message: str):
        self.answer(status, {"error": {"code": status, "message": message}})

    def serve(self):
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        state, path = self.bucket, urllib.parse.unquote(url.path)
        state.requests.append((self.command, path))
        if state.refuse and (refused := state.refuse(self.command, path)):
            return self.fail(*refused)
        match = re.fullmatch(r"/(upload/|download/)?storage/v1/b/([^/]+)(?:/o)?(?:/(.*?))?", path)
        if not match or match[2] not in state.names:
            return self.fail(404, "The specified bucket does not exist.")
        kind, name, key = match.groups()
        with state.lock:
            if kind == "upload/":
                return self.upload(name, query, body)
            if key is None:
                is_list = path.endswith("/o")
                return self.answer(
                    200, state.listed(name, query) if is_list else {"kind": "storage#bucket", "name": name}
                )
            return self.object(f"{name}/{key}", query, body)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = serve

    def object(self, where: str, query: dict, body: bytes):
        state = self.bucket
        if self.command == "POST" and where.endswith("/compose"):
            where = where.removesuffix("/compose")
            parts = [f"{where.partition('/')[0]}/{part['name']}" for part in json.loads(body)["sourceObjects"]]
            return self.store(where, query, b"".join(state.objects[part]["content"] for part in parts))
        if self.command == "POST" and "/rewriteTo/b/" in where:
            where, _, target = where.partition("/rewriteTo/b/")
            resource = state.put(target.replace("/o/", "/", 1), state.objects[where]["content"])
            return self.answer(200, {"kind": "storage#rewriteResponse", "done": True, "resource": resource})
        if where not in state.objects:
            return self.fail(404, f"No such object: {where}")
        if not state.allows(where, query):
            if "ifGenerationNotMatch" in query:
                return self.answer(304)  # which has no body: a client would take one for the next answer
            return self.fail(412, "conditionNotMet")
        if self.command == "DELETE":
            del state.objects[where]
            return self.answer(204)
        if self.command == "PATCH":
            entry = state.objects[where]
            entry["metadata"] |= json.loads(body).get("metadata", {})
            entry |= {"metageneration": entry["metageneration"] + 1, "updated": state.now()}
        if self.command == "PATCH" or query.get("alt") != "media":
            return self.answer(200, state.described(where))
        entry = state.objects[where]
        content, headers = entry["content"], {"x_goog_generation": str(entry["generation"])}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            state.read[where] += len(content)
            return self.answer(200, content, **headers)
        total = len(content)
        first = int(wanted[1]) if wanted[1] else max(0, total - int(wanted[2]))
        last = min(int(wanted[2]), total - 1) if wanted[1] and wanted[2] else total - 1
        if first > last:
            return self.fail(416, "Requested range not satisfiable")
        state.read[where] += last + 1 - first
        return self.answer(206, content[first : last + 1], Content_Range=f"bytes {first}-{last}/{total}", **headers)

    def store(self, where: str, query: dict, content: bytes, metadata: dict | None = None):
        if not self.bucket.allows(where, query):
            return self.fail(412, "At least one of the pre-conditions you specified did not hold.")
        return self.answer(200, self.bucket.put(where, content, metadata))

    def upload(self, name: str, query: dict, body: bytes):
        """An object in one request (`media`, `multipart`) or several (`resumable`)."""
        uploads, kind = self.bucket.uploads, query.get("uploadType")
        if "upload_id" in query:
            where, conditions, so_far = uploads[query["upload_id"]]
            so_far += body
            if self.headers["Content-Range"].rpartition("/")[2] != str(len(so_far)):  # more is to come
                return self.answer(308, Range=f"bytes=0-{len(so_far) - 1}")
            del uploads[query["upload_id"]]
            return self.store(where, conditions, bytes(so_far))
        if kind == "media":
            return self.store(f"{name}/{query['name']}", query, body)
        if kind == "resumable":
            token = str(len(uploads) + self.bucket.generation)
            where = f"{name}/{query.get('name') or json.loads(body)['name']}"
            uploads[token] = (where, query, bytearray())
            return self.answer(200, Location=f"http://{self.headers['Host']}{self.path}&upload_id={token}")
        border = b"--" + re.search('boundary="?([^"]+)"?', self.headers["Content-Type"])[1].encode()
        _, about, content = re.split(b"(?:^|\r?\n)" + re.escape(border) + b"(?:--)?\r?\n?", body)[:3]
        about = json.loads(re.split(b"\r?\n\r?\n", about, maxsplit=1)[1])
        content = re.split(b"\r?\n\r?\n", content, maxsplit=1)[1]
        return self.store(f"{name}/{about['name']}", query, content, about.get("metadata"))


@contextlib.contextmanager
def serving(names=("bucket",)):
    """A server with these buckets -> its `Bucket`; what runs meanwhile, in this process or one that it starts, finds it."""
    bucket = Bucket(names)
    server = http.server.ThreadingHTTPServer((HOST, 0), type("OfBucket", (Handler,), {"bucket": bucket}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    address = f"http://{HOST}:{server.server_port}"
    environment = {
        "STORAGE_EMULATOR_HOST": address,  # gcsfs, google.cloud.storage
        "TENSORSTORE_GCS_HTTP_URL": address,
        "FSSPEC_GCS_TOKEN": "anon",  # and no look for credentials, which asks a server of Google's
        "NO_GCE_CHECK": "true",
    }
    import fsspec  # after which it no longer looks into the environment

    fsspec.config.conf.setdefault("gcs", {})["token"] = "anon"
    try:
        with mock.patch.dict(os.environ, environment):
            yield bucket
    finally:
        server.shutdown()
        server.server_close()
