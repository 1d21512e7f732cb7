"""A hub on this machine: serves folders as repositories to the real clients, as huggingface.co does, and keeps count.

It knows what a repository holds (`/api/models/...`, `.../tree/...`, `.../paths-info/...`), its files
(`.../resolve/...`, large ones by way of a redirect to another host), ranges, names of old that lead to new ones, what
is gated or not there, and answers that are late or break off.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_LARGE = (".safetensors", ".bin", ".parquet", ".h5", ".msgpack", ".onnx", ".ot", ".model")


class HubServer:
    """Repositories, what has been asked for, and what is to go wrong."""

    def __init__(self) -> None:
        self.folders: dict[str, Path] = {}  # "models/owner/name" or "datasets/owner/name" -> its files
        self.moved: dict[str, str] = {}  # a model's name of old -> owner/name
        self.gated: set[str] = set()  # keys of `folders` whose files need a token
        self.breaks: dict[str, list[int]] = {}  # file's name -> bytes after which each of its next answers breaks off
        self.status: int | None = None  # of every answer, for a hub that is ill
        self.ill_for = 10**9  # requests, of which the last one cures it
        self.delay: dict[str, float] = {}  # file's name -> seconds before its bytes come
        self.requests: list[str] = []  # "GET /path"
        handler = type("Handler", (_Handler,), {"hub": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.storage_url = f"http://localhost:{self._http.server_port}"  # to a client another host
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """From now on connections are refused."""
        self._http.shutdown()
        self._http.server_close()

    def variables(self, home: Path) -> dict[str, str]:
        """Environment of a client, whose cache is `home`."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1,localhost"}

    def fetched(self) -> list[str]:
        """Names of the files whose bytes were asked for, each time."""
        names = [re.search(r"/(?:resolve/[^/]+|cdn/[0-9a-f]+)/(.+)", r) for r in self.requests if r.startswith("GET")]
        return [unquote(name[1]) for name in names if name]


