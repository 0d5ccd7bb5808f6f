//! What is broken when: decided by the seed alone, before anything runs.

use std::fmt;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt as _, SeedableRng};

/// What of the whole a fault is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Api(usize),
    Worker(usize),
    Broker(usize),
    Primary,
    Standby,
    /// Between clients and an API.
    ApiLink(usize),
    /// Between a process, in the order of [`PROCESSES`], and PostgreSQL.
    DatabaseLink(usize),
    /// Between all and a broker.
    BrokerLink(usize),
}

/// Two of each program.
pub const PROCESSES: [&str; 4] = ["api-1", "api-2", "worker-1", "worker-2"];
pub const BROKERS: usize = 3;

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Api(index) => write!(f, "api-{}", index + 1),
            Self::Worker(index) => write!(f, "worker-{}", index + 1),
            Self::Broker(index) => write!(f, "broker-{}", index + 1),
            Self::Primary => f.write_str("the primary"),
            Self::Standby => f.write_str("the standby"),
            Self::ApiLink(index) => write!(f, "the way to api-{}", index + 1),
            Self::DatabaseLink(process) => write!(f, "the way from {} to PostgreSQL", PROCESSES[*process]),
            Self::BrokerLink(index) => write!(f, "the way to broker-{}", index + 1),
        }
    }
}

impl Part {
    /// May both be broken at once? The two servers of PostgreSQL may not: there would be nobody left who has
    /// all that was accepted.
    fn excludes(self, other: Self) -> bool {
        let of_database = |part| matches!(part, Self::Primary | Self::Standby);
        self == other || (of_database(self) && of_database(other))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// kill -9, and started again after the time.
    Kill,
    /// SIGSTOP, and SIGCONT after the time.
    Stop,
    /// Ended in good order, and started again.
    Restart,
    /// The primary is killed (-9), the standby promoted at once; the old one is a standby after the time.
    FailOver,
    /// The same with a primary that is ended in good order, while its address still leads to it.
    SwitchOver,
    /// Connections are closed, new ones too.
    Cut,
    /// Connections stay, and nothing passes.
    Freeze,
    /// What is asked passes, what is answered does not.
    HoldReplies,
    /// Everything comes so many milliseconds later.
    Delay(u64),
}

impl How {
    pub fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Stop => "stop",
            Self::Restart => "restart",
            Self::FailOver => "fail over",
            Self::SwitchOver => "switch over",
            Self::Cut => "cut",
            Self::Freeze => "freeze",
            Self::HoldReplies => "hold replies",
            Self::Delay(_) => "delay",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fault {
    pub part: Part,
    pub how: How,
    pub lasts: Duration,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.how.name(), self.part)?;
        if let How::Delay(milliseconds) = self.how {
            write!(f, " by {milliseconds} ms")?;
        }
        write!(f, " for {:.1} s", self.lasts.as_secs_f64())
    }
}

/// Faults that begin at once, after a while without any.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    pub calm: Duration,
    pub faults: Vec<Fault>,
}

/// Enough steps for a run of this length; it ends when its time is up. Each way to break each part comes
/// once before any comes again, in the seed's own order.
pub fn schedule(seed: u64, length: Duration) -> Vec<Step> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut steps = Vec::new();
    let mut deck = Vec::new();
    let mut planned = Duration::ZERO;
    while planned < length {
        let mut step = Step { calm: between(&mut random, 1.5, 6.0), faults: Vec::new() };
        let wanted = if random.random_bool(0.35) { 2 } else { 1 };
        while step.faults.len() < wanted {
            if deck.is_empty() {
                deck = all_ways();
                deck.shuffle(&mut random);
            }
            // The next that goes with the first: there always is one.
            let fits = |(part, _): &(Part, How)| step.faults.iter().all(|fault: &Fault| !fault.part.excludes(*part));
            let Some(index) = deck.iter().rposition(fits) else {
                deck.clear();
                continue;
            };
            let (part, how) = deck.remove(index);
            step.faults.push(Fault { part, how, lasts: lasts(&mut random, how) });
        }
        planned += step.calm + step.faults.iter().map(|fault| fault.lasts).max().unwrap_or_default();
        steps.push(step);
    }
    steps
}

fn lasts(random: &mut StdRng, how: How) -> Duration {
    match how {
        How::Kill | How::Cut => between(random, 0.2, 6.0),
        How::Restart => between(random, 0.1, 1.0),
        // Longer than a worker's session, than an idle transaction may be, than a broker's life.
        How::Stop | How::Freeze | How::HoldReplies => between(random, 0.5, 12.0),
        How::FailOver | How::SwitchOver => between(random, 0.5, 5.0),
        How::Delay(_) => between(random, 3.0, 10.0),
    }
}

fn between(random: &mut StdRng, least: f64, most: f64) -> Duration {
    Duration::from_secs_f64(random.random_range(least..most))
}

fn all_ways() -> Vec<(Part, How)> {
    let mut ways = Vec::new();
    let mut add = |part, hows: &[How]| ways.extend(hows.iter().map(|how| (part, *how)));
    for index in 0..2 {
        add(Part::Api(index), &[How::Kill, How::Stop, How::Restart]);
        add(Part::Worker(index), &[How::Kill, How::Stop, How::Restart]);
        add(Part::ApiLink(index), &[How::Cut, How::Delay(100)]);
    }
    for index in 0..BROKERS {
        add(Part::Broker(index), &[How::Kill, How::Stop, How::Restart]);
        add(Part::BrokerLink(index), &[How::Cut, How::Freeze, How::Delay(50)]);
    }
    for process in 0..PROCESSES.len() {
        add(Part::DatabaseLink(process), &[How::Cut, How::Freeze, How::HoldReplies, How::Delay(20)]);
    }
    add(Part::Primary, &[How::Kill, How::Stop, How::FailOver, How::FailOver, How::SwitchOver]);
    add(Part::Standby, &[How::Kill, How::Stop]);
    ways
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_a_schedule() {
        let length = Duration::from_secs(600);
        assert_eq!(schedule(7, length), schedule(7, length));
        assert_ne!(schedule(7, length), schedule(8, length));
    }

    #[test]
    fn a_short_run_is_the_beginning_of_a_long_one() {
        let short = schedule(7, Duration::from_secs(60));
        assert_eq!(short, schedule(7, Duration::from_secs(600))[..short.len()]);
    }

    #[test]
    fn never_are_both_servers_of_postgresql_broken_at_once() {
        for seed in 0..50 {
            for step in schedule(seed, Duration::from_secs(600)) {
                if let [one, other] = &step.faults[..] {
                    assert!(!one.part.excludes(other.part), "{one} with {other}");
                }
            }
        }
    }

    #[test]
    fn all_ways_to_break_something_come_before_any_comes_again() {
        let faults = schedule(7, Duration::from_secs(3600)).into_iter().flat_map(|step| step.faults);
        let first: Vec<_> = faults.take(all_ways().len() - 2).map(|fault| (fault.part, fault.how)).collect();
        for way in all_ways() {
            let (had, has) = (
                first.iter().filter(|other| **other == way).count(),
                all_ways().iter().filter(|other| **other == way).count(),
            );
            assert!(had <= has, "{way:?} came {had} times");
        }
    }
}
