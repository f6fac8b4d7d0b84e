"""The ledger on SQLite: which items there are, which of them are pending, how each ended."""
import sqlite3
from datetime import date
from pathlib import Path

import pytest

from orchestrator import (
    Item,
    Job,
    Ledger,
    Taken,
    find_unfit,
    find_driver,
    is_locked,
    read_item,
    read_slip,
    write_slip,
)


@pytest.fixture
def conn():
    conn = sqlite3.connect(":memory:")
    yield conn
    conn.close()


@pytest.fixture
def open_ledger(conn):
    """Return open_ledger(tool) -> Ledger over one connection, its table created."""
    def call(tool="t", run_id="1", source="s", pipeline="p"):
        ledger = Ledger(conn, "", pipeline, tool, run_id, source)
        if not ledger.is_there():
            ledger.create()
        return ledger

    return call


@pytest.fixture
def ledger(open_ledger):
    return open_ledger()


def pending(ledger, found=None, each=None):
    """Return the names, or names and versions, of what is pending of what was found."""
    return [(item.name, item.version) if item.version else item.name
            for item, status, _ in ledger.find_pending(found, each) if status in ("", "pending")]


def done(ledger, name, version="", status="success", attempts=1, deaths=0, is_seen=None):
    """Record how an item ended, after a look at its row."""
    item, *_ = ledger.look(Item(name, version))
    ledger.record(item._replace(tries=attempts, deaths=deaths), status, 1.0, 0.5, 3, None)


# --- what items() gives ---


@pytest.mark.parametrize("found, names", [
    (["b", "a"], ["b", "a"]),
    ((name for name in ("b", "a")), ["b", "a"]),
    ([("b", "v1"), ("a", "v2")], [("b", "v1"), ("a", "v2")]),
    ([("a", None)], ["a"]),
    ([("a", "")], ["a"]),
    ([3, 20, -1, 2**70], ["3", "20", "-1", str(2**70)]),
    ([("a", 3), ("b", 2.5)], [("a", "3"), ("b", "2.5")]),
    ([date(2024, 2, 29), (date(2024, 3, 1), date(2024, 3, 2))],
     ["2024-02-29", ("2024-03-01", "2024-03-02")]),
    ([Path("in") / "a.csv"], [str(Path("in/a.csv"))]),
    ({"b": 1, "a": 2}, ["b", "a"]),
    ([], []),
])
def test_what_items_gives_is_listed_in_its_order_as_text(ledger, found, names):
    assert pending(ledger, found) == names


@pytest.mark.parametrize("wrong", [
    None, True, 2.5, b"a", ["a", "v1"], (), ("a", "b", "c"), ("a", b"v"), (None, "v"),
    ("a", True), {"a": 1}, object])
def test_what_is_no_item_is_refused_by_its_place(ledger, wrong):
    with pytest.raises(TypeError, match="as item 2; an item is a name"):
        pending(ledger, ["fine", wrong])
    with pytest.raises(TypeError):
        read_item(2, wrong)


@pytest.mark.parametrize("name, version", [
    ("x" * 500, ""), ("x", "v" * 500), ("é" * 500, "ü"), ("😀" * 500, "😀"), ("'\"`;--", "%s ?"),
    ("two\nlines\r\n", "\t"), (" ", " "), ("a\\'b", "%"), ("\x1b[31m", "\x7f")])
def test_a_name_of_up_to_500_letters_of_any_kind_is_kept_as_it_is(ledger, name, version):
    assert pending(ledger, [(name, version)]) == [(name, version) if version else name]
    done(ledger, name, version)
    assert pending(ledger, [(name, version)]) == []
    assert [row["item"] for row in ledger.load_items(["success"], "")] == [name]


@pytest.mark.parametrize("name, version", [
    ("x" * 501, ""), ("", ""), ("", "v"), ("a\0b", ""), ("a", "\0"), ("a", "v" * 501),
    ("\ud800", ""), ("a", "\udfff")])
def test_a_name_that_no_database_keeps_is_left_out_and_told(ledger, name, version):
    assert pending(ledger, ["fine", (name, version), "too"]) == ["fine", "too"]
    assert ledger.unfit == [(name, find_unfit(name, version))] and ledger.listed == 3


# --- a SELECT ---


