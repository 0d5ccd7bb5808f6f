//! A PostgreSQL that demands TLS and a Kafka that demands a password.

use test_support::{PrivateKafka, PrivatePostgres, Settings, System, TestDb, Worker, beside_few};

use crate::{scenarios, settings::SecretFile};

/// One property a line, as files of properties have them.
fn lines_of(config: &str) -> String {
    config.split(',').map(|property| format!("{property}\r\n")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_with_tls_and_kafka_with_sasl_serve_as_any_other() {
    let _turn = beside_few().await;
    let (server, broker) = (PrivatePostgres::start_with_tls().await, PrivateKafka::start_with_sasl().await);
    let mut system = System::on(TestDb::on(server.dsn()).await, broker.client());
    assert!(system.db.dsn().to_string().contains("sslmode=verify-full"), "{}", system.db.dsn());
    assert!(broker.config().contains("sasl."), "{}", broker.config());
    system.set("KAFKA_CONFIG", broker.config());
    let api = system.api().await;
    let (dsn, config) =
        (SecretFile::new(&format!("{}\n", system.db.dsn())), SecretFile::new(&lines_of(broker.config())));
    let files = [("POSTGRES_DSN_FILE", dsn.path()), ("KAFKA_CONFIG_FILE", config.path())];
    let _worker = system.worker_with(&[&[("POSTGRES_DSN", ""), ("KAFKA_CONFIG", "")][..], &files].concat()).await;

    let mut accepted = scenarios::a_created_order_is_answered_as_done(api.http()).await;
    accepted.extend(scenarios::an_order_is_updated_and_deleted(api.http()).await);
    system.ledger().check(accepted).await;

    // All of ours came in encrypted.
    let plain = "select count(*) from pg_stat_ssl join pg_stat_activity using (pid)
                 where datname = current_database() and not ssl";
    assert_eq!(system.db.number(plain, &[]).await, 0);
    let encrypted = "select count(*) from pg_stat_ssl join pg_stat_activity using (pid)
                     where datname = current_database() and ssl";
    assert!(system.db.number(encrypted, &[]).await > 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_certificate_is_not_trusted_is_not_talked_to() {
    let _turn = beside_few().await;
    let server = PrivatePostgres::start_with_tls().await;
    let system = System::on(TestDb::on(server.dsn()).await, test_support::TestKafka::new());
    let untrusting = system.db.dsn().with_query("sslmode=verify-full").to_string();
    let settings: Settings = system.settings().with(&[("POSTGRES_DSN", &untrusting)]);
    let tables = "select count(*) from information_schema.tables where table_name = 'orders'";
    // It may wait for a better day or give up; it must not have migrated.
    let outcome = tokio::spawn(async move { Worker::spawn(&settings).await }).await;
    if let Ok(worker) = outcome {
        worker.http().get("/ready").await.expect_status(503);
    }
    assert_eq!(system.db.number(tables, &[]).await, 0);
}
