"""Items on MariaDB: two coordinators, implicit commits, deadlocks, lost connections."""
import os

import pytest
from stores import MEET, MUTANTS, Pipeline, Two, contend, make_pymysql, patch

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the server needs a Unix socket")


@pytest.fixture(params=[False, True], ids=["transactions", "autocommit"])
def store(request, maria):
    store = make_pymysql(request.param, maria.socket)
    store.clear()
    return store


@pytest.fixture
def plain_store(maria):
    store = make_pymysql(False, maria.socket)
    store.clear()
    return store


def test_two_coordinators_do_each_item_once(sandbox, store):
    lost, twice, ended = contend(Two(sandbox, store, retries=3, retry_delay=0.001))
    assert (lost, twice) == ([], []), ended
    assert [code for code, _, _ in ended] == [0, 0], ended


@pytest.mark.parametrize("mutant", MUTANTS)
def test_two_coordinators_of_a_naive_ledger_lose_an_item_or_do_it_twice(
        sandbox, plain_store, mutant):
    two = Two(sandbox, plain_store, retries=3, retry_delay=0.001)
    two.pipeline.write(engine=MUTANTS[mutant])
    lost, twice, ended = contend(two)
    assert lost or twice, ended


def test_two_first_starts_create_one_ledger(sandbox, plain_store):
    two = Two(sandbox, plain_store)
    two.pipeline.write(engine=patch((
        "            ledger.create()\n",
        "            import meeting; meeting.meet('create')\n"
        "            ledger.create()\n")))
    two.pipeline.tool("note(conn, item)")
    ended = two.run()
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert sorted(plain_store.work()) == list("abcde")


def test_the_ledger_is_transactional_whatever_the_default_engine(quick, plain_store):
    plain_store.query("SET GLOBAL default_storage_engine = 'MyISAM'")
    try:
        Pipeline(quick, plain_store).tool("pass").run()
    finally:
        plain_store.query("SET GLOBAL default_storage_engine = 'InnoDB'")
    assert plain_store.query("SELECT engine, table_collation FROM information_schema.tables "
                             "WHERE table_name = 'orchestrator_items'") == [
        ("InnoDB", "utf8mb4_nopad_bin")]


@pytest.mark.parametrize("batch", [1, 500])
@pytest.mark.parametrize("sql", ["CREATE TABLE made (x int)", "ALTER TABLE work ADD COLUMN x int",
                                 "START TRANSACTION", "TRUNCATE other"])
def test_a_statement_that_commits_fails_its_item_for_good_and_nothing_is_done_twice(
        quick, store, sql, batch):
    store.query("CREATE TABLE other (x int)")
    pipeline = Pipeline(quick, store, batch=batch, retries=3)
    pipeline.tool(f"note(conn, item)\nif item == 'c': do(conn, {sql!r})")
    pipeline.run(code=1)
    pipeline.run()
    assert sorted(store.work()) == list("abcde")
    assert dict(store.ledger()) == {**dict.fromkeys("abde", "success"), "c": "quarantined"}
    assert "may have been done" in dict(store.ledger("item, error"))["c"]


@pytest.mark.parametrize("batch", [1, 500])
@pytest.mark.parametrize("end", ["do(conn, 'SELECT 1')", "raise ValueError('mine')", "pass"])
def test_a_lost_connection_is_a_death_of_one_item_and_all_are_done(quick, store, end, batch):
    pipeline = Pipeline(quick, store, batch=batch)
    pipeline.tool(f"""
flag = Path(__file__).with_name("lost")
note(conn, item)
if item == "c" and not flag.exists():
    flag.touch()
    other = get_connection()
    do(other, f"KILL CONNECTION {{conn.thread_id()}}")
    other.close()
    {end}
""", top="from pathlib import Path\n" + store.source)
    ended = pipeline.run()
    assert "may have been done" not in ended.err
    assert "it took its connection down 1 of 3 times; again" in ended.err
    assert store.work() == list("abdec")
    assert store.ledger("item, status, attempts, deaths") == [
        (item, "success", 1, int(item == "c")) for item in "abcde"]


@pytest.mark.parametrize("words, batch", [((), 1), ((), 500), (("--jobs", "2"), 2)])
@pytest.mark.parametrize("end", ["pass", "raise"])
def test_an_item_that_always_ends_its_connection_is_quarantined(quick, store, end, words, batch):
    pipeline = Pipeline(quick, store, batch=batch)
    pipeline.tool(f"""
        note(conn, item)
        if item == "b":
            try:
                do(conn, "KILL CONNECTION_ID()")
                do(conn, "SELECT 1")
            except Exception:
                {end}
    """)
    ended = pipeline.run(*words, code=1)
    assert sorted(store.work()) == list("acde"), ended
    assert store.ledger("item, status, attempts, deaths") == [
        (item, "success", 1, 0) if item != "b" else ("b", "quarantined", 0, 3)
        for item in "abcde"]
    assert "1 item given up before: b; --retry-items tool tries again" in pipeline.run(*words).err


