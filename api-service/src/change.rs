//! What becomes of an order: pure, between the locked row and the row that is written.

use std::{borrow::Cow, sync::Arc};

use serde_json::value::RawValue;
use shared::{
    lifecycle::{self, Refusal, Trigger, step},
    message::{Event, EventType, Headers, Message},
    money::Money,
    order::{self, Unknown, Violation, parse_items, total},
};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    error::Problem,
    request::{Change, Currency, Fields, NewOrder, Target},
    store::{
        change::{ChangedRow, Locked},
        insert::NewRow,
    },
    writer::{Origin, Work, Written},
};

/// Who sends our events (CloudEvents `source`).
const SOURCE: &str = "/orderstream/api-service";

/// What is said of an order in an answer.
#[derive(Clone, Debug)]
pub(crate) struct State {
    pub status: String,
    pub version: i64,
    pub amount: Option<Money>,
    pub currency: Option<String>,
}

pub(crate) struct Decided {
    pub row: ChangedRow,
    pub written: Written,
}

/// A new order with the event that will tell of it.
pub(crate) fn new_row(order: NewOrder, origin: &Origin, at: OffsetDateTime, topic: &str) -> NewRow {
    // Version 7: ids rise with time, so that new rows are neighbours in every index.
    let (order_id, event_id) = (Uuid::now_v7(), Uuid::now_v7());
    let Fields { items, amount, currency, payload, shipping_address, billing_address, notes } = order.fields;
    let currency = currency.and_then(known);
    let event = Event {
        event_id,
        kind: EventType::Created,
        order_id,
        external_id: order.external_id.as_deref().map(Cow::Borrowed),
        user_id: order.user_id.as_str().into(),
        lifecycle: order.lifecycle.name.into(),
        status: order.lifecycle.initial.into(),
        version: 1,
        amount,
        currency: currency.as_deref().map(Cow::Borrowed),
        items: items.as_deref(),
        payload: payload.as_deref(),
        correlation_id: origin.correlation_id,
        timestamp: at,
    };
    let event = message(&event, origin, topic);
    NewRow {
        order_id,
        user_id: order.user_id,
        external_id: order.external_id,
        lifecycle: order.lifecycle.name,
        status: order.lifecycle.initial,
        amount: amount.map(Money::decimal),
        currency,
        items: items.map(|raw| raw.get().to_owned()),
        payload: payload.map(|raw| raw.get().to_owned()),
        shipping_address,
        billing_address,
        notes,
        at,
        fingerprint: order.fingerprint,
        event_id,
        correlation_id: origin.correlation_id,
        event,
    }
}

/// What this work makes of a locked order.
pub(crate) fn decide(
    order: Locked,
    work: &Work,
    origin: &Origin,
    at: OffsetDateTime,
    topic: &str,
) -> Result<Decided, Problem> {
    match work {
        Work::Create(_) => Err(Problem::UnknownOrder), // a new order is not locked
        Work::Update(change) => update(order, change, origin, at, topic),
        Work::Delete(target) => delete(order, target, origin, at, topic),
    }
}

fn update(
    order: Locked,
    change: &Change,
    origin: &Origin,
    at: OffsetDateTime,
    topic: &str,
) -> Result<Decided, Problem> {
    check_owner(&order, &change.target)?;
    let lifecycle =
        lifecycle::find(&order.lifecycle).ok_or(Problem::Unavailable("this order's lifecycle is not known here"))?;
    let to = step(lifecycle, &order.status, Trigger::ContentChanged).map_err(|refusal| refused(&order, refusal))?.to;
    let violations = fixed_fields(&order, change);
    if !violations.is_empty() {
        return Err(Problem::Invalid(violations));
    }
    let to = to.to_owned();
    let from_status = order.status.clone();
    let mut order = order;
    apply(&mut order, &change.fields)?;
    order.status = to;
    order.version += 1;
    order.content_version = order.version;
    Ok(decided(order, from_status, EventType::Updated, origin, at, topic))
}

fn delete(
    order: Locked,
    target: &Target,
    origin: &Origin,
    at: OffsetDateTime,
    topic: &str,
) -> Result<Decided, Problem> {
    check_owner(&order, target)?;
    let from_status = order.status.clone();
    let Ok(next) = lifecycle_step(&order, Trigger::Deleted) else {
        // Deleted already: the request is known, and nothing happens.
        let written = Written::Nothing { order_id: order.order_id, state: Box::new(state(&order)) };
        let row = ChangedRow {
            order,
            from_status,
            kind: EventType::Deleted,
            ignored: true,
            correlation_id: origin.correlation_id,
            event_id: Uuid::nil(),
            event: None,
        };
        return Ok(Decided { row, written });
    };
    let mut order = order;
    order.status = next;
    order.version += 1;
    Ok(decided(order, from_status, EventType::Deleted, origin, at, topic))
}

