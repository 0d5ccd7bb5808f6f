//! One measurement: load on the service, what it answered and cost, and the account that all of them
//! add up to.

use std::process::Stdio;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail, ensure};
use serde::Serialize;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};
use tokio_util::task::AbortOnDropHandle;

use crate::database::{self, Counts, Database};
use crate::load::{self, Plan};
use crate::product::{CpuTimes, Memory, Product, WAIT_MAX_SECONDS};

/// Longer than the sweeper's grace, after which whatever was left is sent as well.
const LEDGER_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// `Prefer: respond-async`: answered at commit.
    Accepted,
    /// From POST to the worker's answer.
    Answered,
}

impl Mode {
    pub fn label(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Answered => "answered",
        }
    }

    /// Seconds that its callers wait.
    fn wait(self) -> u32 {
        match self {
            Self::Accepted => 0,
            Self::Answered => WAIT_MAX_SECONDS,
        }
    }
}

/// How much is asked.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub mode: Mode,
    pub callers: usize,
    /// Orders per second of an open loop; none of a closed one.
    pub rate: Option<f64>,
}

impl Load {
    #[must_use]
    pub fn closed(mode: Mode, callers: usize) -> Self {
        Self { mode, callers, rate: None }
    }

    /// An open loop, with so many connections that it can have what is late under way.
    #[must_use]
    pub fn open(mode: Mode, rate: f64, connections: usize) -> Self {
        Self { mode, callers: connections, rate: Some(rate) }
    }

    pub fn label(&self) -> String {
        match self.rate {
            Some(rate) => format!("{}, {rate:.0} per s offered", self.mode.label()),
            None => format!("{}, {} callers", self.mode.label(), self.callers),
        }
    }
}

#[derive(Clone, Serialize)]
pub struct Point {
    pub mode: Mode,
    pub callers: usize,
    pub rate: Option<f64>,
    pub load: load::Figures,
    /// Accepted, but not handled by the worker when the load ended.
    pub unhandled_at_end: u64,
    pub caught_up_after_ms: u64,
    pub cpu: CpuShares,
}

/// In cores.
#[derive(Clone, Serialize)]
pub struct CpuShares {
    pub api: f64,
    pub worker: f64,
    pub load: f64,
    pub postgres: Option<f64>,
    /// All of it, Kafka and strangers included.
    pub machine: f64,
}

impl CpuShares {
    pub fn rest(&self) -> f64 {
        self.machine - self.api - self.worker - self.load - self.postgres.unwrap_or_default()
    }
}

#[derive(Clone, Serialize)]
pub struct Parked {
    pub requests: usize,
    pub memory: Memory,
}

/// accepted = stored = handled, or the run has failed.
#[derive(Clone, Default, Serialize)]
pub struct Ledger {
    pub accepted: u64,
    /// Of these, to callers who waited for it.
    pub answered: u64,
    pub stored: u64,
    pub handled: u64,
}

impl Ledger {
    /// A request that failed leaves nobody knowing what is stored, so no run goes on after one.
    fn add(&mut self, load: &load::Figures, mode: Mode) -> anyhow::Result<()> {
        let first = load.first_failure.as_deref().unwrap_or_default();
        ensure!(load.failed == 0, "{} requests failed, the first: {first}", load.failed);
        self.accepted += load.created + load.not_yet;
        if mode == Mode::Answered {
            self.answered += load.created;
        }
        Ok(())
    }
}

/// The measurements that go through the service, and the account they add up to.
pub struct Bench {
    warm_up: Duration,
    measure: Duration,
    pub ledger: Ledger,
}

impl Bench {
    #[must_use]
    pub fn new(warm_up: Duration, measure: Duration) -> Self {
        Self { warm_up, measure, ledger: Ledger::default() }
    }

    /// One measurement. Waits until all is handled.
    pub async fn point(&mut self, product: &mut Product, load: Load) -> anyhow::Result<Point> {
        let started = self.start(product, load).await?;
        self.end(product, started).await
    }

    /// Begins one, for whoever has something to do meanwhile.
    pub async fn start(&self, product: &Product, load: Load) -> anyhow::Result<Started> {
        let plan = Plan {
            url: product.address().url(),
            callers: load.callers,
            wait: load.mode.wait(),
            warm_up_ms: u64::try_from(self.warm_up.as_millis())?,
            measure_ms: u64::try_from(self.measure.as_millis())?,
            each: 0,
            rate: load.rate.unwrap_or_default(),
        };
        let (cpu, at) = (product.cpu_times()?, Instant::now());
        // Read all the time: a full pipe would stop the load generator.
        let figures = AbortOnDropHandle::new(tokio::spawn(figures(start_load(&plan)?)));
        Ok(Started { load, cpu, at, figures })
    }

