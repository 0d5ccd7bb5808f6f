//! `POST /orders/bulk`: an order a line in, an answer a line out, in the same order, both streamed.
//!
//! A task reads the body, checks each line and queues it with the writer; the response takes the
//! results in the order of the lines. All between them is bounded: a client that does not take its
//! answers is not read from any further. When it leaves, what is queued is stored and nothing else,
//! and sending all again completes the rest, given external ids.

mod answer;
mod lines;

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    Extension,
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt as _, stream};
use shared::message::Headers;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::timeout,
};
use tokio_util::{
    sync::CancellationToken,
    task::{AbortOnDropHandle, TaskTracker},
};
use utoipa::IntoParams;
use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_128;

use self::{
    answer::Summary,
    lines::{BYTE_ORDER_MARK, Cut, Line, Lines},
};
use super::{
    App, BODY_TIMEOUT,
    openapi::{self, ProblemDetails},
    orders::{DRAIN_LIMIT, is_coded, read_body, trace},
};
use crate::{
    error::{MAX_ERRORS, Problem},
    identity::Caller,
    orders::{Done, Operation},
    request::{self, NewOrder, Upsert},
    writer::{Origin, Queued, Stored},
};

/// Bulk requests at once: each holds a line, results that are not taken yet, and refusals.
const PLACES: usize = 32;
/// Those of one user.
const PLACES_OF_ONE: usize = 8;
/// Lines of one request that are queued, or whose results nobody has taken yet: what the writer
/// takes of all bulk requests together, so that one alone keeps it busy.
const WINDOW: usize = 1_024;
/// What refusals that nobody has taken yet may come to, in KiB: a line of a few bytes can break
/// many rules.
const REFUSALS_KIB: usize = 1_024;
/// Repeats that are looked up at the same time, on as many connections as there are.
const LOOK_UPS: usize = 32;
/// Results that are sent as one piece, if so many are there.
const PIECE: usize = 128;
/// So many lines in a row that cannot be stored now, and we stop: it is not about them.
const GIVE_UP_AFTER: u64 = 256;
/// After the last line of an answer that comes early, as long as this the client is listened to.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What can be stored all or nothing: it is held as a whole, and other writers may wait for it.
const TOGETHER_LINES: usize = 10_000;
const TOGETHER_BYTES: usize = 16 * 1024 * 1024;
/// So many such requests are held at the same time; the next waits before it is read.
const TOGETHER_PLACES: usize = 2;
/// What broken rules are kept of such a request, in bytes; beyond that, the beginning of one of each
/// line.
const TOGETHER_ERRORS: usize = 1024 * 1024;
const BEGINNING: usize = 64;

pub(crate) struct Places {
    any: Arc<Semaphore>,
    /// Of users; those without a request are forgotten when there are many.
    of_one: Mutex<HashMap<String, Arc<Semaphore>>>,
    together: Arc<Semaphore>,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            any: Arc::new(Semaphore::new(PLACES)),
            of_one: Mutex::default(),
            together: Arc::new(Semaphore::new(TOGETHER_PLACES)),
        }
    }
}

/// A place among all and, of one user, among that one's.
type Place = (OwnedSemaphorePermit, Option<OwnedSemaphorePermit>);

impl Places {
    fn take(&self, caller: &Caller) -> Result<Place, Problem> {
        let any = self.any.clone().try_acquire_owned();
        let any = any.map_err(|_| Problem::Unavailable("too many bulk requests at once"))?;
        // Who acts for others has as many as there are.
        let Some(user) = caller.only() else { return Ok((any, None)) };
        let own = {
            let mut of_one = self.of_one.lock().unwrap_or_else(PoisonError::into_inner);
            if of_one.len() > PLACES {
                of_one.retain(|_, own| own.available_permits() < PLACES_OF_ONE);
            }
            of_one.entry(user.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(PLACES_OF_ONE))).clone()
        };
        let own =
            own.try_acquire_owned().map_err(|_| Problem::Unavailable("too many bulk requests of one user at once"))?;
        Ok((any, Some(own)))
    }
}

#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "describes what is read by hand")]
struct BulkQuery {
    /// What a refused line means for the others: `reject-failed` nothing, `reject-all` that none is stored
    #[param(pattern = "^reject-(failed|all)$")]
    policy: Option<String>,
}

