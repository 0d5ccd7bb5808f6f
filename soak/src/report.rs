//! What a run tells.

use std::collections::{BTreeMap, BTreeSet};

use crate::checker::Finding;
use crate::evidence::Evidence;
use crate::history::{Heard, Operation, Record};

/// Of one rule, whole; of more of them there is only the number.
const SHOWN: usize = 3;

pub fn print_figures(records: &[Record], faults: &BTreeMap<&'static str, usize>) {
    println!("faults:");
    for (fault, count) in faults {
        println!("  {count:>6}  {fault}");
    }
    println!("operations:");
    for ((operation, outcome), count) in operations(records) {
        println!("  {count:>6}  {} {outcome}", format!("{operation:?}").to_lowercase());
    }
    let (longest, at) = longest_without_an_accepted_order(records);
    println!("longest time without an accepted order: {longest:.1} s, from second {at:.1} on");
}

pub fn operations(records: &[Record]) -> BTreeMap<(Operation, String), usize> {
    let mut counts = BTreeMap::new();
    for record in records {
        let outcome = match &record.heard {
            Heard::Done(told) => format!("{}{}", told.status, if told.replayed { ", told again" } else { "" }),
            Heard::Seen(_) => "seen".to_owned(),
            Heard::Sent(..) => "sent".to_owned(),
            Heard::Refused { status, problem, .. } => format!("{status} {problem}"),
            Heard::Unclear(_) => "unclear".to_owned(),
        };
        *counts.entry((record.asked.operation, outcome)).or_default() += 1;
    }
    counts
}

/// And when it began.
fn longest_without_an_accepted_order(records: &[Record]) -> (f64, f64) {
    let is_accepted =
        |record: &&Record| matches!((record.asked.operation, &record.heard), (Operation::Create, Heard::Done(_)));
    let mut accepted: Vec<f64> = records.iter().filter(is_accepted).map(|record| record.ended).collect();
    accepted.sort_by(f64::total_cmp);
    let gaps = accepted.windows(2).map(|pair| (pair[1] - pair[0], pair[0]));
    gaps.max_by(|one, other| one.0.total_cmp(&other.0)).unwrap_or_default()
}

/// Each with all that is known of its order.
pub fn print_findings(findings: &[Finding], records: &[Record], evidence: &Evidence) {
    let mut by_rule: BTreeMap<&str, Vec<&Finding>> = BTreeMap::new();
    for finding in findings {
        by_rule.entry(finding.rule).or_default().push(finding);
    }
    let mut told = BTreeSet::new();
    for (rule, findings) in by_rule {
        println!("NOT KEPT: {rule}: {} times", findings.len());
        for finding in findings.iter().take(SHOWN) {
            println!("- {}: {}", finding.order.as_deref().unwrap_or("all"), finding.what);
            if let Some(order) = &finding.order
                && told.insert(order)
            {
                print_order(order, records, evidence);
            }
        }
    }
}

fn print_order(order: &str, records: &[Record], evidence: &Evidence) {
    for row in evidence.rows.iter().filter(|row| row.order == order) {
        println!("    history: {row:?}");
    }
    for event in evidence.events.iter().filter(|event| event.order == order) {
        println!("    topic: {event:?}");
    }
    for record in records.iter().filter(|record| is_about(record, order)) {
        println!("    asked from {:.3} to {:.3} s: {record:?}", record.begun, record.ended);
    }
}

fn is_about(record: &Record, order: &str) -> bool {
    let is_heard = match &record.heard {
        Heard::Done(told) => told.order == order,
        Heard::Seen(seen) => record.asked.operation != Operation::List && seen.iter().any(|seen| seen.order == order),
        _ => false,
    };
    is_heard || record.asked.order.as_deref() == Some(order)
}