@pytest.mark.parametrize("select, names", [
    ("SELECT day FROM days ORDER BY day DESC", ["3", "2", "1"]),
    ("SELECT day, note FROM days ORDER BY day",
     [("1", "50%"), ("2", "why?"), ("3", "a;b")]),
    ("SELECT day FROM days WHERE note LIKE '%!%' ESCAPE '!'", ["1"]),
    ("SELECT day FROM days WHERE note = 'why?'", ["2"]),
    ("SELECT day FROM days WHERE note = 'a;b'", ["3"]),
    ("SELECT day FROM days WHERE day < 2;", ["1"]),
    ("  select day from days where day < 2 ;\n ; ", ["1"]),
    ("SELECT(1)", ["1"]),
    ("WITH some AS (SELECT day FROM days WHERE day > 1) SELECT day FROM some ORDER BY 1",
     ["2", "3"]),
    ("VALUES ('a', 'v'), ('b', NULL)", [("a", "v"), "b"]),
    ("SELECT day AS version, note AS item FROM days WHERE day = 1", [("1", "50%")]),
    ("SELECT item, version FROM (SELECT 'x' AS item, 'y' AS version)", [("x", "y")]),
    ("SELECT 2.5, 7", [("2.5", "7")]),
    ("SELECT day FROM days WHERE day = 1 -- the first day", ["1"]),
    ("-- the first day\nSELECT day FROM days WHERE day = 1", ["1"]),
    ("/* the first day */ SELECT day FROM days WHERE day = 1", ["1"]),
    ("SELECT day FROM days UNION ALL SELECT 9 ORDER BY 1 DESC LIMIT 2", ["9", "3"]),
])
def test_a_select_gives_names_and_versions(conn, ledger, select, names):
    conn.execute("CREATE TABLE days (day INTEGER, note TEXT)")
    conn.executemany("INSERT INTO days VALUES (?, ?)", [(1, "50%"), (2, "why?"), (3, "a;b")])
    assert pending(ledger, select) == names


@pytest.mark.parametrize("text, problem", [
    ("a.csv", "no SELECT: 'a.csv'; for a single item, return a list of it"),
    ("", "no SELECT"),
    ("selection.csv", "no SELECT"),
    ("DELETE FROM days", "no SELECT"),
    ("SELECT 1, 2, 3", "3 columns"),
    ("SELECT day FROM nowhere", "no such table"),
    ("SELECT 1; DELETE FROM days", "one statement at a time"),
    ("WITH gone AS (SELECT 1) DELETE FROM days", "no SELECT"),
    ("/* SELECT 1 */ DELETE FROM days", "no SELECT"),
])
def test_a_text_that_gives_no_items_is_refused(conn, ledger, text, problem):
    conn.execute("CREATE TABLE days (day INTEGER)")
    conn.execute("INSERT INTO days VALUES (1)")
    conn.commit()
    conn.execute("BEGIN")
    with pytest.raises(Exception, match=problem):
        pending(ledger, text)
    conn.rollback()  # as it is after every failure
    assert conn.execute("SELECT day FROM days").fetchall() == [(1,)]


@pytest.mark.parametrize("select", ["SELECT NULL", "SELECT ''", "SELECT NULL, 'v'",
                                    "SELECT 'a' || char(0) || 'b'", "SELECT hex(zeroblob(251))"])
def test_a_select_gives_no_name_that_is_none(ledger, select):
    assert pending(ledger, select) == []
    assert len(ledger.unfit) == 1 and "one has 1 to 500 letters" in ledger.unfit[0][1]


# --- which are pending ---


def test_of_duplicates_the_first_wins(ledger):
    assert pending(ledger, [("a", "v1"), "b", ("a", "v2"), ("a", "v1"), "b"]) == [("a", "v1"), "b"]
    done(ledger, "a", "v1")
    assert pending(ledger, [("a", "v1"), ("a", "v2")]) == []
    assert pending(ledger, [("a", "v2"), ("a", "v1")]) == [("a", "v2")]
    assert pending(ledger, "SELECT 'a', 'v1' UNION ALL SELECT 'a', 'v2'") == []


def test_letters_that_look_alike_are_different_items(ledger):
    names = ["a", "A", "a ", " a", "á", "a\u0301", "ß", "ss"]
    assert pending(ledger, names) == names
    done(ledger, "a")
    assert pending(ledger, names) == names[1:]


