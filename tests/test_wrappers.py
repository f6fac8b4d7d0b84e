"""No row is lost in a green run, and none of a failed tool stays, whatever get_connection() gives:
what is of no driver that is known is refused, unless the tool commits by itself."""
import contextlib
import sqlite3
import sys

import pytest

from orchestrator import run_pipeline

INNER = '''
import sqlite3
from pathlib import Path
FILE = str(Path(__file__).with_name("data.db"))

class Inner:
    """What the others have in common: a connection in which they hide one of sqlite3."""
    def __init__(self):
        self.hidden = sqlite3.connect(FILE)
    def execute(self, sql, values=()):
        return self.hidden.execute(sql, values)
    def commit(self):
        self.hidden.commit()
    def rollback(self):
        self.hidden.rollback()
    def close(self):
        self.hidden.close()
'''
# Each is a class, by its body. Nothing tells the one from the other, so all are refused.
WHOLE = {
    "execute alone": "class Shape(Inner): pass",
    "rows of a list": """
class Shape(Inner):
    def execute(self, sql, values=()):
        return self.hidden.execute(sql, values).fetchall()
""",
    "a cursor too": """
class Shape(Inner):
    def cursor(self):
        return self.hidden.cursor()
""",
    "a cursor and no execute": """
class Shape:
    def __init__(self):
        self.hidden = sqlite3.connect(FILE)
        self.cursor, self.commit = self.hidden.cursor, self.hidden.commit
        self.rollback, self.close = self.hidden.rollback, self.hidden.close
""",
    "a begin of its own": """
class Shape(Inner):
    def begin(self):
        self.hidden.execute("BEGIN")
""",
    "a begin that is for a with": """
class Shape(Inner):
    def begin(self):
        return self.hidden
""",
    "isolation_level=None": """
class Shape(Inner):
    def __init__(self):
        self.hidden = sqlite3.connect(FILE, isolation_level=None)
""",
    "the connection in an attribute": """
class Shape(Inner):
    @property
    def connection(self):
        return self.hidden
""",
    "a method that is called connection": """
class Shape(Inner):
    def connection(self):
        return self.hidden
""",
}
HANDED_ON = """
class Shape:
    def __init__(self):
        self.hidden = sqlite3.connect(FILE)
    def __getattr__(self, name):
        return getattr(self.hidden, name)
"""
UNKNOWN = "which is of no driver that is known"
BROKEN = {
    "no commit": ("class Shape(Inner): commit = None", "has no commit()"),
    "no rollback": ("class Shape(Inner): rollback = None", "has no commit() or no rollback()"),
    "a cursor and no commit": ("""
class Shape:
    def __init__(self):
        self.cursor = sqlite3.connect(FILE).cursor
""", "has no commit()"),
    "a commit that does nothing": ("""
class Shape(Inner):
    def commit(self):
        pass
""", UNKNOWN),
    "a commit that takes a message": ("""
class Shape(Inner):
    def commit(self, message):
        self.hidden.commit()
""", UNKNOWN),
    "a commit of something else": ("""
class Shape(Inner):
    def commit(self):
        Path(FILE).with_name("committed").touch()
    def cursor(self):
        return self.hidden.cursor()
""", UNKNOWN),
    "a rollback that does nothing": ("""
class Shape(Inner):
    def rollback(self):
        pass
""", UNKNOWN),
    "a commit after each statement": ("""
class Shape(Inner):
    def execute(self, sql, values=()):
        with self.hidden:
            return self.hidden.execute(sql, values)
""", UNKNOWN),
    "a connection for each statement": ("""
class Shape(Inner):
    def execute(self, sql, values=()):
        with sqlite3.connect(FILE) as conn:
            return conn.execute(sql, values)
""", UNKNOWN),
    "errors that it swallows": ("""
class Shape(Inner):
    def execute(self, sql, values=()):
        try:
            return self.hidden.execute(sql, values)
        except sqlite3.Error as error:
            print(error)
""", UNKNOWN),
    "an execute that takes something else": ("""
class Shape(Inner):
    def execute(self, sql, values, more):
        return self.hidden.execute(sql, values)
""", UNKNOWN),
    "a commit in another connection": ("""
class Shape(Inner):
    def commit(self):
        sqlite3.connect(FILE).commit()
    @property
    def connection(self):
        return self.hidden
""", UNKNOWN),
}
# These are taken for sqlite3's own, and found out when they have not done what they say.
LYING = {
    "all but commit handed on": """
class Shape:
    def __init__(self):
        self.hidden = sqlite3.connect(FILE)
    def commit(self):
        pass
    def __getattr__(self, name):
        return getattr(self.hidden, name)
""",
    "a connection that keeps others from a commit": """
class Shape(sqlite3.Connection):
    def __init__(self):
        super().__init__(FILE)
    def commit(self):
        pass
""",
    "that and isolation_level=None": """
class Shape(sqlite3.Connection):
    def __init__(self):
        super().__init__(FILE, isolation_level=None)
    def commit(self):
        pass
    def rollback(self):
        pass
""",
}
USE = '''
def do(conn, sql):
    if hasattr(conn, "execute"):
        conn.execute(sql, ())
    else:
        conn.cursor().execute(sql)
'''


