"""Which tool starts next: the longest way first, within the limits, with nothing in between."""
import heapq
import json
import random

import pytest
from conftest import TOP

from orchestrator import ALL_BEFORE, Schedule, load_pipeline, make_plan, run_pipeline, simulate

DAGS = TOP.parent / "shared" / "dags"


def pipeline_of(limits=None, **rows):
    """Return a pipeline of rows like a=(5, "b c", {...}): estimate, needs or None, options."""
    return load_pipeline({name: {
        "module": "m", "estimate": row[0],
        **({} if row[1] is None else {"needs": row[1].split()}), **(row[2] if row[2:] else {})}
        for name, row in rows.items()}, limits=limits)


def schedule_of(pipeline, jobs=2):
    """Return the schedule of all tools, and those that are ready from the start."""
    schedule = Schedule(make_plan(pipeline, list(pipeline.tools)).steps, pipeline, jobs)
    return schedule, schedule.begin()


def take(schedule):
    """Return all tools that may start now, in that order."""
    return list(iter(schedule.next, None))


def carry_out(pipeline, jobs, chance=None):
    """Return [(start, end, tool)] of a run in which each tool takes its estimate, or by chance.

    Keeps apart from simulate(), so that the one proves the other.
    """
    plan = make_plan(pipeline, list(pipeline.tools))
    schedule = Schedule(plan.steps, pipeline, jobs)
    now_s, running, ran = 0.0, [], []
    freed = schedule.begin()
    while True:
        for tool in freed:
            schedule.add(tool)
        while len(running) < jobs:
            tool = schedule.next()
            if tool is None:
                break
            took_s = chance.choice([0, 1, 2, 5]) if chance else pipeline.tools[tool].estimate_s
            heapq.heappush(running, (now_s + took_s, chance.random() if chance else 0, tool))
            ran.append((now_s, now_s + took_s, tool))
        if not running:
            return ran
        now_s, _, tool = heapq.heappop(running)
        schedule.release(tool)
        freed = schedule.done(tool)


# --- which is next ---

def test_the_one_with_the_longest_way_to_the_end_is_next():
    """a 1 - d 10     b 5     c 2 - e 2"""
    schedule, ready = schedule_of(pipeline_of(
        a=(1, ""), b=(5, ""), c=(2, ""), d=(10, "a"), e=(2, "c")))
    for tool in ready:
        schedule.add(tool)

    assert sorted(ready) == ["a", "b", "c"]
    assert take(schedule) == ["a", "b", "c"]  # ways of 11, 5 and 4 seconds


def test_of_equal_ways_the_first_in_the_plan_is_next():
    schedule, ready = schedule_of(pipeline_of(b=(1, ""), a=(1, ""), c=(1, "")))
    for tool in reversed(ready):
        schedule.add(tool)

    assert take(schedule) == ["b", "a", "c"]


def test_with_one_job_the_plans_order_counts_because_no_other_is_faster():
    schedule, ready = schedule_of(pipeline_of(a=(1, ""), b=(5, ""), c=(9, ""), d=(1, "c")), jobs=1)
    for tool in reversed(ready):
        schedule.add(tool)

    assert take(schedule) == ["a", "b", "c"]


def test_a_way_leads_through_tools_that_wait_for_all_before_them():
    """a 1, b 2, then c(*) 10, d 5: both a and b lead to c, d to the end only"""
    schedule, ready = schedule_of(pipeline_of(a=(1, ""), b=(2, ""), c=(10, None), d=(5, "")))
    for tool in ready:
        schedule.add(tool)

    assert take(schedule) == ["b", "a", "d"]


def test_a_tool_is_ready_when_the_last_of_its_needs_is_done():
    """a - c, b - c"""
    schedule, ready = schedule_of(pipeline_of(a=(1, ""), b=(1, ""), c=(1, "a b")))

    assert (ready, schedule.done("a"), schedule.done("b")) == (["a", "b"], [], ["c"])


def test_a_tool_that_waits_for_all_before_it_is_ready_when_the_last_of_them_is_done():
    """a  b  then c(*), d(*)   and e, which needs nothing, after them"""
    schedule, ready = schedule_of(pipeline_of(
        a=(1, ""), b=(1, ""), c=(1, None), d=(1, None), e=(1, "")))

    assert ready == ["a", "b", "e"]
    assert [schedule.done(tool) for tool in "beacd"] == [[], [], ["c"], ["d"], []]


