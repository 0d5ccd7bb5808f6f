//! A database of its own for each test: advisory locks are per database, so a schema would not
//! keep two tests apart.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::{CertificateDer, pem::PemObject};
use rustls::{ClientConfig, RootCertStore};
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio_postgres::{Client, NoTls, types::ToSql};
use tokio_postgres_rustls::MakeRustlsConnect;
use uuid::Uuid;

/// A server that hangs must not hang the end of a test as well.
const DROP_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection URL, taken apart just far enough to point it elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dsn {
    /// `postgres://user:password@`
    before_address: String,
    /// `host:port`
    address: String,
    database: String,
    /// `?sslmode=…`, or nothing
    query: String,
}

impl Dsn {
    /// The server that `make test` provides.
    pub fn from_env() -> Self {
        match std::env::var("POSTGRES_DSN") {
            Ok(dsn) if !dsn.is_empty() => Self::parse(&dsn),
            _ => panic!("POSTGRES_DSN is not set, so there is no database to test on: run `make test`"),
        }
    }

    pub fn parse(dsn: &str) -> Self {
        let not_a_url = "the tests need POSTGRES_DSN as a URL: postgres://user:password@host:port/database";
        let (scheme, rest) = dsn.split_once("://").expect(not_a_url);
        let (rest, query) = match rest.split_once('?') {
            Some((rest, query)) => (rest, format!("?{query}")),
            None => (rest, String::new()),
        };
        let (authority, database) = rest.split_once('/').unwrap_or((rest, "postgres"));
        let (user, address) = match authority.rsplit_once('@') {
            Some((user, address)) => (format!("{user}@"), address),
            None => (String::new(), authority),
        };
        Self {
            before_address: format!("{scheme}://{user}"),
            address: address.to_owned(),
            database: database.to_owned(),
            query,
        }
    }

    pub fn with_database(&self, database: &str) -> Self {
        Self { database: database.to_owned(), ..self.clone() }
    }

    /// For a proxy in front of the server: `host:port`.
    pub fn with_address(&self, address: &str) -> Self {
        Self { address: address.to_owned(), ..self.clone() }
    }

    /// Replaces all parameters: `sslmode=verify-full&sslrootcert=…`, or nothing.
    pub fn with_query(&self, query: &str) -> Self {
        let query = if query.is_empty() { String::new() } else { format!("?{query}") };
        Self { query, ..self.clone() }
    }

    /// `host:port`, with PostgreSQL's own port where none is given.
    pub fn address(&self) -> String {
        if self.address.contains(':') { self.address.clone() } else { format!("{}:5432", self.address) }
    }

    /// Panics when there is nobody.
    pub async fn connect(&self) -> Client {
        connect(self).await
    }

    fn root_certificate(&self) -> Option<&str> {
        let parameters = self.query.trim_start_matches('?').split('&');
        parameters
            .filter_map(|parameter| parameter.split_once('='))
            .find(|(key, _)| *key == "sslrootcert")
            .map(|(_, path)| path)
    }

    pub fn database(&self) -> &str {
        &self.database
    }
}

impl std::fmt::Display for Dsn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { before_address, address, database, query } = self;
        write!(f, "{before_address}{address}/{database}{query}")
    }
}

/// A new, empty database, dropped at the end of the test whoever is still connected.
pub struct TestDb {
    server: Dsn,
    dsn: Dsn,
    client: Client,
}

impl TestDb {
    pub async fn new() -> Self {
        Self::on(Dsn::from_env()).await
    }

    /// On a private server.
    pub async fn on(server: Dsn) -> Self {
        let name = format!("test_{}", Uuid::now_v7().simple());
        let admin = connect(&server).await;
        admin
            .batch_execute(&format!("create database {name}"))
            .await
            .unwrap_or_else(|error| panic!("creating database {name}: {}", chain(&error)));
        let dsn = server.with_database(&name);
        let client = connect(&dsn).await;
        Self { server, dsn, client }
    }

    /// What the binaries get as `POSTGRES_DSN`.
    pub fn dsn(&self) -> &Dsn {
        &self.dsn
    }

    pub fn client(&self) -> &Client {
        &self.client
    }

    /// A further connection, for a transaction or a lock of its own.
    pub async fn connect(&self) -> Client {
        connect(&self.dsn).await
    }

    /// After the server was away, the first connection is gone too.
    pub async fn reconnect(&mut self) {
        self.client = connect(&self.dsn).await;
    }