/// Many orders in one request: a line in, a line out
///
/// Each line is a body of `POST /orders`, and answered in its place by a line with its number, its status
/// and the order's id or the problem; the last line is a summary. Nobody waits for the worker.
#[utoipa::path(
    post, path = "/orders/bulk", tag = "orders",
    params(BulkQuery),
    request_body(content = openapi::Lines, content_type = "application/x-ndjson"),
    responses(
        (status = 200, description = "A line for each, and a summary", body = String,
            content_type = "application/x-ndjson"),
        (status = 400, description = "The query or a header makes no sense", body = ProblemDetails,
            content_type = "application/problem+json"),
        (status = 408, description = "The body did not arrive in time", body = ProblemDetails,
            content_type = "application/problem+json"),
        (status = 413, description = "Too much to be stored all or nothing", body = ProblemDetails,
            content_type = "application/problem+json"),
        (status = 415, description = "The body is no NDJSON", body = ProblemDetails,
            content_type = "application/problem+json"),
        (status = 422, description = "reject-all: nothing was stored; the lines say why", body = String,
            content_type = "application/x-ndjson"),
        openapi::Refused,
    )
)]
pub(super) async fn submit(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    check_headers(&parts.headers)?;
    let policy = Policy::of(parts.uri.query().unwrap_or_default())?;
    let place = app.bulk_places.take(&caller)?;
    match policy {
        Policy::RejectFailed => each(app, caller, &parts.headers, body, place).await,
        Policy::RejectAll => together(&app, &caller, &parts.headers, body, place).await,
    }
}

fn check_headers(headers: &HeaderMap) -> Result<(), Problem> {
    if is_coded(headers) {
        return Err(Problem::NotNdjson);
    }
    if let Some(value) = headers.get(header::CONTENT_TYPE) {
        let essence = value.to_str().ok().and_then(|value| value.split(';').next());
        let essence = essence.map(|essence| essence.trim().to_ascii_lowercase());
        let known = ["application/x-ndjson", "application/ndjson", "application/jsonl", "application/x-jsonl"];
        if !essence.is_some_and(|essence| known.contains(&essence.as_str())) {
            return Err(Problem::NotNdjson);
        }
    }
    for name in ["idempotency-key", "if-match"] {
        if headers.contains_key(name) {
            let reason = format!("{name} is for one order; a line is safe to repeat if it has an external_id");
            return Err(Problem::Malformed(reason));
        }
    }
    Ok(())
}

/// What a refused line means for the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Policy {
    RejectFailed,
    RejectAll,
}

impl Policy {
    fn of(query: &str) -> Result<Self, Problem> {
        match query.trim_matches('&') {
            "" | "policy=reject-failed" => Ok(Self::RejectFailed),
            "policy=reject-all" => Ok(Self::RejectAll),
            _ => {
                let reason = "the query can only be policy=reject-failed or policy=reject-all, once";
                Err(Problem::Malformed(reason.to_owned()))
            }
        }
    }
}

