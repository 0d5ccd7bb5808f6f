//! A sound run, and what is found when one thing of it is otherwise.

use super::*;
use crate::evidence::{Event, Order};
use crate::history::Asked;

/// Created, handled, updated on the condition that it is at version 2, handled, read.
fn sound() -> (Vec<Record>, Evidence) {
    let mut create = Asked::new(Operation::Create);
    (create.mark, create.amount, create.key, create.waits) = (text("m1"), Some(100), text("k1"), true);
    let mut update = Asked::of(Operation::Update, "o");
    (update.mark, update.amount, update.expected, update.waits) = (text("m2"), Some(200), Some(2), true);
    let seen = Seen { order: "o".to_owned(), version: 4, status: "done".to_owned(), mark: text("m2") };
    let records = vec![
        record(create, 1.0, Heard::Done(told(201, 1, 2, "done", 100))),
        record(update, 2.0, Heard::Done(told(200, 3, 4, "done", 200))),
        record(Asked::of(Operation::Get, "o"), 3.0, Heard::Seen(vec![seen])),
    ];
    let evidence = Evidence {
        orders: vec![Order {
            order: "o".to_owned(),
            lifecycle: "marketplace".to_owned(),
            status: "done".to_owned(),
            version: 4,
            mark: text("m2"),
        }],
        rows: vec![
            row(1, Some("e1"), "c1", "order.created", None, "new"),
            row(2, None, "e1", "handled", Some("new"), "done"),
            row(3, Some("e2"), "c2", "order.updated", Some("done"), "new"),
            row(4, None, "e2", "handled", Some("new"), "done"),
        ],
        events: vec![event(0, "e1", "order.created", 1, "m1"), event(1, "e2", "order.updated", 3, "m2")],
        ..Evidence::default()
    };
    (records, evidence)
}

fn text(text: &str) -> Option<String> {
    Some(text.to_owned())
}

fn record(asked: Asked, begun: f64, heard: Heard) -> Record {
    Record { id: 0, client: 0, asked, via: "api-1".to_owned(), begun, ended: begun + 0.5, heard }
}

fn told(status: u16, version: i64, order_version: i64, order_status: &str, amount: i64) -> Told {
    Told {
        status,
        order: "o".to_owned(),
        version,
        order_version,
        order_status: order_status.to_owned(),
        amount: Some(amount),
        superseded_by: None,
        replayed: false,
    }
}

fn row(version: i64, event: Option<&str>, cause: &str, kind: &str, from: Option<&str>, to: &str) -> Row {
    Row {
        order: "o".to_owned(),
        version,
        event: event.map(ToOwned::to_owned),
        cause: cause.to_owned(),
        kind: kind.to_owned(),
        from: from.map(ToOwned::to_owned),
        to: to.to_owned(),
        ignored: false,
        at: String::new(),
    }
}

fn event(offset: i64, event: &str, kind: &str, version: i64, mark: &str) -> Event {
    Event {
        partition: 0,
        offset,
        key: "o".to_owned(),
        event: event.to_owned(),
        order: "o".to_owned(),
        kind: kind.to_owned(),
        version,
        mark: text(mark),
    }
}

/// The rules that are broken when the sound run is changed so.
#[track_caller]
fn broken_by(change: impl FnOnce(&mut Vec<Record>, &mut Evidence)) -> Vec<&'static str> {
    let (mut records, mut evidence) = sound();
    change(&mut records, &mut evidence);
    let mut rules: Vec<_> = judge(&records, &evidence).into_iter().map(|finding| finding.rule).collect();
    rules.dedup();
    rules
}

fn heard(record: &mut Record) -> &mut Told {
    match &mut record.heard {
        Heard::Done(told) => told,
        other => panic!("{other:?}"),
    }
}

#[test]
fn nothing_is_found_in_a_sound_run() {
    let (records, evidence) = sound();
    assert_eq!(judge(&records, &evidence), []);
}

#[test]
fn an_accepted_change_that_is_not_there_is_found() {
    let rules = broken_by(|_, evidence| {
        evidence.rows.truncate(2);
        evidence.events.truncate(1);
        evidence.orders[0].version = 2;
        evidence.orders[0].mark = text("m1");
    });
    assert!(rules.contains(&"accepted is there"), "{rules:?}");
    assert!(rules.contains(&"accepted is there once"), "{rules:?}");
}