    pub async fn end(&mut self, product: &mut Product, started: Started) -> anyhow::Result<Point> {
        let Started { load: Load { mode, callers, rate }, cpu: before, at, figures } = started;
        let load = figures.await.context("reading the load's figures")??;
        let (handled, after, elapsed) = (product.handled().await?, product.cpu_times()?, at.elapsed());
        self.ledger.add(&load, mode)?;
        product.wait_until_handled(self.ledger.accepted).await?;
        let now = u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis())?;
        let share = |before: Duration, after: Duration| (after - before).as_secs_f64() / elapsed.as_secs_f64();
        Ok(Point {
            mode,
            callers,
            rate,
            unhandled_at_end: self.ledger.accepted.saturating_sub(handled),
            caught_up_after_ms: now.saturating_sub(load.ended_at_unix_ms),
            cpu: CpuShares {
                api: share(before.api, after.api),
                worker: share(before.worker, after.worker),
                postgres: before.postgres.zip(after.postgres).map(|(before, after)| share(before, after)),
                load: load.cpu_share,
                machine: share(before.machine, after.machine),
            },
            load,
        })
    }

    /// The worker stands still, so that every request parks; then it goes on and all are answered.
    pub async fn parked(&mut self, product: &mut Product, requests: usize) -> anyhow::Result<Parked> {
        let plan = Plan {
            url: product.address().url(),
            callers: requests,
            wait: WAIT_MAX_SECONDS,
            warm_up_ms: 0,
            measure_ms: 0,
            each: 1,
            rate: 0.0,
        };
        product.worker.signal("STOP").await?;
        let load = start_load(&plan);
        let parked = match &load {
            Ok(_) => product.wait_until_parked(requests as u64).await,
            Err(_) => Ok(()),
        };
        let memory = product.memory();
        // Before any error is returned: nothing may be left standing still.
        product.worker.signal("CONT").await?;
        parked?;
        let load = figures(load?).await?;
        self.ledger.add(&load, Mode::Answered)?;
        let answered = load.created;
        ensure!(answered == requests as u64, "{answered} of {requests} parked requests were answered");
        product.wait_until_handled(self.ledger.accepted).await?;
        Ok(Parked { requests, memory: memory? })
    }

    /// What was accepted is stored, and handled once; nothing is left anywhere.
    pub async fn check(&mut self, database: &Database) -> anyhow::Result<()> {
        self.check_beside(database, 0).await
    }

    /// The same where so many orders, handled too, were there before.
    pub async fn check_beside(&mut self, database: &Database, before: u64) -> anyhow::Result<()> {
        let client = database.connect().await?;
        let accepted = self.ledger.accepted + before;
        let expected = Counts { orders: accepted, handled: accepted, orders_handled: accepted, outbox: 0, parked: 0 };
        let deadline = Instant::now() + LEDGER_TIMEOUT;
        loop {
            let counts = database::counts(&client).await?;
            if counts == expected {
                (self.ledger.stored, self.ledger.handled) = (counts.orders - before, counts.handled - before);
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("the ledger does not balance: expected {expected:?}, the database has {counts:?}");
            }
            sleep(Duration::from_millis(500)).await;
        }
    }
}

/// A measurement under way; ends when dropped.
pub struct Started {
    load: Load,
    cpu: CpuTimes,
    at: Instant,
    figures: AbortOnDropHandle<anyhow::Result<load::Figures>>,
}

impl Started {
    /// Has the load ended?
    pub fn is_over(&self) -> bool {
        self.figures.is_finished()
    }
}

/// This program again, as the load generator.
pub fn start_load(plan: &Plan) -> anyhow::Result<Child> {
    let own = std::env::current_exe().context("finding this program")?;
    let values = [
        ("--url", plan.url.clone()),
        ("--callers", plan.callers.to_string()),
        ("--wait", plan.wait.to_string()),
        ("--warm-up-ms", plan.warm_up_ms.to_string()),
        ("--measure-ms", plan.measure_ms.to_string()),
        ("--each", plan.each.to_string()),
        ("--rate", plan.rate.to_string()),
    ];
    let mut command = Command::new("sh");
    // As many connections as callers are more files than many systems grant unasked. In a session of
    // its own, as the service's processes are.
    command.args(["-c", r#"ulimit -n "$(ulimit -Hn)" || :; exec setsid "$0" "$@""#]).arg(own).arg("load");
    for (flag, value) in values {
        command.arg(flag).arg(value);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
    command.spawn().context("starting the load generator")
}

/// What the load generator saw, once it has ended.
pub async fn figures(load: Child) -> anyhow::Result<load::Figures> {
    let output = load.wait_with_output().await.context("waiting for the load generator")?;
    ensure!(output.status.success(), "the load generator ended with {}", output.status);
    serde_json::from_slice(&output.stdout).context("reading the load generator's figures")
}

/// Of few values; 0 of none.
pub fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// The least and the most.
pub fn spread(values: &[f64]) -> [f64; 2] {
    let least = values.iter().copied().reduce(f64::min);
    [least.unwrap_or_default(), values.iter().copied().reduce(f64::max).unwrap_or_default()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_with_a_failed_request_does_not_go_on() {
        let mut ledger = Ledger::default();
        let mut load = load::Figures { created: 2, not_yet: 1, refused: 4, ..load::Figures::default() };
        ledger.add(&load, Mode::Answered).expect("a good point");
        assert_eq!((ledger.accepted, ledger.answered), (3, 2));
        (load.failed, load.first_failure) = (1, Some("connection closed".to_owned()));
        let error = ledger.add(&load, Mode::Answered).expect_err("an error");
        assert!(error.to_string().contains("connection closed"));
    }
}
