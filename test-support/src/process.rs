//! The real binaries as a test starts, kills, stops and questions them.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{BufRead, BufReader, PipeWriter, Read, Write as _, pipe};
use std::net::TcpListener;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::http::HttpClient;
use crate::wait::wait_for;

/// From the start to the line that names the address. An API whose Kafka is away may take the
/// 10 s that it waits for it.
const START_DEADLINE: Duration = Duration::from_secs(40);

/// What a failed test shows of each process.
const KEPT_LOG_LINES: usize = 400;

/// The environment of a process, all of it but for what every program needs.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    variables: BTreeMap<String, String>,
    log_file: Option<PathBuf>,
}

impl Settings {
    pub fn set(&mut self, key: &str, value: impl ToString) {
        self.variables.insert(key.to_owned(), value.to_string());
    }

    /// All that the process says is also added to this file.
    pub fn log_to(&mut self, file: PathBuf) {
        self.log_file = Some(file);
    }

    pub fn with(mut self, changes: &[(&str, &str)]) -> Self {
        for (key, value) in changes {
            self.set(key, value);
        }
        self
    }
}

/// `api-service` under test. Also an HTTP client for it.
pub struct Api(Service);

impl Api {
    /// Starts it on a free port and waits until it is ready.
    pub async fn start(settings: &Settings) -> Self {
        let api = Self::spawn(settings).await;
        api.wait_ready().await;
        api
    }

    /// Starts it and waits only until it listens.
    pub async fn spawn(settings: &Settings) -> Self {
        Self(Service::spawn("api-service", "API_PORT", settings).await)
    }

    /// Where it listens for gRPC.
    pub fn grpc_address(&self) -> String {
        let log = self.0.log.text();
        let address = log.lines().find_map(|line| line.strip_prefix("grpc: listening on "));
        address.unwrap_or_else(|| panic!("no gRPC in the log:\n{log}")).to_owned()
    }

    /// Nobody reads what it says.
    pub async fn start_unread(settings: &Settings) -> Self {
        Self(Service::start_unread("api-service", "API_PORT", settings).await)
    }

    /// A client for the operators' routes.
    pub fn admin(&self) -> HttpClient {
        let log = self.0.log.text();
        let address = log.lines().find_map(|line| line.strip_prefix("admin: listening on "));
        HttpClient::new(address.unwrap_or_else(|| panic!("no operators' routes in the log:\n{log}")))
    }
}

impl Deref for Api {
    type Target = Service;

    fn deref(&self) -> &Service {
        &self.0
    }
}

/// `worker` under test, with its port for health and metrics.
pub struct Worker(Service);

impl Worker {
    pub async fn start(settings: &Settings) -> Self {
        let worker = Self::spawn(settings).await;
        worker.wait_ready().await;
        worker
    }

    pub async fn spawn(settings: &Settings) -> Self {
        Self(Service::spawn("worker", "WORKER_PORT", settings).await)
    }

    /// Nobody reads what it says.
    pub async fn start_unread(settings: &Settings) -> Self {
        Self(Service::start_unread("worker", "WORKER_PORT", settings).await)
    }
}

impl Deref for Worker {
    type Target = Service;

    fn deref(&self) -> &Service {
        &self.0
    }
}

/// A running process and a client for its HTTP port. Killed when dropped; its log is printed when
/// the test fails, and a panic in it fails the test.
pub struct Service {
    name: &'static str,
    pid: u32,
    child: Mutex<Child>,
    log: Log,
    http: Arc<HttpClient>,
    readers: Mutex<Vec<JoinHandle<()>>>,
}