#[test]
fn a_change_that_is_there_twice_is_found_whatever_was_heard_of_it() {
    let again = |evidence: &mut Evidence| {
        evidence.orders[0].version = 6;
        evidence.rows.push(row(5, Some("e3"), "c3", "order.updated", Some("done"), "new"));
        evidence.rows.push(row(6, None, "e3", "handled", Some("new"), "done"));
        evidence.events.push(event(2, "e3", "order.updated", 5, "m2"));
    };
    assert_eq!(broken_by(|_, evidence| again(evidence)), ["accepted is there once"]);
    let unclear = broken_by(|records, evidence| {
        again(evidence);
        records[1].heard = Heard::Unclear("503".to_owned());
    });
    assert_eq!(unclear, ["nothing is done twice"]);
}

#[test]
fn what_was_perhaps_done_may_be_there_or_not() {
    let there = broken_by(|records, _| records[1].heard = Heard::Unclear("503".to_owned()));
    assert_eq!(there, [""; 0]);
    let not_there = broken_by(|records, _| {
        let mut another = records[1].clone();
        another.asked.mark = text("m3");
        another.heard = Heard::Unclear("503".to_owned());
        records.push(another);
    });
    assert_eq!(not_there, [""; 0]);
}

#[test]
fn what_was_refused_and_is_there_is_found() {
    let heard = Heard::Refused { status: 409, problem: "conflict".to_owned(), body: String::new() };
    assert_eq!(broken_by(|records, _| records[1].heard = heard), ["refused is not there"]);
}

#[test]
fn a_refusal_that_the_question_does_not_allow_is_found() {
    let rules = broken_by(|records, _| {
        let heard = Heard::Refused { status: 404, problem: "not-found".to_owned(), body: String::new() };
        records.push(record(Asked::of(Operation::Get, "o"), 4.0, heard));
    });
    assert_eq!(rules, ["answers fit the question"]);
}

#[test]
fn a_gap_in_the_versions_is_found() {
    let rules = broken_by(|_, evidence| evidence.rows[3].version = 5);
    assert!(rules.contains(&"versions without a gap"), "{rules:?}");
    assert!(rules.contains(&"answers are of their version"), "{rules:?}");
}

#[test]
fn a_cause_that_counted_twice_is_found() {
    let rules = broken_by(|_, evidence| {
        evidence.orders[0].version = 5;
        evidence.rows.push(row(5, None, "e2", "handled", Some("done"), "done"));
    });
    assert_eq!(rules, ["versions without a gap"]);
}

#[test]
fn an_answer_of_another_version_another_content_or_another_order_is_found() {
    let of_version = broken_by(|records, _| heard(&mut records[0]).order_status = "cancelled".to_owned());
    assert_eq!(of_version, ["answers are of their version"]);
    let of_content = broken_by(|records, _| heard(&mut records[1]).amount = Some(100));
    assert_eq!(of_content, ["answers are of their version"]);
    let of_order = broken_by(|records, _| records[1].asked.order = text("another"));
    assert_eq!(of_order, ["answers are one's own"]);
}

#[test]
fn an_answer_that_no_worker_has_given_is_found() {
    let rules = broken_by(|_, evidence| evidence.rows[3].cause = "another".to_owned());
    assert_eq!(rules, ["answers are of their version"]);
}

#[test]
fn a_repeat_that_is_told_something_else_is_found() {
    let rules = broken_by(|records, evidence| {
        let mut repeat = records[0].clone();
        heard(&mut repeat).order = "another".to_owned();
        records.push(repeat);
        evidence.rows.push(Row { order: "another".to_owned(), ..evidence.rows[0].clone() });
    });
    assert!(rules.contains(&"a repeat is told the first outcome"), "{rules:?}");
}

