//! What Redis gains whoever reads: the same requests to one service without it and to one with it,
//! in turn, while the orders that are read change as well; and again while others write.

use std::time::Duration;

use anyhow::{Context, ensure};
use hyper::StatusCode;
use hyper::header::HeaderValue;
use tokio::time::Instant;

use client::latency::Latencies;
use client::table;

use crate::ground::{Ground, step};
use crate::http::{Address, Connection};
use crate::load::Plan;
use crate::measure;
use crate::process;
use crate::product::Product;
use crate::stored;

/// Orders that are asked for: the n-th a n-th as often as the first (Zipf).
const ORDERS: i64 = 10_000;
const REQUESTS: usize = 30_000;
/// Of so many requests one changes an order, each as likely as any other.
const CHANGES: usize = 20;
/// Who write meanwhile, to each of both.
const WRITERS: usize = 16;
/// Longer than the reading takes; the load is ended with it.
const WRITING: Duration = Duration::from_secs(600);

const QUESTIONS: [&str; 2] = ["by id", "a user's first page"];

struct Known {
    order_id: String,
    user_id: String,
}

/// What one service was asked.
struct Side {
    address: Address,
    connection: Connection,
    latencies: [Latencies; 2],
}

/// `product` runs without Redis; a second one is started with it. The table.
///
/// # Errors
/// When an answer is not what it should be, or Redis is not there.
pub async fn run(ground: &Ground, product: &Product, redis: &str) -> anyhow::Result<String> {
    step("starting a second service, with Redis");
    // Theirs are the same topics and the same group: either worker handles an order, so both have it.
    let settings = [("REDIS_ADDR", redis.to_owned())];
    let mut cached = ground.start(&process::own_folder()?, &settings).await?;
    let text = measure(ground, product, &mut cached).await;
    cached.stop().await?;
    text
}

async fn measure(ground: &Ground, product: &Product, cached: &mut Product) -> anyhow::Result<String> {
    let client = ground.database.connect().await?;
    let sql = "select order_id::text, user_id from orders order by md5(order_id::text) limit $1";
    let rows = client.query(sql, &[&ORDERS]).await.context("choosing orders")?;
    let known: Vec<Known> = rows.iter().map(|row| Known { order_id: row.get(0), user_id: row.get(1) }).collect();

    let quiet = ask(&known, product, cached, "nobody writes").await?;
    let plan = |product: &Product| Plan::accepted(product.address().url(), WRITERS, WRITING);
    let writing = [measure::start_load(&plan(product))?, measure::start_load(&plan(cached))?];
    let busy = ask(&known, product, cached, &format!("{} callers write", 2 * WRITERS)).await?;
    drop(writing);
    Ok(format!(
        "{quiet}\n{busy}\n{ORDERS} orders are asked for as Zipf has it, and one request of {CHANGES} changes one.\n"
    ))
}

/// One table.
async fn ask(known: &[Known], product: &Product, cached: &mut Product, when: &str) -> anyhow::Result<String> {
    let before = looks(cached).await?;
    let mut sides = [Side::open(product.address()).await?, Side::open(cached.address()).await?];
    let mut random = 1;
    for turn in 0..REQUESTS {
        // Log-uniform ranks are Zipf's.
        let rank = (known.len() as f64).powf(uniform(&mut random)) as usize - 1;
        if turn % CHANGES == 0 {
            // By the service with Redis: of a change by one without it Redis cannot know.
            let any = (known.len() as f64 * uniform(&mut random)) as usize;
            sides[1].change(known.get(any).context("no such order")?).await?;
            continue;
        }
        let order = known.get(rank).context("no such order")?;
        let question = usize::from(turn % 3 == 0);
        // Each goes first as often as the other.
        for side in [turn % 2, (turn + 1) % 2] {
            sides[side].ask(question, order, turn > REQUESTS / 10).await?;
        }
    }
    let after = looks(cached).await?;
    let looks = [0, 1, 2].map(|place| after[place] - before[place]);
    ensure!(looks[0] > 0, "Redis was never used: is it there?");
    step(&format!("{REQUESTS} requests while {when}"));
    Ok(render(&sides, looks, when))
}

/// Hits, misses, failures.
async fn looks(cached: &mut Product) -> anyhow::Result<[u64; 3]> {
    let counted = |result: &str| format!("orderstream_cache_total{{result=\"{result}\"}}");
    let (hits, misses) = (cached.api_counted(&counted("hit")).await?, cached.api_counted(&counted("miss")).await?);
    Ok([hits, misses, cached.api_counted("orderstream_cache_failures_total").await?])
}

impl Side {
    async fn open(address: &Address) -> anyhow::Result<Self> {
        let latencies = [Latencies::new()?, Latencies::new()?];
        Ok(Self { address: address.clone(), connection: Connection::open(address).await?, latencies })
    }

    async fn ask(&mut self, question: usize, order: &Known, counts: bool) -> anyhow::Result<()> {
        let path = match question {
            0 => format!("/orders/{}", order.order_id),
            _ => format!("/users/{}/orders", order.user_id),
        };
        let began = Instant::now();
        stored::get(&mut self.connection, &self.address, &path).await?;
        if counts {
            self.latencies[question].record(began.elapsed());
        }
        Ok(())
    }

    async fn change(&mut self, order: &Known) -> anyhow::Result<()> {
        let body = format!(r#"{{"order_id":"{}","notes":"changed"}}"#, order.order_id);
        let (path, prefer) = (self.address.path("/orders")?, HeaderValue::from_static("respond-async"));
        let answer = self.connection.post_json(&path, &prefer, body.as_bytes()).await.context("changing an order")?;
        ensure!(answer.status == StatusCode::OK, "a change was answered {}", answer.status);
        Ok(())
    }
}

/// From 0 to 1 (splitmix64).
fn uniform(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
}

fn render(sides: &[Side; 2], [hits, misses, failures]: [u64; 3], when: &str) -> String {
    let mut rows = Vec::new();
    for (question, name) in QUESTIONS.iter().enumerate() {
        let ms = |side: &Side, p: f64| side.latencies[question].percentile_ms(p);
        let mut row = vec![format!("{name}, {when}")];
        for p in [50.0, 99.0] {
            for side in sides {
                row.push(ms(side, p).map_or("–".to_owned(), |ms| format!("{ms:.2}")));
            }
        }
        let gained = ms(&sides[0], 50.0).zip(ms(&sides[1], 50.0)).map_or(0.0, |(without, with)| without / with);
        row.push(format!("{gained:.2}"));
        rows.push(row);
    }
    let header = ["ms", "p50 without Redis", "with", "p99 without", "with", "p50, without / with"];
    let (reads, rate) = (hits + misses, 100.0 * hits as f64 / (hits + misses) as f64);
    format!(
        "{}\n{rate:.1} % of {reads} looks at Redis were hits, {failures} failed.\n",
        table::markdown(&header, &rows)
    )
}
