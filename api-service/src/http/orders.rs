//! `POST /orders`: one door for create, update and delete. Parses, renders, decides nothing.

use std::sync::Arc;

use axum::{
    Extension,
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use futures_util::StreamExt as _;
use hyper::body::Body as _;
use serde::Serialize;
use shared::{
    message::{Headers, TRACE_HEADERS, unmarked},
    money::Money,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout},
};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{
    App, BODY_TIMEOUT,
    conditions::{IDEMPOTENCY_REPLAYED, claim_of_upsert, if_match},
    openapi::{self, Amount, OrderRequest},
    prefer::{PREFERENCE_APPLIED, Preference, preference},
};
use crate::{
    error::{Problem, RETRY_AFTER},
    identity::Caller,
    orders::{Conditions, Done, Operation, Progress, WaitLimits},
    request::{self, Upsert},
};

/// Of a body that is too large, so much is read and thrown away before the answer: a client that
/// is still sending would otherwise see its connection reset instead.
pub(super) const DRAIN_LIMIT: usize = 32 * 1024 * 1024;
/// A trace header longer than this is not one (W3C Trace Context: 55 and 512 characters).
const MAX_TRACE_HEADER: usize = 1024;

/// Create, change or delete an order
///
/// Without an `order_id` a new one; with it a change, or with `"status":"deleted"` its end. Waits for the
/// worker as `Prefer` says.
#[utoipa::path(
    post, path = "/orders", tag = "orders",
    params(openapi::Conditions),
    request_body(content = OrderRequest),
    responses(
        (status = 201, description = "Created; handled by the worker, unless nobody waited", body = Answer,
            headers(("Location" = String), ("ETag" = String))),
        (status = 200, description = "Changed, deleted, or created before (`deleted`, where it has been since)",
            body = Answer, headers(("ETag" = String))),
        (status = 202, description = "Stored, and not yet handled by the worker: no error", body = Answer,
            headers(("Location" = String), ("Retry-After" = u64), ("ETag" = String))),
        openapi::BadBody, openapi::BadChange, openapi::Malformed, openapi::NotFound, openapi::Refused,
    )
)]
pub(super) async fn submit(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, Problem> {
    let arrived = Instant::now();
    let (parts, body) = request.into_parts();
    check_content_type(&parts.headers)?;
    let body = read_body(&parts.headers, body, app.max_body_bytes, &app.body_room).await?;
    // Where more comes than can be stored, to refuse it must cost little: a fifth of it was parsing.
    if let Err(full) = app.orders.writer.check_room_for_new()
        && !request::may_name_an_order(&body.bytes)
    {
        return Err(full);
    }
    let upsert = request::parse(&body.bytes, &caller, &app.defaults)?;
    let (conditions, applied) = conditions(app.limits, &caller, &parts.headers, &upsert, &body.bytes, arrived)?;
    drop(body);
    let done = app.orders.submit(upsert, conditions).await?;
    let mut response = render(&done);
    if let Some(applied) = applied {
        response.headers_mut().insert(PREFERENCE_APPLIED, applied);
    }
    Ok(response)
}

/// How to do what a body asks for, as the headers say; and what to say about the caller's
/// preference.
pub(crate) fn conditions(
    limits: WaitLimits,
    caller: &Caller,
    headers: &HeaderMap,
    upsert: &Upsert,
    body: &[u8],
    arrived: Instant,
) -> Result<(Conditions, Option<HeaderValue>), Problem> {
    let Preference { wait, applied } = preference(headers, limits);
    let conditions = Conditions {
        wait: wait.map(|wait| arrived + wait),
        trace: trace(headers),
        expected: if_match(headers)?,
        claim: claim_of_upsert(headers, caller, upsert, body, wait)?,
    };
    Ok((conditions, applied))
}

/// A body without its byte order mark, and the room that it takes.
pub(crate) struct WholeBody {
    pub bytes: Vec<u8>,
    pub room: Option<OwnedSemaphorePermit>,
}

pub(super) const CODED: Problem =
    Problem::ContentType("leave Content-Encoding out: bodies are taken as they are, not compressed");

/// Is the body compressed, or whatever else it would have to be freed of first?
pub(super) fn is_coded(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_ENCODING).is_some_and(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"identity"))
}

pub(super) fn check_content_type(headers: &HeaderMap) -> Result<(), Problem> {
    if is_coded(headers) {
        return Err(CODED);
    }
    let Some(value) = headers.get(header::CONTENT_TYPE) else { return Ok(()) };
    let essence = value.to_str().ok().and_then(|value| value.split(';').next()).map(|e| e.trim().to_ascii_lowercase());
    match essence.as_deref() {
        Some("application/json") => Ok(()),
        Some(other) if other.starts_with("application/") && other.ends_with("+json") => Ok(()),
        _ => Err(Problem::ContentType("Content-Type must be application/json")),
    }
}

