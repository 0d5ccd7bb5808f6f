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
