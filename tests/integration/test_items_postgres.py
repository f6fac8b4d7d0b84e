"""Items on PostgreSQL: two coordinators, kills, lost backends, serialization failures."""
import contextlib
import json
import os
import random
import signal
import textwrap

import pytest
from conftest import wait_until
from stores import MEET, MUTANTS, Pipeline, Store, Two, contend, make_alchemy, make_psycopg, patch

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the cluster needs a Unix socket")


@pytest.fixture(params=["psycopg", "psycopg2"])
def store(request, cluster):
    pytest.importorskip(request.param)
    store = make_psycopg(request.param, False, cluster.dsn)
    store.clear()
    return store


def make_postgres(driver, cluster, body=""):
    """Return a store of PostgreSQL, empty, by a driver or SQLAlchemy."""
    for module in ("sqlalchemy", "psycopg") if driver == "alchemy" else (driver,):
        pytest.importorskip(module)
    store = Store("postgresql", body) if body else make_alchemy(cluster.url, "postgresql") \
        if driver == "alchemy" else make_psycopg(driver, False, cluster.dsn)
    store.clear()
    return store


@pytest.fixture
def psycopg_store(cluster):
    pytest.importorskip("psycopg")
    store = make_psycopg("psycopg", False, cluster.dsn)
    store.clear()
    return store


# --- exactly once --------------------------------------------------------------------------------

def test_two_coordinators_do_each_item_once(sandbox, store):
    lost, twice, ended = contend(Two(sandbox, store, retries=3, retry_delay=0.001))
    assert (lost, twice) == ([], []), ended
    assert [code for code, _, _ in ended] == [0, 0], ended


@pytest.mark.parametrize("mutant", MUTANTS)
def test_two_coordinators_of_a_naive_ledger_lose_an_item_or_do_it_twice(
        sandbox, psycopg_store, mutant):
    two = Two(sandbox, psycopg_store, retries=3, retry_delay=0.001)
    two.pipeline.write(engine=MUTANTS[mutant])
    lost, twice, ended = contend(two)
    assert lost or twice, ended


def test_two_first_starts_create_one_ledger(sandbox, store):
    two = Two(sandbox, store)
    two.pipeline.write(engine=patch((
        "            ledger.create()\n",
        "            import meeting; meeting.meet('create')\n"
        "            ledger.create()\n")))
    two.pipeline.tool("note(conn, item)")
    ended = two.run()
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert sorted(store.work()) == list("abcde")


def test_two_coordinators_do_each_item_once_whose_output_is_gone(sandbox, store):
    two = Two(sandbox, store, writes=["out/{item}"])
    two.pipeline.tool("""
        note(conn, item)
        meet(item)  # both have found that it is gone
        Path(__file__).with_name("out").joinpath(item).touch()
    """, "return list('abcde')", "from pathlib import Path\nfrom meeting import meet")
    out = sandbox.folder / "out"
    out.mkdir()
    for done in range(1, 4):
        ended = two.run()
        assert [code for code, _, _ in ended] == [0, 0], ended
        assert sorted(store.work()) == sorted("abcde" * done), ended
        for file in out.iterdir():
            file.unlink()


@pytest.mark.parametrize("words, batch", [((), 1), (("--jobs", "2"), 1), (("--jobs", "2"), 20)])
def test_whoever_is_killed_each_item_is_done_once_and_whole(
        sandbox, psycopg_store, words, batch):
    store, count = psycopg_store, 200
    pipeline = Pipeline(sandbox, store, batch=batch)
    pipeline.tool("note(conn, item, os.getpid())\nnote(conn, item, os.getpid())",
                  f"return [f'{{i:03}}' for i in range({count})]", top="import os")
    chance = random.Random(f"{words} {batch}")

    def done():
        return store.query("SELECT count(*) FROM work")[0][0]

    kills = 0
    while kills < 6:
        goal = min(done() + chance.randrange(2, 50), 2 * count)
        process = sandbox.start(*words)
        try:
            wait_until(lambda goal=goal, process=process:
                       done() >= goal or process.poll() is not None)
            if process.poll() is None:
                kills += 1
                worker = store.query("SELECT note FROM work ORDER BY seq DESC LIMIT 1")[0][0]
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(int(worker) if chance.random() < 0.5 else process.pid, signal.SIGKILL)
            process.communicate(timeout=30)
        finally:
            process.kill()
        if process.returncode == 0:
            break
    sandbox.run(*words)
    assert kills
    assert store.query("SELECT item, count(*) FROM work GROUP BY item HAVING count(*) <> 2") == []
    assert done() == 2 * count
    assert store.query("SELECT DISTINCT status FROM orchestrator_items") == [("success",)]


