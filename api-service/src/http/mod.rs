//! The HTTP API: routes, limits, and what is the same for every request.

pub(crate) mod admin;
pub(crate) mod conditions;
pub(crate) mod headers;
mod lists;
mod operations;
pub(crate) mod orders;
pub(crate) mod prefer;
pub(crate) mod reads;
mod retail;
mod status;
mod watch;

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{Request, State},
    http::{Extensions, HeaderMap},
    middleware::{Next, from_fn, from_fn_with_state},
    response::{IntoResponse as _, Response},
    routing::{get, post, put},
};
use metrics_exporter_prometheus::PrometheusHandle;
use shared::server::Peer;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;

use crate::{
    error::Problem,
    identity::{Caller, Identity},
    orders::{Orders, WaitLimits},
    rate::{RateLimiter, Verdict},
    request::Defaults,
    watch::Watchers,
};

use headers::Origins;
pub(crate) use retail::Retail;

/// A body that has not arrived by then is not waited for.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// What the handlers need; cloned for each request, so it is one pointer.
pub(crate) type App = Arc<AppState>;

pub(crate) struct AppState {
    pub orders: Orders,
    pub identity: Identity,
    pub watchers: Watchers,
    pub defaults: Defaults,
    pub retail: Retail,
    /// How often a caller may ask, if that matters.
    pub limiter: Option<RateLimiter>,
    /// Whose pages may call.
    pub origins: Origins,
    pub limits: WaitLimits,
    pub max_body_bytes: usize,
    /// KiB that are left for bodies being read.
    pub body_room: Arc<Semaphore>,
    pub metrics: PrometheusHandle,
    /// Ready, unless something is away.
    pub started: CancellationToken,
    /// Not ready any more.
    pub leaving: CancellationToken,
}

pub(crate) fn router(app: App) -> Router {
    let cors = headers::cors(&app.origins);
    let router = Router::new()
        .route("/orders", post(orders::submit).get(lists::all))
        .route("/users/{user_id}/orders", get(lists::of_user))
        .route("/orders/by-external/{external_id}", get(reads::by_external))
        .route("/orders/{order_id}", get(reads::order))
        .route("/orders/{order_id}/history", get(reads::history))
        .route("/orders/{order_id}/watch", get(watch::watch))
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
        .nest("/api", retail::router(app.clone()))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn(headers::guard))
        .with_state(app);
    match cors {
        Some(cors) => router.layer(cors),
        None => router,
    }
}

fn panicked(panic: Box<dyn std::any::Any + Send>) -> Response {
    log_panic(&*panic);
    Problem::Internal.into_response()
}

pub(crate) fn log_panic(panic: &(dyn std::any::Any + Send)) {
    let message = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    tracing::error!(message, "a handler panicked");
}

/// What the limiter says of a request.
pub(crate) type Limited<'a> = (&'a RateLimiter, Verdict);

/// Who makes a request, and whether that one asks too often.
pub(crate) fn who_asks<'a>(
    app: &'a App,
    headers: &HeaderMap,
    extensions: &Extensions,
) -> Result<(Caller, Option<Limited<'a>>), Problem> {
    let caller = app.identity.caller(headers)?;
    let peer = extensions.get::<Peer>().map(|Peer(address)| *address);
    let verdict = app.limiter.as_ref().map(|limiter| (limiter, limiter.ask(caller.user(), peer)));
    Ok((caller, verdict))
}

/// Lets in whom we know, as often as that one may, and tells the handlers who it is.
async fn admit(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let (caller, verdict) = match who_asks(&app, request.headers(), request.extensions()) {
        Ok(known) => known,
        Err(problem) => return problem.into_response(),
    };
    let mut response = match verdict {
        Some((_, verdict)) if !verdict.allowed => {
            Problem::TooMany { retry_after: verdict.retry_after() }.into_response()
        }
        _ => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
    };
    if let Some((limiter, verdict)) = verdict {
        limiter.tell(verdict, response.headers_mut());
    }
    response
}
