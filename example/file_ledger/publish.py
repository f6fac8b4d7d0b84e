"""Sum up what each shop sold on each day, over all files that passed."""

INSERT_SHOP_DAYS = """
    INSERT INTO shop_days
    SELECT shop, day, count(*), sum(cents) FROM orders GROUP BY shop, day ORDER BY shop, day"""

SELECT_DAYS = """
    SELECT day, count(*), sum(orders), sum(cents) FROM shop_days GROUP BY day ORDER BY day"""


def run(conn):
    """Replace the data mart, and print its days; return how many rows it has."""
    conn.execute("DELETE FROM shop_days")
    rows = conn.execute(INSERT_SHOP_DAYS).rowcount
    print("day         shops  orders   revenue")
    for day, shops, orders, cents in conn.execute(SELECT_DAYS):
        print(f"{day}  {shops:>5}  {orders:>6}  {cents / 100:>8.2f}")
    return rows
