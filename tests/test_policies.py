"""What a failure means for the others: skip, stop, continue, always, and trying again.

Every rule holds alike for a run one after another and for one in worker processes.
"""
import signal

import pytest
from conftest import summary

from orchestrator import (
    Clock, History, Session, UserError, load_pipeline, make_plan, run_pipeline, run_plan,
)


@pytest.fixture
def sandbox(quick):
    """Run the pipelines of these tests in forks, which is quicker."""
    return quick

MODULES = {
    "works": "def run(context): return context.tool",
    "fails": "def run(context): raise ValueError('no ' + context.tool)",
    "exits": "import sys\ndef run(): sys.exit(5)",
    "rejects": "def run(): return 1\ndef check(): raise ValueError('not good')",
    # fails as often as "often" says, and returns the attempt that did not
    "flaky": """
        def run(context, often=2):
            if context.attempt <= often:
                raise ValueError(f"try {context.attempt}")
            return context.attempt
    """,
    "sees": "def run(context): return {tool: each for tool, each in context.results.items()}",
}
both = pytest.mark.parametrize("jobs", [1, 3])


def rows(text, **options):
    """Return a TOOL_MAP from lines like `c: fails, needs a b`; without "needs", all before it."""
    tools = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, rest = line.partition(":")
        module, comma, needs = rest.partition(",")
        tools[name] = {"module": module.strip(), **options.get(name, {})}
        if comma:
            tools[name]["needs"] = needs.split()[1:]
    return tools


@pytest.fixture
def run(modules):
    """Return run(text, jobs, ...) -> RunResult; `run.events` are those of the last run."""
    modules(**MODULES)

    def call(text, jobs, options=None, **more):
        call.events = []
        return run_pipeline([], rows(text, **(options or {})), jobs=jobs,
                            on_event=call.events.append, **more)

    return call


def statuses(result):
    """Return the statuses of a run's tools in few letters: `a success, b failed`."""
    return ", ".join(f"{tool} {each.status}" for tool, each in result.outcomes.items())


def reasons(result):
    """Return the reasons of the tools that were skipped."""
    return {tool: result.outcomes[tool].reason for tool in result.skipped}


# --- skip ---

DIAMOND = """
    a: works, needs
    b: {b}, needs a
    c: {c}, needs a
    d: works, needs b c
    e: works, needs d
    f: works, needs
"""


@both
def test_what_needs_a_failed_tool_is_skipped_and_what_does_not_goes_on(run, jobs):
    """a - B - d - e    f
        \\ c /
    """
    result = run(DIAMOND.format(b="fails", c="works"), jobs)

    assert statuses(result) \
        == "a success, b failed, c success, d skipped, e skipped, f success"
    assert (result.status, result.failed, result.skipped) == ("failed", ["b"], ["d", "e"])


@both
def test_a_skipped_tool_names_the_root_cause_and_not_its_neighbour(run, jobs):
    """A - b - c - d, through three that were skipped"""
    result = run("a: fails, needs\nb: works, needs a\nc: works, needs b\nd: works, needs c", jobs)

    assert reasons(result) == dict.fromkeys("bcd", "needs a, which failed")


@both
def test_of_two_root_causes_a_tool_names_the_first_of_its_needs(run, jobs):
    """a - B - d - e    f
        \\ C /
    """
    result = run(DIAMOND.format(b="fails", c="fails"), jobs)

    assert reasons(result) == dict.fromkeys("de", "needs b, which failed")


@both
def test_every_error_is_listed_and_not_only_the_first(run, jobs):
    result = run(DIAMOND.format(b="fails", c="exits") + "g: rejects, needs f", jobs)

    assert result.errors == {"b": "ValueError: no b", "c": "sys.exit(5)",
                             "g": "ValueError: not good"}


