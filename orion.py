#!/usr/bin/env python3
"""orion: a live, multi-tenant web server in one file, on the standard library alone.

    python3 orion.py           serves on http://127.0.0.1:8000, with a demo to click through
    python3 orion.py --plain   serves by the edge of Part One: a thread for each browser

Teams share pages. When somebody changes a page, everybody who looks at it sees the change
at once; and no team can see a row of another. A team is called a workspace here. This is
the path of one click, from the browser to the row and back to every screen:

    browser ---- POST /w/acme/todos ----> edge ----> worker
                                                     |    |
       1. may they?  GET /_gate/acme    +------------+    +-----------+   3. forward, with
       2. yes, and who they are         v                             v      the verdict
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
complete current state. So a message that arrives late, twice or never does no harm, and a
browser that was cut off simply asks again.

A feature is a few functions. These two, in short, are the core of the todos (section 9):

    def create(ctx):                    # a command: POST /w/acme/todos
        title = valid_title(ctx.field("title"))
        ctx.store.insert("INSERT INTO todos (title) VALUES (?)", title)
        ctx.publish("todos")            # waits for the commit
        return done(ctx)

    def todos_region(ctx):              # a region: called again after each publish
        rows = ctx.store.query("SELECT id, title, done FROM todos ORDER BY id DESC")
        return template("todos.region")(row=rows)

The pages talk to the server through Datastar, a small script in the browser:

    data-init="@get('./todos/live')"    opens a stream: an answer that does not end.
    event: datastar-patch-elements      Inside a stream: this markup takes the place of the
                                        element with the same id, and only what differs is
                                        changed.
    @post('./todos', {payload: ...})    sends values, called signals, as a JSON object.
    {"problem": "A title has ..."}      A JSON answer sets these signals in the page.
    retry: 'always'                     When a stream ends, ask for it again, forever.
    <div id="live" ...>                 The element that asks. Without it, nothing does.

The words. Where one has a second meaning, it is said here:

    workspace   a team with its rows: "acme"
    account     somebody who can sign in: "carol"
    grant       a permission: "todos:delete". A role is a name for a set of grants.
    viewer      an account inside a workspace, with its role and grants. One of the roles
                is also called "viewer": those who may only read.
    gate        where the Directory says who may enter a workspace. Its answer is called a
                verdict: 200 and the viewer, or 401, 403, 503.
    plane       a kind of work, with the objects that do it: the control plane, the data
                plane
    edge        the part that knows sockets
    object      one SQLite file and one lock: a Workspace, or the Directory. Others hold
                only a stub, its address. One that runs slices is called their host; the
                header Host names a server.
    turn        the lock of an object. One thread at a time holds it; the others wait.
    door        a function that answers one path outside of the workspaces: "/healthz"
    slice       a feature, from its tables to its pages: "todos"
    region      the part of a page that stays current: <section id="todos">
    command     a request that may write: POST, PUT, PATCH, DELETE. A journal records what
                it wrote, and who sent it [3].
    signal      a value in the page that an expression there, or an answer, can set
    topic       what a command publishes and a region listens to: "todos"
    stream      an answer that stays open and carries the regions of a page again after each
                change; what it sends each time is called a frame
    rendering   a region at one state of the store, made once for all viewers who have the
                same role and ask with the same parameters; or for one account

The file has three parts; its markup, style and script are in the folder templates/. Part
One is the architecture. It is complete: in a file of its own it runs without the other two.
(--plain serves with its edge, and with what the others add to its classes.) Part Two
replaces the place where connections and streams are held, to serve thousands of them. Part
Three is what a product needs around it. To know how it works, read Part One, and stop at
its last line. What is there only for the other parts is marked: [2], [3].
"""
from __future__ import annotations

import argparse
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
import re
import secrets
import signal
import socket
import sqlite3
import sys
import threading
import time
import traceback
import unicodedata
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import (Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple,
                    Union)

# What an app may use. [3] has more.
__all__ = ["ACCOUNT", "Html", "Live", "MEMBER", "PUBLIC", "ROLES", "Refused", "Region",
           "Response", "Route", "Slice", "Template", "as_json", "count_todos", "done",
           "read_signals", "template", "todos"]


# #### Part One: the architecture ########################################################
#
#      1 Requests    2 Worker       3 Markup        4 Events      5 Store      6 Bus
#      7 Objects     8 Slices       9 Todos        10 Workspace  11 Sessions  12 Directory
#     13 Members    14 Plain edge  15 Composition
#
# 1 and 2 are the way of a request: gate first, then forward. 3 and 4 are what it brings
# back: markup, and the events of a stream. 5 to 8 are an object: its file, its topics, its
# turn, and the slices that it runs; 9 is such a slice. 10 to 13 are the two kinds of
# objects, Workspace and Directory. 14 puts sockets around it, 15 puts it all together.
# Some sections end with what is to be skipped on a first reading; their banners say so.
#
# This is the path of one click, by functions and their sections:
#
#     PlainHandler.answer (14)    makes a Request of what came in
#     respond (14), worker (2)    first the gate: ask_the_gate (2), gate (12)
#     destination (2)             which object answers; the verdict becomes headers
#     Stub.fetch (7)              takes the turn of the object
#     SliceHost.command (8)       opens the transaction: DurableObject.command (7)
#     SliceHost.handle (8)        finds the route, checks the grant
#     SliceHost.call (8)          has the slice answer
#     create (9)                  validates, writes, publishes: Bus.publish (6)
#     Store.tx (5)                commits, and only then: Bus.tell (6)
#
# And in the thread of each open stream:
#
#     Watch.wait (7)              returns, because the topic was published
#     respond (14), worker (2)    the same question again, gate included
#     SliceHost.stream (8)        takes the rendering, which the first of them has made
#     PlainHandler.hold (14)      sends it
#
# A name nearly always has the same type, so functions do not repeat it: request is a
# Request, viewer a Viewer (in a region: a SharedViewer), env an Env, ctx a Context, store
# a Store. workspace and account are names; slice is a name, too, except in a loop over
# slices: there it is a Slice. A workspace's id has 64 hexadecimal digits. sql is a
# statement, args are its parameters.


# ==== 1. Requests =========================================================================
# The idea: the worker and the objects speak in requests and responses, as if each of them
#   were a server of its own. None of them knows of sockets.
# It promises: a request is never changed, only copied with a difference. Code that has to
#   say no raises Refused, with a status and a sentence that says what to do next.
# Who uses it: every section.

SAFE = ("GET", "HEAD")                                   # methods that change nothing
BODYLESS = (*SAFE, "DELETE")                             # what they send is in the query
METHODS = (*SAFE, "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
EVENTS = "text/event-stream"                             # the content type of a stream
NOTHING_HERE = (404, "There is nothing at this address. Check its spelling, or go back.")


class Request(NamedTuple):
    """What came in. path is decoded, query is not; header names are in lower case.

    A HEAD is a GET here: the edge leaves the body out.
    """
    method: str
    path: str
    query: str = ""
    headers: Dict[str, str] = {}
    body: bytes = b""
    peer: str = ""                                       # the client's address
    scheme: str = "http"                                 # or "https", by a trusted proxy
    spool: Any = None                                    # [3] a body too long for memory
    typed: Dict[str, str] = {}                           # [3] see Context.typed

    @property
    def datastar(self) -> bool:
        """Was it sent by Datastar, rather than by the browser itself?"""
        return "datastar-request" in self.headers

    @property
    def opens_page(self) -> bool:
        """Does a browser show the answer as a page?"""
        return not self.datastar and "text/html" in self.headers.get("accept", "")

    @property
    def stream(self) -> bool:
        """Does it ask for a stream?"""
        return self.method == "GET" and self.path.endswith("/live")

    @property
    def media_type(self) -> str:
        """The content type without its options; of a form it is a key of FORMS."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    @property
    def plain_form(self) -> bool:
        """Is it a form that the browser sent by itself? Then it shows the answer as its
        next page. (Datastar can send forms, too.)"""
        return not self.datastar and self.media_type in FORMS

    def with_headers(self, more: Dict[str, str]) -> Request:
        return self._replace(headers={**self.headers, **more})

    @property
    def params(self) -> Dict[str, str]:
        """The parameters of the query. Raises Refused(400) for too many."""
        return dict(decoded_pairs(self.query))

    def pairs(self) -> List[Tuple[str, Any]]:
        """Return all that was sent along, as (name, value): the fields of a form, or
        signals; of a GET or DELETE also the parameters.

        Raises Refused(415) for another body, Refused(400) if it cannot be read or has too
        many fields.
        """
        type = self.media_type
        if type in FORMS:
            return FORMS[type](self)
        if self.body and type != "application/json":
            raise Refused(415, "Send application/json or "
                               "application/x-www-form-urlencoded.")
        in_query = decoded_pairs(self.query) if self.method in BODYLESS else []
        return [*in_query, *read_signals(self).items()]


# Parameters or fields of a request. Without a bound, a form of 64 KB takes 18 ms to decode.
MOST_PAIRS = 100


def decoded_pairs(text: str, **options: bool) -> List[Tuple[str, str]]:
    """Return the pairs in a query or a form: name=value&name=value. Raises Refused(400)."""
    if not text:
        return []
    try:
        return urllib.parse.parse_qsl(text, max_num_fields=MOST_PAIRS, **options)
    except ValueError:                                   # too many; it has no other cause
        raise Refused(400, f"Send at most {MOST_PAIRS} parameters or fields in one "
                           "request.") from None


def read_form(request: Request) -> List[Tuple[str, Any]]:
    return decoded_pairs(request.body.decode("utf-8", "replace"), keep_blank_values=True)


def read_signals(request: Request) -> Dict[str, Any]:
    """Return the signals that came along: of GET and DELETE in the query, else in the body.

    Raises Refused(400) if they are not a JSON object.
    """
    in_query = request.method in BODYLESS
    try:
        text = request.params.get("datastar") if in_query else request.body.decode()
        signals = json.loads(text or "{}")
    except (ValueError, RecursionError):
        signals = None
    if isinstance(signals, dict):
        return signals
    raise Refused(400, "The signals are not a JSON object. Reload the page and try again.")


# How a form is read, by its content type. [3] adds one that brings files.
FORMS = {"application/x-www-form-urlencoded": read_form}


def as_text(name: str, value: Any) -> str:
    """Return a field, which may be a signal of any type, as text. Raises Refused(400)."""
    if isinstance(value, str):
        return value
    if not isinstance(value, (int, float, type(None))):
        raise Refused(400, f"{name} must be one value, not a list, an object or a file. "
                           "Reload the page and try again.")
    return "" if value is None else json.dumps(value)


class Response(NamedTuple):
    """What goes out."""
    status: int
    body: bytes = b""
    type: str = "text/plain; charset=utf-8"
    headers: Tuple[Tuple[str, str], ...] = ()
    nonce: str = ""                                      # of a page; see section 3
    watch: Optional[Watch] = None                        # of a stream; see section 7
    which: str = ""                                      # for streams [2], the journal [3]
    rest: Any = None                                     # [3] what follows the body


class Refused(Exception):
    """The answer is no, with an HTTP status.

    message says what to do next. If it is a 422 (wrong input) or a 409 (a conflict with
    what is there), the page that sent the command shows it, at this signal (section 8).
    fields: signals of single fields, mostly messages: "due" is the signal due_problem.
    """

    def __init__(self, status: int, message: str,
                 headers: Tuple[Tuple[str, str], ...] = (), signal: str = "problem",
                 fields: Optional[Dict[str, str]] = None):
        super().__init__(status, message)
        check_values(headers)
        self.status = status
        self.message = message
        self.headers = headers
        self.signal = signal
        self.problems = {f"{name}_problem": why for name, why in (fields or {}).items()}

    def __str__(self):
        return self.message

    @property
    def signals(self) -> Dict[str, str]:
        """The signals that show it in the page."""
        return {self.signal: self.message, **self.problems}


NOT_IN_A_VALUE = re.compile(r"[^\t -~\x80-\xff]")        # RFC 9110, 5.5


def check_values(headers):
    """Raise ValueError if a header value would end its line and begin another."""
    for name, value in headers:
        if NOT_IN_A_VALUE.search(value):
            raise ValueError(f"no header value may be {value!r:.200} (of {name})")


def as_json(data: Any, **more: Any) -> Response:
    return Response(200, json.dumps(data).encode(), "application/json", **more)


def see_other(path: str, *headers: Tuple[str, str], which: str = "") -> Response:
    return Response(303, headers=(("location", path), *headers), which=which)


LOCAL_PATH = re.compile(r"/(?![/\\])[!-\[\]-~]{0,2000}")


def local_path(path: str) -> str:
    """Return path if it leads to this server, else "/". //host would lead elsewhere."""
    return path if LOCAL_PATH.fullmatch(path) else "/"


# ==== 2. Worker ===========================================================================
# The idea: a function that decides where a request goes. It asks the Directory whether this
#   person may enter this workspace, and contacts the Workspace only on the answer 200.
# It promises: a request from somebody who is no member never reaches a Workspace. What a
#   Workspace hears about the viewer comes from the gate, never from the client.
# Who uses it: the edge, for each request, and again for each frame of an open stream.

def worker(request: Request, env: Env) -> Response:
    """Answer a request from outside: first the gate, then forward. Raises Refused."""
    if request.method == "OPTIONS":
        return Response(204, headers=(("allow", ", ".join(METHODS)),))
    refuse_foreign(request)
    if not request.path.startswith("/w/"):
        return outside(request, env)
    verdict = admit(request, env)
    return env.forward(*destination(request, verdict, env))


def admit(request, env):
    """Return the gate's verdict, if it is 200. Raises Refused for any other."""
    verdict = env.gate(request, env)
    if verdict.status != 200:
        raise Refused(verdict.status, verdict.body.decode().strip(), verdict.headers)
    return verdict


def ask_the_gate(request, env):
    """Fetch the verdict on the holder of this cookie from the Directory."""
    return env.directory.fetch(env.question(request))


def question_of(request):
    """Return what the gate is asked: may the holder of this cookie enter the workspace?"""
    workspace = request.path.split("/")[2]
    headers = {"cookie": request.headers.get("cookie", "")}
    return Request("GET", f"/_gate/{workspace}", "", headers, scheme=request.scheme)


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
    if path.split("/")[1] == "members":                  # it is the Directory's: see 13
        return env.directory, forwarded
    return env.workspaces.get(viewer_headers["x-id"]), forwarded


# Headers that the objects trust. No client may send them.
TRUSTED = {"x-account", "x-role", "x-can-delete", "x-grants", "x-workspace", "x-id",
           "x-session"}


def stripped(request):
    """Return the request without the headers that no client may send."""
    if TRUSTED.isdisjoint(request.headers):
        return request
    headers = {name: request.headers[name] for name in request.headers.keys() - TRUSTED}
    return request._replace(headers=headers)


def outside(request, env):
    """Answer what is outside of the workspaces: by a door, or by the Directory.

    Paths that begin with "/_" are for what the server itself asks its objects. Of these
    only the gate is open to clients, too: it tells people only about themselves.
    """
    request = stripped(request)
    if request.path in env.doors:
        return env.doors[request.path](request, env)
    if not request.path.startswith("/_"):
        return env.directory.fetch(request)
    if request.path.split("/")[1] != "_gate":
        raise Refused(*NOTHING_HERE)
    return env.directory.fetch(request._replace(query=""))   # only the worker's has one [3]


@dataclasses.dataclass
class Env:
    """All that a worker works with. A composition root (section 15) fills it in.

    The last four are functions, so that another root can choose others: [2] forwards many
    requests at once; [3] asks the gate on another machine, or asks it more. An edge calls
    front.
    """
    directory: Stub
    workspaces: Namespace
    doors: Dict[str, Callable[[Request, Env], Response]]     # by path
    gate: Callable[[Request, Env], Response] = ask_the_gate
    question: Callable[[Request], Request] = question_of     # what the gate is asked
    forward: Callable[[Stub, Request], Response] = lambda stub, request: stub.fetch(request)
    front: Callable[[Request, Env], Response] = worker


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
    foreign_origin = origin not in (None, ours) and as_sent(origin) != as_sent(ours)
    foreign_site = site not in (None, "same-origin")
    if silent or foreign_origin or foreign_site:
        raise Refused(403, "This request came from another site. Open the page here and "
                           "try again; a script sends its Origin.")


def as_sent(origin: str) -> str:
    """Return an origin as browsers send it: in lower case, without the default port of its
    scheme (RFC 6454, 4 and 6.2)."""
    scheme, _, host = origin.lower().partition("://")
    usual = {"http": ":80", "https": ":443"}.get(scheme, "")
    return f"{scheme}://{host.removesuffix(usual)}"


# ==== 3. Markup ===========================================================================
# The idea: text becomes markup in one place only. A template has holes, and what fills one
#   is written so that it stays text there.
# It promises: what a user typed never becomes markup, between tags or in quotes. [3] looks
#   where each hole of a template stands, and refuses one in which text could become markup,
#   code or a harmful address.
# Who uses it: every region and every page.

TEMPLATES = pathlib.Path(__file__).resolve().parent / "templates"
HOLE = re.compile(r"\{\{ ?(json )?(\w+) ?\}\}")
PART = re.compile(r"(?m)^<!-- (\w+) -->\n")


class Html(str):
    """Markup known to be safe. The result of + is plain text again."""
    __slots__ = ()

    def join(self, pieces: Sequence[Any]) -> Html:
        return Html(str.join(self, map(escape, pieces)))


def escape(value: Any) -> Html:
    if type(value) is Html:
        return value
    return Html(html.escape(str(value)))


NOTHING = object()                                       # stands for no value at all


class Template:
    """Markup with holes: Template("<b>{{who}}</b>")(who="<x>") is "<b>&lt;x&gt;</b>".

    It is made of its text, or of the path of its file. A line `<!-- row -->` begins the
    part "row", a template of its own, and {{row}} is its place in any part. A hole takes:

        text                        escaped
        Html                        as it is, between tags
        a dict or a row of a store  the part of that name, filled with it
        a list of these             that part, once for each
        True                        the part of that name: "{{delete}}" in todos.html; if
                                    there is none, the name itself: <input {{checked}}>
        a number                    that part, unless it is 0; if there is none, its digits
        False, None                 nothing

    The hole {{json who}} takes any value that JSON has. There is no other way for data to
    get into an expression: data-on:click="greet({{json who}})".

    Each hole is of a kind: "json" or "text". [3] knows three more: "a value", in quotes;
    "an address", the whole of an href; "an attribute", by itself in a tag. In the last one,
    1 and 0 are True and False, because SQL has no others.

    Raises ValueError if text could do harm in a hole [3], KeyError if nothing fills a hole
    or there is no part for a list, TypeError for a value that a hole does not take.
    """

    def __init__(self, text: Union[str, pathlib.Path],
                 parts: Optional[Dict[str, Template]] = None, line: int = 1):
        self.where = ""                                  # for messages: file and part
        if isinstance(text, pathlib.Path):
            self.where = f"{text.name}, "
            text = text.read_text("utf-8")
        first, *rest = PART.split(text)
        self.markup = first.rstrip("\n")
        self.line = line
        # How the markup is read, by the kind of hole that this fills ("text" for a page):
        # the markup before its first hole and, for each hole, its kind, name and writer and
        # the markup after it. None: this cannot fill a hole of that kind [3].
        self.readings = {}
        self.parts = {} if parts is None else parts      # one dict, shared by all of them
        for name, part in zip(rest[::2], rest[1::2]):
            line += first.count("\n") + 1
            first = part
            self.add(name, Template(part, self.parts, line))
        if parts is None:
            for part in [self, *self.parts.values()]:
                part.read_as("text")

    def __call__(self, **values: Any) -> Html:
        return Html(self.filled("text", values))

    # -- how it is read and filled (to be skipped on a first reading, up to template)

    def add(self, name, part):
        part.where = f"{self.where}part {name!r}, "
        if name in self.parts:
            raise ValueError(f"{part.where}line {part.line}: there is a part {name!r} "
                             "above; rename one of them")
        self.parts[name] = part

    def read_as(self, kind):
        """Find out what each hole takes, if this fills a hole of that kind."""
        if kind in self.readings:
            return
        places = self.places(kind)
        if places is None:                               # [3] text has to fill it
            self.readings[kind] = None
            return
        first, *after = HOLE.split(self.markup)[::3]     # the markup between the holes
        holes = [(place, name, WRITERS[place], markup)
                 for (place, name), markup in zip(places, after)]
        self.readings[kind] = first, holes
        for place, name in places:                       # a part may contain itself
            if name in self.parts and place != "json":
                self.parts[name].read_as(place)

    def places(self, kind):
        """Return (kind, name) of each hole, where this fills a hole of that kind. [3] has a
        stricter one."""
        return [("json" if is_json else "text", name)
                for is_json, name in HOLE.findall(self.markup)]

    def lacks(self, name, remedy):
        """Return the KeyError for a hole of this name. [3] tells its line."""
        return KeyError(f"{self.where}{remedy}")

    def filled(self, kind, values):
        text, holes = self.readings[kind]
        for place, name, write, after in holes:
            value = values.get(name, NOTHING)
            plain = type(value) is str
            text += write(value) if plain else self.fill(place, name, value, values)
            text += after
        return text

    def fill(self, kind, name, value, values):
        """Return the markup of a value that is not text."""
        if value is NOTHING:
            raise self.lacks(name, f"nothing fills the hole {name!r}: give {name}=...; "
                                   f"given: {', '.join(values) or 'nothing'}")
        if kind == "json":
            return write_json(value)
        if value is None or value is False:
            return ""
        if isinstance(value, int):                       # True is one, too
            return self.fill_once(kind, name, value, values)
        if isinstance(value, (dict, sqlite3.Row)):
            return self.fill_rows(kind, name, [value], values)
        if isinstance(value, list):
            return self.fill_rows(kind, name, value, values)
        if type(value) is not Html or kind == "an attribute":
            return WRITERS[kind](str(value))
        if kind != "text":
            raise TypeError(f"markup can't stand in the place of {kind}; fill the hole "
                            f"{name!r} with text, and not with {value!r:.60}")
        return value

    def fill_once(self, kind, name, value, values):
        """Fill the part of this name once, with the value; without a part, write it."""
        part = self.parts.get(name)
        if part and part.readings[kind]:
            return part.filled(kind, {**values, name: str(value)}) if value else ""
        if value is True or kind == "an attribute" and value in (0, 1):
            return name if value else ""
        return WRITERS[kind](str(value))

    def fill_rows(self, kind, name, rows, around):
        """Fill the part with each row. The values around it can be used inside, too."""
        part = self.parts.get(name)
        if not part or not part.readings[kind]:
            raise self.lacks(name, f"there is no part {name!r} for {kind}: write a line "
                                   f"<!-- {name} -->, and below it the markup of one row; "
                                   f"there is: {', '.join(self.parts) or 'none'}")
        others = [row for row in rows if not hasattr(row, "keys")]
        if others:
            raise TypeError(f"the part {name!r} is filled with dicts or rows, and not with "
                            f"{others[0]!r:.60}; Html().join makes markup of a list")
        return "".join([part.filled(kind, {**around, **row}) for row in rows])


# -- how a hole writes its value

# Characters that mean something in an expression, as JSON can write them: \u003c is <.
CODE = str.maketrans({sign: f"\\u{ord(sign):04x}" for sign in "!#$%&'()*/;<=>?@^`|~"})


def write_json(value):
    """Write JSON that has no character left that means something in an expression."""
    text = json.dumps(value, default=dict)               # a row of a store is a dict
    return text.translate(CODE).replace('"', "&quot;")


WRITERS = {"text": html.escape, "json": write_json}       # [3] has more


# -- pages

@functools.cache
def template(name: str) -> Template:
    """Return the file templates/<name>.html; for "todos.row", its part "row"."""
    file, _, part = name.partition(".")
    if not part:
        return Template(TEMPLATES / f"{file}.html")
    parts = template(file).parts
    if part not in parts:
        raise KeyError(f"{file}.html has no part {part!r}, but {', '.join(parts)}")
    return parts[part]


# What all pages say of the product. [3] has a Brand, which changes it.
LAYOUT = {"brand": "orion", "icon": "/icon.svg", "language": "en",
          "links": Html('<link rel="icon" href="/icon.svg">')}


def page(title: str, body: Html, viewer: Optional[Viewer] = None, nav: Any = "",
         footer: Any = "", status: int = 200, head: Any = "") -> Response:
    """Return a whole page. head: further links to styles and scripts.

    Its nonce is new each time. By the policy in section 14 the browser runs this server's
    own script files, and of the scripts inside a page only those that carry the nonce. So a
    script that somebody smuggled in does not run.
    """
    viewer = viewer or Viewer()
    nonce = secrets.token_hex(16)
    text = template("layout")(title=title, body=body, nonce=nonce, nav=nav, footer=footer,
                              head=head, account=viewer.account, person=viewer.person,
                              signed=viewer.account != "", banner=viewer.banner(),
                              **LAYOUT)
    return Response(status, text.encode("utf-8", "replace"), "text/html; charset=utf-8",
                    nonce=nonce)


# ==== 4. Events ===========================================================================
# The idea: the messages that a page understands when they come down a stream.
# It promises: no text, whatever is in it, can end its own event and begin another.
# Who uses it: streams (section 8), and the edge to say goodbye.

def event(kind: str, text: str, *lines: str) -> bytes:
    """Return a server-sent event (WHATWG HTML, 9.2.5): lines, and an empty one to end it.

    kind is "elements": text is markup, and each of its elements takes the place of the one
    with the same id; or "signals" [3]. lines: further fields, like "id: 3". Raises
    ValueError for a line break in one of these.
    """
    lines = [f"event: datastar-patch-{kind}", *lines]
    if re.search(r"[\r\n\0]", "".join(lines)):
        raise ValueError("a line break or NUL inside a line of an event")
    if text:
        text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "\ufffd")
        lines += [f"data: {kind} {line}" for line in text.split("\n")]
    return ("\n".join(lines) + "\n\n").encode("utf-8", "replace")


# ==== 5. Store ============================================================================
# The idea: one SQLite file behind five plain calls: query, one, exec, insert and tx. None
#   waits for a network, so a region is an ordinary function from rows to markup.
# It promises: when tx ends, the transaction is on the disk (WAL, synchronous=FULL), and
#   only then are its messages sent. Each migration, which makes tables or changes them,
#   runs once in each file. [3] keeps the tables of slices apart.
# Who uses it: the object that owns the file, one thread at a time (section 7).

class Calls:
    """Four calls, made of run(sql, args), which returns all rows, and a cursor.

    They are a class of their own because the store that a slice gets [3] has them, too.
    """

    def query(self, sql: str, *args: Any) -> List[sqlite3.Row]:
        return self.run(sql, args)

    def one(self, sql: str, *args: Any) -> Optional[sqlite3.Row]:
        """Return the first row, or None."""
        rows = self.run(sql, args)
        return rows[0] if rows else None

    def exec(self, sql: str, *args: Any) -> int:
        """Return the number of rows that changed."""
        self.run(sql, args)
        return self.cursor.rowcount

    def insert(self, sql: str, *args: Any) -> int:
        """Return the id of the new row; 0 if none was inserted, as by INSERT OR IGNORE."""
        return self.cursor.lastrowid if self.exec(sql, *args) else 0


class Store(Calls):
    """A connection to one file. create=True makes it; otherwise it has to be there.

    A with statement closes it. Raises sqlite3.Error.
    """
    SETUP = "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA foreign_keys=ON"
    STATEMENTS = 100                                     # kept compiled by Python's sqlite3
    LOCK_SECONDS = 5.0                                   # to wait for another process

    def __init__(self, path: pathlib.Path, create: bool = False):
        if create and not path.exists():
            os.close(private_file(path))                 # empty: a database without tables
        uri = f"{path.absolute().as_uri()}?mode=rw"
        self.path = path
        self.db = sqlite3.connect(uri, uri=True, timeout=self.LOCK_SECONDS,
                                  isolation_level=None, check_same_thread=False,
                                  cached_statements=self.STATEMENTS)
        self.db.row_factory = sqlite3.Row
        # SQLite's own lower() knows only ASCII.
        self.db.create_function("casefold", 1, str.casefold, deterministic=True)
        try:
            self.db.executescript(self.SETUP)
        except BaseException:                            # it is no database, or damaged
            self.db.close()
            raise
        self.cursor = self.db.cursor()
        self.after_commit: List[Tuple[Any, ...]] = []    # calls: (function, *args)

    def run(self, sql, args):
        """Fetch all rows: a cursor with rows to come would keep a transaction open."""
        return self.cursor.execute(sql, args).fetchall()

    def state(self) -> Tuple[int, int]:
        """Return two numbers. As long as both stay the same, no row has changed.

        The first counts what this connection wrote; the second changes when another did.
        """
        return self.db.total_changes, self.run("PRAGMA data_version", ())[0][0]

    @contextlib.contextmanager
    def tx(self):
        """Use it as `with store.tx():`. Everything inside happens, or nothing."""
        self.begin()
        try:
            yield
            self.commit()
        except BaseException:
            self.after_commit = []
            if self.db.in_transaction:                   # SQLite may have given up already
                self.run("ROLLBACK", ())
            raise
        calls, self.after_commit = self.after_commit, []
        for call, *args in dict.fromkeys(calls):         # each thing is told once
            call(*args)

    def begin(self):
        """IMMEDIATE takes the write lock now; later, SQLite might refuse it at once."""
        self.run("BEGIN IMMEDIATE", ())

    def commit(self):
        self.run("COMMIT", ())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        """The last connection that closes moves the write-ahead log into the file."""
        self.db.close()

    # -- tables (to be skipped on a first reading, up to section 6)

    def migrate_all(self, schema: Sequence[Tuple[str, Sequence[str]]]) -> None:
        for slice, entries in schema:
            self.migrate(slice, entries)

    def migrate(self, slice: str, entries: Sequence[str]) -> None:
        """Run the entries, each one statement, that have not run here yet: all or none.

        Entries are only ever appended. Raises MigrationError.
        """
        self.exec("CREATE TABLE IF NOT EXISTS _migrations (slice TEXT, entry INTEGER, "
                  "digest TEXT, tables TEXT, PRIMARY KEY (slice, entry)) WITHOUT ROWID")
        digests = digests_of(entries)
        ran = self.count_ran(slice, digests)
        if len(entries) == ran:
            return
        with self.migrating(slice, entries, ran):
            for number in range(ran, len(entries)):
                tables = self.apply(slice, entries, number)
                row = slice, number + 1, digests[number], " ".join(tables)
                self.exec("INSERT INTO _migrations VALUES (?, ?, ?, ?)", *row)

    def count_ran(self, slice, digests):
        """Return how many entries ran here. Raise MigrationError unless they were these."""
        ran = self.query("SELECT * FROM _migrations WHERE slice = ? ORDER BY entry", slice)
        for row, digest in zip(ran, digests + [""] * len(ran)):
            check_history(slice, row, digest)
        return len(ran)

    def migrating(self, slice, entries, ran):
        """Return the transaction for all entries but the first `ran`."""
        return self.tx()

    def apply(self, slice, entries, number):
        """Run one entry. Return the tables that it made."""
        before = self.tables()
        try:
            self.run_entry(slice, entries[number])
        except (sqlite3.Error, sqlite3.Warning) as error:
            why = f"slice {slice!r}, entry {number + 1}: {error}"
            raise MigrationError(why) from error
        return self.tables() - before

    def run_entry(self, slice, sql):
        self.exec(sql)

    def tables(self) -> set:
        names = self.query("SELECT name FROM sqlite_master WHERE type = 'table'")
        return {row["name"] for row in names}


class MigrationError(Exception):
    """File and slices do not fit together. The text names slice, entry and table."""


def digests_of(entries):
    return [hashlib.sha256(sql.encode()).hexdigest() for sql in entries]


def check_history(slice, row, digest):
    """Raise MigrationError if the entry that ran here was a different one."""
    if row["digest"] == digest:
        return
    why = "is unknown; a newer version wrote it"
    if digest:
        why = ("was edited since; append an entry instead or, while you only try, begin "
               "with another folder: --data NEW")
    raise MigrationError(f"slice {slice!r}, entry {row['entry']} ran here and {why}")


# -- files that only their owner can read

AS_ROOT = os.name == "posix" and os.geteuid() == 0


def private_file(path: pathlib.Path) -> int:
    """Make a file that only its owner can read. Return a descriptor to write to.

    Raises FileExistsError. SQLite gives the logs of a database its mode and its owner.
    """
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    own_as(path.parent, handle)
    return handle


def private_folder(path: pathlib.Path) -> None:
    """Make a folder that only its owner can open, and those above it."""
    if not path.is_dir():
        private_folder(path.parent)
        path.mkdir(0o700, exist_ok=True)
        own_as(path.parent, path)


def own_as(folder, made):
    """Give what root made to the owner of the folder: the server runs as that user."""
    if AS_ROOT:
        owner = os.stat(folder)
        change = os.fchown if type(made) is int else os.lchown
        change(made, owner.st_uid, owner.st_gid)


# ==== 6. Bus ==============================================================================
# The idea: a topic is a name with a version. To publish is to raise the version and to
#   wake those who wait for that. What changed is not said: they read the store again.
# It promises: nobody is told before the commit, and nobody at all after a rollback.
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
        # and another has taken its place, no topic gets an old version again.
        self.start = time.time_ns()
        self.versions: Dict[str, int] = {}               # of topics that were published
        self.listeners: List[Callable[[str], None]] = []     # [2] told of each topic
        self.waiting = 0                                 # streams that are inside wait()

    def publish(self, topic: str) -> None:
        """Tell everybody, once the present transaction has committed."""
        if not self.store.db.in_transaction:
            raise PermissionError(f"publishes {topic!r}, which only a command or a job may")
        self.store.after_commit.append((self.tell, topic))

    def version(self, topic: str) -> int:
        return self.versions.get(topic, self.start)

    def tell(self, topic):
        self.versions[topic] = self.version(topic) + 1
        if self.waiting:
            self.turn.notify_all()
        for listener in self.listeners:
            listener(topic)

    def wait(self, seen: Dict[str, int], seconds: float) -> None:
        """Wait until a topic has left the version that was seen, or the time is up.

        The caller holds the turn. The Condition releases it while it waits.
        """
        self.waiting += 1
        try:
            self.turn.wait_for(lambda: any([self.version(topic) != version
                                            for topic, version in seen.items()]), seconds)
        finally:
            self.waiting -= 1


# ==== 7. Objects ==========================================================================
# The idea: a Durable Object is one SQLite file and one lock, called its turn. Everything
#   that happens to a team's rows happens in one place, one request after the other, so
#   nothing has to be coordinated. `fetch` holds the turn; only `wait` gives it back.
# It promises: a command is one transaction. It is on the disk before it is answered, or
#   nothing of it happened. An object sleeps only if nobody asked it for a while, it serves
#   nobody, and no stream is inside `wait`. To sleep means: its file is closed, the object
#   is forgotten. The next request builds another one, which opens the file again.
# Who uses it: the worker, by a Stub: the address of an object, awake or not.
# Locks are taken in this order: a turn, then a namespace's lock; never the reverse. No
#   object fetches from another that might fetch from it. Only one process may serve a data
#   folder; Part Three sees to that.

class DurableObject:
    """Subclasses say which tables they need (schema) and answer requests (handle).

    A request goes through answer, which opens the file; command, if it may write; handle.
    """
    schema: Sequence[Tuple[str, Sequence[str]]] = ()     # slices, with their migrations
    handle: Callable[[Request], Response]
    store_class = Store                                  # [2, 3] have others

    def __init__(self, id: str, namespace: Namespace):
        self.id = id
        self.namespace = namespace
        self.turn = threading.Condition(threading.Lock())
        self.used = time.monotonic()
        self.gone = False                                # closed: another takes its place
        self.store: Optional[Store] = None               # None: not opened yet
        self.bus: Optional[Bus] = None

    def connect(self, create: bool) -> Store:
        return self.store_class(self.namespace.path(self.id), create)

    def open(self, create: bool = False) -> None:
        self.store = self.connect(create)
        try:
            self.store.migrate_all(self.schema)
            self.bus = Bus(self.turn, self.store)
            self.on_open()
        except BaseException:
            self.store.close()
            self.store = None
            self.bus = None
            raise

    def on_open(self) -> None:
        """Reset what a subclass remembers of its file."""

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


class Namespace:
    """All objects of one kind: their files, in one folder, and those that are awake.

    build(id, namespace) returns an object. idle: seconds until an unused one goes to sleep.
    """
    CLOSE_SECONDS = 5.0                                  # to wait for all turns, at the end

    def __init__(self, kind: str, folder: pathlib.Path, idle: float,
                 build: Callable[[str, Namespace], DurableObject]):
        self.kind = kind
        self.folder = folder
        self.idle = idle
        self.build = build
        self.closed = False
        self.lock = threading.Lock()                     # guards the next line
        self.objects: Dict[str, DurableObject] = {}      # those that are awake

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

        Nothing else makes one. A file that is missing later was lost; it isn't made again.
        """
        made = self.build(id, self)
        made.open(create=True)
        made.store.close()

    def awake(self, id: str) -> DurableObject:
        """Return the object that stands for this id now. Build one if there is none.

        It opens its file with its first answer.
        """
        with self.lock:
            if self.closed:
                raise Refused(503, "The server is stopping. Try again in a moment.")
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

    def sleep_unused(self, idle: Optional[float] = None) -> None:
        """Put to sleep all objects that were not asked for `idle` seconds."""
        since = time.monotonic() - (self.idle if idle is None else idle)
        for one in self.everybody():
            one.sleep(since)

    def close(self) -> None:
        """At the end of the server: close each file, in the turn of its object.

        An object that stays busy, because a slice hangs, is left: all that it has answered
        is on the disk.
        """
        self.closed = True
        until = time.monotonic() + self.CLOSE_SECONDS
        for one in self.everybody():
            if not one.turn.acquire(timeout=max(0.0, until - time.monotonic())):
                log(f"{self.path(one.id)}: a request still goes on, and is left")
                continue
            try:
                if not one.gone:
                    one.close()
            except sqlite3.Error as error:
                log(f"{self.path(one.id)}: {error}")
            finally:
                one.turn.release()


class Watch(NamedTuple):
    """What a stream waits for: that a topic leaves the version that was shown."""
    stub: Stub
    seen: Dict[str, int]                                 # the versions, by topic

    def wait(self, seconds: float) -> None:
        one = self.stub.namespace.awake(self.stub.id)
        with one.turn:
            if one.bus:                                  # else it slept: ask again at once
                one.bus.wait(self.seen, seconds)


# ==== 8. Slices ===========================================================================
# The idea: a feature is a value. It lists its tables, its live pages and its commands. Each
#   live page and each command names the grant that it takes, so none can be forgotten.
# It promises: what all slices need is done here, once, by their host. It checks the grant
#   of the route: the gate says which grants somebody has, not which one a route takes. A
#   region is rendered once for each role and state of the store, however many people look.
# Who uses it: Workspace and Directory are hosts; todos and directory are slices.

class Slice(NamedTuple):
    """A feature: its tables, its live pages and its commands.

    The fields after routes are for [3]. count(store) says how full a workspace is. jobs:
    work that is done later. exports: functions (store, ...) that other slices may ask.
    styles, scripts: names of assets that its pages load.
    """
    name: str
    migrations: Sequence[str] = ()
    live: Sequence[Live] = ()
    routes: Sequence[Route] = ()
    count: Optional[Callable[[Store], int]] = None
    jobs: Sequence[Callable[..., None]] = ()
    exports: Sequence[Callable[..., Any]] = ()
    styles: Sequence[str] = ()
    scripts: Sequence[str] = ()


class Route(NamedTuple):
    """A way to call a slice. run(ctx, *args) returns a Response.

    args are the values of the <parts> of the path: text, or an int for <int:part>. The
    fields after run are for [3]. form: the page on which the form for this is, if it has
    another path. upload: bytes that a request may bring; 0: no more than any other. says:
    what somebody did, such as "deleted".
    """
    method: str
    path: str
    grant: str
    run: Callable[..., Response]
    form: str = ""
    upload: int = 0
    says: str = ""


class Region(NamedTuple):
    """The part of a page that stays current.

    show(ctx) returns Html, one element with an id. It only reads, and is called again after
    each publish of topic. each: it is made once for each "role" or, if it shows what is one
    viewer's alone, for each "account". data(ctx) returns the same for programs [3]: a dict.
    """
    topic: str
    show: Callable[..., Html]
    each: str = "role"
    data: Optional[Callable[..., Dict[str, Any]]] = None


def only_the_regions(ctx, *shown):
    """The page of a slice that shows nothing around its regions. (shown has the values of
    the <parts> of the path, too.)"""
    regions = [html for html in shown if type(html) is Html]
    region = Html().join(regions)
    return template("slice")(region=region, workspace=ctx.title, live=True)


class Live(NamedTuple):
    """A page at path and, at path + "/live", a stream of the regions in it.

    page(ctx, *regions) returns what stands around them. title is text or, if the page is no
    tab, a function title(ctx). params: the parameters of the query that all of this depends
    on, each with the pattern of its values. tab: whether the navigation shows it.

    The values of the <parts> of the path are further arguments of show, data, page and
    title, and fill the topics, too: at "/cards/<int:id>", Region("card/<id>", show) has a
    topic for each card. Such a page is no tab.
    """
    path: str
    grant: str
    title: Union[str, Callable[..., str]]
    regions: Sequence[Region]
    page: Callable[..., Html] = only_the_regions
    params: Dict[str, str] = {}
    tab: Optional[bool] = None                           # None: if the path has no parts

    def heeded(self, params: Dict[str, str]) -> Dict[str, str]:
        """Return those of params that the page depends on, if their value is valid."""
        return {name: params[name] for name, pattern in self.params.items()
                if name in params and re.fullmatch(pattern, params[name])}

    @property
    def is_tab(self) -> bool:
        return "<" not in self.path if self.tab is None else self.tab

    def routes(self):
        return (Route("GET", self.path, self.grant,
                      lambda ctx, *args: ctx.host.live_page(self, ctx, args)),
                Route("GET", f"{self.path}/live", self.grant,
                      lambda ctx, *args: ctx.host.stream(self, ctx, args)))


# -- viewers

# What a route can name instead of a grant: who may call it, whatever their role is.
PUBLIC, ACCOUNT, MEMBER = "(anyone)", "(any account)", "(any member)"
NO_MEMBERS = ("", "public")                              # roles; the second one: [3]
NOT_SHARED = ("this region is rendered once for a whole role and shown to all who have it, "
              'so it cannot use the account of one viewer; Region(..., each="account") is '
              "rendered for each of them")
NO_REQUEST = ("a region is shown again after each change, and has no request; name the "
              "parameters that it needs in Live(params=...), and use all else in page()")


@dataclasses.dataclass(frozen=True)
class SharedViewer:
    """The viewer as a region may know them: what all viewers of one role have in common."""
    role: str = ""
    grants: Tuple[str, ...] = ()
    workspace: str = ""                                  # its name
    id: str = ""                                         # its id

    def can(self, grant: str) -> bool:
        """Does their role have this grant?"""
        return grant in self.grants

    @property
    def account(self):
        raise PermissionError(NOT_SHARED)


@dataclasses.dataclass(frozen=True)
class Viewer(SharedViewer):
    """The viewer that the verdict names. Without a workspace: an account, or nobody."""
    account: str = ""
    label: str = ""                                      # [3] what others call them

    def as_seen_by(self, region: Region) -> SharedViewer:
        """Return what a region may know of the viewer: see Region.each."""
        said = self.role, self.grants, self.workspace, self.id
        if region.each == "account":
            return Viewer(*said, self.account)
        return SharedViewer(*said)

    def permit(self, grant: str, method: str = "GET") -> None:
        """Raise Refused(401) or (403) unless they have this grant or, if it is one of the
        three above, belong to it. (method is for [3].)"""
        if grant == ACCOUNT and not self.account:
            raise Refused(401, "Sign in first.")
        if grant == MEMBER and self.role in NO_MEMBERS:
            raise Refused(403, "This is for members. Ask an owner to invite you.")
        if grant not in (PUBLIC, ACCOUNT, MEMBER) and not self.can(grant):
            raise Refused(403, f"Your role here does not include {grant}. Ask an owner of "
                               "the workspace for it.")

    def may(self, grant: str) -> bool:
        """Would permit agree?"""
        with contextlib.suppress(Refused):
            self.permit(grant)
            return True
        return False

    # [3] An operator can look on in somebody's name, a program can ask, and people have
    # faces. The next four say so.
    has_page = True                                      # whose signals can be set

    @property
    def signature(self) -> str:
        """How the journal names them."""
        return self.account

    @property
    def person(self):
        """How the head of a page shows them."""
        return self.account

    def banner(self):
        """The notice on top of each of their pages."""
        return ""


# -- the context of a request

# A checkbox without a value sends "on"; a signal is true or false.
TICKED = {"on": True, "true": True, "off": False, "false": False}


class Context:
    """What a slice needs to answer one request. [3] ends it with the request.

    The context of a region is shared by all viewers of a role (see Region.each). So its
    viewer is a SharedViewer, and it has no request.
    """
    __slots__ = ("host", "store", "viewer", "params", "_request", "_sent")
    typed: Dict[str, str] = {}                           # [3] into a form that was refused
    stamp = Html()                                       # [3] so a form does one thing once

    def __init__(self, host: SliceHost, store: Store, viewer: SharedViewer,
                 params: Dict[str, str], request: Optional[Request]):
        self.host = host                                 # for slices of the server itself
        self.store = store
        self.viewer = viewer
        self.params = params                             # of the query; see Live.params
        self._request = request
        self._sent: Optional[List[Tuple[str, Any]]] = None

    @property
    def request(self) -> Request:
        if self._request is None:
            raise PermissionError(NO_REQUEST)
        return self._request

    @property
    def workspace(self) -> str:
        """Its name."""
        return self.viewer.workspace

    @property
    def title(self) -> str:
        """How a page calls the workspace. [3] has a name as people write it: Acme Corp."""
        return self.workspace

    def remove(self, table: str, where: str, *args: Any) -> Dict[str, Any]:
        """Delete the rows that match where, an SQL condition.

        Return signals for done(). [3] keeps the rows, and has some that offer to undo it.
        """
        self.store.exec(f"DELETE FROM {table} WHERE {where}", *args)
        return {}

    def publish(self, topic: str) -> None:
        """Have all regions with this topic read again, when the command commits."""
        self.host.bus.publish(self.host.topic(topic, self.viewer))

    @property
    def sent(self) -> List[Tuple[str, Any]]:
        """All that was sent along: Request.pairs, decoded once."""
        if self._sent is None:
            self._sent = self.request.pairs()
        return self._sent

    # These take one value out of sent; if it was not sent, they use otherwise. A value that
    # none of our forms can send is a Refused(400), which names the field. [3] has more.

    def field(self, name: str, otherwise: str = "") -> str:
        """Return the field as text; if there are several, the last."""
        return as_text(name, dict(self.sent).get(name, otherwise))

    def checked(self, name: str, otherwise: bool = False) -> bool:
        """Return whether a checkbox is ticked, or whether a signal is true."""
        said = self.field(name, "true" if otherwise else "false")
        if said not in TICKED:
            raise Refused(400, f"{name} must be true or false. Reload the page, try again.")
        return TICKED[said]

    def for_page(self, live: Live) -> Context:
        params = live.heeded(self.params)
        return type(self)(self.host, self.store, self.viewer, params, self.request)

    def for_region(self, region: Region, live: Live) -> Context:
        """Return its context, which is the same for all who may see the same."""
        viewer = self.viewer.as_seen_by(region)
        params = live.heeded(self.params)
        return type(self)(self.host, self.store, viewer, params, None)


@dataclasses.dataclass
class Rendering:
    """A region at one state of the store, made once for all who may see the same."""
    html: Html

    @functools.cached_property
    def frame(self) -> bytes:
        """What a stream sends to show it."""
        return event("elements", self.html)


# -- which route answers

class Router:
    """Finds slice and route for a request. schema: the tables of its slices. One router is
    made for all objects of a kind."""

    def __init__(self, slices: Sequence[Slice]):
        self.slices = slices
        self.schema = [("orion", HOST_TABLES)]
        self.schema += [(slice.name, slice.migrations) for slice in slices]
        self.rows: List[Tuple[re.Pattern, str, Route]] = []
        for slice in slices:
            pages = [route for live in slice.live for route in live.routes()]
            for route in (*pages, *slice.routes):
                pattern = path_pattern(route.path)
                self.rows.append((re.compile(pattern), slice.name, route))
        self.rows.sort(key=lambda row: row[2].path.count("<"))   # /new comes before /<id>

    def match(self, method: str, path: str) -> Tuple[str, Route, Tuple[Any, ...]]:
        """Return the slice's name, the route and its args. Raises Refused(404), (405)."""
        methods = set()
        for pattern, slice, route in self.rows:
            found = pattern.fullmatch(path)
            if found and route.method == method:
                return slice, route, path_args(route.path, found.groups())
            if found:
                methods.add(route.method)
        if not methods:
            raise Refused(*NOTHING_HERE)
        if "GET" in methods:
            methods.add("HEAD")
        allow = ", ".join(sorted(methods))
        raise Refused(405, f"This address takes {allow}.", (("allow", allow),))


# -- the host

class SliceHost(DurableObject):
    """An object that runs slices. pages: those that the navigation shows."""
    context = Context                                    # [3] adds to it
    MOST_RENDERINGS = 100                                # then the one unused longest goes

    def __init__(self, id: str, namespace: Namespace, router: Router,
                 pages: Sequence[Live]):
        super().__init__(id, namespace)
        self.router = router
        self.schema = router.schema
        self.pages = pages
        self.renderings: Dict[Tuple[Any, ...], Rendering] = {}
        self.state: Any = None                           # of the store, when they were made

    def viewer(self, request: Request) -> Viewer:
        return viewer_by_verdict(request)

    def topic(self, name: str, viewer: SharedViewer) -> str:
        """Return how the bus of this object calls a slice's topic."""
        return name

    # -- a request. It goes through these methods, and each of them adds one thing:
    #
    #     answer (7)      opens the file
    #     command         of a write: a transaction (7); what is wrong is shown where it was
    #                     typed
    #     handle          the route; who asks, and whether they may
    #     call            what the slice is given
    #     run             the slice

    def handle(self, request: Request) -> Response:
        slice, route, args = self.router.match(request.method, request.path)
        viewer = self.viewer(request)
        self.permit(viewer, route, request)
        return self.call(slice, route, args, viewer, request)

    def permit(self, viewer: Viewer, route: Route, request: Request) -> None:
        viewer.permit(route.grant, request.method)

    def call(self, slice, route, args, viewer, request):
        """Let this slice answer. [3] keeps slices apart, and a journal of what they did.
        """
        ctx = self.context(self, self.store, viewer, request.params, request)
        return self.run(route, ctx, args)

    def command(self, request: Request) -> Response:
        try:
            return super().command(request)
        except Refused as refused:
            return self.refuse(request, refused)

    def refuse(self, request, refused):
        """Show what is wrong with the input where it was typed, or raise refused."""
        if request.datastar and refused.status in (409, 422):
            return as_json(refused.signals)
        raise refused

    def after_form(self, ctx: Context, signals: Dict[str, Any]) -> Response:
        """Lead from a plain form to its page. [3] shows the signal note there."""
        path = urllib.parse.quote(self.path_after(ctx.request))
        return see_other(f"/w/{ctx.workspace}{path}")

    def path_after(self, request):
        """Return where a plain form leads when it is done: to its list."""
        return "/" + request.path.split("/")[1]

    # -- live pages. A page and its stream are made of the same renderings: renderings_of
    # returns them, rendering looks whether one is there, render makes it, show asks the
    # slice.

    def renderings_of(self, live: Live, ctx: Context, args) -> List[Rendering]:
        """Return the regions of a page as this viewer sees them."""
        state = self.store.state()
        if state != self.state:                          # what was made before may be old
            self.renderings.clear()
            self.state = state
        return [self.rendering(region, live, ctx.for_region(region, live), args)
                for region in live.regions]

    def rendering(self, region: Region, live: Live, ctx: Context, args) -> Rendering:
        """Return the rendering of a region; make it, if nobody has asked before."""
        key = region, args, ctx.viewer, tuple(ctx.params.items())
        made = self.renderings.pop(key, None) or self.render(region, live, ctx, args)
        while len(self.renderings) >= self.MOST_RENDERINGS:
            del self.renderings[next(iter(self.renderings))]
        self.renderings[key] = made                      # last, because it was used last
        return made

    def render(self, region: Region, live: Live, ctx: Context, args) -> Rendering:
        return Rendering(self.show(region, live, ctx, args))

    def topics(self, live: Live, ctx: Context, args) -> List[str]:
        """Return the topic of each region, as the bus of this object calls it."""
        return [self.topic(with_parts(region.topic, live.path, args), ctx.viewer)
                for region in live.regions]

    def stream(self, live: Live, ctx: Context, args) -> Response:
        """Return the regions as they are now, and what to wait for before asking again."""
        frames = [one.frame for one in self.renderings_of(live, ctx, args)]
        seen = {topic: self.bus.version(topic) for topic in self.topics(live, ctx, args)}
        watch = Watch(self.namespace.get(self.id), seen)
        return Response(200, b"".join(frames), EVENTS, watch=watch)

    def live_page(self, live: Live, ctx: Context, args) -> Response:
        renderings = self.renderings_of(live, ctx, args)
        own = ctx.for_page(live)
        body = self.around(live, own, renderings, args)
        title = self.title_of(live, own, args)
        return page(f"{title} · {ctx.title}", body, ctx.viewer,
                    self.navigation(live.path, ctx), self.footer(renderings, ctx),
                    head=self.head(ctx))

    # -- calls to a slice. [3] checks what they return.

    def run(self, route: Route, ctx: Context, args) -> Response:
        return route.run(ctx, *args)

    def show(self, region: Region, live: Live, ctx: Context, args) -> Html:
        return region.show(ctx, *args)

    def around(self, live: Live, ctx: Context, renderings, args) -> Html:
        """Return a page with its regions, but without the layout of all pages."""
        return live.page(ctx, *[one.html for one in renderings], *args)

    def title_of(self, live: Live, ctx: Context, args) -> str:
        return live.title(ctx, *args) if callable(live.title) else live.title

    # -- what all pages have

    def tabs(self, viewer: Viewer) -> List[Live]:
        """Return the pages that the navigation shows to this viewer."""
        return [live for live in self.pages if viewer.may(live.grant)]

    def navigation(self, path: str, ctx: Context, state: bool = True):
        """Return links to all pages. state: whether the page at path has a stream."""
        links = [{"path": live.path, "title": live.title, "current": live.path == path}
                 for live in self.tabs(ctx.viewer)]
        nav = template("layout.workspace")
        return nav(workspace=ctx.workspace, link=links, state=state) if links else ""

    def head(self, ctx):
        """[3] has styles and scripts of slices."""
        return ""

    def footer(self, renderings, ctx):
        """[3] tells which object served the page, and whom."""
        return ""


# -- the answer to a command

def done(ctx: Context, which: str = "", **signals: Any) -> Response:
    """Answer a command: with signals for its sender or, after a plain form, with the page.

    It does not say what has changed: the region brings that to everybody, the sender
    included. which: what was written, for the journal: an id, a space and what people call
    it; by default the <parts> of the path or, without any, the id of the last new row.
    """
    if not ctx.viewer.has_page:
        return Response(204, which=which)
    if ctx.request.plain_form:
        return ctx.host.after_form(ctx, signals)._replace(which=which)
    return as_json(signals, which=which) if signals else Response(204, which=which)


# -- helpers of host and routes (to be skipped on a first reading, up to section 9)

HOST_TABLES: List[str] = []                              # [3] has some for each host

NO_VIEWER = dict.fromkeys(("x-account", "x-role", "x-grants", "x-workspace", "x-id"), "")


def viewer_by_verdict(request: Request) -> Viewer:
    """Return what the verdict says, in headers that only the worker can set."""
    header = {**NO_VIEWER, **request.headers}
    grants = tuple(header["x-grants"].split(",")) if header["x-grants"] else ()
    return Viewer(header["x-role"], grants, header["x-workspace"], header["x-id"],
                  header["x-account"])


PART_OF_PATH = re.compile(r"<(int:)?(\w+)>")


def path_pattern(path: str) -> str:
    """Return the pattern of the paths of a route. A number has at most 18 digits."""
    return PART_OF_PATH.sub(lambda part: "([0-9]{1,18})" if part[1] else "([^/]+)",
                            re.escape(path))


def path_args(path: str, texts: Sequence[str]) -> Tuple[Any, ...]:
    """Return the values of the <parts> of a path: text, or an int for <int:part>."""
    parts = PART_OF_PATH.findall(path)
    return tuple([int(text) if kind else text for (kind, _), text in zip(parts, texts)])


def with_parts(text: str, path: str, args: Tuple[Any, ...]) -> str:
    """Return the text with its <parts> filled: args are the values of those of path."""
    if "<" not in text:
        return text
    names = [name for _, name in PART_OF_PATH.findall(path)]
    values = dict(zip(names, args))
    return PART_OF_PATH.sub(lambda part: str(values[part[2]]), text)


# ==== 9. Todos ============================================================================
# The idea: a slice like any other, and the pattern for your own: a table, a region, a page,
#   commands. Each command has the same shape: validate, write, publish, done.
# It promises: it knows nothing of teams, sockets or sessions.
# Who uses it: the workspaces; section 15 puts it into the list of slices. The grants of a
#   new slice are added to ROLES (section 12).
#
# Its template is templates/todos.html, which is in short:
#
#     <h1>{{workspace}}</h1> {{form}} <form role="search">{{q}}</form> {{region}}
#     <dialog> @patch($_editing, {payload: {title: $_edited, was: $_was}}) </dialog>
#     <div id="live" data-init="@get('./todos/live', {retry: 'always'})"></div>
#     <!-- form -->
#     <form data-on:submit="@post('./todos', {payload: {title: $title}})"> ... </form>
#     <!-- region -->
#     <section id="todos"> {{open}} of {{all}} remaining <ul>{{row}}</ul> </section>
#     <!-- row -->
#     <li id="todo-{{id}}"> <input type=checkbox {{checked}}> {{title}} {{delete}} </li>

# -- the page

def todos_region(ctx):
    shown, foot = some_todos(ctx.store, ctx.params)
    may_write = ctx.viewer.can("todos:write")
    may_delete = ctx.viewer.can("todos:delete")
    rows = [todo_row(*todo, may_write, may_delete) for todo in shown]
    kind = "found" if "q" in ctx.params else ctx.params.get("show", "all")
    empty = "" if rows else template(f"todos.empty_{kind}")()
    return template("todos.region")(row=Html().join(rows), empty=empty, **foot,
                                    **todo_counts(ctx.store))


def todos_page(ctx, region):
    show = ctx.params.get("show", "")
    links = [{"query": todos_query(ctx.params, show=name, pages=""),
              "current": name == show, "label": name.capitalize() or "All"}
             for name in SHOWN]
    may_write = ctx.viewer.can("todos:write")
    may_delete = ctx.viewer.can("todos:delete")
    return template("todos")(
        region=region, link=links, workspace=ctx.title, query=todos_query(ctx.params),
        form=may_write, readonly=not may_write, tools=may_write or may_delete,
        toggle=may_write, clear=may_delete, remove=may_delete,
        title=ctx.typed.get("title", ""), problem=ctx.typed.get("problem", ""),
        stamp=ctx.stamp, only=show != "", show=show, q=ctx.params.get("q", ""),
        limit=TITLE_LIMIT, params=ctx.params)


def todos_data(ctx):
    shown, _ = some_todos(ctx.store, ctx.params)
    rows = [{**todo, "done": bool(todo["done"])} for todo in shown]
    return {"todos": rows, **todo_counts(ctx.store)}


# -- commands

def create(ctx):
    title = valid_title(ctx.field("title"))
    id = ctx.store.insert("INSERT INTO todos (title) VALUES (?)", title)
    ctx.publish("todos")
    return done(ctx, f"{id} {title}", title="", problem="", **note_if_hidden(title, ctx))


def change(ctx, id):
    """Set the title, or done, or both, as sent. If neither is, tick or untick it."""
    todo = the_todo(ctx, id)
    edits = "title" in dict(ctx.sent)
    title = edited_title(ctx, todo) if edits else todo["title"]
    ticked = ctx.checked("done", bool(todo["done"]) if edits else not todo["done"])
    ctx.store.exec("UPDATE todos SET title = ?, done = ? WHERE id = ?", title, ticked, id)
    ctx.publish("todos")
    return done(ctx, f"{id} {title}")


def delete(ctx, id):
    todo = the_todo(ctx, id)
    signals = ctx.remove("todos", "id = ?", id)
    ctx.publish("todos")
    return done(ctx, f"{id} {todo['title']}", **signals)


def change_all(ctx):
    """Set all to the signal done. Without it, tick all; if all are ticked, untick them."""
    some_are_open = count_todos(ctx.store) > 0
    ticked = ctx.checked("done", some_are_open)
    ctx.store.exec("UPDATE todos SET done = ? WHERE done <> ?", ticked, ticked)
    ctx.publish("todos")
    return done(ctx, "all")


def clear(ctx):
    signals = ctx.remove("todos", "done")
    ctx.publish("todos")
    return done(ctx, "done ones", **signals)


# -- the slice

def count_todos(store):
    """Return how many are open: [3] shows it beside the name of a workspace."""
    return todo_counts(store)["open"]


todos = Slice(
    name="todos",
    migrations=("CREATE TABLE todos (id INTEGER PRIMARY KEY AUTOINCREMENT, title TEXT NOT "
                "NULL, done INTEGER NOT NULL DEFAULT 0)",),
    live=(Live("/todos", "todos:read", "Todos",
               (Region("todos", todos_region, data=todos_data),), todos_page,
               params={"show": "open|done", "pages": "[1-9][0-9]?",
                       "q": r"[^\0-\x1f]{1,50}"}),),
    routes=(Route("POST", "/todos", "todos:write", create, says="added"),
            Route("PATCH", "/todos", "todos:write", change_all, says="ticked or unticked"),
            Route("DELETE", "/todos", "todos:delete", clear, says="cleared"),
            Route("PATCH", "/todos/<int:id>", "todos:write", change, says="changed"),
            Route("DELETE", "/todos/<int:id>", "todos:delete", delete, says="deleted")),
    count=count_todos, exports=(count_todos,))


# -- helpers of the page and the commands

TITLE_LIMIT = 500                                        # characters
TODOS_A_PAGE = 200
MOST_PAGES = 25
SHOWN = {"": "TRUE", "open": "NOT done", "done": "done"}     # by the parameter show
LISTED = "SELECT id, title, done FROM todos WHERE {} ORDER BY id DESC LIMIT ?"


def some_todos(store, params):
    """Return the newest todos, and what fills the foot of the list."""
    show = SHOWN[params.get("show", "")]
    if "q" in params:
        return found_todos(store, params["q"], show)
    pages = min(int(params.get("pages", 1)), MOST_PAGES)
    most = TODOS_A_PAGE * pages
    found = store.query(LISTED.format(show), most + 1)
    shown = found[:most]
    more = None
    if len(found) > most and pages < MOST_PAGES:
        more = {"next": todos_query(params, pages=pages + 1), "last": shown[-1]["id"]}
    return shown, {"more": more, "many": None}


def found_todos(store, typed, show):
    """Return the same for a search. It has one page only: another word narrows it.

    It reads every title, 1,000 in a third of a millisecond. An index of all words (FTS5)
    would make each command take 1.4 times as long, and each awake workspace 36 KB larger.
    """
    words = typed.casefold().split()
    condition = " AND ".join([show, *["instr(casefold(title), ?)"] * len(words)])
    found = store.query(LISTED.format(condition), *words, TODOS_A_PAGE + 1)
    many = {"most": TODOS_A_PAGE} if len(found) > TODOS_A_PAGE else None
    return found[:TODOS_A_PAGE], {"more": None, "many": many}


def note_if_hidden(title, ctx):
    """Return a note for the sender, if their list (show, q) does not have the new todo."""
    words = ctx.field("q").casefold().split()
    if ctx.field("show") != "done" and all([word in title.casefold() for word in words]):
        return {}
    return {"note": "Added. This list does not show it."}


def todo_counts(store):
    return store.one('SELECT count(*) AS "all", count(*) FILTER (WHERE NOT done) AS open '
                     "FROM todos")


@functools.lru_cache(maxsize=512)
def todo_row(id, title, done, may_write, may_delete):
    """Return the markup of a row. Most rows have not changed, and are not made again."""
    return template("todos.row")(id=id, title=title, checked=bool(done), edit=may_write,
                                 disabled=not may_write, delete=may_delete)


def todos_query(params, **changed):
    """Return the query of a link to the same list with these changes; "" leaves one out."""
    wanted = {name: value for name, value in {**params, **changed}.items() if value}
    return urllib.parse.urlencode(wanted)


def the_todo(ctx, id):
    """Return the row of a todo. Raise Refused(404) if there is none."""
    todo = ctx.store.one("SELECT id, title, done FROM todos WHERE id = ?", id)
    if todo is None:
        raise Refused(404, "This todo is gone. The page shows what there is now.")
    return todo


def edited_title(ctx, todo):
    """Return the new title. Raise Refused(409) if the old one is no longer what it was when
    the edit began. The page sends that along, as "was", and offers both versions then."""
    title = valid_title(ctx.field("title"), "toast")
    was, now = ctx.field("was"), todo["title"]
    if was and now not in (was, title):
        raise Refused(409, f'Meanwhile somebody made it "{now}". Save once more to put '
                           "yours in its place, or cancel.",
                      signal="toast", fields={"was": now})
    return title


def valid_title(typed, signal="problem"):
    """Return the title that was typed. Raise Refused(422) if it is empty or too long."""
    title = typed.strip()
    if not 1 <= len(title) <= TITLE_LIMIT:
        raise Refused(422, f"A title has 1 to {TITLE_LIMIT} characters; this one has "
                           f"{len(title)}.", signal=signal)
    return title


# ==== 10. Workspace =======================================================================
# The idea: the data plane. One team's rows and nothing else: the connection is to this
#   file, so there is no query that could reach another team.
# It promises: the gate decides who comes in, the grant of a route what they may do inside.
#   That a page hides a button is only a courtesy.
# Who uses it: the worker, after a verdict of 200.

class Workspace(SliceHost):
    """A host that does nothing but run its slices."""


def front_page(ctx):
    return see_other(f"/w/{ctx.workspace}{ctx.host.pages[0].path}")


welcome = Slice("welcome", routes=(Route("GET", "/", MEMBER, front_page),))


# ==== 11. Sessions ========================================================================
# The idea: a cookie carries a random token and a seal over it: an HMAC, made with a key
#   that only this server has. The Directory keeps the token's hash, never the token.
# It promises: a forged cookie never reaches a database. A stolen copy of the table signs
#   nobody in: there is no way from a hash back to its token, nor to a seal without the key.
#   Comparing a wrong seal takes as long as comparing the right one.
# Who uses it: the Directory.

SESSION_SECONDS = 30 * 86400
COOKIE_SECONDS = 400 * 86400                             # the most; the session ends first
COOKIES = {"http": "sid", "https": "__Host-sid"}         # by scheme (RFC 6265bis, 4.1.3.2)


def seal(token: str, key: bytes) -> str:
    return hmac.digest(key, b"session:" + token.encode(), "sha256").hex()


def token_hash(token: str) -> bytes:
    """Return what the Directory knows a session by."""
    return hashlib.sha256(token.encode()).digest()


COOKIE_NAMED = r";[ \t]*{}=([^;]*)"                      # in a header with a ; in front
SEALED_TOKEN = re.compile(r"([A-Za-z0-9_-]{43})\.([0-9a-f]{64})")


def cookie_name(scheme: str, key: bytes) -> str:
    """Return the name of a cookie that is sealed with this key.

    Browsers do not tell ports apart (RFC 6265, 8.5). Two servers on one host would sign
    each other's users out if their cookies had the same name.
    """
    return f"{COOKIES[scheme]}-{hmac.digest(key, b'cookie', 'sha256').hex()[:8]}"


@functools.lru_cache(maxsize=16)
def cookie_names(scheme: str, keys: Tuple[bytes, ...]) -> List[str]:
    """Return the names that a session's cookie may have, the newest first.

    The last is what older versions used.
    """
    return [*[cookie_name(scheme, key) for key in keys], COOKIES[scheme]]


def session_digest(header: str, scheme: str, keys: Tuple[bytes, ...]) -> Optional[bytes]:
    """Return the token's hash, from a Cookie header; None for nobody.

    Cookies of these names that another server sealed are ignored. If this server sealed two
    of a name, somebody has planted one of them: then nobody is signed in.
    """
    for name in cookie_names(scheme, keys):
        tokens = sealed_tokens(header, name, keys)
        if tokens:
            return token_hash(tokens[0]) if len(tokens) == 1 else None
    return None


def cookie_values(header: str, name: str) -> List[str]:
    """Return the values of the cookies of this name, from a Cookie header.

    Other cookies are not taken apart: there can be thousands.
    """
    values = re.findall(COOKIE_NAMED.format(name), f";{header}")
    return [value.rstrip(" \t") for value in values]


def sealed_tokens(header, name, keys):
    found = [SEALED_TOKEN.fullmatch(value) for value in cookie_values(header, name)]
    pairs = [one.groups() for one in found if one]
    return [token for token, sealed in pairs if is_genuine(token, sealed, keys)]


def is_genuine(token, sealed, keys):
    return any([hmac.compare_digest(seal(token, key), sealed) for key in keys])


def set_cookie(scheme: str, key: bytes, value: str, seconds: int) -> Tuple[str, str]:
    return cookie_field(scheme, cookie_name(scheme, key), value, "/", seconds)


def cookie_field(scheme, name, value, path, seconds):
    attributes = f"Path={path}; Max-Age={seconds}; HttpOnly; SameSite=Lax"
    if scheme == "https":
        attributes += "; Secure"
    return "set-cookie", f"{name}={value}; {attributes}"


# -- the file of the keys (to be skipped on a first reading)

class Unusable(Exception):
    """It can't be done. The text is one line that says why, and what to do."""


def make_key(path: pathlib.Path) -> None:
    """Write the server's key, at its first start, readable by nobody else."""
    with open(private_file(path), "w") as file:
        file.write(secrets.token_hex(32) + "\n")


def read_keys(path: pathlib.Path) -> Tuple[bytes, ...]:
    """Return the keys in the file, the newest first; older ones are still valid.

    Raise Unusable if there are none.
    """
    lost = "restore it from a backup; without it everybody is signed out"
    if not path.exists():
        raise Unusable(f"{path} is missing; {lost}")
    lines = path.read_bytes().split()
    if not lines or not all([re.fullmatch(b"[0-9a-f]{64}", line) for line in lines]):
        raise Unusable(f"{path} holds no keys, or more than keys; {lost}")
    return tuple([bytes.fromhex(line.decode()) for line in lines])


# ==== 12. Directory =======================================================================
# The idea: the control plane: who exists, who is signed in, who belongs where and in which
#   role. All policy is here and nowhere else.
# It promises: the gate reads its tables each time, so a membership that ended a moment ago
#   no longer counts. It refuses a workspace of other people and one that does not exist in
#   the same words. (Trying to create one does tell that a name is taken.)
# Who uses it: the worker, for each verdict, and for the pages outside of the workspaces.
#
# Its tables. How they came to be is at the end of section 13:
#
#     accounts      name, label (how people call them); persona: anybody may be this one
#     sessions      digest (of the token), account, created, expires, agent
#     workspaces    id, name; born: its first name, of which the id was made
#     memberships   workspace, account, role
#
# Some statements name columns of [3], which change nothing here: workspaces.title (its name
# as people write it) and moving (1: it moves to another machine, more: it is gone),
# sessions.operator (who looks on in somebody's name), memberships.offered (asked to be an
# owner, too).

ROLES: Dict[str, Tuple[str, ...]] = {
    "owner": ("todos:read", "todos:write", "todos:delete", "members:manage",
              "workspace:delete"),
    "admin": ("todos:read", "todos:write", "todos:delete", "members:manage"),
    "member": ("todos:read", "todos:write"),
    "viewer": ("todos:read",),
}

MEMBERSHIP = """SELECT w.*, m.role FROM workspaces w JOIN memberships m
                ON m.workspace = w.id WHERE w.name = ? AND m.account = ?
                AND w.moving < 2"""
# To be followed by the name of a table that has accounts.
LABELLED = "SELECT *, (SELECT label FROM accounts WHERE name = account) AS label FROM"
NO_SESSION = Response(401, b"Sign in first.\n")
MOVING = Response(503, b"This workspace is being moved. Try again in a minute.\n",
                  headers=(("retry-after", "30"),))
NO_ENTRY = Response(403, b"This workspace is not yours, or there is none of that name. Ask "
                         b"its owner to invite you.\n")


# -- the gate

def gate(ctx, workspace):
    """The verdict. 200: who they are in this workspace; 401: nobody; 403: no member; 503:
    they have to wait."""
    return ctx.host.verdict_on(ctx, workspace)


def let_in(said):
    """Return a verdict of 200. Its body says the same, for people who ask with curl."""
    return as_json(said, headers=tuple(said.items()))


def verdict_headers(account: str, role: str, workspace: str, id: str) -> Dict[str, str]:
    """Return the headers that the worker passes on. (x-can-delete is only for people.)"""
    grants = ROLES.get(role, ())
    return {"x-account": account, "x-role": role,
            "x-can-delete": "true" if "todos:delete" in grants else "false",
            "x-grants": ",".join(grants), "x-workspace": workspace, "x-id": id}


# -- the object

class Directory(SliceHost):
    """A host like any other, which also knows the keys, and the files of the workspaces.

    demo: everybody may sign in as a persona.
    """
    digest_of = staticmethod(session_digest)             # [2] remembers what it returned
    SIGNED_IN = f"{LABELLED} sessions WHERE digest = ? AND expires > ? AND operator IS NULL"

    def __init__(self, id, namespace, router, pages, keys: Sequence[bytes],
                 workspaces: Namespace, demo: bool = False):
        super().__init__(id, namespace, router, pages)
        self.keys = keys
        self.workspaces = workspaces
        self.demo = demo

    def topic(self, name, viewer):
        """One object serves all workspaces: each has topics of its own."""
        return f"{name}:{viewer.id}" if viewer.id else name

    # -- who asks. The cookie becomes the header x-session (identified), which names a row
    # (session), of which a viewer is made (viewer_of). In a page of a workspace, the gate
    # has said who it is.

    def answer(self, request):
        return super().answer(self.identified(request))

    def identified(self, request):
        """Replace the cookie by the session that it stands for: no slice sees a cookie."""
        headers = dict(request.headers)
        cookie = headers.pop("cookie", "")
        digest = self.digest_of(cookie, request.scheme, self.keys)
        if digest:
            headers["x-session"] = digest.hex()
        return request._replace(headers=headers)

    def session(self, request) -> Optional[sqlite3.Row]:
        """Return the row of a session that is valid; None if there is none."""
        if "x-session" not in request.headers:
            return None
        digest = bytes.fromhex(request.headers["x-session"])
        return self.store.one(self.SIGNED_IN, digest, time.time())

    def viewer(self, request):
        """Return whom the verdict names or, without one, whose session it is.

        The role is looked up again, because it may have changed since the verdict.
        """
        if "x-account" not in request.headers:
            row = self.session(request)
            return self.viewer_of(row) if row else Viewer()
        viewer = super().viewer(request)
        if not viewer.account or not viewer.id:
            return viewer
        role = role_of(self.store, viewer.id, viewer.account)
        if role == NOT_A_MEMBER:
            raise Refused(NO_ENTRY.status, NO_ENTRY.body.decode().strip())
        grants = tuple([grant for grant in viewer.grants if grant in ROLES.get(role, ())])
        return dataclasses.replace(viewer, role=role, grants=grants)

    def viewer_of(self, session: sqlite3.Row) -> Viewer:
        return Viewer(account=session["account"])

    # -- the gate

    def verdict_on(self, ctx: Context, workspace: str) -> Response:
        account = ctx.viewer.account
        if not account:
            return NO_SESSION
        row = ctx.store.one(MEMBERSHIP, workspace, account)
        if row is None:
            return NO_ENTRY
        return MOVING if row["moving"] else let_in(self.say(ctx.viewer, row))

    def say(self, viewer: Viewer, row: sqlite3.Row) -> Dict[str, str]:
        """Return what a verdict says of a member, as headers."""
        return verdict_headers(viewer.account, row["role"], row["name"], row["id"])

    # -- what the slice's functions do through the object, because other parts add to it

    def add_workspace(self, ctx, name, owner):
        """Add a workspace and its file. Raise Refused(422) for a name that is taken."""
        check_free(ctx.store, name)
        id = new_id(ctx.store, self.workspaces, name)
        add_rows(ctx.store, id, name, [(owner, "owner")])
        self.make_file(ctx, id)

    def make_file(self, ctx, id):
        """[2] makes it beforehand, while nobody waits for the Directory's turn."""
        self.workspaces.create(id)

    def open_session(self, ctx, account, start="/") -> Response:
        """Begin a session; return the way to the page, with the cookie.

        start: the page, if none was asked for. The token is always new: one that somebody
        planted before is worth nothing.
        """
        close_session(ctx)
        end_sessions(ctx, SPENT, time.time())
        agent = f"{ctx.request.peer} {ctx.request.headers.get('user-agent', '')}"[:200]
        value = add_session(ctx.store, account, agent, self.keys[0])
        cookie = set_cookie(ctx.request.scheme, self.keys[0], value, COOKIE_SECONDS)
        way = local_path(ctx.field("next", start))
        return see_other(way, cookie, which=account)

    def accounts_of(self, where, args):
        """Return the accounts of the sessions that match where, an SQL condition."""
        sql = f"SELECT DISTINCT account FROM sessions WHERE {where}"
        return self.store.query(sql, *args)

    def personas(self, account: str) -> List[Dict[str, Any]]:
        """Return whom one can sign in as, by choosing them."""
        found = self.store.query(PERSONAS) if self.demo else []
        return [{**row, "current": row["name"] == account} for row in found]

    def home_holes(self, viewer: Viewer) -> Dict[str, Any]:
        """Return what fills the home page. [3] adds a console and a stream."""
        personas = self.personas(viewer.account)
        return {"demo": bool(personas), "persona": personas, "console": False,
                "live": False}

    def mine(self, account: str, after: str) -> Dict[str, Any]:
        """Return what fills the list of an account's workspaces: those after this name, and
        one too many if there are more. [3] has counts, and offers."""
        found = self.store.query(MINE, account, after, NAMES_A_PAGE + 1)
        return {"workspace": found, "count": "", "offer": False}

    def person(self, row: sqlite3.Row) -> Any:
        """Return how lists show somebody, by name and label."""
        return row["name"]

    def give_role(self, ctx, account, before, after):
        """Change a role. [3] first asks a member who is made an owner."""
        put_role(ctx, account, before, after)


# -- signing in and out

LONGEST_TYPED = 256                                      # characters
# The workspaces of an account, its own first; and all personas with what they are there.
PLACES = """FROM memberships m JOIN workspaces w ON w.id = m.workspace WHERE m.account = {}
            AND w.name IS NOT NULL AND w.moving < 2 ORDER BY m.role <> 'owner', w.name"""
PERSONAS = f"""SELECT a.name, a.label, (SELECT group_concat(place, ', ') FROM (SELECT m.role
               || ' of ' || coalesce(w.title, w.name) AS place {PLACES.format("a.name")}
               LIMIT 3)) AS roles FROM accounts a WHERE a.persona ORDER BY a.name"""


def account_name(typed: str) -> str:
    """Return whose name was typed: " Carol" is carol.

    Case and width of letters do not matter (RFC 8265, 3.3), nor do spaces around them,
    which keyboards of telephones add. Text that is too long for a name stays as it is: the
    time to put accents in order grows with the square of their number.
    """
    if len(typed) > LONGEST_TYPED:
        return typed
    return unicodedata.normalize("NFKC", typed).strip().lower()


def persona(ctx):
    """Sign in as the demo does it: by choosing who to be."""
    account = account_name(ctx.field("account"))
    if not ctx.host.demo:
        raise Refused(*NOTHING_HERE)
    if not ctx.store.one("SELECT 1 FROM accounts WHERE name = ? AND persona", account):
        raise Refused(403, "This account is not part of the demo. Choose one that the home "
                           "page shows.")
    first = ctx.store.one(f"SELECT w.name {PLACES.format('?')} LIMIT 1", account)
    start = f"/w/{first['name']}{ctx.host.pages[0].path}" if first else "/"
    return ctx.host.open_session(ctx, account, start)


# Sessions that are over, 100 at a time: deleting very many would keep everybody waiting.
SPENT = """digest IN (SELECT digest FROM sessions WHERE expires <= ? AND operator IS NULL
           LIMIT 100)"""


def add_session(store, account, agent, key) -> str:
    """Return the value of its cookie."""
    token = secrets.token_urlsafe(32)
    now = time.time()
    row = token_hash(token), account, now, now + SESSION_SECONDS, agent
    store.exec("INSERT INTO sessions (digest, account, created, expires, agent) VALUES (?, "
               "?, ?, ?, ?)", *row)
    return f"{token}.{seal(token, key)}"


def logout(ctx):
    close_session(ctx)
    cookie = set_cookie(ctx.request.scheme, ctx.host.keys[0], "", 0)
    return see_other("/", cookie, which=ctx.viewer.account)


def close_session(ctx):
    digest = bytes.fromhex(ctx.request.headers.get("x-session", ""))
    end_sessions(ctx, "digest = ?", digest)


def end_sessions(ctx, where, *args):
    """End the sessions that match where, an SQL condition, and their streams."""
    for row in ctx.host.accounts_of(where, args):
        access_changed(ctx, row["account"])
    ctx.store.exec(f"DELETE FROM sessions WHERE {where}", *args)


def access_changed(ctx, account):
    """Say that what this account may do has changed: [2] has its streams ask the gate
    again. In Part One all streams do so every two seconds."""
    ctx.host.bus.publish(f"access:{account}")


# -- the home page

NAMES_A_PAGE = 24                                        # on the home page
MINE = """SELECT w.id, w.name, w.moving, coalesce(w.title, w.name) AS title, m.role
          FROM memberships m JOIN workspaces w ON w.id = m.workspace WHERE m.account = ?
          AND w.name > ? AND w.moving < 2 ORDER BY w.name LIMIT ?"""


def home(ctx):
    """Show an account its workspaces; let anybody else sign in. To sign in is to choose a
    persona here, so /login and /account lead here, too."""
    holes = ctx.host.home_holes(ctx.viewer)
    if not ctx.viewer.account:
        body = template("home.welcome")(lead=LAYOUT["brand"] == "orion", **holes, **LAYOUT)
        return page("Welcome", body)
    body = template("home")(
        mine=mine_region(ctx), name=ctx.typed.get("name", ""),
        problem=ctx.typed.get("problem", ""), stamp=ctx.stamp, **holes)
    nav = template("layout.state")() if holes["live"] else ""
    return page("Workspaces", body, ctx.viewer, nav)


def mine_region(ctx):
    mine = ctx.host.mine(ctx.viewer.account, ctx.params.get("after", ""))
    shown = mine["workspace"][:NAMES_A_PAGE]
    mine.update(workspace=shown, more=len(mine["workspace"]) > NAMES_A_PAGE)
    return template("home.mine")(
        start=ctx.host.pages[0].path, none=not shown, stamp=ctx.stamp,
        after=shown[-1]["name"] if shown else "", **mine)


# -- new workspaces

WORKSPACE_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def new_workspace(ctx):
    """Create a workspace; the caller becomes its owner. A name used again gets a new id."""
    name = ctx.field("name").strip()
    if not WORKSPACE_NAME.fullmatch(name):
        raise Refused(422, "A name has 1 to 63 characters: a to z, 0 to 9, hyphens inside.")
    return create_and_enter(ctx, name)


def create_and_enter(ctx, name):
    """Create a workspace by a valid name, and lead its owner there."""
    account = ctx.viewer.account
    ctx.host.add_workspace(ctx, name, account)
    access_changed(ctx, account)
    if ctx.request.plain_form:
        return see_other(f"/w/{name}{ctx.host.pages[0].path}", which=name)
    return done(ctx, name, name="", problem="")


def add_rows(store, id, name, people):
    """people: accounts with their roles."""
    store.exec("INSERT INTO workspaces (id, name, born) VALUES (?, ?, ?)", id, name, name)
    for account, role in people:
        add_member(store, id, account, role)


def add_member(store, id, account, role):
    store.exec("INSERT INTO memberships (workspace, account, role) VALUES (?, ?, ?)", id,
               account, role)


def check_free(store, name):
    """Raise Refused(422) if a workspace has this name."""
    if store.one("SELECT 1 FROM workspaces WHERE name = ?", name):
        raise Refused(422, f"The name {name} is taken. Choose another.")


def new_id(store, workspaces, name):
    before = store.one("SELECT count(*) FROM workspaces WHERE born = ?", name)[0]
    return workspaces.id_from_name(f"{name}#{before}" if before else name)


# ==== 13. Members =========================================================================
# The idea: who is in a workspace is policy. So this page of a workspace is the Directory's;
#   it is as live as every other.
# It promises: only owners make or change owners, and the last owner stays.
# Who uses it: every workspace has it, besides the pages of its slices.

MEMBERS_OF = """SELECT a.name, a.label, m.role, m.offered AS offer FROM memberships m
                JOIN accounts a ON a.name = m.account WHERE m.workspace = ?
                AND m.account >= ? ORDER BY m.account LIMIT ?"""
COUNT_OF = "SELECT count(*) FROM memberships WHERE workspace = ?"
MEMBERS_A_PAGE = 100
ROLE_OF = "SELECT role FROM memberships WHERE workspace = ? AND account = ?"
OWNERS_OF = "SELECT count(*) FROM memberships WHERE workspace = ? AND role = 'owner'"
NOT_A_MEMBER = ""                                        # in the place of a role
OWN_TABLES: List[str] = []                               # [3] a member's rows elsewhere


def role_choice(viewer, chosen):
    """Return the roles that this viewer can give. Only an owner makes owners."""
    return [{"role": role, "selected": role == chosen} for role in ROLES
            if role != "owner" or viewer.role == "owner"]


def member_row(ctx, member):
    viewer = ctx.viewer
    over_them = member["role"] != "owner" or viewer.role == "owner"
    managed = viewer.can("members:manage") and over_them
    offered = member["offer"] and viewer.role == "owner"     # [3] their answer is awaited
    chosen = "owner" if offered else member["role"]
    return {**member, "person": ctx.host.person(member), "managed": managed,
            "option": role_choice(viewer, chosen), "fixed": not managed}


def members_region(ctx):
    first = ctx.params.get("from", "")
    some = ctx.store.query(MEMBERS_OF, ctx.viewer.id, first, MEMBERS_A_PAGE + 1)
    rows = [member_row(ctx, member) for member in some[:MEMBERS_A_PAGE]]
    return template("members.region")(
        member=rows, all=ctx.store.one(COUNT_OF, ctx.viewer.id)[0],
        more=[{"next": member["name"]} for member in some[MEMBERS_A_PAGE:]])


def members_page(ctx, region):
    typed = ctx.typed
    return template("members")(
        region=region, workspace=ctx.title, me=ctx.viewer.account,
        form=ctx.viewer.can("members:manage"), account=typed.get("account", ""),
        option=role_choice(ctx.viewer, typed.get("role", "member")),
        problem=typed.get("problem", ""), stamp=ctx.stamp,
        find=ctx.store.one(COUNT_OF, ctx.viewer.id)[0] > MEMBERS_A_PAGE,
        first=ctx.params.get("from", ""))


def role_of(store, id, account):
    row = store.one(ROLE_OF, id, account)
    return row["role"] if row else NOT_A_MEMBER


def invite(ctx):
    account = account_name(ctx.field("account"))
    if not ctx.store.one("SELECT 1 FROM accounts WHERE name = ?", account):
        raise Refused(422, "There is no account with this name. Check the spelling, or ask "
                           "the operator of this server to add it.")
    if role_of(ctx.store, ctx.viewer.id, account):
        raise Refused(422, f"{account} is a member already. Change the role in the list.")
    role = valid_role(ctx.field("role", "member"))
    set_role(ctx, account, NOT_A_MEMBER, role)
    return done(ctx, f"{ctx.viewer.id} {account}: {role}", account="", problem="")


def change_role(ctx, account):
    account = account_name(account)
    before = role_of_member(ctx, account)
    role = valid_role(ctx.field("role"))
    set_role(ctx, account, before, role)
    return done(ctx, f"{ctx.viewer.id} {account}: {role}")


def expel(ctx, account):
    """Anybody may leave; to send others away takes members:manage."""
    account = account_name(account)
    if account != ctx.viewer.account:
        ctx.viewer.permit("members:manage")
    set_role(ctx, account, role_of_member(ctx, account), NOT_A_MEMBER)
    answer = done(ctx, f"{ctx.viewer.id} {account}")
    if account != ctx.viewer.account or not ctx.request.datastar:
        return answer
    left = event("elements", template("goodbye.left")(workspace=ctx.title))
    return answer._replace(status=200, body=left, type=EVENTS)


def role_of_member(ctx, account):
    """Return the role of a member. Raise Refused(404) if they are none."""
    role = role_of(ctx.store, ctx.viewer.id, account)
    if role == NOT_A_MEMBER:
        raise Refused(404, "There is no such member. The page shows who is one now.")
    return role


def valid_role(role):
    """Return the role. Raise Refused(422) if there is none of this name."""
    if role not in ROLES:
        raise Refused(422, f"A role is one of {', '.join(ROLES)}.")
    return role


# To change a role, set_role asks who may, and Directory.give_role calls put_role. That has
# store_role write it, and tells all who look. NOT_A_MEMBER is a role, too.

def set_role(ctx, account, before, after):
    """Raise Refused(403) if only an owner may do this."""
    if "owner" in (before, after) and ctx.viewer.role != "owner":
        raise Refused(403, "Only an owner can make or change an owner. Ask one of them.")
    ctx.host.give_role(ctx, account, before, after)


def put_role(ctx, account, before, after):
    store_role(ctx.store, ctx.viewer.id, account, before, after)
    ctx.publish("members")
    access_changed(ctx, account)


def store_role(store, id, account, before, after):
    """Raise Refused(409) if that would leave no owner."""
    if before == "owner" and after != "owner" and store.one(OWNERS_OF, id)[0] == 1:
        raise Refused(409, "This is the last owner. Make somebody else an owner first.",
                      signal="toast")
    store.exec("DELETE FROM memberships WHERE workspace = ? AND account = ?", id, account)
    if after != NOT_A_MEMBER:
        return add_member(store, id, account, after)
    for table in OWN_TABLES:
        store.exec(f"DELETE FROM {table} WHERE workspace = ? AND account = ?", id, account)


members = Live("/members", MEMBER, "Members", (Region("members", members_region),),
               members_page, params={"from": ".{1,63}"})


# -- the history of the tables (to be skipped on a first reading, up to the slice). What ran
# once is never edited. [3] continues it. What section 12 does not name is for [3].

DIRECTORY_TABLES = [
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
    "ALTER TABLE sessions ADD COLUMN operator TEXT REFERENCES accounts ON DELETE CASCADE",
    "ALTER TABLE sessions ADD COLUMN read_only INTEGER NOT NULL DEFAULT 0",
    "CREATE INDEX sessions_by ON sessions (operator)",
    "DROP TABLE masquerades",
    "CREATE INDEX sessions_until ON sessions (operator, expires)",
    "ALTER TABLE workspaces ADD COLUMN title TEXT",
    "ALTER TABLE memberships ADD COLUMN offered INTEGER NOT NULL DEFAULT 0",
]


# -- the slice

directory = Slice(
    name="directory",
    migrations=DIRECTORY_TABLES,
    live=(members,),
    routes=(Route("GET", "/_gate/<workspace>", PUBLIC, gate),
            Route("GET", "/", PUBLIC, home),
            Route("GET", "/login", PUBLIC, home),
            Route("GET", "/account", PUBLIC, home),
            Route("POST", "/persona", PUBLIC, persona),
            Route("POST", "/logout", PUBLIC, logout),
            Route("POST", "/workspaces", ACCOUNT, new_workspace, form="/"),
            Route("POST", "/members", "members:manage", invite, says="let in"),
            Route("PATCH", "/members/<account>", "members:manage", change_role,
                  says="made"),
            Route("DELETE", "/members/<account>", MEMBER, expel, says="removed")))


# ==== 14. Plain edge ======================================================================
# The idea: the edge is the place that knows sockets. This one is the plainest there is: the
#   standard library's server, with a thread for each connection. An open stream is a thread
#   that waits on its object's Condition. Two things keep that object awake: Bus.waiting
#   counts the thread, and the thread asks again every two seconds, which renews
#   DurableObject.used. [2] holds the streams elsewhere, so that an object can sleep.
# It promises: every request gets a response, whatever happens on its way. A stream is a
#   question that is asked again, the whole way: before each frame, and at least
#   every REGATE_SECONDS, the worker asks the gate whether this person may still look.
# Who uses it: the network.

REGATE_SECONDS = 2.0
BODY_LIMIT = 65_536                                      # bytes
BEAT = b":\n\n"                                          # a comment; it changes nothing
SILENCE_SECONDS = 25                                     # between two of them, at most
POLICY = ("default-src 'none'; script-src 'self'{}; style-src 'self'; img-src 'self'; "
          "font-src 'self'; media-src 'self'; connect-src 'self'; form-action 'self'; "
          "base-uri 'none'; frame-ancestors 'none'")
HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff",
           "x-frame-options": "DENY", "referrer-policy": "same-origin",
           "cross-origin-opener-policy": "same-origin",
           "cross-origin-resource-policy": "same-origin"}
STREAMING = {"transfer-encoding": "chunked", "x-accel-buffering": "no",
             "cache-control": "no-cache", "datastar-heartbeat": str(SILENCE_SECONDS)}


# -- from a request to a response, without a socket

def respond(request: Request, env: Env) -> Response:
    """Return the worker's response or, whatever went wrong, a refusal."""
    try:
        response = env.front(request, env)
        check_values((*response.headers, ("content-type", response.type)))
        return response
    except (Exception, SystemExit) as error:             # a slice may call sys.exit()
        return refusal(request, error)


def refusal(request: Request, error: BaseException) -> Response:
    """Return a page to a browser that opens one, and a line of text to everybody else.

    To Datastar, a stream that is refused looks like a lost connection: it would ask again
    forever. So the refusal is sent as a last frame. After a fault of ours it should ask
    again; then the last frame says only that the page is not current.
    """
    no = as_refused(request, error)
    if request.opens_page:
        return error_page(request, no)
    last = last_frame(no) if request.stream and request.datastar else b""
    if last:
        return Response(200, last, EVENTS)
    text = f"{no.message}\n".encode("utf-8", "replace")
    return Response(no.status, text, headers=no.headers)


def as_refused(request, error):
    """Turn an error into a Refused. A fault of our own goes to the log."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, UnicodeEncodeError):            # half a character, written in JSON
        return Refused(400, "This text has an invalid character. Type it again.")
    log_error(f"{request.method} {request.path}", error)
    return Refused(500, "Something went wrong on our side; it is in the log. Try again.")


def error_page(request, no):
    """Return its page. A path that takes only commands leads to the page above it."""
    if no.status == 405 and request.method in SAFE and request.path != "/":
        above = request.path.rpartition("/")[0] or "/"
        return see_other(urllib.parse.quote(above))
    said = told(no)
    body = template("error")(**said, **LAYOUT)
    return page(said["headline"], body, status=no.status)._replace(headers=no.headers)


HEADLINES = {401: "You are not signed in", 403: "This is not open to you",
             404: "We can't find this", 429: "Please wait a little",
             503: "Very busy just now", 507: "There is no room left"}
PASSING = (429, 500, 502, 503, 504)                      # these are worth another try


def told(no: Refused) -> Dict[str, Any]:
    """Return what the page of an error says."""
    return {"headline": HEADLINES.get(no.status, "That did not work"), "status": no.status,
            "message": no.message, "again": no.status in PASSING}


GOODBYES = {401: "signed_out", 403: "no_entry", 404: "gone", 412: "other_account"}
# It patches nothing; the layout shows it. retry is in ms.
NOT_CURRENT = b"event: datastar-stale\nretry: 5000\ndata: version old\n\n"


def last_frame(no: Refused) -> bytes:
    """Return what a stream ends with; b"": it breaks off, and its browser asks again.

    A goodbye replaces the element that would ask again.
    """
    if no.status in GOODBYES:
        farewell = template(f"goodbye.{GOODBYES[no.status]}")
        return event("elements", farewell(message=no.message))
    return NOT_CURRENT if no.status == 500 else b""


def headers_of(response: Response) -> Dict[str, str]:
    """Return the headers of an answer, with the content security policy of a page."""
    nonce = f" 'nonce-{response.nonce}'" if response.nonce else ""
    return {**HEADERS, "content-type": response.type,
            "content-security-policy": POLICY.format(nonce),
            **(STREAMING if response.watch else {}), **dict(response.headers)}


def chunk(data):
    """RFC 9112, 7.1: a length, then that many bytes. An empty one ends the answer."""
    return b"%x\r\n%b\r\n" % (len(data), data)


# -- a connection, in its own thread

class PlainHandler(BaseHTTPRequestHandler):
    """The standard library parses a request's head; this class makes a Request of it.

    That parser takes a lone CR for the end of a line. A proxy may not: put none in front.
    """
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 75                                         # seconds, for a silent peer

    def answer(self):
        request = Request("GET", "/")
        try:
            request = self.request_of()
            response = respond(request, self.server.env)
        except Refused as no:
            self.close_connection = True                 # who knows where the next begins
            response = refusal(request, no)
        if response.watch and self.command == "GET":     # request.method is GET for HEAD
            return self.hold(request, response)
        self.begin(response)
        if self.command != "HEAD":
            self.wfile.write(response.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = answer

    def request_of(self):
        """Raise Refused for what can be read in two ways, and for what is too large."""
        headers = {name.lower(): value for name, value in self.headers.items()}
        twice = len(headers) < len(self.headers)
        unread = self.headers.defects                    # the parser stopped at a line
        if twice or unread or not REQUEST.fullmatch(self.requestline):
            raise Refused(400, "The request is malformed, or has a header field twice.")
        if self.request_version == "HTTP/1.0":
            self.close_connection = True
        if not known_host(headers.get("host", "")):
            raise Refused(*NOT_OUR_NAME)
        if "transfer-encoding" in headers:
            raise Refused(411, "Send the body with a Content-Length.")
        length = content_length(headers)
        if length > BODY_LIMIT:
            raise too_large(BODY_LIMIT)
        body = self.rfile.read(length)
        if len(body) < length:
            raise Refused(400, "The body is shorter than its Content-Length.")
        path, _, query = self.requestline.split()[1].partition("?")
        method = "GET" if self.command == "HEAD" else self.command
        request = Request(method, plain_path(path), query, headers, body,
                          self.client_address[0])
        if request.stream and self.request_version == "HTTP/1.0":
            raise Refused(505, "A stream is sent in chunks, so it needs HTTP/1.1.")
        return request

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
        self.close_connection = True
        self.begin(response)
        shown = b""
        request = request.with_headers({"datastar-request": "true"})     # a no is a frame
        while response.watch:
            # Something is sent even if nothing is new, so that a closed tab is noticed.
            new = BEAT if response.body == shown else response.body
            self.wfile.write(chunk(new))
            shown = response.body
            try:
                response.watch.wait(REGATE_SECONDS)
            except Refused:                              # the server is stopping
                return
            response = respond(request, self.server.env)
        if response.type == EVENTS:                      # else it breaks off
            self.wfile.write(chunk(response.body) + chunk(b""))

    def log_message(self, *_):
        """Part One keeps no access log."""


class PlainEdge(ThreadingHTTPServer):
    daemon_threads = True                                # no stream keeps the process alive
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
                self.env.workspaces.sleep_unused()
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


# -- a request that could be read in two ways is refused (to be skipped on a first reading)

LENGTH = re.compile(r"0|[1-9][0-9]{0,18}")
REQUEST = re.compile(r"[A-Z]+ [!-~]+ HTTP/1\.[01]")
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


def without_port(host: str) -> str:
    """Return the name, or the address, of a Host header.

    A dot at the end says that a name is complete (RFC 1034, 3.1); ours all are.
    """
    return re.sub(r"\.?(:[0-9]*)?$", "", host).lower()


def known_host(host: str, names: Sequence[str] = ("localhost",)) -> bool:
    """Is this Host header one of ours: one of the names, or any address?

    Another site can make its own name lead here (DNS rebinding), but not an address.
    """
    name = without_port(host)
    if name in names:
        return True
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name.strip("[]")))
    return False


NOT_OUR_NAME = (421, "This server is not known by that name. Its operator can allow it: "
                     "--allow-host NAME.")


def content_length(headers):
    """Return how many bytes the body has. Raises Refused(400).

    Also for digits that int() and a proxy could read in different ways.
    """
    length = headers.get("content-length", "0")
    if not LENGTH.fullmatch(length):
        raise Refused(400, "Content-Length is one plain decimal number.")
    return int(length)


def too_large(limit: int) -> Refused:
    most = f"{limit // 2 ** 20} MB" if limit >= 2 ** 20 else f"{limit} bytes"
    return Refused(413, f"This is too large: at most {most} can be sent here.")


# -- the log

def log(message: str) -> None:
    """Write one line to standard error. Control characters are escaped.

    So no text that is logged can write a line of its own.
    """
    with contextlib.suppress(OSError, ValueError):       # nobody reads it: go on
        print(message.encode("unicode_escape").decode(), file=sys.stderr, flush=True)


def log_error(where: str, error: BaseException) -> None:
    for write in ERROR_LOGS:
        write(where, error)


def log_traceback(where: str, error: BaseException) -> None:
    what = traceback.format_exception(type(error), error, error.__traceback__)
    log(f"error: {where}: {''.join(what)}")


ERROR_LOGS = [log_traceback]                             # [3] has another one


# ==== 15. Composition =====================================================================
# The idea: a composition root decides which objects, slices, doors and edge there are, and
#   who knows whom. For another edge, another place for the objects or other slices, only
#   this changes, and ROLES (section 12), which says who has a slice's grants.
# It promises: importing this file builds nothing.
# Who uses it: the code that starts a server. [3] has four further roots.

ASSETS = {"/datastar.js": "text/javascript; charset=utf-8", "/icon.svg": "image/svg+xml",
          "/style.css": "text/css; charset=utf-8"}


def plain_planes(data: pathlib.Path, idle: float = 60.0, slices: Sequence[Slice] = (todos,),
                 demo: bool = True,
                 whole: Callable[[type], type] = lambda cls: cls) -> Env:
    """Return the two planes of this part: one Directory, and a Workspace for each team.

    whole is for [3], which adds to the classes: read whole(Workspace) as Workspace.
    """
    fresh = prepare(data, data / "directory.db", data / "secret.key")
    keys = read_keys(data / "secret.key")
    for_teams = Router([welcome, *slices])
    for_all = Router([directory])
    pages = pages_of(slices)
    workspaces = whole(Namespace)(
        "workspace", data / "workspaces", idle,
        lambda id, own: whole(Workspace)(id, own, for_teams, pages))
    control = whole(Namespace)(
        "directory", data, float("inf"),
        lambda id, own: whole(Directory)(id, own, for_all, pages, keys, workspaces, demo))
    env = Env(control.get("directory"), workspaces, DOORS)
    if fresh:
        control.create("directory")
        if demo:
            seed(env, DEMO_WORKSPACES, todos in slices)
    return env


def pages_of(slices: Sequence[Slice]) -> List[Live]:
    """Return the pages that the navigation shows."""
    pages = [live for slice in slices for live in slice.live if live.is_tab]
    return [*pages, members]


def prepare(data, file, key_file):
    """Make the folders and the key. Return True if there was nothing yet.

    Raise Unusable if the Directory was lost. A new one would know none of the workspaces,
    and nobody could enter them.
    """
    private_folder(data / "workspaces")
    fresh = not file.exists()
    if fresh and any((data / "workspaces").glob("*.db")):
        raise Unusable(f"{file} is missing, and there are workspaces; restore it from a "
                       "backup, or name another folder with --data (a node is started with "
                       "--plane data)")
    if fresh and not key_file.exists():
        make_key(key_file)
    return fresh


def only_read(request):
    """Raise Refused(405) for a command."""
    if request.method not in SAFE:
        raise Refused(405, "This address takes GET, HEAD.", (("allow", "GET, HEAD"),))


def healthz(request, env):
    only_read(request)
    return Response(200, b"ok\n")


def own_asset(request, env):
    """A door: a file of templates/. A browser asks for it each time: it may have changed.
    """
    only_read(request)
    body = (TEMPLATES / request.path[1:]).read_bytes()
    return Response(200, body, ASSETS[request.path], (("cache-control", "no-cache"),))


DOORS = {"/healthz": healthz, **dict.fromkeys(ASSETS, own_asset)}

DEMO_ACCOUNTS = {"alice": "Alice Brown", "bob": "Bob Miller", "carol": "Carol Jones",
                 "dave": "Dave Smith", "erin": "Erin Walker"}
DEMO_WORKSPACES = {
    "home": ({"alice": "owner"},
             ("Water the plants", "Call grandmother", "Book the dentist")),
    "acme": ({"bob": "owner", "carol": "member", "erin": "viewer"},
             ("Order more anvils", "Test the skates", "Invoice the coyote")),
    "globex": ({"dave": "owner", "bob": "member"},
               ("Draft the charter", "Paint the lobby", "Plan the picnic")),
}


def seed(env, workspaces, with_todos):
    """Fill the demo. Its people are written to their table; all else is done by requests.
    If this is interrupted, remove the folder and begin again."""
    store = Store(env.directory.namespace.path(env.directory.id))
    with store, store.tx():
        for account in DEMO_ACCOUNTS.items():
            store.exec("INSERT INTO accounts (name, label, persona) VALUES (?, ?, 1)",
                       *account)
    for name, (people, titles) in workspaces.items():
        (owner, _), *others = people.items()
        env.directory.fetch(command_of("/workspaces", {"x-account": owner}, name=name))
        id = env.workspaces.id_from_name(name)
        as_owner = verdict_headers(owner, "owner", name, id)
        for account, role in others:
            invitation = command_of("/members", as_owner, account=account, role=role)
            env.directory.fetch(invitation)
        for title in titles if with_todos else ():
            env.workspaces.get(id).fetch(command_of("/todos", as_owner, title=title))


def command_of(path, trusted, **signals):
    headers = {"content-type": "application/json", "datastar-request": "true", **trusted}
    return Request("POST", path, headers=headers, body=json.dumps(signals).encode())


def stop_signals() -> List[int]:
    """Return the signals that stop a server. SIGHUP: its terminal was closed; under
    nohup(1) that is ignored."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


def serve_plain(env: Env, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve until a signal stops it. port 0 takes any free one."""
    server = PlainEdge(host, port, env)
    # A signal can come while a lock is held, so its handler takes none: it writes a byte.
    # (And on Windows, a thread that waits for a lock hears of no signal.)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno())
    for number in stop_signals():
        signal.signal(number, lambda *_: None)
    serving = threading.Thread(target=server.serve_forever, daemon=True)
    serving.start()
    print(f"orion: http://{f'[{host}]' if ':' in host else host}:{server.server_port}\n"
          "orion: plain: the edge of Part One, for reading and small trusted networks.\n"
          "orion: A thread for each connection and each open page: compared with the full\n"
          "orion: server, a ninth of the pages a second, and 26 times the memory for an\n"
          "orion: open page. No limits, and no passwords",
          flush=True)
    reader.recv(1)                                       # until then: wait
    signal.set_wakeup_fd(-1)
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


# #### Part Two: the edge ################################################################
#
#     16 Files      17 Commits     18 Pieces      19 Reader      20 Answers     21 Kept
#     22 Threads    23 Sockets     24 Broker      25 Loop edge   26 Hosts
#
# In Part One the object holds its streams: each stream takes a thread, and the object can't
# sleep while anybody watches it. Here one loop holds all sockets, a few threads do the
# work, and an object may sleep while thousands watch it. This part has three layers:
#
#     16, 17     the object: its file, which may fail, and its commits, which are shared
#     18 to 21   bytes: renderings that many streams share, requests as they are read,
#                answers as they are written, and pages that are kept
#     22 to 25   threads and sockets: the pool, the loop, and the broker, which knows which
#                stream shows which region
#
# 26 puts the layers together. To follow one click, read only GuardedStub of 16.
#
# The path of one click here. In the loop:
#
#     Connection.read, advance (25)   feeds read_requests (19), until a request is complete
#     LoopEdge.take_up (25)           sends a kept page (21) at once; if there is none:
#     Pool.gather (22)                puts the request into a lane, the queue of an object
#
# In a thread of the pool:
#
#     LoopEdge.work_off (25)          runs the worker (2) up to its last step, the forward,
#                                     which it only notes: Noted (25)
#     GuardedStub.fetch_all (16)      takes the turn of the object
#     GroupCommit.answer_all (17)     runs all commands of the lane in one transaction
#     Broker.published (24)           is told what was published, after the commit
#     LoopEdge.finish (25)            sends the answers: Connection.reply (25)
#     Broker.refresh (24)             asks for the region again, in the same thread
#
# And in the loop again: Broker.deliver (24), Stream.show (23).
#
# What it buys, measured in one run by "test_orion.py bench" on two quiet cores:
#
#                                             plain edge    this edge     ratio
#     pages a second, 1 connection                 1,520        6,840    1 : 4
#     pages a second, 32 connections               1,780       22,500    1 : 13
#     pages a second, 128 connections              1,780       22,200    1 : 12
#     the slowest of 100 pages, 128 connections   427 ms        16 ms   26 : 1
#     commands a second, 1 connection                947        1,080    1 : 1.1
#     commands a second, 32 connections            1,260        6,170    1 : 5
#     time to the last of 1,000 watchers          340 ms        11 ms   31 : 1
#     memory for a stream                          44 kB       2.0 kB   22 : 1
#     threads for 1,000 streams                    1,004           18   56 : 1
#
# It costs a second reader of requests, and a rule for slices: because a page may be kept,
# it may depend only on its rows and on path, query and cookie of its request. Slices do not
# notice the rest: commands that wait for the same object share a commit, and all who may
# see the same get the same bytes of a rendering.
#
# It extends Part One with subclasses of Store, Stub, Namespace and DurableObject. A
# composition root chooses them (two_planes, in section 30). super() follows this chain:
#
#     EdgeWorkspace -> Broadcast -> GroupCommit -> GuardedObject -> Workspace -> SliceHost
#     -> DurableObject
#
# The worker is unchanged. It runs in an Env with another forward. A publish goes from
# Bus.tell to GuardedNamespace.published, and from there to Broker.published.
#
# Here, too, a name nearly always has the same type: asked is an Asked, buffer a bytearray,
# channel a Channel, edge a LoopEdge, lane a Lane, piece a Piece, reading a Reading,
# response a Response, stream a Stream, stub a GuardedStub; headers is a dict; folder is a
# pathlib.Path, and so is the path of a file; data and head are bytes; call, ask, job and
# function are functions; seconds may have a fraction; id, draft, topic, why, peer and host
# are strings.

import collections
import errno
import itertools
import selectors
import stat
import zlib
from email.utils import formatdate
from http.client import responses as REASONS
from typing import Iterable, Iterator

try:
    import fcntl
    import resource
except ImportError:                                      # Windows has neither of them
    fcntl = resource = None

CRASH = BaseException                                    # even a slice's sys.exit()


# ==== 16. Files ===========================================================================
# The idea: a faulty file must not stop the server. Whatever is wrong with an object's file
#   is raised as a StorageFault: that workspace alone answers 503 or 507, and a line in the
#   log names the file, the fault and the remedy.
# It promises: a lost file is never replaced by an empty one. Nothing is written to a file
#   that was moved or replaced. No statement runs for longer than a few seconds. Migrations
#   that take longer than a second go on in a background thread, one file after the other;
#   until they end, that workspace alone answers 503.
#   While another process holds the write lock of a file, commands to it wait, and so do the
#   requests behind them in their lane. They wait without the object's turn, so others can
#   read on: in WAL mode nobody can lock out the readers of a file that is open here.
# Who uses it: both planes. (On a first reading, stop after GuardedStub.)

def retry_after(seconds):
    """Return the Retry-After header of a temporary refusal (RFC 9110, 10.2.3)."""
    return (("retry-after", str(seconds)),)


class Undone(Exception):
    """Nothing was done, so the caller asks again."""


class Detached(Undone):
    """The open file is no longer at its path: another file is there, or none. The stub
    closes the object and asks a new one, which opens the file at the path."""


class Locked(Undone):
    """Another process holds the write lock of the file. The stub releases the turn and
    tries again after a pause, for some seconds."""


class Busy(Refused):
    """Waiting would take too long."""

    def __init__(self):
        super().__init__(503, "This is busy. Try again in a moment.", retry_after(1))


class GuardedStub(Stub):
    """Takes the turn, asks, and handles Undone. A caller with a limit of seconds does not
    wait at all while another process has the file locked."""
    PAUSE = 0.005                                        # seconds

    def fetch(self, request, seconds=-1):
        return self.enter(lambda one: one.answer(request), request, seconds)

    def ask(self, path, query="", headers={}, scheme="http"):
        """Ask a question for the server itself. Return the answer, decoded from JSON."""
        question = Request("GET", path, query, headers, scheme=scheme)
        return json.loads(self.fetch(question).body)

    def ask_as(self, request, path):
        """Ask the object about the sender of this request, with the same query."""
        return self.ask(path, request.query, request.headers, request.scheme)

    def fetch_all(self, requests, check=lambda: None):
        """See GroupCommit.answer_all. check() is called in the turn; it may raise."""
        def ask(one):
            check()
            return one.answer_all(requests)
        return self.enter(ask, requests[0])

    def enter(self, ask, request, seconds=-1):
        """Call ask(object) in the object's turn, and return the result.

        seconds: how long to wait for the turn before Busy is raised; -1: no limit.
        """
        self.namespace.count(self.id, request)
        try:
            return self.take_turn(ask, seconds)
        except Locked as locked:
            if seconds >= 0:
                raise Busy from locked
            return self.wait_for_lock(locked, ask)

    def take_turn(self, ask, seconds=-1):
        while True:
            one = self.namespace.awake(self.id)
            if not one.turn.acquire(timeout=seconds):
                raise Busy
            try:
                if not one.gone:
                    return ask(one)
            except Detached:
                one.close()
            finally:
                one.turn.release()

    def wait_for_lock(self, locked, ask):
        """Ask again until another process releases its lock. Only a few threads may wait.

        Others can take the turn during the pauses. Raises StorageFault, Busy.
        """
        namespace = self.namespace
        if not namespace.lock_waiters.acquire(blocking=False):
            raise Busy
        try:
            if time.monotonic() >= namespace.lock_deadline(self.id):     # logged already
                raise StorageFault(namespace.path(self.id), locked)
            while time.monotonic() < namespace.lock_deadline(self.id):
                time.sleep(self.PAUSE)
                with contextlib.suppress(Locked):
                    return self.take_turn(ask)
            raise namespace.fault(self.id, locked) from locked
        finally:
            namespace.lock_waiters.release()


LOOK_SECONDS = 0.2                                       # see fetch_briefly


def fetch_briefly(stub, request):
    """Fetch an answer that the caller can do without: wait at most LOOK_SECONDS."""
    return stub.fetch(request, LOOK_SECONDS)


# -- faults of a file (skip this on a first reading, up to section 17)

class StorageFault(Refused):
    """The file of an object can't be used. text is for the log, message is for people."""
    LATE = "its migrations take long"                    # GuardedObject.open raises it
    # By a part of the error's text. The first match counts.
    REMEDIES = {LATE: "they go on in the background; until they end, nobody is let in",
                "disk is full": "make room on the disk, or raise the quota",
                "is locked": "end the process that holds the lock",
                "interrupted": "a statement ran too long: give it an index, or ask for "
                               "less",
                "readonly database": "make the file and its folder writable",
                "unable to open database file": "make it readable; let the process have "
                                                "more descriptors",
                "disk I/O error": "see what the system's log says about the disk",
                ", entry ": "none of it was done; mend the rows on which it fails, and it "
                            "is tried again",            # a MigrationError
                "constraint failed": "a slice leaves this check to the commit; let it "
                                     "check before it writes",
                "unsupported file format": "restore it from a backup"}
    OTHER_REMEDY = ("restore it from a backup: orion.py check says what is wrong, restore "
                    "brings it back")

    ANSWERS = {"disk is full": (507, "The disk of this server is full. Ask its operator "
                                     "to make room."),
               LATE: (503, "This is being brought up to date. Try again in a few minutes.",
                      retry_after(10)),
               "is locked": (503, "Another program is writing to this just now. Try again "
                                  "in a few seconds.", retry_after(5))}
    OTHER_ANSWER = (503, "This can't be read just now. Try again in a minute.",
                    retry_after(60))

    def __init__(self, path, error):
        known = next((words for words in self.REMEDIES if words in str(error)), None)
        super().__init__(*self.ANSWERS.get(known, self.OTHER_ANSWER))
        remedy = self.REMEDIES.get(known, self.OTHER_REMEDY)
        self.text = f"{path}: {error}; {remedy}"

    def __str__(self):
        return self.text

    @classmethod
    def is_behind(cls, error):
        """True if the database file is at fault, False if the SQL statement is."""
        if isinstance(error, sqlite3.OperationalError):
            if str(error).startswith("no such"):         # a name follows: any text
                return False
            return str(error).endswith(tuple(cls.REMEDIES))
        return type(error) in (sqlite3.DatabaseError, MigrationError)


# -- the file of an object

class NestedStore(Store):
    """A store in which a transaction can contain others."""

    def tx(self):
        """Inside another tx this is a savepoint, which can fail alone."""
        return self.savepoint() if self.db.in_transaction else super().tx()

    @contextlib.contextmanager
    def savepoint(self):
        """Inside, after_commit holds only what this part has added."""
        self.run("SAVEPOINT part", ())
        outer, self.after_commit = self.after_commit, []
        try:
            yield
            self.run("RELEASE part", ())
            outer += self.after_commit
        except BaseException:
            if self.db.in_transaction:
                self.run("ROLLBACK TO part", ())
                self.run("RELEASE part", ())
            raise
        finally:
            self.after_commit = outer


class GuardedStore(NestedStore):
    """A store that notices if its file is moved or replaced.

    Small pages and few kept statements: an awake workspace takes 85 KB, 32 of them for the
    index of its log. With the defaults (4,096 bytes, 128 statements) it takes 122 KB.
    """
    SETUP = f"PRAGMA page_size=1024; {Store.SETUP}; PRAGMA cache_size=-512"
    STATEMENTS = 12
    LOCK_SECONDS = 0.0                                   # never wait in an object's turn

    def __init__(self, path, create=False):
        self.inode = None if create else identity(path)  # None: it is new
        super().__init__(path, create)

    @property
    def detached(self):
        """True if another file is at the path now, or none.

        SQLite does not notice. It would go on writing to a file that nobody can find.
        """
        try:
            return self.inode not in (None, identity(self.path))
        except sqlite3.Error:
            return True

    def begin(self):
        """Raises Detached. While we hold the write lock, nobody replaces the file."""
        super().begin()
        if self.detached:
            self.run("ROLLBACK", ())
            raise Detached

    def commit(self):
        """If a commit raises, nothing of it is written, not even after a crash."""
        try:
            super().commit()
        except sqlite3.OperationalError:
            if not self.db.in_transaction:
                self.overwrite()
            raise

    def overwrite(self):
        """Overwrite a failed commit with one that changes nothing.

        The failed one can be complete in the write-ahead log, if the disk reported its
        error only after writing all of it. After a crash SQLite would take it for valid.
        """
        with contextlib.suppress(sqlite3.Error):         # even if this fails, it is written
            self.exec(f"PRAGMA user_version={self.one('PRAGMA user_version')[0]}")

    def close(self):
        """If the file is detached, write its log into it first. SQLite does so itself only
        for a file at its path; and the new file there must not pick up this log."""
        self.db.set_progress_handler(None, 0)            # the handler refers to the object
        if self.detached:
            with contextlib.suppress(sqlite3.Error):
                self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        super().close()


def identity(path):
    """Return the device and inode of the file at path. Raises sqlite3.DatabaseError if
    there is no file, or no database in it.

    SQLite would take an empty file for a new database, so that is refused, too.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        raise sqlite3.DatabaseError(f"the file {path.name} is missing") from None
    except OSError as error:                             # as when its folder can't be read
        why = f"unable to open database file: {error.strerror}"
        raise sqlite3.DatabaseError(why) from error
    if not stat.S_ISREG(found.st_mode) or found.st_size == 0:
        how = "empty" if found.st_size == 0 else "no regular file"
        raise sqlite3.DatabaseError(f"{path.name} is {how}")
    return found.st_dev, found.st_ino


def connected_to_read(path, how="", **options):
    """how: more of the URI (sqlite.org/uri.html). options: arguments of connect()."""
    uri = f"{path.absolute().as_uri()}?mode=ro{how}"
    return sqlite3.connect(uri, uri=True, **options)


class GuardedObject(DurableObject):
    """An object whose file may fail."""
    store_class = GuardedStore
    STATEMENT_SECONDS = 5.0                              # SQLite interrupts a longer one
    OPEN_SECONDS = float("inf")                          # see migrate_apart
    LOG_SECONDS = 2.0                                    # longer openings are logged
    # The values with which each object begins:
    began = float("inf")                                 # when the current answer began
    opened_at = 0.0                                      # by time.time(), for people

    def open(self, create=False):
        """Raises StorageFault if migrations take longer than OPEN_SECONDS."""
        began = time.monotonic()
        try:
            super().open(create)
        except (sqlite3.Error, MigrationError) as error:
            if not str(error).endswith("interrupted") or self.namespace.closed:
                raise
            late = f"{StorageFault.LATE}: {error}"       # too_long interrupted them
            self.namespace.migrate_apart(self.id, late)
            self.close()                                 # so all who wait get the fault
            raise self.fault(late) from error
        took = time.monotonic() - began
        if took > self.LOG_SECONDS:
            log(f"storage: {self.store.path}: was opened, in {took:.0f} s")

    def connect(self, create):
        self.namespace.sleep_excess()
        store = super().connect(create)
        store.db.set_progress_handler(self.too_long, 100_000)
        try:
            if not create:
                self.claim(store)
        except BaseException:
            store.close()
            raise
        self.opened_at = time.time()
        return store

    def too_long(self):
        """SQLite calls this now and then during a statement. True interrupts it."""
        if self.bus:
            return time.monotonic() > self.began + self.STATEMENT_SECONDS
        # Migrations are running. In migrate_one, began is infinite, so they have no limit.
        late = time.monotonic() > self.began + self.OPEN_SECONDS
        return late or self.namespace.closed

    def claim(self, store):
        """Raise sqlite3.DatabaseError if the file belongs to another object, because those
        who are let in here must not see its rows. Mark a file that has no mark yet."""
        found = store.one("PRAGMA application_id")[0]
        mark = mark_of(self.id)
        if found not in (0, mark):
            raise sqlite3.DatabaseError("the file belongs to another object")
        if found == 0:
            store.exec(f"PRAGMA application_id = {mark}")

    def on_open(self):
        super().on_open()
        self.bus.listeners.append(functools.partial(self.namespace.published, self.id))

    def answer(self, request):
        """Raises StorageFault, or Undone; after Undone the stub asks again."""
        self.began = time.monotonic()
        try:
            response = super().answer(request)
        except (sqlite3.Error, MigrationError) as error:
            self.check_file(error)
            raise
        if request.method not in SAFE:
            self.namespace.lock_deadlines.pop(self.id, None)
        return response

    def check_file(self, error):
        """Raise Locked if another process's lock kept the answer from beginning, or
        StorageFault if the file is the cause of this error."""
        begun = self.store and self.store.db.in_transaction
        if str(error) == "database is locked" and not begun:
            raise Locked(error) from error
        if StorageFault.is_behind(error):
            raise self.fault(error) from error

    def fault(self, error):
        return self.namespace.fault(self.id, error)

    @property
    def detached(self):
        store = self.store                               # another thread may close it
        return store is not None and store.detached

    def close(self):
        detached = self.detached
        self.namespace.changed(self.id)
        super().close()
        if detached and self.namespace.path(self.id).exists():  # the new file: other rows
            self.namespace.published(self.id, "")


def mark_of(id):
    """Return the number that is stored in the file of this object, to identify it."""
    return zlib.crc32(id.encode()) >> 1


# -- all objects of a kind

class GuardedNamespace(Namespace):
    """Keeps at most `most` objects awake, and tells listeners what is published."""
    LOCK_WAITERS = 4                                     # threads that may wait for a lock
    LOCK_WAIT_SECONDS = 5.0                              # how long each may wait
    LATE_SECONDS = 60.0                                  # until a failure is retried
    CLOSE_SECONDS = 1.0                                  # short: the pool has waited

    def __init__(self, *args, most=1024):
        super().__init__(*args)
        self.most = most
        self.lock_waiters = threading.BoundedSemaphore(self.LOCK_WAITERS)
        self.lock_deadlines = {}                         # by id: see lock_deadline
        self.listeners = []                              # called with (id, topic)
        self.versions = collections.Counter()            # by id: see section 21
        self.settings = None                             # [3]
        self.blocked = {}                                # by id: until when, and why
        self.to_migrate = collections.deque()            # ids: see migrate_apart
        self.fetches = 0                                 # all requests to objects
        self.served = collections.Counter()              # by id: only those of people

    def get(self, id):
        return GuardedStub(id, self)

    def count(self, id, request):
        self.fetches += 1
        if not request.path.startswith("/_") or request.path.startswith("/_gate"):
            self.served[id] += 1

    def fault(self, id, error):
        """Log what is wrong with a file. Return it as a StorageFault."""
        fault = StorageFault(self.path(id), error)
        log(f"storage: {fault}")
        return fault

    def lock_deadline(self, id):
        """Return when all requests that wait for another process's lock give up.

        If the first one waits from 0 s on, this is at 5 s. One that comes at 3 s waits for
        2 s. One that comes at 7 s does not wait, because the lock is probably the same. One
        that comes at 11 s, or after a command that got the lock, starts a new period.
        """
        now = time.monotonic()
        end = self.lock_deadlines.get(id, float("-inf"))     # a thread may remove it
        if now > end + self.LOCK_WAIT_SECONDS:
            end = self.lock_deadlines[id] = now + self.LOCK_WAIT_SECONDS
        return end

    def published(self, id, topic):
        """Tell the listeners. topic "": anything may have changed."""
        for listener in self.listeners:
            listener(id, topic)

    def changed(self, id):
        """Note that answers given before now may be outdated."""
        self.versions[id] += 1

    def awake(self, id):
        """Raises StorageFault while the object's migrations run in the background."""
        one = super().awake(id)
        # Look it up last, so that an object built after migrate_apart finds the entry.
        until, why = self.blocked.get(id, (0.0, ""))
        if time.monotonic() < until:
            raise StorageFault(self.path(id), why)
        return one

    def migrate_apart(self, id, why):
        """Open a file in the background, after those before it, however long it takes.

        Until then the object answers 503, and if it fails, for LATE_SECONDS more.
        """
        with self.lock:
            self.blocked[id] = float("inf"), why
            self.to_migrate.append(id)
            if len(self.to_migrate) == 1 and not in_new_thread(self.migrate_queued):
                self.to_migrate.clear()
                self.blocked[id] = time.monotonic() + self.LATE_SECONDS, why

    def migrate_queued(self):
        left = True
        while left:
            guarded(self.migrate_one, self.to_migrate[0])
            with self.lock:
                self.to_migrate.popleft()
                left = bool(self.to_migrate)

    def migrate_one(self, id):
        one = self.build(id, self)
        try:
            one.open()                                   # without a limit: see too_long
            one.store.close()
            del self.blocked[id]
        except CRASH as error:
            self.blocked[id] = time.monotonic() + self.LATE_SECONDS, str(error)
            if isinstance(error, (sqlite3.Error, MigrationError)):
                raise one.fault(error) from error
            raise

    def touch(self, id):
        """Note that a kept page was sent, because that is a use of its object, too."""
        one = self.objects.get(id)
        if one:
            one.used = time.monotonic()

    def sleep_excess(self):
        """Put the least recently used objects to sleep, except for those that are busy."""
        if len(self.objects) > self.most:
            by_use = sorted(self.everybody(), key=lambda one: one.used)
            for one in by_use[:-self.most]:
                one.sleep(time.monotonic())

    def sleep_unused(self, idle=None):
        """Put unused objects to sleep, and at once those whose file is not at its path."""
        for one in self.everybody():
            if one.detached:
                one.sleep(time.monotonic())
        super().sleep_unused(idle)

    @contextlib.contextmanager
    def draft(self):
        """Make a file under a temporary id, for an object whose id is not known yet. Use it
        as `with namespace.draft() as id:`. It removes the file at the end, unless
        name_draft has renamed it. See create_workspace_with_file (26)."""
        id = f"new-{secrets.token_hex(8)}"
        try:
            self.create(id)
            yield id
        except BaseException as error:
            if StorageFault.is_behind(error):
                raise self.fault(id, error) from error
            raise
        finally:
            with contextlib.suppress(FileNotFoundError):
                self.path(id).unlink()

    def tidy(self):
        """Remove the drafts that a crash left behind. Call this only at the start."""
        for file in self.folder.glob("new-*.db*"):
            file.unlink()

    def name_draft(self, draft, id):
        """Give the file its real id.

        Raises Refused(422) if this id has a file already, of a workspace that the Directory
        does not know. A failed command can leave a file without rows: that is replaced.
        """
        place = self.path(id)
        if place.exists() and not has_no_rows(place):
            raise Refused(*TAKEN)
        self.path(draft).rename(place)
        sync_folder(self.folder)


TAKEN = (422, "There is a file of such a workspace already. Choose another name; an "
              "operator may move and import it.")


def has_no_rows(path):
    """True if nobody wrote to this workspace's file; False if it can't be read."""
    with contextlib.suppress(sqlite3.Error), Store(path) as store:
        return store.one("SELECT 1 FROM journal") is None
    return False


def in_new_thread(function):
    """Start a thread. If the system grants none, log that and return False."""
    try:
        threading.Thread(target=function, daemon=True).start()
    except RuntimeError as error:
        log(f"{error}: raise the limit of this user's processes (ulimit -u)")
        return False
    return True


def sync_folder(folder):
    """Make the file names in a folder durable, where a folder can be opened (POSIX)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:                  # unsupported: see fsync(2)
            raise
    finally:
        os.close(handle)


# ==== 17. Commits =========================================================================
# The idea: making a commit durable takes longer than most commands do. So commands that
#   wait for the same object run one after the other in one transaction, each in its own
#   savepoint, and one commit makes all of them durable.
# It promises: no command is answered before its commit is on the disk. Each can fail alone.
#   If the commit fails, every command in it gets that error.
# Who uses it: the loop edge (section 25), for the requests in the lane of an object.

def outcome(call, *args):
    """Return what the call returns, or the exception that it raises."""
    try:
        return call(*args)
    except Undone:                                       # the caller asks again
        raise
    except CRASH as error:
        return error


class GroupCommit(GuardedObject):
    BATCH_SECONDS = 0.05                                 # then the rest is another batch

    def command(self, request):
        before = self.store.db.total_changes
        try:
            return super().command(request)
        finally:                                         # while we still have the turn
            if self.store.db.total_changes != before:
                self.namespace.changed(self.id)

    def answer_all(self, requests):
        """Answer requests that came together. The caller holds the turn.

        Return an outcome for each: a Response, or the exception that it raised. If there is
        no time for all, return fewer outcomes, but at least one: ask again for the rest.
        """
        if len(requests) == 1:
            return [outcome(self.answer, requests[0])]
        outcomes = []
        try:
            self.used = self.began = time.monotonic()
            if self.store is None:
                self.open()
            with self.store.tx():
                self.answer_each(requests, outcomes)
            return outcomes
        except Undone:
            raise
        except CRASH as error:                           # nothing is on the disk
            if not outcomes:                             # the transaction never began
                self.check_file(error)
                raise
            self.forget_renderings()
            fault = error if isinstance(error, StorageFault) else self.fault(error)
            # A command that failed by itself keeps its own error.
            return [one if failed(one) else fault for one in outcomes]

    def answer_each(self, requests, outcomes):
        """Raises the error with which SQLite rolled back the whole transaction."""
        until = time.monotonic() + self.BATCH_SECONDS
        for request in requests:
            outcomes.append(outcome(self.answer, request))
            if not self.store.db.in_transaction:
                last = outcomes[-1]
                lost = sqlite3.OperationalError("a command lost the transaction")
                raise last if isinstance(last, (sqlite3.Error, StorageFault)) else lost
            if time.monotonic() > until:                 # the rest is asked again
                return

    def forget_renderings(self):
        """Drop what shows rolled-back rows. (Only a Broadcast has renderings.)"""


def failed(one):
    return isinstance(one, BaseException) or one.status >= 400


# ==== 18. Pieces ==========================================================================
# The idea: a rendering is kept as the very bytes that all its watchers get, plain and
#   compressed. A piece that is compressed by itself can follow anything, so one serves all
#   streams. But most of it repeats the frame before, and gzip may refer to that frame,
#   because every reader of a stream remembers its last 32 kB. So a piece is also compressed
#   as a delta, once for all streams that sent the same frames last. (20 todos: 6,581 bytes;
#   compressed by itself 646; as a delta 136.)
# It promises: a stream needs no compressor of its own. It only remembers the frames that it
#   sent last, and shares them with all streams that show the same. An etag is computed from
#   the content of a piece, so it means the same after a restart and in another process.
# Who uses it: the broker (section 24).

GZIP_HEAD = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"              # RFC 1952, 2.3
CURRENT = b"event: datastar-current\ndata: version unchanged\n\n"
LOOKS_BACK = 2 ** 15                                     # bytes: RFC 1951, 2


def deflated(data, before=b""):
    """Compress data so that it can follow anything in a gzip stream that ends in before.

    The result ends at a whole byte and refers to nothing but before (RFC 1951, 3.2.4).
    """
    squeeze = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS, zdict=before)
    return squeeze.compress(data) + squeeze.flush(zlib.Z_FULL_FLUSH)


def fingerprint(data):
    return hashlib.blake2b(data, digest_size=9).hexdigest()


@dataclasses.dataclass
class Piece(Rendering):
    """A rendering as bytes: its frame, and that frame as HTTP chunks, plain and zipped.
    Each is made when a stream first needs it.

    A browser that comes back says by its etag which region it saw last. main: False if the
    piece shows no region of its own, like a heartbeat.
    """
    made: float = 0.0                                    # when (time.perf_counter())
    micros: int = 0                                      # how long it took
    main: bool = True

    @functools.cached_property
    def etag(self):
        return fingerprint(self.html.encode("utf-8", "replace"))

    @functools.cached_property
    def frame(self):
        id = [f"id: {self.etag}"] if self.main else []
        return event("elements", self.html, *id)

    @functools.cached_property
    def plain(self):
        return chunk(self.frame)

    @functools.cached_property
    def zipped(self):
        return chunk(deflated(self.frame))


def frame_piece(frame):
    """Return a piece of this frame that shows no region."""
    piece = Piece(Html(), main=False)
    piece.frame = frame
    return piece


# Says that a region could not be read again. It holds until the next good frame.
NOT_CURRENT_PIECE = frame_piece(NOT_CURRENT)
BEAT_PIECE = frame_piece(BEAT)
MOST_FRAMES = 16                                         # that a stream remembers


def sent_after(sent_last, piece, regions):
    """Return the frames that a stream has sent last, once it has sent this piece, too.

    sent_last: those before. After a region, keep as many as the page has regions. So
    streams that show the same agree again, whatever else each has sent. (regions is 0 while
    a stream shows its first.) Keep none if gzip can't refer to so long a piece.
    """
    most = regions if piece.main and regions else MOST_FRAMES
    return (*sent_last, piece.frame)[-most:] if len(piece.frame) < LOOKS_BACK else ()


def deltas_of(piece, streams):
    """In the pool: compress a piece as a delta to the frames that most of these streams
    sent last. The other streams get piece.zipped.

    Return {frames sent last: (the bytes, frames sent last after them)}. If 998 of 1,000
    streams have sent frame 7 last, and two are new, it is {(frame 7,): (delta to frame 8,
    (frame 8,))}, and the two get all of frame 8.
    """
    sent = collections.Counter([stream.sent_last for stream in streams if stream.zipped])
    last = max(sent, key=sent.get, default=())
    if () in sent or len(sent) > 1:
        piece.zipped                                     # made here, and not in the loop
    if not last:
        return {}
    data = chunk(deflated(piece.frame, b"".join(last)))
    return {last: (data, sent_after(last, piece, len(streams[0].channels)))}


# ==== 19. Reader ==========================================================================
# The idea: a request that could be read in two ways is refused and its connection closed,
#   because a proxy in front of us might have read it the other way.
# It promises: each byte of a head is looked at once, however slowly it comes.
# Who uses it: connections (section 25).

LINE_LIMIT = 16_384                                      # bytes of a request line
HEAD_LIMIT = 32_768                                      # bytes of it and all header fields
FIELD_LIMIT = 64                                         # header fields
CHUNK_LINE_LIMIT = 256                                   # bytes
TRAILER_LIMIT = 1_024                                    # bytes
NAME_LIMIT = 270                                         # a name, by RFC 1035, and a port

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"                 # RFC 9110, 5.6.2
VALUE = rb"[^\x00-\x08\x0a-\x1f\x7f]*"                   # RFC 9110, 5.5
FIELD = re.compile(rb"(" + TOKEN + rb"):(" + VALUE + rb")\r\n")
HEAD = re.compile(rb"(" + TOKEN + rb") ([!-~]+) HTTP/1\.([01])\r\n"
                  rb"((?:" + TOKEN + rb":" + VALUE + rb"\r\n)*)\r\n")
REQUEST_LINE = re.compile(TOKEN + rb" [!-~]+ HTTP/([0-9])\.[0-9]\r\n")
NEVER = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n")     # never allowed
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:[ \t]*;[\t !-~]*)?")
HOST = re.compile(r"(?:[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*\.?|\[[0-9A-Fa-f:.]+\])"
                  r"(?::([0-9]{1,5}))?")                 # RFC 3986, 3.2.2
ABSOLUTE = re.compile(r"(?i:https?)://([^/?]+)/?((?s:.*))")     # RFC 9112, 3.2.2

ONCE = {"host", "content-length", "content-type", "transfer-encoding", "origin",
        "sec-fetch-site", "expect"}                      # header fields that may not repeat
TOO_LONG = (414, "The address is too long. Send what is long in the body.")


class Reading(NamedTuple):
    """A request as it was framed.

    Its target is parsed later, because a bad target does not break the frame.
    """
    method: str
    target: str
    headers: Dict[str, str]
    keep: bool                                           # the connection stays open
    modern: bool                                         # HTTP/1.1
    length: Optional[int]                                # of the body; None: in chunks
    body: Optional[bytes] = b""                          # None: to be let in first
    spool: Any = None                                    # [3] see Request.spool


def refuse_long(reading):
    """Raise Refused(413) for a long body, because nothing here takes one."""
    if reading.length is not None:
        raise too_large(BODY_LIMIT)


def read_requests(buffer, spool_for=refuse_long):
    """A generator over a growing buffer: yields a Reading, or None to get more bytes.

    A request is yielded twice, first without its body, to be let in, and then whole, if the
    client waits for a 100, or if the body may be long and spool_for(reading) returned a
    place for it. Raises Refused if the framing is broken. Then nothing after it may be
    read.
    """
    while True:
        while buffer == b"\r":                           # maybe half of an empty line
            yield None
        if buffer.startswith(b"\r\n"):                   # one is tolerated (RFC 9112, 2.2)
            del buffer[:2]
        head = yield from read_head(buffer)
        reading = parse_again(head)
        if reading.length == 0:
            yield reading
            continue
        short = reading.length is not None and reading.length <= BODY_LIMIT
        spool = None if short else spool_for(reading)
        if spool or "expect" in reading.headers and reading.modern:
            yield reading._replace(body=None, spool=spool)
        body = bytearray()
        into = body if spool is None else spool
        if reading.length is None:
            yield from read_chunks(buffer, into, spool.limit if spool else BODY_LIMIT)
        else:
            yield from move(buffer, into, reading.length)
        yield reading._replace(body=bytes(body), spool=spool)


def read_head(buffer):
    """Return the next head. Refuse at once what can't become one.

    So a client that speaks TLS or SSH gets an error at once instead of waiting.
    """
    seen = 0                                             # bytes that were looked at
    line = None                                          # the request line, once complete
    while (end := buffer.find(b"\r\n\r\n", max(0, seen - 3), HEAD_LIMIT)) < 0:
        sound = NEVER.search(buffer, seen) is None
        if line is None and buffer.find(b"\n", seen) >= 0:
            line = REQUEST_LINE.match(buffer)
            sound = sound and line
        if not sound:
            raise why_not(bytes(buffer))
        if line is None and len(buffer) > LINE_LIMIT:
            raise Refused(*TOO_LONG)
        if len(buffer) >= HEAD_LIMIT:
            raise Refused(431, "The header is too long. Send fewer or shorter fields.")
        seen = len(buffer)
        yield None
    return (yield from take(buffer, end + 4))


def parse_head(head):
    """Return the Reading of a whole head, without a body."""
    found = HEAD.fullmatch(head)
    if found is None:
        raise why_not(head)
    method, target, minor, block = found.groups()
    if len(method) + len(target) > LINE_LIMIT:
        raise Refused(*TOO_LONG)
    pairs = [(name.decode(), value.strip(b" \t").decode("latin-1"))
             for name, value in FIELD.findall(block)]
    if len(pairs) > FIELD_LIMIT:
        raise Refused(431, f"Send at most {FIELD_LIMIT} header fields.")
    headers = joined(pairs)
    modern = minor == b"1"
    check_host(headers, modern)
    return Reading(method.decode(), target.decode(), headers, stays_open(headers, modern),
                   modern, body_length(headers))


def joined(pairs):
    """Return header fields, given as pairs, as a dict. Join the values of a repeated field
    to a list (RFC 9110, 5.3).

    A proxy that speaks HTTP/2 may send each cookie in a field of its own (RFC 9113, 8.2.3).
    Raises Refused(400) if a field of ONCE is repeated, because either value could count.
    """
    headers = {}
    for name, value in pairs:
        name = name.lower()
        if name in headers:
            if name in ONCE:
                raise Refused(400, f"Send the header field {name} once.")
            comma = "; " if name == "cookie" else ", "
            value = f"{headers[name]}{comma}{value}"
        headers[name] = value
    return headers


def stays_open(headers, modern):
    """Should the connection stay open? modern: HTTP/1.1 (RFC 9112, 9.3)"""
    said = [word.strip() for word in headers.get("connection", "").lower().split(",")]
    return "close" not in said and (modern or "keep-alive" in said)


def remembered(function):
    """Return the function with a cache of its last results, which nobody may change.

    Long arguments are not cached: they come from outside, so anybody could fill the memory.
    """
    again = functools.lru_cache(maxsize=1024)(function)

    @functools.wraps(function)
    def remembering(*args):
        known = again if sum(map(len, args)) <= 1024 else function
        return known(*args)
    return remembering


# A browser sends mostly the same head again and again.
parse_again = remembered(parse_head)


def check_host(headers, modern):
    """Raise Refused(400) for a missing or malformed Host, and for mixed versions."""
    if modern and "host" not in headers:
        raise Refused(400, "Send a Host header field.")
    if not modern and "transfer-encoding" in headers:
        raise Refused(400, "In HTTP/1.0 there is no Transfer-Encoding.")
    host = headers.get("host", "-")
    found = HOST.fullmatch(host)
    if not found or len(host) > NAME_LIMIT or int(found[1] or 0) > 65_535:
        raise Refused(400, "The Host header is not a name or address with an optional "
                           "port.")


def why_not(head):
    """Return a Refused that says what is wrong with the beginning of a head."""
    line = REQUEST_LINE.match(head)
    if not line:
        return Refused(400, "The request line is malformed: METHOD /path HTTP/1.1.")
    if line[1] != b"1":
        return Refused(505, "Speak HTTP/1.1.")
    return Refused(400, "The header fields are malformed.")


def body_length(headers):
    """Return the length of the body in bytes, or None for chunks (RFC 9112, 6)."""
    if headers.get("expect", "100-continue").lower() != "100-continue":
        raise Refused(417, "The only expectation known here is 100-continue.")
    if "transfer-encoding" in headers:
        if "content-length" in headers or headers["transfer-encoding"].lower() != "chunked":
            raise Refused(400, "Send either Content-Length or Transfer-Encoding: chunked.")
        return None
    return content_length(headers)


def take(buffer, length):
    """Return the next length bytes."""
    while len(buffer) < length:
        yield None
    data = bytes(buffer[:length])
    del buffer[:length]
    return data


def move(buffer, into, length):
    """Pass the next length bytes to into.extend(), as they come."""
    while length > 0:
        while not buffer:
            yield None
        data = bytes(buffer[:length])
        del buffer[:len(data)]
        into.extend(data)
        length -= len(data)


def take_line(buffer, limit):
    """Return the next line without its CR LF."""
    while (end := buffer.find(b"\r\n", 0, limit)) < 0:
        if len(buffer) >= limit:
            raise Refused(400, "A line of the chunked body is too long.")
        yield None
    line = yield from take(buffer, end + 2)
    return line[:-2]


def read_chunks(buffer, into, limit):
    """Pass the decoded body to into.extend() (RFC 9112, 7.1), without its extensions and
    trailers."""
    framing = 0                                          # bytes around the chunks so far
    read = 0
    while True:
        line = yield from take_line(buffer, CHUNK_LINE_LIMIT)
        framing += len(line) + 4
        size = CHUNK_SIZE.fullmatch(line)
        if not size or framing > limit // 16:
            raise Refused(400, "A chunk begins with its size in hexadecimal digits; send "
                               "few, and large ones.")
        length = int(size[1], 16)
        read += length
        if read > limit:
            raise too_large(limit)
        if length == 0:
            break
        yield from move(buffer, into, length)
        if (yield from take(buffer, 2)) != b"\r\n":
            raise Refused(400, "A chunk ends with CR LF.")
    yield from skip_trailers(buffer)


def skip_trailers(buffer):
    """Skip the header fields after a chunked body."""
    room = TRAILER_LIMIT
    while (line := (yield from take_line(buffer, room))):
        room -= len(line)
        if not FIELD.fullmatch(line + b"\r\n") or room < 2:
            raise Refused(400, "A trailer is malformed, or there are too many.")


def parse_target(target, host):
    """Return the path, decoded once, and the query, not decoded.

    Raises Refused(400) if the target is no path, or has two meanings. A target in absolute
    form must name the same host as the header.
    """
    if not target.startswith("/"):
        found = ABSOLUTE.fullmatch(target)
        if not found or found[1].lower() != host.lower():
            raise Refused(400, "Ask for a path: GET /path HTTP/1.1.")
        target = f"/{found[2]}"
    path, _, query = target.partition("?")
    return plain_path(path), query


# ==== 20. Answers =========================================================================
# The idea: a Response leaves in one send, head and body together. The frames of a stream
#   are sent after its head, because many streams share the bytes of one frame.
# It promises: the part of a head that stays the same is put together only once.
# Who uses it: connections (section 25).

NONCE = "(nonce)"                                        # stands in a head for the nonce
COMPRESSED = ("text/html", "text/css", "text/javascript")
GZIPPED = ("content-encoding", "gzip")                   # the header of a compressed body


@functools.lru_cache(maxsize=256)
def head_of(status, type, headers, nonce, is_stream):
    """Return the part of a head that stays the same. nonce: NONCE, or "" if it has none."""
    response = Response(status, b"", type, headers, nonce, watch=is_stream)
    fields = [f"{name}: {value}\r\n" for name, value in headers_of(response).items()]
    if is_stream or type.startswith(COMPRESSED):         # even if not compressed
        fields.append("vary: accept-encoding\r\n")
    return f"HTTP/1.1 {status} {REASONS.get(status, '')}\r\n{''.join(fields)}"


GZIP = re.compile(r"\bgzip\b(?!\s*;\s*[qQ]=0(?:\.0*)?\s*(?:,|$))")


def accepts_gzip(request):
    return GZIP.search(request.headers.get("accept-encoding", "")) is not None


def unless_known(request, response, tag):
    """Return the response with this etag, or a 304 if the browser has that already."""
    etag = f'"{tag}"'
    response = response._replace(headers=(("etag", etag), *response.headers))
    known = request.headers.get("if-none-match", "")     # RFC 9110, 13.1.2
    if known.strip() == "*" or etag in re.findall(r'"[^"]*"', known):
        return response._replace(status=304, body=b"")
    return response


def encoded_asset(request, env):
    """A door for an asset. Each encoding has its own etag (RFC 9110, 8.8.3.3)."""
    response = own_asset(request, env)
    coding = coding_of(request, response.type)
    return unless_known(request, response, f"{fingerprint(response.body)}{coding}")


def coding_of(request, type):
    return "-gzip" if type.startswith(COMPRESSED) and accepts_gzip(request) else ""


def encode(request, reading, response, keep, date):
    """Return the bytes of an answer. Here only a stream is compressed; see compressed.

    keep: True if the connection stays open.
    """
    is_stream = bool(response.watch)
    zipped = is_stream and accepts_gzip(request)
    body = response.body
    if is_stream:
        body = beginning(request, response.watch, zipped)
    size = len(body) + (response.rest.size if response.rest else 0)
    head = head_of(response.status, response.type, response.headers,
                   response.nonce and NONCE, is_stream)
    if response.nonce:
        head = head.replace(NONCE, response.nonce, 1)
    more = [f"date: {date}\r\n"]
    if not is_stream and response.status not in (204, 304):
        more.append(f"content-length: {size}\r\n")
    if zipped:
        more.append("content-encoding: gzip\r\n")
    if not keep:
        more.append("connection: close\r\n")
    elif not reading.modern:                             # HTTP/1.0 closes unless told
        more.append("connection: keep-alive\r\n")
    head = f"{head}{''.join(more)}\r\n".encode("latin-1")
    return head if reading.method == "HEAD" else head + body


def is_worth_compressing(response):
    """True if compressing the body saves enough."""
    return (len(response.body) > 1000 and response.type.startswith(COMPRESSED)
            and "content-encoding" not in dict(response.headers))


def gzip_end(data):
    """Return the last bytes of a gzip file with this data (RFC 1952, 2.3.1)."""
    return zlib.crc32(data).to_bytes(4, "little") + len(data).to_bytes(4, "little")


def compressed(request, response):
    """Return the response, compressed if the browser takes that and it is worth it."""
    if not is_worth_compressing(response) or not accepts_gzip(request):
        return response
    headers = *response.headers, GZIPPED
    return response._replace(body=gzipped(response.body), headers=headers)


def gzipped(data):
    squeeze = zlib.compressobj(1, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    return squeeze.compress(data) + squeeze.flush()


def beginning(request, watch, zipped):
    """Return what a stream sends before its first frame: CURRENT, if no frame follows."""
    said = b"" if not_shown(request, watch) else CURRENT
    if zipped:
        said = GZIP_HEAD + deflated(said)
    return chunk(said) if said else b""


def not_shown(request, watch):
    """Return the regions to send first: all but the one that this browser received last.

    A browser that comes back names that one by its etag. It says nothing of the others.
    """
    last = request.headers.get("last-event-id")
    return [one for one in watch if one.piece.etag != last]


def first_frames(request, watch):
    """Return the frames of these regions. A piece makes them once, for all streams."""
    zipped = accepts_gzip(request)
    pieces = [one.piece for one in not_shown(request, watch)]
    return b"".join([piece.zipped if zipped else piece.plain for piece in pieces])


# ==== 21. Kept ============================================================================
# The idea: a page may be sent again until somebody writes to the Directory or to its
#   object. Each has a version, a number that changes then. The Directory's also changes
#   when another process writes (PRAGMA data_version, read through a connection of our own).
#   A workspace's is counted by its namespace, which sees only our own commits.
# It promises: a page shows every commit of ours that was answered before the page was asked
#   for. Both versions are read before a page is made, so if one changes meanwhile, the kept
#   page never matches. A write of another process to a workspace's file, or a session that
#   ends by the clock, is noticed after a minute at the latest.
# Who uses it: the loop edge, for pages that the worker forwarded.

STORED = b"\0\x20\0\xdf\xff"                             # 32 bytes follow (RFC 1951, 3.2.4)
NO_MORE = b"\3\0"                                        # an empty last block


class KeptPage:
    """A page that can be sent again, each time with a new nonce.

    In gzip the nonce is stored as it is, between two parts that were compressed once.
    Compressing the whole page again would take three times as long as everything else.
    """

    def __init__(self, response, zipped):
        """zipped: it is sent compressed."""
        self.response = response._replace(body=b"")      # it is kept in two parts
        self.before, self.after = response.body.split(response.nonce.encode(), 1)
        self.zipped = zipped
        self.first, self.last = self.before, self.after  # as they are sent
        if zipped:
            headers = *response.headers, GZIPPED
            self.response = self.response._replace(headers=headers)
            self.first = GZIP_HEAD + deflated(self.before) + STORED
            self.last = deflated(self.after) + NO_MORE

    def renewed(self):
        nonce = os.urandom(16).hex()
        fresh = nonce.encode()
        body = self.first + fresh + self.last
        if self.zipped:
            body += gzip_end(self.before + fresh + self.after)
        return self.response._replace(body=body, nonce=nonce)


class KeptAnswer(NamedTuple):
    """What is known of a page.

    page: None after the first request, which is only noted, because most pages are asked
    for once.
    """
    as_of: Tuple[Any, int]                               # both versions, before it was made
    stub: GuardedStub
    until: float                                         # by time.monotonic()
    page: Optional[KeptPage]
    size: int                                            # in bytes


class Watched:
    """A read-only connection to a file that notices each commit. [3] reads members through
    one, too."""

    def __init__(self, path, seconds):
        """seconds: the longest wait for a lock."""
        self.path = path
        self.seconds = seconds
        self.db = None                                   # or a connection of sqlite3
        self.file = None                                 # see version()

    def version(self, file):
        """Return (file, data_version), which changes with each commit to the file.

        file: any value that changes when another file may be at the path. If it has
        changed, connect again.
        """
        if self.db is None or self.file != file:
            self.close()
            self.db = connected_to_read(self.path, timeout=self.seconds,
                                        isolation_level=None, check_same_thread=False)
            self.file = file
        return file, self.db.execute("PRAGMA data_version").fetchone()[0]

    def close(self):
        if self.db:
            self.db.close()
        self.db = None


class Kept(Watched):
    """Answers, by what was asked. An answer is kept when it is asked for a second time and
    nothing was written in between."""
    MOST = 32 * 2 ** 20                                  # bytes of all pages
    LARGE = 2 ** 18                                      # bytes of one page
    LONG = 4096                                          # of path, query and cookie
    SECONDS = 60.0                                       # because sessions end by the clock

    def __init__(self, directory):
        super().__init__(directory.namespace.path(directory.id), 0)
        self.directory = directory
        self.seen = None                                 # the version in this round
        self.answers = {}                                # KeptAnswers, by Asked.key
        self.size = 0                                    # bytes of all pages, roughly

    def directory_version(self):
        """Return a value that changes with each commit to the Directory; None: unknown.

        Only the loop may call it. It asks the file, which also counts others' commits, once
        in a round, when all sockets have been read. It connects again if our own count has
        changed, by a commit of ours or because our object closed the file.
        """
        ours = self.directory.namespace.versions[self.directory.id]
        if self.seen is None or self.file != ours:
            try:
                self.seen = self.version(ours)
            except sqlite3.Error:
                self.seen = None
        return self.seen

    def find(self, asked):
        """Return a KeptPage that is still current, or None."""
        known = self.answers.get(asked.key)
        if known is None or known.page is None or known.until < time.monotonic():
            return None
        namespace = known.stub.namespace
        if known.as_of != (asked.directory_version, namespace.versions[known.stub.id]):
            return None
        namespace.touch(known.stub.id)
        namespace.served[known.stub.id] += 1
        return known.page

    def may_keep(self, asked, response):
        """True for a page, unless it sets a cookie, or says itself how long it is good for.
        What is made for nobody isn't kept, either: visitors can have the same cookies."""
        whose = asked.forwarded.headers.get("x-account")
        own = {"set-cookie", "cache-control"} & dict(response.headers).keys()
        return (response.nonce and response.status == 200 and whose
                and asked.directory_version and not own
                and response.body.count(response.nonce.encode()) == 1
                and len(response.body) <= self.LARGE)

    def keep(self, asked, response):
        """Keep a page. asked has both versions as they were before it was made."""
        if not self.may_keep(asked, response):
            return
        key = asked.key
        size = 500 + sum([len(part or "") for part in key])
        if size > self.LONG:
            return
        if self.size > self.MOST:
            self.answers.clear()
            self.size = 0
        as_of = asked.directory_version, asked.object_version
        known = self.answers.pop(key, None)
        self.size -= known.size if known else 0
        page = None                                      # the first time
        if known and known.as_of == as_of:
            zipped = accepts_gzip(asked.request) and is_worth_compressing(response)
            page = KeptPage(response, zipped)
            size += 2 * len(response.body)               # at most
        until = time.monotonic() + self.SECONDS
        self.size += size
        self.answers[key] = KeptAnswer(as_of, asked.stub, until, page, size)


# ==== 22. Threads =========================================================================
# The idea: one loop holds all sockets, and a few threads do the work. Requests for the same
#   object wait in a lane. One thread at a time works on a lane, and takes all that has come
#   to it. Each lane is charged to a payer: the account for which the work is done or, while
#   we know none, an address.
# It promises: a lane keeps its order, and other lanes get the thread in between. One payer
#   has at most half of the threads, and an eighth while there are other payers, however
#   many lanes it fills: its lanes wait for each other, and other payers find threads free.
#   A job that fails is logged; its thread goes on.
# Who uses it: the loop edge and the broker.

class Threads:
    """A fixed number of threads that take jobs from one queue.

    The thread that became idle last is woken first, because its memory is still in the
    core's cache. This is where a job is put, and which thread is woken for it:

        put, in one of these threads    its own queue, which comes next; wakes none
        put, in the loop (see defer)    the shared queue; wakes none, until rouse
        share, and put elsewhere        the shared queue; wakes an idle thread
    """

    def __init__(self, size):
        self.queue = collections.deque()                 # of jobs: (function, args)
        self.idle = []                                   # locks; a thread sleeps on each
        self.local = threading.local()                   # each thread's queue and payer
        self.threads = [threading.Thread(target=self.work, daemon=True)
                        for _ in range(size)]
        for thread in self.threads:
            thread.start()

    def put(self, job, *args):
        """Have a thread do the job.

        A thread of the pool itself does the jobs that it puts, right after its current one.
        So no other thread is woken to render what a command changed.
        """
        own = getattr(self.local, "queue", None)
        if own is None:
            self.share(job, *args)
        else:
            own.append((job, args))

    def share(self, job, *args):
        """Put a job at the end of the shared queue. share(None) ends a thread."""
        self.queue.append((job, args))
        self.wake()

    def wake(self):
        try:
            self.idle.pop().release()
        except IndexError:                               # all are busy; each looks again
            return

    def defer(self):
        """For the loop's thread: from now on its put wakes nobody; rouse does.

        While the loop works, a woken thread would only compete with it for the interpreter.
        (Commands to 1,000 workspaces: 1.2 x.)
        """
        self.local.queue = self.queue                    # so put adds to it

    def rouse(self):
        for _ in range(min(len(self.queue), len(self.idle))):
            self.wake()

    def work(self):
        self.local.queue = collections.deque()
        self.local.payer = ""
        wakeup = threading.Lock()                        # releasing it wakes this thread
        wakeup.acquire()
        while True:
            job, args = self.next(wakeup)
            if job is None:
                return
            guarded(job, *args)
            while self.local.queue:
                self.follow_up()

    def next(self, wakeup):
        """Return the next job, or wait for one."""
        while True:
            try:
                return self.queue.popleft()
            except IndexError:
                self.idle.append(wakeup)
            if self.queue:                               # a job came just before that
                self.wake()
            wakeup.acquire()

    def follow_up(self):
        """Do the jobs that this thread has put until now."""
        jobs = [*self.local.queue]
        self.local.queue.clear()                         # a job may call this, too
        for job, args in jobs:
            guarded(job, *args)

    @property
    def busy(self):
        """The number of threads that have a job."""
        return len(self.threads) - len(self.idle)

    def close(self, patience):
        """patience: seconds for all threads together. A job that takes longer is left."""
        for _ in self.threads:
            self.share(None)
        until = time.monotonic() + patience
        for thread in self.threads:
            thread.join(max(0.0, until - time.monotonic()))


def guarded(call, *args):
    """Call it and log what it raises, so that no error ends the loop or a thread."""
    try:
        call(*args)
    except Refused:                                      # a refusal; faults are logged
        return
    except CRASH as error:
        log_error(getattr(call, "__qualname__", str(call)), error)


# -- lanes and payers

class Lane:
    """Items that wait for the same job, in their order, each with its payer.

    A lane that has items is in one of two states:

        active    A thread works on it, or will. payer is charged for it; "": nobody is.
        parked    Each payer of its items has as many active lanes as it may. So the lane
                  waits under each of them (Pool.parked), and the first that may have
                  another active lane takes it. payer is None.

    A lane without items is removed. A lane goes through Pool.gather, charge (which may park
    it), drive, put_back, and release (which activates parked lanes of its payer).
    """

    def __init__(self, name, job):
        self.name = name
        self.job = job
        self.items = collections.deque()                 # as (an Asked, "carol")
        self.payer = None


class Pool(Threads):
    """Threads that work on lanes, each lane for a payer.

    A payer that is alone may have more active lanes, because a slow disk makes several
    files durable in the time of one. Of 16 threads carol alone has 8; when dave comes, each
    has 2. While one payer sends commands to 18 workspaces on 360 connections, a command of
    another payer (1.6 ms alone) takes 5 ms if each payer has an eighth of the threads, 5 to
    11 with a quarter, and 20 to 50 with all.
    """
    BATCH_ITEMS = 64                                     # items of a lane at a time
    ALONE_SECONDS = 1.0                                  # until a payer counts as alone

    def __init__(self, size):
        self.most = max(1, size // 2)                    # active lanes of one payer
        self.fair = max(1, size // 8)                    # the same, while there are others
        self.lock = threading.Lock()                     # guards the next four
        self.others_seen = float("-inf")                 # when there last were others
        self.lanes = {}                                  # by name: those that have items
        self.taken = collections.Counter()               # active lanes, by payer
        self.parked = collections.defaultdict(collections.OrderedDict)   # lanes, by payer
        super().__init__(size)

    @property
    def payer(self):
        """The payer of this thread's current job."""
        return getattr(self.local, "payer", "")

    def gather(self, name, item, job, payer=""):
        """Put an item into the lane of this name, and have a thread call job(items).

        items: what waits in the lane by then. job returns the items that it left undone, or
        None; they stay in front. If a job of the pool calls this, nobody is charged for the
        lane, because that job's payer is charged already.
        """
        in_a_job = hasattr(self.local, "payer")
        with self.lock:
            lane = self.lanes.get(name)
            if lane is None:
                lane = self.lanes[name] = Lane(name, job)
            lane.items.append((item, payer))
            begins = lane.payer is None and self.charge(lane, "" if in_a_job else payer)
        if begins:
            self.put(self.drive, lane)

    def charge(self, lane, payer):
        """Charge the lane to this payer, or park it. Return whether it is active now. The
        caller holds the lock."""
        if payer and self.taken[payer] >= self.limit(payer):
            self.parked[payer][lane] = None
            return False
        self.taken[payer] += 1
        lane.payer = payer
        return True

    def limit(self, payer):
        """Return how many active lanes this payer may have now."""
        now = time.monotonic()
        others = len(self.taken) - (payer in self.taken) - ("" in self.taken)
        if others > 0:
            self.others_seen = now
        return self.fair if now < self.others_seen + self.ALONE_SECONDS else self.most

    def drive(self, lane):
        """Run the job on the next items, and then what it put in this thread's queue."""
        payer = lane.payer
        before = self.local.payer
        self.local.payer = payer or before
        some = min(len(lane.items), self.BATCH_ITEMS)
        rows = [lane.items.popleft() for _ in range(some)]
        left = []
        try:
            undone = lane.job([item for item, _ in rows])
            if undone:
                ids = {id(item) for item in undone}
                left = [row for row in rows if id(row[0]) in ids]
        finally:
            self.put_back(lane, left)
            self.follow_up()
            self.release(payer)
            self.local.payer = before

    def put_back(self, lane, left):
        """Queue the rest of the lane behind the other lanes.

        left: items with their payers, to be done first. The next items are charged
        together, to the first of their payers that may have another active lane.
        """
        with self.lock:
            lane.items.extendleft(reversed(left))
            lane.payer = None
            if not lane.items:
                del self.lanes[lane.name]
                return
            some = itertools.islice(lane.items, self.BATCH_ITEMS)
            payers = dict.fromkeys([payer for _, payer in some])
            begins = any(self.charge(lane, payer) for payer in payers)
        if begins:
            self.share(self.drive, lane)

    def release(self, payer):
        """End the charge for one lane. Activate this payer's parked lanes, as far as its
        limit allows."""
        begun = []
        with self.lock:
            self.taken[payer] -= 1
            parked = self.parked.get(payer)
            while parked and self.taken[payer] < self.limit(payer):
                lane, _ = parked.popitem(last=False)
                if lane.payer is None and lane.items:    # else another payer has taken it
                    self.charge(lane, payer)
                    begun.append((self.drive, (lane,)))
            if not parked:
                self.parked.pop(payer, None)
            if not self.taken[payer]:
                del self.taken[payer]
        self.queue.extend(begun)
        for _ in begun[1:]:                              # this thread takes one
            self.wake()


# ==== 23. Sockets =========================================================================
# The idea: a waiting socket costs an entry in the loop's selector, and no thread.
# It promises: a slow reader delays nobody. It gets the latest frame when it can take one,
#   not those that it missed. It is cut off if it takes nothing for 30 seconds, or if too
#   much waits for slow readers and it has waited longest.
# Who uses it: the loop edge. Its loop runs all methods but Connection.reply. That may run
#   in the pool, because in a Connection that is ANSWERING the loop only notes what comes.

READABLE, WRITABLE = selectors.EVENT_READ, selectors.EVENT_WRITE


class Held:
    """A socket that the loop holds. unsent: bytes that the kernel has not taken yet.

    whose: an account or, without one, an address. It does not change while bytes wait.
    """
    STUCK_SECONDS = 30.0
    whose = ""

    def __init__(self, edge, link):
        self.edge = edge
        self.socket = link
        self.events = 0                                  # what the selector watches for
        self.unsent = b""                                # or a memoryview
        self.deadline = 0.0                              # by time.monotonic()
        self.listen(READABLE)
        edge.held.add(self)                              # last: threads iterate over it

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
        self.close_on_error(self.go_on_with, events)     # else it is called again forever

    def close_on_error(self, call, *args):
        """Call it. If it fails, close the socket, because nobody else would answer, and
        raise the error."""
        try:
            call(*args)
        except CRASH:
            self.close()
            raise

    def go_on_with(self, events):
        if events & WRITABLE:
            self.listen(self.events & ~WRITABLE)
            return self.write(self.unsent)
        try:
            data = self.socket.recv(65_536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.read(data)                                  # b"": the other side is gone

    def offer(self, data):
        """Return how many bytes the kernel took; -1: the other side is gone."""
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
        waited = bool(self.unsent)
        self.unsent = b""
        if sent == len(data):
            self.written()
        else:
            self.unsent = memoryview(data)[sent:]        # all slow readers share the bytes
            if sent or not waited:                       # the kernel has taken some
                self.deadline = time.monotonic() + self.STUCK_SECONDS
            self.listen(self.events | WRITABLE)
        if waited or self.unsent:
            self.edge.backlog.note(self)

    def unread(self):
        """Return what waits for this reader. A memoryview keeps all its bytes in memory."""
        return [self.unsent.obj] if self.unsent else []

    def cut_off(self):
        """Close it, because its reader does not read."""
        self.close()

    def close(self):
        if self in self.edge.held:
            self.edge.held.discard(self)
            self.listen(0)
            self.socket.close()
            self.unsent = b""
            self.edge.backlog.note(self)


class Stream(Held):
    """An open live answer. At most the rest of a frame waits, and a piece for each slot.

    The slots: a number for each region; "page" for the whole page after a change of role;
    "beat" for a heartbeat; [3] "here" for the others who watch.
    """
    SEND_BUFFER = 131_072                                # bytes, in the kernel
    BEAT_SECONDS = SILENCE_SECONDS - 5                   # after the last frame
    may_be_closed = True                                 # at the end: its browser returns

    def __init__(self, edge, link, request, response, viewer):
        self.again = request._replace(body=b"")
        self.account = response.which                    # see Broadcast.stream
        self.whose = self.account or source_of(request.peer)
        self.viewer = viewer                             # as the last verdict said
        self.zipped = accepts_gzip(request)
        self.channels = ()                               # one for each region
        self.frames = edge.broker.frames                 # how many, in all
        self.latest = {}                                 # pieces to be shown next, by slot
        self.sent_last = ()                              # frames, if it is zipped
        self.silent = 0                                  # for how many seconds
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.SEND_BUFFER)
        if sys.platform == "linux":                      # to notice a peer that vanished
            patience = int(1000 * self.STUCK_SECONDS)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience)
        super().__init__(edge, link)

    def show(self, slot, piece, deltas={}):
        """Send a piece. While bytes are unsent it waits, the latest of each slot."""
        if self.unsent:
            self.frames["coalesced"] += slot in self.latest
            self.latest[slot] = piece
            return self.edge.backlog.note(self)
        self.frames["sent"] += piece is not BEAT_PIECE
        self.silent = 0
        data = self.encoded(piece, deltas)
        if self.edge.broker.failed and piece is not NOT_CURRENT_PIECE:
            data += self.reminder()
        sent = self.offer(data)
        if sent != len(data):                            # else there is nothing left to do
            self.wrote(data, sent)

    def encoded(self, piece, deltas={}):
        """Return the bytes of a piece, to be sent next."""
        if not self.zipped:
            return piece.plain
        data, self.sent_last = deltas.get(self.sent_last) or (
            piece.zipped, sent_after(self.sent_last, piece, len(self.channels)))
        return data

    def reminder(self):
        """Return a frame that says that another region is still outdated; b"" if none is.
        Without it a page would take any good frame as a sign that all of it is current."""
        old = [channel for channel in self.channels if channel in self.edge.broker.failed]
        for channel in old:
            channel.streams[self] = NOT_CURRENT_PIECE.etag
        return self.encoded(NOT_CURRENT_PIECE) if old else b""

    def written(self):
        latest, self.latest = self.latest, {}
        for slot, piece in latest.items():
            self.show(slot, piece)

    def read(self, data):
        """Close when the browser hangs up. Ignore what it sends on a stream."""
        if not data:
            self.close()

    def tick(self, now):
        self.silent += 1
        if self.unsent and now > self.deadline:
            self.cut_off()
        elif not self.unsent and self.silent > self.BEAT_SECONDS:
            self.edge.call(self.show, "beat", BEAT_PIECE)    # thousands may beat at once

    def unread(self):
        return [*super().unread(), *self.latest.values()]

    def cut_off(self):
        self.frames["dropped"] += 1
        self.close()

    def end(self, frame):
        """End it after a refusal: with a last frame and a proper end, if possible."""
        if frame and not self.unsent:
            self.write(self.encoded(frame_piece(frame)) + chunk(b""))
        self.close()

    def close(self):
        self.edge.broker.leave(self)
        super().close()


# -- what waits for slow readers

class Backlog:
    """What waits for slow readers: in all, and for each account or, without one, address.

    A connection has one answer at a time; a stream has the rest of one frame, and the
    latest pieces. So a bound on the size of an answer bounds what waits for one of them.
    """
    ANSWER = 64 * 2 ** 20                # bytes of one; browsers struggle with more
    ACCOUNT = 128 * 2 ** 20              # two of the largest: one account can't use up ALL
    ALL = 256 * 2 ** 20                  # a quarter of a machine with 1 GB

    def __init__(self, edge):
        self.edge = edge
        self.all = Unread(self.ALL)
        self.accounts = {}                               # an Unread for each

    def note(self, reader):
        """Call this whenever what waits for this reader has changed."""
        things = {}
        if reader in self.edge.held:
            things = {id(thing): thing for thing in reader.unread()}
        if not things and reader not in self.all.readers:
            return
        own = self.accounts.setdefault(reader.whose, Unread(self.ACCOUNT))
        for unread in (own, self.all):
            unread.note(reader, things)
            if unread.size > unread.most:                # later: the caller still writes
                self.edge.call(self.relieve, unread)
        if not own.readers:
            del self.accounts[reader.whose]

    def relieve(self, unread):
        """Cut off those that have waited longest, until the rest is within the bound.

        If the bound for all is exceeded, take them from the account for which most waits.
        """
        while unread.size > unread.most:
            whose = unread
            if unread is self.all:
                whose = max(self.accounts.values(), key=lambda one: one.size)
            reader = next(iter(whose.readers))
            reader.cut_off()
            self.note(reader)


class Unread:
    """What waits for some readers. The reader that has waited longest comes first.

    A reader is a Held; bytes and pieces wait for it. What several readers wait for is in
    memory once, so it counts once: a frame of 60 KB for 1,000 streams counts as 60 KB.
    """

    def __init__(self, most):
        self.most = most                                 # bytes
        self.size = 0                                    # of all that waits, in bytes
        self.readers = collections.OrderedDict()         # and what waits for each, by id
        self.sharers = collections.Counter()             # how many wait for it, by its id

    def note(self, reader, things):
        """things: all that waits for this reader now, by id. The reader keeps its place."""
        for id, thing in things.items():
            self.sharers[id] += 1
            if self.sharers[id] == 1:
                self.size += bytes_of(thing)
        for id, thing in self.readers.get(reader, {}).items():
            self.sharers[id] -= 1
            if self.sharers[id] == 0:
                del self.sharers[id]
                self.size -= bytes_of(thing)
        if things:
            self.readers[reader] = things                # kept alive, so ids stay valid
        else:
            self.readers.pop(reader, None)


def bytes_of(thing):
    return len(thing) if isinstance(thing, bytes) else len(thing.html)


# ==== 24. Broker ==========================================================================
# The idea: streams that show the same share a channel. When its topic is published, the
#   broker asks the object once and sends the same bytes to all. In between the object may
#   sleep. So 1,000 members who watch the todos of acme are 1,000 streams and one channel.
# It promises: after a publish each stream gets the latest state, but may miss states before
#   it. When an account's access changes, its streams ask the gate again, at once.
# Who uses it: the loop edge. Objects only tell the broker what was published.

class Subscription(NamedTuple):
    """A region of a stream: which object to ask again, what, and after which topic."""
    stub: GuardedStub
    topic: str
    again: Request                                       # the same for all who see the same
    piece: Optional[Piece]                               # as it is now
    number: int = 0                                      # its place in the page

    @property
    def question(self):
        """What to ask the object. Streams with the same question show the same."""
        again = self.again                               # number is in x-region
        return again.path, again.query, *again.headers.items()


TRUSTED.add("x-region")


def shared_request(ctx, query, region, number):
    """Return the request for one region; it is the same for all who see the same."""
    viewer = ctx.viewer
    headers = {"x-account": viewer.account if region.each == "account" else "",
               "x-role": viewer.role, "x-grants": ",".join(viewer.grants),
               "x-workspace": viewer.workspace, "x-id": viewer.id, "x-region": str(number)}
    return Request("GET", ctx.request.path, query, headers)


class Broadcast(GroupCommit, SliceHost):
    """A SliceHost whose streams a broker holds. It also answers the server's own questions.
    """
    KEPT_RENDERINGS = 4 * 2 ** 20                        # characters

    def handle(self, request):
        if not request.path.startswith("/_"):
            return super().handle(request)
        # From outside, destination (2) refuses all paths that begin with "/_".
        name = f"own{request.path[1:]}"                  # of /_version: own_version
        answer = getattr(self, name, super().handle)(request)
        return answer if type(answer) is Response else as_json(answer)

    def render(self, region, live, ctx, args):
        self.drop_renderings()
        made = time.perf_counter()
        html = super().render(region, live, ctx, args).html
        return Piece(html, made, round(1e6 * (time.perf_counter() - made)))

    def drop_renderings(self):
        """Drop the oldest renderings past a bound: queries can differ without end."""
        kept = self.renderings
        while sum([len(one.html) for one in kept.values()]) > self.KEPT_RENDERINGS:
            del kept[next(iter(kept))]

    def forget_renderings(self):
        self.renderings.clear()

    def stream(self, live, ctx, args):
        """Return a Subscription for each region, instead of a Watch to wait for.

        A broker asks again for one region alone, with the header x-region.
        """
        number = int(ctx.request.headers.get("x-region", 0))
        if "x-region" in ctx.request.headers:
            live = live._replace(regions=live.regions[number:number + 1])
        query = urllib.parse.urlencode(live.heeded(ctx.params))
        stub = self.namespace.get(self.id)
        rows = zip(itertools.count(number), live.regions, self.topics(live, ctx, args),
                   self.renderings_of(live, ctx, args))
        watch = [Subscription(stub, topic, shared_request(ctx, query, region, number),
                              piece, number) for number, region, topic, piece in rows]
        # Here the field "which" holds the account that watches.
        return Response(200, type=EVENTS, watch=tuple(watch), which=ctx.viewer.account)


# -- in the loop

class Channel:
    """All streams that show the same region alike.

    It is quiet; or busy, while its object is asked or the answer is sent; or busy and
    stale, if it was published again meanwhile: then it goes round once more.
    """

    def __init__(self, subscription):
        self.subscription = subscription._replace(piece=None)    # pieces are sent, not kept
        self.payer = ""                                  # who pays for it: section 22
        self.streams = {}                                # with the etag that each one shows
        self.busy = False
        self.stale = False


class Broker:
    """Knows all channels, by object and question. For acme it has, for example:

        {acme's id: {("/todos/live", "show=open", ("x-account", ""), ("x-role", "member"),
                      and four more headers): a Channel}}

    Only the loop changes channels and streams. Other threads mark channels as busy, stale
    or failed.
    """
    SOME = 64                                # streams: see some_at_a_time
    UNREACHABLE_SECONDS = 30.0               # without the Directory; then streams end
    CALM_SECONDS = 30.0                      # after a change of access: see welcome

    def __init__(self, edge):
        self.edge = edge
        self.lock = threading.Lock()                     # guards busy, stale and outdated
        self.channels = {}                               # by id, then by question
        self.frames = {"sent": 0, "coalesced": 0, "dropped": 0}
        self.open_streams = collections.Counter()        # how many, by account
        self.version = 0                                 # of the Directory
        self.unreachable_since = 0.0                     # 0: it can be reached
        self.access_changed_at = {}                      # by account; "": everybody's
        self.failed = set()                              # channels whose region is outdated
        self.outdated = {}                               # by stream: how to show it anew
        self.logged = set()                              # see log_failure

    # -- from a publish to the sockets

    def published(self, id, topic):
        """An object calls this right after a commit. topic "": all topics.

        The payer of the command also pays for the work that follows from it.
        """
        if topic.startswith("access:"):
            self.note_change(topic[7:])
            self.regate(topic[7:])
        for channel in [*self.channels.get(id, {}).values()]:
            heard = channel.subscription.topic           # "": [3] all that is published
            if topic == heard or "" in (topic, heard):
                self.mark(channel)

    def note_change(self, account):
        if len(self.access_changed_at) > 10_000:         # too many to tell them apart
            self.access_changed_at, account = {}, ""
        self.access_changed_at[account] = time.monotonic()

    def changed_since(self, account, then):
        """True if the access of this account has changed since then (time.monotonic())."""
        known = self.access_changed_at
        return known.get(account, then) > then or known.get("", then) > then

    def mark(self, channel):
        with self.lock:
            busy = channel.busy
            channel.busy = True
            channel.stale = True
            channel.payer = self.edge.pool.payer or channel.payer
        if not busy:
            # All regions of an object share one lane, because they need the same turn: two
            # threads would only wait for each other.
            job = functools.partial(while_there_is_time, self.refresh)
            self.edge.pool.gather(channel.subscription.stub.id, channel, job, channel.payer)

    def refresh(self, channel):
        """In the pool: ask the object for the region again. This wakes the object."""
        channel.stale = False
        piece, deltas = NOT_CURRENT_PIECE, {}
        streams = [*channel.streams]                     # later ones mark it again
        subscription = channel.subscription
        try:
            piece = subscription.stub.fetch(subscription.again).watch[0].piece
            deltas = deltas_of(piece, streams)
            self.failed.discard(channel)
        except Refused as no:                            # a StorageFault is logged already
            self.failed.add(channel)
            if no.status in GOODBYES:
                self.edge.call(self.some_at_a_time, streams, Stream.end, last_frame(no))
                streams = []                             # they are sent nothing else
        except CRASH as error:
            self.failed.add(channel)
            self.log_failure(channel, error)
        finally:
            self.edge.call(self.deliver, channel, piece, deltas, streams)

    def log_failure(self, channel, error):
        """Log it, but once a minute: each account can have a channel of its own."""
        subscription = channel.subscription
        key = subscription.stub.id, subscription.topic, type(error)
        if key not in self.logged:
            self.logged.add(key)
            log_error(f"GET {subscription.again.path}", error)

    def some_at_a_time(self, streams, job, *args):
        """Call job(stream, *args) for SOME streams, and for the rest when the loop has
        served everything else."""
        for stream in streams[:self.SOME]:
            job(stream, *args)
        if len(streams) > self.SOME:
            self.edge.call(self.some_at_a_time, streams[self.SOME:], job, *args)

    def retry_failed(self):
        """In the pool, every 5 s: refresh the channels whose object failed.

        Their streams show an outdated region, and perhaps nobody publishes again.
        """
        for channel in [*self.failed]:
            if channel.streams:
                self.mark(channel)
            else:
                self.failed.discard(channel)

    def deliver(self, channel, piece, deltas, streams):
        """Send the piece to SOME streams at a time.

        After the last stream the channel is quiet; or it goes round again, if it is stale.
        """
        for stream in streams[:self.SOME]:
            shown = channel.streams.get(stream)          # None: it has left
            if shown not in (None, piece.etag):
                channel.streams[stream] = piece.etag
                stream.show(channel.subscription.number, piece, deltas)
        if len(streams) > self.SOME:
            return self.edge.call(self.deliver, channel, piece, deltas, streams[self.SOME:])
        with self.lock:
            channel.busy = False
            again = channel.stale and channel.streams
        if again:
            self.mark(channel)

    # -- who watches

    def welcome(self, stream, watch):
        """Let a new stream join. If its access has just changed, its verdict may be older
        than the change, so ask the gate again."""
        self.join(stream, watch)
        if self.changed_since(stream.account, time.monotonic() - self.CALM_SECONDS):
            self.regate(stream)

    def join(self, stream, watch):
        id = watch[0].stub.id
        of_object = self.channels.setdefault(id, {})
        stream.channels = [of_object.setdefault(one.question, Channel(one))
                           for one in watch]
        self.open_streams[stream.account] += 1
        for one, channel in zip(watch, stream.channels):
            channel.streams[stream] = one.piece.etag
            channel.payer = channel.payer or stream.account
            self.mark(channel)                           # it may have been published since
        self.count_watcher(stream, id, 1)

    def leave(self, stream):
        if not stream.channels:
            return
        channels, stream.channels = stream.channels, ()
        id = channels[0].subscription.stub.id
        for channel in channels:
            del channel.streams[stream]
            if not channel.streams:                      # the last stream has left
                del self.channels[id][channel.subscription.question]
                self.failed.discard(channel)
        self.open_streams[stream.account] -= 1
        if not self.channels[id]:
            del self.channels[id]
        self.count_watcher(stream, id, -1)

    def watchers(self, id):
        """Return the streams on this object. Thread-safe."""
        streams = {}
        for channel in [*self.channels.get(id, {}).values()]:
            streams.update(channel.streams)
        return [*streams]

    def count_watcher(self, stream, id, more):
        """For [3]: this stream began (1) or ended (-1) to watch this object."""

    # -- who may still watch

    def regate(self, whose):
        """Ask the gate again about a stream, or about all of an account ("": all streams).

        The questions are asked one after the other, so the latest verdict comes last.
        """
        self.edge.pool.gather("access", whose, self.gate_again)

    def gate_again(self, those):
        """In the pool. those: streams and accounts, as regate takes them."""
        those = {*those}                                 # a set, for thousands of look-ups
        for stream in self.edge.streams:
            if stream in those or stream.account in those or "" in those:
                guarded(self.ask_again, stream)

    @contextlib.contextmanager
    def end_on_error(self, stream):
        """End the stream if the block raises."""
        try:
            yield
        except Refused as no:                            # a Busy has no last frame
            self.edge.call(stream.end, last_frame(no))
        except CRASH:
            self.edge.call(stream.close)
            raise

    def ask_again(self, stream):
        """In the pool: ask the gate again about the request of an open stream.

        The same viewer as before: do nothing, and don't wake the Workspace. Another role,
        or other grants: fetch stream and page again. A refusal: send a last frame.
        """
        with self.end_on_error(stream):
            decided = self.edge.decide_again(stream.again)
            if isinstance(decided, Noted):
                self.compare_viewers(stream, decided)
            # Else the stream belongs to no workspace. [3] The home page has such a stream.
            elif not decided.watch:                      # the answer is no stream now
                self.edge.call(stream.end, b"")
            elif decided.which != stream.account:        # the session has another account
                raise Refused(412, "Somebody else is signed in here now.")

    def compare_viewers(self, stream, noted):
        """If the gate names another viewer now, have the stream shown anew: not in the lane
        of the verdicts, because it may take long. The payer of the command pays for it."""
        viewer = viewer_in(noted.request)
        if viewer == stream.viewer:
            return
        stream.viewer = viewer
        with self.lock:
            waits = stream in self.outdated
            self.outdated[stream] = noted                # the latest counts
        if not waits:
            job = functools.partial(while_there_is_time, self.show_anew)
            payer = self.edge.pool.payer or stream.whose
            self.edge.call(self.edge.pool.gather, ("anew", noted.stub.id), stream, job,
                           payer)

    def show_anew(self, stream):
        """In the pool: fetch the stream again and, as a piece, the page around it."""
        with self.lock:
            stub, request = self.outdated.pop(stream)
        if not stream.channels:                          # it was closed meanwhile
            return
        with self.end_on_error(stream):
            response = stub.fetch(request)
            page = stub.fetch(request._replace(path=request.path[:-len("/live")]))
            html = page.body.decode().replace(f' data-nonce="{page.nonce}"', "")
            self.edge.call(self.rejoin, stream, viewer_in(request), response,
                           Piece(Html(html), main=False))

    def rejoin(self, stream, viewer, response, page):
        if not stream.channels or stream.viewer != viewer:   # a later verdict differs
            return
        self.leave(stream)
        stream.account = response.which
        stream.latest = {}                               # what waits there is older
        stream.show("page", page)
        self.join(stream, response.watch)
        for channel in stream.channels:                  # the page may show another state
            channel.streams[stream] = ""

    def look_elsewhere(self):
        """In the pool, once a second: has another process changed the Directory?"""
        directory = self.edge.env.directory
        before = self.version
        try:
            self.version = directory.ask("/_version")
            self.unreachable_since = 0.0
        except CRASH as no:                              # it may run in another process
            if not self.unreachable_since:
                log(f"the directory: {no}")
                self.unreachable_since = time.monotonic()
            if time.monotonic() > self.unreachable_since + self.UNREACHABLE_SECONDS:
                self.regate("")                          # nobody knows who may still watch
        if before == self.version:
            return
        if before:                                       # else this is the first time
            self.published(directory.id, "access:")      # of every account
            self.published(directory.id, "")
        self.changed_elsewhere()

    def changed_elsewhere(self):
        """[3] looks whether another process changed more than the Directory."""


def while_there_is_time(job, items):
    """In the pool: call job(item) until the time is up. Return the items that are left; the
    thread does other lanes before them."""
    until = time.monotonic() + GroupCommit.BATCH_SECONDS
    for done, item in enumerate(items):
        if time.monotonic() > until:
            return items[done:]
        guarded(job, item)
    return []


VIEWER_HEADERS = ("x-account", "x-role", "x-grants", "x-workspace", "x-id", "x-title",
                  "x-operator", "x-read-only", "x-label")     # the last four: [3]


def viewer_in(forwarded):
    """Return the viewer that the gate let in, as the values of its headers."""
    return tuple([forwarded.headers.get(name, "") for name in VIEWER_HEADERS])


# ==== 25. Loop edge =======================================================================
# The idea: one loop reads and writes all sockets. It sends kept pages at once; the pool
#   answers everything else.
# How a request goes: the worker runs unchanged, in an Env whose last step, forward, is only
#   noted. If the worker refuses, that is the answer. If it lets the request in, the pool
#   fetches the answer, together with those to all others for the same object.
# It promises: each request gets a response. A connection that idles, reads slowly or sends
#   slowly costs a buffer, but no thread. A busy workspace takes one thread for all requests
#   that were let in, because they wait in its lane. (Its regions, its streams to be shown
#   anew and its jobs take one thread each.) All other requests wait for the gate's verdict
#   in a lane of their own address. So the time until a refusal does not reveal whether a
#   workspace is busy, or exists.
# Who uses it: the network.

class Noted(NamedTuple):
    """The last step of a worker that only decides: which object to ask, and what."""
    stub: GuardedStub
    request: Request


@dataclasses.dataclass
class Asked:
    """A request on its way. The fields are in the order in which they become known."""
    connection: Connection
    reading: Reading                                     # its method may be HEAD
    request: Optional[Request] = None                    # None: not made yet
    started: float = 0.0                                 # by time.perf_counter()
    cookie: Optional[str] = None
    directory_version: Any = None                        # see Kept.directory_version
    insider: int = 0                                     # hash of (lane, cookie)
    let_in: bool = False                                 # by the gate: see LoopEdge.line_up
    payer: str = ""                                      # charged for the thread
    stub: Optional[GuardedStub] = None                   # the object that answers
    forwarded: Optional[Request] = None                  # the request as the object sees it
    object_version: int = 0                              # that object's, before it answers

    @property
    def key(self):
        """The key under which a page is kept."""
        request = self.request
        coding = "gzip" if accepts_gzip(request) else ""
        return request.path, request.query, self.cookie, request.scheme, coding


UNREADABLE = Reading("-", "/", {}, keep=False, modern=True, length=0)


class Connection(Held):
    """A connection that is not a stream.

    It is IDLE; ARRIVING, once a part of a request is here; ANSWERING, once all of it is
    here; and then IDLE again, or LEAVING, when it ignores what still comes.
    """
    IDLE, ARRIVING, ANSWERING, LEAVING = "idle", "arriving", "answering", "leaving"
    IDLE_SECONDS = 75.0                  # longer than the 60 s that proxies keep one
    REQUEST_SECONDS = 10.0               # for all of a request, not for each byte
    LINGER_SECONDS = 1.0                 # so that a sending client can read our answer
    LINGER_BYTES = 65_536

    def __init__(self, edge, link, peer):
        self.peer = peer
        self.whose = source_of(peer)
        self.buffer = bytearray()
        self.reader = read_requests(self.buffer, self.spool_for)
        self.new = True                                  # [3] no byte has come yet
        self.ended = False                               # the other side sends no more
        self.keep = True                                 # it stays open after this answer
        self.rest = None                                 # [3] what follows the body
        self.spare = self.LINGER_BYTES                   # bytes to ignore when LEAVING
        self.state = self.IDLE
        super().__init__(edge, link)
        self.deadline = time.monotonic() + self.IDLE_SECONDS

    @property
    def busy(self):
        return self.state == self.ANSWERING

    @property
    def may_be_closed(self):
        """When the server ends: True if nobody waits for an answer."""
        return self.state not in (self.ANSWERING, self.LEAVING)

    # -- reading, in the loop. Most requests go straight from advance to take. If one has to
    # be let in before its body is read, it goes through apart, check_before_body in the
    # pool, go_on and resume, which calls advance again.

    spool_for = staticmethod(refuse_long)                # [3] has a place for a long body

    def read(self, data):
        self.new = False
        self.ended = not data
        if self.state == self.LEAVING:                   # it is ignored
            self.spare -= len(data)
            if self.ended or self.spare <= 0:
                self.close()
            return
        self.buffer += data
        if not self.busy:
            self.edge.to_advance.append(self)
        elif self.ended or len(self.buffer) > HEAD_LIMIT + BODY_LIMIT:
            self.listen(self.events & ~READABLE)         # read on after this answer

    def advance(self):
        """Take up the next request, if it is complete."""
        some = bool(self.buffer)
        try:
            reading = next(self.reader)
        except Refused as no:
            return self.refuse(no)
        if reading:
            self.state = self.ANSWERING
            if reading.body is None:                     # Expect (RFC 9110, 10.1.1)
                payer = f"expecting, from {source_of(self.peer)}"
                self.apart(self.check_before_body, reading, payer)
            else:
                self.take(reading)
        elif self.ended:
            self.close()
        elif some:
            self.arriving()

    def take(self, reading):
        """Take up a request. [3] reads an upload as a form first."""
        self.edge.take_up(self, reading)

    def arriving(self):
        """Note that a part of a request has come."""
        if self.state != self.ARRIVING:
            self.deadline = time.monotonic() + self.REQUEST_SECONDS
            self.state = self.ARRIVING

    def apart(self, job, what, payer):
        """Have the pool do job(what), in another lane than the requests. If it raises
        Refused, send that; any other error closes the connection."""
        self.edge.pool.gather((self, "apart"), (job, what), self.do_apart, payer)

    def do_apart(self, those):
        (job, what), = those                             # a connection does one at a time
        try:
            job(what)
        except Refused as no:
            self.edge.call(self.refuse, no)
        except CRASH:
            self.edge.call(self.close)
            raise

    def check_before_body(self, reading):
        """In the pool: refuse before the client sends the body, if it waits for a 100, or
        before we read it, if it is long."""
        self.check(reading, self.edge.request(reading, self.peer))
        self.edge.call(self.go_on, reading)

    def check(self, reading, request):
        """Raise Refused if the request is refused whatever its body is."""
        refuse_foreign(request)
        if request.path.startswith("/w/"):
            admit(request, self.edge.env)

    def go_on(self, reading):
        if self in self.edge.held:
            self.arriving()
            if "expect" in reading.headers and reading.modern:
                with contextlib.suppress(OSError):
                    self.socket.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.resume()

    def resume(self):
        """Go on reading, first what was sent ahead."""
        if self.state in (self.IDLE, self.ARRIVING) and self in self.edge.held:
            self.listen(0 if self.ended else READABLE)
            self.close_on_error(self.advance)

    # -- answering, in the loop or in the pool

    def reply(self, asked, response):
        if response.watch and asked.reading.method != "HEAD":
            return self.edge.call(self.become_stream, asked, response)
        self.whose = source_of(asked.request.peer)
        if asked.forwarded:
            self.whose = asked.forwarded.headers.get("x-account") or self.whose
        if len(response.body) > Backlog.ANSWER:
            response = self.page_too_large(asked, response)
        self.rest = None if asked.reading.method == "HEAD" else response.rest
        data = self.encoded(asked, response)
        sent = self.offer(data)
        if sent == len(data) and self.keep:
            self.written()
        else:
            self.edge.call(self.wrote, data, sent)

    def page_too_large(self, asked, response):
        """Refuse the page, and log that, because only its author can make it smaller."""
        request = self.edge.as_logged(asked.request)
        log(f"{request.method} {request.path}: an answer of {len(response.body)} bytes; "
            f"at most {Backlog.ANSWER} are sent. Show less.")
        no = Refused(500, "This page is too large to be sent. Ask for a part of it.")
        return self.edge.refusal(asked.request, no)

    def encoded(self, asked, response):
        """Return the bytes of the answer. Note whether the connection stays open."""
        reading = asked.reading
        response = compressed(asked.request, response)
        self.edge.count(asked, response)
        self.keep = (reading.keep and not self.edge.stopping and response.status != 421
                     and reading.method != "CONNECT")
        return encode(asked.request, reading, response, self.keep, self.edge.date)

    def written(self):
        """Go on after the answer has left."""
        if not self.keep:
            return self.leave()
        self.deadline = time.monotonic() + self.IDLE_SECONDS
        self.state = self.IDLE                           # before resume() looks at it
        if self.buffer or self.ended:
            self.edge.call(self.resume)

    def leave(self):
        """Send no more, and ignore for a moment what comes, so that a client that is still
        sending can read the answer (RFC 9112, 9.6)."""
        self.deadline = time.monotonic() + self.LINGER_SECONDS
        self.state = self.LEAVING
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
        if self.ended:
            self.close()
        else:
            self.listen(READABLE)

    def refuse(self, no):
        """Send one last answer. Nothing after it is read."""
        if self not in self.edge.held:
            return
        self.state = self.ANSWERING
        asked = Asked(self, UNREADABLE, Request("GET", "/", peer=self.peer))
        self.write(self.encoded(asked, self.edge.refusal(asked.request, no)))

    def become_stream(self, asked, response):
        """In the loop, because the loop counts the streams."""
        no = self.edge.stream_refusal(asked, response)
        if no:
            return self.reply(asked, self.edge.refusal(asked.request, no))
        data = self.encoded(asked, response)
        if self.ended:                                   # nobody is there for the rest
            self.keep = False
            return self.write(data + first_frames(asked.request, response.watch))
        self.edge.held.discard(self)
        self.listen(0)
        viewer = viewer_in(asked.forwarded or asked.request)
        stream = Stream(self.edge, self.socket, asked.request, response, viewer)
        stream.write(data)
        for one in not_shown(asked.request, response.watch):
            stream.show(one.number, one.piece)
        if stream in self.edge.held:
            self.edge.broker.welcome(stream, response.watch)

    def tick(self, now):
        waiting = self.busy and not self.unsent          # for a thread, which ends that
        if waiting or now < self.deadline:
            return
        if self.state == self.ARRIVING:
            self.refuse(Refused(408, "The request took too long to arrive. Send it again."))
        else:
            self.close()


class LoopEdge:
    """Listens once it is made, serves in serve_forever(), ends after stop().

    settings: host, port, threads, connections, streams, allow_host, trust_proxy and drain.
    """
    DRAIN_SECONDS = 5.0                                  # for the requests in flight
    END_SECONDS = 5.0                                    # for the threads
    TICK_SECONDS = 1.0
    broker_kind = Broker                                 # [3] adds to both kinds
    connection_kind = Connection
    CALLS_SECONDS = 0.002                                # then it reads sockets again
    SHORT = 1000                                         # bytes of a body
    POLL_SECONDS = 0.0001                                # to poll before it sleeps

    def __init__(self, env, settings):
        self.settings = settings
        doors = {**env.doors, **dict.fromkeys(ASSETS, encoded_asset),
                 "/healthz": self.healthz}
        self.use(dataclasses.replace(env, doors=doors))
        self.kept = Kept(env.directory)
        self.backlog = Backlog(self)
        self.broker = self.broker_kind(self)
        self.pool = Pool(settings.threads)
        for namespace in (env.workspaces, env.directory.namespace):
            namespace.listeners.append(self.broker.published)
        self.insiders = set()                            # Asked.insider of those let in
        self.accounts = {}                               # by the hash of a cookie
        self.hosts = self.own_names()
        self.make_loop()
        self.socket = self.listening()
        self.socket.setblocking(False)
        self.server_port = self.socket.getsockname()[1]

    def listening(self):
        return listening(self.settings.host, self.settings.port)

    def own_names(self):
        names = ("", "localhost", socket.gethostname(), self.settings.host,
                 *self.settings.allow_host)
        return frozenset([name.lower().rstrip(".") for name in names])

    def make_loop(self):
        self.held = set()
        self.selector = selectors.DefaultSelector()
        self.to_advance = []                             # connections with new bytes
        self.calls = collections.deque()                 # what other threads left to do
        self.waker, self.woken = socket.socketpair()
        self.waker.setblocking(False)
        self.woken.setblocking(False)
        self.awake = False                               # True: call() need not wake it
        self.polling = False                             # polling paid the last time
        self.date = formatdate(usegmt=True)
        self.due = {}                                    # when, by chore
        self.stopping = 0.0                              # since when; 0: it is not

    def use(self, env):
        self.env = env
        # The class Noted replaces Env.forward(stub, request). So worker() returns
        # Noted(stub, request), which says whom it would ask and what, instead of an answer.
        self.deciding = dataclasses.replace(env, forward=Noted)
        self.regating = self.deciding                    # for open streams; [3] changes it

    @property
    def streams(self):
        return [held for held in [*self.held] if isinstance(held, Stream)]

    # -- the loop

    def serve_forever(self):
        self.selector.register(self.socket, READABLE, self.accept)
        self.selector.register(self.woken, READABLE, lambda _: self.woken.recv(4096))
        self.pool.defer()
        next_tick = 0.0
        while not (self.stopping and self.drained()):
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + self.TICK_SECONDS
                guarded(self.tick, time.monotonic())
            for key, events in self.ready():
                guarded(key.data, events)
            self.kept.seen = None                        # see Kept.directory_version
            self.advance_all()
            self.run_calls()
        self.pool.rouse()

    def ready(self):
        """Wait until a socket can be read or written, or a thread uses call().

        A sleeping core takes longer to wake than most answers take to make. So the loop
        polls for a moment first, if that paid the last time. (Pages on one connection: 1.2
        x.) While the pool has jobs it sleeps at once, because they need the interpreter.
        """
        self.pool.rouse()
        until = 0.0 if self.pool.busy else time.perf_counter() + self.POLL_SECONDS
        while self.polling and time.perf_counter() < until:
            found = self.selector.select(0)
            if found or self.calls:
                return found
            give_way()                                   # others need this core, too
        self.awake = False
        found = self.selector.select(0 if self.calls else self.TICK_SECONDS)
        self.awake = True
        self.polling = time.perf_counter() < until
        return found

    def advance_all(self):
        """Take up the requests that were read in this round."""
        connections, self.to_advance = self.to_advance, []
        for connection in connections:
            if connection in self.held:                  # it may have been closed since
                guarded(connection.close_on_error, connection.advance)

    def run_calls(self):
        until = time.monotonic() + self.CALLS_SECONDS
        for _ in range(len(self.calls)):
            guarded(*self.calls.popleft())
            if time.monotonic() > until:
                return

    def call(self, *call):
        """call(function, *args): have the loop do it soon. Thread-safe."""
        self.calls.append(call)
        if not self.awake:                               # else it looks before it sleeps
            self.awake = True
            self.wake()

    def wake(self):
        with contextlib.suppress(OSError):               # full: the loop is awake already
            self.waker.send(b"\0")

    def accept(self, _):
        for _ in range(64):                              # then other sockets, too
            try:
                self.take_in(*self.socket.accept())
            except BlockingIOError:
                return
            except OSError as error:
                log(f"accept: {error}")
                if error.errno in NO_ROOM:               # until the next tick
                    return self.selector.unregister(self.socket)

    def take_in(self, link, address):
        link.setblocking(False)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = self.connection_kind(self, link, address[0])
        if len(self.held) > self.settings.connections:
            connection.refuse(Refused(503, "The server is full. Try again in a minute.",
                                      retry_after(60)))

    def tick(self, now):
        """Once a second: the date, deadlines, heartbeats, chores, and unused objects."""
        self.date = formatdate(usegmt=True)
        for memory in (self.insiders, self.accounts):
            if len(memory) > 100_000:
                memory.clear()
        for held in [*self.held]:
            guarded(held.tick, now)
        self.begin(self.put_to_sleep)
        self.begin(self.broker.look_elsewhere)
        for chore, every in self.chores():               # 0 seconds: never
            if every and now >= self.due.setdefault(chore, now + every):
                self.due[chore] = now + every
                self.begin(chore)
        number = self.socket.fileno()                    # -1: it is closed
        if number >= 0 and number not in self.selector.get_map():
            self.selector.register(self.socket, READABLE, self.accept)

    def put_to_sleep(self):
        self.env.workspaces.sleep_unused()
        self.env.directory.namespace.sleep_unused()

    def begin(self, chore):
        """Have the pool do a chore, but never twice at a time."""
        self.pool.gather(chore, chore, lambda chores: guarded(chores[0]))

    # -- a request: in the loop, then in the pool

    def take_up(self, connection, reading):
        asked = Asked(connection, reading, started=time.perf_counter())
        try:
            asked.request = self.request(reading, connection.peer)
        except Refused as no:
            asked.request = Request("GET", "/", "", reading.headers, peer=connection.peer)
            return self.finish(asked, no)
        asked.cookie = asked.request.headers.get("cookie")
        if reading.method in SAFE and self.keeps_answers():
            asked.directory_version = self.kept.directory_version()
            kept = self.kept.find(asked)
            if kept:
                return connection.reply(asked, kept.renewed())
        self.line_up(asked)

    def line_up(self, asked):
        """Put a request into a lane, and charge it to a payer. For carol they are:

            lane                  payer
            203.0.113.5 /w/acme   inside, from 203.0.113.5    her first request for acme
            /w/acme               carol                       since the gate has let her in
            her connection        carol                       for the home page

        So a client that is not known yet waits only behind others at the same address.
        """
        name = lane_name(asked.request.path)
        asked.insider = hash((name, asked.cookie))
        asked.let_in = asked.let_in or not name or asked.insider in self.insiders
        asked.payer = self.payer_of(asked)
        if not name:
            name = asked.connection
        elif not asked.let_in:
            name = f"{source_of(asked.request.peer)} {name}"
        self.pool.gather(name, asked, self.work_off, asked.payer)

    def payer_of(self, asked):
        """Return the account that the gate found for this cookie before. If there is none
        yet, return a payer for all at the same address: one for requests to a workspace,
        and another for the rest, such as signing in."""
        known = self.accounts.get(hash(asked.cookie))
        where = "inside" if asked.request.path.startswith("/w/") else "outside"
        return known or f"{where}, from {source_of(asked.request.peer)}"

    def lines_up_again(self, asked, decided):
        """Call this when the gate has let a request in. If it waits in the wrong lane, or
        its account does not pay yet, note the account, line it up again and return True."""
        account = decided.request.headers.get("x-account")
        pays = not asked.cookie or not account or asked.payer == account
        if asked.let_in and pays:
            return False
        asked.let_in = True
        if asked.cookie and account:
            self.accounts[hash(asked.cookie)] = account
            self.insiders.add(asked.insider)
        self.call(asked.connection.close_on_error, self.line_up, asked)
        return True

    def work_off(self, several):
        """In the pool: answer the requests of a lane. Return those to ask again, which were
        Outdated or had no time, because others need this thread, too."""
        decided_at = time.monotonic()
        try:
            groups = self.decide_all(several)
            until = time.monotonic() + GroupCommit.BATCH_SECONDS
            with contextlib.suppress(Outdated):
                for stub, group in groups.items():
                    while group:
                        self.fetch_some(stub, group, decided_at)
                        if time.monotonic() > until:
                            break
        except CRASH:                                    # else clients would wait forever
            for asked in several:
                self.call(asked.connection.close)
            raise
        return [*itertools.chain(*groups.values())]

    def decide_all(self, several):
        """Answer what is not forwarded. Return the rest: a group for each stub."""
        groups = collections.defaultdict(collections.deque)
        env = asking_once(self.deciding) if len(several) > 1 else self.deciding
        for asked in several:
            decided = outcome(self.decide, asked.request, env)
            if not isinstance(decided, Noted):
                self.insiders.discard(asked.insider)
                self.finish(asked, decided)
            elif not self.lines_up_again(asked, decided):
                asked.stub, asked.forwarded = decided
                asked.object_version = decided.stub.namespace.versions[decided.stub.id]
                groups[decided.stub].append(asked)
        return groups

    def fetch_some(self, stub, group, decided_at):
        """Answer the first page of a group alone, because it can be large. If a command is
        first, answer all of the group in one commit. What is answered leaves the group.

        Raises Outdated, and answers nothing, if a verdict may be outdated by now.
        """
        first = group[0]
        some = [first] if first.request.method in SAFE else [*group]
        requests = [asked.forwarded for asked in some]
        check = functools.partial(self.check_access, requests, decided_at)
        outcomes = outcome(stub.fetch_all, requests, check)
        if isinstance(outcomes, BaseException):
            outcomes = [outcomes] * len(some)
        self.finish_together([(group.popleft(), response) for response in outcomes])

    def check_access(self, requests, decided_at):
        """Raise Outdated if the access of somebody who asks has changed since then."""
        for request in requests:
            account = request.headers.get("x-account", "")
            if self.broker.changed_since(account, decided_at):
                raise Outdated

    def finish_together(self, answered):
        """Leave the short ones of several answers to the loop.

        A thread releases the interpreter with each send, so the loop would read the next
        request after each. (Commands on 32 connections: 1.14 x.) The rest is sent here:
        compressing would hold up the loop; and when the server ends, the loop may be gone.
        """
        left = []
        for asked, response in answered:
            short = isinstance(response, Response) and len(response.body) <= self.SHORT
            if short and len(answered) > 1 and not self.stopping:
                left.append((asked, response))
            else:
                self.finish(asked, response)
        if left:
            self.call(self.finish_in_loop, left)

    def finish_in_loop(self, answered):
        for asked, response in answered:
            guarded(asked.connection.close_on_error, self.finish, asked, response)

    def decide(self, request, env):
        """Return a Noted, or the Response if the request is not forwarded. Raises Refused.

        env: self.deciding, or what asking_once makes of it.
        """
        return self.env.front(request, env)

    def finish(self, asked, response):
        """Send the answer, or close the connection if not even a refusal can be made."""
        try:
            if isinstance(response, BaseException):
                response = self.refusal(asked.request, response)
            if asked.forwarded and asked.request.method in SAFE:
                self.kept.keep(asked, response)
            if response.watch:                           # compress here, not in the loop
                first_frames(asked.request, response.watch)
            asked.connection.reply(asked, response)
        except CRASH as error:
            self.call(asked.connection.close)
            request = self.as_logged(asked.request)
            log_error(f"{request.method} {request.path}", error)

    def request(self, reading, peer):
        """Return the Request in a sound frame. Raises Refused for a bad target, method or
        host."""
        headers = reading.headers
        method = "GET" if reading.method == "HEAD" else reading.method
        scheme = "http"
        proxies = self.settings.trust_proxy
        if proxies and in_networks(peer, proxies):
            # If several proxies say it, the first is the one that the browser spoke to.
            said = headers.get("x-forwarded-proto", "").partition(",")[0]
            if said.strip().lower() == "https":
                scheme = "https"
            peer = client_behind(peer, headers.get("x-forwarded-for", ""), proxies)
        if not known_host_again(headers.get("host", ""), self.hosts):
            raise Refused(*NOT_OUR_NAME)
        if method not in METHODS:
            status = 405 if method in ("TRACE", "CONNECT") else 501
            allow = ", ".join(METHODS)
            raise Refused(status, f"The methods here are {allow}.", (("allow", allow),))
        path, query = "*", ""                            # of OPTIONS, whatever it names
        if method != "OPTIONS":
            path, query = parse_target(reading.target, headers.get("host", ""))
        if self.stopping and self.draining and path != "/healthz":
            raise Refused(503, "This server is about to stop. Try again in a moment.",
                          retry_after(2))
        return Request(method, path, query, headers, reading.body or b"", peer, scheme,
                       reading.spool)

    def stream_refusal(self, asked, response):
        """Return a Refused that says why this stream can't be opened, or None if it can."""
        if not asked.reading.modern:
            return Refused(505, "A stream needs HTTP/1.1. Set proxy_http_version 1.1 in "
                                "the proxy.")
        if self.broker.open_streams[response.which] >= self.most_streams():
            return Refused(429, "Too many windows are open for this account. Close some.",
                           retry_after(30))
        return None

    def healthz(self, request, env):
        """A door, for load balancers: is the server about to stop?"""
        only_read(request)
        return Response(503, b"draining\n") if self.stopping else Response(200, b"ok\n")

    def decide_again(self, request):
        """For the broker: like decide, for a request whose answer is an open stream. A
        front of [3] never answers such a request itself."""
        return worker(request, self.regating)

    # -- what Part Three adds to

    def chores(self):
        """Return pairs of a function and the seconds between its calls. [3] has more."""
        return [(self.broker.retry_failed, 5.0), (self.broker.logged.clear, 60.0)]

    def keeps_answers(self):
        """False on a node, because there each request brings its own verdict."""
        return self.env.gate is ask_the_gate

    def most_streams(self):
        return self.settings.streams or 100

    def refusal(self, request, error):
        return refusal(request, error)

    def as_logged(self, request, status=500):
        """Return the request as it may be logged. [3] Some paths are secrets."""
        return request

    def count(self, asked, response):
        """For Part Three: figures, and the access log."""

    # -- the end

    @property
    def draining(self):
        """True for a while after stop(): load balancers hear of it from /healthz."""
        return time.monotonic() < self.stopping + self.settings.drain

    def stop(self):
        """Take no more requests; end when all in flight are answered. Thread-safe."""
        self.stopping = self.stopping or time.monotonic()
        self.wake()

    def drained(self):
        """Close what may be closed. Return True if nothing is left, or the time is up."""
        if self.draining:
            return False
        if self.socket.fileno() >= 0:
            with contextlib.suppress(KeyError):          # see accept: no descriptors
                self.selector.unregister(self.socket)
            self.socket.close()
            self.wake()                                  # what has come is read first
            return False
        for held in [*self.held]:
            if held.may_be_closed:
                held.close()
        until = self.stopping + self.settings.drain + self.DRAIN_SECONDS
        return not self.held or time.monotonic() > until

    def server_close(self):
        """After serve_forever: end the threads, close every file."""
        self.pool.close(self.END_SECONDS)
        self.kept.close()                                # first: the last close tidies up
        self.env.workspaces.close()
        self.env.directory.namespace.close()
        for one in (*self.held, self.socket, self.selector, self.waker, self.woken):
            one.close()


# -- parts of the loop edge

NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
give_way = getattr(os, "sched_yield", lambda: None)
known_host_again = functools.lru_cache(maxsize=1024)(known_host)


def listening(host, port):
    """Return a listening socket. With a short queue it would turn a crowd away."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = ":" in host and socket.has_dualstack_ipv6()   # "::" is for IPv4, too
    return socket.create_server((host, port), family=family, backlog=1024,
                                dualstack_ipv6=both)


def lane_name(path):
    """Return the lane of the Workspace that answers this path, or "" if none does."""
    if not path.startswith("/w/"):
        return ""
    parts = path.split("/")
    return "" if parts[3:4] == ["members"] else f"/w/{parts[2]}"


class Outdated(Undone):
    """The account's access changed while its request waited for the object's turn."""


def asking_once(deciding):
    """Return the Env for requests that came together. If several would ask the gate the
    same, it is asked once, after all of them have come."""
    if deciding.gate is not ask_the_gate:                # on a node each brings a verdict
        return deciding
    verdicts = {}                                        # by question

    def gate(request, env):
        question = env.question(request)
        key = question.path, question.query, question.scheme, *question.headers.items()
        if key not in verdicts:
            verdicts[key] = env.directory.fetch(question)
        return verdicts[key]
    return dataclasses.replace(deciding, gate=gate)


# -- the client's address

def address_in(text):
    """Return the text as an address of ipaddress, or None if it is no address."""
    with contextlib.suppress(ValueError):
        ip = ipaddress.ip_address(text.partition("%")[0])
        return getattr(ip, "ipv4_mapped", None) or ip    # IPv4, on a socket for both
    return None


@functools.lru_cache(maxsize=1024)
def in_networks(address, networks):
    """True if the address is in one of the networks, a tuple of texts like "10.0.0.0/8"."""
    ip = address_in(address)
    return ip is not None and any([ip in ipaddress.ip_network(network)
                                   for network in networks])


WITH_PORT = re.compile(r"([0-9.]+):[0-9]+|\[([^\]]*)\](?::[0-9]+)?")


@remembered
def client_behind(peer, forwarded_for, proxies):
    """Return the client's address behind trusted proxies (networks), by X-Forwarded-For.

    Each proxy adds the address that it hears, perhaps with a port. So read the list from
    its end, up to the first address that is no such proxy: anybody can write the rest.
    """
    for heard in reversed(forwarded_for.split(",")):
        if not in_networks(peer, proxies):
            return peer
        found = WITH_PORT.fullmatch(heard.strip())
        address = address_in(found[1] or found[2] if found else heard.strip())
        if address is None:
            return peer
        peer = str(address)
    return peer


@functools.lru_cache(maxsize=1024)
def source_of(peer):
    """Return what is charged for a client's requests: its address or, in IPv6, its network.

    A client with one IPv6 address has all 2 ** 64 that begin alike (RFC 6177, 2).
    """
    address = address_in(peer)
    if address is None:
        return peer
    if address.version == 4:
        return str(address)
    return str(ipaddress.ip_network((int(address), 64), strict=False))


# ==== 26. Hosts ===========================================================================
# The idea: Workspace and Directory with everything of this part. The Directory keeps the
#   verdicts of its gate, as pages are kept, until its file changes. The file of a new
#   workspace is made before the Directory's turn is taken, because making it takes long.
# It promises: a verdict is never older than the last commit, whichever process made it. Nor
#   is it older than ten seconds, because sessions end by the clock. (Each second, Part
#   Three removes expired sessions. That is a commit, too.)
# Who uses it: the composition roots of Part Three.

class QuickRouter(Router):
    """A router that remembers its matches."""

    @functools.cached_property
    def match(self):
        return remembered(super().match)


class EdgeWorkspace(Broadcast, Workspace):
    """A Workspace whose streams a broker holds."""
    OPEN_SECONDS = 1.0


class EdgeDirectory(Broadcast, Directory):
    """A Directory that keeps its verdicts. A broker holds its streams."""
    VERDICT_SECONDS = 10.0
    MOST_VERDICTS = 4096
    digest_of = staticmethod(remembered(session_digest))

    def on_open(self):
        super().on_open()
        self.kept_verdicts = {}                          # verdicts, and when they end
        self.as_of = None                                # the state of file and keys then

    def handle(self, request):
        if request.method in SAFE and request.path.startswith("/_gate/"):
            return self.verdict(request)
        return super().handle(request)

    def verdict(self, request):
        as_of = *self.store.state(), self.keys
        if as_of != self.as_of or len(self.kept_verdicts) > self.MOST_VERDICTS:
            self.kept_verdicts.clear()
            self.as_of = as_of
        key = request.headers.get("x-session"), request.path, request.query
        until, known = self.kept_verdicts.get(key, (0.0, None))
        if time.monotonic() < until:
            return known
        answer = super().handle(request)
        if answer.status == 200 and not self.store.db.in_transaction:
            self.kept_verdicts[key] = time.monotonic() + self.VERDICT_SECONDS, answer
        return answer

    def make_file(self, ctx, id):
        """The file mostly exists as a draft already: see create_workspace_with_file."""
        draft = ctx.request.headers.get("x-file")
        if draft is None:
            return super().make_file(ctx, id)
        self.workspaces.name_draft(draft, id)

    def own_account(self, request):
        return self.viewer(request).account

    def own_version(self, request):
        """Asked once a second. It changes when another process has written here."""
        with contextlib.suppress(sqlite3.OperationalError):  # locked: the next second
            self.each_second()
        return [self.opened_at, self.store.one("PRAGMA data_version")[0]]

    def each_second(self):
        """[3] ends what has expired."""


TRUSTED.add("x-file")


def create_workspace_with_file(request, env):
    """A door. Make the file of a workspace first, and only then ask the Directory.

    If the Directory made the file in its turn, every other request would wait for its
    verdict meanwhile. So in its turn the Directory only renames the file.
    """
    signed_in = env.directory.ask_as(request, "/_account")
    if request.method != "POST" or not signed_in:
        return env.directory.fetch(request)
    with env.workspaces.draft() as draft:
        return env.directory.fetch(request.with_headers({"x-file": draft}))


# #### Part Three: running it ############################################################
#
#     The frame        27 Tables  28 Settings  29 Server  30 Roots  31 Command line
#     For slices       32 Slice checks  33 Page checks  34 Template checks  35 Fields
#                      36 Ordinary pages  37 More events  38 Assets  39 Brand  40 Counts
#                      41 Live home  42 Jobs
#     People           43 Keys  44 Accounts  45 Account page  46 Masquerade  47 Links
#                      48 Onlookers  49 People  50 Owners
#     To run it        51 Quotas  52 Memory  53 Figures  54 Top
#     A deployment     55 Copies  56 Snapshots  57 Check and repair  58 Exports
#                      59 Member verbs  60 Own workspaces  61 Single  62 Nodes  63 Proxy
#                      64 More figures
#     More for slices  65 Public routes  66 Member lists  67 Uploads  68 Stored files
#                      69 Tokens  70 Repeats  71 History
#     For its author   72 Console  73 Own options  74 Development  75 Testing
#
# This part makes a product of the server. Each section is one feature. You can strike it
# out of this file, together with the sections whose heads say that they need it; all others
# still work. The frame has to stay: without one of its sections, only --plain works.
#
# This is possible because no other code calls a feature by its name. Each feature adds
# itself, in one of these ways:
#
#     @addition                     a class whose methods come before those of its base
#     DIRECTORY_SLICES.append(...)  a slice of the Directory: pages outside of workspaces
#     @verb("backup", ...)          a command of the command line
#     @public                       a name that apps use
#     ROOTS.append(...)             a composition root for some settings
#     VIEWERS.append(...)           a function that adds facts of a verdict to a viewer
#     PLAIN.append(...)             a function that changes the env of --plain
#
# So the Directory of this part is a chain of some sixty classes. These are some of them,
# with their sections ("orion.py read EdgeDirectory.say" prints what a call goes through):
#
#     ... -> TellsLabels (49) -> KnowsLinks (47) -> LetsOperatorsLookOn (46) -> ...
#     -> EdgeDirectory (26) -> ... -> HasJobs (42) -> ... -> Broadcast (24) -> ...
#     -> Directory (12) -> ... -> OwnsTables (27) -> ... -> SliceHost (8)
#
# When several sections add to a method, each calls super(), and so asks the sections before
# it. These have most of them:
#
#     EdgeDirectory.say           46 49 51 72       what a verdict says
#     EdgeDirectory.each_second   43 45 46 47 69    notices changes, removes what expired
#     EdgeWorkspace.on_open       33 42 51          and Broadcast.on_open: 42 53 71
#     LoopEdge.decide             29 65 66          which object answers a request
#     LoopEdge.refusal            44 65 67 69       how a browser or a program is told no
#     LoopEdge.tick               42 48 53 72       and LoopEdge.chores: 41 52 53 56 58 60
#     Broker.look_elsewhere       66 72 73          what other processes may have changed
#     SliceHost.call              27 69 70          a route, with its transaction
#
# So the order of the sections can matter. If a section has to come after one that it does
# not need, its head says so: "It stands behind".
#
# A variable with the name of a type has that type: settings, request, viewer, store. An id,
# a name or a title is text; a file, folder or path is a pathlib.Path. Type hints do not
# repeat what a docstring makes plain.
#
# given holds the arguments of a command. Commands use some functions of section 31:
# opened() gives the Directory's store, to change it; looked_up() reads from it;
# check_there() refuses if there is none; row_of() finds a row by its name; table() prints
# rows. The text of an Unusable that they raise is the line that the operator reads.
#
# Further words:
#
#     deployment  all state of one server: its data folder
#     root        a composition root (section 15); "single root": one with one workspace
#     plane       the Directory (control), or workspaces (data), in a process of its own
#     node        a machine, or process, with workspaces and no Directory: a data plane
#     snapshot    a copy of a whole deployment; "backup": one that an operator asked for
#     tenant      a workspace, as the operator sees it

import base64
import bisect
import codecs
import contextvars
import ctypes
import datetime
import filecmp
import getpass
import heapq
import http.client
import inspect
import mmap
import shutil
import tempfile
import textwrap
import types

# -- how a section adds itself

ADDED = collections.defaultdict(list)                    # by base: its additions
DIRECTORY_SLICES = []
VERBS = {}                                               # by their words: each a Verb

# Functions, each with its arguments in ().
MEMBERS_PARTS = []                                       # (ctx): below the list of members
PLAIN = []                                               # (env): changes that of --plain
VIEWERS = []                                             # see viewer_in_full
CHECKS = []                                              # (settings): before composing
# One section adds to each of these. They are here so that you can strike that section out.
BEFORE_SERVING = []                                      # (): once in a process that serves
AT_START = []                                            # (server, address)
APP_PARSERS = []                                         # see read_command_line
APP_SEEDS = []                                           # (env, names of workspaces)
NODE_VERBS = {}                                          # what verbs do on a node instead

# Pairs of functions (settings). If the first returns True, the second is called.
ROOTS = []                                               # it returns the env
WAYS_TO_SERVE = []


def addition(cls):
    """Mark a class: in each server, its methods come before those of its base."""
    ADDED[cls.__bases__[0]].append(cls)
    return cls


@functools.cache
def whole(base):
    """Return a class of base with all additions to it, and to its own bases.

    Python looks for a method in the additions to base, the last one first; then in base;
    then in the additions to its next base, and so on.
    """
    bases = [*reversed(ADDED[base]), base]
    for one in base.__mro__[1:]:
        bases += reversed(ADDED[one])
    return type(base.__name__, tuple(bases), {})


class Verb(NamedTuple):
    """A command: run(settings, given) returns an exit status, or None for 0."""
    run: Callable[..., Optional[int]]
    help: str
    arguments: Sequence[str]


def public(thing):
    """Mark a function or a class for use by apps."""
    __all__.append(thing.__name__)
    return thing


def verb(words, help, *arguments):
    """Mark a function as a command of the command line.

    arguments: keys of ARGUMENTS in section 31.
    """
    def mark(run):
        VERBS[words] = Verb(run, help, arguments)
        return run
    return mark


@addition
class GivesWholeContexts(SliceHost):
    """Gives slices a Context with all additions."""

    @functools.cached_property
    def context(self):
        return whole(Context)


def viewer_in_full(viewer, request):
    """Return the viewer with what the sections in VIEWERS read from the verdict."""
    for more in VIEWERS:
        viewer = more(viewer, request)
    return viewer


@addition
class KnowsViewers(Broadcast):
    def viewer(self, request):
        return viewer_in_full(super().viewer(request), request)


@addition
class HasMembersParts(EdgeDirectory):
    def around(self, live, ctx, renderings, args):
        shown = super().around(live, ctx, renderings, args)
        if live.path != members.path:
            return shown
        return Html().join([shown, *[part(ctx) for part in MEMBERS_PARTS]])


# -- what several sections share (skip it until one of them uses it)

OURS = (__file__, os.path.dirname(os.__file__))          # this file, and the library


def frames_of_app(error):
    """Return the frames of the error's traceback that belong to an app."""
    return [frame for frame in traceback.extract_tb(error.__traceback__)
            if not frame.filename.startswith(OURS)]


NEEDS_COMMA = "a tuple of one needs a comma, too: (one,)"

# For faults that are found each second: logs a line again only after 256 other lines.
log_once = functools.lru_cache(maxsize=256)(log)

# Only virtual tables have no page of their own, and slices can make none but FTS5 tables.
FTS5_TABLES = "SELECT name FROM sqlite_master WHERE type = 'table' AND rootpage = 0"


def with_wal(path):
    """Return the files of a database that exist: itself, and its write-ahead log."""
    wal = path.with_name(f"{path.name}-wal")
    return [file for file in (path, wal) if file.exists()]


def stamps(files):
    """Return when each file was written, and its size; None for a file that is missing."""
    found = dict.fromkeys(files)
    for file in found:
        with contextlib.suppress(OSError):
            status = os.stat(file)
            found[file] = status.st_mtime_ns, status.st_size
    return found


def bytes_in(path):
    """Return the size of a file; 0 if it is missing."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def write_private(path, data: bytes):
    """Write all of a file, or nothing. Only its owner can read it."""
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    with open(private_file(part), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_folder(path.parent)


def file_name(said):
    """Return a name that means the same to people and to every system: it has no path and
    no invisible characters, and is not too long."""
    name = said.replace("\\", "/").rpartition("/")[2]
    seen = [sign for sign in name if unicodedata.category(sign)[0] != "C"]
    return "".join(seen).strip(" .")[-120:] or "file"


def all_routes(slices):
    return [route for slice in slices for route in slice.routes]


# The column workspaces.moving: it stays; it goes to another machine; it is being removed;
# it was deleted, and can be restored for some time.
STAYS, MOVES, GOES, DELETED = range(4)


# -- names and titles of workspaces

LONGEST_TITLE = 63                                       # characters


def slug(title):
    """Return the name that a title becomes in addresses: of "Acme Corp", "acme-corp".

    It is "" if the title is too long or has letters that no name can have. One character
    can become several, so check the result by WORKSPACE_NAME.
    """
    if len(title) > LONGEST_TITLE:
        return ""
    if WORKSPACE_NAME.fullmatch(title):
        return title
    letters = unicodedata.normalize("NFKD", title.casefold())
    bare = "".join([one for one in letters if unicodedata.category(one) != "Mn"])
    if any([one.isalnum() and not one.isascii() for one in bare]):
        return ""                                        # it could look like another name
    return "-".join(re.findall("[a-z0-9]+", bare))


def names_of(typed):
    """Return the name and the title of a new workspace. Raises Refused(422)."""
    title = " ".join(typed.split())
    name = slug(title) if title.isprintable() else ""
    if not WORKSPACE_NAME.fullmatch(name):
        raise Refused(422, f"Type a name of 1 to {LONGEST_TITLE} characters. Use letters "
                           "from a to z, also with accents, because it becomes an address.")
    return name, title


def set_title(store, name, title):
    """Store the title of a workspace, if it says more than the name."""
    title = None if title == name else title
    store.exec("UPDATE workspaces SET title = ? WHERE name = ?", title, name)


TRUSTED.add("x-title")


@addition
class SaysTitles(Directory):
    def say(self, viewer, row):
        said = super().say(viewer, row)
        if row["title"]:
            said["x-title"] = urllib.parse.quote(row["title"])
        return said


@addition
class KnowsTitles(Context):
    @property
    def title(self):
        said = self.request.headers.get("x-title", "")
        return urllib.parse.unquote(said) or self.workspace


NOT_PLAIN = re.compile(r'[^ -~]|["\\%]')


def disposition(how, name):
    """Return a Content-Disposition (RFC 6266). Old browsers read its ASCII form."""
    plain = NOT_PLAIN.sub("_", name)
    encoded = urllib.parse.quote(name, safe="")
    return f"{how}; filename=\"{plain}\"; filename*=UTF-8''{encoded}"


def text_of(request, name):
    """Return a field as text; "" if it was not sent. Raises Refused(400) for a list."""
    return as_text(name, dict(request.pairs()).get(name, ""))


def at_end(response, markup):
    """Return a page with this markup added at its end."""
    body, end, rest = response.body.rpartition(b"</body>")
    body += markup.encode("utf-8", "replace")
    return response._replace(body=body + end + rest)


# #### The frame ###########################################################################

# ==== 27. Tables ==========================================================================
# The idea: a table belongs to the slice whose migration made it. SQLite asks us about each
#   statement, and refuses one that reaches into the tables of another slice. A journal
#   records what was written, and by whom.
# It promises: a region only reads; a command reads and writes rows; only a migration makes
#   tables: ordinary ones, and those of full-text search (FTS5), which keep their index in
#   further tables of the same slice. Other slices can call the functions that one exports.
# Who uses it: slices, for each statement; with --plain, too.

# -- what a statement of a slice may do
#
# Tables.run tells the Judge which slice runs a statement, and whether it may write. SQLite
# asks the Judge while it compiles the statement. If the Judge objects, SQLite raises an
# error, and Tables.run turns it into a PermissionError with the objection.

READ, WRITE, MIGRATE = "read", "write", "migrate"


def actions(names):
    """Return SQLite's codes for these actions: SQLITE_INSERT, and so on."""
    return {getattr(sqlite3, f"SQLITE_{name}") for name in names.split()}


WRITES = actions("INSERT UPDATE DELETE")
ROWS = actions("SELECT READ FUNCTION RECURSIVE") | WRITES
TABLE_IS_SECOND = actions("CREATE_INDEX DROP_INDEX CREATE_TRIGGER DROP_TRIGGER "
                          "ALTER_TABLE")                 # elsewhere it is the first name
NO_SLICE_MAY = actions("ATTACH DETACH PRAGMA TRANSACTION SAVEPOINT CREATE_TEMP_TABLE "
                       "CREATE_TEMP_TRIGGER CREATE_TEMP_VIEW CREATE_TEMP_INDEX")
# SQLite asks about these when a statement is the first to use full-text search (FTS5). They
# read no other slice's rows, and SQLite itself lets nobody write to sqlite_master.
FTS5_ASKS = {(sqlite3.SQLITE_PRAGMA, "data_version", None),
             (sqlite3.SQLITE_READ, "sqlite_master", "ROWID"),
             *[(sqlite3.SQLITE_UPDATE, "sqlite_master", column)
               for column in ("type", "name", "tbl_name", "rootpage", "sql")]}


COMMANDS_ONLY = "which only a command or a job may; a job that yields, only after its yield"


class Judge:
    """SQLite calls it, while it compiles a statement, for each action of the statement.

    (See sqlite.org/c3ref/set_authorizer.html.) It guards against mistakes, such as a query
    that reaches into the tables of another slice. It does not guard against a hostile
    slice: slices are Python, and can do whatever this process can. (And SQLite does not
    report the columns that a join names by USING or NATURAL.)
    """

    def __init__(self, owners):
        self.owners = owners
        self.slice = ""                                  # whose statement; "": the server's
        self.may = ""                                    # READ, WRITE or MIGRATE
        self.objection = ""                              # why it denied a statement

    def __call__(self, action, first, second, *_):
        """Return SQLITE_OK or SQLITE_DENY for an action: (SQLITE_INSERT, "todos", None) or
        (SQLITE_CREATE_INDEX, "by_title", "todos")."""
        if not self.slice:
            return sqlite3.SQLITE_OK
        table = second if action in TABLE_IS_SECOND else first
        objection = self.object_to(action, table or "", second)
        if not objection:
            return sqlite3.SQLITE_OK
        self.objection = self.objection or objection
        return sqlite3.SQLITE_DENY

    def object_to(self, action, table, second):
        """Return why the slice may not do this, or "". FTS5's own tables count, too."""
        migrates = self.may == MIGRATE
        of_rows = action in ROWS and not (action in WRITES and table == "sqlite_master")
        if (action, table, second) in FTS5_ASKS:
            return ""
        if action == sqlite3.SQLITE_CREATE_VTABLE and second.lower() != "fts5":
            return "makes a virtual table; a slice may make only those of FTS5"
        if not migrates and not of_rows:
            return "does more than read and write rows; only a migration may do that"
        if self.may == READ and action in WRITES:
            return f"writes, {COMMANDS_ONLY}"
        if migrates and action in NO_SLICE_MAY:
            return "uses PRAGMA, ATTACH, TEMP or a transaction; no slice may do that"
        if migrates and table.startswith("sqlite_"):     # SQLite's own records of tables
            return ""
        owner = self.owner_for(action, table)
        if owner != self.slice:
            return (f"touches table {table!r} of slice {owner!r}; use ctx.ask with a "
                    "function that it exports")
        return ""

    def owner_for(self, action, table):
        return self.owners.get(table.lower(), self.slice)


# -- the history of all tables. Never edit an entry: it has run somewhere already.

# The tables that each host has besides those of its slices. journal.which says which row
# was written.
HOST_TABLES.extend([
    "CREATE TABLE journal (id INTEGER PRIMARY KEY, at REAL NOT NULL, who TEXT NOT NULL, "
    "what TEXT NOT NULL, which TEXT NOT NULL)",
    "CREATE TABLE jobs (id INTEGER PRIMARY KEY AUTOINCREMENT, job TEXT NOT NULL, args TEXT "
    "NOT NULL, who TEXT NOT NULL, due REAL, tries INTEGER NOT NULL DEFAULT 0, error TEXT "
    "NOT NULL DEFAULT '')",
    "CREATE INDEX jobs_due ON jobs (due)",
    "CREATE TABLE answers (id INTEGER PRIMARY KEY, who TEXT NOT NULL, command BLOB NOT "
    "NULL, at REAL NOT NULL, answer TEXT NOT NULL)",
    "ALTER TABLE jobs ADD COLUMN key TEXT",              # no two jobs have the same
    "CREATE UNIQUE INDEX jobs_key ON jobs (key)",
])

# These follow the entries of section 13.
DIRECTORY_TABLES.extend([
    "ALTER TABLE workspaces ADD COLUMN founder TEXT REFERENCES accounts ON DELETE SET NULL",
    "CREATE INDEX workspaces_by ON workspaces (founder)",
    "UPDATE workspaces SET founder = (SELECT max(account) FROM memberships WHERE workspace "
    "= id AND role = 'owner' GROUP BY workspace HAVING count(*) = 1)",
    "CREATE TABLE links (digest BLOB PRIMARY KEY, kind TEXT NOT NULL, uses INTEGER NOT "
    "NULL, expires REAL NOT NULL, used_by TEXT NOT NULL DEFAULT '', maker TEXT REFERENCES "
    "accounts ON DELETE CASCADE, workspace TEXT, role TEXT, account TEXT REFERENCES "
    "accounts ON DELETE CASCADE, password TEXT, session BLOB REFERENCES sessions ON DELETE "
    "CASCADE, FOREIGN KEY (workspace, maker) REFERENCES memberships ON DELETE CASCADE) "
    "WITHOUT ROWID",
    "CREATE INDEX links_into ON links (workspace, maker)",
    "CREATE INDEX links_of ON links (session)",
    "CREATE TABLE tokens (id TEXT PRIMARY KEY, digest BLOB NOT NULL, account TEXT NOT NULL "
    "REFERENCES accounts ON DELETE CASCADE, workspace TEXT NOT NULL REFERENCES workspaces "
    "ON DELETE CASCADE, name TEXT NOT NULL, writes INTEGER NOT NULL, made REAL NOT NULL, "
    "used REAL NOT NULL DEFAULT 0) WITHOUT ROWID",
    "CREATE INDEX tokens_of ON tokens (account, workspace)",
    "ALTER TABLE workspaces ADD COLUMN deleted REAL NOT NULL DEFAULT 0",
    "CREATE INDEX links_until ON links (expires)",
    "CREATE INDEX workspaces_away ON workspaces (moving) WHERE moving > 0",
])


# -- who owns which table
#
# Objects have an OwnedObjectStore (with --plain, a KnowsOwners), commands and checks an
# OwnedStore. A slice gets a Tables, a view of one of these.

class KnowsOwners(NestedStore):
    """A store that knows which slice owns which table."""

    def __init__(self, path, create: bool = False):
        super().__init__(path, create)
        self.owners = {}                                 # table, in lower case: its slice
        self.judge = whole(Judge)(self.owners)
        self.db.set_authorizer(self.judge)

    def migrate_all(self, schema):
        super().migrate_all(schema)
        self.learn_owners()

    def migrating(self, slice, entries, ran):
        """Return the transaction of a migration: an unenforced one, if it drops a table."""
        if any(["drop" in sql.lower() for sql in entries[ran:]]):
            return unenforced(self, f"slice {slice!r}, entry {len(entries)}")
        return super().migrating(slice, entries, ran)

    def apply(self, slice, entries, number):
        """Run one entry. From now on the slice owns the tables that it makes."""
        self.learn_owners()
        # When a table is renamed, references follow it, unless a later entry makes a new
        # table of that name.
        self.exec(f"PRAGMA legacy_alter_table={makes_way(entries, number):d}")
        made = super().apply(slice, entries, number)
        if re.search(r"\s", "".join(made)):
            raise MigrationError(f"slice {slice!r}, entry {number + 1}: no space is "
                                 "allowed in the name of a table")
        self.owners.update((table.lower(), slice) for table in made)
        return made

    def run_entry(self, slice, sql):
        judge = self.judge
        judge.slice, judge.may, judge.objection = slice, MIGRATE, ""
        try:
            super().run_entry(slice, sql)
        except sqlite3.Error as error:
            why = judge.objection or str(error)
            if why == "no such module: fts5":
                why += "; this Python's SQLite has no full-text search; use another Python"
            raise sqlite3.OperationalError(why) from error
        finally:
            judge.slice = ""

    def learn_owners(self):
        """Read which slice made which table. The server owns the rest, _migrations too."""
        self.owners.clear()
        self.owners.update((table.lower(), "orion") for table in self.tables())
        self.owners.update(sqlite_master="orion", sqlite_temp_master="orion")
        for row in self.query("SELECT slice, tables FROM _migrations"):
            for table in row["tables"].lower().split():
                if not table.startswith("sqlite_"):
                    self.owners[table] = row["slice"]


class OwnedStore(KnowsOwners, GuardedStore):
    """A store for use without a turn. So it can wait for a lock."""
    LOCK_SECONDS = Store.LOCK_SECONDS


class OwnedObjectStore(KnowsOwners, GuardedStore):
    """A store for use in a turn. It waits for no lock, because others wait for the turn."""


@addition
class HasOwners(GuardedObject):
    store_class = OwnedObjectStore


# -- the store that a slice gets

# The beginnings of SQLite's messages about statements that can never run.
WRONG_SQL = ("no such", "near ", "incomplete input", "unrecognized token", "ambiguous",
             "table ", "Incorrect number of bindings", "Error binding parameter")


class Tables(Calls):
    """A store as one slice sees it, while it answers one request.

    A comment puts the slice's name into each statement. Without it, Python's cache of
    compiled statements could run for one slice what SQLite has allowed to another. SQLite
    asks the Judge about each statement once, when it compiles it.
    """

    def __init__(self, store, slice, may):
        self.store = store
        self.slice = slice
        self.may = may
        self.comment = f" /* {slice} may {may} */"
        self.cursor = store.cursor
        self.inserted = 0                                # the id of the last row
        self.thread = threading.get_ident()              # 0: the request is over

    def insert(self, sql, *args):
        """Insert a row, and remember its id for the journal."""
        self.inserted = super().insert(sql, *args)
        return self.inserted

    @contextlib.contextmanager
    def tx(self):
        """A part of the command that can fail without the rest of it."""
        self.check_thread()
        with self.store.tx():
            yield

    def run(self, sql, args):
        """Run it. Raises PermissionError if the slice may not, or sqlite3.Error."""
        self.check_thread()
        judge = self.store.judge
        judge.slice, judge.may, judge.objection = self.slice, self.may, ""
        try:
            return self.store.run(sql + self.comment, args)
        except sqlite3.Error as error:
            judge.slice = ""                             # so that help() may read all
            if judge.objection:
                why = f"slice {self.slice!r} {judge.objection}: {sql}"
                raise PermissionError(why) from error
            if str(error).startswith(WRONG_SQL):
                why = f"{error}, in slice {self.slice!r}: {sql}; {self.help(error)}"
                raise type(error)(why) from None
            raise
        finally:
            judge.slice = ""

    def help(self, error):
        """Return a hint for the author of SQL that can't run."""
        if "binding" in str(error):
            return "give one value for each ? after the SQL: exec(sql, a, b)"
        own = [table for table, slice in self.store.owners.items() if slice == self.slice]
        columns = "SELECT group_concat(name, ', ') FROM pragma_table_info(?)"
        tables = [f"{table} ({self.store.run(columns, (table,))[0][0]})" for table in own]
        return f"its tables: {', '.join(tables) or 'none'}"

    def check_thread(self):
        """Raise RuntimeError after the end of the request, or in another thread."""
        if self.thread != threading.get_ident():
            raise RuntimeError("this store belongs to a request that has ended, or to "
                               "another thread; to write later, use a job or a new request")

    def check_writes(self, what):
        """Raise PermissionError if this store may only read."""
        self.check_thread()
        if self.may != WRITE:
            raise PermissionError(f"{what}, {COMMANDS_ONLY}")


def name_of(function):
    """Return the name of a function, or of the one inside a functools.partial."""
    function = getattr(function, "func", function)
    return getattr(function, "__name__", type(function).__name__)


@addition
class OwnsTables(SliceHost):
    """A host whose slices can use only their own tables. If a command writes, its
    transaction also adds a row to the journal."""
    store_class = KnowsOwners                            # with --plain
    wrote = False                                        # did the last call write?

    def call(self, slice, route, args, viewer, request):
        may = READ if request.method in SAFE else WRITE
        before = self.store.db.total_changes
        store = Tables(self.store, slice, may)
        ctx = self.context(self, store, viewer, request.params, request)
        try:
            response = self.run(route, ctx, args)
        finally:
            ctx.end()
        self.wrote = self.store.db.total_changes != before
        if self.wrote:                                   # no slice can forget the journal
            parts = map(str, args)
            if route.grant == PUBLIC:                    # its path may contain a secret
                parts = ()
            which = response.which or "/".join(parts) or str(store.inserted or "")
            self.journal(viewer, f"{slice}.{name_of(route.run)}", which)
        return response

    def journal(self, viewer, what, which):
        """Add a row to the journal: who did what, and to which row."""
        add_entry(self.store, viewer.signature, what, which)


def add_entry(store, who, what, which):
    store.exec("INSERT INTO journal (at, who, what, which) VALUES (?, ?, ?, ?)",
               time.time(), who, what, which)


@addition
class SparesOldFiles(Workspace):
    def open(self, create=False):
        """Open the file. Raises Refused(422) if create is True and it has rows already: see
        name_draft. A file without rows is what a failed command left behind."""
        super().open(create)
        if create and self.store.one("SELECT 1 FROM journal"):
            self.store.close()
            raise Refused(*TAKEN)


@addition
class EndsWithItsRequest(Context):
    """A context whose store is a Tables."""

    def publish(self, topic):
        self.store.check_writes(f"publishes {topic!r}")
        super().publish(topic)

    def ask(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return function(store, *args). It uses the tables of the slice that exports it.

        Raises LookupError if no slice exports it.
        """
        self.store.check_thread()
        owners = [slice.name for slice in self.host.router.slices
                  if function in slice.exports]
        if not owners:
            raise LookupError(f"{name_of(function)} is not exported in this app; "
                              "add it to Slice(exports=...)")
        store = Tables(self.host.store, owners[0], self.store.may)
        try:
            return function(store, *args)
        finally:
            store.thread = 0

    def end(self):
        self.store.thread = 0
        self.host = None


# -- a migration that rebuilds a table (skip it on a first reading)
#
# To change a table, a migration makes a new one, copies the rows, drops the old one and
# renames the new one (sqlite.org/lang_altertable.html#otheralter). Referring rows stay.

@contextlib.contextmanager
def unenforced(store, last):
    """A transaction that can drop a table while rows still refer to it.

    With foreign_keys on, dropping a table deletes its rows first, and that changes or
    deletes the rows that refer to it. So here references are checked at the end instead.
    Raises MigrationError, which names the last entry: last.
    """
    store.exec("PRAGMA foreign_keys=OFF")                # in a transaction it does nothing
    try:
        with store.tx():
            before = orphans(store)
            yield
            for (child, parent), many in orphans(store).items():
                if many > before.get((child, parent), 0):
                    raise MigrationError(
                        f"{last}: then {many} rows of {child!r} would refer to no row of "
                        f"{parent!r} (in a migration that drops a table, deletes do "
                        "not cascade)")
    finally:
        store.exec("PRAGMA foreign_keys=ON")


def orphans(store):
    """Return how many rows refer to a missing row, by (table, its parent)."""
    return {tuple(row)[:2]: row["many"] for row in store.query(
        'SELECT "table", parent, count(*) AS many FROM pragma_foreign_key_check '
        "GROUP BY 1, 2")}


def makes_way(entries, number):
    """True if the entry renames a table, and later ones make another with its old name and
    drop the renamed one:

        ALTER TABLE cards RENAME TO old; CREATE TABLE cards (...); ...; DROP TABLE old

    Then references to cards have to mean the new table, and not follow the old one
    (sqlite.org/pragma.html, legacy_alter_table).
    """
    words = words_of(entries[number])
    if words[:2] + words[3:5] != ["alter", "table", "rename", "to"]:
        return False
    later = [words_of(sql)[:3] for sql in entries[number + 1:]]
    return (["create", "table", words[2]] in later[:1]
            and ["drop", "table", *words[5:]] in later)


def words_of(sql):
    return sql.lower().translate(str.maketrans('(;"', "   ")).split()


# ==== 28. Settings ========================================================================
# The idea: one value holds all settings. It never changes while the server runs.
# Who uses it: everything in this part. The command line (section 31) fills it in.

class Settings(NamedTuple):
    host: str = "127.0.0.1"
    port: int = 8000                                     # 0: any free one
    data: pathlib.Path = pathlib.Path("data")
    demo: Optional[bool] = None                          # None: see is_for_this_machine
    idle: float = 60.0                                   # s until a workspace sleeps
    awake: int = 0                                       # 0: a quarter of the descriptors
    threads: int = 16
    connections: int = 10_000
    max_workspaces: int = 0                              # of a founder; 0: 20, demo 2,000
    quota: int = 10 * 2 ** 30                            # bytes of one workspace
    backup_every: float = 0.0                            # seconds; 0: never
    keep: int = 24                                       # snapshots
    keep_journal: float = 365 * 86400.0                  # seconds; 0: for ever
    drain: float = 0.0                                   # seconds, before it stops
    log: str = "common"                                  # common, json or off
    slow: float = 0.0                                    # s; log what takes longer; 0: off
    streams: int = 0                                     # pages one may open; 0: 100
    allow_host: Tuple[str, ...] = ()                     # more host names of this server
    trust_proxy: Tuple[str, ...] = ()                    # networks of proxies
    single: Optional[pathlib.Path] = None                # one file instead of a folder
    plain: bool = False                                  # by the edge of Part One
    dev: bool = False                                    # help for the author of an app
    plane: str = ""                                      # "directory" or "data"; "": both
    directory: str = ""                                  # its HOST:PORT, for a data plane
    node_name: str = ""                                  # HOST:PORT; "": host and port
    slices: Sequence[Slice] = (todos,)
    assets: Optional[pathlib.Path] = None                # folder of the app's own files
    brand: Any = None                                    # section 39
    options: Sequence[Any] = ()                          # of the app; section 73
    own: Dict[str, Any] = {}                             # the values of these, by name
    commands: Sequence[Callable[..., Any]] = ()          # of the app
    start: Optional[Callable[[Settings], None]] = None   # called before it listens
    seed: Optional[Callable[[Context], None]] = None     # fills a workspace of the demo

    def setting(self, name: str) -> Any:
        """Return the value of one of the app's options. Raises LookupError."""
        defaults = {option.name: option.default for option in self.options}
        if name in defaults:
            return self.own.get(name, defaults[name])
        raise LookupError(f"the app has no option {name!r}; main(options=...) has "
                          f"{', '.join(defaults) or 'none'}")

    @property
    def key_file(self):
        if self.single:
            return self.single.with_name(f"{self.single.name}.key")
        return self.data / "secret.key"

    @property
    def directory_file(self):
        return self.single or self.data / "directory.db"

    @property
    def workspaces(self):
        """The folder of the tenants' files."""
        return self.data / "workspaces"


LOOPBACK = ("127.0.0.0/8", "::1")


# ==== 29. Server ==========================================================================
# The idea: the loop edge, with everything that other sections add to it.

@dataclasses.dataclass
class FullEnv(Env):
    """start: the first page of a workspace. public returns the path of a public route
    (section 65). regate: the gate for open streams. A node needs another one for them: its
    gate takes the verdict that came with the request, and that verdict is old when a stream
    asks again."""
    settings: Settings = None
    start: str = ""
    regate: Any = ask_the_gate
    public: Callable[[Request], str] = lambda request: ""


# RFC 7239, RFC 9110 (7.6.3), and the headers that proxies used before there was a standard.
PROXY_HEADERS = {"forwarded", "via", "x-forwarded-for", "x-forwarded-proto",
                 "x-forwarded-host", "x-real-ip"}


@addition
class Server(LoopEdge):
    def __init__(self, *args):
        self.broker_kind = whole(Broker)
        self.connection_kind = whole(Connection)
        super().__init__(*args)
        # The port is known only now, because settings.port may be 0: any free one.
        name = self.settings.node_name or f"{self.settings.host}:{self.server_port}"
        self.settings = self.settings._replace(node_name=name)
        self.use(dataclasses.replace(self.env, settings=self.settings))

    def add_doors(self, doors):
        self.env.doors.update(doors)

    def use(self, env):
        super().use(env)
        self.regating = dataclasses.replace(self.deciding, gate=env.regate)

    def decide(self, request, env):
        """Ask the gate again for an upload (section 67), as for a stream: an upload can
        take long to arrive, and then the verdict that came with it is old."""
        if request.spool:
            env = self.regating
        return super().decide(request, env)

    def is_from_here(self, request):
        """True if the client is on this machine. A proxy here asks for other clients: most
        proxies say so in a header, and the rest pass on the Host that the client sent."""
        if request.headers.keys() & PROXY_HEADERS:
            return False
        if in_networks(request.peer, self.settings.trust_proxy):
            return False
        host = without_port(request.headers.get("host", ""))
        asked_here = host == "localhost" or in_networks(host.strip("[]"), LOOPBACK)
        return asked_here and in_networks(request.peer, LOOPBACK)

    def most_streams(self):
        if self.settings.demo and not self.settings.streams:
            return self.settings.connections
        return super().most_streams()


# ==== 30. Roots ===========================================================================
# The idea: the composition root of the product: two planes in one process. The sections
#   Single and Nodes add further roots.

def plain_root(settings):
    """The root of --plain: Part One, and what other sections add to its classes."""
    if settings.key_file.exists():                       # checks that only we can read it
        load_keys(settings.key_file)
    env = plain_planes(settings.data, settings.idle, settings.slices, bool(settings.demo),
                       whole)
    env.workspaces.settings = settings
    for change in PLAIN:
        change(env)
    return env


def compose(settings) -> FullEnv:
    """Compose the server. Raises BadSlice or MigrationError if a slice is wrong."""
    for check in CHECKS:
        check(settings)
    for wanted, root in ROOTS:
        if wanted(settings):
            return root(settings)
    return two_planes(settings)


def two_planes(settings):
    """Compose one Directory, a Workspace for each tenant, and a worker in front."""
    settings, fresh, keys = prepare_data(settings)
    router = workspace_router(settings)
    workspaces = workspaces_of(settings, router)
    build = directory_builder(EdgeDirectory, settings, keys, workspaces)
    control = whole(GuardedNamespace)("directory", settings.data, float("inf"), build)
    env = set_up(control.get("directory"), workspaces, settings, fresh, DEMO_WORKSPACES)
    check_ledger(settings, router)
    return env


def set_up(directory, workspaces, settings, fresh, demo):
    """Open the Directory, and create it first if it is fresh. Return the env.

    So a fault of its file is found now, and not by a later request.
    """
    directory.namespace.settings = settings
    if fresh:
        directory.namespace.create(directory.id)
    directory.ask("/_version")
    env = full_env(directory, workspaces, settings)
    if fresh and settings.demo:
        seed(env, demo, todos in settings.slices)
        for seed_more in APP_SEEDS:
            seed_more(env, demo)
    return env


def directory_builder(kind, settings, keys, workspaces):
    return functools.partial(
        whole(kind), router=directory_router(), pages=pages_of(settings.slices), keys=keys,
        workspaces=workspaces, demo=bool(settings.demo))


def prepare_data(settings):
    """Return the settings, whether the deployment is fresh, and the keys.

    An existing deployment without personas is not a demo, even with --demo.
    """
    if settings.single:
        private_folder(settings.data)
        fresh = not settings.directory_file.exists()
        if fresh and not settings.key_file.exists():
            make_key(settings.key_file)
    else:
        fresh = prepare(settings.data, settings.directory_file, settings.key_file)
    keys = load_keys(settings.key_file)
    demo = settings.demo
    if demo and not fresh:
        with OwnedStore(settings.directory_file) as store:
            demo = store.one("SELECT 1 FROM accounts WHERE persona") is not None
    return settings._replace(demo=demo), fresh, keys


def load_keys(path):
    """Return the keys in the file. Raises Unusable if others can read it, or we cannot."""
    readable = os.name == "posix" and path.exists() and os.stat(path).st_mode & 0o077
    if readable and not ignores_modes(path.parent):
        raise Unusable(f"{path} can be read by others; chmod 600 it, and consider "
                       "`keys rotate`")
    try:
        return read_keys(path)
    except OSError as error:
        raise Unusable(f"{path} can't be read ({error.strerror}); run this as its "
                       "owner, or chown it to the user who runs the server") from error


@functools.cache
def ignores_modes(folder):
    """True if the file system gives each file the same mode (exFAT, WSL's /mnt/c)."""
    probe = folder / f"mode-{secrets.token_hex(8)}"
    os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    try:
        ignored = os.stat(probe).st_mode & 0o077 != 0
    finally:
        probe.unlink()
    if ignored:
        log(f"warning: the file system of {folder} ignores modes, so others on this "
            "machine may be able to read all files there; if that matters, use another "
            "file system")
    return ignored


def workspace_router(settings):
    return whole(QuickRouter)([welcome, *settings.slices])


def directory_router():
    """Return a router with all DIRECTORY_SLICES as one slice, because they share tables.
    If Part One and a section have the same address, the section answers."""
    slices = [*DIRECTORY_SLICES, directory]
    live = [row for slice in slices for row in slice.live]
    outside = Slice("directory", DIRECTORY_TABLES, live, all_routes(slices))
    return whole(QuickRouter)([outside])


def workspaces_of(settings, router):
    build = functools.partial(whole(EdgeWorkspace), router=router,
                              pages=pages_of(settings.slices))
    most = settings.awake or awake_by_default()
    workspaces = whole(GuardedNamespace)("workspace", settings.workspaces, settings.idle,
                                         build, most=most)
    workspaces.settings = settings
    return workspaces


def awake_by_default():
    """Return how many may be awake: each takes 3 descriptors; a quarter is for sockets."""
    if resource is None:
        return 256
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if descriptors == resource.RLIM_INFINITY:            # which is -1
        return 1024
    return min(1024, descriptors // 4)


class Ledger(OwnedStore):
    """The Directory's file. It records the migrations of workspaces, and runs none."""

    def apply(self, slice, entries, number):
        return set()


def check_ledger(settings, router):
    """Raise MigrationError if a slice's migrations do not continue the recorded ones.

    So a mistake is found when the server starts, before it opens the files of tenants.
    """
    with Ledger(settings.directory_file) as store:
        for name, entries in router.schema:
            store.migrate(f"workspace/{name}", entries)


def full_env(directory, workspaces, settings):
    doors = {**DOORS}
    if not settings.single and not settings.plane:       # with these, it makes no file here
        doors["/workspaces"] = create_workspace_with_file
    return FullEnv(directory, workspaces, doors, settings=settings,
                   start=pages_of(settings.slices)[0].path)


@addition
class KnowsWorkspaces(EdgeDirectory):
    def own_workspace(self, request):
        """Return the row of a workspace, found by its id or name, or None."""
        row = self.store.one("SELECT id, name, coalesce(title, name) AS title, node, "
                             "moving FROM workspaces WHERE name IS NOT NULL AND (id = ? OR "
                             "name = ?)", request.params.get("id"),
                             request.params.get("name"))
        return row and dict(row)


# ==== 31. Command line ====================================================================
# The idea: flags, or ORION_* variables, become Settings. An operator's commands change the
#   files of a deployment, whether its server runs or not: SQLite lets several processes use
#   a file, and the server checks each second if another one wrote to the Directory.
# It promises: a command that fails prints one line on standard error, and exits with 2.
#
# main() calls read_command_line, which reads the words, and do, which runs a command or
# serves (serve_alone, serve).

def matching(pattern, hint, read=str):
    """Return a type for argparse. It checks a text by the pattern and converts it by read.

    If read returns None, the text is refused, too.
    """
    def kind(text):
        value = read(text) if re.fullmatch(pattern, text) else None
        if value is None:
            raise argparse.ArgumentTypeError(f"{text!r} is not {hint}")
        return value
    return kind


UNITS = {"": 1, "ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


def read_size(text):
    digits = text.rstrip("KMGTkmgt")
    return int(digits) * 1024 ** " KMGT".index(text[len(digits):].upper() or " ")


def read_seconds(text):
    digits = text.rstrip("smhd")
    return float(digits) * UNITS[text[len(digits):]]


def read_port(text):
    return int(text) if int(text) < 65536 else None


def read_address(text):
    return text if HOST.fullmatch(text)[1] else None     # refused without a port


a_size = matching("[0-9]+[KMGTkmgt]?", "a size: use 500M or 10G, for example", read_size)
a_time = matching("([0-9]+[.]?[0-9]*|[.][0-9]+)(ms|[smhd])?",
                  "a time: use 90, 100ms, 15m or 1h, for example", read_seconds)
a_port = matching("[0-9]{1,5}", "a port: use 0 to 65535", read_port)
an_address = matching(HOST.pattern, "an address: use HOST:PORT", read_address)
a_listener = matching(f"[0-9]{{1,5}}|{HOST.pattern}",
                      "a port or an address: use 80 or 127.0.0.1:80, for example")
a_number = matching("[0-9]{1,9}", "a whole number: use 0 or more", int)
at_least_1 = matching("[0-9]{0,8}[1-9][0-9]*", "a whole number: use 1 or more", int)
a_plane = matching("(directory|data)?", "a plane: use directory or data")
keep_or_drop = matching("keep|drop", "an answer: use keep or drop")
a_log = matching("common|json|off", "a kind of log: use common, json or off")


def several(text):
    return tuple(filter(None, map(str.strip, text.split(","))))


def networks(text):
    try:
        return tuple([str(ipaddress.ip_network(network)) for network in several(text)])
    except ValueError as error:
        hint = f"{error}: use 10.0.0.0/8, for example, or an address"
        raise argparse.ArgumentTypeError(hint) from error


HOST_NAME = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")


def host_names(text):
    """Return names as browsers send them: in lower case, and in ASCII (RFC 5890, 2.3.2.1).

    A name has no port here, because the port of a request does not matter.
    """
    names = tuple([".".join(map(in_ascii, name.lower().rstrip(".").split(".")))
                   for name in several(text)])
    for name in names:
        if not HOST_NAME.fullmatch(name):
            raise argparse.ArgumentTypeError(
                f"{name!r} is not a host name: use todo.example.org, for example, without "
                "scheme, port or *; write each name in full")
    return names


def in_ascii(label):
    if label.isascii():
        return label
    return f"xn--{unicodedata.normalize('NFC', label).encode('punycode').decode()}"


# Flags, their help texts, and their types. Their defaults are in Settings.
OPTIONS = (
    ("--host", "address to listen on", str),
    ("--port", "port to listen on; 0: any free one", a_port),
    ("--data", "folder with all state", pathlib.Path),
    ("--single", "one file that holds everything, for one workspace, in place of the data "
     "folder", pathlib.Path),
    ("--demo", "personas and workspaces to click through; by default, a new data folder "
     "has them on a loopback address with no proxy in front", bool),
    ("--plain", "serve with the edge of Part One, without passwords and limits: to read "
     "the code, or for small trusted networks", bool),
    ("--dev", "while you write an app: start again when a file changes, and show errors, "
     "with code and rows, in the browser; only on this machine", bool),
    ("--idle", "seconds until an unused workspace goes to sleep", a_time),
    ("--awake", "the most workspaces awake at a time, three descriptors each; 0: a quarter "
     "of the descriptors, at most 1,024", a_number),
    ("--quota", "bytes that the file of a workspace may have, such as 500M or 10G", a_size),
    ("--max-workspaces", "workspaces that one account may create; 0: 20, in the demo 2,000",
     a_number),
    ("--streams", "pages that one account may have open; 0: 100, in the demo as many as "
     "connections", a_number),
    ("--connections", "the most connections at a time; more get a 503", at_least_1),
    ("--allow-host", "host names of this server, separated by commas", host_names),
    ("--trust-proxy", "networks, separated by commas, of the proxies to trust for "
     "X-Forwarded-For and X-Forwarded-Proto", networks),
    ("--plane", "directory or data: run only one plane, with the other in other processes",
     a_plane),
    ("--directory", "HOST:PORT of the directory, for --plane data", str),
    ("--node-name", "HOST:PORT by which the directory knows this data plane; by default "
     "the address it listens on", str),
    ("--backup-every", "seconds, or a time such as 1h: how often to copy changes to "
     "backups in the data folder; 0: never", a_time),
    ("--keep", "backups to keep", at_least_1),
    ("--keep-journal", "seconds, or a time such as 365d: how long the journals keep who "
     "did what; 0: for ever", a_time),
    ("--drain", "seconds for which a stopping server answers 503, also to /healthz, so "
     "that a load balancer notices first", a_time),
    ("--log", "access log on standard output: common, json or off", a_log),
    ("--slow", "a time such as 100ms: log to standard error what takes longer, at most ten "
     "lines a second; 0: nothing", a_time),
)

# The arguments of commands, for argparse.
ARGUMENTS = {
    "name": {"help": "of the workspace", "type": slug},
    "title": {"help": "its name, as people write it; its address is made from it",
              "metavar": "name"},
    "new": {"help": "the new name, as people write it"},
    "workspace": {"help": "its name", "type": slug},
    "account": {"help": "its name", "type": account_name},
    "role": {"help": f"one of {', '.join(ROLES)}"},
    "size": {"help": "such as 500M or 10G", "type": a_size},
    "file": {"help": "path of the file", "type": pathlib.Path},
    "folder": {"help": "path of the folder", "type": pathlib.Path},
    "address": {"help": "HOST:PORT of the node", "type": an_address},
    "placed": {"help": "name of the workspace, or HOST:PORT of a lost node"},
    "method": {"help": "show what all sections add to this one, like EdgeWorkspace.handle",
               "nargs": "?"},
    "--operator": {"help": "may open the console, and see pages as other accounts",
                   "action": "store_true"},
    "--owner": {"help": "account that owns it", "type": account_name},
    "--now": {"help": "keep no copy", "action": "store_true"},
    "--repair": {"help": "first remove what interrupted commands left behind, and make "
                 "files private", "action": "store_true"},
    "--move": {"help": "move it elsewhere: from now on nobody can open it here",
               "action": "store_true"},
    "--name": {"help": "name to use instead of the one in the file"},
    "--jobs": {"help": "keep or drop the jobs in the file: if kept, they run here, too",
               "type": keep_or_drop},
    "--at": {"help": "folder of a snapshot: data/backups/... or a backup",
             "type": pathlib.Path, "required": True},
    "--new": {"help": "name of the new workspace; by default the name and the snapshot's"},
    "--directory": {"help": "HOST:PORT of the directory", "type": an_address,
                    "required": True},
    "--node": {"help": "HOST:PORT of a node; repeat it for each", "type": an_address,
               "action": "append", "required": True},
    "--once": {"help": "show it once, then exit", "action": "store_true"},
    "--every": {"help": "how often to ask, such as 500ms or 5s; by default 2s",
                "type": a_time, "default": 2.0},
    "--listen": {"help": "port of the proxy; by default 80", "type": a_listener},
}


class Parser(argparse.ArgumentParser):
    words = ()

    def parse_args(self, words):
        self.words = words
        return super().parse_args(words)

    def error(self, message):
        _, _, unknown = message.partition("unrecognized arguments: ")
        if {flag for flag, *_ in OPTIONS} & {*unknown.split()}:
            message += "; put flags of the server before the command"
        message = self.unknown_flag(message) or message
        self.exit(2, f"orion: {message}; --help lists commands and options\n")

    def unknown_flag(self, message):
        """Return a message about an unknown flag, or "". Of `--bind 0.0.0.0` argparse says
        only that 0.0.0.0 is no command."""
        _, _, rest = message.partition("argument command: invalid choice: '")
        word = rest.partition("'")[0]
        for flag, value in zip(self.words, self.words[1:]):
            known = flag in self._option_string_actions or "=" in flag
            if value == word and flag.startswith("-") and not known:
                return f"there is no option {flag}"
        return ""


def read_command_line(argv, app=None):
    """Return the settings, and the arguments of a command. Their verb is "" to serve.

    argv: None means the words with which this process was started. app: settings, with the
    arguments of main(). Each of APP_PARSERS adds an app's own options or commands to the
    parser, and returns a function read(settings, given), which puts them into the settings.
    """
    app = app or Settings()
    parser = Parser(description="A live, multi-tenant web server in one file. Without a "
                    "command, it serves.", epilog="Every option is an environment "
                    "variable, too: ORION_PORT=80 is --port 80.")
    parser.set_defaults(verb="")
    for flag, help, kind in OPTIONS:
        name = name_of_flag(flag)
        default = from_environment(flag) or getattr(Settings(), name)
        add_flag(parser, flag, kind, default, name, help)
    words = sys.argv[1:] if argv is None else argv
    commands = add_verbs(parser, words)
    readers = [add(parser, commands, app) for add in APP_PARSERS]
    given = parser.parse_args(words)
    said = {name: value for name, value in vars(given).items() if name in Settings._fields}
    settings = app._replace(**said)
    for read in readers:
        settings = read(settings, given)
    if settings.single:
        settings = settings._replace(data=settings.single.parent)
    if settings.demo is None:
        settings = settings._replace(demo=is_for_this_machine(settings))
    return settings, given


def is_for_this_machine(settings):
    """True if only this machine can reach the server. (Behind a proxy, others can.)"""
    here = settings.host == "localhost" or in_networks(settings.host, LOOPBACK)
    proxied = settings.allow_host or settings.trust_proxy or settings.plane
    return here and not proxied


def name_of_flag(flag):
    return flag[2:].replace("-", "_")


def add_flag(parser, flag, kind, default, dest, help):
    """Add a flag and return its argparse action. kind: bool, or a type. default may be text
    from the environment."""
    if default:
        help += f" (default: {default})"
    help = help.replace("%", "%%")
    if kind is not bool:
        return parser.add_argument(flag, help=help, default=default, type=kind, dest=dest,
                                   metavar=name_of_flag(flag).upper())
    if isinstance(default, str):
        default = default.lower() not in ("0", "no", "off", "false")
    return parser.add_argument(flag, help=help, default=default, dest=dest,
                               action=argparse.BooleanOptionalAction)


def from_environment(flag):
    """Return the value of this flag in the environment, or "".

    For a service called orion, Kubernetes sets variables of its own. One of them has the
    name of one of ours: ORION_PORT=tcp://10.96.14.2:8000.
    """
    name = f"ORION_{name_of_flag(flag).upper()}"
    value = os.environ.get(name, "")
    if name == "ORION_PORT" and "://" in value:
        print(f"orion: {name}={value} is ignored, because Kubernetes sets it for a "
              "service; set the port with --port", file=sys.stderr)
        return ""
    return value


def add_verbs(parser, given_words):
    """Add all commands. Return the object to which an app's own commands are added.

    If the words do not name a group, add only its name: that saves 10 ms at each start.
    """
    common = flags_of_all()
    groups = {"": parser.add_subparsers(title="commands", metavar="command")}
    for words, one in sorted(VERBS.items()):
        group, _, word = words.rpartition(" ")
        if group not in groups:
            own = [other.split()[1] for other in sorted(VERBS)
                   if other.startswith(f"{group} ")]
            parent = groups[""].add_parser(
                group, help=f"{', '.join(own)}; see {group} --help")
            groups[group] = parent.add_subparsers(required=True, metavar="command")
        if group and group not in given_words:
            continue
        sub = groups[group].add_parser(word, help=one.help, description=one.help,
                                       parents=[common])
        sub.set_defaults(verb=words, run=one.run)
        for argument in one.arguments:
            sub.add_argument(argument, **ARGUMENTS[argument])
    return groups[""]


def flags_of_all():
    """Return a parser with the flags that every command takes."""
    common = argparse.ArgumentParser(add_help=False)
    for flag in ("--data", "--single"):
        common.add_argument(flag, type=pathlib.Path, default=argparse.SUPPRESS,
                            help="the folder, or the one file, with all state")
    return common


# -- what all commands need

@contextlib.contextmanager
def locked(folder, taken):
    """Let one process at a time use a folder.

    Raises Unusable if the folder can't be used or, with the text taken, if another process
    uses it.
    """
    try:
        private_folder(folder)
        if not os.access(folder, os.R_OK | os.W_OK):
            raise PermissionError("not writable")
    except OSError as error:
        raise Unusable(f"the data folder {folder} can't be used ({error.strerror or error}"
                       "); name another with --data") from error
    if not fcntl:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        take_lock(handle, taken)
        yield
    finally:
        os.close(handle)


def take_lock(handle, taken):
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Unusable(taken) from error


BEGINNINGS = ("account add", "workspace import", "node add")     # they make a deployment


def check_there(settings, or_node=False):
    """Raise Unusable if there is no deployment, or if it is another user's. or_node: accept
    a node, which has no Directory."""
    there = settings.directory_file.exists()
    if not there and not (or_node and settings.workspaces.exists()):
        raise Unusable(f"there is no deployment in {settings.data}; name its folder with "
                       "--data, or create one with account add")
    load_keys(settings.key_file)


def looked_up(settings, read):
    """Return read(store), called with the store of the Directory.

    The file may be of an older version, so migrations run first; but they are not
    committed, so the file stays as it is. The lock is released before anything is printed,
    because a pager could hold it for long.
    """
    check_there(settings)
    with OwnedStore(settings.directory_file) as store:
        store.begin()
        store.migrate_all(directory_router().schema)
        return read(store)


@contextlib.contextmanager
def opened(settings, given=None, which=""):
    """Yield the Directory's store, and the env around it.

    A command (given) is one transaction. The journal records it with its arguments, or with
    which. Nobody can sign in before it ends, so print and ask nothing inside. Without a
    command, nothing is locked. Raises Unusable if there is no deployment, except for the
    BEGINNINGS, which make one.
    """
    what = given.verb if given else ""
    if what not in BEGINNINGS:
        check_there(settings)
    env = compose(settings._replace(demo=False, plane=""))
    with OwnedStore(settings.directory_file) as store, \
            store.tx() if given else contextlib.nullcontext():
        yield store, env
        if given:
            which = which or " ".join([str(vars(given)[name]) for name in
                                       VERBS[what].arguments if "--" not in name])
            add_entry(store, "(command line)", what, which)


def check_new(path):
    if path.exists():
        raise Unusable(f"{path} exists already; choose another name")


def row_of(store, table, name, column="name"):
    row = store.one(f"SELECT * FROM {table} WHERE {column} = ?", name)
    if row is None:
        raise Unusable(f"there is no {table[:-1]} {name}; {table[:-1]} list shows all")
    return row


def table(rows):
    for row in rows:
        print(*row, sep="\t")


@verb("new", "write a file with a small slice, to start your own app from", "file")
def new(settings, given):
    check_installation()
    check_new(given.file)
    given.file.write_text((TEMPLATES / "app.py.txt").read_text("utf-8"), "utf-8")
    print(f"{given.file}: a guestbook; python3 {given.file} serves it")


# -- to serve

FAILURES = (Refused, Unusable, MigrationError, OSError, sqlite3.Error, EOFError, ValueError,
            OverflowError)


@public
def main(slices: Sequence[Slice] = (todos,), argv: Optional[Sequence[str]] = None, *,
         assets: Optional[pathlib.Path] = None, brand: Any = None,
         options: Sequence[Any] = (), commands: Sequence[Callable[..., Any]] = (),
         start: Optional[Callable[[Settings], None]] = None,
         seed: Optional[Callable[[Context], None]] = None) -> int:
    """Run a command or the server. Return the exit status: 0; 1 if a check found something;
    2 with one line on standard error.

    assets: a folder (section 38). brand: see section 39. options and commands of the app
    are added to the command line (section 73). start(settings) is called before the server
    listens, seed(ctx) for each workspace of a new demo.
    """
    for name in ("stdin", "stdout", "stderr"):           # None: the process has none
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "r+"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app = Settings(slices=slices, assets=assets, brand=brand, options=options,
                   commands=commands, start=start, seed=seed)
    try:
        status = do(*read_command_line(argv, app)) or 0
        sys.stdout.flush()                               # here a failure is still reported
        return status
    except KeyboardInterrupt:                            # at the question for a password
        return 130
    except BrokenPipeError:                              # the reader, as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)     # Python flushes once more at exit
        return 141
    except FAILURES as error:
        print(f"orion: {in_one_line(error)}", file=sys.stderr)
        return 2


def run_script():
    """Exit with what main() returns, for `python3 orion.py`.

    While a script runs, Python keeps its syntax tree: 35 MB here, half of the memory that
    the server needs before its first visitor. When an exception ends the script, Python
    drops the tree and calls sys.excepthook. So main() is called there.
    """
    if sys._getframe(1).f_back:                          # python -m, a debugger: no tree
        sys.exit(main())
    sys.excepthook = functools.partial(after_script, __file__)
    raise SystemError("the script has ended")


def after_script(file, *_):
    global __file__
    __file__ = file                                      # CPython 3.14 has removed it
    sys.excepthook = sys.__excepthook__
    try:
        status = main()
    except Exception:                                    # a fault of ours
        traceback.print_exc()
        status = 1
    sys.exit(status)


def in_one_line(error):
    """Return an error as one line; for one from an app's function, with type and place."""
    if isinstance(error, EOFError):                      # input ended at a question
        return "nothing was typed"
    frames = frames_of_app(error)
    if not frames or isinstance(error, (Refused, Unusable, MigrationError)):
        return str(error)
    return f"{type(error).__name__}: {error} ({frames[-1].filename}:{frames[-1].lineno})"


def do(settings, given):
    roots = [name for name in ("plain", "single", "plane") if getattr(settings, name)]
    if len(roots) > 1:
        raise Unusable(f"--{roots[0]} can't be combined with --{roots[1]}; leave one of "
                       "them out")
    if settings.plane == "data" and given.verb in NODE_VERBS:
        return NODE_VERBS[given.verb](settings, given)
    if given.verb:
        return given.run(settings, given)
    for wanted, way in WAYS_TO_SERVE:
        if wanted(settings):
            return way(settings)
    serve_alone(settings)


def serve_alone(settings):
    """Serve, if no other server uses the folder: with two, each would act as if it were the
    only writer of a tenant's file."""
    with locked(settings.data, f"another server uses the data folder {settings.data}; stop "
                               "it, or name another folder with --data"):
        serve(settings)


NEEDED_SQLITE = (3, 30)                                  # for FILTER
NAMED_TEMPLATE = re.compile(r'\btemplate\("([\w.]+)"\)')
NAMED_FILE = re.compile(r'TEMPLATES / "([\w.]+)"')


def check_installation():
    """Raise Unusable if templates/ or SQLite does not fit this version of orion.py."""
    if sqlite3.sqlite_version_info < NEEDED_SQLITE:
        needed = ".".join(map(str, NEEDED_SQLITE))
        raise Unusable(f"this Python has SQLite {sqlite3.sqlite_version}, but {needed} or "
                       "later is needed; use a newer Python")
    text = pathlib.Path(__file__).read_text("utf-8")
    files = [*NAMED_FILE.findall(text), *[path[1:] for path in ASSETS]]
    try:
        for name in NAMED_TEMPLATE.findall(text):
            template(name)
        for name in files:
            (TEMPLATES / name).read_bytes()
        as_browser = Request("GET", "/", headers={"accept": "text/html"})
        refusal(as_browser, Refused(*NOTHING_HERE))      # a page, to fill the layout
    except OSError as error:
        raise Unusable(f"{error.filename}: {error.strerror}; put the folder templates/ "
                       "that came with this orion.py next to it") from error
    except (KeyError, ValueError) as error:
        raise Unusable(f"{TEMPLATES} belongs to another version of orion.py, or was "
                       f"changed ({error}); copy the one that came with it") from error


def serve(settings):
    check_installation()
    take_all_descriptors()
    if settings.plain:
        for check in (check_plain, *CHECKS):
            check(settings)
        return serve_plain(plain_root(settings), settings.host, settings.port)
    for prepare_process in BEFORE_SERVING:
        prepare_process()
    env = compose(settings)
    if not settings.single:
        env.workspaces.tidy()
    if settings.start:
        settings.start(env.settings)
    server = bound(settings, lambda: whole(LoopEdge)(env, env.settings))
    for number in stop_signals():
        signal.signal(number, lambda number, _: stop_or_leave(server, number))
    signal.set_wakeup_fd(server.waker.fileno())
    say_where(server)
    notify("READY=1")
    server.serve_forever()
    signal.set_wakeup_fd(-1)                             # because the waker closes next
    server.server_close()


HEEDED_BY_PLAIN = ("--host", "--port", "--data", "--demo", "--plain", "--idle")


def check_plain(settings):
    """Raise Unusable for a flag that would have no effect."""
    for flag, *_ in OPTIONS:
        name = name_of_flag(flag)
        if flag not in HEEDED_BY_PLAIN \
                and getattr(settings, name) != Settings._field_defaults[name]:
            raise Unusable(f"--plain can't be combined with {flag}; leave one of them out")


def take_all_descriptors():
    """Raise this process's limit as far as it may: each open page takes a descriptor."""
    if resource:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(OSError, ValueError):   # refused: then there are fewer
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def say_where(server):
    host = server.settings.host
    host = f"[{host}]" if ":" in host else host
    address = f"http://{host}:{server.server_port}"
    print(f"orion: {address}", flush=True)
    if server.settings.demo:
        print("orion: demo: open the address and choose a persona; bob and carol share the "
              "workspace acme", flush=True)
    for say in AT_START:
        say(server, address)


def bound(settings, make):
    """Return the server that make() returns. Raises Unusable if it can't listen."""
    try:
        return make()
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        raise Unusable(f"can't listen on {where} ({error.strerror or error}); choose "
                       "another address with --host or --port") from error


def stop_or_leave(server, number):
    """Stop for a signal. A second one ends the process at once, with requests in flight;
    but not a second SIGHUP, because a closed terminal may send several."""
    if server.stopping and number in (signal.SIGINT, signal.SIGTERM):
        os._exit(1)
    server.stop()
    notify("STOPPING=1")
    if server.draining:
        server.call(log, f"stops in {server.settings.drain:g} s (--drain) and answers 503 "
                         "until then; press Ctrl+C or send SIGTERM again to end it at once")


def notify(state):
    """Tell systemd the state, if it asks for that (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):                          # Linux: not in the file system
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link, \
            contextlib.suppress(OSError):
        link.sendto(state.encode(), address)


# #### For slices ##########################################################################

# ==== 32. Slice checks ====================================================================
# The idea: the server refuses to start with a slice that can't work, and says why.

class BadSlice(Unusable):
    """A slice can't work as it is written; the text says which one and why."""


PATH = re.compile(r"(/[A-Za-z0-9][\w.~-]*)(/[\w.~-]+|/<(int:)?\w+>)*")


def addresses(row):
    """Return (method, path) for each request that a Live or a Route answers."""
    routes = row.routes() if type(row) is Live else [row]
    return [(route.method, PART_OF_PATH.sub("<>", route.path)) for route in routes]


def address_of(row):
    if type(row) is Live:
        return f"Live {row.path}"
    return f"{row.method} {row.path}" if type(row) is Route else f"{row!r:.99}"


def wrong_with(row, kind, grants):
    """Return why a Live or a Route could never work, or ""."""
    if type(row) is not kind:
        return f"it is not a {kind.__name__}; {NEEDS_COMMA}"
    if kind is Live and row.grant == PUBLIC:
        return "a public page has no stream; make it a Route that returns plain_page()"
    if not PATH.fullmatch(row.path):
        return "a path looks like /things, /things/<id> or /things/<int:id>"
    if row.path.split("/")[1] == "members":
        return "/members belongs to the Directory; choose another path"
    if row.grant not in {*grants, PUBLIC, ACCOUNT, MEMBER}:
        return (f"no role has the grant {row.grant!r}; give it to one: "
                f'orion.ROLES["owner"] += ({row.grant!r},)')
    if kind is Live:
        return wrong_with_live(row)
    if row.method not in METHODS:
        return f"the method has to be one of {', '.join(METHODS)}"
    return wrong_with_call("run", row.run, "ctx", *part_names(row.path))


def part_names(path):
    return [name for _, name in PART_OF_PATH.findall(path)]


def wrong_with_live(live):
    if type(live.regions) not in (tuple, list) or not live.regions:
        return (f"regions has to be a tuple; {NEEDS_COMMA}: "
                f'Live({live.path!r}, {live.grant!r}, "Title", '
                '(Region("topic", show),), page)')
    if live.is_tab and ("<" in live.path or type(live.title) is not str):
        return ("a tab has one address, and text as its title; write tab=False if the path "
                "has <parts> or the title is a function")
    parts = part_names(live.path)
    regions = [f"region {number}" for number in range(len(live.regions))]
    whys = [wrong_with_params(live.params)]
    whys += [wrong_with_region(region, live) for region in live.regions]
    whys.append(wrong_with_call("page", live.page, "ctx", *regions, *parts))
    if type(live.title) is not str:
        whys.append(wrong_with_call("title", live.title, "ctx", *parts))
    return next(filter(None, whys), "")


def wrong_with_params(params):
    if type(params) is not dict:
        return 'params has to be a dict of patterns, such as {"show": "open|done"}'
    for name, pattern in params.items():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            return f"the pattern of {name!r} in params is not valid ({error})"
    return ""


def wrong_with_region(region, live):
    if type(region) is not Region:
        return f"{region!r:.60} is not a Region(topic, show)"
    if type(region.topic) is not str:
        return f"a topic has to be text, not {region.topic!r:.60}"
    parts = part_names(live.path)
    others = set(part_names(region.topic)) - set(parts)
    if others:
        return (f"the topic {region.topic!r} has <{others.pop()}>, but the path does not; "
                "use a part of the path")
    if region.each not in ("role", "account"):
        return f'each has to be "role" or "account", not {region.each!r}'
    whys = [wrong_with_call("show", region.show, "ctx", *parts)]
    if region.data:
        whys.append(wrong_with_call("data", region.data, "ctx", *parts))
    return next(filter(None, whys), "")


def wrong_with_call(what, function, *given):
    """Return why a function of a slice can't be called with these arguments, or ""."""
    if not callable(function):
        return f"{what} can't be called; give a function"
    name = name_of(function)
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        return f"{name} is async; write def, and do long work in a job"
    if inspect.isgeneratorfunction(function):
        return f"{name} yields; return the whole result instead"
    with contextlib.suppress(ValueError):                # one in C may have no signature
        signature = inspect.signature(function)
        try:
            signature.bind(*given)
        except TypeError:
            return f"{name}{signature} does not fit the call {name}({', '.join(given)})"
    return ""


def check_slices(settings):
    """Raise BadSlice for mistakes that would show only later, or never."""
    if "public" in ROLES:
        raise BadSlice("in orion.ROLES: clients without a role have the role public; "
                       "choose another name")
    grants = {grant for role in ROLES.values() for grant in role}
    names = {"orion", "directory", "welcome"}
    taken = {}                                           # by address: who answers there
    for slice in settings.slices:
        if type(slice) is not Slice:
            raise BadSlice(f"{slice!r:.99}: slices has to be a list of Slice")
        check_commas(slice)
        if not re.fullmatch(r"[A-Za-z_][\w-]*", slice.name) or slice.name in names:
            raise BadSlice(f"slice {slice.name!r}: the name of a slice is one word that no "
                           "other slice has, and not orion, directory or welcome")
        names.add(slice.name)
        check_rows(slice, grants, taken)


def check_commas(slice):
    for name in ("migrations", "live", "routes", "jobs", "exports"):
        if type(getattr(slice, name)) not in (tuple, list):
            raise BadSlice(f"slice {slice.name!r}: {name} has to be a tuple; {NEEDS_COMMA}")


def check_rows(slice, grants, taken):
    rows = [(Live, row) for row in slice.live] + [(Route, row) for row in slice.routes]
    for kind, row in rows:
        why = wrong_with(row, kind, grants)
        if why:
            raise BadSlice(f"slice {slice.name!r}, {address_of(row)}: {why}")
        for address in addresses(row):
            if address in taken:
                raise BadSlice(f"slice {slice.name!r}, {' '.join(address)}: "
                               f"{taken[address]} already answers there; choose another "
                               "path")
            taken[address] = f"slice {slice.name!r}, {row.path}"


class ScratchStore(OwnedStore):
    """A store whose file need not last. It waits for no disk, which saves a start 30 ms."""
    SETUP = OwnedStore.SETUP.replace("WAL", "MEMORY").replace("FULL", "OFF")


def check_tables(settings):
    """Make all tables in a temporary file. Raise MigrationError if they clash."""
    schema = Router([welcome, *settings.slices]).schema
    with tempfile.TemporaryDirectory() as folder:
        with ScratchStore(pathlib.Path(folder, "tables.db"), create=True) as store:
            store.migrate_all(schema)
            check_references(store)


REFERENCES = """SELECT lower(one.name) AS child, lower("table") AS parent FROM sqlite_master
                AS one, pragma_foreign_key_list(one.name) WHERE type = 'table'"""


def check_references(store):
    """Raise MigrationError if a table refers to a missing one, or to another slice's.

    With such a reference, the other slice could no longer delete a row of its own table.
    """
    there = {table.lower() for table in store.tables()}
    for child, parent in store.query(REFERENCES):
        if parent not in there:
            raise MigrationError(f"table {child!r} refers to table {parent!r}, which does "
                                 "not exist after the last entry; to change a table, copy "
                                 "it, drop it, and rename the copy last")
        slice, owner = store.owners[child], store.owners[parent]
        if slice != owner:
            raise MigrationError(f"slice {slice!r}: table {child!r} refers to table "
                                 f"{parent!r} of slice {owner!r}, which then could not "
                                 "delete its own rows; keep the id without REFERENCES")


CHECKS.append(check_slices)                              # first: later checks rely on it
CHECKS.append(check_tables)


# ==== 33. Page checks =====================================================================
# The idea: the host checks each value that a slice's function returns. A page that could
#   not stay current is an error, and not a page that looks current. If a page opens no
#   stream, or a command writes what no open page will show, the log says so, once.

# -- return values

def log_place(where, error):
    """Log an error with its traceback. The line of the slice that caused it comes first."""
    frames = frames_of_app(error) or traceback.extract_tb(error.__traceback__)
    rest = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    where = f"{where}: {error.where}" if hasattr(error, "where") else where
    at = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "?"
    log(f"error: {where}: {type(error).__name__}: {error} ({at}): {rest}")


ERROR_LOGS.remove(log_traceback)
ERROR_LOGS.append(log_place)


def bad_return(function, value, wanted):
    """Return the TypeError for a slice's function that returned something wrong.

    The message says where the function is, because the traceback does not contain it.
    """
    code = getattr(getattr(function, "func", function), "__code__", None)
    at = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
    return TypeError(f"{name_of(function)}{at} returned {value!r:.200}; {wanted}")


def sendable(response, function):
    """Return a function's response, with the names of its headers in lower case.

    Raises TypeError or ValueError if the response can't be sent.
    """
    if type(response) is not Response or type(response.body) is not bytes \
            or type(response.status) is not int:
        raise bad_return(function, response, "it has to return a Response with a number "
                                             "and bytes; most commands return done(ctx)")
    check_values((*response.headers, ("content-type", response.type)))
    headers = tuple([(name.lower(), value) for name, value in response.headers])
    return response._replace(headers=headers)


REGION = re.compile(r"""\s*<\w(?:[^>"']|"[^"]*"|'[^']*')*?"""     # up to its id, which is
                    r"""(\sid\s*=\s*(?:"[^"]+"|'[^']+'|[^\s"'>]+[\s>]))""")    # not empty


@addition
class ChecksReturns(SliceHost):
    """Raises TypeError if a function of a slice returns something wrong."""

    def run(self, route, ctx, args):
        return sendable(super().run(route, ctx, args), route.run)

    def show(self, region, live, ctx, args):
        try:
            made = super().show(region, live, ctx, args)
            if type(made) is Html and REGION.match(made):
                return made
            raise bad_return(region.show, made, "a region has to be Html: one element with "
                                                "an id, as a Template returns it")
        except Exception as error:                       # for the log
            error.where = (f"slice {ctx.store.slice!r}, region {name_of(region.show)} of "
                           f"{live.path}")
            raise

    def around(self, live, ctx, renderings, args):
        body = super().around(live, ctx, renderings, args)
        if type(body) is not Html:
            raise bad_return(live.page, body, "a page has to be Html, as from a Template")
        return body

    def title_of(self, live, ctx, args):
        title = super().title_of(live, ctx, args)
        if not isinstance(title, str):
            raise bad_return(live.title, title, "a title has to be text")
        return title


# -- whether pages stay current

def id_of(region):
    """Return the id attribute of a region as it is written: ' id="todos"'."""
    return REGION.match(region)[1]


# A comment; or a tag up to its >, which may contain > in quotes.
TAG_OR_COMMENT = re.compile(r"""(?s)<!--(?:.*?-->|.*)|<(/?)([A-Za-z][^\s/>]*)"""
                            r"""(?:[^>"']|"[^"]*"|'[^']*')*""")
WITHOUT_END = ("area", "br", "embed", "hr", "img", "input", "link", "meta", "source")


def markup_after(region):
    """Return the markup after the first element; "" if that has no end tag."""
    first = TAG_OR_COMMENT.search(region)[2]
    if region.count(f"<{first}") == 1 and region.rstrip().endswith(f"</{first}>"):
        return ""                                        # saves 18 ms for 1,000 rows
    depth = 0
    for found in TAG_OR_COMMENT.finditer(region):
        closing, name = found.groups()
        if name == first:
            depth += -1 if closing else 1
        if depth == 0 or first in WITHOUT_END:
            return region[found.end() + 1:].strip()
    return ""


def check_one_element(region, name):
    """Raise ValueError if markup follows the element: a browser would not update it."""
    more = markup_after(region)
    if more and not more.startswith("<!--"):
        raise ValueError(f"region {name} has markup after its element with{id_of(region)}, "
                         f"which would not stay current: {more:.60}; put all of it into "
                         "that element")


@addition
class ChecksPages(EdgeWorkspace):
    MOST_IDS = 1000

    def on_open(self):
        super().on_open()
        self.ids = {}                                    # the first id of each region

    def render(self, region, live, ctx, args):
        """Render a region. Raises ValueError if open pages would no longer find it."""
        rendering = super().render(region, live, ctx, args)
        if len(self.ids) > self.MOST_IDS:
            self.ids.clear()
        id = id_of(rendering.html)
        key = region, args, ctx.viewer, tuple(ctx.params.items())
        if key not in self.ids:
            check_one_element(rendering.html, f"{name_of(region.show)} of {live.path}")
        before = self.ids.setdefault(key, id)
        if id != before:
            raise ValueError(
                f"region {name_of(region.show)} of {live.path} had{before} before and has"
                f"{id} now: open pages can't find it; make the id from the path only")
        return rendering

    def around(self, live, ctx, renderings, args):
        """Return the page's body. Raises ValueError unless it has each region once."""
        body = super().around(live, ctx, renderings, args)
        for region, rendering in zip(live.regions, renderings):
            id = id_of(rendering.html)
            found = body.count(id)
            if found != 1:
                raise ValueError(
                    f"page {name_of(live.page)} of {live.path} has {found} elements with"
                    f"{id}, but needs one: put region {name_of(region.show)} into it "
                    "once, unchanged, and give each region an id of its own")
        if "/live" not in body:
            log_once(f"page {name_of(live.page)} of {live.path} opens no stream, so it "
                     'shows no change; put template("slice.live")() into it')
        return body


def topics_of(router):
    """Return a pattern that matches each topic that a page listens to."""
    topics = []
    for slice in router.slices:
        for live in slice.live:
            topics += [path_pattern(region.topic) for region in live.regions]
    pattern = "|".join(topics) or "(?!)"
    return re.compile(pattern)


@functools.lru_cache(maxsize=1024)
def is_silent(router, what, told):
    """True if a command of a slice with live pages published no topic of any page."""
    own = what.partition(".")[0]
    live = any([slice.live for slice in router.slices if slice.name == own])
    return live and not any(map(topics_of(router).fullmatch, told))


@addition
class NoticesSilence(EdgeWorkspace):
    """Logs commands and jobs that write and forget to publish. Without this, pages would be
    old and nobody would see an error. Store.after_commit has what they publish."""

    def journal(self, viewer, what, which):
        super().journal(viewer, what, which)
        added = [row for row in self.store.after_commit
                 if row[0] is not setattr]               # which notes a quota (51)
        told = tuple([topic for call, topic, *_ in added if call == self.bus.tell])
        if len(told) < len(added):                       # a job follows and may publish it
            return
        if self.wrote and is_silent(self.router, what, told):
            log_once(f"{what} wrote, and published {', '.join(told) or 'nothing'}: no open "
                     "page will show it; publish the topic of a Region")


# ==== 34. Template checks =================================================================
# The idea: Part One trusts the author of a template. Here we read it as browsers do, and
#   refuse it if a hole is where text could become code. The error names the line, and says
#   what to write instead.
# It promises: text can do no harm in any hole of an accepted template. Markup whose meaning
#   differs in <svg>, or without scripts, is refused.
# Who uses it: each Template, when it is made.

# What < begins: a comment; <!doctype html>; </p>; <p, without its attributes; or nothing.
TAG = re.compile("(?ais)<(?:!--(?!-?>)((?:(?!--!?>|</noscript).)*)-->|!doctype[^>{]*>|"
                 "/([a-z][a-z0-9:._-]*)[ \t\n\f\r]*>|([a-z][a-z0-9:._-]*)|"
                 "(?=[^a-z/!?{]))")
# A hole by itself; or a name, which = and a value may follow.
ATTRIBUTE = re.compile(r"(?:\A|[ \t\n\f\r]+)(?:\{\{ ?(json )?(\w+) ?\}\}|"
                       r"([A-Za-z_:][A-Za-z0-9_:.-]*)(?:[ \t\n\f\r]*=[ \t\n\f\r]*"
                       """("[^"]*"|'[^']*'|[^ \t\n\f\r"'=<>`{]+))?)"""
                       r"(?=[ \t\n\f\r/>]|\Z)")
TAG_END = re.compile("[ \t\n\f\r]*/?>")
# Attributes that Datastar runs as code, with their older names and their alias.
EXPRESSION = re.compile("data-(?:star-)?(?:on|signals|computed|bind|text|show|class|attr|"
                        "style|init|effect|indicator|ref|json-signals|animate|persist|"
                        "custom-validity|match-media|query-string|replace-url|"
                        "scroll-into-view|view-transition)(?![a-z0-9])")
# A string inside an expression; attributes that hold an address.
STRING = re.compile(r"""(?s)"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|`(?:\\.|[^`\\])*`""")
LINKS = re.compile("(?:[a-z]+:)?href|src|action|formaction|data|poster|ping|cite")
# Attributes that hold a handler, markup or style, or by which SVG sets another attribute.
NO_HOLES = re.compile("on|(?:style|srcdoc|attributename|to|from|by|values)$")
LOADING = ("script", "style", "link", "base", "object", "embed")
# The beginning of an address that runs no code: one of these schemes, or none.
ADDRESS = re.compile(r"(?i)(?:https?:|mailto:|tel:|[^:/?#&]*(?:[/?#]|\Z))")
FORM_METHODS = ("get", "post", "dialog")
TAGLESS = ("script", "style", "title", "textarea", "iframe", "xmp", "noembed", "noframes",
           "plaintext")                                  # in them, < begins no tag


class Scanner:
    """Finds the kind of each hole in some markup. For

        <a href="{{to}}" {{current}} data-on:click="go({{json id}})"><b>{{who}}</b></a>

    found is [("an address", "to"), ("an attribute", "current"), ("json", "id"), ("text",
    "who")]. A mistake raises ValueError with a remedy; then `at` is its place.
    """

    def __init__(self, markup):
        self.markup = markup
        self.at = 0
        self.found = []                                  # (kind, name) of each hole
        self.inside = ""                                 # the element of TAGLESS, if any

    def scan(self, kind):
        """Read all the markup. It is a page ("text"), or it fills a hole of this kind."""
        self.refuse_broken_holes()
        if kind == "text":
            self.text()
        elif kind == "an attribute":
            self.attributes("")
        elif kind == "a value" and {*"<>\"'"}.isdisjoint(self.markup):
            self.holes_until(len(self.markup), kind)
        if self.inside:
            raise ValueError(f"</{self.inside}> is missing")
        if self.markup[self.at:].strip():
            raise ValueError(f"this part fills the place of {kind}; remove the markup that "
                             "can't be there")

    def refuse_broken_holes(self):
        others = HOLE.sub(lambda hole: "-" * len(hole[0]), self.markup)
        if "{{" in others:
            self.at = others.index("{{")
            raise ValueError("a hole is {{name}}, one word of letters, digits and _; for "
                             "two braces in an expression put a space between them")

    def holes_until(self, end, kind):
        for is_json, name in HOLE.findall(self.markup, self.at, end):
            if self.inside in LOADING:
                raise ValueError(f"a hole can't be in <{self.inside}>; put the text into "
                                 "an attribute such as data-who, and read it from there")
            self.found.append(("json" if is_json else kind, name))
        self.at = end

    def text(self):
        """Read markup up to its end."""
        while True:
            tag = self.markup.find("<", self.at)
            end = tag if tag >= 0 else len(self.markup)
            self.holes_until(end, "a value" if self.inside else "text")
            if tag < 0:
                return
            self.token()

    def token(self):
        """Read a comment or a tag, which begins with <."""
        token = TAG.match(self.markup, self.at)
        if not token:
            raise ValueError("this is neither a tag nor a whole comment; write &lt; for <")
        comment, closing, opening = token.groups()
        if token[0] != "<" and self.inside and (closing or "").lower() != self.inside:
            raise ValueError(f"a tag can't be in <{self.inside}>; write &lt; for <, or in "
                             "a script put a space after <")
        if comment is not None:
            check_comment(comment)
        self.at = token.end()
        if opening:
            self.tag(opening.lower())
        elif closing:
            self.inside = ""

    def tag(self, name):
        self.attributes(name)
        end = TAG_END.match(self.markup, self.at)
        if not end:
            raise ValueError("in a tag, a hole is in quotes, class=\"{{kind}}\", or by "
                             "itself, <input {{checked}}>; put spaces between attributes, "
                             "and close quotes and the tag")
        self.at = end.end()
        if name in TAGLESS:
            self.inside = name

    def attributes(self, tag):
        while (found := ATTRIBUTE.match(self.markup, self.at)):
            is_json, hole, name, value = found.groups()
            if hole and (is_json or tag in LOADING):
                raise ValueError(f"this hole can't be an attribute of <{tag}>; put it in "
                                 "quotes")
            if hole:
                self.found.append(("an attribute", hole))
            elif value:
                self.value(tag, name.lower(), value[1:-1])
            self.at = found.end()

    def value(self, tag, name, text):
        """Read the value of an attribute. (Only one in quotes can have holes.)"""
        if tag == "form" and name == "method" and text.lower() not in FORM_METHODS:
            raise ValueError("browsers send a form only by get or post; for another "
                             "method, write data-on:submit=\"@delete('...')\"")
        if name == "http-equiv" or "</noscript" in text.lower():
            raise ValueError("http-equiv, and </noscript> in quotes, can't be in a "
                             "template; remove it")
        for hole in HOLE.finditer(text):
            kind = kind_in_value(tag, name, hole)
            self.found.append((kind, hole[2]))


def check_comment(text):
    if "{{" in text:
        raise ValueError("a hole can't be in a comment; remove it")
    if text.strip()[:1] == "/":
        raise ValueError("a part has no closing line: it ends where the next part begins, "
                         "or at the end of the file; remove this line")
    if text.strip().replace("-", "_").isidentifier():
        raise ValueError("a part begins with a line of its own, <!-- new_row -->, its name "
                         "of letters, digits and _; a remark needs two words or more")


def kind_in_value(tag, name, hole):
    """Return the kind of a hole in the value of this attribute."""
    if EXPRESSION.match(name):
        return kind_in_expression(name, hole)
    if tag in LOADING or NO_HOLES.match(name):
        raise ValueError(f"a hole can't be in {name} of <{tag}>, which browsers run or "
                         "load; choose a class, or use data-on:click and {{json who}}")
    if LINKS.fullmatch(name):
        return kind_in_address(name, hole)
    return "json" if hole[1] else "a value"


def kind_in_expression(name, hole):
    before = STRING.sub("", html.unescape(hole.string[:hole.start()]))
    if hole[1] and {*"\"'`"}.isdisjoint(before):
        return "json"
    raise ValueError(f"{name} is code; write {{{{json {hole[2]}}}}} there, outside of "
                     f"quotes, as in 'Hello ' + {{{{json {hole[2]}}}}}")


def kind_in_address(name, hole):
    """Return the kind of a hole in an address. At its beginning that is "an address", which
    write_address checks."""
    before, after = hole.string[:hole.start()], hole.string[hole.end():]
    if ADDRESS.match(f"{before}:"):                      # a colon in it makes no scheme
        return "a value"
    if before or hole[1] or after[:1] not in ("", "/", "?", "#"):
        raise ValueError(f'{name} has to begin with where it leads, as in "/notes/'
                         f'{{{{{hole[2]}}}}}", or to be only the hole')
    return "an address"


def checked_places(self, kind):
    """Replace Template.places: return the holes that a Scanner finds; None if the markup
    can't fill a hole of that kind (then text does). Raises ValueError with the line."""
    scanner = Scanner(self.markup)
    try:
        scanner.scan(kind)
    except ValueError as error:
        if kind in ("text", "an attribute"):
            raise ValueError(with_line(self, scanner.at, error)) from None
        return None
    return scanner.found


def lacks_in_line(self, name, remedy):
    """Replace Template.lacks: return a KeyError with the line of the hole."""
    holes = [hole.start() for hole in HOLE.finditer(self.markup) if hole[2] == name]
    return KeyError(with_line(self, holes[0], remedy))


def with_line(template, at, remedy):
    """Return the text of an error at this place of the markup, with its file and line."""
    markup = template.markup
    rest = markup[at:].lstrip() or markup[-60:]          # at the end, show the last text
    line = template.line + markup.count("\n", 0, len(markup) - len(rest))
    shown = rest.partition("\n")[0]
    return f"{template.where}line {line}: {shown:.60}: {remedy}"


def write_attribute(text):
    raise TypeError("a hole in the place of an attribute takes True or False, not "
                    f'{text!r:.60}; for text, put the hole in quotes: title="{{{{a}}}}"')


def write_address(text):
    """Write a path, or an address of the web or of mail; "#" for others (javascript:)."""
    return html.escape(text) if ADDRESS.match(text) else "#"


WRITERS.update({"a value": html.escape, "an attribute": write_attribute,
                "an address": write_address})
# Template can have no @addition, because apps call that class itself.
setattr(Template, "places", checked_places)
setattr(Template, "lacks", lacks_in_line)


# ==== 35. Fields ==========================================================================
# The idea: more ways to read fields and signals. Text that nobody can see counts as empty.
# Who uses it: slices, by their contexts.

WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")
FILLERS = set("\u115f\u1160\u2065\u2800\u3164\uffa0")     # blank, whatever their category


def visible(text):
    """True if at least one character of the text can be seen."""
    return not all(map(unseen, text))


def unseen(character):
    """True for a blank, a control character, a mark, or a character that has no width or
    only sets the direction of writing."""
    kind = unicodedata.category(character)
    return (kind in ("Cc", "Cf") or kind[0] in "ZM" or character in FILLERS
            or "\U000e0000" <= character <= "\U000e0fff")


@addition
class ReadsFields(Context):
    def field(self, name, otherwise=""):
        """Return a field as text; "" if nobody can see it. Of several, return the last."""
        text = super().field(name, otherwise)
        return text if visible(text) else ""

    def fields(self, name: str) -> List[str]:
        """Return all values that a form has under this name, or a signal that is a list.

        Values that nobody can see are left out.
        """
        found = [value for key, value in self.sent if key == name]
        if len(found) == 1 and isinstance(found[0], list):
            found = found[0]
        texts = [as_text(name, value) for value in found]
        return [text for text in texts if visible(text)]

    def number(self, name: str, otherwise: Optional[int] = None) -> int:
        """Return a whole number. Raises Refused(422) for anything else."""
        text = self.field(name).strip()
        if not text and otherwise is not None:
            return otherwise
        if not WHOLE_NUMBER.fullmatch(text):
            why = f"{name} has to be a whole number of at most 18 digits."
            raise Refused(422, why, fields={name: why})
        return int(text)


# ==== 36. Ordinary pages ==================================================================
# The idea: a slice can also have pages without a stream, and answers that lead from one
#   page to another, or that a browser saves as a file.
# It promises: go() takes a Live or a Route, so it never leads to a missing page. Its flash
#   is shown once, as text, on that page, to the session that sent the command. A download
#   never runs as a page of this server. A refusal is shown in the workspace's layout. If a
#   form is refused, its page is shown again, with the values that were typed.
# Who uses it: slices.

@public
def plain_page(ctx: Context, title: str, html: Html, status: int = 200) -> Response:
    """Return a page without a stream, in the same layout as live ones.

    Raises TypeError if html is not Html.
    """
    if type(html) is not Html:
        raise TypeError("plain_page(ctx, title, html) takes Html, as from a template, not "
                        f"{html!r:.200}")
    nav = ctx.host.navigation("", ctx, state=False)
    return page(f"{title} · {ctx.title}", html, ctx.viewer, nav, status=status,
                head=ctx.host.head(ctx))


@public
def go(ctx: Context, page: Union[Live, Route], *args: Any, flash: str = "",
       **signals: Any) -> Response:
    """Lead the browser to a page of a slice: go(ctx, card, 3) to "/cards/<int:id>".

    It works for plain forms and for Datastar. flash: a message that the page shows once.
    signals: the return value of ctx.remove. Raises LookupError if no slice here has the
    page, ValueError if the page can't be reached with these args.
    """
    path = urllib.parse.quote(f"/w/{ctx.workspace}{path_to(ctx.host.router, page, args)}")
    flash = flash or signals.get("note", "")
    headers = (flash_header(path, flash, signals),) if flash else ()
    if ctx.request.datastar:                             # the layout has the rest
        return as_json({"_go": path}, headers=headers)
    return see_other(path, *headers)


def path_to(router, page, args):
    """Return the path of a page inside its workspace. Raises LookupError or ValueError."""
    pages = [one for slice in router.slices for one in (*slice.live, *slice.routes)]
    if page not in pages:
        raise LookupError(f"go() takes a Live or a Route of a slice here, not "
                          f"{page!r:.99}; put it into live or routes of a slice")
    many = len(PART_OF_PATH.findall(page.path))
    if len(args) != many:
        raise ValueError(f"{page.path} takes {many} args, but go() got {len(args)}")
    path = PART_OF_PATH.sub("{}", page.path).format(*args)
    with contextlib.suppress(Refused):
        plain_path(urllib.parse.quote(path))
        if router.match("GET", path)[1].path == page.path:
            return path
    raise ValueError(f"there is no page at {path!r:.99}: a part of {page.path} has to be "
                     "text without slashes and not only dots, <int:part> a number")


# -- a flash: a message for the page to which go() leads. A sealed cookie carries it there,
#    and to no other path. The page deletes the cookie.
#
#     x-flash: /w/acme/cards/3 DATA                         as go() returns it
#     set-cookie: flash=DATA.SEAL; Path=/w/acme/cards/3     as it leaves
#
# DATA is base64: the message and, after a line break, the id of what its button undoes.

FLASH = "x-flash"                                        # the header of an answer, inside
FLASH_SECONDS = 60
FLASH_KEY = secrets.token_bytes(32)                      # of this process
LONGEST_FLASH = 200                                      # characters


def flash_header(path, text, signals):
    lines = f"{text[:LONGEST_FLASH]}\n{signals.get('_undo', '')}".encode("utf-8", "replace")
    return FLASH, f"{path} {base64.urlsafe_b64encode(lines).decode()}"


def with_flash(request, response):
    """Return the response with its flash as a cookie, or showing the flash that came."""
    given = dict(response.headers).get(FLASH)
    if given:
        rest = [pair for pair in response.headers if pair[0] != FLASH]
        path, data = given.split(" ")
        value = f"{data}.{flash_seal(request, urllib.parse.unquote(path), data)}"
        cookie = cookie_field(request.scheme, "flash", value, path, FLASH_SECONDS)
        return response._replace(headers=(*rest, cookie))
    if not response.nonce or "flash=" not in request.headers.get("cookie", ""):
        return response
    text = flash_in(request)
    return show_flash(request, response, text) if text else response


def flash_seal(request, path, data):
    """Return the seal of a message. It covers the session, so that the account that signs
    in next in this browser does not see the message."""
    cookies = request.headers.get("cookie", "").split(";")
    session = sorted([one.strip() for one in cookies if "sid" in one.partition("=")[0]])
    sealed = json.dumps([path, data, session]).encode()
    return hmac.digest(FLASH_KEY, sealed, "sha256").hex()


def flash_in(request):
    """Return the flash that the request carries for this page; "" if none has our seal."""
    for value in cookie_values(request.headers["cookie"], "flash"):
        data, _, sealed = value.partition(".")
        ours = flash_seal(request, request.path, data)
        if hmac.compare_digest(ours.encode(), sealed.encode("utf-8", "replace")):
            return base64.urlsafe_b64decode(data).decode()
    return ""


def show_flash(request, response, text):
    """Add the flash at the end of the page, and have the browser delete its cookie."""
    path = urllib.parse.quote(request.path)
    forget = cookie_field(request.scheme, "flash", "", path, 0)
    text, _, undo = text.rpartition("\n")
    return with_message(response._replace(headers=(*response.headers, forget)), text,
                        undo=undo, undo_form=undo != "")


def with_message(response, text, kind="flash", **more):
    return at_end(response, template(f"layout.{kind}")(text=text, **more))


# -- a form that was refused

def old_messages(request):
    """Return signals that clear the messages of an earlier mistake: "problem" and, for each
    field that was sent, "<field>_problem".

    If the request sent signals, only those among them are cleared, because the page has no
    others. (A form sends none of its messages.)
    """
    names = {}
    with contextlib.suppress(Refused):
        names = dict(request.pairs())
    problems = ["problem"]
    problems += [f"{name}_problem" for name in names if not name.startswith("_")]
    return {name: "" for name in problems if request.media_type in FORMS or name in names}


@addition
class ShowsFormsAgain(SliceHost):
    def refuse(self, request, refused):
        """Show a plain form again; in a page, replace the messages of earlier mistakes."""
        if request.datastar and refused.status in (409, 422):
            return as_json({**old_messages(request), **refused.signals})
        if request.media_type in FORMS and refused.status in (409, 412, 422):
            return self.page_again(request, refused)
        raise refused

    def page_again(self, request, refused):
        """Return the page of a plain form, with the status of the refusal.

        ctx.typed holds the submitted values and the messages: "problem" and one by field.
        If the page does not show "problem", it is added at the end. Raises refused if there
        is no such page.
        """
        try:
            path = self.form_path(request)
            texts = {name: value for name, value in request.pairs() if type(value) is str}
            typed = {**texts, "problem": refused.message, **refused.problems}
            again = request._replace(method="GET", path=path, query="", typed=typed)
            response = self.handle(again)._replace(status=refused.status)
        except Refused:
            raise refused from None
        message = escape(refused.message).encode("utf-8", "replace")
        if not response.nonce or message in response.body:
            return response                              # not a page, or it shows that
        return with_message(response, refused.message, "wrong")

    def form_path(self, request):
        """Return the path of the page that has the form for this command."""
        _, route, args = self.router.match(request.method, request.path)
        return with_parts(route.form, route.path, args) or request.path

    def path_after(self, request):
        """Return where a plain form leads after success: to its page or, without one, to
        the first part of the path, which is a list."""
        path = self.form_path(request)
        with contextlib.suppress(Refused):
            self.router.match("GET", path)
            return path
        return "/" + path.split("/")[1]

    def after_form(self, ctx, signals):
        answer = super().after_form(ctx, signals)
        if "note" not in signals:
            return answer
        path = dict(answer.headers)["location"]
        flash = flash_header(path, signals["note"], signals)
        return answer._replace(headers=(*answer.headers, flash))


@addition
class KnowsWhatWasTyped(Context):
    @property
    def typed(self):
        """The values typed into a refused form: see ShowsFormsAgain.page_again."""
        return self._request.typed if self._request else {}


@addition
class CarriesFlashes(LoopEdge):
    def finish(self, asked, response):
        """Let an answer with headers, as from go(), give a flash, and a page show it."""
        carries = isinstance(response, Response) and (response.headers or response.nonce)
        if carries and asked.reading.method != "HEAD":
            response = with_flash(asked.request, response)
        super().finish(asked, response)


def carry_flashes(env):
    front = env.front
    env.front = lambda request, env: with_flash(request, front(request, env))


PLAIN.append(carry_flashes)


# -- a file that the browser saves

# Types that no browser runs, or how they begin. A type that ends with "xml" is not one.
HARMLESS = ("text/plain", "text/csv", "text/calendar", "text/vcard", "text/markdown",
            "application/json", "application/pdf", "application/zip", "application/gzip",
            "application/rtf", "application/epub+zip", "application/vnd.", "image/",
            "audio/", "video/", "font/")
SANDBOX = ("content-security-policy", "default-src 'none'; sandbox")


@public
def download(name: str, data: Union[bytes, str], type: str = "") -> Response:
    """Return a file that the browser saves under this name.

    type: its media type, such as "text/csv". A file that a browser could run (HTML, SVG,
    XML, scripts) is sent as application/octet-stream.
    """
    if isinstance(data, str):
        data = data.encode("utf-8", "replace")
        type = type or "text/plain"
        type += "" if "charset" in type else "; charset=utf-8"
    headers = (("content-disposition", disposition("attachment", file_name(name))), SANDBOX)
    return Response(200, data, harmless_type(type), headers)


def harmless_type(type):
    """Return the type if no browser runs files of it, or else one of plain bytes."""
    kind = type.partition(";")[0].strip().lower()
    if kind.startswith(HARMLESS) and not kind.endswith("xml"):
        return type
    return "application/octet-stream"


# -- a refusal, in the layout of the workspace

IN_LAYOUT = (403, 404, 409, 410, 413, 415, 422, 429, 507)    # 507: of a file (68)


@addition
class RefusesInLayout(Workspace):
    def answer(self, request):
        """Show a refusal as a page. All writes before it are rolled back already."""
        try:
            return super().answer(request)
        except Refused as no:
            if no.status not in IN_LAYOUT or not request.opens_page:
                raise
            return self.refused_page(request, no)

    def refused_page(self, request, no):
        viewer = self.viewer(request)
        ctx = self.context(self, Tables(self.store, "welcome", READ), viewer, {}, request)
        tabs = self.tabs(viewer)
        on = f"/w/{viewer.workspace}{tabs[0].path}" if tabs else "/"
        where = tabs[0].title if tabs else "Home page"
        said = told(no)
        body = template("error.inside")(**said, on=on, where=where)
        answer = plain_page(ctx, said["headline"], body, no.status)
        return answer._replace(headers=no.headers)


# ==== 37. More events =====================================================================
# The idea: all other events and options that Datastar understands, for apps.

def lines_of(event_id, retry, **options):
    """Return the lines of an event for the options that are given."""
    fields = {"id": event_id, "retry": retry}
    lines = [f"{name}: {value}" for name, value in fields.items() if value is not None]
    return lines + [f"data: {name} {value}" for name, value in options.items() if value]


@public
def patch_elements(elements: str = "", *, selector: Optional[str] = None,
                   mode: str = "outer", namespace: Optional[str] = None,
                   use_view_transition: bool = False, event_id: Optional[str] = None,
                   retry: Optional[int] = None) -> bytes:
    """Return an event that morphs elements into the page, by their own ids or at selector.

    mode: outer, inner, replace, prepend, append, before, after, remove. namespace: svg or
    mathml. retry: in ms. Raises ValueError for a line break outside of elements.
    """
    return event("elements", elements, *lines_of(
        event_id, retry, selector=selector, mode="" if mode == "outer" else mode,
        namespace=namespace, useViewTransition="true" if use_view_transition else ""))


@public
def patch_signals(signals: Any, *, only_if_missing: bool = False,
                  event_id: Optional[str] = None, retry: Optional[int] = None) -> bytes:
    """Return an event that merges signals into those of the page (RFC 7386: null deletes
    one). signals is a dict, or JSON text, which is sent as it is."""
    if not isinstance(signals, str):
        signals = json.dumps(signals, ensure_ascii=False)
    only = "true" if only_if_missing else ""
    return event("signals", signals, *lines_of(event_id, retry, onlyIfMissing=only))


@public
def remove_elements(selector: str, *, event_id: Optional[str] = None,
                    retry: Optional[int] = None) -> bytes:
    return patch_elements(selector=selector, mode="remove", event_id=event_id, retry=retry)


@public
def execute_script(script: str, *, auto_remove: bool = True,
                   attributes: Optional[Dict[str, str]] = None,
                   event_id: Optional[str] = None, retry: Optional[int] = None) -> bytes:
    """Return an event that runs script in the page.

    Raises ValueError if it contains "</script", which would end its element early.
    """
    if "</script" in script.lower():
        raise ValueError("a script must not contain </script")
    given = {"data-effect": "el.remove()"} if auto_remove else {}
    given.update(attributes or {})
    said = "".join([f' {name}="{escape(value)}"' for name, value in given.items()])
    return patch_elements(f"<script{said}>{script}</script>", selector="body",
                          mode="append", event_id=event_id, retry=retry)


# ==== 38. Assets ==========================================================================
# The idea: an app has its styles, scripts and pictures in a folder, which the server reads
#   once, when it starts. The address of each file has a fingerprint of the content. So a
#   browser keeps it for a year; when the content changes, the address does, too.
# It promises: only files of that folder are served, but no hidden ones, and none of a type
#   that is not listed here. The server refuses to start if a slice names a style or script
#   that is missing.
# Who uses it: slices, by Slice(styles=..., scripts=...) and asset().

ASSET_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
               ".txt": "text/plain; charset=utf-8", ".svg": "image/svg+xml",
               ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg",
               ".gif": "image/gif", ".webp": "image/webp", ".avif": "image/avif",
               ".ico": "image/x-icon", ".woff2": "font/woff2", ".mp3": "audio/mpeg",
               ".mp4": "video/mp4", ".webm": "video/webm"}
__all__.append("ASSET_TYPES")
MOST_OF_ASSETS = 64 * 2 ** 20                            # bytes of all; they are in memory
FOR_A_YEAR = (("cache-control", "public, max-age=31536000, immutable"),)
ASK_EACH_TIME = (("cache-control", "no-cache"),)


# Not in a template, because none may have a hole in markup that browsers run or load.
LINK = '<link rel="{}" href="{}">\n'
SCRIPT = '<script type="module" src="{}"></script>\n'


class Asset(NamedTuple):
    body: bytes
    type: str
    version: str                                         # its fingerprint


APP_ASSETS: Dict[str, Asset] = {}                        # by name, such as "icons/up.svg"


@public
def asset(name: str) -> str:
    """Return the address of a file in the folder of assets.

    The folder is read when the server starts. Raises LookupError if the file is not there.
    """
    if name not in APP_ASSETS:
        raise LookupError(f"there is no asset {name!r}; main(assets=folder) has "
                          f"{', '.join(APP_ASSETS) or 'none'}")
    return f"/assets/{urllib.parse.quote(name)}?v={APP_ASSETS[name].version}"


def link(relation, address):
    return Html(LINK.format(relation, escape(address)))


def add_asset(name, body):
    type = ASSET_TYPES[pathlib.PurePath(name).suffix.lower()]
    APP_ASSETS[name] = Asset(body, type, fingerprint(body))
    DOORS[f"/assets/{name}"] = app_asset


def app_asset(request, env):
    """A door: return a file of the app. If the address has no version, or an old one, the
    browser has to ask each time whether the file has changed."""
    only_read(request)
    body, type, version = APP_ASSETS[request.path[len("/assets/"):]]
    caching = FOR_A_YEAR if request.params.get("v") == version else ASK_EACH_TIME
    tag = f"{version}{coding_of(request, type)}"
    return unless_known(request, Response(200, body, type, caching), tag)


def read_assets(settings):
    """Read all assets. Raise Unusable if the folder or a slice's asset is not there."""
    for name in APP_ASSETS:                              # of another app, in a test
        DOORS.pop(f"/assets/{name}", None)
    APP_ASSETS.clear()
    if settings.assets:
        for name, path in assets_in(pathlib.Path(settings.assets)):
            add_asset(name, path.read_bytes())
    for slice in settings.slices:
        for name in (*slice.styles, *slice.scripts):
            check_asset(name, f"slice {slice.name!r}")


def check_asset(name, user):
    if name not in APP_ASSETS:
        raise Unusable(f"{user}: there is no asset {name!r}; put it into the folder of "
                       f"main(assets=...); {NEEDS_COMMA}")


def assets_in(folder):
    """Return (name, path) of each file that is served."""
    if not folder.is_dir():
        raise Unusable(f"the folder of assets {folder} does not exist; name another in "
                       "main(assets=...)")
    found = [(path.relative_to(folder), path) for path in sorted(folder.rglob("*"))]
    served = [(name.as_posix(), path) for name, path in found if path.is_file()
              and not any([part.startswith(".") for part in name.parts])
              and name.suffix.lower() in ASSET_TYPES]
    size = sum([path.stat().st_size for _, path in served])
    if size > MOST_OF_ASSETS:
        raise Unusable(f"the assets in {folder} have {size} bytes; at most "
                       f"{MOST_OF_ASSETS} are kept in memory; serve large ones elsewhere")
    return served


CHECKS.append(read_assets)


@addition
class LinksAssets(SliceHost):
    def head(self, ctx):
        slice = next(one for one in self.router.slices if one.name == ctx.store.slice)
        styles = [link("stylesheet", asset(name)) for name in slice.styles]
        scripts = [SCRIPT.format(escape(asset(name))) for name in slice.scripts]
        return Html("".join([*styles, *scripts]))


# ==== 39. Brand ===========================================================================
# The idea: an app is a product with its own name, icon, colours and language.
# It needs: 38 Assets.

@public
class Brand(NamedTuple):
    """The product, as all pages show it: main(slices, brand=Brand(name="Poll")).

    icon: the name of an asset. colors: of links and buttons, such as "#33409f": one for
    light pages, one for dark. language: of the app's pages, as in HTML's lang.
    """
    name: str = "orion"
    icon: str = ""
    colors: Sequence[str] = ()
    language: str = "en"


COLOR = re.compile(r"#[0-9a-f]{6}")
LANGUAGE = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*")              # RFC 5646, 2.1


def use_brand(settings):
    """Put the brand into the layout. Raises Unusable if a value of it is wrong."""
    brand = settings.brand or Brand()
    if type(brand) is not Brand or {type(brand.name), type(brand.language)} != {str} \
            or not LANGUAGE.fullmatch(brand.language):
        raise Unusable(f"brand={brand!r:.99}: use Brand(name=\"Poll\", language=\"en\")")
    icon = "/icon.svg"
    if brand.icon:
        check_asset(brand.icon, "Brand")
        icon = asset(brand.icon)
    links = link("icon", icon)
    if brand.colors:
        if "brand.css" in APP_ASSETS:
            raise Unusable("Brand(colors=...) makes brand.css; rename the app's own file "
                           "of that name")
        add_asset("brand.css", palette(brand.colors).encode())
        links += link("stylesheet", asset("brand.css"))
    LAYOUT.update(brand=brand.name, icon=icon, language=brand.language, links=Html(links))


def palette(colors):
    """Return a style sheet. Raises Unusable unless there are two colours."""
    if isinstance(colors, str) or len(colors) != 2 \
            or not all([COLOR.fullmatch(str(color)) for color in colors]):
        raise Unusable(f"Brand(colors={colors!r}): give two, the first for light pages and "
                       "the second for dark ones: (\"#33409f\", \"#ffd479\")")
    light, dark = colors
    return Template(TEMPLATES / "brand.txt")(light=light, dark=dark)


CHECKS.append(use_brand)


# ==== 40. Counts ==========================================================================
# The idea: the home page shows how full each workspace is. Each workspace is asked before
#   the request takes the Directory's turn.
# It promises: a workspace that is busy, or can't be read, does not hold up the others.

@addition
class TellsFacts(Broadcast):
    def own_facts(self, request):
        """Return facts about this object. Other sections add more."""
        return {"count": sum([slice.count(Tables(self.store, slice.name, READ))
                              for slice in self.router.slices if slice.count])}


def facts_of(workspace: Stub):
    """Return a workspace's facts. If it is busy or can't be read, the count says so."""
    try:
        return json.loads(fetch_briefly(workspace, Request("GET", "/_facts")).body)
    except Busy:
        return {"count": "busy"}
    except CRASH as error:
        if not isinstance(error, Refused):
            log_error("a slice's count", error)
        return {"count": "can't be read"}


def words_for_count(workspace):
    count = facts_of(workspace)["count"]
    return f"{count} open" if type(count) is int else count


def home_with_counts(request, env):
    """A door: count the workspaces on the home page, then return the page."""
    if request.method in SAFE:
        mine = env.directory.ask_as(request, "/_mine")
        env.directory.namespace.counts.update(
            {id: words_for_count(env.workspaces.get(id)) for id in mine})
    return env.directory.fetch(request)


@addition
class KeepsCounts(GuardedNamespace):
    """Only the Directory's namespace has counts. The Directory itself would lose them,
    because it is rebuilt after a fault of its file."""

    @functools.cached_property
    def counts(self):
        return {}                                        # such as "3 open", by id


@addition
class KnowsMine(EdgeDirectory):
    def mine(self, account, after):
        mine = super().mine(account, after)
        rows = [{**row, "count": self.count_of(row["id"])} for row in mine["workspace"]]
        return {**mine, "workspace": rows}

    def count_of(self, id):
        return self.namespace.counts.get(id, "")

    def own_mine(self, request):
        """Return the ids of the workspaces on this account's home page.

        Leave out those that are being moved, because their files may already be gone.
        """
        account = self.viewer(request).account
        after = request.params.get("after", "")
        rows = self.store.query(MINE, account, after, NAMES_A_PAGE)
        return [row["id"] for row in rows if not row["moving"]]


@addition
class CountsAtHome(LoopEdge):
    def __init__(self, *args):
        super().__init__(*args)
        self.add_doors({"/": home_with_counts})


# ==== 41. Live home =======================================================================
# The idea: home pages are live, too. If a workspace publishes, the broker adds its id to
#   `uncounted`. Once a second, the edge takes all ids out of it, counts again the
#   workspaces that an open home page shows, and has these pages shown again.
# It promises: a workspace is counted at most once a second for all home pages that show it.
# It needs: 40 Counts.

def home_stream(ctx):
    """Stream the list of workspaces. Its topic is the one of the account's access, because
    every change of the list is published there anyway."""
    region = Region(f"access:{ctx.viewer.account}", mine_region, "account")
    live = Live("/", ACCOUNT, "Workspaces", (region,),
                params={"after": WORKSPACE_NAME.pattern})
    return ctx.host.stream(live, ctx, ())


@addition
class NotesWriting(GuardedNamespace):
    @functools.cached_property
    def uncounted(self):
        return set()                                     # ids of workspaces to count again


@addition
class KeepsHome(EdgeDirectory):
    def home_holes(self, viewer):
        return {**super().home_holes(viewer), "live": True}

    def count_of(self, id):
        count = super().count_of(id)
        if not count:
            self.namespace.uncounted.add(id)
        return count

    def rendering(self, region, live, ctx, args):
        """Never reuse a rendering of the list: its counts are not in the store, so nothing
        would drop an old one."""
        if region.show is mine_region:
            return self.render(region, live, ctx, args)
        return super().rendering(region, live, ctx, args)


@addition
class KnowsHomes(Broker):
    def published(self, id, topic):
        super().published(id, topic)
        if id in self.edge.env.workspaces.objects:
            self.edge.env.directory.namespace.uncounted.add(id)

    def watchers(self, id):
        """Leave out home pages: with --single, they are streams of the same object."""
        return [stream for stream in super().watchers(id) if stream.again.path != "/live"]


@addition
class CountsForHomes(LoopEdge):
    def chores(self):
        return [*super().chores(), (self.count_for_homes, 1.0)]

    def count_for_homes(self):
        """Count again the changed workspaces that an open home page shows."""
        known = self.env.directory.namespace
        written = set()
        while known.uncounted:                           # other threads add to it
            written.add(known.uncounted.pop())
        if not written:
            return
        counted = set()
        for home in self.open_homes():
            mine = self.env.directory.ask_as(home.subscription.again, "/_mine")
            shown = written.intersection(mine)
            for id in shown - counted:
                known.counts[id] = words_for_count(self.env.workspaces.get(id))
            counted |= shown
            if shown:
                self.broker.mark(home)
        for id in written - counted:
            known.counts.pop(id, None)                   # a page that shows it asks again

    def open_homes(self):
        """Return the channels of home pages: one for each account and page of its list."""
        channels = self.broker.channels.get(self.env.directory.id, {})
        return [one for one in [*channels.values()]
                if one.subscription.again.path == "/live"]


DIRECTORY_SLICES.append(Slice("home", routes=(
    Route("GET", "/live", ACCOUNT, home_stream),)))


# ==== 42. Jobs ============================================================================
# The idea: a job is a row that a command writes in its own transaction. If the transaction
#   is rolled back, there is no job.
# It promises: the transaction that runs a job also deletes its row, so both are committed
#   or neither is. A job that fails is tried again; after ten tries it is given up, and its
#   row is kept. Jobs wake a sleeping object, and survive a restart. A job that has to wait
#   for something outside, such as a mail server, yields a function; this is called without
#   the object's turn. A recurring job is a row, too, one in each workspace, with the time
#   when it is due next. If it missed runs while the server was down, it runs once.
# It needs: 33 Page checks.
# It stands behind: 40 Counts. It adds its facts about an object to the count.
#
# A slice lists its jobs in Slice(jobs=...). One may be
#
#     def welcome(ctx, id):
#         guest = ctx.store.one("SELECT mail FROM guests WHERE id = ?", id)
#         yield lambda: send_mail(guest["mail"])         # without the turn
#         ctx.store.exec("UPDATE guests SET welcomed = 1 WHERE id = ?", id)
#
# and a command calls ctx.enqueue(welcome, id=3). That writes the first of these rows; the
# second is for daily(sweep, "07:30"), which recurs. (They also have due, tries and error.)
#
#     job              args        who          key
#     guests.welcome   {"id": 3}   carol        NULL
#     guests.sweep     {}          (schedule)   @guests.sweep 07:30
#
# This is the path of the first:
#
#     Alarms.ring     takes the id of an object whose alarm is due
#     POST /_claim    one commit: counts the try, and sets the time of the next one
#     POST /_job      one commit: runs the job, and deletes its row unless the job yields
#     Waits.call      after a yield: calls the function, in a thread for such calls
#     POST /_job      one commit: the job goes on with the result, and its row is deleted
#     GET  /_due      returns when the object's next job is due: its next alarm
#
# The alarms are only in memory. Each start builds them from the files.

# -- for slices

@addition
class EnqueuesJobs(Context):
    def enqueue(self, job: Callable[..., None], after: float = 0.0, key: str = "",
                **args: Any) -> None:
        """Have job(ctx, **args) run after so many seconds, if this transaction commits.

        key: the job replaces an earlier one of the slice with the same key. args: values
        for JSON. A job that fails runs again, so its effects outside of the store must be
        safe to repeat. To wait for something outside, a job yields a function, at most
        once: `answer = yield send` calls send() while others have the turn. send can't use
        ctx. Before its yield a job may only read. Raises PermissionError outside of a
        command or job, LookupError if no slice has this job.
        """
        self.store.check_writes("enqueues a job")
        if job not in self.host.router.job_names:
            raise LookupError(f"{name_of(job)} is not a job of this app; add it to "
                              "Slice(jobs=...)")
        name = self.host.router.job_names[job]
        if key:
            key = self.host.router.key_of(self.store.slice, name, key)
            self.host.cancel(key)
        self.host.put_in(name, json.dumps(args), self.viewer.signature,
                         time.time() + after, key or None)

    def cancel(self, key: str) -> bool:
        """Delete the job that was enqueued with this key. Return whether there was one.

        If it has yielded and waits for its call, it does not go on afterwards.
        """
        self.store.check_writes("cancels a job")
        names = self.host.router.names
        if self.store.slice in names:                    # else it's an app's: see key_of
            names = [self.store.slice]
        return self.host.cancel(*[f"{name}:{key}" for name in names])


@addition
class KnowsJobs(QuickRouter):
    def __init__(self, slices):
        super().__init__(slices)
        self.jobs = {f"{slice.name}.{function_of(job).__name__}": function_of(job)
                     for slice in slices for job in slice.jobs}
        self.job_names = {job: name for name, job in self.jobs.items()}
        self.names = [slice.name for slice in slices]
        self.plans = plans_of(slices)

    def key_of(self, slice, job, key):
        """Return a key as the table has it: "slice:key", with the slice that enqueues the
        job. If a command of an app enqueues it (section 73), this is the slice that has the
        job. Such a command can cancel the keys of all slices."""
        owner = slice if slice in self.names else job.partition(".")[0]
        return f"{owner}:{key}"


# -- recurring jobs

class Recurring(NamedTuple):
    """A recurring job; daily() or every() makes it."""
    job: Callable[..., Any]
    at: str = ""                                         # the time of day, such as 07:30
    zone: str = ""                                       # "": the server's own
    seconds: float = 0.0                                 # from one run to the next

    @property
    def plan(self):
        """Its schedule as text. When this changes, another row replaces its row."""
        return f"{self.at} {self.zone}" if self.at else f"every {self.seconds:g} s"

    def next_time(self, now, id):
        """Return when it is due next. Each workspace counts its intervals from a time of
        its own, so that they do not all wake at once.

        If clocks are set forward past the time of day, the job runs that much later. If
        they are set back and the time comes twice, it runs at the first (PEP 495, fold=0).
        """
        if not self.at:
            since = (now - mark_of(id)) % self.seconds
            return now - since + self.seconds
        zone = zone_named(self.zone)
        today = datetime.datetime.fromtimestamp(now, zone).date()
        days = [today + datetime.timedelta(number) for number in range(-1, 4)]
        at = datetime.time.fromisoformat(self.at)
        times = [datetime.datetime.combine(day, at, zone).timestamp() for day in days]
        return min([when for when in times if when > now])


@public
def daily(job: Callable[..., Any], at: str, zone: str = "") -> Recurring:
    """For Slice.jobs: have job(ctx) run in each workspace, each day at this time ("07:30").

    zone: such as Europe/Berlin; "": the server's own.
    """
    return Recurring(job, at, zone)


@public
def every(job: Callable[..., Any], **interval: float) -> Recurring:
    """For Slice.jobs: every(sweep, minutes=10). Also seconds, hours, days, weeks.

    Each run wakes the workspace. Raises TypeError if it is not an interval.
    """
    return Recurring(job, seconds=datetime.timedelta(**interval).total_seconds())


@functools.cache
def zone_named(name):
    """Return a time zone; None: the server's own. Raises Unusable if it is unknown."""
    if not name:
        return None
    import zoneinfo                                      # here: it saves 3 ms at the start
    try:
        return zoneinfo.ZoneInfo(name)
    except (ValueError, OSError, zoneinfo.ZoneInfoNotFoundError):
        raise Unusable(f"there is no time zone {name!r} on this machine; name one such as "
                       "Europe/Berlin, or install tzdata if there are none") from None


PLANNED = "SELECT key FROM jobs WHERE key >= '@' AND key < 'A'"     # as plans_of names them


def function_of(job):
    return job.job if type(job) is Recurring else job


def plans_of(slices):
    """Return all recurring jobs, by the key of their row."""
    return {f"@{slice.name}.{job.job.__name__} {job.plan}": job
            for slice in slices for job in slice.jobs if type(job) is Recurring}


def wrong_with_job(job):
    """Return why a job could not run, or "" if it can."""
    function = function_of(job)
    name = getattr(function, "__name__", "")
    if not callable(function) or not name.isidentifier():
        return "it is not a named function; define it by def, and write (one,) with a comma"
    if type(job) is not Recurring:
        return ""
    if job.at and not re.fullmatch("([01][0-9]|2[0-3]):[0-5][0-9]", job.at):
        return f'{job.at!r} is not a time of day; write daily({name}, "07:30")'
    if not job.at and job.seconds < 1:
        return f"it has no interval, or less than a second; write every({name}, minutes=10)"
    try:
        zone_named(job.zone)
    except Unusable as no:
        return str(no)
    return ""


def check_jobs(settings):
    """Raise Unusable for a job that could not run."""
    if settings.plain and any([slice.jobs for slice in settings.slices]):
        raise Unusable("this app has jobs, which --plain does not run; leave --plain out")
    for slice in settings.slices:
        for job in slice.jobs:
            why = wrong_with_job(job)
            if why:
                name = name_of(function_of(job))
                raise Unusable(f"slice {slice.name!r}, job {name}: {why}")
        functions = {function_of(job) for job in slice.jobs}
        names = {function.__name__ for function in functions}
        if len(names) < len(functions):
            raise Unusable(f"slice {slice.name!r}: two jobs have the same name; rename one")


CHECKS.append(check_jobs)


# -- alarms

def quick_reader(path):
    """Connect to a database only to read it. The with statement closes the connection.

    At a start there may be thousands of files. Opening one as immutable takes a quarter of
    the time, and is right if it has no write-ahead log. (An object that opens the file to
    write to it at the same time sets its own alarm.)
    """
    how = "&immutable=1" if with_wal(path) == [path] else ""
    return contextlib.closing(connected_to_read(path, how))


def due_in(db: sqlite3.Connection, plans):
    """Return when the next job in a file is due, or None if it has no job.

    If its recurring jobs differ from the plans, it is due at once: the object corrects them
    when it opens the file (KeepsPlans).
    """
    due = db.execute("SELECT min(due) FROM jobs").fetchone()[0]
    there = set()
    with contextlib.suppress(sqlite3.OperationalError):      # an older version made it
        there = {row[0] for row in db.execute(PLANNED)}
    return due if there == plans else 0.0


class Alarms:
    """Knows when the next job of each object is due. Then wakes the object, and runs it."""
    AT_ONCE = 4                                          # the other threads take requests

    def __init__(self, namespace):
        self.namespace = namespace
        self.directory = None                            # it knows the workspaces' names
        self.put = None                                  # put(function, *args): in a pool
        self.waits = Waits(self)
        self.free = threading.BoundedSemaphore(self.AT_ONCE)
        self.looked = set()                              # ids of the files it has read
        self.lock = threading.Lock()                     # guards all that follows
        self.due = {}                                    # by id: when its next job is
        # A heap of (max(due, now), due, id). Entries that are not in self.due are skipped.
        self.order = []

    def look(self):
        """Read the due times from the files that were not read so far."""
        files = dict(self.namespace.files())
        self.looked &= files.keys()                      # a file may come back
        for id in files.keys() - self.looked:
            self.looked.add(id)
            with contextlib.suppress(sqlite3.Error), quick_reader(files[id]) as db:
                self.look_into(id, db)

    def look_into(self, id, db):
        self.set(id, due_in(db, plans_of(self.namespace.settings.slices).keys()))

    def set(self, id, due):
        """Set the object's alarm, unless an earlier one is set. due None: it has no job.

        An object with many overdue jobs is queued again after each of them, after the other
        objects that are due.
        """
        if due is None:
            return
        now = time.time()
        with self.lock:
            if due < self.due.get(id, float("inf")):
                self.due[id] = due
                heapq.heappush(self.order, (max(due, now), due, id))
        if due <= now:
            self.ring()

    def next_due(self):
        """Remove the alarm of an object that has a job due. Return the id, or None."""
        now = time.time()
        with self.lock:
            while self.order and self.order[0][1] <= now:
                _, due, id = heapq.heappop(self.order)
                if self.due.get(id) == due:              # else it was set again since
                    del self.due[id]
                    return id
            return None

    def ring(self):
        while self.put and self.free.acquire(blocking=False):
            id = self.next_due()
            if id is None:
                return self.free.release()
            self.put(self.work, id)

    def work(self, id):
        """In the pool: run one job of this object. Then ring for another object."""
        due = None                                       # it was removed, or moved away
        try:
            if self.namespace.path(id).exists():
                due = time.time() + 60                   # in case one_job raises
                due = self.one_job(self.namespace.get(id))
        finally:
            self.set(id, due)
            self.free.release()
            self.ring()

    def one_job(self, stub):
        """Claim a job and run it, in two commits. Return when the next one is due."""
        known = self.directory.ask("/_workspace", f"id={stub.id}")
        if known is None or known["moving"] > MOVES:     # it is being removed, or deleted
            return time.time() + 60
        names = {"x-workspace": known["name"],
                 "x-title": urllib.parse.quote(known["title"])}
        job = json.loads(stub.fetch(Request("POST", "/_claim")).body)
        if job is not None:
            with contextlib.suppress(StorageFault):      # it is in the log
                self.run(stub, job, names)
        return stub.ask("/_due")

    def run(self, stub, job, names):
        stub.fetch(Request("POST", "/_job", f"id={job}", names))

    def failed(self, row, error):
        """Log that a try has failed. The job's host calls this."""
        log_error(f"job {row['job']}, try {row['tries']}", error)


# -- jobs that wait for a call

class Wait:
    """A job that has yielded a function, the call. It goes through these methods of Waits:

        add, begin      it is queued until there is a thread for its call
        call            in that thread: makes the call
        go_on           there, too: the job takes its next step, with what the call returned
                        or raised; if the call is late, in the pool, with a TimeoutError

    The thread of the call ends last, and removes the wait from by_job. The job is not tried
    again before that.
    """

    def __init__(self, host, job, steps, ctx, call):
        self.stub = host.namespace.get(host.id)
        self.key = host.id, job
        self.steps = steps                               # the generator
        self.ctx = ctx
        self.call = call
        self.called_at = float("inf")
        self.next_step = None                            # a function, once it is known
        self.went_on = threading.Event()                 # set after that step


class Waits:
    """Calls the functions that jobs yield, in threads of their own."""
    AT_ONCE = 32                                         # calls that are not late
    THREADS = 256                                        # in all, with late ones
    OF_ONE_OBJECT = 4
    SECONDS = 30.0                                       # then a call is late

    def __init__(self, alarms):
        self.alarms = alarms
        self.lock = threading.Lock()                     # guards all that follows
        self.by_job = {}                                 # all, by (object's id, job's id)
        self.in_line = collections.deque()               # those that have no thread yet
        self.calling = set()                             # those that have one

    def of(self, id):
        """Return the ids of this object's jobs that wait for a call."""
        with self.lock:
            return [job for of, job in self.by_job if of == id]

    def add(self, wait):
        with self.lock:
            self.by_job[wait.key] = wait
            self.in_line.append(wait)
        self.begin()

    def begin(self):
        """Begin the calls in the queue, as long as there are threads for them."""
        with self.lock:
            while self.in_line and self.has_thread():
                call = functools.partial(self.call, self.in_line[0])
                if not in_new_thread(call):              # it is tried again each second
                    return
                self.calling.add(self.in_line.popleft())

    def has_thread(self):
        at_once = [wait for wait in self.calling if not wait.next_step]
        return len(at_once) < self.AT_ONCE and len(self.calling) < self.THREADS

    def call(self, wait):
        """In its own thread: make the call, and have the job go on."""
        wait.called_at = time.monotonic()
        try:
            step = functools.partial(wait.steps.send, wait.call())
        except CRASH as error:
            step = functools.partial(wait.steps.throw, error)
        guarded(self.go_on, wait, step)
        wait.went_on.wait()                              # the pool may be taking the step
        with self.lock:
            self.calling.discard(wait)
            del self.by_job[wait.key]
        self.alarms.set(wait.key[0], time.time())
        self.begin()

    def go_on(self, wait, step):
        """Have the job take this step (HasJobs.own_job), unless its call was late: then it
        has taken another one already."""
        with self.lock:
            if wait.next_step:
                return
            wait.next_step = step
        try:
            wait.stub.fetch(Request("POST", "/_job", f"id={wait.key[1]}"))
        finally:
            wait.went_on.set()

    def give_up_late(self, now):
        """Once a second: fail the tries whose call is late. No thread can be ended from
        outside, so a late call keeps its thread, and another call may begin."""
        with self.lock:
            late = [wait for wait in self.calling
                    if not wait.next_step and now > wait.called_at + self.SECONDS]
        for wait in late:
            error = TimeoutError("the function that the job yields takes more than "
                                 f"{self.SECONDS:g} s; give it a shorter time limit")
            self.alarms.put(self.go_on, wait, functools.partial(wait.steps.throw, error))
        self.begin()


# -- the server's alarms

@addition
class HasAlarms(GuardedNamespace):
    @functools.cached_property
    def alarms(self):
        return whole(Alarms)(self)

    def files(self):
        """Return the id and the path of each object of this kind, awake or not."""
        return ((path.stem, path) for path in self.folder.glob("*.db")
                if not path.name.startswith("new-"))     # the draft of another process

    def name_draft(self, draft, id):
        """Set the alarm under the object's id. Opening the draft set it under another."""
        super().name_draft(draft, id)
        self.alarms.set(id, self.alarms.due.pop(draft, None))


@addition
class RingsAlarms(LoopEdge):
    def __init__(self, *args):
        super().__init__(*args)
        self.alarms = self.env.workspaces.alarms
        self.alarms.directory = self.env.directory
        self.alarms.put = self.pool.share                # any thread may take a job

    def serve_forever(self):
        self.pool.put(self.alarms.look)
        super().serve_forever()

    def tick(self, now):
        super().tick(now)
        self.alarms.ring()
        self.alarms.waits.give_up_late(now)
        for one in self.env.workspaces.everybody():
            one.log_if_long(now)


@addition
class LooksForJobs(Broker):
    def changed_elsewhere(self):
        super().changed_elsewhere()
        self.edge.alarms.look()


# -- the object that has the jobs

class JobTables(Tables):
    """The store of a job. All steps use the same object, because in `ctx.store.exec(sql,
    (yield call))` Python reads ctx.store before the yield. use() prepares it for a step.

    The time limit applies to each statement, not to the job.
    """

    def __init__(self, job):
        self.owner = job.partition(".")[0]

    def use(self, host, may):
        """Begin a step. If the workspace has slept since the last one, host is new."""
        super().__init__(host.store, self.owner, may)
        self.host = host

    def run(self, sql, args):
        self.host.began = time.monotonic()
        return super().run(sql, args)

    def check_thread(self):
        if self.thread != threading.get_ident():
            raise RuntimeError("the function that a job yields can't use ctx; read what it "
                               "needs before the yield")


@addition
class LogsLongTurns(Broadcast):
    """Logs a long turn while it lasts. A slice that waits for the network keeps all other
    requests waiting; if it asks its own server, it waits forever."""
    TURN_SECONDS = 1.0
    doing = None                                         # (its words, since when)
    logged = None                                        # the last one that was logged

    def answer(self, request):
        self.doing = (request.method, request.path), time.monotonic()
        try:
            return super().answer(request)
        finally:
            self.doing = None

    def log_if_long(self, now):
        """Log a turn that takes too long. The loop calls this once a second."""
        doing = self.doing
        if doing and doing is not self.logged and now > doing[1] + self.TURN_SECONDS:
            self.logged = doing
            log(f"{' '.join(doing[0])} keeps all other requests waiting for "
                f"{self.namespace.path(self.id)}; call the network in a function that a "
                "job yields")


@addition
class HasJobs(Broadcast):
    """An object with a table of jobs. due is NULL for a job that was given up."""
    TRIES = 10                                           # after 2, 4, 8 ... s: 17 minutes

    def on_open(self):
        super().on_open()
        with contextlib.suppress(sqlite3.DatabaseError):     # this must not keep people out
            self.namespace.alarms.set(self.id, self.own_due(None))

    def put_in(self, job, args, who, due, key):
        self.store.exec("INSERT INTO jobs (job, args, who, due, key) VALUES (?, ?, ?, ?, "
                        "?)", job, args, who, due, key)
        self.alarm_after_commit(due)

    def cancel(self, *keys):
        """Delete the jobs with these keys. Return whether there were any."""
        found = sum([self.store.exec("DELETE FROM jobs WHERE key = ?", key)
                     for key in keys])
        if found:                                        # the next one may be another now
            self.alarm_after_commit(time.time())
        return found > 0

    def alarm_after_commit(self, due):
        self.store.after_commit.append((self.namespace.alarms.set, self.id, due))

    def own_due(self, request):
        """Return when the next job is due, or None if there is none."""
        row = self.next_job()
        return row and row["due"]

    def next_job(self):
        """Return the first row that waits for no call; None: all do, or too many do."""
        waits = self.namespace.alarms.waits.of(self.id)
        if len(waits) >= Waits.OF_ONE_OBJECT:
            return None
        rows = self.store.query("SELECT id, due, tries, key FROM jobs WHERE due IS NOT "
                                "NULL ORDER BY due, id LIMIT ?", len(waits) + 1)
        return next((row for row in rows if row["id"] not in waits), None)

    def own_claim(self, request):
        """Count a try of the first job that is due. Return its id, or None if none is due.

        The try is committed before the job runs. So a job that crashes the process does not
        come first again and again.
        """
        row = self.next_job()
        if row is None or row["due"] > time.time():
            return None
        tries = row["tries"] % self.TRIES + 1            # a recurring one counts from 1
        self.store.exec("UPDATE jobs SET tries = ?, due = ?, error = 'it did not end' "
                        "WHERE id = ?", tries, self.next_try(row, tries), row["id"])
        return row["id"]

    def next_try(self, row, tries):
        """Return when a job is tried again if it fails; None: it is given up then.

        A recurring one is not given up; it waits for its next time.
        """
        if tries < self.TRIES:
            return time.time() + 2 ** tries
        return self.next_time(row)

    def next_time(self, row):
        """Return when the job recurs; None: it does not, or no longer does."""
        plan = self.router.plans.get(row["key"])
        return plan and plan.next_time(time.time(), self.id)

    def own_job(self, request):
        """Run a claimed job, or go on with it. If it fails, note the error in its row."""
        row = self.store.one("SELECT * FROM jobs WHERE id = ?", request.params["id"])
        if row is None:                                  # it was claimed twice, and is done
            return
        try:
            with self.store.tx():
                self.work(row, request)
        except CRASH as error:
            if not self.store.db.in_transaction:         # SQLite rolled all of it back
                raise
            self.namespace.alarms.failed(row, error)
            text = f"{type(error).__name__}: {error}"[:500]
            text = text.encode("utf-8", "backslashreplace").decode()
            due = self.next_try(row, row["tries"])
            self.store.exec("UPDATE jobs SET error = ?, due = ? WHERE id = ?", text, due,
                            row["id"])

    def work(self, row, request):
        """Begin a job or, if it has waited, go on with it. It acts for the account that
        enqueued it, whose grants were checked then."""
        self.doing = ("job", row["job"]), time.monotonic()
        waited = self.namespace.alarms.waits.by_job.get((self.id, row["id"]))
        ctx = waited.ctx if waited else self.job_context(row, request)
        before = self.store.db.total_changes
        ctx.host = self
        ctx.store.use(self, WRITE)
        try:
            wait = self.last_step(waited) if waited else self.first_step(ctx, row)
        finally:
            ctx.end()
            self.began = time.monotonic()                # restarts the time limit
        if wait:
            self.store.after_commit.append((self.namespace.alarms.waits.add, wait))
            return
        self.wrote = self.store.db.total_changes != before
        self.journal(ctx.viewer, row["job"], str(row["id"]))
        self.finish(row)

    def finish(self, row):
        """Delete the row of a job that is done, or set when it recurs."""
        again = self.next_time(row)
        if again is None:
            self.store.exec("DELETE FROM jobs WHERE id = ?", row["id"])
        else:
            self.store.exec("UPDATE jobs SET due = ?, tries = 0, error = '' WHERE id = ?",
                            again, row["id"])

    def job_context(self, row, request):
        viewer = dataclasses.replace(self.viewer(request), account=row["who"], id=self.id)
        return self.context(self, JobTables(row["job"]), viewer, {}, request)

    def first_step(self, ctx, row):
        """Run the job up to its yield. Return a Wait, or None if the job is done."""
        job = self.router.jobs[row["job"]]
        made = job(ctx, **json.loads(row["args"]))
        if type(made) is not types.GeneratorType:
            if made is not None:
                raise bad_return(job, made, "a job returns nothing, and is not async")
            return None
        ctx.store.use(self, READ)                        # because the next try repeats it
        try:
            call = next(made)
        except StopIteration:
            return None
        if not callable(call):
            raise TypeError(f"a job yields a function, not {call!r:.60}; write `yield "
                            "lambda: ...`, which is called without the workspace's turn")
        return Wait(self, row["id"], made, ctx, call)

    def last_step(self, wait):
        try:
            wait.next_step()
        except StopIteration:
            return None
        raise TypeError("a job may yield only once; enqueue another job for the rest")

    def own_retry(self, request):
        """Have the jobs that were given up tried again, with all their tries."""
        now = time.time()
        self.store.exec("UPDATE jobs SET due = ?, tries = 0 WHERE tries >= ?", now,
                        self.TRIES)
        self.alarm_after_commit(now)

    def own_facts(self, request):
        given_up = self.store.query("SELECT job, tries, error FROM jobs WHERE tries >= ? "
                                    "ORDER BY id LIMIT 5", self.TRIES)
        jobs = self.store.query(
            "SELECT count(*) || CASE WHEN tries >= ?1 THEN ' given up' ELSE ' waiting' END "
            "FROM jobs GROUP BY tries >= ?1", self.TRIES)
        return {**super().own_facts(request), "jobs": ", ".join([row[0] for row in jobs]),
                "failed": [dict(row) for row in given_up]}


@addition
class KeepsPlans(EdgeWorkspace):
    """Keeps one row for each recurring job of the workspace's slices, and no others."""

    def on_open(self):
        super().on_open()
        self.keep_plans()

    def own_claim(self, request):
        self.keep_plans()                                # in case it failed in on_open
        return super().own_claim(request)

    def keep_plans(self):
        plans = self.router.plans
        with contextlib.suppress(sqlite3.DatabaseError):     # this must not keep people out
            there = {row["key"] for row in self.store.query(PLANNED)}
            if there == plans.keys():
                return
            with self.store.tx():
                self.cancel(*(there - plans.keys()))
                for key in plans.keys() - there:
                    name = self.router.job_names[plans[key].job]
                    due = plans[key].next_time(time.time(), self.id)
                    self.put_in(name, "{}", "(schedule)", due, key)


# #### People ##############################################################################

# ==== 43. Keys ============================================================================
# The idea: a new key seals sessions from now on. Sessions that the previous key has sealed
#   stay valid until the next rotation.
# It promises: a running server uses a new key within a second, and no open page notices.

def add_key(path):
    """Write a new key, followed by the newest old one. Drop the keys before that."""
    keys = [secrets.token_hex(32)]
    if path.exists():
        keys += path.read_text().split()
    write_private(path, "".join([f"{key}\n" for key in keys[:2]]).encode())


KEYS_READ = {}                                           # by file: (times, keys)


def keys_now(settings, known=()):
    """Return the keys in the file. If it is lost, log that, and return the keys that were
    read before, or else the known ones. Raises Unusable if there are none.
    """
    path = settings.key_file
    times_read, keys = KEYS_READ.get(path, ((), known))
    status = path.exists() and path.stat()
    times = status and (status.st_mtime_ns, status.st_ctime_ns)      # ctime: after chmod
    if times == times_read:
        return keys
    try:
        keys = load_keys(path)
        KEYS_READ[path] = times, keys
    except Unusable as lost:
        if not keys:
            raise
        log_once(str(lost))
    return keys


@addition
class ReadsKeysAgain(EdgeDirectory):
    def each_second(self):
        super().each_second()
        keys = keys_now(self.namespace.settings, self.keys)
        if keys != self.keys:
            self.keys = keys
            self.namespace.changed(self.id)              # forget pages of old cookies


@verb("keys rotate", "make a new key; sessions of the previous key stay valid until the "
                     "next rotation")
def keys_rotate(settings, given):
    check_there(settings, or_node=True)
    add_key(settings.key_file)
    print("made a new key; the previous one stays valid until the next rotation; if there "
          "are nodes, copy secret.key to them before that")


# ==== 44. Accounts ========================================================================
# The idea: people sign in with a name and a password. A password is hashed so that each
#   guess costs 0.1 s and 32 MiB, and guesses are counted.
# It promises: the hash is made before the request takes the Directory's turn, because every
#   gate waits for that turn. An unknown name takes as long as a wrong password. An account
#   that has signed in from an address before is not locked out there by wrong guesses from
#   elsewhere, or by wrong guesses from there for other accounts.
#
# The path of POST /login:
#
#     ProvesPasswords.prove   without a turn: asks the Directory for the stored hash, and
#                             compares. If it matches, it goes along, as x-stored
#     account_proved          in the Directory's turn: is this still the stored hash?
#     open_session            makes a session, and its cookie

SCRYPT = {"n": 2 ** 14, "r": 16, "p": 1, "maxmem": 64 * 2 ** 20, "dklen": 32}
SCRYPT_AT_ONCE = threading.BoundedSemaphore(2)           # more would take all memory
SCRYPT_IN_LINE = threading.BoundedSemaphore(6)           # more would take all threads
ACCOUNT_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
TRUSTED.update({"x-stored", "x-hashed"})                 # by ProvesPasswords.prove
OWNED = "(account = ? AND operator IS NULL OR operator = ?)"     # an account's sessions


def scrypt(password, salt: bytes):
    """Return the hash (RFC 7914). Raises Refused(503) if too many are waiting."""
    if not SCRYPT_IN_LINE.acquire(blocking=False):
        raise Refused(503, "Many people are signing in. Try again in a moment.",
                      retry_after(2))
    try:
        with SCRYPT_AT_ONCE:
            return hashlib.scrypt(password.encode("utf-8", "replace"), salt=salt, **SCRYPT)
    finally:
        SCRYPT_IN_LINE.release()


def as_hashed(password):
    """Return the password as it is hashed: accents composed, all spaces U+0020 (RFC 8265,
    4.2.2). Otherwise the same password, typed on another keyboard, might not match."""
    spaced = [" " if unicodedata.category(one) == "Zs" else one for one in password]
    return unicodedata.normalize("NFC", "".join(spaced))


def hash_password(password):
    salt = secrets.token_bytes(16)
    return f"{salt.hex()}${scrypt(as_hashed(password), salt).hex()}"


def password_matches(password, stored):
    """True if it is the stored password. If none is stored: False, after the same time.

    Older versions hashed a password exactly as typed. If this differs from as_hashed, both
    are tried. So the time depends only on what was typed, not on what is stored.
    """
    salt, _, known = (stored or "00$").partition("$")
    spellings = dict.fromkeys([as_hashed(password), password])
    found = [scrypt(spelling, bytes.fromhex(salt)).hex() for spelling in spellings]
    matches = [hmac.compare_digest(one, known) for one in found]
    return any(matches) and bool(stored)


def check_password(new):
    """Raise Refused(422) if a new password is too short, too long or not printable."""
    new = as_hashed(new)
    if not 8 <= len(new) <= LONGEST_TYPED or not new.isprintable():
        raise Refused(422, "A password must have 8 to 256 printable characters. Choose "
                           "another.")


def check_account_name(name):
    if not ACCOUNT_NAME.fullmatch(name):
        raise Refused(422, "A name must have 1 to 32 characters: a to z, 0 to 9, and "
                           "hyphens between them. Choose another.")


class Throttle:
    """Remembers attempts by key, such as "to carol". A key with too many has to wait.

    Its memory is bounded: it forgets the oldest keys.
    """
    SECONDS = 600.0                                      # then an attempt is forgotten
    KEYS = 10_000

    def __init__(self, most=10):
        self.most = most
        self.lock = threading.Lock()                     # guards the next line
        self.times = collections.OrderedDict()           # of the last attempts, by key

    def check(self, *keys):
        """Raise Refused(429) if one of the keys has to wait."""
        begin = time.monotonic() - self.SECONDS
        for key in keys:
            times = self.times.get(key, ())
            if len(times) == self.most and times[0] > begin:
                raise Refused(429, "Too many attempts. Wait a few minutes, then try again.",
                              retry_after(int(times[0] - begin) + 1))

    def count(self, *keys):
        now = time.monotonic()
        with self.lock:
            for key in keys:
                self.times[key] = [*self.times.pop(key, []), now][-self.most:]
            while len(self.times) > self.KEYS:
                self.times.popitem(last=False)

    def forgive(self, own, *keys):
        """Forget the attempts of own, and remove them from the other keys: they were typing
        errors, because the password was right in the end."""
        with self.lock:
            mine = self.times.pop(own, ())
            for key in keys:
                times = self.times.get(key, ())
                self.times[key] = [when for when in times if when not in mine]


def count_attempt(attempts, request):
    """Count an attempt from this address. Raises Refused(429) if there were too many."""
    source = f"from {source_of(request.peer)}"
    attempts.check(source)
    attempts.count(source)


def name_and_passwords(request):
    """Return name, password and new password. Raises Refused(400) if one is too long."""
    typed = (account_name(text_of(request, "username")), text_of(request, "password"),
             text_of(request, "new"))
    if max(map(len, typed)) > LONGEST_TYPED:
        raise Refused(400, f"Use at most {LONGEST_TYPED} characters for name and password.")
    return typed


PASSWORD_DOORS = ("/login", "/account/password")         # what is sent there is not kept


@addition
class ProvesPasswords(LoopEdge):
    """Checks passwords before the request takes the Directory's turn. It passes the results
    on in headers."""
    FAMILIAR = 1000                                      # names with their addresses

    def __init__(self, *args):
        super().__init__(*args)
        self.guesses = Throttle()
        self.sign_ins = Throttle(30)                     # each costs 0.1 s, and a row
        self.familiar = {}                               # signed in before; oldest first
        self.add_doors(dict.fromkeys(PASSWORD_DOORS, self.at_password))

    def at_password(self, request, env):
        """Answer a request to one of PASSWORD_DOORS."""
        if request.method == "POST":
            request = self.prove(request, env.directory)
        return env.directory.fetch(request)

    def prove(self, request, directory):
        """Return the request with x-stored, the stored hash if the password matches it, or
        "", and x-hashed, the hash of the new password, or ""."""
        name, password, new = name_and_passwords(request)
        source = source_of(request.peer)
        here = f"{name} from {source}"
        # Wrong guesses by others, from this address or for this name, count as well, unless
        # this account has signed in from here before.
        keys = [here] if here in self.familiar else [here, f"from {source}", f"to {name}"]
        self.guesses.check(*keys)
        self.sign_ins.check(here)
        stored = directory.ask("/_password", headers={"x-account": name})
        if not password_matches(password, stored):
            self.guesses.count(*keys)
            return request.with_headers({"x-stored": ""})
        self.guesses.forgive(*keys)
        self.sign_ins.count(here)
        self.familiar = dict.fromkeys([*self.familiar][-self.FAMILIAR:] + [here])
        return request.with_headers({"x-stored": stored,
                                     "x-hashed": hash_password(new) if new else ""})


def account_proved(ctx):
    """Return the account whose password was proved; "" if wrong, or changed since."""
    name = account_name(ctx.field("username"))
    stored = ctx.host.password_of(name)
    return name if stored and stored == ctx.request.headers.get("x-stored") else ""


def refuse_masked(ctx, what):
    """Raise Refused(403) for an operator who looks on as another account."""
    if ctx.viewer.signature != ctx.viewer.account:
        raise Refused(403, f"You look on as {ctx.viewer.account}, and {what} would outlast "
                           "that. End it first.")


def existing_account(ctx):
    """Return the field account. Raises Refused(422) if no account has this name."""
    name = account_name(ctx.field("account"))
    if not ctx.store.one("SELECT 1 FROM accounts WHERE name = ?", name):
        raise Refused(422, "There is no account with this name. Check the spelling.")
    return name


# The sign-in page carries a form that was sent without a session, and the path to which it
# was sent. UNSENT says that there is none.
UNSENT = {"unsent": "", "to": ""}
MOST_CARRIED = BODY_LIMIT // 4                           # because encoding makes it longer


def login_form(next, personas, problem, status=200, username="", **unsent):
    """Return the sign-in page. unsent: a form that it carries, see UNSENT."""
    body = template("login")(next=next, username=username, problem=problem,
                             demo=bool(personas), persona=[*personas], **unsent)
    return page("Sign in", body, status=status)


def login_page(ctx):
    typed = ctx.typed
    next = local_path(typed.get("next") or ctx.params.get("next", "/"))
    carried = {name: typed.get(name, "") for name in ("username", "problem", *UNSENT)}
    return login_form(next, ctx.host.personas(""), **carried)


def page_of(request):
    """Return the page that a request opens or, if it sends a form, the form's page."""
    if request.method in SAFE:
        query = f"?{request.query}" if request.query else ""
        return local_path(urllib.parse.quote(request.path) + query)
    ours = f"{request.scheme}://{request.headers.get('host', '')}"
    referer = request.headers.get("referer", "")
    return local_path(referer[len(ours):]) if referer.startswith(f"{ours}/") else "/"


def unsent_in(request):
    """Return the form that was sent without a session, so that it can be sent again."""
    is_plain = FORMS.get(request.media_type) is read_form    # others can have files
    if not is_plain or request.method in SAFE or request.path in PASSWORD_DOORS:
        return UNSENT
    body = request.body.decode("latin-1")
    if len(body) > MOST_CARRIED or body.count("&") >= MOST_PAIRS:
        return UNSENT                                    # too much for a sign-in to carry
    return {"unsent": body, "to": urllib.parse.quote(request.path)}


def unsent_page(ctx, unsent, next):
    """Return a page that shows what was not saved, and sends it again at one click."""
    rows = [{"name": name, "value": value, "seen": not name.startswith("_")}
            for name, value in decoded_pairs(unsent, keep_blank_values=True)]
    body = template("login.again")(field=rows, to=local_path(ctx.field("to")), next=next)
    return page("Send it again?", body)


def account_by_password(ctx):
    """Return the account whose password was proved. Raises Refused(422) if it was wrong."""
    account = account_proved(ctx)
    if not account:
        raise Refused(422, "Name and password do not match. Try again.")
    return account


def login(ctx):
    return ctx.host.open_session(ctx, account_by_password(ctx))


def change_password(ctx):
    account = ctx.viewer.account
    if account_proved(ctx) != account:
        raise Refused(422, "The current password is wrong. Try again.")
    check_password(ctx.field("new"))
    store_password(ctx, account, ctx.request.headers["x-hashed"])
    return see_other("/account", which=account)


def my_digest(ctx):
    """Return the digest of the viewer's session in the table, or b"" if there is none."""
    return bytes.fromhex(ctx.request.headers.get("x-session", ""))


def add_account(store, name, hashed, operator):
    """Add an account. Return 1, or 0 if the name is taken."""
    return store.exec("INSERT OR IGNORE INTO accounts (name, label, password, operator) "
                      "VALUES (?, ?, ?, ?)", name, name, hashed, operator)


def store_password(ctx, account, hashed):
    """Store the new hash, and end all other sessions of the account."""
    ctx.store.exec("UPDATE accounts SET password = ? WHERE name = ?", hashed, account)
    end_sessions(ctx, f"{OWNED} AND digest <> ?", account, account, my_digest(ctx))


DIRECTORY_SLICES.append(Slice("passwords", routes=(
    Route("GET", "/login", PUBLIC, login_page),
    Route("POST", "/login", PUBLIC, login),
    Route("POST", "/account/password", ACCOUNT, change_password, form="/account"))))


@addition
class KnowsAccounts(EdgeDirectory):
    def own_personas(self, request):
        return self.personas("")

    def open_session(self, ctx, account, start="/"):
        """Open a session. Return a page that sends a form again if it came without one."""
        answer = super().open_session(ctx, account, start)
        unsent = ctx.field("unsent")
        if not unsent:
            return answer
        said = dict(answer.headers)
        again = unsent_page(ctx, unsent, said["location"])
        return again._replace(headers=(("set-cookie", said["set-cookie"]),),
                              which=answer.which)

    def own_password(self, request):
        return self.password_of(request.headers["x-account"])

    def password_of(self, account):
        """Return the stored hash, or "" if there is none."""
        row = self.store.one("SELECT password FROM accounts WHERE name = ?", account)
        return row["password"] if row else ""

    def own_operator(self, request):
        """True if the session is an operator's, even while it looks on as another."""
        row = self.session(request)
        return bool(row) and self.is_operator(row["operator"] or row["account"])

    def is_operator(self, account):
        return self.store.one("SELECT 1 FROM accounts WHERE name = ? AND operator",
                              account) is not None


@addition
class AsksForPasswords(LoopEdge):
    def refusal(self, request, error):
        """Return the sign-in page if a browser is not signed in."""
        signed_out = isinstance(error, Refused) and error.status == 401
        if not signed_out or not request.opens_page:
            return super().refusal(request, error)
        problem = ""
        if request.method not in SAFE:
            problem = "You are signed out, so this was not saved. Sign in to send it again."
        personas = self.env.directory.ask("/_personas") if self.env.settings.demo else ()
        return login_form(page_of(request), personas, problem, 401, **unsent_in(request))


# -- on the command line

def new_password(name):
    """Ask for a password, or read one from standard input. Return its hash."""
    if sys.stdin.isatty():
        password = getpass.getpass(f"Password of {name}: ")
    else:
        password = sys.stdin.readline().rstrip("\n")
    check_password(password)
    return hash_password(password)


@verb("account add", "add an account", "account", "--operator")
def account_add(settings, given):
    check_account_name(given.account)
    hashed = new_password(given.account)
    with opened(settings, given) as (store, _):
        if not add_account(store, given.account, hashed, given.operator):
            raise Unusable(f"the name {given.account} is taken; choose another")
    print(f"{given.account} can sign in now")


@verb("account passwd", "set a new password, and sign the account out everywhere",
      "account")
def account_passwd(settings, given):
    hashed = new_password(given.account)
    with opened(settings, given) as (store, _):
        row_of(store, "accounts", given.account)
        store.exec("UPDATE accounts SET password = ? WHERE name = ?", hashed, given.account)
        store.exec(f"DELETE FROM sessions WHERE {OWNED}", given.account, given.account)
    print(f"{given.account} has a new password, and is signed out everywhere")


@verb("account list", "list the accounts")
def account_list(settings, given):
    table(looked_up(settings, lambda store: store.query(
        "SELECT name, CASE WHEN operator THEN 'operator' ELSE '' END, (SELECT count(*) "
        "FROM memberships WHERE account = name) || ' workspaces' FROM accounts ORDER BY "
        "name")))


LAST_OWNED = """SELECT w.name FROM memberships m JOIN workspaces w ON w.id = m.workspace
                WHERE m.role = 'owner' GROUP BY w.id
                HAVING count(*) = 1 AND max(m.account) = ?"""


@verb("account remove", "remove an account, with its sessions and memberships",
      "account")
def account_remove(settings, given):
    with opened(settings, given) as (store, _):
        row_of(store, "accounts", given.account)
        alone = store.one(LAST_OWNED, given.account)
        if alone:
            raise Unusable(f"{given.account} is the last owner of {alone['name']}; make "
                           "somebody else an owner first, or remove the workspace")
        store.exec("DELETE FROM accounts WHERE name = ?", given.account)


# ==== 45. Account page ====================================================================
# The idea: people see where they are signed in, and can end sessions they don't recognize.
# It promises: a session that is used stays valid; one that is not used for 30 days ends,
#   and its open pages end within a second.
# It needs: 44 Accounts.

ACCOUNT_PARTS = []                                       # part(ctx): more of the page

# Signs in a User-Agent, and what they mean. The first sign found counts, because most
# browsers claim to be others as well.
BROWSERS = {"Edg": "Edge", "OPR": "Opera", "Firefox": "Firefox", "FxiOS": "Firefox",
            "CriOS": "Chrome", "Chrome": "Chrome", "Safari": "Safari", "": "A browser"}
SYSTEMS = {"iPhone": "iPhone", "iPad": "iPad", "Android": "Android", "Windows": "Windows",
           "CrOS": "ChromeOS", "Mac OS": "macOS", "Linux": "Linux", "": "a device"}


def device(agent):
    """Return a User-Agent in words: "Chrome on Linux"."""
    browser, system = [next(words for sign, words in known.items() if sign in agent)
                       for known in (BROWSERS, SYSTEMS)]
    return f"{browser} on {system}"


def utc(seconds):
    """Return a time in words: "30 Nov 2026, 14:05 UTC"."""
    return time.strftime("%d %b %Y, %H:%M UTC", time.gmtime(seconds))


def moment(seconds):
    """Return a time as markup. A browser with scripts shows it in its own time zone."""
    exact = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
    return template("layout.moment")(exact=exact, text=utc(seconds))


def account_page(ctx):
    """Return the page of an account. It names a session by a part of its hash, because
    nobody can sign in with that."""
    mine = my_digest(ctx)
    account = ctx.viewer.account
    rows = ctx.store.query(f"SELECT digest, created, agent FROM sessions WHERE {OWNED} "
                           "ORDER BY created DESC LIMIT 100", account, account)
    sessions = [{"name": row["digest"].hex()[:16], "device": device(row["agent"]),
                 "since": moment(row["created"]), "utc": utc(row["created"]),
                 "peer": row["agent"].partition(" ")[0], "this": row["digest"] == mine}
                for row in rows]
    problem = ctx.typed.get("problem", "") if "username" in ctx.typed else ""
    more = Html().join([part(ctx) for part in ACCOUNT_PARTS])
    body = template("account")(session=sessions, account=account, problem=problem,
                               password=ctx.host.password_of(account) != "",
                               stamp=ctx.stamp, more=more)
    return page("Account", body, ctx.viewer)


DIGEST_NAME = "lower(substr(hex(digest), 1, 16))"        # how a page names a secret


def choose_sessions(ctx):
    """End some sessions. The field session is the name of one, or "all", or "others"."""
    which = ctx.field("session")
    account = ctx.viewer.account
    mine = ctx.request.headers["x-session"][:16]
    how, name = {"all": ("<>", ""), "others": ("<>", mine)}.get(which, ("=", which))
    end_sessions(ctx, f"{OWNED} AND {DIGEST_NAME} {how} ?", account, account, name)
    return see_other("/account", which=f"sessions: {which}"[:64])


DIRECTORY_SLICES.append(Slice("sessions", routes=(
    Route("GET", "/account", ACCOUNT, account_page),
    Route("POST", "/account/sessions", ACCOUNT, choose_sessions))))


@addition
class EndsSessions(EdgeDirectory):
    def session(self, request):
        """Return the session. If it is in the second half of its time, restart its time."""
        row = super().session(request)
        half = time.time() + SESSION_SECONDS / 2
        if row and row["expires"] < half and row["operator"] is None:
            with contextlib.suppress(sqlite3.OperationalError):  # locked: try next time
                self.store.exec("UPDATE sessions SET expires = ? WHERE digest = ?",
                                time.time() + SESSION_SECONDS, row["digest"])
        return row

    def each_second(self):
        super().each_second()
        now = time.time()
        spent = self.accounts_of(SPENT, (now,))
        if spent:
            with self.store.tx():
                self.store.exec(f"DELETE FROM sessions WHERE {SPENT}", now)
                for row in spent:
                    self.bus.publish(f"access:{row['account']}")


# ==== 46. Masquerade ======================================================================
# The idea: an operator looks on as another account, to see what it sees. The operator's
#   session changes to that account, and remembers the operator.
# It promises: this ends after 15 minutes. It is read-only, unless the operator asks for
#   more. Each page says so, and the journal names both accounts.
# It needs: 44 Accounts, which knows the operators.
#
# The row of olga's session, before and while she looks on as carol:
#
#     account   operator   read_only   expires
#     olga      NULL       0           in 30 days
#     carol     olga       1           in 15 minutes

MASQUERADE_SECONDS = 15 * 60
TRUSTED.update({"x-operator", "x-read-only"})
BEGIN_MASK = """UPDATE sessions SET account = ?, operator = ?, read_only = ?, expires = ?
                WHERE digest = ?"""
END_MASK = """UPDATE sessions SET account = operator, operator = NULL, read_only = 0,
              expires = ? WHERE digest = ? AND operator IS NOT NULL"""
# operator > '' means IS NOT NULL, but lets SQLite use the index sessions_until.
MASKS_OVER = f"{LABELLED} sessions WHERE operator > '' AND expires <= ?"


@dataclasses.dataclass(frozen=True)
class Masked(Viewer):
    """An operator who looks on as another account."""
    operator: str = ""
    read_only: bool = False
    AS = " as "

    def permit(self, grant, method="GET"):
        super().permit(grant, method)
        own = grant == PUBLIC and not self.workspace     # such as /masquerade/end
        if self.read_only and not own and method not in SAFE:
            raise Refused(403, "You look on read-only. End it, or begin again with writing "
                               "allowed.")

    @property
    def signature(self):
        return f"{self.operator}{self.AS}{self.account}"

    def banner(self):
        how = "read-only" if self.read_only else "writing"
        return template("layout.masquerade")(operator=self.operator, account=self.account,
                                             how=how)


def masked(viewer, operator, read_only):
    """Return a Masked if an operator looks on as this viewer, else the viewer."""
    if not operator or isinstance(viewer, Masked):        # the Directory's own are already
        return viewer
    return Masked(**vars(viewer), operator=operator, read_only=bool(read_only))


def masked_in(viewer, request):
    """Return a Masked if the verdict names an operator, else the viewer."""
    header = request.headers.get
    return masked(viewer, header("x-operator"), header("x-read-only"))


def masquerade(ctx):
    session = ctx.host.session(ctx.request)
    operator = session["operator"] or session["account"]
    if not ctx.host.is_operator(operator):
        raise Refused(403, "Only an operator of this server may do that. To make one, run: "
                           "account add NAME --operator")
    account = existing_account(ctx)
    ctx.store.exec(BEGIN_MASK, account, operator, not ctx.checked("writes"),
                   time.time() + MASQUERADE_SECONDS, session["digest"])
    access_changed(ctx, session["account"])
    return see_other(local_path(ctx.field("next", "/")), which=account)


def unmask(ctx):
    """End the masquerade. (If its time has just run out, the viewer is the operator.)"""
    session = ctx.host.session(ctx.request)
    if session and session["operator"]:
        ctx.host.end_mask(session)
    return see_other("/", which=ctx.viewer.account)


DIRECTORY_SLICES.append(Slice("masquerade", routes=(
    Route("POST", "/masquerade", ACCOUNT, masquerade),
    Route("POST", "/masquerade/end", PUBLIC, unmask))))


VIEWERS.append(masked_in)


@addition
class KeepsMasks(Broadcast):
    def job_context(self, row, request):
        """Have a job run as the account that an operator looked on as when enqueuing it."""
        ctx = super().job_context(row, request)
        operator, as_whom, account = row["who"].partition(Masked.AS)
        if as_whom and ACCOUNT_NAME.fullmatch(operator):     # else of a token
            whose = dataclasses.replace(ctx.viewer, account=account)
            ctx.viewer = masked(whose, operator, False)
        return ctx


@addition
class LetsOperatorsLookOn(EdgeDirectory):
    SIGNED_IN = (f"{LABELLED} sessions WHERE digest = ? "
                 "AND (expires > ? OR operator IS NOT NULL)")

    def session(self, request):
        """Return the session; if its masquerade's time is over, end that first."""
        row = super().session(request)
        if row and row["operator"] and row["expires"] <= time.time():
            self.end_overdue_mask(row)
            return super().session(request)
        return row

    def end_overdue_mask(self, session):
        with self.store.tx():
            self.end_mask(session)
            self.journal(self.viewer_of(session), "directory.unmask", "time is over")

    def end_mask(self, session):
        """Give the session back to its operator, or delete it if it has expired as well."""
        until = session["expires"] + SESSION_SECONDS
        if until > time.time():
            self.store.exec(END_MASK, until, session["digest"])
        else:
            self.store.exec("DELETE FROM sessions WHERE digest = ?", session["digest"])
        self.bus.publish(f"access:{session['account']}")

    def viewer_of(self, session):
        viewer = super().viewer_of(session)
        return masked(viewer, session["operator"], session["read_only"])

    def say(self, viewer, row):
        said = super().say(viewer, row)
        if not isinstance(viewer, Masked):
            return said
        said["x-operator"] = viewer.operator
        if viewer.read_only:
            grants = said["x-grants"].split(",")
            said["x-grants"] = ",".join([one for one in grants if one.endswith(":read")])
            said["x-can-delete"] = "false"
            said["x-read-only"] = "true"
        return said

    def accounts_of(self, where, args):
        """Return the accounts and their operators, because the pages of both end."""
        return self.store.query(
            f"SELECT account FROM sessions WHERE {where} UNION SELECT operator FROM "
            f"sessions WHERE operator IS NOT NULL AND {where}", *args, *args)

    def each_second(self):
        super().each_second()
        for session in self.store.query(MASKS_OVER, time.time()):
            self.end_overdue_mask(session)


# ==== 47. Links ===========================================================================
# The idea: a link lets its holder do one thing, a few times, for some days: enter a
#   workspace, sign in on another device, or set a new password. A new server prints a link
#   that makes its first account.
# It promises: the secret follows the # of an address. Browsers do not send that part, so it
#   is in no log and no Referer; only its hash is stored. Looking at a link does not use it
#   up. No link makes an owner, or changes the role of a member. A link is void as soon as
#   its maker could no longer make it: foreign keys remove it with the maker's session, or
#   with the maker's membership, which any change of the role replaces.
# Who uses it: the members page, the account page, and the first start.
# It needs: 35 Fields, 44 Accounts, 45 Account page.
#
# Its table is in section 27:
#
#     links         digest (of the secret), kind, uses (that are left), expires, used_by
#                   (accounts); and by kind, else NULL:
#     - invite      maker, workspace, role
#     - device      session (of the maker)
#     - password    maker, account (whose), password (a hash of the hash stored now)
#     - first       nothing
#
# The path of a link:
#
#     make_link         adds the row, and shows /join#SECRET, only once
#     GET /join         link_page: its script takes the secret out of the address, and sends
#     POST /join        use_link: shows what the link is for, and a form
#     POST /join, with  OpensLinks.at_link hashes the typed password, before the request
#     the field how     takes the Directory's turn; use_link calls Kind.use, opens a session

DAY = 86400.0                                            # seconds
MOST_LINKS = 100                                         # of one workspace
LONGEST_LINK = 30                                        # days
MOST_USES = 100
# A link, with the role that its maker has now (makes) and the account it signs in (person).
GOOD_LINK = """SELECT l.*, w.name, coalesce(w.title, w.name) AS title, m.role AS makes,
               coalesce(l.account, s.account) AS person FROM links l
               LEFT JOIN workspaces w ON w.id = l.workspace AND NOT w.moving
               LEFT JOIN memberships m ON m.workspace = w.id AND m.account = l.maker
               LEFT JOIN sessions s ON s.digest = l.session AND s.operator IS NULL
               AND s.expires > ? WHERE l.digest = ? AND l.uses > 0 AND l.expires > ?"""
LINKS_INTO = f"""SELECT {DIGEST_NAME} AS id, role, maker, uses, expires, used_by FROM links
                 WHERE workspace = ? AND expires > ? ORDER BY expires"""
OLD_LINKS = """DELETE FROM links WHERE digest IN (SELECT digest FROM links
               WHERE expires <= ? LIMIT 100)"""
NO_LINK = ("This link is not valid: it was used or withdrawn, has expired, or was not "
           "copied in full. Ask for a new one.")


class Kind(NamedTuple):
    """A kind of link. title: of its page. holds(host, link): could its maker still make it?
    use(ctx, link) uses it, and returns the account to sign in."""
    title: str
    holds: Callable[..., bool]
    use: Callable[..., str]


# -- making a link

def add_link(store, kind, seconds, **row):
    """Add a link. Return its secret."""
    secret = secrets.token_urlsafe(32)
    row = {"digest": token_hash(secret), "kind": kind, "uses": 1,
           "expires": time.time() + seconds, **row}
    marks = ", ".join("?" * len(row))
    store.exec(f"INSERT INTO links ({', '.join(row)}) VALUES ({marks})", *row.values())
    return secret


def new_link_page(ctx, secret, what, back, which):
    """Return the page that shows a link. Nothing keeps it, so it is shown only once (70).
    """
    request = ctx.request
    address = f"{request.scheme}://{request.headers.get('host', '')}/join#{secret}"
    body = template("links.made")(address=address, what=what, back=back)
    return page("A link", body, ctx.viewer)._replace(
        headers=(("cache-control", "no-store"),), which=which)


def make_link(ctx):
    """Make a link into this workspace. Fields: role, uses and days."""
    refuse_masked(ctx, "a link")
    role = valid_role(ctx.field("role", "member"))
    uses = within("uses", ctx.number("uses", 1), MOST_USES)
    days = within("days", ctx.number("days", 7), LONGEST_LINK)
    if role == "owner":
        raise Refused(422, "A link can't make an owner. Choose another role, and make them "
                           "an owner after they have joined.")
    links = ctx.store.query(LINKS_INTO, ctx.viewer.id, time.time())
    if sum([link["uses"] > 0 for link in links]) >= MOST_LINKS:
        raise Refused(422, f"There are {MOST_LINKS} links already. Withdraw one first.")
    secret = add_link(ctx.store, "invite", days * DAY, workspace=ctx.viewer.id, role=role,
                      uses=uses, maker=ctx.viewer.account)
    ctx.publish("members")
    people = "one person" if uses == 1 else f"{uses} people"
    until = moment(time.time() + days * DAY)
    what = Html().join([f"It lets {people} in, as {role}, until ", until, "."])
    which = f"{ctx.viewer.id} {role}, uses: {uses}, days: {days}"
    return new_link_page(ctx, secret, what, f"/w/{ctx.workspace}/members/links", which)


def within(name, number, most):
    if not 1 <= number <= most:
        raise Refused(422, f"{name} must be a number from 1 to {most}.")
    return number


def withdraw_link(ctx):
    """Remove a link. The field link is the part of its hash that the page of links has."""
    link = ctx.field("link")[:16]
    ctx.store.exec(f"DELETE FROM links WHERE workspace = ? AND {DIGEST_NAME} = ?",
                   ctx.viewer.id, link)
    ctx.publish("members")
    return see_other(f"/w/{ctx.workspace}/members/links", which=f"{ctx.viewer.id} {link}")


def device_link(ctx):
    """Make a link that signs the viewer in on another device. It voids the previous one."""
    refuse_masked(ctx, "a link")
    session = my_digest(ctx)
    ctx.store.exec("DELETE FROM links WHERE session = ?", session)
    secret = add_link(ctx.store, "device", 300, session=session)
    what = (f"It signs you in as {ctx.viewer.account} on another device, once, within five "
            "minutes. Do not give it to anybody.")
    return new_link_page(ctx, secret, what, "/account", ctx.viewer.account)


def password_link(ctx):
    """Make a link with which an account sets a new password. It voids the previous one."""
    refuse_masked(ctx, "a link")
    maker = ctx.viewer.account
    if not ctx.host.is_operator(maker):
        raise Refused(403, "Only an operator of this server may do that. Ask one.")
    account = existing_account(ctx)
    ctx.store.exec("DELETE FROM links WHERE account = ?", account)
    secret = add_link(ctx.store, "password", DAY, account=account, maker=maker,
                      password=password_mark(ctx.host, account))
    what = f"With it, {account} can choose a new password, once, within a day."
    return new_link_page(ctx, secret, what, "/account", account)


def password_mark(host, account):
    """Return a hash of the password's hash. It differs as soon as the password changes."""
    return token_hash(host.password_of(account)).hex()


# -- using a link

def secret_in(text):
    """Return the secret; text may be the whole address."""
    return text.rpartition("#")[2].strip()


def link_page(ctx, secret=""):
    """Return the page of a link or, without a secret, the page that asks for one. After a
    mistake, the secret is among the typed values."""
    secret = secret or secret_in(ctx.typed.get("link", ""))
    link = ctx.host.link(token_hash(secret))
    kind = link["kind"] if link else "paste"
    title, holes = "You have a link", {}
    if link:
        title, holes = KINDS[kind].title, values_of_link(ctx, link)
    parts = {name: name == kind for name in ("paste", *KINDS)}
    body = template("links")(heading=title, secret=secret, **parts, **holes, **mistake(ctx))
    return page(title, body, ctx.viewer)


def values_of_link(ctx, link):
    """Return the values for the page of a link. member, joins, stranger, other and new are
    parts of links.html: they show the viewer the right forms."""
    me = ctx.viewer.account
    member = role_of(ctx.store, link["workspace"], me) != NOT_A_MEMBER
    said = {name: link[name] for name in ("title", "role", "person")}
    return {**said, "by": people_of(ctx, [link["maker"]])[0], "may": in_words(link["role"]),
            "next": f"/w/{link['name']}" if link["name"] else "/",
            "member": member, "joins": bool(me) and not member, "stranger": not me,
            "other": bool(me) and me != link["person"], "new": True,
            "me": me, "username": ctx.typed.get("username", ""), "stamp": ctx.stamp}


def mistake(ctx):
    """Return the values that show a mistake. The page can have two forms, to sign in
    (known) and for a new account; message and cursor go into the one that was used."""
    how, problem = ctx.typed.get("how"), ctx.typed.get("problem", "")
    known = how == "known"
    return {"problem": "" if known else problem, "known_problem": problem if known else "",
            "again_known": known, "again_new": how == "new"}


def use_link(ctx):
    """Use a link. Without the field how, only show the link's page: this is a request of
    the script that takes the secret out of the address."""
    secret = secret_in(ctx.field("link"))
    link = ctx.host.link(token_hash(secret))
    if not link:
        raise Refused(422, NO_LINK)
    if not ctx.field("how"):
        return link_page(ctx, secret)
    refuse_masked(ctx, "a link")
    account = KINDS[link["kind"]].use(ctx, link)
    if account == ctx.viewer.account:
        answer = see_other(local_path(ctx.field("next", "/")))
    else:
        answer = ctx.host.open_session(ctx, account)
    which = " ".join(filter(None, [link["workspace"], link["kind"], account]))
    return answer._replace(which=which)


def count_use(ctx, link, account):
    """Note that this account has used the link. Return the account, as Kind.use does."""
    ctx.store.exec("UPDATE links SET uses = uses - 1, used_by = ltrim(used_by || ' ' || ?) "
                   "WHERE digest = ?", account, link["digest"])
    return account


def join(ctx, link):
    """Let somebody into a workspace. Somebody who is a member already keeps the role."""
    account = joining(ctx)
    if role_of(ctx.store, link["workspace"], account) == NOT_A_MEMBER:
        count_use(ctx, link, account)
        ctx.viewer = dataclasses.replace(ctx.viewer, id=link["workspace"])
        put_role(ctx, account, NOT_A_MEMBER, link["role"])
    return account


def joining(ctx):
    """Return the account that joins. how: "new", "known" (by password), else signed in."""
    how = ctx.field("how")
    if how == "new":
        return new_account(ctx, operator=False)
    if how == "known":
        return account_by_password(ctx)
    if not ctx.viewer.account:
        raise Refused(422, "You are signed out. Sign in, or make an account.")
    return ctx.viewer.account


def new_account(ctx, operator):
    name = account_name(ctx.field("username"))
    check_account_name(name)
    if not add_account(ctx.store, name, new_hash(ctx), operator):
        raise Refused(422, f"The name {name} is taken. Choose another, or sign in if it is "
                           "yours.")
    return name


def new_hash(ctx):
    """Return the hash that at_link made of the new password. Raises Refused(422)."""
    check_password(ctx.field("new"))
    hashed = ctx.request.headers.get("x-hashed")
    if not hashed:
        raise Refused(422, "To set the password, use the form that the link opens.")
    return hashed


def sign_in_here(ctx, link):
    return count_use(ctx, link, link["person"])


def set_password(ctx, link):
    store_password(ctx, link["person"], new_hash(ctx))
    return sign_in_here(ctx, link)


def make_first(ctx, link):
    return count_use(ctx, link, new_account(ctx, operator=True))


def may_invite(host, link):
    return "members:manage" in ROLES.get(link["makes"], ())


def may_set(host, link):
    unchanged = link["password"] == password_mark(host, link["account"])
    return unchanged and host.is_operator(link["maker"])


KINDS = {"invite": Kind("You are invited", may_invite, join),
         "device": Kind("Sign in on this device",
                        lambda host, link: link["person"] is not None, sign_in_here),
         "password": Kind("Choose a new password", may_set, set_password),
         "first": Kind("Make the first account", lambda host, link: host.is_empty(),
                       make_first)}


# -- pages

def links_region(ctx):
    rows = [link_row(ctx, row)
            for row in ctx.store.query(LINKS_INTO, ctx.viewer.id, time.time())]
    return template("links.region")(link=rows, none=not rows)


def link_row(ctx, link):
    people = people_of(ctx, [link["maker"], *link["used_by"].split()])
    came = [{"person": one} for one in people[1:]]
    return {**link, "until": moment(link["expires"]), "utc": utc(link["expires"]),
            "by": people[0], "came": came != [], "guest": came,
            "open": link["uses"] > 0, "spent": link["uses"] == 0}


def people_of(ctx, names):
    """Return these accounts as lists show them, in this order. Some may be gone."""
    marks = ", ".join("?" * len(names))
    rows = ctx.store.query(f"SELECT name, label FROM accounts WHERE name IN ({marks})",
                           *names)
    known = {row["name"]: ctx.host.person(row) for row in rows}
    return [known.get(name, name) for name in names]


def in_words(role):
    """Return a role in words: "read, write and delete todos; manage members"."""
    verbs = {}
    for grant in ROLES.get(role, ()):
        thing, _, verb = grant.partition(":")
        verbs.setdefault(thing, []).append(verb)
    said = [" and ".join(", ".join(some).rsplit(", ", 1)) for some in verbs.values()]
    return "; ".join(map("{} {}".format, said, verbs))


def roles_in_words():
    """Return the explanation of the roles, to show next to the choice of one."""
    return template("links.roles")(
        can=[{"role": role, "may": in_words(role)} for role in ROLES])


def links_page(ctx, region):
    typed = {"uses": "1", "days": "7", "role": "member", "problem": "", **ctx.typed}
    roles = [{"role": role, "selected": role == typed["role"]} for role in ROLES
             if role != "owner"]
    return template("links.page")(
        workspace=ctx.title, option=roles, uses=typed["uses"], days=typed["days"],
        problem=typed["problem"], roles=roles_in_words(), region=region,
        live=template("slice.live")(), stamp=ctx.stamp)


def account_links(ctx):
    typed = ctx.typed if "account" in ctx.typed else {}
    return template("links.account")(
        operator=ctx.host.is_operator(ctx.viewer.account),
        account=typed.get("account", ""), problem=typed.get("problem", ""),
        stamp=ctx.stamp)


ACCOUNT_PARTS.append(account_links)


def home_or_first(ctx):
    """Return the home page; while there is no account, a page that says how to make one."""
    if ctx.viewer.account or not ctx.host.is_empty():
        return home(ctx)
    return page("Welcome", template("links.nobody")(**LAYOUT))


invitations = Live("/members/links", "members:manage", "Links",
                   (Region("members", links_region),), links_page, tab=False)

DIRECTORY_SLICES.append(Slice("links", live=(invitations,), routes=(
    Route("GET", "/", PUBLIC, home_or_first),
    Route("GET", "/join", PUBLIC, link_page),
    Route("POST", "/join", PUBLIC, use_link, says="opened a link:"),
    Route("POST", "/members/links", "members:manage", make_link, says="made a link:"),
    Route("POST", "/members/links/withdraw", "members:manage", withdraw_link,
          says="withdrew the link"),
    Route("POST", "/account/links", ACCOUNT, device_link),
    Route("POST", "/account/links/password", ACCOUNT, password_link,
          form="/account"))))


def way_to_links(ctx):
    return template("links.way")() if ctx.viewer.can("members:manage") else Html()


MEMBERS_PARTS.append(way_to_links)


@addition
class KnowsLinks(EdgeDirectory):
    def link(self, digest):
        """Return the row of a link that can be used now, or None."""
        now = time.time()
        row = self.store.one(GOOD_LINK, now, digest, now)
        return row if row and KINDS[row["kind"]].holds(self, row) else None

    def each_second(self):
        """Remove expired links. A clock that is set back must not make them valid again."""
        super().each_second()
        now = time.time()
        if self.store.one("SELECT 1 FROM links WHERE expires <= ?", now):
            with self.store.tx():
                self.store.exec(OLD_LINKS, now)

    def is_empty(self):
        return self.store.one("SELECT 1 FROM accounts LIMIT 1") is None

    def own_link(self, request):
        return self.link(bytes.fromhex(request.headers["x-link"])) is not None

    def own_first(self, request):
        """Return the secret of a new link for the first account; "" if there are accounts.
        It voids the link that was printed before."""
        if not self.is_empty():
            return ""
        with self.store.tx():
            self.store.exec("DELETE FROM links WHERE kind = 'first'")
            return add_link(self.store, "first", 7 * DAY)


@addition
class OpensLinks(LoopEdge):
    def __init__(self, *args):
        super().__init__(*args)
        self.link_guesses = Throttle()
        self.made_accounts = Throttle(MOST_USES)         # each takes 0.1 s to hash
        self.add_doors({"/join": self.at_link})

    def at_link(self, request, env):
        """Answer /join. Passwords are hashed before the request takes the Directory's turn,
        and only for a valid link, so that guesses do not slow down people who have one."""
        if request.method in SAFE:
            return env.directory.fetch(request)
        digest = token_hash(secret_in(text_of(request, "link"))).hex()
        if env.directory.ask("/_link", headers={"x-link": digest}):
            request = self.with_hashes(request, env)
        else:
            count_attempt(self.link_guesses, request)
        return env.directory.fetch(request)

    def with_hashes(self, request, env):
        if text_of(request, "how") == "known":
            return self.prove(request, env.directory)
        new = name_and_passwords(request)[2]
        if not new:
            return request
        count_attempt(self.made_accounts, request)
        return request.with_headers({"x-hashed": hash_password(new)})


def print_first_link(server, address):
    """Print the link that makes the first account. It goes to standard output, not to the
    log of errors, because it is a secret."""
    if server.settings.plane == "data":
        return
    secret = server.env.directory.ask("/_first")
    if secret:
        print("orion: nobody can sign in yet; make the first account, an operator, at "
              f"{address}/join#{secret}", flush=True)


AT_START.append(print_first_link)


def no_links(request, env):
    """Refuse /join under --plain."""
    raise Refused(404, "This server runs with --plain, which has neither passwords nor "
                       "links. Start it without --plain.")


PLAIN.append(lambda env: env.doors.update({"/join": no_links}))


# ==== 48. Onlookers =======================================================================
# The idea: each page of a workspace shows who else is looking at it now.
# It promises: within a second everybody sees who came and who went. Other requests do not
#   have to wait for that, however many people look on.
# Who uses it: the pages of workspaces.

@addition
class TellsWhoIsHere(Broker):
    SHOWN = 7                                            # people; they fit on a phone
    unannounced = ()                                     # ids: they show no watchers (72)

    def __init__(self, edge):
        super().__init__(edge)
        self.here = {}                                   # by object: what its streams show
        self.came_or_went = set()                        # objects whose watchers changed

    def count_watcher(self, stream, id, more):
        """Show a new watcher what the others see. The first one sees itself."""
        super().count_watcher(stream, id, more)
        self.came_or_went.add(id)
        inside = stream.again.path.startswith("/w/")     # else it is a home page: --single
        if id not in self.channels:
            self.here.pop(id, None)
        elif more > 0 and inside and id not in self.unannounced:
            if id not in self.here:
                self.here[id] = self.presence([stream])
            self.show_here(stream, self.here[id])

    def tell_who_is_here(self):
        """Once a second: if somebody came or went, tell all watchers of the object who is
        there now. A reloaded page has come back by then, so this does not report it."""
        changed, self.came_or_went = self.came_or_went, set()
        for id in changed & {*self.channels} - {*self.unannounced}:
            streams = self.watchers(id)
            piece = self.presence(streams)
            if id not in self.here or piece.etag != self.here[id].etag:
                self.here[id] = piece
                self.some_at_a_time(streams, self.show_here, piece)

    def show_here(self, stream, piece):
        """Show it in an open stream. Section 69 shows it only to people."""
        if stream.channels:                              # else the stream has ended
            stream.show("here", piece)

    def presence(self, streams) -> Piece:
        people = {stream.account: stream for stream in streams}
        some = [{"person": self.shown(people[name])}
                for name in sorted(people)[:self.SHOWN]]
        html = template("here")(name=some, all=len(people), watchers=len(streams),
                                rest=len(people) - len(some))
        return Piece(html, main=False)

    def shown(self, stream):
        """Return how a page shows this watcher: by account. Section 49 shows more."""
        return stream.account


@addition
class LooksWhoIsHere(LoopEdge):
    def tick(self, now):
        super().tick(now)
        guarded(self.broker.tell_who_is_here)


# ==== 49. People ==========================================================================
# The idea: besides the name of the account, carol, people have one that others see: Carol
#   Jones. In the tables it is the account's label. Lists show it, with its initials on a
#   colour that the account keeps.
# It promises: only the name of the account identifies people. It is shown, too, where
#   others decide about them: among members, and in an invitation. Nobody can choose the
#   name of another account. All open pages show a new name at once.
# Who uses it: the account page; the lists of members and links; the head of each page, and
#   the list of people who look at it.
# It needs: 35 Fields, 36 Ordinary pages, 38 Assets, 44 Accounts, 45 Account page,
#   47 Links.

LONGEST_NAME = 63                                        # characters
COLOURS = 6                                              # .face-0 to .face-5 in style.css
TRUSTED.add("x-label")


@functools.lru_cache(maxsize=1000)
def person_of(account, label):
    """Return a person as lists show them."""
    other = label != account
    return template("people.person")(
        account=account, label=label, initials=initials(label), other=other,
        title=f"{label} ({account})" if other else account,
        colour=int(fingerprint(account.encode()), 16) % COLOURS)


def initials(label):
    """Return the first letters of the first and of the last word: Carol Jones, CJ."""
    letters = [word[0] for word in label.split() if word[0].isalnum()] or [label[:1]]
    return "".join(letters[:1] + letters[1:][-1:]).upper()


def of_viewer(viewer):
    """Return the part of a page's head that shows its viewer."""
    if not viewer.account:
        return Html()
    style = link("stylesheet", f"/you.css?{viewer.account}")
    return Html().join([style, person_of(viewer.account, viewer.label or viewer.account)])


setattr(Viewer, "person", property(of_viewer))


def you_css(request, env):
    """Return a style that adds "(you)" to the account in the query. A list can't add it,
    because it is rendered once for many people."""
    only_read(request)
    if not ACCOUNT_NAME.fullmatch(request.query):
        raise Refused(*NOTHING_HERE)
    rule = f'[data-account="{request.query}"] {{ --you: "(you)" }}\n'
    return Response(200, rule.encode(), "text/css; charset=utf-8", FOR_A_YEAR)


DOORS.update({"/you.css": you_css})


@addition
class TellsLabels(EdgeDirectory):
    def viewer_of(self, session):
        return dataclasses.replace(super().viewer_of(session), label=session["label"])

    def say(self, viewer, row):
        said = super().say(viewer, row)
        if viewer.label not in ("", viewer.account):
            said["x-label"] = urllib.parse.quote(viewer.label)
        return said

    def person(self, row):
        return person_of(row["name"], row["label"])


def with_label(viewer, request):
    label = urllib.parse.unquote(request.headers.get("x-label", ""))
    return dataclasses.replace(viewer, label=label) if label else viewer


VIEWERS.append(with_label)


@addition
class ShowsPeople(Broker):
    def shown(self, stream):
        said = dict(zip(VIEWER_HEADERS, stream.viewer))
        label = urllib.parse.unquote(said["x-label"])
        return person_of(stream.account, label or stream.account)


# -- the account page

def account_label(ctx):
    account, label = ctx.viewer.account, ctx.viewer.label
    typed = ctx.typed if "label" in ctx.typed else {}
    return template("people.account")(
        account=account, label=typed.get("label", "" if label == account else label),
        problem=typed.get("problem", ""), stamp=ctx.stamp)


ACCOUNT_PARTS.insert(0, account_label)


def change_label(ctx):
    """Set the name that others see. An empty field label: the name of the account."""
    account = ctx.viewer.account
    label = " ".join(ctx.field("label").split()) or account
    check_label(ctx.store, account, label)
    ctx.store.exec("UPDATE accounts SET label = ? WHERE name = ?", label, account)
    for row in ctx.store.query("SELECT workspace FROM memberships WHERE account = ?",
                               account):
        ctx.host.bus.publish(f"members:{row['workspace']}")
    access_changed(ctx, account)
    flash = flash_header("/account", "Saved.", {})
    return see_other("/account", flash, which=f"{account} {label}")


def check_label(store, account, label):
    """Raise Refused(422) if a page can't show this name, or if it is another account's,
    even in letters that look similar: Bób, bob, or with a Cyrillic o."""
    clear = label.isprintable() and FILLERS.isdisjoint(label)
    if not clear or len(label) > LONGEST_NAME:
        raise Refused(422, f"A name must have 1 to {LONGEST_NAME} visible characters. "
                           "Choose another.")
    if any(map(mixes_alphabets, label.split())):
        raise Refused(422, "A word in this name mixes alphabets whose letters look alike. "
                           "Write each word in one alphabet.")
    known = slug(label)
    if known != account and store.one("SELECT 1 FROM accounts WHERE name = ?", known):
        raise Refused(422, f"There is an account {known}, and it is not yours. Add "
                           "something that tells you apart.")


def mixes_alphabets(word):
    """True if a word has letters of two similar alphabets, by the characters' names."""
    names = [unicodedata.name(one, "").partition(" ")[0] for one in word]
    return len({"LATIN", "CYRILLIC", "GREEK"} & {*names}) > 1


# -- the members page

def people_page(ctx, region):
    return members_page(ctx, Html().join([roles_in_words(), region]))


DIRECTORY_SLICES.append(Slice("people", live=(members._replace(page=people_page),), routes=(
    Route("POST", "/account/name", ACCOUNT, change_label, form="/account"),)))


# ==== 50. Owners ==========================================================================
# The idea: the founder of a workspace writes its title as people do, Acme Corp; the name in
#   its address is made from it. And people are asked before they become an owner.
# It promises: each account founds a bounded number of workspaces. Nobody becomes an owner
#   without agreeing. Until then it is an offer: members keep their role, and somebody new
#   is an admin.
# Who uses it: the home page and the members page.

OFFERS = """SELECT w.name, coalesce(w.title, w.name) AS title
            FROM memberships m JOIN workspaces w ON w.id = m.workspace
            WHERE m.account = ? AND m.offered AND w.name IS NOT NULL AND
            w.moving < 2 ORDER BY w.name LIMIT ?"""
OFFERED = "SELECT 1 FROM memberships WHERE workspace = ? AND account = ? AND offered"


def create_workspace(ctx):
    """Create a workspace; the caller becomes its owner. A name used again gets a new id."""
    account = ctx.viewer.account
    name, title = names_of(ctx.field("name"))
    check_founded(ctx, account)
    answer = create_and_enter(ctx, name)
    ctx.store.exec("UPDATE workspaces SET founder = ? WHERE name = ?", account, name)
    set_title(ctx.store, name, title)
    return answer


def check_founded(ctx, account):
    """Raise Refused(422) if this account has founded as many workspaces as it may."""
    founded = ctx.store.one("SELECT count(*) FROM workspaces WHERE founder = ? AND name "
                            "IS NOT NULL", account)[0]
    if founded >= most_workspaces(ctx.host.namespace.settings):
        raise Refused(422, f"You have founded {founded} workspaces, which is the limit "
                           "here. Ask the operator of this server to remove one.")


def most_workspaces(settings):
    """Return how many one account may found."""
    return settings.max_workspaces or (2000 if settings.demo else 20)


@addition
class AsksOwners(EdgeDirectory):
    def mine(self, account, after):
        return {**super().mine(account, after),
                "offer": self.store.query(OFFERS, account, NAMES_A_PAGE)}

    def give_role(self, ctx, account, before, after):
        """Give a role. Only offer the role of an owner: the member has to agree first."""
        offered = after == "owner" and before != "owner"
        if offered:
            after = before or "admin"
        super().give_role(ctx, account, before, after)
        ctx.store.exec("UPDATE memberships SET offered = ? WHERE workspace = ? AND account "
                       "= ?", offered, ctx.viewer.id, account)


def answer_offer(ctx):
    """Accept or decline an offer to be an owner, as the field answer says."""
    account = ctx.viewer.account
    answer = ctx.field("answer")
    if answer not in ("accept", "decline"):
        raise Refused(422, "The answer must be accept or decline. Use the buttons on the "
                           "home page.")
    if not ctx.store.one(OFFERED, ctx.viewer.id, account):
        raise Refused(409, "There is no offer to be an owner any more. Ask for a new one.")
    before = ctx.viewer.role
    put_role(ctx, account, before, "owner" if answer == "accept" else before)
    return done(ctx, f"{ctx.viewer.id} {answer}")


DIRECTORY_SLICES.append(Slice("owners", routes=(
    Route("POST", "/workspaces", ACCOUNT, create_workspace, form="/"),
    Route("POST", "/members/offer", MEMBER, answer_offer,
          says="answered the offer to be an owner:"))))


# #### To run it ###########################################################################

# ==== 51. Quotas ==========================================================================
# The idea: SQLite itself keeps a file within its quota, by PRAGMA max_page_count. New rows
#   in the journal push out those that are too old.
# It promises: a command that would exceed the quota is refused with 507 and changes
#   nothing. A DELETE may exceed it a little, because its row in the journal takes room.
# With each request the verdict brings the quota to the workspace, as x-quota.

TRUSTED.add("x-quota")
LARGEST_FILE = 2 ** 31 - 1                               # pages
RESERVE = 256                                            # pages, and a quarter of the quota


def limit_pages(store, quota):
    """Limit the size of the file to quota bytes.

    SQLite forgets the limit when the file is closed, and jobs bring no x-quota. So the file
    has it as its user_version, in pages; 0: there is no limit.
    """
    page_size = store.one("PRAGMA page_size")[0]
    pages = min(max(1, quota // page_size), LARGEST_FILE)
    store.exec(f"PRAGMA max_page_count = {pages}")
    if store.one("PRAGMA user_version")[0] != pages:
        store.exec(f"PRAGMA user_version = {pages}")


@contextlib.contextmanager
def reserve(store):
    """Let the file exceed its quota inside of a with statement."""
    pages = store.one("PRAGMA max_page_count")[0]
    store.exec(f"PRAGMA max_page_count = {min(pages + pages // 4 + RESERVE, LARGEST_FILE)}")
    try:
        yield
    finally:
        store.exec(f"PRAGMA max_page_count = {pages}")


@addition
class SaysQuotas(EdgeDirectory):
    def say(self, viewer, row):
        quota = row["quota"] or self.namespace.settings.quota
        return {**super().say(viewer, row), "x-quota": str(quota)}


@addition
class KeepsQuota(EdgeWorkspace):
    quota = 0                                            # bytes; 0: it is not known yet
    deletes = False                                      # True during a DELETE

    def on_open(self):
        super().on_open()
        self.has_index = self.store.one(FTS5_TABLES) is not None
        pages = self.store.one("PRAGMA user_version")[0]
        self.quota = pages * self.store.one("PRAGMA page_size")[0]
        if pages:
            self.store.exec(f"PRAGMA max_page_count = {pages}")

    def handle(self, request):
        self.deletes = request.method == "DELETE"
        if request.method in SAFE:
            return super().handle(request)
        quota = int(request.headers.get("x-quota", "0")) or self.quota
        if quota != self.quota:
            limit_pages(self.store, quota)
            self.store.after_commit.append((setattr, self, "quota", quota))
        with reserve(self.store) if self.deletes else contextlib.nullcontext():
            response = super().handle(request)
            if self.has_index:
                self.write_index()
        return response

    def write_index(self):
        """Have FTS5 write now, at a savepoint. Otherwise it writes at the commit, without
        the reserve: if it lacks room then, all commands that share the commit fail."""
        with self.store.tx():
            pass

    def fault(self, error):
        """If the quota is used up, and not the disk, say so, and what helps."""
        fault = super().fault(error)
        disk = shutil.disk_usage(self.namespace.path(self.id).parent)
        if fault.status == 507 and disk.free > 2 ** 20:
            hint = "Ask" if self.deletes else "Delete something, or ask"
            fault.message = f"There is no room left here. {hint} for a larger quota."
        return fault


OLD_JOURNAL = """DELETE FROM journal WHERE at NOT BETWEEN ? AND ? AND id IN
                 (SELECT id FROM journal ORDER BY id LIMIT 100)"""


@addition
class TrimsJournal(Broadcast):
    def journal(self, viewer, what, which):
        """Add a row to the journal. Each tenth one deletes up to a hundred old rows.

        Rows from the far future go as well: the clock was wrong when they were written.
        """
        super().journal(viewer, what, which)
        keep = self.namespace.settings.keep_journal
        if keep and self.store.cursor.lastrowid % 10 == 0:
            now = time.time()
            self.store.exec(OLD_JOURNAL, now - keep, now + keep)


@verb("workspace quota", "limit its file to a size such as 500M or 10G; 0: to the server's "
                         "--quota", "name", "size")
def workspace_quota(settings, given):
    with opened(settings, given) as (store, _):
        id = row_of(store, "workspaces", given.name)["id"]
        store.exec("UPDATE workspaces SET quota = ? WHERE id = ?", given.size, id)


# ==== 52. Memory ==========================================================================
# The idea: thousands of small databases are open. Two libraries keep more memory for each
#   of them than it needs; both can be configured to keep less.
# It promises: where they can't be configured, nothing changes. With 1,000 workspaces awake
#   it saves 29 of 175 MB.

def save_memory():
    """Configure both libraries, before the first database is opened.

    SQLite allocates 20 pages with each file that it opens, and most workspaces have fewer
    (sqlite.org/c3ref/c_config_covering_index_scan.html, SQLITE_CONFIG_PAGECACHE). glibc
    gives each thread a heap of its own, and other threads can't use the memory that one has
    freed (mallopt(3), M_ARENA_MAX).
    """
    if sys.platform != "linux" or threading.active_count() > 1:
        return
    with contextlib.suppress(OSError, AttributeError):
        sqlite = ctypes.CDLL(sys.modules["_sqlite3"].__file__)
        sqlite.sqlite3_shutdown()
        sqlite.sqlite3_config(7, None, 0, 0)
        sqlite.sqlite3_initialize()
        ctypes.CDLL(None).mallopt(-8, 1)


def give_back_memory():
    """Have glibc return freed memory to the system (malloc_trim(3))."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


BEFORE_SERVING.append(save_memory)


@addition
class OpensSmall(GuardedObject):
    def open(self, create=False):
        """Open the file. Then free the memory that SQLite needed only for that."""
        super().open(create)
        self.store.exec("PRAGMA shrink_memory")


@addition
class GivesBackMemory(LoopEdge):
    def chores(self):
        return [*super().chores(), (give_back_memory, 5.0)]


# ==== 53. Figures =========================================================================
# The idea: operators see what a server does: a line in the access log for each answer,
#   lines for work that takes longer than --slow, and numbers for Prometheus.
# It promises: a reader of the log that is slow, or gone, keeps no request waiting.
# It needs: 43 Keys, for a token, 44 Accounts, for operators, and 51 Quotas.

def size_of(response):
    """Return the size of an answer's body in bytes, with the regions of a page."""
    pieces = [one.piece.plain for one in response.watch or ()]
    rest = response.rest.size if response.rest else 0
    return len(response.body) + sum(map(len, pieces)) + rest


def labelled(figures):
    """Return rows for the template: {"acme": 3} is [{"label": "acme", "value": 3}]."""
    return [{"label": label, "value": figures[label]} for label in sorted(figures)]


# -- slow work

class SlowLog:
    LINES = 10                                           # a second, at most

    def __init__(self, limit):
        self.limit = limit                               # seconds
        self.times = collections.deque([0.0] * self.LINES, self.LINES)   # of the last lines

    def note(self, seconds, what):
        if seconds < self.limit:
            return
        now = time.monotonic()
        if now > self.times[0] + 1:
            self.times.append(now)
            log(f"slow: {1000 * seconds:.0f} ms: {what}")


@functools.cache
def slow_log(limit):
    """Return the SlowLog of this process, or None if there is no limit."""
    return SlowLog(limit) if limit else None


@addition
class TimesWork(Broadcast):
    """With --slow, other functions replace the object's call and its store's run. Without
    it nothing is timed, so nothing takes longer."""
    where = "outside of a request"                       # or workspace and slice of a call

    def on_open(self):
        super().on_open()
        self.slow = slow_log(self.namespace.settings.slow)
        if self.slow:
            self.call = self.timed_call
            self.store.run = functools.partial(self.timed_run, self.store.run)

    def timed_call(self, slice, route, args, viewer, request):
        self.where = f"{viewer.workspace or 'directory'}: {slice}"
        started = time.perf_counter()
        try:
            return type(self).call(self, slice, route, args, viewer, request)
        finally:
            self.slow.note(time.perf_counter() - started, f"{self.where}: {route.method} "
                           f"{route.path}, in its turn")

    def timed_run(self, run, sql, args):
        started = time.perf_counter()
        rows = run(sql, args)
        self.slow.note(time.perf_counter() - started,
                       f"{self.where}: {len(rows)} rows: {sql}")
        return rows


# -- the figures

class Figures:
    BOUNDS = (.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5)     # seconds
    TYPE = "text/plain; version=0.0.4; charset=utf-8"    # Prometheus' text format

    def __init__(self, log, slow):
        """log: common, json or off."""
        self.log = log
        self.slow = slow
        self.date = ""                                   # of this second
        self.lines = collections.deque(maxlen=100_000)
        self.scribe = Threads(1)                         # its thread writes them
        self.lock = threading.Lock()                     # guards the next three
        self.statuses = collections.Counter()
        self.durations = [0] * (len(self.BOUNDS) + 1)
        self.seconds = 0.0

    def count(self, asked, response):
        seconds = time.perf_counter() - asked.started if asked.started else 0.0
        bucket = bisect.bisect_left(self.BOUNDS, seconds)
        with self.lock:
            self.statuses[response.status] += 1
            self.durations[bucket] += 1
            self.seconds += seconds
        if self.log != "off":
            line = self.line(asked, response.status, size_of(response), seconds)
            self.lines.append(line)                      # flush() may have replaced lines
        if self.slow:
            self.slow.note(seconds, f"{asked.request.method} {asked.request.path}, in all")

    def line(self, asked, status, size, seconds):
        """Return a line for the log: in the common log format with the seconds, or in JSON.

        It leaves out the query, because users typed it. A HEAD is logged as HEAD, not GET.
        """
        method, peer, path = asked.reading.method, asked.request.peer, asked.request.path
        if not PLAIN_PATH.fullmatch(path):
            path = urllib.parse.quote(path)
        path = path[:500]
        if self.log == "json":
            return json.dumps({"time": round(time.time(), 3), "peer": peer,
                               "method": method, "path": path, "status": status,
                               "bytes": size, "seconds": round(seconds, 6)})
        return (f'{peer or "-"} - - [{self.date}] "{method} {path} HTTP/1.1" '
                f"{status} {size} {seconds:.6f}")

    def write(self, lines):
        """Print these lines. The scribe's thread calls this."""
        with contextlib.suppress(OSError, ValueError):
            print("\n".join(lines), flush=True)

    def flush(self):
        """Once a second: have the scribe write the lines."""
        self.date = time.strftime("%d/%b/%Y:%H:%M:%S %z")
        if self.lines and not self.scribe.queue:         # else they wait; the oldest go
            lines, self.lines = self.lines, collections.deque(maxlen=self.lines.maxlen)
            self.scribe.put(self.write, lines)

    def requests(self):
        """Return the figures of requests, for templates/metrics.txt."""
        with self.lock:
            counts = [*itertools.accumulate(self.durations)]
            buckets = dict(zip(self.BOUNDS, counts))
            return {"status": labelled(self.statuses), "bucket": labelled(buckets),
                    "seconds": self.seconds, "count": counts[-1]}

    def close(self):
        self.flush()
        self.scribe.close(0.5)


@addition
class CountsVerdicts(EdgeDirectory):
    @functools.cached_property
    def verdicts(self):
        return collections.Counter()                     # by status

    def handle(self, request):
        response = super().handle(request)
        if request.path.startswith("/_gate"):
            self.verdicts[response.status] += 1
        return response


def token_for_figures(key):
    return hmac.digest(key, b"metrics", "sha256").hex()


def has_token(request, settings):
    given = request.headers.get("authorization", "").encode()
    with contextlib.suppress(OSError, Unusable):         # no keys; the log says so
        right = [f"Bearer {token_for_figures(key)}".encode() for key in keys_now(settings)]
        return any([hmac.compare_digest(given, one) for one in right])
    return False


@verb("metrics", "print the token that lets Prometheus read /metrics from elsewhere")
def metrics(settings, given):
    check_there(settings, or_node=True)
    print(token_for_figures(load_keys(settings.key_file)[0]))


@addition
class HasFigures(LoopEdge):
    def __init__(self, env, settings):
        super().__init__(env, settings)
        self.figures = Figures(settings.log, slow_log(settings.slow))
        # The requests served, by id, as counted at the ends of the last two minutes.
        self.minutes = collections.deque([{}, {}], 2)
        self.add_doors({"/metrics": self.metrics})

    def tick(self, now):
        self.figures.flush()
        super().tick(now)

    def chores(self):
        return [*super().chores(), (self.end_minute, 60.0)]

    def end_minute(self):
        self.minutes.append(dict(self.env.workspaces.served))

    def count(self, asked, response):
        self.figures.count(asked, response)

    def metrics(self, request, env):
        """Answer /metrics."""
        only_read(request)
        may = self.is_from_here(request) or has_token(request, self.settings) \
            or env.directory.ask_as(request, "/_operator")
        if not may:
            raise Refused(403, "The figures are for operators and for this machine. From "
                               "elsewhere, send Authorization: Bearer TOKEN with the token "
                               "that `orion.py metrics` prints.")
        return Response(200, self.text().encode(), Figures.TYPE)

    def text(self):
        directory = self.env.directory.namespace.objects.get(self.env.directory.id)
        verdicts = getattr(directory, "verdicts", {})    # a node has no Directory
        text = Template(TEMPLATES / "metrics.txt")
        return text(**self.figures.requests(), **self.waiting(), **self.storage(),
                    verdict=labelled(verdicts), fetches=self.env.workspaces.fetches,
                    awake=len(self.env.workspaces.objects),
                    result=labelled(self.broker.frames)) + "\n"

    def waiting(self):
        """Return the figures of streams, and of requests that wait."""
        now = time.monotonic()
        streams = self.streams
        behind = [stream for stream in streams if stream.unsent]
        # A deadline is STUCK_SECONDS after the kernel last took something.
        stuck = [now - stream.deadline + stream.STUCK_SECONDS for stream in behind]
        with self.pool.lock:
            items = [item for lane in self.pool.lanes.values() for item, _ in lane.items]
        waited = [time.perf_counter() - item.started for item in items
                  if isinstance(item, Asked) and item.started]
        return {"streams": len(streams), "behind": len(behind),
                "stuck": max(stuck, default=0.0), "in_line": len(items),
                "waited": max(waited, default=0.0)}

    def storage(self):
        """Return the figures of the disk and of workspaces. Only the files of awake objects
        are measured, because measuring 20,000 files would wake the disk."""
        workspaces = self.env.workspaces
        open = workspaces.everybody()
        paths = {one.id: workspaces.path(one.id) for one in open}
        sizes = {id: bytes_in(path) for id, path in paths.items()}
        served = dict(workspaces.served)
        shown = self.of_leaders(
            size=sizes, served=served,
            recent={id: served.get(id, 0) - self.minutes[0].get(id, 0) for id in paths},
            watched={id: len(self.broker.watchers(id)) for id in [*self.broker.channels]},
            used={one.id: sizes[one.id] / one.quota for one in open if one.quota})
        return {"free": shutil.disk_usage(self.settings.data).free, **shown,
                "logs": sum([bytes_in(f"{path}-wal") for path in paths.values()])}

    def of_leaders(self, **figures):
        """Return the rows of some figures, each given as {id: number}. A workspace has rows
        if it is among the top ten in any of them."""
        leaders = set()
        for one in figures.values():
            leaders.update(heapq.nlargest(10, one, key=one.get))
        names = {id: self.name_of(id) for id in leaders}
        there = {id for id in leaders if names[id]}
        return {what: labelled({names[id]: one[id] for id in there & one.keys()})
                for what, one in figures.items()}

    def name_of(self, id):
        known = outcome(self.env.directory.ask, "/_workspace", f"id={id}")
        return known["name"] if isinstance(known, dict) else ""

    def server_close(self):
        super().server_close()
        self.figures.close()


# ==== 54. Top =============================================================================
# The idea: the command top shows the figures of a running server as a table. A terminal is
#   redrawn every two seconds; a pipe gets lines. It reads /metrics, as Prometheus does.
# It promises: it costs the server no more than a scrape by Prometheus. So the 99 % are of
#   all requests: timing them by workspace would make each of them slower.
# It needs: 53 Figures.

# A name, perhaps a label, and a value: orion_workspace_streams{workspace="acme"} 3
FIGURE = re.compile(r'(?m)^(\w+)(?:\{\w+="([^"\n]*)"\})? (\S+)$')
SUMMARY = ("{:.1f} requests/s, 99 % in {:g} ms, {:.0f} waiting, {:.0f} streams, {:.0f} "
           "awake, {:.1f} GB free")
COLUMNS = "workspace", "requests/s", "streams", "MB", "awake"
ROW = "{:<36.36} {:>12} {:>9} {:>9} {:>8}"               # 78 columns


def figures_of(settings):
    """Return the server's figures, by name and label. Raises Unusable if it has none."""
    where = f"{settings.host}:{settings.port}"
    headers = {"Host": "localhost"}
    with contextlib.suppress(Unusable):                  # perhaps it needs no token
        token = token_for_figures(load_keys(settings.key_file)[0])
        headers["Authorization"] = f"Bearer {token}"
    try:
        link = http.client.HTTPConnection(settings.host, settings.port, timeout=5)
        with contextlib.closing(link):
            link.request("GET", "/metrics", headers=headers)
            answer = link.getresponse()
            text = answer.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        raise Unusable(f"no server answers at {where} ({error}); start it, or say where it "
                       "listens, with --host and --port before top") from error
    if "orion_streams_open" not in text:
        raise Unusable(f"{where} shows no figures ({answer.status}); name its data folder, "
                       "which has the token, by --data; with --plain it has none")
    found = collections.defaultdict(dict)
    for name, label, value in FIGURE.findall(text):
        found[name][label] = float(value)
    return found


class Top:
    def __init__(self, settings):
        self.settings = settings
        self.by = 1                                      # the column that sorts
        self.at = time.monotonic()
        self.now = figures_of(settings)
        self.read()                                      # to have a first table at once

    def read(self):
        self.before, then = self.now, self.at
        self.now, self.at = figures_of(self.settings), time.monotonic()
        self.seconds = self.at - then

    def rates(self, name):
        """Return by how much a figure grows each second; 0 if the server was restarted."""
        before = self.before[name]
        return {label: max(0.0, now - before.get(label, now)) / self.seconds
                for label, now in self.now[name].items()}

    def lines(self):
        rates = self.rates("orion_request_seconds_bucket")
        all = rates["+Inf"]
        p99 = min([float(bound) for bound, rate in rates.items() if rate >= 0.99 * all])
        waiting, streams, awake, free = [
            self.now[f"orion_{name}"][""] for name in
            ("requests_waiting", "streams_open", "workspaces_awake", "disk_free_bytes")]
        return [SUMMARY.format(all, 1000 * p99, waiting, streams, awake, free / 1e9),
                ROW.format(*COLUMNS), *[ROW.format(*row) for row in self.rows()]]

    def rows(self):
        rates = self.rates("orion_workspace_requests_total")
        streams = self.now["orion_workspace_streams"]
        sizes = self.now["orion_workspace_bytes"]
        rows = [(name, round(rate, 1), int(streams.get(name, 0)),
                 round(sizes.get(name, 0) / 1e6, 1), "yes" if name in sizes else "no")
                for name, rate in sorted(rates.items())]
        return sorted(rows, key=lambda row: row[self.by], reverse=self.by > 0)

    def show(self, screen, every: float):
        """Show the table until q is pressed. Resizing the window counts as a key, too."""
        screen.timeout(int(1000 * every))
        key = 0
        while key != ord("q"):
            height, width = screen.getmaxyx()
            lines = [*self.lines()[:height - 1], "q quits, 1 to 5 sort by a column"]
            screen.erase()
            for row, line in enumerate(lines):
                screen.addnstr(row, 0, line, width - 1)  # in the last cell it would scroll
            key = screen.getch()
            if key == -1:                                # nobody pressed one
                self.read()
            if ord("1") <= key <= ord("5"):
                self.by = key - ord("1")


def curses_here():
    """Return the module if it can draw in this terminal and read keys there, else None."""
    with contextlib.suppress(ImportError):               # Windows has none
        import curses
        with contextlib.suppress(curses.error):          # it does not know the terminal
            curses.setupterm()
            return curses if os.isatty(0) and os.isatty(1) else None


@verb("top", "show what a running server does, and for which workspaces", "--once",
      "--every")
def top(settings, given):
    shown = Top(settings)
    curses = None if given.once else curses_here()
    if curses:
        return curses.wrapper(shown.show, given.every)
    going = True
    while going:
        time.sleep(given.every)
        shown.read()
        print(*shown.lines(), sep="\n", flush=True)
        going = not given.once


# #### A deployment ########################################################################

# ==== 55. Copies ==========================================================================
# The idea: SQLite's backup function copies a database while others write to it. The copy
#   gets its final name only when it is complete, checked and on the disk. When a file moves
#   elsewhere, it is copied and removed under a lock that keeps all writers out.
# It promises: a copy that fails leaves nothing behind. After a power cut, the target is
#   either the complete new file or the previous one.
# Who uses it: snapshots and exports.

def copy_database(source, target, about=None):
    """Copy a database and check the copy. Return its number of rows.

    about: the description that goes into an export (section 58). Raises
    sqlite3.DatabaseError if source is damaged; then target is not written.
    """
    with in_the_making(target) as part:
        os.close(private_file(part))
        with Original(source) as original, \
                contextlib.closing(sqlite3.connect(part)) as copy:
            original.db.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")
            rows = verified(copy)
            if about is not None:
                copy.execute("CREATE TABLE _export (about TEXT)")
                copy.execute("INSERT INTO _export VALUES (?)", (json.dumps(about),))
                copy.commit()
        put_in_place(part, target)
    return rows


class Original(OwnedStore):
    """A database file that we read and never change."""
    SETUP = "PRAGMA query_only=ON"


@contextlib.contextmanager
def in_the_making(target):
    """Give a path next to target where a file or folder is made. Clean up afterwards."""
    part = target.with_name(f"{target.name}.making")
    remove_any(part)
    try:
        yield part
    finally:
        remove_any(part)


def remove_any(path):
    """Remove a folder, or a file together with its SQLite journal."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    for file in (path, path.with_name(f"{path.name}-journal")):
        file.unlink(missing_ok=True)


def put_in_place(part, target):
    """Rename part to target, once all of it is on the disk."""
    with open(part, "rb") as file:
        own_as(target.parent, file.fileno())
        os.fsync(file.fileno())
    remove_log(target)                                   # SQLite would apply it to part
    os.replace(part, target)
    sync_folder(target.parent)


def remove_log(path):
    for tail in ("-wal", "-shm"):
        path.with_name(f"{path.name}{tail}").unlink(missing_ok=True)


# FTS5 stores the index named words in the tables words_data, words_idx, ...
SHADOWS = ("data", "idx", "content", "docsize", "config")


def verified(db):
    """Check a database. Return its number of rows, not counting the tables of SHADOWS.

    Raises sqlite3.DatabaseError if SQLite finds damage.
    """
    found = db.execute("PRAGMA quick_check").fetchone()[0]
    if found != "ok":
        indexes = [name for name, in db.execute(FTS5_TABLES) if name in found]
        if indexes and "fts5" in found.lower():
            found += how_to_rebuild(indexes[0])
        raise sqlite3.DatabaseError(f"damaged: {found}")
    made = db.execute("SELECT name, rootpage FROM sqlite_master WHERE type = 'table' AND "
                      "name NOT LIKE 'sqlite_%'").fetchall()
    shadows = {f"{name}_{tail}" for name, rootpage in made for tail in SHADOWS
               if not rootpage}
    return sum([db.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0]
                for name, _ in made if name not in shadows])


def how_to_rebuild(index):
    """Return how to rebuild an FTS5 index, as a part of a message."""
    return (f" (if a table has its text, rebuild it: INSERT INTO {index} ({index}) VALUES "
            "('rebuild'))")


def opened_to_read(path):
    """Connect to a database to read it only. A with statement closes it."""
    identity(path)                                       # raises if there is no file
    return contextlib.closing(connected_to_read(path))


def may_be_of(db, id):
    """Return whether the file belongs to the object with this id, or to no object yet."""
    return db.execute("PRAGMA application_id").fetchone()[0] in (0, mark_of(id))


def may_be_here(settings, db, id):
    """Return whether the file may belong to this object on such a server. The one file of
    a --single server does not have the Directory's mark, but one of its own."""
    mark = db.execute("PRAGMA application_id").fetchone()[0]
    return mark == 0 or (mark == mark_of(id)) != bool(settings.single)


def take_away(path, copy=None, about=None):
    """Remove a database that others may have open. Return the number of rows in the copy.

    Commands that have begun finish first, so the copy contains their rows. Later commands
    find that the file is gone before they write.
    """
    with OwnedStore(path) as store:
        store.begin()
        rows = copy_database(path, copy, about) if copy else 0
        path.unlink()
    remove_log(path)
    return rows


def may_replace(source, target):
    """Return whether target is missing, or is a copy of source that an interrupted import
    has left there."""
    if not target.exists():
        return True
    logged = any(map(bytes_in, with_wal(target)[1:]))
    return not logged and filecmp.cmp(source, target, shallow=False)


def files_locked(settings):
    """Return a lock to hold while files of workspaces are added, moved or removed.

    Raises Unusable if another process holds it. A single root needs no lock.
    """
    if settings.single:
        return contextlib.nullcontext()
    return locked(settings.workspaces, "another command is moving files; try again later")


def timestamp():
    """Return the time in UTC, to the millisecond, as a name. Such names sort by age."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return now.strftime("%Y%m%d-%H%M%S-%f")[:-3]


COPY = "copy.making-"                                    # how such folders' names begin


def folder_for_copy(settings):
    """Return a temporary folder, in which a copy can be migrated and inspected."""
    return tempfile.TemporaryDirectory(dir=settings.data, prefix=COPY)


# ==== 56. Snapshots =======================================================================
# The idea: a snapshot is a folder with the whole deployment. Files that have not changed
#   since the last one are linked and take no space. manifest.json describes them all:
#
#     {"directory": {"rows": 63, "seen": ""},
#      "9f86d0...": {"rows": 412, "seen": "[(1764518400000000000, 40960)]"}, ...}
#
#   seen has the time of a file's last change and its size, and the same for its log.
# It promises: a snapshot gets its name only when it is complete. If a file is damaged, the
#   last snapshot's copy is kept. The Directory is copied first, so no workspace that it
#   names is missing. The log and the figures show when a snapshot fails.
# It needs: 53 Figures, 55 Copies.

def in_two_threads(function, all):
    """Do the same as map(), in two threads: while one waits for the disk, the other works.
    (A backup of 1,000 workspaces: 2.3 x.)"""
    from concurrent.futures import ThreadPoolExecutor    # here, because it takes 10 ms
    with ThreadPoolExecutor(2) as threads:
        yield from threads.map(function, all)


def with_progress(results, many, what):
    """Yield the results. If a user waits at a terminal, show how many are done."""
    for number, one in enumerate(results, 1):
        if sys.stderr.isatty():
            end = "\n" if number == many else ""
            print(f"\r{what} {number} of {many}", end=end, file=sys.stderr, flush=True)
        yield one


def snapshot(settings, target, before=None, each=in_two_threads):
    """Copy the deployment to a folder. Return the manifest and a list of faults.

    before: the last snapshot, from which unchanged files are linked. each: the function
    that maps copy_one to all ids.
    """
    held = {}
    faults = []
    known = manifest_of(before) if before else {}
    with in_the_making(target) as part:
        private_folder(part / "workspaces")
        directory = part / "directory.db"
        if settings.directory_file.exists():             # a node has none
            rows = copy_database(settings.directory_file, directory)
            held["directory"] = {"rows": rows, "seen": ""}
        ids = [*names_here(settings, directory)]
        copy = functools.partial(copy_one, settings, part, before, known)
        copies = with_progress(each(copy, ids), len(ids), "copied")
        for id, (about, fault) in zip(ids, copies):
            if about:
                held[id] = about
            if fault:
                faults.append(fault)
        sync_folder(part / "workspaces")                 # makes the links durable
        write_private(part / "secret.key", settings.key_file.read_bytes())
        write_private(part / "manifest.json", json.dumps(held).encode())
        part.rename(target)
        sync_folder(target.parent)
    return held, faults


def manifest_of(snapshot):
    """Return its manifest; {} if that can't be read, so nothing is linked from there."""
    with contextlib.suppress(ValueError, OSError):
        return json.loads((snapshot / "manifest.json").read_text())
    return {}


def copy_one(settings, part, before, known, id):
    """Copy a file into a snapshot. Return its entry in the manifest, and its fault or "".

    part: the snapshot in the making. before, known: the last snapshot and its manifest. If
    the file has not changed, or can't be read, it is linked from there. Raises
    sqlite3.Error if the disk is full.
    """
    name = f"workspaces/{id}.db"
    last = known.get(id)
    source = settings.data / name
    seen = repr([*stamps(with_wal(source)).values()])    # in JSON tuples become lists
    if last and last["seen"] == seen and link_or_copy(before / name, part / name):
        return last, ""
    try:
        return {"rows": copy_database(source, part / name), "seen": seen}, ""
    except sqlite3.DatabaseError as error:
        if "disk is full" in str(error):
            raise
        fault = str(StorageFault(source, error))
    if last and link_or_copy(before / name, part / name):
        return last, f"{fault}; the copy from the last snapshot is kept instead"
    return None, fault


def link_or_copy(source, target):
    """Link a copy, or copy it if it can't be linked. Return False if neither works."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return True
    with contextlib.suppress(sqlite3.DatabaseError):
        copy_database(source, target)
        return True
    return False


NAMED_HERE = f"""SELECT id, name FROM workspaces WHERE name IS NOT NULL AND moving IN
                 ({STAYS}, {DELETED}) AND node = ''"""


def names_here(settings, directory):
    """Return the names of the workspaces in this data folder, by id.

    directory: the Directory's file, or a copy of it; None if it can't be read. Without a
    Directory, as on a node, return the ids of all files here, each with the name "".
    """
    if settings.single or not directory or not directory.exists():
        return {path.stem: "" for path in files_here(settings)}
    with opened_to_read(directory) as db:
        return dict(db.execute(NAMED_HERE).fetchall())


def files_here(settings):
    """Return the files of workspaces, even those that the Directory does not name."""
    files = [] if settings.single else settings.workspaces.glob("*.db")
    return [path for path in files if not path.name.startswith("new-")]     # a draft


DATED = "-".join(["[0-9]" * digits for digits in (8, 6, 3)])       # see timestamp()


def snapshot_again(settings):
    """Make the next snapshot in data/backups and remove the oldest. Return it, and faults.

    If a name is a time in the future, the clock was wrong then, or is wrong now. Such
    snapshots do not count. They stay until there are more than settings.keep others.
    """
    folder = settings.data / "backups"
    private_folder(folder)
    for part in folder.glob(f"{DATED}.making"):        # left behind by a crash
        remove_any(part)
    target = folder / timestamp()
    kept = sorted([manifest.parent for manifest in folder.glob(f"{DATED}/manifest.json")])
    past = [one for one in kept if one.name < target.name]
    before = past[-1] if past else None
    _, faults = snapshot(settings, target, before, each=map)     # requests need the disk
    too_many = len(past) + 1 - settings.keep
    if too_many > 0:
        for old in {*kept} - {*past[too_many:]}:
            remove_any(old.rename(old.with_name(f"{old.name}.making")))
    return target, faults


@addition
class MakesSnapshots(LoopEdge):
    def __init__(self, *args):
        self.snapshots = {"made": 0, "incomplete": 0, "failed": 0}
        self.last_snapshot = 0                           # its time, by the clock
        self.snapshot_size = 0                           # in bytes
        super().__init__(*args)

    def chores(self):
        return [*super().chores(), (self.copy_again, self.settings.backup_every)]

    def copy_again(self):
        try:
            made, faults = snapshot_again(self.settings)
        except CRASH as error:
            self.snapshots["failed"] += 1
            log(f"no snapshot was made: {error}; free some space on the disk, or run "
                "orion.py check")
            if not isinstance(error, FAILURES):
                raise
            return
        for fault in faults:
            log(f"a file could not be copied for the snapshot: {fault}")
        self.snapshots["incomplete" if faults else "made"] += 1
        self.last_snapshot = int(time.time())
        self.snapshot_size = sum(map(bytes_in, made.rglob("*.db")))

    def text(self):
        text = Template(TEMPLATES / "snapshots.txt")
        return super().text() + text(
            result=labelled(self.snapshots), last=self.last_snapshot,
            size=self.snapshot_size) + "\n"


# -- on the command line

@verb("backup", "copy the whole deployment to a new folder, while the server runs",
      "folder")
def backup(settings, given):
    """Return 1 if some files can't be copied. The backup contains all others."""
    check_new(given.folder)
    check_there(settings, or_node=True)
    held, faults = snapshot(settings, given.folder)
    for fault in faults:
        print(fault)
    print(contents(given.folder, held))
    return 1 if faults else 0


def contents(folder, held):
    rows = sum([part["rows"] for part in held.values()])
    return f"{folder}: {len(held)} databases, {rows} rows, checked"


@verb("restore", "restore a backup into an empty data folder", "folder")
def restore(settings, given):
    """Copy a backup back. If that is interrupted, the same command starts over."""
    mark = settings.data / "restoring"
    source = str(given.folder.absolute())
    if not mark.exists() or mark.read_text("utf-8") != source:
        check_empty(settings)
    manifest = given.folder / "manifest.json"
    if not manifest.exists():
        raise Unusable(f"{given.folder} is not a complete backup, because it has no "
                       "manifest.json; name a folder that orion.py backup made")
    held = json.loads(manifest.read_text())
    if "directory" in held:                              # a node has none
        check_known(settings, given.folder / "directory.db")
    private_folder(settings.workspaces)
    write_private(mark, source.encode())
    write_private(settings.key_file, (given.folder / "secret.key").read_bytes())
    bring = functools.partial(restore_one, settings, given.folder, held)
    ids = [id for id in held if id != "directory"]
    for _ in with_progress(in_two_threads(bring, ids), len(ids), "restored"):
        pass
    if "directory" in held:                              # last, when all others are there
        bring("directory")
    mark.unlink()
    print(contents(settings.data, held))


def check_empty(settings):
    for file in (*files_here(settings), settings.directory_file):
        if file.exists():
            raise Unusable(f"{file} already exists; name an empty folder with --data")


def check_known(settings, file):
    """Raise MigrationError if a newer version, or another app, wrote this Directory.
    Raise Unusable if only one of the two is --single: the server that wrote it, or this.

    The Directory also records the migrations of the workspaces' slices: see check_ledger.
    """
    inside = [(f"workspace/{slice}", entries)
              for slice, entries in workspace_router(settings).schema]
    with Original(file) as store:
        if not may_be_here(settings, store.db, "directory"):
            where = "--data FOLDER" if settings.single else "--single FILE"
            raise Unusable(f"{file} is of a server that was started with {where}; restore "
                           "it with the same option")
        for slice, entries in (*directory_router().schema, *inside):
            store.count_ran(slice, digests_of(entries))


def restore_one(settings, folder, held, id):
    source = folder / "workspaces" / f"{id}.db"
    target = settings.workspaces / f"{id}.db"
    if id == "directory":
        source = folder / "directory.db"
        target = settings.directory_file
    rows = copy_database(source, target)
    if rows != held[id]["rows"]:
        raise Unusable(f"{source} has {rows} rows, but had {held[id]['rows']} when it was "
                       "copied; restore another backup")


# ==== 57. Check and repair ================================================================
# The idea: check looks at each file of a deployment and says what is wrong, and what to do.
# It promises: without --repair, it changes nothing. With it, check removes files that are
#   certainly left over, but none while another command is at work.
# It needs: 55 Copies, 56 Snapshots.

@verb("check", "look at every file and say what is wrong, and what to do", "--repair")
def check(settings, given):
    """Print what is wrong, and return 1 if anything is. Only --repair changes files."""
    if given.repair:
        repair(settings)
    faults = []
    if settings.plane != "data":
        faults += wrong_with_file(settings, settings.directory_file, "directory")
    lost = bool(faults)                                  # then any file may belong here
    names = names_here(settings, None if lost else settings.directory_file)
    # One thread is enough, because this keeps a core busy and not the disk.
    said = (wrong_with_file(settings, settings.workspaces / f"{id}.db", id) for id in names)
    for name, wrong in zip(names.values(), with_progress(said, len(names), "checked")):
        faults += [f"{name}: {fault}" if name else fault for fault in wrong]
    if not lost:
        faults += said_of_leftovers(settings)
    faults += said_of_modes(settings)
    try:
        load_keys(settings.key_file)
    except Unusable as error:
        faults.append(str(error))
    for fault in faults:
        print(fault)
    if not faults:
        print(f"{settings.single or f'{len(names)} workspaces'}, all is well")
    return 1 if faults else 0


def wrong_with_file(settings, path, id):
    try:
        with opened_to_read(path) as db:
            verified(db)
            if not may_be_here(settings, db, id):
                raise sqlite3.DatabaseError("the file belongs to another object")
            try_on_copy(settings, db, path, schema_of(settings, id))
    except (sqlite3.Error, MigrationError) as error:
        return [str(StorageFault(path, error))]
    return []


def schema_of(settings, id):
    inside = workspace_router(settings).schema
    if id != "directory":
        return inside
    outside = directory_router().schema
    return [*outside, *inside] if settings.single else outside       # see Single


def try_on_copy(settings, db, path, schema):
    """Migrate a copy of a file. Raise MigrationError if that fails, sqlite3.DatabaseError
    if a full-text index is damaged. The file itself does not change."""
    wanted = {(slice, number, digest) for slice, entries in schema
              for number, digest in enumerate(digests_of(entries), 1)}
    ran = db.execute("SELECT slice, entry, digest FROM _migrations").fetchall()
    slices = dict(schema)
    migrated = wanted == {row for row in ran if row[0] in slices}
    if migrated and not db.execute(FTS5_TABLES).fetchone():
        return
    with folder_for_copy(settings) as folder:
        copy = pathlib.Path(folder, "tried.db")
        copy_database(path, copy)
        check_indexes(copy)
        with OwnedStore(copy) as store:
            store.migrate_all(schema)


def check_indexes(copy):
    """Have FTS5 check its indexes. It needs to write for that, so this takes a copy.
    quick_check does not look into an index before SQLite 3.44."""
    with contextlib.closing(sqlite3.connect(copy)) as db:
        for name, in db.execute(FTS5_TABLES).fetchall():
            ask = f"""INSERT INTO "{name}" ("{name}") VALUES ('integrity-check')"""
            try:
                db.execute(ask)
            except sqlite3.DatabaseError as error:
                why = f"the index {name} is damaged: {error}{how_to_rebuild(name)}"
                raise sqlite3.DatabaseError(why) from error


# -- leftovers

def said_of_leftovers(settings):
    """Say what killed commands and servers have left behind. Return [] while a command may
    still be at work."""
    try:
        with files_locked(settings):
            said = [f"{path}: an interrupted command left this; check --repair removes it"
                    for path in leftovers(settings)]
            said += [f"{path}: an older version kept this after a move; if the workspace "
                     "works, remove it" for path in settings.workspaces.glob("*.moved")]
            said += [f"{path}: its database is gone; if no rows are missing, remove it"
                     for path in settings.workspaces.glob("*.db-*")
                     if not path.with_name(path.name.rpartition("-")[0]).exists()]
            return [*said, *said_of_restore(settings), *said_of_strays(settings)]
    except Unusable:
        return []


def leftovers(settings):
    """Return unfinished files that no process is working on any more."""
    patterns = ["secret.key.part", "restoring.part", "directory.db.making*", f"{COPY}*",
                "workspaces/*.part", "workspaces/*.making*", "removed/*.making*"]
    if settings.single:
        patterns = [f"{settings.single.name}*.part", f"{settings.single.name}.making*"]
    elif not is_served(settings):
        patterns += ["backups/*.making", "workspaces/new-*"]
    return paths_like(settings, patterns)


def paths_like(settings, patterns):
    """Return the paths in the data folder that match any of the patterns, sorted."""
    return sorted({*itertools.chain(*map(settings.data.glob, patterns))})


def is_served(settings):
    try:
        with locked(settings.data, "a server runs here"):
            return False
    except Unusable:
        return True


def said_of_restore(settings):
    mark = settings.data / "restoring"
    if not mark.exists():
        return []
    return [f"{settings.data}: a restore was interrupted; run it again: restore "
            f"{mark.read_text('utf-8')}"]


WHEREABOUTS = "SELECT id, name, moving FROM workspaces WHERE name IS NOT NULL AND node = ''"


def said_of_strays(settings):
    """Say what to do with files that belong to no workspace, and with unfinished moves.

    The files are listed first, because the file of a new workspace exists before its row.
    """
    files = {path.stem: path for path in files_here(settings)}
    if not settings.directory_file.exists():             # a node: all files belong here
        return []
    with opened_to_read(settings.directory_file) as db:
        rows = db.execute(WHEREABOUTS).fetchall()
    said = [f"{name}: its removal was interrupted; finish it with workspace remove {name}"
            for _, name, moving in rows if moving == GOES]
    said += [f"{name}: its move was interrupted, and its file is still here; finish it "
             f"with workspace export {name} FILE --move"
             for id, name, moving in rows if moving == MOVES and id in files]
    for id in {*files} - {id for id, *_ in rows}:
        what = "it is empty, and check --repair removes it"
        if not is_blank(files[id]):
            what = "import it, or move it elsewhere"
        said.append(f"{files[id]}: no workspace in the Directory has this file; {what}")
    return said


def is_blank(path):
    """Return whether nobody has ever written to this file, so it can go without a loss."""
    with contextlib.suppress(sqlite3.Error), opened_to_read(path) as db:
        verified(db)
        return not db.execute("SELECT 1 FROM journal").fetchone()
    return path.stat().st_size == 0


def said_of_modes(settings):
    found = open_to_others(settings)
    if not found:
        return []
    return [f"other users of this machine can read {len(found)} files here, such as "
            f"{found[0]}; check --repair makes them private"]


def open_to_others(settings):
    """Return files that everybody can read. Older versions made such files."""
    if os.name != "posix" or not mode_of(settings.data) & 0o007:
        return []
    patterns = ["*.db*", "workspaces/*.db*", "removed/*.db*", f"backups/{DATED}"]
    if settings.single:
        patterns = [f"{settings.single.name}*"]
    found = [path for path in paths_like(settings, patterns) if mode_of(path) & 0o007]
    if found and ignores_modes(settings.data):           # then nothing can close them
        return []
    return found


def mode_of(path):
    """Return the mode of a file; 0 for a link, or for a log that no longer exists."""
    with contextlib.suppress(FileNotFoundError):
        if not path.is_symlink():
            return os.stat(path).st_mode
    return 0


# -- repair

def repair(settings):
    """Do the repairs that are safe. Raises Unusable while a command is at work."""
    if not settings.directory_file.exists() and not settings.workspaces.exists():
        return
    with files_locked(settings):
        gone = leftovers(settings)
        for path in gone:
            remove_any(path)
        if not settings.single and not wrong_with_file(settings, settings.directory_file,
                                                       "directory"):
            gone += remove_blanks(settings)
    for path in gone:
        print(f"{path}: removed")
    for path in open_to_others(settings):
        with contextlib.suppress(FileNotFoundError):     # a log may be gone
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            os.fchmod(handle, mode_of(path) & 0o700)
            os.close(handle)


def remove_blanks(settings):
    """Remove the blank files that interrupted commands have made, and return them. In the
    meantime the transaction keeps others from adding a workspace, and so its file."""
    with OwnedStore(settings.directory_file) as store, store.tx():
        named = {row["id"] for row in store.query(WHEREABOUTS)}
        blank = [path for path in files_here(settings)
                 if path.stem not in named and is_blank(path)]
        for path in blank:
            path.unlink()
            remove_log(path)
    return blank


# ==== 58. Exports =========================================================================
# The idea: a workspace is exported to one file, with its name and its members, and imported
#   from there into another deployment.
# It promises: with --move, the gate lets nobody in before the copy is made, so nothing can
#   be written after it. A file from elsewhere is checked first and never trusted, because
#   an attacker may have made it.
# It needs: 44 Accounts, 42 Jobs, 55 Copies. On a node, 62 Nodes replaces the commands
#   workspace export and workspace import.
#
# The table _export of such a file has one row, with what the Directory knew about it:
#
#     {"name": "acme", "title": "Acme Corp", "members": [["bob", "owner"]],
#      "left": "9f86..."}
#
# left: with --move, the id that the workspace had in the deployment that it left.

# -- a workspace and its file

def add_workspace(store, workspaces, name, title, members, source=None):
    """Add a workspace with these members (accounts with their roles).

    Its file (source, or an empty one) is there before the commit, because a row without a
    file means that the file was lost.
    """
    check_free(store, name)
    id = new_id(store, workspaces, name)                 # always the same on a single root
    if store.one("SELECT 1 FROM workspaces WHERE id = ?", id):
        raise Refused(422, "This server can have only one workspace. To have more, import "
                           "its file into a server without --single.")
    if source and not may_replace(source, workspaces.path(id)):
        raise Refused(*TAKEN)
    add_rows(store, id, name, members)
    workspaces.put(store, id, name, source)
    set_title(store, name, title)


@addition
class AddsWorkspaces(EdgeDirectory):
    def add_workspace(self, ctx, name, owner):
        if "x-file" in ctx.request.headers:              # section 26 has made the file
            return super().add_workspace(ctx, name, owner)
        add_workspace(ctx.store, self.workspaces, name, name, [(owner, "owner")])


@addition
class KeepsFiles(GuardedNamespace):
    """Makes and removes the file of a workspace.

    Each step is a method because with nodes (section 62) another machine has the file.
    """

    def put(self, store, id, name, source):
        """Make the file of a new workspace, or move source there, before the commit."""
        if source:
            put_in_place(source, self.path(id))
        else:
            with self.draft() as draft:
                self.name_draft(draft, id)

    def make_on_node(self, name):
        """Have the node make the file, after that commit. Without nodes, do nothing."""

    def check_removable(self, row, now):
        """Raise Unusable if the file can't be removed."""

    def remove(self, row, about, now):
        """Remove the file. Unless now is true, keep a copy for 30 days. about: see
        copy_database."""
        copy = remove_file(self.settings, self.path(row["id"]), about, now)
        if copy:
            print(f"a copy is kept for 30 days; workspace import {copy} brings it back")


def roles_in(store, id):
    """Return (account, role) of each member."""
    return [*map(tuple, store.query("SELECT account, role FROM memberships WHERE workspace "
                                    "= ? ORDER BY account", id))]


def row_with_file(settings, store, name):
    """Return the row of a workspace that has a file of its own here."""
    if settings.single:
        raise Unusable(f"{name} is the only workspace of a --single server; copy the whole "
                       f"file {settings.single}")
    row = row_of(store, "workspaces", name)
    if row["node"]:
        raise Unusable(f"{name} is on {row['node']}; run this command on that machine")
    return row


# -- add, list, rename, remove

@verb("workspace add", "add a workspace; name an --owner, or use member add afterwards",
      "title", "--owner")
def workspace_add(settings, given):
    name, title = names_of(given.title)
    with opened(settings, given, name) as (store, env):
        owners = []
        if given.owner:
            row_of(store, "accounts", given.owner)
            owners = [(given.owner, "owner")]
        add_workspace(store, env.workspaces, name, title, owners)
    env.workspaces.make_on_node(name)
    print(f"{name}: at /w/{name}")


@verb("workspace list", "list the name, id, size, quota and title of each workspace")
def workspace_list(settings, given):
    rows = looked_up(settings, lambda store: store.query(
        "SELECT * FROM workspaces WHERE name IS NOT NULL ORDER BY name"))
    for row in rows:
        path = settings.single or settings.workspaces / f"{row['id']}.db"
        lost = "gone" if row["moving"] else "missing"
        size = path.stat().st_size if path.exists() else lost
        where = f"on {row['node']}" if row["node"] else size
        moving = ("", "moving", "being removed", "deleted")[row["moving"]]
        quota = row["quota"] or settings.quota
        title = row["title"] or row["name"]
        print(row["name"], row["id"], where, f"of {quota}", moving, title, sep="\t")


@verb("workspace rename", "rename a workspace; its members and its file stay",
      "name", "new")
def workspace_rename(settings, given):
    name, title = names_of(given.new)
    with opened(settings, given, f"{given.name} {name}") as (store, _):
        row = row_of(store, "workspaces", given.name)
        if name != row["name"]:
            check_free(store, name)
        store.exec("UPDATE workspaces SET name = ? WHERE id = ?", name, row["id"])
        set_title(store, name, title)


@verb("workspace remove", "remove a workspace; a copy stays for 30 days, unless --now",
      "name", "--now")
def workspace_remove(settings, given):
    """Keep everybody out and end open pages; then remove the file, and then the name.

    If this is interrupted, the same command finishes it.
    """
    if settings.single:
        raise Unusable(f"{given.name} is the only workspace of a --single server; to "
                       f"remove it, remove the file {settings.single}")
    with files_locked(settings):
        with opened(settings) as (store, env):
            row = row_of(store, "workspaces", given.name)
        env.workspaces.check_removable(row, given.now)   # may take a while
        with opened(settings, given) as (store, env):
            row = row_of(store, "workspaces", given.name)
            members = roles_in(store, row["id"])
            set_moving(store, row["id"], GOES)
        time.sleep(NOTICE_SECONDS)
        about = {"name": row["name"], "title": row["title"], "members": members}
        env.workspaces.remove(row, about, given.now)
        with opened(settings) as (store, env), store.tx():
            forget_workspace(store, row["id"])


NOTICE_SECONDS = 2.0                                     # a server needs to end streams
KEPT_SECONDS = 30 * 86400.0                              # for what is removed or deleted


def forget_workspace(store, id):
    """Remove the members, tokens and name. The row stays, so its id is never reused."""
    store.exec("DELETE FROM memberships WHERE workspace = ?", id)
    store.exec("DELETE FROM tokens WHERE workspace = ?", id)
    store.exec("UPDATE workspaces SET name = NULL WHERE id = ?", id)


def remove_file(settings, path, about, now):
    """Remove a workspace's file. Return the copy that is kept for 30 days, or None."""
    removed = settings.data / "removed"
    copy = None
    if path.exists():
        if not now:
            private_folder(removed)
            copy = removed / f"{about['name']}-{timestamp()}.db"
        take_away(path, copy, about)
    remove_log(path)                                     # from an interrupted removal
    return copy


@addition
class ForgetsWorkspaces(LoopEdge):
    def chores(self):
        return [*super().chores(), (self.forget_some, 60.0)]

    def forget_some(self):
        """Remove some of the copies that are older than 30 days."""
        files = (self.settings.data / "removed").glob("*.db")
        limit = time.time() - KEPT_SECONDS
        for old in [file for file in files if file.stat().st_mtime < limit][:10]:
            old.unlink()


# -- export

@verb("workspace export", "write a workspace to one file, while the server runs; --move "
                          "keeps everybody out from then on", "name", "file", "--move")
def workspace_export(settings, given):
    """Write a workspace to a file. With --move, the gate answers 503 until workspace
    remove; if this export is interrupted, the same command finishes it."""
    with files_locked(settings) if given.move else contextlib.nullcontext():
        export(settings, given)


def export(settings, given):
    with opened(settings, given) as (store, env):
        row = row_with_file(settings, store, given.name)
        path = env.workspaces.path(row["id"])
        check_here(row, path)
        check_export(given, row)
        members = roles_in(store, row["id"])
        if given.move:
            set_moving(store, row["id"], MOVES)
    write_out = take_away if given.move else copy_database
    about = {"name": given.name, "title": row["title"], "members": members,
             "left": row["id"] if given.move else ""}
    try:
        rows = write_out(path, given.file, about)
    except BaseException:
        if given.move and path.exists():                 # it is still here: undo the move
            with opened(settings, given, f"{given.name} failed") as (store, _):
                set_moving(store, row["id"], row["moving"])
        raise
    print(f"{given.file}: {rows} rows, {len(members)} members")


def check_here(row, path):
    """Raise Unusable if the workspace has left already."""
    if row["moving"] and not path.exists():
        remove_log(path)                                 # the copy has all of its rows
        raise Unusable(f"{row['name']} has left already; run workspace import with its "
                       f"file elsewhere, then workspace remove {row['name']} here")


def check_export(given, row):
    """Raise Unusable if the file exists, unless an interrupted move has made it. Then this
    command finishes that move."""
    if not (given.move and row["moving"] and left_by(given.file) == row["id"]):
        check_new(given.file)


def left_by(file):
    """Return the id of the workspace that was moved out to this file, or ""."""
    with contextlib.suppress(sqlite3.Error, ValueError, TypeError, KeyError), \
            opened_to_read(file) as db:
        return json.loads(db.execute("SELECT about FROM _export").fetchone()[0])["left"]
    return ""


def set_moving(store, id, moving):
    store.exec("UPDATE workspaces SET moving = ? WHERE id = ?", moving, id)


# -- import, and restore

@verb("workspace import", "add a workspace from an exported file, with its members", "file",
      "--name", "--jobs")
def workspace_import(settings, given):
    """Import an export, or the file of a single root. Members without an account here get
    one. Accounts from an export have no password.
    """
    check_no_node(settings)
    typed, members, accounts = about_file(given.file, given.name)
    name, title = names_of(typed)
    with files_locked(settings), copy_to_import(settings, given.file, given.jobs) as copy:
        with opened(settings, given, name) as (store, env):
            new = add_accounts(store, accounts)
            add_workspace(store, env.workspaces, name, title, [*members.items()], copy)
    env.workspaces.make_on_node(name)
    for account in new:
        print(f"{account} is new here; account passwd {account} lets them in")
    print(f"{name}: {len(members)} members")


def check_no_node(settings):
    """Raise Unusable on a node, because this would make a second Directory there."""
    if settings.single or settings.directory_file.exists():
        return
    if settings.key_file.exists():
        raise Unusable(f"{settings.data} has a key but no Directory, as a node has; there "
                       "use orion.py --plane data --directory HOST:PORT workspace import")


def about_file(file, name):
    """Return a file's title, {member: role}, and accounts: [(name, label, password)].

    Raises Unusable if the file is not a workspace's (an export or not) or a single root's.
    """
    try:
        with Original(file) as store:
            own_name, members, accounts = about_store(store)
        for account, role in members.items():
            check_member(file, account, role)
    except (sqlite3.Error, ValueError, TypeError, KeyError) as error:
        raise Unusable(f"{file}: {error}; name a file that workspace export made, or the "
                       "file of a --single server") from error
    if not name and not own_name:
        raise Unusable(f"{file} does not contain a name; choose one with --name")
    return name or str(own_name), members, accounts


def check_member(file, account, role):
    if role not in ROLES:
        raise Unusable(f"{file}: the role {role!r:.50} does not exist here; the roles are "
                       f"{', '.join(ROLES)}")
    if not ACCOUNT_NAME.fullmatch(account):
        raise Unusable(f"{file}: no account can be named {account!r:.50} here; names "
                       "consist of a to z, 0 to 9 and hyphens")


def about_store(store):
    """Return the same as about_file, from an open store."""
    tables = store.tables()
    if "_export" in tables:
        about = json.loads(store.one("SELECT about FROM _export")["about"])
        members = dict(about["members"])
        title = about.get("title") or about["name"]
        return title, members, [(account, account, "") for account in members]
    if "_migrations" not in tables or \
            store.one("SELECT 1 FROM _migrations WHERE slice LIKE 'workspace/%'"):
        raise Unusable(f"{store.path} is not a workspace; name an export, the file of a "
                       "--single server, or a file of the folder workspaces")
    if "memberships" not in tables:
        return "", {}, []
    members = store.query("SELECT account, role FROM memberships ORDER BY account")
    accounts = store.query("SELECT name, label, password FROM accounts WHERE name IN "
                           "(SELECT account FROM memberships)")
    row = dict(store.one("SELECT * FROM workspaces"))
    title = row.get("title") or row["name"]              # older files have no titles
    return title, dict(map(tuple, members)), [*map(tuple, accounts)]


def add_accounts(store, accounts):
    """Add the accounts that are new here. Return the names of those without a password."""
    new = "INSERT OR IGNORE INTO accounts (name, label, password) VALUES (?, ?, ?)"
    return [account[0] for account in accounts if store.exec(new, *account)
            and not account[2]]


@contextlib.contextmanager
def copy_to_import(settings, source, jobs):
    """Give a copy of a workspace's file that an object of this deployment can claim.

    If source is a single root, the copy has only the workspace's tables. jobs: "keep",
    "drop" or None: see keep_or_drop_jobs. Raises Unusable if the slices do not fit it.
    """
    private_folder(settings.data)
    with folder_for_copy(settings) as folder:
        path = pathlib.Path(folder) / "import.db"
        copy_database(source, path)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            strip_directory(db)
        try:
            bring_up_to_date(settings, path)
            keep_or_drop_jobs(source, path, jobs)
        except (sqlite3.Error, MigrationError) as error:
            raise Unusable(f"{source} does not fit: {error}") from error
        yield path


def keep_or_drop_jobs(source, path, jobs):
    """Drop the jobs unless jobs is "keep", because they act in the names of others.

    The server that the file comes from may run them, too, and a letter be sent twice.
    Recurring jobs need no decision, because opening the file plans them again.
    Raises Unusable if there are others and jobs is None.
    """
    others = f"key IS NULL OR key NOT IN ({PLANNED})"
    with OwnedStore(path) as store:
        store.exec("DELETE FROM answers")                # for commands sent to that server
        many = store.one(f"SELECT count(*) AS many FROM jobs WHERE {others}")["many"]
        if many and not jobs:
            raise Unusable(f"{source} has {many} jobs, which would run here, too; use "
                           "--jobs keep to run them, or --jobs drop")
        if jobs != "keep":
            store.exec("DELETE FROM jobs")
        store.exec("VACUUM")                             # removes passwords in free pages


def bring_up_to_date(settings, path):
    """Migrate an imported file. Raise MigrationError if the slices here do not fit it."""
    schema = workspace_router(settings).schema
    with OwnedStore(path) as store:
        there = {row["slice"] for row in store.query("SELECT slice FROM _migrations")}
        for slice in there - {name for name, _ in schema} - former_slices(settings, there):
            raise MigrationError(f"it has rows of slice {slice!r}, which this app lacks; "
                                 "import it with an app that has this slice")
        store.migrate_all(schema)


def former_slices(settings, there):
    """Return the slices that an app here has had before (see check_ledger). A node has no
    record of them, so there it is all slices of the file."""
    if not settings.directory_file.exists():
        return there if settings.plane == "data" else set()
    with opened_to_read(settings.directory_file) as db:
        names = db.execute("SELECT slice FROM _migrations").fetchall()
    return {name.partition("/")[2] for name, in names}


def strip_directory(db):
    made = db.execute("SELECT tables FROM _migrations WHERE slice = 'directory'").fetchall()
    for table in ("_export", *" ".join([tables for tables, in made]).split()):
        db.execute(f'DROP TABLE IF EXISTS "{table}"')
    db.execute("DELETE FROM _migrations WHERE slice = 'directory'")
    db.execute("PRAGMA application_id = 0")


@verb("workspace restore", "add a workspace as it was in a snapshot; the present one stays",
      "name", "--at", "--new", "--jobs")
def workspace_restore(settings, given):
    """Add a copy with the present members. It never replaces the present workspace."""
    with opened(settings) as (store, _):
        row = row_with_file(settings, store, given.name)
    typed = given.new or f"{row['title'] or row['name']}-{given.at.name}"
    name, title = names_of(typed)
    file = given.at / "workspaces" / f"{row['id']}.db"
    with files_locked(settings), copy_to_import(settings, file, given.jobs) as copy, \
            opened(settings, given, name) as (store, env):
        members = roles_in(store, row["id"])
        add_workspace(store, env.workspaces, name, title, members, copy)
    print(f"{name}: as {given.name} was in {given.at}")
    env.workspaces.make_on_node(name)


# ==== 59. Member verbs ====================================================================
# The idea: the commands of the members page, on the command line and by the same rules. But
#   here an operator can make somebody an owner without asking them.
# It needs: 58 Exports.

@verb("member add", "let an account into a workspace", "workspace", "account", "role")
@verb("member role", "change the role of a member", "workspace", "account", "role")
@verb("member remove", "remove a member; the member's open pages end, too",
      "workspace", "account")
def member_set(settings, given):
    """Add, change or remove a member. A running server sees the write within a second."""
    role = valid_role(given.role) if "role" in given else NOT_A_MEMBER
    with opened(settings, given) as (store, _):
        id = row_of(store, "workspaces", given.workspace)["id"]
        given.workspace = id                             # in the journal; names change
        row_of(store, "accounts", given.account)
        before = role_of(store, id, given.account)
        if before and given.verb == "member add":
            raise Unusable(f"{given.account} is a member already; change the role with "
                           "member role")
        if not before and given.verb != "member add":
            raise Unusable(f"{given.account} is not a member; use member add")
        store_role(store, id, given.account, before, role)


@verb("member list", "list the members of a workspace", "workspace")
def member_list(settings, given):
    def members(store):
        return roles_in(store, row_of(store, "workspaces", given.workspace)["id"])
    table(looked_up(settings, members))


# ==== 60. Own workspaces ==================================================================
# The idea: owners can rename and delete their workspace. Deleting it keeps everybody out:
#   the file, the members and the name stay as they are for 30 days. Members go from one of
#   their workspaces to another by a list in the header.
# It promises: renaming changes no address. Deleting is one commit, and so is undeleting, so
#   a kill can't leave either half done. In between, open pages end, and links, tokens and
#   jobs wait. A command that the gate let in before the deletion is still written.
# Who uses it: the members page and the header; operators, on the command line.
# It needs: 55 Copies, 58 Exports.
#
# workspaces.deleted is the time of the deletion (section 27). A deleted workspace still
# counts for its founder, because otherwise one account could make any number.

TITLE_OF = "SELECT name, coalesce(title, name) AS title FROM workspaces WHERE id = ?"
ENDED = """SELECT * FROM workspaces WHERE name IS NOT NULL AND moving = ? AND deleted < ?
           ORDER BY random() LIMIT 1"""                  # so none that fails blocks others


def workspace_region(ctx):
    members = roles_in(ctx.store, ctx.viewer.id)
    return template("spaces.region")(name=ctx.workspace, people=len(members))


def workspace_page(ctx, region):
    typed = {"title": ctx.title, "problem": "", **ctx.typed}
    deletes = "confirm" in typed                         # which of two forms had an error
    return template("spaces")(
        region=region, workspace=ctx.title, was=ctx.title, title=typed["title"],
        title_problem="" if deletes else typed["problem"], open=deletes, wrong=deletes,
        confirm_problem=typed["problem"] if deletes else "", name=ctx.workspace,
        stamp=ctx.stamp)


def rename_workspace(ctx):
    """Change the title. Fields: title, and was: the old title, as the page showed it."""
    _, title = names_of(ctx.field("title"))
    row = ctx.store.one(TITLE_OF, ctx.viewer.id)
    if ctx.field("was", row["title"]) != row["title"]:
        raise Refused(409, f"Its name is now {row['title']}. Check it, and try again.")
    set_title(ctx.store, row["name"], title)
    ask_all_again(ctx)
    return done(ctx, f"{ctx.viewer.id} {title}")


def ask_all_again(ctx):
    """Have the gate asked again for all open pages of the workspace."""
    for account, _ in roles_in(ctx.store, ctx.viewer.id):
        access_changed(ctx, account)


def delete_workspace(ctx):
    """Keep everybody out from now on. The field confirm is its name, in any case."""
    row = ctx.store.one(TITLE_OF, ctx.viewer.id)
    if slug(ctx.field("confirm")) != slug(row["title"]):
        raise Refused(422, f"Its name is {row['title']}. Type this name to delete it.")
    if ctx.host.namespace.settings.single:
        raise Refused(409, "This server has no other workspace, so you can't delete this "
                           "one. Ask the operator of this server to remove its file.")
    ctx.store.exec("UPDATE workspaces SET moving = ?, deleted = ? WHERE id = ? AND NOT "
                   "moving", DELETED, time.time(), ctx.viewer.id)
    ask_all_again(ctx)
    return see_other("/", which=f"{ctx.viewer.id} {row['name']}")


# -- from one workspace to another

def switch_list(ctx):
    """Return the list that the switcher in the header shows when it is opened."""
    mine = ctx.store.query(MINE, ctx.viewer.account, "", NAMES_A_PAGE)
    return Response(200, event("elements", template("spaces.list")(workspace=mine)), EVENTS)


@addition
class HasSwitcher(Broadcast):
    def navigation(self, path, ctx, state=True):
        """Add the switcher. It gets its list only when it is opened, so that pages stay
        the same for everybody."""
        nav = super().navigation(path, ctx, state) or Html()
        if not ctx.viewer.account:
            return nav
        return Html().join([template("spaces.switch")(), nav])


# workspace:delete is the grant that only owners have.
DIRECTORY_SLICES.append(Slice("spaces", live=(
    Live("/members/workspace", "workspace:delete", "Workspace",
         (Region("members", workspace_region),), workspace_page, tab=False),), routes=(
    Route("GET", "/workspaces/mine", ACCOUNT, switch_list),
    Route("POST", "/members/workspace", "workspace:delete", rename_workspace,
          says="renamed the workspace to"),
    Route("POST", "/members/workspace/delete", "workspace:delete", delete_workspace,
          form="/members/workspace", says="deleted the workspace"))))


def way_to_workspace(ctx):
    return template("spaces.way")() if ctx.viewer.can("workspace:delete") else Html()


MEMBERS_PARTS.append(way_to_workspace)


@addition
class KnowsDeleted(EdgeDirectory):
    def own_ended(self, request):
        """Return the row of a workspace whose 30 days are over, or None."""
        row = self.store.one(ENDED, DELETED, time.time() - KEPT_SECONDS)
        return row and dict(row)

    def own_forget(self, request):
        """Forget a workspace, after its file has been removed."""
        id = request.params["id"]
        forget_workspace(self.store, id)
        self.journal(Viewer(account="(server)"), "workspace remove", id)


@addition
class EndsDeleted(LoopEdge):
    def chores(self):
        mine = [] if self.settings.plane == "data" else [(self.end_deleted, 60.0)]
        return [*super().chores(), *mine]

    def end_deleted(self):
        """Remove a workspace whose 30 days are over. If that is interrupted, the next call
        repeats it."""
        if not self.env.directory.ask("/_ended"):
            return
        with contextlib.suppress(Unusable, Refused), files_locked(self.settings):
            row = self.env.directory.ask("/_ended")      # undelete may have been faster
            if row:
                self.env.workspaces.check_removable(row, now=False)    # asks a node, too
                self.env.workspaces.remove(row, {"name": row["name"]}, now=True)
                forget = Request("POST", "/_forget", f"id={row['id']}")
                self.env.directory.fetch(forget)


@verb("workspace undelete", "bring back a workspace that an owner deleted", "name")
def workspace_undelete(settings, given):
    """Let people in again. That is enough, because deleting kept all of the workspace."""
    with files_locked(settings), opened(settings, given) as (store, env):
        row = row_of(store, "workspaces", given.name)
        if row["moving"] != DELETED:
            raise Unusable(f"{given.name} is not deleted; workspace list shows which are")
        if not row["node"] and not env.workspaces.path(row["id"]).exists():
            raise Unusable(f"the file of {given.name} is gone; run workspace remove "
                           f"{given.name}, then workspace import with a copy of the file")
        set_moving(store, row["id"], STAYS)


# ==== 61. Single ==========================================================================
# The idea: one workspace, and one file that holds everything: accounts, sessions and rows.
#   Two hosts share the store, the bus and the turn of one object: a Directory and, inside
#   it, a Workspace. The slices are the same.
# It promises: the first workspace that is created is the only one.
# It needs: 51 Quotas, 58 Exports.

class Single(EdgeDirectory):
    """The Directory of a single root. inside: its Workspace."""

    def __init__(self, *args, inside, **more):
        super().__init__(*args, **more)
        self.inside = inside
        self.schema = [*self.schema, *inside.schema]
        inside.outside = self
        inside.turn = self.turn

    def on_open(self):
        super().on_open()
        if self.namespace.settings.quota:
            limit_pages(self.store, self.namespace.settings.quota)

    def handle(self, request):
        """Let people sign in and out even when the workspace's rows fill the quota."""
        with contextlib.nullcontext() if request.method in SAFE else reserve(self.store):
            return super().handle(request)

    def close(self):
        try:
            super().close()
        finally:
            self.inside.leave()


class Inside(EdgeWorkspace):
    """The Workspace of a single root. It opens and closes with the Directory."""
    outside: Single

    def open(self, create=False):
        if self.outside.store is None:
            self.outside.open()
        self.store = self.outside.store
        self.bus = self.outside.bus
        self.opened_at = self.outside.opened_at
        self.on_open()

    def leave(self):
        """Forget the store, which is closed already."""
        self.store = None
        super().close()

    def close(self):
        self.outside.close()


class OneFile(GuardedNamespace):
    """The namespace of a single root's only Directory, or of its only Workspace."""
    ID = hashlib.sha256(b"workspace:single").hexdigest()

    def id_from_name(self, name):
        """Return the id of the one object, whatever the name."""
        return self.ID

    def path(self, id):
        """Return the path of the one file, which may have any name."""
        return self.settings.single

    def files(self):
        return iter([(self.ID, self.settings.single)])

    def put(self, store, id, name, source):
        """Do nothing: the workspace is in the file that has its row."""


def single_root(settings):
    """Return the env of a single root. The Directory's namespace builds the Directory with
    its Workspace inside; the other namespace takes the Workspace from there."""
    settings, fresh, keys = prepare_data(settings)
    router = workspace_router(settings)
    pages = pages_of(settings.slices)
    control = whole(OneFile)("single", settings.data, float("inf"), None)
    workspaces = whole(OneFile)("workspace", settings.data, float("inf"), None)
    outside = directory_builder(Single, settings, keys, workspaces)

    def build_both(id, namespace):
        return outside(id, namespace, inside=whole(Inside)(id, workspaces, router, pages))

    control.build = build_both
    workspaces.build = lambda id, namespace: control.awake(id).inside
    workspaces.settings = settings
    demo = {"acme": DEMO_WORKSPACES["acme"]}
    return set_up(control.get(OneFile.ID), workspaces, settings, fresh, demo)


ROOTS.append((lambda settings: settings.single, single_root))


# ==== 62. Nodes ===========================================================================
# The idea: on several machines, this program runs as one directory and several nodes. The
#   directory is the process with the Directory (--plane directory). A node is a process
#   with workspaces (--plane data). A proxy asks the directory's gate, and brings the
#   verdict to the node that has the workspace:
#
#     browser -> proxy -> directory   GET /_gate: a verdict, with a seal over all of it
#                proxy -> node        the request, with that verdict: see node_gate
#     node      -> directory          /_version, /_gate/<name> ...: see directory_front
#     directory -> node               /_node/<id>/create ...: see answer_directory
#
# It promises: the processes seal what they send each other with a key that all of them
#   have. So a node trusts a verdict because of its seal, whoever brings it. A verdict is
#   valid for one workspace, one node and 30 seconds. The files move by other means (scp,
#   rsync); the directory only records where each is.
# It needs: 40 Counts, 42 Jobs, 43 Keys, 55 Copies, 58 Exports.
#
# Four commands move acme to another node. The gate answers 503 until the last one is done:
#
#     old node:    workspace export acme FILE --move    export_from_node: asks for /_leave,
#                                                       then removes the file
#     old node:    scp FILE NODE:
#     new node:    workspace import FILE                import_on_node
#     directory:   node assign acme NODE                node_assign: asks whether the node
#                                                       has it, then lets people in

SEALED_SECONDS = 30                                      # clocks may differ by this much
FRESH_SECONDS = 2                                        # then we ask for another verdict
# x-node: where the workspace is. x-verdict: the seal of a verdict, or of a request that one
# process sends to another.
TRUSTED.update({"x-node", "x-verdict"})
# The headers of a verdict, in the order in which they are sealed: all that say() returns.
# (A new one must be in TRUSTED, too, and in VIEWER_HEADERS if pages depend on it.)
VERDICT = ("x-account", "x-role", "x-can-delete", "x-grants", "x-workspace", "x-id",
           "x-operator", "x-read-only", "x-quota", "x-operates", "x-node", "x-title",
           "x-token", "x-label")

WRONG_SEAL = ("One process does not accept the other's seal. Copy the directory's "
              "secret.key to each node, and compare their clocks.")
NO_VERDICT = (403, "This node only answers requests that a proxy sends with the gate's "
                   "verdict. Use the address of the proxy.")


# -- seals

def seal_of(parts, key, until=0):
    """Return a seal over parts, such as 1764518430.5c41...

    It begins with its expiry: until, in seconds by the clock; 0: in SEALED_SECONDS.
    """
    until = until or int(time.time()) + SEALED_SECONDS
    data = b"plane:" + json.dumps([until, *parts]).encode()
    return f"{until}.{hmac.digest(key, data, 'sha256').hex()}"


SEAL = re.compile(r"([0-9]{1,11})\.[0-9a-f]{64}")


def expiry_of_seal(given, parts, keys):
    """Return when a seal expires; 0 if it has expired, is not ours, or is for other parts.

    The clock of the process that made it may be SEALED_SECONDS ahead.
    """
    found = SEAL.fullmatch(given)
    until = int(found[1]) if found else 0
    if not 0 <= until - time.time() <= 2 * SEALED_SECONDS:
        return 0
    genuine = [hmac.compare_digest(seal_of(parts, key, until), given) for key in keys]
    return until if any(genuine) else 0


# -- requests from one process to another

# By address of a process that is down: until when no request waits for it.
DOWN = {}
DOWN_SECONDS = 2.0
# How many seconds an answer may take, by question: see FOR_DIRECTORY. Others: 5.
PATIENCE = {"remove": 600.0, "_facts": 1.0}


class NoAnswer(Refused):
    """Another process gave no answer that we can use. str() tells operators why; message is
    for people."""

    def __init__(self, why):
        super().__init__(503, "This can't be answered right now. Try again in a minute.",
                         retry_after(60))
        self.why = why

    def __str__(self):
        return self.why


class Unreachable(NoAnswer):
    """The other process gave no answer at all."""


def send_sealed(settings, address, request, patience=5.0):
    """Send a request to another process of this deployment. Return its answer.

    Raises Unreachable if there is none within patience, in seconds.
    """
    if time.monotonic() < DOWN.get(address, 0.0):
        raise Unreachable(f"{address} can't be reached (it did not answer a moment ago); "
                          "try again in a minute")
    target = urllib.parse.quote(request.path)
    if request.query:
        target += f"?{request.query}"
    oldest = keys_now(settings)[-1]                      # others may not have a newer one
    seal = seal_of(sealed_parts(request, request.scheme), oldest)
    headers = {"host": "localhost", "cookie": request.headers.get("cookie", ""),
               "x-forwarded-proto": request.scheme, "x-verdict": seal}
    try:
        link = http.client.HTTPConnection(address, timeout=patience)
        with contextlib.closing(link):
            link.request(request.method, target, request.body, headers)
            answer = link.getresponse()
            body = answer.read()
    except (OSError, http.client.HTTPException) as error:
        DOWN[address] = time.monotonic() + DOWN_SECONDS
        raise Unreachable(f"{address} can't be reached ({error}); try again in a minute"
                          ) from error
    said = tuple([(name.lower(), value) for name, value in answer.getheaders()
                  if name.lower() in TRUSTED])
    return Response(answer.status, body, answer.headers.get("content-type", ""), said)


def sealed_parts(request, scheme):
    body = hashlib.sha256(request.body).hexdigest()
    cookie = request.headers.get("cookie", "")
    return request.method, request.path, request.query, cookie, scheme, body


def is_sealed(request, settings):
    """Does the request come from another process of this deployment?"""
    parts = sealed_parts(request, request.headers.get("x-forwarded-proto", ""))
    seal = request.headers.get("x-verdict", "")
    return bool(expiry_of_seal(seal, parts, keys_now(settings)))


def ask_process(settings, address, request, patience=5.0):
    """Ask another process. Return its answer, decoded from JSON.

    Raises Unreachable, or NoAnswer if the status is not 200.
    """
    answer = send_sealed(settings, address, request, patience)
    if answer.status == 200:
        return json.loads(answer.body)
    why = answer.body.decode("utf-8", "replace").strip()
    if answer.status in (403, 404):                      # it did not accept the seal
        why = WRONG_SEAL
    raise NoAnswer(f"{address} answered {answer.status}: {why}")


def ask_node(settings, node, id, what, method="POST", body=b""):
    """Have a node do something with a workspace: see FOR_DIRECTORY."""
    if not node:
        raise NoAnswer("this workspace is not on a node yet; use node assign to place it")
    question = Request(method, f"/_node/{id}/{what}", body=body)
    return ask_process(settings, node, question, PATIENCE.get(what, 5.0))


class RemoteStub(GuardedStub):
    """The address of an object that lives in another process."""

    def enter(self, ask, request, seconds=-1):
        return self.namespace.send(self.id, request)

    def fetch_all(self, requests, check=lambda: None):
        return [outcome(self.fetch, request) for request in requests]

    def ask(self, path, query="", headers={}, scheme="http"):
        settings = self.namespace.settings
        question = Request("GET", path, query, headers, scheme=scheme)
        return ask_process(settings, settings.directory, question)


class RemoteDirectory(GuardedNamespace):
    """The namespace of a Directory that lives in another process."""

    def get(self, id):
        return RemoteStub(id, self)

    def send(self, id, request):
        return send_sealed(self.settings, self.settings.directory, request)


class RemoteWorkspaces(RemoteDirectory):
    """The namespace of Workspaces that live on nodes."""
    directory: Stub                                      # it knows each workspace's node

    def send(self, id, request):
        """Pass the server's own requests, /_facts and /_retry, to the workspace's node.
        Those of people come through the proxy, and not here."""
        if not request.path.startswith("/_"):
            raise Refused(421, "This server has no workspaces, because they are on nodes. "
                               "Use the address of the proxy.")
        known = self.directory.ask("/_workspace", f"id={id}")
        said = ask_node(self.settings, known["node"], id, request.path[1:], request.method)
        return as_json(said)

    def files(self):
        """Return none: files in the data folder do not belong to workspaces on nodes."""
        return iter(())


# -- the directory's side: its gate

def said_by_proxy(request, what):
    """Return the method or uri (what) of the request for which a proxy asks; "" if there is
    none, or two. nginx sends it as X-Original-..., others as X-Forwarded-...
    """
    names = f"x-original-{what}", f"x-forwarded-{what}"
    said = {request.headers[name] for name in names if name in request.headers}
    return said.pop() if len(said) == 1 else ""


def request_behind(request):
    """Return the request for which a proxy asks, with method and path only; "" if unknown.
    """
    method = said_by_proxy(request, "method")
    target = said_by_proxy(request, "uri")
    with contextlib.suppress(Refused):
        path = plain_path(target.partition("?")[0])
        return Request("GET" if method == "HEAD" else method, path)
    return Request("", "")


def gate_for_proxies(ctx):
    """Return the verdict, with a seal over all of it, for a proxy to bring to a node.

    Most proxies understand only 200, 401 and 403. So while a workspace moves, they get 200
    without a verdict, and send the request to the directory, which asks the gate itself.
    """
    path = request_behind(ctx.request).path
    answer = gate(ctx, path.split("/")[2] if path.startswith("/w/") else "")
    if answer is MOVING:
        return Response(200)
    if answer.status != 200:
        return answer
    said = dict(answer.headers)
    oldest = ctx.host.keys[-1]                           # nodes may not have a newer one
    seal = seal_of([said.get(name, "") for name in VERDICT], oldest)
    return answer._replace(headers=(*answer.headers, ("x-verdict", seal)))


DIRECTORY_SLICES.append(Slice("nodes", routes=(
    Route("GET", "/_gate", PUBLIC, gate_for_proxies),)))


@addition
class KnowsNodes(Directory):                             # also with --plain
    def say(self, viewer, row):
        said = super().say(viewer, row)
        if not row["node"]:
            return said
        if not self.workspaces.settings.plane:
            raise Refused(503, "This workspace is on another machine. Use its address.")
        return {**said, "x-node": row["node"]}


# -- the directory's side: which node has a workspace

def node_for(store, name):
    """Return the address of a node for a new workspace; "" if there are no nodes.

    Rendezvous hashing: a new node takes an equal share from each of the others.
    """
    nodes = [row["address"] for row in store.query("SELECT address FROM nodes")]
    return max(nodes, default="",
               key=lambda node: hashlib.sha256(f"{node} {name}".encode()).digest())


@addition
class PlacesWorkspaces(EdgeDirectory):
    def add_workspace(self, ctx, name, owner):
        if self.namespace.settings.plane and not node_for(ctx.store, name):
            raise Refused(503, "There is no node for this workspace yet. The operator can "
                               "add one with node add HOST:PORT.")
        super().add_workspace(ctx, name, owner)

    def own_version(self, request):
        """Add a number that tells nodes of each change of access by this process.
        data_version changes only when other processes commit."""
        version = super().own_version(request)
        if self.namespace.settings.plane:
            version.append(sum([number for topic, number in self.bus.versions.items()
                                if topic.startswith("access:")]))
        return version

    def own_leave(self, request):
        """Keep everybody out of a workspace that is about to leave its node. Return its
        name; None: there is none.

        The node gives its id, because another workspace may have its name now.
        """
        row = self.own_workspace(request)
        if row is None or request.method in SAFE:
            return None
        set_moving(self.store, row["id"], MOVES)
        for account, _ in roles_in(self.store, row["id"]):
            self.bus.publish(f"access:{account}")
        self.journal(Viewer(account="(node)"), "workspace export", row["name"])
        return row["name"]


@addition
class PlacesFiles(GuardedNamespace):
    """Makes and removes files on nodes, if there are any."""

    def put(self, store, id, name, source):
        node = node_for(store, name)
        if not node:
            return super().put(store, id, name, source)
        if source:                                       # make_on_node tells what to do
            node = ""
        store.exec("UPDATE workspaces SET node = ?, moving = ? WHERE id = ?", node, MOVES,
                   id)

    def make_on_node(self, name):
        """Have the node make the file, then let people in.

        Raises Refused if the node can't make it; the name is free again then.
        """
        with OwnedStore(self.settings.directory_file) as store:
            row = store.one("SELECT * FROM workspaces WHERE name = ? AND moving", name)
            if row is None:
                return
            if not row["node"]:
                print(f"{name} has its members; now copy the file to a node, run workspace "
                      f"import FILE --name {name} there, then node assign {name} HOST:PORT "
                      "here")
                return
            try:
                ask_node(self.settings, row["node"], row["id"], "create")
            except BaseException:
                with store.tx():
                    forget_workspace(store, row["id"])
                raise
            set_moving(store, row["id"], STAYS)

    def check_removable(self, row, now):
        super().check_removable(row, now)
        if row["node"] and not now:
            ask_node(self.settings, row["node"], row["id"], "has", "GET")

    def remove(self, row, about, now):
        if not row["node"]:
            return super().remove(row, about, now)
        body = json.dumps({**about, "now": now}).encode()
        node_may_be_lost = contextlib.suppress(Refused) if now else contextlib.nullcontext()
        with node_may_be_lost:
            copy = ask_node(self.settings, row["node"], row["id"], "remove", body=body)
            if copy:
                print(f"{row['node']} keeps a copy for 30 days: {copy}")


def create_on_node(request, env):
    """A door: create a workspace, and have a node make its file."""
    response = env.directory.fetch(request)
    if response.which:                                   # its name: see create_and_enter
        env.workspaces.make_on_node(response.which)
    return response


# -- the directory's side: what it answers

DIRECTORY_ANSWERS = re.compile("/_(version|operator|workspace|members_of|leave|gate/[^/]*)")


def directory_front(request, env):
    """Answer a node's question to the directory, or do what any worker does."""
    if DIRECTORY_ANSWERS.fullmatch(request.path) and is_sealed(request, env.settings):
        scheme = request.headers["x-forwarded-proto"]
        return env.directory.fetch(stripped(request)._replace(scheme=scheme))
    return worker(request, env)


def directory_root(settings):
    """Return the env of a directory: accounts, sessions and gate. Nodes have the rest."""
    env = two_planes(settings._replace(demo=False))
    workspaces = whole(RemoteWorkspaces)("workspace", settings.workspaces, settings.idle,
                                         None)
    workspaces.settings = env.settings
    workspaces.directory = env.directory
    env.doors["/workspaces"] = create_on_node
    return dataclasses.replace(env, workspaces=workspaces, front=directory_front)


ROOTS.append((lambda settings: settings.plane == "directory", directory_root))


# -- a node's side

def node_front(request, env):
    """Answer a request to a node. Without a verdict, it contacts no workspace."""
    if request.path.startswith("/_node/") and is_sealed(request, env.settings):
        return answer_directory(request, env)
    if request.path in ("/healthz", "/metrics"):
        return env.doors[request.path](stripped(request), env)
    if not request.path.startswith("/w/"):
        raise Refused(*NO_VERDICT)
    return worker(request, env)


def node_gate(request, env):
    """Return the verdict that a proxy brought.

    It must be for the workspace in the path. If it is not fresh, because the request took
    long to arrive, ask the gate again.
    """
    said = {name: request.headers[name] for name in VERDICT if request.headers.get(name)}
    seal = request.headers.get("x-verdict", "")
    parts = [said.get(name, "") for name in VERDICT]
    until = expiry_of_seal(seal, parts, keys_now(env.settings))
    theirs = request.path.split("/")[:3] == ["", "w", said.get("x-workspace")]
    if not until or not theirs:
        raise Refused(*NO_VERDICT)
    if time.time() >= until - SEALED_SECONDS + FRESH_SECONDS:
        return node_regate(request, env)
    return for_this_node(Response(200, headers=tuple(said.items())), env)


def node_regate(request, env):
    """Ask the gate again, as for an open stream after a change of access."""
    return for_this_node(ask_the_gate(request, env), env)


def for_this_node(verdict, env):
    """Return the verdict, if it is for a workspace on this node."""
    node = dict(verdict.headers).get("x-node")
    if verdict.status == 200 and node != env.settings.node_name:
        raise Refused(421, "This workspace is on another node. Use the address of the "
                           "proxy.")
    return verdict


def has_file(workspaces, id, body):
    """Return whether the file is here. If it is, have its object open it and plan its jobs.
    """
    if not workspaces.path(id).exists():
        return False
    workspaces.sleep_unused()                            # the object may have an older one
    facts_of(workspaces.get(id))
    return True


def remove_here(workspaces, id, body):
    """Remove a file. Return the path of its copy, or None. body: see PlacesFiles.remove.

    The name becomes part of a path, so it must be a valid name of a workspace.
    """
    try:
        about = json.loads(body)
        now = about.pop("now")
        named = WORKSPACE_NAME.fullmatch(about["name"])
    except (ValueError, TypeError, KeyError, AttributeError):
        named = None
    if not named:
        raise Refused(400, "This request does not name a workspace to remove.")
    copy = remove_file(workspaces.settings, workspaces.path(id), about, now)
    return copy and str(copy)


def retry_here(workspaces, id, body):
    answer = fetch_briefly(workspaces.get(id), Request("POST", "/_retry"))
    return json.loads(answer.body)


# A directory's questions to a node. Each can be repeated, because an answer may be lost.
FOR_DIRECTORY = {
    ("GET", "has"): has_file,
    ("POST", "create"): lambda workspaces, id, body: workspaces.create(id),
    ("POST", "remove"): remove_here,
    ("GET", "_facts"): lambda workspaces, id, body: facts_of(workspaces.get(id)),
    ("POST", "_retry"): retry_here}


def is_id(text):
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def answer_directory(request, env):
    id, _, what = request.path[len("/_node/"):].partition("/")
    do = FOR_DIRECTORY.get((request.method, what))
    if do is None or not is_id(id):
        raise Refused(*NOTHING_HERE)
    try:
        return as_json(do(env.workspaces, id, request.body))
    except (sqlite3.Error, OSError, Detached) as error:
        raise StorageFault(env.workspaces.path(id), error) from error


def node_root(settings):
    """Return the env of a node. The Directory is in another process, with the same key."""
    private_folder(settings.workspaces)
    check_node(settings)
    settings = settings._replace(demo=False)
    workspaces = workspaces_of(settings, workspace_router(settings))
    control = whole(RemoteDirectory)("directory", settings.data, float("inf"), None)
    control.settings = settings
    env = full_env(control.get("directory"), workspaces, settings)
    return dataclasses.replace(env, gate=node_gate, regate=node_regate, front=node_front)


ROOTS.append((lambda settings: settings.plane == "data", node_root))


def check_node(settings):
    if not settings.key_file.exists() or not settings.directory:
        raise Unusable("a data plane needs --directory HOST:PORT, and a copy of the "
                       "directory's secret.key in its data folder")


# -- on the command line of the directory

@verb("node add", "add a data plane, where new workspaces can be placed", "address")
def node_add(settings, given):
    with opened(settings, given) as (store, _):
        check_planes(settings, store, given.address)
        store.exec("INSERT OR IGNORE INTO nodes VALUES (?)", given.address)


def check_planes(settings, store, address):
    """Raise Unusable if there are workspaces here, and no --plane directory.

    A server without planes would go on serving them here, and send nobody to a node.
    """
    if settings.single:
        raise Unusable("a --single server can have no nodes; to have some, import its file "
                       "into a server without --single")
    here = store.one("SELECT name FROM workspaces WHERE node = '' AND NOT moving AND name "
                     "IS NOT NULL")
    if here and settings.plane != "directory":
        raise Unusable(f"{here['name']} is on this machine, and a server without planes "
                       "serves it from here; if you start yours with --plane directory, "
                       f"use: --plane directory node add {address}")


@verb("node list", "list the nodes, and how many workspaces each has")
def node_list(settings, given):
    table(looked_up(settings, lambda store: store.query(
        "SELECT address, (SELECT count(*) FROM workspaces WHERE node = address AND name IS "
        "NOT NULL) FROM nodes")))


@verb("node remove", "forget a node that has no workspaces", "address")
def node_remove(settings, given):
    with opened(settings, given) as (store, _):
        node = row_of(store, "nodes", given.address, "address")["address"]
        held = len(workspaces_on(store, node))
        if held:
            raise Unusable(f"{node} has {held} workspaces; move them to another node, then "
                           "use node assign")
        store.exec("DELETE FROM nodes WHERE address = ?", node)


def workspaces_on(store, node):
    return store.query("SELECT * FROM workspaces WHERE node = ? AND name IS NOT NULL ORDER "
                       "BY name", node)


@verb("node assign", "record that the file of a workspace, or all files of a lost node, "
                     "are on this node now", "placed", "address")
def node_assign(settings, given):
    """Return 1 if the node lacks some of the files. Their workspaces keep the old node.

    We ask nodes outside of any transaction, so people can sign in while one is slow.
    """
    with opened(settings) as (store, _):
        node = row_of(store, "nodes", given.address, "address")["address"]
        if ":" in given.placed:
            row_of(store, "nodes", given.placed, "address")
            rows = workspaces_on(store, given.placed)
        else:
            rows = [row_of(store, "workspaces", slug(given.placed))]
    faults = [not_assigned(settings, row, node) for row in rows]
    with opened(settings, given) as (store, _):
        faults = [fault or assign(store, row, node) for row, fault in zip(rows, faults)]
    for row, fault in zip(rows, faults):
        print(row["name"], fault or f"on {node} now", sep="\t")
    return 1 if any(faults) else 0


def not_assigned(settings, row, node):
    """Return why a workspace can't be on this node, or "".

    Raises Unusable if its file is still in the old place, because there would be two.
    """
    name = row["name"]
    if not row["node"] and (settings.workspaces / f"{row['id']}.db").exists():
        raise Unusable(f"{name} is still on this machine; first run workspace export "
                       f"{name} FILE --move")
    if row["node"] != node:
        check_left(settings, row)
    if not ask_node(settings, node, row["id"], "has", "GET"):
        return f"{node} does not have its file; first run workspace import there"
    return ""


def assign(store, row, node):
    """Assign a workspace to a node. Return why that failed, or ""."""
    changed = store.exec("UPDATE workspaces SET node = ?, moving = ? WHERE id = ? AND name "
                         "= ? AND node = ? AND moving = ?", node, STAYS, row["id"],
                         row["name"], row["node"], row["moving"])
    return "" if changed else "another command has just changed it; try again"


def check_left(settings, row):
    """Raise Unusable if its node may still have it. An unreachable node counts as lost."""
    node = row["node"]
    name = row["name"]
    try:
        has = node and ask_node(settings, node, row["id"], "has", "GET")
    except Unreachable:
        return
    except NoAnswer as no:
        raise Unusable(f"{no}; it may still have {name}; if that node is lost, stop it "
                       "first") from no
    if has:
        raise Unusable(f"{node} still has {name}; first run workspace export {name} FILE "
                       "--move there")


# -- on the command line of a node

def ask_directory_of(settings, path, method="GET", **what):
    """Ask the directory about a workspace. Return its answer; None: there is none."""
    check_node(settings)
    question = Request(method, path, urllib.parse.urlencode(what))
    return ask_process(settings, settings.directory, question)


def place_of(settings, **what):
    """Return the directory's row of a workspace, by its id or its name."""
    place = ask_directory_of(settings, "/_workspace", **what)
    if not place:
        raise Unusable(f"the directory knows no workspace {[*what.values()][0]}; run "
                       "workspace list there to see all of them")
    return place


def export_from_node(settings, given):
    """Export a workspace. With --move, the gate answers 503 until node assign."""
    place = place_of(settings, name=given.name)
    id = place["id"]
    path = settings.workspaces / f"{id}.db"
    check_export(given, place)
    if not path.exists():
        raise Unusable(f"{given.name} is not on this node; workspace list on the "
                       "directory's machine shows where it is")
    if given.move:
        return leave_node(settings, given, id, path)
    rows = copy_database(path, given.file, {"name": given.name, "members": []})
    print(f"{given.file}: {rows} rows")


def leave_node(settings, given, id, path):
    with files_locked(settings):
        try:
            name = ask_directory_of(settings, "/_leave", "POST", id=id)
            if not name:
                raise Unusable(f"{given.name} has just been removed")
            rows = take_away(path, given.file, {"name": name, "members": [], "left": id})
        except BaseException:
            if path.exists():
                log(f"orion: to let people in again, run node assign {given.name} with the "
                    "address of this node on the directory's machine")
            raise
    print(f"{given.file}: {rows} rows; run workspace import on another node, then node "
          f"assign {name} HOST:PORT on the directory's machine")


def import_on_node(settings, given):
    """Import a workspace, unless another node still has it: its jobs would run on both.

    If the file is the workspace itself and not a copy, its jobs are kept.
    """
    place, is_itself = place_meant(settings, given)
    name = place["name"]
    path = settings.workspaces / f"{place['id']}.db"
    jobs = "keep" if is_itself else given.jobs
    with files_locked(settings), copy_to_import(settings, given.file, jobs) as copy:
        if not may_replace(copy, path):
            raise Unusable(f"this node has {name} already, in {path}; to import the file "
                           "as another workspace, use --name")
        if not place["node"] and not place["moving"]:
            raise Unusable(f"{name} is on the directory's machine; first run workspace "
                           f"export {name} FILE --move there")
        check_left(settings, place)
        put_in_place(copy, path)
    print(f"{path}: on the directory's machine, now run node assign {name} with the "
          "address of this node")


def place_meant(settings, given):
    """Return the directory's row of the workspace to import, and whether the file is that
    workspace itself, which has moved.

    --name or the export names the workspace. If the file's name is an id, it comes from a
    node's folder or backup. Raises Unusable if it belongs to another workspace.
    """
    id = given.file.stem
    if given.name or not is_id(id):
        title, *_ = about_file(given.file, given.name)
        place = place_of(settings, name=slug(title))
        return place, left_by(given.file) == place["id"]
    about_file(given.file, id)                           # raises if it is no workspace
    with opened_to_read(given.file) as db:
        if not may_be_of(db, id):
            raise Unusable(f"{given.file} belongs to another workspace; choose one with "
                           "--name")
    return place_of(settings, id=id), True


NODE_VERBS.update({"workspace export": export_from_node,
                   "workspace import": import_on_node})


# ==== 63. Proxy ===========================================================================
# The idea: an nginx in front of a directory and its nodes does the worker's part: it asks
#   the gate, and brings the verdict to the node.
# It needs: 62 Nodes.

@verb("nginx", "print the configuration of an nginx in front of a directory and its nodes",
      "--directory", "--node", "--listen")
def nginx(settings, given):
    check_installation()
    places = {"orion_directory": given.directory}
    places.update((f"orion_node_{number}", node)
                  for number, node in enumerate(given.node, 1))
    fixed = {address: name for name, address in places.items() if is_fixed(address)}
    headers = [{"header": header, "variable": header.replace("-", "_")}
               for header in (*VERDICT, "x-verdict")]
    largest = max([BODY_LIMIT, *[one.upload for one in all_routes(settings.slices)]])
    text = Template(TEMPLATES / "nginx.txt")
    print(text(
        largest=largest // 1024,
        upstream=[{"name": name, "address": address} for address, name in fixed.items()],
        directory=fixed.get(given.directory, given.directory), taken=headers, given=headers,
        by_name=[] if fixed.keys() >= {*places.values()} else [{"server": dns_server()}],
        choice=[{"pattern": re.escape(node), "target": fixed.get(node, node)}
                for node in given.node],
        listen=[{"where": where} for where in listening_at(given.listen or "80")]))


def is_fixed(address):
    """Can nginx resolve this address when it starts? If it can't, it does not start."""
    host = address.rpartition(":")[0].strip("[]")
    if address_in(host):
        return True
    with contextlib.suppress(OSError):
        return host in pathlib.Path("/etc/hosts").read_text().split()
    return False


def dns_server():
    """Return the DNS server of this machine or, if that is unknown, systemd's."""
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/etc/resolv.conf").read_text().splitlines()
        for words in map(str.split, lines):
            if words[:1] == ["nameserver"] and address_in(words[-1]):
                return f"[{words[-1]}]" if ":" in words[-1] else words[-1]
    return "127.0.0.53"


def listening_at(where):
    """Return where nginx listens: at a port also by IPv6, if this machine has it."""
    with contextlib.suppress(OSError):
        if where.isdigit():
            socket.socket(socket.AF_INET6).close()
            return [where, f"[::]:{where}"]
    return [where]


# ==== 64. More figures ====================================================================
# The idea: these figures count the workspaces that need attention: their jobs are late or
#   given up, their files are older than this program, or they are being moved or removed.
#   They also tell which nodes answer.
# It promises: reading the figures opens no file of a workspace. What such a file holds was
#   noted when the server started, or when the file was last open.
# It needs: 42 Jobs, 53 Figures, 56 Snapshots, 62 Nodes.

GIVEN_UP = "SELECT count(*) FROM jobs WHERE due IS NULL"
AWAY = {"moving": MOVES, "going": GOES, "deleted": DELETED}


@addition
class NotesFiles(Alarms):
    """Notes more of what Alarms finds in each file when the server starts."""

    def __init__(self, *args):
        super().__init__(*args)
        self.given_up = {}                               # how many jobs, by id; no zeros
        # Ids. A file can be opened, and so migrated, before look_into says that it is old.
        self.old = set()
        self.opened = set()

    @functools.cached_property
    def schema(self):
        return workspace_router(self.namespace.settings).schema

    def look_into(self, id, db):
        ran = dict(db.execute("SELECT slice, count(*) FROM _migrations GROUP BY slice"))
        if any([ran.get(slice, 0) < len(entries) for slice, entries in self.schema]):
            self.old.add(id)
        self.note_given_up(id, db.execute(GIVEN_UP).fetchone()[0])
        super().look_into(id, db)

    def note_given_up(self, id, many):
        self.given_up.pop(id, None)
        if many:
            self.given_up[id] = many


@addition
class NotesItself(Broadcast):
    def own_due(self, request):
        """Note the figures again, because alarms ask this after an open and after a job."""
        alarms = self.namespace.alarms
        alarms.opened.add(self.id)
        alarms.note_given_up(self.id, self.store.one(GIVEN_UP)[0])
        return super().own_due(request)


@addition
class KnowsPlaces(EdgeDirectory):
    def own_places(self, request):
        many = dict(self.store.query("SELECT moving, count(*) FROM workspaces WHERE moving "
                                     "> 0 GROUP BY moving"))
        nodes = self.store.query("SELECT address FROM nodes")
        return {"away": {name: many.get(state, 0) for name, state in AWAY.items()},
                "nodes": [row["address"] for row in nodes]}


def answers(settings, node):
    """Return 1 if the node answers within a second, else 0. It is asked for the file of an
    id that nobody has. It answers only its own directory, so 1 proves a common key, too."""
    question = Request("GET", f"/_node/{'0' * 64}/has")
    return int(outcome(ask_process, settings, node, question, 1.0) is False)


@addition
class TellsMore(LoopEdge):
    def text(self):
        text = Template(TEMPLATES / "more.txt")
        return super().text() + text(**self.work(), **self.places()) + "\n"

    def work(self):
        now = time.time()
        late = [now - due for due in [*self.alarms.due.values()] if due < now]
        return {"due": len(late), "late": max(late, default=0.0),
                "behind": len(self.alarms.old - self.alarms.opened),
                **self.of_leaders(given_up=dict(self.alarms.given_up))}

    def places(self):
        """Return the figures that the Directory knows. A node has no Directory to ask."""
        said = {"away": {}, "nodes": []}
        if self.settings.plane != "data":
            with contextlib.suppress(CRASH):             # then show the other figures
                said = self.env.directory.ask("/_places")
        ask = functools.partial(answers, self.settings)
        up = in_two_threads(ask, said["nodes"])
        return {"away": labelled(said["away"]),
                "node": labelled(dict(zip(said["nodes"], up)))}


# #### More for slices #####################################################################

# ==== 65. Public routes ===================================================================
# The idea: anybody may use a route with the grant PUBLIC: a page for the whole world, or
#   the address that another service calls (a webhook). The gate lets these requests in.
# It promises: a client who is not signed in, or not a member, is nobody to the slice:
#   account "", role "public", no grants. A command from another site is nobody's, too, even
#   if it carries a cookie. Only a public route reveals that a workspace exists.
# Who uses it: slices, by Route(..., PUBLIC, ...).
# It needs: 62 Nodes, because proxies ask the gate about requests.
# It stands behind: 53 Figures. So a path's secrets are taken out before the path is logged.

NOBODY = {"x-account": "", "x-role": "public", "x-can-delete": "false", "x-grants": ""}
IDENTITY_HEADERS = ("cookie", "page-account", "sec-fetch-site")


# -- what is public

def public_path(router, request):
    """Return the path of the public route that this request is for; "" if there is none."""
    if not request.path.startswith("/w/"):
        return ""
    path = "/" + "/".join(request.path.split("/")[3:])
    with contextlib.suppress(Refused):
        route = router.match(request.method, path)[1]
        return route.path if route.grant == PUBLIC else ""
    return ""


def public_functions(settings):
    """Return two functions for the Env of an app that has public routes: public(request),
    which is public_path; and question(request), which tells the gate if it is public."""
    public = functools.partial(public_path, workspace_router(settings))

    def question(request):
        query = "public" if public(request) else ""
        return question_of(request)._replace(query=query)
    return {"public": public, "question": question}


def as_nobody(request, env):
    """Return the request. If it is a public command from another site, make it nobody's.

    It is then handled as if our own page had sent it. (Any other command is refused.)
    """
    if request.method in SAFE or not env.public(request):
        return request
    try:
        refuse_foreign(request)
        return request
    except Refused:
        headers = {name: value for name, value in request.headers.items()
                   if name not in IDENTITY_HEADERS}
        headers["origin"] = f"{request.scheme}://{request.headers.get('host', '')}"
        return request._replace(headers=headers)


# -- in the Directory

@addition
class LetsAnybodyIn(Directory):                          # also with --plain
    def verdict_on(self, ctx, workspace):
        verdict = super().verdict_on(ctx, workspace)
        if verdict.status not in (401, 403) or not self.asked_for_public(ctx.request):
            return verdict
        row = self.store.one("SELECT * FROM workspaces WHERE name = ? AND moving < 2",
                             workspace)
        if row is None:
            return verdict
        if row["moving"]:
            return MOVING
        said = self.say(Viewer(), {**row, "role": NOT_A_MEMBER})
        return let_in({**said, **NOBODY})

    def asked_for_public(self, request):
        """Is this question about a public route? The worker says so in its query. A proxy
        names the request that it asks about."""
        if request.path != "/_gate":
            return request.query == "public"
        return bool(public_path(self.inner_router, request_behind(request)))

    @functools.cached_property
    def inner_router(self):
        return workspace_router(self.namespace.settings)


# -- at the edge

def beginning_with(path):
    """Return a pattern for paths that begin with a slice's path. Group 1: "/w/acme"."""
    pattern = f"(/w/[^/]*){path_pattern(path)}(?:/|$)"
    return re.compile(pattern)


@addition
class OpensToAnybody(LoopEdge):
    is_open = False                                      # True: there are public routes
    secret_paths = ()                                    # (pattern, path with <parts>)

    def use(self, env):
        paths = [route.path for route in all_routes(env.settings.slices)
                 if route.grant == PUBLIC]
        if paths:                                        # without them this costs nothing
            self.is_open = True
            paths.sort(key=lambda path: -path.count("/"))        # try the longest first
            self.secret_paths = [(beginning_with(path), path)
                                 for path in paths if "<" in path]
            env = dataclasses.replace(env, **public_functions(env.settings))
        super().use(env)

    def request(self, reading, peer):
        request = super().request(reading, peer)
        return as_nobody(request, self.env) if self.is_open else request

    def decide(self, request, env):
        """If as_nobody took the cookie out, take the account out of the verdict, too. On a
        node a verdict can still name one, because the proxy asked with the cookie."""
        decided = super().decide(request, env)
        if not isinstance(decided, Noted) or "cookie" in request.headers \
                or not self.env.public(request):
            return decided
        nobody = {**NOBODY, "x-operator": "", "x-read-only": ""}
        return decided._replace(request=decided.request.with_headers(nobody))

    def as_logged(self, request, status=500):
        """Put the names of a route's <parts> in place of their values, which may be
        secrets: /w/acme/hooks/7f3a becomes /w/acme/hooks/<secret>.

        Do so also for a refused request whose path only begins like that of the route.
        """
        for pattern, path in self.secret_paths:
            found = pattern.match(request.path)
            if found and (status >= 400 or self.env.public(request) == path):
                return request._replace(path=found[1] + path)
        return request

    def count(self, asked, response):
        if self.secret_paths:
            request = self.as_logged(asked.request, response.status)
            asked = dataclasses.replace(asked, request=request)
        super().count(asked, response)

    def refusal(self, request, error):
        if not isinstance(error, Refused):               # the path will be logged
            request = self.as_logged(request)
        return super().refusal(request, error)


def open_to_anybody(env):
    front = env.front
    vars(env).update(public_functions(env.workspaces.settings))
    env.front = lambda request, env: front(as_nobody(request, env), env)


PLAIN.append(open_to_anybody)


# ==== 66. Member lists ====================================================================
# The idea: ctx.members() tells a slice who is in its workspace. The Directory's file has
#   the members; this section reads it over a separate connection. A node keeps copies of
#   the lists, and asks for them again when the Directory has changed.
# It promises: no thread waits for the Directory's turn. A region that called it is rendered
#   again when the members change: at once in one process, else after a second or two.
# Who uses it: slices.
# It needs: 62 Nodes, because processes ask each other.

@addition
class AsksForMembers(Context):
    def members(self) -> List[Any]:
        """Return the members, sorted by name, as dicts with name, role and label."""
        self.store.check_thread()
        members = self.host.namespace.members_of(self.host.id)
        if self.host.kept_members is None:
            self.host.kept_members = members
        return [dict(zip(("name", "role", "label"), member)) for member in members]


@addition
class ShowsMembers(SliceHost):
    """A host whose kept renderings are dropped when its members change: that is, when
    members_of returns another list than the one that they show."""
    kept_members = None                                  # the list shown; None: none is

    def rendering(self, *what):
        kept = self.kept_members
        if kept is not None and kept is not self.namespace.members_of(self.id):
            self.renderings.clear()
            self.kept_members = None
        return super().rendering(*what)


@addition
class ListsMembers(Namespace):
    lists = None                                         # made for the first caller

    def members_of(self, id):
        with self.lock:
            if self.lists is None:
                settings = self.settings
                self.lists = (ListsOfNode(settings) if settings.plane == "data"
                              else ListsOfFile(settings.directory_file))
        return self.lists.of(id)

    def close(self):
        if self.lists:
            self.lists.close()                           # first: the last close tidies up
        super().close()


# -- the lists

MOST_MEMBERS = 10_000                                    # listed of one workspace
ROLES_AND_LABELS = """SELECT account, role, label FROM memberships JOIN accounts
                      ON name = account WHERE workspace = ? ORDER BY account LIMIT ?"""
IDS_AT_ONCE = 50                                         # in one question to a Directory


class MemberLists:
    """The members of workspaces, by id. An unchanged list stays the same object."""
    MOST = 50_000                                        # members in all lists

    def __init__(self):
        self.lock = threading.Lock()                     # guards the next two
        # By id: (version of the Directory, (("bob", "owner", "Bob"), ...)).
        self.by_id = collections.OrderedDict()
        self.size = 0                                    # members in all lists

    def put(self, id, rows, version):
        """Keep rows of name, role and label; return them. The caller holds the lock."""
        _, known = self.by_id.pop(id, (None, ()))
        members = tuple(map(tuple, rows))
        if members == known:
            members = known
        self.size += len(members) - len(known)
        self.by_id[id] = version, members
        while self.size > self.MOST and len(self.by_id) > 1:
            _, (_, oldest) = self.by_id.popitem(last=False)
            self.size -= len(oldest)
        return members

    def prepare(self, id):
        """Get the list before an object's turn is taken, so that no thread waits for
        another process while it holds the turn."""

    def close(self):
        pass


class ListsOfFile(MemberLists):
    """Lists read from the Directory's file, which another process may be writing to."""

    def __init__(self, path):
        super().__init__()
        self.file = Watched(path, 1)

    def of(self, id):
        """Return the list. Raises Refused(503)."""
        path = self.file.path
        try:
            with self.lock:
                version = self.file.version(identity(path))
                as_of, members = self.by_id.get(id, (None, ()))
                if as_of == version:
                    return members
                found = self.file.db.execute(ROLES_AND_LABELS, (id, MOST_MEMBERS))
                return self.put(id, found.fetchall(), version)
        except sqlite3.Error as error:
            log_once(f"members: {path}: {error}")
            raise Refused(503, "The members can't be read now. Try again in a minute.",
                          retry_after(60)) from error

    def close(self):
        self.file.close()


class ListsOfNode(MemberLists):
    """Lists that the Directory, in another process, has sent."""
    PATIENCE = 1.0                                       # seconds

    def __init__(self, settings):
        super().__init__()
        self.settings = settings
        self.version = None                              # of the Directory, last seen

    def of(self, id):
        """Return the list. Mostly prepare has fetched it; a job may have to wait for it."""
        known = self.by_id.get(id)
        return known[1] if known else self.ask([id])[id]

    def prepare(self, id):
        if id not in self.by_id:
            with contextlib.suppress(NoAnswer):          # then of() raises it
                self.ask([id])

    def ask(self, ids):
        """Return the lists of these ids. Raises NoAnswer."""
        version = self.version                           # read first: it may change
        question = Request("GET", "/_members_of", f"ids={','.join(ids)}")
        said = ask_process(self.settings, self.settings.directory, question, self.PATIENCE)
        with self.lock:
            return {id: self.put(id, rows, version) for id, rows in said.items()}

    def refresh(self, version):
        """Ask again for the lists of other versions. Yield the ids whose lists changed."""
        self.version = version
        with self.lock:
            old = {id: members for id, (as_of, members) in self.by_id.items()
                   if as_of != version}
        ids = [*old]
        for first in range(0, len(ids), IDS_AT_ONCE):
            some = self.ask(ids[first:first + IDS_AT_ONCE])
            yield from [id for id, members in some.items() if members is not old[id]]


# -- who sends the lists, and who is told that they have changed

@addition
class TellsMembers(EdgeDirectory):
    def own_members_of(self, request):
        return {id: [*map(tuple, self.store.query(ROLES_AND_LABELS, id, MOST_MEMBERS))]
                for id in request.params["ids"].split(",")}


@addition
class PreparesMembers(LoopEdge):
    def decide(self, request, env):
        decided = super().decide(request, env)
        if isinstance(decided, Noted) and self.env.workspaces.lists:
            self.env.workspaces.lists.prepare(decided.stub.id)
        return decided


@addition
class HearsOfMembers(Broker):
    def published(self, id, topic):
        """Hear of changes. The Directory publishes members:<id>, or "" if another process
        wrote and may have changed any workspace. (For nodes, see look_elsewhere.)"""
        super().published(id, topic)
        if id != self.edge.env.directory.id:
            return
        if topic.startswith("members:"):
            self.members_changed([topic[len("members:"):]])
        elif not topic and not isinstance(self.edge.env.workspaces.lists, ListsOfNode):
            self.members_changed([*self.channels])       # all that have streams

    def members_changed(self, ids):
        """Ask all regions of these workspaces again, if any ever called members."""
        if self.edge.env.workspaces.lists:
            for id in ids:
                super().published(id, "")

    def look_elsewhere(self):
        super().look_elsewhere()
        lists = self.edge.env.workspaces.lists
        if isinstance(lists, ListsOfNode):
            with contextlib.suppress(NoAnswer):          # it is asked again in a second
                self.members_changed(lists.refresh(self.version))


# ==== 67. Uploads =========================================================================
# The idea: a body that is too long for memory goes to a file, piece by piece. The loop
#   reads a piece from the socket, hands it to a thread, and reads on when the thread has
#   written it. So a connection costs two pieces of memory. The file has no name, so no
#   crash leaves it behind. When the body is complete, its request is handled as any other.
# It promises: a route takes as many bytes as its Route(upload=...) says; other routes take
#   no more than without this section. A client that lacks the grant, or only looks on, is
#   refused before the body is read. A client has to send SLOWEST bytes a second. The bytes
#   under way are bounded, per account and in total. A form is parsed in one pass.
# Who uses it: slices, by ctx.upload().
#
# One upload, step by step. Each step is a method of TakesUploads. The loop runs those that
# wait for nothing, and the pool runs the others:
#
#     spool_for    loop   the head has come: is it an upload, how long may it be, and where
#                         does it go?
#     check        pool   may they? If so, room is reserved; then in the loop: go_on
#     arriving     loop   a piece is full: hand_over; pool: write_on; loop: read_on
#     take         loop   the body is complete: hand_over; pool: read_form; loop: take_up
#     refuse       loop   it was refused; drop: it is over, or its client is gone

PIECE = 2 ** 18                                          # bytes written at a time
SLOWEST = 2 ** 14                                        # bytes a second
SPARE_DISK = 2 ** 26                                     # bytes that uploads leave free
EXPLAINED_STATUSES = (400, 408, 413, 415, 429, 503, 507)    # of refused uploads
NO_DISK = "The disk of this server has no room for this. Ask its operator to make room."


class Spool:
    """A body on its way from a socket to a file."""

    def __init__(self, reading, route, folder):
        self.reading = reading                           # its head
        self.route = route
        self.limit = route.upload
        self.folder = folder
        self.file = None                                 # made for the first piece
        self.waiting = bytearray()                       # bytes not written yet
        self.size = 0                                    # how many bytes have come
        self.began = 0.0                                 # put off by pauses: TakesUploads
        self.data = b""                                  # the complete body, at the end
        self.pairs = None                                # its fields, or an error
        self.account = ""                                # charged for it, in Uploads
        self.reserved = 0                                # bytes, in Uploads

    def extend(self, data):
        self.waiting += data
        self.size += len(data)

    def write(self):
        """Write the waiting bytes, in the pool. Raises Refused(507)."""
        try:
            self.file = self.file or tempfile.TemporaryFile(dir=self.folder, buffering=0)
            while self.waiting:                          # one write may take only a part
                del self.waiting[:self.file.write(self.waiting)]
        except OSError as error:
            log_once(f"an upload: {error}")
            raise Refused(507, NO_DISK) from error

    def map(self):
        """Map the complete file as data, in the pool. That takes no memory."""
        self.write()
        if self.size:
            self.data = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)

    def close(self):
        if type(self.data) is not bytes:
            self.data.close()
        if self.file:
            self.file.close()


class Uploads:
    """All uploads that are under way. The loop and the pool use it."""
    ACCOUNT = 2 ** 26                                    # bytes, of one account or address
    ACCOUNTS = 8                                         # of all together: 8 times that

    def __init__(self, settings):
        self.folder = settings.data
        self.routes = []
        for route in upload_routes(settings.slices):
            pattern = f"/w/[^/]+{path_pattern(route.path)}"
            self.routes.append((re.compile(pattern), route))
        self.most = max([self.ACCOUNT, *[route.upload for _, route in self.routes]])
        self.lock = threading.Lock()                     # guards the next line
        self.taken = collections.Counter()               # bytes, by account

    def route(self, reading):
        """Return the route that takes this as an upload; None if there is none."""
        if not self.routes:
            return None
        with contextlib.suppress(Refused):               # it is raised again later
            path, _ = parse_target(reading.target, reading.headers.get("host", ""))
            type = reading.headers.get("content-type", "")
            return self.route_of(reading.method, path, type.lower())
        return None

    def route_of(self, method, path, type=""):
        if type.startswith(IN_MEMORY):
            return None
        return next((route for pattern, route in self.routes
                     if route.method == method and pattern.fullmatch(path)), None)

    def reserve(self, spool, account, length):
        """Reserve room for a body of this length. Raises Refused if there is none now."""
        size = max(spool.limit if length is None else length, 2 * PIECE)
        if shutil.disk_usage(self.folder).free < size + SPARE_DISK:
            log_once(f"an upload of {size} bytes: the disk of {self.folder} is full")
            raise Refused(507, NO_DISK)
        with self.lock:
            if self.taken[account] + size > self.most:
                raise Refused(429, "You are sending too much at once. Try again when your "
                                   "other uploads are done.", retry_after(5))
            if sum(self.taken.values()) + size > self.most * self.ACCOUNTS:
                raise Refused(503, "Too many uploads are arriving. Try again in a minute.",
                              retry_after(60))
            self.taken[account] += size
            spool.reserved = size
            spool.account = account

    def release(self, spool):
        with self.lock:
            # This also drops an account when its number becomes 0.
            self.taken -= collections.Counter({spool.account: spool.reserved})
            spool.reserved = 0
        spool.close()


@addition
class TakesUploads(Connection):
    """A connection that can take uploads.

    spool: the Spool of the current body, from its head until it is complete. A client has
    to be as fast as SLOWEST says. The time in which we do not read is not counted, because
    spool.began is put off by it.
    """
    spool = None
    paused = 0.0                                         # when we last stopped reading

    def spool_for(self, reading):
        route = self.edge.uploads.route(reading)
        if route is None:
            return super().spool_for(reading)
        self.spool = Spool(reading, route, self.edge.uploads.folder)
        if (reading.length or 0) > route.upload:
            raise too_large(route.upload)
        return self.spool

    def check(self, reading, request):
        if reading.spool is None:
            return super().check(reading, request)
        bare = request._replace(spool=None)
        decided = self.edge.decide(bare, self.edge.deciding)         # raises Refused
        viewer = viewer_in_full(viewer_by_verdict(decided.request), decided.request)
        viewer.permit(reading.spool.route.grant, reading.method)
        account = viewer.account or source_of(request.peer)
        self.edge.uploads.reserve(reading.spool, account, reading.length)

    def go_on(self, reading):
        if self not in self.edge.held:
            return self.drop()
        if reading.spool:
            reading.spool.began = time.monotonic()
        super().go_on(reading)

    def arriving(self):
        super().arriving()
        spool = self.spool
        if spool is None:
            return
        self.deadline = spool.began + self.REQUEST_SECONDS + spool.size / SLOWEST
        if len(spool.waiting) >= PIECE:
            self.hand_over(self.write_on, spool)

    def hand_over(self, job, what):
        """Have the pool do job(what), and stop reading until then."""
        self.state = self.ANSWERING
        self.paused = time.monotonic()
        self.listen(0)
        self.apart(job, what, self.spool.account)

    def write_on(self, spool):
        spool.write()
        self.edge.call(self.read_on, spool)

    def read_on(self, spool):
        if self not in self.edge.held:
            return self.drop()
        self.state = self.ARRIVING
        spool.began += time.monotonic() - self.paused
        self.resume()

    def take(self, reading):
        """If it is an upload, have its form parsed before the request joins its lane."""
        if reading.spool is None:
            return super().take(reading)
        self.hand_over(self.read_form, reading)

    def read_form(self, reading):
        spool = reading.spool
        spool.map()
        type = reading.headers.get("content-type", "")
        if type.lower().startswith(MULTIPART):
            spool.pairs = outcome(parts_of, spool.data, type)
        self.edge.call(self.close_on_error, self.take_up, reading)

    def take_up(self, reading):
        self.spool = None                                # finish() releases it
        if self in self.edge.held:
            self.listen(0 if self.ended else READABLE)
        super().take(reading)

    def refuse(self, no):
        """Answer an upload in the form that its page expects; ignore the bytes to come."""
        spool = self.spool
        self.drop()
        if spool is None or self not in self.edge.held:
            return super().refuse(no)
        self.state = self.ANSWERING
        # A browser reads the answer only after it has sent the whole file. So this
        # connection ignores more bytes than others do, and for longer: see leave (25).
        self.spare = 2 * spool.limit
        self.LINGER_SECONDS = 10.0
        asked = Asked(self, spool.reading._replace(keep=False), Request("GET", "/"))
        with contextlib.suppress(Refused):               # its head may be refused, too
            asked.request = self.edge.request(spool.reading, self.peer)
        self.write(self.encoded(asked, self.edge.refusal(asked.request, no)))

    def close(self):
        super().close()
        if not self.busy:                                # else a thread still uses it
            self.drop()

    def drop(self):
        spool, self.spool = self.spool, None
        if spool:
            self.edge.uploads.release(spool)


@addition
class HasUploads(LoopEdge):
    def __init__(self, env, settings):
        self.uploads = Uploads(settings)
        super().__init__(env, settings)

    def refusal(self, request, error):
        """Tell a page why its upload was refused. (Datastar tells it only the status.)

        If a file is too large, the page says so at the form; it shows the rest as a toast.
        """
        said = isinstance(error, Refused) and error.status in EXPLAINED_STATUSES
        if not said or not request.datastar \
                or not self.uploads.route_of(request.method, request.path):
            return super().refusal(request, error)
        signal = error.signal if error.status == 413 else "toast"
        return as_json({signal: error.message})

    def finish(self, asked, response):
        try:
            super().finish(asked, response)
        finally:
            if asked.reading.spool:
                self.uploads.release(asked.reading.spool)


# -- a form in parts (RFC 7578)

MULTIPART = "multipart/form-data"
IN_MEMORY = ("application/json", "application/x-www-form-urlencoded")
PART_HEAD_LIMIT = 2048                                   # bytes
BOUNDARY = re.compile(r'(?i)multipart/form-data[ \t]*;[ \t]*boundary='
                      r'(?:"([ -!#-~]{1,70})"|([!#-:<-~]{1,70}))')      # RFC 2046, 5.1.1
PART_FIELDS = re.compile(rb"(?:" + TOKEN + rb":" + VALUE + rb"\r\n)*")
FORM_DATA = re.compile(rb'(?i)form-data; *name="([^"]*)"(?:; *filename="([^"]*)")?'
                       rb'(?:; *filename\*=[^;"]*)?')
NO_PARTS = (400, "This form can't be read. Reload the page and try again.")


def parts_of(data, content_type):
    """Return the fields of a multipart form as (name, value); a value is text or an Upload.

    data: bytes or a mapped file. With the boundary b, and CRLF at the end of each line:

        --b
        Content-Disposition: form-data; name="title"

        what was typed
        --b--

    Each byte is looked at once, or twice where lines begin as the boundary does. Nothing
    may come before the first part or after the last. Raises Refused(400) and Refused(413).
    """
    named = BOUNDARY.fullmatch(content_type)
    if not named:
        raise Refused(*NO_PARTS)
    mark = b"\r\n--" + (named[1] or named[2]).encode()
    at = len(mark) - 2                                   # the first has no CRLF before it
    if data[:at] != mark[2:]:
        raise Refused(*NO_PARTS)
    pairs = []
    while data[at:at + 2] == b"\r\n":                    # after the last part comes "--"
        head_ends = data.find(b"\r\n\r\n", at, at + PART_HEAD_LIMIT)
        begins = head_ends + 4
        ends = data.find(mark, begins)
        if head_ends < 0 or ends < 0 or len(pairs) >= MOST_PAIRS:
            raise Refused(*NO_PARTS)
        pairs.append(read_part(data[at + 2:head_ends + 2], data, begins, ends))
        at = ends + len(mark)
    if data[at:at + 5] not in (b"--", b"--\r\n"):
        raise Refused(*NO_PARTS)
    texts = [value for _, value in pairs if type(value) is str]
    if sum(map(len, texts)) > BODY_LIMIT:
        raise too_large(BODY_LIMIT)
    return [(name, value) for name, value in pairs if value is not None]


def read_part(head, data, begins, ends):
    """Return the name and value of a field; the value is None if no file was chosen."""
    fields = {name.lower(): value.strip() for name, value in FIELD.findall(head)}
    said = FORM_DATA.fullmatch(fields.get(b"content-disposition", b""))
    encoding = fields.get(b"content-transfer-encoding", b"binary").lower()
    if not PART_FIELDS.fullmatch(head) or not said \
            or encoding not in (b"binary", b"8bit", b"7bit"):
        raise Refused(*NO_PARTS)
    name = unescaped(said[1])
    if said[2] is None:
        if ends - begins > BODY_LIMIT:
            raise too_large(BODY_LIMIT)
        return name, data[begins:ends].decode("utf-8", "replace")
    if not said[2] and begins == ends:
        return name, None
    return name, Upload.found(unescaped(said[2]), data, begins, ends)


def unescaped(name):
    """Return a name as text (WHATWG HTML, "multipart/form-data encoding algorithm")."""
    text = name.decode("utf-8", "replace")
    for code, sign in (("%0D", "\r"), ("%0A", "\n"), ("%22", '"')):
        text = text.replace(code, sign)
    return text


def read_multipart(request):
    if request.spool is None:
        return parts_of(request.body, request.headers["content-type"])
    if isinstance(request.spool.pairs, BaseException):
        raise request.spool.pairs
    return request.spool.pairs


FORMS.update({MULTIPART: read_multipart})


# -- for slices

@dataclasses.dataclass(frozen=True)
class Upload:
    """A file that was sent with a request. It can be read until the request is answered.

    type: found from the content, not taken from the client; see INERT.
    """
    name: str                                            # without a path
    type: str
    size: int                                            # in bytes
    digest: str                                          # the same for the same content
    source: Any = dataclasses.field(repr=False)
    begins: int = dataclasses.field(repr=False)

    @classmethod
    def found(cls, name, data, begins, ends):
        digest = hashlib.blake2b(digest_size=16)
        for piece in pieces_of(data, begins, ends):
            digest.update(piece)
        type = type_of(data[begins:min(begins + 1024, ends)])
        return cls(file_name(name), type, ends - begins, digest.hexdigest(), data, begins)

    def pieces(self) -> Iterator[bytes]:
        return pieces_of(self.source, self.begins, self.begins + self.size)

    def read(self) -> bytes:
        """Return all of it."""
        return b"".join(self.pieces())

    def __str__(self):
        return f"{self.name} {self.digest}"


def pieces_of(data, begins, ends):
    for at in range(begins, ends, PIECE):
        yield data[at:min(at + PIECE, ends)]


# Types that a browser can show and does not run: the type, an offset, and the bytes there.
# Text is shown, too. A file of any other type is saved, whatever type the client gave it.
INERT = (
    ("image/png", 0, b"\x89PNG\r\n\x1a\n"), ("image/jpeg", 0, b"\xff\xd8\xff"),
    ("image/gif", 0, (b"GIF87a", b"GIF89a")), ("image/webp", 8, b"WEBPVP8"),
    ("image/avif", 4, (b"ftypavif", b"ftypavis")), ("audio/wav", 8, b"WAVE"),
    ("audio/mpeg", 0, (b"ID3", b"\xff\xfb")), ("audio/ogg", 0, b"OggS"),
    ("audio/flac", 0, b"fLaC"), ("audio/mp4", 4, b"ftypM4A"),
    ("video/mp4", 4, (b"ftypiso", b"ftypmp4", b"ftypM4V", b"ftypavc1")),
    ("video/webm", 0, b"\x1aE\xdf\xa3"),
)
TEXT = "text/plain; charset=utf-8"                       # a browser shows it as it is
NO_TYPE = "application/octet-stream"
NOT_IN_TEXT = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")


def type_of(beginning):
    """Return the type of a file that begins so: one of INERT, TEXT or NO_TYPE."""
    for type, at, marks in INERT:
        if beginning.startswith(marks, at):
            return type
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(beginning)
    except UnicodeDecodeError:
        return NO_TYPE
    return NO_TYPE if NOT_IN_TEXT.search(text) else TEXT


@addition
class BringsUploads(Context):
    def upload(self, name: str = "") -> Upload:
        """Return the file that was chosen in this field of a form whose enctype is
        multipart/form-data. Without a name, return the body of a request that is no form.

        Raises Refused(422), shown at the field, if no file was sent.
        """
        found = self.uploads(name)
        if not found:
            why = "Choose a file."
            raise Refused(422, why, fields={name: why} if name else None)
        return found[-1]

    def uploads(self, name: str = "") -> List[Upload]:
        """Return all files that were chosen in this field."""
        request = self.request
        if request.media_type in FORMS:
            return [value for key, value in self.sent
                    if key == name and type(value) is Upload]
        if name or request.media_type == "application/json":
            return []                                    # such a body is no file
        data = request.spool.data if request.spool else request.body
        return [Upload.found("", data, 0, len(data))] if len(data) else []


def upload_routes(slices):
    return [route for route in all_routes(slices) if route.upload]


def check_uploads(settings):
    """Raise Unusable for an upload limit that can't work."""
    for route in upload_routes(settings.slices):
        if type(route.upload) is not int or route.upload <= BODY_LIMIT \
                or route.method in BODYLESS:
            raise Unusable(f"{route!r:.200}: upload must be a number of bytes above "
                           f"{BODY_LIMIT}, of a POST, PUT or PATCH")
        if settings.plain:
            raise Unusable("this app takes uploads, but --plain can't; leave --plain out")


CHECKS.append(check_uploads)


# ==== 68. Stored files ====================================================================
# The idea: a file is stored as rows of the workspace's own database: one row describes it,
#   and each piece is a row. So the command's own transaction writes it, the quota counts
#   it, and snapshots, exports and moves include it.
# It promises: a file is sent piece by piece, so a slow client has one piece waiting and
#   delays nobody. A browser opens pictures, audio, video and text in a sandbox, and saves
#   all other files. The id of a file is never given to another one.
# Who uses it: slices, by ctx.files.
# It needs: 67 Uploads.

FILE_TABLES = (
    "CREATE TABLE _files (id INTEGER PRIMARY KEY AUTOINCREMENT, slice TEXT NOT NULL, name "
    "TEXT NOT NULL, type TEXT NOT NULL, size INTEGER NOT NULL, digest TEXT NOT NULL)",
    "CREATE TABLE _file_pieces (id INTEGER PRIMARY KEY, data BLOB NOT NULL)",
)
# In one file. The pieces of file 7 have ids from 7 * MOST_PIECES on, so they need no index.
MOST_PIECES = 2 ** 20
FILE_POLICY = ("default-src 'none'; img-src 'self'; media-src 'self'; style-src "
               "'unsafe-inline'; sandbox")               # for the page that shows the file
RANGE = re.compile(r"bytes=(?:([0-9]{1,18})-([0-9]{0,18})|-([0-9]{1,18}))")


@addition
class KnowsFiles(QuickRouter):
    def __init__(self, slices):
        super().__init__(slices)
        if upload_routes(slices):
            self.schema.append(("orion.files", FILE_TABLES))


@addition
class HasFiles(Context):
    @property
    def files(self) -> Files:
        return Files(self)


class Files:
    """The files of a slice in this workspace."""

    def __init__(self, ctx):
        ctx.store.check_thread()
        self.ctx = ctx
        self.store = ctx.host.store
        self.slice = ctx.store.slice

    def add(self, upload: Upload) -> int:
        """Store the upload in the command's transaction. Return the id of the file.

        Raises Refused(507) if it is too large for the quota.
        """
        self.ctx.store.check_writes("adds a file")
        check_room(self.store, upload.size)
        id = self.store.insert("INSERT INTO _files (slice, name, type, size, digest) "
                               "VALUES (?, ?, ?, ?, ?)", self.slice, upload.name,
                               upload.type, upload.size, upload.digest)
        for number, data in enumerate(upload.pieces(), id * MOST_PIECES):
            self.ctx.host.began = time.monotonic()       # the time limit (16) is per piece
            self.store.exec("INSERT INTO _file_pieces VALUES (?, ?)", number, data)
        return id

    def remove(self, id: int) -> None:
        """Delete the file; do nothing if there is none with this id."""
        self.ctx.store.check_writes("removes a file")
        row = self.row(id)
        if row:
            first = row["id"] * MOST_PIECES
            self.store.exec("DELETE FROM _files WHERE id = ?", row["id"])
            self.store.exec("DELETE FROM _file_pieces WHERE id BETWEEN ? AND ?", first,
                            first + MOST_PIECES - 1)

    def row(self, id):
        """Return a file's row. id: a number, or text, as in a path or a TEXT column."""
        return self.store.one("SELECT * FROM _files WHERE id = ? AND slice = ?", id,
                              self.slice)

    def send(self, id: int, download: bool = False) -> Response:
        """Return the file as the answer to a GET. download: have the browser save it.

        Raises Refused(404), or Refused(416) if the range begins after the end of the file.
        """
        row = self.row(id)
        if row is None:
            raise Refused(404, "This file is gone.")
        how = "attachment" if download or row["type"] == NO_TYPE else "inline"
        headers = (("content-disposition", disposition(how, row["name"])),
                   ("content-security-policy", FILE_POLICY), ("accept-ranges", "bytes"),
                   ("cache-control", "private, no-cache"))
        request = self.ctx.request
        response = Response(200, b"", row["type"], headers)
        response = unless_known(request, response, row["digest"])
        if response.status == 304:
            return response
        span = asked_range(request, row["size"], f'"{row["digest"]}"')
        return self.with_body(response, row["id"], row["size"], span)

    def with_body(self, response, id, size, span):
        """Return the response with the first piece, and with a Rest for the others."""
        begins, ends = span or (0, size)
        if span:
            said = ("content-range", f"bytes {begins}-{ends - 1}/{size}")
            response = response._replace(status=206, headers=(*response.headers, said))
        host = self.ctx.host
        body = piece_of(self.store, id, begins, ends)
        at = begins + len(body)
        rest = Rest(host.namespace.get(host.id), id, at, ends) if at < ends else None
        return response._replace(body=body, rest=rest)


def check_room(store, size):
    """Raise Refused(507) if there is no room for a file. Check before writing, because on a
    full database SQLite rolls back the commands that share the transaction, too."""
    pages, most, free = [store.one(f"PRAGMA {name}")[0] for name in
                         ("page_count", "max_page_count", "freelist_count")]
    room = (most - pages + free) * store.one("PRAGMA page_size")[0]
    if size + size // 64 + BODY_LIMIT > room:
        raise Refused(507, "There is not enough room left here. Delete something, or ask "
                           "for a larger quota.")


def piece_of(store, id, at, ends):
    """Return the bytes from at to the end of their piece, but at most to ends."""
    row = store.one("SELECT data FROM _file_pieces WHERE id = ?",
                    id * MOST_PIECES + at // PIECE)
    return row["data"][at % PIECE:at % PIECE + ends - at] if row else b""


def asked_range(request, size, etag):
    """Return where to begin and end, or None for the whole file (RFC 9110, 14.2).

    A request for several ranges gets the whole file. Raises Refused(416).
    """
    found = RANGE.fullmatch(request.headers.get("range", ""))
    if not found or request.headers.get("if-range", etag) != etag:
        return None
    first, last, suffix = found.groups()
    begins = max(0, size - int(suffix)) if suffix else int(first)
    ends = min(size, int(last) + 1) if last else size
    if last and int(last) < int(first):
        return None
    if begins >= size:
        raise Refused(416, "The file is shorter. Ask for a range inside of it.",
                      (("content-range", f"bytes */{size}"),))
    return begins, ends


# -- the pieces after the first

@dataclasses.dataclass
class Rest:
    """The part of a file that is still to be sent, after the first piece."""
    stub: GuardedStub
    id: int
    at: int
    ends: int

    @property
    def size(self):
        return self.ends - self.at

    def read(self):
        """Return the next piece. Raises Refused(404) if the file is gone."""
        query = f"id={self.id}&at={self.at}&ends={self.ends}"
        data = self.stub.fetch(Request("GET", "/_piece", query)).body
        if not data:
            raise Refused(404, "This file is gone.")
        self.at += len(data)
        return data


@addition
class GivesPieces(Broadcast):
    def own_piece(self, request):
        id, at, ends = [int(request.params[name]) for name in ("id", "at", "ends")]
        return Response(200, piece_of(self.store, id, at, ends))


@addition
class SendsFiles(Connection):
    """A connection that asks for the next piece when it has sent the one before."""
    def written(self):
        if self.rest is None or self not in self.edge.held:
            return super().written()
        lane = "pieces", self.rest.stub.id               # not the lane of the object
        self.edge.pool.gather(lane, self, SendsFiles.send_all, self.whose)

    @staticmethod
    def send_all(connections):
        """Send the next piece to each, in the pool. All read from the same workspace."""
        for connection in connections:
            guarded(connection.send_piece)

    def send_piece(self):
        rest = self.rest
        try:
            data = rest.read()
        except CRASH:
            self.edge.call(self.close)                   # so the client sees it break off
            raise
        if not rest.size:
            self.rest = None
        self.edge.call(self.write, data)


# ==== 69. Tokens ==========================================================================
# The idea: a member makes a token for a program, which sends it in the header Authorization
#   (RFC 6750). The token lets the program into one workspace in its maker's name, to read
#   only or also to write. At the addresses of the pages, the program gets data.
# It promises: a token allows what its maker may do now, or less; it allows nothing outside
#   its workspace, and no changes of members. It is void when its maker leaves. It is shown
#   once, and only its hash is stored. When it is withdrawn, its streams end. Clients that
#   guess tokens slow down nobody else.
# Who uses it: authors of programs. README has one in curl and one in Python.
# It needs: 44 Accounts, 45 Account page.
# It stands behind: 33 Page checks. So data is not checked as if it were markup.
#
# Its table is in section 27:
#
#     tokens   id (the part that is no secret), digest (of the whole token), account,
#              workspace, name, writes, made, used (the last time; 0: never)
#
# A token changes its form on its way. Each step trusts the one before:
#
#     authorization: Bearer orion_0a1b2c3d4e5f_...   the program sends this
#     cookie: __Host-bearer=orion_0a1b2c3d4e5f_...   with_token makes this of it
#     x-session: HASH, x-bearer: 0a1b2c3d4e5f        identified, in the Directory
#     x-token: read 0a1b2c3d4e5f build%20server      narrowed, in the verdict
#     Program(account="bob", read_only=True,         program_in, in the object
#             token="build server (0a1b2c3d4e5f)")

API_TOKEN = re.compile(r"orion_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")
MOST_TOKENS = 50                                         # of one account
LONGEST_PURPOSE = 60                                     # characters
TRUSTED.update({"x-bearer", "x-token"})
OWN_TABLES.append("tokens")


# -- at the edge

# Inside the server, a token takes the place of the cookie. So answers that are kept by
# cookie are kept by token, and a cookie sent with the token is ignored. Another host can't
# set a cookie whose name begins so in a browser (RFC 6265bis, 5.7).
BEARER = "__Host-bearer="


def with_token(request):
    """Return a program's request in the form in which our pages send theirs.

    It need not say which site it comes from: browsers send no token by themselves.
    """
    scheme, _, given = request.headers["authorization"].partition(" ")
    if scheme.lower() != "bearer":
        return request
    token = given if API_TOKEN.fullmatch(given) else ""
    headers = {**request.headers, "cookie": BEARER + token, "accept": "application/json",
               "origin": f"{request.scheme}://{request.headers.get('host', '')}"}
    unsaid = ["sec-fetch-site", "datastar-request"]
    if token:                                            # else it may be for a webhook
        unsaid.append("authorization")
    for name in unsaid:
        headers.pop(name, None)
    return request._replace(headers=headers)


def of_program(request):
    return request.headers.get("cookie", "").startswith(BEARER)


@addition
class TakesTokens(LoopEdge):
    def __init__(self, *args):
        super().__init__(*args)
        self.bad_tokens = Throttle()

    def request(self, reading, peer):
        request = super().request(reading, peer)
        return with_token(request) if "authorization" in request.headers else request

    def refusal(self, request, error):
        """Send programs the message as JSON: {"message": ...}."""
        if not of_program(request):
            return super().refusal(request, error)
        error = self.slowed(request, error)
        no = super().refusal(request, error)
        problems = getattr(error, "problems", {})
        told = as_json({"message": no.body.decode().strip(), **problems},
                       headers=no.headers)
        return told._replace(status=no.status)

    def slowed(self, request, error):
        """Return the error or, after many invalid tokens, one that says to wait.

        The token was looked up before, so a valid one never waits, whatever others send.
        """
        if getattr(error, "status", 0) != NO_TOKEN.status:
            return error
        try:
            count_attempt(self.bad_tokens, request)
            return error
        except Refused as wait:
            return wait


@addition
class LeavesProgramsOut(Broker):
    """A broker that does not announce a program's stream as somebody who looks on, nor
    tells programs who looks on."""

    def presence(self, streams):
        return super().presence([one for one in streams if not of_program(one.again)])

    def show_here(self, stream, piece):
        if not of_program(stream.again):
            super().show_here(stream, piece)


# -- in the Directory

NO_TOKEN = Response(401, b"This token is not valid: it was withdrawn, its maker has left, "
                         b"or it was not copied in full. Make one at /account/tokens.\n",
                    headers=(("www-authenticate", "Bearer"),))


def narrowed(said, token):
    """Return the verdict on the maker, reduced to what the token allows. No program may
    manage members or the workspace itself."""
    grants = [one for one in said["x-grants"].split(",")
              if not one.startswith(("members:", "workspace:"))
              and (token["writes"] or one.endswith(":read"))]
    said.pop("x-operates", None)
    how = "write" if token["writes"] else "read"
    return {**said, "x-grants": ",".join(grants),
            "x-can-delete": "true" if "todos:delete" in grants else "false",
            # For example: read 0a1b2c3d4e5f build%20server
            "x-token": f"{how} {token['id']} {urllib.parse.quote(token['name'])}"}


@addition
class KnowsTokens(EdgeDirectory):
    """Only the gate knows tokens. A token has no session, so elsewhere it is nobody."""
    USED_SECONDS = 60.0                                  # between writes of the last use

    def on_open(self):
        super().on_open()
        self.uses = {}                                   # times by id, to be written
        self.uses_due = 0.0

    def identified(self, request):
        """Put the token's hash where the hash of a session would be, because verdicts are
        kept by it.

        Only an API token is hashed here. Otherwise a session's token would be accepted
        without its seal.
        """
        cookie = request.headers.get("cookie", "")
        request = super().identified(request)
        if not cookie.startswith(BEARER):
            return request
        token = cookie[len(BEARER):]
        if not API_TOKEN.fullmatch(token):
            token = ""
        return request.with_headers({"x-session": token_hash(token).hex(),
                                     "x-bearer": token[6:18]})       # its id

    def token(self, request):
        """Return the token's row and its maker's label; None if the token is not valid."""
        id = request.headers["x-bearer"]
        row = self.store.one(f"{LABELLED} tokens WHERE id = ?", id)
        given = bytes.fromhex(request.headers["x-session"])
        return row if row and hmac.compare_digest(row["digest"], given) else None

    def verdict_on(self, ctx, workspace):
        if "x-bearer" not in ctx.request.headers:
            return super().verdict_on(ctx, workspace)
        token = self.token(ctx.request)
        row = token and ctx.store.one(f"{MEMBERSHIP} AND w.id = ?", workspace,
                                      token["account"], token["workspace"])
        if row is None:                                  # nobody; a route may be public
            verdict = super().verdict_on(ctx, workspace)
            no = NO_ENTRY if token else NO_TOKEN
            return no if verdict is NO_SESSION else verdict
        if row["moving"]:
            return MOVING
        self.uses[token["id"]] = time.time()
        maker = Viewer(account=token["account"], label=token["label"])
        return let_in(narrowed(self.say(maker, row), token))

    def viewer(self, request):
        """Raise Refused(403) if a program sends a command to /members of a workspace."""
        if request.headers.get("x-token") and request.method not in SAFE:
            raise Refused(403, "A program can't change who is a member. Do that in the "
                               "browser.")
        return super().viewer(request)

    def each_second(self):
        super().each_second()
        if self.uses and time.monotonic() >= self.uses_due:
            self.uses_due = time.monotonic() + self.USED_SECONDS
            with self.store.tx():
                for id, at in self.uses.items():
                    self.store.exec("UPDATE tokens SET used = ? WHERE id = ?", at, id)
            self.uses.clear()


# -- the page on which tokens are made

TOKENS_OF = """SELECT t.*, coalesce(w.title, w.name) AS title FROM tokens t
               JOIN workspaces w ON w.id = t.workspace WHERE t.account = ?
               ORDER BY t.made DESC"""
MOST_CHOICES = 500                                       # workspaces that the form offers


def tokens_page(ctx, made=""):
    """Return the page. made: a new token, which is shown only this once."""
    typed = ctx.typed
    rows = [{**row, "how": "reads and writes" if row["writes"] else "reads",
             "since": moment(row["made"]),
             "last": moment(row["used"]) if row["used"] else "never"}
            for row in ctx.store.query(TOKENS_OF, ctx.viewer.account)]
    choices = [{**row, "selected": row["name"] == typed.get("workspace")}
              for row in ctx.store.query(MINE, ctx.viewer.account, "", MOST_CHOICES)]
    body = template("tokens")(
        new={"made": made} if made else False, token=rows, none=not rows, choice=choices,
        name=typed.get("name", ""), problem=typed.get("problem", ""), stamp=ctx.stamp)
    return page("Tokens", body, ctx.viewer)


def make_token(ctx):
    """Fields: name, workspace, how (read or write)."""
    account = ctx.viewer.account
    name, how = ctx.field("name"), ctx.field("how", "read")
    row = ctx.store.one(MEMBERSHIP, ctx.field("workspace"), account)
    check_token(ctx, name, how, row)
    id = secrets.token_hex(6)
    token = f"orion_{id}_{secrets.token_urlsafe(32)}"
    ctx.store.exec("INSERT INTO tokens (id, digest, account, workspace, name, writes, "
                   "made) VALUES (?, ?, ?, ?, ?, ?, ?)", id, token_hash(token), account,
                   row["id"], name, how == "write", time.time())
    return tokens_page(ctx, token)._replace(
        headers=(("cache-control", "no-store"),),        # so Answers (70) does not keep it
        which=f"{row['id']} {name} ({id}): {how}")


def check_token(ctx, name, how, row):
    """Raise Refused if no such token can be made. row: the membership, or None."""
    refuse_masked(ctx, "a token")
    if not 1 <= len(name) <= LONGEST_PURPOSE or not name.isprintable():
        raise Refused(422, f"Say in 1 to {LONGEST_PURPOSE} characters what it is for.")
    if row is None or how not in ("read", "write"):
        raise Refused(422, "Choose one of your workspaces, and what the program may do.")
    if len(ctx.store.query(TOKENS_OF, ctx.viewer.account)) >= MOST_TOKENS:
        raise Refused(422, f"You already have {MOST_TOKENS} tokens. Withdraw one first.")


def withdraw_token(ctx):
    """Fields: token (an id)."""
    id = ctx.field("token")[:12]
    ctx.store.exec("DELETE FROM tokens WHERE id = ? AND account = ?", id,
                   ctx.viewer.account)
    access_changed(ctx, ctx.viewer.account)
    return see_other("/account/tokens", which=id)


DIRECTORY_SLICES.append(Slice("tokens", routes=(
    Route("GET", "/account/tokens", ACCOUNT, tokens_page),
    Route("POST", "/account/tokens", ACCOUNT, make_token, says="made a token:"),
    Route("POST", "/account/tokens/withdraw", ACCOUNT, withdraw_token,
          form="/account/tokens"))))
ACCOUNT_PARTS.append(lambda ctx: template("tokens.link")())


# -- the answers that a program gets

@dataclasses.dataclass(frozen=True)
class Program(Viewer):
    """A viewer for a member's program. token: the name and the id of its token."""
    token: str = ""
    read_only: bool = False
    has_page = False
    BY = " by token "

    def permit(self, grant, method="GET"):
        if self.read_only and method not in SAFE:
            raise Refused(403, "This token only reads. Make one that may also write.")
        super().permit(grant, method)

    @property
    def signature(self):
        return f"{self.account}{self.BY}{self.token}"


def program_in(viewer, request):
    """Return the viewer as a Program, if the verdict names a token."""
    said = request.headers.get("x-token")
    if not said:
        return viewer
    how, id, name = said.split(" ")
    token = f"{urllib.parse.unquote(name)} ({id})"
    return Program(**vars(viewer), token=token, read_only=how == "read")


VIEWERS.append(program_in)


@addition
class KnowsPrograms(Broadcast):
    def job_context(self, row, request):
        """Run a job that a program put in as that program, in its maker's name."""
        ctx = super().job_context(row, request)
        account, by, token = row["who"].partition(Program.BY)
        if by:
            ctx.viewer = Program(**{**vars(ctx.viewer), "account": account}, token=token)
        return ctx


LAST_WRITTEN = "SELECT which FROM journal ORDER BY id DESC LIMIT 1"


@addition
class AnswersCommands(SliceHost):
    def call(self, slice, route, args, viewer, request):
        """Tell a program the id of the row that it made; send it to no page."""
        response = super().call(slice, route, args, viewer, request)
        led = request.method not in SAFE and response.status in (204, 303)
        if type(viewer) is not Program or not led:
            return response
        which = self.store.one(LAST_WRITTEN)["which"] if self.wrote else ""
        id = which.partition(" ")[0]
        if route.method == "POST" and not args and id.isdecimal():
            return as_json({"id": int(id)})._replace(status=201)
        return Response(204)


DATA = "_data"                                           # a parameter: see DataInPages


@dataclasses.dataclass
class DataPiece(Piece):
    """Data as an event without a name (WHATWG HTML, 9.2.6). html is one line of JSON."""

    @functools.cached_property
    def frame(self):
        return f"id: {self.etag}\ndata: {self.html}\n\n".encode()


@addition
class DataInPages(EdgeWorkspace):
    """A Workspace that sends programs the data of regions instead of markup.

    The broker asks for a region of a stream again in a request that is the same for all
    viewers of that role (24), so it names no program. There, the parameter DATA says that
    data is meant. In a request from outside, which has no x-region, it means nothing.
    """

    def refuse(self, request, refused):
        if request.headers.get("x-token"):
            raise refused
        return super().refuse(request, refused)

    def live_page(self, live, ctx, args):
        regions = [region for region in live.regions if region.data]
        if type(ctx.viewer) is not Program or not regions:
            return super().live_page(live, ctx, args)
        told = {}
        for region in regions:
            told.update(region.data(ctx.for_region(region, live), *args))
        return Response(200, json_of(told).encode(), "application/json")

    def stream(self, live, ctx, args):
        regions = [region for region in live.regions if region.data]
        again = DATA in ctx.params and "x-region" in ctx.request.headers
        if regions and (again or type(ctx.viewer) is Program):
            live = live._replace(regions=regions, params={**live.params, DATA: "1"})
            ctx.params = {**ctx.params, DATA: "1"}
        return super().stream(live, ctx, args)

    def render(self, region, live, ctx, args):
        if DATA not in ctx.params:
            return super().render(region, live, ctx, args)
        self.drop_renderings()
        made = time.perf_counter()
        text = json_of(region.data(ctx, *args))
        return DataPiece(Html(text), made, round(1e6 * (time.perf_counter() - made)))


def json_of(data):
    """Return data as JSON. A row of the store becomes an object."""
    return json.dumps(data, default=dict)


def refuse_tokens(env):
    """Refuse tokens with --plain, because it has no page to make or withdraw them."""
    front = env.front

    def without(request, env):
        given = request.headers.get("authorization", "").partition(" ")[2]
        if API_TOKEN.fullmatch(given):
            raise Refused(401, "This server runs with --plain, where there are no tokens. "
                               "Start it without --plain.")
        return front(request, env)
    env.front = without


PLAIN.append(refuse_tokens)


# ==== 70. Repeats =========================================================================
# The idea: a client may send a command again, because its answer was lost or somebody
#   pressed a button twice. A command with a key, or from a form with a stamp, is done once.
#   And a page may be left open while somebody else signs in.
# It promises: a client that repeats a command within ten minutes gets the first answer
#   again. A page that was made for another account can't do anything.
# Who uses it: both kinds of hosts; our own script sends a key with each command.
# It stands behind: 69 Tokens. So it keeps the answer in the form that programs get.

@addition
class RepeatsAnswers(SliceHost):
    """A host that does a repeated command only once, and repeats the first answer."""

    def on_open(self):
        super().on_open()
        self.kept_answers = None                         # read at the first command

    def call(self, slice, route, args, viewer, request):
        command = command_id(request, viewer)
        first = self.answers().find(command) if command else None
        if first:
            return first
        response = super().call(slice, route, args, viewer, request)
        if command and self.wrote:
            self.answers().keep(viewer.signature, command, response)
        return response

    def answers(self):
        if self.kept_answers is None:
            self.kept_answers = Answers(self.store)
        return self.kept_answers


# -- which command it is

def command_id(request, viewer):
    """Return an id of the command of this viewer at this path; b"" without a repeat_key.

    The id is a hash, so it is always short. Nobody can guess from it a value in the form,
    such as a password, because the form's stamp has a random number that is not stored.
    """
    key = repeat_key(request)
    if not key:
        return b""
    text = "\0".join([viewer.signature, viewer.id, request.method, request.path, key])
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()


def repeat_key(request):
    """Return a key that is the same when the command is repeated; "" if there is none.

    It is the header Idempotency-Key (draft-ietf-httpapi-idempotency-key-header) or, for a
    plain form with a stamp, all fields of the form.
    """
    if request.method in SAFE:
        return ""
    key = request.headers.get("idempotency-key", "")
    if not key and stamp_of(request):
        key = str([(name, str(value)) for name, value in request.pairs()])
    return key


def stamp_of(request):
    """Return the stamp (Context.stamp) of a plain form; "" if it has none."""
    may_have = b"_stamp" in request.body or request.spool
    if request.method in SAFE or not may_have or request.media_type not in FORMS:
        return ""
    return text_of(request, "_stamp")


@addition
class StampsForms(Context):
    @property
    def stamp(self) -> Html:
        """A hidden field for a plain form: the account for which the page was made, and a
        random number, as in "carol 5c41...". So a form that is sent twice is done once."""
        number = secrets.token_hex(12)
        return template("layout.stamp")(stamp=f"{self.viewer.account} {number}")


# -- the answers

# Answers that are too old or from the future; or of this account, before its latest MOST.
FORGOTTEN = """WHERE at NOT BETWEEN ? AND ? OR who = ? AND id <= (SELECT id FROM answers
               WHERE who = ? ORDER BY id DESC LIMIT 1 OFFSET ?)"""


class Answers:
    """An object's answers of the last ten minutes, to commands that have an id.

    ids has the row of each command, so that a new command costs one INSERT and no query.
    """
    SECONDS = 600.0                                      # in which commands are repeated
    MOST = 2000                                          # answers kept for one account
    FORGET_EVERY = 1000                                  # commands
    LARGEST = 4096                                       # characters of an answer

    def __init__(self, store):
        self.store = store
        self.ids = {}
        self.forget("")
        self.ids.update(map(tuple, store.query("SELECT command, id FROM answers")))

    def find(self, command):
        """Return the first answer to this command; None if the command is new."""
        if command not in self.ids:
            return None
        row = self.store.one("SELECT answer FROM answers WHERE id = ? AND command = ? AND "
                             "at > ?", self.ids[command], command,
                             time.time() - self.SECONDS)
        if row is None:                                  # too old, or rolled back
            return None
        status, body, type, headers = json.loads(row["answer"])
        return Response(status, body.encode("latin-1"), type, tuple(map(tuple, headers)))

    def keep(self, who, command, response):
        """Store the answer in the command's transaction, so that both are kept, or neither.

        An answer that may contain a secret is not stored: one that sets a cookie or has a
        header cache-control. If an answer is too large, a repeat gets a plain 204.
        """
        names = [name.lower() for name, _ in response.headers]
        if "set-cookie" in names or "cache-control" in names:
            return
        body = response.body.decode("latin-1")
        text = json.dumps([response.status, body, response.type, response.headers])
        if len(text) > self.LARGEST:
            text = '[204, "", "text/plain", []]'
        self.ids[command] = self.store.insert(
            "INSERT INTO answers (who, command, at, answer) VALUES (?, ?, ?, ?)", who,
            command, time.time(), text)
        self.until_forget -= 1
        if not self.until_forget:
            self.forget(who)

    def forget(self, who):
        """Delete the answers that are too old, and those of this account beyond MOST.

        An answer from the future was written while the clock was wrong.
        """
        self.until_forget = self.FORGET_EVERY
        now = time.time()
        args = now - self.SECONDS, now + self.SECONDS, who, who, self.MOST
        for row in self.store.query(f"SELECT command, id FROM answers {FORGOTTEN}", *args):
            if self.ids.get(row["command"]) == row["id"]:    # else it has a newer answer
                del self.ids[row["command"]]
        self.store.exec(f"DELETE FROM answers {FORGOTTEN}", *args)


# -- a page that was made for another account

def refuse_old_page(request, account):
    """Raise Refused(412) if the page that sent this was made for another account.

    Somebody else may have signed in since then, in another window of the browser.
    """
    made_for = request.headers.get("page-account", stamp_of(request).partition(" ")[0])
    if made_for and account and made_for != account:
        raise Refused(412, f"This page was made for {made_for}; you are signed in as "
                           f"{account} now. Nothing was done. Reload it and try again.")


@addition
class RefusesOldPages(SliceHost):
    def permit(self, viewer, route, request):
        if not request.path.startswith("/_"):            # else a proxy asks
            refuse_old_page(request, viewer.account)
        super().permit(viewer, route, request)


# ==== 71. History =========================================================================
# The idea: each write leaves a row in a journal. This section makes a page of it: who did
#   what, newest first, by person or by act, and as CSV. The Workspace and the Directory
#   each have a journal, so there is a page of rows and one of members. Rows that a command
#   removes are kept for ten minutes, under its entry in the journal, and can be put back.
# It promises: viewers see the commands of a slice only if they may see its pages; only
#   members who may make links and tokens see the commands of those. Commands take no more
#   work: a page reads a stretch of the journal by its ids, so no index is added. Removed
#   rows are put back exactly or not at all, by the member who removed them and still may.
# Who uses it: members, from the members page; slices, by ctx.remove().
# It needs: 36 Ordinary pages, 45 Account page.
#
# These are two rows of journals, with their sentences. In the Directory's journal, the
# column "which" begins with the workspace's id:
#
#     who     what                      which
#     bob     todos.create              7 Buy milk          bob added Buy milk
#     carol   directory.remove_member   9f86d0... dave      carol removed dave

def history_region(ctx):
    found, older = entries(ctx, ENTRIES_A_PAGE)
    query = urllib.parse.urlencode({**ctx.params, "before": older})
    rows = [{"when": moment(entry["at"]), **sentence(ctx, entry)} for entry in found]
    return template("history.region")(entry=rows, none=not rows,
                                      older={"query": query} if older else None)


def history_page(ctx, region):
    within = ctx.host.within                             # "" or "/members"
    here = f"/w/{ctx.workspace}{within}/history"
    links = [{"path": f"/w/{ctx.workspace}{path}/history", "label": label,
              "current": path == within} for path, label in HISTORIES.items()]
    query = urllib.parse.urlencode(ctx.params)
    return template("history")(
        workspace=ctx.title, here=here, file=f"{here}.csv?{query}", region=region,
        link=links if ctx.viewer.can("members:manage") else [], undo=undo_forms(ctx),
        live=template("slice.live")(), **choices(ctx))


ENTRIES_A_PAGE = 50
STRETCH = 10_000                                         # rows of the journal
ENTRIES = """SELECT id, at, who, what, which FROM journal WHERE id BETWEEN ? AND ? AND {}
           ORDER BY id DESC LIMIT ?"""
ENDS = """SELECT (SELECT min(id) FROM journal) AS first,
          (SELECT max(id) FROM journal) AS last"""
PAST = {"who": r"[^\0-\x1f]{1,200}", "what": r"[^\0-\x1f]{1,200}", "before": "[0-9]{1,18}"}


def entries(ctx, most):
    """Return entries of the journal, and the id before which there are older ones, or 0.

    Return those in one stretch that the viewer may see and the parameters ask for.
    """
    store, params = ctx.host.store, HISTORY.heeded(ctx.params)
    first, last = [id or 0 for id in store.one(ENDS)]
    last = min(last, int(params.get("before", last + 1)) - 1)
    begins = last - STRETCH + 1
    where, args = ctx.host.visible_to(ctx.viewer)
    for name in {"who", "what"} & params.keys():
        where += f" AND {name} = ?"
        args.append(params[name])
    found = store.query(ENTRIES.format(where), begins, last, *args, most + 1)
    if len(found) > most:
        return found[:most], found[most - 1]["id"]
    return found, begins if first < begins else 0


def sentence(ctx, entry):
    """Return an entry of the journal in words."""
    says = words_for_act(ctx.host.router, entry["what"])
    return {"who": entry["who"] or "somebody", "says": says,
            "name": name_in(entry["which"], ctx.viewer.id)}


def words_for_act(router, what):
    """Return words for an act in the journal, such as todos.delete or member add."""
    says = [route.says for route in routes_of(router).get(what, ()) if route.says]
    slice, _, name = what.partition(".")
    default = f"wrote to {slice} ({name}):" if name else what
    return says[0] if says else default


@functools.lru_cache(maxsize=4)
def routes_of(router):
    """Return lists of routes by the name that the journal gives their commands."""
    found = {}
    for _, slice, route in router.rows:
        found.setdefault(f"{slice}.{name_of(route.run)}", []).append(route)
    return found


def name_in(which, workspace):
    """Return the name of what was written: of "7 Buy milk", the text after the id."""
    id, _, name = which.partition(" ")
    if id == workspace:
        return name
    return name if name and id.isdecimal() else which


CHOICES = "SELECT DISTINCT who, what FROM journal WHERE id > ? AND {}"


def choices(ctx):
    """Return options to filter by person and by act: those found in the last stretch."""
    where, args = ctx.host.visible_to(ctx.viewer)
    last = ctx.host.store.one(ENDS)["last"] or 0
    rows = ctx.host.store.query(CHOICES.format(where), last - STRETCH, *args)
    acts = {row["what"]: words_for_act(ctx.host.router, row["what"]) for row in rows}
    return {"person": options({row["who"]: row["who"] for row in rows}, ctx.params, "who"),
            "act": options(acts, ctx.params, "what")}


def options(labels, params, name):
    return [{"value": value, "label": label, "selected": value == params.get(name)}
            for value, label in sorted(labels.items()) if value]


CSV_HEAD = ("time", "who", "did", "what")
FORMULAS = set("=+-@\uff1d\uff0b\uff0d\uff20\t\r\n")     # a formula begins with one


def history_csv(ctx):
    """Return one stretch of the journal as a file (RFC 4180)."""
    found, _ = entries(ctx, STRETCH)
    rows = [(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(entry["at"])),
             *sentence(ctx, entry).values()) for entry in found]
    lines = [",".join(map(cell, row)) + "\r\n" for row in [CSV_HEAD, *rows]]
    return download(f"{ctx.workspace}-history.csv", "".join(lines), "text/csv")


def cell(text):
    """Return the text in quotes, such that no spreadsheet takes it for a formula."""
    apostrophe = "'" if text[:1] in FORMULAS else ""
    return f'"{apostrophe}' + text.replace('"', '""') + '"'


# -- putting back removed rows
#
# Its table:
#
#     _removed   note (the row of the journal), until, size (in characters), rows (JSON)
#
# rows: the table, its columns, and the values of each row. For example:
#
#     ["todos", ["id", "title", "done"], [[7, "Buy milk", 0]]]

REMOVED = ("CREATE TABLE _removed (id INTEGER PRIMARY KEY, note INTEGER NOT NULL, until "
           "REAL NOT NULL, size INTEGER NOT NULL, rows TEXT NOT NULL)",)
UNDO_SECONDS = 600.0


@addition
class KeepsWhatItRemoves(Context):
    def remove(self, table, where, *args):
        signals = {}
        # There is no undo with --plain, nor of rows that a job or nobody removes.
        if self.viewer.may(MEMBER) and isinstance(self.host, Broadcast):
            signals = self.host.keep_removed(self, table, where, args)
        super().remove(table, where, *args)
        return signals


LARGEST_UNDO = 2 ** 20                                   # characters kept of one command
ALL_UNDO = 4 * 2 ** 20                                   # and in one file
ROW_SIZE = 4096                                          # added for the row itself
# One query returns two facts: the id of the journal's row that call() will insert; and
# whether nine tenths of the quota are used (user_version, in pages: section 51). If so, a
# deletion has to make room, so nothing is kept.
NEXT_ENTRY = """SELECT (SELECT coalesce(max(id), 0) + 1 FROM journal), user_version > 0 AND
                page_count - freelist_count > 0.9 * user_version
                FROM pragma_page_count, pragma_freelist_count, pragma_user_version"""
GENERATED = "SELECT name FROM pragma_table_xinfo(?) WHERE hidden > 1"      # columns
FORGET_REMOVED = """DELETE FROM _removed WHERE until NOT BETWEEN ? AND ? OR id IN (SELECT id
                    FROM (SELECT id, sum(size) OVER (ORDER BY id DESC) AS size
                    FROM _removed) WHERE size > ?)"""


@addition
class KeepsRemoved(Broadcast):
    def on_open(self):
        super().on_open()
        if self.store.one("SELECT 1 FROM _removed WHERE until < ?", time.time()):
            self.forget_removed()

    def forget_removed(self):
        now = time.time()
        self.store.exec(FORGET_REMOVED, now, now + UNDO_SECONDS, ALL_UNDO)

    def keep_removed(self, ctx, table, where, args):
        """Keep the rows that are about to be removed. Return signals that tell the page."""
        found = ctx.store.query(f"SELECT * FROM {table} WHERE {where}", *args)
        if not found:
            return undo_signals(ctx, "There was nothing to delete.")
        generated = [row["name"] for row in self.store.query(GENERATED, table)]
        columns = [name for name in found[0].keys() if name not in generated]
        rows = [[row[name] for name in columns] for row in found]
        text = json.dumps([table, columns, rows],
                          default=lambda data: {"hex": data.hex()})
        said = "Deleted" if len(rows) == 1 else f"{len(rows)} deleted"
        if len(text) > LARGEST_UNDO:
            return undo_signals(ctx, f"{said} for good: that is too much to keep.")
        entry, is_tight = self.store.one(NEXT_ENTRY)
        if is_tight:
            self.store.exec("DELETE FROM _removed")
            return undo_signals(ctx, f"{said} for good: there is too little room here.")
        self.store.exec("INSERT INTO _removed (note, until, size, rows) VALUES (?, ?, ?, "
                        "?)", entry, time.time() + UNDO_SECONDS, len(text) + ROW_SIZE, text)
        self.forget_removed()
        return undo_signals(ctx, f"{said}.", self.undo_path(ctx, ctx.store.slice, entry))

    def undo_path(self, ctx, slice, entry):
        return f"/w/{ctx.workspace}{self.within}/undo/{slice}/{entry}"


def undo_signals(ctx, text, undo=""):
    """Return signals for a page: a message, and the path to undo what it tells, or "". A
    client without a page gets none."""
    has_page = ctx.request.datastar or ctx.request.plain_form
    return {"note": text, "_undo": undo} if has_page else {}


MINE_TO_UNDO = """SELECT * FROM journal WHERE {} AND who = ? AND id IN (SELECT note FROM
                  _removed WHERE until > ?) ORDER BY id DESC LIMIT 10"""


def undo_forms(ctx):
    """Return forms with which the viewer can put back rows without scripts or a toast."""
    where, args = ctx.host.visible_to(ctx.viewer)
    mine = ctx.host.store.query(MINE_TO_UNDO.format(where), *args, ctx.viewer.signature,
                                time.time())
    return [{"path": ctx.host.undo_path(ctx, entry["what"].partition(".")[0], entry["id"]),
             **sentence(ctx, entry)} for entry in mine]


def undo(ctx, id):
    """Put back the rows removed by the command whose entry in the journal has this id."""
    ctx.host.bus.publish("")                             # any region may show them
    return put_back(ctx, id, *removed_rows(ctx, id))


PLACE_TAKEN = ("It can't be put back: something else has taken its place, or what it "
               "belonged to is gone. Fix that, and try again within the ten minutes.")


def put_back(ctx, id, which, removed):
    try:
        for table, columns, rows in removed:
            names = ", ".join([f'"{column}"' for column in columns])
            marks = ", ".join("?" * len(columns))
            for row in rows:
                ctx.store.exec(f"INSERT INTO {table} ({names}) VALUES ({marks})", *row)
    except sqlite3.IntegrityError:
        raise Refused(409, PLACE_TAKEN, signal="toast") from None
    ctx.host.store.exec("DELETE FROM _removed WHERE note = ?", id)
    return done(ctx, which, note="It is back.")


TO_PUT_BACK = """SELECT j.what, j.which, r.rows FROM journal j JOIN _removed r ON
                 r.note = j.id WHERE j.id = ? AND j.who = ? AND r.until > ?
                 ORDER BY r.id DESC"""
UNDO_OVER = ("This can't be undone: it was undone already, ten minutes have passed, or "
             "somebody else did it. Look at History.")


def removed_rows(ctx, id):
    """Return what the command wrote to, and what it removed: (table, columns, rows).

    Raise Refused(409) if the viewer can't put it back, Refused(403) if the viewer has lost
    the right to such a command.
    """
    kept = ctx.host.store.query(TO_PUT_BACK, id, ctx.viewer.signature, time.time())
    what = kept[0]["what"] if kept else ""
    routes = routes_of(ctx.host.router).get(what, ())
    if not routes or what.partition(".")[0] != ctx.store.slice:
        raise Refused(409, UNDO_OVER, signal="toast")
    for route in routes:
        ctx.viewer.permit(route.grant, route.method)
    removed = [json.loads(row["rows"], object_hook=from_hex) for row in kept]
    return kept[0]["which"], removed


def from_hex(data):
    """Return bytes. The JSON has them as {"hex": ...}."""
    return bytes.fromhex(data["hex"])


def remove_member(ctx, account):
    """Remove a member, as expel does. If it is another member, keep the row for an undo."""
    account = account_name(account)
    if account == ctx.viewer.account:
        return expel(ctx, account)._replace(which=f"{ctx.viewer.id} themselves")
    row = ctx.viewer.id, account
    where = "workspace = ? AND account = ?"
    signals = ctx.host.keep_removed(ctx, "memberships", where, row)
    expel(ctx, account)
    if signals:
        signals["note"] = f"{account} is removed."
    return done(ctx, " ".join(row), **signals)


def let_in_again(ctx, id):
    """Give a member back the role. The member's links and tokens stay void."""
    which, removed = removed_rows(ctx, id)
    _, columns, rows = removed[0]                        # one row of memberships
    member = dict(zip(columns, rows[0]))
    if member["workspace"] != ctx.viewer.id:
        raise Refused(409, UNDO_OVER, signal="toast")
    owns = member["role"] == "owner" or member["offered"]
    if owns and ctx.viewer.role != "owner":
        raise Refused(403, "Only an owner can let an owner in again. Ask one of them.")
    ctx.publish("members")
    access_changed(ctx, member["account"])
    return put_back(ctx, id, which, removed)


# -- the slices

# The topic "" means any topic, because each command leaves a row in the journal.
HISTORY = Live("/history", MEMBER, "History", (Region("", history_region),), history_page,
               params=PAST)
MEMBERS_HISTORY = HISTORY._replace(path="/members/history", grant="members:manage",
                                   regions=(Region("members", history_region),))
HISTORIES = {"": "Pages", "/members": "Members"}
history = Slice("orion.history", live=(HISTORY,),
                routes=(Route("GET", "/history.csv", MEMBER, history_csv),))
DIRECTORY_SLICES.append(Slice("history", live=(MEMBERS_HISTORY,), routes=(
    Route("GET", "/members/history.csv", "members:manage", history_csv),
    Route("DELETE", "/members/<account>", MEMBER, remove_member, says="removed"),
    Route("POST", "/members/undo/directory/<int:id>", "members:manage", let_in_again,
          form="/members", says="let in again"))))


def with_undo(slice):
    """Return the slice with a route to put back its own rows."""
    route = Route("POST", f"/undo/{slice.name}/<int:id>", MEMBER, undo, form="/history",
                  says="put back")
    return slice._replace(routes=(*slice.routes, route))


@addition
class RoutesHistory(QuickRouter):
    def __init__(self, slices):
        if welcome in slices:                            # the Workspaces' router
            slices = [*map(with_undo, slices), history]
        super().__init__(slices)
        self.schema.append(("orion.removed", REMOVED))


@addition
class TellsHistory(EdgeWorkspace):
    within = ""                                          # its pages are at /w/acme + this

    def visible_to(self, viewer):
        """Return an SQL condition, with its args, for the entries that a viewer may see.

        A viewer may see the entries of slices whose pages they may see. The entry of an
        app's command names no slice. In a single root, such an entry is the Directory's.
        """
        may = {PUBLIC, ACCOUNT, MEMBER, *viewer.grants}
        slices = [slice.name for slice in self.router.slices
                  if may.issuperset([one.grant for one in slice.live or slice.routes])]
        if not self.namespace.settings.single:
            slices.append("")
        marks = ", ".join("?" * len(slices))
        return f"substr(what, 1, instr(what, '.') - 1) IN ({marks})", slices


MEMBERS_PARTS.insert(0, lambda ctx: template("history.way")())


@addition
class TellsMembersHistory(EdgeDirectory):
    within = "/members"

    def visible_to(self, viewer):
        """Return the condition: the column "which" begins with the workspace's id."""
        return "substr(which, 1, 64) = ?", [viewer.id]


# #### For its author ######################################################################

# ==== 72. Console =========================================================================
# The idea: the console shows the running server from the inside: both planes, each request
#   on its way, each store call as it happens. It is asked like an object and streamed like
#   a region, but it has no store: it reads what it shows from the running objects. It draws
#   the way of a request, and lists the functions on that way, from this file.
# It promises: calls are noted only while somebody watches, and only the latest are kept. If
#   they come faster than frames, some are dropped; the server never waits. Looking changes
#   nothing: an object that was asleep goes back to sleep.
# Who uses it: operators; in the demo, everybody.
# It needs: 40 Counts, 42 Jobs, 44 Accounts, 46 Masquerade, 70 Repeats.

# -- notes: what happened

class Call(NamedTuple):
    """A store call. object: the id of the object whose store it was."""
    number: int
    time: str                                            # of the day
    object: str
    sql: str
    args: str
    rows: Any                                            # found or changed; "": neither
    took: str


class Leg(NamedTuple):
    """A request to one object."""
    kind: str                                            # gate, directory or workspace
    id: str
    status: int
    took: str
    calls: int                                           # to its store
    said: Dict[str, str]                                 # the answer's headers


class Trip:
    """A request from outside: its legs, its store calls, and how it ended.

    A POST to /w/acme/todos has two legs: "gate", with a few calls to the Directory's store
    (none if the verdict was kept), and "workspace", with calls to acme's store.
    """
    numbers = itertools.count(1)

    def __init__(self, request):
        self.number = next(self.numbers)
        self.method = request.method
        self.path = request.path[:80]
        self.status = 0
        self.legs = []
        self.calls = []
        self.probed = None                               # what a probe found


class ThreadState(threading.local):
    """The Trip on which a thread works. silent: nothing that the thread does is noted."""
    trip = None
    silent = False


class Trace:
    """The notes of one server. with_args: note values, too, which users may have typed."""
    KEPT_CALLS = 200
    KEPT_TRIPS = 12

    def __init__(self, with_args=False):
        self.with_args = with_args
        self.watched = 0                                 # the number of watchers
        self.thread = ThreadState()
        self.lock = threading.Lock()                     # guards all that follows
        self.calls = collections.deque(maxlen=self.KEPT_CALLS)
        self.trips = collections.deque(maxlen=self.KEPT_TRIPS)
        self.noted = 0                                   # the number of the last call
        self.shown = 0                                   # and of the last one shown
        self.dropped = 0                                 # calls that were never shown
        self.news = lambda: None                         # called after each note

    def watch(self, more):
        """Add a watcher (1) or remove one (-1). With none, a call costs one comparison."""
        with self.lock:
            self.watched += more

    @contextlib.contextmanager
    def silence(self, silent=True):
        """Note nothing that this thread does inside, because it is the console's work."""
        before = self.thread.silent
        self.thread.silent = silent
        try:
            yield
        finally:
            self.thread.silent = before

    def note(self, object, sql, args, rows, seconds):
        shown = ", ".join([argument(arg) for arg in args]) if self.with_args else ""
        with self.lock:
            self.noted += 1
            call = Call(self.noted, clock(time.time(), "milliseconds"), object,
                        " ".join(sql.split()), shown, rows if rows >= 0 else "",
                        in_ms(seconds))
            self.calls.append(call)
        if self.thread.trip:
            self.thread.trip.calls.append(call)
        self.news()

    def show(self):
        """Return the kept calls. Count those that were dropped before they were shown."""
        with self.lock:
            self.dropped += max(0, self.noted - self.shown - self.KEPT_CALLS)
            self.shown = self.noted
            return [*self.calls]

    def follow(self, trip, function, *args):
        """Return outcome(function, *args), and note what happens in the trip.

        A trip that reached no object is not kept, because there is nothing to draw.
        """
        self.thread.trip = trip
        answer = outcome(function, *args)
        self.thread.trip = None
        trip.status = getattr(answer, "status", 500)
        if trip.legs:
            self.trips.append(trip)
            self.news()
        return answer

    def leg(self, kind, id, fetch):
        """Return fetch(), and note it as a leg of this thread's trip."""
        trip = self.thread.trip
        if trip is None or self.thread.silent:
            return fetch()
        started = time.perf_counter()
        before = len(trip.calls)
        answer = outcome(fetch)
        took = in_ms(time.perf_counter() - started)
        status = getattr(answer, "status", 500)
        said = dict(getattr(answer, "headers", ()))
        trip.legs.append(Leg(kind, id, status, took, len(trip.calls) - before, said))
        if isinstance(answer, BaseException):
            raise answer
        return answer


def argument(value):
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return repr(value)[:80]


def in_ms(seconds):
    return f"{1e3 * seconds:.2f} ms"


def clock(at, digits="seconds"):
    """Return the time of day, cut off after the seconds or after the milliseconds."""
    return datetime.datetime.fromtimestamp(at).time().isoformat(digits)


class TracedStore(OwnedObjectStore):
    """A store whose calls are noted while somebody watches."""

    def __init__(self, path, create, owner):
        self.owner = owner
        super().__init__(path, create)

    def run(self, sql, args):
        trace = self.owner.namespace.trace
        if not trace.watched or trace.thread.silent:
            return super().run(sql, args)
        started = time.perf_counter()
        rows = super().run(sql, args)
        found = len(rows) if self.cursor.description else self.cursor.rowcount
        asked = re.sub(r" /\* [\w-]+ may \w+ \*/$", "", sql)     # what Tables (27) adds
        trace.note(self.owner.id, asked, args, found, time.perf_counter() - started)
        return rows


class TracedStub(GuardedStub):
    def enter(self, ask, request, seconds=-1):
        trace = self.namespace.trace
        if not trace.watched:
            return super().enter(ask, request, seconds)
        kind = "gate" if request.path.startswith("/_gate") else self.namespace.kind
        enter = functools.partial(super().enter, ask, request, seconds)
        return trace.leg(kind, self.id, enter)


@addition
class IsTraced(GuardedNamespace):
    trace = Trace()                                      # nobody watches this one

    def get(self, id):
        return TracedStub(id, self)


@addition
class TracesItsStore(GuardedObject):
    @property
    def store_class(self):
        return functools.partial(TracedStore, owner=self)


@addition
class HasConsole(LoopEdge):
    """While somebody watches, answer each request separately, and keep no answers.

    Requests still wait in the lane of their object, so a busy object delays no other.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.trace = Trace(with_args=bool(self.settings.demo))
        self.env.directory.namespace.trace = self.trace
        self.env.workspaces.trace = self.trace
        self.console = Console(self)
        # Do not announce who looks at the console or at a page of the Directory. (A single
        # root does announce it, because its Directory has the id of the Workspace.)
        self.broker.unannounced = Console.id, "directory"
        self.add_doors({path: self.console.answer for _, path in self.console.actions})

    def tick(self, now):
        super().tick(now)
        self.console.each_second()

    def keeps_answers(self):
        return super().keeps_answers() and not self.trace.watched

    def work_off(self, several):
        if not self.trace.watched:
            return super().work_off(several)
        for asked in several:
            if asked.let_in or not self.changes_lane(asked):
                trip = Trip(self.as_logged(asked.request))
                self.finish(asked, self.trace.follow(trip, self.go, asked.request))
        return []                                        # all are done

    def go(self, request):
        """Call env.front. If access changes on the way, ask the gate again."""
        while True:
            forward = functools.partial(self.forward, time.monotonic())
            env = dataclasses.replace(self.env, forward=forward)
            with contextlib.suppress(Outdated):
                return env.front(request, env)

    def forward(self, decided_at, stub, request):
        def ask(one):
            self.check_access([request], decided_at)
            return one.answer(request)
        return stub.enter(ask, request)

    def changes_lane(self, asked):
        """When the gate first lets a request in, move it to the lane of its object. Return
        whether it was moved."""
        with self.trace.silence():
            decided = outcome(self.decide, asked.request, self.deciding)
        return isinstance(decided, Noted) and self.lines_up_again(asked, decided)


# -- the way of one POST, numbered as in the drawing

WAY = {"Ask the gate": (worker, ask_the_gate),
       "The verdict": (gate, Directory.verdict_on),
       "Forward, with the verdict": (destination, SliceHost.command, DurableObject.command,
                                     SliceHost.handle, OwnsTables.call),
       "Write, commit, publish": (create, Bus.publish, Store.tx, Bus.tell),
       "Frames to every stream": (Broker.published, Broker.refresh, SliceHost.rendering,
                                  SliceHost.render, Broker.deliver, Stream.show)}


@functools.cache
def steps():
    """Return a row for each step of the way, with the source of its functions."""
    return [{"number": number, "title": title, "function": [*map(listing, functions)]}
            for number, (title, functions) in enumerate(WAY.items(), 1)]


def listing(function):
    lines, first = inspect.getsourcelines(function)
    return {"name": function.__qualname__, "source": textwrap.dedent("".join(lines)),
            "where": f"lines {first} to {first + len(lines) - 1}"}


@verb("read", "print the functions that answer one POST, in order, for a pager", "method")
def read_way(settings, given):
    if given.method:
        return read_layers(given.method)
    for step in steps():
        print(f"{step['number']}. {step['title']}\n")
        print_listings(step["function"])


def read_layers(name):
    """Print all layers of a method, in the order in which each calls super()."""
    functions = layers_of(name)
    if not functions:
        raise Unusable(f"there is no method {name}; name one like LoopEdge.refusal")
    print_listings(map(listing, functions))


def layers_of(name):
    kind, _, method = name.partition(".")
    base = globals().get(kind)
    if not isinstance(base, type):
        return []
    found = [vars(one).get(method) for one in whole(base).__mro__]
    return [*filter(inspect.isfunction, map(function_behind, found))]


def function_behind(attribute):
    """Return the function behind a property or a method."""
    for name in ("fget", "func", "__func__"):
        attribute = getattr(attribute, name, attribute)
    return inspect.unwrap(attribute)


def print_listings(listings):
    for one in listings:
        print(f"# {one['name']}, {one['where']}\n{one['source']}")


# -- the console itself

class Console:
    """The console's page and its region: the notes, facts of the objects, and channels."""
    id = "console"                                       # as if it were an object
    PAUSE = 0.25                                         # seconds from a note to its frame

    def __init__(self, edge):
        self.env = edge.env
        self.broker = edge.broker
        self.trace = edge.trace
        self.due = False                                 # True: there is a note to show
        self.changed = False                             # something was published
        self.state = 0                                   # see each_second
        self.all_facts = functools.lru_cache(maxsize=8)(self.ask_all)
        self.actions = {("GET", "/console"): self.page,
                        ("GET", "/console/live"): self.stream,
                        ("POST", "/console/probe"): self.probe,
                        ("POST", "/console/retry"): self.retry}
        self.trace.news = self.news
        self.env.workspaces.listeners.append(self.published)

    def answer(self, request, env):
        """Answer as a door, for operators or, in the demo, for everybody. Each action gets
        the request, and as me what own_onlooker returned."""
        action = self.actions.get((request.method, request.path))
        if action is None:
            raise Refused(405, "Read the console with GET, and use the forms on its page.")
        with self.trace.silence():
            me = env.directory.ask_as(request, "/_onlooker")
            refuse_old_page(request, me["account"])
            if not me["operator"] and not env.settings.demo:
                Viewer(account=me["account"]).permit(ACCOUNT)    # raises a 401 for nobody
                raise Refused(403, "Only an operator of this server may see the console. "
                                   "To make one, run: account add NAME --operator")
            return action(request, me)

    # -- when a frame is made: each second, and a PAUSE after the first new note

    def published(self, id, topic):
        self.changed = True

    def each_second(self):
        """Ask for a frame. Facts of objects are kept by state, so objects are asked once a
        second while something is published, and not otherwise."""
        if self.changed:
            self.changed = False
            self.state += 1
        self.broker.published(self.id, self.id)

    def news(self):
        """Ask for a frame after a note."""
        if not self.due:
            self.due = True
            later = threading.Timer(self.PAUSE, self.tell)
            later.daemon = True
            later.start()

    def tell(self):
        self.due = False
        self.broker.published(self.id, self.id)

    def fetch(self, request):
        """Return the region, as an object would: to the broker, the console is a stub."""
        with self.trace.silence():
            shown = self.shown(request.params, "paused" not in request.params)
            html = template("console.live")(**shown)
            watch = Subscription(self, self.id, request, Piece(html, 0.0, 0))
            return Response(200, type=EVENTS, watch=(watch,))

    def stream(self, request, me):
        again = Request("GET", request.path, request.query)
        return self.fetch(again)._replace(which=me["account"])

    # -- the page

    def page(self, request, me, probe=None):
        roles = [row["role"] for row in me["mine"]]
        body = template("console")(
            **self.shown(request.params, True), **me, step=steps(), grant=grant_rows(),
            masquerade=not self.env.settings.demo, who=me["account"] or "nobody yet",
            probe=probe, name=probe["name"] if probe else "",
            role=[{"role": role, "current": role in roles} for role in ROLES])
        nav = template("layout.console")(state=True)
        return page("Console", body, console_viewer(me), nav)

    def probe(self, request, me):
        """Ask for a workspace's page with this person's cookie; show how far that came."""
        name = slug(text_of(request, "workspace"))[:63]
        id = self.id_of(name)
        served = self.env.workspaces.served
        before = served[id]
        trip, answer = self.trip_to(name, request)
        trip.probed = {"before": before, "after": served[id]}
        passed = trip.legs[0].status == 200
        names = {self.env.directory.id: "Directory", id: name}
        result = {**me, **trip.probed, **verdict_of(trip), "name": name,
                  "said": str(answer), "passed": passed, "stopped": not passed,
                  "call": self.call_rows(trip.calls, names)}
        if not request.datastar:
            return self.page(request, me, result)
        html = template("console.probe")(**result)
        patch = event("elements", html, "data: selector #probe", "data: mode inner")
        return Response(200, patch, EVENTS)

    def trip_to(self, name, request):
        """Send a request of our own with this person's cookie, but wait for no object."""
        cookie = {"cookie": request.headers.get("cookie", "")}
        asked = Request("GET", f"/w/{name}{self.env.start}", "", cookie,
                        scheme=request.scheme)
        briefly = dataclasses.replace(self.env, forward=fetch_briefly)
        trip = Trip(asked)
        self.trace.watch(1)
        try:
            with self.trace.silence(False):
                return trip, self.trace.follow(trip, worker, asked, briefly)
        finally:
            self.trace.watch(-1)

    def retry(self, request, me):
        """Start the jobs again that a workspace gave up."""
        console_viewer(me).permit(ACCOUNT, request.method)
        id = self.id_of(slug(text_of(request, "workspace")))
        if id:
            fetch_briefly(self.env.workspaces.get(id), Request("POST", "/_retry"))
        self.published(id, "")
        return Response(204) if request.datastar else see_other("/console")

    def id_of(self, name):
        """Return the id of the workspace with this name, which slug() made; None if there
        is none."""
        known = self.env.directory.ask("/_workspace", f"name={name}")
        return known and known["id"]

    # -- the region

    def ask_all(self, ids, state):
        """Return the facts of each object, and how long it took to ask for them."""
        started = time.perf_counter()
        facts = {id: self.ask_one(id) for id in ids}
        return facts, in_ms(time.perf_counter() - started)

    def ask_one(self, id):
        workspaces = self.env.workspaces
        slept = id not in workspaces.objects
        facts = facts_of(workspaces.get(id))
        if facts["count"] == "busy":
            self.published(id, "")                       # so it is asked again
        woken = workspaces.objects.get(id)
        if slept and woken:
            woken.sleep(time.monotonic())
        return facts

    def shown(self, params, with_feed):
        """Return values for the drawing and the region, by their names in the template."""
        after = params.get("after", "")
        query = urllib.parse.urlencode({"after": after})
        found = self.env.directory.ask("/_names", query)
        page = dict(itertools.islice(found["page"].items(), NAMES_A_PAGE))
        names = {self.env.directory.id: "Directory", **page}
        facts, took = self.all_facts(tuple(page), self.state)
        rows = [self.object_row(self.env.workspaces.get(id), name, facts[id])
                for id, name in page.items()]
        first = self.object_row(self.env.directory, "Directory", {})
        return {"picture": True, "region": True,
                "object": [first, *rows],
                "gate": first,
                "option": rows,
                "dead": [row for row in rows if row["failed"]],
                "all": found["all"], "awake": len(self.env.workspaces.objects),
                "asked": len(page), "took": took,
                "more": len(found["page"]) > NAMES_A_PAGE,
                "last": max(page.values(), default=""), "after": after,
                "feed": with_feed and self.feed(params, names),
                **self.drawing(rows, found["all"]),
                **self.streams()}

    def object_row(self, stub, name, facts):
        id, namespace = stub
        one = namespace.objects.get(id)
        awake = bool(one and one.store)
        return {"count": "", "jobs": "", "failed": [], **facts,
                "id": id,
                "name": name,
                "size": in_kb_or_mb(sum(map(bytes_in, with_wal(namespace.path(id))))),
                "state": "awake" if awake else "asleep",
                "since": awake and {"opened": clock(one.opened_at)},
                "streams": len(self.broker.watchers(id)),
                "served": namespace.served[id]}

    # -- the drawing, one for wide windows and one for narrow ones. The position of a
    # workspace is a percentage of the plane's width; one box for all others is at 90

    POSITIONS = (10, 30, 50, 70)

    def drawing(self, rows, all):
        """Return the positions in both planes, and the ways of the latest requests."""
        nodes = [{**row, "at": at, "short": shortened(row["name"])}
                 for at, row in zip(self.POSITIONS, rows)]
        positions = {node["id"]: node["at"] for node in nodes}
        trips = [self.trip_row(trip, positions) for trip in [*self.trace.trips]]
        # The last three trips, and of those before them the last one that was stopped.
        stopped = [trip for trip in trips[:-3] if trip["kind"] == "stopped"]
        paths = stopped[-1:] + trips[-3:]
        return {"node": nodes, "others": all - len(nodes), "way": paths,
                "tall_way": paths, "trip": trips[::-1], "none": not trips}

    def trip_row(self, trip, positions):
        return {**vars(trip), **verdict_of(trip), "kind": kind_of(trip),
                "at": positions.get(trip.legs[-1].id, 90),
                "leg": [{**leg._asdict(), "cached": not leg.calls,
                         "code": code_of(leg, trip)} for leg in trip.legs]}

    # -- streams and store calls

    def streams(self):
        channels = [channel for of_object in [*self.broker.channels.values()]
                    for channel in [*of_object.values()]]
        rows = [stream_row(channel) for channel in channels[:50]]
        open = sum(self.broker.open_streams.values())
        return {"stream": rows, "open": open, **self.broker.frames}

    def feed(self, params, names):
        object = params.get("object", "")
        calls = [call for call in self.trace.show() if object in ("", call.object)]
        return {"noted": self.trace.noted, "dropped": self.trace.dropped,
                "line": self.call_rows(calls[::-1], names),
                "object": object,
                "whose": object and {"label": names.get(object, object[:8])},
                "paused": "paused" in params,
                "going": "paused" not in params}

    def call_rows(self, calls, names):
        return [{**call._asdict(), "object": names.get(call.object, call.object[:8])}
                for call in calls]


def stream_row(channel):
    asked = channel.subscription
    headers = asked.again.headers
    return {"object": headers.get("x-workspace", asked.stub.id), "path": asked.again.path,
            "role": headers.get("x-role"), "open": len(channel.streams)}


def kind_of(trip):
    """Return how far a trip came; that much of the way is drawn."""
    last = trip.legs[-1]
    if last.kind == "gate" and last.status != 200:
        return "stopped"
    if last.kind != "workspace":
        return "asked"
    return "wrote" if trip.method not in SAFE and trip.status < 400 else "read"


def verdict_of(trip):
    said = trip.legs[0].said
    return {"verdict": trip.legs[0].status, "role": said.get("x-role"),
            "grants": said.get("x-grants")}


def code_of(leg, trip):
    """Return the name of the function that the leg opens."""
    if leg.kind == "gate":
        return "gate"
    return "SliceHost.handle" if trip.method in SAFE else "SliceHost.command"


def shortened(name):
    return name if len(name) < 9 else f"{name[:7]}…"


def in_kb_or_mb(size):
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def grant_rows():
    """Return a table that shows which role has which grant."""
    return [{"grant": grant, "cell": [{"yes": grant in some} for some in ROLES.values()]}
            for grant in ROLES["owner"]]


def console_viewer(me):
    viewer = Viewer(account=me["account"], label=me["label"])
    return masked(viewer, me["mask"], me["read_only"])


@addition
class AnswersTheConsole(EdgeDirectory):
    def own_names(self, request):
        """Return names by id of some workspaces that can be asked; and the count of all."""
        there = "FROM workspaces WHERE name > ? AND NOT moving"
        some = self.store.query(f"SELECT id, name {there} ORDER BY name LIMIT ?",
                                request.params.get("after", ""), NAMES_A_PAGE + 1)
        count = self.store.one(f"SELECT count(*) {there}", "")[0]
        return {"page": dict(some), "all": count}

    def own_onlooker(self, request):
        """Return who asks, their workspaces, and whether they are an operator."""
        viewer = self.viewer(request)
        return {"account": viewer.account, "label": viewer.label,
                "operator": self.operates(viewer),
                "mask": getattr(viewer, "operator", ""),
                "read_only": getattr(viewer, "read_only", False),
                "mine": [*map(dict, self.store.query(MINE, viewer.account, "", 100))],
                "persona": self.personas(viewer.account)}

    def home_holes(self, viewer):
        holes = super().home_holes(viewer)
        return {**holes, "console": holes["demo"] or self.operates(viewer)}

    def say(self, viewer, row):
        said = super().say(viewer, row)
        if not self.namespace.settings.demo and self.operates(viewer):
            said["x-operates"] = "true"
        return said

    def operates(self, viewer):
        """Is the viewer an operator, perhaps one who looks on in somebody's name?"""
        return self.is_operator(getattr(viewer, "operator", viewer.account))


# -- the foot of each page

TRUSTED.add("x-operates")


@addition
class ShowsXray(Broadcast):
    asked = 0.0                                          # when this page was asked for

    def live_page(self, live, ctx, args):
        self.asked = time.perf_counter()
        return super().live_page(live, ctx, args)

    def footer(self, renderings, ctx):
        """Return the x-ray for operators or, in the demo, for everybody; else ""."""
        if self.namespace.settings.demo or "x-operates" in ctx.request.headers:
            return self.xray(renderings, ctx.viewer)
        return ""

    def xray(self, renderings, viewer):
        """Return which object served a page, to whom, and what the viewer may do."""
        fresh = max([one.made for one in renderings]) > self.asked
        return template("xray")(
            id=self.id, file=self.namespace.path(self.id).name, account=viewer.account,
            role=viewer.role, grants=", ".join(viewer.grants),
            check="yes" if viewer.can("todos:delete") else "no",
            how="just now, in" if fresh else "from the cache; it took",
            micros=sum([one.micros for one in renderings]),
            since=formatdate(self.opened_at, usegmt=True))


@addition
class CountsConsoles(Broker):
    def count_watcher(self, stream, id, more):
        super().count_watcher(stream, id, more)
        if id == Console.id:
            self.edge.trace.watch(more)

    def look_elsewhere(self):
        """Note nothing here, because the server asks itself this each second."""
        with self.edge.trace.silence():
            super().look_elsewhere()


# ==== 73. Own options =====================================================================
# The idea: an app can add options and commands of its own to the command line. A command is
#   a function, and the function's parameters are the command's arguments.
# It promises: a secret appears in no list of processes, no help and no log. A command may
#   open a workspace while the server runs; within a second the server shows what it wrote.
# It needs: 42 Jobs.
#
#     def remind(app, workspace, text, times=1):         # remind acme "Buy tea" --times 2
#         with app.open(workspace, write=True) as ctx:
#             ...

# -- options

TYPES = (str, int, float, bool)                          # of an option's value
NUMBERS = {int: int, "int": int, float: float, "float": float}   # by annotation


@public
class Option(NamedTuple):
    """A setting of an app: Option("--smtp", "host:port of the mail server").

    It is set by the flag or the variable ORION_SMTP, and read by ctx.setting("smtp"). Its
    value is of the type of its default: text, a number, True or False. All users of the
    machine can see flags, so ORION_KEY or --key-file sets a secret named --key instead.
    """
    flag: str
    help: str
    default: Any = ""
    secret: bool = False

    @property
    def name(self) -> str:
        return name_of_flag(self.flag)


class Quiet(dict):
    """Values of options. They are not shown when settings are printed."""

    def __repr__(self):
        return f"<{', '.join(self)}>"


def check_option(option):
    """Raise Unusable if the option can't work."""
    if type(option) is not Option or type(option.default) not in TYPES:
        raise Unusable(f"option {option!r:.99}: write Option(\"--name\", \"help\", "
                       "default); the default is a text, a number, True or False")
    if not option.flag.startswith("--") or not option.name.isidentifier():
        raise Unusable(f"option {option.flag!r}: write a flag like --mail-server")
    if option.secret and option.default != "":
        raise Unusable(f"option {option.flag!r}: a secret must have no default, because "
                       "anybody could read it in the program; leave it out")


def add_own(parser, commands, app):
    """Add the app's options and commands to the parser (one of APP_PARSERS)."""
    for option in listed(app.options):
        check_option(option)
        try:
            add_own_option(parser, option)
        except argparse.ArgumentError as error:
            raise Unusable(f"option {option.flag!r}: there is one already; choose another "
                           "name") from error
    for function in listed(app.commands):
        add_own_command(commands, function, app.options)
    return with_own


def listed(given):
    """Return the options or commands. Raise Unusable for one that is in no tuple."""
    if type(given) is Option or callable(given):
        raise Unusable(f"{given!r:.99}: put it into a tuple; (one,) has a comma")
    return given


def add_own_option(parser, option, suppress=False):
    """Add a flag. suppress: leave the default to the main parser's flag; for commands."""
    flag = option.flag
    help = option.help
    if option.secret:
        variable = f"ORION_{option.name.upper()}"
        flag += "-file"
        help = f"file with {help}; or set {variable}"
        instead = f"set {variable}, or name a file with {flag}"
        refuse_flag(parser, option.flag, instead)
    default = from_environment(flag) or option.default
    action = add_flag(parser, flag, type(option.default), default, f"own_{option.name}",
                      help)
    if suppress:
        action.default = argparse.SUPPRESS


def refuse_flag(parser, flag, instead):
    def refuse(text):
        raise argparse.ArgumentTypeError("all users of this machine can see the values of "
                                         f"flags; {instead}")
    parser.add_argument(flag, type=refuse, help=argparse.SUPPRESS)


def with_own(settings, given):
    """Return the settings with the values of the app's options."""
    said = Quiet()
    for option in settings.options:
        value = getattr(given, f"own_{option.name}")
        said[option.name] = read_secret(option, value) if option.secret else value
    return settings._replace(own=said)


def read_secret(option, file):
    if not file:
        return from_environment(option.flag)
    try:
        return pathlib.Path(file).read_text("utf-8").rstrip("\r\n")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", "") or "it is not text"
        raise Unusable(f"{option.flag}-file: {file} can't be read ({why}); name a file "
                       "that the server's user may read") from error


@addition
class KnowsSettings(Context):
    def setting(self, name: str) -> Any:
        """Return the value of an option of the app. Raises LookupError."""
        return self.host.namespace.settings.setting(name)

    def now(self) -> float:
        """Return the time, in seconds since 1970. A test can move this clock."""
        return time.time()


# -- commands

def add_own_command(commands, function, options):
    """Add a command. Parameters after the App are arguments, or flags with a default."""
    name = getattr(function, "__name__", "?").replace("_", "-")
    if not name_of_flag(f"--{name}").isidentifier() or name in commands.choices:
        raise Unusable(f"command {name!r}: it is no function with a name, or another "
                       "command has that name; use def, and a new name")
    help = (function.__doc__ or "").strip().partition("\n")[0]
    sub = commands.add_parser(name, help=help, description=function.__doc__,
                              parents=[flags_of_all()])
    sub.set_defaults(verb=name, run=functools.partial(run_own, function))
    try:
        for option in options:
            add_own_option(sub, option, suppress=True)
        parameters = [*inspect.signature(function).parameters.values()]
        if not parameters:
            raise Unusable(f"command {name!r}: its first parameter must be the App: "
                           f"def {name}(app)")
        for parameter in parameters[1:]:
            add_parameter(sub, parameter)
    except argparse.ArgumentError as error:
        raise Unusable(f"command {name!r}: {error.argument_name} is a flag already; rename "
                       "the parameter") from error


def add_parameter(sub, parameter):
    dest = f"arg_{parameter.name}"                       # never the name of a setting
    default = parameter.default
    if default is parameter.empty:
        kind = NUMBERS.get(parameter.annotation, str)
        return sub.add_argument(dest, metavar=parameter.name, type=kind)
    flag = f"--{parameter.name.replace('_', '-')}"
    kind = type(default) if type(default) in TYPES else str
    add_flag(sub, flag, kind, default, dest, "")


def run_own(function, settings, given):
    args = {name[4:]: value for name, value in vars(given).items()
            if name.startswith("arg_")}
    with contextlib.closing(App(settings, given.verb)) as app:
        return function(app, **args)


class App:
    """A deployment, for a command of an app: its settings and its workspaces."""
    who = "(command line)"                               # for the journals

    def __init__(self, settings, what):
        self.settings = settings
        self.setting = settings.setting                  # as ctx.setting
        self.what = what                                 # for the journals, too
        self.env = None
        self.inside = ""                                 # the workspace that is open

    def workspaces(self) -> List[str]:
        """Return the names of all workspaces."""
        return [row["name"] for row in looked_up(self.settings, named_workspaces)]

    @contextlib.contextmanager
    def open(self, workspace: str, write: bool = False):
        """Yield a ctx with the tables of all slices of one workspace.

        With write, everything inside is one transaction. Keep it short: the server waits
        for it, at most five seconds. Raises Unusable if there is no such workspace here.
        """
        self.check_closed()
        row = self.row(workspace)
        self.env = self.env or compose(self.settings._replace(demo=False))
        self.env.workspaces.get(row["id"]).ask("/_due")  # opens it, and waits for a lock
        one = self.env.workspaces.awake(row["id"])
        self.inside = workspace
        try:
            with one.turn:
                one.store.exec("PRAGMA busy_timeout = 5000")
                with self.transaction(one, row, WRITE if write else READ) as ctx:
                    yield ctx
        finally:
            one.store.exec("PRAGMA busy_timeout = 0")    # for GuardedStore.LOCK_SECONDS
            self.inside = ""
        if write:
            self.note(row["id"])

    def check_closed(self):
        if self.inside:
            raise RuntimeError(f"{self.inside} is open, so all others would wait forever; "
                               "leave `with app.open(...)` first")

    @contextlib.contextmanager
    def transaction(self, one, row, may):
        title = urllib.parse.quote(row["title"] or row["name"])
        viewer = Viewer("", (), row["name"], row["id"], self.who)
        request = Request("POST", "/_app", headers={"x-title": title})
        store = Tables(one.store, APP, may)
        ctx = one.context(one, store, viewer, {}, request)
        before = one.store.db.total_changes
        try:
            with one.store.tx() if may == WRITE else contextlib.nullcontext():
                yield ctx
                if one.store.db.total_changes != before:
                    # one.journal() would warn that nothing was published (33).
                    OwnsTables.journal(one, viewer, self.what, "")
        finally:
            ctx.end()

    def row(self, workspace):
        """Return the row of a workspace whose file is here."""
        if self.settings.plane:
            raise Unusable("with --plane, an app's command can't open a workspace; have a "
                           "route or a job do it")
        for row in looked_up(self.settings, named_workspaces):
            if row["name"] == slug(workspace):
                return row
        raise Unusable(f"no file here has the workspace {workspace}; workspace list tells "
                       "what there is, and where")

    def note(self, id):
        """Tell the server, if it is running, through the Directory's journal."""
        with OwnedStore(self.settings.directory_file) as store:
            add_entry(store, self.who, WRITTEN, id)

    def close(self):
        if self.env:
            self.env.workspaces.close()
            self.env.directory.namespace.close()


APP = "(app)"                                            # may use the tables of all slices
WRITTEN = "wrote to a workspace"                         # in the Directory's journal


def named_workspaces(store):
    return store.query("SELECT id, name, title FROM workspaces WHERE name IS NOT NULL AND "
                       "NOT moving AND node = '' ORDER BY name")


@addition
class LetsAppsIn(Judge):
    def owner_for(self, action, table):
        """Let an app use the tables of all slices, and only read those of the server."""
        owner = super().owner_for(action, table)
        if self.slice != APP or owner == "orion" and action in WRITES:
            return owner
        return APP


@addition
class TellsWhatAppsWrote(EdgeDirectory):
    def own_written(self, request):
        """Return the id of the journal's last entry, and the ids of all workspaces to which
        commands have written since another entry: its id is in the parameter after."""
        last = self.store.one("SELECT max(id) FROM journal")[0] or 0
        after = request.params.get("after") or last
        rows = self.store.query("SELECT DISTINCT which FROM journal WHERE id > ? AND what "
                                "= ?", after, WRITTEN)
        return [last, [row["which"] for row in rows]]


@addition
class HearsOfCommands(Broker):
    """A broker that looks for writes of an app's commands. They run in other processes, so
    no topic of this process tells of them, and no alarm knows their jobs."""
    heard = ""                                           # the last entry of the journal

    def look_elsewhere(self):
        """At the start, note the journal's last entry, and only then the Directory's
        version: each later entry changes that, so changed_elsewhere hears of it."""
        if not self.heard:
            with contextlib.suppress(Refused):           # try again in a second
                self.hear()
        super().look_elsewhere()

    def changed_elsewhere(self):
        self.hear()
        super().changed_elsewhere()

    def hear(self):
        if self.edge.settings.plane:                     # where commands open none
            return
        workspaces = self.edge.env.workspaces
        self.heard, ids = self.edge.env.directory.ask("/_written", f"after={self.heard}")
        for id in ids:
            workspaces.changed(id)
            workspaces.alarms.looked.discard(id)
            self.published(id, "")


# -- the demo

def seed_own(env, names):
    """Have the app fill the demo's workspaces (one of APP_SEEDS)."""
    if not env.settings.seed:
        return
    app = App(env.settings, "seed")
    app.env = env
    for name in names:
        with app.open(name, write=True) as ctx:
            env.settings.seed(ctx)


APP_PARSERS.append(add_own)
APP_SEEDS.append(seed_own)


# ==== 74. Development =====================================================================
# The idea: with --dev there are two processes. The parent holds the listening socket and
#   watches the files. Its child is the server. After a change, a new child takes over;
#   clients that connect in between wait in the socket's queue. If a child does not start,
#   the parent shows why, in browsers too, until a file is saved.
# It promises: without --dev none of this is active. --dev is refused if another machine
#   could connect. It shows no cookie, no password and no row of the Directory.
# How an open page comes back: each page loads templates/dev.js, which asks twice a second
#   which server this is. If it is another one, the script fetches and morphs the page.

SOCKET = "_ORION_SOCKET"                                 # a variable: the child's socket
STATE = "/_dev"                                          # where dev.js asks
SUFFIXES = (".html", ".css", ".js", ".svg", ".sql")      # files that a program reads
MOST_FILES = 1000                                        # that are watched in a folder
DEV_ASSETS = {"/dev.js": ASSETS["/datastar.js"]}
SLOW_SECONDS = 0.05                                      # of a region


def serve_dev(settings):
    check_dev(settings)
    handle = os.environ.pop(SOCKET, "")
    if not handle:
        return Parent(settings).run()
    become_child(int(handle))
    serve_alone(settings)


WAYS_TO_SERVE.append((lambda settings: settings.dev, serve_dev))


def become_child(handle):
    """Have this process serve on the parent's socket, and show its errors in browsers."""
    DevEdge.handle = handle
    ASSETS.update(DEV_ASSETS)
    ERROR_LOGS[:] = [FAULTS.note]
    for cls in (DevEdge, DevConnection, DevBroker, DevWorkspace, DevContext, DevHost):
        addition(cls)


def check_dev(settings):
    """Raise Unusable if other machines could connect, or this system can't do it."""
    if not is_for_this_machine(settings):
        raise Unusable("--dev shows code and rows to every client, so it is for this "
                       "machine only; leave --host, --allow-host, --trust-proxy and "
                       "--plane out")
    if settings.plain:
        raise Unusable("--dev needs the full server; leave --plain out")
    if not fcntl:
        raise Unusable("--dev hands a socket to another process, but this system can't; "
                       "leave --dev out")


# -- the parent

class Parent:
    """Holds the socket and has a child serve on it; after each change, a new child."""
    LOOK_SECONDS = 0.2
    END_SECONDS = 8.0                                    # until a child is killed

    def __init__(self, settings):
        import subprocess                                # 2 ms that no server needs
        self.subprocess = subprocess
        ASSETS.update(DEV_ASSETS)
        self.socket = bound(settings, lambda: listening(settings.host, settings.port))
        self.assets = settings.assets
        self.modules = own_modules()                     # later the child's: see read
        self.seen = {}                                   # the stamps() of files
        self.child = None
        self.said = ()                                   # the child's latest lines
        self.served = False                              # True once the child serves
        self.stopping = False

    def run(self):
        for number in stop_signals():
            signal.signal(number, self.stop)
        status = None
        while not self.stopping:
            self.seen = self.look()
            status = self.run_child()
            if status == 0 and self.served:              # somebody has stopped it
                break
            if status is not None and not self.stopping:
                self.show_why(status)
        return status

    def see_more(self):
        """Add new files. Files that were seen before keep their old stamp, so that a change
        since then is still noticed."""
        self.seen = {**self.look(), **self.seen}

    def look(self):
        assets = pathlib.Path(self.assets).rglob("*") if self.assets else ()
        some = map(str, itertools.islice(assets, MOST_FILES))
        return stamps([*self.modules, *files_beside(self.modules), *some])

    def stop(self, *_):
        """Stop, and have the child stop, by SIGHUP: a terminal sends its own signal to the
        child, too, and the same one again would end it at once (see stop_or_leave)."""
        self.stopping = True
        if self.child:
            self.child.send_signal(signal.SIGHUP)

    def run_child(self):
        """Run a child. Return its exit status; None if it was ended after a change."""
        self.child = self.start()
        reader = threading.Thread(target=self.read, args=(self.child.stderr,), daemon=True)
        reader.start()
        while self.child.poll() is None and not self.changed():
            pass                                         # changed() waits
        status = self.child.poll()
        self.end()
        reader.join(1.0)                                 # its children may hold the pipe
        return status

    def start(self):
        words = getattr(sys, "orig_argv", [sys.executable, *sys.argv])   # 3.10
        handle = self.socket.fileno()
        return self.subprocess.Popen(
            [sys.executable, *words[1:]], env={**os.environ, SOCKET: str(handle)},
            pass_fds=[handle], stderr=self.subprocess.PIPE, text=True, errors="replace")

    def read(self, pipe):
        """Print the child's lines, in a thread. A line that begins with a NUL means that it
        serves, and lists its modules: see DevEdge.tick."""
        said = self.said = collections.deque(maxlen=100)
        self.served = False
        with pipe:
            for line in pipe:
                if line.startswith("\0"):
                    self.served = True
                    self.modules = json.loads(line[1:])
                    self.see_more()
                else:
                    said.append(line)
                    print(line, end="", file=sys.stderr, flush=True)

    def end(self):
        """End the child, after it has answered the requests that it has begun."""
        if self.child.poll() is None and not self.stopping:
            self.child.terminate()
        try:
            self.child.wait(self.END_SECONDS)
        except self.subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()

    def changed(self):
        """Wait LOOK_SECONDS. Return whether a file has changed, or the parent must stop."""
        time.sleep(self.LOOK_SECONDS)
        now = self.look()
        news = [file for file in now if now[file] != self.seen.get(file)]
        news += [file for file in self.seen.keys() - now if not os.path.exists(file)]
        if news:
            log(f"orion: {news[-1]} has changed")
            self.wait_until_quiet(now)
        return bool(news) or self.stopping

    def wait_until_quiet(self, now):
        """Wait until nothing changes, because an editor may be saving several files."""
        before = None
        while now != before:
            time.sleep(self.LOOK_SECONDS / 2)
            before, now = now, self.look()

    def show_why(self, status):
        """Show why the child did not start, or ended, until a file has changed."""
        how = f"with status {status}" if self.served else "without serving"
        ended = f"{os.path.basename(sys.argv[0])} ended {how}"
        text = "".join(self.said) or ended
        self.modules += re.findall(r'(?m)^ *File "([^<].*)", line', text)
        self.see_more()
        log(f"orion: {ended}; it starts again when a file changes")
        server = Notice(self.socket, text)
        serving = threading.Thread(target=server.serve_forever, args=(0.05,))
        serving.start()
        while not self.changed():
            pass
        server.shutdown()
        serving.join()


def own_modules():
    """Return the files of this process's modules, except Python's own and packages."""
    files = [getattr(module, "__file__", "") or "" for module in [*sys.modules.values()]]
    return [file for file in files if file.endswith(".py")
            and not file.startswith(OURS[1]) and "-packages" not in file]


def files_beside(modules):
    """Return the files next to the modules that a program may read: see SUFFIXES."""
    found = []
    for folder in {*map(os.path.dirname, modules), str(TEMPLATES)}:
        with contextlib.suppress(OSError), os.scandir(folder or ".") as entries:
            some = itertools.islice(entries, MOST_FILES)
            found += [entry.path for entry in some if entry.name.endswith(SUFFIXES)]
    return found


class Notice(ThreadingHTTPServer):
    """A server that answers while there is no child. It shows what went wrong."""

    def __init__(self, listening, text):
        super().__init__(("", 0), NoticeHandler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        last = text.strip().rpartition("\n")[2]
        self.text = f"{last}\n\n{text}"
        self.started = time.time_ns()
        self.env = types.SimpleNamespace(front=self.answer)

    def answer(self, request, env):
        if request.path in ASSETS:
            return own_asset(request, None)
        if request.headers.keys() & PROXY_HEADERS:
            raise Refused(503, "The app does not start. Its terminal says why.")
        if request.path == STATE:
            return state_of(self.started, 1, self.text)
        return fault_page(request, self.text)


class NoticeHandler(PlainHandler):
    def begin(self, response):
        self.close_connection = True                     # a child takes the next request
        super().begin(response)


# -- pages and answers for browsers

def state_of(server, errors, text):
    return as_json({"server": str(server), "errors": errors, "text": text})


def fault_page(request, text):
    if not request.opens_page:
        return Response(500, text.encode("utf-8", "replace"))
    headline, _, rest = text.partition("\n")
    body = template("dev")(headline=headline, text=rest.strip("\n"))
    return with_script(page("Error", body, status=500))


def with_script(response):
    """Have a page load dev.js."""
    if not response.nonce:
        return response
    return at_end(response, '<script type="module" src="/dev.js"></script>\n')


class Faults:
    """The errors of this process: how many there were, and the text of the last one."""

    def __init__(self):
        self.started = time.time_ns()
        self.count = 0
        self.text = ""
        self.secrets = ()                                # of the app's options

    def note(self, where, error):
        """Print an error in several lines that people can read, instead of log_place.

        If a stream fails again and again with the same error, print it only once.
        """
        before, self.text = self.text, explained(where, error)
        if where.endswith("/live") and before.endswith(self.text.partition("\n")[2]):
            return
        self.count += 1
        lines = [line if line.isprintable() else ascii(line)
                 for line in self.text.split("\n")]
        with contextlib.suppress(OSError, ValueError):
            print("\n".join(lines), file=sys.stderr, flush=True)


FAULTS = Faults()


def explained(where, error):
    """Return a text: the error, the SQL that was run, the traceback from the slice on."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    statements = dict.fromkeys(filter(None, map(statement_in, frames)))
    begin = of_a_slice(error.__traceback__) or error.__traceback__
    rest = "".join(traceback.format_exception(type(error), error, begin))
    where = f"{where}: {error.where}" if hasattr(error, "where") else where
    text = "\n".join([f"{where}: {type(error).__name__}: {error}", *statements, "", rest])
    return without_secrets(text, frames)


def of_a_slice(trace):
    """Return the traceback from its first line that is not ours or Python's."""
    while trace and trace.tb_frame.f_code.co_filename.startswith(OURS):
        trace = trace.tb_next
    return trace


def statement_in(frame):
    """Return the SQL that a slice of the workspaces runs in this frame, and its values."""
    tables, sql = frame.f_locals.get("self"), frame.f_locals.get("sql")
    if not isinstance(tables, Tables) or not sql or tables.slice == "directory":
        return ""
    return f"SQL of slice {tables.slice!r}: {sql}\nvalues: {frame.f_locals['args']!r:.2000}"


HIDDEN = "(hidden)"
SECRET_HEADERS = ("cookie", "authorization", "x-session")
SECRET_FIELDS = ("pass", "secret", "token", "key", "new")


def without_secrets(text, frames):
    """Hide the cookies and passwords of the requests that these frames have."""
    values = [value for frame in frames for value in [*frame.f_locals.values()]]
    requests = [value for value in values if type(value) is Request]
    found = [secret for request in requests for secret in secrets_in(request)]
    for secret in (*found, *FAULTS.secrets):
        if len(secret) > 3:                              # shorter ones are in any text
            text = text.replace(secret, HIDDEN)
    return text


def secrets_in(request):
    found = [request.headers.get(name, "") for name in SECRET_HEADERS]
    found += [piece.partition("=")[2] for piece in found[0].split("; ")]
    with contextlib.suppress(Refused):
        found += [value for name, value in request.pairs() if isinstance(value, str)
                  and any([word in name.lower() for word in SECRET_FIELDS])]
    return found


# -- the child

class DevEdge(LoopEdge):
    handle = -1                                          # of the parent's socket
    modules = 0                                          # how many the parent knows

    def __init__(self, env, settings):
        super().__init__(env, settings)
        self.add_doors({STATE: self.state})
        self.parent = os.getppid()
        FAULTS.secrets = [settings.setting(option.name) for option in settings.options
                          if option.secret]
        for route in all_routes(settings.slices):
            if route.method not in SAFE and route.grant.endswith(":read"):
                log(f"dev: {route.method} {route.path} asks for {route.grant}, which roles "
                    "that only read have, too; if it writes more than their own rows, ask "
                    "for another grant")

    def listening(self):
        return socket.socket(fileno=self.handle)

    def tick(self, now):
        super().tick(now)
        if os.getppid() != self.parent:
            return self.stop()
        if self.modules != len(sys.modules):
            self.modules = len(sys.modules)
            with contextlib.suppress(OSError, ValueError):   # nobody may read it
                print(f"\0{json.dumps(own_modules())}", file=sys.stderr, flush=True)

    def state(self, request, env):
        """Answer dev.js, as a door."""
        only_read(request)
        if not self.is_from_here(request):
            raise Refused(*NOTHING_HERE)
        return state_of(FAULTS.started, FAULTS.count, FAULTS.text)

    def count(self, asked, response):
        if asked.request.path not in (STATE, "/dev.js"):
            super().count(asked, response)

    def finish(self, asked, response):
        if isinstance(response, Response):
            response = with_script(response)
        super().finish(asked, response)

    def refusal(self, request, error):
        answer = with_script(super().refusal(request, error))
        shown = not isinstance(error, Refused) and self.is_from_here(request)
        if answer.status != 500 or not shown:
            return answer
        return fault_page(request, explained(f"{request.method} {request.path}", error))


class DevConnection(Connection):
    EXPECTED_SECONDS = 1.0                               # until a new connection is used

    @property
    def may_be_closed(self):
        """Keep a new connection for a moment, because its first request may be coming."""
        expected_until = self.deadline - self.IDLE_SECONDS + self.EXPECTED_SECONDS
        is_expected = self.new and time.monotonic() < expected_until
        return super().may_be_closed and not is_expected


class DevWorkspace(EdgeWorkspace):
    def render(self, region, live, ctx, args):
        rendering = super().render(region, live, ctx, args)
        if rendering.micros > 1e6 * SLOW_SECONDS:
            log(f"dev: {name_of(region.show)} of {live.path} took "
                f"{rendering.micros // 1000} ms, and all others waited; read less, or add "
                "an index")
        return rendering


class DevContext(Context):
    def field(self, name, otherwise=""):
        sent = [one for one, _ in self.sent if not one.startswith("_")]
        if name not in sent:
            self.host.missing[name] = sent
        return super().field(name, otherwise)


class DevHost(SliceHost):
    """Logs the fields that a refused command asked for and the page did not send."""

    def on_open(self):
        super().on_open()
        self.missing = {}                                # with the fields that were sent

    def command(self, request):
        self.missing.clear()
        return super().command(request)

    def refuse(self, request, refused):
        for name, sent in self.missing.items():
            log(f"dev: {request.method} {request.path} was refused, and it has no field "
                f"{name!r}, but {', '.join(sent) or 'nothing'}; name an input by "
                f'name="{name}" in a form, else by data-bind:{name}')
        return super().refuse(request, refused)


class DevBroker(Broker):
    def published(self, id, topic):
        if id in self.edge.env.workspaces.objects:
            shown = [f"{channel.subscription.again.path} for {len(channel.streams)} streams"
                     for channel in [*self.channels.get(id, {}).values()]
                     if channel.subscription.topic == topic]
            log(f"dev: {topic or 'everything'!r} was published: "
                f"{', '.join(shown) or 'no open page shows it'}")
        super().published(id, topic)


# ==== 75. Testing =========================================================================
# The idea: a test has an app of its own, with all that a server has behind its sockets: the
#   worker, the gate, grants, transactions and journals. Its folder exists only during the
#   test. An error in a slice is raised in the test.
# It promises: no socket and no thread, and nothing is left behind. Jobs run when the test
#   calls them, and the test can move the clock.
# It needs: 33 Page checks, 42 Jobs, 58 Exports, 67 Uploads, 73 Own options.
#
#     with orion.testing(poll) as app:
#         bob = app.viewer("bob", "member")
#         assert bob.post("/polls", title="Tea?").status == 204
#         assert "Tea?" in bob.region("/polls")

MEMORY = "/dev/shm"                                      # a folder in memory, on Linux


@public
@contextlib.contextmanager
def testing(*slices: Slice, options: Sequence[Option] = (),
            assets: Optional[pathlib.Path] = None, **own: Any):
    """Yield an app with these slices, for a test.

    options, assets: the same as for main(). own: values of the options, such as
    smtp="localhost:25". Raises BadSlice for slices that a server would refuse, LookupError
    for an unknown option.
    """
    global time
    time = MovableTime()
    for name in own:
        Settings(options=options).setting(name)
    memory = MEMORY if os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        settings = Settings(data=pathlib.Path(folder), demo=False, slices=slices,
                            options=options, assets=assets, own=Quiet(own))
        with contextlib.closing(TestedApp(settings)) as app:
            yield app


setattr(testing, "__test__", False)                      # tells pytest: it is no test
__tracebackhide__ = True        # pytest shows the lines of a slice and its tests, not ours


# -- an app in a test

class TestedApp(App):
    """An app in a test: see testing(). It is an App, too: see section 73."""
    __test__ = False                                     # tells pytest: it is no test
    who = "(test)"
    MOST_JOBS = 1000                                     # in one call of run_jobs()

    def __init__(self, settings):
        super().__init__(settings, "test")
        self.clock = Clock()
        self.env = compose(settings)
        for change in PLAIN:                             # as for any edge but the loop's
            change(self.env)
        self.settings = self.env.settings
        self.uploads = Uploads(self.settings)
        self.alarms = whole(CalledAlarms)(self.env)

    def check_size(self, request):
        """Raise Refused(413) for a body that is longer than a server takes."""
        route = self.uploads.route_of(request.method, request.path, request.media_type)
        limit = route.upload if route else BODY_LIMIT
        if len(request.body) > limit:
            raise too_large(limit)

    def viewer(self, name: str, role: str = "member", workspace: str = "acme") -> Visitor:
        """Return somebody who is signed in and has this role in the workspace.

        Make the account and the workspace if they do not exist. Raises ValueError.
        """
        if role not in ROLES:
            raise ValueError(f"there is no role {role!r}; use {', '.join(ROLES)}")
        account = account_name(name)
        address, title = names_of(workspace)
        file = self.settings.directory_file
        with self.clock, OwnedStore(file) as store, store.tx():
            self.let_in(store, account, role, address, title)
            return Visitor(self, address, self.cookie(store, account))

    def anybody(self, workspace: str = "acme") -> Visitor:
        """Return somebody who is not signed in."""
        return Visitor(self, workspace)

    def let_in(self, store, account, role, address, title):
        if not store.one("SELECT 1 FROM workspaces WHERE name = ?", address):
            add_workspace(store, self.env.workspaces, address, title, [])
        id = row_of(store, "workspaces", address)["id"]
        store.exec("INSERT OR IGNORE INTO accounts (name, label) VALUES (?, ?)", account,
                   account)
        store_role(store, id, account, "", role)

    def cookie(self, store, account):
        key = load_keys(self.settings.key_file)[0]
        return f"{cookie_name('http', key)}={add_session(store, account, 'a test', key)}"

    @contextlib.contextmanager
    def open(self, workspace: str = "acme", write: bool = False):
        with self.clock, super().open(workspace, write) as ctx:
            yield ctx

    def run_jobs(self) -> int:
        """Run all jobs that are due, and those that they enqueue. Return how many ran.

        Raises the error of a job that fails. The job is tried again later, as on a server.
        """
        self.check_closed()
        self.alarms.count = 0
        with self.clock:
            while self.alarms.count < self.MOST_JOBS:
                id = self.alarms.next_due()
                if id is None:
                    return self.alarms.count
                self.alarms.ring_for(id)
        raise RuntimeError(f"{self.MOST_JOBS} jobs ran, and there are more; does one "
                           "enqueue itself?")


class CalledAlarms(Alarms):
    """Alarms that ring when a test says so. A call that a job yields is made at once."""

    def __init__(self, env):
        super().__init__(env.workspaces)
        env.workspaces.alarms = self
        self.directory = env.directory
        self.put = lambda function, *args: function(*args)
        self.waits.begin = lambda: None                  # run() makes the calls instead
        self.count = 0                                   # jobs that ran
        self.error = None                                # of the last one

    def ring_for(self, id):
        self.error = None
        self.set(id, self.one_job(self.namespace.get(id)))
        if self.error:
            raise self.error

    def run(self, stub, job, names):
        self.count += 1
        super().run(stub, job, names)
        if self.waits.in_line:                           # the job has yielded a call
            self.waits.call(self.waits.in_line.pop())

    def ring(self):
        """Do nothing: a test calls run_jobs()."""

    def failed(self, row, error):
        self.error = error


# -- its clock

REAL_TIME = time
AHEAD = contextvars.ContextVar("seconds by which an app's clock is ahead", default=0.0)


class MovableTime:
    """The module time, with a time() that heeds AHEAD.

    testing() gives it the name time in this file. So only tests use it, and no server.
    """

    def __getattr__(self, name):
        return getattr(REAL_TIME, name)

    def time(self):
        return REAL_TIME.time() + AHEAD.get()


class Clock:
    """The clock of an app in a test, for sessions, jobs, journals and ctx.now().

    The app goes by it while it does something: `with clock:`.
    """

    def __init__(self):
        self.ahead = 0.0                                 # seconds
        self.tokens = []                                 # to reset AHEAD

    def move(self, seconds: float) -> None:
        """Move the clock forward."""
        self.ahead += seconds

    def set(self, at: float) -> None:
        """Set the clock to a time, in seconds since 1970."""
        self.ahead = at - REAL_TIME.time()

    def __enter__(self):
        self.tokens.append(AHEAD.set(self.ahead))

    def __exit__(self, *_):
        AHEAD.reset(self.tokens.pop())


# -- the people in a test

class Visitor:
    """Somebody in a workspace of a test.

    A path is one of a slice, such as /polls/1, or the location in a reply. A refusal is
    returned as a Reply; any other error in a slice is raised.
    """

    def __init__(self, app, workspace, cookie=""):
        self.app = app
        self.workspace = workspace
        self.cookies = {}
        self.keep_cookie(cookie)

    def get(self, path: str) -> Reply:
        return self.fetch("GET", path)

    def post(self, path: str, **fields: Any) -> Reply:
        """Send fields as JSON, as scripts do."""
        return self.send_json("POST", path, fields)

    def put(self, path: str, **fields: Any) -> Reply:
        return self.send_json("PUT", path, fields)

    def patch(self, path: str, **fields: Any) -> Reply:
        return self.send_json("PATCH", path, fields)

    def delete(self, path: str, **fields: Any) -> Reply:
        query = urllib.parse.urlencode({"datastar": json.dumps(fields)})
        return self.fetch("DELETE", f"{path}?{query}" if fields else path)

    def submit(self, path: str, **fields: Any) -> Reply:
        """Post a plain HTML form, as a browser without scripts does. The value of a field
        may be a file, as ("cat.png", bytes), or a list."""
        pairs = pairs_of(fields)
        if any([type(value) is tuple for _, value in pairs]):
            return self.send(path, *form_in_parts(pairs))
        form = urllib.parse.urlencode(pairs).encode()
        return self.send(path, form, "application/x-www-form-urlencoded")

    def send(self, path: str, body: bytes, type: str, method: str = "POST") -> Reply:
        """Send a body that is no form: a file, or the call of another server."""
        return self.fetch(method, path, body, {"content-type": type})

    def page(self, path: str) -> str:
        """Return the markup of a page. Raises AssertionError if there is none."""
        reply = self.get(path)
        assert reply.status == 200, f"GET {path}: {reply.status} {reply.message}"
        return reply.text

    def region(self, path: str, id: str = "") -> str:
        """Return the regions of a page as its stream sends them, or the one with this id.
        Raises AssertionError if there is none."""
        request = self.request("GET", path)
        reply = self.ask(request._replace(path=f"{request.path}/live"))
        assert type(reply) is Response, f"GET {path}: {reply.status} {reply.message}"
        regions = {plain_id(one.piece.html): one.piece.html for one in reply.watch}
        assert not id or id in regions, f"{path} has no region {id!r}; it has {[*regions]}"
        return regions[id] if id else "".join(regions.values())

    # -- how requests are sent

    def send_json(self, method, path, fields):
        return self.send(path, json.dumps(fields).encode(), "application/json", method)

    def fetch(self, *what):
        answer = self.ask(self.request(*what))
        return replied(answer) if type(answer) is Response else answer

    def request(self, method, path, body=b"", headers={}):
        path, _, query = path.partition("?")
        inside = f"/w/{self.workspace}"
        if not path.startswith(f"{inside}/"):
            path = inside + path
        cookies = "; ".join([f"{name}={value}" for name, value in self.cookies.items()])
        said = {"host": "localhost", "origin": "http://localhost", "cookie": cookies}
        return Request(method, path, query, {**said, **headers}, body)

    def ask(self, request):
        """Return the Response or, if it was refused, a Reply."""
        self.app.check_closed()
        env = self.app.env
        try:
            self.app.check_size(request)
            with self.app.clock:
                answer = sendable(env.front(request, env), env.front)
        except Refused as no:
            return replied_no(no)
        for name, value in answer.headers:
            if name == "set-cookie":
                self.keep_cookie(value)
        return answer

    def keep_cookie(self, field):
        name, _, value = field.partition(";")[0].partition("=")
        self.cookies.pop(name, None)
        if value:
            self.cookies[name] = value


def pairs_of(fields):
    """Return a form's fields as pairs. A list becomes several fields of the same name; so
    does a tuple, unless it is a file."""
    pairs = []
    for name, value in fields.items():
        is_file = type(value) is tuple and [*map(type, value)] == [str, bytes]
        several = type(value) in (list, tuple) and not is_file
        pairs += [(name, each) for each in (value if several else [value])]
    return pairs


def form_in_parts(pairs):
    """Return the body of a form with files, and its content type."""
    boundary = secrets.token_hex(16)
    lines = []
    for name, value in pairs:
        head = f'Content-Disposition: form-data; name="{name}"'
        if type(value) is tuple:
            head += f'; filename="{value[0]}"\r\nContent-Type: application/octet-stream'
            value = value[1]
        data = value if type(value) is bytes else str(value).encode()
        lines += [f"--{boundary}\r\n{head}\r\n\r\n".encode(), data, b"\r\n"]
    lines.append(f"--{boundary}--\r\n".encode())
    return b"".join(lines), f"multipart/form-data; boundary={boundary}"


class Reply(NamedTuple):
    """The answer to somebody in a test."""
    status: int
    message: str = ""                                    # of a refusal
    signals: Dict[str, Any] = {}                         # that the page would set
    body: bytes = b""
    headers: Dict[str, str] = {}                         # names in lower case

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")

    @property
    def location(self) -> str:
        """The address to which it redirects; "" if it does not."""
        return self.headers.get("location", "")


def replied(response):
    body = response.body
    while response.rest and response.rest.size:          # for a large file
        body += response.rest.read()
    signals = json.loads(body) if response.type == "application/json" else {}
    said = {**joined(response.headers), "content-type": response.type}
    return Reply(response.status, "", signals, body, said)


def replied_no(no):
    signals = no.signals if no.status in (409, 422) else {}
    return Reply(no.status, no.message, signals, headers=joined(no.headers))


def plain_id(html):
    return id_of(html).partition("=")[2].strip(" \"'>")


if __name__ == "__main__":
    run_script()
