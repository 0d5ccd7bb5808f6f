//! Two PostgreSQL servers as people run them for the day on which one dies: a primary, and a standby that
//! has every transaction before its client hears of it.

use std::time::Duration;

use crate::database::Dsn;
use crate::instances::PrivatePostgres;
use crate::wait::wait_for;

/// For a standby to have all that the primary has.
const CATCHES_UP_WITHIN: Duration = Duration::from_secs(60);

/// As the script names each standby to its primary.
const STANDBY: &str = "standby";

/// Gone with its data when dropped.
pub struct PostgresPair {
    servers: [PrivatePostgres; 2],
    primary: usize,
}

impl PostgresPair {
    pub async fn start() -> Self {
        let pair = Self { servers: PrivatePostgres::start_pair().await, primary: 0 };
        pair.wait_for_standby().await;
        pair
    }

    /// Both servers, of which a client takes the one that can be written.
    pub fn dsn(&self) -> Dsn {
        self.primary().dsn().with_address(&self.addresses().join(",")).with_query("target_session_attrs=read-write")
    }

    /// Always in the same order.
    pub fn addresses(&self) -> [String; 2] {
        [0, 1].map(|index| self.servers[index].dsn().address())
    }

    pub fn primary(&self) -> &PrivatePostgres {
        &self.servers[self.primary]
    }

    /// The other one, which may be dead.
    pub fn standby(&self) -> &PrivatePostgres {
        &self.servers[1 - self.primary]
    }

    /// Makes the standby the primary. The one until now must not run any more: there would be two.
    pub async fn promote(&mut self) {
        // Its commits do not wait for a standby: it was copied from a primary that was alone then.
        self.standby().promote().await;
        self.primary = 1 - self.primary;
    }

    /// Brings back the one that is not the primary, as its standby, and waits until it has all and commits
    /// wait for it.
    pub async fn bring_back(&mut self) {
        let primary = self.primary;
        let [one, other] = &mut self.servers;
        let (primary, standby) = if primary == 0 { (one, other) } else { (other, one) };
        standby.follow(primary).await;
        self.wait_for_standby().await;
    }

    /// Where it died.
    pub async fn restart_primary(&mut self) {
        self.servers[self.primary].start_again().await;
    }

    /// From now on commits wait for the standby, which has all by then.
    pub async fn wait_for_standby(&self) {
        self.set_synchronous(&format!("alter system set synchronous_standby_names = '{STANDBY}'")).await;
        let dsn = self.primary().dsn();
        wait_for("the standby to be synchronous", CATCHES_UP_WITHIN, || async {
            let sql = "select coalesce(max(sync_state), 'none') from pg_stat_replication";
            let state: String =
                dsn.connect().await.query_one(sql, &[]).await.map_err(|error| error.to_string())?.get(0);
            if state == "sync" { Ok(()) } else { Err(state) }
        })
        .await;
    }

    /// From now on commits wait for no standby: it is dead, and the primary must go on alone.
    pub async fn go_alone(&self) {
        self.set_synchronous("alter system reset synchronous_standby_names").await;
    }

    async fn set_synchronous(&self, sql: &str) {
        let client = self.primary().dsn().connect().await;
        for statement in [sql, "select pg_reload_conf()"] {
            client.batch_execute(statement).await.unwrap_or_else(|error| panic!("{statement}: {error}"));
        }
    }
}
