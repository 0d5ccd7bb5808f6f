//! `soak`: breaks the service at random under load, and judges what clients heard.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use soak::clients::{Client, Crowd};
use soak::evidence::Evidence;
use soak::history::Recorder;
use soak::nemesis::Nemesis;
use soak::stage::Stage;
use soak::{checker, evidence, history, report, schedule};

/// After the last fault; then nothing may be left behind.
const SETTLES_WITHIN: Duration = Duration::from_secs(120);

/// Orders that all clients change.
const CONTENDED: usize = 6;

/// Breaks everything at random under load, and checks what clients heard.
///
/// Ends with 1 when a promise was broken. Clients ask in the seed's order too, but what meets what is up to
/// the machine: a seed that has failed may need some runs to fail again.
#[derive(Parser)]
#[command(name = "soak", version)]
struct Args {
    /// How long things are broken.
    #[arg(long, env = "MINUTES", default_value_t = 10.0)]
    minutes: f64,

    /// Of the schedule; random without it.
    #[arg(long, env = "SEED")]
    seed: Option<u64>,

    /// At once.
    #[arg(long, env = "CLIENTS", default_value_t = 32)]
    clients: usize,

    /// Where the history, the evidence and the logs go.
    #[arg(long, value_name = "FOLDER", default_value = ".dev/soak")]
    folder: PathBuf,

    /// Runs nothing: judges once more what an earlier run has left in the folder.
    #[arg(long)]
    check: bool,
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let args = Args::parse();
    let (history, evidence) = (args.folder.join("history.jsonl"), args.folder.join("evidence.json"));
    let (records, evidence) = if args.check {
        (history::read(&history)?, Evidence::read(&evidence)?)
    } else {
        run(&args, &history, &evidence).await?
    };
    let findings = checker::judge(&records, &evidence);
    report::print_findings(&findings, &records, &evidence);
    println!(
        "{} findings in {} requests, {} orders, {} changes",
        findings.len(),
        records.len(),
        evidence.orders.len(),
        evidence.rows.len()
    );
    if findings.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    println!("the history, the tables and the logs are in {}", args.folder.display());
    Ok(ExitCode::FAILURE)
}

async fn run(args: &Args, history: &Path, kept: &Path) -> anyhow::Result<(Vec<history::Record>, Evidence)> {
    anyhow::ensure!(args.minutes > 0.0 && args.clients > 0, "some minutes, and a client at least");
    std::fs::create_dir_all(&args.folder).with_context(|| format!("creating {}", args.folder.display()))?;
    let length = Duration::from_secs_f64(args.minutes * 60.0);
    let seed = args.seed.unwrap_or_else(|| u64::from(rand::random::<u32>()));
    let schedule = schedule::schedule(seed, length);
    println!("seed {seed}: {} minutes, {} clients", args.minutes, args.clients);

    let stage = Arc::new(Stage::build(&args.folder).await);
    let crowd = Arc::new(Crowd::new(&stage, Recorder::new(history)?));
    let mut first = Client::new(Arc::clone(&crowd), seed, args.clients);
    for _ in 0..CONTENDED {
        first.add_contended().await;
    }
    let mut clients = JoinSet::new();
    for number in 0..args.clients {
        clients.spawn(Client::new(Arc::clone(&crowd), seed, number).run());
    }

    let nemesis = Nemesis::default();
    let until = Instant::now() + length;
    nemesis.run(&stage, schedule, until, || crowd.recorder.now()).await;
    let whole_at = Instant::now();
    println!("[{:6.1} s] all is whole; clients end", crowd.recorder.now());
    crowd.stop();
    while let Some(ended) = clients.join_next().await {
        if let Err(error) = ended {
            std::panic::resume_unwind(error.into_panic());
        }
    }
    let left = settle(&stage, whole_at).await?;
    println!("[{:6.1} s] {} things are left behind", crowd.recorder.now(), left.len());
    let evidence = evidence::gather(&stage, &args.folder, left).await?;
    evidence.write(kept)?;
    let records = crowd.recorder.finish();
    report::print_figures(&records, &nemesis.done());
    Ok((records, evidence))
}

/// What is left behind, at the latest when the time for that is up.
async fn settle(stage: &Stage, whole_at: Instant) -> anyhow::Result<Vec<String>> {
    let client = stage.database().await;
    loop {
        let left = evidence::left(&client).await?;
        if left.is_empty() || whole_at.elapsed() > SETTLES_WITHIN {
            return Ok(left);
        }
        sleep(Duration::from_millis(500)).await;
    }
}