@both
def test_each_skipped_tool_names_its_own_root_cause(run, jobs):
    """A - b     C - d     b, d - e"""
    result = run("""
        a: fails, needs
        b: works, needs a
        c: fails, needs
        d: works, needs c
        e: works, needs d b
    """, jobs)

    assert reasons(result) == {"b": "needs a, which failed", "d": "needs c, which failed",
                               "e": "needs c, which failed"}


@both
def test_a_tool_that_declares_nothing_is_skipped_if_any_before_it_failed(run, jobs):
    """a   B   then c(*), which e needs   d"""
    result = run("a: works, needs\nb: fails, needs\nc: works\nd: works, needs\ne: works, needs c",
                 jobs)

    assert statuses(result) == "a success, b failed, c skipped, d success, e skipped"
    assert reasons(result) == dict.fromkeys("ce", "needs b, which failed")


@both
def test_a_tool_that_declares_nothing_does_not_mind_what_fails_behind_it(run, jobs):
    """a then s(*)    B, which takes longest and so may come first    then z(*)"""
    text = "a: works, needs\ns: works\nb: fails, needs\nz: works"
    options = {name: {"uses": {"one": 1}, "estimate": 1000 if name == "b" else 1}
               for name in "asbz"}
    result = run(text, jobs, options, limits={"one": 1})

    assert statuses(result) == "a success, s success, b failed, z skipped"


@both
def test_in_a_plain_list_all_after_a_failure_is_skipped_with_the_same_cause(run, jobs):
    result = run("a: works\nb: fails\nc: works\nd: fails\ne: works", jobs)

    assert statuses(result) == "a success, b failed, c skipped, d skipped, e skipped"
    assert reasons(result) == dict.fromkeys("cde", "needs b, which failed")


@both
def test_a_need_that_is_not_in_the_plan_hinders_nobody(run, jobs):
    result = run("a: fails, needs\nb: works, needs a", jobs, exclude=["a"])

    assert statuses(result) == "b success"


@both
def test_every_tool_that_started_ends_and_a_skipped_one_never_starts(run, jobs):
    result = run(DIAMOND.format(b="fails", c="works"), jobs)

    kinds = [(event.kind, event.tool) for event in run.events]
    assert kinds[0][0] == "run_started" and kinds[-1][0] == "run_ended"
    for tool in "abcdef":
        mine = [kind for kind, name in kinds if name == tool]
        assert mine == ["tool_started"] * (tool not in result.skipped) + ["tool_ended"]


# --- stop ---

STOPS = """
    a: works, needs
    b: fails, needs a
    c: works, needs b
    d: works, needs a b
    e: works
    f: works, needs e
"""


@both
def test_a_failure_that_stops_lets_nothing_start_any_more(run, jobs):
    """a - B - c    and e(*) - f
        \\ d /
    """
    result = run(STOPS, jobs, {"b": {"on_failure": "stop"}})

    assert statuses(result) \
        == "a success, b failed, c skipped, d skipped, e skipped, f skipped"
    assert reasons(result) == dict.fromkeys("cdef", "needs b, which failed")


# Under this limit one runs at a time, however many jobs; the one that takes longest first.
ONE = {"limits": {"one": 1}}


def one_at_a_time(text, **options):
    """Return options by which the tools of a text run one at a time, the first line's first."""
    names = [line.split(":")[0].strip() for line in text.splitlines() if line.strip()]
    return {name: {"uses": {"one": 1}, "estimate": 10 ** (len(names) - i), **options.get(name, {})}
            for i, name in enumerate(names)}


APART = """
    a: fails, needs
    b: works, needs
    c: works, needs b
    d: works, needs a
    e: works, needs c d
"""


@both
@pytest.mark.parametrize("how, why", [("option", 'a failed and says "stop"'),
                                      ("flag", "a failed and --fail-fast was given")])
def test_what_does_not_need_the_tool_that_stopped_the_run_does_not_say_so(run, jobs, how, why):
    """A - d - e
       b - c /
    """
    options = {"a": {"on_failure": "stop"}} if how == "option" else {}
    result = run(APART, jobs, one_at_a_time(APART, **options), fail_fast=how == "flag", **ONE)

    assert statuses(result) == "a failed, b skipped, c skipped, d skipped, e skipped"
    said = reasons(result)
    assert said["b"] == said["c"] == "not started, because " + why
    assert said["d"] == said["e"] == "needs a, which failed"


