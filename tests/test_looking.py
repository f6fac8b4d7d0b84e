"""What people look at beside tables: the graph, why a tool runs, what a shell completes."""
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT

from orchestrator import Style, format_graph, load_pipeline, make_graph, make_plan

TABLES = '''
TOOL_MAP = {
    "orders": {"module": "tools:orders", "needs": []},
    "customers": {"module": "tools:customers", "needs": []},
    "joined": {"module": "tools:joined", "needs": ["orders", "customers"]},
    "audit": {"module": "tools:audit", "needs": ["orders"], "cache": "2h"},
    "report": {"module": "tools:report", "needs": ["joined", "orders"], "fresh_for": "3h"},
    "mail": {"module": "tools:mail", "needs": ["report"]},
}
STAGES = {"full": ["orders", "customers", "joined", "report", "mail"]}


def get_connection():
    return None


def add_arguments(parser):
    parser.add_argument("--day")
'''
TOOLS = '''
"""The tools of a shop."""
import os


def orders():
    """Fetch the orders."""
    return 7


def customers():
    pass


def joined():
    pass


def audit():
    pass


def report(day=None):
    if not os.path.exists("paper"):
        raise ValueError("there is no paper")


def mail():
    pass
'''


@pytest.fixture
def shop(quick):
    return quick.pipeline(TABLES).tool("tools", TOOLS)


# --- the graph ---

def write(sandbox, needs):
    """Write a pipeline in which each tool waits for what `needs` says."""
    tables = {name: {"module": "tools:orders", "needs": which} for name, which in needs.items()}
    return sandbox.pipeline(f"TOOL_MAP = {tables!r}\nSTAGES = {{}}\n"
                            "def get_connection():\n    return None\n").tool("tools", TOOLS)


