//! A circuit breaker: a service that fails again and again is left alone for a while, and then
//! asked by one request whether it is back.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use shared::backoff::Backoff;
use tokio::time::Instant;

/// So many failures in a row are no accident.
const FAILURES: u32 = 5;
/// How long it is left alone: longer each time that it is not back.
const PAUSE: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));

#[derive(Debug)]
pub(crate) struct Breaker {
    state: Mutex<State>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Closed {
        /// In a row.
        failures: u32,
    },
    /// Nobody asks before this time.
    Open {
        until: Instant,
        /// How often in a row it was not back.
        times: u32,
    },
    /// One asks, all others wait for what comes of it.
    Probing { times: u32 },
}

/// Leave to ask once. What came of it is to be told; who breaks off leaves the place to the next.
#[must_use = "tell what came of it"]
pub(crate) struct Leave<'a> {
    breaker: &'a Breaker,
    is_probe: bool,
}

impl Breaker {
    pub(crate) fn new() -> Self {
        Self { state: Mutex::new(State::Closed { failures: 0 }) }
    }

    /// `None`: not now.
    pub(crate) fn ask(&self, now: Instant) -> Option<Leave<'_>> {
        let mut state = self.state();
        match *state {
            State::Closed { .. } => Some(Leave { breaker: self, is_probe: false }),
            State::Open { until, times } if now >= until => {
                *state = State::Probing { times };
                Some(Leave { breaker: self, is_probe: true })
            }
            State::Open { .. } | State::Probing { .. } => None,
        }
    }

    /// For a gauge: 0 closed, 1 asking whether it is back, 2 open.
    pub(crate) fn level(&self) -> u8 {
        match *self.state() {
            State::Closed { .. } => 0,
            State::Probing { .. } => 1,
            State::Open { .. } => 2,
        }
    }

    /// Nothing panics while it is held, and any state is a good one.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Leave<'_> {
    pub(crate) fn succeeded(mut self) {
        let mut state = self.breaker.state();
        match *state {
            State::Closed { .. } => *state = State::Closed { failures: 0 },
            State::Probing { .. } if self.is_probe => *state = State::Closed { failures: 0 },
            // Asked before it opened: what came of that is old news.
            State::Probing { .. } | State::Open { .. } => {}
        }
        drop(state);
        self.is_probe = false;
    }

    pub(crate) fn failed(mut self, now: Instant) {
        let mut state = self.breaker.state();
        match *state {
            State::Closed { failures } if failures + 1 < FAILURES => *state = State::Closed { failures: failures + 1 },
            State::Closed { .. } => *state = State::Open { until: now + PAUSE.after(1), times: 1 },
            State::Probing { times } if self.is_probe => {
                let times = times.saturating_add(1);
                *state = State::Open { until: now + PAUSE.after(times), times };
            }
            State::Probing { .. } | State::Open { .. } => {}
        }
        drop(state);
        self.is_probe = false;
    }
}

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        if !self.is_probe {
            return;
        }
        let mut state = self.breaker.state();
        if let State::Probing { times } = *state {
            *state = State::Open { until: Instant::now(), times };
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn failures_in_a_row_open_it_and_one_probe_closes_it() {
        let (breaker, start) = (Breaker::new(), Instant::now());
        let leave = || breaker.ask(start).expect("closed");
        for _ in 1..FAILURES {
            leave().failed(start);
        }
        leave().succeeded();
        for _ in 1..FAILURES {
            leave().failed(start);
        }
        assert_eq!(breaker.level(), 0);
        leave().failed(start);
        assert_eq!(breaker.level(), 2);
        assert!(breaker.ask(start).is_none());

        let later = start + Duration::from_secs(1);
        let probe = breaker.ask(later).expect("a probe");
        assert!(breaker.ask(later).is_none(), "one at a time");
        probe.failed(later);
        assert!(breaker.ask(later).is_none());
        let later = later + Duration::from_secs(2);
        // Who breaks off leaves the place to the next.
        drop(breaker.ask(later).expect("a probe"));
        let probe = breaker.ask(later.max(Instant::now())).expect("the next probe");
        probe.succeeded();
        assert_eq!(breaker.level(), 0);
        assert!(breaker.ask(later).is_some());
    }

    #[test]
    fn what_was_asked_before_it_opened_neither_closes_it_nor_keeps_it_open() {
        let (breaker, start) = (Breaker::new(), Instant::now());
        let early: Vec<_> = (0..FAILURES + 2).filter_map(|_| breaker.ask(start)).collect();
        let mut early = early.into_iter();
        for leave in early.by_ref().take(FAILURES as usize) {
            leave.failed(start);
        }
        early.next().expect("one").succeeded();
        assert_eq!(breaker.level(), 2);
        let later = start + Duration::from_secs(1);
        let probe = breaker.ask(later).expect("a probe");
        early.next().expect("another").failed(later);
        assert_eq!(breaker.level(), 1);
        probe.succeeded();
        assert_eq!(breaker.level(), 0);
    }

    proptest! {
        /// Whatever happens: while it is open nobody asks, it is asked again within the longest
        /// pause, one at a time, and a success then closes it.
        #[test]
        fn it_never_stays_open_for_good(steps in proptest::collection::vec((0u8..4, 0u64..40_000), 1..60)) {
            let breaker = Breaker::new();
            let mut now = Instant::now();
            for (what, pause) in steps {
                now += Duration::from_millis(pause);
                match (what, breaker.ask(now)) {
                    (0, Some(leave)) => leave.succeeded(),
                    (1 | 2, Some(leave)) => leave.failed(now),
                    (_, leave) => drop(leave),
                }
                prop_assert_ne!(breaker.level(), 1);
            }
            let later = now + Duration::from_secs(31);
            let leave = breaker.ask(later);
            prop_assert!(leave.is_some());
            if breaker.level() == 1 {
                prop_assert!(breaker.ask(later).is_none());
            }
            if let Some(leave) = leave {
                leave.succeeded();
            }
            prop_assert_eq!(breaker.level(), 0);
        }
    }
}
