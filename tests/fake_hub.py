"""The Hugging Face hub in a thread: as much of it as huggingface_hub asks for, with the statuses, headers and texts of the real one.

Repositories lie in dicts. Large files are served as the hub serves LFS files: a redirect to another server (the CDN), which
refuses a request that carries the token. Downloads can be cut off, and requests be made to fail.
"""

import base64
import collections
import contextlib
import dataclasses
import hashlib
import http.server
import json
import os
import pathlib
import re
import threading
import urllib.parse
from unittest import mock

HOST, CDN = "127.0.0.1", "localhost"  # of two names, as there
LARGE = (".safetensors", ".bin", ".model", ".parquet", ".pth", ".gguf", ".onnx")  # kept as LFS files
TOKEN = "hf_goodToken"  # of the account `me`, which may write to the organisation `org`


@dataclasses.dataclass
class Repository:
    """Commits by their ids, and refs (branches, tags) to them."""

    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Replace what `ref` points at."""
        described = repr((len(self.commits), sorted((name, hash_of(content)) for name, content in files.items())))
        sha = hashlib.sha1(described.encode()).hexdigest()
        self.commits[sha], self.refs[ref] = dict(files), sha
        return sha

    def files(self, ref: str = "main") -> dict[str, bytes]:
        return self.commits[self.refs[ref]]


def hash_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """All repositories ("models/org/name", "datasets/org/name"), and what has been asked of them."""

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.renamed: dict[str, str] = {}  # old -> new, both as above
        self.allowed: set[str] = set()  # gated repositories whose licence the account has accepted
        self.stored: dict[str, bytes] = {}  # LFS objects that were uploaded, by their sha256
        self.requests: list[tuple[str, str]] = []  # (method, path)
        self.sent = collections.Counter()  # bytes of each file's content: "org/name/file"
        self.cut: dict[str, int] = {}  # of a file: after so many bytes its next download ends
        self.refuse = None  # a function of (method, path): (status, message), or None to go on
        self.page = 1000  # entries of a listing's page
        self.address = self.cdn = ""

    def put(self, name: str, files: dict[str, bytes | str], ref: str = "main", kind: str = "models", **flags) -> str:
        """Make a commit that holds just these files -> its id."""
        repository = self.repositories.setdefault(f"{kind}/{name}", Repository())
        for flag, value in flags.items():
            setattr(repository, flag, value)
        return repository.commit({k: v.encode() if isinstance(v, str) else v for k, v in files.items()}, ref)

    def put_folder(self, name: str, folder: pathlib.Path, **options) -> str:
        found = [file for file in folder.rglob("*") if file.is_file()]
        return self.put(name, {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}, **options)

    def files(self, name: str, ref: str = "main", kind: str = "models") -> dict[str, bytes]:
        return self.repositories[f"{kind}/{name}"].files(ref)

    def asked(self, part: str) -> int:
        """How many requests had this in their path."""
        return sum(part in path for _, path in self.requests)


class Server(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        with contextlib.suppress(ConnectionError):  # a reader that was killed
            super().handle_one_request()

    def answer(self, status: int, content: bytes | dict | list = b"", **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def fail(self, status: int, message: str, code: str = ""):
        headers = {"X_Error_Message": message, "X_Request_Id": "Root=1-67"} | ({"X_Error_Code": code} if code else {})
        self.answer(status, {"error": message}, **headers)

    def serve(self):
        url = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(url.query))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.route = urllib.parse.unquote(url.path)
        self.hub.requests.append((self.command, self.route))
        if self.hub.refuse and (refused := self.hub.refuse(self.command, self.route)):
            return self.fail(*refused)
        return self.handle_route()

    do_GET = do_HEAD = do_POST = do_PUT = serve

    def send_content(self, name: str, content: bytes, **headers):
        """A file's content, or the range of it that is asked for; cut off where the test says so."""
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(wanted[1]) if wanted else 0
        if wanted:
            headers["Content_Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        limit = self.hub.cut.pop(name, None) if self.command == "GET" else None
        if limit is None:
            self.hub.sent[name] += len(content) - first if self.command == "GET" else 0
            return self.answer(206 if wanted else 200, content[first:], **headers)
        self.hub.sent[name] += limit
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        self.wfile.write(content[first : first + limit])
        self.wfile.flush()
        self.close_connection = True
        return None


class Cdn(Server):
    """Where the content of LFS files lies: its addresses are signed, and a second authorisation is an error, as at S3."""

    def handle_route(self):
        if self.headers.get("Authorization"):
            return self.answer(400, b"Only one auth mechanism allowed", Content_Type="text/plain")
        if self.command == "PUT":
            self.hub.stored[self.route.rpartition("/")[2]] = self.body
            return self.answer(200)
        name, _, oid = self.route.removeprefix("/get/").rpartition("/")
        versions = (files for repository in self.hub.repositories.values() for files in repository.commits.values())
        return self.send_content(name, next(c for files in versions for c in files.values() if hash_of(c) == oid))


class Api(Server):
    def handle_route(self):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token != TOKEN:
            return self.fail(401, "Invalid credentials in Authorization header")
        self.login = bool(token)
        if self.route == "/api/validate-yaml":
            return self.validate_card()
        if self.route == "/api/repos/create":
            return self.create()
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.route):
            return self.lfs_batch()
        if match := re.fullmatch(
            r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|branch|preupload|commit)/(.+))?", self.route
        ):
            kind, name, what, revision = match.groups()
        elif match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/((?:refs/[^/]+/)?[^/]+)/(.+)", self.route):
            kind, name, what, revision = (match[1] or "models/").rstrip("/"), match[2], match[4], match[3]
        else:
            return self.fail(404, "Sorry, we can't find the page you are looking for.")
        where = f"{kind}/{name}"
        if where in self.hub.renamed:
            new = self.hub.renamed[where].partition("/")[2]
            return self.answer(
                307,
                Location=urllib.parse.quote(self.route.replace(name, new, 1))
                + (f"?{self.path.partition('?')[2]}" if self.query else ""),
            )
        repository = self.hub.repositories.get(where)
        if repository is None or (repository.private and not self.login):
            missing = (404, "Repository not found") if self.login else (401, "Invalid username or password.")
            return self.fail(*missing, code="RepoNotFound")
        if what in ("branch", "preupload", "commit"):
            return getattr(self, what)(name, repository, revision)
        sha = revision if revision in repository.commits else repository.refs.get(revision or "main")
        if sha is None:
            return self.fail(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        if what in (None, "revision"):  # what a repository is anyone may know, also of a gated one
            siblings = [{"rfilename": file} for file in sorted(repository.commits[sha])]
            facts = {"_id": "621ffdc036468d709f174338", "id": name, "sha": sha, "private": repository.private}
            return self.answer(
                200,
                facts
                | {"gated": "manual" if repository.gated else False, "siblings": siblings, "tags": [], "downloads": 0},
            )
        if what == "tree":
            return self.tree(repository.commits[sha])
        if repository.gated and where not in self.hub.allowed:
            rule = (
                "is restricted and you are not in the authorized list"
                if self.login
                else "is restricted. You must have access to it and be authenticated to access it. Please log in"
            )
            return self.fail(403 if self.login else 401, f"Access to {kind[:-1]} {name} {rule}.", code="GatedRepo")
        return self.resolve(name, repository.commits[sha], sha, what)

    def tree(self, files: dict[str, bytes]):
        """A page of the listing; `Link` says where the next one is."""
        entries = [
            {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder}
            for folder in sorted({name.rpartition("/")[0] for name in files} - {""})
        ]
        for name, content in sorted(files.items()):
            entry = {"type": "file", "oid": git_hash(content), "size": len(content), "path": name}
            if name.endswith(LARGE):
                entry["lfs"] = {"oid": hash_of(content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        start = int(self.query.get("cursor", 0))
        following = f"{self.hub.address}{urllib.parse.quote(self.route)}?recursive=True&expand=False&cursor={start + self.hub.page}"
        link = {"Link": f'<{following}>; rel="next"'} if len(entries) > start + self.hub.page else {}
        return self.answer(200, entries[start : start + self.hub.page], **link)

    def resolve(self, name: str, files: dict[str, bytes], sha: str, file: str):
        headers = {"X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        if file not in files:
            self.fail(404, "Entry not found", code="EntryNotFound")
        elif file.endswith(LARGE):
            content = files[file]
            linked = {"X_Linked_Etag": f'"{hash_of(content)}"', "X_Linked_Size": str(len(content))}
            self.answer(
                302, Location=f"{self.hub.cdn}/get/{name}/{file}/{hash_of(content)}?signature=x", **linked, **headers
            )
        else:
            self.send_content(f"{name}/{file}", files[file], ETag=f'"{git_hash(files[file])}"', **headers)

    # ---- Uploading ---------------------------------------------------------------------------------------------------

    def create(self):
        wanted = json.loads(self.body)
        owner, kind = wanted["organization"], f"{wanted.get('type', 'model')}s"
        where = f"{kind}/{owner}/{wanted['name']}"
        if not self.login:
            return self.fail(401, "Invalid username or password.")
        if owner not in ("me", "org"):
            return self.fail(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        url = f"{self.hub.address}/{owner}/{wanted['name']}"
        if where in self.hub.repositories:
            return self.answer(409, {"error": "You already created this model repo", "url": url})
        private = wanted.get("visibility", "private" if wanted.get("private") else "public") == "private"
        self.hub.put(
            f"{owner}/{wanted['name']}", {".gitattributes": "*.safetensors filter=lfs\n"}, kind=kind, private=private
        )
        return self.answer(200, {"url": url, "name": f"{owner}/{wanted['name']}", "id": "1"})

    def branch(self, name: str, repository: Repository, branch: str):
        if branch in repository.refs:
            return self.fail(409, f"Reference already exists: {branch}")
        repository.refs[branch] = repository.refs["main"]
        return self.answer(200, {})

    def preupload(self, name: str, repository: Repository, branch: str):
        files = [
            {
                "path": file["path"],
                "shouldIgnore": False,
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
            }
            for file in json.loads(self.body)["files"]
        ]
        return self.answer(200, {"files": files})

    def lfs_batch(self):
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.hub.cdn}/put/{wanted['oid']}", "header": {}}}}
            for wanted in json.loads(self.body)["objects"]
        ]
        return self.answer(200, {"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def commit(self, name: str, repository: Repository, branch: str):
        if branch not in repository.refs:
            return self.fail(404, f"Invalid rev id: {branch}", code="RevisionNotFound")
        files = dict(repository.files(branch))
        for line in map(json.loads, self.body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.hub.stored[line["value"]["oid"]]
        sha = repository.commit(files, branch)
        return self.answer(
            200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.address}/{name}/commit/{sha}"}
        )

    def validate_card(self):
        import yaml

        content = json.loads(self.body)["content"]
        block = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        base = (yaml.safe_load(block[1]) if block else {}).get("base_model")
        if base is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            text = f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
            return self.answer(400, {"errors": [{"message": text}], "warnings": []})
        return self.answer(200, {"errors": [], "warnings": []})


@contextlib.contextmanager
def serving(cache: pathlib.Path, token: str | None = None):
    """A hub with an empty cache -> its `Hub`; what runs meanwhile, in this process or one that it starts, finds it."""
    import huggingface_hub
    from huggingface_hub import constants

    from lowrank.files.hub import open_repository

    hub, servers = Hub(), []
    for kind in (Api, Cdn):
        servers.append(http.server.ThreadingHTTPServer((HOST, 0), type("OfHub", (kind,), {"hub": hub})))
        servers[-1].daemon_threads = True
        threading.Thread(target=servers[-1].serve_forever, args=[0.02], daemon=True).start()
    hub.address, hub.cdn = (
        f"http://{host}:{server.server_port}" for host, server in zip((HOST, CDN), servers, strict=True)
    )
    environment = {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": token or "",
    }
    there = {  # read when huggingface_hub was imported
        "ENDPOINT": hub.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_STORED_TOKENS_PATH": str(cache / "stored_tokens"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "DOWNLOAD_CHUNK_SIZE": 50_000,
    }
    try:
        with (
            mock.patch.dict(os.environ, environment),
            mock.patch.multiple(constants, **there),
            mock.patch("time.sleep"),
        ):
            huggingface_hub.close_session()
            open_repository.cache_clear()
            yield hub
    finally:
        open_repository.cache_clear()
        huggingface_hub.close_session()
        for server in servers:
            server.shutdown()
            server.server_close()
