//! Lists of orders, newest first. Each statement is one range of one index (of one per partition,
//! merged): what it costs depends on the page, not on how many orders there are or how far down it is.

use futures_util::{TryStreamExt as _, pin_mut};
use serde::{Deserialize, Serialize};
use shared::db::{Db, DbError};
use time::OffsetDateTime;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use super::read::{Order, order_columns, order_of};

/// A page ends early when its orders come to so much: a payload alone may have hundreds of
/// kilobytes, and a page two hundred orders.
const PAGE_BYTES: usize = 4 * 1024 * 1024;

/// Which orders, and which of these.
#[derive(Clone, Debug)]
pub(crate) struct Filter {
    pub user_id: Option<String>,
    pub status: Option<String>,
    pub lifecycle: Option<String>,
    /// From this time on.
    pub from: OffsetDateTime,
    /// Older than this.
    pub before: Place,
}

/// Where an order stands among all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub created_at: OffsetDateTime,
    pub order_id: Uuid,
}

#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Page {
    pub orders: Vec<Order>,
    /// Are there more behind the last of these?
    pub more: bool,
}

impl Page {
    pub(crate) fn end(&self) -> Option<Place> {
        self.orders.last().filter(|_| self.more).map(Place::of)
    }
}

impl Place {
    pub(crate) fn of(order: &Order) -> Self {
        Self { created_at: order.created_at, order_id: order.order_id }
    }
}

// The bounds name all columns of the index, and so does the order: that fits no other index.
// Otherwise a planner that has seen one state or one user only (statistics are a sample) would
// find the index by time as good, and read all of it for a state that is rare. `offset 0` keeps it
// from joining whole tables, where each order is to be looked up by its id.
const BY_TIME: &str = concat!(
    "select ",
    order_columns!(),
    " from orders o
     where (o.created_at, o.order_id) < ($1::timestamptz, $2::uuid) and o.created_at >= $3::timestamptz
       and ($4::text is null or o.lifecycle = $4)
     order by o.created_at desc, o.order_id desc limit $5::bigint"
);
const BY_STATUS: &str = concat!(
    "select o.* from order_states s, lateral (select ",
    order_columns!(),
    " from orders o where o.order_id = s.order_id offset 0) o
     where (s.status, s.created_at, s.order_id) < ($1::text, $2::timestamptz, $3::uuid)
       and (s.status, s.created_at) >= ($1, $4::timestamptz)
       and ($5::text is null or o.lifecycle = $5)
     order by s.status desc, s.created_at desc, s.order_id desc limit $6::bigint"
);
const BY_USER: &str = concat!(
    "select ",
    order_columns!(),
    " from orders o
     where (o.user_id, o.created_at, o.order_id) < ($1::text, $2::timestamptz, $3::uuid)
       and (o.user_id, o.created_at) >= ($1, $4::timestamptz)
       and ($5::text is null or o.lifecycle = $5) and ($6::text is null or o.status = $6)
     order by o.user_id desc, o.created_at desc, o.order_id desc limit $7::bigint"
);

/// The newest that the filter finds, at most so many.
pub(crate) async fn orders(db: &Db, filter: &Filter, limit: usize) -> Result<Page, DbError> {
    let Filter { user_id, status, lifecycle, from, before: Place { created_at, order_id } } = filter;
    // One more tells whether there are more.
    let rows = i64::try_from(limit).unwrap_or(i64::MAX).saturating_add(1);
    match (user_id, status) {
        (Some(user_id), _) => {
            page(db, BY_USER, &[user_id, created_at, order_id, from, lifecycle, status, &rows], limit).await
        }
        (None, Some(status)) => {
            page(db, BY_STATUS, &[status, created_at, order_id, from, lifecycle, &rows], limit).await
        }
        (None, None) => page(db, BY_TIME, &[created_at, order_id, from, lifecycle, &rows], limit).await,
    }
}

