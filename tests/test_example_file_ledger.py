"""The file ledger: what is done of each file is written in the transaction that does it.

    inbox - validate ----- load_stage ---- transform ------- publish
            (each file)    (each passed)   (each loaded)     (all that passed)
"""
import csv
import json
import random
import shlex
import sqlite3
import subprocess
import sys
from collections import Counter
from decimal import Decimal

import pytest
from conftest import MODES, TOP, Example, summary, wait_until

BROKEN = "orders-2024-05-03.csv"
MISSING_END = "1304,market,2024-05-03,4.80\ntotal,4,,57.30\n"  # what the docstring appends
GOOD = [f"orders-2024-05-{day}.csv" for day in ("01", "02", "04")]
ITEM_TOOLS = "validate", "load_stage", "transform"


@pytest.fixture
def pipeline(tmp_path):
    """A copy of the pipeline that has never run."""
    return Example(tmp_path, "file_ledger")


@pytest.fixture(scope="module", params=MODES.values(), ids=MODES)
def ran(request, tmp_path_factory):
    """A copy that has run once, with its broken file: (copy, how it ended, the flags)."""
    copy = Example(tmp_path_factory.mktemp("ledger"), "file_ledger")
    return copy, copy.run(*request.param), request.param


@pytest.fixture
def again(pipeline):
    """A pipeline of which one run is over, to change something and run it again."""
    assert pipeline.run().code == 1
    return pipeline


def write_file(inbox, name, orders, more=""):
    """Write a file of (shop, day, amount), with a control total, and perhaps `more` behind it."""
    lines = [f"{number},{','.join(order)}" for number, order in enumerate(orders, start=1)]
    total = f"total,{len(orders)},,{sum(Decimal(amount) for _, _, amount in orders):.2f}"
    text = "\n".join(["order,shop,day,amount", *lines, total]) + "\n" + more
    (inbox / name).write_text(text, encoding="utf-8")


def write_day(inbox, day, *orders, more=""):
    """Write the file of a day, of (shop, amount)."""
    write_file(inbox, f"orders-{day}.csv", [(shop, day, amount) for shop, amount in orders], more)


def mend(inbox):
    """Complete the broken file."""
    with (inbox / BROKEN).open("a", encoding="utf-8") as file:
        file.write(MISSING_END)


def count_totals(inbox):
    """Return {(shop, day): (orders, cents)} of the files that are whole, read by themselves."""
    orders, cents = Counter(), Counter()
    for path in inbox.glob("orders-*.csv"):
        lines = path.read_text(encoding="utf-8").splitlines()
        for order in csv.DictReader(lines[:-1] if lines[-1].startswith("total") else []):
            if path.name == f"orders-{order['day']}.csv":
                orders[order["shop"], order["day"]] += 1
                cents[order["shop"], order["day"]] += int(Decimal(order["amount"]) * 100)
    return {key: (orders[key], cents[key]) for key in orders}


def count_done(pipeline):
    """Return how many items are done, also while others are, and before there is a ledger."""
    try:
        return pipeline.query(
            "SELECT count(*) FROM orchestrator_items WHERE status = 'success'")[0][0]
    except sqlite3.OperationalError:
        return 0


def find_mart(pipeline):
    """Return {(shop, day): (orders, cents)} from the data mart."""
    return {(shop, day): (orders, cents) for shop, day, orders, cents in pipeline.query(
        "SELECT shop, day, orders, cents FROM shop_days")}


def find_tries(pipeline):
    """Return {(tool, item): (run, status, tries)} from the ledger."""
    return {(tool, item): (run, status, tries) for tool, item, run, status, tries in pipeline.query(
        "SELECT tool, item, CAST(run_id AS INTEGER), status, attempts FROM orchestrator_items")}


