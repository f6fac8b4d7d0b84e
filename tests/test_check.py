"""--check: reads every module, imports none, and reports all mistakes at once."""
import os
import sys
import textwrap

import pytest

from orchestrator import main

RAISES = "raise SystemExit('imported')\n"


@pytest.fixture
def check(sandbox, monkeypatch, capsys):
    """Return check(tool_map) -> (exit code, the lines printed), in the sandbox's folder."""
    monkeypatch.syspath_prepend(str(sandbox.folder))
    monkeypatch.chdir(sandbox.folder)

    def get_connection():
        raise AssertionError("a connection was opened by --check")

    def call(tool_map, **more):
        before = set(sys.modules)
        code = main(tool_map, {}, get_connection, argv=["--check"], **more)
        printed = capsys.readouterr()
        assert printed.err == ""
        assert not [name for name in set(sys.modules) - before if name.startswith("ck_")]
        return code, printed.out.splitlines()

    return call


@pytest.fixture
def check_source(sandbox, check):
    """Return check_source(text of one module) -> (exit code, the lines printed)."""
    def call(source, **more):
        sandbox.tool("ck_tool", source)
        return check({"tool": "ck_tool"}, **more)

    return call


def is_clean(ended):
    """Return whether --check found no mistake in one tool."""
    return ended == (0, ["1 tool read, no mistakes found"])


# --- modules ---

def test_a_pipeline_without_mistakes_ends_with_success(sandbox, check):
    sandbox.tool("ck_a", "def run(conn, **kwargs): pass").tool("ck_b", "def run(): pass")

    assert check({"a": "ck_a", "b": "ck_b"}) == (0, ["2 tools read, no mistakes found"])


def test_mistakes_of_the_tables_and_of_the_modules_are_told_together(sandbox, check):
    sandbox.tool("ck_a", "def run(conn: pass").tool("ck_b", "def run(): pass")

    code, lines = check({"a": "ck_a", "b": {"module": "ck_b", "retry": 1}, "c": "ck_missing",
                         "d": {"module": "ck_b", "needs": ["b", "nobody"]}}, limits={"db": 0})

    assert code == 2
    assert lines[-1] == "3 tools read, 5 mistakes found"
    for part in ("TOOL_MAP['b']: there is no option 'retry'", "no tool 'nobody'", "LIMITS['db']",
                 "ck_a.py:1: ", "TOOL_MAP['c']: there is no module"):
        assert [part in line for line in lines].count(True) == 1, part


def test_the_modules_are_read_also_where_the_graph_has_no_order(sandbox, check):
    sandbox.tool("ck_a", "def walk(): pass")

    code, lines = check({"a": {"module": "ck_a", "needs": ["b"]},
                         "b": {"module": "ck_a", "needs": ["a"]}})

    assert code == 2 and "in a circle" in lines[0] and "ck_a.py:1: " in lines[2]


def test_no_module_is_imported(check_source):
    assert is_clean(check_source(RAISES + "def run(conn): pass"))


def test_a_missing_module_is_a_mistake_with_the_nearest_one_beside_it(sandbox, check):
    sandbox.tool("ck_tools.fetch", "def run(conn): pass")

    code, lines = check({"fetch": "ck_tools.fetc"})

    assert code == 2
    assert lines[0] == "TOOL_MAP['fetch']: there is no module 'ck_tools.fetc'."
    assert lines[1].startswith("  Did you mean 'ck_tools.fetch'?")
    assert lines[2:] == ["1 tool read, 1 mistake found"]


@pytest.mark.parametrize("path", ["ck_none", "ck_none.fetch", "ck_a.fetch", "ck_pkg.sub.fetch"])
def test_a_module_is_missing_wherever_its_path_breaks_off(sandbox, check, path):
    sandbox.tool("ck_a", "def run(conn): pass").tool("ck_pkg.__init__", "")

    code, lines = check({"fetch": path})

    assert code == 2
    assert lines[0] == f"TOOL_MAP['fetch']: there is no module {path!r}."
    assert lines[1].startswith("  ")


