"""One attempt is one transaction, whatever the driver; and one connection, closed once."""
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SQLITE, press_ctrl_c_again, wait_until

from orchestrator import Database, run_pipeline


@pytest.fixture
def sandbox(quick):
    """Run the pipelines of these tests in forks, which is quicker."""
    return quick

FROM_3_12 = pytest.mark.skipif(sys.version_info < (3, 12), reason="autocommit= came with 3.12")
ON_POSIX = pytest.mark.skipif(os.name == "nt", reason="no signal can be sent to one process")

DEFAULT = pytest.param({}, id="default")
NO_LEVEL = pytest.param({"isolation_level": None}, id="isolation_level=None")
AUTO = pytest.param({"autocommit": True}, id="autocommit=True", marks=FROM_3_12)
NOT_AUTO = pytest.param({"autocommit": False}, id="autocommit=False", marks=FROM_3_12)

each_mode = pytest.mark.parametrize("mode", [DEFAULT, NO_LEVEL, AUTO, NOT_AUTO])
each_write = pytest.mark.parametrize("write", [
    pytest.param("INSERT INTO old VALUES (2)", id="insert"),
    pytest.param("UPDATE old SET x = x + 1", id="update"),
    pytest.param("CREATE TABLE new AS SELECT x FROM old", id="create-as"),
    pytest.param("CREATE INDEX new ON old (x)", id="create-index"),
    pytest.param("ALTER TABLE old ADD COLUMN y", id="alter"),
    pytest.param("DROP TABLE old", id="drop"),
])

# Counts for days. The first row tells, by a file, that the statement is under way.
ENDLESS = ("WITH RECURSIVE c(x) AS (SELECT started() UNION ALL SELECT x + 1 FROM c"
           " LIMIT 1000000000000)")
STARTED = """
    conn.create_function("started", 0, lambda: Path("started").touch() or 0)
"""


class Base:
    """A database file with one table, the modes to open it in, and runs on it."""

    def __init__(self, folder, write_modules):
        self.file, self.write_modules = folder / "data.db", write_modules
        self.opened = []
        conn = sqlite3.connect(self.file)
        conn.executescript("CREATE TABLE old (x INTEGER PRIMARY KEY); INSERT INTO old VALUES (1);")
        conn.close()

    def opener(self, mode, *pragmas):
        """Return a get_connection for a mode. PRAGMAs come first: most want no transaction."""
        def get_connection():
            conn = sqlite3.connect(self.file)
            for pragma in pragmas:
                conn.execute(pragma)
            for attribute, value in mode.items():
                setattr(conn, attribute, value)
            self.opened.append(conn)
            return conn
        return get_connection

    def run(self, mode, *, options=None, pragmas=(), **sources):
        """Run tools, each given by its source, in their order."""
        self.write_modules(**sources)
        tool_map = {name: {"module": name, **(options or {})} for name in sources}
        return run_pipeline([], tool_map, get_connection=self.opener(mode, *pragmas))

    def dump(self):
        """Return all that another connection sees, as SQL."""
        conn = sqlite3.connect(self.file)
        try:
            return list(conn.iterdump())
        finally:
            conn.close()

    def query(self, sql):
        """Return the rows that another connection sees."""
        conn = sqlite3.connect(self.file)
        try:
            return conn.execute(sql).fetchall()
        finally:
            conn.close()


@pytest.fixture
def base(tmp_path, modules):
    return Base(tmp_path, modules)


# --- one attempt is one transaction, on SQLite ---------------------------------------------------

@each_mode
@each_write
def test_what_a_tool_forgot_to_commit_is_committed(base, mode, write):
    expected = sqlite3.connect(":memory:")
    expected.executescript("".join(base.dump()) + write)

    result = base.run(mode, tool=f"def run(conn): conn.execute({write!r})")

    assert (result.status, result.errors) == ("success", {})
    assert base.dump() == list(expected.iterdump())
    expected.close()