    /// One number: `select count(*) …`.
    pub async fn number(&self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> i64 {
        self.client.query_one(sql, params).await.unwrap_or_else(|error| panic!("{sql}: {}", chain(&error))).get(0)
    }

    /// The rows as lines of text, for a query that selects one text column.
    pub async fn lines(&self, sql: &str, params: &[&(dyn ToSql + Sync)]) -> Vec<String> {
        self.client
            .query(sql, params)
            .await
            .unwrap_or_else(|error| panic!("{sql}: {}", chain(&error)))
            .iter()
            .map(|row| row.get::<_, Option<String>>(0).unwrap_or_else(|| "null".to_owned()))
            .collect()
    }

    /// Statements without parameters.
    pub async fn execute(&self, sql: &str) {
        self.client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {}", chain(&error)));
    }
}

impl Drop for TestDb {
    fn drop(&mut self) {
        let (server, name) = (self.server.clone(), self.dsn.database().to_owned());
        // A thread of its own: this runs inside the test's runtime, perhaps while it unwinds.
        let dropping = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let dropping = async {
                    let client = try_connect(&server).await?;
                    let sql = format!("drop database if exists {name} with (force)");
                    client.batch_execute(&sql).await?;
                    anyhow::Ok(())
                };
                tokio::time::timeout(DROP_TIMEOUT, dropping).await?
            })
        });
        // A server that the test has stopped takes its databases along; nothing to complain of.
        without_holding_others_up(|| drop(dropping.join()));
    }
}

/// PostgreSQL drops a database only when nobody is about to log in, so a task of the same runtime that
/// is logging in must get on while this thread waits.
fn without_holding_others_up(wait: impl FnOnce()) {
    match Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(wait),
        _ => wait(),
    }
}

async fn connect(dsn: &Dsn) -> Client {
    try_connect(dsn)
        .await
        .unwrap_or_else(|error| panic!("connecting to PostgreSQL at {}: {error:#}; run `make test`", dsn.address()))
}

/// With TLS where the URL names a root certificate, without it elsewhere.
async fn try_connect(dsn: &Dsn) -> anyhow::Result<Client> {
    let (client, connection): (_, Connection) = match dsn.root_certificate() {
        Some(path) => {
            let tls = trusting(path)?;
            // tokio-postgres itself knows neither the parameter nor the stricter modes.
            let plain = dsn.with_query("sslmode=require").to_string();
            let (client, connection) = tokio_postgres::connect(&plain, tls).await?;
            (client, Box::pin(connection))
        }
        None => {
            let (client, connection) = tokio_postgres::connect(&dsn.to_string(), NoTls).await?;
            (client, Box::pin(connection))
        }
    };
    tokio::spawn(connection);
    Ok(client)
}

type Connection = Pin<Box<dyn Future<Output = Result<(), tokio_postgres::Error>> + Send>>;

fn trusting(root_certificate: &str) -> anyhow::Result<MakeRustlsConnect> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(root_certificate)?)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(MakeRustlsConnect::new(config))
}

/// `tokio_postgres::Error` alone says only "db error".
fn chain(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(db) => db.to_string(),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_can_be_pointed_elsewhere() {
        let dsn = Dsn::parse("postgres://order:p%40ss@db.example:5433/orders?sslmode=require");
        assert_eq!(dsn.address(), "db.example:5433");
        assert_eq!(
            dsn.with_database("other").with_address("127.0.0.1:9").to_string(),
            "postgres://order:p%40ss@127.0.0.1:9/other?sslmode=require"
        );
        assert_eq!(dsn.with_query("").to_string(), "postgres://order:p%40ss@db.example:5433/orders");
    }

    #[test]
    fn a_bare_url_gets_the_usual_port_and_database() {
        let dsn = Dsn::parse("postgresql://localhost");
        assert_eq!(dsn.address(), "localhost:5432");
        assert_eq!(dsn.to_string(), "postgresql://localhost/postgres");
    }

    #[tokio::test]
    #[ignore = "needs PostgreSQL"]
    async fn each_test_has_a_database_that_goes_away_with_it() {
        let (one, other) = (TestDb::new().await, TestDb::new().await);
        one.execute("create table t (n int)").await;
        let tables = "select count(*) from information_schema.tables where table_name = 't'";
        assert_eq!(one.number(tables, &[]).await, 1);
        assert_eq!(other.number(tables, &[]).await, 0);

        let name = one.dsn().database().to_owned();
        let _still_connected = one.connect().await;
        drop(one);
        let left = "select count(*) from pg_database where datname = $1";
        assert_eq!(other.number(left, &[&name]).await, 0);
    }
}
