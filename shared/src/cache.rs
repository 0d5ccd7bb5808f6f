//! Orders as they were read last, in Redis, so that reading them again costs the database nothing.
//! Optional, and trusted with little: what is not there, or not there in time, is read from
//! PostgreSQL, and whatever is there is gone after `CACHE_TTL`.
//!
//! Whoever changes an order forgets it here after the commit and before anybody is answered. A reader
//! may have read just before that commit and keep it just after: so what is forgotten leaves a mark,
//! for longer than a reader may take, and what is read is kept only where nothing is. What can go
//! wrong with that (Redis is away, full or stands still while an order changes, or a process dies
//! between the commit and the mark) leaves an order as it was for `CACHE_TTL` and no longer: each
//! value says when it was read, since what stands still does not forget either.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, bail};
use redis::{
    Client, ErrorKind, ExistenceCheck, RedisError, ServerErrorKind, SetExpiry, SetOptions,
    aio::{ConnectionManager, ConnectionManagerConfig},
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    backoff::{Backoff, Seldom},
    dsn,
    settings::{CacheSettings, Secret},
};

/// How long a mark stays, and how long a reader may have taken that keeps what it read.
const MARK: Duration = Duration::from_secs(1);
const SLOWEST_READ: Duration = Duration::from_millis(250);
/// Redis is to be quicker than PostgreSQL, or it is of no use.
const PATIENCE: Duration = Duration::from_millis(50);
/// A list of orders of hundreds of kilobytes takes longer than that, and is not asked for often.
const LARGEST: usize = 256 * 1024;
/// By how much the clocks of those who read through here may differ.
const SKEW: Duration = Duration::from_secs(1);
/// For how long a Redis that failed is left alone.
const REST: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(5));
/// Another form of what is kept needs another number here: both releases run side by side for a
/// while.
const FORM: &str = "orderstream:2";

/// What is kept.
#[derive(Clone, Copy, Debug)]
pub enum Key<'a> {
    Order(Uuid),
    /// The first page of `GET /orders` of a user.
    List(&'a str),
    /// The first page of `GET /api/orders` of a user.
    Page(&'a str),
}

impl fmt::Display for Key<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Order(order_id) => write!(f, "{FORM}:order:{order_id}"),
            Self::List(user_id) => write!(f, "{FORM}:list:{user_id}"),
            Self::Page(user_id) => write!(f, "{FORM}:page:{user_id}"),
        }
    }
}

/// A handle to what is kept; without Redis nothing is.
#[derive(Clone)]
pub struct Cache(Option<Arc<Redis>>);

struct Redis {
    client: Client,
    /// The connection that is used, and its number: only who used it gives it up.
    connection: Mutex<(ConnectionManager, u64)>,
    ttl: Duration,
    /// Of reading, and of forgetting: what is too slow to read is still to be forgotten.
    reading: Mutex<Health>,
    forgetting: Mutex<Health>,
}

/// The URL of an address, unless its password may be meant otherwise.
fn url(address: &str) -> anyhow::Result<String> {
    let (scheme, rest) = address.split_once("://").unwrap_or(("redis", address));
    if dsn::address(rest)?.query.contains('@') {
        bail!("cannot be read: an @ of its password is written %40, a # %23, and a ? %3F");
    }
    Ok(format!("{scheme}://{rest}"))
}

/// Whether Redis is asked.
struct Health {
    rest: Backoff,
    until: Option<Instant>,
    told: Seldom,
}

impl Default for Health {
    fn default() -> Self {
        Self { rest: REST, until: None, told: Seldom::default() }
    }
}

impl Cache {
    /// Connects when it is used.
    ///
    /// # Errors
    /// When the address makes no sense; without it, since there may be a password in it.
    pub fn open(settings: &CacheSettings) -> anyhow::Result<Self> {
        let Some(address) = Secret::given(settings.redis_addr.as_ref()) else { return Ok(Self(None)) };
        let client = Client::open(url(&address).context("REDIS_ADDR")?)
            .context("REDIS_ADDR is no host:port, and no redis:// or rediss:// URL")?;
        let connection = Mutex::new((connect(&client).context("REDIS_ADDR")?, 0));
        let (reading, forgetting) = Default::default();
        Ok(Self(Some(Arc::new(Redis { client, connection, ttl: settings.cache_ttl, reading, forgetting }))))
    }

