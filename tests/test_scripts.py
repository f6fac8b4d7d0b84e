"""The tables for a runner that somebody has, which is read and never run; and a new project."""
import ast
import os
import subprocess
import sys
import textwrap

import pytest

import orchestrator
from orchestrator import make_tables

HAS_COMMANDS = "command" in orchestrator.OPTIONS
SH, BASH = ["sh", "-c"], ["bash", "-c"]


class Tables:
    """What was made of a runner: `tools`, `stages`, `flags`, and the lines `not_read`."""

    def __init__(self, text):
        self.text, found = text, {}
        tree = ast.parse(text)
        for node in tree.body:
            if isinstance(node, ast.Assign):
                found[node.targets[0].id] = ast.literal_eval(node.value)
        self.tools, self.stages = found["TOOL_MAP"], found["STAGES"]
        self.flags = [(node.args[0].value, {each.arg: each.value.value for each in node.keywords})
                      for node in ast.walk(tree) if isinstance(node, ast.Call)]
        self.not_read = [line.strip()[len("# not read: "):] for line in text.splitlines()
                         if line.strip().startswith("# not read: ")]
        self.commands = {name: options["command"] for name, options in self.tools.items()}
        if HAS_COMMANDS and self.tools:
            orchestrator.load_pipeline(self.tools, self.stages)


@pytest.fixture
def read(tmp_path):
    """Write a runner, and return the tables made of it: read(name, text)."""
    def read(name, text):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return Tables(make_tables(str(path), str(tmp_path)))
    return read


# --- shell ---

ELEVEN = """\
    #!/bin/sh
    # Runs everything. It's slow, & it's old.
    set -eu
    cd "$(dirname "$0")"
    YEAR="${1:-2013}"
    OUT=out/$YEAR
    echo "year $YEAR; it begins"
    mkdir -p "$OUT"
    python3 01_download.py --year "$YEAR" --out "$OUT"   # the raw files
    python3 02_clean.py --input "$OUT/raw.csv" \\
        --output $OUT/clean.csv
    python3 03_join.py --skip=holidays
    python3 04_features.py && python3 05_split.py --seed 42
    python3 06_train.py --model "gradient boosting"
    python3 -m models.evaluate --all
    bash 08_upload.sh
    ./09_notify.sh $2; Rscript 10_plots.R
    if [ "${3:-}" != "--skip" ]; then
        python3 11_publish.py
    fi
    """


def test_eleven_scripts_with_flags_and_a_skip(read):
    tables = read("run_all.sh", ELEVEN)

    assert tables.commands == {
        "mkdir": "mkdir -p out/{arg1}",
        "download": "python 01_download.py --year {arg1} --out out/{arg1}",
        "clean": "python 02_clean.py --input out/{arg1}/raw.csv --output out/{arg1}/clean.csv",
        "join": "python 03_join.py --skip=holidays",
        "features": "python 04_features.py",
        "split": "python 05_split.py --seed 42",
        "train": ["python", "06_train.py", "--model", "gradient boosting"],
        "evaluate": "python -m models.evaluate --all",
        "upload": "bash 08_upload.sh",
        "notify": "./09_notify.sh {arg2}",
        "plots": "Rscript 10_plots.R",
    }
    assert list(tables.tools) == list(tables.commands)
    assert tables.flags == [("--arg1", {"default": "2013"}), ("--arg2", {"default": ""})]
    assert tables.not_read == [
        'line 4: cd "$(dirname "$0")"', 'line 18: if [ "${3:-}" != "--skip" ]', "line 18: then",
        "line 19: python3 11_publish.py", "line 20: fi"]


def test_eight_runs_with_a_limit_and_a_clean_up(read):
    runs = "".join(f"timeout 3m python forecast.py configs/{name}.json\n" for name in "abcdefgh")
    tables = read("nightly.sh", "trap 'rm -f tmp.lock' EXIT\n" + runs + "timeout 90 ./rm_tmp.sh\n")

    assert list(tables.tools) == ["forecast", *(f"forecast_{n}" for n in range(2, 9)), "rm_tmp"]
    assert tables.tools["forecast_8"] == {"command": "python forecast.py configs/h.json",
                                          "timeout": "3m"}
    assert tables.tools["rm_tmp"] == {"command": "./rm_tmp.sh", "timeout": "90s"}
    assert tables.not_read == ["line 1: trap 'rm -f tmp.lock' EXIT"]


