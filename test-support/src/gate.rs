//! A gate in the database at which transactions stand still at the last moment before they
//! commit, so that a test can stop or kill their process between the commit and what follows it.

use tokio_postgres::Client;

use crate::database::TestDb;
use crate::wait::eventually;

/// Any number, as long as the binaries do not use it.
const LOCK: i64 = 7_200_042;

pub struct CommitGate {
    holder: Client,
}

impl CommitGate {
    /// For transactions that insert into `table` a row for which `condition` (over `new`) holds.
    /// Open at first. The binaries must have migrated.
    pub async fn install(db: &TestDb, table: &str, condition: &str) -> Self {
        // A deferred constraint trigger runs within the commit, after all statements. Shared, so
        // that an open gate holds nobody up.
        db.execute(&format!(
            "create function test_gate() returns trigger language plpgsql as $$
             begin
                 perform pg_advisory_xact_lock_shared({LOCK});
                 return null;
             end $$;
             create constraint trigger test_gate after insert on {table}
             deferrable initially deferred for each row when ({condition})
             execute function test_gate();"
        ))
        .await;
        Self { holder: db.connect().await }
    }

    /// From now on commits wait here.
    pub async fn close(&self) {
        self.run(&format!("select pg_advisory_lock({LOCK})")).await;
    }

    /// Until that many transactions stand at the gate.
    pub async fn wait_for_held(&self, transactions: i64) {
        let sql = format!(
            "select count(*) from pg_locks
             where locktype = 'advisory' and not granted
               and database = (select oid from pg_database where datname = current_database())
               and objid = {LOCK}"
        );
        eventually(&format!("{transactions} transactions at the gate"), || async {
            match self.holder.query_one(&sql, &[]).await {
                Ok(row) if row.get::<_, i64>(0) >= transactions => Ok(()),
                Ok(row) => Err(format!("{} there", row.get::<_, i64>(0))),
                Err(error) => Err(error.to_string()),
            }
        })
        .await;
    }

    /// Lets the waiting commits through, and all later ones.
    pub async fn open(&self) {
        self.run(&format!("select pg_advisory_unlock({LOCK})")).await;
    }

    async fn run(&self, sql: &str) {
        self.holder.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    #[ignore = "needs PostgreSQL"]
    async fn a_commit_waits_at_the_closed_gate_and_passes_the_open_one() {
        let db = TestDb::new().await;
        db.execute("create table letters (letter text)").await;
        let gate = CommitGate::install(&db, "letters", "new.letter <> 'b'").await;
        gate.close().await;
        let writer = db.connect().await;
        let writing = tokio::spawn(async move { writer.execute("insert into letters values ('a')", &[]).await });
        gate.wait_for_held(1).await;
        let letters = "select count(*) from letters";
        assert_eq!(db.number(letters, &[]).await, 0);
        gate.open().await;
        assert_eq!(writing.await.expect("no panic").expect("inserted"), 1);
        assert_eq!(db.number(letters, &[]).await, 1);
    }
}