# --- lost backends -------------------------------------------------------------------------------

LOSE = """
    import os, {driver}
    from pathlib import Path

    def lose(conn):
        flag = Path(__file__).with_name("lost")
        if not flag.exists():
            flag.touch()
            pid = do(conn, "SELECT pg_backend_pid()")[0][0]
            other = {driver}.connect({dsn!r})
            do(other, f"SELECT pg_terminate_backend({{pid}}, 5000)")
            other.close()
"""


@pytest.mark.parametrize("driver, batch", [("psycopg", 1), ("psycopg2", 500), ("alchemy", 1)])
@pytest.mark.parametrize("end", [
    pytest.param("do(conn, 'SELECT 1')", id="seen"),
    pytest.param("raise ValueError('mine')", id="not-seen"),
    pytest.param("pass", id="first-seen-at-the-end"),
    pytest.param("try: do(conn, 'SELECT 1')\n    except Exception: pass", id="swallowed"),
])
def test_a_lost_backend_is_a_death_of_one_item_and_all_are_done(quick, cluster, driver, batch,
                                                                end):
    module = {"alchemy": "psycopg"}.get(driver, driver)
    store = make_postgres(driver, cluster)
    pipeline = Pipeline(quick, store, batch=batch)
    pipeline.tool(f'note(conn, item)\nif item == "c" and not Path(__file__).with_name("lost")'
                  f'.exists():\n    lose(conn)\n    {end}', "",
                  LOSE.format(driver=module, dsn=cluster.dsn))
    ended = pipeline.run()
    assert "may have been done" not in ended.err
    assert "it took its connection down 1 of 3 times; again" in ended.err
    assert store.work() == list("abdec")
    assert store.ledger("item, status, attempts, deaths") == [
        (item, "success", 1, int(item == "c")) for item in "abcde"]


END_BACKEND = "do(conn, 'SELECT pg_terminate_backend(pg_backend_pid(), 5000)')"


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "alchemy"])
@pytest.mark.parametrize("words, batch", [((), 1), ((), 500), (("--jobs", "2"), 1),
                                          (("--jobs", "2"), 500)])
