//! What reading costs as orders pile up: the same questions over HTTP with few and with many orders
//! stored, and how PostgreSQL found the answers, by its own count.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail, ensure};
use hyper::StatusCode;
use hyper::header::LINK;
use tokio::time::{Instant, sleep};
use tokio_postgres::Client;

use crate::cached;
use crate::database::Database;
use crate::ground::{self, Ground, Servers, step};
use crate::http::{Address, Answer, Connection};
use crate::indexes;
use crate::measure::Bench;
use crate::process;
use client::latency::Latencies;
use client::table;

/// Each user's orders, and how many of those users share a stretch of time: what a page holds is
/// the same however many orders there are.
const USERS: u64 = 100;
const STRETCH: u64 = 10_000;
const LIMIT: u64 = 50;
/// As deep as the cursor goes, where there are so many pages.
const DEEP_PAGE: u64 = 10_000;
/// Not measured: statements are prepared.
const WARM_UP: usize = 50;
/// A p50 that grows by more than this from the fewest orders to the most is not flat.
pub const FLAT: f64 = 1.5;
/// PostgreSQL's idle backends tell what they have counted within 10 s.
const COUNTED_WITHIN: Duration = Duration::from_secs(30);

pub struct Options {
    pub servers: Servers,
    /// How many orders are stored, ascending.
    pub sizes: Vec<u64>,
    /// Of each question.
    pub requests: usize,
    /// Of the load with and without each index.
    pub rounds: usize,
    /// A Redis to read through as well, `host:port`.
    pub redis: Option<String>,
}

/// A question, and the paths that ask it.
pub(crate) struct Question {
    pub name: &'static str,
    paths: Vec<String>,
    /// The index that answers it.
    index: &'static str,
}

/// The tables: of all answers, of what each index costs, of answers through Redis.
///
/// # Errors
/// When an answer is wrong, or was not found as it should be.
pub async fn run(options: &Options, interrupted: impl Future<Output = ()>) -> anyhow::Result<String> {
    ground::used(&options.servers, false, interrupted, async |ground| all(options, ground).await).await
}

async fn all(options: &Options, ground: &Ground) -> anyhow::Result<String> {
    let mut product = ground.start(&process::own_folder()?, &[]).await?;
    let mut text = measure(options, &ground.database, product.address()).await?;
    if options.rounds > 0 {
        let mut bench = Bench::new(indexes::WARM_UP, indexes::MEASURE);
        text.push('\n');
        text.push_str(&indexes::run(&mut bench, &mut product, &ground.database, options.rounds).await?);
    }
    if let Some(redis) = &options.redis {
        text.push('\n');
        text.push_str(&cached::run(ground, &product, redis).await?);
    }
    product.stop().await?;
    Ok(text)
}

