-- What the tickets are signed with that let a browser's page watch an order (api-service/src/tickets.rs). The
-- database makes the key, so that all replicas have the same and nobody has to set one. Tickets are signed with the
-- newest key, and any is good. For another one: insert into ticket_keys default values; and a quarter of an hour later
-- delete those before it.
create table ticket_keys (
    id         uuid        primary key default gen_random_uuid(),
    -- 244 bits of PostgreSQL's own strong randomness.
    secret     bytea       not null default uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()),
    created_at timestamptz not null default clock_timestamp()
);

insert into ticket_keys default values;

-- Who may read orders may let others watch them: the services may run as somebody else than who migrates.
do $$
declare
    may record;
begin
    for may in
        select case a.grantee when 0 then 'public' else a.grantee::regrole::text end as who
        from pg_class c, aclexplode(c.relacl) a
        where c.oid = 'orders'::regclass and a.privilege_type = 'SELECT' and a.grantee <> c.relowner
    loop
        execute format('grant select on ticket_keys to %s', may.who);
    end loop;
end $$;
