//! The use cases: change an order and, if the caller wants to, wait for the worker's answer.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use shared::{
    backoff::{Backoff, Seldom},
    cache::Cache,
    db::{Db, DbError},
    kafka::Producer,
    message::{AckStatus, Answer, Headers, now},
};
use tokio::{sync::Semaphore, time::Instant};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    acks::ReplyAddress,
    change::{self, Expected, State},
    error::Problem,
    heard::{Asked, Heard, Part, Told},
    idempotency::{Claim, is_undecided},
    request::{NewOrder, Upsert},
    store::{keys::Known, read},
    waiters::{Waiter, Waiters},
    writer::{Move, Origin, Stored, Work, Writer, Written},
};

/// How often an answer to somebody else's request is looked for.
const LOOK: Backoff = Backoff::new(Duration::from_millis(10), Duration::from_millis(250));

/// So many answers of others are looked into at a time.
const FOREIGN: usize = 4;

/// What the use cases need.
pub(crate) struct Orders {
    pub db: Db,
    pub cache: Cache,
    pub writer: Writer,
    pub waiters: Waiters,
    pub replies: ReplyAddress,
    pub producer: Producer,
    pub topic: String,
    /// Nobody waits any longer: the process is about to end.
    pub hurry: CancellationToken,
    pub foreign: Foreign,
}

/// For answers that are not our own worker's.
pub(crate) struct Foreign {
    /// They cost the database a look, and must not cost it all its connections.
    looks: Semaphore,
    mistaken: Mutex<Seldom>,
    useless: Mutex<Seldom>,
}

impl Default for Foreign {
    fn default() -> Self {
        Self { looks: Semaphore::new(FOREIGN), mistaken: Mutex::default(), useless: Mutex::default() }
    }
}

/// What a request says beside the change that it asks for.
#[derive(Debug, Default)]
pub(crate) struct Conditions {
    /// Until when the caller waits for the worker's answer; `None` does not wait.
    pub wait: Option<Instant>,
    /// Trace context of the request.
    pub trace: Headers,
    /// What the caller says that the order's version is.
    pub expected: Option<Expected>,
    /// The caller's idempotency key.
    pub claim: Option<Claim>,
}

/// What a request asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Created,
    Updated,
    Deleted,
    Moved,
}

impl Operation {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Updated => "updated",
            Self::Deleted => "deleted",
            Self::Moved => "status_changed",
        }
    }
}

/// A request that was carried out.
#[derive(Debug)]
pub(crate) struct Done {
    pub operation: Operation,
    pub order_id: Uuid,
    pub correlation_id: Uuid,
    /// The version that this request made, or found if it changed nothing.
    pub version: i64,
    /// The order as it is now, as far as we know.
    pub state: State,
    pub superseded_by: Option<i64>,
    pub progress: Progress,
    /// Told again to a request that has the same idempotency key.
    pub is_replay: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Stored, and by its own wish nobody waited.
    Stored,
    /// The worker has answered.
    Answered,
    /// Waited for the worker in vain, so far.
    Pending,
    /// An earlier request did the same.
    Repeated,
}

/// What came of a caller's wait.
#[derive(Debug)]
pub(crate) struct Waited {
    pub began: Instant,
    pub until: Instant,
    /// Did it have a place among those who wait?
    pub is_parked: bool,
    pub answer: Option<Answer>,
}

impl Done {
    /// As the database has it; the version is this request's own.
    fn new(operation: Operation, order_id: Uuid, correlation_id: Uuid, state: State, progress: Progress) -> Self {
        let (version, superseded_by, is_replay) = (state.version, None, false);
        Self { operation, order_id, correlation_id, version, state, superseded_by, progress, is_replay }
    }
}

