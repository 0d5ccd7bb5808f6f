//! `api-service`: orders in over HTTP and gRPC, durable in PostgreSQL, told to Kafka, answered when the
//! worker has.
//!
//! One order's path: [`http`] parses → [`orders`] decides whether to wait → [`writer`] stores it
//! in a batch → `shared::outbox` publishes → … the worker … → [`acks`] hears the answer →
//! [`waiters`] wakes the caller.

#![warn(clippy::print_stdout, clippy::print_stderr)]

mod acks;
mod body;
mod change;
pub mod config;
mod error;
mod front;
mod grpc;
mod heard;
#[cfg(feature = "hot")]
#[doc(hidden)]
pub mod hot;
mod http;
mod idempotency;
mod identity;
mod json;
mod orders;
mod prices;
mod rate;
mod request;
mod store;
mod tickets;
mod unpriced;
mod waiters;
mod watch;
mod write_path;
mod writer;

use std::{sync::Arc, time::Duration};

use anyhow::bail;
use metrics_exporter_prometheus::PrometheusHandle;
use shared::{
    cache::Cache,
    db::{self, Db, DbError},
    kafka::{Producer, ensure_topics},
    outbox::Outbox,
    server,
    settings::KafkaSettings,
    vacuum::clear_dead_rows,
};
use tokio::{net::TcpListener, runtime::Handle, sync::Semaphore, task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    acks::ReplyAddress,
    config::Config,
    front::Front,
    http::AppState,
    identity::Identity,
    orders::{Foreign, Orders},
    rate::RateLimiter,
    tickets::Tickets,
    waiters::Waiters,
    watch::Watchers,
    write_path::WritePath,
    writer::Writer,
};

/// How long the start waits for Kafka before it serves without it.
const KAFKA_PATIENCE: Duration = Duration::from_secs(10);
/// Kept for sending answers, events and acks after the last caller is told that time is up.
const LAST_ACTS: Duration = Duration::from_secs(2);
/// What all bodies that are being read may come to, in KiB: callers that send slowly, or never
/// end, would otherwise take whatever memory there is.
const BODIES_KIB: usize = 64 * 1024;
const MEASURE_INTERVAL: Duration = Duration::from_secs(2);

/// Where callers come in, by what they speak.
pub struct Listeners {
    pub http: Vec<TcpListener>,
    pub grpc: Vec<TcpListener>,
    /// For operators.
    pub admin: Vec<TcpListener>,
}