@both
def test_fail_fast_stops_whatever_the_tool_says(run, jobs):
    text = "a: fails, needs\nb: works, needs\nc: works, needs a"
    options = one_at_a_time(text, a={"on_failure": "continue"})

    assert statuses(run(text, jobs, options, **ONE)) == "a failed, b success, c success"
    assert statuses(run(text, jobs, options, fail_fast=True, **ONE)) \
        == "a failed, b skipped, c skipped"


@both
def test_without_a_failure_fail_fast_changes_nothing(run, jobs):
    result = run(DIAMOND.format(b="works", c="works"), jobs, fail_fast=True)

    assert (result.status, len(result.succeeded)) == ("success", 6)


def test_what_runs_when_the_run_is_stopped_may_end_and_counts(run, modules):
    """A    b - c, where b runs until A has failed"""
    folder = modules(waits="""
        import pathlib, time
        def run():
            while not pathlib.Path(__file__).with_name("go").exists():
                time.sleep(0.01)
            return 7
    """)
    events = []

    def on_event(event):
        events.append((event.kind, event.tool))
        if event.kind == "tool_ended" and event.tool == "a":
            (folder / "go").touch()

    result = run_pipeline([], rows("b: waits, needs\na: fails, needs\nc: works, needs b"),
                          jobs=2, fail_fast=True, on_event=on_event)

    assert statuses(result) == "b success, a failed, c skipped"
    assert dict(result.results) == {"b": 7}
    assert events.index(("tool_ended", "a")) < events.index(("tool_ended", "b"))


# --- continue ---

@both
def test_those_who_need_a_tool_that_says_continue_go_on_and_the_run_has_failed(run, jobs):
    """a - B - d - e    f
        \\ c /
    """
    result = run(DIAMOND.format(b="fails", c="works"), jobs, {"b": {"on_failure": "continue"}})

    assert statuses(result) \
        == "a success, b failed, c success, d success, e success, f success"
    assert (result.status, result.errors) == ("failed", {"b": "ValueError: no b"})


@both
def test_a_tool_that_goes_on_has_no_result_of_the_one_that_failed(run, jobs):
    """A - c, b - c"""
    result = run("a: fails, needs\nb: works, needs\nc: sees, needs a b", jobs,
                 {"a": {"on_failure": "continue"}})

    assert result.results["c"] == {"b": "b"}


@both
def test_a_tool_that_declares_nothing_goes_on_after_one_that_says_continue(run, jobs):
    result = run("a: fails\nb: works\nc: fails\nd: works", jobs, {"a": {"on_failure": "continue"}})

    assert statuses(result) == "a failed, b success, c failed, d skipped"
    assert reasons(result) == {"d": "needs c, which failed"}


@both
def test_to_continue_is_said_of_its_own_failure_and_not_of_those_before_it(run, jobs):
    """A - b - c, where only b says continue"""
    result = run("a: fails, needs\nb: works, needs a\nc: works, needs b", jobs,
                 {"b": {"on_failure": "continue"}})

    assert statuses(result) == "a failed, b skipped, c skipped"
    assert reasons(result) == dict.fromkeys("bc", "needs a, which failed")


# --- always ---

@both
@pytest.mark.parametrize("b, wanted", [
    ("works", "a success, b success, c success, z success"),
    ("fails", "a success, b failed, c skipped, z success"),
])
def test_a_tool_that_runs_always_runs_whatever_became_of_what_it_needs(run, jobs, b, wanted):
    """a - b - c - z"""
    result = run(f"a: works, needs\nb: {b}, needs a\nc: works, needs b\nz: works, needs c", jobs,
                 {"z": {"when": "always"}})

    assert statuses(result) == wanted


