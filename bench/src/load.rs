//! The load generator: a process of its own with one thread, so that what it costs is seen apart
//! from what it measures. Each caller has one connection. In a closed loop it sends the next order
//! when the last one was answered; in an open loop, when one is due ([`crate::pace`]).

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use clap::Args;
use hyper::header::{HeaderValue, RETRY_AFTER};
use hyper::{StatusCode, Uri};
use serde::{Deserialize, Serialize};
use tokio::task::{JoinSet, LocalSet};
use tokio::time::{Instant, sleep, sleep_until};
use uuid::Uuid;

use crate::http::{Address, Answer, Connection};
use crate::load_orders::Bodies;
use crate::pace::Due;
use crate::procfs;
use client::latency::Latencies;

/// A caller that is told 503 comes back after this. `Retry-After` would be whole seconds, in which
/// a closed loop offers nothing.
const PAUSE_WHEN_REFUSED: Duration = Duration::from_millis(50);
/// Connections: fewer than wait to be accepted on any listener.
const OPENED_AT_ONCE: usize = 128;
/// Where each caller has so many orders to get in, there is time for it.
const PAUSE_OF_EACH: Duration = Duration::from_secs(1);

/// How the benchmark asks for load, and how its load process is asked for it.
#[derive(Args, Clone, Debug)]
pub struct Plan {
    /// The service, as http://host:port.
    #[arg(long)]
    pub url: String,
    #[arg(long)]
    pub callers: usize,
    /// Seconds to wait for the worker's answer; 0 is `Prefer: respond-async`.
    #[arg(long)]
    pub wait: u32,
    #[arg(long, default_value_t = 0)]
    pub warm_up_ms: u64,
    #[arg(long, default_value_t = 0)]
    pub measure_ms: u64,
    /// Instead of warm-up and measurement: so many orders per caller.
    #[arg(long, default_value_t = 0)]
    pub each: u64,
    /// Orders per second of an open loop; 0 is a closed one.
    #[arg(long, default_value_t = 0.0)]
    pub rate: f64,
}

impl Plan {
    /// Orders by so many callers for so long, each answered at commit.
    #[must_use]
    pub fn accepted(url: String, callers: usize, time: Duration) -> Self {
        let measure_ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Self { url, callers, wait: 0, warm_up_ms: 0, measure_ms, each: 0, rate: 0.0 }
    }
}

/// What one load process saw.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Figures {
    /// All of them, warm-up included, as they are to be found in the database: 201.
    pub created: u64,
    /// 202: stored as well, only the answer did not come in time.
    pub not_yet: u64,
    /// 503: nothing stored.
    pub refused: u64,
    /// Anything else, broken connections included: nobody knows what is stored.
    pub failed: u64,
    pub first_failure: Option<String>,

    /// 201s in the measured time, and what follows from them.
    pub measured: u64,
    pub per_second: f64,
    pub p50_ms: Option<f64>,
    pub p99_ms: Option<f64>,
    pub p999_ms: Option<f64>,
    /// Of 503s in the measured time: how soon they came after the order was due, and after it was
    /// sent, which is later where all connections are in use; and how many without `Retry-After`.
    pub refused_p99_ms: Option<f64>,
    pub refused_after_sent_p99_ms: Option<f64>,
    pub refused_without_retry_after: u64,
    /// Every second from the warm-up on.
    pub seconds: Vec<Second>,
    /// Of one core, in the measured time.
    pub cpu_share: f64,
    /// When the last caller had its answer.
    pub ended_at_unix_ms: u64,
}

/// What was answered in one second.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Second {
    pub created: u64,
    pub not_yet: u64,
    pub refused: u64,
    /// Of the 201s.
    pub worst_ms: f64,
}

/// Runs the plan to its end in this process.
pub fn run(plan: &Plan) -> anyhow::Result<Figures> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting a runtime")?;
    LocalSet::new().block_on(&runtime, offer(plan))
}

