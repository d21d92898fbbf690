#!/usr/bin/env python3
"""orion: a live, multi-tenant web server in one file, on the standard library alone.

    python3 orion.py            serves on http://127.0.0.1:8000 with ./data, and a demo to click through

One request, from the socket to the row and back to every screen:

    browser --- POST /w/acme/todos --> edge --> worker
                                                  | 1. may they?   GET /_gate/acme
                                                  v
                                              Directory   control plane: accounts, sessions, memberships
                                                  | 2. 200: forward, with the verdict as trusted headers
                                                  v
                                              Workspace   data plane: one SQLite file for this tenant
                                                  | 3. validate, write, commit, publish("todos")
                                                  v
    every browser <-- 4. the whole region, read again, rendered once per role --- edge, which holds the streams

Events carry no state. A publish only says "read the store again", so a frame that is dropped, coalesced or late harms
nobody, and reconnecting is just asking again.

The words, used in one meaning from here to the last line:

    workspace   a tenant: "acme". Its name never touches the file system; its id, 64 hex digits, does
    account     somebody who can sign in: "carol"
    viewer      an account inside a workspace, as the gate saw it: account, role, grants
    grant       a permission: "todos:delete". A role is a name for a set of grants
    verdict     the gate's answer: 200 with the viewer as headers, or 401, or 403
    slice       a feature from its tables to its pages: "todos"
    region      the part of a page that stays current: <section id="todos">
    command     a request that may write
    job         work that a command leaves for later, in its own transaction
    topic       what a command publishes and a region listens to: "todos"
    rendering   a region for one role at one version, made once and shared by everybody who looks at it

Read it from top to bottom: what a line does needs only what stands above it; a type hint may name what comes later.

     1 Settings        2 Markup          3 Requests        4 Events          5 Trace           6 Store
     7 Bus             8 Objects         9 Jobs           10 Slices         11 Todos          12 Workspace
    13 Seals          14 Directory      15 Worker         16 Reader         17 Answers        18 Process
    19 Streams        20 Console        21 Snapshots      22 Planes         23 Figures        24 Edge
    25 Composition    26 Administration 27 Command line

What is not here on purpose: TLS and HTTP/2 (a proxy's work), an ORM, async, a second writer to the same tenant.
"""
from __future__ import annotations

import argparse
import bisect
import collections
import contextlib
import ctypes
import functools
import getpass
import hashlib
import hmac
import html
import http.client
import ipaddress
import itertools
import json
import os
import pathlib
import random
import re
import secrets
import selectors
import shutil
import signal
import socket
import sqlite3
import stat
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
import zlib
from email.utils import formatdate
from http.server import ThreadingHTTPServer
from typing import Any, Callable, Dict, FrozenSet, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

try:
    import fcntl
    import resource
except ImportError:                      # Windows: no lock on the data folder, no limit of descriptors to raise
    fcntl = resource = None


# ==== 1. Settings ====================================================================================================
# All that can be set, by a flag or an ORION_* variable, in one place that never changes while the server runs.

class Settings(NamedTuple):
    host: str = "127.0.0.1"
    port: int = 8000                     # 0: any free one
    data: pathlib.Path = pathlib.Path("data")
    demo: Optional[bool] = None          # None: where nobody but this machine gets in
    idle: float = 60.0                   # seconds until an unused workspace goes to sleep
    awake: int = 0                       # workspaces awake at most; 0: a quarter of the descriptors, up to 1,024
    threads: int = 16
    connections: int = 10_000
    max_workspaces: int = 0              # for one account to own; 0: 20, in the demo 2,000
    quota: int = 10 * 2 ** 30            # bytes of a workspace's file, as of a Durable Object's
    backup_every: float = 0.0            # seconds between two snapshots in data/backups; 0: none are made
    keep: int = 24                       # snapshots
    log: str = "common"                  # access log on standard output: common, json or off
    streams: int = 0                     # for one account to have open; 0: 100, in the demo as many as connections
    allow_host: Tuple[str, ...] = ()     # names that this server goes by, besides localhost, its own and any address
    trust_proxy: Tuple[str, ...] = ()    # networks whose X-Forwarded-For and -Proto are believed
    single: Optional[pathlib.Path] = None       # one file for everything, in place of the data folder
    plane: str = ""                      # directory or data: one plane alone, with others in other processes
    directory: str = ""                  # HOST:PORT of the directory, for a data plane
    node_name: str = ""                  # HOST:PORT that the directory knows a data plane by; "": as it listens
    slices: Sequence[Slice] = ()         # the features that it serves

    @property
    def key_file(self) -> pathlib.Path:
        return self.single.with_name(f"{self.single.name}.key") if self.single else self.data / "secret.key"

    @property
    def directory_file(self) -> pathlib.Path:
        return self.single or self.data / "directory.db"

    @property
    def workspaces(self) -> pathlib.Path:
        """The folder of the tenants' files."""
        return self.data / "workspaces"


# ==== 2. Markup ======================================================================================================
# Text becomes markup in one place. A template has holes; whatever is put in a hole is escaped unless it is Html, and
# only a template makes Html. So markup that a user typed is text on every page, without anybody remembering it.

TEMPLATES = pathlib.Path(__file__).resolve().parent / "templates"


class Html(str):
    """Markup known to be safe. Adding plain text to it gives a plain str again, which the next hole escapes."""
    __slots__ = ()

    def join(self, parts: Iterable[Any]) -> Html:
        return Html(str.join(self, map(escape, parts)))


def escape(value: Any) -> Html:
    return value if type(value) in (Html, int) else Html(html.escape(str(value)))


HOLE = re.compile(r"\{\{ ?(\w+) ?\}\}")


class Template:
    """Markup with holes: Template("<b>{{name}}</b>")(name="<x>") is "<b>&lt;x&gt;</b>". What follows a line like
    `<!-- row -->` is its part row. In the hole {{row}} a dict, or a row of a store, stands for that part, where the
    values around it hold too; a list for one such part after the other; True for the part as it is or, where there is
    none, as in <input {{checked}}>, for the hole's own name; False for nothing. KeyError: a hole is not filled."""

    def __init__(self, text: str, parts: Optional[Dict[str, Template]] = None) -> None:
        text, *pieces = re.split(r"(?m)^<!-- (\w+) -->\n", text)
        self.format = HOLE.sub(r"%(\1)s", text.rstrip("\n").replace("%", "%%"))
        self.holes = {*HOLE.findall(text)}
        self.parts = {} if parts is None else parts
        self.parts.update({name: Template(part, self.parts) for name, part in zip(pieces[::2], pieces[1::2])})

    def __call__(self, **values: Any) -> Html:
        try:
            return Html(self.filled(values))
        except KeyError as name:
            raise KeyError(f"nothing fills the hole {name}, or there is no such part in this template") from name

    def filled(self, values: Dict[str, Any]) -> str:
        return self.format % {name: html.escape(value) if type(value := values[name]) is str else
                              self.held(name, value, values) for name in self.holes}

    def held(self, name: str, value: Any, around: Dict[str, Any]) -> str:
        if type(value) is bool:
            return "" if not value else self.parts[name].filled(around) if name in self.parts else name
        if type(value) is list:
            return "".join([self.parts[name].filled({**around, **one}) for one in value])
        return self.parts[name].filled({**around, **value}) if type(value) in (dict, sqlite3.Row) else escape(value)


@functools.lru_cache(maxsize=None)
def template(name: str) -> Template:
    """The file templates/<name>.html; of "todos.row" its part row."""
    file, _, part = name.partition(".")
    return template(file).parts[part] if part else Template((TEMPLATES / f"{file}.html").read_text("utf-8"))


# ==== 3. Requests ====================================================================================================
# Four words that all later sections speak. An object and the worker take a Request and return a Response; neither knows
# of sockets. Whoever must say no raises Refused, with a status and a sentence that tells what to do next.

SAFE, METHODS = ("GET", "HEAD"), ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
VERDICT = ("x-account", "x-role", "x-can-delete", "x-grants", "x-workspace", "x-id", "x-operator", "x-read-only",
           "x-quota", "x-node")                                        # what the gate says of a viewer
TRUSTED = {*VERDICT, "x-verdict", "x-proved", "x-known", "x-hashed", "x-counts", "x-problem"}  # nobody outside may say


class Request(NamedTuple):
    """path is decoded, query is not; header names are lower case. wait: seconds for which the thread that asks may be
    kept in line; 0: it may wait for nothing at all, no file either. batch: whose commit a command may share (section
    8); None: it is durable when it is answered."""
    method: str
    path: str
    query: str = ""
    headers: Dict[str, str] = {}
    body: bytes = b""
    peer: str = ""
    wait: float = threading.TIMEOUT_MAX
    scheme: str = "http"                             # https: by the word of a trusted proxy
    batch: Optional[Batch] = None

    @property
    def datastar(self) -> bool:
        return "datastar-request" in self.headers

    @property
    def form(self) -> bool:
        return self.headers.get("content-type", "").lower().startswith("application/x-www-form-urlencoded")

    @property
    def params(self) -> Dict[str, str]:
        return dict(urllib.parse.parse_qsl(self.query))

    def fields(self) -> Dict[str, Any]:
        """What was sent along, as a form or as signals. Refused(415): as neither; Refused(400): not readable."""
        if self.form:
            return dict(urllib.parse.parse_qsl(self.body.decode("utf-8", "replace"), keep_blank_values=True))
        if self.body and not self.headers.get("content-type", "").lower().startswith("application/json"):
            raise Refused(415, "Send application/json or application/x-www-form-urlencoded.")
        return read_signals(self)


class Response(NamedTuple):
    """rendering: a live answer's first frame; watch: the way to the next. which: what was written, or who looks on."""
    status: int
    body: bytes = b""
    type: str = "text/plain; charset=utf-8"
    headers: Tuple[Tuple[str, str], ...] = ()
    rendering: Optional[Rendering] = None
    watch: Optional[Watch] = None
    which: str = ""

    @property
    def size(self) -> int:
        return len(self.rendering.frame if self.rendering else self.body)


NO_VALUE = re.compile(r"[^\t -~\x80-\xff]")          # what no header value has (RFC 9110, 5.5)


def check_values(headers: Iterable[Tuple[str, str]]) -> None:
    """ValueError: one of them would end its line, and begin another."""
    if any([NO_VALUE.search(value) for _, value in headers]):
        raise ValueError(f"a character that no header value can have, in {headers!r:.200}")


def sound(response: Any) -> Response:
    """response, if it can be sent. TypeError, ValueError: it can't."""
    if type(response) is not Response or type(response.body) is not bytes:
        raise TypeError(f"an answer is a Response with bytes for a body, such as done(ctx), and not {response!r:.200}")
    check_values(response.headers)
    return response


class Refused(Exception):
    """A no with its HTTP status. message says what to do next; where it is about what they typed (422, 409), it is
    shown at the field whose signal this is."""

    def __init__(self, status: int, message: str, headers: Tuple[Tuple[str, str], ...] = (), signal: str = "problem"):
        super().__init__(status, message)
        check_values(headers)
        self.status, self.message, self.headers, self.signal = status, message, headers, signal


class WouldBlock(Exception):
    """The request may not wait so long for this: a lock, a file or a rendering that is not at hand."""


class Viewer(NamedTuple):
    """Who looks, as the gate saw them; a region, made for a role, sees no account. operator: who looks on as them."""
    account: str = ""
    role: str = ""
    grants: Tuple[str, ...] = ()
    operator: str = ""
    read_only: bool = False

    def can(self, grant: str) -> bool:
        return grant in self.grants


NOTHING_HERE = 404, "There is nothing at this address. Go back, or start from the home page."
STRANGERS = "One process takes the other for a stranger. Copy the directory's secret.key to each node; compare clocks."


def as_json(data: Any) -> Response:
    return Response(200, json.dumps(data).encode(), "application/json")


def only_read(request: Request) -> None:
    if request.method not in SAFE:
        raise Refused(405, "This address takes GET, HEAD.", (("allow", "GET, HEAD"),))


def see_other(path: str, *headers: Tuple[str, str]) -> Response:
    return Response(303, headers=(("location", path), *headers))


def local_path(path: str) -> str:
    """path if it leads to this server, else "/": //host, /\\host and schemes would lead elsewhere."""
    return path if re.fullmatch(r"/(?![/\\])[!-\[\]-~]{0,2000}", path) else "/"


PLAIN_PATH = re.compile(r"(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*/?")
AMBIGUOUS = 400, "The path is ambiguous. Write it without empty or dot segments, encoded slashes or control characters."


def plain_path(path: str) -> str:
    """path, decoded once. Refused(400): a proxy could resolve it to another one."""
    if PLAIN_PATH.fullmatch(path):
        return path
    try:
        decoded = urllib.parse.unquote(path, errors="strict")
    except UnicodeDecodeError:
        raise Refused(*AMBIGUOUS) from None
    segments = decoded.split("/")[1:]
    if (re.search(r"%(?![0-9A-Fa-f]{2})", path) or len(segments) != path.count("/") or "" in segments[:-1]
            or {".", ".."} & {*segments} or re.search(r"[\x00-\x1f\x7f\\;#]", decoded)):
        raise Refused(*AMBIGUOUS)
    return decoded


# ==== 4. Events ======================================================================================================
# What goes down a stream, in Datastar's words: patch these elements, patch these signals. The text is framed in one
# function, which splits it at every line end a browser knows, so that no text can end its event and begin another.

def event(what: str, text: str, options: Dict[str, Any], event_id: Optional[str], retry: Optional[int]) -> bytes:
    """A server-sent event (WHATWG HTML, 9.2.5). what: elements or signals. ValueError: a line break outside of text."""
    fields = [("event", f"datastar-patch-{what}"), ("id", event_id), ("retry", retry),
              *[("data", f"{name} {value}") for name, value in options.items() if value]]
    lines = [f"{name}: {value}" for name, value in fields if value is not None]
    if re.search(r"[\r\n\0]", "".join(lines)):
        raise ValueError("a line break or NUL inside a line of an event")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = text.replace("\0", "\ufffd").replace("\n", f"\ndata: {what} ")
    lines += [f"data: {what} {text}"] if text else []
    return ("\n".join(lines) + "\n\n").encode("utf-8", "replace")


def patch_elements(elements: str = "", *, selector: Optional[str] = None, mode: str = "outer",
                   namespace: Optional[str] = None, use_view_transition: bool = False,
                   event_id: Optional[str] = None, retry: Optional[int] = None) -> bytes:
    """Morph elements into the page, by their own ids or at selector. mode: outer, inner, replace, prepend, append,
    before, after, remove. retry: milliseconds. Defaults are left out of the wire."""
    options = {"selector": selector, "mode": mode if mode != "outer" else None, "namespace": namespace,
               "useViewTransition": "true" if use_view_transition else None}
    return event("elements", elements, options, event_id, retry)


def patch_signals(signals: Any, *, only_if_missing: bool = False, event_id: Optional[str] = None,
                  retry: Optional[int] = None) -> bytes:
    """Merge signals (a dict, or JSON text sent as it is) into the page's (RFC 7386): null deletes, arrays replace."""
    text = signals if isinstance(signals, str) else json.dumps(signals, ensure_ascii=False)
    return event("signals", text, {"onlyIfMissing": "true" if only_if_missing else None}, event_id, retry)


def remove_elements(selector: str, *, event_id: Optional[str] = None, retry: Optional[int] = None) -> bytes:
    return patch_elements(selector=selector, mode="remove", event_id=event_id, retry=retry)


def execute_script(script: str, *, auto_remove: bool = True, attributes: Optional[Dict[str, str]] = None,
                   event_id: Optional[str] = None, retry: Optional[int] = None) -> bytes:
    """Run script in the page. ValueError: it contains `</script`, which would end its element early."""
    if "</script" in script.lower():
        raise ValueError("a script must not contain </script")
    given = {"data-effect": "el.remove()"} if auto_remove else {}
    opening = "".join([f' {name}="{escape(value)}"' for name, value in {**given, **(attributes or {})}.items()])
    return patch_elements(f"<script{opening}>{script}</script>", selector="body", mode="append",
                          event_id=event_id, retry=retry)


def read_signals(request: Request) -> Dict[str, Any]:
    """The signals that came along: in the query of GET and DELETE, else in the body. Refused(400): no JSON object."""
    text = request.params.get("datastar", "") if request.method in (*SAFE, "DELETE") else request.body
    with contextlib.suppress(ValueError, RecursionError):
        signals = json.loads(text or "{}")
        if isinstance(signals, dict):
            return signals
    raise Refused(400, "The signals are not a JSON object. Reload the page and try again.")


def chunk(data: bytes) -> bytes:
    """RFC 9112, 7.1. A chunk needs no connection to be right, so one is made for all."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def unchunk(one: bytes) -> bytes:
    return one[one.index(b"\n") + 1:-2]


def deflated(data: bytes) -> bytes:
    """Compressed so that it can follow anything in a gzip stream: it ends on a byte and looks back at nothing (RFC
    1951, 3.2.4). So one piece serves all streams, and no stream needs a compressor of its own."""
    squeeze = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    return squeeze.compress(data) + squeeze.flush(zlib.Z_FULL_FLUSH)


GZIP_HEAD = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"                          # RFC 1952, 2.3
LAST_CHUNK, BEAT, CURRENT = b"0\r\n\r\n", b":\n\n", b"event: datastar-current\ndata: version unchanged\n\n"


# ==== 5. Trace =======================================================================================================
# What the console shows of a running server: each store call, and each request on its way through the planes. Notes are
# taken while somebody watches, and only the last are kept: a server faster than eyes drops notes, it does not wait.
# What goes wrong stands in the log, whoever watches.

class Call(NamedTuple):
    """A store call. object: the id of the object whose store it was. rows: found or changed by it; -1: it has none."""
    number: int
    at: float
    object: str
    sql: str
    args: str
    rows: int
    micros: int


class Leg(NamedTuple):
    """A request to one object (kind: gate, directory, workspace). said: the answer's headers. calls: to its store."""
    kind: str
    id: str
    status: int
    micros: int
    calls: int
    said: Dict[str, str]


class Trip:
    """A request from outside: its legs, its store calls, how it ended. size: bytes of the answer's body."""

    def __init__(self, method: str, path: str) -> None:
        self.method, self.path, self.number, self.status, self.size = method, path, 0, 0, 0
        self.legs: List[Leg] = []
        self.calls: List[Call] = []


class OfThread(threading.local):
    """What one thread does: the trip that it is on, its last one, and whether what it does is not noted."""
    trip, last, silent = None, None, False


class Trace:
    """The notes of all objects of one server. with_args: parameters are shown, which are what users typed."""
    KEPT_CALLS, KEPT_TRIPS = 200, 12

    def __init__(self, with_args: bool = False) -> None:
        self.with_args, self.watched, self.lock, self.thread = with_args, 0, threading.Lock(), OfThread()
        self.calls, self.trips = collections.deque(maxlen=self.KEPT_CALLS), collections.deque(maxlen=self.KEPT_TRIPS)
        self.noted = self.shown = self.dropped = self.followed = 0
        self.news: Callable[[], None] = lambda: None               # called after each note

    def watch(self, more: int) -> None:
        """One watcher more (1) or less (-1). With none, a store call costs one look at a number."""
        with self.lock:
            self.watched += more

    @contextlib.contextmanager
    def silence(self, silent: bool = True) -> Iterator[None]:
        """What this thread does meanwhile is the console's own, and not noted."""
        before, self.thread.silent = self.thread.silent, silent
        try:
            yield
        finally:
            self.thread.silent = before

    def note(self, object: str, sql: str, args: Sequence[Any], rows: int, seconds: float) -> None:
        args = args if self.with_args else ()
        shown = ", ".join([f"{len(arg)} bytes" if isinstance(arg, bytes) else repr(arg)[:80] for arg in args])
        with self.lock:
            self.noted += 1
            self.dropped += len(self.calls) == self.KEPT_CALLS and self.calls[0].number > self.shown
            call = Call(self.noted, time.time(), object, " ".join(sql.split()), shown, rows, micros(seconds))
            self.calls.append(call)
        if self.thread.trip:
            self.thread.trip.calls.append(call)
        self.news()

    def follow(self, request: Request, route: Callable[[Request], Response]) -> Response:
        """route(request), noted as a trip."""
        if not self.watched or self.thread.silent or request.path.startswith("/console"):
            return route(request)
        self.thread.trip = self.thread.last = trip = Trip(request.method, request.path)
        try:
            response = route(request)
            trip.status, trip.size = response.status, response.size
            return response
        except Refused as no:
            trip.status, trip.size = no.status, len(no.message)
            raise
        finally:
            self.thread.trip = None
            if trip.status and trip.legs:            # one that no object was asked for shows nothing of the planes
                with self.lock:
                    self.followed = trip.number = self.followed + 1
                    self.trips.append(trip)
                self.news()

    def probe(self, request: Request, route: Callable[[Request], Response]) -> Trip:
        """The trip of one request, whoever watches; also one that was refused."""
        self.watch(1)
        try:
            with self.silence(False), contextlib.suppress(Refused, WouldBlock):
                self.follow(request, route)
            return self.thread.last
        finally:
            self.watch(-1)

    def leg(self, kind: str, id: str, fetch: Callable[[Request], Response], request: Request) -> Response:
        """fetch(request), noted as a leg of this thread's trip."""
        trip, started, status, said = self.thread.trip, time.perf_counter(), 0, ()
        before = len(trip.calls) if trip else 0
        try:
            response = fetch(request)
            status, said = response.status, response.headers
            return response
        except Refused as no:
            status = no.status
            raise
        finally:
            if trip and status:
                took, calls = micros(time.perf_counter() - started), len(trip.calls) - before
                trip.legs.append(Leg(kind, id, status, took, calls, dict(said)))


def micros(seconds: float) -> int:
    return round(1e6 * seconds)


CRASH = (Exception, SystemExit)                      # what a slice's code may raise: sys.exit() must end no thread


def log(message: str) -> None:
    """One line, whatever is in it: control characters are escaped, so nobody writes the log's next line for us."""
    with contextlib.suppress(OSError, ValueError):   # nobody listens: no reason to fail a request
        print(message.encode("unicode_escape").decode(), file=sys.stderr, flush=True)


log_once = functools.lru_cache(maxsize=256)(log)     # what stays the same as long as the program does


def log_error(where: str, error: BaseException) -> None:
    """What it is and which line of a slice it comes from, before all the rest."""
    stack = traceback.extract_tb(error.__traceback__)
    ours = __file__, os.path.dirname(os.__file__)
    at = ([frame for frame in stack if not frame.filename.startswith(ours)] or stack)[-1]
    rest = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    log(f"error: {where}: {type(error).__name__}: {error} ({at.filename}:{at.lineno}): {rest}")


# ==== 6. Store =======================================================================================================
# One SQLite file, five synchronous methods. A view calls store.query() with no await, which is what lets one loop serve
# every region; a store that answers later would make every view, model and command wait in another language.
# A write is durable when its transaction has returned (WAL, synchronous=FULL).

class MigrationError(Exception):
    """The file and the slices do not fit together; the text names slice, entry and table."""


def identity(path: pathlib.Path) -> Tuple[int, int]:
    """Which file is at path. sqlite3.DatabaseError: none; an empty one, to SQLite a new database; no regular one."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        raise sqlite3.DatabaseError(f"the file {path.name} is missing") from None
    if not stat.S_ISREG(found.st_mode) or found.st_size == 0:
        raise sqlite3.DatabaseError(f"{path.name} is {'empty' if found.st_size == 0 else 'no regular file'}")
    return found.st_dev, found.st_ino


def with_wal(path: pathlib.Path) -> List[pathlib.Path]:
    """The files of a database that there are."""
    return [file for file in (path, path.with_name(f"{path.name}-wal")) if file.exists()]


def beside(path: pathlib.Path, tail: str) -> pathlib.Path:
    return path.with_name(f"{path.name}.{tail}")


def put_in_place(part: pathlib.Path, target: pathlib.Path) -> None:
    """Durable first, then by its name: a power cut leaves the whole file or the one before."""
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    for tail in ("-wal", "-shm"):                    # of a database that was there: SQLite would add it to this one
        target.with_name(f"{target.name}{tail}").unlink(missing_ok=True)
    os.replace(part, target)
    if fcntl:                                        # POSIX, where the name is durable when its folder is
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# What SQLite says of a statement while it compiles it, sorted by what it means for who owns which table.
NAMED_SECOND = {sqlite3.SQLITE_ALTER_TABLE, sqlite3.SQLITE_CREATE_INDEX, sqlite3.SQLITE_DROP_INDEX,
                sqlite3.SQLITE_CREATE_TRIGGER, sqlite3.SQLITE_DROP_TRIGGER}      # their table is the second name
ORIONS_OWN = {sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH, sqlite3.SQLITE_PRAGMA, sqlite3.SQLITE_TRANSACTION,
              sqlite3.SQLITE_SAVEPOINT}
WRITES = {sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE}
ROWS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE, *WRITES}
REFERENCES = """SELECT lower(one.name) AS child, lower("table") AS parent
                FROM sqlite_master AS one, pragma_foreign_key_list(one.name) WHERE type = 'table'"""


class Store:
    """One connection to one file, or to memory (path None). Not locked: the object that owns it lets one thread in at a
    time (section 8). Raises sqlite3.Error as it comes; the edge knows what to tell the client."""
    # Small pages and 10 kept statements: an awake tenant takes 93 KB, 32 of them the index of its WAL. With SQLite's
    # 4,096 bytes, Python's 128 and 20 pages set aside (section 18) it takes 183.
    PRAGMAS = ("PRAGMA page_size=1024; PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA foreign_keys=ON; "
               "PRAGMA cache_size=-512")

    def __init__(self, path: Optional[pathlib.Path], create: bool = False, trace: Optional[Trace] = None,
                 name: str = "") -> None:
        self.trace, self.name = trace or Trace(), name         # name: whose calls these are, in the notes
        uri = f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}" if path else "file::memory:"
        self.path, self.inode = path, identity(path) if path and not create else None      # None: it is made just now
        self.db = sqlite3.connect(uri, uri=True, timeout=5, isolation_level=None, check_same_thread=False,
                                  cached_statements=10)
        self.db.row_factory = sqlite3.Row
        self.on_commit: List[Tuple[Any, ...]] = []   # calls, (function, *args)
        self.cursor = self.db.cursor()               # one for all: each would stay on record, with 200 others
        self.db.executescript(self.PRAGMAS)

    def query(self, sql: str, *args: Any) -> List[sqlite3.Row]:
        return self.call(sql, args)

    def one(self, sql: str, *args: Any) -> Optional[sqlite3.Row]:
        """The first row. All are fetched: a cursor with rows to come would keep its transaction open."""
        rows = self.call(sql, args)
        return rows[0] if rows else None

    def exec(self, sql: str, *args: Any) -> int:
        """The number of rows that changed."""
        self.call(sql, args)
        return self.cursor.rowcount

    def call(self, sql: str, args: Sequence[Any]) -> List[sqlite3.Row]:
        if not self.trace.watched or self.trace.thread.silent:
            return self.cursor.execute(sql, args).fetchall()
        started = time.perf_counter()
        rows = self.cursor.execute(sql, args).fetchall()
        found = len(rows) if self.cursor.description else self.cursor.rowcount
        self.trace.note(self.name, sql, args, found, time.perf_counter() - started)
        return rows

    @contextlib.contextmanager
    def tx(self, begun: bool = False) -> Iterator[None]:
        """All of it or nothing. Inside another tx it is a savepoint: it can fail alone. begun: the caller began it."""
        outer, mark = begun or not self.db.in_transaction, len(self.on_commit)
        if not begun:
            self.begin() if outer else self.exec("SAVEPOINT part")
        try:
            yield
            self.commit() if outer else self.exec("RELEASE part")
        except BaseException:
            del self.on_commit[mark:]
            if self.db.in_transaction:               # a full disk can have rolled back already
                self.exec("ROLLBACK" if outer else "ROLLBACK TO part")
                if not outer:
                    self.exec("RELEASE part")        # it is still there, and would be what the next one goes back to
            raise

    def begin(self) -> None:
        """IMMEDIATE: a transaction that takes its write lock late can fail at once, whatever the timeout."""
        self.exec("BEGIN IMMEDIATE")

    def commit(self) -> None:
        """Durable first, told to others second, and each thing once. When the commit fails nothing is told."""
        waiting, self.on_commit = self.on_commit, []
        try:
            self.exec("COMMIT")
        except BaseException:
            if self.db.in_transaction:
                self.exec("ROLLBACK")
            raise
        for tell, *what in dict.fromkeys(waiting):
            tell(*what)

    def migrate(self, slice: str, entries: Sequence[str], apply: bool = True) -> None:
        """Run the entries, each one statement, that did not run here yet: all or none; apply=False: only remember them,
        for other files. MigrationError: one that ran was edited or is gone, or touches a table of another slice."""
        self.db.execute("CREATE TABLE IF NOT EXISTS _migrations (slice TEXT, entry INTEGER, digest TEXT, tables TEXT, "
                        "PRIMARY KEY (slice, entry)) WITHOUT ROWID")
        digests = [hashlib.sha256(sql.encode()).hexdigest() for sql in entries]
        ran = self.query("SELECT entry, digest FROM _migrations WHERE slice = ? ORDER BY entry", slice)
        for row, digest in itertools.zip_longest(ran, digests[:len(ran)]):
            if row["digest"] != digest:
                why = "was edited since; append an entry instead" if digest else "is unknown; a newer version wrote it"
                raise MigrationError(f"slice {slice!r}, entry {row['entry']} ran here and {why}")
        with self.tx() if len(ran) < len(entries) else contextlib.nullcontext():
            for number in range(len(ran), len(entries)):
                tables = self._apply(slice, number + 1, entries[number]) if apply else ""
                self.exec("INSERT INTO _migrations VALUES (?, ?, ?, ?)", slice, number + 1, digests[number], tables)

    def _apply(self, slice: str, number: int, sql: str) -> str:
        """Returns the tables that it made: they are the slice's own from now on."""
        known, referred = self.tables(), self.references(sql)
        try:
            self.judged(slice, sql)
        except (sqlite3.Error, sqlite3.Warning, PermissionError) as error:
            raise MigrationError(f"slice {slice!r}, entry {number}: {error}") from error
        made, owners = self.tables() - known, {table.lower(): owner for table, owner in self.owners().items()}
        for child, parent in self.references(sql) - referred:
            if owners.get(child, slice) != owners.get(parent, slice):
                raise MigrationError(f"slice {slice!r}, entry {number}: table {child!r} refers to table {parent!r} of "
                                     f"slice {owners[parent]!r}, which could not delete a row of it any more")
        if re.search(r"\s", "".join(made)):
            raise MigrationError(f"slice {slice!r}, entry {number}: no space is allowed in the name of a table")
        return " ".join(made)

    def references(self, sql: str) -> set:
        """Which table refers to which; asked only where sql may add to that, for it takes as long as an entry."""
        return {*self.query(REFERENCES)} if "references" in sql.lower() else set()

    def owners(self) -> Dict[str, str]:
        """Whose each table is."""
        ran = self.query("SELECT slice, tables FROM _migrations")
        return {table: row["slice"] for row in ran for table in row["tables"].split()}

    def judged(self, slice: str, sql: str, *args: Any, writes: Optional[bool] = None) -> None:
        """Execute sql; writes: may it write rows? None: it is a migration, and may do more. PermissionError: it does
        what it may not, or touches another slice's table. SQLite itself is the judge of what a statement touches
        (sqlite.org/c3ref/set_authorizer.html)."""
        owners, foreign = self.owners(), []
        if writes is None:
            owners.pop("sqlite_sequence", None)      # a line in it goes with each table whose ids are given once

        def judge(action: int, first: Optional[str], second: Optional[str], *_: Any) -> int:
            table = second if action in NAMED_SECOND else first
            owner = "orion" if table == "_migrations" else owners.get(table, slice)
            if writes is False and action in WRITES:
                foreign.append("writes, which only a command or a job may")
            elif writes is not None and action not in ROWS:
                foreign.append("does more than read and write rows, which is for migrations")
            elif action in ORIONS_OWN:
                foreign.append("uses PRAGMA, ATTACH or a transaction, as virtual tables do too; no slice may")
            elif owner != slice:
                foreign.append(f"touches table {table!r} of slice {owner!r}; ask for what that slice exports")
            return sqlite3.SQLITE_DENY if foreign else sqlite3.SQLITE_OK
        self.db.set_authorizer(judge)
        try:
            self.exec(sql, *args)
        except sqlite3.Error as error:
            if foreign:
                raise PermissionError(foreign[0]) from error
            raise
        finally:
            self.db.set_authorizer(lambda *_: sqlite3.SQLITE_OK)     # None lifts it only from 3.11 on

    def tables(self) -> set:
        return {row["name"] for row in self.query("SELECT name FROM sqlite_master WHERE type = 'table'")}

    def close(self) -> None:
        self.db.set_progress_handler(None, 0)        # it may know who owns this store, which 3.9 could not free then
        self.db.close()                              # the last connection out moves the WAL into the file


