"""Load the products, with their prices in cents, so that sums of money stay exact."""
import csv
from decimal import Decimal
from pathlib import Path

SOURCE = Path(__file__).with_name("data") / "products.csv"

INSERT_PRODUCT = """
    INSERT INTO products (product_id, name, category, price_cents)
    VALUES (:product_id, :name, :category, :price_cents)"""


def run(conn):
    """Replace all products; return how many there are."""
    with SOURCE.open(newline="", encoding="utf-8") as file:
        products = list(csv.DictReader(file))
    for product in products:
        product["price_cents"] = int(Decimal(product["price"]) * 100)
    conn.execute("DELETE FROM products")
    conn.executemany(INSERT_PRODUCT, products)
    return len(products)
