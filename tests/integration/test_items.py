"""Items on real databases: what must be the same with every driver."""
import pytest
from stores import Pipeline, make_alchemy, make_psycopg, make_pymysql

POSTGRES = [f"{name}-{mode}" for name in ("psycopg", "psycopg2")
            for mode in ("transactions", "autocommit")]
MARIA = ["pymysql-transactions", "pymysql-autocommit"]
ALCHEMY = ["alchemy-sqlite", "alchemy-postgresql", "alchemy-mariadb"]
DICTS = ["psycopg-dict", "psycopg2-dict", "pymysql-dict"]
ALL = [*POSTGRES, *MARIA, *ALCHEMY, "duckdb"]
LISTING = ["psycopg-autocommit", "psycopg2-transactions", "pymysql-autocommit",
           "alchemy-sqlite", "alchemy-postgresql", "duckdb"]


def make_store(name, request, tmp_path):
    driver, _, mode = name.partition("-")
    module = {"alchemy": "sqlalchemy"}.get(driver, driver)
    pytest.importorskip(module)
    if driver in ("psycopg", "psycopg2"):
        dsn = request.getfixturevalue("cluster").dsn
        return make_psycopg(driver, mode == "autocommit", dsn, mode)
    if driver == "pymysql":
        return make_pymysql(mode == "autocommit", request.getfixturevalue("maria").socket, mode)
    if driver == "duckdb":
        from stores import Store
        return Store("duckdb", f"import duckdb\nreturn duckdb.connect({str(tmp_path / 'd.db')!r})",
                     "?")
    if mode == "sqlite":
        return make_alchemy(f"sqlite:///{tmp_path / 'data.db'}", "sqlite", "?")
    if mode == "postgresql":
        pytest.importorskip("psycopg")
        return make_alchemy(request.getfixturevalue("cluster").url, "postgresql")
    socket = request.getfixturevalue("maria").socket
    return make_alchemy(f"mysql+pymysql://root@/test?unix_socket={socket}", "mariadb")


@pytest.fixture
def store(request, tmp_path):
    store = make_store(request.param, request, tmp_path)
    store.clear()
    return store


@pytest.fixture
def pipeline(store, quick):
    return Pipeline(quick, store)


def on(names):
    return pytest.mark.parametrize("store", names, indirect=True)


@on([*ALL, *DICTS])
def test_each_item_is_done_once_and_its_row_tells_so(pipeline, store):
    pipeline.tool("note(conn, item)\nreturn 3")
    pipeline.run()
    again = pipeline.run()
    assert store.work() == list("abcde")
    assert store.ledger("item, status, attempts, deaths, row_count, error") == [
        (item, "success", 1, 0, 3, None) for item in "abcde"]
    assert "none of 5 items is pending" in again.err
    assert pipeline.counts() == {"success": 5, "failed": 0, "quarantined": 0, "pending": 0}
    assert "d " in pipeline.run("--items", "tool").out


@on(LISTING)
@pytest.mark.parametrize("items, expected", [
    pytest.param("yield 'b'\nyield 'a', 7\nyield 'b', 'again'", [("a", "7"), ("b", "")],
                 id="generator"),
    pytest.param("import datetime\nreturn [datetime.date(2024, 2, 29), 12]",
                 [("12", ""), ("2024-02-29", "")], id="dates-and-integers"),
    pytest.param("return 'SELECT x FROM source ORDER BY x DESC;'",
                 [("1", ""), ("2", ""), ("30", "")], id="select"),
    pytest.param("return \"SELECT x AS name, day FROM source WHERE t LIKE '%a%' AND t <> '?'\"",
                 [("2", "2024-02-01"), ("30", "")], id="select-with-percent"),
    pytest.param("return 'WITH q AS (SELECT x FROM source) SELECT x, x + 1 FROM q'",
                 [("1", "2"), ("2", "3"), ("30", "31")], id="with"),
    pytest.param("for row in do(conn, 'SELECT x FROM source ORDER BY x'):\n"
                 "    do(conn, 'SELECT 1')\n    yield row[0]",
                 [("1", ""), ("2", ""), ("30", "")], id="generator-of-a-query"),
    pytest.param("return []", [], id="none"),
])
def test_items_are_listed_in_every_way(pipeline, store, items, expected):
    store.query("CREATE TABLE source (x INTEGER, t VARCHAR(20), day DATE)")
    for x, text, day in ((1, "b", None), (30, "a", None), (2, "a%", "2024-02-01")):
        store.query("INSERT INTO source VALUES (?, ?, ?)", x, text, day)
    pipeline.tool("note(conn, item)", items).run()
    assert store.ledger("item, version") == expected
    assert sorted(store.work()) == [item for item, _ in expected]
    pipeline.run()
    assert len(store.work()) == len(expected)


@on(LISTING)
def test_the_order_of_a_select_is_kept(pipeline, store):
    store.query("CREATE TABLE source (x INTEGER)")
    for x in (3, 1, 2, 10):
        store.query("INSERT INTO source VALUES (?)", x)
    pipeline.tool("note(conn, item)", "return 'SELECT x FROM source ORDER BY x DESC'").run()
    assert store.work() == ["10", "3", "2", "1"]


