//! A release binary as the benchmark starts, questions and stops it.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use hyper::StatusCode;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::{Instant, sleep, timeout};

use crate::http::{Address, Connection};
use crate::procfs;

/// Longer than the 10 s for which a starting API waits for Kafka.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Longer than the service's own bound (`SHUTDOWN_TIMEOUT_MS`, 15 s).
const STOP_TIMEOUT: Duration = Duration::from_secs(20);
/// Fine enough to say how long a start takes.
const POLL: Duration = Duration::from_millis(5);
const LOG_LINES_SHOWN: usize = 20;

pub struct Process {
    name: &'static str,
    child: Child,
    pid: u32,
    address: Address,
    log: PathBuf,
    /// From its start until it said so.
    pub ready_after_ms: u64,
}

impl Process {
    /// Starts the binary of this name in the folder `binaries`. Returns once it is ready. What it logs
    /// goes to a file in `folder`, which is also where it runs: a `.env` of the checkout is not for it.
    pub async fn start(
        binaries: &Path,
        name: &'static str,
        settings: &[(&str, String)],
        folder: &Path,
    ) -> anyhow::Result<Self> {
        let log = folder.join(format!("{name}.log"));
        let stderr = std::fs::File::create(&log).with_context(|| format!("creating {}", log.display()))?;
        let began = Instant::now();
        let mut child = Command::new("sh")
            // 1,000 parked callers are more files than many systems grant unasked. A session of its own,
            // as service managers and containers give to each: Linux shares the processors out by session
            // (autogroup), and else all that is started here would have what one process of PostgreSQL has.
            .args(["-c", r#"ulimit -n "$(ulimit -Hn)" || :; exec setsid "$0""#])
            .arg(binary(binaries, name)?)
            .envs(settings.iter().map(|(key, value)| (key, value)))
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        let pid = child.id().with_context(|| format!("{name} ended at once"))?;
        let stdout = child.stdout.take().context("no standard output")?;
        let ready = timeout(START_TIMEOUT, ready_at(stdout)).await;
        let address = ready.map_err(|_| anyhow::anyhow!("not ready within {START_TIMEOUT:?}")).and_then(|at| at);
        let address = address.with_context(|| format!("{name} did not start; its log ends:\n{}", tail(&log)))?;
        let ready_after_ms = u64::try_from(began.elapsed().as_millis())?;
        Ok(Self { name, child, pid, address, log, ready_after_ms })
    }

    pub fn address(&self) -> &Address {
        &self.address
    }

    pub fn resident_kib(&self) -> anyhow::Result<u64> {
        procfs::resident_kib(self.pid).with_context(|| self.dead())
    }

    pub fn cpu_time(&self) -> anyhow::Result<Duration> {
        procfs::cpu_time(self.pid).with_context(|| self.dead())
    }

    /// `STOP`, `CONT` or `TERM`. The pid is its own for as long as nobody has waited for it.
    pub async fn signal(&self, signal: &str) -> anyhow::Result<()> {
        let kill = format!("kill -{signal} {}", self.pid);
        let status = Command::new("sh").args(["-c", &kill]).status().await.context("running sh")?;
        ensure!(status.success(), "{kill}: {status}; {}", self.dead());
        Ok(())
    }

    /// In order, as an operator would; ending otherwise than with 0 is an error.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        self.signal("TERM").await?;
        let Ok(status) = timeout(STOP_TIMEOUT, self.child.wait()).await else {
            bail!("{} did not end within {STOP_TIMEOUT:?} of SIGTERM; its log ends:\n{}", self.name, tail(&self.log));
        };
        let status = status.with_context(|| format!("waiting for {}", self.name))?;
        ensure!(status.success(), "{} ended with {status}; its log ends:\n{}", self.name, tail(&self.log));
        Ok(())
    }

    fn dead(&self) -> String {
        format!("is {} still there? its log ends:\n{}", self.name, tail(&self.log))
    }
}

/// Where this very program stands, and the release binaries beside it.
pub fn own_folder() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("finding this program")?;
    Ok(own.parent().context("this program stands in no folder")?.to_owned())
}

pub fn binary(folder: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let path = folder.join(name);
    ensure!(path.exists(), "{} is not there; build it: cargo build --release -p {name}", path.display());
    Ok(path)
}

async fn ready_at(stdout: ChildStdout) -> anyhow::Result<Address> {
    let mut lines = BufReader::new(stdout).lines();
    let address = first_address(&mut lines).await?;
    // Read on to the end: a full pipe would stop the process.
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    let mut last = String::from("not asked");
    let deadline = Instant::now() + START_TIMEOUT;
    while Instant::now() < deadline {
        match is_ready(&address).await {
            Ok(StatusCode::OK) => return Ok(address),
            Ok(status) => last = status.to_string(),
            Err(error) => last = format!("{error:#}"),
        }
        sleep(POLL).await;
    }
    bail!("not ready: {last}")
}

async fn first_address(lines: &mut Lines<BufReader<ChildStdout>>) -> anyhow::Result<Address> {
    while let Some(line) = lines.next_line().await.context("reading its output")? {
        if let Some(address) = line.strip_prefix("http: listening on ") {
            return Address::parse(&format!("http://{}", address.trim()));
        }
    }
    bail!("it ended without listening")
}

async fn is_ready(address: &Address) -> anyhow::Result<StatusCode> {
    let mut connection = Connection::open(address).await?;
    Ok(connection.get(&address.path("/ready")?).await?.status)
}

fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_else(|error| error.to_string());
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..].join("\n")
}
