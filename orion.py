#!/usr/bin/env python3
"""orion: a live, multi-tenant web server in one file, on the standard library alone.

    python3 orion.py           serves on http://127.0.0.1:8000, with a demo to click through
    python3 orion.py --plain   serves Part One of this file alone, as it stands

Teams share pages. When somebody changes a page, everybody who looks at it sees the change
at once; and no team can see a row of another. A team is called a workspace here. This is
the way of one click, from the browser to the row and back to every screen:

    browser ---- POST /w/acme/todos ----> edge ----> worker
                                                     |    |
       1. may they?  GET /_gate/acme    +------------+    +-----------+   3. forward, with
       2. yes, and who they are         v                             v      what was said
                                    Directory                     Workspace
                                    the control plane:            the data plane:
                                    accounts, sessions,           one SQLite file for
                                    members, roles                this team alone
                                                                      |
                                                                      | 4. write, publish,
                                                                      v    commit
    every browser <---- edge <---- 5. the list, read again, rendered once for each role

Step 5 is the whole idea of "live". A publish carries no data. It says only "read the store
again"; it waits for the commit, and a rollback discards it. What is sent then is the
complete present truth. So a message that comes late, or twice, or is lost does no harm, and
a browser that was cut off simply asks again.

The pages talk to the server through Datastar, a small script in the browser:

    data-init="@get('./todos/live')"    opens a stream: an answer that does not end.
    event: datastar-patch-elements      Inside a stream: this markup takes the place of the
                                        element with the same id, and only what differs is
                                        changed.
    @post('./todos', {payload: ...})    sends values, called signals, as a JSON object.
    {"problem": "A title has ..."}      A JSON answer sets these signals in the page.
    retry: 'always'                     When a stream ends, ask for it again, forever.
    <div id="live" ...>                 The element that asks; without it nobody asks again.

The words. Where one has a second meaning, it is said here:

    workspace   a team with its rows: "acme"
    account     somebody who can sign in: "carol"
    grant       a permission: "todos:delete". A role is a name for a set of grants.
    viewer      an account inside a workspace, with its role and grants. One of the roles
                is also called "viewer": those who may only read.
    owner       a role; in section 16 alone, the slice whose migration made a table
    verdict     the answer of the Directory's gate: 200 and the viewer, or 401, or 403
    edge        the part that knows sockets
    object      one SQLite file and one lock: a Workspace, or the Directory. Others hold
                only a stub, its address.
    turn        the lock of an object. One thread at a time holds it; the others wait.
    door        a function that answers one path outside of the workspaces: "/healthz"
    slice       a feature, from its tables to its pages: "todos"
    region      the part of a page that stays current: <section id="todos">
    command     a request that may write: POST, PUT, PATCH, DELETE
    topic       what a command publishes and a region listens to: "todos"
    stream      an answer that stays open and carries a region again after each change; each
                time it is called a frame
    rendering   a region at one state of the store, made once for all viewers who have the
                same role and ask with the same parameters

The file has three parts; its markup, style and script are in the folder templates/. Part
One is the architecture. It is complete: --plain runs it without the other two. Part Two
replaces the place where connections and streams are held, to serve thousands of them. Part
Three is what a product needs around it. To know how it works, read Part One, and stop at
its last line. What stands there for the other parts only is marked: [2], [3].
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import hashlib
import hmac
import html
import ipaddress
import json
import os
import pathlib
import queue
import re
import secrets
import signal
import socket
import sqlite3
import sys
import threading
import time
import traceback
import urllib.parse
from email.utils import formatdate
from http.client import responses as REASONS
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple


# #### Part One: the architecture ########################################################
#
#      1 Requests    2 Worker       3 Markup        4 Events      5 Store      6 Bus
#      7 Objects     8 Slices       9 Todos        10 Workspace  11 Sessions  12 Directory
#     13 Members    14 Plain edge  15 Composition   16 Tables
#
# The first two sections show the way of a request; each later one explains a word of it.
# This is the way of one click, by functions and their sections:
#
#     PlainHandler.answer (14)    makes a Request of what came in
#     respond (14), worker (2)    first the gate: ask_the_gate (2), gate (12)
#     destination (2)             which object answers; the verdict becomes headers
#     Stub.fetch (7)              takes the turn of the object
#     SliceHost.command (8)       opens the transaction: DurableObject.command (7)
#     SliceHost.run (8)           finds the route, checks the grant, notes it in the journal
#     create (9)                  validates, writes, publishes: Bus.publish (6)
#     Store.transaction (5)       commits, and only then: Bus.tell (6)
#
# And in the thread of each open stream:
#
#     Watch.wait (7)              returns, for the topic was published
#     respond (14), worker (2)    the same question again, gate included
#     SliceHost.stream (8)        takes the rendering, which the first of them has made
#     PlainHandler.hold (14)      sends it
#
# A name has nearly always the same type, so it is not repeated at each function: request is
# a Request, viewer a Viewer (in a region: a Role), env an Env, ctx a Context, store a Store
# (in a slice: its Tables). workspace and account are names; slice is a name, too, except in
# a loop over slices: there it is a Slice. A workspace's id has 64 hexadecimal digits. sql
# is a statement, args are its parameters.


# ==== 1. Requests =========================================================================
# The idea: the worker and the objects speak in requests and responses, as if each of them
#   were a server of its own. None of them knows of sockets.
# It promises: a request is never changed, only copied with a difference. Whoever has to say
#   no raises Refused, with a status and a sentence that says what to do next.
# Who uses it: every section.

SAFE = ("GET", "HEAD")                                   # methods that change nothing
METHODS = (*SAFE, "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
EVENTS = "text/event-stream"                             # the content type of a stream
NOTHING_HERE = (404, "There is nothing at this address. Go back, or start from the home "
                     "page.")


class Request(NamedTuple):
    """What came in. path is decoded, query is not; header names are in lower case."""
    method: str
    path: str
    query: str = ""
    headers: Dict[str, str] = {}
    body: bytes = b""
    peer: str = ""                                       # the client's address
    scheme: str = "http"                                 # or "https", by a trusted proxy

    @property
    def datastar(self) -> bool:
        """Was it sent by Datastar, rather than by the browser itself?"""
        return "datastar-request" in self.headers

    @property
    def stream(self) -> bool:
        """Does it ask for a stream?"""
        return self.method == "GET" and self.path.endswith("/live")

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "").lower()

    @property
    def form(self) -> bool:
        return self.content_type.startswith("application/x-www-form-urlencoded")

    @property
    def params(self) -> Dict[str, str]:
        """The parameters of the query."""
        return dict(urllib.parse.parse_qsl(self.query))

    def fields(self) -> Dict[str, Any]:
        """What was sent along, as a form or as signals.

        Raises Refused(415) if it is neither, Refused(400) if it cannot be read.
        """
        if self.form:
            text = self.body.decode("utf-8", "replace")
            return dict(urllib.parse.parse_qsl(text, keep_blank_values=True))
        if self.body and not self.content_type.startswith("application/json"):
            raise Refused(415, "Send application/json or "
                               "application/x-www-form-urlencoded.")
        return read_signals(self)


class Response(NamedTuple):
    """What goes out."""
    status: int
    body: bytes = b""
    type: str = "text/plain; charset=utf-8"
    headers: Tuple[Tuple[str, str], ...] = ()
    nonce: str = ""                                      # of a page; see section 3
    watch: Optional[Watch] = None                        # of a stream; see section 7
    which: str = ""                                      # what a command wrote, in a word


class Refused(Exception):
    """A no, with its HTTP status.

    message says what to do next. If the status is 422 (what somebody typed is wrong) or 409
    (it collides with what is there), the page shows it where it has this signal.
    """

    def __init__(self, status: int, message: str,
                 headers: Tuple[Tuple[str, str], ...] = (), signal: str = "problem"):
        super().__init__(status, message)
        check_values(headers)
        self.status = status
        self.message = message
        self.headers = headers
        self.signal = signal


NOT_IN_A_VALUE = re.compile(r"[^\t -~\x80-\xff]")        # RFC 9110, 5.5


def check_values(headers):
    """Raise ValueError if a header value would end its line and begin another."""
    for name, value in headers:
        if NOT_IN_A_VALUE.search(value):
            raise ValueError(f"no header value may be {value!r:.200} (of {name})")


def sound(response):
    """Return the response. Raise TypeError or ValueError if it cannot be sent."""
    if type(response) is not Response or type(response.body) is not bytes \
            or type(response.status) is not int:
        raise TypeError("an answer is a Response with a number and bytes, such as "
                        f"done(ctx), and not {response!r:.200}")
    check_values((*response.headers, ("content-type", response.type)))
    return response


PUBLIC, ACCOUNT, MEMBER = "(anyone)", "(any account)", "(any member)"    # as a grant
NOT_SHARED = ("a region is rendered once for a whole role and shown to all who have it, so "
              "it cannot use the {} of one viewer; put what is theirs alone into page()")



@dataclasses.dataclass(frozen=True)
class Role:
    """Who looks, as a region may know it: all that viewers of one role have in common."""
    role: str = ""
    grants: Tuple[str, ...] = ()
    workspace: str = ""                                  # its name
    id: str = ""                                         # its id

    def can(self, grant: str) -> bool:
        return grant in self.grants

    @property
    def account(self):
        raise PermissionError(NOT_SHARED.format("account"))


@dataclasses.dataclass(frozen=True)
class Viewer(Role):
    """Who looks, as the verdict says it. Without a workspace: an account, or nobody."""
    account: str = ""

    def shared(self) -> Role:
        return Role(self.role, self.grants, self.workspace, self.id)

    def permit(self, grant: str, method: str = "GET") -> None:
        """Raise Refused(401) or Refused(403) if they may not. (method is for [3].)"""
        if grant == ACCOUNT and not self.account:
            raise Refused(401, "Sign in first.")
        if grant == MEMBER and not self.role:
            raise Refused(403, "This is for members. Ask an owner to invite you.")
        if grant not in (PUBLIC, ACCOUNT, MEMBER) and not self.can(grant):
            raise Refused(403, f"Your role here does not include {grant}. Ask an owner of "
                               "the workspace for it.")

    # [3] An operator can look on in somebody's name. Then the next two say so.

    @property
    def signature(self) -> str:
        """Who did it, for the journal."""
        return self.account

    def banner(self):
        """What stands on top of each of their pages."""
        return ""


def as_json(data: Any) -> Response:
    return Response(200, json.dumps(data).encode(), "application/json")


def see_other(path: str, *headers: Tuple[str, str]) -> Response:
    return Response(303, headers=(("location", path), *headers))


LOCAL_PATH = re.compile(r"/(?![/\\])[!-\[\]-~]{0,2000}")


def local_path(path: str) -> str:
    """Return path if it leads to this server, else "/". //host would lead elsewhere."""
    return path if LOCAL_PATH.fullmatch(path) else "/"


# ==== 2. Worker ===========================================================================
# The idea: a function that decides where a request goes. It asks the Directory whether this
#   person may enter this workspace, and contacts the Workspace only on the answer 200.
# It promises: a request of somebody who is no member never reaches a Workspace. What a
#   Workspace hears about the viewer was said by the gate, never by the person outside.
# Who uses it: the edge, for each request, and again for each frame of an open stream.

# Headers that the parts of this server believe. Nobody outside may send them.
TRUSTED = {"x-account", "x-role", "x-can-delete", "x-grants", "x-workspace", "x-id",
           "x-session", "x-file", "x-counts"}            # the last one: [3]


def ask_the_gate(request, env):
    """Fetch the verdict on whoever holds this cookie, from the Directory."""
    workspace = request.path.split("/")[2]
    headers = {"cookie": request.headers.get("cookie", "")}
    question = Request("GET", f"/_gate/{workspace}", headers=headers, scheme=request.scheme)
    return env.directory.fetch(question)


def apex(request, env):
    """Answer what is outside of the workspaces: by a door, or by the Directory.

    The server itself asks its objects questions, at paths that begin with "/_". From
    outside only the gate can be asked: it tells people about themselves alone.
    """
    request = stripped(request)
    if request.path in env.doors:
        return env.doors[request.path](request, env)
    if request.path.startswith("/_") and request.path.split("/")[1] != "_gate":
        raise Refused(*NOTHING_HERE)
    return env.directory.fetch(request)


@dataclasses.dataclass
class Env:
    """All that a worker works with. A composition root (section 15) fills it in.

    The last three are functions, so that another root can choose others: [2] forwards many
    requests at once, [3] asks the gate on another machine.
    """
    directory: Stub
    workspaces: Namespace
    doors: Dict[str, Callable[[Request, Env], Response]]     # by path
    gate: Callable[[Request, Env], Response] = ask_the_gate
    apex: Callable[[Request, Env], Response] = apex
    forward: Callable[[Stub, Request], Response] = lambda stub, request: stub.fetch(request)


def worker(request: Request, env: Env) -> Response:
    """Answer a request from outside: first the gate, then forward. Raises Refused."""
    if request.method == "OPTIONS":
        return Response(204, headers=(("allow", ", ".join(METHODS)),))
    refuse_foreign(request)
    if not request.path.startswith("/w/"):
        return env.apex(request, env)
    verdict = admit(request, env)
    return env.forward(*destination(request, verdict, env))


def admit(request, env):
    """Return the gate's verdict, if it is 200. Raises Refused for any other."""
    verdict = env.gate(request, env)
    if verdict.status != 200:
        raise Refused(verdict.status, verdict.body.decode().strip(), verdict.headers)
    return verdict


def refuse_foreign(request):
    """Raise Refused(403) if a command does not come from one of our own pages.

    Another site can make a browser send us a form, cookie included (cross-site request
    forgery). It cannot keep the browser from saying so, in the headers Origin and
    Sec-Fetch-Site. A request that has neither is refused, too.
    """
    if request.method in SAFE:
        return
    ours = f"{request.scheme}://{request.headers.get('host', '')}"
    origin = request.headers.get("origin")
    site = request.headers.get("sec-fetch-site")
    silent = origin is None and site is None
    foreign_origin = origin not in (None, ours)
    foreign_site = site not in (None, "same-origin")
    if silent or foreign_origin or foreign_site:
        raise Refused(403, "This request came from another site. Open the page here and "
                           "try again; a script sends its Origin.")


def stripped(request):
    """Return the request without the headers that nobody outside may send."""
    if TRUSTED.isdisjoint(request.headers):
        return request
    headers = {name: request.headers[name] for name in request.headers.keys() - TRUSTED}
    return request._replace(headers=headers)


def destination(request, verdict, env):
    """Return the stub of the object that answers, and the request as that object sees it.

    The verdict's headers go along. The session cookie does not: no slice needs it.
    """
    path = "/" + "/".join(request.path.split("/")[3:])
    if path.startswith("/_"):                            # a question of the server itself
        raise Refused(*NOTHING_HERE)
    viewer_headers = dict(verdict.headers)
    headers = {**stripped(request).headers, **viewer_headers}
    headers.pop("cookie", None)
    forwarded = request._replace(path=path, headers=headers)
    if path.split("/")[1] == "members":                  # who is a member is policy
        return env.directory, forwarded
    return env.workspaces.get(viewer_headers["x-id"]), forwarded


# ==== 3. Markup ===========================================================================
# The idea: text becomes markup in one place only. A template has holes; what goes into a
#   hole is escaped unless it is Html, and only templates make Html.
# It promises: markup that a user typed is text, between tags and in a quoted attribute. Two
#   places are left to think of, and no user's text may fill a hole there: an attribute that
#   is code (data-on:..., data-signals: Datastar runs it), and an address (href).
# Who uses it: every region and every page.

TEMPLATES = pathlib.Path(__file__).resolve().parent / "templates"
HOLE = re.compile(r"\{\{ ?(\w+) ?\}\}")
PART = re.compile(r"(?m)^<!-- (\w+) -->\n")


class Html(str):
    """Markup known to be safe. Joined to plain text by + it is plain text again."""
    __slots__ = ()

    def join(self, pieces: Sequence[Any]) -> Html:
        return Html(str.join(self, map(escape, pieces)))


def escape(value: Any) -> Html:
    if type(value) is Html:
        return value
    return Html(html.escape(str(value)))


class Template:
    """Markup with holes: Template("<b>{{who}}</b>")(who="<x>") is "<b>&lt;x&gt;</b>".

    A line `<!-- row -->` begins the part "row", a template of its own. The hole {{row}} of
    any part takes text or Html; or a dict, or a row of a store, with which the part of that
    name is filled, once; or a list of these, once for each. False stands for nothing. True
    stands for the part as it is or, where there is none of this name, for the name itself:
    <input {{checked}}>. Raises KeyError if a hole is not filled.
    """

    def __init__(self, text: str, parts: Optional[Dict[str, Template]] = None):
        first, *rest = PART.split(text)
        self.pieces = HOLE.split(first.rstrip("\n"))     # markup, hole, markup, hole ...
        self.parts = {} if parts is None else parts
        for name, part in zip(rest[::2], rest[1::2]):
            self.parts[name] = Template(part, self.parts)

    def __call__(self, **values: Any) -> Html:
        return Html(self.filled(values))

    def filled(self, values):
        pieces = self.pieces[:]
        pieces[1::2] = [self.fill(name, values) for name in pieces[1::2]]
        return "".join(pieces)

    def fill(self, name, values):
        if name not in values:
            raise KeyError(f"nothing fills the hole {name!r}")
        value = values[name]
        if type(value) is str:
            return html.escape(value)
        if value is True and name not in self.parts:
            return name
        if isinstance(value, (bool, dict, list, sqlite3.Row)):
            return self.fill_part(name, value, values)
        return escape(value)

    def fill_part(self, name, value, around):
        """Fill the part with each row; the values around it hold inside, too."""
        if isinstance(value, bool):
            rows = [{}] if value else []
        else:
            rows = value if isinstance(value, list) else [value]
        if rows and name not in self.parts:
            raise KeyError(f"there is no part {name!r} in this template")
        return "".join([self.parts[name].filled({**around, **row}) for row in rows])


@functools.lru_cache(maxsize=None)
def template(name: str) -> Template:
    """Return the file templates/<name>.html; for "todos.row", its part "row"."""
    file, _, part = name.partition(".")
    if part:
        return template(file).parts[part]
    return Template((TEMPLATES / f"{file}.html").read_text("utf-8"))


def page(title: str, body: Html, viewer: Optional[Viewer] = None, nav: Any = "",
         footer: Any = "", status: int = 200) -> Response:
    """Return a whole page.

    Its nonce is new each time. By the policy in section 14 the browser runs this server's
    own script files, and of the scripts inside a page only those that carry the nonce. So a
    script that somebody smuggled in does not run.
    """
    viewer = viewer or Viewer()
    nonce = secrets.token_hex(16)
    text = template("layout")(title=title, body=body, nonce=nonce, nav=nav, footer=footer,
                              account=viewer.account, signed=viewer.account != "",
                              masquerade=viewer.banner())
    return Response(status, text.encode("utf-8", "replace"), "text/html; charset=utf-8",
                    nonce=nonce)


# ==== 4. Events ===========================================================================
# The idea: the words that a page understands when they come down a stream.
# It promises: no text, whatever is in it, can end its own event and begin another.
# Who uses it: streams (section 8), and the edge to say goodbye.

def event(kind, text, options, event_id, retry):
    """Return a server-sent event (WHATWG HTML, 9.2.5): lines, and an empty one to end it.

    kind is "elements" or "signals". Raises ValueError for a line break outside of text.
    """
    lines = [f"event: datastar-patch-{kind}"]
    if event_id is not None:
        lines.append(f"id: {event_id}")
    if retry is not None:
        lines.append(f"retry: {retry}")
    lines += [f"data: {name} {value}" for name, value in options.items() if value]
    if re.search(r"[\r\n\0]", "".join(lines)):
        raise ValueError("a line break or NUL inside a line of an event")
    if text:
        text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "\ufffd")
        lines += [f"data: {kind} {line}" for line in text.split("\n")]
    return ("\n".join(lines) + "\n\n").encode("utf-8", "replace")


def patch_elements(elements: str = "", *, selector: Optional[str] = None,
                   mode: str = "outer", namespace: Optional[str] = None,
                   use_view_transition: bool = False, event_id: Optional[str] = None,
                   retry: Optional[int] = None) -> bytes:
    """Return an event that morphs elements into the page, by their own ids or at selector.

    mode: outer, inner, replace, prepend, append, before, after, remove. retry: in ms.
    """
    options = {"selector": selector, "mode": "" if mode == "outer" else mode,
               "namespace": namespace,
               "useViewTransition": "true" if use_view_transition else ""}
    return event("elements", elements, options, event_id, retry)


def read_signals(request: Request) -> Dict[str, Any]:
    """Return the signals that came along: of GET and DELETE in the query, else in the body.

    Raises Refused(400) if they are not a JSON object.
    """
    in_query = request.method in (*SAFE, "DELETE")
    text = request.params.get("datastar") if in_query else request.body
    with contextlib.suppress(ValueError, RecursionError):
        signals = json.loads(text or "{}")
        if isinstance(signals, dict):
            return signals
    raise Refused(400, "The signals are not a JSON object. Reload the page and try again.")


# ==== 5. Store ============================================================================
# The idea: one SQLite file behind five plain calls: query, one, exec, tx, migrate. They do
#   not wait for a network, so a region is an ordinary function from rows to markup.
# It promises: when tx ends, the transaction is on the disk (WAL, synchronous=FULL), and
#   only then are its messages sent. A slice reaches no table but its own; how, and how
#   tables are made, is in section 16.
# Who uses it: the object that owns the file, one thread at a time (section 7).

class Reads:
    """Two calls, by way of run(sql, args), which returns all rows."""

    def query(self, sql: str, *args: Any) -> List[sqlite3.Row]:
        return self.run(sql, args)

    def one(self, sql: str, *args: Any) -> Optional[sqlite3.Row]:
        """Return the first row, or None."""
        rows = self.run(sql, args)
        return rows[0] if rows else None


class Store(Reads):
    """A connection to one file. create=True makes it; otherwise it has to be there.

    Raises sqlite3.Error as it comes.
    """
    SETUP = "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA foreign_keys=ON"
    STATEMENTS = 100                                     # kept compiled by Python's sqlite3

    def __init__(self, path: pathlib.Path, create: bool = False):
        uri = f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}"
        self.path = path
        self.db = sqlite3.connect(uri, uri=True, timeout=5, isolation_level=None,
                                  check_same_thread=False,
                                  cached_statements=self.STATEMENTS)
        self.db.row_factory = sqlite3.Row
        self.db.executescript(self.SETUP)
        self.cursor = self.db.cursor()
        self.after_commit: List[Tuple[Any, ...]] = []    # calls: (function, *args)

    def exec(self, sql: str, *args: Any) -> int:
        """Return the number of rows that changed."""
        self.run(sql, args)
        return self.cursor.rowcount

    def run(self, sql, args):
        """Fetch all rows: a cursor with rows to come would keep a transaction open."""
        return self.cursor.execute(sql, args).fetchall()

    def state(self) -> Tuple[int, int]:
        """Return two numbers. While both stand still, no row has changed.

        The first counts what this connection wrote, the second moves when another did.
        """
        return self.db.total_changes, self.run("PRAGMA data_version", ())[0][0]

    def tx(self):
        """Use it as `with store.tx():`. All of what is inside happens, or nothing.

        Inside another tx it is a savepoint: it can fail alone.
        """
        return self.savepoint() if self.db.in_transaction else self.transaction()

    @contextlib.contextmanager
    def transaction(self):
        self.begin()
        try:
            yield
            self.run("COMMIT", ())
        except BaseException:
            self.after_commit = []
            if self.db.in_transaction:                   # SQLite may have given up already
                self.run("ROLLBACK", ())
            raise
        calls, self.after_commit = self.after_commit, []
        for call, *args in dict.fromkeys(calls):         # each thing is told once
            call(*args)

    def begin(self):
        """IMMEDIATE takes the write lock now. Later, SQLite could refuse it at once."""
        self.run("BEGIN IMMEDIATE", ())

    @contextlib.contextmanager
    def savepoint(self):
        mark = len(self.after_commit)
        self.run("SAVEPOINT part", ())
        try:
            yield
            self.run("RELEASE part", ())
        except BaseException:
            del self.after_commit[mark:]
            if self.db.in_transaction:
                self.run("ROLLBACK TO part", ())
                self.run("RELEASE part", ())
            raise

    def close(self) -> None:
        """The last connection that closes moves the write-ahead log into the file."""
        self.db.close()


# ==== 6. Bus ==============================================================================
# The idea: a topic is a name with a version. To publish is to move the version on and to
#   wake whoever waits for that. What changed is not said: they read the store again.
# It promises: nothing is told before the commit, and nothing at all after a rollback.
# Who uses it: commands publish, streams wait.

class Bus:
    """The topics of one object.

    turn is the object's lock, a threading.Condition. A thread that holds it can give it
    back and wait (wait_for), until a later holder wakes all who wait (notify_all).
    """

    def __init__(self, turn: threading.Condition, store: Store):
        self.turn = turn
        self.store = store
        # Versions begin at the present time in nanoseconds. So when an object has slept,
        # and another stands for it, no topic gets an old version again.
        start = time.time_ns()
        self.versions: Dict[str, int] = collections.defaultdict(lambda: start)
        self.listeners: List[Callable[[str], None]] = []     # [2]
        self.waiting = 0                                 # streams that are inside wait()

    def publish(self, topic: str) -> None:
        """Tell everybody, when the present transaction commits."""
        if not self.store.db.in_transaction:
            raise PermissionError(f"publishes {topic!r}, which only a command or a job may")
        self.store.after_commit.append((self.tell, topic))

    def tell(self, topic):
        self.versions[topic] += 1
        self.turn.notify_all()
        for listener in self.listeners:
            listener(topic)

    def wait(self, topic: str, seen: int, seconds: float) -> None:
        """Wait until the topic has left the version seen, or for so many seconds.

        The caller holds the turn. The Condition gives it back meanwhile.
        """
        self.waiting += 1
        try:
            self.turn.wait_for(lambda: self.versions[topic] != seen, seconds)
        finally:
            self.waiting -= 1


# ==== 7. Objects ==========================================================================
# The idea: a Durable Object is one SQLite file and one lock, called its turn. Everything
#   that happens to a team's rows happens in one place, one request after the other, so
#   nothing has to be coordinated. `fetch` holds the turn; only `wait` gives it back.
# It promises: a command is one transaction. It is on the disk before it is answered, or
#   nothing of it happened. An object sleeps only if nobody asked it for a while, nobody is
#   served, and no stream is inside `wait`. To sleep means: its file is closed, the object
#   is forgotten. The next request builds another one, which opens the file again.
# Who uses it: the worker, by a Stub: the address of an object, awake or not.
# Locks are taken in this order: a turn, then a namespace's lock; never the reverse. No
#   object fetches from another that might fetch from it. Only one process may serve a data
#   folder; Part Three sees to that.

