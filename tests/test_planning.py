"""Targets become a plan: which tools, in which order, each with its reason."""
import json
import random

import pytest

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
    assert refusal("empty").startswith("Nothing is left to run.")


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


# --- whatever the tables ---

def make_random_pipeline(chance):
    """Return a pipeline whose stages contain tools and the stages before them."""
    tools = {f"t{i}": f"m{i}" for i in range(chance.randint(1, 12))}
    stages = {}
    for i in range(chance.randint(1, 10)):
        known = [*tools, *stages]
        stages[f"s{i}"] = [chance.choice(known) for _ in range(chance.randint(1, 6))]
    rows = list(stages.items())
    chance.shuffle(rows)  # a stage may stand before or after those that it contains
    return load_pipeline(tools, dict(rows))


def choose_words(chance, pipeline, most=5):
    """Return some words that may be targets."""
    known = [*pipeline.tools, *pipeline.stages]
    return [chance.choice(known) for _ in range(chance.randint(1, most))]


@pytest.mark.parametrize("seed", range(40))
def test_a_stage_is_planned_as_its_members_typed_one_by_one(seed):
    pipeline = make_random_pipeline(random.Random(seed))

    for stage in pipeline.stages.values():
        assert order(stage.name, pipeline=pipeline) == order(*stage.members, pipeline=pipeline)


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
def test_words_may_stand_before_between_and_after_flags(words, tools, capsys):
    code = main(TOOLS, STAGES, argv=["--plan", "--json", *words.split()])

    out = capsys.readouterr().out
    assert code == (0 if tools else 2)
    planned = [step["tool"] for step in json.loads(out)["steps"]] if out else []
    assert planned == tools.split()


@pytest.mark.parametrize("flag", ["--excl", "--fro", "--pla"])
def test_a_flag_is_never_guessed_from_its_beginning(flag, capsys):
    assert main(TOOLS, STAGES, argv=["--plan", flag, "fetch"]) == 2
    assert f"There is no flag '{flag}'." in capsys.readouterr().err
