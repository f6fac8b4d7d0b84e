"""The room DOOR: the command line as its user meets it."""
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import SQLITE

from orchestrator import VERSION, main

TABLES = '''
TOOL_MAP = {"fetch": "t.say", "parse": "t.say", "render": "t.say"}
STAGES = {"ingest": ["fetch", "parse"]}
def add_arguments(parser):
    parser.add_argument("--since")
    parser.add_argument("--limit", type=int, default=9)
'''
SAY = "def run(context, **kwargs): print(context.tool, kwargs.get('since'), kwargs.get('limit'))"


@pytest.fixture
def three(quick):
    return quick.pipeline(TABLES).tool("t.say", SAY)


@pytest.mark.parametrize("words, printed", [
    ("", "fetch parse render"),
    ("ingest", "fetch parse"),
    ("render fetch", "render fetch"),
    ("render ingest fetch", "render fetch parse"),
    ("--exclude parse", "fetch render"),
    ("--from parse", "parse render"),
    ("fetch --since 2013-01-03 parse", "fetch parse"),
    ("-q fetch -x parse", "fetch parse"),
])
def test_words_and_flags_choose_what_runs(three, words, printed):
    ended = three.run(*words.split())
    assert ended.code == 0, ended
    assert [line.split()[0] for line in ended.out.splitlines()] == printed.split()


def test_flags_of_add_arguments_reach_every_tool(three):
    ended = three.run("fetch", "--since", "2013-01-03", "parse", "--limit=4")
    assert ended.out == "fetch 2013-01-03 4\nparse 2013-01-03 4\n"


def test_flags_of_add_arguments_are_in_help_under_their_own_heading(three):
    out = three.run("--help").out
    assert out.index("arguments of the tools:") < out.index("--since") < out.index("--limit")


@pytest.mark.parametrize("words, says", [
    (["fetsh"], "no tool or stage 'fetsh'"),
    (["--sinc", "x"], "no flag '--sinc'"),
    (["--lis"], "no flag '--lis'"),
    (["--limit", "many"], "invalid int value: 'many'"),
    (["--since"], "expected one argument"),
    (["--list", "--plan"], "not allowed with argument"),
    (["--json"], "--json goes with --list, --plan"),
    (["--exclude", "ingest", "--exclude", "render"], "Nothing is left to run"),
    (["--from", "fetch", "render"], "'fetch' is not in this plan"),
    (["--exclude", "nobody"], "no tool or stage 'nobody'"),
])
def test_a_mistake_on_the_command_line_is_told_in_two_sentences(three, words, says):
    ended = three.run(*words)
    assert ended.code == 2 and ended.out == ""
    problem, fix = ended.err.rstrip().split("\n")
    assert says in problem and fix.startswith("  ") and fix.rstrip().endswith((".", "?", "render",
                                                                               "ingest"))


@pytest.mark.parametrize("declaration, says", [
    ('"--list"', "conflicting option string: --list"),
    ('"-x"', "conflicting option string: -x"),
    ('"--conn"', "would reach tools as 'conn'"),
    ('"--context"', "would reach tools as 'context'"),
    ('"--item"', "conflicting option string: --item"),
    ('"--mine", dest="item"', "would reach tools as 'item'"),
    ('"--mine", dest="targets"', "would reach tools as 'targets'"),
    ('"since"', "'since' is not a flag"),
    ('"--a"); parser.add_subparsers(', "add_subparsers() is not a flag"),
    ('"--a", type="x"', "failed: ValueError: 'x' is not callable"),
    ('"--a"); parser.add_argument("--a"', "conflicting option string: --a"),
    ('"--a"); parser.set_defaults(jobs=4', "set_defaults(jobs=...) would reach tools as 'jobs'"),
])
def test_a_flag_that_can_not_be_is_refused_with_a_sentence(quick, declaration, says):
    quick.pipeline(f'''
        TOOL_MAP = {{"t": "t"}}
        def add_arguments(parser):
            parser.add_argument({declaration})
    ''').tool("t", "print('imported')\ndef run(): pass")
    ended = quick.run()
    assert ended.code == 2 and ended.out == "" and says in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("default, words", [("monday", []), (None, ["--day", "monday"])])
def test_a_type_of_a_flag_that_fails_is_told_with_the_flag(quick, default, words):
    quick.pipeline(f"""
        TOOL_MAP = {{"t": "t"}}
        def add_arguments(parser):
            parser.add_argument("--day", type={{}}.__getitem__, default={default!r})
    """).tool("t", "print('imported')\ndef run(day): pass")
    ended = quick.run(*words)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("--day monday: KeyError: 'monday'\n  That comes from its type=")


@pytest.mark.parametrize("name", ["5", "('a', 'b')", "b'sales'"])
def test_a_name_of_the_pipeline_that_is_no_text_is_refused_with_a_sentence(quick, name):
    ended = quick.pipeline(f'NAME = {name}\nTOOL_MAP = {{"t": "t"}}').run("--list")
    assert (ended.code, ended.err) == (
        2, f'NAME is {name}, not text.\n  Write NAME = "sales".\n')


