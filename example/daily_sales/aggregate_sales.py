"""Count orders, units and revenue per day, region and category."""

INSERT_SALES = """
    INSERT INTO daily_sales
    SELECT day, region, category, count(*), sum(quantity), sum(quantity * price_cents)
    FROM enriched_orders JOIN products USING (product_id)
    GROUP BY day, region, category ORDER BY day, region, category"""

COUNT_BOTH = """
    SELECT (SELECT count(*) FROM enriched_orders), (SELECT sum(orders) FROM daily_sales)"""


def run(conn):
    """Replace the daily sales; return how many rows there are."""
    conn.execute("DELETE FROM daily_sales")
    return conn.execute(INSERT_SALES).rowcount


def check(conn):
    """Raise if an order is missing from the sums, because its product is not listed."""
    before, after = conn.execute(COUNT_BOTH).fetchone()
    if before != after:
        raise ValueError(f"{before} orders went into the sums, {after or 0} are in them")