impl Orders {
    /// Makes the change durable. With a deadline, also waits for the worker's answer until then.
    pub(crate) async fn submit(&self, upsert: Upsert, conditions: Conditions) -> Result<Done, Problem> {
        let Conditions { wait, trace, expected, claim } = conditions;
        if matches!(upsert, Upsert::Create(_)) {
            if expected.is_some() {
                return Err(Problem::Precondition { order: None });
            }
            self.writer.check_room_for_new()?;
        }
        let correlation_id = Uuid::now_v7();
        // Before the write: an answer that comes first would find nobody.
        let mut waiter = wait.and_then(|_| self.park(correlation_id));
        let reply_to = waiter.as_ref().and_then(|_| self.replies.for_request(correlation_id));
        let origin = Origin { correlation_id, reply_to, trace, expected, claim };
        let work = self.work(upsert, &origin);
        let operation = work.operation();
        let queued = self.writer.try_queue(work, origin, waiter.as_ref().map(Waiter::wake))?;
        let began = Instant::now();
        let heard = match (&mut waiter, wait) {
            (Some(waiter), Some(until)) => self.hear(waiter, until).await,
            _ => None,
        };
        let written = queued.written().await?;
        let answer = match (&mut waiter, wait, heard, &written) {
            (Some(waiter), Some(until), Some(heard), Written::Now { order_id, event_id, state }) => {
                let (order_id, event_id, version) = (*order_id, *event_id, state.version);
                let asked = Asked { correlation_id, order_id, event_id, version };
                match heard {
                    Heard { told: Told::Whole(answer), .. }
                        if heard.mistake(&asked).is_none() && !heard.is_ahead_of(version) =>
                    {
                        Some(answer)
                    }
                    heard => Box::pin(self.make_out(heard, &asked, state, waiter, until)).await,
                }
            }
            _ => None,
        };
        let waited = wait.map(|until| Waited { began, until, is_parked: waiter.is_some(), answer });
        // A repeat that waits counts like any other caller that does; nobody else waits any longer.
        let _place = waiter.filter(|_| matches!(written, Written::Before { .. }));
        self.settle(written, operation, correlation_id, waited).await
    }

    /// An answer, if there is one in time.
    async fn hear(&self, waiter: &mut Waiter, until: Instant) -> Option<Heard> {
        tokio::select! {
            biased;
            answer = waiter.answered() => answer,
            () = tokio::time::sleep_until(until) => None,
            () = self.hurry.cancelled() => None,
        }
    }

    /// What somebody else's answer comes to: with what it lacks, if it is this request's own; else the
    /// caller waits on. `None` where it tells nothing: then the caller is not kept waiting.
    async fn make_out(
        &self,
        mut heard: Heard,
        asked: &Asked,
        state: &State,
        waiter: &mut Waiter,
        until: Instant,
    ) -> Option<Answer> {
        while let Some(field) = self.mistake(&heard, asked, until).await {
            // The right one may have come while nobody listened: then it is in the history.
            waiter.wait_on();
            self.foreign.note("mistaken", asked, &format!("its {field} is of another one; the caller waits on"));
            let history = self.look_up(asked.order_id, asked.correlation_id);
            if let Some(answer) = self.foreign.look(until, history).await.flatten() {
                return Some(answer);
            }
            heard = self.hear(waiter, until).await?;
        }
        match heard.told {
            Told::Whole(answer) => Some(answer),
            Told::Part(part) => Some(self.fill_in(*part, asked, state, until).await),
            Told::Nothing => {
                self.foreign.note("useless", asked, "it has no status that we know; the caller is told 202");
                None
            }
        }
    }

