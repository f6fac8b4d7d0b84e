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


# --- what SQLAlchemy hands out, on every driver --------------------------------------------------

ORM = """
from sqlalchemy import text

def do(conn, sql):
    return conn.execute(text(sql))
"""
SHAPES = {
    "connection": "engine.connect()",
    "session": "orm.Session(engine)",
    "scoped": "orm.scoped_session(orm.sessionmaker(engine))",
}
SESSIONS = ["session", "scoped"]
DRIVERS = ["sqlite", "sqlite-begin-event", "psycopg", "psycopg2"]
BEGIN_EVENT = """
@sqlalchemy.event.listens_for(engine, "connect")
def connected(conn, _record):
    conn.isolation_level = None

@sqlalchemy.event.listens_for(engine, "begin")
def begun(conn):
    conn.exec_driver_sql("BEGIN")
"""


class Base:
    """A database with a table `old` of one row, behind a driver, and ways to return it."""

    def __init__(self, driver, url):
        self.driver, self.url = driver, url
        self.engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
        with self.engine.begin() as conn:
            if not self.is_sqlite:
                conn.exec_driver_sql("DROP SCHEMA public CASCADE")
                conn.exec_driver_sql("CREATE SCHEMA public")
            conn.exec_driver_sql("CREATE TABLE old (x INTEGER PRIMARY KEY)")
            conn.exec_driver_sql("INSERT INTO old VALUES (1)")

    @property
    def is_sqlite(self):
        return self.driver.startswith("sqlite")

    def source(self, shape, options="", then=""):
        """Return the source of a get_connection(); `then` comes before the shape is made."""
        event = BEGIN_EVENT if self.driver == "sqlite-begin-event" else ""
        return ("import sqlalchemy\nimport sqlalchemy.orm as orm\n"
                f"engine = sqlalchemy.create_engine({self.url!r}, {options})\n{event}\n{then}\n"
                f"def get_connection():\n    return {SHAPES.get(shape, shape)}\n")

    def opener(self, *args, **more):
        """Return a get_connection()."""
        space = {}
        exec(self.source(*args, **more), space)
        return space["get_connection"]

    def query(self, sql):
        with self.engine.connect() as conn:
            return [tuple(row) for row in conn.exec_driver_sql(sql)]

    def rows(self):
        return [x for (x,) in self.query("SELECT x FROM old ORDER BY x")]

    def tables(self):
        return sorted(sqlalchemy.inspect(self.engine).get_table_names())


def make_base(driver, request, tmp_path):
    if driver.startswith("sqlite"):
        return Base(driver, f"sqlite:///{tmp_path / 'base.db'}")
    pytest.importorskip(driver)
    url = request.getfixturevalue("cluster").url
    return Base(driver, url.replace("+psycopg:", f"+{driver}:"))


@pytest.fixture(params=DRIVERS)
def base(request, tmp_path):
    return make_base(request.param, request, tmp_path)


@pytest.fixture(params=["psycopg", "psycopg2"])
def postgres(request, tmp_path):
    return make_base(request.param, request, tmp_path)


@pytest.fixture
def lite(request, tmp_path):
    return make_base("sqlite", request, tmp_path)


def test_what_a_tool_forgot_to_commit_is_committed_on_every_driver(base, run_tools):
    result = run_tools(base.opener("connection"), tool=ORM + """
def run(conn):
    do(conn, "INSERT INTO old VALUES (2)")
    do(conn, "CREATE TABLE new AS SELECT x FROM old")
    """, next=ORM + """
def run(conn):
    do(conn, "INSERT INTO new VALUES (3)")
    """)
    assert (result.status, result.errors) == ("success", {})
    assert (base.rows(), base.tables()) == ([1, 2], ["new", "old"])
    assert base.query("SELECT x FROM new ORDER BY x") == [(1,), (2,), (3,)]


@pytest.mark.parametrize("sql", ["INSERT INTO old VALUES (2)", "DROP TABLE old",
                                 "CREATE TABLE new AS SELECT x FROM old",
                                 "CREATE INDEX new ON old (x)", "ALTER TABLE old ADD y INTEGER"])
