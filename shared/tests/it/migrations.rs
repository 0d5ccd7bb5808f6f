//! Migrations that find orders, and others at work.

use shared::db;
use test_support::{TestDb, beside_others};
use uuid::Uuid;

use crate::db_at;

const BEFORE_STATES: [&str; 7] = [
    include_str!("../../../migrations/V1__orders.sql"),
    include_str!("../../../migrations/V2__lifecycles.sql"),
    include_str!("../../../migrations/V3__parked_lookups.sql"),
    include_str!("../../../migrations/V4__lists.sql"),
    include_str!("../../../migrations/V5__idempotency.sql"),
    include_str!("../../../migrations/V6__room.sql"),
    include_str!("../../../migrations/V7__vacuum.sql"),
];
const STATES: &str = include_str!("../../../migrations/V8__first_states.sql");

/// What each order is listed under: in its first version?, state, how many.
async fn listed(test_db: &TestDb) -> Vec<String> {
    let sql = "select is_first || ' ' || status || ' ' || count(*) from order_states
               group by is_first, status order by is_first, status";
    test_db.lines(sql, &[]).await
}

#[tokio::test]
async fn states_move_into_their_new_table_while_orders_are_read_and_who_might_use_the_old_one_may() {
    let _turn = beside_others().await;
    let test_db = TestDb::new().await;
    for migration in BEFORE_STATES {
        test_db.execute(migration).await;
    }
    let role = format!("\"Stranger {}\"", Uuid::now_v7().simple());
    test_db.execute(&format!("create role {role}")).await;
    test_db.execute(&format!("grant select, insert, update, delete on all tables in schema public to {role}")).await;
    let orders = "
        insert into orders (order_id, user_id, lifecycle, status, version, content_version, created_at, updated_at)
        select gen_random_uuid(), 'u', 'marketplace', case when n <= 10 then 'new' else 'done' end,
            case when n <= 10 then 1 else 2 end, 1, now(), now() from generate_series(1, 30) n";
    test_db.execute(orders).await;

    let migrating = test_db.connect().await;
    migrating.batch_execute("begin").await.unwrap();
    migrating.batch_execute(STATES).await.unwrap();
    test_db.execute("set lock_timeout = '1s'").await;
    assert_eq!(test_db.number("select count(*) from orders", &[]).await, 30, "read while it migrates");
    migrating.batch_execute("commit").await.unwrap();
    assert_eq!(listed(&test_db).await, ["false done 20", "true new 10"]);

    test_db.execute(&format!("set role {role}")).await;
    test_db.execute("update orders set status = 'done', version = 2 where version = 1").await;
    test_db.execute("update orders set status = 'rejected', version = 3 where order_id in (select order_id from orders limit 5)").await;
    assert_eq!(listed(&test_db).await, ["false done 25", "false rejected 5"]);
    test_db.execute(&format!("reset role; drop owned by {role}; drop role {role}")).await;
}

#[tokio::test]
async fn no_table_that_grows_with_orders_has_its_statistics_made_anew_for_every_tenth() {
    let _turn = beside_others().await;
    let test_db = TestDb::new().await;
    db::migrate(&db_at(test_db.dsn()).pool).await.unwrap();
    let eager = "
        select relname::text from pg_class
        where relkind = 'r' and relnamespace = 'public'::regnamespace
          and relname not in ('parked_messages', 'refinery_schema_history', 'ticket_keys')
          and not coalesce(reloptions::text ~ 'analyze_scale_factor=1|analyze_threshold=1000000', false)";
    assert_eq!(test_db.lines(eager, &[]).await, [""; 0]);
}

#[tokio::test]
async fn no_table_that_grows_with_orders_is_vacuumed_the_later_the_more_there_are() {
    let _turn = beside_others().await;
    let test_db = TestDb::new().await;
    db::migrate(&db_at(test_db.dsn()).pool).await.unwrap();
    // The scale factors count only in these two ways: what has died, and what was added.
    let late = "
        select relname::text from pg_class
        where relkind = 'r' and relnamespace = 'public'::regnamespace
          and relname not in ('parked_messages', 'idempotency_keys', 'refinery_schema_history', 'ticket_keys')
          and not coalesce(case
              when relname like 'orders_p%' then reloptions::text ~ 'vacuum_scale_factor=0,' and reloptions::text ~ 'insert_scale_factor=0,'
              when relname in ('outbox', 'order_states_first') then reloptions::text ~ 'vacuum_scale_factor=0,'
              else reloptions::text ~ 'insert_scale_factor=0,'
          end, false)";
    assert_eq!(test_db.lines(late, &[]).await, [""; 0]);
}
