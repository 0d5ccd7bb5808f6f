//! How often a caller may ask (`RATE_LIMIT`): so many requests a second, and some at once. GCRA: of
//! each caller only the time is kept at which it will have made up for all that it asked.

use std::{
    net::IpAddr,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    time::Duration,
};

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use dashmap::{DashMap, Entry};
use tokio::time::Instant;
use xxhash_rust::xxh3::xxh3_64;

pub(crate) const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");

/// Callers that are kept apart: a few MiB. Beyond that, those who are new share one place, so that
/// somebody with very many names does not take all memory.
const KEPT_APART: usize = 100_000;
/// Looking for callers that have nothing to make up for takes a while, and need not be often.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
const NANOS: u64 = 1_000_000_000;

/// What callers may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Quota {
    /// Requests a second.
    pub rate: u32,
    /// Requests at once.
    pub burst: u32,
}

pub(crate) struct RateLimiter {
    quota: Quota,
    policy: HeaderValue,
    kept_apart: usize,
    since: Instant,
    /// By caller: when it will have made up, in nanoseconds since we began.
    callers: DashMap<u64, u64>,
    /// As the map would have to count it.
    len: AtomicUsize,
    next_sweep: AtomicU64,
}

/// What is said to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub allowed: bool,
    /// Requests that could follow at once.
    remaining: u64,
    /// Until all may be used again.
    full_after: u64,
    /// Until there is one more.
    one_after: u64,
}

impl RateLimiter {
    pub(crate) fn new(quota: Quota) -> Self {
        Self::keeping(quota, KEPT_APART)
    }

    fn keeping(quota: Quota, kept_apart: usize) -> Self {
        let window = u64::from(quota.burst).div_ceil(u64::from(quota.rate));
        let policy = format!("\"default\";q={};w={window}", quota.burst);
        Self {
            quota,
            policy: HeaderValue::try_from(policy).unwrap_or(HeaderValue::from_static("\"default\"")),
            kept_apart,
            since: Instant::now(),
            callers: DashMap::new(),
            len: AtomicUsize::new(0),
            next_sweep: AtomicU64::new(0),
        }
    }

