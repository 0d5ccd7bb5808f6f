//! `POST /orders/bulk`: an order a line in, an answer a line out, in the same order, both streamed.
//!
//! A task reads the body, checks each line and queues it with the writer; the response takes the
//! results in the order of the lines. All between them is bounded: a client that does not take its
//! answers is not read from any further. When it leaves, what is queued is stored and nothing else,
//! and sending all again completes the rest, given external ids.

mod answer;
mod lines;
mod reader;
mod together;

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::{Arc, Mutex, PoisonError},
};

use axum::{
    Extension,
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use bytes::BytesMut;
use futures_util::{Stream, StreamExt as _, stream};
use serde::Deserialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use utoipa::IntoParams;
use uuid::Uuid;

use self::{
    answer::Summary,
    lines::{Cut, Lines},
    reader::Reader,
};
use super::{
    App, BODY_TIMEOUT,
    openapi::{self, ProblemDetails},
    orders::{CODED, is_coded, trace},
    query,
};
use crate::{
    error::{MAX_ERRORS, Problem},
    identity::Caller,
    orders::{Done, Operation},
    request::{self, Upsert},
    writer::{Queued, Stored},
};

/// Bulk requests at once: each holds a line, results that are not taken yet, and refusals.
const PLACES: usize = 32;
/// Those of one user.
const PLACES_OF_ONE: usize = 8;
/// Lines of one request that are queued, or whose results nobody has taken yet: what the writer
/// takes of all bulk requests together, so that one alone keeps it busy.
const WINDOW: usize = 1_024;
/// Repeats that are looked up at the same time, on as many connections as there are.
const LOOK_UPS: usize = 32;
/// Results that are sent as one piece, if so many are there.
const PIECE: usize = 128;
/// So many lines in a row that cannot be stored now, and we stop: it is not about them.
const GIVE_UP_AFTER: u64 = 256;
/// So many requests that are stored all or nothing are held at the same time; the next waits before it is read.
const TOGETHER_PLACES: usize = 2;

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

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct BulkQuery {
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
        (status = 400, description = "The query or a header makes no sense, or there is no body", body = ProblemDetails,
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
    query::Asked(query): query::Asked<BulkQuery>,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    check_headers(&parts.headers)?;
    let policy = Policy::of(query.policy.as_deref())?;
    let place = app.bulk_places.take(&caller)?;
    match policy {
        Policy::RejectFailed => each(app, caller, &parts.headers, body, place).await,
        Policy::RejectAll => together::together(&app, &caller, &parts.headers, body, place).await,
    }
}

fn check_headers(headers: &HeaderMap) -> Result<(), Problem> {
    if is_coded(headers) {
        return Err(CODED);
    }
    if let Some(value) = headers.get(header::CONTENT_TYPE) {
        let essence = value.to_str().ok().and_then(|value| value.split(';').next());
        let essence = essence.map(|essence| essence.trim().to_ascii_lowercase());
        let known = ["application/x-ndjson", "application/ndjson", "application/jsonl", "application/x-jsonl"];
        if !essence.is_some_and(|essence| known.contains(&essence.as_str())) {
            return Err(Problem::ContentType("Content-Type must be application/x-ndjson: one order a line"));
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
    fn of(policy: Option<&str>) -> Result<Self, Problem> {
        match policy {
            None | Some("reject-failed") => Ok(Self::RejectFailed),
            Some("reject-all") => Ok(Self::RejectAll),
            Some(_) => Err(Problem::Malformed("policy must be reject-failed or reject-all".to_owned())),
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

/// Who sends nothing has most likely lost a file on the way.
fn no_body() -> Problem {
    Problem::Malformed("there is no body: send one order a line, each a body of POST /orders".to_owned())
}

/// Each line for itself.
async fn each(app: App, caller: Caller, headers: &HeaderMap, body: Body, place: Place) -> Result<Response, Problem> {
    let mut lines = Lines::new(body.into_data_stream(), app.max_body_bytes, BODY_TIMEOUT);
    match lines.begin().await {
        Ok(true) => {}
        Ok(false) => return Err(no_body()),
        Err(Cut::TooSlow) => return Err(Problem::TooSlow),
        Err(Cut::BrokenOff) => return Err(Problem::Malformed("the body broke off".to_owned())),
    }
    let (items, mut received) = mpsc::channel(WINDOW);
    let hopeless = CancellationToken::new();
    let reader = Reader::new(app.clone(), caller, trace(headers), lines, items, hopeless.clone());
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

/// About how much memory a refusal holds.
fn size(problem: &Problem) -> usize {
    match problem {
        Problem::Invalid(violations) => violations.iter().map(|v| v.pointer.len() + v.reason.len() + 64).sum(),
        Problem::Malformed(detail) => detail.len(),
        _ => 0,
    }
}
