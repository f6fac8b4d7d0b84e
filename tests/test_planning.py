"""Targets become a plan: which tools, in which order, each with its reason."""
import json
import random

import pytest
from conftest import count_steps

from orchestrator import UserError, load_pipeline, main, make_plan

TOOLS = {name: f"tools.{name}" for name in ("fetch", "parse", "enrich", "summarize", "render")}
STAGES = {
    "ingest": ["fetch", "parse"],
    "analyze": ["enrich", "summarize"],
    "render": ["summarize", "render"],
    "full": ["ingest", "analyze", "render"],
    "backwards": ["render", "analyze", "ingest"],
    "empty": [],
}
PIPELINE = load_pipeline(TOOLS, STAGES)


def order(*targets, pipeline=PIPELINE, **more):
    """Return the tools of a plan."""
    return [step.tool for step in make_plan(pipeline, targets, **more).steps]


def refusal(*targets, **more):
    """Return the text of the error that planning raises."""
    with pytest.raises(UserError) as caught:
        make_plan(PIPELINE, targets, **more)
    return str(caught.value)


@pytest.mark.parametrize("targets, tools", [
    (["parse"], "parse"),
    (["render", "fetch"], "summarize render fetch"),
    (["parse", "fetch"], "parse fetch"),
    (["ingest"], "fetch parse"),
    (["full"], "fetch parse enrich summarize render"),
    (["backwards"], "summarize render enrich fetch parse"),
    (["ingest", "enrich", "ingest", "fetch"], "fetch parse enrich"),
    (["parse", "ingest"], "parse fetch"),
    (["summarize", "full"], "summarize fetch parse enrich render"),
    (["empty", "parse"], "parse"),
])
def test_targets_come_to_their_tools_each_once_at_its_first_place(targets, tools):
    assert order(*targets) == tools.split()


def test_without_targets_the_stage_full_is_planned():
    stages = {"full": ["parse", "fetch"], "ingest": ["fetch"]}

    assert order(pipeline=load_pipeline(TOOLS, stages)) == ["parse", "fetch"]


@pytest.mark.parametrize("stages", [{}, {"ingest": ["parse", "fetch"]}])
def test_without_a_stage_full_every_tool_is_planned_in_the_order_of_the_table(stages):
    assert order(pipeline=load_pipeline(TOOLS, stages)) == list(TOOLS)


def test_a_tool_named_full_is_no_stage_full():
    pipeline = load_pipeline({"fetch": "tools.fetch", "full": "tools.full", "render": "tools.r"})

    assert order(pipeline=pipeline) == ["fetch", "full", "render"]


def test_a_target_that_is_both_is_the_stage():
    assert order("render") == ["summarize", "render"]


@pytest.mark.parametrize("exclude, tools", [
    (["parse"], "fetch enrich summarize render"),
    (["ingest"], "enrich summarize render"),
    (["render"], "fetch parse enrich"),  # the stage of that name, both of its tools
    (["parse", "analyze"], "fetch render"),
    (["empty"], "fetch parse enrich summarize render"),
])
def test_an_excluded_tool_or_stage_is_taken_out_of_the_plan(exclude, tools):
    assert order(exclude=exclude) == tools.split()


def test_excluding_what_is_not_in_the_plan_changes_nothing():
    assert order("ingest", exclude=["summarize"]) == ["fetch", "parse"]


@pytest.mark.parametrize("start, tools", [
    ("fetch", "fetch parse enrich summarize render"),
    ("enrich", "enrich summarize render"),
    ("analyze", "enrich summarize render"),
    ("render", "summarize render"),
])
def test_from_leaves_a_tool_and_all_after_it_in_the_plan(start, tools):
    assert order("full", start_from=start) == tools.split()


def test_from_goes_by_the_order_of_the_plan_not_of_the_table():
    assert order("render", "fetch", start_from="render") == ["summarize", "render", "fetch"]
    assert order("parse", "fetch", "enrich", start_from="fetch") == ["fetch", "enrich"]


def test_from_a_stage_begins_at_the_first_of_its_tools_in_the_plan_whatever_its_own_order():
    assert order("backwards", start_from="analyze") == "summarize render enrich fetch parse".split()
    assert order("backwards", start_from="ingest") == ["fetch", "parse"]


