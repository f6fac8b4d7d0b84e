"""What a resume goes on with, what it takes for done, and when a cached tool runs again."""
import contextlib
import json
import os
import signal
import sqlite3
import sys

import pytest
from conftest import SQLITE, wait_until

from orchestrator import Settled, UserError, run_pipeline

# Each call is written down in the file `ran`; a tool named in the file `broken` fails.
TOOL = """
    import pathlib
    def run(context, **kwargs):
        with open("ran", "a") as file:
            file.write(context.tool + "\\n")
        broken = pathlib.Path("broken")
        if broken.exists() and context.tool in broken.read_text().split():
            raise ValueError(f"{context.tool} is broken")
        return {"tool": context.tool, "sees": sorted(context.results)}
"""
ALL = {"a": {"module": "m", "needs": []}, "b": {"module": "m", "needs": ["a"]},
       "c": {"module": "m", "needs": ["a"]}, "d": {"module": "m", "needs": ["b", "c"]}}
NO_DATABASE = """
def get_connection():
    return None

"""


class Line:
    """A pipeline whose tools can be broken and mended, and tell which of them ran."""

    def __init__(self, sandbox, tools, head=""):
        self.sandbox, self.folder = sandbox, sandbox.folder
        self.set(tools, head)
        sandbox.tool("m", TOOL)

    def set(self, tools, head=""):
        self.sandbox.pipeline(f"{NO_DATABASE}{head}\nTOOL_MAP = {tools!r}\n")

    def run(self, *words, broken="", code=None, env=None):
        """Return the tools that ran, in order; the process is in `ended`."""
        (self.folder / "broken").write_text(broken)
        (self.folder / "ran").write_text("")
        self.ended = self.sandbox.run(*words, env=env)
        expected = (1 if broken else 0) if code is None else code
        assert self.ended.code == expected, self.ended
        assert "Traceback" not in self.ended.err or expected == 1
        return self.sandbox.read("ran").split()

    def plan(self, *words):
        """Return {tool: (action, reason)} of --plan."""
        ended = self.sandbox.run("--plan", "--json", *words)
        assert ended.code == 0, ended
        return {step["tool"]: (step["action"], step["reason"])
                for step in json.loads(ended.out)["steps"]}

    def last(self):
        """Return the id of the last run."""
        return json.loads(self.sandbox.run("--history", "--json").out)["runs"][0]["run_id"]

    def history(self, run=None):
        """Return {tool: status} of a run, by default the last."""
        ended = self.sandbox.run("--history", *([run] if run else []), "--json")
        return {tool["tool"]: tool["status"]
                for tool in json.loads(ended.out)["runs"][0]["tools"]}


@pytest.fixture
def line(quick):
    """
        a - b - d
         \\- c -/
    """
    return Line(quick, ALL)


# --- what is done ---

def test_a_resume_runs_what_did_not_end_well_and_what_needs_it(line):
    assert line.run(broken="b") == ["a", "b", "c"]
    assert line.ended.err.endswith("orchestrator.py --resume\n")
    assert line.plan("--resume") == {
        "a": ("skip", "succeeded in run 1"), "b": ("run", "in TOOL_MAP"),
        "c": ("skip", "succeeded in run 1"), "d": ("run", "in TOOL_MAP")}
    assert line.run("--resume") == ["b", "d"]
    assert line.history() == {"a": "cached", "b": "success", "c": "cached", "d": "success"}


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_what_is_done_stays_done_over_a_chain_of_resumes(line, jobs):
    """A naive resume, which asks only the last run, would run `a` again in the third."""
    assert line.run("-j", jobs, broken="b c") == ["a", "b", "c"] or jobs == "3"
    assert set(line.run("--resume", "-j", jobs, broken="b")) == {"b", "c"}
    assert line.run("--resume", "-j", jobs, broken="d") == ["b", "d"]
    assert line.run("--resume", "-j", jobs) == ["d"]
    assert line.history() == {"a": "cached", "b": "cached", "c": "cached", "d": "success"}


def test_what_ran_after_a_failed_need_that_says_continue_is_not_done(line):
    line.set({**ALL, "b": {**ALL["b"], "on_failure": "continue"}})
    assert line.run(broken="b") == ["a", "b", "c", "d"]
    assert line.plan("--resume")["d"] == ("run", "in TOOL_MAP; again, because b will run")
    assert line.run("--resume") == ["b", "d"]


def test_a_plain_list_goes_on_at_the_tool_that_failed(line):
    line.set(dict.fromkeys("abcd", "m"))
    assert line.run(broken="c") == ["a", "b", "c"]
    assert line.run("--resume") == ["c", "d"]


def test_a_tool_that_always_runs_does_so_again_when_what_it_cleans_up_after_does(line):
    line.set({"a": "m", "b": "m", "clean": {"module": "m", "needs": ["b"], "when": "always"}})
    assert line.run(broken="b") == ["a", "b", "clean"]
    assert line.run("--resume") == ["b", "clean"]


@pytest.mark.parametrize("words, again", [
    (["b", "d", "--exclude", "a", "--force"], ["b", "d"]),
    (["--from", "b", "--force"], ["b", "d"]),
])
def test_a_resume_has_the_targets_exclusions_and_start_of_its_run(line, words, again):
    assert "b" in line.run(*words, broken="b", code=1)
    assert line.run("--resume", "--force") == again


