"""Load each validated file as it came."""
from .order_file import read_lines

INSERT_ORDER = """
    INSERT INTO staged_orders (file, line, order_id, shop, day, amount)
    VALUES (?, ?, ?, ?, ?, ?)"""


def run(conn, item, inbox):
    """Load the orders of one file; return how many there are."""
    version, lines = read_lines(inbox / item)
    validated = conn.execute("SELECT version FROM files WHERE file = ?", (item,)).fetchone()
    if (version,) != validated:
        raise ValueError("it was changed after validate had read it, which the next run will see")
    # There is something to delete only if an earlier version was loaded.
    conn.execute("DELETE FROM staged_orders WHERE file = ?", (item,))
    orders = [(item, number, *line) for number, line in enumerate(lines[1:-1], start=2)]
    conn.executemany(INSERT_ORDER, orders)
    return len(orders)
