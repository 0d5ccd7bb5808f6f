-- What declared lifecycles, their clock and the redriving of failures need.

-- The clock asks for what is due. Most orders have no time to keep: those are not in the index,
-- and a change of theirs stays HOT.
create index orders_due on orders (due_at) where due_at is not null;

alter table parked_messages
    -- failed: its handling failed, or it follows one of its order that did; the order's later
    --     messages wait behind it.
    -- early: the order is not yet where this moves it, or not there; holds nothing back.
    -- conflict: it contradicts the final state of its order; for operators to close.
    -- unreadable: nobody can tell what it means.
    -- unsent: of our own, and refused by the broker for good.
    add column kind text not null default 'unreadable'
        check (kind in ('failed', 'early', 'conflict', 'unreadable', 'unsent')),
    -- Every attempt's error: [{"at", "error"}], oldest first.
    add column errors jsonb not null default '[]',
    -- Of an unsent one: where it lay in the outbox.
    add column version bigint,
    add column seq smallint;

-- Does an order have anything parked? Asked with every batch, and nearly always no.
create index parked_open on parked_messages (order_id, id) where state <> 'done';
-- What is to be tried again now?
create index parked_due on parked_messages (next_attempt_at) where next_attempt_at is not null;
