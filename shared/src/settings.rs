//! Settings from flags, the environment and `.env`, in this order, under the names of DESIGN 8.
//! clap reads flags and environment; what it cannot know (older names, `.env`) is put before the
//! flags, which therefore win.

use std::{
    collections::HashMap,
    ffi::OsString,
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use anyhow::bail;
use clap::{ArgAction, Args, Parser};

use crate::{
    db::PoolSettings,
    lifecycle::{Lifecycle, Lifecycles},
    order::Amounts,
};

/// Names that the five seed systems use for the same thing.
const OLDER_NAMES: &[(&str, &str)] = &[
    ("DATABASE_URL", "POSTGRES_DSN"),
    ("DB_CONNECTION_STRING", "POSTGRES_DSN"),
    ("DB_DSN", "POSTGRES_DSN"),
    ("KAFKA_BROKER", "KAFKA_BROKERS"),
    ("PORT", "API_PORT"),
    ("SERVER_PORT", "API_PORT"),
    ("HTTP_PORT", "API_PORT"),
    ("METRICS_PORT", "WORKER_PORT"),
    ("OTEL_SERVICE_NAME", "SERVICE_NAME"),
    ("REDIS_URL", "REDIS_ADDR"),
];

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
    pub postgres_dsn: String,
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
        Ok(())
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
    pub redis_addr: Option<String>,
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

impl std::fmt::Debug for KafkaConfig {
    /// Names only: values may be passwords.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|(key, _)| key)).finish()
    }
}

impl FromStr for KafkaConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut pairs: Vec<(String, String)> = Vec::new();
        for part in text.split(',').filter(|part| !part.trim().is_empty()) {
            match (part.split_once('='), pairs.last_mut()) {
                (Some((key, value)), _) if is_property(key.trim()) => {
                    pairs.push((key.trim().to_owned(), value.trim().to_owned()));
                }
                // A value with a comma in it, such as a list of cipher suites or a JAAS line.
                (_, Some((_, value))) => {
                    value.push(',');
                    value.push_str(part);
                }
                (Some((key, _)), None) => {
                    return Err(format!("\"{}\" is not a property of librdkafka, as security.protocol is", key.trim()));
                }
                (None, None) => return Err(format!("\"{part}\" is not a property=value")),
            }
        }
        Ok(Self(pairs))
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
}

impl FromStr for Listen {
    type Err = String;

    /// `8080`, `:8080`, `127.0.0.1:8080`, `0` for a free one, or `off`.
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(Self::Off);
        }
        let port = text.strip_prefix(':').unwrap_or(text);
        if let Ok(port) = port.parse::<u16>() {
            return Ok(Self::At(SocketAddr::from(([0, 0, 0, 0], port))));
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
    let is_broker = |part: &str| match part.trim().rsplit_once(':') {
        // [::1] alone is an address without a port.
        Some((host, port)) if !port.ends_with(']') => {
            !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0)
        }
        _ => !part.trim().is_empty(),
    };
    let is_broker = |part: &str| !part.trim().contains(char::is_whitespace) && is_broker(part);
    if text.split(',').all(is_broker) { Ok(text.to_owned()) } else { Err("must be host:port,host:port".to_owned()) }
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

/// Reads the settings of a process; prints help or an error and exits where clap does.
#[must_use]
pub fn parse<S: Parser>() -> S {
    let dotenv = dotenv().unwrap_or_else(|error| {
        eprintln!("error: .env: {error}");
        std::process::exit(2);
    });
    let environment = |name: &str| std::env::var(name).ok();
    parse_from(std::env::args_os(), environment, &dotenv).unwrap_or_else(|error| error.exit())
}

/// What lifecycles' files may name: variables of the environment, else of `.env`.
pub fn variables() -> impl Fn(&str) -> Option<String> {
    let dotenv = dotenv().unwrap_or_default();
    let is_given = |value: &String| !value.is_empty();
    move |name: &str| std::env::var(name).ok().filter(is_given).or_else(|| dotenv.get(name).cloned().filter(is_given))
}

/// The pairs of `.env`; none where there is no such file.
fn dotenv() -> Result<HashMap<String, String>, dotenvy::Error> {
    match dotenvy::from_path_iter(Path::new(".env")) {
        Ok(pairs) => pairs.collect(),
        Err(_) => Ok(HashMap::new()),
    }
}

