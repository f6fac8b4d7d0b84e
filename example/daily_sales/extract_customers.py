"""Load the customers, each with the region that its sales count for."""
import csv
from pathlib import Path

SOURCE = Path(__file__).with_name("data") / "customers.csv"

INSERT_CUSTOMER = """
    INSERT INTO customers (customer_id, name, region) VALUES (:customer_id, :name, :region)"""


def run(conn):
    """Replace all customers; return how many there are."""
    with SOURCE.open(newline="", encoding="utf-8") as file:
        customers = list(csv.DictReader(file))
    conn.execute("DELETE FROM customers")
    conn.executemany(INSERT_CUSTOMER, customers)
    return len(customers)
