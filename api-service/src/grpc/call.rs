//! What is the same for every call: who makes it, how much it may send, until when it is answered.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use bytes::Bytes;
use futures_util::stream;
use http_body_util::BodyExt as _;
use shared::server::Connection;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout_at},
};
use tonic::{
    Status,
    metadata::{AsciiMetadataKey, MetadataValue},
};

use crate::{
    error::Problem,
    http::{
        App, Limited,
        conditions::IDEMPOTENCY_REPLAYED,
        orders::{WholeBody, conditions, read_body},
        reads::etag,
        who_asks,
    },
    identity::Caller,
    orders::{Done, Progress, WaitLimits},
    request::Upsert,
};

/// Kept of a caller's time for the way back, so that it hears from us what has been stored: a tenth
/// of it, within these.
const WAY_BACK: std::ops::RangeInclusive<Duration> = Duration::from_millis(50)..=Duration::from_millis(500);
/// Is the process alive? Everybody may ask.
const FOR_EVERYBODY: &str = "/orders.service.v1.OrdersService/Health";

/// Lets in whom we know with a message of a bearable size, and answers in time.
pub(super) async fn admit(State(app): State<App>, request: Request, next: Next) -> Response {
    let times = Times { arrived: Instant::now(), timeout: timeout(request.headers()) };
    let mut limited = None;
    let answered = async {
        match prepare(&app, times, request, &mut limited).await {
            Ok(request) => next.run(request).await,
            Err(refusal) => refusal,
        }
    };
    let answer = match times.deadline() {
        Some(deadline) => timeout_at(deadline, answered).await.unwrap_or_else(|_| {
            let unknown = "the time is up; whether anything was stored is not known";
            Status::deadline_exceeded(unknown).into_http()
        }),
        None => answered.await,
    };
    let mut answer = hold(answer);
    if let Some((limiter, verdict)) = limited {
        limiter.tell(verdict, answer.headers_mut());
    }
    answer
}

async fn prepare<'a>(
    app: &'a App,
    times: Times,
    request: Request,
    limited: &mut Option<Limited<'a>>,
) -> Result<Request, Response> {
    let (mut parts, body) = request.into_parts();
    let is_grpc = |value: &HeaderValue| value.as_bytes().starts_with(b"application/grpc");
    if !parts.headers.get(header::CONTENT_TYPE).is_some_and(is_grpc) {
        return Err(StatusCode::UNSUPPORTED_MEDIA_TYPE.into_response());
    }
    let refused = |problem: Problem| Status::from(problem).into_http();
    if parts.uri.path() != FOR_EVERYBODY {
        let (caller, verdict) = who_asks(app, &parts.headers, &parts.extensions).map_err(refused)?;
        *limited = verdict;
        if let Some((_, verdict)) = verdict.filter(|(_, verdict)| !verdict.allowed) {
            return Err(refused(Problem::TooMany { retry_after: verdict.retry_after() }));
        }
        parts.extensions.insert(caller);
    }
    parts.extensions.insert(times);
    let body = read_body(&parts.headers, body, app.max_body_bytes, &app.body_room).await.map_err(refused)?;
    let WholeBody { bytes, room } = body;
    let body = stream::once(async move {
        drop(room);
        Ok::<_, Infallible>(bytes)
    });
    Ok(Request::from_parts(parts, Body::from_stream(body)))
}

/// The beginning of a call, and how much time its caller gives it.
#[derive(Clone, Copy)]
struct Times {
    arrived: Instant,
    timeout: Option<Duration>,
}

impl Times {
    fn deadline(self) -> Option<Instant> {
        self.timeout.map(|timeout| self.arrived + timeout)
    }

    /// How long the worker may be waited for.
    fn wait_limits(self, limits: WaitLimits) -> WaitLimits {
        let for_us =
            |timeout: Duration| timeout.saturating_sub((timeout / 10).clamp(*WAY_BACK.start(), *WAY_BACK.end()));
        WaitLimits { max: self.timeout.map_or(limits.max, |timeout| limits.max.min(for_us(timeout))), ..limits }
    }
}

/// `grpc-timeout`: up to 8 digits and a unit. What is none is ignored, as grpc-go does.
fn timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(amount * 3600)),
        "M" => Some(Duration::from_secs(amount * 60)),
        "S" => Some(Duration::from_secs(amount)),
        "m" => Some(Duration::from_millis(amount)),
        "u" => Some(Duration::from_micros(amount)),
        "n" => Some(Duration::from_nanos(amount)),
        _ => None,
    }
}

/// A call, without its message.
pub(super) struct Call {
    pub caller: Caller,
    headers: HeaderMap,
    times: Times,
    large_answers: Option<Arc<Semaphore>>,
}

impl Call {
    pub(super) fn new<T>(request: tonic::Request<T>) -> Result<(Self, T), Problem> {
        let (metadata, mut extensions, message) = request.into_parts();
        // `admit` has put them there.
        let caller = extensions.remove().ok_or(Problem::Internal)?;
        let times = extensions.remove().ok_or(Problem::Internal)?;
        let large_answers = extensions.remove().map(|connection: Connection| connection.large_answers);
        Ok((Self { caller, headers: metadata.into_headers(), times, large_answers }, message))
    }