class DurableObject:
    """Subclasses say which tables they need (schema) and answer requests (handle)."""
    schema: Sequence[Tuple[str, Sequence[str]]] = ()     # slices, with their migrations
    handle: Callable[[Request], Response]

    def __init__(self, id: str, namespace: Namespace):
        self.id = id
        self.namespace = namespace
        self.turn = threading.Condition(threading.Lock())
        self.used = time.monotonic()
        self.gone = False                                # asleep: another takes its place
        self.store: Optional[OwnedStore] = None          # None: not opened yet
        self.bus: Optional[Bus] = None

    def connect(self, create: bool) -> OwnedStore:
        return OwnedStore(self.namespace.path(self.id), create)

    def open(self, create: bool = False) -> None:
        self.store = self.connect(create)
        try:
            for slice, entries in self.schema:
                self.store.migrate(slice, entries)
            self.store.learn_owners()
            self.bus = Bus(self.turn, self.store)
            self.on_open()
        except BaseException:
            self.store.close()
            self.store = None
            self.bus = None
            raise

    def on_open(self) -> None:
        """What a subclass remembers of its file begins anew here. [2, 3]"""

    def answer(self, request: Request) -> Response:
        """Answer one request. The caller holds the turn: see Stub.fetch."""
        self.used = time.monotonic()
        if self.store is None:
            self.open()
        if request.method in SAFE:
            return self.handle(request)
        return self.command(request)

    def command(self, request: Request) -> Response:
        with self.store.tx():
            return self.handle(request)

    def sleep(self, since: float) -> None:
        """Close the file, unless the object was used after since, or is in use now."""
        if self.used > since or not self.turn.acquire(blocking=False):
            return
        try:
            if self.used <= since and not self.gone and not self.watched:
                self.close()
        finally:
            self.turn.release()

    @property
    def watched(self) -> bool:
        return self.bus is not None and self.bus.waiting > 0

    def close(self) -> None:
        """The caller holds the turn. From here on another object may open the file."""
        try:
            if self.store:
                self.store.close()
        finally:
            self.store = None
            self.bus = None
            self.gone = True
            self.namespace.forget(self)


class Stub(NamedTuple):
    """The address of an object. It is all that others ever hold of one."""
    id: str
    namespace: Namespace

    def fetch(self, request: Request) -> Response:
        """Take the turn, then ask."""
        while True:
            one = self.namespace.awake(self.id)
            with one.turn:
                if not one.gone:                         # else it fell asleep just now
                    return one.answer(request)

    def ask(self, path: str, query: str = "", headers: Dict[str, str] = {},
            scheme: str = "http") -> Any:
        """Ask a question of the server itself. Return the answer, taken out of its JSON."""
        question = Request("GET", path, query, headers, scheme=scheme)
        return json.loads(self.fetch(question).body)


class Namespace:
    """All objects of one kind: their files, in one folder, and those that are awake.

    build(id, namespace) returns an object. idle: seconds until an unused one goes to sleep.
    """

    def __init__(self, kind: str, folder: pathlib.Path, idle: float,
                 build: Callable[[str, Namespace], DurableObject]):
        self.kind = kind
        self.folder = folder
        self.idle = idle
        self.build = build
        self.closed = False
        self.lock = threading.Lock()                     # guards the next line
        self.objects: Dict[str, DurableObject] = collections.OrderedDict()

    def id_from_name(self, name: str) -> str:
        """Return 64 hexadecimal digits, always the same for a name.

        So what users type never names a file.
        """
        return hashlib.sha256(f"{self.kind}:{name}".encode()).hexdigest()

    def path(self, id: str) -> pathlib.Path:
        return self.folder / f"{id}.db"

    def get(self, id: str) -> Stub:
        return Stub(id, self)

    def create(self, id: str) -> None:
        """Make the file of a new object.

        Nothing else makes one. A file that is missing later was lost; it is not made anew.
        """
        made = self.build(id, self)
        made.open(create=True)
        made.store.close()

    def draft(self) -> str:
        """Make a file for an object whose id is not known yet. Return a temporary id."""
        id = f"new-{secrets.token_hex(8)}"
        self.create(id)
        return id

    def tidy(self) -> None:
        """Remove the drafts that a crash left behind. Only when a server starts."""
        for file in self.folder.glob("new-*.db*"):
            file.unlink()

    def name_draft(self, draft: str, id: str) -> None:
        """Give the file its real id.

        Raises Refused(422) if a file of this id has rows: they are of a workspace that no
        Directory knows any more. A file without rows was left behind by a command that
        failed, and is replaced.
        """
        place = self.path(id)
        if place.exists():
            with contextlib.closing(Store(place)) as store:
                if store.one("SELECT 1 FROM journal"):
                    raise Refused(*TAKEN)
        self.path(draft).rename(place)
        sync_folder(self.folder)

    def awake(self, id: str) -> DurableObject:
        """Return the object that stands for this id now. Build one if there is none.

        It opens its file with its first answer.
        """
        if self.closed:
            raise Refused(503, "The server is stopping. Try again in a moment.")
        with self.lock:
            if id not in self.objects:
                self.objects[id] = self.build(id, self)
            return self.objects[id]

    def forget(self, one: DurableObject) -> None:
        with self.lock:
            if self.objects.get(one.id) is one:
                del self.objects[one.id]

    def everybody(self) -> List[DurableObject]:
        with self.lock:
            return list(self.objects.values())

    def rest(self, idle: Optional[float] = None) -> None:
        """Put to sleep all objects that were not asked for `idle` seconds."""
        since = time.monotonic() - (self.idle if idle is None else idle)
        for one in self.everybody():
            one.sleep(since)

    def close(self) -> None:
        """At the end of the server: wait for each object's turn, and close its file."""
        self.closed = True
        for one in self.everybody():
            with one.turn:
                if not one.gone:
                    one.close()


