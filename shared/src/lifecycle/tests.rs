use std::collections::HashSet;

use proptest::prelude::*;

use super::*;
use crate::order::Amounts;

fn all() -> &'static Lifecycles {
    Lifecycles::embedded().unwrap()
}

fn find(name: &str) -> &'static Lifecycle {
    all().find(name).unwrap()
}

fn to(lifecycle: &str, state: &'static str, trigger: Trigger<'_>) -> Result<String, Refusal> {
    step(find(lifecycle), state, trigger).map(|step| step.to.to_owned())
}

#[test]
fn the_files_of_the_release_are_sound() {
    assert_eq!(all().names(), "marketplace, payment, retail, shipment, stock-saga");
    for lifecycle in all().iter() {
        assert!(graph::mermaid(lifecycle).contains(&format!("[*] --> {}", lifecycle.initial)));
    }
}

#[test]
fn a_marketplace_order_is_done_once_handled_and_new_again_once_changed() {
    let to = |state, trigger| to("marketplace", state, trigger);
    assert_eq!(to("new", Trigger::ContentHandled), Ok("done".into()));
    assert_eq!(to("new", Trigger::ContentRefused), Ok("rejected".into()));
    assert_eq!(to("rejected", Trigger::ContentChanged), Ok("new".into()));
    assert_eq!(to("processing", Trigger::ContentHandled), Ok("processing".into()));
    assert_eq!(to("cancelled", Trigger::ContentChanged), Err(Refusal::ContentFixed));
    assert_eq!(to("cancelled", Trigger::Deleted), Ok(DELETED.into()));
    assert_eq!(to("done", Trigger::MovedTo("processing")), Ok("processing".into()));
    assert_eq!(to("rejected", Trigger::MovedTo("done")), Err(Refusal::Illegal { allowed: vec![] }));
}

#[test]
fn a_message_is_the_same_late_early_or_a_conflict() {
    let payment = |state, trigger| to("payment", state, Trigger::Fired(trigger));
    assert_eq!(payment("PENDING", "paid"), Ok("PAID".into()));
    assert_eq!(payment("PAID", "paid"), Err(Refusal::Same));
    assert_eq!(payment("PAID", "payment_failed"), Err(Refusal::Conflict));
    assert_eq!(payment(DELETED, "paid"), Err(Refusal::Conflict));
    let shipment = |state, trigger| to("shipment", state, Trigger::Fired(trigger));
    assert_eq!(shipment("Created", "ShipmentStarted"), Err(Refusal::Early));
    assert_eq!(shipment("WaitPickup", "ShipmentStarted"), Err(Refusal::Late));
    assert_eq!(shipment("Canceled", "ShipmentStarted"), Err(Refusal::Late));
    assert_eq!(shipment("Canceled", "PackagePickedUp"), Err(Refusal::Conflict));
}

#[test]
fn moves_by_hand_are_refused_with_what_is_allowed() {
    let retail = |state, trigger| to("retail", state, trigger);
    assert_eq!(retail("pending", Trigger::MovedTo("confirmed")), Ok("confirmed".into()));
    assert_eq!(retail("pending", Trigger::MovedTo("pending")), Err(Refusal::Same));
    let allowed = vec!["confirmed".to_owned(), "cancelled".to_owned()];
    assert_eq!(retail("pending", Trigger::MovedTo("shipped")), Err(Refusal::Illegal { allowed }));
    assert_eq!(retail("pending", Trigger::MovedTo("lost")), Err(Refusal::UnknownState));
    assert_eq!(retail("confirmed", Trigger::Cancelled), Ok("cancelled".into()));
    assert_eq!(retail("cancelled", Trigger::Cancelled), Err(Refusal::Same));
    let allowed = vec!["delivered".to_owned()];
    assert_eq!(retail("shipped", Trigger::Cancelled), Err(Refusal::Illegal { allowed }));
    assert_eq!(retail(DELETED, Trigger::Cancelled), Err(Refusal::Deleted));
}

