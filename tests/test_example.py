"""The example pipeline: real data, the same state however often it runs, a page to look at."""
import functools
import hashlib
import http.server
import shutil
import sqlite3
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import TOP, Sandbox


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """A copy of the example that has run once, in another working folder."""
    folder = tmp_path_factory.mktemp("flights")
    shutil.copy(TOP / "orchestrator.py", folder)
    shutil.copytree(TOP / "example", folder / "example")
    copy = Sandbox(folder)
    ended = copy.run(cwd=tmp_path_factory.mktemp("elsewhere"))
    assert ended.code == 0, ended
    return copy


@pytest.fixture
def again(example, tmp_path):
    """A copy of that, to run again; the folder's name is the pipeline's, and so the ledger's."""
    return Sandbox(Path(shutil.copytree(example.folder, tmp_path / example.folder.name)))


def dump(sandbox):
    """Return all that is in the database."""
    conn = sqlite3.connect(sandbox.folder / "data.db")
    try:
        return list(conn.iterdump())
    finally:
        conn.close()


def dump_data(sandbox):
    """Return the same without the ledger, which tells when what was done."""
    return [line for line in dump(sandbox) if "orchestrator_items" not in line]


def find_done(sandbox):
    """Return {(tool, file): id of the run that did it}."""
    return {(tool, file): run for tool, file, run in sandbox.query(
        "SELECT tool, item, run_id FROM orchestrator_items WHERE status = 'success'")}


def write_index(folder):
    """Write the index as `sha256sum *.csv` prints it."""
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
             for path in sorted(folder.glob("*.csv"))]
    (folder / "index.txt").write_text("".join(lines), encoding="utf-8")


def test_all_flights_of_the_week_are_loaded(example):
    per_day = example.query("SELECT day, count(*) - 1 FROM raw WHERE day > '' GROUP BY day")
    assert dict(per_day) == {
        "2013-01-01": 842, "2013-01-02": 943, "2013-01-03": 914, "2013-01-04": 915,
        "2013-01-05": 720, "2013-01-06": 832, "2013-01-07": 933}


def test_every_flight_is_typed_or_refused_with_a_reason(example):
    (typed,), = example.query("SELECT count(*) FROM flights")
    refused = example.query("SELECT reason, count(*) FROM rejects GROUP BY reason ORDER BY reason")
    assert refused == [("arrived, but how late is not recorded", 18),
                       ("departed, but no arrival is recorded", 3)]
    assert typed + 21 == 6099


def test_each_delay_group_holds_the_delays_that_it_says(example):
    found = example.query("""SELECT delay_group, min(arr_delay_min), max(arr_delay_min)
        FROM enriched_flights GROUP BY delay_group""")
    low_high = {group: (low, high) for group, low, high in found}
    assert low_high["on time"][1] <= 0 < low_high["up to 15"][0]
    assert low_high["up to 15"][1] == 15 and low_high["up to 60"] == (16, 60)
    assert low_high["over 60"][0] == 61 and low_high["cancelled"] == (None, None)


def test_output_lands_beside_the_pipeline_whatever_the_working_folder(example):
    assert (example.folder / "data.db").exists()
    assert (example.folder / "output" / "flights.html").exists()


def test_a_second_run_changes_nothing(example, again):
    page = (again.folder / "output" / "flights.html").read_bytes()
    assert again.run().code == 0
    assert dump(again) == dump(example)
    assert (again.folder / "output" / "flights.html").read_bytes() == page


def test_since_narrows_the_run_and_leaves_earlier_days(again):
    assert again.run("--since", "2013-01-04").code == 0
    assert again.query("SELECT min(flight_date) FROM by_day_hour") == [("2013-01-04",)]
    assert again.query("SELECT min(flight_date) FROM flights") == [("2013-01-01",)]


