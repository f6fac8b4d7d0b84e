"""The tools of example/toolbox do what they say, with real servers that behave badly."""
import contextlib
import functools
import hashlib
import http.server
import json
import logging
import shutil
import socket
import socketserver
import sqlite3
import ssl
import subprocess
import threading
from email import message_from_bytes, policy

import pytest
from conftest import MODES, SQLITE, TOP

from example.toolbox import drift, notify, sql
from orchestrator import OPTIONS, run_pipeline

TOOLBOX = TOP / "example" / "toolbox"
JOBS = pytest.mark.parametrize("jobs", [1, 2])


def test_each_tool_is_short_and_is_in_the_readme():
    files = sorted(TOOLBOX.glob("*.py"))
    readme = (TOOLBOX / "README.md").read_text(encoding="utf-8")
    assert len(files) == 4
    assert [file.name for file in files if f"- `{file.name}`: " not in readme] == []
    assert [file.name for file in files if len(file.read_text().splitlines()) >= 60] == []


class Pipeline:
    """A pipeline over a SQLite file, with what it says in `said`."""

    def __init__(self, folder):
        self.folder, self.path, self.said = folder, folder / "data.db", []

    def run(self, tools, **more):
        """Run tools in their order, and return the result."""
        def hear(event):
            # Threads of the test's own servers begin while a tool runs.
            if event.kind == "log" and not event.text.startswith("it has left Thread-"):
                self.said.append(event.text)

        self.said, root = [], logging.getLogger()
        before, root.handlers = root.handlers, []  # pytest's own, which would take what is logged
        try:
            return run_pipeline([], tools, {}, functools.partial(sqlite3.connect, str(self.path)),
                                on_event=hear, **more)
        finally:
            root.handlers = before

    def query(self, text):
        """Return the rows of a query."""
        with contextlib.closing(sqlite3.connect(self.path)) as conn:
            return conn.execute(text).fetchall()


@pytest.fixture
def pipeline(tmp_path):
    return Pipeline(tmp_path)


# --- sql.py ---

TRICKY = """\
-- a table; with a comment
CREATE TABLE t (x TEXT, y TEXT DEFAULT 'a;b');
/* two; */ INSERT INTO t (x) VALUES ('it''s; --'), ("/*;");
;
CREATE TRIGGER copies AFTER INSERT ON t WHEN new.x = :since BEGIN
    INSERT INTO t (x) VALUES ('copied;');
    INSERT INTO t (x) VALUES ('twice');
END;
SELECT * FROM t;
UPDATE t SET y = 'z'  -- the last; without a semicolon
"""


@pytest.fixture
def run_sql(pipeline):
    """Run a text of SQL as a tool, over SQLite."""
    def run(text, **arguments):
        file = pipeline.folder / "text.sql"
        file.write_text(text, encoding="utf-8")
        return pipeline.run({"sql": "example.toolbox.sql"},
                            arguments={"file": str(file), **arguments})
    return run


def test_sql_is_split_where_sqlite_ends_a_statement():
    assert [line for line, _ in sql.split(TRICKY)] == [2, 3, 5, 9, 10]
    assert list(sql.split("-- nothing;\n;; /* at; all */\n")) == []
    assert list(sql.split("SELECT 1; SELECT '\n;")) == [(1, "SELECT 1;"), (1, "SELECT '\n;")]


def test_sql_is_run_statement_by_statement_and_counts_what_changed(run_sql, pipeline):
    result = run_sql(TRICKY.replace(":since", "'it'"))
    assert result.outcomes["sql"].rows == 4, result.errors
    assert pipeline.query("SELECT * FROM t") == [("it's; --", "z"), ("/*;", "z")]


def test_what_is_bound_is_a_value_whatever_it_holds(run_sql, pipeline):
    since = "'; DROP TABLE t; --"
    text = "CREATE TABLE t (x); INSERT INTO t VALUES (:since), ('%(x)s 100%'), (:since);"
    result = run_sql(text, since=since, more=7)
    assert result.outcomes["sql"].rows == 3, result.errors
    assert pipeline.query("SELECT x FROM t") == [(since,), ("%(x)s 100%",), (since,)]


@pytest.mark.parametrize("bad", [
    "INSERT INTO nowhere VALUES (2)", "INSERT INTO t VALUES (:nobody)", "INSERT INTO t VALUES ('"])