async fn measure(options: &Options, database: &Database, address: &Address) -> anyhow::Result<String> {
    let client = database.connect().await?;
    let mut seen: Vec<(&'static str, Vec<Latencies>)> = Vec::new();
    let (mut stored, mut scans) = (0, Vec::new());
    for size in &options.sizes {
        fill(&client, stored, *size).await?;
        stored = *size;
        // Not before: the service closes one that is silent for as long as the filling takes.
        let mut connection = Connection::open(address).await?;
        let questions = questions(&client, &mut connection, address, stored).await?;
        let mut expected = BTreeMap::new();
        // What the search for the deep page and the warm-up have asked is not counted.
        settled(&client).await?;
        let before = counted(&client).await?;
        for question in &questions {
            let asked = ask(&mut connection, address, question, options.requests).await?;
            expect(&mut expected, question, asked.answers, asked.rows);
            match seen.iter_mut().find(|(name, _)| *name == question.name) {
                Some((_, all)) => all.push(asked.again),
                None => seen.push((question.name, vec![asked.again])),
            }
        }
        scans.push(check_scans(&client, &before, &expected).await?);
        step(&format!("{stored} orders: asked and counted"));
    }
    render(options, &seen, &scans)
}

/// Orders as the service would have left them, up to so many: of one every second, newest last.
pub(crate) async fn fill(client: &Client, from: u64, to: u64) -> anyhow::Result<()> {
    step(&format!("storing orders up to {to}"));
    let rows = format!(
        "create temp table filling as
         select (lpad(to_hex((extract(epoch from at) * 1000)::bigint), 12, '0') || '7'
                 || substr(replace(gen_random_uuid()::text, '-', ''), 14))::uuid as order_id,
             'user-' || (n / {STRETCH} * {USERS} + n % {USERS}) as user_id, 'external-' || n as external_id,
             case when n % 200 = 0 then 'rejected' else 'done' end as status, at
         from generate_series({from}, {to} - 1) n,
             lateral (select timestamptz '2025-01-01' + n * interval '1 second' as at) t;
         insert into orders (order_id, user_id, external_id, lifecycle, status, version, content_version, amount,
             currency, items, created_at, updated_at)
         select order_id, user_id, external_id, 'marketplace', status, 2, 1, 44.98, 'USD',
             '[{{\"product_id\":\"book\",\"quantity\":2,\"unit_price\":\"19.99\"}},{{\"product_id\":\"pen\",\"quantity\":4,\"unit_price\":\"1.25\"}}]',
             at, at
         from filling;
         insert into order_refs (user_id, external_id, order_id, fingerprint)
         select user_id, external_id, order_id, '\\x00' from filling;
         insert into order_events (order_id, version, cause, type, from_status, to_status, at)
         select order_id, 1, gen_random_uuid()::text, 'order.created', null, 'new', at from filling
         union all select order_id, 2, gen_random_uuid()::text, 'handled', 'new', status, at from filling;
         drop table filling"
    );
    client.batch_execute(&rows).await.context("storing orders")?;
    for table in ["orders", "order_refs", "order_events", "order_states"] {
        client.batch_execute(&format!("vacuum analyze {table}")).await.context("looking through them")?;
    }
    Ok(())
}

pub(crate) async fn questions(
    client: &Client,
    connection: &mut Connection,
    address: &Address,
    stored: u64,
) -> anyhow::Result<Vec<Question>> {
    // Of those that were filled in, as many of each user at every size; a load's users have fewer, larger orders.
    let sql = "select order_id::text, user_id, external_id, to_char(created_at at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"')
        from orders where external_id like 'external-%' order by md5(order_id::text) limit 500";
    let some = client.query(sql, &[]).await.context("choosing orders")?;
    let of = |path: &dyn Fn(&str, &str, &str, &str) -> String| {
        some.iter().map(|row| path(row.get(0), row.get(1), row.get(2), row.get(3))).collect::<Vec<String>>()
    };
    let deep = deep_pages(connection, address, stored).await?;
    let list = format!("/orders?limit={LIMIT}");
    Ok(vec![
        Question { name: "by id", paths: of(&|id, _, _, _| format!("/orders/{id}")), index: "pkey" },
        Question {
            name: "by external id",
            paths: of(&|_, user, external, _| format!("/orders/by-external/{external}?user_id={user}")),
            index: "refs",
        },
        Question { name: "newest", paths: vec![list.clone()], index: "created_at" },
        Question { name: "by user", paths: of(&|_, user, _, _| format!("{list}&user_id={user}")), index: "user_id" },
        Question {
            name: "by state, most",
            paths: of(&|_, _, _, at| format!("{list}&status=done&created_to={at}")),
            index: "status",
        },
        Question { name: "by state, rare", paths: vec![format!("{list}&status=rejected")], index: "status" },
        Question { name: "by state, none", paths: vec![format!("{list}&status=new")], index: "status" },
        Question {
            name: "by time",
            paths: of(&|_, _, _, at| format!("{list}&created_from=2025-01-01T00:00:00Z&created_to={at}")),
            index: "created_at",
        },
        Question { name: "deep cursor", paths: deep, index: "created_at" },
    ])
}

/// The last pages of the way down, which is gone page by page as any client would.
async fn deep_pages(connection: &mut Connection, address: &Address, stored: u64) -> anyhow::Result<Vec<String>> {
    const KEPT: usize = 20;
    let pages = (stored / LIMIT).min(DEEP_PAGE);
    step(&format!("walking {pages} pages down"));
    let (mut path, mut walked) = (format!("/orders?limit={LIMIT}"), Vec::new());
    let began = Instant::now();
    for page in 1..pages {
        let answer = get(connection, address, &path).await?;
        let link = answer.header(&LINK);
        let next = link.and_then(|link| link.strip_prefix('<')?.split_once('>'));
        path = next.with_context(|| format!("no next page after page {page} of {pages}"))?.0.to_owned();
        walked.push(path.clone());
    }
    step(&format!("walked in {:.1} s", began.elapsed().as_secs_f64()));
    Ok(walked.split_off(walked.len().saturating_sub(KEPT)))
}

/// What the answers to a question took.
pub(crate) struct Asked {
    /// Of each path the first time, when its pages may still lie on the disk: ten million orders do not
    /// fit into most memories.
    pub first: Latencies,
    pub again: Latencies,
    /// How many there were, and how many orders were read for them.
    answers: u64,
    rows: u64,
}

#[cfg(test)]
impl Asked {
    pub(crate) fn of(took: Duration) -> anyhow::Result<Self> {
        let mut asked = Self { first: Latencies::new()?, again: Latencies::new()?, answers: 1, rows: 1 };
        asked.again.record(took);
        Ok(asked)
    }
}

/// Each path once, and then so many requests. One order more than a page holds is read to see whether
/// there is another page.
pub(crate) async fn ask(
    connection: &mut Connection,
    address: &Address,
    question: &Question,
    requests: usize,
) -> anyhow::Result<Asked> {
    let mut asked = Asked { first: Latencies::new()?, again: Latencies::new()?, answers: 0, rows: 0 };
    let first = question.paths.len().max(WARM_UP);
    for (turn, path) in question.paths.iter().cycle().take(first + requests).enumerate() {
        let began = Instant::now();
        let answer = get(connection, address, path).await?;
        match turn {
            turn if turn >= first => asked.again.record(began.elapsed()),
            turn if turn < question.paths.len() => asked.first.record(began.elapsed()),
            _ => {}
        }
        let listed = serde_json::from_slice::<Vec<serde::de::IgnoredAny>>(answer.body).map_or(1, |page| page.len());
        asked.answers += 1;
        asked.rows += listed as u64 + u64::from(answer.header(&LINK).is_some());
    }
    Ok(asked)
}

pub(crate) async fn get<'a>(
    connection: &'a mut Connection,
    address: &Address,
    path: &str,
) -> anyhow::Result<Answer<'a>> {
    let answer = connection.get(&address.path(path)?).await.with_context(|| format!("GET {path}"))?;
    if answer.status != StatusCode::OK {
        bail!("GET {path} was answered {}: {}", answer.status, String::from_utf8_lossy(answer.body));
    }
    Ok(answer)
}