def test_the_next_command_of_a_forced_run_is_one_that_works(line):
    assert line.run("b", "--force", broken="b") == ["b"]
    assert line.ended.err.rstrip().endswith("--resume --force")
    assert line.run("--resume", code=2) == []
    assert "b needs what is not in this plan: a, which has never succeeded." in line.ended.err
    assert line.run("--resume", "--force") == ["b"]


def test_what_changed_since_is_told_and_what_is_done_stays_done(line):
    tools = {**ALL, "b": {"module": "m2", "needs": ["a"]}}
    line.set(tools)
    line.sandbox.tool("m2", TOOL)
    line.run(broken="b")
    line.sandbox.tool("m2", TOOL + "    # mended\n")
    assert line.run("--resume", broken="d") == ["b", "d"]
    assert "Changed since run 1: m2.\n" in line.ended.err
    line.set({**tools, "e": "m"})
    line.sandbox.tool("m2", TOOL + "    # changed when it was done\n")
    assert line.run("--resume") == ["d", "e"]
    assert ("Changed since run 2: the tables, m2. Done before, and not run again: b."
            in line.ended.err)


def test_a_tool_that_is_gone_from_the_tables_is_a_mistake_and_no_crash(line):
    line.run("b", "c", "a", broken="c")
    line.set({"a": ALL["a"], "c": ALL["c"]})
    assert line.run("--resume", code=2) == []
    assert "There is no tool or stage 'b'" in line.ended.err


# --- what may stand beside --resume ---

FLAGS = """
def add_arguments(parser):
    import datetime
    parser.add_argument("--day", type=datetime.date.fromisoformat)
    parser.add_argument("--place", type=Path, default=Path("here"))
    parser.add_argument("--deep", action="store_true")
"""


@pytest.mark.parametrize("words, shown", [
    (["b"], "b"), (["b", "--deep"], "b"), (["--no-history"], "--no-history"),
    (["b", "--exclude", "a"], "b"),
])
def test_words_that_a_resumed_run_says_itself_are_refused(line, words, shown):
    line.set(ALL, FLAGS)
    line.run(broken="b")
    assert line.run(*words, "--resume", code=2) == []
    assert line.ended.err == (
        "--resume takes its targets from the run that it goes on with; it does not go "
        f"with {shown}.\n  Leave that out, or leave out --resume.\n")


TAKES_DAY = """
    def run(context, day):
        with open("ran", "a") as file:
            file.write(context.tool + "\\n")
        with open("days", "a") as file:
            file.write(f"{context.tool} {day!r}\\n")
"""


def test_a_flag_beside_a_resume_overrides_what_was_recorded_and_is_told(line):
    """Of what was done before, a tool that gets another argument now is not done."""
    tools = {**ALL, "a": {"module": "day", "needs": []}, "c": {"module": "day", "needs": []}}
    line.set(tools, FLAGS)
    line.sandbox.tool("day", TAKES_DAY)
    assert line.run("--day", "2024-01-01", "--place", "x", broken="b") == ["a", "b", "c"]
    assert line.run("--resume", "--place", "y", broken="b") == ["b"]
    assert "Changed since run 1: place (y, was x).\n" in line.ended.err
    assert line.run("--resume", "--day=2024-01-02", broken="b") == ["a", "b", "c"]
    assert "Changed since run 2: day (2024-01-02, was 2024-01-01).\n" in line.ended.err
    assert line.run("--resume") == ["b", "d"]  # the last that was said goes on
    assert "Changed" not in line.ended.err
    assert (line.folder / "days").read_text().split("\n")[-3:] == [
        "a datetime.date(2024, 1, 2)", "c datetime.date(2024, 1, 2)", ""]
    assert json.loads(line.sandbox.run("--history", "--json").out)["runs"][0]["arguments"] == {
        "day": {"repr": "datetime.date(2024, 1, 2)"}, "deep": False,
        "place": {"repr": f"{type(line.folder).__name__}('y')"}}


def test_a_flag_of_several_values_beside_a_resume_replaces_what_was_recorded(line):
    line.set({"b": {"module": "m", "needs": []}, "a": {"module": "tagged", "needs": []}}, """
def add_arguments(parser):
    parser.add_argument("--tag", action="append")
""")
    line.sandbox.tool("tagged", "def run(tag): open('tags', 'a').write(f'{tag}\\n')")
    line.run("--tag", "x", "--tag", "y", broken="b", code=1)
    line.run("--resume", "--tag", "z", broken="b", code=1)
    assert "Changed since run 1: tag (['z'], was ['x', 'y']).\n" in line.ended.err
    assert line.sandbox.read("tags") == "['x', 'y']\n['z']\n"


def test_a_tool_that_gets_another_argument_is_not_done_though_a_resume_never_came_to_it(line):
    line.set({"b": {"module": "m", "needs": []}, "a": {"module": "day", "needs": []}}, FLAGS)
    line.sandbox.tool("day", TAKES_DAY)
    assert line.run("--day", "2024-01-01", broken="b") == ["b", "a"]
    assert line.run("--resume", "-x", "--day", "2024-01-02", broken="b") == ["b"]
    assert line.run("--resume") == ["b", "a"]


@pytest.mark.parametrize("words", [["-j", "2"], ["-q"], ["-x"], ["--force"], ["--wait"], ["-v"]])
def test_words_on_how_to_run_are_welcome_beside_a_resume(line, words):
    line.run(broken="b")
    assert line.run(*words, "--resume") == ["b", "d"]


