//! The API as a document (OpenAPI 3.1) at `/openapi.json`. Routes, parameters and statuses stand at the
//! handlers; what several of them share stands here.
//!
//! Bodies of orders are read by hand ([`crate::request`]), so that they are described here once more;
//! tests hold the two together.

use axum::{
    body::Bytes,
    http::header,
    response::{IntoResponse, Response},
};
use serde_json::Value;
use utoipa::{
    IntoParams, IntoResponses, Modify, OpenApi, PartialSchema, ToSchema,
    openapi::{
        KnownFormat, ObjectBuilder, OneOfBuilder, RefOr, Schema, SchemaFormat,
        schema::{AdditionalProperties, SchemaType, Type},
        security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme},
    },
};
use uuid::Uuid;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "OrderStream",
        description = "Orders, durable before they are answered, moved along their lifecycle by a worker, and \
                       answered in the same request when that is done.",
        license(name = "MIT OR Apache-2.0", identifier = "MIT OR Apache-2.0"),
    ),
    // Beside this document, whatever path a gateway has put before both.
    servers((url = ".", description = "Where this document is")),
    tags(
        (name = "orders", description = "Create, change, read and watch orders"),
        (name = "retail", description = "The same in the words of a shop's order service"),
        (name = "operation", description = "For those who run the service"),
    ),
    components(schemas(ProblemDetails, RetailError, OrderRequest)),
    security((), ("user" = []), ("token" = [])),
    modifiers(&Securities),
)]
pub(super) struct Document;

struct Securities;

impl Modify for Securities {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let components = document.components.get_or_insert_default();
        let user = ApiKeyValue::with_description(
            "X-User-Id",
            "AUTH_MODE=header: set by a gateway that knows who calls. AUTH_MODE=none: narrows to this user",
        );
        components.add_security_scheme("user", SecurityScheme::ApiKey(ApiKey::Header(user)));
        let token = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).bearer_format("JWT");
        let token = token.description(Some("AUTH_MODE=jwt: sub is the user, role its role")).build();
        components.add_security_scheme("token", SecurityScheme::Http(token));
    }
}

/// `/openapi.json`: the document as it is sent.
#[derive(Clone)]
pub(super) struct Sent(Bytes);

impl Sent {
    pub(super) fn new(document: &utoipa::openapi::OpenApi) -> Self {
        // Our own types always serialize.
        Self(document.to_json().unwrap_or_default().into())
    }
}

impl IntoResponse for Sent {
    fn into_response(self) -> Response {
        ([(header::CONTENT_TYPE, "application/json")], self.0).into_response()
    }
}

/// Money as it is told: a number with the digits that it was given.
pub(crate) struct Amount;

impl PartialSchema for Amount {
    fn schema() -> RefOr<Schema> {
        let number = ObjectBuilder::new().schema_type(Type::Number).minimum(Some(0));
        number.description(Some("Exact: at most 4 decimals, below 10^14")).examples([59.98]).into()
    }
}

impl ToSchema for Amount {}

/// Money as it is taken: a number, or a string of one.
pub(crate) struct AmountIn;

impl PartialSchema for AmountIn {
    fn schema() -> RefOr<Schema> {
        let number = ObjectBuilder::new().schema_type(Type::Number).minimum(Some(0)).exclusive_maximum(Some(1e14));
        let text =
            ObjectBuilder::new().schema_type(Type::String).pattern(Some(r"^(0|[1-9][0-9]{0,13})(\.[0-9]{1,4})?$"));
        OneOfBuilder::new().item(number).item(text).examples([Value::from("59.98")]).into()
    }
}

impl ToSchema for AmountIn {}

/// How many pieces: a whole number, or a string of one.
pub(crate) struct QuantityIn;

impl PartialSchema for QuantityIn {
    fn schema() -> RefOr<Schema> {
        let number = ObjectBuilder::new().schema_type(Type::Integer).minimum(Some(1)).maximum(Some(1_000_000));
        let number = number.description(Some("2, 2.0 and 2e0 are the same"));
        let text =
            ObjectBuilder::new().schema_type(Type::String).pattern(Some(r"^([1-9][0-9]{0,5}|1000000)(\.0{1,20})?$"));
        OneOfBuilder::new().item(number).item(text).examples([Value::from(2)]).into()
    }
}

impl ToSchema for QuantityIn {}

/// How many pieces, as a payload has it: a whole number, or a string of one; 0 where the line was cancelled.
pub(crate) struct QuantityOfPayload;