    /// The field by which it is no answer to this request.
    async fn mistake(&self, heard: &Heard, asked: &Asked, until: Instant) -> Option<&'static str> {
        let mistake = heard.mistake(asked);
        if mistake.is_some() || !heard.is_ahead_of(asked.version) {
            return mistake;
        }
        // Others may have changed the order meanwhile.
        let version = self.state_now(asked, until).await.map_or(asked.version, |state| state.version);
        heard.is_ahead_of(version).then_some("order_version")
    }

    /// From the order as it is now; should that not be known in time, as the request left it.
    async fn fill_in(&self, part: Part, asked: &Asked, state: &State, until: Instant) -> Answer {
        metrics::counter!("orderstream_foreign_answers_total", "result" => "filled_in").increment(1);
        part.filled_in(self.state_now(asked, until).await.unwrap_or_else(|| state.clone()))
    }

    async fn state_now(&self, asked: &Asked, until: Instant) -> Option<State> {
        let read = self.foreign.look(until, read::state(&self.db, asked.order_id)).await?;
        read.inspect_err(|error| tracing::debug!(error = error.chain(), "looking at the order of an answer"))
            .ok()
            .flatten()
    }

    /// What a request asks the writer for.
    pub(crate) fn work(&self, upsert: Upsert, origin: &Origin) -> Work {
        match upsert {
            Upsert::Create(order) => Work::Create(Box::new(change::new_row(order, origin, now(), &self.topic))),
            Upsert::Update(change) => Work::Update(Box::new(change)),
            Upsert::Delete(target) => Work::Delete(target),
        }
    }

    /// What the caller is told of a change that is durable, and of the worker's answer. What few
    /// callers need is boxed: otherwise each of those who wait would hold room for all of it, some
    /// kilobytes.
    pub(crate) async fn settle(
        &self,
        written: Written,
        operation: Operation,
        correlation_id: Uuid,
        waited: Option<Waited>,
    ) -> Result<Done, Problem> {
        match written {
            Written::Now { order_id, state, .. } => {
                let done = Done::new(operation, order_id, correlation_id, *state, Progress::Stored);
                match waited {
                    Some(Waited { began, answer, .. }) => self.handled(done, answer, began).await,
                    None => Ok(done),
                }
            }
            Written::Nothing { order_id, state } => {
                Ok(Done::new(operation, order_id, correlation_id, *state, Progress::Answered))
            }
            Written::Before { order_id, correlation_id } => {
                let until = waited.as_ref().filter(|waited| waited.is_parked).map(|waited| waited.until);
                Box::pin(self.repeat(order_id, correlation_id, waited.is_some(), until)).await
            }
            Written::Gone { order_id, correlation_id } => Box::pin(self.gone(order_id, correlation_id)).await,
            Written::Repeated(known) => Box::pin(self.replay(operation, *known)).await,
        }
    }

    /// Makes new orders durable, all of them or none; what became of each. Nobody waits.
    pub(crate) async fn create_together(
        &self,
        orders: Vec<NewOrder>,
        trace: &Headers,
    ) -> Result<Vec<Result<Stored, Problem>>, Problem> {
        let at = now();
        let rows = orders.into_iter().map(|order| {
            let correlation_id = Uuid::now_v7();
            let origin = Origin { correlation_id, reply_to: None, trace: trace.clone(), expected: None, claim: None };
            change::new_row(order, &origin, at, &self.topic)
        });
        self.writer.write_together(&rows.collect::<Vec<_>>()).await
    }

    /// Puts the order in another state; nobody waits, since the worker only notes it.
    pub(crate) async fn relocate(&self, change: Move, conditions: Conditions) -> Result<Done, Problem> {
        let (operation, correlation_id) = (Operation::Moved, Uuid::now_v7());
        let origin = Origin {
            correlation_id,
            reply_to: None,
            trace: conditions.trace,
            expected: conditions.expected,
            claim: conditions.claim,
        };
        match self.writer.write(Work::Move(change), origin).await? {
            Written::Now { order_id, state, .. } => {
                Ok(Done::new(operation, order_id, correlation_id, *state, Progress::Stored))
            }
            Written::Nothing { order_id, state } => {
                Ok(Done::new(operation, order_id, correlation_id, *state, Progress::Answered))
            }
            Written::Repeated(known) => self.replay(operation, *known).await,
            Written::Before { .. } | Written::Gone { .. } => Err(Problem::Internal), // only what creates has a before
        }
    }

    /// A place to wait in; none where waiting would be in vain.
    fn park(&self, correlation_id: Uuid) -> Option<Waiter> {
        if self.producer.is_away() || !self.replies.is_known() || self.hurry.is_cancelled() {
            return None;
        }
        self.waiters.register(correlation_id)
    }

    /// What is known when the wait is over.
    async fn handled(&self, done: Done, answer: Option<Answer>, began: Instant) -> Result<Done, Problem> {
        let answer = match answer {
            Some(answer) => Some(answer),
            // An answer that got lost costs only time: it is in the history too.
            None => Box::pin(self.look_up(done.order_id, done.correlation_id)).await,
        };
        match answer {
            Some(answer) if answer.status != AckStatus::Failed => {
                metrics::counter!("orderstream_requests_answered_total").increment(1);
                metrics::histogram!("orderstream_answer_seconds").record(began.elapsed().as_secs_f64());
                answered(done, answer)
            }
            _ => {
                metrics::counter!("orderstream_requests_timed_out_total").increment(1);
                Ok(Done { progress: Progress::Pending, ..done })
            }
        }
    }

    async fn look_up(&self, order_id: Uuid, correlation_id: Uuid) -> Option<Answer> {
        match read::request(&self.db, order_id, correlation_id).await {
            Ok(request) => request?.answer,
            Err(error) => {
                // It is stored, and that is what the caller is told.
                tracing::warn!(order.id = %order_id, error = error.chain(), "looking for an answer");
                None
            }
        }
    }

    /// Tells again what became of the request that created this very order, waiting for that until
    /// the deadline.
    async fn repeat(
        &self,
        order_id: Uuid,
        correlation_id: Uuid,
        is_waiting: bool,
        deadline: Option<Instant>,
    ) -> Result<Done, Problem> {
        let known = read::request(&self.db, order_id, correlation_id).await?;
        let request = known.ok_or(Problem::Unavailable("the order is being created by another request"))?;
        metrics::counter!("orderstream_requests_repeated_total").increment(1);
        let state = State { status: request.status, version: request.version, amount: None, currency: None };
        let progress = if is_waiting { Progress::Pending } else { Progress::Repeated };
        let done = Done::new(Operation::Created, order_id, correlation_id, state, progress);
        let answer = match (request.answer, deadline) {
            (None, Some(deadline)) => self.await_other(order_id, correlation_id, deadline).await,
            (answer, _) => answer,
        };
        match answer.filter(|answer| answer.status != AckStatus::Failed) {
            Some(answer) => answered(Done { progress: Progress::Repeated, ..done }, answer)
                .map(|done| Done { progress: Progress::Repeated, ..done }),
            None => self.with_amount(done).await,
        }
    }

    /// What a create is told that is delivered again when its order is deleted: that it is.
    async fn gone(&self, order_id: Uuid, correlation_id: Uuid) -> Result<Done, Problem> {
        let state = read::state(&self.db, order_id).await?.ok_or(Problem::Internal)?;
        metrics::counter!("orderstream_requests_repeated_total").increment(1);
        Ok(Done::new(Operation::Deleted, order_id, correlation_id, state, Progress::Repeated))
    }

    /// Tells again what became of the request that had this idempotency key first.
    async fn replay(&self, operation: Operation, known: Known) -> Result<Done, Problem> {
        let (order_id, correlation_id) = (known.order_id, known.correlation_id);
        let request = read::request(&self.db, order_id, correlation_id).await?.ok_or(Problem::Internal)?;
        metrics::counter!("orderstream_requests_repeated_total").increment(1);
        let state = State { status: request.status, version: request.version, amount: None, currency: None };
        // Nobody waits for these to be handled, nor did the first caller.
        let is_over = request.ignored || operation == Operation::Moved;
        let progress = if is_over { Progress::Stored } else { Progress::Pending };
        let done = Done::new(operation, order_id, correlation_id, state, progress);
        let done = Done { version: known.version, is_replay: true, ..done };
        match request.answer.filter(|answer| answer.status != AckStatus::Failed && !is_over) {
            Some(answer) => answered(done, answer),
            None if !is_over && is_undecided(known.answer_by) => {
                Err(Problem::KeyUndecided { order_id, correlation_id })
            }
            None => self.with_amount(done).await,
        }
    }

    /// With what the order comes to, as far as that is known.
    async fn with_amount(&self, done: Done) -> Result<Done, Problem> {
        let order = self.order(done.order_id).await?;
        let (amount, currency) = order.map_or((None, None), |order| (order.amount, order.currency));
        Ok(Done { state: State { amount, currency, ..done.state }, ..done })
    }

    /// The answer to a request that another caller made, perhaps of another replica: it comes to
    /// that one alone, so it is looked for.
    async fn await_other(&self, order_id: Uuid, correlation_id: Uuid, deadline: Instant) -> Option<Answer> {
        let mut pause = LOOK;
        while Instant::now() < deadline && !self.hurry.is_cancelled() {
            let next = (Instant::now() + pause.delay()).min(deadline);
            tokio::select! {
                () = tokio::time::sleep_until(next) => {}
                () = self.hurry.cancelled() => {}
            }
            let answer = self.look_up(order_id, correlation_id).await;
            if answer.is_some() {
                return answer;
            }
        }
        None
    }

    pub(crate) async fn order(&self, order_id: Uuid) -> Result<Option<read::Order>, DbError> {
        read::order(&self.db, order_id).await
    }
}

