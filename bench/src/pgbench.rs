//! The ceiling: what PostgreSQL itself does on this machine in this hour, measured with pgbench.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde::Serialize;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::runtime::{Builder, Runtime};
use tokio_postgres::{Client, Statement};

use client::latency::Latencies;

use crate::database::{self, Database};
use crate::load_orders::Bodies;

/// One order and its outbox row in one statement.
const SCRIPT: &str = include_str!("../order.pgbench.sql");
/// As the targets are stated.
const CLIENTS: u32 = 64;
/// pgbench's own: more would take cores from PostgreSQL.
const THREADS: u32 = 2;

/// Columns and keys as the service's tables have them, without its partitions.
const TABLES: &str = "
    drop schema if exists ceiling cascade;
    create schema ceiling;
    create table ceiling.orders (
        order_id uuid primary key,
        user_id text not null,
        external_id text,
        lifecycle text not null,
        status text not null,
        version bigint not null,
        content_version bigint not null,
        amount numeric,
        currency text,
        items json,
        payload json,
        created_at timestamptz not null,
        updated_at timestamptz not null
    );
    create table ceiling.outbox (
        order_id uuid not null,
        version bigint not null,
        seq smallint not null default 0,
        topic text not null,
        key text not null,
        headers json not null,
        body text not null,
        created_at timestamptz not null default clock_timestamp(),
        primary key (order_id, version, seq)
    );";

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figures {
    pub transactions_per_second: f64,
    pub latency_average_ms: f64,
}

/// What one transaction takes when nothing else runs: the price of a commit.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct SingleCommits {
    pub p50_ms: f64,
    pub p99_ms: f64,
}

/// As many as it does, by many clients.
pub async fn run(database: &Database, seconds: u64) -> anyhow::Result<Figures> {
    let arguments = ["-c", &CLIENTS.to_string(), "-j", &THREADS.to_string()].map(str::to_owned);
    let text = pgbench(database, seconds, &arguments).await?;
    parse(&text).with_context(|| format!("pgbench said:\n{text}"))
}

/// One client, one transaction after the other; what it logs of each goes to `folder` for a moment.
pub async fn single_commits(database: &Database, seconds: u64, folder: &Path) -> anyhow::Result<SingleCommits> {
    const PREFIX: &str = "single-commits";
    let prefix = folder.join(PREFIX);
    let prefix = prefix.to_str().context("a folder of the benchmark is no text")?;
    pgbench(database, seconds, &["-c", "1", "-l", "--log-prefix", prefix].map(str::to_owned)).await?;
    let mut latencies = Latencies::new()?;
    for entry in std::fs::read_dir(folder).context("looking for pgbench's log")? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            let log = std::fs::read_to_string(entry.path()).context("reading pgbench's log")?;
            std::fs::remove_file(entry.path()).context("removing pgbench's log")?;
            log.lines().filter_map(micros).for_each(|took| latencies.record(took));
        }
    }
    let of = |part| latencies.percentile_ms(part).context("pgbench logged no transaction");
    Ok(SingleCommits { p50_ms: of(50.0)?, p99_ms: of(99.0)? })
}

/// pgbench's statement by a connection of the caller's own, whose thread waits for it.
pub struct Committer {
    runtime: Runtime,
    client: Client,
    statement: Statement,
    row: (String, String),
}

impl Committer {
    /// # Errors
    /// When PostgreSQL is not there, or [`make_tables`] was not called before.
    pub fn connect(dsn: &str) -> anyhow::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build().context("starting a runtime")?;
        let (client, statement) = runtime.block_on(async {
            let client = database::connect(dsn).await?;
            let statement = client.prepare(&statement()).await.context("preparing pgbench's statement")?;
            anyhow::Ok((client, statement))
        })?;
        Ok(Self { runtime, client, statement, row: bytes_of_a_row() })
    }

    pub fn commit(&self) -> anyhow::Result<()> {
        let (payload, event) = &self.row;
        let committed = async { self.client.execute(&self.statement, &[payload, event]).await };
        self.runtime.block_on(committed).context("committing a row").map(drop)
    }
}

