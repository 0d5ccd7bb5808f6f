//! Tables whose rows die young are cleared without autovacuum, by those who own them.

use shared::{db, vacuum::clear_dead_rows};
use test_support::{TestDb, beside_others, eventually};
use uuid::Uuid;

use crate::db_at;

/// With so many dead rows in both tables, as PostgreSQL has counted them.
async fn littered(rows: u32) -> TestDb {
    let test_db = TestDb::new().await;
    db::migrate(&db_at(test_db.dsn()).pool).await.unwrap();
    let litter = format!(
        "alter table outbox set (autovacuum_enabled = off);
         alter table order_states_first set (autovacuum_enabled = off);
         insert into outbox (order_id, version, topic, key, headers, body)
         select gen_random_uuid(), 1, 'none', '', '[]', '' from generate_series(1, {rows});
         insert into orders (order_id, user_id, lifecycle, status, version, content_version, created_at, updated_at)
         select gen_random_uuid(), 'u', 'marketplace', 'new', 1, 1, now(), now() from generate_series(1, {rows});
         delete from outbox;
         update orders set status = 'done', version = 2"
    );
    for statement in litter.split(';') {
        test_db.execute(statement).await;
    }
    eventually("the dead rows are counted", || async {
        let counted = test_db.number(
            "select least(pg_stat_get_dead_tuples('outbox'::regclass), pg_stat_get_dead_tuples('order_states_first'::regclass))",
            &[],
        );
        let counted = counted.await;
        if counted >= i64::from(rows) { Ok(()) } else { Err(format!("{counted}")) }
    })
    .await;
    test_db
}

/// How often each was vacuumed: the outbox, the states of orders in their first version.
async fn vacuumed(test_db: &TestDb) -> [i64; 2] {
    let outbox = test_db.number("select pg_stat_get_vacuum_count('outbox'::regclass)", &[]).await;
    [outbox, test_db.number("select pg_stat_get_vacuum_count('order_states_first'::regclass)", &[]).await]
}

#[tokio::test]
async fn dead_rows_are_cleared_away_though_autovacuum_is_busy() {
    let _turn = beside_others().await;
    let test_db = littered(25_000).await;
    let db = db_at(test_db.dsn());
    clear_dead_rows(&db).await.unwrap();
    eventually("both are vacuumed", || async {
        let vacuumed = vacuumed(&test_db).await;
        if vacuumed == [1, 1] { Ok(()) } else { Err(format!("{vacuumed:?}")) }
    })
    .await;
    // Dead rows stay while an older snapshot sees them, such as that of autovacuum's analyze.
    eventually("what has no dead rows to be left alone", || async {
        let before = vacuumed(&test_db).await;
        clear_dead_rows(&db).await.unwrap();
        let after = vacuumed(&test_db).await;
        if before == after { Ok(()) } else { Err(format!("{before:?}, then {after:?}")) }
    })
    .await;
}

#[tokio::test]
async fn whoever_does_not_own_the_tables_leaves_them_to_autovacuum() {
    let _turn = beside_others().await;
    let test_db = littered(25_000).await;
    let role = format!("stranger_{}", Uuid::now_v7().simple());
    test_db.execute(&format!("create role {role}")).await;
    let result = clear_dead_rows(&db_at(&test_db.dsn().with_query(&format!("options=-c%20role%3D{role}")))).await;
    test_db.execute(&format!("drop role {role}")).await;
    result.unwrap();
    assert_eq!(vacuumed(&test_db).await, [0, 0]);
}