/// Deleting needs no lifecycle file: the state exists in all of them.
fn lifecycle_step(order: &Locked, trigger: Trigger) -> Result<String, Refusal> {
    match lifecycle::find(&order.lifecycle) {
        Some(lifecycle) => step(lifecycle, &order.status, trigger).map(|step| step.to.to_owned()),
        None if order.status == order::DELETED => Err(Refusal::Deleted),
        None => Ok(order::DELETED.to_owned()),
    }
}

fn check_owner(order: &Locked, target: &Target) -> Result<(), Problem> {
    // Somebody else's order does not exist for this caller.
    match &target.user_id {
        Some(user_id) if *user_id != order.user_id => Err(Problem::UnknownOrder),
        _ => Ok(()),
    }
}

fn refused(order: &Locked, refusal: Refusal) -> Problem {
    match refusal {
        Refusal::Deleted => Problem::Deleted { order_id: order.order_id },
        Refusal::ContentFixed => Problem::ContentFixed { order_id: order.order_id, status: order.status.clone() },
    }
}

/// What is fixed at creation may be repeated, not changed.
fn fixed_fields(order: &Locked, change: &Change) -> Vec<Violation> {
    let mut violations = Vec::new();
    if change.external_id.is_some() && change.external_id != order.external_id {
        violations.push(Violation::new("/external_id", "is fixed at creation"));
    }
    if change.lifecycle.is_some_and(|lifecycle| lifecycle.name != order.lifecycle) {
        violations.push(Violation::new("/lifecycle", "is fixed at creation"));
    }
    violations
}

/// Absent fields stay, given ones replace the whole.
fn apply(order: &mut Locked, fields: &Fields) -> Result<(), Problem> {
    let replace = |field: &mut Option<String>, given: &Option<String>| {
        if given.is_some() {
            field.clone_from(given);
        }
    };
    replace(&mut order.shipping_address, &fields.shipping_address);
    replace(&mut order.billing_address, &fields.billing_address);
    replace(&mut order.notes, &fields.notes);
    if let Some(currency) = &fields.currency {
        order.currency = known(currency.clone());
    }
    if let Some(payload) = &fields.payload {
        // It brings its own items and amount.
        order.payload = Some(payload.clone());
        order.items.clone_from(&fields.items);
        order.amount = fields.amount;
    } else if let Some(items) = &fields.items {
        order.items = Some(items.clone());
        order.amount = fields.amount;
    } else if let Some(amount) = fields.amount {
        if let Some(total) = order.items.as_deref().and_then(items_total)
            && total != amount
        {
            let reason = format!("is not what the order's items come to, {total}; give other items instead");
            return Err(Problem::Invalid(vec![Violation::new("/amount", reason)]));
        }
        order.amount = Some(amount);
    }
    Ok(())
}

fn items_total(items: &RawValue) -> Option<Money> {
    parse_items(items, "/items", Unknown::Refuse).ok().and_then(|items| total(&items))
}

fn known(currency: Currency) -> Option<String> {
    match currency {
        Currency::Known(code) => Some(code),
        Currency::Broken => None,
    }
}

fn state(order: &Locked) -> State {
    State {
        status: order.status.clone(),
        version: order.version,
        amount: order.amount,
        currency: order.currency.clone(),
    }
}

fn decided(
    order: Locked,
    from_status: String,
    kind: EventType,
    origin: &Origin,
    at: OffsetDateTime,
    topic: &str,
) -> Decided {
    let event_id = Uuid::now_v7();
    let event = Event {
        event_id,
        kind,
        order_id: order.order_id,
        external_id: order.external_id.as_deref().map(Cow::Borrowed),
        user_id: order.user_id.as_str().into(),
        lifecycle: order.lifecycle.as_str().into(),
        status: order.status.as_str().into(),
        version: order.version,
        amount: order.amount,
        currency: order.currency.as_deref().map(Cow::Borrowed),
        items: order.items.as_deref(),
        payload: order.payload.as_deref(),
        correlation_id: origin.correlation_id,
        timestamp: at,
    };
    let event = message(&event, origin, topic);
    let written = Written::Now { order_id: order.order_id, state: Box::new(state(&order)) };
    let row = ChangedRow {
        order,
        from_status,
        kind,
        ignored: false,
        correlation_id: origin.correlation_id,
        event_id,
        event: Some(event),
    };
    Decided { row, written }
}

fn message(event: &Event<'_>, origin: &Origin, topic: &str) -> Arc<Message> {
    let mut headers = Headers::cloud_event(event.event_id, event.kind.name(), SOURCE, event.timestamp);
    for (name, value) in origin.trace.trace() {
        headers.push(name, value);
    }
    if let Some(reply_to) = &origin.reply_to {
        headers.push_reply_to(reply_to);
    }
    Arc::new(Message {
        order_id: event.order_id,
        version: event.version,
        seq: 0,
        topic: topic.to_owned(),
        key: event.order_id.hyphenated().to_string(),
        headers,
        // Our own types, read from valid JSON: they always serialize.
        body: serde_json::to_string(event).unwrap_or_default(),
    })
}
