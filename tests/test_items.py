"""Items: each is done exactly once, alone in its transaction, and its failures are its own."""
import functools
import json
import re
import sqlite3
import sys
import textwrap
from contextlib import closing

import pytest
from conftest import SQLITE, summary

from orchestrator import UserError, main, run_pipeline

# A tool whose items are in the file `items`, of which those in the file `broken` fail.
TOOL = """
    import json, os, pathlib
    HERE = pathlib.Path(__file__).parent

    def items():
        return [tuple(each) if isinstance(each, list) else each
                for each in json.loads((HERE / "items").read_text())]

    def run(conn, item, context):
        conn.execute("INSERT INTO done VALUES (?, ?, ?, ?)",
                     (context.tool, item, context.attempt, os.getpid()))
        if item in json.loads((HERE / "broken").read_text()):
            raise ValueError("broken " + item)
        return 2
"""
RETRIED = {"t": {"module": "t", "retries": 1, "retry_delay": 0}}  # so that items are given up
both = pytest.mark.parametrize("jobs", [1, 3])
batches = pytest.mark.parametrize("batch", [1, 4])
MODERN = sys.version_info >= (3, 12)
MODES = {"default": {}, "none": {"isolation_level": None},
         "immediate": {"isolation_level": "IMMEDIATE"}}
if MODERN:
    MODES.update({"autocommit": {"autocommit": True}, "pep249": {"autocommit": False}})
modes = pytest.mark.parametrize("mode", MODES)