def test_a_failed_tool_leaves_nothing_behind_on_any_driver(base, sql, run_tools):
    result = run_tools(base.opener("connection"), first="def run(conn): pass", tool=ORM + f"""
def run(conn):
    do(conn, {sql!r})
    raise ValueError("too late")
    """)
    assert result.errors == {"tool": "ValueError: too late"}
    assert (base.rows(), base.tables()) == ([1], ["old"])
    assert [column["name"] for column in sqlalchemy.inspect(base.engine).get_columns("old")] \
        == ["x"]
    assert not sqlalchemy.inspect(base.engine).get_indexes("old")


@pytest.mark.parametrize("setting", ["PRAGMA foreign_keys = ON", "SELECT 1"])
def test_a_failed_tool_leaves_nothing_behind_after_a_setting_in_get_connection(
        lite, setting, run_tools):
    def get_connection(connect=lite.opener("connection")):
        conn = connect()
        conn.execute(sqlalchemy.text(setting))  # with which SQLAlchemy is in a transaction
        return conn
    result = run_tools(get_connection, tool=ORM + """
def run(conn):
    do(conn, "CREATE TABLE new AS SELECT x FROM old")
    raise ValueError("too late")
    """)
    assert result.errors == {"tool": "ValueError: too late"}
    assert lite.tables() == ["old"]


def test_what_check_rejects_is_rolled_back_on_every_driver(base, run_tools):
    result = run_tools(base.opener("connection"), tool=ORM + """
def run(conn):
    do(conn, "CREATE TABLE new AS SELECT x FROM old")
def check(conn):
    assert do(conn, "SELECT count(*) FROM new").scalar() == 0, "a row"
    """)
    assert result.errors == {"tool": "AssertionError: a row"}
    assert base.tables() == ["old"]


def test_a_statement_that_failed_and_was_swallowed_loses_no_rows_in_a_green_run(
        base, run_tools):
    result = run_tools(base.opener("connection"), tool=ORM + """
def run(conn):
    do(conn, "INSERT INTO old VALUES (2)")
    try:
        do(conn, "SELECT * FROM nowhere")
    except Exception:
        pass
    return 1
    """)
    if base.is_sqlite:  # where it costs only itself
        assert (result.status, base.rows()) == ("success", [1, 2])
    else:
        assert "caught and ignored" in result.errors["tool"]
        assert base.rows() == [1]


def test_a_swallowed_error_behind_a_savepoint_costs_nothing_on_any_driver(base, run_tools):
    result = run_tools(base.opener("connection"), tool=ORM + """
def run(conn):
    do(conn, "INSERT INTO old VALUES (2)")
    try:
        with conn.begin_nested():
            do(conn, "INSERT INTO old VALUES (1)")
    except Exception:
        pass
    """)
    assert (result.status, base.rows()) == ("success", [1, 2])


MODEL = """
import sqlalchemy, sqlalchemy.orm as orm
Base = orm.declarative_base()

class Old(Base):
    __tablename__ = "old"
    x = sqlalchemy.Column(sqlalchemy.Integer, primary_key=True)
"""


def test_a_flush_that_failed_and_was_swallowed_is_no_success(base, run_tools):
    result = run_tools(base.opener("connection"), tool=MODEL + """
def run(conn):
    with orm.Session(conn) as session:
        session.add(Old(x=2))
        session.flush()
        try:
            session.add(Old(x=1))
            session.flush()
        except Exception:
            pass
        session.commit()
    """, next="def run(conn): pass")
    assert result.failed == ["tool"] and base.rows() == [1]


def test_objects_in_a_session_on_the_connection_are_committed_or_rolled_back(base, run_tools):
    result = run_tools(base.opener("connection"), tool=MODEL + """
def run(conn):
    with orm.Session(conn) as session:
        session.add(Old(x=2))
        session.commit()
    """, bad="""
from sqlalchemy.orm import Session
import tool
def run(conn):
    session = Session(conn)
    session.add(tool.Old(x=3))
    session.flush()
    session.add(tool.Old(x=4))
    raise ValueError
    """, good="def run(conn): pass")
    assert (result.succeeded, result.failed) == (["tool"], ["bad"])
    assert base.rows() == [1, 2]


@pytest.mark.parametrize("shape", SESSIONS)
def test_a_session_is_lent_to_tools_that_commit_themselves(base, shape, run_tools):
    result = run_tools(base.opener(shape), options={"commits": True}, tool=ORM + """
def run(conn):
    do(conn, "INSERT INTO old VALUES (2)")
    conn.commit()
    do(conn, "INSERT INTO old VALUES (3)")
    """, bad=ORM + """
def run(conn):
    do(conn, "INSERT INTO old VALUES (4)")
    raise ValueError
    """)
    assert (result.succeeded, result.failed) == (["tool"], ["bad"])
    assert base.rows() == [1, 2, 3]