def test_what_is_excluded_beside_a_resume_takes_the_place_of_what_was_and_is_told(line):
    assert line.run("--exclude", "a", broken="b c") == ["b", "c"]
    assert line.run("--resume", "--exclude", "b", broken="c") == ["a", "c"]
    assert "Changed since run 1: --exclude (b, was a).\n" in line.ended.err
    assert line.run("--resume") == ["c", "d"]  # the last that was said goes on
    assert "Changed" not in line.ended.err
    assert "run 3 did all of it" in line.sandbox.run("--resume").err


def test_where_to_begin_beside_a_resume_takes_the_place_of_what_was_and_is_told(line):
    line.run(broken="b")
    assert line.run("--resume", "--from", "c", "--force") == ["d"]
    assert "Changed since run 1: --from (c, was None)." in line.ended.err


def test_flags_that_tools_require_come_from_the_run(line):
    line.set(ALL, """
def add_arguments(parser):
    parser.add_argument("--day", required=True)
""")
    assert "--day" in (line.run(code=2) or line.ended.err)
    line.run("--day", "monday", broken="b")
    assert line.run("--resume") == ["b", "d"]
    assert json.loads(line.sandbox.run("--history", "--json").out)["runs"][0]["arguments"] \
        == {"day": "monday"}


TYPES = """
    import datetime, pathlib
    def run(context, day, place, deep):
        with open("ran", "a") as file:
            file.write(f"{day!r} {place!r} {deep!r}\\n")
        if not pathlib.Path("mended").exists():
            raise ValueError(day)
"""


@pytest.mark.parametrize("words", [(), ("-j", "2")])
def test_arguments_of_a_type_are_the_same_objects_in_a_resume(line, words):
    line.set({"t": "typed"}, FLAGS)
    line.sandbox.tool("typed", TYPES)
    line.run("--day", "2024-02-29", "--place", "a b", code=1)
    (line.folder / "mended").touch()
    first = line.sandbox.read("ran")
    line.run("--resume", *words)
    assert first == line.sandbox.read("ran") \
        == f"datetime.date(2024, 2, 29) {type(line.folder).__name__}('a b') False\n"


MOVING = """
def add_arguments(parser):
    import datetime, os
    def date(text):
        return datetime.date.fromisoformat(text)
    parser.add_argument("--day", default=os.environ["TODAY"])
    parser.add_argument("--odd", default=object())
    parser.add_argument("--some", default={"a", "b", "c"})
"""


def test_a_default_that_moves_with_the_day_is_in_a_resume_what_it_was(line):
    """A nightly run that fails before midnight and is resumed after it does the same day."""
    line.set({"t": "typed"}, MOVING)
    line.sandbox.tool("typed", """
        def run(context, day):
            with open("ran", "a") as file:
                file.write(day + "\\n")
            if day == "2024-02-28" or context.run_id == "1":
                raise ValueError(day)
    """)
    assert line.run(code=1, env={"TODAY": "2024-02-27"}) == ["2024-02-27"]
    assert line.run("--resume", env={"TODAY": "2024-02-28"}) == ["2024-02-27"]


def test_a_default_that_moves_and_that_json_can_not_say_is_told_and_not_taken(line):
    at = '    parser.add_argument("--at", type=date, default=os.environ["TODAY"])'
    line.set(ALL, MOVING + at)
    line.run(broken="b", env={"TODAY": "2024-02-27"})
    assert line.run("--resume", env={"TODAY": "2024-02-27"}, broken="b") == ["b"]
    assert line.run("--resume", env={"TODAY": "2024-02-28"}, code=2) == []
    assert line.ended.err.startswith("The arguments of run 2 can not be read back: at.\n")


@pytest.mark.parametrize("seed", ["1", "2"])
def test_arguments_that_are_the_same_keep_a_cached_tool_cached_in_another_process(line, seed):
    """The repr of a set, and an address in it, differ from process to process."""
    line.set({"a": {"module": "m", "needs": [], "cache": True}}, MOVING)
    env = {"TODAY": "2024-02-27"}
    assert line.run(env={**env, "PYTHONHASHSEED": "0"}) == ["a"]
    assert line.run(env={**env, "PYTHONHASHSEED": seed}) == []


# --- nothing to resume ---

def test_there_is_nothing_to_resume_before_the_first_run_and_after_a_success(line):
    assert line.run("--resume") == []
    assert line.ended.err == "There is nothing to resume: no run failed or was interrupted.\n"
    line.run()
    assert line.run("--resume") == []
    assert line.ended.err == "There is nothing to resume: no run failed or was interrupted.\n"


def test_a_run_resumed_to_success_has_nothing_to_resume(line):
    line.run(broken="b")
    line.run("--resume", broken="d")
    line.run("--resume")
    for words in (["--resume"], ["--resume", "1"], ["--resume", "2"], ["--resume", "3"]):
        assert line.run(*words) == []
        assert line.ended.err == "There is nothing to resume: run 3 did all of it.\n"


