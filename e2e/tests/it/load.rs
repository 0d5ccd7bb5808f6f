//! Callers that go on posting while a test breaks things, and remember what they were told.

use std::fmt::{self, Display, Formatter};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

use serde_json::{Value, json};
use test_support::{Accepted, HttpClient, Reply, item, wait_for};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};

use crate::scenarios::unique;

/// A busy shop, not a benchmark: what is stored has to be read again by the ledger.
const PACE: Duration = Duration::from_millis(20);

/// Until a request gets some answer: a restart of everything fits in.
const GIVE_UP: Duration = Duration::from_secs(60);

/// The replicas that callers choose from; a test replaces one when it restarts it.
#[derive(Clone, Default)]
pub(crate) struct Replicas(Arc<RwLock<Vec<Arc<HttpClient>>>>);

impl Replicas {
    pub(crate) fn new(clients: impl IntoIterator<Item = Arc<HttpClient>>) -> Self {
        Self(Arc::new(RwLock::new(clients.into_iter().collect())))
    }

    pub(crate) fn add(&self, client: Arc<HttpClient>) {
        self.0.write().expect("never poisoned").push(client);
    }

    pub(crate) fn replace(&self, index: usize, client: Arc<HttpClient>) {
        self.0.write().expect("never poisoned")[index] = client;
    }

    pub(crate) fn pick(&self, turn: usize) -> Arc<HttpClient> {
        let clients = self.0.read().expect("never poisoned");
        Arc::clone(&clients[turn % clients.len()])
    }
}

/// One answer, and when it came.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) reply: Reply,
    pub(crate) sent_at: Instant,
}

impl Outcome {
    /// Stored, and handled by a worker.
    fn is_answered(&self) -> bool {
        let has_waited = self.reply.header("preference-applied") != Some("respond-async");
        self.reply.is_success() && self.reply.status != 202 && has_waited
    }
}

/// How long after a moment the first request that was sent since was answered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recovery {
    /// As stored.
    pub(crate) accepted: Duration,
    /// As handled.
    pub(crate) answered: Duration,
}

impl Display for Recovery {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { accepted, answered } = self;
        write!(f, "accepted after {:.1} s, answered after {:.1} s", accepted.as_secs_f64(), answered.as_secs_f64())
    }
}

/// Running callers. What they were told is in [`Load::stop`].
pub(crate) struct Load {
    shared: Arc<Shared>,
    callers: JoinSet<()>,
}

struct Shared {
    replicas: Replicas,
    stopping: AtomicBool,
    answered: AtomicUsize,
    outcomes: Mutex<Vec<Outcome>>,
}

impl Load {
    /// `callers` at once, each creating, changing and now and then deleting orders of its own,
    /// waiting for each answer. A lost answer is asked for again by external id, on another
    /// replica.
    pub(crate) fn start(replicas: &Replicas, callers: usize) -> Self {
        let shared = Arc::new(Shared {
            replicas: replicas.clone(),
            stopping: AtomicBool::new(false),
            answered: AtomicUsize::new(0),
            outcomes: Mutex::default(),
        });
        let mut tasks = JoinSet::new();
        for caller in 0..callers {
            tasks.spawn(Caller::new(caller, Arc::clone(&shared)).run());
        }
        Self { shared, callers: tasks }
    }

    /// How many requests have been answered so far, however.
    pub(crate) fn answered(&self) -> usize {
        self.shared.answered.load(Ordering::Relaxed)
    }

    /// Until that many more have been answered.
    pub(crate) async fn wait_for_answers(&self, more: usize, deadline: Duration) {
        let target = self.answered() + more;
        wait_for(&format!("{more} more answers"), deadline, || async {
            let seen = self.answered();
            if seen >= target { Ok(()) } else { Err(format!("{} to go; last: {}", target - seen, self.last_answer())) }
        })
        .await;
    }

    /// Waits until requests that were sent after `broken_at` are stored and handled again; tells how long
    /// that was after `mended_at`.
    pub(crate) async fn recovery(&self, broken_at: Instant, mended_at: Instant) -> Recovery {
        let since = |outcomes: &[Outcome], is: fn(&Outcome) -> bool| {
            let ends =
                outcomes.iter().filter(|outcome| is(outcome)).map(|outcome| outcome.sent_at + outcome.reply.took);
            ends.min().map(|end| end.saturating_duration_since(mended_at))
        };
        let turns = AtomicUsize::new(0);
        wait_for("an order to be answered again", GIVE_UP, || async {
            let outcomes = self.sent_after(broken_at);
            let accepted = since(&outcomes, |outcome| outcome.reply.is_success());
            if accepted.is_none() {
                // The callers wait for the worker, too.
                self.probe(turns.fetch_add(1, Ordering::Relaxed)).await;
            }
            match (accepted, since(&outcomes, Outcome::is_answered)) {
                (Some(accepted), Some(answered)) => Ok(Recovery { accepted, answered }),
                (accepted, _) => Err(format!("accepted after {accepted:?}; last answer: {}", self.last_answer())),
            }
        })
        .await
    }