def test_a_package_is_not_imported_to_find_a_module_in_it(sandbox, check):
    sandbox.tool("ck_pkg.__init__", RAISES).tool("ck_pkg.sub.__init__", RAISES)
    sandbox.tool("ck_pkg.sub.mod", "def run(conn): pass")

    assert is_clean(check({"tool": "ck_pkg.sub.mod"}))


def test_a_module_in_folders_without_init_is_found(sandbox, check):
    sandbox.tool("ck_one.two.three.four.mod", "def run(conn): pass")
    sandbox.tool("ck_one.two.three.pkg.__init__", RAISES)
    sandbox.tool("ck_one.two.three.pkg.mod", "def run(conn): pass")

    assert check({"deep": "ck_one.two.three.four.mod", "mixed": "ck_one.two.three.pkg.mod"}) \
        == (0, ["2 tools read, no mistakes found"])


def test_a_tool_may_be_a_package(sandbox, check):
    sandbox.tool("ck_good.__init__", RAISES + "def run(conn): pass")
    sandbox.tool("ck_bad.__init__", RAISES)

    code, lines = check({"good": "ck_good", "bad": "ck_bad"})

    assert code == 2
    assert len([line for line in lines if "no function run()" in line]) == 1
    assert "__init__.py" in lines[0] and "TOOL_MAP['bad']" in lines[0]


def test_a_folder_of_modules_is_no_module_with_run(sandbox, check):
    sandbox.tool("ck_folder.fetch", "def run(conn): pass")

    code, lines = check({"fetch": "ck_folder"})

    assert code == 2
    assert "TOOL_MAP['fetch']" in lines[0]


def test_a_module_without_source_is_not_a_mistake(check):
    assert is_clean(check({"tool": "math:gcd"}))


@pytest.mark.parametrize("source, line, said", [
    ("x = 1\n\ndef run(conn)\n    pass\n", 3, "SyntaxError"),
    ("def run(conn):\n    x = (1 +\n", 2, "SyntaxError"),
    ("def run(conn):\n    pass\n  x = 1\n", 3, "IndentationError"),
])
def test_a_syntax_error_is_a_mistake_with_file_and_line(check_source, source, line, said):
    code, lines = check_source(source)

    assert code == 2
    assert lines[0].startswith(f"ck_tool.py:{line}: {said}: ")
    assert lines[1].startswith("  ")


@pytest.mark.parametrize("content", [b"def run(conn): pass\n\0", b"x = '\xe9'\n",
                                     b"# coding: nonsense\ndef run(conn): pass\n"])
def test_a_file_that_is_no_python_text_is_a_mistake_with_its_name(sandbox, check, content):
    (sandbox.folder / "ck_tool.py").write_bytes(content)

    code, lines = check({"tool": "ck_tool"})

    assert code == 2
    assert lines[0].startswith("ck_tool.py:")
    assert lines[-1] == "1 tool read, 1 mistake found"


def test_a_file_may_declare_another_encoding(sandbox, check):
    (sandbox.folder / "ck_tool.py").write_bytes(
        b"# -*- coding: latin-1 -*-\nNAME = '\xe9'\ndef run(conn): pass\n")

    assert is_clean(check({"tool": "ck_tool"}))


# --- run() and check() ---

@pytest.mark.parametrize("source", [
    "def run(conn): pass",
    "def run(): pass",
    "def run(**kwargs): pass",
    "def run(conn, context): pass",
    "def run(conn, since=None): pass",
    "def run(*, conn, since=None): pass",
    "async def run(conn, **kwargs): pass",
    "@wrap\ndef run(anything, at, all): pass",  # what a decorator makes of it, nobody knows
    "from elsewhere import run",
    "from elsewhere import start as run",
    "from elsewhere import *",
    "from functools import partial\nrun = partial(print, 1)",
    "class run:\n    def __init__(self, conn): pass",
    "if True:\n    def run(conn): pass\nelse:\n    def run(conn): pass",
    "try:\n    from fast import run\nexcept ImportError:\n    def run(conn): pass",
    "def run(conn): pass\ndef check(conn): pass",
    "def run(conn): pass\ndef helper(a, b): pass",
])
def test_a_run_that_can_take_what_it_is_given_is_accepted(check_source, source):
    assert is_clean(check_source(source))


