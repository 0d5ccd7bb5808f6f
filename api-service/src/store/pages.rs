//! Orders by pages, newest first, and how many there are.

use serde::{Deserialize, Serialize};
use shared::db::{Db, DbError};
use tokio_postgres::types::ToSql;

use super::read::{Order, order_columns, order_of, query_on};

macro_rules! depth_of_all {
    () => {
        10000
    };
}

macro_rules! depth_of_user {
    () => {
        100000
    };
}

/// So many orders deep pages go: what lies before a page is counted off, one by one. Of everybody's
/// orders no more are counted, either: to count millions takes as long as to read them.
pub(crate) const DEPTH_OF_ALL: i64 = depth_of_all!();
pub(crate) const DEPTH_OF_USER: i64 = depth_of_user!();

/// Whose orders, and in which state.
#[derive(Clone, Debug, Default)]
pub(crate) struct Filter {
    pub user_id: Option<String>,
    pub status: Option<String>,
}

impl Filter {
    /// So many orders deep pages go.
    pub(crate) fn depth(&self) -> i64 {
        if self.user_id.is_some() { DEPTH_OF_USER } else { DEPTH_OF_ALL }
    }
}

/// Some orders, and how many there are to turn over.
#[derive(Deserialize, Serialize)]
pub(crate) struct Page {
    pub orders: Vec<Order>,
    pub total: i64,
}

/// Finds the page by what the index holds, and reads only the orders on it, one by one. A plan that
/// is made for any page is told by the depth that there are few before it; otherwise it would read
/// and sort all orders.
macro_rules! page {
    ($which:literal, $depth:ident) => {
        concat!(
            "select o.* from (
                 select order_id, created_at
                 from (select order_id, created_at from ",
            $which,
            " order by created_at desc, order_id desc limit ",
            $depth!(),
            ") newest order by created_at desc, order_id desc limit $1 offset $2) k cross join lateral (select ",
            order_columns!(),
            " from orders o where o.order_id = k.order_id limit 1) o
              order by k.created_at desc, k.order_id desc"
        )
    };
}

// One user's orders are all counted, everybody's up to the depth of their pages.
const OF_ALL: (&str, &str) =
    (page!("orders", depth_of_all), "select count(*) from (select from orders limit $1) as counted");
pub(super) const OF_STATUS: (&str, &str) = (
    page!("order_states where status = $3", depth_of_all),
    "select count(*) from (select from order_states where status = $2 limit $1) as counted",
);
const OF_USER: (&str, &str) =
    (page!("orders where user_id = $3", depth_of_user), "select count(*) from orders where user_id = $1");
const OF_USER_AND_STATUS: (&str, &str) = (
    page!("orders where user_id = $3 and status = $4", depth_of_user),
    "select count(*) from orders where user_id = $1 and status = $2",
);

pub(crate) async fn find(db: &Db, filter: &Filter, limit: i64, offset: i64) -> Result<Page, DbError> {
    let ((page, total), of_page, of_total): (_, Vec<&(dyn ToSql + Sync)>, Vec<&(dyn ToSql + Sync)>) =
        match (&filter.user_id, &filter.status) {
            (None, None) => (OF_ALL, vec![&limit, &offset], vec![&DEPTH_OF_ALL]),
            (None, Some(status)) => (OF_STATUS, vec![&limit, &offset, status], vec![&DEPTH_OF_ALL, status]),
            (Some(user_id), None) => (OF_USER, vec![&limit, &offset, user_id], vec![user_id]),
            (Some(user_id), Some(status)) => {
                (OF_USER_AND_STATUS, vec![&limit, &offset, user_id, status], vec![user_id, status])
            }
        };
    let connection = db.connection().await?;
    let both = async {
        let rows = query_on(&connection, page, &of_page).await?;
        Ok((rows, query_on(&connection, total, &of_total).await?))
    };
    let (rows, total) = connection.within(db.settings.query_timeout, both).await?;
    Ok(Page { orders: rows.iter().map(order_of).collect(), total: total.first().map_or(0, |row| row.get(0)) })
}
