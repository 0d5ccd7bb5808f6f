//! Sends a file of orders, each waiting for the worker's answer, and compares what came back with
//! the file.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use hyper::header::{HeaderMap, HeaderValue, RETRY_AFTER};
use hyper::{Method, StatusCode};
use rust_decimal::Decimal;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use crate::http::{self, Answer, PREFER, Service};
use crate::latency::Latencies;
use crate::money::{grouped, grouped_count};
use crate::progress::Progress;
use crate::sample::{self, SampleOrder, Sums};
use crate::table::markdown;

/// Sending again is safe, since the order's own id is its external id; but a service that is away
/// for good is to be told of, not waited for.
const ATTEMPTS: u32 = 6;
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// A longer `Retry-After` is cut to this: a person is looking on.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

pub struct Options {
    pub service: Service,
    pub concurrency: usize,
    /// Seconds each order waits for the worker's answer.
    pub wait: u32,
}

/// What became of one order.
#[derive(Debug, PartialEq)]
pub enum Outcome {
    /// 201 with the worker's answer.
    Created(Option<Decimal>),
    /// 200: it was there already, with the same content.
    Repeated(Option<Decimal>),
    /// 202: stored, the worker has not answered yet.
    NotYet,
    /// 422: the worker refused it, or the service did at the door.
    Rejected(String),
    Failed(String),
}

pub struct Summary {
    sent: u64,
    created: u64,
    repeated: u64,
    not_yet: u64,
    rejected: u64,
    failed: u64,
    latencies: Latencies,
    answered: Sums,
    expected: Sums,
    /// The first few, each with its line.
    complaints: Vec<String>,
}

/// # Errors
/// When no order service answers there.
pub async fn run(options: &Options, orders: Vec<SampleOrder>) -> anyhow::Result<Summary> {
    ensure_service(&options.service).await?;
    let prefer = HeaderValue::from_str(&format!("wait={}", options.wait)).context("the wait")?;
    let sender = Sender {
        service: options.service.clone(),
        headers: HeaderMap::from_iter([http::json(), (PREFER, prefer)]),
        wait: Duration::from_secs(options.wait.into()),
    };

    let orders = Arc::new(orders);
    let next = Arc::new(AtomicUsize::new(0));
    let (results, mut received) = mpsc::unbounded_channel();
    for _ in 0..options.concurrency.min(orders.len()) {
        let (orders, next, results, sender) = (orders.clone(), next.clone(), results.clone(), sender.clone());
        tokio::spawn(async move {
            while let Some(order) = orders.get(next.fetch_add(1, Ordering::Relaxed)) {
                let begun = Instant::now();
                let outcome = sender.send(order).await;
                // Nobody listens any more: the run was given up.
                if results.send((order.line, order.currency.clone(), outcome, begun.elapsed())).is_err() {
                    break;
                }
            }
        });
    }
    drop(results);

    let expected = sample::sums(orders.iter().map(|order| (order.currency.as_str(), order.amount)));
    let mut summary = Summary::new(expected)?;
    let mut progress = Progress::new("orders", Some(orders.len() as u64));
    while let Some((line, currency, outcome, latency)) = received.recv().await {
        summary.add(line, &currency, outcome, latency);
        progress.step();
    }
    progress.finish();
    Ok(summary)
}

/// One question before the file is sent, so that a wrong address is one clear error and not
/// hundreds of them.
async fn ensure_service(service: &Service) -> anyhow::Result<()> {
    let answer = service.ask(Method::GET, "/health", HeaderMap::new(), None, Duration::ZERO).await?;
    ensure!(
        answer.status == StatusCode::OK,
        "what listens at {} is not the order service: GET /health answered {}",
        service.url(),
        answer.status
    );
    Ok(())
}

#[derive(Clone)]
struct Sender {
    service: Service,
    headers: HeaderMap,
    wait: Duration,
}

/// What an attempt came to when it is worth another one.
struct Again {
    why: String,
    pause: Option<Duration>,
}

impl Sender {
    async fn send(&self, order: &SampleOrder) -> Outcome {
        let mut pause = FIRST_PAUSE;
        for attempt in 1.. {
            let again = match self.attempt(order).await {
                Ok(outcome) => return outcome,
                Err(again) => again,
            };
            if attempt == ATTEMPTS {
                return Outcome::Failed(format!("{} ({ATTEMPTS} attempts)", again.why));
            }
            sleep(again.pause.unwrap_or(pause).min(LONGEST_PAUSE)).await;
            pause *= 2;
        }
        Outcome::Failed("never sent".to_owned())
    }

    async fn attempt(&self, order: &SampleOrder) -> Result<Outcome, Again> {
        let body = Some(order.body.clone());
        let asking = self.service.ask(Method::POST, "/orders", self.headers.clone(), body, self.wait);
        let answer = asking.await.map_err(|error| Again { why: format!("{error:#}"), pause: None })?;
        match answer.status {
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS => {
                Err(Again { why: answer.refusal(), pause: retry_after(&answer) })
            }
            _ => Ok(outcome(&answer)),
        }
    }
}

