"""The ledger is in the main database of a connection, whatever a tool puts before it."""
import sqlite3

import pytest
from conftest import SQLITE

from orchestrator import run_pipeline

LEDGER = "SELECT item, status FROM orchestrator_items ORDER BY item"


@pytest.fixture
def sandbox(quick):
    conn = sqlite3.connect(quick.folder / "data.db")
    conn.execute("CREATE TABLE work (item)")
    conn.close()
    return quick


def write(sandbox, run, items="return list('abc')", top="", connect=SQLITE, **options):
    tool = {"module": "tool", **options}
    sandbox.pipeline(f"NAME = 'p'\nTOOL_MAP = {{'tool': {tool!r}}}\nSTAGES = {{}}\n" + connect)
    sandbox.tool("tool", f"{top}\ndef items(conn):\n    {items}\n"
                         f"def run(conn, item):\n    {run}\n"
                         "    conn.execute('INSERT INTO main.work VALUES (?)', (item,))\n")


def is_done_once(sandbox, *words):
    ended = sandbox.run(*words)
    assert ended.code == 0, ended
    again = sandbox.run(*words)
    assert "none of 3 items is pending" in again.err, (ended, again)
    assert sorted(sandbox.query("SELECT item FROM work")) == [("a",), ("b",), ("c",)]
    assert sandbox.query(LEDGER) == [(item, "success") for item in "abc"]


SHADOWS = [
    "CREATE TEMPORARY TABLE IF NOT EXISTS orchestrator_items AS SELECT * FROM main."
    "orchestrator_items WHERE 0",
    "CREATE TEMPORARY VIEW IF NOT EXISTS orchestrator_items AS SELECT 1 AS item",
]
each_shadow = pytest.mark.parametrize("sql", SHADOWS, ids=["table", "view"])


@each_shadow
@pytest.mark.parametrize("batch", [1, 500])
@pytest.mark.parametrize("words", [(), ("--jobs", "2")])
def test_a_temporary_table_of_an_item_does_not_shadow_the_ledger(sandbox, sql, batch, words):
    write(sandbox, f"conn.execute({sql!r})", batch=batch)
    is_done_once(sandbox, *words)


@each_shadow
@pytest.mark.parametrize("place", ["items", "setup"])
def test_nor_does_one_that_comes_before_the_items(sandbox, sql, place):
    goes = f"conn.execute({sql!r})"
    if place == "items":
        write(sandbox, "pass", f"{goes}; return list('abc')")
    else:
        write(sandbox, "pass", top=f"def setup(conn):\n    {goes}")
    is_done_once(sandbox)


@each_shadow
def test_nor_does_one_of_a_tool_that_ran_before(sandbox, sql):
    write(sandbox, "pass")
    sandbox.run()
    sandbox.pipeline("NAME = 'p'\nTOOL_MAP = {'first': 'first', 'tool': 'tool'}\nSTAGES = {}\n"
                     + SQLITE)
    sandbox.tool("first", f"def run(conn): conn.execute({sql!r})")
    is_done_once(sandbox)


@pytest.mark.parametrize("words", [(), ("--jobs", "2")])
def test_the_ledger_of_an_attached_database_is_anothers(sandbox, words):
    other = sqlite3.connect(sandbox.folder / "other.db")
    write(sandbox, "pass")
    sandbox.run()  # makes a ledger, of which a copy is then another pipeline's
    conn = sqlite3.connect(sandbox.folder / "data.db")
    conn.backup(other)
    conn.executescript("DROP TABLE orchestrator_items; DELETE FROM work;")
    conn.close()
    before = list(other.iterdump())
    write(sandbox, "pass", connect="""
def get_connection():
    import sqlite3
    conn = sqlite3.connect(Path(__file__).with_name("data.db"))
    conn.execute("ATTACH ? AS other", (str(Path(__file__).with_name("other.db")),))
    return conn
""")
    is_done_once(sandbox, *words)
    assert list(other.iterdump()) == before
    other.close()


