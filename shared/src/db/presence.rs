//! Whether the server is there, and can be written to. Whoever meets trouble is in doubt; one task looks.
//! While the server is known to be away, everybody else is refused at once, and only that task goes on
//! looking for it.

use std::{
    convert::Infallible,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep, timeout},
};

use super::{Db, DbError, writable};
use crate::backoff::Backoff;

/// A server that is slow, and not silent, is not to have all its connections made anew with each statement
/// that runs out of time.
const BETWEEN_ERAS_OF_SILENCE: Duration = Duration::from_secs(10);

/// Where the server was found when somebody last looked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Presence {
    /// It can be written to, as far as we know.
    #[default]
    There,
    /// A standby, or made read-only: it may be read.
    ReadOnly,
    Away,
}

/// What the pool, its connections and those who use them know of the server.
#[derive(Debug, Default)]
pub(super) struct Watched {
    presence: watch::Sender<Presence>,
    doubted: Notify,
    /// A connection did not answer in time.
    silent: AtomicBool,
    /// A connection led to a server that is read-only.
    misled: AtomicBool,
    era: AtomicU64,
}

impl Watched {
    /// Has somebody look for the server.
    pub(super) fn doubt(&self) {
        self.doubted.notify_one();
    }

    /// Notes that a connection fell silent, and has somebody look.
    pub(super) fn silence(&self) {
        self.silent.store(true, Ordering::Relaxed);
        self.doubt();
    }

    /// Notes that a connection leads to a server that is read-only, and has somebody look.
    pub(super) fn mislead(&self) {
        self.misled.store(true, Ordering::Relaxed);
        self.doubt();
    }

    pub(super) fn era(&self) -> u64 {
        self.era.load(Ordering::Relaxed)
    }

    /// No connection that was made before now is used again: it may lead to where the server was.
    fn begin_era(&self) {
        self.era.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns what was known before.
    fn set(&self, found: Presence) -> Presence {
        self.presence.send_replace(found)
    }
}

impl Db {
    /// What is known of the server. Without [`Self::watch`] it is always taken to be there.
    #[must_use]
    pub fn presence(&self) -> Presence {
        *self.watched.presence.borrow()
    }

    /// Looks for the server whenever somebody is in doubt about it, until it is found. It counts as away
    /// only after as long as a caller would wait for a connection: a restart or a failover may take less.
    pub async fn watch(&self) -> Infallible {
        let mut of_silence: Option<Instant> = None;
        loop {
            self.watched.doubted.notified().await;
            let (since, mut backoff) = (Instant::now(), Backoff::RECONNECT);
            loop {
                let found = self.look().await;
                if found == Some(Presence::There) {
                    let was_elsewhere = self.watched.set(Presence::There) != Presence::There;
                    if was_elsewhere {
                        tracing::info!("PostgreSQL is back");
                    }
                    // One leads to the server: the others may lead where it was.
                    let misled = self.watched.misled.swap(false, Ordering::Relaxed);
                    let is_soon = of_silence.is_some_and(|then| then.elapsed() < BETWEEN_ERAS_OF_SILENCE);
                    let silent = !is_soon && self.watched.silent.swap(false, Ordering::Relaxed);
                    if silent {
                        of_silence = Some(Instant::now());
                    }
                    if was_elsewhere || misled || silent {
                        self.watched.begin_era();
                    }
                    break;
                }
                let Some(found) = found else {
                    sleep(backoff.delay()).await;
                    continue;
                };
                if since.elapsed() >= self.settings.query_timeout && self.watched.set(found) != found {
                    match found {
                        Presence::ReadOnly => {
                            tracing::warn!("PostgreSQL is read-only; changes are refused until it is not")
                        }
                        _ => tracing::warn!("PostgreSQL is away; requests are refused at once until it is back"),
                    }
                }
                sleep(backoff.delay()).await;
            }
        }
    }

    /// Looks by a connection of the pool, as everybody else would; when that leads to no server that can be
    /// written to, by a new one. If that one does, the pool's connections lead elsewhere, and are given up.
    /// `None`: all of the pool are at work, and there is room for no other. Those that wait in vain say so
    /// when their time is up.
    async fn look(&self) -> Option<Presence> {
        let deadline = self.settings.query_timeout;
        let by_pool = async { writable(&*self.any_connection().await?, deadline).await }.await;
        if matches!(by_pool, Ok(true)) {
            return Some(Presence::There);
        }
        let by_new_one = timeout(deadline, async {
            let connection = self.pool.dedicated_connection().await.map_err(bb8::RunError::User)?;
            writable(&connection, deadline).await
        });
        let all_at_work = matches!(by_pool, Err(DbError::Away(_))) && self.is_full();
        match by_new_one.await.unwrap_or(Err(DbError::Lost(None))) {
            Ok(true) => {
                // One that was not to be had tells nothing of the others: all may be at work.
                if !matches!(by_pool, Err(DbError::Away(_))) {
                    self.watched.begin_era();
                }
                Some(Presence::There)
            }
            Ok(false) => {
                self.watched.mislead();
                Some(Presence::ReadOnly)
            }
            Err(_) if all_at_work => None,
            Err(_) => Some(Presence::Away),
        }
    }

    fn is_full(&self) -> bool {
        self.pool.state().connections >= self.settings.max_conns
    }
}
