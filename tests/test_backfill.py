"""A backfill: a plan run once per period, each period recorded, resumable and told."""
import contextlib
import datetime
import json
import os
import signal
import sqlite3
import time
import zoneinfo

import pytest
from conftest import SQLITE, wait_until

from orchestrator import UserError, make_periods

HEAD = "TOOL_MAP = {'a': 'a', 'b': {'module': 'b', 'needs': ['a']}}\nSTAGES = {}\n"
TOOL = """
    import pathlib
    def run(context, period_start=None, period_end=None):
        with open("ran", "a") as file:
            file.write(f"{context.tool} {period_start} {period_end}\\n")
        broken = pathlib.Path("broken")
        if broken.exists() and f"{context.tool} {period_start}" in broken.read_text().split(","):
            raise ValueError("broken")
"""
THREE = ("--backfill", "2024-02-28..2024-03-01")


@pytest.fixture
def line(quick):
    """A sandbox with two tools, which fail at what the file `broken` names, as `a 2024-02-29`."""
    quick.pipeline(HEAD + SQLITE).tool("a", TOOL).tool("b", TOOL)

    def ran():
        """Return what ran since this was asked last: tool and day."""
        file = quick.folder / "ran"
        lines = file.read_text().splitlines() if file.exists() else []
        file.write_text("")
        return [" ".join(line.split()[:2]) for line in lines]

    def break_at(*what):
        (quick.folder / "broken").write_text(",".join(what))

    quick.ran, quick.break_at = ran, break_at
    return quick


def plan(line, *words):
    """Return what --plan tells of each period: its start, action and reason."""
    shown = json.loads(line.run(*words, "--plan", "--json").out)["periods"]
    return [(each["period_start"], each["action"], each["reason"]) for each in shown]


# --- periods ---


@pytest.mark.parametrize("span, step, periods", [
    ("2024-02-28..2024-03-01", "day", "0228-0229 0229-0301 0301-0302"),
    ("2024-01-05..2024-01-05", "day", "0105-0106"),
    ("2024-01-01..2024-01-16", "week", "0101-0108 0108-0115 0115-0117"),
    ("2024-01-01..2024-01-14", "week", "0101-0108 0108-0115"),
    ("2024-01-01..2024-03-31", "month", "0101-0201 0201-0301 0301-0401"),
    ("2024-01-31..2024-03-01", "month", "0131-0201 0201-0301 0301-0302"),
    ("2024-11-15..2024-12-31", "month", "1115-1201 1201-0101"),
])
def test_a_span_is_cut_into_periods_each_up_to_the_day_of_the_next(span, step, periods):
    assert " ".join(p.start[5:].replace("-", "") + "-" + p.end[5:].replace("-", "")
                    for p in make_periods(span, step)) == periods


@pytest.mark.parametrize("step", ["day", "week", "month"])
def test_periods_leave_out_no_day_and_take_none_twice(step):
    periods = make_periods("2023-11-17..2025-02-03", step)
    assert (periods[0].start, periods[-1].end) == ("2023-11-17", "2025-02-04")
    assert all(before.end == after.start for before, after in zip(periods, periods[1:]))
    assert all(period.start < period.end for period in periods)


@pytest.mark.parametrize("span", [
    "2024-01-01", "2024-01-01..", "..2024-01-01", "2024-01-01..2024-02-30", "a..b", "",
    "2024-01-01..2024-01-02..2024-01-03", "2024-01-01...2024-01-02", "2024-1-1..2024-1-2"])
def test_what_is_no_span_is_refused_with_the_way_to_write_it(span):
    with pytest.raises(UserError) as caught:
        make_periods(span, "day")
    assert f"{span!r} is no span of days" in caught.value.problem
    assert "unpack" not in caught.value.problem
    assert caught.value.fix == "Write it like 2024-01-01..2024-03-31."


def test_a_span_that_ends_before_it_begins_is_refused_with_the_one_meant():
    with pytest.raises(UserError) as caught:
        make_periods("2024-03-31..2024-01-01", "day")
    assert "2024-01-01..2024-03-31" in caught.value.fix