/// What the reading task hands to the response, in the order of the lines.
enum Item {
    Queued {
        line: u64,
        operation: Operation,
        correlation_id: Uuid,
        queued: Queued,
    },
    Stored {
        line: u64,
        stored: Stored,
    },
    Refused {
        line: u64,
        problem: Problem,
        _room: Option<OwnedSemaphorePermit>,
    },
    /// There are no more; says why, if that is not the end of the body.
    End(Option<&'static str>),
}

/// The same with the writer's result.
enum Outcome {
    Done { line: u64, done: Box<Done> },
    Refused { line: u64, problem: Problem, _room: Option<OwnedSemaphorePermit> },
    End(Option<&'static str>),
}

/// Each line for itself.
async fn each(app: App, caller: Caller, headers: &HeaderMap, body: Body, place: Place) -> Result<Response, Problem> {
    let mut lines = Lines::new(body.into_data_stream(), app.max_body_bytes, BODY_TIMEOUT);
    if headers.contains_key(header::EXPECT) {
        lines.begin().await.map_err(|_| Problem::TooSlow)?;
    }
    let (items, mut received) = mpsc::channel(WINDOW);
    let hopeless = CancellationToken::new();
    let reader = Reader {
        lines,
        app: app.clone(),
        caller,
        trace: trace(headers),
        items,
        hopeless: hopeless.clone(),
        refusals: Arc::new(Semaphore::new(REFUSALS_KIB)),
        queued: TaskTracker::new(),
        recent: Recent::default(),
        last: Kind::Other,
    };
    let reader = AbortOnDropHandle::new(tokio::spawn(reader.run()));
    let items = stream::poll_fn(move |context| received.poll_recv(context));
    Ok(answer(app, StatusCode::OK, items, hopeless, (reader, place)))
}

/// The answer to what comes; `held` is given up with it, whatever ends it.
fn answer(
    app: App,
    status: StatusCode,
    items: impl Stream<Item = Item> + Send + 'static,
    hopeless: CancellationToken,
    held: impl Send + 'static,
) -> Response {
    let mut answers = Some(Answers { summary: Summary::default(), unavailable: 0, hopeless });
    let pieces =
        items.map(move |item| settle(app.clone(), item)).buffered(LOOK_UPS).ready_chunks(PIECE).map(move |outcomes| {
            let _held = &held;
            let mut piece = BytesMut::new();
            for outcome in outcomes {
                match (&mut answers, outcome) {
                    (answers, Outcome::End(reason)) => {
                        if let Some(answers) = answers.take() {
                            answers.summary.end(&mut piece, reason);
                        }
                    }
                    (Some(answers), outcome) => answers.add(&mut piece, &outcome),
                    (None, _) => {}
                }
            }
            Ok::<_, Infallible>(piece.freeze())
        });
    (status, [(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(pieces)).into_response()
}

/// What became of a line, once that is known.
async fn settle(app: App, item: Item) -> Outcome {
    let (line, operation, correlation_id, written) = match item {
        Item::Queued { line, operation, correlation_id, queued } => {
            (line, operation, correlation_id, queued.written().await)
        }
        Item::Stored { line, stored: Stored { correlation_id, written } } => {
            (line, Operation::Created, correlation_id, Ok(written))
        }
        Item::Refused { line, problem, _room } => return Outcome::Refused { line, problem, _room },
        Item::End(reason) => return Outcome::End(reason),
    };
    let done = match written {
        Ok(written) => app.orders.settle(written, operation, correlation_id, None).await,
        Err(problem) => Err(problem),
    };
    match done {
        Ok(done) => Outcome::Done { line, done: Box::new(done) },
        Err(problem) => Outcome::Refused { line, problem, _room: None },
    }
}

struct Answers {
    summary: Summary,
    /// In a row.
    unavailable: u64,
    hopeless: CancellationToken,
}

impl Answers {
    fn add(&mut self, piece: &mut BytesMut, outcome: &Outcome) {
        match outcome {
            Outcome::Done { line, done } => {
                self.unavailable = 0;
                self.summary.done(piece, *line, done);
            }
            Outcome::Refused { line, problem, .. } => {
                self.unavailable = if matches!(problem, Problem::Unavailable(_)) { self.unavailable + 1 } else { 0 };
                if self.unavailable == GIVE_UP_AFTER {
                    self.hopeless.cancel();
                }
                self.summary.refused(piece, *line, problem);
            }
            Outcome::End(_) => {}
        }
    }
}

/// Lines of which one kind must not overtake the other: a deleted order's external id may be used
/// again, and the writer keeps the order of each kind only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Deletes,
    TakesExternalId,
    Other,
}

impl Kind {
    fn of(upsert: &Upsert) -> Self {
        match upsert {
            Upsert::Delete(_) => Self::Deletes,
            Upsert::Create(NewOrder { external_id: Some(_), .. }) => Self::TakesExternalId,
            Upsert::Create(_) | Upsert::Update(_) => Self::Other,
        }
    }
}

struct Reader<S> {
    lines: Lines<S>,
    app: App,
    caller: Caller,
    trace: Headers,
    items: mpsc::Sender<Item>,
    /// Nothing can be stored any more.
    hopeless: CancellationToken,
    refusals: Arc<Semaphore>,
    /// Those that the writer is not done with.
    queued: TaskTracker,
    recent: Recent,
    last: Kind,
}

/// Which orders and external ids the last lines were about. A second change of one is not queued
/// before the first is done: thousands of one order would keep the writer from the orders of others.
#[derive(Default)]
struct Recent {
    lines: HashMap<u128, u64>,
    line: u64,
}

impl Recent {
    /// More lines than can be queued at the same time.
    const KEPT: u64 = 2 * WINDOW as u64;

    /// Was one of the last lines about the same?
    fn has(&mut self, key: Option<u128>) -> bool {
        self.line += 1;
        let oldest = self.line.saturating_sub(Self::KEPT);
        if self.lines.len() as u64 > 2 * Self::KEPT {
            self.lines.retain(|_, line| *line >= oldest);
        }
        let before = key.and_then(|key| self.lines.insert(key, self.line));
        before.is_some_and(|line| line >= oldest)
    }
}

impl<S, E> Reader<S>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
{
    async fn run(mut self) {
        let (leaving, hopeless) = (self.app.leaving.clone(), self.hopeless.clone());
        let reason = tokio::select! {
            biased;
            () = leaving.cancelled() => Some("shutting down; send the rest again"),
            () = hopeless.cancelled() => Some("nothing can be stored now; send all again later"),
            reason = self.read() => reason,
        };
        if self.items.send(Item::End(reason)).await.is_ok() && reason.is_some() {
            self.lines.drain(DRAIN_LIMIT, LAST_WORDS).await;
        }
    }

    /// Until there are no more lines; says why, if that is not the end of the body.
    async fn read(&mut self) -> Option<&'static str> {
        loop {
            let (line, upsert) = match self.lines.next().await {
                Ok(None) => return None,
                Err(Cut::TooSlow) => return Some("no line arrived whole in time"),
                Err(Cut::BrokenOff) => return Some("the body broke off"),
                Ok(Some(Line::TooLong(line))) => (line, Err(Problem::TooLarge { limit: self.app.max_body_bytes })),
                Ok(Some(Line::Whole(line, bytes))) => (line, parse(&bytes, &self.caller, &self.app)),
            };
            let item = match upsert {
                Ok(upsert) => self.queue(line, upsert).await,
                Err(problem) => refuse(self.refusals.clone(), line, problem).await,
            };
            if self.items.send(item).await.is_err() {
                return Some("nobody listens any more");
            }
        }
    }

    async fn queue(&mut self, line: u64, upsert: Upsert) -> Item {
        let kind = Kind::of(&upsert);
        let changes_kind = kind != Kind::Other && kind != self.last;
        let overtakes = changes_kind && self.last != Kind::Other;
        if changes_kind {
            self.last = kind;
        }
        if self.recent.has(key(&upsert)) || overtakes {
            self.queued.close();
            self.queued.wait().await;
            self.queued.reopen();
            self.recent = Recent::default();
            self.recent.has(key(&upsert));
        }
        let correlation_id = Uuid::now_v7();
        let origin = Origin { correlation_id, reply_to: None, trace: self.trace.clone(), expected: None, claim: None };
        let work = self.app.orders.work(upsert, &origin);
        let operation = work.operation();
        match self.app.orders.writer.queue(work, origin, &self.queued).await {
            Ok(queued) => Item::Queued { line, operation, correlation_id, queued },
            Err(problem) => Item::Refused { line, problem, _room: None },
        }
    }
}

/// The order, or the external id of a new one.
fn key(upsert: &Upsert) -> Option<u128> {
    match upsert {
        Upsert::Create(order) => order.external_id.as_deref().map(|id| xxh3_128(id.as_bytes())),
        Upsert::Update(change) => Some(change.target.order_id.as_u128()),
        Upsert::Delete(target) => Some(target.order_id.as_u128()),
    }
}

async fn refuse(room: Arc<Semaphore>, line: u64, problem: Problem) -> Item {
    let kib = u32::try_from((size(&problem) / 1024).clamp(1, REFUSALS_KIB)).unwrap_or(1);
    Item::Refused { line, problem, _room: room.acquire_many_owned(kib).await.ok() }
}

fn parse(line: &[u8], caller: &Caller, app: &App) -> Result<Upsert, Problem> {
    request::parse(line, caller, &app.defaults).map_err(|error| {
        let mut problem = Problem::from(error);
        if let Problem::Invalid(violations) = &mut problem {
            violations.truncate(MAX_ERRORS);
            violations.shrink_to_fit();
        }
        problem
    })
}

/// All lines or none.
async fn together(
    app: &App,
    caller: &Caller,
    headers: &HeaderMap,
    body: Body,
    place: Place,
) -> Result<Response, Problem> {
    const TOO_MUCH: Problem = Problem::TooMuchTogether { lines: TOGETHER_LINES, bytes: TOGETHER_BYTES };
    let turn = timeout(BODY_TIMEOUT, app.bulk_places.together.clone().acquire_owned()).await;
    let Ok(Ok(turn)) = turn else {
        return Err(Problem::Unavailable("too many bulk requests with policy=reject-all at once"));
    };
    let whole = read_body(headers, body, TOGETHER_BYTES, &app.body_room).await.map_err(|problem| match problem {
        Problem::TooLarge { .. } => TOO_MUCH,
        other => other,
    })?;
    let mut parsed: Vec<(u64, Result<Box<NewOrder>, Problem>)> = Vec::new();
    let mut errors = 0;
    let text = whole.bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&whole.bytes);
    for (line, number) in text.split(|byte| *byte == b'\n').zip(1..) {
        if line.trim_ascii().is_empty() {
            continue;
        }
        if parsed.len() == TOGETHER_LINES {
            return Err(TOO_MUCH);
        }
        let mut order = if line.len() > app.max_body_bytes {
            Err(Problem::TooLarge { limit: app.max_body_bytes })
        } else {
            parse(line, caller, app).and_then(only_new)
        };
        if let Err(problem) = &mut order {
            if errors > TOGETHER_ERRORS {
                shorten(problem);
            }
            errors += size(problem);
        }
        parsed.push((number, order));
        if number % 256 == 0 {
            tokio::task::yield_now().await;
        }
    }
    drop(whole);