impl Service {
    async fn spawn(name: &'static str, port_key: &str, settings: &Settings) -> Self {
        let mut command = command(name, settings);
        for key in [port_key, "GRPC_PORT", "ADMIN_PORT"] {
            if !settings.variables.contains_key(key) {
                command.env(key, "127.0.0.1:0");
            }
        }
        let mut child = command.spawn().unwrap_or_else(|error| panic!("starting {name}: {error}"));
        let log = Log::to_file(settings.log_file.as_deref());
        let stderr = child.stderr.take().expect("stderr is piped");
        let stdout = child.stdout.take().expect("stdout is piped");
        let (addresses, address) = channel();
        let readers = vec![
            log.keep(stderr, |_| {}),
            log.keep(stdout, move |line| {
                if let Some(address) = line.strip_prefix("http: listening on ") {
                    let _ = addresses.send(address.trim().to_owned());
                }
            }),
        ];
        let address = tokio::task::spawn_blocking(move || first_address(&address))
            .await
            .expect("waiting for the address does not panic");
        let address = address.unwrap_or_else(|reason| {
            let _ = child.kill();
            let status = child.wait();
            panic!("{name} did not say where it listens ({reason}); exit: {status:?}; its log:\n{}", log.text())
        });
        Self {
            name,
            pid: child.id(),
            child: Mutex::new(child),
            log,
            http: Arc::new(HttpClient::new(address)),
            readers: Mutex::new(readers),
        }
    }