def test_a_success_of_the_same_targets_and_arguments_leaves_nothing_to_resume(line):
    line.set(ALL, FLAGS)
    line.run("b", "a", broken="b")
    line.run("a", "b")                # other targets: they are in another order
    assert line.run("b", "a", "--deep") == ["a", "b"]  # other arguments
    assert line.plan("--resume")["b"][0] == "run"
    line.run("b", "a")
    assert line.run("--resume") == []
    assert line.ended.err == "There is nothing to resume: run 4 did all of run 1.\n"


def test_resume_of_a_run_goes_on_with_the_newest_resume_of_it(line):
    line.run(broken="c")
    line.run("--resume", broken="d")          # run 2 did c
    line.run("a", "--exclude", "b", "a", broken="a")  # run 3, another
    assert line.run("--resume", "1", broken="d") == ["d"]
    assert line.run("--resume", "1") == ["d"]
    assert "which resumed run 4" in line.sandbox.run("--history", "5").out


@pytest.mark.parametrize("word", ["7", "ingest", "1.5", "-1"])
def test_a_run_that_is_not_there_is_told(line, word):
    line.run(broken="b")
    assert line.run("--resume=" + word, code=2) == []
    assert line.ended.err.startswith(f"There is no run {word!r}.\n  The last run is 1;")


# --- by hand ---

def test_mark_done_takes_what_was_mended_by_hand_and_a_resume_goes_on(line):
    line.run(broken="b c")
    assert line.run("--mark-done", "b") == []
    assert line.ended.err.startswith("Marked as done: b.\nLeft to do: c, d. Next: ")
    assert line.run("--resume") == ["c", "d"]


def test_mark_done_takes_several_at_once_and_all_that_was_left_is_a_success(line):
    line.run(broken="b c")
    line.run("--mark-done", "d", "b", "c")
    assert line.ended.err == "Marked as done: d, b, c.\nNothing is left to do.\n"
    assert line.run("--resume") == []
    assert "nothing to resume" in line.ended.err
    assert line.history()["d"] == "success"


@pytest.mark.parametrize("tools, says", [
    (["d"], "d needs b, which is not done.\n  Mark b as done too, if it is.\n"),
    (["bb"], "There is no tool 'bb'.\n"),
    (["z"], "'z' is not in run 1.\n"),
])
def test_mark_done_of_a_tool_that_can_not_be_is_refused_and_marks_nothing(line, tools, says):
    line.set({**ALL, "z": {"module": "m", "needs": []}})
    line.run("a", "b", "c", "d", broken="b")
    assert line.run("--mark-done", "c", *tools, code=2) == []
    assert line.ended.err.startswith(says)
    assert len(json.loads(line.sandbox.run("--history", "--json").out)["runs"]) == 1


def test_mark_done_with_nothing_to_resume_says_so(line):
    line.run()
    assert line.run("--mark-done", "b") == []
    assert "nothing to resume" in line.ended.err


# --- results ---

def test_results_of_tools_that_are_done_reach_those_that_need_them(line):
    line.sandbox.tool("use", """
        def run(context):
            with open("ran", "a") as file:
                file.write(repr(context.results["b"]["tool"]) + "\\n")
            import pathlib
            if "d" in pathlib.Path("broken").read_text():
                raise ValueError("not yet")
    """)
    line.set({**ALL, "d": {"module": "use", "needs": ["b", "c"]}})
    line.run(broken="d")
    for words in ([], ["-j", "2"]):
        assert line.run("--resume", *words, broken="d") == ["'b'"]


FRACTION = """
    from fractions import Fraction
    import pathlib
    def make(context):
        with open("ran", "a") as file:
            file.write(context.tool + "\\n")
        return Fraction(1, 3)
    def use(context):
        with open("ran", "a") as file:
            file.write(f"{context.tool} sees {context.results['make']}\\n")
        if "use" in pathlib.Path("broken").read_text():
            raise ValueError("not yet")
"""


@pytest.mark.parametrize("needs", [True, False], ids=["needs", "in line"])
@pytest.mark.parametrize("words", [(), ("-j", "2")])
def test_a_result_that_json_can_not_say_makes_its_tool_run_again_and_the_plan_says_so(
        line, needs, words):
    line.sandbox.tool("fraction", FRACTION)
    line.set({"make": {"module": "fraction:make", **({"needs": []} if needs else {})},
              "use": {"module": "fraction:use", **({"needs": ["make"]} if needs else {})}})
    line.run(*words, broken="use")
    assert line.plan("--resume")["make"] == (
        "run", "in TOOL_MAP; use needs its result, a Fraction, which is not kept")
    line.run("--resume", *words)
    assert line.sandbox.read("ran") == "make\nuse sees 1/3\n"


# --- ended by hand or by others ---

@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C of POSIX")
@pytest.mark.parametrize("words", [(), ("-j", "2")])
def test_a_run_ended_by_ctrl_c_is_resumed_at_the_tool_that_ran(line, words):
    line.sandbox.tool("slow", """
        import os, time
        def run(context):
            with open("ran", "a") as file:
                file.write(context.tool + "\\n")
            end_s = time.monotonic() + 30
            while context.run_id == "1" and time.monotonic() < end_s:
                time.sleep(0.01)
    """)
    line.set({**ALL, "c": {"module": "slow", "needs": ["b"]}})
    (line.folder / "ran").touch()
    process = line.sandbox.start(*words)
    wait_until(lambda: "c" in line.sandbox.read("ran"))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and "--resume" in err.splitlines()[-1]
    assert line.history("1") == {"a": "success", "b": "success", "c": "interrupted"}
    assert line.run("--resume") == ["c", "d"]


