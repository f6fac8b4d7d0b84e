"""The ledger stays where it was when the connection was opened, whatever a tool does to it."""
import os

import pytest
from stores import Pipeline, Store, make_alchemy, make_psycopg, make_pymysql

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the servers need a Unix socket")

POSTGRES = ["psycopg", "psycopg-autocommit", "psycopg2", "psycopg2-autocommit", "alchemy"]
MARIA = ["pymysql", "pymysql-autocommit", "alchemy-mariadb"]


def make_store(name, request, tmp_path):
    driver, _, mode = name.partition("-")
    pytest.importorskip({"alchemy": "sqlalchemy"}.get(driver, driver))
    if name == "alchemy":
        pytest.importorskip("psycopg")
        return make_alchemy(request.getfixturevalue("cluster").url, "postgresql")
    if name == "alchemy-mariadb":
        socket = request.getfixturevalue("maria").socket
        return make_alchemy(f"mysql+pymysql://root@/test?unix_socket={socket}", "mariadb")
    if driver == "pymysql":
        return make_pymysql(bool(mode), request.getfixturevalue("maria").socket)
    if driver == "duckdb":
        return Store("duckdb", f"import duckdb\nreturn duckdb.connect({str(tmp_path / 'd.db')!r})",
                     "?")
    return make_psycopg(driver, bool(mode), request.getfixturevalue("cluster").dsn)


def name_takes_marks(name):
    """Return whether a `?` in SQL without values is a letter to our own do()."""
    return name != "alchemy"


@pytest.fixture
def store(request, tmp_path):
    store = make_store(request.param, request, tmp_path)
    store.clear()
    if store.kind == "postgresql":
        for schema in ("other", '"my ""app"', '"what?"'):
            if "?" not in schema or name_takes_marks(request.param):
                store.query(f"DROP SCHEMA IF EXISTS {schema} CASCADE")
                store.query(f"CREATE SCHEMA {schema}")
    if store.kind == "mariadb":
        store.query("CREATE OR REPLACE DATABASE other")
    if store.kind == "duckdb":
        store.query("CREATE SCHEMA other")
    return store


@pytest.fixture
def pipeline(store, quick):
    return Pipeline(quick, store)


def on(names):
    return pytest.mark.parametrize("store", names, indirect=True)


def connecting(store, *statements, then=""):
    """Return a store whose get_connection() says some SQL first."""
    body = store.source.partition("\n")[2].replace("\n    ", "\n").lstrip()
    body, _, made = body.rstrip().rpartition("return ")
    say = "conn.exec_driver_sql" if "sqlalchemy" in body else \
        "conn.execute" if store.kind == "duckdb" else "conn.cursor().execute"
    said = "".join(f"{say}({sql!r})\n" for sql in statements)
    return Store(store.kind, f"{body}conn = {made}\n{said}{then}\nreturn conn\n", store.mark)


WORK = {"postgresql": "public.work", "mariadb": "test.work", "duckdb": "main.work"}
LEAVE = {
    "postgresql": ["SET search_path TO other", "SET search_path TO ''",
                   "SET LOCAL search_path TO other", "SET search_path TO pg_temp, other",
                   "CREATE TEMPORARY TABLE orchestrator_items (LIKE public.orchestrator_items)",
                   "SELECT set_config('search_path', 'other', false)", "SET SCHEMA 'other'"],
    "mariadb": ["USE other"],
    "duckdb": ["USE other", "SET schema = 'other'", "SET search_path = 'other'",
               "CREATE TEMPORARY TABLE orchestrator_items AS FROM main.orchestrator_items"],
}
WAYS = [(name, sql) for names, kind in ((["psycopg", "psycopg2-autocommit", "alchemy"],
                                         "postgresql"), (MARIA, "mariadb"), (["duckdb"], "duckdb"))
        for name in names for sql in LEAVE[kind]]
each_way = pytest.mark.parametrize("store, sql", WAYS, indirect=["store"])
A_LEDGER = {
    "postgresql": "CREATE TABLE other.orchestrator_items (LIKE public.orchestrator_items)",
    "mariadb": "CREATE TABLE other.orchestrator_items LIKE test.orchestrator_items",
    "duckdb": "CREATE TABLE other.orchestrator_items AS FROM main.orchestrator_items LIMIT 0",
}


def is_whole(pipeline, store, names, *words):
    """Assert that each item is done once, that the ledger tells it, and that it stays so."""
    where = WORK[store.kind]

    def done():
        return sorted(item for (item,) in store.query(f"SELECT item FROM {where}"))

    assert done() == sorted(names)
    ledger = where.replace("work", "orchestrator_items")
    assert sorted(store.query(f"SELECT item, status FROM {ledger}")) \
        == [(name, "success") for name in sorted(names)]
    again = pipeline.run(*words)
    assert done() == sorted(names)
    assert f"none of {len(names)} items is pending" in again.err
    assert pipeline.counts()["success"] == len(names)


@each_way
@pytest.mark.parametrize("batch, has_other", [(1, True), (500, False)],
                         ids=["another-ledger-there", "batch"])