@both
def test_a_tool_that_runs_always_waits_for_all_that_it_needs(run, jobs):
    """A - b - z, c - d - z"""
    result = run("a: fails, needs\nb: works, needs a\nc: works, needs\nd: works, needs c\n"
                 "z: works, needs b d", jobs, {"z": {"when": "always"}})

    ended = [event.tool for event in run.events if event.kind == "tool_ended"]
    assert ended[-1] == "z"
    assert statuses(result) == "a failed, b skipped, c success, d success, z success"


@both
def test_a_tool_that_runs_always_and_declares_nothing_runs_after_all_before_it(run, jobs):
    result = run("a: works\nb: fails\nc: works\nz: works\nd: works, needs c", jobs,
                 {"z": {"when": "always"}})

    ended = [event.tool for event in run.events if event.kind == "tool_ended"]
    assert ended.index("z") > max(ended.index(tool) for tool in "abc")
    assert statuses(result) == "a success, b failed, c skipped, z success, d skipped"


@both
def test_a_tool_that_runs_always_is_run_in_a_run_that_was_stopped(run, jobs):
    """A - b - z    y"""
    text = "a: fails, needs\nb: works, needs a\nz: works, needs b\ny: works, needs"
    options = one_at_a_time(text, z={"when": "always"}, a={"on_failure": "stop"})
    result = run(text, jobs, options, **ONE)

    assert statuses(result) == "a failed, b skipped, z success, y skipped"


@both
def test_what_needs_a_tool_that_always_runs_depends_on_that_tool_alone(run, jobs):
    """A - z - b    C - y - d, y fails too"""
    result = run("""
        a: fails, needs
        z: works, needs a
        b: works, needs z
        c: fails, needs
        y: fails, needs c
        d: works, needs y
    """, jobs, {"z": {"when": "always"}, "y": {"when": "always"}})

    assert statuses(result) == "a failed, z success, b success, c failed, y failed, d skipped"
    assert reasons(result) == {"d": "needs y, which failed"}


# --- trying again ---

class StillClock:
    """A clock that moves only when somebody sleeps; `slept` has how long each time."""

    def __init__(self, on_sleep=lambda: None):
        self.now_s, self.slept, self.on_sleep = 1000.0, [], on_sleep
        self.clock = Clock(lambda: self.now_s, lambda: self.now_s, self.sleep)

    def sleep(self, seconds):
        assert seconds >= 0
        self.now_s += seconds
        self.slept.append(seconds)
        self.on_sleep()


@pytest.fixture
def retry(modules):
    """Return retry(text, jobs, options, ...) -> (RunResult, [(second, kind, tool)], clock)."""
    modules(**MODULES)

    def call(text, jobs, options, on_sleep=lambda: None, arguments=None, **more):
        pipeline = load_pipeline(rows(text, **options), limits=more.pop("limits", None))
        clock, told = StillClock(on_sleep), []
        result = run_plan(Session(
            pipeline, make_plan(pipeline, jobs=jobs), arguments or {}, History(),
            clock=clock.clock, on_event=lambda event: told.append(
                (clock.now_s - 1000.0, event.kind, event.tool)), **more))
        return result, told, clock

    return call


def moments(told, tool, kind="tool_started"):
    """Return when something was told of a tool, in seconds after the start."""
    return [pytest.approx(at_s) for at_s, each, name in told if (each, name) == (kind, tool)]


@both
def test_a_failed_tool_is_tried_again_after_its_delay_and_the_run_succeeds(retry, jobs):
    result, told, clock = retry("a: flaky, needs\nb: sees, needs a", jobs, {"a": {"retries": 2}})

    assert (result.status, result.outcomes["a"].attempts) == ("success", 3)
    assert dict(result.results) == {"a": 3, "b": {"a": 3}}
    assert moments(told, "a") == [0, 30, 90]
    assert [kind for _, kind, tool in told if tool == "a"] == [
        "tool_started", "tool_retried", "tool_started", "tool_retried", "tool_started",
        "tool_ended"]


