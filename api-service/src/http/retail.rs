//! The routes under `/api`, in the words and the envelope of seed 002's order service. What they do
//! is what the others do; here it is read and said otherwise.

use axum::{
    Extension,
    extract::{Path, Request, State, rejection::PathRejection},
    http::{HeaderMap, HeaderName, HeaderValue, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;
use shared::{
    cache::Key,
    money::{Money, Price},
    order::{Source, Violation, parse_items, total},
};
use time::OffsetDateTime;
use tokio::time::Instant;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::{
    App,
    lists::Check,
    openapi::{self, Amount, RetailOrderRequest, Time},
    orders::{answer_with, check_content_type, conditions, read_body},
    prefer::PREFERENCE_APPLIED,
    query,
    reads::{etag, find, json, text},
    status,
};
use crate::{
    error::Problem,
    identity::Caller,
    orders::{Done, Operation, Progress},
    prices::Prices,
    request::Defaults,
    store::{
        pages::{self, Filter, Page},
        read::Order,
    },
    unpriced,
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// A longer one is somebody's mistake.
const MAX_REQUEST_ID: usize = 256;
const PAGE_SIZE: i64 = 10;
const MAX_PAGE_SIZE: i64 = 100;

/// What is special here.
pub(crate) struct Retail {
    defaults: Defaults,
    prices: Option<Prices>,
}

impl Retail {
    pub(crate) fn new(defaults: &Defaults, prices: Option<Prices>) -> Self {
        let lifecycle = defaults.lifecycles.find("retail").unwrap_or(defaults.lifecycle);
        Self { defaults: Defaults { lifecycle, ..defaults.clone() }, prices }
    }
}

/// Where all of this is.
pub(super) const PREFIX: &str = "/api";

pub(super) fn router() -> OpenApiRouter<App> {
    OpenApiRouter::new()
        .routes(routes!(create, list))
        .routes(routes!(order))
        .routes(routes!(set_status))
        .routes(routes!(cancel))
        .routes(routes!(of_user))
}

/// In what an answer is sent: every refusal in this API's words, and the request's own id.
pub(super) struct Envelope {
    request_id: Option<HeaderValue>,
}

impl Envelope {
    /// The one for this request, if it is for these routes.
    pub(super) fn of(request: &Request) -> Option<Self> {
        let below = request.uri().path().strip_prefix(PREFIX)?;
        let request_id = request.headers().get(REQUEST_ID).filter(|id| id.len() <= MAX_REQUEST_ID).cloned();
        (below.is_empty() || below.starts_with('/')).then_some(Self { request_id })
    }

    pub(super) fn around(self, mut response: Response) -> Response {
        if let Some(problem) = response.extensions_mut().remove::<Problem>() {
            let mut body = problem.members();
            body.insert("status".into(), "error".into());
            body.insert("message".into(), problem.sentence().into());
            let (mut parts, _) = response.into_parts();
            parts.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
            // It was the problem's.
            parts.headers.remove(header::CONTENT_LENGTH);
            response = Response::from_parts(parts, Value::Object(body).to_string().into());
        }
        if let Some(id) = self.request_id {
            response.headers_mut().insert(REQUEST_ID, id);
        }
        response
    }
}

#[derive(Serialize, ToSchema)]
struct Success<T> {
    #[schema(pattern = "^success$")]
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<T>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pagination: Option<Pagination>,
}

impl<T> Success<T> {
    fn saying(message: &'static str) -> Self {
        Self { status: "success", message: Some(message), data: None, pagination: None }
    }

    fn of(data: T) -> Self {
        Self { status: "success", message: None, data: Some(data), pagination: None }
    }
}

/// Create an order
#[utoipa::path(
    post, path = "/orders", tag = "retail",
    params(openapi::Conditions),
    request_body(content = RetailOrderRequest),
    responses(
        (status = 201, description = "Created", body = Success<RetailOrder>,
            headers(("Location" = String), ("ETag" = String))),
        (status = 200, description = "Changed, deleted, or created before (and perhaps deleted since)", body = Success<RetailOrder>,
            headers(("ETag" = String))),
        (status = 202, description = "Stored, and not yet handled by the worker", body = Success<RetailOrder>,
            headers(("Location" = String), ("ETag" = String), ("Retry-After" = String))),
        openapi::RetailBadBody, openapi::RetailBadChange, openapi::RetailMalformed, openapi::RetailNotFound, openapi::RetailRefused,
    )
)]
async fn create(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, Problem> {
    let arrived = Instant::now();
    let (parts, body) = request.into_parts();
    check_content_type(&parts.headers)?;
    let body = read_body(&parts.headers, body, app.max_body_bytes, &app.body_room).await?;
    let Retail { defaults, prices } = &app.retail;
    let upsert = unpriced::parse(&body.bytes, &caller, defaults, prices.as_ref()).await?;
    let (conditions, applied) = conditions(app.limits, &caller, &parts.headers, &upsert, &body.bytes, arrived)?;
    drop(body);
    let done = app.orders.submit(upsert, conditions).await?;
    let message = match (done.progress, done.operation) {
        (Progress::Pending, _) => "Order accepted; it is being processed",
        (_, Operation::Created) => "Order created successfully",
        (_, Operation::Updated) => "Order updated successfully",
        (Progress::Repeated, Operation::Deleted) => "Order was deleted, and is not created again by the same request",
        (_, Operation::Deleted) => "Order deleted successfully",
        (_, Operation::Moved) => "Order status updated successfully",
    };
    let success = Success { data: Some(shown(&app, &done).await), ..Success::saying(message) };
    let mut response = answer_with(&done, "/api", json(&success));
    if let Some(applied) = applied {
        response.headers_mut().insert(PREFERENCE_APPLIED, applied);
    }
    Ok(response)
}

/// The order as it is stored. It is stored, so that not being able to read it is no failure: then
/// it is what we know.
async fn shown(app: &App, done: &Done) -> Data {
    let short = || Short {
        id: done.order_id,
        status: done.state.status.clone(),
        total_amount: done.state.amount,
        currency: done.state.currency.clone(),
    };
    match app.orders.order(done.order_id).await {
        Ok(Some(order)) => Data::Whole(Box::new(order.into())),
        Ok(None) => Data::Short(short()),
        Err(error) => {
            tracing::warn!(order.id = %done.order_id, error = error.chain(), "reading what was stored");
            Data::Short(short())
        }
    }
}

/// One order
#[utoipa::path(
    get, path = "/orders/{order_id}", tag = "retail",
    params(("order_id" = Uuid, Path)),
    responses(
        (status = 200, description = "The order", body = Success<RetailOrder>, headers(("ETag" = String))),
        openapi::RetailMalformed, openapi::RetailNotFound, openapi::RetailRefused,
    )
)]
async fn order(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Response, Problem> {
    let order = find(&app, &caller, &text(path)?).await?;
    let tag = [(header::ETAG, etag(order.version))];
    Ok((tag, json(&Success::of(Shown::from(order)))).into_response())
}

/// Put an order in another state, where its lifecycle allows that
#[utoipa::path(
    patch, path = "/orders/{order_id}/status", tag = "retail",
    params(("order_id" = String, Path), openapi::Moves),
    request_body = status::NewStatus,
    responses(
        (status = 200, description = "It is in that state", body = Success<RetailOrder>, headers(("ETag" = String))),
        openapi::RetailBadBody, openapi::RetailBadChange, openapi::RetailNotAllowed, openapi::RetailMalformed, openapi::RetailNotFound, openapi::RetailRefused,
    )
)]
async fn set_status(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    path: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<Response, Problem> {
    let (_, done) = status::set_status(&app, &caller, path, request).await?;
    Ok(moved(&done, "Order status updated successfully"))
}

/// Cancel an order
#[utoipa::path(
    post, path = "/orders/{order_id}/cancel", tag = "retail",
    params(("order_id" = String, Path), openapi::Moves),
    responses(
        (status = 200, description = "It is cancelled", body = Success<RetailOrder>, headers(("ETag" = String))),
        openapi::RetailBadChange, openapi::RetailMalformed, openapi::RetailNotFound, openapi::RetailRefused,
    )
)]
async fn cancel(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    path: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let (_, done) = status::cancel_order(&app, &caller, path, &headers).await?;
    Ok(moved(&done, "Order cancelled successfully"))
}