def sync_folder(folder: pathlib.Path) -> None:
    """Make the names in a folder durable, where it can be opened (POSIX)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class Watch(NamedTuple):
    """What a stream waits for: that a topic leaves the version that was shown."""
    stub: Stub
    topic: str
    version: int

    def wait(self, seconds: float) -> None:
        one = self.stub.namespace.awake(self.stub.id)
        with one.turn:
            if one.bus:                                  # else it slept: ask again at once
                one.bus.wait(self.topic, self.version, seconds)


# ==== 8. Slices ===========================================================================
# The idea: a feature is a value. It lists its tables, its live pages and its commands. Each
#   live page and each command names the grant that it takes, so none can be forgotten.
# It promises: what all slices need is done here, once, by their host. It checks the grant
#   of the route: the gate says which grants somebody has, not which one a route takes. A
#   write leaves a row in the journal, in the same transaction. A region is rendered once
#   for each role and state of the store, however many people look.
# Who uses it: Workspace and Directory are hosts; todos and directory are slices.

class Route(NamedTuple):
    """A way to call a slice. run(ctx, *args) returns a Response.

    args are what stood for the <parts> of the path. form: the page on which the form for
    this is, if it has another path.
    """
    method: str
    path: str
    grant: str
    run: Callable[..., Response]
    form: str = ""


def only_the_region(ctx, region):
    """The page of a slice that has nothing to say around its region."""
    return template("slice")(region=region, live=True)


class Live(NamedTuple):
    """A page at path and, at path + "/live", a stream of the region in it.

    region(ctx) returns Html, one element with an id. It only reads, and is called again
    after each publish of topic. page(ctx, region) returns what stands around it. params:
    the parameters of the query that both depend on, each with the pattern of its values.
    """
    path: str
    grant: str
    topic: str
    title: str
    region: Callable[[Context], Html]
    page: Callable[[Context, Html], Html] = only_the_region
    params: Dict[str, str] = {}

    def heeded(self, params: Dict[str, str]) -> Dict[str, str]:
        """Return those of params that the page depends on, if their value is valid."""
        return {name: params[name] for name, pattern in self.params.items()
                if name in params and re.fullmatch(pattern, params[name])}

    def routes(self):
        return (Route("GET", self.path, self.grant, lambda ctx: ctx.host.page(self, ctx)),
                Route("GET", f"{self.path}/live", self.grant,
                      lambda ctx: ctx.host.stream(self, ctx)))


class Slice(NamedTuple):
    """A feature. The last three are for [3].

    count(store) says how full a workspace is. jobs: work that is done later. exports:
    functions (store, ...) that other slices may ask.
    """
    name: str
    migrations: Sequence[str] = ()
    live: Sequence[Live] = ()
    routes: Sequence[Route] = ()
    count: Optional[Callable[[Tables], int]] = None
    jobs: Sequence[Callable[..., None]] = ()
    exports: Sequence[Callable[..., Any]] = ()


class Context:
    """What a slice is given to answer one request. After that it can't be used any more.

    The context of a region is shared by a role: its viewer is a Role, and there is no
    request.
    """
    __slots__ = ("host", "store", "viewer", "params", "typed", "_request")

    def __init__(self, host: SliceHost, store: Tables, viewer: Role, params: Dict[str, str],
                 request: Optional[Request], typed: Dict[str, str]):
        self.host = host                                 # for slices of the server itself
        self.store = store
        self.viewer = viewer
        self.params = params                             # of the query; see Live.params
        self.typed = typed                               # see SliceHost.refuse
        self._request = request

    @property
    def request(self) -> Request:
        if self._request is None:
            raise PermissionError(NOT_SHARED.format("request"))
        return self._request

    @property
    def workspace(self) -> str:
        """Its name."""
        return self.viewer.workspace

    def publish(self, topic: str) -> None:
        """Have all regions with this topic read again, when the command commits."""
        if self.store.may != WRITE:
            raise PermissionError(f"publishes {topic!r}, which only a command or a job may")
        self.store.check_thread()
        self.host.bus.publish(self.host.topic(topic, self.viewer))

    def field(self, name: str, otherwise: str = "") -> str:
        """Return what was sent along under this name, as text."""
        return str(self.request.fields().get(name, otherwise))

    def for_page(self, live: Live) -> Context:
        params = live.heeded(self.params)
        return type(self)(self.host, self.store, self.viewer, params, self.request,
                          self.typed)

    def shared(self, live: Live) -> Context:
        """Return the context of the region: the same for a whole role."""
        params = live.heeded(self.params)
        return type(self)(self.host, self.store, self.viewer.shared(), params, None, {})

    def end(self) -> None:
        self.store.thread = 0
        self.host = None


@dataclasses.dataclass
class Rendering:
    """A region at one state of the store, made once for all who may see the same."""
    html: Html
    made: float                                          # when, by time.perf_counter()
    micros: int                                          # how long it took

    @functools.cached_property
    def frame(self) -> bytes:
        """What a stream gets."""
        return patch_elements(self.html)


REGION = re.compile(r"""\s*<\w(?:[^>"']|"[^"]*"|'[^']*')*?\sid\s*=""")   # it has an id


class Router:
    """Finds slice and route for a request. One is made for all objects of a kind."""

    def __init__(self, slices: Sequence[Slice]):
        self.slices = slices
        self.schema = [("orion", HISTORY)]
        self.schema += [(slice.name, slice.migrations) for slice in slices]
        self.rows: List[Tuple[re.Pattern, str, Route]] = []
        for slice in slices:
            pages = [route for live in slice.live for route in live.routes()]
            for route in (*pages, *slice.routes):
                pattern = re.sub(r"<\w+>", "([^/]+)", re.escape(route.path))
                self.rows.append((re.compile(pattern), slice.name, route))

    def match(self, method: str, path: str) -> Tuple[str, Route, Sequence[str]]:
        """Return the slice's name, the route and its args. Raises Refused(404), (405)."""
        methods = set()
        for pattern, slice, route in self.rows:
            found = pattern.fullmatch(path)
            if found and route.method == method:
                return slice, route, found.groups()
            if found:
                methods.add(route.method)
        if not methods:
            raise Refused(*NOTHING_HERE)
        if "GET" in methods:
            methods.add("HEAD")
        allow = ", ".join(sorted(methods))
        raise Refused(405, f"This address takes {allow}.", (("allow", allow),))


# The tables of each host. A list of migrations that ran somewhere can't be changed, so the
# table of jobs [3] stands here, too.
HISTORY = (
    "CREATE TABLE journal (id INTEGER PRIMARY KEY, at REAL NOT NULL, who TEXT NOT NULL, "
    "what TEXT NOT NULL, which TEXT NOT NULL)",
    "CREATE TABLE jobs (id INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL, args TEXT "
    "NOT NULL, who TEXT NOT NULL, due REAL, tries INTEGER NOT NULL DEFAULT 0, error TEXT "
    "NOT NULL DEFAULT '')",
    "CREATE INDEX jobs_due ON jobs (due)",
)


NO_VIEWER = dict.fromkeys(("x-account", "x-role", "x-grants", "x-workspace", "x-id"), "")


class SliceHost(DurableObject):
    """An object that runs slices. pages: those that the navigation shows."""
    context = Context                                    # [3] has one with more in it

    def __init__(self, id: str, namespace: Namespace, router: Router,
                 pages: Sequence[Live]):
        super().__init__(id, namespace)
        self.router = router
        self.schema = router.schema
        self.pages = pages
        self.state: Any = None                           # of the store, for the next line
        self.renderings: Dict[Tuple[Any, ...], Rendering] = {}

    def viewer(self, request: Request) -> Viewer:
        """Return what the verdict says, in headers that only the worker can set."""
        header = {**NO_VIEWER, **request.headers}
        grants = tuple(header["x-grants"].split(",")) if header["x-grants"] else ()
        return Viewer(header["x-role"], grants, header["x-workspace"], header["x-id"],
                      header["x-account"])

    def topic(self, name: str, viewer: Role) -> str:
        """Return how the bus of this object calls a slice's topic."""
        return name

    def router_for(self, request: Request) -> Router:
        return self.router

    # -- a request

    def handle(self, request: Request) -> Response:
        if request.path in self.OWN:
            return as_json(self.OWN[request.path](self, request))
        return self.run(request, {})

    def run(self, request, typed):
        """Have the right slice answer. typed: see refuse."""
        router = self.router_for(request)
        slice, route, args = router.match(request.method, request.path)
        viewer = self.viewer(request)
        viewer.permit(route.grant, request.method)
        may = READ if request.method in SAFE else WRITE
        before = self.store.db.total_changes
        store = Tables(self.store, slice, may)
        ctx = self.context(self, store, viewer, request.params, request, typed)
        try:
            response = sound(route.run(ctx, *args))
        finally:
            ctx.end()
        if self.store.db.total_changes != before:        # no slice can forget the journal
            which = response.which or "/".join(args) or self.last_row()
            self.journal(viewer, f"{slice}.{route.run.__name__}", which)
        return response

    def last_row(self):
        return str(self.store.one("SELECT last_insert_rowid()")[0])

    def journal(self, viewer: Viewer, what: str, which: str) -> None:
        """Note who did what, and to which row."""
        self.store.exec("INSERT INTO journal (at, who, what, which) VALUES (?, ?, ?, ?)",
                        time.time(), viewer.signature, what, which)

    def command(self, request: Request) -> Response:
        try:
            return super().command(request)
        except Refused as refused:
            return self.refuse(request, refused)

    def refuse(self, request, refused):
        """Show what is wrong with the input where it was typed, if that is possible.

        For Datastar, return a signal. For a plain form, return its page again with status
        422; there ctx.typed has what was typed and, as "problem", what is wrong with it.
        Otherwise raise refused.
        """
        if request.datastar and refused.status in (409, 422):
            return as_json({refused.signal: refused.message})
        if refused.status != 422 or not request.form:
            raise refused
        try:
            _, route, _ = self.router_for(request).match(request.method, request.path)
            path = route.form or request.path
            again = request._replace(method="GET", path=path, query="")
            typed = {**request.fields(), "problem": refused.message}
            return self.run(again, typed)._replace(status=422)
        except Refused:                                  # there is no page at this path
            raise refused from None

    # Questions of the server itself, (host, request): the worker lets none in from outside.
    OWN: Dict[str, Callable[[Any, Request], Any]] = {}

    # -- live pages

    def rendering(self, live: Live, ctx: Context) -> Rendering:
        """Return the region as this role sees it; make it, if nobody has asked before."""
        state = self.store.state()
        if state != self.state:                          # what was made before may be old
            self.renderings.clear()
            self.state = state
        shared = ctx.shared(live)
        key = live.path, shared.viewer, tuple(shared.params.items())
        if key not in self.renderings:
            self.renderings[key] = self.render(live, shared)
        return self.renderings[key]

    def render(self, live: Live, ctx: Context) -> Rendering:
        made = time.perf_counter()
        region = live.region(ctx)
        micros = round(1e6 * (time.perf_counter() - made))
        if type(region) is not Html or not REGION.match(region):
            raise TypeError(f"the region of {live.path} is to be Html, one element with an "
                            f"id, and not {region!r:.200}")
        return Rendering(region, made, micros)

    def stream(self, live: Live, ctx: Context) -> Response:
        """Return the region as it is now, and what to wait for before asking again."""
        rendering = self.rendering(live, ctx)
        topic = self.topic(live.topic, ctx.viewer)
        watch = Watch(self.namespace.get(self.id), topic, self.bus.versions[topic])
        return Response(200, rendering.frame, EVENTS, watch=watch)

    def page(self, live: Live, ctx: Context) -> Response:
        asked = time.perf_counter()
        rendering = self.rendering(live, ctx)
        body = live.page(ctx.for_page(live), rendering.html)
        title = f"{live.title} · {ctx.workspace}"
        footer = self.xray(rendering, ctx, fresh=rendering.made > asked)
        return page(title, body, ctx.viewer, self.navigation(live, ctx), footer)

    def navigation(self, current, ctx):
        links = [{"path": live.path, "title": live.title,
                  "current": live.path == current.path} for live in self.pages]
        nav = template("layout.workspace")
        return nav(workspace=ctx.workspace, link=links, state=True)

    def xray(self, rendering, ctx, fresh):
        """The foot of a page: which object served it, to whom, and what they may."""
        viewer = ctx.viewer
        return template("xray")(
            id=self.id, file=self.namespace.path(self.id).name, account=viewer.account,
            role=viewer.role, grants=", ".join(viewer.grants),
            check="yes" if viewer.can("todos:delete") else "no",
            how="just now, in" if fresh else "from the cache; it took",
            micros=rendering.micros, more=self.xray_more(ctx))

    def xray_more(self, ctx):
        """[2] knows who else looks."""
        return ""


def done(ctx: Context, which: str = "", **signals: Any) -> Response:
    """Answer a command: with signals for its sender or, after a plain form, with the page.

    What it changed is not in it: the region brings that to everybody, the sender included.
    which: what it wrote, for the journal; by default what stood in the path.
    """
    if ctx.request.form and not ctx.request.datastar:
        first = ctx.request.path.split("/")[1]
        return see_other(f"/w/{ctx.workspace}/{first}")._replace(which=which)
    answer = as_json(signals) if signals else Response(204)
    return answer._replace(which=which)


# ==== 9. Todos ============================================================================
# The idea: a slice like any other, and the pattern for your own: a table, a region, a page,
#   commands. Each command has the same shape: validate, write, publish, done.
# It promises: it knows nothing of teams, sockets or sessions.
# Who uses it: the workspaces; section 15 puts it into the list of slices. The grants of a
#   new slice are added to ROLES (section 12).
#
# Its template is templates/todos.html, which is in short:
#
#     <h1>{{workspace}}</h1> {{form}} {{region}}
#     <div id="live" data-init="@get('./todos/live', {retry: 'always'})"></div>
#     <!-- form -->
#     <form data-on:submit="@post('./todos', {payload: {title: $title}})"> ... </form>
#     <!-- region -->
#     <section id="todos"> {{open}} of {{all}} remaining <ul>{{row}}</ul> </section>
#     <!-- row -->
#     <li id="todo-{{id}}"> <input type="checkbox" {{checked}}> {{title}} {{delete}} </li>

TITLE_LIMIT = 500                                        # characters
TODOS_A_PAGE = 200
MOST_PAGES = 25
SHOWN = {"": "", "open": "WHERE NOT done", "done": "WHERE done"}     # by the parameter show


def some_todos(store, show, limit):
    """Return the newest todos."""
    return store.query(f"SELECT id, title, done FROM todos {SHOWN[show]} ORDER BY id DESC "
                       "LIMIT ?", limit)


def todo_counts(store):
    return store.one('SELECT count(*) AS "all", count(*) FILTER (WHERE NOT done) AS open '
                     "FROM todos")


def count_todos(store):
    return todo_counts(store)["open"]


@functools.lru_cache(maxsize=512)
def todo_row(id, title, done, write, delete):
    """Return the markup of a row. Most rows are as before, and are not made again."""
    return template("todos.row")(id=id, title=title, checked=bool(done), disabled=not write,
                                 delete=delete)


def todos_region(ctx):
    show = ctx.params.get("show", "")
    most = TODOS_A_PAGE * int(ctx.params.get("pages", 1))
    found = some_todos(ctx.store, show, most + 1)
    shown = found[:most]
    write = ctx.viewer.can("todos:write")
    delete = ctx.viewer.can("todos:delete")
    rows = [todo_row(*todo, write, delete) for todo in shown]
    next_page = todos_query(show, most // TODOS_A_PAGE + 1)
    empty = "" if rows else template(f"todos.empty_{show or 'all'}")()
    more = len(found) > most and most < MOST_PAGES * TODOS_A_PAGE
    return template("todos.region")(
        row=Html().join(rows), empty=empty, more=more, next=next_page,
        last=shown[-1]["id"] if shown else "", **todo_counts(ctx.store))


def todos_query(show, pages):
    shown = {"show": show} if show else {}
    return urllib.parse.urlencode({**shown, "pages": pages})


def todos_page(ctx, region):
    show = ctx.params.get("show", "all")
    links = {name: name == show and template("todos.current")()
             for name in ("all", "open", "done")}
    write = ctx.viewer.can("todos:write")
    return template("todos")(
        region=region, workspace=ctx.workspace, variant=urllib.parse.urlencode(ctx.params),
        form=write, readonly=not write, toggle=write, clear=ctx.viewer.can("todos:delete"),
        title=ctx.typed.get("title", ""), problem=ctx.typed.get("problem", ""), **links)


def the_todo(ctx, id):
    """Return the row of a todo. Raise Refused(404) if there is none."""
    number = int(id) if re.fullmatch("[0-9]{1,18}", id) else None
    todo = ctx.store.one("SELECT id, title, done FROM todos WHERE id = ?", number)
    if todo is None:
        raise Refused(404, "This todo is gone. The page shows what there is now.")
    return todo


def valid_title(fields, signal="problem"):
    """Return the title among the fields. Raise Refused(422) if it is no good."""
    given = fields.get("title")
    title = given.strip() if isinstance(given, str) else ""
    if not 1 <= len(title) <= TITLE_LIMIT:
        raise Refused(422, f"A title has 1 to {TITLE_LIMIT} characters; this one has "
                           f"{len(title)}.", signal=signal)
    return title


def valid_done(value):
    """Return the value. Raise Refused(400) if it is neither True nor False."""
    if type(value) is not bool:
        raise Refused(400, "done is true or false. Reload the page and try again.")
    return value


def create(ctx):
    title = valid_title(ctx.request.fields())
    ctx.store.exec("INSERT INTO todos (title) VALUES (?)", title)
    ctx.publish("todos")
    return done(ctx, title="", problem="")


def change(ctx, id):
    """Set the title or the done of the signals. If neither is given, tick or untick it."""
    todo = the_todo(ctx, id)
    fields = ctx.request.fields()
    title = valid_title(fields, "toast") if "title" in fields else todo["title"]
    toggled = not todo["done"] if "title" not in fields else bool(todo["done"])
    ticked = valid_done(fields.get("done", toggled))
    ctx.store.exec("UPDATE todos SET title = ?, done = ? WHERE id = ?", title, ticked,
                   todo["id"])
    ctx.publish("todos")
    return done(ctx)


def delete(ctx, id):
    ctx.store.exec("DELETE FROM todos WHERE id = ?", the_todo(ctx, id)["id"])
    ctx.publish("todos")
    return done(ctx)


def change_all(ctx):
    """Set all to the signal done. Without it, tick all; if all are ticked, untick them."""
    some_are_open = count_todos(ctx.store) > 0
    ticked = valid_done(ctx.request.fields().get("done", some_are_open))
    ctx.store.exec("UPDATE todos SET done = ? WHERE done <> ?", ticked, ticked)
    ctx.publish("todos")
    return done(ctx, "all")


def clear(ctx):
    ctx.store.exec("DELETE FROM todos WHERE done")
    ctx.publish("todos")
    return done(ctx, "done ones")


todos = Slice(
    name="todos",
    migrations=("CREATE TABLE todos (id INTEGER PRIMARY KEY AUTOINCREMENT, title TEXT NOT "
                "NULL, done INTEGER NOT NULL DEFAULT 0)",),
    live=(Live("/todos", "todos:read", "todos", "Todos", todos_region, todos_page,
               params={"show": "open|done", "pages": "[2-9]|1[0-9]|2[0-5]"}),),    # 25
    routes=(Route("POST", "/todos", "todos:write", create),
            Route("PATCH", "/todos", "todos:write", change_all),
            Route("DELETE", "/todos", "todos:delete", clear),
            Route("PATCH", "/todos/<id>", "todos:write", change),
            Route("DELETE", "/todos/<id>", "todos:delete", delete)),
    count=count_todos, exports=(count_todos,))


# ==== 10. Workspace =======================================================================
# The idea: the data plane. One team's rows and nothing else: the connection is to this
#   file, so there is no query that could reach another team.
# It promises: SliceHost.run checks the grant of the route before any code of a slice runs.
#   The gate decides who comes in, this check what they may do inside. That a page hides a
#   button is only a courtesy.
# Who uses it: the worker, after a verdict of 200.

class Workspace(SliceHost):
    """What it does comes from its slices."""


def front_page(ctx):
    return see_other(f"/w/{ctx.workspace}{ctx.host.pages[0].path}")


welcome = Slice("welcome", routes=(Route("GET", "/", MEMBER, front_page),))


# ==== 11. Sessions ========================================================================
# The idea: a cookie carries a random token and a seal over it: an HMAC, made with a key
#   that only this server has. The Directory keeps the token's hash, never the token.
# It promises: a forged cookie never reaches a database. A stolen copy of the table signs
#   nobody in: there is no way from a hash back to its token, nor to a seal without the key.
#   To compare a wrong seal takes as long as to compare a right one.
# Who uses it: the Directory.

SESSION_SECONDS = 30 * 86400
COOKIE_SECONDS = 400 * 86400                             # the most; the session ends first
COOKIES = {"http": "sid", "https": "__Host-sid"}         # by scheme (RFC 6265bis, 4.1.3.2)


class Unusable(Exception):
    """It can't be done. The text is one line that says why, and what to do."""


def make_key(path: pathlib.Path) -> None:
    """Write the server's key, at its first start, readable by nobody else."""
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with open(handle, "w") as file:
        file.write(secrets.token_hex(32) + "\n")


def load_keys(path: pathlib.Path) -> Tuple[bytes, ...]:
    """Return the keys in the file, the newest first; older ones still hold.

    Raise Unusable if there are none, or if others can read them.
    """
    lost = "restore it from a backup; without it everybody is signed out"
    if not path.exists():
        raise Unusable(f"{path} is missing; {lost}")
    if os.name == "posix" and os.stat(path).st_mode & 0o077:
        raise Unusable(f"{path} can be read by others; chmod 600 it, and consider "
                       "`keys rotate`")
    lines = path.read_bytes().split()
    if not lines or not all([re.fullmatch(b"[0-9a-f]{64}", line) for line in lines]):
        raise Unusable(f"{path} holds no keys, or more than keys; {lost}")
    return tuple([bytes.fromhex(line.decode()) for line in lines])


def seal(token: str, key: bytes) -> str:
    return hmac.digest(key, b"session:" + token.encode(), "sha256").hex()


def token_hash(token: str) -> bytes:
    """Return what the Directory knows a session by."""
    return hashlib.sha256(token.encode()).digest()


SEALED_TOKEN = re.compile(r"([A-Za-z0-9_-]{43})\.([0-9a-f]{64})")


def session_digest(header: str, name: str, keys: Sequence[bytes]) -> Optional[bytes]:
    """Return the token's hash, from a Cookie header.

    Return None if there is no cookie of this name, or two of them (then one was planted),
    or if it was not sealed here.
    """
    pairs = [pair.strip().partition("=") for pair in header.split(";")]
    values = [value for key, _, value in pairs if key == name]
    found = SEALED_TOKEN.fullmatch(values[0]) if len(values) == 1 else None
    if found is None:
        return None
    token, sealed = found.groups()
    genuine = [hmac.compare_digest(seal(token, key), sealed) for key in keys]
    return token_hash(token) if any(genuine) else None


def set_cookie(scheme: str, value: str, seconds: int) -> Tuple[str, str]:
    attributes = f"Path=/; Max-Age={seconds}; HttpOnly; SameSite=Lax"
    if scheme == "https":
        attributes += "; Secure"
    return "set-cookie", f"{COOKIES[scheme]}={value}; {attributes}"


# ==== 12. Directory =======================================================================
# The idea: the control plane: who exists, who is signed in, who belongs where and in which
#   role. All policy is here and nowhere else.
# It promises: the gate reads its tables each time, so a membership that ended a moment ago
#   is over. It refuses a workspace of other people and one that does not exist in the same
#   words. (To try to create one does tell that a name is taken.)
# Who uses it: the worker, for each verdict, and for the pages outside of the workspaces.

ROLES: Dict[str, Tuple[str, ...]] = {
    "owner": ("todos:read", "todos:write", "todos:delete", "members:manage",
              "workspace:delete"),
    "admin": ("todos:read", "todos:write", "todos:delete", "members:manage"),
    "member": ("todos:read", "todos:write"),
    "viewer": ("todos:read",),
}

# The history of its tables: what ran once is never edited. Part One uses accounts,
# sessions, workspaces and memberships; all other tables and columns are for [3].
DIRECTORY_TABLES = (
    "CREATE TABLE accounts (name TEXT PRIMARY KEY, label TEXT NOT NULL, password TEXT NOT "
    "NULL DEFAULT '', persona INTEGER NOT NULL DEFAULT 0, operator INTEGER NOT NULL "
    "DEFAULT 0) WITHOUT ROWID",
    "CREATE TABLE sessions (digest BLOB PRIMARY KEY, account TEXT NOT NULL REFERENCES "
    "accounts ON DELETE CASCADE, created REAL NOT NULL, expires REAL NOT NULL) WITHOUT "
    "ROWID",
    "CREATE INDEX sessions_of ON sessions (account)",
    "CREATE TABLE workspaces (id TEXT PRIMARY KEY, name TEXT UNIQUE, born TEXT NOT NULL) "
    "WITHOUT ROWID",
    "CREATE TABLE memberships (workspace TEXT NOT NULL REFERENCES workspaces ON DELETE "
    "CASCADE, account TEXT NOT NULL REFERENCES accounts ON DELETE CASCADE, role TEXT NOT "
    "NULL, PRIMARY KEY (workspace, account)) WITHOUT ROWID",
    "CREATE INDEX memberships_of ON memberships (account)",
    "CREATE TABLE masquerades (digest BLOB PRIMARY KEY REFERENCES sessions ON DELETE "
    "CASCADE, account TEXT NOT NULL REFERENCES accounts ON DELETE CASCADE, writes INTEGER "
    "NOT NULL, until REAL NOT NULL) WITHOUT ROWID",
    "ALTER TABLE sessions ADD COLUMN agent TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE workspaces ADD COLUMN quota INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE workspaces ADD COLUMN moving INTEGER NOT NULL DEFAULT 0",
    "CREATE TABLE nodes (address TEXT PRIMARY KEY) WITHOUT ROWID",
    "ALTER TABLE workspaces ADD COLUMN node TEXT NOT NULL DEFAULT ''",
)

WORKSPACE_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
NAMES_A_PAGE = 24                                        # on the home page
SIGNED_IN = "SELECT account FROM sessions WHERE digest = ? AND expires > ?"
# [3] A workspace that is on another machine, or on its way there, can't be entered here.
MEMBERSHIP = """SELECT w.id, m.role FROM workspaces w JOIN memberships m
                ON m.workspace = w.id WHERE w.name = ? AND m.account = ?
                AND NOT w.moving AND w.node = ''"""
MINE = """SELECT w.id, w.name, m.role FROM memberships m JOIN workspaces w
          ON w.id = m.workspace WHERE m.account = ? AND w.name > ?
          ORDER BY w.name LIMIT ?"""

NO_SESSION = Response(401, b"Sign in first.\n")
NO_ENTRY = Response(403, b"This workspace is not yours, or there is none of that name. Ask "
                         b"its owner to invite you.\n")
TAKEN = (422, "There is a file of such a workspace already. Choose another name; an "
              "operator may move and import it.")


class Directory(SliceHost):
    """A host like any other, which also knows the keys, and the files of the workspaces.

    demo: everybody may sign in as a persona. limit: workspaces that one account may own.
    """

    def __init__(self, id, namespace, router, pages, keys: Sequence[bytes],
                 workspaces: Namespace, demo: bool = False, limit: int = 20):
        super().__init__(id, namespace, router, pages)
        self.keys = keys
        self.workspaces = workspaces
        self.demo = demo
        self.limit = limit

    def topic(self, name, viewer):
        """One object serves all workspaces: each has topics of its own."""
        return f"{name}:{viewer.id}" if viewer.id else name

    def answer(self, request):
        return super().answer(self.identified(request))

    def identified(self, request):
        """Replace the cookie by the session that it stands for: no slice sees a cookie."""
        headers = dict(request.headers)
        cookie = headers.pop("cookie", "")
        digest = session_digest(cookie, COOKIES[request.scheme], self.keys)
        if digest:
            headers["x-session"] = digest.hex()
        return request._replace(headers=headers)

    def session(self, request) -> Optional[sqlite3.Row]:
        """Return the account of a session that is valid; None if there is none."""
        if "x-session" not in request.headers:
            return None
        digest = bytes.fromhex(request.headers["x-session"])
        return self.store.one(SIGNED_IN, digest, time.time())

    def viewer(self, request):
        """Return whom the verdict names or, without one, whose session it is."""
        if "x-account" in request.headers:
            return self.still(super().viewer(request))
        row = self.session(request)
        return Viewer(account=row["account"]) if row else Viewer()

    def still(self, viewer):
        """Return the viewer with the role of now: it may have changed since the verdict."""
        if not viewer.account or not viewer.id:
            return viewer
        role = role_of(self.store, viewer.id, viewer.account)
        if role == NOT_A_MEMBER:
            raise Refused(NO_ENTRY.status, NO_ENTRY.body.decode().strip())
        grants = tuple([grant for grant in viewer.grants if grant in ROLES.get(role, ())])
        return dataclasses.replace(viewer, role=role, grants=grants)

    def place(self, ctx, name, owner):
        """Add a workspace. Its file was made before: see create_workspace_with_file.

        Raise Refused(422) for a name that is no good, or taken.
        """
        check_name(ctx.store, name)
        id = new_id(ctx.store, self.workspaces, name)
        add_rows(ctx.store, id, name, [(owner, "owner")])
        self.workspaces.name_draft(ctx.request.headers["x-file"], id)

    def accounts_of(self, where, args):
        """Return the accounts of the sessions that match where, an SQL condition."""
        sql = f"SELECT DISTINCT account FROM sessions WHERE {where}"
        return self.store.query(sql, *args)

    def personas(self, account: str) -> List[Dict[str, Any]]:
        """Return whom one can sign in as, by choosing them."""
        every = "SELECT name, label FROM accounts WHERE persona ORDER BY name"
        found = self.store.query(every) if self.demo else []
        return [{**row, "current": row["name"] == account} for row in found]

    def shows_console(self, viewer: Viewer) -> bool:
        """[3] has a console."""
        return False

    OWN = {"/_account": lambda self, request: self.viewer(request).account}


# -- the gate

def gate(ctx, workspace):
    """The verdict. 200: who they are in this workspace; 401: nobody; 403: no member."""
    account = ctx.viewer.account
    if not account:
        return NO_SESSION
    row = ctx.store.one(MEMBERSHIP, workspace, account)
    if row is None:
        return NO_ENTRY
    return verdict(account, row["role"], workspace, row["id"])


def verdict(account: str, role: str, workspace: str, id: str, **more: str) -> Response:
    """The 200 of the gate: headers that the worker passes on, and the same as JSON."""
    grants = ROLES.get(role, ())
    said = {"x-account": account, "x-role": role,
            "x-can-delete": "true" if "todos:delete" in grants else "false",
            "x-grants": ",".join(grants), "x-workspace": workspace, "x-id": id, **more}
    return as_json(said)._replace(headers=tuple(said.items()))


# -- signing in and out

def persona(ctx):
    """Sign in as the demo does it: by choosing who to be."""
    account = ctx.field("account")
    if not ctx.host.demo:
        raise Refused(*NOTHING_HERE)
    if not ctx.store.one("SELECT 1 FROM accounts WHERE name = ? AND persona", account):
        raise Refused(403, "This account is not part of the demo. Choose one that the home "
                           "page shows.")
    return open_session(ctx, account)


def open_session(ctx, account):
    """Begin a session; return the way to the page, with the cookie.

    The token is always new: one that somebody planted before is worth nothing.
    """
    close_session(ctx)
    now = time.time()
    ctx.store.exec("DELETE FROM sessions WHERE expires <= ?", now)
    token = secrets.token_urlsafe(32)
    agent = f"{ctx.request.peer} {ctx.request.headers.get('user-agent', '')}"[:200]
    row = token_hash(token), account, now, now + SESSION_SECONDS, agent
    ctx.store.exec("INSERT INTO sessions VALUES (?, ?, ?, ?, ?)", *row)
    value = f"{token}.{seal(token, ctx.host.keys[0])}"
    cookie = set_cookie(ctx.request.scheme, value, COOKIE_SECONDS)
    return see_other(local_path(ctx.field("next", "/")), cookie)._replace(which=account)


def logout(ctx):
    close_session(ctx)
    cookie = set_cookie(ctx.request.scheme, "", 0)
    return see_other("/", cookie)._replace(which=ctx.viewer.account)


def close_session(ctx):
    digest = bytes.fromhex(ctx.request.headers.get("x-session", ""))
    end_sessions(ctx, "digest = ?", digest)


def end_sessions(ctx, where, *args):
    """End the sessions that match where, an SQL condition, and their streams."""
    for row in ctx.host.accounts_of(where, args):
        access_changed(ctx, row["account"])
    ctx.store.exec(f"DELETE FROM sessions WHERE {where}", *args)


def access_changed(ctx, account):
    """Say that what this account may do has changed.

    [2] has no thread for each stream. It hears by this whose streams must ask the gate
    again. In Part One all of them do so every two seconds.
    """
    ctx.host.bus.publish(f"access:{account}")


# -- the home page, and new workspaces

def home(ctx):
    account = ctx.viewer.account
    personas = ctx.host.personas(account)
    if not account:
        body = template("home.welcome")(demo=bool(personas), persona=personas)
        return page("Welcome", body)
    counts = json.loads(ctx.request.headers.get("x-counts", "{}"))       # [3]
    mine = ctx.store.query(MINE, account, ctx.params.get("after", ""), NAMES_A_PAGE + 1)
    shown = [{**row, "count": counts.get(row["id"], "")} for row in mine[:NAMES_A_PAGE]]
    body = template("home")(
        workspace=shown, start=ctx.host.pages[0].path, none=not shown,
        more=len(mine) > NAMES_A_PAGE, after=shown[-1]["name"] if shown else "",
        demo=bool(personas), persona=personas, console=ctx.host.shows_console(ctx.viewer),
        name=ctx.typed.get("name", ""), problem=ctx.typed.get("problem", ""))
    return page("Workspaces", body, ctx.viewer)


def ask_directory(request, env):
    return env.directory.fetch(request)


def create_workspace(ctx):
    """Create a workspace; the caller becomes its owner. A name used again gets a new id."""
    account = ctx.viewer.account
    name = ctx.field("name").strip()
    owned = ctx.store.one("SELECT count(*) FROM memberships WHERE account = ? AND role = "
                          "'owner'", account)[0]
    if owned >= ctx.host.limit:
        raise Refused(422, f"You own {owned} workspaces, which is the limit here.")
    ctx.host.place(ctx, name, account)
    if ctx.request.form and not ctx.request.datastar:
        return see_other(f"/w/{name}{ctx.host.pages[0].path}")._replace(which=name)
    return done(ctx, name, name="", problem="")


def add_rows(store, id, name, people):
    """people: accounts with their roles."""
    store.exec("INSERT INTO workspaces (id, name, born) VALUES (?, ?, ?)", id, name, name)
    for account, role in people:
        store.exec("INSERT INTO memberships VALUES (?, ?, ?)", id, account, role)


def check_name(store, name):
    """Raise Refused(422) if no workspace can have this name, or one has it."""
    if not WORKSPACE_NAME.fullmatch(name):
        raise Refused(422, "A name has 1 to 63 characters: a to z, 0 to 9, and hyphens "
                           "inside.")
    if store.one("SELECT 1 FROM workspaces WHERE name = ?", name):
        raise Refused(422, f"The name {name} is taken. Choose another.")


def new_id(store, workspaces, name):
    before = store.one("SELECT count(*) FROM workspaces WHERE born = ?", name)[0]
    return workspaces.id_from_name(f"{name}#{before}" if before else name)


def create_workspace_with_file(request, env):
    """A door. Make the file of a workspace first, and only then ask the Directory.

    To make a file takes long. While the Directory's turn is held, every other request would
    wait for its verdict. The Directory then only renames the file.
    """
    signed_in = env.directory.ask("/_account", "", request.headers, request.scheme)
    if request.method != "POST" or not signed_in:
        return env.directory.fetch(request)
    draft = env.workspaces.draft()
    try:
        headers = {**request.headers, "x-file": draft}
        return env.directory.fetch(request._replace(headers=headers))
    finally:
        with contextlib.suppress(FileNotFoundError):     # it has its real id now
            env.workspaces.path(draft).unlink()


def to_home(ctx):
    """[3] has passwords, and a page for each account. Here one chooses a persona."""
    return see_other("/")


# ==== 13. Members =========================================================================
# The idea: who is in a workspace is policy. So this page of a workspace is the Directory's;
#   it is as live as every other.
# It promises: only owners make or change owners, and the last owner stays.
# Who uses it: every workspace has it beside the pages of its slices.

MEMBERS_OF = """SELECT a.name, a.label, m.role FROM memberships m JOIN accounts a
                ON a.name = m.account WHERE m.workspace = ? ORDER BY a.name"""
ROLE_OF = "SELECT role FROM memberships WHERE workspace = ? AND account = ?"
OWNERS_OF = "SELECT count(*) FROM memberships WHERE workspace = ? AND role = 'owner'"
NOT_A_MEMBER = ""                                        # in the place of a role


def role_choice(viewer, chosen):
    """Return the roles that this viewer can give. Only an owner makes owners."""
    return [{"role": role, "selected": role == chosen} for role in ROLES
            if role != "owner" or viewer.role == "owner"]


def member_row(viewer, member):
    over_them = member["role"] != "owner" or viewer.role == "owner"
    managed = viewer.can("members:manage") and over_them
    choice = role_choice(viewer, member["role"])
    return {**member, "option": choice, "managed": managed, "fixed": not managed}


def members_region(ctx):
    members = ctx.store.query(MEMBERS_OF, ctx.viewer.id)
    rows = [member_row(ctx.viewer, member) for member in members]
    return template("members.region")(member=rows, all=len(rows))


def members_page(ctx, region):
    typed = ctx.typed
    return template("members")(
        region=region, workspace=ctx.workspace, me=ctx.viewer.account,
        form=ctx.viewer.can("members:manage"), account=typed.get("account", ""),
        option=role_choice(ctx.viewer, typed.get("role", "member")),
        problem=typed.get("problem", ""))


def role_of(store, id, account):
    row = store.one(ROLE_OF, id, account)
    return row["role"] if row else NOT_A_MEMBER


def invite(ctx):
    account = ctx.field("account").strip()
    if not ctx.store.one("SELECT 1 FROM accounts WHERE name = ?", account):
        raise Refused(422, "There is no account of this name. Check the spelling, or ask "
                           "whoever runs this server to add it.")
    if role_of(ctx.store, ctx.viewer.id, account):
        raise Refused(422, f"{account} is a member already. Change the role in the list.")
    set_role(ctx, account, NOT_A_MEMBER, valid_role(ctx.field("role", "member")))
    return done(ctx, f"{ctx.viewer.id} {account}", account="", problem="")


def change_role(ctx, account):
    before = role_of_member(ctx, account)
    set_role(ctx, account, before, valid_role(ctx.field("role")))
    return done(ctx, f"{ctx.viewer.id} {account}")


def expel(ctx, account):
    """Anybody may leave; to send others away takes members:manage."""
    if account != ctx.viewer.account:
        ctx.viewer.permit("members:manage")
    set_role(ctx, account, role_of_member(ctx, account), NOT_A_MEMBER)
    return done(ctx, f"{ctx.viewer.id} {account}")


def role_of_member(ctx, account):
    """Return the role of a member. Raise Refused(404) if they are none."""
    role = role_of(ctx.store, ctx.viewer.id, account)
    if role == NOT_A_MEMBER:
        raise Refused(404, "There is no such member. The page shows who there is now.")
    return role


def valid_role(role):
    """Return the role. Raise Refused(422) if there is none of this name."""
    if role not in ROLES:
        raise Refused(422, f"A role is one of {', '.join(ROLES)}.")
    return role


def set_role(ctx, account, before, after):
    """Change a role; NOT_A_MEMBER is one, too.

    Raise Refused(403) if only an owner may do this, Refused(409) for the last owner.
    """
    id = ctx.viewer.id
    if "owner" in (before, after) and ctx.viewer.role != "owner":
        raise Refused(403, "Only an owner can make or change an owner. Ask one of them.")
    if before == "owner" and after != "owner" and ctx.store.one(OWNERS_OF, id)[0] == 1:
        raise Refused(409, "This is the last owner. Make somebody else an owner first.",
                      signal="toast")
    ctx.store.exec("DELETE FROM memberships WHERE workspace = ? AND account = ?", id,
                   account)
    if after != NOT_A_MEMBER:
        ctx.store.exec("INSERT INTO memberships VALUES (?, ?, ?)", id, account, after)
    ctx.publish("members")
    access_changed(ctx, account)


members = Live("/members", MEMBER, "members", "Members", members_region, members_page)
directory = Slice(
    name="directory",
    migrations=DIRECTORY_TABLES,
    live=(members,),
    routes=(Route("GET", "/_gate/<workspace>", PUBLIC, gate),
            Route("GET", "/", PUBLIC, home),
            Route("GET", "/login", PUBLIC, to_home),
            Route("GET", "/account", PUBLIC, to_home),
            Route("POST", "/persona", PUBLIC, persona),
            Route("POST", "/logout", PUBLIC, logout),
            Route("POST", "/workspaces", ACCOUNT, create_workspace, form="/"),
            Route("POST", "/members", "members:manage", invite),
            Route("PATCH", "/members/<account>", "members:manage", change_role),
            Route("DELETE", "/members/<account>", MEMBER, expel)))


# ==== 14. Plain edge ======================================================================
# The idea: the edge is the place that knows sockets. This one is the plainest there is: the
#   standard library's server, with a thread for each connection. An open stream is a thread
#   that waits on its object's Condition. Two things keep that object awake: Bus.waiting
#   counts the thread, and the thread asks again every two seconds, which renews
#   DurableObject.used. [2] holds the streams elsewhere, so that an object can sleep.
# It promises: each request comes out with a response, whatever happened on its way. A
#   stream is a question that is asked again, the whole way: before each frame, and at least
#   every REGATE_SECONDS, the worker asks the gate whether this person may still look.
# Who uses it: the network.

REGATE_SECONDS = 2.0
BODY_LIMIT = 65_536                                      # bytes
REQUEST = re.compile(r"[A-Z]+ [!-~]+ HTTP/1\.[01]")
BEAT = b":\n\n"                                          # a comment; it changes nothing
ONCE = {"host", "content-length", "content-type", "transfer-encoding", "origin",
        "sec-fetch-site", "expect", "cookie"}            # header fields that may come once
POLICY = ("default-src 'none'; script-src 'self'{}; style-src 'self'; img-src 'self'; "
          "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'")
HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff",
           "x-frame-options": "DENY", "referrer-policy": "same-origin",
           "cross-origin-opener-policy": "same-origin",
           "cross-origin-resource-policy": "same-origin"}
STREAMING = {"transfer-encoding": "chunked", "x-accel-buffering": "no",
             "cache-control": "no-cache"}


# -- from a request to a response, without a socket

def respond(request: Request, env: Env) -> Response:
    """Return the worker's response or, whatever went wrong, a refusal."""
    try:
        return sound(worker(request, env))
    except (Exception, SystemExit) as error:             # a slice may call sys.exit()
        return refusal(request, error)


def refusal(request: Request, error: BaseException) -> Response:
    """Return a page to a browser that opens one, and a line of text to everybody else.

    To Datastar, a stream that is refused looks like a connection that was lost: it would
    ask again forever. So it gets the no as a last frame.
    """
    no = as_refused(request, error)
    if request.stream and request.datastar and no.status in (401, 403):
        return Response(200, goodbye(no.status), EVENTS)
    if request.datastar or "text/html" not in request.headers.get("accept", ""):
        text = f"{no.message}\n".encode("utf-8", "replace")
        return Response(no.status, text, headers=no.headers)
    reason = REASONS.get(no.status, "Error")
    body = template("error")(status=no.status, reason=reason, message=no.message)
    return page(reason, body, status=no.status)._replace(headers=no.headers)


def goodbye(status: int) -> bytes:
    """Return the last frame of a stream: it replaces the element that would ask again."""
    part = "signed_out" if status == 401 else "no_entry"
    return patch_elements(template(f"goodbye.{part}")())


def as_refused(request, error):
    if isinstance(error, Refused):
        return error
    if isinstance(error, UnicodeEncodeError):            # half a character, written in JSON
        return Refused(400, "There is a character in this that is none. Type it again.")
    log_error(f"{request.method} {request.path}", error)
    return Refused(500, "Something went wrong on our side; it is in the log. Try again.")


def headers_of(response: Response) -> Dict[str, str]:
    """Return the headers of an answer, with the content security policy of a page."""
    nonce = f" 'nonce-{response.nonce}'" if response.nonce else ""
    return {**HEADERS, "content-type": response.type,
            "content-security-policy": POLICY.format(nonce),
            **(STREAMING if response.watch else {}), **dict(response.headers)}


def log(message: str) -> None:
    """Write one line to standard error. Control characters are escaped.

    So nobody whose text is logged can write the log's next line.
    """
    with contextlib.suppress(OSError, ValueError):       # nobody reads it: go on
        print(message.encode("unicode_escape").decode(), file=sys.stderr, flush=True)


def log_error(where: str, error: BaseException) -> None:
    """Log what it was, and first of all the line of a slice that it comes from."""
    stack = traceback.extract_tb(error.__traceback__)
    ours = (__file__, os.path.dirname(os.__file__))
    frames = [frame for frame in stack if not frame.filename.startswith(ours)] or stack
    rest = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    at = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "?"
    log(f"error: {where}: {type(error).__name__}: {error} ({at}): {rest}")


PLAIN_PATH = re.compile(r"(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*/?")
AMBIGUOUS = (400, "The path is ambiguous. Write it without empty or dot segments, encoded "
                  "slashes or control characters.")


def plain_path(path: str) -> str:
    """Return the path, decoded once. Raise Refused(400) if it can be read in two ways."""
    if PLAIN_PATH.fullmatch(path):
        return path
    if not path.startswith("/"):
        raise Refused(400, "Ask for a path: GET /path HTTP/1.1.")
    try:
        decoded = urllib.parse.unquote(path, errors="strict")
    except UnicodeDecodeError:
        raise Refused(*AMBIGUOUS) from None
    segments = decoded.split("/")[1:]
    ambiguous = (re.search(r"%(?![0-9A-Fa-f]{2})", path)
                 or re.search(r"[\x00-\x1f\x7f\\;#]", decoded)
                 or len(segments) != path.count("/")
                 or not {"", ".", ".."}.isdisjoint(segments[:-1])
                 or segments[-1] in (".", ".."))
    if ambiguous:
        raise Refused(*AMBIGUOUS)
    return decoded


def known_host(host: str, names: Sequence[str] = ("localhost",)) -> bool:
    """Is this Host header one of ours: one of the names, or any address?

    Another site can have its own name lead here (DNS rebinding), but no address.
    """
    name = re.sub(r":[0-9]*$", "", host).lower()
    if name in names:
        return True
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name.strip("[]")))
    return False


NOT_OUR_NAME = (421, "This server does not go by that name; whoever runs it can allow it: "
                     "--allow-host NAME.")