@both
def test_there_is_no_sleep_after_the_last_attempt(retry, jobs):
    result, told, clock = retry("a: fails, needs", jobs, {"a": {"retries": 2}})

    assert (result.errors, result.outcomes["a"].attempts) == ({"a": "ValueError: no a"}, 3)
    assert moments(told, "a") == [0, 30, 90]
    assert moments(told, "a", "tool_ended") == [90]
    assert sum(clock.slept) == pytest.approx(90)


@both
def test_without_retries_nothing_is_tried_again(retry, jobs):
    result, told, clock = retry("a: fails, needs", jobs, {})

    assert (result.outcomes["a"].attempts, clock.slept) == (1, [])
    assert "tool_retried" not in [kind for _, kind, _ in told]


@both
@pytest.mark.parametrize("options, wanted", [
    ({"retry_delay": "5s", "retry_factor": 3}, [0, 5, 20, 65]),
    ({"retry_delay": 10, "retry_factor": 1}, [0, 10, 20, 30]),
    ({"retry_delay": 40, "retry_max_delay": "1m"}, [0, 40, 100, 160]),
    ({"retry_delay": 0}, [0, 0, 0, 0]),
])
def test_the_moments_of_the_tries_are_those_of_the_options(retry, jobs, options, wanted):
    _, told, clock = retry("a: fails, needs", jobs, {"a": {"retries": 3, **options}})

    assert moments(told, "a") == wanted


@both
def test_jitter_shortens_a_delay_within_its_bounds(retry, jobs):
    options = {"retries": 9, "retry_delay": 100, "retry_factor": 1, "retry_jitter": 0.5}
    _, told, clock = retry("a: fails, needs", jobs, {"a": options})

    at_s = [at for at, kind, _ in told if kind == "tool_started"]
    waits_s = [after - before for before, after in zip(at_s, at_s[1:])]
    assert all(49.9 <= wait_s <= 100.1 for wait_s in waits_s)
    assert len(set(waits_s)) > 5


@both
def test_a_tool_that_rejects_its_own_work_is_tried_again_like_any_other(retry, jobs):
    result, _, _ = retry("a: rejects, needs\nb: exits, needs", jobs,
                         {"a": {"retries": 1}, "b": {"retries": 2}})

    assert {tool: each.attempts for tool, each in result.outcomes.items()} == {"a": 2, "b": 3}


@both
def test_others_go_on_while_a_tool_waits_for_its_next_try(retry, jobs):
    """A - d    b - c"""
    result, told, _ = retry("""
        a: flaky, needs
        b: works, needs
        c: works, needs b
        d: works, needs a
    """, jobs, {"a": {"retries": 2}})

    assert result.status == "success"
    assert moments(told, "b") + moments(told, "c") == [0, 0]
    assert moments(told, "c", "tool_ended") == [0]
    assert moments(told, "d") == [90]


@both
def test_what_a_tool_uses_is_free_while_it_waits(retry, jobs):
    text = "a: flaky, needs\nb: works, needs"
    options = one_at_a_time(text, a={"retries": 2})
    _, told, _ = retry(text, jobs, options, **ONE)

    assert (moments(told, "a"), moments(told, "b")) == ([0, 30, 90], [0])


@both
def test_tools_that_wait_come_again_each_in_its_own_time(retry, jobs):
    result, told, _ = retry("a: flaky, needs\nb: flaky, needs", jobs, {
        "a": {"retries": 2, "retry_delay": 10}, "b": {"retries": 2, "retry_delay": 7}})

    assert (moments(told, "a"), moments(told, "b")) == ([0, 10, 30], [0, 7, 21])


@both
def test_a_tool_is_skipped_only_when_the_last_try_of_its_need_has_failed(retry, jobs):
    result, told, _ = retry("a: fails, needs\nb: works, needs a", jobs, {"a": {"retries": 1}})

    assert reasons(result) == {"b": "needs a, which failed"}
    assert moments(told, "b", "tool_ended") == [30]


