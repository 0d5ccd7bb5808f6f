//! The messages that a step of an order sends to others, as they will lie in the outbox.

use std::sync::Arc;

use uuid::Uuid;

use crate::{
    lifecycle::{
        Lifecycle,
        template::{Emit, Subject},
    },
    message::{Headers, Message},
    order::{Amounts, Content, worth},
};

/// Who sends them, and on behalf of what.
#[derive(Clone, Copy, Debug)]
pub struct Sender<'a> {
    /// CloudEvents `source`.
    pub source: &'a str,
    /// The trace that they belong to.
    pub trace: &'a Headers,
    /// The place of the first among the messages of its version.
    pub first_seq: i16,
}

/// Fills in what `emits` say. `subject.message_id` is replaced: each message has its own.
///
/// # Errors
/// When the order has not what a message needs.
pub fn messages(
    lifecycle: &Lifecycle,
    emits: &[&Emit],
    mut subject: Subject<'_>,
    sender: Sender<'_>,
) -> Result<Vec<Arc<Message>>, String> {
    let code = |state: &str| lifecycle.state(state).and_then(|state| state.code);
    (subject.from_code, subject.to_code) = (code(subject.from), code(subject.to));
    if subject.amount.is_none() && !emits.is_empty() {
        // Not handled yet: what the content comes to is known all the same.
        let Subject { items, payload, currency, .. } = subject;
        let content = Content { items, payload, currency: currency.or(Some("")), amount: None };
        subject.amount = worth(&content, Amounts::Exact).ok().and_then(|worth| worth.amount);
    }
    let mut messages = Vec::with_capacity(emits.len());
    for (emit, seq) in emits.iter().zip(sender.first_seq..) {
        subject.message_id = Uuid::now_v7();
        let kind = format!("{}.{}", lifecycle.name, subject.to);
        let mut headers = Headers::cloud_event(subject.message_id, &kind, sender.source, subject.at);
        for (name, value) in sender.trace.trace() {
            headers.push(name, value);
        }
        messages.push(Arc::new(Message {
            order_id: subject.order_id,
            version: subject.version,
            seq,
            topic: emit.topic.clone(),
            key: emit.key.text(&subject)?,
            headers,
            body: emit.body.json(&subject)?,
        }));
    }
    Ok(messages)
}
