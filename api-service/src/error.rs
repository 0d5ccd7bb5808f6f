//! Everything a request can fail with, and the one place where that becomes HTTP: problem details
//! (RFC 9457).

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value, json};
use shared::{
    db::{DbError, Fault},
    order::Violation,
};
use uuid::Uuid;

use crate::{http::BODY_TIMEOUT, request::BadRequest};

/// Seconds after which a client may try again what could not be done now.
pub(crate) const RETRY_AFTER: u64 = 1;

/// A list of a thousand broken items helps nobody.
pub(crate) const MAX_ERRORS: usize = 100;

#[derive(Clone, Debug)]
pub(crate) enum Problem {
    Malformed(String),
    Invalid(Vec<Violation>),
    /// What the query has, and the route does not take.
    Parameters(Vec<Violation>),
    UnknownOrder,
    UnknownRequest,
    UnknownParked,
    /// Says where there is something.
    UnknownRoute(&'static str),
    MethodNotAllowed,
    /// Says what is missing.
    Unauthenticated(&'static str),
    /// Says who may.
    Forbidden(&'static str),
    /// Says what to send instead.
    ContentType(&'static str),
    TooLarge {
        limit: usize,
    },
    /// More than can be stored all or nothing.
    TooMuchTogether {
        lines: usize,
        bytes: usize,
    },
    TooSlow,
    /// A good line among bad ones, where all or none are stored.
    AnotherRefused,
    Deleted {
        order_id: Uuid,
    },
    ContentFixed {
        order_id: Uuid,
        status: String,
    },
    IllegalMove {
        order_id: Uuid,
        status: String,
        allowed: Vec<String>,
    },
    ExternalIdTaken {
        order_id: Uuid,
    },
    /// The order is of another version than the caller expects; without one there is none.
    Precondition {
        order: Option<(Uuid, i64)>,
    },
    /// The idempotency key belongs to another request.
    KeyReused,
    /// The first request with this idempotency key may still be answered.
    KeyUndecided {
        order_id: Uuid,
        correlation_id: Uuid,
    },
    /// A parked message that is in no state for what an operator asks.
    ParkedElsewise {
        state: String,
        detail: &'static str,
    },
    Rejected {
        order_id: Uuid,
        correlation_id: Uuid,
        reason: String,
        order_status: String,
        order_version: i64,
    },
    /// Says after how many seconds there may be another request.
    TooMany {
        retry_after: u64,
    },
    /// Nothing is wrong with the request; says what is in the way.
    Unavailable(&'static str),
    /// A fault of ours.
    Internal,
}

/// Nothing was asked of it.
pub(crate) const DATABASE_AWAY: Problem = Problem::Unavailable("the database is away; nothing was stored");
pub(crate) const DATABASE_READ_ONLY: Problem = Problem::Unavailable("the database is read-only; nothing was stored");

impl From<DbError> for Problem {
    fn from(error: DbError) -> Self {
        let problem = match (&error, error.fault()) {
            (DbError::Refused(refusal), Fault::Data) => {
                let said = refusal.as_db_error().map_or("for no known reason", |said| said.message());
                Self::Invalid(vec![Violation::new("", format!("cannot be stored; PostgreSQL says: {said}"))])
            }
            (DbError::Refused(_), Fault::Locked) => {
                Self::Unavailable("somebody else keeps locked what this would change")
            }
            (DbError::Refused(_), _) => Self::Unavailable("the database refuses to work"),
            (DbError::Away(_), _) => DATABASE_AWAY,
            (DbError::Lost(_), _) => Self::Unavailable(
                "the database fell silent; a question can be repeated, and so can a change with external_id or Idempotency-Key: \
                 whether it was stored is not known",
            ),
        };
        match &error {
            // Told when it began.
            DbError::Away(None) => tracing::debug!(error = error.chain(), "database"),
            _ => tracing::warn!(error = error.chain(), "database"),
        }
        problem
    }
}

impl From<BadRequest> for Problem {
    fn from(error: BadRequest) -> Self {
        match error {
            BadRequest::Malformed(detail) => Self::Malformed(detail),
            BadRequest::Invalid(violations) => Self::Invalid(violations),
        }
    }
}

impl Problem {
    /// Status, last part of the type, title.
    pub(crate) fn kind(&self) -> (StatusCode, &'static str, &'static str) {
        match self {
            Self::Malformed(_) => (StatusCode::BAD_REQUEST, "malformed", "The request cannot be read"),
            Self::Invalid(_) => (StatusCode::UNPROCESSABLE_ENTITY, "validation", "The request breaks rules"),
            Self::Parameters(_) => {
                (StatusCode::BAD_REQUEST, "malformed", "The query has parameters that are not taken here")
            }
            Self::UnknownOrder => (StatusCode::NOT_FOUND, "not-found", "There is no such order"),
            Self::UnknownRequest => (StatusCode::NOT_FOUND, "not-found", "There is no such request"),
            Self::UnknownParked => (StatusCode::NOT_FOUND, "not-found", "There is no such parked message"),
            Self::Unauthenticated(_) => (StatusCode::UNAUTHORIZED, "unauthenticated", "Who are you?"),
            Self::Forbidden(_) => (StatusCode::FORBIDDEN, "forbidden", "You may not do this"),
            Self::ParkedElsewise { .. } => (StatusCode::CONFLICT, "conflict", "That cannot be done with this message"),
            Self::UnknownRoute(_) => (StatusCode::NOT_FOUND, "not-found", "There is nothing here"),
            Self::MethodNotAllowed => {
                (StatusCode::METHOD_NOT_ALLOWED, "malformed", "This method is not for this resource")
            }
            Self::ContentType(_) => {
                (StatusCode::UNSUPPORTED_MEDIA_TYPE, "malformed", "The body is of a kind that is not taken here")
            }
            Self::TooMuchTogether { .. } => {
                (StatusCode::PAYLOAD_TOO_LARGE, "too-large", "Too much to be stored all or nothing")
            }
            Self::AnotherRefused => (StatusCode::FAILED_DEPENDENCY, "conflict", "Another line was refused"),
            Self::TooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, "too-large", "The body is too large"),
            Self::TooSlow => (StatusCode::REQUEST_TIMEOUT, "malformed", "The body did not arrive in time"),
            Self::Deleted { .. } => (StatusCode::CONFLICT, "deleted", "The order is deleted"),
            Self::ContentFixed { .. } => (StatusCode::CONFLICT, "conflict", "The order takes no change now"),
            Self::IllegalMove { .. } => (StatusCode::CONFLICT, "conflict", "The order cannot go there from here"),
            Self::ExternalIdTaken { .. } => {
                (StatusCode::CONFLICT, "conflict", "This external id belongs to an order with other content")
            }
            Self::Precondition { order: Some(_) } => {
                (StatusCode::PRECONDITION_FAILED, "precondition", "The order has changed")
            }
            Self::Precondition { order: None } => {
                (StatusCode::PRECONDITION_FAILED, "precondition", "There is no order yet that could have a version")
            }
            Self::KeyReused => (StatusCode::UNPROCESSABLE_ENTITY, "idempotency", "This key belongs to another request"),
            Self::KeyUndecided { .. } => {
                (StatusCode::CONFLICT, "idempotency", "The first request with this key is being answered")
            }
            Self::Rejected { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "rejected", "The worker refused the order"),
            Self::TooMany { .. } => (StatusCode::TOO_MANY_REQUESTS, "rate-limited", "Too many requests"),
            Self::Unavailable(_) => (StatusCode::SERVICE_UNAVAILABLE, "unavailable", "Not now; try again"),
            Self::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "unavailable", "A fault of ours"),
        }
    }

    pub(crate) fn detail(&self) -> String {
        match self {
            Self::Malformed(detail) => detail.clone(),
            Self::Invalid(violations) | Self::Parameters(violations) => shared::order::sentence(violations),
            Self::TooMuchTogether { lines, bytes } => format!(
                "with policy=reject-all at most {lines} lines and {bytes} bytes are taken; policy=reject-failed has no limit"
            ),
            Self::AnotherRefused => "nothing is wrong with this line; none of them was stored".to_owned(),
            Self::TooLarge { limit } => format!("at most {limit} bytes are taken (MAX_BODY_BYTES)"),
            Self::ContentFixed { status, .. } => format!("orders that are {status} take no change of content"),
            Self::IllegalMove { status, allowed, .. } if allowed.is_empty() => {
                format!("nobody moves an order that is {status}: only its lifecycle could, if anything")
            }
            Self::IllegalMove { status, allowed, .. } => {
                format!("orders that are {status} can become {}", allowed.join(" or "))
            }
            Self::Precondition { order: Some((_, version)) } => {
                format!("it is at version {version}; read it again, and send its ETag in If-Match")
            }
            Self::Precondition { order: None } => {
                "this makes a new order: leave If-Match out, or send the order_id of the order that is meant".to_owned()
            }
            Self::ExternalIdTaken { order_id } => {
                format!("it is order {order_id}: to change it send its order_id, for a new order another external_id")
            }
            Self::KeyReused => "take a new Idempotency-Key for another request".to_owned(),
            Self::KeyUndecided { order_id, correlation_id } => {
                format!("nothing is lost; try again, or look at /orders/{order_id}/requests/{correlation_id}")
            }
            Self::Rejected { reason, .. } => reason.clone(),
            Self::Unavailable(detail)
            | Self::Unauthenticated(detail)
            | Self::Forbidden(detail)
            | Self::ContentType(detail)
            | Self::UnknownRoute(detail) => (*detail).to_owned(),
            Self::ParkedElsewise { state, detail } => format!("it is {state}; {detail}"),
            Self::TooMany { retry_after } => format!("this caller may ask again in {retry_after} s (RATE_LIMIT)"),
            Self::Internal => "it is in our log".to_owned(),
            // Whether it is somebody else's is not told.
            Self::UnknownOrder => {
                "check the id, and on whose behalf it is asked (X-User-Id, or the token): orders of others are not shown"
                    .to_owned()
            }
            Self::UnknownRequest => "check the correlation id: a request is one of its order's".to_owned(),
            Self::UnknownParked => "GET /admin/parked lists those that there are".to_owned(),
            Self::MethodNotAllowed => "the header Allow names those that are".to_owned(),
            Self::TooSlow => format!("all of it must arrive within {} s", BODY_TIMEOUT.as_secs()),
            Self::Deleted { .. } => "nothing changes it any more; a new order may have its external_id".to_owned(),
        }
    }

    /// What else is known, for programs.
    pub(crate) fn members(&self) -> Map<String, Value> {
        let members = match self {
            Self::Invalid(violations) | Self::Parameters(violations) => {
                json!({ "errors": &violations[..violations.len().min(MAX_ERRORS)] })
            }
            Self::Deleted { order_id } | Self::ExternalIdTaken { order_id } => json!({ "order_id": order_id }),
            Self::Precondition { order: Some((order_id, version)) } => {
                json!({ "order_id": order_id, "order_version": version })
            }
            Self::KeyUndecided { order_id, correlation_id } => {
                json!({ "order_id": order_id, "correlation_id": correlation_id })
            }
            Self::ContentFixed { order_id, status } => json!({ "order_id": order_id, "order_status": status }),
            Self::ParkedElsewise { state, .. } => json!({ "state": state }),
            Self::IllegalMove { order_id, status, allowed } => {
                json!({ "order_id": order_id, "order_status": status, "allowed": allowed })
            }
            Self::Rejected { order_id, correlation_id, order_status, order_version, .. } => json!({
                "order_id": order_id, "correlation_id": correlation_id,
                "order_status": order_status, "order_version": order_version,
            }),
            _ => json!({}),
        };
        if let Value::Object(members) = members { members } else { Map::new() }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let (_, kind, _) = self.kind();
        metrics::counter!("orderstream_requests_refused_total", "reason" => kind).increment(1);
        self.render()
    }
}

impl Problem {
    /// In one sentence.
    pub(crate) fn sentence(&self) -> String {
        let (_, _, title) = self.kind();
        format!("{title}: {}", self.detail())
    }

    /// Status and problem details.
    pub(crate) fn describe(&self) -> (StatusCode, Value) {
        let (status, kind, title) = self.kind();
        let mut body = self.members();
        body.insert("type".into(), format!("urn:orderstream:problem:{kind}").into());
        body.insert("title".into(), title.into());
        body.insert("status".into(), status.as_u16().into());
        body.insert("detail".into(), self.detail().into());
        (status, Value::Object(body))
    }

    /// As a response that is not counted: to those who look after the service. The problem itself
    /// goes with it, for those who say the same in other words.
    pub(crate) fn render(self) -> Response {
        let (status, body) = self.describe();
        let is_undecided = matches!(self, Self::KeyUndecided { .. });
        let mut response = (status, body.to_string()).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Self::TooMany { retry_after } = self {
            headers.insert(header::RETRY_AFTER, retry_after.into());
        }
        if status == StatusCode::SERVICE_UNAVAILABLE || is_undecided {
            headers.insert(header::RETRY_AFTER, RETRY_AFTER.into());
        }
        response.extensions_mut().insert(self);
        response
    }
}
