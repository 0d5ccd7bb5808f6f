//! What operators do on the command line: see and mend parked messages, check and draw lifecycles.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use serde::Serialize;
use shared::{
    db::{self, Db},
    lifecycle::{file, graph},
    parked::{self, Details, Entry, Filter},
    settings,
};
use time::format_description::well_known::Rfc3339;

use crate::config::Config;

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Messages that could not be handled: see them, have them tried again, give them up
    #[command(subcommand)]
    Parked(Parked),
    /// Lifecycles' files: check them, draw them
    #[command(subcommand)]
    Lifecycle(Lifecycle),
}

#[derive(Debug, Subcommand)]
pub enum Parked {
    /// List them, the oldest first; those that are done or discarded only by --state
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
        id: i64,
        #[command(flatten)]
        output: Output,
    },
    /// Have dead ones tried again; those that wait behind them follow in their sequence
    Redrive {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        output: Output,
    },
    /// Give some up; those that wait behind them go on
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
    /// All of them
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
    Check { file: PathBuf },
    /// Draw a lifecycle as a Mermaid state diagram
    Graph { name: String },
}

/// Carries out one command.
///
/// # Errors
/// When what was asked for is not there, or the database is away.
pub async fn run(config: Config, command: Command) -> anyhow::Result<()> {
    match command {
        Command::Lifecycle(Lifecycle::Check { file }) => check(&file),
        Command::Lifecycle(Lifecycle::Graph { name }) => {
            let lifecycles = config.kafka.lifecycles()?;
            match lifecycles.find(&name) {
                Some(lifecycle) => print!("{}", graph::mermaid(lifecycle)),
                None => bail!("there is no lifecycle {name}; there are {}", lifecycles.names()),
            }
            Ok(())
        }
        Command::Parked(command) => {
            config.db.check()?;
            let settings = std::sync::Arc::new(config.db.pool());
            let pool = db::pool(&config.db.postgres_dsn, &config.kafka.service.service_name, &settings)?;
            of_parked(&Db { pool, settings }, command).await
        }
    }
}

fn check(path: &std::path::Path) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let lifecycle = file::read(&path.display().to_string(), &text, &settings::variables())?;
    println!(
        "{} is sound: {} states, {} transitions, receives {}, sends {}",
        lifecycle.name,
        lifecycle.states.len(),
        lifecycle.transitions.len(),
        count(lifecycle.receives.len(), "topic"),
        count(lifecycle.emits.len(), "message"),
    );
    Ok(())
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
            table(&entries);
            if i64::try_from(entries.len()).is_ok_and(|len| len == limit)
                && let Some(last) = entries.last()
            {
                println!("there may be more: --after {}", last.id);
            }
        }
        Parked::Show { id, output } => {
            let details = parked::show(db, id).await?.with_context(|| format!("there is no parked message {id}"))?;
            if output.json {
                return json(&details);
            }
            show(&details);
        }
        Parked::Redrive { which, output } => {
            let count = parked::redrive(db, &which.filter()?).await?;
            tell(count, "to be tried again", output)?;
        }
        Parked::Discard { which, output } => {
            let count = parked::discard(db, &which.filter()?).await?;
            tell(count, "discarded", output)?;
        }
    }
    Ok(())
}

impl Which {
    fn filter(self) -> anyhow::Result<Filter> {
        if self.filter.is_empty() != self.all {
            bail!("say which (--id, --order-id, --topic, --reason, --state, --kind), or --all");
        }
        Ok(self.filter)
    }
}

fn tell(count: u64, what: &str, output: Output) -> anyhow::Result<()> {
    if output.json {
        return json(&serde_json::json!({ "count": count }));
    }
    println!("{count} {what}");
    Ok(())
}

fn json<T: Serialize>(value: &T) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

fn table(entries: &[Entry]) {
    const WIDEST_REASON: usize = 60;
    let head = ["ID", "KIND", "STATE", "TRIES", "TOPIC", "ORDER", "NEXT TRY", "REASON"].map(str::to_owned);
    let mut rows = vec![head];
    for entry in entries {
        let mut reason: String = entry.reason.as_deref().unwrap_or_default().chars().take(WIDEST_REASON).collect();
        reason = reason.replace(['\n', '\r', '\t'], " ");
        rows.push([
            entry.id.to_string(),
            entry.kind.clone(),
            entry.state.clone(),
            entry.attempts.to_string(),
            entry.topic.clone(),
            entry.order_id.map_or_else(|| "-".to_owned(), |id| id.to_string()),
            entry.next_attempt_at.and_then(|at| at.format(&Rfc3339).ok()).unwrap_or_else(|| "-".to_owned()),
            reason,
        ]);
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..8).map(width).collect();
    for row in &rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        println!("{}", cells.collect::<Vec<_>>().join("  ").trim_end());
    }
    if entries.is_empty() {
        println!("nothing is parked");
    }
}

fn show(details: &Details) {
    let Details { entry, key, headers, body, errors } = details;
    let text = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    table(std::slice::from_ref(entry));
    println!("\nreason   {}", text(&entry.reason));
    let place = |number: Option<String>| number.unwrap_or_else(|| "-".to_owned());
    println!(
        "place    {}/{}@{}",
        entry.topic,
        place(entry.partition.map(|n| n.to_string())),
        place(entry.offset.map(|n| n.to_string()))
    );
    println!("key      {}", text(key));
    println!("headers  {headers}");
    println!("body     {}", text(body));
    println!("errors");
    for error in errors.as_array().into_iter().flatten() {
        let field = |name: &str| error[name].as_str().unwrap_or_default().to_owned();
        println!("  {}  {}", field("at"), field("error"));
    }
}
