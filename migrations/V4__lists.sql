-- What lists of orders need. Each is read backwards, newest first, one index per partition merged:
-- no sort, and a page far down costs as much as the first. The order's id only decides between
-- orders of the same microsecond.

-- Orders by time. What it holds never changes, so a change of an order stays HOT; and all that is
-- new goes to its end: it costs the write path the least of the three (1 µs per order of some 30
-- that PostgreSQL has with one order).
create index orders_by_time on orders (created_at, order_id);

-- A user's orders. Never changes either; each order goes to another place of it (6 µs).
create index orders_by_user on orders (user_id, created_at, order_id);

-- Room on each page for the next version of its orders, so that a change of state stays HOT: it goes
-- into no index (94 % of them do, 48 % without; all have to where the state is in an index itself).
alter table orders_p0 set (fillfactor = 70);
alter table orders_p1 set (fillfactor = 70);
alter table orders_p2 set (fillfactor = 70);
alter table orders_p3 set (fillfactor = 70);

-- Orders in a state: those rejected today, among a million that are done. Beside orders and not an
-- index of it, since that would end HOT for every change of state (16 µs per order; this has 9).
create table order_states (
    status     text        not null,
    created_at timestamptz not null,
    order_id   uuid        not null,
    primary key (status, created_at, order_id)
) with (
    -- Most states are passed through at once; a list of such a state reads past what is dead.
    autovacuum_vacuum_scale_factor = 0.05
);

-- By triggers, so that it holds whoever writes; once per statement, however many orders it has.
create function order_states_of_new() returns trigger language plpgsql as $$
begin
    insert into order_states (status, created_at, order_id)
    select status, created_at, order_id from fresh;
    return null;
end $$;

create function order_states_of_changed() returns trigger language plpgsql as $$
begin
    -- Subqueries on ctid leave the planner no choice but the index: prepared on a small table, it
    -- would read the whole of it ever after.
    delete from order_states where ctid = any (array(
        select (select s.ctid from order_states s
                where s.status = o.status and s.created_at = o.created_at and s.order_id = o.order_id)
        from old o));
    insert into order_states (status, created_at, order_id)
    select status, created_at, order_id from fresh;
    return null;
end $$;

create trigger order_states_of_new after insert on orders
    referencing new table as fresh for each statement execute function order_states_of_new();
create trigger order_states_of_changed after update on orders
    referencing old table as old new table as fresh for each statement execute function order_states_of_changed();

insert into order_states (status, created_at, order_id) select status, created_at, order_id from orders;