    /// What is kept and `is_meant` (whoever may write to Redis could have put another's there), else
    /// what `read` finds, which is kept then. What is not there is never kept.
    ///
    /// # Errors
    /// Those of `read`.
    pub async fn through<T: Serialize + DeserializeOwned, E>(
        &self,
        key: Key<'_>,
        is_meant: impl FnOnce(&T) -> bool,
        read: impl Future<Output = Result<Option<T>, E>>,
    ) -> Result<Option<T>, E> {
        let Some(redis) = &self.0 else { return read.await };
        let key = key.to_string();
        match redis.get(&key).await {
            Looked::Found(kept) => {
                let value = redis.fresh(&kept).and_then(|json| serde_json::from_slice(json).ok());
                if let Some(value) = value.filter(is_meant) {
                    count("hit");
                    return Ok(Some(value));
                }
                count("miss");
                redis.remove(&key).await;
                read.await
            }
            Looked::Nothing => {
                count("miss");
                let (began, at) = (Instant::now(), unix_millis());
                let value = read.await?;
                if let Some(value) = value.as_ref().filter(|_| began.elapsed() < SLOWEST_READ) {
                    redis.keep(&key, at, value).await;
                }
                Ok(value)
            }
            Looked::Marked => {
                count("miss");
                read.await
            }
            Looked::Away => {
                count("away");
                read.await
            }
        }
    }

    /// Forgets these orders, and the lists of their users. After the commit, and before anybody is
    /// told.
    pub async fn forget<'a>(&self, orders: impl IntoIterator<Item = (Uuid, &'a str)>) {
        let Some(redis) = &self.0 else { return };
        let mut keys: Vec<String> = Vec::new();
        for (order_id, user_id) in orders {
            keys.extend([Key::Order(order_id), Key::List(user_id), Key::Page(user_id)].map(|key| key.to_string()));
        }
        keys.sort_unstable();
        keys.dedup();
        if !keys.is_empty() {
            redis.mark(&keys).await;
        }
    }
}

/// When it is used.
fn connect(client: &Client) -> Result<ConnectionManager, RedisError> {
    // One attempt: whoever asks has a deadline, and then Redis is left alone for a while.
    let config = ConnectionManagerConfig::new()
        .set_number_of_retries(0)
        .set_connection_timeout(Some(PATIENCE))
        .set_response_timeout(Some(PATIENCE));
    ConnectionManager::new_lazy_with_config(client.clone(), config)
}

/// What a look for a key came to.
enum Looked {
    Found(Vec<u8>),
    Nothing,
    /// It was changed a moment ago.
    Marked,
    Away,
}

impl Redis {
    async fn get(&self, key: &str) -> Looked {
        match self.ask(redis::cmd("GET").arg(key)).await {
            Ok(None) => Looked::Nothing,
            Ok(Some(kept)) if Vec::is_empty(&kept) => Looked::Marked,
            Ok(Some(kept)) => Looked::Found(kept),
            Err(Failed) => Looked::Away,
        }
    }

