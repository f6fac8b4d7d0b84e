"""Daily sales: orders, customers and products become revenue per day, region and category.

From the root of the repository:

    python -m example.daily_sales.pipeline --plan --jobs 4
    python -m example.daily_sales.pipeline --jobs 4

What a tool reads and writes says what it waits for: no order is written down anywhere. With
`--jobs`, the three extracts run side by side, and each tool after them starts the moment that the
last table it reads is there. `orders.csv` holds two orders that can not be counted; they end in
the table `rejected_orders`, each with the reason.
"""
import sqlite3
import sys
from pathlib import Path

# The root of the repository, for when this file is run by its path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from orchestrator import main

HERE = Path(__file__).resolve().parent

TOOL_MAP = {
    "extract_orders": {
        "module": "example.daily_sales.extract_orders", "estimate": "2m",
        "reads": ["orders.csv"], "writes": ["raw_orders"]},
    "extract_customers": {
        "module": "example.daily_sales.extract_customers", "estimate": "1m",
        "reads": ["customers.csv"], "writes": ["customers"]},
    "extract_products": {
        "module": "example.daily_sales.extract_products", "estimate": "30s",
        "reads": ["products.csv"], "writes": ["products"]},
    "transform_orders": {
        "module": "example.daily_sales.transform_orders", "estimate": "3m",
        "reads": ["raw_orders", "customers"], "writes": ["enriched_orders", "rejected_orders"]},
    "aggregate_sales": {
        "module": "example.daily_sales.aggregate_sales", "estimate": "90s",
        "reads": ["enriched_orders", "products"], "writes": ["daily_sales"]},
    "load_warehouse": {
        "module": "example.daily_sales.load_warehouse", "estimate": "1m",
        "reads": ["daily_sales"], "writes": ["warehouse_sales"]},
}

STAGES = {
    "extract":   ["extract_orders", "extract_customers", "extract_products"],
    "transform": ["transform_orders", "aggregate_sales"],
    "load":      ["load_warehouse"],
    "full":      ["extract", "transform", "load"],
}


def get_connection():
    """Return a connection to the database, which holds all tables from the start.

    Workers share the file, and one writes at a time: the others wait up to `timeout` seconds. But
    SQLite lets a transaction wait only if it begins by writing. So every tool deletes its old
    rows first, and reads after that.
    """
    # No `PRAGMA journal_mode = WAL`: workers that switch a new file to it at once do not wait.
    conn = sqlite3.connect(HERE / "daily_sales.db", timeout=60)
    conn.executescript((HERE / "tables.sql").read_text(encoding="utf-8"))
    return conn


if __name__ == "__main__":
    sys.exit(main(TOOL_MAP, STAGES, get_connection, name="daily_sales"))
