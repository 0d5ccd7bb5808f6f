//! `Idempotency-Key`: a request that is sent again with its key is told what became of the first,
//! instead of being done twice. (draft-ietf-httpapi-idempotency-key-header)

use std::time::Duration;

use shared::{backoff::Backoff, db::Db, message::now};
use time::OffsetDateTime;

use crate::{
    error::Problem,
    json::Digest,
    store::keys::{self, Known},
};

/// Longest key, in characters.
pub(crate) const MAX_KEY: usize = 255;
/// How often it is looked for keys that are old enough to be forgotten, and how many at a time.
const FORGET_INTERVAL: Duration = Duration::from_secs(60);
const FORGET_BATCH: i64 = 1_000;

/// A key as a request claims it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    /// Whose key it is: two callers with the same one do not meet.
    pub scope: String,
    pub key: String,
    /// Of all that the request asks for.
    pub fingerprint: Digest,
    /// Until then the caller waits for its answer.
    pub answer_by: OffsetDateTime,
}

impl Claim {
    /// What this key has done, for a request that asks for the same; another one is refused.
    pub(crate) fn replay(&self, known: Known) -> Result<Known, Problem> {
        if known.fingerprint == self.fingerprint { Ok(known) } else { Err(Problem::KeyReused) }
    }
}

/// Is the first caller still being answered? Then nobody else can be, yet.
pub(crate) fn is_undecided(answer_by: OffsetDateTime) -> bool {
    now() < answer_by
}

/// Forgets keys older than `ttl`, for ever.
pub(crate) async fn forget_old_keys(db: Db, ttl: Duration) {
    // Another replica looks at another time.
    let interval = FORGET_INTERVAL.min(ttl);
    let pause = Backoff::new(interval, interval);
    loop {
        tokio::time::sleep(pause.clone().delay()).await;
        loop {
            match keys::forget_keys(&db, ttl, FORGET_BATCH).await {
                Ok(count) if count >= FORGET_BATCH as u64 => {}
                Ok(_) => break,
                Err(error) => {
                    tracing::debug!(error = error.chain(), "forgetting old idempotency keys");
                    break;
                }
            }
        }
    }
}
