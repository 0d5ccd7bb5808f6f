-- What a program with a connection per caller would do at best: one order and its outbox row, one
-- prepared statement, one transaction. The rows carry as many bytes as those of the service, but
-- there is no history, no uniqueness of external ids, no HTTP, no Kafka and nobody who handles them.
\set user_number random(1, 100000)
with new_order as (
    insert into ceiling.orders (order_id, user_id, external_id, lifecycle, status, version,
                                content_version, currency, payload, created_at, updated_at)
    values (gen_random_uuid(), md5(:user_number::text), gen_random_uuid()::text, 'marketplace', 'new', 1,
            1, 'BRL', :payload, now(), now())
    returning order_id
)
insert into ceiling.outbox (order_id, version, topic, key, headers, body)
select order_id, 1, 'orders.events', order_id::text, '{}', :event from new_order;