@pytest.mark.parametrize("options", [{}, {"commits": True}], ids=["plain", "commits"])
def test_a_tool_may_commit_and_open_blocks_of_its_own_on_every_driver(
        base, options, run_tools):
    result = run_tools(base.opener("connection"), options=options, tool=ORM + """
def run(conn):
    with conn.begin():
        do(conn, "INSERT INTO old VALUES (2)")
    do(conn, "INSERT INTO old VALUES (3)")
    conn.commit()
    do(conn, "INSERT INTO old VALUES (4)")
    """, bad=ORM + """
def run(conn):
    do(conn, "INSERT INTO old VALUES (5)")
    conn.commit()
    do(conn, "INSERT INTO old VALUES (6)")
    raise ValueError
    """)
    assert (result.succeeded, result.failed) == (["tool"], ["bad"])
    assert base.rows() == [1, 2, 3, 4, 5]


def test_a_tool_that_closes_what_it_was_lent_loses_nothing_unseen(base, run_tools):
    result = run_tools(base.opener("connection"), tool=ORM + """
def run(conn):
    do(conn, "INSERT INTO old VALUES (2)")
    conn.close()
    do(conn, "INSERT INTO old VALUES (3)")
    """)
    assert result.failed == ["tool"] and base.rows() == [1]


@pytest.mark.parametrize("end", ["", "raise ValueError"])
def test_what_a_tool_writes_past_sqlalchemy_is_committed_or_rolled_back_too(
        base, end, run_tools, request):
    if end and base.driver == "sqlite-begin-event":
        request.applymarker(pytest.mark.xfail(strict=True, reason=(
            "the driver commits each statement until SQLAlchemy has heard of one")))
    result = run_tools(base.opener("connection"), tool=f"""
def run(conn):
    conn.connection.cursor().execute("INSERT INTO old VALUES (2)")
    {end}
    """)
    assert (result.status == "failed") is bool(end)
    assert base.rows() == ([1] if end else [1, 2])


@pytest.mark.parametrize("end", ["", "raise ValueError"])
def test_the_connection_of_the_pool_is_as_good_as_the_drivers_own(base, end, run_tools):
    result = run_tools(base.opener("engine.raw_connection()"), tool=f"""
def run(conn):
    cursor = conn.cursor()
    cursor.execute("INSERT INTO old VALUES (2)")
    cursor.execute("CREATE TABLE new (x INTEGER)")
    {end}
    """)
    assert (result.status == "failed") is bool(end), result.errors
    assert base.rows() == ([1] if end else [1, 2])
    assert base.tables() == (["old"] if end else ["new", "old"])


# --- what commits each statement at once ---------------------------------------------------------

FAILS = ORM + """
def run(conn):
    do(conn, "INSERT INTO old VALUES (2)")
    do(conn, "CREATE TABLE new (x INTEGER)")
    raise ValueError("too late")
"""
AT_ONCE = [
    pytest.param('isolation_level="AUTOCOMMIT"', "", id="engine"),
    pytest.param("", 'engine = engine.execution_options(isolation_level="AUTOCOMMIT")',
                 id="engine.execution_options"),
    pytest.param('execution_options={"isolation_level": "AUTOCOMMIT"}', "",
                 id="create_engine(execution_options)"),
]


@pytest.mark.parametrize("options, then", AT_ONCE)
def test_a_failed_tool_keeps_no_rows_where_each_statement_is_committed_at_once(
        base, options, then, run_tools):
    result = run_tools(base.opener("connection", options, then), tool=FAILS)
    assert result.failed == ["tool"]
    assert (base.rows(), base.tables()) == ([1], ["old"])
    if not base.is_sqlite:
        assert 'take isolation_level="AUTOCOMMIT"' in result.errors["tool"]
        assert '"commits": True' in result.errors["tool"]


