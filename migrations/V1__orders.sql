-- Orders, their history, the messages they send and the messages that failed.
-- Money is numeric without a fixed scale, so that 59.98 and 59.980 come back as they were given.
-- JSON is json, not jsonb: it is stored once and told again, digit by digit, and a number such
-- as 1e131071 stays eight bytes instead of unfolding into its digits when it is read.

create table orders (
    order_id         uuid        not null,
    user_id          text        not null,
    external_id      text,
    lifecycle        text        not null,
    status           text        not null,
    -- Counts every change from 1 without gaps; every write is a compare-and-set on it.
    version          bigint      not null,
    -- The version of the last create or update: what the worker has to have seen.
    content_version  bigint      not null,
    amount           numeric,
    currency         text,
    items            json,
    payload          json,
    shipping_address text,
    billing_address  text,
    notes            text,
    due_at           timestamptz,
    created_at       timestamptz not null,
    updated_at       timestamptz not null,
    primary key (order_id),
    check (content_version between 1 and version),
    check (amount >= 0 and amount < 100000000000000 and scale(amount) <= 4),
    check (octet_length(user_id) > 0)
) partition by hash (order_id);

create table orders_p0 partition of orders for values with (modulus 4, remainder 0);
create table orders_p1 partition of orders for values with (modulus 4, remainder 1);
create table orders_p2 partition of orders for values with (modulus 4, remainder 2);
create table orders_p3 partition of orders for values with (modulus 4, remainder 3);

-- The marketplace's own id of an order, once per user. A table of its own because uniqueness
-- cannot cross the partitions of orders.
create table order_refs (
    user_id     text  not null,
    external_id text  not null,
    order_id    uuid  not null,
    -- Of the content the order was created with: tells a safe repeat from a conflict.
    fingerprint bytea not null,
    primary key (user_id, external_id)
) partition by hash (user_id);

create table order_refs_p0 partition of order_refs for values with (modulus 4, remainder 0);
create table order_refs_p1 partition of order_refs for values with (modulus 4, remainder 1);
create table order_refs_p2 partition of order_refs for values with (modulus 4, remainder 2);
create table order_refs_p3 partition of order_refs for values with (modulus 4, remainder 3);

-- History and inbox in one: what caused a change is written with the change, so the same cause
-- cannot change an order twice.
create table order_events (
    order_id       uuid        not null,
    -- The version that this made; of an ignored one, the version it found.
    version        bigint      not null,
    -- The event that this change published, if it did.
    event_id       uuid,
    cause          text        not null,
    type           text        not null,
    from_status    text,
    to_status      text        not null,
    ignored        boolean     not null default false,
    correlation_id uuid,
    -- The worker's answer, told again on redelivery.
    answer         json,
    at             timestamptz not null,
    primary key (order_id, cause)
) partition by hash (order_id);

create table order_events_p0 partition of order_events for values with (modulus 4, remainder 0);
create table order_events_p1 partition of order_events for values with (modulus 4, remainder 1);
create table order_events_p2 partition of order_events for values with (modulus 4, remainder 2);
create table order_events_p3 partition of order_events for values with (modulus 4, remainder 3);

-- Messages as they will be sent. Written with the change that they tell of, deleted once the
-- broker has them; normally almost empty.
create table outbox (
    order_id   uuid        not null,
    version    bigint      not null,
    seq        smallint    not null default 0,
    topic      text        not null,
    key        text        not null,
    headers    json        not null,
    body       text        not null,
    -- Not now(): a transaction that waited for the order's lock began before the one it waited
    -- for wrote, and its row must not look older.
    created_at timestamptz not null default clock_timestamp(),
    primary key (order_id, version, seq)
) with (
    -- Every row is dead within milliseconds. A fixed threshold keeps the table small however
    -- many rows have passed through it.
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 20000,
    autovacuum_vacuum_cost_delay = 0
);

-- Messages that could not be handled (from Kafka) or not be sent (from the outbox).
create table parked_messages (
    id              bigint      generated always as identity primary key,
    order_id        uuid,
    topic           text        not null,
    -- Where it was read; a message that could not be sent was read nowhere.
    partition       integer,
    kafka_offset    bigint,
    kafka_timestamp bigint,
    key             bytea,
    headers         json        not null,
    body            bytea,
    state           text        not null check (state in ('waiting', 'retrying', 'dead', 'done', 'discarded')),
    attempts        integer     not null default 0,
    reason          text,
    next_attempt_at timestamptz,
    created_at      timestamptz not null default now(),
    updated_at      timestamptz not null default now(),
    -- A dead message says why; no other message is asked to.
    check (state <> 'dead' or reason is not null),
    -- A redelivered record parks once. The timestamp tells it from the record at the same place
    -- of a topic that was deleted and made again.
    unique (topic, partition, kafka_offset, kafka_timestamp)
);