@pytest.mark.parametrize("end", [
    pytest.param(END_BACKEND, id="seen"),
    pytest.param(f"try: {END_BACKEND}\n    except Exception: pass", id="swallowed"),
    pytest.param(f"try: {END_BACKEND}\n    except Exception as e: raise KeyError(item) from e",
                 id="wrapped"),
])
def test_an_item_that_always_ends_its_backend_is_quarantined_and_the_others_are_done(
        quick, cluster, driver, words, batch, end):
    store = make_postgres(driver, cluster)
    pipeline = Pipeline(quick, store, batch=batch)
    pipeline.tool(f"note(conn, item)\nif item == 'b':\n    {end}")
    ended = pipeline.run(*words, code=1)
    assert sorted(store.work()) == list("acde"), ended
    assert "b: the connection is gone: " in ended.err
    assert "it took its connection down 3 of 3 times; quarantined" in ended.err
    assert store.ledger("item, status, attempts, deaths") == [
        (item, "success", 1, 0) if item != "b" else ("b", "quarantined", 0, 3)
        for item in "abcde"]
    assert "1 item given up before: b; --retry-items tool tries again" in pipeline.run(*words).err

    pipeline.tool("note(conn, item)\nif item == 'none': pass").run(*words, "--retry-items", "tool")
    assert sorted(store.work()) == list("abcde")


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
@pytest.mark.parametrize("batch", [1, 500])
def test_a_server_that_is_gone_for_good_fails_the_tool_and_the_next_start_counts_a_death(
        quick, cluster, driver, batch):
    gone = quick.folder / "gone"
    store = make_postgres(driver, cluster, f"""
        from pathlib import Path
        import {driver}
        if Path({str(gone)!r}).exists():
            return {driver}.connect("host=/nowhere user=postgres dbname=postgres")
        return {driver}.connect({cluster.dsn!r})
    """)
    pipeline = Pipeline(quick, store, batch=batch)
    pipeline.tool(f"note(conn, item)\nif item == 'b':\n    Path({str(gone)!r}).touch()\n"
                  f"    {END_BACKEND}", top="from pathlib import Path")
    for times in range(1, 4):
        ended = pipeline.run(code=1)
        gone.unlink()
        assert "at b: the connection is gone: " in ended.err
        assert "in get_connection(): OperationalError: " in ended.err
        assert times == 1 or ("b", "pending", 0, times - 1) in store.ledger(
            "item, status, attempts, deaths")
    pipeline.run(code=1)
    assert sorted(store.work()) == list("acde")
    assert store.ledger("item, status, attempts, deaths")[1] == ("b", "quarantined", 0, 3)


# --- an item that has not spoken yet is in no transaction ---------------------------------------

STATE = '''
    from pathlib import Path
    import psycopg

    def watch(conn, *states):
        """Assert that the server sees the connection in one of some states."""
        raw = conn.connection.dbapi_connection if hasattr(conn, "exec_driver_sql") else conn
        with psycopg.connect({dsn!r}) as other:
            found = other.execute("SELECT state, query FROM pg_stat_activity WHERE pid = %s",
                                  (raw.info.backend_pid,)).fetchone()
        assert found[0] in states, found

    def is_first(name):
        path = Path(__file__).with_name(name)
        is_there = path.exists()
        path.touch()
        return not is_there
'''


@pytest.fixture(params=["psycopg", "psycopg2", "alchemy"])
def watched(request, quick, cluster):
    pytest.importorskip("psycopg")
    store = make_postgres(request.param, cluster)

    def write(run, **options):
        pipeline = Pipeline(quick, store, **options)
        return pipeline.tool(run, top=STATE.format(dsn=cluster.dsn))
    write.store, write.driver = store, request.param
    return write


@pytest.mark.parametrize("words", [(), ("--jobs", "2")])
def test_an_item_is_in_no_transaction_before_its_first_statement(watched, words):
    watched('''
        watch(conn, "idle")
        note(conn, item)
        watch(conn, "idle in transaction")
        if item == "c" and is_first("c"):
            raise KeyError(item)
        if item == "d" and is_first("d"):
            do(conn, "DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")
    ''', retries=1, retry_delay=0).run(*words)
    assert sorted(watched.store.work()) == list("abcde")
    assert watched.store.ledger("item, status, attempts") == [
        (item, "success", 1 + (item == "c")) for item in "abcde"]


def test_an_item_that_says_nothing_is_done_and_so_is_one_that_fails_so(watched):
    watched('''
        watch(conn, "idle")
        if item == "b":
            raise KeyError(item)
        if item == "d":
            note(conn, item)
    ''').run(code=1)
    assert watched.store.ledger() == [
        (item, "failed" if item == "b" else "success") for item in "abcde"]
    assert watched.store.work() == ["d"]


