-- What an Idempotency-Key has done: written with the change, never changed, so that a repeat is
-- told the outcome whatever became of the first answer.
create table idempotency_keys (
    -- Whose key it is: the caller, else the order's user.
    scope          text        not null,
    key            text        not null,
    -- Of the request: the same key with another one is refused.
    fingerprint    bytea       not null,
    order_id       uuid        not null,
    -- The request's own version and correlation id; what became of it is in order_events.
    version        bigint      not null,
    correlation_id uuid        not null,
    -- Until then the first caller may still be waiting for its answer.
    answer_by      timestamptz not null,
    created_at     timestamptz not null,
    primary key (scope, key)
);

-- What is older than it is kept for is looked for every minute.
create index idempotency_keys_created on idempotency_keys (created_at);