impl Foreign {
    /// What is read for such an answer, once it is its turn; `None` where that is too late.
    async fn look<T>(&self, until: Instant, read: impl Future<Output = T>) -> Option<T> {
        let look = async {
            let _turn = self.looks.acquire().await;
            read.await
        };
        tokio::time::timeout_at(until, look).await.ok()
    }

    fn note(&self, result: &'static str, asked: &Asked, reason: &str) {
        metrics::counter!("orderstream_foreign_answers_total", "result" => result).increment(1);
        let told = if result == "useless" { &self.useless } else { &self.mistaken };
        let Asked { order_id, correlation_id, .. } = asked;
        if told.lock().unwrap_or_else(PoisonError::into_inner).is_due(result) {
            tracing::warn!(order.id = %order_id, correlation.id = %correlation_id, reason, "an answer was not told");
        } else {
            tracing::debug!(order.id = %order_id, correlation.id = %correlation_id, reason, "an answer was not told");
        }
    }
}

fn answered(done: Done, answer: Answer) -> Result<Done, Problem> {
    if answer.status == AckStatus::Rejected {
        return Err(Problem::Rejected {
            order_id: done.order_id,
            correlation_id: done.correlation_id,
            reason: answer.error.unwrap_or_else(|| "the worker gave no reason".to_owned()),
            order_status: answer.order_status,
            order_version: answer.order_version,
        });
    }
    Ok(Done {
        state: State {
            status: answer.order_status,
            version: answer.order_version,
            amount: answer.amount,
            currency: answer.currency,
        },
        superseded_by: answer.superseded_by,
        progress: Progress::Answered,
        ..done
    })
}

/// How long a caller waits at most and by default.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WaitLimits {
    pub default: Duration,
    pub max: Duration,
}