def test_what_is_behind_in_the_plan_frees_nobody_before():
    schedule, ready = schedule_of(pipeline_of(a=(1, None), b=(1, None), z=(1, "")))

    assert ready == ["a", "z"]
    assert (schedule.done("z"), schedule.done("a"), schedule.done("b")) == ([], ["b"], [])


def test_a_need_outside_the_plan_is_not_waited_for():
    pipeline = pipeline_of(a=(1, ""), b=(1, "a"))
    schedule = Schedule(make_plan(pipeline, ["b"]).steps, pipeline, 2)

    assert schedule.begin() == ["b"]


def test_nothing_is_next_when_nothing_is_ready():
    schedule, _ = schedule_of(pipeline_of(a=(1, "")))

    assert schedule.next() is None


def test_taking_all_gives_the_ready_tools_in_the_plans_order_once():
    schedule, ready = schedule_of(pipeline_of(
        {"x": 1}, a=(1, ""), b=(9, "", {"uses": {"x": 1}}), c=(5, "")))
    for tool in reversed(ready):
        schedule.add(tool)

    assert (schedule.take_all(), schedule.take_all(), take(schedule)) == (["a", "b", "c"], [], [])


# --- limits ---

def test_what_has_no_room_waits_and_lets_others_go_first():
    """Two units of db: a takes both, b and c one each; d takes none."""
    schedule, ready = schedule_of(pipeline_of(
        {"db": 2}, a=(9, "", {"uses": {"db": 2}}), b=(8, "", {"uses": {"db": 1}}),
        c=(7, "", {"uses": {"db": 1}}), d=(6, "")))
    for tool in ready:
        schedule.add(tool)

    assert take(schedule) == ["a", "d"]
    schedule.release("a")
    assert take(schedule) == ["b", "c"]


def test_a_tool_that_takes_more_of_a_resource_does_not_block_one_that_takes_less():
    schedule, ready = schedule_of(pipeline_of(
        {"db": 3}, a=(9, "", {"uses": {"db": 2}}), b=(8, "", {"uses": {"db": 2}}),
        c=(7, "", {"uses": {"db": 1}})))
    for tool in ready:
        schedule.add(tool)

    assert take(schedule) == ["a", "c"]


def test_room_is_needed_of_every_resource_that_a_tool_uses():
    schedule, ready = schedule_of(pipeline_of(
        {"db": 1, "gpu": 1}, a=(9, "", {"uses": {"db": 1}}), c=(8, "", {"uses": {"gpu": 1}}),
        b=(7, "", {"uses": {"db": 1, "gpu": 1}})))
    for tool in ready:
        schedule.add(tool)

    assert take(schedule) == ["a", "c"]
    schedule.release("a")
    assert take(schedule) == []
    schedule.release("c")
    assert take(schedule) == ["b"]


# --- never a barrier ---

def test_a_tool_starts_when_its_own_needs_are_done_and_not_when_a_wave_is():
    """a 1 - b 1 - c 1    x 10 - y 1: waves would hold b back until x has ended"""
    ran = carry_out(pipeline_of(a=(1, ""), b=(1, "a"), c=(1, "b"), x=(10, ""), y=(1, "x")), 2)

    assert {tool: start for start, _, tool in ran} == {"a": 0, "x": 0, "b": 1, "c": 2, "y": 10}


def test_a_tool_that_waits_for_all_before_it_holds_back_nobody_else():
    """x 10, then s(*) 1, and a 1 - b 1 after it in the plan, which need nothing of them"""
    ran = carry_out(pipeline_of(x=(10, ""), s=(1, None), a=(1, ""), b=(1, "a")), 2)

    assert {tool: start for start, _, tool in ran} == {"x": 0, "a": 0, "b": 1, "s": 10}


def test_in_worker_processes_too_nothing_waits_for_a_wave(modules):
    """a - b    x, which ends only after b has"""
    folder = modules(works="def run(): pass", patient="""
        import pathlib, time
        def run():
            end_s = time.monotonic() + 20
            while not pathlib.Path(__file__).with_name("go").exists():
                assert time.monotonic() < end_s, "b never ended"
                time.sleep(0.01)
    """)

    def on_event(event):
        if event.kind == "tool_ended" and event.tool == "b":
            (folder / "go").touch()

    result = run_pipeline([], {"x": {"module": "patient", "needs": []},
                               "a": {"module": "works", "needs": []},
                               "b": {"module": "works", "needs": ["a"]}},
                          jobs=2, on_event=on_event)

    assert result.errors == {}


