//! Messages from elsewhere: read as the lifecycle's file says, whatever else is in them.

use std::borrow::Cow;

use serde_json::{Number, Value};
use shared::{
    lifecycle::{Lifecycle, Receive},
    message::Headers,
    order::{MAX_ID, order_id_of, whole_number},
    parked::short,
};
use uuid::Uuid;

/// A message that is to move an order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Received {
    pub order_id: Uuid,
    /// As the message has it.
    pub order_text: String,
    pub lifecycle: &'static str,
    pub trigger: String,
    /// Tells it from every other message to its order; a repeat has the same.
    pub cause: String,
    pub user_id: Option<String>,
    pub reason: Option<String>,
    /// Does it create the order where there is none?
    pub creates: bool,
}

/// Reads a body. Where it has no id of the message, the headers may have one (CloudEvents, by
/// source and id).
///
/// # Errors
/// When it is not what the lifecycle's file says: what is missing or wrong, and where.
pub(crate) fn read(
    lifecycle: &'static Lifecycle,
    receive: &Receive,
    headers: &Headers,
    body: &[u8],
) -> Result<Received, String> {
    let body: Value = serde_json::from_slice(body).map_err(|error| format!("not JSON: {error}"))?;
    let order_text = id(&body, &receive.order_id)?.ok_or_else(|| format!("{} is missing", receive.order_id))?;
    let value = body.pointer(&receive.trigger).and_then(plain);
    let value = value.ok_or_else(|| format!("{} is missing, or no plain value", receive.trigger))?;
    let Some((_, trigger)) = receive.triggers.iter().find(|(known, _)| *known == value) else {
        let known = receive.triggers.iter().map(|(known, _)| known.as_str()).collect::<Vec<_>>().join(", ");
        return Err(format!("{} is {value:?}, and none of {known}", receive.trigger));
    };
    let optional = |pointer: &Option<String>| pointer.as_ref().map_or(Ok(None), |pointer| id(&body, pointer));
    let id = match (optional(&receive.message_id)?, headers.get("ce_id")) {
        (Some(id), _) => id,
        (None, Some(id)) => {
            let source = headers.get("ce_source").unwrap_or_default();
            Uuid::new_v5(&Uuid::NAMESPACE_OID, &[source, b"\n", id].concat()).to_string()
        }
        // Equal content is the same message, however it is spaced: maps are sorted in `Value`.
        (None, None) => Uuid::new_v5(&Uuid::NAMESPACE_OID, body.to_string().as_bytes()).to_string(),
    };
    let reason = receive.reason.as_ref().and_then(|pointer| body.pointer(pointer)).and_then(plain);
    Ok(Received {
        order_id: order_id_of(&order_text),
        order_text,
        lifecycle: &lifecycle.name,
        trigger: trigger.clone(),
        cause: format!("{}:{id}", receive.topic),
        user_id: optional(&receive.user_id)?,
        // It is told to others, who need not take more than we do.
        reason: reason.as_deref().map(short),
        creates: receive.creates_on.contains(trigger),
    })
}

/// An id at this place; `None` where there is nothing.
fn id(body: &Value, pointer: &str) -> Result<Option<String>, String> {
    let not_plain = || format!("{pointer} must be text or a whole number");
    let text = match body.pointer(pointer) {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Number(number)) => whole(number).ok_or_else(not_plain)?,
        Some(_) => return Err(not_plain()),
    };
    if text.is_empty() || text.chars().count() > MAX_ID || text.contains('\0') {
        return Err(format!("{pointer} must have 1 to 255 characters, and no \\u0000"));
    }
    Ok(Some(text))
}

/// 7.0 is as good as 7. Beyond 2^53 a double no longer says which number was meant.
fn whole(number: &Number) -> Option<String> {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    let is_exact = !number.is_f64() || number.as_f64().is_some_and(|n| n.abs() < EXACT);
    whole_number(&number.to_string()).filter(|_| is_exact).map(Cow::into_owned)
}

