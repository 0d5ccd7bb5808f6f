//! A door to what each order goes through here, for the micro-benchmarks alone (the feature `hot`):
//! from a body to a row with its event, and the table of those who wait. No logic of its own.

use axum::http::HeaderMap;
use futures_util::FutureExt as _;
use serde_json::value::RawValue;
use shared::{
    lifecycle::Lifecycles,
    message::{Headers, ReplyTo, now},
};
use uuid::Uuid;

use crate::{
    body::Body,
    change,
    heard::Heard,
    identity::{Caller, Identity},
    json,
    request::{self, Defaults, NewOrder, Upsert},
    waiters::{Waiter, Waiters},
    writer::Origin,
};

/// What a body is read with.
pub struct Door {
    caller: Caller,
    defaults: Defaults,
    origin: Origin,
}

impl Door {
    /// Somebody who waits for the answer, and traces.
    #[must_use]
    pub fn open() -> Self {
        let lifecycles = Lifecycles::embedded().expect("lifecycles");
        let lifecycle = lifecycles.find("marketplace").expect("the lifecycle marketplace");
        let mut trace = Headers::default();
        trace.push("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        let correlation_id = Uuid::now_v7();
        let correlation = correlation_id.as_bytes().to_vec();
        let reply_to = Some(ReplyTo { correlation, topic: "orders.ack".to_owned(), partition: Some(3) });
        Self {
            caller: Identity::None.caller(&HeaderMap::new()).expect("a caller"),
            defaults: Defaults { lifecycles, lifecycle, currency: "USD".to_owned() },
            origin: Origin { correlation_id, reply_to, trace, expected: None, claim: None },
        }
    }

    /// Reads a body and checks it; it must create an order.
    #[must_use]
    pub fn check(&self, body: &[u8]) -> NewOrder {
        match request::parse(body, &self.caller, &self.defaults) {
            Ok(Upsert::Create(order)) => order,
            other => panic!("not a new order: {other:?}"),
        }
    }

    /// The row of an order, with its event.
    #[must_use]
    pub fn row(&self, order: NewOrder) -> impl Sized + use<> {
        change::new_row(order, &self.origin, now(), "orders.events")
    }
}

/// Only the fields of a body, by name.
///
/// # Errors
/// When it is no JSON object.
pub fn fields(body: &str) -> Result<impl Sized + '_, serde_json::Error> {
    serde_json::from_str::<Body<'_>>(body)
}

/// Looks at all that a payload says, and digests it.
#[must_use]
pub fn digest(payload: &RawValue) -> impl Sized + use<> {
    json::digest(payload)
}

/// The table of those who wait, with so many in it.
pub struct Table {
    waiters: Waiters,
    _others: Vec<Waiter>,
}

impl Table {
    #[must_use]
    pub fn with(others: usize) -> Self {
        let waiters = Waiters::new(others + 1_000);
        let _others = (0..others).filter_map(|_| waiters.register(Uuid::now_v7())).collect();
        Self { waiters, _others }
    }

    /// Somebody comes, and goes again without an answer.
    pub fn come_and_go(&self, id: Uuid) {
        drop(self.waiters.register(id));
    }

    /// Somebody comes, is answered, and goes.
    #[must_use]
    pub fn wait(&self, id: Uuid, answer: &[u8]) -> Option<impl Sized + use<>> {
        let mut waiter = self.waiters.register(id)?;
        self.waiters.answer(id, || Heard::read(Some(answer)));
        waiter.answered().now_or_never().flatten()
    }

    /// An answer that nobody waits for, as most are that are meant for other replicas.
    pub fn answer_nobody(&self, id: Uuid) {
        self.waiters.answer(id, || unreachable!("nobody waits"));
    }
}