@pytest.mark.parametrize("step", ["day", "week", "month"])
def test_the_last_day_that_there_is_is_refused_in_a_sentence(step):
    with pytest.raises(UserError, match="is no span of days"):
        make_periods("9999-12-30..9999-12-31", step)


# --- runs ---


def test_the_plan_is_run_once_per_period_in_order(line):
    ended = line.run(*THREE)
    assert ended.code == 0, ended
    assert line.read("ran").splitlines() == [
        f"{tool} {start} {end}" for start, end in [
            ("2024-02-28", "2024-02-29"), ("2024-02-29", "2024-03-01"),
            ("2024-03-01", "2024-03-02")] for tool in "ab"]
    assert "Period 2024-02-29 to 2024-03-01 (2 of 3)" in ended.err
    assert "Backfill: 3 periods done now, 0 left alone, 0 failed" in ended.err
    runs = json.loads(line.run("--history", "--json").out)["runs"]
    assert [run["arguments"]["period_start"] for run in runs] == [
        "2024-03-01", "2024-02-29", "2024-02-28"]


def test_the_last_period_is_first_in_reverse_and_targets_count(line):
    assert line.run("a", *THREE, "--reverse").code == 0
    assert line.ran() == ["a 2024-03-01", "a 2024-02-29", "a 2024-02-28"]


def test_a_period_that_is_done_is_left_alone(line):
    line.run("--backfill", "2024-02-28..2024-02-29")
    line.ran()
    ended = line.run(*THREE)
    assert line.ran() == ["a 2024-03-01", "b 2024-03-01"]
    assert "1 period done now, 2 left alone, 0 failed" in ended.err
    ended = line.run(*THREE)
    assert (ended.code, line.ran()) == (0, [])
    assert "0 periods done now, 3 left alone, 0 failed" in ended.err
    assert line.run("a", *THREE).code == 0  # other targets are another backfill
    assert len(line.ran()) == 3


def test_a_period_that_failed_hinders_no_other_and_is_left_until_asked_for(line):
    line.break_at("b 2024-02-29")
    ended = line.run(*THREE)
    assert ended.code == 1
    assert line.ran() == ["a 2024-02-28", "b 2024-02-28", "a 2024-02-29", "b 2024-02-29",
                          "a 2024-03-01", "b 2024-03-01"]
    assert "2 periods done now, 0 left alone, 1 failed: 2024-02-29" in ended.err
    next_words = ended.err.strip().splitlines()[-1].split()[3:]
    assert next_words == [*THREE, "--reprocess", "failed"]
    line.break_at()
    ended = line.run(*THREE)
    assert (ended.code, line.ran()) == (1, [])
    assert "0 periods done now, 2 left alone, 1 failed: 2024-02-29" in ended.err
    assert line.run(*next_words).code == 0
    assert line.ran() == ["b 2024-02-29"]  # of what failed, what was done is not done again
    assert line.run(*next_words).code == 0
    assert line.ran() == []


def test_all_periods_are_run_again_when_that_is_asked_for(line):
    line.run(*THREE)
    line.ran()
    assert line.run(*THREE, "--reprocess", "all").code == 0
    assert len(line.ran()) == 6


def test_fail_fast_stops_at_the_first_period_that_fails(line):
    line.break_at("a 2024-02-29")
    assert line.run(*THREE, "--fail-fast").code == 1
    assert line.ran() == ["a 2024-02-28", "b 2024-02-28", "a 2024-02-29"]