def test_a_new_version_is_pending_until_it_has_passed_and_so_is_a_former_one(ledger):
    done(ledger, "a", "v1")
    assert pending(ledger, [("a", "v1")]) == []
    assert pending(ledger, [("a", "v2")]) == [("a", "v2")]
    done(ledger, "a", "v2", "failed")
    assert pending(ledger, [("a", "v2")]) == []  # given up
    assert pending(ledger, [("a", "v1")]) == []  # it is what has passed last
    done(ledger, "a", "v2")
    assert pending(ledger, [("a", "v1")]) == [("a", "v1")]


def test_items_of_other_tools_and_pipelines_are_others(open_ledger):
    done(open_ledger("t"), "a")
    assert pending(open_ledger("t"), ["a"]) == []
    assert pending(open_ledger("u"), ["a"]) == ["a"]
    assert pending(open_ledger("t", pipeline="q"), ["a"]) == ["a"]
    long = "x" * 100
    done(open_ledger(long + "1"), "a")
    assert pending(open_ledger(long + "1"), ["a"]) == []
    assert pending(open_ledger(long + "2"), ["a"]) == ["a"]


@pytest.mark.parametrize("names", [(), ("a",)])
@pytest.mark.parametrize("status", ["failed", "quarantined"])
def test_an_item_that_was_given_up_comes_back_only_if_asked_for_or_changed(open_ledger, status,
                                                                           names):
    ledger = open_ledger()
    done(ledger, "a", "v", status, attempts=2, deaths=1)
    found = list(ledger.find_pending([("a", "v"), "b"]))
    assert [(item.name, *tried) for item, *tried in found] == [("a", status, "1"), ("b", "", "")]
    assert pending(open_ledger(source="new"), [("a", "v")]) == [("a", "v")]
    assert pending(ledger, [("a", "w")]) == [("a", "w")]
    list(ledger.find_pending([("a", "v"), "b"], None, lambda name, _: name in ["b", "z"]))
    assert ledger.given_back == {}  # they were not given up
    assert pending(ledger, [("a", "v"), "b"]) == ["b"]
    again = [(Item("a", "v", True, 0, 0), "pending", "1")]
    assert list(ledger.find_pending([("a", "v")], None,
                                    lambda name, _: name in (names or (name,)))) == again
    assert ledger.given_back == {"a": ("v", "1")}
    ledger.reopen()
    assert list(ledger.find_pending([("a", "v")])) == again
    assert ledger.given_back == {}


def test_an_item_that_is_done_comes_again_only_if_asked_for_and_reopened(open_ledger):
    ledger = open_ledger()
    for name in "abc":
        done(ledger, name, "v")
    found = [(name, "v") for name in "abcd"]
    again = {"looks_at_done": True, "comes_again": lambda name, is_done: is_done and name in "ac"}
    assert [item.name for item, *_ in ledger.find_pending(found, None, **again)] == ["a", "c", "d"]
    assert pending(ledger, found) == [("d", "v")]
    list(ledger.find_pending(found, None, **again))
    ledger.reopen()
    assert pending(ledger, found) == [("a", "v"), ("c", "v"), ("d", "v")]
    done(ledger, "a", "v")
    assert pending(ledger, found) == [("c", "v"), ("d", "v")]


def test_what_somebody_else_has_done_again_meanwhile_is_not_reopened(open_ledger):
    ledger, other = open_ledger(), open_ledger(run_id="2")
    done(ledger, "a")
    again = {"looks_at_done": True, "comes_again": lambda *_: True}
    for each in (other, ledger):
        list(each.find_pending(["a"], None, **again))
    other.reopen()
    done(other, "a")
    ledger.reopen()
    assert pending(ledger, ["a"]) == []


def test_to_try_again_what_was_given_up_does_not_forget_the_version_that_passed(open_ledger):
    ledger = open_ledger()
    done(ledger, "a", "1")
    done(ledger, "a", "2", "failed")
    list(ledger.find_pending([("a", "2")], None, lambda *_: True))
    ledger.reopen()
    assert pending(open_ledger("u"), each="t") == [("a", "1")]


def test_what_failed_once_keeps_its_tries_only_for_its_version_and_source(open_ledger):
    done(open_ledger(), "a", "v", "pending", attempts=2, deaths=1)

    def counts(ledger, version):
        return [(item.tries, item.deaths) for item, *_ in ledger.find_pending([("a", version)])]

    assert counts(open_ledger(), "v") == [(2, 1)]
    assert counts(open_ledger(), "w") == [(0, 0)]
    assert counts(open_ledger(source="new"), "v") == [(0, 0)]