impl PartialSchema for QuantityOfPayload {
    fn schema() -> RefOr<Schema> {
        let number = ObjectBuilder::new().schema_type(Type::Integer).minimum(Some(0)).maximum(Some(1_000_000));
        OneOfBuilder::new().item(number).item(ObjectBuilder::new().schema_type(Type::String)).into()
    }
}

impl ToSchema for QuantityOfPayload {}

/// A price, as a payload has it: below 0 where something is taken off.
pub(crate) struct PriceOfPayload;

impl PartialSchema for PriceOfPayload {
    fn schema() -> RefOr<Schema> {
        OneOfBuilder::new()
            .item(ObjectBuilder::new().schema_type(Type::Number))
            .item(ObjectBuilder::new().schema_type(Type::String))
            .into()
    }
}

impl ToSchema for PriceOfPayload {}

/// An id from elsewhere: text, or a whole number.
pub(crate) struct ForeignId;

impl PartialSchema for ForeignId {
    fn schema() -> RefOr<Schema> {
        let text = ObjectBuilder::new().schema_type(Type::String).min_length(Some(1)).max_length(Some(255));
        let number = ObjectBuilder::new().schema_type(Type::Integer);
        OneOfBuilder::new().item(text.pattern(Some(r"^[^\u0000]*$"))).item(number).into()
    }
}

impl ToSchema for ForeignId {}

/// Any JSON object.
pub(crate) struct AnyObject;

impl PartialSchema for AnyObject {
    fn schema() -> RefOr<Schema> {
        let any = AdditionalProperties::FreeForm(true);
        ObjectBuilder::new().schema_type(Type::Object).additional_properties(Some(any)).into()
    }
}

impl ToSchema for AnyObject {}

/// Lines of JSON (NDJSON), which no schema describes.
pub(crate) struct Lines;

impl PartialSchema for Lines {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new().schema_type(SchemaType::AnyValue).into()
    }
}

impl ToSchema for Lines {}

/// A time (RFC 3339).
pub(crate) struct Time;

impl PartialSchema for Time {
    fn schema() -> RefOr<Schema> {
        let format = SchemaFormat::KnownFormat(KnownFormat::DateTime);
        ObjectBuilder::new().schema_type(Type::String).format(Some(format)).into()
    }
}

impl ToSchema for Time {}

/// What a client asks for: a new order, or with an `order_id` a change of one, or its deletion.
#[derive(ToSchema)]
#[schema(as = OrderRequest, title = "OrderRequest")]
#[serde(untagged)]
#[expect(dead_code, reason = "describes what is read by hand")]
pub(crate) enum OrderRequest {
    Create(NewOrder),
    Update(OrderChange),
    Delete(Deletion),
}

/// A new order, in the words of a shop's order service; all fields of the other door serve here, too.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes what is read by hand")]
pub(crate) struct RetailOrderRequest {
    #[schema(value_type = ForeignId)]
    user_id: (),
    #[schema(value_type = Vec<RetailItemIn>, min_items = 1)]
    order_items: (),
    #[schema(pattern = r"^[^\u0000]*$")]
    shipping_address: Option<String>,
    #[schema(pattern = r"^[^\u0000]*$")]
    billing_address: Option<String>,
    #[schema(pattern = r"^[^\u0000]*$")]
    notes: Option<String>,
}

/// One position of an order; without a price, that of the product service.
#[derive(ToSchema)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "describes what is read by hand")]
pub(crate) struct RetailItemIn {
    #[schema(value_type = ForeignId)]
    product_id: (),
    #[schema(value_type = QuantityIn)]
    quantity: (),
    #[schema(value_type = Option<AmountIn>)]
    unit_price: Option<()>,
}

/// A new order.
#[derive(ToSchema)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "describes what is read by hand")]
pub(crate) struct NewOrder {
    /// Whose order it is; may be left out where `X-User-Id` or a token says so.
    #[schema(value_type = ForeignId)]
    user_id: (),
    /// The marketplace's own id, unique among one user's orders: sent again, the order is not made twice, nor
    /// brought back when it is deleted.
    #[schema(value_type = Option<ForeignId>)]
    external_id: Option<()>,
    /// The deleted order that has this `external_id`, by its id: then the same content makes a new one.
    replaces: Option<Uuid>,
    /// By default `DEFAULT_LIFECYCLE`.
    lifecycle: Option<String>,
    /// What they come to must be a multiple of the currency's smallest unit (unless `AMOUNTS=exact`).
    #[schema(value_type = Option<Vec<ItemIn>>, min_items = 1)]
    items: Option<()>,
    /// When there are no items; a multiple of the currency's smallest unit.
    #[schema(value_type = Option<AmountIn>)]
    amount: Option<()>,
    /// ISO 4217; by default the payload's, else `DEFAULT_CURRENCY`.
    #[schema(pattern = "^[A-Z]{3}$")]
    currency: Option<String>,
    #[schema(pattern = r"^[^\u0000]*$")]
    shipping_address: Option<String>,
    #[schema(pattern = r"^[^\u0000]*$")]
    billing_address: Option<String>,
    #[schema(pattern = r"^[^\u0000]*$")]
    notes: Option<String>,
    /// Anything else; its `id`, `items`, `amount` and `currency` serve where the fields above are absent. A line of its
    /// `items` with quantity 0 was cancelled and counts nothing; one with a negative price is a discount; together they
    /// come to 0 or more.
    #[schema(value_type = Option<AnyObject>)]
    payload: Option<()>,
}