COMMITS = {
    "psycopg": ["with conn.transaction(): note(conn, 'more')\n    conn.commit()",
                "psycopg.ClientCursor(conn).execute(MORE)\n    conn.commit()",
                "note(conn, 'more')\n    conn.commit()"],
    "psycopg2": ["conn.cursor(cursor_factory=RealDictCursor).execute(MORE)\n    conn.commit()",
                 "with conn: conn.cursor(cursor_factory=RealDictCursor).execute(MORE)",
                 "conn.cursor(cursor_factory=RealDictCursor).execute(MORE)\n"
                 "    conn.commit()\n    raise KeyError",
                 "conn.commit(); note(conn, 'more')\n    conn.commit()"],
}


@pytest.mark.parametrize("driver, end", [(d, end) for d, ends in COMMITS.items() for end in ends])
@pytest.mark.parametrize("place", "ac")
def test_an_item_that_commits_by_any_way_is_found_out(quick, cluster, driver, end, place):
    store = make_postgres(driver, cluster)
    pipeline = Pipeline(quick, store)
    pipeline.tool(f"if item == {place!r}:\n    {end}\nelif item != 'b': note(conn, item)",
                  top="import psycopg\nfrom psycopg2.extras import RealDictCursor\n"
                      "MORE = \"INSERT INTO work (item) VALUES ('more')\"")
    pipeline.run(code=1)
    assert store.ledger() == [(item, "quarantined" if item == place else "success")
                              for item in "abcde"]
    assert store.work().count("more") == 1


@pytest.mark.parametrize("driver, first", [
    ("psycopg", "psycopg.ClientCursor(conn).execute(MORE)"),
    ("psycopg", "conn.cursor(name='c').execute('SELECT 1')"),
    ("psycopg", "conn.cursor(row_factory=psycopg.rows.dict_row).execute(MORE)"),
    ("psycopg", "list(conn.cursor().stream('SELECT 1'))"),
    ("psycopg", "with conn.cursor().copy('COPY work (item) FROM STDIN') as c: c.write_row([item])"),
    ("psycopg", "with conn.transaction(): conn.execute(MORE)"),
    ("psycopg", "with conn.pipeline(): conn.execute(MORE)"),
    ("psycopg", "conn.pgconn.exec_(b'BEGIN')"),
    ("psycopg2", "conn.cursor(cursor_factory=RealDictCursor).execute(MORE)"),
    ("psycopg2", "conn.cursor(name='c').execute('SELECT 1')"),
    ("psycopg2", "execute_values(conn.cursor(), 'INSERT INTO work (item) VALUES %s', [('m',)])"),
    ("psycopg2", "conn.cursor().copy_from(StringIO('m'), 'work', columns=['item'])"),
    ("psycopg2", "conn.lobject().close()"),
    ("psycopg2", "kept.append(conn.cursor()) if not kept else kept[0].execute(MORE)"),
    ("psycopg2", "conn.cursor_factory = RealDictCursor; note(conn, 'm')"),
])
def test_whatever_an_item_speaks_by_its_work_is_undone_if_it_fails_and_done_once(
        quick, cluster, driver, first):
    store = make_postgres(driver, cluster)
    pipeline = Pipeline(quick, store)
    pipeline.tool(f"{first}\nnote(conn, item)\nif item == 'c' and context.attempt == 1: 1 / 0",
                  top="import psycopg\nfrom psycopg2.extras import RealDictCursor, execute_values\n"
                      "from io import StringIO\nkept = []\n"
                      "MORE = \"INSERT INTO work (item) VALUES ('more')\"")
    ended = pipeline.run(code=1)
    assert "ZeroDivisionError" in ended.err
    pipeline.run()
    count = 2 if "COPY work" in first else 1
    assert [store.work().count(item) for item in "abcde"] == [count] * 5
    assert store.ledger("item, status, attempts, deaths") == [
        (item, "success", 1 + (item == "c"), 0) for item in "abcde"]
    assert sorted(set(store.work()) - set("abcde")) in ([], ["more"], ["m"])


# --- connections and what they make of rows -------------------------------------------------------