# -- a connection, in its own thread

class PlainHandler(BaseHTTPRequestHandler):
    """The standard library parses a request's head; this class makes a Request of it.

    That parser takes a lone CR for the end of a line. A proxy may not: put none in front.
    """
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1                                        # head and body leave together
    timeout = 75                                         # seconds, for a silent peer

    def answer(self):
        request = Request("GET", "/")
        try:
            request = self.request_of()
            response = respond(request, self.server.env)
        except Refused as no:                            # what follows could be misread
            self.close_connection = True
            response = refusal(request, no)
        if response.watch and self.command == "GET":
            return self.hold(request, response)
        self.begin(response)
        if self.command != "HEAD":
            self.wfile.write(response.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = answer

    def handle_expect_100(self):
        """Say at once that the body may come."""
        super().handle_expect_100()
        self.wfile.flush()
        return True

    def request_of(self):
        """Raise Refused for what can be read in two ways, and for what is too large."""
        if not REQUEST.fullmatch(self.requestline):
            raise Refused(400, "The request line is malformed: METHOD /path HTTP/1.1.")
        headers = self.header_fields()
        if not known_host(headers.get("host", "")):
            raise Refused(*NOT_OUR_NAME)
        path, _, query = self.requestline.split()[1].partition("?")
        method = "GET" if self.command == "HEAD" else self.command
        length = self.body_length(headers)
        body = self.rfile.read(length)
        if len(body) < length:
            raise Refused(400, "The body is shorter than its Content-Length.")
        return Request(method, plain_path(path), query, headers, body,
                       self.client_address[0])

    def header_fields(self):
        headers = {}
        if self.headers.defects:                         # the parser stopped at a line
            raise Refused(400, "The header fields are malformed.")
        for name, value in self.headers.items():
            name = name.lower()
            if name in ONCE and name in headers:
                raise Refused(400, f"Send the header field {name} once.")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        if any([NOT_IN_A_VALUE.search(value) for value in headers.values()]):
            raise Refused(400, "The header fields are malformed.")
        return headers

    def body_length(self, headers):
        length = headers.get("content-length", "0")
        if "transfer-encoding" in headers:
            raise Refused(411, "Send the body with a Content-Length.")
        if not re.fullmatch("0|[1-9][0-9]{0,18}", length):
            raise Refused(400, "Content-Length is one plain decimal number.")
        if int(length) > BODY_LIMIT:
            raise Refused(413, f"The body is too large: at most {BODY_LIMIT} bytes.")
        return int(length)

    def begin(self, response):
        self.send_response(response.status)
        for name, value in headers_of(response).items():
            self.send_header(name, value)
        if not response.watch and response.status not in (204, 304):
            self.send_header("content-length", str(len(response.body)))
        if self.close_connection:
            self.send_header("connection", "close")
        self.end_headers()

    def hold(self, request, response):
        """Hold a stream open for as long as the gate agrees."""
        if self.request_version == "HTTP/1.0":
            no = Refused(505, "A stream needs HTTP/1.1.")
            response = refusal(request, no)
            self.begin(response)
            return self.wfile.write(response.body)
        self.close_connection = True
        self.begin(response)
        shown = b""
        while response.watch:
            # Also when nothing is new, something is sent: so a closed tab is noticed.
            self.chunk(BEAT if response.body == shown else response.body)
            shown = response.body
            try:
                response.watch.wait(REGATE_SECONDS)
            except Refused:                              # the server is stopping
                return
            response = respond(request, self.server.env)
        self.last_word(response)

    def last_word(self, response):
        """End the stream after a response that is none.

        After 401 or 403, say goodbye and end properly, so that the browser stays away.
        After any other error just stop, so that it tries again.
        """
        if response.type == EVENTS:                      # a goodbye, from refusal
            self.chunk(response.body)
            self.chunk(b"")
        elif response.status in (401, 403):
            self.chunk(goodbye(response.status))
            self.chunk(b"")

    def chunk(self, data):
        """RFC 9112, 7.1: a length, then so many bytes. An empty one ends the answer."""
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
        self.wfile.flush()

    def log_message(self, *_):
        """Part One keeps no access log."""


class PlainEdge(ThreadingHTTPServer):
    daemon_threads = True                                # an open stream keeps no process
    request_queue_size = 1024

    def __init__(self, host: str, port: int, env: Env):
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), PlainHandler)
        self.env = env
        self.stopping = threading.Event()

    def serve_forever(self, poll_interval=0.1):
        threading.Thread(target=self.put_to_sleep, daemon=True).start()
        super().serve_forever(poll_interval)

    def put_to_sleep(self):
        """In a thread of its own: once a second."""
        while not self.stopping.wait(1.0):
            try:
                self.env.workspaces.rest()
            except Exception as error:
                log_error("an object that should sleep", error)

    def server_close(self):
        self.stopping.set()
        super().server_close()
        self.env.workspaces.close()
        self.env.directory.namespace.close()

    def handle_error(self, *_):
        """A browser that went away in the middle of an answer is no error."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            log_error("a connection", error)


# ==== 15. Composition =====================================================================
# The idea: a composition root decides which objects, slices, doors and edge there are, and
#   who knows whom. Another edge, another place for the objects, other slices: this changes
#   and nothing else, but for ROLES (section 12), which says who has a slice's grants.
# It promises: importing this file builds nothing.
# Who uses it: whoever starts a server. [3] has four further roots.

ASSETS = {"/datastar.js": "text/javascript; charset=utf-8", "/icon.svg": "image/svg+xml",
          "/style.css": "text/css; charset=utf-8"}


def plain_planes(data: pathlib.Path, idle: float = 60.0, slices: Sequence[Slice] = (todos,),
                 demo: bool = True) -> Env:
    """The two planes of this part: one Directory, and a Workspace for each team."""
    keys, fresh = prepare(data, data / "directory.db", data / "secret.key")
    inside = Router([welcome, *slices])
    outside = Router([directory])
    pages = [live for slice in slices for live in slice.live] + [members]
    workspaces = Namespace("workspace", data / "workspaces", idle,
                           lambda id, own: Workspace(id, own, inside, pages))
    control = Namespace("directory", data, float("inf"),
                        lambda id, own: Directory(id, own, outside, pages, keys, workspaces,
                                                  demo))
    env = Env(control.get("directory"), workspaces, DOORS)
    if fresh:
        control.create("directory")
        if demo:
            seed(env, DEMO_WORKSPACES, todos in slices)
    return env


def prepare(data, file, key_file):
    """Make the folders and the key. Return the keys, and True if there was nothing yet.

    Raise Unusable if the Directory was lost. A new one would know none of the workspaces,
    and nobody could enter them.
    """
    (data / "workspaces").mkdir(parents=True, exist_ok=True)
    fresh = not file.exists()
    if fresh and any((data / "workspaces").glob("*.db")):
        raise Unusable(f"{file} is missing, and there are workspaces; restore it from a "
                       "backup, or name another folder with --data (a node is started with "
                       "--plane data)")
    if fresh and not key_file.exists():
        make_key(key_file)
    return load_keys(key_file), fresh


def only_read(request):
    """Raise Refused(405) for a command."""
    if request.method not in SAFE:
        raise Refused(405, "This address takes GET, HEAD.", (("allow", "GET, HEAD"),))


def healthz(request, env):
    only_read(request)
    return Response(200, b"ok\n")


def asset(request, env):
    """A door: a file of templates/. A browser asks each time whether it has changed."""
    only_read(request)
    body = (TEMPLATES / request.path[1:]).read_bytes()
    etag = f'"{hashlib.blake2b(body, digest_size=9).hexdigest()}"'
    headers = (("etag", etag), ("cache-control", "no-cache"))
    if request.headers.get("if-none-match") == etag:
        return Response(304, b"", ASSETS[request.path], headers)
    return Response(200, body, ASSETS[request.path], headers)


DOORS = {"/workspaces": create_workspace_with_file, "/healthz": healthz,
         **dict.fromkeys(ASSETS, asset)}

DEMO_ACCOUNTS = {"alice": "Personal", "bob": "Acme", "carol": "Acme", "dave": "Globex",
                 "erin": "Acme"}
DEMO_WORKSPACES = {
    "home": ({"alice": "owner"},
             ("Water the plants", "Call grandmother", "Book the dentist")),
    "acme": ({"bob": "owner", "carol": "member", "erin": "viewer"},
             ("Order more anvils", "Test the skates", "Invoice the coyote")),
    "globex": ({"dave": "owner", "bob": "member"},
               ("Draft the charter", "Paint the lobby", "Plan the picnic")),
}


def seed(env, workspaces, with_todos):
    """Fill the demo. Its people go into their table; all else comes by the usual ways."""
    store = Store(env.directory.namespace.path(env.directory.id))
    with contextlib.closing(store), store.tx():
        for name, group in DEMO_ACCOUNTS.items():
            store.exec("INSERT INTO accounts (name, label, persona) VALUES (?, ?, 1)", name,
                       f"{name} · {group}")
    for name, (people, titles) in workspaces.items():
        (owner, _), *others = people.items()
        ask = env.doors.get("/workspaces", ask_directory)
        ask(command_of("/workspaces", {"x-account": owner}, name=name), env)
        id = env.workspaces.id_from_name(name)
        as_owner = dict(verdict(owner, "owner", name, id).headers)
        for account, role in others:
            invitation = command_of("/members", as_owner, account=account, role=role)
            env.directory.fetch(invitation)
        for title in titles if with_todos else ():
            env.workspaces.get(id).fetch(command_of("/todos", as_owner, title=title))


def command_of(path, trusted, **signals):
    headers = {"content-type": "application/json", "datastar-request": "true", **trusted}
    return Request("POST", path, headers=headers, body=json.dumps(signals).encode())


def serve_plain(env: Env, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve until SIGTERM or SIGINT. port 0 takes any free one."""
    server = PlainEdge(host, port, env)
    env.workspaces.tidy()
    stop: queue.SimpleQueue = queue.SimpleQueue()        # a signal handler may put into it
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.put(number))
    serving = threading.Thread(target=server.serve_forever, daemon=True)
    serving.start()
    print(f"orion: http://{f'[{host}]' if ':' in host else host}:{server.server_port}\n"
          "orion: plain: Part One alone, for reading and for small trusted networks: a\n"
          "orion: thread for each connection and each open page. Compared with the full\n"
          "orion: server, a seventh of the pages a second, and 26 times the memory for an\n"
          "orion: open page; no limits, and no passwords",
          flush=True)
    stop.get()
    server.shutdown()
    serving.join()
    server.server_close()


def plain_main(argv: Optional[Sequence[str]] = None) -> None:
    """The command line of this part. Nothing calls it here.

    To run Part One in a file of its own, end that file with: plain_main()
    """
    parser = argparse.ArgumentParser(description="A live, multi-tenant web server.")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("data"))
    parser.add_argument("--idle", type=float, default=60.0)
    given = parser.parse_args(argv)
    try:
        serve_plain(plain_planes(given.data, given.idle), port=given.port)
    except (Unusable, OSError) as error:
        sys.exit(f"orion: {error}")


# ==== 16. Tables ==========================================================================
# The idea: a table belongs to the slice whose migration made it. SQLite itself is asked
#   about each statement, and refuses what reaches into the tables of another slice.
# It promises: each migration runs once in each file. A region only reads; a command reads
#   and writes rows; only a migration makes tables.
# Who uses it: objects (section 7) when they open their files; slices, for each statement.

class MigrationError(Exception):
    """File and slices do not fit together. The text names slice, entry and table."""


class OwnedStore(Store):
    """A store that knows which slice owns which table."""

    def __init__(self, path: pathlib.Path, create: bool = False):
        super().__init__(path, create)
        self.owners: Dict[str, str] = {}                 # table, in lower case: its slice
        self.judge = Judge(self.owners)
        self.db.set_authorizer(self.judge)

    def migrate(self, slice: str, entries: Sequence[str]) -> None:
        """Run those entries, each one statement, that did not run here yet: all or none.

        Entries are only ever appended. Raises MigrationError.
        """
        self.exec("CREATE TABLE IF NOT EXISTS _migrations (slice TEXT, entry INTEGER, "
                  "digest TEXT, tables TEXT, PRIMARY KEY (slice, entry)) WITHOUT ROWID")
        ran = self.query("SELECT * FROM _migrations WHERE slice = ? ORDER BY entry", slice)
        digests = [hashlib.sha256(sql.encode()).hexdigest() for sql in entries]
        for row, digest in zip(ran, digests + [""] * len(ran)):
            check_history(slice, row, digest)
        if len(ran) < len(entries):
            with self.tx():
                for number in range(len(ran), len(entries)):
                    tables = self.apply(slice, number + 1, entries[number])
                    row = slice, number + 1, digests[number], " ".join(tables)
                    self.exec("INSERT INTO _migrations VALUES (?, ?, ?, ?)", *row)
            self.learn_owners()

    def apply(self, slice, number, sql):
        """Run one entry. Return the tables that it made: they are the slice's own now."""
        before = self.tables()
        self.learn_owners()
        try:
            with self.judge.watching(slice, MIGRATE):
                self.exec(sql)
        except (sqlite3.Error, sqlite3.Warning) as error:
            why = self.judge.objection or error
            raise MigrationError(f"slice {slice!r}, entry {number}: {why}") from error
        made = self.tables() - before
        if re.search(r"\s", "".join(made)):
            raise MigrationError(f"slice {slice!r}, entry {number}: no space is allowed in "
                                 "the name of a table")
        self.owners.update((table.lower(), slice) for table in made)
        return made

    def learn_owners(self):
        """Tables that no slice has made are the server's own: _migrations, for one."""
        self.owners.clear()
        self.owners.update((table.lower(), "orion") for table in self.tables())
        self.owners.update(sqlite_master="orion", sqlite_temp_master="orion")
        for row in self.query("SELECT slice, tables FROM _migrations"):
            for table in row["tables"].lower().split():
                if not table.startswith("sqlite_"):
                    self.owners[table] = row["slice"]

    def tables(self) -> set:
        names = self.query("SELECT name FROM sqlite_master WHERE type = 'table'")
        return {row["name"] for row in names}


def check_history(slice, row, digest):
    """Raise MigrationError if an entry that ran here is not the present one."""
    if row["digest"] == digest:
        return
    why = "is unknown; a newer version wrote it"
    if digest:
        why = "was edited since; append an entry instead"
    raise MigrationError(f"slice {slice!r}, entry {row['entry']} ran here and {why}")


# -- what a statement of a slice may do

READ, WRITE, MIGRATE = "read", "write", "migrate"
WRITES = {sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE}
ROWS = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION,
        sqlite3.SQLITE_RECURSIVE, *WRITES}
TABLE_IS_SECOND = {sqlite3.SQLITE_CREATE_INDEX, sqlite3.SQLITE_DROP_INDEX,
                   sqlite3.SQLITE_CREATE_TRIGGER, sqlite3.SQLITE_DROP_TRIGGER,
                   sqlite3.SQLITE_ALTER_TABLE}           # elsewhere it is the first name
NO_SLICE_MAY = {sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH, sqlite3.SQLITE_PRAGMA,
                sqlite3.SQLITE_TRANSACTION, sqlite3.SQLITE_SAVEPOINT,
                sqlite3.SQLITE_CREATE_TEMP_TABLE, sqlite3.SQLITE_CREATE_TEMP_TRIGGER,
                sqlite3.SQLITE_CREATE_TEMP_VIEW, sqlite3.SQLITE_CREATE_TEMP_INDEX}


class Judge:
    """SQLite calls it, while it compiles a statement, for each thing that this would do.

    (See sqlite.org/c3ref/set_authorizer.html.) It guards against mistakes, such as a query
    that reaches into the tables of another slice. It does not guard against a hostile
    slice: slices are Python, and can do whatever this process can. (And SQLite does not
    tell of the columns that a join names by USING or NATURAL.)
    """

    def __init__(self, owners: Dict[str, str]):
        self.owners = owners
        self.slice = ""                                  # whose statement; "": the server's
        self.may = ""                                    # READ, WRITE or MIGRATE
        self.objection = ""                              # why SQLite was told no

    @contextlib.contextmanager
    def watching(self, slice: str, may: str):
        self.slice = slice
        self.may = may
        self.objection = ""
        try:
            yield
        finally:
            self.slice = ""

    def __call__(self, action, first, second, *_):
        if not self.slice:
            return sqlite3.SQLITE_OK
        table = second if action in TABLE_IS_SECOND else first
        objection = self.object_to(action, table or "")
        if not objection:
            return sqlite3.SQLITE_OK
        self.objection = self.objection or objection
        return sqlite3.SQLITE_DENY

    def object_to(self, action, table):
        """Return why not, or ""."""
        migrates = self.may == MIGRATE
        if not migrates and action not in ROWS:
            return "does more than read and write rows, which is for migrations"
        if self.may == READ and action in WRITES:
            return "writes, which only a command or a job may"
        if migrates and action in NO_SLICE_MAY:
            return ("uses PRAGMA, ATTACH, TEMP or a transaction, as virtual tables do too; "
                    "no slice may")
        if migrates and table.startswith("sqlite_"):     # SQLite's own records of tables
            return ""
        owner = self.owners.get(table.lower(), self.slice)
        if owner != self.slice:
            return f"touches table {table!r} of slice {owner!r}; ask for what that exports"
        return ""


class Tables(Reads):
    """A store as one slice sees it, while it answers one request.

    The comment makes the slice's name a part of the statement. So Python's cache of
    compiled statements cannot reuse one slice's statement, which SQLite has judged, for
    another. Each statement is judged once, when it is compiled.
    """

    def __init__(self, store: Store, slice: str, may: str):
        self.store = store
        self.slice = slice
        self.may = may
        self.mark = f" /* {slice} may {may} */"
        self.thread = threading.get_ident()              # 0: the request is over

    def exec(self, sql: str, *args: Any) -> int:
        """Return the number of rows that changed."""
        self.run(sql, args)
        return self.store.cursor.rowcount

    @contextlib.contextmanager
    def tx(self):
        """A part of the command that can fail alone."""
        self.check_thread()
        with self.store.tx():
            yield

    def run(self, sql, args):
        """Raises PermissionError for what a slice may not do; sqlite3.Error as it comes."""
        self.check_thread()
        judge = self.store.judge
        judge.slice, judge.may, judge.objection = self.slice, self.may, ""
        try:
            return self.store.run(sql + self.mark, args)
        except sqlite3.Error as error:
            if not judge.objection:
                raise
            why = f"slice {self.slice!r} {judge.objection}: {sql}"
            raise PermissionError(why) from error
        finally:
            judge.slice = ""

    def check_thread(self):
        """Raise RuntimeError if the request has ended, or in another thread."""
        if self.thread != threading.get_ident():
            raise RuntimeError("this store was for a request that has ended, or for "
                               "another thread; to write later, use a job or a new request")


# #### Part Two: the edge ################################################################
#
#     17 Files      18 Commits     19 Pieces      20 Reader      21 Answers     22 Kept
#     23 Threads    24 Sockets     25 Broker      26 Loop edge
#
# In Part One the object holds its streams: a thread for each of them, and an object that
# can't sleep while somebody looks at it. This part is the broker that replaces only where
# the stream is held. One loop holds all sockets, a few threads do the work, and an object
# may sleep while thousands watch it.
#
# What it buys, as ratios of the plain edge to this one, measured in one run: pages at 32
# connections 1 : 7; commands 1 : 5; the slowest of 100 pages at 128 connections 50 : 1; the
# last of 1,000 watchers 15 : 1; memory for a stream 26 : 1; threads for 1,000 streams 1,003
# to 18.
#
# It costs a second way to read a request, and three rules that a slice does not see: a page
# depends on rows and its request alone (so an answer can be kept); commands that wait for
# the same object share a commit; a rendering is sent as it is to everybody of a role.
#
# It attaches to Part One by subclasses, which a composition root chooses: of Store, Stub,
# Namespace and DurableObject, and of ThreadingHTTPServer. It uses worker, Env.forward,
# Bus.listeners, SliceHost.render, SliceHost.stream, Context.shared, headers_of and refusal.

import itertools
import random
import selectors
import stat
import zlib
from typing import Iterable, Iterator

try:
    import fcntl
    import resource
except ImportError:                                      # Windows: neither is there
    fcntl = resource = None

CRASH = (Exception, SystemExit)                          # what a slice's code may raise


# ==== 17. Files ===========================================================================
# The idea: a disk fails one file at a time. Whatever is wrong with the file of an object is
#   a StorageFault: a 503 or 507 for this tenant alone, and a line in the log that says
#   which file, what, and what to do.
# It promises: nothing is made anew in the place of what was lost; nothing is written to a
#   file that was taken away or exchanged; no statement runs for longer than a few seconds.
# Who uses it: both planes, through the composition roots of Part Three.

class StorageFault(Refused):
    """The file of an object can't be used. The text is for the log, message for people."""
    REMEDIES = {", entry ": "nothing of it was done; mend the rows that it stumbles on, "
                            "and it is tried again",
                "disk is full": "make room on the disk, or raise the quota",
                "is locked": "another process holds it: end that one",
                "interrupted": "a statement ran too long: give it an index, or ask for "
                               "less",
                "readonly database": "make the file and its folder writable",
                "unable to open database file": "make it readable; let the process have "
                                                "more descriptors",
                "disk I/O error": "see what the system's log says of the disk",
                "constraint failed": "a slice left it to the commit to find that; have it "
                                     "looked for before",
                "unsupported file format": "restore it from a backup",
                "": "restore it from a backup: orion.py check says what is wrong, restore "
                    "brings it back"}

    def __init__(self, path: pathlib.Path, error: BaseException):
        word = next(word for word in self.REMEDIES if word in str(error))
        if word == "disk is full":
            super().__init__(507, "There is no room left here. Delete something, or ask "
                                  "for a larger quota.")
        else:
            super().__init__(503, "This can't be read just now. Try again in a minute.",
                             (("retry-after", "60"),))
        self.text = f"{path}: {error}; {self.REMEDIES[word]}"

    def __str__(self):
        return self.text

    @classmethod
    def is_behind(cls, error: BaseException) -> bool:
        """True if the database file is at fault, False if the SQL statement is."""
        if isinstance(error, sqlite3.OperationalError):
            known = tuple(filter(None, cls.REMEDIES))    # SQLite's words, and not a name
            return str(error).endswith(known) and not str(error).startswith("no such")
        return type(error) in (sqlite3.DatabaseError, MigrationError)


class Torn(Exception):
    """Another file is at the path of the one that is open, or none."""


