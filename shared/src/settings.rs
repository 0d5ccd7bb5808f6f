//! The settings that both binaries have, and what their values may be.

mod read;

use std::{
    convert::Infallible,
    fmt,
    net::{Ipv6Addr, SocketAddr},
    ops::Deref,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, anyhow, bail};
use clap::Args;
use rdkafka::{error::KafkaError, types::RDKafkaConfRes};

use crate::{
    db::PoolSettings,
    dsn,
    lifecycle::{Lifecycle, Lifecycles},
    order::Amounts,
};
pub use read::{parse, parse_from, variables};

/// A setting that may be, or hold, a password: shown to nobody, and taken from a file too (its name with `_FILE`,
/// for each whose value `--help` hides).
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Arc<str>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

impl FromStr for Secret {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self(text.into()))
    }
}

impl Deref for Secret {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl Secret {
    /// What is given, where something is.
    #[must_use]
    pub fn given(setting: Option<&Self>) -> Option<Arc<str>> {
        setting.filter(|secret| !secret.is_empty()).map(|Self(text)| text.clone())
    }
}

/// Where PostgreSQL is.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "PostgreSQL")]
pub struct DbSettings {
    /// Connection string; sslmode (disable to verify-full) and sslrootcert are honoured
    #[arg(
        long,
        env = "POSTGRES_DSN",
        value_name = "POSTGRES_DSN",
        hide_env_values = true,
        default_value = "postgres://postgres:postgres@127.0.0.1:5432/orderstream"
    )]
    pub postgres_dsn: Secret,
    /// Most connections
    #[arg(long, env = "DB_MAX_CONNS", value_name = "DB_MAX_CONNS", default_value = "10", value_parser = clap::value_parser!(u32).range(4..=1000))]
    pub db_max_conns: u32,
    /// Connections kept open when idle
    #[arg(long, env = "DB_MIN_CONNS", value_name = "DB_MIN_CONNS", default_value = "2", value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub db_min_conns: u32,
    /// A connection older than this is replaced
    #[arg(long, env = "DB_MAX_CONN_LIFETIME", value_name = "DB_MAX_CONN_LIFETIME", default_value = "30m", value_parser = duration)]
    pub db_max_conn_lifetime: Duration,
    /// A connection idle for longer than this is closed
    #[arg(long, env = "DB_MAX_CONN_IDLE_TIME", value_name = "DB_MAX_CONN_IDLE_TIME", default_value = "5m", value_parser = duration)]
    pub db_max_conn_idle_time: Duration,
    /// How often idle connections are looked at
    #[arg(long, env = "DB_HEALTH_CHECK_PERIOD", value_name = "DB_HEALTH_CHECK_PERIOD", default_value = "30s", value_parser = duration)]
    pub db_health_check_period: Duration,
    /// Longest wait for a connection, and for a statement that reads
    #[arg(long, env = "DB_QUERY_TIMEOUT", value_name = "DB_QUERY_TIMEOUT", default_value = "2s", value_parser = duration)]
    pub db_query_timeout: Duration,
    /// Longest transaction that writes
    #[arg(long, env = "DB_WRITE_TIMEOUT", value_name = "DB_WRITE_TIMEOUT", default_value = "5s", value_parser = duration)]
    pub db_write_timeout: Duration,
}

impl DbSettings {
    /// What no single setting shows.
    ///
    /// # Errors
    /// Naming the settings that contradict each other.
    pub fn check(&self) -> anyhow::Result<()> {
        if self.db_min_conns > self.db_max_conns {
            bail!("DB_MIN_CONNS={} is more than DB_MAX_CONNS={}", self.db_min_conns, self.db_max_conns);
        }
        dsn::read(&self.postgres_dsn).map(drop).context("POSTGRES_DSN")
    }

    #[must_use]
    pub fn pool(&self) -> PoolSettings {
        PoolSettings {
            max_conns: self.db_max_conns,
            min_conns: self.db_min_conns,
            max_lifetime: self.db_max_conn_lifetime,
            idle_timeout: self.db_max_conn_idle_time,
            check_period: self.db_health_check_period,
            query_timeout: self.db_query_timeout,
            write_timeout: self.db_write_timeout,
        }
    }
}