/// Serves on the listeners until `shutdown`; then finishes what has begun.
///
/// # Errors
/// When the settings contradict each other, the database has a schema that is not ours, or a part
/// of the process died.
pub async fn run(
    config: Config,
    listeners: Listeners,
    metrics: PrometheusHandle,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let defaults = config.check()?;
    let identity = config.identity()?;
    let prices = config.prices.open()?;
    let path = WritePath::start()?;
    let db = open(&config, path.handle())?;
    let cache = Cache::open(&config.cache)?;
    let producer = Producer::new(&config.kafka)?;
    let (outbox, deleter) = Outbox::new(db.clone(), producer.clone(), config.kafka.outbox_grace());
    let waiters = Waiters::new(config.api.max_waiters);
    let replies = ReplyAddress::new(&config.kafka.orders_ack_topic);
    let [started, migrated, leaving, hurry, stop] = std::array::from_fn(|_| CancellationToken::new());

    // Those that must not end before the process does, and those that end with their last handle.
    let (mut vital, mut writers) = (JoinSet::new(), JoinSet::new());
    let topic = &config.kafka.orders_events_topic;
    let (writer, writing) = Writer::new(&db, &cache, &outbox, defaults.lifecycles, topic, &hurry);
    for writing in writing {
        writers.spawn_on(writing, path.handle());
    }
    vital.spawn(keep_migrated(db.clone(), migrated.clone(), stop.clone()));
    vital.spawn(look_for_database(db.clone(), stop.clone()));
    let answers = serve_kafka(config.clone(), producer.clone(), replies.clone(), waiters.clone(), stop.clone());
    vital.spawn_on(answers, path.handle());
    vital.spawn(look_after_outbox(db.clone(), outbox.clone(), config.kafka.clone(), migrated.clone(), stop.clone()));
    vital.spawn(wait_for_start(replies.clone(), migrated.clone(), started.clone(), stop.clone()));
    vital.spawn(forget_keys(db.clone(), config.api.idempotency_ttl, migrated.clone(), stop.clone()));
    if let (Identity::Jwt(tokens), Some(path)) = (&identity, config.auth.jwks_file()) {
        let (tokens, stop) = (tokens.clone(), stop.clone());
        vital.spawn(async move {
            tokens.follow(path, stop).await;
            Ok(())
        });
    }
    let watchers = Watchers::new(config.api.max_watchers, defaults.lifecycles);
    vital.spawn({
        let telling = watchers.clone().tell(db.clone(), config.api.watch_interval, leaving.clone());
        async move {
            telling.await;
            Ok(())
        }
    });
    let deleter = path.handle().spawn(deleter);

    let admin = http::admin::Admin { db: db.clone(), lifecycles: defaults.lifecycles, token: config.admin_token() };
    let (admin, mut operating) = (http::admin::router(admin), JoinSet::new());
    for listener in listeners.admin {
        let stop = server::Stop { leaving: leaving.clone(), grace: Duration::ZERO, timeout: LAST_ACTS };
        operating.spawn(server::serve("admin", listener, admin.clone(), stop));
    }
    let orders = Orders {
        db,
        cache,
        writer,
        waiters,
        replies,
        producer: producer.clone(),
        topic: topic.clone(),
        hurry: hurry.clone(),
        foreign: Foreign::default(),
    };
    let app = Arc::new(AppState {
        tickets: Tickets::new(orders.db.clone()),
        orders,
        identity,
        watchers,
        retail: http::Retail::new(&defaults, prices),
        limiter: config.limits.quota()?.map(RateLimiter::new),
        front: Front { trusted: config.limits.trusted_proxies.clone(), path: config.limits.public_path.clone() },
        origins: config.limits.cors_allowed_origins.clone(),
        allowed_headers: config.limits.cors_allowed_headers.clone(),
        defaults,
        limits: config.wait_limits(),
        max_body_bytes: config.api.max_body_bytes,
        body_room: Arc::new(Semaphore::new(BODIES_KIB)),
        bulk_places: http::bulk::Places::default(),
        metrics,
        started,
        leaving: leaving.clone(),
    });
    let service = &config.kafka.service;
    let timeout = Duration::from_millis(service.shutdown_timeout_ms);
    let grace = Duration::from_millis(service.shutdown_grace_ms).min(timeout);
    let patience = timeout.saturating_sub(LAST_ACTS).max(grace);
    let end = server::Stop { leaving: leaving.clone(), grace, timeout: timeout.saturating_sub(LAST_ACTS / 2) };
    let mut serving = JoinSet::new();
    let (grpc, http) = (grpc::router(app.clone())?, http::service(app));
    for listener in listeners.grpc {
        serving.spawn(server::serve_http2("grpc", listener, grpc.clone(), end.clone()));
    }
    for listener in listeners.http {
        serving.spawn(server::serve("http", listener, http.clone(), end.clone()));
    }
    // The writers end with the last of those who use them.
    drop((grpc, http));

    let failed = tokio::select! {
        () = shutdown => None,
        ended = vital.join_next() => Some(ended),
        ended = writers.join_next() => Some(ended.map(|result| result.map(Ok))),
    };
    let deadline = Instant::now() + timeout;
    leaving.cancel();
    let last_call = tokio::spawn({
        let hurry = hurry.clone();
        async move {
            tokio::time::sleep(patience).await;
            hurry.cancel();
        }
    });
    // Callers that wait still need the outbox and the acks: those end after the last of them.
    while let Some(ended) = serving.join_next().await {
        ended?;
    }
    last_call.abort();
    let _ = tokio::time::timeout_at(deadline, async { while writers.join_next().await.is_some() {} }).await;
    outbox.drain(deadline).await;
    stop.cancel();
    drop(outbox);
    let _ = tokio::time::timeout_at(deadline, async {
        while vital.join_next().await.is_some() {}
        while operating.join_next().await.is_some() {}
        deleter.await
    })
    .await;
    match failed {
        None => Ok(()),
        Some(Some(Ok(Err(error)))) => Err(error),
        Some(Some(Err(panic))) => Err(panic.into()),
        Some(Some(Ok(Ok(()))) | None) => bail!("a part of the process ended by itself"),
    }
}