@pytest.mark.skipif(sys.platform == "win32", reason="fork")
def test_a_worker_does_not_close_the_history_that_a_resume_writes_to(line):
    """A second connection, left open before the fork, was closed by a worker's garbage collection,
    which removed the file of changes: all that was recorded after it was lost.
    """
    line.sandbox.tool("collects", """
        import gc
        def run():
            gc.collect()
    """)
    line.set({**ALL, "b": {"module": "collects", "needs": ["a"]}}, "import gc; gc.disable()")
    line.run(broken="a")
    line.run("--resume", "-j", "2")
    assert line.history() == dict.fromkeys("abcd", "success")


# --- from Python ---

def test_run_pipeline_resumes_with_the_targets_and_arguments_of_the_run(modules):
    folder = modules(flaky="""
        import pathlib
        def run(context, day):
            pathlib.Path(__file__).with_name("ran").open("a").write(f"{context.tool} {day}\\n")
            if context.tool == "b" and context.run_id == "1":
                raise ValueError("not yet")
    """)
    home, tools = str(folder / "home"), dict.fromkeys("abc", "flaky")
    first = run_pipeline(["a", "b"], tools, arguments={"day": "monday"}, home=home)
    assert first.failed == ["b"]
    again = run_pipeline([], tools, home=home, resume=True)
    assert (again.cached, again.succeeded, again.status) == (["a"], ["b"], "success")
    assert (folder / "ran").read_text() == "a monday\nb monday\nb monday\n"
    with pytest.raises(Settled, match="run 2 did all of it"):
        run_pipeline([], tools, home=home, resume="1")
    with pytest.raises(UserError, match="resume takes its targets"):
        run_pipeline(["a"], tools, home=home, resume=True)
    with pytest.raises(UserError, match="resume needs a history"):
        run_pipeline([], tools, resume=True)


def test_run_pipeline_takes_exclusions_beside_a_resume_in_place_of_those_of_the_run(modules):
    folder = modules(flaky="def run(context): assert context.tool != 'c'")
    home, tools = str(folder / "home"), dict.fromkeys("abcd", {"module": "flaky", "needs": []})
    first = run_pipeline([], tools, home=home, exclude=["a"])
    assert (first.failed, first.succeeded) == (["c"], ["b", "d"])
    again = run_pipeline([], tools, home=home, resume=True, exclude=["c"])
    assert (again.succeeded, again.cached) == (["a"], ["b", "d"])


def test_arguments_that_json_can_not_say_are_asked_for_again_and_never_given_as_text(modules):
    folder = modules(flaky="""
        def run(context, place):
            if context.run_id == "1":
                raise ValueError("not yet")
            return str(type(place))
    """)
    home = str(folder / "home")
    run_pipeline([], {"a": "flaky"}, arguments={"place": folder}, home=home)
    with pytest.raises(UserError, match="arguments of run 1"):
        run_pipeline([], {"a": "flaky"}, home=home, resume=True)
    again = run_pipeline([], {"a": "flaky"}, home=home, resume=True, arguments={"place": folder})
    assert again.results["a"] == str(type(folder))


# --- needs outside the plan ---

def test_a_need_outside_the_plan_that_never_succeeded_is_refused_with_the_way_out(line):
    assert line.run("b", code=2) == []
    assert line.ended.err == (
        "b needs what is not in this plan: a, which has never succeeded.\n"
        "  Run that too: +b takes all that b needs; or go on without: --force.\n")
    line.run("a", broken="a")
    assert line.run("b", code=2) == []
    assert line.run("b", "--force") == ["b"]
    line.run("a")
    assert line.run("b") == ["b"]
    assert line.run("+b") == ["a", "b"]


def test_several_missing_needs_are_told_at_once(line):
    line.run("d", code=2)
    assert "plan: b, which has never succeeded; c, which has never succeeded." in line.ended.err


def test_a_need_outside_the_plan_may_be_no_older_than_it_is_fresh(line):
    line.set({**ALL, "a": {**ALL["a"], "fresh_for": "1h"}})
    line.run("a")
    assert line.run("b") == ["b"]
    line.set({**ALL, "a": {**ALL["a"], "fresh_for": 1e-6}})
    assert line.run("b", code=2) == []
    assert "plan: a, which succeeded 0." in line.ended.err
    assert "ago, in run 1, and is fresh for 0.00 s." in line.ended.err
    assert line.run("b", "--force") == ["b"]


# --- what is excluded ---

def test_what_needs_an_excluded_tool_goes_on_without_it_whether_it_ever_succeeded_or_not(line):
    for _ in range(2):
        assert line.run("--exclude", "a") == ["b", "c", "d"]
        assert line.run("b", "--exclude", "a") == ["b"]
        assert line.plan("--exclude", "a") == {
            "b": ("run", "in TOOL_MAP; without a, which is excluded"),
            "c": ("run", "in TOOL_MAP; without a, which is excluded"), "d": ("run", "in TOOL_MAP")}
        line.run("a")
    assert line.plan("--exclude", "b", "--exclude", "c")["d"] == (
        "run", "in TOOL_MAP; without b, c, which are excluded")
    assert line.run("--exclude", "a", "-j", "2")[-1] == "d"