    let (numbers, orders): (Vec<u64>, Vec<_>) = parsed.into_iter().unzip();
    let orders = match orders.iter().any(Result::is_err) {
        true => {
            let refused = orders.into_iter().map(|order| Err(order.err().unwrap_or(Problem::AnotherRefused)));
            // Whoever comes next need not wait until all of it is read.
            drop(turn);
            return Ok(render_together(app, numbers, refused.collect(), place));
        }
        false => orders.into_iter().flatten().map(|order| *order).collect(),
    };
    let results = app.orders.create_together(orders, &trace(headers)).await?;
    drop(turn);
    Ok(render_together(app, numbers, results, place))
}

/// About how much memory a refusal holds.
fn size(problem: &Problem) -> usize {
    match problem {
        Problem::Invalid(violations) => violations.iter().map(|v| v.pointer.len() + v.reason.len() + 64).sum(),
        Problem::Malformed(detail) => detail.len(),
        _ => 0,
    }
}

/// To the beginning of its first reason.
fn shorten(problem: &mut Problem) {
    let beginning = |text: &mut String| {
        if let Some((end, _)) = text.char_indices().nth(BEGINNING) {
            text.truncate(end);
            text.push('…');
            text.shrink_to_fit();
        }
    };
    match problem {
        Problem::Invalid(violations) => {
            violations.truncate(1);
            violations.shrink_to_fit();
            for violation in violations {
                beginning(&mut violation.pointer);
                beginning(&mut violation.reason);
            }
        }
        Problem::Malformed(detail) => beginning(detail),
        _ => {}
    }
}

fn only_new(upsert: Upsert) -> Result<Box<NewOrder>, Problem> {
    match upsert {
        Upsert::Create(order) => Ok(Box::new(order)),
        Upsert::Update(_) | Upsert::Delete(_) => Err(Problem::Invalid(vec![shared::order::Violation::new(
            "/order_id",
            "with policy=reject-all only new orders are taken",
        )])),
    }
}

/// As the lines of all others; that nothing was stored is also said by the status, which is known
/// before anything is sent.
fn render_together(
    app: &App,
    lines: Vec<u64>,
    results: Vec<Result<Stored, Problem>>,
    held: impl Send + 'static,
) -> Response {
    let refused = results.iter().any(Result::is_err);
    let status = if refused { StatusCode::UNPROCESSABLE_ENTITY } else { StatusCode::OK };
    let items = lines.into_iter().zip(results).map(|(line, result)| match result {
        Ok(stored) => Item::Stored { line, stored },
        Err(problem) => Item::Refused { line, problem, _room: None },
    });
    let items = stream::iter(items.chain([Item::End(None)]));
    answer(app.clone(), status, items, CancellationToken::new(), held)
}
