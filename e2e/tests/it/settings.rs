//! Bad settings are refused at start, by name; good ones in any of their forms.

use std::path::PathBuf;

use bytes::Bytes;
use test_support::{Method, Settings, System, Worker, beside_others, order, refused_at_start, run_to_end};

/// A file as Docker and Kubernetes hand over secrets; gone with the test.
pub struct SecretFile(PathBuf);

impl SecretFile {
    pub fn new(content: &str) -> Self {
        let path = std::env::temp_dir().join(format!("orderstream-secret-{}", uuid::Uuid::now_v7()));
        std::fs::write(&path, content).expect("writing a secret");
        Self(path)
    }

    pub fn path(&self) -> &str {
        self.0.to_str().expect("a path in UTF-8")
    }
}

impl Drop for SecretFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_settings_are_refused_by_name() {
    let _turn = beside_others().await;
    for (binary, key, value) in [
        ("api-service", "ACK_WAIT_MS", "soon"),
        // More than ACK_WAIT_MAX_MS.
        ("api-service", "ACK_WAIT_MS", "30001"),
        ("api-service", "ACK_WAIT_MAX_MS", "18446744073709551615"),
        ("api-service", "API_PORT", "off"),
        ("api-service", "MAX_BODY_BYTES", "0"),
        ("api-service", "API_PORT", "eighty"),
        ("api-service", "API_PORT", "70000"),
        ("api-service", "MAX_BODY_BYTES", "-1"),
        // Its event would not fit into a Kafka message.
        ("api-service", "MAX_BODY_BYTES", "100000000"),
        ("api-service", "DEFAULT_CURRENCY", "GOLD"),
        ("api-service", "DEFAULT_LIFECYCLE", "reincarnation"),
        ("api-service", "POSTGRES_DSN", "nowhere"),
        ("worker", "POSTGRES_DSN", "mysql://127.0.0.1/orders"),
        ("worker", "KAFKA_CONFIG", "no property"),
        ("worker", "KAFKA_CONFIG", "no.such.property=1"),
        ("worker", "KAFKA_PARTITIONS", "0"),
        ("worker", "LOG_FORMAT", "xml"),
        ("worker", "WORKER_PORT", "all"),
        ("worker", "OUTBOX_GRACE_MS", "1"),
        ("worker", "LOG_LEVEL", "loud"),
        ("worker", "DB_HEALTH_CHECK_PERIOD", "1ns"),
        ("api-service", "DB_WRITE_TIMEOUT", "30d"),
        ("api-service", "KAFKA_REPLICATION_FACTOR", "0"),
        ("api-service", "KAFKA_CONFIG", "message.timeout.ms=300000"),
        ("worker", "KAFKA_BROKERS", "127.0.0.1:99999"),
        ("api-service", "KAFKA_BROKERS", ","),
        ("api-service", "KAFKA_BROKERS", "a b"),
        ("api-service", "ORDERS_EVENTS_TOPIC", "a b"),
        ("worker", "ORDERS_ACK_TOPIC", "orders.events"),
        ("worker", "DB_MIN_CONNS", "20"),
        ("api-service", "SHUTDOWN_GRACE_MS", "20000"),
        ("api-service", "RATE_LIMIT", "0"),
        ("api-service", "RATE_LIMIT", "many"),
        ("api-service", "RATE_LIMIT_BURST", "0"),
        // Without RATE_LIMIT.
        ("api-service", "RATE_LIMIT_BURST", "5"),
        ("api-service", "CORS_ALLOWED_ORIGINS", "https://shop.example/"),
        ("api-service", "CORS_ALLOWED_ORIGINS", ",,"),
        ("api-service", "CORS_ALLOWED_HEADERS", "x-datadog-*"),
        ("api-service", "TRUSTED_PROXIES", "10.0.0.0/33"),
        ("api-service", "TRUSTED_PROXIES", "10.0.0.0/8,proxy"),
        ("api-service", "PUBLIC_PATH", "//elsewhere"),
        ("api-service", "PUBLIC_PATH", "shop-api"),
        ("api-service", "PRODUCT_SERVICE_URL", "product-service:8002"),
        ("api-service", "PRODUCT_SERVICE_TIMEOUT", "0s"),
        ("api-service", "PRODUCT_CACHE_TTL", "soon"),
    ] {
        // Blanks around it are none of it.
        let settings = Settings::default().with(&[(key, &format!(" {value}\r\n"))]);
        let said = refused_at_start(binary, &settings).await;
        assert!(said.contains(key), "{binary} with {key}={value:?} said: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_are_not_told_when_settings_are_refused() {
    let _turn = beside_others().await;
    let settings = Settings::default().with(&[
        ("POSTGRES_DSN", "postgres://user:s3cr3t@127.0.0.1:1/orders?sslmode=perhaps"),
        ("KAFKA_CONFIG", "sasl.username=user,sasl.password=h1dd3n,no.such.property=1"),
    ]);
    for binary in ["api-service", "worker"] {
        let said = refused_at_start(binary, &settings).await;
        assert!(!said.contains("s3cr3t") && !said.contains("h1dd3n"), "{binary} said: {said}");
    }
    let huge = SecretFile::new(&"s3cr3t".repeat(100_000));
    let empty = SecretFile::new("\n");
    for (binary, key, value, hint) in [
        ("api-service", "POSTGRES_DSN", "postgres://u:s3cr3t@x@127.0.0.1/d", "%40"),
        ("worker", "POSTGRES_DSN", "postgres://u:x@s3cr3t@127.0.0.1/d", "%40"),
        ("api-service", "DATABASE_URL", "postgres://u:x/s3cr3t@127.0.0.1/d", "%2F"),
        ("worker", "DB_DSN", "postgres://u:1?s3cr3t@127.0.0.1/d", "%3F"),
        ("worker", "POSTGRES_DSN", "postgres://u:x#s3cr3t@127.0.0.1/d", "%23"),
        ("worker", "POSTGRES_DSN", "postgres://u:x%s3cr3t@127.0.0.1/d", "%25"),
        ("api-service", "POSTGRES_DSN", "postgres://u:x s3cr3t@127.0.0.1/d", "%20"),
        ("worker", "POSTGRES_DSN", "postgres://u:x\ns3cr3t@127.0.0.1/d", "line break"),
        ("api-service", "POSTGRES_DSN", "host=127.0.0.1 user=u password=x s3cr3t dbname=d", "quotes"),
        ("worker", "POSTGRES_DSN", "mysql://u:s3cr3t@127.0.0.1/d?x=y", "postgres://"),
        ("api-service", "POSTGRES_DSN_FILE", "postgres://u:s3cr3t@127.0.0.1/d", "cannot be read"),
        ("worker", "POSTGRES_DSN_FILE", huge.path(), "KiB"),
        ("worker", "KAFKA_CONFIG_FILE", empty.path(), "empty"),
        ("worker", "KAFKA_CONFIG", "s3cr3t", "security.protocol"),
        ("api-service", "KAFKA_CONFIG", "sasl.password=x,s3cr3t.x=y", "sasl.password"),
        ("worker", "KAFKA_BROKERS", "kafka://u:s3cr3t@127.0.0.1:9092", "host:port"),
        ("api-service", "REDIS_ADDR", "redis://:x@s3cr3t@127.0.0.1:1", "%40"),
        ("worker", "REDIS_ADDR", "redis://:1/s3cr3t@127.0.0.1:1", "%2F"),
        ("worker", "REDIS_URL", "redis://:x#s3cr3t@127.0.0.1:1", "%23"),
        ("api-service", "PRODUCT_SERVICE_URL", "http://u:1/s3cr3t@127.0.0.1:1", "password"),
        ("api-service", "ADMIN_TOKEN", "x\ns3cr3t", "line break"),
        ("api-service", "API_PORT", "http://u:s3cr3t@127.0.0.1:1", "must be a port"),
    ] {
        let said = refused_at_start(binary, &Settings::default().with(&[(key, value)])).await;
        assert!(!said.contains("s3cr3t") && said.contains(hint), "{binary} with {key}={value:?} said: {said}");
    }
    for (name, value) in
        [("POSTGRES_DSN", "postgres://u:s3cr3t@h/d"), ("ADMIN_TOKEN", "s3cr3t"), ("JWT_SECRET", "s3cr3t")]
    {
        let file = SecretFile::new(value);
        let both = Settings::default().with(&[(name, value), (&format!("{name}_FILE"), file.path())]);
        let said = refused_at_start("api-service", &both).await;
        assert!(said.contains(&format!("{name} and {name}_FILE")) && !said.contains("s3cr3t"), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn older_names_and_forms_of_settings_serve() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let dsn = system.db.dsn().to_string();
    // As `echo` makes secrets, and editors on Windows files.
    let ends_with_a_line = format!("\u{feff}{dsn}\r\n");
    let file = SecretFile::new(&ends_with_a_line);
    let token = SecretFile::new("let-me-in\n");
    let api = system
        .api_with(&[
            ("POSTGRES_DSN", " \n"),
            ("DATABASE_URL", &ends_with_a_line),
            ("DB_MAX_CONN_LIFETIME", "1h30m\n"),
            ("LOG_FORMAT", " json"),
            ("ACK_WAIT_MS", "\u{a0}5000\t"),
            // A variable of a lifecycle.
            ("PAY_ORDER_TOPIC", "pay-order\n"),
            ("ADMIN_TOKEN_FILE", token.path()),
            ("API_PORT", "0\n"),
            ("GRPC_PORT", ":0"),
            ("ADMIN_PORT", "0"),
            ("KAFKA_CONFIG_FILE", "\n"),
        ])
        .await;
    let from_file = system.settings().with(&[("POSTGRES_DSN", ""), ("DB_DSN_FILE", file.path())]);
    let _worker = Worker::start(&from_file).await;
    api.http().post_order(&order("user")).await.expect_status(201);
    for (given, status) in [("let-me-in", 200), ("let-me-in-not", 401)] {
        let bearer = format!("Bearer {given}");
        let reply = api.admin().send(Method::GET, "/admin/parked", &[("authorization", &bearer)], Bytes::new()).await;
        reply.expect("an answer").expect_status(status);
    }
    // A port alone is one of both families; of operators', on loopback.
    let log = api.log();
    let said = |name: &str| log.lines().filter_map(|line| line.strip_prefix(name)).collect::<Vec<_>>();
    let (http, grpc, admin) = (said("http: listening on "), said("grpc: listening on "), said("admin: listening on "));
    for (addresses, starts) in [(&http, &["[::]:"][..]), (&grpc, &["[::]:"]), (&admin, &["127.0.0.1:", "[::1]:"])] {
        let port = addresses[0].rsplit(':').next().expect("a port");
        let expected: Vec<String> = starts.iter().map(|start| format!("{start}{port}")).collect();
        assert_eq!(*addresses, expected, "{log}");
        for address in ["127.0.0.1", "[::1]"] {
            tokio::net::TcpStream::connect(format!("{address}:{port}")).await.expect("a connection");
        }
    }
    // Whatever reads the database reads the file.
    for (binary, command) in
        [("worker", &["parked", "list"][..]), ("worker", &["stuck"]), ("api-service", &["migrate"])]
    {
        let (code, said) = run_to_end(binary, command, &from_file).await;
        assert_eq!(code, Some(0), "{binary} {command:?} said: {said}");
    }
    for line in api.log().lines().filter(|line| !line.contains(": listening on ")) {
        assert!(line.starts_with('{') && line.ends_with('}'), "no JSON: {line}");
    }
}

/// Who fills in a form leaves some of its lines empty.
#[tokio::test(flavor = "multi_thread")]
async fn every_line_of_the_example_can_be_taken_in_even_those_without_a_value() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let example = include_str!("../../../.env.example");
    let of_this_test = |key: &str| {
        ["POSTGRES_DSN", "KAFKA_BROKERS", "WORKER_GROUP"].contains(&key)
            || key.ends_with("_PORT")
            || key.ends_with("_TOPIC")
    };
    let settings: Vec<(&str, &str)> = example
        .lines()
        .filter_map(|line| line.strip_prefix('#')?.split_once('='))
        .filter(|(key, _)| key.chars().all(|c| c.is_ascii_uppercase() || c == '_') && !of_this_test(key))
        .collect();
    for key in ["JWT_KEY_FILE", "LIFECYCLES_DIR", "ADMIN_TOKEN", "KAFKA_CONFIG", "POSTGRES_DSN_FILE"] {
        assert!(settings.contains(&(key, "")), "{key} in {settings:?}");
    }
    let (api, _worker) = (system.api_with(&settings).await, system.worker_with(&settings).await);
    api.http().post_order(&order("user")).await.expect_status(201);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_cannot_reach_the_database_says_where_it_looked_and_why_it_failed() {
    let _turn = beside_others().await;
    let settings = Settings::default().with(&[("POSTGRES_DSN", "postgres://shop:s3cr3t@127.0.0.1:1/orders")]);
    for (binary, command) in
        [("worker", &["parked", "list"][..]), ("worker", &["stuck"]), ("api-service", &["migrate"])]
    {
        let (code, said) = run_to_end(binary, command, &settings).await;
        assert_eq!(code, Some(1), "{said}");
        for part in ["127.0.0.1:1/orders as shop", "POSTGRES_DSN", "onnection refused"] {
            assert!(said.contains(part), "{part} in what {binary} {command:?} said: {said}");
        }
        assert!(!said.contains("s3cr3t"), "{said}");
    }
}