@each_mode
@each_write
def test_a_failed_tool_leaves_nothing_behind(base, mode, write):
    before = base.dump()
    result = base.run(mode, tool=f"""
        def run(conn):
            conn.execute({write!r})
            raise ValueError("too late")
    """)
    assert result.errors == {"tool": "ValueError: too late"}
    assert base.dump() == before


@each_mode
@pytest.mark.parametrize("end", ["sys.exit(1)", "sys.exit('no good')", "1 / 0"])
def test_a_tool_is_rolled_back_however_it_failed(base, mode, end):
    before = base.dump()
    result = base.run(mode, tool=f"""
        import sys
        def run(conn):
            conn.execute("INSERT INTO old VALUES (2)")
            {end}
    """)
    assert result.failed == ["tool"]
    assert base.dump() == before


@each_mode
def test_a_tool_that_exits_with_success_is_committed(base, mode):
    result = base.run(mode, tool="""
        import sys
        def run(conn):
            conn.execute("INSERT INTO old VALUES (2)")
            sys.exit(0)
    """)
    assert result.succeeded == ["tool"]
    assert base.query("SELECT x FROM old") == [(1,), (2,)]


@each_mode
def test_each_tool_has_a_transaction_of_its_own(base, mode):
    result = base.run(mode, first="def run(conn): conn.execute('INSERT INTO old VALUES (2)')",
                      second="""
                          def run(conn):
                              conn.execute("INSERT INTO old VALUES (3)")
                              raise ValueError
                      """)
    assert (result.succeeded, result.failed) == (["first"], ["second"])
    assert base.query("SELECT x FROM old") == [(1,), (2,)]


@each_mode
def test_data_that_check_rejects_is_never_visible_to_another_connection(base, mode):
    before = base.dump()
    result = base.run(mode, tool=f"""
        import sqlite3
        SEEN = []

        def look():
            other = sqlite3.connect({str(base.file)!r})
            SEEN.append(other.execute("SELECT group_concat(name) FROM sqlite_master").fetchone()
                        + other.execute("SELECT count(*) FROM old").fetchone())
            other.close()

        def run(conn):
            conn.execute("INSERT INTO old VALUES (2)")
            look()
            conn.execute("CREATE TABLE new AS SELECT * FROM old")
            look()

        def check(conn):
            look()
            assert conn.execute("SELECT count(*) FROM new").fetchone() == (1,), "two rows"
    """)
    assert result.errors == {"tool": "AssertionError: two rows"}
    assert sys.modules["tool"].SEEN == [("old", 1)] * 3
    assert base.dump() == before


@each_mode
@pytest.mark.parametrize("commit", ["conn.commit()", "conn.execute('COMMIT')"])
def test_a_tool_may_commit_as_its_last_act(base, mode, commit):
    result = base.run(mode, tool=f"""
        def run(conn):
            conn.execute("INSERT INTO old VALUES (2)")
            {commit}
    """)
    assert (result.status, result.errors) == ("success", {})
    assert base.query("SELECT x FROM old") == [(1,), (2,)]


@each_mode
def test_what_a_tool_committed_in_between_outlives_its_failure(base, mode):
    result = base.run(mode, tool="""
        def run(conn):
            conn.execute("INSERT INTO old VALUES (2)")
            conn.execute("COMMIT")
            raise ValueError
    """)
    assert result.failed == ["tool"]
    assert base.query("SELECT x FROM old") == [(1,), (2,)]


STAYS = "its transaction had ended before: what it committed stays"