#[test]
fn others_are_told_of_content_when_it_is_handled_and_of_states_when_they_are_entered() {
    let topics = |name, state, trigger| -> Vec<String> {
        step(find(name), state, trigger).unwrap().emits.iter().map(|emit| emit.topic.clone()).collect()
    };
    assert_eq!(topics("payment", "PENDING", Trigger::CreateHandled), ["pay-order"]);
    assert!(topics("payment", "PENDING", Trigger::ContentRefused).is_empty());
    assert!(topics("payment", "PENDING", Trigger::Fired("paid")).is_empty());
    assert_eq!(topics("stock-saga", "PENDING", Trigger::Fired("stock_reserved")), ["order_confirmed_exchange"]);
    assert_eq!(topics("shipment", "Created", Trigger::Fired("PaymentCompleted")), ["order.state.changed"]);
    assert!(topics("shipment", "Created", Trigger::CreateHandled).is_empty());
    assert!(topics("shipment", "Created", Trigger::Deleted).is_empty());
}

#[test]
fn topics_and_times_come_from_variables() {
    let variables = |name: &str| match name {
        "PAY_ORDER_TOPIC" => Some("elsewhere".to_owned()),
        "PAYMENT_TIMEOUT" => Some("15m".to_owned()),
        _ => None,
    };
    let set = Lifecycles::load(None, &["orders.events"], Amounts::Payable, &variables).unwrap();
    let payment = set.find("payment").unwrap();
    assert_eq!(payment.emits[0].topic, "elsewhere");
    assert_eq!(payment.timeout("PENDING"), Some(Duration::from_secs(900)));
    assert_eq!(find("payment").timeout("PENDING"), None);
    let clash = |_: &str| Some("orders.events".to_owned());
    let error = Lifecycles::load(None, &["orders.events"], Amounts::Payable, &|name| {
        clash(name).filter(|_| name.ends_with("TOPIC"))
    });
    let error = error.unwrap_err().to_string();
    assert!(error.contains("receives[0].topic: orders.events is our own topic; let each"), "{error}");
}