def test_from_a_tool_that_is_excluded_begins_behind_it():
    assert order("full", start_from="enrich", exclude=["enrich"]) == ["summarize", "render"]


def test_from_a_tool_that_is_not_in_the_plan_is_refused():
    said = refusal("ingest", start_from="enrich")

    assert "--from" in said
    assert "'enrich' is not in this plan" in said


@pytest.mark.parametrize("more", [
    {"exclude": ["full"]},
    {"exclude": ["ingest", "analyze", "render"]},
    {"start_from": "render", "exclude": ["render"]},
])
def test_a_plan_with_nothing_left_is_refused(more):
    said = refusal(**more)

    assert said.startswith("Nothing is left to run.\n  ")
    assert "--list" in said


def test_a_stage_without_tools_is_no_plan():
    assert refusal("empty").startswith("There is nothing to run: empty has no tools.\n")
    no_stage = load_pipeline({"a": "a"}, {"full": []})
    with pytest.raises(UserError, match="^There is nothing to run: full has no tools."):
        make_plan(no_stage)
    with pytest.raises(UserError, match="^There is nothing to run: full has no tools."):
        make_plan(no_stage, exclude=["a"])


@pytest.mark.parametrize("targets, more", [
    (["ingest", "fetc"], {}),
    (["fetch"], {"exclude": ["fetc"]}),
    (["fetch"], {"start_from": "fetc"}),
])
def test_an_unknown_word_is_refused_with_the_nearest_name_wherever_it_stands(targets, more):
    said = refusal(*targets, **more)

    assert "'fetc'" in said.splitlines()[0]
    assert said.endswith("\n  Did you mean 'fetch'?")


def test_stages_are_among_the_nearest_names():
    assert "Did you mean 'analyze'?" in refusal("analyse")


def test_every_step_says_why_it_is_in_the_plan():
    steps = make_plan(PIPELINE, ["fetch", "ingest", "full"]).steps

    assert [(step.tool, step.reason) for step in steps] == [
        ("fetch", "named"), ("parse", "in stage ingest"), ("enrich", "in stage full"),
        ("summarize", "in stage full"), ("render", "in stage full")]


def test_a_tool_of_the_default_plan_says_where_that_came_from():
    assert {step.reason for step in make_plan(PIPELINE).steps} == {"in stage full"}
    assert {step.reason for step in make_plan(load_pipeline(TOOLS)).steps} == {"in TOOL_MAP"}


def test_tools_that_declare_nothing_wait_for_all_before_them():
    plan = make_plan(PIPELINE, ["full"], exclude=["parse"])

    assert [step.wave for step in plan.steps] == [1, 2, 3, 4]
    assert {step.needs for step in plan.steps} == {"*"}
    assert {step.action for step in plan.steps} == {"run"}
    assert plan.critical_path == ("fetch", "enrich", "summarize", "render")


# --- needs ---

def graph(*rows, stages=None, limits=None):
    """Return a pipeline of rows like "c: a b", or "c" for a tool that declares nothing."""
    tools = {}
    for row in rows:
        name, colon, needed = row.partition(":")
        tools[name] = {"module": "m", "needs": needed.split()} if colon else "m"
    return load_pipeline(tools, stages, limits=limits)


def steps(pipeline, *targets, **more):
    """Return the steps of a plan by tool."""
    return {step.tool: step for step in make_plan(pipeline, targets, **more).steps}


def waves(pipeline, *targets):
    """Return the tools of a plan by waves."""
    plan = make_plan(pipeline, targets)
    return [" ".join(step.tool for step in plan.steps if step.wave == wave)
            for wave in range(1, 1 + max(step.wave for step in plan.steps))]


# a - b - d - e
#  \\ c /
DIAMOND = graph("a:", "b: a", "c: a", "d: b c", "e: d",
                stages={"ends": ["e", "a"], "middle": ["c", "b"]})


def test_only_tools_that_declare_nothing_wait_for_all_before_them():
    plan = steps(graph("a", "b:", "c: a", "d"))

    assert {tool: step.needs for tool, step in plan.items()} == {
        "a": "*", "b": (), "c": ("a",), "d": "*"}