@pytest.mark.parametrize("mode", [DEFAULT, NO_LEVEL, AUTO])  # the fourth begins again by itself
@pytest.mark.parametrize("body, reason, rows", [
    ("conn.execute(INSERT); conn.execute('COMMIT')", STAYS, [(1,), (2,)]),
    ("conn.executescript(INSERT)", STAYS, [(1,), (2,)]),
    ("conn.execute(INSERT)", "", [(1,)]),
    ("conn.execute('COMMIT'); conn.execute('BEGIN'); conn.execute(INSERT)", "", [(1,)]),
])
def test_a_failed_tool_that_ended_its_transaction_is_said_to_leave_something_behind(
        base, mode, body, reason, rows):
    if "autocommit" in mode and "script" in body:
        pytest.skip("executescript() commits only in the older modes")
    result = base.run(mode, tool=f"""
        INSERT = "INSERT INTO old VALUES (2)"
        def run(conn):
            {body}
            raise ValueError
    """)
    assert result.outcomes["tool"].reason == reason
    assert base.query("SELECT x FROM old") == rows


@each_mode
@pytest.mark.parametrize("error", ["ValueError", "sqlite3.OperationalError('disk full')"])
def test_a_failed_tool_that_commits_itself_is_not_said_to_have_ended_anything(base, mode, error):
    result = base.run(mode, options={"commits": True}, tool=f"""
        import sqlite3
        def run(conn):
            raise {error}
    """)
    assert result.outcomes["tool"].reason == ""


def test_a_tool_that_left_something_behind_is_tried_again_and_says_so_each_time(sandbox):
    sandbox.pipeline(SQLITE + """
TOOL_MAP = {"tool": {"module": "tool", "retries": 1, "retry_delay": 0}}
""").tool("tool", """
        def run(conn):
            conn.execute("CREATE TABLE IF NOT EXISTS t (x)")
            conn.execute("INSERT INTO t VALUES (1)")
            conn.commit()
            raise ValueError("no")
    """)
    ended = sandbox.run()
    assert ended.code == 1 and sandbox.query("SELECT count(*) FROM t") == [(2,)]
    told = [line for line in ended.err.splitlines() if STAYS in line]
    assert len(told) == 3 and told[0].endswith(STAYS + "; try 1 of 2; again")  # and the summary


# Where a tool has ended its transaction in the other two modes, each statement is its own: that is
# what these modes mean.
@pytest.mark.parametrize("mode", [DEFAULT, NOT_AUTO])
def test_what_a_failing_tool_did_after_its_own_commit_is_rolled_back(base, mode):
    result = base.run(mode, tool="""
        def run(conn):
            conn.execute("INSERT INTO old VALUES (2)")
            conn.commit()
            conn.execute("INSERT INTO old VALUES (3)")
            raise ValueError
    """)
    assert result.failed == ["tool"]
    assert base.query("SELECT x FROM old") == [(1,), (2,)]


@each_mode
def test_a_statement_whose_error_a_tool_caught_does_not_take_the_others_along(base, mode):
    result = base.run(mode, tool="""
        import sqlite3
        def run(conn):
            conn.execute("INSERT INTO old VALUES (2)")
            try:
                conn.execute("INSERT INTO old VALUES (3), (1)")
            except sqlite3.IntegrityError:
                pass
            conn.execute("INSERT INTO old VALUES (4)")
    """)
    assert (result.status, result.errors) == ("success", {})
    assert base.query("SELECT x FROM old") == [(1,), (2,), (4,)]


@each_mode
def test_a_constraint_that_fails_only_at_commit_fails_the_tool_and_leaves_nothing(base, mode):
    before = base.dump()
    result = base.run(mode, pragmas=["PRAGMA foreign_keys = ON"], tool="""
        def run(conn):
            conn.execute("CREATE TABLE child (x REFERENCES old DEFERRABLE INITIALLY DEFERRED)")
            conn.execute("INSERT INTO child VALUES (99)")
    """)
    assert result.errors == {"tool": "at the commit: IntegrityError: FOREIGN KEY constraint failed"}
    assert base.dump() == before