@pytest.fixture
def pipeline(quick):
    conn = sqlite3.connect(quick.folder / "data.db")
    conn.executescript("CREATE TABLE old (x INTEGER PRIMARY KEY); INSERT INTO old VALUES (1);")
    conn.close()

    def write(shape, run, tool="", **more):
        options = {"module": "tool", "needs": [], **more}
        quick.pipeline("NAME = 'p'\nTOOL_MAP = {'tool': %r, 'other': 'other'}\nSTAGES = {}\n"
                       % options + INNER + shape + "\ndef get_connection():\n    return Shape()\n")
        quick.tool("other", "needs = []\ndef run(): pass")
        quick.tool("tool", USE + (tool or "\ndef run(conn):\n" + "".join(
            f"    {line}\n" for line in run.splitlines())))
        return quick
    return write


def contents(sandbox):
    return ([x for (x,) in sandbox.query("SELECT x FROM old ORDER BY x")],
            [name for (name,) in sandbox.query("SELECT name FROM sqlite_master ORDER BY name")])


each_refused = pytest.mark.parametrize(
    "shape, problem", [*((shape, UNKNOWN) for shape in WHOLE.values()), *BROKEN.values()],
    ids=[*WHOLE, *BROKEN])
each_jobs = pytest.mark.parametrize("jobs", ["1", "2"])
WRITES = 'do(conn, "INSERT INTO old VALUES (2)")\ndo(conn, "CREATE TABLE new AS SELECT 1 AS x")\n'


@each_jobs
def test_what_a_tool_did_through_an_image_of_sqlite3_is_committed(pipeline, jobs):
    sandbox = pipeline(HANDED_ON, WRITES)
    ended = sandbox.run("--jobs", jobs)
    assert ended.code == 0, ended
    assert contents(sandbox) == ([1, 2], ["new", "old"])


@each_jobs
@pytest.mark.parametrize("writes", WRITES.splitlines())
def test_what_a_failed_tool_did_through_an_image_of_sqlite3_is_rolled_back(pipeline, writes, jobs):
    sandbox = pipeline(HANDED_ON, writes + "\nraise ValueError('too late')")
    ended = sandbox.run("--jobs", jobs)
    assert ended.code == 1 and "too late" in ended.err, ended
    assert contents(sandbox) == ([1], ["old"])


@each_refused
@each_jobs
def test_a_wrapper_of_which_nothing_tells_what_it_does_is_refused(pipeline, shape, problem, jobs):
    sandbox = pipeline(shape, "print('called')\n" + WRITES)
    ended = sandbox.run("--jobs", jobs)
    assert ended.code == 1 and "called" not in ended.out + ended.err, ended
    assert problem in ended.err
    assert "return the connection of the driver itself" in ended.err
    assert '"commits": True in TOOL_MAP' in ended.err
    assert contents(sandbox) == ([1], ["old"])


@each_refused
def test_a_wrapper_is_lent_to_a_tool_that_commits_itself(pipeline, shape, problem):
    sandbox = pipeline(shape, "print('called')", commits=True)
    ended = sandbox.run()
    assert "called" in ended.out, ended  # and then settled, which a commit(message) is not