def test_sql_that_fails_leaves_nothing_and_its_place_is_told(run_sql, pipeline, bad):
    result = run_sql(f"CREATE TABLE t (x);\nINSERT INTO t VALUES (1);\n\n{bad};\nDELETE FROM t")
    assert result.failed == ["sql"]
    assert pipeline.query("SELECT * FROM sqlite_master") == []
    assert len(pipeline.said) == 1 and f"text.sql, line 4: {bad}" in pipeline.said[0]


def test_without_parameters_a_percent_sign_is_one_for_psycopg(tmp_path):
    class Connection:
        """Notes what is executed, as psycopg takes it."""
        done, rowcount = [], 2
        description = property(lambda self: self.done[-1][0].startswith("SELECT") or None)
        cursor = property(lambda self: lambda: self)
        close = staticmethod(lambda: None)

        def execute(self, *what):
            self.done.append(what)

    (tmp_path / "a.sql").write_text("SELECT '5%'; DELETE FROM t WHERE day >= %(since)s::date;")
    assert sql.run(Connection(), None, tmp_path / "a.sql", since="2013-01-01") == 2
    assert Connection.done == [
        ("SELECT '5%';",),
        ("DELETE FROM t WHERE day >= %(since)s::date;", {"since": "2013-01-01"})]


@pytest.mark.parametrize("words", MODES.values(), ids=MODES)
def test_a_copy_runs_in_somebody_elses_repository(quick, words):
    folder = quick.folder / "jobs" / "tools"
    folder.mkdir(parents=True)
    shutil.copy(TOOLBOX / "sql.py", folder)
    (quick.folder / "report.sql").write_text(
        "CREATE TABLE report AS SELECT 1 AS x; INSERT INTO report VALUES (:size), (:size + 1);")
    quick.pipeline(SQLITE + """
TOOL_MAP = {"report": "jobs.tools.sql"}
def add_arguments(parser):
    parser.add_argument("--file")
    parser.add_argument("--size", type=int)
""")
    ended = quick.run("--file", "report.sql", "--size", "7", *words)
    assert ended.code == 0 and "2 rows" in ended.err, ended
    assert quick.query("SELECT x FROM report") == [(1,), (7,), (8,)]


# --- drift.py ---

SALES = """
    from example.toolbox.drift import check

    def run(conn, count, price):
        conn.execute("CREATE TABLE IF NOT EXISTS sales (price REAL)")
        conn.execute("DELETE FROM sales")
        conn.executemany("INSERT INTO sales VALUES (?)", [(price,)] * count)
"""


@pytest.fixture
def load(pipeline, modules):
    """Load so many sales at a price, and return the error, or None."""
    modules(sales=SALES)

    def run(count, price=2.0, figures=("avg(price)",)):
        result = pipeline.run(
            {"load": "sales"}, home=pipeline.folder, name="p", arguments={
                "count": count, "price": price, "table": "sales", "figures": list(figures)})
        return result.errors.get("load")
    return run


def test_a_table_that_is_suddenly_another_is_refused_and_leaves_nothing(load, pipeline):
    for count in (100, 101, 99, 100):
        assert load(count) is None
    assert load(100, 2.125) is None  # within a tenth
    assert load(50) == ("ValueError: count(*) of sales is 50: after the last runs it was 90 to "
                        "110, by median and spread")
    assert load(150).startswith("ValueError: count(*) of sales is 150")
    assert load(100, 5.0).startswith("ValueError: avg(price) of sales is 5.0")
    assert pipeline.query("SELECT count(*), avg(price) FROM sales") == [(100, 2.125)]
    assert pipeline.query("SELECT count(*), count(DISTINCT run_id) FROM figures") == [(10, 5)]

    with contextlib.closing(sqlite3.connect(pipeline.path)) as conn, conn:
        conn.execute("DELETE FROM figures WHERE tool = 'load'")
    assert load(50) is None


def test_before_there_are_five_runs_anything_goes_but_what_is_no_number(load):
    assert [load(count) for count in (1, 1000, 5, 0, 7)] == [
        None, None, None, "ValueError: avg(price) of sales is None: after the last runs it was "
        "-inf to inf, by median and spread", None]