@each_mode
def test_a_pragma_of_get_connection_reaches_the_tools(base, mode):
    result = base.run(mode, pragmas=["PRAGMA foreign_keys = ON", "PRAGMA busy_timeout = 1234"],
                      tool="""
        def run(conn):
            return [conn.execute("PRAGMA " + name).fetchone()[0]
                    for name in ("foreign_keys", "busy_timeout")]
    """)
    assert result.results == {"tool": [1, 1234]}


# --- tools that look after their transactions themselves -----------------------------------------

outside_a_transaction = pytest.mark.parametrize("sql", ["VACUUM", "PRAGMA journal_mode = WAL"])


@pytest.mark.parametrize("mode", [DEFAULT, NO_LEVEL, AUTO])
@outside_a_transaction
def test_a_tool_that_commits_itself_is_in_no_transaction(base, mode, sql):
    result = base.run(mode, options={"commits": True}, tool=f"""
        def run(conn):
            conn.execute({sql!r})
            return [conn.in_transaction]
    """)
    assert (result.errors, result.results) == ({}, {"tool": [False]})


@pytest.mark.parametrize("mode", [DEFAULT, NO_LEVEL, AUTO])
@outside_a_transaction
def test_what_needs_no_transaction_fails_without_the_option(base, mode, sql):
    result = base.run(mode, tool=f"def run(conn): conn.execute({sql!r})")
    assert "transaction" in result.errors["tool"]


@pytest.mark.parametrize("mode", [DEFAULT, NOT_AUTO])
def test_what_a_tool_that_commits_itself_left_open_is_settled(base, mode):
    result = base.run(mode, options={"commits": True},
                      good="def run(conn): conn.execute('INSERT INTO old VALUES (2)')",
                      bad="""
                          def run(conn):
                              conn.execute("INSERT INTO old VALUES (3)")
                              raise ValueError
                      """)
    assert (result.succeeded, result.failed) == (["good"], ["bad"])
    assert base.query("SELECT x FROM old") == [(1,), (2,)]


@FROM_3_12
@pytest.mark.parametrize("end", ["pass", "raise ValueError"])
@pytest.mark.parametrize("came, became", [(False, True), (True, False)])
def test_a_mode_that_a_tool_changed_is_put_back(base, came, became, end):
    base.write_modules(tool=f"""
        def run(conn):
            conn.commit()
            conn.autocommit = {became}
            {end}
    """)
    conn = base.opener({"autocommit": came})()
    run_pipeline([], {"tool": {"module": "tool", "commits": True}},
                 get_connection=lambda: NotClosed(conn))
    assert conn.autocommit is came
    conn.close()


class NotClosed:
    """A connection that can be looked at after the run, because its close() does nothing."""

    def __init__(self, conn):
        self.__dict__["conn"] = conn

    def close(self):
        pass

    def __getattr__(self, name):
        return getattr(self.conn, name)

    def __setattr__(self, name, value):
        setattr(self.conn, name, value)


# --- errors of a driver, and the way out ---------------------------------------------------------

@pytest.mark.parametrize("body, error, hint", [
    ("conn.execute('VACUUM')", "cannot VACUUM", '"commits": True in TOOL_MAP'),
    ("conn.execute('PRAGMA synchronous = 0')", "Safety level", '"commits": True in TOOL_MAP'),
    ("conn.close()", "at the commit: ProgrammingError", "the engine closes it"),
    ("conn.close(); conn.cursor()", " ProgrammingError", "the engine closes it"),
    ("conn.execute('SELECT 1 FROM nowhere')", "no such table: nowhere", ""),
    ("raise ValueError('the connection is closed')", "ValueError: the connection", ""),
])
def test_an_error_that_the_way_of_calling_leads_to_is_told_with_the_way_out(
        sandbox, body, error, hint):
    sandbox.pipeline(SQLITE + 'TOOL_MAP = {"tool": "tool"}').tool("tool", f"def run(conn): {body}")
    ended = sandbox.run()
    line = next(line for line in ended.err.splitlines() if error in line and "failed " in line)
    assert hint in line
    assert ("TOOL_MAP" in line or "engine" in line) == bool(hint)