/// The fields of an answer that say what became of the order.
#[derive(Deserialize)]
struct Told {
    status: Option<String>,
    order_status: Option<String>,
    amount: Option<Box<RawValue>>,
}

fn outcome(answer: &Answer) -> Outcome {
    match answer.status {
        StatusCode::ACCEPTED => return Outcome::NotYet,
        StatusCode::UNPROCESSABLE_ENTITY => return Outcome::Rejected(answer.refusal()),
        StatusCode::CREATED | StatusCode::OK => {}
        _ => return Outcome::Failed(answer.refusal()),
    }
    let told: Told = match serde_json::from_slice(&answer.body) {
        Ok(told) => told,
        Err(error) => {
            return Outcome::Failed(format!("{}: the body cannot be read: {error}", answer.status));
        }
    };
    // One that was sent before may have been deleted since.
    let is_create = match told.status.as_deref() {
        Some("created") => true,
        Some("deleted") => answer.status == StatusCode::OK,
        _ => false,
    };
    if !is_create || told.order_status.is_none() {
        let body = String::from_utf8_lossy(&answer.body);
        return Outcome::Failed(format!("{}: no answer to a create: {body}", answer.status));
    }
    let amount = match told.amount.as_deref().map(sample::decimal).transpose() {
        Ok(amount) => amount,
        Err(error) => return Outcome::Failed(format!("{}: {error:#}", answer.status)),
    };
    if answer.status == StatusCode::CREATED { Outcome::Created(amount) } else { Outcome::Repeated(amount) }
}

fn retry_after(answer: &Answer) -> Option<Duration> {
    let seconds = answer.header(RETRY_AFTER.as_str())?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}

impl Summary {
    const COMPLAINTS_SHOWN: usize = 5;

    fn new(expected: Sums) -> anyhow::Result<Self> {
        Ok(Self {
            sent: 0,
            created: 0,
            repeated: 0,
            not_yet: 0,
            rejected: 0,
            failed: 0,
            latencies: Latencies::new()?,
            // Every currency of the file, so that one nobody answered in shows as 0.00.
            answered: expected.keys().map(|currency| (currency.clone(), Decimal::ZERO)).collect(),
            expected,
            complaints: Vec::new(),
        })
    }

    fn add(&mut self, line: usize, currency: &str, outcome: Outcome, latency: Duration) {
        self.sent += 1;
        let amount = match outcome {
            Outcome::Created(amount) => {
                self.created += 1;
                amount
            }
            Outcome::Repeated(amount) => {
                self.repeated += 1;
                amount
            }
            Outcome::NotYet => {
                self.not_yet += 1;
                return;
            }
            Outcome::Rejected(why) => {
                self.rejected += 1;
                return self.complain(line, &why);
            }
            Outcome::Failed(why) => {
                self.failed += 1;
                return self.complain(line, &why);
            }
        };
        self.latencies.record(latency);
        *self.answered.entry(currency.to_owned()).or_default() += amount.unwrap_or_default();
    }

    fn complain(&mut self, line: usize, why: &str) {
        if self.complaints.len() < Self::COMPLAINTS_SHOWN {
            self.complaints.push(format!("line {line}: {why}"));
        }
    }

    fn answered_count(&self) -> u64 {
        self.created + self.repeated
    }

    /// Nothing failed, and the worker's amounts come to what the file's own come to.
    pub fn is_good(&self) -> bool {
        self.failed == 0 && self.answered == self.expected
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ms =
            |percentile| self.latencies.percentile_ms(percentile).map_or("–".to_owned(), |ms| format!("{ms:.1}"));
        let row = |label: &str, value: String| vec![label.to_owned(), value];
        let rows = [
            row("sent", grouped_count(self.sent)),
            row("created (201)", grouped_count(self.created)),
            row("repeated (200)", grouped_count(self.repeated)),
            row("answered by the worker", grouped_count(self.answered_count())),
            row("not yet answered (202)", grouped_count(self.not_yet)),
            row("rejected (422)", grouped_count(self.rejected)),
            row("failed", grouped_count(self.failed)),
            row("p50 ms", ms(50.0)),
            row("p99 ms", ms(99.0)),
        ];
        writeln!(f, "{}", markdown(&["orders", ""], &rows))?;

        let sums = self.expected.iter().map(|(currency, expected)| {
            let answered = self.answered.get(currency).copied().unwrap_or_default();
            let verdict = if answered == *expected { "equal" } else { "DIFFERENT" };
            vec![currency.clone(), grouped(answered), grouped(*expected), verdict.to_owned()]
        });
        let sums: Vec<_> = sums.collect();
        write!(f, "{}", markdown(&["sum of amounts", "answered", "in the file", ""], &sums))?;

        for complaint in &self.complaints {
            write!(f, "\n{complaint}")?;
        }
        let unshown = self.rejected + self.failed - self.complaints.len() as u64;
        if unshown > 0 {
            write!(f, "\n… and {unshown} more")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
