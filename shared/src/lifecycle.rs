//! What happens next to an order. A lifecycle is data, read from a file ([`file`]); [`step`] is a
//! pure function over it: no IO, no clock, no state's name in code.

pub mod file;
pub mod graph;
mod set;
pub mod template;

use std::time::Duration;

pub use set::Lifecycles;
use template::Emit;

use crate::order::DELETED;

/// The states of one kind of order and the ways between them. Checked when it was read: each name
/// in it is one of its own states or triggers.
#[derive(Clone, Debug)]
pub struct Lifecycle {
    pub name: String,
    /// Where a new order begins.
    pub initial: String,
    pub requires: Requires,
    pub content: Content,
    pub states: Vec<State>,
    pub transitions: Vec<Transition>,
    pub timeouts: Vec<Timeout>,
    pub receives: Vec<Receive>,
    pub emits: Vec<Emit>,
}

/// What an order cannot do without; refused at the door.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Requires {
    pub user_id: Need,
    pub amount: Need,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Need {
    #[default]
    None,
    /// There must be one.
    Any,
    /// It must be a whole number; an amount also more than 0.
    Whole,
}

/// Where an order's content may change, and what the worker fires once it has handled it.
#[derive(Clone, Debug, Default)]
pub struct Content {
    pub change_in: Vec<String>,
    pub leads_to: String,
    pub on_handled: Option<String>,
    pub on_refused: Option<String>,
}

#[derive(Clone, Debug)]
pub struct State {
    pub name: String,
    /// No trigger leaves it; only new content, where that is declared, or a delete.
    pub terminal: bool,
    /// To be in it is to be cancelled.
    pub cancel: bool,
    /// A number for it, in messages that want one.
    pub code: Option<i64>,
}

#[derive(Clone, Debug)]
pub struct Transition {
    pub from: Vec<String>,
    pub to: String,
    /// Triggers, of messages, timeouts and content.
    pub on: Vec<String>,
    /// May a person ask for it?
    pub by_hand: bool,
}

/// What the clock fires for an order that stays in a state.
#[derive(Clone, Debug)]
pub struct Timeout {
    pub state: String,
    /// `None`: switched off.
    pub after: Option<Duration>,
    pub trigger: String,
}

/// Messages of others that move orders. Places in the body are JSON pointers (RFC 6901).
#[derive(Clone, Debug)]
pub struct Receive {
    pub topic: String,
    pub order_id: String,
    pub trigger: String,
    /// What may stand there, and what it fires.
    pub triggers: Vec<(String, String)>,
    /// The sender's own id of the message; without one, equal content is the same message.
    pub message_id: Option<String>,
    pub user_id: Option<String>,
    pub reason: Option<String>,
    /// Triggers that create the order where there is none.
    pub creates_on: Vec<String>,
}

/// What may move an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger<'a> {
    /// A client gave new content.
    ContentChanged,
    /// The worker has handled the content of a new order.
    CreateHandled,
    /// The worker has handled new content of an order.
    ContentHandled,
    /// The worker had to refuse the content.
    ContentRefused,
    /// A client deletes the order.
    Deleted,
    /// A message or the clock fires this trigger.
    Fired(&'a str),
    /// Somebody puts the order in this state.
    MovedTo(&'a str),
    /// Somebody cancels the order.
    Cancelled,
}

/// Where the order goes now. The same state is a step too: the change counts, the state stays.
#[derive(Clone, Debug)]
pub struct Step<'a> {
    pub to: &'a str,
    /// How long the order may stay there.
    pub timeout: Option<Duration>,
    /// What is to be told to others, in this sequence.
    pub emits: Vec<&'a Emit>,
}

/// Why a trigger does nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the order is deleted")]
    Deleted,
    #[error("an order in this state takes no change of content")]
    ContentFixed,
    #[error("the order is there already")]
    Same,
    #[error("the order cannot go there from here")]
    Illegal {
        /// Where it can go by hand.
        allowed: Vec<String>,
    },
    #[error("the lifecycle has no such state")]
    UnknownState,
    #[error("it came too early: the order is not yet where this moves it")]
    Early,
    #[error("it came too late: the order can no longer be where this moves it")]
    Late,
    #[error("it contradicts the final state of the order")]
    Conflict,
    /// The order was stored under another version of the lifecycle's file.
    #[error("the order's state is not one of its lifecycle; declare it again")]
    Undeclared,
}

/// What `trigger` does to an order that is in `state`.
///
/// # Errors
/// When it does nothing, and why.
pub fn step<'a>(lifecycle: &'a Lifecycle, state: &'a str, trigger: Trigger<'_>) -> Result<Step<'a>, Refusal> {
    if state == DELETED {
        return Err(match trigger {
            Trigger::Fired(trigger) => lifecycle.untimely(state, trigger),
            _ => Refusal::Deleted,
        });
    }
    if lifecycle.state(state).is_none() && trigger != Trigger::Deleted {
        return Err(Refusal::Undeclared);
    }
    let content = &lifecycle.content;
    // Content is handled where that moves the order; where it does not (a person has moved it in
    // between), the order keeps its state and only what the content comes to is new.
    let along = |trigger: &'a Option<String>| {
        let trigger = trigger.as_deref();
        trigger.and_then(|trigger| lifecycle.fired(state, trigger)).unwrap_or(state)
    };
    let to = match trigger {
        Trigger::ContentChanged if content.change_in.iter().any(|name| name == state) => content.leads_to.as_str(),
        Trigger::ContentChanged => return Err(Refusal::ContentFixed),
        Trigger::CreateHandled | Trigger::ContentHandled => along(&content.on_handled),
        Trigger::ContentRefused => along(&content.on_refused),
        Trigger::Deleted => DELETED,
        Trigger::Fired(trigger) => lifecycle.fired(state, trigger).ok_or_else(|| lifecycle.untimely(state, trigger))?,
        Trigger::MovedTo(to) => lifecycle.moved(state, to)?,
        Trigger::Cancelled => lifecycle.cancelled(state)?,
    };
    Ok(Step { to, timeout: lifecycle.timeout(to), emits: lifecycle.emits_of(state, to, trigger) })
}