/// Where orders are kept that were read a moment ago. Both binaries need the same.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Redis")]
pub struct CacheSettings {
    /// Redis: host:port, or redis://:password@host:port/database, or rediss:// for TLS; by default
    /// none, and every read is PostgreSQL's
    #[arg(long, env = "REDIS_ADDR", value_name = "REDIS_ADDR", hide_env_values = true)]
    pub redis_addr: Option<Secret>,
    /// Most age of what is kept there: so old may an answer be if Redis was away while its order changed
    #[arg(long, env = "CACHE_TTL", value_name = "CACHE_TTL", default_value = "30s", value_parser = duration)]
    pub cache_ttl: Duration,
}

/// Where Kafka is, and what the topics are called.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Kafka")]
pub struct KafkaSettings {
    /// Brokers, separated by commas
    #[arg(long, env = "KAFKA_BROKERS", value_name = "KAFKA_BROKERS", default_value = "127.0.0.1:9092", value_parser = brokers)]
    pub kafka_brokers: String,
    /// Any librdkafka properties: security.protocol=SASL_SSL,sasl.username=…
    #[arg(long, env = "KAFKA_CONFIG", value_name = "KAFKA_CONFIG", hide_env_values = true, default_value = "")]
    pub kafka_config: KafkaConfig,
    /// Partitions of topics that we make
    #[arg(long, env = "KAFKA_PARTITIONS", value_name = "KAFKA_PARTITIONS", default_value = "8", value_parser = clap::value_parser!(i32).range(1..=10_000))]
    pub kafka_partitions: i32,
    /// Copies of topics that we make; -1: the broker's default
    #[arg(
        long,
        env = "KAFKA_REPLICATION_FACTOR",
        value_name = "KAFKA_REPLICATION_FACTOR",
        default_value = "-1",
        allow_negative_numbers = true,
        value_parser = copies
    )]
    pub kafka_replication_factor: i32,
    /// What clients did to orders
    #[arg(long, env = "ORDERS_EVENTS_TOPIC", value_name = "ORDERS_EVENTS_TOPIC", default_value = "orders.events", value_parser = topic)]
    pub orders_events_topic: String,
    /// The worker's answers
    #[arg(long, env = "ORDERS_ACK_TOPIC", value_name = "ORDERS_ACK_TOPIC", default_value = "orders.ack", value_parser = topic)]
    pub orders_ack_topic: String,
    /// Folder of lifecycles (*.toml) beside the release's own, or in their place by name
    #[arg(long, env = "LIFECYCLES_DIR", value_name = "LIFECYCLES_DIR")]
    pub lifecycles_dir: Option<PathBuf>,
    /// payable: an order comes to a multiple of its currency's smallest unit, else it is refused; exact: to anything
    #[arg(long, env = "AMOUNTS", value_name = "AMOUNTS", default_value = "payable")]
    pub amounts: Amounts,
    /// Age in milliseconds at which the sweeper sends a message that its writer did not
    #[arg(long, env = "OUTBOX_GRACE_MS", value_name = "OUTBOX_GRACE_MS", default_value = "10000", value_parser = clap::value_parser!(u64).range(7_000..=3_600_000))]
    pub outbox_grace_ms: u64,
    #[command(flatten)]
    pub service: ServiceSettings,
}