def test_an_item_that_goes_to_another_schema_leaves_the_ledger_behind(
        pipeline, store, sql, batch, has_other):
    pipeline.write(batch=batch)
    pipeline.tool("pass", "return []")
    pipeline.run()
    if has_other:
        store.query(A_LEDGER[store.kind])
    pipeline.tool(f"""
        if item == "b":
            do(conn, {sql!r})
        do(conn, "INSERT INTO {WORK[store.kind]} (item) VALUES (?)", item)
    """)
    pipeline.run()
    is_whole(pipeline, store, "abcde")
    if has_other:
        assert store.query("SELECT count(*) FROM other.orchestrator_items") == [(0,)]


@each_way
@pytest.mark.parametrize("place", ["items", "setup"])
def test_nor_do_items_and_setup_take_it_along(pipeline, store, sql, place):
    pipeline.tool("pass", "return []")
    pipeline.run()
    goes = f"do(conn, {sql!r})"
    pipeline.tool(f'do(conn, "INSERT INTO {WORK[store.kind]} (item) VALUES (?)", item)',
                  f"{goes if place == 'items' else 'pass'}\nyield from 'abc'",
                  top=f"def setup(conn):\n    {goes if place == 'setup' else 'pass'}")
    pipeline.run()
    is_whole(pipeline, store, "abc")


@on(["psycopg", "psycopg2-autocommit", "alchemy", "pymysql", "alchemy-mariadb", "duckdb"])
@pytest.mark.parametrize("options", [{}, {"commits": True}], ids=["", "commits"])
@pytest.mark.parametrize("has_other", [False, True], ids=["", "another-ledger-there"])
def test_a_tool_before_it_on_the_same_connection_does_not_redirect_it(
        pipeline, store, options, has_other, quick):
    sql = LEAVE[store.kind][0]
    if has_other:  # and none yet where it belongs
        pipeline.tool("pass", "return []")
        pipeline.run()
        store.query(A_LEDGER[store.kind])
        store.query(f"DROP TABLE {WORK[store.kind].replace('work', 'orchestrator_items')}")
    quick.pipeline(f"NAME = 'p'\nTOOL_MAP = {{'first': {{'module': 'first', **{options!r}}}, "
                   f"'tool': 'tool'}}\nSTAGES = {{}}\n{store.source}")
    quick.tool("first", f"from work import do\ndef run(conn):\n    do(conn, {sql!r})\n")
    pipeline.tool(f'do(conn, "INSERT INTO {WORK[store.kind]} (item) VALUES (?)", item)')
    pipeline.run()
    assert pipeline.run("tool").code == 0
    where = WORK[store.kind]
    assert sorted(store.query(f"SELECT item FROM {where}")) == [(item,) for item in "abcde"]
    if has_other:
        assert store.query("SELECT count(*) FROM other.orchestrator_items") == [(0,)]


@each_way
def test_nor_does_an_item_redirect_a_further_try_or_a_tool_that_comes_after(
        pipeline, store, sql, quick):
    tools = {"tool": {"module": "tool", "retries": 1, "retry_delay": 0},
             "next": {"module": "next", "each": "tool"}}
    quick.pipeline(f"NAME = 'p'\nTOOL_MAP = {tools!r}\nSTAGES = {{}}\n{store.source}")
    pipeline.tool(f"""
        if context.attempt == 1 and item in "bd":
            raise ValueError
        if item == "c" and {not sql.startswith("CREATE")}:
            do(conn, {sql!r})
        do(conn, "INSERT INTO {WORK[store.kind]} (item) VALUES (?)", item)
    """)
    quick.tool("next", f"""
from work import do
def run(conn, item):
    do(conn, "INSERT INTO {WORK[store.kind]} (item) VALUES (?)", "next " + item)
""")
    pipeline.run()
    pipeline.run()
    where = WORK[store.kind]
    assert sorted(item for (item,) in store.query(f"SELECT item FROM {where}")) == sorted(
        [*"abcde", *["next " + item for item in "abcde"]])


@on(POSTGRES)
@pytest.mark.parametrize("words", [(), ("--jobs", "2")])
def test_a_failed_item_whose_set_is_undone_is_recorded_in_the_one_ledger(pipeline, store, words):
    pipeline.tool(f"""
        do(conn, "SET search_path TO other")
        do(conn, "INSERT INTO {WORK[store.kind]} (item) VALUES (?)", item)
        if item == "b":
            raise ValueError("no")
    """)
    pipeline.run(*words, code=1)
    assert dict(store.ledger()) == {item: "failed" if item == "b" else "success"
                                    for item in "abcde"}
    assert store.query("SELECT count(*) FROM pg_class WHERE relname = 'orchestrator_items'") \
        == [(1,)]


@on(POSTGRES)
@pytest.mark.parametrize("path", ["other", "pg_temp, other", "nowhere, other, public", '"$user",'
                                  ' other', "other, pg_temp"])