@both
def test_a_failure_stops_the_run_only_after_its_last_try(retry, jobs):
    text = "a: fails, needs\nb: works, needs"
    options = one_at_a_time(text, a={"retries": 1, "on_failure": "stop"})
    result, told, _ = retry(text, jobs, options, **ONE)

    assert statuses(result) == "a failed, b success"


@both
def test_in_a_run_that_was_stopped_nothing_is_tried_again(retry, jobs):
    """A waits an hour for its next try when B stops the run."""
    text = "a: fails, needs\nb: fails, needs"
    options = one_at_a_time(text, a={"retries": 1, "retry_delay": "1h"}, b={"on_failure": "stop"})
    result, told, clock = retry(text, jobs, options, **ONE)

    assert moments(told, "a") == [0]
    assert statuses(result) == "a failed, b failed"
    assert result.errors == {"a": "ValueError: no a", "b": "ValueError: no b"}
    assert sum(clock.slept) == 0


@both
def test_a_try_that_is_due_when_the_run_is_stopped_is_not_made(retry, jobs):
    """Both fail and come again at the same moment; A stops the run with its second try."""
    text = "a: fails, needs\nb: fails, needs"
    options = one_at_a_time(text, a={"retries": 1, "on_failure": "stop"}, b={"retries": 1})
    result, told, _ = retry(text, jobs, options, **ONE)

    assert (moments(told, "a"), moments(told, "b")) == ([0, 30], [0])
    assert result.errors == {"a": "ValueError: no a", "b": "ValueError: no b"}


def test_a_run_may_be_stopped_while_more_wait_for_another_try_than_python_recurses(retry):
    names = [f"t{i}" for i in range(1200)]
    options = dict.fromkeys(names, {"retries": 1, "retry_delay": "1h"})
    result, _, clock = retry("\n".join(f"{name}: fails, needs" for name in [*names, "last"]), 1,
                             {**options, "last": {"on_failure": "stop"}})

    assert result.failed == [*names, "last"]
    assert sum(clock.slept) == 0


@both
def test_a_clean_up_waits_for_the_last_try(retry, jobs):
    result, told, _ = retry("a: fails, needs\nz: works, needs a", jobs,
                            {"a": {"retries": 1}, "z": {"when": "always"}})

    assert moments(told, "z") == [30]


@both
def test_a_try_that_is_still_to_come_is_told_with_its_error_and_when(run, jobs):
    run("a: flaky, needs", jobs, {"a": {"retries": 2, "retry_delay": 0.01, "retry_factor": 1}})

    told = [event.outcome for event in run.events if event.kind == "tool_retried"]
    assert [(each.status, each.error, each.reason) for each in told] == [
        ("failed", "ValueError: try 1", "try 1 of 3; again in 0.01 s"),
        ("failed", "ValueError: try 2", "try 2 of 3; again in 0.01 s")]
    assert all("in run" in each.traceback for each in told)


@both
def test_waiting_for_another_try_can_be_interrupted(retry, jobs):
    result, told, clock = retry(
        "a: fails, needs\nb: works, needs a\nc: works, needs", jobs, {"a": {"retries": 9}},
        on_sleep=lambda: signal.raise_signal(signal.SIGINT))

    assert len(clock.slept) == 1 and clock.slept[0] < 1
    assert (result.status, result.signal) == ("interrupted", signal.SIGINT)
    assert statuses(result) == "a interrupted, b pending, c success"
    assert result.outcomes["a"].attempts == 1


@both
def test_an_interrupt_is_not_tried_again(modules, retry, jobs):
    modules(gives_up="def run(): raise KeyboardInterrupt")
    result, told, clock = retry("a: gives_up, needs\nb: works, needs a", jobs,
                                {"a": {"retries": 9}})

    assert statuses(result) == "a interrupted, b pending"
    assert (moments(told, "a"), clock.slept) == ([0], [])


# --- what is not tried again ---

