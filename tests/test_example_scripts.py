"""The scripts: five plain files with argparse, as they are, made a pipeline by their commands.

    fetch -- clean -+- year_2021 -+
                    +- year_2022 -+- combine -- report -- notify
                    +- year_2023 -+
"""
import json
import os
import subprocess
import sys

import pytest
from conftest import MODES, TOP, Example, summary

import orchestrator

YEARS = ["year_2021", "year_2022", "year_2023"]
SCRIPTS = ["01_fetch", "02_clean", "03_year", "04_combine", "05_report"]
needs_commands = pytest.mark.skipif(
    not {"command", "arguments"} <= orchestrator.OPTIONS.keys()
    or not hasattr(orchestrator.Context, "outcomes"),
    reason='the options "command" and "arguments", and context.outcomes, are not all here yet')


@pytest.fixture
def pipeline(tmp_path):
    """A copy of the pipeline that has never run."""
    return Example(tmp_path, "scripts")


def test_the_scripts_know_nothing_of_the_engine():
    for name in SCRIPTS:
        text = (TOP / "example" / "scripts" / f"{name}.py").read_text(encoding="utf-8")
        assert "orchestrator" not in text and "def run(" not in text
        assert "argparse" in text


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_says_what_it_wants(name):
    ended = subprocess.run([sys.executable, f"{name}.py"], cwd=TOP / "example" / "scripts",
                           capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and "required" in ended.stderr


@needs_commands
@pytest.mark.parametrize("flags", MODES.values(), ids=MODES)
def test_every_tool_succeeds_and_the_report_has_the_sums_of_the_years(pipeline, flags):
    ended = pipeline.run(*flags)

    assert ended.code == 0, ended
    assert {row.split()[1] for row in summary(ended.err).values()} == {"success"}
    with open(pipeline.home / "work" / "all.json", encoding="utf-8") as file:
        assert [(each["year"], each["months"], each["rides"]) for each in json.load(file)] \
            == [(2021, 12, 5001), (2022, 11, 6170), (2023, 12, 7545)]
    assert "2022   6,170 rides in 11 months, most in month 7" in ended.out
    assert "rides: 7 of 7 tools done" in ended.out


@needs_commands
def test_the_years_can_run_side_by_side(pipeline):
    plan = json.loads(pipeline.run("--plan", "--jobs", "4", "--json").out)
    waves = {step["tool"]: step["wave"] for step in plan["steps"]}

    assert waves == {"fetch": 1, "clean": 2, **dict.fromkeys(YEARS, 3), "combine": 4, "report": 5,
                     "notify": 6}


@needs_commands
def test_flags_reach_the_commands_that_name_them(pipeline):
    ended = pipeline.run("--least", "600", "--title", "Busy months")

    assert ended.code == 0, ended
    assert "Busy months\n" in ended.out
    assert "2021   2,039 rides in 3 months" in ended.out


@needs_commands
def test_what_is_fetched_is_good_for_a_day_and_until_the_source_changes(pipeline):
    pipeline.run()
    assert summary(pipeline.run().err)["fetch"].split()[1] == "cached"

    source = pipeline.home / "data" / "rides.csv"
    source.write_text(source.read_text(encoding="utf-8") + "2023,13,1\n", encoding="utf-8")
    assert summary(pipeline.run().err)["fetch"].split()[1] == "success"


@needs_commands
def test_a_year_without_rides_fails_alone_and_notify_tells_of_it(pipeline):
    source = pipeline.home / "data" / "rides.csv"
    lines = source.read_text(encoding="utf-8").splitlines()
    source.write_text("\n".join(line for line in lines if not line.startswith("2022")) + "\n",
                      encoding="utf-8")
    ended = pipeline.run()
    ends = {tool: row.split()[1] for tool, row in summary(ended.err).items()}

    assert ended.code == 1
    assert ends == {"fetch": "success", "clean": "success", "year_2021": "success",
                    "year_2022": "failed", "year_2023": "success", "combine": "skipped",
                    "report": "skipped", "notify": "success"}
    assert "rides: 4 of 7 tools done" in ended.out
    assert "year_2022 failed: " in ended.out and "has no month of 2022" in ended.out


@needs_commands
def test_the_file_may_also_be_run_by_its_path_from_any_folder(pipeline, tmp_path_factory):
    ended = pipeline.run(program=(os.fspath(pipeline.home / "pipeline.py"),),
                         cwd=tmp_path_factory.mktemp("elsewhere"))
    assert ended.code == 0, ended
    assert (pipeline.home / "work" / "all.json").exists()


@needs_commands
def test_the_scripts_have_no_mistakes_to_check(pipeline):
    ended = pipeline.run("--check")
    assert ended.code == 0 and "8 tools read, no mistakes found" in ended.out, ended
