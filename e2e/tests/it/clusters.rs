//! PostgreSQL and Kafka as people run them: two servers of which one follows the other, and three brokers
//! with three copies of each topic. Whoever of them dies, nothing is lost and nothing is done twice.
//!
//! `make test` breaks some of it once. `make test-clusters` breaks everything in turn, as often as `ROUNDS`
//! says.

mod growth;
mod kafka;
mod postgres;

use std::time::Duration;

use test_support::{Api, System, Worker};

use crate::load::{self, Load, Outcome, Recovery, Replicas};

/// What was lost with a server is there again, counted from when another took its place.
const RECOVERS_WITHIN: Duration = Duration::from_secs(10);

/// Enough to keep something in the air all the time, and to leave the machine to those that start.
const CALLERS: usize = 6;
const BETWEEN_FAULTS: usize = 60;

/// Nothing in `make test`.
fn rounds() -> Option<usize> {
    let rounds = std::env::var("ROUNDS").ok()?;
    Some(rounds.parse().unwrap_or_else(|_| panic!("ROUNDS=\"{rounds}\" is no number")))
}

/// Two of each program, and callers.
struct Running {
    apis: [Api; 2],
    workers: [Worker; 2],
    replicas: Replicas,
    load: Load,
}

impl Running {
    async fn start(system: &System) -> Self {
        let (one, other) = tokio::join!(system.api(), system.api());
        let apis = [one, other];
        let workers = tokio::join!(system.worker(), system.worker()).into();
        let replicas = Replicas::new(apis.iter().map(|api| api.shared_http()));
        let load = Load::start(&replicas, CALLERS);
        Self { apis, workers, replicas, load }
    }

    async fn go_on(&self) {
        self.load.wait_for_answers(BETWEEN_FAULTS, Duration::from_secs(60)).await;
    }

    /// Lets the callers end, and adds it all up.
    async fn stop(self, system: &mut System, what: &str) -> Vec<Outcome> {
        let outcomes = self.load.stop().await;
        let accepted = load::accepted(&outcomes);
        let count = accepted.len();
        // The server that it led to may be gone.
        system.db.reconnect().await;
        system.ledger().check(accepted).await;
        println!(
            "{what}: {count} accepted, 0 lost, 0 doubled; longest wait {:?}; by status {:?}",
            load::longest_wait(&outcomes),
            load::statuses(&outcomes)
        );
        for service in self.apis.iter().map(|api| &**api).chain(self.workers.iter().map(|worker| &**worker)) {
            service.assert_healthy().await;
        }
        outcomes
    }
}

fn assert_recovered(what: &str, recovery: Recovery) {
    println!("{what}: {recovery}");
    assert!(recovery.accepted.max(recovery.answered) < RECOVERS_WITHIN, "{what}: {recovery}");
}
