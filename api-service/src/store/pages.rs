//! Orders by pages, newest first, and how many there are.

use serde::{Deserialize, Serialize};
use shared::db::{Db, DbError};
use tokio_postgres::Row;

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
    ($whose:literal, $depth:ident, $limit:literal, $offset:literal) => {
        concat!(
            "select o.* from (
                 select order_id, created_at
                 from (select order_id, created_at from orders ",
            $whose,
            " order by created_at desc, order_id desc limit ",
            $depth!(),
            ") newest order by created_at desc, order_id desc limit ",
            $limit,
            " offset ",
            $offset,
            ") k cross join lateral (select ",
            order_columns!(),
            " from orders o where o.order_id = k.order_id limit 1) o
              order by k.created_at desc, k.order_id desc"
        )
    };
}

/// A page of one user's orders; all of them are counted.
pub(crate) async fn of_user(db: &Db, user_id: &str, limit: i64, offset: i64) -> Result<Page, DbError> {
    const PAGE: &str = page!("where user_id = $1", depth_of_user, "$2", "$3");
    const TOTAL: &str = "select count(*) from orders where user_id = $1";
    let connection = db.connection().await?;
    let both = async {
        let rows = query_on(&connection, PAGE, &[&user_id, &limit, &offset]).await?;
        Ok((rows, query_on(&connection, TOTAL, &[&user_id]).await?))
    };
    let (rows, total) = connection.within(db.settings.query_timeout, both).await?;
    Ok(page(&rows, &total))
}

/// A page of everybody's orders; [`DEPTH_OF_ALL`] of them are counted at most.
pub(crate) async fn of_all(db: &Db, limit: i64, offset: i64) -> Result<Page, DbError> {
    const PAGE: &str = page!("", depth_of_all, "$1", "$2");
    const TOTAL: &str = "select count(*) from (select from orders limit $1) as counted";
    let connection = db.connection().await?;
    let both = async {
        let rows = query_on(&connection, PAGE, &[&limit, &offset]).await?;
        Ok((rows, query_on(&connection, TOTAL, &[&DEPTH_OF_ALL]).await?))
    };
    let (rows, total) = connection.within(db.settings.query_timeout, both).await?;
    Ok(page(&rows, &total))
}

fn page(rows: &[Row], total: &[Row]) -> Page {
    Page { orders: rows.iter().map(order_of).collect(), total: total.first().map_or(0, |row| row.get(0)) }
}
