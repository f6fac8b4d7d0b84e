"""The medallion: one of three sources is broken, which skips what needs it and nothing else.

    bronze_trips ---- silver_trips ----+-- gold_days ------+
    bronze_weather -- silver_weather --+                   +-- report (always)
    bronze_stations - silver_stations ---- gold_stations --+
                      (and silver_trips)
"""
import json
import shlex
import shutil

import pytest
from conftest import MODES, TOP, Example, summary

MISSING_END = '"docks": 8}]\n'  # what the docstring of the pipeline appends to stations.json


def mend(sources):
    """Complete the broken file in a folder of sources."""
    with (sources / "stations.json").open("a", encoding="utf-8") as file:
        file.write(MISSING_END)


def statuses(ended):
    """Return {status: set of tools} from the closing table of a run."""
    found = {}
    for tool, row in summary(ended.err).items():
        found.setdefault(row.split()[1], set()).add(tool)
    return found


@pytest.fixture
def pipeline(tmp_path):
    """A copy of the pipeline that has never run."""
    return Example(tmp_path, "medallion")


@pytest.fixture
def mended(tmp_path):
    """A folder of sources in which nothing is broken."""
    shutil.copytree(TOP / "example" / "medallion" / "sources", tmp_path / "mended")
    mend(tmp_path / "mended")
    return tmp_path / "mended"


@pytest.fixture(scope="module", params=MODES.values(), ids=MODES)
def broken(request, tmp_path_factory):
    """A copy that has run once with its broken source: (copy, how it ended, the flags)."""
    copy = Example(tmp_path_factory.mktemp("medallion"), "medallion")
    return copy, copy.run(*request.param), request.param


def test_the_broken_source_fails_the_run_and_skips_exactly_what_needs_it(broken):
    _, ended, _ = broken
    assert ended.code == 1
    assert statuses(ended) == {
        "failed": {"bronze_stations"},
        "skipped": {"silver_stations", "gold_stations"},
        "success": {"bronze_trips", "bronze_weather", "silver_trips", "silver_weather",
                    "gold_days", "report"}}


def test_each_skipped_tool_names_the_broken_source_and_not_its_neighbour(broken):
    _, ended, _ = broken
    rows = summary(ended.err)
    for tool in ("silver_stations", "gold_stations"):
        assert rows[tool].endswith("needs bronze_stations, which failed")
    assert "stations.json is no whole JSON" in rows["bronze_stations"]


def test_what_does_not_need_the_broken_source_is_whole(broken):
    copy, _, _ = broken
    assert copy.query("SELECT * FROM gold_days") == [
        ("2024-06-01", 4, 77, 0.0), ("2024-06-02", 2, 36, 11.5), ("2024-06-03", 3, 42, 0.4)]
    for empty in ("silver_stations", "gold_stations"):
        assert copy.query(f"SELECT count(*) FROM {empty}") == [(0,)]


def test_the_report_is_printed_all_the_same_and_says_what_is_not_renewed(broken):
    _, ended, _ = broken
    headings = [line for line in ended.out.splitlines() if line.startswith("gold_")]
    assert headings == ["gold_days", "gold_stations: NOT RENEWED, as an earlier run left it"]


def test_both_modes_end_in_the_same_tables_and_print_the_same(broken, pipeline):
    copy, ended, _ = broken
    other = pipeline.run("--jobs", "2")
    assert (other.code, other.out) == (ended.code, ended.out)
    assert pipeline.dump() == copy.dump()


def test_a_second_broken_run_changes_nothing(broken):
    copy, first, flags = broken
    before = copy.dump()
    again = copy.run(*flags)
    assert (again.code, again.out) == (1, first.out)
    assert copy.dump() == before


@pytest.mark.parametrize("flags", MODES.values(), ids=MODES)
def test_with_mended_sources_the_whole_succeeds_and_twice_is_as_good_as_once(
        pipeline, mended, flags):
    ended = pipeline.run("--sources", str(mended), *flags)
    assert ended.code == 0, ended
    assert set(statuses(ended)) == {"success"} and "NOT RENEWED" not in ended.out
    assert pipeline.query("SELECT * FROM gold_stations ORDER BY 1") == [
        ("Central Square", 4, 4 / 24), ("Harbour", 2, 2 / 8), ("Museum", 3, 3 / 16)]
    before = pipeline.dump()
    assert pipeline.run("--sources", str(mended), *flags).code == 0
    assert pipeline.dump() == before


@pytest.mark.parametrize("flags", MODES.values(), ids=MODES)
def test_a_broken_run_leaves_what_the_last_good_one_knew_of_that_source(
        pipeline, mended, flags):
    assert pipeline.run("--sources", str(mended), *flags).code == 0
    before = pipeline.dump()
    ended = pipeline.run(*flags)
    assert ended.code == 1 and "NOT RENEWED" in ended.out
    assert pipeline.dump() == before


@pytest.mark.parametrize("flags", MODES.values(), ids=MODES)
def test_once_the_source_is_mended_the_printed_command_finishes_the_work(
        pipeline, mended, tmp_path_factory, flags):
    ended = pipeline.run(*flags)
    mend(pipeline.home / "sources")
    command = ended.err[ended.err.rindex("\nNext: ") + len("\nNext: "):].splitlines()[0]
    again = pipeline.run(program=shlex.split(command)[1:])
    assert again.code == 0, again
    whole = Example(tmp_path_factory.mktemp("whole"), "medallion")
    assert whole.run("--sources", str(mended)).code == 0
    assert pipeline.dump() == whole.dump()


def test_the_plan_puts_each_layer_into_a_wave_of_its_own_and_the_report_last(pipeline):
    plan = json.loads(pipeline.run("--plan", "--json", "--jobs", "4").out)
    layers = {1: "bronze", 2: "silver", 3: "gold", 4: "report"}
    assert [step["tool"].split("_")[0] for step in plan["steps"]] \
        == [layers[step["wave"]] for step in plan["steps"]]
    assert plan["critical_path"] == ["bronze_trips", "silver_trips", "gold_days", "report"]


def test_the_tools_after_the_broken_source_are_what_its_name_with_a_plus_means(pipeline):
    plan = json.loads(pipeline.run("--plan", "--json", "--force", "bronze_stations+").out)
    assert [step["tool"] for step in plan["steps"]] == [
        "bronze_stations", "silver_stations", "gold_stations", "report"]


def test_a_layer_is_a_stage_that_runs_by_itself(pipeline):
    assert set(summary(pipeline.run("bronze").err)) == {
        "bronze_trips", "bronze_stations", "bronze_weather"}
    assert pipeline.query("SELECT DISTINCT source FROM bronze ORDER BY 1") == [
        ("trips",), ("weather",)]


def test_the_file_may_also_be_run_by_its_path_from_any_folder(broken, pipeline, tmp_path_factory):
    copy, first, flags = broken
    ended = pipeline.run(*flags, program=(str(pipeline.home / "pipeline.py"),),
                         cwd=tmp_path_factory.mktemp("elsewhere"))
    assert (ended.code, ended.out) == (1, first.out)
    assert pipeline.dump() == copy.dump()


def test_the_medallion_has_no_mistakes_to_check(pipeline):
    ended = pipeline.run("--check")
    assert ended.code == 0 and "9 tools read, no mistakes found" in ended.out, ended
    assert not (pipeline.home / "medallion.db").exists()