/// Of each kind of index, how often it was searched; and how often a table was read whole.
type Scans = BTreeMap<&'static str, u64>;

const WHOLE: &str = "whole tables";

async fn counted(client: &Client) -> anyhow::Result<Scans> {
    let sql = "
        select case when relname like 'order_refs%' then 'refs'
                    when relname like 'order\\_states\\_%' then 'status'
                    when indexrelname like '%_pkey' then 'pkey'
                    when indexrelname like '%_p__user_id_%' then 'user_id'
                    when indexrelname like '%_p__created_at_%' then 'created_at' end,
            sum(idx_scan)::bigint
        from pg_stat_user_indexes
        where relname like 'orders\\_p_' or relname like 'order\\_refs\\_p_' or relname like 'order\\_states\\_%'
        group by 1
        union all
        select 'whole tables', sum(seq_scan)::bigint
        from pg_stat_user_tables
        where relname like 'orders\\_p_' or relname like 'order\\_refs\\_p_' or relname like 'order\\_states\\_%'";
    let known = ["refs", "pkey", "user_id", "status", "created_at", WHOLE];
    let rows = client.query(sql, &[]).await.context("asking what was searched")?;
    let mut scans = Scans::new();
    for row in rows {
        let kind: Option<&str> = row.get(0);
        if let Some(kind) = known.into_iter().find(|known| Some(*known) == kind) {
            scans.insert(kind, u64::try_from(row.get::<_, i64>(1))?);
        }
    }
    Ok(scans)
}