# --- whatever the graph ---

def make_random_pipeline(chance):
    """Return a pipeline of up to 25 tools: some need others, some all before them, some use."""
    limits = {"db": chance.randint(1, 3), "gpu": chance.randint(1, 2)}
    tools = {}
    for i in range(chance.randint(1, 25)):
        row = tools[f"t{i}"] = {"module": "m", "estimate": chance.choice([0, 1, 2, 5, 30])}
        density = chance.choice([0.1, 0.4])
        if chance.random() < 0.8:
            row["needs"] = [f"t{j}" for j in range(i) if chance.random() < density]
        if chance.random() < 0.4:
            row["uses"] = {name: chance.randint(1, most) for name, most in limits.items()
                           if chance.random() < 0.7}
    return load_pipeline(tools, limits=limits)


@pytest.mark.parametrize("seed", range(150))
def test_whatever_the_graph_every_tool_runs_once_after_its_needs_and_within_the_limits(seed):
    chance = random.Random(seed)
    pipeline, jobs = make_random_pipeline(chance), chance.choice([1, 2, 3, 8, 100])
    steps = make_plan(pipeline, list(pipeline.tools)).steps

    ran = carry_out(pipeline, jobs, chance if seed % 2 else None)

    assert sorted(tool for _, _, tool in ran) == sorted(pipeline.tools)
    start = {tool: start_s for start_s, _, tool in ran}
    end = {tool: end_s for _, end_s, tool in ran}
    turn = {tool: i for i, (_, _, tool) in enumerate(ran)}
    names = [step.tool for step in steps]
    for i, step in enumerate(steps):
        for need in names[:i] if step.needs == ALL_BEFORE else step.needs:
            assert end[need] <= start[step.tool] and turn[need] < turn[step.tool]
    moments = {moment for each in ran for moment in each[:2]}
    for now_s in moments:  # those that take no time are left out: they are gone in an instant
        at_once = [tool for start_s, end_s, tool in ran if start_s <= now_s < end_s]
        assert len(at_once) <= jobs
        for resource, most in pipeline.limits.items():
            used = [dict(pipeline.tools[tool].uses).get(resource, 0) for tool in at_once]
            assert sum(used) <= most


@pytest.mark.parametrize("seed", range(60))
def test_no_job_is_idle_while_a_tool_could_start(seed):
    chance = random.Random(seed)
    pipeline, jobs = make_random_pipeline(chance), chance.choice([1, 2, 3])
    steps = {step.tool: step for step in make_plan(pipeline, list(pipeline.tools)).steps}
    names = list(steps)

    ran = carry_out(pipeline, jobs)

    end = {tool: end_s for _, end_s, tool in ran}
    for start_s, _, tool in ran:
        needed = names[:names.index(tool)] if steps[tool].needs == ALL_BEFORE \
            else steps[tool].needs
        ready_s = max((end[need] for need in needed), default=0.0)
        for now_s in {each[1] for each in ran if ready_s <= each[1] < start_s} | {ready_s}:
            if now_s == start_s:
                continue
            at_once = [each for begin, until, each in ran if begin <= now_s < until]
            is_short = any(
                units + sum(dict(pipeline.tools[each].uses).get(name, 0) for each in at_once)
                > pipeline.limits[name] for name, units in pipeline.tools[tool].uses)
            assert len(at_once) == jobs or is_short, f"{tool} could have started at {now_s}"


@pytest.mark.parametrize("seed", range(40))
def test_what_a_plan_expects_is_what_a_run_of_it_takes(seed):
    chance = random.Random(seed)
    pipeline, jobs = make_random_pipeline(chance), chance.choice([1, 2, 3, 8])

    ran = carry_out(pipeline, jobs)

    expected_s = make_plan(pipeline, list(pipeline.tools), jobs=jobs).expected_s
    assert expected_s == pytest.approx(max(end_s for _, end_s, _ in ran))


