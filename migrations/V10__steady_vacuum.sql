-- Vacuum takes tables that grow with the orders as often at ten million as at ten thousand, and less at a
-- time. Left to a share of the table it waits the longer the more orders there are: then it goes through
-- millions of rows at once, while orders wait for the disk.
do $$
declare
    grown regclass;
begin
    -- Every change of an order leaves a dead row.
    for grown in select relid from pg_partition_tree('orders') where isleaf loop
        execute format('alter table %s set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 50000)', grown);
    end loop;
    -- These are hardly ever changed, and vacuumed for what was added.
    for grown in
        select relid from pg_partition_tree('orders') where isleaf
        union all select relid from pg_partition_tree('order_refs') where isleaf
        union all select relid from pg_partition_tree('order_events') where isleaf
        union all select 'order_states_later'
    loop
        execute format('alter table %s set (autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 250000)', grown);
    end loop;
end $$;
