//! What operators do on the command line: see and mend parked messages, check and draw lifecycles.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use serde::Serialize;
use shared::{
    db::Db,
    lifecycle::graph,
    output::{note, say},
    parked::{self, Details, Entry, Filter, Stuck},
};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::runtime::Handle;

use crate::config::Config;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Messages that could not be handled: see them, have them tried again, give them up
    #[command(subcommand, after_help = PARKED_EXAMPLES)]
    Parked(Parked),
    /// What does not get on by itself: orders, messages
    Stuck {
        #[command(flatten)]
        output: Output,
    },
    /// Lifecycles' files: check them, draw them
    #[command(subcommand, after_help = LIFECYCLE_EXAMPLES)]
    Lifecycle(Lifecycle),
}

const PARKED_EXAMPLES: &str = "\
Settings come before the command: worker --postgres-dsn postgres://… parked list

Examples:
  worker parked list --state dead
  worker parked show 17
  worker parked redrive --topic payment-results
  worker parked discard --id 17";

const LIFECYCLE_EXAMPLES: &str = "\
Examples:
  worker lifecycle check my.toml
  LIFECYCLES_DIR=. worker lifecycle graph my > my.mmd    # a Mermaid diagram: mermaid.live draws it";

#[derive(Debug, Subcommand)]
pub enum Parked {
    /// List them, the oldest first; those that are done or discarded only by --state or --id
    List {
        #[command(flatten)]
        filter: Filter,
        /// Most of them
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(i64).range(1..=parked::MAX_LIMIT))]
        limit: i64,
        /// Only those after this id
        #[arg(long, default_value_t = 0)]
        after: i64,
        #[command(flatten)]
        output: Output,
    },
    /// Show one whole: body, headers, every attempt's error
    Show {
        /// Its number in the list
        id: i64,
        #[command(flatten)]
        output: Output,
    },
    /// Have dead ones tried again, but for conflicts; those that wait behind them follow in their
    /// sequence
    Redrive {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        output: Output,
    },
    /// Give some up, dead or not; those that wait behind them go on
    Discard {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        output: Output,
    },
}

#[derive(Args, Debug)]
pub struct Which {
    #[command(flatten)]
    filter: Filter,
    /// Every one there is, instead of some
    #[arg(long)]
    all: bool,
}