def test_only_the_last_twenty_runs_count(load, pipeline):
    assert load(5) is None
    with contextlib.closing(sqlite3.connect(pipeline.path)) as conn, conn:
        conn.execute("DELETE FROM figures")
        conn.executemany("INSERT INTO figures VALUES (?, 'load', 'count(*)', ?, ?)", [
            (i, 5 if i < 30 else 1000, f"2013-01-{i:02d} 00:00:00")
            for i in range(10, 32)] + [(i, 1000, f"2012-01-{i:02d}") for i in range(1, 28)])
    assert load(1000, figures=[]).endswith("it was 4.5 to 5.5, by median and spread")
    assert load(5, figures=[]) is None


@pytest.mark.parametrize("values, bounds", [
    ([100] * 20, (90, 110)),
    ([100, 100, 101, 99, 100, 9000], (90, 110)),  # an outlier moves nothing
    ([0] * 5, (0, 0)),
    ([-10, -10, -10, -10, -10], (-11, -9)),
    ([10, 20, 30, 40, 50], (30 - 5 * 14.826, 30 + 5 * 14.826)),
    ([1, 2, 3, 4], (float("-inf"), float("inf"))),
])
def test_bounds_are_of_median_and_spread(values, bounds):
    assert drift.find_bounds(values) == pytest.approx(bounds)


# --- a web server that behaves badly ---