fn moved(done: &Done, message: &'static str) -> Response {
    status::answer_with(done, json(&Success::<()>::saying(message)))
}

/// Orders, newest first, by pages
#[utoipa::path(
    get, path = "/orders", tag = "retail",
    params(OfAll, Asked),
    responses(
        (status = 200, description = "A page", body = Success<Vec<RetailOrder>>),
        openapi::RetailMalformed, openapi::RetailNotFound, openapi::RetailBadQuery, openapi::RetailRefused,
    )
)]
async fn list(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    query::Asked(OfAll { user_id }): query::Asked<OfAll>,
    query::Asked(asked): query::Asked<Asked>,
) -> Result<Response, Problem> {
    let (turned, filter) = Turned::to(user_id, asked)?;
    if filter.user_id.as_deref().is_some_and(|user_id| !caller.sees(user_id)) {
        return Err(Problem::UnknownOrder);
    }
    let user_id = filter.user_id.or_else(|| caller.only().map(ToOwned::to_owned));
    page(&app, turned, Filter { user_id, ..filter }).await
}

/// Orders of one user, newest first, by pages
#[utoipa::path(
    get, path = "/users/{user_id}/orders", tag = "retail",
    params(("user_id" = String, Path), Asked),
    responses(
        (status = 200, description = "A page", body = Success<Vec<RetailOrder>>),
        openapi::RetailMalformed, openapi::RetailNotFound, openapi::RetailBadQuery, openapi::RetailRefused,
    )
)]
async fn of_user(
    State(app): State<App>,
    Extension(caller): Extension<Caller>,
    path: Result<Path<String>, PathRejection>,
    query::Asked(asked): query::Asked<Asked>,
) -> Result<Response, Problem> {
    let user_id = text(path)?;
    if !caller.sees(&user_id) || user_id.contains('\0') {
        return Err(Problem::UnknownOrder);
    }
    let (turned, filter) = Turned::to(Some(user_id), asked)?;
    page(&app, turned, filter).await
}