    async fn start_unread(name: &'static str, port_key: &str, settings: &Settings) -> Self {
        let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port");
        let address = free.to_string();
        let settings = settings.clone().with(&[("GRPC_PORT", "off"), ("ADMIN_PORT", "off"), (port_key, &address)]);
        let child = command(name, &settings).stdout(gone()).stderr(gone()).spawn();
        let child = child.unwrap_or_else(|error| panic!("starting {name}: {error}"));
        let service = Self {
            name,
            pid: child.id(),
            child: Mutex::new(child),
            log: Log::default(),
            http: Arc::new(HttpClient::new(address)),
            readers: Mutex::default(),
        };
        service.wait_ready().await;
        service
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    pub fn http(&self) -> &HttpClient {
        &self.http
    }

    /// For tasks that outlive a borrow.
    pub fn shared_http(&self) -> Arc<HttpClient> {
        Arc::clone(&self.http)
    }

    pub async fn wait_ready(&self) {
        wait_for(&format!("{} to be ready", self.name), START_DEADLINE, || async {
            if let Some(status) = self.exit_status() {
                panic!("{} ended at start with {status}; its log:\n{}", self.name, self.log.text());
            }
            match self.http.try_get("/ready").await {
                Ok(reply) if reply.status == 200 => Ok(()),
                Ok(reply) => Err(reply.summary()),
                Err(error) => Err(format!("{error:#}")),
            }
        })
        .await;
    }

    /// The end without any warning.
    pub fn kill9(&self) {
        let mut child = self.child();
        let _ = child.kill();
        let _ = child.wait();
    }

    pub fn sigterm(&self) {
        self.signal("TERM");
    }

    /// Stands still, as on a machine that swaps; connections stay open.
    pub fn sigstop(&self) {
        self.signal("STOP");
    }

    pub fn sigcont(&self) {
        self.signal("CONT");
    }

    fn signal(&self, signal: &str) {
        // Under the lock, and only while it runs: the pid cannot belong to another process.
        let mut child = self.child();
        if matches!(child.try_wait(), Ok(None)) {
            let status = Command::new("sh").args(["-c", &format!("kill -{signal} {}", child.id())]).status();
            assert!(status.is_ok_and(|status| status.success()), "sending SIG{signal} to {}", self.name);
        }
    }

    /// Waits for the process to end by itself.
    pub async fn exit_within(&self, deadline: Duration) -> ExitStatus {
        wait_for(&format!("{} to end", self.name), deadline, || async {
            self.exit_status().ok_or_else(|| format!("still running; its log:\n{}", self.log.text()))
        })
        .await
    }

    pub fn exit_status(&self) -> Option<ExitStatus> {
        self.child().try_wait().ok().flatten()
    }

    pub fn memory_kib(&self) -> u64 {
        memory_kib(self.pid)
    }

    /// The last lines of its standard error and output.
    pub fn log(&self) -> String {
        self.log.text()
    }

    /// Up and ready, whatever the test has thrown at it.
    pub async fn assert_healthy(&self) {
        assert_eq!(self.exit_status(), None, "{} has ended; its log:\n{}", self.name, self.log());
        self.http.get("/health").await.expect_status(200);
        self.http.get("/ready").await.expect_status(200);
        assert!(!self.log.saw_panic(), "{} has panicked; its log:\n{}", self.name, self.log());
    }

    fn child(&self) -> std::sync::MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.kill9();
        let readers = std::mem::take(&mut *self.readers.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
        for reader in readers {
            let _ = reader.join();
        }
        if std::thread::panicking() {
            eprintln!("--- log of {} (pid {}) ---\n{}", self.name, self.pid, self.log.text());
        } else {
            assert!(!self.log.saw_panic(), "{} has panicked; its log:\n{}", self.name, self.log.text());
        }
    }
}

/// Runs a binary that is to refuse its settings, and gives what it says about them.
pub async fn refused_at_start(name: &'static str, settings: &Settings) -> String {
    let mut command = command(name, settings);
    // What is refused should not be a port that somebody else has.
    for key in ["API_PORT", "WORKER_PORT", "GRPC_PORT", "ADMIN_PORT"] {
        if !settings.variables.contains_key(key) {
            command.env(key, "127.0.0.1:0");
        }
    }
    let mut child = command.spawn().unwrap_or_else(|error| panic!("starting {name}: {error}"));
    let log = Log::default();
    let readers = [
        log.keep(child.stderr.take().expect("stderr is piped"), |_| {}),
        log.keep(child.stdout.take().expect("stdout is piped"), |_| {}),
    ];
    let end = tokio::time::Instant::now() + START_DEADLINE;
    let status = loop {
        if let Ok(Some(status)) = child.try_wait() {
            break status;
        }
        if tokio::time::Instant::now() > end {
            let _ = child.kill();
            let _ = child.wait();
            panic!("{name} started with {settings:?}; its log:\n{}", log.text());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    for reader in readers {
        let _ = reader.join();
    }
    assert!(!status.success(), "{name} ended with {status}");
    assert!(!log.saw_panic(), "{name} has panicked; its log:\n{}", log.text());
    log.text()
}

/// Runs a command of a binary's to its end: its exit code, and what it said; what it complained of
/// only where it failed.
pub async fn run_to_end(name: &'static str, args: &[&str], settings: &Settings) -> (Option<i32>, String) {
    let mut command = command(name, settings);
    command.args(args);
    let run = tokio::task::spawn_blocking(move || command.output());
    let output = run.await.expect("no panic").unwrap_or_else(|error| panic!("running {name}: {error}"));
    let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        said.push_str(&String::from_utf8_lossy(&output.stderr));
    }
    (output.status.code(), said)
}

/// The same where nobody reads what it says: whoever did has gone already. Its exit code, and what it says
/// to itself, unless nobody reads that either.
pub async fn run_without_a_reader(
    name: &'static str,
    args: &[&str],
    settings: &Settings,
    also_of_errors: bool,
) -> (Option<i32>, String) {
    let mut command = command(name, settings);
    command.args(args).stdout(gone());
    if also_of_errors {
        command.stderr(gone());
    }
    let run = tokio::task::spawn_blocking(move || command.spawn()?.wait_with_output());
    let output = run.await.expect("no panic").unwrap_or_else(|error| panic!("running {name}: {error}"));
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// The writing end of a pipe whose reader has gone.
fn gone() -> PipeWriter {
    let (_, writer) = pipe().expect("a pipe");
    writer
}

/// Resident memory of a process, in KiB.
pub fn memory_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))
        .unwrap_or_else(|error| panic!("memory of process {pid}: {error}"));
    status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|kib| kib.parse().ok())
        .unwrap_or_else(|| panic!("no VmRSS of process {pid}"))
}