@pytest.mark.parametrize("source, kind", [
    ("run = 3", "an int"), ("import os\n\nrun: list = []", "a list"),
    ("run = other = {}", "a dict"),
    ("def run(): pass\nrun = None", "a NoneType"),
])
def test_a_run_that_is_plain_data_is_told_by_its_type(check_source, source, kind):
    code, lines = check_source(source)
    line = len(source.splitlines())
    assert code == 2 and lines[:2] == [
        f"ck_tool.py:{line}: TOOL_MAP['tool']: run of ck_tool.py is {kind}, not a function.",
        "  Write `def run(conn, **kwargs):` in it."]


@pytest.mark.parametrize("source", [
    "run = print", "import functools\nrun = functools.partial(print)", "run = lambda: 1",
    "run = [print][0]",
])
def test_a_run_that_is_made_by_an_expression_is_no_mistake(check_source, source):
    assert is_clean(check_source(source))


@pytest.mark.parametrize("source", [
    "", "x = 1", "def start(conn): pass",
    "def make():\n    def run(conn): pass",
    "class Tool:\n    def run(self, conn): pass",
])
def test_a_module_without_run_is_a_mistake(check_source, source):
    code, lines = check_source(source)

    assert code == 2
    assert lines[0] == "ck_tool.py:1: TOOL_MAP['tool']: ck_tool.py has no function run()."
    assert "def run(conn, **kwargs):" in lines[1]


def test_a_module_without_run_is_shown_what_comes_near(check_source):
    _, lines = check_source("def runn(conn): pass")

    assert lines[1].startswith("  Did you mean 'runn'? Write `def run(conn")


@pytest.mark.parametrize("source, line, said", [
    ("\ndef run(conn, since): pass", 2, "run() of ck_tool asks for 'since'"),
    ("async def run(conn, since): pass", 1, "run() of ck_tool asks for 'since'"),
    ("def run(conn, *, since): pass", 1, "run() of ck_tool asks for 'since'"),
    ("def run(since, **kwargs): pass", 1, "run() of ck_tool asks for 'since'"),
    ("def run(conn, /, **kwargs): pass", 1, "run() of ck_tool takes 'conn' by position only"),
    ("def run(conn): pass\n\ndef check(conn, since): pass", 3,
     "check() of ck_tool asks for 'since'"),
])
def test_a_run_that_can_not_take_what_it_is_given_is_a_mistake(check_source, source, line, said):
    code, lines = check_source(source)

    assert code == 2
    assert lines[0].startswith(f"ck_tool.py:{line}: TOOL_MAP['tool']: {said}")
    assert lines[-1] == "1 tool read, 1 mistake found"


@pytest.mark.parametrize("required", [True, False])
def test_the_flags_of_add_arguments_are_what_run_is_given(check_source, required):
    def add_arguments(parser):
        parser.add_argument("--day-from", required=required)

    assert is_clean(check_source("def run(conn, day_from): pass", add_arguments=add_arguments))


def test_the_function_behind_the_colon_is_the_one_that_is_checked(sandbox, check):
    sandbox.tool("ck_tool", """
        def load(conn): pass
        def store(conn, since): pass
    """)

    code, lines = check({"load": "ck_tool:load", "store": "ck_tool:store", "gone": "ck_tool:stor"})

    assert code == 2
    assert lines[0].startswith("ck_tool.py:3: TOOL_MAP['store']: store() of ck_tool asks for")
    assert lines[2] == "ck_tool.py:1: TOOL_MAP['gone']: ck_tool.py has no function stor()."
    assert "Did you mean 'store'?" in lines[3]
    assert lines[4:] == ["3 tools read, 2 mistakes found"]