async fn page(app: &App, turned: Turned, filter: Filter) -> Result<Response, Problem> {
    // PostgreSQL's text cannot hold it, so no order has it.
    if [&filter.user_id, &filter.status].into_iter().flatten().any(|text| text.contains('\0')) {
        return Ok(turned.render(Page { orders: Vec::new(), total: 0 }));
    }
    let page = async { pages::find(&app.orders.db, &filter, turned.size, turned.offset()).await.map(Some) };
    let page = match (&filter, turned) {
        // What is asked for most, and therefore kept.
        (Filter { user_id: Some(user_id), status: None }, Turned::FIRST) => {
            let is_theirs = |page: &Page| page.orders.iter().all(|order| order.user_id == *user_id);
            app.orders.cache.through(Key::Page(user_id), is_theirs, page).await?
        }
        _ => page.await?,
    };
    Ok(turned.render(page.ok_or(Problem::Internal)?))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct OfAll {
    /// Those of one user
    #[param(nullable = false, min_length = 1)]
    user_id: Option<String>,
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct Asked {
    #[param(value_type = Option<u32>, minimum = 1, default = 1)]
    page: Option<String>,
    #[param(value_type = Option<u32>, minimum = 1, maximum = 100, default = 10)]
    page_size: Option<String>,
    /// Those in one state
    #[param(nullable = false, min_length = 1)]
    status: Option<String>,
}

/// Which page is turned to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Turned {
    page: i64,
    size: i64,
}

impl Turned {
    const FIRST: Self = Self { page: 1, size: PAGE_SIZE };

    /// The page, and of which orders.
    fn to(user_id: Option<String>, asked: Asked) -> Result<(Self, Filter), Problem> {
        let number = |most: i64| {
            move |text: String| match text.parse() {
                Ok(number) if (1..=most).contains(&number) => Ok(number),
                _ if most == i64::MAX => Err("must be a whole number from 1 or more".to_owned()),
                _ => Err(format!("must be a whole number from 1 to {most}")),
            }
        };
        let mut check = Check(Vec::new());
        let page = check.read("page", asked.page, number(i64::MAX)).unwrap_or(1);
        let size = check.read("page_size", asked.page_size, number(MAX_PAGE_SIZE)).unwrap_or(PAGE_SIZE);
        let filter =
            Filter { user_id: check.read("user_id", user_id, Ok), status: check.read("status", asked.status, Ok) };
        let (Check(mut violations), depth) = (check, filter.depth());
        if page.saturating_mul(size) > depth {
            let reason =
                format!("goes beyond the newest {depth} orders; GET /orders goes on from there, by its cursor");
            violations.push(Violation::new("/page", reason));
        }
        if violations.is_empty() { Ok((Self { page, size }, filter)) } else { Err(Problem::Invalid(violations)) }
    }

    fn offset(self) -> i64 {
        (self.page - 1) * self.size
    }

    fn render(self, Page { orders, total }: Page) -> Response {
        let total_pages = (total + self.size - 1) / self.size;
        let pagination = Pagination { page: self.page, page_size: self.size, total, total_pages };
        let orders: Vec<Shown> = orders.into_iter().map(Shown::from).collect();
        json(&Success { pagination: Some(pagination), ..Success::of(orders) }).into_response()
    }
}

#[derive(Serialize, ToSchema)]
struct Pagination {
    page: i64,
    page_size: i64,
    total: i64,
    total_pages: i64,
}

/// Of an order that cannot be read just now.
#[derive(Serialize)]
struct Short {
    id: Uuid,
    status: String,
    total_amount: Option<Money>,
    currency: Option<String>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Data {
    Whole(Box<Shown>),
    Short(Short),
}

/// An order as it reads here.
struct Shown(Order);

impl From<Order> for Shown {
    fn from(order: Order) -> Self {
        Self(order)
    }
}

#[derive(Serialize, ToSchema)]
#[schema(as = RetailItem)]
struct ShownItem<'a> {
    /// Made of the order's id and the item's place in it.
    id: Uuid,
    product_id: &'a str,
    quantity: u32,
    #[schema(value_type = Amount)]
    unit_price: Price,
    #[schema(value_type = Option<Amount>)]
    subtotal: Option<Price>,
}

#[derive(Serialize, ToSchema)]
struct RetailOrder<'a> {
    id: Uuid,
    user_id: &'a str,
    status: &'a str,
    #[schema(value_type = Option<Amount>)]
    total_amount: Option<Money>,
    currency: Option<&'a str>,
    shipping_address: Option<&'a str>,
    billing_address: Option<&'a str>,
    notes: Option<&'a str>,
    order_items: Vec<ShownItem<'a>>,
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = Time)]
    created_at: OffsetDateTime,
    #[serde(with = "time::serde::rfc3339")]
    #[schema(value_type = Time)]
    updated_at: OffsetDateTime,
}

