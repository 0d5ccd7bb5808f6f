//! Growing, jittered delays between attempts, and how often of attempts that fail is told: one value
//! each, used wherever something is tried again.

use std::time::Duration;

use rand::RngExt as _;
use tokio::time::Instant;

/// Doubles from `floor` to `ceiling`; each delay is drawn between half of that and the whole.
#[derive(Clone, Debug)]
pub struct Backoff {
    floor: Duration,
    ceiling: Duration,
    next: Duration,
}

impl Backoff {
    /// For a server that is away: quick at first, never a burden.
    pub const RECONNECT: Self = Self::new(Duration::from_millis(50), Duration::from_secs(2));

    #[must_use]
    pub const fn new(floor: Duration, ceiling: Duration) -> Self {
        Self { floor, ceiling, next: floor }
    }

    /// How long to wait before the next attempt.
    pub fn delay(&mut self) -> Duration {
        let whole = self.next;
        self.next = (whole * 2).min(self.ceiling);
        whole.mul_f64(rand::rng().random_range(0.5..=1.0))
    }

    /// How long to wait after so many attempts in a row that failed, for those who keep only their
    /// number.
    #[must_use]
    pub fn after(&self, failures: u32) -> Duration {
        let doublings = failures.saturating_sub(1).min(31);
        let whole = self.floor.saturating_mul(1 << doublings).min(self.ceiling);
        Self::new(whole, whole).delay()
    }

    /// After a success.
    pub fn reset(&mut self) {
        self.next = self.floor;
    }
}

/// Whether a failure that comes again and again is to be told: the first time, when it is another, and
/// now and then.
#[derive(Debug, Default)]
pub struct Seldom {
    told: Option<(String, Instant)>,
}

impl Seldom {
    const PAUSE: Duration = Duration::from_secs(10);

    /// Is this to be told now?
    pub fn is_due(&mut self, error: &str) -> bool {
        self.is_due_at(error, Instant::now())
    }

    fn is_due_at(&mut self, error: &str, now: Instant) -> bool {
        let due = self.told.as_ref().is_none_or(|(told, at)| told != error || now - *at >= Self::PAUSE);
        if due {
            self.told = Some((error.to_owned(), now));
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_failure_is_told_when_it_is_new_and_then_now_and_then() {
        let (mut seldom, now) = (Seldom::default(), Instant::now());
        assert!(seldom.is_due_at("refused", now));
        assert!(!seldom.is_due_at("refused", now));
        assert!(seldom.is_due_at("wrong password", now));
        let later = now + Seldom::PAUSE;
        assert!(!seldom.is_due_at("wrong password", later - Duration::from_nanos(1)));
        assert!(seldom.is_due_at("wrong password", later));
        assert!(!seldom.is_due_at("wrong password", later));
    }

    proptest! {
        #[test]
        fn delays_stay_between_half_the_floor_and_the_ceiling(
            floor in 1u64..1_000, factor in 1u64..100, attempts in 1usize..50
        ) {
            let (floor, ceiling) = (Duration::from_millis(floor), Duration::from_millis(floor * factor));
            let mut backoff = Backoff::new(floor, ceiling);
            for attempt in 0..attempts {
                let delay = backoff.delay();
                prop_assert!(delay >= floor / 2 && delay <= ceiling, "attempt {}: {:?}", attempt, delay);
            }
            backoff.reset();
            prop_assert!(backoff.delay() <= floor);
            let after = backoff.after(u32::try_from(attempts).unwrap());
            prop_assert!(after >= floor / 2 && after <= ceiling, "{:?}", after);
        }
    }
}