def test_what_runs_beside_needs_what_was_before_and_is_waited_for(read):
    tables = read("a.sh", """\
        python a.py
        python b.py &
        python c.py > c.log 2>&1 &
        wait
        python d.py
        """)

    assert tables.tools == {
        "a": {"command": "python a.py"},
        "b": {"command": "python b.py", "needs": ["a"]},
        "c": {"command": [*SH, "python c.py > c.log 2>&1"], "needs": ["a"]},
        "d": {"command": "python d.py"}}


@pytest.mark.parametrize("line, words", [
    ("cat a.csv | sort > b.csv", [*SH, "cat a.csv | sort > b.csv"]),
    ("awk '{print $1}' a.csv", ["awk", "{print $1}", "a.csv"]),
    ("awk '{print $1}' a > b", [*SH, "awk '{print $1}' a > b"]),
    ("gzip raw/*.csv", [*SH, "gzip raw/*.csv"]),
    ("(cd sub && make)", [*SH, "(cd sub && make)"]),
    ("psql \"$DATABASE_URL\" -c 'select 1'", [*SH, "psql \"$DATABASE_URL\" -c 'select 1'"]),
    ("python a.py \"a;b&c\" 'x|y'", ["python", "a.py", "a;b&c", "x|y"]),
    ("python a.py \"it's\"", ["python", "a.py", "it's"]),
    ("python a.py --day $(date +%F)", [*SH, "python a.py --day $(date +%F)"]),
    ("python a.py || exit 1", [*SH, "python a.py || exit 1"]),
    ("python a.py a#b", ["python", "a.py", "a#b"]),
    ("python3.11 a.py", "python a.py"),
])
def test_a_command_has_a_shell_only_if_that_has_something_to_do(read, line, words):
    assert list(read("a.sh", line + "\n").commands.values()) == [words]


def test_the_shell_is_the_one_that_the_script_was_for(read):
    assert read("a.sh", "#!/usr/bin/env bash\na &> b\n").commands == {"a": [*BASH, "a &> b"]}
    assert read("a.sh", "#!/bin/bash\nset -o pipefail\na | b\n").commands \
        == {"a": ["bash", "-o", "pipefail", "-c", "a | b"]}


@pytest.mark.parametrize("line", [
    "export KEY=1", "source venv/bin/activate", ". ./env.sh", "exit 3", "DAY=$(date +%F)",
    "TZ=UTC python a.py", "eval $X", "python a.py $@", "python a.py $#", "read ANSWER",
    "python a.py '{year}'", "python a.py ${X%.csv}", "python a.py > $1", "cat <<< x",
    "python 'a",
])
def test_what_only_a_run_can_tell_is_named_with_its_line(read, line):
    tables = read("a.sh", f"\n{line}\n")

    assert tables.tools == {} and tables.not_read == [f"line 2: {line}"]


@pytest.mark.parametrize("first", [
    "DAY=$(date +%F)", "DAY=a; DAY=b", "if x; then DAY=1; fi", "read DAY",
    "for DAY in a b; do\ndone", "for DAY in a b\ndo x\ndone", "[ x ] && DAY=2",
])
def test_a_variable_that_is_not_plain_is_taken_neither_for_a_value_nor_the_environments(
        read, first):
    tables = read("a.sh", f"{first}\npython a.py $DAY\n")

    assert "a" not in tables.tools
    assert any("python a.py $DAY" in line for line in tables.not_read)


def test_the_lines_of_blocks_functions_and_documents_are_no_commands(read):
    tables = read("a.sh", """\
        run() { python "$1"; }
        function other {
            python b.py
        }
        for f in *.csv; do
            if true; then python c.py "$f"; fi
        done
        case $1 in
            a) python d.py ;;
        esac
        while true; do python e.py; done
        cat > x.txt <<EOT
        python f.py 'a
        EOT
        python g.py
        """)

    assert tables.commands == {"g": "python g.py"}
    assert "line 5: for f in *.csv" in tables.not_read
    assert {line.split(":")[0] for line in tables.not_read} \
        == {f"line {n}" for n in (1, 2, 5, 6, 7, 8, 9, 10, 11, 12)}


def test_a_function_of_the_script_is_not_taken_for_a_program(read):
    tables = read("a.sh", "step() {\n  python \"$1\"\n}\nstep a.py\n")

    assert tables.tools == {} and "line 4: step a.py" in tables.not_read


# --- make ---

