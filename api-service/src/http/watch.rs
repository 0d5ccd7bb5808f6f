//! `GET /orders/{order_id}/watch`: what happens to an order, as server-sent events.

use std::{convert::Infallible, time::Duration};

use axum::{
    Extension,
    body::Body,
    extract::{Path, State, rejection::PathRejection},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures_util::stream;
use serde::{Deserialize, Serialize};
use shared::order::Violation;
use time::OffsetDateTime;
use tokio::time::timeout;
use utoipa::{IntoParams, ToSchema};

use super::{
    App, openapi, query,
    reads::{json, visible_order},
};
use crate::{error::Problem, identity::Caller, tickets::Ticket, watch::Watch};

/// A sign of life for proxies and clients that give up on what is silent.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// A comment.
const SIGN_OF_LIFE: Bytes = Bytes::from_static(b":\n\n");
/// Sent at once, so that a client sees its request answered; and how long it waits, in milliseconds,
/// before it comes back.
const GREETING: Bytes = Bytes::from_static(b"retry: 1000\n\n");

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct Since {
    /// As `Last-Event-ID`, for tools that cannot set the header
    #[param(value_type = Option<i64>, nullable = false, minimum = 0)]
    last_event_id: Option<String>,
    /// From `POST /orders/{order_id}/watch-ticket`: says who asks, in place of headers
    #[param(nullable = false)]
    #[expect(dead_code, reason = "who asks is known before")]
    ticket: Option<String>,
}

/// What happens to an order from now on, as server-sent events
///
/// Each event is a line of the history; `id` is its version. After a final state the stream ends.
#[utoipa::path(
    get, path = "/orders/{order_id}/watch", tag = "orders",
    params(
        ("order_id" = Uuid, Path),
        ("Last-Event-ID" = Option<i64>, Header, nullable = false, minimum = 0, description = "Begin behind this version"),
        Since,
    ),
    responses(
        (status = 200, description = "Events", body = openapi::WatchEvent, content_type = "text/event-stream"),
        (status = 204, description = "There is nothing more to come"),
        openapi::Malformed, openapi::NotFound, openapi::BadQuery, openapi::Refused,
    )
)]
pub(super) async fn watch(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    path: Result<Path<String>, PathRejection>,
    query::Asked(query): query::Asked<Since>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    // The header comes from a client that has come back, to the same URL as before.
    let last = headers.get("last-event-id").map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    let known = |text: Option<String>, name: &str| text.map(|text| version(&text, name)).transpose();
    let (last, asked) = (known(last, "the header Last-Event-ID ")?, known(query.last_event_id, "")?);
    let last = last.or(asked);
    let order = visible_order(&app, &caller, path).await?;
    if last.is_some_and(|last| last >= order.version) && app.watchers.is_final(&order.lifecycle, &order.status) {
        // To an EventSource this means: do not come back.
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    // By default from the last thing that happened, which says where it is now.
    let watch = app.watchers.register(order.order_id, last.unwrap_or(order.version - 1))?;
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-cache"),
        // nginx would otherwise keep the events until it has a buffer full of them.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    Ok((headers, Body::from_stream(events(watch))).into_response())
}

/// What lets a page in a browser watch an order for its caller.
#[derive(Serialize, ToSchema)]
#[schema(as = WatchTicket)]
struct TicketAnswer {
    ticket: String,
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = openapi::Time)]
    expires_at: OffsetDateTime,
}

/// A ticket with which a page in a browser may watch an order: an `EventSource` sends no headers
///
/// It goes into the URL as `?ticket=`, is good at any replica, for this order alone, and for ten minutes: so long the
/// `EventSource` comes back by itself when it has lost its connection. Who comes back later is told 401.
#[utoipa::path(
    post, path = "/orders/{order_id}/watch-ticket", tag = "orders",
    params(("order_id" = Uuid, Path)),
    responses(
        (status = 200, description = "The ticket", body = TicketAnswer),
        openapi::Malformed, openapi::NotFound, openapi::Refused,
    )
)]
pub(super) async fn ticket(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Response, Problem> {
    let order = visible_order(&app, &caller, path).await?;
    let Ticket { text, expires_at } = app.tickets.issue(order.order_id, &caller).await?;
    Ok(json(&TicketAnswer { ticket: text, expires_at }).into_response())
}

fn version(text: &str, name: &str) -> Result<i64, Problem> {
    let version = text.trim().parse().ok().filter(|version: &i64| *version >= 0);
    version.ok_or_else(|| {
        let reason =
            format!("{name}must be the id of an event, as it was sent: a version of the order, or 0 for all of them");
        Problem::Invalid(vec![Violation::new("/last_event_id", reason)])
    })
}

fn events(watch: Watch) -> impl futures_util::Stream<Item = Result<Bytes, Infallible>> {
    stream::unfold((watch, Some(GREETING)), |(mut watch, greeting)| async move {
        let next = match greeting {
            Some(greeting) => greeting,
            None => match timeout(HEARTBEAT, watch.next()).await {
                Ok(event) => event?,
                Err(_) => SIGN_OF_LIFE,
            },
        };
        Some((Ok(next), (watch, None)))
    })
}