/// How the process shows itself.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Process")]
pub struct ServiceSettings {
    /// development, or anything else (production): that warns of topics with a single copy
    #[arg(long, env = "ENVIRONMENT", value_name = "ENVIRONMENT", default_value = "development")]
    pub environment: String,
    /// Name under which PostgreSQL (application_name) and Kafka (client.id) see us
    #[arg(long, env = "SERVICE_NAME", value_name = "SERVICE_NAME", default_value = "orderstream")]
    pub service_name: String,
    /// text or json
    #[arg(long, env = "LOG_FORMAT", value_name = "LOG_FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// error, warn, info, debug, trace, or a filter such as info,worker=debug
    #[arg(long, env = "LOG_LEVEL", value_name = "LOG_LEVEL", default_value = "info")]
    pub log_level: String,
    /// On SIGTERM: not ready, but still accepting for so long
    #[arg(long, env = "SHUTDOWN_GRACE_MS", value_name = "SHUTDOWN_GRACE_MS", default_value = "1000")]
    pub shutdown_grace_ms: u64,
    /// On SIGTERM: all must be finished within this time
    #[arg(long, env = "SHUTDOWN_TIMEOUT_MS", value_name = "SHUTDOWN_TIMEOUT_MS", default_value = "15000")]
    pub shutdown_timeout_ms: u64,
}

impl KafkaSettings {
    /// What no single setting shows.
    ///
    /// # Errors
    /// Naming the settings that contradict each other.
    pub fn check(&self) -> anyhow::Result<()> {
        let service = &self.service;
        if self.orders_events_topic == self.orders_ack_topic {
            bail!("ORDERS_EVENTS_TOPIC and ORDERS_ACK_TOPIC are both {}", self.orders_ack_topic);
        }
        // What is promised of an order stands on these (DESIGN 6.2, 6.3), by each of their names.
        const OURS: [&str; 7] = [
            "message.timeout.ms",
            "delivery.timeout.ms",
            "enable.idempotence",
            "acks",
            "request.required.acks",
            "enable.auto.offset.store",
            "enable.auto.commit",
        ];
        if let Some((key, _)) = self.kafka_config.0.iter().find(|(key, _)| OURS.contains(&key.as_str())) {
            bail!("KAFKA_CONFIG: {key} is not for settings to choose; take it out");
        }
        if service.shutdown_grace_ms > service.shutdown_timeout_ms {
            let (grace, timeout) = (service.shutdown_grace_ms, service.shutdown_timeout_ms);
            bail!("SHUTDOWN_GRACE_MS={grace} is more than SHUTDOWN_TIMEOUT_MS={timeout}");
        }
        Ok(())
    }

    #[must_use]
    pub fn is_development(&self) -> bool {
        self.service.environment == "development"
    }

    /// Reads and checks the lifecycles' files; their topics and times may be variables of the
    /// environment or of `.env`.
    ///
    /// # Errors
    /// Naming file, key and remedy.
    pub fn lifecycles(&self) -> anyhow::Result<&'static Lifecycles> {
        Lifecycles::load(self.lifecycles_folder(), &self.own_topics(), self.amounts, &variables())
    }

    /// The lifecycle of one file, first, and those that it would stand beside, which it must not
    /// clash with.
    ///
    /// # Errors
    /// Naming file, key and remedy.
    pub fn lifecycles_with(&self, file: &Path) -> anyhow::Result<Vec<Lifecycle>> {
        Lifecycles::with(file, self.lifecycles_folder(), &self.own_topics(), &variables())
    }

    fn lifecycles_folder(&self) -> Option<&Path> {
        self.lifecycles_dir.as_deref().filter(|folder| !folder.as_os_str().is_empty())
    }

    fn own_topics(&self) -> [&str; 2] {
        [&self.orders_events_topic, &self.orders_ack_topic]
    }

    #[must_use]
    pub fn outbox_grace(&self) -> Duration {
        Duration::from_millis(self.outbox_grace_ms)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

/// librdkafka properties, as `key=value,key=value`.
#[derive(Clone, Default)]
pub struct KafkaConfig(pub Vec<(String, String)>);

impl fmt::Debug for KafkaConfig {
    /// Names only: values may be passwords.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(key, _)| key)).finish()
    }
}

impl FromStr for KafkaConfig {
    type Err = String;