    /// An order whose caller does not wait for the worker.
    async fn probe(&self, turn: usize) {
        let order = json!({ "user_id": unique("probe"), "items": [item("sku", 1, "1.25")] });
        let sent_at = Instant::now();
        let api = self.shared.replicas.pick(turn);
        if let Ok(reply) = api.try_post_order(&order, &[("prefer", "respond-async")]).await {
            self.shared.outcomes.lock().expect("never poisoned").push(Outcome { reply, sent_at });
        }
    }

    /// What was answered to requests that were sent after `moment`.
    pub(crate) fn sent_after(&self, moment: Instant) -> Vec<Outcome> {
        let outcomes = self.shared.outcomes.lock().expect("never poisoned");
        outcomes.iter().filter(|outcome| outcome.sent_at > moment).cloned().collect()
    }

    fn last_answer(&self) -> String {
        let outcomes = self.shared.outcomes.lock().expect("never poisoned");
        outcomes.last().map_or("none".to_owned(), |outcome| outcome.reply.summary())
    }

    /// Lets the callers finish what they began, and gives all they were told. Fails the test when
    /// one of them has.
    pub(crate) async fn stop(mut self) -> Vec<Outcome> {
        self.shared.stopping.store(true, Ordering::Relaxed);
        while let Some(ended) = self.callers.join_next().await {
            if let Err(error) = ended {
                std::panic::resume_unwind(error.into_panic());
            }
        }
        std::mem::take(&mut *self.shared.outcomes.lock().expect("never poisoned"))
    }
}

/// The changes that callers were told are stored.
pub(crate) fn accepted(outcomes: &[Outcome]) -> Vec<Accepted> {
    outcomes.iter().filter(|outcome| outcome.reply.is_success()).map(|outcome| Accepted::from(&outcome.reply)).collect()
}

/// The longest that any caller waited for its answer.
pub(crate) fn longest_wait(outcomes: &[Outcome]) -> Duration {
    outcomes.iter().map(|outcome| outcome.reply.took).max().unwrap_or_default()
}

/// How many answers had which status, for messages.
pub(crate) fn statuses(outcomes: &[Outcome]) -> std::collections::BTreeMap<u16, usize> {
    let mut counts = std::collections::BTreeMap::new();
    for outcome in outcomes {
        *counts.entry(outcome.reply.status).or_default() += 1;
    }
    counts
}

struct Caller {
    name: String,
    turn: usize,
    shared: Arc<Shared>,
}

impl Caller {
    fn new(number: usize, shared: Arc<Shared>) -> Self {
        Self { name: unique(&format!("caller-{number}")), turn: number, shared }
    }

    async fn run(mut self) {
        let mut pace = tokio::time::interval(PACE);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut orders = 0;
        while !self.stopping() {
            orders += 1;
            let create = json!({
                "user_id": self.name,
                "external_id": format!("{}-{orders}", self.name),
                "items": [item("sku", orders, "1.25")],
            });
            pace.tick().await;
            let created = self.insist(&create).await;
            let order_id = created.text("order_id");
            // Every second order is changed, every sixth deleted afterwards.
            if orders % 2 == 0 && !self.stopping() {
                pace.tick().await;
                let items = [item("sku", orders, "2.50")];
                self.insist(&json!({ "order_id": order_id, "items": items })).await;
            }
            if orders % 6 == 0 && !self.stopping() {
                pace.tick().await;
                self.insist(&json!({ "order_id": order_id, "status": "deleted" })).await;
            }
        }
    }

    fn stopping(&self) -> bool {
        self.shared.stopping.load(Ordering::Relaxed)
    }

    /// Until a replica says that it is stored. All three kinds of request are safe to repeat: a
    /// create by its external id, the others because they say what is to be, not what to add.
    async fn insist(&mut self, order: &Value) -> Reply {
        let give_up = Instant::now() + GIVE_UP;
        loop {
            self.turn += 1;
            let sent_at = Instant::now();
            let api = self.shared.replicas.pick(self.turn);
            let state = match api.try_post_order(order, &[]).await {
                Ok(reply) => {
                    self.shared.answered.fetch_add(1, Ordering::Relaxed);
                    let outcome = Outcome { reply: reply.clone(), sent_at };
                    self.shared.outcomes.lock().expect("never poisoned").push(outcome);
                    match reply.status {
                        200..=202 => return reply,
                        503 => reply.summary(),
                        _ => panic!("{order} was answered {}", reply.summary()),
                    }
                }
                Err(error) => format!("{error:#}"),
            };
            assert!(Instant::now() < give_up, "{order} found no taker for {GIVE_UP:?}; last: {state}");
            // Not at once: a dead replica refuses faster than it can be restarted.
            tokio::time::sleep(PACE).await;
        }
    }
}