def test_edges_say_what_needs_say_and_lead_only_to_tools_of_the_plan():
    """a(*)  b  c - a  d(*)  e - b, x  f(*), of which x is not in the plan"""
    pipeline = graph("x:", "a", "b:", "c: a", "d", "e: b x", "f")

    plan = steps(pipeline, *"abcdef")

    assert {tool: " ".join(step.edges) for tool, step in plan.items()} == {
        "a": "", "b": "", "c": "a", "d": "a b c", "e": "b", "f": "d e"}


@pytest.mark.parametrize("seed", range(40))
def test_over_edges_a_tool_reaches_all_that_it_waits_for_and_nothing_else(seed):
    chance = random.Random(seed)
    count = chance.randint(1, 14)
    pipeline = graph(*[f"t{i}:" + "".join(f" t{j}" for j in range(i) if chance.random() < 0.25)
                       if chance.random() < 0.6 else f"t{i}" for i in range(count)])
    words = [f"t{i}" for i in chance.sample(range(count), chance.randint(1, count))]
    planned = make_plan(pipeline, words).steps

    reached, waited = {}, {}
    for i, step in enumerate(planned):
        before = [each.tool for each in planned[:i]]
        needs = before if step.needs == "*" else [need for need in step.needs if need in before]
        waited[step.tool] = {each for need in needs for each in (need, *waited[need])}
        reached[step.tool] = {each for edge in step.edges for each in (edge, *reached[edge])}

    assert reached == waited