def identity(path: pathlib.Path) -> Tuple[int, int]:
    """Which file is at path. Raises sqlite3.DatabaseError if there is none, or no database.

    An empty file would be a new database to SQLite.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        raise sqlite3.DatabaseError(f"the file {path.name} is missing") from None
    if not stat.S_ISREG(found.st_mode) or found.st_size == 0:
        how = "empty" if found.st_size == 0 else "no regular file"
        raise sqlite3.DatabaseError(f"{path.name} is {how}")
    return found.st_dev, found.st_ino


def mark_of(id: str) -> int:
    """A number in the file that says whose it is."""
    return zlib.crc32(id.encode()) >> 1


REFERENCES = """SELECT lower(one.name) AS child, lower("table") AS parent FROM sqlite_master
                AS one, pragma_foreign_key_list(one.name) WHERE type = 'table'"""


class GuardedStore(OwnedStore):
    """A store that notices what happens to its file.

    Small pages and few kept statements: an awake tenant takes 93 KB, 32 of them the index
    of its write-ahead log. With SQLite's 4,096 bytes and Python's 128 it takes 183.
    """
    SETUP = f"PRAGMA page_size=1024; {OwnedStore.SETUP}; PRAGMA cache_size=-512"
    STATEMENTS = 12

    def __init__(self, path: pathlib.Path, create: bool = False):
        self.inode = None if create else identity(path)  # None: it is made just now
        super().__init__(path, create)

    @property
    def torn(self) -> bool:
        """SQLite would go on writing to a file that nobody finds any more, silently."""
        try:
            return self.inode not in (None, identity(self.path))
        except sqlite3.Error:
            return True

    def begin(self):
        """Raises Torn. While we have the write lock, nobody takes the file away."""
        super().begin()
        if self.torn:
            self.run("ROLLBACK", ())
            raise Torn

    def apply(self, slice, number, sql):
        """Raises MigrationError also for a reference to a table of another slice.

        That one could not delete a row of it any more.
        """
        before = self.references(sql)
        made = super().apply(slice, number, sql)
        for child, parent in self.references(sql) - before:
            owner = self.owners.get(parent, slice)
            if self.owners.get(child, slice) != owner:
                raise MigrationError(f"slice {slice!r}, entry {number}: table {child!r} "
                                     f"refers to table {parent!r} of slice {owner!r}, "
                                     "which could not delete a row of it any more")
        return made

    def references(self, sql) -> set:
        """Which table refers to which; asked only if sql may add to that: it takes long."""
        if "references" not in sql.lower():
            return set()
        return {tuple(row) for row in self.query(REFERENCES)}

    def close(self):
        """What a torn file lacks goes into it: whoever takes its place must find no log."""
        self.db.set_progress_handler(None, 0)            # it knows the owner of this store
        if self.torn:
            with contextlib.suppress(sqlite3.Error):
                self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        super().close()


class GuardedObject(DurableObject):
    """An object whose file may fail."""
    STATEMENT_SECONDS = 5.0                              # then SQLite interrupts it
    opened_at = 0.0                                      # when it woke, by the clock

    def connect(self, create):
        self.namespace.make_room()
        store = self.make_store(create)
        store.db.set_progress_handler(self.too_long, 100_000)
        try:
            if not create:
                self.claim(store)
        except BaseException:
            store.close()
            raise
        self.opened_at = time.time()
        return store

    def make_store(self, create) -> GuardedStore:
        return GuardedStore(self.namespace.path(self.id), create)

    def too_long(self):
        return time.monotonic() > self.used + self.STATEMENT_SECONDS

    def claim(self, store):
        """A file in another's place shows nobody's rows to strangers."""
        found = store.one("PRAGMA application_id")[0]
        if found not in (0, mark_of(self.id)):
            raise sqlite3.DatabaseError("the file belongs to another object")
        if found == 0:
            store.exec(f"PRAGMA application_id = {mark_of(self.id)}")

    def on_open(self):
        super().on_open()
        self.bus.listeners.append(functools.partial(self.namespace.told, self.id))

    def answer(self, request):
        """Raise StorageFault; or Torn, if nothing was done: then the stub asks again."""
        try:
            return super().answer(request)
        except (sqlite3.Error, MigrationError) as error:
            if not StorageFault.is_behind(error):
                raise
            raise self.fault(error) from error

    def fault(self, error):
        fault = StorageFault(self.namespace.path(self.id), error)
        log(f"storage: {fault}")
        return fault

    @property
    def torn(self):
        return self.store is not None and self.store.torn

    def close(self):
        torn = self.torn
        self.namespace.changed(self.id)
        super().close()
        if torn and self.namespace.path(self.id).exists():   # another file: other rows
            self.namespace.told(self.id, "")


class GuardedStub(Stub):
    def fetch(self, request):
        return self.enter(lambda one: one.answer(request), request)

    def enter(self, ask: Callable[[Any], Any], request: Request,
              seconds: float = -1) -> Any:
        """ask(object), in its turn. Raises Busy after so many seconds; -1: never."""
        self.namespace.count(self.id, request)
        while True:
            one = self.namespace.awake(self.id)
            if not one.turn.acquire(timeout=seconds):
                raise Busy()
            try:
                if not one.gone:
                    return ask(one)
            except Torn:
                one.close()
            finally:
                one.turn.release()

    def fetch_within(self, seconds: float, request: Request) -> Response:
        """As fetch. Raises Busy if the object has no turn for us in so many seconds."""
        return self.enter(lambda one: one.answer(request), request, seconds)

    def fetch_all(self, requests: Sequence[Request]) -> List[Any]:
        """See GroupCommit."""
        return self.enter(lambda one: one.answer_all(requests), requests[0])


class Busy(Refused):
    def __init__(self):
        super().__init__(503, "This is busy. Try again in a moment.",
                         (("retry-after", "1"),))


class GuardedNamespace(Namespace):
    """Keeps at most so many objects awake, and tells of what happens to them."""

    def __init__(self, *args: Any, most: int = 1024):
        super().__init__(*args)
        self.most = most
        self.listeners: List[Callable[[str, str], None]] = []    # told (id, topic)
        self.versions: Dict[str, int] = collections.Counter()    # by id: see section 22
        self.fetches = 0
        self.served = collections.Counter()              # by id, without our own questions

    def get(self, id):
        return GuardedStub(id, self)

    def count(self, id, request):
        self.fetches += 1
        if not request.path.startswith("/_") or request.path.startswith("/_gate"):
            self.served[id] += 1

    def told(self, id: str, topic: str) -> None:
        """topic was published; "": anything may be different."""
        for listener in self.listeners:
            listener(id, topic)

    def changed(self, id: str) -> None:
        """Whatever was answered before may be old."""
        self.versions[id] += 1

    def awake(self, id):
        one = super().awake(id)
        with self.lock:
            if id in self.objects:
                self.objects.move_to_end(id)             # the least recently used is first
        return one

    def touch(self, id: str) -> None:
        """It was used, although it was not asked."""
        with self.lock:
            if id in self.objects:
                self.objects[id].used = time.monotonic()
                self.objects.move_to_end(id)

    def make_room(self) -> None:
        """The least recently used go to sleep; one that is busy just now is passed over."""
        with self.lock:
            excess = max(0, len(self.objects) - self.most)
            first = list(itertools.islice(self.objects.values(), excess))
        for one in first:
            one.sleep(time.monotonic())

    def rest(self, idle=None):
        """Those whose file is not at its path any more go to sleep at once."""
        for one in self.everybody():
            if one.torn:
                one.sleep(time.monotonic())
        super().rest(idle)

    def files(self) -> Iterator[Tuple[str, pathlib.Path]]:
        """The id and the path of each object of this kind, awake or not."""
        return ((path.stem, path) for path in self.folder.glob("*.db"))


# ==== 18. Commits =========================================================================
# The idea: to make a file durable takes longer than most commands. So commands that wait
#   for the same object anyway are run one after the other in one transaction, each in a
#   savepoint, and are made durable together.
# It promises: none of them is answered before its commit is on the disk. Each can fail
#   alone. If the commit fails, all that were in it hear so.
# Who uses it: the loop edge (section 26), for what waited in the lane of an object.

def outcome(call, *args):
    """Return what the call returned, or the exception that it raised."""
    try:
        return call(*args)
    except Torn:                                         # nothing was done: for the stub
        raise
    except CRASH as error:
        return error


class GroupCommit(GuardedObject):
    BATCH_SECONDS = 0.05                                 # until those in front are answered

    def command(self, request):
        before = self.store.db.total_changes
        try:
            return super().command(request)
        finally:                                         # still in our turn, so: in time
            if self.store.db.total_changes != before:
                self.namespace.changed(self.id)

    def answer_all(self, requests: Sequence[Request]) -> List[Any]:
        """Answer requests that came together. The caller holds the turn.

        Return an outcome for each: a Response, or the exception that it raised. There may
        be fewer outcomes than requests, but at least one: ask again for the others.
        """
        if len(requests) == 1 or all([request.method in SAFE for request in requests]):
            return [outcome(self.answer, request) for request in requests]
        outcomes: List[Any] = []
        try:
            self.used = time.monotonic()
            if self.store is None:
                self.open()
            with self.store.tx():
                self.answer_each(requests, outcomes)
            return outcomes
        except Torn:
            raise
        except CRASH as error:                           # nothing of it is on the disk
            self.forget_renderings()
            fault = error if isinstance(error, StorageFault) else self.fault(error)
            if not outcomes:
                return [fault] * len(requests)
            return [one if failed(one) else fault for one in outcomes]

    def answer_each(self, requests, outcomes):
        """Raises the error with which SQLite gave up all of the transaction."""
        until = time.monotonic() + self.BATCH_SECONDS
        for request in requests:
            outcomes.append(outcome(self.answer, request))
            if not self.store.db.in_transaction:
                last = outcomes[-1]
                lost = sqlite3.OperationalError("a command lost the transaction")
                raise last if isinstance(last, (sqlite3.Error, StorageFault)) else lost
            if time.monotonic() > until:
                return

    def forget_renderings(self):
        """They show what was then rolled back."""


def failed(one):
    return isinstance(one, BaseException) or one.status >= 400


# ==== 19. Pieces ==========================================================================
# The idea: a rendering is kept as the very bytes that all its watchers get, plain and
#   compressed. Each piece is compressed by itself, so that one serves all streams.
# It promises: a stream needs no compressor of its own. Its etag is made of the content, so
#   it means the same after a restart and in another process.
# Who uses it: the broker (section 25).

GZIP_HEAD = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"              # RFC 1952, 2.3
LAST_CHUNK = b"0\r\n\r\n"
CURRENT = b"event: datastar-current\ndata: version unchanged\n\n"


def chunk(data: bytes) -> bytes:
    """RFC 9112, 7.1. A chunk needs no connection to be right, so one is made for all."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def deflated(data: bytes) -> bytes:
    """Compress data so that it can follow anything in a gzip stream.

    It ends on a byte and refers to nothing before it (RFC 1951, 3.2.4).
    """
    squeeze = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    return squeeze.compress(data) + squeeze.flush(zlib.Z_FULL_FLUSH)


@dataclasses.dataclass
class Piece(Rendering):
    """A rendering as bytes, which are made when the first stream needs them.

    main: the region, which a browser names when it comes back as the last it has seen.
    """
    main: bool = True

    @functools.cached_property
    def etag(self) -> str:
        data = self.html.encode("utf-8", "replace")
        return hashlib.blake2b(data, digest_size=9).hexdigest()

    @property
    def event(self) -> bytes:
        return patch_elements(self.html, event_id=self.etag if self.main else None)

    @functools.cached_property
    def plain(self) -> bytes:
        return chunk(self.event)

    @functools.cached_property
    def zipped(self) -> bytes:
        return chunk(deflated(self.event))


class Subscription(NamedTuple):
    """What a live answer leaves behind: whom to ask again, what, and after which topic."""
    stub: GuardedStub
    topic: str
    again: Request                                       # as a whole role would ask
    piece: Piece                                         # as it is now

    @property
    def channel(self) -> Tuple[Any, ...]:
        """Streams that must show the same have the same."""
        said = self.again.headers
        role = tuple([said.get(name, "") for name in ("x-role", "x-grants", "x-workspace")])
        return self.again.path, self.again.query, *role


class Broadcast(GroupCommit, SliceHost):
    """A SliceHost whose streams are held by a broker."""
    KEPT_RENDERINGS = 4 * 2 ** 20                        # characters

    def render(self, live, ctx):
        rendering = super().render(live, ctx)
        return Piece(rendering.html, rendering.made, rendering.micros)

    def rendering(self, live, ctx):
        """The parameters of a query can be many: what was made first goes first."""
        kept = self.renderings
        while sum([len(one.html) for one in kept.values()]) > self.KEPT_RENDERINGS:
            del kept[next(iter(kept))]
        return super().rendering(live, ctx)

    def forget_renderings(self):
        self.renderings.clear()

    def stream(self, live, ctx):
        """Instead of something to wait for: something to subscribe to."""
        shared = ctx.shared(live)
        role = shared.viewer
        headers = {"x-account": "", "x-role": role.role, "x-grants": ",".join(role.grants),
                   "x-workspace": role.workspace, "x-id": role.id}
        query = urllib.parse.urlencode(shared.params)
        again = Request("GET", f"{live.path}/live", query, headers)
        topic = self.topic(live.topic, role)
        piece = self.rendering(live, ctx)
        watch = Subscription(self.namespace.get(self.id), topic, again, piece)
        return Response(200, type=EVENTS, watch=watch, which=ctx.viewer.account)

    def xray_more(self, ctx):
        since = formatdate(self.opened_at, usegmt=True)
        return template("xray.watchers")(since=since)


# ==== 20. Reader ==========================================================================
# The idea: there is one way to read a request. What could be read in two ways is refused and
#   the connection ends, for whoever stands in front of us might have read it the other way.
# It promises: each byte of a head is looked at once, however slowly it comes.
# Who uses it: connections (section 26).

LINE_LIMIT, HEAD_LIMIT, FIELD_LIMIT = 16_384, 32_768, 64     # bytes; of fields, their number
FRAMING_LIMIT = 4_096                                # bytes around the chunks of a body
TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"                                         # RFC 9110, 5.6.2
FIELD = re.compile(rb"(" + TOKEN + rb"):([^\x00-\x08\x0a-\x1f\x7f]*)\r\n")      # RFC 9112, 5
HEAD = re.compile(rb"(" + TOKEN + rb") ([!-~]+) HTTP/1\.([01])\r\n"
                  rb"((?:" + TOKEN + rb":[^\x00-\x08\x0a-\x1f\x7f]*\r\n)*)\r\n")
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
    pairs = [(name, value.strip(b" \t")) for name, value in FIELD.findall(block)]
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


# ==== 21. Answers =========================================================================
# The idea: how a Response leaves: head and body in one piece, in one send.
# It promises: what does not change from one answer to the next is put together once.
# Who uses it: connections (section 26).

MARK = "(nonce)"                                         # where a head has the page's nonce
COMPRESSED = ("text/html", "text/css", "text/javascript")


@functools.lru_cache(maxsize=256)
def head_of(status, type, headers, live, nonced):
    """The part of a head that does not change; a page's nonce is a mark in it."""
    watch = live or None
    response = Response(status, b"", type, headers, MARK if nonced else "", watch)
    fields = [f"{name}: {value}\r\n" for name, value in headers_of(response).items()]
    return f"HTTP/1.1 {status} {REASONS.get(status, '')}\r\n{''.join(fields)}"


GZIP = re.compile(r"\bgzip\b(?!\s*;\s*q=0(?:\.0*)?\s*(?:,|$))")


def accepts_gzip(request: Request) -> bool:
    return GZIP.search(request.headers.get("accept-encoding", "")) is not None


def encode(request: Request, response: Response, keep: bool, head_only: bool,
           date: str) -> bytes:
    """Return the bytes of an answer. keep: the connection goes on after it."""
    live = response.watch is not None
    zipped = accepts_gzip(request)
    body = response.body
    if live:
        body = first_frame(request, response.watch.piece, zipped)
    else:
        zipped = zipped and len(body) > 1000 and response.type.startswith(COMPRESSED)
        if zipped:
            squeeze = zlib.compressobj(1, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
            body = squeeze.compress(body) + squeeze.flush()
    head = head_of(response.status, response.type, response.headers, live,
                   response.nonce != "")
    if response.nonce:
        head = head.replace(MARK, response.nonce, 1)
    more = [f"date: {date}\r\n"]
    if not live and response.status not in (204, 304):
        more.append(f"content-length: {len(body)}\r\n")
    if zipped:
        more.append("content-encoding: gzip\r\nvary: accept-encoding\r\n")
    if not keep:
        more.append("connection: close\r\n")
    head = f"{head}{''.join(more)}\r\n".encode("latin-1")
    return head if head_only else head + body


def first_frame(request, piece, zipped):
    """The region, or a word that the page shows this very version already: it is live."""
    if request.headers.get("last-event-id") == piece.etag:
        return chunk(GZIP_HEAD + deflated(CURRENT)) if zipped else chunk(CURRENT)
    return chunk(GZIP_HEAD) + piece.zipped if zipped else piece.plain


# ==== 22. Kept ============================================================================
# The idea: a page that was answered before is the same page until one of the two planes was
#   written to. Each plane has a number that says so. The Directory's file has one that also
#   moves when another process writes (PRAGMA data_version, seen from a connection of our
#   own); the commits of a workspace are counted by its namespace.
# It promises: no page is older than the last commit that was answered before it was asked
#   for. Both numbers are read before a page is made, so an error only costs a hit. What
#   another process writes into a workspace's file is seen after a minute at the latest.
# Who uses it: the loop edge, for pages that the worker forwarded.

class Asked(NamedTuple):
    """A request on its way: from the socket, and what is known of it so far."""
    connection: Any
    reading: Any                                         # as it was framed: section 20
    request: Request
    policy: Any = None                                   # the Directory's number
    version: int = 0                                     # the object's
    stub: Any = None                                     # who is to answer
    forwarded: Optional[Request] = None                  # and the request as they see it
    started: float = 0.0                                 # by time.perf_counter()

    @property
    def key(self) -> Tuple[Any, ...]:
        request = self.request
        cookie = request.headers.get("cookie")
        return request.path, request.query, cookie, request.scheme


class Answer(NamedTuple):
    """response: None, as long as it was asked for only once."""
    policy: Any
    version: int
    stub: GuardedStub
    until: float                                         # by time.monotonic()
    response: Optional[Response]


class Kept:
    """Answers, by what was asked. One is kept when it is asked for a second time."""
    MOST = 32 * 2 ** 20                                  # bytes of all
    LARGE = 2 ** 18                                      # bytes of one: it is compressed
    SECONDS = 60.0                                       # sessions end by the clock, too

    def __init__(self, directory: Stub):
        self.directory = directory
        self.path = directory.namespace.path(directory.id)
        self.db: Optional[sqlite3.Connection] = None
        self.opened = -1                                 # when: by the Directory's version
        self.answers: Dict[Any, Answer] = {}
        self.size = 0

    def policy(self) -> Any:
        """Moves with each commit to the Directory; None: it can't be said. For the loop."""
        version = self.directory.namespace.versions[self.directory.id]
        try:
            if self.db is None or self.opened != version:
                self.reopen(version)
            return version, self.db.execute("PRAGMA data_version").fetchone()[0]
        except sqlite3.Error:
            return None

    def reopen(self, version):
        """The Directory's object has closed its file; another may be in its place."""
        self.close()
        uri = f"{self.path.absolute().as_uri()}?mode=ro"
        self.db = sqlite3.connect(uri, uri=True, timeout=0, isolation_level=None,
                                  check_same_thread=False)
        self.opened = version

    def close(self):
        if self.db:
            self.db.close()
        self.db = None
        self.answers.clear()
        self.size = 0

    def find(self, asked: Asked) -> Optional[Response]:
        known = self.answers.get(asked.key)
        if known is None or known.response is None or known.until < time.monotonic():
            return None
        namespace = known.stub.namespace
        version = namespace.versions[known.stub.id]
        if (known.policy, known.version) != (asked.policy, version):
            return None
        namespace.touch(known.stub.id)
        return known.response

    def keep(self, asked: Asked, response: Response) -> None:
        """asked has both numbers as they were before the response was made."""
        if len(response.body) > self.LARGE or asked.policy is None:
            return
        if self.size > self.MOST:
            self.answers.clear()
            self.size = 0
        known = self.answers.get(asked.key)
        again = known is not None and (known.policy, known.version) == (asked.policy,
                                                                        asked.version)
        until = time.monotonic() + self.SECONDS
        self.size += 500 + (len(response.body) if again else 0)
        self.answers[asked.key] = Answer(asked.policy, asked.version, asked.stub, until,
                                         response if again else None)


def renewed(response: Response) -> Response:
    """A page that was kept, with a nonce that nobody has seen yet."""
    nonce = secrets.token_hex(16)
    body = response.body.replace(response.nonce.encode(), nonce.encode(), 1)
    return response._replace(body=body, nonce=nonce)


# ==== 23. Threads =========================================================================
# The idea: a few threads do the work, one loop holds all sockets. What concerns the same
#   object stands in a lane. One thread at a time works a lane off, all that came at once.
# It promises: a lane keeps its order, and lets the others have their turn in between. A job
#   that fails is logged; its thread goes on.
# Who uses it: the loop edge and the broker.

class Pool:
    """A fixed number of threads that take jobs from one line.

    The thread that fell idle last is woken first: its memory is still in the core's cache.
    """
    TOGETHER = 64                                        # items of a lane at a time

    def __init__(self, size: int):
        self.line: collections.deque = collections.deque()   # of jobs: (function, args)
        self.idle: List[threading.Lock] = []             # what each idle thread waits for
        self.own = threading.local()                     # line: what this thread does next
        self.lock = threading.Lock()                     # guards the next line
        self.lanes: Dict[Any, collections.deque] = {}    # what waits, where somebody works
        self.threads = [threading.Thread(target=self.work, daemon=True)
                        for _ in range(size)]
        for thread in self.threads:
            thread.start()

    def put(self, job: Callable[..., None], *args: Any) -> None:
        """What a thread of the pool puts in, it does next itself.

        To render what a command changed, no other thread is woken.
        """
        own = getattr(self.own, "line", None)
        if own is None:
            self.share(job, *args)
        else:
            own.append((job, args))

    def defer(self) -> None:
        """What this thread puts in wakes nobody from now on, before it calls rouse().

        A thread that woke in the midst of its work would only contend with it for the
        interpreter. (Commands to 1,000 tenants: 1.2 x.)
        """
        self.own.line = self.line

    def rouse(self) -> None:
        for _ in range(min(len(self.line), len(self.idle))):
            self.wake()

    def share(self, job: Optional[Callable[..., None]], *args: Any) -> None:
        """As put, for a job that any thread may do, after all others. None ends one."""
        self.line.append((job, args))
        self.wake()

    def wake(self):
        try:
            self.idle.pop().release()
        except IndexError:                               # all are busy, and will look again
            return

    def work(self):
        own = self.own.line = collections.deque()
        turn = threading.Lock()
        turn.acquire()
        while True:
            job, args = own.popleft() if own else self.next(turn)
            if job is None:
                return
            guarded(job, *args)

    def next(self, turn):
        """Return the next job, or wait for one."""
        while True:
            try:
                return self.line.popleft()
            except IndexError:
                self.idle.append(turn)
            if self.line:                                # put in just before we were idle
                self.wake()
            turn.acquire()

    @property
    def busy(self) -> int:
        """How many threads have a job."""
        return len(self.threads) - len(self.idle)

    def gather(self, lane: Any, item: Any, job: Callable[[List[Any]], None]) -> None:
        """Have job(items) done with all that came to this lane until then."""
        with self.lock:
            if lane in self.lanes:
                self.lanes[lane].append(item)
                return
            self.lanes[lane] = collections.deque([item])
        self.put(self.drive, lane, job)

    def drive(self, lane, job):
        waiting = self.lanes[lane]
        some = min(len(waiting), self.TOGETHER)
        try:
            job([waiting.popleft() for _ in range(some)])
        finally:
            with self.lock:
                if not waiting:
                    del self.lanes[lane]
            if waiting:
                self.share(self.drive, lane, job)        # behind the others

    def close(self, patience: float) -> None:
        """patience: seconds for all threads together. A job that takes longer is left."""
        for _ in self.threads:
            self.share(None)
        until = time.monotonic() + patience
        for thread in self.threads:
            thread.join(max(0.0, until - time.monotonic()))


def guarded(call: Callable[..., None], *args: Any) -> None:
    """The trouble of one request must end neither the loop nor a thread."""
    try:
        call(*args)
    except Refused:
        return                                           # of a file: it is in the log
    except CRASH as error:
        log_error(getattr(call, "__qualname__", str(call)), error)


# ==== 24. Sockets =========================================================================
# The idea: a socket that waits costs a place in the loop's selector, and no thread.
# It promises: a reader that is slow delays nobody. It gets the latest frame when it can
#   take one, not those that it missed; one that takes nothing for 30 seconds is cut off.
# Who uses it: the loop edge. All methods run in its loop, unless they say otherwise.

READABLE, WRITABLE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Held:
    """A socket that the loop holds. rest: what the kernel would not take yet."""
    STUCK_SECONDS = 30.0

    def __init__(self, edge: LoopEdge, socket: socket.socket):
        self.edge = edge
        self.socket = socket
        self.events = 0                                  # what the selector watches for
        self.rest: Any = b""
        self.deadline = 0.0                              # when patience ends
        self.listen(selectors.EVENT_READ)
        edge.held.add(self)                              # last: others look through it

    def listen(self, events):
        before = self.events
        if before == events:
            return
        self.events = events
        if not events:
            self.edge.selector.unregister(self.socket)
        elif before:
            self.edge.selector.modify(self.socket, events, self.ready)
        else:
            self.edge.selector.register(self.socket, events, self.ready)

    def ready(self, events):
        if events & WRITABLE:
            self.listen(self.events & ~WRITABLE)
            return self.write(self.rest)
        try:
            data = self.socket.recv(65_536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.read(data)                                  # b"": the other side is gone

    def offer(self, data) -> int:
        """How many bytes the kernel took; -1: the other side is gone."""
        try:
            return self.socket.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            return -1

    def write(self, data):
        self.wrote(data, self.offer(data))

    def wrote(self, data, sent):
        if sent < 0:
            return self.close()
        waited = bool(self.rest)
        self.rest = b""
        if sent == len(data):
            return self.written()
        self.rest = memoryview(data)[sent:]              # all who are slow share the bytes
        if sent or not waited:
            self.deadline = time.monotonic() + self.STUCK_SECONDS
        self.listen(self.events | WRITABLE)

    def close(self):
        if self in self.edge.held:
            self.edge.held.discard(self)
            self.listen(0)
            self.socket.close()


class Stream(Held):
    """An open live answer. It keeps at most the rest of one frame, and the latest after it.

    A page shows several pieces, each in a slot: "seen" is the region, "here" who else looks
    on, "page" all of it, after a change of role.
    """
    SEND_BUFFER = 131_072                                # bytes, in the kernel
    BEAT_SECONDS = (15, 25)                              # spread: thousands beat

    def __init__(self, edge, socket_, request, response, viewer):
        self.again = Request("GET", request.path, request.query, request.headers,
                             peer=request.peer, scheme=request.scheme)
        self.account = response.which
        self.viewer = viewer                             # as the last verdict said
        self.zipped = accepts_gzip(request)
        self.channel: Optional[Channel] = None
        self.seen = response.watch.piece.etag            # what is shown, by slot
        self.here = ""
        self.latest: Dict[str, Piece] = {}               # what is to be shown next, by slot
        self.beat = time.monotonic() + random.uniform(*self.BEAT_SECONDS)
        socket_.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.SEND_BUFFER)
        if sys.platform == "linux":                      # a peer that vanished silently
            patience = int(1000 * self.STUCK_SECONDS)
            socket_.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience)
        super().__init__(edge, socket_)

    def show_page(self, piece):
        """It has the region as well. What waited is older."""
        self.latest = {}
        self.seen = ""
        self.here = ""
        self.send("page", piece)

    def show_here(self, piece):
        if self.here != piece.etag:
            self.here = piece.etag
            self.send("here", piece)

    def send(self, slot, piece):
        if self.show(slot, piece):
            self.count("sent")

    def show(self, slot, piece) -> bool:
        """Did it go out, rather than wait behind the rest of another?"""
        if self.rest:
            self.count("coalesced", slot in self.latest)
            self.latest[slot] = piece
            return False
        data = piece.zipped if self.zipped else piece.plain
        sent = self.offer(data)
        if sent != len(data):
            self.wrote(data, sent)
        return True

    def count(self, what, frames=1):
        self.edge.broker.frames[what] += frames
        if self.channel:
            self.channel.frames[what] += frames

    def written(self):
        latest, self.latest = self.latest, {}
        for slot, piece in latest.items():
            self.send(slot, piece)

    def read(self, data):
        """A browser says nothing on a stream but goodbye. The rest is read over."""
        if not data:
            self.close()

    def tick(self, now):
        if self.rest and now > self.deadline:
            self.count("dropped")
            self.close()
        elif not self.rest and now > self.beat:
            self.beat = now + random.uniform(*self.BEAT_SECONDS)
            self.write(self.framed(BEAT))

    def framed(self, data):
        return chunk(deflated(data) if self.zipped else data)

    def end(self, frame):
        """With a last frame and a proper end, if the gate closed it and not the network."""
        if frame and not self.rest:
            self.write(self.framed(frame) + LAST_CHUNK)
        self.close()

    def close(self):
        self.edge.broker.leave(self)
        super().close()


# ==== 25. Broker ==========================================================================
# The idea: streams that must show the same share a channel. When its topic is published,
#   the object is asked once, and the same bytes go to every socket. The object may sleep.
# It promises: after a publish each stream gets the latest; those between may be left out.
#   When somebody's access changes, their streams ask the gate again, at once.
# Who uses it: the loop edge. Objects only tell it what was published.

class Channel:
    """Its states: quiet; busy (being asked or delivered); busy and stale (published again
    meanwhile, so it goes round once more)."""

    def __init__(self, subscription):
        self.subscription = subscription
        self.streams = set()
        self.busy = False
        self.stale = False
        self.frames = collections.Counter()              # sent, coalesced, dropped


