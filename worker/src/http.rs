//! For those who run the worker: is it alive, can it work, what has it done.

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use metrics_exporter_prometheus::PrometheusHandle;
use shared::db::Db;
use tokio_util::sync::CancellationToken;

#[derive(Clone)]
pub(crate) struct App {
    pub db: Db,
    pub metrics: PrometheusHandle,
    pub started: CancellationToken,
    pub leaving: CancellationToken,
}

pub(crate) fn router(app: App) -> Router {
    Router::new()
        .route("/health", get(async || json(StatusCode::OK, r#"{"status":"ok"}"#)))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .with_state(app)
}

async fn ready(State(app): State<App>) -> Response {
    let away = |detail: &str| {
        let body = format!(
            r#"{{"type":"urn:orderstream:problem:unavailable","title":"Not now","status":503,"detail":"{detail}"}}"#
        );
        json(StatusCode::SERVICE_UNAVAILABLE, &body)
    };
    if app.leaving.is_cancelled() {
        return away("shutting down");
    }
    if !app.started.is_cancelled() {
        return away("starting");
    }
    match app.db.is_writable().await {
        Ok(true) => json(StatusCode::OK, r#"{"status":"ready"}"#),
        Ok(false) => away("the database is read-only"),
        Err(_) => away("the database is away"),
    }
}

async fn metrics(State(app): State<App>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], app.metrics.render()).into_response()
}

fn json(status: StatusCode, body: &str) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], body.to_owned()).into_response()
}