impl Serialize for Shown {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self(order) = self;
        // What cannot be read as items was refused, and is none of this API's making.
        let items = order.items.as_deref().and_then(|raw| parse_items(raw, "/items", Source::Payload).ok());
        let items = items.unwrap_or_default();
        let shown = items.iter().enumerate().map(|(index, item)| ShownItem {
            id: Uuid::new_v5(&order.order_id, index.to_string().as_bytes()),
            product_id: &item.product_id,
            quantity: item.quantity,
            unit_price: item.unit_price,
            subtotal: item.unit_price.times(item.quantity),
        });
        RetailOrder {
            id: order.order_id,
            user_id: &order.user_id,
            status: &order.status,
            // The worker computes it just so; until then it is not stored.
            total_amount: order.amount.or_else(|| if items.is_empty() { None } else { total(&items) }),
            currency: order.currency.as_deref(),
            shipping_address: order.shipping_address.as_deref(),
            billing_address: order.billing_address.as_deref(),
            notes: order.notes.as_deref(),
            order_items: shown.collect(),
            created_at: order.created_at,
            updated_at: order.updated_at,
        }
        .serialize(serializer)
    }
}

#[cfg(test)]
mod tests {
    use axum::extract::Query;

    use super::*;

    fn turned(query: &str) -> Result<Turned, Vec<String>> {
        let uri = format!("/?{query}").parse().unwrap();
        let (Query(OfAll { user_id }), Query(asked)) =
            (Query::try_from_uri(&uri).unwrap(), Query::try_from_uri(&uri).unwrap());
        Turned::to(user_id, asked).map(|(turned, _)| turned).map_err(|problem| match problem {
            Problem::Invalid(violations) => violations.into_iter().map(|v| v.pointer).collect(),
            other => panic!("{other:?}"),
        })
    }

    #[test]
    fn pages_are_of_ten_and_go_so_deep() {
        let refused = |pointer: &str| Err(vec![pointer.to_owned()]);
        assert_eq!(turned(""), Ok(Turned { page: 1, size: 10 }));
        assert_eq!(turned("page=1000&status=new").unwrap().offset(), 9_990);
        assert_eq!(turned("page=1001"), refused("/page"));
        assert_eq!(turned("page=10000&user_id=u").unwrap().offset(), 99_990);
        assert_eq!(turned("page=10001&user_id=u"), refused("/page"));
        assert_eq!(turned("page_size=100").unwrap().offset(), 0);
        assert_eq!(turned(&format!("page={}&page_size=100", i64::MAX)), refused("/page"));
        for bad in ["0", "-1", "1.5", "x", "", "9223372036854775808"] {
            assert_eq!(turned(&format!("page={bad}")), refused("/page"), "{bad}");
            assert_eq!(turned(&format!("page_size={bad}")), refused("/page_size"), "{bad}");
        }
        assert_eq!(turned("page_size=101"), refused("/page_size"));
        assert_eq!(turned("status=&user_id="), Err(vec!["/user_id".to_owned(), "/status".to_owned()]));
    }
}
