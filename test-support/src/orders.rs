//! The orders that tests send.

use serde_json::{Value, json};

/// An order of one item: 2 × 29.99 = 59.98.
pub fn order(user: &str) -> Value {
    json!({ "user_id": user, "items": [item("sku-1", 2, "29.99")] })
}

pub fn item(product: &str, quantity: u32, unit_price: &str) -> Value {
    json!({ "product_id": product, "quantity": quantity, "unit_price": unit_price })
}

/// A body of `POST /orders` as a marketplace's: all that it says is in its payload, in the shape and
/// the size of real ones (with one line 630 bytes).
pub fn marketplace_order(lines: usize) -> String {
    let lines: Vec<_> = (0..lines)
        .map(|line| {
            format!(
                r#"{{"product_id":"{:032x}","seller_id":"76d5af76d0271110f9af36c92573f765","quantity":{},"unit_price":"{}.90","freight":"15.10"}}"#,
                0x6604_2206_1e06_da17_u128 << 60 | line as u128,
                1 + line % 3,
                49 + 13 * line,
            )
        })
        .collect();
    format!(
        r#"{{"user_id":"e937151346d1bec664f5b80cd798bdd2","payload":{{"id":"03ffce741877a000ca0fb3520673d4c4","customer_id":"e937151346d1bec664f5b80cd798bdd2","status":"delivered","purchased_at":"2018-03-09T16:43:40Z","approved_at":"2018-03-09T16:43:40Z","shipped_at":"2018-03-10T13:06:01Z","delivered_at":"2018-03-17T07:07:44Z","currency":"BRL","items":[{}],"payments":[{{"type":"credit_card","installments":4,"value":"415.28"}}]}}}}"#,
        lines.join(",")
    )
}

/// An event of `orders.events` as the API sends it for such an order.
pub fn marketplace_event(lines: usize) -> String {
    let body: Value = serde_json::from_str(&marketplace_order(lines)).expect("JSON");
    let payload = &body["payload"];
    let [event_id, order_id, correlation_id] = [1, 2, 3].map(|n| format!("01935f3e-7d4c-7000-8000-00000000000{n}"));
    json!({
        "event_id": event_id, "type": "order.created", "order_id": order_id, "external_id": payload["id"],
        "user_id": body["user_id"], "lifecycle": "marketplace", "status": "new", "version": 1, "amount": null,
        "currency": payload["currency"], "items": null, "payload": payload, "correlation_id": correlation_id,
        "timestamp": "2026-01-01T00:00:00.000000Z"
    })
    .to_string()
}

/// A body of `POST /orders` as a shop's: items and addresses are the order's own.
pub fn shop_order(lines: u32) -> String {
    let items: Vec<_> = (0..lines).map(|line| item(&format!("sku-{line:08}"), 1 + line % 3, "29.99")).collect();
    json!({
        "user_id": "customer-1", "external_id": "shop-2018-000001", "items": items, "currency": "EUR",
        "shipping_address": "12 Long Street, 10115 Berlin", "billing_address": "12 Long Street, 10115 Berlin",
        "notes": "Please ring twice."
    })
    .to_string()
}
