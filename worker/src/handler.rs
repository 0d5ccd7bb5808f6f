//! What the worker makes of events: pure, between what was read and what is written.

use shared::{
    lifecycle::{self, Trigger, step},
    message::{AckStatus, Answer, Event, EventType},
    money::Money,
    order::{Content, DELETED, sentence, worth},
};

/// An order as the worker finds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Order {
    pub lifecycle: String,
    pub status: String,
    pub version: i64,
    pub content_version: i64,
    pub amount: Option<Money>,
    pub currency: Option<String>,
}

/// What handling one event comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Handling {
    pub kind: Kind,
    pub from_status: String,
    pub answer: Answer,
}

/// The row of the history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The content was handled: a version of its own.
    Handled,
    /// The content was refused for good: a version of its own.
    Rejected,
    /// The event changes nothing here; the answer is all.
    Noted,
    /// Later content, or a delete, came first.
    Superseded,
}

impl Kind {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Handled => "handled",
            Self::Rejected => "rejected",
            Self::Noted => "noted",
            Self::Superseded => "superseded",
        }
    }

    /// Does it leave the order as it was?
    pub(crate) const fn is_ignored(self) -> bool {
        match self {
            Self::Handled | Self::Rejected => false,
            Self::Noted | Self::Superseded => true,
        }
    }
}

/// What `event` does to `order`. The caller has seen that it was not handled before.
///
/// # Errors
/// When this worker cannot handle it, for a reason that another, or a later one, may not have.
pub(crate) fn handle(order: &Order, event: &Event<'_>) -> Result<Handling, String> {
    if event.version > order.version {
        return Err(format!("the event is of version {}, the order only of {}", event.version, order.version));
    }
    match event.kind {
        EventType::Deleted => Ok(unchanged(order, Kind::Noted, AckStatus::Updated, None)),
        // The version of the delete is the last one: nothing comes after it.
        EventType::Created | EventType::Updated if order.status == DELETED => {
            Ok(unchanged(order, Kind::Superseded, AckStatus::Processed, Some(order.version)))
        }
        EventType::Created | EventType::Updated if order.content_version > event.version => {
            Ok(unchanged(order, Kind::Superseded, AckStatus::Processed, Some(order.content_version)))
        }
        EventType::Created | EventType::Updated => content(order, event),
    }
}

fn content(order: &Order, event: &Event<'_>) -> Result<Handling, String> {
    let lifecycle =
        lifecycle::find(&order.lifecycle).ok_or_else(|| format!("lifecycle {} is not known here", order.lifecycle))?;
    let content = Content {
        items: event.items,
        amount: event.amount,
        currency: event.currency.as_deref(),
        payload: event.payload,
    };
    let (kind, status, trigger, worth, error) = match worth(&content) {
        Ok(worth) => (Kind::Handled, AckStatus::Processed, Trigger::ContentHandled, Some(worth), None),
        Err(violations) => {
            (Kind::Rejected, AckStatus::Rejected, Trigger::ContentRefused, None, Some(sentence(&violations)))
        }
    };
    let next = step(lifecycle, &order.status, trigger).map_err(|refusal| refusal.to_string())?;
    let (amount, currency) = match worth {
        Some(worth) => (worth.amount, Some(worth.currency)),
        None => (None, order.currency.clone()),
    };
    Ok(Handling {
        kind,
        from_status: order.status.clone(),
        answer: Answer {
            status,
            order_status: next.to.to_owned(),
            order_version: order.version + 1,
            amount,
            currency,
            error,
            superseded_by: None,
        },
    })
}

fn unchanged(order: &Order, kind: Kind, status: AckStatus, superseded_by: Option<i64>) -> Handling {
    Handling {
        kind,
        from_status: order.status.clone(),
        answer: Answer {
            status,
            order_status: order.status.clone(),
            order_version: order.version,
            amount: order.amount,
            currency: order.currency.clone(),
            error: None,
            superseded_by,
        },
    }
}

/// The order as the handling leaves it.
pub(crate) fn after(order: &Order, handling: &Handling) -> Order {
    if handling.kind.is_ignored() {
        return order.clone();
    }
    Order {
        status: handling.answer.order_status.clone(),
        version: handling.answer.order_version,
        amount: handling.answer.amount,
        currency: handling.answer.currency.clone(),
        ..order.clone()
    }
}

