//! Three brokers, of which one or two die under load, or all are restarted in turn.

use std::time::Duration;

use test_support::{KafkaCluster, System, TestDb, eventually, long_beside_few};
use tokio::time::Instant;

use super::{CALLERS, Running, rounds};
use crate::load::Outcome;

const ACK_WAIT: Duration = Duration::from_secs(3);
/// For what comes before and after the wait for the worker, on a machine that is busy.
const BESIDE_THE_WAIT: Duration = Duration::from_secs(3);

#[tokio::test(flavor = "multi_thread")]
async fn three_brokers_that_die_alone_or_two_at_once_or_are_restarted_lose_double_and_hold_up_nothing() {
    let _turn = long_beside_few().await;
    let mut cluster = KafkaCluster::start().await;
    let mut system = System::on(TestDb::new().await, cluster.client());
    system.set("ACK_WAIT_MS", ACK_WAIT.as_millis());
    let running = Running::start(&system).await;
    running.go_on().await;
    assert_three_copies(&system).await;

    let Some(rounds) = rounds() else {
        die(&mut cluster, &system, &running, 0).await;
        two_die(&mut cluster, &system, &running, [2, 0]).await;
        stop(running, &mut system).await;
        return;
    };
    for round in 0..rounds {
        for broker in 0..3 {
            die(&mut cluster, &system, &running, broker).await;
        }
        for broker in 0..3 {
            restart(&mut cluster, &system, &running, broker).await;
        }
        two_die(&mut cluster, &system, &running, [round % 3, (round + 1) % 3]).await;
    }
    stop(running, &mut system).await;
}

async fn die(cluster: &mut KafkaCluster, system: &System, running: &Running, broker: usize) {
    running.go_on().await;
    cluster.members()[broker].kill().await;
    let killed_at = Instant::now();
    let recovery = running.load.recovery(killed_at, killed_at).await;
    println!("broker {} killed: {recovery}", broker + 1);
    cluster.start_again().await;
    system.kafka.wait_for_whole_copies().await;
}

async fn restart(cluster: &mut KafkaCluster, system: &System, running: &Running, broker: usize) {
    running.go_on().await;
    cluster.members()[broker].stop().await;
    cluster.start_again().await;
    system.kafka.wait_for_whole_copies().await;
}

/// Every caller is told that its order is accepted, and nobody how it went on.
async fn two_die(cluster: &mut KafkaCluster, system: &System, running: &Running, brokers: [usize; 2]) {
    running.go_on().await;
    for broker in brokers {
        cluster.members()[broker].kill().await;
    }
    let killed_at = Instant::now();
    eventually("each caller to be told that its order is accepted", || async {
        let outcomes = running.load.sent_after(killed_at);
        let unanswered = outcomes.iter().filter(|outcome| outcome.reply.status == 202).count();
        if unanswered >= CALLERS { Ok(()) } else { Err(format!("{unanswered} of {}", outcomes.len())) }
    })
    .await;
    cluster.start_again().await;
    let returned_at = Instant::now();
    let recovery = running.load.recovery(returned_at, returned_at).await;
    println!("two brokers back: {recovery}");
    system.kafka.wait_for_whole_copies().await;
}

/// Of topics that our programs have made, and of that in which Kafka keeps what their group has read.
async fn assert_three_copies(system: &System) {
    let copies = system.kafka.copies().await.expect("the brokers' word");
    for topic in [system.events(), system.acks(), "payment-results", "__consumer_offsets"] {
        let of_topic: Vec<_> = copies.iter().filter(|copies| copies.topic == topic).collect();
        assert!(!of_topic.is_empty(), "topic {topic} is not there: {copies:?}");
        assert!(of_topic.iter().all(|copies| copies.wanted == 3), "{of_topic:?}");
    }
}

async fn stop(running: Running, system: &mut System) {
    running.go_on().await;
    let outcomes: Vec<Outcome> = running.stop(system, "three brokers").await;
    for Outcome { reply, .. } in outcomes {
        assert!(reply.is_success(), "refused: {}", reply.summary());
        assert!(reply.took < ACK_WAIT + BESIDE_THE_WAIT, "late: {}", reply.summary());
    }
}