@on(LISTING)
def test_a_new_version_of_an_item_is_done_again(pipeline, store):
    for versions in ("12", "12", "13"):
        pipeline.tool("note(conn, item)", f"return list(zip('ab', {versions!r}))").run()
    assert store.work() == ["a", "b", "b"]
    assert store.ledger("item, version, passed, attempts") == [("a", "1", "1", 1),
                                                              ("b", "3", "3", 1)]


NAMES = ["a", "A", "a ", " a", "ä", "a\u0308", "日本語", "it's", 'a"b', "a\nb", "a\r\nb", "a\\b",
         "100%", "%s", "?", ":1", "{}", "--", ";", "\t", "\u2028", "😀" * 500,
         "".join(chr(0x10000 + i * 7) for i in range(500))]


@on(LISTING)
def test_names_that_differ_in_anything_are_different_items(pipeline, store):
    pipeline.tool("note(conn, item)", f"return {NAMES!r}")
    pipeline.run()
    again = pipeline.run()
    assert store.work() == NAMES
    assert "none of 23 items is pending" in again.err
    assert sorted(name for name, _ in store.ledger()) == sorted(NAMES)
    pipeline.tool("note(conn, item)", f"return [(name, name) for name in {NAMES!r}]").run()
    assert store.work() == NAMES * 2


@on(LISTING)
def test_each_takes_the_items_that_another_tool_passed(pipeline, store):
    pipeline.tool("note(conn, 'first ' + item)\nassert item != 'b'",
                  "return [('c', 1), ('b', 1), ('a', 1)]")
    pipeline.sandbox.tool("second", "from work import note\n"
                          "def run(conn, item): note(conn, 'second ' + item)\n")
    pipeline.sandbox.pipeline(
        "NAME = 'p'\nTOOL_MAP = {'tool': 'tool', 'second': {'module': 'second', 'each': 'tool'}}\n"
        f"STAGES = {{}}\n{store.source}")
    for _ in range(2):  # b fails again
        pipeline.run(code=1)
        assert store.work() == ["first c", "first a", "second c", "second a"]


@on(ALL)
@pytest.mark.parametrize("batch", [1, 3])
def test_an_item_that_fails_in_the_middle_leaves_the_others_alone(pipeline, store, batch):
    pipeline.write(batch=batch)
    pipeline.tool("note(conn, item)\nassert item not in 'bd', 'no ' + item")
    ended = pipeline.run(code=1)
    assert store.work() == ["a", "c", "e"]
    assert "2 of 5 items failed: b, d" in ended.err
    assert store.ledger("item, status, error") == [
        ("a", "success", None), ("b", "failed", "AssertionError: no b"), ("c", "success", None),
        ("d", "failed", "AssertionError: no d"), ("e", "success", None)]
    assert pipeline.counts() == {"success": 3, "failed": 2, "quarantined": 0, "pending": 0}
    assert "no d" in pipeline.run("--items", "tool", "--failed").out
    ended = pipeline.run(code=1)
    assert "2 of 2 items failed: b, d" in ended.err
    pipeline.run("--retry-items", "tool", "d", code=1)
    assert store.work() == ["a", "c", "e"]
    assert store.ledger("item, attempts")[1::2] == [("b", 3), ("d", 1)]


@on(ALL)
@pytest.mark.parametrize("batch", [1, 500])
def test_a_failed_item_comes_again_after_the_others_and_counts_its_tries(pipeline, store, batch):
    pipeline.write(batch=batch, retries=2, retry_delay=0.001)
    pipeline.tool("note(conn, item, context.attempt)\n"
                  "assert item != 'b' or context.attempt == 3\nassert item != 'd'")
    pipeline.run(code=1)
    assert store.query("SELECT item, note FROM work ORDER BY item") == [
        ("a", "1"), ("b", "3"), ("c", "1"), ("e", "1")]
    assert store.work()[-1] == "b"
    assert store.ledger("item, status, attempts")[1:4] == [
        ("b", "success", 3), ("c", "success", 1), ("d", "failed", 3)]


@on(ALL)
@pytest.mark.parametrize("batch", [1, 500])
def test_an_error_of_the_database_that_a_tool_swallows_never_costs_data_unseen(
        pipeline, store, batch):
    pipeline.write(batch=batch)
    pipeline.tool("""
        note(conn, item)
        if item == "b":
            try:
                do(conn, "SELECT * FROM nowhere")
            except Exception:
                pass
    """)
    ended = pipeline.sandbox.run()
    done = [item for item, status in store.ledger() if status == "success"]
    assert sorted(store.work()) == done
    if store.kind == "postgresql":
        assert (ended.code, done) == (1, list("acde"))
        assert "an error of the database was caught and ignored" in ended.err
    else:
        assert set(done) >= set("acde")


@on(["psycopg-transactions", "psycopg2-autocommit", *MARIA, *ALCHEMY])
def test_items_are_spread_over_workers(pipeline, store):
    pipeline.tool("note(conn, item)", "return [f'{i:03}' for i in range(200)]")
    pipeline.run("--jobs", "2")
    assert sorted(store.work()) == [f"{i:03}" for i in range(200)]


