//! What clients asked, and what they heard: a line of JSON each, written as it happens.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

/// One request of a client, or one message of others.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    pub id: u64,
    pub client: usize,
    pub asked: Asked,
    /// Which API; nothing for messages.
    pub via: String,
    /// Seconds since the run began.
    pub begun: f64,
    pub ended: f64,
    pub heard: Heard,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    Create,
    Update,
    Delete,
    Move,
    Message,
    Get,
    List,
    Watch,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Asked {
    pub operation: Operation,
    /// Unknown for a create.
    pub order: Option<String>,
    /// Content that nobody else sends, by which it is known again wherever it is.
    pub mark: Option<String>,
    /// What that content comes to, in hundredths.
    pub amount: Option<i64>,
    /// An idempotency key or an external id: requests with the same one are one request.
    pub key: Option<String>,
    /// `If-Match`.
    pub expected: Option<i64>,
    /// The state that a move is to lead to, or what a message says.
    pub to: Option<String>,
    /// For the worker's answer.
    pub waits: bool,
}

impl Asked {
    pub fn new(operation: Operation) -> Self {
        let (order, mark, amount, key, expected, to) = (None, None, None, None, None, None);
        Self { operation, order, mark, amount, key, expected, to, waits: false }
    }

    pub fn of(operation: Operation, order: &str) -> Self {
        Self { order: Some(order.to_owned()), ..Self::new(operation) }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Heard {
    /// Done, and this is what was said of it.
    Done(Told),
    /// Orders as they were read: one, a page of them, or what happened to one in turn.
    Seen(Vec<Seen>),
    /// A message is there: its partition and offset.
    Sent(i32, i64),
    /// Not done, says the service.
    Refused { status: u16, problem: String, body: String },
    /// Perhaps done.
    Unclear(String),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Told {
    pub status: u16,
    pub order: String,
    pub version: i64,
    pub order_version: i64,
    pub order_status: String,
    /// In hundredths.
    pub amount: Option<i64>,
    pub superseded_by: Option<i64>,
    pub replayed: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Seen {
    pub order: String,
    pub version: i64,
    pub status: String,
    pub mark: Option<String>,
}

/// Keeps what is recorded, in a file and in memory.
pub struct Recorder {
    began: Instant,
    kept: Mutex<Kept>,
}

struct Kept {
    file: BufWriter<File>,
    records: Vec<Record>,
}

impl Recorder {
    pub fn new(path: &Path) -> anyhow::Result<Self> {
        let file = File::create(path).with_context(|| format!("creating {}", path.display()))?;
        let kept = Mutex::new(Kept { file: BufWriter::new(file), records: Vec::new() });
        Ok(Self { began: Instant::now(), kept })
    }

    /// Seconds since the run began.
    pub fn now(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    pub fn record(&self, client: usize, via: &str, asked: Asked, begun: f64, heard: Heard) {
        let ended = self.now();
        let mut kept = self.kept();
        let id = kept.records.len() as u64;
        let record = Record { id, client, asked, via: via.to_owned(), begun, ended, heard };
        let line = serde_json::to_string(&record).expect("a record is JSON");
        writeln!(kept.file, "{line}").expect("writing the history");
        kept.records.push(record);
    }

    /// All that was recorded.
    pub fn finish(&self) -> Vec<Record> {
        let mut kept = self.kept();
        kept.file.flush().expect("writing the history");
        std::mem::take(&mut kept.records)
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// As it was written.
pub fn read(path: &Path) -> anyhow::Result<Vec<Record>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    text.lines().map(|line| serde_json::from_str(line).with_context(|| format!("a record: {line}"))).collect()
}
