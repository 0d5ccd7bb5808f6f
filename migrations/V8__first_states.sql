-- Orders in their first version are listed apart from those that have changed since. Nearly all leave
-- it within milliseconds, and what they leave behind is dead: in one table with all other orders, a
-- list of their state read past it until the next vacuum, which took the longer the more orders there
-- were, since it read the index of all. Now what dies is in a table that stays small, and is vacuumed
-- every few seconds.

-- Keeps writers out, and nobody who reads.
lock table orders in share row exclusive mode;

-- Takes its name at the end: lists by state wait only for that.
create table new_states (
    status     text        not null,
    created_at timestamptz not null,
    order_id   uuid        not null,
    is_first   boolean     not null,
    constraint new_states_pkey primary key (status, created_at, order_id, is_first)
) partition by list (is_first);

create table order_states_first partition of new_states for values in (true) with (
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 20000,
    autovacuum_vacuum_cost_delay = 0
);
create table order_states_later partition of new_states for values in (false) with (
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 20000
);

insert into new_states (status, created_at, order_id, is_first)
select status, created_at, order_id, version = 1 from orders;

-- Who may use the old one may use these: the services may run as somebody else than who migrates.
do $$
declare
    may record;
begin
    for may in
        select a.privilege_type as what, case a.grantee when 0 then 'public' else a.grantee::regrole::text end as who
        from pg_class c, aclexplode(c.relacl) a
        where c.oid = 'order_states'::regclass and a.grantee <> c.relowner
    loop
        execute format('grant %s on new_states, order_states_first, order_states_later to %s', may.what, may.who);
    end loop;
end $$;

create or replace function order_states_of_new() returns trigger language plpgsql as $$
begin
    insert into order_states (status, created_at, order_id, is_first)
    select status, created_at, order_id, version = 1 from fresh;
    return null;
end $$;

create or replace function order_states_of_changed() returns trigger language plpgsql as $$
begin
    -- Subqueries on ctid leave the planner no choice but the index: prepared on a small table, it
    -- would read the whole of it ever after. A ctid is of one partition.
    delete from order_states_first where ctid = any (array(
        select (select s.ctid from order_states_first s
                where s.status = o.status and s.created_at = o.created_at and s.order_id = o.order_id)
        from old o where o.version = 1));
    delete from order_states_later where ctid = any (array(
        select (select s.ctid from order_states_later s
                where s.status = o.status and s.created_at = o.created_at and s.order_id = o.order_id)
        from old o where o.version <> 1));
    insert into order_states (status, created_at, order_id, is_first)
    select status, created_at, order_id, version = 1 from fresh;
    return null;
end $$;

drop table order_states;
alter table new_states rename to order_states;
alter table order_states rename constraint new_states_pkey to order_states_pkey;