    /// The JSON of what was read no longer ago than it may be kept.
    fn fresh<'a>(&self, kept: &'a [u8]) -> Option<&'a [u8]> {
        let (at, json) = kept.split_first_chunk()?;
        let (at, now) = (u64::from_be_bytes(*at), unix_millis());
        let ttl = u64::try_from(self.ttl.as_millis()).unwrap_or(u64::MAX);
        let skew = u64::try_from(SKEW.as_millis()).unwrap_or_default();
        (now <= at.saturating_add(ttl) && at <= now.saturating_add(skew)).then_some(json)
    }

    async fn keep(&self, key: &str, at: u64, value: &impl Serialize) {
        let mut kept = at.to_be_bytes().to_vec();
        // Our own types always serialize.
        if serde_json::to_writer(&mut kept, value).is_err() || kept.len() > LARGEST {
            return;
        }
        let ttl = u64::try_from(self.ttl.as_millis()).unwrap_or(u64::MAX);
        let options = SetOptions::default().conditional_set(ExistenceCheck::NX).with_expiration(SetExpiry::PX(ttl));
        let _: Result<Option<String>, Failed> = self.ask(redis::cmd("SET").arg(key).arg(kept).arg(options)).await;
    }

    /// What is of no use to anybody, that it be kept anew.
    async fn remove(&self, key: &str) {
        let _: Result<u64, Failed> = self.ask(redis::cmd("UNLINK").arg(key)).await;
    }

    async fn mark(&self, keys: &[String]) {
        let mut pipe = redis::pipe();
        // Also one that is full takes this, and not always the mark.
        pipe.cmd("UNLINK").arg(keys).ignore();
        for key in keys {
            pipe.pset_ex(key, "", MARK.as_millis() as u64).ignore();
        }
        let (mut connection, number) = self.connection();
        let marked: Result<(), Failed> = self.asking(&self.forgetting, number, pipe.query_async(&mut connection)).await;
        count(if marked.is_ok() { "forgotten" } else { "not_forgotten" });
    }

    async fn ask<T: redis::FromRedisValue>(&self, command: &redis::Cmd) -> Result<T, Failed> {
        let (mut connection, number) = self.connection();
        self.asking(&self.reading, number, command.query_async(&mut connection)).await
    }

    fn connection(&self) -> (ConnectionManager, u64) {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Nobody asks by this connection again: what it leads to may be what Redis was, and stay silent or a
    /// replica for as long as we hold on to it.
    fn give_up(&self, number: u64) {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        if let (true, Ok(new)) = (connection.1 == number, connect(&self.client)) {
            *connection = (new, number + 1);
        }
    }

    /// Under the deadline, unless Redis has just failed at the like.
    async fn asking<T>(
        &self,
        health: &Mutex<Health>,
        number: u64,
        asked: impl Future<Output = Result<T, RedisError>>,
    ) -> Result<T, Failed> {
        let health = || health.lock().unwrap_or_else(PoisonError::into_inner);
        if health().until.is_some_and(|until| Instant::now() < until) {
            return Err(Failed);
        }
        let (error, is_away) = match tokio::time::timeout(PATIENCE, asked).await {
            Ok(Ok(value)) => {
                let mut health = health();
                if health.until.take().is_some() {
                    health.rest.reset();
                }
                return Ok(value);
            }
            Ok(Err(error)) => (error.to_string(), is_away(&error)),
            Err(_) => (format!("no answer within {PATIENCE:?}"), true),
        };
        metrics::counter!("orderstream_cache_failures_total").increment(1);
        if is_away {
            self.give_up(number);
        }
        let mut health = health();
        if is_away {
            let rest = health.rest.delay();
            health.until = Some(Instant::now() + rest);
        }
        if health.told.is_due(&error) {
            let what = if is_away { "is away; orders are read from PostgreSQL alone" } else { "refuses" };
            tracing::warn!(error, "Redis {what}");
        }
        Err(Failed)
    }
}

/// What it refuses it has heard: this key is of another kind, there is no room. But one that is a replica, or
/// is still loading, is not the Redis that is meant.
fn is_away(error: &RedisError) -> bool {
    use ServerErrorKind::{BusyLoading, MasterDown, ReadOnly};
    match error.kind() {
        ErrorKind::Server(kind) => matches!(kind, ReadOnly | MasterDown | BusyLoading),
        kind => kind != ErrorKind::Extension,
    }
}

fn unix_millis() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Redis is away, or was a moment ago. It has been told.
struct Failed;

fn count(result: &'static str) {
    metrics::counter!("orderstream_cache_total", "result" => result).increment(1);
}