async fn page(db: &Db, sql: &'static str, params: &[&(dyn ToSql + Sync)], limit: usize) -> Result<Page, DbError> {
    let connection = db.connection().await?;
    let read = async {
        let statement = connection.prepared(sql).await?;
        let rows = connection.client().query_raw(&statement, params.iter().copied()).await?;
        pin_mut!(rows);
        let (mut orders, mut bytes) = (Vec::new(), 0);
        // What is not taken of the answer is thrown away as it arrives.
        while let Some(row) = rows.try_next().await? {
            if orders.len() == limit || bytes > PAGE_BYTES {
                return Ok(Page { orders, more: true });
            }
            let order = order_of(&row);
            bytes += order.size();
            orders.push(order);
        }
        Ok(Page { orders, more: false })
    };
    connection.within(db.settings.query_timeout, read).await
}

#[cfg(test)]
mod tests {
    use std::{ffi::OsString, time::Duration};

    use clap::Parser;
    use shared::{
        db,
        settings::{DbSettings, parse_from},
    };
    use test_support::{TestDb, beside_others};

    use super::*;
    use crate::store::{pages, read, watch};

    #[derive(Parser)]
    struct Settings {
        #[command(flatten)]
        db: DbSettings,
    }

    async fn migrated(test_db: &TestDb) -> Db {
        let args = ["test".to_owned(), format!("--postgres-dsn={}", test_db.dsn())].map(OsString::from);
        let settings: Settings = parse_from(args, |_| None, &Default::default()).unwrap();
        let runtime = tokio::runtime::Handle::current();
        let db = Db::open(&settings.db.postgres_dsn, "test", settings.db.pool(), &runtime).unwrap();
        db::migrate(&db.pool).await.unwrap();
        db
    }

    /// So many orders, `apart` microseconds from each other, by ten users, nearly all done.
    async fn fill(test_db: &TestDb, count: u32, apart: u32) {
        let sql = format!(
            "insert into orders (order_id, user_id, lifecycle, status, version, content_version, created_at, updated_at)
             select gen_random_uuid(), 'user-' || n % 10, case when n % 3 = 0 then 'retail' else 'marketplace' end,
                 case when n % 1000 = 0 then 'rejected' else 'done' end, 1, 1, at, at
             from generate_series(1, {count}) n,
                 lateral (select timestamptz '2026-01-01' + n / 3 * {apart} * interval '1 microsecond' as at) t"
        );
        test_db.execute(&sql).await;
    }