/// Until the counts have stood still for longer than a backend keeps its own to itself.
async fn settled(client: &Client) -> anyhow::Result<Scans> {
    const STILL: Duration = Duration::from_secs(12);
    let (mut last, mut since) = (counted(client).await?, Instant::now());
    let deadline = Instant::now() + COUNTED_WITHIN;
    while since.elapsed() < STILL && Instant::now() < deadline {
        sleep(Duration::from_millis(500)).await;
        let now = counted(client).await?;
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
    Ok(last)
}

/// One order is in one partition; a list is one range of one index in each of four; orders in a state
/// are one range of one index in each of two, and each is looked up in its partition.
fn expect(expected: &mut Scans, question: &Question, requests: u64, rows: u64) {
    let mut add = |index, count| *expected.entry(index).or_default() += count;
    match question.index {
        "pkey" => add("pkey", requests),
        "refs" => {
            add("refs", requests);
            add("pkey", requests);
        }
        "status" => {
            add("status", requests * 2);
            add("pkey", rows);
        }
        list => add(list, requests * 4),
    }
}

async fn check_scans(client: &Client, before: &Scans, expected: &Scans) -> anyhow::Result<Scans> {
    let after = settled(client).await?;
    let scans: Scans = after.iter().map(|(index, count)| (*index, count - before.get(index).unwrap_or(&0))).collect();
    for (index, count) in &scans {
        let should = expected.get(index).copied().unwrap_or(0);
        ensure!(*count == should, "{index}: searched {count} times instead of {should}: {scans:?}");
    }
    Ok(scans)
}

fn render(options: &Options, seen: &[(&'static str, Vec<Latencies>)], scans: &[Scans]) -> anyhow::Result<String> {
    let mut header = vec!["ms".to_owned()];
    for size in &options.sizes {
        header.extend([format!("{size} orders: p50"), "p99".to_owned()]);
    }
    header.push("p50, last / first".to_owned());
    let mut flat = true;
    let mut rows = Vec::new();
    for (name, latencies) in seen {
        let mut row = vec![(*name).to_owned()];
        let p50s: Vec<f64> = latencies.iter().filter_map(|one| one.percentile_ms(50.0)).collect();
        for one in latencies {
            row.extend([50.0, 99.0].map(|p| one.percentile_ms(p).map_or("–".to_owned(), |ms| format!("{ms:.2}"))));
        }
        let ratio = p50s.last().zip(p50s.first()).map(|(last, first)| last / first).context("nothing was measured")?;
        flat &= ratio <= FLAT;
        row.push(format!("{ratio:.2}"));
        rows.push(row);
    }
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    let mut text = table::markdown(&header, &rows);
    text.push_str(&format!("\np50 within {FLAT} × from the fewest to the most: {}\n", if flat { "yes" } else { "NO" }));
    for (size, scans) in options.sizes.iter().zip(scans) {
        text.push_str(&format!(
            "{size} orders: by id and by external id searched one partition each, lists one index on each of the \
             four (by state: on each of the two of states, and each order by its id), no table was read whole: {scans:?}\n"
        ));
    }
    let at = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    text.push_str(&format!("at {at}, {} requests of each, one after the other\n", options.requests));
    Ok(text)
}