KINDS = {
    "dict_row": ("psycopg", "row_factory=psycopg.rows.dict_row"),
    "namedtuple_row": ("psycopg", "row_factory=psycopg.rows.namedtuple_row"),
    "scalar_row": ("psycopg", "row_factory=psycopg.rows.scalar_row"),
    "class_row": ("psycopg", "row_factory=psycopg.rows.class_row(Exception)"),
    "ClientCursor": ("psycopg", "cursor_factory=psycopg.ClientCursor"),
    "RawCursor": ("psycopg", "cursor_factory=psycopg.RawCursor"),
    "NamedTupleCursor": ("psycopg2", "cursor_factory=extras.NamedTupleCursor"),
    "DictCursor": ("psycopg2", "cursor_factory=extras.DictCursor"),
    "RealDictCursor": ("psycopg2", "cursor_factory=extras.RealDictCursor"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_ledger_is_read_whatever_a_connection_makes_of_rows(quick, cluster, kind):
    driver, factory = KINDS[kind]
    pytest.importorskip(driver)
    store = make_postgres("psycopg", cluster)
    quick.pipeline(f"""
        NAME = "p"
        TOOL_MAP = {{"tool": {{"module": "tool", "retries": 1, "retry_delay": 0}}}}
        def get_connection():
            import {driver}
            from psycopg2 import extras
            return {driver}.connect({cluster.dsn!r}, {factory})
    """).tool("tool", """
        def items(conn):
            return "SELECT x::text, x FROM generate_series(1, 5) x"
        def run(conn, item, context):
            assert item != "3" or context.attempt == 2
            conn.cursor().execute(f"INSERT INTO work (item) VALUES ('{item}')")
    """)
    for _ in range(2):
        ended = quick.run()
        assert ended.code == 0, ended
    assert sorted(store.work()) == list("12345")
    assert "success" in quick.run("--items", "tool").out
    assert json.loads(quick.run("--status", "--json").out)["tools"][0]["items"]["success"] == 5


def make_role(cluster, name, more):
    """Return the source of a get_connection() of a role that may not do everything."""
    store = make_postgres("psycopg", cluster)
    store.query(f"DO $$ BEGIN CREATE ROLE {name} LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; "
                "END $$")
    store.query(f"GRANT USAGE ON SCHEMA public TO {name}")
    store.query("REVOKE TEMPORARY ON DATABASE postgres FROM public")
    store.query(f"ALTER ROLE {name} CONNECTION LIMIT -1")
    store.query(more)
    dsn = cluster.dsn.replace("user=postgres", f"user={name}")
    return store, Store("postgresql", f"import psycopg\nreturn psycopg.connect({dsn!r})")


def test_a_role_with_fewer_connections_than_jobs_has_its_items_done(quick, cluster):
    owner, store = make_role(cluster, "few", "GRANT ALL ON SCHEMA public TO few")
    owner.query("GRANT ALL ON work, work_seq_seq TO few")
    owner.query("ALTER ROLE few CONNECTION LIMIT 1")
    pipeline = Pipeline(quick, store).tool("note(conn, item)")
    ended = pipeline.run("--jobs", "3")
    assert "others do its items: in get_connection(): OperationalError: " in ended.err
    assert "a smaller --jobs" in ended.err
    assert sorted(owner.work()) == list("abcde")


def test_a_role_that_may_not_make_the_ledger_is_told_what_to_grant(quick, cluster):
    owner, store = make_role(cluster, "weak", "REVOKE CREATE ON SCHEMA public FROM weak, public")
    ended = Pipeline(quick, store).tool("pass").run(code=1)
    assert "permission denied for schema public" in ended.err
    assert "GRANT CREATE ON schema public" in ended.err


def test_a_role_that_may_not_make_what_is_temporary_is_told_what_to_grant(quick, cluster):
    owner, store = make_role(cluster, "weak", "GRANT ALL ON SCHEMA public TO weak")
    ended = Pipeline(quick, store).tool("do(conn, 'CREATE TEMP TABLE x (y int)')").run(code=1)
    assert 'GRANT TEMPORARY ON database "postgres"' in ended.err
    ended = Pipeline(quick, store).tool("do(conn, 'SELECT * FROM work')").run(code=1)
    assert "GRANT SELECT, INSERT, UPDATE, DELETE ON work" in ended.err


@pytest.mark.parametrize("may_read", [False, True])
def test_a_role_with_too_few_rights_on_the_ledger_is_told_what_to_grant(quick, cluster, may_read):
    owner, store = make_role(cluster, "other", "GRANT ALL ON SCHEMA public TO other")
    owner.query("GRANT ALL ON work, work_seq_seq TO other")
    Pipeline(quick, owner).tool("note(conn, item)").run()
    if may_read:
        owner.query("GRANT SELECT ON orchestrator_items TO other")
        owner.query("DELETE FROM orchestrator_items")
    pipeline = Pipeline(quick, store).tool("note(conn, item)")
    said = ["permission denied for table orchestrator_items",
            "GRANT SELECT, INSERT, UPDATE, DELETE ON orchestrator_items to the role"]
    ended = pipeline.run(code=1)
    assert all(each in ended.err for each in said), ended
    for words in ([], ["--items", "tool"], ["--status"]) if not may_read else ():
        ended = quick.run(*words)
        assert ended.code == (2 if words else 1) and all(each in ended.err for each in said), ended


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_vacuum_is_told_the_way_out_with_and_without_commits(quick, cluster, driver):
    store = make_postgres(driver, cluster)
    pipeline = Pipeline(quick, store)
    for options in ({}, {"commits": True}):
        pipeline.write(**options)
        ended = pipeline.tool("do(conn, 'VACUUM work')").run(code=1)
        assert 'let the tool say conn.autocommit = True first, with "commits": True' in ended.err
    pipeline.tool("conn.autocommit = True\ndo(conn, 'VACUUM work')").run()
    assert store.ledger() == [(item, "success") for item in "abcde"]


# --- faults of the place -------------------------------------------------------------------------

PLACES = {
    **{state: f"do(conn, \"DO $$ BEGIN RAISE SQLSTATE '{state}'; END $$\")"
       for state in ("08006", "53000", "53100", "53300", "58030")},
    "read-only": "do(conn, 'SET TRANSACTION READ ONLY')\n    note(conn, 'more')",
}


@pytest.mark.parametrize("driver, batch", [("psycopg", 1), ("psycopg", 500), ("psycopg2", 500),
                                           ("alchemy", 1), ("alchemy", 500)])
@pytest.mark.parametrize("place", PLACES)
def test_a_fault_of_the_server_is_charged_to_no_item(quick, cluster, driver, batch, place):
    store = make_postgres(driver, cluster)
    pipeline = Pipeline(quick, store, batch=batch)
    pipeline.tool(f"note(conn, item)\nif item == 'c' and not Path(__file__).with_name('well')"
                  f".exists():\n    {PLACES[place]}", top="from pathlib import Path")
    ended = pipeline.run(code=1)
    assert "at c: " in ended.err
    assert store.work() == (["a", "b"] if batch == 1 else [])
    quick.folder.joinpath("well").touch()
    pipeline.run("--resume")
    assert store.work() == list("abcde")
    assert store.ledger("item, status, attempts, deaths") == [
        (item, "success", 1, 0) for item in "abcde"]


@pytest.mark.parametrize("batch", [1, 500])
@pytest.mark.parametrize("own", [
    "do(conn, \"DO $$ BEGIN RAISE SQLSTATE '53200'; END $$\")",  # it wants too much memory
    "do(conn, \"COPY work (item) FROM '/nowhere/b.csv'\")"])  # 58P01
def test_what_may_be_an_items_own_fault_fails_that_alone_and_is_tried_in_the_next_run(
        quick, store, own, batch):
    pipeline = Pipeline(quick, store, batch=batch)
    pipeline.tool(f"note(conn, item)\nif item == 'b' and context.attempt == 1:\n    {own}")
    pipeline.run(code=1)
    assert store.work() == list("acde")
    pipeline.run()
    assert store.work() == list("acdeb")


def test_a_tool_with_retries_goes_on_after_its_backend_was_lost(quick, cluster, psycopg_store):
    pipeline = Pipeline(quick, psycopg_store, retries=1, retry_delay=0.001)
    pipeline.tool("note(conn, item)\nif item == 'c': lose(conn)", "",
                  LOSE.format(driver="psycopg", dsn=cluster.dsn))
    pipeline.run()
    assert psycopg_store.work() == list("abdec")
    assert psycopg_store.ledger("item, attempts") == [(item, 1) for item in "abcde"]


@pytest.mark.parametrize("blow", ["terminate", "restart"])
def test_a_server_that_goes_away_again_and_again_costs_no_item(
        sandbox, cluster, psycopg_store, blow):
    store, count = psycopg_store, 200
    pipeline = Pipeline(sandbox, store)
    pipeline.tool("note(conn, item)\nnote(conn, item)",
                  f"return [f'{{i:03}}' for i in range({count})]")

    def done():
        return store.query("SELECT count(*) FROM work")[0][0]

    for _ in range(4 if blow == "terminate" else 2):
        goal = min(done() + 40, 2 * count)
        process = sandbox.start("--jobs", "2")
        try:
            wait_until(lambda goal=goal, process=process:
                       done() >= goal or process.poll() is not None)
            if blow == "terminate":
                store.query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> "
                            "pg_backend_pid() AND backend_type = 'client backend'")
            else:
                cluster.stop()
                cluster.start_again()
            process.communicate(timeout=30)
        finally:
            process.kill()
    ended = sandbox.run("--jobs", "2")
    assert ended.code == 0, ended
    assert store.query("SELECT item FROM work GROUP BY item HAVING count(*) <> 2") == []
    assert done() == 2 * count
    assert store.query("SELECT DISTINCT status, attempts FROM orchestrator_items") == [
        ("success", 1)]
    # One for each worker and blow: that of the item that was at work.
    assert store.query("SELECT sum(deaths) FROM orchestrator_items")[0][0] <= 8


# --- others at the same rows ---------------------------------------------------------------------

RACE = """
    from meeting import say, wait_for
    from pathlib import Path
    import time

    def make(conn, is_first):
        if not is_first:
            wait_for("made")
        do(conn, "CREATE TABLE IF NOT EXISTS made (item TEXT)")
        if is_first and not Path(__file__).with_name("said-made").exists():
            say("made")
            end = time.monotonic() + 20
            while do(conn, "SELECT count(*) FROM pg_locks WHERE NOT granted") == [(0,)]:
                assert time.monotonic() < end
"""


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "alchemy"])
def test_a_table_that_two_items_make_at_once_costs_none_of_them(quick, cluster, driver):
    store = make_postgres(driver, cluster)
    pipeline = Pipeline(quick, store)
    quick.tool("meeting", MEET)
    pipeline.tool("if item in 'ac': make(conn, item == 'a')\nnote(conn, item)",
                  "return list('abcd')", RACE)
    pipeline.run("--jobs", "2")
    assert sorted(store.work()) == list("abcd")
    assert store.ledger("item, status, attempts") == [(item, "success", 1) for item in "abcd"]