def test_verbose_shows_where_add_arguments_failed(quick):
    quick.pipeline('TOOL_MAP = {"t": "t"}\ndef add_arguments(parser): return 1 / 0')
    assert "return 1 / 0" not in quick.run("--list").err
    assert "return 1 / 0" in quick.run("-v", "--list").err


def test_a_required_flag_is_required_for_a_run_and_not_for_looking(quick):
    quick.pipeline('''
        TOOL_MAP = {"t": "t"}
        def add_arguments(parser):
            parser.add_argument("--day", required=True)
    ''').tool("t", "def run(day): print(day)")
    assert quick.run("--list").code == 0
    ended = quick.run()
    assert ended.code == 2 and "are required: --day" in ended.err
    assert quick.run("--day", "monday").out == "monday\n"


GROUPED = '''
TOOL_MAP = {"t": "t"}
def add_arguments(parser):
    parser.set_defaults(region="north")
    days = parser.add_argument_group("days")
    one = days.add_mutually_exclusive_group(required=True)
    one.add_argument("--day")
    one.add_argument("--week")
    days.add_argument("--year", default=2013)
'''


def test_all_that_add_arguments_declares_reaches_tools_from_groups_in_groups_too(sandbox):
    sandbox.pipeline(GROUPED).tool(
        "t", "def run(day, week, year, region): print(day, week, year, region)")
    ended = sandbox.run("--week", "2", env={"PYTHONWARNINGS": "error"})
    assert ended.out == "None 2 2013 north\n", ended
    assert "not allowed with" in sandbox.run("--week", "2", "--day", "1").err


def test_a_flag_may_be_called_what_the_engine_calls_nothing_of_its_own(quick):
    quick.pipeline('''
        TOOL_MAP = {"t": "t"}
        def add_arguments(parser):
            parser.add_argument("--command")
            parser.add_argument("--given", help="with --json: whatever")
    ''').tool("t", "def run(command, given): print(command, given)")
    assert quick.run("--command", "c", "--given", "g").out == "c g\n"


def test_a_group_of_flags_is_required_for_a_run_and_not_for_looking(quick):
    quick.pipeline(GROUPED).tool("t", "def run(day): print(day)")
    assert quick.run("--plan").code == 0
    ended = quick.run()
    assert ended.code == 2 and "One of the arguments --day --week is required." in ended.err


def test_help_shows_the_groups_of_add_arguments_after_the_engines(quick):
    out = quick.pipeline(GROUPED + '    parser.add_argument("--deep")\n').run("--help").out
    heads = [line for line in out.splitlines() if line.endswith(":") and line[0] != " "]
    assert heads == ["what to run:", "looking and tidying, without running anything:", "other:",
                     "arguments of the tools:", "days:"]


@pytest.mark.parametrize("text", ["5 % off", "at least 100%", "100% sure", "as %(defualt)s"])
def test_a_percent_sign_that_help_could_not_show_is_told_with_its_flag(quick, text):
    quick.pipeline(f'''
        TOOL_MAP = {{"t": "t"}}
        def add_arguments(parser):
            parser.add_argument("--good", default="x", help="10 %% of %(default)s, %(prog)s")
            parser.add_argument("--share", help="{text}")
    ''').tool("t", "def run(): pass")
    ended = quick.run("--help")
    assert (ended.code, ended.out) == (2, "") and "Traceback" not in ended.err
    if sys.version_info < (3, 14):  # which refuses most of these by itself
        assert "in the help of --share" in ended.err and "Write %% for" in ended.err
        assert quick.run().code == 0


def test_version_names_the_engine_and_python(three):
    assert three.run("--version").out == (
        f"orchestrator.py {VERSION}, Python {sys.version.split()[0]}\n")


def test_quiet_says_nothing_of_a_success_and_all_of_a_failure(quick):
    quick.pipeline('TOOL_MAP = {"a": "a", "b": "b"}').tool("a", "def run(): pass").tool(
        "b", "def run(): raise ValueError('no way')")
    assert quick.run("-q", "a").err == ""
    assert "ValueError: no way" in quick.run("-q").err


def test_a_helper_that_an_engine_name_replaces_is_told(sandbox):
    sandbox.pipeline('''
        TOOL_MAP = {"t": "t"}
        def find_module(): pass
        def mine(): pass
    ''').tool("t", "def run(): pass")
    ended = sandbox.run()
    assert ended.code == 2 and ": find_module." in ended.err and "mine" not in ended.err


@pytest.mark.parametrize("above", [
    "def get_conection(): pass", "STAGE = {}", "LIMIT = 5", "class Limits: pass", "_STAGES = {}",
    "from sys import exit", "from io import open", "def license(): return pow(2, 3)",
])
def test_a_pipeline_may_do_without_hooks_and_have_names_of_its_own(sandbox, above):
    sandbox.pipeline('TOOL_MAP = {"t": "t"}\n' + above).tool("t", "def run(): print('ran')")
    assert sandbox.run().out == "ran\n"


def test_a_name_of_the_module_is_no_clash_when_both_import_it(sandbox):
    sandbox.pipeline('import os, sys, re, time\nTOOL_MAP = {"t": "t"}').tool(
        "t", "def run(): pass")
    assert sandbox.run().code == 0