def test_each_lists_what_ever_passed_the_other_tool_with_that_version(open_ledger):
    first, second = open_ledger("first"), open_ledger("second")
    done(first, "a", "v1")
    done(first, "b", "v1")
    done(first, "b", "v2", "failed")
    done(first, "c", "v1", "failed")
    done(first, "d")
    assert pending(second, each="first") == [("a", "v1"), ("b", "v1"), "d"]
    done(second, "a", "v1")
    assert pending(second, each="first") == [("b", "v1"), "d"]
    done(first, "a", "v2")
    assert pending(second, each="first") == [("a", "v2"), ("b", "v1"), "d"]


def test_what_is_listed_is_counted_all_of_it_or_one_name(ledger):
    assert pending(ledger, ["a", "b", "a"]) == ["a", "b"]
    assert (ledger.listed, ledger.names, ledger.doubles) == (3, {"a", "b"}, ["a"])


def test_more_items_than_a_page_come_in_order_and_all_of_them(ledger):
    names = [f"{i:05d}" for i in range(2500)]
    for name in names[::7]:
        done(ledger, name)
    assert pending(ledger, names) == [name for name in names if name not in names[::7]]


def test_a_query_that_is_still_open_hinders_no_listing(conn, ledger):
    pending(ledger, ["a"])
    conn.execute("CREATE TABLE days (day)")
    conn.executemany("INSERT INTO days VALUES (?)", [("7",), ("8",)])
    open_cursor = conn.execute("SELECT day FROM days")
    assert open_cursor.fetchone() == ("7",)
    assert pending(ledger, (row[0] for row in conn.execute("SELECT day FROM days"))) == ["7", "8"]
    assert open_cursor.fetchone() == ("8",)


@pytest.mark.parametrize("factory", [
    sqlite3.Row, lambda cursor, row: {column[0]: each for column, each
                                      in zip(cursor.description, row)}, lambda cursor, row: None])
def test_a_connection_may_make_of_rows_what_it_will(conn, open_ledger, factory):
    conn.row_factory = factory
    ledger = open_ledger()
    assert pending(ledger, ["a", "b"]) == ["a", "b"]
    done(ledger, "a")
    assert pending(ledger, "SELECT 'a' UNION SELECT 'b'") == ["b"]
    assert ledger.count(0.0) == {"success": (1, 1)}
    assert [row["item"] for row in ledger.load_items(["success"], "")] == ["a"]


# --- how an item ended ---


def test_a_row_is_written_once_and_then_only_if_it_is_not_a_success_of_that_version(open_ledger):
    ledger, other = open_ledger(run_id="1"), open_ledger(run_id="2")
    ledger.record(Item("a", "v", False, 1), "success", 1.0, 0.1)
    with pytest.raises(Taken):
        other.record(Item("a", "v", False, 1), "success", 2.0, 0.1)
    with pytest.raises(Taken):
        other.record(Item("a", "v", True, 1), "failed", 2.0, 0.1)
    other.record(Item("a", "w", True, 1), "failed", 3.0, 0.1, error="no")
    with pytest.raises(Taken):
        other.record(Item("z", "w", True, 1), "success", 3.0, 0.1)
    row, = ledger.load_items(["failed"], "")
    assert (row["version"], row["passed"], row["run_id"], row["error"]) == ("w", "v", "2", "no")


def test_a_look_tells_who_did_an_item(open_ledger):
    ours, theirs = open_ledger(run_id="1"), open_ledger(run_id="2")
    item = Item("a", "v", None)
    assert ours.look(item) == (Item("a", "v", False), "pending", None, None)
    ours.record(Item("a", "v", False, 1), "success", 1.0, 0.1, 7)
    assert ours.look(item)[1:] == ("success", 7, None)
    assert theirs.look(item)[1:] == ("done", 7, None)
    assert theirs.look(item._replace(version="w"))[1] == "pending"


def test_a_look_keeps_the_tries_of_what_is_pending_and_of_what_failed_in_this_run(open_ledger):
    ours, theirs = open_ledger(run_id="1"), open_ledger(run_id="2")
    ours.record(Item("a", "", False, 2, 1), "pending", 1.0, 0.1, error="no")
    for ledger in (ours, theirs):
        found, status, _, _ = ledger.look(Item("a"))
        assert (status, found.tries, found.deaths) == ("pending", 2, 1)
    ours.record(Item("a", "", True, 3, 1), "failed", 1.0, 0.1, error="no")
    assert ours.look(Item("a"))[1] == "failed"
    assert theirs.look(Item("a"))[1] == "done"  # with it, though not well