@pytest.mark.parametrize("count", [100, 1_000, 10_000])
def test_a_plan_has_no_more_edges_than_tools_and_declared_needs(count):
    """A plain list, one of which every other tool declares a need, and one waiter for many."""
    line = make_plan(graph(*[f"t{i}" for i in range(count)])).steps
    mixed = make_plan(graph("t0", *[f"t{i}: t{i - 1}" if i % 2 else f"t{i}"
                                    for i in range(1, count)])).steps
    fan = make_plan(graph(*[f"t{i}:" for i in range(count)], "u", "v", "w")).steps

    assert [sum(len(step.edges) for step in each) for each in (line, mixed, fan)] \
        == [count - 1, count // 2 + 2 * (count // 2 - 1), count + 2]


def test_a_tool_that_needs_nothing_can_start_at_once_wherever_it_stands():
    assert waves(graph("a", "b", "c:", "d: c", "e")) == ["a c", "b d", "e"]


@pytest.mark.parametrize("rows, wanted", [
    (["a:", "b: a", "c: a", "d: b c", "e: d"], ["a", "b c", "d", "e"]),
    (["a:", "b:", "c:"], ["a b c"]),
    (["a", "b", "c"], ["a", "b", "c"]),
    (["a:", "b: a", "c", "d:", "e: c d", "f"], ["a d", "b", "c", "e", "f"]),
    (["a:", "b: a", "c: a b", "d: a c"], ["a", "b", "c", "d"]),
])
def test_a_wave_holds_what_could_start_together(rows, wanted):
    assert waves(graph(*rows)) == wanted


def test_a_need_outside_the_plan_holds_nothing_up_and_is_still_told():
    step = steps(DIAMOND, "d")["d"]

    assert (step.wave, step.needs) == (1, ("b", "c"))


@pytest.mark.parametrize("target, tools", [
    ("+a", "a"), ("a+", "a b c d e"), ("+a+", "a b c d e"),
    ("+d", "a b c d"), ("d+", "d e"), ("+d+", "a b c d e"),
    ("+b", "a b"), ("b+", "b d e"), ("+b+", "a b d e"),
    ("+e", "a b c d e"), ("e+", "e"),
    ("+middle", "a b c"), ("middle+", "b c d e"), ("+middle+", "a b c d e"),
    ("ends", "a e"), ("+ends", "a b c d e"),
])
def test_plus_adds_what_a_tool_needs_before_it_and_what_needs_it_behind_it(target, tools):
    assert sorted(order(target, pipeline=DIAMOND)) == tools.split()


def test_plus_follows_needs_and_not_the_order_of_tools_that_declare_nothing():
    """a  b - c  d"""
    pipeline = graph("a", "b", "c: b", "d")

    assert order("+c", pipeline=pipeline) == ["b", "c"]
    assert order("b+", pipeline=pipeline) == ["b", "c"]
    assert order("+d+", pipeline=pipeline) == ["d"]


def test_plus_follows_inferred_needs_as_it_does_declared_ones():
    pipeline = load_pipeline({"r": {"module": "m", "reads": ["x"]},
                              "w": {"module": "m", "writes": ["x"], "needs": ["n"]}, "n": "m"})

    assert order("+r", pipeline=pipeline) == ["n", "w", "r"]
    assert order("n+", pipeline=pipeline) == ["n", "w", "r"]


def test_a_tool_that_plus_added_says_what_for():
    assert {tool: step.reason for tool, step in steps(DIAMOND, "+c").items()} == {
        "a": "needed by c", "c": "named"}
    assert {tool: step.reason for tool, step in steps(DIAMOND, "d+").items()} == {
        "d": "named", "e": "needs d"}
    assert steps(DIAMOND, "+middle")["b"].reason == "in stage middle"


@pytest.mark.parametrize("stage", ["forwards", "backwards", "mixed"])
def test_plus_before_a_stage_is_plus_before_each_of_its_tools(stage):
    stages = {"forwards": ["a", "b", "c", "d"], "backwards": ["d", "c", "b", "a"],
              "mixed": ["c", "a", "d"]}
    pipeline = graph("a", "b", "c", "d: n", "n", stages=stages)

    alone = order(*["+" + tool for tool in stages[stage]], pipeline=pipeline)

    assert order("+" + stage, pipeline=pipeline) == alone


def test_what_plus_added_names_the_last_that_needs_it_or_that_it_needs():
    pipeline = graph("a:", "b: a", "c: a", "d: b c", stages={"both": ["b", "c"]})

    assert steps(pipeline, "+both+")["a"].reason == "needed by c"
    assert steps(pipeline, "+both+")["d"].reason == "needs c"
    assert steps(pipeline, "+d", "a+")["b"].reason == "needed by d"


def test_plus_around_a_stage_of_a_long_chain_walks_it_once():
    def plan(count):
        names = [f"t{i}" for i in range(count)]
        pipeline = graph("t0:", *[f"{name}: {last}" for last, name in zip(names, names[1:])],
                         stages={"all": names})
        return lambda: make_plan(pipeline, ["+all+"])

    assert count_steps(plan(1_000)) < 11 * count_steps(plan(100))


def test_plus_before_what_has_no_needs_changes_nothing():
    for target in ("full", "backwards", "ingest", "parse"):
        assert order("+" + target) == order(target)
        assert order(target + "+") == order(target)


@pytest.mark.parametrize("word", ["+", "++", "++a", "a++", "+nobody", "nobody+"])
def test_a_plus_around_what_there_is_not_is_refused(word):
    with pytest.raises(UserError, match="There is no tool or stage"):
        make_plan(DIAMOND, [word])


def test_exclude_may_have_a_plus():
    assert order("+e", pipeline=DIAMOND, exclude=["c+"]) == ["a", "b"]
    assert order("+e", pipeline=DIAMOND, exclude=["+b"]) == ["c", "d", "e"]


# --- names that several write ---

def using(**rows):
    """Return a pipeline of rows like a=("w", "b"), which writes x and needs b; "r" reads it."""
    return load_pipeline({name: {"module": "m", "needs": row[1].split(),
                                 **({"reads": "x"} if "r" in row[0] else {}),
                                 **({"writes": "x"} if "w" in row[0] else {})}
                          for name, row in rows.items()})


# load - dedupe - mend - report: dedupe and mend update what load writes; config is for dedupe
UPDATED = using(report=("r", ""), config=("", ""), load=("w", ""), dedupe=("rw", "config"),
                mend=("rw", "dedupe"))


@pytest.mark.parametrize("words, waits_for", [
    ("load dedupe mend report", "mend"), ("dedupe report", "dedupe"),
    ("dedupe config mend report", "mend"), ("load mend report", "mend"), ("load report", "load"),
    ("report load", "load"), ("report config", ""), ("report", ""),
])
def test_who_reads_a_name_waits_for_the_last_of_its_writers_that_is_in_the_plan(words, waits_for):
    assert " ".join(steps(UPDATED, *words.split())["report"].edges) == waits_for


def test_two_writers_are_never_at_a_name_at_once_when_the_one_between_them_is_excluded():
    plan = {step.tool: step for step in make_plan(UPDATED, exclude=["dedupe"]).steps}

    assert list(plan) == ["load", "config", "mend", "report"]
    assert [step.wave for step in plan.values()] == [1, 1, 2, 3]
    assert plan["report"].edges == ("mend",) and plan["mend"].edges == ("load",)


# --- the order, and why ---

@pytest.mark.parametrize("words, tools", [
    ("a b c d e", "a b c d e"), ("e d c b a", "a c b d e"), ("c b", "c b"), ("b c", "b c"),
    ("d b c", "b c d"), ("d c b", "c b d"), ("e a", "e a"), ("e d", "d e"), ("c d a b", "a c b d"),
])
def test_tools_named_against_their_needs_run_in_the_needed_order(words, tools):
    """Only needs that are in the plan count: in "e a" neither needs the other directly."""
    assert order(*words.split(), pipeline=DIAMOND) == tools.split()


def test_a_tool_that_moved_says_before_what_and_the_others_do_not():
    plan = steps(DIAMOND, "e", "c", "b", "d", "a")

    assert list(plan) == ["a", "c", "b", "d", "e"]
    assert {tool: step.reason for tool, step in plan.items()} == {
        "a": "named; moved before c, which needs it",
        "b": "named; moved before d, which needs it",
        "c": "named; moved before d, which needs it",
        "d": "named; moved before e, which needs it",
        "e": "named",
    }


def test_a_tool_that_was_named_in_a_good_order_has_not_moved():
    for words in ("a b c d e", "a c b d e", "c b", "e a"):
        assert {step.reason for step in steps(DIAMOND, *words.split()).values()} == {"named"}


def test_tools_that_plus_added_have_not_moved():
    pipeline = graph("c: b", "b: a", "a:")

    assert {tool: step.reason for tool, step in steps(pipeline, "+c").items()} == {
        "a": "needed by c", "b": "needed by c", "c": "named"}


def test_a_table_may_name_tools_before_what_they_need():
    pipeline = graph("c: b", "b: a", "a:")

    assert order(pipeline=pipeline) == ["a", "b", "c"]
    assert steps(pipeline)["a"].reason == "in TOOL_MAP; moved before b, which needs it"


def test_a_tool_that_declares_nothing_may_be_moved_and_then_waits_for_what_is_before_it_there():
    """x, then c needs b, which declares nothing and is named last."""
    pipeline = graph("x", "c: b", "y", "b")

    assert order(pipeline=pipeline) == ["x", "b", "c", "y"]
    assert waves(pipeline) == ["x", "b", "c", "y"]


def test_from_takes_the_needed_order_and_leaves_out_what_is_before():
    assert order("e", "d", "c", "b", "a", pipeline=DIAMOND, start_from="c") == ["c", "b", "d", "e"]


@pytest.mark.parametrize("seed", range(60))
def test_an_order_is_changed_only_as_far_as_needs_ask_for(seed):
    chance = random.Random(seed)
    count = chance.randint(1, 14)
    rows = [f"t{i}:" + "".join(f" t{j}" for j in range(i) if chance.random() < 0.25)
            if chance.random() < 0.7 else f"t{i}" for i in range(count)]
    pipeline = graph(*rows)
    words = [f"t{i}" for i in chance.sample(range(count), chance.randint(1, count))]

    plan = make_plan(pipeline, words)
    planned = [step.tool for step in plan.steps]

    position = {tool: i for i, tool in enumerate(planned)}
    assert sorted(planned) == sorted(words)
    wanted = {tool: [need for need in pipeline.needs[tool] if need in words]
              for tool in words if pipeline.needs[tool] != "*"}
    assert all(position[need] < position[tool] for tool in wanted for need in wanted[tool])
    # Who moved to the front says so; all others are in the order of the words.
    moved = {step.tool for step in plan.steps if "; moved before " in step.reason}
    kept = [tool for tool in words if tool not in moved]
    assert kept == [tool for tool in planned if tool not in moved]
    assert not moved or any(wanted.values())
    assert order(*planned, pipeline=pipeline) == planned  # a good order stays as it is


# --- durations ---

def timed(**rows):
    """Return a pipeline of rows like a=(5, "b c"): its estimate, and its needs or None."""
    return load_pipeline({name: {
        "module": "m", **({} if seconds is None else {"estimate": seconds}),
        **({} if needed is None else {"needs": needed.split()})}
        for name, (seconds, needed) in rows.items()})


# a 1 - b 5 - d 1 - e 2
#      \\ c 2 /
TIMED = timed(a=(1, ""), b=(5, "a"), c=(2, "a"), d=(1, "b c"), e=(2, "d"))


def test_the_critical_path_is_the_chain_that_takes_longest():
    assert make_plan(TIMED).critical_path == ("a", "b", "d", "e")


@pytest.mark.parametrize("rows, path", [
    ({"a": (9, ""), "b": (1, "a"), "c": (5, ""), "d": (4, "c")}, "a b"),
    ({"a": (9, ""), "b": (1, "a"), "c": (5, ""), "d": (6, "c")}, "c d"),
    ({"a": (1, ""), "b": (50, "")}, "b"),
    ({"a": (50, ""), "b": (1, "")}, "a"),
    # tools that declare nothing wait for the one before them that ends last
    ({"a": (9, ""), "b": (1, ""), "c": (1, None)}, "a c"),
    ({"a": (1, ""), "b": (9, ""), "c": (1, None), "d": (1, None)}, "b c d"),
    ({"a": (1, None), "b": (9, ""), "c": (5, None), "d": (1, "c")}, "b c d"),
    # without any estimate, the longest chain counts
    ({"a": (None, ""), "b": (None, "a"), "c": (None, "")}, "a b"),
    # where one is missing, it is taken for the mean of the others: 6
    ({"a": (None, ""), "b": (7, ""), "c": (5, "")}, "b"),
    ({"a": (None, ""), "b": (7, ""), "c": (5, ""), "d": (0, "a b c")}, "b d"),
    ({"a": (None, ""), "b": (1, ""), "c": (5, "")}, "c"),
    ({"a": (None, ""), "b": (3, "a"), "c": (4, "")}, "a b"),
    ({"a": (0, ""), "b": (0, "a")}, "a b"),
])
def test_the_critical_path_reckons_with_waiting_and_missing_estimates(rows, path):
    assert make_plan(timed(**rows)).critical_path == tuple(path.split())


def test_the_critical_path_is_of_this_plan_alone():
    assert make_plan(TIMED, ["c", "d"]).critical_path == ("c", "d")


@pytest.mark.parametrize("jobs, expected_s", [(1, 11), (2, 9), (3, 9), (100, 9)])
def test_the_whole_is_expected_to_take_what_its_tools_take_on_so_many_jobs(jobs, expected_s):
    """b (5) and c (2) go side by side after a (1); then d (1) and e (2)."""
    plan = make_plan(TIMED, jobs=jobs)

    assert (plan.expected_s, plan.jobs) == (expected_s, jobs)


@pytest.mark.parametrize("jobs, expected_s", [(1, 12), (2, 6), (3, 5), (4, 5)])
def test_independent_tools_share_the_jobs(jobs, expected_s):
    tools = timed(a=(2, ""), b=(5, ""), c=(4, ""), d=(1, ""))

    assert make_plan(tools, jobs=jobs).expected_s == expected_s


def test_tools_that_declare_nothing_are_expected_one_after_another_whatever_the_jobs():
    assert make_plan(timed(a=(1, None), b=(2, None), c=(3, None)), jobs=4).expected_s == 6


def test_limits_count_in_what_is_expected():
    row = {"module": "m", "needs": [], "estimate": 10, "uses": {"db": 1}}

    for limit, expected_s in ((1, 30), (2, 20), (3, 10)):
        pipeline = load_pipeline(dict.fromkeys("abc", row), limits={"db": limit})
        assert make_plan(pipeline, jobs=3).expected_s == expected_s


def test_one_unknown_duration_makes_the_whole_unknown_but_not_the_others():
    plan = make_plan(timed(a=(1, ""), b=(None, "a"), c=(0, "b")))

    assert plan.expected_s is None
    assert [step.expected_s for step in plan.steps] == [1, None, 0]


def test_ten_thousand_tools_of_fifty_thousand_needs_are_one_plan():
    chance = random.Random(1)
    tools = {f"t{i}": {"module": "m", "estimate": 1,
                       "needs": [f"t{chance.randrange(i)}" for _ in range(5 if i else 0)]}
             for i in range(10_000)}

    plan = make_plan(load_pipeline(tools), [*reversed(list(tools))], jobs=8)

    assert len(plan.steps) == 10_000
    assert plan.expected_s >= max(len(plan.critical_path), 10_000 / 8)


SHAPES = {  # that many tools, with about as many needs
    "a plain list": lambda i: "m",
    "a chain": lambda i: {"module": "m", "needs": [f"t{i - 1}"] if i else []},
    "every other one declares": lambda i: {"module": "m", "needs": []} if i % 2 else "m",
    "one needs all": lambda i: {"module": "m", "needs": [f"t{j}" for j in range(i)]
                                if i in (99, 999) else []},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_ten_times_the_tools_are_little_more_than_ten_times_the_steps(shape):
    small, large = (count_steps(lambda count=count: make_plan(load_pipeline(
        {f"t{i}": SHAPES[shape](i) for i in range(count)}), jobs=4)) for count in (100, 1_000))

    assert large < 11 * small


def test_a_tool_named_first_may_need_ten_thousand_others():
    names = [f"t{i}" for i in range(10_000)]
    tools = {"all": {"module": "m", "needs": names},
             **{name: {"module": "m", "needs": []} for name in names}}

    assert order(pipeline=load_pipeline(tools)) == [*names, "all"]


def test_a_chain_may_be_longer_than_python_recurses():
    tools = {f"t{i}": {"module": "m", "needs": [f"t{i + 1}"]} for i in range(10_000)}
    tools["t10000"] = {"module": "m", "needs": []}

    plan = make_plan(load_pipeline(tools))

    assert [step.tool for step in plan.steps] == [*reversed(list(tools))]
    assert len(plan.critical_path) == 10_001


# --- whatever the tables ---

def make_random_tables(chance):
    """Return tools, and stages that contain tools and the stages before them."""
    tools = {f"t{i}": f"m{i}" for i in range(chance.randint(1, 12))}
    stages = {}
    for i in range(chance.randint(1, 10)):
        known = [*tools, *stages]
        stages[f"s{i}"] = [chance.choice(known) for _ in range(chance.randint(1, 6))]
    rows = list(stages.items())
    chance.shuffle(rows)  # a stage may stand before or after those that it contains
    return tools, dict(rows)


def make_random_pipeline(chance):
    """Return a pipeline of such tables."""
    return load_pipeline(*make_random_tables(chance))


def choose_words(chance, pipeline, most=5):
    """Return some words that may be targets."""
    known = [*pipeline.tools, *pipeline.stages]
    return [chance.choice(known) for _ in range(chance.randint(1, most))]


@pytest.mark.parametrize("seed", range(40))
def test_a_stage_is_planned_as_its_members_typed_one_by_one(seed):
    tools, stages = make_random_tables(random.Random(seed))
    pipeline = load_pipeline(tools, stages)

    for stage, members in stages.items():
        assert order(stage, pipeline=pipeline) == order(*members, pipeline=pipeline)


@pytest.mark.parametrize("seed", range(40))
def test_a_further_target_only_adds_at_the_end_what_is_not_there(seed):
    chance = random.Random(seed)
    pipeline = make_random_pipeline(chance)
    words = choose_words(chance, pipeline)
    so_far = []
    for i, word in enumerate(words, 1):
        alone = order(word, pipeline=pipeline)
        assert len(alone) == len(set(alone))
        so_far += [tool for tool in alone if tool not in so_far]
        assert order(*words[:i], pipeline=pipeline) == so_far


@pytest.mark.parametrize("seed", range(40))
def test_exclude_and_from_take_tools_out_and_never_move_one(seed):
    chance = random.Random(seed)
    pipeline = make_random_pipeline(chance)
    words = choose_words(chance, pipeline)
    whole = order(*words, pipeline=pipeline)
    out = choose_words(chance, pipeline, most=2)
    gone = set(order(*out, pipeline=pipeline))
    start = chance.choice(whole)
    left = [tool for tool in whole[whole.index(start):] if tool not in gone]
    if left:
        assert order(*words, pipeline=pipeline, exclude=out, start_from=start) == left
    else:
        with pytest.raises(UserError):
            order(*words, pipeline=pipeline, exclude=out, start_from=start)


def test_ten_thousand_tools_are_one_plan():
    tools = {f"t{i}": "m" for i in range(10_000)}
    plan = make_plan(load_pipeline(tools, {"full": list(tools)}))

    assert [step.tool for step in plan.steps] == list(tools)


# --- the words of the command line ---

@pytest.mark.parametrize("words, tools", [
    ("", "fetch parse enrich summarize render"),
    ("ingest --exclude fetch", "parse"),
    ("--exclude fetch ingest", "parse"),
    ("--exclude=fetch ingest --exclude enrich analyze", "parse summarize"),
    ("fetch --from fetch enrich", "fetch enrich"),
    ("full --from=summarize --exclude render", ""),
    ("--from enrich", "enrich summarize render"),
])
def test_words_may_stand_before_between_and_after_flags(words, tools, capsys, modules):
    (modules() / "tools").mkdir()
    for name in TOOLS:
        (modules() / "tools" / f"{name}.py").write_text("def run(): pass")
    code = main(TOOLS, STAGES, argv=["--plan", "--json", *words.split()])

    out = capsys.readouterr().out
    assert code == (0 if tools else 2)
    planned = [step["tool"] for step in json.loads(out)["steps"]] if out else []
    assert planned == tools.split()


@pytest.mark.parametrize("flag", ["--excl", "--fro", "--pla"])
def test_a_flag_is_never_guessed_from_its_beginning(flag, capsys):
    assert main(TOOLS, STAGES, argv=["--plan", flag, "fetch"]) == 2
    assert f"There is no flag '{flag}'." in capsys.readouterr().err


# --- what a run would refuse ---

REFUSED = """
def add_arguments(parser):
    parser.add_argument("--since")

NAME = "refused"
TOOL_MAP = {"a": "a", "items": {"module": "items", "retries": 1}, "gone": "itms",
            "each": {"module": "each", "each": "a"}, "broken": "broken", "empty": "empty",
            "asks": "asks", "period": "period"}
STAGES = {"full": ["a", "items"]}
"""
NO_LAMBDA = """
get_connection = lambda: None
"""


@pytest.mark.parametrize("words, above, says", [
    (["gone"], "", "TOOL_MAP['gone']: there is no module 'itms'.\n  Did you mean 'items'?"),
    (["each"], "", "TOOL_MAP['each']: 'each' is 'a', which has no items."),
    (["--item", "x"], "", "--item is for a single tool with items; the plan has a, items."),
    (["a", "--item", "x"], "", "--item is for a single tool with items; the plan has a."),
    (["--retry-items", "itms"], "", "--retry-items: 'itms' is no tool with items in this plan.\n"
                                    "  Did you mean 'items'?"),
    (["a", "--retry-items", "items"], "", "--retry-items: 'items' is no tool with items"),
    (["--since", "monday"], "del TOOL_MAP['broken'], TOOL_MAP['gone']",
     "--since: no tool takes 'since'."),
    (["broken"], "", "TOOL_MAP['broken']: importing broken failed, broken.py:1:"),
    (["empty"], "", "TOOL_MAP['empty']: empty.py has no function run()."),
    (["asks"], "", "TOOL_MAP['asks']: run() of asks asks for 'unheard_of', which nothing gives."),
    (["period"], "", "which only --backfill gives."),
    (["period", "gone", "--backfill", "2013-01-01..2013-01-01"], "", "there is no module 'itms'."),
    (["-j", "2"], NO_LAMBDA, "get_connection can not be sent to a worker process"),
    ([], "def get_connection(x): pass", "get_connection() asks for 'x', which nothing gives."),
])
def test_a_plan_that_a_run_would_refuse_is_refused_alike(quick, words, above, says):
    quick.pipeline(REFUSED + above).tool("a", "def run(): pass").tool("each", "def run(item): pass")
    quick.tool("items", "def items(): return []\ndef run(item): pass").tool("broken", "def run(:")
    quick.tool("empty", "x = 1").tool("asks", "def run(unheard_of): pass")
    quick.tool("period", "def run(period_start): pass")

    planned, ran = quick.run("--plan", *words, "--force"), quick.run(*words, "--force")

    assert says in planned.err
    assert (planned.code, planned.out) == (ran.code, "") == (2, "")
    assert planned.err == ran.err.replace("\nPeriod 2013-01-01 to 2013-01-02 (1 of 1)\n", "")