/// A file that is sound, with one thing changed.
fn flaws(change: (&str, &str)) -> String {
    const SOUND: &str = r#"
        name = "loan"
        initial = "asked"
        [states]
        asked = { code = 1 }
        lent = {}
        back = { terminal = true }
        [content]
        change_in = ["asked"]
        [[transitions]]
        from = ["asked"]
        to = "lent"
        on = ["granted"]
        [[transitions]]
        from = ["lent"]
        to = "back"
        on = ["returned", "lost"]
        by_hand = true
        [[timeouts]]
        in = "lent"
        after = "30days"
        trigger = "lost"
        [[receives]]
        topic = "desk"
        order_id = "/id"
        trigger = "/what"
        triggers = { yes = "granted", returned = "returned" }
        [[emits]]
        entering = "back"
        topic = "shelf"
        body = { id = "{order_id}" }
    "#;
    assert!(file::read("loan.toml", SOUND, &|_| None).is_ok());
    assert!(SOUND.contains(change.0), "{change:?}");
    let broken = SOUND.replacen(change.0, change.1, 1);
    match file::read("loan.toml", &broken, &|_| None) {
        Ok(_) => panic!("{change:?} is taken"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn each_flaw_of_a_file_is_named_with_its_key_and_a_remedy() {
    for (change, key, remedy) in [
        (("name = \"loan\"", "name = \"lo an\""), "name", "use up to 64 letters"),
        (("name = \"loan\"", "nam = \"loan\""), "line 2", "correct it"),
        (("initial = \"asked\"", "initial = \"begun\""), "initial", "declare it under [states]"),
        (("to = \"lent\"", "to = \"lend\""), "transitions[0].to", "or use one of asked, back, lent"),
        (("[\"lent\"]", "[\"back\"]"), "transitions[1].from", "take back out"),
        (("back = { terminal = true }", "back = {}"), "states.back", "write back = { terminal = true }"),
        (("lent = {}", "lent = {}\nlost = { terminal = true }"), "states.lost", "add a transition to it"),
        (("lent = {}", "lent = { code = 1 }"), "states.lent.code", "give each state its own"),
        (("lent = {}", "lent = {}\ndeleted = {}"), "states.deleted", "leave it out"),
        (("on = [\"granted\"]", ""), "transitions[0]", "give it triggers"),
        (("on = [\"granted\"]", "on = [\"given\"]"), "transitions[0].on", "name it in receives.triggers"),
        (("to = \"lent\"", "to = \"asked\""), "transitions[0].to", "take it out of `from`"),
        (("after = \"30days\"", "after = \"soon\""), "timeouts[0].after", "write 30s, 15m"),
        (("after = \"30days\"", "after = \"${LOAN}\""), "timeouts[0].after", "set it, or give a default"),
        (("in = \"lent\"", "in = \"asked\""), "timeouts[0].trigger", "add a transition: from = [\"asked\"]"),
        (("order_id = \"/id\"", "order_id = \"id\""), "receives[0].order_id", "begin with a slash"),
        (("yes = \"granted\"", "yes = \"granted\", no = \"refused\""), "receives[0].triggers", "add it to the `on`"),
        (("topic = \"desk\"", "topic = \"the desk\""), "receives[0].topic", "use up to 249 letters"),
        (
            ("order_id = \"/id\"", "order_id = \"/id\"\ncreates_on = [\"returned\"]"),
            "receives[0].creates_on",
            "from = [\"asked\"], on = [\"returned\"]",
        ),
        (("entering = \"back\"", ""), "emits[0]", "add entering"),
        (("entering = \"back\"", "entering = \"gone\""), "emits[0].entering", "declare it under [states]"),
        (("{order_id}", "{order}"), "emits[0].body.id", "use one of those"),
        (("{order_id}", "Order {order_id}"), "emits[0].body.id", "use one of those alone"),
        (("{order_id}", "{order_id"), "emits[0].body.id", "use one of those alone"),
        (("after = \"30days\"", "after = \"${lOAN TERM:-30days}\""), "timeouts[0].after", "use letters, digits and _"),
        (("change_in = [\"asked\"]", "change_in = [\"open\"]"), "content.change_in[0]", "declare it"),
        (("change_in = [\"asked\"]", "on_handled = \"seen\""), "content.on_handled", "on = [\"seen\"]"),
        (("[[emits]]", "[[emit]]"), "line", "correct it"),
    ] {
        let error = flaws(change);
        assert!(error.contains(&format!("loan.toml: {key}")) && error.contains(remedy), "{change:?} said: {error}");
    }
}

fn triggers(lifecycle: &'static Lifecycle) -> Vec<Trigger<'static>> {
    let mut triggers = vec![
        Trigger::ContentChanged,
        Trigger::CreateHandled,
        Trigger::ContentHandled,
        Trigger::ContentRefused,
        Trigger::Cancelled,
    ];
    triggers.extend(lifecycle.triggers().map(Trigger::Fired));
    triggers.extend(lifecycle.states.iter().map(|state| Trigger::MovedTo(&state.name)));
    triggers.extend([Trigger::Fired("nonsense"), Trigger::MovedTo("nonsense"), Trigger::Deleted]);
    triggers
}

/// What arrives for an order: a message with its cause, or somebody's hand.
#[derive(Clone, Debug)]
enum Arrival {
    Message { cause: usize, trigger: &'static str },
    Hand { to: &'static str },
}

/// An order as the worker keeps it, without the worker: what has been seen, what waits, what came of it.
#[derive(Debug)]
struct Replay {
    lifecycle: &'static Lifecycle,
    status: String,
    seen: HashSet<usize>,
    waiting: Vec<(usize, &'static str)>,
    moves: Vec<(String, String)>,
    sent: Vec<String>,
}

impl Replay {
    fn of(lifecycle: &'static Lifecycle, arrivals: &[Arrival]) -> Self {
        let (seen, waiting, moves, sent) = Default::default();
        let mut replay = Self { lifecycle, status: lifecycle.initial.clone(), seen, waiting, moves, sent };
        for arrival in arrivals {
            match arrival {
                Arrival::Message { cause, trigger } => replay.message(*cause, trigger),
                Arrival::Hand { to } => {
                    replay.apply(Trigger::MovedTo(to)).ok();
                    replay.try_waiting();
                }
            }
        }
        replay
    }

    fn apply(&mut self, trigger: Trigger<'_>) -> Result<(), Refusal> {
        let from = self.status.clone();
        let step = step(self.lifecycle, &from, trigger)?;
        let to = step.to.to_owned();
        self.sent.extend(step.emits.iter().map(|emit| emit.topic.clone()));
        self.moves.push((from.clone(), to.clone()));
        self.status = to;
        Ok(())
    }

    fn message(&mut self, cause: usize, trigger: &'static str) {
        if self.seen.contains(&cause) || self.waiting.iter().any(|(waiting, _)| *waiting == cause) {
            return;
        }
        match self.apply(Trigger::Fired(trigger)) {
            Err(Refusal::Early) => self.waiting.push((cause, trigger)),
            result => {
                self.seen.insert(cause);
                if result.is_ok() {
                    self.try_waiting();
                }
            }
        }
    }

    fn try_waiting(&mut self) {
        for (cause, trigger) in std::mem::take(&mut self.waiting) {
            self.message(cause, trigger);
        }
    }
}

proptest! {
    #[test]
    fn from_any_reachable_state_any_trigger_gives_a_declared_state_or_a_refusal(
        picks in proptest::collection::vec(0usize..1_000, 0..40)
    ) {
        for lifecycle in all().iter() {
            let triggers = triggers(lifecycle);
            let mut state = lifecycle.initial.clone();
            for pick in &picks {
                let trigger = triggers[pick % triggers.len()];
                let next = step(lifecycle, &state, trigger).map(|step| step.to.to_owned());
                let terminal = lifecycle.is_terminal(&state);
                if let Ok(to) = next {
                    prop_assert!(to == DELETED || lifecycle.state(&to).is_some(), "{}", to);
                    let declared = matches!(trigger, Trigger::ContentChanged | Trigger::Deleted);
                    prop_assert!(!terminal || declared || to == state, "{} leaves {}", to, state);
                    state = to;
                }
            }
        }
    }

    #[test]
    fn duplicates_and_late_repeats_change_nothing(
        picks in proptest::collection::vec((0usize..1_000, any::<bool>()), 0..20),
        again in proptest::collection::vec((0usize..1_000, 0usize..1_000, any::<bool>()), 0..20),
    ) {
        for lifecycle in all().iter().filter(|lifecycle| !lifecycle.receives.is_empty()) {
            let messages: Vec<&'static str> = lifecycle.triggers().collect();
            let mut arrivals: Vec<Arrival> = picks
                .iter()
                .enumerate()
                .map(|(cause, (pick, by_hand))| {
                    if *by_hand {
                        Arrival::Hand { to: &lifecycle.states[pick % lifecycle.states.len()].name }
                    } else {
                        Arrival::Message { cause, trigger: messages[pick % messages.len()] }
                    }
                })
                .collect();
            let once = Replay::of(lifecycle, &arrivals);
            for (from, to, same_cause) in &again {
                if arrivals.is_empty() {
                    break;
                }
                let from = from % arrivals.len();
                // A hand's second move is a move of its own, and no repeat.
                let Arrival::Message { cause, trigger } = arrivals[from] else { continue };
                let cause = if *same_cause { cause } else { 1_000 + arrivals.len() };
                let at = from + 1 + to % (arrivals.len() - from);
                arrivals.insert(at, Arrival::Message { cause, trigger });
            }
            let repeated = Replay::of(lifecycle, &arrivals);
            prop_assert_eq!(&once.status, &repeated.status, "{:?}", arrivals);
            prop_assert_eq!(&once.moves, &repeated.moves, "{:?}", arrivals);
            prop_assert_eq!(&once.sent, &repeated.sent, "{:?}", arrivals);
        }
    }
}

#[test]
fn the_file_in_the_readme_is_sound() {
    let readme = include_str!("../../../README.md");
    let (_, rest) = readme.split_once("```toml\nname = ").unwrap();
    let (rest, _) = rest.split_once("```").unwrap();
    let lifecycle = file::read("loan.toml", &format!("name = {rest}"), &|_| None).unwrap();
    assert_eq!((lifecycle.name.as_str(), lifecycle.receives.len(), lifecycle.emits.len()), ("loan", 1, 1));
}

#[test]
fn what_a_new_order_tells_is_the_initial_states_and_new_content_that_of_where_it_leads() {
    let text = r#"
        name = "two"
        initial = "new"
        [states]
        new = {}
        changed = {}
        done = { terminal = true }
        [content]
        change_in = ["new", "changed"]
        leads_to = "changed"
        [[transitions]]
        from = ["new", "changed"]
        to = "done"
        by_hand = true
        [[emits]]
        entering = "new"
        topic = "begun"
        body = {}
        [[emits]]
        entering = "changed"
        topic = "begun-again"
        body = {}
    "#;
    let lifecycle = file::read("two.toml", text, &|_| None).unwrap();
    let told = |state, trigger| step(&lifecycle, state, trigger).unwrap().emits[0].topic.clone();
    assert_eq!(told("new", Trigger::CreateHandled), "begun");
    assert_eq!(told("changed", Trigger::ContentHandled), "begun-again");
}

#[test]
fn a_time_that_is_switched_off_moves_nothing() {
    let off = find("payment");
    assert_eq!(off.timed_out("PENDING"), None);
    assert!(!all().timed().iter().any(|timed| timed.starts_with("payment")));
}
