//! Connections to PostgreSQL: a pool that prepares each statement once per connection, TLS as the
//! DSN asks for it, a deadline on every call, and the migrations. `db/presence.rs` knows whether the
//! server is there; `db/pooler.rs` whether our sessions are our own.

mod pooler;
mod presence;

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use bb8::ManageConnection;
use bb8_postgres::PostgresConnectionManager;
use refinery_core::Migration;
use tokio::runtime::Handle;
use tokio_postgres::{
    Client, Statement,
    config::Host,
    error::{Severity, SqlState},
};
use tokio_postgres_rustls::MakeRustlsConnect;
use tokio_util::context::TokioContext;

pub use self::presence::Presence;
use self::presence::Watched;
use crate::{
    backoff::{Backoff, Seldom},
    dsn,
    telemetry::one_line,
    tls,
};

/// Any number; the same for all versions of both binaries. The second half of the key is the
/// schema, so that two installations in one database do not wait for each other.
const MIGRATION_LOCK: i32 = 0x6f72_6401;
/// Long enough for whoever has only just got the lock to let go of it.
const IMPATIENT: Duration = Duration::from_millis(50);

/// How the pool is sized and how long it waits.
#[derive(Clone, Debug)]
pub struct PoolSettings {
    pub max_conns: u32,
    pub min_conns: u32,
    pub max_lifetime: Duration,
    pub idle_timeout: Duration,
    pub check_period: Duration,
    /// For a connection, and for a statement that only reads.
    pub query_timeout: Duration,
    /// For a transaction that writes.
    pub write_timeout: Duration,
}

/// What went wrong between us and PostgreSQL, by what the caller can do about it.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    /// No connection was to be had: nothing was done. Without a cause where that was known before.
    #[error("PostgreSQL is away")]
    Away(#[source] Option<bb8::RunError<ConnectError>>),
    /// The connection broke or fell silent: whether the statement took effect is not known.
    #[error("the connection to PostgreSQL was lost")]
    Lost(#[source] Option<tokio_postgres::Error>),
    /// PostgreSQL refused the statement: it had no effect.
    #[error("PostgreSQL refused the statement")]
    Refused(#[source] tokio_postgres::Error),
}

/// Whose fault a refused statement is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The rows of the statement; fewer of them may be accepted.
    Data,
    /// The server, over some of the rows, which may be damaged; fewer of them may be accepted.
    Internal,
    /// Two transactions got in each other's way; the same again may succeed.
    Contention,
    /// Somebody keeps a lock that we want for longer than we wait.
    Locked,
    /// The server: it stops, is full, is read-only, is not migrated.
    Server,
}

impl Fault {
    /// May fewer rows be accepted?
    #[must_use]
    pub fn is_of_rows(self) -> bool {
        matches!(self, Self::Data | Self::Internal)
    }
}

impl From<tokio_postgres::Error> for DbError {
    fn from(error: tokio_postgres::Error) -> Self {
        // The server ends the connection with what is worse than an error; the commit may have been before it.
        match error.as_db_error().map(|refusal| refusal.parsed_severity()) {
            None | Some(Some(Severity::Fatal | Severity::Panic)) => Self::Lost(Some(error)),
            Some(_) => Self::Refused(error),
        }
    }
}

impl From<bb8::RunError<ConnectError>> for DbError {
    fn from(error: bb8::RunError<ConnectError>) -> Self {
        Self::Away(Some(error))
    }
}

/// Why there is no connection to PostgreSQL.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// It cannot be reached, or does not let us in.
    #[error("cannot connect to PostgreSQL at {server} (POSTGRES_DSN)")]
    Failed { server: Arc<str>, source: tokio_postgres::Error },
    /// It lets us in by way of a pooler that gives each transaction another session.
    #[error(
        "{server} (POSTGRES_DSN) is a pooler that may run each transaction in another session, and our settings \
         and prepared statements need one that stays: set pool_mode = session for this database (PgBouncer), or \
         name PostgreSQL itself in POSTGRES_DSN"
    )]
    Pooled { server: Arc<str> },
}

