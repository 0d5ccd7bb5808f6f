//! Bad settings are refused at start, by name; good ones in any of their forms.

use test_support::{Settings, System, beside_others, order, refused_at_start, run_to_end};

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
        ("worker", "WORKER_GROUP", " "),
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
        ("api-service", "PRODUCT_SERVICE_URL", "product-service:8002"),
        ("api-service", "PRODUCT_SERVICE_TIMEOUT", "0s"),
        ("api-service", "PRODUCT_CACHE_TTL", "soon"),
    ] {
        let settings = Settings::default().with(&[(key, value)]);
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
}

#[tokio::test(flavor = "multi_thread")]
async fn older_names_and_forms_of_settings_serve() {
    let _turn = beside_others().await;
    let system = System::new().await;
    let dsn = system.db.dsn().to_string();
    let api = system
        .api_with(&[
            ("POSTGRES_DSN", ""),
            ("DATABASE_URL", &dsn),
            ("DB_MAX_CONN_LIFETIME", "1h30m"),
            ("LOG_FORMAT", "json"),
        ])
        .await;
    let _worker = system.worker_with(&[("POSTGRES_DSN", ""), ("DB_DSN", &dsn)]).await;
    api.http().post_order(&order("user")).await.expect_status(201);
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
    for key in ["JWT_KEY_FILE", "LIFECYCLES_DIR", "ADMIN_TOKEN", "KAFKA_CONFIG"] {
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