@pytest.mark.parametrize("seed", range(40))
def test_with_a_job_for_each_tool_a_plan_takes_as_long_as_its_critical_path(seed):
    chance = random.Random(seed)
    pipeline = make_random_pipeline(chance)
    free = pipeline._replace(tools={name: tool._replace(uses=())
                                    for name, tool in pipeline.tools.items()})

    plan = make_plan(free, list(free.tools), jobs=1000)

    assert plan.expected_s == sum(free.tools[tool].estimate_s for tool in plan.critical_path)


# --- recorded workflows ---

def load_dag(file):
    """Return a recorded workflow as a pipeline."""
    tasks = json.loads(file.read_text(encoding="utf-8"))["tasks"]
    return load_pipeline({task["name"]: {"module": "m", "needs": task["needs"],
                                         "estimate": task["seconds"]} for task in tasks})


def simulate_naively(steps, durations_s, jobs, key):
    """Return the seconds that a plan takes if the ready are served in the order of a key."""
    missing = {step.tool: len(step.needs) for step in steps}
    after = {step.tool: [] for step in steps}
    for step in steps:
        for need in step.needs:
            after[need].append(step.tool)
    place = {step.tool: i for i, step in enumerate(steps)}
    arrivals = 0
    ready, running, now_s = [], [], 0.0

    def arrive(tool):
        nonlocal arrivals
        arrivals += 1
        heapq.heappush(ready, (key(arrivals, place[tool]), tool))

    for tool in [step.tool for step in steps if not step.needs]:
        arrive(tool)
    while ready or running:
        while ready and len(running) < jobs:
            tool = heapq.heappop(ready)[1]
            heapq.heappush(running, (now_s + durations_s[tool], place[tool], tool))
        now_s, _, tool = heapq.heappop(running)
        for each in after[tool]:
            missing[each] -= 1
            if not missing[each]:
                arrive(each)
    return now_s


NAIVE = {"first come, first served": lambda arrival, place: arrival,
         "the order of the list": lambda arrival, place: place}


@pytest.fixture(scope="module")
def makespans():
    """Return {(workflow, jobs): (ours, {naive order: its})} in seconds."""
    files = sorted(DAGS.glob("*.json"))
    if not files:
        pytest.skip("no recorded workflows are here")
    found = {}
    for file in files:
        pipeline = load_dag(file)
        steps = make_plan(pipeline).steps
        durations_s = {name: tool.estimate_s for name, tool in pipeline.tools.items()}
        for jobs in (2, 4, 8, 16):
            ours_s = simulate(Schedule(steps, pipeline, jobs), durations_s, jobs)
            found[file.stem, jobs] = ours_s, {
                name: simulate_naively(steps, durations_s, jobs, key)
                for name, key in NAIVE.items()}
    return found


@pytest.mark.parametrize("naive", NAIVE)
def test_the_longest_way_first_never_loses_two_percent_to_a_naive_order(makespans, naive):
    lost = {which: ours_s / theirs_s[naive] for which, (ours_s, theirs_s) in makespans.items()
            if ours_s > 1.02 * theirs_s[naive]}

    assert lost == {}


@pytest.mark.parametrize("naive", NAIVE)
def test_a_naive_order_loses_a_fifth_to_the_longest_way_first_somewhere(makespans, naive):
    assert max(theirs_s[naive] / ours_s for ours_s, theirs_s in makespans.values()) > 1.2


def test_no_makespan_is_shorter_than_what_is_possible(makespans):
    for (name, jobs), (ours_s, _) in makespans.items():
        facts = json.loads((DAGS / f"{name}.json").read_text(encoding="utf-8"))
        total_s = sum(task["seconds"] for task in facts["tasks"])
        assert ours_s >= total_s / jobs * 0.999_999


def test_the_longest_way_first_is_what_makes_this_graph_short():
    """a 1 - b 1 - c 6, and four of 2 that stand before them in the list; two jobs"""
    pipeline = pipeline_of(p=(2, ""), q=(2, ""), r=(2, ""), s=(2, ""), a=(1, ""), b=(1, "a"),
                           c=(6, "b"))
    steps = make_plan(pipeline).steps
    durations_s = {name: tool.estimate_s for name, tool in pipeline.tools.items()}

    assert simulate(Schedule(steps, pipeline, 2), durations_s, 2) == 8
    assert [simulate_naively(steps, durations_s, 2, key) for key in NAIVE.values()] == [12, 12]
