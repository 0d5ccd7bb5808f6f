//! What becomes of an order: pure, between the locked row and the row that is written.

use std::{borrow::Cow, sync::Arc};

use serde_json::value::RawValue;
use shared::{
    emission::{self, Sender},
    lifecycle::{Lifecycle, Lifecycles, Refusal, Step, Trigger, step, template::Subject},
    message::{Event, EventType, Headers, Message},
    money::Money,
    order::{self, Amounts, Content, Source, Violation, parse_items, total},
};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    error::Problem,
    request::{Change, Currency, Fields, NewOrder, Target, lacks},
    store::{
        change::{ChangedRow, Locked},
        insert::NewRow,
    },
    writer::{Destination, Move, Origin, Work, Written},
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

/// What the caller says that the order's version is (`If-Match`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    /// It is there: that is all.
    Any,
    OneOf(Vec<i64>),
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
        lifecycle: order.lifecycle.name.as_str().into(),
        status: order.lifecycle.initial.as_str().into(),
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
        replaces: order.replaces,
        lifecycle: &order.lifecycle.name,
        status: &order.lifecycle.initial,
        amount: amount.map(Money::decimal),
        currency,
        items: items.map(Into::into),
        payload: payload.map(Into::into),
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

/// What a decision needs besides the order and the work.
#[derive(Clone, Copy)]
pub(crate) struct Context<'a> {
    pub lifecycles: &'static Lifecycles,
    pub origin: &'a Origin,
    pub at: OffsetDateTime,
    pub topic: &'a str,
}

impl Context<'_> {
    fn lifecycle(&self, order: &Locked) -> Result<&'static Lifecycle, Problem> {
        self.lifecycles
            .find(&order.lifecycle)
            .ok_or(Problem::Unavailable("this order's lifecycle is not known here; see LIFECYCLES_DIR"))
    }
}

/// What this work makes of a locked order.
pub(crate) fn decide(order: Locked, work: &Work, context: Context<'_>) -> Result<Decided, Problem> {
    let Some(target) = work.target() else { return Err(Problem::UnknownOrder) }; // a new order is not locked
    check_owner(&order, target)?;
    if let Some(Expected::OneOf(versions)) = &context.origin.expected
        && !versions.contains(&order.version)
    {
        return Err(Problem::Precondition { order: Some((order.order_id, order.version)) });
    }
    match work {
        Work::Create(_) => Err(Problem::UnknownOrder),
        Work::Update(change) => update(order, change, context),
        Work::Delete(_) => delete(order, context),
        Work::Move(change) => relocate(order, change, context),
    }
}

fn update(order: Locked, change: &Change, context: Context<'_>) -> Result<Decided, Problem> {
    let lifecycle = context.lifecycle(&order)?;
    let from_status = order.status.clone();
    let next = step(lifecycle, &from_status, Trigger::ContentChanged)
        .map_err(|refusal| refused(&order, lifecycle, refusal))?;
    let mut violations = fixed_fields(&order, change);
    let mut order = order;
    if violations.is_empty() {
        apply(&mut order, &change.fields)?;
        violations = lacks(lifecycle, &order.user_id, &content(&order), context.lifecycles.amounts);
        violations.extend(unpayable(&order, &change.fields, context.lifecycles.amounts));
    }
    if !violations.is_empty() {
        return Err(Problem::Invalid(violations));
    }
    order.status = next.to.to_owned();
    order.version += 1;
    order.content_version = order.version;
    // Its time begins to run when the worker has handled it.
    order.due_at = None;
    decided(order, from_status.clone(), EventType::Updated, None, context)
}

fn delete(order: Locked, context: Context<'_>) -> Result<Decided, Problem> {
    if order.status == order::DELETED {
        return Ok(unchanged(order, EventType::Deleted, context));
    }
    let from_status = order.status.clone();
    let mut order = order;
    order.status = order::DELETED.to_owned();
    order.version += 1;
    order.due_at = None;
    // Deleting needs no lifecycle's file: the state exists in all of them.
    let told = match context.lifecycles.find(&order.lifecycle) {
        Some(lifecycle) => step(lifecycle, &from_status, Trigger::Deleted).ok().map(|step| (lifecycle, step)),
        None => None,
    };
    decided(order, from_status.clone(), EventType::Deleted, told, context)
}

/// To another state, by somebody's hand.
fn relocate(order: Locked, change: &Move, context: Context<'_>) -> Result<Decided, Problem> {
    let lifecycle = context.lifecycle(&order)?;
    let trigger = match &change.to {
        Destination::State(state) => Trigger::MovedTo(state),
        Destination::Cancelled => Trigger::Cancelled,
    };
    let from_status = order.status.clone();
    let next = match step(lifecycle, &from_status, trigger) {
        Err(Refusal::Same) => return Ok(unchanged(order, EventType::StatusChanged, context)),
        next => next.map_err(|refusal| refused(&order, lifecycle, refusal))?,
    };
    let mut order = order;
    order.status = next.to.to_owned();
    order.version += 1;
    order.due_at = next.timeout.map(|after| context.at + after);
    decided(order, from_status.clone(), EventType::StatusChanged, Some((lifecycle, next)), context)
}

