-- Looking after parked messages costs no more when many of them are done with. While the table is
-- small all partial indexes cost a planner the same, and prepared statements are planned once: so
-- each index has a condition that only those questions meet which it is for.

-- Does an order have anything parked?
drop index parked_open;
create index parked_open on parked_messages (order_id, id) where order_id is not null and state <> 'done';
-- Has it a failed message, and which is its first? Asked with every batch and by the clock, and
-- nearly always there is none.
create index parked_blocking on parked_messages (order_id, id)
    where kind = 'failed' and state in ('waiting', 'retrying', 'dead');
-- What came too early for an order that has moved now?
create index parked_early on parked_messages (order_id) where kind = 'early' and state in ('waiting', 'dead');
-- What an operator sees: all that is not done with, from one id on.
create index parked_listed on parked_messages (id) where id > 0 and state not in ('done', 'discarded');