#[test]
fn a_conditional_update_that_was_made_on_another_version_is_found() {
    assert_eq!(broken_by(|records, _| records[1].asked.expected = Some(1)), ["conditional updates are linearizable"]);
    let refuse = |version, at| {
        let asked = Asked { expected: Some(version), ..Asked::of(Operation::Update, "o") };
        let heard = Heard::Refused { status: 412, problem: "precondition".to_owned(), body: String::new() };
        record(asked, at, heard)
    };
    // Nobody has changed it since, nobody had yet, somebody had.
    assert_eq!(broken_by(|records, _| records.push(refuse(4, 4.0))), ["conditional updates are linearizable"]);
    assert_eq!(broken_by(|records, _| records.push(refuse(2, 1.4))), ["conditional updates are linearizable"]);
    assert_eq!(broken_by(|records, _| records.push(refuse(2, 3.0))), [""; 0]);
}

#[test]
fn what_goes_back_behind_what_was_known_is_found() {
    let change = broken_by(|records, _| {
        records[2].begun = 1.6;
        records[2].ended = 1.7;
    });
    assert_eq!(change, ["changes follow what was known"]);
    let read = broken_by(|records, _| {
        records[2].heard =
            Heard::Seen(vec![Seen { order: "o".to_owned(), version: 2, status: "done".to_owned(), mark: text("m1") }]);
    });
    assert_eq!(read, ["reads are not stale"]);
}

#[test]
fn a_read_that_mixes_two_versions_is_found() {
    let rules = broken_by(|records, _| {
        records[2].heard =
            Heard::Seen(vec![Seen { order: "o".to_owned(), version: 4, status: "done".to_owned(), mark: text("m1") }]);
    });
    assert_eq!(rules, ["reads are of their version"]);
}

#[test]
fn a_watcher_that_missed_a_change_is_found() {
    let rules = broken_by(|records, _| {
        let seen =
            |version, status: &str| Seen { order: "o".to_owned(), version, status: status.to_owned(), mark: None };
        let asked = Asked { expected: Some(0), ..Asked::of(Operation::Watch, "o") };
        records.push(record(asked, 4.0, Heard::Seen(vec![seen(1, "new"), seen(3, "new")])));
    });
    assert_eq!(rules, ["who watches misses nothing"]);
}

#[test]
fn events_that_are_missing_strange_or_out_of_order_are_found() {
    const RULE: &str = "events rise on the topic";
    let out_of_order = broken_by(|_, evidence| evidence.events.reverse());
    assert_eq!(out_of_order, [RULE]);
    let repeated = broken_by(|_, evidence| evidence.events.push(event(2, "e1", "order.created", 1, "m1")));
    assert_eq!(repeated, [""; 0]);
    let missing = broken_by(|records, evidence| {
        evidence.events.truncate(1);
        records.truncate(1);
        evidence.orders[0].mark = text("m1");
    });
    assert_eq!(missing, [RULE]);
    let strange = broken_by(|_, evidence| evidence.events.push(event(2, "e9", "order.deleted", 5, "m2")));
    assert_eq!(strange, [RULE]);
}

#[test]
fn a_message_that_was_not_heard_or_heard_twice_is_found() {
    const RULE: &str = "messages of others count once";
    let send = |records: &mut Vec<Record>| {
        let mut asked = Asked::of(Operation::Message, "o");
        (asked.key, asked.to) = (text("payment-results/1"), text("success"));
        records.push(record(asked, 4.0, Heard::Sent(0, 0)));
    };
    let hear = |evidence: &mut Evidence, id: &str| {
        let version = evidence.orders[0].version + 1;
        let from = evidence.orders[0].status.clone();
        evidence.rows.push(row(version, None, &format!("payment-results:{id}"), "paid", Some(&from), "PAID"));
        (evidence.orders[0].version, evidence.orders[0].status) = (version, "PAID".to_owned());
    };
    assert_eq!(broken_by(|records, _| send(records)), [RULE]);
    let once = broken_by(|records, evidence| {
        send(records);
        hear(evidence, "1");
    });
    assert_eq!(once, [""; 0]);
    let twice = broken_by(|records, evidence| {
        send(records);
        hear(evidence, "1");
        hear(evidence, "2");
    });
    assert_eq!(twice, [RULE]);
}

#[test]
fn what_is_left_behind_is_found() {
    assert_eq!(broken_by(|_, evidence| evidence.left.push("unsent".to_owned())), ["nothing is left behind"]);
}
