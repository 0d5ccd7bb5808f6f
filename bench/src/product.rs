//! The service under test: both binaries on a database, topics and ports of their own.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::Serialize;
use tokio::time::{Instant, sleep};

use crate::database::Database;
use crate::http::Address;
use crate::metrics::Metrics;
use crate::process::{self, Process};
use crate::procfs;
use crate::topics::Topics;

const ACCEPTED: &str = "orderstream_orders_accepted_total";
const HANDLED: &str = "orderstream_worker_handled_total";
const WAITERS: &str = "orderstream_waiters";

/// Fine enough to say how long the worker took to catch up.
const POLL: Duration = Duration::from_millis(10);
/// For which the worker may get no further.
const STANDSTILL: Duration = Duration::from_secs(30);
const PARK_TIMEOUT: Duration = Duration::from_secs(40);
/// The longest that a caller may wait: parked ones must not run out of time while measured.
pub const WAIT_MAX_SECONDS: u32 = 60;

/// The service's own default for `MAX_WAITERS`.
pub const MAX_WAITERS: usize = 10_000;

pub struct Product {
    pub api: Process,
    pub worker: Process,
    counters: Counters,
    postgres: Option<u32>,
}

/// What both processes have counted since they started.
pub struct Counters {
    api: Metrics,
    worker: Metrics,
}

impl Counters {
    async fn of(api: &Process, worker: &Process) -> anyhow::Result<Self> {
        Ok(Self { api: Metrics::of(api.address()).await?, worker: Metrics::of(worker.address()).await? })
    }

    pub async fn accepted(&mut self) -> anyhow::Result<u64> {
        self.of_api(ACCEPTED).await
    }

    async fn of_api(&mut self, name: &str) -> anyhow::Result<u64> {
        self.api.sum(name).await.context("asking the API")
    }

    pub async fn handled(&mut self) -> anyhow::Result<u64> {
        self.worker.sum(HANDLED).await.context("asking the worker")
    }
}

/// Resident memory, in KiB.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Memory {
    pub api: u64,
    pub worker: u64,
}

/// CPU time used so far.
#[derive(Clone, Copy)]
pub struct CpuTimes {
    pub api: Duration,
    pub worker: Duration,
    /// Where it can be seen from here.
    pub postgres: Option<Duration>,
    pub machine: Duration,
}

/// Known before minutes are spent on measuring anything else.
pub fn ensure_built(binaries: &Path) -> anyhow::Result<()> {
    process::binary(binaries, "api-service").and_then(|_| process::binary(binaries, "worker")).map(drop)
}

impl Product {
    pub async fn start(
        binaries: &Path,
        database: &Database,
        topics: &Topics,
        more: &[(&'static str, String)],
        folder: &Path,
    ) -> anyhow::Result<Self> {
        // The rest is what the caller's environment says, else the service's own defaults.
        let mut settings = vec![
            ("POSTGRES_DSN", database.dsn().to_owned()),
            ("ORDERS_EVENTS_TOPIC", topics.events.clone()),
            ("ORDERS_ACK_TOPIC", topics.acks.clone()),
            ("WORKER_GROUP", topics.group.clone()),
            ("API_PORT", "127.0.0.1:0".to_owned()),
            ("GRPC_PORT", "127.0.0.1:0".to_owned()),
            ("ADMIN_PORT", "127.0.0.1:0".to_owned()),
            ("WORKER_PORT", "127.0.0.1:0".to_owned()),
            ("ACK_WAIT_MAX_MS", (WAIT_MAX_SECONDS * 1000).to_string()),
        ];
        settings.extend_from_slice(more);
        let worker = Process::start(binaries, "worker", &settings, folder).await?;
        let api = Process::start(binaries, "api-service", &settings, folder).await?;
        let (counters, postgres) = (Counters::of(&api, &worker).await?, database.server_process().await?);
        Ok(Self { api, worker, counters, postgres })
    }

    pub fn address(&self) -> &Address {
        self.api.address()
    }

    /// The counts of both, over connections of their own.
    pub async fn metrics(&self) -> anyhow::Result<Counters> {
        Counters::of(&self.api, &self.worker).await
    }

    /// How many orders the worker has handled since it started.
    pub async fn handled(&mut self) -> anyhow::Result<u64> {
        self.counters.handled().await
    }

    /// Returns when the worker has handled that many.
    pub async fn wait_until_handled(&mut self, expected: u64) -> anyhow::Result<()> {
        let (mut last, mut since) = (0, Instant::now());
        loop {
            let handled = self.handled().await?;
            if handled >= expected {
                return Ok(());
            }
            if handled > last {
                (last, since) = (handled, Instant::now());
            }
            if since.elapsed() > STANDSTILL {
                bail!("the worker stands still at {handled} of {expected} orders, since {STANDSTILL:?}");
            }
            sleep(POLL).await;
        }
    }

    /// Returns when that many requests are parked in the API.
    pub async fn wait_until_parked(&mut self, expected: u64) -> anyhow::Result<()> {
        let deadline = Instant::now() + PARK_TIMEOUT;
        loop {
            let parked = self.counters.of_api(WAITERS).await?;
            if parked == expected {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("{parked} of {expected} requests are parked after {PARK_TIMEOUT:?}");
            }
            sleep(POLL).await;
        }
    }

    /// A figure of the API's, over all labels or of one.
    pub async fn api_counted(&mut self, name: &str) -> anyhow::Result<u64> {
        self.counters.of_api(name).await
    }

    pub fn memory(&self) -> anyhow::Result<Memory> {
        Ok(Memory { api: self.api.resident_kib()?, worker: self.worker.resident_kib()? })
    }

    pub fn cpu_times(&self) -> anyhow::Result<CpuTimes> {
        Ok(CpuTimes {
            api: self.api.cpu_time()?,
            worker: self.worker.cpu_time()?,
            postgres: self.postgres.map(procfs::family_cpu_time).transpose()?,
            machine: procfs::machine_busy()?,
        })
    }

    /// In order, and both end well.
    pub async fn stop(self) -> anyhow::Result<()> {
        self.api.stop().await?;
        self.worker.stop().await
    }
}
