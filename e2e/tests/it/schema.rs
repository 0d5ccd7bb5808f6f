//! Binaries and schemas of different ages: a newer schema is served, one changed by other hands is
//! refused (DESIGN 6.6).

use test_support::{System, beside_others, order, refused_at_start};

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_that_a_newer_release_has_expanded_is_served_and_left_as_it_is() {
    let _turn = beside_others().await;
    let system = System::new().await;
    drop(system.api().await);
    let expand = "
        insert into refinery_schema_history (version, name, applied_on, checksum)
        values (999, 'of_a_later_release', '2030-01-01T00:00:00Z', '1');
        alter table orders add column later text not null default 'later'";
    system.db.client().batch_execute(expand).await.expect("a newer schema");

    let (api, _worker) = (system.api().await, system.worker().await);
    let created = api.http().post_order(&order("user")).await.expect_status(201);
    assert_eq!(created.json()["order_status"], "done");
    let kept = "select count(*) from refinery_schema_history where version = 999";
    assert_eq!(system.db.number(kept, &[]).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_that_other_hands_have_migrated_is_refused() {
    let _turn = beside_others().await;
    let system = System::new().await;
    drop(system.api().await);
    let diverge = "update refinery_schema_history set checksum = '1' where version = 1";
    system.db.client().batch_execute(diverge).await.expect("another history");
    for binary in ["api-service", "worker"] {
        let said = refused_at_start(binary, &system.settings()).await;
        assert!(said.contains("migrated by other hands") && said.contains("V1__orders"), "{binary} said: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_asked_of_parked_messages_with_every_batch_is_found_by_an_index() {
    let _turn = beside_others().await;
    let system = System::new().await;
    drop(system.api().await);
    let open = "kind = 'failed' and state in ('waiting', 'retrying', 'dead')";
    let early = "kind = 'early' and state in ('waiting', 'dead')";
    let done = "insert into parked_messages (order_id, topic, headers, state, kind)
        select gen_random_uuid(), 'a topic', '[]', 'done', 'failed' from generate_series(1, 20000);
        analyze parked_messages";
    system.db.execute(done).await;
    for (asked, index) in [
        ("order_id = '00000000-0000-0000-0000-000000000001' and state <> 'done'".to_owned(), "parked_open"),
        (format!("order_id = '00000000-0000-0000-0000-000000000001' and {open}"), "parked_blocking"),
        (format!("order_id = '00000000-0000-0000-0000-000000000001' and {early}"), "parked_early"),
        ("next_attempt_at <= now() and state in ('waiting', 'retrying')".to_owned(), "parked_due"),
        ("id > 0 and id > 7 and state not in ('done', 'discarded') and kind = 'early'".to_owned(), "parked_listed"),
    ] {
        let explain = format!("explain select 1 from parked_messages where {asked}");
        let plan = system.db.lines(&explain, &[]).await.join("\n");
        assert!(plan.contains(index), "{asked}: {plan}");
    }
}