def find_content(pipeline):
    """Return all that is in the database but for what tells when and in which run."""
    tables = [name for name, in pipeline.query(
        "SELECT name FROM sqlite_master WHERE type = 'table'") if name != "orchestrator_items"]
    ledger = "SELECT tool, item, version, passed, status, attempts, deaths, row_count, error"
    return [sorted(pipeline.query(f"SELECT * FROM {table}")) for table in sorted(tables)] \
        + [sorted(pipeline.query(f"{ledger} FROM orchestrator_items"), key=str)]


def list_items(pipeline, *words):
    """Return {item: (status, tries, error)} as --items shows it."""
    ended = pipeline.run("--items", *words, "--json")
    assert ended.code == 0, ended
    return {each["item"]: (each["status"], each["attempts"], each["error"])
            for each in json.loads(ended.out)["items"]}


def test_the_broken_file_does_not_stop_the_others(ran):
    pipeline, ended, _ = ran
    assert ended.code == 1
    statuses = {tool: row.split()[1] for tool, row in summary(ended.err).items()}
    assert statuses == {"validate": "partial", "load_stage": "success", "transform": "success",
                        "publish": "success"}
    assert find_mart(pipeline) == count_totals(pipeline.home / "inbox") != {}
    assert "2024-05-04      3       5     99.90" in ended.out


def test_the_order_of_another_day_is_kept_apart_with_the_reason(ran):
    pipeline, _, _ = ran
    assert pipeline.query("SELECT * FROM rejected_orders") == [
        ("orders-2024-05-04.csv", 7, "not of the day that the file is named after")]


def test_both_modes_end_in_the_same_tables_and_print_the_same(ran, pipeline):
    copy, ended, _ = ran
    assert pipeline.run("--jobs", "2").out == ended.out
    assert find_content(pipeline) == find_content(copy)


def test_a_second_run_does_nothing_twice_and_leaves_the_broken_file_alone(ran):
    pipeline, first, flags = ran
    before = find_tries(pipeline)
    assert set(before) == {("validate", BROKEN), *(
        (tool, file) for tool in ITEM_TOOLS for file in GOOD)}
    ended = pipeline.run(*flags)
    assert (ended.code, ended.out) == (0, first.out)
    assert find_tries(pipeline) == before
    assert f"1 item given up before: {BROKEN}" in summary(ended.err)["validate"]


def test_the_broken_file_is_tried_twice_and_listed_with_its_error(ran):
    pipeline, _, _ = ran
    failed = list_items(pipeline, "validate", "--failed")
    assert failed == {BROKEN: (
        "failed", 2, "ValueError: it breaks off: its last line is no control total")}
    assert {name: status for name, (status, _, _) in list_items(pipeline, "validate").items()} \
        == {BROKEN: "failed", **dict.fromkeys(GOOD, "success")}
    assert BROKEN in pipeline.run("--items", "validate", "--failed").out
    assert "No item of transform has failed" in pipeline.run("--items", "transform", "--failed").err


def test_the_status_counts_the_files(again):
    tools = json.loads(again.run("--status", "--json").out)["tools"]
    counts = {each["tool"]: each["items"] for each in tools}
    assert counts["publish"] is None
    assert {tool: (counts[tool]["success"], counts[tool]["failed"], counts[tool]["pending"])
            for tool in ITEM_TOOLS} \
        == {"validate": (3, 1, 0), "load_stage": (3, 0, 0), "transform": (3, 0, 0)}


@pytest.mark.parametrize("flags", MODES.values(), ids=MODES)
def test_a_corrected_file_goes_through_alone(pipeline, flags):
    assert pipeline.run(*flags).code == 1
    before = find_tries(pipeline)
    mend(pipeline.home / "inbox")
    ended = pipeline.run(*flags)
    assert ended.code == 0, ended
    after = find_tries(pipeline)
    assert {key for key in after if after[key] != before.get(key)} \
        == {(tool, BROKEN) for tool in ITEM_TOOLS}
    assert after["transform", BROKEN][1:] == ("success", 1)
    mart = find_mart(pipeline)
    assert mart == count_totals(pipeline.home / "inbox")
    assert mart["market", "2024-05-03"] == (2, 1840 + 480)


