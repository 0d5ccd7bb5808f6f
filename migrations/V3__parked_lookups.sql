-- Looking after parked messages costs no more when many of them are done with.

-- Does an order have a failed message, and which is its first? Asked with every batch and by the
-- clock, and nearly always there is none.
create index parked_blocking on parked_messages (order_id, id)
    where kind = 'failed' and state in ('waiting', 'retrying', 'dead');
-- What came too early for an order that has moved now?
create index parked_early on parked_messages (order_id) where kind = 'early' and state = 'waiting';
-- What an operator sees: all that is not done with, from one id on.
drop index parked_open;
create index parked_open on parked_messages (id) where state not in ('done', 'discarded');