class Broker:
    """The loop changes it. Other threads only mark a channel."""
    SOME = 64                                # streams that get a frame before others' turn
    ALONE_SECONDS = 30.0                     # for which a Directory may be out of reach
    LOOK_SECONDS = 0.2                       # for which a busy object is waited for
    CALM_SECONDS = 30.0                      # after which a change of access has arrived
    quiet = ()                               # ids of which nobody is told who looks on

    def __init__(self, edge: LoopEdge):
        self.edge = edge
        self.lock = threading.Lock()                     # guards busy and stale
        self.channels: Dict[str, Dict[Any, Channel]] = {}    # by object, then by question
        self.frames = {"sent": 0, "coalesced": 0, "dropped": 0}
        self.accounts = collections.Counter()            # how many streams each has open
        self.version = 0                                 # of the Directory
        self.alone = 0.0                                 # since when it is out of reach
        self.changed = float("-inf")                     # when somebody's access last did
        self.here: Dict[str, Piece] = {}                 # by object: who watches it
        self.moved = set()                               # objects whose watchers changed
        self.failed = set()                              # channels that could not be asked

    # -- from a publish to the sockets

    def published(self, id: str, topic: str) -> None:
        """Called by an object, right after a commit. topic "": all of it."""
        if topic.startswith("access:"):
            self.changed = time.monotonic()
            self.regate(topic[7:])
        for channel in [*self.channels.get(id, {}).values()]:
            if topic in ("", channel.subscription.topic):
                self.mark(channel)

    def mark(self, channel):
        with self.lock:
            busy = channel.busy
            channel.busy = True
            channel.stale = True
        if not busy:
            lane = channel.subscription.stub.id
            self.edge.pool.gather(lane, channel, self.refresh_all)

    def refresh_all(self, channels):
        """In the pool. An object is a lane there: its regions would wait for each other."""
        for channel in channels:
            guarded(self.refresh, channel)

    def refresh(self, channel):
        """Ask the object what its region is now. It wakes for this if it must."""
        channel.stale = False
        piece = None
        streams = [*channel.streams]                     # who comes later has seen as much
        try:
            piece = self.ask(channel.subscription)
            if any([stream.zipped for stream in streams]):
                piece.zipped                             # made here, and not in the loop
        except CRASH:
            self.failed.add(channel)
            raise
        finally:
            self.edge.call(self.deliver, channel, piece, streams if piece else [])

    def ask(self, subscription) -> Piece:
        return subscription.stub.fetch(subscription.again).watch.piece

    def try_again(self):
        """In the pool: what is seen there may be old, and nobody need publish again."""
        for channel in [self.failed.pop() for _ in range(len(self.failed))]:
            if channel.streams:
                self.mark(channel)

    def deliver(self, channel, piece, streams):
        """To some; to the others when the loop has looked after whoever else is there."""
        sent = 0
        for stream in streams[:self.SOME]:
            if stream.seen != piece.etag and stream.channel is channel:
                stream.seen = piece.etag
                sent += stream.show("seen", piece)
        self.frames["sent"] += sent
        channel.frames["sent"] += sent
        if len(streams) > self.SOME:
            return self.edge.call(self.deliver, channel, piece, streams[self.SOME:])
        with self.lock:
            channel.busy = False
            again = channel.stale and channel.streams
        if again:
            self.mark(channel)

    # -- who watches

    def welcome(self, stream, subscription):
        """If access changed while its request was on the way, the verdict may be older."""
        self.join(stream, subscription)
        if time.monotonic() < self.changed + self.CALM_SECONDS:
            self.regate(stream)

    def join(self, stream, subscription):
        id = subscription.stub.id
        of_object = self.channels.setdefault(id, {})
        channel = of_object.setdefault(subscription.channel, Channel(subscription))
        stream.channel = channel
        channel.streams.add(stream)
        self.accounts[stream.account] += 1
        self.watched(id, 1)
        self.mark(channel)                               # something may have come meanwhile
        if id in self.here:
            stream.show_here(self.here[id])
        else:
            self.tell_who_is_here()

    def leave(self, stream):
        channel = stream.channel
        if channel is None:
            return
        stream.channel = None
        id = channel.subscription.stub.id
        channel.streams.discard(stream)
        self.accounts[stream.account] -= 1
        self.watched(id, -1)
        if not channel.streams:                          # the last one out
            del self.channels[id][channel.subscription.channel]
        if not self.channels[id]:
            del self.channels[id]
            self.here.pop(id, None)

    def watched(self, id, more):
        """A stream on this object came (1) or went (-1)."""
        self.moved.add(id)

    def tell_who_is_here(self):
        """Once a second: to those who watch an object of which watchers came or went."""
        moved, self.moved = self.moved, set()
        for id in moved & {*self.channels} - {*self.quiet}:
            streams = [stream for channel in self.channels[id].values()
                       for stream in channel.streams]
            self.here[id] = presence(streams)
            for stream in streams:
                stream.show_here(self.here[id])

    # -- who may still watch

    def regate(self, whose):
        """Have a stream, or all of an account ("": of everybody), ask the gate once more.

        One after the other, so that the latest verdict is the last.
        """
        self.edge.pool.gather("access", whose, self.gate_again)

    def gate_again(self, those):
        """In the pool."""
        busy = set()                                     # objects that were waited for once
        for held in [*self.edge.held]:
            if isinstance(held, Stream) and not {held, held.account, ""}.isdisjoint(those):
                guarded(self.ask_again, held, busy)

    def ask_again(self, stream, busy):
        """Send the request of a stream through the worker once more, up to its last step.

        Who may still look stays, and wakes nobody. A changed role sees what it may now. Who
        may no longer look is told.
        """
        try:
            asked = self.edge.decide_again(stream.again)
            if isinstance(asked, Response):
                if not asked.watch:
                    self.edge.call(stream.end, last_frame(asked))
                return
            viewer = viewer_in(asked.request)
            if viewer == stream.viewer:
                return
            if asked.stub.id in busy:
                raise Busy()
            response, whole = self.ask_as(asked)
            stream.viewer = viewer
            self.edge.call(self.rejoin, stream, response, whole)
        except Busy:
            busy.add(asked.stub.id)
            self.regate(stream)                          # behind the others
        except Refused as no:
            self.edge.call(stream.end, last_frame(Response(no.status)))
        except CRASH:
            self.edge.call(stream.close)                 # its client comes back
            raise

    def ask_as(self, asked):
        """Return the stream's answer and, as a piece, the page around it."""
        response = asked.stub.fetch_within(self.LOOK_SECONDS, asked.request)
        path = asked.request.path[:-len("/live")]
        around = asked.request._replace(path=path)
        page = asked.stub.fetch_within(self.LOOK_SECONDS, around)
        html = page.body.decode().replace(f' data-nonce="{page.nonce}"', "")
        return response, Piece(Html(html), 0.0, 0, main=False)

    def rejoin(self, stream, response, whole):
        if stream.channel is None:                       # it was closed meanwhile
            return
        self.leave(stream)
        stream.account = response.which
        stream.show_page(whole)
        self.join(stream, response.watch)

    def look_elsewhere(self):
        """In the pool, once a second: did another process change the Directory?"""
        directory = self.edge.env.directory
        before = self.version
        try:
            self.version = directory.ask("/_version")
            self.alone = 0.0
        except Refused as no:                            # it is in another process
            if not self.alone:
                log(f"the directory: {no.message}")
                self.alone = time.monotonic()
            if time.monotonic() > self.alone + self.ALONE_SECONDS:
                self.regate("")                          # nobody can say who may still look
        if before not in (0, self.version):
            self.published(directory.id, "access:")      # anybody's
            self.published(directory.id, "")
            self.elsewhere()

    def elsewhere(self):
        """Another process changed something."""


def presence(streams) -> Piece:
    names = sorted({stream.account for stream in streams})
    some = [{"account": name} for name in names[:20]]
    more = f"and {len(names) - 20} more" if len(names) > 20 else ""
    html = template("here")(name=some, more=more, watchers=len(streams))
    return Piece(html, 0.0, 0, main=False)


SAID_OF_VIEWERS = ("x-account", "x-role", "x-grants", "x-workspace", "x-id", "x-operator",
                   "x-read-only")


def viewer_in(forwarded: Request) -> Tuple[str, ...]:
    """Whom the gate let in, in its own words."""
    return tuple([forwarded.headers.get(name, "") for name in SAID_OF_VIEWERS])


def last_frame(response: Response) -> bytes:
    """b"": the stream breaks off, and its browser comes back."""
    if response.type == EVENTS:
        return response.body
    return goodbye(response.status) if response.status in (401, 403) else b""


# ==== 26. Loop edge =======================================================================
# The idea: one loop reads and writes all sockets. What was kept leaves at once; all else is
#   answered by the pool.
# How a request goes: the worker runs as it is, in an Env whose last step, forward, is noted
#   and not taken. Who is refused is answered. Who is let in is fetched, together with all
#   that came for the same object.
# It promises: each request comes out with a response. A connection that idles, reads slowly
#   or sends slowly costs a buffer and no thread. Requests of people who were never let into
#   a workspace stay out of its lane: how long they wait for their no tells them nothing.
# Who uses it: the network.

class Noted(NamedTuple):
    """The last step of a worker that only decides: whom to fetch from, and what."""
    stub: GuardedStub
    request: Request


def lane_of(path: str) -> str:
    """Where a request for a workspace's own object waits; "": it waits for nobody."""
    parts = path.split("/")
    if parts[:2] != ["", "w"] or len(parts) < 4 or parts[3] == "members":
        return ""
    return f"/w/{parts[2]}"


class Connection(Held):
    """A connection that is not a stream. It is in one state at a time."""
    IDLE, ARRIVING, ANSWERING, LEAVING = "idle", "arriving", "answering", "leaving"
    IDLE_SECONDS = 75.0                  # longer than the 60 s for which proxies keep one
    REQUEST_SECONDS = 10.0               # for all of it; a byte now and then moves nothing
    LINGER_SECONDS = 1.0                 # so that who is still sending can read our answer
    LINGER_BYTES = 65_536

    def __init__(self, socket, address, edge):
        self.peer = address[0]
        self.buffer = bytearray()
        self.reader = read_requests(self.buffer)
        self.ended = False                               # the other side sends no more
        self.keep = True                                 # it goes on after this answer
        self.spare = self.LINGER_BYTES                   # bytes that are read over
        self.state = self.IDLE
        super().__init__(edge, socket)
        self.deadline = time.monotonic() + self.IDLE_SECONDS

    @property
    def busy(self) -> bool:
        return self.state == self.ANSWERING

    # -- reading, in the loop

    def read(self, data):
        self.ended = not data
        if self.state == self.LEAVING:
            return self.read_over(data)
        self.buffer += data
        if not self.busy:
            self.advance()
        elif self.ended or len(self.buffer) > HEAD_LIMIT + BODY_LIMIT:
            self.listen(0)                               # read on after the present answer

    def read_over(self, data):
        self.spare -= len(data)
        if not data or self.spare <= 0:
            self.close()

    def advance(self):
        """Take the next request up, if it is complete."""
        some = bool(self.buffer)
        try:
            reading = next(self.reader)
        except Refused as no:
            return self.refuse(no)
        if reading:
            self.state = self.ANSWERING
            if reading.body is None:                     # Expect (RFC 9110, 10.1.1)
                self.edge.pool.put(self.foresee, reading)
            else:
                self.edge.take_up(self, reading)
        elif self.ended:
            self.close()
        elif some and self.state == self.IDLE:
            self.arriving()

    def arriving(self):
        self.deadline = time.monotonic() + self.REQUEST_SECONDS
        self.state = self.ARRIVING

    def foresee(self, reading):
        """In the pool: the gate's no comes before a body is sent in vain."""
        try:
            request = self.edge.request(reading, self.peer)
            refuse_foreign(request)
            if request.path.startswith("/w/"):
                admit(request, self.edge.env)
            self.edge.call(self.go_on)
        except Refused as no:
            self.edge.call(self.refuse, no)
        except CRASH:
            self.edge.call(self.close)
            raise

    def go_on(self):
        if self in self.edge.held:
            self.arriving()
            with contextlib.suppress(OSError):
                self.socket.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.resume()

    def resume(self):
        """What was sent ahead has its turn when the others had theirs."""
        if not self.busy and self in self.edge.held:
            self.listen(0 if self.ended else READABLE)
            self.advance()

    # -- answering, in the loop or in the pool: while it is ANSWERING nobody else writes

    def reply(self, asked, response):
        if response.watch and asked.reading.method != "HEAD":
            return self.edge.call(self.become_stream, asked, response)
        data = self.encoded(asked, response)
        sent = self.offer(data)
        if sent == len(data) and self.keep:
            self.written()
        else:
            self.edge.call(self.wrote, data, sent)

    def encoded(self, asked, response):
        reading = asked.reading
        self.edge.count(asked, response)
        self.keep = (reading.keep and not self.edge.stopping and response.status != 421
                     and reading.method != "CONNECT")
        head_only = reading.method == "HEAD"
        return encode(asked.request, response, self.keep, head_only, self.edge.date)

    def written(self):
        """The answer has left."""
        if not self.keep:
            return self.leave()
        self.deadline = time.monotonic() + self.IDLE_SECONDS
        self.state = self.IDLE                           # first: the loop may be reading
        if self.buffer or self.ended:
            self.edge.call(self.resume)

    def leave(self):
        """Close so that who is still sending can read the answer (RFC 9112, 9.6)."""
        self.deadline = time.monotonic() + self.LINGER_SECONDS
        self.state = self.LEAVING
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
        if self.ended:
            self.close()
        else:
            self.listen(READABLE)

    def refuse(self, no):
        """One answer, and nothing behind it is read."""
        if self not in self.edge.held:
            return
        self.state = self.ANSWERING
        self.keep = False
        request = Request("GET", "/", peer=self.peer)
        response = self.edge.refusal(request, no)
        self.edge.count(Asked(self, None, request), response)
        self.write(encode(request, response, False, False, self.edge.date))

    def become_stream(self, asked, response):
        """In the loop, which counts the streams."""
        no = self.edge.no_stream(asked, response)
        if no:
            return self.reply(asked, self.edge.refusal(asked.request, no))
        data = self.encoded(asked, response)
        if self.ended:                                   # nobody is there to hear the rest
            self.keep = False
            return self.write(data)
        self.edge.held.discard(self)
        self.listen(0)
        viewer = viewer_in(asked.forwarded or asked.request)
        stream = Stream(self.edge, self.socket, asked.request, response, viewer)
        stream.write(data)
        if stream in self.edge.held:
            self.edge.broker.welcome(stream, response.watch)

    def tick(self, now):
        waiting = self.busy and not self.rest            # for a thread, which will end it
        if waiting or now < self.deadline:
            return
        if self.state == self.ARRIVING:
            self.refuse(Refused(408, "The request took too long to arrive. Send it again."))
        else:
            self.close()


@functools.lru_cache(maxsize=1024)
def in_networks(address: str, networks: Tuple[str, ...]) -> bool:
    with contextlib.suppress(ValueError):
        ip = ipaddress.ip_address(address.partition("%")[0])
        ip = getattr(ip, "ipv4_mapped", None) or ip      # IPv4, on a socket for both
        return any([ip in ipaddress.ip_network(network) for network in networks])
    return False


def cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


give_way = getattr(os, "sched_yield", lambda: None)
known_host_again = functools.lru_cache(maxsize=1024)(known_host)


class LoopEdge(ThreadingHTTPServer):
    """Binds in the constructor, serves in serve_forever(), ends by stop().

    settings: host, port, threads, connections, streams, allow_host and trust_proxy.
    """
    request_queue_size = 1024                            # 5 would turn a crowd away
    DRAIN_SECONDS = 5.0                                  # for the requests in flight
    END_SECONDS = 5.0                                    # for the threads
    TICK_SECONDS = 1.0
    broker_kind = Broker                                 # [3] has one that it adds to
    CALLS_SECONDS = 0.002                                # for calls, then the sockets
    EAGER_SECONDS = (0.0001,)                            # to stay awake, without a job
    EAGER_ON_ONE_CORE = (0.0001, 0.0005)                 # and with one

    def __init__(self, env: Env, settings: Any):
        self.settings = settings
        self.use(dataclasses.replace(env, doors={**env.doors, "/healthz": self.healthz}))
        self.held = set()
        self.selector = selectors.DefaultSelector()
        self.calls = collections.deque()                 # what other threads want done here
        self.waker, self.woken = socket.socketpair()
        self.awake = False
        self.eager = self.EAGER_ON_ONE_CORE if cores() == 1 else self.EAGER_SECONDS
        self.brisk = False                               # it pays just now to stay awake
        self.stopping = 0.0                              # since when; 0: it is not
        self.stopped = threading.Event()
        self.date = formatdate(usegmt=True)
        self.insiders = set()                            # hashes of lane and cookie
        names = ("", "localhost", socket.gethostname(), settings.host, *settings.allow_host)
        self.hosts = frozenset([name.lower() for name in names])
        self.kept = Kept(env.directory)
        self.broker = self.broker_kind(self)
        self.pool = Pool(settings.threads)
        self.chores: Sequence[Tuple[Callable[[], None], float]] = (
            (self.broker.try_again, 5.0),)
        self.due: List[float] = []
        self.address_family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        super().__init__((settings.host, settings.port), Connection)
        for one in (self.socket, self.waker, self.woken):
            one.setblocking(False)
        env.workspaces.listeners.append(self.broker.published)
        if env.directory.namespace is not env.workspaces:
            env.directory.namespace.listeners.append(self.broker.published)

    def use(self, env):
        """deciding: as env, but a request that may be forwarded is only noted."""
        self.env = env
        self.deciding = dataclasses.replace(env, forward=Noted)
        self.regating = self.deciding                    # for streams that are open

    def server_bind(self):
        """As http.server's, without the look-up of our own name, which can take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = self.socket.getsockname()[:2]

    # -- the loop

    def serve_forever(self, poll_interval=0.5):
        self.selector.register(self.socket, READABLE, self.accept)
        self.selector.register(self.woken, READABLE, lambda _: self.woken.recv(4096))
        self.pool.defer()
        next_tick = 0.0
        while not (self.stopping and self.drained()):
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + self.TICK_SECONDS
                self.tick(time.monotonic())
            for key, events in self.ready():
                guarded(key.data, events)
            self.run_calls()
        self.pool.rouse()
        self.stopped.set()

    def ready(self):
        """Wait until a socket can be read or written, or somebody calls.

        A core that fell asleep takes longer to wake than most answers take to make. So the
        loop stays awake for a moment, if that paid the last time. (Pages on one connection:
        1.2 x.) A job of the pool needs the interpreter itself, except where it only waits
        for the disk on the same core. (Commands on one connection: 1.3 x.)
        """
        self.pool.rouse()
        allowed = self.EAGER_SECONDS if self.broker.channels else self.eager
        busy = self.pool.busy
        until = time.perf_counter() + (allowed[busy] if busy < len(allowed) else 0.0)
        while self.brisk and time.perf_counter() < until:
            found = self.selector.select(0)
            if found or self.calls:
                return found
            give_way()                                   # others need this core, too
        self.awake = False
        found = self.selector.select(0 if self.calls else self.TICK_SECONDS)
        self.awake = True
        self.brisk = time.perf_counter() < until
        return found

    def run_calls(self):
        until = time.monotonic() + self.CALLS_SECONDS
        for _ in range(len(self.calls)):
            guarded(*self.calls.popleft())
            if time.monotonic() > until:                 # it is the turn of the sockets
                return

    def call(self, *call: Any) -> None:
        """call(function, *args): have the loop do it soon. From any thread."""
        self.calls.append(call)
        if not self.awake:                               # else it looks before it sleeps
            self.awake = True
            self.wake()

    def wake(self):
        with contextlib.suppress(OSError):               # full: it is awake already
            self.waker.send(b"\0")

    def accept(self, _):
        for _ in range(64):                              # then look after the others
            try:
                self.process_request(*self.get_request())
            except BlockingIOError:
                return
            except OSError as error:                     # no descriptors; see tick
                log(f"accept: {error}")
                return self.selector.unregister(self.socket)

    def process_request(self, request, client_address):
        """A place in the loop, in the place of a thread for this connection."""
        request.setblocking(False)
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = self.RequestHandlerClass(request, client_address, self)
        if len(self.held) > self.settings.connections:
            connection.refuse(Refused(503, "The server is full. Try again in a minute.",
                                      (("retry-after", "60"),)))

    def tick(self, now):
        """Once a second: the date, deadlines, heartbeats, and a look at who may sleep."""
        self.date = formatdate(usegmt=True)
        if len(self.insiders) > 100_000:
            self.insiders.clear()
        for held in [*self.held]:
            guarded(held.tick, now)
        guarded(self.broker.tell_who_is_here)
        self.pool.put(self.env.workspaces.rest)
        self.pool.put(self.env.directory.namespace.rest)
        self.pool.put(self.broker.look_elsewhere)
        self.begin_chores(now)
        if not self.stopping and self.socket.fileno() not in self.selector.get_map():
            self.selector.register(self.socket, READABLE, self.accept)

    def begin_chores(self, now):
        """Each after its time, and never twice at a time. 0 seconds: never."""
        if len(self.due) != len(self.chores):
            self.due = [now + every for _, every in self.chores]
        for number, (chore, every) in enumerate(self.chores):
            if every and now >= self.due[number]:
                self.due[number] = now + every
                self.pool.gather(f"chore {number}", chore, lambda chores: chores[0]())

    # -- a request: in the loop, then in the pool

    def take_up(self, connection, reading):
        asked = Asked(connection, reading, Request("GET", "/", "", reading.headers),
                      started=time.perf_counter())
        try:
            request = self.request(reading, connection.peer)
        except Refused as no:
            return self.finish(asked, no)
        asked = asked._replace(request=request)
        if reading.method in SAFE and self.keeps_answers():
            asked = asked._replace(policy=self.kept.policy())
            kept = self.kept.find(asked)
            if kept:
                return connection.reply(asked, renewed(kept))
        lane = lane_of(request.path)
        if not lane:
            return self.pool.put(self.answer_all, [asked])
        if self.place_of(asked) not in self.insiders:    # a stranger, so far
            lane = f"{connection.peer} {lane}"
        self.pool.gather(lane, asked, self.answer_all)

    def keeps_answers(self) -> bool:
        return True

    def place_of(self, asked) -> int:
        """Who asks where: what is remembered of whom was let in."""
        return hash((lane_of(asked.request.path), asked.request.headers.get("cookie")))

    def answer_all(self, several):
        """In the pool: what came for one workspace."""
        let_in = collections.defaultdict(collections.deque)
        for asked in several:
            decided = outcome(self.decide, asked.request)
            if isinstance(decided, Noted):
                version = decided.stub.namespace.versions[decided.stub.id]
                asked = asked._replace(stub=decided.stub, forwarded=decided.request,
                                       version=version)
                let_in[decided.stub].append(asked)
            else:
                self.finish(asked, decided)
        for stub, group in let_in.items():
            while group:
                self.fetch_some(stub, group)

    def fetch_some(self, stub, group):
        outcomes = outcome(stub.fetch_all, [asked.forwarded for asked in group])
        if isinstance(outcomes, BaseException):
            outcomes = [outcomes] * len(group)
        for response in outcomes:
            self.finish(group.popleft(), response)

    def decide(self, request) -> Any:
        """The worker's response, or what it would forward, Noted. Raises Refused."""
        return worker(request, self.deciding)

    def finish(self, asked, response):
        """If not even a refusal can be made of it, the connection is closed."""
        try:
            if isinstance(response, BaseException):
                response = self.refusal(asked.request, response)
            if asked.request.method not in SAFE and response.status < 400:
                self.insiders.add(self.place_of(asked))
            whose = asked.request.headers.get("cookie")
            if whose and response.nonce and response.status == 200 and asked.stub:
                self.kept.keep(asked, response)
            if response.watch and accepts_gzip(asked.request):
                response.watch.piece.zipped              # made here, and not in the loop
            asked.connection.reply(asked, response)
        except CRASH as error:
            self.call(asked.connection.close)
            log_error(f"{asked.request.method} {asked.request.path}", error)

    def request(self, reading, peer) -> Request:
        """What a sound frame asks for. Raises Refused for a target, method or host."""
        headers = reading.headers
        method = "GET" if reading.method == "HEAD" else reading.method
        scheme = "http"
        if "x-forwarded-proto" in headers and in_networks(peer, self.settings.trust_proxy):
            scheme = "https" if headers["x-forwarded-proto"] == "https" else "http"
            peer = headers.get("x-forwarded-for", peer).rpartition(",")[2].strip()
        if not known_host_again(headers.get("host", ""), self.hosts):
            raise Refused(*NOT_OUR_NAME)
        if method not in METHODS:
            status = 405 if method in ("TRACE", "CONNECT") else 501
            allow = ", ".join(METHODS)
            raise Refused(status, f"The methods here are {allow}.", (("allow", allow),))
        path, query = "*", ""
        if method != "OPTIONS":
            path, query = parse_target(reading.target, headers.get("host", ""))
        return Request(method, path, query, headers, reading.body or b"", peer, scheme)

    def no_stream(self, asked, response) -> Optional[Refused]:
        """Why this one can't be opened; None: it can."""
        if not asked.reading.modern:
            return Refused(505, "A stream needs HTTP/1.1. Set proxy_http_version 1.1 in "
                                "the proxy.")
        if self.broker.accounts[response.which] >= self.most_streams():
            return Refused(429, "Too many windows are open for this account. Close some.",
                           (("retry-after", "30"),))
        return None

    def most_streams(self) -> int:
        return self.settings.streams or 100

    def refusal(self, request, error) -> Response:
        return refusal(request, error)

    def count(self, asked, response):
        """For Part Three: figures, and the access log."""

    def healthz(self, request, env):
        """A door."""
        only_read(request)
        return Response(503, b"draining\n") if self.stopping else Response(200, b"ok\n")

    def decide_again(self, request) -> Any:
        """For the broker: as decide, for a request whose answer is an open stream."""
        return worker(request, self.regating)

    # -- the end

    def stop(self) -> None:
        """Take no more requests; end when those in flight are answered. From any thread."""
        self.stopping = self.stopping or time.monotonic()
        self.wake()

    def drained(self):
        """Close what merely waits. A stream breaks off, so its browser comes back."""
        if self.socket.fileno() >= 0:
            with contextlib.suppress(KeyError):          # no descriptors just now
                self.selector.unregister(self.socket)
            self.socket.close()
        for held in [*self.held]:
            if isinstance(held, Stream) or not held.busy:
                held.close()
        return not self.held or time.monotonic() > self.stopping + self.DRAIN_SECONDS

    def shutdown(self):
        self.stop()
        self.stopped.wait()

    def server_close(self):
        """After serve_forever: end the threads, close every file."""
        self.pool.close(self.END_SECONDS)
        self.kept.close()                                # first: the last one tidies up
        self.env.workspaces.close()
        self.env.directory.namespace.close()
        for one in (*self.held, self.socket, self.selector, self.waker, self.woken):
            one.close()