def test_a_new_file_is_done_alone(again):
    before = find_tries(again)
    write_day(again.home / "inbox", "2024-05-06", ("market", "7.40"), ("harbour", "1.00"))
    assert again.run().code == 0
    after = find_tries(again)
    assert {key for key in after if after[key] != before.get(key)} \
        == {(tool, "orders-2024-05-06.csv") for tool in ITEM_TOOLS}
    assert find_mart(again) == count_totals(again.home / "inbox")


def test_another_version_of_a_file_that_had_passed_replaces_it_and_a_broken_one_does_not(again):
    inbox = again.home / "inbox"
    write_day(inbox, "2024-05-01", ("market", "1.00"))
    assert again.run().code == 0
    mart = find_mart(again)
    assert mart == count_totals(inbox) and mart["market", "2024-05-01"] == (1, 100)
    write_day(inbox, "2024-05-01", ("market", "2.00"), more="9,market,2024-05-01,3.00\n")
    assert again.run().code == 1
    assert find_mart(again) == mart
    assert ("market", "2024-05-01") in mart


def test_a_file_that_fails_in_transform_is_published_once_its_shop_is_listed(again):
    inbox, name = again.home / "inbox", "orders-2024-05-06.csv"
    write_day(inbox, "2024-05-06", ("airport", "7.40"), ("harbour", "1.00"))
    mart = find_mart(again)
    failed = again.run()
    assert failed.code == 1
    assert list_items(again, "transform", "--failed") == {
        name: ("failed", 2, "ValueError: 1 of 2 orders would be refused")}
    assert find_mart(again) == mart
    assert again.query(f"SELECT * FROM rejected_orders WHERE file = '{name}'") == []
    with (again.home / "shops.csv").open("a", encoding="utf-8") as file:
        file.write("airport,Bergen\n")
    assert again.run().code == 0
    assert find_mart(again) == mart, "it was given up, and shops.csv is no part of its version"
    ended = again.run("--retry-items", "transform", name)
    assert ended.code == 0, ended
    assert find_mart(again) == count_totals(inbox)
    assert find_tries(again)["transform", name][1] == "success"


def test_the_next_command_that_a_failed_run_prints_tries_the_file_again(pipeline):
    ended = pipeline.run()
    command = ended.err[ended.err.rindex("\nNext: ") + len("\nNext: "):].splitlines()[0]
    mend(pipeline.home / "inbox")
    again = pipeline.run(program=shlex.split(command)[1:])
    assert again.code == 0, again
    assert find_mart(pipeline) == count_totals(pipeline.home / "inbox")


def test_what_had_passed_goes_on_when_nothing_but_a_broken_file_has_come(pipeline):
    inbox = pipeline.home / "inbox"
    assert pipeline.run("validate", "--exclude", "publish").code == 1
    write_file(inbox, "orders-2024-05-07.csv", [("harbour", "today", "1.00")])
    ended = pipeline.run()
    assert ended.code == 1 and summary(ended.err)["validate"].split()[1] == "failed"
    assert "line 2: Invalid isoformat string" in ended.err
    assert find_mart(pipeline) == {
        key: totals for key, totals in count_totals(inbox).items() if key[1] != "today"}


REFUSED = [  # what is in a file, and the error that it is listed with
    (b"", "its header is not order,shop,day,amount"),
    (b"order,shop,day\n", "its header is not order,shop,day,amount"),
    (b"order,shop,day,amount\n", "its last line is no control total"),
    (b"order,shop,day,amount\n\n", "its last line is no control total"),
    (b"order,shop,day,amount\n1,market\ntotal,1,,1.00\n", "line 2: 2 values, not 4"),
    (b"order,shop,day,amount\none,market,2024-05-08,1.00\ntotal,1,,1.00\n", "line 2: invalid"),
    (b"order,shop,day,amount\n1,market,2024-05-08,1.0\ntotal,1,,1.00\n", "no amount"),
    (b"order,shop,day,amount\n1,market,2024-05-08,1.00\ntotal,1,,1.50\n",
     "its last line is total,1,,1.50, its orders: total,1,,1.00"),
    (b"order,shop,day,amount\n1,market,2024-05-08,1.00\ntotal,2,,1.00\n", "total,2,,1.00"),
    (b"\xff\xfe", "can't decode byte"),
]


