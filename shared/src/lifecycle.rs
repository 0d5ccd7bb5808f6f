//! What happens next to an order. A lifecycle is data, [`step`] is a pure function over it: no IO,
//! no clock, no state's name in code.

use crate::order::DELETED;

/// The states of one kind of order and the ways between them.
#[derive(Debug)]
pub struct Lifecycle {
    pub name: &'static str,
    /// Where a new order begins, and where a change of content leads back to.
    pub initial: &'static str,
    /// States whose orders take a change of content; elsewhere an update is refused.
    pub content_in: &'static [&'static str],
    /// Where an order goes, by where it was, when the worker has handled its content.
    pub handled: &'static [(&'static str, &'static str)],
    /// The same when the worker had to refuse the content.
    pub refused: &'static [(&'static str, &'static str)],
}

/// What may move an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// A client gave new content.
    ContentChanged,
    /// The worker has handled the content.
    ContentHandled,
    /// The worker had to refuse the content.
    ContentRefused,
    /// A client deletes the order.
    Deleted,
}

/// Where the order goes now. The same state is a step too: the change counts, the state stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step<'a> {
    pub to: &'a str,
}

/// Why a trigger does nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the order is deleted")]
    Deleted,
    #[error("an order in this state takes no change of content")]
    ContentFixed,
}

/// What `trigger` does to an order that is in `state`.
pub fn step<'a>(lifecycle: &Lifecycle, state: &'a str, trigger: Trigger) -> Result<Step<'a>, Refusal> {
    if state == DELETED {
        return Err(Refusal::Deleted);
    }
    // Content is handled where that moves the order; where it does not (a person has moved it in
    // between), the order keeps its state and only what the content comes to is new.
    let along =
        |moves: &[(&str, &'static str)]| moves.iter().find(|(from, _)| *from == state).map_or(state, |(_, to)| *to);
    let to = match trigger {
        Trigger::ContentChanged if lifecycle.content_in.contains(&state) => lifecycle.initial,
        Trigger::ContentChanged => return Err(Refusal::ContentFixed),
        Trigger::ContentHandled => along(lifecycle.handled),
        Trigger::ContentRefused => along(lifecycle.refused),
        Trigger::Deleted => DELETED,
    };
    Ok(Step { to })
}

/// The lifecycle of this name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Lifecycle> {
    LIFECYCLES.iter().find(|lifecycle| lifecycle.name == name)
}

/// Names of all lifecycles, for messages.
#[must_use]
pub fn names() -> String {
    LIFECYCLES.iter().map(|lifecycle| lifecycle.name).collect::<Vec<_>>().join(", ")
}

static LIFECYCLES: &[Lifecycle] = &[Lifecycle {
    name: "marketplace",
    initial: "new",
    content_in: &["new", "processing", "done", "rejected"],
    handled: &[("new", "done")],
    refused: &[("new", "rejected"), ("processing", "rejected")],
}];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TRIGGERS: [Trigger; 4] =
        [Trigger::ContentChanged, Trigger::ContentHandled, Trigger::ContentRefused, Trigger::Deleted];

    fn states(lifecycle: &Lifecycle) -> Vec<&'static str> {
        let ways = lifecycle.handled.iter().chain(lifecycle.refused);
        let mut states: Vec<_> = ways.flat_map(|(from, to)| [*from, *to]).collect();
        states.extend(lifecycle.content_in);
        states.extend([lifecycle.initial, DELETED]);
        states
    }

    #[test]
    fn a_new_order_is_done_once_handled_and_new_again_once_changed() {
        let marketplace = find("marketplace").unwrap();
        let to = |state, trigger| step(marketplace, state, trigger).map(|step| step.to);
        assert_eq!(to("new", Trigger::ContentHandled), Ok("done"));
        assert_eq!(to("new", Trigger::ContentRefused), Ok("rejected"));
        assert_eq!(to("rejected", Trigger::ContentChanged), Ok("new"));
        assert_eq!(to("processing", Trigger::ContentHandled), Ok("processing"));
        assert_eq!(to("cancelled", Trigger::ContentChanged), Err(Refusal::ContentFixed));
        assert_eq!(to("cancelled", Trigger::Deleted), Ok(DELETED));
    }

    proptest! {
        #[test]
        fn any_triggers_lead_to_declared_states_and_nothing_leaves_deleted(
            triggers in proptest::collection::vec(0usize..4, 0..40)
        ) {
            for lifecycle in LIFECYCLES {
                let mut state = lifecycle.initial.to_owned();
                for index in &triggers {
                    let next = step(lifecycle, &state, TRIGGERS[*index]).map(|step| step.to.to_owned());
                    if state == DELETED {
                        prop_assert_eq!(next, Err(Refusal::Deleted));
                        continue;
                    }
                    if let Ok(to) = next {
                        prop_assert!(states(lifecycle).contains(&to.as_str()), "{}", to);
                        state = to;
                    }
                }
            }
        }
    }
}