/// The database as the settings describe it; its connections live on this runtime.
///
/// # Errors
/// When the DSN makes no sense.
pub fn open(config: &Config, runtime: &Handle) -> anyhow::Result<Db> {
    Db::open(&config.db.postgres_dsn, &config.kafka.service.service_name, config.db.pool(), runtime)
}

async fn keep_migrated(db: Db, migrated: CancellationToken, stop: CancellationToken) -> anyhow::Result<()> {
    if let Some(result) = stop.run_until_cancelled(db::migrate_when_possible(&db.pool)).await {
        result?;
        migrated.cancel();
        stop.cancelled().await;
    }
    Ok(())
}

async fn look_for_database(db: Db, stop: CancellationToken) -> anyhow::Result<()> {
    stop.run_until_cancelled(db.watch()).await;
    Ok(())
}

async fn serve_kafka(
    config: Config,
    producer: Producer,
    replies: ReplyAddress,
    waiters: Waiters,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    stop.run_until_cancelled(acks::listen(config.kafka, producer, replies, waiters)).await;
    Ok(())
}

async fn forget_keys(
    db: Db,
    ttl: Duration,
    migrated: CancellationToken,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let forget = async {
        migrated.cancelled().await;
        idempotency::forget_old_keys(db, ttl).await;
    };
    stop.run_until_cancelled(forget).await;
    Ok(())
}

/// Sweeps and measures the outbox once there is one, and keeps tables clear of dead rows.
async fn look_after_outbox(
    db: Db,
    outbox: Outbox,
    settings: KafkaSettings,
    migrated: CancellationToken,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let measure = async {
        loop {
            let topic = &settings.orders_events_topic;
            match outbox.measure().await {
                // Somebody may have deleted the topic.
                Ok(oldest) if outbox.is_stuck(oldest) => {
                    if let Err(error) = ensure_topics(&settings, &[topic]).await {
                        tracing::warn!(error = format!("{error:#}"), "the outbox is stuck");
                    }
                }
                Ok(_) => {}
                Err(error) => log_db("measuring the outbox", error),
            }
            if let Err(error) = clear_dead_rows(&db).await {
                log_db("vacuuming", error);
            }
            // With nothing to send nobody would notice that it is back, and the next caller would
            // not be parked.
            if outbox.producer().is_away()
                && let Err(error) = outbox.producer().partitions(topic).await
            {
                tracing::debug!(error = format!("{error:#}"), "looking for Kafka");
            }
            tokio::time::sleep(MEASURE_INTERVAL).await;
        }
    };
    let look_after = async {
        migrated.cancelled().await;
        tokio::join!(outbox.sweep(stop.clone()), stop.run_until_cancelled(measure))
    };
    stop.run_until_cancelled(look_after).await;
    Ok(())
}

fn log_db(doing: &'static str, error: DbError) {
    tracing::debug!(error = error.chain(), "{doing}");
}

/// Ready when the tables are there and answers can be heard; without Kafka, after a while.
async fn wait_for_start(
    replies: ReplyAddress,
    migrated: CancellationToken,
    started: CancellationToken,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let kafka = tokio::time::timeout(KAFKA_PATIENCE, replies.known());
    let both = async { tokio::join!(migrated.cancelled(), kafka).1 };
    if let Some(kafka) = stop.run_until_cancelled(both).await {
        if kafka.is_err() {
            tracing::warn!("Kafka is away; serving without it: callers are told 202 instead of waiting");
        }
        tracing::info!("ready");
        started.cancel();
        stop.cancelled().await;
    }
    Ok(())
}