/// What was asked for is so already: the request is known, and nothing happens.
fn unchanged(order: Locked, kind: EventType, context: Context<'_>) -> Decided {
    let written = Written::Nothing { order_id: order.order_id, state: Box::new(state(&order)) };
    let from_status = order.status.clone();
    let correlation_id = context.origin.correlation_id;
    let row =
        ChangedRow { order, from_status, kind, ignored: true, correlation_id, event_id: Uuid::nil(), messages: vec![] };
    Decided { row, written }
}

fn check_owner(order: &Locked, target: &Target) -> Result<(), Problem> {
    // Somebody else's order does not exist for this caller.
    match &target.user_id {
        Some(user_id) if *user_id != order.user_id => Err(Problem::UnknownOrder),
        _ => Ok(()),
    }
}

fn refused(order: &Locked, lifecycle: &Lifecycle, refusal: Refusal) -> Problem {
    let (order_id, status) = (order.order_id, order.status.clone());
    match refusal {
        Refusal::Deleted => Problem::Deleted { order_id },
        Refusal::ContentFixed => Problem::ContentFixed { order_id, status },
        Refusal::Illegal { allowed } => Problem::IllegalMove { order_id, status, allowed },
        Refusal::UnknownState => {
            let states = lifecycle.states.iter().map(|state| state.name.as_str()).collect::<Vec<_>>().join(", ");
            let reason = format!(
                "is no state of the lifecycle {}, which has {states}; POST /orders with \"status\":\"deleted\" deletes",
                lifecycle.name
            );
            Problem::Invalid(vec![Violation::new("/status", reason)])
        }
        Refusal::Same | Refusal::Early | Refusal::Late | Refusal::Conflict => {
            Problem::IllegalMove { order_id, status, allowed: vec![] }
        }
        Refusal::Undeclared => Problem::Unavailable("this order's state is not declared in its lifecycle's file"),
    }
}

/// What is fixed at creation may be repeated, not changed.
fn fixed_fields(order: &Locked, change: &Change) -> Vec<Violation> {
    let mut violations = Vec::new();
    let fixed = |name: &str, known: Option<&str>| {
        let is = known.map_or_else(|| "the order has none".to_owned(), |known| format!("it is {known}"));
        Violation::new(format!("/{name}"), format!("is fixed at creation: {is}; repeat that, or leave it out"))
    };
    if change.external_id.is_some() && change.external_id != order.external_id {
        violations.push(fixed("external_id", order.external_id.as_deref()));
    }
    if change.lifecycle.is_some_and(|lifecycle| lifecycle.name != order.lifecycle) {
        violations.push(fixed("lifecycle", Some(&order.lifecycle)));
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

/// What was given makes an order of a sum that its currency cannot be paid in. (A sum that was stored before is
/// nothing to be told of by another change.)
fn unpayable(order: &Locked, given: &Fields, amounts: Amounts) -> Option<Violation> {
    let field = match given {
        Fields { items: Some(_), .. } => "/items",
        Fields { amount: Some(_), .. } => "/amount",
        Fields { currency: Some(_), payload: None, .. } => "/currency",
        _ => return None,
    };
    let amount = match order.items.as_deref() {
        Some(items) => items_total(items),
        None => order.amount,
    };
    amounts.check(amount?, order.currency.as_deref()?).err().map(|reason| Violation::new(field, reason))
}

fn items_total(items: &RawValue) -> Option<Money> {
    parse_items(items, "/items", Source::Own).ok().and_then(|items| total(&items))
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

fn content(order: &Locked) -> Content<'_> {
    Content {
        items: order.items.as_deref(),
        amount: order.amount,
        currency: order.currency.as_deref(),
        payload: order.payload.as_deref(),
    }
}

/// The row of a change, with the event that tells of it and what its lifecycle tells others.
fn decided(
    order: Locked,
    from_status: String,
    kind: EventType,
    told: Option<(&Lifecycle, Step<'_>)>,
    context: Context<'_>,
) -> Result<Decided, Problem> {
    let Context { origin, at, topic, .. } = context;
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
    let mut messages = vec![message(&event, origin, topic)];
    if let Some((lifecycle, step)) = told {
        let subject = Subject {
            message_id: event_id,
            order_id: order.order_id,
            user_id: &order.user_id,
            external_id: order.external_id.as_deref(),
            lifecycle: &order.lifecycle,
            version: order.version,
            from: &from_status,
            to: &order.status,
            from_code: None,
            to_code: None,
            amount: order.amount,
            currency: order.currency.as_deref(),
            items: order.items.as_deref(),
            payload: order.payload.as_deref(),
            reason: None,
            at,
        };
        let sender = Sender { source: SOURCE, trace: &origin.trace, first_seq: 1 };
        let told = emission::messages(lifecycle, &step.emits, subject, sender);
        messages.extend(told.map_err(|reason| Problem::Invalid(vec![Violation::new("", reason)]))?);
    }
    let written = Written::Now { order_id: order.order_id, event_id, state: Box::new(state(&order)) };
    let correlation_id = origin.correlation_id;
    let row = ChangedRow { order, from_status, kind, ignored: false, correlation_id, event_id, messages };
    Ok(Decided { row, written })
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