# #### Part Three: running it ############################################################
#
#     27 Settings       28 Trace       29 Jobs        30 Slices, checked   31 Workspaces
#     32 Passwords      33 Accounts    34 Verdicts    35 Console           36 Snapshots
#     37 Planes         38 Figures     39 Server      40 Roots             41 Administration
#     42 Command line
#
# What makes a product of it: passwords, a console, jobs, snapshots, figures, other roots,
# commands for operators. It attaches to the parts before it by subclasses, by further routes
# of the Directory and by doors, which the roots in section 40 choose.

import bisect
import ctypes
import getpass
import http.client
import shutil
import tempfile
import types


# ==== 27. Settings ========================================================================
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
    plain: bool = False                  # Part One alone
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


# ==== 28. Trace ===========================================================================
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
            trip.status, trip.size = response.status, size_of(response)
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
            with self.silence(False), contextlib.suppress(Refused):
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


log_once = functools.lru_cache(maxsize=256)(log)     # what stays the same as long as the program does


def size_of(response: Response) -> int:
    """Bytes of an answer's body."""
    return len(response.watch.piece.plain if response.watch else response.body)


class TracedStore(GuardedStore):
    """A store whose calls are noted while somebody watches."""
    trace = Trace()
    name = ""                                        # whose calls these are, in the notes

    def run(self, sql, args):
        if not self.trace.watched or self.trace.thread.silent:
            return super().run(sql, args)
        started = time.perf_counter()
        rows = super().run(sql, args)
        found = len(rows) if self.cursor.description else self.cursor.rowcount
        shown = re.sub(r" /\* [\w-]+ may \w+ \*/$", "", sql)
        self.trace.note(self.name, shown, args, found, time.perf_counter() - started)
        return rows


class TracedStub(GuardedStub):
    def enter(self, ask, request, seconds=-1):
        trace = self.namespace.trace
        if not trace.watched:
            return super().enter(ask, request, seconds)
        kind = "gate" if request.path.startswith("/_gate") else self.namespace.kind
        enter = super().enter
        return trace.leg(kind, self.id, lambda request: enter(ask, request, seconds), request)

    def fetch_all(self, requests):
        if not self.namespace.trace.watched:
            return super().fetch_all(requests)
        return [outcome(self.fetch, request) for request in requests]


class TracedNamespace(GuardedNamespace):
    def __init__(self, *args: Any, trace: Optional[Trace] = None, most: int = 1024):
        super().__init__(*args, most=most)
        self.trace = trace or Trace()
        self.alarms: Dict[str, float] = {}           # by id: when its next job is due
        self.looked = set()                          # ids whose files need not be looked into for jobs any more
        self.on_alarm = lambda: None                 # called when one is due at once

    def get(self, id):
        return TracedStub(id, self)

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


# ==== 29. Jobs ============================================================================
# Work for later. A job is a row, put in by the transaction that wants it done, so there is none for what was rolled
# back; it runs in a transaction that takes the row out, so its writes and its end are one. Which object has a job due
# when is an index in memory, made again from the files at each start: only a tenant's own file knows its jobs.

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
        self.store.after_commit.append((self.alarm, due))

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
        self.store.after_commit.append((self.alarm, time.time()))

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
            job = due and json.loads(stub.fetch(Request("POST", "/_claim")).body)
            try:
                None if job is None else stub.fetch(Request("POST", "/_jobs", f"id={job}"))
            finally:
                due = due and stub.ask("/_due")
        finally:
            self.namespace.alarm(id, due)
            self.at_once.release()
            self.ring()


# -- jobs and other slices, for a slice