def test_a_locked_database_is_told_with_the_way_to_wait_for_it(sandbox):
    sandbox.pipeline("""
        TOOL_MAP = {"tool": "tool"}
        def get_connection():
            import sqlite3
            return sqlite3.connect("data.db", timeout=0, isolation_level="IMMEDIATE")
    """).tool("tool", "def run(conn): raise ValueError('not called')")
    other = sqlite3.connect(sandbox.folder / "data.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    ended = sandbox.run()
    other.close()
    assert ended.code == 1 and "OperationalError: database is locked, another writes" in ended.err
    assert "had ended" not in ended.err


# --- connections that break ----------------------------------------------------------------------

@each_mode
def test_a_tool_that_closes_the_connection_fails_with_that_as_the_reason(base, mode):
    before = base.dump()
    result = base.run(mode, tool="""
        def run(conn):
            conn.execute("INSERT INTO old VALUES (2)")
            conn.close()
    """)
    assert result.failed == ["tool"]
    assert "closed" in result.errors["tool"]
    assert base.dump() == before


@each_mode
def test_the_tool_after_a_closed_connection_gets_a_new_one(base, mode):
    database = Database(base.opener(mode))
    database.begin()
    database.conn.close()
    with pytest.raises(sqlite3.ProgrammingError):
        database.commit()
    database.rollback()

    database.begin()
    database.conn.execute("INSERT INTO old VALUES (2)")
    database.commit()
    database.close()

    assert len(base.opened) == 2
    assert base.query("SELECT x FROM old") == [(1,), (2,)]


def test_a_sound_connection_is_kept_after_a_failure(base):
    database = Database(base.opener({}))
    database.begin()
    database.conn.execute("INSERT INTO old VALUES (2)")
    database.rollback()
    database.begin()
    database.commit()
    database.close()
    assert len(base.opened) == 1


def test_a_statement_on_a_replaced_connection_can_be_cancelled_too(base):
    database = Database(base.opener({}), is_cancelled=lambda: True)
    database.open().close()
    database.rollback()
    with pytest.raises(sqlite3.OperationalError, match="interrupted"):
        # Ends by itself within seconds where nobody cancels it.
        database.open().execute("WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c"
                                " LIMIT 20000000) SELECT count(*) FROM c").fetchone()
    database.close()


# --- any object is a connection ------------------------------------------------------------------

METHODS = ("begin", "commit", "rollback", "close")


def make_fake(*methods, failing=(), **attributes):
    """Return an object with just these methods; `calls` records them, and changes of attributes."""
    def make_method(name):
        def method(self):
            self.calls.append(name)
            if name in failing:
                raise OSError(f"{name} failed")
        return method

    def record(self, name, value):
        self.calls.append(f"{name}={value}")
        object.__setattr__(self, name, value)

    fake = type("Fake", (), {**{name: make_method(name) for name in methods}, "calls": [],
                             **attributes})
    fake.__setattr__ = record
    return fake()


RUNS = {"success": "def run(conn): conn.calls.append('run')",
        "failed": "def run(conn): conn.calls.append('run'); raise ValueError('of the tool')"}


def run_on(modules, connection, how="success"):
    modules(tool=RUNS[how])
    return run_pipeline([], {"tool": "tool"}, get_connection=lambda: connection)


@pytest.mark.parametrize("how, end", [("success", "commit"), ("failed", "rollback")])
@pytest.mark.parametrize("methods", [
    (), ("close",), ("commit",), ("rollback",), ("commit", "rollback"), ("commit", "close"),
    ("rollback", "close"), ("commit", "rollback", "close"), METHODS,
], ids="-".join)
def test_only_methods_that_a_connection_has_are_called_each_once(modules, methods, how, end):
    fake = make_fake(*methods)
    result = run_on(modules, fake, how)
    assert result.status == how
    assert fake.calls == [call for call in ("begin", "run", end, "close")
                          if call in methods or call == "run"]


@pytest.mark.parametrize("failing, how, calls, error", [
    ("begin", "success", ["begin", "rollback", "close"], "OSError: begin failed"),
    ("commit", "success", ["begin", "run", "commit", "rollback", "close"],
     "at the commit: OSError: commit failed"),
    ("rollback", "failed", ["begin", "run", "rollback", "close"], "ValueError: of the tool"),
    ("close", "failed", ["begin", "run", "rollback", "close"], "ValueError: of the tool"),
    ("close", "success", ["begin", "run", "commit", "close"], None),
])
def test_a_connection_whose_method_raises_is_closed_once(modules, failing, how, calls, error):
    fake = make_fake(*METHODS, failing=[failing])
    result = run_on(modules, fake, how)
    assert fake.calls == calls
    assert result.errors.get("tool") == error


def test_a_connection_that_can_do_nothing_right_is_closed_once(modules):
    fake = make_fake(*METHODS, failing=METHODS)
    assert run_on(modules, fake).errors == {"tool": "OSError: begin failed"}
    assert fake.calls == ["begin", "rollback", "close"]


@pytest.mark.parametrize("how, end", [("success", "commit"), ("failed", "rollback")])
def test_a_driver_in_autocommit_mode_is_taken_out_of_it_for_the_attempt(modules, how, end):
    fake = make_fake("commit", "rollback", "close", autocommit=True)
    run_on(modules, fake, how)
    assert fake.calls == ["autocommit=False", "run", end, "autocommit=True", "close"]


def test_a_driver_without_autocommit_keeps_its_mode(modules):
    fake = make_fake("commit", "rollback", "close", autocommit=False)
    run_on(modules, fake)
    assert fake.calls == ["run", "commit", "close"]


@pytest.mark.parametrize("how, rows", [("success", [(1,), (2,)]), ("failed", [(1,)])])
def test_a_sqlite_driver_without_commit_and_rollback_is_committed_in_sql(base, how, rows):
    # apsw, for one, has execute() and in_transaction, and neither commit() nor rollback().
    class Bare:
        def __init__(self, conn):
            self.execute, self.close, self.of = conn.execute, conn.close, conn

        in_transaction = property(lambda self: self.of.in_transaction)

    base.write_modules(tool=f"""
        def run(conn):
            conn.execute("INSERT INTO old VALUES (2)")
            if {how!r} == "failed":
                raise ValueError
    """)
    connect = base.opener({"isolation_level": None})
    result = run_pipeline([], {"tool": "tool"}, get_connection=lambda: Bare(connect()))
    assert result.status == how
    assert base.query("SELECT x FROM old") == rows


def test_an_exception_in_get_connection_fails_the_tool_before_it_is_called(modules):
    modules(tool="CALLS = []\ndef run(conn): CALLS.append(1)")

    def get_connection():
        raise OSError("no such host")

    result = run_pipeline([], {"tool": "tool"}, get_connection=get_connection)
    assert result.errors == {"tool": "in get_connection(): OSError: no such host"}
    assert sys.modules["tool"].CALLS == []


def test_a_get_connection_that_returns_a_cursor_fails_the_tool_before_it_is_called(sandbox):
    sandbox.pipeline("""
        TOOL_MAP = {"tool": "tool"}
        def get_connection():
            import sqlite3
            return sqlite3.connect("data.db").cursor()
    """).tool("tool", "def run(conn): print('called')")
    ended = sandbox.run()
    assert ended.code == 1 and ended.out == ""
    assert "get_connection(): TypeError: it returned a Cursor, which has no commit()" in ended.err
    assert "return the connection of the driver itself" in ended.err


def test_get_connection_is_asked_once_for_all_tools_of_a_run(modules):
    fake, asked = make_fake("close"), []
    modules(tool=RUNS["success"])
    run_pipeline([], dict.fromkeys(["a", "b", "c"], "tool"),
                 get_connection=lambda: asked.append(1) or fake)
    assert (len(asked), fake.calls) == (1, ["run", "run", "run", "close"])


@pytest.mark.parametrize("signature, got", [
    ("conn", {"conn": None}), ("conn, **kwargs", {"conn": None}), ("**kwargs", {}), ("", {}),
])
@pytest.mark.parametrize("function", ["run", "check"])
def test_without_a_database_conn_goes_only_to_functions_that_name_it(
        modules, function, signature, got):
    modules(tool=f"""
        GOT = []
        def run(): pass
        def {function}({signature}):
            GOT.append({{**locals(), **locals().pop("kwargs", {{}})}})
    """)
    result = run_pipeline([], {"tool": "tool"}, get_connection=lambda: None)
    assert result.status == "success"
    (given,) = sys.modules["tool"].GOT
    assert {name: value for name, value in given.items() if name == "conn"} == got


@pytest.mark.parametrize("breakage", [
    pytest.param({"failing": ["rollback"]}, id="rollback-raises"),
    pytest.param({"closed": True}, id="closed-is-true"),
    pytest.param({"closed": 2}, id="closed-is-2"),  # psycopg2's word for broken
    pytest.param({"open": False}, id="open-is-false"),  # of the MySQL drivers
])
def test_a_connection_found_broken_after_a_failure_is_closed_once_and_replaced(breakage):
    broken = make_fake("commit", "rollback", "close", **breakage)
    sound = make_fake("commit", "rollback", "close", closed=False, open=True)
    supply = [broken, sound]
    database = Database(lambda: supply.pop(0))

    database.begin()
    database.rollback()
    assert database.open() is sound
    database.rollback()
    assert database.open() is sound
    database.close()

    assert broken.calls == ["rollback", "close"]
    assert sound.calls == ["rollback", "close"]


def test_a_driver_whose_closed_connection_answers_nothing_fails_the_tool_and_not_the_engine(
        modules):
    class Touchy:
        is_closed = False

        def close(self):
            self.is_closed = True

        def commit(self):
            self.closed  # noqa: B018

        def rollback(self):
            pass

        @property
        def closed(self):
            if self.is_closed:
                raise OSError("no server")
            return False

    opened = []
    modules(bad="def run(conn): conn.close(); raise ValueError", good="def run(conn): return 1")
    result = run_pipeline([], {"bad": {"module": "bad", "on_failure": "continue"}, "good": "good"},
                          get_connection=lambda: opened.append(Touchy()) or opened[-1])
    assert (result.errors, result.succeeded) == ({"bad": "ValueError"}, ["good"])
    assert [conn.is_closed for conn in opened] == [True, True]


def test_a_database_that_nobody_used_is_neither_opened_nor_closed():
    asked = []
    database = Database(lambda: asked.append(1))
    database.close()
    assert asked == []


# --- Ctrl-C, on a real process -------------------------------------------------------------------

RECORDING = '''
def get_connection():
    import sqlite3

    class Recording(sqlite3.Connection):
        def close(self):
            with open(Path(__file__).with_name("closed"), "a") as file:
                file.write("closed\\n")
            super().close()

    return sqlite3.connect(Path(__file__).with_name("data.db"), factory=Recording)
'''


def hear_ctrl_c():
    """Let a child hear SIGINT: a shell's `&` starts its commands, and so this suite, deaf to it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def started(sandbox):
    """Start a tool in a real process, and return that once the tool wrote the file `started`."""
    processes = []

    def start(body):
        sandbox.pipeline("TOOL_MAP = {'tool': 'tool'}\nSTAGES = {}\n" + RECORDING)
        sandbox.tool("tool", "from pathlib import Path\n" + body)
        processes.append(sandbox.start(stderr=subprocess.STDOUT, preexec_fn=hear_ctrl_c))
        wait_until(lambda: Path(sandbox.folder, "started").exists()
                   or processes[0].poll() is not None)
        assert processes[0].poll() is None, processes[0].communicate()[0]
        return processes[0]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@ON_POSIX
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("sql", [
    pytest.param(ENDLESS + " SELECT count(*) FROM c", id="select"),
    pytest.param("INSERT INTO t " + ENDLESS + " SELECT x FROM c WHERE x < 0", id="insert"),
])
def test_a_signal_ends_a_statement_that_runs(sandbox, started, sql, number, code):
    process = started(f"""
def run(conn):
    {STARTED}
    conn.execute("CREATE TABLE t (x)")
    conn.execute({sql!r}).fetchone()
""")
    process.send_signal(number)
    output, _ = process.communicate(timeout=10)

    assert process.returncode == code, output
    assert "interrupted" in output
    assert sandbox.query("SELECT name FROM sqlite_master") == []
    assert sandbox.read("closed") == "closed\n"


@ON_POSIX
def test_a_tool_that_swallows_the_end_of_its_statement_is_no_success(sandbox, started):
    # SQLite rolls the whole transaction back when it interrupts an INSERT: what the tool wrote
    # before is gone, whatever the tool makes of the error.
    process = started(f"""
import sqlite3

def run(conn):
    {STARTED}
    conn.execute("CREATE TABLE t (x)")
    try:
        conn.execute({"INSERT INTO t " + ENDLESS + " SELECT x FROM c WHERE x < 0"!r})
    except sqlite3.OperationalError:
        pass
""")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=10)

    assert sandbox.query("SELECT name FROM sqlite_master") == []
    assert "success" not in output
    assert process.returncode == 130, output


@ON_POSIX
def test_a_tool_that_writes_on_after_a_statement_was_ended_leaves_no_half_of_its_work(
        sandbox, started):
    # The second INSERT finds no transaction any more and begins another, without the first one.
    process = started(f"""
import sqlite3

def run(conn):
    {STARTED}
    conn.executescript("CREATE TABLE t (x); CREATE TABLE log (x)")
    conn.execute("INSERT INTO t VALUES (1)")
    try:
        conn.execute({"INSERT INTO t " + ENDLESS + " SELECT x FROM c WHERE x < 0"!r})
    except sqlite3.OperationalError:
        pass
    conn.execute("INSERT INTO log VALUES ('all is in t')")
""")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=10)

    assert sandbox.query("SELECT x FROM t UNION ALL SELECT x FROM log") == []
    assert process.returncode == 130, output


@ON_POSIX
def test_a_second_ctrl_c_ends_a_tool_that_ignores_the_first(sandbox, started):
    process = started("""
import time

def run(conn):
    conn.execute("CREATE TABLE t (x)")
    while True:
        try:
            Path("started").touch()
            time.sleep(60)
        except KeyboardInterrupt:
            Path("ignored").touch()
""")
    process.send_signal(signal.SIGINT)
    wait_until(lambda: Path(sandbox.folder, "ignored").exists())
    assert process.poll() is None

    press_ctrl_c_again(process)
    process.communicate(timeout=10)

    assert process.returncode == 130
    assert sandbox.query("SELECT name FROM sqlite_master") == []


def test_a_tool_that_takes_no_connection_holds_no_lock_of_the_database(sandbox):
    sandbox.pipeline("""
        TOOL_MAP = {"t": "t"}
        def get_connection():
            import sqlite3
            return sqlite3.connect("data.db", isolation_level="IMMEDIATE", timeout=0)
    """).tool("t", """
        import sqlite3
        def run():
            with sqlite3.connect("data.db", timeout=0) as conn:
                conn.execute("CREATE TABLE mine (x)")
    """)
    ended = sandbox.run()
    assert ended.code == 0, ended
    assert sandbox.query("SELECT name FROM sqlite_master") == [("mine",)]
