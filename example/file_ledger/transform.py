"""Type the orders of each loaded file; keep what is refused, with the reason."""
import csv
from pathlib import Path

from .order_file import parse_cents

SHOPS = Path(__file__).with_name("shops.csv")

SELECT_STAGED = """
    SELECT line, order_id, shop, day, amount FROM staged_orders WHERE file = ? ORDER BY line"""

COUNT_BOTH = """
    SELECT (SELECT count(*) FROM orders WHERE file = :file),
           (SELECT count(*) FROM rejected_orders WHERE file = :file)"""


def run(conn, item):
    """Replace the typed and the rejected orders of one file; return how many there are of each."""
    with SHOPS.open(newline="", encoding="utf-8") as file:
        shops = {row["shop"] for row in csv.DictReader(file)}
    orders, rejected = [], []
    for line, order, shop, day, amount in conn.execute(SELECT_STAGED, (item,)):
        if shop not in shops:
            rejected.append((item, line, f"there is no shop {shop}"))
        elif item != f"orders-{day}.csv":
            rejected.append((item, line, "not of the day that the file is named after"))
        else:
            orders.append((item, line, int(order), shop, day, parse_cents(amount)))
    conn.execute("DELETE FROM orders WHERE file = ?", (item,))
    conn.execute("DELETE FROM rejected_orders WHERE file = ?", (item,))
    conn.executemany("INSERT INTO orders VALUES (?, ?, ?, ?, ?, ?)", orders)
    conn.executemany("INSERT INTO rejected_orders VALUES (?, ?, ?)", rejected)
    return len(orders)


def check(conn, item):
    """Raise if so much of the file was refused that a shop must be missing from the list."""
    kept, lost = conn.execute(COUNT_BOTH, {"file": item}).fetchone()
    if 4 * lost > kept + lost:
        raise ValueError(f"{lost} of {kept + lost} orders would be refused")