def test_a_mistake_in_a_module_that_tools_share_is_reported_once(sandbox, check):
    sandbox.tool("ck_tool", """
        def load(conn, since=0): conn.execute(f"DELETE FROM t WHERE x = {since}")
        def store(conn): pass
    """)

    code, lines = check({"load": "ck_tool:load", "store": "ck_tool:store"})

    assert code == 2
    assert len([line for line in lines if line.startswith("ck_tool.py:2: ")]) == 1
    assert lines[-1] == "2 tools read, 1 mistake found"


# --- SQL with values in it ---

def in_run(*statements):
    """Return the source of a tool with these statements in run()."""
    return "def run(conn, since=None, rows=(), n=1):\n" \
        + textwrap.indent("\n".join(statements), "    ") + "\n"


BUILT = {
    "f-string": ['conn.execute(f"DELETE FROM t WHERE day = {since}")'],
    "f-string in quotes": ['''conn.execute(f"DELETE FROM t WHERE day = '{since}'")'''],
    "percent": ['conn.execute("DELETE FROM t WHERE day = %s" % since)'],
    "percent with a tuple": ['conn.execute("DELETE FROM t WHERE day = %s" % (since,))'],
    "plus": ['conn.execute("DELETE FROM t WHERE day = " + since)'],
    "plus in the middle": ['conn.execute("DELETE " + since + " FROM t")'],
    "plus str()": ['conn.execute("DELETE FROM t WHERE day = " + str(since))'],
    "format": ['conn.execute("DELETE FROM t WHERE day = {}".format(since))'],
    "format by name": ['conn.execute("DELETE FROM t WHERE day = {d}".format(d=since))'],
    "executemany": ['conn.executemany(f"INSERT INTO {since} VALUES (?)", rows)'],
    "executescript": ['conn.executescript("DROP TABLE " + since)'],
    "a cursor": ['conn.cursor().execute(f"DELETE FROM {since}")'],
    "a result": ['return conn.execute(f"SELECT {since}").fetchall()'],
    "a variable": ['sql = f"DELETE FROM {since}"', "conn.execute(sql)"],
    "a variable with a type": ['sql: str = f"DELETE FROM {since}"', "conn.execute(sql)"],
    "a variable by percent": ['sql = "DELETE FROM %s" % since', "conn.execute(sql)"],
    "a variable made longer": ['sql = "DELETE FROM t"', 'sql += f" WHERE day = {since}"',
                               "conn.execute(sql)"],
    "a variable that is a template": ['sql = "DELETE FROM {}"', "conn.execute(sql.format(since))"],
    "a variable of a variable": ['where = f"WHERE day = {since}"',
                                 'conn.execute(f"DELETE FROM t {where}")'],
    "inside if": ["if since:", '    conn.execute(f"DELETE FROM {since}")'],
    "inside for": ["for row in rows:", '    conn.execute(f"DELETE FROM {row}")'],
    "inside with": ["with conn:", '    conn.execute(f"DELETE FROM {since}")'],
    "inside try": ["try:", "    pass", "finally:", '    conn.execute(f"DELETE FROM {since}")'],
    "in a function inside": ["def inner():", '    conn.execute(f"DELETE FROM {since}")'],
    "half of it a constant": ['conn.execute(f"DELETE FROM {TABLE} WHERE day = {since}")'],
    "a list of values": ['''conn.execute(f"SELECT {', '.join(rows)}")'''],
}

