//! Reading orders, their history, and what became of a request.

use axum::{
    Extension,
    extract::{Path, State, rejection::PathRejection},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use shared::{message::AckStatus, order::Violation};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::{
    App,
    conditions::{NoTags, Tags},
    openapi, query,
};
use crate::{
    error::Problem,
    identity::Caller,
    orders::Orders,
    store::read::{self, HistoryRow, Order},
};

/// One order
#[utoipa::path(
    get, path = "/orders/{order_id}", tag = "orders",
    params(
        ("order_id" = Uuid, Path),
        ("If-None-Match" = Option<String>, Header, description = "The `ETag` that the caller has already"),
    ),
    responses(
        (status = 200, description = "The order", body = Order, headers(("ETag" = String))),
        (status = 304, description = "The caller has it already", headers(("ETag" = String))),
        openapi::Malformed, openapi::NotFound, openapi::Refused,
    )
)]
pub(super) async fn order(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    path: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    Ok(render(&find(&app, &caller, &text(path)?).await?, &headers))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct ByExternal {
    /// Whose order it is; by default the caller's
    #[param(nullable = false, min_length = 1)]
    user_id: Option<String>,
}

/// The order that has the marketplace's own id
#[utoipa::path(
    get, path = "/orders/by-external/{external_id}", tag = "orders",
    params(
        ("external_id" = String, Path),
        ByExternal,
        ("If-None-Match" = Option<String>, Header, description = "The `ETag` that the caller has already"),
    ),
    responses(
        (status = 200, description = "The order", body = Order, headers(("ETag" = String))),
        (status = 304, description = "The caller has it already", headers(("ETag" = String))),
        openapi::Malformed, openapi::NotFound, openapi::BadQuery, openapi::Refused,
    )
)]
pub(super) async fn by_external(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    path: Result<Path<String>, PathRejection>,
    query::Asked(query): query::Asked<ByExternal>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let external_id = text(path)?;
    Ok(render(&find_by_external(&app, &caller, query.user_id.as_deref(), &external_id).await?, &headers))
}

/// This user's order of this external id, if the caller may see it; by default the caller's own.
pub(crate) async fn find_by_external(
    app: &App,
    caller: &Caller,
    user_id: Option<&str>,
    external_id: &str,
) -> Result<Order, Problem> {
    let Some(user_id) = user_id.or(caller.user()).filter(|user_id| !user_id.is_empty()) else {
        return Err(Problem::Invalid(vec![Violation::new("/user_id", "is missing: whose order is it? Give user_id")]));
    };
    if external_id.contains('\0') || user_id.contains('\0') || !caller.sees(user_id) {
        return Err(Problem::UnknownOrder);
    }
    read::order_by_external(&app.orders.db, user_id, external_id).await?.ok_or(Problem::UnknownOrder)
}

/// All that happened to an order
#[utoipa::path(
    get, path = "/orders/{order_id}/history", tag = "orders",
    params(("order_id" = Uuid, Path)),
    responses(
        (status = 200, description = "Its versions, from 1 without a gap, and what was ignored", body = Vec<HistoryRow>),
        openapi::Malformed, openapi::NotFound, openapi::Refused,
    )
)]
pub(super) async fn history(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Response, Problem> {
    let order = visible_order(&app, &caller, path).await?;
    Ok(json(&read::history(&app.orders.db, order.order_id).await?).into_response())
}

#[derive(Serialize, ToSchema)]
#[schema(as = RequestState)]
struct Request {
    correlation_id: Uuid,
    order_id: Uuid,
    #[schema(pattern = "^(pending|done|refused)$")]
    state: &'static str,
    version: i64,
    order_status: String,
    order_version: i64,
    error: Option<String>,
    superseded_by: Option<i64>,
}

/// What became of a request; any replica knows
#[utoipa::path(
    get, path = "/orders/{order_id}/requests/{correlation_id}", tag = "orders",
    params(("order_id" = Uuid, Path), ("correlation_id" = Uuid, Path)),
    responses(
        (status = 200, description = "Whether it is handled, and what came of it", body = Request),
        openapi::Malformed, openapi::NotFound, openapi::Refused,
    )
)]
pub(super) async fn request(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    path: Result<Path<(String, String)>, PathRejection>,
) -> Result<Response, Problem> {
    let Path((order_id, correlation_id)) = path.map_err(|error| Problem::Malformed(error.body_text()))?;
    let correlation_id = Uuid::try_parse(&correlation_id)
        .map_err(|_| Problem::Malformed("the correlation id is not a UUID".to_owned()))?;
    let order = visible_order(&app, &caller, Ok(Path(order_id))).await?;
    let found = read::request(&app.orders.db, order.order_id, correlation_id).await?;
    let found = found.ok_or(Problem::UnknownRequest)?;
    let pending = Request {
        correlation_id,
        order_id: order.order_id,
        state: if found.ignored { "done" } else { "pending" },
        version: found.version,
        order_status: found.status,
        order_version: found.version,
        error: None,
        superseded_by: None,
    };
    let request = match found.answer {
        None => pending,
        Some(answer) => Request {
            state: if answer.status == AckStatus::Rejected { "refused" } else { "done" },
            order_status: answer.order_status,
            order_version: answer.order_version,
            error: answer.error,
            superseded_by: answer.superseded_by,
            ..pending
        },
    };
    Ok(json(&request).into_response())
}