async fn offer(plan: &Plan) -> anyhow::Result<Figures> {
    let address = Address::parse(&plan.url)?;
    let prefer = if plan.wait == 0 { "respond-async".to_owned() } else { format!("wait={}", plan.wait) };
    // The low half of a fresh UUIDv7 is random.
    let run = Uuid::now_v7().as_u64_pair().1;

    let mut connections = Vec::with_capacity(plan.callers);
    while connections.len() < plan.callers {
        let mut opening = JoinSet::new();
        for _ in connections.len()..plan.callers.min(connections.len() + OPENED_AT_ONCE) {
            let address = address.clone();
            opening.spawn_local(async move { Connection::open(&address).await });
        }
        for opened in opening.join_all().await {
            connections.push(opened.with_context(|| format!("opening {} connections", plan.callers))?);
        }
    }

    let began = Instant::now();
    let measured_from = began + Duration::from_millis(plan.warm_up_ms);
    let measured_until = measured_from + Duration::from_millis(plan.measure_ms);
    let mut callers = JoinSet::new();
    let due = (plan.rate > 0.0).then(|| {
        let due = Rc::new(Due::default());
        callers.spawn_local(due.clone().pace(plan.rate, measured_until));
        due
    });
    let shared = Rc::new(Shared {
        path: address.path("/orders")?,
        prefer: HeaderValue::from_str(&prefer)?,
        waits: plan.wait > 0,
        bodies: Bodies::new(run),
        began,
        measured_from,
        measured_until,
        each: plan.each,
        due,
        tally: RefCell::new(Tally {
            figures: Figures::default(),
            latencies: Latencies::new()?,
            refusals: Latencies::new()?,
            refusals_sent: Latencies::new()?,
        }),
    });

    for connection in connections {
        callers.spawn_local(shared.clone().call(connection, address.clone()));
    }
    let (from, until) = (shared.measured_from, shared.measured_until);
    let cpu = tokio::task::spawn_local(async move {
        sleep_until(from).await;
        let before = own_cpu_time()?;
        sleep_until(until).await;
        anyhow::Ok(own_cpu_time()? - before)
    });
    while let Some(ended) = callers.join_next().await {
        ended.context("a caller, or what tells them when, broke off")??;
    }
    let ended_at = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
    let cpu = cpu.await.context("measuring this process")??;

    let mut tally = shared.tally.borrow_mut();
    let [p50_ms, p99_ms, p999_ms] = [50.0, 99.0, 99.9].map(|part| tally.latencies.percentile_ms(part));
    let (measured, seconds) = (tally.latencies.count(), plan.measure_ms as f64 / 1000.0);
    let per_second = |amount: f64| if seconds > 0.0 { amount / seconds } else { 0.0 };
    Ok(Figures {
        measured,
        per_second: per_second(measured as f64),
        p50_ms,
        p99_ms,
        p999_ms,
        refused_p99_ms: tally.refusals.percentile_ms(99.0),
        refused_after_sent_p99_ms: tally.refusals_sent.percentile_ms(99.0),
        cpu_share: per_second(cpu.as_secs_f64()),
        ended_at_unix_ms: u64::try_from(ended_at)?,
        ..std::mem::take(&mut tally.figures)
    })
}

fn own_cpu_time() -> anyhow::Result<Duration> {
    procfs::cpu_time(std::process::id())
}

/// What all callers of the process have in common.
struct Shared {
    path: Uri,
    prefer: HeaderValue,
    waits: bool,
    bodies: Bodies,
    began: Instant,
    measured_from: Instant,
    measured_until: Instant,
    each: u64,
    due: Option<Rc<Due>>,
    tally: RefCell<Tally>,
}

struct Tally {
    figures: Figures,
    latencies: Latencies,
    refusals: Latencies,
    refusals_sent: Latencies,
}

impl Shared {
    async fn call(self: Rc<Self>, mut connection: Connection, address: Address) -> anyhow::Result<()> {
        let mut stored = 0;
        while let Some(begun) = self.next(stored).await {
            let sent = Instant::now();
            let body = self.bodies.next();
            let posting = connection.post_json(&self.path, &self.prefer, &body);
            match posting.await {
                Ok(answer) => {
                    self.count(&answer, begun, sent);
                    let is_refused = answer.status == StatusCode::SERVICE_UNAVAILABLE;
                    stored += u64::from(!is_refused);
                    if is_refused && self.due.is_none() {
                        sleep(if self.each > 0 { PAUSE_OF_EACH } else { PAUSE_WHEN_REFUSED }).await;
                    }
                }
                Err(error) => {
                    self.count_failure(error.to_string());
                    connection = Connection::open(&address).await.context("connecting again")?;
                }
            }
        }
        Ok(())
    }

