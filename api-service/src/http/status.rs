//! Moving an order by somebody's hand: `PUT|PATCH /orders/{order_id}/status` and
//! `POST /orders/{order_id}/cancel`.

use axum::{
    Extension,
    extract::{Path, Request, State, rejection::PathRejection},
    http::{HeaderMap, HeaderValue, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use shared::order::{MAX_ID, Violation, order_id_of};
use utoipa::ToSchema;
use uuid::Uuid;

use super::{
    App,
    conditions::{IDEMPOTENCY_REPLAYED, claim_of_move, if_match},
    openapi,
    orders::{check_content_type, read_body, trace},
    reads::{etag, json},
};
use crate::{
    error::Problem,
    identity::Caller,
    orders::{Conditions, Done, Progress},
    request::Target,
    writer::{Destination, Move},
};

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub(super) struct NewStatus {
    status: String,
}

/// Put an order in another state, where its lifecycle allows that
#[utoipa::path(
    method(put, patch), path = "/orders/{order_id}/status", tag = "orders",
    params(("order_id" = String, Path, description = "A UUID, or any text that stands for one"), openapi::Moves),
    request_body = NewStatus,
    responses(
        (status = 200, description = "It is in that state", body = Answer, headers(("ETag" = String))),
        openapi::BadBody, openapi::BadChange, openapi::NotAllowed, openapi::Malformed, openapi::NotFound, openapi::Refused,
    )
)]
pub(super) async fn set(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    path: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<Response, Problem> {
    let (id, done) = set_status(&app, &caller, path, request).await?;
    Ok(render(&id, &done))
}

/// Cancel an order
#[utoipa::path(
    post, path = "/orders/{order_id}/cancel", tag = "orders",
    params(("order_id" = String, Path, description = "A UUID, or any text that stands for one"), openapi::Moves),
    responses(
        (status = 200, description = "It is cancelled", body = Answer, headers(("ETag" = String))),
        openapi::BadChange, openapi::Malformed, openapi::NotFound, openapi::Refused,
    )
)]
pub(super) async fn cancel(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    path: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let (id, done) = cancel_order(&app, &caller, path, &headers).await?;
    Ok(render(&id, &done))
}

/// The id as it was asked for, and what was done.
pub(super) async fn set_status(
    app: &App,
    caller: &Caller,
    path: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<(String, Done), Problem> {
    if !caller.is_service() && !app.identity.lets_users_set_status() {
        return Err(Problem::Forbidden(
            "setting a status is for the roles service and admin; cancelling is for everybody",
        ));
    }
    let id = id(path)?;
    let (parts, body) = request.into_parts();
    check_content_type(&parts.headers)?;
    let body = read_body(&parts.headers, body, app.max_body_bytes, &app.body_room).await?;
    if body.bytes.trim_ascii().is_empty() {
        return Err(Problem::Malformed("there is no body: send {\"status\": \"…\"}".to_owned()));
    }
    let is_list = body.bytes.trim_ascii_start().starts_with(b"[");
    let status = serde_json::from_slice(&body.bytes).and_then(|NewStatus { status }| {
        // serde reads a struct from a list, too.
        if is_list { Err(serde::de::Error::custom("a list is none")) } else { Ok(status) }
    });
    let status = status.map_err(|error| {
        if error.is_data() {
            let reason = format!("must be {{\"status\": \"…\"}}: {error}");
            Problem::Invalid(vec![Violation::new("", reason)])
        } else {
            Problem::Malformed(format!("the body is not JSON: {error}"))
        }
    })?;
    relocate(app, caller, &parts.headers, id, Destination::State(status)).await
}

/// The id as it was asked for, and what was done.
pub(super) async fn cancel_order(
    app: &App,
    caller: &Caller,
    path: Result<Path<String>, PathRejection>,
    headers: &HeaderMap,
) -> Result<(String, Done), Problem> {
    relocate(app, caller, headers, id(path)?, Destination::Cancelled).await
}

/// A UUID, or any text that stands for one.
fn id(path: Result<Path<String>, PathRejection>) -> Result<String, Problem> {
    let Path(id) = path.map_err(|error| Problem::Malformed(error.body_text()))?;
    if id.is_empty() || id.chars().count() > MAX_ID || id.contains('\0') {
        return Err(Problem::UnknownOrder);
    }
    Ok(id)
}

async fn relocate(
    app: &App,
    caller: &Caller,
    headers: &HeaderMap,
    id: String,
    to: Destination,
) -> Result<(String, Done), Problem> {
    let user_id = caller.only().map(ToOwned::to_owned);
    let what = match &to {
        Destination::State(state) => format!("to {state}"),
        Destination::Cancelled => "cancel".to_owned(),
    };
    let change = Move { target: Target { order_id: order_id_of(&id), user_id }, to };
    let conditions = Conditions {
        wait: None,
        trace: trace(headers),
        expected: if_match(headers)?,
        claim: claim_of_move(headers, caller, &change.target, &what)?,
    };
    Ok((id, app.orders.relocate(change, conditions).await?))
}

#[derive(Serialize, ToSchema)]
#[schema(as = MoveAnswer)]
struct Answer<'a> {
    /// As it was asked for.
    #[serde(rename = "orderId")]
    asked_id: &'a str,
    order_id: Uuid,
    status: &'a str,
    message: &'static str,
    version: i64,
    order_status: &'a str,
    order_version: i64,
    correlation_id: Uuid,
}

fn render(asked_id: &str, done: &Done) -> Response {
    let answer = Answer {
        asked_id,
        order_id: done.order_id,
        status: &done.state.status,
        message: match done.progress {
            Progress::Answered => "The order has this status already",
            Progress::Stored | Progress::Pending | Progress::Repeated => "Order status updated successfully",
        },
        version: done.version,
        order_status: &done.state.status,
        order_version: done.state.version,
        correlation_id: done.correlation_id,
    };
    answer_with(done, json(&answer))
}

/// The headers of what was done.
pub(super) fn answer_with(done: &Done, body: impl IntoResponse) -> Response {
    let mut response = ([(header::ETAG, etag(done.state.version))], body).into_response();
    if done.is_replay {
        response.headers_mut().insert(IDEMPOTENCY_REPLAYED, HeaderValue::from_static("true"));
    }
    response
}