def test_a_driver_in_autocommit_mode_keeps_no_rows_either(base, run_tools):
    if base.driver == "sqlite-begin-event":
        pytest.skip("its recipe is that mode")
    options = 'connect_args={"autocommit": True}'
    if base.is_sqlite:
        options = 'connect_args={"isolation_level": None}'
    if base.driver == "psycopg2":
        options = ""
    then = "" if options else """
@sqlalchemy.event.listens_for(engine, "connect")
def connected(conn, _record):
    conn.autocommit = True
"""
    result = run_tools(base.opener("connection", options, then), tool=FAILS)
    assert result.failed == ["tool"]
    assert (base.rows(), base.tables()) == ([1], ["old"])
    assert base.is_sqlite or "commits each statement at once" in result.errors["tool"]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="autocommit= came with 3.12")
@pytest.mark.parametrize("end", ["", "raise ValueError"])
def test_sqlite_with_autocommit_true_is_refused(lite, end, run_tools):
    opened = lite.opener("connection", 'connect_args={"autocommit": True}')
    result = run_tools(opened, tool=ORM + f"""
def run(conn):
    do(conn, "INSERT INTO old VALUES (2)")
    {end}
    """)
    assert "commits each statement at once" in result.errors["tool"]
    assert lite.rows() == [1]


def test_a_connection_in_autocommit_is_lent_to_tools_that_commit_themselves(base, run_tools):
    if base.driver == "sqlite-begin-event":
        pytest.skip("its recipe begins a transaction even so")
    opened = base.opener("connection", 'isolation_level="AUTOCOMMIT"')
    result = run_tools(opened, options={"commits": True}, tool=ORM + """
def run(conn):
    do(conn, "INSERT INTO old VALUES (2)")
    do(conn, "VACUUM")
    """)
    assert (result.status, result.errors, base.rows()) == ("success", {}, [1, 2])


def test_a_connection_that_get_connection_has_set_to_autocommit_is_refused(postgres, run_tools):
    shape = 'engine.connect().execution_options(isolation_level="AUTOCOMMIT")'
    result = run_tools(postgres.opener(shape), tool=FAILS)
    assert "commits each statement at once" in result.errors["tool"]
    assert (postgres.rows(), postgres.tables()) == ([1], ["old"])


def test_a_tool_that_turns_to_autocommit_itself_is_told_what_stays_and_the_next_is_whole(
        postgres, run_tools):
    result = run_tools(postgres.opener("connection"), tool="""
def run(conn):
    conn.execution_options(isolation_level="AUTOCOMMIT")
    conn.exec_driver_sql("INSERT INTO old VALUES (2)")
    raise ValueError
    """)
    assert "what it committed stays" in result.outcomes["tool"].reason
    assert postgres.rows() == [1, 2]
    result = run_tools(postgres.opener("connection"), vacuum="""
def run(conn):
    conn.execution_options(isolation_level="AUTOCOMMIT")
    conn.exec_driver_sql("VACUUM")
    """, next="""
def run(conn):
    conn.exec_driver_sql("INSERT INTO old VALUES (3)")
    raise ValueError("of next")
    """)
    assert result.errors == {"next": "ValueError: of next"}
    assert postgres.rows() == [1, 2]


# --- what is no connection, and what is in two ---------------------------------------------------

@pytest.mark.parametrize("shape", ["engine", "orm.sessionmaker(engine)"])
@pytest.mark.parametrize("use", ["with conn.begin() as conn: do(conn, INSERT)",
                                 "conn().execute(text(INSERT)) if callable(conn)"
                                 " else do(conn.connect(), INSERT)"])
def test_what_hands_out_connections_is_no_connection(base, shape, use, run_tools):
    result = run_tools(base.opener(shape), tool=ORM + f"""
INSERT = "INSERT INTO old VALUES (2)"
def run(conn):
    {use}
    """)
    assert result.failed == ["tool"] and "`engine.connect()`" in result.errors["tool"]
    assert base.rows() == [1]


def test_an_engine_is_lent_to_tools_that_commit_themselves(base, run_tools):
    result = run_tools(base.opener("engine"), options={"commits": True}, tool=ORM + """
def run(conn):
    with conn.begin() as conn:
        do(conn, "INSERT INTO old VALUES (2)")
    """)
    assert (result.status, base.rows()) == ("success", [1, 2])


@pytest.mark.parametrize("shape", ["engine.begin()", "orm.sessionmaker(engine).begin()"])
def test_a_block_that_nobody_entered_is_no_connection(base, shape, run_tools):
    result = run_tools(base.opener(shape), tool=ORM + """
def run(conn):
    with conn as conn:
        do(conn, "INSERT INTO old VALUES (2)")
def check(conn):
    raise ValueError
    """)
    assert "in get_connection(): TypeError" in result.errors["tool"]
    assert base.rows() == [1]


