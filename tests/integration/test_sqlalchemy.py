"""One attempt is one transaction on a Connection of SQLAlchemy 2."""
import sqlite3
import sys

import pytest

from orchestrator import Database

sqlalchemy = pytest.importorskip("sqlalchemy", minversion="2.0")


def make_engine(file, how):
    """Return an engine for SQLite, in its plain mode or in one in which DDL can be rolled back."""
    if how == "autocommit=False":
        return sqlalchemy.create_engine(f"sqlite:///{file}", connect_args={"autocommit": False})
    engine = sqlalchemy.create_engine(f"sqlite:///{file}")
    if how == "begin-event":  # the recipe of SQLAlchemy's own page on its SQLite dialect
        @sqlalchemy.event.listens_for(engine, "connect")
        def connected(conn, _record):
            conn.isolation_level = None

        @sqlalchemy.event.listens_for(engine, "begin")
        def begun(conn):
            conn.exec_driver_sql("BEGIN")
    return engine


class Alchemy:
    """An engine on a database that holds the table `old` with one row."""

    def __init__(self, file, how):
        self.file, self.opened = file, []
        conn = sqlite3.connect(file)
        conn.executescript("CREATE TABLE old (x INTEGER PRIMARY KEY); INSERT INTO old VALUES (1)")
        conn.close()
        self.engine = make_engine(file, how)

    def connect(self):
        """Be the get_connection of a pipeline."""
        self.opened.append(self.engine.connect())
        return self.opened[-1]

    def query(self, sql):
        conn = sqlite3.connect(self.file)
        try:
            return [value for (value,) in conn.execute(sql)]
        finally:
            conn.close()

    def rows(self):
        return self.query("SELECT x FROM old ORDER BY x")

    def tables(self):
        return self.query("SELECT name FROM sqlite_master ORDER BY name")


PLAIN = pytest.param("plain", id="plain")
BEGIN = pytest.param("begin-event", id="begin-event")
NOT_AUTO = pytest.param("autocommit=False", id="autocommit=False", marks=pytest.mark.skipif(
    sys.version_info < (3, 12), reason="autocommit= came with 3.12"))


@pytest.fixture(params=[PLAIN, BEGIN, NOT_AUTO])
def alchemy(request, tmp_path):
    made = Alchemy(tmp_path / "data.db", request.param)
    yield made
    made.engine.dispose()


@pytest.fixture(params=[BEGIN, NOT_AUTO])
def alchemy_with_ddl(request, tmp_path):
    made = Alchemy(tmp_path / "data.db", request.param)
    yield made
    made.engine.dispose()


def test_what_a_tool_forgot_to_commit_is_committed(alchemy, run_tools):
    result = run_tools(alchemy.connect, tool="""
        from sqlalchemy import text

        def run(conn):
            conn.execute(text("INSERT INTO old VALUES (:x)"), {"x": 2})
            conn.execute(text("CREATE TABLE new (x)"))
    """)
    assert (result.status, result.errors) == ("success", {})
    assert (alchemy.rows(), alchemy.tables()) == ([1, 2], ["new", "old"])
    assert [conn.closed for conn in alchemy.opened] == [True]


def test_a_failed_tool_leaves_no_rows_behind(alchemy, run_tools):
    result = run_tools(alchemy.connect, tool="""
        def run(conn):
            conn.exec_driver_sql("INSERT INTO old VALUES (2)")
            raise ValueError("too late")
    """)
    assert result.errors == {"tool": "ValueError: too late"}
    assert alchemy.rows() == [1]
    assert [conn.closed for conn in alchemy.opened] == [True]


@pytest.mark.parametrize("sql", ["CREATE TABLE new AS SELECT * FROM old", "DROP TABLE old"])
def test_a_failed_tool_leaves_no_tables_behind(alchemy_with_ddl, run_tools, sql):
    result = run_tools(alchemy_with_ddl.connect, tool=f"""
        def run(conn):
            conn.exec_driver_sql({sql!r})
            raise ValueError("too late")
    """)
    assert result.errors == {"tool": "ValueError: too late"}
    assert (alchemy_with_ddl.tables(), alchemy_with_ddl.rows()) == (["old"], [1])


