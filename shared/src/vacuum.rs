//! Clears the tables whose rows die young. Autovacuum does so too, but at most every minute, and not
//! while all its workers have larger tables in hand: meanwhile each look at these reads past what is
//! dead.

use crate::db::{Db, DbError};

/// How many rows may be dead, and what clears them away. `skip_locked` since somebody else may be at
/// it, and not truncated since that would lock out whoever writes.
struct Table {
    name: &'static str,
    dead_rows: i64,
    vacuum: &'static str,
}

const TABLES: [Table; 2] = [
    Table { name: "outbox", dead_rows: 20_000, vacuum: "vacuum (skip_locked, truncate off) outbox" },
    // Read by people, in lists of a state that all orders have left.
    Table {
        name: "order_states_first",
        dead_rows: 1_000,
        vacuum: "vacuum (skip_locked, truncate off) order_states_first",
    },
];

/// Clears those in which too much is dead. Where the database user does not own them it is left to
/// autovacuum.
///
/// # Errors
/// When PostgreSQL is away, or takes too long for one of them: after an outage of Kafka's the outbox
/// may be large. The others are cleared all the same.
pub async fn clear_dead_rows(db: &Db) -> Result<(), DbError> {
    let mut result = Ok(());
    for table in TABLES {
        result = result.and(clear(db, &table).await);
    }
    result
}

async fn clear(db: &Db, Table { name, dead_rows, vacuum }: &Table) -> Result<(), DbError> {
    const DEAD: &str = "
        select pg_stat_get_dead_tuples(oid) from pg_class
        where oid = $1::text::regclass and pg_has_role(relowner, 'usage')";
    let connection = db.connection().await?;
    let work = async {
        let statement = connection.prepared(DEAD).await?;
        let dead = connection.client().query_opt(&statement, &[name]).await?;
        if dead.is_some_and(|row| row.get::<_, i64>(0) > *dead_rows) {
            connection.client().batch_execute(vacuum).await?;
        }
        Ok(())
    };
    connection.within(db.settings.write_timeout, work).await
}