impl DbError {
    /// What happened and why, in one line.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut line = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(error) = source {
            line.push_str(": ");
            line.push_str(&error.to_string());
            source = error.source();
        }
        line
    }

    /// It tells of no row, yet one row may be the cause of it: something ran out of time, or was in
    /// somebody's way. Whoever sees it again and again while the server is well may try fewer rows.
    #[must_use]
    pub fn may_be_of_rows(&self) -> bool {
        match self {
            Self::Lost(cause) => cause.is_none(),
            Self::Refused(error) => {
                let code = error.code().map(SqlState::code).unwrap_or_default();
                code == SqlState::QUERY_CANCELED.code() || matches!(code.get(..2), Some("40" | "55"))
            }
            Self::Away(_) => false,
        }
    }

    /// May another session do what this one refuses? A server that was a standby when it let us in says
    /// that it is read-only for as long as the session lasts, whatever it is by now; prepared statements
    /// may be gone, or of another schema. Nothing was done.
    #[must_use]
    pub fn is_of_session(&self) -> bool {
        self.fault() == Fault::Server && self.spoils_session()
    }

    /// As [`Self::is_of_session`], or a session that is in doubt all the same. It is thrown away, since a
    /// new one costs milliseconds, and one that stays bad each message. Not where one more would only
    /// make things worse (53, resources), or none is meant (55 and 57, locks and cancelled statements).
    fn spoils_session(&self) -> bool {
        let Self::Refused(error) = self else { return false };
        let class = error.code().map(|state| &state.code()[..2]);
        matches!(class, Some("08" | "0A" | "25" | "26" | "28" | "3D" | "3F" | "42" | "58" | "F0" | "XX"))
    }

    fn is_read_only(&self) -> bool {
        matches!(self, Self::Refused(error) if error.code() == Some(&SqlState::READ_ONLY_SQL_TRANSACTION))
    }

    #[must_use]
    pub fn fault(&self) -> Fault {
        let Self::Refused(error) = self else { return Fault::Server };
        // Classes of SQLSTATE, PostgreSQL manual, appendix A.
        match error.code().map(|state| &state.code()[..2]) {
            _ if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => Fault::Locked,
            Some("40") => Fault::Contention,
            // Connections, transactions, accounts and databases, what is not migrated or not
            // granted, resources, states of objects, operators, the system, the configuration.
            Some("08" | "0A" | "25" | "26" | "28" | "3D" | "3F" | "42" | "53" | "55" | "57" | "58" | "F0") => {
                Fault::Server
            }
            Some("XX") => Fault::Internal,
            // Data exceptions, violated constraints, and whatever a trigger or function raises, which
            // may be any code.
            _ => Fault::Data,
        }
    }
}

pub type Pool = bb8::Pool<Manager>;

/// A pooled connection and the statements that were prepared on it.
pub struct Connection {
    client: Client,
    statements: Mutex<HashMap<&'static str, Statement>>,
    /// How long its statements wait for a lock.
    lock_timeout: Duration,
    /// Nobody else may ask here: a call ran out of time and its answer may still come, or the session is
    /// [spoilt](DbError::spoils_session).
    unfit: AtomicBool,
    /// Made in this era of the server; fit for no other.
    era: u64,
    watched: Arc<Watched>,
}

impl Connection {
    fn is_fit(&self) -> bool {
        !self.client.is_closed() && !self.unfit.load(Ordering::Relaxed) && self.era == self.watched.era()
    }

    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Prepares `sql` on the first call, and has it ready afterwards.
    ///
    /// # Errors
    /// As [`tokio_postgres::Client::prepare`].
    pub async fn prepared(&self, sql: &'static str) -> Result<Statement, DbError> {
        let known = self.statements.lock().unwrap_or_else(PoisonError::into_inner).get(sql).cloned();
        if let Some(statement) = known {
            return Ok(statement);
        }
        let statement = self.client.prepare(sql).await?;
        self.statements.lock().unwrap_or_else(PoisonError::into_inner).insert(sql, statement.clone());
        Ok(statement)
    }