# --- what ends the transaction of an item --------------------------------------------------------

ENDS = [f"{end}\n        {after}"
        for end in ("conn.commit()", "conn.rollback()", "do(conn, 'COMMIT')",
                    "do(conn, 'ROLLBACK')")
        for after in ("pass", "raise ValueError('later')", "do(conn, 'SELECT nonsense')")]


@on(ALL)
@pytest.mark.parametrize("batch", [1, 500])
def test_an_item_that_ends_its_transaction_fails_for_good_and_the_others_are_done_once(
        pipeline, store, batch):
    pipeline.write(batch=batch, retries=1, retry_delay=0.001)
    items = [f"{kind}{i}" for i in range(len(ENDS)) for kind in ("good", "bad")]
    cases = "".join(f"    if item == 'bad{i}':\n        {end}\n" for i, end in enumerate(ENDS))
    pipeline.tool(f"note(conn, item)\ntry:\n{cases}    pass\n"
                  "except Exception:\n    if item[-1] not in '258': raise",  # others swallow it
                  f"return {items!r}")
    ended = pipeline.run(code=1)
    work, ledger = store.work(), dict(store.ledger())
    assert {item for item in items if ledger[item] == "success"} == {
        item for item in items if item.startswith("good")}, ended
    assert [item for item in items if item.startswith("good") and work.count(item) != 1] == []
    assert [item for item in items if work.count(item) > 1] == []
    for item, *ended, error in store.ledger("item, status, attempts, error"):
        if item.startswith("bad"):
            assert (*ended, error.count("may have been done")) == ("quarantined", 1, 1) or (
                *ended, error.count("refused inside an item")) == ("failed", 2, 1), (item, error)
    pipeline.run()
    assert store.work() == work


@on(ALL)
@pytest.mark.parametrize("end", ["conn.commit()", "do(conn, 'COMMIT')"])
def test_a_tool_that_commits_itself_may_do_so_within_an_item(pipeline, store, end):
    pipeline.write(commits=True, batch=500)
    begin = "conn.begin()" if store.kind == "duckdb" else ""
    if store.mark == "%s" or end == "conn.commit()":
        pipeline.tool(f"{begin}\nnote(conn, item)\n"
                      f"try: {end}\nexcept Exception as e: assert 'no transaction' in str(e)")
        pipeline.run()
        assert store.work() == list("abcde")
        assert [status for _, status in store.ledger()] == ["success"] * 5


# --- what is done is done again ---

@on(ALL)
def test_items_that_are_done_are_reopened_for_who_asks_and_for_want_of_their_output(
        pipeline, store, quick):
    pipeline.write(writes=["out/{item}"])
    pipeline.tool("note(conn, item)\nPath('out').mkdir(exist_ok=True)\nPath('out', item).touch()",
                  "return [(item, 'v') for item in 'abcde']", "from pathlib import Path")
    pipeline.run()
    pipeline.run()
    pipeline.run("--redo", "tool", "b", "d")
    (quick.folder / "out" / "c").unlink()
    assert "1 of 5 items pending again: their output is gone: out/c\n" in pipeline.run().err
    assert store.work() == list("abcdebdc")
    pipeline.run("--redo", "tool")
    assert store.work()[8:] == list("abcde")
    pipeline.run("--redo", "tool", "e", "x", code=2)
    pipeline.run()
    assert len(store.work()) == 13
    assert store.ledger("item, status, attempts, passed") == [
        (item, "success", 1, "v") for item in "abcde"]


@on(["psycopg-transactions", "psycopg2-autocommit", "alchemy-mariadb", "alchemy-sqlite"])
@pytest.mark.parametrize("words", [(), ("--jobs", "2")])
def test_a_kill_between_reopening_and_doing_leaves_what_was_reopened_pending(
        sandbox, store, words):
    pipeline = Pipeline(sandbox, store)
    tool = "import os, signal, time\nfrom pathlib import Path"
    pipeline.tool("note(conn, item)", "", tool).run(*words)
    pipeline.tool("""
        pid = int(Path(__file__).with_name("pid").read_text())
        os.kill(pid, signal.SIGKILL)
        time.sleep(20)
    """, "Path(__file__).with_name('pid').write_text(os.environ['RUN_PID'])\nreturn list('abcde')",
                  tool)
    sandbox.tool("start", """
        import os, sys
        os.environ["RUN_PID"] = str(os.getpid())
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    """)
    sandbox.run("orchestrator.py", *words, "--redo", "tool", "a", "e", file="start.py")
    assert store.query("SELECT item, status FROM orchestrator_items WHERE passed IS NULL "
                       "ORDER BY item") == [("a", "pending"), ("e", "pending")]
    pipeline.tool("note(conn, item)", "", tool).run(*words)
    assert sorted(store.work()[5:]) == ["a", "e"]
    assert store.query("SELECT DISTINCT status FROM orchestrator_items") == [("success",)]
