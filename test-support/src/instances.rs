//! Servers of a test's own, to be stopped, killed and started again, or to demand TLS and SASL.
//! The same scripts run them that `make test` uses for the shared ones.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use uuid::Uuid;

use crate::database::Dsn;
use crate::kafka::TestKafka;

/// For two that follow each other: what the other has missed while it was dead is kept, and it asks for it
/// soon.
const OF_A_PAIR: [&str; 4] = ["-c", "wal_keep_size=512MB", "-c", "wal_retrieve_retry_interval=500ms"];

/// Of each broker of a cluster: three of them share a machine of two cores with all else.
const SMALL_HEAP: &str = "-Xms64m -Xmx192m -XX:TieredStopAtLevel=1 -XX:+UseSerialGC";

/// What a server needs to be told, and what it told us.
struct Instance {
    script: PathBuf,
    directory: PathBuf,
    options: Vec<String>,
    environment: Vec<(&'static str, &'static str)>,
    values: HashMap<String, String>,
}

impl Instance {
    async fn start(script: &str, options: &[&str]) -> Self {
        let mut instance = Self::prepare(script, options);
        instance.start_again().await;
        instance
    }

    fn prepare(script: &str, options: &[&str]) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/local").join(script);
        let directory = std::env::temp_dir().join(format!("orderstream-test-{}", Uuid::now_v7().simple()));
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        Self { script, directory, options, environment: Vec::new(), values: HashMap::new() }
    }

    async fn start_again(&mut self) {
        self.start_with(&[]).await;
    }

    /// `options` are for this start alone.
    async fn start_with(&mut self, options: &[&str]) {
        let mut arguments = vec!["start".to_owned(), self.directory.display().to_string()];
        arguments.extend(self.options.iter().cloned());
        arguments.extend(options.iter().map(|option| (*option).to_owned()));
        let output = self.run(arguments).await;
        self.values = output
            .lines()
            .filter_map(|line| line.split_once('='))
            .map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned()))
            .collect();
    }

    async fn command(&self, verb: &str) {
        self.run(vec![verb.to_owned(), self.directory.display().to_string()]).await;
    }

    /// On a thread of its own: starting a server takes seconds.
    async fn run(&self, arguments: Vec<String>) -> String {
        let (script, environment) = (self.script.clone(), self.environment.clone());
        let running = tokio::task::spawn_blocking(move || {
            let shown = format!("{} {}", script.display(), arguments.join(" "));
            let mut command = Command::new(&script);
            command.args(&arguments).envs(environment);
            let output = command.output().unwrap_or_else(|error| panic!("{shown}: {error}"));
            let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            assert!(output.status.success(), "{shown}: {}\n{out}\n{err}", output.status);
            out.into_owned()
        });
        match running.await {
            Ok(output) => output,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    fn value(&self, key: &str) -> &str {
        self.values
            .get(key)
            .unwrap_or_else(|| panic!("{} said no {key}, only {:?}", self.script.display(), self.values))
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        for verb in ["kill", "remove"] {
            let _ = Command::new(&self.script).arg(verb).arg(&self.directory).output();
        }
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// A PostgreSQL for one test. Gone with its data when dropped.
pub struct PrivatePostgres(Instance);

impl PrivatePostgres {
    pub async fn start() -> Self {
        Self(Instance::start("postgres", &[]).await)
    }

    /// One that refuses connections over TCP without TLS.
    pub async fn start_with_tls() -> Self {
        Self(Instance::start("postgres", &["--tls"]).await)
    }

    /// A primary, and a copy that follows it and can only be read.
    pub(crate) async fn start_pair() -> [Self; 2] {
        let primary = Self(Instance::start("postgres", &OF_A_PAIR).await);
        let mut standby = Self(Instance::prepare("postgres", &OF_A_PAIR));
        standby.follow(&primary).await;
        [primary, standby]
    }

    /// Starts as a standby of `primary`. What it had itself is given up, unless it was one before.
    pub(crate) async fn follow(&mut self, primary: &Self) {
        let port = primary.0.value("POSTGRES_PORT").to_owned();
        self.0.start_with(&["--standby-of", &port]).await;
    }

    /// A standby is the primary from now on.
    pub(crate) async fn promote(&self) {
        self.0.command("promote").await;
    }

    pub fn dsn(&self) -> Dsn {
        Dsn::parse(self.0.value("POSTGRES_DSN"))
    }

    /// Where it writes what happens to it.
    pub fn log_file(&self) -> &Path {
        Path::new(self.0.value("POSTGRES_LOG"))
    }

    /// Stands still from now on: its connections stay, and nothing is answered.
    pub async fn freeze(&self) {
        self.0.command("freeze").await;
    }

    /// Goes on where it stood still.
    pub async fn thaw(&self) {
        self.0.command("thaw").await;
    }

    pub async fn stop(&self) {
        self.0.command("stop").await;
    }

    pub async fn kill(&self) {
        self.0.command("kill").await;
    }

    /// With its data, at the same address.
    pub async fn start_again(&mut self) {
        self.0.start_again().await;
    }
}

/// A Kafka broker for one test. Gone with its data when dropped.
pub struct PrivateKafka(Instance);

impl PrivateKafka {
    pub async fn start() -> Self {
        Self(Instance::start("kafka", &[]).await)
    }

    /// One that refuses clients without a name and password.
    pub async fn start_with_sasl() -> Self {
        Self(Instance::start("kafka", &["--sasl"]).await)
    }

    /// The `number`th of three whose controllers listen on those ports, all to be started at once: each is
    /// ready when a second one is there. Clients find it behind `advertised_port`, where that is given.
    pub(crate) async fn start_member(number: usize, controllers: [u16; 3], advertised_port: Option<u16>) -> Self {
        let [one, two, three] = controllers;
        let member = format!("{number}:{one},{two},{three}");
        let advertised = advertised_port.map(|port| port.to_string());
        let mut options = vec!["--member", &member];
        if let Some(port) = &advertised {
            options.extend(["--advertised-port", port]);
        }
        let mut instance = Instance::prepare("kafka", &options);
        instance.environment.push(("KAFKA_HEAP_OPTS", SMALL_HEAP));
        instance.start_again().await;
        Self(instance)
    }

    pub fn brokers(&self) -> &str {
        self.0.value("KAFKA_BROKERS")
    }

    /// Where it really listens for clients, past any proxy.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.0.value("KAFKA_PORT"))
    }

    /// Where it writes what happens to it.
    pub fn log_file(&self) -> &Path {
        Path::new(self.0.value("KAFKA_LOG"))
    }

    /// The librdkafka properties that clients need, as `KAFKA_CONFIG` has them: `key=value,…`;
    /// empty for an open broker.
    pub fn config(&self) -> &str {
        self.0.values.get("KAFKA_CONFIG").map_or("", String::as_str)
    }

    /// Through the network, as a client with those properties.
    pub fn client(&self) -> TestKafka {
        let properties: Vec<_> = self.config().split(',').filter_map(|pair| pair.split_once('=')).collect();
        TestKafka::at(self.brokers(), &properties)
    }

    pub async fn stop(&self) {
        self.0.command("stop").await;
    }

    pub async fn kill(&self) {
        self.0.command("kill").await;
    }

    /// Stands still from now on: its connections stay, and nothing is answered.
    pub fn freeze(&self) {
        self.signal("STOP");
    }

    /// Goes on where it stood still.
    pub fn thaw(&self) {
        self.signal("CONT");
    }

    fn signal(&self, name: &str) {
        let pid = self.0.value("KAFKA_PID");
        let status = Command::new("sh").args(["-c", &format!("kill -{name} {pid}")]).status();
        assert!(status.is_ok_and(|status| status.success()), "SIG{name} to process {pid}");
    }

    /// With its data, at the same address.
    pub async fn start_again(&mut self) {
        self.0.start_again().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::database::TestDb;
    use crate::kafka::Record;

    #[tokio::test]
    #[ignore = "starts PostgreSQL or Kafka"]
    async fn a_private_postgres_comes_back_with_its_data() {
        let mut server = PrivatePostgres::start().await;
        let mut db = TestDb::on(server.dsn()).await;
        db.execute("create table t as select 1").await;
        server.stop().await;
        server.start_again().await;
        db.reconnect().await;
        assert_eq!(db.number("select count(*) from t", &[]).await, 1);
        server.kill().await;
        server.start_again().await;
        db.reconnect().await;
        assert_eq!(db.number("select count(*) from t", &[]).await, 1);
    }

    #[tokio::test]
    #[ignore = "starts PostgreSQL or Kafka"]
    async fn a_postgres_that_demands_tls_is_reached_with_its_certificate() {
        let server = PrivatePostgres::start_with_tls().await;
        let db = TestDb::on(server.dsn()).await;
        let sql = "select count(*) from pg_stat_ssl where pid = pg_backend_pid() and ssl";
        assert_eq!(db.number(sql, &[]).await, 1);
    }

    #[tokio::test]
    #[ignore = "starts PostgreSQL or Kafka"]
    async fn a_private_kafka_comes_back_with_its_records() {
        let mut server = PrivateKafka::start_with_sasl().await;
        let kafka = server.client();
        let topic = kafka.topics().events.clone();
        kafka.create_topic(&topic, 1, &[]).await;
        kafka.produce(&topic, Record::new("key", "body")).await;
        server.stop().await;
        server.start_again().await;
        assert_eq!(kafka.read(&topic).await.len(), 1);
    }
}
