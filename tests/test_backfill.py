"""A backfill: a plan run once per period, each period recorded, resumable and told."""
import json
import signal

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
    assert "3 left alone, 1 failed: 2024-02-29" in ended.err
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
