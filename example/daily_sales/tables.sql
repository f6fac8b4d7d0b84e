-- All tables of the pipeline; get_connection() makes those that are not there yet.

CREATE TABLE IF NOT EXISTS raw_orders (  -- as they came: text, right or wrong
    order_id TEXT PRIMARY KEY, ordered_at TEXT, customer_id TEXT, product_id TEXT, quantity TEXT);

CREATE TABLE IF NOT EXISTS customers (
    customer_id TEXT PRIMARY KEY, name TEXT NOT NULL, region TEXT NOT NULL);

CREATE TABLE IF NOT EXISTS products (
    product_id TEXT PRIMARY KEY, name TEXT NOT NULL, category TEXT NOT NULL,
    price_cents INTEGER NOT NULL);

CREATE TABLE IF NOT EXISTS enriched_orders (
    order_id TEXT PRIMARY KEY, day TEXT NOT NULL, region TEXT NOT NULL,
    product_id TEXT NOT NULL, quantity INTEGER NOT NULL);

CREATE TABLE IF NOT EXISTS rejected_orders (
    order_id TEXT PRIMARY KEY, reason TEXT NOT NULL);

CREATE TABLE IF NOT EXISTS daily_sales (  -- of the orders in this run
    day TEXT, region TEXT, category TEXT, orders INTEGER NOT NULL, units INTEGER NOT NULL,
    revenue_cents INTEGER NOT NULL, PRIMARY KEY (day, region, category));

CREATE TABLE IF NOT EXISTS warehouse_sales (  -- of every day that was ever loaded
    day TEXT, region TEXT, category TEXT, orders INTEGER NOT NULL, units INTEGER NOT NULL,
    revenue_cents INTEGER NOT NULL, PRIMARY KEY (day, region, category));