    /// Runs `work` on this connection under a deadline. A connection that misses it is not used
    /// again, nor is one whose session is spoilt.
    ///
    /// # Errors
    /// Those of `work`; [`DbError::Lost`] when the time is up.
    pub async fn within<T>(
        &self,
        deadline: Duration,
        work: impl Future<Output = Result<T, DbError>>,
    ) -> Result<T, DbError> {
        let guard = Unanswered(&self.unfit);
        match tokio::time::timeout(deadline, work).await {
            Ok(Err(error)) if error.is_read_only() => {
                self.watched.mislead();
                Err(error)
            }
            Ok(Err(error)) if error.spoils_session() => {
                self.watched.doubt();
                Err(error)
            }
            Ok(result) => {
                guard.answered();
                result
            }
            Err(_) => {
                self.watched.silence();
                Err(DbError::Lost(None))
            }
        }
    }
}

impl Connection {
    /// Runs `work` in a transaction under a deadline: committed when it succeeds, rolled back
    /// when it fails. `work` may use [`Self::client`] and nothing that begins another one.
    ///
    /// # Errors
    /// Those of `work` and of the commit; [`DbError::Lost`] when the time is up.
    pub async fn transaction<T>(
        &self,
        deadline: Duration,
        work: impl Future<Output = Result<T, DbError>>,
    ) -> Result<T, DbError> {
        let transaction = async {
            // Both are on their way before the first is answered: one round trip less.
            let (begun, worked) = tokio::join!(biased; self.client.batch_execute("begin"), work);
            let ended = match begun.map_err(DbError::from).and(worked) {
                Ok(value) => self.client.batch_execute("commit").await.map(|()| Ok(value)),
                Err(error) => self.client.batch_execute("rollback").await.map(|()| Err(error)),
            };
            ended.unwrap_or_else(|error| Err(error.into()))
        };
        self.within(deadline, transaction).await
    }

    /// Runs `work` so that its statements hardly wait for a lock that somebody keeps: for whoever has waited
    /// for it in vain, and looks for what can be done without.
    ///
    /// # Errors
    /// Those of `work`, and [`DbError::Lost`] when the server does not answer by `deadline`.
    pub async fn impatiently<T>(
        &self,
        deadline: Duration,
        work: impl Future<Output = Result<T, DbError>>,
    ) -> Result<T, DbError> {
        let guard = Unanswered(&self.unfit);
        self.within(deadline, self.wait_for_locks(IMPATIENT)).await?;
        let result = work.await;
        if self.within(deadline, self.wait_for_locks(self.lock_timeout)).await.is_ok() {
            guard.answered(); // fit for others
        }
        result
    }

    async fn wait_for_locks(&self, at_most: Duration) -> Result<(), DbError> {
        Ok(self.client.batch_execute(&format!("set lock_timeout = {}", at_most.as_millis())).await?)
    }
}

/// Marks the connection when the work is given up, whether its time is up or its caller left.
struct Unanswered<'a>(&'a AtomicBool);

impl Unanswered<'_> {
    fn answered(self) {
        std::mem::forget(self);
    }
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Makes connections as the DSN says.
#[derive(Debug)]
pub struct Manager {
    inner: PostgresConnectionManager<MakeRustlsConnect>,
    set_up: String,
    lock_timeout: Duration,
    /// Where what the connections say is read.
    runtime: Handle,
    /// For people: hosts, ports, database and user.
    server: Arc<str>,
    /// It has been seen that our sessions are our own.
    are_ours: AtomicBool,
    watched: Arc<Watched>,
}

impl Manager {
    async fn client(&self) -> Result<Client, ConnectError> {
        let client = self.bare_client().await?;
        // Before anything is set that another client of a pooler would find in its session.
        if !self.are_ours.load(Ordering::Relaxed) {
            self.refuse_shared_sessions(&client).await?;
        }
        client.batch_execute(&self.set_up).await.map_err(|error| self.error(error))?;
        Ok(client)
    }

    /// With nothing set.
    async fn bare_client(&self) -> Result<Client, ConnectError> {
        TokioContext::new(self.inner.connect(), self.runtime.clone()).await.map_err(|error| self.error(error))
    }