/// The order, if there is one and the caller may see it.
pub(super) async fn visible_order(
    app: &App,
    caller: &Caller,
    path: Result<Path<String>, PathRejection>,
) -> Result<Order, Problem> {
    seen(caller, app.orders.order(order_id(&text(path)?)?).await?)
}

/// The order of this id, if there is one and the caller may see it; perhaps as it was kept a moment
/// ago.
pub(crate) async fn find(app: &App, caller: &Caller, order_id: &str) -> Result<Order, Problem> {
    let order_id = self::order_id(order_id)?;
    let Orders { cache, db, .. } = &app.orders;
    seen(caller, read::order_kept(cache, db, order_id).await?)
}

fn seen(caller: &Caller, order: Option<Order>) -> Result<Order, Problem> {
    order.filter(|order| caller.sees(&order.user_id)).ok_or(Problem::UnknownOrder)
}

pub(super) fn text(path: Result<Path<String>, PathRejection>) -> Result<String, Problem> {
    path.map(|Path(text)| text).map_err(|error| Problem::Malformed(error.body_text()))
}

fn order_id(text: &str) -> Result<Uuid, Problem> {
    Uuid::try_parse(text).map_err(|_| {
        let reason = "the order id is not a UUID; by the marketplace's own id an order is at \
                      /orders/by-external/{external_id}?user_id=";
        Problem::Malformed(reason.to_owned())
    })
}

fn render(order: &Order, headers: &HeaderMap) -> Response {
    let etag = etag(order.version);
    if is_known(headers, order.version) {
        return (StatusCode::NOT_MODIFIED, [(header::ETAG, etag)]).into_response();
    }
    ([(header::ETAG, etag)], json(order)).into_response()
}

/// Does the caller have it already? A list that makes no sense says nothing.
fn is_known(headers: &HeaderMap, version: i64) -> bool {
    match Tags::of(headers, header::IF_NONE_MATCH) {
        Ok(Some(Tags::Any)) => true,
        Ok(Some(Tags::Versions(versions))) => versions.contains(&version),
        Ok(None) | Err(NoTags) => false,
    }
}

/// A strong entity tag (RFC 9110, section 8.8.3).
pub(crate) fn etag(version: i64) -> HeaderValue {
    HeaderValue::try_from(format!("\"{version}\"")).unwrap_or(HeaderValue::from_static("\"\""))
}

pub(super) fn json<T: Serialize>(value: &T) -> impl IntoResponse + use<T> {
    // Our own types always serialize.
    ([(header::CONTENT_TYPE, "application/json")], serde_json::to_string(value).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_caller_has_already_is_known_by_its_version() {
        let known = |values: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::IF_NONE_MATCH, HeaderValue::from_static(value));
            }
            is_known(&headers, 7)
        };
        for values in [&["\"7\""][..], &["W/\"7\""], &["*"], &["\"6\" , W/\"7\""], &["\"6\"", "\"7\""], &["\"7-gzip\""]]
        {
            assert!(known(values), "{values:?}");
        }
        for values in [&[][..], &["\"6\""], &["7"], &["\"77\""], &["w/\"7\""], &[""]] {
            assert!(!known(values), "{values:?}");
        }
    }
}
