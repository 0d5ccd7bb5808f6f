//! Judges what clients heard, and what is there at the end. It knows what is promised, and nothing of how
//! that is kept: it shares no code with the service.

mod index;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::evidence::{Evidence, Row};
use crate::history::{Heard, Operation, Record, Seen, Told};
use crate::messages::{PAYMENTS, SHIPMENTS};

use index::{Index, Request, requests};

/// A promise that was broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub rule: &'static str,
    pub order: Option<String>,
    pub what: String,
}

/// All that is wrong.
pub fn judge(records: &[Record], evidence: &Evidence) -> Vec<Finding> {
    let index = Index::new(evidence);
    let requests = requests(records);
    let mut judge = Judge { evidence, index, requests, findings: Vec::new() };
    judge.histories();
    judge.topic();
    judge.requests();
    judge.content();
    judge.conditions();
    judge.real_time(records);
    judge.reads(records);
    judge.messages();
    judge.ends();
    judge.findings
}

struct Judge<'a> {
    evidence: &'a Evidence,
    index: Index<'a>,
    requests: Vec<Request<'a>>,
    findings: Vec<Finding>,
}

impl Judge<'_> {
    fn find(&mut self, rule: &'static str, order: impl Into<Option<String>>, what: String) {
        self.findings.push(Finding { rule, order: order.into(), what });
    }

    /// Each order's versions rise from 1 without a gap, each goes on where the last one left it, and the order
    /// is as the last one says.
    fn histories(&mut self) {
        const RULE: &str = "versions without a gap";
        let mut wrong = Vec::new();
        for order in &self.evidence.orders {
            let rows = self.index.changes_of(&order.order);
            let versions: Vec<_> = rows.iter().map(|row| row.version).collect();
            if versions != (1..=order.version).collect::<Vec<_>>() {
                wrong.push((
                    order.order.clone(),
                    format!("it is at version {}, its history has {versions:?}", order.version),
                ));
            } else if rows.last().is_some_and(|row| row.to != order.status) {
                wrong.push((order.order.clone(), format!("it is {}, its history ends otherwise", order.status)));
            }
            for pair in rows.windows(2) {
                if pair[1].from.as_ref() != Some(&pair[0].to) {
                    wrong.push((
                        order.order.clone(),
                        format!("version {} came from {:?}", pair[1].version, pair[1].from),
                    ));
                }
            }
        }
        let known: HashSet<_> = self.evidence.orders.iter().map(|order| &order.order).collect();
        let strangers: HashSet<_> =
            self.evidence.rows.iter().map(|row| &row.order).filter(|order| !known.contains(order)).collect();
        wrong
            .extend(strangers.into_iter().map(|order| (order.clone(), "it has a history and is not there".to_owned())));
        let mut causes = HashSet::new();
        for row in &self.evidence.rows {
            if !causes.insert((&row.order, &row.cause)) {
                wrong.push((row.order.clone(), format!("it has two rows of the cause {}", row.cause)));
            }
        }
        for (order, what) in wrong {
            self.find(RULE, order, what);
        }
    }

    /// Each event of a history is on the topic, no other is, and an order's events appear in the order of
    /// their versions.
    fn topic(&mut self) {
        const RULE: &str = "events rise on the topic";
        let told: HashMap<&str, &Row> =
            self.evidence.rows.iter().filter_map(|row| Some((row.event.as_deref()?, row))).collect();
        let mut wrong = Vec::new();
        let mut seen = HashSet::new();
        let mut last: HashMap<&str, (i32, i64)> = HashMap::new();
        for event in &self.evidence.events {
            let place = format!("at {}/{}", event.partition, event.offset);
            let order = event.order.clone();
            match told.get(event.event.as_str()) {
                Some(row) if row.order == event.order && row.version == event.version && event.key == event.order => {}
                Some(row) => {
                    wrong.push((order.clone(), format!("{event:?} {place} is told otherwise in the history: {row:?}")))
                }
                None => wrong.push((order.clone(), format!("event {} {place} is in no history", event.event))),
            }
            if !seen.insert(event.event.as_str()) {
                continue;
            }
            let (partition, version) = last.entry(&event.order).or_insert((event.partition, 0));
            if *partition != event.partition {
                wrong.push((order.clone(), format!("it is on partitions {partition} and {}", event.partition)));
            }
            if event.version <= *version {
                wrong.push((order, format!("version {} appears after {version}, {place}", event.version)));
            }
            *version = event.version.max(*version);
        }
        for (event, row) in told {
            if !seen.contains(event) {
                wrong.push((row.order.clone(), format!("the event of version {} is not on the topic", row.version)));
            }
        }
        for (order, what) in wrong {
            self.find(RULE, order, what);
        }
    }

    /// What was accepted is there, as it was told; what was answered is of the version that it names; and no
    /// answer is one that the question does not allow.
    fn requests(&mut self) {
        let mut wrong = Vec::new();
        for request in &self.requests {
            let mut outcomes = HashSet::new();
            for (record, told) in request.told() {
                outcomes.insert((&told.order, told.version));
                if record.asked.order.as_ref().is_some_and(|order| *order != told.order) {
                    wrong.push((
                        "answers are one's own",
                        told.order.clone(),
                        format!("asked of another order: {record:?}"),
                    ));
                }
                match self.index.change(&told.order, told.version) {
                    None => wrong.push((
                        "accepted is there",
                        told.order.clone(),
                        format!("no version {} of {record:?}", told.version),
                    )),
                    Some(row) if !made_by(record.asked.operation, record.asked.to.as_deref(), row) => {
                        wrong.push((
                            "accepted is there",
                            told.order.clone(),
                            format!("{row:?} is not what was asked for: {record:?}"),
                        ));
                    }
                    Some(row) => wrong.extend(
                        self.answer(record, told, row)
                            .map(|what| ("answers are of their version", told.order.clone(), what)),
                    ),
                }
            }
            if outcomes.len() > 1 {
                let order = request.told().next().map(|(_, told)| told.order.clone()).unwrap_or_default();
                wrong.push((
                    "a repeat is told the first outcome",
                    order,
                    format!("{outcomes:?} of {:?}", request.first().asked),
                ));
            }
            for record in &request.attempts {
                if let Heard::Refused { status, problem, .. } = &record.heard
                    && !may_be_refused(record, *status, problem)
                {
                    let order = record.asked.order.clone().unwrap_or_default();
                    wrong.push(("answers fit the question", order, format!("{record:?}")));
                }
            }
        }
        for (rule, order, what) in wrong {
            self.find(rule, order, what);
        }
    }

    /// What is wrong with an answer to a change that `row` is.
    fn answer(&self, record: &Record, told: &Told, row: &Row) -> Option<String> {
        let state = self.index.change(&told.order, told.order_version);
        if told.order_version < told.version || state.is_none_or(|state| state.to != told.order_status) {
            return Some(format!(
                "the order was never {} at version {}: {record:?}",
                told.order_status, told.order_version
            ));
        }
        let is_content = matches!(record.asked.operation, Operation::Create | Operation::Update);
        if !is_content || !record.asked.waits || told.status == 202 {
            return None;
        }
        // The worker's answer.
        let is_decided = row.event.as_ref().is_some_and(|event| self.index.is_decided(&told.order, event));
        if !is_decided {
            return Some(format!("it is answered as handled, and no worker has handled it: {record:?}"));
        }
        if told.superseded_by.is_none() && told.amount != record.asked.amount {
            return Some(format!("another amount than this content comes to: {record:?}"));
        }
        None
    }

    /// Content is there once if it was accepted, and never twice; not at all if it was refused.
    fn content(&mut self) {
        let mut wrong = Vec::new();
        for request in &self.requests {
            let Some(mark) = &request.first().asked.mark else { continue };
            let places = self.index.places_of(mark);
            let text = || format!("{places:?} have the content of {:?}", request.attempts);
            let order = places.first().map(|(order, _)| (*order).to_owned());
            match request.told().next() {
                Some((_, told)) if places != [(told.order.as_str(), told.version)] => {
                    wrong.push(("accepted is there once", Some(told.order.clone()), text()));
                }
                None if places.len() > 1 => wrong.push(("nothing is done twice", order, text())),
                None if !places.is_empty() && request.is_refused() => {
                    wrong.push(("refused is not there", order, text()))
                }
                _ => {}
            }
        }
        // The order itself has the content of its last create or update.
        for order in &self.evidence.orders {
            let last = self.index.content_at(&order.order, order.version);
            if last != order.mark.as_deref() {
                let what = format!("it has the content {:?}, its last event {last:?}", order.mark);
                wrong.push(("accepted is there once", Some(order.order.clone()), what));
            }
        }
        for (rule, order, what) in wrong {
            self.find(rule, order, what);
        }
    }

    /// A change on a condition is made on the version that it names; one that was refused found another.
    fn conditions(&mut self) {
        const RULE: &str = "conditional updates are linearizable";
        let mut wrong = Vec::new();
        // When a version was first asked for, where a client made it.
        let mut asked_at = HashMap::new();
        for request in &self.requests {
            for (_, told) in request.told() {
                let asked = asked_at.entry((told.order.as_str(), told.version)).or_insert(f64::INFINITY);
                *asked = request.begun().min(*asked);
            }
        }
        for request in &self.requests {
            let first = request.first();
            let (Some(expected), Some(order)) = (first.asked.expected, &first.asked.order) else { continue };
            if first.asked.operation != Operation::Update {
                continue;
            }
            for (record, told) in request.told() {
                if told.version != expected + 1 {
                    wrong.push((order.clone(), format!("it was not made on version {expected}: {record:?}")));
                }
            }
            for record in &request.attempts {
                if !matches!(record.heard, Heard::Refused { status: 412, .. }) {
                    continue;
                }
                let next = asked_at.get(&(order.as_str(), expected + 1));
                if self.index.change(order, expected + 1).is_none() || next.is_some_and(|asked| *asked > record.ended) {
                    wrong.push((order.clone(), format!("it was still at version {expected}: {record:?}")));
                }
            }
        }
        for (order, what) in wrong {
            self.find(RULE, order, what);
        }
    }

    /// What was answered before something else was asked comes before it.
    fn real_time(&mut self, records: &[Record]) {
        let mut wrong = Vec::new();
        // What is known of an order, and since when.
        let mut known: HashMap<&str, Vec<(f64, i64)>> = HashMap::new();
        for request in &self.requests {
            for (record, told) in request.told() {
                known.entry(&told.order).or_default().push((record.ended, told.version));
            }
        }
        for record in records {
            for seen in seen(record) {
                known.entry(&seen.order).or_default().push((record.ended, seen.version));
            }
        }
        let known = Known::new(known);
        for request in &self.requests {
            let begun = request.begun();
            for (record, told) in request.told() {
                let before = known.before(&told.order, begun);
                let is_new = matches!(record.asked.operation, Operation::Create | Operation::Update);
                if told.version < before || (is_new && told.version == before) {
                    wrong.push((
                        "changes follow what was known",
                        told.order.clone(),
                        format!("version {before} was known before: {record:?}"),
                    ));
                }
            }
        }
        for record in records {
            if record.asked.operation == Operation::Watch {
                continue;
            }
            for seen in seen(record) {
                let before = known.before(&seen.order, record.begun);
                if seen.version < before {
                    wrong.push((
                        "reads are not stale",
                        seen.order.clone(),
                        format!("version {before} was known before: {record:?}"),
                    ));
                }
            }
        }
        for (rule, order, what) in wrong {
            self.find(rule, order, what);
        }
    }

    /// An order is read as it was at the version that comes with it; who watches sees each change once, in
    /// turn.
    fn reads(&mut self, records: &[Record]) {
        let mut wrong = Vec::new();
        for record in records {
            let mut orders = HashSet::new();
            let mut last = record.asked.expected.unwrap_or_default();
            for seen in seen(record) {
                let row = self.index.change(&seen.order, seen.version);
                if row.is_none_or(|row| row.to != seen.status) {
                    wrong.push((
                        "reads are of their version",
                        seen.order.clone(),
                        format!("never was {seen:?}: {record:?}"),
                    ));
                }
                match record.asked.operation {
                    Operation::Watch => {
                        if seen.version != last + 1 {
                            wrong.push((
                                "who watches misses nothing",
                                seen.order.clone(),
                                format!("{} after {last}: {record:?}", seen.version),
                            ));
                        }
                        last = seen.version;
                    }
                    _ => {
                        if seen.mark.as_deref() != self.index.content_at(&seen.order, seen.version) {
                            wrong.push((
                                "reads are of their version",
                                seen.order.clone(),
                                format!("not its content: {seen:?}"),
                            ));
                        }
                        if !orders.insert(&seen.order) {
                            wrong.push(("a list has each order once", seen.order.clone(), format!("{record:?}")));
                        }
                    }
                }
            }
        }
        for (rule, order, what) in wrong {
            self.find(rule, order, what);
        }
    }

    /// Messages of others that were sent are in the history, each once, and have moved the order.
    fn messages(&mut self) {
        const RULE: &str = "messages of others count once";
        let mut wrong = Vec::new();
        // Of each order: what was told for sure, and what perhaps.
        let mut told: BTreeMap<&str, Vec<(&str, bool)>> = BTreeMap::new();
        for request in &self.requests {
            let asked = &request.first().asked;
            if let (Operation::Message, Some(order), Some(says)) = (asked.operation, &asked.order, &asked.to) {
                let is_sent = request.attempts.iter().any(|record| matches!(record.heard, Heard::Sent(..)));
                told.entry(order).or_default().push((says, is_sent));
            }
        }
        for (order, said) in told {
            let heard = self.index.heard_of(order, &[PAYMENTS, SHIPMENTS]);
            let sent = said.iter().filter(|(_, is_sent)| *is_sent).count();
            if heard < sent || heard > said.len() {
                wrong.push((order, format!("{heard} messages were heard of {said:?}")));
            }
            let status = self.index.status(order);
            let all_sent = |what: &[&str]| what.iter().all(|says| said.contains(&(says, true)));
            let expected = if all_sent(&["success"]) {
                "PAID"
            } else if all_sent(&["failed"]) {
                "FAILED"
            } else if all_sent(&[
                "PaymentCompleted",
                "ShipmentStarted",
                "PackageArrivedAtPickupStore",
                "PackagePickedUp",
            ]) {
                "Completed"
            } else {
                continue;
            };
            if status != Some(expected) {
                wrong.push((order, format!("it is {status:?} after {said:?}")));
            }
        }
        let wrong: Vec<_> = wrong.into_iter().map(|(order, what)| (order.to_owned(), what)).collect();
        for (order, what) in wrong {
            self.find(RULE, order, what);
        }
    }

    /// Nothing is left behind.
    fn ends(&mut self) {
        for left in self.evidence.left.clone() {
            self.find("nothing is left behind", None, left);
        }
        for panic in self.evidence.panics.clone() {
            self.find("nobody panics", None, panic);
        }
    }
}