def test_the_plan_tells_of_each_period_what_would_be_done_and_why(line):
    line.break_at("b 2024-02-29")
    line.run("--backfill", "2024-02-28..2024-02-29")
    line.ran()
    assert plan(line, *THREE) == [("2024-02-28", "skip", "done in run 1"),
                                  ("2024-02-29", "skip", "failed in run 2; see --reprocess"),
                                  ("2024-03-01", "run", "never run")]
    assert [action for _, action, _ in plan(line, *THREE, "--reprocess", "failed")] == [
        "skip", "resume", "run"]
    assert [action for _, action, _ in plan(line, *THREE, "--reprocess", "all")] == ["run"] * 3
    assert [start for start, _, _ in plan(line, *THREE, "--reverse")] == [
        "2024-03-01", "2024-02-29", "2024-02-28"]
    out = line.run(*THREE, "--plan").out
    assert "1 of 3 periods to run" in out and "failed in run 2" in out
    assert line.ran() == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_backfill_that_was_cut_off_goes_on_where_it_was(sandbox, number):
    sandbox.pipeline(HEAD + SQLITE).tool("a", TOOL).tool("b", TOOL + """
        while period_start == "2024-02-29" and not pathlib.Path("go").exists():
            import time
            time.sleep(0.01)
    """)
    process = sandbox.start(*THREE)
    ran = sandbox.folder / "ran"
    wait_until(lambda: ran.exists() and "b 2024-02-29" in ran.read_text())
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    (sandbox.folder / "go").touch()
    ran.write_text("")
    if number == signal.SIGINT:
        assert process.returncode == 130
        end = err[err.index("Backfill: "):].splitlines()
        assert end[0].startswith("Backfill: 1 period done now, 0 left alone, 0 failed")
        assert end[0].endswith(", 2024-02-29 cut off, 1 not begun")
        assert end[1].startswith("Next: ") and "--reprocess" not in end[1]
    assert plan(sandbox, *THREE)[1][1:] == ("resume", "interrupted in run 2")
    assert sandbox.run(*THREE).code == 0
    assert [" ".join(each.split()[:2]) for each in ran.read_text().splitlines()] == [
        "b 2024-02-29", "a 2024-03-01", "b 2024-03-01"]


def test_a_period_that_failed_can_be_resumed_by_its_run(line):
    line.break_at("b 2024-02-29")
    line.run("--backfill", "2024-02-28..2024-02-29")
    line.ran()
    line.break_at()
    assert line.run("--resume").code == 0
    assert line.ran() == ["b 2024-02-29"]
    assert plan(line, *THREE)[1][1:] == ("skip", "done in run 3")


def test_items_may_be_found_by_period_and_are_each_done_once(line):
    line.tool("a", """
        def items(period_start):
            return [f"{period_start}/{i}" for i in range(2)]
        def run(conn, item, period_end):
            open("ran", "a").write(f"a {item}\\n")
    """)
    line.run(*THREE)
    line.run(*THREE, "--reprocess", "all")
    assert [each for each in line.ran() if each.startswith("a")] == [
        f"a {day}/{i}" for day in ("2024-02-28", "2024-02-29", "2024-03-01") for i in range(2)]


# --- periods that are not over ---

class Noon:
    """The pipeline in a zone where it is about noon, so that no test is at work at midnight.

    `day(-1)` is yesterday there, `period(0)` the words for today alone.
    """

    def __init__(self, line):
        self.line = line
        behind = time.gmtime().tm_hour - 12  # UTC-5 is written TEST5
        self.zone = {"TZ": f"TEST{behind}"}
        self.today = (datetime.datetime.now(datetime.timezone.utc)
                      - datetime.timedelta(hours=behind)).date()

    def day(self, number):
        return str(self.today + datetime.timedelta(number))

    def period(self, first, last=None):
        return "--backfill", f"{self.day(first)}..{self.day(first if last is None else last)}"

    def run(self, *words, code=0):
        """Run the pipeline, and return what ran; the process is in `ended`."""
        self.ended = self.line.run(*words, env=self.zone)
        assert self.ended.code == code, self.ended
        return self.line.ran()

    def plan(self, *words):
        shown = json.loads(self.line.run(*words, "--plan", "--json", env=self.zone).out)
        return [(each["action"], each["reason"]) for each in shown["periods"]]

    def let_pass(self, hours, run_id=None):
        """Let the runs, or one of them, have begun so many hours earlier."""
        file, = self.line.folder.glob("**/history.db")
        with contextlib.closing(sqlite3.connect(file)) as conn, conn:
            for table in ("runs", "attempts"):
                conn.execute(f"UPDATE {table} SET started_at = started_at - ? "
                             "WHERE ?2 IS NULL OR run_id = ?2", (hours * 3600, run_id))