fn plain(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Bool(truth) => Some(truth.to_string()),
        Value::Number(number) => Some(whole(number).unwrap_or_else(|| number.to_string())),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use shared::lifecycle::Lifecycles;

    use super::*;

    fn of(topic: &str, body: &str) -> Result<Received, String> {
        let (lifecycle, receive) = Lifecycles::embedded().unwrap().received(topic).unwrap();
        read(lifecycle, receive, &Headers::NONE, body.as_bytes())
    }

    #[test]
    fn the_bodies_of_the_five_systems_are_read() {
        let id = "0198f2a0-0000-7000-8000-000000000001";
        let paid = of("payment-results", &format!(r#"{{"order_id":"{id}","user_id":7,"status":"success","x":1}}"#));
        let paid = paid.unwrap();
        assert_eq!((paid.trigger.as_str(), paid.order_id.to_string().as_str()), ("paid", id));
        let stock = of("stock_update_exchange", r#"{"order_id":"A-1","success":false,"reason":"none left"}"#).unwrap();
        assert_eq!((stock.trigger.as_str(), stock.reason.as_deref()), ("stock_refused", Some("none left")));
        assert_eq!((stock.order_id, stock.creates), (order_id_of("A-1"), false));
        let update = r#"{"eventType":"PaymentCompleted","orderId":12,"timestamp":"2026-01-01T00:00:00Z"}"#;
        let update = of("order.state.update", update).unwrap();
        assert_eq!((update.order_text.as_str(), update.creates), ("12", true));
        let update = of("order.state.update", r#"{"eventType":"PaymentCompleted","orderId":12.0}"#).unwrap();
        assert_eq!(update.order_text, "12");
    }

    #[test]
    fn equal_content_is_the_same_message_and_other_content_is_not() {
        let cause = |body: &str| of("payment-results", body).unwrap().cause;
        let first = cause(r#"{"order_id":"a","status":"success"}"#);
        assert_eq!(first, cause(r#" { "status": "success", "order_id": "a" }"#));
        assert_ne!(first, cause(r#"{"order_id":"a","status":"failed"}"#));
    }

    #[test]
    fn a_message_with_an_id_of_its_own_is_not_told_by_its_content() {
        let (lifecycle, receive) = Lifecycles::embedded().unwrap().received("payment-results").unwrap();
        let cause = |id: &str| {
            let mut headers = Headers::default();
            headers.push("ce_source", "/payments");
            headers.push("ce_id", id);
            read(lifecycle, receive, &headers, br#"{"order_id":"a","status":"success"}"#).unwrap().cause
        };
        assert_eq!(cause("1"), cause("1"));
        assert_ne!(cause("1"), cause("2"));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        for (body, part) in [
            ("{", "not JSON"),
            ("[]", "/order_id is missing"),
            (r#"{"order_id":["a"],"status":"success"}"#, "/order_id must be text"),
            (r#"{"order_id":1.5,"status":"success"}"#, "/order_id must be text"),
            (r#"{"order_id":1e300,"status":"success"}"#, "/order_id must be text"),
            (r#"{"order_id":"a"}"#, "/status is missing"),
            (r#"{"order_id":"a","status":"refunded"}"#, "\"refunded\", and none of failed, success"),
            (r#"{"order_id":"\u0000","status":"success"}"#, "no \\u0000"),
        ] {
            let error = of("payment-results", body).unwrap_err();
            assert!(error.contains(part), "{body} said: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_body_panics(body in proptest::collection::vec(any::<u8>(), 0..60)) {
            for topic in Lifecycles::embedded().unwrap().received_topics() {
                let (lifecycle, receive) = Lifecycles::embedded().unwrap().received(topic).unwrap();
                let _ = read(lifecycle, receive, &Headers::NONE, &body);
            }
        }
    }
}
