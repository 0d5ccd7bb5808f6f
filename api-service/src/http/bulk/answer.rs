//! What a bulk request is answered: a line per order, and at the end a summary, without which the
//! answer is not whole.

use bytes::{BufMut as _, BytesMut};
use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

use crate::{
    error::Problem,
    orders::{Done, Operation, Progress},
};

#[derive(Serialize)]
#[serde(untagged)]
enum AnswerLine<'a> {
    Done {
        line: u64,
        status: u16,
        outcome: &'static str,
        order_id: Uuid,
        version: i64,
        order_status: &'a str,
        order_version: i64,
        correlation_id: Uuid,
    },
    Refused {
        line: u64,
        status: u16,
        problem: Value,
    },
}

/// What has been answered so far.
#[derive(Debug, Default, Serialize)]
pub(super) struct Summary {
    lines: u64,
    created: u64,
    updated: u64,
    deleted: u64,
    repeated: u64,
    failed: u64,
    complete: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
}

impl Summary {
    pub(super) fn done(&mut self, into: &mut BytesMut, line: u64, done: &Done) {
        self.lines += 1;
        let (status, outcome, count) = match (done.operation, done.progress) {
            (_, Progress::Repeated) => (200, "repeated", &mut self.repeated),
            (Operation::Created, _) => (201, "created", &mut self.created),
            (Operation::Updated | Operation::Moved, _) => (200, "updated", &mut self.updated),
            (Operation::Deleted, _) => (200, "deleted", &mut self.deleted),
        };
        *count += 1;
        metrics::counter!("orderstream_bulk_lines_total", "outcome" => outcome).increment(1);
        let answer = AnswerLine::Done {
            line,
            status,
            outcome,
            order_id: done.order_id,
            version: done.version,
            order_status: &done.state.status,
            order_version: done.state.version,
            correlation_id: done.correlation_id,
        };
        write(into, &answer);
    }

    pub(super) fn refused(&mut self, into: &mut BytesMut, line: u64, problem: &Problem) {
        self.lines += 1;
        self.failed += 1;
        metrics::counter!("orderstream_bulk_lines_total", "outcome" => "failed").increment(1);
        let (status, problem) = problem.describe();
        write(into, &AnswerLine::Refused { line, status: status.as_u16(), problem });
    }

    /// The last line. `reason` says why lines of the body may be without an answer.
    pub(super) fn end(mut self, into: &mut BytesMut, reason: Option<&'static str>) {
        #[derive(Serialize)]
        struct Last {
            summary: Summary,
        }
        (self.complete, self.reason) = (reason.is_none(), reason);
        write(into, &Last { summary: self });
    }
}

fn write(into: &mut BytesMut, line: &impl Serialize) {
    // Our own types always serialize, and a buffer takes all.
    let _ = serde_json::to_writer((&mut *into).writer(), line);
    into.put_u8(b'\n');
}