#[derive(Args, Clone, Copy, Debug)]
pub struct Output {
    /// JSON instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Subcommand)]
pub enum Lifecycle {
    /// Check a file; what is wrong is told by key, with a remedy
    Check {
        /// A TOML file
        file: PathBuf,
    },
    /// Draw a lifecycle as a Mermaid state diagram
    Graph {
        /// Of the lifecycle: one of ours, or of LIFECYCLES_DIR
        name: String,
    },
}

/// Carries out one command.
///
/// # Errors
/// When what was asked for is not there, or the database is away.
pub async fn run(config: Config, command: Command) -> anyhow::Result<()> {
    match command {
        Command::Lifecycle(Lifecycle::Check { file }) => check(&config, &file),
        Command::Lifecycle(Lifecycle::Graph { name }) => {
            let lifecycles = config.kafka.lifecycles()?;
            match lifecycles.find(&name) {
                Some(lifecycle) => say(&graph::mermaid(lifecycle)),
                None => bail!(
                    "there is no lifecycle {name}; there are {} (your own: LIFECYCLES_DIR names their folder)",
                    lifecycles.names()
                ),
            }
        }
        Command::Parked(command) => of_parked(&database(&config).await?, command).await,
        Command::Stuck { output } => {
            let stuck = parked::stuck(&database(&config).await?, config.kafka.lifecycles()?).await?;
            if output.json { json(&stuck) } else { tell_stuck(&stuck) }
        }
    }
}

async fn database(config: &Config) -> anyhow::Result<Db> {
    config.db.check()?;
    let service = &config.kafka.service.service_name;
    let db = Db::open(&config.db.postgres_dsn, service, config.db.pool(), &Handle::current())?;
    // The pool would only say that none was to be had in time, and not why.
    drop(db.pool.dedicated_connection().await?);
    Ok(db)
}

fn check(config: &Config, path: &std::path::Path) -> anyhow::Result<()> {
    let lifecycles = config.kafka.lifecycles_with(path)?;
    let lifecycle = lifecycles.first().with_context(|| format!("{} holds no lifecycle", path.display()))?;
    say(&format!(
        "{} is sound: {} states, {} transitions, receives {}, sends {}",
        lifecycle.name,
        lifecycle.states.len(),
        lifecycle.transitions.len(),
        count(lifecycle.receives.len(), "topic"),
        count(lifecycle.emits.len(), "message"),
    ))
}

fn count(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

async fn of_parked(db: &Db, command: Parked) -> anyhow::Result<()> {
    match command {
        Parked::List { filter, limit, after, output } => {
            let entries = parked::list(db, &filter, after, limit).await?;
            if output.json {
                return json(&entries);
            }
            let mut lines = table(&entries);
            if i64::try_from(entries.len()).is_ok_and(|len| len == limit)
                && let Some(last) = entries.last()
            {
                lines.push(format!("there may be more: --after {}", last.id));
            }
            say(&lines.join("\n"))
        }
        Parked::Show { id, output } => {
            let details = parked::show(db, id).await?.with_context(|| format!("there is no parked message {id}"))?;
            if output.json {
                return json(&details);
            }
            say(&shown(&details).join("\n"))
        }
        Parked::Redrive { which, output } => {
            let filter = which.filter()?;
            let count = parked::redrive(db, &filter).await?;
            if let (0, Some(id)) = (count, filter.id) {
                bail!("message {id} is not dead, is a conflict, or is not there; see worker parked show {id}");
            }
            tell(count, "to be tried again", output)?;
            if count == 0 {
                note("only dead messages are, and no conflicts: see worker parked list");
            }
            Ok(())
        }
        Parked::Discard { which, output } => {
            let filter = which.filter()?;
            let count = parked::discard(db, &filter).await?;
            if let (0, Some(id)) = (count, filter.id) {
                bail!("message {id} is done with, or is not there; see worker parked show {id}");
            }
            tell(count, "discarded", output)
        }
    }
}

impl Which {
    fn filter(self) -> anyhow::Result<Filter> {
        match (self.filter.is_empty(), self.all) {
            (true, false) => bail!("say which (--id, --order-id, --topic, --reason, --state, --kind), or --all"),
            (false, true) => bail!("--all is every one there is: leave it out to mean only some"),
            _ => {}
        }
        Ok(self.filter)
    }
}

fn tell(count: u64, what: &str, output: Output) -> anyhow::Result<()> {
    if output.json {
        return json(&serde_json::json!({ "count": count }));
    }
    say(&format!("{count} {what}"))
}

fn json<T: Serialize>(value: &T) -> anyhow::Result<()> {
    say(&serde_json::to_string_pretty(value)?)
}

fn table(entries: &[Entry]) -> Vec<String> {
    const WIDEST_REASON: usize = 60;
    let head = ["ID", "KIND", "STATE", "TRIES", "TOPIC", "ORDER", "NEXT TRY", "REASON"].map(str::to_owned);
    let mut rows = vec![head];
    for entry in entries {
        let whole = printable(entry.reason.as_deref().unwrap_or_default()).replace(['\n', '\t'], " ");
        let mut reason: String = whole.chars().take(WIDEST_REASON).collect();
        if reason.len() < whole.len() {
            reason.push('…');
        }
        rows.push([
            entry.id.to_string(),
            entry.kind.clone(),
            entry.state.clone(),
            entry.attempts.to_string(),
            printable(&entry.topic),
            entry.order_id.map_or_else(|| "-".to_owned(), |id| id.to_string()),
            entry.next_attempt_at.and_then(|at| at.format(&Rfc3339).ok()).unwrap_or_else(|| "-".to_owned()),
            reason,
        ]);
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..8).map(width).collect();
    let line = |row: &[String; 8]| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let mut lines: Vec<String> = rows.iter().map(line).collect();
    if entries.is_empty() {
        lines.push("nothing is parked".to_owned());
    }
    lines
}

fn shown(details: &Details) -> Vec<String> {
    let Details { entry, key, headers, body, errors } = details;
    let text = |text: &Option<String>| text.as_deref().map_or_else(|| "-".to_owned(), printable);
    let number = |number: Option<String>| number.unwrap_or_else(|| "-".to_owned());
    let partition = number(entry.partition.map(|n| n.to_string()));
    let offset = number(entry.offset.map(|n| n.to_string()));
    let mut lines = table(std::slice::from_ref(entry));
    lines.push(format!("\nreason   {}", text(&entry.reason)));
    lines.push(format!("place    {}/{partition}@{offset}", entry.topic));
    lines.push(format!("key      {}", text(key)));
    lines.push(format!("headers  {headers}"));
    lines.push(format!("body     {}", text(body)));
    lines.push("errors".to_owned());
    for error in errors.as_array().into_iter().flatten() {
        let field = |name: &str| error[name].as_str().unwrap_or_default().to_owned();
        lines.push(format!("  {}  {}", field("at"), printable(&field("error"))));
    }
    lines
}

/// Others wrote these: a terminal must not obey them.
fn printable(text: &str) -> String {
    let is_plain = |c: char| !c.is_control() || matches!(c, '\n' | '\t');
    text.chars().flat_map(|c| if is_plain(c) { vec![c] } else { c.escape_default().collect() }).collect()
}

fn tell_stuck(stuck: &Stuck) -> anyhow::Result<()> {
    let Stuck { overdue, unhandled, conflicts, unsent, blocked } = stuck;
    let mut lines = Vec::new();
    let at = |time: &OffsetDateTime| time.format(&Rfc3339).unwrap_or_default();
    for order in overdue {
        lines.push(format!(
            "overdue   order {} ({}, {}): due {}",
            order.order_id,
            order.lifecycle,
            order.status,
            at(&order.due_at)
        ));
    }
    for order in unhandled {
        let (id, since) = (order.order_id, at(&order.created_at));
        lines.push(format!(
            "unhandled order {id} ({}, {}): no worker has handled it since {since}",
            order.lifecycle, order.status
        ));
    }
    for message in conflicts {
        lines.push(format!(
            "conflict  message {}: {}",
            message.id,
            printable(message.reason.as_deref().unwrap_or_default())
        ));
    }
    for message in unsent {
        let since = at(&message.created_at);
        lines.push(format!(
            "unsent    order {} version {} to {}, since {since}",
            message.order_id, message.version, message.topic
        ));
    }
    for order in blocked {
        let reason = printable(order.reason.as_deref().unwrap_or_default());
        let (id, waiting) = (order.parked_id, order.waiting);
        lines.push(format!("blocked   order {}: {waiting} behind dead message {id}: {reason}", order.order_id));
    }
    let orders = overdue.len() + unhandled.len() + blocked.len();
    if orders == 0 && conflicts.is_empty() && unsent.is_empty() {
        lines.push("nothing is stuck".to_owned());
        note("(messages that nobody could read hold nothing up: worker parked list --state dead)");
    }
    say(&lines.join("\n"))
}