MAKEFILE = """\
PYTHON := python3
RAW = data/raw

.PHONY: all clean lint

all: models/model.pkl reports/report.html

data: $(RAW)/train.csv

$(RAW)/train.csv:
\tmkdir -p $(RAW)
\tcurl -sSL https://example.com/train.csv -o $@

data/features.csv: src/features.py $(RAW)/train.csv config.yml
\t$(PYTHON) src/features.py --in ${RAW}/train.csv --out $@

models/model.pkl: src/train.py data/features.csv  # an hour
\t@echo "training"
\t$(PYTHON) src/train.py --features data/features.csv \\
\t\t--out $@

reports/%.html: reports/%.md
\tpandoc $< -o $@

reports/report.html: models/model.pkl | data
\t-$(PYTHON) src/report.py $<

SOURCES = $(wildcard src/*.py)

lint: $(SOURCES)
\truff check src

clean:
\trm -rf data models
"""


def test_a_makefile_of_a_model(read):
    tables = read("Makefile", MAKEFILE)

    assert tables.tools == {
        "data/raw/train.csv": {
            "command": [*SH, "mkdir -p data/raw && "
                             "curl -sSL https://example.com/train.csv -o data/raw/train.csv"],
            "needs": [], "writes": ["data/raw/train.csv"]},
        "data/features.csv": {
            "command": "python src/features.py --in data/raw/train.csv --out data/features.csv",
            "needs": ["data/raw/train.csv"], "reads": ["src/features.py", "config.yml"],
            "writes": ["data/features.csv"]},
        "models/model.pkl": {
            "command": [*SH, 'echo "training" && python3 src/train.py '
                             "--features data/features.csv --out models/model.pkl"],
            "needs": ["data/features.csv"], "reads": ["src/train.py"],
            "writes": ["models/model.pkl"]},
        "reports/report.html": {
            "command": [*SH, "(python3 src/report.py models/model.pkl || true)"],
            "needs": ["data/raw/train.csv", "models/model.pkl"],
            "writes": ["reports/report.html"]},
        "clean": {"command": "rm -rf data models", "needs": []},
    }
    assert tables.not_read == [
        "line 22: reports/%.html: reports/%.md", "line 28: SOURCES = $(wildcard src/*.py)",
        "line 30: lint: $(SOURCES) ruff check src"]


def test_what_make_does_by_itself_is_the_stage_full_and_that_is_not_to_clean(read):
    stages = read("Makefile", MAKEFILE).stages

    assert stages["full"] == stages["all"] == [
        "data/raw/train.csv", "data/features.csv", "models/model.pkl", "reports/report.html"]
    assert stages["data"] == ["data/raw/train.csv"]


@pytest.mark.parametrize("row", [
    "\techo $(shell date)", "\techo $(UNKNOWN)", "\techo '{name}'",
])
def test_a_recipe_that_only_make_can_tell_is_not_read_and_nobody_needs_it(read, row):
    tables = read("x.mk", f"b: a\n\tls\n\na:\n{row}\n")

    assert tables.tools == {"b": {"command": "ls", "needs": [], "reads": ["a"]}}
    assert tables.not_read == [f"line 4: a: {row.strip()}"]


def test_an_empty_makefile_and_one_with_a_circle_end(read):
    assert read("Makefile", "").tools == {}
    if not HAS_COMMANDS:  # else the engine names the circle
        assert list(read("Makefile", "a: b\n\tls\nb: a\n\tls\n").tools) == ["a", "b"]


# --- Python ---

RUNNER = '''\
    import argparse
    import os
    import subprocess
    import sys

    SCRIPTS = ["01_fetch.py", "02_clean.py"]
    MODELS = [("small", 10), ("large", 500)]

    def main():
        parser = argparse.ArgumentParser()
        parser.add_argument("--year", type=int)
        args = parser.parse_args()
        for script in SCRIPTS:
            result = subprocess.run([sys.executable, script], check=True, timeout=600)
            if result.returncode != 0:
                sys.exit(1)
        for name, trees in MODELS:
            subprocess.check_call(["python3", "train.py", name, f"--trees={trees}", "--year",
                                   str(args.year)])
        date = os.environ["DATE"]
        os.system(f"python report.py --date {date}")
        os.system("cat a | sort > b")
        subprocess.run("gzip *.csv", shell=True)
        if args.publish:
            subprocess.Popen(["python", "publish.py"])
        subprocess.run(["python", "x.py"], cwd="sub")
        subprocess.run(["python", find_script()])
        subprocess.run(command)

    if __name__ == "__main__":
        main()
    '''


