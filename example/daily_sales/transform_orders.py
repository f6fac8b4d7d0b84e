"""Give every order its day and region; keep what is refused, with the reason."""

INSERT_REJECTED = """
    INSERT INTO rejected_orders
    SELECT order_id, reason FROM (
        SELECT order_id,
            CASE
                WHEN date(ordered_at) IS NULL THEN 'the date is none'
                WHEN quantity = '' OR quantity GLOB '*[^0-9]*' OR CAST(quantity AS INTEGER) < 1
                    THEN 'the quantity is no whole number from 1 on'
                WHEN region IS NULL THEN 'there is no such customer'
            END AS reason
        FROM raw_orders LEFT JOIN customers USING (customer_id))
    WHERE reason IS NOT NULL"""

INSERT_ENRICHED = """
    INSERT INTO enriched_orders
    SELECT order_id, date(ordered_at), region, product_id, CAST(quantity AS INTEGER)
    FROM raw_orders JOIN customers USING (customer_id)
    WHERE order_id NOT IN (SELECT order_id FROM rejected_orders)"""


def run(conn, context):
    """Replace the enriched and the rejected orders; return how many there are of each."""
    conn.execute("DELETE FROM rejected_orders")
    conn.execute("DELETE FROM enriched_orders")
    rejected = conn.execute(INSERT_REJECTED).rowcount
    rows = conn.execute(INSERT_ENRICHED).rowcount
    for order, reason in conn.execute("SELECT order_id, reason FROM rejected_orders ORDER BY 1"):
        context.log.warning("order %s is refused: %s", order, reason)
    return {"rows": rows, "rejected": rejected}


def check(conn):
    """Raise if so many orders were refused that the files no longer fit together."""
    count = "SELECT (SELECT count(*) FROM rejected_orders), (SELECT count(*) FROM raw_orders)"
    rejected, orders = conn.execute(count).fetchone()
    if 4 * rejected > orders:
        raise ValueError(f"{rejected} of {orders} orders would be refused")