def test_a_ledger_without_a_database_is_in_its_file(tmp_path):
    ledger = Ledger(None, str(tmp_path), "p", "t", "1", "s")
    assert ledger.is_apart and not ledger.is_there()
    ledger.create()
    done(ledger, "a")
    ledger.close()
    ledger = Ledger(None, str(tmp_path), "p", "t", "2", "s")
    assert pending(ledger, ["a", "b"]) == ["b"]
    ledger.close()


# --- what watches over it ---


@pytest.mark.parametrize("statement", ["COMMIT", "commit", "END", "END TRANSACTION", "ROLLBACK",
                                       "BEGIN", "Begin Immediate", " /* so */ COMMIT; "])
def test_the_guard_refuses_what_ends_a_transaction_also_if_it_was_prepared_before(statement):
    conn = sqlite3.connect(":memory:", isolation_level=None)
    conn.execute("CREATE TABLE t (x)")
    for _ in range(3):  # the statement is in the connection's cache
        if "BEGIN" not in statement.upper():
            conn.execute("BEGIN")
        conn.execute(statement)
        if conn.in_transaction:
            conn.execute("ROLLBACK /* by the test */")
    ledger = Ledger(conn, "", "p", "t", "1", "s")
    conn.execute("BEGIN /* by the test */")
    conn.execute("INSERT INTO t VALUES (1)")
    ledger.guard.is_up = True
    with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
        conn.execute(statement)
    assert ledger.guard.tried in ("COMMIT", "ROLLBACK", "BEGIN")
    assert conn.in_transaction
    ledger.guard.is_up = False
    conn.commit()
    assert conn.execute("SELECT x FROM t").fetchall() == [(1,)]
    conn.close()


def test_a_savepoint_passes_the_guard():
    conn = sqlite3.connect(":memory:", isolation_level=None)
    ledger = Ledger(conn, "", "p", "t", "1", "s")
    conn.execute("BEGIN")
    conn.execute("CREATE TABLE t (x)")
    ledger.guard.is_up = True
    for statement in ("SAVEPOINT own", "INSERT INTO t VALUES (1)", "ROLLBACK TO own",
                      "INSERT INTO t VALUES (2)", "RELEASE own"):
        conn.execute(statement)
    assert not ledger.guard.tried
    assert conn.execute("SELECT x FROM t").fetchall() == [(2,)]
    conn.close()


def test_a_lock_is_known_wherever_in_a_chain_of_errors_it_is():
    locked = sqlite3.OperationalError("database is locked")
    other = ValueError("no")
    other.__context__ = locked
    assert is_locked(locked) and is_locked(other)
    assert not is_locked(ValueError("database is locked"))
    assert not is_locked(sqlite3.OperationalError("no such table: locked"))
    assert not is_locked(None)


def test_a_chain_of_errors_that_bites_its_tail_is_walked_once():
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert not is_locked(first)


def test_the_driver_of_sqlite_is_known_also_by_a_subclass():
    class Own(sqlite3.Connection):
        pass

    conn = sqlite3.connect(":memory:", factory=Own)
    assert find_driver(conn) == ("sqlite", "qmark")
    conn.close()


# --- slips ---


def test_a_slip_tells_the_item_that_was_at_work_and_nothing_after_a_clean_end(tmp_path):
    path, job = tmp_path / "slip", Job(1, "t", source="s")
    item = Item("a long name\nof two lines 😀", "v", True, 2, 1)
    with open(path, "wb") as file:
        write_slip(file.fileno(), job, Item("a much longer name than that of the next", "v" * 40))
        write_slip(file.fileno(), job, item)
        assert read_slip(str(path)) == ("t", "s", item._replace(is_seen=None))
        write_slip(file.fileno(), job, None)
    assert read_slip(str(path)) == ("t", "s", None)


@pytest.mark.parametrize("content", [b"", b"t", b"t\0s\0a\0v\0", b"t\0s\0a\0v\0x\0y\0",
                                     b"t\0s\0\xff\0v\x001\x001\0"])
def test_a_slip_that_was_torn_tells_nothing(tmp_path, content):
    (tmp_path / "slip").write_bytes(content)
    assert read_slip(str(tmp_path / "slip")) == ("", "", None)
    assert read_slip(str(tmp_path / "none")) == ("", "", None)