def test_data_that_check_rejects_is_rolled_back(alchemy, run_tools):
    result = run_tools(alchemy.connect, tool="""
        def run(conn): conn.exec_driver_sql("INSERT INTO old VALUES (2)")
        def check(conn):
            assert conn.exec_driver_sql("SELECT count(*) FROM old").scalar() == 1, "two rows"
    """)
    assert result.errors == {"tool": "AssertionError: two rows"}
    assert alchemy.rows() == [1]


def test_a_tool_may_commit_in_between_and_only_the_rest_is_rolled_back(alchemy, run_tools):
    result = run_tools(alchemy.connect, tool="""
        def run(conn):
            conn.exec_driver_sql("INSERT INTO old VALUES (2)")
            conn.commit()
            conn.exec_driver_sql("INSERT INTO old VALUES (3)")
            raise ValueError
    """)
    assert result.failed == ["tool"]
    assert alchemy.rows() == [1, 2]


@pytest.mark.parametrize("options", [{}, {"commits": True}], ids=["plain", "commits"])
def test_a_tool_may_open_a_block_of_its_own_with_begin(alchemy, run_tools, options):
    # conn.begin() refuses where a transaction is open, so the engine must not have begun one.
    result = run_tools(alchemy.connect, options=options, tool="""
        def run(conn):
            with conn.begin():
                conn.exec_driver_sql("INSERT INTO old VALUES (2)")
    """)
    assert (result.status, result.errors) == ("success", {})
    assert alchemy.rows() == [1, 2]


def test_a_tool_that_closes_the_connection_fails_and_the_next_use_opens_another(
        alchemy, run_tools):
    result = run_tools(alchemy.connect, tool="""
        def run(conn):
            conn.exec_driver_sql("INSERT INTO old VALUES (2)")
            conn.close()
    """)
    assert result.failed == ["tool"]
    assert alchemy.rows() == [1]

    database = Database(alchemy.connect)
    database.open().close()
    database.rollback()
    database.begin()
    database.conn.exec_driver_sql("INSERT INTO old VALUES (3)")
    database.commit()
    database.close()
    assert len(alchemy.opened) == 3
    assert alchemy.rows() == [1, 3]


# --- SQLAlchemy on PostgreSQL --------------------------------------------------------------------

@pytest.fixture
def postgres_engine(cluster):
    pytest.importorskip("psycopg")
    engine = sqlalchemy.create_engine(cluster.url)
    with engine.begin() as conn:
        conn.exec_driver_sql("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        conn.exec_driver_sql("CREATE TABLE old (x int); INSERT INTO old VALUES (1)")
    yield engine
    engine.dispose()


def count(engine):
    with engine.connect() as conn:
        return conn.exec_driver_sql("SELECT count(*) FROM old").scalar()


def test_a_tool_on_postgres_leaves_nothing_behind_when_it_fails(postgres_engine, run_tools):
    result = run_tools(postgres_engine.connect, tool="""
        def run(conn):
            conn.exec_driver_sql("INSERT INTO old VALUES (2)")
            conn.exec_driver_sql("ALTER TABLE old ADD COLUMN y int")
            raise ValueError
    """)
    assert result.failed == ["tool"]
    with postgres_engine.connect() as conn:
        assert conn.exec_driver_sql("SELECT * FROM old").all() == [(1,)]


def test_an_error_swallowed_on_postgres_is_a_failure_not_a_silent_rollback(
        postgres_engine, run_tools):
    result = run_tools(postgres_engine.connect, tool="""
        def run(conn):
            conn.exec_driver_sql("INSERT INTO old VALUES (2)")
            try:
                conn.exec_driver_sql("SELECT * FROM nowhere")
            except Exception:
                pass
            return 1
    """)
    assert count(postgres_engine) == 1
    assert result.failed == ["tool"]