@pytest.fixture
def noon(line):
    return Noon(line)


def test_a_period_that_goes_on_is_run_each_time_and_says_that_it_is_not_over(noon):
    today = f"a {noon.day(0)}", f"b {noon.day(0)}"
    assert noon.plan(*noon.period(0)) == [("run", "never run; it is not over yet")]
    for _ in range(2):
        assert noon.run(*noon.period(0)) == [*today]
        assert (f"; the period from {noon.day(0)} is not over yet, and will be run again when it "
                "is") in noon.ended.err
    assert noon.plan(*noon.period(-1, 0)) == [
        ("run", "never run"),
        ("run", "done in run 2, which ran before the period was over; it is not over yet")]


def test_what_ran_before_its_period_was_over_is_not_done_when_it_is(noon):
    noon.run(*noon.period(-2, -1))
    noon.let_pass(13, 2)  # to yesterday, before midnight
    reason = "done in run 2, which ran before the period was over"
    assert noon.plan(*noon.period(-2, -1)) == [("skip", "done in run 1"), ("run", reason)]
    assert reason in noon.line.run(*noon.period(-2, -1), "--plan", env=noon.zone).out
    assert noon.plan(*noon.period(-1), "--reprocess", "failed") == [("run", reason)]
    assert noon.plan(*noon.period(-1), "--reprocess", "all") == [("run", "again, " + reason)]
    assert noon.run(*noon.period(-2, -1)) == [f"a {noon.day(-1)}", f"b {noon.day(-1)}"]
    assert "1 period done now, 1 left alone" in noon.ended.err and "not over" not in noon.ended.err
    assert noon.run(*noon.period(-2, -1)) == []


@pytest.mark.parametrize("hours, action", [(11, "skip"), (13, "run")])
def test_a_day_ends_at_midnight_in_local_time(noon, hours, action):
    noon.run(*noon.period(-1))
    noon.let_pass(hours)
    assert noon.plan(*noon.period(-1))[0][0] == action


@pytest.mark.parametrize("step", ["week", "month"])
def test_a_week_and_a_month_are_over_after_their_last_day(noon, step):
    noon.run(*noon.period(-6, -1), "--step", step)  # a month is cut off by the span
    noon.let_pass(13)
    last = noon.plan(*noon.period(-6, -1), "--step", step)[-1]
    assert last[0] == "run" and last[1].endswith("which ran before the period was over")
    noon.run(*noon.period(-6, -1), "--step", step)
    assert noon.run(*noon.period(-6, -1), "--step", step) == []


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="zones by name")
@pytest.mark.parametrize("zone, at, end", [
    # summer time began and ended at midnight, so that the day began at 01:00, or 23:00 came twice
    ("America/Sao_Paulo", "2018-11-04T03:00:00+00:00", "2018-11-04"),
    ("America/Sao_Paulo", "2019-02-17T03:00:00+00:00", "2019-02-17"),
    ("America/Havana", "2024-11-03T04:00:00+00:00", "2024-11-03"),  # where 00:00 came twice
    ("Europe/Berlin", "2024-03-30T23:00:00+00:00", "2024-03-31"),
    ("Europe/Berlin", "2024-03-31T22:00:00+00:00", "2024-04-01"),
    ("Asia/Kathmandu", "2024-01-31T18:15:00+00:00", "2024-02-01"),
])
def test_a_day_ends_when_it_ends_where_clocks_are_changed(line, zone, at, end):
    if not any(os.path.exists(os.path.join(folder, zone)) for folder in zoneinfo.TZPATH):
        pytest.skip("this system has no such zone")
    last = str(datetime.date.fromisoformat(end) - datetime.timedelta(1))
    noon = Noon(line)
    noon.zone, words = {"TZ": zone}, ("--backfill", f"{last}..{last}")
    noon.run(*words)
    moment = datetime.datetime.fromisoformat(at).timestamp()
    file, = line.folder.glob("**/history.db")
    for before_s, action in ((1, "run"), (0, "skip")):
        with contextlib.closing(sqlite3.connect(file)) as conn, conn:
            conn.execute("UPDATE runs SET started_at = ?", (moment - before_s,))
        assert noon.plan(*words)[0][0] == action


