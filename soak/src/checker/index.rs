//! The evidence, found quickly; and the history by requests.

use std::collections::{HashMap, HashSet};

use crate::evidence::{Evidence, Row};
use crate::history::{Heard, Record, Told};

pub(super) struct Index<'a> {
    changes: HashMap<&'a str, Vec<&'a Row>>,
    by_version: HashMap<(&'a str, i64), &'a Row>,
    causes: HashMap<&'a str, HashSet<&'a str>>,
    /// Of each order the versions that brought content, with its mark.
    content: HashMap<&'a str, Vec<(i64, Option<&'a str>)>>,
    places: HashMap<&'a str, Vec<(&'a str, i64)>>,
    status: HashMap<&'a str, &'a str>,
}

impl<'a> Index<'a> {
    pub(super) fn new(evidence: &'a Evidence) -> Self {
        let mut changes: HashMap<_, Vec<_>> = HashMap::new();
        let mut by_version = HashMap::new();
        for row in evidence.rows.iter().filter(|row| !row.ignored) {
            changes.entry(row.order.as_str()).or_default().push(row);
            by_version.insert((row.order.as_str(), row.version), row);
        }
        for rows in changes.values_mut() {
            rows.sort_by_key(|row| row.version);
        }
        let mut content: HashMap<_, Vec<_>> = HashMap::new();
        let mut places: HashMap<_, Vec<_>> = HashMap::new();
        let mut seen = HashSet::new();
        for event in &evidence.events {
            let brings_content = matches!(event.kind.as_str(), "order.created" | "order.updated");
            if brings_content && seen.insert(event.event.as_str()) {
                content.entry(event.order.as_str()).or_default().push((event.version, event.mark.as_deref()));
                if let Some(mark) = &event.mark {
                    places.entry(mark.as_str()).or_default().push((event.order.as_str(), event.version));
                }
            }
        }
        let mut causes: HashMap<_, HashSet<_>> = HashMap::new();
        for row in &evidence.rows {
            causes.entry(row.order.as_str()).or_default().insert(row.cause.as_str());
        }
        content.values_mut().for_each(|versions| versions.sort_unstable());
        Self {
            changes,
            by_version,
            causes,
            content,
            places,
            status: evidence.orders.iter().map(|order| (order.order.as_str(), order.status.as_str())).collect(),
        }
    }

    /// In the order of their versions.
    pub(super) fn changes_of(&self, order: &str) -> &[&'a Row] {
        self.changes.get(order).map_or(&[], Vec::as_slice)
    }

    /// What made the order this version.
    pub(super) fn change(&self, order: &str, version: i64) -> Option<&'a Row> {
        self.by_version.get(&(order, version)).copied()
    }

    /// Has a worker decided what this event means?
    pub(super) fn is_decided(&self, order: &str, event: &str) -> bool {
        self.causes.get(order).is_some_and(|causes| causes.contains(event))
    }

    /// The mark of the content that the order had at this version.
    pub(super) fn content_at(&self, order: &str, version: i64) -> Option<&'a str> {
        let versions = self.content.get(order)?;
        let later = versions.partition_point(|(at, _)| *at <= version);
        versions[..later].last()?.1
    }

    /// The orders and versions that have this content.
    pub(super) fn places_of(&self, mark: &str) -> &[(&'a str, i64)] {
        self.places.get(mark).map_or(&[], Vec::as_slice)
    }

    pub(super) fn status(&self, order: &str) -> Option<&'a str> {
        self.status.get(order).copied()
    }

    /// How many messages of these topics the order's history knows.
    pub(super) fn heard_of(&self, order: &str, topics: &[&str]) -> usize {
        let of_topic = |cause: &str| {
            topics.iter().any(|topic| cause.strip_prefix(topic).is_some_and(|rest| rest.starts_with(':')))
        };
        self.causes.get(order).map_or(0, |causes| causes.iter().filter(|cause| of_topic(cause)).count())
    }
}

/// What a client asked for once: all that was sent with one key, or a single request without any.
pub(super) struct Request<'a> {
    pub attempts: Vec<&'a Record>,
}

impl<'a> Request<'a> {
    pub(super) fn first(&self) -> &'a Record {
        self.attempts[0]
    }

    /// When it was sent for the first time: it may have been done since then.
    pub(super) fn begun(&self) -> f64 {
        self.attempts.iter().map(|record| record.begun).fold(f64::INFINITY, f64::min)
    }

    pub(super) fn told(&self) -> impl Iterator<Item = (&'a Record, &'a Told)> {
        self.attempts.iter().filter_map(|record| match &record.heard {
            Heard::Done(told) => Some((*record, told)),
            _ => None,
        })
    }

    /// Each time that it was sent: nothing can have come of it.
    pub(super) fn is_refused(&self) -> bool {
        self.attempts.iter().all(|record| matches!(record.heard, Heard::Refused { .. }))
    }
}

pub(super) fn requests(records: &[Record]) -> Vec<Request<'_>> {
    let mut requests: Vec<Request<'_>> = Vec::new();
    let mut by_key: HashMap<&str, usize> = HashMap::new();
    for record in records {
        match record.asked.key.as_deref() {
            Some(key) => {
                let place = *by_key.entry(key).or_insert(requests.len());
                match requests.get_mut(place) {
                    Some(request) => request.attempts.push(record),
                    None => requests.push(Request { attempts: vec![record] }),
                }
            }
            None => requests.push(Request { attempts: vec![record] }),
        }
    }
    requests
}