def test_a_table_that_the_setup_of_two_tools_makes_at_once_fails_neither(quick, psycopg_store):
    quick.tool("meeting", MEET).tool("work", psycopg_store.do_source)
    tools = {name: {"module": name, "needs": []} for name in "ab"}
    quick.pipeline(f"TOOL_MAP = {tools!r}\n{psycopg_store.source}")
    for name in tools:
        quick.tool(name, "from work import do, note\n" + textwrap.dedent(RACE) + f"""
def setup(conn): make(conn, {name == "a"})
def run(conn): note(conn, {name!r})
""")
    ended = quick.run("--jobs", "2")
    assert ended.code == 0, ended
    assert sorted(psycopg_store.work()) == ["a", "b"]
    assert psycopg_store.query("SELECT * FROM made") == []


def test_a_table_that_is_there_fails_who_makes_it_again(quick, psycopg_store):
    pipeline = Pipeline(quick, psycopg_store)
    pipeline.tool("note(conn, item)\ndo(conn, 'CREATE TABLE made (item TEXT)')")
    assert '"made" already exists' in pipeline.run(code=1).err
    assert psycopg_store.work() == ["a"]


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
@pytest.mark.parametrize("batch", [1, 5])
def test_a_serialization_failure_brings_the_item_again_uncounted(
        sandbox, store, level, batch):
    store.query("CREATE TABLE counter (n integer)")
    store.query("INSERT INTO counter VALUES (0)")
    pipeline = Pipeline(sandbox, store, batch=batch)
    sandbox.pipeline(sandbox.read("orchestrator.py").partition("# === ENGINE")[0].replace(
        "    return conn",
        f"    conn.cursor().execute(\"SET default_transaction_isolation TO '{level}'\")\n"
        "    conn.commit()\n    return conn"))
    sandbox.tool("meeting", MEET)
    # The first two items read before either writes, so that one of them fails for sure.
    pipeline.tool("""
        n = do(conn, "SELECT n FROM counter")[0][0]
        if item in ("00", "20"):
            say(item)
            wait_for("00", "20")
        do(conn, "UPDATE counter SET n = ?", n + 1)
        with open(__file__ + ".tries", "a") as file:
            file.write("x")
        note(conn, item)
    """, "return [f'{i:02}' for i in range(40)]", top="from meeting import say, wait_for")
    ended = sandbox.run("--jobs", "2")
    assert ended.code == 0, ended
    assert store.query("SELECT n FROM counter") == [(40,)]
    assert sorted(store.work()) == [f"{i:02}" for i in range(40)]
    assert store.query("SELECT DISTINCT status, attempts FROM orchestrator_items") == [
        ("success", 1)]


