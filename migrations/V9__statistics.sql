-- The planner's statistics of these tables are made anew when they have doubled, not each time that a
-- tenth was added: each time reads a sample of up to 30,000 rows of each partition, and without it 4 to
-- 6 % more orders are stored per second. Statements are made for an index each, and a plan that was made
-- for a small table is made anew at each doubling.
do $$
declare
    grown regclass;
begin
    for grown in
        select relid from pg_partition_tree('orders') where isleaf
        union all select relid from pg_partition_tree('order_refs') where isleaf
        union all select relid from pg_partition_tree('order_events') where isleaf
        union all select 'order_states_later'
        union all select 'idempotency_keys'
    loop
        execute format('alter table %s set (autovacuum_analyze_scale_factor = 1)', grown);
    end loop;
end $$;

-- Nearly empty whenever somebody looks, and all of it new: a share of that is no measure.
alter table outbox set (autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 1000000);
alter table order_states_first set (autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 1000000);