@pytest.mark.parametrize("name", ["orchestrator_listed", "orchestrator_pending"])
def test_a_table_of_the_users_is_not_taken_for_a_list_of_the_engines(sandbox, name):
    conn = sqlite3.connect(sandbox.folder / "data.db")
    conn.execute(f"CREATE TABLE {name} (mine)")
    conn.execute(f"INSERT INTO {name} VALUES (1)")
    conn.commit()
    conn.close()
    write(sandbox, "pass")
    is_done_once(sandbox)
    assert sandbox.query(f"SELECT mine FROM main.{name}") == [(1,)]


def test_a_select_of_the_users_may_still_read_the_ledger(sandbox):
    write(sandbox, "pass")
    sandbox.run()
    sandbox.tool("tool", """
        def items():
            return "SELECT item FROM orchestrator_items WHERE item > 'a'"
        def run(conn, item):
            pass
    """)
    ended = sandbox.run()
    assert ended.code == 0 and "none of 2 items is pending" in ended.err, ended


# --- a server that has a schema for each, by a driver of its own ---------------------------------

USES = '''
"""A driver, as of MySQL: a database in use, to which a name without one belongs."""
import re
import sqlite3

paramstyle = "format"
FOLDER = None

class Connection:
    server_status = 0

    def __init__(self, folder):
        self.hidden = sqlite3.connect(":memory:", isolation_level=None)
        self.used = "test"
        for name in ("test", "other"):
            self.hidden.execute("ATTACH ? AS " + name, (f"{folder}/{name}.db",))

    def cursor(self):
        return Cursor(self)

    def begin(self):
        if not self.hidden.in_transaction:
            self.hidden.execute("BEGIN")

    def commit(self):
        if self.hidden.in_transaction:
            self.hidden.execute("COMMIT")

    def rollback(self):
        if self.hidden.in_transaction:
            self.hidden.execute("ROLLBACK")

    def close(self):
        self.hidden.close()

class Cursor:
    def __init__(self, conn):
        self.conn, self.found = conn, None
        self.rowcount = -1

    def execute(self, sql, values=()):
        if sql.startswith("USE "):
            self.conn.used = sql[4:]
            return
        for old, new in ((" ENGINE=InnoDB", ""), ("%s", "?"), (" COLLATE utf8mb4_0900_bin", ""),
                         ("AUTO_INCREMENT, KEY (item(100))", ""), ("SELECT version()",
                         "SELECT '8.0'"), ("SELECT database()", f"SELECT '{self.conn.used}'"),
                         ("LONGTEXT", "TEXT"), ("TEMPORARY TABLE", "TABLE")):
            sql = sql.replace(old, new)
        sql = re.sub(r"(?<![\\w`.])(orchestrator_\\w+s\\b|orchestrator_listed|orchestrator_pending|"
                     r"work)(?=[\\s(]|$)", self.conn.used + r".\\1", sql)
        self.found = self.conn.hidden.execute(sql, tuple(values))
        self.rowcount, self.description = self.found.rowcount, self.found.description

    def fetchall(self):
        return self.found.fetchall()

    def fetchone(self):
        return self.found.fetchone()
'''


@pytest.mark.parametrize("batch", [1, 500])
def test_use_does_not_take_the_ledger_to_another_database(tmp_path, modules, batch):
    # In the image of MySQL: a name without a database is looked for in the one in use.
    modules(pymysql=USES, tool="""
        def items():
            return list("abcde")
        def run(conn, item):
            if item == "b":
                conn.cursor().execute("USE other")
            conn.cursor().execute("INSERT INTO test.work VALUES (%s)", (item,))
    """)
    import pymysql
    conn = sqlite3.connect(tmp_path / "test.db")
    conn.execute("CREATE TABLE work (item)")
    for expected in ("5 items", "none of 5 items is pending"):
        result = run_pipeline([], {"tool": {"module": "tool", "batch": batch}}, name="p",
                              get_connection=lambda: pymysql.Connection(tmp_path))
        assert result.status == "success", result.errors
        assert expected in result.outcomes["tool"].reason
    assert sorted(conn.execute("SELECT item FROM work")) == [(item,) for item in "abcde"]
    assert conn.execute(LEDGER).fetchall() == [(item, "success") for item in "abcde"]
    conn.close()