    /// As the service would have it carried out.
    async fn plan(connection: &db::Connection, options: &str, sql: &str, params: &str) -> String {
        let explain = format!("prepare asked as {sql}; explain {options} execute asked ({params}); deallocate asked");
        let answers = connection.client().simple_query(&explain).await.unwrap();
        let lines = answers.iter().filter_map(|answer| match answer {
            tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0),
            _ => None,
        });
        lines.collect::<Vec<_>>().join("\n")
    }

    fn at(text: &str) -> OffsetDateTime {
        OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339).unwrap()
    }

    fn everything() -> Filter {
        let far = at("9000-01-01T00:00:00Z");
        Filter {
            user_id: None,
            status: None,
            lifecycle: None,
            from: at("2000-01-01T00:00:00Z"),
            before: Place { created_at: far, order_id: Uuid::nil() },
        }
    }

    async fn all_pages(db: &Db, mut filter: Filter, limit: usize) -> Vec<Place> {
        let mut seen = Vec::new();
        loop {
            let page = orders(db, &filter, limit).await.unwrap();
            assert!(page.orders.len() <= limit);
            seen.extend(page.orders.iter().map(Place::of));
            match page.end() {
                Some(end) => filter.before = end,
                None => return seen,
            }
        }
    }

    #[tokio::test]
    #[ignore = "needs PostgreSQL"]
    async fn each_list_reads_its_own_index_on_every_partition_and_sorts_nothing() {
        let _turn = beside_others().await;
        let test_db = TestDb::new().await;
        let db = migrated(&test_db).await;
        let bounds = "'2030-01-01', '00000000-0000-0000-0000-000000000000', '2000-01-01'";
        let of_each_partition =
            |index: &str| (0..4).map(|partition| format!("Backward using orders_p{partition}_{index}_idx")).collect();
        let by_state = (0..4).map(|partition| format!("using orders_p{partition}_pkey"));
        let states = ["first", "later"].map(|which| format!("Backward using order_states_{which}_pkey"));
        let by_state = by_state.chain(states).collect();
        let statements: [(&str, String, Vec<String>); 3] = [
            (BY_TIME, format!("{bounds}, null, 51"), of_each_partition("created_at_order_id")),
            (BY_STATUS, format!("'rejected', {bounds}, null, 51"), by_state),
            (BY_USER, format!("'user-1', {bounds}, null, null, 51"), of_each_partition("user_id_created_at_order_id")),
        ];
        // As it is prepared: on tables that are still empty, full, and full of orders of one state
        // and user, as far as the planner knows.
        for (rows, alike) in [(0, false), (20_000, false), (0, true)] {
            fill(&test_db, rows, 1).await;
            if alike {
                test_db.execute("update orders set status = 'done', user_id = 'user-1', lifecycle = 'retail'").await;
            }
            if rows > 0 || alike {
                test_db.execute("analyze orders, order_states").await;
            }
            let connection = db.connection().await.unwrap();
            for (sql, params, scans) in &statements {
                let plan = plan(&connection, "", sql, params).await;
                for scan in scans {
                    assert!(plan.contains(scan), "no {scan} with {rows} rows: {sql}\n{plan}");
                }
                assert!(!plan.contains("Sort  ") && !plan.contains("Seq Scan"), "{sql} with {rows} rows: {plan}");
            }
        }
    }

    #[tokio::test]
    #[ignore = "needs PostgreSQL"]
    async fn pages_of_one_state_sort_nothing_whatever_the_state() {
        let _turn = beside_others().await;
        let test_db = TestDb::new().await;
        let db = migrated(&test_db).await;
        fill(&test_db, 20_000, 1).await;
        test_db.execute("analyze orders, order_states").await;
        let connection = db.connection().await.unwrap();
        for plans in ["force_custom_plan", "force_generic_plan"] {
            connection.client().batch_execute(&format!("set plan_cache_mode = {plans}")).await.unwrap();
            for state in ["done", "rejected"] {
                let of_page = plan(&connection, "", pages::OF_STATUS.0, &format!("10, 90, '{state}'")).await;
                let of_total = plan(&connection, "", pages::OF_STATUS.1, &format!("10000, '{state}'")).await;
                for plan in [of_page, of_total] {
                    assert!(plan.contains("Only Scan") && !plan.contains("Sort  "), "{state}, {plans}: {plan}");
                    assert!(!plan.contains("Seq Scan"), "{state}, {plans}: {plan}");
                }
            }
        }
    }

    #[tokio::test]
    #[ignore = "needs PostgreSQL"]
    async fn one_order_is_looked_for_in_one_partition_and_its_history_only_when_it_has_changed() {
        let _turn = beside_others().await;
        let test_db = TestDb::new().await;
        let db = migrated(&test_db).await;
        fill(&test_db, 20_000, 1).await;
        let told = "
            update orders set external_id = order_id::text;
            insert into order_refs select user_id, external_id, order_id, '' from orders;
            insert into order_events (order_id, version, cause, type, to_status, at)
            select order_id, 1, 'created', 'order.created', 'new', created_at from orders";
        test_db.execute(told).await;
        let one = test_db.lines("select order_id::text from orders where user_id = 'user-3' limit 1", &[]).await;
        let id = &one[0];
        let connection = db.connection().await.unwrap();
        let searched = |plan: &str, table: &str| {
            let scans = plan.lines().filter(|line| line.contains("Scan") && line.contains(table));
            scans.filter(|line| !line.contains("Bitmap Index") && !line.contains("never executed")).count()
        };
        for (sql, params, expected) in [
            (read::BY_ID, format!("'{id}'"), [("on orders_p", 1), ("on order_refs_p", 0), ("on order_events_p", 0)]),
            (
                read::BY_EXTERNAL,
                format!("'user-3', '{id}'"),
                [("on orders_p", 1), ("on order_refs_p", 1), ("on order_events_p", 0)],
            ),
            (
                watch::TOLD_SINCE,
                format!("array['{id}']::uuid[], array[0], 32, 5000"),
                [("on orders_p", 1), ("on order_refs_p", 0), ("on order_events_p", 1)],
            ),
            (
                watch::TOLD_SINCE,
                format!("array['{id}']::uuid[], array[1], 32, 5000"),
                [("on orders_p", 1), ("on order_refs_p", 0), ("on order_events_p", 0)],
            ),
        ] {
            let plan = plan(&connection, "(analyze)", sql, &params).await;
            for (table, count) in expected {
                assert_eq!(searched(&plan, table), count, "{table}: {plan}");
            }
            assert!(!plan.contains("Seq Scan"), "{plan}");
        }
    }

    #[tokio::test]
    #[ignore = "needs PostgreSQL"]
    async fn pages_hold_each_order_once_in_order_whatever_their_size() {
        let _turn = beside_others().await;
        let test_db = TestDb::new().await;
        let db = migrated(&test_db).await;
        // Three orders at a time are of the same microsecond.
        fill(&test_db, 1_000, 1).await;
        let mut expected = all_pages(&db, everything(), 1_000).await;
        assert_eq!(expected.len(), 1_000);
        assert!(expected.is_sorted_by(|newer, older| newer > older));
        for limit in [1, 2, 3, 7, 199, 200, 999] {
            assert_eq!(all_pages(&db, everything(), limit).await, expected, "in pages of {limit}");
        }
        for (filter, count) in [
            (Filter { user_id: Some("user-3".to_owned()), ..everything() }, 100),
            (Filter { status: Some("rejected".to_owned()), ..everything() }, 1),
            (Filter { status: Some("done".to_owned()), ..everything() }, 999),
            (Filter { status: Some("don".to_owned()), ..everything() }, 0),
            (Filter { lifecycle: Some("retail".to_owned()), ..everything() }, 333),
        ] {
            let found = all_pages(&db, filter.clone(), 7).await;
            assert_eq!(found.len(), count, "{filter:?}");
            assert!(found.is_sorted_by(|newer, older| newer > older));
        }
        // From a time on, and before one.
        let at = |micros| at("2026-01-01T00:00:00Z") + Duration::from_micros(micros);
        let before = Place { created_at: at(20), order_id: Uuid::nil() };
        let some = all_pages(&db, Filter { from: at(10), before, ..everything() }, 4).await;
        expected.retain(|place| (at(10)..at(20)).contains(&place.created_at));
        assert_eq!((some.len(), &some), (30, &expected));
    }

    #[tokio::test]
    #[ignore = "needs PostgreSQL"]
    async fn a_page_of_large_orders_ends_early_and_the_next_goes_on() {
        let _turn = beside_others().await;
        let test_db = TestDb::new().await;
        let db = migrated(&test_db).await;
        fill(&test_db, 30, 1).await;
        test_db.execute("update orders set notes = repeat('x', 500000)").await;
        let first = orders(&db, &everything(), 30).await.unwrap();
        assert!(first.more && (8..=10).contains(&first.orders.len()), "{} orders", first.orders.len());
        let all = all_pages(&db, everything(), 30).await;
        assert_eq!(all.len(), 30);
        assert!(all.is_sorted_by(|newer, older| newer > older));
    }
}
