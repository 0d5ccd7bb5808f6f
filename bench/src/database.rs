//! A database of the benchmark's own, made for one run and gone after it.

use anyhow::{Context, ensure};
use tokio_postgres::config::Host;
use tokio_postgres::{Client, Config, NoTls};

use crate::procfs;

pub struct Database {
    server_dsn: String,
    dsn: String,
    name: String,
}

/// What the service is asked to account for, as the database has it.
#[derive(Debug, PartialEq, Eq)]
pub struct Counts {
    pub orders: u64,
    pub handled: u64,
    pub orders_handled: u64,
    pub outbox: u64,
    pub parked: u64,
}

impl Database {
    /// `name` is used as it is; take one that needs no quotes.
    pub async fn create(server_dsn: &str, name: &str) -> anyhow::Result<Self> {
        let client = connect(server_dsn).await?;
        client.batch_execute(&format!("create database {name}")).await.context("creating a database")?;
        Ok(Self { server_dsn: server_dsn.to_owned(), dsn: with_database(server_dsn, name), name: name.to_owned() })
    }

    pub fn dsn(&self) -> &str {
        &self.dsn
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub async fn connect(&self) -> anyhow::Result<Client> {
        connect(&self.dsn).await
    }

    /// PostgreSQL's main process, when it runs on this very machine and can be seen from here.
    pub async fn server_process(&self) -> anyhow::Result<Option<u32>> {
        let client = self.connect().await?;
        let row = client.query_one("select pg_backend_pid()", &[]).await?;
        let backend = u32::try_from(row.try_get::<_, i32>(0)?)?;
        // On another machine, or in a container, that number is somebody else's or nobody's.
        let ours = procfs::command_line(backend).is_ok_and(|shown| shown.contains(&self.name));
        if ours { procfs::parent_of(backend).map(Some) } else { Ok(None) }
    }

    /// Even while something is still connected.
    pub async fn remove(&self) -> anyhow::Result<()> {
        let client = connect(&self.server_dsn).await?;
        let sql = format!("drop database if exists {} with (force)", self.name);
        client.batch_execute(&sql).await.with_context(|| format!("dropping database {}", self.name))
    }

    /// The environment in which PostgreSQL's own programs reach it. Not as an argument: the
    /// password would be seen in every list of processes.
    pub fn program_environment(&self) -> anyhow::Result<Vec<(&'static str, String)>> {
        let config = parse(&self.dsn)?;
        let host = match config.get_hosts().first() {
            Some(Host::Tcp(name)) => name.clone(),
            #[cfg(unix)]
            Some(Host::Unix(folder)) => folder.display().to_string(),
            None => "localhost".to_owned(),
        };
        let port = config.get_ports().first().copied().unwrap_or(5432).to_string();
        let mut environment = vec![("PGHOST", host), ("PGPORT", port), ("PGDATABASE", self.name.clone())];
        if let Some(user) = config.get_user() {
            environment.push(("PGUSER", user.to_owned()));
        }
        if let Some(password) = config.get_password() {
            environment.push(("PGPASSWORD", String::from_utf8(password.to_vec()).context("the password")?));
        }
        Ok(environment)
    }
}

/// The version, and the settings that decide what a commit costs.
pub async fn describe_server(client: &Client) -> anyhow::Result<String> {
    let sql = "
        select 'PostgreSQL ' || current_setting('server_version')
               || ', fsync ' || current_setting('fsync')
               || ', synchronous_commit ' || current_setting('synchronous_commit')
               || ', shared_buffers ' || current_setting('shared_buffers')";
    let row = client.query_one(sql, &[]).await.context("asking for the server's settings")?;
    Ok(row.try_get(0)?)
}

pub async fn counts(client: &Client) -> anyhow::Result<Counts> {
    let sql = "
        select (select count(*) from orders),
               (select count(*) from order_events where type = 'handled' and not ignored),
               (select count(distinct order_id) from order_events where type = 'handled' and not ignored),
               (select count(*) from outbox),
               (select count(*) from parked_messages)";
    let row = client.query_one(sql, &[]).await.context("counting orders")?;
    let count = |column: usize| anyhow::Ok(u64::try_from(row.try_get::<_, i64>(column)?)?);
    Ok(Counts {
        orders: count(0)?,
        handled: count(1)?,
        orders_handled: count(2)?,
        outbox: count(3)?,
        parked: count(4)?,
    })
}

pub async fn connect(dsn: &str) -> anyhow::Result<Client> {
    let config = parse(dsn)?;
    let (client, connection) = config.connect(NoTls).await.context("connecting to PostgreSQL (POSTGRES_DSN)")?;
    // Ends with the client; whoever asks something then learns of its error.
    tokio::spawn(async move { drop(connection.await) });
    Ok(client)
}

fn parse(dsn: &str) -> anyhow::Result<Config> {
    let config: Config = dsn.parse().context("POSTGRES_DSN is not valid")?;
    ensure!(!config.get_hosts().is_empty(), "POSTGRES_DSN names no host");
    Ok(config)
}

/// The same server and user, another database. As text, since what else the DSN says is for the
/// service to read.
fn with_database(dsn: &str, name: &str) -> String {
    let Some((scheme, rest)) = dsn.split_once("://") else {
        // Of a keyword given twice the last one counts.
        return format!("{dsn} dbname={name}");
    };
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    let query = rest.split_once('?').map(|(_, query)| format!("?{query}")).unwrap_or_default();
    format!("{scheme}://{authority}/{name}{query}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_database_of_a_dsn_is_replaced() {
        for (dsn, expected) in [
            ("postgres://u:p@h:5433/orders?sslmode=disable", "postgres://u:p@h:5433/b?sslmode=disable"),
            ("postgresql://h", "postgresql://h/b"),
            ("postgres://h?connect_timeout=1", "postgres://h/b?connect_timeout=1"),
            ("host=h dbname=orders user=u", "host=h dbname=orders user=u dbname=b"),
        ] {
            let changed = with_database(dsn, "b");
            assert_eq!(changed, expected);
            assert_eq!(parse(&changed).expect(dsn).get_dbname(), Some("b"));
        }
    }

    #[test]
    fn programs_get_the_address_by_environment() {
        let dsn = "postgres://u:p%40@h:5433/orders".to_owned();
        let database = Database { server_dsn: dsn.clone(), dsn, name: "b".to_owned() };
        let environment = database.program_environment().expect("an environment");
        for expected in
            [("PGHOST", "h"), ("PGPORT", "5433"), ("PGDATABASE", "b"), ("PGUSER", "u"), ("PGPASSWORD", "p@")]
        {
            assert!(environment.iter().any(|(key, value)| (*key, value.as_str()) == expected), "{expected:?}");
        }
    }
}
