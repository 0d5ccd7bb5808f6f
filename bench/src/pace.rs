//! When the orders of an open loop are due: at a fixed rate, whatever becomes of those before them.
//! Latencies are counted from then on, so that a service which stalls cannot hide it by keeping its
//! callers from asking (coordinated omission).

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

/// So many due at once are told at once.
const TOLD: usize = 1024;

/// What is due and not yet sent, and who could send it, for all callers of one thread.
pub struct Due(RefCell<State>);

#[derive(Default)]
struct State {
    late: VecDeque<Instant>,
    /// Of these the last to come is the first to go, as in the pools of HTTP clients: what load
    /// needs few connections uses few.
    idle: Vec<oneshot::Sender<Instant>>,
    is_over: bool,
}

impl Due {
    /// Begins at once and ends at `until`.
    ///
    /// # Errors
    /// When the machine grants no thread.
    pub fn start(per_second: f64, until: Instant) -> anyhow::Result<Rc<Self>> {
        let (told, mut hears) = mpsc::channel(TOLD);
        // A thread of its own: the runtime's timer is good to a millisecond, in which the service has
        // answered.
        std::thread::Builder::new()
            .name("pace".to_owned())
            .spawn(move || tell(per_second, until, &told))
            .context("starting a thread")?;
        let due = Rc::new(Self(RefCell::default()));
        let all = due.clone();
        tokio::task::spawn_local(async move {
            while let Some(at) = hears.recv().await {
                all.0.borrow_mut().give(at);
            }
            // Whoever waits for more hears that there is none.
            let state = &mut *all.0.borrow_mut();
            state.is_over = true;
            state.idle.clear();
        });
        Ok(due)
    }

    /// When the next order was due; none when that was the last.
    pub async fn next(&self) -> Option<Instant> {
        let told = {
            let state = &mut *self.0.borrow_mut();
            // What is due already is sent, however late.
            if let Some(at) = state.late.pop_front() {
                return Some(at);
            }
            if state.is_over {
                return None;
            }
            let (tell, told) = oneshot::channel();
            state.idle.push(tell);
            told
        };
        told.await.ok()
    }
}

impl State {
    fn give(&mut self, mut at: Instant) {
        while let Some(caller) = self.idle.pop() {
            match caller.send(at) {
                Ok(()) => return,
                Err(back) => at = back, // it gave up waiting
            }
        }
        self.late.push_back(at);
    }
}

fn tell(per_second: f64, until: Instant, told: &mpsc::Sender<Instant>) {
    let began = Instant::now();
    for number in 0_u32.. {
        let at = began + Duration::from_secs_f64(f64::from(number) / per_second);
        if at >= until {
            return;
        }
        std::thread::sleep(at.saturating_duration_since(Instant::now()));
        if told.blocking_send(at).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::LocalSet;

    use super::*;

    #[tokio::test]
    async fn of_the_idle_callers_the_last_to_come_sends_the_next_order() {
        let all = Rc::new(Due(RefCell::default()));
        let (first, last) = (all.clone(), all.clone());
        let waiting = async move { tokio::join!(biased; first.next(), last.next()) };
        let giving = async {
            let at = Instant::now();
            all.0.borrow_mut().give(at);
            all.0.borrow_mut().idle.remove(0);
            at
        };
        let ((first, last), at) = tokio::join!(biased; waiting, giving);
        assert_eq!((first, last), (None, Some(at)));
    }

    #[tokio::test]
    async fn orders_are_due_at_their_times_however_late_they_are_asked_for() {
        let local = LocalSet::new();
        let all = local.run_until(async {
            let due = Due::start(1000.0, Instant::now() + Duration::from_millis(50)).expect("a thread");
            let mut all = Vec::new();
            while let Some(at) = due.next().await {
                all.push(at);
            }
            all
        });
        let all = all.await;
        assert!((45..=51).contains(&all.len()), "{} are due in 50 ms", all.len());
        for pair in all.windows(2) {
            assert_eq!((pair[1] - pair[0]).as_micros() / 10, 100, "one every millisecond");
        }
    }
}
