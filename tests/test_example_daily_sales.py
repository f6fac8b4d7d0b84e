"""The daily sales: a second pipeline on the one engine, ordered by what tools read and write.

    extract_orders ----+
                       +-- transform_orders --+
    extract_customers -+                      +-- aggregate_sales -- load_warehouse
    extract_products -------------------------+
"""
import json

import pytest
from conftest import MODES, Example, summary

TOOLS = {"extract_orders", "extract_customers", "extract_products", "transform_orders",
         "aggregate_sales", "load_warehouse"}


@pytest.fixture(scope="module", params=MODES.values(), ids=MODES)
def ran(request, tmp_path_factory):
    """A copy of the pipeline that has run once: (copy, how it ended, the flags)."""
    copy = Example(tmp_path_factory.mktemp("sales"), "daily_sales")
    ended = copy.run(*request.param)
    assert ended.code == 0, ended
    return copy, ended, request.param


@pytest.fixture
def pipeline(tmp_path):
    """A copy of the pipeline that has never run."""
    return Example(tmp_path, "daily_sales")


def test_the_plan_has_four_waves_of_which_the_first_holds_the_three_extracts(pipeline):
    ended = pipeline.run("--plan", "--jobs", "4", "--json")
    waves = {}
    for step in json.loads(ended.out)["steps"]:
        waves.setdefault(step["wave"], set()).add(step["tool"])
    assert waves == {1: {"extract_orders", "extract_customers", "extract_products"},
                     2: {"transform_orders"}, 3: {"aggregate_sales"}, 4: {"load_warehouse"}}


@pytest.mark.parametrize("flags, expected_s", [
    (("--jobs", "4"), 2 * 60 + 3 * 60 + 90 + 60),  # the critical path alone
    ((), 2 * 60 + 60 + 30 + 3 * 60 + 90 + 60),     # the sum of all
])
def test_the_plan_expects_the_critical_path_side_by_side_and_the_sum_one_after_another(
        pipeline, flags, expected_s):
    plan = json.loads(pipeline.run("--plan", "--json", *flags).out)
    assert plan["critical_path"] == [
        "extract_orders", "transform_orders", "aggregate_sales", "load_warehouse"]
    assert plan["expected_s"] == expected_s


def test_the_plan_says_the_critical_path_and_the_duration_to_people_too(pipeline):
    ended = pipeline.run("--plan", "--jobs", "4")
    assert ("extract_orders -> transform_orders -> aggregate_sales -> load_warehouse"
            in ended.out)
    assert "7m 30s" in ended.out


def test_needs_follow_from_what_is_read_and_written(pipeline):
    plan = json.loads(pipeline.run("--plan", "--json").out)
    needs = {step["tool"]: set(step["needs"]) for step in plan["steps"]}
    assert needs == {
        "extract_orders": set(), "extract_customers": set(), "extract_products": set(),
        "transform_orders": {"extract_orders", "extract_customers"},
        "aggregate_sales": {"transform_orders", "extract_products"},
        "load_warehouse": {"aggregate_sales"}}


def test_every_tool_succeeds(ran):
    _, ended, _ = ran
    assert {tool: row.split()[1] for tool, row in summary(ended.err).items()} \
        == dict.fromkeys(TOOLS, "success")


def test_the_warehouse_holds_the_sums_worked_out_by_hand(ran):
    copy, _, _ = ran
    assert copy.query("SELECT * FROM warehouse_sales ORDER BY 1, 2, 3") == [
        ("2024-03-01", "north", "coffee",    1, 2, 2 * 1850),
        ("2024-03-01", "north", "equipment", 1, 1, 64900),
        ("2024-03-01", "north", "supplies",  1, 1, 425),
        ("2024-03-01", "south", "coffee",    1, 4, 4 * 1990),
        ("2024-03-02", "north", "coffee",    1, 3, 3 * 1990),
        ("2024-03-02", "south", "coffee",    1, 6, 6 * 1850),
        ("2024-03-02", "south", "equipment", 1, 1, 12900),
        ("2024-03-02", "south", "supplies",  1, 2, 2 * 425),
        ("2024-03-03", "north", "equipment", 1, 2, 2 * 12900),
        ("2024-03-03", "south", "coffee",    2, 4, 4 * 1850),
        ("2024-03-03", "south", "equipment", 1, 1, 64900)]