    /// Between commas or on lines; in a file there may be comments beside them.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut pairs: Vec<(String, String)> = Vec::new();
        let mut before = '\n';
        for part in text.split_inclusive([',', '\n']) {
            let (part, after) = match part.strip_suffix([',', '\n']) {
                Some(rest) => (rest, part.chars().next_back().unwrap_or(',')),
                None => (part, ','),
            };
            let before = std::mem::replace(&mut before, after);
            if part.trim().is_empty() || (before == '\n' && part.trim_start().starts_with('#')) {
                continue;
            }
            match (part.split_once('='), pairs.last_mut()) {
                (Some((key, value)), _) if is_property(key.trim()) => {
                    pairs.push((key.trim().to_owned(), value.trim().to_owned()));
                }
                // A value with a comma in it, such as a list of cipher suites or a JAAS line; or with several lines,
                // such as a certificate.
                (_, Some((_, value))) => {
                    value.push(before);
                    value.push_str(part.trim_end_matches('\r'));
                }
                // Without what it says: that may be a password.
                (_, None) => {
                    return Err(
                        "does not begin with a property of librdkafka, as security.protocol=SASL_SSL is".to_owned()
                    );
                }
            }
        }
        Ok(Self(pairs))
    }
}

impl KafkaConfig {
    /// Why librdkafka does not take these properties, without their values.
    #[must_use]
    pub fn refusal(&self, error: KafkaError) -> anyhow::Error {
        let KafkaError::ClientConfig(code, _, key, _) = error else {
            return anyhow::Error::new(error).context("KAFKA_CONFIG");
        };
        let is_secret = |key: &str| ["password", "secret", "pem", "config"].iter().any(|word| key.contains(word));
        let before = self.0.iter().take_while(|(name, _)| *name != key).last();
        match before.map(|(name, _)| name).filter(|name| is_secret(name)) {
            // What is behind a comma in a password would look like one.
            Some(name) => anyhow!("KAFKA_CONFIG: what is behind the value of {name} is not for librdkafka"),
            None if code == RDKafkaConfRes::RD_KAFKA_CONF_UNKNOWN => {
                anyhow!("KAFKA_CONFIG: librdkafka has no property {key}")
            }
            None => anyhow!("KAFKA_CONFIG: librdkafka does not take the value of {key}"),
        }
    }
}

/// Properties are `a.b.c`, or one of few words without a dot; what else stands before an equals
/// sign is part of the value before it.
fn is_property(key: &str) -> bool {
    const WORDS: [&str; 4] = ["acks", "debug", "retries", "partitioner"];
    let is_name = key.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '_'));
    is_name && (key.contains('.') || WORDS.contains(&key))
}

/// Where a listener binds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listen {
    Off,
    At(SocketAddr),
    /// At this port of 127.0.0.1 and of `::1`.
    Loopback(u16),
}

impl FromStr for Listen {
    type Err = String;

    /// `8080`, `:8080`, `127.0.0.1:8080`, `[::1]:8080`, `0` for a free one, or `off`. A port alone is one of all
    /// interfaces, in both families.
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(Self::Off);
        }
        let port = text.strip_prefix(':').unwrap_or(text);
        if let Ok(port) = port.parse::<u16>() {
            return Ok(Self::At((Ipv6Addr::UNSPECIFIED, port).into()));
        }
        text.parse()
            .map(Self::At)
            .map_err(|_| "must be a port (8080 or :8080; 0: a free one), an address and port, or off".to_owned())
    }
}

fn copies(text: &str) -> Result<i32, String> {
    match text.parse() {
        Ok(copies @ (-1 | 1..=1000)) => Ok(copies),
        _ => Err("must be -1 (the broker's default) or 1 and more".to_owned()),
    }
}

/// `host:9092,host:9092`; librdkafka would take anything, and connect to nothing.
fn brokers(text: &str) -> Result<String, String> {
    let is_broker = |part: &str| match part.rsplit_once(':') {
        // [::1] alone is an address without a port.
        Some((host, port)) if !port.ends_with(']') => {
            !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0)
        }
        _ => !part.is_empty(),
    };
    // A user and a password are in KAFKA_CONFIG.
    let is_broker = |part: &str| !part.contains(|c: char| c.is_whitespace() || c == '@') && is_broker(part);
    let brokers: Vec<&str> = text.split(',').map(str::trim).collect();
    match brokers.iter().all(|broker| is_broker(broker)) {
        // librdkafka would take a line break for a part of the name.
        true => Ok(brokers.join(",")),
        false => Err("must be host:port,host:port".to_owned()),
    }
}