/// As [`parse`], over any environment but clap's own reading of it.
///
/// # Errors
/// When a setting is unknown or wrong; the message names it and where it came from.
pub fn parse_from<S: Parser>(
    args: impl IntoIterator<Item = OsString>,
    environment: impl Fn(&str) -> Option<String>,
    dotenv: &HashMap<String, String>,
) -> Result<S, clap::Error> {
    let mut command = S::command().args_override_self(true);
    let mut origins = Vec::new();
    let mut supplied: Vec<OsString> = Vec::new();
    let known = command.clone();
    // A line such as JWT_KEY_FILE= says nothing, here and in .env.
    let given = |name: &str| environment(name).filter(|value| !value.is_empty());
    let in_file = |name: &str| dotenv.get(name).filter(|value| !value.is_empty()).cloned();
    for arg in known.get_arguments().filter(|arg| matches!(arg.get_action(), ArgAction::Set)) {
        let (Some(flag), Some(name)) = (arg.get_long(), arg.get_env().and_then(|name| name.to_str())) else { continue };
        match environment(name) {
            Some(value) if value.is_empty() => command = command.mut_arg(arg.get_id(), |arg| arg.env(None)),
            Some(_) => continue, // clap reads it
            None => {}
        }
        let older = || OLDER_NAMES.iter().filter(|(_, new)| *new == name).map(|(old, _)| *old);
        let found = older()
            .find_map(|old| Some((old, given(old)?)))
            .or_else(|| std::iter::once(name).chain(older()).find_map(|name| Some((name, in_file(name)?))));
        if let Some((origin, value)) = found {
            supplied.push(format!("--{flag}={value}").into());
            origins.push((format!("--{flag} "), origin));
        }
    }
    let mut args = args.into_iter();
    let all = args.next().into_iter().chain(supplied).chain(args);
    let matches = command.try_get_matches_from(all).map_err(|mut error| {
        let message = error.to_string();
        if let Some((_, origin)) = origins.iter().find(|(flag, _)| message.contains(flag.as_str())) {
            error.insert(
                clap::error::ContextKind::Suggested,
                clap::error::ContextValue::StyledStrs(vec![format!("the value came from {origin}").into()]),
            );
        }
        error
    })?;
    S::from_arg_matches(&matches)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Parser)]
    struct Both {
        #[command(flatten)]
        db: DbSettings,
        #[command(flatten)]
        kafka: KafkaSettings,
        #[arg(long, env = "API_PORT", default_value = "8080")]
        api_port: Listen,
    }

    fn settings(flags: &[&str], environment: &[(&str, &str)], dotenv: &[(&str, &str)]) -> Result<Both, String> {
        let environment: HashMap<_, _> = environment.iter().copied().collect();
        let dotenv = dotenv.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let args = std::iter::once("test").chain(flags.iter().copied()).map(OsString::from);
        parse_from(args, |name| environment.get(name).map(|v| (*v).to_owned()), &dotenv)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_flag_counts_before_the_environment_and_that_before_the_file() {
        let port = |flags, environment, dotenv| settings(flags, environment, dotenv).unwrap().api_port;
        let at = |port| Listen::At(SocketAddr::from(([0, 0, 0, 0], port)));
        assert_eq!(port(&[], &[], &[]), at(8080));
        assert_eq!(port(&[], &[], &[("API_PORT", "1")]), at(1));
        assert_eq!(port(&[], &[("PORT", ":2")], &[("API_PORT", "1")]), at(2));
        assert_eq!(port(&["--api-port", "3"], &[("PORT", ":2")], &[]), at(3));
        assert_eq!(port(&["--api-port=off"], &[], &[]), Listen::Off);
    }

    #[test]
    fn a_setting_without_a_value_is_as_good_as_none() {
        let read = settings(&[], &[], &[("API_PORT", ""), ("PORT", "7"), ("LIFECYCLES_DIR", ""), ("DB_MAX_CONNS", "")]);
        let read = read.unwrap();
        assert_eq!(read.api_port, Listen::At(SocketAddr::from(([0, 0, 0, 0], 7))));
        assert_eq!((read.kafka.lifecycles_dir, read.db.db_max_conns), (None, 10));
    }

    #[test]
    fn a_bad_value_is_refused_naming_the_setting_and_where_it_came_from() {
        for (environment, parts) in [
            (("PORT", "eighty"), ["API_PORT", "the value came from PORT", "must be a port"]),
            (("METRICS_PORT", "x"), ["", "", ""]),
        ] {
            match settings(&[], &[environment], &[]) {
                Err(message) => parts.iter().for_each(|part| assert!(message.contains(part), "{part} in {message}")),
                Ok(_) => assert_eq!(parts[0], "", "{environment:?} is not a setting here"),
            }
        }
        let message = settings(&["--db-query-timeout", "soon"], &[], &[]).unwrap_err();
        assert!(message.contains("DB_QUERY_TIMEOUT") && message.contains("30s"), "{message}");
        assert!(settings(&["--kafka-config", "nonsense"], &[], &[]).is_err());
    }

    #[test]
    fn kafka_properties_may_hold_commas_and_are_not_shown() {
        let config: KafkaConfig =
            "security.protocol=SASL_SSL, ssl.cipher.suites=A,B,sasl.password=p=w".parse().unwrap();
        let expected = [("security.protocol", "SASL_SSL"), ("ssl.cipher.suites", "A,B"), ("sasl.password", "p=w")];
        assert_eq!(config.0, expected.map(|(k, v)| (k.to_owned(), v.to_owned())));
        assert!(!format!("{config:?}").contains("p=w"));
    }
}