def test_the_two_bad_orders_are_kept_apart_with_the_reason_and_said_aloud(ran):
    copy, ended, _ = ran
    assert copy.query("SELECT order_id, reason FROM rejected_orders ORDER BY 1") == [
        ("1007", "there is no such customer"),
        ("1011", "the quantity is no whole number from 1 on")]
    assert ended.err.count("warning: order 10") == 2


def test_both_modes_end_in_the_same_tables_and_print_the_same(pipeline, ran):
    copy, ended, _ = ran
    other = pipeline.run("--jobs", "2")
    assert other.code == 0, other
    assert pipeline.dump() == copy.dump()
    assert other.out == ended.out and "2024-03-01       4      8    769.85" in ended.out


def test_a_second_run_changes_nothing(ran):
    copy, _, flags = ran
    before = copy.dump()
    assert copy.run(*flags).code == 0
    assert copy.dump() == before


def test_the_warehouse_keeps_the_days_that_no_order_of_this_run_is_of(pipeline):
    orders = pipeline.home / "data" / "orders.csv"
    head, *lines = orders.read_text(encoding="utf-8").splitlines()
    assert pipeline.run().code == 0
    last_day = [line for line in lines if "2024-03-03" in line and "two" not in line]
    orders.write_text("\n".join([head, *last_day[:1]]) + "\n", encoding="utf-8")
    assert pipeline.run().code == 0
    assert pipeline.query("SELECT day, sum(orders) FROM warehouse_sales GROUP BY day") == [
        ("2024-03-01", 4), ("2024-03-02", 4), ("2024-03-03", 1)]


@pytest.mark.parametrize("flags", MODES.values(), ids=MODES)
def test_an_unlisted_product_fails_the_sums_and_skips_only_the_warehouse(pipeline, flags):
    products = pipeline.home / "data" / "products.csv"
    lines = products.read_text(encoding="utf-8").splitlines()
    products.write_text("\n".join(line for line in lines if "Grinder" not in line) + "\n",
                        encoding="utf-8")
    ended = pipeline.run(*flags)
    rows = summary(ended.err)
    assert ended.code == 1
    assert "12 orders went into the sums, 10 are in them" in rows.pop("aggregate_sales")
    assert "needs aggregate_sales, which failed" in rows.pop("load_warehouse")
    assert {row.split()[1] for row in rows.values()} == {"success"}
    assert pipeline.query("SELECT count(*) FROM daily_sales") == [(0,)]


def test_too_many_bad_orders_are_not_good_enough_to_keep(pipeline):
    customers = pipeline.home / "data" / "customers.csv"
    head, first, *_ = customers.read_text(encoding="utf-8").splitlines()
    customers.write_text(f"{head}\n{first}\n", encoding="utf-8")
    ended = pipeline.run()
    assert ended.code == 1 and "of 14 orders would be refused" in ended.err
    assert pipeline.query("SELECT count(*) FROM rejected_orders") == [(0,)]


def test_the_file_may_also_be_run_by_its_path_from_any_folder(pipeline, tmp_path_factory, ran):
    copy, _, flags = ran
    ended = pipeline.run(*flags, program=(str(pipeline.home / "pipeline.py"),),
                         cwd=tmp_path_factory.mktemp("elsewhere"))
    assert ended.code == 0, ended
    assert pipeline.dump() == copy.dump()


def test_the_daily_sales_have_no_mistakes_to_check(pipeline):
    ended = pipeline.run("--check")
    assert ended.code == 0 and "6 tools read, no mistakes found" in ended.out, ended
    assert not (pipeline.home / "daily_sales.db").exists()