/// The name of a topic, as Kafka has it (org.apache.kafka.common.internals.Topic).
///
/// # Errors
/// Saying what a name may be.
pub fn topic(text: &str) -> Result<String, String> {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if (1..=249).contains(&text.len()) && text != "." && text != ".." && text.chars().all(legal) {
        Ok(text.to_owned())
    } else {
        Err("must be the name of a topic: up to 249 letters, digits, ., _ and -".to_owned())
    }
}

/// `30m`, `1h30m`, `500ms`, as Go prints them. Shorter would only burn the processor, and longer
/// is not what anybody means.
pub fn duration(text: &str) -> Result<Duration, String> {
    const RANGE: std::ops::RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_secs(7 * 24 * 3600);
    match humantime::parse_duration(text) {
        Ok(duration) if RANGE.contains(&duration) => Ok(duration),
        Ok(_) => Err("must be from 10ms to 7days".to_owned()),
        Err(_) => Err("must be a duration such as 500ms, 30s or 1h30m".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kafka_properties_may_hold_commas_and_are_not_shown() {
        let config: KafkaConfig =
            "security.protocol=SASL_SSL, ssl.cipher.suites=A,B,sasl.password=p=w".parse().unwrap();
        let expected = [("security.protocol", "SASL_SSL"), ("ssl.cipher.suites", "A,B"), ("sasl.password", "p=w")];
        assert_eq!(config.0, expected.map(|(k, v)| (k.to_owned(), v.to_owned())));
        assert!(!format!("{config:?}").contains("p=w"));
    }

    #[test]
    fn kafka_properties_may_be_lines_with_comments_and_certificates() {
        let config: KafkaConfig = "# ours\r\nsecurity.protocol=SSL\r\n\n  ssl.ca.pem=-----BEGIN\nMII/+=\r\n-----END\n#sasl.username=x\nacks=all,debug=x".parse().unwrap();
        let expected = [
            ("security.protocol", "SSL"),
            ("ssl.ca.pem", "-----BEGIN\nMII/+=\n-----END"),
            ("acks", "all"),
            ("debug", "x"),
        ];
        assert_eq!(config.0, expected.map(|(k, v)| (k.to_owned(), v.to_owned())));
    }

    #[test]
    fn what_librdkafka_does_not_take_is_told_by_name_and_not_what_may_be_of_a_password() {
        let told = |config: &str| {
            let config: KafkaConfig = config.parse().unwrap();
            let mut client = rdkafka::ClientConfig::new();
            for (key, value) in &config.0 {
                client.set(key, value);
            }
            let made: Result<rdkafka::producer::BaseProducer, _> = client.create();
            format!("{:#}", config.refusal(made.err().unwrap()))
        };
        let unknown = told("no.such.property=s3cret");
        assert!(unknown.contains("no property no.such.property") && !unknown.contains("s3cret"), "{unknown}");
        let value = told("security.protocol=s3cret");
        assert!(value.contains("security.protocol") && !value.contains("s3cret"), "{value}");
        let behind = told("sasl.password=one,s3cret.x=two");
        assert!(behind.contains("sasl.password") && !behind.contains("s3cret") && !behind.contains("two"), "{behind}");
    }

    #[test]
    fn brokers_may_stand_on_lines() {
        assert_eq!(brokers("k1:9092,\n  k2:9092 , [::1]:9092").unwrap(), "k1:9092,k2:9092,[::1]:9092");
        for bad in ["", "a b", "k1:99999", "u:p@k1:9092", "k1:9092,,k2"] {
            assert!(brokers(bad).is_err(), "{bad}");
        }
    }
}