/// Is this row what such a request makes, or finds where there is nothing to do?
fn made_by(operation: Operation, to: Option<&str>, row: &Row) -> bool {
    match operation {
        Operation::Create => row.kind == "order.created",
        Operation::Update => row.kind == "order.updated",
        Operation::Delete => row.kind == "order.deleted",
        Operation::Move => to == Some(&row.to),
        Operation::Message | Operation::Get | Operation::List | Operation::Watch => false,
    }
}

/// Our clients ask for nothing that is wrong, but others may have been quicker.
fn may_be_refused(record: &Record, status: u16, problem: &str) -> bool {
    match record.asked.operation {
        Operation::Update => {
            (status == 412 && record.asked.expected.is_some())
                || (status == 409 && matches!(problem, "conflict" | "deleted"))
        }
        Operation::Move => status == 409 && matches!(problem, "conflict" | "deleted"),
        _ => false,
    }
}

fn seen(record: &Record) -> impl Iterator<Item = &Seen> {
    let seen: &[Seen] = match &record.heard {
        Heard::Seen(seen) => seen,
        _ => &[],
    };
    seen.iter()
}

/// The highest version of each order that anybody knew of at a time.
struct Known<'a>(HashMap<&'a str, Vec<(f64, i64)>>);

impl<'a> Known<'a> {
    fn new(mut known: HashMap<&'a str, Vec<(f64, i64)>>) -> Self {
        for times in known.values_mut() {
            times.sort_by(|(one, _), (other, _)| one.total_cmp(other));
            let mut highest = 0;
            for (_, version) in times {
                highest = highest.max(*version);
                *version = highest;
            }
        }
        Self(known)
    }

    fn before(&self, order: &str, time: f64) -> i64 {
        let Some(times) = self.0.get(order) else { return 0 };
        let later = times.partition_point(|(at, _)| *at < time);
        later.checked_sub(1).map_or(0, |last| times[last].1)
    }
}