    /// Carries it out, as HTTP does: metadata are headers.
    /// `body` is that of `POST /orders` for which the message stood.
    pub(super) async fn submit(
        &self,
        app: &App,
        upsert: Upsert,
        body: Vec<u8>,
    ) -> Result<(Done, Option<HeaderValue>), Problem> {
        let (limits, arrived) = (self.times.wait_limits(app.limits), self.times.arrived);
        let (conditions, applied) = conditions(limits, &self.caller, &self.headers, &upsert, &body, arrived)?;
        drop(body);
        Ok((app.orders.submit(upsert, conditions).await?, applied))
    }

    /// Asked for before a whole order is read, and given to [`with_order`] with it.
    pub(super) async fn large_answer(&self) -> Option<Held> {
        let permit = self.large_answers.clone()?.acquire_owned().await.ok()?;
        Some(Held { _permit: Arc::new(permit) })
    }
}

/// A place among the large answers of a connection, until the client has taken this one.
#[derive(Clone)]
pub(super) struct Held {
    _permit: Arc<OwnedSemaphorePermit>,
}

fn hold(mut response: Response) -> Response {
    match response.extensions_mut().remove::<Held>() {
        Some(held) => response.map(|body| {
            // Not the body: that is done with when the whole of it is queued.
            let keep = move |data| Bytes::from_owner(Kept { data, _held: held.clone() });
            Body::new(body.map_frame(move |frame| frame.map_data(&keep)))
        }),
        None => response,
    }
}

/// Bytes that have a place until the last of them is on its way.
struct Kept {
    data: Bytes,
    _held: Held,
}

impl AsRef<[u8]> for Kept {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

/// An answer with what HTTP says in its body and headers beside it.
pub(super) fn with_done<T>(message: T, done: &Done, applied: Option<HeaderValue>) -> tonic::Response<T> {
    let mut response = tonic::Response::new(message);
    let progress = match done.progress {
        Progress::Stored => "stored",
        Progress::Answered => "answered",
        Progress::Pending => "pending",
        Progress::Repeated => "repeated",
    };
    say(&mut response, "order-id", &done.order_id.to_string());
    say(&mut response, "version", &done.version.to_string());
    say(&mut response, "order-status", &done.state.status);
    say(&mut response, "order-version", &done.state.version.to_string());
    say(&mut response, "correlation-id", &done.correlation_id.to_string());
    say(&mut response, "progress", progress);
    if let Some(superseded_by) = done.superseded_by {
        say(&mut response, "superseded-by", &superseded_by.to_string());
    }
    if done.is_replay {
        say(&mut response, IDEMPOTENCY_REPLAYED.as_str(), "true");
    }
    say_etag(&mut response, done.state.version);
    if let Some(applied) = applied.as_ref().and_then(|applied| applied.to_str().ok()) {
        say(&mut response, "preference-applied", applied);
    }
    response
}

/// An answer that is, or has, a whole order of this version.
pub(super) fn with_order<T>(message: T, version: i64, held: Option<Held>) -> tonic::Response<T> {
    let mut response = tonic::Response::new(message);
    say_etag(&mut response, version);
    if let Some(held) = held {
        response.extensions_mut().insert(held);
    }
    response
}

fn say_etag<T>(response: &mut tonic::Response<T>, version: i64) {
    if let Ok(etag) = etag(version).to_str() {
        say(response, "etag", etag);
    }
}

fn say<T>(response: &mut tonic::Response<T>, name: &str, value: &str) {
    // A state may have a name that no header can hold.
    if let (Ok(name), Ok(value)) = (AsciiMetadataKey::from_bytes(name.as_bytes()), MetadataValue::try_from(value)) {
        response.metadata_mut().insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeout_of(text: &str) -> Option<Duration> {
        timeout(&HeaderMap::from_iter([("grpc-timeout".parse().unwrap(), text.parse().unwrap())]))
    }

    #[test]
    fn a_timeout_is_digits_and_a_unit() {
        assert_eq!(timeout_of("2S"), Some(Duration::from_secs(2)));
        assert_eq!(timeout_of("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!(timeout_of("250m"), Some(Duration::from_millis(250)));
        assert_eq!(timeout_of("7u"), Some(Duration::from_micros(7)));
        for none in ["", "S", "2", "2s", "-1S", "+1S", "123456789S", "1 S"] {
            assert_eq!(timeout_of(none), None, "{none}");
        }
    }

    #[test]
    fn a_deadline_bounds_the_wait_and_leaves_time_for_the_way_back() {
        let limits = WaitLimits { default: Duration::from_secs(5), max: Duration::from_secs(30) };
        let wait = |timeout| Times { arrived: Instant::now(), timeout }.wait_limits(limits).max.as_millis();
        assert_eq!(wait(None), 30_000);
        assert_eq!(wait(Some(Duration::from_secs(60))), 30_000);
        assert_eq!(wait(Some(Duration::from_secs(10))), 9_500);
        assert_eq!(wait(Some(Duration::from_secs(1))), 900);
        assert_eq!(wait(Some(Duration::from_millis(100))), 50);
        assert_eq!(wait(Some(Duration::from_millis(20))), 0);
    }
}
