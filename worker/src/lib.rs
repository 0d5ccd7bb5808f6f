//! `worker`: moves orders along their lifecycle and answers those who wait.
//!
//! One event's path: [`consumer`] reads a batch → [`record`] decodes → [`handler`] decides, purely
//! → [`batch`] and [`store`] write it in one transaction → [`consumer`] answers, and marks as read.

mod batch;
pub mod config;
mod consumer;
mod handler;
mod http;
mod record;
mod store;

use std::{sync::Arc, time::Duration};

use anyhow::bail;
use metrics_exporter_prometheus::PrometheusHandle;
use shared::{
    backoff::Backoff,
    db::{self, Db},
    kafka::{Producer, ensure_topics},
    outbox::Outbox,
    server,
    settings::KafkaSettings,
};
use tokio::{net::TcpListener, task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{config::Config, http::App};

const MEASURE_INTERVAL: Duration = Duration::from_secs(2);

/// Works until `shutdown`, then finishes its batch. `listener` is for health and metrics.
///
/// # Errors
/// When the settings contradict each other, the database has a schema that is not ours, or a part
/// of the process died.
pub async fn run(
    config: Config,
    listener: Option<TcpListener>,
    metrics: PrometheusHandle,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    config.db.check()?;
    config.kafka.check()?;
    let settings = Arc::new(config.db.pool());
    let db = Db { pool: db::pool(&config.db.postgres_dsn, &config.kafka.service.service_name, &settings)?, settings };
    let producer = Producer::new(&config.kafka)?;
    let (outbox, deleter) = Outbox::new(db.clone(), producer.clone(), config.kafka.outbox_grace());
    let [started, leaving, stop] = std::array::from_fn(|_| CancellationToken::new());
    let timeout = Duration::from_millis(config.kafka.service.shutdown_timeout_ms);

    let serving = listener.map(|listener| {
        let app = App { db: db.clone(), metrics, started: started.clone(), leaving: leaving.clone() };
        let stop = server::Stop { leaving: leaving.clone(), grace: Duration::ZERO, timeout };
        tokio::spawn(server::serve("http", listener, http::router(app), stop))
    });
    let deleter = tokio::spawn(deleter);
    let mut vital = JoinSet::new();
    vital.spawn(work(config, db, producer, outbox.clone(), started, leaving.clone(), stop.clone()));

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
        if let Some(serving) = serving {
            let _ = serving.await;
        }
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
    db: Db,
    producer: Producer,
    outbox: Outbox,
    started: CancellationToken,
    leaving: CancellationToken,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let Some(prepared) = leaving.run_until_cancelled(prepare(&config.kafka, &db, &producer)).await else {
        return Ok(());
    };
    prepared?;
    tracing::info!("ready");
    started.cancel();
    let measuring = stop.run_until_cancelled(measure(&db));
    let sweeping = outbox.sweep(stop.clone());
    let reading = consumer::run(db.clone(), producer, &config.kafka, &config.worker.worker_group, leaving);
    tokio::select! {
        result = reading => result,
        // Those two end only after the reading.
        _ = futures_util::future::join(measuring, sweeping) => Ok(()),
    }
}

async fn prepare(settings: &KafkaSettings, db: &Db, producer: &Producer) -> anyhow::Result<()> {
    db::migrate_when_possible(&db.pool).await?;
    let mut backoff = Backoff::RECONNECT;
    loop {
        let topics = [&*settings.orders_events_topic, &*settings.orders_ack_topic];
        let ready = async {
            ensure_topics(settings, &topics).await?;
            producer.partitions(&settings.orders_ack_topic).await
        };
        match ready.await {
            Ok(_) => return Ok(()),
            Err(error) => {
                tracing::warn!(error = format!("{error:#}"), "waiting for Kafka");
                tokio::time::sleep(backoff.delay()).await;
            }
        }
    }
}

async fn measure(db: &Db) {
    loop {
        let count = async {
            let connection = db.connection().await?;
            connection.within(db.settings.query_timeout, store::count_parked(&connection)).await
        };
        match count.await {
            Ok(counts) => {
                for (state, count) in counts {
                    metrics::gauge!("orderstream_parked_messages", "state" => state).set(count as f64);
                }
            }
            Err(error) => tracing::debug!(error = format!("{:#}", anyhow::Error::from(error)), "counting"),
        }
        tokio::time::sleep(MEASURE_INTERVAL).await;
    }
}