/// New content of an order. What is absent stays.
#[derive(ToSchema)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "describes what is read by hand")]
pub(crate) struct OrderChange {
    order_id: Uuid,
    /// If given, the order must be this user's.
    #[schema(value_type = Option<ForeignId>)]
    user_id: Option<()>,
    /// May be repeated; another one is refused.
    #[schema(value_type = Option<ForeignId>)]
    external_id: Option<()>,
    /// May be repeated; another one is refused.
    lifecycle: Option<String>,
    #[schema(value_type = Option<Vec<ItemIn>>, min_items = 1)]
    items: Option<()>,
    #[schema(value_type = Option<AmountIn>)]
    amount: Option<()>,
    #[schema(pattern = "^[A-Z]{3}$")]
    currency: Option<String>,
    #[schema(pattern = r"^[^\u0000]*$")]
    shipping_address: Option<String>,
    #[schema(pattern = r"^[^\u0000]*$")]
    billing_address: Option<String>,
    #[schema(pattern = r"^[^\u0000]*$")]
    notes: Option<String>,
    #[schema(value_type = Option<AnyObject>)]
    payload: Option<()>,
}

/// An order that is to be no more. It still reads, as `deleted`.
#[derive(ToSchema)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "describes what is read by hand")]
pub(crate) struct Deletion {
    order_id: Uuid,
    #[schema(value_type = Option<ForeignId>)]
    user_id: Option<()>,
    status: Deleted,
}

#[derive(ToSchema)]
#[serde(rename_all = "lowercase")]
#[expect(dead_code, reason = "describes what is read by hand")]
enum Deleted {
    Deleted,
}

/// One position of an order.
#[derive(ToSchema)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "describes what is read by hand")]
pub(crate) struct ItemIn {
    #[schema(value_type = ForeignId)]
    product_id: (),
    #[schema(value_type = QuantityIn)]
    quantity: (),
    #[schema(value_type = AmountIn)]
    unit_price: (),
}

/// One position of an order, as it is told: in our words, or as it was given in the payload.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes what is stored as JSON")]
pub(crate) struct Item {
    /// May be absent where the line was cancelled.
    #[schema(value_type = Option<ForeignId>)]
    product_id: Option<()>,
    #[schema(value_type = QuantityOfPayload)]
    quantity: (),
    /// May be called `price` in a payload.
    #[schema(value_type = Option<PriceOfPayload>)]
    unit_price: Option<()>,
}

/// How to do what the body asks for.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "describes what is read by hand")]
pub(super) struct Conditions {
    /// `wait=10` waits up to ten seconds for the worker, `respond-async` not at all (RFC 7240)
    #[param(rename = "Prefer", nullable = false, example = "wait=10")]
    prefer: Option<String>,
    /// The same request with the same key is done once, and told again
    #[param(rename = "Idempotency-Key", nullable = false, pattern = r"^[ -~]{1,255}$")]
    idempotency_key: Option<String>,
    /// The `ETag` of an order: it is changed only while it is still that. A tag that a proxy has made weak, or put a coding
    /// behind (`W/"2"`, `"2-gzip"`), is as good
    #[param(rename = "If-Match", nullable = false, pattern = r#"^(W/)?"[0-9]{1,18}"$"#, example = "\"2\"")]
    if_match: Option<String>,
}

/// The same where nobody waits for the worker.
#[derive(IntoParams)]
#[into_params(parameter_in = Header)]
#[expect(dead_code, reason = "describes what is read by hand")]
pub(super) struct Moves {
    /// The same request with the same key is done once, and told again
    #[param(rename = "Idempotency-Key", nullable = false, pattern = r"^[ -~]{1,255}$")]
    idempotency_key: Option<String>,
    /// The `ETag` of the order: it is moved only while it is still that. A tag that a proxy has made weak, or put a coding
    /// behind (`W/"2"`, `"2-gzip"`), is as good
    #[param(rename = "If-Match", nullable = false, pattern = r#"^(W/)?"[0-9]{1,18}"$"#, example = "\"2\"")]
    if_match: Option<String>,
}

