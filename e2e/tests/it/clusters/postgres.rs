//! The primary dies, and its synchronous standby takes its place; then all the way back.

use std::time::Duration;

use test_support::{PostgresPair, PrivatePostgres, Proxy, System, TestDb, TestKafka, eventually, long_beside_few};
use tokio::time::{Instant, sleep_until};

use super::{Running, assert_recovered, rounds};

/// After the address has moved: then all works again.
const SETTLED_AFTER: Duration = Duration::from_secs(5);

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_dies_under_load_is_followed_by_its_standby_and_all_the_way_back() {
    let _turn = long_beside_few().await;
    let mut pair = PostgresPair::start().await;
    let mut system = System::on(TestDb::on(pair.dsn()).await, TestKafka::new());
    let running = Running::start(&system).await;
    for round in 1..=rounds().unwrap_or(1) {
        for way in ["there", "back"] {
            running.go_on().await;
            pair.primary().kill().await;
            let killed_at = Instant::now();
            let promoted_at = Instant::now();
            pair.promote().await;
            let recovery = running.load.recovery(killed_at, promoted_at).await;
            assert_recovered(&format!("both hosts in the DSN, round {round}, {way}"), recovery);
            pair.bring_back().await;
        }
    }
    running.go_on().await;
    running.stop(&mut system, "both hosts in the DSN").await;
}

/// There by a death, back as operators do it by plan: the address leads for a while to the server that is no
/// longer the primary, and connections that were made then stay when it moves.
#[tokio::test(flavor = "multi_thread")]
async fn behind_one_address_that_moves_a_new_primary_is_found_and_old_connections_are_given_up() {
    let _turn = long_beside_few().await;
    let mut pair = PostgresPair::start().await;
    let address = Proxy::to(&pair.primary().dsn().address()).await;
    let through = pair.primary().dsn().with_address(&address.address());
    let mut system = System::on(TestDb::on(through).await, TestKafka::new());
    let running = Running::start(&system).await;
    for round in 1..=rounds().unwrap_or(1) {
        running.go_on().await;
        pair.primary().kill().await;
        let killed_at = Instant::now();
        let promoted_at = Instant::now();
        address.lead_to(&pair.standby().dsn().address());
        pair.promote().await;
        let recovery = running.load.recovery(killed_at, promoted_at).await;
        assert_recovered(&format!("one address, round {round}, there"), recovery);
        pair.bring_back().await;
        running.go_on().await;
        pair.primary().stop().await;
        pair.promote().await;
        pair.bring_back().await;
        wait_for_sessions(pair.standby(), system.db.dsn().database()).await;
        let moved_at = Instant::now();
        address.lead_to(&pair.primary().dsn().address());
        let recovery = running.load.recovery(moved_at, moved_at).await;
        assert_recovered(&format!("one address, round {round}, back"), recovery);

        sleep_until(moved_at + SETTLED_AFTER).await;
        running.go_on().await;
        for outcome in running.load.sent_after(moved_at + SETTLED_AFTER) {
            assert!(outcome.reply.is_success(), "after the address has moved: {}", outcome.reply.summary());
        }
    }
    running.stop(&mut system, "one address").await;
}

/// Until our programs have connections to a server that they cannot write to.
async fn wait_for_sessions(server: &PrivatePostgres, database: &str) {
    let client = server.dsn().connect().await;
    eventually("sessions on the server that is only read", || async {
        let sql = "select count(*) from pg_stat_activity where datname = $1";
        let sessions: i64 = client.query_one(sql, &[&database]).await.expect("the server's activity").get(0);
        // One for each program, and some more.
        if sessions >= 8 { Ok(()) } else { Err(format!("{sessions} sessions")) }
    })
    .await;
}
