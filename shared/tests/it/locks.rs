//! Locks that somebody keeps, in PostgreSQL.

use std::time::Duration;

use bb8::PooledConnection;
use shared::db::{Connection, Db, DbError, Fault, Manager};
use test_support::{TestDb, beside_others, eventually};
use tokio::time::Instant;

use crate::db_at;

const TAKE: &str = "insert into kept (id) values (1)";

async fn database() -> (TestDb, Db) {
    let test_db = TestDb::new().await;
    test_db.execute("create table kept (id int primary key)").await;
    let db = db_at(test_db.dsn());
    (test_db, db)
}

/// Somebody in a transaction that has the lock.
async fn holder(db: &Db) -> PooledConnection<'_, Manager> {
    let holder = db.connection().await.unwrap();
    holder.client().batch_execute(&format!("begin; {TAKE}")).await.unwrap();
    holder
}

async fn take(connection: &Connection) -> Result<(), DbError> {
    Ok(connection.client().batch_execute(TAKE).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_nobody_goes_on_with_lets_go_of_its_locks() {
    let _turn = beside_others().await;
    let (_test_db, db) = database().await;
    let frozen = holder(&db).await;
    let other = db.connection().await.unwrap();
    eventually("somebody else to get the lock", || async { take(&other).await.map_err(|error| error.chain()) }).await;
    assert!(frozen.client().batch_execute("commit").await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_impatient_waits_for_no_lock_and_the_next_one_on_the_connection_does() {
    let _turn = beside_others().await;
    let (_test_db, db) = database().await;
    let holder = holder(&db).await;
    let connection = db.connection().await.unwrap();
    let began = Instant::now();
    let refused = connection.impatiently(db.settings.write_timeout, take(&connection)).await.unwrap_err();
    assert_eq!(refused.fault(), Fault::Locked);
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    let letting_go = async {
        tokio::time::sleep(Duration::from_millis(200)).await; // four times an impatient one's patience
        holder.client().batch_execute("rollback").await.unwrap();
    };
    tokio::join!(letting_go, async { take(&connection).await.unwrap() });
}
