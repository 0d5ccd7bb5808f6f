//! What the writers are asked for, and what came of it.

use shared::message::{Headers, ReplyTo};
use uuid::Uuid;

use crate::{
    change::{self, Expected},
    idempotency::Claim,
    orders::Operation,
    request::{Change, Target},
    store::{insert::NewRow, keys::Known},
};

/// What is to be made durable.
#[derive(Debug)]
pub(crate) enum Work {
    Create(Box<NewRow>),
    Update(Box<Change>),
    Delete(Target),
    Move(Move),
}

/// An order to be put in another state, by somebody's hand.
#[derive(Debug)]
pub(crate) struct Move {
    pub target: Target,
    pub to: Destination,
}

#[derive(Debug)]
pub(crate) enum Destination {
    State(String),
    /// Whatever state its lifecycle has for that.
    Cancelled,
}

impl Work {
    /// The order that is to be changed; a new one is none.
    pub(crate) fn target(&self) -> Option<&Target> {
        match self {
            Self::Create(_) => None,
            Self::Update(change) => Some(&change.target),
            Self::Delete(target) => Some(target),
            Self::Move(change) => Some(&change.target),
        }
    }

    pub(crate) const fn operation(&self) -> Operation {
        match self {
            Self::Create(_) => Operation::Created,
            Self::Update(_) => Operation::Updated,
            Self::Delete(_) => Operation::Deleted,
            Self::Move(_) => Operation::Moved,
        }
    }

    /// User and external id of a new order.
    pub(super) fn reference(&self) -> Option<(&str, Option<&str>)> {
        match self {
            Self::Create(row) => Some((&row.user_id, row.external_id.as_deref())),
            Self::Update(_) | Self::Delete(_) | Self::Move(_) => None,
        }
    }

    /// About how much memory it holds, at least 1.
    pub(super) fn kib(&self) -> u32 {
        let bytes = match self {
            Self::Create(row) => 2 * row.event.body.len(),
            Self::Update(change) => change.fields.bytes(),
            Self::Delete(_) | Self::Move(_) => 0,
        };
        u32::try_from(bytes / 1024).unwrap_or(u32::MAX).saturating_add(1)
    }
}

/// Who asked, and where the worker's answer is awaited.
#[derive(Debug)]
pub(crate) struct Origin {
    pub correlation_id: Uuid,
    pub reply_to: Option<ReplyTo>,
    /// Trace context of the request.
    pub trace: Headers,
    /// What the caller says that the order's version is.
    pub expected: Option<Expected>,
    /// The caller's idempotency key.
    pub claim: Option<Claim>,
}

/// A change that is durable now.
#[derive(Debug)]
pub(crate) enum Written {
    /// Done, and told by this event.
    Now { order_id: Uuid, event_id: Uuid, state: Box<change::State> },
    /// The same order was created before, by this request.
    Before { order_id: Uuid, correlation_id: Uuid },
    /// The same order was created before, by this request, and is deleted.
    Gone { order_id: Uuid, correlation_id: Uuid },
    /// A request with this idempotency key did it before.
    Repeated(Box<Known>),
    /// There was nothing left to do.
    Nothing { order_id: Uuid, state: Box<change::State> },
}