def test_what_a_tool_that_commits_itself_did_through_a_wrapper_is_there(pipeline):
    sandbox = pipeline("class Shape(Inner): pass", WRITES + "conn.commit()", commits=True)
    ended = sandbox.run()
    assert ended.code == 0, ended
    assert contents(sandbox) == ([1, 2], ["new", "old"])


@pytest.mark.parametrize("shape", LYING.values(), ids=LYING)
@each_jobs
@pytest.mark.parametrize("end", ["", "raise ValueError"])
def test_a_commit_that_has_not_committed_is_no_success(pipeline, shape, end, jobs):
    sandbox = pipeline(shape, 'conn.execute("INSERT INTO old VALUES (2)")\n' + end)
    ended = sandbox.run("--jobs", jobs)
    assert ended.code == 1, ended
    assert end or "commit() has left the transaction open" in ended.err
    assert contents(sandbox) == ([1], ["old"])


def test_a_rollback_that_does_nothing_costs_the_connection_and_keeps_no_row(pipeline):
    sandbox = pipeline("""
class Shape(sqlite3.Connection):
    def __init__(self):
        super().__init__(FILE)
    def rollback(self):
        pass
""", 'conn.execute("INSERT INTO old VALUES (2)")\nraise ValueError')
    sandbox.tool("other", """
needs = ["tool"]
def run(conn):
    conn.execute("INSERT INTO old VALUES (3)")
    """)
    sandbox.pipeline(sandbox.read("orchestrator.py").partition("# === ENGINE")[0].replace(
        "'needs': []", "'needs': [], 'on_failure': 'continue'"))
    assert sandbox.run().code == 1
    assert contents(sandbox) == ([1, 3], ["old"])


# --- a database in which an error undoes the transaction, as in PostgreSQL -----------------------

ABORTING = '''
paramstyle = "qmark"  # it is a driver then (PEP 249)

class Shape(Inner):
    """An error aborts the transaction, whose commit() then undoes it without a word."""
    has_failed, words = False, "the current transaction is aborted"
    def execute(self, sql, values=()):
        if self.has_failed:
            raise sqlite3.DatabaseError(self.words)
        try:
            return self.hidden.execute(sql, values)
        except sqlite3.Error:
            self.has_failed = True
            raise
    def commit(self):
        self.hidden.rollback() if self.has_failed else self.hidden.commit()
        self.has_failed = False
    def rollback(self):
        self.hidden.rollback()
        self.has_failed = False
'''
SWALLOW = '''do(conn, "INSERT INTO old VALUES (2)")
try:
    do(conn, "SELECT * FROM nowhere")
except Exception:
    pass
'''


@each_jobs
@pytest.mark.parametrize("more, told", [
    ("", "caught and ignored"),
    ("    words = 'no'\n", "DatabaseError: no"),  # it can not be told, and so is not fine
    ("    def connection(self):\n        return self.hidden\n", "caught and ignored"),
], ids=["in its words", "in other words", "with a method connection"])
def test_a_failed_and_swallowed_statement_loses_no_rows_in_a_green_run(
        pipeline, more, told, jobs):
    sandbox = pipeline(ABORTING + more, SWALLOW)
    ended = sandbox.run("--jobs", jobs)
    assert ended.code == 1 and told in ended.err, ended
    assert contents(sandbox) == ([1], ["old"])


def test_a_database_that_wants_a_from_can_tell_too(pipeline):
    sandbox = pipeline("""
paramstyle = "qmark"

class Shape(Inner):
    def execute(self, sql, values=()):
        if sql == "SELECT 1":
            raise sqlite3.OperationalError("FROM keyword not found where expected")
        return self.hidden.execute(sql.replace(" FROM DUAL", ""), values)
""", WRITES)
    ended = sandbox.run()
    assert ended.code == 0, ended
    assert contents(sandbox) == ([1, 2], ["new", "old"])


# --- items ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("batch", [1, 500])
@each_jobs
@pytest.mark.parametrize("shape", ["class Shape(Inner): pass", *LYING.values(),
                                   *[shape for shape, _ in BROKEN.values()]])
def test_no_item_is_done_that_is_not_there(pipeline, shape, batch, jobs):
    sandbox = pipeline(shape, "", """
def items():
    return ["2", "3"]
def run(conn, item):
    do(conn, f"INSERT INTO old VALUES ({item})")
""", batch=batch)
    ended = sandbox.run("--jobs", jobs)
    assert ended.code == 1, ended
    assert contents(sandbox)[0] == [1]
    with contextlib.suppress(sqlite3.OperationalError):
        assert not sandbox.query("SELECT * FROM orchestrator_items WHERE passed IS NOT NULL")