class Borders:
    """Each slice has its own tables. An empty database with the tables of all is asked once about each statement, so
    the tenants' own connections are not slowed down by it. MigrationError: the slices' tables do not go together."""

    def __init__(self, schema: Sequence[Tuple[str, Sequence[str]]]) -> None:
        self.empty, self.lock, self.passed = Store(None), threading.Lock(), set()
        for slice, entries in schema:
            self.empty.migrate(slice, entries)

    def check(self, slice: str, writes: bool, sql: str, args: Sequence[Any]) -> None:
        """PermissionError: sql leaves the slice's tables, would change one itself, or writes where it may not."""
        if (slice, writes, sql) in self.passed:
            return
        with self.lock:
            try:
                self.empty.judged(slice, f"EXPLAIN {sql}", *args, writes=writes)
            except PermissionError as error:
                raise PermissionError(f"slice {slice!r} {error}: {sql}") from error
            if len(self.passed) > 10_000:            # somebody makes SQL from values, instead of passing them
                self.passed.clear()
            self.passed.add((slice, writes, sql))


class Part:
    """A store as one slice sees it: the same methods, and no table but its own; one that only reads, or writes too."""
    __slots__ = ("store", "slice", "writes", "check", "cursor", "tx")
    query, one, exec = Store.query, Store.one, Store.exec            # by way of call

    def __init__(self, store: Store, slice: str, borders: Borders, writes: bool) -> None:
        self.store, self.slice, self.writes, self.check = store, slice, writes, borders.check
        self.cursor, self.tx = store.cursor, store.tx

    def call(self, sql: str, args: Sequence[Any]) -> List[sqlite3.Row]:
        self.check(self.slice, self.writes, sql, args)
        return self.store.call(sql, args)


# ==== 7. Bus =========================================================================================================
# A topic is a name with a version. Publishing moves the version on and wakes who waits; it says that something changed,
# never what. Inside a transaction a publish waits for the commit, which tells of each topic once, and a rollback takes
# it back.

class Bus:
    """One object's topics. `turn` is its Condition: the lock must be held to publish, the notify is the bus."""

    def __init__(self, turn: threading.Condition, store: Store) -> None:
        self.turn, self.store = turn, store
        self.versions: Dict[str, int] = collections.Counter()
        self.listeners: List[Callable[[str], None]] = []

    def publish(self, topic: str) -> None:
        self.store.on_commit.append((self.tell, topic)) if self.store.db.in_transaction else self.tell(topic)

    def tell(self, topic: str) -> None:
        self.versions[topic] += 1
        self.turn.notify_all()
        for listener in self.listeners:
            listener(topic)

    def subscribe(self, listener: Callable[[str], None]) -> None:
        """listener(topic) is called after each publish, with the lock held: it may take a note, not do the work."""
        self.listeners.append(listener)

    def wait(self, topic: str, seen: int, timeout: float) -> int:
        """The version of topic, as soon as it is past seen, or after timeout seconds. For a thread without a stream."""
        with self.turn:
            self.turn.wait_for(lambda: self.versions[topic] > seen, timeout)
            return self.versions[topic]


# ==== 8. Objects =====================================================================================================
# A Durable Object is one SQLite file and one Condition, whose lock makes it single-threaded: requests come in through
# fetch() one at a time, from whichever thread. A Namespace turns a name into an id and an id into a stub; the object
# behind it is built on the first request, put to sleep when nobody asked for a while, and built again.

class StorageFault(Exception):
    """An object's file can't be used. The text is for the log: the file, what happened, what to do. refusal is what the
    client hears; only this tenant suffers, and nothing is made anew in place of what was lost."""
    REMEDIES = {", entry ": "nothing of it was done; mend the rows that it stumbles on, and it is tried again",
                "disk is full": "make room on the disk, or raise the quota",
                "is locked": "another process holds it: end that one",
                "interrupted": "a statement ran too long: give it an index, or ask for less",
                "readonly database": "make the file and its folder writable",
                "unable to open database file": "make it readable; let the process have more descriptors",
                "disk I/O error": "see what the system's log says of the disk",
                "constraint failed": "a slice left it to the commit to find that; have it looked for before",
                "unsupported file format": "restore it from a backup",
                "": "restore it from a backup: orion.py check says what is wrong, restore brings it back"}

    def __init__(self, path: pathlib.Path, error: Exception) -> None:
        word = next(word for word in self.REMEDIES if word in str(error))
        super().__init__(f"{path}: {error}; {self.REMEDIES[word]}")
        self.refusal = Refused(503, "This can't be read just now. Try again in a minute.", (("retry-after", "60"),))
        if word == "disk is full":
            self.refusal = Refused(507, "There is no room left here. Delete something, or ask for a larger quota.")

    @classmethod
    def is_behind(cls, error: Exception) -> bool:
        """Is it the file, and not a statement that asks for what can't be: a constraint, a name, a value?"""
        if isinstance(error, sqlite3.OperationalError):
            known = tuple(filter(None, cls.REMEDIES))          # the words are SQLite's, and not a name in a statement
            return str(error).endswith(known) and not str(error).startswith("no such")
        return type(error) in (sqlite3.DatabaseError, MigrationError)


class Asleep(Exception):
    """The object went to sleep while this request stood in line; the stub wakes it and asks again."""


class Batch:
    """Commands to one object that share a commit, which is made when the batch is closed. Only then may they be
    answered, and with the error if it has one: whoever passes a batch to fetch() sees to that. settled: it has been
    committed, or has failed, and takes no more. size: how many it took."""
    __slots__ = ("object", "settled", "error", "size")

    def __init__(self) -> None:
        self.object: Optional[DurableObject] = None
        self.settled, self.error, self.size = False, None, 0

    def takes(self, object: DurableObject) -> bool:
        return not self.settled and self.object in (None, object)

    def close(self) -> None:
        """StorageFault: nothing of it was kept."""
        if self.object:
            with self.object.turn:
                self.object.commit() if not self.settled else None
        if self.error:
            raise self.error


class DurableObject:
    """Subclasses say what tables they need (schema: slices with their migrations) and answer requests (handle)."""
    schema: Sequence[Tuple[str, Sequence[str]]]
    handle: Callable[[Request], Response]
    STATEMENT_SECONDS = 5.0                          # then SQLite interrupts it, for others wait behind it
    VAIN_SECONDS = 0.25                              # in which all who stand in line have their turn

    def __init__(self, id: str, namespace: Namespace) -> None:
        self.id, self.namespace = id, namespace
        self.turn = threading.Condition(threading.Lock())
        self.asleep, self.used = False, time.monotonic()
        self.store: Optional[Store] = None
        self.batch: Optional[Batch] = None           # whose transaction is open
        self.vain = 0.0, ""                          # until when none is begun, for one could not be; and why

    def fetch(self, request: Request) -> Response:
        """Answer one request; a command is durable then, or when its batch is closed. WouldBlock: it may not wait."""
        if not self.turn.acquire(timeout=request.wait):
            raise WouldBlock
        try:
            if self.asleep:
                raise Asleep
            if not request.wait and (self.store is None or self.batch):
                raise WouldBlock
            self.used = time.monotonic()
            if self.store is None:
                self.open()
            return self.read(request) if request.method in SAFE else self.command(request)
        except (sqlite3.Error, MigrationError) as error:
            if not StorageFault.is_behind(error):
                raise
            raise StorageFault(self.namespace.path(self.id), error) from error
        finally:
            self.turn.release()

    def read(self, request: Request) -> Response:
        """Readers see nothing that is not durable."""
        self.commit()
        return self.handle(request)

    def open(self, create: bool = False) -> None:
        self.namespace.make_room()
        store = Store(self.namespace.path(self.id), create, self.namespace.trace, self.id)
        store.db.set_progress_handler(lambda: time.monotonic() > self.used + self.STATEMENT_SECONDS, 100_000)
        try:
            self.claim(store)
            for slice, entries in self.schema:
                store.migrate(slice, entries)
            self.store, self.bus, self.awake_since = store, Bus(self.turn, store), time.time()
            self.bus.subscribe(lambda topic: [listener(self.id, topic) for listener in self.namespace.listeners])
            self.on_open()
        except BaseException:
            self.store = self.bus = None
            store.close()
            raise

    def on_open(self) -> None:
        """What a subclass remembers of its file begins anew here, for another one may be in its place."""

    def claim(self, store: Store) -> None:
        """A file knows whose it is, so that one put in another's place shows nobody's rows to strangers."""
        mine, found = mark_of(self.id), store.one("PRAGMA application_id")[0]
        if found not in (0, mine):
            raise sqlite3.DatabaseError("the file belongs to another object")
        if found == 0:
            store.exec(f"PRAGMA application_id = {mine}")

    def command(self, request: Request) -> Response:
        """Group commit: the file is made durable once for all commands of a batch. Each runs in a savepoint, so it can
        fail alone."""
        batch = request.batch if request.batch and request.batch.takes(self) else None
        if batch is None or self.batch is not batch:
            self.commit()
            self.begin()
        if batch is None:                            # alone, it needs no savepoint
            with self.store.tx(begun=True):
                return self.handle(request)
        self.batch, batch.object, batch.size = batch, self, batch.size + 1
        try:
            with self.store.tx():
                return self.handle(request)
        except Exception as error:
            if not self.store.db.in_transaction:     # SQLite gave up the whole transaction, not this savepoint alone
                self.batch, batch.settled, batch.error = None, True, StorageFault(self.namespace.path(self.id), error)
            raise

    def begin(self) -> None:
        """A transaction in the file that is at the path: nobody takes it away while we have its write lock. Who waited
        in vain for another process to give that up did so for all who stand in line."""
        until, why = self.vain
        if time.monotonic() < until:
            raise sqlite3.OperationalError(why)
        try:
            self.store.begin()
            while self.torn:
                self.store.exec("ROLLBACK")
                self.shut()
                self.open()
                self.store.begin()
        except sqlite3.OperationalError as error:
            self.vain = time.monotonic() + self.VAIN_SECONDS, str(error)
            raise

    def commit(self) -> None:
        """What is open, if anything is. An error is for those whose batch it was."""
        batch, self.batch = self.batch, None
        if batch:
            batch.settled = True
            try:
                self.store.commit()
            except sqlite3.Error as error:
                batch.error = StorageFault(self.namespace.path(self.id), error)

    def sleep(self, unused_since: float) -> None:
        """Close the file, unless somebody used it since or uses it now. A new object takes over when asked."""
        if self.used > unused_since or not self.turn.acquire(blocking=False):
            return
        try:
            if not (self.asleep or self.batch or self.used > unused_since):
                self.asleep = True
                self.shut()
                self.namespace.forget(self)          # only now may another object open the file
        finally:
            self.turn.release()

    @property
    def torn(self) -> bool:
        """Open, and the file is gone, or another is in its place. SQLite would go on writing to it, and say nothing."""
        store = self.store
        try:
            return store is not None and store.inode not in (None, identity(store.path))
        except sqlite3.Error:
            return True

    def shut(self) -> None:
        if self.torn:                                # it gets what it lacks: who takes its place must find no WAL of it
            with contextlib.suppress(sqlite3.Error):
                self.store.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            if self.namespace.path(self.id).exists():          # whatever was watched, another file says it now
                for listener in self.namespace.listeners:
                    listener(self.id, "")
        if self.store:
            self.store.close()
        self.store = self.bus = None                 # they know this object, and would keep it alive


def mark_of(id: str) -> int:
    return zlib.crc32(id.encode()) >> 1


class Stub(NamedTuple):
    """The address of an object, whether it is awake or not. watched(more): streams on it came (1) or went (-1)."""
    id: str
    namespace: Namespace
    watched = staticmethod(lambda more: None)        # an object may sleep while it is watched

    def fetch(self, request: Request) -> Response:
        if not self.namespace.trace.watched:
            return self.reach(request)
        kind = "gate" if request.path.startswith("/_gate") else self.namespace.kind
        return self.namespace.trace.leg(kind, self.id, self.reach, request)

    def ask(self, path: str, query: str = "", headers: Dict[str, str] = {}, scheme: str = "http",
            method: str = "GET", wait: float = threading.TIMEOUT_MAX) -> Any:
        """What the object says to a question of the server itself. Refused(503): it is in another process, which can't
        say so now, or does not know us."""
        answer = self.fetch(Request(method, path, query, headers, wait=wait, scheme=scheme))
        if answer.status != 200:
            log_once(STRANGERS) if answer.status in (403, 404) else None
            raise Refused(503, "This can't be found out just now. Try again in a minute.", (("retry-after", "60"),))
        return json.loads(answer.body)

    def reach(self, request: Request) -> Response:
        served = not request.path.startswith("/_") or request.path.startswith("/_gate")
        while True:
            try:
                return self.namespace.wake(self.id, served).fetch(request)
            except Asleep:
                continue


class Namespace:
    """All objects of one kind: their files in one folder, at most `awake` of them open, none idle for long (`idle`)."""

    def __init__(self, kind: str, folder: pathlib.Path, build: Callable[[str, Namespace], DurableObject], awake: int,
                 idle: float, trace: Optional[Trace] = None) -> None:
        self.kind, self.folder, self.build, self.awake, self.idle = kind, folder, build, awake, idle
        self.trace = trace or Trace()
        self.lock = threading.Lock()                 # guards what follows; taken after an object's lock, never before
        self.objects: collections.OrderedDict = collections.OrderedDict()      # the least recently used first
        self.fetches, self.served = 0, collections.Counter()      # served: by id, without what the server itself asks
        self.listeners: List[Callable[[str, str], None]] = []                  # told (id, topic) of every publish
        self.alarms: Dict[str, float] = {}           # by id: when its next job is due
        self.looked = set()                          # ids whose files need not be looked into for jobs any more
        self.on_alarm = lambda: None                 # called when one is due at once

    def id_from_name(self, name: str) -> str:
        """64 hex digits, always the same for the same name."""
        return hashlib.sha256(f"{self.kind}:{name}".encode()).hexdigest()

    def get(self, id: str) -> Stub:
        return Stub(id, self)

    def path(self, id: str) -> pathlib.Path:
        return self.folder / f"{id}.db"

    def files(self) -> Iterator[Tuple[str, pathlib.Path]]:
        return ((path.stem, path) for path in self.folder.glob("*.db"))

    def create(self, id: str) -> None:
        """Make the file of a new object; whoever finds it missing later knows that it was lost."""
        made = self.build(id, self)
        made.open(create=True)
        made.store.close()

    def wake(self, id: str, served: bool = False) -> DurableObject:
        with self.lock:
            self.fetches += 1
            self.served[id] += served
            if id not in self.objects:
                self.objects[id] = self.build(id, self)
            self.objects.move_to_end(id)
            return self.objects[id]

    def make_room(self) -> None:
        """The least recently used go to sleep; one that is busy just now is passed over."""
        with self.lock:
            excess = list(itertools.islice(self.objects.values(), max(0, len(self.objects) - self.awake)))
        for one in excess:
            one.sleep(time.monotonic())

    def alarm(self, id: str, due: Optional[float]) -> None:
        if due is None:
            return
        with self.lock:
            self.alarms[id] = min(due, self.alarms.get(id, due))
        if due <= time.time():
            self.on_alarm()

    def next_due(self) -> Optional[str]:
        """The id of an object with a job that is due by now; its alarm is taken out."""
        with self.lock:
            id = min(self.alarms, key=self.alarms.__getitem__, default=None)
            if id is None or self.alarms[id] > time.time():
                return None
            del self.alarms[id]
            return id

    def forget(self, one: DurableObject) -> None:
        with self.lock:
            self.objects.pop(one.id, None)

    def rest(self, idle: Optional[float] = None) -> None:
        """Put to sleep who was not used for idle seconds, and whose file is not at its path any more."""
        now = time.monotonic()
        before = now - (self.idle if idle is None else idle)
        with self.lock:
            everybody = [(one, now if one.torn else before) for one in self.objects.values()]
        for one, since in everybody:
            one.sleep(since)


# ==== 9. Jobs ========================================================================================================
# Work for later. A job is a row, put in by the transaction that wants it done, so there is none for what was rolled
# back; it runs in a transaction that takes the row out, so its writes and its end are one. Which object has a job due
# when is an index in memory, made again from the files at each start: only a tenant's own file knows its jobs.

JOBS = ("CREATE TABLE jobs (id INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL, args TEXT NOT NULL, "
        "who TEXT NOT NULL, due REAL, tries INTEGER NOT NULL DEFAULT 0, error TEXT NOT NULL DEFAULT '')",
        "CREATE INDEX jobs_due ON jobs (due)")


class Queue:
    """One object's jobs; due is NULL for one given up. known: what may be put in, by name. alarm(due): it was."""
    TRIES = 10                                       # with 2, 4, 8 ... seconds between them: 17 minutes in all

    def __init__(self, store: Store, known: Dict[str, Callable[..., None]], alarm: Callable[[float], None]) -> None:
        self.store, self.known, self.alarm = store, known, alarm
        self.names = {job: name for name, job in known.items()}

    def put(self, who: str, job: Callable[..., None], due: float, args: Dict[str, Any]) -> None:
        if job not in self.names:
            raise LookupError(f"{job} is no job here; put it into Slice(jobs=...)")
        row = self.names[job], json.dumps(args), who, due
        self.store.exec("INSERT INTO jobs (job, args, who, due) VALUES (?, ?, ?, ?)", *row)
        self.store.on_commit.append((self.alarm, due))

    def due(self) -> Optional[float]:
        """When the next one is."""
        return self.store.one("SELECT min(due) FROM jobs")[0]

    def claim(self) -> Optional[int]:
        """The id of one that is due. It counts as failed from here on, until it ends well: one that takes the process
        down, or the transaction, is not the first that is tried next time."""
        row = self.store.one("SELECT id, tries FROM jobs WHERE due <= ? ORDER BY due, id LIMIT 1", time.time())
        if row is None:
            return None
        id, tries = row["id"], row["tries"] + 1
        due = time.time() + 2 ** tries if tries < self.TRIES else None
        self.store.exec("UPDATE jobs SET tries = ?, due = ?, error = 'it did not end' WHERE id = ?", tries, due, id)
        return id

    def run(self, id: int, work: Callable[[sqlite3.Row, Callable[..., None]], None]) -> None:
        """work(row, job) for one that was claimed."""
        row = self.store.one("SELECT * FROM jobs WHERE id = ?", id)
        try:
            with self.store.tx():
                work(row, self.known[row["job"]])
                self.store.exec("DELETE FROM jobs WHERE id = ?", id)
        except CRASH as error:
            if not self.store.db.in_transaction:
                raise
            log_error(f"job {row['job']}, try {row['tries']}", error)
            why = f"{type(error).__name__}: {error}"[:500].encode("utf-8", "backslashreplace").decode()
            self.store.exec("UPDATE jobs SET error = ? WHERE id = ?", why, id)

    def retry(self) -> None:
        """Those that were given up have all their tries again."""
        self.store.exec("UPDATE jobs SET due = ?, tries = 0 WHERE due IS NULL", time.time())
        self.store.on_commit.append((self.alarm, time.time()))

    def facts(self) -> Dict[str, Any]:
        given_up = self.store.query("SELECT job, tries, error FROM jobs WHERE due IS NULL ORDER BY id LIMIT 5")
        waiting = self.store.one("SELECT count(due), count(*) - count(due) FROM jobs")
        return {"waiting": waiting[0], "given up": waiting[1], "failed": [*map(dict, given_up)]}


def due_in(path: pathlib.Path) -> Optional[float]:
    """When the next job in a file is. One without a WAL is read as it lies, in a quarter of the time, for at a start it
    may be one of thousands; whoever opens it just then sets its alarm."""
    as_it_lies = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
    with contextlib.closing(Store(path).db if with_wal(path)[1:] else sqlite3.connect(as_it_lies, uri=True)) as db:
        return db.execute("SELECT min(due) FROM jobs").fetchone()[0]


class Alarms:
    """When which object of a namespace has its next job due, and the ringing. It wakes who sleeps."""
    AT_ONCE = 4                                      # objects whose jobs run, so that most threads stay for requests

    def __init__(self, namespace: Namespace, put: Callable[..., None]) -> None:
        self.namespace, self.put = namespace, put    # put(function, *args): into a pool
        self.at_once, namespace.on_alarm = threading.BoundedSemaphore(self.AT_ONCE), self.ring

    def look(self) -> None:
        """Into files that were not looked into yet: at the start, and when another process changed the deployment."""
        for id, path in self.namespace.files():
            if id not in self.namespace.looked:
                self.namespace.looked.add(id)
                with contextlib.suppress(sqlite3.Error):
                    self.namespace.alarm(id, due_in(path))

    def ring(self) -> None:
        while self.at_once.acquire(blocking=False):
            id = self.namespace.next_due()
            if id is None:
                return self.at_once.release()
            self.put(self.work, id)

    def work(self, id: str) -> None:
        """In the pool: one job, in a commit of its own. Then it is the turn of whoever waits longest."""
        stub = self.namespace.get(id)
        due = time.time() + 60 if self.namespace.path(id).exists() else None     # None: removed, or moved away
        try:
            job = due and stub.ask("/_claim", method="POST")
            try:
                None if job is None else stub.ask("/_jobs", f"id={job}", method="POST")
            finally:
                due = due and stub.ask("/_due")
        finally:
            self.namespace.alarm(id, due)
            self.at_once.release()
            self.ring()


# ==== 10. Slices =====================================================================================================
# A feature from its tables to its pages: migrations, regions, commands. Its routes are a table with a grant in each
# row, so a route that nobody thought about permission for can't be written. What every slice needs alike is done here,
# once: the permission is checked again, a write leaves a journal row, a region is rendered once per role and version.

PUBLIC, ACCOUNT, MEMBER = "(anyone)", "(any account)", "(any member)"        # in place of a grant
ROLES: Dict[str, Tuple[str, ...]] = {
    "owner": ("todos:read", "todos:write", "todos:delete", "members:manage", "workspace:delete"),
    "admin": ("todos:read", "todos:write", "todos:delete", "members:manage"),
    "member": ("todos:read", "todos:write"),
    "viewer": ("todos:read",),
}


class Context(NamedTuple):
    """What a region, command or job sees: tables, who looks, what they ask. scope: whose rows, in the Directory."""
    store: Part
    viewer: Viewer
    request: Request
    publish: Callable[[str], None]
    scope: str = ""
    host: Optional[SliceHost] = None

    @property
    def workspace(self) -> str:
        return self.request.headers.get("x-workspace", "")

    @property
    def typed(self) -> Dict[str, str]:
        """Where a page shows a form again: what was typed into it and, as problem, what is wrong with that. No link to
        the page can say so in our name."""
        problem = self.request.headers.get("x-problem")
        return {**self.request.params, "problem": problem} if problem else {}

    def enqueue(self, job: Callable[..., None], after: float = 0.0, **args: Any) -> None:
        """Have job(ctx, **args) run in so many seconds, if the present transaction commits. args: what JSON can say. It
        runs again when it fails, so what it does outside of the store should bear to be done twice. PermissionError:
        this is no command and no job."""
        if not self.store.writes:
            raise PermissionError("only a command or a job puts in a job")
        self.host.queue.put(self.viewer.account, job, time.time() + after, args)

    def ask(self, function: Callable[..., Any], *args: Any) -> Any:
        """function(store, *args) with the tables of the slice that exports it. LookupError: none does."""
        if function not in self.host.router.exports:
            raise LookupError(f"{function} is not exported; put it into Slice(exports=...)")
        return function(self.host.part(self.host.router.exports[function], self.store.writes), *args)

    def field(self, name: str, otherwise: str = "") -> str:
        """What was sent along under this name, as text."""
        return str(self.request.fields().get(name, otherwise))


class Route(NamedTuple):
    """run(ctx, *args) returns a Response; args are what the <parts> of a path like "/todos/<id>" were."""
    method: str
    path: str
    grant: str
    run: Callable[..., Response]


class Live(NamedTuple):
    """A page at path and its stream at path + "/live". region(ctx) returns the Html that stays current, one element
    with an id; it is read again after each publish of topic. page(ctx, region) returns what stands around it.
    variant(params): the part of the query that the region heeds, in one spelling; each is rendered and kept."""
    path: str
    grant: str
    topic: str
    title: str
    region: Callable[[Context], Html]
    page: Callable[[Context, Html], Html] = lambda ctx, region: template("slice")(region=region, live=True)
    variant: Callable[[Dict[str, str]], str] = lambda params: ""


def heeded(params: Dict[str, str], **valid: str) -> str:
    """The query of those params whose value matches the pattern of their name, in one spelling: for a variant."""
    given = {name: params[name] for name, pattern in valid.items() if re.fullmatch(pattern, params.get(name, ""))}
    return urllib.parse.urlencode(given)


class Slice(NamedTuple):
    """count(store): how full it is, as the home page and the console show. jobs: what may be enqueued, known by its
    name, for it can outlive the program that enqueued it. exports: functions (store, ...) that other slices may ask."""
    name: str
    migrations: Sequence[str]
    live: Sequence[Live] = ()
    routes: Sequence[Route] = ()
    count: Optional[Callable[[Store], int]] = None
    jobs: Sequence[Callable[..., None]] = ()
    exports: Sequence[Callable[..., Any]] = ()


REGION = re.compile(r"""\s*<\w(?:[^>"']|"[^"]*"|'[^']*')*?\sid\s*=""")       # an element with an id


class BadSlice(Exception):
    """A slice can't work as it is written; the text says which one and why."""


PATH = re.compile(r"(/[A-Za-z0-9][\w.~-]*)(/[\w.~-]+|/<\w+>)*")


def addresses(row: Any) -> List[Tuple[str, str]]:
    """Methods and patterns, which a request's path matches, of a Live or a Route."""
    pattern = re.sub(r"<\w+>", "([^/]+)", re.escape(row.path))
    return [("GET", pattern), ("GET", f"{pattern}/live")] if type(row) is Live else [(row.method, pattern)]


def wrong_with(row: Any, grants: Iterable[str]) -> str:
    """Why a Live or a Route would never do what it is for; "": it may."""
    live = type(row) is Live
    if not PATH.fullmatch(row.path) or (live and "<" in row.path):
        return "a path is as /things or, for a Route, /things/<id>"
    if row.path.split("/")[1] == "members":
        return "/members is the Directory's"
    if row.grant not in {*grants, PUBLIC, ACCOUNT, MEMBER}:
        return f"no role has the grant {row.grant!r}; add it to those in orion.ROLES that should"
    if not live and row.method not in METHODS:
        return f"a method is one of {', '.join(METHODS)}"
    return "" if callable(row.region if live else row.run) else "region or run can't be called"


def check_slices(slices: Sequence[Slice]) -> None:
    """BadSlice: what would be found out later, or never."""
    grants, names, taken = {grant for role in ROLES.values() for grant in role}, {"orion", "directory"}, set()
    for slice in slices:
        if type(slice) is not Slice or isinstance(slice.migrations, str):
            raise BadSlice(f"{slice!r:.99}: slices are a list of Slice, and migrations a tuple: (one,) has a comma too")
        if not re.fullmatch(r"[A-Za-z_][\w-]*", slice.name) or slice.name in names:
            raise BadSlice(f"slice {slice.name!r}: a name is a word, no other slice's, and not orion or directory")
        names.add(slice.name)
        for kind, row in [(Live, row) for row in slice.live] + [(Route, row) for row in slice.routes]:
            why = wrong_with(row, grants) if type(row) is kind else f"it is no {kind.__name__}; (one,) has a comma too"
            if why or not taken.isdisjoint(addresses(row)):
                raise BadSlice(f"slice {slice.name!r}, {row!r:.99}: {why or 'another has this address'}")
            taken.update(addresses(row))


KEPT_BYTES = 4 * 2 ** 20                             # of an object's renderings and pages, before they are let go
LARGE = 2 ** 18                                      # bytes; to compress so many would keep the loop from others


class Rendering:
    """A region at one version, made once, and kept as the frame that all streams get. The etag is made of the content,
    so it means the same after a restart and in another process. told: a page has said how long it took."""
    __slots__ = ("etag", "micros", "frame", "told", "_zipped")

    def __init__(self, html: Html, micros: int = 0, main: bool = True) -> None:
        """main: the region that a reconnecting browser names as the last it has seen."""
        self.micros, self.told, self._zipped = micros, False, b""
        self.etag = hashlib.blake2b(escape(html).encode("utf-8", "replace"), digest_size=9).hexdigest()
        self.frame = chunk(patch_elements(escape(html), event_id=self.etag if main else None))

    @property
    def html(self) -> Html:
        """For the page. Read out of the frame: of a thousand tenants each would have its region in memory twice."""
        return Html("\n".join(unchunk(self.frame)[:-2].decode().split("\ndata: elements ")[1:]))

    @property
    def size(self) -> int:
        return len(self.frame)

    @property
    def zipped(self) -> bytes:
        self._zipped = self._zipped or chunk(deflated(unchunk(self.frame)))
        return self._zipped


class Watch(NamedTuple):
    """What a live answer leaves behind: whom to ask again, what, and after which topic."""
    stub: Stub
    request: Request
    topic: str

    @property
    def key(self) -> Tuple[str, ...]:
        return (self.request.path, self.request.query, *self.request.headers.values())


NONCE, PAGE = "(nonce)", "text/html; charset=utf-8"  # the mark stands in the first line, before what users typed


def page(title: str, body: Html, viewer: Viewer = Viewer(), nav: Any = "", footer: Any = "",
         status: int = 200) -> Response:
    """A whole page. Each answer puts a nonce of its own where the mark is (section 17)."""
    text = template("layout")(title=title, body=body, nonce=NONCE, nav=nav, footer=footer,
                              signed=bool(viewer.account), account=viewer.account, masquerade=bool(viewer.operator),
                              operator=viewer.operator, how="read-only" if viewer.read_only else "writing")
    return Response(status, text.encode("utf-8", "replace"), PAGE)


def done(ctx: Context, which: str = "", **signals: Any) -> Response:
    """What a command answers when it went well: signals for the one who sent it, or back to the page after a plain
    form. What it changed is not in it: that reaches everybody, the sender too, through the region."""
    if ctx.request.form and not ctx.request.datastar:
        return see_other(f"/w/{ctx.workspace}/{ctx.request.path.split('/')[1]}")._replace(which=which)
    return (as_json(signals) if signals else Response(204))._replace(which=which)