@pytest.mark.parametrize("commits", [False, True], ids=["not-committed", "committed"])
def test_a_search_path_that_get_connection_sets_says_where_the_ledger_is(
        quick, store, path, commits):
    inside = connecting(store, f"SET search_path TO {path}", then="conn.commit()" * commits)
    pipeline = Pipeline(quick, inside)
    pipeline.tool('do(conn, "INSERT INTO public.work (item) VALUES (?)", item)')
    pipeline.run()
    again = pipeline.run()
    assert store.work() == list("abcde") and "none of 5 items is pending" in again.err
    assert store.query("SELECT relnamespace::regnamespace::text FROM pg_class "
                       "WHERE relname = 'orchestrator_items'") == [("other",)]
    assert pipeline.counts()["success"] == 5


@on(["psycopg", "psycopg2-autocommit", "alchemy"])
@pytest.mark.parametrize("commits", [False, True], ids=["not-committed", "committed"])
@pytest.mark.parametrize("path", ["other, public", "other"])
def test_an_old_ledger_in_the_default_schema_goes_on(quick, store, commits, path):
    pipeline = Pipeline(quick, store)
    pipeline.tool('do(conn, "INSERT INTO public.work (item) VALUES (?)", item)')
    pipeline.run()  # in public, where a SET before it that was undone has led too
    if path == "other" and (commits or "autocommit = True" in store.source):
        pytest.skip("there it never was found")
    inside = connecting(store, f"SET search_path TO {path}", then="conn.commit()" * commits)
    pipeline = Pipeline(quick, inside)
    again = pipeline.run()
    assert store.work() == list("abcde") and "none of 5 items is pending" in again.err
    assert store.query("SELECT relnamespace::regnamespace::text FROM pg_class "
                       "WHERE relname = 'orchestrator_items'") == [("public",)]


@on(["psycopg", "psycopg2"])
@pytest.mark.parametrize("name", ['"my ""app"', '"what?"'])
def test_a_schema_may_have_any_name(quick, store, name):
    inside = connecting(store, f"SET search_path TO {name}", then="conn.commit()")
    pipeline = Pipeline(quick, inside)
    pipeline.tool('do(conn, "INSERT INTO public.work (item) VALUES (?)", item)')
    pipeline.run()
    again = pipeline.run()
    assert store.work() == list("abcde") and "none of 5 items is pending" in again.err


@on(POSTGRES)
def test_without_a_schema_that_is_there_the_tool_fails(quick, store):
    inside = connecting(store, "SET search_path TO nowhere", then="conn.commit()")
    pipeline = Pipeline(quick, inside)
    pipeline.tool('do(conn, "INSERT INTO public.work (item) VALUES (?)", item)')
    ended = pipeline.run(code=1)
    assert "no schema has been selected" in ended.err and store.work() == []


@on(["duckdb"])
def test_a_ledger_of_duckdb_is_in_the_schema_that_get_connection_uses(quick, store):
    pipeline = Pipeline(quick, connecting(store, "USE other"))
    pipeline.tool('do(conn, "INSERT INTO main.work (item) VALUES (?)", item)')
    pipeline.run()
    again = pipeline.run()
    assert store.work() == list("abcde") and "none of 5 items is pending" in again.err
    assert store.query("SELECT count(*) FROM other.orchestrator_items") == [(5,)]


@on(["duckdb"])
def test_an_attached_database_of_duckdb_gets_no_ledger(pipeline, store, tmp_path):
    pipeline.tool("""
        if item == "b":
            do(conn, "COMMIT")
    """)
    pipeline.write(commits=True)
    pipeline.tool(f"""
        if item == "b":
            do(conn, "ATTACH IF NOT EXISTS '{tmp_path / "more.db"}' AS more")
            do(conn, "USE more")
        do(conn, "INSERT INTO d.main.work (item) VALUES (?)", item)
    """)
    pipeline.run()
    is_whole(pipeline, store, "abcde")


@on(POSTGRES[:1] + POSTGRES[2:3])
def test_a_connection_is_left_in_no_transaction_by_the_search(pipeline, store, quick):
    # What a tool that commits itself does first may want that: VACUUM, another mode.
    quick.pipeline("NAME = 'p'\nTOOL_MAP = {'first': {'module': 'first', 'commits': True}, "
                   f"'tool': 'tool'}}\nSTAGES = {{}}\n{store.source}")
    quick.tool("first", "def run(conn):\n    conn.autocommit = True\n"
                        "    conn.cursor().execute('VACUUM')\n")
    pipeline.tool("note(conn, item)")
    pipeline.run()
    assert store.work() == list("abcde")


@on(["psycopg", "alchemy"])
def test_a_setting_of_get_connection_outlives_the_search(quick, store):
    pipeline = Pipeline(quick, connecting(store, "SET search_path TO other"))
    store.query("CREATE TABLE other.mine (x int)")
    quick.pipeline(f"NAME = 'p'\nTOOL_MAP = {{'tool': 'tool'}}\nSTAGES = {{}}\n"
                   f"{pipeline.store.source}")
    quick.tool("tool", "from work import do\ndef run(conn):\n"
                       "    do(conn, 'INSERT INTO mine VALUES (1)')\n")
    pipeline.run()
    assert store.query("SELECT x FROM other.mine") == [(1,)]