    /// A request of this user, else of whoever is at this address.
    pub(crate) fn ask(&self, user: Option<&str>, peer: Option<IpAddr>) -> Verdict {
        self.ask_at(key(user, peer), u64::try_from(self.since.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    fn ask_at(&self, key: u64, now: u64) -> Verdict {
        let known = self.callers.contains_key(&key);
        let key = if known || self.has_room(now) { key } else { 0 };
        let (verdict, is_new) = match self.callers.entry(key) {
            Entry::Occupied(mut caller) => {
                let (verdict, made_up_at) = self.quota.decide(*caller.get(), now);
                caller.insert(made_up_at);
                (verdict, false)
            }
            Entry::Vacant(place) => {
                let (verdict, made_up_at) = self.quota.decide(now, now);
                place.insert(made_up_at);
                (verdict, true)
            }
        };
        if is_new {
            self.len.fetch_add(1, Ordering::Relaxed);
        }
        verdict
    }

    fn has_room(&self, now: u64) -> bool {
        if self.len.load(Ordering::Relaxed) < self.kept_apart {
            return true;
        }
        let next = self.next_sweep.load(Ordering::Relaxed);
        let after = now.saturating_add(u64::try_from(SWEEP_INTERVAL.as_nanos()).unwrap_or(NANOS));
        let is_mine =
            next <= now && self.next_sweep.compare_exchange(next, after, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        if is_mine {
            // Who has made up for everything is as good as somebody new.
            let mut dropped = 0;
            self.callers.retain(|_, made_up_at| {
                let stays = *made_up_at > now;
                dropped += usize::from(!stays);
                stays
            });
            self.len.fetch_sub(dropped, Ordering::Relaxed);
        }
        self.len.load(Ordering::Relaxed) < self.kept_apart
    }

    /// Says how things stand (draft-ietf-httpapi-ratelimit-headers-10).
    pub(crate) fn tell(&self, verdict: Verdict, headers: &mut HeaderMap) {
        headers.insert(RATE_LIMIT_POLICY, self.policy.clone());
        let Verdict { remaining, full_after, .. } = verdict;
        if let Ok(value) = HeaderValue::try_from(format!("\"default\";r={remaining};t={full_after}")) {
            headers.insert(RATE_LIMIT, value);
        }
    }
}

impl Verdict {
    /// Seconds, at least one.
    pub(crate) fn retry_after(self) -> u64 {
        self.one_after.max(1)
    }
}

impl Quota {
    /// What is said to a request at `now` of a caller that will have made up at `made_up_at`, and
    /// when it will have then.
    fn decide(self, made_up_at: u64, now: u64) -> (Verdict, u64) {
        let one = NANOS / u64::from(self.rate);
        let all = one * u64::from(self.burst);
        let begin = made_up_at.max(now);
        let after = begin + one;
        let allowed = after - now <= all;
        let made_up_at = if allowed { after } else { begin };
        let owed = made_up_at - now;
        let verdict = Verdict {
            allowed,
            remaining: all.saturating_sub(owed) / one,
            full_after: owed.div_ceil(NANOS),
            one_after: (owed + one).saturating_sub(all).div_ceil(NANOS),
        };
        (verdict, made_up_at)
    }
}

/// 0 is nobody's own.
fn key(user: Option<&str>, peer: Option<IpAddr>) -> u64 {
    let hash = match (user, peer) {
        (Some(user), _) => xxh3_64(format!("u{user}").as_bytes()),
        // One household or machine has a whole network of these.
        (None, Some(IpAddr::V6(address))) if address.to_ipv4_mapped().is_none() => xxh3_64(&address.octets()[..8]),
        (None, Some(address)) => xxh3_64(address.to_canonical().to_string().as_bytes()),
        (None, None) => 0,
    };
    hash.max(1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_burst_is_allowed_and_then_the_rate() {
        let limiter = RateLimiter::new(Quota { rate: 10, burst: 3 });
        let ask = |millis: u64| limiter.ask_at(7, millis * 1_000_000);
        assert_eq!([0, 0, 0, 0].map(|at| ask(at).allowed), [true, true, true, false]);
        assert_eq!(ask(0).retry_after(), 1);
        assert!(ask(100).allowed && !ask(150).allowed && ask(200).allowed);
        assert_eq!(limiter.ask_at(8, 0).remaining, 2);
        let mut headers = HeaderMap::new();
        limiter.tell(ask(10_000), &mut headers);
        assert_eq!(headers[RATE_LIMIT_POLICY], "\"default\";q=3;w=1");
        assert_eq!(headers[RATE_LIMIT], "\"default\";r=2;t=1");
    }

    #[test]
    fn callers_are_users_else_addresses() {
        let of = |user: Option<&str>, peer: &str| key(user, Some(peer.parse().unwrap()));
        assert_eq!(of(Some("a"), "10.0.0.1"), of(Some("a"), "10.0.0.2"));
        assert_ne!(of(Some("a"), "10.0.0.1"), of(Some("b"), "10.0.0.1"));
        assert_ne!(of(None, "10.0.0.1"), of(None, "10.0.0.2"));
        assert_eq!(of(None, "::ffff:10.0.0.1"), of(None, "10.0.0.1"));
        assert_eq!(of(None, "2001:db8::1"), of(None, "2001:db8::2"));
        assert_ne!(of(None, "2001:db8:0:1::1"), of(None, "2001:db8::1"));
    }

    #[test]
    fn however_many_callers_come_only_so_many_are_kept() {
        let limiter = RateLimiter::keeping(Quota { rate: 1, burst: 2 }, 100);
        for caller in 1..=10_000 {
            limiter.ask_at(caller, 0);
        }
        assert!(limiter.callers.len() <= 101, "{}", limiter.callers.len());
        // Strangers share a place, those who are known have their own.
        assert!(!limiter.ask_at(20_000, 0).allowed && limiter.ask_at(1, 0).allowed);
        // Those who have made up make room.
        for caller in 1..=10_000 {
            assert!(limiter.ask_at(20_000 + caller, caller * 10 * NANOS).allowed);
        }
        assert!(limiter.callers.len() <= 101, "{}", limiter.callers.len());
    }

    proptest! {
        /// In no stretch of time is more allowed than the burst and the rate give, and who keeps to
        /// the rate is never refused.
        #[test]
        fn no_more_than_burst_and_rate(
            rate in 1u32..1_000, burst in 1u32..100, pauses in proptest::collection::vec(0u64..500_000_000, 1..300)
        ) {
            let quota = Quota { rate, burst };
            let (mut now, mut made_up_at) = (0, 0);
            let mut allowed = Vec::new();
            for pause in pauses {
                now += pause;
                let (verdict, next) = quota.decide(made_up_at, now);
                made_up_at = next;
                if verdict.allowed {
                    allowed.push(now);
                } else {
                    let (_, again) = quota.decide(made_up_at, now + verdict.retry_after() * NANOS);
                    prop_assert!(again > made_up_at, "after Retry-After there is one");
                }
            }
            let one = NANOS / u64::from(rate);
            for (first, start) in allowed.iter().enumerate() {
                for (count, end) in allowed[first..].iter().enumerate() {
                    prop_assert!((count as u64) < u64::from(burst) + (end - start) / one);
                }
            }
        }

        #[test]
        fn who_keeps_to_the_rate_is_never_refused(rate in 1u32..1_000_000, burst in 1u32..1_000) {
            let quota = Quota { rate, burst };
            let mut made_up_at = 0;
            for n in 0..2_000 {
                let (verdict, next) = quota.decide(made_up_at, n * (NANOS / u64::from(rate)));
                prop_assert!(verdict.allowed);
                made_up_at = next;
            }
        }
    }
}