def test_a_pipeline_without_tables_is_told_what_to_write(sandbox):
    ended = sandbox.pipeline("").run()
    assert ended.code == 2 and "TOOL_MAP" in ended.err and "Traceback" not in ended.err


def test_the_working_folder_does_not_matter(sandbox, tmp_path_factory):
    sandbox.pipeline('TOOL_MAP = {"t": "tools.make"}' + SQLITE).tool("tools.make", """
        def run(conn):
            conn.execute("CREATE TABLE here AS SELECT 1 AS x")
    """)
    assert sandbox.run(cwd=tmp_path_factory.mktemp("elsewhere")).code == 0
    assert sandbox.query("SELECT x FROM here") == [(1,)]


def test_a_reader_that_leaves_is_no_error(three):
    shell = f'"{sys.executable}" orchestrator.py --help | head -c 5'
    ended = subprocess.run(shell, shell=True, cwd=three.folder, capture_output=True, text=True)
    assert ended.stdout == "usage" and ended.stderr == ""


FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device")


@FULL
@pytest.mark.parametrize("words", ["--list", "--plan", "--plan --json", "--check", "--help",
                                   "--version", ""])
def test_output_that_can_not_be_written_is_told_in_one_sentence(three, words):
    with open("/dev/full", "w") as full:
        ended = three.run("-q", *words.split(), stdout=full, env={"PYTHONUNBUFFERED": ""})
    assert ended.code == 1, ended
    assert "stdout could not be written: No space left on device" in ended.err
    assert len(ended.err.splitlines()) == 1


@FULL
def test_a_run_that_failed_says_so_also_where_its_output_can_not_be_written(sandbox):
    sandbox.pipeline('TOOL_MAP = {"t": "t"}').tool("t", """
        def run():
            print("lost")
            raise KeyboardInterrupt
    """)
    with open("/dev/full", "w") as full:
        assert sandbox.run(stdout=full, env={"PYTHONUNBUFFERED": ""}).code == 130


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell closes it")
@pytest.mark.parametrize("words, code", [("--list", 1), ("--help", 1), ("", 0)])
def test_a_command_needs_the_stdout_that_a_run_can_do_without(three, words, code):
    shell = f'"{sys.executable}" orchestrator.py -q {words} >&-'
    ended = subprocess.run(shell, shell=True, cwd=three.folder, capture_output=True, text=True)
    assert ended.returncode == code
    assert ended.stderr == code * "stdout could not be written: it is closed.\n"


def test_a_run_goes_on_when_nobody_reads_what_it_says(three):
    read, write = os.pipe()
    os.close(read)
    process = three.start(stderr=write, stdout=subprocess.PIPE)
    os.close(write)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and out.splitlines()[-1].startswith("render")


def test_letters_that_the_terminal_can_not_show_are_escaped(sandbox):
    sandbox.pipeline('TOOL_MAP = {"t": "t"}').tool(
        "t", "def run(): raise ValueError('caf\u00e9')")
    ended = sandbox.run(env={"PYTHONIOENCODING": "ascii"})
    assert ended.code == 1 and "caf\\xe9" in ended.err


def test_a_bug_of_the_engine_is_told_as_such(sandbox):
    path = sandbox.pipeline('TOOL_MAP = {"t": "t"}').folder / "orchestrator.py"
    path.write_text(path.read_text().replace("code = command(",
                                             "code = 1 / 0 or command("))
    ended = sandbox.run("--list", "--json")
    assert ended.code == 3
    assert "ZeroDivisionError" in ended.err and "['--list', '--json']" in ended.err


def test_main_runs_a_second_pipeline_on_the_same_engine(modules, capsys):
    modules(m="def run(day): print(day)")
    code = main({"t": "m"}, {}, None, argv=["--day", "monday"],
                add_arguments=lambda parser: parser.add_argument("--day"))
    assert (code, capsys.readouterr().out) == (0, "monday\n")


def test_json_of_a_list_is_for_programs(three):
    shown = json.loads(three.run("--list", "--json").out)
    assert [tool["name"] for tool in shown["tools"]] == ["fetch", "parse", "render"]


def test_a_program_started_as_a_module_is_named_so_in_the_next_command(sandbox):
    sandbox.pipeline('TOOL_MAP = {"t": "t"}').tool("t", "def run(): raise ValueError")
    ended = subprocess.run([sys.executable, "-m", "orchestrator"], cwd=sandbox.folder, text=True,
                           capture_output=True)
    assert ended.stderr.rstrip().endswith("-m orchestrator --resume")


def test_a_program_started_as_a_module_is_compiled_once(sandbox):
    sandbox.pipeline('TOOL_MAP = {"t": "t"}').tool("t", "def run(): pass")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    said = [subprocess.run([sys.executable, "-v", "-m", "orchestrator", "--list"], text=True,
                           cwd=sandbox.folder, env=env, capture_output=True).stderr
            for _ in range(2)]
    taken = [re.findall(r"# code object from .*orchestrator.*\.pyc", each) for each in said]
    assert (len(taken[0]), len(taken[1])) == (0, 1)