def test_only_what_is_excluded_is_done_without(line):
    assert line.run("d", "--exclude", "b", code=2) == []
    assert "d needs what is not in this plan: c, which has never succeeded.\n" in line.ended.err


@pytest.mark.parametrize("words", [(), ("-j", "2")])
def test_the_results_of_an_excluded_tool_are_not_handed_on(line, words):
    line.sandbox.tool("m", """
        def run(context):
            with open("sees." + context.tool, "w") as file:
                file.write(" ".join(sorted(context.results)))
            return 1
    """)
    line.run(*words)
    assert line.sandbox.read("sees.d") == "b c"
    line.run(*words, "--exclude", "b")
    assert line.sandbox.read("sees.d") == "c"
    line.run("d", *words)
    assert line.sandbox.read("sees.d") == "b c"


def test_a_resume_keeps_what_is_excluded_and_goes_on_without_it(line):
    assert line.run("--exclude", "a", broken="c") == ["b", "c"]
    assert line.plan("--resume")["c"] == ("run", "in TOOL_MAP; without a, which is excluded")
    assert line.run("--resume") == ["c", "d"]


def test_the_items_of_an_excluded_tool_that_passed_are_still_those_of_each(quick):
    quick.pipeline(f"""{SQLITE}
TOOL_MAP = {{"t": "t", "u": {{"module": "u", "each": "t"}}}}
""")
    quick.tool("t", "def items(): return ['a', 'b']\ndef run(item): assert item != 'b'")
    quick.tool("u", "def run(item): print(item)")
    ended = quick.run("--exclude", "t")
    assert (ended.code, ended.out) == (0, "") and "no items" in ended.err
    assert quick.run("t").code == 1
    assert quick.run("--exclude", "t").out == "a\n"


def test_a_cached_tool_stays_so_without_what_it_needs_but_what_was_made_without_is_no_more(quick):
    """A success without the excluded tool says nothing of one with it."""
    line = Line(quick, {"a": {"module": "m", "needs": []},
                        "b": {"module": "m", "needs": ["a"], "cache": True}})
    assert line.run() == ["a", "b"]
    assert line.run("--exclude", "a", code=0) == []
    line.sandbox.tool("m", TOOL + "    # changed\n")
    assert line.run("--exclude", "a") == ["b"]
    assert line.run("--exclude", "a") == []
    assert line.plan("b")["b"] == ("run", "named; its needs changed since run 3")
    assert line.run("b") == ["b"] and line.run("b") == []


# --- cache ---

CACHED = {
    "a": {"module": "ma", "needs": []},
    "b": {"module": "mb", "needs": ["a"], "cache": "1h", "reads": ["in.txt", "in"],
          "writes": ["out.txt"]},
    "c": {"module": "mc", "needs": ["b"]},
}
DAY = """
def add_arguments(parser):
    parser.add_argument("--day")
"""