@pytest.mark.parametrize("batch", [1, 500])
@pytest.mark.parametrize("number", [1021, 1040, 1114, 1290, 1836])
def test_a_fault_of_the_server_is_charged_to_no_item(quick, store, number, batch):
    pipeline = Pipeline(quick, store, batch=batch)
    pipeline.tool(f"""
        note(conn, item)
        if item == "c" and not Path(__file__).with_name("well").exists():
            do(conn, "SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = {number}")
    """, top="from pathlib import Path")
    ended = pipeline.run(code=1)
    assert "at c: " in ended.err
    assert store.work() == (["a", "b"] if batch == 1 else [])
    quick.folder.joinpath("well").touch()
    pipeline.run("--resume")
    assert store.work() == list("abcde")
    assert store.ledger("item, status, attempts, deaths") == [
        (item, "success", 1, 0) for item in "abcde"]


@pytest.mark.parametrize("batch", [1, 5])
def test_a_deadlock_brings_the_item_again_uncounted(sandbox, store, batch):
    store.query("CREATE TABLE counter (name CHAR(1) PRIMARY KEY, n INTEGER)")
    store.query("INSERT INTO counter VALUES ('a', 0), ('b', 0)")
    deadlocks = ("SELECT variable_value + 0 FROM information_schema.global_status "
                 "WHERE variable_name = 'Innodb_deadlocks'")
    before = store.query(deadlocks)[0][0]
    pipeline = Pipeline(sandbox, store, batch=batch)
    sandbox.tool("meeting", MEET)
    # The first two chunks take the same two rows, but not in the same order.
    pipeline.tool(f"""
        both = "ba" if int(item) // {batch} % 2 else "ab"
        do(conn, "UPDATE counter SET n = n + 1 WHERE name = ?", both[0])
        if item in ("00", "{batch:02}"):
            say(item)
            wait_for("00", "{batch:02}")
        do(conn, "UPDATE counter SET n = n + 1 WHERE name = ?", both[1])
        note(conn, item)
    """, "return [f'{i:02}' for i in range(40)]", top="from meeting import say, wait_for")
    ended = sandbox.run("--jobs", "2")
    assert ended.code == 0, ended
    assert store.query(deadlocks)[0][0] > before
    assert store.query("SELECT n FROM counter") == [(40,), (40,)]
    assert sorted(store.work()) == [f"{i:02}" for i in range(40)]
    assert store.query("SELECT DISTINCT status, attempts FROM orchestrator_items") == [
        ("success", 1)]


@pytest.mark.parametrize("batch", [1, 500])
def test_a_lock_that_takes_too_long_brings_the_item_again_uncounted(quick, store, batch):
    store.query("CREATE TABLE counter (n INTEGER)")
    store.query("INSERT INTO counter VALUES (0)")
    pipeline = Pipeline(quick, store, batch=batch)
    # Another connection holds the row during the first try.
    pipeline.tool("""
        note(conn, item)
        if item == "c":
            tries.append(item)
            other = get_connection()
            if len(tries) == 1:
                do(other, "BEGIN")
                do(other, "UPDATE counter SET n = 100")
            try:
                do(conn, "UPDATE counter SET n = n + 1")
            finally:
                other.rollback()
                other.close()
    """, top="tries = []\n" + store.source)
    pipeline.run()
    assert store.work() == list("abcde")
    assert store.query("SELECT n FROM counter") == [(1,)]
    assert store.query("SELECT DISTINCT status, attempts FROM orchestrator_items") == [
        ("success", 1)]


def test_a_lock_error_that_a_tool_swallows_costs_only_what_it_was_about(quick, store):
    store.query("CREATE TABLE counter (n INTEGER)")
    store.query("INSERT INTO counter VALUES (0)")
    pipeline = Pipeline(quick, store, batch=500)
    pipeline.tool("""
        note(conn, item)
        if item == "c":
            other = get_connection()
            do(other, "BEGIN")
            do(other, "UPDATE counter SET n = 100")
            try:
                do(conn, "UPDATE counter SET n = n + 1")
            except Exception:
                pass
            other.close()
    """, top=store.source)
    pipeline.run()
    assert store.work() == list("abcde")