class FullContext(Context):
    """What a slice of the full server is given besides: jobs, and the exports of others."""
    __slots__ = ()

    def enqueue(self, job: Callable[..., None], after: float = 0.0, **args: Any) -> None:
        """Have job(ctx, **args) run in so many seconds, if the present transaction commits.

        args: what JSON can say. It runs again when it fails, so what it does outside of the
        store should bear to be done twice. Raises PermissionError outside of a command or job.
        """
        if self.store.may != WRITE:
            raise PermissionError("only a command or a job puts in a job")
        self.store.check_thread()
        self.host.queue.put(self.viewer.account, job, time.time() + after, args)

    def ask(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return function(store, *args), with the tables of the slice that exports it.

        Raises LookupError if none does.
        """
        self.store.check_thread()
        slice = self.host.router.exports.get(function)
        if slice is None:
            raise LookupError(f"{function} is not exported; put it into Slice(exports=...)")
        store = Tables(self.host.store, slice, self.store.may)
        try:
            return function(store, *args)
        finally:
            store.thread = 0


class FullRouter(Router):
    """Also knows the jobs, the exports and the topics of its slices."""

    def __init__(self, slices: Sequence[Slice]):
        super().__init__(slices)
        self.jobs = {f"{slice.name}.{job.__name__}": job for slice in slices for job in slice.jobs}
        self.exports = {function: slice.name for slice in slices for function in slice.exports}
        self.topics = {live.topic for slice in slices for live in slice.live}
        self.match = functools.lru_cache(maxsize=1024)(super().match)


class FullHost(Broadcast):
    """A host with jobs, whose store calls can be watched."""
    context = FullContext

    def make_store(self, create):
        store = TracedStore(self.namespace.path(self.id), create)
        store.trace = self.namespace.trace
        store.name = self.id
        return store

    def open(self, create=False):
        """Refused(422): it is to be new, and there are rows; the Directory that knew whose was lost."""
        super().open(create)
        if create and self.store.one("SELECT 1 FROM journal"):
            self.store.close()
            raise Refused(*TAKEN)

    def on_open(self):
        super().on_open()
        self.queue = Queue(self.store, self.router.jobs, functools.partial(self.namespace.alarm, self.id))
        with contextlib.suppress(sqlite3.DatabaseError):     # jobs that can't be read keep nobody out
            self.namespace.alarm(self.id, self.queue.due())

    def close(self):
        self.queue = None                            # it knows the store, and 3.9 frees no ring
        super().close()

    def viewer(self, request):
        viewer = super().viewer(request)
        return masked(viewer, request.headers.get("x-operator"), request.headers.get("x-read-only"))

    def work(self, row: sqlite3.Row, job: Callable[..., None]) -> None:
        """In the name of who enqueued it; what they may was asked then."""
        viewer = Viewer(account=row["who"])
        store = Tables(self.store, row["job"].partition(".")[0], WRITE)
        ctx = self.context(self, store, viewer, {}, Request("POST", "/_jobs"), {})
        try:
            if job(ctx, **json.loads(row["args"])) is not None:
                raise TypeError("a job returns nothing, and is neither async nor a generator")
        finally:
            ctx.end()
        self.journal(viewer, row["job"], str(row["id"]))

    def facts(self, request: Request) -> Dict[str, Any]:
        schema = self.store.one("SELECT count(*) FROM _migrations")[0]
        counting = [slice for slice in self.router.slices if slice.count]
        count = sum([slice.count(Tables(self.store, slice.name, READ)) for slice in counting])
        return {"count": count, "schema": schema, **self.queue.facts()}

    OWN = {**SliceHost.OWN, "/_counts": facts, "/_claim": lambda self, request: self.queue.claim(),
           "/_jobs": lambda self, request: self.queue.run(int(request.params["id"]), self.work),
           "/_due": lambda self, request: self.queue.due(), "/_retry": lambda self, request: self.queue.retry()}


@dataclasses.dataclass(frozen=True)
class Guest(Viewer):
    """An operator who looks on in somebody's name."""
    operator: str = ""
    read_only: bool = False

    def permit(self, grant, method="GET"):
        super().permit(grant, method)
        if self.read_only and grant != PUBLIC and method not in SAFE:
            raise Refused(403, "You look on read-only. End it, or begin again with writing allowed.")

    @property
    def signature(self):
        return f"{self.operator} as {self.account}"

    def banner(self):
        how = "read-only" if self.read_only else "writing"
        return template("layout.masquerade")(operator=self.operator, account=self.account, how=how)


def masked(viewer: Viewer, operator: Optional[str], read_only: Any) -> Viewer:
    return Guest(**vars(viewer), operator=operator, read_only=bool(read_only)) if operator else viewer


# ==== 30. Slices, checked =================================================================
# What a slice can't mean is told when the server starts, with the reason. And what Datastar can besides.


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
    grants, names, taken = {grant for role in ROLES.values() for grant in role}, {"orion", "directory", "welcome"}, set()
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


def patch_signals(signals: Any, *, only_if_missing: bool = False,
                  event_id: Optional[str] = None, retry: Optional[int] = None) -> bytes:
    """Return an event that merges signals into the page's (RFC 7386: null deletes one).

    signals is a dict, or JSON text that is sent as it is.
    """
    if not isinstance(signals, str):
        signals = json.dumps(signals, ensure_ascii=False)
    options = {"onlyIfMissing": "true" if only_if_missing else ""}
    return event("signals", signals, options, event_id, retry)


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


def heeded(params: Dict[str, str], **valid: str) -> str:
    """The query of those params whose value matches the pattern of their name, in one spelling: for a variant."""
    given = {name: params[name] for name, pattern in valid.items() if re.fullmatch(pattern, params.get(name, ""))}
    return urllib.parse.urlencode(given)


# ==== 31. Workspaces ======================================================================
# A workspace of the full server has a quota, which SQLite itself enforces, and tells the developer of a slice what
# no page will show.

class FullWorkspace(FullHost, Workspace):
    def on_open(self) -> None:
        """SQLite forgets max_page_count at each close, and a job brings no verdict: so the file remembers it."""
        super().on_open()
        self.quota, pages = "", self.store.one("PRAGMA user_version")[0]
        if pages:
            self.store.exec(f"PRAGMA max_page_count = {pages}")

    def handle(self, request: Request) -> Response:
        quota = request.headers.get("x-quota", "0")
        if request.method not in SAFE and quota not in ("0", self.quota):
            self.set_quota(quota)
        return super().handle(request)

    def set_quota(self, quota: str) -> None:
        pages = min(max(1, int(quota) // self.store.one("PRAGMA page_size")[0]), 2 ** 31 - 1)
        self.store.exec(f"PRAGMA max_page_count = {pages}")
        if self.store.one("PRAGMA user_version")[0] != pages:
            self.store.exec(f"PRAGMA user_version = {pages}")
        self.quota = quota

    def journal(self, viewer: Viewer, what: str, which: str) -> None:
        """Whoever writes a slice and forgets to publish would see old pages and no error; so it is said, once."""
        super().journal(viewer, what, which)
        told = {topic[0] for call, *topic in self.store.after_commit if call == self.bus.tell}
        if not told & self.router.topics:
            log_once(f"{what} wrote, and published {', '.join(told) or 'nothing'}: no open page will show it")


# ==== 32. Passwords =======================================================================
# A password is hashed so that each guess costs 0.1 s and 32 MiB. That takes place outside of any object's turn, for
# in the Directory's every gate would wait; and guesses are counted.

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


class Passwords:
    """Doors to the Directory. They prove a password before the request takes the Directory's turn."""

    def __init__(self) -> None:
        self.throttle, self.sign_ins, self.regulars = Throttle(), Throttle(30), {}

    def door(self, request: Request, env: Env) -> Response:
        if request.method == "POST":
            request = self.prove(request, env.directory)
        return env.directory.fetch(request)

    def prove(self, request: Request, directory: Stub) -> Request:
        fields = request.fields()
        name, password, new = [str(fields.get(key, "")) for key in ("username", "password", "new")]
        if max(len(name), len(password), len(new)) > 256:
            raise Refused(400, "A name and a password have at most 256 characters.")
        known = f"{name} from {request.peer}"        # who got in from there before is not locked out by others' guesses
        keys = [f"from {request.peer}", *([] if known in self.regulars else [f"to {name}"])]
        self.throttle.check(*keys)
        self.sign_ins.check(known)
        stored = directory.ask("/_password", headers={"x-account": name})
        if not password_matches(password, stored):
            self.throttle.failed(known, *keys)
            return request._replace(headers={**request.headers, "x-proved": ""})
        self.throttle.succeeded(known, *keys)
        self.sign_ins.failed(known)                  # each takes 0.1 s and a row: nobody needs so many
        self.regulars = dict.fromkeys([*self.regulars][-1000:] + [known])
        hashed = hash_password(new) if new else ""
        return request._replace(headers={**request.headers, "x-proved": name, "x-known": stored, "x-hashed": hashed})


def proved(ctx: Context) -> str:
    """Whose password came along. Nobody's (""): it was wrong, or was changed while it was checked."""
    name = ctx.request.headers["x-proved"]
    row = ctx.store.one("SELECT password FROM accounts WHERE name = ?", name)
    return name if row and row["password"] == ctx.request.headers["x-known"] else ""


def login_form(next: str, username: str = "", problem: str = "", status: int = 200) -> Response:
    return page("Sign in", template("login")(next=next, username=username, problem=problem), status=status)


def login_page(ctx: Context) -> Response:
    next = local_path(ctx.params.get("next", "/"))
    return login_form(next, ctx.typed.get("username", ""), ctx.typed.get("problem", ""))


def login(ctx: Context) -> Response:
    account = proved(ctx)
    if not account:
        raise Refused(422, "Name and password do not go together. Try again.")
    return open_session(ctx, account)


# ==== 33. Accounts ========================================================================
# Further pages of the Directory: one's own sessions and password; and an operator's look on in somebody's name.

MASQUERADE_SECONDS = 15 * 60
ACCOUNT_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")


def my_digest(ctx: Context) -> bytes:
    return bytes.fromhex(ctx.request.headers["x-session"])


def account_page(ctx: Context) -> Response:
    """One's own sessions, wherever they are. Each is named by a few digits of a hash that opens no door."""
    mine = my_digest(ctx)
    found = ctx.store.query("SELECT digest, created, agent FROM sessions WHERE account = ? "
                            "ORDER BY created DESC LIMIT 100", ctx.viewer.account)
    sessions = [{"name": row["digest"].hex()[:16], "since": formatdate(row["created"], usegmt=True),
                 "agent": row["agent"], "this": row["digest"] == mine} for row in found]
    body = template("account")(session=sessions, account=ctx.viewer.account, problem=ctx.typed.get("problem", ""))
    return page("Account", body, ctx.viewer)


def choose_sessions(ctx: Context) -> Response:
    """End some. The field session is one's name, or all, or others."""
    which, mine = ctx.field("session"), my_digest(ctx)
    for row in ctx.store.query("SELECT digest FROM sessions WHERE account = ?", ctx.viewer.account):
        if which in ("all", row["digest"].hex()[:16]) or (which == "others" and row["digest"] != mine):
            end_sessions(ctx, "digest = ?", row["digest"])
    return see_other("/account")._replace(which=f"sessions: {which}"[:64])


def change_password(ctx: Context) -> Response:
    """Proved like a sign-in; all other sessions of the account end."""
    account, new = ctx.viewer.account, ctx.field("new")
    if proved(ctx) != account:
        raise Refused(422, "The present password is not right. Try again.")
    if not 8 <= len(new) <= 256:
        raise Refused(422, "A password has 8 to 256 characters.")
    ctx.store.exec("UPDATE accounts SET password = ? WHERE name = ?", ctx.request.headers["x-hashed"], account)
    end_sessions(ctx, "account = ? AND digest <> ?", account, my_digest(ctx))
    return see_other("/account")._replace(which=account)


def masquerade(ctx: Context) -> Response:
    """An operator looks on in somebody's name, for 15 minutes; read-only, unless they ask for more."""
    row, account = ctx.host.session(ctx.request), ctx.field("account").strip()
    if not ctx.host.is_operator(row["owner"]):
        raise Refused(403, "Only an operator of this server may do that: account add NAME --operator makes one.")
    if not ctx.store.one("SELECT 1 FROM accounts WHERE name = ?", account):
        raise Refused(404, "There is no account of this name. Go back and check the spelling.")
    lift_mask(ctx)
    ctx.store.exec("INSERT INTO masquerades VALUES (?, ?, ?, ?)", my_digest(ctx), account,
                   "writes" in ctx.request.fields(), time.time() + MASQUERADE_SECONDS)
    access_changed(ctx, row["account"])
    return see_other(local_path(ctx.field("next", "/")))._replace(which=account)


def unmask(ctx: Context) -> Response:
    if "x-session" in ctx.request.headers:
        lift_mask(ctx)
    return see_other("/")._replace(which=ctx.viewer.account)


def lift_mask(ctx: Context) -> None:
    """The mask of a session, also where its time has run out just now."""
    mask = ctx.store.one("SELECT account FROM masquerades WHERE digest = ?", my_digest(ctx))
    if mask:
        ctx.store.exec("DELETE FROM masquerades WHERE digest = ?", my_digest(ctx))
        access_changed(ctx, mask["account"])


further = Slice("accounts", routes=(
    Route("GET", "/login", PUBLIC, login_page),
    Route("POST", "/login", PUBLIC, login),
    Route("GET", "/account", ACCOUNT, account_page),
    Route("POST", "/account/sessions", ACCOUNT, choose_sessions),
    Route("POST", "/account/password", ACCOUNT, change_password, form="/account"),
    Route("POST", "/masquerade", ACCOUNT, masquerade),
    Route("POST", "/masquerade/end", PUBLIC, unmask)))


def together(name: str, *slices: Slice) -> Slice:
    """One slice of several, which share the tables. Where two have the same address, the first one answers."""
    migrations, live, routes = [], [], []
    for slice in slices:
        migrations += slice.migrations
        live += slice.live
        routes += slice.routes
    return Slice(name, tuple(migrations), tuple(live), tuple(routes))


# ==== 34. Verdicts ========================================================================
# The Directory of the full server: its gate knows of moves, quotas, nodes and masks; it gives a verdict again while
# nobody wrote to its file; and it answers what the server's other parts ask.

SEALED_SECONDS = 30                                  # for which a sealed message between two processes is believed
FRESH_SECONDS = 2                                    # and a verdict, without asking the gate again
VERDICT = ("x-account", "x-role", "x-can-delete", "x-grants", "x-workspace", "x-id", "x-operator", "x-read-only",
           "x-quota", "x-node")                      # what the gate says of a viewer
TRUSTED.update(VERDICT, ("x-verdict", "x-proved", "x-known", "x-hashed"))
STRANGERS = "One process takes the other for a stranger. Copy the directory's secret.key to each node; compare clocks."
GATE = """SELECT s.digest, s.expires, s.account AS owner, ifnull(q.account, s.account) AS account, q.writes,
                 w.id, w.quota, w.moving, w.node, m.role
          FROM sessions s LEFT JOIN masquerades q ON q.digest = s.digest AND q.until > ?
          LEFT JOIN workspaces w ON w.name = ?
          LEFT JOIN memberships m ON m.workspace = w.id AND m.account = ifnull(q.account, s.account)
          WHERE s.digest = ?"""
OVER = """SELECT account, '' AS owner FROM sessions WHERE expires <= ? UNION
          SELECT q.account, s.account FROM masquerades q JOIN sessions s ON s.digest = q.digest WHERE q.until <= ?"""
MOVING = Response(503, b"This workspace is being moved. Try again in a minute.\n", headers=(("retry-after", "30"),))


def add_key(path: pathlib.Path) -> None:
    """A new key in front of the newest, the only other that stays: what it sealed holds until the next rotation."""
    keys = [secrets.token_hex(32), *(path.read_text().split() if path.exists() else [])]
    part = beside(path, "part")
    with os.fdopen(os.open(part, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w") as file:
        file.write("\n".join(keys[:2]) + "\n")
    put_in_place(part, path)


def seal_of(parts: Iterable[str], key: bytes, until: int) -> str:
    return f"{until}.{hmac.digest(key, b'plane:' + json.dumps([until, *parts]).encode(), 'sha256').hex()}"


def believed(given: str, parts: Sequence[str], keys: Tuple[bytes, ...]) -> bool:
    """Was this sealed here, over these parts, a short time ago? Clocks may differ by as much as it is believed."""
    until = int(given.partition(".")[0]) if re.fullmatch("[0-9]{1,11}[.][0-9a-f]{64}", given) else 0
    return 0 <= until - time.time() <= 2 * SEALED_SECONDS and any(
        [hmac.compare_digest(seal_of(parts, key, until), given) for key in keys])


digest_again = functools.lru_cache(maxsize=4096)(session_digest)


def mask_of(row: Optional[sqlite3.Row]) -> Tuple[str, bool]:
    """Of a session's row: the operator who looks on in the account's name, and whether read-only."""
    return ("", False) if row is None or row["writes"] is None else (row["owner"], not row["writes"])


@functools.lru_cache(maxsize=1024)
def full_verdict(account: str, role: str, workspace: str, id: str, operator: str = "", read_only: bool = False,
                 quota: int = 0, node: str = "") -> Response:
    """What is remembered here is how it reads, not that it holds."""
    said = dict(verdict(account, role, workspace, id).headers)
    if read_only:
        grants = [grant for grant in said["x-grants"].split(",") if grant.endswith(":read")]
        said.update({"x-grants": ",".join(grants), "x-can-delete": "false"})
    rare = {"x-operator": operator, "x-read-only": "true" if read_only else "", "x-node": node}
    said.update({"x-quota": str(quota), **{name: value for name, value in rare.items() if value}})
    return as_json(said)._replace(headers=tuple(said.items()))


def workspace_behind(request: Request) -> str:
    """For a proxy that asks for a verdict: the workspace of the request that it holds. "": none, or more than one."""
    targets = {request.headers[name] for name in ("x-original-uri", "x-forwarded-uri") if name in request.headers}
    target = targets.pop() if len(targets) == 1 else ""
    with contextlib.suppress(Refused):
        hit = re.match(r"/w/([^/]+)", plain_path(target.partition("?")[0]))
        return hit[1] if hit else ""
    return ""


def free_name(store: Store, name: str) -> str:
    """name. Refused(422): it is none for a workspace, or taken."""
    check_name(store, name)
    return name


def add_workspace(store: Store, workspaces: Namespace, name: str, members: Iterable[Sequence[str]],
                  source: Optional[pathlib.Path] = None) -> None:
    """members: accounts with their roles. The file (source; else an empty one) is there before the commit: a row
    without one means that it was lost."""
    id, node = new_id(store, workspaces, free_name(store, name)), place(store, name)
    if store.one("SELECT 1 FROM workspaces WHERE id = ?", id):
        raise Refused(422, "This server has one workspace. workspace import takes its file to a server of many.")
    if source and workspaces.path(id).exists():
        raise Refused(*TAKEN)
    add_rows(store, id, name, members)
    store.exec("UPDATE workspaces SET node = ?, moving = ? WHERE id = ?", node, node != "", id)
    if not node:
        put_in_place(source, workspaces.path(id)) if source else workspaces.create(id)


def place(store: Store, name: str) -> str:
    """The address of a new workspace's node, by rendezvous hashing: each gets its share. "": here."""
    nodes = [row["address"] for row in store.query("SELECT address FROM nodes")]
    return max(nodes, key=lambda node: hashlib.sha256(f"{node} {name}".encode()).digest(), default="")


class FullDirectory(FullHost, Directory):
    def __init__(self, id: str, namespace: Namespace, router: Router, pages: Sequence[Live], keys: Sequence[bytes],
                 workspaces: Namespace, settings: Settings) -> None:
        limit = settings.max_workspaces or (2000 if settings.demo else 20)
        super().__init__(id, namespace, router, pages, keys, workspaces, bool(settings.demo), limit)
        self.settings = settings
        self.verdicts: Dict[int, int] = collections.Counter()
        self.elsewhere = 0

    def on_open(self) -> None:
        super().on_open()
        self.as_of, self.admitted = None, {}         # the state of the file; its verdicts, and until when
        self.bus.listeners.append(functools.partial(count_access, self.bus.versions))

    def identified(self, request):
        digest = digest_again(request.headers.get("cookie", ""), COOKIES[request.scheme], self.keys)
        headers = {name: value for name, value in request.headers.items() if name != "cookie"}
        if digest:
            headers["x-session"] = digest.hex()
        return request._replace(headers=headers)

    def handle(self, request: Request) -> Response:
        if request.path.startswith("/_gate/") or request.path == "/_gate":
            if request.method not in SAFE:
                only_read(request)
            answer = self.gate(request, workspace_behind(request) if request.path == "/_gate" else request.path[7:])
            self.verdicts[answer.status] += 1
            return self.for_proxies(answer) if request.path == "/_gate" else answer
        return super().handle(request)

    # -- what the server's other parts ask; the worker lets no such path in from outside

    def version_now(self, request: Request) -> Any:
        """Moves when another process has written, and for nodes also when somebody's access changed. Asked each second,
        so what is over ends here."""
        now = time.time()
        over = self.store.query(OVER, now, now)
        if over:
            with self.store.tx():
                for account, owner in over:
                    self.bus.publish(f"access:{account}")
                    if owner:
                        self.journal(masked(Viewer(account=account), owner, False), "directory.unmask", "time is over")
                self.store.exec("DELETE FROM sessions WHERE expires <= ?", now)
                self.store.exec("DELETE FROM masquerades WHERE until <= ?", now)
        try:
            keys = load_keys(self.settings.key_file)
            if keys != self.keys:
                self.keys = keys
                self.namespace.changed(self.id)      # what was answered to cookies of an older key is not kept
        except Unusable as lost:                     # those at hand hold until the server ends
            log_once(str(lost))
        self.elsewhere = self.store.one("PRAGMA data_version")[0]
        return [self.opened_at, self.elsewhere, self.bus.versions["access"] if self.settings.plane else 0]

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
                "schema": len(DIRECTORY_TABLES + HISTORY)}

    def whoami(self, request: Request) -> Dict[str, Any]:
        """For the console: who asks, where they belong, whether they run this server."""
        row = self.session(request)
        account, mine = (row["account"], self.store.query(MINE, row["account"], "", 100)) if row else ("", [])
        return {"account": account, "masked": mask_of(row), "operator": bool(row) and self.is_operator(row["owner"]),
                "roles": {name: role for _, name, role in mine}, "personas": self.personas(account)}

    def is_operator(self, account: str) -> bool:
        return self.store.one("SELECT 1 FROM accounts WHERE name = ? AND operator", account) is not None

    def accounts_of(self, where, args):
        """And in whose names they look on."""
        those = f"FROM sessions WHERE {where}"
        return self.store.query(f"SELECT account {those} UNION SELECT account FROM masquerades "
                                f"WHERE digest IN (SELECT digest {those})", *args, *args)

    def mine(self, request: Request) -> List[str]:
        """The ids of the workspaces on this person's home page."""
        rows = self.store.query(MINE, self.viewer(request).account, request.params.get("after", ""), NAMES_A_PAGE)
        return [row["id"] for row in rows]

    def shows_console(self, viewer: Viewer) -> bool:
        return bool(self.personas("")) or self.is_operator(getattr(viewer, "operator", viewer.account))

    def place(self, ctx: Context, name: str, owner: str) -> None:
        if not self.settings.plane:
            return super().place(ctx, name, owner)
        if not place(ctx.store, name):
            raise Refused(503, "There is no node yet that could hold it; node add HOST:PORT names one.")
        add_workspace(ctx.store, self.workspaces, name, [(owner, "owner")])

    def node_of(self, request: Request) -> str:
        return self.store.one("SELECT node FROM workspaces WHERE id = ?", request.headers["x-id"])[0]

    OWN = {**FullHost.OWN, **Directory.OWN, "/_version": version_now, "/_password": password_of, "/_names": names,
           "/_whoami": whoami, "/_node_of": node_of, "/_mine": mine}

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
        as_of = *self.store.state(), self.keys
        if as_of != self.as_of or len(self.admitted) > 1024:
            self.as_of, self.admitted = as_of, {}
        key = request.headers.get("x-session"), workspace
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
        given = full_verdict(row["account"], row["role"], workspace, row["id"], *mask_of(row), quota, row["node"])
        if row["writes"] is None and not self.store.db.in_transaction:       # masquerades end by the clock
            self.admitted[key] = given, row["expires"] - SESSION_SECONDS / 2
        return given

    def session(self, request: Request, workspace: str = "") -> Optional[sqlite3.Row]:
        """The account of the request's session, with its role in workspace. None: it is not valid. Sessions slide: one
        in the second half of its time is renewed."""
        digest, now = bytes.fromhex(request.headers.get("x-session", "")), time.time()
        row = self.store.one(GATE, now, workspace, digest) if digest else None
        if row is None or row["expires"] <= now:
            return None
        if row["expires"] < now + SESSION_SECONDS / 2:
            self.store.exec("UPDATE sessions SET expires = ? WHERE digest = ?", now + SESSION_SECONDS, digest)
        return row

    def viewer(self, request: Request) -> Viewer:
        if "x-account" in request.headers:           # a verdict came along
            return super().viewer(request)
        row = self.session(request)
        return masked(Viewer(account=row["account"]), *mask_of(row)) if row else Viewer()


def single_gate(request: Request, env: Env) -> Response:
    """Whose rows they are. Whether somebody may see them, the object itself asks."""
    root = env.directory.namespace.awake(env.directory.id)
    said = {"x-workspace": request.path.split("/")[2], "x-id": env.directory.id,
            "x-session": root.identified(stripped(request)).headers.get("x-session", "")}
    return Response(200, headers=tuple(said.items()))


def count_access(versions: Dict[str, int], topic: str) -> None:
    if topic.startswith("access:"):
        versions["access"] += 1


class Single(FullDirectory):
    """Both planes in one object and one file, for a server with one workspace."""

    def __init__(self, *args: Any, inside: Router, **more: Any) -> None:
        super().__init__(*args, **more)
        self.outside, self.router = self.router, inside
        self.schema = [*self.outside.schema, *inside.schema[1:]]

    def router_for(self, request: Request) -> Router:
        """A workspace's pages are for whom its gate let in, and nobody else."""
        inside = "x-id" in request.headers and not re.match("/members(/|$)", request.path)
        return self.router if inside else self.outside

    def place(self, ctx, name, owner):
        add_workspace(ctx.store, self.workspaces, name, [(owner, "owner")])

    def viewer(self, request: Request) -> Viewer:
        """Who looks is asked in the same breath as there is to see: no request to a gate."""
        if "x-workspace" not in request.headers or "x-account" in request.headers:
            return super().viewer(request)
        answer = self.gate(request, request.headers["x-workspace"])
        if answer.status != 200:
            raise Refused(answer.status, answer.body.decode().strip(), answer.headers)
        return super().viewer(request._replace(headers=dict(answer.headers)))

    def topic(self, name, viewer):
        return super().topic(name, viewer) if name == "members" else name

    def on_open(self) -> None:
        super().on_open()
        pages = max(1, self.settings.quota // self.store.one("PRAGMA page_size")[0])             # 0 would be no limit
        self.store.exec(f"PRAGMA max_page_count = {pages}")


# ==== 35. Console =========================================================================
# The running server, seen from the inside: both planes, each request on its way, each store call as it lands. It is
# asked like an object and streamed like a region; but it has no store: what it shows is read from the objects that run.

class Console:
    id, PAUSE = "console", 0.25                        # seconds between two frames, however much happens

    def __init__(self, env: Env, broker: Broker) -> None:
        self.env, self.broker, self.trace, self.lock = env, broker, env.trace, threading.Lock()
        self.stale, self.due = True, False
        self.facts, self.counted, self.micros = {}, 0.0, 0     # what each object told of itself; when, in what time
        self.router = Router([Slice("console", (), routes=(
            Route("GET", "/console", ACCOUNT, self.page), Route("GET", "/console/live", ACCOUNT, self.stream),
            Route("POST", "/console/probe", ACCOUNT, self.probe),
            Route("POST", "/console/retry", ACCOUNT, self.retry)))])
        env.trace.news = self.news
        env.workspaces.listeners.append(self.published)

    def answer(self, request: Request, env: Env) -> Response:
        """A door. In the demo everybody may look, else operators."""
        with self.trace.silence():
            me = self.env.directory.ask("/_whoami", "", request.headers, request.scheme)
            if not (self.env.settings.demo or me["operator"]):
                Viewer(account=me["account"]).permit(ACCOUNT)
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
            html = self.region(request.params, not request.params.get("paused"))
            return Response(200, type=EVENTS, watch=Subscription(self, self.id, request, Piece(html, 0.0, 0)))

    def stream(self, request: Request, me: Dict[str, Any]) -> Response:
        again = Request("GET", "/console/live", variant_of(request.params))
        return self.fetch(again)._replace(which=me["account"])

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
        return page("Console", body, masked(Viewer(account=account), *me["masked"]), template("layout.console")(state=True))

    def probe(self, request: Request, me: Dict[str, Any]) -> Response:
        """Ask for a workspace's page as whoever is signed in, and show how far that came."""
        name, account = str(request.fields().get("workspace", "")).strip()[:63], me["account"]
        names = self.names({"name": name})["named"] if WORKSPACE_NAME.fullmatch(name) else {}
        served, cookie = self.env.workspaces.served, {"cookie": request.headers.get("cookie", "")}
        before = {id: served[id] for id in names}
        asked = Request("GET", f"/w/{name}{self.env.start}", "", cookie, scheme=request.scheme)
        briefly = dataclasses.replace(self.env, forward=lambda stub, request: stub.fetch_within(LOOK_SECONDS, request))
        trip = self.trace.probe(asked, lambda request: worker(request, briefly))
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
        masked(Viewer(account=me["account"]), *me["masked"]).permit(ACCOUNT, request.method)
        for id in self.names({"name": str(request.fields().get("workspace", ""))})["named"]:
            self.env.workspaces.get(id).fetch_within(LOOK_SECONDS, Request("POST", "/_retry"))
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
                "state": f"awake since {clock(one.opened_at)}" if one and one.store else "asleep",
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
        rows = [{"object": self.label(one.subscription.stub.id, names), "path": one.subscription.again.path,
                 "role": one.subscription.again.headers.get("x-role", ""), "open": len(one.streams),
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


# ==== 36. Snapshots =======================================================================
# Databases are copied by SQLite's own backup, which is consistent while others write, and a copy gets its final name
# when it is whole and checked. A snapshot copies the whole deployment; what did not change since the last is linked.

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
    sync_folder(target.parent)


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
        with contextlib.closing(GuardedStore(source)) as original, contextlib.closing(sqlite3.connect(part)) as copy:
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
    with contextlib.closing(GuardedStore(path)) as store:
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
    with contextlib.closing(GuardedStore(directory)) as store:
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


# ==== 37. Planes ==========================================================================
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


class RemoteStub(GuardedStub):
    """The address of an object that lives in another process."""

    def fetch(self, request):
        return self.namespace.send(self.id, request)

    def fetch_within(self, seconds, request):
        return self.fetch(request)

    def fetch_all(self, requests):
        return [outcome(self.fetch, request) for request in requests]

    def ask(self, path, query="", headers={}, scheme="http"):
        """Refused(503): it can't say so now, or does not know us."""
        answer = self.fetch(Request("GET", path, query, headers, scheme=scheme))
        if answer.status != 200:
            log_once(STRANGERS) if answer.status in (403, 404) else None
            raise Refused(503, "This can't be found out just now. Try again in a minute.", (("retry-after", "60"),))
        return json.loads(answer.body)


class RemoteNamespace(TracedNamespace):
    """Objects that live in other processes, at address(id)."""

    def __init__(self, *args: Any, settings: Settings, address: Callable[[str], str], trace: Trace) -> None:
        super().__init__(*args, None, trace=trace)
        self.settings, self.address = settings, address

    def get(self, id):
        return RemoteStub(id, self)

    def files(self):
        return iter(())                              # what is in the folder is none of theirs

    def send(self, id: str, request: Request) -> Response:
        if self.kind == "directory":
            return errand(self.settings, self.address(id), request)
        if not request.path.startswith("/_"):
            raise Refused(421, "Workspaces are served by the nodes. Ask again through the proxy in front.")
        return as_json(ask_node(self.settings, self.address(id), id, request.path[1:], request.method))


def directory_front(request: Request, env: Env) -> Response:
    """The worker of a directory alone. A workspace that somebody founded is there when its node has made the file."""
    if re.match("/_(version|whoami|gate/.*)$", request.path) and is_errand(request, env.settings):
        scheme = request.headers["x-forwarded-proto"]
        return env.directory.fetch(stripped(request)._replace(scheme=scheme))
    response = worker(request, env)
    if request.method == "POST" and request.path == "/workspaces" and type(response) is Response and response.which:
        open_on_node(env.settings, response.which)
    return response


def node_front(request: Request, env: Env) -> Response:
    """The worker of a node: the proxy asked the gate and brought the verdict. Without one nothing here is contacted."""
    if request.path.startswith("/_node/") and is_errand(request, env.settings):
        return node_errand(request, env)
    if request.path in ("/healthz", "/metrics"):
        return env.doors[request.path](stripped(request), env)
    if not request.path.startswith("/w/"):
        raise Refused(*NO_VERDICT)
    return worker(request, env)


NO_VERDICT = 403, "This node takes what a proxy brings with the gate's verdict. Ask through the proxy."


def node_gate(request: Request, env: Env) -> Response:
    """The verdict that a proxy brought from the gate. It holds for this node, for the workspace that the path names,
    and for a short time; when it is not fresh, for the request was long on its way, the gate is asked again."""
    said = {name: request.headers[name] for name in VERDICT if request.headers.get(name)}
    seal, parts = request.headers.get("x-verdict", ""), [said.get(name, "") for name in VERDICT]
    theirs = request.path.split("/")[:3] == ["", "w", said.get("x-workspace")]
    if not theirs or not believed(seal, parts, keys_now(env.settings)):
        raise Refused(*NO_VERDICT)
    age = time.time() + SEALED_SECONDS - int(seal.partition(".")[0])         # in seconds, if the clocks agree
    return here(Response(200, headers=tuple(said.items())) if age < FRESH_SECONDS else ask_the_gate(request, env), env)


def node_regate(request: Request, env: Env) -> Response:
    """For an open stream the gate is asked anew. If the workspace moved, the stream breaks off, and its client goes there."""
    return here(ask_the_gate(request, env), env)


def here(verdict: Response, env: Env) -> Response:
    """The verdict, if the workspace is on this node."""
    if verdict.status == 200 and dict(verdict.headers).get("x-node") != env.settings.node_name:
        raise Refused(421, "This workspace lives on another node. Ask again through the proxy.")
    return verdict


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
    id, what = request.path.split("/")[2:4]
    if what == "_counts":
        return as_json(facts_of(env.workspaces.get(id)))
    if what == "_retry":
        return env.workspaces.get(id).fetch_within(LOOK_SECONDS, Request("POST", "/_retry"))
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
    with contextlib.closing(GuardedStore(settings.directory_file)) as store:
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


# ==== 38. Figures =========================================================================
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
            line = self.line(method, request, response.status, size_of(response), seconds)
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
        if lines and len(self.scribe.line) < 10:
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


# ==== 39. Server ==========================================================================
# The loop edge with everything around it: figures, console, jobs, snapshots, other processes.

LOOK_SECONDS = 0.2                                   # for which the server's own questions wait for a busy workspace


@dataclasses.dataclass
class FullEnv(Env):
    """What the server's other parts work with, besides."""
    settings: Settings = None
    trace: Trace = None
    start: str = ""                                  # the page of a workspace that comes first
    front: Callable[[Request, Env], Response] = worker        # what the edge asks: the worker, or its like for one plane
    regate: Callable[[Request, Env], Response] = ask_the_gate      # for streams that are open
    passwords: Optional[Passwords] = None


def facts_of(workspace: Stub) -> Dict[str, Any]:
    """What it tells of itself. One that can't be read, or not now, has no count, and hides no other."""
    try:
        return json.loads(workspace.fetch_within(LOOK_SECONDS, Request("GET", "/_counts")).body)
    except Busy:
        return {"count": "busy"}
    except CRASH as error:
        if not isinstance(error, Refused):
            log_error("a slice's count", error)
        return {"count": "can't be read"}


def count_of(workspace: Stub) -> str:
    count = facts_of(workspace)["count"]
    return f"{count} open" if type(count) is int else count


def home_with_all_counts(request: Request, env: Env) -> Response:
    """A door. As in Part One, but a workspace that is busy, or can't be read, holds up no other."""
    if request.method in SAFE:
        mine = env.directory.ask("/_mine", request.query, request.headers, request.scheme)
        counts = {id: count_of(env.workspaces.get(id)) for id in mine}
        request = request._replace(headers={**request.headers, "x-counts": json.dumps(counts)})
    return env.directory.fetch(request)


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


class FullBroker(Broker):
    def watched(self, id, more):
        super().watched(id, more)
        if id == Console.id:
            self.edge.env.trace.watch(more)

    def look_elsewhere(self):
        with self.edge.env.trace.silence():
            super().look_elsewhere()

    def elsewhere(self):
        self.edge.alarms.look()


def is_loopback(address: str) -> bool:
    return in_networks(address, ("127.0.0.0/8", "::1"))


class Edge(LoopEdge):
    """Binds in the constructor, serves in serve_forever(), ends by shutdown() in another thread and server_close()."""
    broker_kind = FullBroker

    def __init__(self, env: FullEnv) -> None:
        self.figures = Figures(env.settings.log)
        super().__init__(env, env.settings)
        self.alarms = Alarms(env.workspaces, self.pool.put)
        snapshots = functools.partial(snapshot_again, self.settings), self.settings.backup_every       # 0: never
        self.chores = (give_back_memory, 5.0), (self.broker.try_again, 5.0), snapshots
        name = self.settings.node_name or f"{self.settings.host}:{self.server_port}"
        self.settings = self.settings._replace(node_name=name)
        self.use(dataclasses.replace(self.env, settings=self.settings))
        console = Console(self.env, self.broker)
        doors = {path: console.answer for path in ("/console", "/console/live", "/console/probe", "/console/retry")}
        self.use(dataclasses.replace(self.env, doors={**self.env.doors, **doors, "/metrics": self.metrics}))
        self.broker.quiet = (env.directory.id, Console.id)

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        self.pool.put(self.alarms.look)
        super().serve_forever(poll_interval)

    def tick(self, now: float) -> None:
        self.figures.flush()
        super().tick(now)
        self.alarms.ring()
        self.broker.published(Console.id, Console.id)

    def keeps_answers(self) -> bool:
        """Not on a node, where the verdict comes with the request; nor while somebody watches each trip."""
        return self.settings.plane != "data" and not self.env.trace.watched

    def use(self, env: FullEnv) -> None:
        super().use(env)
        self.regating = dataclasses.replace(self.deciding, gate=env.regate)

    def decide(self, request: Request) -> Any:
        return self.env.front(request, self.deciding)

    def answer_all(self, several: Sequence[Asked]) -> None:
        """While somebody watches, each request makes its trip alone."""
        if not self.env.trace.watched:
            return super().answer_all(several)
        for asked in several:
            self.finish(asked, outcome(self.env.trace.follow, asked.request, self.answer))

    def answer(self, request: Request) -> Response:
        return self.env.front(request, self.env)

    def refusal(self, request: Request, error: BaseException) -> Response:
        """Who is not signed in gets the form for it."""
        if isinstance(error, Refused) and error.status == 401 and not request.datastar \
                and "text/html" in request.headers.get("accept", ""):
            return login_form(local_path(request.path), problem=error.message, status=401)
        return refusal(request, error)

    def most_streams(self) -> int:
        return self.settings.streams or (self.settings.connections if self.settings.demo else 100)

    def count(self, asked: Asked, response: Response) -> None:
        method = asked.reading.method if asked.reading else "-"
        seconds = time.perf_counter() - asked.started if asked.started else 0.0
        self.figures.count(method, asked.request, response, seconds)

    def metrics(self, request: Request, env: Env) -> Response:
        """A door. Prometheus text format 0.0.4."""
        only_read(request)
        local, cookie = is_loopback(request.peer), {"cookie": request.headers.get("cookie", "")}
        if not (local and "x-forwarded-for" not in request.headers
                or env.directory.ask("/_whoami", "", cookie, request.scheme)["operator"]):
            raise Refused(403, "The figures are for this machine and for operators. Ask from 127.0.0.1, or sign in as "
                               "one.")
        directory = env.directory.namespace.objects.get(env.directory.id)
        return Response(200, self.figures.text(
            ("gate_verdicts_total", "counter", labelled("verdict", directory.verdicts if directory else {})),
            ("workspace_fetches_total", "counter", {"": env.workspaces.fetches}),
            ("workspaces_awake", "gauge", {"": len(env.workspaces.objects)}),
            ("streams_open", "gauge", {"": sum([isinstance(held, Stream) for held in [*self.held]])}),
            ("frames_total", "counter", labelled("result", self.broker.frames))).encode(), Figures.TYPE)

    def server_close(self) -> None:
        super().server_close()
        self.figures.close()


# ==== 40. Roots ===========================================================================
# Four composition roots: two planes in one process, one file for both, and each plane alone.

def two_planes(settings: Settings) -> FullEnv:
    """One Directory, a Workspace for each tenant, and a worker in front."""
    settings, fresh, keys = prepared(settings)
    trace, pages, router = Trace(with_args=settings.demo), pages_of(settings.slices), router_of(settings)
    build, awake = functools.partial(FullWorkspace, router=router, pages=pages), settings.awake or awake_by_default()
    check_tables(router)
    workspaces = TracedNamespace("workspace", settings.workspaces, settings.idle, build, trace=trace, most=awake)
    outside = FullRouter([together("directory", further, directory)])
    build = functools.partial(FullDirectory, router=outside, pages=pages, keys=keys, workspaces=workspaces, settings=settings)
    control = TracedNamespace("directory", settings.data, float("inf"), build, trace=trace)
    stub = control.get("directory")
    if fresh:
        control.create(stub.id)
    with contextlib.closing(Ledger(settings.directory_file)) as store:
        for name, entries in router.schema:          # before any tenant is opened: do they go with what ran before?
            store.migrate(f"workspace/{name}", entries)
    stub.ask("/_version")                            # what is wrong with it is heard now, not at the first request
    env = full_env(stub, workspaces, settings, trace, pages)
    if fresh and settings.demo:
        seed(env, DEMO_WORKSPACES, todos in settings.slices)
    return env


def full_env(directory: Stub, workspaces: Namespace, settings: Settings, trace: Trace, pages: Sequence[Live]) -> FullEnv:
    passwords = Passwords()
    doors = {**DOORS, "/": home_with_all_counts, "/login": passwords.door, "/account/password": passwords.door}
    return FullEnv(directory, workspaces, doors, settings=settings, trace=trace, start=pages[0].path, passwords=passwords)


class Ledger(GuardedStore):
    """Remembers entries that run in other files."""

    def apply(self, slice, number, sql):
        return set()


def router_of(settings: Settings) -> FullRouter:
    return FullRouter([welcome, *settings.slices])


def check_tables(router: Router) -> None:
    """MigrationError: the slices' tables do not go together. They are made once in memory."""
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(GuardedStore(pathlib.Path(folder, "t.db"), True)) as store:
        for name, entries in router.schema:
            store.migrate(name, entries)


def prepared(settings: Settings) -> Tuple[Settings, bool, Tuple[bytes, ...]]:
    """Whether it is a demo, whether there is nothing yet, and the keys."""
    demo = settings.demo
    if settings.single:
        settings.data.mkdir(parents=True, exist_ok=True)
        fresh = not settings.directory_file.exists()
        if fresh and not settings.key_file.exists():
            make_key(settings.key_file)
        keys = load_keys(settings.key_file)
    else:
        keys, fresh = prepare(settings.data, settings.directory_file, settings.key_file)
    if demo and not fresh:
        with contextlib.closing(GuardedStore(settings.directory_file)) as store:
            demo = store.one("SELECT 1 FROM accounts WHERE persona") is not None
    return settings._replace(demo=demo), fresh, keys


def pages_of(slices: Sequence[Slice]) -> List[Live]:
    return [live for slice in slices for live in slice.live] + [members]


class OneFile(TracedNamespace):
    """Of a single object, whose file may have any name."""

    def __init__(self, file: pathlib.Path, *rest: Any, trace: Trace) -> None:
        super().__init__("workspace", file.parent, *rest, trace=trace, most=1)
        self.file = file

    def id_from_name(self, name: str) -> str:
        return super().id_from_name("single")

    def path(self, id: str) -> pathlib.Path:
        return self.file

    def files(self) -> Iterator[Tuple[str, pathlib.Path]]:
        return iter([(self.id_from_name(""), self.file)])

    def create(self, id: str) -> None:
        if not self.file.exists():
            super().create(id)

    def draft(self) -> str:
        raise Refused(*TAKEN)


def single_root(settings: Settings) -> FullEnv:
    """One object and one file, with the same slices; the first workspace that is founded is the only one."""
    settings, fresh, keys = prepared(settings)
    trace, pages, router = Trace(with_args=settings.demo), pages_of(settings.slices), router_of(settings)
    check_tables(router)
    outside = FullRouter([together("directory", further, directory)])
    build = functools.partial(Single, router=outside, pages=pages, keys=keys, settings=settings, inside=router)
    namespace = OneFile(settings.single, float("inf"), lambda id, own: build(id, own, workspaces=own), trace=trace)
    root = namespace.get(namespace.id_from_name(""))
    namespace.create(root.id)
    root.ask("/_version")
    env = full_env(root, namespace, settings, trace, pages)
    env = dataclasses.replace(env, gate=single_gate)
    del env.doors["/workspaces"]                     # no file is to be made
    if fresh and settings.demo:
        seed(env, {"acme": DEMO_WORKSPACES["acme"]}, todos in settings.slices)
    return env


def directory_plane(settings: Settings) -> FullEnv:
    """Accounts, sessions and the gate; the workspaces are on the nodes that its table names."""
    env = two_planes(settings._replace(demo=False))
    workspaces = RemoteNamespace("workspace", settings.workspaces, settings.idle, settings=settings, trace=env.trace,
                                 address=lambda id: env.directory.ask("/_node_of", headers={"x-id": id}))
    del env.doors["/workspaces"]                     # the file is made on a node
    return dataclasses.replace(env, workspaces=workspaces, front=directory_front)


def data_plane(settings: Settings) -> FullEnv:
    """A node: workspaces, and the Directory in another process, whose key it shares. Unusable: it knows none, or has no
    key."""
    settings.workspaces.mkdir(parents=True, exist_ok=True)
    if not settings.key_file.exists() or not settings.directory:
        raise Unusable("a data plane needs --directory HOST:PORT, and in its data folder a copy of secret.key")
    trace, pages, awake = Trace(), pages_of(settings.slices), settings.awake or awake_by_default()
    build = functools.partial(FullWorkspace, router=router_of(settings), pages=pages)
    workspaces = TracedNamespace("workspace", settings.workspaces, settings.idle, build, trace=trace, most=awake)
    directory = RemoteNamespace("directory", settings.data, float("inf"), settings=settings, trace=trace,
                                address=lambda id: settings.directory).get("directory")
    env = full_env(directory, workspaces, settings._replace(demo=False), trace, pages)
    return dataclasses.replace(env, gate=node_gate, regate=node_regate, front=node_front)


PLANES = {"": two_planes, "directory": directory_plane, "data": data_plane}


def compose(settings: Settings, slices: Sequence[Slice] = (todos,)) -> FullEnv:
    """BadSlice, MigrationError: not with these slices."""
    check_slices(slices)
    root = single_root if settings.single else PLANES[settings.plane]
    return root(settings._replace(slices=slices))


def awake_by_default() -> int:
    """An awake workspace takes three descriptors; a quarter of all, thrice, leaves the last quarter to sockets."""
    return min(1024, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4) if resource else 256


# ==== 41. Administration ==================================================================
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
    with contextlib.closing(GuardedStore(settings.directory_file)) as store, store.tx():
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
        with contextlib.closing(GuardedStore(given.file)) as source:
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


def nobody_hears(topic: str) -> None:
    """A running server looks each second whether another process wrote."""


def member_set(settings: Settings, given: argparse.Namespace) -> None:
    """add, role and remove, by the rules that the members page has too."""
    role = getattr(given, "role", None)
    with opened(settings, given.verb, f"{given.workspace} {given.account} {role or ''}".strip()) as (store, _):
        id = row_of(store, "workspaces", given.workspace)["id"]
        row_of(store, "accounts", given.account)
        viewer = Viewer("owner", (), given.workspace, id, "(command line)")
        ctx = types.SimpleNamespace(store=store, viewer=viewer, publish=nobody_hears,
                                    host=types.SimpleNamespace(bus=types.SimpleNamespace(publish=nobody_hears)))
        before = role_of(store, id, given.account)
        if bool(before) == (given.verb == "member add"):
            why = "a member already; member role changes the role" if before else "no member; member add makes one"
            raise Unusable(f"{given.account} is {why}")
        set_role(ctx, given.account, before, NOT_A_MEMBER if role is None else valid_role(role))


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


# ==== 42. Command line ====================================================================
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
    ("--plain", "serve Part One of this file alone, as it stands: for reading, and for small trusted networks", bool),
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
        if kind is bool and isinstance(default, str):
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
        if settings.plain and (settings.single or settings.plane):
            raise Unusable("--plain has the two planes in one process; leave --single and --plane out")
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
    if settings.plain:
        check_tables(router_of(settings))
        return serve_plain(plain_planes(settings.data, settings.idle, settings.slices, bool(settings.demo)),
                           settings.host, settings.port)
    save_memory()
    env = compose(settings, settings.slices)
    if not settings.single:
        env.workspaces.tidy()
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