    /// From when on the next order's latency counts; none when there is no next one.
    async fn next(&self, stored: u64) -> Option<Instant> {
        if let Some(due) = &self.due {
            return due.next().await;
        }
        let now = Instant::now();
        let is_over = if self.each > 0 { stored == self.each } else { now >= self.measured_until };
        (!is_over).then_some(now)
    }

    fn count(&self, answer: &Answer<'_>, begun: Instant, sent: Instant) {
        let now = Instant::now();
        let (latency, is_measured) = (now - begun, now >= self.measured_from && now < self.measured_until);
        let tally = &mut *self.tally.borrow_mut();
        let place = (now - self.began).as_secs() as usize;
        if tally.figures.seconds.len() <= place {
            tally.figures.seconds.resize_with(place + 1, Second::default);
        }
        let second = &mut tally.figures.seconds[place];
        match answer.status {
            // The cheapest sign that the worker has answered, and this order at that.
            StatusCode::CREATED if self.waits && !contains(answer.body, br#""order_status":"done""#) => {
                tally.figures.created += 1;
                tally.figures.failed(|| format!("201 without an answer: {}", String::from_utf8_lossy(answer.body)));
            }
            StatusCode::CREATED => {
                tally.figures.created += 1;
                second.created += 1;
                second.worst_ms = second.worst_ms.max(latency.as_secs_f64() * 1000.0);
                if is_measured {
                    tally.latencies.record(latency);
                }
            }
            StatusCode::ACCEPTED => {
                tally.figures.not_yet += 1;
                second.not_yet += 1;
            }
            StatusCode::SERVICE_UNAVAILABLE => {
                tally.figures.refused += 1;
                second.refused += 1;
                if is_measured {
                    tally.refusals.record(latency);
                    tally.refusals_sent.record(now - sent);
                }
                tally.figures.refused_without_retry_after += u64::from(answer.header(&RETRY_AFTER).is_none());
            }
            status => tally.figures.failed(|| format!("{status}: {}", String::from_utf8_lossy(answer.body))),
        }
    }

    fn count_failure(&self, what: String) {
        self.tally.borrow_mut().figures.failed(|| what);
    }
}

impl Figures {
    fn failed(&mut self, what: impl FnOnce() -> String) {
        self.failed += 1;
        self.first_failure.get_or_insert_with(what);
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use test_support::stand_in::{respond, serve};

    fn plan(url: String) -> Plan {
        Plan { url, callers: 8, wait: 5, warm_up_ms: 50, measure_ms: 200, each: 0, rate: 0.0 }
    }

    /// The load generator has a runtime of its own, so it gets a thread of its own.
    async fn offered(plan: Plan) -> Figures {
        let running = tokio::task::spawn_blocking(move || run(&plan));
        running.await.expect("no panic").expect("figures")
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn every_answer_is_counted_and_only_those_in_time_are_measured() {
        let asked = std::sync::Arc::new(AtomicU64::new(0));
        let counter = asked.clone();
        let url = serve(move |request| {
            assert_eq!(request.prefer.as_deref(), Some("wait=5"));
            match counter.fetch_add(1, Ordering::Relaxed) {
                0 => respond(202, "{}"),
                1 => respond(503, "{}"),
                _ => respond(201, r#"{"status":"created","order_status":"done"}"#),
            }
        });
        let figures = offered(plan(url.await)).await;
        assert_eq!((figures.not_yet, figures.refused, figures.failed), (1, 1, 0), "{figures:?}");
        assert_eq!(figures.created + 2, asked.load(Ordering::Relaxed), "{figures:?}");
        assert!(figures.measured > 0 && figures.measured < figures.created, "{figures:?}");
        assert!(figures.p50_ms <= figures.p99_ms && figures.p50_ms.is_some(), "{figures:?}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_201_that_is_no_answer_is_a_failure_for_one_who_waits() {
        let url = serve(|_| respond(201, r#"{"status":"created","order_status":"new"}"#)).await;
        let figures = offered(Plan { each: 3, ..plan(url.clone()) }).await;
        assert_eq!((figures.created, figures.failed), (24, 24), "{figures:?}");
        assert!(figures.first_failure.is_some_and(|what| what.contains("without an answer")));
        let figures = offered(Plan { each: 3, wait: 0, ..plan(url) }).await;
        assert_eq!((figures.created, figures.failed), (24, 0), "{figures:?}");
    }
}