@pytest.mark.parametrize("needs, drawn", [
    ({"a": [], "b": ["a"], "c": ["b"]}, ["●  a", "●  b", "●  c"]),
    ({"a": [], "b": []}, ["●  a", "", "●  b"]),  # who does not wait is apart
    ({"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]},
     ["●    a", "├─┐", "│ ●  b", "● │  c", "├─┘", "●    d"]),
    ({"a": [], "b": [], "c": ["a"], "d": ["b"], "e": ["c", "d"]},
     ["●    a", "│ ●  b", "● │  c", "│ ●  d", "├─┘", "●    e"]),
    ({"a": [], "b": [], "c": ["a"], "d": ["a", "b"]},  # a line that is crossed goes on
     ["●      a", "│ ●    b", "├─│─┐", "│ │ ●  c", "├─┘", "●      d"]),
    ({"a": [], "b": ["a"], "c": ["b", "a"]}, ["●  a", "●  b", "●  c"]),  # as b waits for a
], ids=["line", "apart", "diamond", "two", "crossing", "implied"])
def test_a_graph_is_drawn_in_lines(quick, needs, drawn):
    out = write(quick, needs).run("--graph").out

    assert re.sub("  +", "  ", out) == re.sub("  +", "  ", "\n".join([*drawn, ""]))


LEADS = dict(zip(" ╵╷│╴┘┐┤╶└┌├─┴┬┼", range(16)))  # 1 up, 2 down, 4 left, 8 right


def follow(lines):
    """Return what each tool waits for, read from the lines of a graph as a person does it."""
    columns, found, above = {}, {}, ""
    for line in lines:
        graph, _, name = line.partition("  t")
        at = graph.find("●")
        if at < 0:
            above = graph
            continue
        froms = {at} & {each for each in columns if above[each:each + 1] in ("│", "●")}
        if any(letter in above for letter in "─┘└┌┐├┤"):
            left, right = at, at
            while above[left - 1:left] == "─":
                left -= 2
            while above[right + 1:right + 2] == "─":
                right += 2
            froms = {each for each in range(left, right + 1, 2)
                     if LEADS.get(above[each:each + 1], 0) & 1 and above[each] != "│"}
        found["t" + name] = sorted(columns[each] for each in froms)
        columns = {each: columns[each] for each in columns if graph[each:each + 1] == "│"}
        columns[at], above = "t" + name, graph
    return found


@pytest.mark.parametrize("seed", range(20))
def test_what_a_graph_shows_is_what_tools_wait_for(seed):
    chance = random.Random(seed)  # noqa: S311
    names, needs, before = [f"t{number:02}" for number in range(chance.randrange(2, 40))], {}, {}
    for at, name in enumerate(names):
        some = set(chance.sample(names[:at], min(at, chance.choice((0, 1, 1, 2, 3)))))
        needs[name] = sorted(some)
        before[name] = some.union(*(before[each] for each in some))
    pipeline = load_pipeline({name: {"module": "m", "needs": some} for name, some in needs.items()})
    graph = make_graph(make_plan(pipeline, names).steps, lambda tool: None)

    lines = format_graph(graph, Style()).splitlines()

    assert follow([re.sub(" +t", "  t", line) for line in lines]) == {
        name: [need for need in some if not any(need in before[other] for other in some)]
        for name, some in needs.items()}


def test_a_graph_tells_how_tools_ended_last(shop):
    shop.run()

    lines = [line.split() for line in shop.run("--graph").out.splitlines() if "●" in line]

    told = {name: words for *_, name, words in ((*line, "") if line[-1] in ("audit",) else line
                                                for line in lines)}
    assert told == {"orders": "success", "customers": "success", "joined": "success", "audit": "",
                    "report": "failed", "mail": "skipped"}
    status = {tool["tool"]: tool["status"]
              for tool in json.loads(shop.run("--graph", "--json").out)["tools"]}
    assert status == {name: word or None for name, word in told.items()}


def test_a_graph_is_that_of_the_targets_or_of_all(shop):
    def tools(*words):
        return [tool["tool"] for tool in json.loads(shop.run(*words, "--json").out)["tools"]]

    assert tools("--graph") == ["orders", "customers", "joined", "audit", "report", "mail"]
    assert tools("report", "mail", "--graph") == ["report", "mail"]
    assert tools("+joined", "--graph", "--exclude", "orders") == ["customers", "joined"]


def test_a_terminal_without_such_letters_gets_others(shop):
    out = shop.run("--graph", env={"PYTHONIOENCODING": "ascii"}, cwd=shop.folder).out

    assert re.sub(" +\n", "\n", out).startswith(
        "*     orders\n| *   customers\n+-+\n| *   joined\n")


HOSTILE = ['a "quoted" name', "end", "a[b](c){d}", "x`y`", "a;b%%c", "<b>bold</b> & #35;",
           "back\\slash\\N", "ünï çødé", "graph TD", "a|b", "a-->b", "'single'", "{label}", "日本"]


@pytest.fixture
def hostile(quick):
    return write(quick, {name: HOSTILE[at - 1:at] for at, name in enumerate(HOSTILE)})


def test_mermaid_gets_no_letter_that_it_could_take_for_its_own(hostile):
    head, *lines = hostile.run("--graph", "mermaid").out.splitlines()

    assert head == "flowchart TD"
    node = re.compile(r'  (t\d+)\["((?:[\w ./-]|#\d+;)*)"\]|  style t\d+ fill:#\w{6},color:#111'
                      r"|  t\d+ --> t\d+")
    found = [node.fullmatch(line) for line in lines]
    assert all(found), lines
    labels = [re.sub(r"#(\d+);", lambda code: chr(int(code[1])), match[2])
              for match in found if match[1]]
    assert labels == HOSTILE
    assert lines.count("  t0 --> t1") == 1


def test_graphviz_gets_names_in_quotes(hostile):
    lines = hostile.run("--graph", "dot").out.splitlines()

    node = re.compile(r'  t\d+ \[label="((?:[^"\\]|\\["\\])*)", fillcolor="#\w{6}"\];')
    labels = [re.sub(r"\\(.)", r"\1", node.fullmatch(line)[1])
              for line in lines if "label=" in line and "->" not in line.split("[")[0]]
    assert labels == HOSTILE
    assert "  t0 -> t1;" in lines and lines[0] == "digraph {" and lines[-1] == "}"
    if shutil.which("dot"):
        drawn = subprocess.run(["dot", "-Tplain"], input="\n".join(lines), encoding="utf-8",
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=True)
        assert drawn.stderr == ""
        assert drawn.stdout.count("\nnode ") == len(HOSTILE)


# --- why ---

def test_why_tells_its_place_its_needs_its_attempts_and_its_failure(shop):
    shop.run()

    out = shop.run("--why", "report").out

    for line in ("tool       report\n", "is         tools\n", "does       The tools of a shop.\n",
                 "plan       run, in wave 3: in stage full\n", "needs      joined, orders\n",
                 "needed by  mail\n", "cache      never", "fresh      has never succeeded\n"):
        assert line in out, (line, out)
    assert re.search(r"\n  1  failed +\d\d.* ValueError: there is no paper\n", out)
    assert "It failed last in run 1:\nTraceback" in out
    assert out.endswith("ValueError: there is no paper\n")


def test_why_tells_how_long_a_tool_is_fresh_and_when_it_is_cached(shop):
    shop.folder.joinpath("paper").touch()
    shop.run("+report", "audit", "--day", "mon")

    assert re.search("fresh +for (3h 00m|2h 59m) more\n",
                     shop.run("--why", "report", "--day", "mon").out)
    assert re.search("fresh +has no success to be fresh for", shop.run("--why", "report").out)
    audit = shop.run("--why", "audit", "audit", "--day", "mon").out
    assert re.search("cache +as long as nothing of it changes, for 2h 00m\n", audit)
    assert re.search("plan +cached, in wave 1: unchanged since run 1\n", audit)
    again = shop.run("--why", "audit", "+audit", "--day", "mon").out
    assert re.search("plan +run, in wave 2: .*again, because orders will run\n", again)


def test_why_tells_that_a_tool_is_not_in_the_plan_or_what_is_wrong_with_that(shop):
    assert re.search("plan +it is not in this plan\n", shop.run("--why", "audit").out)
    alone = shop.run("--why", "mail", "mail")
    assert alone.code == 0
    assert "mail needs what is not in this plan: report, which has never succeeded." in alone.out
    assert "Traceback" not in alone.out
    unknown = shop.run("--why", "reprot")
    assert unknown.code == 2 and "Did you mean 'report'?" in unknown.err


def test_why_of_a_tool_that_is_cached_for_ever_has_no_time_to_tell(quick):
    quick.pipeline('TOOL_MAP = {"a": {"module": "tools:orders", "cache": True}}')
    quick.tool("tools", TOOLS)

    out = quick.run("--why", "a").out

    assert "cache  as long as nothing of it changes\n" in out and "needs" not in out


def test_why_tells_a_failure_of_some_items_too(quick):
    quick.pipeline('TOOL_MAP = {"a": {"module": "a"}}').tool("a", """
        def items(): return ["x", "y"]
        def run(item): assert item == "x", "no " + item
    """)
    assert quick.run().code == 1

    out = quick.run("--why", "a").out

    assert "It failed last in run 1:\n" in out and "AssertionError: no y" in out


def test_why_is_data_too(shop):
    shop.run()

    why = json.loads(shop.run("--why", "report", "--json").out)

    assert why["plan"]["action"] == "run" and why["needed_by"] == ["mail"]
    assert why["attempts"][0]["error"] == "ValueError: there is no paper"
    assert "in report\n" in why["failure"]["traceback"]
    assert json.loads(shop.run("--why", "customers", "--json").out)["failure"] is None


# --- words for a shell ---

def complete(shop, shell, *words):
    """Return what bash completes."""
    script = shop.run("--completion", shell).out
    names = " ".join(map(shlex.quote, words))
    asked = (f"{script}\nCOMP_WORDS=({names}); COMP_CWORD={len(words) - 1}; _orchestrator; "
             'printf "%s\\n" "${COMPREPLY[@]}"')
    return subprocess.run(["bash", "-c", asked], cwd=shop.folder, stdout=subprocess.PIPE,
                          encoding="utf-8", env=ENVIRONMENT, timeout=60).stdout.split()


@pytest.mark.skipif(not shutil.which("bash") or os.name == "nt", reason="there is no bash")
def test_bash_completes_targets_flags_and_runs(shop):
    shop.run()
    python = sys.executable

    assert complete(shop, "bash", python, "orchestrator.py", "jo") == ["joined"]
    assert complete(shop, "bash", python, "orchestrator.py", "full", "--gr") == ["--graph"]
    assert complete(shop, "bash", python, "-m", "orchestrator", "--da") == ["--day"]
    assert complete(shop, "bash", python, "orchestrator.py", "--history", "") == ["1"]
    assert complete(shop, "bash", python, "other.py", "jo") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_what_is_printed_for_a_shell_is_of_its_language(shop, shell):
    if not shutil.which(shell):
        pytest.skip(f"there is no {shell}")
    script = shop.run("--completion", shell).out

    checked = subprocess.run([shell, "-n"], input=script, encoding="utf-8",
                             stderr=subprocess.PIPE, timeout=60)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_words_are_asked_for_without_a_history(shop):
    assert shop.run("--completion", "words").out.split()[:3] == ["full", "orders", "customers"]
    assert shop.run("--completion", "runs").out.split() == []
