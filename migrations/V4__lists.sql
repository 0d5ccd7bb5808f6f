-- What lists of orders need. Each is read backwards, newest first, one index per partition merged:
-- no sort, and a page far down costs as much as the first. The order's id only decides between
-- orders of the same microsecond.

-- Orders by time. What it holds never changes, so a change of an order stays HOT; and all that is
-- new goes to its end: it costs the write path the least of the three (1 µs per order of some 30
-- that PostgreSQL has with one order).
create index orders_by_time on orders (created_at, order_id);

-- A user's orders. Never changes either; each order goes to another place of it (6 µs).
create index orders_by_user on orders (user_id, created_at, order_id);

-- Orders in a state: those rejected today, among a million that are done. The one that is dear
-- (12 µs): it ends HOT for every change of state, and half of those were, so that each has to go
-- into every other index, too. Without it a list of a rare state reads the table whole. Nothing
-- cheaper serves: a partial index, or the status as a mere passenger (include), ends HOT as well.
create index orders_by_status on orders (status, created_at, order_id);
