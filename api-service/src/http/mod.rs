//! The HTTP API: routes, limits, and what is the same for every request.

pub(crate) mod admin;
pub(crate) mod bulk;
mod operations;
mod orders;
mod prefer;
mod reads;
mod status;

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{Request, State},
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse as _, Response},
    routing::{get, post, put},
};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;

use crate::{
    error::Problem,
    identity::Identity,
    orders::{Orders, WaitLimits},
    request::Defaults,
};

/// A body that has not arrived by then is not waited for.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// What the handlers need; cloned for each request, so it is one pointer.
pub(crate) type App = Arc<AppState>;

pub(crate) struct AppState {
    pub orders: Orders,
    pub identity: Identity,
    pub defaults: Defaults,
    pub limits: WaitLimits,
    pub max_body_bytes: usize,
    /// KiB that are left for bodies being read.
    pub body_room: Arc<Semaphore>,
    pub bulk_places: bulk::Places,
    pub metrics: PrometheusHandle,
    /// Ready, unless something is away.
    pub started: CancellationToken,
    /// Not ready any more.
    pub leaving: CancellationToken,
}

pub(crate) fn router(app: App) -> Router {
    Router::new()
        .route("/orders", post(orders::submit))
        .route("/orders/bulk", post(bulk::submit))
        .route("/orders/by-external/{external_id}", get(reads::by_external))
        .route("/orders/{order_id}", get(reads::order))
        .route("/orders/{order_id}/history", get(reads::history))
        .route("/orders/{order_id}/requests/{correlation_id}", get(reads::request))
        .route("/orders/{order_id}/status", put(status::set).patch(status::set))
        .route("/orders/{order_id}/cancel", post(status::cancel))
        // Whatever is above is for those who may; its handlers are given the caller.
        .route_layer(from_fn_with_state(app.clone(), admit))
        .route("/health", get(operations::health))
        .route("/ready", get(operations::ready))
        .route("/metrics", get(operations::metrics))
        .fallback(|| async { Problem::UnknownRoute })
        .method_not_allowed_fallback(|| async { Problem::MethodNotAllowed })
        .layer(CatchPanicLayer::custom(panicked))
        .with_state(app)
}

fn panicked(panic: Box<dyn std::any::Any + Send>) -> Response {
    let message = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    tracing::error!(message, "a handler panicked");
    Problem::Internal.into_response()
}

/// Lets in whom we know, and tells the handlers who it is.
async fn admit(State(app): State<App>, mut request: Request, next: Next) -> Response {
    match app.identity.caller(request.headers()) {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(problem) => problem.into_response(),
    }
}
