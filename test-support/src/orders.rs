//! The orders that tests send.

use serde_json::{Value, json};

/// An order of one item: 2 × 29.99 = 59.98.
pub fn order(user: &str) -> Value {
    json!({ "user_id": user, "items": [item("sku-1", 2, "29.99")] })
}

pub fn item(product: &str, quantity: u32, unit_price: &str) -> Value {
    json!({ "product_id": product, "quantity": quantity, "unit_price": unit_price })
}