/// One of the server-sent events of an order: a line of its history.
#[derive(ToSchema)]
#[schema(as = WatchEvent)]
#[expect(dead_code, reason = "describes what is rendered by hand")]
pub(super) struct WatchEvent {
    /// The version.
    id: String,
    /// The event's type.
    event: String,
    /// The line, as JSON.
    data: String,
}

/// A refusal (RFC 9457).
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes what is rendered by hand")]
pub(crate) struct ProblemDetails {
    /// `urn:orderstream:problem:` and its kind.
    #[serde(rename = "type")]
    #[schema(pattern = "^urn:orderstream:problem:[a-z-]+$")]
    kind: String,
    title: String,
    #[schema(minimum = 400, maximum = 599)]
    status: u16,
    detail: Option<String>,
    /// Each broken rule.
    errors: Option<Vec<Violation>>,
    order_id: Option<Uuid>,
    correlation_id: Option<Uuid>,
    order_status: Option<String>,
    order_version: Option<i64>,
    /// The states that the order could be put in instead.
    allowed: Option<Vec<String>>,
}

/// A broken rule.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes what is rendered by hand")]
pub(crate) struct Violation {
    /// Where (RFC 6901); empty for the whole.
    pointer: String,
    reason: String,
}

/// A refusal in the words of a shop's order service.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes what is rendered by hand")]
pub(crate) struct RetailError {
    #[schema(pattern = "^error$")]
    status: String,
    message: String,
    errors: Option<Vec<Violation>>,
}

macro_rules! refusals {
    ($(#[$doc:meta])* $name:ident / $retail:ident { $($(#[doc = $what:literal])* $status:literal $variant:ident,)* }) => {
        $(#[$doc])*
        #[derive(IntoResponses)]
        #[expect(dead_code, reason = "describes what is rendered by hand")]
        pub(super) enum $name {
            $($(#[doc = $what])* #[response(status = $status, content_type = "application/problem+json")] $variant(ProblemDetails),)*
        }
        $(#[$doc])*
        #[derive(IntoResponses)]
        #[expect(dead_code, reason = "describes what is rendered by hand")]
        pub(super) enum $retail {
            $($(#[doc = $what])* #[response(status = $status)] $variant(RetailError),)*
        }
    };
}

refusals! {
    /// Of whoever asks.
    Refused / RetailRefused {
        /// Nobody knows who asks
        401 Unauthenticated,
        /// Too many requests of one caller
        429 TooMany,
        /// Not now; try again
        503 Unavailable,
    }
}

refusals! {
    /// Of what makes no sense.
    Malformed / RetailMalformed {
        /// The id, the query or the body cannot be read
        400 Malformed,
    }
}

refusals! {
    /// Of what is asked for by its id, or by a user's.
    NotFound / RetailNotFound {
        /// There is none that the caller may see
        404 Unknown,
    }
}

refusals! {
    /// Of queries.
    BadQuery / RetailBadQuery {
        /// A parameter breaks a rule
        422 Invalid,
    }
}

refusals! {
    /// Of bodies.
    BadBody / RetailBadBody {
        /// The body did not arrive in time
        408 TooSlow,
        /// The body is too large
        413 TooLarge,
        /// The body is no JSON
        415 ContentType,
    }
}

refusals! {
    /// Of changes.
    BadChange / RetailBadChange {
        /// The order is deleted, or takes no such change now; or its external id, or its key, is another's
        409 Conflict,
        /// The order has changed
        412 Precondition,
        /// It breaks rules, or the worker refused it
        422 Invalid,
    }
}

refusals! {
    /// Of moves by somebody's hand.
    NotAllowed / RetailNotAllowed {
        /// Only the roles service and admin may
        403 Forbidden,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::FIELDS;

    #[test]
    fn the_fields_of_an_order_are_those_that_are_read() {
        let document = serde_json::to_value(Document::openapi()).unwrap();
        let schema = |name: &str| document["components"]["schemas"][name]["properties"].clone();
        let mut described: Vec<String> = ["NewOrder", "OrderChange", "Deletion"]
            .into_iter()
            .flat_map(|name| schema(name).as_object().unwrap_or_else(|| panic!("{name}")).clone())
            .map(|(name, _)| name)
            .collect();
        described.sort();
        described.dedup();
        let mut read = FIELDS.map(str::to_owned);
        read.sort();
        assert_eq!(described, read);
    }
}
