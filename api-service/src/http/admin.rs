//! For operators, on a listener of its own: what is parked and what is stuck, and what to do about
//! it (DESIGN 6.4). On loopback it is open; elsewhere each request carries `ADMIN_TOKEN`.

use std::{net::IpAddr, sync::Arc};

use axum::{
    Router,
    extract::{Path, Request, State},
    http::{HeaderMap, Method, StatusCode, header, uri::Authority},
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::{Deserialize, Serialize};
use shared::{
    db::Db,
    lifecycle::Lifecycles,
    order::Violation,
    parked::{self, Entry, Filter, Kind, State as ParkedState},
};

use clap::Args as _;
use tower::util::MapResponseLayer;

use super::{
    headers::guard,
    query::{self, Parameters},
    reads::json,
};
use crate::error::Problem;

const DEFAULT_LIMIT: i64 = 100;

#[derive(Clone)]
pub(crate) struct Admin {
    pub db: Db,
    pub lifecycles: &'static Lifecycles,
    /// Asked for in `Authorization: Bearer …`.
    pub token: Option<Arc<str>>,
}

pub(crate) fn router(admin: Admin) -> Router {
    Router::new()
        .route("/admin/parked", get(list))
        .route("/admin/parked/{id}", get(show))
        .route("/admin/parked/redrive", post(redrive_all))
        .route("/admin/parked/discard", post(discard_all))
        .route("/admin/parked/{id}/redrive", post(redrive))
        .route("/admin/parked/{id}/discard", post(discard))
        .route("/admin/stuck", get(stuck))
        .route_layer(from_fn_with_state(Arc::new(parameters()), query::check))
        .fallback(|| async { Problem::UnknownRoute("the routes begin with /admin/parked and /admin/stuck") })
        .method_not_allowed_fallback(|| async { Problem::MethodNotAllowed })
        .layer(from_fn_with_state(admin.clone(), check_token))
        .layer(MapResponseLayer::new(guard))
        .with_state(admin)
}

/// A filter's names are those of the command line.
fn parameters() -> Parameters {
    let filter = Filter::augment_args(clap::Command::new("filter"));
    let filter: Vec<&str> = filter.get_arguments().map(|name| name.get_id().as_str()).collect();
    let of_list = [&["limit", "cursor"], filter.as_slice()].concat();
    Parameters::new(&[
        ("/admin/parked", Method::GET, &of_list),
        ("/admin/parked/redrive", Method::POST, &filter),
        ("/admin/parked/discard", Method::POST, &filter),
    ])
}

async fn check_token(State(admin): State<Admin>, request: Request, next: Next) -> Response {
    let given = request.headers().get(header::AUTHORIZATION).map(|value| value.as_bytes());
    match &admin.token {
        Some(token) if !is_same(given.and_then(|v| v.strip_prefix(b"Bearer ")).unwrap_or_default(), token) => {
            Problem::Unauthenticated("send Authorization: Bearer with ADMIN_TOKEN").into_response()
        }
        // A page in an operator's browser must not do what operators may.
        None if is_of_browser(request.headers()) => {
            Problem::Forbidden("without ADMIN_TOKEN these routes are not for pages in a browser").into_response()
        }
        // Nor one that has its own name lead here (DNS rebinding).
        None if !hosts(&request).all(is_loopback) => {
            Problem::Forbidden("without ADMIN_TOKEN these routes are reached by 127.0.0.1, [::1] or localhost alone")
                .into_response()
        }
        _ => next.run(request).await,
    }
}

fn is_of_browser(headers: &HeaderMap) -> bool {
    // A browser sends `none` for an address that its user has typed.
    headers.contains_key(header::ORIGIN) || headers.get("sec-fetch-site").is_some_and(|site| site != "none")
}

/// Whom the caller means to speak to, each time that it says so.
fn hosts(request: &Request) -> impl Iterator<Item = &str> {
    let named = request.headers().get_all(header::HOST).iter().map(|host| host.to_str().unwrap_or("?"));
    named.chain(request.uri().authority().map(Authority::as_str))
}

fn is_loopback(host: &str) -> bool {
    let Ok(host) = host.parse::<Authority>() else { return false };
    let name = host.host().trim_start_matches('[').trim_end_matches(']');
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// In a time that does not tell how much of it was right.
fn is_same(given: &[u8], token: &str) -> bool {
    let token = token.as_bytes();
    given.len() == token.len() && given.iter().zip(token).fold(0, |differences, (a, b)| differences | (a ^ b)) == 0
}

#[derive(Deserialize)]
struct Page {
    limit: Option<i64>,
    /// The `next` of the page before.
    cursor: Option<i64>,
}

#[derive(Serialize)]
struct Parked {
    parked: Vec<Entry>,
    /// For `cursor`, where there are more.
    next: Option<i64>,
}

async fn list(
    State(admin): State<Admin>,
    query::Asked(page): query::Asked<Page>,
    query::Asked(filter): query::Asked<Filter>,
) -> Result<Response, Problem> {
    let limit = page.limit.unwrap_or(DEFAULT_LIMIT);
    if !(1..=parked::MAX_LIMIT).contains(&limit) {
        let reason = format!("must be from 1 to {}", parked::MAX_LIMIT);
        return Err(Problem::Invalid(vec![Violation::new("/limit", reason)]));
    }
    let parked = parked::list(&admin.db, &filter, page.cursor.unwrap_or(0), limit).await?;
    let is_full = i64::try_from(parked.len()).is_ok_and(|len| len == limit);
    let next = parked.last().map(|last| last.id).filter(|_| is_full);
    Ok(json(&Parked { parked, next }).into_response())
}

async fn show(State(admin): State<Admin>, Path(id): Path<String>) -> Result<Response, Problem> {
    let found = parked::show(&admin.db, number(&id)?).await?;
    Ok(json(&found.ok_or(Problem::UnknownParked)?).into_response())
}

#[derive(Serialize)]
struct Count {
    count: u64,
}

async fn redrive_all(
    State(admin): State<Admin>,
    query::Asked(filter): query::Asked<Filter>,
) -> Result<Response, Problem> {
    check_names_some(&filter)?;
    Ok(json(&Count { count: parked::redrive(&admin.db, &filter).await? }).into_response())
}

async fn discard_all(
    State(admin): State<Admin>,
    query::Asked(filter): query::Asked<Filter>,
) -> Result<Response, Problem> {
    check_names_some(&filter)?;
    Ok(json(&Count { count: parked::discard(&admin.db, &filter).await? }).into_response())
}

async fn redrive(State(admin): State<Admin>, Path(id): Path<String>) -> Result<Response, Problem> {
    let filter = Filter { id: Some(number(&id)?), ..Filter::default() };
    one(&admin, &filter, parked::redrive(&admin.db, &filter).await?, |entry| {
        if entry.kind == Kind::Conflict.name() && entry.state == ParkedState::Dead.name() {
            "it contradicts the final state of its order, and would again: discard it"
        } else {
            "only dead messages are redriven"
        }
    })
    .await
}

async fn discard(State(admin): State<Admin>, Path(id): Path<String>) -> Result<Response, Problem> {
    let filter = Filter { id: Some(number(&id)?), ..Filter::default() };
    one(&admin, &filter, parked::discard(&admin.db, &filter).await?, |_| "there is nothing left to discard").await
}

async fn one(
    admin: &Admin,
    filter: &Filter,
    count: u64,
    otherwise: impl FnOnce(&Entry) -> &'static str,
) -> Result<Response, Problem> {
    let found = parked::show(&admin.db, filter.id.unwrap_or_default()).await?.ok_or(Problem::UnknownParked)?;
    if count == 0 {
        let detail = otherwise(&found.entry);
        return Err(Problem::ParkedElsewise { state: found.entry.state, detail });
    }
    Ok((StatusCode::OK, json(&found)).into_response())
}

async fn stuck(State(admin): State<Admin>) -> Result<Response, Problem> {
    Ok(json(&parked::stuck(&admin.db, admin.lifecycles).await?).into_response())
}

fn number(id: &str) -> Result<i64, Problem> {
    id.parse().map_err(|_| Problem::UnknownParked)
}

/// To mean all of them takes more than forgetting to say which.
fn check_names_some(filter: &Filter) -> Result<(), Problem> {
    if filter.is_empty() {
        let reason = "say which: ?id=, order_id=, topic=, reason=, state= or kind=";
        return Err(Problem::Invalid(vec![Violation::new("", reason)]));
    }
    Ok(())
}
