"""Load the orders as they came; transform_orders finds what is wrong with some."""
import csv
from pathlib import Path

SOURCE = Path(__file__).with_name("data") / "orders.csv"

INSERT_ORDER = """
    INSERT INTO raw_orders (order_id, ordered_at, customer_id, product_id, quantity)
    VALUES (:order_id, :ordered_at, :customer_id, :product_id, :quantity)"""


def run(conn):
    """Replace all raw orders; return how many there are."""
    with SOURCE.open(newline="", encoding="utf-8") as file:
        orders = list(csv.DictReader(file))
    conn.execute("DELETE FROM raw_orders")
    conn.executemany(INSERT_ORDER, orders)
    return len(orders)