SAFE = {
    "a constant": ['conn.execute("DELETE FROM t")'],
    "values bound": ['conn.execute("DELETE FROM t WHERE day = ?", (since,))'],
    "a built value, bound": ['conn.execute("DELETE FROM t WHERE day = ?", (f"{since}-01",))'],
    "an f-string of nothing": ['conn.execute(f"DELETE FROM t")'],
    "constants added": ['conn.execute("DELETE " + "FROM t")'],
    "constants side by side": ['conn.execute("DELETE "', '             f"FROM {TABLE}")'],
    "a name in capitals": ['conn.execute(f"DELETE FROM {TABLE} WHERE x = ?", (n,))'],
    "a setting in capitals": ['conn.execute(f"DELETE FROM {settings.TABLE}")'],
    "a number": ['conn.execute(f"SELECT * FROM t LIMIT {int(n)}")'],
    "a count": ['conn.execute("SELECT * FROM t LIMIT %d" % len(rows))'],
    "a list of marks": ['''conn.execute(f"SELECT {', '.join('?' * len(rows))}", rows)'''],
    "marks by a count": ["""conn.execute(f"SELECT {', '.join('?' * n)}", rows)"""],
    "a list of marks by a loop": ['marks = ",".join("?" for _ in rows)',
                                  'conn.execute(f"SELECT {marks}", rows)'],
    "a variable of marks": ['marks = ", ".join("?" * len(rows))',
                            'conn.execute(f"SELECT {marks}", rows)'],
    "a variable of marks by plus": ['marks = ", ".join("?" * len(rows))',
                                    'conn.execute("SELECT (" + marks + ")", rows)'],
    "a clause by a condition": ['where = "WHERE day >= ?" if since else ""',
                                'conn.execute(f"DELETE FROM t {where}", rows)'],
    "a loop over constants": ['for table in ("a", "b"):',
                              '    conn.execute(f"DROP TABLE {table}")'],
    "a variable that was built before": ['sql = f"{since}"', 'sql = "DELETE FROM t"',
                                         "conn.execute(sql)"],
    "a variable made longer by a constant": ['sql = "DELETE FROM t"', 'sql += " WHERE day >= ?"',
                                             "conn.execute(sql, (since,))"],
    "something else than SQL": ['print(f"{since}")', 'log.info("day " + since)'],
    "a statement from elsewhere": ["conn.execute(make_sql())"],
}


@pytest.mark.parametrize("statements", BUILT.values(), ids=BUILT)
def test_sql_with_a_value_written_into_it_is_a_mistake_with_its_line(check_source, statements):
    code, lines = check_source(in_run(*statements))

    line = 1 + next(i for i, text in enumerate(statements, 1) if ".execute" in text)
    assert code == 2
    assert lines[0].startswith(f"ck_tool.py:{line}: a value is written into SQL")
    assert "?" in lines[1] and "# noqa: S608" in lines[1]
    assert lines[-1] == "1 tool read, 1 mistake found"


@pytest.mark.parametrize("statements", SAFE.values(), ids=SAFE)
def test_sql_made_of_constants_alone_is_no_mistake(check_source, statements):
    assert is_clean(check_source("TABLE = 't'\n" + in_run(*statements)))


@pytest.mark.parametrize("source", [
    'def helper(conn, x): conn.execute(f"DELETE FROM {x}")\ndef run(conn): pass',
    'async def run(conn, x=0): await conn.execute(f"DELETE FROM {x}")',
    'class Table:\n    def drop(self, conn): conn.execute(f"DROP {self.name}")\n'
    'def run(conn): pass',
    'from elsewhere import x, conn\nconn.execute(f"DELETE FROM {x}")\ndef run(conn): pass',
])
def test_built_sql_is_found_in_the_whole_module(check_source, source):
    code, lines = check_source(source)

    assert code == 2
    assert lines[-1] == "1 tool read, 1 mistake found"


@pytest.mark.parametrize("statement", [
    "text = join('a', 'b')", "text = format(n, ',')", "text = functions[0](n)",
    "text = (lambda: n)()", "text = ', '.join(*rows)", "a = b = n", "rows[0] = f'{n}'",
    "a, *b = rows", "text = f'{n:>{n}}'", "self.execute()", "conn.execute(*rows)",
    "conn.execute(sql=f'{n}')",
])
def test_no_ordinary_statement_is_too_strange_to_be_read(check_source, statement):
    code, lines = check_source(in_run(statement))

    assert code in (0, 2), lines
    assert lines[-1].startswith("1 tool read, ")


def test_a_variable_is_judged_in_its_own_function(check_source):
    assert is_clean(check_source("""
        def other(since):
            sql = f"{since}"
            return sql

        def run(conn):
            sql = "DELETE FROM t"
            conn.execute(sql)
    """))


