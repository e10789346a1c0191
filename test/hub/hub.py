#!/usr/bin/env python3
"""hub.py -- a HuggingFace Hub for tests: the real protocol, local models, and every way in which a hub can fail.

    python3 test/hub/hub.py --root DIR [--port N] [--cdn-port N] [--ready-file FILE]

Serves each DIR/owner/name (and DIR/name) that has a config.json or a name.hub.json beside it.  Two ports, hub and CDN, so that a
client's rule "no token to another host" is tested for real.  Standard library only.  What it answers, and why, is in
reference hub-protocol.md; README.md beside this file lists the controls.
"""
import argparse
import collections
import gzip
import hashlib
import itertools
import json
import os
import re
import select
import socket
import socketserver
import struct
import sys
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler
from pathlib import Path

SMALL = 1 << 20  # files from here on travel as LFS: a redirect to the CDN
MAX_LOG = 20_000  # requests remembered
MAX_POST = 1 << 20
PLACES = ("info", "tree", "resolve", "cache", "cdn", "whoami")
EXPANDABLE = set("""author baseModels cardData childrenModelCount config createdAt disabled downloads downloadsAllTime evalResults gated gguf inference
 inferenceProviderMapping lastModified library_name likes mask_token model-index pipeline_tag private resourceGroup safetensors sha siblings spaces tags
 transformersInfo trendingScore usedStorage widgetData xetEnabled""".split())

# Every kind of fault, and where it can happen; a fault that does not say `where` waits for such a place.
BODY, RESOLVE, HUB = {"cache", "cdn"}, {"resolve"}, set(PLACES) - {"cdn"}
KINDS = {"truncate": BODY, "reset": BODY, "stall": BODY, "ignore_range": BODY, "wrong_bytes": BODY, "other_part": BODY,
         "wrong_size": RESOLVE, "wrong_etag": RESOLVE, "no_size": RESOLVE, "no_commit": RESOLVE, "wrong_commit": RESOLVE, "expired": RESOLVE, "brief": RESOLVE,
         "absolute": RESOLVE,
         "loop": HUB, "elsewhere": HUB, "html": set(PLACES), "close": set(PLACES)}
FIELDS = {"repo": str, "file": str, "method": str, "where": str, "times": int, "every": int, "status": int, "code": (str, type(None)), "message": str, "retry_after": int,
          "delay": (int, float), "bytes_per_second": (int, float), "kind": str, "after": int, "at": int, "seconds": (int, float)}


def complaint(fault):
    """What is wrong with a fault that a test asks for; None when it can be done.  A misspelt fault would be a test that tests nothing."""
    if not isinstance(fault, dict):
        return "a fault is an object"
    for k, v in fault.items():
        if k not in FIELDS:
            return f"a fault has no field {k}"
        if not isinstance(v, FIELDS[k]):
            return f"{k} cannot be {v!r}"
    if fault.get("where", "any") not in (*PLACES, "any"):
        return f"there is no place {fault['where']}"
    if (kind := fault.get("kind")) is not None and kind not in KINDS:
        return f"there is no kind {kind}"
    if kind in ("truncate", "reset", "stall") and ("after" in fault) == ("at" in fault):
        return f"{kind} needs `after` or `at`, in bytes"
    if fault.get("every", 1) < 1:
        return "every must be positive"
    if fault.get("bytes_per_second", 1) <= 0 or not 0 <= fault.get("delay", 0) <= 30 or not 0 <= fault.get("seconds", 0) <= 3600:
        return "bytes_per_second must be positive, delay at most 30 and seconds at most 3600"
    return None


class Throttle:
    """So many bytes per second through all connections together; what a tenth of a second left unused may be made up for."""

    def __init__(self, rate):
        self.rate, self.lock, self.free_at = rate, threading.Lock(), 0.0

    def wait(self, n):
        """Until n more bytes may go."""
        with self.lock:
            self.free_at = max(self.free_at, time.monotonic() - 0.1) + n / self.rate
            ahead = self.free_at - time.monotonic()
        time.sleep(max(0, ahead))


