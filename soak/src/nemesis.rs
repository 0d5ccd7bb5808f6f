//! Carries a schedule out.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use test_support::{Mode, Proxy, Service};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use crate::schedule::{Fault, How, Part, Step};
use crate::stage::Stage;

/// For a process to end in good order: it gives itself 15 s.
const ENDS_WITHIN: Duration = Duration::from_secs(40);

/// Until operators, or what stands in for them, see that a standby is dead, and let the primary go on alone.
const SEES_DEAD_STANDBY_AFTER: Duration = Duration::from_secs(2);

#[derive(Default)]
pub struct Nemesis {
    done: Mutex<BTreeMap<&'static str, usize>>,
}

impl Nemesis {
    /// Until the time is up; then all is whole again.
    pub async fn run(&self, stage: &Arc<Stage>, schedule: Vec<Step>, until: Instant, now: impl Fn() -> f64) {
        for step in schedule {
            if Instant::now() + step.calm >= until {
                break;
            }
            sleep(step.calm).await;
            let texts: Vec<_> = step.faults.iter().map(Fault::to_string).collect();
            println!("[{:6.1} s] {}", now(), texts.join("; "));
            let mut faults = JoinSet::new();
            for fault in step.faults {
                *self.done.lock().unwrap_or_else(PoisonError::into_inner).entry(fault.how.name()).or_default() += 1;
                faults.spawn(carry_out(Arc::clone(stage), fault));
            }
            while let Some(ended) = faults.join_next().await {
                if let Err(error) = ended {
                    std::panic::resume_unwind(error.into_panic());
                }
            }
        }
        sleep_until(until).await;
    }

    /// How often each kind of fault was brought about.
    pub fn done(&self) -> BTreeMap<&'static str, usize> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn carry_out(stage: Arc<Stage>, fault: Fault) {
    let stage = &*stage;
    let Fault { part, how, lasts } = fault;
    match part {
        Part::Api(index) => {
            let mut api = stage.apis[index].lock().await;
            if end_or_stop(&api, how, lasts).await {
                stage.start_api(index, &mut api).await;
            }
        }
        Part::Worker(index) => {
            let mut worker = stage.workers[index].lock().await;
            if end_or_stop(&worker, how, lasts).await {
                stage.start_worker(index, &mut worker).await;
            }
        }
        Part::Broker(index) => {
            let mut broker = stage.brokers[index].lock().await;
            match how {
                How::Stop => broker.freeze(),
                How::Restart => broker.stop().await,
                _ => broker.kill().await,
            }
            sleep(lasts).await;
            match how {
                How::Stop => broker.thaw(),
                _ => broker.start_again().await,
            }
            drop(broker);
            stage.system.kafka.wait_for_whole_copies().await;
        }
        Part::Primary => of_primary(stage, how, lasts).await,
        Part::Standby => of_standby(stage, how, lasts).await,
        Part::ApiLink(index) => of_relays(std::slice::from_ref(&stage.api_links[index]), how, lasts).await,
        Part::BrokerLink(index) => of_relays(std::slice::from_ref(&stage.broker_links[index]), how, lasts).await,
        Part::DatabaseLink(process) => of_relays(stage.database_links[process].relays(), how, lasts).await,
    }
}

/// Is another one to be started now?
async fn end_or_stop(service: &Service, how: How, lasts: Duration) -> bool {
    match how {
        How::Stop => {
            service.sigstop();
            sleep(lasts).await;
            service.sigcont();
            return false;
        }
        How::Restart => {
            service.sigterm();
            service.exit_within(ENDS_WITHIN).await;
        }
        _ => service.kill9(),
    }
    sleep(lasts).await;
    true
}

async fn of_primary(stage: &Stage, how: How, lasts: Duration) {
    let mut pair = stage.pair.lock().await;
    match how {
        How::Stop => {
            pair.primary().freeze().await;
            sleep(lasts).await;
            pair.primary().thaw().await;
        }
        How::FailOver => {
            pair.primary().kill().await;
            pair.promote().await;
            stage.move_addresses(&pair.primary().dsn().address());
            sleep(lasts).await;
            pair.bring_back().await;
        }
        How::SwitchOver => {
            pair.primary().stop().await;
            pair.promote().await;
            pair.bring_back().await;
            sleep(lasts).await;
            stage.move_addresses(&pair.primary().dsn().address());
        }
        _ => {
            pair.primary().kill().await;
            sleep(lasts).await;
            pair.restart_primary().await;
            pair.wait_for_standby().await;
        }
    }
}

async fn of_standby(stage: &Stage, how: How, lasts: Duration) {
    let mut pair = stage.pair.lock().await;
    if how == How::Stop {
        // Commits stand still with it.
        pair.standby().freeze().await;
        sleep(lasts).await;
        pair.standby().thaw().await;
    } else {
        pair.standby().kill().await;
        sleep(SEES_DEAD_STANDBY_AFTER).await;
        pair.go_alone().await;
        sleep(lasts).await;
        pair.bring_back().await;
    }
}

async fn of_relays(relays: &[Proxy], how: How, lasts: Duration) {
    let mode = match how {
        How::Freeze => Mode::Frozen,
        How::HoldReplies => Mode::RepliesHeld,
        How::Delay(milliseconds) => Mode::Slow(Duration::from_millis(milliseconds)),
        _ => Mode::Cut,
    };
    relays.iter().for_each(|relay| relay.set(mode));
    sleep(lasts).await;
    relays.iter().for_each(Proxy::restore);
}