def test_a_python_runner(read):
    tables = read("run_pipeline.py", RUNNER)

    assert tables.tools == {
        "fetch": {"command": "python 01_fetch.py", "timeout": 600},
        "clean": {"command": "python 02_clean.py", "timeout": 600},
        "train": {"command": "python train.py small --trees=10 --year {year}"},
        "train_2": {"command": "python train.py large --trees=500 --year {year}"},
        "report": {"command": "python report.py --date {date}"},
        "cat": {"command": [*SH, "cat a | sort > b"]},
        "gzip": {"command": [*SH, "gzip *.csv"]}}
    assert tables.flags == [("--year", {"required": True}), ("--date", {"required": True})]
    assert tables.not_read == [
        "line 25: subprocess.Popen(['python', 'publish.py'])",
        "line 26: subprocess.run(['python', 'x.py'], cwd='sub')",
        "line 27: subprocess.run(['python', find_script()])",
        "line 28: subprocess.run(command)"]


@pytest.mark.parametrize("text", [
    "cmd = ['a.sh']\ncmd.append('-f')\nsubprocess.run(cmd)",
    "cmd = ['a.sh']\ncmd += ['-f']\nsubprocess.run(cmd)",
    "cmd = ['a.sh']\nif x:\n    cmd = ['b.sh']\nsubprocess.run(cmd)",
    "for each in find():\n    subprocess.run(['a.sh', each])",
    "while True:\n    subprocess.run(['a.sh'])",
    "try:\n    pass\nexcept OSError:\n    subprocess.run(['a.sh'])",
    "subprocess.run(['a.sh', '{x}'])", "subprocess.run('a.sh b')", "subprocess.run()",
    "subprocess.run(*cmd)", "os.system(f'cat {x} | sort')", "subprocess.run(['a', f'{x:03d}'])",
])
def test_what_only_a_run_of_python_can_tell_is_not_read(read, text):
    tables = read("a.py", text)

    assert tables.tools == {} and len(tables.not_read) == 1


def test_what_functions_and_modules_of_the_runner_do_is_named_and_not_left_out(read, tmp_path):
    (tmp_path / "load.py").touch()
    tables = read("a.py", """
        import load, sys
        def run(command):
            subprocess.run(command, shell=True)
        run("python a.py")
        load.main()
        print(sys.path)
    """)

    assert tables.tools == {}
    assert tables.not_read == ["line 4: subprocess.run(command, shell=True)",
                               "line 5: run('python a.py')", "line 6: load.main()"]


def test_a_loop_over_numbers_gives_each_its_own(read):
    tables = read("a.py", """
        for year in [2022, 2023]:
            subprocess.run(["python", "train.py", "--year", str(year)])
    """)

    assert [row["command"] for row in tables.tools.values()] == [
        "python train.py --year 2022", "python train.py --year 2023"]


@pytest.mark.parametrize("text, problem", [
    ("if:\n", "a.py: invalid syntax"), ("x = " + "1 + " * 3000 + "1\n", "a.py: maximum recursion"),
])
def test_a_file_that_is_no_python_or_too_deep_is_one_sentence(sandbox, text, problem):
    sandbox.pipeline("TOOL_MAP = {}")
    (sandbox.folder / "a.py").write_text(text)
    ended = sandbox.run("--init", "--from", "a.py")

    assert (ended.code, ended.out) == (2, "") and ended.err.startswith(problem), ended


# --- whatever is read ---

@pytest.mark.parametrize("name, text", [
    ("a.sh", "touch ran\n$(touch ran)\nX=$(touch ran)\n`touch ran`\n"),
    ("Makefile", "X := $(shell touch ran)\na:\n\ttouch ran\n"),
    ("a.py", "import os\nopen('ran', 'w')\nos.system('touch ran')\n"),
])
def test_nothing_of_a_runner_is_run(sandbox, name, text):
    sandbox.pipeline("TOOL_MAP = {}")  # tables are not needed
    (sandbox.folder / name).write_text(text)
    ended = sandbox.run("--init", "--from", name)

    assert ended.code == 0 and "touch" in ended.out, ended
    assert not (sandbox.folder / "ran").exists()
    assert not (sandbox.folder / ".orchestrator").exists()


@pytest.mark.parametrize("name, text", [
    ("a.sh", "python 'a\"b.py' \"it's\" x\\\\y é \u200b \x1b[31m '\n'\n"),
    ("a.sh", "'__import__(\"os\")' \"\"\"; #\n"),
    ("a.sh", "python \"a\\\"]}, 'evil': 1\" \n"),
    ("Makefile", "a\"b: c'd\n\techo \"\"\" 'x'\n"),
    ("a.py", "subprocess.run(['a', '\\ud800', '\\x01', '\"', \"'\"])"),
    ("a.sh", "🙂 \ufeff\n" * 3),
])
def test_hostile_names_stay_text(read, name, text):
    assert "evil" not in read(name, text).tools  # Tables reads it as literals alone


