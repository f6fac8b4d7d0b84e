"""Put the daily sales into the warehouse, and print what was sold on each of these days."""

SELECT_DAYS = """
    SELECT day, sum(orders), sum(units), sum(revenue_cents)
    FROM daily_sales GROUP BY day ORDER BY day"""


def run(conn):
    """Replace the days that there are sales of, leave the others; return the rows loaded."""
    conn.execute("DELETE FROM warehouse_sales WHERE day IN (SELECT day FROM daily_sales)")
    rows = conn.execute("INSERT INTO warehouse_sales SELECT * FROM daily_sales").rowcount
    print("day         orders  units   revenue")
    for day, orders, units, cents in conn.execute(SELECT_DAYS):
        print(f"{day}  {orders:>6}  {units:>5}  {cents / 100:>8.2f}")
    return rows
