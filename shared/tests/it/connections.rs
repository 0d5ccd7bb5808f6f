//! The pool uses a connection again only while it leads to the server that is meant.

use std::time::Duration;

use shared::db::{Connection, Db, DbError, PoolSettings, Presence};
use test_support::{Dsn, TestDb, beside_others, eventually};
use tokio::{runtime::Handle, task::AbortHandle};

use crate::settings_of;

/// A pool of this size that is looked after, and whose callers do not wait for long.
struct Pool {
    db: Db,
    watching: AbortHandle,
}

impl Pool {
    fn at(dsn: &Dsn, max_conns: u32) -> Self {
        let query_timeout = Duration::from_millis(500);
        let settings = PoolSettings { max_conns, min_conns: 0, query_timeout, ..settings_of(dsn).pool() };
        let db = Db::open(&dsn.to_string(), "test", settings, &Handle::current()).unwrap();
        let watched = db.clone();
        let watching = tokio::spawn(async move { watched.watch().await }).abort_handle();
        Self { db, watching }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.watching.abort();
    }
}

async fn write(connection: &Connection) -> Result<(), DbError> {
    let work = async { Ok(connection.client().batch_execute("create table written (n int)").await?) };
    connection.within(Duration::from_secs(5), work).await
}

async fn is_read_only(connection: &Connection) -> bool {
    connection.client().query_one("show transaction_read_only", &[]).await.unwrap().get::<_, &str>(0) == "on"
}

async fn session(connection: &Connection) -> i32 {
    connection.client().query_one("select pg_backend_pid()", &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn one_read_only_connection_ends_all_of_its_time() {
    let _turn = beside_others().await;
    let test_db = TestDb::new().await;
    let pool = Pool::at(test_db.dsn(), 3);
    let alter = format!("alter database {}", test_db.dsn().database());
    test_db.execute(&format!("{alter} set default_transaction_read_only = on")).await;
    let (first, second) = (pool.db.connection().await.unwrap(), pool.db.connection().await.unwrap());
    assert!(is_read_only(&second).await);
    test_db.execute(&format!("{alter} reset default_transaction_read_only")).await;
    // A look is content with this one.
    drop(pool.db.connection().await.unwrap());
    let refused = write(&first).await.unwrap_err();
    assert!(refused.is_of_session(), "{refused:?}");
    drop(first);

    // The second is at work until somebody has looked, by the good one that lies there.
    for _ in 0..50 {
        assert!(!is_read_only(&pool.db.connection().await.unwrap()).await);
    }
    drop(second);
    eventually("no read-only connection to be used again", || async {
        let connection = pool.db.connection().await.unwrap();
        if is_read_only(&connection).await { Err("one is".to_owned()) } else { Ok(()) }
    })
    .await;
}

#[tokio::test]
async fn a_full_server_is_not_away_while_the_pool_works() {
    let _turn = beside_others().await;
    let test_db = TestDb::new().await;
    let pool = Pool::at(test_db.dsn(), 2);
    let working = [pool.db.connection().await.unwrap(), pool.db.connection().await.unwrap()];
    let other = Dsn::from_env().connect().await;
    let alter = |allow: bool| format!("alter database {} allow_connections {allow}", test_db.dsn().database());
    other.batch_execute(&alter(false)).await.unwrap();
    for _ in 0..4 {
        // Each waits for its time in vain, and is in doubt then.
        assert!(matches!(pool.db.connection().await, Err(DbError::Away(Some(_)))));
    }
    assert_eq!(pool.db.presence(), Presence::There);
    let sessions = [session(&working[0]).await, session(&working[1]).await];
    drop(working);
    let again = [pool.db.connection().await.unwrap(), pool.db.connection().await.unwrap()];
    for connection in &again {
        assert!(sessions.contains(&session(connection).await), "nothing was wrong with those before");
    }
    other.batch_execute(&alter(true)).await.unwrap();
}