@pytest.mark.parametrize("comment, is_accepted", [
    ("# noqa: S608", True), ("# noqa: E501, S608", True), ("# noqa: S608 - names of tables", True),
    ("# noqa", True), ("# noqa: E501", False), ("# safe", False),
])
def test_a_person_may_vouch_for_a_line_of_sql(check_source, comment, is_accepted):
    ended = check_source(in_run(f'conn.execute(f"DELETE FROM {{since}}")  {comment}'))

    assert is_clean(ended) is is_accepted


def test_a_person_may_vouch_on_any_line_of_a_long_statement_and_for_no_other(check_source):
    code, lines = check_source(in_run(
        "conn.execute(", '    f"DELETE FROM {since}"  # noqa: S608', ")",
        'conn.execute(f"DELETE FROM {since}")'))

    assert code == 2
    assert lines[0].startswith("ck_tool.py:5: ")
    assert lines[-1] == "1 tool read, 1 mistake found"


# --- all of it ---

def test_all_mistakes_are_reported_at_once_with_file_and_line(sandbox, check):
    sandbox.tool("ck_tools.syntax", "x = 1\ndef run(:\n")
    sandbox.tool("ck_tools.norun", "def main(): pass\n")
    sandbox.tool("ck_tools.many", '''
        def run(conn, since, until):
            conn.execute(f"DELETE FROM t WHERE day = {since}")
            conn.execute("DELETE FROM t WHERE day = " + until)
    ''')
    sandbox.tool("ck_tools.good", "def run(conn): pass\n")

    code, lines = check({"gone": "ck_tools.gone", "syntax": "ck_tools.syntax",
                         "norun": "ck_tools.norun", "many": "ck_tools.many",
                         "good": "ck_tools.good"})

    path = os.path.join("ck_tools", "")
    said = [line for line in lines if not line.startswith("  ")]
    assert code == 2
    for begin in ("TOOL_MAP['gone']: there is no module", f"{path}syntax.py:2: SyntaxError",
                  f"{path}norun.py:1: ", f"{path}many.py:2: ", f"{path}many.py:3: ",
                  f"{path}many.py:4: "):
        assert len([line for line in said if line.startswith(begin)]) == 1, begin
    assert said[-1].startswith("5 tools read, ")
    assert not [line for line in said if "good" in line]


def test_every_argument_that_nothing_supplies_is_reported(check_source):
    _, lines = check_source("def run(conn, since, until): pass")

    assert "'since'" in "".join(lines)
    assert "'until'" in "".join(lines)


def test_an_unknown_target_is_refused_beside_check_too(capsys):
    assert main({"fetch": "ck_gone"}, {}, argv=["--check", "fetc"]) == 2
    assert "'fetc'" in capsys.readouterr().err


MARKED = '''
TOOL_MAP = {"fetch": "tools.fetch", "parse": "tools.parse"}

def get_connection():
    Path(__file__).with_name("opened").touch()
'''
MARKING = '''
from pathlib import Path
Path("imported").touch()

def run(conn):
    Path("run").touch()
'''


@pytest.mark.parametrize("with_mistake", [True, False])
def test_the_command_imports_and_opens_nothing_and_tells_by_its_exit_code(sandbox, with_mistake):
    sandbox.pipeline(MARKED).tool("tools.__init__", MARKING).tool("tools.fetch", MARKING)
    sandbox.tool("tools.parse", MARKING + ("\ndef check(conn, x): pass\n" * with_mistake))

    ended = sandbox.run("--check")

    assert ended.code == (2 if with_mistake else 0), ended
    assert ended.err == ""
    assert ("parse.py:8: " in ended.out) is with_mistake
    for mark in ("imported", "opened", "run"):
        assert not (sandbox.folder / mark).exists(), mark


def test_a_missing_last_module_ends_a_run_before_the_first_is_imported(sandbox):
    sandbox.pipeline(MARKED).tool("tools.fetch", MARKING)

    ended = sandbox.run()

    assert ended.code == 2
    assert "TOOL_MAP['parse']: there is no module 'tools.parse'." in ended.err
    assert not (sandbox.folder / "imported").exists()