JOURNAL = ("CREATE TABLE journal (id INTEGER PRIMARY KEY, at REAL NOT NULL, who TEXT NOT NULL, what TEXT NOT NULL, "
           "which TEXT NOT NULL)",)


class Router:
    """Finds the row for a request among the slices of an object."""

    def __init__(self, slices: Sequence[Slice]) -> None:
        self.slices, self.rows = slices, collections.defaultdict(dict)
        self.jobs = {f"{slice.name}.{job.__name__}": job for slice in slices for job in slice.jobs}
        self.exports = {function: slice.name for slice in slices for function in slice.exports}
        self.topics = {live.topic for slice in slices for live in slice.live}
        self.schema = [("orion", JOURNAL + JOBS), *((slice.name, slice.migrations) for slice in slices)]
        self.borders = Borders(self.schema)
        for slice, row in [(slice.name, row) for slice in slices for row in (*slice.live, *slice.routes)]:
            for method, pattern in addresses(row):
                self.rows[pattern][method] = slice, row
        self.match = functools.lru_cache(maxsize=1024)(self.find)

    def find(self, method: str, path: str) -> Tuple[str, Any, Sequence[str]]:
        """The slice's name, its Live or Route, and the arguments. Refused(404), Refused(405)."""
        methods = set()
        for pattern, rows in self.rows.items():
            hit = re.fullmatch(pattern, path)
            if hit and method in rows:
                return (*rows[method], hit.groups())
            methods.update(rows if hit else ())
        if not methods:
            raise Refused(*NOTHING_HERE)
        allow = ", ".join(sorted({*methods, "HEAD"} if "GET" in methods else methods))
        raise Refused(405, f"This address takes {allow}.", (("allow", allow),))


def only_commands(topic: str) -> None:
    """A region that publishes would be asked again at once, and for ever."""
    raise PermissionError(f"publishes {topic!r}, which only a command or a job may")


TAKEN = 422, "There is a file of such a workspace already. Choose another name; an operator may move and import it."


class SliceHost(DurableObject):
    """An object that runs slices. Its viewer comes from the verdict, in trusted headers."""
    FORMS: Dict[str, str] = {}                       # the page that a form is on, where it isn't the path it goes to

    def __init__(self, id: str, namespace: Namespace, router: Router, pages: Sequence[Live]) -> None:
        super().__init__(id, namespace)
        self.router, self.schema, self.pages = router, router.schema, pages        # pages: for the navigation

    def open(self, create: bool = False) -> None:
        """Refused(422): it is to be new, and there are rows; the Directory that knew whose they are was lost."""
        super().open(create)
        if create and self.store.one("SELECT 1 FROM journal"):
            self.shut()
            raise Refused(*TAKEN)

    def on_open(self) -> None:
        self.kept: Dict[Tuple[Any, ...], Any] = {}   # renderings and pages, until the next publish
        self.bus.subscribe(lambda topic: self.kept.clear())
        self.queue = Queue(self.store, self.router.jobs, functools.partial(self.namespace.alarm, self.id))
        with contextlib.suppress(sqlite3.DatabaseError):     # jobs that can't be read keep nobody out
            self.namespace.alarm(self.id, self.queue.due())

    def part(self, slice: str, writes: bool) -> Part:
        return Part(self.store, slice, self.router.borders, writes)

    def viewer(self, request: Request) -> Viewer:
        said = request.headers.get
        return viewer(said("x-account", ""), said("x-role", ""), said("x-grants", ""), said("x-operator", ""),
                      said("x-read-only", ""))

    def handle(self, request: Request) -> Response:
        if request.path in self.OWN:
            return as_json(self.OWN[request.path](self, request))
        slice, row, args = self.router_of(request).match(request.method, request.path)
        viewer = self.viewer(request)
        permit(row.grant, viewer, request.method)
        part = self.part(slice, request.method not in SAFE)
        scope = request.headers.get("x-id", "") if slice == "directory" else ""
        publish = only_commands if request.method in SAFE else self.bus.publish
        ctx = Context(part, viewer, request, publish, scope, self)
        if type(row) is Live:
            response = (self.stream if request.path.endswith("/live") else self.page)(row, ctx)
            if not request.wait and response.size > LARGE:
                raise WouldBlock
            return response
        if not request.wait:
            raise WouldBlock
        before = self.store.db.total_changes
        response = sound(row.run(ctx, *args))
        if self.store.db.total_changes != before:    # journalled in the same transaction, so no slice can forget it
            if slice != "directory":                 # nor show a new page what was before, if it tells nobody
                self.store.on_commit.append((self.kept.clear,))
            which = response.which or "/".join(args) or self.store.cursor.lastrowid
            self.journal(viewer, f"{slice}.{row.run.__name__}", f"{ctx.scope} {which}".strip())
        return response

    def router_of(self, request: Request) -> Router:
        return self.router

    def facts(self, request: Request) -> Dict[str, Any]:
        counts = [slice.count(self.part(slice.name, False)) for slice in self.router.slices if slice.count]
        schema = self.store.one("SELECT count(*) FROM _migrations")[0]
        return {"count": sum(counts), "schema": schema, **self.queue.facts()}

    # what the server itself asks; the worker lets no path like these in from outside
    OWN = {"/_counts": facts, "/_claim": lambda self, request: self.queue.claim(),
           "/_jobs": lambda self, request: self.queue.run(int(request.params["id"]), self.work),
           "/_due": lambda self, request: self.queue.due(), "/_retry": lambda self, request: self.queue.retry()}

    def work(self, row: sqlite3.Row, job: Callable[..., None]) -> None:
        """In the name of who enqueued it; what they may was asked then."""
        viewer, part = Viewer(row["who"]), self.part(row["job"].partition(".")[0], True)
        ctx = Context(part, viewer, Request("POST", "/_jobs"), self.bus.publish, host=self)
        if job(ctx, **json.loads(row["args"])) is not None:
            raise TypeError("a job returns nothing, and is neither async nor a generator")
        self.store.on_commit.append((self.kept.clear,))
        self.journal(viewer, row["job"], str(row["id"]))

    def journal(self, viewer: Viewer, what: str, which: str) -> None:
        who = f"{viewer.operator} as {viewer.account}" if viewer.operator else viewer.account
        self.store.exec("INSERT INTO journal (at, who, what, which) VALUES (?, ?, ?, ?)", time.time(), who, what, which)

    def command(self, request: Request) -> Response:
        """What is wrong with the input is told at its field: by a signal, or on the page with what they typed."""
        try:
            return super().command(request)
        except Refused as no:
            if request.datastar and no.status in (409, 422):
                return as_json({no.signal: no.message})
            if no.status != 422 or not request.form:
                raise
            typed = urllib.parse.urlencode({**request.fields(), "password": "", "new": ""})
            again = request._replace(method="GET", path=self.FORMS.get(request.path, request.path), query=typed,
                                     headers={**request.headers, "x-problem": no.message})
            with contextlib.suppress(Refused):       # there is no page at this address
                return self.read(again)._replace(status=422)
            raise

    def keep(self, live: Live, ctx: Context, key: Tuple[Any, ...], make: Callable[[Live, Context], Any]) -> Any:
        """What make(live, ctx) returned for this key since the last publish, or returns now."""
        if key not in self.kept:
            if not ctx.request.wait:
                raise WouldBlock
            if len(self.kept) >= 64 or sum([one.size for one in self.kept.values()]) > KEPT_BYTES:
                self.kept.clear()
            self.kept[key] = make(live, ctx)
        return self.kept[key]

    def rendering(self, live: Live, ctx: Context) -> Rendering:
        """The account is taken away: what a whole role shares can't name one of them."""
        variant = live.variant(ctx.request.params) if ctx.request.query else ""
        viewer = ctx.viewer._replace(account="", operator="")
        shared = ctx._replace(viewer=viewer, request=ctx.request._replace(query=variant))
        return self.keep(live, shared, (live.path, variant, viewer, ctx.scope), self.render)

    def render(self, live: Live, ctx: Context) -> Rendering:
        started = time.perf_counter()
        region = live.region(ctx)
        if type(region) is not Html or not REGION.match(region):
            raise TypeError(f"the region of {live.path} is to be Html, one element with an id, and not {region!r:.200}")
        return Rendering(region, micros(time.perf_counter() - started))

    def stream(self, live: Live, ctx: Context) -> Response:
        headers = {"x-account": "", "x-role": ctx.viewer.role, "x-grants": ",".join(ctx.viewer.grants),
                   "x-read-only": "true" if ctx.viewer.read_only else "",
                   **{name: ctx.request.headers.get(name, "") for name in ("x-id", "x-node")}}
        again = Request("GET", ctx.request.path, live.variant(ctx.request.params), headers)
        topic = f"{live.topic}:{ctx.scope}" if ctx.scope else live.topic
        watch, rendering = Watch(self.namespace.get(self.id), again, topic), self.rendering(live, ctx)
        rendering.told = True
        return Response(200, type="text/event-stream", rendering=rendering, watch=watch, which=ctx.viewer.account)

    def page(self, live: Live, ctx: Context) -> Response:
        """Kept for each account until a publish, unless it answers what was typed or says that it was just rendered."""
        query = ctx.request.query
        if query and not ctx.request.wait:
            raise WouldBlock
        key = (live.path, query, ctx.viewer, ctx.workspace)
        kept = self.kept.get(key)
        if kept is None and query == live.variant(ctx.request.params) and self.rendering(live, ctx).told:
            kept = self.keep(live, ctx, key, self.whole_page)
        return kept or self.whole_page(live, ctx)

    def whole_page(self, live: Live, ctx: Context) -> Response:
        rendering, viewer, workspace = self.rendering(live, ctx), ctx.viewer, ctx.workspace
        how, rendering.told = "from the cache; it took" if rendering.told else "just now, in", True
        xray = template("xray")(
            id=self.id, file=self.namespace.path(self.id).name, account=viewer.account, role=viewer.role, how=how,
            micros=rendering.micros, since=formatdate(self.awake_since, usegmt=True), grants=", ".join(viewer.grants),
            check="yes" if viewer.can("todos:delete") else "no", watchers=not ctx.scope)
        links = [{"path": one.path, "title": one.title, "current": one.path == live.path} for one in self.pages]
        nav = template("layout.workspace")(workspace=workspace, link=links, state=True)
        return page(f"{live.title} · {workspace}", live.page(ctx, rendering.html), viewer, nav, xray)


@functools.lru_cache(maxsize=1024)
def viewer(account: str, role: str, grants: str, operator: str, read_only: str) -> Viewer:
    return Viewer(account, role, tuple(grants.split(",")) if grants else (), operator, bool(read_only))


def permit(grant: str, viewer: Viewer, method: str) -> None:
    """Refused(401), Refused(403): the viewer may not."""
    if grant == ACCOUNT and not viewer.account:
        raise Refused(401, "Sign in first.")
    if viewer.read_only and grant != PUBLIC and method not in SAFE:
        raise Refused(403, "You look on read-only. End it, or begin again with writing allowed.")
    if not (grant in (PUBLIC, ACCOUNT) or (viewer.role if grant == MEMBER else viewer.can(grant))):
        raise Refused(403, f"Your role here does not include {grant}. Ask an owner of the workspace for it.")


# ==== 11. Todos ======================================================================================================
# The slice that comes with it, and the pattern for one's own: the table, the queries with their names, the region, the
# commands. It knows nothing of tenants, sockets or sessions.

TITLE_LIMIT, TODOS_A_PAGE = 500, 200


def some_todos(store: Store, show: str, limit: int) -> List[sqlite3.Row]:
    """The newest of all ("open", "done": of these)."""
    return store.query("SELECT id, title, done FROM todos WHERE done = ? OR done = ? ORDER BY id DESC LIMIT ?",
                       show == "done", show != "open", limit)


def todo_counts(store: Store) -> sqlite3.Row:
    return store.one('SELECT count(*) FILTER (WHERE NOT done) AS open, count(*) AS "all" FROM todos')


def count_todos(store: Store) -> int:
    """The open ones."""
    return todo_counts(store)["open"]


def todos_variant(params: Dict[str, str]) -> str:
    return heeded(params, show="open|done", pages="[2-9]|1[0-9]|2[0-5]")


def the_todo(ctx: Context, id: str) -> sqlite3.Row:
    """Refused(404): there is none in this workspace."""
    number = int(id) if re.fullmatch("[0-9]{1,18}", id) else None
    known = ctx.store.one("SELECT id, title, done FROM todos WHERE id = ?", number)
    if known is None:
        raise Refused(404, "This todo is gone. The page shows what there is now.")
    return known


@functools.lru_cache(maxsize=512)
def todo_row(id: int, title: str, done: int, write: bool, delete: bool) -> Html:
    """Most are as they were a command ago, and are not made again."""
    return template("todos.row")(id=id, title=title, checked=bool(done), disabled=not write, delete=delete)