class World:
    """A pipeline over data.db in a folder, run in this process; `events` are of the last run."""

    def __init__(self, folder):
        self.folder, self.events, self.mode = folder, [], {"timeout": 20}
        self.has_database = True
        self.home = str(folder / "home")
        with closing(sqlite3.connect(folder / "data.db")) as conn:
            conn.execute("PRAGMA journal_mode=WAL")
            conn.execute("CREATE TABLE done (tool, item, attempt, pid)")
        self.set("broken")
        self.tool("t", TOOL)

    def set(self, file, *names):
        """Write the names of items into a file that tools read."""
        (self.folder / file).write_text(json.dumps(names))

    def tool(self, name, source):
        """Write a module, which may be imported already."""
        (self.folder / f"{name}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        sys.modules.pop(name, None)

    def connect(self):
        return sqlite3.connect(self.folder / "data.db", **self.mode) if self.has_database else None

    def run(self, *items, tools=None, targets=(), **how):
        """Run tools, by default `t` alone, with items where some are given."""
        if items:
            self.set("items", *items)
        self.events = []
        how.setdefault("home", self.home)
        return run_pipeline(targets, tools or {"t": "t"}, None, self.find_get_connection(),
                            name="p", on_event=self.events.append, **how)

    def find_get_connection(self):
        """Return self.connect, if a test has set it, or what does the same and workers import
        without importing this file.
        """
        if not self.has_database or "connect" in vars(self):
            return self.connect
        return functools.partial(sqlite3.connect, self.folder / "data.db", **self.mode)

    def query(self, sql, *values):
        with closing(sqlite3.connect(self.folder / "data.db")) as conn:
            return conn.execute(sql, values).fetchall()

    def done(self, tool="t"):
        """Return the items whose work is there, in the order in which they were done."""
        return [item for item, in self.query("SELECT item FROM done WHERE tool = ? ORDER BY rowid",
                                             tool)]

    def ledger(self, tool="t"):
        """Return how each item ended, by name: status and tries."""
        return {item: (status, attempts) for item, status, attempts in self.query(
            "SELECT item, status, attempts FROM orchestrator_items WHERE tool = ?", tool)}

    def said(self):
        """Return all that was logged in the last run."""
        return "\n".join(event.text for event in self.events if event.kind == "log")


def open_world(tmp_path, monkeypatch):
    """Yield a World whose folder is on the path and the working directory."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield World(tmp_path)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def world(tmp_path, monkeypatch):
    yield from open_world(tmp_path, monkeypatch)


# --- each once ---


@both
@batches
def test_each_item_is_done_once_and_not_again(world, jobs, batch):
    tools = {"t": {"module": "t", "batch": batch}}
    names = [f"{i:02d}" for i in range(30)]
    result = world.run(*names, tools=tools, jobs=jobs)
    assert result.status == "success"
    assert result.results["t"] == {"items": 30, "failed": 0, "rows": 60}
    assert result.outcomes["t"].rows == 60
    assert sorted(world.done()) == names
    assert jobs > 1 or world.done() == names
    for again in ({}, {"force": True}, {"resume": False}):
        result = world.run(tools=tools, jobs=jobs, **again)
        assert result.status == "success"
        assert result.results["t"] == {"items": 0, "failed": 0, "rows": 0}
        assert result.outcomes["t"].reason == "none of 30 items is pending"
    assert len(world.done()) == 30
    world.run(*names, "new", tools=tools, jobs=jobs)
    assert world.done()[30:] == ["new"]


def test_a_tool_without_any_items_succeeds_and_says_so(world):
    world.set("items")
    result = world.run()
    assert (result.status, result.outcomes["t"].reason) == ("success", "no items")


@pytest.mark.parametrize("body", [
    "return ['a', 'b']", "yield 'a'\n    yield 'b'", "return iter(('a', 'b'))",
    "return \"SELECT 'a' UNION ALL SELECT 'b'\"", "return [('a', 1), ('b', 2)]",
    "return (row[0] for row in conn.execute(\"SELECT 'a' UNION ALL SELECT 'b'\"))",
    "yield 'a'\n    yield 'b'\n    raise SystemExit", "yield 'a'\n    yield 'b'\n    exit(0)"])
def test_items_may_be_found_in_many_ways(world, body):
    world.tool("t", TOOL.replace("def items():", "def items(conn):\n        "
                                 + body.replace("\n", "\n    ") + "\n    def unused():"))
    assert world.run("-").status == "success"
    assert world.done() == ["a", "b"]


def test_items_may_be_awaited_and_run_and_check_too(world):
    world.tool("t", """
        import asyncio
        async def items(conn):
            await asyncio.sleep(0)
            return ["a", "b"]
        async def run(conn, item):
            await asyncio.sleep(0)
            conn.execute("INSERT INTO done VALUES ('t', ?, 0, 0)", (item,))
        async def check(item):
            await asyncio.sleep(0)
            if item == "b":
                raise ValueError("not good")
    """)
    assert world.run().partial == ["t"]
    assert world.done() == ["a"]


@pytest.mark.parametrize("body, problem", [
    ("return None", "items() returned a NoneType; it returns a list of names, or yields them, or "),
    ("return 3", "items() returned an int"),
    ("return b'ab'", "items() returned a bytes"),
    ("return 'a.csv'", "a text that is no SELECT: 'a.csv'; for a single item, return a list"),
    ("return ['a', None]", "items() gave None as item 2; an item"),
    ("return [['a', 'v']]", "gave ['a', 'v'] as item 1; an item is a name, or a tuple of name"),
    ("return ['a', 1.5]", "gave 1.5 as item 2;"),
    ("yield 'a'\n    raise KeyError('k')", "KeyError: 'k'"),
    ("raise SystemExit(3)", "sys.exit(3)"),
    ("yield 'a'\n    raise SystemExit('so')", "sys.exit('so')"),
    ("async def more():\n        yield 'a'\n    return more()", "an async_generator"),
    ("return 'SELECT 1, 2, 3'", "3 columns"),
])
@both
def test_what_can_not_be_listed_fails_the_tool_and_nothing_is_done(world, body, problem, jobs):
    world.tool("t", f"""
        def items(conn):
            {textwrap.indent(body, " " * 8).strip()}
        def run(conn, item):
            conn.execute("INSERT INTO done VALUES ('t', ?, 0, 0)", (item,))
    """)
    result = world.run(jobs=jobs)
    assert result.failed == ["t"]
    assert problem in result.errors["t"]
    assert world.done() == []
    assert world.ledger() == {}


@both
def test_items_of_another_pipeline_are_told_before_any_is_done_again(world, jobs):
    """As when its file has another name now."""
    def texts(name):
        heard = []
        count = len(world.done())

        def hear(event):
            if event.kind == "log":
                assert len(world.done()) == count
                heard.append(event.text)
        result = run_pipeline(["t"], {"t": "t"}, None, world.find_get_connection(), name=name,
                              home=world.home, jobs=jobs, on_event=hear)
        assert result.status == "success"
        return heard

    world.set("items", "a", "b")
    assert texts("p") == []
    assert texts("q") == ["the ledger has items of this tool in pipeline 'p', none in 'q', so that "
                          "all are done: NAME says which it is"]
    assert sorted(world.done()) == ["a", "a", "b", "b"]
    assert texts("q") == [] and texts("p") == []


# --- setup() ---

SETUP = """
    {is_async}def setup(conn, context, **kwargs):
        assert "item" not in kwargs and context.item is None
        conn.execute("INSERT INTO done VALUES ('setup', ?, 0, 0)", (context.tool,))
        {then}
    def items(conn):
        assert conn.execute("SELECT count(*) FROM done WHERE tool = 'setup'").fetchone() == (1,)
        conn.rollback()
        return ["a", "b", "c"]
    def run(conn, item):
        conn.execute("INSERT INTO done VALUES ('t', ?, 0, 0)", (item,))
"""


@pytest.mark.parametrize("is_async", ["", "async "])
@both
def test_setup_is_called_once_before_items_and_committed_by_itself(world, is_async, jobs):
    world.tool("t", SETUP.format(is_async=is_async, then=""))
    assert world.run(jobs=jobs).succeeded == ["t"]
    assert world.done("setup") == ["t"] and sorted(world.done()) == ["a", "b", "c"]


@pytest.mark.parametrize("then, problem", [
    ("raise KeyError('k')", "in setup(): KeyError: 'k'"),
    ("raise SystemExit(3)", "in setup(): sys.exit(3)"),
    ("return False", "in setup(): setup() returned False"),
])
@both
def test_a_setup_that_fails_fails_the_tool_and_is_undone(world, then, problem, jobs):
    world.tool("t", SETUP.format(is_async="", then=then))
    result = world.run(jobs=jobs)
    assert result.failed == ["t"] and problem in result.errors["t"]
    assert world.query("SELECT * FROM done") == [] and world.ledger() == {}


def test_a_setup_that_exits_with_0_has_done_its_work(world):
    world.tool("t", SETUP.format(is_async="", then="raise SystemExit"))
    assert world.run().succeeded == ["t"]
    assert world.done("setup") == ["t"]


@both
def test_setup_of_a_tool_without_items_stays_when_its_run_fails(world, jobs):
    world.tool("t", """
        def setup(conn):
            conn.execute("INSERT INTO done VALUES ('t', 'setup', 0, 0)")
        def run(conn):
            conn.execute("INSERT INTO done VALUES ('t', 'run', 0, 0)")
            raise ValueError
    """)
    tools = {"t": {"module": "t", "retries": 1, "retry_delay": 0}}
    assert world.run(jobs=jobs, tools=tools).failed == ["t"]
    assert world.done() == ["setup", "setup"]  # once in each attempt


def test_setup_waits_for_who_else_writes_though_its_tool_has_no_items(world):
    world.mode = {"timeout": 0}
    world.tool("t", """
        import sqlite3
        others = []
        def setup(conn):
            if not others:
                others.append(sqlite3.connect(conn.execute("PRAGMA database_list").fetchone()[2]))
                others[0].execute("BEGIN IMMEDIATE")
                try:
                    conn.execute("INSERT INTO done VALUES ('t', 'setup', 0, 0)")
                finally:
                    others[0].close()
            conn.execute("INSERT INTO done VALUES ('t', 'setup', 0, 0)")
        def run(conn):
            pass
    """)
    assert world.run().succeeded == ["t"]
    assert world.done() == ["setup"]


@pytest.mark.parametrize("source, problem", [
    ("def setup(conn, item): pass", "setup() of t asks for 'item', but it is called before"),
    ("def setup(conn, nosuch): pass", "setup() of t asks for 'nosuch', which nothing gives"),
    ("setup = 'CREATE TABLE t (x)'", "setup of t is a str, not a function"),
])
@pytest.mark.parametrize("items", ["def items(): return ['a']\ndef run(item): pass",
                                   "def run(conn): pass"])
def test_a_setup_that_can_not_be_called_is_refused_before_anything_runs(world, source, problem,
                                                                        items):
    world.tool("t", f"{source}\n{items}")
    with pytest.raises(UserError) as caught:
        world.run()
    assert problem in str(caught.value)


# --- names that can not be kept ---

@pytest.mark.parametrize("bad, said", [
    ("'b\\0c'", "'b\\x00c': its name can not be kept: one has 1 to 500 letters, none of them NUL"),
    ("'\\ud800'", "'\\ud800': its name is no text that a database keeps: rename the file, or"),
    ("b'\\xff'", "'\\udcff': its name is no text"),
    ("'x' * 501", "x" * 60 + "...: its name can not be kept: one has 1 to 500"),
    ("''", "'': its name can not be kept: one has 1 to 500"),
    ("('b', 'v' * 501)", "b: its version can not be kept: one has 0 to 500 letters, none of"),
    ("('b', '\\ud800')", "b: its version is no text that a database keeps: give it another one"),
])
@both
def test_a_name_that_can_not_be_kept_fails_that_item_alone(world, bad, said, jobs):
    world.tool("t", f"""
        def items(conn):
            return ["a", {bad}, "c"]
        def run(conn, item):
            conn.execute("INSERT INTO done VALUES ('t', ?, 0, 0)", (item,))
    """)
    for times in range(2):
        result = world.run(jobs=jobs)
        assert result.partial == ["t"] if not times else result.failed == ["t"]
        assert said in result.errors["t"] and said in world.said()
        assert result.outcomes["t"].items == {
            "listed": 3, "given_up": 0, "pending": 3 - 2 * times, "passed": 2 - 2 * times,
            "failed": 1, "elsewhere": 0, "unfit": 1}
    assert sorted(world.done()) == ["a", "c"]
    assert world.run("c", item="c", jobs=jobs).succeeded == ["t"]


@pytest.mark.parametrize("bad, again", [("", ["--resume"]),
                                        ("b", ["--resume", "--retry-items", "t"])])
def test_items_that_can_not_be_kept_are_not_told_to_be_tried_again(quick, bad, again):
    quick.pipeline('TOOL_MAP = {"t": "t"}').tool("t", f"""
        def items(): return ["a", "", {bad!r}]
        def run(item): assert item == "a"
    """)
    ended = quick.run()
    assert ended.code == 1 and ended.err.split("orchestrator.py ")[1].split() == again, ended


@pytest.mark.parametrize("select", ["SELECT ''", "SELECT NULL", "SELECT 'a' || char(0) || 'b'",
                                    "SELECT x'ff'"])
def test_a_select_of_a_name_that_can_not_be_kept_fails_that_alone(world, select):
    world.tool("t", f"def items(): return \"SELECT 'a' UNION ALL {select}\"\ndef run(item): pass")
    assert world.run().partial == ["t"]
    assert world.ledger() == {"a": ("success", 1)}


def test_a_name_that_can_not_be_kept_is_counted_once_in_all_attempts(world):
    world.tool("t", """
        def items():
            return ["a", "b", ""]
        def run(conn, item, context):
            import pathlib
            if item == "b" and not pathlib.Path("tried").exists():
                pathlib.Path("tried").touch()
                raise OSError(28, "full")
    """)
    result = world.run(tools={"t": {"module": "t", "retries": 2, "retry_delay": 0}})
    assert result.partial == ["t"]
    assert result.outcomes["t"].reason == "1 of 3 items failed"


def test_no_items_by_sys_exit_is_no_failure(world):
    world.tool("t", "import sys\ndef items(): sys.exit()\ndef run(item): raise ValueError")
    result = world.run()
    assert (result.status, result.outcomes["t"].reason) == ("success", "no items")


def test_what_items_wrote_stays(world):
    world.tool("t", """
        def items(conn):
            conn.execute("INSERT INTO done VALUES ('items', 'listed', 0, 0)")
            return ["a"]
        def run(conn, item):
            raise ValueError("no")
    """)
    world.run()
    assert world.done("items") == ["listed"]


def test_two_tools_may_each_yield_from_a_cursor_of_one_connection(world):
    source = """
        def items(conn):
            return (row[0] for row in conn.execute("SELECT item FROM done WHERE tool = 'src'"))
        def run(conn, item, context):
            conn.execute("INSERT INTO done VALUES (?, ?, 0, 0)", (context.tool, item))
    """
    world.tool("t", source)
    world.tool("first", """
        def run(conn):
            conn.executemany("INSERT INTO done VALUES ('src', ?, 0, 0)", [("a",), ("b",)])
    """)
    assert world.run(tools={"first": "first", "t": "t", "u": "t"}).status == "success"
    assert world.done("t") == world.done("u") == ["a", "b"]


@both
def test_ten_thousand_items_are_all_done_and_in_order_by_one(world, jobs):
    world.tool("t", """
        import os
        def items():
            return [f"{i:05d}" for i in range(10_500)]
        def run(conn, item):
            conn.execute("INSERT INTO done VALUES ('t', ?, 0, ?)", (item, os.getpid()))
    """)
    tools = {"t": {"module": "t", "batch": 250}}
    result = world.run(tools=tools, jobs=jobs)
    names = [f"{i:05d}" for i in range(10_500)]
    assert result.results["t"] == {"items": 10_500, "failed": 0, "rows": 0}
    assert (world.done() if jobs == 1 else sorted(world.done())) == names
    assert len(set(world.query("SELECT pid FROM done"))) == jobs


# --- what run() is given, and what it does ---


def test_the_context_tells_item_and_try(world):
    world.tool("t", """
        def items(context):
            assert context.item is None
            return ["a", "b"]
        def run(conn, context, **others):
            assert context.item == others["item"]
            if context.attempt < 3:
                raise ValueError(f"try {context.attempt}")
            conn.execute("INSERT INTO done VALUES ('t', ?, ?, 0)", (context.item, context.attempt))
    """)
    result = world.run(tools={"t": {"module": "t", "retries": 2, "retry_delay": 0}})
    assert result.status == "success"
    assert world.query("SELECT item, attempt FROM done") == [("a", 3), ("b", 3)]


@pytest.mark.parametrize("run, check, ended", [
    ("sys.exit()", "pass", "success"), ("sys.exit(0)", "pass", "success"),
    ("sys.exit(2)", "pass", "failed"), ("sys.exit('no')", "pass", "failed"),
    ("pass", "sys.exit()", "failed"), ("pass", "sys.exit(2)", "failed"),
    ("pass", "assert item != 'b', 'not good'", "failed"),
    ("return [1 for row in ()]", "pass", "success"),
    ("return (1 for row in ())", "pass", "success"),
    ("raise BaseException('odd')", "pass", "failed"),
    ("raise GeneratorExit", "pass", "failed")])
@batches
def test_an_item_that_exits_or_is_rejected_fails_alone(world, run, check, ended, batch):
    world.tool("t", f"""
        import sys
        def items():
            return ["a", "b", "c"]
        def run(conn, item):
            conn.execute("INSERT INTO done VALUES ('t', ?, 0, 0)", (item,))
            if item == "b":
                {run}
        def check(conn, item):
            if item == "b":
                {check}
    """)
    result = world.run(tools={"t": {"module": "t", "batch": batch}})
    assert result.status == ("success" if ended == "success" else "failed")
    assert world.done() == (["a", "b", "c"] if ended == "success" else ["a", "c"])
    assert world.ledger() == {"a": ("success", 1), "b": (ended, 1), "c": ("success", 1)}


def test_a_run_that_yields_is_refused_for_each_item(world):
    world.tool("t", "def items(): return ['a']\ndef run(item): yield 1")
    assert "take the `yield` out" in world.run().errors["t"]


# --- what ends a transaction is refused ---

ENDINGS = {
    "commit()": "conn.commit()", "rollback()": "conn.rollback()", "with": "with conn: pass",
    "with and an error": "with conn: raise KeyError('k')",
    "executescript": "conn.executescript('SELECT 1;')",
    "a COMMIT in executescript": "conn.executescript('SELECT 1; COMMIT;')",
    **{sql: f"conn.execute({sql!r})" for sql in ("COMMIT", "commit", "END", "ROLLBACK", "BEGIN",
                                                 "BEGIN IMMEDIATE", "  Commit ;")},
}
HARMLESS = {  # in these modes nothing happens, or all stays in the transaction
    "none": (), "default": (), "immediate": (), "pep249": ("executescript",),
    "autocommit": ("commit()", "rollback()", "with", "executescript"),
}
REFUSING = """
    HOW = {how!r}
    def items(): return ["a", "b", "c"]
    def end(conn, item, where):
        if item == "b" and where == {where!r}:
            try:
                {ending}
            except {caught}:
                pass
    def run(conn, item):
        conn.execute("INSERT INTO done VALUES ('t', ?, 1, 0)", (item,))
        end(conn, item, "run")
        conn.execute("INSERT INTO done VALUES ('t', ?, 2, 0)", (item,))
    def check(conn, item):
        end(conn, item, "check")
"""


def refusing(how, where="run", is_swallowed=False):
    return REFUSING.format(how=how, where=where, ending=ENDINGS[how],
                           caught="Exception" if is_swallowed else "ZeroDivisionError")


def check_refused(world, result, how, mode, is_swallowed=True):
    """See that only what `b` did is missing, and why."""
    if how in HARMLESS[mode]:
        assert result.status == "success"
        assert world.done() == ["a", "a", "b", "b", "c", "c"]
        return
    assert result.partial == ["t"]
    if how == "with and an error" and mode == "autocommit":
        assert "KeyError: 'k'" in result.errors["t"] or is_swallowed
        return
    assert re.search(r"b: PermissionError: (COMMIT|ROLLBACK|BEGIN) was refused inside an item, "
                     r"which the engine commits: take conn.commit\(\), conn.rollback\(\), "
                     r"`with conn:` and executescript\(\) out", result.errors["t"])
    assert world.done() == ["a", "a", "c", "c"]
    assert world.ledger() == {"a": ("success", 1), "b": ("failed", 1), "c": ("success", 1)}


@modes
@pytest.mark.parametrize("how", ENDINGS)
def test_to_end_the_transaction_of_an_item_is_refused(world, how, mode):
    world.mode = MODES[mode]
    world.tool("t", refusing(how))
    check_refused(world, world.run(), how, mode, is_swallowed=False)


@modes
@pytest.mark.parametrize("where, batch", [("run", 1), ("check", 4)])
@pytest.mark.parametrize("how", ["commit()", "with", "executescript", "COMMIT", "ROLLBACK"])
def test_an_item_fails_that_swallowed_the_refusal(world, how, where, batch, mode):
    world.mode = MODES[mode]
    world.tool("t", refusing(how, where, is_swallowed=True))
    check_refused(world, world.run(tools={"t": {"module": "t", "batch": batch}}), how, mode)


@modes
@pytest.mark.parametrize("how", ["COMMIT", "END", "ROLLBACK", "commit"])
def test_what_was_prepared_before_the_item_is_refused_too(world, how, mode, monkeypatch):
    """In get_connection() and in an earlier tool of the same connection."""
    world.mode = MODES[mode]
    connect = world.connect

    def connect_and_end():
        conn = connect()
        for _ in range(3):
            if not conn.in_transaction:
                conn.execute("BEGIN")
            conn.execute(how)
        if MODES[mode].get("autocommit") is False:
            conn.execute("BEGIN")
        return conn

    world.connect = connect_and_end
    world.tool("t", refusing(how, is_swallowed=True))
    world.tool("plain", f"""
        def run(conn):
            for _ in range(3):
                if not conn.in_transaction:
                    conn.execute("BEGIN")
                conn.execute({how!r})
    """)
    result = world.run(tools={"plain": "plain", "t": "t", "again": "plain", "u": "t"})
    assert result.partial == ["t", "u"]
    for tool in ("t", "u"):
        assert "refused inside an item" in result.errors[tool]
    assert world.done() == ["a", "a", "c", "c"] * 2


@modes
def test_a_plain_tool_may_commit_on_the_connection_of_items(world, mode):
    world.mode = MODES[mode]
    world.tool("plain", """
        def run(conn):
            conn.execute("INSERT INTO done VALUES ('plain', 'a', 1, 0)")
            conn.commit()
            if conn.in_transaction:
                conn.execute("COMMIT")
            conn.execute("BEGIN")
            conn.execute("INSERT INTO done VALUES ('plain', 'b', 1, 0)")
            conn.execute("ROLLBACK")
            if getattr(conn, "autocommit", -1) is False:
                conn.execute("BEGIN")
            conn.executescript("INSERT INTO done VALUES ('plain', 'c', 1, 0);")
            raise ValueError("no")
    """)
    world.run("x", tools={"t": "t", "plain": "plain"})
    assert world.done() == ["x"]
    assert "a" in world.done("plain") and "b" not in world.done("plain")


@modes
@batches
def test_an_item_may_have_savepoints_of_its_own(world, mode, batch):
    world.mode = MODES[mode]
    world.tool("t", """
        def items(): return ["a", "b", "c"]
        def run(conn, item):
            conn.execute("SAVEPOINT own")
            conn.execute("INSERT INTO done VALUES ('t', ?, 1, 0)", ("not " + item,))
            conn.execute("ROLLBACK TO own")
            conn.execute("INSERT INTO done VALUES ('t', ?, 1, 0)", (item,))
            if item != "c":
                conn.execute("RELEASE own")
            if item == "b":
                raise ValueError
    """)
    assert world.run(tools={"t": {"module": "t", "batch": batch}}).partial == ["t"]
    assert world.done() == ["a", "c"]


@modes
@batches
@pytest.mark.parametrize("is_swallowed", [False, True])
def test_an_item_fails_whose_transaction_sqlite_undid(world, mode, batch, is_swallowed):
    world.mode = MODES[mode]
    world.tool("t", f"""
        import sqlite3
        def items(): return ["a", "b", "c"]
        def run(conn, item, context):
            conn.execute("CREATE TABLE IF NOT EXISTS once (x UNIQUE)")
            conn.execute("INSERT INTO done VALUES ('t', ?, 1, 0)", (item,))
            try:
                if item == "b" and context.attempt == 1:
                    for _ in range(2):
                        conn.execute("INSERT OR ROLLBACK INTO once VALUES (1)")
            except {'sqlite3.IntegrityError' if is_swallowed else 'ZeroDivisionError'}:
                pass
    """)
    options = {"module": "t", "batch": batch, "retries": 1, "retry_delay": 0}
    result = world.run(tools={"t": options})
    assert result.status == "success", result
    assert sorted(world.done()) == ["a", "b", "c"]
    assert world.ledger() == {"a": ("success", 1), "b": ("success", 2), "c": ("success", 1)}
    assert "may have been done" not in world.said()


@modes
@batches
def test_of_a_failed_item_nothing_stays_also_not_its_tables(world, mode, batch):
    world.mode = MODES[mode]
    world.tool("t", """
        def items(): return ["a", "b", "c"]
        def run(conn, item):
            conn.execute(f"CREATE TABLE of_{item} AS SELECT 1 AS x")
            conn.execute("INSERT INTO done VALUES ('t', ?, 1, 0)", (item,))
            if item == "b":
                raise ValueError
    """)
    assert world.run(tools={"t": {"module": "t", "batch": batch}}).partial == ["t"]
    assert world.done() == ["a", "c"]
    assert world.query("SELECT name FROM sqlite_master WHERE name LIKE 'of%'") == [("of_a",),
                                                                                  ("of_c",)]


@modes
def test_a_tool_that_says_commits_may_end_its_transactions(world, mode):
    world.mode = MODES[mode]
    world.tool("t", """
        def items(): return ["a", "b", "c"]
        def run(conn, item):
            conn.execute("INSERT INTO done VALUES ('t', ?, 1, 0)", (item,))
            conn.commit()
            conn.execute("INSERT INTO done VALUES ('t', ?, 2, 0)", (item,))
            if item == "b":
                raise ValueError("late")
            with conn:
                pass
    """)
    result = world.run(tools={"t": {"module": "t", "commits": True, "batch": 3}})
    assert result.partial == ["t"]
    assert world.ledger() == {"a": ("success", 1), "b": ("failed", 1), "c": ("success", 1)}
    left = world.query("SELECT attempt FROM done WHERE item = 'b'")
    assert left == ([(1,), (2,)] if mode in ("none", "autocommit") else [(1,)])


def test_a_tool_that_says_commits_may_vacuum(world):
    world.tool("t", "def items(): return ['a', 'b']\ndef run(conn, item): conn.execute('VACUUM')")
    assert world.run(tools={"t": {"module": "t", "commits": True}}).status == "success"


# --- what is refused before anything has run ---


@pytest.mark.parametrize("source, options, problem", [
    ("def items(): return []\ndef run(conn): pass", {},
     "run() of m is called once per item, but does not take it"),
    ("def run(conn): pass", {"batch": 5}, "'batch' is for tools with items, and m has no"),
    ("def items(): return []\ndef run(item): pass", {"cache": True}, "'cache' is not for tools"),
    ("def items(): return []\ndef run(item): pass", {"each": "first"},
     "its items are those of 'first', but m has a function items() too"),
    ("def run(item): pass", {"each": "plain"}, "'each' is 'plain', which has no items"),
    ("def run(conn, item): pass", {}, "item"),
    ("def items(item): return []\ndef run(item): pass", {}, "item"),
    ("def items(): return []\ndef run(item): pass", {"batch": 0}, "batch"),
    ("def run(item): pass", {"each": "m"}, "m"),
    ("def run(item): pass", {"each": "nothing"}, "nothing"),
])
def test_misuse_is_refused_before_anything_has_run(world, source, options, problem):
    world.tool("m", source)
    world.tool("plain", "def run(conn):\n    conn.execute(\"INSERT INTO done VALUES (1,1,1,1)\")")
    with pytest.raises(UserError) as caught:
        world.run("a", tools={"plain": "plain", "first": "t", "m": {"module": "m", **options}})
    assert problem in str(caught.value)
    assert world.query("SELECT * FROM done") == []


@pytest.mark.parametrize("options, problem", [
    ({"cache": True}, "'cache' is not for tools"), ({"each": "a"}, "a function items() too")])
def test_misuse_is_refused_also_if_another_tool_uses_the_module_well(world, options, problem):
    with pytest.raises(UserError, match=re.escape(problem)):
        world.run("x", tools={"a": "t", "b": {"module": "t", **options}})


@pytest.mark.parametrize("how, problem", [
    ({"item": "a", "tools": {"t": "t", "u": "t"}}, "--item is for a single tool with items"),
    ({"item": "a", "tools": {"t": "plain"}}, "--item is for a single tool with items"),
    ({"retry_items": {"u": ()}}, "'u' is no tool with items in this plan"),
    ({"retry_items": {"t": ()}, "tools": {"t": "plain"}}, "'t' is no tool with items"),
])
def test_items_are_asked_for_only_of_tools_that_have_some(world, how, problem):
    world.tool("plain", "def run(): pass")
    with pytest.raises(UserError, match=re.escape(problem)):
        world.run("a", **how)
    assert world.done() == []


# --- an item's life ---


@both
@batches
def test_a_failing_item_fails_alone_and_its_tool_is_partial(world, jobs, batch):
    world.set("broken", "b", "d")
    world.tool("sees", "def run(context): return dict(context.results)")
    tools = {"t": {"module": "t", "batch": batch, "needs": []},
             "sees": {"module": "sees", "needs": ["t"]}}
    result = world.run("a", "b", "c", "d", tools=tools, jobs=jobs)
    assert (result.status, result.partial, result.failed) == ("failed", ["t"], [])
    assert result.results["sees"] == {"t": {"items": 2, "failed": 2, "rows": 4}}
    assert re.fullmatch("[bd]: ValueError: broken [bd]", result.errors["t"])
    assert result.outcomes["t"].reason.startswith("2 of 4 items failed: ")
    assert sorted(world.done()) == ["a", "c"]
    assert world.ledger() == {"a": ("success", 1), "b": ("failed", 1), "c": ("success", 1),
                              "d": ("failed", 1)}
    assert "broken b" in world.said() and "broken d" in world.said()


def test_items_given_up_before_change_no_status_but_are_named(world):
    world.set("broken", "b")
    world.run("a", "b", tools=RETRIED)
    result = world.run("a", "b", "c", tools=RETRIED)
    assert result.status == "success"
    before = "1 item given up before: b; --retry-items t tries again"
    assert result.outcomes["t"].reason == f"1 item done; {before}"
    assert result.results["t"] == {"items": 1, "failed": 0, "rows": 2}
    result = world.run(tools=RETRIED)
    assert (result.status, result.outcomes["t"].reason) == (
        "success", f"none of 3 items is pending; {before}")


def test_a_tool_all_of_whose_items_fail_has_failed_and_its_needers_are_skipped(world):
    world.set("broken", "a", "b")
    world.tool("plain", "def run(): pass")
    result = world.run("a", "b", tools={"t": "t", "plain": "plain"})
    assert (result.failed, result.skipped, result.partial) == (["t"], ["plain"], [])
    assert result.errors["t"] == "a: ValueError: broken a"


@both
@batches
def test_tries_are_used_up_in_the_run_after_the_other_items(world, jobs, batch):
    world.tool("t", """
        import time
        def items(): return ["a", "b", "c", "d"]
        def run(conn, item, context):
            with open("tries", "a") as file:
                file.write(item + str(context.attempt) + " ")
            conn.execute("INSERT INTO done VALUES ('t', ?, ?, 0)", (item, context.attempt))
            if item == "b" and context.attempt < 3 or item == "d":
                raise ValueError("no")
    """)
    options = {"module": "t", "batch": batch, "retries": 2, "retry_delay": 0}
    result = world.run(tools={"t": options}, jobs=jobs)
    tries = (world.folder / "tries").read_text().split()
    assert sorted({*tries}) == ["a1", "b1", "b2", "b3", "c1", "d1", "d2", "d3"]
    if jobs == batch == 1:
        assert tries == ["a1", "b1", "c1", "d1", "b2", "d2", "b3", "d3"]
    assert result.partial == ["t"]
    assert world.ledger() == {"a": ("success", 1), "b": ("success", 3), "c": ("success", 1),
                              "d": ("failed", 3)}
    assert sorted(world.query("SELECT item, attempt FROM done")) == [("a", 1), ("b", 3), ("c", 1)]


@batches
def test_an_interrupted_run_leaves_the_tries_that_are_left_to_the_next(world, batch):
    world.tool("t", """
        import signal
        def items(): return ["a", "b", "c"]
        def run(conn, item, context):
            conn.execute("INSERT INTO done VALUES ('t', ?, ?, 0)", (item, context.attempt))
            if item == "a":
                raise ValueError("no")
            if item == "c" and context.run_id == "1":
                raise KeyboardInterrupt
    """)
    options = {"module": "t", "batch": batch, "retries": 1, "retry_delay": 0}
    with pytest.raises(KeyboardInterrupt):
        world.run(tools={"t": options})
    assert world.ledger() == {"a": ("pending", 1), "b": ("success", 1)}
    result = world.run(tools={"t": options})
    assert result.partial == ["t"]
    assert world.ledger() == {"a": ("failed", 2), "b": ("success", 1), "c": ("success", 1)}
    assert world.query("SELECT count(*) FROM orchestrator_items WHERE deaths > 0") == [(0,)]
    assert sorted(world.done()) == ["b", "c"]


def test_a_delay_is_waited_for_while_other_tools_go_on(world):
    """With a delay of an hour, the run would not end; Ctrl-C ends it, and no slip is left."""
    world.set("broken", "a")
    world.tool("plain", "def run():\n    raise KeyboardInterrupt")
    tools = {"t": {"module": "t", "retries": 1, "retry_delay": "1h", "needs": []},
             "plain": {"module": "plain", "needs": []}}
    with pytest.raises(KeyboardInterrupt):
        world.run("a", "b", tools=tools)
    assert world.done() == ["b"]
    assert world.ledger() == {"a": ("pending", 1), "b": ("success", 1)}
    assert "again in 1h 00m" in world.said()


def test_a_failed_item_gets_its_tries_back_by_a_new_version_or_source_or_when_asked_for(world):
    def run(*items, **how):
        return world.run(*items, tools=RETRIED, **how)

    world.set("broken", "b")
    run("a", ["b", 1], "c")
    world.set("broken")
    run()
    assert world.done() == ["a", "c"]
    run("a", ["b", 2])
    assert world.done() == ["a", "c", "b"]

    world.set("broken", "b")
    run(["b", 3])
    world.set("broken")
    world.tool("t", TOOL + "    CHANGED = 1\n")
    run()
    assert world.done() == ["a", "c", "b", "b"]

    world.set("broken", "x", "y", "z")
    run("x", "y", "z")
    world.set("broken")
    assert run(retry_items={"t": ["y"]}).results["t"]["items"] == 1
    assert world.done()[4:] == ["y"]
    assert run(retry_items={"t": []}).results["t"]["items"] == 2
    assert world.done()[5:] == ["x", "z"]


def test_what_is_asked_for_again_but_never_was_given_up_is_told(world):
    world.set("broken", "b")
    world.run("a", "b")
    for name in ("nosuch", "a"):
        with pytest.raises(UserError, match=f"{name} can not be tried again: not given up by t"):
            world.run(retry_items={"t": [name]})
    world.tool("other", "def run(): return 1")
    result = world.run(retry_items={"t": ["a"]}, tools={"other": "other", "t": "t"})
    assert (result.succeeded, result.failed) == (["other"], ["t"])
    assert "a can not be tried again: not given up" in result.errors["t"]


def test_a_version_is_done_once_and_a_former_one_again(world):
    for version, expected in [(1, 1), (1, 1), (2, 2), (2, 2), (1, 3), (1, 3)]:
        world.run(["a", version])
        assert len(world.done()) == expected


def test_only_the_items_that_failed_with_the_new_version_are_not_those_that_passed_before(world):
    world.run(["a", 1])
    world.set("broken", "a")
    assert world.run(["a", 2]).failed == ["t"]
    result = world.run(["a", 1])
    assert result.status == "success" and world.done() == ["a"]


def test_one_item_alone_is_done_when_asked_for_by_name(world):
    result = world.run("a", "b", "c", item="b")
    assert (result.status, world.done()) == ("success", ["b"])
    result = world.run(item="b")
    assert (result.status, world.done()) == ("success", ["b"])
    with pytest.raises(UserError) as caught:
        world.run(item="nosuch")
    assert "there is no item 'nosuch' among the 3 that are listed" in str(caught.value)
    assert "Known: a, b, c" in str(caught.value)
    world.set("broken", "c")
    world.run(item="c")
    world.set("broken")
    assert world.run(item="c").status == "success"  # to ask for it by name is to ask for it
    assert world.done() == ["b", "c"]


def test_each_takes_what_passed_with_its_version(world):
    tools = {"t": {"module": "t"}, "load": {"module": "load", "each": "t"}}
    world.tool("load", """
        def run(conn, item, context):
            conn.execute("INSERT INTO done VALUES ('load', ?, 0, 0)", (item,))
    """)
    world.set("broken", "b")
    result = world.run(["a", 1], ["b", 1], ["c", 1], tools=tools)
    assert (result.partial, result.succeeded) == (["t"], ["load"])
    assert world.done("load") == ["a", "c"]
    world.set("broken")
    world.run(["a", 2], ["b", 2], tools=tools)
    assert world.done("load") == ["a", "c", "a", "b"]
    assert world.run(tools=tools).results["load"]["items"] == 0


def test_a_resumed_run_does_what_needs_the_items_that_pass_now(world):
    tools = {"t": {"module": "t"}, "load": {"module": "load", "each": "t"}}
    world.tool("load", """
        def run(conn, item, context):
            conn.execute("INSERT INTO done VALUES ('load', ?, 0, 0)", (item,))
    """)
    world.set("broken", "b")
    world.run("a", "b", tools=tools)
    world.set("broken")
    result = world.run(tools=tools, resume=True, retry_items={"t": ()})
    assert result.status == "success"
    assert world.done("load") == ["a", "b"]


def test_a_stop_after_a_partial_tool_is_a_stop(world):
    world.set("broken", "b")
    world.tool("plain", "def run(): pass")
    tools = {"t": {"module": "t", "needs": [], "on_failure": "stop"},
             "plain": {"module": "plain", "needs": ["t"]}}
    assert world.run("a", "b", tools=tools).skipped == ["plain"]


# --- batches ---


DEFERRED = """
    def items(): return ["a", "b", "c", "d", "e"]
    def run(conn, item):
        conn.execute("CREATE TABLE IF NOT EXISTS parent (x PRIMARY KEY)")
        conn.execute("CREATE TABLE IF NOT EXISTS child "
                     "(x REFERENCES parent DEFERRABLE INITIALLY DEFERRED)")
        conn.execute("INSERT INTO done VALUES ('t', ?, 0, 0)", (item,))
        if item in "bd":
            conn.execute("INSERT INTO child VALUES (1)")
"""


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_a_commit_that_fails_is_charged_to_those_whose_fault_it_is(world, batch):
    world.tool("t", DEFERRED)
    connect = world.connect

    def with_keys():
        conn = connect()
        conn.execute("PRAGMA foreign_keys = ON")
        return conn

    world.connect = with_keys
    result = world.run(tools={"t": {"module": "t", "batch": batch}})
    assert result.partial == ["t"]
    assert result.results["t"] == {"items": 3, "failed": 2, "rows": 0}
    assert "at the commit: IntegrityError: FOREIGN KEY" in result.errors["t"]
    assert world.done() == ["a", "c", "e"]
    assert world.ledger()["b"] == world.ledger()["d"] == ("failed", 1)


@pytest.mark.parametrize("batch", [1, 3, 2500])
def test_a_batch_is_one_transaction(world, batch):
    world.tool("t", f"""
        def items(): return [str(i) for i in range({2 * batch + 1})]
        def run(conn, item): conn.execute("INSERT INTO done VALUES ('t', ?, 0, 0)", (item,))
    """)
    counts = []

    class Counted(sqlite3.Connection):
        def commit(self):
            counts.append(self.execute("SELECT count(*) FROM done").fetchone()[0])
            super().commit()

    world.mode = {"factory": Counted}
    world.run(tools={"t": {"module": "t", "batch": batch}})
    assert sorted({*counts} - {0}) == [batch, 2 * batch, 2 * batch + 1]


@both
def test_the_items_of_a_batch_that_failed_are_tried_alone_which_counts_one_try(world, jobs):
    world.tool("t", """
        def items(): return ["a", "b", "c"]
        def run(conn, item, context):
            with open("calls", "a") as file:
                file.write(item + str(context.attempt) + " ")
            if item == "b" and context.attempt == 1:
                raise ValueError
    """)
    options = {"module": "t", "batch": 3, "retries": 1, "retry_delay": 0}
    world.run(tools={"t": options}, jobs=jobs)
    calls = (world.folder / "calls").read_text().split()
    assert sorted({*calls}) == ["a1", "b1", "b2", "c1"]
    assert calls == ["a1", "b1", "a1", "b1", "c1", "b2"] or jobs > 1
    assert world.ledger()["b"] == ("success", 2)


# --- without a database ---


@both
def test_without_a_database_the_ledger_is_in_the_history(world, jobs):
    world.has_database = False
    world.tool("t", """
        def items(): return ["a", "b"]
        def run(item, conn, context):
            assert conn is None
            with open("calls", "a") as file:
                file.write(item + str(context.attempt) + " ")
            if item == "b" and context.attempt == 1:
                raise ValueError("no")
    """)
    tools = {"t": {"module": "t", "retries": 1, "retry_delay": 0, "batch": 2}}
    for _ in range(2):
        assert world.run(tools=tools, jobs=jobs).status == "success"
        calls = sorted((world.folder / "calls").read_text().split())
        assert calls == ["a1", "b1", "b2"]


@both
def test_without_history_and_database_all_is_done_each_time(world, jobs):
    world.has_database = False
    world.tool("t", """
        def items(): return ["a", "b"]
        def run(item, context):
            with open("calls", "a") as file:
                file.write(item + str(context.attempt) + " ")
            if item == "b" and context.attempt == 1:
                raise ValueError("no")
    """)
    tools = {"t": {"module": "t", "retries": 1, "retry_delay": 0}}
    for times in (1, 2):
        assert world.run(tools=tools, home=None, jobs=jobs).status == "success"
        calls = sorted((world.folder / "calls").read_text().split())
        assert calls == sorted(["a1", "b1", "b2"] * times)


@both
def test_without_history_the_ledger_of_the_database_counts(world, jobs):
    world.run("a", "b", home=None, jobs=jobs)
    world.run("a", "b", "c", home=None, jobs=jobs)
    assert sorted(world.done()) == ["a", "b", "c"]


def test_an_item_that_is_tried_again_on_demand_stays_pending_if_that_is_cut_off(world):
    world.set("broken", "b")
    world.run("a", "b")
    world.tool("t", """
        def items(): return ["a", "b"]
        def run(item): raise KeyboardInterrupt
    """)
    with pytest.raises(KeyboardInterrupt):
        world.run(retry_items={"t": ["b"]})
    assert world.ledger()["b"] == ("pending", 0)


# --- on the command line ---

CLI_TOOL = """
    import json, pathlib
    HERE = pathlib.Path(__file__).parent
    def items():
        return json.loads((HERE / "items").read_text())
    def run(conn, item, context):
        conn.execute("CREATE TABLE IF NOT EXISTS done (tool, item)")
        conn.execute("INSERT INTO done VALUES (?, ?)", (context.tool, item))
        if item in json.loads((HERE / "broken").read_text()):
            raise ValueError("broken " + item)
        return 2
"""


@pytest.fixture
def line(quick):
    """A sandbox with a tool `t` that has items, and `after`, which needs it."""
    quick.pipeline('TOOL_MAP = {"t": {"module": "t"}, "after": "after"}\nSTAGES = {}\n' + SQLITE)
    quick.tool("t", CLI_TOOL).tool("after", "def run(context): print(context.results['t'])")

    def set_items(*names, broken=()):
        (quick.folder / "items").write_text(json.dumps(names))
        (quick.folder / "broken").write_text(json.dumps(broken))

    def retry():
        """Give the tool a retry, so that its items are given up when that is used up."""
        quick.pipeline(f'TOOL_MAP = {{**{RETRIED}, "after": "after"}}\nSTAGES = {{}}\n' + SQLITE)

    quick.set, quick.retry = set_items, retry
    set_items("a", "b c", "d", broken=["b c"])
    return quick


def done_of(line):
    return [item for item, in line.query("SELECT item FROM done ORDER BY rowid")]


def words_of(line):
    """Return the words behind the file in the command that is proposed."""
    ended = line.run()
    command = re.search(r"^Next: \S+ \S+orchestrator.py (.*)$", ended.err, re.M)
    return ended, command and command[1].split()


def test_a_partial_run_says_so_and_what_to_type_next(line):
    ended, words = words_of(line)
    assert ended.code == 1
    assert re.search(r"^t +partial +4 .*'b c': ValueError: broken b c, 1 of 3 items failed$",
                     ended.err, re.M)
    assert summary(ended.err)["after"].split()[:2] == ["after", "success"]
    assert "'items': 2, 'failed': 1, 'rows': 4" in ended.out
    assert "failed: 1 of 2 tools done" in ended.err
    assert words == ["--resume", "--retry-items", "t"]
    assert 'raise ValueError("broken " + item)' in ended.err

    line.set("a", "b c", "d")
    ended = line.run(*words)
    assert ended.code == 0, ended
    assert sorted(done_of(line)) == ["a", "b c", "d"]
    assert "Next:" not in ended.err


def test_the_status_shows_the_items_also_where_items_did_not_come_to_its_end(line):
    before = {"success": 2, "failed": 1, "quarantined": 0, "pending": 0}
    line.run()
    assert statuses(line)["t"] == {**before, "failed": 1, "pending": statuses(line)["t"]["pending"]}
    source = line.read("t.py")
    line.tool("t", source + """
    def items(conn):
        if __import__("pathlib").Path("dies").exists():
            __import__("os").kill(__import__("os").getpid(), 9)
        raise ValueError("no list")
    """.replace("\n    ", "\n"))
    assert line.run("t").code == 1
    assert statuses(line)["t"] == before
    (line.folder / "dies").touch()
    assert line.run("t").code != 0
    assert statuses(line)["t"] == before
    assert "2 done, 1 failed" in line.run("--status").out


@pytest.mark.parametrize("words", [("--item", "--", "-x"), ("--item=-x",),
                                   ("--retry-items", "t", "--", "-x", "--", "--jobs", "--force")])
def test_an_item_may_be_called_like_a_flag(line, words):
    line.retry()
    line.set("-x", "--jobs", "c", broken=["-x", "--jobs"])
    assert line.run("t").code == 1
    line.set("-x", "--jobs", "c")
    assert line.run("t", *words).code == 0
    assert "-x" in done_of(line)
    assert [item["item"] for item in json.loads(
        line.run("--items", "t", "--", "-x", "--json").out)["items"]] == ["-x"]


def test_the_next_command_names_an_item_that_is_called_like_a_flag(line):
    line.retry()
    line.set("-x", broken=["-x"])
    line.run("t")
    ended = line.run("t", "--retry-items", "t", "--", "-x")
    assert "--retry-items t -- -x" in ended.err


def test_a_resume_without_that_leaves_what_was_given_up(line):
    line.retry()
    line.run()
    line.set("a", "b c", "d")
    ended = line.run("--resume")
    assert ended.code == 0
    assert "1 item given up before: 'b c'; --retry-items t tries again" in ended.err
    assert done_of(line) == ["a", "d"]
    assert line.run("--retry-items", "t").code == 0
    assert done_of(line) == ["a", "d", "b c"]


def test_items_are_tried_again_by_name_or_all_of_a_tool(line):
    line.retry()
    line.set("a", "b", "c", broken=["a", "b", "c"])
    assert line.run().code == 1
    line.set("a", "b", "c")
    assert line.run("t", "--retry-items", "t", "b").code == 0
    assert done_of(line) == ["b"]
    ended = line.run("t", "--retry-items", "t", "b", "nosuch")
    assert ended.code == 2 and "b, nosuch can not be tried again: not given up" in ended.err
    assert line.run("t", "--retry-items", "t").code == 0
    assert done_of(line) == ["b", "a", "c"]
    ended = line.run("--retry-items", "after")
    assert ended.code == 2 and "'after' is no tool with items" in ended.err


def test_one_item_is_run_by_its_name(line):
    assert line.run("t", "--item", "d").code == 0
    assert done_of(line) == ["d"]
    assert line.run("t", "--item", "b c").code == 1
    before = line.run("--history").out, line.run("--status").out
    for words in ([], ["--jobs", "2"], ["-q"]):
        ended = line.run("t", "--item", "b cc", *words)
        assert ended.code == 2 and "there is no item 'b cc' among the 3" in ended.err
        assert "Did you mean 'b c'?" in ended.err and "Next:" not in ended.err
    assert re.sub("[0-9.]+ s", "", "".join(before)) == re.sub(
        "[0-9.]+ s", "", line.run("--history").out + line.run("--status").out)
    ended = line.run("--item", "d")
    assert ended.code == 2 and "--item is for a single tool with items" in ended.err


def statuses(line):
    return {row["tool"]: row["items"] for row in
            json.loads(line.run("--status", "--json").out)["tools"]}


def test_the_status_counts_the_items(line):
    line.run()
    counts = {"success": 2, "failed": 1, "quarantined": 0, "pending": 0}
    assert statuses(line) == {"t": counts, "after": None}
    assert "2 done, 1 failed" in line.run("--status").out
    line.set("a", "b c", "d", "e", broken=["b c"])
    line.run()
    assert statuses(line)["t"] == {**counts, "success": 3}
    line.set("a", "b c", "d", "e")
    line.run()
    assert statuses(line)["t"] == {**counts, "success": 4, "failed": 0}


def test_the_status_does_not_forget_what_is_pending_beside_one_item(line):
    line.run("t", "--item", "d")
    assert statuses(line)["t"] == {"success": 1, "failed": 0, "quarantined": 0, "pending": 2}


def test_items_are_listed_with_how_they_ended(line):
    assert line.run("--items", "t").err == "No item of t has been tried.\n"
    line.set("a", "b\nc", "d" * 500, "é😀", broken=["b\nc"])
    line.run("t")
    shown = json.loads(line.run("--items", "t", "--json").out)["items"]
    assert [each["item"] for each in shown] == ["a", "b\nc", "d" * 500, "é😀"]
    assert {key: shown[1][key] for key in ("version", "status", "attempts", "deaths", "run_id",
                                           "rows", "error")} == {
        "version": "", "status": "failed", "attempts": 1, "deaths": 0, "run_id": "1",
        "rows": None, "error": "ValueError: broken b c"}
    assert (shown[0]["status"], shown[0]["rows"], shown[0]["error"]) == ("success", 2, None)
    out = line.run("--items", "t").out
    assert len(out.splitlines()) == 5 and "b\\nc" in out
    out = line.run("--items", "t", "--failed").out
    assert len(out.splitlines()) == 2 and "broken b c" in out
    assert len(json.loads(line.run("--items", "t", "--failed", "--json").out)["items"]) == 1
    line.run("t", "--retry-items", "t")
    line.set("a", "b\nc")
    line.run("t", "--retry-items", "t")
    assert line.run("--items", "t", "--failed").err == "No item of t has failed.\n"


@pytest.mark.parametrize("words, problem", [
    (("--items", "after"), "after has no items"), (("--items", "nosuch"), "no tool 'nosuch'"),
    (("--failed",), "--failed goes with --items"), (("--items",), "expected at least one argument"),
    (("--retry-items",), "expected at least one argument")])
def test_a_question_for_items_that_has_no_answer_is_refused(line, words, problem):
    ended = line.run(*words)
    assert (ended.code, ended.out) == (2, "")
    assert problem in ended.err


def test_the_history_tells_how_the_items_went(line):
    line.run()
    run, = json.loads(line.run("--history", "1", "--json").out)["runs"]
    tool = run["tools"][0]
    assert (run["status"], tool["status"], tool["rows"]) == ("failed", "partial", 4)
    assert "1 of 3 items failed" in tool["reason"]
    assert "'b c': ValueError: broken b c" in tool["error"]
    assert "partial" in line.run("--history", "1").out


@pytest.mark.parametrize("options, words", [({}, "each item exactly once"),
                                            ({"commits": True}, "each item at least once")])
def test_the_plan_says_how_often_an_item_is_done(line, options, words):
    tools = {"t": {"module": "t", **options}, "u": {"module": "u", "each": "t"}}
    line.pipeline(f"TOOL_MAP = {tools}\nSTAGES = {{}}\n" + SQLITE)
    line.tool("u", "def run(item): pass")
    out = line.run("--plan").out
    assert words in out and "each item of t exactly once" in out
    assert not (line.folder / "data.db").exists()


@pytest.mark.parametrize("t, u, options, problem", [
    ("def items(): return []\ndef run(conn): pass", "def run(): pass", {}, "t.py:2: TOOL_MAP['t']"),
    ("def run(): pass", "def run(item): pass", {"each": "t"}, "'each' is 't', which has no items"),
    ("def run(): pass", "def run(): pass", {"batch": 3}, "'batch' is for tools with items"),
    ("def run(): pass", "def run(item): pass", {}, "u.py:1"),
    ("def items(): return []\ndef run(item): pass", "def items(): pass\ndef run(item): pass",
     {"each": "t"}, "a function items() too"),
    ("def items(item): return []\ndef run(item): pass", "def run(): pass", {},
     "t.py:1: TOOL_MAP['t']: items() of t asks for 'item', but it is what tells which there are"),
    ("def items(): return []\ndef run(item): pass", "def run(item): pass", {"each": "t"}, ""),
    ("def items(conn, **kwargs): return []\nasync def run(**kwargs): pass\ndef check(item): pass",
     "def run(): pass", {}, ""),
])
def test_a_check_knows_items(line, t, u, options, problem):
    tools = {"t": "t", "u": {"module": "u", **options}}
    line.pipeline(f"TOOL_MAP = {tools}\nSTAGES = {{}}\n" + SQLITE)
    line.tool("t", t).tool("u", u)
    ended = line.run("--check")
    assert ended.code == (2 if problem else 0), ended
    assert problem in ended.out


def test_of_many_failures_only_some_are_told(line):
    names = [f"{i:03d}" for i in range(50)]
    line.set(*names, broken=names[1:])
    ended = line.run("t")
    assert ended.err.count("ValueError: broken") < 25
    assert "more items fail; --items t --failed will list them" in ended.err
    assert re.search("49 of 50 items failed: 001, 002, 003, ...", ended.err)
    assert ended.err.count("Traceback") == 1


@pytest.mark.parametrize("factory", [None, sqlite3.Row])
@pytest.mark.parametrize("columns", ["name", "name, version"])
def test_items_may_be_the_rows_of_a_cursor(world, factory, columns):
    world.tool("t", f"""
        def items(conn):
            conn.row_factory = {"None" if factory is None else "__import__('sqlite3').Row"}
            conn.execute("CREATE TABLE IF NOT EXISTS files (name, version)")
            conn.execute("INSERT INTO files VALUES ('a', 1), ('b', 2)")
            return conn.execute("SELECT {columns} FROM files")
        def run(conn, item, context):
            conn.execute("INSERT INTO done VALUES (?, ?, ?, 0)", ("t", item, context.version))
    """)
    assert world.run().status == "success"
    assert world.query("SELECT item, attempt FROM done") == (
        [("a", ""), ("b", "")] if columns == "name" else [("a", "1"), ("b", "2")])


def test_what_another_machine_did_in_a_run_of_the_same_number_is_not_ours(world):
    world.tool("t", """
        import sqlite3, pathlib
        def items(): return ["a", "b"]
        def run(conn, item):
            if item == "a":
                conn.execute("INSERT INTO orchestrator_items SELECT pipeline, tool, 'b', version, "
                             "passed, status, attempts, deaths, source, '1.ffff', ended_at, "
                             "duration_s, row_count, error FROM orchestrator_items")
    """)
    world.tool("u", "def items(): return ['b']\ndef run(item): pass")
    world.run(tools={"u": "u"})
    with closing(world.connect()) as conn:
        conn.execute("UPDATE orchestrator_items SET tool = 't', item = 'z'")
        conn.commit()
    result = world.run(home=str(world.folder / "another"))
    assert (result.run_id, result.results["t"]["items"]) == ("1", 1)
    assert "1 item done by another run meanwhile" in result.outcomes["t"].reason


def test_a_name_that_is_left_out_as_a_double_is_told(world):
    result = world.run("a", "b", "a", ["b", 2])
    assert result.outcomes["t"].reason == "2 items done; left out, since the name came before: a, b"
    assert world.run().outcomes["t"].reason.endswith("left out, since the name came before: b")


def test_a_dict_of_names_is_refused_with_what_to_return(world):
    world.tool("t", "def items(): return {'a': 1}\ndef run(item): pass")
    assert "return its .items()" in world.run().errors["t"]


def test_items_that_is_no_function_is_told_with_what_to_write(world):
    world.tool("t", "items = ['a']\ndef run(conn, item): pass")
    with pytest.raises(UserError, match="'item', which nothing gives.\n  Write `def items"):
        world.run()


def test_each_without_anything_that_remembers_is_refused(world):
    world.has_database = False
    world.tool("t", "def items(): return ['a']\ndef run(item): pass")
    world.tool("u", "def run(item): pass")
    tools = {"t": "t", "u": {"module": "u", "each": "t"}}
    result = world.run(tools=tools, home=None)
    assert "nothing tells which items passed t" in result.errors["u"]
    assert world.run(tools=tools).results["u"]["items"] == 1


@pytest.mark.parametrize("retry", ["t", ["t"], {"t": []}, {"t": "b"}])
def test_items_to_try_again_may_be_said_in_several_ways(world, retry):
    world.set("broken", "b")
    world.run("a", "b")
    world.set("broken")
    assert world.run(retry_items=retry).results["t"]["items"] == 1


def test_every_failure_has_its_traceback_in_the_log(world):
    world.set("broken", "a", "b")
    world.run("a", "b", "c")
    log, = (world.folder / "home").rglob("t.1.log")
    assert log.read_text().count('raise ValueError("broken " + item)') == 2
    assert world.said().count("Traceback") == 1


def test_an_item_that_closes_the_connection_is_named(world):
    world.tool("t", """
        def items(): return ["a", "b", "c"]
        def run(conn, item):
            conn.execute("INSERT INTO done VALUES ('t', ?, 0, 0)", (item,))
            if item == "b":
                conn.close()
    """)
    result = world.run()
    assert result.partial == ["t"]
    assert result.errors["t"].startswith("b: the connection is gone: ProgrammingError: ")
    assert world.done() == ["a", "c"]
    assert world.ledger()["b"] == ("quarantined", 0)


def test_some_items_can_be_asked_for(quick):
    quick.pipeline("TOOL_MAP = {'t': 't'}\n").tool(
        "t", "def items(): return ['a', 'b', 'c']\ndef run(item): pass")
    assert "No item of t has been tried." in quick.run("--items", "t").err
    quick.run()
    shown = json.loads(quick.run("--items", "t", "a", "c", "--json").out)["items"]
    assert [each["item"] for each in shown] == ["a", "c"]
    assert "No nosuch of t has been tried." in quick.run("--items", "t", "nosuch").err
    assert "given twice" in quick.run("t", "--item", "a", "--item", "b").err
    assert "each item at least once" in quick.run("--plan").out


@pytest.mark.parametrize("count", [0, 7, 3000])
def test_items_as_json_are_written_page_by_page(world, monkeypatch, capsys, count):
    """100,000 of them once took 260 MB: all of it was made before the first word was written."""
    world.tool("t", f"def items(): return map(str, range({count}))\ndef run(conn, item): pass")
    tools = {"t": {"module": "t", "batch": 500}}
    world.run(tools=tools)
    pieces = []
    monkeypatch.setattr("orchestrator.show", lambda text, end="\n": pieces.append(text + end))

    assert main(tools, {}, world.connect, argv=["--items", "t", "--json"], name="p",
                home=world.home) == 0

    whole = json.loads("".join(pieces))
    assert {row["item"] for row in whole["items"]} == {*map(str, range(count))}
    assert max(map(len, pieces)) < 400_000  # a page of them, of up to a thousand
    assert "".join(pieces) == json.dumps(whole, indent=2) + "\n"


def test_what_was_asked_of_one_item_is_resumed_for_that_item(quick):
    quick.pipeline('TOOL_MAP = {"t": "t"}' + SQLITE).tool("t", """
        import pathlib
        def items():
            return ["a", "b", "c"]
        def run(conn, item):
            print(item)
            if not pathlib.Path("mended").exists():
                raise ValueError("not yet")
    """)
    ended = quick.run("--item", "b")
    assert ended.out == "b\n" and ended.err.rstrip().endswith("--resume --retry-items t"), ended
    (quick.folder / "mended").touch()
    assert quick.run("--resume", "--retry-items", "t").out == "b\n"


def test_the_next_command_tries_the_items_again_that_were_named(quick):
    quick.pipeline(f"TOOL_MAP = {RETRIED}" + SQLITE).tool(
        "t", "def items(): return ['a', 'b']\ndef run(conn, item): raise ValueError(item)")
    quick.run()
    ended = quick.run("--retry-items", "t", "b")
    assert ended.err.rstrip().endswith("--resume --retry-items t b"), ended