/// The order as the event tells of it, which is how it still is unless something came in between.
pub(crate) fn as_told(event: &Event<'_>) -> Order {
    Order {
        lifecycle: event.lifecycle.clone().into_owned(),
        status: event.status.clone().into_owned(),
        version: event.version,
        content_version: event.version,
        amount: event.amount,
        currency: event.currency.as_deref().map(ToOwned::to_owned),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::value::RawValue;
    use shared::message::now;
    use uuid::Uuid;

    use super::*;

    fn event(kind: EventType, version: i64, payload: Option<&RawValue>) -> Event<'_> {
        Event {
            event_id: Uuid::nil(),
            kind,
            order_id: Uuid::nil(),
            external_id: None,
            user_id: "u".into(),
            lifecycle: "marketplace".into(),
            status: "new".into(),
            version,
            amount: None,
            currency: Some("USD".into()),
            items: None,
            payload,
            correlation_id: Uuid::nil(),
            timestamp: now(),
        }
    }

    fn order(status: &str, version: i64, content_version: i64) -> Order {
        let (lifecycle, status) = ("marketplace".to_owned(), status.to_owned());
        Order { lifecycle, status, version, content_version, amount: None, currency: Some("USD".to_owned()) }
    }

    fn payload(json: &str) -> Box<RawValue> {
        RawValue::from_string(json.to_owned()).unwrap()
    }

    #[test]
    fn a_created_order_is_done_with_its_amount() {
        let payload = payload(r#"{"items":[{"product_id":"p","quantity":2,"unit_price":"29.99"}]}"#);
        let handling = handle(&order("new", 1, 1), &event(EventType::Created, 1, Some(&payload))).unwrap();
        assert_eq!(
            (handling.kind, handling.answer.order_status.as_str(), handling.answer.order_version),
            (Kind::Handled, "done", 2)
        );
        assert_eq!(handling.answer.amount.unwrap().to_string(), "59.98");
    }

    #[test]
    fn broken_content_is_refused_with_the_reason_and_the_order_stays() {
        let payload = payload(r#"{"items":"none"}"#);
        let handling = handle(&order("new", 1, 1), &event(EventType::Created, 1, Some(&payload))).unwrap();
        assert_eq!((handling.kind, handling.answer.order_status.as_str()), (Kind::Rejected, "rejected"));
        assert_eq!(handling.answer.error.as_deref(), Some("/payload/items must be an array of items"));
    }

    #[test]
    fn a_later_content_or_a_delete_supersedes_and_a_mere_status_change_does_not() {
        let created = event(EventType::Created, 1, None);
        let superseded = handle(&order("new", 2, 2), &created).unwrap();
        assert_eq!((superseded.kind, superseded.answer.superseded_by), (Kind::Superseded, Some(2)));
        let deleted = handle(&order(DELETED, 3, 1), &created).unwrap();
        assert_eq!((deleted.kind, deleted.answer.superseded_by), (Kind::Superseded, Some(3)));
        let moved = handle(&order("processing", 2, 1), &created).unwrap();
        assert_eq!(
            (moved.kind, moved.answer.order_status.as_str(), moved.answer.order_version),
            (Kind::Handled, "processing", 3)
        );
        let noted = handle(&order(DELETED, 3, 1), &event(EventType::Deleted, 3, None)).unwrap();
        assert_eq!((noted.kind, noted.answer.status, noted.answer.order_version), (Kind::Noted, AckStatus::Updated, 3));
    }

    #[test]
    fn an_event_from_the_future_is_not_handled() {
        assert!(handle(&order("new", 1, 1), &event(EventType::Updated, 2, None)).is_err());
    }

    proptest! {
        #[test]
        fn versions_rise_by_one_or_not_at_all_and_a_deleted_order_stays(
            status in prop::sample::select(vec!["new", "done", "processing", "rejected", "cancelled", DELETED]),
            version in 1i64..9, content in 1i64..9, at in 1i64..9,
            kind in prop::sample::select(vec![EventType::Created, EventType::Updated, EventType::Deleted]),
        ) {
            let order = order(status, version.max(content), content);
            if let Ok(handling) = handle(&order, &event(kind, at, None)) {
                let next = after(&order, &handling);
                prop_assert_eq!(next.version, order.version + i64::from(!handling.kind.is_ignored()));
                prop_assert!(order.status != DELETED || next == order);
                prop_assert_eq!((&next.status, next.version), (&handling.answer.order_status, handling.answer.order_version));
            }
        }
    }
}
