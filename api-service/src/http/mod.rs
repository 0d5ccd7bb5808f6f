//! The HTTP API: routes, limits, and what is the same for every request.

#![allow(unused_qualifications, reason = "what the macros of utoipa write")]

pub(crate) mod admin;
pub(crate) mod bulk;
pub(crate) mod conditions;
pub(crate) mod headers;
mod lists;
pub(crate) mod openapi;
mod operations;
pub(crate) mod orders;
mod pages;
pub(crate) mod prefer;
mod query;
pub(crate) mod reads;
mod retail;
mod status;
mod watch;

use std::{convert::Infallible, net::IpAddr, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::Request,
    http::{Extensions, HeaderMap},
    middleware::from_fn_with_state,
    response::{IntoResponse as _, Redirect, Response},
    routing::get,
};
use futures_util::FutureExt as _;
use metrics_exporter_prometheus::PrometheusHandle;
use shared::server::{self, Peer};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tower::{ServiceBuilder, ServiceExt as _};
use utoipa::OpenApi as _;
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::{
    error::Problem,
    front::Front,
    identity::{Caller, Identity},
    orders::{Orders, WaitLimits},
    rate::{RateLimiter, Verdict},
    request::Defaults,
    tickets::{Presented, Tickets},
    watch::Watchers,
};

use headers::{AllowedHeaders, Origins};
use openapi::Document;
pub(crate) use retail::Retail;

/// A body that has not arrived by then is not waited for.
pub(crate) const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// What the handlers need; cloned for each request, so it is one pointer.
pub(crate) type App = Arc<AppState>;

pub(crate) struct AppState {
    pub orders: Orders,
    pub identity: Identity,
    pub tickets: Tickets,
    pub watchers: Watchers,
    pub defaults: Defaults,
    pub retail: Retail,
    /// How often a caller may ask, if that matters.
    pub limiter: Option<RateLimiter>,
    /// What stands before us.
    pub front: Front,
    /// Whose pages may call.
    pub origins: Origins,
    pub allowed_headers: AllowedHeaders,
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

/// What is for everybody; for all other paths one has to be somebody.
const OPEN: [&str; 5] = ["/health", "/ready", "/metrics", "/openapi.json", "/docs"];

fn is_open(path: &str) -> bool {
    OPEN.contains(&path) || path.starts_with("/docs/")
}

/// The routes, with what every request meets around them. That is one future: as layers of the
/// router, each would be boxed and copied by itself, which took 6 µs of every order.
pub(crate) fn service(app: App) -> impl server::App {
    let cors = headers::cors(&app.origins, &app.allowed_headers);
    let (router, document) = documented();
    let parameters = Arc::new(query::Parameters::of(&document));
    let router = complete(router, &document);
    // Most requests have no query, and are spared the layer that looks at it.
    let queried = router.clone().route_layer(from_fn_with_state(parameters, query::check)).with_state(app.clone());
    let router = router.with_state(app.clone());
    let answered = tower::service_fn(move |request: Request| {
        let router = if request.uri().query().is_some() { &queried } else { &router };
        answer(app.clone(), router.clone(), request)
    });
    ServiceBuilder::new().option_layer(cors).service(answered)
}

/// The routes, and the document of those that are the API.
fn documented() -> (Router<App>, utoipa::openapi::OpenApi) {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(orders::submit, lists::all))
        .routes(routes!(bulk::submit))
        .routes(routes!(lists::of_user))
        .routes(routes!(reads::by_external))
        .routes(routes!(reads::order))
        .routes(routes!(reads::history))
        .routes(routes!(watch::watch))
        .routes(routes!(watch::ticket))
        .routes(routes!(reads::request))
        .routes(routes!(status::set))
        .routes(routes!(status::cancel))
        .routes(routes!(operations::health))
        .routes(routes!(operations::ready))
        .routes(routes!(operations::metrics))
        .nest(retail::PREFIX, retail::router())
        .split_for_parts()
}

/// With the document itself, and what is said where there is nothing.
fn complete(router: Router<App>, document: &utoipa::openapi::OpenApi) -> Router<App> {
    let document = openapi::Sent::new(document);
    router
        .route("/openapi.json", get(async move || document))
        .route("/docs", get(async || Redirect::permanent("docs/")))
        .route("/docs/", get(pages::index))
        .route("/docs/{*file}", get(pages::file))
        .fallback(|| async { Problem::UnknownRoute("/openapi.json names the routes that there are") })
        .method_not_allowed_fallback(|| async { Problem::MethodNotAllowed })
}

/// Answers whoever may ask, and says with every answer what is said with every answer.
async fn answer(app: App, router: Router, request: Request) -> Result<Response, Infallible> {
    let retail = retail::Envelope::of(&request);
    let prefix = app.front.prefix(peer(request.extensions()), request.headers());
    let response = AssertUnwindSafe(admit(app, router, request)).catch_unwind().await;
    let response = response.unwrap_or_else(|panic| {
        log_panic(&*panic);
        Problem::Internal.into_response()
    });
    let response = match retail {
        Some(envelope) => envelope.around(response),
        None => response,
    };
    let mut response = headers::guard(response);
    if let Some(prefix) = prefix {
        headers::put_before(response.headers_mut(), prefix.as_str());
    }
    Ok(response)
}

/// Lets in whom we know, as often as that one may, and tells the handlers who it is.
async fn admit(app: App, router: Router, mut request: Request) -> Response {
    let mut limited = None;
    if !is_open(request.uri().path()) {
        let caller = match Presented::in_url(request.uri()) {
            Some(ticket) => app.tickets.caller(&ticket).await,
            None => app.identity.caller(request.headers()),
        };
        let (caller, verdict) = match caller {
            Ok(caller) => limited_by(&app, caller, request.headers(), request.extensions()),
            Err(problem) => return problem.into_response(),
        };
        if let Some((limiter, verdict)) = verdict {
            if !verdict.allowed {
                let mut refused = Problem::TooMany { retry_after: verdict.retry_after() }.into_response();
                limiter.tell(verdict, refused.headers_mut());
                return refused;
            }
            limited = Some((limiter, verdict));
        }
        request.extensions_mut().insert(caller);
    }
    let Ok(mut response) = router.oneshot(request).await;
    if let Some((limiter, verdict)) = limited {
        limiter.tell(verdict, response.headers_mut());
    }
    response
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
    Ok(limited_by(app, app.identity.caller(headers)?, headers, extensions))
}

fn limited_by<'a>(
    app: &'a App,
    caller: Caller,
    headers: &HeaderMap,
    extensions: &Extensions,
) -> (Caller, Option<Limited<'a>>) {
    let verdict = app.limiter.as_ref().map(|limiter| {
        let address = peer(extensions).map(|peer| app.front.caller(peer, headers));
        (limiter, limiter.ask(caller.user(), address))
    });
    (caller, verdict)
}

fn peer(extensions: &Extensions) -> Option<IpAddr> {
    extensions.get::<Peer>().map(|Peer(address)| *address)
}