class Blob:
    """One file of a repository, with the hashes that the Hub shows; computed once per (path, mtime, size)."""
    cache, lock = {}, threading.Lock()

    def __init__(self, path):
        self.path = path
        st = os.stat(path)
        self.size = st.st_size
        self.lfs = self.size >= SMALL or str(path).endswith((".safetensors", ".bin"))
        key = (os.path.realpath(path), st.st_mtime_ns, st.st_size)
        with Blob.lock:
            if key not in Blob.cache:
                sha1, sha256 = hashlib.sha1(b"blob %d\0" % self.size), hashlib.sha256()
                with open(path, "rb") as f:
                    while piece := f.read(1 << 20):
                        sha1.update(piece)
                        sha256.update(piece)
                Blob.cache[key] = sha1.hexdigest(), sha256.hexdigest()
        self.sha1, self.sha256 = Blob.cache[key]
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()
        self.oid = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest() if self.lfs else self.sha1

    @property
    def xet_hash(self):
        """A name in the other storage: 64 digits that are no hash of the bytes."""
        return hashlib.sha256(self.sha256.encode()).hexdigest()


class Repo:
    def __init__(self, repo_id, directory):
        self.id, self.directory = repo_id, directory
        side = directory.with_name(directory.name + ".hub.json")
        self.meta = json.loads(side.read_text()) if side.exists() else {}
        self.gated, self.private = self.meta.get("gated", False), self.meta.get("private", False)

    def files(self):
        found = {}
        for base, dirs, names in os.walk(self.directory, followlinks=True):
            for name in names:
                path = Path(base) / name
                found[str(path.relative_to(self.directory))] = Blob(path)
        return dict(sorted(found.items()))

    def sha(self, files=None):
        files = self.files() if files is None else files
        return hashlib.sha1("".join(f"{p} {b.oid}\n" for p, b in files.items()).encode()).hexdigest()

    def revision_ok(self, rev, sha):
        return rev in ("main", sha, "refs/pr/1") or rev in self.meta.get("revisions", [])


