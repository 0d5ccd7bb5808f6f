//! `worker`: moves orders along their lifecycle and answers those who wait.
//!
//! One event's path: [`consumer`] reads a batch → [`record`] decodes → [`handler`] decides, purely
//! → [`batch`] and [`store`] write it in one transaction → [`answers`] tells who waits, and marks as read.
//! What fails goes by [`parking`]; what takes too long, by the [`clock`].

#![warn(clippy::print_stdout, clippy::print_stderr)]

mod answers;
mod batch;
pub mod cli;
mod clock;
pub mod config;
mod consumer;
mod handler;
#[cfg(feature = "hot")]
#[doc(hidden)]
pub mod hot;
mod http;
mod parking;
mod received;
mod record;
mod reply;
mod store;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::bail;
use metrics_exporter_prometheus::PrometheusHandle;
use shared::{
    backoff::{Backoff, Seldom},
    cache::Cache,
    db::{self, Db},
    kafka::{Producer, ensure_topics},
    lifecycle::Lifecycles,
    outbox::Outbox,
    server,
    settings::KafkaSettings,
};
use tokio::{net::TcpListener, runtime::Handle, sync::Notify, task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{batch::Handler, clock::Clock, config::Config, http::App, parking::Parking};

const MEASURE_INTERVAL: Duration = Duration::from_secs(2);

/// Works until `shutdown`, then finishes its batch. `listeners` are for health and metrics.
///
/// # Errors
/// When the settings contradict each other, the database has a schema that is not ours, or a part
/// of the process died.
pub async fn run(
    config: Config,
    listeners: Vec<TcpListener>,
    metrics: PrometheusHandle,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let lifecycles = config.check()?;
    let cache = Cache::open(&config.cache)?;
    let service = &config.kafka.service.service_name;
    let db = Db::open(&config.db.postgres_dsn, service, config.db.pool(), &Handle::current())?;
    let producer = Producer::new(&config.kafka)?;
    let (outbox, deleter) = Outbox::new(db.clone(), producer.clone(), config.kafka.outbox_grace());
    let [started, leaving, stop] = std::array::from_fn(|_| CancellationToken::new());
    let timeout = Duration::from_millis(config.kafka.service.shutdown_timeout_ms);

    let app = http::router(App { db: db.clone(), metrics, started: started.clone(), leaving: leaving.clone() });
    let mut serving = JoinSet::new();
    for listener in listeners {
        let stop = server::Stop { leaving: leaving.clone(), grace: Duration::ZERO, timeout };
        serving.spawn(server::serve("http", listener, app.clone(), stop));
    }
    let deleter = tokio::spawn(deleter);
    let mut vital = JoinSet::new();
    let handler = Handler {
        db,
        cache,
        outbox: outbox.clone(),
        lifecycles,
        retries: config.retries.clone(),
        wake: Arc::new(Notify::new()),
    };
    vital.spawn(work(config, handler, producer, started, leaving.clone(), stop.clone()));

    let failed = tokio::select! {
        () = shutdown => None,
        ended = vital.join_next() => ended,
    };
    let deadline = Instant::now() + timeout;
    leaving.cancel();
    let ended = match failed {
        Some(result) => Some(result),
        None => tokio::time::timeout_at(deadline, vital.join_next()).await.ok().flatten(),
    };
    stop.cancel();
    outbox.drain(deadline).await;
    drop(outbox);
    let _ = tokio::time::timeout_at(deadline, async {
        let _ = deleter.await;
        while serving.join_next().await.is_some() {}
    })
    .await;
    match ended {
        Some(Ok(result)) => result,
        Some(Err(panic)) => Err(panic.into()),
        None => bail!("the last batch was not finished in time; it will be handled again, to no effect"),
    }
}

/// Waits for what is needed, then reads until `leaving`.
async fn work(
    config: Config,
    handler: Handler,
    producer: Producer,
    started: CancellationToken,
    leaving: CancellationToken,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let preparing = prepare(&config.kafka, &handler.db, &producer, handler.lifecycles);
    let Some(prepared) = leaving.run_until_cancelled(preparing).await else {
        return Ok(());
    };
    prepared?;
    tracing::info!("ready");
    started.cancel();
    let measuring = stop.run_until_cancelled(measure(&handler.db));
    let sweeping = handler.outbox.sweep(stop.clone());
    let clocks = (0..config.clock.scheduler_worker_count)
        .map(|_| Clock::new(handler.clone(), config.clock.clone()).run(leaving.clone()));
    let clocks = futures_util::future::join_all(clocks);
    let mut topics: Vec<String> = handler.lifecycles.received_topics().map(ToOwned::to_owned).collect();
    topics.push(config.kafka.orders_events_topic.clone());
    let parking = Parking { handler: handler.clone(), topics }.run(leaving.clone());
    let events = [config.kafka.orders_events_topic.as_str()];
    let received: Vec<&str> = handler.lifecycles.received_topics().collect();
    // A group each: two members of one process in the same group make each other join twice, and a
    // member that dies while it joins is missed only after two sessions' time.
    let group = &config.worker.worker_group;
    let others_group = format!("{group}.received");
    let read = |topics, group| {
        let (handler, producer, leaving) = (handler.clone(), producer.clone(), leaving.clone());
        consumer::run(handler, producer, &config.kafka, group, topics, leaving)
    };
    let reading = async {
        // The first that fails ends all.
        let received =
            async { if received.is_empty() { Ok(()) } else { read(received.as_slice(), &others_group).await } };
        tokio::try_join!(read(events.as_slice(), group), received).map(drop)
    };
    let others = async { tokio::join!(clocks, parking) };
    tokio::pin!(reading, others);
    let handling = async {
        tokio::select! {
            // In order, it ends first; and what it cannot go on with ends all.
            result = &mut reading => {
                result?;
                others.await;
                Ok(())
            }
            _ = &mut others => reading.await,
        }
    };
    tokio::select! {
        result = handling => result,
        never = handler.db.watch() => match never {},
        // Those two end only after the reading.
        _ = futures_util::future::join(measuring, sweeping) => Ok(()),
    }
}

async fn prepare(
    settings: &KafkaSettings,
    db: &Db,
    producer: &Producer,
    lifecycles: &Lifecycles,
) -> anyhow::Result<()> {
    db::migrate_when_possible(&db.pool).await?;
    let (mut backoff, mut told) = (Backoff::RECONNECT, Seldom::default());
    loop {
        let topics = [&*settings.orders_events_topic, &*settings.orders_ack_topic];
        let ready = async {
            ensure_topics(settings, &topics).await?;
            producer.partitions(&settings.orders_ack_topic).await
        };
        match ready.await {
            Ok(_) => {
                // Those of others: who may not make them here finds them made elsewhere.
                let mut topics = lifecycles.emitted_topics();
                topics.extend(lifecycles.received_topics());
                if let Err(error) = ensure_topics(settings, &topics).await {
                    tracing::warn!(error = format!("{error:#}"), "cannot make the lifecycles' topics");
                }
                return Ok(());
            }
            Err(error) => {
                let error = format!("{error:#}");
                if told.is_due(&error) {
                    tracing::warn!(error, "waiting for Kafka");
                }
                tokio::time::sleep(backoff.delay()).await;
            }
        }
    }
}

async fn measure(db: &Db) {
    let mut seen: BTreeMap<(String, String), i64> = BTreeMap::new();
    loop {
        let count = async {
            let connection = db.connection().await?;
            connection.within(db.settings.query_timeout, store::parked::count(&connection)).await
        };
        match count.await {
            Ok(counts) => {
                // What is gone must not be shown for ever.
                for ((state, kind), count) in seen.iter_mut() {
                    *count = counts.get(&(state.clone(), kind.clone())).copied().unwrap_or(0);
                }
                seen.extend(counts);
                for ((state, kind), count) in &seen {
                    let labels = [("state", state.clone()), ("kind", kind.clone())];
                    metrics::gauge!("orderstream_parked_messages", &labels).set(*count as f64);
                }
            }
            Err(error) => tracing::debug!(error = error.chain(), "counting"),
        }
        tokio::time::sleep(MEASURE_INTERVAL).await;
    }
}