@contextmanager
def serving() -> Iterator[HubServer]:
    server = HubServer()
    try:
        yield server
    finally:
        server.stop()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path).strip("/")
        if self.hub.status and self.hub.ill_for:
            self.hub.ill_for -= 1
            return self._refuse(self.hub.status, "Ill", "the hub is ill")
        for old, new in self.hub.moved.items():
            if re.match(rf"(api/models/)?{re.escape(old)}(/|$)", path):
                return self._send(307, b"", {"Location": self.path.replace(f"/{old}", f"/{new}", 1)})
        if found := re.fullmatch(r"cdn/(\w+)/.+", path):
            return self._content(self._by_hash(found[1]), {"ETag": f'"{found[1]}"'})
        if found := re.fullmatch(r"api/((?:models|datasets)/[^/]+/[^/]+)(/.*)?", path):
            return self._about(found[1], found[2] or "")
        if found := re.fullmatch(r"((?:datasets/)?[^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            key = found[1] if found[1].startswith("datasets/") else f"models/{found[1]}"
            return self._resolve(key, found[2])
        return self._refuse(404, "NotFound", "no such page")

    def _about(self, key: str, rest: str) -> None:
        folder = self.hub.folders.get(key)
        if folder is None:
            return self._refuse(401, "RepoNotFound", "Invalid username or password.")
        entries = [_entry(folder, path) for path in sorted(folder.rglob("*"))]
        if rest.startswith("/tree/"):
            below = rest.split("/", 3)[3] if rest.count("/") > 2 else ""
            deep = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() in ("true", "1")
            inside = [e for e in entries if not below or e["path"].startswith(f"{below}/")]
            level = below.count("/") + 1 if below else 0
            return self._json([e for e in inside if deep or e["path"].count("/") == level])
        if rest.startswith("/paths-info/"):
            asked = json.loads(self.body)["paths"] if self.body.startswith("{") else parse_qs(self.body)["paths"]
            return self._json([e for e in entries if e["path"] in asked])
        files = [e for e in entries if e["type"] == "file"]
        siblings = [{"rfilename": e["path"], "size": e["size"], "blobId": e["oid"]} for e in files]
        about = {"id": key.partition("/")[2], "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
        return self._json(about)

    def _resolve(self, key: str, name: str) -> None:
        folder = self.hub.folders.get(key)
        if folder is None:
            return self._refuse(401, "RepoNotFound", "Invalid username or password.")
        if key in self.hub.gated:
            return self._refuse(401, "GatedRepo", "Access to this repository is restricted.")
        file = folder / name
        if not file.is_file():
            return self._refuse(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": COMMIT}
        if file.suffix not in _LARGE:
            return self._content(file, headers | {"ETag": f'"{_entry(folder, file)["oid"]}"'})
        digest = _sha256(file)
        linked = {"X-Linked-Size": str(file.stat().st_size), "X-Linked-Etag": f'"{digest}"'}
        return self._send(302, b"", headers | linked | {"Location": f"{self.hub.storage_url}/cdn/{digest}/{name}"})

    def _content(self, file: Path, headers: dict[str, str]) -> None:
        data, start, status = file.read_bytes(), 0, 200
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, status = int(found[1]), 206
            headers = headers | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        cut = None
        if self.command == "GET":
            time.sleep(self.hub.delay.get(file.name, 0))
            cut = next(iter(self.hub.breaks.get(file.name, [])), None)
        if cut is not None:
            self.hub.breaks[file.name].pop(0)
        self._send(status, data[start:], headers, cut)

    def _by_hash(self, digest: str) -> Path:
        files = (file for folder in self.hub.folders.values() for file in folder.rglob("*") if file.suffix in _LARGE)
        return next(file for file in files if _sha256(file) == digest)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True


def _entry(folder: Path, path: Path) -> dict:
    """As the hub lists a file or a folder."""
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0}
    data = path.read_bytes()
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry = {"type": "file", "path": name, "oid": oid, "size": len(data)}
    if path.suffix in _LARGE:
        entry["lfs"] = {"oid": _sha256(path), "size": len(data), "pointerSize": 130}
    return entry


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def make_glue(folder: Path, rows: Path) -> Path:
    """Local tasks as a repository laid out as nyu-mll/glue: a folder a configuration, a parquet file a split."""
    from datasets import ClassLabel, Dataset, Features, Value

    names = sorted(path.name for path in rows.iterdir())
    infos, configs = [], []
    for name in names:
        (folder / name).mkdir(parents=True)
        splits = {}
        for split in ("train", "validation"):
            lines = (rows / name / f"{split}.jsonl").read_text().splitlines()
            splits[split] = [json.loads(line) for line in lines]
        splits["test"] = [row | {"label": -1} for row in splits["validation"]]  # as on the hub: unlabelled
        texts = {key: Value("string") for key in splits["train"][0] if key not in ("label", "idx")}
        features = Features({**texts, "label": ClassLabel(names=["no", "yes"]), "idx": Value("int32")})
        for split, content in splits.items():
            Dataset.from_list(content, features=features).to_parquet(folder / name / f"{split}-00000-of-00001.parquet")
        sizes = "".join(f"  - name: {s}\n    num_bytes: 1\n    num_examples: {len(r)}\n" for s, r in splits.items())
        infos.append(f"- config_name: {name}\n  splits:\n{sizes}  download_size: 1\n  dataset_size: 1\n")
        paths = "".join(f"  - split: {split}\n    path: {name}/{split}-*\n" for split in splits)
        configs.append(f"- config_name: {name}\n  data_files:\n{paths}")
    header = f"dataset_info:\n{''.join(infos)}configs:\n{''.join(configs)}"
    (folder / "README.md").write_text(f"---\nlicense: other\n{header}---\n# GLUE\n")
    return folder
