//! What the worker makes of what it reads: pure, between what was read and what is written.

use shared::{
    lifecycle::{Lifecycle, Lifecycles, Refusal, Step, Trigger, step, template::Emit},
    message::{AckStatus, Answer, Event, EventType},
    money::Money,
    order::{Content, DELETED, sentence, worth},
};
use time::OffsetDateTime;

use crate::received::Received;

/// An order as the worker finds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Order {
    pub lifecycle: String,
    pub status: String,
    pub version: i64,
    pub content_version: i64,
    pub amount: Option<Money>,
    pub currency: Option<String>,
    /// When the clock is to move it.
    pub due_at: Option<OffsetDateTime>,
}

/// What handling one message comes to.
#[derive(Clone, Debug)]
pub(crate) struct Handling {
    pub kind: Kind,
    /// Of the history's row: what happened.
    pub name: String,
    pub from_status: String,
    pub answer: Answer,
    pub due_at: Option<OffsetDateTime>,
    /// To be told to others.
    pub emits: Vec<&'static Emit>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The content was handled: a version of its own.
    Handled,
    /// The content was refused for good: a version of its own.
    Rejected,
    /// A message or the clock moved the order: a version of its own.
    Moved,
    /// The event changes nothing here; the answer is all.
    Noted,
    /// Later content, or a delete, came first.
    Superseded,
    /// The order is there already.
    Same,
    /// Too late to mean anything.
    Late,
    /// Contradicts the order's final state; an operator should know.
    Conflict,
}

impl Kind {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Handled => "handled",
            Self::Rejected => "rejected",
            Self::Moved => "moved",
            Self::Noted => "noted",
            Self::Superseded => "superseded",
            Self::Same => "same",
            Self::Late => "late",
            Self::Conflict => "conflict",
        }
    }

    /// Does it leave the order as it was?
    pub(crate) const fn is_ignored(self) -> bool {
        match self {
            Self::Handled | Self::Rejected | Self::Moved => false,
            Self::Noted | Self::Superseded | Self::Same | Self::Late | Self::Conflict => true,
        }
    }
}

/// Why a message is not handled now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// The order is not yet where this moves it.
    Early(String),
    /// Another time, or another worker, may do better.
    Failed(String),
    /// Nobody ever will.
    Hopeless(String),
}

/// What `event` does to `order` at this time. The caller has seen that it was not handled before.
///
/// # Errors
/// When this worker cannot handle it.
pub(crate) fn handle(
    lifecycles: &'static Lifecycles,
    order: &Order,
    event: &Event<'_>,
    at: OffsetDateTime,
) -> Result<Handling, Trouble> {
    if event.version > order.version {
        return Err(Trouble::Hopeless(format!(
            "the event is of version {}, the order only of {}",
            event.version, order.version
        )));
    }
    match event.kind {
        EventType::Deleted | EventType::StatusChanged => {
            Ok(unchanged(order, Kind::Noted, Kind::Noted.name().to_owned(), AckStatus::Updated))
        }
        // The version of the delete is the last one: nothing comes after it.
        EventType::Created | EventType::Updated if order.status == DELETED => Ok(superseded(order, order.version)),
        EventType::Created | EventType::Updated if order.content_version > event.version => {
            Ok(superseded(order, order.content_version))
        }
        EventType::Created | EventType::Updated => content(lifecycles, order, event, at),
    }
}

fn content(
    lifecycles: &'static Lifecycles,
    order: &Order,
    event: &Event<'_>,
    at: OffsetDateTime,
) -> Result<Handling, Trouble> {
    let lifecycle = lifecycle_of(lifecycles, order)?;
    let content = Content {
        items: event.items,
        amount: event.amount,
        currency: event.currency.as_deref(),
        payload: event.payload,
    };
    let (kind, status, trigger, worth, error) = match worth(&content, lifecycles.amounts) {
        Ok(worth) => {
            let is_new = event.kind == EventType::Created;
            let trigger = if is_new { Trigger::CreateHandled } else { Trigger::ContentHandled };
            (Kind::Handled, AckStatus::Processed, trigger, Some(worth), None)
        }
        Err(violations) => {
            (Kind::Rejected, AckStatus::Rejected, Trigger::ContentRefused, None, Some(sentence(&violations)))
        }
    };
    let status_before = declared(lifecycle, &order.status)?;
    let next = step(lifecycle, status_before, trigger).map_err(|refusal| Trouble::Failed(refusal.to_string()))?;
    let (amount, currency) = match worth {
        Some(worth) => (worth.amount, Some(worth.currency)),
        None => (None, order.currency.clone()),
    };
    let answer = Answer {
        status,
        order_status: next.to.to_owned(),
        order_version: order.version + 1,
        amount,
        currency,
        error,
        superseded_by: None,
    };
    Ok(stepped(order, kind, kind.name(), next, answer, at))
}

