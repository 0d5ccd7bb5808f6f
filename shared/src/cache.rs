//! Orders as they were read last, in Redis, so that reading them again costs the database nothing.
//! Optional, and trusted with little: what is not there, or not there in time, is read from
//! PostgreSQL, and whatever is there is gone after `CACHE_TTL`.
//!
//! Whoever changes an order forgets it here after the commit and before anybody is answered. A reader
//! may have read just before that commit and keep it just after: so what is forgotten leaves a mark,
//! for longer than a reader may take, and what is read is kept only where nothing is. What can go
//! wrong with that (Redis is away or stands still while an order changes, or a process dies between
//! the commit and the mark) leaves an order as it was for `CACHE_TTL` and no longer.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use redis::{
    Client, ExistenceCheck, RedisError, SetExpiry, SetOptions,
    aio::{ConnectionManager, ConnectionManagerConfig},
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    backoff::{Backoff, Seldom},
    settings::CacheSettings,
};

/// How long a mark stays, and how long a reader may have taken that keeps what it read.
const MARK: Duration = Duration::from_secs(1);
const SLOWEST_READ: Duration = Duration::from_millis(250);
/// Redis is to be quicker than PostgreSQL, or it is of no use.
const PATIENCE: Duration = Duration::from_millis(50);
/// For how long a Redis that failed is left alone.
const REST: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(5));
/// Another form of what is kept needs another number here: both releases run side by side for a
/// while.
const FORM: &str = "orderstream:1";

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
    connection: ConnectionManager,
    ttl: Duration,
    health: Mutex<Health>,
}

/// Whether Redis is asked.
struct Health {
    rest: Backoff,
    until: Option<Instant>,
    told: Seldom,
}

impl Cache {
    /// Connects when it is used.
    ///
    /// # Errors
    /// When the address makes no sense; without it, since there may be a password in it.
    pub fn open(settings: &CacheSettings) -> anyhow::Result<Self> {
        let Some(address) = settings.redis_addr.as_deref().filter(|address| !address.is_empty()) else {
            return Ok(Self(None));
        };
        let url = if address.contains("://") { address.to_owned() } else { format!("redis://{address}") };
        let client = Client::open(url).context("REDIS_ADDR is no host:port, and no redis:// or rediss:// URL")?;
        // One attempt: whoever asks has a deadline, and then Redis is left alone for a while.
        let config = ConnectionManagerConfig::new()
            .set_number_of_retries(0)
            .set_connection_timeout(Some(PATIENCE))
            .set_response_timeout(Some(PATIENCE));
        let connection = ConnectionManager::new_lazy_with_config(client, config).context("REDIS_ADDR")?;
        let health = Mutex::new(Health { rest: REST, until: None, told: Seldom::default() });
        Ok(Self(Some(Arc::new(Redis { connection, ttl: settings.cache_ttl, health }))))
    }

    /// What is kept, else what `read` finds, which is kept then. What is not there is never kept.
    ///
    /// # Errors
    /// Those of `read`.
    pub async fn through<T: Serialize + DeserializeOwned, E>(
        &self,
        key: Key<'_>,
        read: impl Future<Output = Result<Option<T>, E>>,
    ) -> Result<Option<T>, E> {
        let Some(redis) = &self.0 else { return read.await };
        let key = key.to_string();
        match redis.get(&key).await {
            Looked::Found(json) => {
                if let Ok(value) = serde_json::from_slice(&json) {
                    count("hit");
                    return Ok(Some(value));
                }
                count("miss");
                read.await
            }
            Looked::Nothing => {
                count("miss");
                let began = Instant::now();
                let value = read.await?;
                if let Some(value) = value.as_ref().filter(|_| began.elapsed() < SLOWEST_READ) {
                    // Our own types always serialize.
                    redis.keep(&key, serde_json::to_vec(value).unwrap_or_default()).await;
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
            Ok(Some(json)) if Vec::is_empty(&json) => Looked::Marked,
            Ok(Some(json)) => Looked::Found(json),
            Err(Failed) => Looked::Away,
        }
    }

    async fn keep(&self, key: &str, json: Vec<u8>) {
        let ttl = u64::try_from(self.ttl.as_millis()).unwrap_or(u64::MAX);
        let options = SetOptions::default().conditional_set(ExistenceCheck::NX).with_expiration(SetExpiry::PX(ttl));
        let _: Result<Option<String>, Failed> = self.ask(redis::cmd("SET").arg(key).arg(json).arg(options)).await;
    }

    async fn mark(&self, keys: &[String]) {
        let mut pipe = redis::pipe();
        for key in keys {
            pipe.pset_ex(key, "", MARK.as_millis() as u64).ignore();
        }
        let mut connection = self.connection.clone();
        let marked: Result<(), Failed> = self.asking(pipe.query_async(&mut connection)).await;
        count(if marked.is_ok() { "forgotten" } else { "not_forgotten" });
    }

    async fn ask<T: redis::FromRedisValue>(&self, command: &redis::Cmd) -> Result<T, Failed> {
        let mut connection = self.connection.clone();
        self.asking(command.query_async(&mut connection)).await
    }

    /// Under the deadline, unless Redis has just failed.
    async fn asking<T>(&self, asked: impl Future<Output = Result<T, RedisError>>) -> Result<T, Failed> {
        if self.health().until.is_some_and(|until| Instant::now() < until) {
            return Err(Failed);
        }
        let error = match tokio::time::timeout(PATIENCE, asked).await {
            Ok(Ok(value)) => {
                let mut health = self.health();
                if health.until.take().is_some() {
                    health.rest.reset();
                }
                return Ok(value);
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {PATIENCE:?}"),
        };
        metrics::counter!("orderstream_cache_failures_total").increment(1);
        let mut health = self.health();
        let rest = health.rest.delay();
        health.until = Some(Instant::now() + rest);
        if health.told.is_due(&error) {
            tracing::warn!(error, "Redis is away; orders are read from PostgreSQL alone");
        }
        Err(Failed)
    }

    fn health(&self) -> std::sync::MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Redis is away, or was a moment ago. It has been told.
struct Failed;

fn count(result: &'static str) {
    metrics::counter!("orderstream_cache_total", "result" => result).increment(1);
}
