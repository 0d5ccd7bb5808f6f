//! When the orders of an open loop are due: at a fixed rate, whatever becomes of those before them.
//! Latencies are counted from then on, so that a service which stalls cannot hide it by keeping its
//! callers from asking (coordinated omission).

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// What is due and not yet sent, and who could send it, for all callers of one thread.
#[derive(Default)]
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
    /// Tells the callers when an order is due, from now on until `until`.
    ///
    /// # Errors
    /// When the machine grants no timer.
    pub async fn pace(self: Rc<Self>, per_second: f64, until: Instant) -> anyhow::Result<()> {
        let alarm = Alarm::new().context("making a timer")?;
        let began = Instant::now();
        for number in 0_u32.. {
            let at = began + Duration::from_secs_f64(f64::from(number) / per_second);
            if at >= until {
                break;
            }
            alarm.sleep_until(at).await.context("waiting for a timer")?;
            self.0.borrow_mut().give(at);
        }
        // Whoever waits for more hears that there is none.
        let state = &mut *self.0.borrow_mut();
        state.is_over = true;
        state.idle.clear();
        Ok(())
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

/// A timer that is good to microseconds, in the runtime's own thread: the runtime's is good to a
/// millisecond, in which the service has answered, and a second thread that sleeps costs a tenth of
/// what an order does.
struct Alarm(AsyncFd<OwnedFd>);

impl Alarm {
    fn new() -> io::Result<Self> {
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        #[expect(
            deprecated,
            reason = "what took its place is unsafe: a descriptor may be closed, which one of our own is not"
        )]
        let timer = AsyncFd::with_interest(timer, Interest::READABLE)?;
        Ok(Self(timer))
    }

    async fn sleep_until(&self, at: Instant) -> io::Result<()> {
        let left = at.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        let never_again = Timespec { tv_sec: 0, tv_nsec: 0 };
        let once = Timespec::try_from(left).map_err(io::Error::other)?;
        let timer = Itimerspec { it_interval: never_again, it_value: once };
        timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &timer)?;
        // Not read: to set it again takes back that it went off.
        self.0.readable().await?.clear_ready();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::LocalSet;

    use super::*;

    #[tokio::test]
    async fn of_the_idle_callers_the_last_to_come_sends_the_next_order() {
        let all = Rc::new(Due::default());
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
            let due = Rc::new(Due::default());
            tokio::task::spawn_local(due.clone().pace(1000.0, Instant::now() + Duration::from_millis(50)));
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