def test_an_asynchronous_session_is_refused(lite, run_tools):
    pytest.importorskip("greenlet")
    result = run_tools(lite.opener("__import__('sqlalchemy.ext.asyncio')"
                                   ".ext.asyncio.AsyncSession()"),
                       tool="def run(conn): pass")
    assert "which is asynchronous" in result.errors["tool"]


# --- side by side, and items ---------------------------------------------------------------------

def write(sandbox, base, shape, body, **more):
    tool = {"module": "tool", **more}
    sandbox.pipeline(f"NAME = 'p'\nTOOL_MAP = {{'tool': {tool!r}, 'other': 'other'}}\n"
                     "STAGES = {}\n" + base.source(shape))
    sandbox.tool("tool", ORM + body)
    sandbox.tool("other", "needs = []\ndef run(): pass")
    return sandbox


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_tools_in_workers_are_whole_too(quick, base, jobs):
    write(quick, base, "connection", """
def run(conn):
    do(conn, "INSERT INTO old VALUES (2)")
    do(conn, "CREATE TABLE new AS SELECT x FROM old")
    raise ValueError("too late")
    """, needs=[])
    ended = quick.run("--jobs", jobs)
    assert ended.code == 1 and "too late" in ended.err, ended
    assert (base.rows(), base.tables()) == ([1], ["old"])


ITEMS = """
def items():
    return "abc"[:3] and ["2", "3", "4"]
def run(conn, item):
    do(conn, f"INSERT INTO old VALUES ({item})")
    if item == "3":
        do(conn, "CREATE TABLE new (x INTEGER)")
        try:
            do(conn, "SELECT * FROM nowhere")
        except Exception:
            if conn.dialect.name == "sqlite":
                raise
"""


@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize("batch", [1, 500])
def test_items_of_which_one_fails_leave_nothing_of_it(quick, base, jobs, batch):
    write(quick, base, "connection", ITEMS, batch=batch)
    ended = quick.run("--jobs", jobs)
    assert ended.code == 1, ended
    assert (base.rows(), base.tables()) == ([1, 2, 4], ["old", "orchestrator_items"])
    assert base.query("SELECT item, status FROM orchestrator_items ORDER BY item") \
        == [("2", "success"), ("3", "failed"), ("4", "success")]


@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize("options, then", AT_ONCE)
def test_items_keep_nothing_of_a_failure_where_each_statement_is_committed_at_once(
        quick, base, options, then, jobs):
    write(quick, base, "connection", ITEMS)
    quick.pipeline("NAME = 'p'\nTOOL_MAP = {'tool': 'tool'}\nSTAGES = {}\n"
                   + base.source("connection", options, then))
    ended = quick.run("--jobs", jobs)
    assert ended.code == 1, ended
    if base.is_sqlite:
        assert base.rows() == [1, 2, 4]
    else:
        assert (base.rows(), base.tables()) == ([1], ["old"])
        assert "commits each statement at once" in ended.err


@pytest.mark.parametrize("shape", SESSIONS)
@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize("body", ["""
def run(conn):
    do(conn, "INSERT INTO old VALUES (2)")
""", ITEMS], ids=["plain", "items"])
def test_a_session_is_refused_with_what_to_return(quick, base, shape, jobs, body):
    write(quick, base, shape, body)
    ended = quick.run("--jobs", jobs)
    assert ended.code == 1 and "Session" in ended.err, ended
    assert "`engine.connect()`" in ended.err and "Session(conn) works" in ended.err
    assert (base.rows(), base.tables()) == ([1], ["old"])


@pytest.mark.parametrize("batch", [1, 500])
def test_items_may_put_a_session_on_their_connection(quick, base, batch):
    write(quick, base, "connection", """
from sqlalchemy.orm import Session
def items():
    return ["2", "3", "4"]
def run(conn, item):
    with Session(conn) as session:
        do(session, f"INSERT INTO old VALUES ({item})")
        session.flush()
        if item == "3":
            raise ValueError
        session.commit()
    """, batch=batch)
    ended = quick.run()
    done = [x for x in base.rows() if x != 1]
    told = base.query("SELECT item FROM orchestrator_items WHERE status = 'success' ORDER BY item")
    assert [(str(x),) for x in done] == told, ended