def test_what_was_cut_off_before_its_period_was_over_is_run_anew_and_not_resumed(noon):
    noon.line.break_at(f"b {noon.day(-1)}")
    noon.run(*noon.period(-1), code=1)
    noon.let_pass(13)
    noon.line.break_at()
    assert noon.plan(*noon.period(-1)) == [("skip", "failed in run 1; see --reprocess")]
    assert noon.plan(*noon.period(-1), "--reprocess", "failed") == [
        ("run", "failed in run 1, which ran before the period was over")]
    file, = noon.line.folder.glob("**/history.db")
    with contextlib.closing(sqlite3.connect(file)) as conn, conn:
        conn.execute("UPDATE runs SET status = 'interrupted'")
    assert noon.plan(*noon.period(-1)) == [
        ("run", "interrupted in run 1, which ran before the period was over")]
    assert noon.run(*noon.period(-1)) == [f"a {noon.day(-1)}", f"b {noon.day(-1)}"]
    assert noon.plan(*noon.period(-1)) == [("skip", "done in run 2")]


@pytest.mark.parametrize("mend", [("--resume",), ("--mark-done", "b")])
def test_what_goes_on_with_a_run_from_before_the_end_of_its_period_is_not_done(noon, mend):
    noon.line.break_at(f"b {noon.day(-1)}")
    noon.run(*noon.period(-1), code=1)
    noon.let_pass(13)
    noon.line.break_at()
    noon.run(*mend)
    assert noon.plan(*noon.period(-1)) == [
        ("run", "done in run 2, which ran before the period was over")]
    assert noon.run(*noon.period(-1)) == [f"a {noon.day(-1)}", f"b {noon.day(-1)}"]
    assert noon.run(*noon.period(-1)) == []


def test_a_cached_tool_is_run_again_when_its_period_is_over(noon):
    head = HEAD.replace("'module': 'b'", "'module': 'b', 'cache': True").replace(
        "'a': 'a'", "'a': {'module': 'a', 'cache': True, 'needs': []}")
    noon.line.pipeline(head + SQLITE)
    noon.run(*noon.period(-2, -1))
    noon.let_pass(13, 2)
    assert noon.run(*noon.period(-1)) == [f"a {noon.day(-1)}", f"b {noon.day(-1)}"]
    assert noon.run(*noon.period(-1), "--reprocess", "all") == []


def test_a_period_that_has_not_begun_is_refused_with_the_last_day_that_can_be_given(noon):
    for look in ([], ["--plan"], ["--plan", "--json"], ["--reverse"]):
        assert noon.run(*noon.period(-1, 2), *look, code=2) == []
        assert noon.ended.err == (
            f"--backfill: '{noon.day(-1)}..{noon.day(2)}' reaches into the future: the period "
            f"from {noon.day(1)} to {noon.day(2)} has not begun.\n  Write {noon.day(-1)}.."
            f"{noon.day(0)}. The last day that can be given is {noon.day(0)}; days end in local "
            "time.\n")
    assert noon.run(*noon.period(-1, 0)) != []


@pytest.mark.parametrize("step", ["day", "week", "month"])
def test_a_span_that_is_all_future_is_refused_with_today(noon, step):
    for first, last in ((1, 1), (1, 40), (90000, 90000)):
        assert noon.run(*noon.period(first, last), "--step", step, code=2) == []
        assert noon.ended.err.endswith(
            f" has not begun.\n  The last day that can be given is {noon.day(0)}; days end in "
            "local time.\n")


def test_a_week_that_has_begun_may_end_in_the_future_and_the_next_may_not(noon):
    week = ("--step", "week")
    assert noon.run(*noon.period(0, 7), *week, code=2) == []
    assert f"The last day that can be given is {noon.day(6)}; " in noon.ended.err
    assert noon.run(*noon.period(0, 6), *week) == [f"a {noon.day(0)}", f"b {noon.day(0)}"]
    assert noon.plan(*noon.period(0, 6), *week)[0][0] == "run"