class Web(http.server.ThreadingHTTPServer):
    """Answers each path as `answers` says: a status, or a function of its handler. Notes what is
    asked of it in `got`: (path, headers, content).
    """
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.got, self.is_over = {}, [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers for a Web."""

    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.got.append((self.path, dict(self.headers), content))
        answer = self.server.answers.get(self.path, 404)
        if callable(answer):
            answer(self)
        else:
            self.say(answer)

    do_GET = do_POST

    def say(self, status, content=b"", length=None, **headers):
        """Answer with some headers, and a length that may be a lie."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Say nothing."""


@contextlib.contextmanager
def serving(server):
    """Let a server answer in a thread."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        if hasattr(server, "is_over"):
            server.is_over.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def web():
    with serving(Web()) as server:
        yield server


def hang(handler):
    """Answer nothing, until the test is over."""
    handler.server.is_over.wait(60)


def find_closed_port():
    """Return a port at which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# --- download.py ---

CONTENT = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def download(pipeline, web):
    """Download a.bin from a path of the server, and return its outcome."""
    def run(path="/a", sha256="", jobs=1, files=None, **more):
        if files is None:
            files = [f"a.bin {web.url}{path} {sha256}"]
        return pipeline.run(
            {"raw": "example.toolbox.download"}, name="p", jobs=jobs, arguments={
                "files": files, "folder": str(pipeline.folder / "raw"), **more}).outcomes["raw"]
    return run


def give(handler):
    """Give the content, of which a Range can be asked for."""
    asked = handler.headers.get("Range")
    if not asked:
        handler.say(200, CONTENT)
        return
    begin = int(asked[len("bytes="):-1])
    handler.say(206, CONTENT[begin:],
                Content_Range=f"bytes {begin}-{len(CONTENT) - 1}/{len(CONTENT)}")


def give_half(handler):
    """Give half of it, and hang up."""
    handler.say(200, CONTENT[:1000], len(CONTENT))


def give_half_and_hang(handler):
    """Give half of it, and then nothing."""
    give_half(handler)
    hang(handler)


def read(pipeline):
    """Return what is in the folder, by name."""
    return {path.name: path.read_bytes() for path in (pipeline.folder / "raw").glob("*")}


@JOBS
def test_files_are_downloaded_once_and_again_when_the_list_says_another(
        download, pipeline, web, jobs):
    web.answers.update({"/a": give, "/b": give, "/c": give})
    listed = pipeline.folder / "downloads.txt"
    lines = [f"a.bin {web.url}/a", "", f"b.bin\t{web.url}/b  {SHA256.upper()}"]
    listed.write_text("\n".join(lines))
    assert download(files=str(listed), jobs=jobs).reason == "2 items done"
    assert read(pipeline) == {"a.bin": CONTENT, "b.bin": CONTENT}
    assert download(files=str(listed), jobs=jobs).reason == "none of 2 items is pending"
    listed.write_text("\n".join([f"a.bin {web.url}/c", *lines[1:]]))
    assert download(files=str(listed), jobs=jobs).reason == "1 item done"
    assert sorted(path for path, _, _ in web.got) == ["/a", "/b", "/c"]


@pytest.mark.parametrize("first", [give_half, give_half_and_hang])
def test_what_was_cut_off_goes_on_where_it_was(download, pipeline, web, first):
    web.answers["/a"] = first
    outcome = download(sha256=SHA256, timeout_s=0.3)
    assert outcome.status == "failed"
    assert ("the server sent 1,000 of 256,000 bytes" if first is give_half else "timed out") \
        in outcome.error
    assert [*read(pipeline).values()] == [CONTENT[:1000]] and "a.bin" not in read(pipeline)

    web.answers["/a"] = give
    assert download(sha256=SHA256).status == "success"
    assert web.got[1][1]["Range"] == "bytes=999-"
    assert read(pipeline) == {"a.bin": CONTENT}


def test_what_came_whole_before_an_end_is_not_asked_for_again(download, pipeline, web):
    web.answers["/a"] = give
    (pipeline.folder / "raw").mkdir()
    (pipeline.folder / "raw" / f"a.bin.{SHA256[:8]}.part").write_bytes(CONTENT)
    assert download(sha256=SHA256).status == "success"
    assert web.got[0][1]["Range"] == f"bytes={len(CONTENT) - 1}-"
    assert read(pipeline) == {"a.bin": CONTENT}


def test_a_server_without_range_sends_all_again_and_that_is_told(download, pipeline, web):
    web.answers["/a"] = give_half
    download(sha256=SHA256)
    web.answers["/a"] = lambda handler: handler.say(200, CONTENT)
    assert download(sha256=SHA256).status == "success"
    assert pipeline.said == ["the server knows no Range, and sends all of it again"]
    assert read(pipeline) == {"a.bin": CONTENT}


def test_without_a_checksum_two_parts_are_never_put_together(download, pipeline, web):
    web.answers["/a"] = give_half
    assert download().status == "failed"
    web.answers["/a"] = give
    assert download().status == "success"
    assert "Range" not in web.got[1][1] and read(pipeline) == {"a.bin": CONTENT}


@pytest.mark.parametrize("parts", [[CONTENT[:-1] + b"x"], [CONTENT[:1000], CONTENT[::-1]]])
def test_a_wrong_checksum_is_told_and_leaves_nothing(download, pipeline, web, parts):
    for part in parts:  # whole, or of two files
        web.answers["/a"] = lambda handler, part=part: handler.say(
            206 if "Range" in handler.headers else 200, part, len(CONTENT))
        outcome = download(sha256=SHA256)
    assert f"not {SHA256}: it was deleted" in outcome.error
    assert read(pipeline) == {}


@pytest.mark.parametrize("answer, says", [
    (404, "a.bin: HTTPError: HTTP Error 404: Not Found"), (500, "HTTP Error 500"),
    (hang, "timed out"), (lambda handler: None, "RemoteDisconnected")])
def test_what_can_not_be_had_is_told_and_the_others_come(download, pipeline, web, answer, says):
    web.answers.update({"/bad": answer, "/good": give})
    outcome = download(files=[f"a.bin {web.url}/bad", f"b.bin {web.url}/good"], timeout_s=0.5)
    assert outcome.status == "partial" and says in outcome.error
    assert read(pipeline) == {"b.bin": CONTENT}


def test_where_nobody_listens_is_told(download):
    outcome = download(files=[f"a.bin http://127.0.0.1:{find_closed_port()}/a"])
    assert outcome.status == "failed" and "refused" in outcome.error


@pytest.mark.parametrize("line", [
    "../a http://x/a", "/etc/passwd http://x/a", "a\\b http://x/a", ".. http://x", "a file:///etc",
    "a", "http://x/a", "a http://x/a 123", "C:a http://x/a", f"a http://x/a {SHA256} more"])
def test_a_line_that_is_something_else_is_refused(download, line):
    outcome = download(files=[line])
    assert outcome.status == "failed" and "is not NAME URL [SHA256]" in outcome.error


# --- the table of the README ---

@pytest.mark.skipif("arguments" not in OPTIONS, reason="tools have no arguments of their own yet")
@pytest.mark.parametrize("words", MODES.values(), ids=MODES)
def test_the_table_of_the_readme_is_a_pipeline(sandbox, web, words):
    web.answers.update({"/sales.csv": give, "/hook": 200})
    shutil.copytree(TOOLBOX, sandbox.folder / "example" / "toolbox")
    readme = (TOOLBOX / "README.md").read_text(encoding="utf-8")
    table = readme.partition("```python\n")[2].partition("```")[0]
    sandbox.pipeline(SQLITE + table).tool("sales.load", """
        from example.toolbox.drift import check

        def run(conn):
            conn.execute("CREATE TABLE IF NOT EXISTS sales (day TEXT, price REAL)")
            conn.execute("INSERT INTO sales VALUES ('2013-01-02', 7), ('2012-12-31', 8)")
    """)
    (sandbox.folder / "downloads.txt").write_text(f"sales.csv {web.url}/sales.csv {SHA256}\n")
    (sandbox.folder / "sql").mkdir()
    (sandbox.folder / "sql" / "report.sql").write_text(
        "CREATE TABLE IF NOT EXISTS report (price REAL);\n"
        "INSERT INTO report SELECT price FROM sales WHERE day >= :since;")

    ended = sandbox.run(*words, env={"NOTIFY_WEBHOOK": web.url + "/hook"})
    assert ended.code == 0, ended
    assert (sandbox.folder / "raw" / "sales.csv").read_bytes() == CONTENT
    assert sandbox.query("SELECT price FROM report") == [(7,)]
    assert sandbox.query("SELECT name, value FROM figures") == [
        ("count(*)", 2), ("avg(price)", 7.5)]
    assert [path for path, _, _ in web.got] == ["/sales.csv"]


# --- notify.py ---

FAILS = """
    def run():
        raise ValueError("no <!channel> \\udc80\\r\\nBcc: x@example.com\\n.\\n" + 9000 * "y")
"""
VARIABLES = ["WEBHOOK", "MAIL_TO", "MAIL_FROM", "SMTP", "SMTP_USER", "SMTP_PASSWORD", "PAGERDUTY",
             "NAME"]


class Post:
    """The run of a pipeline whose last tool notifies, with the environment set for that."""

    def __init__(self, pipeline, setenv):
        self.pipeline, self.setenv = pipeline, setenv

    def set(self, **variables):
        """Set variables of the environment."""
        for name, value in variables.items():
            self.setenv("NOTIFY_" + name, value)

    def run(self, module="fails", jobs=1, more=0, **arguments):
        """Return what is warned of, after a tool of a module, and some more, and the notifier."""
        result = self.pipeline.run({
            "load": {"module": "works", "needs": []}, "parse": {"module": module, "needs": []},
            "report": {"module": "works", "needs": ["parse"]},
            **{f"more{i}": {"module": module, "needs": []} for i in range(more)},
            "notify": {"module": "example.toolbox.notify", "when": "always"},
        }, arguments={"timeout_s": 5, **arguments}, jobs=jobs)
        assert result.outcomes["notify"].status == "success", result.errors
        self.run_id = result.run_id
        return self.pipeline.said


@pytest.fixture
def post(pipeline, modules, monkeypatch):
    modules(fails=FAILS, works="def run(): return 1")
    for name in VARIABLES:
        monkeypatch.delenv("NOTIFY_" + name, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return Post(pipeline, monkeypatch.setenv)


@JOBS
def test_a_chat_is_told_what_failed(post, web, jobs):
    web.answers["/hook"] = 200
    post.set(WEBHOOK=web.url + "/hook", NAME="sales")
    assert post.run(jobs=jobs) == []
    (_, headers, content), = web.got
    title, line = json.loads(content)["text"].split("\n")
    assert headers["Content-Type"] == "application/json"
    assert title == f"sales: 1 of 3 tools failed (run {post.run_id})"
    assert line.startswith("parse failed: ValueError: no &lt;!channel&gt; ")
    assert "Bcc" in line and len(line) < 400


def test_of_many_failures_the_first_are_told(post, web, monkeypatch):
    web.answers["/hook"] = 200
    monkeypatch.setattr(notify, "PAGERDUTY", web.url + "/hook")
    post.set(WEBHOOK=web.url + "/hook", PAGERDUTY="key")
    assert post.run(more=30) == []
    chat, page = (json.loads(content) for _, _, content in web.got)
    title, *lines = chat["text"].split("\n")
    assert "31 of 33 tools failed" in title and len(lines) == 19
    assert len(page["payload"]["summary"]) == 1024  # as much as PagerDuty takes


@JOBS
def test_of_a_good_run_is_told_only_if_that_is_wished(post, web, jobs):
    web.answers["/hook"] = 200
    post.set(WEBHOOK=web.url + "/hook")
    assert post.run("works", jobs) == [] == web.got
    assert post.run("works", jobs, on="always") == []
    assert json.loads(web.got[0][2]) == {
        "text": f"pipeline: 0 of 3 tools failed (run {post.run_id})"}


def test_without_an_address_nothing_is_done(post):
    assert post.run() == []


@pytest.mark.parametrize("answer, says", [
    (500, "HTTP Error 500"), (404, "HTTP Error 404"), (hang, "timed out"),
    (lambda handler: handler.say(302, Location="/other"), "HTTP Error 302"),
    (lambda handler: handler.say(307, Location="/other"), "HTTP Error 307")])
def test_a_message_that_can_not_be_sent_is_a_warning(post, web, answer, says):
    web.answers.update({"/secret": answer, "/other": 200})
    post.set(WEBHOOK=web.url + "/secret")
    warned, = post.run(timeout_s=0.5)
    assert warned.startswith("nobody is told by NOTIFY_WEBHOOK: ") and says in warned
    assert [path for path, _, _ in web.got] == ["/secret"]


@pytest.mark.parametrize("address, says", [
    ("hooks.example.com/secret", "ValueError"), ("https://a b/secret", "InvalidURL"),
    ("http://127.0.0.1:%d/secret", "refused"), ("https://127.0.0.1:port/secret", "InvalidURL")])
def test_a_secret_address_is_never_shown(post, address, says):
    post.set(WEBHOOK=address.replace("%d", str(find_closed_port())))
    warned, = post.run()
    assert says in warned and "secret" not in warned


@pytest.mark.parametrize("module, action", [("fails", "trigger"), ("works", "resolve")])
def test_pagerduty_gets_an_event_that_a_good_run_resolves(post, web, monkeypatch, module, action):
    web.answers["/enqueue"] = 202
    monkeypatch.setattr(notify, "PAGERDUTY", web.url + "/enqueue")
    post.set(PAGERDUTY="key", NAME="sales")
    assert post.run(module, on="always") == []
    event = json.loads(web.got[0][2])
    summary = event["payload"].pop("summary")
    assert event == {"routing_key": "key", "event_action": action, "dedup_key": "sales",
                     "payload": {"source": "sales", "severity": "error"}}
    assert summary.startswith("sales: ") and len(summary) <= 1024


# --- a mail server ---

class Smtp(socketserver.ThreadingTCPServer):
    """Takes mail into `got`: (from, to, message); refuses what begins with `refuses`."""
    daemon_threads = allow_reuse_address = True

    def __init__(self, refuses="nothing", context=None):
        super().__init__(("127.0.0.1", 0), SmtpHandler)
        self.got, self.seen, self.refuses, self.context = [], [], refuses, context
        self.port = self.server_address[1]


class SmtpHandler(socketserver.StreamRequestHandler):
    """Speaks as much SMTP as smtplib needs."""

    def handle(self):
        self.say("220 here")
        sender, to = "", []
        while True:
            line = self.rfile.readline().decode().rstrip("\r\n")
            if not line or line == "QUIT":
                return
            self.server.seen.append(line)
            line = line.replace("rcpt TO:", "rcpt to:")  # which Pythons write either way
            if line.upper().startswith(self.server.refuses):
                self.say("554 no\x1b[31m such thing")
            elif line.startswith("ehlo"):
                self.say("250-here")
                self.say("250-STARTTLS" if self.server.context else "250-NOTHING")
                self.say("250 AUTH PLAIN")
            elif line == "STARTTLS":
                self.say("220 go on")
                with contextlib.suppress(OSError):
                    self.server.context.wrap_socket(self.connection, server_side=True)
                return
            elif line.startswith("AUTH"):
                self.say("235 welcome")
            elif line == "data":
                self.say("354 go on")
                lines = iter(self.rfile.readline, b".\r\n")
                self.server.got.append((sender, to, message_from_bytes(
                    b"".join(lines), policy=policy.default)))
                self.say("250 taken")
            else:
                sender, to = (line, to) if line.startswith("mail") else (sender, [*to, line])
                self.say("250 good")

    def say(self, text):
        self.wfile.write(text.encode() + b"\r\n")


@pytest.fixture
def smtp():
    with serving(Smtp()) as server:
        yield server


@JOBS
def test_a_mail_tells_what_failed_and_nothing_slips_into_its_headers(post, smtp, jobs):
    post.set(MAIL_TO="a@example.com, b@example.com", MAIL_FROM="Runs <runs@example.com>",
             SMTP=f"127.0.0.1:{smtp.port}", NAME="sales\r\nBcc: x@example.com")
    assert post.run(jobs=jobs) == []
    (sender, to, message), = smtp.got
    assert "<runs@example.com>" in sender
    assert to == ["rcpt to:<a@example.com>", "rcpt to:<b@example.com>"]
    subject = f"sales Bcc: x@example.com: 1 of 3 tools failed (run {post.run_id})"
    assert message["Subject"].strip() == subject
    assert message["Bcc"] is None and message["From"] == "Runs <runs@example.com>"
    title, line = message.get_content().splitlines()[:2]
    assert title == subject and line.startswith("parse failed: ValueError: no <!channel")


def test_a_mail_server_is_logged_in_to(post, smtp):
    post.set(MAIL_TO="a@example.com", SMTP=f"localhost:{smtp.port}", SMTP_USER="me",
             SMTP_PASSWORD="secret")
    assert post.run() == [] and len(smtp.got) == 1
    assert "AUTH PLAIN AG1lAHNlY3JldA==" in smtp.seen


@pytest.mark.parametrize("refuses", ["MAIL", "RCPT", "DATA", "AUTH"])
def test_a_mail_that_is_refused_is_a_warning_and_the_others_are_told(post, web, refuses):
    web.answers["/hook"] = 200
    with serving(Smtp(refuses)) as server:
        post.set(MAIL_TO="a@example.com", SMTP=f"127.0.0.1:{server.port}", SMTP_USER="me",
                 SMTP_PASSWORD="secret", WEBHOOK=web.url + "/hook")
        warned, = post.run()
    assert warned.startswith("nobody is told by NOTIFY_MAIL_TO: ") and "secret" not in warned
    assert len(web.got) == 1 and server.got == []


def test_a_mail_server_that_says_nothing_is_a_warning(post):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        post.set(MAIL_TO="a@example.com", SMTP=f"127.0.0.1:{listener.getsockname()[1]}")
        warned, = post.run(timeout_s=0.3)
    assert "timed out" in warned


@pytest.mark.parametrize("to", ["a@example.com\nBcc: x@example.com", "\xe4@example.com"])
def test_an_address_that_is_none_is_a_warning(post, smtp, to):
    post.set(MAIL_TO=to, SMTP=f"127.0.0.1:{smtp.port}")
    warned, = post.run()
    assert warned.startswith("nobody is told by NOTIFY_MAIL_TO: ") and smtp.got == []


def test_a_server_elsewhere_gets_no_mail_without_tls(post, smtp):
    # To a name that is not "localhost" itself; it has no STARTTLS.
    post.set(MAIL_TO="a@example.com", SMTP=f"LOCALHOST:{smtp.port}")
    warned, = post.run()
    assert "STARTTLS" in warned and smtp.got == []


@pytest.fixture(scope="module")
def strange(tmp_path_factory):
    """A context for TLS with a certificate that nobody has signed."""
    if not shutil.which("openssl"):
        pytest.skip("openssl makes the certificate")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj",
                    "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
                    "-keyout", "key.pem", "-out", "cert.pem"], cwd=folder, check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context


def test_a_certificate_that_nobody_has_signed_is_refused(post, strange):
    with serving(Smtp(context=strange)) as smtp, Web() as web:
        web.answers["/hook"] = 200
        web.socket = strange.wrap_socket(web.socket, server_side=True)
        with serving(web):
            post.set(MAIL_TO="a@example.com", SMTP=f"LOCALHOST:{smtp.port}",
                     WEBHOOK=web.url.replace("http:", "https:") + "/hook")
            warned = post.run()
    assert len(warned) == 2 and all("CERTIFICATE_VERIFY_FAILED" in each for each in warned)
    assert web.got == smtp.got == []