def test_ends_of_lines_of_windows_make_no_difference(read, tmp_path):
    for name, text in [("run_all.sh", textwrap.dedent(ELEVEN)), ("Makefile", MAKEFILE),
                       ("r.py", textwrap.dedent(RUNNER))]:
        plain = read(name, text).text
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
        assert make_tables(str(tmp_path / name), str(tmp_path)) == plain


def test_bytes_that_are_no_text_do_not_stop_the_rest(tmp_path):
    (tmp_path / "a.sh").write_bytes(b"python a.py\npython \xff\xfe.py\n")

    assert "a" in Tables(make_tables(str(tmp_path / "a.sh"), str(tmp_path))).tools


@pytest.mark.parametrize("name", ["gone.sh", "folder"])
def test_a_file_that_can_not_be_read_is_one_sentence(sandbox, name):
    sandbox.pipeline("TOOL_MAP = {}")
    (sandbox.folder / "folder").mkdir()
    ended = sandbox.run("--init", "--from", name)

    assert (ended.code, ended.out) == (2, "") and ended.err.startswith(f"{name}: "), ended
    assert "Traceback" not in ended.err


def test_a_script_that_is_not_in_the_folder_is_said_beside_it(sandbox):
    sandbox.pipeline("TOOL_MAP = {}").tool("here.a", "")
    (sandbox.folder / "run.sh").write_text("python a.py\npython b.py\n")
    ended = sandbox.run("--init", "here", "--from", "run.sh")

    assert '"python a.py"},\n' in ended.out
    assert '"python b.py"},  # not in here: b.py\n' in ended.out


@pytest.mark.skipif(not HAS_COMMANDS, reason='the option "command" is not here yet')
def test_the_tables_that_were_pasted_run(sandbox):
    for name in ("01_a", "02_b"):
        sandbox.tool(name, f"import sys\nprint('{name}', *sys.argv[1:])\n")
    sandbox.pipeline("TOOL_MAP = {}")
    (sandbox.folder / "run.sh").write_text(
        'set -e\npython3 01_a.py "$1" "x y"\npython 02_b.py > b.txt\n')
    sandbox.pipeline(sandbox.run("--init", "--from", "run.sh").out)
    ended = sandbox.run("--arg1", "one")

    assert ended.code == 0 and "01_a one x y" in ended.out, ended
    assert sandbox.read("b.txt") == "02_b\n"


# --- a new project ---

@pytest.mark.parametrize("folder", ["new", os.path.join("deep", "new"), "."])
def test_a_new_project_runs_at_once(tmp_path, folder):
    made = subprocess.run([sys.executable, orchestrator.__file__, "--init", folder], cwd=tmp_path,
                          capture_output=True, text=True, timeout=60)
    assert made.returncode == 0 and made.stderr == "", made
    assert f"cd {folder}\n    python orchestrator.py" in made.stdout

    ran = subprocess.run([sys.executable, "orchestrator.py"], cwd=tmp_path / folder,
                         capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0 and "(2, 1.2)" in ran.stdout, ran
    assert sorted(os.listdir(tmp_path / folder))[-3:] == ["load.py", "orchestrator.py", "report.py"]


def test_the_engine_of_a_new_project_is_this_one(tmp_path):
    orchestrator.make_project(str(tmp_path / "new"))
    own, new = (path.read_text(encoding="utf-8").partition("# === ENGINE")
                for path in (tmp_path / "new" / "orchestrator.py",
                             type(tmp_path)(orchestrator.__file__)))

    assert own[1:] == new[1:]
    assert "example" not in own[0]


@pytest.mark.parametrize("name", ["orchestrator.py", "load.py", "report.py"])
def test_no_file_of_somebody_is_written_over(sandbox, name):
    sandbox.pipeline("TOOL_MAP = {}")
    new = sandbox.folder / "new"
    new.mkdir()
    (new / name).write_text("mine")
    ended = sandbox.run("--init", "new")

    assert (ended.code, ended.out) == (2, "") and name in ended.err
    assert os.listdir(new) == [name] and (new / name).read_text() == "mine"


def test_a_folder_that_can_not_be_made_is_one_sentence(sandbox):
    sandbox.pipeline("TOOL_MAP = {}")
    (sandbox.folder / "file").write_text("")
    ended = sandbox.run("--init", os.path.join("file", "new"))

    assert ended.code == 2 and "Traceback" not in ended.err and "file" in ended.err