fn command(name: &str, settings: &Settings) -> Command {
    let mut command = Command::new(binary(name));
    command
        .env_clear()
        .envs(std::env::vars_os().filter(|(key, _)| {
            ["PATH", "HOME", "LANG", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "LLVM_PROFILE_FILE"]
                .iter()
                .any(|kept| key == kept)
        }))
        .env("RUST_BACKTRACE", "1")
        .envs(&settings.variables)
        // Not in the checkout: a developer's .env would be read.
        .current_dir(std::env::temp_dir())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Beside the executable: `target/<profile>/<name>` for `target/<profile>/deps/it-…` and for
/// `target/<profile>/soak`.
fn binary(name: &str) -> PathBuf {
    let running = std::env::current_exe().expect("a program knows its executable");
    let folder = running.parent().unwrap_or_else(|| panic!("{} is in no folder", running.display()));
    let profile = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    let binary = profile.join(name);
    assert!(binary.exists(), "{} is not built: run `make test`, or `cargo build --release` first", binary.display());
    binary
}

fn first_address(addresses: &Receiver<String>) -> Result<String, &'static str> {
    addresses.recv_timeout(START_DEADLINE).map_err(|error| match error {
        RecvTimeoutError::Timeout => "no line in time",
        RecvTimeoutError::Disconnected => "it ended",
    })
}

/// The last lines a process wrote.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<LogLines>>);

#[derive(Default)]
struct LogLines {
    last: VecDeque<String>,
    panicked: bool,
    /// Where all of them go, too.
    file: Option<File>,
}

impl Log {
    fn to_file(path: Option<&Path>) -> Self {
        let file = path.map(|path| {
            let file = File::options().append(true).create(true).open(path);
            file.unwrap_or_else(|error| panic!("the log file {}: {error}", path.display()))
        });
        Self(Arc::new(Mutex::new(LogLines { file, ..LogLines::default() })))
    }

    /// Reads `stream` to its end on a thread of its own, so that a full pipe never stops the
    /// process.
    fn keep(&self, stream: impl Read + Send + 'static, on_line: impl Fn(&str) + Send + 'static) -> JoinHandle<()> {
        let log = self.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stream).split(b'\n') {
                let Ok(line) = line else { break };
                let line = String::from_utf8_lossy(&line).into_owned();
                on_line(&line);
                log.add(line);
            }
        })
    }

    fn add(&self, line: String) {
        let mut lines = self.lines();
        if let Some(file) = &mut lines.file {
            let _ = writeln!(file, "{line}");
        }
        lines.panicked |= line.contains("panicked at");
        if lines.last.len() == KEPT_LOG_LINES {
            lines.last.pop_front();
        }
        lines.last.push_back(line);
    }

    fn text(&self) -> String {
        self.lines().last.iter().map(|line| format!("{line}\n")).collect()
    }

    fn saw_panic(&self) -> bool {
        self.lines().panicked
    }

    fn lines(&self) -> std::sync::MutexGuard<'_, LogLines> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_memory() {
        assert!(memory_kib(std::process::id()) > 100);
    }

    #[test]
    fn the_log_keeps_the_last_lines_and_notices_a_panic() {
        let log = Log::default();
        let mut text = "thread 'main' panicked at src/main.rs:1\n".to_owned();
        for n in 0..KEPT_LOG_LINES {
            text.push_str(&format!("line {n}\n"));
        }
        let reader = log.keep(std::io::Cursor::new(text), |_| {});
        reader.join().expect("reading");
        assert!(log.saw_panic());
        assert!(log.text().starts_with("line 0\n"));
        assert!(log.text().ends_with(&format!("line {}\n", KEPT_LOG_LINES - 1)));
    }
}
