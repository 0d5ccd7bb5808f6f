//! For those who run the service: is it alive, may it get requests, what has it done.

use axum::{
    extract::State,
    http::header,
    response::{IntoResponse, Response},
};
use utoipa::ToSchema;

use super::{App, openapi::ProblemDetails};
use crate::error::Problem;

/// Is the process alive?
///
/// Query parameters are passed over, here and at /ready and /metrics: some load balancers add their own.
#[utoipa::path(
    get, path = "/health", tag = "operation", security(()),
    responses((status = 200, description = "It is", body = Wellbeing))
)]
pub(super) async fn health() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], r#"{"status":"ok"}"#).into_response()
}

/// `ok`, or `ready`.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes what is sent as text")]
struct Wellbeing {
    status: String,
}

/// Can this process store an order? Kafka may be away: the outbox waits for it
#[utoipa::path(
    get, path = "/ready", tag = "operation", security(()),
    responses(
        (status = 200, description = "It can", body = Wellbeing),
        (status = 503, description = "It cannot now", body = ProblemDetails, content_type = "application/problem+json"),
    )
)]
pub(super) async fn ready(State(app): State<App>) -> Response {
    check(&app).await.unwrap_or_else(Problem::render)
}

async fn check(app: &App) -> Result<Response, Problem> {
    if app.leaving.is_cancelled() {
        return Err(Problem::Unavailable("shutting down"));
    }
    match app.orders.db.is_writable().await {
        Ok(true) if app.started.is_cancelled() => {
            Ok(([(header::CONTENT_TYPE, "application/json")], r#"{"status":"ready"}"#).into_response())
        }
        Ok(true) => Err(Problem::Unavailable("starting")),
        Ok(false) => Err(Problem::Unavailable("the database is read-only")),
        Err(error) => Err(error.into()),
    }
}

/// What the process has done (Prometheus)
#[utoipa::path(
    get, path = "/metrics", tag = "operation", security(()),
    responses((status = 200, description = "Metrics", body = String, content_type = "text/plain"))
)]
pub(super) async fn metrics(State(app): State<App>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], app.metrics.render()).into_response()
}