def test_a_wrapper_in_which_no_ledger_can_be_kept_says_what_can(pipeline):
    sandbox = pipeline("class Shape(Inner): pass", "",
                       "def items(): return ['2']\ndef run(conn, item): pass", commits=True)
    ended = sandbox.run()
    assert ended.code == 1 and "ledger of items can not be kept" in ended.err, ended
    assert "return the connection of the driver itself" in ended.err


# --- what is no connection -----------------------------------------------------------------------

class Awaited:
    """A connection of which the methods are coroutines."""
    closed = False

    async def execute(self, sql):
        pass

    async def commit(self):
        pass

    async def rollback(self):
        pass


async def connect_later():
    return Awaited()


def yield_one():
    yield sqlite3.connect(":memory:")


@contextlib.contextmanager
def lend_one():
    yield sqlite3.connect(":memory:")


@pytest.mark.parametrize("get_connection, problem", [
    (Awaited, "an Awaited, which is asynchronous"),
    (connect_later, "a coroutine, which is asynchronous"),
    (yield_one, "a generator, which is still to be entered"),
    (lend_one, "which is still to be entered"),
])
@pytest.mark.parametrize("options", [{}, {"commits": True}], ids=["plain", "commits"])
@pytest.mark.filterwarnings("ignore:coroutine")
def test_what_nobody_would_await_or_enter_is_refused(modules, get_connection, problem, options):
    modules(tool="CALLS = []\nasync def run(conn): CALLS.append(1)")
    result = run_pipeline([], {"tool": {"module": "tool", **options}},
                          get_connection=get_connection)
    assert result.errors["tool"].startswith("in get_connection(): TypeError: it returned ")
    assert problem in result.errors["tool"]
    assert sys.modules["tool"].CALLS == []


def test_a_tool_may_still_open_an_asynchronous_connection_itself(modules):
    modules(tool="""
        import asyncio
        async def run(conn):
            await asyncio.sleep(0)
            return 3
    """)
    result = run_pipeline([], {"tool": "tool"}, get_connection=lambda: None)
    assert (result.status, result.results) == ("success", {"tool": 3})


def test_an_object_that_is_no_database_is_any_object(modules):
    class Client:
        """Say, one of a web service, of which a method is called as one of a database is."""
        connection = "a text"

        def connect(self):
            pass

    modules(tool="def run(conn): return conn.connection")
    result = run_pipeline([], {"tool": "tool"}, get_connection=Client)
    assert (result.status, result.results) == ("success", {"tool": "a text"})


HOLDERS = {
    "a dict": "def Shape(): return {'db': Inner()}",
    "a tuple": "def Shape(): return Inner(), 'more'",
    "a list": "def Shape(): return [Inner()]",
    "a namespace": "import types\ndef Shape(): return types.SimpleNamespace(db=Inner())",
    "closing()": "import contextlib\ndef Shape(): return contextlib.closing(Inner())",
    "an object with methods of its own": """
class Shape:
    def __init__(self):
        self.db = Inner()
    def insert(self, value):
        self.db.execute("INSERT INTO work VALUES (?)", (value,))
""",
}


@pytest.mark.parametrize("body", ["def run(conn): pass",
                                  "def items(): return ['a']\ndef run(conn, item): pass"],
                         ids=["tool", "items"])
@pytest.mark.parametrize("shape", HOLDERS.values(), ids=HOLDERS)
def test_what_holds_a_connection_on_which_nobody_would_commit_is_refused(quick, shape, body):
    quick.pipeline(INNER + shape + "\n\ndef get_connection():\n    return Shape()\n\n"
                   'TOOL_MAP = {"t": "t"}')
    quick.tool("t", body)
    ended = quick.run()
    assert ended.code == 1 and "that holds a connection, on which nobody would commit" in ended.err
    quick.pipeline(INNER + shape + "\n\ndef get_connection():\n    return Shape()\n\n"
                   'TOOL_MAP = {"t": {"module": "t", "commits": True}}')
    assert quick.run().code == 0