def test_days_before_since_are_fetched_by_a_later_run_that_wants_them(example, again):
    (again.folder / "data.db").unlink()
    assert again.run("--since", "2013-01-04").code == 0
    assert again.query("SELECT min(day), min(flight_date) FROM raw, by_day_hour") \
        == [("2013-01-04", "2013-01-04")]
    assert again.query("SELECT count(DISTINCT file) FROM raw") == [(2 + 4,)]
    assert again.run().code == 0
    for table in ("raw", "flights", "rejects", "enriched_flights", "by_carrier"):
        query = f"SELECT * FROM {table} ORDER BY 1, 2"
        assert again.query(query) == example.query(query)


def test_only_a_corrected_and_a_new_day_are_fetched_and_parsed(again):
    data = again.folder / "example" / "data"
    (typed,), = again.query("SELECT count(*) FROM flights WHERE flight_date = '2013-01-02'")
    head, first, *rest = (data / "flights-2013-01-02.csv").read_text().splitlines(keepends=True)
    (data / "flights-2013-01-02.csv").write_text("".join([head, *rest]))
    (data / "flights-2013-01-08.csv").write_text(head + first.replace("2013,1,2,", "2013,1,8,"))
    write_index(data)
    before = find_done(again)
    assert again.run().code == 0
    after = find_done(again)
    assert {key for key in after if after[key] != before.get(key)} == {
        (tool, f"flights-2013-01-0{day}.csv") for tool in ("fetch", "parse") for day in (2, 8)}
    assert again.query("""SELECT flight_date, count(*) FROM flights
        WHERE flight_date IN ('2013-01-02', '2013-01-08') GROUP BY 1""") \
        == [("2013-01-02", typed - 1), ("2013-01-08", 1)]


def test_a_day_of_which_too_many_flights_are_refused_stops_no_other(example, again):
    data = again.folder / "example" / "data"
    (data / "flights-2013-01-08.csv").write_bytes((data / "flights-2013-01-07.csv").read_bytes())
    write_index(data)
    ended = again.run()
    assert ended.code == 1 and "ValueError: only 0 of 933 flights could be read" in ended.err
    assert again.query("SELECT count(*) FROM flights") \
        == example.query("SELECT count(*) FROM flights")


def test_the_index_is_that_of_the_files(again):
    data = again.folder / "example" / "data"
    shown = (data / "index.txt").read_text()
    write_index(data)
    assert (data / "index.txt").read_text() == shown


@pytest.mark.parametrize("since", ["2013-13-01", "yesterday", "2013-01-01' OR '1'='1"])
def test_since_must_be_a_day(again, since):
    ended = again.run("--since", since)
    assert ended.code == 2 and "invalid date value" in ended.err


def test_a_day_without_flights_is_not_good_enough_to_keep(example, again):
    ended = again.run("--since", "2014-01-01")
    assert ended.code == 1 and "ValueError" in ended.err
    assert again.query("SELECT count(*) FROM flights") == example.query(
        "SELECT count(*) FROM flights")


def test_the_raw_files_may_come_from_the_web(example, again):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    serve = functools.partial(Quiet, directory=str(TOP / "example" / "data"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (again.folder / "data.db").unlink()
    try:
        ended = again.run("--source", f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    assert ended.code == 0, ended
    assert dump_data(again) == dump_data(example)


def test_the_page_loads_nothing_from_elsewhere_and_is_well_formed(example):
    class Page(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.seen = [], []

        def handle_starttag(self, tag, attributes):
            self.seen.append((tag, dict(attributes)))
            if tag not in ("meta", "br", "link", "img", "hr"):
                self.open.append(tag)

        def handle_startendtag(self, tag, attributes):
            self.seen.append((tag, dict(attributes)))

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    text = example.read("output/flights.html")
    page = Page()
    page.feed(text)
    assert page.open == []
    tags = {tag for tag, _ in page.seen}
    assert "svg" in tags and not tags & {"script", "link", "img", "iframe"}
    assert "url(" not in text and "@import" not in text and "prefers-color-scheme" in text
    assert not any(a.get(name) for _, a in page.seen for name in ("src", "href"))


def test_the_example_has_no_mistakes_to_check(example):
    ended = example.run("--check")
    assert ended.code == 0, ended
