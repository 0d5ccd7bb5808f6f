-- What deleted orders were created with, once their external id has gone on to another order: a create that is
-- delivered again, however late, must not bring them back. Until then order_refs has it. Written and read only
-- where an external id is taken again after a delete.
create table deleted_refs (
    user_id     text  not null,
    external_id text  not null,
    fingerprint bytea not null,
    order_id    uuid  not null,
    primary key (user_id, external_id, fingerprint)
-- As every table that grows with the orders (V9, V10).
) with (
    autovacuum_analyze_scale_factor = 1,
    autovacuum_vacuum_insert_scale_factor = 0,
    autovacuum_vacuum_insert_threshold = 250000
);