    fn error(&self, source: tokio_postgres::Error) -> ConnectError {
        ConnectError::Failed { server: self.server.clone(), source }
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("unfit", &self.unfit).finish_non_exhaustive()
    }
}

impl ManageConnection for Manager {
    type Connection = Connection;
    type Error = ConnectError;

    async fn connect(&self) -> Result<Connection, ConnectError> {
        // Of the era in which it was begun.
        let era = self.watched.era();
        let client = self.client().await?;
        let (lock_timeout, unfit, watched) = (self.lock_timeout, AtomicBool::new(false), self.watched.clone());
        Ok(Connection { client, statements: Mutex::default(), lock_timeout, unfit, era, watched })
    }

    async fn is_valid(&self, connection: &mut Connection) -> Result<(), ConnectError> {
        connection.client.simple_query("").await.map(drop).map_err(|error| self.error(error))
    }

    fn has_broken(&self, connection: &mut Connection) -> bool {
        !connection.is_fit()
    }
}

fn pool(
    dsn: &str,
    application: &str,
    settings: &PoolSettings,
    runtime: &Handle,
    watched: &Arc<Watched>,
) -> anyhow::Result<Pool> {
    let (mut config, tls) = dsn::read(dsn).context("POSTGRES_DSN")?;
    if config.get_application_name().is_none() {
        config.application_name(application);
    }
    if config.get_connect_timeout().is_none() {
        config.connect_timeout(settings.query_timeout);
    }
    config.keepalives_idle(Duration::from_secs(30));
    // Well before all that is in the same statement runs out of time.
    let lock_timeout = settings.write_timeout / 3;
    // statement_timeout: what we no longer wait for should not go on holding locks either; nor should a
    // transaction whose process is frozen, or out of reach: others wait for its locks.
    // The plans: our statements join a handful of ids with an index. Prepared while the tables
    // are still empty, the planner would choose to read them whole, and keep to that as they grow.
    let set_up = format!(
        "set statement_timeout = {0}; set idle_in_transaction_session_timeout = {0}; set lock_timeout = {1}; \
         set enable_seqscan = off; set enable_hashjoin = off; set enable_mergejoin = off; \
         set plan_cache_mode = force_generic_plan; set jit = off",
        settings.write_timeout.as_millis(),
        lock_timeout.as_millis()
    );
    let server = server(&config);
    let inner = PostgresConnectionManager::new(config, tls::connector(&tls)?);
    let (runtime, are_ours, watched) = (runtime.clone(), AtomicBool::new(false), watched.clone());
    let errors = Errors { told: Arc::default(), watched: watched.clone() };
    let manager = Manager { inner, set_up, lock_timeout, runtime, server, are_ours, watched };
    Ok(bb8::Pool::builder()
        .max_size(settings.max_conns)
        .min_idle(settings.min_conns.min(settings.max_conns))
        .max_lifetime(settings.max_lifetime)
        .idle_timeout(settings.idle_timeout)
        .reaper_rate(settings.check_period)
        .connection_timeout(settings.query_timeout)
        // A ping before each use costs a quarter of the throughput; a broken one shows itself.
        .test_on_check_out(false)
        // As few servers as there is work for: one that has just run has its plans and pages at hand.
        .queue_strategy(bb8::QueueStrategy::Lifo)
        .error_sink(Box::new(errors))
        .build_unchecked(manager))
}

/// `db1:5432,db2:5432/orders as shop`, without what is secret.
fn server(config: &tokio_postgres::Config) -> Arc<str> {
    const USUAL_PORT: u16 = 5432;
    let ports = config.get_ports();
    let port = |index| ports.get(index).or(ports.first()).copied().unwrap_or(USUAL_PORT);
    let host = |host: &Host| match host {
        Host::Tcp(name) if name.contains(':') => format!("[{name}]"),
        Host::Tcp(name) => name.clone(),
        Host::Unix(path) => path.display().to_string(),
    };
    let address = |address: &IpAddr| match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    };
    let servers: Vec<_> = match config.get_hosts() {
        [] => config.get_hostaddrs().iter().map(address).collect(),
        hosts => hosts.iter().map(host).collect(),
    };
    let servers = servers.iter().enumerate().map(|(index, server)| format!("{server}:{}", port(index)));
    let user = config.get_user().unwrap_or_default();
    let database = config.get_dbname().unwrap_or(user);
    one_line(&format!("{}/{database} as {user}", servers.collect::<Vec<_>>().join(","))).into()
}

