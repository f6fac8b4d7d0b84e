"""One attempt is one transaction on DuckDB."""
import sys

import pytest

from orchestrator import Database

duckdb = pytest.importorskip("duckdb")


class Duck:
    """A DuckDB file that holds the table `old` with one row."""

    def __init__(self, file):
        self.file, self.opened = str(file), []
        conn = duckdb.connect(self.file)
        conn.execute("CREATE TABLE old (x INTEGER PRIMARY KEY)")
        conn.execute("INSERT INTO old VALUES (1)")
        conn.close()

    def connect(self):
        """Be the get_connection of a pipeline."""
        self.opened.append(duckdb.connect(self.file))
        return self.opened[-1]

    def query(self, sql):
        conn = duckdb.connect(self.file)
        try:
            return conn.execute(sql).fetchall()
        finally:
            conn.close()

    def rows(self):
        return [x for (x,) in self.query("SELECT x FROM old ORDER BY x")]

    def tables(self):
        return [name for (name,) in self.query("SHOW TABLES")]


@pytest.fixture
def duck(tmp_path):
    return Duck(tmp_path / "data.duckdb")


def is_closed(conn):
    try:
        conn.execute("SELECT 1")
    except duckdb.ConnectionException:
        return True
    return False


def test_what_a_tool_forgot_to_commit_is_committed(duck, run_tools):
    result = run_tools(duck.connect, tool="""
        def run(conn):
            conn.execute("INSERT INTO old VALUES (2)")
            conn.execute("CREATE TABLE new AS SELECT * FROM old")
    """)
    assert (result.status, result.errors) == ("success", {})
    assert (duck.rows(), duck.tables()) == ([1, 2], ["new", "old"])
    assert [is_closed(conn) for conn in duck.opened] == [True]


@pytest.mark.parametrize("sql", [
    "INSERT INTO old VALUES (2)", "CREATE TABLE new AS SELECT * FROM old", "DROP TABLE old",
    "ALTER TABLE old RENAME TO new",
])
def test_a_failed_tool_leaves_nothing_behind(duck, run_tools, sql):
    result = run_tools(duck.connect, tool=f"""
        def run(conn):
            conn.execute({sql!r})
            raise ValueError("too late")
    """)
    assert result.errors == {"tool": "ValueError: too late"}
    assert (duck.tables(), duck.rows()) == (["old"], [1])
    assert [is_closed(conn) for conn in duck.opened] == [True]


def test_data_that_check_rejects_is_never_visible_to_another_connection(duck, run_tools):
    result = run_tools(duck.connect, tool="""
        SEEN = []

        def look(conn):  # a second connection to a file is a cursor of the first in DuckDB
            SEEN.extend(conn.cursor().execute("SELECT count(*) FROM old").fetchone())

        def run(conn):
            conn.execute("INSERT INTO old VALUES (2)")
            look(conn)

        def check(conn):
            look(conn)
            assert conn.execute("SELECT count(*) FROM old").fetchone() == (1,), "two rows"
    """)
    assert result.errors == {"tool": "AssertionError: two rows"}
    assert sys.modules["tool"].SEEN == [1, 1]
    assert duck.rows() == [1]


@pytest.mark.parametrize("bad", ["INSERT INTO old VALUES (1)", "SELECT * FROM nowhere"])
def test_an_error_that_a_tool_swallowed_never_ends_as_a_success_without_its_data(
        duck, run_tools, bad):
    # Which errors abort the transaction differs from version to version of DuckDB; its commit()
    # then rolls back and says nothing.
    result = run_tools(duck.connect, tool=f"""
        def run(conn):
            conn.execute("INSERT INTO old VALUES (2)")
            try:
                conn.execute({bad!r})
            except Exception:
                pass
            return 1
    """)
    assert (result.status, duck.rows()) in [("failed", [1]), ("success", [1, 2])]


@pytest.mark.parametrize("end, status", [("pass", "success"), ("raise ValueError", "failed")])
@pytest.mark.parametrize("commit", ["conn.commit()", "conn.execute('COMMIT')"])
def test_a_tool_may_commit_as_its_last_act(duck, run_tools, commit, end, status):
    result = run_tools(duck.connect, tool=f"""
        def run(conn):
            conn.execute("INSERT INTO old VALUES (2)")
            {commit}
            {end}
    """)
    assert result.status == status
    assert ("what it committed stays" in result.outcomes["tool"].reason) == (status == "failed")
    assert duck.rows() == [1, 2]


@pytest.mark.parametrize("status, options", [("failed", {}), ("success", {"commits": True})])
def test_a_tool_begins_transactions_of_its_own_only_if_it_commits_itself(
        duck, run_tools, status, options):
    result = run_tools(duck.connect, options=options, tool="""
        def run(conn):
            conn.begin()
            conn.execute("INSERT INTO old VALUES (2)")
            conn.commit()
    """)
    assert result.status == status
    assert duck.rows() == ([1, 2] if status == "success" else [1])


def test_a_tool_that_commits_itself_and_fails_outside_a_transaction_keeps_the_connection(duck):
    database = Database(duck.connect)
    database.open().execute("INSERT INTO old VALUES (2)")
    database.rollback()
    database.begin()
    database.conn.execute("INSERT INTO old VALUES (3)")
    database.commit()
    database.close()
    assert (len(duck.opened), duck.rows()) == (1, [1, 2, 3])


def test_side_by_side_one_process_does_all_items_and_it_is_said_why(quick):
    quick.pipeline("""
        NAME = "p"
        TOOL_MAP = {"t": "t"}
        def get_connection():
            import duckdb
            return duckdb.connect(str(Path(__file__).with_name("d.db")))
    """).tool("t", """
        def setup(conn):
            conn.execute("CREATE TABLE IF NOT EXISTS work (item TEXT)")
        def items():
            return list("abcdefgh")
        def run(conn, item):
            conn.execute("INSERT INTO work VALUES (?)", (item,))
    """)
    ended = quick.run("--jobs", "2")
    assert ended.code == 0, ended
    assert "one process at a time" in ended.err
    conn = duckdb.connect(str(quick.folder / "d.db"))
    assert conn.execute("SELECT count(*) FROM work").fetchall() == [(8,)]
    conn.close()


def test_a_tool_that_closes_the_connection_fails_and_the_next_use_opens_another(duck, run_tools):
    result = run_tools(duck.connect, tool="""
        def run(conn):
            conn.execute("INSERT INTO old VALUES (2)")
            conn.close()
    """)
    assert "closed" in result.errors["tool"]

    database = Database(duck.connect)
    database.begin()
    database.conn.close()
    with pytest.raises(duckdb.ConnectionException):
        database.commit()
    database.rollback()
    database.begin()
    database.conn.execute("INSERT INTO old VALUES (3)")
    database.commit()
    database.close()
    assert duck.rows() == [1, 3]