impl Lifecycle {
    #[must_use]
    pub fn state(&self, name: &str) -> Option<&State> {
        self.states.iter().find(|state| state.name == name)
    }

    /// Does no trigger leave this state?
    #[must_use]
    pub fn is_terminal(&self, name: &str) -> bool {
        name == DELETED || self.state(name).is_some_and(|state| state.terminal)
    }

    /// Where this trigger leads from this state.
    fn fired(&self, state: &str, trigger: &str) -> Option<&str> {
        self.transitions.iter().find(|way| way.is_on(trigger) && way.leaves(state)).map(|way| way.to.as_str())
    }

    /// Where a person may put an order that is in this state.
    fn allowed<'a>(&'a self, state: &str) -> impl Iterator<Item = &'a str> {
        self.transitions.iter().filter(move |way| way.by_hand && way.leaves(state)).map(|way| way.to.as_str())
    }

    fn moved(&self, state: &str, to: &str) -> Result<&str, Refusal> {
        if self.state(to).is_none() {
            return Err(Refusal::UnknownState);
        }
        if state == to {
            return Err(Refusal::Same);
        }
        self.allowed(state).find(|name| *name == to).ok_or_else(|| self.illegal(state))
    }

    fn cancelled(&self, state: &str) -> Result<&str, Refusal> {
        let is_cancel = |name: &str| self.state(name).is_some_and(|state| state.cancel);
        if is_cancel(state) {
            return Err(Refusal::Same);
        }
        self.allowed(state).find(|name| is_cancel(name)).ok_or_else(|| self.illegal(state))
    }

    fn illegal(&self, state: &str) -> Refusal {
        Refusal::Illegal { allowed: self.allowed(state).map(ToOwned::to_owned).collect() }
    }

    /// What is the matter with a trigger that is not legal from this state.
    fn untimely(&self, state: &str, trigger: &str) -> Refusal {
        let on_it = || self.transitions.iter().filter(|way| way.is_on(trigger));
        if on_it().any(|way| way.to == state) {
            return Refusal::Same;
        }
        if self.is_terminal(state) {
            // It would have ended the order in another way.
            let contradicts = on_it().any(|way| self.is_terminal(&way.to));
            return if contradicts { Refusal::Conflict } else { Refusal::Late };
        }
        let reachable = self.reachable(state);
        let can_become_legal = on_it().any(|way| reachable.iter().any(|name| way.leaves(name)));
        if can_become_legal { Refusal::Early } else { Refusal::Late }
    }

    /// Where triggers and people can bring an order from this state, itself included. Not new
    /// content, which begins anew: a message is about the content that it followed.
    fn reachable<'a>(&'a self, state: &'a str) -> Vec<&'a str> {
        let mut reached = vec![state];
        let mut next = 0;
        while let Some(from) = reached.get(next).copied() {
            for way in self.transitions.iter().filter(|way| way.leaves(from)) {
                if !reached.contains(&way.to.as_str()) {
                    reached.push(&way.to);
                }
            }
            next += 1;
        }
        reached
    }

    fn timeout(&self, state: &str) -> Option<Duration> {
        self.timeouts.iter().find(|timeout| timeout.state == state)?.after
    }

    /// What the clock fires for an order that has been in this state for too long.
    #[must_use]
    pub fn timed_out(&self, state: &str) -> Option<&str> {
        let is_on = |timeout: &&Timeout| timeout.state == state && timeout.after.is_some();
        self.timeouts.iter().find(is_on).map(|timeout| timeout.trigger.as_str())
    }

    fn emits_of(&self, from: &str, to: &str, trigger: Trigger<'_>) -> Vec<&Emit> {
        let content_entered = match trigger {
            // Nobody is told of content before it is handled.
            Trigger::ContentChanged => return Vec::new(),
            Trigger::CreateHandled => Some(self.initial.as_str()),
            Trigger::ContentHandled => Some(self.content.leads_to.as_str()),
            _ => None,
        };
        let moved = from != to;
        let is_told = |emit: &&Emit| match &emit.entering {
            Some(state) => (moved && state == to) || content_entered == Some(state.as_str()),
            // A delete is no state that others know of.
            None => moved && to != DELETED,
        };
        self.emits.iter().filter(is_told).collect()
    }

    /// All triggers that its transitions know.
    pub fn triggers(&self) -> impl Iterator<Item = &str> {
        self.transitions.iter().flat_map(|way| &way.on).map(String::as_str)
    }
}

impl Transition {
    fn is_on(&self, trigger: &str) -> bool {
        self.on.iter().any(|on| on == trigger)
    }

    fn leaves(&self, state: &str) -> bool {
        self.from.iter().any(|from| from == state)
    }
}

#[cfg(test)]
mod tests;