def todos_region(ctx: Context) -> Html:
    given, may = ctx.request.params, ctx.viewer.can
    show, most = given.get("show", ""), TODOS_A_PAGE * int(given.get("pages", 1))
    some = some_todos(ctx.store, show, most + 1)
    return template("todos.region")(
        row=Html().join([todo_row(*todo, may("todos:write"), may("todos:delete")) for todo in some[:most]]),
        **todo_counts(ctx.store),
        more=len(some) > most, last=some[:most][-1]["id"] if some else "",
        next=todos_variant({"show": show, "pages": str(most // TODOS_A_PAGE + 1)}),
        empty="" if some else template(f"todos.empty_{show or 'all'}")())


def todos_page(ctx: Context, region: Html) -> Html:
    given, write, current = ctx.request.params, ctx.viewer.can("todos:write"), template("todos.current")()
    links = {name: current if name == given.get("show", "all") else "" for name in ("all", "open", "done")}
    return template("todos")(region=region, workspace=ctx.workspace, variant=todos_variant(given), form=write,
                             readonly=not write, toggle=write, clear=ctx.viewer.can("todos:delete"),
                             title=ctx.typed.get("title", ""), problem=ctx.typed.get("problem", ""), **links)


def valid_title(fields: Dict[str, Any], signal: str = "problem") -> str:
    """Refused(422): empty, too long, or no text."""
    title = fields["title"].strip() if isinstance(fields.get("title"), str) else ""
    if not 1 <= len(title) <= TITLE_LIMIT:
        raise Refused(422, f"A title has 1 to {TITLE_LIMIT} characters; this one has {len(title)}.", signal=signal)
    return title


def create(ctx: Context) -> Response:
    ctx.store.exec("INSERT INTO todos (title) VALUES (?)", valid_title(ctx.request.fields()))
    ctx.publish("todos")
    return done(ctx, title="", problem="")


def change(ctx: Context, id: str) -> Response:
    """The signals done and title are set, where they are given; neither: toggle."""
    todo, fields = the_todo(ctx, id), ctx.request.fields()
    title = valid_title(fields, "toast") if "title" in fields else todo["title"]
    ticked = fields.get("done", bool(todo["done"]) if "title" in fields else not todo["done"])
    if type(ticked) is not bool:
        raise Refused(400, "done is true or false. Reload the page and try again.")
    ctx.store.exec("UPDATE todos SET title = ?, done = ? WHERE id = ?", title, ticked, todo["id"])
    ctx.publish("todos")
    return done(ctx)


def delete(ctx: Context, id: str) -> Response:
    ctx.store.exec("DELETE FROM todos WHERE id = ?", the_todo(ctx, id)["id"])
    ctx.publish("todos")
    return done(ctx)


def change_all(ctx: Context) -> Response:
    """The signal done; none: open ones left are done, else all are opened again."""
    ticked = bool(ctx.request.fields().get("done", count_todos(ctx.store)))
    ctx.store.exec("UPDATE todos SET done = ? WHERE done <> ?", ticked, ticked)
    ctx.publish("todos")
    return done(ctx, "all")


def clear(ctx: Context) -> Response:
    ctx.store.exec("DELETE FROM todos WHERE done")
    ctx.publish("todos")
    return done(ctx, "done ones")


todos = Slice(
    name="todos",
    migrations=("CREATE TABLE todos (id INTEGER PRIMARY KEY AUTOINCREMENT, title TEXT NOT NULL, done INTEGER NOT NULL "
                "DEFAULT 0)",),
    live=(Live("/todos", "todos:read", "todos", "Todos", todos_region, todos_page, todos_variant),),
    routes=(Route("POST", "/todos", "todos:write", create),
            Route("PATCH", "/todos", "todos:write", change_all),
            Route("DELETE", "/todos", "todos:delete", clear),
            Route("PATCH", "/todos/<id>", "todos:write", change),
            Route("DELETE", "/todos/<id>", "todos:delete", delete)),
    count=count_todos, exports=(count_todos,))


# ==== 12. Workspace ==================================================================================================
# The data plane: one tenant's rows and nothing else. It has no query path to another tenant, for its connection is to
# another file. It trusts the verdict that comes with a request, and still checks the grant in front of each command:
# the button is a courtesy, the gate is the law.

class Workspace(SliceHost):
    def on_open(self) -> None:
        """SQLite forgets max_page_count at each close, and a job brings no verdict: so the file remembers it."""
        super().on_open()
        self.quota, pages = "", self.store.one("PRAGMA user_version")[0]
        self.store.exec(f"PRAGMA max_page_count = {pages}") if pages else None

    def handle(self, request: Request) -> Response:
        if request.method not in SAFE and (quota := request.headers.get("x-quota", "0")) not in ("0", self.quota):
            pages = min(max(1, int(quota) // self.store.one("PRAGMA page_size")[0]), 2 ** 31 - 1)
            self.store.exec(f"PRAGMA max_page_count = {pages}")
            if self.store.one("PRAGMA user_version")[0] != pages:
                self.store.exec(f"PRAGMA user_version = {pages}")
            self.quota = quota
        return super().handle(request)

    def journal(self, viewer: Viewer, what: str, which: str) -> None:
        """Whoever writes a slice and forgets to publish would see old pages and no error; so it is said, once."""
        super().journal(viewer, what, which)
        told = {topic[0] for call, *topic in self.store.on_commit if call == self.bus.tell}
        if not told & self.router.topics:
            log_once(f"{what} wrote, and published {', '.join(told) or 'nothing'}: no open page will show it")


# ==== 13. Seals ======================================================================================================
# Pure functions over secrets. A cookie carries a random token and a seal (HMAC) over it, so a forged one is turned away
# before any database is asked; the Directory keeps only the token's hash, so its table opens no door. Every comparison
# takes the same time whether it fails at the first byte or the last.

SCRYPT = {"n": 2 ** 14, "r": 16, "p": 1, "maxmem": 64 * 2 ** 20, "dklen": 32}     # about 0.1 s and 32 MiB for a guess
SCRYPT_AT_ONCE, SCRYPT_IN_LINE = threading.BoundedSemaphore(2), threading.BoundedSemaphore(6)    # or they take all RAM


def scrypt(password: str, salt: bytes) -> bytes:
    """Refused(503): so many are in line that they would keep threads from everybody else."""
    if not SCRYPT_IN_LINE.acquire(blocking=False):
        raise Refused(503, "Many people are signing in. Try again in a moment.", (("retry-after", "2"),))
    try:
        with SCRYPT_AT_ONCE:
            return hashlib.scrypt(password.encode("utf-8", "replace"), salt=salt, **SCRYPT)
    finally:
        SCRYPT_IN_LINE.release()


def hash_password(password: str) -> str:
    salt = secrets.token_bytes(16)
    return f"{salt.hex()}${scrypt(password, salt).hex()}"


def password_matches(password: str, stored: str) -> bool:
    """Takes as long, and says no, where nothing is stored."""
    salt, _, known = (stored or "00$").partition("$")
    return hmac.compare_digest(scrypt(password, bytes.fromhex(salt)).hex(), known) and bool(stored)


class Unusable(Exception):
    """It can't be done; the text is one line that says why and what to do."""


def add_key(path: pathlib.Path) -> None:
    """A new key in front of the newest, the only other that stays: what it sealed holds until the next rotation."""
    keys = [secrets.token_hex(32), *(path.read_text().split() if path.exists() else [])]
    part = beside(path, "part")
    with os.fdopen(os.open(part, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w") as file:
        file.write("\n".join(keys[:2]) + "\n")
    put_in_place(part, path)


def load_keys(path: pathlib.Path) -> Tuple[bytes, ...]:
    """The keys of secret.key, newest first. Unusable: it is gone, and a new one would sign everybody out without a
    word; or others can read it; or there is no key in it."""
    lost = "restore it from a backup; without it everybody is signed out"
    if not path.exists():
        raise Unusable(f"{path} is missing; {lost}")
    if os.name == "posix" and os.stat(path).st_mode & 0o077:
        raise Unusable(f"{path} can be read by others; chmod 600 it, and think of keys rotate")
    lines = path.read_bytes().split()
    if not lines or not all([re.fullmatch(b"[0-9a-f]{64}", line) for line in lines]):
        raise Unusable(f"{path} holds no keys, or more than keys; {lost}")
    return tuple([bytes.fromhex(line.decode()) for line in lines])


def seal(token: str, key: bytes) -> str:
    return hmac.digest(key, b"session:" + token.encode(), "sha256").hex()


def session_digest(header: str, name: str, keys: Tuple[bytes, ...]) -> Optional[bytes]:
    """What the Directory knows the session of this Cookie header by. None: there is no cookie of this name, or two (one
    was planted), or it was not sealed here. A bad neighbour hides nobody, and nothing is unquoted (RFC 6265, 5.4)."""
    pairs = [pair.strip().partition("=") for pair in header.split(";")]
    values = [value for key, _, value in pairs if key == name]
    found = re.fullmatch(r"([A-Za-z0-9_-]{43})\.([0-9a-f]{64})", values[0]) if len(values) == 1 else None
    return token_digest(*found.groups(), keys) if found else None


@functools.lru_cache(maxsize=4096)
def token_digest(token: str, sealed: str, keys: Tuple[bytes, ...]) -> Optional[bytes]:
    genuine = any([hmac.compare_digest(seal(token, key), sealed) for key in keys])
    return hashlib.sha256(token.encode()).digest() if genuine else None


COOKIES = {"http": "sid", "https": "__Host-sid"}     # no neighbour can set the second (RFC 6265bis, 4.1.3.2)


def set_cookie(scheme: str, value: str, seconds: int) -> Tuple[str, str]:
    secure = "; Secure" if scheme == "https" else ""
    return "set-cookie", f"{COOKIES[scheme]}={value}; Path=/; Max-Age={seconds}; HttpOnly; SameSite=Lax{secure}"


SEALED_SECONDS = 30                                  # for which a sealed message between two processes is believed
FRESH_SECONDS = 2                                    # and a verdict, without asking the gate again


def seal_of(parts: Iterable[str], key: bytes, until: int) -> str:
    return f"{until}.{hmac.digest(key, b'plane:' + json.dumps([until, *parts]).encode(), 'sha256').hex()}"


def believed(given: str, parts: Sequence[str], keys: Tuple[bytes, ...]) -> bool:
    """Was this sealed here, over these parts, a short time ago? Clocks may differ by as much as it is believed."""
    until = int(given.partition(".")[0]) if re.fullmatch("[0-9]{1,11}[.][0-9a-f]{64}", given) else 0
    return 0 <= until - time.time() <= 2 * SEALED_SECONDS and any(
        [hmac.compare_digest(seal_of(parts, key, until), given) for key in keys])


class Throttle:
    """Counts failures, or what else is to be rare, by key; one with too many waits until the window ends. Bounded: the
    oldest are forgotten."""
    SECONDS, KEYS = 600.0, 10_000

    def __init__(self, most: int = 10) -> None:
        self.most = most
        self.failures: collections.OrderedDict = collections.OrderedDict()    # key: (how many, until when)
        self.lock = threading.Lock()

    def check(self, *keys: str) -> None:
        """Refused(429): one of the keys has to wait."""
        with self.lock:
            waits = [self.failures.get(key, (0, 0.0)) for key in keys]
        left = max([until - time.monotonic() for count, until in waits if count >= self.most], default=0)
        if left > 0:
            retry_after = ("retry-after", str(int(left) + 1))
            raise Refused(429, "Too many attempts. Wait a few minutes, then try again.", (retry_after,))

    def failed(self, *keys: str) -> None:
        now = time.monotonic()
        with self.lock:
            for key in keys:
                count, until = self.failures.pop(key, (0, 0.0))
                self.failures[key] = (count + 1, until) if until > now else (1, now + self.SECONDS)
            while len(self.failures) > self.KEYS:
                self.failures.popitem(last=False)

    def succeeded(self, own: str, *keys: str) -> None:
        """What failed under own was no guessing, and counts no more under the others; what failed elsewhere does."""
        with self.lock:
            mine, ends = self.failures.pop(own, (0, 0.0))
            for key in keys if ends > time.monotonic() else ():
                count, until = self.failures.pop(key, (0, 0.0))
                if count > mine:
                    self.failures[key] = count - mine, until


# ==== 14. Directory ==================================================================================================
# The control plane: who exists, who is signed in, who belongs where and in which role. Policy lives here and nowhere
# else, but for the table of roles (section 10). Its gate is asked before anything else moves, and asks its store each
# time, so that a membership that ended a moment ago is already over.

WORKSPACE_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
ACCOUNT_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
SESSION_SECONDS = 30 * 86400                         # sliding: renewed by a request in the second half
MASQUERADE_SECONDS = 15 * 60
NAMES_A_PAGE = 24

DIRECTORY_TABLES = (
    "CREATE TABLE accounts (name TEXT PRIMARY KEY, label TEXT NOT NULL, password TEXT NOT NULL DEFAULT '', persona "
    "INTEGER NOT NULL DEFAULT 0, operator INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID",
    "CREATE TABLE sessions (digest BLOB PRIMARY KEY, account TEXT NOT NULL REFERENCES accounts ON DELETE CASCADE, "
    "created REAL NOT NULL, expires REAL NOT NULL) WITHOUT ROWID",
    "CREATE INDEX sessions_of ON sessions (account)",
    "CREATE TABLE workspaces (id TEXT PRIMARY KEY, name TEXT UNIQUE, born TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE memberships (workspace TEXT NOT NULL REFERENCES workspaces ON DELETE CASCADE, account TEXT NOT NULL "
    "REFERENCES accounts ON DELETE CASCADE, role TEXT NOT NULL, PRIMARY KEY (workspace, account)) WITHOUT ROWID",
    "CREATE INDEX memberships_of ON memberships (account)",
    "CREATE TABLE masquerades (digest BLOB PRIMARY KEY REFERENCES sessions ON DELETE CASCADE, account TEXT NOT NULL "
    "REFERENCES accounts ON DELETE CASCADE, writes INTEGER NOT NULL, until REAL NOT NULL) WITHOUT ROWID",
    "ALTER TABLE sessions ADD COLUMN agent TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE workspaces ADD COLUMN quota INTEGER NOT NULL DEFAULT 0",      # bytes; 0: the server's --quota
    "ALTER TABLE workspaces ADD COLUMN moving INTEGER NOT NULL DEFAULT 0",
    "CREATE TABLE nodes (address TEXT PRIMARY KEY) WITHOUT ROWID",
    "ALTER TABLE workspaces ADD COLUMN node TEXT NOT NULL DEFAULT ''",         # its address; '': here
)
GATE = """SELECT s.digest, s.expires, s.account AS owner, ifnull(q.account, s.account) AS account, q.writes,
                 w.id, w.quota, w.moving, w.node, m.role
          FROM sessions s LEFT JOIN masquerades q ON q.digest = s.digest AND q.until > ?
          LEFT JOIN workspaces w ON w.name = ?
          LEFT JOIN memberships m ON m.workspace = w.id AND m.account = ifnull(q.account, s.account)
          WHERE s.digest = ?"""
OVER = """SELECT account, '' AS owner FROM sessions WHERE expires <= ? UNION
          SELECT q.account, s.account FROM masquerades q JOIN sessions s ON s.digest = q.digest WHERE q.until <= ?"""
MINE = """SELECT w.id, w.name, m.role FROM memberships m JOIN workspaces w ON w.id = m.workspace
          WHERE m.account = ? AND w.name > ? ORDER BY w.name LIMIT ?"""
MEMBERS_OF = """SELECT a.name, a.label, m.role FROM memberships m JOIN accounts a ON a.name = m.account
                WHERE m.workspace = ? ORDER BY a.name"""

NO_SESSION = Response(401, b"Sign in first.\n")
MOVING = Response(503, b"This workspace is being moved. Try again in a minute.\n", headers=(("retry-after", "30"),))
NO_ENTRY = Response(403, b"This workspace is not yours, or there is none of that name. Ask its owner to invite you.\n")


@functools.lru_cache(maxsize=1024)
def verdict(account: str, role: str, workspace: str, id: str, operator: str = "", read_only: bool = False,
            quota: int = 0, node: str = "") -> Response:
    """The 200 of the gate. What is remembered here is how it reads, not that it holds."""
    grants = [grant for grant in ROLES.get(role, ()) if not read_only or grant.endswith(":read")]
    viewer = {"x-account": account, "x-role": role, "x-can-delete": "true" if "todos:delete" in grants else "false",
              "x-grants": ",".join(grants), "x-workspace": workspace, "x-id": id, "x-quota": str(quota)}
    rare = {"x-operator": operator, "x-read-only": "true" if read_only else "", "x-node": node}
    viewer.update({name: value for name, value in rare.items() if value})
    return as_json(viewer)._replace(headers=tuple(viewer.items()))


def masked(row: Optional[sqlite3.Row]) -> Tuple[str, bool]:
    """Of a session's row: the operator who looks on in the account's name, and whether read-only."""
    return ("", False) if row is None or row["writes"] is None else (row["owner"], not row["writes"])


class Directory(SliceHost):
    FORMS = {"/workspaces": "/", "/account/password": "/account"}

    def __init__(self, id: str, namespace: Namespace, settings: Settings, keys: Tuple[bytes, ...],
                 workspaces: Namespace, pages: Sequence[Live], slices: Optional[Sequence[Slice]] = None):
        routes = (Route("GET", "/", PUBLIC, self.home),
                  Route("GET", "/login", PUBLIC, self.login_page),
                  Route("POST", "/login", PUBLIC, self.login),
                  Route("POST", "/logout", PUBLIC, self.logout),
                  Route("POST", "/persona", PUBLIC, self.persona),
                  Route("POST", "/workspaces", ACCOUNT, self.found),
                  Route("GET", "/account", ACCOUNT, self.account_page),
                  Route("POST", "/account/sessions", ACCOUNT, self.end_sessions),
                  Route("POST", "/account/password", ACCOUNT, self.change_password),
                  Route("POST", "/masquerade", ACCOUNT, self.masquerade),
                  Route("POST", "/masquerade/end", PUBLIC, self.unmask),
                  Route("POST", "/members", "members:manage", invite),
                  Route("PATCH", "/members/<account>", "members:manage", change_role),
                  Route("DELETE", "/members/<account>", MEMBER, expel))
        own = Slice("directory", DIRECTORY_TABLES, (MEMBERS,), routes)
        super().__init__(id, namespace, Router([own, *(slices or ())]), pages)
        self.outside, self.inside = (self.router, None) if slices is None else (Router([own]), Router(slices))
        self.settings, self.keys, self.workspaces = settings, keys, workspaces
        self.verdicts: Dict[int, int] = collections.Counter()
        self.throttle, self.sign_ins, self.regulars, self.elsewhere = Throttle(), Throttle(30), {}, 0

    def on_open(self) -> None:
        super().on_open()
        self.as_of, self.admitted = None, {}         # the state of the file; its verdicts, by cookie, and until when
        self.bus.subscribe(lambda topic: self.bus.versions.update(["access"] if topic.startswith("access:") else []))

    def fetch(self, request: Request) -> Response:
        """A password is checked, or hashed, before the request takes its turn: 0.1 s in it would hold up every gate."""
        if request.method == "POST" and request.path in ("/login", "/account/password"):
            request = self.prove(request)
        return super().fetch(request)

    def handle(self, request: Request) -> Response:
        if request.path.startswith("/_gate"):
            answer = self.gate(request, workspace_behind(request) if request.path == "/_gate" else request.path[7:])
            self.verdicts[answer.status] += 1
            return self.for_proxies(answer) if request.path == "/_gate" else answer
        return super().handle(request)

    # -- what the server's other parts ask; the worker lets no such path in from outside

    def version(self, request: Request) -> Any:
        """Moves when another process has written, and for nodes also when somebody's access changed. Asked each second,
        so what is over ends here."""
        now = time.time()
        over = self.store.query(OVER, now, now)
        if over:
            with self.store.tx():
                for account, owner in over:
                    self.bus.publish(f"access:{account}")
                    self.journal(Viewer(account, operator=owner), "directory.unmask", "time is over") if owner else None
                self.store.exec("DELETE FROM sessions WHERE expires <= ?", now)
                self.store.exec("DELETE FROM masquerades WHERE until <= ?", now)
        try:
            self.keys = load_keys(self.settings.key_file)
        except Unusable as lost:                     # those at hand hold until the server ends
            log_once(str(lost))
        before, self.elsewhere = self.elsewhere, self.store.one("PRAGMA data_version")[0]
        if self.elsewhere != before:
            self.kept.clear()
        return [self.awake_since, self.elsewhere, self.bus.versions["access"] if self.settings.plane else 0]

    def password_of(self, request: Request) -> str:
        row = self.store.one("SELECT password FROM accounts WHERE name = ?", request.headers["x-account"])
        return row["password"] if row else ""

    def names(self, request: Request) -> Dict[str, Any]:
        """For the console: a page of all workspaces and the one of a name, by id, and how many there are."""
        after, name = [request.params.get(key, "") for key in ("after", "name")]
        page = self.store.query("SELECT id, name FROM workspaces WHERE name > ? ORDER BY name LIMIT ?", after,
                                NAMES_A_PAGE + 1)
        named = self.store.query("SELECT id, name FROM workspaces WHERE name = ?", name)
        return {"page": dict(page), "named": dict(named),
                "all": self.store.one("SELECT count(*) FROM workspaces")[0],
                "schema": len(DIRECTORY_TABLES + JOURNAL + JOBS)}

    def whoami(self, request: Request) -> Dict[str, Any]:
        """For the console: who asks, where they belong, whether they run this server."""
        row = self.session(request)
        account, mine = (row["account"], self.store.query(MINE, row["account"], "", 100)) if row else ("", [])
        return {"account": account, "masked": masked(row), "operator": bool(row) and self.is_operator(row["owner"]),
                "roles": {name: role for _, name, role in mine}, "personas": self.personas(account)}

    def is_operator(self, account: str) -> bool:
        return self.store.one("SELECT 1 FROM accounts WHERE name = ? AND operator", account) is not None

    def personas(self, account: str) -> List[Dict[str, Any]]:
        every = "SELECT name, label FROM accounts WHERE persona ORDER BY name"
        found = self.store.query(every) if self.settings.demo else []
        return [{**row, "current": row["name"] == account} for row in found]

    def node_of(self, request: Request) -> str:
        return self.store.one("SELECT node FROM workspaces WHERE id = ?", request.headers["x-id"])[0]

    OWN = {**SliceHost.OWN, "/_version": version, "/_password": password_of, "/_names": names, "/_whoami": whoami,
           "/_node_of": node_of, "/_mine": lambda self, request: [row["id"] for row in self.mine(request)]}

    # -- the gate

    def for_proxies(self, answer: Response) -> Response:
        """They bring the verdict to a node, sealed as a whole. Most know no answer but 200, 401, 403: for a workspace
        on its way they hear 200 and no verdict, and whoever they bring the request to asks again."""
        if answer.status != 200:
            return Response(200) if answer is MOVING else answer
        said, oldest = dict(answer.headers), self.keys[-1]       # a node has it still when they were just rotated
        seal = seal_of([said.get(name, "") for name in VERDICT], oldest, int(time.time()) + SEALED_SECONDS)
        return answer._replace(headers=(*answer.headers, ("x-verdict", seal)))

    def gate(self, request: Request, workspace: str) -> Response:
        """200 with the viewer, 401, or 403: for a workspace of others and for none at all, to the byte. A 200 is given
        again while nobody wrote to the file, in this process or another; SQLite's own count of that is asked."""
        as_of = self.store.db.total_changes, self.store.one("PRAGMA data_version")[0], self.keys
        if as_of != self.as_of or len(self.admitted) > 1024:
            self.as_of, self.admitted = as_of, {}
        key = request.headers.get("cookie"), request.scheme, workspace
        known, until = self.admitted.get(key, (NO_SESSION, 0.0))
        return known if time.time() < until else self.judge(request, workspace, key)

    def judge(self, request: Request, workspace: str, key: Tuple[Optional[str], ...]) -> Response:
        row = self.session(request, workspace)
        if row is None:
            return NO_SESSION
        if not row["role"]:
            return NO_ENTRY
        if row["moving"]:
            return MOVING
        quota = row["quota"] or self.settings.quota
        given = verdict(row["account"], row["role"], workspace, row["id"], *masked(row), quota, row["node"])
        if row["writes"] is None and not self.store.db.in_transaction:       # masquerades end by the clock
            self.admitted[key] = given, row["expires"] - SESSION_SECONDS / 2
        return given

    def session(self, request: Request, workspace: str = "") -> Optional[sqlite3.Row]:
        """The account of the request's cookie, with its role in workspace. None: no valid session."""
        digest = session_digest(request.headers.get("cookie", ""), COOKIES[request.scheme], self.keys)
        now = time.time()
        row = self.store.one(GATE, now, workspace, digest) if digest else None
        if row is None or row["expires"] <= now:
            return None
        if row["expires"] < now + SESSION_SECONDS / 2:
            if not request.wait:
                raise WouldBlock
            self.store.exec("UPDATE sessions SET expires = ? WHERE digest = ?", now + SESSION_SECONDS, row["digest"])
        return row

    # -- sessions

    def viewer(self, request: Request) -> Viewer:
        if "x-account" in request.headers:           # a verdict came along
            return super().viewer(request)
        row = self.session(request)
        return Viewer(row["account"], "", (), *masked(row)) if row else Viewer()

    def prove(self, request: Request) -> Request:
        fields = request.fields()
        name, password, new = [str(fields.get(key, "")) for key in ("username", "password", "new")]
        if max(len(name), len(password), len(new)) > 256:
            raise Refused(400, "A name and a password have at most 256 characters.")
        known = f"{name} from {request.peer}"        # who got in from there before is not locked out by others' guesses
        keys = [f"from {request.peer}", *([] if known in self.regulars else [f"to {name}"])]
        self.throttle.check(*keys)
        self.sign_ins.check(known)
        stored = json.loads(super().fetch(Request("GET", "/_password", headers={"x-account": name})).body)
        if not password_matches(password, stored):
            self.throttle.failed(known, *keys)
            return request._replace(headers={**request.headers, "x-proved": ""})
        self.throttle.succeeded(known, *keys)
        self.sign_ins.failed(known)                  # each takes 0.1 s and a row: nobody needs so many
        self.regulars = dict.fromkeys([*self.regulars][-1000:] + [known])
        hashed = hash_password(new) if new else ""
        return request._replace(headers={**request.headers, "x-proved": name, "x-known": stored, "x-hashed": hashed})

    def proved(self, ctx: Context) -> str:
        """Whose password came along. Nobody's (""): it was wrong, or was changed while it was checked."""
        name = ctx.request.headers["x-proved"]
        row = ctx.store.one("SELECT password FROM accounts WHERE name = ?", name)
        return name if row and row["password"] == ctx.request.headers["x-known"] else ""

    def login_page(self, ctx: Context) -> Response:
        next = local_path(ctx.request.params.get("next", "/"))
        return login_form(next, ctx.typed.get("username", ""), ctx.typed.get("problem", ""))

    def login(self, ctx: Context) -> Response:
        account = self.proved(ctx)
        if not account:
            raise Refused(422, "Name and password do not go together. Try again.")
        return self.open_session(ctx, account)

    def persona(self, ctx: Context) -> Response:
        account = ctx.field("account")
        if not self.settings.demo:
            raise Refused(*NOTHING_HERE)
        if not ctx.store.one("SELECT 1 FROM accounts WHERE name = ? AND persona", account):
            raise Refused(403, "This account is not part of the demo. Choose one that the home page shows.")
        return self.open_session(ctx, account)

    def open_session(self, ctx: Context, account: str) -> Response:
        """Always with a new token: one that was set before signing in is worth nothing after."""
        self.close_session(ctx)
        now, token = time.time(), secrets.token_urlsafe(32)
        digest, agent = hashlib.sha256(token.encode()).digest(), ctx.request.headers.get("user-agent", "")
        ctx.store.exec("INSERT INTO sessions VALUES (?, ?, ?, ?, ?)", digest, account, now, now + SESSION_SECONDS,
                       f"{ctx.request.peer} {agent}"[:200])
        cookie = set_cookie(ctx.request.scheme, f"{token}.{seal(token, self.keys[0])}", 400 * 86400)
        return see_other(local_path(ctx.field("next", "/")), cookie)._replace(which=account)

    def logout(self, ctx: Context) -> Response:
        self.close_session(ctx)
        return see_other("/", set_cookie(ctx.request.scheme, "", 0))._replace(which=ctx.viewer.account)

    def close_session(self, ctx: Context) -> None:
        row = self.session(ctx.request)
        self.end(ctx, "digest = ?", row["digest"]) if row else None

    def end(self, ctx: Context, which: str, *args: Any) -> None:
        """Sessions, and the streams that they opened, in whoever's name: who hears of access asks the gate again."""
        those = f"FROM sessions WHERE {which}"
        names = ctx.store.query(f"SELECT account {those} UNION SELECT account FROM masquerades "
                                f"WHERE digest IN (SELECT digest {those})", *args, *args)
        ctx.store.exec(f"DELETE {those}", *args)
        for row in names:
            ctx.publish(f"access:{row['account']}")

    def account_page(self, ctx: Context) -> Response:
        """One's own sessions, wherever they are. Each is named by a few digits of a hash that opens no door."""
        mine, typed = self.session(ctx.request), ctx.typed
        found = ctx.store.query("SELECT digest, created, agent FROM sessions WHERE account = ? "
                                "ORDER BY created DESC LIMIT 100", ctx.viewer.account)
        sessions = [{"name": row["digest"].hex()[:16], "since": formatdate(row["created"], usegmt=True),
                     "agent": row["agent"], "this": row["digest"] == mine["digest"]} for row in found]
        body = template("account")(session=sessions, account=ctx.viewer.account, problem=typed.get("problem", ""))
        return page("Account", body, ctx.viewer)

    def end_sessions(self, ctx: Context) -> Response:
        """The field session is one's name, or all, or others."""
        which, mine = ctx.field("session"), self.session(ctx.request)["digest"]
        for row in ctx.store.query("SELECT digest FROM sessions WHERE account = ?", ctx.viewer.account):
            if which in ("all", row["digest"].hex()[:16]) or (which == "others" and row["digest"] != mine):
                self.end(ctx, "digest = ?", row["digest"])
        return see_other("/account")._replace(which=f"sessions: {which}"[:64])

    def change_password(self, ctx: Context) -> Response:
        """Proved like a sign-in; all other sessions of the account end."""
        account, new, mine = ctx.viewer.account, ctx.field("new"), self.session(ctx.request)
        if self.proved(ctx) != account:
            raise Refused(422, "The present password is not right. Try again.")
        if not 8 <= len(new) <= 256:
            raise Refused(422, "A password has 8 to 256 characters.")
        ctx.store.exec("UPDATE accounts SET password = ? WHERE name = ?", ctx.request.headers["x-hashed"], account)
        self.end(ctx, "account = ? AND digest <> ?", account, mine["digest"])
        return see_other("/account")._replace(which=account)

    def masquerade(self, ctx: Context) -> Response:
        """An operator looks on in somebody's name, for 15 minutes; read-only, unless they ask for more."""
        row, account = self.session(ctx.request), ctx.field("account").strip()
        if not self.is_operator(row["owner"]):
            raise Refused(403, "Only an operator of this server may do that: account add NAME --operator makes one.")
        if not ctx.store.one("SELECT 1 FROM accounts WHERE name = ?", account):
            raise Refused(404, "There is no account of this name. Go back and check the spelling.")
        self.lift(ctx, row)
        ctx.store.exec("INSERT INTO masquerades VALUES (?, ?, ?, ?)", row["digest"], account,
                       "writes" in ctx.request.fields(), time.time() + MASQUERADE_SECONDS)
        ctx.publish(f"access:{row['account']}")
        return see_other(local_path(ctx.field("next", "/")))._replace(which=account)

    def unmask(self, ctx: Context) -> Response:
        row = self.session(ctx.request)
        self.lift(ctx, row) if row else None
        return see_other("/")._replace(which=ctx.viewer.account)

    def lift(self, ctx: Context, session: sqlite3.Row) -> None:
        """The mask of a session, also where its time has run out just now."""
        mask = ctx.store.one("SELECT account FROM masquerades WHERE digest = ?", session["digest"])
        if mask:
            ctx.store.exec("DELETE FROM masquerades WHERE digest = ?", session["digest"])
            ctx.publish(f"access:{mask['account']}")

    # -- the home page, and new workspaces

    def mine(self, request: Request) -> List[sqlite3.Row]:
        """My workspaces: a page of them, and the first of the next."""
        row, after = self.session(request), request.params.get("after", "")
        return self.store.query(MINE, row["account"], after, NAMES_A_PAGE + 1) if row else []

    def home(self, ctx: Context) -> Response:
        """The counts come with the request: the worker asked each workspace for its own."""
        account, typed, personas = ctx.viewer.account, ctx.typed, self.personas(ctx.viewer.account)
        if not account:
            return page("Welcome", template("home.welcome")(demo=bool(personas), persona=personas))
        mine, counts = self.mine(ctx.request), json.loads(ctx.request.headers.get("x-counts", "{}"))
        shown = [{**row, "count": counts.get(row["id"], "")} for row in mine[:NAMES_A_PAGE]]
        body = template("home")(
            workspace=shown, start=self.pages[0].path, none=not shown, more=len(mine) > NAMES_A_PAGE,
            after=shown[-1]["name"] if shown else "", demo=bool(personas), persona=personas,
            name=typed.get("name", ""), problem=typed.get("problem", ""),
            console=bool(personas) or self.is_operator(ctx.viewer.operator or account))
        return page("Workspaces", body, ctx.viewer)

    def found(self, ctx: Context) -> Response:
        """A new workspace, the caller its owner. A name that was used before gets a new id, and no old rows."""
        account, name = ctx.viewer.account, ctx.field("name").strip()
        owned = ctx.store.one("SELECT count(*) FROM memberships WHERE account = ? AND role = 'owner'", account)[0]
        if owned >= (self.settings.max_workspaces or (2000 if self.settings.demo else 20)):
            raise Refused(422, f"You own {owned} workspaces, which is the limit here.")
        if self.settings.plane and not place(ctx.store, name):
            raise Refused(503, "There is no node yet that could hold it; node add HOST:PORT names one.")
        add_workspace(ctx.store, self.workspaces, name, [(account, "owner")])
        if ctx.request.form and not ctx.request.datastar:
            return see_other(f"/w/{name}{self.pages[0].path}")._replace(which=name)
        return done(ctx, name, name="", problem="")


def free_name(store: Store, name: str) -> str:
    """name. Refused(422): it is none for a workspace, or taken."""
    if not WORKSPACE_NAME.fullmatch(name):
        raise Refused(422, "A name has 1 to 63 characters: a to z, 0 to 9, and hyphens inside.")
    if store.one("SELECT 1 FROM workspaces WHERE name = ?", name):
        raise Refused(422, f"The name {name} is taken. Choose another.")
    return name


def add_workspace(store: Store, workspaces: Namespace, name: str, members: Iterable[Sequence[str]],
                  source: Optional[pathlib.Path] = None) -> None:
    """members: accounts with their roles. The file (source; else an empty one) is there before the commit: a row
    without one means that it was lost."""
    before = store.one("SELECT count(*) FROM workspaces WHERE born = ?", free_name(store, name))[0]
    id, node = workspaces.id_from_name(f"{name}#{before}" if before else name), place(store, name)
    if store.one("SELECT 1 FROM workspaces WHERE id = ?", id):
        raise Refused(422, "This server has one workspace. workspace import takes its file to a server of many.")
    if source and workspaces.path(id).exists():
        raise Refused(*TAKEN)
    store.exec("INSERT INTO workspaces (id, name, born, node, moving) VALUES (?, ?, ?, ?, ?)",
               id, name, name, node, node != "")
    for account, role in members:
        store.exec("INSERT INTO memberships VALUES (?, ?, ?)", id, account, role)
    if not node:
        put_in_place(source, workspaces.path(id)) if source else workspaces.create(id)


def place(store: Store, name: str) -> str:
    """The address of a new workspace's node, by rendezvous hashing: each gets its share. "": here."""
    nodes = [row["address"] for row in store.query("SELECT address FROM nodes")]
    return max(nodes, key=lambda node: hashlib.sha256(f"{node} {name}".encode()).digest(), default="")


def login_form(next: str, username: str = "", problem: str = "", status: int = 200) -> Response:
    return page("Sign in", template("login")(next=next, username=username, problem=problem), status=status)


def workspace_behind(request: Request) -> str:
    """For a proxy that asks for a verdict: the workspace of the request that it holds. "": none, or more than one."""
    targets = {request.headers[name] for name in ("x-original-uri", "x-forwarded-uri") if name in request.headers}
    target = targets.pop() if len(targets) == 1 else ""
    with contextlib.suppress(Refused):
        hit = re.match(r"/w/([^/]+)", plain_path(target.partition("?")[0]))
        return hit[1] if hit else ""
    return ""


def role_of(ctx: Context, account: str) -> str:
    """"": not a member."""
    row = ctx.store.one("SELECT role FROM memberships WHERE workspace = ? AND account = ?", ctx.scope, account)
    return row["role"] if row else ""


def role_choice(viewer: Viewer, chosen: str) -> List[Dict[str, Any]]:
    """Only an owner makes owners."""
    return [{"role": role, "selected": role == chosen} for role in ROLES if role != "owner" or viewer.role == "owner"]


def members_region(ctx: Context) -> Html:
    rows = []
    for member in ctx.store.query(MEMBERS_OF, ctx.scope):
        managed = ctx.viewer.can("members:manage") and (member["role"] != "owner" or ctx.viewer.role == "owner")
        choice = role_choice(ctx.viewer, member["role"])
        rows.append({**member, "option": choice, "managed": managed, "fixed": not managed})
    return template("members.region")(member=rows, all=len(rows))


def members_page(ctx: Context, region: Html) -> Html:
    typed = ctx.typed
    return template("members")(region=region, workspace=ctx.workspace, form=ctx.viewer.can("members:manage"),
                               option=role_choice(ctx.viewer, typed.get("role", "member")), me=ctx.viewer.account,
                               account=typed.get("account", ""), problem=typed.get("problem", ""))


MEMBERS = Live("/members", MEMBER, "members", "Members", members_region, members_page)


def invite(ctx: Context) -> Response:
    account, role = ctx.field("account").strip(), ctx.field("role", "member")
    if not ctx.store.one("SELECT 1 FROM accounts WHERE name = ?", account):
        raise Refused(422, "There is no account of this name. Check the spelling, or ask whoever runs this "
                           "server to add it.")
    if role_of(ctx, account):
        raise Refused(422, f"{account} is a member already. Change the role in the list.")
    set_role(ctx, account, "", role)
    return done(ctx, account, account="", problem="")


def change_role(ctx: Context, account: str) -> Response:
    set_role(ctx, account, role_of(ctx, account) or None, ctx.field("role"))
    return done(ctx, account)


def expel(ctx: Context, account: str) -> Response:
    """Anybody may leave; to send others away takes members:manage."""
    if account != ctx.viewer.account:
        permit("members:manage", ctx.viewer, ctx.request.method)
    set_role(ctx, account, role_of(ctx, account) or None, None)
    return done(ctx, account)


def set_role(ctx: Context, account: str, before: Optional[str], after: Optional[str]) -> None:
    """From before ("": not a member yet, None: should have been one) to after (None: no longer one)."""
    if before is None:
        raise Refused(404, "There is no such member. The page shows who there is now.")
    if after is not None and after not in ROLES:
        raise Refused(422, f"A role is one of {', '.join(ROLES)}.")
    if "owner" in (before, after) and ctx.viewer.role != "owner":
        raise Refused(403, "Only an owner can make or change an owner. Ask one of them.")
    owners = ctx.store.one("SELECT count(*) FROM memberships WHERE workspace = ? AND role = 'owner'", ctx.scope)[0]
    if before == "owner" != after and owners == 1:
        raise Refused(409, "This is the last owner. Make somebody else an owner first.", signal="toast")
    ctx.store.exec("DELETE FROM memberships WHERE workspace = ? AND account = ?", ctx.scope, account)
    if after is not None:
        ctx.store.exec("INSERT INTO memberships VALUES (?, ?, ?)", ctx.scope, account, after)
    ctx.publish(f"members:{ctx.scope}")
    ctx.publish(f"access:{account}")


class Single(Directory):
    """Both planes in one object and one file, for a server with one workspace: who looks is asked in the same breath as
    there is to see."""

    def router_of(self, request: Request) -> Router:
        """A workspace's pages are where its gate was asked, and nowhere else."""
        return self.inside if "x-id" in request.headers and not request.path.startswith("/members") else self.outside

    def on_open(self) -> None:
        super().on_open()
        pages = max(1, self.settings.quota // self.store.one("PRAGMA page_size")[0])             # 0 would be no limit
        self.store.exec(f"PRAGMA max_page_count = {pages}")

    def viewer(self, request: Request) -> Viewer:
        if "x-workspace" not in request.headers or "x-account" in request.headers:
            return super().viewer(request)
        verdict = self.gate(request, request.headers["x-workspace"])
        if verdict.status != 200:
            raise Refused(verdict.status, verdict.body.decode().strip(), verdict.headers)
        return super().viewer(request._replace(headers=dict(verdict.headers)))


# ==== 15. Worker =====================================================================================================
# The routing function of the two planes, line for line the one that runs in front of Durable Objects: drop what
# outsiders may not say, ask the gate, and only on its 200 forward, with the verdict as trusted headers. The gate is a
# real request to the Directory, not a middleware; a stranger is refused before any Workspace is contacted.

class Env(NamedTuple):
    """What a worker works with: the world in one argument."""
    settings: Settings
    directory: Stub
    workspaces: Namespace
    trace: Trace
    front: Callable[[Request, Env], Response]        # what the edge asks: the worker, or its like for one plane
    admit: Callable[[Request, Env], Optional[Response]]      # the verdict that front will heed
    start: str                                       # the page of a workspace that comes first
    console: Callable[[Request], Response] = lambda request: Response(404)       # section 20


def worker(request: Request, env: Env) -> Response:
    request = stripped(request)
    return heed(admit(request, env), request, env)


def stripped(request: Request) -> Request:
    """Without what nobody outside may say."""
    if TRUSTED.isdisjoint(request.headers):
        return request
    return request._replace(headers={name: value for name, value in request.headers.items() if name not in TRUSTED})


def heed(verdict: Optional[Response], request: Request, env: Env) -> Response:
    """Nothing moves but on its 200. None: nobody needs a verdict for this."""
    if verdict is None:
        return apex(request, env)
    if verdict.status != 200:
        return refusal(request, verdict)
    return forward(request, dict(verdict.headers), env)


def forward(request: Request, viewer: Dict[str, str], env: Env) -> Response:
    """To the object that answers for the rest of the path, with the verdict as trusted headers."""
    _, _, workspace, *rest = request.path.split("/")
    if not rest or rest == [""]:
        return see_other(f"/w/{workspace}{env.start}")
    if rest[0].startswith("_"):                      # these addresses are for the worker itself
        raise Refused(*NOTHING_HERE)
    forwarded = request._replace(path="/" + "/".join(rest), headers={**request.headers, **viewer})
    if rest[0] == "members":                         # membership is policy, so the Directory answers
        return env.directory.fetch(forwarded)
    return env.workspaces.get(viewer["x-id"]).fetch(forwarded)


def single_front(request: Request, env: Env) -> Response:
    """The worker where gate and rows are one object: without the hop between them."""
    if not request.path.startswith("/w/"):
        return worker(request, env)
    refuse_foreign(request)
    try:
        whose = {"x-workspace": request.path.split("/")[2], "x-id": env.directory.id}
        return forward(stripped(request), whose, env)
    except Refused as no:
        return refusal(request, Response(no.status, no.message.encode(), headers=no.headers))


def admit(request: Request, env: Env) -> Optional[Response]:
    """The gate's verdict; None: nobody needs one, for it is not about a workspace."""
    refuse_foreign(request)
    if not request.path.startswith("/w/"):
        return None
    workspace = request.path.split("/")[2]
    cookie, wait = {"cookie": request.headers.get("cookie", "")}, request.wait
    return env.directory.fetch(Request("GET", f"/_gate/{workspace}", "", cookie, wait=wait, scheme=request.scheme))


def refuse_foreign(request: Request) -> None:
    """Cross-site request forgery: what may write must come from a page of ours, by the browser's own words (Fetch
    Metadata, Origin). None at all is a no, and so is one that contradicts."""
    if request.method in SAFE:
        return
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    ours = f"{request.scheme}://{request.headers.get('host', '')}"
    if (site, origin) == (None, None) or site not in (None, "same-origin") or origin not in (None, ours):
        raise Refused(403, "This request came from another site. Open the page here and try again; a script sends its "
                           "Origin.")


def refusal(request: Request, verdict: Response) -> Response:
    """The gate's no, as it is. Only a stream that Datastar would ask for again and again gets it as its last frame."""
    if verdict.status in (401, 403) and request.datastar and request.method == "GET" and request.path.endswith("/live"):
        return Response(200, goodbye(verdict.status), "text/event-stream")
    raise Refused(verdict.status, verdict.body.decode().strip(), verdict.headers)


def goodbye(status: int) -> bytes:
    """Takes the place of the element that holds the stream; nothing is left that could ask again."""
    return patch_elements(template("goodbye.signed_out" if status == 401 else "goodbye.no_entry")())


ASSETS = {"/datastar.js": "text/javascript; charset=utf-8", "/style.css": "text/css; charset=utf-8",
          "/icon.svg": "image/svg+xml"}


def apex(request: Request, env: Env) -> Response:
    """Everything outside a workspace."""
    if not request.wait:
        raise WouldBlock
    if request.path in ASSETS:
        return only_read(request) or asset(request)
    if re.match("/console(/|$)", request.path):
        return env.console(request)
    if request.path == "/" and request.method in SAFE:       # a fan-out: each workspace on the page is asked its count
        mine = env.directory.ask("/_mine", request.query, request.headers, request.scheme)[:NAMES_A_PAGE]
        counts = {id: count_of(env.workspaces.get(id)) for id in mine}
        request = request._replace(headers={**request.headers, "x-counts": json.dumps(counts)})
    elif request.path.startswith("/_") and not re.match("/_gate(/|$)", request.path):
        raise Refused(*NOTHING_HERE)
    return env.directory.fetch(request)


def asset(request: Request) -> Response:
    """A file of templates/. The browser asks each time and gets a 304 while it is the same."""
    body = (TEMPLATES / request.path[1:]).read_bytes()
    etag = f'"{hashlib.blake2b(body, digest_size=9).hexdigest()}"'
    whole = Response(200, body, ASSETS[request.path], (("etag", etag), ("cache-control", "no-cache")))
    return whole._replace(status=304, body=b"") if request.headers.get("if-none-match") == etag else whole


LOOK_SECONDS = 0.2                                   # for which the server's own questions wait for a busy workspace


def facts_of(workspace: Stub) -> Dict[str, Any]:
    """What it tells of itself. One that can't be read, or not now, has no count, and hides no other."""
    try:
        return workspace.ask("/_counts", wait=LOOK_SECONDS)
    except WouldBlock:
        return {"count": "busy"}
    except CRASH as error:
        if not isinstance(error, (StorageFault, Refused)):
            log_error("a slice's count", error)
        return {"count": "can't be read"}


def count_of(workspace: Stub) -> str:
    count = facts_of(workspace)["count"]
    return f"{count} open" if type(count) is int else count


# ==== 16. Reader =====================================================================================================
# There is one way to read a request. What could be read in two ways is refused and the connection ends, for whoever
# stands in front of us might have read it the other way. One regular expression says what a head looks like; only when
# it does not match does somebody look for the reason.

LINE_LIMIT, HEAD_LIMIT, FIELD_LIMIT, BODY_LIMIT = 16_384, 32_768, 64, 65_536   # bytes; FIELD_LIMIT counts header fields
FRAMING_LIMIT = 4_096                                # bytes around the chunks of a body
TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"                                         # RFC 9110, 5.6.2
FIELD = re.compile(rb"(" + TOKEN + rb"):[ \t]*((?:[^\x00-\x08\x0a-\x1f\x7f]*[^\x00-\x20\x7f])?)"
                   rb"[ \t]*\r\n")                  # RFC 9112, 5; not folded, and in linear time
HEAD = re.compile(rb"(" + TOKEN + rb") ([!-~]+) HTTP/1\.([01])\r\n"
                  rb"((?:" + TOKEN + rb":[^\x00-\x08\x0a-\x1f\x7f]*\r\n)*)\r\n")
ONCE = {"host", "content-length", "content-type", "transfer-encoding", "origin", "sec-fetch-site", "expect", "cookie"}
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:[ \t]*;[\t !-~]*)?")
HOST = re.compile(r"(?:[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?")     # RFC 3986, 3.2.2
REQUEST_LINE = re.compile(TOKEN + rb" [!-~]+ HTTP/([0-9])\.[0-9]\r\n")
BEGINNING = re.compile(TOKEN + rb"(?: [!-~]*(?: [!-~]*\r?)?)?")                   # of a request, as far as it came
BARE_LF = re.compile(rb"(?<!\r)\n")
TOO_LONG = 414, "The address is too long. Send what is long in the body."


class Reading(NamedTuple):
    """A request as it was framed. What its target means is not asked yet: a bad one is a mistake in a sound frame."""
    method: str
    target: str
    headers: Dict[str, str]
    keep: bool                                       # the connection goes on after it
    modern: bool                                     # HTTP/1.1
    length: Optional[int]                            # of the body, in bytes; None: it comes in chunks
    body: Optional[bytes] = b""                      # None: the client waits for a word before it sends it


def read_requests(buffer: bytearray) -> Iterator[Optional[Reading]]:
    """A coroutine over a buffer that grows: yields None for more bytes, or a Reading. Refused: the framing is broken,
    and nothing behind it may be read."""
    while True:
        while buffer == b"\r":
            yield None
        if buffer.startswith(b"\r\n"):               # one empty line in front is tolerated (RFC 9112, 2.2)
            del buffer[:2]
        seen = 0                                     # each byte is looked at once, however slowly they come
        while (end := buffer.find(b"\r\n\r\n", max(0, seen - 3), HEAD_LIMIT)) < 0:
            check_beginning(buffer, seen)
            seen = len(buffer)
            yield None
        head = yield from take(buffer, end + 4)
        reading = (parse_head if len(head) > 1024 else parse_again)(head)
        if reading.length != 0:
            if "expect" in reading.headers and reading.modern:
                yield reading._replace(body=None)
            body = yield from (read_chunks(buffer) if reading.length is None else take(buffer, reading.length))
            reading = reading._replace(body=body)
        yield reading


def check_beginning(buffer: bytearray, seen: int) -> None:
    """Refused: whatever comes after this, it is no request. Who speaks TLS or SSH to us learns it at once. seen: bytes
    that were looked at before."""
    end = buffer.find(b"\r\n")
    line = buffer[:end] if end >= 0 else buffer
    fits = BEGINNING.fullmatch(line) if end < 0 else end + 1 < seen or REQUEST_LINE.match(buffer)
    if buffer and (not fits or BARE_LF.search(buffer, seen)):
        raise why_not(bytes(line))
    if len(line) > LINE_LIMIT:
        raise Refused(*TOO_LONG)
    if len(buffer) >= HEAD_LIMIT:
        raise Refused(431, "The header is too long.")


def parse_head(head: bytes) -> Reading:
    found = HEAD.fullmatch(head)
    if found is None:
        raise why_not(head)
    method, target, minor, block = found.groups()
    pairs = FIELD.findall(block)
    headers = {name.decode().lower(): value.decode("latin-1") for name, value in pairs}
    if len(method) + len(target) > LINE_LIMIT:
        raise Refused(*TOO_LONG)
    if len(pairs) > FIELD_LIMIT:
        raise Refused(431, f"Send at most {FIELD_LIMIT} header fields.")
    if len(headers) != len(pairs):
        headers = joined(pairs)
    modern = minor == b"1"
    if "host" not in headers if modern else "transfer-encoding" in headers:
        raise Refused(400, "Send a Host header field; in HTTP/1.0, no Transfer-Encoding.")
    host = HOST.fullmatch(headers.get("host", "-"))
    if not host or len(host[0]) > 270 or int(host[1] or 0) > 65535:      # a name has 255 characters (RFC 1035, 2.3.4)
        raise Refused(400, "The Host header field is no name or address with an optional port.")
    connection = headers.get("connection", "" if modern else "close").lower()
    length = body_length(headers)
    return Reading(method.decode(), target.decode(), headers, "close" not in connection, modern, length)


parse_again = functools.lru_cache(maxsize=1024)(parse_head)      # a browser's heads are mostly the same, time and again


def joined(pairs: Sequence[Tuple[bytes, bytes]]) -> Dict[str, str]:
    """Fields of which some came more than once: a list (RFC 9110, 5.3), except where two could be read as either."""
    headers: Dict[str, str] = {}
    for name, value in ((name.decode().lower(), value.decode("latin-1")) for name, value in pairs):
        if name in headers and name in ONCE:
            raise Refused(400, f"Send the header field {name} once.")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def why_not(head: bytes) -> Refused:
    version = REQUEST_LINE.match(head)
    if version and version[1] != b"1":
        return Refused(505, "Speak HTTP/1.1.")
    malformed = "header fields are malformed." if version else "request line is malformed: METHOD /path HTTP/1.1."
    return Refused(400, f"The {malformed}")


def body_length(headers: Dict[str, str]) -> Optional[int]:
    """Bytes, or None for chunks (RFC 9112, 6). Digits that int() would take and a proxy would not, or the other way,
    are refused, and so is a body that comes with two lengths."""
    if "expect" in headers and headers["expect"].lower() != "100-continue":
        raise Refused(417, "The only expectation known here is 100-continue.")
    if "transfer-encoding" in headers:
        if "content-length" in headers or headers["transfer-encoding"].lower() != "chunked":
            raise Refused(400, "Send either Content-Length or Transfer-Encoding: chunked.")
        return None
    length = headers.get("content-length", "0")
    if length != "0" and not re.fullmatch("[1-9][0-9]{0,18}", length):
        raise Refused(400, "Content-Length is one plain decimal number.")
    if int(length) > BODY_LIMIT:
        raise Refused(413, f"The body is too large: at most {BODY_LIMIT} bytes.")
    return int(length)


def take(buffer: bytearray, length: int) -> Iterator[None]:
    """Returns the next length bytes."""
    while len(buffer) < length:
        yield None
    data = bytes(buffer[:length])
    del buffer[:length]
    return data


def take_line(buffer: bytearray, limit: int) -> Iterator[None]:
    """Returns the next line without its CR LF."""
    while (end := buffer.find(b"\r\n", 0, limit)) < 0:
        if len(buffer) >= limit:
            raise Refused(400, "A line of the chunked body is too long.")
        yield None
    return (yield from take(buffer, end + 2))[:-2]


def read_chunks(buffer: bytearray) -> Iterator[None]:
    """Returns the decoded body (RFC 9112, 7.1). Extensions and trailers are read over."""
    body, framing = bytearray(), 0
    while True:
        line = yield from take_line(buffer, 256)
        size, framing = CHUNK_SIZE.fullmatch(line), framing + len(line) + 4
        if not size or framing > FRAMING_LIMIT:
            raise Refused(400, "A chunk begins with its size in hexadecimal digits; send few, and large ones.")
        length = int(size[1], 16)
        if len(body) + length > BODY_LIMIT:
            raise Refused(413, f"The body is too large: at most {BODY_LIMIT} bytes.")
        if length == 0:
            break
        data = yield from take(buffer, length + 2)
        if not data.endswith(b"\r\n"):
            raise Refused(400, "A chunk ends with CR LF.")
        body += data[:-2]
    room = 1024
    while (line := (yield from take_line(buffer, room))):
        room -= len(line)
        if not FIELD.fullmatch(line + b"\r\n") or room < 2:
            raise Refused(400, "A trailer is malformed, or there are too many.")
    return bytes(body)


def parse_target(target: str, host: str) -> Tuple[str, str]:
    """The path, decoded once, and the query as it is. Refused(400): not a path, or one with two meanings."""
    if not target.startswith("/"):                   # absolute form (RFC 9112, 3.2.2): it must name the host it came to
        found = re.fullmatch(r"(?i:https?)://([^/?]+)/?(.*)", target)
        if not found or found[1].lower() != host.lower():
            raise Refused(400, "Ask for a path: GET /path HTTP/1.1.")
        target = f"/{found[2]}"
    path, _, query = target.partition("?")
    return plain_path(path), query


# ==== 17. Answers ====================================================================================================
# How a Response leaves: head and body in one piece, with the headers that keep a page to itself. A page runs no script
# but its own, by a nonce that is new with each answer. A refusal says what to do next.

REASONS = http.client.responses
POLICY = ("default-src 'none'; script-src 'self'%s; style-src 'self'; img-src 'self'; connect-src 'self'; "
          "form-action 'self'; base-uri 'none'; frame-ancestors 'none'")
DEFAULTS = {"cache-control": "no-store", "content-security-policy": POLICY % "", "x-content-type-options": "nosniff",
            "x-frame-options": "DENY", "referrer-policy": "same-origin", "cross-origin-opener-policy": "same-origin",
            "cross-origin-resource-policy": "same-origin"}
STREAMING = {"transfer-encoding": "chunked", "x-accel-buffering": "no", "cache-control": "no-cache"}
NONCED = {"content-security-policy": POLICY % f" 'nonce-{NONCE}'"}


@functools.lru_cache(maxsize=256)
def head_of(status: int, type: str, headers: Tuple[Tuple[str, str], ...], live: bool) -> str:
    """The part of a head that does not change from one answer to the next."""
    special = STREAMING if live else NONCED if type == PAGE else {}
    fields = {**DEFAULTS, "content-type": type, **special, **dict(headers)}
    lines = [f"{name}: {value}\r\n" for name, value in fields.items()]
    return f"HTTP/1.1 {status} {REASONS.get(status, '')}\r\n{''.join(lines)}"


GZIP = re.compile(r"\bgzip\b(?!\s*;\s*q=0(?:\.0*)?\s*(?:,|$))")


def accepts_gzip(request: Request) -> bool:
    return GZIP.search(request.headers.get("accept-encoding", "")) is not None


def encode(request: Request, response: Response, keep: bool, head_only: bool, date: str) -> bytes:
    """The bytes of an answer, to leave in one send."""
    status, body, live, zipped = response.status, response.body, response.watch is not None, accepts_gzip(request)
    head = head_of(status, response.type, response.headers, live)
    if response.type == PAGE:
        nonce = secrets.token_hex(16)
        head, body = head.replace(NONCE, nonce, 1), body.replace(NONCE.encode(), nonce.encode(), 1)
    if live:
        body = first_frame(request, response.rendering, zipped)
    else:
        zipped = zipped and len(body) > 1000 and response.type.startswith(("text/html", "text/css", "text/javascript"))
        if zipped:
            squeeze = zlib.compressobj(1, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
            body = squeeze.compress(body) + squeeze.flush()
    length = f"content-length: {len(body)}\r\n" if not live and status not in (204, 304) else ""
    coding = "content-encoding: gzip\r\nvary: accept-encoding\r\n" if zipped else ""
    close = "" if keep else "connection: close\r\n"
    return f"{head}date: {date}\r\n{length}{coding}{close}\r\n".encode("latin-1") + (b"" if head_only else body)


def first_frame(request: Request, rendering: Rendering, zipped: bool) -> bytes:
    """The region, or a word that the page shows this very version already: it is live again."""
    if request.headers.get("last-event-id") == rendering.etag:
        return chunk(GZIP_HEAD + deflated(CURRENT) if zipped else CURRENT)
    return chunk(GZIP_HEAD) + rendering.zipped if zipped else rendering.frame


def refused(request: Request, no: Refused) -> Response:
    """A page for a browser's own navigation, a line of text for everybody else."""
    if request.datastar or "text/html" not in request.headers.get("accept", ""):
        return Response(no.status, f"{no.message}\n".encode("utf-8", "replace"), headers=no.headers)
    if no.status == 401:
        return login_form(local_path(request.path), problem=no.message, status=401)
    body = template("error")(status=no.status, reason=REASONS.get(no.status, ""), message=no.message)
    return page(REASONS.get(no.status, "Error"), body, status=no.status)._replace(headers=no.headers)


# ==== 18. Process ====================================================================================================
# What all parts of the process share: the threads that think, and the memory.

class Pool:
    """A few threads that take jobs from one line. What a job puts in is done next by the same thread: to render what a
    command changed, no other needs to be woken. A job that fails is logged; its thread goes on. A job wakes the one
    thread that fell idle last; queue.SimpleQueue would wake a second one each time, to find nothing. Beside the line
    there are lanes: what must be done in order, and better together, waits in one."""
    TOGETHER = 64                                    # items of a lane at most, lest the first be kept waiting

    def __init__(self, size: int) -> None:
        self.jobs, self.idle, self.own = collections.deque(), [], threading.local()     # idle: the lock each waits at
        self.lock, self.lanes = threading.Lock(), {}           # what waits in each lane that is driven
        self.threads = [threading.Thread(target=self.work, daemon=True) for _ in range(size)]
        for thread in self.threads:
            thread.start()

    def put(self, *job: Any) -> None:
        """put(function, *args). No job at all ends one thread."""
        getattr(self.own, "put", self.share)(*job)

    def share(self, *job: Any) -> None:
        """put(), for a job that whoever is free should do."""
        self.jobs.append(job)
        self.wake()

    def wake(self) -> None:
        try:
            self.idle.pop().release()
        except IndexError:                           # all are busy, and look at the line before they fall idle
            return

    def defer(self) -> None:
        """What this thread puts in from now on wakes nobody before rouse(): whoever woke in the midst of its own work
        would only contend with it for the interpreter."""
        self.own.put = lambda *job: self.jobs.append(job)

    def rouse(self) -> None:
        for _ in range(min(len(self.jobs), len(self.idle))):
            self.wake()

    def gather(self, lane: str, item: Any, job: Callable[[List[Any]], None], halve: Any = False) -> None:
        """Have job(items) done with what has come to this lane until then. No lane has two threads at a time. halve: if
        it is true then, or not empty, only with half of it, so that what comes of that has its turn before the rest."""
        with self.lock:
            driven = lane in self.lanes
            self.lanes.setdefault(lane, collections.deque()).append(item)
        if not driven:
            self.put(self.drive, lane, job, halve)

    def drive(self, lane: str, job: Callable[[List[Any]], None], halve: Any) -> None:
        waiting = self.lanes[lane]
        most = (len(waiting) + 1) // 2 if halve else len(waiting)
        try:
            job([waiting.popleft() for _ in range(min(most, self.TOGETHER))])
        finally:
            with self.lock:
                more = waiting or self.lanes.pop(lane)
            if more:                                 # behind the others, if there are any
                (self.share if self.jobs else self.put)(self.drive, lane, job, halve)

    def work(self) -> None:
        own, turn = collections.deque(), threading.Lock()
        self.own.put = lambda *job: own.append(job)
        turn.acquire()
        while (job := own.popleft() if own else self.next(turn)):
            guarded(*job)

    def next(self, turn: threading.Lock) -> Tuple[Any, ...]:
        while True:
            try:
                return self.jobs.popleft()
            except IndexError:
                self.idle.append(turn)
            if self.jobs:                            # put in just before, when this thread was not idle yet
                self.wake()
            turn.acquire()

    def close(self, patience: float) -> None:
        """patience: seconds for all threads together; a job that takes longer is left behind."""
        for _ in self.threads:
            self.share()
        until = time.monotonic() + patience
        for thread in self.threads:
            thread.join(max(0.0, until - time.monotonic()))


def guarded(call: Callable[..., None], *args: Any) -> None:
    """One request's trouble must end neither the loop nor a thread that others need."""
    try:
        call(*args)
    except StorageFault as fault:
        log(str(fault))
    except CRASH as error:
        log_error(getattr(call, "__qualname__", str(call)), error)


def give_back_memory() -> None:
    """What was freed, glibc keeps until it is told; no other library knows the word."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def save_memory() -> None:
    """What can be set only while nobody uses it. SQLite takes memory for 20 pages with each file it opens, and most
    tenants have fewer (sqlite.org/c3ref/c_config_covering_index_scan.html, SQLITE_CONFIG_PAGECACHE). glibc gives each
    thread a heap of its own, where what one has freed is of no use to the others (mallopt(3), M_ARENA_MAX)."""
    if sys.platform == "linux" and threading.active_count() == 1:
        with contextlib.suppress(OSError, AttributeError):
            sqlite = ctypes.CDLL(sys.modules["_sqlite3"].__file__)
            sqlite.sqlite3_shutdown()
            sqlite.sqlite3_config(7, None, 0, 0)
            sqlite.sqlite3_initialize()
            ctypes.CDLL(None).mallopt(-8, 1)


# ==== 19. Streams ====================================================================================================
# The broker. An open stream is a socket in the edge's loop and a place in a channel; it takes no thread and keeps no
# Workspace awake. All streams that must show the same thing share a channel: when its topic is published, the Workspace
# is asked once, and the same bytes go to every socket. A reader that is slow gets the latest frame when it can take it,
# not the ones it missed. Every socket belongs to the loop; the threads of the pool only think.

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Held:
    """A socket that the loop holds. rest: what the kernel would not take yet. deadline: when patience ends."""
    __slots__ = ("edge", "socket", "events", "rest", "deadline")
    STUCK_SECONDS = 30.0

    def __init__(self, edge: Edge, socket: socket.socket) -> None:
        self.edge, self.socket, self.events, self.rest, self.deadline = edge, socket, 0, b"", 0.0
        self.listen(READ)
        edge.held.add(self)                          # last: where it could not be registered, nobody holds it

    def listen(self, events: int) -> None:
        selector, before, self.events = self.edge.selector, self.events, events
        if before == events:
            return
        if not events:
            selector.unregister(self.socket)
        else:
            (selector.modify if before else selector.register)(self.socket, events, self.ready)

    def ready(self, events: int) -> None:
        if events & WRITE:
            self.listen(self.events & ~WRITE)
            return self.write(self.rest)
        try:
            data = self.socket.recv(65_536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.read(data)                              # b"": the other side is gone, one way or another

    def offer(self, data: bytes) -> int:
        """How many bytes the kernel took; -1: the other side is gone."""
        try:
            return self.socket.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            return -1

    def write(self, data: bytes) -> None:
        self.wrote(data, self.offer(data))

    def wrote(self, data: bytes, sent: int) -> None:
        if sent < 0:
            return self.close()
        waited, self.rest = bool(self.rest), b""
        if sent == len(data):
            return self.written()
        self.rest = memoryview(data)[sent:]          # all who are slow share the same bytes
        if sent or not waited:
            self.deadline = time.monotonic() + self.STUCK_SECONDS
        self.listen(self.events | WRITE)

    def close(self) -> None:
        if self in self.edge.held:
            self.edge.held.discard(self)
            self.listen(0)
            self.socket.close()


class Channel:
    """The streams that watch one region for one role. Its states: quiet; busy (being asked or delivered); busy and
    stale (published again meanwhile, so it goes round once more). That is all the coalescing there is."""
    __slots__ = ("watch", "streams", "busy", "stale", "frames")

    def __init__(self, watch: Watch) -> None:
        self.watch, self.streams, self.busy, self.stale = watch, set(), False, False
        self.frames = collections.Counter()          # sent, coalesced, dropped: for the console


def viewer_of(live: Response) -> Dict[str, str]:
    """Whom a live answer is for, in the words of a verdict."""
    return {**live.watch.request.headers, "x-account": live.which}


class Stream(Held):
    """An open live answer. It keeps at most the rest of one frame, and the latest after it."""
    __slots__ = ("again", "account", "viewer", "zipped", "channel", "seen", "here", "latest", "beat")
    SEND_BUFFER = 131_072                            # bytes the kernel may hold for a reader; it would take megabytes
    BEAT_SECONDS = (15, 25)                          # spread, or thousands would beat at once

    def __init__(self, edge: Edge, socket_: socket.socket, request: Request, response: Response) -> None:
        cookie = {"cookie": request.headers.get("cookie", "")}
        self.again = Request("GET", request.path, request.query, cookie, wait=LOOK_SECONDS, scheme=request.scheme)
        self.account, self.zipped, self.channel = response.which, accepts_gzip(request), None
        self.viewer = viewer_of(response)            # as the last verdict said
        self.seen, self.here, self.latest = response.rendering.etag, "", {}      # etags shown; what is to be shown next
        self.beat = time.monotonic() + random.uniform(*self.BEAT_SECONDS)
        socket_.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.SEND_BUFFER)
        if sys.platform == "linux":                  # a peer that vanished without a word answers no heartbeat either
            socket_.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * self.STUCK_SECONDS))
        super().__init__(edge, socket_)              # last: other threads look through what the loop holds

    def show_page(self, rendering: Rendering) -> None:
        self.latest, self.seen, self.here = {}, "", ""         # it has the region as well; what waited is older
        self.send("page", rendering)

    def show_here(self, rendering: Rendering) -> None:
        if self.here != rendering.etag:
            self.here = rendering.etag
            self.send("here", rendering)

    def send(self, slot: str, rendering: Rendering) -> None:
        if self.show(slot, rendering):
            self.count("sent")

    def show(self, slot: str, rendering: Rendering) -> bool:
        """Did it go out, rather than wait behind the rest of another? Whoever shows it counts it."""
        if self.rest:
            self.count("coalesced", slot in self.latest)
            self.latest[slot] = rendering
            return False
        data = rendering.zipped if self.zipped else rendering.frame
        if (sent := self.offer(data)) != len(data):
            self.wrote(data, sent)
        return True

    def count(self, what: str, frames: int = 1) -> None:
        self.edge.broker.frames[what] += frames
        if self.channel:
            self.channel.frames[what] += frames

    def written(self) -> None:
        if self.latest:
            latest, self.latest = self.latest, {}
            for slot, rendering in latest.items():
                self.send(slot, rendering)

    def read(self, data: bytes) -> None:
        """A browser says nothing on a stream but goodbye. Whatever else it says is read over."""
        if not data:
            self.close()

    def tick(self, now: float) -> None:
        if self.rest and now > self.deadline:
            self.count("dropped")
            self.close()
        elif not self.rest and now > self.beat:
            self.beat = now + random.uniform(*self.BEAT_SECONDS)
            self.write(chunk(deflated(BEAT) if self.zipped else BEAT))

    def end(self, status: int) -> None:
        """Where it was the gate that closed this stream, not the network: with a last frame and a proper end."""
        if status in (401, 403) and not self.rest:
            frame = goodbye(status)
            self.write(chunk(deflated(frame) if self.zipped else frame) + LAST_CHUNK)
        self.close()

    def close(self) -> None:
        self.edge.broker.leave(self)
        super().close()


CONSOLE = "console"                                  # the id of what is watched and is no object (section 20)


class Broker:
    """Who watches what. The loop changes it; other threads only mark a channel."""
    SOME = 64                                        # streams that get a frame before others have a turn
    ALONE_SECONDS = 30.0                             # for which streams stay open while no Directory can be asked

    def __init__(self, edge: Edge) -> None:
        self.edge, self.lock = edge, threading.Lock()          # guards busy and stale of the channels
        self.channels: Dict[str, Dict[Tuple[str, ...], Channel]] = {}      # by object, then by what is asked of it
        self.version, self.alone = 0, 0.0                      # of the Directory's file; since when it is out of reach
        self.here: Dict[str, Rendering] = {}                   # by object: who watches it, as it was last told
        self.moved = set()                                     # objects whose watchers came or went since then
        self.accounts = collections.Counter()                  # how many streams each has open
        self.frames = {"sent": 0, "coalesced": 0, "dropped": 0}
        self.changed = float("-inf")                           # when somebody's access last did
        self.failed = set()                                    # channels whose object could not be asked

    def published(self, id: str, topic: str) -> None:
        """Called by an object right after a commit. topic "": all of it."""
        if topic.startswith("access:"):
            self.changed = time.monotonic()
            self.regate(topic[7:])
        for channel in [*self.channels.get(id, {}).values()]:
            if topic in ("", channel.watch.topic):
                self.mark(channel)

    def mark(self, channel: Channel) -> None:
        with self.lock:
            busy, channel.busy, channel.stale = channel.busy, True, True
        if not busy:
            self.edge.pool.gather(channel.watch.stub.id, channel, self.refresh_all)

    def refresh_all(self, channels: List[Channel]) -> None:
        """In the pool, where an object is a lane: its regions would wait for each other anyway."""
        for channel in channels:
            guarded(self.refresh, channel)

    def refresh(self, channel: Channel) -> None:
        """Ask the object what its region is now. It wakes for this if it must."""
        channel.stale, rendering = False, None
        streams = [*channel.streams]                 # whoever comes after this has seen as much, or more
        try:
            rendering = channel.watch.stub.fetch(channel.watch.request).rendering
            if any([stream.zipped for stream in streams]):
                rendering.zipped                     # compressed here and not in the loop
        except CRASH:
            self.failed.add(channel)
            raise
        finally:
            self.edge.call(self.deliver, channel, rendering, streams if rendering else [])

    def try_again(self) -> None:
        """In the pool: what their watchers see may be old, and nobody need ever publish again."""
        for channel in [self.failed.pop() for _ in range(len(self.failed))]:
            if channel.streams:
                self.mark(channel)

    def deliver(self, channel: Channel, rendering: Optional[Rendering], streams: List[Stream]) -> None:
        """To a few streams; to the others when the loop has looked after whoever else is there."""
        sent = 0
        for stream in streams[:self.SOME]:
            if stream.seen != rendering.etag and stream.channel is channel:
                stream.seen = rendering.etag
                sent += stream.show("seen", rendering)
        self.frames["sent"] += sent
        channel.frames["sent"] += sent
        if len(streams) > self.SOME:
            return self.edge.call(self.deliver, channel, rendering, streams[self.SOME:])
        with self.lock:
            channel.busy, again = False, channel.stale and channel.streams
        if again:
            self.mark(channel)

    def join(self, stream: Stream, watch: Watch) -> None:
        """And look once more: something may have been published between the first frame and now."""
        stream.channel = self.channels.setdefault(watch.stub.id, {}).setdefault(watch.key, Channel(watch))
        stream.channel.streams.add(stream)
        self.accounts[stream.account] += 1
        watch.stub.watched(1)
        self.moved.add(watch.stub.id)
        self.mark(stream.channel)
        if watch.stub.id in self.here:
            stream.show_here(self.here[watch.stub.id])
        else:
            self.tell_who_is_here()

    def leave(self, stream: Stream) -> None:
        channel, stream.channel = stream.channel, None
        if channel:
            stub = channel.watch.stub
            channel.streams.discard(stream)
            self.accounts[stream.account] -= 1
            stub.watched(-1)
            self.moved.add(stub.id)
            if not channel.streams:                  # the last one out
                del self.channels[stub.id][channel.watch.key]
            if not self.channels[stub.id]:
                del self.channels[stub.id]
                self.here.pop(stub.id, None)

    def tell_who_is_here(self) -> None:
        """Once a second: to those who watch an object of which watchers came or went, the names of all of them."""
        moved, self.moved = self.moved, set()
        for id in moved & {*self.channels} - {self.edge.env.directory.id, CONSOLE}:
            streams = [stream for channel in self.channels[id].values() for stream in channel.streams]
            names = sorted({stream.account for stream in streams})
            some = [{"account": name} for name in names[:20]]
            more = f"and {len(names) - 20} more" if len(names) > 20 else ""
            self.here[id] = Rendering(template("here")(name=some, more=more, watchers=len(streams)), main=False)
            for stream in streams:
                stream.show_here(self.here[id])

    def regate(self, whose: Any) -> None:
        """Have the request of a stream, or of all streams of an account ("": of everybody), go through the worker once
        more. They go one after the other, so that the latest verdict is the last."""
        self.edge.pool.gather("access", whose, self.gate_again)

    def gate_again(self, those: List[Any]) -> None:
        """In the pool."""
        busy = set()                                 # workspaces that were waited for once, in vain
        for held in [*self.edge.held]:
            if type(held) is Stream and not {held, held.viewer["x-account"], ""}.isdisjoint(those):
                guarded(self.ask_again, held, busy)

    def ask_again(self, stream: Stream, busy: set) -> None:
        """The right ones stay, and wake nobody; a changed role sees what it may now; who may no longer look is told."""
        try:
            verdict = admit(stream.again, self.edge.env)
            said, before = dict(verdict.headers) if verdict else {}, stream.viewer
            if said and all([said.get(name, "") == value for name, value in before.items()]):
                return
            if "x-id" in said and said.get("x-node", "") != before["x-node"]:
                return self.edge.call(stream.close)  # the workspace has moved; the client comes back, and goes there
            if said.get("x-id", "") in busy:
                raise WouldBlock
            answer, whole = heed(verdict, stream.again, self.edge.env), None
            if viewer_of(answer) != before:          # the page around the region is for a viewer, too
                around = stream.again._replace(path=stream.again.path.removesuffix("/live"))
                page = heed(verdict, around, self.edge.env)
                whole = Rendering(Html(page.body.decode().replace(f' data-nonce="{NONCE}"', "")), main=False)
            stream.viewer = viewer_of(answer)
            self.edge.call(self.rejoin, stream, answer, whole)
        except Refused as no:
            self.edge.call(stream.end, no.status)
        except WouldBlock:
            busy.add(stream.viewer.get("x-id"))
            self.regate(stream)                      # behind the others
        except CRASH:
            self.edge.call(stream.close)             # its client comes back, and hears more
            raise

    def welcome(self, stream: Stream, watch: Watch) -> None:
        """A new stream. If access changed while its request was on the way, the verdict may be from before."""
        self.join(stream, watch)
        if time.monotonic() < self.changed + SEALED_SECONDS:
            self.regate(stream)

    def rejoin(self, stream: Stream, answer: Response, whole: Optional[Rendering]) -> None:
        if stream.channel:                                     # it is still open
            self.leave(stream)
            stream.account = answer.which            # a masquerade begins, or ends
            stream.show_page(whole) if whole else None
            self.join(stream, answer.watch)

    def look_elsewhere(self) -> None:
        """In the pool: has another process, say the command line, changed the Directory?"""
        directory, before = self.edge.env.directory, self.version
        try:
            with self.edge.env.trace.silence():
                self.version = directory.ask("/_version")
            self.alone = 0.0
        except Refused as no:                        # it is in another process
            log(f"the directory: {no.message}") if not self.alone else None
            self.alone = self.alone or time.monotonic()
            if time.monotonic() > self.alone + self.ALONE_SECONDS:
                self.regate("")                      # who may still look, nobody can say
        if before not in (0, self.version):
            self.published(directory.id, "access:")            # anybody's
            self.published(directory.id, "")
            self.edge.alarms.look()


# ==== 20. Console ====================================================================================================
# The running server, seen from the inside: both planes, each request on its way, each store call as it lands. It is
# asked like an object and streamed like a region; but it has no store: what it shows is read from the objects that run.

class Console:
    id, PAUSE = CONSOLE, 0.25                        # seconds between two frames, however much happens

    def __init__(self, env: Env, broker: Broker) -> None:
        self.env, self.broker, self.trace, self.lock = env, broker, env.trace, threading.Lock()
        self.watched, self.stale, self.due = env.trace.watch, True, False
        self.facts, self.counted, self.micros = {}, 0.0, 0     # what each object told of itself; when, in what time
        self.router = Router([Slice(self.id, (), routes=(
            Route("GET", "/console", ACCOUNT, self.page), Route("GET", "/console/live", ACCOUNT, self.stream),
            Route("POST", "/console/probe", ACCOUNT, self.probe),
            Route("POST", "/console/retry", ACCOUNT, self.retry)))])
        env.trace.news = self.news
        env.workspaces.listeners.append(self.published)

    def answer(self, request: Request) -> Response:
        """For the worker. In the demo everybody may look, else operators."""
        with self.trace.silence():
            me = self.env.directory.ask("/_whoami", "", request.headers, request.scheme)
            if not (self.env.settings.demo or me["operator"]):
                permit(ACCOUNT, Viewer(me["account"]), request.method)
                raise Refused(403, "The console is for operators: account add NAME --operator makes one.")
            return self.router.match(request.method, request.path)[1].run(request, me)

    # -- what makes a frame: news, a second that passed, somebody who came

    def published(self, id: str, topic: str) -> None:
        self.stale = True                            # the next frame counts again

    def news(self) -> None:
        if not self.due:
            self.due = True
            later = threading.Timer(self.PAUSE, self.tell)
            later.daemon = True
            later.start()

    def tell(self) -> None:
        self.due = False
        self.broker.published(self.id, self.id)

    def fetch(self, request: Request) -> Response:
        """For the broker."""
        with self.trace.silence(), self.lock:
            return Response(200, rendering=Rendering(self.region(request.params, not request.params.get("paused"))))

    def stream(self, request: Request, me: Dict[str, Any]) -> Response:
        watch = Watch(self, Request("GET", "/console/live", variant_of(request.params)), self.id)
        return self.fetch(watch.request)._replace(type="text/event-stream", watch=watch, which=me["account"])

    # -- the page, and the probe

    def page(self, request: Request, me: Dict[str, Any], result: Any = "", probed: str = "") -> Response:
        given, account, demo = request.params, me["account"], self.env.settings.demo
        grants = [{"grant": grant, "cell": [{"yes": grant in some, "no": grant not in some} for some in ROLES.values()]}
                  for grant in ROLES["owner"]]
        standing = ", ".join([f"{role} of {name}" for name, role in me["roles"].items()]) or "member of no workspace"
        with self.lock:
            region, names = self.region(given, True), self.names(given)["page"].values()
        body = template("console")(
            region=region, variant=variant_of(given), personas=demo, masquerade=not demo, grant=grants, probed=probed,
            persona=me["personas"], role=[{"role": role, "current": role in me["roles"].values()} for role in ROLES],
            option=[{"name": name} for name in names], result=result or template("console.idle")(),
            standing=f"{account} is {standing}." if account else "Nobody is signed in.",
            who=f"You are {account}" if account else "You are nobody yet")
        return page("Console", body, Viewer(account, "", (), *me["masked"]), template("layout.console")(state=True))

    def probe(self, request: Request, me: Dict[str, Any]) -> Response:
        """Ask for a workspace's page as whoever is signed in, and show how far that came."""
        name, account = str(request.fields().get("workspace", "")).strip()[:63], me["account"]
        names = self.names({"name": name})["named"] if WORKSPACE_NAME.fullmatch(name) else {}
        served, cookie = self.env.workspaces.served, {"cookie": request.headers.get("cookie", "")}
        before = {id: served[id] for id in names}
        asked = Request("GET", f"/w/{name}{self.env.start}", "", cookie, wait=LOOK_SECONDS, scheme=request.scheme)
        trip = self.trace.probe(asked, lambda request: worker(request, self.env))
        verdict = trip.legs[0].status if trip.legs else trip.status
        said = {200: f"The gate lets {account} into {name}.",
                401: f"Refused at the gate: nobody is signed in, so {name} is closed.",
                403: f"Refused at the gate: {account} has no access to {name}."}.get(verdict, f"No verdict: {verdict}.")
        proof = "No workspace was contacted; only these store calls were made:"
        if verdict == 200:
            how = "It was contacted" if trip.legs[1:] else "It is busy just now, and would be contacted"
            proof = f"{how} with the verdict: role {{x-role}}, grants {{x-grants}}.".format(**trip.legs[0].said)
        result = template("console.probe")(
            kind="ok" if verdict == 200 else "refused", verdict=f"{verdict} · {said}",
            proof="".join([f"Requests to {name}: {before[id]} before, {served[id]} after. " for id in names]) + proof,
            call=[{**call._asdict(), "object": self.label(call.object, names)} for call in trip.calls])
        if request.datastar:
            return Response(200, patch_elements(result) + patch_signals({"toast": said}), "text/event-stream")
        return self.page(request, me, result, name)

    def retry(self, request: Request, me: Dict[str, Any]) -> Response:
        """The jobs that a workspace gave up begin anew."""
        permit(ACCOUNT, Viewer(me["account"], read_only=me["masked"][1]), request.method)
        for id in self.names({"name": str(request.fields().get("workspace", ""))})["named"]:
            self.env.workspaces.get(id).fetch(Request("POST", "/_retry", wait=LOOK_SECONDS))
        self.stale = True
        return Response(204) if request.datastar else see_other("/console")

    # -- the region

    def names(self, params: Dict[str, str]) -> Dict[str, Any]:
        """Of the workspaces on a page of the console, by id, all in order of their names."""
        return self.env.directory.ask("/_names", urllib.parse.urlencode(params))

    def label(self, id: str, names: Dict[str, str]) -> str:
        return {self.env.directory.id: "Directory", **names}.get(id, id[:8])

    def count_all(self, ids: Iterable[str]) -> None:
        """A fan-out: one request to each object. Who slept goes back to sleep."""
        if self.facts.keys() == {*ids} and not (self.stale and time.time() > self.counted + 1):
            return
        self.stale, started, facts = False, time.perf_counter(), {}
        for id in ids:
            slept = id not in self.env.workspaces.objects
            facts[id] = facts_of(self.env.workspaces.get(id))
            self.stale |= facts[id]["count"] == "busy"         # then it is asked again
            woken = self.env.workspaces.objects.get(id)
            if slept and woken:
                woken.sleep(time.monotonic())
        self.counted, self.micros, self.facts = time.time(), micros(time.perf_counter() - started), facts

    def region(self, params: Dict[str, str], with_feed: bool) -> Html:
        found = self.names(params)
        names = dict(itertools.islice(found["page"].items(), NAMES_A_PAGE))
        self.count_all(names)
        rows = [self.object_row(self.env.directory, "Directory", found)]
        rows += [self.object_row(self.env.workspaces.get(id), name, self.facts[id]) for id, name in names.items()]
        dead = [{"name": name, "job": self.facts[id]["failed"]} for id, name in names.items()
                if self.facts[id].get("failed")]
        return template("console.region")(
            object=rows, all=found["all"], asked=len(names), awake=len(self.env.workspaces.objects), dead=dead,
            micros=self.micros, more=len(found["page"]) > NAMES_A_PAGE, after=max(names.values(), default=""),
            feed=self.feed(params, names) if with_feed else "", **self.drawing(names), **self.streams(names))

    def object_row(self, stub: Stub, name: str, facts: Dict[str, Any]) -> Dict[str, Any]:
        id, namespace = stub
        file, one = namespace.path(id), namespace.objects.get(id)
        size = sum([part.stat().st_size for part in with_wal(file)])
        streams = sum([len(channel.streams) for channel in [*self.broker.channels.get(id, {}).values()]])
        return {"id": id, "name": name, "query": variant_of({"object": id}), "size": -(-size // 1024),
                "file": file.name if len(file.name) < 20 else f"{file.name[:6]}….db",
                "state": f"awake since {clock(one.awake_since)}" if one and one.store else "asleep",
                "schema": facts.get("schema", "?"), "streams": streams, "served": namespace.served[id],
                "count": facts.get("count", ""),
                "jobs": ", ".join([f"{facts[kind]} {kind}" for kind in ("waiting", "given up") if facts.get(kind)])}

    def drawing(self, names: Dict[str, str]) -> Dict[str, Any]:
        """The planes, and the path of each request that came of late. The last place is for all other workspaces."""
        some = [*names.items()][:4] + ([("", "others")] if len(names) > 4 else [])
        places, awake = {id: (450 + 98 * index, 232) for index, (id, _) in enumerate(some)}, self.env.workspaces.objects
        nodes = [{"index": index, "name": name if len(name) < 12 else f"{name[:10]}…", "middle": places[id][0],
                  "x": places[id][0] - 46, "state": "awake" if id in awake else "asleep" if id else ""}
                 for index, (id, name) in enumerate(some)]
        trips = [self.trip_row(trip, names, places) for trip in [*self.trace.trips][::-1]]
        return {"node": nodes, "path": trips[2::-1], "trip": trips, "none": not trips,
                "wires": "".join([f"M270 160L{x} {y}" for x, y in places.values()])}

    def way(self, trip: Trip, places: Dict[str, Tuple[int, int]]) -> List[Tuple[int, int]]:
        browser, worker, directory = (70, 160), (270, 160), (560, 76)
        if trip.status in (401, 403) and len(trip.legs) == 1:
            return [browser, worker, (462, 104)]
        others = places.get("", worker)
        stops = [places.get(leg.id, others) if leg.kind == "workspace" else directory for leg in trip.legs]
        return [browser, worker, *[point for stop in stops for point in (stop, worker)], browser]

    def trip_row(self, trip: Trip, names: Dict[str, str], places: Dict[str, Tuple[int, int]]) -> Dict[str, Any]:
        legs = [{"object": "gate" if leg.kind == "gate" else self.label(leg.id, names), "status": leg.status,
                 "micros": leg.micros, "how": "from the cache" if leg.kind == "workspace" and not leg.calls else
                 f"{leg.calls or 'no'} store call{'s' * (leg.calls != 1)}"} for leg in trip.legs]
        return {"number": trip.number, "method": trip.method, "path": trip.path[:80], "status": trip.status,
                "size": trip.size, "leg": legs, "kind": "refused" if trip.status in (401, 403) else "ok",
                "points": " ".join([f"{x},{y}" for x, y in self.way(trip, places)]),
                "stop": trip.legs[-1].kind == "gate" and trip.legs[-1].status != 200}

    def streams(self, names: Dict[str, str]) -> Dict[str, Any]:
        channels = [channel for of_object in [*self.broker.channels.values()] for channel in [*of_object.values()]]
        rows = [{"object": self.label(one.watch.stub.id, names), "path": one.watch.request.path,
                 "role": one.watch.request.headers.get("x-role", ""), "open": len(one.streams),
                 **dict.fromkeys(self.broker.frames, 0), **one.frames} for one in channels[:50]]
        return {"stream": rows, "open": sum([len(channel.streams) for channel in channels]), **self.broker.frames}

    def feed(self, params: Dict[str, str], names: Dict[str, str]) -> Html:
        trace, object, paused = self.trace, params.get("object", ""), params.get("paused") == "1"
        calls = [call for call in [*trace.calls] if object in ("", call.object)]
        trace.shown = trace.noted
        lines = [{**call._asdict(), "time": clock(call.at, 3), "object": self.label(call.object, names),
                  "rows": "" if call.rows < 0 else call.rows} for call in reversed(calls)]
        other, whole = variant_of({**params, "paused": "" if paused else "1"}), variant_of({**params, "object": ""})
        links = [{"text": "Go on" if paused else "Pause", "query": other}, {"text": "All objects", "query": whole}]
        whose = f" of {self.label(object, names)}" if object else ""
        return template("console.feed")(line=lines, link=links if object else links[:1], noted=trace.noted,
                                        missed=trace.dropped, whose=whose)


def variant_of(params: Dict[str, str]) -> str:
    """What the console's region heeds: the workspaces after a name, the store calls of one object, or none of them."""
    return heeded(params, after=WORKSPACE_NAME.pattern, object="directory|[0-9a-f]{64}", paused="1")


def clock(at: float, digits: int = 0) -> str:
    """The time of day of a time stamp, with digits of a second."""
    return time.strftime("%H:%M:%S", time.localtime(at)) + (f"{at % 1:.9f}"[1:digits + 2] if digits else "")


# ==== 21. Snapshots ==================================================================================================
# Databases are copied by SQLite's own backup, which is consistent while others write, and a copy gets its final name
# when it is whole and checked. A snapshot copies the whole deployment; what did not change since the last is linked.

def stamp() -> str:
    """Now, in UTC and to the millisecond: such names sort by age, and two in one second are two."""
    now = time.time_ns() // 1_000_000
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime(now // 1000)) + f"-{now % 1000:03d}"


@contextlib.contextmanager
def in_the_making(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Where a file, or a folder, is made that will be target. What breaks off is removed, or a full disk would be
    fuller after each try."""
    def remove() -> None:
        for left in (part, part.with_name(f"{part.name}-journal")):
            left.unlink() if left.is_file() else shutil.rmtree(left, ignore_errors=True)
    part = beside(target, "making")                  # nobody else's name
    remove()
    try:
        yield part
    except BaseException:
        remove()
        raise


def copy_database(source: pathlib.Path, target: pathlib.Path) -> int:
    """The number of rows in it. sqlite3.DatabaseError: source is damaged; then there is no target."""
    with in_the_making(target) as part:
        with contextlib.closing(Store(source)) as original, contextlib.closing(sqlite3.connect(part)) as copy:
            original.db.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")
            rows = verified(copy)
        put_in_place(part, target)
    return rows


def verified(db: sqlite3.Connection) -> int:
    """The number of rows. sqlite3.DatabaseError: what SQLite's own check finds."""
    found = [row[0] for row in db.execute("PRAGMA quick_check")]
    if found != ["ok"]:
        raise sqlite3.DatabaseError(f"damaged: {found[0]}")
    tables = db.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'").fetchall()
    return sum([db.execute(f'SELECT count(*) FROM "{table}"').fetchone()[0] for table, in tables])


def take_away(path: pathlib.Path, copy: Optional[pathlib.Path] = None) -> int:
    """Remove a database that others may have open: they see that it is gone before their next command. The number of
    rows in the copy."""
    with contextlib.closing(Store(path)) as store:
        store.begin()                                # commands that are on their way finish first, and are in the copy
        rows = copy_database(path, copy) if copy else 0
        path.unlink()
    for tail in ("-wal", "-shm"):
        path.with_name(path.name + tail).unlink(missing_ok=True)
    return rows


def rows_of(path: pathlib.Path) -> int:
    """The number of rows in a database that is whole. sqlite3.DatabaseError: it is not, or there is none."""
    identity(path)
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
        return verified(db)


def with_progress(all: Sequence[Any], what: str) -> Iterator[Any]:
    """One after the other, counted for somebody who waits at a terminal; silent in a pipe."""
    for number, one in enumerate(all, 1):
        yield one
        if sys.stderr.isatty():
            end = "\n" if number == len(all) else ""
            print(f"\r{what} {number} of {len(all)}", end=end, file=sys.stderr, flush=True)


def ids_in(settings: Settings, directory: pathlib.Path) -> List[str]:
    """Of the workspaces whose files are here: those that a Directory names or, on a node, all."""
    if settings.single:
        return []
    if not directory.exists():
        return [path.stem for path in settings.workspaces.glob("*.db")]
    with contextlib.closing(Store(directory)) as store:
        return [row["id"] for row in store.query("SELECT id FROM workspaces WHERE name IS NOT NULL AND NOT moving AND "
                                                 "node = ''")]


def copied(settings: Settings, name: str, part: pathlib.Path, before: Optional[pathlib.Path],
           last: Optional[Dict[str, Any]]) -> Tuple[Optional[Dict[str, Any]], str]:
    """A workspace's file into a snapshot; where it did not change, or can't be read, as it was in the one before. What
    the manifest says of it, and what is wrong with it. sqlite3.Error: the disk is full."""
    source, fault = settings.data / name, ""
    seen = repr([(file.st_mtime_ns, file.st_size) for file in map(os.stat, with_wal(source))])
    try:
        if not last or last["seen"] != seen:
            return {"rows": copy_database(source, part / name), "seen": seen}, ""
    except sqlite3.DatabaseError as error:
        if "disk is full" in str(error):
            raise
        fault = f"{StorageFault(source, error)}{'; here it is as it was in the snapshot before' if last else ''}"
    if last:
        os.link(before / name, part / name)
    return last, fault


def snapshot(settings: Settings, target: pathlib.Path,
             before: Optional[pathlib.Path] = None) -> Tuple[Dict[str, Any], List[str]]:
    """A folder with the whole deployment, which gets its name when it is complete. Returns what it holds, by id, and
    what is wrong with files that can't be copied: the others are not kept waiting. The Directory is copied first, so
    that each workspace that it names is there; a node has none."""
    held, faults, known = {}, [], json.loads((before / "manifest.json").read_text()) if before else {}
    with in_the_making(target) as part:
        (part / "workspaces").mkdir(parents=True)
        if settings.directory_file.exists():
            held["directory"] = {"rows": copy_database(settings.directory_file, part / "directory.db"), "seen": ""}
        for id in with_progress(ids_in(settings, part / "directory.db"), "copied"):
            about, fault = copied(settings, f"workspaces/{id}.db", part, before, known.get(id))
            held.update({id: about} if about else {})
            faults += [fault] if fault else []
        shutil.copy2(settings.key_file, part / "secret.key")
        (part / "manifest.json").write_text(json.dumps(held))
        part.rename(target)
    return held, faults


def snapshot_again(settings: Settings) -> None:
    """The next one in data/backups; the oldest go."""
    folder = settings.data / "backups"
    folder.mkdir(exist_ok=True)
    kept = sorted([manifest.parent for manifest in folder.glob("*/manifest.json")])
    _, faults = snapshot(settings, folder / stamp(), kept[-1] if kept else None)
    for fault in faults:
        log(f"the snapshot lacks what can't be read: {fault}")
    for old in kept[:max(0, len(kept) + 1 - settings.keep)]:
        shutil.rmtree(old)


# ==== 22. Planes =====================================================================================================
# One process goes far. Past one machine the same file runs as a directory and as several nodes: a proxy asks the gate,
# and brings its verdict to the node where the Directory placed the workspace. What crosses the network is sealed, so a
# node believes the verdict and not who brings it; and it speaks to the Directory as to any object, by fetch.

DOWN: Dict[str, float] = {}                          # addresses that did not answer, and until when nobody asks them


def unreachable(address: str, why: Any) -> Refused:
    return Refused(503, f"{address} can't be reached ({why}). Try again in a minute.", (("retry-after", "30"),))


def errand(settings: Settings, address: str, request: Request, patience: float = 5.0) -> Response:
    """Send request to another process of this deployment. Refused(503): it can't be reached in so many seconds; any
    other: as it said."""
    if time.monotonic() < DOWN.get(address, 0.0):
        raise unreachable(address, "it did not answer a moment ago")
    target = urllib.parse.quote(request.path) + (f"?{request.query}" if request.query else "")
    seal = seal_of(errand_parts(request, request.scheme), keys_now(settings)[-1], int(time.time()) + SEALED_SECONDS)
    headers = {"host": "localhost", "cookie": request.headers.get("cookie", ""), "x-forwarded-proto": request.scheme,
               "x-verdict": seal}
    try:
        with contextlib.closing(http.client.HTTPConnection(address, timeout=patience)) as link:
            link.request(request.method, target, request.body, headers)
            answer = link.getresponse()
            body = answer.read()
    except (OSError, http.client.HTTPException) as error:
        DOWN[address] = time.monotonic() + 2
        raise unreachable(address, error) from error
    said = tuple([(name.lower(), value) for name, value in answer.getheaders() if name.lower() in TRUSTED])
    return Response(answer.status, body, answer.headers.get("content-type", ""), said)


def errand_parts(request: Request, scheme: str) -> Tuple[str, ...]:
    digest = hashlib.sha256(request.body).hexdigest()
    return request.method, request.path, request.query, request.headers.get("cookie", ""), scheme, digest


def is_errand(request: Request, settings: Settings) -> bool:
    parts = errand_parts(request, request.headers.get("x-forwarded-proto", ""))
    return request.path.startswith("/_") and believed(request.headers.get("x-verdict", ""), parts, keys_now(settings))


keys_of = functools.lru_cache(maxsize=4)(lambda path, mtime: load_keys(path))


def keys_now(settings: Settings) -> Tuple[bytes, ...]:
    return keys_of(settings.key_file, settings.key_file.stat().st_mtime_ns)


PATIENCE = {"aside": 600.0, "copy": 600.0, "adopt": 600.0,     # seconds: they copy, or read, all of a file
            "_counts": 1.0}                          # a page waits for it, in one of the few threads


def ask_node(settings: Settings, node: str, id: str, what: str, method: str = "POST", query: str = "",
             body: bytes = b"") -> Any:
    """What the errand returned there. Refused(503): the node can't be reached, or said no."""
    if not node:
        raise Refused(503, "This workspace is on no node yet. node move brings it to one.", (("retry-after", "60"),))
    patience = PATIENCE.get(what, 5.0)
    answer = errand(settings, node, Request(method, f"/_node/{id}/{what}", query, body=body), patience)
    if answer.status == 403:
        raise Refused(503, f"{node}: {STRANGERS}")
    if answer.status != 200:
        raise Refused(503, f"{node} answered {answer.status}: {answer.body.decode('utf-8', 'replace').strip()}")
    return answer.body if what == "piece" else json.loads(answer.body)


class Elsewhere:
    """An object that lives in another process, at address(id); in a namespace it stands where one of ours would."""
    torn, store, verdicts = False, None, {}

    def __init__(self, id: str, namespace: Namespace, settings: Settings, address: Callable[[str], str]) -> None:
        self.id, self.namespace, self.settings, self.address = id, namespace, settings, address

    def fetch(self, request: Request) -> Response:
        if not request.wait:
            raise WouldBlock
        if self.namespace.kind == "directory":
            return errand(self.settings, self.address(self.id), request)
        if not request.path.startswith("/_"):
            raise Refused(421, "Workspaces are served by the nodes. Ask again through the proxy in front.")
        return as_json(ask_node(self.settings, self.address(self.id), self.id, request.path[1:], request.method))

    def sleep(self, unused_since: float) -> None:
        self.namespace.forget(self)


def directory_front(request: Request, env: Env) -> Response:
    """The worker of a directory alone. A workspace that somebody founded is there when its node has made the file."""
    if re.match("/_(version|whoami|gate/.*)$", request.path) and is_errand(request, env.settings):
        return env.directory.fetch(request._replace(scheme=request.headers["x-forwarded-proto"]))
    response = worker(request, env)
    if request.method == "POST" and request.path == "/workspaces" and response.which:
        open_on_node(env.settings, response.which)
    return response


def node_admit(request: Request, env: Env) -> Response:
    """The verdict that a proxy brought from the gate. It holds for this node, for the workspace that the path names,
    and for a short time; when it is not fresh, for the request was long on its way, the gate is asked again."""
    said = {name: request.headers[name] for name in VERDICT if request.headers.get(name)}
    seal, parts = request.headers.get("x-verdict", ""), [said.get(name, "") for name in VERDICT]
    theirs = request.path.split("/")[:3] == ["", "w", said.get("x-workspace")]
    if not theirs or not believed(seal, parts, keys_now(env.settings)):
        raise Refused(403, "This node takes what a proxy brings with the gate's verdict. Ask through the proxy.")
    refuse_foreign(request)
    age = time.time() + SEALED_SECONDS - int(seal.partition(".")[0])         # in seconds, if the clocks agree
    verdict = Response(200, headers=tuple(said.items())) if age < FRESH_SECONDS else admit(request, env)
    if verdict.status == 200 and dict(verdict.headers).get("x-node") != env.settings.node_name:
        raise Refused(421, "This workspace lives on another node. Ask again through the proxy.")
    return verdict


def node_front(request: Request, env: Env) -> Response:
    """The worker of a node: the proxy asked the gate and brought the verdict. Without one nothing here is contacted."""
    if request.path.startswith("/_node/") and is_errand(request, env.settings):
        return node_errand(request, env)
    return heed(node_admit(request, env), stripped(request), env)


# -- errands about a workspace's file, done by whoever has it. Each can be asked twice, for an answer may be lost.

PIECE = 48 * 1024                                    # bytes of a file to a request


def set_aside(path: pathlib.Path, **_: Any) -> int:
    """Nobody writes to it any more, and whoever did so before has finished. The number of rows."""
    return take_away(path, beside(path, "moved")) if path.exists() else rows_of(beside(path, "moved"))


def bring_back(path: pathlib.Path, env: Env, **_: Any) -> int:
    """Undo that. What is in its place was never set aside, or came later."""
    if not path.exists():
        os.replace(beside(path, "moved"), path)
    env.workspaces.alarm(path.stem, time.time())
    return rows_of(path)


def piece_at(path: pathlib.Path, at: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(at)
        return file.read(PIECE)


def read_piece(path: pathlib.Path, params: Dict[str, str], **_: Any) -> bytes:
    return piece_at(beside(path, "copy" if params.get("of") == "copy" else "moved"), int(params["at"]))


def write_piece(path: pathlib.Path, params: Dict[str, str], body: bytes, **_: Any) -> None:
    at = int(params["at"])
    with open(beside(path, "part"), "r+b" if at else "wb") as file:
        file.seek(at)
        file.write(body)


def take_in(path: pathlib.Path, env: Env, **_: Any) -> int:
    """What came in pieces takes its place, if it is whole. The number of rows in it. Its jobs do not run yet."""
    part = beside(path, "part")
    rows = rows_of(part if part.exists() else path)
    if part.exists():
        env.workspaces.looked.add(path.stem)
        put_in_place(part, path)
        beside(path, "moved").unlink(missing_ok=True)                  # it left, and is back
    return rows


def drop(path: pathlib.Path, **_: Any) -> None:
    take_away(path) if path.exists() else None
    forget_copies(path)


def forget_copies(path: pathlib.Path, **_: Any) -> None:
    for tail in ("moved", "copy", "part"):
        beside(path, tail).unlink(missing_ok=True)


ERRANDS: Dict[Tuple[str, str], Callable[..., Any]] = {
    ("GET", "has"): lambda path, **_: path.exists() or beside(path, "moved").exists(),
    ("POST", "aside"): set_aside, ("POST", "back"): bring_back,
    ("POST", "copy"): lambda path, **_: copy_database(path, beside(path, "copy")), ("GET", "piece"): read_piece,
    ("POST", "piece"): write_piece, ("POST", "adopt"): take_in, ("POST", "drop"): drop,
    ("POST", "forget"): forget_copies,
    ("POST", "create"): lambda path, env, **_: env.workspaces.create(path.stem),
    ("POST", "ring"): lambda path, env, **_: env.workspaces.alarm(path.stem, time.time())}


def do_errand(env: Env, id: str, what: str, method: str = "POST", query: str = "", body: bytes = b"") -> Any:
    """What it returned. Refused(404): there is no such errand; StorageFault: the file is no good."""
    do, path = ERRANDS.get((method, what)), env.workspaces.path(id)
    if do is None:
        raise Refused(*NOTHING_HERE)
    try:
        return do(path, env=env, params=dict(urllib.parse.parse_qsl(query)), body=body)
    except (sqlite3.Error, OSError) as error:
        raise StorageFault(path, error) from error


def node_errand(request: Request, env: Env) -> Response:
    """What the directory has a node do. The answer is JSON, or a piece of a file."""
    if not request.wait:
        raise WouldBlock
    id, what = request.path.split("/")[2:4]
    if what == "_counts":
        return as_json(facts_of(env.workspaces.get(id)))
    if what == "_retry":
        return env.workspaces.get(id).fetch(Request("POST", "/_retry", wait=LOOK_SECONDS))
    said = do_errand(env, id, what, request.method, request.query, request.body)
    body = said if isinstance(said, bytes) else json.dumps(said).encode()
    return Response(200, body, "application/octet-stream")


def keeper(settings: Settings, env: Env, id: str, node: str) -> Callable[..., Any]:
    """Does errands with a workspace's file, wherever that is: keeper(...)(what, method, query, body)."""
    return functools.partial(ask_node, settings, node, id) if node else functools.partial(do_errand, env, id)


def send_pieces(ask: Callable[..., Any], piece_from: Callable[[int], bytes]) -> None:
    """piece_from(at): what of the file begins there, empty at its end."""
    at = 0
    while (piece := piece_from(at)):
        ask("piece", "POST", f"at={at}", piece)
        at += len(piece)


def open_on_node(settings: Settings, name: str, source: Optional[pathlib.Path] = None) -> None:
    """Have a new workspace's node make its file, or take source in; then let people in. Refused: it did not; the name
    is free again."""
    with contextlib.closing(Store(settings.directory_file)) as store:
        row = store.one("SELECT id, node FROM workspaces WHERE name = ? AND moving AND node <> ''", name)
        if row is None:
            return
        ask = functools.partial(ask_node, settings, row["node"], row["id"])
        try:
            if source:
                send_pieces(ask, functools.partial(piece_at, source))
            ask("adopt" if source else "create")
        except BaseException:
            with store.tx():
                store.exec("DELETE FROM memberships WHERE workspace = ?", row["id"])
                store.exec("UPDATE workspaces SET name = NULL WHERE id = ?", row["id"])
            raise
        store.exec("UPDATE workspaces SET moving = 0 WHERE id = ?", row["id"])


# ==== 23. Figures ====================================================================================================
# What a server did, for whoever runs it: a line in the access log for each answer, and numbers for Prometheus.

def labelled(name: str, figures: Dict[Any, int]) -> Dict[str, int]:
    return {f'{{{name}="{key}"}}': n for key, n in sorted(figures.items())}


class Figures:
    BOUNDS = (.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5)     # seconds, of the histogram
    TYPE = "text/plain; version=0.0.4; charset=utf-8"          # Prometheus' text format

    def __init__(self, log: str) -> None:
        """log: common, json or off."""
        self.log, self.lock, self.date = log, threading.Lock(), ""
        self.statuses, self.durations, self.seconds = collections.Counter(), [0] * (len(self.BOUNDS) + 1), 0.0
        self.accesses, self.scribe = collections.deque(maxlen=100_000), Pool(1)

    def count(self, method: str, request: Request, response: Response, seconds: float) -> None:
        with self.lock:
            self.statuses[response.status] += 1
            self.durations[bisect.bisect_left(self.BOUNDS, seconds)] += 1
            self.seconds += seconds
        if self.log != "off":
            line = self.line(method, request, response.status, response.size, seconds)
            self.accesses.append(line)               # only now: flush() may just have exchanged them

    def line(self, method: str, request: Request, status: int, size: int, seconds: float) -> str:
        """One access: the common log format and the seconds it took, or JSON. Without the query, which users typed."""
        path = (request.path if PLAIN_PATH.fullmatch(request.path) else urllib.parse.quote(request.path))[:500]
        if self.log == "json":
            return json.dumps({"time": round(time.time(), 3), "peer": request.peer, "method": method, "path": path,
                               "status": status, "bytes": size, "seconds": round(seconds, 6)})
        return f'{request.peer or "-"} - - [{self.date}] "{method} {path} HTTP/1.1" {status} {size} {seconds:.6f}'

    def write(self, lines: Iterable[str]) -> None:
        """In a thread of its own, so that a reader of the log who is slow, or gone, keeps nobody waiting."""
        with contextlib.suppress(OSError, ValueError):
            print("\n".join(lines), flush=True)

    def flush(self) -> None:
        """Once a second."""
        self.date = time.strftime("%d/%b/%Y:%H:%M:%S %z")
        lines, self.accesses = self.accesses, collections.deque(maxlen=self.accesses.maxlen)
        if lines and len(self.scribe.jobs) < 10:
            self.scribe.put(self.write, lines)

    def text(self, *more: Tuple[str, str, Dict[str, float]]) -> str:
        """Families of figures, each with its name, its kind and its samples: these, and more."""
        with self.lock:
            counted = [*itertools.accumulate(self.durations)]
            buckets = {f'_bucket{{le="{bound}"}}': n for bound, n in zip((*self.BOUNDS, "+Inf"), counted)}
            own = (("requests_total", "counter", labelled("status", self.statuses)),
                   ("request_seconds", "histogram", {**buckets, "_sum": self.seconds, "_count": counted[-1]}))
        lines = []
        for name, kind, samples in (*own, *more):
            lines += [f"# TYPE orion_{name} {kind}\n", *[f"orion_{name}{end} {n}\n" for end, n in samples.items()]]
        return "".join(lines)

    def close(self) -> None:
        self.flush()
        self.scribe.close(0.5)


# ==== 24. Edge =======================================================================================================
# The only place that knows sockets. http.server's ThreadingHTTPServer starts a thread for each connection and keeps it
# for the connection's life; here that one policy is exchanged. Every socket is held by one loop: idle, sending slowly,
# reading slowly or streaming, it costs a buffer and no thread. What is ready, a page that was rendered before, leaves
# from the loop at once; whatever must read, write or wake goes to a small fixed set of threads.

LANE = re.compile(r"(?:(?i:https?)://[^/?]*)?(/w/[^/?]+)/(?!members\b)")


def lane_of(target: str) -> str:
    """Where a request for a workspace's own object waits, however its address is written; "": it waits for another."""
    found = LANE.match(urllib.parse.unquote(target))
    return found[1] if found else ""


class Connection(Held):
    """A connection that is not, or not yet, a stream. busy: a request of it is being answered. begun: a part of one is
    here. spare: bytes that are read over before it closes."""
    __slots__ = ("peer", "buffer", "reader", "busy", "begun", "ended", "keep", "spare", "started")
    REQUEST_SECONDS, IDLE_SECONDS = 10.0, 75.0       # idle: longer than the 60 s for which proxies keep a connection
    LINGER_SECONDS, LINGER_BYTES = 1.0, 65_536

    def __init__(self, socket: socket.socket, address: Tuple, edge: Edge) -> None:
        super().__init__(edge, socket)
        self.peer, self.buffer, self.spare = address[0], bytearray(), 0
        self.reader = read_requests(self.buffer)
        self.busy = self.begun = self.ended = False
        self.keep, self.deadline = True, time.monotonic() + self.IDLE_SECONDS

    def read(self, data: bytes) -> None:
        self.ended = not data
        if self.spare:
            self.spare -= min(self.spare, len(data))
            return None if data and self.spare else self.close()
        self.buffer += data
        if not self.busy:
            return self.advance()
        if self.ended or len(self.buffer) > HEAD_LIMIT + BODY_LIMIT:
            self.listen(0)                           # read on when the present request is answered

    def advance(self) -> None:
        """Take the next request up, if it is complete."""
        some = bool(self.buffer)
        try:
            step = next(self.reader)
        except Refused as no:
            return self.refuse(no)
        if step:
            self.busy, self.begun = True, False
            return self.take_up(step) if step.body is not None else self.edge.pool.put(self.attempt, self.foresee, step)
        if self.ended:
            return self.close()
        if some and not self.begun:                  # the deadline is for all of it; a byte now and then moves nothing
            self.begun, self.deadline = True, time.monotonic() + self.REQUEST_SECONDS

    def foresee(self, reading: Reading) -> None:
        """In the pool: who asks first (RFC 9110, 10.1.1) hears the gate's no before sending a body in vain."""
        try:
            request = self.edge.request(reading, self.peer)
            verdict = self.edge.env.admit(request, self.edge.env)
            if verdict and verdict.status != 200:
                refusal(request, verdict)
            self.edge.call(self.go_on)
        except Refused as no:
            self.edge.call(self.refuse, no)
        except StorageFault as fault:
            log(f"storage: {fault}")
            self.edge.call(self.refuse, fault.refusal)

    def go_on(self) -> None:
        self.busy, self.begun, self.deadline = False, True, time.monotonic() + self.REQUEST_SECONDS
        with contextlib.suppress(OSError):
            self.socket.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.resume()

    def resume(self) -> None:
        """What was sent ahead has its turn when the others had theirs."""
        if not self.busy and self in self.edge.held:
            self.listen(0 if self.ended else READ)
            self.advance()

    def take_up(self, reading: Reading) -> None:
        """At once what is ready; else in the pool. A workspace is a lane there: its requests would wait for each other
        anyway, its commands can share a commit, and however many there are, the other threads are for the others. While
        somebody watches, half of them do, and then the frames have their turn. Who was never let in has a lane apart:
        how long strangers wait for their no must not tell them that there is such a workspace, and that it is busy."""
        self.started = time.perf_counter()
        try:
            answer = self.edge.answer(reading, self.peer, wait=0) if reading.method in SAFE else None
        except WouldBlock:
            answer = None
        if answer:
            return self.reply(reading, *answer)
        if (lane := lane_of(reading.target)):
            lane = lane if self.pass_of(lane, reading) in self.edge.insiders else f"{self.peer} {lane}"
            return self.edge.pool.gather(lane, (self, reading), self.edge.answer_all, halve=self.edge.broker.channels)
        self.edge.pool.put(self.attempt, self.think, reading)

    def pass_of(self, lane: str, reading: Reading) -> int:
        """Who asks where: what the edge remembers of whom was let in."""
        return hash((lane, reading.headers.get("cookie")))

    def attempt(self, work: Callable[..., None], *args: Any) -> None:
        """In the pool. Where not even a refusal could be made of it, the connection is closed."""
        try:
            work(*args)
        except CRASH:
            self.edge.call(self.close)
            raise

    def think(self, reading: Reading) -> None:
        self.answered(reading, *self.edge.answer(reading, self.peer))

    def answered(self, reading: Reading, request: Request, response: Response) -> None:
        """In the pool. Where there is time the answer leaves from here, which spares waking the loop. It is the loop's
        when others are in line, when it becomes a stream, does not fit, or is the connection's last."""
        if response.status < 400 and reading.method not in SAFE:       # to a GET, a no can be a 200 (section 15)
            self.edge.insiders.add(self.pass_of(lane_of(reading.target), reading))
        if response.watch and accepts_gzip(request):
            response.rendering.zipped                # compressed here and not in the loop
        if response.watch or self.edge.pool.jobs:
            return self.edge.call(self.reply, reading, request, response)
        data = self.encoded(reading, request, response)
        sent = self.offer(data)
        self.written() if sent == len(data) and self.keep else self.edge.call(self.wrote, data, sent)

    def encoded(self, reading: Reading, request: Request, response: Response) -> bytes:
        self.edge.figures.count(reading.method, request, response, time.perf_counter() - self.started)
        self.keep = reading.keep and not self.edge.stopping and response.status != 421 and reading.method != "CONNECT"
        return encode(request, response, self.keep, reading.method == "HEAD", self.edge.date)

    def reply(self, reading: Reading, request: Request, response: Response) -> None:
        if response.watch:
            response = self.edge.stream_or_refusal(reading, request, response)
        data = self.encoded(reading, request, response)
        if response.watch is None or reading.method == "HEAD" or self.ended:
            return self.write(data)
        self.edge.held.discard(self)                 # from here on it is a stream
        self.listen(0)
        stream = Stream(self.edge, self.socket, request, response)
        stream.write(data)
        if stream in self.edge.held:
            self.edge.broker.welcome(stream, response.watch)

    def written(self) -> None:
        """The answer has left: go on, or close so that who is still sending can read it (RFC 9112, 9.6)."""
        self.deadline = time.monotonic() + (self.IDLE_SECONDS if self.keep else self.LINGER_SECONDS)
        if self.keep:                                # then this may be the pool; what came meanwhile, the loop left
            self.busy = False
            return self.edge.call(self.resume) if self.buffer or self.ended else None
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
        self.spare = self.LINGER_BYTES
        self.close() if self.ended else self.listen(READ)

    def refuse(self, no: Refused) -> None:
        """One answer, and nothing behind it is read."""
        self.busy, self.begun, self.keep = True, False, False
        request = Request("GET", "/", peer=self.peer)
        response = refused(request, no)
        self.edge.figures.count("-", request, response, 0.0)
        self.write(encode(request, response, False, False, self.edge.date))

    def tick(self, now: float) -> None:
        if (self.busy and not self.rest and not self.spare) or now < self.deadline:      # busy first: threads end it
            return
        self.refuse(Refused(408, "The request took too long to arrive. Send it again.")) if self.begun else self.close()


@functools.lru_cache(maxsize=1024)
def in_networks(address: str, networks: Tuple[str, ...]) -> bool:
    with contextlib.suppress(ValueError):
        ip = ipaddress.ip_address(address.partition("%")[0])
        ip = getattr(ip, "ipv4_mapped", None) or ip  # who comes by IPv4 to a socket for both
        return any([ip in ipaddress.ip_network(network) for network in networks])
    return False


def is_loopback(address: str) -> bool:
    return in_networks(address, ("127.0.0.0/8", "::1"))


@functools.lru_cache(maxsize=1024)
def known_host(host: str, names: FrozenSet[str]) -> bool:
    """Is this Host one of ours? Another site can have its own name lead here (DNS rebinding), but no address."""
    name = re.sub(r":[0-9]*$", "", host).lower()
    return name in names or in_networks(name.strip("[]"), ("0.0.0.0/0", "::/0"))


class Edge(ThreadingHTTPServer):
    """Binds in the constructor, serves in serve_forever(), ends by shutdown() in another thread and server_close()."""
    request_queue_size = 1024                        # http.server's 5 turns away a crowd that comes at once
    DRAIN_SECONDS, END_SECONDS = 5.0, 5.0            # for the requests in flight; then for the threads
    TICK_SECONDS, BATCH_SECONDS, CALLS_SECONDS = 1.0, 0.05, 0.002
    EAGER_SECONDS = 0.0001, 0.0005                   # with no job under way; with one, where there is a single core

    def __init__(self, env: Env) -> None:
        self.env, self.settings = env, env.settings
        self.held, self.selector, self.calls = set(), selectors.DefaultSelector(), collections.deque()
        self.insiders = set()                        # who was let in where of late: hashes of lane and cookie
        self.waker, self.woken = socket.socketpair()
        self.awake, self.stopping, self.stopped = False, 0.0, threading.Event()      # stopping: since when; 0: not
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.eager, self.brisk = self.EAGER_SECONDS[:2 if cores == 1 else 1], False      # brisk: it pays just now
        names = "", "localhost", socket.gethostname(), env.settings.host, *env.settings.allow_host
        self.hosts = frozenset([name.lower() for name in names])
        self.pool, self.broker, self.figures = Pool(env.settings.threads), Broker(self), Figures(env.settings.log)
        snapshots = functools.partial(snapshot_again, env.settings), env.settings.backup_every       # 0: never
        self.chores = (give_back_memory, 5.0), (self.broker.try_again, 5.0), snapshots
        self.due = [time.monotonic() + every for _, every in self.chores]
        self.alarms = Alarms(env.workspaces, self.pool.share)
        self.address_family = socket.AF_INET6 if ":" in env.settings.host else socket.AF_INET
        super().__init__((env.settings.host, env.settings.port), Connection)
        name = env.settings.node_name or f"{env.settings.host}:{self.server_port}"
        settings, console = env.settings._replace(node_name=name), Console(env, self.broker)
        self.env = env._replace(settings=settings, console=console.answer)
        for waiting in (self.socket, self.waker, self.woken):
            waiting.setblocking(False)
        for namespace in {env.workspaces, env.directory.namespace}:
            namespace.listeners.append(self.broker.published)

    def server_bind(self) -> None:
        """As http.server's, without the look-up of our own name, which can take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = self.socket.getsockname()[:2]

    # -- the loop

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        self.selector.register(self.socket, READ, self.accept)
        self.selector.register(self.woken, READ, lambda _: self.woken.recv(4096))
        self.pool.defer()
        self.pool.put(self.alarms.look)
        next_tick = 0.0
        while not (self.stopping and self.drained()):
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + self.TICK_SECONDS
                self.tick(time.monotonic())
            for key, events in self.ready():
                guarded(key.data, events)
            until = time.monotonic() + self.CALLS_SECONDS
            for _ in range(len(self.calls)):
                guarded(*self.calls.popleft())
                if time.monotonic() > until:         # it is the turn of the sockets again
                    break
        self.pool.rouse()
        self.stopped.set()

    def ready(self) -> List[Tuple[selectors.SelectorKey, int]]:
        """What can be read or written. A core that fell asleep takes longer to wake than most answers take to make, so
        while one request follows close on another the loop stays awake for a moment: whenever that paid last time.
        Beside a job it would take the interpreter from it, except where the job only waits for the disk on that core.
        While somebody watches, a job does more: it renders."""
        self.pool.rouse()
        jobs, most = len(self.pool.threads) - len(self.pool.idle), 1 if self.broker.channels else len(self.eager)
        until = time.perf_counter() + (self.eager[jobs] if jobs < most else 0.0)
        while self.brisk and time.perf_counter() < until:
            if (found := self.selector.select(0)) or self.calls:
                return found
            getattr(os, "sched_yield", bool)()       # who else needs this core goes first
        self.awake = False
        found = self.selector.select(0 if self.calls else self.TICK_SECONDS)
        self.awake, self.brisk = True, time.perf_counter() < until
        return found

    def call(self, *call: Any) -> None:
        """call(function, *args): have the loop do it soon; from any thread."""
        self.calls.append(call)
        if not self.awake:                           # it looks at the calls once more before it sleeps
            self.awake = True
            self.wake()

    def wake(self) -> None:
        with contextlib.suppress(OSError):           # full: it is awake already
            self.waker.send(b"\0")

    def accept(self, _: int) -> None:
        for _ in range(64):                          # then look after the others
            try:
                self.process_request(*self.get_request())
            except BlockingIOError:
                return
            except OSError as error:                 # out of descriptors: leave them in the queue until the next tick
                log(f"accept: {error}")
                return self.selector.unregister(self.socket)

    def process_request(self, request: socket.socket, client_address: Tuple) -> None:
        """In place of a thread for this connection: a place in the loop."""
        request.setblocking(False)
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = self.RequestHandlerClass(request, client_address, self)
        if len(self.held) > self.settings.connections:
            connection.refuse(Refused(503, "The server is full. Try again in a minute.", (("retry-after", "60"),)))

    def tick(self, now: float) -> None:
        """Once a second: the date, deadlines, heartbeats, and a look at who may sleep."""
        self.date = formatdate(usegmt=True)
        self.figures.flush()
        self.insiders.clear() if len(self.insiders) > 100_000 else None
        for held in [*self.held]:
            guarded(held.tick, now)
        guarded(self.broker.tell_who_is_here)
        self.pool.put(self.env.workspaces.rest)
        self.pool.put(self.env.directory.namespace.rest)
        self.pool.put(self.broker.look_elsewhere)
        self.alarms.ring()
        self.broker.published(Console.id, Console.id)
        for number, (chore, every) in enumerate(self.chores):
            if every and now >= self.due[number]:
                self.due[number] = now + every
                self.pool.gather(f"chore {number}", chore, lambda same: same[0]())       # never twice at a time
        if not self.stopping and self.socket.fileno() not in self.selector.get_map():
            self.selector.register(self.socket, READ, self.accept)

    # -- answering, in the loop (wait=0) and in the pool

    def answer_all(self, asked: Sequence[Tuple[Connection, Reading]]) -> None:
        """In the pool: what came for one workspace."""
        if len(asked) == 1:                          # it shares nothing, and needs no savepoint
            connection, reading = asked[0]
            return connection.attempt(connection.think, reading)
        waiting = collections.deque(asked)
        while waiting:
            self.answer_batch(waiting)

    def answer_batch(self, waiting: collections.deque) -> None:
        """The answer to a command waits until its batch is durable; a batch is closed before somebody would notice that
        it is open, and at once while nothing is in it."""
        batch, answers, until = Batch(), [], time.monotonic() + self.BATCH_SECONDS
        while waiting:
            connection, reading = waiting.popleft()
            guarded(connection.attempt, self.answer_in, batch, answers, connection, reading)
            if batch.object is None or batch.settled or time.monotonic() > until:
                break
        guarded(batch.close)
        for joined, connection, reading, request, response in answers:
            if joined and batch.error and response.status < 400:
                response = refused(request, batch.error.refusal)
            guarded(connection.answered, reading, request, response)

    def answer_in(self, batch: Batch, answers: List[Any], connection: Connection, reading: Reading) -> None:
        before = batch.size
        answer = self.answer(reading, connection.peer, batch=batch)
        answers.append((batch.size > before, connection, reading, *answer))

    def answer(self, reading: Reading, peer: str, wait: float = threading.TIMEOUT_MAX,
               batch: Optional[Batch] = None) -> Tuple[Request, Response]:
        """Every request comes out of here with a response, whatever happened on its way. WouldBlock: not here."""
        request = Request("GET", "/", "", reading.headers)
        try:
            request = self.request(reading, peer, wait, batch)
            response = sound(self.route(request))
        except WouldBlock:
            if not wait:
                raise
            response = refused(request, Refused(503, "This is busy. Try again in a moment.", (("retry-after", "1"),)))
        except Refused as no:
            response = refused(request, no)
        except StorageFault as fault:
            log(f"storage: {fault}")
            response = refused(request, fault.refusal)
        except UnicodeEncodeError:                   # half a surrogate pair: JSON can write it, but it is no character
            response = refused(request, Refused(400, "There is a character in this that is none. Type it again."))
        except CRASH as error:
            log_error(f"{request.method} {request.path}", error)
            response = refused(request, Refused(500, "Something went wrong on our side; it is in the log. Try again."))
        return request, response

    def request(self, reading: Reading, peer: str, wait: float = threading.TIMEOUT_MAX,
                batch: Optional[Batch] = None) -> Request:
        """What a sound frame asks for. Refused: its target, method or host means nothing here."""
        headers, method, scheme = reading.headers, "GET" if reading.method == "HEAD" else reading.method, "http"
        if "x-forwarded-proto" in headers and in_networks(peer, self.settings.trust_proxy):
            scheme = "https" if headers["x-forwarded-proto"] == "https" else "http"
            peer = headers.get("x-forwarded-for", peer).rpartition(",")[2].strip()
        if not known_host(headers.get("host", ""), self.hosts):
            raise Refused(421, "This server does not go by that name; whoever runs it can allow it: --allow-host NAME.")
        if method not in METHODS:
            status = 405 if method in ("TRACE", "CONNECT") else 501
            raise Refused(status, f"The methods here are {', '.join(METHODS)}.", (("allow", ", ".join(METHODS)),))
        path, query = ("*", "") if method == "OPTIONS" else parse_target(reading.target, headers.get("host", ""))
        return Request(method, path, query, headers, reading.body or b"", peer, wait, scheme, batch)

    def stream_or_refusal(self, reading: Reading, request: Request, response: Response) -> Response:
        """In the loop, which counts the streams."""
        most = self.settings.streams or (self.settings.connections if self.settings.demo else 100)
        if not reading.modern:
            return refused(request, Refused(505, "A stream needs HTTP/1.1. Set proxy_http_version 1.1 in the proxy."))
        if self.broker.accounts[response.which] >= most and reading.method != "HEAD":
            return refused(request, Refused(429, "Too many windows are open for this account. Close some.",
                                            (("retry-after", "30"),)))
        return response

    def route(self, request: Request) -> Response:
        if request.method == "OPTIONS":
            return Response(204, headers=(("allow", ", ".join(METHODS)),))
        if request.path == "/healthz":
            return only_read(request) or (Response(503, b"draining\n") if self.stopping else Response(200, b"ok\n"))
        if request.path == "/metrics":
            return only_read(request) or self.metrics(request)
        return self.env.trace.follow(request, lambda request: self.env.front(request, self.env))

    def metrics(self, request: Request) -> Response:
        """Prometheus text format 0.0.4."""
        if not request.wait:                         # who may see them is asked of the Directory
            raise WouldBlock
        local, cookie = is_loopback(request.peer), {"cookie": request.headers.get("cookie", "")}
        if not (local and "x-forwarded-for" not in request.headers
                or self.env.directory.ask("/_whoami", "", cookie, request.scheme)["operator"]):
            raise Refused(403, "The figures are for this machine and for operators. Ask from 127.0.0.1, or sign in as "
                               "one.")
        verdicts = self.env.directory.namespace.wake(self.env.directory.id).verdicts
        return Response(200, self.figures.text(
            ("gate_verdicts_total", "counter", labelled("verdict", verdicts)),
            ("workspace_fetches_total", "counter", {"": self.env.workspaces.fetches}),
            ("workspaces_awake", "gauge", {"": len(self.env.workspaces.objects)}),
            ("streams_open", "gauge", {"": sum([type(held) is Stream for held in [*self.held]])}),
            ("frames_total", "counter", labelled("result", self.broker.frames))).encode(), Figures.TYPE)

    # -- the end

    def stop(self) -> None:
        """Take no more requests, and end when those in flight are answered. Also from a signal handler."""
        self.stopping = self.stopping or time.monotonic()
        self.wake()

    def drained(self) -> bool:
        """Closes what merely waits; a stream closes without its last chunk, so its client comes back by itself."""
        if self.socket.fileno() >= 0:
            with contextlib.suppress(KeyError):      # it was out of descriptors just now
                self.selector.unregister(self.socket)
            self.socket.close()
        for held in [held for held in self.held if type(held) is Stream or not held.busy]:
            held.close()
        return not self.held or time.monotonic() > self.stopping + self.DRAIN_SECONDS

    def shutdown(self) -> None:
        self.stop()
        self.stopped.wait()

    def server_close(self) -> None:
        """After serve_forever: end the threads, move every WAL into its file."""
        self.pool.close(self.END_SECONDS)
        self.figures.close()
        self.env.workspaces.rest(idle=-1)
        self.env.directory.namespace.rest(idle=-1)
        for held in (*self.held, self.socket, self.selector, self.waker, self.woken):
            held.close()


# ==== 25. Composition ================================================================================================
# Which parts there are and who knows whom is said here and nowhere else. Importing this file builds nothing.

def two_planes(settings: Settings) -> Env:
    """The composition root: one Directory, a Workspace for each tenant, and a worker in front (section 15)."""
    settings, fresh, keys = prepared(settings)
    trace, pages, router = Trace(with_args=settings.demo), pages_of(settings.slices), Router(settings.slices)
    build, awake = functools.partial(Workspace, router=router, pages=pages), settings.awake or awake_by_default()
    workspaces = Namespace("workspace", settings.workspaces, build, awake, settings.idle, trace)
    build = functools.partial(Directory, settings=settings, keys=keys, workspaces=workspaces, pages=pages)
    directory = Namespace("directory", settings.data, build, 1, float("inf"), trace).get("directory")
    if fresh:
        directory.namespace.create(directory.id)
    with contextlib.closing(Store(settings.directory_file)) as store:
        for name, entries in router.schema:          # before any tenant is opened: do they go with what ran before?
            store.migrate(f"workspace/{name}", entries, apply=False)
    directory.ask("/_version")                       # what is wrong with it is heard now, not at the first request
    env = Env(settings, directory, workspaces, trace, worker, admit, pages[0].path)
    if fresh and settings.demo:
        seed(env, DEMO_WORKSPACES)
    return env


def prepared(settings: Settings) -> Tuple[Settings, bool, Tuple[bytes, ...]]:
    """Whether it is a demo, whether there is nothing yet, and the keys. Unusable: the Directory was lost, and a new one
    would open its workspaces to whoever names one."""
    (settings.data if settings.single else settings.workspaces).mkdir(parents=True, exist_ok=True)
    fresh, demo = not settings.directory_file.exists(), settings.demo
    if demo and not fresh:
        with contextlib.closing(Store(settings.directory_file)) as directory:
            demo = directory.one("SELECT 1 FROM accounts WHERE persona") is not None
    if fresh and not settings.single and any(settings.workspaces.glob("*.db")):
        raise Unusable(f"{settings.directory_file} is missing, and there are workspaces; restore it from a backup, or "
                       "name another folder with --data (a node is started with --plane data)")
    if fresh and not settings.key_file.exists():
        add_key(settings.key_file)
    return settings._replace(demo=demo), fresh, load_keys(settings.key_file)


def pages_of(slices: Sequence[Slice]) -> List[Live]:
    return [live for slice in slices for live in slice.live] + [MEMBERS]


class OneFile(Namespace):
    """Of a single object, whose file may have any name."""

    def __init__(self, file: pathlib.Path, *rest: Any) -> None:
        super().__init__("workspace", file.parent, *rest)
        self.file = file

    def id_from_name(self, name: str) -> str:
        return super().id_from_name("single")

    def path(self, id: str) -> pathlib.Path:
        return self.file

    def files(self) -> Iterator[Tuple[str, pathlib.Path]]:
        return iter([(self.id_from_name(""), self.file)])

    def create(self, id: str) -> None:
        None if self.file.exists() else super().create(id)


def single_root(settings: Settings) -> Env:
    """One object and one file, with the same slices; the first workspace that is founded is the only one."""
    settings, fresh, keys = prepared(settings)
    trace, pages = Trace(with_args=settings.demo), pages_of(settings.slices)
    build = functools.partial(Single, settings=settings, keys=keys, pages=pages, slices=settings.slices)
    namespace = OneFile(settings.single, lambda id, own: build(id, own, workspaces=own), 1, float("inf"), trace)
    root = namespace.get(namespace.id_from_name(""))
    namespace.create(root.id)
    root.fetch(Request("GET", "/_version"))
    env = Env(settings, root, namespace, trace, single_front, admit, pages[0].path)
    if fresh and settings.demo:
        seed(env, {"acme": DEMO_WORKSPACES["acme"]})
    return env


def directory_plane(settings: Settings) -> Env:
    """Accounts, sessions and the gate; the workspaces are on the nodes that its table names."""
    env = two_planes(settings._replace(demo=False))
    build = functools.partial(Elsewhere, settings=settings,
                              address=lambda id: env.directory.ask("/_node_of", headers={"x-id": id}))
    workspaces = Namespace("workspace", settings.workspaces, build, 1024, settings.idle, env.trace)
    workspaces.files = lambda: iter(())              # what is in the folder is none of theirs
    return env._replace(workspaces=workspaces, front=directory_front)


def data_plane(settings: Settings) -> Env:
    """A node: workspaces, and the Directory in another process, whose key it shares. Unusable: it knows none, or has no
    key."""
    settings.workspaces.mkdir(parents=True, exist_ok=True)
    if not settings.key_file.exists() or not settings.directory:
        raise Unusable("a data plane needs --directory HOST:PORT, and in its data folder a copy of secret.key")
    trace, pages, awake = Trace(), pages_of(settings.slices), settings.awake or awake_by_default()
    build = functools.partial(Workspace, router=Router(settings.slices), pages=pages)
    workspaces = Namespace("workspace", settings.workspaces, build, awake, settings.idle, trace)
    away = functools.partial(Elsewhere, settings=settings, address=lambda id: settings.directory)
    directory = Namespace("directory", settings.data, away, 1, float("inf"), trace).get("directory")
    return Env(settings._replace(demo=False), directory, workspaces, trace, node_front, node_admit, pages[0].path)


PLANES = {"": two_planes, "directory": directory_plane, "data": data_plane}


def compose(settings: Settings, slices: Sequence[Slice] = (todos,)) -> Env:
    """BadSlice, MigrationError: not with these slices."""
    check_slices(slices)
    root = single_root if settings.single else PLANES[settings.plane]
    return root(settings._replace(slices=slices))


def awake_by_default() -> int:
    """An awake workspace takes three descriptors; a quarter of all, thrice, leaves the last quarter to sockets."""
    return min(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4) if resource else 256


DEMO_ACCOUNTS = {"alice": "Personal", "bob": "Acme", "carol": "Acme", "dave": "Globex", "erin": "Acme"}
DEMO_WORKSPACES = {
    "home": ({"alice": "owner"}, ("Water the plants", "Call grandmother", "Book the dentist")),
    "acme": ({"bob": "owner", "carol": "member", "erin": "viewer"},
             ("Order more anvils", "Test the skates", "Invoice the coyote")),
    "globex": ({"dave": "owner", "bob": "member"}, ("Draft the charter", "Paint the lobby", "Plan the picnic")),
}


def seed(env: Env, workspaces: Dict[str, Any]) -> None:
    """The demo's accounts go to the store; its workspaces, members and todos come through the doors that all use."""
    with contextlib.closing(Store(env.settings.directory_file)) as store, store.tx():
        for name, group in DEMO_ACCOUNTS.items():
            store.exec("INSERT INTO accounts (name, label, persona) VALUES (?, ?, 1)", name, f"{name} · {group}")

    def post(stub: Stub, path: str, viewer: Dict[str, str], **signals: str) -> None:
        headers = {"content-type": "application/json", "datastar-request": "true", **viewer}
        stub.fetch(Request("POST", path, headers=headers, body=json.dumps(signals).encode()))
    for name, (members, titles) in workspaces.items():
        (owner, _), *others = members.items()
        post(env.directory, "/workspaces", {"x-account": owner}, name=name)
        viewer = dict(verdict(owner, "owner", name, env.workspaces.id_from_name(name)).headers)
        for account, role in others:
            post(env.directory, "/members", viewer, account=account, role=role)
        for title in titles if todos in env.settings.slices else ():
            post(env.workspaces.get(viewer["x-id"]), "/todos", viewer, title=title)


# ==== 26. Administration =============================================================================================
# What operators do to a deployment, whether its server runs or not: SQLite lets several processes at a file, and the
# server looks each second whether another one wrote to the Directory.

@contextlib.contextmanager
def locked(folder: pathlib.Path, taken: str) -> Iterator[None]:
    """One process at a time in a folder. Unusable: it is no good or, with the text taken, another one is in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY) if fcntl else None
        if not os.access(folder, os.W_OK):
            raise PermissionError("not writable")
    except OSError as error:
        why = error.strerror or error
        raise Unusable(f"the data folder {folder} can't be used ({why}); name another with --data") from error
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise Unusable(taken) from error
    finally:
        if fcntl:
            os.close(handle)


BEGINNINGS = ("account add", "workspace import", "node add")


@contextlib.contextmanager
def opened(settings: Settings, what: str = "", which: str = "") -> Iterator[Tuple[Store, Env]]:
    """The Directory's store, and the world around it. What is done to it is one transaction, and journalled if it has a
    name. Unusable: there is none, and this is not one of the BEGINNINGS, which make it."""
    if not settings.directory_file.exists() and what not in BEGINNINGS:
        raise Unusable(f"there is no deployment in {settings.data}; name it with --data, or begin one with account add")
    env = compose(settings._replace(demo=False, plane=""), settings.slices)   # the files are here, whoever serves them
    with contextlib.closing(Store(settings.directory_file)) as store, store.tx():
        yield store, env
        if what:
            row = time.time(), "(command line)", what, which
            store.exec("INSERT INTO journal (at, who, what, which) VALUES (?, ?, ?, ?)", *row)


def begun(settings: Settings) -> None:
    """Unusable: there is no deployment, or its key is no good."""
    if not settings.directory_file.exists() and not settings.workspaces.exists():
        raise Unusable(f"there is no deployment in {settings.data}; name it with --data")
    load_keys(settings.key_file)


def row_of(store: Store, table: str, name: str) -> sqlite3.Row:
    row = store.one(f"SELECT * FROM {table} WHERE name = ?", name)
    if row is None:
        raise Unusable(f"there is no {table[:-1]} {name}; {table[:-1]} list tells what there is")
    return row


def new_password(name: str) -> str:
    """Asked for, or read from standard input; hashed."""
    password = getpass.getpass(f"Password of {name}: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
    if not 8 <= len(password) <= 256 or not password.isprintable():
        raise Unusable("a password has 8 to 256 characters, all of which can be printed")
    return hash_password(password)


def table(rows: Iterable[Sequence[Any]]) -> None:
    for row in rows:
        print(*row, sep="\t")


def account_add(settings: Settings, given: argparse.Namespace) -> None:
    if not ACCOUNT_NAME.fullmatch(given.name):
        raise Unusable("an account's name has 1 to 32 characters: a to z, 0 to 9, and hyphens inside")
    hashed = new_password(given.name)
    with opened(settings, "account add", given.name) as (store, _):
        row = given.name, given.name, hashed, given.operator
        if not store.exec("INSERT OR IGNORE INTO accounts (name, label, password, operator) VALUES (?, ?, ?, ?)", *row):
            raise Unusable(f"there is an account {given.name} already")
    print(f"{given.name} may sign in now")


def account_passwd(settings: Settings, given: argparse.Namespace) -> None:
    hashed = new_password(given.name)
    with opened(settings, "account passwd", given.name) as (store, _):
        row_of(store, "accounts", given.name)
        store.exec("UPDATE accounts SET password = ? WHERE name = ?", hashed, given.name)
        store.exec("DELETE FROM sessions WHERE account = ?", given.name)
    print(f"{given.name} has a new password, and is signed out everywhere")


def account_list(settings: Settings, given: argparse.Namespace) -> None:
    with opened(settings) as (store, _):
        table(store.query("SELECT name, CASE WHEN operator THEN 'operator' ELSE '' END, (SELECT count(*) FROM "
                          "memberships WHERE account = name) || ' workspaces' FROM accounts ORDER BY name"))


def account_remove(settings: Settings, given: argparse.Namespace) -> None:
    with opened(settings, "account remove", given.name) as (store, _):
        row_of(store, "accounts", given.name)
        alone = store.one("SELECT w.name FROM memberships m JOIN workspaces w ON w.id = m.workspace WHERE m.role = "
                          "'owner' GROUP BY w.id HAVING count(*) = 1 AND max(m.account) = ?", given.name)
        if alone:
            remedy = "make somebody else an owner first, or remove the workspace"
            raise Unusable(f"{given.name} is the last owner of {alone[0]}; {remedy}")
        store.exec("DELETE FROM accounts WHERE name = ?", given.name)


def workspace_add(settings: Settings, given: argparse.Namespace) -> None:
    with opened(settings, "workspace add", given.name) as (store, env):
        owners = [(row_of(store, "accounts", given.owner)["name"], "owner")] if given.owner else []
        add_workspace(store, env.workspaces, given.name, owners)
    open_on_node(settings, given.name)


def workspace_list(settings: Settings, given: argparse.Namespace) -> None:
    with opened(settings) as (store, env):
        for row in store.query("SELECT * FROM workspaces WHERE name IS NOT NULL ORDER BY name"):
            path, quota = env.workspaces.path(row["id"]), row["quota"] or settings.quota
            size = path.stat().st_size if path.exists() else "missing"
            where = f"on {row['node']}" if row["node"] else size
            print(row["name"], row["id"], where, f"of {quota}", "moving" if row["moving"] else "", sep="\t")


def workspace_rename(settings: Settings, given: argparse.Namespace) -> None:
    with opened(settings, "workspace rename", f"{given.name} {given.new}") as (store, _):
        row = row_of(store, "workspaces", given.name)
        store.exec("UPDATE workspaces SET name = ? WHERE id = ?", free_name(store, given.new), row["id"])


def workspace_quota(settings: Settings, given: argparse.Namespace) -> None:
    with opened(settings, "workspace quota", f"{given.name} {given.size}") as (store, _):
        row = row_of(store, "workspaces", given.name)
        store.exec("UPDATE workspaces SET quota = ? WHERE id = ?", given.size, row["id"])


def workspace_remove(settings: Settings, given: argparse.Namespace) -> None:
    """Out of the Directory first, so that nobody is let in any more; then the file. The row stays, without a name: the
    id is not given again."""
    with opened(settings) as (store, env):
        row = movable(settings, store, given.name)
    ask, removed = keeper(settings, env, row["id"], row["node"]), settings.data / "removed"
    if_it_answers = contextlib.suppress(Refused) if given.now else contextlib.nullcontext()    # a node may be lost
    with locked(settings.workspaces, "a move is under way; try again when it is over"):
        with if_it_answers:
            there = ask("has", "GET")
        with opened(settings, "workspace remove", given.name) as (store, _):
            if row_of(store, "workspaces", given.name) != row:
                raise Unusable("it was moved just now; try again")
            members = members_of(store, row["id"])
            store.exec("DELETE FROM memberships WHERE workspace = ?", row["id"])
            store.exec("UPDATE workspaces SET name = NULL WHERE id = ?", row["id"])
    if not given.now and there:
        removed.mkdir(exist_ok=True)
        copy = removed / f"{given.name}-{stamp()}.db"
        bring_here(ask, "aside", copy, given.name, members)
        print(f"a copy stays for 30 days; workspace import {copy} brings it back")
    for old in removed.glob("*.db"):
        if old.stat().st_mtime < time.time() - 30 * 86400:
            old.unlink()
    with if_it_answers:
        ask("drop")


def members_of(store: Store, id: str) -> List[Tuple[str, str]]:
    """Accounts with their roles."""
    return [*map(tuple, store.query("SELECT account, role FROM memberships WHERE workspace = ? ORDER BY account", id))]


def movable(settings: Settings, store: Store, name: str) -> sqlite3.Row:
    """The row of a workspace that has a file of its own."""
    if settings.single:
        raise Unusable(f"{name} is part of a single root; the file {settings.single} is all of it")
    return row_of(store, "workspaces", name)


def bring_here(ask: Callable[..., Any], what: str, target: pathlib.Path, name: str, members: Sequence[Any]) -> int:
    """A copy that is made where a workspace lives, or with the errand aside its last. The number of rows in it. Its
    name and members are added, for workspace import."""
    rows, of = ask(what), "moved" if what == "aside" else "copy"
    with in_the_making(target) as part:
        with open(part, "wb") as file:
            while (piece := ask("piece", "GET", f"of={of}&at={file.tell()}")):
                file.write(piece)
        rows_of(part)
        with contextlib.closing(sqlite3.connect(part)) as db, db:
            db.execute("CREATE TABLE _export (about TEXT)")
            db.execute("INSERT INTO _export VALUES (?)", (json.dumps({"name": name, "members": members}),))
        put_in_place(part, target)
    return rows


def workspace_export(settings: Settings, given: argparse.Namespace) -> None:
    """One file with all rows, the name and the members. move: from before the copy on nobody is let in, so it is the
    last word; the gate says 503 until the name is removed here."""
    if given.file.exists():
        raise Unusable(f"{given.file} exists; name a new file")
    busy = "a move is under way; try again when it is over"
    with locked(settings.workspaces, busy) if given.move else contextlib.nullcontext():
        export(settings, given)


def export(settings: Settings, given: argparse.Namespace) -> None:
    with opened(settings, "workspace export", given.name) as (store, env):
        row = movable(settings, store, given.name)
        store.exec("UPDATE workspaces SET moving = ? WHERE id = ?", row["moving"] or given.move, row["id"])
        members = members_of(store, row["id"])
    ask = keeper(settings, env, row["id"], row["node"])
    try:
        rows = bring_here(ask, "aside" if given.move else "copy", given.file, given.name, members)
    except BaseException:
        if given.move and not row["moving"]:         # all is as it was
            ask("back")
            placed(settings, row["id"], row["node"], "workspace export failed")
        raise
    None if given.move else ask("forget")
    print(f"{given.file}: {rows} rows, {len(members)} members")


def workspace_import(settings: Settings, given: argparse.Namespace) -> None:
    """An export or a single root, under its name or another, with its members. Who has no account here gets one; from
    an export it comes without a password."""
    try:
        with contextlib.closing(Store(given.file)) as source:
            old_name, members, accounts = about_file(source, given.name)
        members = dict(members)
        unknown = sorted({*members.values()} - {*ROLES})
        nobody = [account for account in members if not ACCOUNT_NAME.fullmatch(account)]
    except (sqlite3.Error, ValueError, TypeError, KeyError) as error:      # whoever made it may wish us ill
        raise Unusable(f"{given.file}: {error}; name a file that workspace export made, or a single root") from error
    if unknown or nobody:
        no = f"role {unknown[0]!r}" if unknown else f"account named {nobody[0]!r:.50}"
        raise Unusable(f"{given.file}: there can be no {no} here; the roles are {', '.join(ROLES)}")
    name = str(given.name or old_name)
    with adopted(settings, given.file) as copy:
        with opened(settings, "workspace import", name) as (store, env):
            add_accounts(store, accounts)
            add_workspace(store, env.workspaces, name, members.items(), copy)
        open_on_node(settings, name, copy)
    print(f"{name}: {len(members)} members")


def add_accounts(store: Store, accounts: Iterable[Sequence[str]]) -> None:
    """Name, label and password of each; who is here already stays as they are."""
    for account in accounts:
        added = store.exec("INSERT OR IGNORE INTO accounts (name, label, password) VALUES (?, ?, ?)", *account)
        if added and not account[2]:
            print(f"{account[0]} is new here; account passwd {account[0]} lets them in")


def about_file(store: Store, name: Optional[str]) -> Tuple[str, List[Tuple[str, str]], List[Tuple[str, str, str]]]:
    """The name of the workspace in it, its members with their roles, and their accounts: name, label, password."""
    if "_export" in store.tables():
        about = json.loads(store.one("SELECT about FROM _export")[0])
        return about["name"], about["members"], [(account, account, "") for account, _ in about["members"]]
    if "_migrations" not in store.tables() or store.one("SELECT 1 FROM _migrations WHERE slice LIKE 'workspace/%'"):
        raise Unusable(f"{store.path} is no workspace; name an export, a single root or a file of workspaces")
    if "memberships" not in store.tables():
        if not name:
            raise Unusable(f"{store.path} does not know its name; give it one with --name")
        return name, [], []
    members = store.query("SELECT account, role FROM memberships ORDER BY account")
    accounts = store.query("SELECT name, label, password FROM accounts WHERE name IN (SELECT account FROM memberships)")
    return store.one("SELECT name FROM workspaces")[0], [*map(tuple, members)], [*map(tuple, accounts)]


@contextlib.contextmanager
def adopted(settings: Settings, source: pathlib.Path) -> Iterator[pathlib.Path]:
    """A copy of another deployment's file, which will be claimed by an object of this one. Of a single root, the part
    that is the workspace's."""
    settings.data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.data) as folder:
        path = pathlib.Path(folder) / "adopted.db"
        copy_database(source, path)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            made = db.execute("SELECT tables FROM _migrations WHERE slice = 'directory'").fetchall()
            for table in ("_export", *" ".join([tables for tables, in made]).split()):
                db.execute(f"DROP TABLE IF EXISTS {table}")
            db.execute("DELETE FROM _migrations WHERE slice = 'directory'")
            db.execute("VACUUM")                     # nothing of sessions and passwords is left in free pages
            db.execute("PRAGMA application_id = 0")
        yield path


def workspace_restore(settings: Settings, given: argparse.Namespace) -> None:
    """As it was in a snapshot, beside the present one and with its members; never over it."""
    name = given.new or f"{given.name}-{given.at.name}"
    if not WORKSPACE_NAME.fullmatch(name):
        raise Unusable(f"{name} is no name for a workspace; give it another with --new")
    with opened(settings) as (store, _):
        row = movable(settings, store, given.name)
    with adopted(settings, given.at / "workspaces" / f"{row['id']}.db") as copy:
        with opened(settings, "workspace restore", name) as (store, env):
            members = members_of(store, row["id"])
            add_workspace(store, env.workspaces, name, members, copy)
        open_on_node(settings, name, copy)
    print(f"{name}: as {given.name} was in {given.at}")


def member_set(settings: Settings, given: argparse.Namespace) -> None:
    """add, role and remove, by the rules that the members page has too."""
    role = getattr(given, "role", None)
    with opened(settings, given.verb, f"{given.workspace} {given.account} {role or ''}".strip()) as (store, _):
        id = row_of(store, "workspaces", given.workspace)["id"]
        row_of(store, "accounts", given.account)
        ctx = Context(store, Viewer("(command line)", "owner"), Request("POST", "/"), lambda topic: None, id)
        before = role_of(ctx, given.account)
        if bool(before) == (given.verb == "member add"):
            why = "a member already; member role changes the role" if before else "no member; member add makes one"
            raise Unusable(f"{given.account} is {why}")
        set_role(ctx, given.account, before, role)


def member_list(settings: Settings, given: argparse.Namespace) -> None:
    with opened(settings) as (store, _):
        table(members_of(store, row_of(store, "workspaces", given.workspace)["id"]))


def backup(settings: Settings, given: argparse.Namespace) -> int:
    """1: some files can't be copied, and each line says which and why; all others are in it."""
    if given.folder.exists():
        raise Unusable(f"{given.folder} exists; name a new folder")
    begun(settings)
    held, faults = snapshot(settings, given.folder)
    print("\n".join([*faults, contents(given.folder, held)]))
    return 1 if faults else 0


def contents(folder: pathlib.Path, held: Dict[str, Any]) -> str:
    return f"{folder}: {len(held)} databases, {sum([part['rows'] for part in held.values()])} rows, checked"


def restore(settings: Settings, given: argparse.Namespace) -> None:
    """Into a data folder that has no deployment yet."""
    workspaces = () if settings.single else settings.workspaces.glob("*.db")
    there = [file for file in (settings.directory_file, *workspaces) if file.exists()]
    if there:
        raise Unusable(f"{there[-1]} is there already; name an empty folder with --data")
    if not (given.folder / "manifest.json").exists():
        raise Unusable(f"{given.folder} is no complete backup: it has no manifest.json")
    held = json.loads((given.folder / "manifest.json").read_text())
    settings.workspaces.mkdir(parents=True, exist_ok=True)
    shutil.copy2(given.folder / "secret.key", settings.key_file)
    for id, about in with_progress([*held.items()][::-1], "restored"):      # the Directory last: it says all is there
        path = pathlib.Path("directory.db" if id == "directory" else f"workspaces/{id}.db")
        target = settings.directory_file if id == "directory" else settings.data / path
        rows = copy_database(given.folder / path, target)
        if rows != about["rows"]:
            raise Unusable(f"{given.folder / path} has {rows} rows, and had {about['rows']} when it was copied")
    print(contents(settings.data, held))


def check(settings: Settings, given: argparse.Namespace) -> int:
    """Looks at every file, changes none. 1: something is wrong, and each line says what and where."""
    faults, folder = [], settings.workspaces

    def look(path: pathlib.Path, id: str) -> Sequence[Tuple[str, str]]:
        try:
            identity(path)
            with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
                verified(db)
                if not settings.single and db.execute("PRAGMA application_id").fetchone()[0] not in (0, mark_of(id)):
                    raise sqlite3.DatabaseError("the file belongs to another object")
                names = "SELECT id, name FROM workspaces WHERE name IS NOT NULL AND node = ''"
                return db.execute(names).fetchall() if id == "directory" else ()
        except sqlite3.Error as error:
            faults.append(str(StorageFault(path, error)))
            return ()
    files = [] if settings.single else [(path.stem, path) for path in folder.glob("*.db")]
    named = files if settings.plane == "data" else look(settings.directory_file, "directory")
    for id, _ in with_progress(() if settings.single else named, "checked"):
        look(folder / f"{id}.db", id)
    faults += [f"{path}: no workspace of the Directory has this file; import it, or move it away"
               for id, path in files if id not in dict(named)]
    try:
        load_keys(settings.key_file)
    except Unusable as error:
        faults.append(str(error))
    print("\n".join(faults) or f"{len(named)} workspaces, all is well")
    return 1 if faults else 0


def new(settings: Settings, given: argparse.Namespace) -> None:
    """A file to begin with: a slice of one's own, that runs."""
    if given.file.exists():
        raise Unusable(f"{given.file} exists; name a new file")
    given.file.write_text((TEMPLATES / "app.py.txt").read_text("utf-8"), "utf-8")
    print(f"{given.file}: a guestbook; python3 {given.file} serves it")


def known_node(store: Store, address: str) -> str:
    if not store.one("SELECT 1 FROM nodes WHERE address = ?", address):
        raise Unusable(f"there is no node {address}; node add {address} makes it one, node list tells what there is")
    return address


def node_add(settings: Settings, given: argparse.Namespace) -> None:
    with opened(settings, "node add", given.address) as (store, _):
        store.exec("INSERT OR IGNORE INTO nodes VALUES (?)", given.address)


def node_list(settings: Settings, given: argparse.Namespace) -> None:
    with opened(settings) as (store, _):
        table(store.query("SELECT address, (SELECT count(*) FROM workspaces WHERE node = address AND name IS NOT NULL) "
                          "FROM nodes"))


def node_remove(settings: Settings, given: argparse.Namespace) -> None:
    with opened(settings, "node remove", given.address) as (store, _):
        node = known_node(store, given.address)
        held = store.one("SELECT count(*) FROM workspaces WHERE node = ? AND name IS NOT NULL", node)[0]
        if held:
            raise Unusable(f"{node} has {held} workspaces; node move or node replace brings them elsewhere first")
        store.exec("DELETE FROM nodes WHERE address = ?", node)


def node_move(settings: Settings, given: argparse.Namespace) -> None:
    """From the node it is on, or from here, to another. The gate says 503 meanwhile; if it fails, all is as it was. One
    that was cut short is ended by asking again, or taken back by naming the node it came from."""
    with opened(settings) as (store, env):
        row, new = movable(settings, store, given.workspace), known_node(store, given.node)
    if (row["node"], row["moving"]) == (new, 0):
        raise Unusable(f"{given.workspace} is on {new} already")
    old, there = [keeper(settings, env, row["id"], node) for node in (row["node"], new)]
    another = "another move is under way; try again when it is over"
    with locked(settings.workspaces, another):      # two would each believe to have the last copy
        with opened(settings) as (store, _):
            if row_of(store, "workspaces", given.workspace) != row:          # one that ended just now
                raise Unusable(another)
        if not old("has", "GET"):
            raise Unusable(f"{row['node'] or settings.data} has no file of {given.workspace}; node replace brings it "
                           "up from a backup, workspace remove frees the name")
        if row["node"] == new:                       # it was cut short, and is not to go after all
            rows = there("back")
            placed(settings, row["id"], new, "node move taken back")
        else:
            rows = moved(settings, row, old, there, new)
    print(f"{given.workspace}: {rows} rows, on {new} now")
    with contextlib.suppress(Refused):               # who visits it wakes its jobs too
        there("ring"), old("forget")


def moved(settings: Settings, row: sqlite3.Row, old: Callable[..., Any], there: Callable[..., Any], new: str) -> int:
    """The number of rows that arrived. Nobody is let in from here on, until it is placed."""
    sent = False
    try:
        placed(settings, row["id"], row["node"], "node move begins", moving=1)
        rows = old("aside")
        send_pieces(there, lambda at: old("piece", "GET", f"of=moved&at={at}"))
        sent = True
        arrived = there("adopt")
        if arrived != rows:
            raise Unusable(f"{rows} rows left, and {arrived} arrived; try again")
        placed(settings, row["id"], new, "node move")
        return rows
    except BaseException:
        if sent:
            there("drop")                            # if that fails nobody is let in, here or there, until all is clear
        old("back")
        placed(settings, row["id"], row["node"], "node move failed")
        raise


def node_replace(settings: Settings, given: argparse.Namespace) -> int:
    """The workspaces of a node that is lost come up on another, from a backup of it. 1: some are not in the backup."""
    with opened(settings) as (store, env):
        if known_node(store, given.lost) == known_node(store, given.new):
            raise Unusable("a node can't take its own place; name another one")
        lost = store.query("SELECT id, name FROM workspaces WHERE node = ? AND name IS NOT NULL ORDER BY name",
                           given.lost)
    missing = []
    for row in lost[:1]:
        with contextlib.suppress(Refused):           # it does not answer, as is to be expected
            if keeper(settings, env, row["id"], given.lost)("has", "GET"):
                raise Unusable(f"{given.lost} answers, and has {row['name']}; node move takes it from there")
    for row in lost:
        ask, file = keeper(settings, env, row["id"], given.new), given.backup / "workspaces" / f"{row['id']}.db"
        if not file.exists():
            missing.append((row["name"], "is not in this backup; try another"))
            continue
        send_pieces(ask, functools.partial(piece_at, file))
        rows = ask("adopt")
        placed(settings, row["id"], given.new, given.verb)
        ask("ring")
        print(row["name"], f"{rows} rows", f"on {given.new} now", sep="\t")
    table(missing)
    print(f"node remove {given.lost} keeps new workspaces away from it")
    return 1 if missing else 0


def placed(settings: Settings, id: str, node: str, why: str, moving: int = 0) -> None:
    with opened(settings, why, f"{id} {node}") as (store, _):
        store.exec("UPDATE workspaces SET node = ?, moving = ? WHERE id = ?", node, moving, id)


def nginx(settings: Settings, given: argparse.Namespace) -> None:
    """The configuration of a proxy that does the Worker's part for several nodes."""
    upstreams = {node: f"orion_node_{number}" for number, node in enumerate(given.node, 1)}
    variables = {name: name.replace("-", "_") for name in (*VERDICT, "x-verdict")}
    holes = {"upstreams": [f"upstream {name} {{ server {node}; keepalive 32; }}" for node, name in upstreams.items()],
             "choices": [f'    "{node}" {name};' for node, name in upstreams.items()],
             "taken": [f"        auth_request_set $orion_{one} $upstream_http_{one};" for one in variables.values()],
             "given": [f"        proxy_set_header {name} $orion_{one};" for name, one in variables.items()]}
    text = Template((TEMPLATES / "nginx.txt").read_text("utf-8"))
    lines = {name: Html("\n".join(lines)) for name, lines in holes.items()}
    print(text(directory=given.directory, listen=given.listen or 80, **lines))


def keys_rotate(settings: Settings, given: argparse.Namespace) -> None:
    begun(settings)
    add_key(settings.key_file)
    print("there is a new key; the one before holds for those who are signed in, until the next rotation; if there are "
          "nodes, copy secret.key to them before that")


# ==== 27. Command line ===============================================================================================
# Flags, or ORION_* variables, into Settings; one line and exit status 2 for whatever prevents it.

def typed(pattern: Any, hint: str, read: Callable[[re.Match], Any] = lambda found: found[0]) -> Callable[[str], Any]:
    """A type for argparse: what read() makes of a text that matches. None: it is none after all."""
    def kind(text: str) -> Any:
        found = re.fullmatch(pattern, text)
        value = read(found) if found else None
        if value is None:
            raise argparse.ArgumentTypeError(f"{text!r} is {hint}")
        return value
    return kind


size = typed("([0-9]+)([KMGTkmgt]?)", "no size: say 500M or 10G",
             lambda found: int(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))
seconds = typed("([0-9]+[.]?[0-9]*|[.][0-9]+)([smhd]?)", "no time: say 90, 15m or 1h",
                lambda found: float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]])
port = typed("[0-9]{1,5}", "no port: say 0 to 65535", lambda found: int(found[0]) if int(found[0]) < 65536 else None)
address = typed(HOST, "no address: say HOST:PORT", lambda found: found[1] and found[0])
listen = typed(f"[0-9]{{1,5}}|{HOST.pattern}", "nowhere to listen: say 80, or 127.0.0.1:80")
number = typed("[0-9]{1,9}", "no number: say 0 or more", lambda found: int(found[0]))
at_least_1 = typed("[0-9]{0,8}[1-9][0-9]*", "no number: say 1 or more", lambda found: int(found[0]))


def several(text: str) -> Tuple[str, ...]:
    return tuple(filter(None, map(str.strip, text.split(","))))


def networks(text: str) -> Tuple[str, ...]:
    try:
        return tuple([str(ipaddress.ip_network(network)) for network in several(text)])
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}: say 10.0.0.0/8, or an address") from error


OPTIONS = (
    ("--host", "address to listen on", str),
    ("--port", "port to listen on; 0: any free one", port),
    ("--data", "folder with all state", pathlib.Path),
    ("--single", "one file that holds everything, for one workspace, in place of the data folder", pathlib.Path),
    ("--demo", "personas and workspaces to click through; on a loopback address, with no proxy in front, a new data "
     "folder has them anyway", bool),
    ("--idle", "seconds until an unused workspace goes to sleep", seconds),
    ("--awake", "workspaces awake at most, three descriptors each; 0: a quarter of the descriptors, at most 1,024",
     number),
    ("--quota", "bytes that the file of a workspace may have, as 500M or 10G", size),
    ("--max-workspaces", "workspaces that one account may own; 0: 20, in the demo 2,000", number),
    ("--streams", "pages that one account may have open; 0: 100, in the demo as many as connections", number),
    ("--connections", "connections at most; more get a 503", at_least_1),
    ("--allow-host", "names that this server goes by, with commas between", several),
    ("--trust-proxy", "networks of proxies whose X-Forwarded-For and X-Forwarded-Proto are believed, with commas "
     "between", networks),
    ("--plane", "directory or data: run one plane alone, with the other in other processes",
     typed("|".join(PLANES), "no plane: say directory or data")),
    ("--directory", "HOST:PORT of the directory, for --plane data", str),
    ("--node-name", "HOST:PORT by which the directory knows this data plane; by default as it listens", str),
    ("--backup-every", "seconds, or as 1h: how often to copy what changed to backups in the data folder; 0: never",
     seconds),
    ("--keep", "backups to keep", at_least_1),
    ("--log", "access log on standard output: common, json or off",
     typed("common|json|off", "no log: say common, json or off")),
)


FILE, FOLDER = ("file", pathlib.Path), ("folder", pathlib.Path)
# A command, what --help says of it, run(settings, given) with the exit status (None: 0), and its arguments. Each is a
# name or a flag, or one of them with the type that reads it. --flag= has a value, --flag=? may be left out, --flag=+
# may come several times.
VERBS = (
    ("account add", "somebody may sign in", account_add, ("name", "--operator")),
    ("account passwd", "a new password; signs out everywhere", account_passwd, ("name",)),
    ("account list", "who may sign in", account_list, ()),
    ("account remove", "take an account away, with its sessions and memberships", account_remove, ("name",)),
    ("workspace add", "a new workspace; without an owner member add lets people in",
     workspace_add, ("name", "--owner=?")),
    ("workspace list", "name, id, bytes and quota of each", workspace_list, ()),
    ("workspace rename", "moves no file, and keeps the members", workspace_rename, ("name", "new")),
    ("workspace remove", "a copy stays for 30 days, unless --now", workspace_remove, ("name", "--now")),
    ("workspace quota", "bytes that it may have, as 500M or 10G; 0: the server's --quota",
     workspace_quota, ("name", ("size", size))),
    ("workspace export", "all of it in one file, while the server runs; --move: and nobody writes here after",
     workspace_export, ("name", FILE, "--move")),
    ("workspace import", "such a file, with its members", workspace_import, (FILE, "--name=?")),
    ("workspace restore", "as it was in a snapshot, beside the present one",
     workspace_restore, ("name", ("--at=", pathlib.Path), "--new=?")),
    ("member add", "let an account into a workspace", member_set, ("workspace", "account", "role")),
    ("member role", "change a member's role", member_set, ("workspace", "account", "role")),
    ("member remove", "end a membership, open pages included", member_set, ("workspace", "account")),
    ("member list", "who is in a workspace", member_list, ("workspace",)),
    ("backup", "copy the whole deployment to a new folder, while the server runs", backup, (FOLDER,)),
    ("restore", "bring such a copy into an empty data folder", restore, (FOLDER,)),
    ("check", "look at every file, and say what is wrong", check, ()),
    ("new", "write a file with a slice of your own to begin with", new, (FILE,)),
    ("node add", "workspaces can be placed on it: HOST:PORT of a data plane", node_add, (("address", address),)),
    ("node list", "the nodes, and how many workspaces each has", node_list, ()),
    ("node remove", "a node that has no workspaces", node_remove, (("address", address),)),
    ("node move", "bring a workspace to another node, while the servers run",
     node_move, ("workspace", ("node", address))),
    ("node replace", "bring the workspaces of a lost node up on another, from a backup of it",
     node_replace, (("lost", address), ("new", address), ("backup", pathlib.Path))),
    ("nginx", "print the configuration of an nginx in front of a directory and its nodes",
     nginx, (("--directory=", address), ("--node=+", address), ("--listen=?", listen))),
    ("keys rotate", "a new key seals sessions; those of the key before hold until the next rotation", keys_rotate, ()),
)


HELP = {"name": "of the account or workspace", "workspace": "its name", "account": "its name",
        "role": f"one of {', '.join(ROLES)}", "size": "as 500M or 10G",
        "file": "path of the file", "folder": "path of the folder", "address": "HOST:PORT of the node",
        "node": "HOST:PORT of the node that it goes to", "lost": "HOST:PORT of the node that is gone",
        "new": "the new name, or HOST:PORT of the node that takes over", "backup": "folder of the lost node's backup",
        "--operator": "may open the console, and look on in others' names", "--owner": "account that owns it",
        "--now": "keep no copy", "--move": "it goes elsewhere: nobody is let in here from now on",
        "--name": "in place of the name in the file", "--at": "folder of a snapshot: data/backups/... or a backup",
        "--new": "name of what comes up; by default the name and the snapshot's",
        "--directory": "HOST:PORT of the directory", "--node": "HOST:PORT of a node; once for each",
        "--listen": "port of the proxy; by default 80"}


def add_verb(groups: Dict[str, Any], parent: argparse.ArgumentParser, words: str, help: str,
             run: Callable[[Settings, argparse.Namespace], Optional[int]], arguments: Sequence[Any]) -> None:
    group, _, word = words.rpartition(" ")
    parser = groups[group].add_parser(word, help=help, description=help, parents=[parent])
    parser.set_defaults(run=run, verb=words)
    for argument in arguments:
        name, kind = argument if isinstance(argument, tuple) else (argument, str)
        flag, valued, how_often = name.partition("=")
        options = {"type": kind} if valued or not flag.startswith("--") else {"action": "store_true"}
        if valued:
            options.update(required=how_often != "?", action="append" if how_often == "+" else "store")
        parser.add_argument(flag, help=HELP[flag], **options)


def read_command_line(argv: Optional[Sequence[str]]) -> Tuple[Settings, argparse.Namespace]:
    """Settings, and what a command was given; its run is None to serve."""
    class Parser(argparse.ArgumentParser):
        def error(self, why: str) -> None:
            self.exit(2, f"orion: {why}; --help tells what there is\n")
    parser = Parser(prog="orion.py", epilog="Every option is an environment variable too: ORION_PORT=80 is --port 80.",
                    description="A live, multi-tenant web server in one file. Without a command it serves.")
    parser.set_defaults(run=None)
    for flag, help, kind in OPTIONS:
        key = flag[2:].replace("-", "_")
        default = os.environ.get(f"ORION_{key.upper()}") or getattr(Settings(), key)
        if kind is bool and default is not None:
            default = default.lower() not in ("0", "no", "off", "false")
        shape = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        parser.add_argument(flag, help=f"{help} (default: {default})", default=default, **shape)
    parent = argparse.ArgumentParser(add_help=False)
    parent.add_argument("--data", type=pathlib.Path, default=argparse.SUPPRESS, help="folder with all state")
    parent.add_argument("--single", type=pathlib.Path, default=argparse.SUPPRESS, help="or the file with all state")
    groups = {"": parser.add_subparsers(title="commands", metavar="command")}
    for name in ("account", "workspace", "member", "node", "keys"):
        group = groups[""].add_parser(name, help=f"see {name} --help")
        groups[name] = group.add_subparsers(required=True, metavar="command")
    for verb in VERBS:
        add_verb(groups, parent, *verb)
    given = parser.parse_args(argv)
    settings = Settings(**{key: value for key, value in vars(given).items() if key in Settings._fields})
    data = settings.single.parent if settings.single else settings.data
    here = settings.host == "localhost" or is_loopback(settings.host)
    alone = here and not (settings.allow_host or settings.trust_proxy or settings.plane)       # and not behind a proxy
    return settings._replace(data=data, demo=alone if settings.demo is None else settings.demo), given


def main(slices: Sequence[Slice] = (todos,), argv: Optional[Sequence[str]] = None) -> int:
    """The exit status: 0; 1 when a check found something; 2 with one line on standard error."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace") if hasattr(stream, "reconfigure") else None
    settings, given = read_command_line(argv)
    settings = settings._replace(slices=slices)
    try:
        check_slices(slices)
        if settings.single and settings.plane:
            raise Unusable("--single is one file with both planes; leave --plane out")
        if given.run:
            return given.run(settings, given) or 0
        taken = f"another server uses the data folder {settings.data}; stop it, or name another with --data"
        with locked(settings.data, taken):           # two would each believe to be a tenant's only writer
            serve(settings)
        return 0
    except KeyboardInterrupt:                        # at a question: what was begun is undone
        return 130
    except (Refused, Unusable, BadSlice, MigrationError, StorageFault, OSError, sqlite3.Error, EOFError, ValueError,
            OverflowError) as error:
        why = error.message if isinstance(error, Refused) else str(error) or "nothing was typed"
        print(f"orion: {why}", file=sys.stderr)
        return 2


def serve(settings: Settings) -> None:
    if resource:                                     # a stream is a descriptor; take what the system grants
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    save_memory()
    env = compose(settings, settings.slices)
    try:
        server = Edge(env)
    except OSError as error:
        where, why = f"{settings.host}:{settings.port}", error.strerror or error
        raise Unusable(f"can't listen on {where} ({why}); choose another with --host or --port") from error
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(1) if server.stopping else server.stop())
    signal.set_wakeup_fd(server.waker.fileno())
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    print(f"orion: http://{host}:{server.server_port}", flush=True)
    if server.settings.demo:
        print("orion: demo: open the address and choose a persona; bob and carol share the workspace acme", flush=True)
    notify("READY=1")
    server.serve_forever()
    notify("STOPPING=1")
    server.server_close()


def notify(state: str) -> None:
    """Tell systemd (sd_notify(3)), if it asked to be told."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link, contextlib.suppress(OSError):
            link.sendto(state.encode(), address.replace("@", "\0", 1) if address.startswith("@") else address)


if __name__ == "__main__":
    sys.exit(main())