/// What a message from elsewhere does to `order` at this time.
///
/// # Errors
/// When it is early, or this worker cannot handle it.
pub(crate) fn receive(
    lifecycles: &'static Lifecycles,
    order: &Order,
    received: &Received,
    at: OffsetDateTime,
) -> Result<Handling, Trouble> {
    let lifecycle = lifecycle_of(lifecycles, order)?;
    if lifecycle.name != received.lifecycle {
        return Err(Trouble::Hopeless(format!(
            "it moves orders of the lifecycle {}, and this one is of {}",
            received.lifecycle, lifecycle.name
        )));
    }
    fire(lifecycle, order, &received.trigger, at)
}

/// What the clock does to `order`, if it is still due.
///
/// # Errors
/// When this worker cannot move it.
pub(crate) fn time_out(
    lifecycles: &'static Lifecycles,
    order: &Order,
    at: OffsetDateTime,
) -> Result<Handling, Trouble> {
    let lifecycle = lifecycle_of(lifecycles, order)?;
    match lifecycle.timed_out(&order.status) {
        Some(trigger) => fire(lifecycle, order, trigger, at),
        None => Err(Trouble::Failed(format!("the lifecycle {} has no timeout in {}", lifecycle.name, order.status))),
    }
}

fn fire(lifecycle: &'static Lifecycle, order: &Order, trigger: &str, at: OffsetDateTime) -> Result<Handling, Trouble> {
    let ignored = |kind: Kind, status, reason: &Refusal| {
        let mut handling = unchanged(order, kind, format!("{}: {trigger}", kind.name()), status);
        handling.answer.error = (status == AckStatus::Rejected).then(|| reason.to_string());
        Ok(handling)
    };
    match step(lifecycle, declared(lifecycle, &order.status)?, Trigger::Fired(trigger)) {
        Ok(next) => {
            let answer = Answer {
                status: AckStatus::Processed,
                order_status: next.to.to_owned(),
                order_version: order.version + 1,
                amount: order.amount,
                currency: order.currency.clone(),
                error: None,
                superseded_by: None,
            };
            Ok(stepped(order, Kind::Moved, trigger, next, answer, at))
        }
        Err(refusal @ Refusal::Early) => Err(Trouble::Early(refusal.to_string())),
        Err(refusal @ Refusal::Same) => ignored(Kind::Same, AckStatus::Processed, &refusal),
        Err(refusal @ Refusal::Conflict) => ignored(Kind::Conflict, AckStatus::Rejected, &refusal),
        Err(refusal @ Refusal::Late) => ignored(Kind::Late, AckStatus::Rejected, &refusal),
        Err(
            refusal @ (Refusal::Deleted
            | Refusal::ContentFixed
            | Refusal::Illegal { .. }
            | Refusal::UnknownState
            | Refusal::Undeclared),
        ) => Err(Trouble::Failed(refusal.to_string())),
    }
}

fn lifecycle_of(lifecycles: &'static Lifecycles, order: &Order) -> Result<&'static Lifecycle, Trouble> {
    lifecycles
        .find(&order.lifecycle)
        .ok_or_else(|| Trouble::Failed(format!("lifecycle {} is not known here; see LIFECYCLES_DIR", order.lifecycle)))
}

/// The lifecycle's own word for a state, which lives as long as that does.
fn declared(lifecycle: &'static Lifecycle, status: &str) -> Result<&'static str, Trouble> {
    match lifecycle.state(status) {
        Some(state) => Ok(&state.name),
        None if status == DELETED => Ok(DELETED),
        None => Err(Trouble::Failed(Refusal::Undeclared.to_string())),
    }
}

fn stepped(order: &Order, kind: Kind, name: &str, next: Step<'static>, answer: Answer, at: OffsetDateTime) -> Handling {
    // Its time began when it came there.
    let due_at = if next.to == order.status { order.due_at } else { None };
    Handling {
        kind,
        name: name.to_owned(),
        from_status: order.status.clone(),
        answer,
        due_at: next.timeout.map(|after| due_at.unwrap_or(at + after)),
        emits: next.emits,
    }
}

fn unchanged(order: &Order, kind: Kind, name: String, status: AckStatus) -> Handling {
    Handling {
        kind,
        name,
        from_status: order.status.clone(),
        answer: Answer {
            status,
            order_status: order.status.clone(),
            order_version: order.version,
            amount: order.amount,
            currency: order.currency.clone(),
            error: None,
            superseded_by: None,
        },
        due_at: order.due_at,
        emits: Vec::new(),
    }
}

fn superseded(order: &Order, by: i64) -> Handling {
    let kind = Kind::Superseded;
    let mut handling = unchanged(order, kind, kind.name().to_owned(), AckStatus::Processed);
    handling.answer.superseded_by = Some(by);
    handling
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
        due_at: handling.due_at,
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
        // The time of new content begins when it is handled.
        due_at: None,
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
        let (currency, due_at) = (Some("USD".to_owned()), None);
        Order { lifecycle, status, version, content_version, amount: None, currency, due_at }
    }

    fn handle(order: &Order, event: &Event<'_>) -> Result<Handling, Trouble> {
        super::handle(Lifecycles::embedded().unwrap(), order, event, now())
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
            kind in prop::sample::select(vec![
                EventType::Created, EventType::Updated, EventType::Deleted, EventType::StatusChanged
            ]),
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