class Hub:
    """State shared by both ports."""

    def __init__(self, root):
        self.root = root
        self.endpoint = self.cdn = None
        self.log, self.faults, self.lock = collections.deque(maxlen=MAX_LOG), [], threading.Lock()
        self.throttles, self.n_met = {}, {}  # by the id of a fault
        self.n_requests = itertools.count(1)
        self.tokens = {"hf_good": "somebody", "hf_nogrant": "stranger", "hf_pending": "applicant"}  # hf_good may read gated and private repos

    def repo(self, repo_id):
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo_id) or ".." in repo_id:
            return None
        directory = self.root / repo_id
        if (directory / "config.json").exists() or directory.with_name(directory.name + ".hub.json").exists():
            return Repo(repo_id, directory)
        return None

    def canonical(self, repo_id):
        """The id of the repository whose name differs from repo_id in case only, or None."""
        directory, found = self.root, []
        for part in repo_id.split("/"):
            same = [d.name for d in sorted(directory.iterdir()) if d.is_dir() and d.name.lower() == part.lower()] if directory.is_dir() else []
            if not same:
                return None
            found.append(same[0])
            directory = directory / same[0]
        return "/".join(found) if self.repo("/".join(found)) else None

    def take_fault(self, repo_id, path, where, method):
        """The first fault that applies here; a fault with `times` wears off."""
        with self.lock:
            for f in self.faults:
                places = KINDS.get(f.get("kind"), PLACES) if f.get("where", "any") == "any" else (f["where"],)
                if f.get("repo") not in (None, repo_id) or where not in places or f.get("method", method) != method:
                    continue
                if f.get("file") and not (path or "").endswith(f["file"]):
                    continue
                if every := f.get("every"):
                    self.n_met[id(f)] = n = self.n_met.get(id(f), 0) + 1
                    if n % every:
                        continue
                if f.get("times") is not None:
                    if f["times"] <= 0:
                        continue
                    f["times"] -= 1
                return f
        return None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "millm-test-hub"
    hub, is_cdn = None, False
    disable_nagle_algorithm = True
    timeout = 120  # of a client that neither reads nor asks

    def log_message(self, *args):
        pass

    def note(self):
        with self.hub.lock:
            self.hub.log.append({"port": "cdn" if self.is_cdn else "hub", "method": self.command, "path": self.path, "range": self.headers.get("Range"),
                                 "authorization": "Authorization" in self.headers, "accept_encoding": self.headers.get("Accept-Encoding"), "time": time.time()})

    def answer(self, status, body=b"", headers=(), content_type="application/json; charset=utf-8"):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        names = {k.lower() for k, _ in headers}
        for k, v in headers:
            self.send_header(k, v)
        if "content-length" not in names:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", content_type)
        self.end_answer(status)
        if self.command != "HEAD":
            self.wfile.write(body)

    def end_answer(self, status):
        """The headers that every answer of the hub has; the CDN has none of them."""
        if not self.is_cdn:
            bucket, quota = ("api", 500) if self.path.startswith("/api/") and "/resolve-cache/" not in self.path else ("resolvers", 3000)
            trace = self.headers.get("X-Amzn-Trace-Id")
            self.send_header("X-Request-Id", f"Root=1-{next(self.hub.n_requests):08x}" + (f";{trace}" if trace else ""))
            self.send_header("RateLimit", f'"{bucket}";r={0 if status == 429 else quota - 2};t={1 if status == 429 else 172}')
            self.send_header("RateLimit-Policy", f'"fixed window";"{bucket}";q={quota};w=300')
        self.end_headers()

    def error(self, status, code, message, extra=()):
        headers = list(extra) + [("X-Error-Message", message)]
        if code:
            headers.append(("X-Error-Code", code))
        self.answer(status, {"error": message}, headers)

    # --- who is asking -------------------------------------------------------------------------

    def token(self):
        value = self.headers.get("Authorization", "")
        return value.removeprefix("Bearer ").strip() if value.startswith("Bearer ") else None

    def refuse_token(self):
        """A bad token is refused everywhere, public repositories included."""
        if self.token() is not None and self.token() not in self.hub.tokens:
            self.error(401, None, "Invalid username or password.")
            return True
        return False

    def granted(self):
        return self.token() == "hf_good"

    def find_repo(self, repo_id):
        repo = self.hub.repo(repo_id)
        if repo is None and (canonical := self.hub.canonical(repo_id)) and not self.hub.repo(canonical).private:
            self.answer(307, b"", [("Location", self.path.replace(repo_id, canonical, 1))])
            return None
        if repo is None or (repo.private and not self.granted()):
            if self.token():
                self.error(404, "RepoNotFound", "Repository not found")
            else:
                self.error(401, None, "Invalid username or password.")
            return None
        if new := repo.meta.get("renamed"):
            self.answer(307, b"", [("Location", self.path.replace(repo_id, new, 1))])
            return None
        return repo

    # --- requests ------------------------------------------------------------------------------

    def do_HEAD(self):
        self.handle_any()

    def do_GET(self):
        self.handle_any()

    def do_POST(self):
        self.handle_any()

    def handle_any(self):
        try:
            url = urllib.parse.urlsplit(self.path)
            path, query = urllib.parse.unquote(url.path), urllib.parse.parse_qs(url.query, keep_blank_values=True)
            n = self.headers.get("Content-Length") or "0"
            if not n.isdecimal() or int(n) > MAX_POST:
                self.close_connection = True
                return self.answer(413, {"error": f"a request may have {MAX_POST} bytes"})
            body = self.rfile.read(int(n))
            if url.path.startswith("/_"):
                return self.control(url.path, body)
            self.note()
            if self.is_cdn:
                return self.serve_cdn(path, query)
            self.serve_hub(url.path, path, query, body)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True

    @staticmethod
    def number(query, name):
        """A count in the query; absent or no number is 0."""
        value = query.get(name, ["0"])[0]
        return int(value) if value.isdecimal() else 0

    def control(self, path, body):
        hub = self.hub
        try:
            value = json.loads(body or b"{}")
        except ValueError:
            return self.answer(400, {"error": "the control is not JSON"})
        with hub.lock:
            if path == "/_log":
                out = list(hub.log)
                if value.get("clear"):
                    hub.log.clear()
                return self.answer(200, out)
            if path == "/_faults":
                faults = value if isinstance(value, list) else [value] if value else []
                if wrong := next(filter(None, map(complaint, faults)), None):
                    return self.answer(400, {"error": wrong})
                hub.faults, hub.n_met = faults, {}
                hub.throttles = {id(f): Throttle(f["bytes_per_second"]) for f in faults if "bytes_per_second" in f}
                hub.log.clear()
                return self.answer(200, hub.faults)
        self.answer(404, {"error": "no such control"})

    def apply_fault(self, repo_id, path, where):
        """True when the fault has answered; otherwise faults of the body are left in self.fault."""
        self.fault = f = self.hub.take_fault(repo_id, path, where, self.command)
        if not f:
            return False
        if f.get("delay"):
            time.sleep(f["delay"])
        if status := f.get("status"):
            codes = {403: ("GatedRepo", "Your request to access model is awaiting a review from the repo authors."), 404: ("EntryNotFound", "Entry not found")}
            code, message = codes.get(status, (None, f"fault {status}"))
            self.error(status, f.get("code", code), f.get("message", message), [("Retry-After", str(f["retry_after"]))] if "retry_after" in f else [])
            return True
        if f.get("kind") == "loop":
            self.answer(307, b"", [("Location", self.path)])
            return True
        if f.get("kind") == "elsewhere":
            self.answer(307, b"", [("Location", self.hub.cdn + self.path)])
            return True
        if f.get("kind") == "html":
            self.answer(200, b"<html>log in to the hotel's wireless network</html>", content_type="text/html")
            return True
        if f.get("kind") == "close":
            self.close_connection = True
            return True
        return False

    def serve_hub(self, raw, path, query, body):
        if self.refuse_token():
            return
        if path == "/api/whoami-v2":
            if self.apply_fault(None, None, "whoami"):
                return
            if self.token() is None:
                return self.error(401, None, "Invalid username or password.")
            return self.answer(200, {"type": "user", "name": self.hub.tokens[self.token()], "auth": {"type": "access_token"}})
        if m := re.fullmatch(r"/api/models/(.+?)/tree/([^/]+)(?:/(.*))?", raw):
            return self.tree(*map(urllib.parse.unquote, (m[1], m[2], m[3] or "")), query)
        if m := re.fullmatch(r"/api/models/(.+?)/paths-info/([^/]+)", raw):
            return self.paths_info(urllib.parse.unquote(m[1]), urllib.parse.unquote(m[2]), body)
        if m := re.fullmatch(r"/api/models/(.+?)/auth-check", path):
            repo = self.find_repo(m[1])
            if repo and self.gate(repo, None):
                self.answer(200, b"OK", content_type="text/plain")
            return
        if m := re.fullmatch(r"/api/models/(.+?)/revision/([^/]+)", raw):
            return self.info(urllib.parse.unquote(m[1]), urllib.parse.unquote(m[2]), query)
        if m := re.fullmatch(r"/api/models/([^/]+(?:/[^/]+)?)", path):
            return self.info(m[1], "main", query)
        if m := re.fullmatch(r"/api/resolve-cache/models/(.+?)/([0-9a-f]{40})/(.+)", path):
            return self.small_file(m[1], m[2], m[3])
        if m := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", raw):
            return self.resolve(*map(urllib.parse.unquote, m.groups()))
        self.error(404, None, "Sorry, we can't find the page you are looking for.")

    def info(self, repo_id, rev, query):
        if self.apply_fault(repo_id, None, "info"):
            return
        repo = self.find_repo(repo_id)
        if not repo:
            return
        files = repo.files()
        sha = repo.sha(files)
        if not repo.revision_ok(rev, sha):
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        try:
            config = json.loads((repo.directory / "config.json").read_text())
        except (OSError, ValueError):
            config = {}
        siblings = []
        for p, b in files.items():
            s = {"rfilename": p}
            if query.get("blobs", [""])[0].lower() == "true":
                s |= {"size": b.size, "blobId": b.oid}
                if b.lfs:
                    s["lfs"] = {"sha256": self.mask(repo, b.sha256), "size": b.size, "pointerSize": 134}
            siblings.append(s)
        licence = repo.meta.get("license", "apache-2.0")
        out = {"_id": hashlib.sha1(repo_id.encode()).hexdigest()[:24], "id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0], "sha": sha,
               "lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2025-01-01T00:00:00.000Z", "private": repo.private, "gated": repo.gated,
               "disabled": repo.meta.get("disabled", False), "downloads": 1, "likes": 1, "library_name": "transformers", "pipeline_tag": "text-generation",
               "tags": ["transformers", "safetensors", f"license:{licence}", "region:us"], "cardData": {"license": licence},
               "config": {k: config[k] for k in ("architectures", "model_type") if k in config}, "usedStorage": sum(b.size for b in files.values()), "siblings": siblings}
        if query.get("securityStatus", [""])[0].lower() == "true":
            out["securityRepoStatus"] = {"scansDone": True, "filesWithIssues": []}
        parameters = self.parameters(repo, files)
        if parameters:
            out["safetensors"] = {"parameters": parameters, "total": sum(parameters.values())}
        wanted = query.get("expand", []) + query.get("expand[]", [])
        if wanted:
            if bad := [w for w in wanted if w not in EXPANDABLE]:
                return self.error(400, None, f"Invalid expand: {bad[0]}")
            out = {k: v for k, v in out.items() if k in ("_id", "id") or k in wanted}
        self.answer(200, out)

    def parameters(self, repo, files):
        counts = {}
        for p in files:
            if not p.endswith(".safetensors"):
                continue
            with open(repo.directory / p, "rb") as f:
                n = struct.unpack("<Q", f.read(8).ljust(8, b"\0"))[0]
                try:
                    header = json.loads(f.read(min(n, 100 << 20)))
                except ValueError:
                    continue
            for name, t in header.items():
                if name != "__metadata__":
                    count = 1
                    for d in t["shape"]:
                        count *= d
                    counts[t["dtype"]] = counts.get(t["dtype"], 0) + count
        return counts

    def mask(self, repo, value):
        return "*" * 64 if repo.gated and not self.granted() else value

    def entry(self, repo, p, b, expand=False):
        e = {"type": "file", "oid": b.oid, "size": b.size, "path": p}
        if b.lfs:
            e["lfs"] = {"oid": self.mask(repo, b.sha256), "size": b.size, "pointerSize": 134}
            if repo.meta.get("xet"):
                e["xetHash"] = self.mask(repo, b.xet_hash)
        if expand:
            e["lastCommit"] = {"id": repo.sha(), "title": "Upload", "date": "2026-01-01T00:00:00.000Z"}
            e["securityFileStatus"] = {"status": "safe"}
        return e

    def tree(self, repo_id, rev, sub, query):
        if self.apply_fault(repo_id, sub, "tree"):
            return
        repo = self.find_repo(repo_id)
        if not repo:
            return
        files = repo.files()
        sha = repo.sha(files)
        if not repo.revision_ok(rev, sha):
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        recursive, expand = (query.get(k, [""])[0].lower() == "true" for k in ("recursive", "expand"))
        entries, seen = [], set()
        for p, b in files.items():
            if sub and not p.startswith(sub + "/"):
                continue
            rest = p[len(sub) + 1:] if sub else p
            parts = rest.split("/")
            for depth in range(1, len(parts)):
                d = "/".join(([sub] if sub else []) + parts[:depth])
                if d not in seen and (recursive or depth == 1):
                    seen.add(d)
                    entries.append({"type": "directory", "oid": hashlib.sha1(d.encode()).hexdigest(), "size": 0, "path": d})
            if recursive or len(parts) == 1:
                entries.append(self.entry(repo, p, b, expand))
        if sub and not entries:
            return self.error(404, "EntryNotFound", f"{sub} does not exist on \"{rev}\"")
        page = repo.meta.get("page", 50 if expand else 1000)
        start = self.number(query, "cursor")
        headers = []
        if start + page < len(entries):
            url = urllib.parse.urlsplit(self.path)
            q = {k: v[0] for k, v in query.items()} | {"cursor": start + page}
            headers.append(("Link", f'<{self.hub.endpoint}{url.path}?{urllib.parse.urlencode(q)}>; rel="next"'))
        self.answer(200, entries[start:start + page], headers)

    def paths_info(self, repo_id, rev, body):
        if self.apply_fault(repo_id, None, "tree"):
            return
        repo = self.find_repo(repo_id)
        if not repo:
            return
        files = repo.files()
        if not repo.revision_ok(rev, repo.sha(files)):
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        form = urllib.parse.parse_qs(body.decode())
        try:
            paths = form.get("paths") or json.loads(body).get("paths", [])
        except ValueError:
            paths = []
        self.answer(200, [self.entry(repo, p, files[p]) for p in paths if p in files])

    def gate(self, repo, path):
        """The gate stands before existence; root README and LICENSE are free.  True: may pass."""
        if not repo.gated or self.granted() or path in ("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt"):
            return True
        if self.token() is None:
            self.error(401, "GatedRepo", f"Access to model {repo.id} is restricted. You must have access to it and be authenticated to access it. Please log in.")
        elif self.token() == "hf_pending":
            self.error(403, "GatedRepo", f"Your request to access model {repo.id} is awaiting a review from the repo authors.")
        else:
            self.error(403, "GatedRepo", f"Access to model {repo.id} is restricted and you are not in the authorized list. Visit {self.hub.endpoint}/{repo.id} to ask for access.")
        return False

    def resolve(self, repo_id, rev, path):
        if self.apply_fault(repo_id, path, "resolve"):
            return
        repo = self.find_repo(repo_id)
        if not repo or not self.gate(repo, path):
            return
        if repo.meta.get("disabled"):
            return self.error(403, None, "Access to this resource is disabled.")
        files = repo.files()
        sha = repo.sha(files)
        if not repo.revision_ok(rev, sha):
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        blob = files.get(path)
        if not blob:
            return self.error(404, "EntryNotFound", "Entry not found", [("X-Repo-Commit", sha)])
        kind = (self.fault or {}).get("kind")
        if kind == "absolute":
            return self.answer(307, b"", [("Location", f"{self.hub.endpoint}/api/resolve-cache/models/{repo_id}/{sha}/{urllib.parse.quote(path)}")])
        commit = [] if kind == "no_commit" else [("X-Repo-Commit", "0" * 40 if kind == "wrong_commit" else sha)]
        if blob.lfs:
            size = blob.size + 1 if kind == "wrong_size" else blob.size
            etag = hashlib.sha256(b"lie").hexdigest() if kind == "wrong_etag" else blob.sha256
            expires = int(time.time()) + {"expired": -10, "brief": 1}.get(kind, 3600)
            location = f"{self.hub.cdn}/{repo_id}/{blob.sha256}/{urllib.parse.quote(path)}?Expires={expires}&Signature=secret-{blob.sha1[:8]}"
            body = b"Found. Redirecting to the CDN"
            headers = commit + [("Location", location), ("X-Linked-ETag", f'"{etag}"'), ("Accept-Ranges", "bytes")]
            if kind != "no_size":
                headers.append(("X-Linked-Size", str(size)))
            if repo.meta.get("xet"):
                headers += [("X-Xet-Hash", blob.xet_hash), ("Link", f'<{self.hub.endpoint}/api/models/{repo_id}/xet-read-token/{sha}>; rel="xet-auth"')]
            return self.answer(302, body, headers, "text/plain")
        if repo.gated:
            return self.send_file(blob, [("ETag", f'"{blob.sha1}"')] + commit)
        location = f"/api/resolve-cache/models/{repo_id}/{sha}/{urllib.parse.quote(path)}?etag=%22{blob.sha1}%22"
        self.answer(307, b"Temporary Redirect", commit + [("Location", location), ("X-Linked-ETag", f'"{blob.sha1}"')], "text/plain")

    def small_file(self, repo_id, sha, path):
        if self.apply_fault(repo_id, path, "cache"):
            return
        repo = self.find_repo(repo_id)
        if not repo or not self.gate(repo, path):
            return
        blob = repo.files().get(path)
        if not blob:
            return self.error(404, "EntryNotFound", "Entry not found")
        self.send_file(blob, [("ETag", f'"{blob.sha1}"'), ("X-Repo-Commit", sha)])

    def serve_cdn(self, path, query):
        m = re.fullmatch(r"/(.+)/([0-9a-f]{64})/(.+)", path)
        repo_id, sha256, name = m.groups() if m else (None, None, None)
        if self.apply_fault(repo_id, name, "cdn"):
            return
        if "Authorization" in self.headers:
            return self.answer(400, b"a token came to the CDN", content_type="text/plain")
        if self.number(query, "Expires") < time.time():
            return self.answer(403, b"<Error><Code>AccessDenied</Code></Error>", content_type="application/xml")
        repo = m and self.hub.repo(repo_id)
        blob = repo and repo.files().get(name)
        if not blob:
            return self.answer(404, b"NoSuchKey", content_type="application/xml")
        self.send_file(blob, [("ETag", f'"{blob.xet_hash}"')])

    def asked_range(self, size):
        """The bytes asked for, as (start, end, is part).  A Range that makes no sense is as good as none; None when nothing of the file is in it."""
        m = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not m or not (m[1] or m[2]) or (m[1] and m[2] and int(m[2]) < int(m[1])):
            return 0, size, False
        if not m[1]:
            return (max(0, size - int(m[2])), size, True) if int(m[2]) and size else None
        return (int(m[1]), min(int(m[2]) + 1, size) if m[2] else size, True) if int(m[1]) < size else None

    def send_file(self, blob, headers):
        fault = self.fault or {}
        kind = fault.get("kind")
        asked = (0, blob.size, False) if kind == "ignore_range" else self.asked_range(blob.size)
        if not asked:
            return self.answer(416, b"", headers + [("Content-Range", f"bytes */{blob.size}")])
        start, end, is_part = asked
        if kind == "other_part" and is_part and start > 0:
            start -= 1
        if not is_part and not fault and self.wants_gzip(blob):
            return self.send_gzip(blob, headers)
        self.send_response(206 if is_part else 200)
        for k, v in headers + ([("Content-Range", f"bytes {start}-{end - 1}/{blob.size}")] if is_part else []):
            self.send_header(k, v)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Type", "application/octet-stream")
        self.end_answer(200)
        if self.command == "HEAD":
            return
        stop = end
        if kind in ("truncate", "reset", "stall"):
            stop = min(end, max(start, fault["at"]) if "at" in fault else start + fault["after"])
        self.send_range(blob, start, stop, fault)
        if kind == "truncate":
            self.close_connection = True
        elif kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
        elif kind == "stall" and stop < end:
            # a client that gives up closes: then there is something to read
            select.select([self.connection], [], [], fault.get("seconds", 3600))
            self.send_range(blob, stop, end, {})

    def wants_gzip(self, blob):
        """The Hub compresses texts for who offers it: no Content-Length then, and a weak etag."""
        return not self.is_cdn and self.command == "GET" and "gzip" in (self.headers.get("Accept-Encoding") or "") and blob.path.suffix in (".json", ".md", ".txt")

    def send_gzip(self, blob, headers):
        self.send_response(200)
        for k, v in headers:
            self.send_header(k, f"W/{v}" if k == "ETag" else v)
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.end_answer(200)
        data = gzip.compress(blob.path.read_bytes())
        self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data))

    def send_range(self, blob, start, end, fault):
        throttle = self.hub.throttles.get(id(fault))
        piece = max(1, min(1 << 20, int(throttle.rate / 50))) if throttle else end - start
        with open(blob.path, "rb") as f:
            if fault.get("kind") == "wrong_bytes" and start < end:
                f.seek(start)
                self.connection.sendall(bytes([f.read(1)[0] ^ 1]))
                start += 1
            while start < end:
                n = min(piece, end - start)
                if throttle:
                    throttle.wait(n)
                if self.connection.sendfile(f, start, n) < n:
                    self.close_connection = True  # the file shrank
                    return
                start += n


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = allow_reuse_address = True
    request_queue_size = 128