@pytest.mark.parametrize("batch", [1, 500])
def test_an_item_that_commits_and_then_meets_a_serialization_failure_is_not_run_again(
        quick, store, batch):
    pipeline = Pipeline(quick, store, batch=batch, retries=3)
    pipeline.tool("""
        note(conn, item)
        if item == "c":
            conn.commit()
            do(conn, "DO $$ BEGIN RAISE SQLSTATE '40001'; END $$")
    """)
    pipeline.run(code=1)
    assert sorted(store.work()) == list("abcde")
    assert dict(store.ledger())["c"] == "quarantined"


def test_a_constraint_that_fails_at_commit_fails_the_one_item_of_a_batch(quick, store):
    store.query("CREATE TABLE one (x text UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    pipeline = Pipeline(quick, store, batch=500)
    pipeline.tool("note(conn, item)\ndo(conn, 'INSERT INTO one VALUES (?)', item.lower())",
                  "return ['a', 'A', 'b']")
    pipeline.run(code=1)
    assert store.work() == ["a", "b"]
    assert dict(store.ledger()) == {"a": "success", "A": "failed", "b": "success"}


@pytest.mark.parametrize("batch", [1, 500])
@pytest.mark.parametrize("end", ["with conn: note(conn, 'more')",
                                 "conn.commit()\n    conn.close()\n    raise ValueError"])
def test_an_item_that_commits_and_closes_fails_for_good_and_the_others_are_done_once(
        quick, store, end, batch):
    pipeline = Pipeline(quick, store, batch=batch, retries=3)
    pipeline.tool(f"note(conn, item)\nif item == 'c':\n    {end}")
    ended = pipeline.run(code=1)
    assert sorted(set(store.work()) - {"more"}) == list("abcde"), ended
    assert dict(store.ledger()) == {**dict.fromkeys("abde", "success"), "c": "quarantined"}
    pipeline.run()
    assert len(set(store.work())) == len(store.work())
