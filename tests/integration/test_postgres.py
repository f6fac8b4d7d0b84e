"""One attempt is one transaction on PostgreSQL, with each driver in each of its modes."""
import os
import signal
import sys
from pathlib import Path

import pytest
from conftest import wait_until

from orchestrator import Database

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the cluster needs a Unix socket")


class Postgres:
    """A driver in a mode, on a database that holds the table `old` with one row."""

    def __init__(self, driver, autocommit, dsn):
        self.driver, self.autocommit, self.dsn = driver, autocommit, dsn
        self.opened = []
        # What a failed test left behind must not block the next one with its locks.
        self.query("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                   " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'")
        self.query("DROP SCHEMA public CASCADE; CREATE SCHEMA public; CREATE TABLE old (x int);"
                   "INSERT INTO old VALUES (1)")

    def connect(self):
        """Be the get_connection of a pipeline."""
        conn = self.driver.connect(self.dsn)
        conn.autocommit = self.autocommit
        self.opened.append(conn)
        return conn

    def query(self, sql):
        """Return the rows that another connection sees; None of what gives none."""
        conn = self.driver.connect(self.dsn)
        conn.autocommit = True
        try:
            cursor = conn.cursor()
            cursor.execute(sql)
            return cursor.fetchall() if cursor.description else None
        finally:
            conn.close()

    def rows(self):
        return [x for (x,) in self.query("SELECT x FROM old ORDER BY x")]

    def tables(self):
        return [name for (name,) in self.query(
            "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")]


@pytest.fixture(params=[
    pytest.param((name, autocommit), id=f"{name}-{'autocommit' if autocommit else 'transactions'}")
    for name in ("psycopg", "psycopg2") for autocommit in (False, True)])
def postgres(request, cluster):
    name, autocommit = request.param
    return Postgres(pytest.importorskip(name), autocommit, cluster.dsn)


# What each tool begins with: both drivers have cursor() and execute().
DO = """
def do(conn, sql):
    cursor = conn.cursor()
    cursor.execute(sql)
    return cursor.fetchall() if cursor.description else None
"""


def test_what_a_tool_forgot_to_commit_is_committed(postgres, run_tools):
    result = run_tools(postgres.connect, tool=DO + """
def run(conn):
    do(conn, "INSERT INTO old VALUES (2)")
    do(conn, "CREATE TABLE new AS SELECT * FROM old")
""")
    assert (result.status, result.errors) == ("success", {})
    assert (postgres.rows(), postgres.tables()) == ([1, 2], ["new", "old"])


@pytest.mark.parametrize("sql", [
    "INSERT INTO old VALUES (2)",
    "CREATE TABLE new AS SELECT * FROM old",
    "DROP TABLE old",
    "TRUNCATE old",
    "INSERT INTO old SELECT * FROM generate_series(2, 5000); CREATE TABLE new (x int)",
])
def test_a_failed_tool_leaves_nothing_behind(postgres, run_tools, sql):
    result = run_tools(postgres.connect, tool=DO + f"""
def run(conn):
    do(conn, {sql!r})
    raise ValueError("too late")
""")
    assert result.errors == {"tool": "ValueError: too late"}
    assert (postgres.tables(), postgres.rows()) == (["old"], [1])


def test_data_that_check_rejects_is_never_visible_to_another_connection(postgres, run_tools):
    result = run_tools(postgres.connect, tool=DO + f"""
import {postgres.driver.__name__} as driver
SEEN = []

def look():
    other = driver.connect({postgres.dsn!r})
    SEEN.append(do(other, "SELECT count(*) FROM old")[0][0])
    other.close()

def run(conn):
    do(conn, "INSERT INTO old VALUES (2)")
    look()

def check(conn):
    look()
    assert do(conn, "SELECT count(*) FROM old") == [(1,)], "two rows"
""")
    assert result.errors == {"tool": "AssertionError: two rows"}
    assert sys.modules["tool"].SEEN == [1, 1]
    assert postgres.rows() == [1]


@pytest.mark.parametrize("options", [{}, {"commits": True}], ids=["plain", "commits"])
def test_an_error_swallowed_in_a_transaction_is_a_failure_not_a_silent_rollback(
        postgres, run_tools, options):
    result = run_tools(postgres.connect, options=options, tool=DO + """
def run(conn):
    conn.autocommit = False
    do(conn, "INSERT INTO old VALUES (2)")
    try:
        do(conn, "SELECT * FROM nowhere")
    except Exception:
        pass
    return 1
""")
    assert result.failed == ["tool"]
    assert "an error of the database was caught and ignored" in result.errors["tool"]
    assert postgres.rows() == [1]


def test_an_error_swallowed_behind_a_savepoint_costs_nothing(postgres, run_tools):
    result = run_tools(postgres.connect, tool=DO + """
def run(conn):
    do(conn, "INSERT INTO old VALUES (2)")
    do(conn, "SAVEPOINT here")
    try:
        do(conn, "SELECT * FROM nowhere")
    except Exception:
        do(conn, "ROLLBACK TO here")
""")
    assert result.errors == {}
    assert postgres.rows() == [1, 2]


def test_a_tool_may_commit_in_between_and_only_the_rest_is_rolled_back(postgres, run_tools):
    result = run_tools(postgres.connect, tool=DO + """
def run(conn):
    do(conn, "INSERT INTO old VALUES (2)")
    conn.commit()
    do(conn, "INSERT INTO old VALUES (3)")
    raise ValueError
""")
    assert result.failed == ["tool"]
    assert postgres.rows() == [1, 2]


def test_a_constraint_that_fails_only_at_commit_fails_the_tool_and_leaves_nothing(
        postgres, run_tools):
    result = run_tools(postgres.connect, tool=DO + """
def run(conn):
    do(conn, "CREATE TABLE new (x int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    do(conn, "INSERT INTO new VALUES (1), (1)")
""")
    assert "UniqueViolation" in result.errors["tool"]
    assert postgres.tables() == ["old"]


@pytest.mark.parametrize("end", ["return", "raise ValueError", "do(conn, 'SELECT * FROM nowhere')"])
@pytest.mark.parametrize("became", [False, True])
def test_the_autocommit_mode_is_put_back_after_an_attempt(postgres, run_tools, became, end):
    seen = []

    class Watched:
        """Tells the mode in which the connection is closed."""

        def __init__(self, conn):
            self.__dict__["conn"] = conn

        def close(self):
            seen.append(self.conn.autocommit)
            self.conn.close()

        def __getattr__(self, name):
            return getattr(self.conn, name)

        def __setattr__(self, name, value):
            setattr(self.conn, name, value)

    run_tools(lambda: Watched(postgres.connect()), tool=DO + f"""
def run(conn):
    do(conn, "INSERT INTO old VALUES (2)")
    conn.commit()
    conn.autocommit = {became}
    {end}
""")
    assert seen == [postgres.autocommit]


def test_a_tool_that_commits_itself_may_vacuum_in_autocommit_mode(postgres, run_tools):
    vacuum = DO + """
def run(conn):
    conn.autocommit = True
    do(conn, "VACUUM old")
    return conn.autocommit
"""
    own = run_tools(postgres.connect, options={"commits": True}, tool=vacuum)
    assert (own.errors, own.results) == ({}, {"tool": True})


def test_a_tool_whose_transactions_are_the_engines_may_not_vacuum(postgres, run_tools):
    result = run_tools(postgres.connect, tool=DO + "def run(conn): do(conn, 'VACUUM old')")
    assert "cannot run inside a transaction block" in result.errors["tool"]


KILL = DO + """
def kill(conn, connect):
    pid = do(conn, "SELECT pg_backend_pid()")[0][0]
    other = connect()
    do(other, f"SELECT pg_terminate_backend({pid}, 5000)")
    other.close()
"""


@pytest.mark.parametrize("end, error", [
    pytest.param("do(conn, 'SELECT 1')", "", id="seen-by-the-tool"),
    pytest.param("raise ValueError('mine')", "ValueError: mine", id="not-seen-by-the-tool"),
    pytest.param("return 1", "", id="first-seen-at-commit"),
    pytest.param("\n    try: do(conn, 'SELECT 1')\n    except Exception: return 1", "",
                 id="swallowed-by-the-tool"),
])
def test_a_tool_whose_backend_was_terminated_fails(postgres, run_tools, end, error):
    result = run_tools(postgres.connect, tool=KILL + f"""
import {postgres.driver.__name__} as driver

def run(conn):
    do(conn, "INSERT INTO old VALUES (2)")
    kill(conn, lambda: driver.connect({postgres.dsn!r}))
    {end}
""")
    assert result.failed == ["tool"]
    assert result.errors["tool"].startswith(error) and result.errors["tool"]
    assert postgres.rows() == [1]
    assert all(conn.closed for conn in postgres.opened)


def test_the_use_after_a_terminated_backend_gets_another_connection(postgres):
    space = {}
    exec(KILL, space)
    database = Database(postgres.connect)
    database.begin()
    space["do"](database.conn, "INSERT INTO old VALUES (2)")
    space["kill"](database.conn, lambda: postgres.driver.connect(postgres.dsn))
    with pytest.raises(postgres.driver.Error):
        database.commit()
    database.rollback()

    database.begin()
    space["do"](database.conn, "INSERT INTO old VALUES (3)")
    database.commit()
    database.close()

    assert len(postgres.opened) == 2
    assert postgres.rows() == [1, 3]


def test_a_sound_connection_is_kept_after_an_error_of_the_database(postgres):
    space = {}
    exec(DO, space)
    database = Database(postgres.connect)
    database.begin()
    with pytest.raises(postgres.driver.Error):
        space["do"](database.conn, "SELECT * FROM nowhere")
    database.rollback()
    database.begin()
    space["do"](database.conn, "INSERT INTO old VALUES (2)")
    database.commit()
    database.close()
    assert len(postgres.opened) == 1
    assert postgres.rows() == [1, 2]


def hear_ctrl_c():
    """Let a child hear SIGINT: a shell's `&` starts its commands, and so this suite, deaf to it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# psycopg2 waits inside libpq, where Python hears no signal, unless it is told to wait in Python.
@pytest.mark.parametrize("driver, prepare", [
    ("psycopg", ""),
    ("psycopg2", "from psycopg2.extras import wait_select\n"
                 "    psycopg2.extensions.set_wait_callback(wait_select)"),
])
def test_ctrl_c_ends_a_query_that_runs(sandbox, cluster, driver, prepare):
    postgres = Postgres(pytest.importorskip(driver), False, cluster.dsn)
    sandbox.pipeline(f"""
TOOL_MAP = {{"tool": "tool"}}
STAGES = {{}}

def get_connection():
    import {driver}
    {prepare}
    return {driver}.connect({cluster.dsn!r}, application_name="under test")
""")
    sandbox.tool("tool", DO + """
def run(conn):
    do(conn, "INSERT INTO old VALUES (2)")
    do(conn, "SELECT pg_sleep(600)")
""")
    process = sandbox.start(preexec_fn=hear_ctrl_c)
    try:
        wait_until(lambda: postgres.query(
            "SELECT 1 FROM pg_stat_activity WHERE application_name = 'under test'"
            " AND query LIKE '%pg_sleep%' AND state = 'active'"))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert postgres.rows() == [1]
    assert not Path(sandbox.folder, "data.db").exists()