def start(root, port=0, cdn_port=0):
    """Both servers on threads of their own; returns the Hub.  Tests may also use it in their own process."""
    hub = Hub(Path(root))
    for is_cdn, p in ((False, port), (True, cdn_port)):
        handler = type("H", (Handler,), {"hub": hub, "is_cdn": is_cdn, "fault": None})
        server = Server(("127.0.0.1", p), handler)
        url = f"http://127.0.0.1:{server.server_address[1]}"
        if is_cdn:
            hub.cdn = url
        else:
            hub.endpoint = url
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return hub


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--root", required=True)
    p.add_argument("--port", type=int, default=0)
    p.add_argument("--cdn-port", type=int, default=0)
    p.add_argument("--ready-file")
    a = p.parse_args()
    if not Path(a.root).is_dir():
        p.error(f"{a.root} is not a directory")
    try:
        hub = start(a.root, a.port, a.cdn_port)
    except OSError as e:
        return f"hub.py: cannot listen: {e}"
    if a.ready_file:
        tmp = a.ready_file + ".tmp"
        Path(tmp).write_text(json.dumps({"endpoint": hub.endpoint, "cdn": hub.cdn, "pid": os.getpid()}))
        os.rename(tmp, a.ready_file)
    print(f"listening {hub.endpoint}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    sys.exit(main())