pub(crate) async fn read_body(
    headers: &HeaderMap,
    body: Body,
    limit: usize,
    room: &Arc<Semaphore>,
) -> Result<WholeBody, Problem> {
    let declared = body.size_hint().lower();
    let too_large = declared > limit as u64;
    // Who asks before sending is spared the upload; so are we, where it is beyond all measure.
    if too_large && (headers.contains_key(header::EXPECT) || declared > DRAIN_LIMIT as u64) {
        return Err(Problem::TooLarge { limit });
    }
    let read = async {
        let mut stream = body.into_data_stream();
        let mut whole: Vec<u8> = Vec::new();
        let mut taken: Option<OwnedSemaphorePermit> = None;
        let mut size = 0_usize;
        while let Some(chunk) = stream.next().await {
            let chunk = chunk.map_err(|error| match too_large {
                true => Problem::TooLarge { limit },
                false => Problem::Malformed(format!("the body broke off: {error}")),
            })?;
            size += chunk.len();
            if size > DRAIN_LIMIT {
                break;
            }
            if size <= limit {
                let missing = size / 1024 + 1 - taken.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
                if missing > 0 {
                    let more = u32::try_from(missing).ok().and_then(|n| room.clone().try_acquire_many_owned(n).ok());
                    let more = more.ok_or(Problem::Unavailable("too many bodies are being sent at once"))?;
                    match &mut taken {
                        Some(taken) => taken.merge(more),
                        None => taken = Some(more),
                    }
                }
                whole.extend_from_slice(&chunk);
            } else {
                (whole, taken) = (Vec::new(), None);
            }
        }
        if size > limit {
            return Err(Problem::TooLarge { limit });
        }
        let mark = whole.len() - unmarked(&whole).len();
        whole.drain(..mark);
        Ok(WholeBody { bytes: whole, room: taken })
    };
    timeout(BODY_TIMEOUT, read).await.unwrap_or(Err(Problem::TooSlow))
}

pub(crate) fn trace(headers: &HeaderMap) -> Headers {
    let mut trace = Headers::default();
    for name in TRACE_HEADERS {
        if let Some(value) = headers.get(name).filter(|value| value.len() <= MAX_TRACE_HEADER) {
            trace.push(name, value.as_bytes());
        }
    }
    trace
}

/// `status` and `version` are this request's own, `order_status` and `order_version` the order's as the
/// worker left it.
#[derive(Serialize, ToSchema)]
#[schema(as = OrderAnswer)]
struct Answer<'a> {
    order_id: Uuid,
    status: &'a str,
    version: i64,
    order_status: &'a str,
    order_version: i64,
    #[schema(value_type = Option<Amount>)]
    amount: Option<Money>,
    currency: Option<&'a str>,
    correlation_id: Uuid,
    #[serde(skip_serializing_if = "Option::is_none")]
    superseded_by: Option<i64>,
}

fn render(done: &Done) -> Response {
    let answer = Answer {
        order_id: done.order_id,
        status: done.operation.name(),
        version: done.version,
        order_status: &done.state.status,
        order_version: done.state.version,
        amount: done.state.amount,
        currency: done.state.currency.as_deref(),
        correlation_id: done.correlation_id,
        superseded_by: done.superseded_by,
    };
    answer_with(done, "", super::reads::json(&answer))
}

/// Status and headers of what was done; `prefix` is that of the order's own place.
pub(super) fn answer_with(done: &Done, prefix: &str, body: impl IntoResponse) -> Response {
    let status = match (done.progress, done.operation) {
        (Progress::Pending, _) => StatusCode::ACCEPTED,
        (Progress::Stored | Progress::Answered, Operation::Created) => StatusCode::CREATED,
        _ => StatusCode::OK,
    };
    let mut response = (status, body).into_response();
    let headers = response.headers_mut();
    if matches!(status, StatusCode::CREATED | StatusCode::ACCEPTED)
        && let Ok(location) = HeaderValue::try_from(format!("{prefix}/orders/{}", done.order_id))
    {
        headers.insert(header::LOCATION, location);
    }
    if status == StatusCode::ACCEPTED {
        headers.insert(header::RETRY_AFTER, RETRY_AFTER.into());
    }
    if done.is_replay {
        headers.insert(IDEMPOTENCY_REPLAYED, HeaderValue::from_static("true"));
    }
    headers.insert(header::ETAG, super::reads::etag(done.state.version));
    response
}