@pytest.mark.parametrize("behind", [-14, 12])
def test_today_is_a_day_of_the_zone(noon, behind):
    now = datetime.datetime.now(datetime.timezone.utc)
    if (now.hour - behind) % 24 == 23:
        behind += 1  # there, midnight might come in between
    noon.zone = {"TZ": f"TEST{behind}"}  # where one day is over, or the next one has begun
    noon.today = (now - datetime.timedelta(hours=behind)).date()
    noon.run(*noon.period(0))
    noon.run(*noon.period(1), code=2)


# --- what is refused ---


@pytest.mark.parametrize("words, problem", [
    (("--backfill", "2024-01-01"), "is no span of days"),
    (("--step", "week"), "--step goes with --backfill"),
    (("--reverse",), "--reverse goes with --backfill"),
    (("--reprocess", "all"), "--reprocess goes with --backfill"),
    ((*THREE, "--step", "year"), "--step"),
    ((*THREE, "--resume"), "does not go with --resume"),
    ((*THREE, "--no-history"), "does not go with --no-history"),
    ((*THREE, "nosuch"), "nosuch"),
])
def test_a_backfill_that_says_nothing_is_refused_before_anything_has_run(line, words, problem):
    ended = line.run(*words)
    assert ended.code == 2 and problem in ended.err
    assert line.ran() == []


def test_a_backfill_of_tools_that_know_no_period_is_refused(line):
    line.tool("a", "def run(conn): pass").tool("b", "def run(): pass")
    ended = line.run(*THREE)
    assert ended.code == 2
    assert "no tool of this plan takes period_start or period_end" in ended.err


def test_a_tool_that_must_have_a_period_is_not_run_without_one(line):
    line.tool("a", "def run(period_start): pass")
    ended = line.run()
    assert ended.code == 2
    assert "asks for 'period_start', which only --backfill gives" in ended.err
    assert line.run(*THREE).code == 0


def test_a_period_that_is_run_again_tries_again_what_was_given_up_in_it_alone(quick):
    quick.pipeline("TOOL_MAP = {'a': 'a'}\nSTAGES = {}\n" + SQLITE).tool("a", """
        import pathlib
        def items(period_start=None): return [f"{period_start} {name}" for name in "xy"]
        def run(item):
            if pathlib.Path("broken").exists() and item.endswith("y"):
                raise ValueError("broken")
    """)
    (quick.folder / "broken").touch()
    days = ("--backfill", "2024-01-01..2024-01-02")
    assert quick.run(*days).code == 1
    (quick.folder / "broken").unlink()
    ended = quick.run(*days[:1], "2024-01-02..2024-01-02", "--reprocess", "failed")
    assert ended.code == 0, ended
    assert quick.query("SELECT item, status FROM orchestrator_items ORDER BY item") == [
        ("2024-01-01 x", "success"), ("2024-01-01 y", "failed"),
        ("2024-01-02 x", "success"), ("2024-01-02 y", "success")]


# --- what --status says of one ---

def status_of(line):
    """Return what --status shows of each tool: its status, the run and what there is to say."""
    shown = json.loads(line.run("--status", "--json").out)["tools"]
    return {each["tool"]: (each["status"], each["run_id"], each["error"], each["reason"])
            for each in shown}


def test_the_status_of_a_tool_is_that_of_a_period_that_failed(line):
    line.break_at("a 2024-02-29")
    line.run(*THREE)
    assert status_of(line) == {
        "a": ("failed", "2", "ValueError: broken", "in the period from 2024-02-29"),
        "b": ("skipped", "2", "", "in the period from 2024-02-29; needs a, which failed")}
    assert "ValueError: broken, in the period from 2024-02-29" in line.run("--status").out
    line.break_at()
    line.run("b", *THREE)  # another backfill, of another target
    assert [each[:2] for each in status_of(line).values()] == [("failed", "2"), ("success", "6")]
    line.run(*THREE, "--reprocess", "failed")
    assert {each[0] for each in status_of(line).values()} == {"success"}
    line.run("a")
    assert status_of(line)["a"][0] == "success"