@both
@pytest.mark.parametrize("source, says", [
    ("import no_such_module\ndef run(): pass", "no_such_module"), ("def run(:", "SyntaxError"),
    ("x = 1", "no function run"), ("def run(conn, unheard_of): pass", "unheard_of"),
    ("def run(): pass\nraise ValueError('at import')", "at import"),
    ("import sys; sys.exit(1)\ndef run(): pass", "sys.exit"),
])
def test_a_module_that_can_not_be_called_is_refused_before_anything_ran(
        modules, retry, jobs, source, says):
    folder = modules(wrong=source, marks="""
        import pathlib
        def run(): pathlib.Path(__file__).with_name("ran").touch()
    """)
    with pytest.raises(UserError, match=says):
        retry("a: marks, needs\nb: wrong, needs", jobs, {"b": {"retries": 9}})

    assert not (folder / "ran").exists()


@pytest.mark.parametrize("jobs, options", [(2, {}), (1, {"isolate": True})])
def test_a_module_that_only_a_worker_can_not_import_is_not_tried_again(
        modules, retry, jobs, options):
    modules(picky="""
        import os, pathlib
        pid = pathlib.Path(__file__).with_name("pid")
        if pid.exists() and pid.read_text() != str(os.getpid()):
            raise ImportError("not in this process")
        pid.write_text(str(os.getpid()))
        def run(): pass
    """)
    result, told, clock = retry("a: picky, needs\nb: works, needs a", jobs,
                                {"a": {"retries": 3, **options}})

    assert statuses(result) == "a failed, b skipped"
    assert "not in this process" in result.errors["a"]
    assert (result.outcomes["a"].attempts, clock.slept) == (1, [])


# --- the order of a run one after another ---

def test_a_run_one_after_another_goes_in_the_order_of_its_plan(run):
    """b - c - d    a; the way from b is the longest, and e takes long, but a was named first."""
    result = run("a: works, needs\nb: works, needs\nc: works, needs b\nd: works, needs c\n"
                 "e: works, needs", 1, {"e": {"estimate": 1000}})

    started = [event.tool for event in run.events if event.kind == "tool_started"]
    assert started == list(result.outcomes) == list("abcde")


def test_a_tool_that_declares_nothing_sees_the_results_of_all_before_it_and_of_no_other(run):
    """a, b(*), c, of which c may run before b and is no business of b's"""
    for jobs in (1, 3):
        result = run("a: works, needs\nb: sees\nc: works, needs", jobs, {"c": {"estimate": 1000}})
        assert result.results["b"] == {"a": "a"}


# --- at the command line ---

@both
def test_the_command_line_lists_every_error_and_every_root_cause(sandbox, jobs):
    """A - b    C    d"""
    sandbox.pipeline('''
        TOOL_MAP = {
            "a": {"module": "fails", "needs": []}, "b": {"module": "works", "needs": ["a"]},
            "c": {"module": "fails", "needs": []}, "d": {"module": "works", "needs": []},
        }
    ''')
    for name in ("fails", "works"):
        sandbox.tool(name, MODULES[name])

    ended = sandbox.run("--jobs", str(jobs))

    rows = summary(ended.err)
    assert ended.code == 1, ended
    assert "ValueError: no a" in rows["a"] and "ValueError: no c" in rows["c"]
    assert "needs a, which failed" in rows["b"] and "success" in rows["d"]
    assert ended.err.count("Traceback (most recent call last)") == 2


@pytest.mark.parametrize("flag", ["-x", "--fail-fast"])
def test_the_flag_to_stop_at_the_first_failure_has_two_names(sandbox, flag):
    sandbox.pipeline('''
        TOOL_MAP = {"a": {"module": "fails", "needs": []}, "b": {"module": "works", "needs": []}}
    ''')
    for name in ("fails", "works"):
        sandbox.tool(name, MODULES[name])

    assert "success" in summary(sandbox.run().err)["b"]
    assert "--fail-fast was given" in summary(sandbox.run(flag).err)["b"]