@pytest.fixture
def cached(quick):
    """
        a - b (cached) - c
    """
    line = Line(quick, CACHED, DAY)
    for name in ("ma", "mb", "mc"):
        quick.tool(name, TOOL)
    for name in ("in.txt", "in/one.txt", "in/deep/two.txt", "out.txt"):
        (quick.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (quick.folder / name).write_text(name)
    assert line.run() == ["a", "b", "c"]
    assert line.run("b", "c") == ["c"]
    assert line.plan("b")["b"] == ("cached", "unchanged since run 1")
    return line


def edit(name, text="something else"):
    return lambda line: (line.folder / name).write_text(text)


def touch(line):
    for name in ("in.txt", "in/one.txt"):
        os.utime(line.folder / name, (1, 1))


@pytest.mark.parametrize("change, words, reason", [
    (None, ["--day", "monday"], "arguments changed since run 1"),
    (lambda line: line.sandbox.tool("mb", TOOL + "    x = 1\n"), [],
     "its source changed since run 1"),
    (edit("in.txt"), [], "in.txt changed since run 1"),
    (edit("in.txt", "IN.TXT"), [], "in.txt changed since run 1"),  # of the same size
    (edit("in/deep/two.txt"), [], "in/deep/two.txt changed since run 1"),
    (edit("in/new.txt"), [], "in/new.txt is new since run 1"),
    (lambda line: (line.folder / "in/one.txt").unlink(), [], "in/one.txt is gone since run 1"),
    (lambda line: (line.folder / "out.txt").unlink(), [], "out.txt is gone since run 1"),
    (lambda line: line.run("a"), [], "what it needs has run since run 1"),
    (lambda line: line.set({**CACHED, "b": {**CACHED["b"], "cache": 1e-9}}, DAY), [],
     "succeeded 0."),
    (None, ["--force"], ""),
], ids=["arguments", "source", "file", "same size", "deep", "new", "gone", "writes", "needs", "old",
        "force"])
def test_each_part_of_what_a_cached_tool_rests_on_alone_makes_it_run_again(
        cached, change, words, reason):
    if change:
        change(cached)
    action, why = cached.plan("b", *words)["b"]
    assert action == "run" and why.startswith("named; " + reason if reason else "named")
    assert cached.run("b", *words) == ["b"]
    if "--force" not in words and not why.startswith("named; succeeded"):
        assert cached.run("b", *words) == []  # and now that counts


@pytest.mark.parametrize("change", [
    touch,
    edit("out.txt"),  # what it writes may be changed by others
    edit("other.txt"),
], ids=["touched only", "output", "another file"])
def test_what_does_not_matter_leaves_a_cached_tool_cached(cached, change):
    change(cached)
    assert cached.plan("b")["b"] == ("cached", "unchanged since run 1")
    assert cached.run("b") == []


def test_a_needed_tool_that_will_run_makes_a_cached_tool_run(cached):
    assert cached.plan("a", "b")["b"] == ("run", "named; again, because a will run")
    assert cached.run("a", "b") == ["a", "b"]


def test_a_cached_tool_that_failed_last_is_cached_by_its_last_success(cached):
    cached.run("b", "--force", broken="b")
    assert cached.plan("b")["b"] == ("cached", "unchanged since run 1")


def test_a_cached_tool_keeps_the_id_of_its_work_so_that_those_after_it_stay_cached(cached):
    cached.set({**CACHED, "c": {**CACHED["c"], "cache": True}}, DAY)
    assert cached.run("b", "c") == ["c"]  # its success was recorded without a cache
    for _ in range(3):
        assert cached.run("b", "c") == []
    assert cached.plan("b", "c")["c"][0] == "cached"
    import sqlite3
    conn = sqlite3.connect(next(cached.folder.glob(".orchestrator/*/history.db")))
    assert len(conn.execute("SELECT DISTINCT work FROM attempts WHERE tool = 'b'").fetchall()) == 1
    conn.close()


def test_the_result_of_a_cached_tool_reaches_those_that_need_it(cached):
    cached.sandbox.tool("mc", """
        def run(context):
            return context.results["b"]["tool"] * 3
    """)
    for words in ([], ["-j", "2"]):
        cached.run("b", "c", *words)
        run_id = json.loads(cached.sandbox.run("--history", "--json").out)["runs"][0]["run_id"]
        shown = json.loads(cached.sandbox.run("--history", run_id, "--json").out)
        assert {t["tool"]: t["result"] for t in shown["runs"][0]["tools"]}["c"] == '"bbb"'


def test_a_cached_tool_whose_result_json_can_not_say_runs_again_for_who_needs_it(cached):
    cached.sandbox.tool("mb", "def run(): return {1, 2}")
    assert cached.run("b") == []
    assert cached.plan("b")["b"][0] == "cached"
    assert cached.plan("b", "c")["b"] == (
        "run", "named; c needs its result, a set, which is not kept")


def test_in_a_plain_list_a_cached_tool_runs_again_when_one_before_it_has(line):
    line.set({"a": "m", "b": {"module": "m", "cache": True}, "c": "m"})
    assert line.run() == ["a", "b", "c"]
    assert line.run("b", "c") == ["c"]
    assert line.run("c", "b") == ["c", "b"]  # c runs, and b waits for it in this order
    assert line.run("b") == []
    line.run("a")
    assert line.plan("b")["b"] == ("run", "named; what it needs has run since run 3")
    assert line.run("b") == ["b"]


BELOW_ITEMS = """
TOOL_MAP = {
    "fetch": {"module": "items", "needs": []},
    "load":  {"module": "each", "each": "fetch"},
    "sum":   {"module": "m", "needs": ["load"], "cache": True},
    "top":   {"module": "m", "needs": ["sum"], "cache": True},
    "show":  {"module": "m", "needs": ["top"]},
}
"""


@pytest.fixture
def below(quick):
    """
        fetch (items) - load (items) - sum (cached) - top (cached) - show
    """
    line = Line(quick, {}, "")
    run = """
        import pathlib
        def run(item, context):
            if item in pathlib.Path("broken").read_text().split():
                raise ValueError("no")
            with open("ran", "a") as file:
                file.write(context.tool + ":" + item + "\\n")
            return 1
    """
    quick.pipeline(SQLITE + BELOW_ITEMS).tool("each", run).tool("items", run + """
        def items():
            return pathlib.Path("names").read_text().split()
    """)
    (quick.folder / "names").write_text("x y")
    assert line.run() == ["fetch:x", "fetch:y", "load:x", "load:y", "sum", "top", "show"]
    return line


def test_below_items_it_is_known_when_they_have_ended_whether_a_cached_tool_stays_so(below):
    plan = below.plan()
    assert {tool: action for tool, (action, _) in plan.items()} == {
        "fetch": "run", "load": "run", "sum": "maybe", "top": "maybe", "show": "run"}
    assert plan["sum"][1] == "unchanged since run 1, unless load does something new"
    assert plan["top"][1] == "unchanged since run 1, unless sum does something new"
    for words in ([], ["--jobs", "3"], []):
        assert below.run(*words) == ["show"]
        assert below.history(below.last())["sum"] == below.history(below.last())["top"] == "cached"
    assert below.plan("sum", "top")["top"] == ("cached", "unchanged since run 1")
    assert below.run("sum", "top") == []

    (below.folder / "names").write_text("x y z")
    assert below.run() == ["fetch:z", "load:z", "sum", "top", "show"]
    assert below.run() == ["show"]
    assert below.plan()["sum"][1] == "unchanged since run 6, unless load does something new"


@pytest.mark.parametrize("jobs", [[], ["--jobs", "2"]])
def test_what_is_changed_in_a_tool_itself_leaves_no_doubt_that_it_runs(below, jobs):
    assert below.plan("--force", *jobs)["sum"][0] == "run"
    below.sandbox.tool("m", TOOL + "    x = 1\n")
    assert [below.plan(*jobs)[tool][0] for tool in ("sum", "top")] == ["run", "run"]
    assert below.run(*jobs) == ["sum", "top", "show"]
    assert below.run(*jobs) == ["show"]


def test_items_that_were_done_by_a_run_that_was_cut_off_are_new_to_a_cached_tool(below):
    (below.folder / "names").write_text("x y z a")
    assert below.run("fetch", broken="a") == ["fetch:z"]
    assert below.run("load") == ["load:z"]
    path = next(below.folder.glob(".orchestrator/*/history.db"))
    with contextlib.closing(sqlite3.connect(path)) as conn:  # as if it had been killed
        with conn:
            conn.execute("UPDATE runs SET status = 'running' WHERE run_id = 3")
            conn.execute("UPDATE attempts SET status = 'running', work = NULL WHERE run_id = 3")
    assert below.run("load", "sum") == ["sum"]
    assert below.run("load", "sum") == []


@pytest.mark.parametrize("flag", [{"ORCHESTRATOR_HOME": "other"}, "--no-history"])
def test_items_that_another_history_has_done_are_new_to_a_cached_tool(below, flag):
    (below.folder / "names").write_text("x y z")
    words, env = ([flag], None) if isinstance(flag, str) else ([], flag)
    assert below.sandbox.run("fetch", "load", *words, env=env).code == 0
    assert below.run() == ["sum", "top", "show"]
    assert below.run() == ["show"]


def test_a_tool_that_lists_only_what_is_pending_does_nothing_new_where_there_is_nothing(below):
    below.sandbox.tool("items", """
        import sqlite3
        def items(conn):
            conn.execute("CREATE TABLE IF NOT EXISTS done (name)")
            done = {name for name, in conn.execute("SELECT name FROM done")}
            yield from sorted({"u", "v"} - done)
        def run(conn, item):
            conn.execute("INSERT INTO done VALUES (?)", (item,))
    """)
    assert below.run() == ["load:u", "load:v", "sum", "top", "show"]
    assert below.run() == ["show"]


def test_a_resume_keeps_what_is_cached_below_items_that_did_nothing_new(below):
    assert below.run(broken="show") == ["show"]
    plan = below.plan("--resume")
    assert {tool: action for tool, (action, _) in plan.items()} == {
        "fetch": "skip", "load": "skip", "sum": "skip", "top": "skip", "show": "run"}
    assert below.run("--resume", broken="show") == ["show"]
    assert below.run("--resume") == ["show"]
    assert below.run("load", "sum", "top") == []

    (below.folder / "names").write_text("x y z")
    assert below.run(broken="z") == []
    assert below.run("--resume") == ["fetch:z", "load:z", "sum", "top", "show"]


def test_a_cached_tool_is_skipped_below_items_that_failed(below):
    (below.folder / "names").write_text("z")
    assert below.run(broken="z") == []
    assert below.history(below.last()) == {
        "fetch": "failed", "load": "skipped", "sum": "skipped", "top": "skipped",
        "show": "skipped"}
    assert below.run("--resume") == ["fetch:z", "load:z", "sum", "top", "show"]


def test_a_tool_whose_items_did_nothing_new_is_as_fresh_as_that_tells(below):
    from datetime import datetime
    below.sandbox.tool("items", """
        def items(context):
            with open("last", "a") as file:
                print(context.last_success, file=file)
            return ["x"]
        def run(item): pass
    """)
    for _ in range(3):
        below.run("fetch")
    last = [datetime.fromisoformat(line) for line in below.sandbox.read("last").splitlines()[-2:]]
    assert last[0] < last[1]


def test_what_is_expected_reckons_with_what_runs_perhaps(below):
    shown = json.loads(below.sandbox.run("--plan", "--json").out)
    assert shown["critical_path"] == ["fetch", "load", "sum", "top", "show"]
    assert all(step["expected_s"] > 0 for step in shown["steps"])
    text = below.sandbox.run("--plan").out
    assert "maybe" in text and "unless load does something new" in text


def test_a_folder_with_a_link_to_nowhere_can_be_read(cached):
    """As an editor leaves beside a file that is being changed."""
    (cached.folder / "in" / ".#one.txt").symlink_to("me@host.1234")
    assert cached.run("b") in ([], ["b"])
    assert cached.run("b") == []


def test_reads_that_are_no_files_do_not_count(line):
    line.set({"a": {"module": "m", "needs": [], "writes": ["flights"]},
              "b": {"module": "m", "reads": ["flights", "nowhere.txt"], "cache": True}})
    assert line.run() == ["a", "b"]
    assert line.run("b") == []
    (line.folder / "nowhere.txt").write_text("now it is there")
    assert line.plan("b")["b"] == ("run", "named; nowhere.txt is new since run 1")


def test_a_result_that_was_not_kept_is_told_so_to_a_tool_that_runs_alone(quick):
    quick.pipeline('TOOL_MAP = {"a": "t:a", "b": {"module": "t:b", "needs": ["a"]}}').tool("t", """
        def a():
            return 1, 2
        def b(context):
            print(list(context.results), context.results["a"])
    """)
    assert quick.run().code == 0
    ended = quick.run("b")
    assert ended.code == 1 and ended.out == ""
    assert "the result of 'a' is a tuple, which can not travel from one process or run" in ended.err
