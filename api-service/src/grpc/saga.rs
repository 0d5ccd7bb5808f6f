//! `order.OrderService`: orders of the lifecycle `stock-saga`.

use serde::Serialize;
use shared::order::{Source, Violation, parse_items};
use tonic::{Request, Response, Status, async_trait};

use super::{
    call::{Call, with_done, with_order},
    orders::double,
    proto::order::{
        CreateOrderRequest, CreateOrderResponse, GetOrderRequest, GetOrderResponse, Order, OrderItem, OrderStatus,
        order_service_server::OrderService,
    },
};
use crate::{
    error::Problem,
    http::{App, reads::find},
    request,
    store::read,
};

const LIFECYCLE: &str = "stock-saga";

pub(super) struct Service(pub App);

/// The message as the body of `POST /orders` that it stands for.
#[derive(Serialize)]
struct Body<'a> {
    #[serde(skip_serializing_if = "str::is_empty")]
    user_id: &'a str,
    lifecycle: &'static str,
    items: Vec<Item<'a>>,
}

#[derive(Serialize)]
struct Item<'a> {
    product_id: &'a str,
    quantity: i32,
    price: String,
}

#[async_trait]
impl OrderService for Service {
    async fn create_order(
        &self,
        request: Request<CreateOrderRequest>,
    ) -> Result<Response<CreateOrderResponse>, Status> {
        let (call, message) = Call::new(request)?;
        let item = |item: &'_ OrderItem| (item.quantity, decimal(item.price));
        let items = message.items.iter().map(|it| {
            let (quantity, price) = item(it);
            Item { product_id: &it.product_id, quantity, price }
        });
        let body = Body { user_id: &message.user_id, lifecycle: LIFECYCLE, items: items.collect() };
        let body = serde_json::to_vec(&body).map_err(|_| Problem::Internal)?; // texts and numbers always serialize
        // The event has them as JSON, which is longer.
        let limit = self.0.max_body_bytes;
        if body.len() > limit {
            return Err(Problem::TooLarge { limit }.into());
        }
        let upsert = request::parse(&body, &call.caller, &self.0.defaults).map_err(Problem::from)?;
        let (done, applied) = call.submit(&self.0, upsert, body).await?;
        let held = call.large_answer().await;
        let named = call.caller.user().unwrap_or_default();
        // It is stored: that it cannot be read back now is no failure.
        let order = match self.0.orders.order(done.order_id).await {
            Ok(Some(order)) => told(order),
            Ok(None) | Err(_) => Order {
                id: done.order_id.to_string(),
                user_id: Some(message.user_id)
                    .filter(|user_id| !user_id.is_empty())
                    .unwrap_or_else(|| named.to_owned()),
                items: message.items,
                total_price: done.state.amount.map_or(0.0, double),
                status: status(LIFECYCLE, &done.state.status).into(),
                created_at: None,
            },
        };
        let mut response = with_done(CreateOrderResponse { order: Some(order) }, &done, applied);
        if let Some(held) = held {
            response.extensions_mut().insert(held);
        }
        Ok(response)
    }

    async fn get_order(&self, request: Request<GetOrderRequest>) -> Result<Response<GetOrderResponse>, Status> {
        let (call, message) = Call::new(request)?;
        let held = call.large_answer().await;
        let asked = Some(message.user_id.as_str()).filter(|user_id| !user_id.is_empty()).or(call.caller.only());
        if asked.is_none() && call.caller.user().is_none() {
            return Err(Problem::Invalid(vec![Violation::new("/user_id", "is missing: whose order is it?")]).into());
        }
        let order = find(&self.0, &call.caller, &message.order_id).await?;
        if asked.is_some_and(|user_id| user_id != order.user_id) {
            return Err(Problem::UnknownOrder.into());
        }
        let version = order.version;
        Ok(with_order(GetOrderResponse { order: Some(told(order)) }, version, held))
    }
}

fn told(order: read::Order) -> Order {
    let items = order.items.as_deref().and_then(|items| parse_items(items, "/items", Source::Payload).ok());
    let items = items.unwrap_or_default().into_iter().map(|item| OrderItem {
        product_id: item.product_id.into_owned(),
        quantity: i32::try_from(item.quantity).unwrap_or(i32::MAX),
        price: double(item.unit_price),
    });
    Order {
        id: order.order_id.to_string(),
        items: items.collect(),
        total_price: order.amount.map_or(0.0, double),
        status: status(&order.lifecycle, &order.status).into(),
        created_at: Some(prost_types::Timestamp {
            seconds: order.created_at.unix_timestamp(),
            nanos: i32::try_from(order.created_at.nanosecond()).unwrap_or_default(),
        }),
        user_id: order.user_id,
    }
}

/// The state of the same name, if it is one of ours.
fn status(lifecycle: &str, status: &str) -> OrderStatus {
    let own = (lifecycle == LIFECYCLE).then(|| OrderStatus::from_str_name(status)).flatten();
    own.unwrap_or(OrderStatus::Unspecified)
}

/// The shortest decimal that is this double, with an exponent where the digits would fill a page;
/// or a word that is no number, for those that are none.
fn decimal(price: f64) -> String {
    if price.abs() < 1e16 { price.to_string() } else { format!("{price:e}") }
}

#[cfg(test)]
mod tests {
    use shared::money::{Money, MoneyError};

    use super::*;

    #[test]
    fn a_price_is_the_decimal_that_was_meant() {
        for (price, text) in [(19.99, "19.99"), (0.1 + 0.2, "0.30000000000000004"), (5.0, "5"), (0.0, "0")] {
            assert_eq!(decimal(price), text);
        }
        assert_eq!(Money::parse(&decimal(f64::NAN)), Err(MoneyError::NotANumber));
        assert_eq!(Money::parse(&decimal(f64::INFINITY)), Err(MoneyError::NotANumber));
        assert_eq!(Money::parse(&decimal(-1.5)), Err(MoneyError::Negative));
        assert_eq!(Money::parse(&decimal(f64::MAX)), Err(MoneyError::TooLarge));
        assert_eq!(Money::parse(&decimal(1e-300)), Err(MoneyError::TooPrecise));
        assert_eq!(Money::parse(&decimal(-0.0)), Ok(Money::ZERO));
    }

    #[test]
    fn only_the_sagas_own_states_have_a_number() {
        assert_eq!(status(LIFECYCLE, "CONFIRMED"), OrderStatus::Confirmed);
        assert_eq!(status("payment", "PENDING"), OrderStatus::Unspecified);
        assert_eq!(status(LIFECYCLE, "deleted"), OrderStatus::Unspecified);
    }
}