/// pgbench's script as one statement of two parameters.
fn statement() -> String {
    let lines = SCRIPT.lines().filter(|line| !line.starts_with("\\"));
    let sql = lines.collect::<Vec<_>>().join("\n");
    sql.replace(":user_number::text", "random()::text").replace(":payload", "$1::text::json").replace(":event", "$2")
}

/// For whoever uses a [`Committer`]; they go with the next run of pgbench.
pub async fn make_tables(database: &Database) -> anyhow::Result<()> {
    database.connect().await?.batch_execute(TABLES).await.context("making pgbench's tables")
}

/// client, transaction, **microseconds**, script, second, microsecond
fn micros(line: &str) -> Option<Duration> {
    Some(Duration::from_micros(line.split_whitespace().nth(2)?.parse().ok()?))
}

/// What it printed. Empty tables each time, so that a second run finds what the first one found.
async fn pgbench(database: &Database, seconds: u64, arguments: &[String]) -> anyhow::Result<String> {
    make_tables(database).await?;
    let (payload, event) = bytes_of_a_row();
    let mut child = Command::new("pgbench")
        .args(["-n", "-M", "prepared", "-f", "-", "-T", &seconds.to_string()])
        .args(arguments)
        .args(["-D", &format!("payload={payload}"), "-D", &format!("event={event}")])
        .envs(database.program_environment()?)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("starting pgbench, which comes with PostgreSQL")?;
    let mut stdin = child.stdin.take().context("pgbench has no standard input")?;
    stdin.write_all(SCRIPT.as_bytes()).await.context("handing pgbench its script")?;
    drop(stdin);
    let output = child.wait_with_output().await.context("waiting for pgbench")?;
    let complaints = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "pgbench: {}: {}", output.status, complaints.trim());
    database
        .connect()
        .await?
        .batch_execute("drop schema ceiling cascade")
        .await
        .context("dropping pgbench's tables")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A payload like those that are sent to the service, and an event that carries it.
pub fn bytes_of_a_row() -> (String, String) {
    let payload = Bodies::new(0).typical_payload();
    let event = format!(
        r#"{{"event_id":"{id}","type":"order.created","order_id":"{id}","external_id":"{id}","user_id":"{id}","lifecycle":"marketplace","status":"new","version":1,"amount":null,"currency":"BRL","items":null,"payload":{payload},"correlation_id":"{id}","timestamp":"2026-01-01T00:00:00.000000Z"}}"#,
        id = "00000000-0000-7000-8000-000000000000"
    );
    (payload, event)
}

fn parse(text: &str) -> anyhow::Result<Figures> {
    let after = |label: &str| {
        let line = text.lines().find_map(|line| line.trim().strip_prefix(label));
        let figure = line.and_then(|rest| rest.split_whitespace().next());
        figure.with_context(|| format!("no line {label:?}"))?.parse::<f64>().with_context(|| label.to_owned())
    };
    if let Ok(failed) = after("number of failed transactions:") {
        ensure!(failed == 0.0, "{failed} transactions failed");
    }
    Ok(Figures { transactions_per_second: after("tps =")?, latency_average_ms: after("latency average =")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_transaction_is_read_from_the_log() {
        assert_eq!(micros("0 1 2038 0 1767225600 123456"), Some(Duration::from_micros(2038)));
        assert_eq!(micros("0 1"), None);
    }

    #[test]
    fn the_script_is_one_statement_of_two_parameters() {
        let sql = statement();
        assert!(sql.contains("$1::text::json") && sql.contains("$2 from new_order"), "{sql}");
        assert!(!sql.contains('\\') && !sql.contains(" :"), "{sql}");
    }

    #[test]
    fn pgbenchs_figures_are_read_and_failures_are_noticed() {
        let text = "\
pgbench (15.8)
number of transactions actually processed: 198000
number of failed transactions: 0 (0.000%)
latency average = 2.581 ms
initial connection time = 60.1 ms
tps = 24796.103 (without initial connection time)
";
        let figures = Figures { transactions_per_second: 24796.103, latency_average_ms: 2.581 };
        assert_eq!(parse(text).expect("figures"), figures);
        assert!(parse(&text.replace("transactions: 0", "transactions: 3")).is_err());
        assert!(parse("").is_err());
    }
}