def test_a_file_is_refused_for_what_is_wrong_with_it(pipeline):
    inbox = pipeline.folder / "inbox"
    inbox.mkdir()
    for number, (content, _) in enumerate(REFUSED):
        (inbox / f"orders-{number}.csv").write_bytes(content)
    assert pipeline.run("validate", "--inbox", str(inbox)).code == 1
    listed = list_items(pipeline, "validate", "--failed")
    for number, (_, problem) in enumerate(REFUSED):
        assert problem in listed.pop(f"orders-{number}.csv")[2]
    assert not listed


def test_a_file_that_changes_after_it_was_validated_waits_until_it_is_validated_anew(pipeline):
    inbox = pipeline.home / "inbox"
    assert [pipeline.run("validate").code for _ in range(2)] == [1, 0]
    write_day(inbox, "2024-05-01", ("market", "1.00"))
    ended = pipeline.run("load_stage", "transform", "publish")
    assert ended.code == 1 and "it was changed after validate had read it" in ended.err
    assert ("market", "2024-05-01") not in find_mart(pipeline)
    assert pipeline.run().code == 0
    assert find_mart(pipeline) == count_totals(inbox)


def test_an_inbox_that_is_not_there_is_no_empty_inbox(pipeline):
    ended = pipeline.run("--inbox", "nowhere")
    assert ended.code == 1 and "nowhere" in summary(ended.err)["validate"]


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("kills", [3, pytest.param(12, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("flags", MODES.values(), ids=MODES)
def test_killed_at_random_moments_every_file_counts_exactly_once(pipeline, flags, kills):
    inbox, chance = pipeline.home / "inbox", random.Random(1)
    for day in range(1, 101):
        write_day(inbox, f"2025-{1 + day // 28:02}-{1 + day % 28:02}", *(
            (chance.choice(("harbour", "market", "station")), f"{chance.uniform(1, 90):.2f}")
            for _ in range(20)))
    for goal in sorted(chance.sample(range(3 * 103), kills)):
        process = subprocess.Popen(
            [sys.executable, "-m", "example.file_ledger.pipeline", "--wait", "20s", *flags],
            cwd=pipeline.folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        wait_until(lambda least=goal: count_done(pipeline) >= least)
        process.kill()
        process.wait()
    ended = pipeline.run("--wait", "20s", *flags)
    assert ended.code in (0, 1), ended  # 1: if the broken file was not given up before
    tries = find_tries(pipeline)
    assert Counter((tool, status) for (tool, _), (_, status, _) in tries.items()) == {
        **{(tool, "success"): 103 for tool in ITEM_TOOLS}, ("validate", "failed"): 1}
    assert find_mart(pipeline) == count_totals(inbox)
    assert pipeline.query("SELECT count(*), count(DISTINCT file) FROM staged_orders") \
        == [(100 * 20 + 15, 103)]


def test_the_docstring_tells_how_to_correct_the_file():
    source = (TOP / "example" / "file_ledger" / "pipeline.py").read_text(encoding="utf-8")
    for line in MISSING_END.splitlines():
        assert f"echo {line} >> inbox/{BROKEN}" in source


def test_the_file_may_also_be_run_by_its_path_from_any_folder(pipeline, tmp_path_factory):
    ended = pipeline.run(program=(str(pipeline.home / "pipeline.py"),),
                         cwd=tmp_path_factory.mktemp("elsewhere"))
    assert ended.code == 1 and find_mart(pipeline) == count_totals(pipeline.home / "inbox")


def test_the_file_ledger_has_no_mistakes_to_check(pipeline):
    ended = pipeline.run("--check")
    assert ended.code == 0 and "4 tools read, no mistakes found" in ended.out, ended
    assert not (pipeline.home / "file_ledger.db").exists()
