//! Topics that are given more partitions while all is running.

use std::time::Duration;

use test_support::{System, beside_few};

use super::Running;
use crate::load;

/// Longer than whoever waits for an answer that is on its way should have to.
const DEADLINE: Duration = Duration::from_secs(30);
const ANSWERED_WITHIN: Duration = Duration::from_secs(10);

const FEW: usize = 2;
const MANY: usize = 12;
/// Enough that one of them listens where no partition was before.
const NEW_REPLICAS: usize = 4;

#[tokio::test(flavor = "multi_thread")]
async fn topics_that_grow_under_load_hold_no_caller_up_at_old_replicas_or_new_ones() {
    let _turn = beside_few().await;
    let mut system = System::new().await;
    system.set("KAFKA_PARTITIONS", FEW);
    system.set("ACK_WAIT_MS", DEADLINE.as_millis());
    let running = Running::start(&system).await;
    running.go_on().await;
    for topic in [system.events(), system.acks()] {
        system.kafka.grow_topic(topic, MANY).await;
    }
    let mut joined = Vec::new();
    for _ in 0..NEW_REPLICAS {
        let api = system.api().await;
        running.replicas.add(api.shared_http());
        joined.push(api);
        running.go_on().await;
    }
    running.go_on().await;

    let outcomes = running.load.stop().await;
    let longest = load::longest_wait(&outcomes);
    println!("topics grown from {FEW} to {MANY}: longest wait {longest:?}; by status {:?}", load::statuses(&outcomes));
    assert!(longest < ANSWERED_WITHIN, "somebody waited {longest:?}");
    system.ledger().of_a_topic_that_has_grown().check(load::accepted(&outcomes)).await;
}