/// An outage is many failed attempts by many who want a connection: told now and then.
#[derive(Clone, Debug)]
struct Errors {
    told: Arc<Mutex<Seldom>>,
    watched: Arc<Watched>,
}

impl bb8::ErrorSink<ConnectError> for Errors {
    fn sink(&self, error: ConnectError) {
        self.watched.doubt();
        let what = match error {
            ConnectError::Failed { .. } => "PostgreSQL is away",
            ConnectError::Pooled { .. } => "no connection to PostgreSQL",
        };
        let error = format!("{:#}", anyhow::Error::from(error));
        if self.told.lock().unwrap_or_else(PoisonError::into_inner).is_due(&error) {
            tracing::warn!(error, "{what}");
        } else {
            tracing::debug!(error, "{what}");
        }
    }

    fn boxed_clone(&self) -> Box<dyn bb8::ErrorSink<ConnectError>> {
        Box::new(self.clone())
    }
}

/// Why the schema is not what this binary needs.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// Trying again may help: the server is away, or does not let us in yet.
    #[error("cannot migrate the database now")]
    NotNow(#[source] anyhow::Error),
    /// Somebody must look: an applied migration is not the one that we know by this number.
    #[error("the database was migrated by other hands than ours")]
    Diverged(#[source] refinery_core::Error),
    /// Somebody must look: we cannot work with what stands between.
    #[error(transparent)]
    Unusable(ConnectError),
}

/// The steps to the schema, each by its file's name and text. They are listed here, and not found by
/// refinery's macro: the macro has refinery, and all that it stands on, compiled a second time.
const MIGRATIONS: [(&str, &str); 12] = [
    ("V1__orders", include_str!("../../migrations/V1__orders.sql")),
    ("V2__lifecycles", include_str!("../../migrations/V2__lifecycles.sql")),
    ("V3__parked_lookups", include_str!("../../migrations/V3__parked_lookups.sql")),
    ("V4__lists", include_str!("../../migrations/V4__lists.sql")),
    ("V5__idempotency", include_str!("../../migrations/V5__idempotency.sql")),
    ("V6__room", include_str!("../../migrations/V6__room.sql")),
    ("V7__vacuum", include_str!("../../migrations/V7__vacuum.sql")),
    ("V8__first_states", include_str!("../../migrations/V8__first_states.sql")),
    ("V9__statistics", include_str!("../../migrations/V9__statistics.sql")),
    ("V10__steady_vacuum", include_str!("../../migrations/V10__steady_vacuum.sql")),
    ("V11__deleted_refs", include_str!("../../migrations/V11__deleted_refs.sql")),
    ("V12__ticket_keys", include_str!("../../migrations/V12__ticket_keys.sql")),
];

fn migrations() -> Result<Vec<Migration>, refinery_core::Error> {
    MIGRATIONS.iter().map(|(name, sql)| Migration::unapplied(name, sql)).collect()
}

/// Brings the schema up to what this binary needs. Two processes at once take turns; a schema
/// that is newer is left as it is, one that was changed by other hands is refused.
///
/// # Errors
/// When the database is away, or its history of migrations is not ours.
pub async fn migrate(pool: &Pool) -> Result<(), MigrateError> {
    // Longer than any statement of ours: another process may be building an index.
    const PATIENCE: Duration = Duration::from_secs(3600);
    let not_now = |error: tokio_postgres::Error| MigrateError::NotNow(error.into());
    let not_ours = |error: refinery_core::Error| match error.kind() {
        refinery_core::error::Kind::DivergentVersion(..) => MigrateError::Diverged(error),
        _ => MigrateError::NotNow(error.into()),
    };
    let mut connection = pool.dedicated_connection().await.map_err(|error| match error {
        ConnectError::Failed { .. } => MigrateError::NotNow(error.into()),
        ConnectError::Pooled { .. } => MigrateError::Unusable(error),
    })?;
    let client = &mut connection.client;
    let lock = format!(
        "set statement_timeout = {}; select pg_advisory_lock({MIGRATION_LOCK}, hashtext(current_schema()))",
        PATIENCE.as_millis()
    );
    client.batch_execute(&lock).await.map_err(not_now)?;
    let report = refinery_core::Runner::new(&migrations().map_err(not_ours)?)
        // Applied by a newer binary: expand before contract keeps those harmless to us.
        .set_abort_missing(false)
        .set_abort_divergent(true)
        .run_async(client)
        .await
        .map_err(not_ours)?;
    for applied in report.applied_migrations() {
        tracing::info!(migration = %applied, "applied");
    }
    Ok(())
}

/// As [`migrate`], again and again until it is done.
///
/// # Errors
/// When trying again cannot help.
pub async fn migrate_when_possible(pool: &Pool) -> anyhow::Result<()> {
    let (mut backoff, mut told) = (Backoff::RECONNECT, Seldom::default());
    loop {
        match migrate(pool).await {
            Err(MigrateError::NotNow(error)) => {
                let error = format!("{error:#}");
                if told.is_due(&error) {
                    tracing::warn!(error, "cannot migrate the database yet; trying again");
                }
                tokio::time::sleep(backoff.delay()).await;
            }
            result => return Ok(result?),
        }
    }
}

/// Can this server be written to?
async fn writable(connection: &Connection, deadline: Duration) -> Result<bool, DbError> {
    let sql = "select not pg_is_in_recovery() and current_setting('transaction_read_only') = 'off'";
    let work = async {
        let statement = connection.prepared(sql).await?;
        Ok(connection.client().query_one(&statement, &[]).await?)
    };
    Ok(connection.within(deadline, work).await?.get(0))
}

/// Shared by everything that talks to the database.
#[derive(Clone, Debug)]
pub struct Db {
    pub pool: Pool,
    pub settings: Arc<PoolSettings>,
    watched: Arc<Watched>,
}

impl Db {
    /// A pool that connects when it is first asked to: the database may be away now. Its connections
    /// live on this runtime, whoever uses them. A process that serves also runs [`Self::watch`].
    ///
    /// # Errors
    /// When the DSN makes no sense.
    pub fn open(dsn: &str, application: &str, settings: PoolSettings, runtime: &Handle) -> anyhow::Result<Self> {
        let watched = Arc::default();
        let pool = pool(dsn, application, &settings, runtime, &watched)?;
        Ok(Self { pool, settings: Arc::new(settings), watched })
    }

    /// A connection of the pool that is not known to be unfit. The pool itself looks only at
    /// those that are given back, and a server that has restarted has closed all the others.
    ///
    /// # Errors
    /// At once when the server is known to be away; else when there is none within the deadline for reading.
    pub async fn connection(&self) -> Result<bb8::PooledConnection<'_, Manager>, DbError> {
        if self.presence() == Presence::Away {
            return Err(DbError::Away(None));
        }
        self.any_connection().await
    }

    async fn any_connection(&self) -> Result<bb8::PooledConnection<'_, Manager>, DbError> {
        loop {
            // Each unfit one that is found leaves the pool when it is dropped.
            let connection = self.pool.get().await.inspect_err(|_| self.watched.doubt())?;
            if connection.is_fit() {
                return Ok(connection);
            }
        }
    }

    /// Can the server be written to?
    ///
    /// # Errors
    /// When it is away.
    pub async fn is_writable(&self) -> Result<bool, DbError> {
        let is_writable = writable(&*self.connection().await?, self.settings.query_timeout).await?;
        if !is_writable {
            self.watched.mislead();
        }
        Ok(is_writable)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_migration_is_embedded() {
        let folder = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../migrations")).unwrap();
        let mut files: Vec<_> = folder.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
        let mut embedded: Vec<_> = MIGRATIONS.iter().map(|(name, _)| format!("{name}.sql")).collect();
        files.sort_unstable();
        embedded.sort_unstable();
        assert_eq!(embedded, files);
        // refinery applies them in the order of their numbers.
        assert_eq!(migrations().unwrap().len(), files.len());
    }
}
